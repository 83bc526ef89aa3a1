//! Closes files on a thread of its own: closing may wait for a file system, and the loop does not.

use std::mem::MaybeUninit;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

use cowbell_engine::sys::disk::DiskFile;

/// Begins its thread when there is something to close. Dropping it waits for that.
#[derive(Default)]
pub(crate) struct Closer {
    thread: Option<(Sender<Vec<DiskFile>>, JoinHandle<()>)>,
}

impl Closer {
    /// Closes `files`; their locks are given back at once.
    pub fn close(&mut self, mut files: Vec<DiskFile>) {
        files.iter_mut().for_each(DiskFile::unlock);
        if self.thread.is_none() {
            self.thread = without_signals(|| {
                let (sender, receiver) = channel::<Vec<DiskFile>>();
                let close_all = move || receiver.iter().for_each(drop);
                let thread = thread::Builder::new().name("cowbell-close".into()).spawn(close_all);
                Some((sender, thread.ok()?))
            });
        }
        // Without a thread they are closed here.
        if let Some((sender, _)) = &self.thread {
            let _ = sender.send(files);
        }
    }
}

impl Drop for Closer {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.thread.take() {
            drop(sender);
            let _ = thread.join();
        }
    }
}

/// Runs `start` with all signals blocked, which the thread that it starts inherits: the program's
/// handlers run on the program's threads.
fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `all` is written before it is read; `before` is written by the call that succeeds.
    let is_blocked = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) == 0
    };
    let started = start();
    if is_blocked {
        // SAFETY: the mask was put there by the call above.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut());
        }
    }
    started
}
