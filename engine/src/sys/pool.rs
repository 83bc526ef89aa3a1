//! A backend of threads, for whatever may block or take long: buffered files, the ops that native
//! AIO cannot do, and computations.
//!
//! The model: one lock around a queue of jobs and a list of what is done, both with all their
//! room reserved; one condition variable that idle threads wait on; one eventfd. A thread is
//! started when there are more jobs than idle threads, up to a limit, so that a job stuck in a
//! slow call holds up nobody while a thread can be had. Threads end when the pool is dropped,
//! which waits for the calls they are in.
//!
//! Of the writes to one buffered file one goes on at a time: the kernel would have the others wait for the file's lock, or
//! spin for it, each on a thread that could read meanwhile.
//!
//! The invariant: under the lock, the eventfd is signalled if and only if the list of what is done
//! is not empty.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use smallvec::SmallVec;

use crate::backend::{Backend, Completion, FileInfo, Harvest, Submission};
use crate::mem::Memory;
use crate::op::OpKind;
use crate::ops::OpRecord;
use crate::sys::disk::DiskFile;
use crate::sys::files::{Files, NOT_ATTACHED};
use crate::sys::job::{Handle, Job, Pieces};
use crate::sys::syscalls::{self, EventFd};
use crate::units::{Errno, FileId, OpId, Time};

/// Limits of a [`Pool`].
#[derive(Clone, Copy, Debug)]
pub struct PoolOptions {
    /// The most threads. They are started as they are needed.
    pub threads: usize,
    /// The most ops at a time; more stay with the engine.
    pub depth: usize,
    /// All threads are started when the backend is made, and none after that: for a program that forbids itself
    /// to start any. Default: false, one at first and others as they are needed.
    pub up_front: bool,
}

impl Default for PoolOptions {
    fn default() -> PoolOptions {
        PoolOptions { threads: 16, depth: 256, up_front: false }
    }
}

/// Ops that a pool got so far, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Ranges to zero.
    pub zeroes: u64,
    /// Ranges to give up.
    pub discards: u64,
    /// Ranges to allocate.
    pub allocates: u64,
    /// Changes of length.
    pub truncates: u64,
    /// Computations.
    pub computes: u64,
    /// Questions where a file has holes.
    pub holes: u64,
    /// Copies from file to file.
    pub copies: u64,
}

impl PoolStats {
    fn count(&mut self, kind: OpKind) {
        let counter = match kind {
            OpKind::Read => &mut self.reads,
            OpKind::Write { .. } => &mut self.writes,
            OpKind::Flush => &mut self.flushes,
            OpKind::Zero { .. } => &mut self.zeroes,
            OpKind::Discard => &mut self.discards,
            OpKind::Allocate => &mut self.allocates,
            OpKind::Truncate => &mut self.truncates,
            OpKind::Compute(_) => &mut self.computes,
            OpKind::Hole => &mut self.holes,
            OpKind::Copy { .. } => &mut self.copies,
        };
        *counter += 1;
    }
}

/// Does ops on threads. See the module.
#[derive(Debug)]
pub struct Pool {
    // Before `files`: the threads use their descriptors.
    workers: Workers,
    files: Files<DiskFile>,
}

impl Pool {
    /// A backend without files. Starts its first thread.
    pub fn new(options: PoolOptions) -> io::Result<Pool> {
        Ok(Pool { workers: Workers::new(options, 0, perform)?, files: Files::new() })
    }

    /// What it got so far.
    pub fn stats(&self) -> PoolStats {
        self.workers.stats()
    }
}

impl Backend for Pool {
    type File = DiskFile;

    fn attach(&mut self, id: FileId, file: DiskFile) -> io::Result<FileInfo> {
        let info = file.info()?;
        self.files.attach(id, file)?;
        Ok(info)
    }

    fn detach(&mut self, id: FileId) -> Option<DiskFile> {
        self.files.detach(id)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        let handle = |id| self.files.get(id).map(DiskFile::handle);
        while self.workers.take_front(submission, handle).is_some() {}
        self.workers.start();
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        self.workers.collect(harvest.done, true);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.workers.event().borrow())
    }

    fn clock(&self) -> Time {
        crate::sys::clock()
    }
}

/// How a job is done; something else only in tests.
type Perform = fn(&Job) -> Result<u64, Errno>;

