//! What this library is: its version, and what was compiled in.

use std::ffi::{CStr, c_char};

use cowbell_engine::sys::clock;
use cowbell_formats::Format;

use crate::handle::caught;

/// The version of what this header declares. It changes when a program that was compiled with an
/// older header would go wrong. Compare it with cowbell_abi_version() if the library is not linked
/// statically.
pub const COWBELL_ABI_VERSION: u32 = 1;

/// A feature: COWBELL_BACKEND_IO_URING is compiled in. (Whether the kernel has it,
/// cowbell_engine_create() tells.)
pub const COWBELL_FEATURE_IO_URING: u64 = 1;

/// The COWBELL_ABI_VERSION that the library was compiled with.
#[unsafe(no_mangle)]
pub extern "C" fn cowbell_abi_version() -> u32 {
    COWBELL_ABI_VERSION
}

/// The library's version, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn cowbell_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// What was compiled in: bits of COWBELL_FEATURE_*.
#[unsafe(no_mangle)]
pub extern "C" fn cowbell_features() -> u64 {
    if cfg!(feature = "io_uring") { COWBELL_FEATURE_IO_URING } else { 0 }
}

/// The name of the format with this number, counted from 0, as cowbell_image_options takes it; NULL
/// if there are no more.
#[unsafe(no_mangle)]
pub extern "C" fn cowbell_format(number: usize) -> *const c_char {
    Format::ALL.get(number).map_or(std::ptr::null(), |&format| name_of(format).as_ptr())
}

/// The time now, in nanoseconds: CLOCK_MONOTONIC, as cowbell_next_deadline() counts.
#[unsafe(no_mangle)]
pub extern "C" fn cowbell_clock() -> u64 {
    caught(|| clock().0).unwrap_or(0)
}

pub(crate) fn name_of(format: Format) -> &'static CStr {
    match format {
        Format::Raw => c"raw",
        Format::Qed => c"qed",
        Format::Qcow2 => c"qcow2",
        Format::Vmdk => c"vmdk",
        Format::Vdi => c"vdi",
    }
}
