//! A backend of Linux native AIO.
//!
//! The model: every op that the kernel can do without blocking goes to it in as few `io_submit`
//! as possible. What it refuses to do without waiting (RWF_NOWAIT: writes into holes, most of all) goes
//! to its file's *lane* (`lane.rs`), a thread that submits it again and may wait; where a file has
//! refused writes of late (`regions`), the next ones go there at once. Everything else goes to a small
//! pool of threads inside: ops on buffered files (`io_submit` would do those itself, there and
//! then), truncate, allocate, zero, discard, whatever is computed, and what the kernel declares
//! itself unable to do. Kernel, lanes and pool signal the same eventfd. What the kernel has completed is
//! read from its ring in our memory, without a system call.
//!
//! Ops go out in the order of the queue. What the kernel does not accept stays in the engine's
//! queue; nothing is kept here between calls but what is in flight.
//!
//! The invariant that no wake-up is lost: the eventfd is cleared before the ring and the pool are
//! looked at, and each of them shows what it has before it signals. The invariant that there is
//! no false one for long: `unread` counts the signals belonging to what was collected, less those
//! cleared; while it is not 0, `harvest` clears again.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{ptr, slice};

use crate::backend::{Backend, Completion, FileInfo, Harvest, Submission};
use crate::mem::{Buf, Memory};
use crate::op::{OpKind, Target};
use crate::ops::OpRecord;
use crate::sys::disk::DiskFile;
use crate::sys::files::{Files, NOT_ATTACHED};
use crate::sys::iocb::{
    ContextId, FDSYNC, FLAG_RESFD, FROM_LANE, Iocb, PREAD, PREADV, PWRITE, PWRITEV, Submit,
};
use crate::sys::job::{Job, Pieces};
use crate::sys::lane::Lane;
use crate::sys::pool::{PoolOptions, PoolStats, Threads, Workers};
use crate::sys::ram::RamPiece;
use crate::sys::regions::Regions;
use crate::sys::syscalls::{self as sys, IOV_MAX};
use crate::units::{Errno, FileId, OpId, Time};

/// Few enough for any device, enough to keep it busy.
const DEPTH_LEAST: usize = 16;

/// Limits and choices of an [`Aio`].
#[derive(Clone, Copy, Debug)]
pub struct AioOptions {
    /// The most ops that the kernel has at a time, 128 by default, at least 1; more stay with the
    /// engine. Counts against the system's `fs.aio-max-nr`. Files opened with O_DIRECT bound it
    /// further, to half the places that their device's queue has (but not below 16): with all of
    /// them taken `io_submit` waits for one, whatever `nowait` says.
    pub depth: u32,
    /// Never wait in `io_submit`: ask the kernel to refuse what it could not do without waiting
    /// (RWF_NOWAIT), and let a thread of the file's submit that, in order. Where a file system does
    /// not know the flag, this changes nothing. On by default.
    pub nowait: bool,
    /// The pool, for what the kernel does not do.
    pub pool: PoolOptions,
}

impl Default for AioOptions {
    fn default() -> AioOptions {
        AioOptions { depth: 128, nowait: true, pool: PoolOptions::default() }
    }
}

/// What an [`Aio`] has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AioStats {
    /// Calls of `io_submit`.
    pub submits: u64,
    /// Ops that the kernel accepted.
    pub accepted: u64,
    /// Of these, ops that it gave back undone (EAGAIN), handed to the pool.
    pub handed_over: u64,
    /// Ops that the pool got, these included.
    pub pooled: u64,
}

/// Does ops through the kernel's AIO. See the module.
#[derive(Debug)]
pub struct Aio {
    // The order of the fields is the order in which they are dropped: first everything that uses
    // descriptors and memory, waiting for it to end.
    /// By file: what would hold the loop is submitted there.
    lanes: Files<Lane>,
    /// What failed in a lane, while completions are looked at.
    refused_twice: Vec<OpId>,
    /// A write was refused, of any file.
    refuses: bool,
    /// Some of them have staged jobs.
    is_staged: bool,
    context: Context,
    workers: Workers,
    files: Files<AioFile>,
    nowait: bool,
    /// Files may have lanes, each with a thread.
    has_lanes: bool,
    /// Ops that the kernel has.
    in_flight: usize,
    /// The most that it may have, with the files that there are.
    depth: usize,
    /// The same without files.
    depth_max: usize,
    /// The kernel takes no more, and said so when it had nothing of ours.
    stalled: bool,
    /// Signals of what was collected, less signals cleared. Negative while a cleared signal
    /// belongs to something not yet collected.
    unread: i64,
    batch: Batch,
    stats: AioStats,
}

#[derive(Debug)]
struct AioFile {
    /// In a box: what is looked at for each op is side by side.
    file: Box<DiskFile>,
    fd: RawFd,
    /// RWF_NOWAIT where it is wanted and the file system knows it, else 0.
    nowait: i32,
    way: Way,
    regions: Regions,
}

/// Who reads, writes and flushes a file.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Threads: it is buffered.
    Threads,
    /// The kernel, as far as it knows IOCB_CMD_FDSYNC and RWF_DSYNC here.
    Kernel { fdsync: bool, dsync: bool },
}

impl AioFile {
    /// How the kernel is told to do such an op: command and flags. `None`: not at all.
    #[inline(always)]
    fn command(&self, kind: OpKind) -> Option<(u16, i32)> {
        let Way::Kernel { fdsync, dsync } = self.way else { return None };
        match kind {
            OpKind::Read => Some((PREAD, self.nowait)),
            OpKind::Write { fua: false } => Some((PWRITE, self.nowait)),
            kind => self.rare_command(kind, fdsync, dsync),
        }
    }

