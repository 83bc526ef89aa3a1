//! VDI as a state machine: the states, and where each leads. Each file below has its own; this one
//! routes events to them.
//!
//! ```text
//! a request, by its pieces                              (parts/pieces.rs, request.rs)
//!             ┌─────────── look again ◄─────────────────────────┐
//! Next, Space ┼─ mapped or zeros: Pieces (all ops joined) ─> Next
//!             ├─ allocate: WriteData ─> published ─> Next       │
//!             ├─ no space, or a claim in the way: parked ───────┘
//!             └─ end of the range: [Flush] ─> done
//!
//! chores: Grow                                                  (parts/growth.rs)
//!         Writeback, as a flush: [count] ─> [fence] ─> map ─> flush
//!                                                    (parts/writeback.rs, map.rs)
//!         Close: Turn ─> Writeback ─> [Ends ─> flush]                   (map.rs)
//! ```
//!
//! The block map is in memory whole: a lookup never waits. Allocating pieces of different requests
//! run side by side, and wait for nothing but their data. The crash argument is in `DESIGN.md`.

mod map;
mod request;

use cowbell_engine::mem::Memory;
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, Pass, Step};
use cowbell_engine::units::{FileId, Time};

use crate::parts::growth::Growing;
use crate::parts::pieces::{Pieces, RequestState, may_pass};
use crate::parts::writeback::WritebackState;
use crate::vdi::disk::layout::Entry;
use crate::vdi::run::map::{CloseState, FLUSH};
use crate::vdi::run::request::{PIECES, PieceState};

pub use crate::vdi::run::request::{Vdi, VdiOptions};

/// What a request or a chore is, and what it awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// A guest's request.
    Request(RequestState<PieceState>),
    /// Chore: the file is made longer.
    Grow(Growing),
    /// Chore: the map goes to disk.
    Writeback(WritebackState),
    /// Chore: the image is left clean.
    Close(CloseState),
}

impl Driver for Vdi {
    type State = State;

    const STATES: &'static [&'static str] =
        &["lookup", "space", "pieces", "write-data", "flush", "writeback", "grow", "close"];

    fn label(state: &State) -> usize {
        match state {
            State::Request(state) => state.label(PIECES, FLUSH, |state| match state {
                PieceState::Space { .. } => 1,
                PieceState::WriteData { .. } => 3,
            }),
            State::Writeback(_) => 5,
            State::Grow(_) => 6,
            State::Close(_) => 7,
        }
    }

    #[inline]
    fn size(&self) -> u64 {
        self.map.image().header.size
    }

    fn unit(&self) -> u64 {
        self.block_size()
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn uses(&self, file: FileId) -> bool {
        file == self.map.file()
    }

    #[inline(always)]
    fn pass_on(&mut self, io: &Io, _: &Memory) -> Option<Pass> {
        let passes = may_pass(io.kind, self.writable);
        let image = self.map.image();
        match image.run_at(io.offset, io.end()) {
            Some((Entry::Block(block), end)) if passes && end == io.end() => {
                let offset = image.host_of(block, io.offset);
                Some(Pass { file: self.map.file(), offset, label: PIECES })
            }
            _ => None,
        }
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        self.begin_request(cx).map(State::Request)
    }

    fn chore(&mut self, chore: Chore) -> Option<State> {
        match chore {
            Chore::Asked => self.map.space.begin_asked().map(State::Grow),
            Chore::Deadline => Some(State::Writeback(self.writeback.begin_due())),
            Chore::Settle => self.writable.then_some(State::Close(CloseState::Turn)),
        }
    }

    #[inline]
    fn deadline(&self) -> Option<Time> {
        self.writeback.deadline()
    }

    fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        match state {
            State::Request(state) => self.step_request(state, event, cx).map(State::Request),
            State::Grow(state) => self.map.grow(state, event, cx).map(State::Grow),
            State::Writeback(state) => self.write_back(state, event, cx).map(State::Writeback),
            State::Close(state) => {
                self.map.close(&mut self.writeback, state, event, cx).map(State::Close)
            }
        }
    }
}
