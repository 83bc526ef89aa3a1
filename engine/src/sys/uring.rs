//! A backend of Linux io_uring.
//!
//! The model: every op that the kernel can do goes to it in as few `io_uring_enter` as possible,
//! whether the file is buffered or not. What it cannot do at once it does on threads of its own, never
//! inside the call; how many of these there may be is bounded ([`UringOptions::workers`]). A small
//! pool of our threads is left for what it has no op for: zeroing and discarding on block devices,
//! zeroing that gives space up (two calls, one depending on the other), whatever is computed, and
//! what it refuses, for it lacks an op (truncation before Linux 6.9) or the file system does.
//! An op is asked of the kernel only if its success means what it means in `job.rs`; what
//! it refuses goes there whole. Success is the kernel's to tell, failure that function's.
//!
//! *One descriptor.* Ring and pool signal the same eventfd. The ring's own descriptor would save
//! clearing that, but a ring with IORING_SETUP_DEFER_TASKRUN does not wake those who poll it (seen
//! on Linux 6.18). Without that flag completions interrupt the thread that they are for: each makes
//! its `epoll_wait` answer EINTR, and it has to ask again. With the flag they wait for our next
//! call, the eventfd is signalled, and the embedder sees neither. Where the kernel does not know the
//! flag (before 6.1), embedders have to live with EINTR.
//!
//! *One thread.* With that flag a ring belongs to the thread that made it: so a [`Uring`] is not
//! `Send`. An image that is opened on one thread and run on another has its engine made there.
//!
//! *Ops go out in the order of the queue.* What the kernel takes from us it takes in the call; only
//! when it is out of memory do entries wait in the ring, nothing is added to them, and the eventfd is
//! signalled if nothing in flight would do that. The kernel's copy of an op is made in the call as
//! well (IORING_FEAT_SUBMIT_STABLE), so lists of pieces are free again then. At most `depth` ops are
//! in the ring at a time, and there is room for the answers to twice as many: none can be lost.
//!
//! *No wake-up is lost:* the eventfd is cleared before the ring and the pool are looked at for the
//! last time in a harvest, and each of them shows what it has before it signals. *There is no false
//! one for long:* a signal may come after what it tells of was collected, and nobody knows how many
//! signals the kernel makes of how many answers; so the third harvest in a row that finds nothing
//! clears the eventfd. (Each would do; but most of those are no answer to a wake-up.)

use std::io;
use std::marker::PhantomData;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};

use crate::backend::{Backend, Completion, FileInfo, Harvest, Submission};
use crate::mem::Memory;
use crate::op::OpKind;
use crate::ops::{OpRecord, Ops};
use crate::request::REQUEST_MAX;
use crate::sys::disk::DiskFile;
use crate::sys::files::Files;
use crate::sys::job::Handle;
use crate::sys::pool::{PoolOptions, PoolStats, Threads, Workers};
use crate::sys::ram::RamPiece;
use crate::sys::syscalls::{self as sys, IOV_MAX};
use crate::units::{Errno, FileId, OpId, Time};

/// Limits of a [`Uring`].
#[derive(Clone, Copy, Debug)]
pub struct UringOptions {
    /// The most ops that the kernel has at a time, 1 to 16384; more stay with the engine.
    pub depth: u32,
    /// The most threads that the kernel starts for ops that block. Linux before 5.15 does not know
    /// the limit, and has one of its own.
    pub workers: u32,
    /// The pool, for what the kernel does not do.
    pub pool: PoolOptions,
}

impl Default for UringOptions {
    fn default() -> UringOptions {
        UringOptions { depth: 128, workers: 16, pool: PoolOptions::default() }
    }
}

/// What a [`Uring`] has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UringStats {
    /// Calls of `io_uring_enter`.
    pub enters: u64,
    /// Ops that the kernel accepted.
    pub accepted: u64,
    /// Of these, ops that it gave back undone, handed to the pool.
    pub handed_over: u64,
    /// Ops that the pool got, these included.
    pub pooled: u64,
}

/// Does ops through an io_uring. See the module.
#[derive(Debug)]
pub struct Uring {
    ring: Ring,
    workers: Workers,
    // Behind the ring and the pool, which use their descriptors.
    files: Files<UringFile>,
    /// Ops in the ring, whether the kernel has taken them or not.
    in_flight: usize,
    depth: usize,
    /// Those of them that were put into the ring last, oldest first.
    batch: Vec<OpId>,
    /// How many of these the kernel has not taken: the last ones.
    unsent: usize,
    /// The lists of the batch's ops with several pieces. It never grows, so that they stay in place.
    lists: Vec<RamPiece>,
    /// It takes nothing at all any more: threads do everything.
    is_closed: bool,
    /// Harvests since there was something to do.
    idle_harvests: u32,
    stats: UringStats,
    /// The ring is for the thread that made it.
    not_send: PhantomData<*const ()>,
}

#[derive(Debug)]
struct UringFile {
    /// In a box: what is looked at for each op is side by side.
    file: Box<DiskFile>,
    fd: types::Fd,
    /// What is not for the ring here: see [`bit`].
    refused: u8,
}

