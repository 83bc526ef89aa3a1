//! Where new clusters come from in formats that take them from the file's end: QED, VMDK, VDI. The
//! file is made longer ahead of need.
//!
//! Three marks, lowest first: `end`, the first byte never handed out; `ready`, below which space
//! may be handed out; and what a growth under way will make that. A file that grows by truncation
//! gains zeros, so what is handed out reads as zeros until it is written.
//!
//! A fourth, `stable`, is below the length that the file has after any crash. A format hands out
//! what lies behind it only if no table on disk leads there before a fence: see
//! [`parts::writeback`](crate::parts::writeback). Or its growing chore flushes, and it never looks
//! at the mark.
//!
//! Growing is a chore of its own (on the pool, never inside a submission). It is begun when less
//! than half of the last step is left, so that requests rarely wait for it; a write that extended
//! the file would be done synchronously inside the kernel's `io_submit`.

use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::{Errno, FileId, align_up};
use cowbell_engine::wait::{On, WaitList};

use crate::parts::attempts::Attempts;

/// What makes the file longer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Grow {
    /// `ftruncate`: a hole. Cheap in time and space; the default.
    Truncate,
    /// `fallocate`: reserved space. Dearer, and bounds the time of later writes more tightly.
    Allocate,
    /// The data writes themselves, as QEMU does it: each blocks the loop for as long as it takes.
    /// For measuring.
    Write,
}

/// How the file grows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Growth {
    /// By what.
    pub by: Grow,
    /// The smallest step in bytes. A step is as long as the file, within these two.
    pub step_min: u64,
    /// The largest step in bytes.
    pub step_max: u64,
}

impl Default for Growth {
    fn default() -> Self {
        Growth { by: Grow::Truncate, step_min: 64 << 20, step_max: 1 << 30 }
    }
}

/// The file's end. See the module.
#[derive(Clone, Hash, Debug)]
pub(crate) struct Space {
    end: u64,
    ready: u64,
    /// The file is at least that long after any crash; and once the fence under way has ended.
    stable: u64,
    fencing: u64,
    /// No space is handed out beyond this.
    max: u64,
    growth: Growth,
    growing: bool,
    /// The growing chore was asked for, and is not begun yet.
    asked: bool,
    /// The end that somebody waits for.
    want: u64,
    /// Growths begun.
    attempts: Attempts,
    waiters: WaitList,
}

/// The growing chore: it awaits the file's new length.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Growing {
    to: u64,
    /// It is no longer than somebody needs.
    exact: bool,
}

/// Why there is no space yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lack {
    /// The request is parked until attempt number so-and-so to grow the file has ended.
    Parked(u32),
    /// There will be none.
    Never(Errno),
}

/// What became of a wish for space.
#[derive(Clone, Copy, Debug)]
enum Taken {
    /// It is from here on.
    At(u64),
    /// It will be there when the growth has ended.
    Later,
    /// There is none: the file would be too long, or its device is full.
    None(Errno),
}

impl Space {
    /// The end of a file of `file_len` bytes, in units of `unit` bytes.
    pub fn new(file_len: u64, unit: u64, max: u64, growth: Growth) -> Space {
        // A file cut off in the middle of a cluster: that cluster was never acknowledged, and its
        // first part is not zeros. It is left alone.
        let end = align_up(file_len, unit).expect("file lengths are below 2^63");
        Space {
            end,
            ready: file_len,
            stable: file_len,
            fencing: file_len,
            max,
            growth,
            growing: false,
            asked: false,
            want: 0,
            attempts: Attempts::default(),
            waiters: WaitList::new(),
        }
    }

    #[inline]
    pub fn end(&self) -> u64 {
        self.end
    }

    pub fn ready(&self) -> u64 {
        self.ready
    }

    pub fn is_growing(&self) -> bool {
        self.growing
    }

    /// Parks the request until the growth under way has ended; false: there is none.
    pub fn park_while_growing(&mut self, cx: &mut Cx<'_>) -> bool {
        if self.growing {
            cx.park(&mut self.waiters, On::FileLength);
        }
        self.growing
    }

    /// Is there a grown end that nobody uses?
    pub fn has_spare_end(&self) -> bool {
        self.ready > self.end
    }

    /// Is it the data writes that make the file longer? Then they write clusters to their ends: a
    /// cluster that the file does not hold whole is none.
    pub fn grows_by_writes(&self) -> bool {
        self.growth.by == Grow::Write
    }

    /// What was handed out from `offset` on, the last of it, is nobody's again. It need not be zeros.
    pub fn take_back(&mut self, offset: u64) {
        self.end = offset;
    }

    /// The spare end was cut off, or may have been.
    pub fn cut(&mut self) {
        self.ready = self.end;
        self.stable = self.stable.min(self.end);
        self.fencing = self.fencing.min(self.end);
    }

    /// Was all that was handed out within the file's length after any crash?
    pub fn is_stable(&self) -> bool {
        self.end <= self.stable
    }

    /// A fence is about to begin.
    pub fn seal(&mut self) {
        self.fencing = self.ready;
    }

    /// The file has been flushed since [`Space::seal`].
    pub fn sealed_is_stable(&mut self) {
        self.stable = self.stable.max(self.fencing);
    }

