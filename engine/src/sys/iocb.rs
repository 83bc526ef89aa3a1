//! The kernel's control block for native AIO, as the loop and the lanes fill it in.

use std::os::fd::RawFd;

use crate::op::OpKind;
use crate::sys::job::Job;
use crate::units::Errno;

/// Which context; also the address of its ring.
pub(super) type ContextId = libc::c_ulong;

/// `io_submit`, or what a test has in its place.
pub(super) type Submit = unsafe fn(ContextId, &[*mut Iocb]) -> Result<usize, Errno>;

/// The kernel's control block (`struct iocb`).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Iocb {
    pub(super) data: u64,
    #[cfg(target_endian = "little")]
    pub(super) key: u32,
    pub(super) rw_flags: i32,
    #[cfg(target_endian = "big")]
    pub(super) key: u32,
    pub(super) opcode: u16,
    pub(super) priority: i16,
    pub(super) fd: u32,
    pub(super) buf: u64,
    pub(super) count: u64,
    pub(super) offset: i64,
    pub(super) reserved: u64,
    pub(super) flags: u32,
    pub(super) resfd: u32,
}

impl Iocb {
    /// A read or write that may wait, signalled to `event`; its list is the job's.
    pub(super) fn of(job: &Job, event: RawFd) -> Iocb {
        let (opcode, rw_flags) = match job.kind {
            OpKind::Write { fua: true } => (PWRITEV, libc::RWF_DSYNC),
            OpKind::Write { fua: false } => (PWRITEV, 0),
            _ => (PREADV, 0),
        };
        Iocb {
            data: FROM_LANE | u64::from(job.op.0),
            rw_flags,
            opcode,
            fd: job.file.fd as u32,
            buf: job.pieces.as_ptr().expose_provenance() as u64,
            count: job.pieces.len() as u64,
            offset: job.offset as i64,
            flags: FLAG_RESFD,
            resfd: event as u32,
            ..Iocb::ZERO
        }
    }

    pub(super) const ZERO: Iocb = Iocb {
        data: 0,
        key: 0,
        rw_flags: 0,
        opcode: 0,
        priority: 0,
        fd: 0,
        buf: 0,
        count: 0,
        offset: 0,
        reserved: 0,
        flags: 0,
        resfd: 0,
    };
}

const _: () = assert!(size_of::<Iocb>() == 64);

/// Of the data of a control block, beside the op's id.
pub(super) const FROM_LANE: u64 = 1 << 32;

pub(super) const PREAD: u16 = 0;
pub(super) const PWRITE: u16 = 1;
pub(super) const FDSYNC: u16 = 3;
pub(super) const PREADV: u16 = 7;
pub(super) const PWRITEV: u16 = 8;
pub(super) const FLAG_RESFD: u32 = 1;
