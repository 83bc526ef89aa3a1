//! The tables that map the guest's disk, in memory: the L1 table, and slices of L2 tables. What is
//! looked up in them, and what of them is ahead of the disk.
//!
//! A changed slice is pinned until it has been written. A writeback writes copies, made when it
//! began: `seal`. The L1 table needs none: an entry changes once, from "no table", which is what
//! is written of entries that came later.

use cowbell_engine::mem::Memory;
use cowbell_engine::mutant;
use cowbell_engine::op::{Op, Segs};
use cowbell_engine::step::Cx;
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{Errno, GuestOffset, HostOffset};

use crate::parts::changed::Changed;
use crate::parts::past_end::PastEnd;
use crate::qed::disk::layout::{Bounds, Entry};
use crate::qed::rest::open::L1_BLOCK_ENTRIES;
use crate::qed::run::image::{Image, SLICE_BITS, SLICE_BYTES};

/// What is at a guest offset.
#[derive(Clone, Copy)]
pub(crate) enum Found {
    /// The table slice is not in memory.
    NotLoaded { table: HostOffset },
    /// It is being loaded into this slot, or is about to be.
    Loading { slot: usize },
    /// There is no L2 table: unallocated up to `end`.
    NoTable { end: u64 },
    /// Up to `end` all is as `entry` says; data is contiguous from `entry`'s cluster on.
    Run { entry: Entry, end: u64, slot: usize },
    /// A table says something impossible.
    Invalid,
}

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Tables {
    image: Image,
    /// As on disk, but for the byte order.
    l1: Vec<u64>,
    /// A slice is in memory only where the L1 table names an L2 table.
    pub slices: TableCache,
    /// The slices are its pieces.
    past_end: PastEnd,
    /// Slots that have changed, or whose copies are being written: a pin goes with each.
    changed: Changed,
    /// Entries of the L1 table that came since the last seal, and those that are being written.
    new_l1: Vec<u32>,
    sealed_l1: Vec<u32>,
}

impl Tables {
    /// Of a file that is `file_len` bytes long, and a disk of `slices` slices.
    pub fn new(l1: Vec<u64>, file_len: u64, slices: u64, image: Image) -> Tables {
        let cache = image.regions.cache();
        let slots = cache.len();
        let mut tables = Tables {
            image,
            l1,
            slices: cache,
            past_end: PastEnd::new(file_len, slices),
            changed: Changed::new(slots),
            new_l1: Vec::with_capacity(64),
            sealed_l1: Vec::with_capacity(64),
        };
        tables.disarm_l1(0);
        tables
    }

    pub fn l1_len(&self) -> u64 {
        self.l1.len() as u64
    }

    /// More of the L1 table was read.
    pub fn extend_l1(&mut self, bytes: &[u8]) {
        let from = self.l1.len();
        self.l1.extend(bytes.as_chunks::<8>().0.iter().map(|raw| u64::from_le_bytes(*raw)));
        self.disarm_l1(from);
    }

    /// The disk has grown to so many slices.
    pub fn grow_disk(&mut self, slices: u64) {
        self.past_end.extend(slices);
    }

    /// What an entry could point at when the image was opened.
    fn bounds_at_open(&self) -> Bounds {
        self.image.bounds(self.past_end.end())
    }

    /// L1 entries from `from` on have been loaded: see [`PastEnd`].
    fn disarm_l1(&mut self, from: usize) {
        let (bounds, bytes) = (self.bounds_at_open(), self.image.geometry.table_bytes());
        if self.image.writable {
            let loaded = self.l1[from..].iter_mut();
            loaded.filter(|raw| bounds.is_past_end(**raw, bytes)).for_each(|raw| *raw = u64::MAX);
        }
    }

    /// What is at the guest's byte `at`, in a file that ends where `bounds` says; not behind `end`.
    pub fn look_up(&mut self, at: u64, end: u64, bounds: Bounds, mem: &Memory) -> Found {
        match self.slices.find(self.image.slice_key(at)) {
            Some(slot) if self.slices.is_ready(slot) || mutant!("slice_used_while_loading") => {
                self.run_in(slot, at, end, bounds, mem)
            }
            Some(slot) => Found::Loading { slot },
            None => self.look_up_l1(at, end, bounds),
        }
    }

    /// What the L1 table says: a slice is in memory only where it names a table.
    fn look_up_l1(&self, at: u64, end: u64, bounds: Bounds) -> Found {
        let l1_index = self.image.geometry.l1_index(GuestOffset(at));
        match bounds.l1_entry(self.l1_entry(l1_index)) {
            None => Found::Invalid,
            Some(None) => {
                let span_end = (l1_index + 1).saturating_mul(self.image.geometry.l2_span());
                Found::NoTable { end: span_end.min(end) }
            }
            Some(Some(table)) => Found::NotLoaded { table },
        }
    }

