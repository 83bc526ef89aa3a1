//! A thread that may wait inside `io_submit`, so that the loop need not: one for each file that
//! needs it.
//!
//! What the kernel refused to do without waiting (a write into a hole, one that finds the file's
//! lock taken) goes here, in order. The thread submits it again to the same context, in batches and
//! without RWF_NOWAIT, and is done with it: the kernel completes it into the context's ring like
//! everything else. So there is one thread where there would be one for each op in flight, and
//! no two of them want one file's lock.

use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::sys::iocb::{ContextId, Iocb, Submit};
use crate::sys::job::Job;
use crate::sys::pool::Outside;
use crate::sys::syscalls;
use crate::units::Errno;

/// See the module.
#[derive(Debug)]
pub(super) struct Lane {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Jobs on their way, to take the lock once for all of them.
    staged: Vec<Job>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    submit: Submit,
    context: ContextId,
    event: RawFd,
    outside: Outside,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<Job>,
    closing: bool,
}

/// Control blocks in one call: what comes meanwhile need not wait for more.
const BATCH: usize = 32;

impl Lane {
    /// A lane into `context`, whose completions signal `event`; with room for `depth` jobs.
    ///
    /// # Safety
    /// The context lives until the lane is dropped, which waits for the call under way. What is
    /// staged stays valid until its completion was read from the context's ring or collected from
    /// the pool.
    pub(super) unsafe fn new(
        submit: Submit,
        context: ContextId,
        event: RawFd,
        outside: Outside,
        depth: usize,
    ) -> io::Result<Lane> {
        let state = State { waiting: Vec::with_capacity(depth), closing: false };
        let state = Mutex::new(state);
        let work = Condvar::new();
        let shared = Arc::new(Shared { state, work, submit, context, event, outside });
        let theirs = Arc::clone(&shared);
        let thread = syscalls::start_thread("cowbell-lane", move || theirs.work(depth))?;
        Ok(Lane { shared, thread: Some(thread), staged: Vec::with_capacity(depth) })
    }

    /// Accepts a job; [`Lane::start`] starts it.
    pub(super) fn stage(&mut self, job: Job) {
        self.staged.push(job);
    }

    /// Starts what was staged.
    pub(super) fn start(&mut self) {
        if self.staged.is_empty() {
            return;
        }
        self.shared.lock().waiting.append(&mut self.staged);
        self.shared.work.notify_one();
    }
}

impl Drop for Lane {
    /// Ends the thread. Jobs not yet begun are forgotten.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closing = true;
        state.waiting.clear();
        drop(state);
        self.shared.work.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding it; and if, the state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread's life.
    fn work(&self, depth: usize) {
        let mut jobs: Vec<Job> = Vec::with_capacity(depth);
        let mut iocbs = [Iocb::ZERO; BATCH];
        loop {
            let mut state = self.lock();
            while state.waiting.is_empty() && !state.closing {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.closing {
                return;
            }
            mem::swap(&mut state.waiting, &mut jobs);
            drop(state);
            for batch in jobs.chunks(BATCH) {
                self.submit_all(batch, &mut iocbs);
            }
            jobs.clear();
        }
    }

    fn submit_all(&self, jobs: &[Job], iocbs: &mut [Iocb; BATCH]) {
        for (job, iocb) in jobs.iter().zip(iocbs.iter_mut()) {
            *iocb = Iocb::of(job, self.event);
        }
        let pointers: [*mut Iocb; BATCH] = iocbs.each_mut().map(|iocb| &raw mut *iocb);
        let mut at = 0;
        while at < jobs.len() {
            // SAFETY: the context lives, and so does the memory of the jobs (see `new`); the control
            // blocks and lists are needed for the call alone.
            match unsafe { (self.submit)(self.context, &pointers[at..jobs.len()]) } {
                Ok(accepted @ 1..) => at += accepted,
                Err(Errno::INTERRUPTED) => {}
                // The error concerns the first alone. The plain call may wait, and knows why not.
                Ok(0) | Err(_) => {
                    let job = &jobs[at];
                    // SAFETY: the memory is valid until the result was collected (see `new`).
                    self.outside.finish(job.op, unsafe { job.perform() });
                    at += 1;
                }
            }
        }
    }
}