fn perform(job: &Job) -> Result<u64, Errno> {
    // SAFETY: the op is in flight until its result has been collected, and its memory stays where
    // it is until then. Whoever drops the pool earlier keeps the memory until the drop is over,
    // which waits for this call. What is computed with is of no other op, and no step looks at it.
    unsafe { job.perform() }
}

/// The threads and what they share, without files: the part that [`super::aio`] uses too.
#[derive(Debug)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    limit: usize,
    depth: usize,
    /// Jobs staged, queued, running or done, but not collected.
    in_flight: usize,
    /// Collected of what was not the pool's, and not counted by [`Workers::take_outside`] yet.
    outside: usize,
    /// Jobs on their way into the queue, to take the lock once for all of them.
    staged: Vec<Job>,
    /// Takes the place of the list of what is done when that is emptied.
    collected: Vec<Done>,
    /// Long piece lists to use again; short ones need no memory.
    spare: Vec<Pieces>,
    stats: PoolStats,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// Something is done: lets `collect` do without the lock when nothing is.
    ready: AtomicBool,
    event: EventFd,
    perform: Perform,
}

#[derive(Debug)]
struct State {
    queue: VecDeque<Job>,
    /// Files with a write that others would wait for.
    writing: Vec<RawFd>,
    done: Vec<Done>,
    idle: usize,
    /// One of the idle threads was woken and has not looked yet.
    waking: bool,
    closing: bool,
    /// A job has panicked.
    panicked: bool,
}

#[derive(Debug)]
struct Done {
    op: OpId,
    result: Result<u64, Errno>,
    pieces: Pieces,
    /// It is not one of the pool's jobs.
    outside: bool,
}

impl State {
    /// The first job that need not wait for another one's write.
    fn take(&mut self) -> Option<Job> {
        let State { queue, writing, .. } = self;
        let waits = |job: &Job| job.writes_alone().is_some_and(|fd| writing.contains(&fd));
        let at = queue.iter().position(|job| !waits(job))?;
        let job = queue.remove(at)?;
        writing.extend(job.writes_alone());
        Some(job)
    }

    /// There are so many jobs to start: is a thread to be woken? It wakes the next if there is more than it takes;
    /// often one that is at work already is there before it.
    fn wakes_one(&mut self, jobs: usize) -> bool {
        let wakes = jobs > 0 && self.idle > 0 && !self.waking;
        self.waking |= wakes;
        wakes
    }

    /// How many threads have something to do.
    fn startable(&self) -> usize {
        let mut writing: SmallVec<[RawFd; 8]> = SmallVec::from_slice(&self.writing);
        let starts = |job: &&Job| match job.writes_alone() {
            Some(fd) if writing.contains(&fd) => false,
            Some(fd) => {
                writing.push(fd);
                true
            }
            None => true,
        };
        self.queue.iter().filter(starts).count()
    }
}

/// Completes ops that are not the pool's as if they were.
#[derive(Clone, Debug)]
pub(crate) struct Outside(Arc<Shared>);

impl Outside {
    pub(crate) fn finish(&self, op: OpId, result: Result<u64, Errno>) {
        let done = Done { op, result, pieces: Pieces::new(), outside: true };
        self.0.finish(&mut self.0.lock(), done);
    }
}