    #[inline(always)]
    pub fn run_in(&self, slot: usize, at: u64, end: u64, bounds: Bounds, mem: &Memory) -> Found {
        let bits = self.image.geometry.cluster_bits();
        let index = self.image.slice_index(at);
        let (entries, _) = self.slices.bytes_from(slot, index * 8, mem).as_chunks::<8>();
        let first = entries.first().map(|entry| bounds.l2_entry(u64::from_le_bytes(*entry)));
        let Some(Some(entry)) = first else { return Found::Invalid };
        let mut run_end = ((at >> bits) + 1) << bits;
        let mut next = 1;
        let mut expected = entry;
        while run_end < end && next < entries.len() {
            if let Entry::Data(offset) = expected {
                expected = Entry::Data(HostOffset(offset.0 + self.image.geometry.cluster_size()));
            }
            let here = bounds.l2_entry(u64::from_le_bytes(entries[next]));
            if here != Some(expected) && !mutant!("run_ignores_type") {
                break;
            }
            run_end += 1 << bits;
            next += 1;
        }
        Found::Run { entry, end: run_end.min(end), slot }
    }

    fn l1_entry(&self, index: u64) -> u64 {
        self.l1.get(index as usize).copied().unwrap_or(0)
    }

    /// The entry that maps the guest's byte `at` cannot be: which one, and where is it in the file?
    pub fn invalid_entry(&self, at: u64, bounds: Bounds) -> (&'static str, u64) {
        let index = self.image.geometry.l1_index(GuestOffset(at));
        match bounds.l1_entry(self.l1_entry(index)) {
            Some(Some(table)) => {
                let inside = self.image.slice_index(at) as u64 * 8;
                ("L2 entry is invalid", self.slice_offset(table, at) + inside)
            }
            _ => ("L1 entry is invalid", self.image.l1_offset.0 + index * 8),
        }
    }

    /// Where the slice that maps `at` is on disk; `table` is its L2 table.
    fn slice_offset(&self, table: HostOffset, at: u64) -> u64 {
        let index = self.image.geometry.l2_index(GuestOffset(at));
        table.0 + (index >> SLICE_BITS) * SLICE_BYTES as u64
    }

    /// Begins to load the slice that maps `at`. `None`: there is no slot for it.
    pub fn load(&mut self, at: u64, table: HostOffset, cx: &mut Cx<'_>) -> Option<usize> {
        let slot = self.slices.reserve(self.image.slice_key(at))?;
        let seg = self.slices.seg(slot, 0, SLICE_BYTES);
        cx.issue(self.image.read_op(self.slice_offset(table, at), Segs::one(seg)));
        Some(slot)
    }

    /// The slice of `slot` is there, or could not be loaded.
    pub fn loaded(&mut self, slot: usize, result: Result<(), Errno>, cx: &mut Cx<'_>) {
        if result.is_ok() && self.image.writable {
            let (bounds, size) = (self.bounds_at_open(), self.image.geometry.cluster_size());
            let key = self.slices.key(slot);
            let bytes = self.slices.bytes_mut(slot, cx.mem());
            let past = |entry| bounds.is_past_end(u64::from_le_bytes(entry), size);
            self.past_end.disarm(key, SLICE_BYTES, bytes, past);
        }
        self.slices.load_ended(slot, result.is_ok(), cx);
    }

    /// There is an L2 table for `at` now, empty, at `offset`.
    pub fn link(&mut self, at: u64, offset: u64, cx: &mut Cx<'_>) {
        let index = self.image.geometry.l1_index(GuestOffset(at));
        self.l1[index as usize] = offset;
        self.new_l1.push(index as u32);
        self.slices.put_zeros(self.image.slice_key(at), cx);
    }

    /// Puts the entries of `count` clusters, from that of `at` on, into their slice: data clusters
    /// follow one another in the file.
    #[inline]
    pub fn publish(&mut self, slot: usize, at: u64, count: u64, entry: Entry, cx: &mut Cx<'_>) {
        let size = self.image.geometry.cluster_size();
        let first = self.image.slice_index(at);
        let (entries, _) = self.slices.bytes_mut(slot, cx.mem()).as_chunks_mut::<8>();
        for (i, raw) in entries[first..first + count as usize].iter_mut().enumerate() {
            let value = match entry {
                Entry::Data(offset) => offset.0 + i as u64 * size,
                other => other.encode(),
            };
            *raw = value.to_le_bytes();
        }
        self.past_end.changed(self.image.slice_key(at)..self.image.slice_key(at) + 1);
        self.note_changed(slot);
    }

    fn note_changed(&mut self, slot: usize) {
        if self.changed.note(slot) && !mutant!("qed_changed_slice_not_pinned") {
            self.slices.pin(slot);
        }
    }

