//! The backend: whoever does ops. A disk through native AIO, a thread pool, a simulated disk.
//!
//! # The contract
//! 1. Every op taken from [`Submission`] comes back exactly once from [`Backend::harvest`], never
//!    from inside [`Backend::submit`], in any order. An op that could not even be started comes
//!    back too, with its error: there is one error path.
//! 2. `submit` takes ops from the front until none is offered or the device takes no more. The engine
//!    offers a few at a time, to look at the clock between ([`Limits::turn`](crate::Limits::turn)). What
//!    is left is offered again at the next `run`; [`Backend::wants_retry`] tells whether that
//!    must happen without a completion to wake the loop.
//! 3. A read or write answers the number of bytes it moved. Fewer than asked is legal (the engine
//!    asks for the rest, or finds the end of the file); 0 from a read is the end of the file.
//!    Every other op answers 0, but for [`Hole`](crate::op::Hole).
//!    A [`Compute`](crate::op::Compute) answers what it was answered, from wherever it may take its
//!    time: never inside `submit` or `harvest` of a backend that is for loops.
//! 4. A flush covers every write that was *harvested* before the flush was *submitted*. No order
//!    holds between any other two ops in flight.
//! 5. The memory an op names stays where it is until the op has come back.
//! 6. `submit` and `harvest` never wait for a device, and never call back into the engine.
//! 7. Once something can be harvested, [`Backend::event_fd`] is readable and stays so until it is, or
//!    [`Backend::wants_retry`] says so.
//!    A backend without one has everything ready at the next `harvest`.
//! 8. A backend that has to be asked at a moment of its own choice, although nothing tells of it,
//!    names that moment: [`Backend::next_deadline`]. While it names one, 7 is about everything but what
//!    waits for that moment; and one without a descriptor has nothing ready before it unless
//!    [`Backend::wants_retry`] says so.
//!
//! The suite in `crate::contract` (a feature) holds every backend to it.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::held::Rate;
use crate::mem::{Mem, Memory};
use crate::ops::{OpRecord, Ops};
use crate::queue::Queue;
use crate::request::Io;
use crate::units::{Errno, FileId, NodeId, OpId, ReqId, Time};

pub use crate::op::Completion;

/// What the engine must know of a file before it may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileInfo {
    /// Offsets and lengths of reads and writes must be multiples of this many bytes (a power of
    /// two; 1: anything goes).
    pub request_align: u32,
    /// Memory addresses must be multiples of this many bytes (a power of two).
    pub memory_align: u32,
    /// The file itself zeroes and discards whole blocks of this many bytes (a power of two; 1:
    /// anything goes), and changes a block that is cut, by its end too, in a way that harms writes
    /// to the rest of it.
    pub hole_align: u32,
    /// The file's length in bytes.
    pub len: u64,
    /// Can the file grow? A block device cannot.
    pub can_grow: bool,
    /// Can the file tell where its holes are ([`OpKind::Hole`](crate::op::OpKind::Hole))? Others are
    /// taken for data all through.
    pub knows_holes: bool,
}

/// What `submit` may see: the waiting ops, in order, and the memory they name.
#[derive(Debug)]
pub struct Submission<'a> {
    pub(crate) queue: &'a mut Queue<OpId>,
    /// How many may be taken: the turn's next slice.
    pub(crate) slice: usize,
    /// Every op that has not come back.
    pub ops: &'a Ops,
    /// The memory that ops name.
    pub mem: &'a mut Memory,
}

impl Submission<'_> {
    /// The next op, left in the queue.
    #[inline]
    pub fn peek(&self) -> Option<(OpId, &OpRecord)> {
        let &id = self.waiting().first()?;
        Some((id, &self.ops[id]))
    }

    /// All ops offered, oldest first.
    #[inline]
    pub fn waiting(&self) -> &[OpId] {
        &self.queue.as_slice()[..self.slice]
    }

    /// Ops offered.
    #[inline]
    pub fn len(&self) -> usize {
        self.slice
    }

    /// None offered?
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.slice == 0
    }

    /// Takes `n` ops off the front: they are the backend's now.
    #[inline]
    pub fn take(&mut self, n: usize) {
        self.slice -= n;
        self.queue.drop_front(n);
    }

    /// Takes those of the ops offered that `takes` says, and leaves the others in their order.
    pub fn take_if(&mut self, mut takes: impl FnMut(OpId, &OpRecord) -> bool) {
        let Submission { queue, ops, slice, .. } = self;
        *slice = queue.retain_of(*slice, |id| !takes(id, &ops[id]));
    }
}

/// What `harvest` may see: where completions go, and memory to fill for backends that copy.
#[derive(Debug)]
pub struct Harvest<'a> {
    /// Completions, appended in the order the engine shall see them.
    pub done: &'a mut Vec<Completion>,
    /// Every op that has not come back.
    pub ops: &'a Ops,
    /// The memory that ops name.
    pub mem: &'a mut Memory,
}

/// Does ops. See the module's contract.
pub trait Backend {
    /// What it works on.
    type File;

