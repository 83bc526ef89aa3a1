//! What a guest's request does: its range is looked up, and done piece by piece.
//!
//! One step issues the ops of as many pieces as it can, joined, whatever extents they are in. Where
//! something is missing it waits for what it has issued and looks again. A range that is under
//! several tables, one of which is missing something, is cut: what is under each becomes a request
//! of its own, so that they are done side by side.

use cowbell_engine::mem::Memory;
use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind, Segs, Target};
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::{Cx, Event, Io, IoKind, Step};
use cowbell_engine::sys::random;
use cowbell_engine::units::{Errno, FileId, HostOffset};

use crate::parts::backing::{self, Backing};
use crate::parts::claims::Claims;
use crate::parts::cow::CowState;
use crate::parts::writeback::{Writeback, WritebackState};
use crate::vmdk::digits;
use crate::vmdk::disk::layout::Entry;
use crate::vmdk::rest::open::Opened;
use crate::vmdk::run::allocate::{AllocateState, AllocateStep, Claim, Piece, Progress};
use crate::vmdk::run::changes::TableChanges;
use crate::vmdk::run::close::CloseStep;
use crate::vmdk::run::compressed::{Compressed, InflateState};
use crate::vmdk::run::content_id::ContentId;
use crate::vmdk::run::extents::{Extents, Place};
use crate::vmdk::run::image::{FLUSH, Image, PIECES, Regions, VmdkOptions};
use crate::vmdk::run::stream::{Stream, StreamState, StreamStep};
use crate::vmdk::run::tables::{Found, Tables};

/// An opened VMDK image: all of its state. Each of its components keeps its own, and is changed by
/// its own file alone.
#[derive(Clone, Hash, Debug)]
pub struct Vmdk {
    pub(super) image: Image,
    pub(super) extents: Extents,
    pub(super) tables: Tables,
    /// What is being allocated.
    pub(super) claims: Claims<Claim>,
    pub(super) id: ContentId,
    pub(super) writeback: Writeback,
    /// Of an image with deflated grains.
    pub(super) deflated: Option<(Compressed, Stream)>,
}

/// A request's state, named by what it awaits. `at` is the first byte of the guest range not yet
/// done.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RequestState {
    /// Nothing, or whatever it was parked on: look up what is at `at`.
    Next { at: u64 },
    /// As `Next`, for space that attempt number `attempt` to grow the extent's file was to give.
    Space { at: u64, extent: u32, attempt: u32 },
    /// As `Next`, for room in memory that writeback number `attempt` was to make.
    Room { at: u64, attempt: u32 },
    /// As `Next`, for the content id, which attempt number `attempt` is to write.
    ContentId { at: u64, attempt: u32 },
    /// The ops of mapped pieces, or the requests for pieces, up to `at`.
    Pieces { at: u64 },
    /// A grain table on its way into `slot`.
    LoadTable { at: u64, slot: u32 },
    /// A deflated grain.
    Inflate { at: u64, state: InflateState },
    /// A piece, written to new grains.
    Allocate(AllocateState),
    /// A grain, or its table, appended to a stream.
    Stream(StreamState),
    /// A writeback that began after the request came, or a flush.
    Flush(WritebackState),
}

impl RequestState {
    /// Where its name is in the list of the driver's states.
    #[inline]
    pub(super) fn label(&self) -> usize {
        match self {
            RequestState::Next { .. } => 0,
            RequestState::Space { .. } => 1,
            RequestState::Room { .. } => 2,
            RequestState::Pieces { .. } => PIECES.into(),
            RequestState::LoadTable { .. } => 4,
            RequestState::Inflate { .. } => 5,
            RequestState::ContentId { .. } => 6,
            RequestState::Allocate(state) => match state {
                AllocateState::ContentId { .. } => 6,
                AllocateState::Cow { state: CowState::Bufs, .. } => 7,
                AllocateState::Cow { state: CowState::Read, .. } => 8,
                AllocateState::Cow {
                    state: CowState::CopyRead { .. } | CowState::CopyWrite { .. },
                    ..
                } => 15,
                AllocateState::WriteData { .. } => 9,
            },
            RequestState::Stream(state) => match state {
                StreamState::Deflate { .. }
                | StreamState::Append { .. }
                | StreamState::Space { .. } => 14,
                StreamState::WriteGrain { .. } | StreamState::WriteTable { .. } => 9,
            },
            RequestState::Flush(_) => FLUSH.into(),
        }
    }
}

