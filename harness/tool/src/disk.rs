//! The real disk: how images are found on it, and who does their I/O.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use cowbell_engine::backend::{Backend, FileInfo, Harvest, Submission};
use cowbell_engine::store::{Extent, Store};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::lock::{Lock, LockError, LockState, Locking};
use cowbell_engine::sys::pool::{Pool, PoolOptions, PoolStats};
#[cfg(feature = "io_uring")]
use cowbell_engine::sys::uring::{Uring, UringOptions};
use cowbell_engine::units::{FileId, Time};
use cowbell_formats::{DiskHost, Host};

use crate::cache::How;
#[cfg(feature = "io_uring")]
use crate::fail::Program;
use crate::locking;
#[cfg(feature = "io_uring")]
use crate::session::eprint_quietly;
use crate::stop::Stop;

/// The real disk, for long work that Ctrl-C shall end: every write asks first.
#[derive(Clone, Debug)]
pub struct StoppableHost {
    /// The disk.
    pub disk: DiskHost,
    /// Who may ask.
    pub stop: Stop,
}

/// A file on a [`StoppableHost`].
#[derive(Debug)]
pub struct StoppableFile {
    file: DiskFile,
    path: PathBuf,
    stop: Stop,
}

impl StoppableFile {
    fn go_on(&self) -> io::Result<()> {
        if self.stop.is_asked() { Err(io::Error::from_raw_os_error(EINTR)) } else { Ok(()) }
    }
}

/// "Interrupted system call".
const EINTR: i32 = 4;

impl Store for StoppableFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.go_on()?;
        self.file.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.go_on()?;
        self.file.write_at(offset, buf)
    }
    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.go_on()?;
        self.file.allocate(offset, len)
    }
    fn extent_at(&self, offset: u64) -> io::Result<Extent> {
        self.file.extent_at(offset)
    }
    fn is_writable(&self) -> bool {
        self.file.is_writable()
    }
    fn has_fixed_len(&self) -> bool {
        self.file.has_fixed_len()
    }
}

impl Host for StoppableHost {
    type File = StoppableFile;

    fn open(&self, path: &Path, write: bool) -> io::Result<StoppableFile> {
        Ok(StoppableFile {
            file: self.disk.open(path, write)?,
            path: path.into(),
            stop: self.stop.clone(),
        })
    }
    fn create_new(&self, path: &Path) -> io::Result<StoppableFile> {
        Ok(StoppableFile {
            file: self.disk.create_new(path)?,
            path: path.into(),
            stop: self.stop.clone(),
        })
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn lock(
        &self,
        file: &mut StoppableFile,
        lock: Lock,
        locking: Locking,
    ) -> Result<(), LockError> {
        self.disk.lock(&mut file.file, lock, locking)?;
        // Only writers of files lock them through this host.
        if matches!(file.file.lock_state(), LockState::Unsupported(_)) {
            locking::warn_of(&file.path);
        }
        Ok(())
    }
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        self.disk.resolve(path)
    }
    fn set_nocow(&self, file: &StoppableFile) -> io::Result<()> {
        self.disk.set_nocow(&file.file)
    }
    fn identity(&self, file: &StoppableFile) -> io::Result<(u64, u64)> {
        self.disk.identity(&file.file)
    }
}

/// A backend, as the command line chose it.
#[derive(Debug)]
pub enum Disk {
    /// The kernel's AIO, with a pool for what it cannot do.
    Native(Aio),
    /// The kernel's io_uring, with a pool for what it cannot do.
    #[cfg(feature = "io_uring")]
    Uring(Uring),
    /// A pool of threads.
    Threads(Pool),
}

