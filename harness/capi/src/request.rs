//! Requests: from C's arguments to the engine's.

use std::ffi::c_int;

use cowbell_engine::mem::Mem;
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::ram::{Ram, RamPiece};
use cowbell_engine::units::Errno;
use cowbell_engine::{REQUEST_MAX, Why};
use libc::iovec;

use crate::disk::Disk;
use crate::handle::{Engine, is_place, with};

/// The most pieces of memory of one request, as of readv(2).
pub const COWBELL_IOV_MAX: usize = 1024;

/// A write: end only when it is stable.
pub const COWBELL_WRITE_FUA: u32 = 1;
/// A write: compress it, where the format can. It reads the same.
pub const COWBELL_WRITE_COMPRESSED: u32 = 2;

/// A zeroing: its space may be given back.
pub const COWBELL_ZERO_UNMAP: u32 = 1;
/// A zeroing: end only when it is stable.
pub const COWBELL_ZERO_FUA: u32 = 2;

/// Bytes that somebody wrote, or may have.
pub const COWBELL_STATUS_DATA: u8 = 1;
/// The same, compressed.
pub const COWBELL_STATUS_COMPRESSED: u8 = 2;
/// A layer says that these are zeros.
pub const COWBELL_STATUS_ZERO: u8 = 3;
/// No layer says anything: zeros.
pub const COWBELL_STATUS_UNALLOCATED: u8 = 4;

/// What is at an offset of a disk: the answer to cowbell_status().
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// COWBELL_STATUS_*; 0: there is no answer (yet).
    pub kind: u8,
    /// The layer that says so: 0 is the image itself, 1 its backing file.
    pub layer: u8,
    /// 1: `host` says where the bytes are.
    pub has_host: u8,
    /// 0.
    pub reserved: u8,
    /// Which file: other numbers are other files of this engine.
    pub file: u32,
    /// For how many bytes: 1 to as many as were asked about. What follows may be of the same kind.
    pub len: u64,
    /// At which byte of the file they are, one after the other.
    pub host: u64,
    /// 0.
    pub reserved2: u64,
}

// The engine writes its answer there as it is.
const _: () = assert!(size_of::<Status>() == cowbell_engine::status::Status::BYTES);

/// Reads at `offset` into `count` pieces of memory, one after the other.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_read(
    engine: *mut Engine,
    disk: Disk,
    offset: u64,
    iov: *const iovec,
    count: usize,
    user: u64,
) -> c_int {
    let request = Request { disk, kind: IoKind::Read, offset, user };
    // SAFETY: as this function's contract.
    unsafe { with(engine, |engine| engine.submit_lent(request, iov, count)) }
}

/// Writes `count` pieces of memory, one after the other, at `offset`. `flags` are bits of
/// COWBELL_WRITE_*. What the memory holds is taken at any time until
/// the request has come back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_write(
    engine: *mut Engine,
    disk: Disk,
    offset: u64,
    iov: *const iovec,
    count: usize,
    flags: u32,
    user: u64,
) -> c_int {
    let [fua, compressed] = [COWBELL_WRITE_FUA, COWBELL_WRITE_COMPRESSED].map(|f| flags & f != 0);
    let known = COWBELL_WRITE_FUA | COWBELL_WRITE_COMPRESSED;
    let request = Request { disk, kind: IoKind::Write { fua, compressed }, offset, user };
    let work = |engine: &mut Engine| {
        only(flags, known)?;
        // SAFETY: as this function's contract.
        unsafe { engine.submit_lent(request, iov, count) }
    };
    // SAFETY: as this function's contract.
    unsafe { with(engine, work) }
}

/// Makes every write that had ended before this call stable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_flush(engine: *mut Engine, disk: Disk, user: u64) -> c_int {
    let request = Request { disk, kind: IoKind::Flush, offset: 0, user };
    // SAFETY: as this function's contract.
    unsafe { with(engine, |engine| engine.submit(request, 0, Mem::None)) }
}

/// Makes `len` bytes at `offset` read as zeros. `flags` are bits of COWBELL_ZERO_*.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_zero(
    engine: *mut Engine,
    disk: Disk,
    offset: u64,
    len: u64,
    flags: u32,
    user: u64,
) -> c_int {
    let [unmap, fua] = [COWBELL_ZERO_UNMAP, COWBELL_ZERO_FUA].map(|flag| flags & flag != 0);
    let request = Request { disk, kind: IoKind::Zero { unmap, fua }, offset, user };
    let work = |engine: &mut Engine| {
        only(flags, COWBELL_ZERO_UNMAP | COWBELL_ZERO_FUA)?;
        engine.submit(request, len, Mem::None)
    };
    // SAFETY: as this function's contract.
    unsafe { with(engine, work) }
}

