//! Allocating writes: claim, copy-on-write, data, publish.
//!
//! A claim covers guest grains from before their space is taken until their entries are published.
//! Others who would allocate there wait on it; readers do not: they see what was there before. A
//! claim lies under one grain table, which stays in memory meanwhile. All its grains are one run of
//! the file.

use cowbell_engine::mutant;
use cowbell_engine::step::{Cx, Event, IoKind};
use cowbell_engine::units::Errno;

use crate::parts::claims::Claims;
use crate::parts::cow::{self, Copied, Cow, CowState, Fill};
use crate::parts::pieces;
use crate::parts::writeback::Writeback;
use crate::vmdk::disk::layout::Entry;
use crate::vmdk::run::content_id::ContentId;
use crate::vmdk::run::extents::{Extents, Place};
use crate::vmdk::run::image::Image;
use crate::vmdk::run::tables::{Grown, Tables};

/// Guest grains being allocated, or being said to be zeros.
#[derive(Clone, Hash, Debug)]
pub(super) struct Claim {
    extent: usize,
    /// What is to be published. Their table is pinned.
    grown: Grown,
    /// The guest range that this piece writes.
    at: u64,
    end: u64,
    /// The rest of the grains.
    cow: Cow,
}

/// What an allocating piece awaits: from `at` on, or for its own claim, whose key is `claim`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AllocateState {
    /// Space that attempt number `attempt` to grow the extent's file was to give.
    Space { at: u64, extent: u32, attempt: u32 },
    /// What the new grains are to hold.
    Cow { claim: u32, state: CowState },
    /// The content id, which attempt number `attempt` is to write: then the piece is published.
    ContentId { claim: u32, attempt: u32 },
}

/// How far it is.
type Progress = pieces::Progress<AllocateState>;

/// What is unallocated, or zeros, and is to be something else.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub at: u64,
    pub end: u64,
    pub entry: Entry,
    /// Of the table that says so.
    pub slot: usize,
}

/// A step of an allocating piece, and what it works with.
pub(super) struct AllocateStep<'a> {
    pub image: &'a Image,
    pub extents: &'a mut Extents,
    pub tables: &'a mut Tables,
    pub claims: &'a mut Claims<Claim>,
    pub id: &'a mut ContentId,
    pub writeback: &'a mut Writeback,
}

