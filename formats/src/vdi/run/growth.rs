//! The chores: making the file longer, and leaving it tidy.
//!
//! What lies below the grown end may be handed out when the file's length and the header that counts
//! it are stable.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, OpKind, Seg, Segs};
use cowbell_engine::step::{Cx, Step};
use cowbell_engine::units::{BufId, Errno};

use crate::vdi::disk::layout::HEADER_BYTES;
use crate::vdi::run::{State, Vdi};

impl Vdi {
    /// Makes the blocks take `to` bytes.
    pub(super) fn grow(&mut self, to: u64, exact: bool, cx: &mut Cx<'_>) -> Step<State> {
        if self.is_device() {
            // It is there: it is counted.
            return self.write_count(to, cx);
        }
        let mut op = self.space.op(self.file, to);
        op.offset += self.image.header.data_offset;
        cx.issue(op);
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
            (Ok(()), _) => self.write_count(to, cx),
            (Err(_), Some(to)) if !exact => Step::Go(State::Grow { to, exact: true }),
            (Err(errno), _) => self.growth_flushed(to, Err(errno), cx),
        }
    }

    /// Counts the blocks of `to` bytes as allocated, before they are.
    pub(super) fn write_count(&mut self, to: u64, cx: &mut Cx<'_>) -> Step<State> {
        let Some([buf]) = cx.take_bufs() else {
            cx.park_for_bufs();
            return Step::Wait(State::WriteCount { to, buf: None });
        };
        if mutant!("vdi_count_not_written") {
            return self.count_written(to, buf, Ok(()), cx);
        }
        self.write_header(to, buf, cx);
        Step::Wait(State::WriteCount { to, buf: Some(buf) })
    }

    /// Writes the header with a count of the blocks in `bytes` bytes.
    fn write_header(&mut self, bytes: u64, buf: BufId, cx: &mut Cx<'_>) {
        self.exact = false;
        let header = &mut self.image.header;
        header.allocated = (bytes >> header.block_bits) as u32;
        cx.mem().pool_mut(buf)[..HEADER_BYTES].copy_from_slice(&header.encode());
        let seg = Seg { base: Base::Pool(buf), off: 0, len: HEADER_BYTES as u32 };
        cx.issue(Op::write(self.file, 0, Segs::one(seg)));
    }

    pub(super) fn count_written(
        &mut self,
        to: u64,
        buf: BufId,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        cx.give_buf(buf);
        if result.is_err() || mutant!("vdi_growth_not_stable") {
            return self.growth_flushed(to, result, cx);
        }
        self.flush(cx);
        Step::Wait(State::FlushGrow { to })
    }

    /// Length and count are stable: what lies below may be handed out.
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

    /// Leaves the image as one that was closed cleanly: no spare end, an exact count, all stable.
    pub(super) fn tidy(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.space.is_growing() {
            cx.park(&mut self.space.waiters);
            return Step::Wait(State::Tidy);
        }
        let (spare, end) = (self.space.has_spare_end(), self.space.end());
        if !spare && self.exact {
            self.flush(cx);
            return Step::Wait(State::FlushTidy);
        }
        let Some([buf]) = cx.take_bufs() else {
            cx.park_for_bufs();
            return Step::Wait(State::Tidy);
        };
        // In either order: no entry names a block in the spare end.
        self.write_header(if mutant!("vdi_count_not_exact") { u64::MAX } else { end }, buf, cx);
        if spare && !self.is_device() {
            let len = self.image.header.data_offset + end;
            cx.issue(Op::bare(OpKind::Truncate, self.file, len, 0));
        }
        Step::Wait(State::Ends { buf })
    }

    pub(super) fn ends_made(
        &mut self,
        buf: BufId,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        cx.give_buf(buf);
        // Also when it failed: it may have happened, and what may be gone or is not counted is not
        // handed out.
        if result.is_ok() || !mutant!("vdi_spare_end_kept") {
            self.space.cut();
        }
        if result.is_err() {
            return Step::Done(result);
        }
        self.exact = true;
        self.flush(cx);
        Step::Wait(State::FlushTidy)
    }
}