/// Each kind of op that the ring may not be able to do on a file has a bit.
#[inline(always)]
fn bit(kind: OpKind) -> u8 {
    match kind {
        OpKind::Read | OpKind::Write { fua: false } => 0,
        OpKind::Write { fua: true } => 1,
        OpKind::Flush => 2,
        OpKind::Truncate => 4,
        OpKind::Allocate => 8,
        OpKind::Discard => 16,
        OpKind::Zero { unmap: false } => 32,
        OpKind::Zero { unmap: true } | OpKind::Compute(_) | OpKind::Hole => NEVER,
        OpKind::Copy { .. } => NEVER,
    }
}

const NEVER: u8 = 128;

impl UringFile {
    fn new(file: DiskFile) -> UringFile {
        let Handle { fd, is_block, .. } = file.handle();
        let sizes =
            [OpKind::Truncate, OpKind::Allocate, OpKind::Discard, OpKind::Zero { unmap: false }];
        // On devices these are no calls that the ring knows.
        let by_ioctl = sizes.iter().filter(|_| is_block).fold(0, |bits, &kind| bits | bit(kind));
        UringFile { file: Box::new(file), fd: types::Fd(fd), refused: NEVER | by_ioctl }
    }

    /// The ring's entry for the rest of `record`. `None`: it is not for the ring, or its list of
    /// pieces does not fit behind others in `lists`, where it stays until the kernel has taken the entry.
    #[inline(always)]
    fn entry(
        &self,
        record: &OpRecord,
        mem: &mut Memory,
        lists: &mut Vec<RamPiece>,
    ) -> Option<squeue::Entry> {
        let kind = record.op.kind;
        let (offset, len) = (record.offset(), record.remaining());
        // -1 is "where the file stands", and other errors have other numbers than the calls'.
        let is_offset = offset.checked_add(len).is_some_and(|end| end <= i64::MAX as u64);
        if self.refused & bit(kind) != 0 || !is_offset {
            return None;
        }
        let flags = match kind {
            OpKind::Read | OpKind::Write { fua: false } => 0,
            OpKind::Write { fua: true } => libc::RWF_DSYNC,
            _ => return self.entry_without_memory(kind, offset, len),
        };
        let is_read = kind == OpKind::Read;
        if let Some(piece) = mem.single(&record.op.segs, record.moved) {
            // More than this is left to the next call: a short count is legal.
            let len = piece.len.min(REQUEST_MAX as usize) as u32;
            return Some(if is_read {
                opcode::Read::new(self.fd, piece.base, len).offset(offset).build()
            } else {
                let write = opcode::Write::new(self.fd, piece.base, len).offset(offset);
                write.rw_flags(flags).build()
            });
        }
        let (start, mut fits) = (lists.len(), true);
        mem.pieces(&record.op.segs, record.moved, |piece| {
            if lists.len() < start + IOV_MAX {
                fits &= lists.len() < lists.capacity();
                if fits {
                    lists.push(piece);
                }
            }
        });
        if !fits {
            lists.truncate(start);
            return None;
        }
        // A `RamPiece` has the layout of an iovec.
        let pieces = lists.as_ptr().wrapping_add(start).cast();
        let count = (lists.len() - start) as u32;
        Some(if is_read {
            opcode::Readv::new(self.fd, pieces, count).offset(offset).build()
        } else {
            let write = opcode::Writev::new(self.fd, pieces, count).offset(offset);
            write.rw_flags(flags).build()
        })
    }

    #[inline(never)]
    fn entry_without_memory(&self, kind: OpKind, offset: u64, len: u64) -> Option<squeue::Entry> {
        let mode = match kind {
            OpKind::Flush => {
                let flags = types::FsyncFlags::DATASYNC;
                return Some(opcode::Fsync::new(self.fd).flags(flags).build());
            }
            OpKind::Truncate => return Some(opcode::Ftruncate::new(self.fd, offset).build()),
            OpKind::Allocate => 0,
            OpKind::Discard => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            OpKind::Zero { .. } => libc::FALLOC_FL_ZERO_RANGE,
            OpKind::Read | OpKind::Write { .. } | OpKind::Compute(_) => return None,
            OpKind::Hole | OpKind::Copy { .. } => return None,
        };
        // No length is no error; for the call it is one.
        (len > 0).then(|| opcode::Fallocate::new(self.fd, len).offset(offset).mode(mode).build())
    }

    /// The kernel answered `error`: does a thread do it instead?
    fn is_for_a_thread(&mut self, kind: OpKind, error: Errno) -> bool {
        // Not done at all: a thread may wait, and makes interrupted calls again.
        if matches!(error, Errno::AGAIN | Errno::INTERRUPTED) {
            return true;
        }
        let is_unknown = error == Errno::INVALID || sys::unsupported(error);
        self.refused |= if is_unknown { bit(kind) } else { 0 };
        is_unknown && bit(kind) != 0
    }
}

impl Uring {
    /// A backend without files, for this thread.
    ///
    /// # Errors
    ///
    /// There is no io_uring here ([`io::ErrorKind::Unsupported`]: the kernel has none;
    /// [`io::ErrorKind::PermissionDenied`]: it is forbidden, by `kernel.io_uring_disabled` or a filter
    /// of system calls), or no memory or descriptor for one.
    pub fn new(options: UringOptions) -> io::Result<Uring> {
        Uring::with_enter(options, enter, true)
    }

