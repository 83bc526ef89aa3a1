//! System calls, as functions that answer `Result`.
//!
//! Calls that may be interrupted are made again. What is left to the callers is which errors mean
//! "not supported": see [`unsupported`] and [`fallocate`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::thread::JoinHandle;

use crate::sys::ram::RamPiece;
use crate::units::Errno;

/// The most pieces of memory that one call takes (UIO_MAXIOV).
pub(crate) const IOV_MAX: usize = 1024;

/// The error of the last call of this thread.
fn last_error() -> Errno {
    Errno::from_io(&io::Error::last_os_error())
}

/// Makes a call until it is not interrupted; a negative answer is an error.
fn retry<T: Into<i64> + Copy>(mut call: impl FnMut() -> T) -> Result<u64, Errno> {
    loop {
        let answer: i64 = call().into();
        if let Ok(answer) = u64::try_from(answer) {
            return Ok(answer);
        }
        match last_error() {
            Errno::INTERRUPTED => {}
            error => return Err(error),
        }
    }
}

/// `value` as the kernel's signed offset.
fn signed(value: u64) -> Result<i64, Errno> {
    i64::try_from(value).map_err(|_| Errno::TOO_BIG)
}

/// The many ways in which Linux says that a file cannot do something.
pub(crate) fn unsupported(error: Errno) -> bool {
    // ENOTSUP is EOPNOTSUPP on Linux.
    matches!(error.0, libc::EOPNOTSUPP | libc::ENODEV | libc::ENOSYS | libc::ENOTTY)
}

fn normalised(error: Errno) -> Errno {
    if unsupported(error) { Errno::NOT_SUPPORTED } else { error }
}

/// Reads into `pieces`; the answer may be short.
///
/// # Safety
/// Every piece is valid for writes.
pub(crate) unsafe fn preadv(fd: RawFd, pieces: &[RamPiece], offset: u64) -> Result<u64, Errno> {
    let offset = signed(offset)?;
    if let [piece] = pieces {
        // SAFETY: the caller's promise.
        return retry(|| unsafe { libc::pread64(fd, piece.base.cast(), piece.len, offset) as i64 });
    }
    let count = pieces.len().min(IOV_MAX) as i32;
    // SAFETY: the caller's promise; a `RamPiece` has the layout of an iovec.
    retry(|| unsafe { libc::preadv64(fd, pieces.as_ptr().cast(), count, offset) as i64 })
}

/// Writes from `pieces`; the answer may be short.
///
/// # Safety
/// Every piece is valid for reads.
pub(crate) unsafe fn pwritev(fd: RawFd, pieces: &[RamPiece], offset: u64) -> Result<u64, Errno> {
    let offset = signed(offset)?;
    if let [piece] = pieces {
        // SAFETY: the caller's promise.
        return retry(|| unsafe {
            libc::pwrite64(fd, piece.base.cast(), piece.len, offset) as i64
        });
    }
    let count = pieces.len().min(IOV_MAX) as i32;
    // SAFETY: the caller's promise; a `RamPiece` has the layout of an iovec.
    retry(|| unsafe { libc::pwritev64(fd, pieces.as_ptr().cast(), count, offset) as i64 })
}

/// `preadv2` or `pwritev2`: as above, with RWF_ flags.
///
/// # Safety
/// Every piece is valid for writes (SYS_preadv2) or reads (SYS_pwritev2).
unsafe fn transfer2(
    call: libc::c_long,
    fd: RawFd,
    pieces: &[RamPiece],
    offset: u64,
    flags: i32,
) -> Result<u64, Errno> {
    let offset = signed(offset)?;
    let count = pieces.len().min(IOV_MAX);
    // The offset goes in two halves; a 64-bit kernel ignores the high one.
    let (low, high) = (offset as libc::c_ulong, (offset >> 32) as libc::c_ulong);
    // SAFETY: the caller's promise; a `RamPiece` has the layout of an iovec.
    retry(|| unsafe { libc::syscall(call, fd, pieces.as_ptr(), count, low, high, flags) as i64 })
}