impl Workers {
    /// `extra`: room for jobs that [`Workers::stage`] is given although there is none left.
    pub(crate) fn new(options: PoolOptions, extra: usize, perform: Perform) -> io::Result<Workers> {
        let depth = options.depth.max(1);
        let room = depth + extra;
        let state = State {
            queue: VecDeque::with_capacity(room),
            writing: Vec::with_capacity(options.threads.max(1)),
            done: Vec::with_capacity(room),
            idle: 0,
            waking: false,
            closing: false,
            panicked: false,
        };
        let mut workers = Workers {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                work: Condvar::new(),
                ready: AtomicBool::new(false),
                event: EventFd::new()?,
                perform,
            }),
            threads: Vec::with_capacity(options.threads.max(1)),
            limit: options.threads.max(1),
            depth,
            in_flight: 0,
            outside: 0,
            staged: Vec::with_capacity(room),
            collected: Vec::with_capacity(room),
            spare: Vec::with_capacity(room),
            stats: PoolStats::default(),
        };
        // With one thread running, failing to start another costs speed, not progress.
        let count = if options.up_front { workers.limit } else { 1 };
        for _ in 0..count {
            workers.start_thread()?;
        }
        Ok(workers)
    }

    /// As `new`, doing what ops say.
    pub(crate) fn for_files(options: PoolOptions, extra: usize) -> io::Result<Workers> {
        Workers::new(options, extra, perform)
    }

    pub(crate) fn stats(&self) -> PoolStats {
        self.stats
    }

    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        self.in_flight < self.depth
    }

    /// The eventfd. Its counter goes up by one when the first of what `collect` answers is done.
    pub(crate) fn event(&self) -> &EventFd {
        &self.shared.event
    }

    /// Is there something to collect?
    #[inline]
    pub(crate) fn is_ready(&self) -> bool {
        self.shared.ready.load(Ordering::Acquire)
    }

    /// Accepts an op; [`Workers::start`] starts it.
    pub(crate) fn stage(&mut self, op: OpId, record: &OpRecord, file: Handle, mem: &mut Memory) {
        let pieces = self.spare.pop().unwrap_or_default();
        self.staged.push(Job::new(op, record, file, mem, pieces));
        self.stats.count(record.op.kind);
        self.in_flight += 1;
    }

    /// Takes the front op, which is on a file that `handle` knows, or fails it. None: there is no op,
    /// or no room; otherwise whether it was staged.
    pub(crate) fn take_front(
        &mut self,
        submission: &mut Submission<'_>,
        handle: impl Fn(FileId) -> Option<Handle>,
    ) -> Option<bool> {
        if !self.has_room() {
            return None;
        }
        let &op = submission.waiting().first()?;
        let record = &submission.ops[op];
        let file = Handle::of(record, handle);
        match file {
            Some(file) => self.stage(op, record, file, submission.mem),
            None => self.fail(op, NOT_ATTACHED),
        }
        submission.take(1);
        Some(file.is_some())
    }

    /// Completes an op that cannot be done.
    pub(crate) fn fail(&mut self, op: OpId, error: Errno) {
        self.in_flight += 1;
        let done = Done { op, result: Err(error), pieces: Pieces::new(), outside: false };
        self.shared.finish(&mut self.shared.lock(), done);
    }

    /// For somebody else to complete ops with.
    pub(crate) fn outside(&self) -> Outside {
        Outside(Arc::clone(&self.shared))
    }

    /// How many ops were collected that others completed, since it was last asked.
    pub(crate) fn take_outside(&mut self) -> usize {
        std::mem::take(&mut self.outside)
    }

    /// Starts what was staged.
    #[inline]
    pub(crate) fn start(&mut self) {
        if !self.staged.is_empty() {
            self.start_staged();
        }
    }

    fn start_staged(&mut self) {
        let mut state = self.shared.lock();
        state.queue.extend(self.staged.drain(..));
        let (jobs, idle) = (state.startable(), state.idle);
        let wakes = state.wakes_one(jobs);
        drop(state);
        if wakes {
            self.shared.work.notify_one();
        }
        for _ in idle..jobs {
            if self.threads.len() >= self.limit || self.start_thread().is_err() {
                break;
            }
        }
    }

    /// Hands over what is done; answers whether the eventfd was signalled for it. `clear` clears
    /// the eventfd, too: for those who have it for themselves.
    ///
    /// # Panics
    ///
    /// If a job has: its op would never come back.
    #[inline]
    pub(crate) fn collect(&mut self, done: &mut Vec<Completion>, clear: bool) -> bool {
        self.is_ready() && self.collect_some(done, clear)
    }

    fn collect_some(&mut self, done: &mut Vec<Completion>, clear: bool) -> bool {
        let mut state = self.shared.lock();
        assert!(!state.panicked, "an op panicked on its thread");
        std::mem::swap(&mut state.done, &mut self.collected);
        self.shared.ready.store(false, Ordering::Relaxed);
        if clear {
            self.shared.event.clear();
        }
        drop(state);
        for Done { op, result, pieces, outside } in self.collected.drain(..) {
            if outside {
                self.outside += 1;
            } else {
                self.in_flight -= 1;
            }
            if pieces.spilled() {
                self.spare.push(pieces);
            }
            done.push(Completion::new(op, result));
        }
        true
    }

    fn start_thread(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        self.threads.push(syscalls::start_thread("cowbell-pool", move || shared.work())?);
        Ok(())
    }
}

