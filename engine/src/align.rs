//! Requests that a file cannot take as they are.
//!
//! A file opened with O_DIRECT takes whole blocks from aligned memory. Any other read goes through
//! a bounce buffer; any other write reads the blocks at its two ends, changes its bytes in them
//! and writes whole blocks back. Meanwhile nobody else may write those blocks, or his bytes would
//! be put back to what they were: the range is *claimed*, and a claim waits for the writes in
//! flight that overlap it (R47).
//!
//! Each such op is a small machine of its own, a child of the request that issued it:
//!
//! ```text
//! Claim ─> Quiesce ─> Chunk ─> ReadEdges ─> WriteChunk ─> Chunk … ─> Trim ─> done
//!   └─ nothing to rewrite, only waited for a claim: Direct ─> done
//! reads: Chunk ─> ReadChunk ─> Chunk …
//! ```
//!
//! No deadlock: a claim is taken only while no other overlaps it, its holder waits for a bounce
//! buffer or the device, and whoever holds a bounce buffer waits for the device alone.

use crate::core::Core;
use crate::file::Claim;
use crate::mutant;
use crate::op::{Base, Op, OpKind, Seg, Segs, Target};
use crate::slots::{Cause, Origin, Work};
use crate::step::{Event, Io, IoKind, Step};
use crate::units::{BufId, Errno, FileId, NodeId, ReqId, align_down, align_up};

/// An op being taken apart.
#[derive(Clone, Hash, Debug)]
pub(crate) struct Job {
    op: Op,
    file: FileId,
    /// Bytes of the op done.
    at: u64,
    buf: Option<BufId>,
    state: State,
}

/// Named by what is awaited.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    /// No other claim overlaps.
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
    /// The file's end put back: the last block reached past it.
    Trim,
}

/// Can the file take this read or write as it is, now?
pub(crate) fn is_direct(core: &Core, file: FileId, op: &Op) -> bool {
    let state = &core.files[file.index()];
    (op.offset | op.len) & u64::from(state.block_mask) == 0
        && core.mem.is_aligned(&op.segs, state.address_mask, state.block_mask)
        && (!op.kind.modifies() || !is_claimed(core, file, op.offset, op.end()))
}

/// Can the file zero this range by itself, now?
pub(crate) fn may_zero(core: &Core, file: FileId, op: &Op) -> bool {
    let state = &core.files[file.index()];
    // A block device zeroes whole blocks; a file system any bytes.
    let whole = state.info.can_grow || (op.offset | op.len) & u64::from(state.block_mask) == 0;
    whole && !state.zero_unsupported && !is_claimed(core, file, op.offset, op.end())
}

/// Can a range be discarded, now? Not while somebody is about to write back what is in it.
pub(crate) fn may_discard(core: &Core, file: FileId, op: &Op) -> bool {
    !is_claimed(core, file, op.offset, op.end()) || mutant!("discard_ignores_claims")
}

/// Can the file's length be changed, now? Not while somebody may put the end back to where it was.
pub(crate) fn may_resize(core: &Core, file: FileId, op: &Op) -> bool {
    let (start, end) = resized(core, file, op);
    !is_claimed(core, file, start, end)
}

/// The part of the file that changing its length changes.
fn resized(core: &Core, file: FileId, op: &Op) -> (u64, u64) {
    match op.kind {
        OpKind::Truncate => (op.offset.min(core.files[file.index()].len), u64::MAX),
        _ => (op.offset, op.end()),
    }
}

fn is_claimed(core: &Core, file: FileId, start: u64, end: u64) -> bool {
    core.files[file.index()].claims.iter().any(|c| c.start < end && start < c.end)
}

/// Begins the machine for an op of `request`.
#[cold]
pub(crate) fn spawn(core: &mut Core, request: ReqId, file: FileId, op: Op) {
    let io = Io { kind: IoKind::Read, offset: op.offset, len: op.len };
    let job = Job { op, file, at: 0, buf: None, state: State::Claim };
    let key = core.jobs.insert(job) as u32;
    let id = core.begin(NodeId(u32::MAX), io, Origin::Child(request), 0, 0);
    let slot = core.ops.slot_mut(id);
    (slot.work, slot.cause) = (Work::Align(key), Cause::Start);
    core.expect_result(request);
    core.stats.bounced += 1;
}

/// Delivers an event; answers the result when the op has ended.
pub(crate) fn step(
    core: &mut Core,
    me: ReqId,
    key: u32,
    mut event: Event,
) -> Option<Result<(), Errno>> {
    let mut job = core.jobs[key as usize].clone();
    loop {
        let mut machine = Machine { core, me, job: &mut job };
        match machine.step(event) {
            Step::Go(state) => {
                job.state = state;
                event = Event::Start;
            }
            Step::Wait(state) => {
                job.state = state;
                core.jobs[key as usize] = job;
                return None;
            }
            Step::Last { .. } => unreachable!("a job ends in a state of its own"),
            Step::Done(result) => {
                machine.release();
                core.jobs.remove(key as usize);
                return Some(result);
            }
        }
    }
}

