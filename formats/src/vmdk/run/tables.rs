//! The grain tables that are in memory, and the directories: what is looked up in them, and what of
//! them is ahead of the disk.
//!
//! A changed table is pinned until it has been written. A writeback writes whole sectors of copies, which
//! are made when it begins: each lies behind its table, in the same slot.

use cowbell_engine::mem::Memory;
use cowbell_engine::mutant;
use cowbell_engine::op::{Op, Segs, Target};
use cowbell_engine::step::Cx;
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{Errno, RegionId};

use crate::parts::changed::Changed;
use crate::parts::past_end::PastEnd;
use crate::vmdk::disk::layout::{Entry, Header, SECTOR, SECTOR_BITS};
use crate::vmdk::rest::open::{Extent, ExtentKind};
use crate::vmdk::run::directories::Directories;
use crate::vmdk::run::extents::{Extents, Grains, Kind, Place};
use crate::vmdk::run::image::{COPY_AT, SLOT_BYTES};

/// What is at a guest offset.
#[derive(Clone, Copy)]
pub(crate) enum Found {
    /// A flat extent: byte `host` of its file, up to `end`.
    Flat { host: u64, end: u64 },
    /// The table is not in memory; this is its place.
    NotLoaded { table: u64 },
    /// It is being loaded into this slot, or is about to be.
    Loading { slot: usize },
    /// There is no table: unallocated up to `end`.
    NoTable { end: u64 },
    /// Up to `end` all is as `entry` says; data is contiguous from `entry`'s grain on.
    Run { entry: Entry, end: u64, slot: usize },
    /// A table says something impossible.
    Invalid,
}

/// Grains of one table, from the first one on, whose entries change.
#[derive(Clone, Copy, Hash, Debug)]
pub(super) struct Grown {
    /// The first one in its extent.
    pub grain: u64,
    pub count: u64,
    /// Of the table.
    pub slot: usize,
    /// The first one's; data grains follow one another in the file.
    pub entry: Entry,
}

/// What a slot of the cache is for, and what of it is to be written.
#[derive(Clone, Copy, Hash, Debug, Default)]
struct Slot {
    extent: u32,
    table: u32,
    /// Bytes that have changed since the last seal, in whole sectors; and those that are being written.
    changed: Option<(u16, u16)>,
    sealed: Option<(u16, u16)>,
}

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Tables {
    pub cache: TableCache,
    slots: Vec<Slot>,
    directories: Directories,
    /// For each extent. The pieces are sectors of tables.
    past_end: Vec<PastEnd>,
    /// Slots whose tables have changed, or are being written: a pin goes with each.
    changed: Changed,
    writable: bool,
}

impl Tables {
    /// Of these extents, whose directories are taken. `copies` has room for those.
    pub fn new(
        extents: &mut [Extent],
        cache: TableCache,
        copies: RegionId,
        writable: bool,
    ) -> Tables {
        let past_end = extents.iter().map(|extent| match &extent.kind {
            ExtentKind::Sparse(sparse) => {
                let sectors = sparse.header.directory_entries() * sectors_of_table(&sparse.header);
                PastEnd::new(sparse.grains_end(), sectors)
            }
            ExtentKind::Flat(_) | ExtentKind::Zero => PastEnd::new(0, 0),
        });
        let slots = cache.len();
        Tables {
            past_end: past_end.collect(),
            directories: Directories::new(extents, copies),
            slots: vec![Slot::default(); slots],
            cache,
            changed: Changed::new(slots),
            writable,
        }
    }

    /// What is at byte `at` of the disk; not behind `end`.
    #[inline(always)]
    pub fn look_up(&mut self, extents: &Extents, at: u64, end: u64, mem: &Memory) -> Found {
        let index = extents.index_at(at);
        let extent = extents.get(index);
        let end = end.min(extent.end);
        let grains = match &extent.kind {
            Kind::Flat(host) => return Found::Flat { host: host + (at - extent.start), end },
            Kind::Zero => return Found::Run { entry: Entry::Zero, end, slot: usize::MAX },
            Kind::Sparse(grains) => grains,
        };
        let table = (at - extent.start) >> grains.header.span_bits();
        match self.cache.find(grains.first_key + table) {
            Some(slot) if self.cache.is_ready(slot) => {
                let Header { grain_bits, table_bits, .. } = grains.header;
                let (start, whole_end) = (extent.start, extent.end);
                let place = Place { extent: index, start, end: whole_end, grain_bits, table_bits };
                self.run_in(slot, grains, place, at, end, mem)
            }
            Some(slot) => Found::Loading { slot },
            None => self.look_up_directory(grains, extents.place(index), at, end),
        }
    }