    /// The same, on threads that others have as well: of [`UringOptions::pool`] only the depth counts.
    ///
    /// # Errors
    ///
    /// As [`new`](Uring::new).
    pub fn over(threads: &Threads, options: UringOptions) -> io::Result<Uring> {
        let depth = options.depth.clamp(1, DEPTH_MAX);
        let workers = Workers::over(threads, options.pool.depth, depth as usize)?;
        Uring::with_workers(options, workers, enter, true)
    }

    fn with_enter(options: UringOptions, enter: Enter, deferred: bool) -> io::Result<Uring> {
        let depth = options.depth.clamp(1, DEPTH_MAX);
        let workers = Workers::for_files(options.pool, depth as usize)?;
        Uring::with_workers(options, workers, enter, deferred)
    }

    fn with_workers(
        options: UringOptions,
        workers: Workers,
        enter: Enter,
        deferred: bool,
    ) -> io::Result<Uring> {
        let depth = options.depth.clamp(1, DEPTH_MAX);
        Ok(Uring {
            ring: Ring::new(depth, options.workers, workers.event().fd(), enter, deferred)?,
            workers,
            files: Files::new(),
            in_flight: 0,
            depth: depth as usize,
            batch: Vec::with_capacity(depth as usize),
            unsent: 0,
            lists: Vec::with_capacity(IOV_MAX.max(4 * depth as usize)),
            is_closed: false,
            idle_harvests: 0,
            stats: UringStats::default(),
            not_send: PhantomData,
        })
    }

    /// What was done so far.
    pub fn stats(&self) -> UringStats {
        self.stats
    }

    /// What its pool got so far.
    pub fn pool_stats(&self) -> PoolStats {
        self.workers.stats()
    }

    /// Moves ops from the front of the queue into the ring, up to the first that is not for it.
    /// False: none.
    #[inline]
    fn gather(&mut self, submission: &mut Submission<'_>) -> bool {
        let room = self.depth - self.in_flight;
        let mut entries = self.ring.ring.submission();
        self.batch.clear();
        self.lists.clear();
        for at in 0..submission.len().min(room) {
            let op = submission.waiting()[at];
            let record = &submission.ops[op];
            let Some(file) = self.files.of(record) else { break };
            let Some(entry) = file.entry(record, submission.mem, &mut self.lists) else { break };
            let entry = entry.user_data(u64::from(op.0));
            // SAFETY: the file is open until the op has come back. The memory that it names stays
            // until then, its list of pieces until the kernel has taken the entry: lists are cleared
            // only when the ring has no entries, and have all their memory from the beginning.
            if unsafe { entries.push(&entry) }.is_err() {
                break;
            }
            self.batch.push(op);
        }
        drop(entries);
        self.unsent = self.batch.len();
        self.in_flight += self.unsent;
        submission.take(self.unsent);
        self.unsent > 0
    }

    /// Has the kernel take what is in the ring. False: it does not take all of it now.
    #[inline]
    fn send(&mut self, ops: &Ops, mem: &mut Memory) -> bool {
        while self.unsent > 0 {
            self.stats.enters += 1;
            let shows = self.has_hidden();
            match self.ring.enter(self.unsent, 0, shows) {
                // It ends at what it finds fault with, and takes that, too: ask about the rest.
                Ok(taken @ 1..) => {
                    self.unsent -= taken;
                    self.stats.accepted += taken as u64;
                }
                Err(Errno::INTERRUPTED) => {}
                Ok(0) => return false,
                Err(error) if is_temporary(error) => return false,
                Err(_) => self.close(ops, mem),
            }
        }
        true
    }

    /// Has the kernel completed something that it shows only when it is called? Its flag is set a
    /// moment after that, so it may be set once more when all is shown, and stays so until the next.
    #[inline]
    fn has_hidden(&mut self) -> bool {
        self.in_flight > self.unsent && self.ring.ring.submission().taskrun()
    }

    /// Is there something to collect?
    #[inline]
    fn has_answers(&mut self) -> bool {
        !self.ring.ring.completion().is_empty() || self.has_hidden() || self.workers.is_ready()
    }

    /// Clears the eventfd, and has the kernel show all that it has completed.
    #[inline]
    fn show(&mut self) {
        let mut all = self.show_some();
        loop {
            self.workers.event().clear();
            let before = self.ring.ring.completion().len();
            all &= self.show_some();
            if self.ring.ring.completion().len() == before {
                break;
            }
            // The kernel has signalled what it has just shown: clear that, too.
        }
        if !all {
            self.workers.event().signal();
        }
    }

    /// Has the kernel show what it has completed so far. False: it could not.
    #[inline]
    fn show_some(&mut self) -> bool {
        // Each call shows 20, or all.
        for _ in 0..self.in_flight / 16 + 2 {
            if !self.has_hidden() {
                return true;
            }
            self.stats.enters += 1;
            match self.ring.enter(0, 0, true) {
                Ok(_) => {}
                // Asked again at the next turn; where it is forbidden by now, that helps nobody.
                Err(error) => return error != Errno::INTERRUPTED && !is_temporary(error),
            }
        }
        true
    }

