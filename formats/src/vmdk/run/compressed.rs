//! Reading deflated grains: each is read, inflated and kept for as long as there is room, so that
//! a guest that reads in order has each inflated once.
//!
//! A slot of the cache holds a grain's contents; beside it is room for what is in the file. Who
//! misses first loads: reads as much as the grain is likely to take (up to the next grain), reads
//! the rest if its marker says that there is more, and has it inflated, which is an op. Others wait
//! for the slot.

use cowbell_engine::op::{Base, Compute, Op, Seg, Segs, Target};
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{Errno, RegionId};

use crate::vmdk::disk::grain;
use crate::vmdk::disk::layout::{SECTOR, SECTOR_BITS};
use crate::vmdk::run::lookup::Place;
use crate::vmdk::run::stream::Stream;
use crate::vmdk::run::{State, Vmdk};

/// The grains of a stream that are in memory.
#[derive(Clone, Hash, Debug)]
pub(super) struct Compressed {
    pub grains: TableCache,
    /// For each slot: a grain as it is in the file.
    pub input: RegionId,
    pub input_size: u64,
    pub stream: Stream,
}

const INFLATE: Compute = Compute { name: "inflate-grain", run: grain::inflate };
const INFLATE_LAST: Compute = Compute { name: "inflate-last-grain", run: grain::inflate_last };

impl Compressed {
    /// `len` bytes of what is beside a slot, from byte `off` on.
    pub fn beside(&self, slot: usize, off: u64, len: u64) -> Seg {
        let off = slot as u64 * self.input_size + off;
        Seg { base: Base::Region(self.input), off: off as u32, len: len as u32 }
    }
}

impl Vmdk {
    /// The grains' cache.
    pub(super) fn compressed(&mut self) -> &mut Compressed {
        self.compressed.as_mut().expect("a compressed extent has one")
    }

    /// Copies `at..end`, all in one grain, to the guest, if the grain is in memory.
    pub(super) fn read_compressed(
        &mut self,
        at: u64,
        end: u64,
        place: Place,
        cx: &mut Cx<'_>,
    ) -> bool {
        let (key, from) = (place.grain_key(at), at - cx.io().offset);
        let compressed = self.compressed();
        let Some(slot) =
            compressed.grains.find(key).filter(|&slot| compressed.grains.is_ready(slot))
        else {
            return false;
        };
        let off = (at - key) as usize;
        let (region, start) = (compressed.grains.region(), slot << place.grain_bits);
        cx.copy_region_to_guest(from, region, start + off, (end - at) as usize);
        true
    }

    /// Loads the grain at `at`, whose place in the file is `host`; `table` is its table's slot.
    pub(super) fn load_compressed(
        &mut self,
        at: u64,
        host: u64,
        table: usize,
        place: Place,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let len = self.likely_len(at, host, table, place, cx);
        let compressed = self.compressed();
        let key = place.grain_key(at);
        if let Some(slot) = compressed.grains.find(key) {
            cx.park(compressed.grains.waiters(slot));
            return Step::Wait(State::Next { at });
        }
        let Some(slot) = compressed.grains.reserve(key) else {
            cx.park(&mut compressed.grains.full);
            return Step::Wait(State::Next { at });
        };
        // Whoever reads it now finds it in the cache.
        let seg = compressed.beside(slot, 0, len);
        let file = Target::File(self.parts[place.part].file);
        cx.issue(Op::read(file, host, Segs::one(seg)));
        Step::Wait(State::ReadGrain { at, host, slot: slot as u32, have: len as u32 })
    }

    /// The bytes up to the next grain in the file, if that is a likely length; else the most.
    fn likely_len(&self, at: u64, host: u64, table: usize, place: Place, cx: &mut Cx<'_>) -> u64 {
        let most = grain::size_max(place.grain_size());
        let count = 1usize << place.table_bits;
        let index = place.grain_of(at) as usize & (count - 1);
        let bytes = &self.tables.bytes(table, cx.mem())[..count * 4];
        let mut later =
            bytes.as_chunks::<4>().0[index + 1..].iter().map(|e| u32::from_le_bytes(*e));
        let next = later.find(|&raw| raw > 1).map_or(0, |raw| u64::from(raw) << SECTOR_BITS);
        match next.checked_sub(host) {
            Some(len) if len > 0 && len <= most => len,
            _ => most,
        }
    }

    /// A grain, or the beginning of it, is there.
    pub(super) fn grain_read(
        &mut self,
        at: u64,
        host: u64,
        slot: usize,
        have: u32,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let place = self.place(self.part_at(at));
        let start = place.grain_start(place.grain_of(at)) - place.start;
        let lba = start >> SECTOR_BITS;
        let compressed = self.compressed();
        let (input, offset) = (compressed.input, slot * compressed.input_size as usize);
        let marker = &cx.mem().region(input)[offset..][..16];
        let len = match grain::marked_len(marker, lba, place.grain_size()) {
            Ok(len) => len,
            Err(errno) => return self.compressed_loaded(at, slot, Err(errno), cx),
        };
        let have = u64::from(have);
        if len > have {
            let rest = (len - have).next_multiple_of(SECTOR);
            let seg = self.compressed().beside(slot, have, rest);
            let file = Target::File(self.parts[place.part].file);
            cx.issue(Op::read(file, host + have, Segs::one(seg)));
            let have = (have + rest) as u32;
            return Step::Wait(State::ReadGrain { at, host, slot: slot as u32, have });
        }
        let last = grain::is_last(&self.grains(place.part).header, lba);
        let compressed = self.compressed();
        let output = compressed.grains.seg(slot, 0, place.grain_size() as usize);
        let work = if last { INFLATE_LAST } else { INFLATE };
        cx.issue(Op::compute(work, compressed.beside(slot, 0, len), output));
        Step::Wait(State::Inflate { at, slot: slot as u32 })
    }

    /// A grain is in memory, or is not going to be.
    pub(super) fn compressed_loaded(
        &mut self,
        at: u64,
        slot: usize,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        self.compressed().grains.load_ended(slot, result.is_ok(), cx);
        match result {
            Ok(()) => self.walk_from(at, Event::Start, cx),
            Err(errno) => Step::Done(Err(errno)),
        }
    }

    /// Have the grains of a sparse part to be inflated?
    #[inline]
    pub(super) fn is_compressed(&self, part: usize) -> bool {
        self.compressed.is_some() && self.grains(part).header.is_compressed()
    }
}
