//! A file or block device of the operating system.
//!
//! Opening one settles what the rest may take for granted: it is a regular file or a block device
//! (a FIFO would hang us, a character device has no offsets), its alignment is known, and its
//! descriptor is blocking. Afterwards it is read and written in two ways: by a backend, without
//! waiting, or as a [`Store`], waiting, while an image is opened, created or checked.
//!
//! Two alignments, both 1 unless the file was opened with O_DIRECT: that of offsets and lengths,
//! and that of memory addresses. The second is often smaller, so each is probed.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use crate::backend::FileInfo;
use crate::mem::{BUF_ALIGN, Buf};
use crate::store::{Extent, Store};
use crate::sys::job::{Handle, allocate_file};
use crate::sys::lock::{self, Lock, LockError, LockState, Locking};
use crate::sys::syscalls as sys;
use crate::units::{Errno, align_down, align_up};

/// How to open a file.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskOptions {
    /// For writing too, not only for reading.
    pub write: bool,
    /// Past the page cache (O_DIRECT). Opening fails with [`io::ErrorKind::Unsupported`] where the
    /// file system cannot do it.
    pub direct: bool,
    /// What to do about a file that is, or is not, there already. Anything but
    /// [`Create::No`] wants `write`.
    pub create: Create,
    /// Refuse a path whose last part is a symbolic link.
    pub no_follow: bool,
}

/// Which of the file's possible pasts are acceptable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Create {
    /// It exists.
    #[default]
    No,
    /// It does not exist, and is made.
    New,
    /// It exists and loses its contents (a block device keeps them), or does not and is made.
    Truncate,
}

/// An opened regular file or block device.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    is_block: bool,
    direct: bool,
    writable: bool,
    request_align: u32,
    memory_align: u32,
    hole_align: u32,
    queue_depth: Option<u32>,
    lock: LockState,
    /// One for each duplicate: the last to go gives the lock back.
    duplicates: Arc<()>,
}

impl DiskFile {
    /// Asks that blocks be written in place and never copied, where a file system would (btrfs).
    /// The file has to be empty.
    ///
    /// # Errors
    ///
    /// The file system has no such flag, or does not set it on this file.
    pub fn set_nocow(&self) -> io::Result<()> {
        sys::set_nocow(self.file.as_raw_fd()).map_err(io::Error::from)
    }

    /// Opens `path`.
    pub fn open(path: impl AsRef<Path>, options: &DiskOptions) -> io::Result<DiskFile> {
        let path = path.as_ref();
        // Opening some devices has effects (a tape rewinds, a watchdog starts): look first.
        if let Ok(metadata) = fs::metadata(path) {
            refuse_odd_types(&metadata)?;
        }
        let no_follow = if options.no_follow { libc::O_NOFOLLOW } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(options.write)
            .create_new(options.create == Create::New)
            .create(options.create == Create::Truncate)
            // Not waiting for the other end of a FIFO that has taken the place of what was
            // looked at; regular files and block devices do not care.
            .custom_flags(libc::O_NONBLOCK | no_follow)
            .open(path)?;
        let opened = DiskFile::from_file(file, options);
        if opened.is_err() && options.create == Create::New {
            // It was not there before this call: leave no trace of the failed attempt.
            let _ = fs::remove_file(path);
        }
        opened
    }

