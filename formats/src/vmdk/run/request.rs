//! What a guest's request does: what is at a byte of the disk, and how what is missing there is had.
//! `parts::pieces` walks over its range, whatever extents are in it.
//!
//! A range that is under several tables, one of which is missing something, is cut: what is under
//! each becomes a request of its own, so that they are done side by side.

use cowbell_engine::mem::Memory;
use cowbell_engine::mutant;
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::{Cx, Event, Io, IoKind};
use cowbell_engine::sys::random;
use cowbell_engine::units::{Errno, FileId};
use cowbell_engine::wait::On;

use crate::parts::backing::Backing;
use crate::parts::claims::Claims;
use crate::parts::in_place::{Content, in_place};
use crate::parts::pieces::{self, Pieces};
use crate::parts::writeback::{Changes, Writeback};
use crate::vmdk::digits;
use crate::vmdk::disk::layout::Entry;
use crate::vmdk::rest::open::Opened;
use crate::vmdk::run::allocate::{AllocateState, AllocateStep, Claim, Piece};
use crate::vmdk::run::changes::TableChanges;
use crate::vmdk::run::close::CloseStep;
use crate::vmdk::run::compressed::{Compressed, InflateState};
use crate::vmdk::run::content_id::ContentId;
use crate::vmdk::run::end::End;
use crate::vmdk::run::extents::Extents;
use crate::vmdk::run::image::{Image, PIECES, Regions, VmdkOptions};
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

/// What a piece awaits that something is missing for: it goes on at `at`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PieceState {
    /// Room in memory that writeback number `attempt` was to make.
    Room { at: u64, attempt: u32 },
    /// A grain table on its way into `slot`.
    LoadTable { at: u64, slot: u32 },
    /// A deflated grain.
    Inflate { at: u64, state: InflateState },
    /// The content id, which attempt number `attempt` is to write.
    ContentId { at: u64, attempt: u32 },
    /// Grains, or their table.
    Allocate(AllocateState),
    /// A grain, or its table, appended to a stream.
    Stream(StreamState),
}

type Progress = pieces::Progress<PieceState>;

