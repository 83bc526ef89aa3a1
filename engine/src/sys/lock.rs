//! Locks on files that several programs may have open: the byte-range locks that QEMU takes.
//!
//! A lock says two things: what its holder does with the file, and what it lets others do. Each is a
//! set of [`Permission`]s. A holder has a shared lock on byte `100 + n` for each permission `n` that
//! it uses, and on byte `200 + n` for each that it denies to others. After taking its own, it looks
//! whether anybody denies what it uses, or uses what it denies; if so it gives its own back. Nothing
//! is ever written, and a descriptor that only reads is enough.
//!
//! They are open file description locks (`F_OFD_SETLK`): each open of the file is a holder of its
//! own, in one process too, and a duplicate of the descriptor is the same holder. The kernel drops
//! them with the last reference to the open file. That may be a moment after the last process that
//! had it has ended: an io_uring is taken apart later, and whoever reads `/proc` may still hold it.

use std::fmt;
use std::fs;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;

use crate::sys::syscalls as sys;
use crate::units::Errno;

/// Something that a holder may do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Permission {
    /// Read what somebody wrote as one.
    ConsistentRead = 0,
    /// Write.
    Write = 1,
    /// Write what is there already.
    WriteUnchanged = 2,
    /// Change the file's length.
    Resize = 3,
}

impl Permission {
    /// All, in the order in which they are looked at.
    pub const ALL: [Permission; 4] = [
        Permission::ConsistentRead,
        Permission::Write,
        Permission::WriteUnchanged,
        Permission::Resize,
    ];

    fn used_byte(self) -> u64 {
        100 + self as u64
    }

    fn denied_byte(self) -> u64 {
        200 + self as u64
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Permission::ConsistentRead => "consistent read",
            Permission::Write => "write",
            Permission::WriteUnchanged => "write unchanged",
            Permission::Resize => "resize",
        })
    }
}

/// A lock to take: what its holder uses and what it denies to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lock {
    /// What the holder does with the file.
    pub uses: &'static [Permission],
    /// What nobody else may do meanwhile.
    pub denies: &'static [Permission],
}

impl Lock {
    /// Reads and writes, and wants nobody else to write.
    pub const WRITER: Lock = Lock {
        uses: &[Permission::ConsistentRead, Permission::Write, Permission::Resize],
        denies: &[Permission::Write, Permission::Resize],
    };
    /// Reads, and wants nobody to write.
    pub const READER: Lock = Lock {
        uses: &[Permission::ConsistentRead],
        denies: &[Permission::Write, Permission::Resize],
    };
    /// Reads a file that others may write, but whose length may not change.
    pub const PART_READER: Lock =
        Lock { uses: &[Permission::ConsistentRead], denies: &[Permission::Resize] };
    /// Reads, whatever others do.
    pub const SHARED_READER: Lock = Lock { uses: &[Permission::ConsistentRead], denies: &[] };
}

/// Whether to lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Locking {
    /// Never: whoever opens files this way answers for it that nobody else writes them.
    Off,
    /// Where the file system can. [`LockState::Unsupported`] tells where it could not.
    #[default]
    Auto,
    /// A file that cannot be locked is not opened.
    On,
}

/// What lock an open file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockState {
    /// None was asked for, or it was given back.
    None,
    /// This one.
    Held(Lock),
    /// One was asked for, and the file system has none.
    Unsupported(Errno),
}

/// Why a lock was not taken. Nothing of it is held then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LockError {
    /// Somebody else's lock stands against it.
    Conflict {
        /// What the two disagree about.
        permission: Permission,
        /// True: we would deny it to others, and another uses it. False: we would use it, and
        /// another denies it.
        denied: bool,
        /// Who has the file locked so, as far as `/proc` shows. Often empty: other users' processes
        /// and those of other machines are not seen.
        holders: Vec<Holder>,
    },
    /// The system could not say, or the file system has no locks ([`Locking::On`]).
    Failed(Errno),
}

/// A process that holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// Its name, as `ps` shows it; control characters and all.
    pub command: String,
}

impl fmt::Display for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LockError::Conflict { permission, denied, .. } => {
                let shared = if *denied { "shared " } else { "" };
                write!(f, "Failed to get {shared}\"{permission}\" lock")
            }
            LockError::Failed(errno) => write!(f, "Failed to lock the file: {errno}"),
        }
    }
}

impl std::error::Error for LockError {}

impl LockError {
    /// The error number that stands for it.
    pub fn errno(&self) -> Errno {
        match self {
            LockError::Conflict { .. } => Errno::AGAIN,
            LockError::Failed(errno) => *errno,
        }
    }
}

