//! The reserve: where new clusters come from, and where given-up ones go.
//!
//! A cluster in reserve has a refcount of 1, and nothing refers to it. Requests take from the reserve
//! in memory. A chore refills it before it runs dry, a batch at a time, and is the only one that
//! touches refcounts. They are written so that they are stable when the write ends (FUA). Data may
//! go to a new cluster meanwhile; a table that leads there is not written before
//! ([`Reserve::is_uncounted`]). What a crash leaves in reserve is leaked; a drained engine has counted
//! it down again.
//!
//! Clusters come from, in this order: given-up ones whose only reference is gone (no refcount
//! changes at all); holes, clusters of the file with a refcount of 0; the file's end, grown ahead.
//! What comes from the grown end reads as zeros. The file does not grow while there are holes. Where
//! it cannot grow, as on a device, all there is are holes, whatever was there before.
//!
//! The chore looks at one piece of one refcount block at a time, in memory of its own.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, OpKind, Seg, Segs};
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::Errno;
use cowbell_engine::wait::WaitList;

use crate::parts::attempts::Attempts;
use crate::parts::growth::Grow;
use crate::qcow2::disk::header::{Header, REFTABLE_BYTES_MAX};
use crate::qcow2::disk::layout::{HOST_MAX, Invalid};
use crate::qcow2::rest::open::Opened;
use crate::qcow2::run::close::CloseState;
use crate::qcow2::run::resize::ResizeState;
use crate::qcow2::run::writeback::Free;
use crate::qcow2::run::{Qcow2, Qcow2Options, State};

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
    /// A new refcount block's entry in the refcount table, written.
    Link,
    /// That entry, stable.
    FlushLink,
    /// A longer refcount table, written.
    Table {
        /// Up to this piece.
        from: u32,
    },
    /// The longer refcount table, stable.
    FlushTable,
    /// The header that names it, written.
    Header,
    /// That header, stable.
    FlushHeader,
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
    /// May the file end before them after a crash? Then a fence is owed before a table leads there.
    pub owes: bool,
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

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Reserve {
    /// In reserve, zeros.
    fresh: Vec<Run>,
    /// In reserve, with whatever was there.
    used: Vec<Run>,
    /// Clusters in both.
    total: u64,
    /// Unreferenced on disk, but requests of that epoch may still be using them.
    returned: Vec<(u32, Free)>,
    /// Being given back to the file system; then in reserve.
    discarded: Vec<Run>,
    /// References to be counted down.
    drops: Vec<Run>,
    /// The piece of a block in memory, if any, and whether it is ahead of the disk.
    piece: Option<u64>,
    piece_dirty: bool,
    /// It counts clusters that are in reserve, or have left it, and that is not stable: no table may
    /// lead to them on disk.
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
    /// The length that the file has after any crash; that once the writeback's fence has ended.
    stable: u64,
    fenced: u64,
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
    pub waiters: WaitList,
    /// The writeback that waits for counts.
    counting: WaitList,
    /// The chore that empties the reserve.
    pub settler: WaitList,
    result: Result<(), Errno>,
    options: Qcow2Options,
    cluster_bits: u32,
}

impl Reserve {
    pub fn new(opened: &Opened, can_grow: bool, options: Qcow2Options) -> Reserve {
        let cluster_bits = opened.header.cluster_bits;
        // A file that ends within a cluster: its last bytes may be anything, that cluster is left.
        // A device ends with its last whole cluster.
        let end = match can_grow {
            true => opened.file_len.div_ceil(1 << cluster_bits),
            false => opened.file_len >> cluster_bits,
        };
        // What the lists may need, so that they never grow.
        let with_room = || Vec::with_capacity(options.reserve_max.min(4096) as usize);
        Reserve {
            fresh: with_room(),
            used: with_room(),
            total: 0,
            returned: Vec::with_capacity(options.frees_max),
            discarded: Vec::with_capacity(options.frees_max),
            drops: with_room(),
            piece: None,
            piece_dirty: false,
            uncounted: false,
            table: opened.refcount_table.clone(),
            table_offset: opened.header.refcount_table_offset,
            phase: Phase::Idle,
            holes: 0,
            end,
            rest: end,
            stable: opened.file_len,
            fenced: opened.file_len,
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
            settler: WaitList::new(),
            result: Ok(()),
            options,
            cluster_bits,
        }
    }

