//! Leaving the image as one that was closed: the map written, no spare end, an exact count, all stable.

use cowbell_engine::op::Op;
use cowbell_engine::step::{Cx, Event, Step};

use crate::parts::writeback::{Writeback, WritebackState};
use crate::vdi::run::map::{FLUSH, Map};

/// What the chore awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CloseState {
    /// Nothing stands in the way.
    Turn,
    /// The map, written and stable.
    Writeback(WritebackState),
    /// The spare end, cut off; the exact count, written.
    Ends,
}

/// A step of the chore, and what it works with.
pub(super) struct CloseStep<'a> {
    pub map: &'a mut Map,
    pub writeback: &'a mut Writeback,
}

impl CloseStep<'_> {
    pub fn run(&mut self, state: CloseState, event: Event, cx: &mut Cx<'_>) -> Step<CloseState> {
        match (state, event) {
            (CloseState::Turn, Event::Start | Event::Woken) => {
                if self.map.space.park_while_growing(cx) {
                    return Step::Wait(CloseState::Turn);
                }
                let step = self.writeback.settle(&mut self.map, cx);
                self.written(step, cx)
            }
            (CloseState::Writeback(state), event) => {
                let step = self.writeback.step(state, event, &mut self.map, cx);
                self.written(step, cx)
            }
            (CloseState::Ends, Event::Io(result)) => {
                self.map.made_exact(result);
                if result.is_err() {
                    return Step::Done(result);
                }
                cx.issue(Op::flush(self.map.file()));
                Step::Last { label: FLUSH }
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// The writeback goes on; behind it the file's end is next.
    fn written(&mut self, step: Step<WritebackState>, cx: &mut Cx<'_>) -> Step<CloseState> {
        match step {
            Step::Done(Ok(())) if self.map.make_exact(cx) => Step::Wait(CloseState::Ends),
            step => step.map(CloseState::Writeback),
        }
    }
}