    /// What the directory says: a table is in memory only where it names one.
    #[inline(never)]
    fn look_up_directory(&self, grains: &Grains, place: Place, at: u64, end: u64) -> Found {
        let raw = self.directories.entry(place.extent, place.table_of(at));
        match grains.header.table(raw, grains.space.end()) {
            None => Found::Invalid,
            Some(None) => Found::NoTable { end: place.table_end(at).min(end) },
            Some(Some(table)) => Found::NotLoaded { table },
        }
    }

    #[inline(always)]
    fn run_in(
        &self,
        slot: usize,
        grains: &Grains,
        place: Place,
        at: u64,
        end: u64,
        mem: &Memory,
    ) -> Found {
        let bounds = grains.header.bounds(grains.space.end());
        let grain = place.grain_of(at);
        let index = place.entry_of(grain);
        let len = (4 << place.table_bits) - index * 4;
        let (entries, _) = self.cache.bytes_from(slot, index * 4, mem)[..len].as_chunks::<4>();
        let first = entries.first().and_then(|entry| bounds.entry(u32::from_le_bytes(*entry)));
        let Some(entry) = first else { return Found::Invalid };
        let mut run_end = place.grain_start(grain + 1);
        let mut next = 1;
        let mut expected = entry;
        // Deflated grains do not follow one another at a grain's distance.
        let alone = matches!(entry, Entry::Data(_)) && grains.header.is_compressed();
        while run_end < end && next < entries.len() && !alone {
            if let Entry::Data(offset) = expected {
                expected = Entry::Data(offset + place.grain_size());
            }
            let here = bounds.entry(u32::from_le_bytes(entries[next]));
            if here != Some(expected) && !mutant!("vmdk_run_ignores_type") {
                break;
            }
            run_end += place.grain_size();
            next += 1;
        }
        Found::Run { entry, end: run_end.min(end), slot }
    }

    /// The entry that maps byte `at` cannot be: says so.
    pub fn tell_invalid(&self, extents: &Extents, at: u64, cx: &mut Cx<'_>) {
        let place = extents.place(extents.index_at(at));
        let (grains, index) = (extents.grains(place.extent), place.table_of(at));
        let raw = self.directories.entry(place.extent, index);
        match grains.header.table(raw, grains.space.end()) {
            Some(Some(table)) => {
                let inside = place.entry_of(place.grain_of(at)) as u64 * 4;
                cx.tell_corrupt("grain table entry is invalid", table + inside);
            }
            _ => {
                let entry_at = self.directories.entry_at(place.extent, index);
                cx.tell_corrupt("grain directory entry is invalid", entry_at);
            }
        }
    }

    /// Begins to load the table that maps `at`, which is at byte `table` of its file. `None`: there is
    /// no slot for it.
    pub fn load(
        &mut self,
        extents: &Extents,
        at: u64,
        table: u64,
        cx: &mut Cx<'_>,
    ) -> Option<usize> {
        let place = extents.place(extents.index_at(at));
        let (grains, index) = (extents.grains(place.extent), place.table_of(at));
        let bytes = grains.header.table_bytes() as usize;
        debug_assert!(bytes <= COPY_AT);
        let slot = self.cache.reserve(grains.first_key + index)?;
        (self.slots[slot].extent, self.slots[slot].table) = (place.extent as u32, index as u32);
        let file = Target::File(extents.get(place.extent).file);
        cx.issue(Op::read(file, table, Segs::one(self.cache.seg(slot, 0, bytes))));
        Some(slot)
    }

