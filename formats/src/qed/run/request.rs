//! What a guest's request does: what is at a byte of the disk, and how what is missing there is had.
//! `parts::pieces` walks over its range.

use cowbell_engine::mem::Memory;
use cowbell_engine::step::{Cx, Event, Io};
use cowbell_engine::units::{Errno, FileId, HostOffset};
use cowbell_engine::wait::On;

use crate::parts::backing::Backing;
use crate::parts::claims::Claims;
use crate::parts::growth::{FILE_MAX, Space};
use crate::parts::in_place::{Content, in_place};
use crate::parts::pieces::{Pieces, Progress};
use crate::parts::writeback::{Changes, Writeback};
use crate::qed::disk::layout::{Bounds, Entry, Geometry};
use crate::qed::rest::open::Opened;
use crate::qed::run::allocate::{AllocateState, AllocateStep, Claim, Piece};
use crate::qed::run::changes::TableChanges;
use crate::qed::run::image::{Disk, Image, QedOptions, Regions};
use crate::qed::run::live_header::LiveHeader;
use crate::qed::run::tables::{Found, Tables};
use crate::qed::run::tidy::TidyStep;

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

/// What a piece awaits that something is missing for: it goes on at `at`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PieceState {
    /// Room in memory that writeback number `attempt` was to make.
    Room { at: u64, attempt: u32 },
    /// A table slice on its way into `slot`.
    LoadSlice { at: u64, slot: u32 },
    /// Clusters.
    Allocate(AllocateState),
}

/// The label of data ops that are all that is left to do.
pub(super) const PIECES: u8 = 3;

impl PieceState {
    /// Where its name is in the list of the driver's states.
    #[inline]
    pub(super) fn label(&self) -> usize {
        match self {
            PieceState::Room { .. } => 2,
            PieceState::LoadSlice { .. } => 4,
            PieceState::Allocate(state) => match state {
                AllocateState::Space { .. } => 1,
                AllocateState::Mark { .. } => 5,
                AllocateState::Cow { state, .. } => state.label([6, 7, 8, 9]),
            },
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

    /// Who leaves the image clean, and what there is to write.
    pub(super) fn tidying(&mut self) -> TidyStep<'_> {
        let changes = TableChanges {
            image: &self.image,
            is_overlay: self.disk.backing().is_some(),
            tables: &mut self.tables,
            space: &mut self.space,
        };
        TidyStep {
            idle: self.claims.is_empty(),
            header: &mut self.header,
            writeback: &mut self.writeback,
            changes,
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
}

impl Pieces for Qed {
    type State = PieceState;
    type Found = Found;

    const PIECES: u8 = PIECES;

    fn find(&mut self, at: u64, end: u64, cx: &mut Cx<'_>) -> Found {
        self.tables.look_up(at, end, self.bounds(), cx.memory())
    }

    fn in_place(&mut self, at: u64, found: Found, cx: &mut Cx<'_>) -> Option<Progress<PieceState>> {
        let (entry, end) = match found {
            Found::Run { entry, end, .. } => (entry, end),
            Found::NoTable { end } => (Entry::Unallocated, end),
            Found::NotLoaded { .. } | Found::Loading { .. } | Found::Invalid => return None,
        };
        let content = match entry {
            Entry::Data(offset) => {
                let inside = at & (self.image.geometry.cluster_size() - 1);
                Content::Data(self.image.file, offset.0 + inside)
            }
            Entry::Zero => Content::Zeros,
            Entry::Unallocated => Content::Below { shows: self.disk.shows_backing(at) },
        };
        let whole = |at, end| self.disk.whole_clusters(at, end);
        in_place((at, end), content, self.disk.backing(), whole, cx)
    }

    fn provide(&mut self, at: u64, found: Found, cx: &mut Cx<'_>) -> Progress<PieceState> {
        match found {
            Found::Run { entry, end, slot } => {
                let piece = Piece { at, end, entry, slot };
                self.allocating().begin(piece, cx).map(PieceState::Allocate)
            }
            Found::NoTable { .. } => {
                self.allocating().allocate_table(at, cx).map(PieceState::Allocate)
            }
            Found::NotLoaded { table } => match self.tables.load(at, table, cx) {
                Some(slot) => Progress::Wait(PieceState::LoadSlice { at, slot: slot as u32 }),
                None => {
                    let of_use = self.tables.has_changed_slices();
                    let room = &mut self.tables.slices.full;
                    let attempt = self.writeback.park_for_room(of_use, room, cx);
                    Progress::Wait(PieceState::Room { at, attempt })
                }
            },
            Found::Loading { slot } => {
                cx.park(self.tables.slices.waiters(slot), On::Table);
                Progress::LookAgain(at)
            }
            // The request fails; others go on.
            Found::Invalid => {
                let (what, place) = self.tables.invalid_entry(at, self.bounds());
                cx.tell_corrupt(what, place);
                Progress::Failed(Errno::IO)
            }
        }
    }

    #[inline]
    fn run_piece(
        &mut self,
        state: PieceState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Progress<PieceState> {
        match (state, event) {
            (PieceState::Allocate(state), event) => {
                self.allocating().run(state, event, cx).map(PieceState::Allocate)
            }
            (PieceState::Room { at, attempt }, Event::Woken) => {
                Progress::tried(at, self.writeback.failure_of(attempt))
            }
            (PieceState::LoadSlice { at, slot }, Event::Io(result)) => {
                self.tables.loaded(slot as usize, result, cx);
                Progress::tried(at, result.err())
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn changes(&mut self) -> (&mut Writeback, impl Changes) {
        let TidyStep { writeback, changes, .. } = self.tidying();
        (writeback, changes)
    }
}
