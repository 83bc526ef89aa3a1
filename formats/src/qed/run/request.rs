//! What a guest's request does: its range is looked up, and done piece by piece.
//!
//! One step issues the ops of as many pieces as it can, joined: a fragmented request costs one
//! round trip, not one per fragment. It stops where something is missing (a table slice, a
//! mapping), waits for what it has issued, and looks again.

use cowbell_engine::mem::Memory;
use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::{Cx, Event, Io, IoKind, Step};
use cowbell_engine::units::{Errno, FileId, HostOffset};
use cowbell_engine::wait::On;

use crate::parts::backing::{self, Backing};
use crate::parts::claims::Claims;
use crate::parts::cow::CowState;
use crate::parts::growth::{FILE_MAX, Space};
use crate::parts::writeback::{Writeback, WritebackState};
use crate::qed::disk::layout::{Bounds, Entry, Geometry};
use crate::qed::rest::open::Opened;
use crate::qed::run::allocate::{AllocateState, AllocateStep, Claim, Piece, Progress};
use crate::qed::run::changes::TableChanges;
use crate::qed::run::image::{Disk, FLUSH, Image, QedOptions, Regions};
use crate::qed::run::live_header::LiveHeader;
use crate::qed::run::tables::{Found, Tables};

/// An opened QED image: all of its state. Each of its components keeps its own, and is changed by
/// its own file alone.
#[derive(Clone, Hash, Debug)]
pub struct Qed {
    pub(super) image: Image,
    pub(super) disk: Disk,
    pub(super) tables: Tables,
    /// What is being allocated.
    pub(super) claims: Claims<Claim>,
    pub(super) space: Space,
    pub(super) header: LiveHeader,
    pub(super) writeback: Writeback,
}

/// A request's state, named by what it awaits. `at` is the first byte of the guest range not yet
/// done.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RequestState {
    /// Nothing, or whatever it was parked on: look up what is at `at`.
    Next { at: u64 },
    /// As `Next`, for space that attempt number `attempt` to grow the file was to give.
    Space { at: u64, attempt: u32 },
    /// As `Next`, for room in memory that writeback number `attempt` was to make.
    Room { at: u64, attempt: u32 },
    /// The ops of mapped pieces, up to `at`.
    Pieces { at: u64 },
    /// A table slice on its way into `slot`.
    LoadSlice { at: u64, slot: u32 },
    /// The header with the need-check mark, stable.
    WriteMark { at: u64 },
    /// A piece, written to new clusters.
    Allocate(AllocateState),
    /// A writeback that began after the request came, or a flush.
    Flush(WritebackState),
}

/// The label of data ops that are all that is left to do.
pub(super) const PIECES: u8 = 3;

impl RequestState {
    /// Where its name is in the list of the driver's states.
    #[inline]
    pub(super) fn label(&self) -> usize {
        match self {
            RequestState::Next { .. } => 0,
            RequestState::Space { .. } => 1,
            RequestState::Room { .. } => 2,
            RequestState::Pieces { .. } => PIECES.into(),
            RequestState::LoadSlice { .. } => 4,
            RequestState::WriteMark { .. } => 5,
            RequestState::Allocate(state) => match state {
                AllocateState::Cow { state: CowState::Bufs, .. } => 6,
                AllocateState::Cow { state: CowState::Read, .. } => 7,
                AllocateState::Cow {
                    state: CowState::CopyRead { .. } | CowState::CopyWrite { .. },
                    ..
                } => 8,
                AllocateState::WriteData { .. } => 9,
            },
            RequestState::Flush(_) => FLUSH.into(),
        }
    }
}

impl Qed {
    /// The image that `opened` describes, in `file`.
    pub fn new(
        file: FileId,
        opened: Opened,
        writable: bool,
        backing: Option<Backing>,
        regions: Regions,
        options: QedOptions,
    ) -> Qed {
        let geometry = opened.geometry();
        let Opened { header, l1, file_len, has_fixed_len, .. } = opened;
        let (header_bytes, l1_offset) = (header.header_bytes(), header.l1_offset);
        let image = Image { file, geometry, writable, header_bytes, l1_offset, regions };
        // Nothing says which clusters of a device are free.
        let max = if has_fixed_len { file_len } else { FILE_MAX };
        Qed {
            image,
            disk: Disk::new(header.image_size, backing, geometry),
            tables: Tables::new(l1, file_len, image.slices_of(header.image_size), image),
            claims: Claims::new(),
            space: Space::new(file_len, geometry.cluster_size(), max, options.growth),
            header: LiveHeader::new(header, options.unmark_after_ms, image),
            writeback: Writeback::new(options.writeback_after_ms),
        }
    }

