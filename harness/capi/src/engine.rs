//! Engines: to make one, to run it, and to hear what has finished.

use std::ffi::c_int;
use std::time::Duration;

use cowbell_engine::Limits;
use cowbell_engine::backend::Backend;
use cowbell_engine::mem::Mem;
use cowbell_engine::units::Errno;

use crate::backend::Chosen;
use crate::handle::{Engine, answered, code, copied, is_place, is_usable, with};

/// Linux native AIO for files opened with COWBELL_OPEN_DIRECT, threads for all others.
pub const COWBELL_BACKEND_NATIVE: u32 = 0;
/// Linux io_uring for all files. Such an engine is used only by the thread that made it; others are
/// answered -EACCES.
pub const COWBELL_BACKEND_IO_URING: u32 = 1;
/// Threads for all files.
pub const COWBELL_BACKEND_THREADS: u32 = 2;

/// How an engine is made. Set all of it to 0, then `size`, then what you want: 0 is the default.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineOptions {
    /// sizeof(struct cowbell_engine_options).
    pub size: usize,
    /// COWBELL_BACKEND_*.
    pub backend: u32,
    /// The most requests at a time, of all disks; one more is refused with -EAGAIN. At most 16384;
    /// 256 by default.
    pub requests: u32,
    /// The most operations that the kernel has at a time, or the most threads of
    /// COWBELL_BACKEND_THREADS. At most 4096; 128 by default, 16 threads.
    pub depth: u32,
    /// How long one cowbell_run() may hold its caller, about, in microseconds. At most a second;
    /// 500 by default.
    pub turn_us: u32,
}

/// A request that has ended.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// What it was submitted with.
    pub user: u64,
    /// 0, or a negative error number. -EINVAL: the range does not fit the disk; -EROFS, -EPERM and
    /// -EOPNOTSUPP: the image does not take it; others as the kernel said. After an error any part of
    /// the range may have been read or written.
    pub result: i32,
    /// 0.
    pub reserved: u32,
}

/// Makes an engine, and puts it into `*engine` (NULL after an error). `options` may be NULL. All its
/// memory is taken here, tables of images apart.
///
/// -EOPNOTSUPP: no io_uring was compiled in; -ENOSYS, -EPERM: the kernel has none, or forbids it;
/// -EAGAIN: the machine's native AIO is used up (fs.aio-max-nr).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_engine_create(
    options: *const EngineOptions,
    engine: *mut *mut Engine,
) -> c_int {
    answered(|| {
        is_place(engine)?;
        // SAFETY: the caller lends the place.
        unsafe { engine.write(std::ptr::null_mut()) };
        let asked = if options.is_null() {
            EngineOptions { size: size_of::<EngineOptions>(), ..EngineOptions::default() }
        } else {
            is_place(options)?;
            // SAFETY: options begin with their size, and have that many bytes; any bytes are options.
            unsafe { copied(options, (&raw const (*options).size).read()) }?
        };
        let made = Box::new(make(&asked)?);
        // SAFETY: the place was looked at.
        unsafe { engine.write(Box::into_raw(made)) };
        Ok(0)
    })
}

fn make(asked: &EngineOptions) -> Result<Engine, Errno> {
    let is_in_range = asked.requests <= 16_384 && asked.depth <= 4096 && asked.turn_us <= 1_000_000;
    if asked.size < size_of::<usize>() || !is_in_range {
        return Err(Errno::INVALID);
    }
    let mut limits = Limits::default();
    if asked.requests > 0 {
        limits.requests = asked.requests as usize;
        limits.ops = limits.ops.max(limits.requests * 4);
    }
    if asked.turn_us > 0 {
        limits.turn = Duration::from_micros(asked.turn_us.into());
    }
    Ok(Engine::new(Chosen::new(asked.backend, asked.depth as usize)?, limits))
}