    /// The table of `slot` is there, or could not be loaded.
    pub fn loaded(
        &mut self,
        slot: usize,
        result: Result<(), Errno>,
        extents: &Extents,
        cx: &mut Cx<'_>,
    ) {
        if result.is_ok() && self.writable {
            let Slot { extent, table, .. } = self.slots[slot];
            let header = &extents.grains(extent as usize).header;
            let past_end = &self.past_end[extent as usize];
            let end = header.bounds(past_end.end()).end;
            let first = u64::from(table) * sectors_of_table(header);
            let bytes = &mut self.cache.bytes_mut(slot, cx.mem())[..header.table_bytes() as usize];
            let past = |entry| u64::from(u32::from_le_bytes(entry)) >= end;
            past_end.disarm(first, SECTOR as usize, bytes, past);
        }
        self.cache.load_ended(slot, result.is_ok(), cx);
    }

    /// Ends one pin, and wakes who needs the slot.
    pub fn unpin(&mut self, slot: usize, cx: &mut Cx<'_>) {
        self.cache.unpin(slot);
        cx.wake_all(&mut self.cache.full);
    }

    /// Where in its file the next data is behind that of `grain`, as far as its table knows; or 0.
    pub fn next_in_file(&self, slot: usize, place: Place, grain: u64, mem: &Memory) -> u64 {
        let bytes = &self.cache.bytes(slot, mem)[..4 << place.table_bits];
        let entries = &bytes.as_chunks::<4>().0[place.entry_of(grain) + 1..];
        let mut later = entries.iter().map(|entry| u32::from_le_bytes(*entry));
        later.find(|&raw| raw > 1).map_or(0, |raw| u64::from(raw) << SECTOR_BITS)
    }

    /// There is a table for `at` now, and a redundant one behind it, both empty, at `offset`.
    pub fn link(&mut self, extents: &Extents, at: u64, offset: u64, cx: &mut Cx<'_>) {
        let place = extents.place(extents.index_at(at));
        let (grains, index) = (extents.grains(place.extent), place.table_of(at));
        let sector = (offset >> SECTOR_BITS) as u32;
        let behind = (grains.header.table_bytes() >> SECTOR_BITS) as u32;
        self.directories.set(place.extent, index, sector, sector + behind);
        if let Some(slot) = self.cache.put_zeros(grains.first_key + index, cx) {
            (self.slots[slot].extent, self.slots[slot].table) = (place.extent as u32, index as u32);
        }
    }

    /// There is a table for `at` now, in a stream.
    pub fn link_in_stream(&mut self, place: Place, at: u64, sector: u32) {
        self.directories.set_in_stream(place.extent, place.table_of(at), sector);
    }

    /// The entries of a stream's directory.
    pub fn directory(&self, extent: usize) -> &[u32] {
        self.directories.entries(extent)
    }

