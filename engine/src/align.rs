//! Requests that a file cannot take as they are.
//!
//! A file opened with O_DIRECT takes whole blocks from aligned memory. Any other read goes through
//! a bounce buffer; any other write reads the blocks at its two ends, changes its bytes in them
//! and writes whole blocks back. Meanwhile nobody else may write those blocks, or his bytes would
//! be put back to what they were: the range is *claimed*, and a claim waits for the writes in
//! flight that overlap it (R47).
//!
//! What zeroes, discards or ends in the middle of a block of the *file system* would have it change
//! that block behind the back of writes to the rest of it ([`FileInfo::hole_align`]). So the cut ends
//! of what is zeroed are written, a discard leaves them alone, and a change of length claims the
//! block in which the file ends, or will.
//!
//! What zeroes, discards, cuts or grows a file does so under the file's lock, and waits under it for
//! all that is in flight: whoever submitted another op would be held inside the kernel for as long.
//! So such an op closes the file's *gate*: what comes later waits here, what is in flight is waited
//! for, then it goes out alone. Others that want the same follow at once, for 2 ms or 16 ops; then
//! those that waited have their turn. Space that was given up (`given_up.rs`) goes back so.
//!
//! Each such op is a small machine of its own, a child of the request that issued it:
//!
//! ```text
//! under the lock: Gate ─> Quiet ─> Claim …, or GiveBack ─> GiveBack … ─> done
//! Claim ─> Quiesce ─> Chunk ─> ReadEdges ─> WriteChunk ─> Chunk … ─> Trim ─> done
//!   │         │         └─ zeroing whole blocks: ZeroWhole ─> Chunk
//!   │         └─ a change of length: Direct ─> (a truncation is answered) ─> Settle ─> done
//!   └─ only waited for a claim or the gate: Direct ─> done
//! reads: Claim ─> Chunk ─> ReadChunk ─> Chunk …
//! ```
//!
//! No deadlock: the order is gate, claim, bounce buffer, device. Who waits for the gate holds
//! nothing; who has closed it waits for claims that are held and ops in flight, neither of which waits
//! for the gate. A claim is taken only while no other overlaps it, its holder waits for a bounce buffer
//! or the device, and whoever holds a bounce buffer waits for the device alone.

use crate::core::Core;
use crate::file::Claim;
use crate::file_job::{Job, State};
use crate::mutant;
use crate::op::{Base, Op, OpKind, Seg, Segs, Target};
use crate::request::{Event, Step};
use crate::slots::Origin;
use crate::units::{BufId, Errno, ReqId, align_down, align_up};
use crate::wait::On;