impl PieceState {
    /// Where its name is in the list of the driver's states.
    #[inline]
    pub(super) fn label(&self) -> usize {
        match self {
            PieceState::Room { .. } => 2,
            PieceState::LoadTable { .. } => 4,
            PieceState::Inflate { .. } => 5,
            PieceState::ContentId { .. } => 6,
            PieceState::Allocate(state) => match state {
                AllocateState::Space { .. } => 1,
                AllocateState::ContentId { .. } => 6,
                AllocateState::Cow { state, .. } => state.label([7, 8, 15, 9]),
            },
            PieceState::Stream(state) => match state {
                StreamState::TableSpace { .. } => 1,
                StreamState::EndGone { .. } => 16,
                StreamState::Slot { .. } => 2,
                StreamState::Deflate { .. }
                | StreamState::Append { .. }
                | StreamState::Space { .. } => 14,
                StreamState::WriteGrain { .. } | StreamState::WriteTable { .. } => 9,
            },
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
            (compressed, Stream::new(End::new(regions.tail)))
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
    fn allocating(&mut self) -> AllocateStep<'_> {
        self.allocating_and_deflated().0
    }

    #[inline]
    fn allocating_and_deflated(&mut self) -> (AllocateStep<'_>, Option<&mut (Compressed, Stream)>) {
        let allocate = AllocateStep {
            image: &self.image,
            extents: &mut self.extents,
            tables: &mut self.tables,
            claims: &mut self.claims,
            id: &mut self.id,
            writeback: &mut self.writeback,
        };
        (allocate, self.deflated.as_mut())
    }

    fn streaming(&mut self) -> StreamStep<'_> {
        let (allocate, deflated) = self.allocating_and_deflated();
        let (compressed, stream) = deflated.expect("a stream has deflated grains");
        StreamStep { stream, compressed, allocate }
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

    fn wait_for_id(&mut self, at: u64, cx: &mut Cx<'_>) -> Progress {
        let attempt = self.id.park(cx);
        Progress::Wait(PieceState::ContentId { at, attempt })
    }

    /// Reads `at..end` of a deflated grain, if it is in memory inflated; or says what it is.
    fn in_compressed(&mut self, at: u64, end: u64, cx: &mut Cx<'_>) -> Option<Progress> {
        let io = cx.io();
        if let IoKind::Status { .. } = io.kind {
            cx.answer_status(StatusKind::Compressed, end - at, None);
            return Some(Progress::To(io.end()));
        }
        let place = self.extents.place(self.extents.index_at(at));
        let (compressed, _) = self.deflated.as_mut().expect("a compressed extent has one");
        let is_done = io.kind == IoKind::Read && compressed.read(at, end, place, cx);
        is_done.then_some(Progress::To(end))
    }

    /// Inflates the grain at `at`, which is at byte `host` of its file, by the table in `slot`.
    fn inflate(&mut self, at: u64, host: u64, slot: usize, cx: &mut Cx<'_>) -> Progress {
        if cx.io().kind != IoKind::Read {
            // A stream takes nothing back.
            return Progress::Failed(Errno::IO);
        }
        let place = self.extents.place(self.extents.index_at(at));
        let next = self.tables.next_in_file(slot, place, place.grain_of(at), cx.memory());
        let (compressed, _) = self.deflated.as_mut().expect("a compressed extent has one");
        let progress = compressed.load(&self.extents, at, (host, next), cx);
        progress.map(|state| PieceState::Inflate { at, state })
    }

    /// Makes what is under each table from `at` on a request of its own. `None`: it is no read or write.
    fn cut_up(&mut self, mut at: u64, cx: &mut Cx<'_>) -> Option<Progress> {
        let io = cx.io();
        if !matches!(io.kind, IoKind::Read | IoKind::Write { .. }) {
            return None;
        }
        while at < io.end() && cx.room() > 0 {
            let end = self.extents.piece_end(at).min(io.end());
            cx.issue_part(at, end - at);
            at = end;
        }
        Some(Progress::Issued(at))
    }
}

impl Pieces for Vmdk {
    type State = PieceState;
    type Found = Found;

    const PIECES: u8 = PIECES;

    fn find(&mut self, at: u64, end: u64, cx: &mut Cx<'_>) -> Found {
        self.tables.look_up(&self.extents, at, end, cx.memory())
    }

    fn in_place(&mut self, at: u64, found: Found, cx: &mut Cx<'_>) -> Option<Progress> {
        let (io, index) = (cx.io(), self.extents.index_at(at));
        let file = self.extents.get(index).file;
        let reads = matches!(io.kind, IoKind::Read | IoKind::Status { .. });
        let (end, content) = match found {
            Found::Flat { host, end } => (end, Content::Data(file, host)),
            Found::Run { entry: Entry::Zero, end, .. } => (end, Content::Zeros),
            Found::Run { entry: Entry::Data(_), end, .. } if self.extents.is_compressed(index) => {
                return self.in_compressed(at, end, cx);
            }
            Found::Run { entry: Entry::Data(offset), end, .. } => {
                let place = self.extents.place(index);
                let inside = (at - place.start) & (place.grain_size() - 1);
                (end, Content::Data(file, offset + inside))
            }
            Found::NoTable { end } | Found::Run { entry: Entry::Unallocated, end, .. } => {
                if reads && self.image.parent_changed {
                    return Some(Progress::Failed(Errno::INVALID));
                }
                let place = self.extents.place(index);
                (end, Content::Below { shows: self.image.shows_parent(at, place) })
            }
            Found::NotLoaded { .. } | Found::Loading { .. } | Found::Invalid => return None,
        };
        let is_data = matches!(content, Content::Data(..));
        if is_data && !reads && !self.id.is_written() && !mutant!("vmdk_in_place_before_cid") {
            return None;
        }
        let whole = |at, end| match found {
            Found::Flat { .. } => Some((at, end)),
            _ if !is_data && !self.extents.can_say_zero(index) => None,
            _ => self.extents.place(index).whole_grains(at, end),
        };
        in_place((at, end), content, self.image.backing, whole, cx)
    }