impl Vmdk {
    /// The image that `opened` describes, in `files`: its own and the others.
    pub fn new(
        files: Vec<FileId>,
        mut opened: Opened,
        writable: bool,
        backing: Option<Backing>,
        regions: Regions,
        options: VmdkOptions,
    ) -> Vmdk {
        let new = digits(&opened.descriptor, options.entropy.unwrap_or_else(random));
        let mut block = opened.id_block;
        let len = opened.descriptor.cid_len;
        block.bytes[block.digits_at..][..len].copy_from_slice(&new[..len]);
        let Regions { tables, directories, id_block, grains } = regions;
        let tables = Tables::new(&mut opened.extents, tables, directories, writable);
        let extents = Extents::new(opened.extents, &files, options.growth);
        let deflated = grains.map(|regions| {
            let compressed = Compressed::new(regions.grains, regions.input, regions.input_size);
            (compressed, Stream::new(regions.tail))
        });
        let (size, parent_changed) = (opened.size, opened.parent_changed);
        Vmdk {
            id: ContentId::new(files[0], block.at, block.bytes, id_block),
            image: Image { files, size, writable, backing, parent_changed },
            extents,
            tables,
            claims: Claims::new(),
            writeback: Writeback::new(options.writeback_after_ms),
            deflated,
        }
    }

    /// Bytes in a grain, where all extents have the same.
    pub fn grain_size(&self) -> Option<u64> {
        self.extents.grain_size()
    }

    /// Panics if something is claimed, pinned, parked or busy. For tests, at rest.
    pub fn assert_idle(&self) {
        assert!(self.claims.is_empty(), "something is claimed");
        self.id.assert_idle();
        self.writeback.assert_idle();
        self.tables.assert_idle();
        self.extents.assert_idle();
        if let Some((compressed, stream)) = &self.deflated {
            compressed.assert_idle();
            stream.assert_idle();
        }
    }

    #[inline]
    pub(super) fn begin_request(&mut self, cx: &mut Cx<'_>) -> Step<RequestState> {
        let io = cx.io();
        match io.kind {
            IoKind::Flush => self.flush(cx),
            IoKind::Read | IoKind::Status { .. } => self.walk(io.offset, Event::Start, cx),
            _ if !self.image.writable => Step::Done(Err(Errno::READ_ONLY)),
            IoKind::Truncate => Step::Done(Err(Errno::NOT_SUPPORTED)),
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
                self.go_on(at, progress, RequestState::Allocate, cx)
            }
            (RequestState::Next { at }, Event::Start | Event::Woken) => self.walk(at, event, cx),
            (RequestState::Space { at, extent, attempt }, Event::Woken) => {
                let failure = self.extents.space(extent as usize).failure_of(attempt);
                self.woken(at, failure, cx)
            }
            (RequestState::Room { at, attempt }, Event::Woken) => {
                self.woken(at, self.writeback.failure_of(attempt), cx)
            }
            (RequestState::ContentId { at, attempt }, Event::Woken) => {
                self.woken(at, self.id.failure_of(attempt), cx)
            }
            (RequestState::Pieces { at }, Event::Io(Ok(()))) => self.walk(at, Event::Start, cx),
            (RequestState::Pieces { .. }, Event::Io(error)) => Step::Done(error),
            (RequestState::LoadTable { at, slot }, Event::Io(result)) => {
                self.tables.loaded(slot as usize, result, &self.extents, cx);
                self.looked_for(at, result, cx)
            }
            (RequestState::Inflate { at, state }, event) => {
                let (compressed, _) = self.deflated.as_mut().expect("it began");
                let progress = compressed.run(&self.extents, at, state, event, cx);
                self.go_on(at, progress, |state| RequestState::Inflate { at, state }, cx)
            }
            (RequestState::Stream(state), event) => {
                let at = cx.io().offset;
                let progress = self.streaming().run(state, event, cx);
                self.go_on(at, progress, RequestState::Stream, cx)
            }
            (RequestState::Flush(state), event) => {
                let (writeback, mut changes) = self.changes();
                writeback.step(state, event, &mut changes, cx).map(RequestState::Flush)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// What was waited for has been tried. If it failed, then at once: who looked again first would
    /// ask for it again, and two requests that take turns would never give up.
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

    /// Goes on as a piece says whose states are `of`; what is at `at` is what it began with.
    fn go_on<S>(
        &mut self,
        at: u64,
        progress: Progress<S>,
        of: impl Fn(S) -> RequestState,
        cx: &mut Cx<'_>,
    ) -> Step<RequestState> {
        match progress {
            Progress::To(to) => self.walk(to, Event::Start, cx),
            Progress::Wait(state) => Step::Wait(of(state)),
            Progress::LookAgain => Step::Wait(RequestState::Next { at }),
            Progress::Space { extent, attempt } => {
                Step::Wait(RequestState::Space { at, extent, attempt })
            }
            Progress::ContentId(attempt) => Step::Wait(RequestState::ContentId { at, attempt }),
            Progress::Failed(errno) => Step::Done(Err(errno)),
        }
    }

    #[inline]
    fn allocating(&mut self) -> AllocateStep<'_> {
        AllocateStep {
            image: &self.image,
            extents: &mut self.extents,
            tables: &mut self.tables,
            claims: &mut self.claims,
            id: &mut self.id,
            writeback: &mut self.writeback,
        }
    }

    fn streaming(&mut self) -> StreamStep<'_> {
        let (compressed, stream) = self.deflated.as_mut().expect("a stream has deflated grains");
        let allocate = AllocateStep {
            image: &self.image,
            extents: &mut self.extents,
            tables: &mut self.tables,
            claims: &mut self.claims,
            id: &mut self.id,
            writeback: &mut self.writeback,
        };
        StreamStep { stream, compressed, allocate }
    }

