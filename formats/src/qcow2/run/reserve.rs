//! The reserve: where new clusters come from, and where given-up ones go.
//!
//! A cluster in reserve has a refcount of 1, and nothing refers to it. Requests take from the reserve
//! in memory. A chore refills it before it runs dry, a batch at a time, and is the only one that
//! touches refcounts. They are written so that they are stable when the write ends (FUA); the length
//! of a file that has just grown is flushed beside it. Data may go to a new cluster meanwhile; a table
//! that leads there is not written before both are stable ([`Reserve::is_uncounted`]). What a crash
//! leaves in reserve is leaked; a drained engine has counted it down again.
//!
//! Clusters come from, in this order: given-up ones whose only reference is gone (no refcount
//! changes at all); holes, clusters of the file with a refcount of 0; the file's end, grown ahead.
//! What comes from the grown end reads as zeros. The file does not grow while there are holes. Where
//! it cannot grow, as on a device, all there is are holes, whatever was there before.
//!
//! The chore looks at one piece of one refcount block at a time, in memory of its own. The first was
//! read when the image was opened.

use std::ops::Range;

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, OpKind, Seg, Segs};
use cowbell_engine::step::{Cx, Event};
use cowbell_engine::units::Errno;
use cowbell_engine::wait::{On, WaitList};

use crate::parts::attempts::Attempts;
use crate::parts::growth::Grow;
use crate::qcow2::disk::header::{Header, REFTABLE_BYTES_MAX};
use crate::qcow2::disk::layout::{HOST_MAX, Invalid};
use crate::qcow2::rest::open::Opened;
use crate::qcow2::run::corrupt::Corrupt;
use crate::qcow2::run::image::{Image, PIECES_MAX, Qcow2Options};
use crate::qcow2::run::live_header::LiveHeader;
use crate::qcow2::run::metadata::Metadata;

/// What the chore awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ReserveState {
    /// Its turn.
    Turn,
    /// A piece of a refcount block, read.
    Load,
    /// The file's new length.
    Grow {
        /// Just as long as is needed.
        exact: bool,
    },
    /// A changed piece of a refcount block, written.
    Write,
    /// A new refcount block's entry in the refcount table, stable.
    Link,
    /// A longer refcount table, written.
    Table {
        /// Up to this piece.
        from: u32,
    },
    /// The longer refcount table, stable.
    FlushTable,
    /// The header's turn, or the header that names it, stable.
    Header,
    /// Clusters that are not needed any more, given back to the file system.
    Discard,
    /// The requests that may still use what was given up, ended.
    Past,
    /// A writeback, with which what was given up leaves.
    Swept,
}

/// Clusters, one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Run {
    first: u64,
    count: u64,
}

impl Run {
    fn end(self) -> u64 {
        self.first + self.count
    }
}

/// Clusters that were taken from the reserve.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    /// The first cluster.
    pub first: u64,
    /// How many, one after the other: at least one, at most what was asked for.
    pub count: u64,
    /// Do they read as zeros?
    pub is_zeros: bool,
}

/// Why clusters were not taken.
#[derive(Clone, Copy, Debug)]
pub(super) enum Short {
    Failed(Errno),
    /// There are none now: the request is parked until the chore's attempt of this number has ended.
    Later(u32),
}

/// References to clusters that were given up, one to each.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Free {
    /// The first cluster.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Was it the only reference?
    pub sole: bool,
    /// May the space be given back to the file system?
    pub discard: bool,
}

/// What the chore is doing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    /// Looking for the next thing to do.
    Idle,
    /// Counting down references of clusters in the piece at hand.
    Drop,
    /// Counting up clusters in the piece at hand: holes, or the file's end.
    Count { fresh: bool },
    /// Counting clusters in use once more.
    Raise,
    /// Making refcount blocks, and perhaps a longer table for them.
    Blocks(Area),
}

/// New refcount blocks and, if the table must grow, the table: clusters one after the other. And
/// behind them clusters for the reserve, where so many are wanted in one run that blocks of their own
/// must count them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Area {
    first: u64,
    /// Refcount blocks, which come first; that of table entry `index` and those behind it.
    blocks: u64,
    index: u64,
    /// Clusters of the new table; 0: the old one will do.
    table: u64,
    /// Clusters for the reserve.
    run: u64,
    /// Does it lie in space that reads as zeros?
    fresh: bool,
}

impl Area {
    fn count(self) -> u64 {
        self.tables() + self.run
    }

    fn end(self) -> u64 {
        self.first + self.count()
    }

    fn tables(self) -> u64 {
        self.blocks + self.table
    }
}

/// The clusters in reserve.
#[derive(Clone, Hash, Debug)]
struct AtHand {
    /// Zeros; the last is taken first.
    fresh: Vec<Run>,
    /// With whatever was there; the last is taken first.
    used: Vec<Run>,
    /// Clusters in both.
    total: u64,
}

impl AtHand {
    /// Puts in another free cluster of the file: those that come first in it are taken first.
    fn put(&mut self, cluster: u64, is_zeros: bool) {
        self.total += 1;
        let run = Run { first: cluster, count: 1 };
        match (is_zeros, self.fresh.first_mut(), self.used.last_mut()) {
            (true, Some(last), _) | (false, _, Some(last)) if last.end() == cluster => {
                last.count += 1;
            }
            (true, ..) => self.fresh.insert(0, run),
            (false, ..) => self.used.push(run),
        }
    }

    /// Puts in clusters that were taken, or in use: the next to be taken.
    fn give_back(&mut self, run: Run) {
        self.total += run.count;
        self.used.push(run);
    }

    /// Puts in clusters that are the last used ones to be taken.
    fn put_last(&mut self, run: Run) {
        self.total += run.count;
        self.used.insert(0, run);
    }

    /// Takes up to `count` clusters, one after the other; are they zeros? Used ones first: they lie
    /// within the file, which then stays as short as it can be.
    fn take(&mut self, count: u64) -> Option<(Run, bool)> {
        let is_zeros = match mutant!("qcow2_fresh_before_used") {
            true => !self.fresh.is_empty(),
            false => self.used.is_empty(),
        };
        let runs = if is_zeros { &mut self.fresh } else { &mut self.used };
        let run = runs.last_mut()?;
        let taken = Run { first: run.first, count: run.count.min(count) };
        run.first += taken.count;
        run.count -= taken.count;
        if run.count == 0 {
            runs.pop();
        }
        self.total -= taken.count;
        Some((taken, is_zeros))
    }

    /// Takes `count` clusters in one run, off the end of a longer one; answers the first.
    fn take_contiguous(&mut self, count: u64) -> Option<u64> {
        let mut runs = self.used.iter_mut().chain(&mut self.fresh);
        let run = runs.find(|run| run.count > count)?;
        run.count -= count;
        self.total -= count;
        Some(run.end())
    }