    #[inline(never)]
    fn provide(&mut self, at: u64, found: Found, cx: &mut Cx<'_>) -> Progress {
        let io = cx.io();
        if let Found::Invalid = found {
            // The request fails; others go on.
            self.tables.tell_invalid(&self.extents, at, cx);
            return Progress::Failed(Errno::IO);
        }
        if !matches!(io.kind, IoKind::Read | IoKind::Status { .. }) {
            // Beside whatever is missing.
            self.id.want(cx);
        }
        let is_whole = matches!(found, Found::Run { end, .. } if end == io.end());
        if !is_whole
            && self.extents.piece_end(at) < io.end()
            && let Some(progress) = self.cut_up(at, cx)
        {
            return progress;
        }
        let index = self.extents.index_at(at);
        match found {
            Found::Run { entry: Entry::Data(host), slot, .. }
                if self.extents.is_compressed(index) =>
            {
                self.inflate(at, host, slot, cx)
            }
            // In place; and directories say so on disk after the next writeback.
            Found::Flat { .. }
            | Found::NoTable { .. }
            | Found::Run { entry: Entry::Data(_), .. }
                if !self.id.is_written() =>
            {
                self.wait_for_id(at, cx)
            }
            Found::Run { entry, end, slot } => {
                let place = self.extents.place(index);
                if self.extents.is_compressed(index)
                    && self.allocating().becomes_zero(at, end, place, cx).is_none()
                {
                    if !self.id.is_written() {
                        return self.wait_for_id(at, cx);
                    }
                    return self.streaming().begin(at, slot, place, cx).map(PieceState::Stream);
                }
                let piece = Piece { at, end, entry, slot };
                self.allocating().begin(piece, place, cx).map(PieceState::Allocate)
            }
            Found::NoTable { .. } => {
                let place = self.extents.place(index);
                if self.extents.grains(index).has_footer {
                    return self.streaming().make_table(at, place, cx).map(PieceState::Stream);
                }
                self.allocating().allocate_table(at, place, cx).map(PieceState::Allocate)
            }
            Found::NotLoaded { table } => match self.tables.load(&self.extents, at, table, cx) {
                Some(slot) => Progress::Wait(PieceState::LoadTable { at, slot: slot as u32 }),
                None => {
                    let of_use = self.tables.have_changed_tables();
                    let room = &mut self.tables.cache.full;
                    let attempt = self.writeback.park_for_room(of_use, room, cx);
                    Progress::Wait(PieceState::Room { at, attempt })
                }
            },
            Found::Loading { slot } => {
                cx.park(self.tables.cache.waiters(slot), On::Table);
                Progress::LookAgain(at)
            }
            Found::Flat { .. } | Found::Invalid => unreachable!("dealt with before"),
        }
    }

    #[inline]
    fn run_piece(&mut self, state: PieceState, event: Event, cx: &mut Cx<'_>) -> Progress {
        match (state, event) {
            (PieceState::Allocate(state), event) => {
                self.allocating().run(state, event, cx).map(PieceState::Allocate)
            }
            (PieceState::Room { at, attempt }, Event::Woken) => {
                Progress::tried(at, self.writeback.failure_of(attempt))
            }
            (PieceState::ContentId { at, attempt }, Event::Woken) => {
                Progress::tried(at, self.id.failure_of(attempt))
            }
            (PieceState::LoadTable { at, slot }, Event::Io(result)) => {
                self.tables.loaded(slot as usize, result, &self.extents, cx);
                Progress::tried(at, result.err())
            }
            (PieceState::Inflate { at, state }, event) => {
                let (compressed, _) = self.deflated.as_mut().expect("it began");
                let progress = compressed.run(&self.extents, at, state, event, cx);
                progress.map(|state| PieceState::Inflate { at, state })
            }
            (PieceState::Stream(state), event) => {
                self.streaming().run(state, event, cx).map(PieceState::Stream)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn changes(&mut self) -> (&mut Writeback, impl Changes) {
        let CloseStep { writeback, changes, .. } = self.closing();
        (writeback, changes)
    }
}