struct Machine<'a> {
    core: &'a mut Core,
    me: ReqId,
    job: &'a mut Job,
}

impl Machine<'_> {
    fn step(&mut self, event: Event) -> Step<State> {
        if let Event::Io(Err(errno)) = event {
            return Step::Done(Err(errno));
        }
        match (self.job.state, event) {
            (State::Claim, Event::Start | Event::Woken) => self.claim(),
            (State::Direct | State::Trim, Event::Io(_)) => Step::Done(Ok(())),
            (State::Quiesce, Event::Start | Event::Woken) => self.quiesce(),
            (State::Chunk, Event::Start | Event::Woken) => self.chunk(),
            (State::ReadChunk { len }, Event::Io(_)) => self.read_chunk(len),
            (State::ReadEdges { len }, Event::Io(_)) => self.read_edges(len),
            (State::WriteChunk { len }, Event::Io(_)) => {
                self.job.at += len;
                Step::Go(State::Chunk)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn align(&self) -> u64 {
        self.core.files[self.job.file.index()].info.request_align as u64
    }

    /// The next byte of the file.
    fn offset(&self) -> u64 {
        self.job.op.offset + self.job.at
    }

    /// The whole blocks that hold `start..end` of the file.
    fn blocks(&self, start: u64, end: u64) -> (u64, u64) {
        let align = self.align();
        (align_down(start, align), align_up(end, align).unwrap_or(u64::MAX))
    }

    fn claim(&mut self) -> Step<State> {
        let (file, op) = (self.job.file, &self.job.op);
        if !op.kind.modifies() {
            return Step::Go(State::Chunk);
        }
        let (start, end) = match op.kind {
            OpKind::Truncate | OpKind::Allocate => resized(self.core, file, op),
            _ => self.blocks(op.offset, op.end()),
        };
        if is_claimed(self.core, file, start, end) && !mutant!("rmw_without_claim") {
            let mut list = self.core.files[file.index()].claim_waiters;
            self.core.park(self.me, &mut list);
            self.core.files[file.index()].claim_waiters = list;
            return Step::Wait(State::Claim);
        }
        let direct = match op.kind {
            OpKind::Write { .. } => is_direct(self.core, file, op),
            // Bytes at its ends that are no whole block are the device's to leave alone.
            OpKind::Discard | OpKind::Truncate | OpKind::Allocate => true,
            _ => may_zero(self.core, file, op),
        };
        if direct {
            let op = op.clone();
            self.core.enqueue(self.me, op);
            return Step::Wait(State::Direct);
        }
        self.core.files[file.index()].claims.push(Claim { owner: self.me, start, end });
        Step::Go(State::Quiesce)
    }

    fn quiesce(&mut self) -> Step<State> {
        let file = self.job.file;
        let (start, end) = self.blocks(self.job.op.offset, self.job.op.end());
        let in_flight = self.core.ops.iter().any(|(_, record)| {
            let op = &record.op;
            let op_end = if op.kind == OpKind::Truncate { u64::MAX } else { op.end() };
            op.target == Target::File(file)
                && op.kind.modifies()
                && op.offset < end
                && start < op_end
        });
        if in_flight && !mutant!("rmw_ignores_writes_in_flight") {
            let mut list = self.core.files[file.index()].write_waiters;
            self.core.park(self.me, &mut list);
            self.core.files[file.index()].write_waiters = list;
            return Step::Wait(State::Quiesce);
        }
        Step::Go(State::Chunk)
    }

    fn chunk(&mut self) -> Step<State> {
        let left = self.job.op.len - self.job.at;
        if left == 0 {
            return self.trim();
        }
        if let Some(whole) = self.whole_blocks_in_place(left) {
            return whole;
        }
        let Some(buf) = self.job.buf.or_else(|| self.core.take_bounce()) else {
            let mut list = self.core.bounce_waiters;
            self.core.park(self.me, &mut list);
            self.core.bounce_waiters = list;
            return Step::Wait(State::Chunk);
        };
        self.job.buf = Some(buf);
        let offset = self.offset();
        let size = self.core.limits.buffer_size as u64;
        let (start, end) = self.blocks(offset, offset + left);
        if end - start <= size {
            return self.bounce(buf, left);
        }
        // More than a buffer: the first block by itself if it is cut, then buffers full of whole
        // blocks, then the rest.
        let len = if start < offset { start + self.align() - offset } else { size };
        self.bounce(buf, len.min(left))
    }

    /// A write in whole blocks from memory that the file takes needs no bounce buffer, even if
    /// the op as a whole has a cut block at an end.
    fn whole_blocks_in_place(&mut self, left: u64) -> Option<Step<State>> {
        let op = &self.job.op;
        let (align, offset) = (self.align(), self.offset());
        let len = align_down(left, align).min(MAX_IN_PLACE);
        if !op.kind.modifies() || offset & (align - 1) != 0 || len == 0 {
            return None;
        }
        let segs = match op.kind {
            OpKind::Zero { .. } => Segs::one(Seg::zeros(len as u32)),
            _ => op.segs.slice(self.job.at, len),
        };
        let file = &self.core.files[self.job.file.index()];
        self.core.mem.is_aligned(&segs, file.address_mask, file.block_mask).then(|| {
            let write = Op { kind: self.write_kind(), ..Op::write(self.job.file, offset, segs) };
            self.core.enqueue(self.me, write);
            Step::Wait(State::WriteChunk { len })
        })
    }

    fn write_kind(&self) -> OpKind {
        match self.job.op.kind {
            OpKind::Write { fua } => OpKind::Write { fua },
            _ => OpKind::Write { fua: false },
        }
    }

    /// Reads what the buffer must hold for the next `len` bytes.
    fn bounce(&mut self, buf: BufId, len: u64) -> Step<State> {
        let (offset, align) = (self.offset(), self.align());
        let (start, end) = self.blocks(offset, offset + len);
        let target = Target::File(self.job.file);
        let piece = |from: u64, to: u64| {
            let seg =
                Seg { base: Base::Pool(buf), off: (from - start) as u32, len: (to - from) as u32 };
            Op::read(target, from, Segs::one(seg))
        };
        if !self.job.op.kind.modifies() {
            self.core.enqueue(self.me, piece(start, end));
            return Step::Wait(State::ReadChunk { len });
        }
        let first_cut = start < offset;
        let last_cut = offset + len < end;
        if !first_cut && !last_cut {
            return self.read_edges(len);
        }
        if first_cut {
            self.core.enqueue(self.me, piece(start, start + align));
        }
        if last_cut && (!first_cut || end - align > start) {
            self.core.enqueue(self.me, piece(end - align, end));
        }
        Step::Wait(State::ReadEdges { len })
    }

    /// The blocks are in the buffer: hand the bytes on.
    fn read_chunk(&mut self, len: u64) -> Step<State> {
        let buf = self.job.buf.expect("a chunk is read into the job's buffer");
        let skip = self.offset() & (self.align() - 1);
        let Job { op, at, .. } = &*self.job;
        self.core.mem.scatter_from_pool(&op.segs, *at, buf, skip as usize, len as usize);
        self.job.at += len;
        Step::Go(State::Chunk)
    }

    /// The cut blocks are in the buffer: put the bytes in and write whole blocks back.
    fn read_edges(&mut self, len: u64) -> Step<State> {
        let buf = self.job.buf.expect("edges are read into the job's buffer");
        let offset = self.offset();
        let (start, end) = self.blocks(offset, offset + len);
        let skip = (offset - start) as usize;
        let Job { op, at, .. } = &*self.job;
        match op.kind {
            OpKind::Zero { .. } => self.core.mem.pool_mut(buf)[skip..skip + len as usize].fill(0),
            _ => self.core.mem.gather_to_pool(&op.segs, *at, buf, skip, len as usize),
        }
        let seg = Seg { base: Base::Pool(buf), off: 0, len: (end - start) as u32 };
        let write =
            Op { kind: self.write_kind(), ..Op::write(self.job.file, start, Segs::one(seg)) };
        self.core.enqueue_padded(self.me, write, offset + len);
        Step::Wait(State::WriteChunk { len })
    }

    /// All bytes are written. Where the last block reached past the end of the file, the end is
    /// put back, unless somebody else is at work behind it: then his end is the later one.
    fn trim(&mut self) -> Step<State> {
        let file = &mut self.core.files[self.job.file.index()];
        let Some(mine) = file.claims.iter().position(|c| c.owner == self.me) else {
            return Step::Done(Ok(()));
        };
        let Claim { start, end, .. } = file.claims[mine];
        let others = file.claims.iter().any(|c| c.owner != self.me && c.end > start);
        if end <= file.len || others || !file.info.can_grow {
            return Step::Done(Ok(()));
        }
        // Nobody may extend the file while its end is put back.
        file.claims[mine].end = u64::MAX;
        let len = file.len;
        self.core.enqueue(self.me, Op::bare(OpKind::Truncate, self.job.file, len, 0));
        Step::Wait(State::Trim)
    }

    fn release(&mut self) {
        if let Some(buf) = self.job.buf.take() {
            self.core.give_bounce(buf);
        }
        let file = &mut self.core.files[self.job.file.index()];
        file.claims.retain(|c| c.owner != self.me);
        let mut list = std::mem::take(&mut file.claim_waiters);
        self.core.wake_all(&mut list);
    }
}

/// The most that one op writes in place, in bytes: a whole number of blocks that an op's 32-bit
/// lengths hold with room to spare.
const MAX_IN_PLACE: u64 = 16 << 20;
