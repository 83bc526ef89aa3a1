//! The tables that map the guest's disk, in memory: the L1 table, and slices of L2 tables. And what
//! they say of it.

use cowbell_engine::mem::Memory;
use cowbell_engine::mutant;
use cowbell_engine::step::Cx;
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{GuestOffset, HostOffset, align_down};
use cowbell_engine::wait::WaitList;

use crate::qcow2::disk::layout::{Invalid, L1Entry, L2Entry, Mapping};
use crate::qcow2::run::image::Image;

/// A stretch of the guest's disk that all is of one kind: contiguous where it has a place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// What is there. A place is that of the first cluster.
    pub mapping: Mapping,
    /// May it be written in place?
    pub copied: bool,
    /// One past the last byte.
    pub end: u64,
    /// The slot of the table slice that says so; none without an L2 table.
    pub slot: Option<usize>,
}

/// What is at a guest offset.
#[derive(Clone, Copy, Debug)]
pub(super) enum Found {
    /// The table slice is not in memory.
    NotLoaded,
    /// It is on its way into this slot.
    Loading { slot: usize },
    /// There is no L2 table: unallocated up to `end`.
    NoTable { end: u64 },
    /// All is of one kind.
    Run(Run),
    /// A table says something impossible.
    Invalid,
}

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Tables {
    image: Image,
    /// As on disk, but for the byte order.
    l1: Vec<u64>,
    /// It is moving, to where it can be longer: no entry of it changes.
    l1_moves: bool,
    /// Who waits to change one.
    pub l1_waiters: WaitList,
    /// A slice is in memory only where the L1 table names an L2 table.
    pub slices: TableCache,
}

impl Tables {
    pub fn new(l1: Vec<u64>, slices: usize, image: Image) -> Tables {
        let unit = 1 << image.geometry.slice_bits();
        let slices = TableCache::new(image.regions.tables, unit, slices);
        Tables { image, l1, l1_moves: false, l1_waiters: WaitList::new(), slices }
    }

    pub fn l1_len(&self) -> u64 {
        self.l1.len() as u64
    }

    pub fn l1_moves(&self) -> bool {
        self.l1_moves
    }

    /// The L1 table begins to move.
    pub fn move_l1(&mut self) {
        self.l1_moves = true;
    }

    /// It moves no more.
    pub fn l1_at_rest(&mut self, cx: &mut Cx<'_>) {
        self.l1_moves = false;
        cx.wake_all(&mut self.l1_waiters);
    }

    /// The L1 table has as many entries from now on, not fewer than before.
    pub fn grow_l1(&mut self, entries: usize) {
        self.l1.resize(entries, 0);
    }

    /// What the L1 table says of the guest's byte `at`.
    pub fn l1_entry(&self, at: u64) -> Result<Option<L1Entry>, Invalid> {
        let index = self.image.geometry.l1_index(GuestOffset(at));
        let word = self.l1.get(index as usize).copied().unwrap_or(0);
        L1Entry::decode(word, self.image.geometry)
    }

    pub fn set_l1_entry(&mut self, index: u32, entry: L1Entry) {
        self.l1[index as usize] = entry.encode();
    }

    /// Copies the L1 table's entries from `first` on, as they are on disk; behind its end are zeros.
    pub fn copy_l1(&self, first: usize, bytes: &mut [u8]) {
        for (i, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = self.l1.get(first + i).copied().unwrap_or(0).to_be_bytes();
        }
    }

    /// Is there an L2 table for `at` that nobody shares?
    pub fn owns_table(&self, at: u64) -> bool {
        let entry = self.l1_entry(at).ok().flatten();
        entry.is_some_and(|entry| entry.copied) || mutant!("qcow2_shared_table_changed")
    }

    /// The host offset of the L2 table that maps `at`, which has one.
    fn table_of(&self, at: u64) -> HostOffset {
        let entry = self.l1_entry(at).ok().flatten();
        entry.expect("its slice was loaded through this entry").table
    }

    /// Where the slice that maps `at` is in the file.
    pub fn slice_offset(&self, at: u64) -> u64 {
        let geometry = self.image.geometry;
        let inside = geometry.l2_index(GuestOffset(at)) << geometry.entry_bits();
        self.table_of(at).0 + align_down(inside, 1 << geometry.slice_bits())
    }

    /// Panics if somebody waits or loads, or a slice has not as many pins as `pins` says.
    pub fn assert_idle(&self, pins: impl Fn(usize) -> u32) {
        assert!(!self.l1_moves && self.l1_waiters.is_empty(), "the L1 table is moving");
        self.slices.assert_idle(pins);
    }

    /// Ends one pin of a slice, and wakes who needs its slot.
    pub fn unpin(&mut self, slot: usize, cx: &mut Cx<'_>) {
        self.slices.unpin(slot);
        if !self.slices.full.is_empty() {
            cx.wake_all(&mut self.slices.full);
        }
    }

    /// What is at `at`, of `at..end`, as far as memory says.
    #[inline]
    pub fn look_up(&mut self, at: u64, end: u64, is_write: bool, mem: &Memory) -> Found {
        match self.slices.find(self.image.slice_key(at)) {
            Some(slot)
                if self.slices.is_ready(slot) || mutant!("qcow2_slice_used_while_loading") =>
            {
                self.run_in(slot, at, end, is_write, mem)
            }
            Some(slot) => Found::Loading { slot },
            None => self.look_up_l1(at, end),
        }
    }