    /// Takes all.
    fn take_all(&mut self) -> impl Iterator<Item = Run> {
        self.total = 0;
        self.fresh.drain(..).chain(self.used.drain(..))
    }
}

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Reserve {
    at_hand: AtHand,
    /// Unreferenced on disk, but requests of that epoch may still be using them.
    returned: Vec<(u32, Free)>,
    /// Being given back to the file system; then in reserve.
    discarded: Vec<Run>,
    /// References to be counted down.
    drops: Vec<Run>,
    /// Clusters in use that are to be counted so many times more.
    raises: Vec<(u64, u32)>,
    /// Pieces of blocks in memory; the one at hand, if any; is that ahead of the disk?
    pieces: Range<u64>,
    piece: Option<u64>,
    piece_dirty: bool,
    /// The first piece, as it was when the image was opened, until it is looked at: nobody else changes
    /// it. Empty: it is not known.
    first_piece: Vec<u8>,
    /// It counts clusters that are in reserve, or have left it, and that is not stable, or the file's
    /// length is not: no table may lead to them on disk.
    uncounted: bool,
    /// The refcount table, as on disk but for the byte order.
    table: Vec<u64>,
    table_offset: u64,
    phase: Phase,
    /// Where to look for holes next.
    holes: u64,
    /// One past the last cluster of the file that was ever handed out, or there at first. Where
    /// the file cannot be made longer: one past the last whole one.
    end: u64,
    /// While the image is being left clean: one past the last cluster that is still in use.
    rest: u64,
    /// The length that the file has after any crash, at least.
    stable: u64,
    /// The length that it has; that which a growth under way makes it.
    len: u64,
    grown: u64,
    /// How many clusters are counted up at once.
    batch: u64,
    asked: bool,
    running: bool,
    settling: bool,
    /// Somebody found nothing, since the chore began or before.
    wanted: bool,
    /// As many clusters in one run are wanted, which no piece of a block counts.
    wanted_run: Option<u64>,
    /// Somebody wants more clusters in one run than there are.
    wants_long_run: bool,
    /// Can the file be made longer?
    can_grow: bool,
    attempts: Attempts,
    waiters: WaitList,
    /// The writeback that waits for counts.
    counting: WaitList,
    /// The chore, while it waits for a writeback; or until that waits for it.
    for_writeback: WaitList,
    /// The chore that empties the reserve.
    settler: WaitList,
    result: Result<(), Errno>,
    /// The refcounts are known to be wrong.
    is_corrupt: bool,
    options: Qcow2Options,
    cluster_bits: u32,
    /// log2 of the clusters that a piece of a refcount block counts.
    piece_bits: u32,
}

impl Reserve {
    pub fn new(opened: &Opened, can_grow: bool, options: Qcow2Options) -> Reserve {
        let geometry = opened.geometry();
        let cluster_bits = geometry.cluster_bits();
        // A file that ends within a cluster: its last bytes may be anything, that cluster is left.
        // A device ends with its last whole cluster.
        let end = match can_grow {
            true => opened.file_len.div_ceil(1 << cluster_bits),
            false => opened.file_len >> cluster_bits,
        };
        // What the lists may need, so that they never grow.
        let with_room = || Vec::with_capacity(options.reserve_max.min(4096) as usize);
        Reserve {
            at_hand: AtHand { fresh: with_room(), used: with_room(), total: 0 },
            returned: Vec::with_capacity(options.frees_max),
            discarded: Vec::with_capacity(options.frees_max),
            drops: with_room(),
            raises: Vec::with_capacity(RAISES_MAX),
            pieces: 0..0,
            piece: None,
            piece_dirty: false,
            first_piece: opened.first_counts.clone(),
            uncounted: false,
            table: opened.refcount_table.clone(),
            table_offset: opened.header.refcount_table_offset,
            phase: Phase::Idle,
            holes: 0,
            end,
            rest: end,
            stable: opened.file_len,
            len: opened.file_len,
            grown: opened.file_len,
            batch: options.reserve_min.min(options.reserve_max).max(1),
            asked: false,
            running: false,
            settling: false,
            wanted: false,
            wanted_run: None,
            wants_long_run: false,
            can_grow,
            attempts: Attempts::default(),
            waiters: WaitList::new(),
            counting: WaitList::new(),
            for_writeback: WaitList::new(),
            settler: WaitList::new(),
            result: Ok(()),
            is_corrupt: false,
            options,
            cluster_bits,
            piece_bits: geometry.slice_bits() + 3 - geometry.refcount_order(),
        }
    }

    /// Is a cluster in use, or may it be, whose count is not stable, or behind whose end the file
    /// may end after a crash?
    pub fn is_uncounted(&self) -> bool {
        (self.uncounted || !self.raises.is_empty()) && !mutant!("qcow2_reserve_before_stable")
    }

    /// Another entry will lead to a cluster that is in use already.
    pub fn raise(&mut self, cluster: u64, cx: &mut Cx<'_>) {
        match self.raises.last_mut() {
            Some(last) if last.0 == cluster => last.1 += 1,
            _ => self.raises.push((cluster, 1)),
        }
        // A writeback asks for that anyway: but nothing grows without end until then.
        if self.raises.len() > RAISES_MAX / 2 {
            self.ask(cx);
        }
    }

    /// Was the chore asked for, and is it to begin?
    pub fn begin_asked(&mut self) -> bool {
        let begins = self.asked && !self.running;
        if begins {
            (self.asked, self.running) = (false, true);
        }
        begins
    }

    /// Why attempt number `attempt`, or one after it, failed; `None` if none did.
    pub fn failure_of(&self, attempt: u32) -> Option<Errno> {
        self.attempts.failure_of(attempt)
    }

    /// Why there is nothing in reserve, if attempt number `attempt`, or one after it, was to bring
    /// something and failed.
    pub fn no_cluster(&self, attempt: u32) -> Option<Errno> {
        self.failure_of(attempt).filter(|_| self.at_hand.total == 0)
    }

    /// Have the refcounts been found to be wrong? Then no cluster is handed out, and none counted.
    pub fn is_corrupt(&self) -> bool {
        self.is_corrupt
    }

    /// Takes in clusters that nothing refers to on disk any more, stably.
    pub fn take_in(&mut self, freed: impl Iterator<Item = Free>, epoch: u32) {
        self.returned.extend(freed.map(|free| (epoch, free)));
    }

    /// Takes back clusters that nothing came to refer to.
    pub fn give_back(&mut self, first: u64, count: u64) {
        self.at_hand.give_back(Run { first, count });
    }

