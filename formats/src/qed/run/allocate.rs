//! Allocating writes: claim, copy-on-write, data, publish.
//!
//! A claim covers guest clusters from before their space is taken until their entries are in
//! memory. Others who would allocate there wait on it; readers do not: they see what was there
//! before. A claim lies within one table slice, which stays in memory meanwhile.

use cowbell_engine::mutant;
use cowbell_engine::step::{Cx, Event, IoKind};
use cowbell_engine::units::{Errno, HostOffset, align_down};

use crate::parts::claims::Claims;
use crate::parts::cow::{Copied, Cow, CowState, Fill, Place};
use crate::parts::growth::{Lack, Space};
use crate::parts::pieces;
use crate::parts::writeback::Writeback;
use crate::qed::disk::layout::Entry;
use crate::qed::run::image::{Disk, Image};
use crate::qed::run::live_header::{LiveHeader, NotReady};
use crate::qed::run::tables::Tables;

/// Guest clusters being allocated.
#[derive(Clone, Hash, Debug)]
pub(super) struct Claim {
    /// Where they begin on the disk, and how many there are.
    start: u64,
    count: u64,
    /// The slot of their table slice, pinned.
    slot: usize,
    /// Where they are to be in the file, one after the other.
    host: HostOffset,
    /// The guest range that this piece writes.
    at: u64,
    end: u64,
    /// The rest of the clusters.
    cow: Cow,
}

/// What an allocating piece awaits: from `at` on, or for its own claim, whose key is `claim`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AllocateState {
    /// Space that attempt number `attempt` to grow the file was to give.
    Space { at: u64, attempt: u32 },
    /// The header with the need-check mark, stable.
    Mark { at: u64 },
    /// What the new clusters are to hold.
    Cow { claim: u32, state: CowState },
}

/// How far it is.
type Progress = pieces::Progress<AllocateState>;

/// What is unallocated, or zeros, and is to be something else.
pub(super) struct Piece {
    pub at: u64,
    pub end: u64,
    pub entry: Entry,
    /// Of the table slice that says so.
    pub slot: usize,
}

/// Bytes that one piece allocates at most: its op's lengths are 32 bits wide.
const PIECE_MAX: u64 = 1 << 30;

/// A step of an allocating piece, and what it works with.
pub(super) struct AllocateStep<'a> {
    pub image: &'a Image,
    pub disk: &'a Disk,
    pub claims: &'a mut Claims<Claim>,
    pub tables: &'a mut Tables,
    pub space: &'a mut Space,
    pub header: &'a mut LiveHeader,
    pub writeback: &'a mut Writeback,
}

