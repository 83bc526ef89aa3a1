//! A copy of one node to another: how far it is, as plain data. What is done with it says `copy.rs`.

use crate::units::{Errno, JobId, NodeId, RegionId, Time};
use crate::wait::WaitList;

/// What [`Engine::start`](crate::Engine::start) is to copy.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Copy {
    /// The disk that is read, with the layers below it.
    pub source: NodeId,
    /// The disk that is written. Where it is longer than the source, the rest becomes zeros.
    pub target: NodeId,
    /// The target is known to read as zeros: what is zeros in the source is skipped, not written.
    /// Default: false.
    pub target_is_zero: bool,
    /// Pieces in flight at once: 1 to 64, the nearest is taken. Default: 8.
    pub in_flight: usize,
    /// Bytes in a piece: a multiple of 4096, up to 1 MiB; the nearest is taken. Default: 256 KiB.
    /// The job's memory is `in_flight` pieces, and a page for each.
    pub piece: usize,
    /// At most so many bytes a second are copied; what is known to be zeros does not count. `None`: no
    /// limit. Default: `None`.
    pub rate: Option<u64>,
}

impl Copy {
    /// Of `source` to `target`, with the defaults.
    pub fn new(source: NodeId, target: NodeId) -> Copy {
        let (in_flight, piece) = (8, 256 << 10);
        Copy { source, target, target_is_zero: false, in_flight, piece, rate: None }
    }

    /// Each number brought within its range.
    pub(crate) fn within_ranges(self) -> Copy {
        let piece = self.piece.clamp(PAGE as usize, 1 << 20) & !(PAGE as usize - 1);
        let rate = self.rate.map(|rate| rate.max(1));
        Copy { in_flight: self.in_flight.clamp(1, 64), piece, rate, ..self }
    }
}

/// How far a job is, in bytes of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JobProgress {
    /// Copied, skipped or zeroed.
    pub done: u64,
    /// In all.
    pub total: u64,
}

/// Bytes behind each piece's memory: what is where is answered into them.
pub(crate) const PAGE: u64 = 4096;

/// A copy that runs.
#[derive(Clone, Hash, Debug)]
pub(crate) struct CopyJob {
    pub id: JobId,
    pub copy: Copy,
    /// Memory of all pieces.
    pub region: RegionId,
    /// Sizes of both disks.
    pub source_size: u64,
    pub total: u64,
    /// Where the next piece begins.
    pub next: u64,
    /// What is there.
    pub seen: Seen,
    /// Is a worker asking?
    pub is_asking: bool,
    pub done: u64,
    /// Workers that have not ended.
    pub workers: u32,
    pub is_paused: bool,
    /// Why it ends early.
    pub failed: Option<Errno>,
    /// When the next piece may be read.
    pub due: Time,
    /// Workers that wait for that, to be resumed, or for the one that asks.
    pub waiters: WaitList,
}

/// What is known of the disk from the next piece on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Seen {
    /// Nothing.
    Nothing,
    /// Bytes up to here that are to be read.
    Data { end: u64 },
    /// Zeros up to here.
    Zeros { end: u64 },
}

impl CopyJob {
    /// When workers that wait are to be woken.
    pub fn deadline(&self) -> Option<Time> {
        // Who asks wakes the others.
        let waits = !self.waiters.is_empty() && !self.is_paused && !self.is_asking;
        waits.then_some(self.due)
    }
}

/// Who copies one piece after the other.
#[derive(Clone, Copy, Hash, Debug)]
pub(crate) struct Worker {
    /// The key of its job.
    pub job: u32,
    /// Where its memory begins in the job's region.
    pub memory: u32,
    /// Where its piece begins.
    pub at: u64,
    pub state: State,
}

/// Named by what is awaited.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum State {
    /// A piece to copy.
    Piece,
    /// What is at the next piece, from `at` on.
    Status { at: u64, asked: u64 },
    /// So many bytes of the source.
    Read { len: u64 },
    /// So many bytes, written to the target or zeroed there.
    Write { len: u64 },
    /// All that was written is stable.
    Flush,
}
