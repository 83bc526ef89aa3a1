//! Allocating writes: claim, copy-on-write, data, publish. And the content id, which changes before
//! anything else does.
//!
//! A claim covers guest grains from before their space is taken until their entries are published.
//! Others who would allocate there wait on it; readers do not: they see what was there before. A
//! claim lies under one grain table, which stays in memory meanwhile. All its grains are one run of
//! the file.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::{Cx, Event, IoKind, Step};
use cowbell_engine::units::{BufId, Errno};
use cowbell_engine::wait::WaitList;

use crate::parts::claims::Around;
use crate::parts::cow::{self, Copied, Cow, CowState, Fill};
use crate::parts::growth::Taken;
use crate::vmdk::disk::layout::{Entry, SECTOR_BITS};
use crate::vmdk::run::lookup::Place;
use crate::vmdk::run::{Asked, Cid, CidState, State, Vmdk};

/// Guest grains being allocated, or being said to be zeros.
#[derive(Clone, Hash, Debug)]
pub(super) struct Claim {
    part: usize,
    /// The first grain in the part, and how many there are.
    grain: u64,
    count: u64,
    /// The slot of their table, pinned.
    slot: usize,
    /// What the first one's entry will be; data grains follow one another in the file.
    entry: Entry,
    /// The guest range that this piece writes.
    at: u64,
    end: u64,
    /// The rest of the grains.
    cow: Cow,
    waiters: WaitList,
}

impl Claim {
    /// The guest range that is written.
    pub fn range(&self) -> (u64, u64) {
        (self.at, self.end)
    }

    pub fn set_entry(&mut self, entry: Entry) {
        self.entry = entry;
    }
}

impl Vmdk {
    /// Claims grains for the run `at..run_end` and begins to fill them.
    pub(super) fn allocate(
        &mut self,
        at: u64,
        run_end: u64,
        entry: Entry,
        slot: usize,
        place: Place,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let first = place.grain_of(at);
        let (start, next) = (place.grain_start(first), place.grain_start(first + 1));
        let free_to = match self.claims.around(start, next.min(place.end)) {
            _ if mutant!("vmdk_no_claims") => u64::MAX,
            Around::Within(claim) => {
                cx.park(&mut self.claims[claim].waiters);
                return Step::Wait(State::Next { at });
            }
            Around::Before(next) => next,
        };
        if self.compressed.is_some() && self.becomes_zero(at, run_end, place, cx).is_none() {
            return self.pack(at, slot, place, cx);
        }
        let cow = match entry {
            Entry::Zero => mutant!("vmdk_zero_grain_shows_parent") && self.shows_parent(at, place),
            _ => self.shows_parent(at, place),
        };
        let mut end = self.piece_end(run_end.min(free_to), cow, place);
        let zero = self.becomes_zero(at, end, place, cx);
        match zero {
            Some(zero_end) => end = zero_end,
            // A cut grain of a zero write is written as data, by itself.
            None if !matches!(cx.io().kind, IoKind::Write { .. }) && self.can_say_zero(place) => {
                end = end.min(next);
            }
            None => {}
        }
        let count = (end - start).div_ceil(place.grain_size());
        let entry = match zero {
            Some(_) => Entry::Zero,
            None => match self.take_space(count << place.grain_bits, false, at, place, cx) {
                Ok(offset) => Entry::Data(offset),
                Err(step) => return step,
            },
        };
        self.tables.pin(slot);
        let claim = Claim {
            part: place.part,
            grain: first,
            count,
            slot,
            entry,
            at,
            end,
            cow: match cow && zero.is_none() {
                true => self.cow_of((first, count), (at, end), place),
                false => Cow::NONE,
            },
            waiters: WaitList::new(),
        };
        let claim = self.insert_claim(claim, place);
        if mutant!("vmdk_published_early") {
            self.publish(claim, cx);
        }
        match zero {
            Some(_) => self.published(claim, cx),
            None => self.copy(claim, CowState::Bufs, Event::Start, cx),
        }
    }

    /// Claims the grain of a stream that `at..end` is.
    pub(super) fn claim_compressed(&mut self, at: u64, end: u64, slot: usize, place: Place) -> u32 {
        self.tables.pin(slot);
        let (part, grain) = (place.part, place.grain_of(at));
        let (entry, waiters) = (Entry::Unallocated, WaitList::new());
        let cow = Cow::NONE;
        let claim = Claim { part, grain, count: 1, slot, entry, at, end, cow, waiters };
        self.insert_claim(claim, place)
    }

