//! What a driver is, and what one of its steps may do.

use std::fmt::Debug;
use std::hash::Hash;

use crate::core::Core;
use crate::events::NodeEvent;
use crate::mem::Memory;
use crate::mutant;
use crate::op::{Op, OpKind, Seg, Segs};
use crate::status::{Status, StatusKind};
use crate::units::{BufId, FileId, HostOffset, NodeId, RegionId, ReqId, Time};
use crate::wait::{On, WaitList};

pub use crate::request::{Chore, Event, Io, IoKind, Pass, Step};

/// A format: how requests to one node are done, one state after the other.
///
/// A driver owns all state of its image as plain data; a step borrows it for as long as it runs,
/// and nothing else runs meanwhile.
pub trait Driver {
    /// A request's state: named for what it awaits, with all it needs and nothing else.
    type State: Clone + Hash + Debug;

    /// Names for the statistics, by [`Driver::label`].
    const STATES: &'static [&'static str];

    /// The index of a state's name in [`Driver::STATES`].
    fn label(state: &Self::State) -> usize;

    /// The virtual size in bytes. Changes in no steps but those of a truncation.
    fn size(&self) -> u64;

    /// Where a new read or write may be passed on to as it is, as one op whose result is the
    /// request's. `None`: it takes more than that, and [`Driver::begin`] begins it.
    ///
    /// Most requests are no more than this: nobody speaks of states then.
    #[inline]
    fn pass_on(&mut self, io: &Io, mem: &Memory) -> Option<Pass> {
        let _ = (io, mem);
        None
    }

    /// Bytes in a cluster, grain or block, a power of two: what is written, zeroed or discarded in whole ones, at
    /// multiples of it, changes no other. 1: any.
    #[inline]
    fn unit(&self) -> u64 {
        1
    }

    /// Can the disk be written? If not, what would change it is answered with
    /// [`Errno::READ_ONLY`](crate::units::Errno::READ_ONLY).
    #[inline]
    fn is_writable(&self) -> bool {
        true
    }

    /// Does the node use this file?
    fn uses(&self, file: FileId) -> bool;

    /// The file whose bytes are the disk's, one for one, whatever else goes on, if there is such a file; `written`: which
    /// takes all that is written to the disk as it is. Then a copy may leave the moving of bytes to the
    /// kernel ([`Copy::offload`](crate::Copy::offload)).
    #[inline]
    fn file_of_disk(&self, written: bool) -> Option<FileId> {
        let _ = written;
        None
    }

    /// The nodes below it, to which it issues requests of any kind but truncations
    /// ([`Target::Node`](crate::op::Target::Node)): an overlay reads where it has nothing itself, a
    /// filter passes on what comes, or writes it twice. Always the same ones, which were added before
    /// it: so there is no circle. Ranges are within the size of that node, and who writes to it holds
    /// no pool buffer, nor writes from one.
    #[inline]
    fn below(&self) -> &[NodeId] {
        &[]
    }

    /// A new request's first step; [`Cx::io`] tells what it wants. Its range is within the size
    /// and its memory fits.
    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<Self::State>;

    /// A chore's first state; `None` when there is nothing to do.
    fn chore(&mut self, chore: Chore) -> Option<Self::State>;

    /// When the next [`Chore::Deadline`] is due.
    fn deadline(&self) -> Option<Time>;

    /// Delivers `event` to a request that is in `state`.
    fn step(&mut self, state: Self::State, event: Event, cx: &mut Cx<'_>) -> Step<Self::State>;
}

/// Everything that a step may do to the outside.
#[derive(Debug)]
pub struct Cx<'a> {
    pub(crate) core: &'a mut Core,
    pub(crate) me: ReqId,
}