    /// Is a cluster in use, or may it be, whose count is not stable?
    pub fn is_uncounted(&self) -> bool {
        self.uncounted && !mutant!("qcow2_reserve_before_stable")
    }

    /// A fence is issued; and it has ended.
    pub fn fence_begins(&mut self) {
        self.fenced = self.len;
    }

    pub fn fence_ended(&mut self) {
        self.stable = self.fenced;
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

    /// Is nothing in reserve?
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// Takes in clusters that nothing refers to on disk any more, stably.
    pub fn take_in(&mut self, freed: impl Iterator<Item = Free>, epoch: u32) {
        self.returned.extend(freed.map(|free| (epoch, free)));
    }

    /// Another free cluster has been counted up.
    fn put(&mut self, cluster: u64, is_zeros: bool) {
        self.total += 1;
        let run = Run { first: cluster, count: 1 };
        // The first in the file are taken first.
        match (is_zeros, self.fresh.first_mut(), self.used.last_mut()) {
            (true, Some(last), _) | (false, _, Some(last)) if last.end() == cluster => {
                last.count += 1;
            }
            (true, ..) => self.fresh.insert(0, run),
            (false, ..) => self.used.push(run),
        }
    }

    /// Takes back clusters that nothing came to refer to.
    pub fn give_back(&mut self, first: u64, count: u64) {
        self.total += count;
        self.used.push(Run { first, count });
    }

    /// Used ones first: they lie within the file, which then stays as short as it can be.
    fn take(&mut self, count: u64) -> Option<Taken> {
        let is_zeros = match mutant!("qcow2_fresh_before_used") {
            true => !self.fresh.is_empty(),
            false => self.used.is_empty(),
        };
        let runs = if is_zeros { &mut self.fresh } else { &mut self.used };
        let run = runs.last_mut()?;
        let count = run.count.min(count);
        let owes = (run.first + count) << self.cluster_bits > self.stable;
        let owes = owes && !mutant!("qcow2_length_not_fenced");
        let taken = Taken { first: run.first, count, is_zeros, owes };
        run.first += taken.count;
        run.count -= taken.count;
        if run.count == 0 {
            runs.pop();
        }
        self.total -= taken.count;
        Some(taken)
    }

    fn is_low(&self) -> bool {
        self.total < self.batch.div_ceil(2)
    }

    /// How the last round went.
    pub fn result(&self) -> Result<(), Errno> {
        self.result
    }

    /// Is nothing left to be counted down, or did that fail?
    pub fn is_settled(&self) -> bool {
        let is_empty = self.total == 0 && self.drops.is_empty() && self.returned.is_empty();
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
        (self.stable, self.fenced) = (self.stable.min(self.len), self.fenced.min(self.len));
    }

    pub fn assert_idle(&self) {
        assert!(!self.running && !self.asked && self.phase == Phase::Idle, "{:?}", self.phase);
        assert!(self.waiters.is_empty() && self.settler.is_empty());
        assert!(!self.piece_dirty || self.uncounted);
    }
}

impl Qcow2 {
    /// Up to `count` clusters, one after the other, for the request at `at`, or the step that
    /// waits for them.
    pub(super) fn take_clusters(
        &mut self,
        count: u64,
        at: u64,
        cx: &mut Cx<'_>,
    ) -> Result<Taken, Step<State>> {
        if self.corrupt.are_counts() {
            return Err(Step::Done(Err(Errno::IO)));
        }
        if let Some(taken) = self.reserve.take(count) {
            if self.reserve.is_low() {
                self.ask_for_reserve(cx);
            }
            return Ok(taken);
        }
        self.reserve.wanted = true;
        self.ask_for_reserve(cx);
        cx.park(&mut self.reserve.waiters);
        Err(Step::Wait(State::Space { at, attempt: self.reserve.attempts.latest() }))
    }

