//! Reading deflated grains: each is read, inflated and kept for as long as there is room, so that
//! a guest that reads in order has each inflated once.
//!
//! A slot of the cache holds a grain's contents; beside it is room for what is in the file. Who
//! misses first loads: reads as much as the grain is likely to take (up to the next grain), reads
//! the rest if its marker says that there is more, and has it inflated, which is an op. Others wait
//! for the slot.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Compute, Op, Seg, Segs, Target};
use cowbell_engine::step::{Cx, Event};
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{Errno, RegionId};
use cowbell_engine::wait::On;

use crate::parts::pieces;
use crate::vmdk::disk::grain;
use crate::vmdk::disk::layout::{SECTOR, SECTOR_BITS};
use crate::vmdk::run::extents::{Extents, Place};

/// The grains of a stream that are in memory, each named by its first byte on the disk.
#[derive(Clone, Hash, Debug)]
pub(super) struct Compressed {
    grains: TableCache,
    /// For each slot: a grain as it is in the file.
    input: RegionId,
    input_size: u64,
}

/// What who loads a grain awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum InflateState {
    /// The first `have` bytes of the grain at `host`, beside `slot`.
    Read { host: u64, slot: u32, have: u32 },
    /// That grain, inflated into `slot`.
    Inflate { slot: u32 },
}

type Progress = pieces::Progress<InflateState>;

const INFLATE: Compute = Compute { name: "inflate-grain", run: grain::inflate };
const INFLATE_LAST: Compute = Compute { name: "inflate-last-grain", run: grain::inflate_last };
const DEFLATE: Compute = Compute { name: "deflate-grain", run: grain::deflate };

impl Compressed {
    pub fn new(grains: TableCache, input: RegionId, input_size: u64) -> Compressed {
        Compressed { grains, input, input_size }
    }

    /// `len` bytes of what is beside a slot, from byte `off` on.
    pub fn beside(&self, slot: usize, off: u64, len: u64) -> Seg {
        let off = slot as u64 * self.input_size + off;
        Seg { base: Base::Region(self.input), off: off as u32, len: len as u32 }
    }

    /// The marker beside a slot.
    pub fn marker<'m>(&self, slot: usize, cx: &'m mut Cx<'_>) -> &'m mut [u8] {
        let start = slot * self.input_size as usize;
        &mut cx.mem().region_mut(self.input)[start..][..16]
    }

    /// Copies `at..end`, all in one grain, to the guest, if the grain is in memory.
    pub fn read(&mut self, at: u64, end: u64, place: Place, cx: &mut Cx<'_>) -> bool {
        let key = place.grain_start(place.grain_of(at));
        let Some(slot) = self.grains.find(key).filter(|&slot| self.grains.is_ready(slot)) else {
            return false;
        };
        let start = (slot << place.grain_bits) + (at - key) as usize;
        let from = at - cx.io().offset;
        cx.copy_region_to_guest(from, self.grains.region(), start, (end - at) as usize);
        true
    }

    /// Loads the grain at `at`, whose place in the file is `host`, behind which the next one's is `next`,
    /// or 0.
    pub fn load(
        &mut self,
        extents: &Extents,
        at: u64,
        (host, next): (u64, u64),
        cx: &mut Cx<'_>,
    ) -> Progress {
        let index = extents.index_at(at);
        let place = extents.place(index);
        let most = grain::size_max(place.grain_size());
        let len = match next.checked_sub(host) {
            Some(len) if len > 0 && len <= most => len,
            _ => most,
        };
        let key = place.grain_start(place.grain_of(at));
        if let Some(slot) = self.grains.find(key) {
            cx.park(self.grains.waiters(slot), On::Compressed);
            return Progress::LookAgain(at);
        }
        let Some(slot) = self.grains.reserve(key) else {
            cx.park(&mut self.grains.full, On::CacheSlot);
            return Progress::LookAgain(at);
        };
        // Whoever reads it now finds it in the cache.
        let segs = Segs::one(self.beside(slot, 0, len));
        cx.issue(Op::read(Target::File(extents.get(index).file), host, segs));
        Progress::Wait(InflateState::Read { host, slot: slot as u32, have: len as u32 })
    }