    #[cold]
    fn rare_command(&self, kind: OpKind, fdsync: bool, dsync: bool) -> Option<(u16, i32)> {
        match kind {
            OpKind::Write { fua: true } if dsync => Some((PWRITE, self.nowait | libc::RWF_DSYNC)),
            OpKind::Flush if fdsync => Some((FDSYNC, 0)),
            _ => None,
        }
    }
}

impl Aio {
    /// A backend without files.
    pub fn new(options: AioOptions) -> io::Result<Aio> {
        Aio::with_calls(options, Calls::KERNEL)
    }

    /// The same, on threads that others have as well: of [`AioOptions::pool`] only the depth counts. Lanes are its own.
    pub fn over(threads: &Threads, options: AioOptions) -> io::Result<Aio> {
        let workers = Workers::over(threads, options.pool.depth, options.depth.max(1) as usize)?;
        Aio::with_workers(options, workers, Calls::KERNEL)
    }

    fn with_calls(options: AioOptions, calls: Calls) -> io::Result<Aio> {
        let workers = Workers::for_files(options.pool, options.depth.max(1) as usize)?;
        Aio::with_workers(options, workers, calls)
    }

    fn with_workers(options: AioOptions, workers: Workers, calls: Calls) -> io::Result<Aio> {
        let depth = options.depth.max(1);
        let has_lanes = !workers.threads().are_up_front();
        Ok(Aio {
            context: Context::new(depth, calls)?,
            batch: Batch::new(depth as usize, workers.event().fd()),
            workers,
            lanes: Files::new(),
            refused_twice: Vec::new(),
            refuses: false,
            is_staged: false,
            files: Files::new(),
            nowait: options.nowait,
            has_lanes,
            in_flight: 0,
            depth: depth as usize,
            depth_max: depth as usize,
            stalled: false,
            unread: 0,
            stats: AioStats::default(),
        })
    }

    /// What was done so far.
    pub fn stats(&self) -> AioStats {
        self.stats
    }

    /// What its pool got so far.
    pub fn pool_stats(&self) -> PoolStats {
        self.workers.stats()
    }

    /// Sends the batch: the first ops of the queue. Takes what the kernel took, or what failed,
    /// off the queue. True: all of it, go on.
    fn send(&mut self, submission: &mut Submission<'_>) -> bool {
        let count = self.batch.seal();
        let mut at = 0;
        while at < count {
            self.stats.submits += 1;
            match self.context.submit(&mut self.batch, at) {
                // It accepts some before it answers anything about the next: ask about that.
                Ok(accepted @ 1..) => {
                    at += accepted;
                    self.in_flight += accepted;
                    self.stats.accepted += accepted as u64;
                }
                Err(Errno::INTERRUPTED) => {}
                Ok(0) | Err(Errno::AGAIN) => {
                    self.stalled = true;
                    break;
                }
                // The error concerns the first op only, whatever it is.
                Err(error) => at += usize::from(self.refused(submission, at, error)),
            }
        }
        submission.take(at);
        at == count
    }

    /// The kernel refused the op at `at` of the batch. False: try it again, asked differently.
    fn refused(&mut self, submission: &mut Submission<'_>, at: usize, error: Errno) -> bool {
        let op = submission.waiting()[at]; // the batch is the front of the queue
        let record = &submission.ops[op];
        let Some(file) = self.files.get_mut(record.file()) else {
            self.workers.fail(op, NOT_ATTACHED);
            return true;
        };
        let iocb = &mut self.batch.iocbs[at];
        let unknown = error == Errno::INVALID || sys::unsupported(error);
        if unknown && iocb.rw_flags & libc::RWF_NOWAIT != 0 {
            file.nowait = 0;
            iocb.rw_flags &= !libc::RWF_NOWAIT;
            return false;
        }
        match (record.op.kind, &mut file.way) {
            (OpKind::Flush, Way::Kernel { fdsync, .. }) if unknown => *fdsync = false,
            (OpKind::Write { fua: true }, Way::Kernel { dsync, .. }) if unknown => *dsync = false,
            _ => {
                self.workers.fail(op, error);
                return true;
            }
        }
        let handle = file.file.handle();
        self.workers.stage(op, record, handle, submission.mem);
        self.stats.pooled += 1;
        true
    }

    /// Puts ops from the front of the queue into the batch, up to the first that is not for the
    /// kernel.
    #[inline]
    fn gather(&mut self, submission: &mut Submission<'_>) {
        let Batch { iocbs, lists, .. } = &mut self.batch;
        lists.clear();
        let mut count = 0;
        let room = self.depth.saturating_sub(self.in_flight);
        let Submission { queue, slice, ops, mem } = submission;
        for (&op, iocb) in queue.as_slice()[..*slice].iter().zip(&mut iocbs[..room]) {
            let record = &ops[op];
            let Some(file) = self.files.of(record) else { break };
            let Some((opcode, rw_flags)) = file.command(record.op.kind) else { break };
            (iocb.data, iocb.fd) = (u64::from(op.0), file.fd as u32);
            (iocb.opcode, iocb.rw_flags) = (opcode, rw_flags);
            // Beyond what is representable it becomes negative, which the kernel refuses.
            iocb.offset = record.offset() as i64;
            match mem.single(&record.op.segs, record.moved) {
                Some(piece) => {
                    iocb.buf = piece.base.expose_provenance() as u64;
                    iocb.count = piece.len as u64;
                }
                None => list(iocb, lists, mem, record),
            }
            count += 1;
        }
        self.batch.count = count;
    }

