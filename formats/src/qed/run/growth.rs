//! New clusters, and the chore that makes the file longer: a truncate and a flush. What lies below
//! the flushed length may be handed out, so it reads as zeros until it is written, also after a
//! crash.

use cowbell_engine::mutant;
use cowbell_engine::step::{Cx, Step};
use cowbell_engine::units::Errno;

use crate::parts::growth::Taken;
use crate::qed::run::{Qed, State};

impl Qed {
    /// `bytes` bytes of space for the request at `at`, or the step that waits for them.
    pub(super) fn take_space(
        &mut self,
        bytes: u64,
        for_table: bool,
        at: u64,
        cx: &mut Cx<'_>,
    ) -> Result<u64, Step<State>> {
        let (taken, grow) = self.space.take(bytes, for_table);
        if grow {
            cx.ask();
        }
        match taken {
            Taken::At(offset) => Ok(offset),
            Taken::None(errno) => Err(Step::Done(Err(errno))),
            Taken::Later => {
                // Tidying up would cut off what is being grown, for it to be grown again.
                self.header.unmark_at = None;
                cx.park(&mut self.space.waiters);
                Err(Step::Wait(State::Space { at, attempt: self.space.attempt }))
            }
        }
    }

    /// Chore: makes the file `to` bytes long.
    pub(super) fn grow(&mut self, to: u64, exact: bool, cx: &mut Cx<'_>) -> Step<State> {
        cx.issue(self.space.op(self.file, to));
        Step::Wait(State::Grow { to, exact })
    }

    pub(super) fn grown(
        &mut self,
        to: u64,
        exact: bool,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match (result, self.space.lesser_goal()) {
            (Ok(()), _) if mutant!("growth_used_before_stable") => {
                self.growth_flushed(to, Ok(()), cx)
            }
            (Ok(()), _) => {
                self.flush(cx);
                Step::Wait(State::FlushGrow { to })
            }
            (Err(_), Some(to)) if !exact => Step::Go(State::Grow { to, exact: true }),
            (Err(errno), _) => self.growth_flushed(to, Err(errno), cx),
        }
    }

    /// The new length is stable: what lies below it may be handed out.
    pub(super) fn growth_flushed(
        &mut self,
        to: u64,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        self.space.grown(to, result);
        cx.wake_all(&mut self.space.waiters);
        Step::Done(result)
    }
}
