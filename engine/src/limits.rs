//! How much of everything an engine may have.

use std::time::Duration;

/// How much of everything the engine may have at once. All of it is reserved when the engine is
/// made; every queue's bound follows from these. Each has a least value, given below; with those
/// the engine is slow but does everything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Guest requests from `submit` to `poll`; one more is refused with [`Why::Full`](crate::Why::Full). At least 1.
    pub requests: usize,
    /// Ops in flight or waiting for the backend: what requests of many pieces are cut to. At
    /// least 4. (Each request has room for one op besides.)
    pub ops: usize,
    /// Buffers for drivers (copy-on-write, table writes). At least 2. Of these, two are kept for each
    /// disk of the engine that has fewer, as far as they go; of 8 and more, two for one more disk.
    pub buffers: usize,
    /// Buffers for unaligned requests. At least 1. One is kept for each disk that has none, as far as
    /// they go; of 4 and more, one for one more disk.
    pub bounce_buffers: usize,
    /// Bytes in each buffer: a power of two, at least 4096.
    pub buffer_size: usize,
    /// Zeros are written as such up to this many bytes; for more the file is asked, under its lock.
    pub zeros_written: u64,
    /// Discarded ranges of each file that are kept to be given back later, together; with 0 each is at
    /// once.
    pub discards_kept: usize,
    /// Events delivered in one `run`, about: what is ready then waits for the next, and
    /// [`Progress::again`](crate::Progress::again) says so. Whatever happens, `run` returns. At least 1.
    pub steps: usize,
    /// How long one `run` may hold its caller, about: what is left then waits for the next, and
    /// [`Progress::again`](crate::Progress::again) says so. Looked at after every 32 events and after every few
    /// ops handed to the backend, as many as take a quarter of it; some of each are always done. By the
    /// backend's clock.
    pub turn: Duration,
    /// Keep [`Stats`](crate::stats::Stats). A simulation, which copies engines by the million, does without.
    pub measure: bool,
}

/// What a disk takes, and takes best: for a device's configuration, or an export's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeLimits {
    /// The virtual size in bytes.
    pub size: u64,
    /// It can be written. If not, what would change it fails with EROFS.
    pub is_writable: bool,
    /// The longest read or write, in bytes. Zeros and discards may be as long as the disk.
    pub request_max: u64,
    /// Offsets and lengths in multiples of this many bytes, a power of two, need no detour through
    /// other memory and no reading before writing; the same of the layers below. Others are taken too.
    pub request_align: u32,
    /// So do addresses of memory.
    pub memory_align: u32,
    /// Writes of whole units of this many bytes, a power of two, at multiples of it are the best: no
    /// bytes around them are copied. Whole units that are discarded give space back.
    pub unit: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            requests: 256,
            ops: 1024,
            buffers: 64,
            bounce_buffers: 16,
            buffer_size: 64 << 10,
            zeros_written: 64 << 10,
            discards_kept: 1024,
            steps: 16 << 10,
            turn: Duration::from_micros(500),
            measure: true,
        }
    }
}
