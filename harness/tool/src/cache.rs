//! Cache modes and ways to do I/O, by QEMU's names.

use crate::fail::Fail;

/// What a cache mode means for us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cache {
    /// Past the page cache (O_DIRECT).
    pub direct: bool,
    /// A write has finished only when it is stable.
    pub fua: bool,
    /// Flushes do nothing.
    pub no_flush: bool,
}

impl Cache {
    /// In the page cache until flushed.
    pub const WRITEBACK: Cache = Cache { direct: false, fua: false, no_flush: false };
    /// In the page cache, and stable at once.
    pub const WRITETHROUGH: Cache = Cache { fua: true, ..Cache::WRITEBACK };
    /// Past the page cache, stable when flushed.
    pub const NONE: Cache = Cache { direct: true, ..Cache::WRITEBACK };

    /// The mode of this name.
    pub fn named(name: &str) -> Option<Cache> {
        Some(match name {
            "none" | "off" => Cache::NONE,
            "writeback" => Cache::WRITEBACK,
            "writethrough" => Cache::WRITETHROUGH,
            "directsync" => Cache { direct: true, fua: true, no_flush: false },
            "unsafe" => Cache { no_flush: true, ..Cache::WRITEBACK },
            _ => return None,
        })
    }
}

/// Looks only at whether there is such a mode: for verbs that read through the page cache whatever
/// the mode.
pub fn check_source_cache(name: Option<&str>) -> Result<(), Fail> {
    match name {
        Some(name) if Cache::named(name).is_none() => {
            Err(Fail::other(format!("Invalid source cache option: {name}")))
        }
        _ => Ok(()),
    }
}

/// Who does the I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// The kernel's native AIO.
    Native,
    /// The kernel's io_uring; where there is none, a pool of threads.
    #[cfg(feature = "io_uring")]
    IoUring,
    /// A pool of threads.
    Threads,
}

impl How {
    /// By this name, as QEMU has them. A build without io_uring does not know that one.
    pub fn named(name: &str) -> Option<How> {
        match name {
            #[cfg(feature = "io_uring")]
            "io_uring" => Some(How::IoUring),
            "native" => Some(How::Native),
            "threads" => Some(How::Threads),
            _ => None,
        }
    }
}