/// Takes `lock` for the open file behind `fd`, which has none yet.
pub(crate) fn take(fd: RawFd, lock: &Lock) -> Result<(), LockError> {
    let taken = try_take(fd, lock);
    if taken.is_err() {
        // What cannot be given back is gone when the descriptor is.
        let _ = release(fd);
    }
    match taken {
        Ok(()) => Ok(()),
        Err(Stop::Failed(errno)) => Err(LockError::Failed(errno)),
        Err(Stop::Conflict { permission, denied }) => {
            let byte = if denied { permission.used_byte() } else { permission.denied_byte() };
            Err(LockError::Conflict { permission, denied, holders: holders(fd, byte) })
        }
    }
}

/// Gives back whatever the open file behind `fd` holds.
pub(crate) fn release(fd: RawFd) -> Result<(), Errno> {
    let bytes = Permission::ALL.iter().flat_map(|one| [one.used_byte(), one.denied_byte()]);
    bytes.map(|byte| sys::unlock_byte(fd, byte)).fold(Ok(()), Result::and)
}

/// Does this error of taking a lock mean that the file system has none?
pub(crate) fn is_unsupported(errno: Errno) -> bool {
    let known = [libc::EINVAL, libc::ENOLCK, libc::ENOSYS, libc::EOPNOTSUPP, libc::ENOTTY];
    known.contains(&errno.0)
}

enum Stop {
    Conflict { permission: Permission, denied: bool },
    Failed(Errno),
}

fn try_take(fd: RawFd, lock: &Lock) -> Result<(), Stop> {
    // By permission, so that a conflict is told by the first: who may not write seldom asks about
    // lengths.
    let all = || {
        Permission::ALL.into_iter().flat_map(|one| {
            let (used, denied) = (one.used_byte(), one.denied_byte());
            let uses = lock.uses.contains(&one).then_some((one, false, used, denied));
            let denies = lock.denies.contains(&one).then_some((one, true, denied, used));
            uses.into_iter().chain(denies)
        })
    };
    for (permission, denied, own, _) in all() {
        sys::lock_byte_shared(fd, own).map_err(|errno| match errno.0 {
            // Somebody has it exclusively.
            libc::EAGAIN | libc::EACCES => Stop::Conflict { permission, denied },
            _ => Stop::Failed(errno),
        })?;
    }
    for (permission, denied, _, theirs) in all() {
        if sys::is_byte_locked(fd, theirs).map_err(Stop::Failed)? {
            return Err(Stop::Conflict { permission, denied });
        }
    }
    Ok(())
}

/// The most descriptors of other processes that are looked at.
const LOOKED_AT_MAX: usize = 1 << 14;
/// The most processes that are named.
const HOLDERS_MAX: usize = 4;

/// Who holds a lock on `byte` of the file behind `fd`. The kernel names nobody for such locks, but
/// shows each descriptor's own under `/proc`.
fn holders(fd: RawFd, byte: u64) -> Vec<Holder> {
    let identity = |path: &str| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    let mut found: Vec<Holder> = Vec::new();
    let Some(ours) = identity(&format!("/proc/self/fd/{fd}")) else { return found };
    let Ok(processes) = fs::read_dir("/proc") else { return found };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut looked_at = 0;
    for pid in pids {
        let pid: u32 = pid;
        let Ok(open) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else { continue };
        for entry in open.flatten() {
            looked_at += 1;
            if looked_at > LOOKED_AT_MAX || found.len() == HOLDERS_MAX {
                return found;
            }
            let number = entry.file_name();
            let path = format!("/proc/{pid}/fd/{}", number.to_string_lossy());
            // Other files' are not read: while one is, the kernel keeps it open, and its locks with
            // it, even if its process ends meanwhile.
            if identity(&path) != Some(ours) {
                continue;
            }
            let Ok(info) = fs::read_to_string(entry.path()) else { continue };
            if info.lines().any(|line| locks_byte(line, ours.1, byte)) {
                let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                found.push(Holder { pid, command: command.trim_end().to_string() });
                break;
            }
        }
    }
    found
}

/// Is `line` of `fdinfo` an open file description lock on `byte` of the file of this inode number?
/// `lock: 1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101`
fn locks_byte(line: &str, inode: u64, byte: u64) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["lock:", _, "OFDLCK", _, _, _, file, first, last] = words[..] else { return false };
    let last = if last == "EOF" { Some(u64::MAX) } else { last.parse().ok() };
    let (Ok(first), Some(last)) = (first.parse::<u64>(), last) else { return false };
    let same = file.rsplit(':').next().and_then(|text| text.parse().ok()) == Some(inode);
    same && (first..=last).contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::locks_byte;

    #[test]
    fn lines_of_fdinfo_are_understood() {
        let line = "lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101";
        assert!(locks_byte(line, 1234, 100) && locks_byte(line, 1234, 101));
        assert!(!locks_byte(line, 1234, 102) && !locks_byte(line, 1235, 100));
        assert!(locks_byte("lock: 2: OFDLCK ADVISORY WRITE -1 fe:00:7 0 EOF", 7, 201));
        assert!(!locks_byte("lock: 2: FLOCK ADVISORY WRITE 12 fe:00:7 0 EOF", 7, 201));
        assert!(!locks_byte("pos:\t0", 0, 0));
    }
}
