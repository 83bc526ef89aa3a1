//! Copies one node to another.
//!
//! A job has some workers, each a request of its own, and each with memory for one piece. What is where
//! is asked ahead of them, by one at a time, about as much as there is: the answer is everybody's. Who
//! comes next takes a piece of it, and reads and writes that; zeros are taken as one, however many they
//! are, and zeroed or skipped:
//!
//! ```text
//!        nothing is known of what comes next
//! Status <──────────── Piece ──> Read ─> Write ─┐      the last worker: Piece ─> Flush ─> done
//!    └───────────────> ^ │ └─ zeros ───> Write ─┤
//!                      │ └─── skipped ───┐      │
//!                      └─────────────────┴──────┘
//! ```
//!
//! Pieces end in any order. A worker that waits for its turn, for the answer or to be resumed holds
//! nothing that others wait for; whoever has begun to read or zero wakes the next. The memory is given up when the
//! last worker has ended, so when nothing of the job is in flight.

use crate::copy_job::{CopyJob, PAGE, Seen, State, Worker};
use crate::core::{Core, GO_MAX};
use crate::events::NodeEvent;
use crate::mutant;
use crate::op::{Base, Op, OpKind, Seg, Segs, Target};
use crate::request::{Event, Step};
use crate::status::Status;
use crate::units::{Errno, ReqId};
use crate::wait::On;

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
    let forgets = job.failed.is_some() && mutant!("cancelled_copy_forgets_workers");
    let is_over = job.workers == 0 || forgets;
    core.wake_all(&mut waiters);
    if !is_over {
        return;
    }
    let job = core.copies.remove(key as usize);
    core.mem.free_region(job.region);
    for node in [job.copy.source, job.copy.target] {
        core.nodes[node.index()].jobs -= u32::from(!mutant!("copied_disk_stays_in_use"));
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
            (State::Status { at, asked }, _) => self.answered(at, asked),
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

    fn job(&mut self) -> &mut CopyJob {
        &mut self.core.copies[self.worker.job as usize]
    }

    fn take_piece(&mut self) -> Step<State> {
        let now = self.core.now;
        let job = self.job();
        if job.next == job.total {
            // Nothing more of it is in flight when the last comes here.
            if job.workers > 1 || mutant!("copy_ends_before_its_flush") {
                return Step::Done(Ok(()));
            }
            let target = Target::Node(job.copy.target);
            let flush = Op { kind: OpKind::Flush, target, offset: 0, len: 0, segs: Segs::none() };
            self.core.issue(self.me, flush);
            return Step::Wait(State::Flush);
        }
        if job.is_paused || job.is_asking {
            return self.park();
        }
        match job.seen {
            _ if job.next >= job.source_size => {
                // Where nothing has to be done it is one piece.
                let most = if job.copy.target_is_zero { u64::MAX } else { AT_ONCE };
                let len = (job.total - job.next).min(most);
                self.zero(len)
            }
            Seen::Zeros { end } if job.next < end => {
                let len = end - job.next;
                self.zero(len)
            }
            Seen::Data { end } if job.next < end => {
                if job.due > now {
                    return self.park();
                }
                let len = (end - job.next).min(job.copy.piece as u64);
                if let Some(rate) = job.copy.rate {
                    let nanos = u128::from(len) * 1_000_000_000 / u128::from(rate);
                    let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
                    job.due = job.due.max(now).plus_ns(nanos);
                }
                self.read(len)
            }
            _ => self.ask(),
        }
    }

    /// Waits until somebody looks again: who asks, who resumes the job, or the time.
    fn park(&mut self) -> Step<State> {
        let mut list = std::mem::take(&mut self.job().waiters);
        self.core.park(self.me, &mut list, On::Job);
        self.job().waiters = list;
        Step::Wait(State::Piece)
    }

    /// Takes the next `len` bytes.
    fn take(&mut self, len: u64) {
        let job = &mut self.core.copies[self.worker.job as usize];
        self.worker.at = job.next;
        job.next += len;
    }

    /// Issues what is to be done with what was taken; it is somebody else's turn then.
    fn issue(&mut self, op: Op) {
        self.core.issue(self.me, op);
        let mut list = std::mem::take(&mut self.job().waiters);
        self.core.wake_first(&mut list);
        self.job().waiters = list;
    }

    /// Asks what comes next, about as much as is left of the disk.
    fn ask(&mut self) -> Step<State> {
        let job = self.job();
        job.is_asking = true;
        let (source, at) = (job.copy.source, job.next);
        let asked = (job.source_size - at).min(AT_ONCE);
        let seg = self.status_memory();
        self.core.mem.region_mut_of(seg).fill(0);
        self.core.ask_status(self.me, source, (at, asked), seg);
        Step::Wait(State::Status { at, asked })
    }

    fn status_memory(&mut self) -> Seg {
        let piece = self.job().copy.piece as u64;
        self.memory(piece, Status::BYTES as u64)
    }

    fn answered(&mut self, at: u64, asked: u64) -> Step<State> {
        let seg = self.status_memory();
        let status = Status::from_bytes(self.core.mem.region_mut_of(seg));
        let Some(status) = status.filter(|status| (1..=asked).contains(&status.len)) else {
            return Step::Done(Err(Errno::IO));
        };
        let end = at + status.len;
        let job = self.job();
        job.is_asking = false;
        job.seen = if status.kind.is_zero() { Seen::Zeros { end } } else { Seen::Data { end } };
        Step::Go(State::Piece)
    }

    /// The next `len` bytes are zeros.
    fn zero(&mut self, len: u64) -> Step<State> {
        self.take(len);
        let copy = self.job().copy;
        if copy.target_is_zero {
            return self.written(len);
        }
        let (kind, target) = (OpKind::Zero { unmap: true }, Target::Node(copy.target));
        self.issue(Op { kind, target, offset: self.worker.at, len, segs: Segs::none() });
        Step::Wait(State::Write { len })
    }

    fn read(&mut self, len: u64) -> Step<State> {
        self.take(len);
        let source = Target::Node(self.job().copy.source);
        let segs = Segs::one(self.memory(0, len));
        self.issue(Op::read(source, self.worker.at, segs));
        Step::Wait(State::Read { len })
    }

    fn write(&mut self, len: u64) -> Step<State> {
        let target = Target::Node(self.job().copy.target);
        let segs = Segs::one(self.memory(0, len));
        let kind = OpKind::Write { fua: false };
        self.core.issue(self.me, Op { kind, target, offset: self.worker.at, len, segs });
        Step::Wait(State::Write { len })
    }

    fn written(&mut self, len: u64) -> Step<State> {
        self.job().done += len;
        Step::Go(State::Piece)
    }
}

/// Bytes that are asked about, and zeroed, at once: bounds what a driver does in one step.
const AT_ONCE: u64 = 1 << 30;

/// Bytes of memory that each worker has.
pub(crate) fn memory_of(piece: usize) -> usize {
    piece + PAGE as usize
}