    /// Makes `file` known as `id`; says what the engine must know of it.
    fn attach(&mut self, id: FileId, file: Self::File) -> io::Result<FileInfo>;

    /// Gives the file back. No op on it is in flight.
    fn detach(&mut self, id: FileId) -> Option<Self::File>;

    /// Starts ops. Never waits.
    fn submit(&mut self, submission: &mut Submission<'_>);

    /// Collects what has come back. Never waits.
    fn harvest(&mut self, harvest: &mut Harvest<'_>);

    /// Readable when there is something to harvest. `None`: there always may be.
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Must `run` be called again although nothing will wake the loop?
    fn wants_retry(&self) -> bool {
        false
    }

    /// When `run` must be called for the backend's sake although its descriptor is not readable: to
    /// try again to reach a server, for example. Of its [clock](Backend::clock), which is that of the
    /// moments that `run` is given then. Being called earlier is harmless. May change with every call.
    fn next_deadline(&self) -> Option<Time> {
        None
    }

    /// The time now, for measuring how long a `run` took, and for [`Backend::next_deadline`].
    fn clock(&self) -> Time;

    /// The engine was asked something, or has seen or done something: for a backend that keeps a
    /// [record](crate::record). Default: nothing, and it costs nothing.
    #[inline(always)]
    fn note(&mut self, note: Note<'_>) {
        let _ = note;
    }
}

/// What an engine is asked, from outside, and what decides how it goes on; with what the backend takes and
/// gives back it decides all.
#[derive(Clone, Copy, Debug)]
pub enum Note<'a> {
    /// A request was taken.
    Submitted {
        /// For this disk.
        node: NodeId,
        /// What it wants.
        io: &'a Io,
        /// The memory lent for it.
        mem: &'a Mem,
    },
    /// `run` was called, with this time.
    Run(Time),
    /// The clock was looked at.
    Clock(Time),
    /// A request waits in the state with this label. (Not one that is merely passed on.)
    Waits {
        /// Which.
        request: ReqId,
        /// Its state's: see [`Driver::label`](crate::step::Driver::label).
        label: u8,
    },
    /// `run` ends.
    Ran,
    /// A finished request was taken: it ended so.
    Polled(Result<(), Errno>),
    /// Another method was called that changes something.
    Called(Called<'a>),
}

/// A copy, but for its nodes, is so many numbers.
pub const COPY_NUMBERS: usize = 11;

/// What is said about a job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum JobCall {
    /// [`Engine::job_seen`](crate::Engine::job_seen)
    Seen,
    /// [`Engine::pause_job`](crate::Engine::pause_job)
    Pause,
    /// [`Engine::resume_job`](crate::Engine::resume_job)
    Resume,
    /// [`Engine::cancel_job`](crate::Engine::cancel_job)
    Cancel,
}

/// Methods of an engine, besides those that have a [`Note`] of their own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Called<'a> {
    /// [`Engine::drain`](crate::Engine::drain)
    Drain,
    /// [`Engine::close`](crate::Engine::close)
    Close(NodeId),
    /// [`Engine::close_filter`](crate::Engine::close_filter)
    CloseFilter(NodeId),
    /// [`Engine::pause`](crate::Engine::pause)
    Pause(NodeId),
    /// [`Engine::resume`](crate::Engine::resume)
    Resume(NodeId),
    /// [`Engine::poll_event`](crate::Engine::poll_event), which had one.
    PollEvent,
    /// [`Engine::take_files`](crate::Engine::take_files)
    TakeFiles(NodeId),
    /// [`Engine::abandon`](crate::Engine::abandon), of a disk, which gave up these requests.
    Abandon(NodeId, &'a [ReqId]),
    /// [`Engine::start`](crate::Engine::start), or `start_parts` with these parts.
    Start {
        /// The disk that is read.
        source: NodeId,
        /// The disk that is written.
        target: NodeId,
        /// All else that is said of the copy: see [`Copy::to_numbers`](crate::Copy::to_numbers).
        copy: &'a [u64; COPY_NUMBERS],
        /// The parts, if not all is copied.
        parts: Option<&'a [Range<u64>]>,
    },
    /// A method about a job, which the engine has started as its so many'th, from 0 on.
    Job(JobCall, u32),
    /// [`Engine::set_quota`](crate::Engine::set_quota)
    SetQuota(NodeId, Option<usize>),
    /// [`Engine::set_rate`](crate::Engine::set_rate)
    SetRate(NodeId, Option<Rate>),
    /// [`Engine::detach`](crate::Engine::detach). That a file is attached a backend knows by itself.
    Detach(FileId),
    /// [`Engine::region`](crate::Engine::region), of so many bytes.
    Region(usize),
    /// [`Engine::add`](crate::Engine::add)
    Add,
}

/// Must a backend that has `in_flight` ops be asked again although nothing will wake the loop, and no
/// moment has been named for it?
#[inline]
pub(crate) fn is_to_be_asked(backend: &impl Backend, in_flight: usize) -> bool {
    let is_silent = || backend.event_fd().is_none() && backend.next_deadline().is_none();
    backend.wants_retry() || in_flight > 0 && is_silent()
}