/// Writes from `pieces`, complete only when stable; the answer may be short.
///
/// # Safety
/// Every piece is valid for reads.
pub(crate) unsafe fn pwritev_stable(
    fd: RawFd,
    pieces: &[RamPiece],
    offset: u64,
) -> Result<u64, Errno> {
    // SAFETY: the caller's promise.
    match unsafe { transfer2(libc::SYS_pwritev2, fd, pieces, offset, libc::RWF_DSYNC) } {
        Err(error) if unsupported(error) => {
            // SAFETY: the caller's promise.
            let written = unsafe { pwritev(fd, pieces, offset)? };
            fdatasync(fd)?;
            Ok(written)
        }
        answer => answer,
    }
}

/// Can reads and writes on this file be asked not to wait (RWF_NOWAIT)?
pub(crate) fn takes_nowait(fd: RawFd, scratch: &mut [u8]) -> bool {
    let piece = RamPiece { base: scratch.as_mut_ptr(), len: scratch.len() };
    // SAFETY: the piece is all of `scratch`.
    match unsafe { transfer2(libc::SYS_preadv2, fd, &[piece], 0, libc::RWF_NOWAIT) } {
        Ok(_) => true,
        Err(error) => error == Errno::AGAIN,
    }
}

/// Reads into `buf`; the answer may be short.
pub(crate) fn pread(fd: RawFd, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let piece = RamPiece { base: buf.as_mut_ptr(), len: buf.len() };
    // SAFETY: the piece is all of `buf`.
    unsafe { preadv(fd, &[piece], offset) }.map(|n| n as usize)
}

/// Writes from `buf`; the answer may be short.
pub(crate) fn pwrite(fd: RawFd, buf: &[u8], offset: u64) -> Result<usize, Errno> {
    let piece = RamPiece { base: buf.as_ptr().cast_mut(), len: buf.len() };
    // SAFETY: the piece is all of `buf`, and is only read.
    unsafe { pwritev(fd, &[piece], offset) }.map(|n| n as usize)
}

/// Random bytes; fails rather than wait for a machine that is just starting.
pub(crate) fn getrandom() -> Result<[u8; 4], Errno> {
    let mut bytes = [0; 4];
    // SAFETY: the kernel writes at most as many bytes as there are.
    let got = retry(|| unsafe {
        libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) as i64
    })?;
    // (Never short below 256 bytes.)
    if got as usize == bytes.len() { Ok(bytes) } else { Err(Errno::IO) }
}

pub(crate) fn fdatasync(fd: RawFd) -> Result<(), Errno> {
    // SAFETY: no memory involved.
    retry(|| unsafe { libc::fdatasync(fd) }).map(drop)
}

pub(crate) fn ftruncate(fd: RawFd, len: u64) -> Result<(), Errno> {
    let len = signed(len)?;
    // SAFETY: no memory involved.
    retry(|| unsafe { libc::ftruncate64(fd, len) }).map(drop)
}

/// `fallocate` of a range that is not empty. File systems answer EINVAL, too, to modes that they
/// do not know; the range itself is checked here, so that EINVAL means nothing else.
pub(crate) fn fallocate(fd: RawFd, mode: i32, offset: u64, len: u64) -> Result<(), Errno> {
    signed(offset.checked_add(len).ok_or(Errno::TOO_BIG)?)?;
    let (offset, len) = (signed(offset)?, signed(len)?);
    // SAFETY: no memory involved.
    match retry(|| unsafe { libc::fallocate64(fd, mode, offset, len) }) {
        Ok(_) => Ok(()),
        Err(Errno::INVALID) => Err(Errno::NOT_SUPPORTED),
        Err(error) => Err(normalised(error)),
    }
}

/// Copies up to `len` bytes from file to file, in the kernel: how many. 0: the first file ends there.
pub(crate) fn copy_file_range(
    from: RawFd,
    from_offset: u64,
    to: RawFd,
    to_offset: u64,
    len: u64,
) -> Result<u64, Errno> {
    // More is left to the next call.
    let len = len.min(1 << 30) as usize;
    let (mut from_offset, mut to_offset) = (signed(from_offset)?, signed(to_offset)?);
    let (read_at, write_at) = (&raw mut from_offset, &raw mut to_offset);
    // SAFETY: the two offsets are valid for as long as the call takes; no other memory is involved.
    retry(|| unsafe { libc::copy_file_range(from, read_at, to, write_at, len, 0) as i64 })
}

/// What an ioctl on a range of a block device does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BlockRange {
    /// BLKDISCARD: the contents may become anything.
    Discard,
    /// BLKZEROOUT: the contents become zeros.
    Zero,
}

