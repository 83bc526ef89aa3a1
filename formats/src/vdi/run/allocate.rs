//! Allocating writes: claim, data, link.
//!
//! A claim covers guest blocks from before they have a place until their entries are on disk.
//! Others who would allocate there wait on it; readers do not: they see zeros, as before.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs, Target};
use cowbell_engine::step::{Cx, Step};
use cowbell_engine::units::{BufId, Errno};
use cowbell_engine::wait::WaitList;

use crate::parts::claims::Around;
use crate::parts::growth::Taken;
use crate::vdi::run::{State, Vdi};

/// Guest blocks being allocated: all their entries are in one unit of the map.
#[derive(Clone, Hash, Debug)]
pub(super) struct Claim {
    /// The first one's index in the map.
    index: u64,
    count: u64,
    /// Where the first one goes; the others follow.
    block: u32,
    /// What is there is unknown, as in a hole or on a device: it is one block, written whole.
    unknown: bool,
    /// Where the guest range that this piece writes ends.
    end: u64,
    link: Link,
    waiters: WaitList,
}

/// How far a claim's entries have got.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Link {
    /// The data is not there yet.
    No,
    /// The next write of the map takes them along.
    Queued,
    /// In the write under way.
    InFlight,
    /// On disk and published.
    Done,
    /// That write failed.
    Failed(Errno),
}

/// Bytes that one piece allocates at most, or one block: its op's lengths are 32 bits wide.
const PIECE_MAX: u64 = 1 << 30;

impl Vdi {
    /// Claims blocks for the unallocated run `at..run_end` and begins to fill them.
    pub(super) fn allocate(&mut self, at: u64, run_end: u64, cx: &mut Cx<'_>) -> Step<State> {
        let bits = self.image.header.block_bits;
        let index = at >> bits;
        let free_to = match self.claims.around(index << bits, (index + 1) << bits) {
            _ if mutant!("vdi_no_claims") => u64::MAX,
            Around::Within(claim) => {
                cx.park(&mut self.claims[claim].waiters);
                return Step::Wait(State::Next { at });
            }
            Around::Before(next) => next,
        };
        let per_unit = self.image.header.map_unit() as u64 / 4;
        let in_unit = (index + 1).next_multiple_of(per_unit) - index;
        let mut count =
            in_unit.min(PIECE_MAX >> bits).min(((run_end.min(free_to) - 1) >> bits) + 1 - index);
        let hole = if mutant!("vdi_hole_used_twice") {
            self.image.holes.last().copied()
        } else {
            self.image.holes.pop()
        };
        let unknown = hole.is_some() || self.is_device() && !mutant!("vdi_device_is_zeros");
        if unknown {
            count = 1;
        }
        let block = match hole {
            Some(block) => block,
            None => match self.take_blocks(&mut count, at, cx) {
                Ok(block) => block,
                Err(step) => return step,
            },
        };
        let (start, blocks_end) = (index << bits, (index + count) << bits);
        let claim = Claim {
            index,
            count,
            block,
            unknown,
            end: run_end.min(blocks_end),
            link: Link::No,
            waiters: WaitList::new(),
        };
        let end = claim.end;
        if mutant!("vdi_published_early") {
            publish(&claim, &mut self.image.map);
        }
        let claim = self.claims.insert(start..blocks_end, claim);
        let mut segs = Segs::one(cx.guest(at - cx.io().offset, end - at));
        let mut from = at;
        if unknown && !mutant!("vdi_hole_not_filled") {
            let data = segs;
            segs = Segs::none();
            if at > start {
                segs.push(Seg::zeros((at - start) as u32));
            }
            data.as_slice().iter().for_each(|seg| segs.push(*seg));
            if end < blocks_end {
                segs.push(Seg::zeros((blocks_end - end) as u32));
            }
            from = start;
        }
        cx.issue(Op::write(self.file, self.image.host_of(block, from), segs));
        Step::Wait(State::WriteData { claim })
    }

    /// `count` new blocks at the file's end, or fewer; or the step that waits for them.
    fn take_blocks(
        &mut self,
        count: &mut u64,
        at: u64,
        cx: &mut Cx<'_>,
    ) -> Result<u32, Step<State>> {
        let bits = self.image.header.block_bits;
        let (mut taken, mut grow) = self.space.take(*count << bits, false);
        if matches!(taken, Taken::None(_)) {
            *count = 1;
            (taken, grow) = self.space.take(1 << bits, false);
        }
        if grow {
            cx.ask();
        }
        match taken {
            Taken::At(offset) => {
                self.exact = false;
                Ok((offset >> bits) as u32)
            }
            // The device is full, or all blocks that the map can name are taken: some are leaked.
            Taken::None(errno) => Err(Step::Done(Err(errno))),
            Taken::Later => {
                cx.park(&mut self.space.waiters);
                Err(Step::Wait(State::Space { at, attempt: self.space.attempt }))
            }
        }
    }

    pub(super) fn data_written(
        &mut self,
        key: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if let Err(errno) = result
            && !mutant!("vdi_data_error_ignored")
        {
            return self.fail(key, errno, cx);
        }
        if self.claims[key].unknown && !mutant!("vdi_hole_not_fenced") {
            self.flush(cx);
            return Step::Wait(State::Fence { claim: key });
        }
        self.link(key, cx)
    }