    /// Gives the front op to the pool. False: it has no room.
    fn front_to_pool(&mut self, submission: &mut Submission<'_>) -> bool {
        let handle = |id| self.files.get(id).map(|file| file.file.handle());
        let taken = self.workers.take_front(submission, handle);
        self.stats.pooled += u64::from(taken == Some(true));
        taken.is_some()
    }

    /// There are errors among the kernel's answers from `from` on. What it did not do at all a
    /// thread does instead, which may wait and makes interrupted calls again.
    #[cold]
    fn hand_over(&mut self, harvest: &mut Harvest<'_>, from: usize) {
        let mut kept = from;
        for at in from..harvest.done.len() {
            let done = harvest.done[at];
            let undone = matches!(done.result(), Err(Errno::AGAIN | Errno::INTERRUPTED));
            let record = &harvest.ops[done.op];
            if undone && let Some(file) = self.files.get_mut(record.file()) {
                if matches!(record.op.kind, OpKind::Write { .. }) {
                    file.regions.refused(record.offset());
                    self.refuses = true;
                }
                let (file, handle) = (record.file(), file.file.handle());
                self.stats.handed_over += 1;
                let may_wait =
                    record.op.kind.has_memory() && !self.refused_twice.contains(&done.op);
                if may_wait
                    && self.lane(file)
                    && let Some(lane) = self.lanes.get_mut(file)
                {
                    lane.stage(Job::new(done.op, record, handle, harvest.mem, Pieces::new()));
                    self.in_flight += 1;
                    self.is_staged = true;
                } else {
                    self.workers.stage(done.op, record, handle, harvest.mem);
                    self.stats.pooled += 1;
                }
            } else {
                harvest.done[kept] = done;
                kept += 1;
            }
        }
        harvest.done.truncate(kept);
        self.refused_twice.clear();
    }

    /// Stages what would be refused, as far as there is room.
    fn stage_refused(&mut self, submission: &mut Submission<'_>) {
        let Submission { queue, slice, ops, mem } = submission;
        *slice = queue.retain_of(*slice, |op| {
            let record = &ops[op];
            let (OpKind::Write { .. }, Target::File(id)) = (record.op.kind, record.op.target)
            else {
                return true;
            };
            let (Some(file), Some(lane)) = (self.files.get_mut(id), self.lanes.get_mut(id)) else {
                return true;
            };
            if self.in_flight >= self.depth || !file.regions.refuses(record.offset()) {
                return true;
            }
            lane.stage(Job::new(op, record, file.file.handle(), mem, Pieces::new()));
            self.in_flight += 1;
            self.is_staged = true;
            false
        });
    }

    /// No file's ops shall have all places of its device's queue.
    fn bound_depth(&mut self) {
        let places = self.files.iter_mut().filter_map(|file| file.file.queue_depth()).min();
        let bound = places.map_or(usize::MAX, |places| (places as usize / 2).max(DEPTH_LEAST));
        self.depth = self.depth_max.min(bound);
    }

    /// Is there a lane for `file`? It is made when it is first wanted.
    fn lane(&mut self, file: FileId) -> bool {
        if !self.has_lanes || self.lanes.get(file).is_some() {
            return self.has_lanes;
        }
        let (calls, id, event) = (self.context.calls, self.context.id, self.workers.event().fd());
        // SAFETY: lanes are dropped before the context, and memory stays until ops have come back.
        let lane =
            unsafe { Lane::new(calls.submit, id, event, self.workers.outside(), self.depth_max) };
        // Without a thread of its own an op goes to the pool.
        lane.is_ok_and(|lane| self.lanes.attach(file, lane).is_ok())
    }

    #[cold]
    fn start_lanes(&mut self) {
        self.is_staged = false;
        self.lanes.iter_mut().for_each(Lane::start);
    }

    /// Is the front op one for the kernel?
    fn front_is_ours(&self, submission: &Submission<'_>) -> bool {
        submission.peek().is_some_and(|(_, record)| {
            self.files.of(record).is_some_and(|file| file.command(record.op.kind).is_some())
        })
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        self.context.is_idle = self.in_flight == 0;
    }
}

impl Backend for Aio {
    type File = DiskFile;

    fn attach(&mut self, id: FileId, file: DiskFile) -> io::Result<FileInfo> {
        let info = file.info()?;
        let direct = file.is_direct();
        let nowait = self.nowait && direct && sys::takes_nowait(file.fd(), &mut Buf::zeroed(4096));
        let nowait = if nowait { libc::RWF_NOWAIT } else { 0 };
        let fd = file.fd();
        let way = if direct { Way::Kernel { fdsync: true, dsync: true } } else { Way::Threads };
        self.files.attach(
            id,
            AioFile { file: Box::new(file), fd, nowait, way, regions: Regions::default() },
        )?;
        self.bound_depth();
        Ok(info)
    }

    fn detach(&mut self, id: FileId) -> Option<DiskFile> {
        drop(self.lanes.detach(id));
        let file = self.files.detach(id)?.file;
        self.bound_depth();
        Some(*file)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        self.stalled = false;
        if self.refuses {
            self.stage_refused(submission);
        }
        while !submission.is_empty() {
            self.gather(submission);
            if !self.batch.is_empty() {
                if !self.send(submission) {
                    break;
                }
            } else if self.front_is_ours(submission) || !self.front_to_pool(submission) {
                break; // no room
            }
        }
        self.workers.start();
        if self.is_staged {
            self.start_lanes();
        }
    }

