//! QED as a state machine: the states, and where each leads. Each file below has states of its own,
//! and answers how it goes on; this one routes events to them.
//!
//! ```text
//! a request, by its pieces                                 (parts/pieces.rs, request.rs)
//!
//!            ┌────────────── look again ◄───────────────────────────────┐
//! Next ──────┤ slice not there ─> LoadSlice ────────────────────────────┤
//!  │ │ │ │   │ no slot for it ─> Room (a writeback makes it) ────────────┤
//!  │ │ │ │   │ first allocation ─> Mark ────────────────────────────────┤
//!  │ │ │ │   │ no L2 table: made, in memory ────────────────────────────┤
//!  │ │ │ │   └ no space, a claim, a buffer, … : parked where it lacks ──┘
//!  │ │ │ └─ mapped or zero: Pieces (all ops of the step, joined) ─> Next
//!  │ │ └─── allocate: Cow … ─> published in memory ─> Next  (allocate.rs, parts/cow.rs)
//!  │ └───── end of the range: [Flush] ─> done
//!  └─────── flush: [Fence] ─> Write ─> Flush                             (parts/writeback.rs)
//!
//! resize:  Turn ─> [LoadL1 …] ─> WriteSize                                  (resize.rs)
//! chores:  the file grows                                                   (parts/growth.rs)
//!          Writeback: as a flush, without its end
//!          Tidy: Turn ─> Writeback ─> [CutEnd ─> FlushCut] ─> [ClearMark]   (tidy.rs)
//! ```
//!
//! A request walks its range piece by piece. Allocating pieces of different requests run side by
//! side: each *claims* its clusters, takes space from a bump counter, writes its data, and then
//! publishes its entries in memory. On disk they come later, by a *writeback*: at a guest's flush,
//! when the cache has no room, or when a deadline has come. An L2 table is made in memory alone: its
//! space is zeros, which as a table is empty. What waits for others is only: overlapping allocations
//! (one waits for the other's claim), and all allocations while the header's need-check mark changes.
//!
//! # Why a crash leaves leaks at worst
//! See `DESIGN.md`; in short: (1) the file's length is stable before an entry that leads there is
//! written, and what was never written reads as an empty table, as zeros; (2) where there is a
//! backing file, data is stable before its entry is written; (3) the need-check mark is stable before
//! the first allocation, and goes only when everything is stable, nothing is being allocated and the
//! file's spare end is cut off.

mod allocate;
mod changes;
mod image;
mod live_header;
mod request;
mod resize;
mod tables;
mod tidy;

use cowbell_engine::mem::Memory;
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Pass, Step};
use cowbell_engine::units::{FileId, NodeId, Time};

use crate::parts::backing;
use crate::parts::growth::Growing;
use crate::parts::pieces::{Pieces, RequestState, may_pass};
use crate::parts::writeback::WritebackState;
use crate::qed::run::image::FLUSH;
use crate::qed::run::request::{PIECES, PieceState};
use crate::qed::run::resize::{ResizeState, ResizeStep};
use crate::qed::run::tidy::TidyState;

pub use crate::qed::run::image::{QedOptions, Regions};
pub use crate::qed::run::request::Qed;

/// What a request or a chore is, and what it awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// A guest's request, but a resize.
    Request(RequestState<PieceState>),
    /// A guest's resize.
    Resize(ResizeState),
    /// Chore: the file is made longer.
    Grow(Growing),
    /// Chore: changed tables go to disk.
    Writeback(WritebackState),
    /// Chore: the image is left clean.
    Tidy(TidyState),
}

impl Driver for Qed {
    type State = State;

    const STATES: &'static [&'static str] = &[
        "lookup",
        "space",
        "room",
        "pieces",
        "load-slice",
        "write-mark",
        "cow-buffers",
        "read-cow",
        "copy",
        "write-data",
        "flush",
        "resize",
        "grow",
        "writeback",
        "tidy",
    ];

    #[inline]
    fn label(state: &State) -> usize {
        match state {
            State::Request(state) => state.label(PIECES, FLUSH, PieceState::label),
            State::Resize(_) => 11,
            State::Grow(_) => 12,
            State::Writeback(_) => 13,
            State::Tidy(_) => 14,
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
        file == self.image.file
    }

    fn below(&self) -> &[NodeId] {
        backing::below(self.disk.backing_ref())
    }

    #[inline(always)]
    fn pass_on(&mut self, io: &Io, mem: &Memory) -> Option<Pass> {
        let passes = may_pass(io.kind, self.image.writable);
        let offset = if passes { self.in_one_piece(io, mem)?.0 } else { return None };
        Some(Pass { file: self.image.file, offset, label: PIECES })
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match cx.io().kind {
            IoKind::Truncate if self.image.writable => self.resizing().begin(cx).map(State::Resize),
            _ => self.begin_request(cx).map(State::Request),
        }
    }

    fn chore(&mut self, chore: Chore) -> Option<State> {
        match chore {
            Chore::Asked => match self.space.begin_asked() {
                Some(growing) => Some(State::Grow(growing)),
                None => self.writeback.begin_asked().map(State::Writeback),
            },
            // Which is due? The first of the two. Who tidies up writes the tables, too.
            Chore::Deadline => match (self.writeback.deadline(), self.header.unmark_at()) {
                (Some(due), Some(unmark_at)) if unmark_at <= due => Some(self.begin_to_tidy()),
                (Some(_), _) => Some(State::Writeback(self.writeback.begin_due())),
                (None, Some(_)) => Some(self.begin_to_tidy()),
                (None, None) => None,
            },
            Chore::Settle => self.image.writable.then(|| self.begin_to_tidy()),
        }
    }

    #[inline]
    fn deadline(&self) -> Option<Time> {
        let (due, unmark_at) = (self.writeback.deadline(), self.header.unmark_at());
        due.into_iter().chain(unmark_at).min()
    }

    #[inline]
    fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        match state {
            State::Request(state) => self.step_request(state, event, cx).map(State::Request),
            State::Resize(state) => self.resizing().run(state, event, cx).map(State::Resize),
            State::Grow(state) => {
                let place = Some((self.image.file, 0));
                self.space.grow(state, event, place, cx).map(State::Grow)
            }
            State::Writeback(state) => self.write_back(state, event, cx).map(State::Writeback),
            State::Tidy(state) => self.tidying().run(state, event, cx).map(State::Tidy),
        }
    }
}

/// The components, each with what it works with.
impl Qed {
    fn resizing(&mut self) -> ResizeStep<'_> {
        ResizeStep {
            image: &self.image,
            disk: &mut self.disk,
            tables: &mut self.tables,
            header: &mut self.header,
        }
    }

    /// The mark's date is over, whether it goes now or is set again.
    fn begin_to_tidy(&mut self) -> State {
        self.header.keep_mark();
        State::Tidy(TidyState::Turn)
    }
}
