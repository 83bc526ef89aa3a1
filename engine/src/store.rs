//! Blocking access to a file: for opening, creating, checking and mapping an image, none of which
//! runs inside an event loop.

use std::io;

/// A file that may be waited for.
pub trait Store {
    /// Reads into `buf` from `offset` on; what lies past the end reads as zeros.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `buf` at `offset`; the file grows where need be.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;

    /// Makes what was written stable.
    fn flush(&self) -> io::Result<()>;

    /// The file's length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Is it empty?
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Sets the file's length; what it gains reads as zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Reserves space for `len` bytes at `offset`, growing the file if need be.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The extent that `offset` lies in: does it hold data, and where does it end? A file system
    /// that cannot tell answers data up to the end of the file. `offset` is below the length.
    fn extent_at(&self, offset: u64) -> io::Result<Extent>;

    /// Can the file be written?
    fn is_writable(&self) -> bool;

    /// Does it keep its length, as a block device does? What nobody has written there may be anything.
    /// [`Store::set_len`] then changes nothing.
    fn has_fixed_len(&self) -> bool {
        false
    }
}

/// A stretch of a file that is all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// False: a hole, reads as zeros.
    pub data: bool,
    /// First byte behind the stretch.
    pub end: u64,
}

impl<S: Store + ?Sized> Store for &S {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        (**self).write_at(offset, buf)
    }
    fn flush(&self) -> io::Result<()> {
        (**self).flush()
    }
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        (**self).set_len(len)
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        (**self).allocate(offset, len)
    }
    fn extent_at(&self, offset: u64) -> io::Result<Extent> {
        (**self).extent_at(offset)
    }
    fn is_writable(&self) -> bool {
        (**self).is_writable()
    }
    fn has_fixed_len(&self) -> bool {
        (**self).has_fixed_len()
    }
}
