//! A copy of one node to another: how far it is, as plain data. What is done with it says `copy.rs`.

use crate::units::{Errno, JobId, NodeId, RegionId, Time};
use crate::wait::WaitList;

/// What a copy does about zeros.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Zeros {
    /// What the source says to be zeros is zeroed in the target, or skipped if that is zeros already.
    Told,
    /// So is data that turns out to be zeros when it has been read.
    Found,
    /// All is written as data, so that the target has space for it.
    Written,
}

/// What [`Engine::start`](crate::Engine::start) is to copy.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Copy {
    /// The disk that is read, with the layers below it.
    pub source: NodeId,
    /// The disk that is written.
    pub target: NodeId,
    /// Where in the source the copy begins, in bytes. Default: 0.
    pub source_offset: u64,
    /// Where in the target it goes, in bytes. Default: 0.
    pub target_offset: u64,
    /// How many bytes of the target are written; where the source ends before, the rest becomes zeros.
    /// `None`: all from `target_offset` on, which is no less than the source has. Default: `None`.
    pub len: Option<u64>,
    /// The target is known to read as zeros: what is zeros in the source is skipped, not written.
    /// Default: false.
    pub target_is_zero: bool,
    /// Only what the source's own layer says is copied. What it leaves to the layers below stays in the
    /// target as it is: for one that lies over the same disk as the source. Default: false.
    pub only_top: bool,
    /// What is written is compressed, where the target's format can: as
    /// [`IoKind::Write`](crate::step::IoKind::Write) says. For that units are whole clusters. Default: false.
    pub compressed: bool,
    /// What becomes of zeros. Default: [`Zeros::Told`].
    pub zeros: Zeros,
    /// Bytes in a unit: a power of two from 512 to the size of a piece; the nearest below is taken. The
    /// target is written, zeroed and skipped in whole units, counted from its first byte, but for the
    /// ends of what is copied. A unit is zeros if all of it is. Default: 512.
    pub unit: usize,
    /// What cannot be read becomes zeros, sector by sector, and the copy goes on; each time
    /// [`NodeEvent::JobError`](crate::NodeEvent::JobError) tells where. Default: false.
    pub salvage: bool,
    /// Pieces in flight at once: 1 to 64, the nearest is taken. Default: 8.
    pub in_flight: usize,
    /// Bytes in a piece: a multiple of 4096, up to 2 MiB; the nearest is taken. Default: 256 KiB.
    /// The job's memory is `in_flight` pieces, and a page for each.
    pub piece: usize,
    /// At most so many bytes a second are read; what is zeros costs nothing. `None`: no limit.
    /// Default: `None`.
    pub rate: Option<u64>,
}

impl Copy {
    /// Of `source` to `target`, with the defaults.
    pub fn new(source: NodeId, target: NodeId) -> Copy {
        Copy {
            source,
            target,
            source_offset: 0,
            target_offset: 0,
            len: None,
            target_is_zero: false,
            only_top: false,
            compressed: false,
            zeros: Zeros::Told,
            unit: UNIT_MIN,
            salvage: false,
            in_flight: 8,
            piece: 256 << 10,
            rate: None,
        }
    }

    /// Each number brought within its range.
    pub(crate) fn within_ranges(self) -> Copy {
        let piece = self.piece.clamp(PAGE as usize, 2 << 20) & !(PAGE as usize - 1);
        // A power of two, and below that.
        let unit = 1 << self.unit.clamp(UNIT_MIN, piece).ilog2();
        let piece = piece & !(unit - 1);
        let rate = self.rate.map(|rate| rate.max(1));
        Copy { in_flight: self.in_flight.clamp(1, 64), piece, unit, rate, ..self }
    }

    /// Where the unit ends that byte `at` of the copy lies in.
    pub(crate) fn unit_end(&self, at: u64) -> u64 {
        at + self.unit as u64 - ((self.target_offset + at) & (self.unit as u64 - 1))
    }

    /// The last place at or before `at` where a unit begins; 0 if that is before the copy.
    pub(crate) fn unit_floor(&self, at: u64) -> u64 {
        at.saturating_sub((self.target_offset + at) & (self.unit as u64 - 1))
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

/// Bytes in a sector: nothing smaller is told apart.
pub(crate) const SECTOR: u64 = 512;

const UNIT_MIN: usize = SECTOR as usize;

/// Bytes behind each piece's memory: what is where is answered into them.
pub(crate) const PAGE: u64 = 4096;

/// A copy that runs.
#[derive(Clone, Hash, Debug)]
pub(crate) struct CopyJob {
    pub id: JobId,
    pub copy: Copy,
    /// Memory of all pieces.
    pub region: RegionId,
    /// Bytes to copy, and how many of these the source has. Places in the job are counted from its
    /// own beginning.
    pub source_size: u64,
    pub total: u64,
    /// Where the next piece begins.
    pub next: u64,
    /// Workers that ask what is where: nobody begins a piece before they know.
    pub asking: u32,
    pub done: u64,
    /// Workers that have not ended.
    pub workers: u32,
    pub is_paused: bool,
    /// Why it ends early.
    pub failed: Option<Errno>,
    /// When the next piece may begin.
    pub due: Time,
    /// Workers that wait for that, or to be resumed.
    pub waiters: WaitList,
}

impl CopyJob {
    /// Is there nothing to do for zeros?
    pub fn skips_zeros(&self) -> bool {
        self.copy.target_is_zero && self.copy.zeros != Zeros::Written
    }

    /// When workers that wait are to be woken.
    pub fn deadline(&self) -> Option<Time> {
        // Who asks wakes the others.
        let waits = !self.waiters.is_empty() && !self.is_paused && self.asking == 0;
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
    /// What is left of its piece.
    pub at: u64,
    pub end: u64,
    /// What is known to be data ends here; beyond it nothing is known.
    pub data_end: u64,
    /// What has been read, from and to: it is at the start of the memory.
    pub held: (u64, u64),
    pub state: State,
}

impl Worker {
    /// Of this job, with memory from this byte of its region on.
    pub fn new(job: u32, memory: u32) -> Worker {
        Worker { job, memory, at: 0, end: 0, data_end: 0, held: (0, 0), state: State::Piece }
    }
}

/// Named by what is awaited.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum State {
    /// A piece to copy.
    Piece,
    /// What is where.
    Status,
    /// What is known to be data, in memory.
    Read,
    /// One sector of that, from this place on: all together could not be read.
    ReadSector { at: u64 },
    /// So many bytes, written to the target or zeroed there.
    Write { len: u64 },
    /// All that was written is stable.
    Flush,
}
