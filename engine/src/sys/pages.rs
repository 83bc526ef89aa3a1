//! Bytes in memory: on the heap, or in pages of their own, which are zeros and cost nothing until they
//! are touched.
//!
//! A heap that has given memory out before clears it when it gives it out again. For a disk's caches
//! of some megabytes that takes longer than a turn of an event loop may, whenever a disk is opened.

use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

/// Fewer bytes are not worth a mapping.
const MAPPED_MIN: usize = 128 << 10;

/// Owned bytes.
pub(crate) struct Bytes {
    start: NonNull<u8>,
    len: usize,
    is_mapped: bool,
}

// SAFETY: it owns its bytes, as a box does.
unsafe impl Send for Bytes {}
// SAFETY: through a shared reference they are only read.
unsafe impl Sync for Bytes {}

impl Bytes {
    /// `len` zeros. Many are in pages of their own if there are any to be had.
    pub(crate) fn zeroed(len: usize) -> Bytes {
        if len < MAPPED_MIN { Bytes::from(vec![0; len]) } else { Bytes::mapped(len) }
    }

    /// The same, in pages of their own however few they are: for what lives long, and may never be used.
    pub(crate) fn mapped(len: usize) -> Bytes {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, at an address that the kernel chooses, of no file.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, -1, 0) };
        match NonNull::new(start.cast::<u8>()).filter(|_| start != libc::MAP_FAILED) {
            Some(start) => Bytes { start, len, is_mapped: true },
            None => Bytes::from(vec![0; len]),
        }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        let bytes = Box::leak(bytes.into_boxed_slice());
        Bytes { start: NonNull::from(&mut *bytes).cast(), len: bytes.len(), is_mapped: false }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    #[inline(always)]
    fn deref(&self) -> &[u8] {
        // SAFETY: so many bytes are there, initialised and owned, until it is dropped.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Bytes {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; and nobody else has them while `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if self.is_mapped {
            // SAFETY: the whole of its own mapping, which nobody uses any more.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        } else {
            let bytes = ptr::slice_from_raw_parts_mut(self.start.as_ptr(), self.len);
            // SAFETY: it was leaked from a box of so many bytes.
            drop(unsafe { Box::from_raw(bytes) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_zeros_and_can_be_written_wherever_they_are() {
        for len in [0, 1, 4096, MAPPED_MIN - 1, MAPPED_MIN, MAPPED_MIN + 5] {
            let mut bytes = Bytes::zeroed(len);
            assert_eq!((bytes.len(), bytes.is_mapped), (len, len >= MAPPED_MIN));
            assert!(bytes.iter().all(|&byte| byte == 0));
            bytes.fill(7);
            assert!(bytes.iter().all(|&byte| byte == 7));
        }
        assert_eq!(&*Bytes::from(vec![1, 2, 3]), [1, 2, 3]);
    }
}
