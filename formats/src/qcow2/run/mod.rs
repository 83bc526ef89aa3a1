//! qcow2 as a state machine: the states, and where each leads. Each component below has states of its
//! own, and answers how it goes on; this file routes events to them, and between them.
//!
//! ```text
//! a request, by its pieces                                                  (request.rs)
//!
//!            ┌──────────────── look again ◄─────────────────────────────────┐
//! Next ──────┤ slice not there ─> LoadSlice ────────────────────────────────┤
//!  │ │ │ │   │ no L2 table, or a shared one ─> [ZeroTable | ReadTable ─>    │
//!  │ │ │ │   │                            CopyTable …] ─> [LinkTable] ───────┤
//!  │ │ │ │   └ no space, a claim, a buffer, … : parked where it lacks ──────┘
//!  │ │ │ └─ compressed: ReadCompressed ─> Inflate ─> Next
//!  │ │ └─── mapped, zero, or several pieces: Pieces (all ops joined) ─> Next
//!  │ └───── allocate: Cow … ─> [Publish] ─> Next                     (parts/cow.rs)
//!  └─────── end of the range: [Swept] ─> done
//!
//! resize, by its own states: [Space ─> Swept ─> WriteL1 ─> FlushL1 ─> WriteHeader]
//!          ─> [DataLength] ─> ClearBeyond ─> Swept, before WriteHeader
//!          if the disk grows, and after them if it shrinks                   (resize.rs)
//! chores:  Writeback: Counts ─> [Fence] ─> Write … ─> [Header] ─> Flush      (writeback.rs)
//!          Reserve: Turn ─> Load, Grow, Write; Table ─> Link or Header       (reserve.rs)
//!          Close: Turn ─> EmptyReserve ─> [CutEnd] ─> Flush                  (close.rs)
//! ```
//!
//! Metadata is written back: a write is done when its data is, its L2 entry changed in memory. Two
//! chores do the rest, one of each at a time, beside the requests and never in their way:
//!
//! - the *writeback* writes changed L2 slices and L1 blocks, from copies, and makes them stable. A
//!   guest's flush waits for the first writeback that begins after it came;
//! - the *reserve* keeps clusters at hand whose refcount is 1, and which nothing refers to. Requests
//!   allocate from it, in memory, while the count is on its way to disk; the writeback waits for
//!   that. Nobody else touches refcounts.
//!
//! # Why a crash leaves leaks at worst
//! See `DESIGN.md`; in short: (1) what an entry can point at is counted and within the file, stably,
//! before a table with that entry is written; (2) an entry that exposes bytes which would be wrong if the data were
//! lost *owes a fence*: its slice is written only after a flush of that data; (3) a reference is
//! given up on disk only after the entry that held it is gone from disk, stably, and nobody in
//! flight can still use what it led to; (4) tables come from space that reads as zeros, or are
//! filled and fenced before anything leads to them.

mod allocate;
mod close;
mod compress;
mod compressed;
mod corrupt;
mod image;
mod l2_table;
mod live_header;
mod metadata;
mod packing;
mod piece;
mod request;
mod reserve;
mod resize;
mod tables;
mod writeback;
mod zero_discard;

use cowbell_engine::mem::Memory;
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Pass, Step};
use cowbell_engine::units::{FileId, NodeId, Time};

use crate::parts::backing;
use crate::parts::pieces::may_pass;
use crate::qcow2::run::close::{CloseState, CloseStep};
use crate::qcow2::run::corrupt::MarkState;
use crate::qcow2::run::piece::{PIECES, RequestState};
use crate::qcow2::run::reserve::{Outcome, ReserveState, ReserveStep};
use crate::qcow2::run::resize::{ResizeState, ResizeStep};
use crate::qcow2::run::writeback::{WritebackState, WritebackStep};

pub use crate::qcow2::run::image::{Qcow2Options, Regions};
pub use crate::qcow2::run::request::Qcow2;

/// What a request or a chore is, and what it awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// A guest's request, but a resize.
    Request(RequestState),
    /// A guest's resize.
    Resize(ResizeState),
    /// Chore: changed tables go to disk.
    Writeback(WritebackState),
    /// Chore: the reserve of clusters is filled, or emptied.
    Reserve(ReserveState),
    /// Chore: the image is left clean.
    Close(CloseState),
    /// Chore: the header says that the image is corrupt.
    Mark(MarkState),
}

impl Driver for Qcow2 {
    type State = State;