    /// The clusters' geometry.
    pub fn geometry(&self) -> Geometry {
        self.image.geometry
    }

    /// Panics if something is claimed, pinned, parked or busy. For tests, at rest.
    pub fn assert_idle(&self) {
        self.tables.assert_idle();
        assert!(self.claims.is_empty(), "something is claimed");
        self.space.assert_idle();
        self.header.assert_idle();
        self.writeback.assert_idle();
    }

    /// What an entry may point at now.
    #[inline]
    fn bounds(&self) -> Bounds {
        self.image.bounds(self.space.end())
    }

    #[inline]
    pub(super) fn begin_request(&mut self, cx: &mut Cx<'_>) -> Step<RequestState> {
        let io = cx.io();
        match io.kind {
            IoKind::Flush => self.flush(cx),
            IoKind::Read | IoKind::Status { .. } => self.walk(io.offset, Event::Start, cx),
            _ if !self.image.writable => Step::Done(Err(Errno::READ_ONLY)),
            _ => self.walk(io.offset, Event::Start, cx),
        }
    }

    #[inline]
    pub(super) fn step_request(
        &mut self,
        state: RequestState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<RequestState> {
        match (state, event) {
            (RequestState::Allocate(state), event) => {
                let at = cx.io().offset;
                let progress = self.allocating().run(state, event, cx);
                self.go_on(at, progress, cx)
            }
            (RequestState::Next { at }, Event::Start | Event::Woken) => self.walk(at, event, cx),
            (RequestState::Space { at, attempt }, Event::Woken) => {
                let failure = self.space.failure_of(attempt);
                if failure.is_some() {
                    self.header.allocation_ended(self.claims.is_empty(), cx);
                }
                self.woken(at, failure, cx)
            }
            (RequestState::Room { at, attempt }, Event::Woken) => {
                self.woken(at, self.writeback.failure_of(attempt), cx)
            }
            (RequestState::Pieces { at }, Event::Io(Ok(()))) => self.walk(at, Event::Start, cx),
            (RequestState::Pieces { .. }, Event::Io(error)) => Step::Done(error),
            (RequestState::LoadSlice { at, slot }, Event::Io(result)) => {
                self.tables.loaded(slot as usize, result, cx);
                self.looked_for(at, result, cx)
            }
            (RequestState::WriteMark { at }, Event::Io(result)) => {
                self.header.marked(result, self.claims.is_empty(), cx);
                self.looked_for(at, result, cx)
            }
            (RequestState::Flush(state), event) => {
                let (writeback, mut changes) = self.changes();
                writeback.step(state, event, &mut changes, cx).map(RequestState::Flush)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// What was waited for has been tried. If it failed, then at once: who first waits for something
    /// else would ask for it again, and two requests that take turns would never give up.
    fn woken(&mut self, at: u64, failure: Option<Errno>, cx: &mut Cx<'_>) -> Step<RequestState> {
        match failure {
            Some(errno) => Step::Done(Err(errno)),
            None => self.walk(at, Event::Woken, cx),
        }
    }

    /// What was missing at `at` is there, or could not be had.
    fn looked_for(
        &mut self,
        at: u64,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<RequestState> {
        match result {
            Ok(()) => self.walk(at, Event::Start, cx),
            Err(errno) => Step::Done(Err(errno)),
        }
    }

    /// Goes on as the allocation of a piece says; what is at `at` is what it began with.
    fn go_on(&mut self, at: u64, progress: Progress, cx: &mut Cx<'_>) -> Step<RequestState> {
        match progress {
            Progress::To(to) => self.walk(to, Event::Start, cx),
            Progress::Wait(state) => Step::Wait(RequestState::Allocate(state)),
            Progress::LookAgain => Step::Wait(RequestState::Next { at }),
            Progress::Space(attempt) => Step::Wait(RequestState::Space { at, attempt }),
            Progress::Marking => Step::Wait(RequestState::WriteMark { at }),
            Progress::Failed(errno) => Step::Done(Err(errno)),
        }
    }

    #[inline]
    fn allocating(&mut self) -> AllocateStep<'_> {
        AllocateStep {
            image: &self.image,
            disk: &self.disk,
            claims: &mut self.claims,
            tables: &mut self.tables,
            space: &mut self.space,
            header: &mut self.header,
            writeback: &mut self.writeback,
        }
    }

    /// Who writes changed tables, and what there is to write.
    pub(super) fn changes(&mut self) -> (&mut Writeback, TableChanges<'_>) {
        let changes = TableChanges {
            image: &self.image,
            is_overlay: self.disk.backing().is_some(),
            tables: &mut self.tables,
            space: &mut self.space,
        };
        (&mut self.writeback, changes)
    }

    /// A flush, and the end of a write that is to be stable.
    fn flush(&mut self, cx: &mut Cx<'_>) -> Step<RequestState> {
        let (writeback, mut changes) = self.changes();
        writeback.flush(&mut changes, cx).map(RequestState::Flush)
    }

    /// The whole range is done.
    #[inline]
    fn end(&mut self, cx: &mut Cx<'_>) -> Step<RequestState> {
        match cx.io().kind {
            IoKind::Write { fua: true, .. } | IoKind::Zero { fua: true, .. } => self.flush(cx),
            _ => Step::Done(Ok(())),
        }
    }

    /// Where all of a request's bytes are, if that is known and in one piece: what most requests
    /// come down to.
    #[inline(always)]
    pub(super) fn in_one_piece(&mut self, io: &Io, mem: &Memory) -> Option<HostOffset> {
        let slot = self.tables.slices.find(self.image.slice_key(io.offset))?;
        if !self.tables.slices.is_ready(slot) {
            return None;
        }
        match self.tables.run_in(slot, io.offset, io.end(), self.bounds(), mem) {
            Found::Run { entry: Entry::Data(offset), end, .. } if end == io.end() => {
                let inside = io.offset & (self.image.geometry.cluster_size() - 1);
                Some(HostOffset(offset.0 + inside))
            }
            _ => None,
        }
    }

    /// Goes on at `at`.
    fn walk(&mut self, mut at: u64, event: Event, cx: &mut Cx<'_>) -> Step<RequestState> {
        let end = cx.io().end();
        if at >= end {
            return self.end(cx);
        }
        let mut issued = false;
        while at < end {
            if issued && cx.room() == 0 {
                return Step::Wait(RequestState::Pieces { at });
            }
            at = match self.piece(at, end, event, &mut issued, cx) {
                Ok(at) => at,
                Err(step) => return step,
            };
        }
        self.walked(at, issued, cx)
    }

    /// Everything is done or on its way.
    fn walked(&mut self, at: u64, issued: bool, cx: &mut Cx<'_>) -> Step<RequestState> {
        match cx.io().kind {
            _ if !issued => self.end(cx),
            IoKind::Write { fua: true, .. } | IoKind::Zero { fua: true, .. } => {
                Step::Wait(RequestState::Pieces { at })
            }
            _ => Step::Last { label: PIECES },
        }
    }

    /// One piece: where it ends, if it is done or on its way; else the step that waits for what
    /// it lacks.
    fn piece(
        &mut self,
        at: u64,
        end: u64,
        event: Event,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Result<u64, Step<RequestState>> {
        let bounds = self.bounds();
        let found = match self.tables.look_up(at, end, bounds, cx.memory()) {
            Found::NoTable { end } if self.needs_no_table(at, end, cx) => {
                Found::Run { entry: Entry::Unallocated, end, slot: usize::MAX }
            }
            found => found,
        };
        if let Found::Run { entry, end: run_end, .. } = found
            && let Some(done_to) = self.in_place(at, run_end, entry, event, issued, cx)
        {
            return Ok(done_to);
        }
        // First what is under way; then this, looked up again.
        Err(if *issued {
            Step::Wait(RequestState::Pieces { at })
        } else {
            self.provide(at, found, cx)
        })
    }

    /// Provides what is missing at `at`.
    fn provide(&mut self, at: u64, found: Found, cx: &mut Cx<'_>) -> Step<RequestState> {
        match found {
            Found::Run { entry, end, slot } => {
                let progress = self.allocating().begin(Piece { at, end, entry, slot }, cx);
                self.go_on(at, progress, cx)
            }
            Found::NoTable { .. } => {
                let progress = self.allocating().allocate_table(at, cx);
                self.go_on(at, progress, cx)
            }
            Found::NotLoaded { table } => match self.tables.load(at, table, cx) {
                Some(slot) => Step::Wait(RequestState::LoadSlice { at, slot: slot as u32 }),
                None => {
                    let of_use = self.tables.has_changed_slices();
                    let room = &mut self.tables.slices.full;
                    let attempt = self.writeback.park_for_room(of_use, room, cx);
                    Step::Wait(RequestState::Room { at, attempt })
                }
            },
            Found::Loading { slot } => {
                cx.park(self.tables.slices.waiters(slot), On::Table);
                Step::Wait(RequestState::Next { at })
            }
            // The request fails; others go on.
            Found::Invalid => {
                let (what, place) = self.tables.invalid_entry(at, self.bounds());
                cx.tell_corrupt(what, place);
                Step::Done(Err(Errno::IO))
            }
        }
    }

    /// Does a range without an L2 table do without one? Reads do, and what would only say zeros
    /// where zeros are.
    fn needs_no_table(&self, at: u64, end: u64, cx: &Cx<'_>) -> bool {
        match cx.io().kind {
            IoKind::Read | IoKind::Status { .. } => true,
            IoKind::Zero { .. } => !self.disk.shows_backing(at),
            IoKind::Discard => {
                !self.disk.shows_backing(at) || self.disk.whole_clusters(at, end).is_none()
            }
            _ => false,
        }
    }

    /// Does what needs no allocation for the run `at..run_end`; answers how far it got. `None`:
    /// something must be allocated at `at`.
    fn in_place(
        &mut self,
        at: u64,
        run_end: u64,
        entry: Entry,
        event: Event,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Option<u64> {
        let io = cx.io();
        let (from, len) = (at - io.offset, run_end - at);
        let Entry::Data(offset) = entry else {
            return self.without_data(at, run_end, entry, issued, cx);
        };
        if mutant!("woken_trusts_old_lookup") && event == Event::Woken && io.kind != IoKind::Read {
            return None;
        }
        let host = offset.0 + (at & (self.image.geometry.cluster_size() - 1));
        match io.kind {
            IoKind::Read => cx.read_guest(self.image.file, host, from, len),
            IoKind::Write { .. } => cx.write_guest(self.image.file, host, from, len, false),
            IoKind::Status { .. } => {
                cx.answer_status(StatusKind::Data, len, Some((self.image.file, HostOffset(host))));
                return Some(io.end());
            }
            _ => {
                let Some(op) = self.clear_op(at, run_end, host, cx) else { return Some(run_end) };
                cx.issue(op);
            }
        }
        *issued = true;
        Some(run_end)
    }

    /// The op that zeroes or discards the run `at..run_end`, whose data is at `host`.
    fn clear_op(&self, at: u64, run_end: u64, host: u64, cx: &Cx<'_>) -> Option<Op> {
        if let IoKind::Zero { unmap, .. } = cx.io().kind {
            return Some(Op::bare(OpKind::Zero { unmap }, self.image.file, host, run_end - at));
        }
        let (first, last) = self.disk.whole_clusters(at, run_end)?;
        Some(Op::bare(OpKind::Discard, self.image.file, host + (first - at), last - first))
    }

    /// As `in_place`, for a run without data of its own.
    fn without_data(
        &mut self,
        at: u64,
        run_end: u64,
        entry: Entry,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Option<u64> {
        let io = cx.io();
        match (io.kind, entry) {
            (IoKind::Read, Entry::Zero) => {
                cx.zero_guest(at - io.offset, run_end - at);
                Some(run_end)
            }
            (IoKind::Read, _) => {
                *issued |= backing::read(self.disk.backing(), at, run_end, cx);
                Some(run_end)
            }
            (IoKind::Status { .. }, Entry::Zero) => {
                cx.answer_status(StatusKind::Zero, run_end - at, None);
                Some(io.end())
            }
            (IoKind::Status { .. }, _) => {
                *issued |= backing::status(self.disk.backing(), at, run_end, cx);
                Some(io.end())
            }
            (IoKind::Write { .. }, _) => None,
            (_, Entry::Zero) => Some(run_end),
            // Zero write or discard of an unallocated run.
            _ if !self.disk.shows_backing(at) => Some(run_end),
            (IoKind::Discard, _) => match self.disk.whole_clusters(at, run_end) {
                None => Some(run_end),
                // The cut cluster in front keeps its contents.
                Some((first, _)) if first > at => Some(first),
                Some(_) => None,
            },
            _ => None,
        }
    }
}
