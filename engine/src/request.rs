//! The ground floor: what a request wants, what its state is told, and what that answers.

use crate::units::{Errno, FileId};

/// The largest read or write, in bytes.
pub const REQUEST_MAX: u64 = 1 << 31;

/// What a request wants of a node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum IoKind {
    /// Fill the request's memory.
    Read,
    /// Write the request's memory.
    Write {
        /// Finish only when it is stable.
        fua: bool,
        /// Compress it, where the format can: what covers whole clusters, and becomes smaller. Else as
        /// any other write. It reads the same.
        compressed: bool,
    },
    /// Make every write that had finished before this request was submitted stable.
    Flush,
    /// Make the range read as zeros.
    Zero {
        /// Space may be given back.
        unmap: bool,
        /// Finish only when it is stable.
        fua: bool,
    },
    /// The range's contents are no longer needed. Whole clusters read as zeros afterwards where
    /// the format can say so; in a raw image the bytes become zeros or stay, as the file system
    /// likes. Bytes outside the range keep their contents.
    Discard,
    /// Set the virtual size to `offset`, a multiple of 512; what it gains reads as zeros. Not every
    /// format can shrink, and some disks cannot change. Requests in flight beyond the smaller size
    /// may fail, or undo it: wait for them first.
    Truncate,
    /// Say what is at `offset`, and for how many of the `len` bytes from there: the request's memory,
    /// of [`Status::BYTES`](crate::status::Status::BYTES), is filled with a
    /// [`Status`](crate::status::Status).
    Status {
        /// Layers above the one that is asked.
        depth: u8,
    },
}

impl IoKind {
    /// Does it change what the disk holds? A change of the size does not count.
    pub fn modifies(&self) -> bool {
        matches!(self, IoKind::Write { .. } | IoKind::Zero { .. } | IoKind::Discard)
    }
}

/// A request as the driver sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Io {
    /// What.
    pub kind: IoKind,
    /// First byte, as the guest counts.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Io {
    /// Read `len` bytes at `offset`.
    pub fn read(offset: u64, len: u64) -> Io {
        Io { kind: IoKind::Read, offset, len }
    }

    /// Write `len` bytes at `offset`.
    pub fn write(offset: u64, len: u64) -> Io {
        Io { kind: IoKind::Write { fua: false, compressed: false }, offset, len }
    }

    /// Write `len` bytes at `offset`, compressed where the format can.
    pub fn write_compressed(offset: u64, len: u64) -> Io {
        Io { kind: IoKind::Write { fua: false, compressed: true }, offset, len }
    }

    /// Make `len` bytes at `offset` zeros; `unmap`: space may be given back.
    pub fn zero(offset: u64, len: u64, unmap: bool) -> Io {
        Io { kind: IoKind::Zero { unmap, fua: false }, offset, len }
    }

    /// What `len` bytes at `offset` hold is no longer needed.
    pub fn discard(offset: u64, len: u64) -> Io {
        Io { kind: IoKind::Discard, offset, len }
    }

    /// Make the disk `size` bytes long.
    pub fn truncate(size: u64) -> Io {
        Io { kind: IoKind::Truncate, offset: size, len: 0 }
    }

    /// The same, but finished only when it is stable: of a write or a zero write.
    #[must_use]
    pub fn stable(self) -> Io {
        let kind = match self.kind {
            IoKind::Write { compressed, .. } => IoKind::Write { fua: true, compressed },
            IoKind::Zero { unmap, .. } => IoKind::Zero { unmap, fua: true },
            kind => kind,
        };
        Io { kind, ..self }
    }

    /// Flush.
    pub fn flush() -> Io {
        Io { kind: IoKind::Flush, offset: 0, len: 0 }
    }

    /// What is at `offset`, and for how many of `len` bytes?
    pub fn status(offset: u64, len: u64) -> Io {
        Io { kind: IoKind::Status { depth: 0 }, offset, len }
    }

    /// One past the last byte.
    #[inline]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// What a state is told. Each event is delivered once, to one state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Event {
    /// The first step of a chore, or the step after [`Step::Go`].
    Start,
    /// All ops of the step before have come back; the first error, if any failed.
    Io(Result<(), Errno>),
    /// Somebody woke the list this request was parked on. Nothing is promised about what was
    /// waited for: look again.
    Woken,
}

/// What a state answers.
#[must_use]
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Step<S> {
    /// Wait for what this step issued, or for the list it parked on, in this state.
    Wait(S),
    /// Go on in this state at once.
    Go(S),
    /// What this step issued is all that is left to do: its result is the request's.
    Last {
        /// What that is called in the statistics, as by [`Driver::label`](crate::step::Driver::label).
        label: u8,
    },
    /// The request has ended.
    Done(Result<(), Errno>),
}

impl<S> Step<S> {
    /// The same answer, of a state that holds this one.
    #[inline(always)]
    pub fn map<T>(self, wrap: impl FnOnce(S) -> T) -> Step<T> {
        match self {
            Step::Wait(state) => Step::Wait(wrap(state)),
            Step::Go(state) => Step::Go(wrap(state)),
            Step::Last { label } => Step::Last { label },
            Step::Done(result) => Step::Done(result),
        }
    }
}

/// Where all bytes of a request are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pass {
    /// The file.
    pub file: FileId,
    /// The first byte's offset in it.
    pub offset: u64,
    /// What waiting for them is called in the statistics, as by [`Driver::label`](crate::step::Driver::label).
    pub label: u8,
}

/// Work that nobody submitted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Chore {
    /// The time that [`Driver::deadline`](crate::step::Driver::deadline) named has come.
    Deadline,
    /// The node is being drained or closed, nothing of it is in flight: leave the image clean.
    Settle,
    /// A step asked for it with [`Cx::ask`](crate::step::Cx::ask).
    Asked,
}
