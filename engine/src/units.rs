//! The engine's small vocabulary of numbers: ids, time, errors.
//!
//! Ids print short (`r3`, `f0`) so that traces read well. Guest and host offsets are different
//! types because mixing them up is the classic defect of a block layer.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::io::ErrorKind;

macro_rules! id {
    ($name:ident, $letter:literal, $what:literal $(, $hash:ident)?) => {
        #[doc = $what]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default $(, $hash)?)]
        pub struct $name(pub u32);

        impl $name {
            /// The id as an index.
            #[inline]
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($letter, "{}"), self.0)
            }
        }
    };
}

id!(ReqId, "r", "A request in the engine's slab.");

impl Hash for ReqId {
    /// In a way that nothing else is hashed in, so that a hasher can tell: see
    /// `slots::Renamed`.
    fn hash<H: Hasher>(&self, h: &mut H) {
        h.write_u128(self.0.into());
    }
}

id!(OpId, "o", "An op on its way to the backend or back.", Hash);
id!(BufId, "b", "A buffer of the engine's pool.", Hash);
id!(
    RegionId,
    "m",
    "Memory that a node holds for as long as it lives, such as its table cache.",
    Hash
);

/// A file attached to the engine and its backend. Its index is used again when the file is gone; its
/// generation is not, so that the id of a file that is gone is no other file's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct FileId(pub u32);

impl FileId {
    /// The most files that an engine can have at once.
    pub const MAX: usize = 1 << FileId::INDEX_BITS;
    const INDEX_BITS: u32 = 16;

    /// The id as an index.
    #[inline(always)]
    pub fn index(self) -> usize {
        self.0 as usize & (FileId::MAX - 1)
    }

    /// How many files had the index before.
    #[inline]
    pub fn generation(self) -> u32 {
        self.0 >> FileId::INDEX_BITS
    }

    /// The id of the next file at this index; `None`: there are no more, the index is used up.
    pub(crate) fn next_generation(self) -> Option<FileId> {
        self.0.checked_add(FileId::MAX as u32).map(FileId)
    }
}

impl fmt::Debug for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.generation() {
            0 => write!(f, "f{}", self.index()),
            generation => write!(f, "f{}.{generation}", self.index()),
        }
    }
}

/// An opened layer. It carries which engine it is of: another engine refuses it. Its index is used
/// again when it is closed; its generation is not, so that the id of a closed node is refused for
/// ever.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct NodeId {
    /// The tag of its engine and its index; the generation.
    parts: [u32; 2],
}

impl NodeId {
    /// The most nodes that an engine can have at once.
    pub const MAX: usize = u16::MAX as usize;

    /// No node: whose the file layer's own work is.
    pub(crate) const NONE: NodeId = NodeId { parts: [u16::MAX as u32, 0] };

    /// The first node with number `index` of the engine that has this tag.
    ///
    /// # Panics
    ///
    /// If there are [`NodeId::MAX`] already.
    pub(crate) fn new(engine: u16, index: usize) -> NodeId {
        assert!(index < NodeId::MAX, "an engine has at most {} nodes", NodeId::MAX);
        NodeId { parts: [u32::from(engine) << 16 | index as u32, 0] }
    }

    /// The id of the next node at this index; `None`: there are no more, the index is used up.
    pub(crate) fn next_generation(self) -> Option<NodeId> {
        let [place, generation] = self.parts;
        Some(NodeId { parts: [place, generation.checked_add(1)?] })
    }

    /// The id as an index.
    #[inline(always)]
    pub fn index(self) -> usize {
        self.parts[0] as usize & 0xffff
    }
}

impl Hash for NodeId {
    /// Engines that are in the same state are so whatever their tags.
    fn hash<H: Hasher>(&self, h: &mut H) {
        (self.index(), self.parts[1]).hash(h);
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parts[1] {
            0 => write!(f, "n{}", self.index()),
            generation => write!(f, "n{}.{generation}", self.index()),
        }
    }
}

/// A job of an engine. It carries which engine it is of, and none has the id of another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JobId {
    pub(crate) engine: u16,
    pub(crate) serial: u32,
}

impl Hash for JobId {
    /// Engines that are in the same state are so whatever their tags.
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.serial.hash(h);
    }
}

/// A byte offset as the guest sees it, from 0 to the virtual size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct GuestOffset(pub u64);

/// A byte offset in the image file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct HostOffset(pub u64);

/// A moment, in nanoseconds since an origin that the clock chooses.
///
/// The engine never reads a clock of its own: time comes in through `Engine::run` and
/// `Backend::clock`, so that a simulated run has simulated time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Time(pub u64);