    #[inline]
    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        let something = self.context.has_events(self.in_flight) || self.workers.is_ready();
        if !something && self.unread == 0 {
            return;
        }
        self.unread -= self.workers.event().clear() as i64;
        let from = harvest.done.len();
        let mut answers = 0;
        let refused_twice = &mut self.refused_twice;
        self.context.take_events(self.in_flight, |events| {
            harvest.done.extend(events.iter().map(|event| {
                answers |= event.res;
                if event.res < 0 && event.data & FROM_LANE != 0 {
                    refused_twice.push(OpId(event.data as u32));
                }
                Completion::raw(OpId(event.data as u32), event.res)
            }));
        });
        let count = harvest.done.len() - from;
        self.in_flight -= count;
        self.unread += count as i64;
        if answers < 0 {
            self.hand_over(harvest, from);
        }
        self.unread += i64::from(self.workers.collect(harvest.done, false));
        self.in_flight -= self.workers.take_outside();
        self.workers.start();
        if self.is_staged {
            self.start_lanes();
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.workers.event().borrow())
    }

    /// The kernel had no room although it has nothing of ours: nothing of ours will come back to
    /// say that it has.
    fn wants_retry(&self) -> bool {
        self.stalled && self.in_flight == 0
    }

    fn clock(&self) -> Time {
        crate::sys::clock()
    }
}

/// Control blocks on their way to the kernel, which copies them: they are needed only during the
/// call.
struct Batch {
    iocbs: Box<[Iocb]>,
    /// How many of them are in use.
    count: usize,
    /// The address of each control block; made once, for they never move.
    pointers: Box<[*mut Iocb]>,
    /// The lists of ops with several pieces.
    lists: Vec<RamPiece>,
}

// SAFETY: the pointers lead into `iocbs`, which moves along; the pieces are `Send` themselves.
unsafe impl Send for Batch {}

impl Batch {
    fn new(depth: usize, event: RawFd) -> Batch {
        let blank = Iocb { flags: FLAG_RESFD, resfd: event as u32, ..Iocb::ZERO };
        let mut iocbs = vec![blank; depth].into_boxed_slice();
        let base = iocbs.as_mut_ptr();
        let pointers = (0..depth).map(|at| base.wrapping_add(at)).collect();
        Batch { iocbs, count: 0, pointers, lists: Vec::with_capacity(4 * depth) }
    }

    fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Puts the addresses of lists in, now that the lists do not move any more.
    #[inline]
    fn seal(&mut self) -> usize {
        if !self.lists.is_empty() {
            for iocb in &mut self.iocbs[..self.count] {
                if let PREADV | PWRITEV = iocb.opcode {
                    let list = self.lists.as_ptr().wrapping_add(iocb.buf as usize);
                    iocb.buf = list.expose_provenance() as u64;
                }
            }
        }
        self.count
    }
}

/// Makes `iocb` one with a list of its memory, or with none. Until the batch is sealed, its `buf`
/// is the place in `lists` where that begins.
#[inline(never)]
fn list(iocb: &mut Iocb, lists: &mut Vec<RamPiece>, mem: &mut Memory, record: &OpRecord) {
    if iocb.opcode == FDSYNC {
        (iocb.buf, iocb.count, iocb.offset) = (0, 0, 0);
        return;
    }
    let start = lists.len();
    mem.pieces(&record.op.segs, record.moved, |piece| {
        // What does not fit in one call is left to the next: a short count is legal.
        if lists.len() < start + IOV_MAX {
            lists.push(piece);
        }
    });
    iocb.opcode = if iocb.opcode == PREAD { PREADV } else { PWRITEV };
    iocb.buf = start as u64;
    iocb.count = (lists.len() - start) as u64;
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Batch({} of {})", self.count, self.iocbs.len())
    }
}

/// The kernel's answer (`struct io_event`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct IoEvent {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// The head of the ring that the kernel maps into our memory (`struct aio_ring`). The events
/// follow it.
#[repr(C)]
struct Ring {
    id: u32,
    /// Events that it holds.
    nr: u32,
    /// The next to be read. Ours to move.
    head: AtomicU32,
    /// One behind the last. The kernel's.
    tail: AtomicU32,
    magic: u32,
    compat_features: u32,
    incompat_features: u32,
    header_length: u32,
}

const RING_MAGIC: u32 = 0xa10a_10a1;

const _: () = {
    assert!(size_of::<IoEvent>() == 32);
    assert!(size_of::<Ring>() == 32);
};

/// What a test replaces.
#[derive(Clone, Copy, Debug)]
struct Calls {
    submit: Submit,
    destroy: unsafe fn(ContextId),
    use_ring: bool,
}

impl Calls {
    const KERNEL: Calls = Calls { submit: io_submit, destroy: io_destroy, use_ring: true };
}

/// Hands control blocks to the kernel.
///
/// # Safety
/// They are valid, the memory they name as well until their events have been read.
unsafe fn io_submit(id: ContextId, iocbs: &[*mut Iocb]) -> Result<usize, Errno> {
    // SAFETY: the caller's promise.
    let answer = unsafe {
        libc::syscall(libc::SYS_io_submit, id, iocbs.len() as libc::c_long, iocbs.as_ptr())
    };
    usize::try_from(answer).map_err(|_| Errno::from_io(&io::Error::last_os_error()))
}

/// Ends a context; waits until the kernel is done with all that was handed to it.
///
/// # Safety
/// Neither the id nor its ring are used again.
unsafe fn io_destroy(id: ContextId) {
    // SAFETY: the caller's promise.
    unsafe { libc::syscall(libc::SYS_io_destroy, id) };
}

