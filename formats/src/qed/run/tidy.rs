//! Leaving the image as one that was closed cleanly: tables written, no spare end, no mark, all
//! stable. When it is closed, and some time after the last allocation.
//!
//! ```text
//! Turn ─> Writeback ─> [CutEnd ─> FlushCut] ─> [ClearMark] ─> done
//! ```

use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::Errno;

use crate::parts::writeback::{Writeback, WritebackState};
use crate::qed::run::changes::TableChanges;
use crate::qed::run::live_header::LiveHeader;

/// What it awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TidyState {
    /// Nothing in its way: a growth, or somebody else who changes the header.
    Turn,
    /// Tables, written and stable.
    Writeback(WritebackState),
    /// The spare end, cut off.
    CutEnd,
    /// The file's length, stable.
    FlushCut,
    /// The header without the mark, stable.
    ClearMark,
}

/// A step of it, and what it works with.
pub(super) struct TidyStep<'a> {
    /// Is nothing being allocated?
    pub idle: bool,
    pub header: &'a mut LiveHeader,
    pub writeback: &'a mut Writeback,
    pub changes: TableChanges<'a>,
}

impl TidyStep<'_> {
    pub fn run(&mut self, state: TidyState, event: Event, cx: &mut Cx<'_>) -> Step<TidyState> {
        match (state, event) {
            (TidyState::Turn, Event::Start | Event::Woken) => self.begin(cx),
            (TidyState::Writeback(state), event) => {
                let step = self.writeback.step(state, event, &mut self.changes, cx);
                self.written_back(step, cx)
            }
            (TidyState::CutEnd, Event::Io(result)) => self.end_cut(result, cx),
            (TidyState::FlushCut, Event::Io(Ok(()))) => self.clear_mark(cx),
            (TidyState::FlushCut | TidyState::ClearMark, Event::Io(result)) => {
                self.ended(result, cx)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<TidyState> {
        if !self.idle {
            // Whoever ends the last allocation sets the next date.
            return Step::Done(Ok(()));
        }
        if self.changes.space.park_while_growing(cx) || !self.header.take_turn(cx) {
            return Step::Wait(TidyState::Turn);
        }
        self.header.begin_to_tidy();
        if mutant!("qed_unmarked_before_tables") {
            return self.cut_end(cx);
        }
        let step = self.writeback.settle(&mut self.changes, cx);
        self.written_back(step, cx)
    }

    fn written_back(&mut self, step: Step<WritebackState>, cx: &mut Cx<'_>) -> Step<TidyState> {
        match step {
            Step::Wait(state) => Step::Wait(TidyState::Writeback(state)),
            Step::Go(state) => Step::Go(TidyState::Writeback(state)),
            Step::Done(Ok(())) => self.cut_end(cx),
            Step::Done(error) => self.ended(error, cx),
            Step::Last { .. } => unreachable!("who settles has all of a writeback's steps"),
        }
    }

    fn cut_end(&mut self, cx: &mut Cx<'_>) -> Step<TidyState> {
        if !self.changes.space.has_spare_end() {
            return self.clear_mark(cx);
        }
        let (file, end) = (self.changes.image.file, self.changes.space.end());
        cx.issue(Op::bare(OpKind::Truncate, file, end, 0));
        Step::Wait(TidyState::CutEnd)
    }

    fn end_cut(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<TidyState> {
        // Also when it failed: it may have happened, and what may be gone is not handed out.
        if result.is_ok() || !mutant!("spare_end_kept_after_failed_cut") {
            self.changes.space.cut();
        }
        if result.is_err() {
            return self.ended(result, cx);
        }
        if mutant!("unmarked_without_flush") {
            return self.clear_mark(cx);
        }
        cx.issue(Op::flush(self.changes.image.file));
        Step::Wait(TidyState::FlushCut)
    }

    /// Data, tables and length are stable, the file has no spare end: the mark may go.
    fn clear_mark(&mut self, cx: &mut Cx<'_>) -> Step<TidyState> {
        if self.header.write_unmarked(cx) {
            return Step::Wait(TidyState::ClearMark);
        }
        self.ended(Ok(()), cx)
    }

    fn ended(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<TidyState> {
        self.header.end_turn(cx);
        Step::Done(result)
    }
}