/// The contents of `len` bytes at `offset` are no longer needed. Whole clusters read as zeros
/// afterwards where the format can say so; in a raw image the bytes become zeros or stay.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_discard(
    engine: *mut Engine,
    disk: Disk,
    offset: u64,
    len: u64,
    user: u64,
) -> c_int {
    let request = Request { disk, kind: IoKind::Discard, offset, user };
    // SAFETY: as this function's contract.
    unsafe { with(engine, |engine| engine.submit(request, len, Mem::None)) }
}

/// Sets the disk's size, a multiple of 512 bytes; what it gains reads as zeros. Not every format can
/// shrink, and some disks cannot change. Requests in flight beyond a smaller size may fail, or undo
/// it: wait for them first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_truncate(
    engine: *mut Engine,
    disk: Disk,
    size: u64,
    user: u64,
) -> c_int {
    let request = Request { disk, kind: IoKind::Truncate, offset: size, user };
    // SAFETY: as this function's contract.
    unsafe { with(engine, |engine| engine.submit(request, 0, Mem::None)) }
}

/// Asks what is at `offset`, and for how many of the `len` bytes from there. The answer is in
/// `*answer` when the request has come back; until then it is the engine's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_status(
    engine: *mut Engine,
    disk: Disk,
    offset: u64,
    len: u64,
    answer: *mut Status,
    user: u64,
) -> c_int {
    let request = Request { disk, kind: IoKind::Status { depth: 0 }, offset, user };
    let work = |engine: &mut Engine| {
        is_place(answer)?;
        engine.disks.node(disk)?;
        // SAFETY: the caller lends the place.
        unsafe { answer.write(Status::default()) };
        let piece = RamPiece { base: answer.cast(), len: size_of::<Status>() };
        // SAFETY: the caller has promised that the place stays.
        let lent = unsafe { engine.lend([piece]) };
        engine.submit(request, len, lent)
    };
    // SAFETY: as this function's contract.
    unsafe { with(engine, work) }
}

struct Request {
    disk: Disk,
    kind: IoKind,
    offset: u64,
    user: u64,
}

impl Engine {
    #[inline]
    fn submit(&mut self, request: Request, len: u64, mem: impl Into<Mem>) -> Result<c_int, Errno> {
        let Request { disk, kind, offset, user } = request;
        let node = self.disks.node(disk)?;
        match self.engine.submit(node, Io { kind, offset, len }, mem, user) {
            Ok(()) => Ok(0),
            Err(refused_it) => {
                if let Mem::Ram(list) = refused_it.mem {
                    self.spare.push(list);
                }
                Err(refused(refused_it.why))
            }
        }
    }

    /// # Safety
    ///
    /// `count` of them can be read at `iov`, for the time of this call. What they lead to can be read
    /// and written until the request has come back.
    unsafe fn submit_lent(
        &mut self,
        request: Request,
        iov: *const iovec,
        count: usize,
    ) -> Result<c_int, Errno> {
        if count > COWBELL_IOV_MAX {
            return Err(Errno::INVALID);
        }
        let iov = if count == 0 {
            &[]
        } else {
            is_place(iov)?;
            // SAFETY: the caller lends the list, nobody changes it during this call, and it is not
            // NULL.
            unsafe { std::slice::from_raw_parts(iov, count) }
        };
        let mut len = 0_usize;
        for piece in iov.iter().filter(|piece| piece.iov_len > 0) {
            let is_memory = !piece.iov_base.is_null()
                && piece.iov_base.addr().checked_add(piece.iov_len).is_some();
            len = len.checked_add(piece.iov_len).ok_or(Errno::INVALID)?;
            if !is_memory || len as u64 > REQUEST_MAX {
                return Err(Errno::INVALID);
            }
        }
        let pieces =
            iov.iter().map(|piece| RamPiece { base: piece.iov_base.cast(), len: piece.iov_len });
        // SAFETY: as this function's contract.
        let lent = unsafe { self.lend(pieces) };
        self.submit(request, len as u64, lent)
    }

    /// A list that leads to `pieces`, one that came back if there is one.
    ///
    /// # Safety
    ///
    /// As for [`Ram::new`].
    unsafe fn lend(&mut self, pieces: impl IntoIterator<Item = RamPiece>) -> Ram {
        match self.spare.pop() {
            Some(mut list) => {
                // SAFETY: as this function's contract.
                unsafe { list.refill(pieces) };
                list
            }
            // SAFETY: as this function's contract.
            None => unsafe { Ram::new(pieces) },
        }
    }
}

fn only(flags: u32, known: u32) -> Result<(), Errno> {
    if flags & !known == 0 { Ok(()) } else { Err(Errno::INVALID) }
}

/// Why the engine did not take a request, as an error number.
pub(crate) fn refused(why: Why) -> Errno {
    match why {
        Why::Full => Errno::AGAIN,
        Why::Draining | Why::Closing => Errno(libc::ESHUTDOWN),
        Why::NoSuchNode => Errno(libc::EBADF),
        Why::Paused | Why::InUse => Errno(libc::EBUSY),
        Why::TooSmall | Why::TooLarge | Why::OutOfOrder => Errno::INVALID,
    }
}