    /// The kernel lets us have no io_uring any more. What it has not taken, and all that follows, is
    /// for threads. The ring's entries are never offered to it again.
    #[cold]
    fn close(&mut self, ops: &Ops, mem: &mut Memory) {
        self.is_closed = true;
        let unsent = self.batch.len() - self.unsent..;
        self.in_flight -= self.unsent;
        self.unsent = 0;
        for &op in &self.batch[unsent] {
            let record = &ops[op];
            let file = self.files.of(record).map(|file| file.file.handle());
            let file = file.expect("its file is attached until it has come back");
            self.workers.stage(op, record, file, mem);
            self.stats.pooled += 1;
        }
    }

    /// Gives the front op to the pool. False: it has no room.
    fn front_to_pool(&mut self, submission: &mut Submission<'_>) -> bool {
        let handle = |id| self.files.get(id).map(|file| file.file.handle());
        let taken = self.workers.take_front(submission, handle);
        self.stats.pooled += u64::from(taken == Some(true));
        taken.is_some()
    }

    /// There are errors among the kernel's answers from `from` on. What it did not do at all, or does
    /// not know how to, a thread does instead.
    #[cold]
    fn hand_over(&mut self, harvest: &mut Harvest<'_>, from: usize) {
        let mut kept = from;
        for at in from..harvest.done.len() {
            let done = harvest.done[at];
            let record = &harvest.ops[done.op];
            if let Err(error) = done.result()
                && let Some(file) = self.files.get_mut(record.file())
                && file.is_for_a_thread(record.op.kind, error)
            {
                let handle = file.file.handle();
                self.workers.stage(done.op, record, handle, harvest.mem);
                self.stats.handed_over += 1;
                self.stats.pooled += 1;
            } else {
                harvest.done[kept] = done;
                kept += 1;
            }
        }
        harvest.done.truncate(kept);
    }

    /// Entries wait that the kernel had no memory for, and it has nothing of ours whose end would say
    /// that there is some: then it is asked again at the next turn.
    #[inline]
    fn wake_if_stuck(&self) {
        if self.unsent > 0 && self.in_flight == self.unsent {
            self.workers.event().signal();
        }
    }

    /// Is the ring full, as far as we fill it?
    fn is_full(&self) -> bool {
        self.in_flight == self.depth
    }

    /// Is the front op one for the ring?
    #[inline]
    fn front_is_ours(&mut self, submission: &mut Submission<'_>) -> bool {
        let Some(&op) = submission.waiting().first() else { return false };
        let record = &submission.ops[op];
        let Some(file) = self.files.of(record) else { return false };
        self.lists.clear(); // the ring has no entries
        file.entry(record, submission.mem, &mut self.lists).is_some()
    }
}

impl Backend for Uring {
    type File = DiskFile;

    fn attach(&mut self, id: FileId, file: DiskFile) -> io::Result<FileInfo> {
        let info = file.info()?;
        self.files.attach(id, UringFile::new(file))?;
        Ok(info)
    }

    fn detach(&mut self, id: FileId) -> Option<DiskFile> {
        self.files.detach(id).map(|file| *file.file)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        self.idle_harvests = 0;
        // Nothing is added to entries that still wait.
        while self.send(submission.ops, submission.mem) && !submission.is_empty() {
            if !self.is_closed && self.gather(submission) {
                continue;
            }
            let waits = self.is_full() && !self.is_closed && self.front_is_ours(submission);
            if waits || !self.front_to_pool(submission) {
                break; // no room
            }
        }
        self.workers.start();
        self.wake_if_stuck();
    }

    #[inline]
    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        if self.unsent == 0 && !self.has_answers() {
            self.idle_harvests += 1;
            if self.idle_harvests < IDLE_HARVESTS {
                return;
            }
        }
        self.idle_harvests = 0;
        self.send(harvest.ops, harvest.mem);
        self.show();
        let from = harvest.done.len();
        let mut answers = 0;
        harvest.done.extend(self.ring.ring.completion().map(|answer| {
            answers |= answer.result();
            Completion::raw(OpId(answer.user_data() as u32), i64::from(answer.result()))
        }));
        self.in_flight -= harvest.done.len() - from;
        if answers < 0 {
            self.hand_over(harvest, from);
        }
        self.workers.collect(harvest.done, false);
        self.workers.start();
        self.wake_if_stuck();
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.workers.event().borrow())
    }

    fn clock(&self) -> Time {
        crate::sys::clock()
    }
}