    /// Puts entries into their table: everybody sees them.
    #[inline]
    pub fn publish(&mut self, extents: &Extents, grown: Grown, cx: &mut Cx<'_>) {
        let Grown { grain, count, slot, entry } = grown;
        let state = &mut self.slots[slot];
        let header = &extents.grains(state.extent as usize).header;
        let first = (grain & ((1 << header.table_bits) - 1)) as usize;
        let (from, to) = (first * 4, (first + count as usize) * 4);
        let bytes = self.cache.bytes_mut(slot, cx.mem());
        for (i, raw) in bytes[from..to].as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let value = match entry {
                Entry::Data(offset) => Entry::Data(offset + ((i as u64) << header.grain_bits)),
                other => other,
            };
            *raw = value.encode().to_le_bytes();
        }
        let sectors = from as u64 / SECTOR..(to as u64).div_ceil(SECTOR);
        let piece = u64::from(state.table) * sectors_of_table(header);
        self.past_end[state.extent as usize].changed(piece + sectors.start..piece + sectors.end);
        let range = ((sectors.start * SECTOR) as u16, (sectors.end * SECTOR) as u16);
        state.changed = union(state.changed, Some(range));
        if self.changed.note(slot) {
            self.cache.pin(slot);
        }
    }

    /// Has a table changed since the last seal?
    pub fn have_changed_tables(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Has anything?
    pub fn have_changed(&self) -> bool {
        !self.changed.is_empty() || self.directories.have_changed()
    }

    /// Copies what has changed.
    pub fn seal(&mut self, cx: &mut Cx<'_>) {
        self.changed.seal();
        for &slot in self.changed.sealed() {
            let state = &mut self.slots[slot as usize];
            state.sealed = state.changed.take();
            let bytes = self.cache.bytes_mut(slot as usize, cx.mem());
            let (current, copy) = bytes.split_at_mut(COPY_AT);
            copy.copy_from_slice(current);
        }
        self.directories.seal(cx);
    }

    /// Writes the copies from number `next` on, or those of the redundant tables, as many as there is
    /// room for; answers the number of the next. `None`: there was none left. First are the
    /// directories' sectors.
    pub fn write(
        &self,
        redundant: bool,
        next: u32,
        extents: &Extents,
        cx: &mut Cx<'_>,
    ) -> Option<u32> {
        let (sectors, tables) = (self.directories.sealed(), self.changed.sealed());
        let all = sectors + tables.len();
        let (mut next, mut issued) = (next as usize, false);
        while next < all && !(issued && cx.room() == 0) {
            issued |= match next.checked_sub(sectors) {
                None => self.directories.write(next, redundant, extents, cx),
                Some(n) => self.write_table(tables[n] as usize, redundant, extents, cx),
            };
            next += 1;
        }
        issued.then_some(next as u32)
    }

    fn write_table(
        &self,
        slot: usize,
        redundant: bool,
        extents: &Extents,
        cx: &mut Cx<'_>,
    ) -> bool {
        let Slot { extent, table, sealed, .. } = self.slots[slot];
        let (extent, table) = (extent as usize, u64::from(table));
        let primary = self.directories.entry(extent, table);
        let entry = match redundant {
            false => primary,
            true => self.directories.redundant(extent, table).unwrap_or(0),
        };
        let grains = extents.grains(extent);
        let at = match grains.header.table(entry, grains.space.end()) {
            Some(Some(at)) if !(redundant && entry == primary) => at,
            _ => return false,
        };
        let (from, to) = sealed.expect("a sealed table has something to be written");
        debug_assert!(COPY_AT + usize::from(to) <= SLOT_BYTES);
        let seg = self.cache.seg(slot, COPY_AT + usize::from(from), usize::from(to - from));
        cx.issue(Op::write(extents.get(extent).file, at + u64::from(from), Segs::one(seg)));
        true
    }

    /// The copies are of no use any more. Unless all have been `written`, what they hold is to be
    /// written again.
    pub fn unseal(&mut self, written: bool, cx: &mut Cx<'_>) {
        for &slot in self.changed.sealed() {
            let Slot { changed, sealed, .. } = &mut self.slots[slot as usize];
            let again = sealed.take().filter(|_| !written);
            *changed = union(*changed, again);
        }
        self.changed.unseal(written, |slot| self.cache.unpin(slot));
        self.directories.unseal(written);
        cx.wake_all(&mut self.cache.full);
    }

    /// Panics if somebody waits or loads, or if a table is pinned that has not changed: what could not
    /// be written stays in memory.
    pub fn assert_idle(&self) {
        assert!(self.changed.sealed().is_empty(), "tables are being written");
        self.directories.assert_idle();
        self.cache.assert_idle(|slot| self.changed.contains(slot).into());
    }
}

fn sectors_of_table(header: &Header) -> u64 {
    header.table_bytes().div_ceil(SECTOR)
}

fn union(a: Option<(u16, u16)>, b: Option<(u16, u16)>) -> Option<(u16, u16)> {
    match (a, b) {
        (Some(a), Some(b)) => Some((a.0.min(b.0), a.1.max(b.1))),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::union;

    #[test]
    fn what_has_changed_is_one_range() {
        assert_eq!(union(None, None), None);
        assert_eq!(union(None, Some((512, 1024))), Some((512, 1024)));
        assert_eq!(union(Some((512, 1024)), None), Some((512, 1024)));
        assert_eq!(union(Some((512, 1024)), Some((1536, 2048))), Some((512, 2048)));
    }
}
