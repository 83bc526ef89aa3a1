//! Where images are, on disks of this machine or of NBD servers, and who does their I/O.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use cowbell_engine::backend::{Backend, FileInfo, Harvest, Submission};
use cowbell_engine::both::{Both, Either};
use cowbell_engine::store::{Extent, Store};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::lock::{Lock, LockError, LockState, Locking};
use cowbell_engine::sys::pool::{Pool, PoolOptions, PoolStats};
#[cfg(feature = "io_uring")]
use cowbell_engine::sys::uring::{Uring, UringOptions};
use cowbell_engine::units::{FileId, Time};
use cowbell_formats::locks::MaybeLocal;
use cowbell_formats::name::is_remote;
use cowbell_formats::{Chain, DiskHost, Host};
use cowbell_nbd::{Address, Place, Remote, RemoteFile, RemoteOptions};

use crate::cache::How;
#[cfg(feature = "io_uring")]
use crate::fail::Program;
use crate::locking;
#[cfg(feature = "io_uring")]
use crate::session::eprint_quietly;
use crate::stop::Stop;

/// A file of this machine, or a server's disk.
pub type AnyFile = Either<DiskFile, RemoteFile>;

/// Opens files of this machine, and the disks of servers that have an address.
#[derive(Clone, Copy, Debug, Default)]
pub struct Files {
    /// Files past the page cache (O_DIRECT).
    pub direct: bool,
}

impl Files {
    fn disk(self) -> DiskHost {
        DiskHost { direct: self.direct }
    }

    /// The identity of what `path` leads to. A server is not asked: it may let in nobody else.
    pub fn identity_at(self, path: &Path) -> io::Result<(u64, u64)> {
        if is_remote(path) {
            return Ok(identity_of(&address(path)?));
        }
        self.disk().open(path, false)?.identity()
    }
}

/// The address that a path is.
pub fn address(path: &Path) -> io::Result<Address> {
    let text = path.to_str().ok_or_else(|| io::Error::other("an address is UTF-8"))?;
    text.parse()
}

/// No file has it: there is no such device. Two addresses of one disk have two, but for a socket's
/// path that is written otherwise.
fn identity_of(address: &Address) -> (u64, u64) {
    let mut address = address.clone();
    if let Place::Unix(path) = &mut address.place
        && let Ok(real) = std::fs::canonicalize(&path)
    {
        *path = real;
    }
    let mut hasher = DefaultHasher::new();
    address.hash(&mut hasher);
    (u64::MAX, hasher.finish())
}

impl Host for Files {
    type File = AnyFile;

    fn open(&self, path: &Path, write: bool) -> io::Result<AnyFile> {
        if !is_remote(path) {
            return self.disk().open(path, write).map(Either::First);
        }
        let options = RemoteOptions { read_only: !write, ..RemoteOptions::default() };
        let file = RemoteFile::open(address(path)?, options)?;
        if write && !file.is_writable() {
            let what = "the server does not let it be written";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
        }
        Ok(Either::Second(file))
    }
    fn create_new(&self, path: &Path) -> io::Result<AnyFile> {
        self.disk().create_new(path).map(Either::First)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk().remove(path)
    }
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        if is_remote(path) { Ok(path.into()) } else { self.disk().resolve(path) }
    }
    fn set_nocow(&self, file: &AnyFile) -> io::Result<()> {
        file.local().map_or(Ok(()), |file| self.disk().set_nocow(file))
    }
    fn identity(&self, file: &AnyFile) -> io::Result<(u64, u64)> {
        match file {
            Either::First(file) => file.identity(),
            Either::Second(file) => Ok(identity_of(file.address())),
        }
    }
    /// What a server has is its own to lock.
    fn lock(&self, file: &mut AnyFile, lock: Lock, locking: Locking) -> Result<(), LockError> {
        match file {
            Either::First(file) => self.disk().lock(file, lock, locking),
            Either::Second(_) => Ok(()),
        }
    }
}

