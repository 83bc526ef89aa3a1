//! What a guest's request does: its range is looked up, and done piece by piece.
//!
//! A request that one slice of an L2 table does not map, or whose pieces lack different things, is
//! cut: every such piece becomes a request of its own, and the one that issued them waits for all
//! of them, joined. So missing slices are loaded, clusters inflated and allocations made side by
//! side, however many there are; what is mapped goes out as plain ops from the same step.

use cowbell_engine::mem::Memory;
use cowbell_engine::op::Segs;
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::{Cx, Event, Io, IoKind, Step};
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{Errno, FileId, HostOffset};
use cowbell_engine::wait::On;

use crate::parts::backing::{self, Backing};
use crate::parts::claims::Claims;
use crate::qcow2::disk::layout::{Geometry, Mapping};
use crate::qcow2::rest::open::Opened;
use crate::qcow2::run::corrupt::Corrupt;
use crate::qcow2::run::image::{
    Disk, Image, Qcow2Options, Regions, deflate_depth, inflated_slot_bytes,
};
use crate::qcow2::run::live_header::LiveHeader;
use crate::qcow2::run::metadata::Metadata;
use crate::qcow2::run::packing::Packing;
use crate::qcow2::run::piece::{
    Claim, FLUSH, NewTable, PIECES, Piece, PieceStep, Progress, RequestState,
};
use crate::qcow2::run::reserve::Reserve;
use crate::qcow2::run::resize::Resize;
use crate::qcow2::run::tables::{Found, Run, Tables};
use crate::qcow2::run::writeback::Writeback;

/// An opened qcow2 image: all of its state. Each of its components keeps its own, and is changed by
/// its own file alone.
#[derive(Clone, Hash, Debug)]
pub struct Qcow2 {
    pub(super) image: Image,
    pub(super) disk: Disk,
    pub(super) tables: Tables,
    pub(super) metadata: Metadata,
    pub(super) header: LiveHeader,
    pub(super) corrupt: Corrupt,
    /// What is being allocated.
    claims: Claims<Claim>,
    /// L2 tables that are being provided.
    new_tables: Vec<NewTable>,
    /// Compressed clusters: as on disk and, behind that, as the guest sees them.
    inflated: TableCache,
    /// Compressed clusters that are written.
    pub(super) packing: Packing,
    pub(super) writeback: Writeback,
    pub(super) reserve: Reserve,
    pub(super) resize: Resize,
}

impl Qcow2 {
    /// The image that `opened` describes, in `file`, with its data in `data`. Can it be written to,
    /// and each of the two be made longer?
    pub fn new(
        (file, data): (FileId, FileId),
        opened: Opened,
        (writable, can_grow, data_can_grow): (bool, bool, bool),
        backing: Option<Backing>,
        regions: Regions,
        options: Qcow2Options,
    ) -> Qcow2 {
        let (geometry, pass_discards) = (opened.geometry(), options.pass_discards);
        let image = Image { file, data, geometry, writable, data_can_grow, pass_discards, regions };
        let metadata = Metadata::new(&opened, &image);
        let reserve = Reserve::new(&opened, can_grow, options);
        let Opened { header, l1, .. } = opened;
        let slot = inflated_slot_bytes(geometry);
        let tables = Tables::new(l1, options.cache_slices, image);
        Qcow2 {
            image,
            disk: Disk::new(header.disk_size(), backing, geometry),
            writeback: Writeback::new(tables.slices.len(), &options),
            tables,
            metadata,
            header: LiveHeader::new(header, image),
            corrupt: Corrupt::new(image),
            claims: Claims::new(),
            new_tables: Vec::with_capacity(4),
            inflated: TableCache::new(regions.inflated, slot, options.cache_inflated),
            packing: Packing::new(
                image,
                options.cache_packed,
                deflate_depth(&options, geometry.cluster_size()),
            ),
            reserve,
            resize: Resize::default(),
        }
    }

    /// The clusters' geometry.
    pub fn geometry(&self) -> Geometry {
        self.image.geometry
    }

    /// Panics if something is claimed, pinned, parked or busy. For tests, at rest.
    pub fn assert_idle(&self) {
        // What could not be written stays in memory.
        self.tables.assert_idle(|slot| self.writeback.is_changed(slot).into());
        self.inflated.assert_idle(|_| 0);
        self.packing.assert_idle();
        assert!(self.claims.is_empty() && self.new_tables.is_empty(), "something is claimed");
        self.writeback.assert_idle();
        self.reserve.assert_idle();
        self.header.assert_idle();
        self.resize.assert_idle();
    }