impl AllocateStep<'_> {
    #[inline]
    pub fn run(&mut self, state: AllocateState, event: Event, cx: &mut Cx<'_>) -> Progress {
        match (state, event) {
            (AllocateState::Space { at, extent, attempt }, Event::Woken) => {
                Progress::tried(at, self.extents.space(extent as usize).failure_of(attempt))
            }
            (AllocateState::Cow { claim, state }, event) => self.copy(claim, state, event, cx),
            (AllocateState::ContentId { claim, attempt }, Event::Woken) => {
                match self.id.failure_of(attempt) {
                    Some(errno) => self.fail(claim, errno, cx),
                    None => self.finish(claim, cx),
                }
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// Claims grains for `piece` and begins to fill them; or says that they are zeros.
    pub fn begin(&mut self, piece: Piece, place: Place, cx: &mut Cx<'_>) -> Progress {
        let Piece { at, end: run_end, entry, slot } = piece;
        let first = place.grain_of(at);
        let Some(free_to) = self.free_to(at, place, cx) else { return Progress::LookAgain(at) };
        let cow = match entry {
            Entry::Zero if !mutant!("vmdk_zero_grain_shows_parent") => false,
            _ => self.image.shows_parent(at, place),
        };
        let mut end = self.piece_end(run_end.min(free_to), cow, place);
        let zero = self.becomes_zero(at, end, place, cx);
        match zero {
            Some(zero_end) => end = zero_end,
            // A cut grain of a zero write is written as data, by itself.
            None if !matches!(cx.io().kind, IoKind::Write { .. })
                && self.extents.can_say_zero(place.extent) =>
            {
                end = end.min(place.grain_start(first + 1));
            }
            None => {}
        }
        let count = (end - place.grain_start(first)).div_ceil(place.grain_size());
        let entry = match zero {
            Some(_) => Entry::Zero,
            None => match self.take_space(at, count << place.grain_bits, false, place, cx) {
                Ok(offset) => Entry::Data(offset),
                Err(progress) => return progress,
            },
        };
        let cow = match cow && zero.is_none() {
            true => self.cow_of((first, count), (at, end), place),
            false => Cow::NONE,
        };
        let claim = self.claim(Grown { grain: first, count, slot, entry }, (at, end), cow, place);
        if mutant!("vmdk_published_early") {
            self.publish(claim, cx);
        }
        match zero {
            Some(_) => self.finish(claim, cx),
            None => self.copy(claim, CowState::Bufs, Event::Start, cx),
        }
    }

    /// Up to where nobody has claimed grains, from that of `at` on. `None`: somebody has claimed that
    /// one; the request is parked.
    #[inline]
    pub fn free_to(&mut self, at: u64, place: Place, cx: &mut Cx<'_>) -> Option<u64> {
        let start = place.grain_start(place.grain_of(at));
        self.claims.free_to(start, (start + place.grain_size()).min(place.end), cx)
    }

    /// Claims grains for `at..end`, and pins their table.
    #[inline]
    pub fn claim(&mut self, grown: Grown, (at, end): (u64, u64), cow: Cow, place: Place) -> u32 {
        let Grown { grain, count, slot, .. } = grown;
        self.tables.cache.pin(slot);
        let claim = Claim { extent: place.extent, grown, at, end, cow };
        let grains_end = place.grain_start(grain + count).min(place.end);
        self.claims.insert(place.grain_start(grain)..grains_end, claim)
    }

    /// What a claim's piece writes, from and to.
    pub fn range_of(&self, claim: u32) -> (u64, u64) {
        (self.claims[claim].at, self.claims[claim].end)
    }

    /// The first byte of that.
    pub fn start_of(&self, claim: u32) -> u64 {
        self.claims[claim].at
    }

    /// A claim's grains are to be here.
    pub fn set_entry(&mut self, claim: u32, entry: Entry) {
        self.claims[claim].grown.entry = entry;
    }

    /// How far one piece reaches: to where the parent ends.
    fn piece_end(&self, end: u64, cow: bool, place: Place) -> u64 {
        match self.image.backing {
            Some(backing) if cow => {
                let last = place.grain_of(backing.size - 1);
                end.min(place.grain_start(last + 1))
            }
            _ => end,
        }
    }

    /// Where a zero write or discard can just say so in the table: up to where.
    pub fn becomes_zero(&self, at: u64, end: u64, place: Place, cx: &Cx<'_>) -> Option<u64> {
        let is_write = matches!(cx.io().kind, IoKind::Write { .. });
        if is_write || !self.extents.can_say_zero(place.extent) {
            return None;
        }
        let (first, last) = place.whole_grains(at, end)?;
        (first == at).then_some(last)
    }

    /// `bytes` bytes of space for what is at `at`, or what the request waits for.
    #[inline]
    fn take_space(
        &mut self,
        at: u64,
        bytes: u64,
        table: bool,
        place: Place,
        cx: &mut Cx<'_>,
    ) -> Result<u64, Progress> {
        let taken = self.extents.space(place.extent).take_or_park(bytes, table, cx);
        let space = |attempt| AllocateState::Space { at, extent: place.extent as u32, attempt };
        taken.map_err(|lack| Progress::lacks(lack, space))
    }

    /// What a write of `at..end` into grains `first..first + count` copies from the parent. The rest of
    /// new grains is zeros.
    fn cow_of(&self, (first, count): (u64, u64), (at, end): (u64, u64), place: Place) -> Cow {
        let Some(backing) = self.image.backing else { return Cow::NONE };
        let start = place.grain_start(first);
        let grains_end = place.grain_start(first + count).min(place.end);
        let tail_end = grains_end.min(backing.size).max(end);
        let tail_end = if mutant!("vmdk_cow_tail_skipped") { end } else { tail_end };
        Cow::new([(start, at), (end, tail_end)], Fill::Read, backing.size)
    }

    /// Goes on with what the new grains are to hold; then publishes them.
    #[inline]
    fn copy(&mut self, key: u32, state: CowState, event: Event, cx: &mut Cx<'_>) -> Progress {
        let claim = &mut self.claims[key];
        if self.image.parent_changed && claim.cow.reads() {
            return self.fail(key, Errno::INVALID, cx);
        }
        let Entry::Data(offset) = claim.grown.entry else {
            unreachable!("zero grains have no data")
        };
        let inside = claim.at - self.extents.place(claim.extent).grain_start(claim.grown.grain);
        let file = self.extents.get(claim.extent).file;
        let place = cow::Place { file, start: claim.at, end: claim.end, host: offset + inside };
        let backing = self.image.backing;
        let read = |from, to, buf, cx: &mut Cx<'_>| {
            backing.expect("only an overlay copies").read(from, to, buf, cx)
        };
        match claim.cow.step(state, event, place, read, cx) {
            Copied::Wait(state) => Progress::Wait(AllocateState::Cow { claim: key, state }),
            Copied::Failed(errno) => self.fail(key, errno, cx),
            Copied::Written => self.finish(key, cx),
        }
    }

    /// The data is there: publishes it, once the content id is a new one.
    #[inline]
    fn finish(&mut self, key: u32, cx: &mut Cx<'_>) -> Progress {
        if !self.id.is_written() && !mutant!("vmdk_published_before_cid") {
            self.claims[key].cow.give_bufs(cx);
            let attempt = self.id.park(cx);
            return Progress::Wait(AllocateState::ContentId { claim: key, attempt });
        }
        Progress::To(self.publish_and_end(key, cx))
    }

    /// The piece is done: everybody may see it. Answers where it ends.
    #[inline]
    pub fn publish_and_end(&mut self, key: u32, cx: &mut Cx<'_>) -> u64 {
        self.publish(key, cx);
        self.end_claim(key, true, cx)
    }

    #[inline]
    fn publish(&mut self, key: u32, cx: &mut Cx<'_>) {
        self.tables.publish(self.extents, self.claims[key].grown, cx);
        self.writeback.set_due(cx);
    }

    /// Gives up. What was allocated is leaked; what was there before is still there.
    fn fail(&mut self, key: u32, errno: Errno, cx: &mut Cx<'_>) -> Progress {
        self.end_claim(key, false, cx);
        Progress::Failed(errno)
    }

    /// Answers where its piece ends. Are the grains there?
    #[inline]
    pub fn end_claim(&mut self, key: u32, is_there: bool, cx: &mut Cx<'_>) -> u64 {
        let mut claim = self.claims.end(key, is_there, cx);
        claim.cow.give_bufs(cx);
        self.tables.unpin(claim.grown.slot, cx);
        claim.end
    }

    /// Allocates the grain table that maps `at`, and the redundant one: a grain for both, which is
    /// zeros, and two empty tables therefore.
    pub fn allocate_table(&mut self, at: u64, place: Place, cx: &mut Cx<'_>) -> Progress {
        let offset = match self.take_space(at, place.grain_size(), true, place, cx) {
            Ok(offset) => offset,
            Err(progress) => return progress,
        };
        self.tables.link(self.extents, at, offset, cx);
        self.writeback.set_due(cx);
        Progress::To(at)
    }
}