    /// Takes `bytes` bytes: `table` wants them to be zeros already, whatever makes the file grow. If
    /// they are not there yet, the request is parked until they are. Begins to grow the file in time.
    pub fn take_or_park(&mut self, bytes: u64, table: bool, cx: &mut Cx<'_>) -> Result<u64, Lack> {
        let (taken, grow) = self.take(bytes, table);
        if grow {
            self.asked = true;
            cx.ask();
        }
        match taken {
            Taken::At(offset) => Ok(offset),
            Taken::None(errno) => Err(Lack::Never(errno)),
            Taken::Later => {
                cx.park(&mut self.waiters, On::FileLength);
                Err(Lack::Parked(self.attempts.latest()))
            }
        }
    }

    /// The growing chore, if [`Space::take_or_park`] asked for it.
    pub fn begin_asked(&mut self) -> Option<Growing> {
        let (to, exact) = self.goal();
        std::mem::take(&mut self.asked).then_some(Growing { to, exact })
    }

    /// A step of the growing chore. The space is in this file, from this byte on; `None`: it is
    /// there already, and need not be made.
    pub fn grow(
        &mut self,
        state: Growing,
        event: Event,
        place: Option<(FileId, u64)>,
        cx: &mut Cx<'_>,
    ) -> Step<Growing> {
        let result = match (event, place) {
            (Event::Start, Some((file, from))) => {
                let mut op = self.op(file, state.to);
                op.offset += from;
                cx.issue(op);
                return Step::Wait(state);
            }
            (Event::Start, None) => Ok(()),
            (Event::Io(result), _) => result,
            (Event::Woken, _) => panic!("{event:?} in {state:?}"),
        };
        if result.is_err()
            && !state.exact
            && let Some(to) = self.lesser_goal()
        {
            return Step::Go(Growing { to, exact: true });
        }
        self.grown(state.to, result);
        cx.wake_all(&mut self.waiters);
        Step::Done(result)
    }

    /// Takes `bytes` bytes if they are there. The flag: begin to grow.
    fn take(&mut self, bytes: u64, table: bool) -> (Taken, bool) {
        let by_write = self.growth.by == Grow::Write;
        let fits = |want: &u64| *want <= self.max || mutant!("device_grows");
        let Some(want) = self.end.checked_add(bytes).filter(fits) else {
            let is_full = self.max < FILE_MAX;
            return (Taken::None(if is_full { Errno::NO_SPACE } else { Errno::TOO_BIG }), false);
        };
        if by_write && !table || want <= self.ready {
            let offset = self.end;
            self.end = want;
            let low = self.ready.saturating_sub(self.end) < self.step() / 2;
            return (Taken::At(offset), low && !by_write && self.begin());
        }
        self.want = self.want.max(want);
        (Taken::Later, self.begin())
    }

    /// A growth is to be begun, unless one is under way.
    fn begin(&mut self) -> bool {
        let begins = !self.growing && self.ready < self.max;
        if begins {
            self.growing = true;
            self.attempts.begin();
        }
        begins
    }

    /// Why attempt number `attempt`, or one after it, failed; `None` if none did.
    pub fn failure_of(&self, attempt: u32) -> Option<Errno> {
        self.attempts.failure_of(if mutant!("failed_growth_told_for_ever") { 0 } else { attempt })
    }

    fn step(&self) -> u64 {
        self.end.clamp(self.growth.step_min, self.growth.step_max)
    }

    /// How long the file shall become; the flag: not longer than somebody needs it.
    pub fn goal(&self) -> (u64, bool) {
        let ahead = if self.growth.by == Grow::Write { 0 } else { self.step() };
        let want = self.want.max(self.end);
        (want.saturating_add(ahead).min(self.max), ahead == 0)
    }

    /// The op that makes `file` `to` bytes long.
    fn op(&self, file: FileId, to: u64) -> Op {
        match self.growth.by {
            Grow::Truncate => Op::bare(OpKind::Truncate, file, to, 0),
            // Never shortens: with `Grow::Write` the file may be longer than is known here.
            Grow::Allocate | Grow::Write => {
                Op::bare(OpKind::Allocate, file, self.ready, to.saturating_sub(self.ready))
            }
        }
    }

    /// It could not become that long: as far as somebody needs it, if anybody does.
    fn lesser_goal(&self) -> Option<u64> {
        (self.want > self.ready).then_some(self.want)
    }

    /// The growth has ended.
    fn grown(&mut self, to: u64, result: Result<(), Errno>) {
        self.growing = result.is_err() && mutant!("failed_growth_never_ends");
        let result = if mutant!("failed_growth_is_done") { Ok(()) } else { result };
        match result {
            Ok(()) => self.ready = self.ready.max(to),
            Err(errno) => self.attempts.failed(errno),
        }
    }

    pub fn assert_idle(&self) {
        assert!(!self.growing && !self.asked, "the file is still growing");
        assert!(self.waiters.is_empty(), "somebody waits for the file to grow");
    }
}

/// Offsets are signed 64-bit numbers to the system.
pub(crate) const FILE_MAX: u64 = i64::MAX as u64 & !0xfff;