    #[inline]
    pub(super) fn begin_request(&mut self, cx: &mut Cx<'_>) -> Step<RequestState> {
        match cx.io().kind {
            IoKind::Flush => self.flush(cx),
            IoKind::Read | IoKind::Status { .. } => self.walk(cx.io().offset, cx),
            _ if !self.image.writable => Step::Done(Err(Errno::READ_ONLY)),
            _ => self.walk(cx.io().offset, cx),
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
            (RequestState::Cow { claim, state }, event) => {
                let progress = self.step_piece().copy(claim, state, event, cx);
                self.go_on(progress, cx)
            }
            (RequestState::Next { at }, Event::Start | Event::Woken) => self.walk(at, cx),
            (RequestState::Pieces { at }, Event::Io(Ok(()))) => self.walk(at, cx),
            (RequestState::Pieces { .. }, Event::Io(error)) => Step::Done(error),
            (state, event) => self.step_rarely(state, event, cx),
        }
    }

    #[inline(never)]
    fn step_rarely(
        &mut self,
        state: RequestState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<RequestState> {
        let mut piece = self.step_piece();
        let progress = match (state, event) {
            (RequestState::Swept, Event::Woken) => return Step::Done(self.writeback.result()),
            (RequestState::Space { at, attempt }, Event::Woken) => {
                Progress::tried(at, piece.reserve.no_cluster(attempt))
            }
            (RequestState::Room { at, attempt }, Event::Woken) => {
                Progress::tried(at, piece.writeback.no_room(attempt))
            }
            (RequestState::LoadSlice { at, slot }, Event::Io(result)) => {
                piece.tables.slices.load_ended(slot as usize, result.is_ok(), cx);
                Progress::tried(at, result.err())
            }
            (RequestState::ReadCompressed { at, slot, bytes }, Event::Io(result)) => {
                piece.compressed_read(at, (slot, bytes), result, cx)
            }
            (RequestState::Inflate { at, slot }, Event::Io(result)) => {
                piece.cluster_inflated(at, slot, result, cx)
            }
            (RequestState::ZeroTable { at }, Event::Io(result)) => {
                piece.table_filled(at, result, cx)
            }
            (RequestState::ReadTable { at, done, buf }, Event::Io(result)) => {
                piece.copy_table(at, (done, buf), true, result, cx)
            }
            (RequestState::CopyTable { at, done, buf }, Event::Io(result)) => {
                piece.copy_table(at, (done, buf), false, result, cx)
            }
            (RequestState::LinkTable { at }, Event::Woken) => piece.link_table(at, cx),
            (RequestState::Pack(state), event) => piece.step_pack(state, event, cx),
            (RequestState::Publish { claim, attempt }, Event::Woken) => {
                piece.publish_in_room(claim, attempt, cx)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        };
        self.go_on(progress, cx)
    }

    /// Goes on as a piece has got on.
    #[inline]
    fn go_on(&mut self, progress: Progress, cx: &mut Cx<'_>) -> Step<RequestState> {
        match progress {
            Progress::To(to) if to == cx.io().end() => self.end(cx),
            Progress::To(to) => self.walk(to, cx),
            Progress::Issued(at) => Step::Wait(RequestState::Pieces { at }),
            Progress::Wait(state) => Step::Wait(state),
            Progress::LookAgain(at) => Step::Wait(RequestState::Next { at }),
            Progress::Failed(errno) => Step::Done(Err(errno)),
        }
    }

    /// What a step of a piece works with.
    #[inline]
    fn step_piece(&mut self) -> PieceStep<'_> {
        PieceStep {
            image: &self.image,
            disk: &self.disk,
            claims: &mut self.claims,
            new_tables: &mut self.new_tables,
            tables: &mut self.tables,
            metadata: &mut self.metadata,
            inflated: &mut self.inflated,
            packing: &mut self.packing,
            reserve: &mut self.reserve,
            writeback: &mut self.writeback,
            header: &self.header,
            corrupt: &mut self.corrupt,
        }
    }

    /// A flush, and the end of a write that is to be stable.
    fn flush(&mut self, cx: &mut Cx<'_>) -> Step<RequestState> {
        if self.writeback.park_to_flush(&self.header, cx) {
            return Step::Wait(RequestState::Swept);
        }
        self.image.flush_files(cx);
        Step::Last { label: FLUSH }
    }

    /// The whole range is done.
    fn end(&mut self, cx: &mut Cx<'_>) -> Step<RequestState> {
        match cx.io().kind {
            IoKind::Write { fua: true, .. } | IoKind::Zero { fua: true, .. } => self.flush(cx),
            _ => Step::Done(Ok(())),
        }
    }

    /// Where all of a request's bytes are, if that is known, in one piece and theirs alone: what
    /// most requests come down to.
    #[inline(always)]
    pub(super) fn in_one_piece(&mut self, io: &Io, mem: &Memory) -> Option<u64> {
        let (at, end) = (io.offset, io.end());
        let slot = self.tables.slices.find(self.image.slice_key(at))?;
        if !self.tables.slices.is_ready(slot) {
            return None;
        }
        let is_write = !matches!(io.kind, IoKind::Read);
        let (host, copied) = self.tables.one_piece(slot, at, end, is_write, mem)?;
        let usable = !is_write || copied && !self.metadata.is_hit(host, io.len);
        usable.then_some(host)
    }

    /// Goes on at `at`.
    fn walk(&mut self, mut at: u64, cx: &mut Cx<'_>) -> Step<RequestState> {
        let io = cx.io();
        let end = io.end();
        let is_transfer = matches!(io.kind, IoKind::Read | IoKind::Write { .. });
        let mut issued = false;
        while at < end {
            if issued && cx.room() == 0 {
                return Step::Wait(RequestState::Pieces { at });
            }
            let slice_end = self.image.slice_end(at);
            if is_transfer && slice_end < end {
                cx.issue_part(at, slice_end - at);
                (at, issued) = (slice_end, true);
                continue;
            }
            match self.piece(at, slice_end.min(end), &mut issued, cx) {
                Ok(to) => at = to,
                // Not before what is under way has ended; then it is found again.
                Err(Step::Done(_)) if issued => return Step::Wait(RequestState::Pieces { at }),
                Err(step) => return step,
            }
        }
        match io.kind {
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
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Result<u64, Step<RequestState>> {
        let kind = cx.io().kind;
        let found = match self.tables.look_up(at, end, !matches!(kind, IoKind::Read), cx.memory()) {
            Found::NoTable { end } if self.needs_no_table(at, end, kind) => {
                let mapping = Mapping::Unallocated(None);
                Found::Run(Run { mapping, copied: false, end, slot: None })
            }
            found => found,
        };
        let mut lacking = end;
        let compressed = self.compressed_end(at, end, cx.io());
        if let Some(to) = compressed {
            lacking = to;
        } else if let Found::Run(run) = found {
            match self.in_place(Piece { at, end, run, after_ops: *issued }, cx) {
                Some(Progress::To(to)) => return Ok(to),
                Some(Progress::Issued(to)) => {
                    *issued = true;
                    return Ok(to);
                }
                Some(progress) => return Err(self.go_on(progress, cx)),
                None => lacking = run.end,
            }
        }
        let is_transfer = matches!(kind, IoKind::Read | IoKind::Write { .. });
        let is_all = lacking == cx.io().end() && !*issued;
        if is_transfer && !is_all && !matches!(found, Found::Invalid) {
            cx.issue_part(at, lacking - at);
            *issued = true;
            return Ok(lacking);
        }
        // First what is under way; then this, looked up again.
        Err(if *issued {
            Step::Wait(RequestState::Pieces { at })
        } else if let (Found::Run(run), Some(to)) = (found, compressed) {
            let progress = self.step_piece().compress(at, to, run, cx);
            self.go_on(progress, cx)
        } else {
            self.provide(at, found, cx)
        })
    }

    /// One past the cluster at `at` of a write that is to be compressed; `None`: none is there, whole.
    fn compressed_end(&self, at: u64, end: u64, io: Io) -> Option<u64> {
        let IoKind::Write { compressed: true, .. } = io.kind else { return None };
        if self.image.has_data_file() {
            return None;
        }
        let (first, last) = self.disk.whole_clusters(at, end)?;
        (first == at).then(|| last.min(at + self.image.geometry.cluster_size()))
    }

    /// Provides what is missing at `at`.
    fn provide(&mut self, at: u64, found: Found, cx: &mut Cx<'_>) -> Step<RequestState> {
        let mut piece = self.step_piece();
        let progress = match found {
            Found::Run(Run { mapping: Mapping::Compressed(place), .. })
                if matches!(cx.io().kind, IoKind::Read) =>
            {
                piece.read_compressed(at, place, cx)
            }
            Found::Run(run) => piece.allocate(at, run, cx),
            Found::NoTable { .. } => piece.provide_table(at, cx),
            Found::NotLoaded => self.load_slice(at, cx),
            Found::Loading { slot } => {
                cx.park(self.tables.slices.waiters(slot), On::Table);
                Progress::LookAgain(at)
            }
            Found::Invalid => piece.invalid_entry(at, cx),
        };
        self.go_on(progress, cx)
    }

    /// Does a range without an L2 table do without one? Reads do, and what would only say zeros
    /// where zeros are.
    fn needs_no_table(&self, at: u64, end: u64, kind: IoKind) -> bool {
        match kind {
            IoKind::Read | IoKind::Status { .. } => true,
            IoKind::Zero { .. } => !self.disk.shows_backing(at) && !self.header.is_raw_external(),
            IoKind::Discard => {
                !self.disk.shows_backing(at)
                    || !self.image.geometry.has_zero_clusters()
                    || self.disk.whole_clusters(at, end).is_none()
            }
            _ => false,
        }
    }

    /// Does what needs no allocation for the run that the piece begins with.
    fn in_place(&mut self, piece: Piece, cx: &mut Cx<'_>) -> Option<Progress> {
        let Piece { at, run, .. } = piece;
        let io = cx.io();
        let issues = match (io.kind, run.mapping) {
            (IoKind::Read, Mapping::Data(_)) => return self.transfer(piece, cx),
            (IoKind::Write { .. }, Mapping::Data(_)) if run.copied => {
                return self.transfer(piece, cx);
            }
            (IoKind::Write { .. }, _) | (IoKind::Read, Mapping::Compressed(_)) => return None,
            (IoKind::Read, Mapping::Zero(_)) => {
                cx.zero_guest(at - io.offset, run.end - at);
                false
            }
            (IoKind::Read, Mapping::Unallocated(_)) => {
                backing::read(self.disk.backing(), at, run.end, cx)
            }
            (IoKind::Status { .. }, _) => {
                let issues = self.answer_status(at, run, cx);
                return Some(Progress::done(io.end(), issues));
            }
            _ => return self.step_piece().clear(piece, cx),
        };
        Some(Progress::done(run.end, issues))
    }

    /// Says what the run that begins at `at` is. True: the layer below is asked.
    #[inline(never)]
    fn answer_status(&self, at: u64, run: Run, cx: &mut Cx<'_>) -> bool {
        let inside = at & (self.image.geometry.cluster_size() - 1);
        let place = |host: HostOffset| (self.image.data, HostOffset(host.0 + inside));
        let (kind, host) = match run.mapping {
            Mapping::Data(host) => (StatusKind::Data, Some(place(host))),
            Mapping::Zero(host) => (StatusKind::Zero, host.map(place)),
            Mapping::Compressed(_) => (StatusKind::Compressed, None),
            Mapping::Unallocated(_) => {
                return backing::status(self.disk.backing(), at, run.end, cx);
            }
        };
        cx.answer_status(kind, run.end - at, host);
        false
    }

    /// Reads or writes the run of data that the piece begins with, and those that follow it: a
    /// fragmented range is looked up once.
    fn transfer(&mut self, piece: Piece, cx: &mut Cx<'_>) -> Option<Progress> {
        let Piece { mut at, end, mut run, .. } = piece;
        let io = cx.io();
        let is_write = !matches!(io.kind, IoKind::Read);
        while let Mapping::Data(host) = run.mapping {
            let host = host.0 + (at & (self.image.geometry.cluster_size() - 1));
            let (from, len) = (at - io.offset, run.end - at);
            if !is_write {
                cx.read_guest(self.image.data, host, from, len);
            } else if !run.copied {
                break;
            } else if self.metadata.is_hit(host, len) {
                if at > piece.at {
                    break;
                }
                return Some(Progress::Failed(self.corrupt.hit_metadata(host, cx)));
            } else {
                cx.write_guest(self.image.data, host, from, len, false);
            }
            at = run.end;
            let Some(slot) = run.slot.filter(|_| at < end && cx.room() > 0) else { break };
            let Found::Run(next) = self.tables.run_in(slot, at, end, is_write, cx.memory()) else {
                break;
            };
            run = next;
        }
        Some(Progress::Issued(at))
    }

    fn load_slice(&mut self, at: u64, cx: &mut Cx<'_>) -> Progress {
        let Some(slot) = self.tables.slices.reserve(self.image.slice_key(at)) else {
            let attempt = self.writeback.park_for_slot(&mut self.tables, cx);
            return Progress::Wait(RequestState::Room { at, attempt });
        };
        let seg = self.tables.slices.seg(slot, 0, 1 << self.image.geometry.slice_bits());
        cx.issue(self.image.read_op(self.tables.slice_offset(at), Segs::one(seg)));
        Progress::Wait(RequestState::LoadSlice { at, slot: slot as u32 })
    }
}