impl Drop for Uring {
    /// Waits for all that is in flight: the kernel writes into memory that may be freed next. What
    /// it has not taken it will never see.
    fn drop(&mut self) {
        let mut left = self.in_flight - self.unsent;
        loop {
            left -= self.ring.ring.completion().count();
            if left == 0 {
                return;
            }
            match self.ring.enter(0, 1, true) {
                Ok(_) | Err(Errno::INTERRUPTED) => {}
                // It ends all the same, and rather late than in memory that is somebody else's.
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// As many harvests in a row that find nothing show that a signal came late. One after each submission
/// finds nothing as a rule, nor does one of a loop that goes round before it waits.
const IDLE_HARVESTS: u32 = 3;

/// The most ops: the kernel takes twice as many entries.
const DEPTH_MAX: u32 = 16 << 10;

/// Has the kernel take so many entries, wait for so many answers, and do what these flags say; a
/// test replaces it.
type Enter = fn(&IoUring, usize, usize, u32) -> Result<usize, Errno>;

fn enter(ring: &IoUring, entries: usize, answers: usize, flags: u32) -> Result<usize, Errno> {
    let no_signals: Option<&libc::sigset_t> = None;
    let ring = ring.submitter();
    // SAFETY: whoever has put entries into the ring has answered for what they name.
    let answer = unsafe { ring.enter(entries as u32, answers as u32, flags, no_signals) };
    answer.map_err(|error| Errno::from_io(&error))
}

/// The kernel has no memory, or other things to do.
fn is_temporary(error: Errno) -> bool {
    matches!(error, Errno::AGAIN | Errno(libc::EBUSY | libc::ENOMEM))
}

/// IORING_ENTER_GETEVENTS.
const GET_EVENTS: u32 = 1;

/// The kernel's side of it.
struct Ring {
    ring: IoUring,
    enter: Enter,
}

impl Ring {
    /// A ring for `depth` entries that signals `event`.
    fn new(
        depth: u32,
        workers: u32,
        event: RawFd,
        enter: Enter,
        deferred: bool,
    ) -> io::Result<Ring> {
        let mut builder = IoUring::builder();
        if deferred {
            builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        }
        let ring = match builder.build(depth) {
            // Before Linux 6.1.
            Err(error) if deferred && error.raw_os_error() == Some(libc::EINVAL) => {
                return Ring::new(depth, workers, event, enter, false);
            }
            ring => ring.map_err(not_available)?,
        };
        if !ring.params().is_feature_submit_stable() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "io_uring is not available here: the kernel's is too old",
            ));
        }
        ring.submitter().register_eventfd(event)?;
        // Those for files and devices, and those for others, of which there are none. A kernel
        // without such a limit has one of four threads for each processor.
        let _ = ring.submitter().register_iowq_max_workers(&mut [workers.max(1); 2]);
        Ok(Ring { ring, enter })
    }

    /// `io_uring_enter`; answers how many entries the kernel took.
    #[inline]
    fn enter(&self, entries: usize, answers: usize, shows: bool) -> Result<usize, Errno> {
        (self.enter)(&self.ring, entries, answers, if shows { GET_EVENTS } else { 0 })
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring of {}", self.ring.params().sq_entries())
    }
}

/// Why there is none.
fn not_available(error: io::Error) -> io::Error {
    let errno = Errno::from_io(&error);
    let (kind, why) = match errno.0 {
        libc::ENOSYS => (io::ErrorKind::Unsupported, "the kernel has none"),
        libc::EPERM => (
            io::ErrorKind::PermissionDenied,
            "kernel.io_uring_disabled or a filter of system calls forbids it",
        ),
        libc::ENOMEM => (io::ErrorKind::OutOfMemory, "perhaps for the limit of locked memory"),
        _ => return error,
    };
    io::Error::new(kind, format!("io_uring is not available here: {errno} ({why})"))
}

#[cfg(all(test, feature = "contract"))]
mod tests {
    use std::collections::VecDeque;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::sync::Mutex;

    use super::*;
    use crate::contract::{
        BLOCK, Bench, FILE, Rig, bare, pattern, pool, range, read, run_all, write,
    };
    use crate::mem::{Buf, Mem};
    use crate::op::{Base, Op, Seg, Segs};
    use crate::sys::disk::DiskOptions;
    use crate::sys::ram::Ram;
    use crate::sys::syscalls::wait_readable;
    use crate::units::{BufId, ReqId};

    /// What a call that hands over entries shall do; when there is none left, what it always does.
    #[derive(Clone, Copy, Debug)]
    enum Act {
        /// Have the kernel take that many.
        Take(usize),
        Fail(i32),
    }

    thread_local! {
        static SCRIPT: Mutex<VecDeque<Act>> = const { Mutex::new(VecDeque::new()) };
        /// Entries and answers wanted of each call.
        static CALLS: Mutex<Vec<(usize, usize)>> = const { Mutex::new(Vec::new()) };
        static CHAOS: Mutex<u64> = const { Mutex::new(1) };
    }

    fn script(acts: &[Act]) {
        SCRIPT.with(|script| script.lock().expect("one thread").extend(acts));
    }

    fn calls() -> Vec<(usize, usize)> {
        CALLS.with(|calls| std::mem::take(&mut *calls.lock().expect("one thread")))
    }

    fn scripted(
        ring: &IoUring,
        entries: usize,
        answers: usize,
        flags: u32,
    ) -> Result<usize, Errno> {
        CALLS.with(|calls| calls.lock().expect("one thread").push((entries, answers)));
        let next = || SCRIPT.with(|script| script.lock().expect("one thread").pop_front());
        let act = if entries > 0 { next() } else { None };
        match act {
            Some(Act::Take(count)) => enter(ring, count, answers, flags),
            Some(Act::Fail(errno)) => Err(Errno(errno)),
            None => enter(ring, entries, answers, flags),
        }
    }