    /// Takes a file that is open already: one that a sandboxed program was given. Of `options` `create`
    /// and `no_follow` mean nothing.
    ///
    /// Flags of an open file belong to all who have it: `direct` sets O_DIRECT for them too, and
    /// O_NONBLOCK is taken away. Nothing is locked: see [`lock`](DiskFile::lock).
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`]: it is neither a regular file nor a block device, is not open for
    /// reading, or is to be written and open for appending, where the kernel
    /// takes no offsets; [`io::ErrorKind::PermissionDenied`]: it is to be written, and not open for
    /// that; [`io::ErrorKind::Unsupported`] as for [`open`](DiskFile::open).
    pub fn from_fd(fd: OwnedFd, options: &DiskOptions) -> io::Result<DiskFile> {
        let flags = sys::status_flags(fd.as_raw_fd())?;
        let (access, appends) = (flags & libc::O_ACCMODE, flags & libc::O_APPEND != 0);
        let invalid = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        if access == libc::O_WRONLY || flags & libc::O_PATH != 0 {
            return invalid("the descriptor cannot be read from");
        }
        if options.write && access != libc::O_RDWR {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if options.write && appends {
            return invalid("the descriptor appends whatever is written");
        }
        let direct = options.direct || flags & libc::O_DIRECT != 0;
        let options = DiskOptions { direct, create: Create::No, ..*options };
        DiskFile::from_file(File::from(fd), &options)
    }

    fn from_file(file: File, options: &DiskOptions) -> io::Result<DiskFile> {
        let metadata = file.metadata()?;
        refuse_odd_types(&metadata)?;
        let is_block = metadata.file_type().is_block_device();
        let fd = file.as_raw_fd();
        // O_DIRECT is set only now, so that its failure means one thing. O_NOATIME: else a read may
        // change the file's access time, and for that wait inside `io_submit` for the inode's lock
        // (xfs) or for a transaction (btrfs). Who does not own the file may not ask for it.
        let direct = if options.direct { libc::O_DIRECT } else { 0 };
        let mut set = sys::set_status_flags(fd, direct | libc::O_NOATIME, libc::O_NONBLOCK);
        if set == Err(Errno::NOT_PERMITTED) {
            set = sys::set_status_flags(fd, direct, libc::O_NONBLOCK);
        }
        set.map_err(|error| match error {
            Errno::INVALID => io::Error::new(
                io::ErrorKind::Unsupported,
                "the file system does not support O_DIRECT on this file",
            ),
            error => error.into(),
        })?;
        if options.create == Create::Truncate && !is_block {
            sys::ftruncate(fd, 0)?;
        }
        let (memory_align, request_align) =
            if options.direct { probe_align(fd, is_block) } else { (1, 1) };
        // A device zeroes whole blocks in any case; a file's page cache is in nobody's way unless
        // we write past it.
        let hole_align = match (is_block, options.direct) {
            (true, _) => sys::block_size(fd).unwrap_or(SAFE_ALIGN).max(request_align),
            (false, true) => file_system_block(fd).max(request_align),
            (false, false) => 1,
        };
        Ok(DiskFile {
            file,
            is_block,
            direct: options.direct,
            writable: options.write,
            request_align,
            memory_align,
            hole_align,
            queue_depth: if options.direct { queue_depth(&metadata) } else { None },
            lock: LockState::None,
            duplicates: Arc::new(()),
        })
    }

    /// What an engine must know of it: alignment as probed when it was opened, length as of now.
    pub fn info(&self) -> io::Result<FileInfo> {
        Ok(FileInfo {
            request_align: self.request_align,
            memory_align: self.memory_align,
            hole_align: self.hole_align,
            len: sys::length(self.fd())?,
            can_grow: !self.is_block,
            knows_holes: !self.is_block,
        })
    }

    /// Two files with the same identity are the same file, whatever their paths.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let metadata = self.file.metadata()?;
        // One device may have several nodes.
        Ok(if self.is_block { (0, metadata.rdev()) } else { (metadata.dev(), metadata.ino()) })
    }

    /// Is it read and written past the page cache?
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// How many requests the block device below has places for; whoever sends one more waits for a
    /// place. `None`: unknown, or there is no such bound (tmpfs, NFS, btrfs, LVM).
    pub(crate) fn queue_depth(&self) -> Option<u32> {
        self.queue_depth
    }

    #[cfg(test)]
    pub(crate) fn set_queue_depth(&mut self, depth: Option<u32>) {
        self.queue_depth = depth;
    }

    /// Is it a block device?
    pub fn is_block_device(&self) -> bool {
        self.is_block
    }

    /// Takes `lock`, in place of what lock there is. See [`crate::sys::lock`].
    ///
    /// # Errors
    ///
    /// [`LockError`]; the file has no lock then.
    pub fn lock(&mut self, lock: Lock, locking: Locking) -> Result<(), LockError> {
        self.unlock();
        if locking == Locking::Off {
            return Ok(());
        }
        self.lock = match lock::take(self.fd(), &lock) {
            Ok(()) => LockState::Held(lock),
            Err(LockError::Failed(errno))
                if locking == Locking::Auto && lock::is_unsupported(errno) =>
            {
                LockState::Unsupported(errno)
            }
            Err(error) => return Err(error),
        };
        Ok(())
    }

    /// Gives the lock back, if there is one. Duplicates of the file have none either then.
    pub fn unlock(&mut self) {
        if let LockState::Held(_) = self.lock {
            // It cannot fail on a file where the lock was taken.
            let _ = lock::release(self.fd());
        }
        self.lock = LockState::None;
    }

    /// The lock that this file was given. A duplicate does not know what is done with the other.
    pub fn lock_state(&self) -> LockState {
        self.lock
    }

    /// The same open file once more.
    pub fn try_clone(&self) -> io::Result<DiskFile> {
        let duplicates = Arc::clone(&self.duplicates);
        Ok(DiskFile { file: self.file.try_clone()?, duplicates, ..*self })
    }

    pub(crate) fn handle(&self) -> Handle {
        let one_writer = !self.is_block && !self.direct;
        Handle { fd: self.fd(), is_block: self.is_block, one_writer, from: -1 }
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Does a transfer between `buf` and `offset` need no detour?
    fn is_aligned(&self, offset: u64, buf: &[u8]) -> bool {
        let (request, memory) = (u64::from(self.request_align), self.memory_align as usize);
        (offset | buf.len() as u64) & (request - 1) == 0 && buf.as_ptr().addr() & (memory - 1) == 0
    }

    /// Reads what there is; the rest of `buf` becomes zeros. All aligned.
    fn read_aligned(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let count = sys::pread(self.fd(), buf, offset)?;
            // The end of the file; its last block need not be whole.
            if count == 0 || count % self.request_align as usize != 0 {
                buf[count..].fill(0);
                return Ok(());
            }
            buf = &mut buf[count..];
            offset += count as u64;
        }
        Ok(())
    }

    /// Writes all of `buf`. All aligned.
    fn write_aligned(&self, mut offset: u64, mut buf: &[u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match sys::pwrite(self.fd(), buf, offset)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => {
                    buf = &buf[count..];
                    offset += count as u64;
                }
            }
        }
        Ok(())
    }

    /// Cuts `len` bytes at `offset` into chunks of whole blocks around them, at most
    /// [`BOUNCE`] each: (start of the blocks, their length, range of ours within them).
    fn chunks(
        &self,
        offset: u64,
        len: usize,
    ) -> io::Result<impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> + use<>> {
        let align = u64::from(self.request_align);
        let end = offset.checked_add(len as u64).ok_or(Errno::TOO_BIG)?;
        align_up(end, align).ok_or(Errno::TOO_BIG)?;
        let mut at = offset;
        Ok(std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let start = align_down(at, align);
            let stop = end.min(start + BOUNCE as u64);
            let blocks = align_up(stop, align)? - start;
            let ours = (at - start) as usize..(stop - start) as usize;
            at = stop;
            Some((start, blocks as usize, ours))
        }))
    }
}

impl Drop for DiskFile {
    /// Closing the last descriptor gives a lock back, too; but a program that another thread is just
    /// starting has them all for a moment longer.
    fn drop(&mut self) {
        if Arc::strong_count(&self.duplicates) == 1 {
            self.unlock();
        }
    }
}

impl Store for DiskFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.is_aligned(offset, buf) {
            return self.read_aligned(offset, buf);
        }
        let mut bounce = Buf::zeroed(BOUNCE.min(buf.len() + 2 * self.request_align as usize));
        let mut done = 0;
        for (start, len, ours) in self.chunks(offset, buf.len())? {
            self.read_aligned(start, &mut bounce[..len])?;
            buf[done..done + ours.len()].copy_from_slice(&bounce[ours.clone()]);
            done += ours.len();
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        if self.is_aligned(offset, buf) {
            return self.write_aligned(offset, buf);
        }
        let len_before = self.len()?;
        let mut bounce = Buf::zeroed(BOUNCE.min(buf.len() + 2 * self.request_align as usize));
        let mut done = 0;
        for (start, len, ours) in self.chunks(offset, buf.len())? {
            if ours != (0..len) {
                self.read_aligned(start, &mut bounce[..len])?;
            }
            bounce[ours.clone()].copy_from_slice(&buf[done..done + ours.len()]);
            self.write_aligned(start, &bounce[..len])?;
            done += ours.len();
        }
        // Whole blocks were written: cut off what stands behind the end that was asked for.
        let end = offset + buf.len() as u64;
        if !self.is_block && end > len_before && self.len()? > end {
            self.set_len(end)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(sys::fdatasync(self.fd())?)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(sys::length(self.fd())?)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.is_block {
            return if len <= self.len()? { Ok(()) } else { Err(Errno::NO_SPACE.into()) };
        }
        Ok(sys::ftruncate(self.fd(), len)?)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_block || len == 0 {
            let end = offset.checked_add(len).ok_or(Errno::TOO_BIG)?;
            return if end <= self.len()? || len == 0 {
                Ok(())
            } else {
                Err(Errno::NO_SPACE.into())
            };
        }
        allocate_file(self.fd(), offset, len)?;
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> io::Result<Extent> {
        let len = self.len()?;
        if offset >= len {
            return Err(Errno::INVALID.into());
        }
        let all_data = Extent { data: true, end: len };
        if self.is_block {
            return Ok(all_data);
        }
        let extent = match sys::seek(self.fd(), offset, libc::SEEK_DATA) {
            Ok(start) if start > offset => Extent { data: false, end: start.min(len) },
            Ok(_) => match sys::seek(self.fd(), offset, libc::SEEK_HOLE) {
                Ok(end) if end > offset => Extent { data: true, end: end.min(len) },
                _ => all_data,
            },
            // No data behind `offset`.
            Err(Errno(libc::ENXIO)) => Extent { data: false, end: len },
            Err(_) => all_data,
        };
        Ok(extent)
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn has_fixed_len(&self) -> bool {
        self.is_block
    }
}

/// The most bytes that one detour through aligned memory takes; a multiple of every alignment.
const BOUNCE: usize = 1 << 20;

/// An alignment that every device accepts.
const SAFE_ALIGN: u32 = BUF_ALIGN as u32;

/// The places of the device's request queue, as the kernel's sysfs tells (`nr_requests`, see
/// Documentation/ABI/stable/sysfs-block). A partition's are those of its disk. Devices that hand
/// each request on to others (`mq` is missing) have no places of their own.
fn queue_depth(metadata: &fs::Metadata) -> Option<u32> {
    let is_block = metadata.file_type().is_block_device();
    let device = if is_block { metadata.rdev() } else { metadata.dev() };
    let (major, minor) = (libc::major(device), libc::minor(device));
    let device = Path::new("/sys/dev/block").join(format!("{major}:{minor}"));
    let disk =
        [device.join("."), device.join("..")].into_iter().find(|disk| disk.join("mq").exists())?;
    fs::read_to_string(disk.join("queue/nr_requests")).ok()?.trim().parse().ok()
}

fn refuse_odd_types(metadata: &fs::Metadata) -> io::Result<()> {
    let kind = metadata.file_type();
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "of an unknown type"
    };
    let text = format!("is {what}, not a regular file or a block device");
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

/// Memory and request alignment of a file opened with O_DIRECT.
fn probe_align(fd: RawFd, is_block: bool) -> (u32, u32) {
    let sane = |align: u32| align.is_power_of_two() && align <= SAFE_ALIGN;
    let (mut memory, mut request) = (None, None);
    if let Some((m, r)) = sys::dio_align(fd) {
        (memory, request) = (Some(m).filter(|&m| sane(m)), Some(r).filter(|&r| sane(r)));
    }
    if is_block {
        request = request.or_else(|| sys::block_size(fd)).filter(|&r| sane(r));
    }
    probe_by_reading(fd, memory, request)
}

/// Bytes in a block of the file system that holds a file, or in a page of its cache: the larger. More
/// than any file system has is a hint for transfers, as a network's give.
fn file_system_block(fd: RawFd) -> u32 {
    const MOST: u32 = 64 << 10;
    let size = sys::file_system_block(fd).and_then(|size| u32::try_from(size).ok());
    let size = size.filter(|&size| size.is_power_of_two() && size <= MOST);
    size.unwrap_or(SAFE_ALIGN).max(sys::page_size())
}

/// Fills in what the kernel did not say, by finding out which reads it refuses. Proves nothing in
/// a file with no bytes to read, where it may refuse none: there the safe values are taken.
fn probe_by_reading(fd: RawFd, memory: Option<u32>, request: Option<u32>) -> (u32, u32) {
    if let (Some(memory), Some(request)) = (memory, request) {
        return (memory, request);
    }
    if sys::length(fd).unwrap_or(0) < u64::from(SAFE_ALIGN) {
        return (memory.unwrap_or(SAFE_ALIGN), request.unwrap_or(SAFE_ALIGN));
    }
    let mut scratch = Buf::zeroed(2 * SAFE_ALIGN as usize);
    let steps = || (9..12).map(|shift| 1u32 << shift);
    let mut accepts =
        |at: u32, len: u32| sys::pread(fd, &mut scratch[at as usize..][..len as usize], 0).is_ok();
    let request = request.or_else(|| steps().find(|&len| accepts(0, len))).unwrap_or(SAFE_ALIGN);
    let memory = memory.or_else(|| steps().find(|&at| accepts(at, request))).unwrap_or(SAFE_ALIGN);
    (memory, request)
}
