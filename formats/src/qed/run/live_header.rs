//! The header while the image is open: the need-check mark and the disk's size.
//!
//! Whoever changes the header holds its *turn*; others park until it is free and look again. A
//! change is one write that is stable when it ends. While the image is being tidied up nothing is
//! allocated.

use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind, Segs};
use cowbell_engine::step::Cx;
use cowbell_engine::units::{Errno, Time};
use cowbell_engine::wait::{On, WaitList};

use crate::qed::disk::layout::Header;
use crate::qed::run::image::{Image, SLICE_BYTES};

/// The need-check mark, as far as this process knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Mark {
    /// Not set, or nobody knows: set it before the next allocation.
    Clear,
    /// Set, and stable.
    Set,
}

/// Why nothing may be allocated yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NotReady {
    /// The header's turn is somebody else's: the request is parked, and looks again.
    Parked,
    /// The mark is being written: call [`LiveHeader::marked`] when it is.
    Marking,
}

/// The header of an open image.
#[derive(Clone, Hash, Debug)]
pub(super) struct LiveHeader {
    image: Image,
    on_disk: Header,
    mark: Mark,
    /// Somebody is changing it.
    busy: bool,
    /// The image is being tidied up.
    tidying: bool,
    waiters: WaitList,
    /// When the mark shall go, and how many milliseconds after the last allocation.
    unmark_at: Option<Time>,
    unmark_after_ms: u64,
}

impl LiveHeader {
    pub fn new(on_disk: Header, unmark_after_ms: u64, image: Image) -> LiveHeader {
        LiveHeader {
            image,
            mark: if on_disk.needs_check() { Mark::Set } else { Mark::Clear },
            on_disk,
            busy: false,
            tidying: false,
            waiters: WaitList::new(),
            unmark_at: None,
            unmark_after_ms,
        }
    }

    /// May something be allocated?
    #[inline]
    pub fn ready_to_allocate(&mut self, cx: &mut Cx<'_>) -> Result<(), NotReady> {
        let marked = self.mark == Mark::Set || mutant!("never_marked");
        if marked && !self.tidying {
            return Ok(());
        }
        if !self.take_turn(cx) {
            return Err(NotReady::Parked);
        }
        let mut marked = self.on_disk.clone();
        marked.set_needs_check(true);
        self.write(&marked, !mutant!("mark_not_flushed"), cx);
        Err(NotReady::Marking)
    }

    /// The mark is stable, or nobody knows. Is anything else being allocated?
    pub fn marked(&mut self, result: Result<(), Errno>, idle: bool, cx: &mut Cx<'_>) {
        self.end_turn(cx);
        if result.is_ok() {
            self.mark = Mark::Set;
            self.on_disk.set_needs_check(true);
            self.allocation_ended(idle, cx);
        }
    }

    /// The mark stays until further notice: something is being allocated, or its time is over.
    #[inline]
    pub fn keep_mark(&mut self) {
        self.unmark_at = None;
    }

    /// Something that was being allocated no longer is: when nothing is, the mark may go in time.
    #[inline]
    pub fn allocation_ended(&mut self, idle: bool, cx: &Cx<'_>) {
        if idle && self.mark == Mark::Set {
            self.unmark_at = Some(cx.now().plus_ms(self.unmark_after_ms));
        }
    }

    #[inline]
    pub fn unmark_at(&self) -> Option<Time> {
        self.unmark_at
    }

    /// The request has the header's turn, or is parked for it.
    pub fn take_turn(&mut self, cx: &mut Cx<'_>) -> bool {
        if self.busy {
            cx.park(&mut self.waiters, On::Header);
            return false;
        }
        self.busy = true;
        true
    }

    pub fn end_turn(&mut self, cx: &mut Cx<'_>) {
        self.busy = false;
        self.tidying = false;
        cx.wake_all(&mut self.waiters);
    }

    /// Who has the turn tidies up: nothing is allocated until it ends.
    pub fn begin_to_tidy(&mut self) {
        self.tidying = true;
    }

    /// Takes the mark off: everything is stable and in use. False: there is none.
    pub fn write_unmarked(&mut self, cx: &mut Cx<'_>) -> bool {
        if self.mark == Mark::Clear {
            return false;
        }
        // From here on nobody knows whether the mark is set, until the write has succeeded.
        self.mark = Mark::Clear;
        self.on_disk.set_needs_check(false);
        self.write(&self.on_disk, true, cx);
        true
    }

    /// Writes another size.
    pub fn write_size(&self, size: u64, cx: &mut Cx<'_>) {
        let mut header = self.on_disk.clone();
        header.image_size = size;
        self.write(&header, true, cx);
    }

    /// That size is stable.
    pub fn size_written(&mut self, size: u64) {
        self.on_disk.image_size = size;
    }

    /// One write of the header's first block; only its first sector differs from what is there.
    /// `fua`: it is done when it is stable.
    fn write(&self, header: &Header, fua: bool, cx: &mut Cx<'_>) {
        let seg = self.image.regions.header();
        let block = &mut cx.mem().region_mut(self.image.regions.copies())[seg.off as usize..];
        block[..SLICE_BYTES].copy_from_slice(&header.encode()[..SLICE_BYTES]);
        let kind = OpKind::Write { fua };
        cx.issue(Op { kind, ..Op::write(self.image.file, 0, Segs::one(seg)) });
    }

    pub fn assert_idle(&self) {
        assert!(!self.busy && !self.tidying && self.waiters.is_empty(), "{self:?}");
    }
}