    const STATES: &'static [&'static str] = &[
        "lookup",
        "space",
        "pieces",
        "load-slice",
        "read-compressed",
        "inflate",
        "table",
        "link-table",
        "read-cow",
        "copy",
        "write-data",
        "publish",
        "flush",
        "swept",
        "resize",
        "writeback",
        "reserve",
        "close",
        "deflate",
        "pack",
    ];

    #[inline]
    fn label(state: &State) -> usize {
        match state {
            State::Request(state) => state.label(),
            State::Resize(ResizeState::Space { .. }) => 1,
            State::Resize(_) | State::Mark(_) => 14,
            State::Writeback(_) => 15,
            State::Reserve(_) => 16,
            State::Close(_) => 17,
        }
    }

    #[inline]
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn unit(&self) -> u64 {
        self.image.geometry.cluster_size()
    }

    fn is_writable(&self) -> bool {
        self.image.writable
    }

    fn uses(&self, file: FileId) -> bool {
        file == self.image.file || file == self.image.data
    }

    fn below(&self) -> &[NodeId] {
        backing::below(self.disk.backing_ref())
    }

    #[inline(always)]
    fn pass_on(&mut self, io: &Io, mem: &Memory) -> Option<Pass> {
        let passes = may_pass(io.kind, self.image.writable);
        let offset = if passes { self.in_one_piece(io, mem)? } else { return None };
        Some(Pass { file: self.image.data, offset, label: PIECES })
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match cx.io().kind {
            IoKind::Truncate if self.image.writable => self.resizing().begin(cx).map(State::Resize),
            _ => self.begin_request(cx).map(State::Request),
        }
    }

    fn chore(&mut self, chore: Chore) -> Option<State> {
        match chore {
            Chore::Asked if self.corrupt.begin_asked() => Some(State::Mark(MarkState::Header)),
            Chore::Asked if self.writeback.begin_asked() => {
                Some(State::Writeback(WritebackState::Counts { begun: false }))
            }
            Chore::Asked if self.reserve.begin_asked() => Some(State::Reserve(ReserveState::Turn)),
            Chore::Asked | Chore::Deadline => None,
            Chore::Settle => self.image.writable.then_some(State::Close(CloseState::Turn)),
        }
    }

    #[inline]
    fn deadline(&self) -> Option<Time> {
        None
    }

    #[inline]
    fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        match state {
            State::Request(state) => self.step_request(state, event, cx).map(State::Request),
            State::Resize(state) => self.resizing().run(state, event, cx).map(State::Resize),
            State::Writeback(state) => {
                self.writing_back().run(state, event, cx).map(State::Writeback)
            }
            State::Reserve(state) => self.step_reserve(state, event, cx),
            State::Close(state) => self.closing().run(state, event, cx).map(State::Close),
            State::Mark(state) => {
                self.corrupt.step(state, event, &mut self.header, cx).map(State::Mark)
            }
        }
    }
}

/// The components, each with what it works with.
impl Qcow2 {
    #[inline(never)]
    fn resizing(&mut self) -> ResizeStep<'_> {
        ResizeStep {
            image: &self.image,
            resize: &mut self.resize,
            disk: &mut self.disk,
            tables: &mut self.tables,
            metadata: &mut self.metadata,
            header: &mut self.header,
            writeback: &mut self.writeback,
            reserve: &mut self.reserve,
        }
    }

    #[inline(never)]
    fn writing_back(&mut self) -> WritebackStep<'_> {
        WritebackStep {
            image: &self.image,
            writeback: &mut self.writeback,
            tables: &mut self.tables,
            header: &mut self.header,
            reserve: &mut self.reserve,
            packing: &mut self.packing,
        }
    }

    #[inline(never)]
    fn closing(&mut self) -> CloseStep<'_> {
        CloseStep {
            image: &self.image,
            header: &self.header,
            writeback: &mut self.writeback,
            reserve: &mut self.reserve,
            packing: &mut self.packing,
        }
    }

    /// A writeback gives to the reserve, which knows nothing of it: what one needs of the other is
    /// passed on here.
    #[inline(never)]
    fn step_reserve(&mut self, state: ReserveState, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        let mut step = ReserveStep {
            image: &self.image,
            reserve: &mut self.reserve,
            metadata: &mut self.metadata,
            header: &mut self.header,
            corrupt: &mut self.corrupt,
            writeback: self.writeback.result(),
            has_frees: self.writeback.has_frees(),
        };
        match step.run(state, event, cx) {
            Outcome::Wait(state) => Step::Wait(State::Reserve(state)),
            Outcome::WaitForWriteback(state) => {
                self.reserve.park_for_writeback(cx);
                self.writeback.ask(cx);
                Step::Wait(State::Reserve(state))
            }
            Outcome::Done(result) => Step::Done(result),
        }
    }
}