/// What to zero next: so many bytes.
enum Zeroing {
    /// In whole blocks of the file system.
    Whole(u64),
    /// In parts of such blocks.
    Cut(u64),
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
        match (self.job.state, event) {
            // The engine knows it now, and zeros are written.
            (state, Event::Io(Err(Errno::NOT_SUPPORTED))) if self.is_zeroed_by_file() => {
                if !self.wants_gate() {
                    self.open();
                }
                Step::Go(if state == State::Direct { State::Claim } else { State::Chunk })
            }
            // A hint, taken or not.
            (State::GiveBack, Event::Io(_)) => self.give_back(),
            (State::GiveBackFirst, Event::Io(_)) => Step::Go(State::Claim),
            (_, Event::Io(Err(errno))) => Step::Done(Err(errno)),
            (State::Gate, Event::Start | Event::Woken) => self.close(),
            (State::Quiet, Event::Start | Event::Woken) => self.wait_for_quiet(),
            (State::Claim, Event::Start | Event::Woken) => self.claim(),
            (State::Direct, Event::Io(_)) if self.my_claim().is_some() => {
                if self.job.op.kind == OpKind::Truncate {
                    self.answer_first();
                }
                self.settle()
            }
            (State::Trim, Event::Io(_)) if self.cuts() => self.settle(),
            (State::Direct | State::Trim | State::Settle, Event::Io(_)) => Step::Done(Ok(())),
            (State::Quiesce, Event::Start | Event::Woken) => self.quiesce(),
            (State::Chunk, Event::Start | Event::Woken) => self.chunk(),
            (State::ReadChunk { len }, Event::Io(_)) => self.read_chunk(len),
            (State::ReadEdges { len }, Event::Io(_)) => self.read_edges(len),
            (State::WriteChunk { len } | State::ZeroWhole { len }, Event::Io(_)) => {
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

    /// Closes the gate, or waits for the turn to do so.
    fn close(&mut self) -> Step<State> {
        let now = self.core.now;
        let mut gate = self.core.files[self.job.file.index()].gate;
        // It may have been handed over.
        if gate.closed_by.is_some_and(|by| by != self.me) {
            self.core.park(self.me, &mut gate.next, On::Turn);
            self.core.files[self.job.file.index()].gate = gate;
            return Step::Wait(State::Gate);
        }
        if gate.closed_by.is_none() {
            (gate.closed_by, gate.since, gate.turns) = (Some(self.me), now, 0);
            self.core.closed += 1;
        }
        self.core.files[self.job.file.index()].gate = gate;
        Step::Go(State::Quiet)
    }

    fn wait_for_quiet(&mut self) -> Step<State> {
        if !self.is_quiet() && !mutant!("lock_taken_over_ops_in_flight") {
            let mut list = self.core.files[self.job.file.index()].gate.quiet_waiter;
            self.core.park(self.me, &mut list, On::Quiet);
            self.core.files[self.job.file.index()].gate.quiet_waiter = list;
            return Step::Wait(State::Quiet);
        }
        let gives_back = self.job.op.kind == OpKind::Discard && self.job.op.len == 0;
        if gives_back { self.give_back() } else { Step::Go(State::Claim) }
    }

    /// Is nothing in flight on the file, nor anybody between two of his ops?
    fn is_quiet(&self) -> bool {
        let file = self.job.file;
        let waits = |job: &Job| matches!(job.state, State::Gate | State::Quiet | State::Claim);
        !self.core.jobs.iter().any(|(_, job)| job.file == file && !waits(job))
            && !self.core.ops.iter().any(|(_, record)| {
                record.op.target == Target::File(file) && record.op.kind != OpKind::Flush
            })
    }

    /// Must the gate be closed for it?
    fn wants_gate(&self) -> bool {
        let (file, op) = (&self.core.files[self.job.file.index()], &self.job.op);
        match op.kind {
            OpKind::Zero { .. } if !file.zero_unsupported => true,
            OpKind::Zero { .. } if mutant!("written_zeros_need_no_gate") => false,
            // The file's end is to be put back: see `trim`.
            OpKind::Zero { .. } | OpKind::Write { .. } => self.passes_end(),
            kind => kind.locks_file(),
        }
    }

    /// Does its last block reach past the end of a file that can be cut?
    fn passes_end(&self) -> bool {
        let (file, end) = (&self.core.files[self.job.file.index()], self.job.op.end());
        let padded = align_up(end, u64::from(file.info.request_align));
        file.info.can_grow && padded.is_some_and(|padded| padded > end && padded > file.len)
    }

    /// What was given up of `start..end` is given back, and the op is looked at again.
    fn give_back_first(&mut self, start: u64, end: u64) -> Step<State> {
        let file = &mut self.core.files[self.job.file.index()];
        let (start, end) = file.given_up.take(start, end).expect("there is some");
        let op = Op::bare(OpKind::Discard, self.job.file, start, end - start);
        self.core.enqueue(self.me, op);
        Step::Wait(State::GiveBackFirst)
    }

    /// The next range that was given up; until there is none, or others have waited long enough.
    fn give_back(&mut self) -> Step<State> {
        let now = self.core.now;
        let file = &mut self.core.files[self.job.file.index()];
        let held = now.since(file.gate.since);
        let others_wait = !file.claim_waiters.is_empty() || !file.gate.next.is_empty();
        let is_short = self.job.at < GATE_TURNS_MAX.into() && held < GATE_NS_MAX;
        let goes_on = is_short || !others_wait;
        if goes_on && let Some((start, end)) = file.given_up.pop() {
            self.job.at += 1;
            let op = Op::bare(OpKind::Discard, self.job.file, start, end - start);
            self.core.enqueue(self.me, op);
            return Step::Wait(State::GiveBack);
        }
        file.given_up.is_going_on = false;
        file.given_up.due = now.plus_ns(held.min(GATE_NS_MAX) * 8);
        Step::Done(Ok(()))
    }

    /// Who had the gate closed is done: it is handed on, or opens.
    fn open(&mut self) {
        let now = self.core.now;
        let file = self.job.file.index();
        let mut gate = self.core.files[file].gate;
        if gate.closed_by != Some(self.me) {
            return;
        }
        gate.turns += 1;
        let goes_on = gate.turns < GATE_TURNS_MAX && now.since(gate.since) < GATE_NS_MAX;
        gate.closed_by = if goes_on { self.core.wake_first(&mut gate.next) } else { None };
        if gate.closed_by.is_some() {
            self.core.files[file].gate = gate;
            return;
        }
        self.core.closed -= 1;
        // Those first who waited for it to open, then whoever wants to close it again.
        let mut waiting = std::mem::take(&mut self.core.files[file].claim_waiters);
        self.core.wake_all(&mut waiting);
        self.core.wake_first(&mut gate.next);
        self.core.files[file].gate = gate;
    }

    fn claim(&mut self) -> Step<State> {
        let (file, op) = (self.job.file, &self.job.op);
        let mut has_gate = self.core.files[file.index()].gate.closed_by == Some(self.me);
        let to_give_back = self.core.files[file.index()].to_give_back(op);
        if !has_gate && (to_give_back.is_some() || self.wants_gate()) {
            return Step::Go(State::Gate);
        }
        if let Some((start, end)) = to_give_back {
            return self.give_back_first(start, end);
        }
        if has_gate && !self.wants_gate() {
            self.open();
            has_gate = false;
        }
        let op = &self.job.op;
        let (start, end) = self.core.files[file.index()].claim_of(op);
        let is_claimed = op.kind.modifies() && self.core.files[file.index()].is_claimed(start, end);
        let waits = self.core.files[file.index()].is_closed() && !has_gate
            || is_claimed && !mutant!("rmw_without_claim");
        if waits {
            let mut list = self.core.files[file.index()].claim_waiters;
            self.core.park(self.me, &mut list, On::Blocks);
            self.core.files[file.index()].claim_waiters = list;
            return Step::Wait(State::Claim);
        }
        let direct = match op.kind {
            OpKind::Read | OpKind::Write { .. } => {
                self.core.files[file.index()].is_direct(op, &self.core.mem)
            }
            _ => self.core.files[file.index()].is_whole(op),
        };
        if direct {
            return self.direct();
        }
        self.core.stats.bounced += 1;
        if self.job.op.kind == OpKind::Read {
            return Step::Go(State::Chunk);
        }
        self.core.files[file.index()].claims.push(Claim { owner: self.me, start, end });
        Step::Go(State::Quiesce)
    }

    fn direct(&mut self) -> Step<State> {
        let op = self.job.op.clone();
        self.core.enqueue(self.me, op);
        Step::Wait(State::Direct)
    }

    fn my_claim(&self) -> Option<usize> {
        self.core.files[self.job.file.index()].claims.iter().position(|c| c.owner == self.me)
    }

    fn quiesce(&mut self) -> Step<State> {
        let file = self.job.file;
        let mine = self.my_claim().expect("it was claimed");
        let Claim { start, end, .. } = self.core.files[file.index()].claims[mine];
        let in_flight = self.core.ops.iter().any(|(_, record)| {
            let op = &record.op;
            let op_end = if op.kind == OpKind::Truncate { u64::MAX } else { op.end() };
            op.target == Target::File(file)
                && op.kind.modifies()
                && op.offset < end
                && start < op_end
        });
        if in_flight && !mutant!("rmw_ignores_writes_in_flight") {
            let mut list = self.core.write_waiters;
            self.core.park(self.me, &mut list, On::Quiet);
            self.core.write_waiters = list;
            return Step::Wait(State::Quiesce);
        }
        match self.job.op.kind {
            OpKind::Truncate | OpKind::Allocate => self.direct(),
            _ => Step::Go(State::Chunk),
        }
    }

    fn chunk(&mut self) -> Step<State> {
        let left = self.job.op.len - self.job.at;
        if left == 0 {
            return self.trim();
        }
        let left = match self.zeroed_by_file(left) {
            Zeroing::Whole(len) => return self.zero_whole(len),
            Zeroing::Cut(len) => len,
        };
        if let Some(whole) = self.whole_blocks_in_place(left) {
            return whole;
        }
        let Some(buf) = self.job.buf.or_else(|| self.core.take_bounce(self.me)) else {
            let mut list = self.core.bounce_waiters;
            self.core.park(self.me, &mut list, On::Buffer);
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

    /// Who zeroes the next bytes, `left` at most, and how many of them? All of another op's are cut.
    fn zeroed_by_file(&self, left: u64) -> Zeroing {
        let file = &self.core.files[self.job.file.index()];
        if !matches!(self.job.op.kind, OpKind::Zero { .. }) || file.zero_unsupported {
            return Zeroing::Cut(left);
        }
        let (block, offset) = (file.hole_mask + 1, self.offset());
        let end = align_down(offset + left, block);
        match align_up(offset, block) {
            Some(start) if start == offset && start < end => Zeroing::Whole(end - start),
            Some(start) if start < end => Zeroing::Cut(start - offset),
            _ => Zeroing::Cut(left),
        }
    }

    /// Is what is awaited that the file zeroes something by itself?
    fn is_zeroed_by_file(&self) -> bool {
        match self.job.state {
            State::ZeroWhole { .. } => true,
            State::Direct => matches!(self.job.op.kind, OpKind::Zero { .. }),
            _ => false,
        }
    }

    fn zero_whole(&mut self, len: u64) -> Step<State> {
        let op = Op::bare(self.job.op.kind, self.job.file, self.offset(), len);
        self.core.enqueue(self.me, op);
        Step::Wait(State::ZeroWhole { len })
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
        let Some(mine) = self.my_claim() else { return Step::Done(Ok(())) };
        let file = &mut self.core.files[self.job.file.index()];
        let start = file.claims[mine].start;
        let others = file.claims.iter().any(|c| c.owner != self.me && c.end > start);
        let end = align_up(self.job.op.end(), u64::from(file.info.request_align));
        if end.is_none_or(|end| end <= file.len) || others || !file.info.can_grow {
            return Step::Done(Ok(()));
        }
        // Nobody may extend the file while its end is put back.
        file.claims[mine].end = u64::MAX;
        let len = file.len;
        self.core.enqueue(self.me, Op::bare(OpKind::Truncate, self.job.file, len, 0));
        Step::Wait(State::Trim)
    }

    /// The file has its length: who wanted it goes on, and so do all others, but for those in the block
    /// that was cut. Whoever needs the length to be stable flushes for that, as he must where no
    /// block is cut.
    fn answer_first(&mut self) {
        let mine = self.my_claim().expect("a change of length that cuts a block has a claim");
        let file = &mut self.core.files[self.job.file.index()];
        let block = u64::from(file.info.request_align.max(file.info.hole_align));
        file.claims[mine].end = file.claims[mine].start + block;
        let mut list = std::mem::take(&mut file.claim_waiters);
        self.core.wake_all(&mut list);
        self.open();
        let slot = self.core.ops.slot_mut(self.me);
        if let Origin::Child(parent) = std::mem::replace(&mut slot.origin, Origin::Chore) {
            self.core.op_done(parent, Ok(()));
        }
    }

    /// Until the page is written, direct writes to it would be made through memory as well.
    fn settle(&mut self) -> Step<State> {
        self.core.issue_flush(self.me, self.job.file);
        Step::Wait(State::Settle)
    }

    /// Does the file end inside a block?
    fn cuts(&self) -> bool {
        let file = &self.core.files[self.job.file.index()];
        file.len & file.hole_mask != 0
    }

    fn release(&mut self) {
        if let Some(buf) = self.job.buf.take() {
            self.core.give_bounce(buf);
        }
        let file = &mut self.core.files[self.job.file.index()];
        file.claims.retain(|c| c.owner != self.me);
        let mut list = std::mem::take(&mut file.claim_waiters);
        self.core.wake_all(&mut list);
        self.open();
        if self.core.closed > 0 {
            self.core.wake_closers();
        }
    }
}

/// For so long, or so many in a row, others wait at a closed gate.
const GATE_NS_MAX: u64 = 2_000_000;
const GATE_TURNS_MAX: u32 = 16;

/// The most that one op writes in place, in bytes: a whole number of blocks that an op's 32-bit
/// lengths hold with room to spare.
const MAX_IN_PLACE: u64 = 16 << 20;
