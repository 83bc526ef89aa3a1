//! The header while the image is open: the need-check mark, tidying up, resizing.
//!
//! Whoever changes the header holds its *turn*; others park until it is free and look again. While
//! the image is being tidied up nothing is allocated.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, OpKind, Seg, Segs};
use cowbell_engine::step::{Cx, Step};
use cowbell_engine::units::{BufId, Errno, HostOffset, Time};
use cowbell_engine::wait::WaitList;

use crate::qed::disk::layout;
use crate::qed::run::{Qed, State, slices_of};

/// The need-check mark, as far as this process knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Mark {
    /// Not set, or nobody knows: set it before the next allocation.
    Clear,
    /// Set, and stable.
    Set,
}

/// The header of an open image.
#[derive(Clone, Hash, Debug)]
pub(super) struct Header {
    on_disk: layout::Header,
    pub mark: Mark,
    /// Somebody is changing the header.
    busy: bool,
    /// The image is being tidied up.
    tidying: bool,
    waiters: WaitList,
    /// When the mark shall go.
    pub unmark_at: Option<Time>,
}

impl Header {
    pub fn new(on_disk: layout::Header) -> Header {
        let mark = if on_disk.needs_check() { Mark::Set } else { Mark::Clear };
        let waiters = WaitList::new();
        Header { on_disk, mark, busy: false, tidying: false, waiters, unmark_at: None }
    }

    #[inline]
    pub fn header_bytes(&self) -> u64 {
        self.on_disk.header_bytes()
    }

    pub fn l1_offset(&self) -> HostOffset {
        self.on_disk.l1_offset
    }

    pub fn assert_idle(&self) {
        assert!(!self.busy && !self.tidying && self.waiters.is_empty(), "{self:?}");
    }
}

impl Qed {
    /// May something be allocated? Else the step that makes it so, or waits.
    pub(super) fn ready_to_allocate(
        &mut self,
        at: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), Step<State>> {
        let header = &mut self.header;
        let marked = header.mark == Mark::Set || mutant!("never_marked");
        if marked && !header.tidying {
            return Ok(());
        }
        if header.busy {
            cx.park(&mut header.waiters);
            return Err(Step::Wait(State::Next { at }));
        }
        let Some([buf]) = cx.take_bufs() else {
            cx.park_for_bufs();
            return Err(Step::Wait(State::Next { at }));
        };
        self.header.busy = true;
        let mut marked = self.header.on_disk.clone();
        marked.set_needs_check(true);
        self.write_header(&marked, !mutant!("mark_not_flushed"), buf, cx);
        Err(Step::Wait(State::WriteMark { at, buf }))
    }

    /// One write of the header's first block; only its first sector differs from what is there.
    /// `fua`: it is done when it is stable.
    fn write_header(&self, header: &layout::Header, fua: bool, buf: BufId, cx: &mut Cx<'_>) {
        let len = self.block(cx) as usize;
        cx.mem().pool_mut(buf)[..len].copy_from_slice(&header.encode()[..len]);
        let seg = Seg { base: Base::Pool(buf), off: 0, len: len as u32 };
        let kind = OpKind::Write { fua };
        cx.issue(Op { kind, ..Op::write(self.file, 0, Segs::one(seg)) });
    }

    fn free_header(&mut self, cx: &mut Cx<'_>) {
        self.header.busy = false;
        self.header.tidying = false;
        cx.wake_all(&mut self.header.waiters);
    }

    /// The mark is stable, or nobody knows.
    pub(super) fn mark_written(
        &mut self,
        at: u64,
        buf: BufId,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        cx.give_buf(buf);
        self.free_header(cx);
        match result {
            Ok(()) => {
                self.header.mark = Mark::Set;
                self.header.on_disk.set_needs_check(true);
                self.allocation_ended(cx);
                Step::Go(State::Next { at })
            }
            Err(errno) => Step::Done(Err(errno)),
        }
    }

    /// Something that was being allocated no longer is: when nothing is, the mark may go in time.
    pub(super) fn allocation_ended(&mut self, cx: &Cx<'_>) {
        let idle = self.claims.is_empty() && self.allocs.is_empty();
        if idle && self.header.mark == Mark::Set {
            self.header.unmark_at = Some(cx.now().plus_ms(self.options.unmark_after_ms));
        }
    }

