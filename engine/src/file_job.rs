//! An op that its file cannot take as it is, while it is taken apart: how far that is, as plain data.
//! What is done with it says `align.rs`.

use crate::op::Op;
use crate::units::{BufId, FileId};

/// An op being taken apart.
#[derive(Clone, Hash, Debug)]
pub(crate) struct Job {
    pub op: Op,
    pub file: FileId,
    /// Bytes of the op done.
    pub at: u64,
    /// A bounce buffer that it holds.
    pub buf: Option<BufId>,
    pub state: State,
}

impl Job {
    /// One that begins in `state`.
    pub fn new(file: FileId, op: Op, state: State) -> Job {
        Job { op, file, at: 0, buf: None, state }
    }

    /// Is it for an op on this file?
    pub fn is_on(&self, file: FileId) -> bool {
        self.file == file
    }
}

/// Named by what is awaited.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum State {
    /// The gate, which others have closed.
    Gate,
    /// Nothing is in flight on the file.
    Quiet,
    /// A range, given back to the file system.
    GiveBack,
    /// The same, of what the op would meet.
    GiveBackFirst,
    /// No other claim overlaps, and the gate is open.
    Claim,
    /// The op itself, once nothing stood in its way.
    Direct,
    /// No write in flight overlaps the claim.
    Quiesce,
    /// A bounce buffer.
    Chunk,
    /// The blocks that hold the next `len` bytes of a read.
    ReadChunk { len: u64 },
    /// The blocks at both ends of the next `len` bytes of a write.
    ReadEdges { len: u64 },
    /// The next `len` bytes.
    WriteChunk { len: u64 },
    /// The next `len` bytes, which the file zeroes by itself, if it can.
    ZeroWhole { len: u64 },
    /// The file's end put back: the last block reached past it.
    Trim,
    /// A flush: the file system has changed the block that the file's end cuts in memory.
    Settle,
}
