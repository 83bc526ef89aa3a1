//! Looking up a guest range, and the pieces that need no allocation.
//!
//! A request that one slice of an L2 table does not map, or whose pieces lack different things, is
//! cut: every such piece becomes a request of its own, and the one that issued them waits for all
//! of them, joined. So missing slices are loaded, clusters inflated and allocations made side by
//! side, however many there are; what is mapped goes out as plain ops from the same step.

use cowbell_engine::mem::Memory;
use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind, Segs, Target};
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::{Cx, Io, IoKind, Step};
use cowbell_engine::units::{Errno, GuestOffset, HostOffset, align_down};

use crate::parts::backing;
use crate::qcow2::disk::layout::{L1Entry, L2Entry, Mapping};
use crate::qcow2::run::{PIECES, Qcow2, State};

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
enum Found {
    /// The table slice is not in memory.
    NotLoaded,
    /// It is on its way into this slot.
    Loading { slot: usize },
    /// There is no L2 table: unallocated up to `end`.
    NoTable { l1_index: u32, end: u64 },
    /// All is of one kind.
    Run(Run),
    /// A table says something impossible.
    Invalid,
}

/// How far a piece has got.
pub(super) enum Piece {
    /// Done, or on its way, up to here.
    To(u64),
    /// Something must be provided first.
    Lacks,
    /// This step waits for it, or ends the request.
    Step(Step<State>),
}

impl Qcow2 {
    /// Where all of a request's bytes are, if that is known, in one piece and theirs alone: what
    /// most requests come down to.
    #[inline(always)]
    pub(super) fn in_one_piece(&mut self, io: &Io, mem: &Memory) -> Option<u64> {
        let (at, end) = (io.offset, io.end());
        let slot = self.tables.find(self.slice_key(at))?;
        if !self.tables.is_ready(slot) {
            return None;
        }
        let is_write = io.kind != IoKind::Read;
        let Found::Run(run) = self.run_in(slot, at, end, is_write, mem) else { return None };
        let Mapping::Data(host) = run.mapping else { return None };
        let host = host.0 + (at & (self.geometry.cluster_size() - 1));
        let usable = !is_write || run.copied && !self.hits_metadata(host, io.len);
        (run.end == end && usable).then_some(host)
    }

    /// Goes on at `at`.
    pub(super) fn walk(&mut self, mut at: u64, cx: &mut Cx<'_>) -> Step<State> {
        let io = cx.io();
        let end = io.end();
        let is_transfer = matches!(io.kind, IoKind::Read | IoKind::Write { .. });
        let mut issued = false;
        while at < end {
            if issued && cx.room() == 0 {
                return Step::Wait(State::Pieces { at });
            }
            let slice_end = self.slice_end(at);
            if is_transfer && slice_end < end {
                self.delegate(at, slice_end, cx);
                (at, issued) = (slice_end, true);
                continue;
            }
            match self.piece(at, slice_end.min(end), &mut issued, cx) {
                Ok(to) => at = to,
                // Not before what is under way has ended; then it is found again.
                Err(Step::Done(_)) if issued => return Step::Wait(State::Pieces { at }),
                Err(step) => return step,
            }
        }
        match io.kind {
            _ if !issued => self.end(cx),
            IoKind::Write { fua: true } | IoKind::Zero { fua: true, .. } => {
                Step::Wait(State::Pieces { at })
            }
            _ => Step::Last { label: PIECES },
        }
    }

    /// Makes the piece `at..to` of this request a request of its own.
    fn delegate(&mut self, at: u64, to: u64, cx: &mut Cx<'_>) {
        let io = cx.io();
        let seg = cx.guest(at - io.offset, to - at);
        let kind = match io.kind {
            IoKind::Read => OpKind::Read,
            _ => OpKind::Write { fua: false },
        };
        let (target, segs) = (Target::Node(cx.node()), Segs::one(seg));
        cx.issue(Op { kind, target, offset: at, len: to - at, segs });
    }