    fn ask_for_reserve(&mut self, cx: &mut Cx<'_>) {
        let reserve = &mut self.reserve;
        if !reserve.running && !reserve.asked {
            reserve.asked = true;
            reserve.attempts.begin();
            cx.ask();
        }
    }

    /// A writeback waits for the counts of what is in use: parks it.
    pub(super) fn park_for_counts(&mut self, cx: &mut Cx<'_>) {
        self.ask_for_reserve(cx);
        cx.park(&mut self.reserve.counting);
    }

    /// A writeback has ended: was something given up?
    pub(super) fn reserve_if_low(&mut self, cx: &mut Cx<'_>) {
        if !self.reserve.returned.is_empty() {
            self.ask_for_reserve(cx);
        }
    }

    /// `count` clusters, one after the other, for a longer L1 table; their first, or the step that
    /// waits for them.
    pub(super) fn take_contiguous(
        &mut self,
        count: u64,
        cx: &mut Cx<'_>,
    ) -> Result<u64, Step<State>> {
        if self.corrupt.are_counts() {
            return Err(Step::Done(Err(Errno::IO)));
        }
        let reserve = &mut self.reserve;
        for runs in [&mut reserve.used, &mut reserve.fresh] {
            if let Some(run) = runs.iter_mut().find(|run| run.count > count) {
                run.count -= count;
                reserve.total -= count;
                return Ok(run.end());
            }
        }
        if count < 1 << (self.geometry.slice_bits() + 2 - self.geometry.refcount_order()) {
            reserve.batch = reserve.batch.max(2 * count + reserve.total);
        } else {
            reserve.wanted_run = Some(count + 1);
        }
        (reserve.wanted, reserve.wants_long_run) = (true, true);
        self.ask_for_reserve(cx);
        cx.park(&mut self.reserve.waiters);
        Err(Step::Wait(State::Resize(ResizeState::Space {
            attempt: self.reserve.attempts.latest(),
        })))
    }

    /// Chore: has everything that is in reserve counted down.
    pub(super) fn empty_reserve(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if !std::mem::replace(&mut self.reserve.settling, true) {
            self.reserve.rest = self.reserve.end;
        }
        self.ask_for_reserve(cx);
        cx.park(&mut self.reserve.settler);
        Step::Wait(State::Close(CloseState::EmptyReserve))
    }

    /// How that went.
    pub(super) fn reserve_emptied(&mut self) -> Result<(), Errno> {
        self.reserve.settling = false;
        self.reserve.batch =
            self.reserve.options.reserve_min.min(self.reserve.options.reserve_max).max(1);
        self.reserve.result
    }