    /// Any behaviour that is allowed, in turns.
    fn chaotic(ring: &IoUring, entries: usize, answers: usize, flags: u32) -> Result<usize, Errno> {
        let dice = CHAOS.with(|state| {
            let mut state = state.lock().expect("one thread");
            *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (*state >> 33) as usize
        });
        match dice % 5 {
            0 => Err(Errno::AGAIN),
            1 => Err(Errno::INTERRUPTED),
            2 => Err(Errno(libc::EBUSY)),
            _ if entries > 0 => enter(ring, 1 + dice / 5 % entries, answers, flags),
            _ => enter(ring, entries, answers, flags),
        }
    }

    struct Disk {
        dir: tempfile::TempDir,
        direct: bool,
        enter: Enter,
        deferred: bool,
        options: UringOptions,
    }

    impl Disk {
        /// `None`: there is no io_uring here, as is said.
        fn new(enter: Enter) -> Option<Disk> {
            if let Err(why) = Uring::new(UringOptions::default()) {
                let _ = writeln!(io::stderr(), "SKIPPED: {why}");
                return None;
            }
            // Beside the test itself: a disk, where the usual place may be memory.
            let exe = std::env::current_exe().expect("the test's path");
            let dir = tempfile::tempdir_in(exe.parent().expect("it is in a directory"));
            let dir = dir.expect("a directory for scratch files");
            let options = UringOptions::default();
            Some(Disk { dir, direct: true, enter, deferred: true, options })
        }
    }

    impl Rig for Disk {
        type Backend = Uring;

        fn make(&mut self, contents: &[u8]) -> (Uring, FileInfo) {
            let path = self.dir.path().join("file");
            let _ = std::fs::remove_file(&path);
            std::fs::write(&path, contents).expect("a scratch file");
            let options =
                DiskOptions { write: true, direct: self.direct, ..DiskOptions::default() };
            let file = DiskFile::open(&path, &options).expect("the scratch file opens");
            let uring = Uring::with_enter(self.options, self.enter, self.deferred);
            let mut uring = uring.expect("a backend");
            let info = uring.attach(FILE, file).expect("it attaches");
            (uring, info)
        }

        fn contents(&mut self, _: &mut Uring) -> Vec<u8> {
            std::fs::read(self.dir.path().join("file")).expect("the scratch file reads")
        }
    }

    fn push_reads(bench: &mut Bench<'_, Disk>, count: u64) {
        for block in 0..count {
            bench.push(read(block, pool(0, block, 1)));
        }
    }

    fn event(bench: &Bench<'_, Disk>) -> RawFd {
        bench.backend.event_fd().expect("it has one").as_raw_fd()
    }

    #[test]
    fn keeps_the_contract_whatever_the_call_does() {
        let Some(mut disk) = Disk::new(chaotic) else { return };
        for direct in [true, false] {
            disk.direct = direct;
            run_all(&mut disk);
        }
    }

    #[test]
    fn keeps_the_contract_where_answers_interrupt() {
        let Some(mut disk) = Disk::new(enter) else { return };
        disk.deferred = false;
        run_all(&mut disk);
    }

    #[test]
    fn keeps_the_contract_once_it_has_no_ring_any_more() {
        fn refused(_: &IoUring, _: usize, _: usize, _: u32) -> Result<usize, Errno> {
            Err(Errno::NOT_PERMITTED)
        }
        let Some(mut disk) = Disk::new(refused) else { return };
        run_all(&mut disk);
    }

    #[test]
    fn asks_again_for_what_was_not_taken() {
        let Some(mut disk) = Disk::new(scripted) else { return };
        let mut bench = Bench::new(&mut disk, &pattern(8, 1));
        push_reads(&mut bench, 8);
        script(&[Act::Take(3), Act::Take(1)]);
        bench.submit();
        let entries: Vec<_> = calls().iter().map(|call| call.0).filter(|&n| n > 0).collect();
        assert_eq!(entries, [8, 5, 4]);
        assert!(bench.queue.is_empty());
        assert_eq!(bench.backend.stats().accepted, 8);
        assert!(bench.drain().iter().all(|back| back.2 == Ok(BLOCK)));
        assert_eq!(bench.mem.pool(BufId(0))[range(0, 8)], pattern(8, 1));
    }

    #[test]
    fn asks_again_at_the_next_turn_when_nothing_else_would_wake_it() {
        let Some(mut disk) = Disk::new(scripted) else { return };
        let mut bench = Bench::new(&mut disk, &pattern(8, 2));
        push_reads(&mut bench, 4);
        script(&[Act::Fail(libc::EAGAIN)]);
        bench.submit();
        assert!(wait_readable(event(&bench), 0), "refused for now is not failed");

        // With something in flight, that will wake it.
        script(&[Act::Take(1), Act::Fail(libc::ENOMEM)]);
        let mut back = bench.harvest().len();
        let entries: Vec<_> = calls().iter().map(|call| call.0).filter(|&n| n > 0).collect();
        assert_eq!(entries, [4, 4, 3]);
        assert!(wait_readable(event(&bench), 20_000));
        script(&[Act::Fail(libc::EBUSY)]);
        back += bench.harvest().len();
        assert_eq!(back, 1, "at once, or when it has woken us");
        assert!(wait_readable(event(&bench), 0), "again nothing else that would wake it");

        let mut back = 0;
        while back < 3 {
            assert!(wait_readable(event(&bench), 20_000));
            back += bench.harvest().iter().filter(|back| back.2 == Ok(BLOCK)).count();
        }
    }