    /// Goes on with the grain at `at`.
    pub fn run(
        &mut self,
        extents: &Extents,
        at: u64,
        state: InflateState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Progress {
        let is_inflated = matches!(state, InflateState::Inflate { .. });
        let (slot, result) = match (state, event) {
            (InflateState::Read { host, slot, have }, Event::Io(Ok(()))) => {
                match self.inflate(extents, at, (host, slot as usize, have.into()), cx) {
                    Ok(state) => return Progress::Wait(state),
                    Err(errno) => (slot, Err(errno)),
                }
            }
            (
                InflateState::Read { slot, .. } | InflateState::Inflate { slot },
                Event::Io(result),
            ) => (slot, result),
            (state, event) => panic!("{event:?} in {state:?}"),
        };
        self.grains.load_ended(slot as usize, result.is_ok(), cx);
        // While somebody looks for it once more, it could give way to another's.
        if is_inflated && result.is_ok() && !mutant!("inflated_grain_is_looked_for_again") {
            let place = extents.place(extents.index_at(at));
            let next = place.grain_start(place.grain_of(at)) + place.grain_size();
            let end = next.min(extents.piece_end(at)).min(cx.io().end());
            if self.read(at, end, place, cx) {
                return Progress::To(end);
            }
        }
        Progress::tried(at, result.err())
    }

    /// A grain, or the beginning of it, is there.
    fn inflate(
        &mut self,
        extents: &Extents,
        at: u64,
        (host, slot, have): (u64, usize, u64),
        cx: &mut Cx<'_>,
    ) -> Result<InflateState, Errno> {
        let index = extents.index_at(at);
        let place = extents.place(index);
        let size = place.grain_size();
        let lba = place.grain_of(at) << (place.grain_bits - SECTOR_BITS);
        let len = grain::marked_len(self.marker(slot, cx), lba, size)?;
        if len > have {
            let rest = (len - have).next_multiple_of(SECTOR);
            let (file, seg) = (extents.get(index).file, self.beside(slot, have, rest));
            cx.issue(Op::read(Target::File(file), host + have, Segs::one(seg)));
            return Ok(InflateState::Read { host, slot: slot as u32, have: (have + rest) as u32 });
        }
        let output = self.grains.seg(slot, 0, size as usize);
        let is_last = grain::is_last(&extents.grains(index).header, lba);
        let work = if is_last { INFLATE_LAST } else { INFLATE };
        cx.issue(Op::compute(work, self.beside(slot, 0, len), output));
        Ok(InflateState::Inflate { slot: slot as u32 })
    }

    /// Copies the guest's bytes `at..end`, a grain, into a slot, and deflates them beside it. Answers the
    /// slot; `None`: there is none, or it is not the next to get one, and the request is parked.
    pub fn deflate(
        &mut self,
        (at, end): (u64, u64),
        is_next: bool,
        place: Place,
        cx: &mut Cx<'_>,
    ) -> Option<usize> {
        let Some(slot) = is_next.then(|| self.grains.reserve(at)).flatten() else {
            cx.park(&mut self.grains.full, On::CacheSlot);
            return None;
        };
        let (region, off) = (self.grains.region(), slot << place.grain_bits);
        let (len, grain_size) = ((end - at) as usize, place.grain_size() as usize);
        cx.copy_guest_to_region(at - cx.io().offset, region, off, len);
        cx.mem().region_mut(region)[off + len..off + grain_size].fill(0);
        let input = self.grains.seg(slot, 0, grain_size);
        cx.issue(Op::compute(DEFLATE, input, self.beside(slot, 0, self.input_size)));
        Some(slot)
    }

    /// A slot's grain is in the file, or is not going to be.
    pub fn written(&mut self, slot: u32, is_there: bool, cx: &mut Cx<'_>) {
        self.grains.load_ended(slot as usize, is_there, cx);
    }

    /// Panics if somebody waits. For tests, at rest.
    pub fn assert_idle(&self) {
        self.grains.assert_idle(|_| 0);
    }
}