    /// What the L1 table says: a slice is in memory only where it names a table.
    fn look_up_l1(&self, at: u64, end: u64) -> Found {
        match self.l1_entry(at) {
            Err(_) => Found::Invalid,
            Ok(None) => {
                let span_bits = self.image.geometry.l2_span_bits();
                Found::NoTable { end: (((at >> span_bits) + 1) << span_bits).min(end) }
            }
            Ok(Some(_)) => Found::NotLoaded,
        }
    }

    /// Where all of `at..end` is, if it is data in one piece, by the slice in `slot`; may it be written
    /// in place?
    #[inline(always)]
    pub fn one_piece(
        &self,
        slot: usize,
        at: u64,
        end: u64,
        is_write: bool,
        mem: &Memory,
    ) -> Option<(u64, bool)> {
        let geometry = self.image.geometry;
        let inside = at & (geometry.cluster_size() - 1);
        let is_one_cluster = inside + (end - at) <= geometry.cluster_size();
        let (host, copied) = if is_one_cluster && geometry.is_plain() {
            let bytes = self.slices.bytes_from(slot, 0, mem);
            L2Entry::plain(bytes, geometry.slice_index(GuestOffset(at)), geometry)?
        } else {
            self.one_run(slot, at, end, is_write, mem)?
        };
        Some((host.0 + inside, copied))
    }

    #[inline(never)]
    fn one_run(
        &self,
        slot: usize,
        at: u64,
        end: u64,
        is_write: bool,
        mem: &Memory,
    ) -> Option<(HostOffset, bool)> {
        match self.run_in(slot, at, end, is_write, mem) {
            Found::Run(run) if run.end == end => match run.mapping {
                Mapping::Data(host) => Some((host, run.copied)),
                Mapping::Zero(_) | Mapping::Unallocated(_) | Mapping::Compressed(_) => None,
            },
            _ => None,
        }
    }

    /// The run that begins at `at`, by the slice in `slot`, which maps all of `at..end` or more;
    /// it ends with the slice. Runs to be written in place are of one flag.
    #[inline(always)]
    pub fn run_in(&self, slot: usize, at: u64, end: u64, is_write: bool, mem: &Memory) -> Found {
        let geometry = self.image.geometry;
        let bytes = self.slices.bytes_from(slot, 0, mem);
        let entry = L2Entry::read(bytes, self.image.slice_index(at), geometry);
        let Ok(mapping) = entry.mapping(geometry.sub_index(GuestOffset(at)), geometry) else {
            return Found::Invalid;
        };
        let copied = entry.is_copied();
        let run_end = ((at >> geometry.unit_bits()) + 1) << geometry.unit_bits();
        let run = Run { mapping, copied, end: run_end.min(end), slot: Some(slot) };
        if run.end >= end {
            return Found::Run(run);
        }
        Found::Run(match (mapping, entry.following(geometry)) {
            (Mapping::Data(_), Some(following)) => {
                self.extend_data(run, following, end, is_write, bytes)
            }
            _ => self.extend(run, end, is_write, bytes),
        })
    }

    /// As `extend`, for data whose next cluster would have the entry `following`: most runs.
    #[inline(always)]
    fn extend_data(
        &self,
        mut run: Run,
        mut following: L2Entry,
        end: u64,
        is_write: bool,
        bytes: &[u8],
    ) -> Run {
        let mut index = self.image.slice_index(run.end - 1) + 1;
        while run.end < end && index < bytes.len() / 8 {
            let here = L2Entry::read(bytes, index, self.image.geometry);
            let goes_on = if is_write { here == following } else { here.leads_with(following) };
            if !goes_on && !mutant!("qcow2_run_ignores_type") {
                break;
            }
            run.end += self.image.geometry.cluster_size();
            index += 1;
            match following.following(self.image.geometry) {
                Some(next) => following = next,
                None => break,
            }
        }
        run.end = run.end.min(end);
        run
    }

    /// A run, as far as it goes on to `end`.
    #[inline(never)]
    fn extend(&self, mut run: Run, end: u64, is_write: bool, bytes: &[u8]) -> Run {
        let geometry = self.image.geometry;
        let cluster_size = geometry.cluster_size();
        let end = end.min(self.image.slice_end(run.end - 1));
        let mut expected = run.mapping;
        while run.end < end {
            let starts_cluster = run.end & (cluster_size - 1) == 0;
            let next = |host: HostOffset| HostOffset(host.0 + cluster_size);
            expected = match expected {
                Mapping::Compressed(_) if starts_cluster => break,
                mapping if !starts_cluster => mapping,
                Mapping::Data(host) => Mapping::Data(next(host)),
                Mapping::Zero(host) => Mapping::Zero(host.map(next)),
                Mapping::Unallocated(host) => Mapping::Unallocated(host.map(next)),
                Mapping::Compressed(_) => break,
            };
            let entry = L2Entry::read(bytes, self.image.slice_index(run.end), geometry);
            let here = entry.mapping(geometry.sub_index(GuestOffset(run.end)), geometry);
            let same_flag = !is_write || entry.is_copied() == run.copied;
            if (here != Ok(expected) || !same_flag) && !mutant!("qcow2_run_ignores_type") {
                break;
            }
            run.end += geometry.unit_size();
        }
        run.end = run.end.min(end);
        run
    }
}
