//! VMDK as a state machine: the states, and where each leads. Each file below has states of its own,
//! and answers how it goes on; this one routes events to them.
//!
//! ```text
//! a request, by its pieces                                   (parts/pieces.rs, request.rs)
//!            ┌────────────── look again ◄─────────────────────────────┐
//! Next ──────┤ table not there ─> LoadTable ──────────────────────────┤
//!  │ │ │ │   │ no slot for it ─> Room (a writeback makes it) ──────────┤
//!  │ │ │ │   │ in place, and the content id is old ─> ContentId ───────┤
//!  │ │ │ │   └ no space, a claim, a buffer, … : parked where it lacks ─┘
//!  │ │ │ └─ pieces under different tables: each a request of its own, joined
//!  │ │ └─── mapped or zero: Pieces (all ops of the step, joined) ─> Next
//!  │ └───── allocate: Cow … ─> [ContentId] ─> published ─> Next  (allocate.rs, parts/cow.rs)
//!  └─────── flush: [Fence] ─> Write ─> Flush ─> Write, the redundant ones     (parts/writeback.rs)
//!
//! a deflated grain: Read … ─> Inflate ─> Next                                 (compressed.rs)
//! into a stream: [EndGone] ─> [Slot] ─> Deflate ─> [Append] ─> [Space] ─> WriteGrain ─> published ─> Next
//!                [EndGone] ─> WriteTable ─> Next                              (stream.rs)
//! chores:  the content id is written                                          (content_id.rs)
//!          a stream's end is taken away                                       (end.rs)
//!          a file grows                                                       (parts/growth.rs)
//!          Writeback: as a flush, without its end
//!          Close: Writeback ─> [StreamEnd …] ─> [Ends …] ─> Flush             (close.rs)
//! ```
//!
//! A request walks its range piece by piece. An allocating piece is all the grains that it needs
//! under one grain table, up to 512: it claims them, takes one run of space, copies at most the two
//! ends from the parent, and writes data and copies as one. Then its entries are *published*: in
//! memory, where everybody sees them. On disk they come later, whole sectors of a table at a time,
//! by a *writeback*: at a guest's flush, when the cache has no room, or when a deadline has come.
//! Nothing is flushed before. The crash argument is in `DESIGN.md`.

mod allocate;
mod changes;
mod close;
mod compressed;
mod content_id;
mod directories;
mod end;
mod extents;
mod image;
mod request;
mod stream;
mod tables;

use cowbell_engine::mem::Memory;
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, Pass, Step};
use cowbell_engine::units::{FileId, NodeId, Time};

use crate::parts::backing;
use crate::parts::growth::Growing;
use crate::parts::pieces::{Pieces, RequestState, may_pass};
use crate::parts::writeback::WritebackState;
use crate::vmdk::run::close::CloseState;
use crate::vmdk::run::content_id::WritingId;
use crate::vmdk::run::end::TakingEnd;
use crate::vmdk::run::image::{FLUSH, PIECES};
use crate::vmdk::run::request::PieceState;
use crate::vmdk::run::stream::Stream;

pub use crate::vmdk::run::image::{Regions, VmdkOptions};
pub use crate::vmdk::run::request::Vmdk;

/// What a request or a chore is, and what it awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// A guest's request.
    Request(RequestState<PieceState>),
    /// Chore: the content id is written.
    WriteId(WritingId),
    /// Chore: a stream's end is taken away.
    TakeEnd(TakingEnd),
    /// Chore: an extent's file is made longer.
    Grow(u32, Growing),
    /// Chore: changed tables go to disk.
    Writeback(WritebackState),
    /// Chore: the image is left clean.
    Close(CloseState),
}

impl Driver for Vmdk {
    type State = State;

    const STATES: &'static [&'static str] = &[
        "lookup",
        "space",
        "room",
        "pieces",
        "load-table",
        "inflate",
        "content-id",
        "cow-buffers",
        "read-cow",
        "write-data",
        "flush",
        "writeback",
        "grow",
        "close",
        "deflate",
        "copy",
        "stream-end",
    ];

    #[inline]
    fn label(state: &State) -> usize {
        match state {
            State::Request(state) => state.label(PIECES, FLUSH, PieceState::label),
            State::WriteId(_) => 6,
            State::Writeback(_) => 11,
            State::Grow(..) => 12,
            State::Close(_) => 13,
            State::TakeEnd(_) => 16,
        }
    }

    #[inline]
    fn size(&self) -> u64 {
        self.image.size
    }

    fn unit(&self) -> u64 {
        self.extents.unit()
    }

    fn is_writable(&self) -> bool {
        self.image.writable
    }

    fn uses(&self, file: FileId) -> bool {
        self.image.files.contains(&file)
    }

    fn below(&self) -> &[NodeId] {
        backing::below(self.image.backing.as_ref())
    }

    #[inline(always)]
    fn pass_on(&mut self, io: &Io, mem: &Memory) -> Option<Pass> {
        let passes = may_pass(io.kind, self.image.writable && self.id.is_written()) && io.len > 0;
        let (file, offset) = if passes { self.in_one_piece(io, mem)? } else { return None };
        Some(Pass { file, offset, label: PIECES })
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        self.begin_request(cx).map(State::Request)
    }

    fn chore(&mut self, chore: Chore) -> Option<State> {
        match chore {
            Chore::Asked => {
                let id = self.id.begin_asked().map(State::WriteId);
                let grow = |(extent, state)| State::Grow(extent, state);
                let end = |(_, stream): &mut (_, Stream)| stream.end.begin_asked();
                let end = || self.deflated.as_mut().and_then(end).map(State::TakeEnd);
                id.or_else(end)
                    .or_else(|| self.extents.begin_growth().map(grow))
                    .or_else(|| self.writeback.begin_asked().map(State::Writeback))
            }
            Chore::Deadline => Some(State::Writeback(self.writeback.begin_due())),
            Chore::Settle => self.image.writable.then_some(State::Close(CloseState::Begin)),
        }
    }

    #[inline]
    fn deadline(&self) -> Option<Time> {
        self.writeback.deadline()
    }

    #[inline]
    fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        match state {
            State::Request(state) => self.step_request(state, event, cx).map(State::Request),
            State::WriteId(state) => self.id.run(state, event, cx).map(State::WriteId),
            State::TakeEnd(state) => {
                let (_, stream) = self.deflated.as_mut().expect("it was asked for");
                stream.end.take(state, event, &self.extents, cx).map(State::TakeEnd)
            }
            State::Grow(extent, state) => {
                let step = self.extents.grow(extent, state, event, cx);
                step.map(|state| State::Grow(extent, state))
            }
            State::Writeback(state) => self.write_back(state, event, cx).map(State::Writeback),
            State::Close(state) => self.closing().run(state, event, cx).map(State::Close),
        }
    }
}