    /// Chore: leaves the image as one that was closed cleanly: no spare end, no mark, all stable.
    pub(super) fn tidy(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if !self.claims.is_empty() || !self.allocs.is_empty() {
            // Whoever ends the last of them sets the next date.
            return Step::Done(Ok(()));
        }
        if self.space.is_growing() {
            cx.park(&mut self.space.waiters);
            return Step::Wait(State::Tidy);
        }
        if self.header.busy {
            cx.park(&mut self.header.waiters);
            return Step::Wait(State::Tidy);
        }
        self.header.busy = true;
        self.header.tidying = true;
        if self.space.has_spare_end() {
            cx.issue(Op::bare(OpKind::Truncate, self.file, self.space.end(), 0));
            return Step::Wait(State::CutEnd);
        }
        self.flush(cx);
        Step::Wait(State::FlushTidy)
    }

    pub(super) fn end_cut(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<State> {
        // Also when it failed: it may have happened, and what may be gone is not handed out.
        if result.is_ok() || !mutant!("spare_end_kept_after_failed_cut") {
            self.space.cut();
        }
        if let Err(errno) = result {
            return self.tidied(Err(errno), cx);
        }
        if mutant!("unmarked_without_flush") {
            return self.tidy_flushed(Ok(()), cx);
        }
        self.flush(cx);
        Step::Wait(State::FlushTidy)
    }

    /// Data and tables are stable, the file has no spare end: the mark may go.
    pub(super) fn tidy_flushed(
        &mut self,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if result.is_err() || self.header.mark == Mark::Clear {
            return self.tidied(result, cx);
        }
        let Some([buf]) = cx.take_bufs() else {
            cx.park_for_bufs();
            return Step::Wait(State::MarkBuf);
        };
        // From here on nobody knows whether the mark is set, until the write has succeeded.
        self.header.mark = Mark::Clear;
        self.header.on_disk.set_needs_check(false);
        self.write_header(&self.header.on_disk, false, buf, cx);
        Step::Wait(State::ClearMark { buf })
    }

    /// The header is written, without the mark or with another size: make it stable, in `then`.
    pub(super) fn header_written(
        &mut self,
        buf: BufId,
        result: Result<(), Errno>,
        then: State,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        cx.give_buf(buf);
        if result.is_err() {
            return self.tidied(result, cx);
        }
        self.flush(cx);
        Step::Wait(then)
    }

    pub(super) fn tidied(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<State> {
        self.free_header(cx);
        Step::Done(result)
    }

    /// Guest resize: QED only grows, and only the header tells.
    pub(super) fn resize(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        if self.geometry.check_image_size(size).is_err() {
            return Step::Done(Err(Errno::INVALID));
        }
        // A longer backing file would shine through where the guest is to see zeros.
        let uncovers = size > self.size && self.backing.is_some_and(|b| b.size > self.size);
        if size < self.size || uncovers {
            return Step::Done(Err(Errno::NOT_SUPPORTED));
        }
        if self.header.busy {
            cx.park(&mut self.header.waiters);
            return Step::Wait(State::Resize);
        }
        let Some([buf]) = cx.take_bufs() else {
            cx.park_for_bufs();
            return Step::Wait(State::Resize);
        };
        self.header.busy = true;
        self.load_l1_or_write_size(buf, cx)
    }

    /// The L1 entries that the new size needs are read first: they need not be zeros.
    fn load_l1_or_write_size(&mut self, buf: BufId, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        let have = self.l1.len() as u64;
        let need = self.geometry.l1_entries(size);
        if have < need {
            // Whole blocks, as at open: an L1 sector is written whole.
            let bytes = ((self.geometry.table_entries() - have) * 8).min(cx.buf_size());
            let seg = Seg { base: Base::Pool(buf), off: 0, len: bytes as u32 };
            cx.issue(self.read_op(self.header.l1_offset().0 + have * 8, Segs::one(seg)));
            return Step::Wait(State::LoadL1 { from: have as u32, buf });
        }
        let mut header = self.header.on_disk.clone();
        header.image_size = size;
        self.write_header(&header, false, buf, cx);
        Step::Wait(State::WriteSize { buf })
    }

    pub(super) fn l1_loaded(
        &mut self,
        from: u32,
        buf: BufId,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if result.is_err() {
            cx.give_buf(buf);
            return self.tidied(result, cx);
        }
        debug_assert_eq!(from as usize, self.l1.len());
        let bytes = ((self.geometry.table_entries() - from as u64) * 8).min(cx.buf_size());
        let (entries, _) = cx.mem().pool(buf)[..bytes as usize].as_chunks::<8>();
        self.l1.extend(entries.iter().map(|entry| u64::from_le_bytes(*entry)));
        self.disarm_l1(from as usize);
        self.load_l1_or_write_size(buf, cx)
    }

    pub(super) fn size_flushed(
        &mut self,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if result.is_ok() {
            self.size = cx.io().offset;
            self.header.on_disk.image_size = self.size;
            self.past_end.extend(slices_of(self.geometry, self.size));
        }
        self.tidied(result, cx)
    }
}