/// The kernel's side of it.
struct Context {
    id: ContextId,
    /// Null: of a make we do not know, read by system call.
    ring: *const Ring,
    calls: Calls,
    /// Nothing is in flight, nor will be.
    is_idle: bool,
}

// SAFETY: the ring belongs to the process and is used by one thread at a time: ours.
unsafe impl Send for Context {}

impl Context {
    fn new(depth: u32, calls: Calls) -> io::Result<Context> {
        let mut id: ContextId = 0;
        // SAFETY: writes the id at the address.
        if unsafe { libc::syscall(libc::SYS_io_setup, depth as libc::c_long, &raw mut id) } < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EAGAIN) => io::Error::new(
                    io::ErrorKind::QuotaExceeded,
                    "the system's limit of AIO requests is reached (fs.aio-max-nr)",
                ),
                _ => error,
            });
        }
        let ring: *const Ring = ptr::with_exposed_provenance(id as usize);
        // SAFETY: the kernel has mapped its ring there; the libaio of every distribution relies
        // on it.
        let known = unsafe {
            (*ring).magic == RING_MAGIC
                && (*ring).incompat_features == 0
                && (*ring).header_length as usize == size_of::<Ring>()
        };
        let ring = if known && calls.use_ring { ring } else { ptr::null() };
        Ok(Context { id, ring, calls, is_idle: false })
    }

    /// Hands the control blocks from `from` on to the kernel.
    #[inline]
    fn submit(&self, batch: &mut Batch, from: usize) -> Result<usize, Errno> {
        // SAFETY: `pointers` lead to the control blocks, their lists are sealed, and the memory that
        // ops name stays until they have come back.
        unsafe { (self.calls.submit)(self.id, &batch.pointers[from..batch.count]) }
    }

    #[inline]
    fn ring(&self) -> Option<&Ring> {
        // SAFETY: null or the kernel's ring, mapped until the context is destroyed.
        unsafe { self.ring.as_ref() }
    }

    #[inline]
    fn has_events(&self, in_flight: usize) -> bool {
        match self.ring() {
            Some(ring) => ring.head.load(Ordering::Relaxed) != ring.tail.load(Ordering::Relaxed),
            None => in_flight > 0,
        }
    }

    /// Calls `each` for all that the kernel has completed.
    #[inline]
    fn take_events(&self, in_flight: usize, mut each: impl FnMut(&[IoEvent])) {
        let Some(ring) = self.ring() else { return self.ask_for_events(in_flight, each) };
        let events: *const IoEvent = self.ring.wrapping_add(1).cast();
        let head = ring.head.load(Ordering::Relaxed);
        // Acquire: events were written before the tail was moved past them.
        let tail = ring.tail.load(Ordering::Acquire);
        let stretches =
            if head <= tail { [(head, tail), (0, 0)] } else { [(head, ring.nr), (0, tail)] };
        for (from, to) in stretches {
            // SAFETY: `nr` events follow the head of the ring, `to` is no more; the kernel writes
            // these again only after the head has been moved past them.
            each(unsafe { slice::from_raw_parts(events.add(from as usize), (to - from) as usize) });
        }
        // Release: the events were read before their places are given up.
        ring.head.store(tail, Ordering::Release);
    }

    /// As `take_events`, by system call.
    #[cold]
    fn ask_for_events(&self, in_flight: usize, mut each: impl FnMut(&[IoEvent])) {
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let (least, most): (libc::c_long, libc::c_long) = (0, 1);
        for _ in 0..in_flight {
            let mut event = IoEvent::default();
            let (to, now) = (&raw mut event, &raw const now);
            // SAFETY: room for one event, and a timeout to read.
            let got =
                unsafe { libc::syscall(libc::SYS_io_getevents, self.id, least, most, to, now) };
            if got != 1 {
                break;
            }
            each(&[event]);
        }
    }
}