    fn is_low(&self) -> bool {
        self.at_hand.total < self.batch.div_ceil(2)
    }

    /// How the last round of the chore went.
    pub fn result(&self) -> Result<(), Errno> {
        self.result
    }

    /// Is nothing left to be counted down, or did that fail?
    pub fn is_emptied(&self) -> bool {
        let is_empty = self.at_hand.total == 0 && self.drops.is_empty() && self.returned.is_empty();
        is_empty || self.result.is_err()
    }

    /// The length of the file without the spare end, if it has one that can be cut off.
    pub fn spare_end(&self) -> Option<u64> {
        let end = self.rest << self.cluster_bits;
        ((self.can_grow || mutant!("qcow2_device_is_cut")) && self.grown > end).then_some(end)
    }

    /// The spare end was cut off. Not before that does the file end where it is in use: what it
    /// would gain by growing again was there, and is no zeros.
    pub fn cut(&mut self) {
        self.end = self.rest;
        self.holes = self.holes.min(self.end);
        self.len = self.len.min(self.end << self.cluster_bits);
        self.grown = self.len;
        self.stable = self.stable.min(self.len);
    }

    /// The clusters in front of `end` are handed out. What a settling counts down begins there.
    fn move_end(&mut self, end: u64) {
        self.end = end;
        if self.settling && !mutant!("qcow2_late_block_is_cut") {
            self.rest = end;
        }
    }

    pub fn assert_idle(&self) {
        assert!(!self.running && !self.asked && self.phase == Phase::Idle, "{:?}", self.phase);
        assert!(self.waiters.is_empty() && self.settler.is_empty());
        assert!(self.counting.is_empty() && self.for_writeback.is_empty());
        assert!(!self.piece_dirty || self.uncounted);
    }

    /// Takes up to `count` clusters, one after the other.
    pub fn take(&mut self, count: u64, cx: &mut Cx<'_>) -> Result<Taken, Short> {
        if self.is_corrupt {
            return Err(Short::Failed(Errno::IO));
        }
        if let Some((run, is_zeros)) = self.at_hand.take(count) {
            if self.is_low() {
                self.ask(cx);
            }
            return Ok(Taken { first: run.first, count: run.count, is_zeros });
        }
        self.wanted = true;
        Err(self.park(cx))
    }

    /// Takes `count` clusters, one after the other, for a longer L1 table; answers the first.
    pub fn take_contiguous(&mut self, count: u64, cx: &mut Cx<'_>) -> Result<u64, Short> {
        if self.is_corrupt {
            return Err(Short::Failed(Errno::IO));
        }
        if let Some(first) = self.at_hand.take_contiguous(count) {
            return Ok(first);
        }
        if count < 1 << (self.piece_bits - 1) {
            self.batch = self.batch.max(2 * count + self.at_hand.total);
        } else {
            self.wanted_run = Some(count + 1);
        }
        (self.wanted, self.wants_long_run) = (true, true);
        Err(self.park(cx))
    }

    /// Parks the request until the chore has brought clusters, or failed.
    fn park(&mut self, cx: &mut Cx<'_>) -> Short {
        self.ask(cx);
        cx.park(&mut self.waiters, On::FreeClusters);
        Short::Later(self.attempts.latest())
    }

    fn ask(&mut self, cx: &mut Cx<'_>) {
        if !self.running && !self.asked {
            self.asked = true;
            self.attempts.begin();
            cx.ask();
        }
    }

    /// A writeback waits for the counts of what is in use: parks it. If the chore waits, for it or for requests that wait for
    /// it, it counts first.
    pub fn park_for_counts(&mut self, cx: &mut Cx<'_>) {
        self.ask(cx);
        cx.park(&mut self.counting, On::Refcounts);
        if !mutant!("qcow2_waits_with_counts_left") {
            cx.wake_all(&mut self.for_writeback);
            cx.wake_past_waiters();
        }
    }

    /// Parks the chore until a writeback has ended, or waits for counts.
    pub fn park_for_writeback(&mut self, cx: &mut Cx<'_>) {
        cx.park(&mut self.for_writeback, On::Writeback);
    }

    /// Does the chore wait for one?
    pub fn awaits_writeback(&self) -> bool {
        !self.for_writeback.is_empty()
    }

    /// A writeback has ended: was something given up?
    pub fn writeback_ended(&mut self, cx: &mut Cx<'_>) {
        cx.wake_all(&mut self.for_writeback);
        if !self.returned.is_empty() {
            self.ask(cx);
        }
    }

    /// Has everything that is in reserve counted down, and parks the request until then.
    pub fn empty(&mut self, cx: &mut Cx<'_>) {
        if !std::mem::replace(&mut self.settling, true) {
            self.rest = self.end;
        }
        self.ask(cx);
        cx.park(&mut self.settler, On::Refcounts);
    }

    /// How that went.
    pub fn emptied(&mut self) -> Result<(), Errno> {
        self.settling = false;
        self.batch = self.options.reserve_min.min(self.options.reserve_max).max(1);
        self.result
    }
}

/// How the chore goes on.
#[derive(Debug)]
pub(super) enum Outcome {
    Wait(ReserveState),
    /// It waits for a writeback, in this state.
    WaitForWriteback(ReserveState),
    Done(Result<(), Errno>),
}

/// A step of the chore: the reserve, and what it works with.
pub(super) struct ReserveStep<'a> {
    pub image: &'a Image,
    pub reserve: &'a mut Reserve,
    pub metadata: &'a mut Metadata,
    pub header: &'a mut LiveHeader,
    pub corrupt: &'a mut Corrupt,
    /// How the last writeback ended.
    pub writeback: Result<(), Errno>,
    /// Is something on its way to the reserve that leaves with a writeback?
    pub has_frees: bool,
}

