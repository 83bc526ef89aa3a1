//! Leaving the image as one that was closed: tables written, a stream's end, no spare ends, all stable.
//!
//! ```text
//! Begin ─> Writeback ─> [StreamEnd …] ─> [Ends …] ─> Flush
//! ```

use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::step::{Cx, Event, Step};

use crate::parts::writeback::{Writeback, WritebackState};
use crate::vmdk::run::changes::TableChanges;
use crate::vmdk::run::end::WritingEnd;
use crate::vmdk::run::stream::Stream;

/// What the chore awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CloseState {
    /// To begin.
    Begin,
    /// Tables, written and stable.
    Writeback(WritebackState),
    /// A stream's end, written.
    StreamEnd(WritingEnd),
    /// The spare ends of the files before extent `next`, cut off.
    Ends {
        /// See there.
        next: u32,
    },
    /// All of it, stable.
    Flush(WritebackState),
}

/// A step of the chore, and what it works with.
pub(super) struct CloseStep<'a> {
    pub stream: Option<&'a mut Stream>,
    pub writeback: &'a mut Writeback,
    pub changes: TableChanges<'a>,
}

impl CloseStep<'_> {
    pub fn run(&mut self, state: CloseState, event: Event, cx: &mut Cx<'_>) -> Step<CloseState> {
        match (state, event) {
            (CloseState::Begin, Event::Start) => {
                let step = self.writeback.settle(&mut self.changes, cx);
                self.written_back(step, cx)
            }
            (CloseState::Writeback(state), event) => {
                let step = self.writeback.step(state, event, &mut self.changes, cx);
                self.written_back(step, cx)
            }
            (CloseState::StreamEnd(state), Event::Io(Ok(()))) => {
                let stream = self.stream.as_mut().expect("it is being ended");
                match stream.end.go_on_writing(state, self.changes.extents, cx) {
                    Some(state) => Step::Wait(CloseState::StreamEnd(state)),
                    None => self.cut_ends(0, cx),
                }
            }
            (CloseState::Ends { next }, Event::Io(Ok(()))) => self.cut_ends(next, cx),
            (CloseState::StreamEnd(_) | CloseState::Ends { .. }, Event::Io(error)) => {
                Step::Done(error)
            }
            (CloseState::Flush(state), event) => {
                self.writeback.step(state, event, &mut self.changes, cx).map(CloseState::Flush)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// The writeback goes on; behind it the files' ends are next.
    fn written_back(&mut self, step: Step<WritebackState>, cx: &mut Cx<'_>) -> Step<CloseState> {
        if !matches!(step, Step::Done(Ok(()))) {
            return step.map(CloseState::Writeback);
        }
        let TableChanges { extents, tables, .. } = &self.changes;
        let stream = self.stream.as_mut();
        match stream.and_then(|stream| stream.end.begin_writing(extents, tables, cx)) {
            Some(state) => Step::Wait(CloseState::StreamEnd(state)),
            None => self.cut_ends(0, cx),
        }
    }

    /// Cuts the spare ends of the files off, from extent `next` on; then all is made stable.
    fn cut_ends(&mut self, next: u32, cx: &mut Cx<'_>) -> Step<CloseState> {
        let extents = &mut *self.changes.extents;
        let (mut next, mut issued) = (next as usize, false);
        while next < extents.len() && !(issued && cx.room() == 0) {
            let has_spare = extents.get(next).sparse().is_some_and(|grains| {
                // A stream's end is behind its grains.
                !grains.has_footer && grains.space.has_spare_end() && !grains.space.is_growing()
            });
            if has_spare {
                let (file, space) = (extents.get(next).file, extents.space(next));
                cx.issue(Op::bare(OpKind::Truncate, file, space.end(), 0));
                issued = true;
                // Also if it fails: it may have happened, and what may be gone is not handed out.
                extents.space(next).cut();
            }
            next += 1;
        }
        if issued {
            return Step::Wait(CloseState::Ends { next: next as u32 });
        }
        self.writeback.flush(&mut self.changes, cx).map(CloseState::Flush)
    }
}
