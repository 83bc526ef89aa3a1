//! Who does the I/O: one of the engine's backends, chosen when an engine is made.

use std::io;
use std::os::fd::BorrowedFd;
use std::thread::ThreadId;

use cowbell_engine::backend::{Backend, FileInfo, Harvest, Submission};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::pool::{Pool, PoolOptions};
#[cfg(feature = "io_uring")]
use cowbell_engine::sys::uring::{Uring, UringOptions};
use cowbell_engine::units::{Errno, FileId, Time};

use crate::engine::{COWBELL_BACKEND_IO_URING, COWBELL_BACKEND_NATIVE, COWBELL_BACKEND_THREADS};

/// One of them. A call through a pointer for each batch is nothing beside the batch.
pub(crate) struct Chosen {
    backend: Box<dyn Backend<File = DiskFile>>,
    /// The only thread that may use it; `None`: any.
    pub thread: Option<ThreadId>,
}

impl Chosen {
    /// `which` is one of `COWBELL_BACKEND_*`; `depth`, if it is not 0, the most ops that the kernel
    /// has at a time, and the most threads.
    pub fn new(which: u32, depth: usize) -> Result<Chosen, Errno> {
        let failed = |why: io::Error| Errno::from_io(&why);
        match which {
            COWBELL_BACKEND_NATIVE => {
                let mut options = AioOptions::default();
                if depth > 0 {
                    options.depth = depth as u32;
                }
                Ok(Chosen::movable(Aio::new(options).map_err(failed)?))
            }
            #[cfg(feature = "io_uring")]
            COWBELL_BACKEND_IO_URING => {
                let mut options = UringOptions::default();
                if depth > 0 {
                    options.depth = depth as u32;
                }
                let uring = Uring::new(options).map_err(failed)?;
                let thread = Some(std::thread::current().id());
                Ok(Chosen { backend: Box::new(uring), thread })
            }
            #[cfg(not(feature = "io_uring"))]
            COWBELL_BACKEND_IO_URING => Err(Errno::NOT_SUPPORTED),
            COWBELL_BACKEND_THREADS => {
                let mut options = PoolOptions::default();
                if depth > 0 {
                    options.threads = depth.min(THREADS_MAX);
                }
                Ok(Chosen::movable(Pool::new(options).map_err(failed)?))
            }
            _ => Err(Errno::INVALID),
        }
    }

    /// Of a backend that one thread after the other may use.
    pub fn movable(backend: impl Backend<File = DiskFile> + Send + 'static) -> Chosen {
        Chosen { backend: Box::new(backend), thread: None }
    }
}

/// As many as QEMU starts.
const THREADS_MAX: usize = 64;

impl Backend for Chosen {
    type File = DiskFile;

    fn attach(&mut self, id: FileId, file: DiskFile) -> io::Result<FileInfo> {
        self.backend.attach(id, file)
    }
    fn detach(&mut self, id: FileId) -> Option<DiskFile> {
        self.backend.detach(id)
    }
    fn submit(&mut self, submission: &mut Submission<'_>) {
        self.backend.submit(submission);
    }
    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        self.backend.harvest(harvest);
    }
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.event_fd()
    }
    fn wants_retry(&self) -> bool {
        self.backend.wants_retry()
    }
    fn next_deadline(&self) -> Option<Time> {
        self.backend.next_deadline()
    }
    fn clock(&self) -> Time {
        self.backend.clock()
    }
}
