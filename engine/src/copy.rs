//! Copies one node to another.
//!
//! A job has some workers, each a request of its own, and each with memory for one piece. A worker
//! takes the next piece, asks the source what is where in it, and reads and writes, zeroes, or skips
//! one stretch after the other:
//!
//! ```text
//! Piece ─> Status ─> Read ─> Write ─┐        the last worker: Piece ─> Flush ─> done
//!   ^        ^ │ └─ zeros ─> Write ─┤
//!   │        └─┴─ skipped ──────────┤
//!   └────────────── end of piece <──┘
//! ```
//!
//! Pieces end in any order. A worker that waits for its turn or to be resumed holds nothing that
//! others wait for. The memory is given up when the last worker has ended, so when nothing of the job
//! is in flight.

use crate::copy_job::{PAGE, State, Worker};
use crate::core::{Core, GO_MAX};
use crate::events::NodeEvent;
use crate::op::{Base, Op, OpKind, Seg, Segs, Target};
use crate::request::{Event, Step};
use crate::status::Status;
use crate::units::{Errno, ReqId};

/// Delivers an event; answers when the worker has ended.
pub(crate) fn step(core: &mut Core, me: ReqId, key: u32, mut event: Event) -> Option<()> {
    let mut worker = core.workers[key as usize];
    for _ in 0..GO_MAX {
        let mut machine = Machine { core, me, worker: &mut worker };
        match machine.step(event) {
            Step::Go(state) => {
                worker.state = state;
                event = Event::Start;
            }
            Step::Wait(state) => {
                worker.state = state;
                core.workers[key as usize] = worker;
                return None;
            }
            Step::Last { .. } => unreachable!("a worker ends in a state of its own"),
            Step::Done(result) => {
                core.workers.remove(key as usize);
                end(core, worker.job, result);
                return Some(());
            }
        }
    }
    panic!("{me:?} copies on and on: {worker:?}");
}

/// A worker has ended: if it was the last, so has the job.
fn end(core: &mut Core, key: u32, result: Result<(), Errno>) {
    let job = &mut core.copies[key as usize];
    job.failed = job.failed.or(result.err());
    job.workers -= 1;
    // The others are to end as well.
    let mut waiters = std::mem::take(&mut job.waiters);
    let is_over = job.workers == 0;
    core.wake_all(&mut waiters);
    if !is_over {
        return;
    }
    let job = core.copies.remove(key as usize);
    core.mem.free_region(job.region);
    for node in [job.copy.source, job.copy.target] {
        core.nodes[node.index()].jobs -= 1;
    }
    let result = job.failed.map_or(Ok(()), Err);
    core.events.push(NodeEvent::JobEnded { job: job.id, result });
}

struct Machine<'a> {
    core: &'a mut Core,
    me: ReqId,
    worker: &'a mut Worker,
}