impl ReserveStep<'_> {
    pub fn run(&mut self, state: ReserveState, event: Event, cx: &mut Cx<'_>) -> Outcome {
        match (state, event) {
            // That failed before, and the writeback waits for it.
            (ReserveState::Turn, Event::Start) if self.reserve.uncounted => self.write_piece(cx),
            (ReserveState::Turn, Event::Start) => self.begin_if_sure(cx),
            (ReserveState::Turn | ReserveState::Past | ReserveState::Swept, Event::Woken) => {
                self.goes_on(state, cx)
            }
            (ReserveState::Discard, Event::Io(_)) => self.discarded(cx),
            (ReserveState::Grow { .. }, Event::Io(_)) if mutant!("qcow2_failed_growth_is_done") => {
                self.grown(cx)
            }
            // Not that far: then just as far as is needed.
            (ReserveState::Grow { exact: false }, Event::Io(Err(_))) => self.grow_exactly(cx),
            (ReserveState::Grow { exact: true }, Event::Io(Err(errno))) => {
                self.reserve.grown = self.reserve.len;
                self.reserve.can_grow &= !mutant!("qcow2_never_grows_after_a_failure");
                self.out_of_space(errno, cx)
            }
            (ReserveState::Header, Event::Io(Err(errno))) => {
                self.header.changed(Err(errno), cx);
                self.link_failed(errno, cx)
            }
            (ReserveState::Link, Event::Io(Err(errno))) => self.link_failed(errno, cx),
            (_, Event::Io(Err(errno))) => self.counting_failed(errno, cx),
            (ReserveState::Load, Event::Io(_)) => self.piece_loaded(cx),
            (ReserveState::Grow { .. }, Event::Io(_)) => self.grown(cx),
            (ReserveState::Write, Event::Io(_)) => self.piece_written(cx),
            (ReserveState::Table { from }, Event::Io(_)) => self.write_area(from, cx),
            (ReserveState::FlushTable, Event::Io(_)) => self.link_area(cx),
            (ReserveState::Header, Event::Woken) => self.link_area(cx),
            (ReserveState::Link | ReserveState::Header, Event::Io(_)) => self.area_linked(cx),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// What it is to count is the header's to say: it waits until that is known. Of clusters in use that are counted once more it
    /// is known: their blocks are in the old table and in the new one.
    fn begin_if_sure(&mut self, cx: &mut Cx<'_>) -> Outcome {
        if !self.header.is_doubted() {
            return self.begin(cx);
        }
        self.count_raised(cx).unwrap_or(Outcome::WaitForWriteback(ReserveState::Turn))
    }

    /// It has waited: for a writeback or for requests, or until those waited for it.
    fn goes_on(&mut self, state: ReserveState, cx: &mut Cx<'_>) -> Outcome {
        if !self.reserve.counting.is_empty()
            && let Some(outcome) = self.count_raised(cx)
        {
            return outcome;
        }
        match self.writeback {
            Err(_) if state != ReserveState::Past => self.done(self.writeback, cx),
            _ => self.begin_if_sure(cx),
        }
    }

    /// Counts what is in use already once more, if there is some. A writeback waits for that: so it comes before any wait for
    /// one.
    fn count_raised(&mut self, cx: &mut Cx<'_>) -> Option<Outcome> {
        let &(cluster, _) = self.reserve.raises.first()?;
        if self.reserve.is_corrupt {
            return Some(self.done(Err(Errno::IO), cx));
        }
        self.reserve.phase = Phase::Raise;
        Some(self.look_at(cluster, cx))
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Outcome {
        match self.sort_returned(cx) {
            true => Outcome::Wait(ReserveState::Discard),
            false => self.next(cx),
        }
    }

    /// Sorts what was given up: into the reserve, or to be counted down. Answers whether some of it
    /// is being given back to the file system.
    fn sort_returned(&mut self, cx: &mut Cx<'_>) -> bool {
        let bits = self.image.geometry.cluster_bits();
        let mut issued = false;
        let mut returned = std::mem::take(&mut self.reserve.returned);
        returned.retain(|&(epoch, free)| {
            if !cx.is_past(epoch) && !mutant!("qcow2_reused_while_in_use") {
                return true;
            }
            let run = Run { first: free.first, count: free.count };
            let reserve = &mut *self.reserve;
            let fits = reserve.at_hand.total + run.count <= reserve.options.reserve_max
                && !reserve.settling;
            if free.discard && cx.room() > 0 {
                let (from, len) = (run.first << bits, run.count << bits);
                cx.issue(Op::bare(OpKind::Discard, self.image.data, from, len));
                issued = true;
            }
            if !(free.sole && fits) {
                self.reserve.drops.push(run);
            } else if issued && !mutant!("qcow2_stocked_before_discarded") {
                self.reserve.discarded.push(run);
            } else {
                self.reserve.give_back(run.first, run.count);
            }
            false
        });
        self.reserve.returned = returned;
        issued
    }

    /// What was given back to the file system may be used again. (A hint, taken or not.)
    fn discarded(&mut self, cx: &mut Cx<'_>) -> Outcome {
        while let Some(run) = self.reserve.discarded.pop() {
            self.reserve.give_back(run.first, run.count);
        }
        self.next(cx)
    }

    /// The next thing to do.
    fn next(&mut self, cx: &mut Cx<'_>) -> Outcome {
        let reserve = &mut *self.reserve;
        reserve.phase = Phase::Idle;
        if reserve.settling {
            reserve.drops.extend(reserve.at_hand.take_all());
        }
        // From the back, so that a settled file ends where its last cluster does.
        reserve.drops.sort_unstable_by_key(|run| std::cmp::Reverse(run.first));
        if let Some(drop) = reserve.drops.first().copied() {
            reserve.phase = Phase::Drop;
            return self.look_at(drop.first, cx);
        }
        if reserve.is_corrupt {
            return self.done(Err(Errno::IO), cx);
        }
        if let Some(outcome) = self.count_raised(cx) {
            return outcome;
        }
        let reserve = &mut *self.reserve;
        if reserve.at_hand.total > 0 && reserve.wanted {
            cx.wake_all(&mut reserve.waiters);
        }
        if let Some(run) = reserve.wanted_run.take() {
            return self.make_run(run, cx);
        }
        if reserve.settling || !(reserve.wanted || reserve.is_low()) {
            return self.done(Ok(()), cx);
        }
        self.count_holes(cx)
    }

    /// Where the refcount of `cluster` is: the offset of its piece of a block, if it has one.
    fn piece_offset(&self, cluster: u64) -> Result<Option<u64>, Invalid> {
        let index = cluster >> self.image.geometry.block_bits();
        let block = self.reserve.table.get(index as usize).copied().unwrap_or(0);
        if block == 0 {
            return Ok(None);
        }
        if !self.image.geometry.is_aligned(block) || block >= HOST_MAX {
            return Err(Invalid);
        }
        let inside = cluster & ((1 << self.image.geometry.block_bits()) - 1);
        Ok(Some(block + ((inside >> self.reserve.piece_bits) << self.image.geometry.slice_bits())))
    }

    /// Where the piece at hand is in memory, or what is written instead of one.
    fn counts_seg(&self) -> Seg {
        let bits = self.image.geometry.slice_bits();
        let before = self.reserve.piece.map_or(0, |piece| piece - self.reserve.pieces.start);
        let base = Base::Region(self.image.regions.counts);
        Seg { base, off: (before as u32) << bits, len: 1 << bits }
    }

    fn counts<'m>(&self, cx: &'m mut Cx<'_>) -> &'m mut [u8] {
        let Seg { off, len, .. } = self.counts_seg();
        &mut cx.mem().region_mut(self.image.regions.counts)[off as usize..(off + len) as usize]
    }

    /// Gets the piece that counts `cluster` into memory, and goes on with it.
    fn look_at(&mut self, cluster: u64, cx: &mut Cx<'_>) -> Outcome {
        let piece = cluster >> self.reserve.piece_bits;
        if self.reserve.pieces.contains(&piece) {
            self.reserve.piece = Some(piece);
            return self.piece_loaded(cx);
        }
        debug_assert!(!self.reserve.piece_dirty, "a changed piece is written before it goes");
        match self.piece_offset(cluster) {
            Ok(Some(_)) => {}
            Ok(None) => return self.no_block(cluster, cx),
            Err(Invalid) => return self.stop_counting("refcount block is misplaced", cluster, cx),
        }
        (self.reserve.pieces, self.reserve.piece) = (piece..piece + 1, Some(piece));
        if piece == 0 && !self.reserve.first_piece.is_empty() {
            let bytes = std::mem::take(&mut self.reserve.first_piece);
            self.counts(cx).copy_from_slice(&bytes);
            return self.piece_loaded(cx);
        }
        self.load(piece, cx)
    }

    /// Reads the piece at hand. Where holes are looked for, those behind it are wanted next: several
    /// are read at once.
    fn load(&mut self, first: u64, cx: &mut Cx<'_>) -> Outcome {
        let bits = self.reserve.piece_bits;
        let last = match self.reserve.phase {
            Phase::Count { fresh: false } => (self.reserve.end - 1) >> bits,
            _ => first,
        };
        for piece in first..=last.min(first + PIECES_MAX - 1) {
            let Ok(Some(offset)) = self.piece_offset(piece << bits) else { break };
            if piece > first && cx.room() == 0 {
                break;
            }
            (self.reserve.pieces.end, self.reserve.piece) = (piece + 1, Some(piece));
            cx.issue(self.image.read_op(offset, Segs::one(self.counts_seg())));
        }
        self.reserve.piece = Some(first);
        Outcome::Wait(ReserveState::Load)
    }

    /// What is in memory is not to be relied on, or is needed for something else.
    fn forget_pieces(&mut self) {
        (self.reserve.pieces, self.reserve.piece) = (0..0, None);
    }

    /// The refcounts cannot be right: `what`, at byte `at` of the file.
    fn counts_are_wrong(&mut self, what: &'static str, at: u64, cx: &mut Cx<'_>) {
        self.reserve.is_corrupt = true;
        self.corrupt.mark(what, at, cx);
    }

    /// The refcount table's entry for `cluster` cannot be right.
    fn stop_counting(&mut self, what: &'static str, cluster: u64, cx: &mut Cx<'_>) -> Outcome {
        let index = cluster >> self.image.geometry.block_bits();
        self.counts_are_wrong(what, self.reserve.table_offset + index * 8, cx);
        self.reserve.drops.clear();
        self.done(Err(Errno::IO), cx)
    }

    fn piece_loaded(&mut self, cx: &mut Cx<'_>) -> Outcome {
        match self.reserve.phase {
            Phase::Drop => self.count_down(cx),
            Phase::Count { fresh } => self.count_up(fresh, cx),
            Phase::Raise => self.count_again(cx),
            phase => panic!("no piece is wanted in {phase:?}"),
        }
    }

    /// Counts down the references in the piece at hand.
    fn count_down(&mut self, cx: &mut Cx<'_>) -> Outcome {
        let (geometry, bits) = (self.image.geometry, self.reserve.piece_bits);
        let piece = self.reserve.piece.expect("it was loaded");
        let (from, to) = (piece << bits, (piece + 1) << bits);
        let bytes = self.counts(cx);
        let mut drops = std::mem::take(&mut self.reserve.drops);
        let mut wrong = None;
        for i in 0..drops.len() {
            let run = drops[i];
            let (first, end) = (run.first.max(from), run.end().min(to));
            if first >= end {
                continue;
            }
            for cluster in (first..end).rev() {
                let index = (cluster - from) as usize;
                let count = geometry.refcount(bytes, index);
                if count == 0 {
                    wrong = Some(cluster);
                }
                geometry.set_refcount(bytes, index, count.saturating_sub(1));
                if count > 1 {
                    continue;
                }
                if !mutant!("qcow2_counted_down_is_no_hole") {
                    self.reserve.holes = self.reserve.holes.min(cluster);
                }
                if self.reserve.settling && cluster + 1 == self.reserve.rest {
                    self.reserve.rest = cluster;
                }
            }
            drops[i].count = first - run.first;
            drops.extend((end < run.end()).then(|| Run { first: end, count: run.end() - end }));
        }
        drops.retain(|run| run.count > 0);
        self.reserve.drops = drops;
        if let Some(cluster) = wrong {
            let at = cluster << self.image.geometry.cluster_bits();
            self.counts_are_wrong("cluster in use has refcount 0", at, cx);
        }
        self.write_piece(cx)
    }

    /// Counts clusters in the piece at hand once more.
    fn count_again(&mut self, cx: &mut Cx<'_>) -> Outcome {
        let (geometry, bits) = (self.image.geometry, self.reserve.piece_bits);
        let piece = self.reserve.piece.expect("it was loaded");
        let bytes = self.counts(cx);
        let mut raises = std::mem::take(&mut self.reserve.raises);
        let mut wrong = None;
        raises.retain(|&(cluster, times)| {
            if cluster >> bits != piece {
                return true;
            }
            let index = (cluster & ((1 << bits) - 1)) as usize;
            match geometry.refcount(bytes, index) {
                count @ 1.. if geometry.refcount_max() - count >= times.into() => {
                    geometry.set_refcount(bytes, index, count + u64::from(times));
                }
                _ => wrong = Some(cluster),
            }
            false
        });
        self.reserve.raises = raises;
        if let Some(cluster) = wrong {
            let at = cluster << geometry.cluster_bits();
            self.counts_are_wrong("cluster in use has a wrong refcount", at, cx);
        }
        self.reserve.uncounted = true;
        self.write_piece(cx)
    }

    fn write_piece(&mut self, cx: &mut Cx<'_>) -> Outcome {
        self.reserve.piece_dirty = true;
        let piece = self.reserve.piece.expect("it was changed");
        let offset = self.piece_offset(piece << self.reserve.piece_bits).ok().flatten();
        let offset = offset.expect("it was loaded from there");
        let (uncounted, has_grown) =
            (self.reserve.uncounted, self.reserve.stable < self.reserve.len);
        let kind = OpKind::Write { fua: uncounted };
        // The writeback that waits for it asks whether it failed, not whether one before did.
        self.reserve.result = Ok(());
        if uncounted && has_grown && !mutant!("qcow2_length_not_fenced") {
            cx.issue(Op::flush(self.image.file));
        }
        cx.issue(Op { kind, ..Op::write(self.image.file, offset, Segs::one(self.counts_seg())) });
        Outcome::Wait(ReserveState::Write)
    }

    /// Counts are on disk, stably if there are new ones among them, and so is the file's length.
    fn piece_written(&mut self, cx: &mut Cx<'_>) -> Outcome {
        self.reserve.piece_dirty = false;
        if std::mem::take(&mut self.reserve.uncounted) {
            self.reserve.stable = self.reserve.len;
            cx.wake_all(&mut self.reserve.counting);
        }
        match self.reserve.phase {
            Phase::Count { .. } if self.reserve.is_low() => self.count_holes(cx),
            Phase::Count { .. } => self.done(Ok(()), cx),
            Phase::Drop => self.next(cx),
            Phase::Raise | Phase::Idle | Phase::Blocks(_) => self.begin_if_sure(cx),
        }
    }

    /// Looks for holes where they were not looked for yet; then takes from the file's end.
    fn count_holes(&mut self, cx: &mut Cx<'_>) -> Outcome {
        if self.reserve.holes < self.reserve.end && !mutant!("qcow2_grows_beside_holes") {
            self.reserve.phase = Phase::Count { fresh: false };
            return self.look_at(self.reserve.holes, cx);
        }
        if !self.reserve.can_grow {
            return self.out_of_space(Errno::NO_SPACE, cx);
        }
        self.reserve.phase = Phase::Count { fresh: true };
        let Some(len) = self.wanted_len(self.reserve.batch) else {
            return self.out_of_space(Errno::TOO_BIG, cx);
        };
        if len > self.reserve.grown { self.grow(len, false, cx) } else { self.grown(cx) }
    }

    /// No cluster is free, and the file cannot be made longer: `errno`. Before anybody is told, what
    /// was given up comes back: it leaves with a writeback, and when nobody uses it any more.
    fn out_of_space(&mut self, errno: Errno, cx: &mut Cx<'_>) -> Outcome {
        let reserve = &mut *self.reserve;
        if !reserve.wanted || reserve.at_hand.total > 0 && !reserve.wants_long_run {
            return self.done(Ok(()), cx);
        }
        if !mutant!("qcow2_waits_with_counts_left")
            && let Some(outcome) = self.count_raised(cx)
        {
            return outcome;
        }
        let reserve = &mut *self.reserve;
        if !reserve.returned.is_empty() {
            if reserve.returned.iter().any(|&(epoch, _)| cx.is_past(epoch)) {
                return self.begin(cx);
            }
            cx.park_until_past();
            return Outcome::Wait(ReserveState::Past);
        }
        if self.has_frees && !mutant!("qcow2_given_up_forgotten_when_full") {
            return Outcome::WaitForWriteback(ReserveState::Swept);
        }
        self.done(Err(errno), cx)
    }

    /// The file's length with `count` more clusters; `None` if that is too long.
    fn wanted_len(&self, count: u64) -> Option<u64> {
        let bits = self.image.geometry.cluster_bits();
        let end = self.reserve.end.checked_add(count).filter(|&end| end <= self.clusters_max());
        end.map(|end| end << bits)
    }

    /// The most clusters that a file can have.
    fn clusters_max(&self) -> u64 {
        LEN_MAX >> self.image.geometry.cluster_bits()
    }

    /// Makes the file `len` bytes long, or longer.
    fn grow(&mut self, len: u64, exact: bool, cx: &mut Cx<'_>) -> Outcome {
        let reserve = &mut *self.reserve;
        let growth = reserve.options.growth;
        let ahead = match growth.by {
            Grow::Write => 0,
            _ if exact => 0,
            _ => reserve.grown.clamp(growth.step_min, growth.step_max),
        };
        let to = len.saturating_add(ahead).min(LEN_MAX).max(len);
        let op = match growth.by {
            Grow::Allocate => {
                Op::bare(OpKind::Allocate, self.image.file, reserve.grown, to - reserve.grown)
            }
            _ => Op::bare(OpKind::Truncate, self.image.file, to, 0),
        };
        reserve.grown = to;
        cx.issue(op);
        Outcome::Wait(ReserveState::Grow { exact: exact || ahead == 0 })
    }

    /// The file is long enough: count clusters of its end.
    fn grown(&mut self, cx: &mut Cx<'_>) -> Outcome {
        self.reserve.len = self.reserve.grown;
        match self.reserve.phase {
            Phase::Blocks(_) => self.write_area(0, cx),
            _ => self.look_at(self.reserve.end, cx),
        }
    }

    /// Counts up what is free in the piece at hand.
    fn count_up(&mut self, fresh: bool, cx: &mut Cx<'_>) -> Outcome {
        let (geometry, bits) = (self.image.geometry, self.reserve.piece_bits);
        let piece = self.reserve.piece.expect("it was loaded");
        let (from, to) = (piece << bits, (piece + 1) << bits);
        let (at, to) = match fresh {
            true => (self.reserve.end, to.min(self.reserve.grown >> geometry.cluster_bits())),
            false => (self.reserve.holes.max(from), to.min(self.reserve.end)),
        };
        let bytes = self.counts(cx);
        let wanted = self.reserve.batch;
        let is_zeros = fresh || !self.reserve.can_grow && mutant!("qcow2_device_is_zeros");
        let (mut found, mut next) = (0, at);
        let mut metadata = self.metadata.within(at..to.max(at)).peekable();
        let mut uncounted = None;
        while next < to && found < wanted {
            let (cluster, index) = (next, (next - from) as usize);
            let is_metadata = metadata.next_if_eq(&cluster).is_some();
            next += 1;
            if geometry.refcount(bytes, index) != 0 {
                continue;
            }
            if is_metadata {
                // A table that nobody has counted: it is not given away.
                uncounted = Some(cluster);
                continue;
            }
            geometry.set_refcount(bytes, index, 1);
            found += 1;
            self.reserve.at_hand.put(cluster, is_zeros);
        }
        if fresh {
            // Holes that were not looked at yet are still to be.
            if self.reserve.holes == self.reserve.end {
                self.reserve.holes = next;
            }
            self.reserve.move_end(next);
        } else {
            let stops = mutant!("qcow2_search_for_holes_stops_early");
            self.reserve.holes = if stops { self.reserve.end } else { next };
        }
        if let Some(cluster) = uncounted {
            self.counts_are_wrong("table has refcount 0", cluster << geometry.cluster_bits(), cx);
        }
        if found == 0 {
            return self.count_holes(cx);
        }
        self.reserve.uncounted = true;
        cx.wake_all(&mut self.reserve.waiters);
        self.write_piece(cx)
    }

    /// There is no refcount block for `cluster`: one is made, in the space that it will count.
    fn no_block(&mut self, cluster: u64, cx: &mut Cx<'_>) -> Outcome {
        let block_bits = self.image.geometry.block_bits();
        let index = cluster >> block_bits;
        if matches!(self.reserve.phase, Phase::Drop | Phase::Raise) {
            return self.stop_counting("no refcount block for a cluster in use", cluster, cx);
        }
        if self.reserve.phase == (Phase::Count { fresh: true }) {
            return self.make_area(self.area(self.reserve.end, index, true, 0), cx);
        }
        // What nothing counts is free, in a sound image.
        let area = self.area(index << block_bits, index, false, 0);
        match area.filter(|area| area.end() <= self.reserve.end) {
            Some(area) if self.metadata.within(area.first..area.end()).next().is_some() => {
                self.stop_counting("no refcount block for a table", cluster, cx)
            }
            Some(area) => self.make_area(Some(area), cx),
            None => {
                // It does not fit in front of the file's end.
                self.reserve.holes = self.reserve.end;
                self.count_holes(cx)
            }
        }
    }

    /// Makes `run` clusters, behind everything that there are refcount blocks for: at the file's
    /// end, or where a device has such space.
    fn make_run(&mut self, run: u64, cx: &mut Cx<'_>) -> Outcome {
        let block_bits = self.image.geometry.block_bits();
        let blocks = self.reserve.table.iter().rposition(|&block| block != 0);
        let counted = blocks.map_or(0, |last| (last as u64 + 1) << block_bits);
        if self.reserve.can_grow {
            let first = counted.max(self.reserve.end);
            return self.make_area(self.area(first, first >> block_bits, true, run), cx);
        }
        let area = self.area(counted, counted >> block_bits, false, run);
        match area.filter(|area| area.end() <= self.reserve.end) {
            Some(area) => self.make_area(Some(area), cx),
            None => self.done(Err(Errno::NO_SPACE), cx),
        }
    }

    fn make_area(&mut self, area: Option<Area>, cx: &mut Cx<'_>) -> Outcome {
        let Some(area) = area.filter(|area| area.end() <= self.clusters_max()) else {
            return self.out_of_space(Errno::TOO_BIG, cx);
        };
        self.reserve.phase = Phase::Blocks(area);
        let end = area.end() << self.image.geometry.cluster_bits();
        if end > self.reserve.grown && area.fresh {
            return self.grow(end, false, cx);
        }
        self.write_area(0, cx)
    }

    /// The blocks, and the table, that make entry `index` of the refcount table possible, and a run
    /// of `run` clusters. Where there is one, there are several blocks: all are linked at once, with
    /// a table.
    fn area(&self, first: u64, index: u64, fresh: bool, run: u64) -> Option<Area> {
        let (block_bits, cluster_bits) =
            (self.image.geometry.block_bits(), self.image.geometry.cluster_bits());
        let entries = self.reserve.table.len() as u64;
        let mut area = Area { first, blocks: 1, index, table: 0, run, fresh };
        if index < entries && run == 0 {
            return Some(area);
        }
        // Half as many again, and enough for the area itself.
        loop {
            let last = (first + area.count() - 1) >> block_bits;
            let blocks = last - index + 1;
            let ahead = if index < entries { entries } else { entries + entries / 2 };
            let needed = ahead.max(last + 1) << 3;
            let table = needed.div_ceil(1 << cluster_bits);
            if blocks <= area.blocks && table <= area.table {
                break;
            }
            (area.blocks, area.table) = (blocks.max(area.blocks), table.max(area.table));
        }
        (area.table << cluster_bits <= REFTABLE_BYTES_MAX).then_some(area)
    }

    /// Writes the area's pieces from number `from` on, one at a time, leaving out zeros where
    /// zeros are.
    fn write_area(&mut self, from: u32, cx: &mut Cx<'_>) -> Outcome {
        let Phase::Blocks(area) = self.reserve.phase else { panic!("{:?}", self.reserve.phase) };
        let (bits, slice_bits) =
            (self.image.geometry.cluster_bits(), self.image.geometry.slice_bits());
        let pieces = area.tables() << (bits - slice_bits);
        self.forget_pieces();
        for i in u64::from(from)..pieces {
            let bytes = self.counts(cx);
            bytes.fill(0);
            self.fill_area(area, i, bytes);
            if area.fresh && bytes.iter().all(|&byte| byte == 0) {
                continue;
            }
            let offset = (area.first << bits) + (i << slice_bits);
            cx.issue(Op::write(self.image.file, offset, Segs::one(self.counts_seg())));
            return Outcome::Wait(ReserveState::Table { from: i as u32 + 1 });
        }
        if mutant!("qcow2_block_linked_unstable") {
            return self.link_area(cx);
        }
        self.image.flush_files(cx);
        Outcome::Wait(ReserveState::FlushTable)
    }

    /// What piece `i` of the area holds.
    fn fill_area(&self, area: Area, i: u64, bytes: &mut [u8]) {
        let geometry = self.image.geometry;
        let per_cluster = geometry.cluster_bits() - geometry.slice_bits();
        let blocks = area.blocks << per_cluster;
        if i < blocks {
            let from = (area.index << geometry.block_bits()) + (i << self.reserve.piece_bits);
            let to = from + (1 << self.reserve.piece_bits);
            let end = area.first + area.count();
            for cluster in area.first.max(from)..end.min(to) {
                geometry.set_refcount(bytes, (cluster - from) as usize, 1);
            }
            return;
        }
        let first = ((i - blocks) << (geometry.slice_bits() - 3)) as usize;
        self.fill_table(area, first, bytes);
    }

    /// Entries of the refcount table from `first` on, the area's blocks among them.
    fn fill_table(&self, area: Area, first: usize, bytes: &mut [u8]) {
        for (i, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let index = (first + i) as u64;
            let block = index.checked_sub(area.index).filter(|&block| block < area.blocks);
            let entry = match block {
                Some(block) => (area.first + block) << self.image.geometry.cluster_bits(),
                None => self.reserve.table.get(first + i).copied().unwrap_or(0),
            };
            *word = entry.to_be_bytes();
        }
    }

    /// The area is stable: the refcount table, or the header, may lead to it.
    fn link_area(&mut self, cx: &mut Cx<'_>) -> Outcome {
        let Phase::Blocks(area) = self.reserve.phase else { panic!("{:?}", self.reserve.phase) };
        if area.table > 0 {
            let clusters = area.table as u32;
            let offset = (area.first + area.blocks) << self.image.geometry.cluster_bits();
            let change = |header: &mut Header| {
                header.refcount_table_offset = offset;
                header.refcount_table_clusters = clusters;
            };
            self.header.change(change, cx);
            return Outcome::Wait(ReserveState::Header);
        }
        let entry_bits = self.image.geometry.slice_bits() - 3;
        let first = area.index >> entry_bits << entry_bits;
        self.fill_table(area, first as usize, self.counts(cx));
        let offset = self.reserve.table_offset + first * 8;
        cx.issue(self.image.stable_write(offset, Segs::one(self.counts_seg())));
        Outcome::Wait(ReserveState::Link)
    }

    /// The area is part of the image.
    fn area_linked(&mut self, cx: &mut Cx<'_>) -> Outcome {
        let Phase::Blocks(area) = self.reserve.phase else { panic!("{:?}", self.reserve.phase) };
        let bits = self.image.geometry.cluster_bits();
        if area.table > 0 {
            self.header.changed(Ok(()), cx);
        }
        let reserve = &mut *self.reserve;
        reserve.stable = reserve.len;
        if area.table > 0 {
            let first = reserve.table_offset >> bits;
            let count = (reserve.table.len() as u64 * 8).div_ceil(1 << bits);
            reserve.drops.push(Run { first, count });
            self.metadata.remove(first..first + count);
            reserve.table.resize(((area.table << bits) / 8) as usize, 0);
            reserve.table_offset = (area.first + area.blocks) << bits;
        }
        for block in 0..area.blocks {
            reserve.table[(area.index + block) as usize] = (area.first + block) << bits;
        }
        self.metadata.add(area.first..area.first + area.tables());
        if area.run > 0 {
            let first = area.first + area.tables();
            reserve.at_hand.put_last(Run { first, count: area.run });
        }
        if area.fresh {
            // What was passed over is as free as a hole.
            if reserve.holes == reserve.end && reserve.end == area.first {
                reserve.holes = area.end();
            }
            reserve.move_end(area.end());
        }
        self.next(cx)
    }

    fn grow_exactly(&mut self, cx: &mut Cx<'_>) -> Outcome {
        self.reserve.grown = self.reserve.len;
        let len = match self.reserve.phase {
            Phase::Blocks(area) => Some(area.end() << self.image.geometry.cluster_bits()),
            Phase::Idle | Phase::Drop | Phase::Raise | Phase::Count { .. } => self.wanted_len(1),
        };
        match len.filter(|&len| len > self.reserve.grown) {
            Some(len) => self.grow(len, true, cx),
            None => self.grown(cx),
        }
    }

    /// The header may name the new table, or the table the new blocks: they are as good as what was there, and are
    /// left alone.
    fn link_failed(&mut self, errno: Errno, cx: &mut Cx<'_>) -> Outcome {
        if let Phase::Blocks(area) = self.reserve.phase
            && area.fresh
            && !mutant!("qcow2_failed_link_is_cut")
        {
            self.reserve.move_end(area.end());
        }
        self.counting_failed(errno, cx)
    }

    /// What the piece is on disk, nobody knows. It is written again if it counts what is in use; what
    /// was to be counted down is leaked.
    fn counting_failed(&mut self, errno: Errno, cx: &mut Cx<'_>) -> Outcome {
        if !self.reserve.uncounted || mutant!("qcow2_failed_count_forgotten") {
            self.forget_pieces();
            self.reserve.piece_dirty = false;
            self.reserve.uncounted = false;
        }
        self.done(Err(errno), cx)
    }

    fn done(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Outcome {
        let reserve = &mut *self.reserve;
        if reserve.wanted && result.is_ok() {
            reserve.batch = (2 * reserve.batch).min(reserve.options.reserve_max).max(1);
        }
        reserve.phase = Phase::Idle;
        (reserve.running, reserve.wanted, reserve.wants_long_run) = (false, false, false);
        reserve.result = result;
        if let Err(errno) = result {
            reserve.attempts.failed(errno);
        }
        if result.is_ok() || !mutant!("qcow2_no_space_wakes_nobody") {
            cx.wake_all(&mut reserve.waiters);
        }
        cx.wake_all(&mut reserve.counting);
        cx.wake_all(&mut reserve.settler);
        Outcome::Done(result)
    }
}

/// Clusters that wait to be counted again, about.
const RAISES_MAX: usize = 512;

/// Offsets are signed 64-bit numbers to the system, and an entry has 56 bits for one.
const LEN_MAX: u64 = 1 << 55;

#[cfg(test)]
mod tests {
    use super::{AtHand, Run};

    fn at_hand() -> AtHand {
        AtHand { fresh: Vec::new(), used: Vec::new(), total: 0 }
    }

    #[test]
    fn used_clusters_go_before_fresh_ones_and_each_goes_once() {
        let mut at_hand = at_hand();
        for cluster in [10, 11, 20] {
            at_hand.put(cluster, true);
        }
        for cluster in [3, 5, 6] {
            at_hand.put(cluster, false);
        }
        at_hand.give_back(Run { first: 1, count: 1 });
        at_hand.put_last(Run { first: 30, count: 2 });
        assert_eq!(at_hand.total, 9);
        let mut taken = Vec::new();
        while let Some((run, is_zeros)) = at_hand.take(2) {
            taken.push((run.first, run.count, is_zeros));
        }
        let used = [(1, 1, false), (5, 2, false), (3, 1, false), (30, 2, false)];
        assert_eq!(taken, [&used[..], &[(10, 2, true), (20, 1, true)]].concat());
        assert_eq!(at_hand.total, 0);
    }

    #[test]
    fn a_run_is_taken_off_the_end_of_a_longer_one() {
        let mut at_hand = at_hand();
        for cluster in 10..14 {
            at_hand.put(cluster, true);
        }
        assert_eq!(at_hand.take_contiguous(4), None);
        assert_eq!(at_hand.take_contiguous(3), Some(11));
        assert_eq!(
            (at_hand.total, at_hand.take(9)),
            (1, Some((Run { first: 10, count: 1 }, true)))
        );
    }

    #[test]
    fn all_of_it_can_be_counted_down() {
        let mut at_hand = at_hand();
        at_hand.put(10, true);
        at_hand.give_back(Run { first: 3, count: 2 });
        let all: Vec<Run> = at_hand.take_all().collect();
        assert_eq!(all.iter().map(|run| run.count).sum::<u64>(), 3);
        assert_eq!((at_hand.total, at_hand.take(1)), (0, None));
    }
}