pub(crate) fn block_range(fd: RawFd, what: BlockRange, start: u64, len: u64) -> Result<(), Errno> {
    let request = match what {
        BlockRange::Discard => libc::_IO(0x12, 119),
        BlockRange::Zero => libc::_IO(0x12, 127),
    };
    let range = [start, len];
    // SAFETY: both ioctls read two u64 at the address.
    match retry(|| unsafe { libc::ioctl(fd, request, range.as_ptr()) }) {
        Ok(_) => Ok(()),
        Err(error) => Err(normalised(error)),
    }
}

/// Sets the "no copy on write" flag of an empty file.
pub(crate) fn set_nocow(fd: RawFd) -> Result<(), Errno> {
    const NOCOW: libc::c_int = 0x0080_0000;
    let mut flags: libc::c_int = 0;
    // SAFETY: FS_IOC_GETFLAGS writes an int at the address, whatever its number says of a long.
    retry(|| unsafe { libc::ioctl(fd, libc::FS_IOC_GETFLAGS, &raw mut flags) })?;
    if flags & NOCOW == 0 {
        flags |= NOCOW;
        // SAFETY: FS_IOC_SETFLAGS reads an int at the address.
        retry(|| unsafe { libc::ioctl(fd, libc::FS_IOC_SETFLAGS, &raw const flags) })?;
    }
    Ok(())
}

/// The logical block size of a block device.
pub(crate) fn block_size(fd: RawFd) -> Option<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes an int at the address.
    retry(|| unsafe { libc::ioctl(fd, libc::BLKSSZGET, &raw mut size) }).ok()?;
    u32::try_from(size).ok()
}

/// What the file system of an open file calls its block size, in bytes.
pub(crate) fn file_system_block(fd: RawFd) -> Option<u64> {
    // SAFETY: all zeros is a value of this plain struct.
    let mut stat: libc::statvfs64 = unsafe { std::mem::zeroed() };
    // SAFETY: fstatvfs fills the struct behind the address.
    retry(|| unsafe { libc::fstatvfs64(fd, &raw mut stat) }).ok()?;
    Some(stat.f_bsize)
}

/// Bytes in a page of memory.
pub(crate) fn page_size() -> u32 {
    // SAFETY: no memory involved.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u32::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
}

/// Seeks; the position itself is never used, for all reads and writes name their offset.
pub(crate) fn seek(fd: RawFd, offset: u64, whence: i32) -> Result<u64, Errno> {
    let offset = signed(offset)?;
    // SAFETY: no memory involved.
    retry(|| unsafe { libc::lseek64(fd, offset, whence) })
}

/// The file's length; of a block device, its size.
pub(crate) fn length(fd: RawFd) -> Result<u64, Errno> {
    seek(fd, 0, libc::SEEK_END)
}

/// What the kernel says of direct I/O on this file: memory and request alignment.
pub(crate) fn dio_align(fd: RawFd) -> Option<(u32, u32)> {
    const STATX_DIOALIGN: u32 = 0x2000;
    // SAFETY: all zeros is a value of this plain struct.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a string that ends in 0, and statx fills the struct behind the address.
    retry(|| unsafe {
        libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, STATX_DIOALIGN, &raw mut stat)
    })
    .ok()?;
    let known = stat.stx_mask & STATX_DIOALIGN != 0;
    known.then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// Takes a shared lock on one byte, without waiting. Needs a readable descriptor.
pub(crate) fn lock_byte_shared(fd: RawFd, byte: u64) -> Result<(), Errno> {
    byte_lock(fd, libc::F_OFD_SETLK, libc::F_RDLCK, byte).map(drop)
}

/// Gives a byte's lock back; one that is not held is none to give back.
pub(crate) fn unlock_byte(fd: RawFd, byte: u64) -> Result<(), Errno> {
    byte_lock(fd, libc::F_OFD_SETLK, libc::F_UNLCK, byte).map(drop)
}

