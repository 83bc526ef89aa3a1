//! Leaving the image clean: all that is in memory goes to disk, what is in reserve is counted down,
//! the file's spare end is cut off.

use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::step::{Cx, Event, Step};

use crate::qcow2::run::{Qcow2, State};

/// What the chore awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CloseState {
    /// A writeback, so that the tables are on disk.
    Turn,
    /// Nothing is in reserve.
    EmptyReserve,
    /// The spare end, cut off.
    CutEnd,
    /// Everything, stable.
    Flush,
}

impl Qcow2 {
    pub(super) fn step_close(
        &mut self,
        state: CloseState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match (state, event) {
            (CloseState::Turn, Event::Start) if self.corrupt.are_counts() && !self.is_dirty() => {
                self.flush_closed(cx)
            }
            (CloseState::Turn, Event::Start) if self.is_dirty() => {
                self.park_for_writeback(cx);
                Step::Wait(State::Close(CloseState::Turn))
            }
            (CloseState::Turn, Event::Start) => self.empty_reserve(cx),
            (CloseState::Turn, Event::Woken) => match self.writeback.result() {
                // What is in reserve stays counted: a leak.
                Ok(()) if self.corrupt.are_counts() => self.flush_closed(cx),
                Ok(()) => self.empty_reserve(cx),
                Err(errno) => Step::Done(Err(errno)),
            },
            (CloseState::EmptyReserve, Event::Woken) if !self.reserve.is_settled() => {
                self.empty_reserve(cx)
            }
            (CloseState::EmptyReserve, Event::Woken) => match self.reserve_emptied() {
                Ok(()) => self.cut_end(cx),
                Err(errno) => Step::Done(Err(errno)),
            },
            (CloseState::CutEnd, Event::Io(Ok(()))) => {
                self.reserve.cut();
                self.flush_closed(cx)
            }
            // The spare end may still be there, with whatever was in it: it is as it was before.
            (CloseState::CutEnd, Event::Io(Err(errno))) => {
                if mutant!("qcow2_failed_cut_is_done") {
                    self.reserve.cut();
                }
                Step::Done(Err(errno))
            }
            (CloseState::Flush, Event::Io(result)) => Step::Done(result),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn cut_end(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match self.reserve.spare_end() {
            Some(end) => {
                cx.issue(Op::bare(OpKind::Truncate, self.file, end, 0));
                Step::Wait(State::Close(CloseState::CutEnd))
            }
            None => self.flush_closed(cx),
        }
    }

    fn flush_closed(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        self.flush_files(cx);
        Step::Wait(State::Close(CloseState::Flush))
    }
}