    #[test]
    fn what_waits_when_the_ring_is_lost_is_done_by_threads() {
        let Some(mut disk) = Disk::new(scripted) else { return };
        let mut bench = Bench::new(&mut disk, &pattern(8, 3));
        push_reads(&mut bench, 6);
        script(&[Act::Take(2), Act::Fail(libc::EPERM)]);
        bench.submit();
        assert_eq!(bench.backend.stats().accepted, 2);
        assert!(bench.drain().iter().all(|back| back.2 == Ok(BLOCK)));
        assert_eq!(bench.mem.pool(BufId(0))[range(0, 6)], pattern(8, 3)[range(0, 6)]);
        assert_eq!(bench.backend.stats().pooled, 4);
        push_reads(&mut bench, 1);
        bench.drain();
        assert_eq!(bench.backend.stats().pooled, 5, "and so is what follows");
    }

    #[test]
    fn an_error_concerns_one_alone() {
        let Some(mut disk) = Disk::new(enter) else { return };
        disk.options.pool.threads = 1;
        let mut bench = Bench::new(&mut disk, &pattern(8, 4));
        let mut bad = Vec::new();
        for block in 0..4 {
            bench.push(read(block, pool(0, block, 1)));
            let op = read(block, pool(1, block, 1));
            bad.push(bench.push(Op { offset: block * BLOCK + 1, ..op })); // past the page cache
        }
        for (op, record, result) in bench.drain() {
            let wanted = if bad.contains(&op) { Err(Errno::INVALID) } else { Ok(BLOCK) };
            assert_eq!(result, wanted, "{record:?}");
        }
        assert_eq!(bench.backend.stats().pooled, 0);
    }

    #[test]
    fn what_the_kernel_gives_back_undone_a_thread_does() {
        let Some(mut disk) = Disk::new(enter) else { return };
        let file = pattern(8, 5);
        let mut bench = Bench::new(&mut disk, &file);
        for (count, errno) in [(1, libc::EAGAIN), (2, libc::EINTR)] {
            let op = bench.push(read(3, pool(0, 0, 1)));
            bench.queue.drop_front(1);
            bench.answer(op, -errno);
            assert_eq!(bench.drain()[0].2, Ok(BLOCK));
            assert_eq!(bench.mem.pool(BufId(0))[range(0, 1)], file[range(3, 1)]);
            let stats = bench.backend.stats();
            assert_eq!((stats.handed_over, stats.pooled), (count, count));
        }
    }

    #[test]
    fn what_the_kernel_does_not_know_is_asked_of_it_once() {
        let Some(mut disk) = Disk::new(enter) else { return };
        let mut bench = Bench::new(&mut disk, &pattern(8, 6));
        let fua = Op { kind: OpKind::Write { fua: true }, ..write(1, pool(0, 0, 1)) };
        let ops = [
            fua,
            Op::flush(FILE),
            bare(OpKind::Truncate, 8, 0),
            bare(OpKind::Allocate, 0, 8),
            bare(OpKind::Discard, 3, 1),
            bare(OpKind::Zero { unmap: false }, 4, 1),
        ];
        for (count, op) in (1..).zip(ops) {
            bench.complete(op.clone()).expect("it is done");
            assert_eq!(bench.backend.stats().accepted, count, "by the ring: {op:?}");
            let id = bench.push(op.clone());
            bench.queue.drop_front(1);
            bench.answer(id, -[libc::EINVAL, libc::EOPNOTSUPP][count as usize % 2]);
            assert!(bench.drain()[0].2.is_ok(), "{op:?}");
            bench.complete(op.clone()).expect("it is done");
            let stats = bench.backend.stats();
            assert_eq!((stats.accepted, stats.pooled), (count, 2 * count), "{op:?}");
        }
    }

    impl Bench<'_, Disk> {
        /// Makes it seem that the kernel answers `res` for `op`.
        fn answer(&mut self, op: OpId, res: i32) {
            self.with_harvest(|uring, harvest| {
                let from = harvest.done.len();
                harvest.done.push(Completion::raw(op, i64::from(res)));
                uring.hand_over(harvest, from);
                uring.workers.start();
            });
        }
    }

    #[test]
    fn a_signal_that_comes_late_is_cleared() {
        let Some(mut disk) = Disk::new(enter) else { return };
        let mut bench = Bench::new(&mut disk, &pattern(8, 7));
        push_reads(&mut bench, 1);
        bench.drain();
        while wait_readable(event(&bench), 5) {
            assert!(bench.harvest().is_empty());
        }
        bench.backend.workers.event().signal();
        for _ in 0..IDLE_HARVESTS {
            assert!(bench.harvest().is_empty());
        }
        assert!(!wait_readable(event(&bench), 0), "a loop that looks at levels would spin");
    }

    #[test]
    fn looking_after_a_submission_costs_no_call() {
        let Some(mut disk) = Disk::new(enter) else { return };
        let mut bench = Bench::new(&mut disk, &pattern(8, 8));
        bench.backend.workers.event().signal(); // which it would clear
        bench.submit();
        for _ in 1..IDLE_HARVESTS {
            assert!(bench.harvest().is_empty());
            assert!(wait_readable(event(&bench), 0));
        }
    }