impl Drop for Context {
    /// Waits for all that is in flight: the kernel writes into memory that may be freed next. If nothing is, a
    /// thread waits for the kernel, which takes some 30 ms to be sure of it; where none can be started, this
    /// one does.
    fn drop(&mut self) {
        let (id, destroy) = (self.id, self.calls.destroy);
        // SAFETY: the id is ours, and not used again.
        let end = move || unsafe { destroy(id) };
        if !(self.is_idle && sys::start_thread("cowbell-end", end).is_ok()) {
            end();
        }
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Context({:#x}, ring: {})", self.id, !self.ring.is_null())
    }
}

#[cfg(all(test, feature = "contract"))]
mod tests {
    use std::collections::VecDeque;
    use std::os::fd::AsRawFd;
    use std::sync::Mutex;

    use super::*;
    use crate::contract::{
        BLOCK, Bench, FILE, Rig, bare, pattern, pool, range, read, run_all, write,
    };
    use crate::mem::Mem;
    use crate::op::{Base, Op, Seg, Segs};
    use crate::sys::disk::DiskOptions;
    use crate::sys::ram::Ram;
    use crate::sys::syscalls::wait_readable;
    use crate::units::{BufId, ReqId};

    /// What a call of `io_submit` shall do; when there is none left, what it always does.
    #[derive(Clone, Copy, Debug)]
    enum Act {
        /// Accept that many, for real.
        Accept(usize),
        /// Claim to have accepted all, and lose them.
        Lose,
        Fail(Errno),
    }

    /// What a call was given: how many, and the flags of the first.
    type Call = (usize, i32);

    thread_local! {
        static SCRIPT: Mutex<VecDeque<Act>> = const { Mutex::new(VecDeque::new()) };
        static CALLS: Mutex<Vec<Call>> = const { Mutex::new(Vec::new()) };
        static DESTROYED: Mutex<Vec<ContextId>> = const { Mutex::new(Vec::new()) };
        static CHAOS: Mutex<u64> = const { Mutex::new(1) };
    }

    fn script(acts: &[Act]) {
        SCRIPT.with(|script| script.lock().expect("one thread").extend(acts));
    }

    fn calls() -> Vec<Call> {
        CALLS.with(|calls| std::mem::take(&mut *calls.lock().expect("one thread")))
    }

    unsafe fn recorded_destroy(id: ContextId) {
        DESTROYED.with(|ids| ids.lock().expect("one thread").push(id));
        // SAFETY: the caller's promise.
        unsafe { io_destroy(id) };
    }

    unsafe fn scripted(id: ContextId, iocbs: &[*mut Iocb]) -> Result<usize, Errno> {
        // SAFETY: a control block, as `io_submit` wants it.
        let flags = unsafe { (*iocbs[0]).rw_flags };
        CALLS.with(|calls| calls.lock().expect("one thread").push((iocbs.len(), flags)));
        match SCRIPT.with(|script| script.lock().expect("one thread").pop_front()) {
            // SAFETY: the caller's promise.
            Some(Act::Accept(count)) => unsafe { io_submit(id, &iocbs[..count]) },
            Some(Act::Lose) => Ok(iocbs.len()),
            Some(Act::Fail(error)) => Err(error),
            // SAFETY: the caller's promise.
            None => unsafe { io_submit(id, iocbs) },
        }
    }

    /// Any behaviour that is allowed, in turns.
    unsafe fn chaotic(id: ContextId, iocbs: &[*mut Iocb]) -> Result<usize, Errno> {
        let dice = CHAOS.with(|state| {
            let mut state = state.lock().expect("one thread");
            *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (*state >> 33) as usize
        });
        match dice % 4 {
            0 => Err(Errno::AGAIN),
            1 => Err(Errno::INTERRUPTED),
            // SAFETY: the caller's promise.
            _ => unsafe { io_submit(id, &iocbs[..1 + dice / 4 % iocbs.len()]) },
        }
    }

    struct Disk {
        dir: tempfile::TempDir,
        nowait: bool,
        calls: Calls,
    }

    impl Disk {
        fn new(submit: unsafe fn(ContextId, &[*mut Iocb]) -> Result<usize, Errno>) -> Disk {
            // Beside the test itself: a disk, where the usual place may be memory.
            let exe = std::env::current_exe().expect("the test's path");
            let dir = tempfile::tempdir_in(exe.parent().expect("it is in a directory"));
            let calls = Calls { submit, destroy: recorded_destroy, use_ring: true };
            Disk { dir: dir.expect("a directory for scratch files"), nowait: false, calls }
        }
    }

    impl Rig for Disk {
        type Backend = Aio;

        fn make(&mut self, contents: &[u8]) -> (Aio, FileInfo) {
            let path = self.dir.path().join("file");
            let _ = std::fs::remove_file(&path);
            std::fs::write(&path, contents).expect("a scratch file");
            let options = DiskOptions { write: true, direct: true, ..DiskOptions::default() };
            let file = DiskFile::open(&path, &options).expect("the scratch file opens");
            let options = AioOptions { nowait: self.nowait, ..AioOptions::default() };
            let mut aio = Aio::with_calls(options, self.calls).expect("a backend");
            let info = aio.attach(FILE, file).expect("it attaches");
            (aio, info)
        }

        fn contents(&mut self, _: &mut Aio) -> Vec<u8> {
            std::fs::read(self.dir.path().join("file")).expect("the scratch file reads")
        }
    }

    fn push_reads(bench: &mut Bench<'_, Disk>, count: u64) {
        for block in 0..count {
            bench.push(read(block, pool(0, block, 1)));
        }
    }

    #[test]
    fn keeps_the_contract_whatever_io_submit_does() {
        run_all(&mut Disk::new(chaotic));
    }

    #[test]
    fn keeps_the_contract_without_the_ring() {
        let mut disk = Disk::new(io_submit);
        disk.calls.use_ring = false;
        run_all(&mut disk);
    }

    #[test]
    fn asks_again_for_what_was_not_accepted() {
        let mut disk = Disk::new(scripted);
        let mut bench = Bench::new(&mut disk, &pattern(8, 1));
        push_reads(&mut bench, 8);
        script(&[Act::Accept(3), Act::Accept(1)]);
        bench.submit();
        assert_eq!(calls(), [(8, 0), (5, 0), (4, 0)]);
        assert!(bench.queue.is_empty() && !bench.backend.wants_retry());
        assert_eq!(bench.backend.stats().accepted, 8);
        assert!(bench.drain().iter().all(|back| back.2 == Ok(BLOCK)));
        assert_eq!(bench.mem.pool(BufId(0))[range(0, 8)], pattern(8, 1));
    }

    #[test]
    fn leaves_places_of_a_device_free() {
        let mut disk = Disk::new(scripted);
        let mut bench = Bench::new(&mut disk, &pattern(8, 1));
        let most = |bench: &mut Bench<'_, Disk>, places: Option<u32>| {
            let mut file = bench.backend.detach(FILE).expect("it is attached");
            file.set_queue_depth(places);
            bench.backend.attach(FILE, file).expect("it was before");
            for _ in 0..200 {
                bench.push(read(0, pool(0, 0, 1)));
            }
            bench.submit();
            assert_eq!(bench.drain().len(), 200);
            calls().iter().map(|call| call.0).max()
        };
        for (places, depth) in [(None, 128), (Some(1024), 128), (Some(80), 40), (Some(2), 16)] {
            assert_eq!(most(&mut bench, places), Some(depth), "{places:?}");
        }
        assert_eq!(most(&mut bench, None), Some(128), "the file has gone");
    }

    #[test]
    fn wants_a_retry_when_nothing_would_wake_it() {
        let mut disk = Disk::new(scripted);
        let mut bench = Bench::new(&mut disk, &pattern(8, 2));
        push_reads(&mut bench, 4);
        script(&[Act::Fail(Errno::AGAIN)]);
        bench.submit();
        assert_eq!(bench.queue.len(), 4, "refused for now is not failed");
        assert!(bench.backend.wants_retry());

        // With something in flight, that will wake it.
        script(&[Act::Accept(1), Act::Fail(Errno::AGAIN)]);
        bench.submit();
        assert_eq!(bench.queue.len(), 3);
        assert!(!bench.backend.wants_retry());
        let fd = bench.backend.event_fd().expect("it has one").as_raw_fd();
        assert!(wait_readable(fd, 20_000));
        assert_eq!(bench.harvest().len(), 1);
        assert!(bench.backend.wants_retry(), "again nothing that would wake it");

        assert_eq!(bench.drain().len(), 3);
        assert!(!bench.backend.wants_retry());
    }

    #[test]
    fn an_error_concerns_the_first_alone() {
        let mut disk = Disk::new(scripted);
        let mut bench = Bench::new(&mut disk, &pattern(8, 3));
        push_reads(&mut bench, 6);
        let bad = bench.queue.as_slice()[2];
        script(&[Act::Accept(2), Act::Fail(Errno::IO)]);
        bench.submit();
        assert_eq!(calls(), [(6, 0), (4, 0), (3, 0)]);
        let back = bench.drain();
        assert_eq!(back.len(), 6);
        for (op, _, result) in back {
            assert_eq!(result, if op == bad { Err(Errno::IO) } else { Ok(BLOCK) });
        }
    }

    #[test]
    fn an_error_of_the_only_one_wakes_the_loop() {
        let mut disk = Disk::new(scripted);
        let mut bench = Bench::new(&mut disk, &pattern(8, 4));
        push_reads(&mut bench, 1);
        script(&[Act::Fail(Errno::INVALID)]);
        bench.submit();
        let fd = bench.backend.event_fd().expect("it has one").as_raw_fd();
        assert!(wait_readable(fd, 0));
        assert_eq!(bench.harvest()[0].2, Err(Errno::INVALID));
        assert!(!wait_readable(fd, 0));
    }

    #[test]
    fn flushes_on_a_thread_where_the_kernel_has_no_fdsync() {
        let mut disk = Disk::new(scripted);
        let mut bench = Bench::new(&mut disk, &pattern(8, 5));
        for (submits, pooled) in [(1, 1), (1, 2)] {
            script(&[Act::Fail(Errno::INVALID)]);
            assert_eq!(bench.complete(Op::flush(FILE)), Ok(()));
            let stats = bench.backend.stats();
            assert_eq!((stats.submits, stats.pooled), (submits, pooled), "asked once, not again");
        }
    }

    #[test]
    fn writes_stably_on_a_thread_where_the_kernel_has_no_dsync() {
        let mut disk = Disk::new(scripted);
        let mut bench = Bench::new(&mut disk, &pattern(8, 6));
        let fua = Op { kind: OpKind::Write { fua: true }, ..write(1, pool(0, 0, 1)) };
        for pooled in [1, 2] {
            script(&[Act::Fail(Errno::NOT_SUPPORTED)]);
            assert_eq!(bench.complete(fua.clone()), Ok(()));
            assert_eq!(bench.backend.stats().pooled, pooled);
        }
        assert_eq!(calls(), [(1, libc::RWF_DSYNC)]);
    }

    #[test]
    fn it_gives_up_asking_where_the_file_system_does_not_know_it() {
        let mut disk = Disk::new(scripted);
        disk.nowait = true;
        let mut bench = Bench::new(&mut disk, &pattern(8, 7));
        bench.backend.files.get_mut(FILE).expect("attached").nowait = libc::RWF_NOWAIT;
        push_reads(&mut bench, 2);
        let unknown = Act::Fail(Errno::NOT_SUPPORTED);
        script(&[unknown, Act::Accept(1), unknown]);
        bench.submit();
        let nowait = libc::RWF_NOWAIT;
        assert_eq!(calls(), [(2, nowait), (2, 0), (1, nowait), (1, 0)]);
        assert!(bench.drain().iter().all(|back| back.2 == Ok(BLOCK)));
        push_reads(&mut bench, 1);
        bench.drain();
        assert_eq!(calls(), [(1, 0)]);
    }

    /// As `scripted`, but a lane is refused everything.
    unsafe fn not_in_a_lane(id: ContextId, iocbs: &[*mut Iocb]) -> Result<usize, Errno> {
        if std::thread::current().name() == Some("cowbell-lane") {
            return Err(Errno::INVALID);
        }
        // SAFETY: the caller's promise.
        unsafe { scripted(id, iocbs) }
    }

    #[test]
    fn what_the_kernel_gives_back_undone_a_thread_submits_again() {
        for submit in [scripted, not_in_a_lane as Submit] {
            handed_over(submit);
        }
    }

    fn handed_over(submit: Submit) {
        let mut disk = Disk::new(submit);
        let file = pattern(8, 8);
        let mut bench = Bench::new(&mut disk, &file);
        push_reads(&mut bench, 2);
        let ops: Vec<_> = bench.queue.as_slice().to_vec();
        script(&[Act::Lose]);
        bench.submit();
        // The kernel's answers, by hand.
        for (op, errno) in ops.iter().zip([libc::EAGAIN, libc::EINTR]) {
            bench.inject(*op, -i64::from(errno));
        }
        let back = bench.drain();
        assert_eq!(back.len(), 2);
        assert!(back.iter().all(|back| back.2 == Ok(BLOCK)));
        assert_eq!(bench.mem.pool(BufId(0))[range(0, 2)], file[range(0, 2)]);
        let stats = bench.backend.stats();
        assert_eq!((stats.handed_over, stats.pooled), (2, 0));
        assert_eq!((bench.backend.in_flight, bench.backend.unread), (0, 0));
    }

    #[test]
    fn where_writes_were_refused_the_next_are_not_tried() {
        let mut disk = Disk::new(scripted);
        let mut bench = Bench::new(&mut disk, &pattern(8, 8));
        let tried = |bench: &mut Bench<'_, Disk>| {
            calls();
            bench.push(write(0, pool(1, 0, 1)));
            bench.submit();
            assert_eq!(bench.drain().len(), 1);
            !calls().is_empty()
        };
        assert!(tried(&mut bench));
        let op = bench.push(write(0, pool(1, 0, 1)));
        script(&[Act::Lose]);
        bench.submit();
        bench.inject(op, -i64::from(libc::EAGAIN));
        assert_eq!(bench.drain().len(), 1);
        assert!(!tried(&mut bench), "it goes to the lane at once");
        let untried = (0..100).take_while(|_| !tried(&mut bench)).count();
        assert!((1..100).contains(&untried), "one is tried again: it may be filled by now");
    }

