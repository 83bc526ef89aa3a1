//! Leaving the image clean: all that is in memory goes to disk, what is in reserve is counted down,
//! the file's spare end is cut off.

use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::step::{Cx, Event, Step};

use crate::qcow2::run::image::Image;
use crate::qcow2::run::live_header::LiveHeader;
use crate::qcow2::run::packing::Packing;
use crate::qcow2::run::reserve::Reserve;
use crate::qcow2::run::writeback::Writeback;

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

/// A step of the chore, and what it works with.
pub(super) struct CloseStep<'a> {
    pub image: &'a Image,
    pub header: &'a LiveHeader,
    pub writeback: &'a mut Writeback,
    pub reserve: &'a mut Reserve,
    pub packing: &'a mut Packing,
}

impl CloseStep<'_> {
    pub fn run(&mut self, state: CloseState, event: Event, cx: &mut Cx<'_>) -> Step<CloseState> {
        match (state, event) {
            (CloseState::Turn, Event::Start) if self.writeback.is_dirty(self.header) => {
                self.writeback.park(cx);
                Step::Wait(CloseState::Turn)
            }
            (CloseState::Turn, Event::Start) => self.empty_reserve(cx),
            (CloseState::Turn, Event::Woken) => match self.writeback.result() {
                Ok(()) => self.empty_reserve(cx),
                Err(errno) => Step::Done(Err(errno)),
            },
            (CloseState::EmptyReserve, Event::Woken) if !self.reserve.is_emptied() => {
                self.reserve.empty(cx);
                Step::Wait(CloseState::EmptyReserve)
            }
            (CloseState::EmptyReserve, Event::Woken) => match self.reserve.emptied() {
                Ok(()) => self.cut_end(cx),
                Err(errno) => Step::Done(Err(errno)),
            },
            (CloseState::CutEnd, Event::Io(Ok(()))) => {
                self.reserve.cut();
                self.flush(cx)
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

    fn empty_reserve(&mut self, cx: &mut Cx<'_>) -> Step<CloseState> {
        self.packing.close();
        if self.reserve.is_corrupt() {
            // What is in reserve stays counted: a leak.
            return self.flush(cx);
        }
        self.reserve.empty(cx);
        Step::Wait(CloseState::EmptyReserve)
    }

    fn cut_end(&mut self, cx: &mut Cx<'_>) -> Step<CloseState> {
        match self.reserve.spare_end() {
            Some(end) => {
                cx.issue(Op::bare(OpKind::Truncate, self.image.file, end, 0));
                Step::Wait(CloseState::CutEnd)
            }
            None => self.flush(cx),
        }
    }

    fn flush(&mut self, cx: &mut Cx<'_>) -> Step<CloseState> {
        self.image.flush_files(cx);
        Step::Wait(CloseState::Flush)
    }
}