impl Drop for Workers {
    /// Ends the threads. Jobs not yet begun are forgotten; those begun are waited for, for they
    /// use memory that may be freed next.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closing = true;
        state.queue.clear();
        drop(state);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding it; and if, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, state: &mut State, done: Done) {
        let first = state.done.is_empty();
        state.done.push(done);
        if first {
            self.ready.store(true, Ordering::Release);
            self.event.signal();
        }
    }

    /// A thread's life.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            if state.closing {
                return;
            }
            let Some(job) = state.take() else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                state.waking = false;
                continue;
            };
            let writes = job.writes_alone();
            let jobs = state.startable();
            let wakes = state.wakes_one(jobs);
            drop(state);
            if wakes {
                self.work.notify_one();
            }
            // A panic is for the loop, which would wait for ever for a thread that is no more.
            let result = catch_unwind(AssertUnwindSafe(|| (self.perform)(&job)));
            state = self.lock();
            if let Some(fd) = writes {
                state.writing.retain(|&other| other != fd);
            }
            state.panicked |= result.is_err();
            let result = result.unwrap_or(Err(Errno::IO));
            self.finish(
                &mut state,
                Done { op: job.op, result, pieces: job.pieces, outside: false },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use super::*;
    use crate::op::Op;
    use crate::ops::OpOwner;
    use crate::sys::syscalls::wait_readable;
    use crate::units::ReqId;

    const NO_FILE: Handle = Handle { fd: -1, is_block: false, one_writer: false, from: -1 };
    const BUFFERED: Handle = Handle { fd: 1, one_writer: true, ..NO_FILE };

    /// Jobs for which `offset` says on what occasion they end.
    const AT_ONCE: u64 = 0;
    const WHEN_TOLD: u64 = 1;

    static TOLD: (Mutex<u64>, Condvar) = (Mutex::new(0), Condvar::new());

    /// One test at a time uses `TOLD`.
    static TURN: Mutex<()> = Mutex::new(());

    fn tell(permits: u64) {
        *TOLD.0.lock().expect("not poisoned") += permits;
        TOLD.1.notify_all();
    }

    fn by_occasion(job: &Job) -> Result<u64, Errno> {
        if job.offset == WHEN_TOLD {
            let told = TOLD.0.lock().expect("not poisoned");
            *TOLD.1.wait_while(told, |told| *told == 0).expect("not poisoned") -= 1;
        }
        Ok(0)
    }

    fn stage(workers: &mut Workers, op: u32, occasion: u64) {
        stage_on(workers, NO_FILE, op, occasion);
    }

    fn stage_on(workers: &mut Workers, file: Handle, op: u32, occasion: u64) {
        let owner = OpOwner { request: ReqId(0), ordinal: op };
        let op_itself = Op::bare(OpKind::Discard, FileId(0), occasion, 1);
        let record = OpRecord { op: op_itself, moved: 0, owner, busy: true };
        workers.stage(OpId(op), &record, file, &mut Memory::default());
    }

    fn workers(threads: usize) -> Workers {
        let options = PoolOptions { threads, depth: 8, up_front: false };
        Workers::new(options, 0, by_occasion).expect("a thread starts")
    }

    /// What is done within a while; nothing is fine, too, if nothing is expected.
    fn collect(workers: &mut Workers, count: usize) -> Vec<u32> {
        let mut done = Vec::new();
        while done.len() < count {
            assert!(wait_readable(workers.event().fd(), 20_000), "{done:?} of {count}");
            assert!(workers.collect(&mut done, true));
        }
        assert!(!wait_readable(workers.event().fd(), 20));
        let mut ops: Vec<u32> = done.iter().map(|done| done.op.0).collect();
        ops.sort_unstable();
        ops
    }

    #[test]
    fn a_stuck_job_holds_up_nobody() {
        let _turn = TURN.lock().expect("not poisoned");
        let mut workers = workers(3);
        stage(&mut workers, 0, WHEN_TOLD);
        stage(&mut workers, 1, WHEN_TOLD);
        stage(&mut workers, 2, AT_ONCE);
        workers.start();
        assert_eq!(collect(&mut workers, 1), [2]);
        for op in 3..8 {
            stage(&mut workers, op, AT_ONCE);
            workers.start();
            assert_eq!(collect(&mut workers, 1), [op]);
        }
        assert!(!workers.is_ready());
        tell(2);
        assert_eq!(collect(&mut workers, 2), [0, 1]);
        assert!(workers.threads.len() <= 3);
    }

    #[test]
    fn one_write_at_a_time_goes_to_a_buffered_file_and_holds_up_nobody_else() {
        let _turn = TURN.lock().expect("not poisoned");
        let mut workers = workers(4);
        for op in 0..3 {
            stage_on(&mut workers, BUFFERED, op, WHEN_TOLD);
        }
        workers.start();
        stage_on(&mut workers, Handle { fd: 2, ..BUFFERED }, 3, AT_ONCE);
        stage(&mut workers, 4, AT_ONCE);
        workers.start();
        assert_eq!(collect(&mut workers, 2), [3, 4]);
        assert_eq!(workers.shared.lock().queue.len(), 2);
        for op in 0..3 {
            tell(1);
            assert_eq!(collect(&mut workers, 1), [op]);
        }
        assert!(workers.shared.lock().writing.is_empty());
    }

    #[test]
    fn all_threads_are_there_at_once_if_none_may_be_started_later() {
        let _turn = TURN.lock().expect("not poisoned");
        let options = PoolOptions { threads: 3, depth: 8, up_front: true };
        let mut workers = Workers::new(options, 0, by_occasion).expect("threads start");
        assert_eq!(workers.threads.len(), 3);
        for op in 0..8 {
            stage(&mut workers, op, AT_ONCE);
        }
        workers.start();
        assert_eq!(collect(&mut workers, 8).len(), 8);
        assert_eq!(workers.threads.len(), 3);
    }

    #[test]
    fn threads_are_started_as_needed_and_never_more_than_allowed() {
        let _turn = TURN.lock().expect("not poisoned");
        let mut workers = workers(2);
        assert_eq!(workers.threads.len(), 1);
        for op in 0..6 {
            stage(&mut workers, op, WHEN_TOLD);
        }
        stage(&mut workers, 6, AT_ONCE);
        stage(&mut workers, 7, AT_ONCE);
        assert!(!workers.has_room());
        workers.start();
        assert_eq!(workers.threads.len(), 2);
        tell(6);
        assert_eq!(collect(&mut workers, 8), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert!(workers.has_room());
    }

    #[test]
    fn dropping_waits_for_what_runs_and_forgets_what_does_not() {
        let _turn = TURN.lock().expect("not poisoned");
        let mut workers = workers(1);
        stage(&mut workers, 0, WHEN_TOLD);
        stage(&mut workers, 1, WHEN_TOLD); // for which nobody would ever tell
        workers.start();
        while workers.shared.lock().queue.len() > 1 {
            std::thread::yield_now();
        }
        let (sender, dropped): (Sender<()>, Receiver<()>) = channel();
        let dropper = std::thread::spawn(move || {
            drop(workers);
            let _ = sender.send(());
        });
        assert!(dropped.recv_timeout(Duration::from_millis(50)).is_err(), "a job still runs");
        tell(1);
        assert!(dropped.recv_timeout(Duration::from_secs(20)).is_ok());
        assert!(dropper.join().is_ok());
        assert_eq!(*TOLD.0.lock().expect("not poisoned"), 0);
    }

    #[test]
    fn steady_work_grows_nothing() {
        let _turn = TURN.lock().expect("not poisoned");
        let mut workers = workers(4);
        let room = |workers: &Workers| {
            let state = workers.shared.lock();
            let queues = [state.queue.capacity(), state.done.capacity()];
            (queues, workers.staged.capacity(), workers.collected.capacity())
        };
        let before = room(&workers);
        for _ in 0..100 {
            for op in 0..8 {
                stage(&mut workers, op, AT_ONCE);
            }
            workers.start();
            let mut done = Vec::new();
            while done.len() < 8 {
                assert!(wait_readable(workers.event().fd(), 20_000));
                workers.collect(&mut done, true);
            }
        }
        assert_eq!(room(&workers), before);
    }
}