    /// Ends one pin of a slice, and wakes who needs its slot.
    pub fn unpin(&mut self, slot: usize, cx: &mut Cx<'_>) {
        self.slices.unpin(slot);
        cx.wake_all(&mut self.slices.full);
    }

    /// Is a slice changed, and not sealed?
    pub fn has_changed_slices(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Has anything changed that is not sealed?
    pub fn has_changes(&self) -> bool {
        !self.changed.is_empty() || !self.new_l1.is_empty()
    }

    /// Copies what has changed.
    pub fn seal(&mut self, cx: &mut Cx<'_>) {
        self.changed.seal();
        std::mem::swap(&mut self.new_l1, &mut self.sealed_l1);
        self.sealed_l1.sort_unstable();
        let regions = self.image.regions;
        for &slot in self.changed.sealed() {
            let off = regions.copy_of_slot(slot as usize).off as usize;
            self.slices.copy_to_region(slot as usize, regions.copies(), off, cx.mem());
        }
    }

    /// Issues writes of the sealed blocks of the L1 table and slices, from number `next` on, as many
    /// as there is room for; answers the number of the next. `None`: there was none left.
    pub fn write(&self, next: u32, cx: &mut Cx<'_>) -> Option<u32> {
        let (mut next, begin) = (next as usize, next as usize);
        let (blocks, slices) = (self.sealed_l1.len(), self.changed.sealed());
        // A block at a time: they are rare, and there is one place for a copy.
        if next < blocks {
            let block = self.block_of(next);
            self.write_l1(block, cx);
            while next < blocks && self.block_of(next) == block {
                next += 1;
            }
        }
        while next >= blocks && next < blocks + slices.len() && cx.room() > 0 {
            self.write_slice(slices[next - blocks] as usize, cx);
            next += 1;
        }
        (next > begin).then_some(next as u32)
    }

    /// The block of the L1 table that the sealed entry number `i` is in.
    fn block_of(&self, i: usize) -> u64 {
        u64::from(self.sealed_l1[i]) / L1_BLOCK_ENTRIES
    }

    fn write_l1(&self, block: u64, cx: &mut Cx<'_>) {
        let seg = self.image.regions.copy_of_l1();
        let first = block * L1_BLOCK_ENTRIES;
        let copy = &mut cx.mem().region_mut(self.image.regions.copies())[seg.off as usize..];
        let entries = copy.as_chunks_mut::<8>().0.iter_mut().take(L1_BLOCK_ENTRIES as usize);
        for (index, raw) in (first..).zip(entries) {
            *raw = self.l1_entry(index).to_le_bytes();
        }
        for &index in &self.new_l1 {
            // Nobody knows whether its table is within the file's stable length.
            if u64::from(index) / L1_BLOCK_ENTRIES == block && !mutant!("qed_new_tables_not_sealed")
            {
                let inside = (u64::from(index) - first) as usize * 8;
                cx.mem().region_mut(self.image.regions.copies())[seg.off as usize + inside..][..8]
                    .fill(0);
            }
        }
        cx.issue(Op::write(self.image.file, self.image.l1_offset.0 + first * 8, Segs::one(seg)));
    }

    fn write_slice(&self, slot: usize, cx: &mut Cx<'_>) {
        let at = self.slices.key(slot) << SLICE_BITS << self.image.geometry.cluster_bits();
        // It was loaded through this entry, or made with it.
        let table = HostOffset(self.l1_entry(self.image.geometry.l1_index(GuestOffset(at))));
        let mut seg = self.image.regions.copy_of_slot(slot);
        if mutant!("qed_slices_not_sealed") {
            seg = self.slices.seg(slot, 0, SLICE_BYTES);
        }
        cx.issue(Op::write(self.image.file, self.slice_offset(table, at), Segs::one(seg)));
    }

    /// The copies are of no use any more. Unless all have been `written`, what they hold is to be
    /// written again: nobody knows which of it is on disk, and memory is ahead of both.
    pub fn unseal(&mut self, written: bool, cx: &mut Cx<'_>) {
        self.changed.unseal(written, |slot| {
            if !mutant!("qed_changed_slice_not_pinned") {
                self.slices.unpin(slot);
            }
        });
        if !written && !mutant!("qed_failed_l1_forgotten") {
            self.new_l1.append(&mut self.sealed_l1);
        }
        self.sealed_l1.clear();
        if !mutant!("qed_writeback_makes_no_room") {
            cx.wake_all(&mut self.slices.full);
        }
    }

    /// Panics if somebody waits or loads, or if a slice is pinned that has not changed: what could
    /// not be written stays in memory.
    pub fn assert_idle(&self) {
        assert!(
            self.changed.sealed().is_empty() && self.sealed_l1.is_empty(),
            "tables are being written"
        );
        self.slices.assert_idle(|slot| self.changed.contains(slot).into());
    }
}