    impl Bench<'_, Disk> {
        /// Makes it seem that the kernel answers `res` for `op`.
        fn inject(&mut self, op: OpId, res: i64) {
            self.with_harvest(|aio, harvest| {
                let from = harvest.done.len();
                harvest.done.push(Completion::raw(op, res));
                aio.in_flight -= 1;
                aio.hand_over(harvest, from);
                aio.start_lanes();
            });
        }
    }

    #[test]
    fn a_signal_that_comes_late_is_cleared() {
        let mut disk = Disk::new(io_submit);
        let mut bench = Bench::new(&mut disk, &pattern(8, 13));
        push_reads(&mut bench, 1);
        bench.submit();
        let fd = bench.backend.event_fd().expect("it has one").as_raw_fd();
        assert!(wait_readable(fd, 20_000));
        // The kernel shows the event first and signals then; as if it had not come to that yet.
        assert_eq!(bench.backend.workers.event().clear(), 1);
        assert_eq!(bench.harvest().len(), 1);
        assert!(bench.harvest().is_empty());
        bench.backend.workers.event().signal();
        assert!(bench.harvest().is_empty());
        assert!(!wait_readable(fd, 0), "a loop that looks at levels would spin");
        assert_eq!(bench.backend.unread, 0);
    }

    #[test]
    fn every_signal_is_accounted_for() {
        let mut disk = Disk::new(io_submit);
        let mut bench = Bench::new(&mut disk, &pattern(8, 14));
        for round in 0..50 {
            push_reads(&mut bench, 1 + round % 8);
            bench.push(bare(OpKind::Discard, 0, 0));
            let nowhere = read(0, pool(1, 0, 1));
            bench.push(Op { target: Target::File(FileId(5)), ..nowhere });
            bench.drain();
        }
        let fd = bench.backend.event_fd().expect("it has one").as_raw_fd();
        while wait_readable(fd, 5) {
            assert!(bench.harvest().is_empty());
        }
        // What is not accounted for costs a system call in each harvest from then on.
        assert_eq!(bench.backend.unread, 0);
    }

    #[test]
    fn truncate_and_its_like_go_to_a_thread() {
        let mut disk = Disk::new(scripted);
        let mut bench = Bench::new(&mut disk, &pattern(8, 9));
        for kind in [OpKind::Truncate, OpKind::Allocate, OpKind::Discard] {
            assert_eq!(bench.complete(bare(kind, 9, 1)), Ok(()));
        }
        let stats = bench.backend.stats();
        assert_eq!((stats.submits, stats.pooled), (0, 3));
    }

    #[test]
    fn a_list_too_long_for_one_call_is_done_in_parts() {
        const PIECE: usize = 512;
        let mut disk = Disk::new(io_submit);
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
        bench.push(read(0, segs));
        let first = bench.drain()[0].2;
        assert_eq!(first, Ok((IOV_MAX * PIECE) as u64));
        assert_eq!(bench.complete(read(0, segs)), Ok(()));
        let got: Vec<u8> = buf.chunks_exact(PIECE).step_by(2).flatten().copied().collect();
        assert!(got == file);
    }

    #[test]
    fn dropping_waits_for_what_is_in_flight() {
        let mut disk = Disk::new(io_submit);
        let (old, new) = (pattern(256, 11), pattern(16, 12));
        let mut mem = Memory::new(0, 1, new.len());
        mem.pool_mut(BufId(0)).copy_from_slice(&new);
        let mut bench = Bench::new(&mut disk, &old);
        std::mem::swap(&mut bench.mem, &mut mem);
        for at in 0..16 {
            bench.push(write(16 * at, pool(0, 0, 16)));
        }
        bench.submit();
        let id = bench.backend.context.id;
        drop(bench);
        let destroyed = DESTROYED.with(|ids| ids.lock().expect("one thread").clone());
        assert_eq!(destroyed, [id], "which the kernel does when it is done");
        let contents = std::fs::read(disk.dir.path().join("file")).expect("it reads");
        assert!(contents.chunks(new.len()).all(|part| part == new));
    }
}