/// Is any file of the chain a server's?
pub fn has_remote(chain: &Chain<AnyFile>) -> bool {
    let mut files = chain.layers.iter().flat_map(|layer| layer.more.iter().chain([&layer.file]));
    files.any(|file| matches!(file, Either::Second(_)))
}

/// [`Files`], for long work that Ctrl-C shall end: every write asks first.
#[derive(Clone, Debug)]
pub struct StoppableHost {
    /// The files.
    pub disk: Files,
    /// Who may ask.
    pub stop: Stop,
}

/// A file on a [`StoppableHost`].
#[derive(Debug)]
pub struct StoppableFile {
    file: AnyFile,
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
        let state = file.file.local().map(DiskFile::lock_state);
        if matches!(state, Some(LockState::Unsupported(_))) {
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

/// The backend for files of this machine, as the command line chose it.
#[derive(Debug)]
pub enum Local {
    /// The kernel's AIO, with a pool for what it cannot do.
    Native(Aio),
    /// The kernel's io_uring, with a pool for what it cannot do.
    #[cfg(feature = "io_uring")]
    Uring(Uring),
    /// A pool of threads.
    Threads(Pool),
}

impl Local {
    /// A backend for up to `depth` ops at a time. `may_block`: in `io_submit`; see [`AioOptions`].
    pub fn new(how: How, depth: usize, may_block: bool) -> io::Result<Local> {
        let pool = PoolOptions { depth: depth.max(64), ..PoolOptions::default() };
        Ok(match how {
            How::Native => {
                // The system has a bound on all programs' contexts together (fs.aio-max-nr).
                let depth = depth.clamp(16, 4096) as u32;
                Local::Native(Aio::new(AioOptions { depth, nowait: !may_block, pool })?)
            }
            #[cfg(feature = "io_uring")]
            How::IoUring => {
                let most = depth.clamp(16, 4096) as u32;
                let options = UringOptions { depth: most, pool, ..UringOptions::default() };
                match Uring::new(options) {
                    Ok(uring) => Local::Uring(uring),
                    Err(why) => {
                        warn_of_threads(&why);
                        Local::new(How::Threads, depth, may_block)?
                    }
                }
            }
            // As many as QEMU starts.
            How::Threads => Local::Threads(Pool::new(PoolOptions { threads: 64, ..pool })?),
        })
    }
}

impl Local {
    /// What threads were given to do so far.
    pub fn pool_stats(&self) -> PoolStats {
        match self {
            Local::Native(aio) => aio.pool_stats(),
            #[cfg(feature = "io_uring")]
            Local::Uring(uring) => uring.pool_stats(),
            Local::Threads(pool) => pool.stats(),
        }
    }
}

impl Backend for Local {
    type File = DiskFile;

    fn attach(&mut self, id: FileId, file: DiskFile) -> io::Result<FileInfo> {
        match self {
            Local::Native(aio) => aio.attach(id, file),
            #[cfg(feature = "io_uring")]
            Local::Uring(uring) => uring.attach(id, file),
            Local::Threads(pool) => pool.attach(id, file),
        }
    }

    fn detach(&mut self, id: FileId) -> Option<DiskFile> {
        match self {
            Local::Native(aio) => aio.detach(id),
            #[cfg(feature = "io_uring")]
            Local::Uring(uring) => uring.detach(id),
            Local::Threads(pool) => pool.detach(id),
        }
    }

    #[inline]
    fn submit(&mut self, submission: &mut Submission<'_>) {
        match self {
            Local::Native(aio) => aio.submit(submission),
            #[cfg(feature = "io_uring")]
            Local::Uring(uring) => uring.submit(submission),
            Local::Threads(pool) => pool.submit(submission),
        }
    }

    #[inline]
    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        match self {
            Local::Native(aio) => aio.harvest(harvest),
            #[cfg(feature = "io_uring")]
            Local::Uring(uring) => uring.harvest(harvest),
            Local::Threads(pool) => pool.harvest(harvest),
        }
    }

    #[inline]
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Local::Native(aio) => aio.event_fd(),
            #[cfg(feature = "io_uring")]
            Local::Uring(uring) => uring.event_fd(),
            Local::Threads(pool) => pool.event_fd(),
        }
    }

    #[inline]
    fn wants_retry(&self) -> bool {
        match self {
            Local::Native(aio) => aio.wants_retry(),
            #[cfg(feature = "io_uring")]
            Local::Uring(uring) => uring.wants_retry(),
            Local::Threads(pool) => pool.wants_retry(),
        }
    }

    #[inline]
    fn next_deadline(&self) -> Option<Time> {
        match self {
            Local::Native(aio) => aio.next_deadline(),
            #[cfg(feature = "io_uring")]
            Local::Uring(uring) => uring.next_deadline(),
            Local::Threads(pool) => pool.next_deadline(),
        }
    }

    #[inline]
    fn clock(&self) -> Time {
        match self {
            Local::Native(aio) => aio.clock(),
            #[cfg(feature = "io_uring")]
            Local::Uring(uring) => uring.clock(),
            Local::Threads(pool) => pool.clock(),
        }
    }
}