impl Machine<'_> {
    fn step(&mut self, event: Event) -> Step<State> {
        if self.core.copies[self.worker.job as usize].failed.is_some() {
            return Step::Done(Ok(()));
        }
        match (self.worker.state, event) {
            (_, Event::Io(Err(errno))) => Step::Done(Err(errno)),
            (State::Piece, _) => self.take_piece(),
            (State::Status, Event::Start) => self.ask_status(),
            (State::Status, _) => self.answered(),
            (State::Read { len }, _) => self.write(len),
            (State::Write { len }, _) => self.written(len),
            (State::Flush, _) => Step::Done(Ok(())),
        }
    }

    /// `len` bytes of the worker's memory, from byte `off` on.
    fn memory(&self, off: u64, len: u64) -> Seg {
        let region = self.core.copies[self.worker.job as usize].region;
        let off = self.worker.memory + off as u32;
        Seg { base: Base::Region(region), off, len: len as u32 }
    }

    fn take_piece(&mut self) -> Step<State> {
        let now = self.core.now;
        let job = &mut self.core.copies[self.worker.job as usize];
        if job.next == job.total {
            // Nothing more of it is in flight when the last comes here.
            if job.workers > 1 {
                return Step::Done(Ok(()));
            }
            let target = Target::Node(job.copy.target);
            let flush = Op { kind: OpKind::Flush, target, offset: 0, len: 0, segs: Segs::none() };
            self.core.issue(self.me, flush);
            return Step::Wait(State::Flush);
        }
        if job.is_paused || job.due > now {
            let mut list = std::mem::take(&mut job.waiters);
            self.core.park(self.me, &mut list);
            self.core.copies[self.worker.job as usize].waiters = list;
            return Step::Wait(State::Piece);
        }
        let mut len = (job.total - job.next).min(job.copy.piece as u64);
        if job.next < job.source_size {
            // No piece is of both.
            len = len.min(job.source_size - job.next);
        } else if job.copy.target_is_zero {
            // Nothing has to be done for the rest, however long it is.
            len = job.total - job.next;
        }
        (self.worker.at, self.worker.end) = (job.next, job.next + len);
        job.next += len;
        if let Some(rate) = job.copy.rate {
            let nanos = u128::from(len) * 1_000_000_000 / u128::from(rate);
            job.due = job.due.max(now).plus_ns(u64::try_from(nanos).unwrap_or(u64::MAX));
        }
        Step::Go(State::Status)
    }

    fn ask_status(&mut self) -> Step<State> {
        let Worker { at, end, .. } = *self.worker;
        if at == end {
            return Step::Go(State::Piece);
        }
        let job = &self.core.copies[self.worker.job as usize];
        let (source, offset) = (job.copy.source, job.copy.source_offset + at);
        if at >= job.source_size {
            return self.zero(end - at);
        }
        let seg = self.memory(job.copy.piece as u64, Status::BYTES as u64);
        self.core.mem.region_mut_of(seg).fill(0);
        self.core.ask_status(self.me, source, (offset, end - at), seg);
        Step::Wait(State::Status)
    }

    fn answered(&mut self) -> Step<State> {
        let Worker { at, end, .. } = *self.worker;
        let job = &self.core.copies[self.worker.job as usize];
        let (source, offset) = (job.copy.source, job.copy.source_offset + at);
        let piece = job.copy.piece as u64;
        let seg = self.memory(piece, Status::BYTES as u64);
        let status = Status::from_bytes(self.core.mem.region_mut_of(seg));
        let Some(status) = status.filter(|status| (1..=end - at).contains(&status.len)) else {
            return Step::Done(Err(Errno::IO));
        };
        if status.kind.is_zero() {
            return self.zero(status.len);
        }
        let segs = Segs::one(self.memory(0, status.len));
        self.core.issue(self.me, Op::read(Target::Node(source), offset, segs));
        Step::Wait(State::Read { len: status.len })
    }

    /// The next `len` bytes are zeros.
    fn zero(&mut self, len: u64) -> Step<State> {
        let copy = self.core.copies[self.worker.job as usize].copy;
        if copy.target_is_zero {
            return self.written(len);
        }
        let (kind, target) = (OpKind::Zero { unmap: true }, Target::Node(copy.target));
        let offset = copy.target_offset + self.worker.at;
        let op = Op { kind, target, offset, len, segs: Segs::none() };
        self.core.issue(self.me, op);
        Step::Wait(State::Write { len })
    }

    fn write(&mut self, len: u64) -> Step<State> {
        let copy = &self.core.copies[self.worker.job as usize].copy;
        let (target, offset) = (Target::Node(copy.target), copy.target_offset + self.worker.at);
        let segs = Segs::one(self.memory(0, len));
        let kind = OpKind::Write { fua: false };
        self.core.issue(self.me, Op { kind, target, offset, len, segs });
        Step::Wait(State::Write { len })
    }

    fn written(&mut self, len: u64) -> Step<State> {
        self.worker.at += len;
        self.core.copies[self.worker.job as usize].done += len;
        Step::Go(State::Status)
    }
}

/// Bytes of memory that each worker has.
pub(crate) fn memory_of(piece: usize) -> usize {
    piece + PAGE as usize
}
