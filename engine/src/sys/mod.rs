//! What touches the operating system, and all unsafe code of the workspace but the C ABI's.
//!
//! [`disk`] opens files. The backends over them: [`aio`] for files opened with O_DIRECT, `uring` (a
//! feature, `io_uring`) for all, [`pool`] for everything that may block, [`inline`] for programs that
//! may wait, [`null`] for measuring.
//!
//! The kernel and the pool's threads write into memory by address while an op is in flight. What
//! makes that sound is the contract of [`crate::backend`]: that memory stays until the op has come
//! back. Whoever owns a backend and the memory together drops the backend first; dropping it waits
//! for what is in flight.
//!
//! # System calls
//!
//! For a program that filters its own (seccomp(2)). What the standard library and the C library call for
//! threads, memory and locks is included; what an embedder's own loop does is not.
//!
//! | when | calls |
//! |---|---|
//! | a file is opened, locked, looked at | `openat` `statx` `fstat` `newfstatat` `fcntl` `lseek` `fstatfs` `ioctl` `readlink` `pread64` `pwrite64` `fdatasync` `ftruncate` `fallocate` `close` `getrandom` |
//! | a backend is made | `eventfd2` `mmap` `munmap` `io_setup` (native AIO) `io_uring_setup` `io_uring_register` (io_uring) `epoll_create1` `epoll_ctl` ([two backends as one](crate::both), [a loop](crate::event_loop)) |
//! | a thread is started: then, or later ([`PoolOptions::up_front`](pool::PoolOptions::up_front)) | `clone3` `clone` `mmap` `munmap` `mprotect` `rt_sigprocmask` `set_robust_list` `rseq` `sigaltstack` `getpriority` `setpriority` `prctl` `gettid` `sched_getaffinity` `madvise` `exit` |
//! | the loop's thread, running | `io_submit` `io_getevents` `io_uring_enter` `read` `write` (event descriptors) `futex` `clock_gettime` (mostly without a call), and of the heap `brk` `mmap` `munmap` `mremap` |
//! | the pool's threads, running | `pread64` `preadv` `preadv2` `pwrite64` `pwritev` `pwritev2` `fdatasync` `ftruncate` `fallocate` `lseek` `copy_file_range` `ioctl` `write` `futex`; `io_submit` (lanes) |
//! | a backend is dropped | `io_destroy` `close` `munmap` `futex`, and a thread for `io_destroy` if one can be started |

#![allow(unsafe_code)]

pub mod aio;
pub mod disk;
mod files;
pub mod inline;
mod iocb;
mod job;
mod lane;
pub mod lock;
pub mod null;
pub(crate) mod pages;
pub mod pool;
pub mod ram;
mod regions;
pub(crate) mod syscalls;
#[cfg(feature = "io_uring")]
pub mod uring;

use std::hash::{BuildHasher, RandomState};

use crate::units::Time;

/// Random bits, other ones each time: the kernel's. Where it gives none (a filter of system calls
/// forbids it), what the standard library seeds its hash tables with, and the time.
pub fn random() -> u32 {
    match syscalls::getrandom() {
        Ok(bytes) => u32::from_le_bytes(bytes),
        Err(_) => RandomState::new().hash_one((clock().0, std::process::id())) as u32,
    }
}

/// The monotonic clock, in nanoseconds since the machine started.
///
/// Read twice in every `run`: the system's own call, without the detour over a duration.
#[inline]
pub fn clock() -> Time {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a timespec to be written; CLOCK_MONOTONIC exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    Time((now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64))
}
