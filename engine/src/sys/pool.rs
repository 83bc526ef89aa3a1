//! A backend of threads, for whatever may block or take long: buffered files, the ops that native
//! AIO cannot do, and computations.
//!
//! The model: one lock around a queue of jobs and a list of what is done, both with all their
//! room reserved; one condition variable that idle threads wait on; one eventfd. A thread is
//! started when there are more jobs than idle threads, up to a limit, so that a job stuck in a
//! slow call holds up nobody while a thread can be had. Threads end when the pool is dropped,
//! which waits for the calls they are in.
//!
//! Several engines may have their threads together ([`Threads`]): a queue, a list and an eventfd for each, one
//! lock for all. A thread takes one job of the engine whose turn it is. Who is dropped waits for the calls of its own
//! jobs; the threads end with the last who has them.
//!
//! Of the writes to one buffered file one goes on at a time: the kernel would have the others wait for the file's lock, or
//! spin for it, each on a thread that could read meanwhile.
//!
//! The invariant: under the lock, an engine's eventfd is signalled if and only if its list of what is
//! done is not empty.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use slab::Slab;
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

    /// A backend without files, on threads that others have as well, for at most `depth` ops at a time.
    pub fn over(threads: &Threads, depth: usize) -> io::Result<Pool> {
        Ok(Pool { workers: Workers::over(threads, depth, 0)?, files: Files::new() })
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

/// Threads that several backends have together, each of them for an engine of its own: so a program with many
/// engines has no more threads than it wants. Give each backend a clone of this, or drop it: they keep it.
///
/// An engine gets its turn whatever others have in their queues. But a thread in a call that hangs is nobody's
/// meanwhile: if one engine's storage may hang, let its `depth` be less than the number of threads.
///
/// ```
/// use cowbell_engine::sys::aio::{Aio, AioOptions};
/// use cowbell_engine::sys::pool::{Pool, Threads};
///
/// # fn main() -> std::io::Result<()> {
/// let threads = Threads::new(8, false)?;
/// let one = Pool::over(&threads, 64)?;
/// let other = Aio::over(&threads, AioOptions::default())?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Threads(Arc<Team>);

/// The threads; the last who has them ends them.
#[derive(Debug)]
struct Team {
    shared: Arc<Shared>,
    handles: Mutex<Vec<JoinHandle<()>>>,
    limit: usize,
    up_front: bool,
}

impl Threads {
    /// At most `most` threads, one at first and others as they are needed; or all of them now, and none later, if
    /// `up_front`.
    ///
    /// # Errors
    ///
    /// A thread cannot be started.
    pub fn new(most: usize, up_front: bool) -> io::Result<Threads> {
        Threads::doing(most, up_front, perform)
    }

    fn doing(most: usize, up_front: bool, perform: Perform) -> io::Result<Threads> {
        let limit = most.max(1);
        let shared = Shared {
            state: Mutex::new(State::default()),
            work: Condvar::new(),
            ended: Condvar::new(),
            perform,
        };
        let handles = Mutex::new(Vec::with_capacity(limit));
        let team = Team { shared: Arc::new(shared), handles, limit, up_front };
        // With one thread running, failing to start another costs speed, not progress.
        let count = if up_front { limit } else { 1 };
        for _ in 0..count {
            team.start()?;
        }
        team.shared.lock().started = count;
        Ok(Threads(Arc::new(team)))
    }

    /// Does nobody start any later?
    pub(crate) fn are_up_front(&self) -> bool {
        self.0.up_front
    }
}

impl Team {
    fn start(&self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = syscalls::start_thread("cowbell-pool", move || shared.work())?;
        self.handles.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// So many more, which `started` counts already.
    fn start_all(&self, count: usize) {
        for at in 0..count {
            if self.start().is_err() {
                self.shared.lock().started -= count - at;
                return;
            }
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        let handles = self.handles.get_mut().unwrap_or_else(PoisonError::into_inner);
        for thread in handles.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One engine's place among the threads, without files: the part that [`super::aio`] uses too.
#[derive(Debug)]
pub(crate) struct Workers {
    threads: Threads,
    /// Its place.
    key: usize,
    told: Arc<Told>,
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

/// How an engine learns that something of its is done.
#[derive(Debug)]
struct Told {
    /// Something is: lets `collect` do without the lock when nothing is.
    ready: AtomicBool,
    event: EventFd,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Idle threads wait for it.
    work: Condvar,
    /// The last job of a place that is given up has ended.
    ended: Condvar,
    perform: Perform,
}

#[derive(Debug, Default)]
struct State {
    places: Slab<Place>,
    /// Those that have jobs in their queues, each once, in the order of their turns.
    turns: VecDeque<usize>,
    idle: usize,
    /// Threads that there are, or that somebody is about to start.
    started: usize,
    /// One of the idle threads was woken and has not looked yet.
    waking: bool,
    closing: bool,
}

/// What the threads have of one engine.
#[derive(Debug)]
struct Place {
    queue: VecDeque<Job>,
    /// Files with a write that others would wait for.
    writing: Vec<RawFd>,
    done: Vec<Done>,
    /// Jobs that threads are at.
    running: usize,
    /// Somebody waits until there are none.
    is_leaving: bool,
    /// A job has panicked.
    panicked: bool,
    told: Arc<Told>,
}

#[derive(Debug)]
struct Done {
    op: OpId,
    result: Result<u64, Errno>,
    pieces: Pieces,
    /// It is not one of the pool's jobs.
    outside: bool,
}

impl Place {
    /// The first job that need not wait for another one's write.
    fn take(&mut self) -> Option<Job> {
        let Place { queue, writing, .. } = self;
        let waits = |job: &Job| job.writes_alone().is_some_and(|fd| writing.contains(&fd));
        let at = queue.iter().position(|job| !waits(job))?;
        let job = queue.remove(at)?;
        writing.extend(job.writes_alone());
        self.running += 1;
        Some(job)
    }

    /// How many threads have something to do, up to `most`.
    fn startable(&self, most: usize) -> usize {
        let mut writing: SmallVec<[RawFd; 8]> = SmallVec::from_slice(&self.writing);
        let starts = |job: &&Job| match job.writes_alone() {
            Some(fd) if writing.contains(&fd) => false,
            Some(fd) => {
                writing.push(fd);
                true
            }
            None => true,
        };
        self.queue.iter().filter(starts).take(most).count()
    }

    fn finish(&mut self, done: Done) {
        let first = self.done.is_empty();
        self.done.push(done);
        if first {
            self.told.ready.store(true, Ordering::Release);
            self.told.event.signal();
        }
    }
}

impl State {
    /// A job of the one whose turn it is, or of the next that has one to be done now.
    fn take(&mut self) -> Option<(usize, Job)> {
        for _ in 0..self.turns.len() {
            let key = self.turns.pop_front()?;
            let place = &mut self.places[key];
            let job = place.take();
            if !place.queue.is_empty() {
                self.turns.push_back(key);
            }
            if let Some(job) = job {
                return Some((key, job));
            }
        }
        None
    }

    /// How many threads have something to do, up to `most`.
    fn startable(&self, most: usize) -> usize {
        let mut found = 0;
        for &key in &self.turns {
            if found == most {
                break;
            }
            found += self.places[key].startable(most - found);
        }
        found
    }

    /// There are so many jobs to start: is a thread to be woken? It wakes the next if there is more than it takes;
    /// often one that is at work already is there before it.
    fn wakes_one(&mut self, jobs: usize) -> bool {
        let wakes = jobs > 0 && self.idle > 0 && !self.waking;
        self.waking |= wakes;
        wakes
    }
}

/// Completes ops that are not the pool's as if they were. It ends before the [`Workers`] that it is of.
#[derive(Clone, Debug)]
pub(crate) struct Outside {
    shared: Arc<Shared>,
    key: usize,
}

impl Outside {
    pub(crate) fn finish(&self, op: OpId, result: Result<u64, Errno>) {
        let done = Done { op, result, pieces: Pieces::new(), outside: true };
        self.shared.lock().places[self.key].finish(done);
    }
}

impl Workers {
    /// With threads of its own. `extra`: room for jobs that [`Workers::stage`] is given although there is none left.
    pub(crate) fn new(options: PoolOptions, extra: usize, perform: Perform) -> io::Result<Workers> {
        let threads = Threads::doing(options.threads, options.up_front, perform)?;
        Workers::over(&threads, options.depth, extra)
    }

    /// As `new`, doing what ops say.
    pub(crate) fn for_files(options: PoolOptions, extra: usize) -> io::Result<Workers> {
        Workers::new(options, extra, perform)
    }

    /// With threads that others may have, too.
    pub(crate) fn over(threads: &Threads, depth: usize, extra: usize) -> io::Result<Workers> {
        let depth = depth.max(1);
        let room = depth + extra;
        let told = Arc::new(Told { ready: AtomicBool::new(false), event: EventFd::new()? });
        let place = Place {
            queue: VecDeque::with_capacity(room),
            writing: Vec::with_capacity(threads.0.limit),
            done: Vec::with_capacity(room),
            running: 0,
            is_leaving: false,
            panicked: false,
            told: Arc::clone(&told),
        };
        let mut state = threads.0.shared.lock();
        let key = state.places.insert(place);
        let count = state.places.len();
        let turns = state.turns.len();
        state.turns.reserve(count - turns);
        drop(state);
        Ok(Workers {
            threads: threads.clone(),
            key,
            told,
            depth,
            in_flight: 0,
            outside: 0,
            staged: Vec::with_capacity(room),
            collected: Vec::with_capacity(room),
            spare: Vec::with_capacity(room),
            stats: PoolStats::default(),
        })
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.threads.0.shared
    }

    pub(crate) fn threads(&self) -> &Threads {
        &self.threads
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
        &self.told.event
    }

    /// Is there something to collect?
    #[inline]
    pub(crate) fn is_ready(&self) -> bool {
        self.told.ready.load(Ordering::Acquire)
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
        self.shared().lock().places[self.key].finish(done);
    }

    /// For somebody else to complete ops with.
    pub(crate) fn outside(&self) -> Outside {
        Outside { shared: Arc::clone(self.shared()), key: self.key }
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
        let Workers { threads: Threads(team), key, staged, .. } = self;
        let mut guard = team.shared.lock();
        let state = &mut *guard;
        let queue = &mut state.places[*key].queue;
        if queue.is_empty() {
            state.turns.push_back(*key);
        }
        queue.extend(staged.drain(..));
        let (idle, more) = (state.idle, team.limit.saturating_sub(state.started));
        let jobs = state.startable((idle + more).max(1));
        let wakes = state.wakes_one(jobs);
        let starts = jobs.saturating_sub(idle).min(more);
        state.started += starts;
        drop(guard);
        if wakes {
            team.shared.work.notify_one();
        }
        team.start_all(starts);
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
        let mut state = self.threads.0.shared.lock();
        let place = &mut state.places[self.key];
        assert!(!place.panicked, "an op panicked on its thread");
        std::mem::swap(&mut place.done, &mut self.collected);
        self.told.ready.store(false, Ordering::Relaxed);
        if clear {
            self.told.event.clear();
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
}

impl Drop for Workers {
    /// Gives the place up. Jobs not yet begun are forgotten; those begun are waited for, for they
    /// use memory that may be freed next.
    fn drop(&mut self) {
        let shared = self.shared();
        let mut state = shared.lock();
        state.turns.retain(|&key| key != self.key);
        let place = &mut state.places[self.key];
        place.is_leaving = true;
        place.queue.clear();
        while state.places[self.key].running > 0 {
            state = shared.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.places.remove(self.key);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding it; and if, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread's life.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            if state.closing {
                return;
            }
            let Some((key, job)) = state.take() else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                state.waking = false;
                continue;
            };
            let writes = job.writes_alone();
            let jobs = state.startable(1);
            let wakes = state.wakes_one(jobs);
            drop(state);
            if wakes {
                self.work.notify_one();
            }
            // A panic is for the loop, which would wait for ever for a thread that is no more.
            let result = catch_unwind(AssertUnwindSafe(|| (self.perform)(&job)));
            state = self.lock();
            let place = &mut state.places[key];
            if let Some(fd) = writes {
                place.writing.retain(|&other| other != fd);
            }
            place.panicked |= result.is_err();
            let result = result.unwrap_or(Err(Errno::IO));
            place.finish(Done { op: job.op, result, pieces: job.pieces, outside: false });
            place.running -= 1;
            if place.running == 0 && place.is_leaving {
                self.ended.notify_all();
            }
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

    /// Threads that there are.
    fn count(workers: &Workers) -> usize {
        workers.threads.0.handles.lock().expect("not poisoned").len()
    }

    fn place<T>(workers: &Workers, of: impl FnOnce(&Place) -> T) -> T {
        of(&workers.shared().lock().places[workers.key])
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
        assert!(count(&workers) <= 3);
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
        assert_eq!(place(&workers, |place| place.queue.len()), 2);
        for op in 0..3 {
            tell(1);
            assert_eq!(collect(&mut workers, 1), [op]);
        }
        assert!(place(&workers, |place| place.writing.is_empty()));
    }

    #[test]
    fn all_threads_are_there_at_once_if_none_may_be_started_later() {
        let _turn = TURN.lock().expect("not poisoned");
        let options = PoolOptions { threads: 3, depth: 8, up_front: true };
        let mut workers = Workers::new(options, 0, by_occasion).expect("threads start");
        assert_eq!(count(&workers), 3);
        for op in 0..8 {
            stage(&mut workers, op, AT_ONCE);
        }
        workers.start();
        assert_eq!(collect(&mut workers, 8).len(), 8);
        assert_eq!(count(&workers), 3);
    }

    #[test]
    fn threads_are_started_as_needed_and_never_more_than_allowed() {
        let _turn = TURN.lock().expect("not poisoned");
        let mut workers = workers(2);
        assert_eq!(count(&workers), 1);
        for op in 0..6 {
            stage(&mut workers, op, WHEN_TOLD);
        }
        stage(&mut workers, 6, AT_ONCE);
        stage(&mut workers, 7, AT_ONCE);
        assert!(!workers.has_room());
        workers.start();
        assert_eq!(count(&workers), 2);
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
        while place(&workers, |place| place.queue.len()) > 1 {
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
            let queues = place(workers, |place| [place.queue.capacity(), place.done.capacity()]);
            let turns = workers.shared().lock().turns.capacity();
            (queues, turns, workers.staged.capacity(), workers.collected.capacity())
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

    fn together(count: u32, threads: usize) -> Vec<Workers> {
        let threads = Threads::doing(threads, false, by_occasion).expect("a thread starts");
        (0..count).map(|_| Workers::over(&threads, 8, 0).expect("a place")).collect()
    }

    #[test]
    fn engines_have_their_threads_together_and_each_gets_its_own_back() {
        let _turn = TURN.lock().expect("not poisoned");
        let mut engines = together(5, 2);
        for round in 0..20 {
            for (n, workers) in engines.iter_mut().enumerate() {
                for op in 0..=n as u32 {
                    stage(workers, 100 * round + 10 * n as u32 + op, AT_ONCE);
                }
                workers.start();
            }
            for (n, workers) in engines.iter_mut().enumerate() {
                let first = 100 * round + 10 * n as u32;
                let expected: Vec<u32> = (first..=first + n as u32).collect();
                assert_eq!(collect(workers, n + 1), expected);
            }
        }
        assert_eq!(count(&engines[0]), 2);
        let shared = Arc::clone(engines[0].shared());
        while engines.pop().is_some() {
            assert_eq!(shared.lock().places.len(), engines.len());
        }
        assert_eq!(Arc::strong_count(&shared), 1, "the threads have ended");
    }

    #[test]
    fn an_engine_whose_jobs_hang_stops_no_other_while_a_thread_is_free() {
        let _turn = TURN.lock().expect("not poisoned");
        let mut engines = together(3, 2);
        let [hung, quick, other] = &mut engines[..] else { unreachable!("three of them") };
        stage(hung, 0, WHEN_TOLD);
        hung.start();
        for op in 0..50 {
            for workers in [&mut *quick, &mut *other] {
                stage(workers, op, AT_ONCE);
                workers.start();
                assert_eq!(collect(workers, 1), [op]);
            }
        }
        assert!(!hung.is_ready());
        tell(1);
        assert_eq!(collect(hung, 1), [0]);
    }

    /// With one thread, one after the other: the offset says on what occasion, the op whose it is.
    #[test]
    fn a_long_queue_of_one_engine_is_not_done_before_a_short_one_of_another() {
        static ORDER: Mutex<Vec<u32>> = Mutex::new(Vec::new());
        fn in_order(job: &Job) -> Result<u64, Errno> {
            ORDER.lock().expect("not poisoned").push(job.op.0);
            by_occasion(job)
        }
        let _turn = TURN.lock().expect("not poisoned");
        let threads = Threads::doing(1, false, in_order).expect("a thread starts");
        let [mut long, mut short] =
            [8, 8].map(|depth| Workers::over(&threads, depth, 0).expect("a place"));
        stage(&mut long, 0, WHEN_TOLD);
        long.start();
        while place(&long, |place| place.running) == 0 {
            std::thread::yield_now();
        }
        (1..8).for_each(|op| stage(&mut long, op, AT_ONCE));
        long.start();
        (10..12).for_each(|op| stage(&mut short, op, AT_ONCE));
        short.start();
        tell(1);
        assert_eq!(collect(&mut short, 2), [10, 11]);
        assert_eq!(collect(&mut long, 8).len(), 8);
        let order = ORDER.lock().expect("not poisoned").clone();
        assert_eq!(order, [0, 1, 10, 2, 11, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn who_is_dropped_waits_for_its_own_jobs_alone() {
        let _turn = TURN.lock().expect("not poisoned");
        let mut engines = together(3, 2);
        stage(&mut engines[0], 0, WHEN_TOLD);
        engines[0].start();
        // Another one goes while that hangs, and forgets what it had not begun.
        let mut leaves = engines.pop().expect("three of them");
        (0..8).for_each(|op| stage(&mut leaves, op, AT_ONCE));
        leaves.start();
        drop(leaves);
        stage(&mut engines[1], 5, AT_ONCE);
        engines[1].start();
        assert_eq!(collect(&mut engines[1], 1), [5]);
        // That which hangs is waited for, and the last one works on.
        let mut works = engines.pop().expect("two of them");
        let hung = engines.pop().expect("one of them");
        let (sender, dropped): (Sender<()>, Receiver<()>) = channel();
        let dropper = std::thread::spawn(move || {
            drop(hung);
            let _ = sender.send(());
        });
        for op in 0..20 {
            stage(&mut works, op, AT_ONCE);
            works.start();
            assert_eq!(collect(&mut works, 1), [op]);
        }
        assert!(dropped.recv_timeout(Duration::from_millis(50)).is_err(), "its job still runs");
        tell(1);
        assert!(dropped.recv_timeout(Duration::from_secs(20)).is_ok());
        assert!(dropper.join().is_ok());
        stage(&mut works, 7, AT_ONCE);
        works.start();
        assert_eq!(collect(&mut works, 1), [7]);
    }
}