impl Time {
    /// This moment plus `ns` nanoseconds, or the end of time.
    #[must_use]
    #[inline]
    pub fn plus_ns(self, ns: u64) -> Time {
        Time(self.0.saturating_add(ns))
    }

    /// This moment plus `ms` milliseconds, or the end of time.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Time {
        self.plus_ns(ms.saturating_mul(1_000_000))
    }

    /// This moment plus the time that `count` of something take at so many a second (0 counts as 1), or
    /// the end of time.
    #[must_use]
    pub fn plus_at_rate(self, count: u64, per_second: u64) -> Time {
        let nanos = u128::from(count) * 1_000_000_000 / u128::from(per_second.max(1));
        self.plus_ns(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Nanoseconds from `earlier` to here; 0 if `earlier` is later.
    #[must_use]
    #[inline]
    pub fn since(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// An error number of the operating system, the one error type of requests and ops.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// Input/output error.
    pub const IO: Errno = Errno(libc::EIO);
    /// Invalid argument; also: the image's tables say something impossible.
    pub const INVALID: Errno = Errno(libc::EINVAL);
    /// No space left on device.
    pub const NO_SPACE: Errno = Errno(libc::ENOSPC);
    /// Canceled before it was done.
    pub const CANCELED: Errno = Errno(libc::ECANCELED);
    /// It took too long.
    pub const TIMED_OUT: Errno = Errno(libc::ETIMEDOUT);
    /// Operation not permitted.
    pub const NOT_PERMITTED: Errno = Errno(libc::EPERM);
    /// Try again; the backend hands such an op on to somebody who can wait.
    pub const AGAIN: Errno = Errno(libc::EAGAIN);
    /// Interrupted before anything was done.
    pub const INTERRUPTED: Errno = Errno(libc::EINTR);
    /// Not supported here; the engine falls back to a way that is.
    pub const NOT_SUPPORTED: Errno = Errno(libc::EOPNOTSUPP);
    /// The image was opened read-only.
    pub const READ_ONLY: Errno = Errno(libc::EROFS);
    /// File too large.
    pub const TOO_BIG: Errno = Errno(libc::EFBIG);
    /// The disk is gone, or going (ESHUTDOWN).
    pub const SHUT_DOWN: Errno = Errno(libc::ESHUTDOWN);
    /// Memory that cannot be written (EFAULT).
    pub const BAD_MEMORY: Errno = Errno(libc::EFAULT);

    /// From an I/O error; one without an error number counts as what its kind is, or as [`Errno::IO`].
    pub fn from_io(error: &std::io::Error) -> Errno {
        let of_kind = || match error.kind() {
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::PermissionDenied => libc::EACCES,
            ErrorKind::InvalidInput => libc::EINVAL,
            ErrorKind::Unsupported => libc::EOPNOTSUPP,
            _ => libc::EIO,
        };
        Errno(error.raw_os_error().unwrap_or_else(of_kind))
    }
}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> Self {
        std::io::Error::from_raw_os_error(errno.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The standard library appends " (os error N)"; people's scripts want the bare text.
        let text = std::io::Error::from_raw_os_error(self.0).to_string();
        f.write_str(text.split(" (os error").next().unwrap_or(&text))
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl std::error::Error for Errno {}

/// `value` rounded down to a multiple of `align`, a power of two.
#[inline]
pub fn align_down(value: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    value & !(align - 1)
}

/// `value` rounded up to a multiple of `align`, a power of two; `None` on overflow.
#[inline]
pub fn align_up(value: u64, align: u64) -> Option<u64> {
    debug_assert!(align.is_power_of_two());
    Some(value.checked_add(align - 1)? & !(align - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_never_anothers() {
        let mut file = FileId(3);
        for generation in 0..u32::from(u16::MAX) {
            assert_eq!((file.index(), file.generation()), (3, generation));
            file = file.next_generation().expect("there are more");
        }
        assert_eq!(file.next_generation(), None, "the index is used up");
        let node = NodeId::new(7, 3);
        let next = node.next_generation().expect("there are more");
        assert_eq!(node.index(), next.index());
        assert!(node != next && node != NodeId::new(8, 3) && node < next);
        let last = NodeId { parts: [node.parts[0], u32::MAX] };
        assert_eq!(last.next_generation(), None, "the index is used up");
        assert_eq!(
            format!("{:?} {:?} {:?} {:?}", node, next, FileId(3), file),
            "n3 n3.1 f3 f3.65535"
        );
    }
}
