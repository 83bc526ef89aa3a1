//! One op with its addresses, to be done now by whoever may wait: [`super::inline`] on the spot, a
//! thread of [`super::pool`] when it gets there.
//!
//! This is where ops get their meaning on files: how zeros are made, what grows a file. And where
//! a computation is begun, which is on no file.

use std::os::fd::RawFd;

use smallvec::SmallVec;

use crate::mem::Memory;
use crate::op::{Compute, Hole, OpKind, Target};
use crate::ops::OpRecord;
use crate::sys::ram::RamPiece;
use crate::sys::syscalls::{self as sys, BlockRange};
use crate::units::{Errno, FileId, OpId};

/// The addresses of an op. Most ops have one to three.
pub(crate) type Pieces = SmallVec<[RamPiece; 4]>;

/// What a job must know of its file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Handle {
    pub(crate) fd: RawFd,
    pub(crate) is_block: bool,
    /// The kernel lets one write go on at a time, as on every file of a file system that is written through
    /// the page cache: others would wait for its lock, or spin.
    pub(crate) one_writer: bool,
    /// The file that is copied from; -1 where none is.
    pub(crate) from: RawFd,
}

impl Handle {
    const NONE: Handle = Handle { fd: -1, is_block: false, one_writer: false, from: -1 };

    /// What `record` is done on, as `file` knows it. `None`: a file that is not attached.
    pub(crate) fn of(record: &OpRecord, file: impl Fn(FileId) -> Option<Handle>) -> Option<Handle> {
        match (record.op.target, record.op.kind) {
            (Target::Cpu, _) => Some(Handle::NONE),
            (_, OpKind::Copy { from, .. }) => {
                Some(Handle { from: file(from)?.fd, ..file(record.file())? })
            }
            _ => file(record.file()),
        }
    }
}

/// An op with its addresses.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) op: OpId,
    pub(crate) file: Handle,
    pub(crate) kind: OpKind,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) pieces: Pieces,
}

impl Job {
    /// The rest of `record`. `pieces` is empty memory to use again.
    pub(crate) fn new(
        op: OpId,
        record: &OpRecord,
        file: Handle,
        mem: &mut Memory,
        mut pieces: Pieces,
    ) -> Job {
        pieces.clear();
        mem.pieces(&record.op.segs, record.moved, |piece| {
            // What does not fit in one call is left to the next: a short count is legal.
            if pieces.len() < sys::IOV_MAX {
                pieces.push(piece);
            }
        });
        let (kind, offset, len) = (record.op.kind, record.offset(), record.remaining());
        Job { op, file, kind, offset, len, pieces }
    }

    /// The file that nobody else is to write while this runs.
    pub(crate) fn writes_alone(&self) -> Option<RawFd> {
        let locks = self.kind.locks_file() || matches!(self.kind, OpKind::Write { .. });
        (locks && self.file.one_writer).then_some(self.file.fd)
    }

    /// Does it; waits as long as it takes.
    ///
    /// # Safety
    /// The memory that `pieces` name is valid until this returns. If it is computed with, nobody
    /// else changes it meanwhile, or looks at what is written.
    pub(crate) unsafe fn perform(&self) -> Result<u64, Errno> {
        let Job { file: Handle { fd, is_block, .. }, offset, len, .. } = *self;
        match self.kind {
            // SAFETY: the caller's promise.
            OpKind::Read => unsafe { sys::preadv(fd, &self.pieces, offset) },
            // SAFETY: the caller's promise.
            OpKind::Write { fua: false } => unsafe { sys::pwritev(fd, &self.pieces, offset) },
            // SAFETY: the caller's promise.
            OpKind::Write { fua: true } => unsafe { sys::pwritev_stable(fd, &self.pieces, offset) },
            // SAFETY: the caller's promise.
            OpKind::Compute(work) => unsafe { compute(work, &self.pieces) },
            OpKind::Flush => sys::fdatasync(fd).map(|()| 0),
            OpKind::Truncate if is_block => within_device(fd, offset, 0),
            OpKind::Truncate => sys::ftruncate(fd, offset).map(|()| 0),
            _ if len == 0 => Ok(0),
            OpKind::Hole => Ok(hole_at(fd, offset, len).to_answer()),
            OpKind::Zero { unmap } if is_block => zero_device(fd, offset, len, unmap),
            OpKind::Zero { unmap } => zero_file(fd, offset, len, unmap),
            OpKind::Discard => discard(self.file, offset, len),
            OpKind::Allocate if is_block => within_device(fd, offset, len),
            OpKind::Allocate => allocate_file(fd, offset, len),
            OpKind::Copy { at, .. } => copy(self.file, at, offset, len),
        }
    }
}