/// Has another open file description a lock on this byte?
pub(crate) fn is_byte_locked(fd: RawFd, byte: u64) -> Result<bool, Errno> {
    let found = byte_lock(fd, libc::F_OFD_GETLK, libc::F_WRLCK, byte)?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

fn byte_lock(fd: RawFd, command: i32, kind: i32, byte: u64) -> Result<libc::flock64, Errno> {
    // SAFETY: all zeros is a value of this plain struct.
    let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = (signed(byte)?, 1);
    // SAFETY: these commands read, and one fills, the struct behind the address.
    retry(|| unsafe { libc::fcntl(fd, command, &raw mut lock) })?;
    Ok(lock)
}

/// The flags of an open file: O_DIRECT and the like, and what it is open for.
pub(crate) fn status_flags(fd: RawFd) -> Result<i32, Errno> {
    // SAFETY: no memory involved.
    retry(|| unsafe { libc::fcntl(fd, libc::F_GETFL) }).map(|flags| flags as i32)
}

/// Sets the file status flags that can be set on an open file: O_DIRECT, O_NOATIME,
/// O_NONBLOCK.
pub(crate) fn set_status_flags(fd: RawFd, on: i32, off: i32) -> Result<(), Errno> {
    let flags = status_flags(fd)?;
    // SAFETY: no memory involved.
    retry(|| unsafe { libc::fcntl(fd, libc::F_SETFL, (flags | on) & !off) }).map(drop)
}

/// Becomes readable within `timeout_ms` (-1: for ever)?
#[cfg(any(test, feature = "contract"))]
pub(crate) fn wait_readable(fd: RawFd, timeout_ms: i32) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd at the address.
    retry(|| unsafe { libc::poll(&raw mut poll, 1, timeout_ms) }).is_ok_and(|n| n == 1)
}

/// An eventfd: a counter that a loop can wait for.
#[derive(Debug)]
pub(crate) struct EventFd(OwnedFd);

impl EventFd {
    pub(crate) fn new() -> io::Result<EventFd> {
        // SAFETY: no memory involved.
        let fd = retry(|| unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        // SAFETY: the descriptor is new and nobody else's.
        Ok(EventFd(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }

    #[inline]
    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    #[inline]
    pub(crate) fn borrow(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Adds one.
    pub(crate) fn signal(&self) {
        let one = 1u64;
        // SAFETY: eight bytes at the address. It can fail only when the counter is full, and then
        // it is readable, which is all that is wanted.
        let _ = retry(|| unsafe { libc::write(self.fd(), (&raw const one).cast(), 8) as i64 });
    }

    /// Sets the counter to 0; answers what it was.
    pub(crate) fn clear(&self) -> u64 {
        let mut count = 0u64;
        // SAFETY: eight bytes at the address.
        match retry(|| unsafe { libc::read(self.fd(), (&raw mut count).cast(), 8) as i64 }) {
            Ok(_) => count,
            Err(_) => 0, // EAGAIN: it was 0
        }
    }
}

/// An epoll: a descriptor that is readable while one of those is that it watches.
#[derive(Debug)]
pub(crate) struct Epoll(OwnedFd);

impl Epoll {
    /// Watches both, for as long as they are open.
    pub(crate) fn of(watched: [BorrowedFd<'_>; 2]) -> io::Result<Epoll> {
        // SAFETY: no memory involved.
        let fd = retry(|| unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the descriptor is new and nobody else's.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
        for fd in watched {
            let (epoll, fd) = (epoll.as_raw_fd(), fd.as_raw_fd());
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
            // SAFETY: the kernel reads the event at the address.
            retry(|| unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) })?;
        }
        Ok(Epoll(epoll))
    }

    #[inline]
    pub(crate) fn borrow(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How much nicer than the thread that starts them the engine's own threads are (nice(2)): where
/// there are fewer processors than threads, they do not push the loop aside.
const NICER: i32 = 5;

/// Starts a thread of the engine's own. It gets no signals: they are for those of the embedder.
pub(crate) fn start_thread(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let _blocked = SignalsBlocked::new();
    std::thread::Builder::new().name(name.to_owned()).stack_size(256 << 10).spawn(|| {
        // SAFETY: it has no preconditions; on Linux it is about this thread alone. Where it is not
        // allowed, all goes on as it was.
        let _ = unsafe { libc::nice(NICER) };
        work();
    })
}

/// No signal is delivered to this thread, nor to threads it starts, while this lives.
#[derive(Debug)]
struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    fn new() -> SignalsBlocked {
        // SAFETY: all zeros is a value of this plain struct, and both calls fill one.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            SignalsBlocked(before)
        }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the set was filled in by `new`.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut());
        }
    }
}