    fn insert_claim(&mut self, claim: Claim, place: Place) -> u32 {
        let start = place.grain_start(claim.grain);
        let end = place.grain_start(claim.grain + claim.count).min(place.end);
        self.claims.insert(start..end, claim)
    }

    /// How far one piece reaches: to where the parent ends.
    fn piece_end(&self, end: u64, cow: bool, place: Place) -> u64 {
        match self.backing {
            Some(backing) if cow => {
                let last = place.grain_of(backing.size - 1);
                end.min(place.grain_start(last + 1))
            }
            _ => end,
        }
    }

    /// Where a zero write or discard can just say so in the table: up to where.
    fn becomes_zero(&self, at: u64, end: u64, place: Place, cx: &Cx<'_>) -> Option<u64> {
        if matches!(cx.io().kind, IoKind::Write { .. }) || !self.can_say_zero(place) {
            return None;
        }
        let (first, last) = place.whole_grains(at, end)?;
        (first == at).then_some(last)
    }

    /// `bytes` bytes of space in a part for the request at `at`, or the step that waits for them.
    fn take_space(
        &mut self,
        bytes: u64,
        table: bool,
        at: u64,
        place: Place,
        cx: &mut Cx<'_>,
    ) -> Result<u64, Step<State>> {
        let part = place.part as u32;
        let (taken, grow) = self.grains_mut(place.part).space.take(bytes, table);
        if grow {
            self.asked.push(Asked::Grow(part));
            cx.ask();
        }
        let space = &mut self.grains_mut(place.part).space;
        match taken {
            Taken::At(offset) => Ok(offset),
            Taken::None(errno) => Err(Step::Done(Err(errno))),
            Taken::Later => {
                cx.park(&mut space.waiters);
                Err(Step::Wait(State::Space { at, part, attempt: space.attempt }))
            }
        }
    }

    /// The host offset of the guest's byte `at` in a claim of data grains.
    fn host_of(&self, claim: &Claim, at: u64) -> u64 {
        let Entry::Data(offset) = claim.entry else { unreachable!("zero grains have no data") };
        offset + (at - self.place(claim.part).grain_start(claim.grain))
    }

    /// What a write of `at..end` into grains `first..first + count` copies from the parent. The rest of
    /// new grains is zeros.
    fn cow_of(&self, (first, count): (u64, u64), (at, end): (u64, u64), place: Place) -> Cow {
        let Some(backing) = self.backing else { return Cow::NONE };
        let start = place.grain_start(first);
        let grains_end = place.grain_start(first + count).min(place.end);
        let tail_end = grains_end.min(backing.size).max(end);
        let tail_end = if mutant!("vmdk_cow_tail_skipped") { end } else { tail_end };
        Cow::new([(start, at), (end, tail_end)], Fill::Read, backing.size)
    }