    /// The data is there: have the entries written, or see what became of them.
    pub(super) fn link(&mut self, key: u32, cx: &mut Cx<'_>) -> Step<State> {
        let claim = &mut self.claims[key];
        match claim.link {
            Link::Done => {
                let end = claim.end;
                self.end_claim(key, cx);
                return self.walk(end, cx);
            }
            Link::Failed(errno) => return self.fail(key, errno, cx),
            Link::No => claim.link = Link::Queued,
            Link::Queued | Link::InFlight => {}
        }
        if self.writing && !mutant!("vdi_two_map_writes") || claim.link == Link::InFlight {
            cx.park(&mut self.map_waiters);
            return Step::Wait(State::Link { claim: key });
        }
        let Some([buf]) = cx.take_bufs() else {
            // Somebody else may take this claim's entries along meanwhile.
            cx.park_for_bufs();
            return Step::Wait(State::Link { claim: key });
        };
        self.writing = true;
        let (first, seg) = self.unit_of(key, buf);
        let unit = &mut cx.mem().pool_mut(buf)[..seg.len as usize];
        let entries = unit.as_chunks_mut::<4>().0;
        for (entry, raw) in entries.iter_mut().zip(&self.image.map[first..]) {
            *entry = raw.to_le_bytes();
        }
        for claim in self.claims.iter_mut().filter(|claim| claim.link == Link::Queued) {
            let at = (claim.index as usize).checked_sub(first).filter(|&at| at < entries.len());
            if let Some(at) = at {
                claim.link = Link::InFlight;
                for (entry, block) in
                    entries[at..][..claim.count as usize].iter_mut().zip(claim.block..)
                {
                    *entry = block.to_le_bytes();
                }
            }
        }
        let offset = self.image.entry_offset(first as u64);
        cx.issue(Op::write(self.file, offset, Segs::one(seg)));
        Step::Wait(State::WriteMap { claim: key, buf })
    }

    /// The unit of the map that has a claim's entries: its first entry, and its place in `buf`.
    fn unit_of(&self, key: u32, buf: BufId) -> (usize, Seg) {
        let unit = self.image.header.map_unit();
        let first = self.claims[key].index as usize / (unit / 4) * (unit / 4);
        (first, Seg { base: Base::Pool(buf), off: 0, len: unit as u32 })
    }

    pub(super) fn map_written(
        &mut self,
        key: u32,
        buf: BufId,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if let Err(errno) = result
            && !mutant!("vdi_link_error_ignored")
        {
            let (first, seg) = self.unit_of(key, buf);
            for claim in self.claims.iter_mut().filter(|claim| claim.link == Link::InFlight) {
                claim.link = Link::Failed(errno);
            }
            let offset = self.image.entry_offset(first as u64);
            cx.issue(Op::read(Target::File(self.file), offset, Segs::one(seg)));
            return Step::Wait(State::Reread { claim: key, buf });
        }
        for claim in self.claims.iter_mut().filter(|claim| claim.link == Link::InFlight) {
            claim.link = Link::Done;
            publish(claim, &mut self.image.map);
        }
        self.map_free(key, buf, cx)
    }

    /// The write of the map failed, for these claims: it may have happened all the same. What the
    /// disk says counts.
    pub(super) fn map_reread(
        &mut self,
        key: u32,
        buf: BufId,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let (first, seg) = self.unit_of(key, buf);
        if result.is_ok() && !mutant!("vdi_failed_link_not_reread") {
            let entries = cx.memory().pool(buf)[..seg.len as usize].as_chunks::<4>().0;
            for claim in
                self.claims.iter_mut().filter(|claim| matches!(claim.link, Link::Failed(_)))
            {
                let index = claim.index as usize;
                let Some(at) = index.checked_sub(first).filter(|&at| at < entries.len()) else {
                    continue;
                };
                for i in 0..claim.count as usize {
                    if entries[at + i] == (claim.block + i as u32).to_le_bytes() {
                        self.image.map[index + i] = claim.block + i as u32;
                    }
                }
            }
        }
        self.map_free(key, buf, cx)
    }

    /// The map may be written again.
    fn map_free(&mut self, key: u32, buf: BufId, cx: &mut Cx<'_>) -> Step<State> {
        cx.give_buf(buf);
        self.writing = false;
        cx.wake_all(&mut self.map_waiters);
        self.link(key, cx)
    }

    /// Gives up. What was allocated is leaked, until the image is opened again.
    pub(super) fn fail(&mut self, key: u32, errno: Errno, cx: &mut Cx<'_>) -> Step<State> {
        if mutant!("vdi_no_wake_on_error") {
            self.claims[key].waiters = WaitList::new();
        }
        self.end_claim(key, cx);
        Step::Done(Err(errno))
    }

    fn end_claim(&mut self, key: u32, cx: &mut Cx<'_>) {
        let start = self.claims[key].index << self.image.header.block_bits;
        let mut claim = self.claims.remove(key, start);
        cx.wake_all(&mut claim.waiters);
    }
}

fn publish(claim: &Claim, map: &mut [u32]) {
    let entries = &mut map[claim.index as usize..][..claim.count as usize];
    entries.iter_mut().zip(claim.block..).for_each(|(entry, block)| *entry = block);
}