    pub(super) fn step_reserve(
        &mut self,
        state: ReserveState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match (state, event) {
            // That failed before, and the writeback waits for it.
            (ReserveState::Turn, Event::Start) if self.reserve.uncounted => self.write_piece(cx),
            (ReserveState::Turn, Event::Start) => self.begin_reserve_if_sure(cx),
            (ReserveState::Turn, Event::Woken) if self.writeback.result().is_err() => {
                self.reserve_done(self.writeback.result(), cx)
            }
            (ReserveState::Swept, Event::Woken) if self.writeback.result().is_err() => {
                self.reserve_done(self.writeback.result(), cx)
            }
            (ReserveState::Turn, Event::Woken)
            | (ReserveState::Past | ReserveState::Swept, Event::Woken) => self.begin_reserve(cx),
            (ReserveState::Discard, Event::Io(_)) => self.discarded(cx),
            (ReserveState::Grow { .. }, Event::Io(_)) if mutant!("qcow2_failed_growth_is_done") => {
                self.grown(cx)
            }
            (state, Event::Io(Err(errno))) => self.reserve_op_failed(state, errno, cx),
            (ReserveState::Load, Event::Io(_)) => self.piece_loaded(cx),
            (ReserveState::Grow { .. }, Event::Io(_)) => self.grown(cx),
            (ReserveState::Write, Event::Io(_)) => self.piece_written(cx),
            (ReserveState::Table { from }, Event::Io(_)) => self.write_area(from, cx),
            (ReserveState::FlushTable, Event::Io(_)) => self.link_area(cx),
            (ReserveState::Link, Event::Io(_)) => {
                self.flush_files(cx);
                Step::Wait(State::Reserve(ReserveState::FlushLink))
            }
            (ReserveState::Header, Event::Woken) => self.link_area(cx),
            (ReserveState::Header, Event::Io(_)) => {
                self.flush_files(cx);
                Step::Wait(State::Reserve(ReserveState::FlushHeader))
            }
            (ReserveState::FlushLink | ReserveState::FlushHeader, Event::Io(_)) => {
                self.area_linked(cx)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// What it is to count is the header's to say: it waits until that is known.
    fn begin_reserve_if_sure(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.header.is_doubted() {
            self.park_for_writeback(cx);
            return Step::Wait(State::Reserve(ReserveState::Turn));
        }
        self.begin_reserve(cx)
    }

    fn begin_reserve(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match self.sort_returned(cx) {
            true => Step::Wait(State::Reserve(ReserveState::Discard)),
            false => self.reserve_next(cx),
        }
    }

    /// Sorts what was given up: into the reserve, or to be counted down. Answers whether some of it
    /// is being given back to the file system.
    fn sort_returned(&mut self, cx: &mut Cx<'_>) -> bool {
        let bits = self.geometry.cluster_bits();
        let mut issued = false;
        let mut returned = std::mem::take(&mut self.reserve.returned);
        returned.retain(|&(epoch, free)| {
            if !cx.is_past(epoch) && !mutant!("qcow2_reused_while_in_use") {
                return true;
            }
            let run = Run { first: free.first, count: free.count };
            let reserve = &mut self.reserve;
            let fits =
                reserve.total + run.count <= reserve.options.reserve_max && !reserve.settling;
            if free.discard && cx.room() > 0 {
                let (from, len) = (run.first << bits, run.count << bits);
                cx.issue(Op::bare(OpKind::Discard, self.data, from, len));
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
    fn discarded(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        while let Some(run) = self.reserve.discarded.pop() {
            self.reserve.give_back(run.first, run.count);
        }
        self.reserve_next(cx)
    }

    /// The next thing to do.
    fn reserve_next(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let reserve = &mut self.reserve;
        reserve.phase = Phase::Idle;
        if reserve.settling {
            let all = reserve.fresh.drain(..).chain(reserve.used.drain(..));
            reserve.drops.extend(all);
            reserve.total = 0;
        }
        // From the back, so that a settled file ends where its last cluster does.
        reserve.drops.sort_unstable_by_key(|run| std::cmp::Reverse(run.first));
        if let Some(drop) = reserve.drops.first().copied() {
            reserve.phase = Phase::Drop;
            return self.look_at(drop.first, cx);
        }
        if self.corrupt.are_counts() {
            return self.reserve_done(Err(Errno::IO), cx);
        }
        if reserve.total > 0 && reserve.wanted {
            cx.wake_all(&mut reserve.waiters);
        }
        if let Some(run) = reserve.wanted_run.take() {
            return self.make_run(run, cx);
        }
        if reserve.settling || !(reserve.wanted || reserve.is_low()) {
            return self.reserve_done(Ok(()), cx);
        }
        self.count_holes(cx)
    }

    /// Bits of a cluster's number that say where in its piece of a block its refcount is.
    fn piece_bits(&self) -> u32 {
        self.geometry.slice_bits() + 3 - self.geometry.refcount_order()
    }

    /// Where the refcount of `cluster` is: the offset of its piece of a block, if it has one.
    fn piece_offset(&self, cluster: u64) -> Result<Option<u64>, Invalid> {
        let index = cluster >> self.geometry.block_bits();
        let block = self.reserve.table.get(index as usize).copied().unwrap_or(0);
        if block == 0 {
            return Ok(None);
        }
        if !self.geometry.is_aligned(block) || block >= HOST_MAX {
            return Err(Invalid);
        }
        let inside = cluster & ((1 << self.geometry.block_bits()) - 1);
        Ok(Some(block + ((inside >> self.piece_bits()) << self.geometry.slice_bits())))
    }

    fn counts_seg(&self) -> Seg {
        let len = 1 << self.geometry.slice_bits();
        Seg { base: Base::Region(self.regions.counts), off: 0, len }
    }

    /// Gets the piece that counts `cluster` into memory, and goes on with it.
    fn look_at(&mut self, cluster: u64, cx: &mut Cx<'_>) -> Step<State> {
        let piece = cluster >> self.piece_bits();
        if self.reserve.piece == Some(piece) {
            return self.piece_loaded(cx);
        }
        debug_assert!(!self.reserve.piece_dirty, "a changed piece is written before it goes");
        let offset = match self.piece_offset(cluster) {
            Ok(Some(offset)) => offset,
            Ok(None) => return self.no_block(cluster, cx),
            Err(Invalid) => return self.stop_counting("refcount block is misplaced", cluster, cx),
        };
        self.reserve.piece = Some(piece);
        cx.issue(self.read_op(offset, Segs::one(self.counts_seg())));
        Step::Wait(State::Reserve(ReserveState::Load))
    }

    /// The refcount table's entry for `cluster` cannot be right.
    fn stop_counting(&mut self, what: &'static str, cluster: u64, cx: &mut Cx<'_>) -> Step<State> {
        let index = cluster >> self.geometry.block_bits();
        self.counts_are_wrong(what, self.reserve.table_offset + index * 8, cx);
        self.reserve.drops.clear();
        self.reserve_done(Err(Errno::IO), cx)
    }

    fn piece_loaded(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match self.reserve.phase {
            Phase::Drop => self.count_down(cx),
            Phase::Count { fresh } => self.count_up(fresh, cx),
            phase => panic!("no piece is wanted in {phase:?}"),
        }
    }

    /// Counts down the references in the piece at hand.
    fn count_down(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let (geometry, bits) = (self.geometry, self.piece_bits());
        let piece = self.reserve.piece.expect("it was loaded");
        let (from, to) = (piece << bits, (piece + 1) << bits);
        let bytes = cx.mem().region_mut(self.regions.counts);
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
            let at = cluster << self.geometry.cluster_bits();
            self.counts_are_wrong("cluster in use has refcount 0", at, cx);
        }
        self.write_piece(cx)
    }

    fn write_piece(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        self.reserve.piece_dirty = true;
        let piece = self.reserve.piece.expect("it was changed");
        let offset = self.piece_offset(piece << self.piece_bits()).ok().flatten();
        let offset = offset.expect("it was loaded from there");
        let kind = OpKind::Write { fua: self.reserve.uncounted };
        // The writeback that waits for it asks whether it failed, not whether one before did.
        self.reserve.result = Ok(());
        cx.issue(Op { kind, ..Op::write(self.file, offset, Segs::one(self.counts_seg())) });
        Step::Wait(State::Reserve(ReserveState::Write))
    }

    /// Counts are on disk, stably if there are new ones among them.
    fn piece_written(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        self.reserve.piece_dirty = false;
        if std::mem::take(&mut self.reserve.uncounted) {
            cx.wake_all(&mut self.reserve.counting);
        }
        match self.reserve.phase {
            Phase::Count { .. } if self.reserve.is_low() => self.count_holes(cx),
            Phase::Count { .. } => self.reserve_done(Ok(()), cx),
            Phase::Drop => self.reserve_next(cx),
            Phase::Idle | Phase::Blocks(_) => self.begin_reserve_if_sure(cx),
        }
    }

    /// Looks for holes where they were not looked for yet; then takes from the file's end.
    fn count_holes(&mut self, cx: &mut Cx<'_>) -> Step<State> {
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
    fn out_of_space(&mut self, errno: Errno, cx: &mut Cx<'_>) -> Step<State> {
        let reserve = &mut self.reserve;
        if !reserve.wanted || reserve.total > 0 && !reserve.wants_long_run {
            return self.reserve_done(Ok(()), cx);
        }
        if !reserve.returned.is_empty() {
            if reserve.returned.iter().any(|&(epoch, _)| cx.is_past(epoch)) {
                return self.begin_reserve(cx);
            }
            cx.park_until_past();
            return Step::Wait(State::Reserve(ReserveState::Past));
        }
        if self.writeback.has_frees() && !mutant!("qcow2_given_up_forgotten_when_full") {
            self.park_for_writeback(cx);
            return Step::Wait(State::Reserve(ReserveState::Swept));
        }
        self.reserve_done(Err(errno), cx)
    }

    /// The file's length with `count` more clusters; `None` if that is too long.
    fn wanted_len(&self, count: u64) -> Option<u64> {
        let bits = self.geometry.cluster_bits();
        let end = self.reserve.end.checked_add(count).filter(|&end| end <= self.clusters_max());
        end.map(|end| end << bits)
    }

    /// The most clusters that a file can have.
    fn clusters_max(&self) -> u64 {
        LEN_MAX >> self.geometry.cluster_bits()
    }

    /// Makes the file `len` bytes long, or longer.
    fn grow(&mut self, len: u64, exact: bool, cx: &mut Cx<'_>) -> Step<State> {
        let reserve = &mut self.reserve;
        let growth = reserve.options.growth;
        let ahead = match growth.by {
            Grow::Write => 0,
            _ if exact => 0,
            _ => reserve.grown.clamp(growth.step_min, growth.step_max),
        };
        let to = len.saturating_add(ahead).min(LEN_MAX).max(len);
        let op = match growth.by {
            Grow::Allocate => {
                Op::bare(OpKind::Allocate, self.file, reserve.grown, to - reserve.grown)
            }
            _ => Op::bare(OpKind::Truncate, self.file, to, 0),
        };
        reserve.grown = to;
        cx.issue(op);
        Step::Wait(State::Reserve(ReserveState::Grow { exact: exact || ahead == 0 }))
    }

    /// The file is long enough: count clusters of its end.
    fn grown(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        self.reserve.len = self.reserve.grown;
        match self.reserve.phase {
            Phase::Blocks(_) => self.write_area(0, cx),
            _ => self.look_at(self.reserve.end, cx),
        }
    }

    /// Counts up what is free in the piece at hand.
    fn count_up(&mut self, fresh: bool, cx: &mut Cx<'_>) -> Step<State> {
        let (geometry, bits) = (self.geometry, self.piece_bits());
        let piece = self.reserve.piece.expect("it was loaded");
        let (from, to) = (piece << bits, (piece + 1) << bits);
        let (at, to) = match fresh {
            true => (self.reserve.end, to.min(self.reserve.grown >> geometry.cluster_bits())),
            false => (self.reserve.holes.max(from), to.min(self.reserve.end)),
        };
        let bytes = cx.mem().region_mut(self.regions.counts);
        let wanted = self.reserve.batch;
        let is_zeros = fresh || !self.reserve.can_grow && mutant!("qcow2_device_is_zeros");
        let (mut found, mut next) = (0, at);
        let mut metadata = self.metadata.range(at..to.max(at)).peekable();
        let mut uncounted = None;
        while next < to && found < wanted {
            let (cluster, index) = (next, (next - from) as usize);
            let is_metadata = metadata.next_if_eq(&&cluster).is_some();
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
            self.reserve.put(cluster, is_zeros);
        }
        if fresh {
            // Holes that were not looked at yet are still to be.
            if self.reserve.holes == self.reserve.end {
                self.reserve.holes = next;
            }
            self.reserve.end = next;
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
    fn no_block(&mut self, cluster: u64, cx: &mut Cx<'_>) -> Step<State> {
        let block_bits = self.geometry.block_bits();
        let index = cluster >> block_bits;
        if self.reserve.phase == Phase::Drop {
            return self.stop_counting("no refcount block for a cluster in use", cluster, cx);
        }
        if self.reserve.phase == (Phase::Count { fresh: true }) {
            return self.make_area(self.area(self.reserve.end, index, true, 0), cx);
        }
        // What nothing counts is free, in a sound image.
        let area = self.area(index << block_bits, index, false, 0);
        match area.filter(|area| area.end() <= self.reserve.end) {
            Some(area) if self.metadata.range(area.first..area.end()).next().is_some() => {
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
    fn make_run(&mut self, run: u64, cx: &mut Cx<'_>) -> Step<State> {
        let block_bits = self.geometry.block_bits();
        let blocks = self.reserve.table.iter().rposition(|&block| block != 0);
        let counted = blocks.map_or(0, |last| (last as u64 + 1) << block_bits);
        if self.reserve.can_grow {
            let first = counted.max(self.reserve.end);
            return self.make_area(self.area(first, first >> block_bits, true, run), cx);
        }
        let area = self.area(counted, counted >> block_bits, false, run);
        match area.filter(|area| area.end() <= self.reserve.end) {
            Some(area) => self.make_area(Some(area), cx),
            None => self.reserve_done(Err(Errno::NO_SPACE), cx),
        }
    }

    fn make_area(&mut self, area: Option<Area>, cx: &mut Cx<'_>) -> Step<State> {
        let Some(area) = area.filter(|area| area.end() <= self.clusters_max()) else {
            return self.out_of_space(Errno::TOO_BIG, cx);
        };
        self.reserve.phase = Phase::Blocks(area);
        let end = area.end() << self.geometry.cluster_bits();
        if end > self.reserve.grown && area.fresh {
            return self.grow(end, false, cx);
        }
        self.write_area(0, cx)
    }

    /// The blocks, and the table, that make entry `index` of the refcount table possible, and a run
    /// of `run` clusters. Where there is one, there are several blocks: all are linked at once, with
    /// a table.
    fn area(&self, first: u64, index: u64, fresh: bool, run: u64) -> Option<Area> {
        let (block_bits, cluster_bits) = (self.geometry.block_bits(), self.geometry.cluster_bits());
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
    fn write_area(&mut self, from: u32, cx: &mut Cx<'_>) -> Step<State> {
        let Phase::Blocks(area) = self.reserve.phase else { panic!("{:?}", self.reserve.phase) };
        let (bits, slice_bits) = (self.geometry.cluster_bits(), self.geometry.slice_bits());
        let pieces = area.tables() << (bits - slice_bits);
        self.reserve.piece = None;
        for i in u64::from(from)..pieces {
            let bytes = cx.mem().region_mut(self.regions.counts);
            bytes.fill(0);
            self.fill_area(area, i, bytes);
            if area.fresh && bytes.iter().all(|&byte| byte == 0) {
                continue;
            }
            let offset = (area.first << bits) + (i << slice_bits);
            cx.issue(Op::write(self.file, offset, Segs::one(self.counts_seg())));
            return Step::Wait(State::Reserve(ReserveState::Table { from: i as u32 + 1 }));
        }
        if mutant!("qcow2_block_linked_unstable") {
            return self.link_area(cx);
        }
        self.flush_files(cx);
        Step::Wait(State::Reserve(ReserveState::FlushTable))
    }

    /// What piece `i` of the area holds.
    fn fill_area(&self, area: Area, i: u64, bytes: &mut [u8]) {
        let geometry = self.geometry;
        let per_cluster = geometry.cluster_bits() - geometry.slice_bits();
        let blocks = area.blocks << per_cluster;
        if i < blocks {
            let from = (area.index << geometry.block_bits()) + (i << self.piece_bits());
            let to = from + (1 << self.piece_bits());
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
                Some(block) => (area.first + block) << self.geometry.cluster_bits(),
                None => self.reserve.table.get(first + i).copied().unwrap_or(0),
            };
            *word = entry.to_be_bytes();
        }
    }

    /// The area is stable: the refcount table, or the header, may lead to it.
    fn link_area(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let Phase::Blocks(area) = self.reserve.phase else { panic!("{:?}", self.reserve.phase) };
        if area.table > 0 {
            let clusters = area.table as u32;
            let offset = (area.first + area.blocks) << self.geometry.cluster_bits();
            let change = |header: &mut Header| {
                header.refcount_table_offset = offset;
                header.refcount_table_clusters = clusters;
            };
            return self.change_header(State::Reserve(ReserveState::Header), change, cx);
        }
        let entry_bits = self.geometry.slice_bits() - 3;
        let first = area.index >> entry_bits << entry_bits;
        self.fill_table(area, first as usize, cx.mem().region_mut(self.regions.counts));
        let offset = self.reserve.table_offset + first * 8;
        cx.issue(Op::write(self.file, offset, Segs::one(self.counts_seg())));
        Step::Wait(State::Reserve(ReserveState::Link))
    }

    /// The area is part of the image.
    pub(super) fn area_linked(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let Phase::Blocks(area) = self.reserve.phase else { panic!("{:?}", self.reserve.phase) };
        let bits = self.geometry.cluster_bits();
        if area.table > 0 {
            self.header_changed(Ok(()), cx);
        }
        let reserve = &mut self.reserve;
        reserve.stable = reserve.len;
        if area.table > 0 {
            let first = reserve.table_offset >> bits;
            let count = (reserve.table.len() as u64 * 8).div_ceil(1 << bits);
            reserve.drops.push(Run { first, count });
            (first..first + count).for_each(|cluster| {
                self.metadata.remove(&cluster);
            });
            reserve.table.resize(((area.table << bits) / 8) as usize, 0);
            reserve.table_offset = (area.first + area.blocks) << bits;
        }
        for block in 0..area.blocks {
            reserve.table[(area.index + block) as usize] = (area.first + block) << bits;
        }
        self.metadata.extend(area.first..area.first + area.tables());
        if area.run > 0 {
            let first = area.first + area.tables();
            // The last to be taken from.
            reserve.used.insert(0, Run { first, count: area.run });
            reserve.total += area.run;
        }
        if area.fresh {
            // What was passed over is as free as a hole.
            if reserve.holes == reserve.end && reserve.end == area.first {
                reserve.holes = area.end();
            }
            reserve.end = area.end();
        }
        self.reserve_next(cx)
    }

    fn reserve_op_failed(
        &mut self,
        state: ReserveState,
        errno: Errno,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match state {
            // Not that far: then just as far as is needed.
            ReserveState::Grow { exact: false } => {
                self.reserve.grown = self.reserve.len;
                let bits = self.geometry.cluster_bits();
                let len = match self.reserve.phase {
                    Phase::Blocks(area) => Some(area.end() << bits),
                    _ => self.wanted_len(1),
                };
                match len.filter(|&len| len > self.reserve.grown) {
                    Some(len) => self.grow(len, true, cx),
                    None => self.grown(cx),
                }
            }
            state => {
                if matches!(state, ReserveState::Grow { .. }) {
                    self.reserve.grown = self.reserve.len;
                    self.reserve.can_grow &= !mutant!("qcow2_never_grows_after_a_failure");
                    return self.out_of_space(errno, cx);
                }
                if let (Phase::Blocks(area), true) = (self.reserve.phase, names_table(state)) {
                    // The header may name the new table, which is as good as the old one: it is
                    // left alone.
                    self.header_changed(Err(errno), cx);
                    if area.fresh {
                        self.reserve.end = area.end();
                    }
                }
                // What the piece is on disk, nobody knows. It is written again if it counts what is in
                // use; what was to be counted down is leaked.
                if !self.reserve.uncounted || mutant!("qcow2_failed_count_forgotten") {
                    self.reserve.piece = None;
                    self.reserve.piece_dirty = false;
                    self.reserve.uncounted = false;
                }
                self.reserve_done(Err(errno), cx)
            }
        }
    }

    fn reserve_done(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<State> {
        let reserve = &mut self.reserve;
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
        Step::Done(result)
    }
}

/// Is the header being written?
fn names_table(state: ReserveState) -> bool {
    matches!(state, ReserveState::Header | ReserveState::FlushHeader)
}

/// Offsets are signed 64-bit numbers to the system, and an entry has 56 bits for one.
const LEN_MAX: u64 = 1 << 55;