/// Ends an engine. Afterwards all memory that was lent to it is the caller's again. It waits for the
/// operations in flight and for files to be closed, and begins nothing more: requests that had not
/// ended are left as a crash would leave them, and their completions are lost. So drain it before,
/// with cowbell_drain(). NULL is no mistake.
///
/// Answers 0; -EACCES: it is another thread's, and still there; -ENOTRECOVERABLE: something panicked
/// in the end, and the memory that was lent is not to be used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_engine_destroy(engine: *mut Engine) -> c_int {
    if engine.is_null() {
        return 0;
    }
    // SAFETY: as this function's contract.
    if let Err(errno) = unsafe { is_usable(engine) } {
        return code(errno);
    }
    answered(|| {
        // SAFETY: it came out of a box, and is not used again. (A poisoned one is ended too: its
        // backend knows what the kernel and its threads still have.)
        drop(unsafe { Box::from_raw(engine) });
        Ok(0)
    })
}

/// A descriptor that is readable when cowbell_run() has something to collect, until it has: add it to
/// your epoll, by levels or by edges, and never read it. It is the same one for as long as the engine
/// lives, and the engine's: do not close it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_fd(engine: *mut Engine) -> c_int {
    use std::os::fd::AsRawFd;
    // SAFETY: as this function's contract.
    unsafe {
        with(engine, |engine| {
            engine.engine.fd().map(|fd| fd.as_raw_fd()).ok_or(Errno::NOT_SUPPORTED)
        })
    }
}

/// When cowbell_run() must be called although the descriptor is not readable: nanoseconds, as
/// cowbell_clock() counts. -1: never. Other negative numbers are errors. May change in every
/// cowbell_run(). Being late leaves images marked as in use for longer, no more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_next_deadline(engine: *mut Engine) -> i64 {
    // SAFETY: as this function's contract.
    unsafe {
        with(engine, |engine| {
            let next = engine.engine.next_deadline();
            Ok(next.map_or(-1, |time| i64::try_from(time.0).unwrap_or(i64::MAX)))
        })
    }
}

/// Collects what has come back, goes on with requests, and hands their operations to the kernel. It
/// never waits. To call it without need is harmless.
///
/// Answers 0; 1: call it again before you wait, for nothing will wake you for what is left; or a
/// negative error number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_run(engine: *mut Engine) -> c_int {
    // SAFETY: as this function's contract.
    unsafe {
        with(engine, |engine| {
            let now = engine.engine.backend().clock();
            Ok(c_int::from(engine.engine.run(now).again))
        })
    }
}

/// Puts requests that have ended into `completions`, oldest first, `max` at most, and answers how many
/// (or a negative error number). Their memory is yours again. If it is `max`, there may be more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_poll(
    engine: *mut Engine,
    completions: *mut Completion,
    max: usize,
) -> c_int {
    let work = |engine: &mut Engine| {
        if max > 0 {
            is_place(completions)?;
        }
        let mut count = 0;
        while count < max.min(c_int::MAX as usize)
            && let Some(done) = engine.engine.poll()
        {
            let result = done.result.map_or_else(code, |()| 0);
            let completion = Completion { user: done.tag, result, reserved: 0 };
            // SAFETY: the caller lends `max` of them.
            unsafe { completions.add(count).write(completion) };
            count += 1;
            if let Mem::Ram(list) = done.mem
                && engine.spare.len() < engine.spare_max
            {
                engine.spare.push(list);
            }
        }
        Ok(count as c_int)
    };
    // SAFETY: as this function's contract.
    unsafe { with(engine, work) }
}

/// Begins to end everything: no more requests are taken (-ESHUTDOWN), those in flight run to their
/// end, every image is left clean and stable. Go on as ever, with cowbell_run() and cowbell_poll(),
/// until cowbell_drained() does not answer 0; call cowbell_run() before you wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_drain(engine: *mut Engine) -> c_int {
    // SAFETY: as this function's contract.
    unsafe {
        with(engine, |engine| {
            engine.engine.drain();
            Ok(0)
        })
    }
}

/// Since cowbell_drain(): 0, not yet; 1, everything has ended and every image is clean and stable;
/// or a negative error number, the first that kept an image from that, -EIO also if an image was found
/// corrupt. There may be completions to poll. The next request opens the engine again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_drained(engine: *mut Engine) -> c_int {
    // SAFETY: as this function's contract.
    unsafe {
        with(engine, |engine| match engine.engine.drained() {
            None => Ok(0),
            Some(Ok(())) => Ok(1),
            Some(Err(errno)) => Err(errno),
        })
    }
}