impl Cx<'_> {
    /// The request being stepped.
    #[inline]
    pub fn me(&self) -> ReqId {
        self.me
    }

    /// The time of this `run`.
    #[inline]
    pub fn now(&self) -> Time {
        self.core.now
    }

    /// The node that the request is of: where a step reads what its own image holds, through a
    /// request of its own ([`Target::Node`](crate::op::Target::Node)).
    #[inline]
    pub fn node(&self) -> NodeId {
        self.core.ops.slot(self.me).node
    }

    /// Ends this epoch and answers it. Requests are of the epoch that they begin in.
    pub fn end_epoch(&mut self) -> u32 {
        self.core.epoch = self.core.epoch.wrapping_add(1);
        self.core.epoch.wrapping_sub(1)
    }

    /// Is no op in flight any more of a request to this node that began in `epoch` or before, chores
    /// apart? Then nobody uses any more what was there to be found before that epoch ended: a request
    /// that waits without ops relies on nothing that it has found, since it looks again.
    pub fn is_past(&self, epoch: u32) -> bool {
        self.core.is_past(self.node(), epoch)
    }

    /// Parks the request until [`Cx::is_past`] may answer something else. It is false now.
    pub fn park_until_past(&mut self) {
        let mut list = std::mem::take(&mut self.core.past_waiters);
        self.core.park(self.me, &mut list, On::Users);
        self.core.past_waiters = list;
    }

    /// Those who are parked so look again: somebody may be waiting for them whom they wait for.
    pub fn wake_past_waiters(&mut self) {
        self.core.wake_past_waiters();
    }

    /// The image's metadata says something impossible: `what`, at byte `at` of its file. For the
    /// embedder: see [`NodeEvent::Corrupt`].
    pub fn tell_corrupt(&mut self, what: &'static str, at: u64) {
        let node = self.node();
        self.core.tell(NodeEvent::Corrupt { node, what, at });
    }

    /// What the request wants.
    #[inline]
    pub fn io(&self) -> Io {
        self.core.ops.slot(self.me).io
    }

    /// `len` bytes of the request's memory, from byte `off` on.
    #[inline]
    pub fn guest(&self, off: u64, len: u64) -> Seg {
        self.core.ops.slot(self.me).guest(off, len)
    }

    /// Fills part of a read with zeros.
    pub fn zero_guest(&mut self, off: u64, len: u64) {
        let seg = self.guest(off, len);
        self.core.mem.zero(&Segs::one(seg), 0, len);
    }

    /// Copies part of a write's bytes. Who must look at them and then write them does both on
    /// the copy: the guest may change its memory at any time.
    pub fn copy_guest(&self, off: u64, target: &mut [u8]) {
        let seg = self.guest(off, target.len() as u64);
        self.core.mem.gather(&Segs::one(seg), 0, target);
    }

    /// Copies part of a write's bytes to `off` of a region. As [`Cx::copy_guest`].
    pub fn copy_guest_to_region(&mut self, from: u64, region: RegionId, off: usize, len: usize) {
        let seg = self.guest(from, len as u64);
        self.core.mem.gather_to_region(&Segs::one(seg), region, off, len);
    }

    /// Fills part of a read with `len` bytes at `off` of a region.
    pub fn copy_region_to_guest(&mut self, from: u64, region: RegionId, off: usize, len: usize) {
        let seg = self.guest(from, len as u64);
        self.core.mem.scatter_from_region(&Segs::one(seg), region, off, len);
    }

    /// Issues an op. Several may be issued in one step: they are joined, and one [`Event::Io`]
    /// tells when all have come back.
    pub fn issue(&mut self, op: Op) {
        self.core.issue(self.me, op);
    }

    /// Makes part of this request, `offset` and `len` bytes from there, a request of its own to the same
    /// node. It is joined like an op.
    pub fn issue_part(&mut self, offset: u64, len: u64) {
        let (node, io) = (self.node(), self.io());
        let seg = self.guest(offset - io.offset, len);
        let kind = match io.kind {
            // Stable is what the whole becomes, in the end.
            IoKind::Write { compressed, .. } => IoKind::Write { fua: false, compressed },
            kind => kind,
        };
        self.core.issue_request(self.me, node, Io { kind, offset, len }, seg);
    }

    /// Reads into `len` bytes of the request's memory, from byte `off` on, what `file` has at
    /// `offset`.
    pub fn read_guest(&mut self, file: FileId, offset: u64, off: u64, len: u64) {
        self.core.transfer(self.me, OpKind::Read, (file, offset), (off, len));
    }

    /// Writes `len` bytes of the request's memory, from byte `off` on, to `file` at `offset`.
    pub fn write_guest(&mut self, file: FileId, offset: u64, off: u64, len: u64, fua: bool) {
        self.core.transfer(self.me, OpKind::Write { fua }, (file, offset), (off, len));
    }

    /// Answers a request that asks what is where ([`IoKind::Status`]): from its first byte on there
    /// are `len` bytes of this kind, at `host` if they have a place.
    pub fn answer_status(
        &mut self,
        kind: StatusKind,
        len: u64,
        host: Option<(FileId, HostOffset)>,
    ) {
        let io = self.io();
        let IoKind::Status { depth } = io.kind else { panic!("{io:?} asks for no status") };
        debug_assert!((1..=io.len).contains(&len), "{len} bytes answered of {io:?}");
        let len = if mutant!("status_of_all") { io.len } else { len };
        self.core.answer_status(self.me, Status { kind, len, depth, host });
    }

    /// Has the layer below answer such a request, about its first `len` bytes: what that answers is
    /// the request's answer.
    pub fn ask_status_of(&mut self, below: NodeId, len: u64) {
        self.core.issue_status(self.me, below, self.io().offset, len);
    }

    /// How many more ops a step may issue now; a request with many pieces issues as many, waits
    /// for them, and goes on. Never 0 for a step that has issued none.
    #[inline]
    pub fn room(&self) -> usize {
        self.core.room(self.me)
    }

    /// Parks the request at the end of `list`, which is waited on for `on`.
    pub fn park(&mut self, list: &mut WaitList, on: On) {
        self.core.park(self.me, list, on);
    }

    /// Wakes everybody on `list`.
    pub fn wake_all(&mut self, list: &mut WaitList) {
        self.core.wake_all(list);
    }

    /// Wakes the first on `list` and tells who it is: what was waited for is theirs now.
    pub fn hand_over(&mut self, list: &mut WaitList) -> Option<ReqId> {
        self.core.wake_first(list)
    }

    /// Asks that the node's chore be begun when this step is over.
    pub fn ask(&mut self) {
        let node = self.core.ops.slot(self.me).node;
        self.core.asked.push(node);
    }

    /// Takes `N` buffers of the pool, or none. Some are kept for other disks of the engine.
    pub fn take_bufs<const N: usize>(&mut self) -> Option<[BufId; N]> {
        self.core.take_bufs(self.me)
    }

    /// Gives a buffer back.
    pub fn give_buf(&mut self, buf: BufId) {
        self.core.give_buf(buf);
    }

    /// Parks the request until buffers have been given back.
    pub fn park_for_bufs(&mut self) {
        let mut list = std::mem::take(&mut self.core.buf_waiters);
        self.core.park(self.me, &mut list, On::Buffer);
        self.core.buf_waiters = list;
    }

    /// Bytes in a pool buffer.
    pub fn buf_size(&self) -> u64 {
        self.core.limits.buffer_size as u64
    }

    /// All memory.
    #[inline]
    pub fn mem(&mut self) -> &mut Memory {
        &mut self.core.mem
    }

    /// All memory, to look at.
    pub fn memory(&self) -> &Memory {
        &self.core.mem
    }

    /// The length of `file`, in bytes, when all that has been issued has been done.
    pub fn file_len(&self, file: FileId) -> u64 {
        self.core.files[file.index()].len
    }

    /// The unit in which reads and writes of `file` must be made to need no read-modify-write.
    pub fn request_align(&self, file: FileId) -> u64 {
        self.core.files[file.index()].info.request_align as u64
    }
}