/// # Safety
/// As for [`Job::perform`].
unsafe fn compute(work: Compute, pieces: &[RamPiece]) -> Result<u64, Errno> {
    let &[input, output] = pieces else { unreachable!("{work:?} with {pieces:?}") };
    // SAFETY: valid, and nobody else's, as the caller promises; `Op::compute` has seen to it that
    // they do not overlap, and that they are plain bytes of the engine's.
    let (input, output) = unsafe {
        (
            std::slice::from_raw_parts(input.base, input.len),
            std::slice::from_raw_parts_mut(output.base, output.len),
        )
    };
    (work.run)(input, output).map(|()| 0)
}

fn copy(file: Handle, mut from: u64, mut to: u64, len: u64) -> Result<u64, Errno> {
    let end = end_of(to, len)?;
    while to < end {
        match sys::copy_file_range(file.from, from, file.fd, to, end - to)? {
            // It ends before.
            0 => return Err(Errno::INVALID),
            moved => (from, to) = (from + moved, to + moved),
        }
    }
    Ok(0)
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

fn end_of(offset: u64, len: u64) -> Result<u64, Errno> {
    offset.checked_add(len).ok_or(Errno::TOO_BIG)
}

/// A block device neither grows nor shrinks: anything inside it is already as wanted.
fn within_device(fd: RawFd, offset: u64, len: u64) -> Result<u64, Errno> {
    if end_of(offset, len)? <= sys::length(fd)? { Ok(0) } else { Err(Errno::NO_SPACE) }
}

/// A file system that cannot tell has data everywhere.
fn hole_at(fd: RawFd, offset: u64, len: u64) -> Hole {
    let (is_hole, end) = match sys::seek(fd, offset, libc::SEEK_DATA) {
        Ok(data) if data > offset => (true, data),
        Ok(_) => (false, sys::seek(fd, offset, libc::SEEK_HOLE).unwrap_or(u64::MAX)),
        // Nothing but a hole up to the file's end, or behind that.
        Err(Errno(libc::ENXIO)) => (true, u64::MAX),
        Err(_) => (false, u64::MAX),
    };
    Hole { is_hole, len: end.saturating_sub(offset).clamp(1, len) }
}

fn zero_file(fd: RawFd, offset: u64, len: u64, unmap: bool) -> Result<u64, Errno> {
    if !unmap {
        match sys::fallocate(fd, libc::FALLOC_FL_ZERO_RANGE, offset, len) {
            Err(Errno::NOT_SUPPORTED) => {} // tmpfs: make a hole instead, then fill it again
            answer => return answer.map(|()| 0),
        }
    }
    sys::fallocate(fd, PUNCH, offset, len)?;
    if !unmap {
        return allocate_file(fd, offset, len);
    }
    grow_sparsely(fd, end_of(offset, len)?)
}

/// Makes a file at least `end` bytes long.
///
/// By reserving its last byte, not by ftruncate: that would cut off what a write in flight appends
/// between our look at the length and our change of it.
fn grow_sparsely(fd: RawFd, end: u64) -> Result<u64, Errno> {
    if end > 0 && sys::length(fd)? < end {
        sys::fallocate(fd, 0, end - 1, 1)?;
    }
    Ok(0)
}

/// Reserves space. A file system that cannot reserve gets the length alone; its writers wait for
/// this op, so no write in flight extends the file meanwhile.
pub(crate) fn allocate_file(fd: RawFd, offset: u64, len: u64) -> Result<u64, Errno> {
    match sys::fallocate(fd, 0, offset, len) {
        Err(Errno::NOT_SUPPORTED) => {
            let end = end_of(offset, len)?;
            if sys::length(fd)? < end {
                sys::ftruncate(fd, end)?;
            }
            Ok(0)
        }
        answer => answer.map(|()| 0),
    }
}

fn zero_device(fd: RawFd, offset: u64, len: u64, unmap: bool) -> Result<u64, Errno> {
    within_device(fd, offset, len)?;
    // On a block device this is promised to read as zeros, or is not supported.
    if unmap && sys::fallocate(fd, PUNCH, offset, len).is_ok() {
        return Ok(0);
    }
    sys::block_range(fd, BlockRange::Zero, offset, len).map(|()| 0)
}

/// A hint: a file that cannot take it has done its duty.
fn discard(file: Handle, offset: u64, len: u64) -> Result<u64, Errno> {
    let answer = if file.is_block {
        sys::block_range(file.fd, BlockRange::Discard, offset, len)
    } else {
        sys::fallocate(file.fd, PUNCH, offset, len)
    };
    match answer {
        Ok(()) | Err(Errno::NOT_SUPPORTED) => Ok(0),
        // A device answers EINVAL to a range that is not made of whole blocks.
        Err(Errno::INVALID) if file.is_block => Ok(0),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use crate::sys::disk::{Create, DiskFile, DiskOptions};

    fn job(file: &DiskFile, kind: OpKind, offset: u64, len: u64) -> Result<u64, Errno> {
        let pieces = Pieces::new();
        let job = Job { op: OpId(0), file: file.handle(), kind, offset, len, pieces };
        // SAFETY: it names no memory.
        unsafe { job.perform() }
    }

    #[test]
    fn ranges_that_no_file_can_have_are_errors() {
        let dir = tempfile::tempdir().expect("a directory for scratch files");
        let options = DiskOptions { write: true, create: Create::New, ..DiskOptions::default() };
        let file = DiskFile::open(dir.path().join("file"), &options).expect("it is made");
        for offset in [i64::MAX as u64, u64::MAX] {
            for kind in [
                OpKind::Zero { unmap: false },
                OpKind::Zero { unmap: true },
                OpKind::Discard,
                OpKind::Allocate,
            ] {
                assert_eq!(job(&file, kind, offset, 4096), Err(Errno::TOO_BIG), "{kind:?}");
            }
        }
        assert_eq!(job(&file, OpKind::Truncate, u64::MAX, 0), Err(Errno::TOO_BIG));
        assert_eq!(file.len().expect("it has one"), 0);
    }

    #[test]
    fn holes_are_where_the_file_system_has_them() {
        let dir = tempfile::tempdir().expect("a directory for scratch files");
        let options = DiskOptions { write: true, create: Create::New, ..DiskOptions::default() };
        let file = DiskFile::open(dir.path().join("file"), &options).expect("it is made");
        let len = 1 << 20;
        file.set_len(len).expect("it grows");
        file.write_at(512 << 10, &[1; 64 << 10]).expect("it is written");
        for offset in (0..len).step_by(12_345) {
            let answer = job(&file, OpKind::Hole, offset, 2 * len).expect("it never fails");
            let extent = file.extent_at(offset).expect("it is within the file");
            let said = Hole::from_answer(answer);
            assert_eq!(said.is_hole, !extent.data, "at {offset}");
            // A hole at the end goes on behind it, as it reads.
            let end = if !extent.data && extent.end == len { offset + 2 * len } else { extent.end };
            assert_eq!(offset + said.len, end, "at {offset}");
            assert_eq!(
                job(&file, OpKind::Hole, offset, 1),
                Ok(Hole { len: 1, ..said }.to_answer())
            );
        }
        let behind = Hole { is_hole: true, len: 7 };
        assert_eq!(job(&file, OpKind::Hole, len + 5, 7), Ok(behind.to_answer()));
    }

    /// Wants COWBELL_TEST_BLOCK_DEVICE to name a block device of at least 1 MiB, such as a loop
    /// device, whose contents may be lost.
    #[test]
    #[ignore = "wants a block device to write to"]
    fn block_devices() {
        let path = std::env::var_os("COWBELL_TEST_BLOCK_DEVICE").expect("a device is named");
        for direct in [false, true] {
            let options = DiskOptions { write: true, direct, ..DiskOptions::default() };
            let file = DiskFile::open(&path, &options).expect("it opens");
            let info = file.info().expect("it is known");
            assert!(file.is_block_device() && !info.can_grow && info.len >= 1 << 20, "{info:?}");
            let mut old = vec![0xa5; 1 << 20];
            let mut got = vec![0; 1 << 20];
            for unmap in [false, true] {
                file.write_at(0, &old).expect("it is written");
                let zero = OpKind::Zero { unmap };
                assert_eq!(job(&file, zero, 8192, 65536), Ok(0));
                file.read_at(0, &mut got).expect("it is read");
                old[8192..8192 + 65536].fill(0);
                assert!(got == old);
                old.fill(0xa5);
                assert_eq!(job(&file, zero, info.len - 4096, 8192), Err(Errno::NO_SPACE));
            }
            assert_eq!(job(&file, OpKind::Discard, 4096, 4096), Ok(0));
            assert_eq!(job(&file, OpKind::Discard, 4097, 7), Ok(0), "a hint");
            assert_eq!(job(&file, OpKind::Flush, 0, 0), Ok(0));
            for kind in [OpKind::Truncate, OpKind::Allocate] {
                assert_eq!(job(&file, kind, 4096, 0), Ok(0));
            }
            assert_eq!(job(&file, OpKind::Truncate, info.len + 1, 0), Err(Errno::NO_SPACE));
            assert_eq!(job(&file, OpKind::Allocate, info.len, 1), Err(Errno::NO_SPACE));
            assert!(file.set_len(info.len).is_ok() && file.set_len(info.len + 1).is_err());
            let mut tail = [1; 16];
            file.read_at(info.len - 8, &mut tail).expect("the rest is zeros");
            assert!(tail[8..].iter().all(|&b| b == 0));
            assert!(file.write_at(info.len - 8, &tail).is_err());
        }
    }
}