/// A backend for files of this machine, and for servers' disks if there are any.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one, and the large one is the usual one")]
pub enum Disk {
    /// Files of this machine, without a look at which: nothing else costs them anything.
    Local(Local),
    /// Both.
    Both(Box<Both<Local, Remote>>),
}

impl Disk {
    /// A backend for up to `depth` ops at a time, for servers' disks only if that is said.
    /// `may_block`: in `io_submit`; see [`AioOptions`].
    pub fn new(how: How, depth: usize, may_block: bool, has_remote: bool) -> io::Result<Disk> {
        let local = Local::new(how, depth, may_block)?;
        if !has_remote {
            return Ok(Disk::Local(local));
        }
        Ok(Disk::Both(Box::new(Both::new(local, Remote::new()?)?)))
    }

    /// What threads were given to do so far.
    pub fn pool_stats(&self) -> PoolStats {
        match self {
            Disk::Local(local) => local.pool_stats(),
            Disk::Both(both) => both.first().pool_stats(),
        }
    }
}

impl Backend for Disk {
    type File = AnyFile;

    fn attach(&mut self, id: FileId, file: AnyFile) -> io::Result<FileInfo> {
        match (self, file) {
            (Disk::Both(both), file) => both.attach(id, file),
            (Disk::Local(local), Either::First(file)) => local.attach(id, file),
            (Disk::Local(_), Either::Second(_)) => {
                let what = "disks of servers are not reached from here";
                Err(io::Error::new(io::ErrorKind::Unsupported, what))
            }
        }
    }

    fn detach(&mut self, id: FileId) -> Option<AnyFile> {
        match self {
            Disk::Local(local) => local.detach(id).map(Either::First),
            Disk::Both(both) => both.detach(id),
        }
    }

    #[inline]
    fn submit(&mut self, submission: &mut Submission<'_>) {
        match self {
            Disk::Local(local) => local.submit(submission),
            Disk::Both(both) => both.submit(submission),
        }
    }

    #[inline]
    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        match self {
            Disk::Local(local) => local.harvest(harvest),
            Disk::Both(both) => both.harvest(harvest),
        }
    }

    #[inline]
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Disk::Local(local) => local.event_fd(),
            Disk::Both(both) => both.event_fd(),
        }
    }

    #[inline]
    fn wants_retry(&self) -> bool {
        match self {
            Disk::Local(local) => local.wants_retry(),
            Disk::Both(both) => both.wants_retry(),
        }
    }

    #[inline]
    fn next_deadline(&self) -> Option<Time> {
        match self {
            Disk::Local(local) => local.next_deadline(),
            Disk::Both(both) => both.next_deadline(),
        }
    }

    #[inline]
    fn clock(&self) -> Time {
        match self {
            Disk::Local(local) => local.clock(),
            Disk::Both(both) => both.clock(),
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