    /// Who writes changed tables, and what there is to write.
    pub(super) fn changes(&mut self) -> (&mut Writeback, TableChanges<'_>) {
        let CloseStep { writeback, changes, .. } = self.closing();
        (writeback, changes)
    }

    pub(super) fn closing(&mut self) -> CloseStep<'_> {
        let changes = TableChanges {
            image: &self.image,
            extents: &mut self.extents,
            tables: &mut self.tables,
            id: &mut self.id,
        };
        let stream = self.deflated.as_mut().map(|(_, stream)| stream);
        CloseStep { stream, writeback: &mut self.writeback, changes }
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
    pub(super) fn in_one_piece(&mut self, io: &Io, mem: &Memory) -> Option<(FileId, u64)> {
        let found = self.tables.look_up(&self.extents, io.offset, io.end(), mem);
        let index = self.extents.index_at(io.offset);
        match found {
            Found::Flat { host, end } if end == io.end() => {
                Some((self.extents.get(index).file, host))
            }
            Found::Run { entry: Entry::Data(host), end, .. } if end == io.end() => {
                let place = self.extents.place(index);
                let inside = (io.offset - place.start) & (place.grain_size() - 1);
                let file = self.extents.get(index).file;
                (!self.extents.is_compressed(index)).then_some((file, host + inside))
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
        // Everything is done or on its way.
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
        let found = match self.tables.look_up(&self.extents, at, end, cx.memory()) {
            Found::NoTable { end } if self.needs_no_table(at, end, cx) => {
                Found::Run { entry: Entry::Unallocated, end, slot: usize::MAX }
            }
            found => found,
        };
        let done = match found {
            Found::Flat { host, end } => self.at_host(at, end, host, 1, issued, cx).map(Ok),
            Found::Zeros { end } => Some(Ok(zeros(at, end, cx))),
            Found::Run { entry, end, .. } => self.in_place(at, end, entry, event, issued, cx),
            _ => None,
        };
        // First what is under way; then this, looked up again.
        match done {
            Some(Err(_)) | None if *issued => Err(Step::Wait(RequestState::Pieces { at })),
            Some(Ok(to)) => Ok(to),
            Some(Err(errno)) => Err(Step::Done(Err(errno))),
            None => Err(self.provide(at, found, cx)),
        }
    }

    /// Provides what is missing at `at`.
    #[inline(never)]
    fn provide(&mut self, at: u64, found: Found, cx: &mut Cx<'_>) -> Step<RequestState> {
        let io = cx.io();
        if let Found::Invalid = found {
            // The request fails; others go on.
            self.tables.tell_invalid(&self.extents, at, cx);
            return Step::Done(Err(Errno::IO));
        }
        if !matches!(io.kind, IoKind::Read | IoKind::Status { .. }) {
            // Beside whatever is missing.
            self.id.want(cx);
        }
        let is_whole = matches!(found, Found::Run { end, .. } if end == io.end());
        if !is_whole
            && self.extents.piece_end(at) < io.end()
            && let Some(step) = self.cut_up(at, cx)
        {
            return step;
        }
        let index = self.extents.index_at(at);
        match found {
            Found::Run { entry: Entry::Data(host), slot, .. }
                if self.deflated.is_some() && self.extents.is_compressed(index) =>
            {
                if io.kind != IoKind::Read {
                    // A stream takes nothing back.
                    return Step::Done(Err(Errno::IO));
                }
                let place = self.extents.place(index);
                let next = self.tables.next_in_file(slot, place, place.grain_of(at), cx.memory());
                let (compressed, _) = self.deflated.as_mut().expect("a compressed extent has one");
                let progress = compressed.load(&self.extents, at, (host, next), cx);
                self.go_on(at, progress, |state| RequestState::Inflate { at, state }, cx)
            }
            Found::Flat { .. } | Found::Run { entry: Entry::Data(_), .. }
                if !self.id.is_written() =>
            {
                let attempt = self.id.park(cx);
                Step::Wait(RequestState::ContentId { at, attempt })
            }
            Found::Run { entry, end, slot } => {
                let place = self.extents.place(index);
                let piece = Piece { at, end, entry, slot };
                if self.deflated.is_some()
                    && self.extents.is_compressed(index)
                    && self.allocating().becomes_zero(at, end, place, cx).is_none()
                {
                    let progress = self.streaming().begin(at, slot, place, cx);
                    return self.go_on(at, progress, RequestState::Stream, cx);
                }
                let progress = self.allocating().begin(piece, place, cx);
                self.go_on(at, progress, RequestState::Allocate, cx)
            }
            Found::NoTable { .. } => {
                let place = self.extents.place(index);
                if self.extents.has_footer(index) {
                    let progress = self.streaming().make_table(at, place, cx);
                    return self.go_on(at, progress, RequestState::Stream, cx);
                }
                let progress = self.allocating().allocate_table(at, place, cx);
                self.go_on(at, progress, RequestState::Allocate, cx)
            }
            Found::NotLoaded { table } => match self.tables.load(&self.extents, at, table, cx) {
                Some(slot) => Step::Wait(RequestState::LoadTable { at, slot: slot as u32 }),
                None => {
                    let of_use = self.tables.have_changed_tables();
                    let attempt = self.writeback.park_for_room(of_use, self.tables.full(), cx);
                    Step::Wait(RequestState::Room { at, attempt })
                }
            },
            Found::Loading { slot } => {
                self.tables.park_for(slot, cx);
                Step::Wait(RequestState::Next { at })
            }
            Found::Flat { .. } | Found::Zeros { .. } | Found::Invalid => {
                unreachable!("dealt with before")
            }
        }
    }

    /// Makes what is under each table from `at` on a request of its own.
    fn cut_up(&mut self, mut at: u64, cx: &mut Cx<'_>) -> Option<Step<RequestState>> {
        let io = cx.io();
        let kind = match io.kind {
            IoKind::Read => OpKind::Read,
            // Stable when all of them are: see `end`.
            IoKind::Write { .. } => OpKind::Write { fua: false },
            _ => return None,
        };
        let me = Target::Node(cx.node());
        while at < io.end() && cx.room() > 0 {
            let end = self.extents.piece_end(at).min(io.end());
            let segs = Segs::one(cx.guest(at - io.offset, end - at));
            cx.issue(Op { kind, target: me, offset: at, len: end - at, segs });
            at = end;
        }
        Some(Step::Wait(RequestState::Pieces { at }))
    }

    /// Does a range without a table do without one? Reads do, and what would only say zeros where
    /// zeros are, or could not say so.
    fn needs_no_table(&self, at: u64, end: u64, cx: &Cx<'_>) -> bool {
        let place = self.extents.place(self.extents.index_at(at));
        match cx.io().kind {
            IoKind::Read | IoKind::Status { .. } => true,
            IoKind::Zero { .. } => !self.image.shows_parent(at, place),
            IoKind::Discard => {
                !self.image.shows_parent(at, place)
                    || !self.extents.can_say_zero(place.extent)
                    || place.whole_grains(at, end).is_none()
            }
            _ => false,
        }
    }

    /// Does what needs no allocation for the run `at..run_end`; answers how far it got. `None`:
    /// something is missing at `at`.
    fn in_place(
        &mut self,
        at: u64,
        run_end: u64,
        entry: Entry,
        event: Event,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Option<Result<u64, Errno>> {
        let (io, index) = (cx.io(), self.extents.index_at(at));
        let place = self.extents.place(index);
        let Entry::Data(offset) = entry else {
            return self.without_data(at, run_end, entry, place, issued, cx);
        };
        if self.extents.is_compressed(index) {
            if let IoKind::Status { .. } = io.kind {
                cx.answer_status(StatusKind::Compressed, run_end - at, None);
                return Some(Ok(io.end()));
            }
            let (compressed, _) = self.deflated.as_mut().expect("a compressed extent has one");
            let is_done = io.kind == IoKind::Read && compressed.read(at, run_end, place, cx);
            return is_done.then_some(Ok(run_end));
        }
        if mutant!("vmdk_woken_trusts_old_lookup")
            && event == Event::Woken
            && io.kind != IoKind::Read
        {
            return None;
        }
        let host = offset + ((at - place.start) & (place.grain_size() - 1));
        self.at_host(at, run_end, host, place.grain_size(), issued, cx).map(Ok)
    }

    /// Does `at..end` where it is: at byte `host` of its extent's file, in grains of `grain` bytes.
    /// Answers how far it got. `None`: the content id must be written first.
    fn at_host(
        &mut self,
        at: u64,
        end: u64,
        host: u64,
        grain: u64,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Option<u64> {
        let io = cx.io();
        let file = self.extents.get(self.extents.index_at(at)).file;
        let (from, len) = (at - io.offset, end - at);
        match io.kind {
            IoKind::Read => cx.read_guest(file, host, from, len),
            IoKind::Status { .. } => {
                cx.answer_status(StatusKind::Data, len, Some((file, HostOffset(host))));
                return Some(io.end());
            }
            _ if !self.id.is_written() && !mutant!("vmdk_in_place_before_cid") => return None,
            IoKind::Write { .. } => cx.write_guest(file, host, from, len, false),
            IoKind::Zero { .. } | IoKind::Discard | IoKind::Flush | IoKind::Truncate => {
                let Some(op) = self.clear_op(at, end, (file, host), grain, cx) else {
                    return Some(end);
                };
                cx.issue(op);
            }
        }
        *issued = true;
        Some(end)
    }

    /// The op that zeroes or discards `at..end`, if there is anything to do.
    fn clear_op(
        &self,
        at: u64,
        end: u64,
        (file, host): (FileId, u64),
        grain: u64,
        cx: &Cx<'_>,
    ) -> Option<Op> {
        if let IoKind::Zero { unmap, .. } = cx.io().kind {
            return Some(Op::bare(OpKind::Zero { unmap }, file, host, end - at));
        }
        let (first, last) = match grain {
            1 => (at, end),
            _ => self.extents.place(self.extents.index_at(at)).whole_grains(at, end)?,
        };
        Some(Op::bare(OpKind::Discard, file, host + (first - at), last - first))
    }

    /// As `in_place`, for a run without data of its own.
    fn without_data(
        &mut self,
        at: u64,
        run_end: u64,
        entry: Entry,
        place: Place,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Option<Result<u64, Errno>> {
        let (io, backing) = (cx.io(), self.image.backing);
        let done = match (io.kind, entry) {
            (IoKind::Read | IoKind::Status { .. }, Entry::Zero) => zeros(at, run_end, cx),
            (IoKind::Read | IoKind::Status { .. }, _) if self.image.parent_changed => {
                return Some(Err(Errno::INVALID));
            }
            (IoKind::Read, _) => {
                *issued |= backing::read(backing, at, run_end, cx);
                run_end
            }
            (IoKind::Status { .. }, _) => {
                *issued |= backing::status(backing, at, run_end, cx);
                io.end()
            }
            (IoKind::Write { .. }, _) => return None,
            (_, Entry::Zero) => run_end,
            // Zero write or discard of an unallocated run.
            _ if !self.image.shows_parent(at, place) => run_end,
            (IoKind::Discard, _) if !self.extents.can_say_zero(place.extent) => run_end,
            (IoKind::Discard, _) => match place.whole_grains(at, run_end) {
                None => run_end,
                // The cut grain in front keeps its contents.
                Some((first, _)) if first > at => first,
                Some(_) => return None,
            },
            _ => return None,
        };
        Some(Ok(done))
    }
}

/// `at..end` is zeros: reads them, or says so. Answers how far that gets the request.
fn zeros(at: u64, end: u64, cx: &mut Cx<'_>) -> u64 {
    let io = cx.io();
    if let IoKind::Status { .. } = io.kind {
        cx.answer_status(StatusKind::Zero, end - at, None);
        return io.end();
    }
    cx.zero_guest(at - io.offset, end - at);
    end
}