impl Disk {
    /// A backend for up to `depth` ops at a time. `may_block`: in `io_submit`; see [`AioOptions`].
    pub fn new(how: How, depth: usize, may_block: bool) -> io::Result<Disk> {
        let pool = PoolOptions { depth: depth.max(64), ..PoolOptions::default() };
        Ok(match how {
            How::Native => {
                // The system has a bound on all programs' contexts together (fs.aio-max-nr).
                let depth = depth.clamp(16, 4096) as u32;
                Disk::Native(Aio::new(AioOptions { depth, nowait: !may_block, pool })?)
            }
            #[cfg(feature = "io_uring")]
            How::IoUring => {
                let most = depth.clamp(16, 4096) as u32;
                let options = UringOptions { depth: most, pool, ..UringOptions::default() };
                match Uring::new(options) {
                    Ok(uring) => Disk::Uring(uring),
                    Err(why) => {
                        warn_of_threads(&why);
                        Disk::new(How::Threads, depth, may_block)?
                    }
                }
            }
            // As many as QEMU starts.
            How::Threads => Disk::Threads(Pool::new(PoolOptions { threads: 64, ..pool })?),
        })
    }
}

impl Disk {
    /// What threads were given to do so far.
    pub fn pool_stats(&self) -> PoolStats {
        match self {
            Disk::Native(aio) => aio.pool_stats(),
            #[cfg(feature = "io_uring")]
            Disk::Uring(uring) => uring.pool_stats(),
            Disk::Threads(pool) => pool.stats(),
        }
    }
}

impl Backend for Disk {
    type File = DiskFile;

    fn attach(&mut self, id: FileId, file: DiskFile) -> io::Result<FileInfo> {
        match self {
            Disk::Native(aio) => aio.attach(id, file),
            #[cfg(feature = "io_uring")]
            Disk::Uring(uring) => uring.attach(id, file),
            Disk::Threads(pool) => pool.attach(id, file),
        }
    }

    fn detach(&mut self, id: FileId) -> Option<DiskFile> {
        match self {
            Disk::Native(aio) => aio.detach(id),
            #[cfg(feature = "io_uring")]
            Disk::Uring(uring) => uring.detach(id),
            Disk::Threads(pool) => pool.detach(id),
        }
    }

    #[inline]
    fn submit(&mut self, submission: &mut Submission<'_>) {
        match self {
            Disk::Native(aio) => aio.submit(submission),
            #[cfg(feature = "io_uring")]
            Disk::Uring(uring) => uring.submit(submission),
            Disk::Threads(pool) => pool.submit(submission),
        }
    }

    #[inline]
    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        match self {
            Disk::Native(aio) => aio.harvest(harvest),
            #[cfg(feature = "io_uring")]
            Disk::Uring(uring) => uring.harvest(harvest),
            Disk::Threads(pool) => pool.harvest(harvest),
        }
    }

    #[inline]
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Disk::Native(aio) => aio.event_fd(),
            #[cfg(feature = "io_uring")]
            Disk::Uring(uring) => uring.event_fd(),
            Disk::Threads(pool) => pool.event_fd(),
        }
    }

    #[inline]
    fn wants_retry(&self) -> bool {
        match self {
            Disk::Native(aio) => aio.wants_retry(),
            #[cfg(feature = "io_uring")]
            Disk::Uring(uring) => uring.wants_retry(),
            Disk::Threads(pool) => pool.wants_retry(),
        }
    }

    #[inline]
    fn next_deadline(&self) -> Option<Time> {
        match self {
            Disk::Native(aio) => aio.next_deadline(),
            #[cfg(feature = "io_uring")]
            Disk::Uring(uring) => uring.next_deadline(),
            Disk::Threads(pool) => pool.next_deadline(),
        }
    }

    #[inline]
    fn clock(&self) -> Time {
        match self {
            Disk::Native(aio) => aio.clock(),
            #[cfg(feature = "io_uring")]
            Disk::Uring(uring) => uring.clock(),
            Disk::Threads(pool) => pool.clock(),
        }
    }
}

/// There is no io_uring here: QEMU's warning, and our reason.
#[cfg(feature = "io_uring")]
fn warn_of_threads(why: &io::Error) {
    let program = Program::called_as(std::env::args_os().next().as_deref().map(Path::new));
    let program = program.name();
    eprint_quietly(&format!(
        "{program}: Unable to use linux io_uring, falling back to thread pool: {why}\n"
    ));
}