    /// One piece: where it ends, if it is done or on its way; else the step that waits for what
    /// it lacks.
    fn piece(
        &mut self,
        at: u64,
        end: u64,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Result<u64, Step<State>> {
        let kind = cx.io().kind;
        let found = match self.look_up(at, end, cx) {
            Found::NoTable { end, .. } if self.needs_no_table(at, end, kind) => {
                let mapping = Mapping::Unallocated(None);
                Found::Run(Run { mapping, copied: false, end, slot: None })
            }
            found => found,
        };
        let mut lacking = end;
        if let Found::Run(run) = found {
            match self.in_place(at, end, run, issued, cx) {
                Piece::To(to) => return Ok(to),
                Piece::Step(step) => return Err(step),
                Piece::Lacks => lacking = run.end,
            }
        }
        let is_transfer = matches!(kind, IoKind::Read | IoKind::Write { .. });
        let is_all = lacking == cx.io().end() && !*issued;
        if is_transfer && !is_all && !matches!(found, Found::Invalid) {
            self.delegate(at, lacking, cx);
            *issued = true;
            return Ok(lacking);
        }
        // First what is under way; then this, looked up again.
        Err(if *issued { Step::Wait(State::Pieces { at }) } else { self.provide(at, found, cx) })
    }

    /// Provides what is missing at `at`.
    fn provide(&mut self, at: u64, found: Found, cx: &mut Cx<'_>) -> Step<State> {
        match found {
            Found::Run(Run { mapping: Mapping::Compressed(place), .. })
                if cx.io().kind == IoKind::Read =>
            {
                self.read_compressed(at, place, cx)
            }
            Found::Run(run) => self.allocate(at, run, cx),
            Found::NoTable { l1_index, .. } => self.provide_table(at, l1_index, cx),
            Found::NotLoaded => self.load_slice(at, cx),
            Found::Loading { slot } => {
                cx.park(self.tables.waiters(slot));
                Step::Wait(State::Next { at })
            }
            Found::Invalid => self.invalid_entry(at, cx),
        }
    }

    fn look_up(&mut self, at: u64, end: u64, cx: &mut Cx<'_>) -> Found {
        match self.tables.find(self.slice_key(at)) {
            Some(slot)
                if self.tables.is_ready(slot) || mutant!("qcow2_slice_used_while_loading") =>
            {
                let is_write = cx.io().kind != IoKind::Read;
                self.run_in(slot, at, end, is_write, cx.memory())
            }
            Some(slot) => Found::Loading { slot },
            None => self.look_up_l1(at, end),
        }
    }

    /// What the L1 table says: a slice is in memory only where it names a table.
    fn look_up_l1(&self, at: u64, end: u64) -> Found {
        let l1_index = self.geometry.l1_index(GuestOffset(at));
        let word = self.l1.get(l1_index as usize).copied().unwrap_or(0);
        match L1Entry::decode(word, self.geometry) {
            Err(_) => Found::Invalid,
            Ok(None) => {
                let span_end = (l1_index + 1) << self.geometry.l2_span_bits();
                Found::NoTable { l1_index: l1_index as u32, end: span_end.min(end) }
            }
            Ok(Some(_)) => Found::NotLoaded,
        }
    }

    /// The run that begins at `at`, by the slice in `slot`, which maps all of `at..end` or more;
    /// it ends with the slice. Runs to be written in place are of one flag.
    #[inline(always)]
    fn run_in(&self, slot: usize, at: u64, end: u64, is_write: bool, mem: &Memory) -> Found {
        let geometry = self.geometry;
        let bytes = self.tables.bytes(slot, mem);
        let entry = L2Entry::read(bytes, self.slice_index(at), geometry);
        let Ok(mapping) = entry.mapping(geometry.sub_index(GuestOffset(at)), geometry) else {
            return Found::Invalid;
        };
        let copied = entry.is_copied();
        let run_end = align_down(at, geometry.unit_size()) + geometry.unit_size();
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
        let mut index = self.slice_index(run.end - 1) + 1;
        while run.end < end && index < 1 << self.slice_entry_bits() {
            let here = L2Entry::read(bytes, index, self.geometry);
            let goes_on = if is_write { here == following } else { here.leads_with(following) };
            if !goes_on && !mutant!("qcow2_run_ignores_type") {
                break;
            }
            run.end += self.geometry.cluster_size();
            index += 1;
            match following.following(self.geometry) {
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
        let geometry = self.geometry;
        let cluster_size = geometry.cluster_size();
        let end = end.min(self.slice_end(run.end - 1));
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
            let entry = L2Entry::read(bytes, self.slice_index(run.end), geometry);
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

    /// Does a range without an L2 table do without one? Reads do, and what would only say zeros
    /// where zeros are.
    fn needs_no_table(&self, at: u64, end: u64, kind: IoKind) -> bool {
        match kind {
            IoKind::Read | IoKind::Status { .. } => true,
            IoKind::Zero { .. } => !self.shows_backing(at) && !self.is_raw_external(),
            IoKind::Discard => {
                !self.shows_backing(at)
                    || !self.geometry.has_zero_clusters()
                    || self.whole_clusters(at, end).is_none()
            }
            _ => false,
        }
    }

    /// Would an unallocated unit at `at` show the backing file's contents? Behind the disk's end
    /// nobody looks.
    #[inline]
    pub(super) fn shows_backing(&self, at: u64) -> bool {
        let start = align_down(at, self.geometry.unit_size());
        self.backing.is_some_and(|backing| start < backing.size.min(self.reach))
    }

    /// The whole clusters in `at..end`. The disk's end counts as the end of its last cluster.
    pub(super) fn whole_clusters(&self, at: u64, end: u64) -> Option<(u64, u64)> {
        self.whole(at, end, self.geometry.cluster_size())
    }

    /// The whole units of `size` bytes in `at..end`.
    pub(super) fn whole(&self, at: u64, end: u64, size: u64) -> Option<(u64, u64)> {
        let first = at.checked_next_multiple_of(size)?;
        let last = if end == self.reach { end } else { align_down(end, size) };
        (first < last).then_some((first, last))
    }

    /// Does what needs no allocation for the run that begins at `at`; its slice maps all of
    /// `at..end`.
    fn in_place(
        &mut self,
        at: u64,
        end: u64,
        run: Run,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Piece {
        let io = cx.io();
        let (from, len) = (at - io.offset, run.end - at);
        match (io.kind, run.mapping) {
            (IoKind::Read, Mapping::Data(_)) => return self.transfer(at, end, run, issued, cx),
            (IoKind::Read, Mapping::Zero(_)) => cx.zero_guest(from, len),
            (IoKind::Read, Mapping::Unallocated(_)) => {
                *issued |= backing::read(self.backing, at, run.end, cx)
            }
            (IoKind::Read, Mapping::Compressed(_)) => return Piece::Lacks,
            (IoKind::Write { .. }, Mapping::Data(_)) if run.copied => {
                return self.transfer(at, end, run, issued, cx);
            }
            (IoKind::Write { .. }, _) => return Piece::Lacks,
            (IoKind::Status { .. }, _) => {
                *issued |= self.answer_status(at, run, cx);
                return Piece::To(io.end());
            }
            _ => return self.clear(at, end, run, issued, cx),
        }
        Piece::To(run.end)
    }

    /// Says what the run that begins at `at` is. True: the layer below is asked.
    #[inline(never)]
    fn answer_status(&self, at: u64, run: Run, cx: &mut Cx<'_>) -> bool {
        let inside = at & (self.geometry.cluster_size() - 1);
        let place = |host: HostOffset| (self.data, HostOffset(host.0 + inside));
        let (kind, host) = match run.mapping {
            Mapping::Data(host) => (StatusKind::Data, Some(place(host))),
            Mapping::Zero(host) => (StatusKind::Zero, host.map(place)),
            Mapping::Compressed(_) => (StatusKind::Compressed, None),
            Mapping::Unallocated(_) => return backing::status(self.backing, at, run.end, cx),
        };
        cx.answer_status(kind, run.end - at, host);
        false
    }

    /// Reads or writes the run of data that begins at `at`, and those that follow it in the same
    /// slice: a fragmented range is looked up once.
    fn transfer(
        &mut self,
        mut at: u64,
        end: u64,
        mut run: Run,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Piece {
        let io = cx.io();
        let is_write = io.kind != IoKind::Read;
        while let Mapping::Data(host) = run.mapping {
            let host = host.0 + (at & (self.geometry.cluster_size() - 1));
            let (from, len) = (at - io.offset, run.end - at);
            if !is_write {
                cx.read_guest(self.data, host, from, len);
            } else if !run.copied {
                break;
            } else if self.hits_metadata(host, len) {
                return Piece::Step(self.hit_metadata(host, cx));
            } else {
                cx.write_guest(self.data, host, from, len, false);
            }
            (at, *issued) = (run.end, true);
            let Some(slot) = run.slot.filter(|_| at < end && cx.room() > 0) else { break };
            let Found::Run(next) = self.run_in(slot, at, end, is_write, cx.memory()) else { break };
            run = next;
        }
        Piece::To(at)
    }

    fn load_slice(&mut self, at: u64, cx: &mut Cx<'_>) -> Step<State> {
        let Some(slot) = self.tables.reserve(self.slice_key(at)) else {
            return self.wait_for_slot(at, cx);
        };
        let seg = self.tables.seg(slot, 0, 1 << self.geometry.slice_bits());
        cx.issue(self.read_op(self.slice_offset(at), Segs::one(seg)));
        Step::Wait(State::LoadSlice { at, slot: slot as u32 })
    }

    pub(super) fn slice_loaded(
        &mut self,
        at: u64,
        slot: usize,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        self.tables.load_ended(slot, result.is_ok(), cx);
        match result {
            Ok(()) => self.walk(at, cx),
            Err(errno) => Step::Done(Err(errno)),
        }
    }
}