impl AllocateStep<'_> {
    pub fn run(&mut self, state: AllocateState, event: Event, cx: &mut Cx<'_>) -> Progress {
        match (state, event) {
            (AllocateState::Space { at, attempt }, Event::Woken) => {
                let failure = self.space.failure_of(attempt);
                if failure.is_some() {
                    self.header.allocation_ended(self.claims.is_empty(), cx);
                }
                Progress::tried(at, failure)
            }
            (AllocateState::Mark { at }, Event::Io(result)) => {
                self.header.marked(result, self.claims.is_empty(), cx);
                Progress::tried(at, result.err())
            }
            (AllocateState::Cow { claim, state }, event) => self.copy(claim, state, event, cx),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// Claims clusters for `piece` and begins to fill them; or says at once that they are zeros.
    pub fn begin(&mut self, piece: Piece, cx: &mut Cx<'_>) -> Progress {
        let Piece { at, end: run_end, entry, slot } = piece;
        let (bits, size) = (self.image.geometry.cluster_bits(), self.image.geometry.cluster_size());
        let start = align_down(at, size);
        let Some(free_to) = self.claims.free_to(start, start + size, cx) else {
            return Progress::LookAgain(at);
        };
        let mut copies = entry == Entry::Unallocated && self.disk.shows_backing(at);
        if mutant!("zero_cluster_shows_backing") && entry == Entry::Zero {
            copies = self.disk.shows_backing(at);
        }
        let mut end = self.piece_end(at, run_end.min(free_to), copies);
        if !matches!(cx.io().kind, IoKind::Write { .. }) {
            match self.disk.whole_clusters(at, end) {
                Some((first, last)) if first == at => {
                    return self.publish_zeros(at, last, slot, cx);
                }
                // A cut cluster of a zero write is written as data, by itself.
                _ => end = end.min(start + size),
            }
        }
        let count = (end - start).div_ceil(size);
        let host = match self.take_space(at, count << bits, false, cx) {
            Ok(offset) => HostOffset(offset),
            Err(progress) => return progress,
        };
        if !mutant!("slice_not_pinned") {
            self.tables.slices.pin(slot);
        }
        let short = u64::from(mutant!("claim_one_cluster_short"));
        let cow = self.cow_of((start, start + (count << bits)), (at, end), copies);
        let claim = Claim { start, count, slot, host, at, end, cow };
        let claim = self.claims.insert(start..start + ((count - short) << bits), claim);
        if mutant!("published_early") {
            self.publish(claim, cx);
        }
        self.copy(claim, CowState::Bufs, Event::Start, cx)
    }

    /// How far one piece reaches: to where the backing file ends, and not beyond what one op can
    /// carry.
    fn piece_end(&self, at: u64, run_end: u64, copies: bool) -> u64 {
        let size = self.image.geometry.cluster_size();
        let end = run_end.min(align_down(at, size).saturating_add(PIECE_MAX.max(size)));
        match self.disk.backing() {
            Some(backing) if copies => end.min(backing.size.next_multiple_of(size)),
            _ => end,
        }
    }

    /// The clusters of `at..end` are zeros from now on: the table says so.
    fn publish_zeros(&mut self, at: u64, end: u64, slot: usize, cx: &mut Cx<'_>) -> Progress {
        let count = (end - at).div_ceil(self.image.geometry.cluster_size());
        self.tables.publish(slot, at, count, Entry::Zero, cx);
        self.writeback.set_due(cx);
        Progress::To(end)
    }

    /// Allocates the L2 table that maps `at`, in memory: empty, as its space is.
    pub fn allocate_table(&mut self, at: u64, cx: &mut Cx<'_>) -> Progress {
        let offset = match self.take_space(at, self.image.geometry.table_bytes(), true, cx) {
            Ok(offset) => offset,
            Err(progress) => return progress,
        };
        self.tables.link(at, offset, cx);
        self.writeback.set_due(cx);
        self.header.allocation_ended(self.claims.is_empty(), cx);
        Progress::To(at)
    }

    /// `bytes` bytes of space for what is at `at`, or what the request waits for.
    fn take_space(
        &mut self,
        at: u64,
        bytes: u64,
        table: bool,
        cx: &mut Cx<'_>,
    ) -> Result<u64, Progress> {
        match self.header.ready_to_allocate(cx) {
            Ok(()) => {}
            Err(NotReady::Parked) => return Err(Progress::LookAgain(at)),
            Err(NotReady::Marking) => return Err(Progress::Wait(AllocateState::Mark { at })),
        }
        let taken = self.space.take_or_park(bytes, table, cx);
        match taken {
            // Tidying up would also cut off what is being grown, for it to be grown again.
            Ok(_) | Err(Lack::Parked(_)) => self.header.keep_mark(),
            Err(Lack::Never(_)) => {}
        }
        taken.map_err(|lack| Progress::lacks(lack, |attempt| AllocateState::Space { at, attempt }))
    }

    /// What a write of `at..end` into clusters `start..clusters_end` copies. The rest of new clusters is
    /// zeros; where the data writes make the file longer, they write these too.
    fn cow_of(
        &self,
        (start, clusters_end): (u64, u64),
        (at, end): (u64, u64),
        copies: bool,
    ) -> Cow {
        let by_writes = self.space.grows_by_writes();
        match self.disk.backing().filter(|_| copies) {
            Some(backing) => {
                let limit = if by_writes { u64::MAX } else { backing.size };
                let tail_end = clusters_end.min(limit).max(end);
                let tail_end = if mutant!("cow_tail_skipped") { end } else { tail_end };
                Cow::new([(start, at), (end, tail_end)], Fill::Read, limit)
            }
            None if by_writes => Cow::new([(at, at), (end, clusters_end)], Fill::Zeros, u64::MAX),
            None => Cow::NONE,
        }
    }

    /// Goes on with what the new clusters are to hold; then publishes them.
    fn copy(&mut self, key: u32, state: CowState, event: Event, cx: &mut Cx<'_>) -> Progress {
        let (file, backing) = (self.image.file, self.disk.backing());
        let claim = &mut self.claims[key];
        let host = claim.host.0 + (claim.at - claim.start);
        let place = Place { file, start: claim.at, end: claim.end, host };
        let read = |from, to, buf, cx: &mut Cx<'_>| {
            backing.expect("only an overlay copies").read(from, to, buf, cx)
        };
        match claim.cow.step(state, event, place, read, cx) {
            Copied::Wait(state) => Progress::Wait(AllocateState::Cow { claim: key, state }),
            Copied::Failed(errno) => self.fail(key, errno, cx),
            Copied::Written => {
                self.publish(key, cx);
                Progress::To(self.end_claim(key, true, cx))
            }
        }
    }

    /// Puts a claim's entries into their slice: everybody sees them.
    #[inline]
    fn publish(&mut self, key: u32, cx: &mut Cx<'_>) {
        let Claim { slot, start, count, host, .. } = self.claims[key];
        self.tables.publish(slot, start, count, Entry::Data(host), cx);
        self.writeback.set_due(cx);
    }

    /// Gives up. What was allocated is leaked; what was there before is still there.
    fn fail(&mut self, key: u32, errno: Errno, cx: &mut Cx<'_>) -> Progress {
        if mutant!("claim_kept_on_error") {
            self.claims[key].cow.give_bufs(cx);
            return Progress::Failed(errno);
        }
        self.end_claim(key, false, cx);
        Progress::Failed(errno)
    }

    /// Answers where its piece ends. Are the clusters there?
    #[inline]
    fn end_claim(&mut self, key: u32, is_there: bool, cx: &mut Cx<'_>) -> u64 {
        let mut claim = self.claims.end(key, is_there, cx);
        claim.cow.give_bufs(cx);
        if !mutant!("slice_not_pinned") {
            self.tables.unpin(claim.slot, cx);
        }
        self.header.allocation_ended(self.claims.is_empty(), cx);
        claim.end
    }
}
