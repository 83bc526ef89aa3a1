//! The engine's handle, and the border that no panic crosses.

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{self, ThreadId};

use cowbell_engine::sys::ram::Ram;
use cowbell_engine::units::Errno;
use cowbell_formats::Node;

use crate::backend::Chosen;
use crate::closer::Closer;
use crate::disk::Disks;

/// An engine: see cowbell_engine_create().
pub struct Engine {
    /// First, so that it is dropped first.
    pub(crate) engine: cowbell_engine::Engine<Node, Chosen>,
    pub(crate) disks: Disks,
    /// Scatter lists that came back: the next requests go out in them.
    pub(crate) spare: Vec<Ram>,
    pub(crate) spare_max: usize,
    pub(crate) closer: Closer,
    /// The only thread that may use it; `None`: one after the other.
    thread: Option<ThreadId>,
    /// Something panicked: nobody knows what state it is in.
    is_poisoned: bool,
}

// One thread after the other may use an engine over these.
const fn assert_send<T: Send>() {}
const _: () = {
    assert_send::<cowbell_engine::Engine<Node, cowbell_engine::sys::aio::Aio>>();
    assert_send::<cowbell_engine::Engine<Node, cowbell_engine::sys::pool::Pool>>();
    assert_send::<(Disks, Vec<Ram>, Closer)>();
};

impl Engine {
    pub(crate) fn new(backend: Chosen, limits: cowbell_engine::Limits) -> Engine {
        let thread = backend.thread;
        Engine {
            engine: cowbell_engine::Engine::new(backend, limits),
            disks: Disks::default(),
            spare: Vec::with_capacity(limits.requests),
            spare_max: limits.requests,
            closer: Closer::default(),
            thread,
            is_poisoned: false,
        }
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.engine.fmt(f)
    }
}

/// A panic was caught, now or before.
pub(crate) const POISONED: Errno = Errno(libc::ENOTRECOVERABLE);

/// As C is answered: an error number below 0.
pub(crate) fn code<T: From<c_int>>(errno: Errno) -> T {
    // 0 and numbers below would be taken for success.
    T::from(if errno.0 > 0 { -errno.0 } else { -libc::EIO })
}

/// Runs `work`, and answers `None` if it panics.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Option<T> {
    // What `work` leaves behind is poisoned by the caller, or is nobody's.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(answer) => Some(answer),
        Err(payload) => {
            // Dropping it could panic again.
            std::mem::forget(payload);
            None
        }
    }
}

/// The same, for functions without an engine.
pub(crate) fn answered<T: From<c_int>>(work: impl FnOnce() -> Result<T, Errno>) -> T {
    match caught(work) {
        Some(Ok(answer)) => answer,
        Some(Err(errno)) => code(errno),
        None => code(POISONED),
    }
}

/// May this thread use the engine?
///
/// # Safety
///
/// As for [`with`], but for the thread.
pub(crate) unsafe fn is_usable(engine: *const Engine) -> Result<(), Errno> {
    if engine.is_null() || !engine.is_aligned() {
        return Err(Errno::INVALID);
    }
    // SAFETY: it is a live engine, whose thread never changes: no other is written to meanwhile.
    match unsafe { (*engine).thread } {
        Some(owner) if owner != thread::current().id() => Err(Errno(libc::EACCES)),
        _ => Ok(()),
    }
}

/// Every function on an engine goes through here. After a panic the engine is poisoned.
///
/// # Safety
///
/// `engine` is NULL, or was made by `cowbell_engine_create` and not destroyed; no other thread is in
/// a function with it.
pub(crate) unsafe fn with<T: From<c_int>>(
    engine: *mut Engine,
    work: impl FnOnce(&mut Engine) -> Result<T, Errno>,
) -> T {
    // SAFETY: as this function's contract.
    if let Err(errno) = unsafe { is_usable(engine) } {
        return code(errno);
    }
    // SAFETY: it is a live engine of this thread's, and nobody calls back into C from in here.
    let engine = unsafe { &mut *engine };
    if engine.is_poisoned {
        return code(POISONED);
    }
    match caught(|| work(engine)) {
        Some(Ok(answer)) => answer,
        Some(Err(errno)) => code(errno),
        None => {
            engine.is_poisoned = true;
            code(POISONED)
        }
    }
}

/// Can a `T` be written there, as far as the address tells?
pub(crate) fn is_place<T>(at: *const T) -> Result<(), Errno> {
    if at.is_null() || !at.is_aligned() { Err(Errno::INVALID) } else { Ok(()) }
}

/// Copies a struct that may have grown since its caller was compiled: `size` bytes of it are the
/// caller's. Fields that he does not have are 0. Fields that we do not have must be 0 (E2BIG).
///
/// # Safety
///
/// `size` bytes at `from` can be read; any bytes are a `T`.
pub(crate) unsafe fn copied<T: Default>(from: *const T, size: usize) -> Result<T, Errno> {
    let mut ours = T::default();
    let known = size.min(size_of::<T>());
    let from = from.cast::<u8>();
    // SAFETY: the bytes beyond what we know are the caller's, by his word.
    let more = (known..size).map(|at| unsafe { from.add(at).read() });
    if size > STRUCT_MAX || more.into_iter().any(|byte| byte != 0) {
        return Err(Errno(libc::E2BIG));
    }
    // SAFETY: both have that many bytes, and `T` may be any.
    unsafe { from.copy_to_nonoverlapping((&raw mut ours).cast::<u8>(), known) };
    Ok(ours)
}

/// No struct will grow beyond this many bytes: a size above it is a mistake.
pub(crate) const STRUCT_MAX: usize = 4096;