    #[test]
    fn more_threads_than_allowed_are_not_started() {
        let Some(mut disk) = Disk::new(enter) else { return };
        disk.options = UringOptions { workers: 2, ..UringOptions::default() };
        disk.options.pool.threads = 1;
        let mut bench = Bench::new(&mut disk, &pattern(64, 9));
        let mut most = 0;
        for _ in 0..20 {
            for _ in 0..16 {
                bench.push(Op::flush(FILE));
            }
            bench.submit();
            most = most.max(kernel_threads());
            bench.drain();
        }
        assert!((1..=2).contains(&most), "{most} threads of the kernel's");
    }

    /// Threads that the kernel has started for rings of this thread.
    fn kernel_threads() -> usize {
        // SAFETY: no memory involved.
        let mine = format!("iou-wrk-{}", unsafe { libc::gettid() });
        let tasks = std::fs::read_dir("/proc/self/task").expect("it is there");
        let names = tasks.flatten().map(|task| std::fs::read_to_string(task.path().join("comm")));
        names.flatten().filter(|name| name.trim_end() == mine).count()
    }

    #[test]
    fn a_list_too_long_for_one_call_is_done_in_parts() {
        const PIECE: usize = 512;
        let Some(mut disk) = Disk::new(enter) else { return };
        let file = pattern(300, 10);
        let mut bench = Bench::new(&mut disk, &file);
        let mut buf = Buf::zeroed(2 * file.len());
        // Every other piece of the buffer.
        let pieces = buf.chunks_exact_mut(PIECE).step_by(2);
        let pieces = pieces.map(|piece| RamPiece { base: piece.as_mut_ptr(), len: PIECE });
        // SAFETY: `buf` is not touched until the op has come back.
        let ram = unsafe { Ram::new(pieces.collect::<Vec<_>>()) };
        bench.mem.set_guest(ReqId(0), Mem::Ram(ram));
        let len = file.len() as u32;
        let segs = Segs::one(Seg { base: Base::Guest(ReqId(0)), off: 0, len });
        // More of them at once than there is memory for their lists.
        for _ in 0..4 {
            bench.push(read(0, segs));
        }
        let back = bench.drain();
        assert!(back.iter().all(|back| back.2 == Ok((IOV_MAX * PIECE) as u64)));
        assert_eq!(bench.backend.stats().pooled, 0);
        assert_eq!(bench.complete(read(0, segs)), Ok(()));
        let got: Vec<u8> = buf.chunks_exact(PIECE).step_by(2).flatten().copied().collect();
        assert!(got == file);
    }

    #[test]
    fn offsets_that_no_file_can_have_are_errors() {
        let Some(mut disk) = Disk::new(enter) else { return };
        let mut bench = Bench::new(&mut disk, &pattern(8, 11));
        for offset in [i64::MAX as u64, u64::MAX - BLOCK, u64::MAX] {
            for kind in [OpKind::Discard, OpKind::Allocate, OpKind::Zero { unmap: false }] {
                let op = Op { offset, ..bare(kind, 0, 1) };
                assert_eq!(bench.complete(op), Err(Errno::TOO_BIG), "{kind:?} at {offset}");
            }
        }
        let op = Op { offset: u64::MAX, ..bare(OpKind::Truncate, 0, 0) };
        assert_eq!(bench.complete(op), Err(Errno::TOO_BIG));
        bench.assert_contents(&pattern(8, 11));
    }

    #[test]
    fn dropping_waits_for_what_is_in_flight() {
        let Some(mut disk) = Disk::new(scripted) else { return };
        for direct in [true, false] {
            disk.direct = direct;
            let (old, new) = (pattern(256, 12), pattern(16, 13));
            let mut mem = Memory::new(0, 1, new.len());
            mem.pool_mut(BufId(0)).copy_from_slice(&new);
            let mut bench = Bench::new(&mut disk, &old);
            std::mem::swap(&mut bench.mem, &mut mem);
            for at in 0..16 {
                bench.push(write(16 * at, pool(0, 0, 16)));
            }
            // The last of them are not taken.
            script(&[Act::Take(12), Act::Fail(libc::EAGAIN)]);
            bench.submit();
            drop(bench);
            let contents = std::fs::read(disk.dir.path().join("file")).expect("it reads");
            let (taken, left) = contents.split_at(12 * new.len());
            assert!(taken.chunks(new.len()).all(|part| part == new));
            assert!(left == &old[taken.len()..]);
            assert!(calls().iter().all(|call| *call == (0, 1) || call.1 == 0));
        }
    }

    #[test]
    fn says_why_there_is_none() {
        let why = |errno| not_available(io::Error::from_raw_os_error(errno));
        assert_eq!(why(libc::ENOSYS).kind(), io::ErrorKind::Unsupported);
        assert_eq!(why(libc::EPERM).kind(), io::ErrorKind::PermissionDenied);
        assert!(why(libc::EPERM).to_string().contains("kernel.io_uring_disabled"));
        assert_eq!(why(libc::EMFILE).raw_os_error(), Some(libc::EMFILE));
    }
}