    /// Goes on with what the new grains must hold around the write; then the data is written.
    pub(super) fn copy(
        &mut self,
        key: u32,
        state: CowState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let claim = &self.claims[key];
        if self.parent_changed && claim.cow.reads() {
            return self.fail(key, Errno::INVALID, cx);
        }
        let (file, start, backing) = (self.parts[claim.part].file, claim.at, self.backing);
        let place = cow::Place { file, start, host: self.host_of(claim, start) };
        let read = |from, to, buf, cx: &mut Cx<'_>| {
            backing.expect("only an overlay copies").read(from, to, buf, cx)
        };
        let claim = &mut self.claims[key];
        match claim.cow.step(state, event, place, read, cx) {
            Copied::Wait(state) => Step::Wait(State::Cow { claim: key, state }),
            Copied::Failed(errno) => self.fail(key, errno, cx),
            Copied::Ready => {
                claim.cow.write(claim.at, claim.end, place, cx);
                Step::Wait(State::WriteData { claim: key })
            }
        }
    }

    pub(super) fn data_written(
        &mut self,
        key: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match result {
            Err(errno) if !mutant!("vmdk_data_error_ignored") => self.fail(key, errno, cx),
            _ => self.published(key, cx),
        }
    }

    /// The piece is done: everybody may see it. Goes on behind it.
    pub(super) fn published(&mut self, key: u32, cx: &mut Cx<'_>) -> Step<State> {
        self.publish(key, cx);
        let end = self.claims[key].end;
        self.end_claim(key, cx);
        self.walk_from(end, Event::Start, cx)
    }

    /// Puts a claim's entries into its table, in memory.
    fn publish(&mut self, key: u32, cx: &mut Cx<'_>) {
        let claim = &self.claims[key];
        let place = self.place(claim.part);
        let first = (claim.grain & ((1 << place.table_bits) - 1)) as usize;
        let (from, to) = (first * 4, (first + claim.count as usize) * 4);
        let bytes = self.tables.bytes_mut(claim.slot, cx.mem());
        for (i, entry) in bytes[from..to].as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let value = match claim.entry {
                Entry::Data(offset) => Entry::Data(offset + ((i as u64) << place.grain_bits)),
                other => other,
            };
            *entry = value.encode().to_le_bytes();
        }
        let slot = claim.slot;
        self.mark_dirty(slot, from, to, cx);
    }

    /// Gives up. What was allocated is leaked; what was there before is still there.
    pub(super) fn fail(&mut self, key: u32, errno: Errno, cx: &mut Cx<'_>) -> Step<State> {
        if mutant!("vmdk_no_wake_on_error") {
            self.claims[key].waiters = WaitList::new();
        }
        self.end_claim(key, cx);
        Step::Done(Err(errno))
    }

    fn end_claim(&mut self, key: u32, cx: &mut Cx<'_>) {
        self.claims[key].cow.give_bufs(cx);
        let Claim { part, grain, .. } = self.claims[key];
        let mut claim = self.claims.remove(key, self.place(part).grain_start(grain));
        self.tables.unpin(claim.slot);
        cx.wake_all(&mut self.tables.full);
        cx.wake_all(&mut claim.waiters);
    }

    /// Allocates the grain table that maps `at`, and the redundant one: a grain for both, which is
    /// zeros, and two empty tables therefore. The directories say so on disk after the next writeback.
    pub(super) fn allocate_table(&mut self, at: u64, place: Place, cx: &mut Cx<'_>) -> Step<State> {
        if self.has_footer() {
            return self.stream_table(at, place, cx);
        }
        let offset = match self.take_space(place.grain_size(), true, at, place, cx) {
            Ok(offset) => offset,
            Err(step) => return step,
        };
        let index = (at - place.start) >> (place.grain_bits + place.table_bits);
        let grains = self.grains_mut(place.part);
        let sector = (offset >> SECTOR_BITS) as u32;
        let behind = (grains.header.table_bytes() >> SECTOR_BITS) as u32;
        grains.root.set(index as usize, sector, sector + behind);
        let key = grains.first_key + index;
        if let Some(slot) = self.tables.put_zeros(key, cx) {
            self.slots[slot].origin = (place.part as u32, index as u32);
        }
        self.note_change(cx);
        Step::Go(State::Next { at })
    }

    /// Writes the new content id.
    pub(super) fn write_cid(&mut self, at: u64, cx: &mut Cx<'_>) -> Step<State> {
        let Some([buf]) = cx.take_bufs() else {
            cx.park_for_bufs();
            return Step::Wait(State::Next { at });
        };
        let Cid { digits, at: place, len, .. } = self.cid;
        cx.mem().pool_mut(buf)[..digits.len()].copy_from_slice(&digits);
        let seg = Seg { base: Base::Pool(buf), off: 0, len };
        cx.issue(Op::write(self.files[0], place, Segs::one(seg)));
        self.cid.state = CidState::Writing;
        Step::Wait(State::WriteCid { at, buf })
    }

    pub(super) fn cid_written(
        &mut self,
        at: u64,
        buf: BufId,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        cx.give_buf(buf);
        self.cid.state = if result.is_ok() { CidState::New } else { CidState::Old };
        if !mutant!("vmdk_cid_wakes_nobody") {
            cx.wake_all(&mut self.cid.waiters);
        }
        match result {
            Ok(()) => self.walk_from(at, Event::Start, cx),
            Err(errno) => Step::Done(Err(errno)),
        }
    }
}
