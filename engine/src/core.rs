//! The engine's half that knows no driver: slots, ops, wait lists, buffers, files.
//!
//! Drivers reach it through [`Cx`](crate::step::Cx); the engine around it routes completions in
//! and steps out. Kept apart from the generic engine so that a step can borrow it while the
//! driver that is being stepped is borrowed too.

use std::hash::{Hash, Hasher};
use std::io;

use slab::Slab;

use crate::backend::FileInfo;
use crate::copy_job::{CopyJob, Guard, Mirror, Worker};
use crate::events::{EVENTS_MAX, NodeEvent};
use crate::file::{FileState, Flush, NextFlush};
use crate::file_job::{self, Job};
use crate::held::Abandoned;
use crate::limits::Limits;
use crate::mem::Memory;
use crate::mutant;
use crate::node::{NodeRecord, Stage};
use crate::op::{Base, Completion, Hole, Op, OpKind, Seg, Segs, Target};
use crate::ops::{OpRecord, Ops};
use crate::queue::Queue;
use crate::request::{Io, IoKind};
use crate::slots::{Cause, Link, Origin, Slot, Waits, Work};
use crate::stats::{Ended, Stats};
use crate::status::{Status, StatusKind};
use crate::units::{BufId, Errno, FileId, HostOffset, JobId, NodeId, OpId, RegionId, ReqId, Time};
use crate::wait::{On, WaitList};

/// `Go` steps in a row that no sound machine or driver reaches.
pub(crate) const GO_MAX: usize = 64;

#[derive(Debug)]
pub(crate) struct Core {
    pub limits: Limits,
    pub now: Time,
    pub ops: Ops,
    /// Ops for the backend, oldest first.
    pub out: Queue<OpId>,
    /// Requests with an event to deliver, oldest first.
    pub ready: Queue<ReqId>,
    pub files: Vec<FileState>,
    /// Places in it that are vacant.
    pub files_free: Vec<usize>,
    pub nodes: Vec<NodeRecord>,
    pub nodes_free: Vec<usize>,
    /// Nodes to which something happens by itself.
    pub moving: usize,
    /// Regions of the node that is added next.
    pub loose_regions: Vec<RegionId>,
    pub jobs: Slab<Job>,
    /// Copies that an embedder has started, and who does them.
    pub copies: Slab<CopyJob>,
    pub workers: Slab<Worker>,
    /// Writes to disks that are copied as they were, or mirrored.
    pub guards: Slab<Guard>,
    /// The serial number of the next one.
    pub next_job: u32,
    pub mem: Memory,
    pub bufs_free: Vec<BufId>,
    /// Of each buffer that is taken: the node it is taken for.
    pub buf_owner: Vec<usize>,
    pub buf_waiters: WaitList,
    pub bounce_free: Vec<BufId>,
    pub bounce_waiters: WaitList,
    /// Requests that wait for writes in flight to end: they look again after each harvest.
    pub write_waiters: WaitList,
    /// Chores that wait until nobody uses what was given up any more: they look again after each
    /// harvest.
    pub past_waiters: WaitList,
    /// Requests that are held, of all nodes.
    pub held: usize,
    /// Requests in flight that were abandoned, and those that have ended since the engine last looked.
    pub abandoned: usize,
    pub abandoned_ended: usize,
    /// Gates that are closed.
    pub closed: u32,
    /// For `Engine::poll_event`.
    pub events: Vec<NodeEvent>,
    /// Nodes whose images were found corrupt.
    pub corrupt: Vec<NodeId>,
    /// Nodes whose chore was asked for.
    pub asked: Vec<NodeId>,
    /// Guest requests that have ended, oldest first, until they are polled.
    pub finished: Queue<ReqId>,
    pub serial: u32,
    /// See [`Cx::end_epoch`](crate::step::Cx::end_epoch).
    pub epoch: u32,
    pub stats: Stats,
    /// Nodes with ends that are not in the statistics yet.
    pub touched: Vec<NodeId>,
}

/// What disks have shares of.
#[derive(Clone, Copy, Debug)]
enum Share {
    /// Pool buffers, for drivers.
    Bufs,
    /// Bounce buffers.
    Bounces,
}

impl Share {
    /// With so many a disk goes on: the least values of [`Limits::buffers`] and
    /// [`Limits::bounce_buffers`].
    fn enough(self) -> usize {
        match self {
            Share::Bufs => 2,
            Share::Bounces => 1,
        }
    }
}

/// How long after it was given up space goes back to the file system, so that much goes at once.
pub(crate) const GIVE_BACK_MS: u64 = 500;

impl Core {
    pub fn new(limits: Limits) -> Core {
        let slots = limits.requests * 4;
        let buffers = limits.buffers + limits.bounce_buffers;
        let ids = |from: usize, to: usize| (from as u32..to as u32).rev().map(BufId).collect();
        Core {
            now: Time(0),
            ops: Ops::new(slots, limits.ops),
            out: Queue::with_capacity(limits.ops),
            ready: Queue::with_capacity(slots),
            files: Vec::new(),
            files_free: Vec::new(),
            nodes: Vec::new(),
            nodes_free: Vec::new(),
            moving: 0,
            loose_regions: Vec::new(),
            jobs: Slab::with_capacity(slots),
            copies: Slab::new(),
            workers: Slab::new(),
            guards: Slab::new(),
            next_job: 0,
            mem: Memory::new(slots, buffers, limits.buffer_size),
            bufs_free: ids(0, limits.buffers),
            buf_owner: vec![0; buffers],
            buf_waiters: WaitList::new(),
            bounce_free: ids(limits.buffers, buffers),
            bounce_waiters: WaitList::new(),
            write_waiters: WaitList::new(),
            past_waiters: WaitList::new(),
            held: 0,
            abandoned: 0,
            abandoned_ended: 0,
            closed: 0,
            events: Vec::new(),
            corrupt: Vec::new(),
            asked: Vec::with_capacity(4),
            finished: Queue::with_capacity(limits.requests),
            serial: 0,
            epoch: 0,
            stats: Stats::default(),
            touched: Vec::with_capacity(4),
            limits,
        }
    }

    /// A new request, to be begun; `bits` as in [`Mem::misaligned_bits`](crate::mem::Mem).
    #[inline(always)]
    pub fn begin(&mut self, node: NodeId, io: Io, origin: Origin, tag: u64, bits: u32) -> ReqId {
        let (id, slot) = self.ops.claim_slot();
        (slot.io, slot.origin, slot.tag) = (io, origin, tag);
        (slot.node, slot.base_bits) = (node, bits);
        (slot.serial, slot.epoch, slot.ordinal) = (self.serial, self.epoch, 0);
        (slot.issued, slot.cause, slot.waits, slot.label) =
            (false, Cause::Begin, Waits::Nothing, 0);
        self.serial = self.serial.wrapping_add(1);
        if origin != Origin::Guest
            && let Some(record) = self.nodes.get_mut(node.index())
        {
            record.inner += 1;
        }
        self.ready.push(id);
        id
    }

    /// Sends `op` on its way for `request`.
    pub fn issue(&mut self, request: ReqId, op: Op) {
        match op.target {
            Target::File(file) => self.issue_to_file(request, file, op),
            Target::Node(node) => self.issue_to_node(request, node, op),
            Target::Cpu => self.enqueue(request, op),
        }
    }

    #[inline(never)]
    fn issue_to_file(&mut self, request: ReqId, file: FileId, op: Op) {
        if op.kind.has_memory() && self.files[file.index()].is_direct(&op, &self.mem) {
            self.enqueue(request, op);
        } else {
            self.issue_otherwise(request, file, op);
        }
    }

    /// Everything but a read or write that the file takes as it is.
    fn issue_otherwise(&mut self, request: ReqId, file: FileId, op: Op) {
        match op.kind {
            OpKind::Flush => self.issue_flush(request, file),
            OpKind::Hole => self.ask_file(request, file, op),
            OpKind::Discard => {
                let op = self.files[file.index()].within_blocks(op);
                if self.give_up(file, op.offset, op.end()) {
                    self.ops.slot_mut(request).issued = true;
                } else {
                    self.take_apart(request, file, op);
                }
            }
            OpKind::Zero { unmap } if op.len <= self.limits.zeros_written => {
                self.write_zeros(request, file, op, unmap);
            }
            _ => self.take_apart(request, file, op),
        }
    }

    /// Answers a request that asks what is where by what the file says, if it does.
    fn ask_file(&mut self, request: ReqId, file: FileId, op: Op) {
        if self.files[file.index()].info.knows_holes {
            return self.enqueue(request, op);
        }
        self.answer_of_file(request, &op, Hole { is_hole: false, len: op.len });
        self.ops.slot_mut(request).issued = true;
    }

    /// What a file has said is the answer of the request that asked.
    fn answer_of_file(&mut self, request: ReqId, op: &Op, hole: Hole) {
        let io = self.ops.slot(request).io;
        let (IoKind::Status { depth }, Target::File(file)) = (io.kind, op.target) else {
            panic!("{io:?} asks for no status")
        };
        let kind = if hole.is_hole { StatusKind::Zero } else { StatusKind::Data };
        let host = Some((file, HostOffset(op.offset)));
        let len = hole.len.clamp(1, op.len);
        self.answer_status(request, Status { kind, len, depth, host });
    }

    /// Zeros a file's bytes by writing zeros: no lock is taken for that. If they may be unmapped,
    /// that comes later.
    fn write_zeros(&mut self, request: ReqId, file: FileId, op: Op, unmap: bool) {
        let segs = Segs::one(Seg::zeros(op.len as u32));
        self.issue_to_file(request, file, Op::write(file, op.offset, segs));
        // A device may have other bytes after a discard.
        if unmap && self.files[file.index()].info.can_grow {
            let hole = self.files[file.index()].within_blocks(op);
            self.give_up(file, hole.offset, hole.end());
        }
    }

    /// Nobody needs these bytes any more, whole blocks: the file gets to know it later. False: no, now.
    fn give_up(&mut self, file: FileId, start: u64, end: u64) -> bool {
        let due = self.now.plus_ms(GIVE_BACK_MS);
        let given_up = &mut self.files[file.index()].given_up;
        let was_empty = given_up.is_empty();
        let noted = given_up.add(start, end);
        if was_empty && !given_up.is_empty() && !given_up.is_going_on {
            given_up.due = due;
        }
        noted
    }

    /// When space is to be given back next.
    pub fn give_back_due(&self) -> Option<Time> {
        let given_up = self.files.iter().filter(|file| !file.is_held).map(|file| &file.given_up);
        let waiting = given_up.filter(|given_up| !given_up.is_empty() && !given_up.is_going_on);
        waiting.map(|given_up| given_up.due).min()
    }

    /// Begins to give back the space that was given up of the files that `wants` picks. Is there some?
    pub fn give_back(&mut self, wants: impl Fn(&FileState) -> bool) -> bool {
        let mut began = false;
        for at in 0..self.files.len() {
            let file = &self.files[at];
            let id = file.id;
            if !file.given_up.is_empty() && !file.given_up.is_going_on && wants(file) {
                self.begin_give_back(id);
                began = true;
            }
        }
        began
    }

    /// Begins to take an op of `request` apart: see `align.rs`.
    #[cold]
    fn take_apart(&mut self, request: ReqId, file: FileId, op: Op) {
        let node = self.ops.slot(request).node;
        let job = Job::new(file, op, file_job::State::Claim);
        self.begin_job(job, node, Origin::Child(request));
        self.expect_result(request);
    }

    fn begin_job(&mut self, job: Job, node: NodeId, origin: Origin) {
        let io = Io { kind: IoKind::Read, offset: job.op.offset, len: job.op.len };
        let key = self.jobs.insert(job) as u32;
        let id = self.begin(node, io, origin, 0, 0);
        let slot = self.ops.slot_mut(id);
        (slot.work, slot.cause) = (Work::Align(key), Cause::Start);
    }

    /// Begins to give back what was given up of a file.
    fn begin_give_back(&mut self, file: FileId) {
        self.files[file.index()].given_up.is_going_on = true;
        let op = Op::bare(OpKind::Discard, file, 0, 0);
        let job = Job::new(file, op, file_job::State::Gate);
        self.begin_job(job, NodeId::NONE, Origin::Chore);
    }

    /// Something has ended: who has closed a gate looks again whether all has.
    #[cold]
    pub fn wake_closers(&mut self) {
        for at in 0..self.files.len() {
            let mut list = self.files[at].gate.quiet_waiter;
            self.wake_all(&mut list);
            self.files[at].gate.quiet_waiter = list;
        }
    }

    /// `request` wants everything that has completed on `file` to be stable.
    pub fn issue_flush(&mut self, request: ReqId, file: FileId) {
        match self.files[file.index()].ask_flush(request) {
            Flush::Failed(errno) => {
                let slot = self.ops.slot_mut(request);
                slot.issued = true;
                slot.failed = slot.failed.or(Some(errno));
            }
            Flush::NotOwed => self.ops.slot_mut(request).issued = true,
            Flush::Issue => self.enqueue_flush(request, file),
            Flush::Ride => self.expect_result(request),
        }
    }

    fn enqueue_flush(&mut self, request: ReqId, file: FileId) {
        let uncovered = self.ops.are_changing(file) && !mutant!("flush_covers_what_is_in_flight");
        self.files[file.index()].flush_issued(uncovered);
        self.stats.flushes += 1;
        self.enqueue(request, Op::flush(file));
    }

    /// A flush of a file has come back.
    fn complete_flush(&mut self, file: FileId, leader: ReqId, result: Result<(), Errno>) {
        let result = if mutant!("flush_error_swallowed") { Ok(()) } else { result };
        let told = self.files[file.index()].flush_ended(leader, result);
        if let Err(errno) = result
            && mutant!("failed_flush_poisons_others")
        {
            self.files.iter_mut().for_each(|other| other.poison(errno));
        }
        for &rider in &told {
            self.op_done(rider, result);
        }
        match self.files[file.index()].next_flush(told) {
            NextFlush::NotOwed => {}
            NextFlush::Issue(first) => {
                self.ops.slot_mut(first).pending -= 1;
                self.enqueue_flush(first, file);
            }
            NextFlush::Failed(waiting, errno) => {
                for &rider in &waiting {
                    self.op_done(rider, Err(errno));
                }
                self.files[file.index()].next_flush(waiting);
            }
        }
    }

    /// Makes `op` a request of its own, to this node or one below it.
    fn issue_to_node(&mut self, request: ReqId, node: NodeId, op: Op) {
        let kind = match op.kind {
            OpKind::Read => IoKind::Read,
            OpKind::Write { fua } => IoKind::Write { fua, compressed: false },
            OpKind::Flush => IoKind::Flush,
            OpKind::Discard => IoKind::Discard,
            OpKind::Zero { unmap } => IoKind::Zero { unmap, fua: false },
            _ => panic!("no piece of a request: {op:?}"),
        };
        let seg = match op.segs.as_slice() {
            &[seg] => seg,
            [] if !op.kind.has_memory() => Seg::zeros(0),
            _ => panic!("a node is given one segment: {op:?}"),
        };
        // Who writes below may have to wait for pool buffers there, and so holds none.
        let writes_below = op.kind.modifies() && node != self.ops.slot(request).node;
        let holds_buf = matches!(seg.base, Base::Pool(_));
        assert!(!(writes_below && holds_buf), "written below from the pool: {op:?}");
        self.issue_request(request, node, Io { kind, offset: op.offset, len: op.len }, seg);
    }

    /// Makes `io` a request to `node`, with `seg` for its memory, that `request` waits for.
    pub fn issue_request(&mut self, request: ReqId, node: NodeId, io: Io, seg: Seg) {
        let settles = matches!(self.nodes[node.index()].stage, Stage::Settling | Stage::Settled(_));
        let is_above = node != self.ops.slot(request).node;
        debug_assert!(
            !(settles && is_above),
            "{node:?} settles, and is asked for something: {io:?}"
        );
        let bits = self.mem.misaligned_bits(seg.base);
        let child = self.begin(node, io, Origin::Child(request), 0, bits);
        let slot = self.ops.slot_mut(child);
        (slot.base, slot.base_off) = (seg.base, seg.off);
        // A part of what has come past is not looked at again; and a pull changes nothing.
        let parent = self.ops.slot(request);
        let is_looked_at = match parent.work {
            Work::Copy(worker) => !self.is_pull(worker),
            _ => parent.node != node,
        };
        if is_looked_at {
            self.guard(child);
        }
        self.expect_result(request);
    }

    /// Has `node`, a layer below, answer what `request` asks, about `len` bytes at `offset`.
    pub fn issue_status(&mut self, request: ReqId, node: NodeId, offset: u64, len: u64) {
        let slot = self.ops.slot(request);
        let IoKind::Status { depth } = slot.io.kind else {
            panic!("{request:?} does not ask what is where: {:?}", slot.io)
        };
        let (base, base_off, bits) = (slot.base, slot.base_off, slot.base_bits);
        let io = Io { kind: IoKind::Status { depth: depth.saturating_add(1) }, offset, len };
        let child = self.begin(node, io, Origin::Child(request), 0, bits);
        let slot = self.ops.slot_mut(child);
        (slot.base, slot.base_off) = (base, base_off);
        self.expect_result(request);
    }

    /// Has `node` answer what is at `offset`, for up to `len` bytes, into `seg`, which is
    /// [`Status::BYTES`] long.
    pub fn ask_status(
        &mut self,
        request: ReqId,
        node: NodeId,
        (offset, len): (u64, u64),
        seg: Seg,
    ) {
        let io = Io { kind: IoKind::Status { depth: 0 }, offset, len };
        self.issue_request(request, node, io, seg);
    }

    /// A copy is to end.
    pub fn cancel_copy(&mut self, key: usize) {
        let copy = &mut self.copies[key];
        copy.failed = copy.failed.or(Some(Errno::CANCELED));
        if mutant!("cancelled_copy_sleeps_on") {
            return;
        }
        self.wake_workers(key as u32);
        self.wake_stopped(key as u32);
        self.wake_unseen(key as u32);
        self.let_guests_go(key as u32);
    }

    /// It begins nothing more until it is resumed.
    pub fn pause_copy(&mut self, key: u32) {
        let copy = &mut self.copies[key as usize];
        copy.is_paused = true;
        if copy.mirror.holds && !copy.mirror.is_over {
            // Nobody waits for what stands still.
            copy.mirror.holds = false;
            self.let_guests_go(key);
        }
    }

    /// Those that have stopped because something failed try again.
    pub fn wake_stopped(&mut self, key: u32) {
        let mut stopped = std::mem::take(&mut self.copies[key as usize].stopped);
        self.wake_all(&mut stopped);
    }

    /// The workers of a copy that wait for their turn, or to be resumed, look again.
    pub fn wake_workers(&mut self, key: u32) {
        let copy = &mut self.copies[key as usize];
        copy.awaits_due = false;
        let mut waiters = std::mem::take(&mut copy.waiters);
        self.wake_all(&mut waiters);
    }

    /// Those that wait until somebody has seen what they have read look again.
    pub fn wake_unseen(&mut self, key: u32) {
        let mut unseen = std::mem::take(&mut self.copies[key as usize].unseen);
        self.wake_all(&mut unseen);
    }

    /// Something has been read that a copy reads before it is changed, or need not be any more: who
    /// waits to change it looks again.
    pub fn let_guests_go(&mut self, key: u32) {
        let copy = &mut self.copies[key as usize];
        copy.held_since = None;
        if copy.failed.is_some() && mutant!("failed_copy_holds_guests") {
            return;
        }
        let mut guests = std::mem::take(&mut copy.guests);
        self.wake_all(&mut guests);
    }

    /// The embedder has heard that the mirror of this job has taken a place: writes go on there.
    pub fn tell_moved(&mut self, job: JobId) {
        for at in 0..self.nodes.len() {
            if self.nodes[at].moved_untold == Some(job) {
                self.nodes[at].moved_untold = None;
                self.move_abandoned(at);
                self.wake_for_move(at);
            }
        }
    }

    /// A drain begins: a mirror of whose end the embedder has not heard is cancelled. The disk is where it was: neither
    /// has been written to since.
    pub fn cancel_untold(&mut self) {
        for at in 0..self.nodes.len() {
            let Some(untold) = self.nodes[at].moved_untold else { continue };
            (self.nodes[at].moved_to, self.nodes[at].moved_untold) = (None, None);
            for event in &mut self.events {
                if let NodeEvent::JobEnded { job, result } = event
                    && *job == untold
                {
                    *result = Err(Errno::CANCELED);
                }
            }
            self.wake_for_move(at);
            self.nodes[at].set_open_to();
        }
    }

    /// Those who waited for a mirror's end to be heard go on.
    fn wake_for_move(&mut self, at: usize) {
        let mut list = std::mem::take(&mut self.nodes[at].wait_for_move);
        self.wake_all(&mut list);
    }

    /// Writes that were given up go on where the disk is now, and what is submitted there waits for them.
    fn move_abandoned(&mut self, from: usize) {
        if mutant!("abandoned_writes_stay_behind") {
            return;
        }
        let there = self.moved_and_told(self.nodes[from].id);
        let old = std::mem::take(&mut self.nodes[from].hold.abandoned);
        self.nodes[there.index()].hold.abandoned.extend(old);
        self.nodes[from].set_open_to();
        self.nodes[there.index()].set_open_to();
    }

    /// Has a mirror taken this node's place?
    pub fn has_moved(&self, node: NodeId) -> bool {
        self.nodes[node.index()].moved_to.is_some()
    }

    /// Where requests to this node go.
    pub fn moved_and_told(&self, mut node: NodeId) -> NodeId {
        loop {
            let record = &self.nodes[node.index()];
            match record.moved_to {
                Some(there) if record.moved_untold.is_none() => node = there,
                _ => return node,
            }
        }
    }

    /// A write has ended that was looked at: who mirrors its node notes what it was about.
    pub fn guarded_write_ended(&mut self, request: ReqId) {
        let slot = self.ops.slot(request);
        let (node, io) = (slot.node, slot.io);
        let record = &mut self.nodes[node.index()];
        if record.moved_to.is_some() {
            // It was of the other node; or it was the last of this one's, and is there as well.
            record.guarded = record.guarded.saturating_sub(1);
            return;
        }
        record.guarded -= 1;
        let is_last = record.guarded == 0;
        let mut woken = Vec::new();
        for (key, job) in self.copies.iter_mut().filter(|(_, job)| job.mirrors(node)) {
            if !mutant!("mirror_forgets_writes") {
                job.note_changed(io.offset, io.end());
            }
            if is_last && job.mirror.holds {
                woken.push(key);
            }
        }
        for key in woken {
            let mut waiters = std::mem::take(&mut self.copies[key].waiters);
            self.wake_all(&mut waiters);
        }
    }

    /// Is the job of this worker a pull?
    fn is_pull(&self, worker: u32) -> bool {
        self.copies[self.workers[worker as usize].job as usize].copy.is_pull()
    }

    /// May a request still change this node that began before `first_seen`, when nobody looked?
    pub fn is_changed_unseen(&self, node: NodeId, first_seen: u32) -> bool {
        let is_old =
            |slot: &Slot| first_seen.wrapping_sub(slot.serial).wrapping_sub(1) < u32::MAX / 2;
        let goes_on = |slot: &Slot| !matches!(slot.waits, Waits::Poll | Waits::Free);
        let mut slots = self.ops.slots();
        slots.any(|(_, slot)| {
            slot.node == node && slot.io.kind.modifies() && is_old(slot) && goes_on(slot)
        })
    }

    /// The request, which is new, changes what it is about: if that is copied as it was, then only after
    /// that has been read.
    pub fn guard(&mut self, request: ReqId) {
        let slot = self.ops.slot(request);
        let record = &self.nodes[slot.node.index()];
        let is_looked_at = record.guards > 0 || record.moved_untold.is_some();
        if !slot.io.kind.modifies() || !is_looked_at {
            return;
        }
        let key = self.guards.insert(Guard::default()) as u32;
        let slot = self.ops.slot_mut(request);
        (slot.work, slot.cause) = (Work::Guard(key), Cause::Start);
    }

    /// The time of copies that wait for theirs has come.
    #[cold]
    pub fn wake_copies(&mut self) {
        let due: Vec<usize> = self.copies.iter().map(|(key, _)| key).collect();
        for key in due {
            let copy = &mut self.copies[key];
            let is_held_up = copy.holds_until().is_some_and(|until| until <= self.now);
            if is_held_up && copy.mirror.holds && !copy.mirror.is_over {
                copy.mirror = Mirror { holds: false, passes: 0, ..copy.mirror };
                let mut waiters = std::mem::take(&mut copy.waiters);
                self.wake_all(&mut waiters);
                self.let_guests_go(key as u32);
                continue;
            }
            if is_held_up {
                copy.failed = copy.failed.or(Some(Errno::TIMED_OUT));
                self.cancel_copy(key);
                continue;
            }
            if copy.deadline().is_some_and(|due| due <= self.now) {
                self.wake_workers(key as u32);
            }
        }
    }

    /// Puts the answer into the memory of a request that asks what is where.
    pub fn answer_status(&mut self, request: ReqId, status: Status) {
        let slot = self.ops.slot(request);
        let (base, off, len) = (slot.base, slot.base_off, Status::BYTES as u32);
        self.mem.scatter(&Segs::one(Seg { base, off, len }), 0, &status.to_bytes());
    }

    /// Sends a read or write on its way, of `len` bytes of the request's own memory from byte `off`
    /// on: what most ops are.
    #[inline]
    pub fn transfer(
        &mut self,
        request: ReqId,
        kind: OpKind,
        (file, offset): (FileId, u64),
        (off, len): (u64, u64),
    ) {
        let Core { ops, files, .. } = self;
        let (slot, state) = (ops.slot(request), &mut files[file.index()]);
        let seg = slot.guest(off, len);
        if !state.takes(kind, offset, seg, slot.base_bits) {
            let (target, segs) = (Target::File(file), Segs::one(seg));
            return self.issue_to_file(request, file, Op { kind, target, offset, len, segs });
        }
        if kind.modifies() {
            state.note_issued_to(offset + len);
        }
        let (id, record) = ops.claim(request);
        record.transfer(kind, file, offset, seg);
        self.out.push(id);
    }

    /// Counts an op of `request` whose result will come through [`Core::op_done`].
    #[inline(always)]
    pub fn expect_result(&mut self, request: ReqId) {
        let slot = self.ops.slot_mut(request);
        slot.pending += 1;
        slot.issued = true;
    }

    /// A place in the queue for an op of `request`, to be filled in.
    fn queue_op(&mut self, request: ReqId) -> &mut OpRecord {
        let (id, record) = self.ops.claim(request);
        self.out.push(id);
        record
    }

    /// Hands an op to the backend as it is.
    #[inline]
    pub fn enqueue(&mut self, request: ReqId, op: Op) {
        let end = op.end();
        self.enqueue_padded(request, op, end);
    }

    /// As [`Core::enqueue`], for a write that was padded to whole blocks: the file shall not stay
    /// longer than `end` on its account.
    pub fn enqueue_padded(&mut self, request: ReqId, op: Op, end: u64) {
        if op.kind.modifies() {
            let Target::File(file) = op.target else { unreachable!("checked by issue") };
            self.files[file.index()].note_issued(&op, end);
        }
        let record = self.queue_op(request);
        (record.op, record.moved) = (op, 0);
    }

    /// See [`Cx::is_past`](crate::step::Cx::is_past).
    pub fn is_past(&self, node: NodeId, epoch: u32) -> bool {
        let is_old = |id: ReqId| {
            let slot = self.ops.slot(self.user_of(id));
            // Wrapping: epochs are close together.
            let began_by_then = epoch.wrapping_sub(slot.epoch) < u32::MAX / 2;
            slot.node == node && slot.origin != Origin::Chore && began_by_then
        };
        let is_job = |slot: &Slot| matches!(slot.work, Work::Align(_));
        !self.ops.iter().any(|(_, op)| is_old(op.owner.request))
            && !self.ops.slots().any(|(id, slot)| is_job(slot) && is_old(id))
    }

    /// Who issued the op that the request is of the engine's own making for; otherwise itself.
    fn user_of(&self, mut id: ReqId) -> ReqId {
        while let Slot { work: Work::Align(_), origin: Origin::Child(parent), .. } =
            *self.ops.slot(id)
        {
            id = parent;
        }
        id
    }

    /// How many more ops the running step may issue.
    #[inline]
    pub fn room(&self, request: ReqId) -> usize {
        // A request of its own, for a piece, takes a slot.
        let slots = (self.limits.requests * 4).saturating_sub(self.ops.live());
        let free = self.limits.ops.saturating_sub(self.ops.len()).min(slots);
        let may_have_one = !self.ops.slot(request).issued && !mutant!("no_room_is_left_for_a_step");
        if free == 0 && may_have_one { 1 } else { free }
    }

    /// Takes in what the backend says of an op.
    #[inline(always)]
    pub fn complete(&mut self, done: Completion) {
        let Some(slot) = self.ops.take_passed(done) else {
            return self.complete_otherwise(done);
        };
        let (node, label, submitted) = (slot.node, slot.label, slot.submitted);
        let (is_read, len) = (matches!(slot.io.kind, IoKind::Read), slot.io.len);
        let batch = &mut self.nodes[node.index()].batch;
        if batch.is_of(label, submitted) {
            batch.add(is_read, len);
        } else {
            self.begin_batch(node, Ended::of(label, submitted, is_read, len));
        }
        self.finished.push(ReqId(done.op.0));
    }

    /// Others have ended before, if any, than those that end now.
    #[inline(never)]
    fn begin_batch(&mut self, node: NodeId, batch: Ended) {
        let before = std::mem::replace(&mut self.nodes[node.index()].batch, batch);
        if before.requests() > 0 {
            self.record(node, before);
        } else {
            self.touched.push(node);
        }
    }

    /// Guests' requests have ended.
    fn record(&mut self, node: NodeId, ended: Ended) {
        let record = &mut self.nodes[node.index()];
        record.guests -= ended.requests() as u32;
        self.stats.record(ended, self.now, self.limits.measure);
        if self.limits.measure {
            record.stats.record(ended, self.now);
        }
    }

    /// All completions of a harvest are taken in.
    pub fn completed(&mut self) {
        while let Some(node) = self.touched.pop() {
            let ended = std::mem::take(&mut self.nodes[node.index()].batch);
            self.record(node, ended);
        }
        if !self.write_waiters.is_empty() {
            self.wake_write_waiters();
        }
        if self.closed > 0 {
            self.wake_closers();
        }
        self.wake_past_waiters();
    }

    /// See [`Cx::park_until_past`](crate::step::Cx::park_until_past).
    #[inline]
    pub fn wake_past_waiters(&mut self) {
        if !self.past_waiters.is_empty() {
            let mut waiters = std::mem::take(&mut self.past_waiters);
            self.wake_all(&mut waiters);
        }
    }

    /// Keeps an event for the embedder.
    pub fn tell(&mut self, event: NodeEvent) {
        let is_corruption = |event: &&NodeEvent| matches!(event, NodeEvent::Corrupt { .. });
        if let NodeEvent::Corrupt { node, .. } = event
            && !self.corrupt.contains(&node)
        {
            self.corrupt.push(node);
        }
        let is_full = self.events.iter().filter(is_corruption).count() >= EVENTS_MAX;
        if !is_full && !self.events.contains(&event) {
            self.events.push(event);
        }
    }

    /// A job could not read or write `len` bytes at `at` of `node`. Errors side by side are one event.
    pub fn tell_job_error(
        &mut self,
        job: JobId,
        node: NodeId,
        (at, len): (u64, u64),
        errno: Errno,
    ) {
        let event = NodeEvent::JobError { job, node, at, len, errno };
        if let Some(last) = self.events.last_mut()
            && let NodeEvent::JobError { at: start, len: before, .. } = *last
            && (NodeEvent::JobError { job, node, at: start, len: before, errno }) == *last
            && start + before == at
        {
            *last = NodeEvent::JobError { job, node, at: start, len: before + len, errno };
            return;
        }
        let is_job_error = |event: &&NodeEvent| matches!(event, NodeEvent::JobError { .. });
        if self.events.iter().filter(is_job_error).count() < EVENTS_MAX {
            self.events.push(event);
        }
    }

    /// Everything but the common end of a request.
    #[inline(never)]
    fn complete_otherwise(&mut self, done: Completion) {
        if let Some(request) = self.ops.take_whole(done) {
            return self.op_done(request, Ok(()));
        }
        let record = &mut self.ops[done.op];
        let result = match done.result() {
            Ok(moved) if record.op.kind.has_memory() => {
                record.moved += moved;
                assert!(record.moved <= record.op.len, "more bytes than asked for: {record:?}");
                if record.moved < record.op.len {
                    return self.complete_short(done.op, moved);
                }
                Ok(())
            }
            Ok(answer) if record.op.kind == OpKind::Hole => {
                let record = self.ops.remove(done.op);
                let request = record.owner.request;
                self.answer_of_file(request, &record.op, Hole::from_answer(answer));
                return self.op_done(request, Ok(()));
            }
            Ok(_) => Ok(()),
            Err(Errno::INTERRUPTED) => {
                self.out.push(done.op);
                return;
            }
            Err(errno) => Err(errno),
        };
        let record = self.ops.remove(done.op);
        self.complete_whole(record, result);
    }

    fn complete_whole(&mut self, record: OpRecord, result: Result<(), Errno>) {
        let request = record.owner.request;
        if matches!(record.op.kind, OpKind::Read | OpKind::Compute(_) | OpKind::Hole) {
            return self.op_done(request, result);
        }
        let file = record.file();
        let result = match record.op.kind {
            OpKind::Flush => return self.complete_flush(file, request, result),
            OpKind::Zero { .. } if result == Err(Errno::NOT_SUPPORTED) => {
                self.files[file.index()].zero_unsupported = true;
                result
            }
            OpKind::Discard if result == Err(Errno::NOT_SUPPORTED) => Ok(()),
            OpKind::Truncate if result.is_ok() => {
                self.files[file.index()].len = record.op.offset;
                result
            }
            _ => result,
        };
        self.op_done(request, result);
    }

    #[cold]
    fn wake_write_waiters(&mut self) {
        if mutant!("write_end_wakes_nobody") {
            return;
        }
        let mut waiters = std::mem::take(&mut self.write_waiters);
        self.wake_all(&mut waiters);
    }

    /// A read or write that moved less than asked: the end of the file, or go on with the rest.
    #[cold]
    fn complete_short(&mut self, id: OpId, moved: u64) {
        let record = &mut self.ops[id];
        let align = self.files[record.file().index()].info.request_align as u64;
        let is_read = record.op.kind == OpKind::Read;
        let ends_in_a_block = record.moved & (align - 1) != 0;
        if is_read && (moved == 0 || ends_in_a_block) {
            // The end of the file: the rest reads as zeros (R50).
            let record = self.ops.remove(id);
            let missing = record.op.len - record.moved;
            self.mem.zero(&record.op.segs, record.moved, missing);
            return self.complete_whole(record, Ok(()));
        }
        if moved == 0 {
            let record = self.ops.remove(id);
            return self.complete_whole(record, Err(Errno::NO_SPACE));
        }
        if mutant!("short_write_counts_as_whole") && !is_read {
            let record = self.ops.remove(id);
            return self.complete_whole(record, Ok(()));
        }
        // Whole blocks only: the rest must be as aligned as the op was.
        record.moved -= record.moved & (align - 1);
        self.out.push(id);
    }

    /// One op of `request` has ended.
    #[inline(always)]
    pub fn op_done(&mut self, request: ReqId, result: Result<(), Errno>) {
        let slot = self.ops.slot_mut(request);
        assert!(slot.pending > 0, "{request:?} has no op in flight");
        slot.pending -= 1;
        if let Err(errno) = result {
            slot.failed = slot.failed.or(Some(errno));
        }
        if slot.pending > 0 {
            return;
        }
        match slot.waits {
            Waits::Last | Waits::Pass => self.end_last(request),
            Waits::Io => {
                slot.deliver_io();
                self.ready.push(request);
            }
            _ => {}
        }
    }

    /// The last ops of a request have ended: their result is its own.
    #[inline(never)]
    pub fn end_last(&mut self, request: ReqId) {
        let slot = self.ops.slot_mut(request);
        let entered = if slot.waits == Waits::Pass { slot.submitted } else { slot.entered };
        self.stats.states[slot.label as usize].record(self.now, entered, 1);
        slot.waits = Waits::Nothing;
        let result = slot.take_result();
        self.end(request, result);
    }

    /// A request has ended: its result goes to whoever it came from.
    #[inline]
    pub fn end(&mut self, request: ReqId, result: Result<(), Errno>) {
        // A mirror may wait for its end.
        if !self.copies.is_empty() {
            self.wake_past_waiters();
        }
        let slot = self.ops.slot_mut(request);
        assert!(slot.pending == 0, "{request:?} ended with ops in flight");
        assert!(slot.waits == Waits::Nothing, "{request:?} ended while on a wait list");
        match slot.origin {
            Origin::Guest => {
                slot.failed = result.err();
                slot.waits = Waits::Poll;
                let record = &mut self.nodes[slot.node.index()];
                record.guests -= 1;
                if self.limits.measure {
                    let nanos = self.now.since(slot.submitted);
                    self.stats.latency.record(nanos);
                    record.stats.record_one(&slot.io, result, nanos);
                }
                self.finished.push(request);
            }
            Origin::Abandoned => self.end_abandoned(request),
            Origin::Child(parent) => {
                let slot = self.ops.free_slot(request);
                self.nodes[slot.node.index()].inner -= 1;
                (slot.work, slot.base, slot.base_off) = (Work::Node, Base::Guest(request), 0);
                self.child_done(parent, result);
            }
            Origin::Chore => {
                let slot = self.ops.free_slot(request);
                slot.work = Work::Node;
                if let Some(record) = self.nodes.get_mut(slot.node.index()) {
                    record.inner -= 1;
                    if record.stage == Stage::Settling {
                        record.chore_failed = record.chore_failed.or(result.err());
                    }
                }
            }
        }
    }

    /// Nobody waits for it; what waits behind it may go on.
    #[cold]
    fn end_abandoned(&mut self, request: ReqId) {
        let node = self.ops.free_slot(request).node;
        drop(self.mem.take_guest(request));
        self.abandoned -= 1;
        self.abandoned_ended += 1;
        let there = self.moved_and_told(node);
        self.nodes[node.index()].guests -= 1;
        // What is submitted where the disk is now waits for it there.
        for node in [node, there] {
            let record = &mut self.nodes[node.index()];
            record.hold.abandoned.retain(|&(other, ..)| other != request);
            record.set_open_to();
        }
        let copies = self.copies.iter().filter(|(_, job)| [node, there].contains(&job.copy.target));
        let copies: smallvec::SmallVec<[u32; 4]> = copies.map(|(key, _)| key as u32).collect();
        copies.iter().for_each(|&key| self.wake_workers(key));
    }

    /// One that is held, and off the list of those, is given up: it never begins.
    pub fn end_held(&mut self, request: ReqId) {
        let slot = self.ops.slot_mut(request);
        slot.waits = Waits::Nothing;
        if let Work::Guard(key) = std::mem::replace(&mut slot.work, Work::Node) {
            self.guards.remove(key as usize);
        }
        self.end_abandoned(request);
    }

    /// A new request may have to wait before it begins: then each `run` looks at it.
    pub fn hold(&mut self, request: ReqId) {
        let slot = self.ops.slot_mut(request);
        let record = &mut self.nodes[slot.node.index()];
        if !record.hold.is_needed() {
            return;
        }
        slot.waits = Waits::List(On::Held);
        record.hold.held.push(request);
        self.held += 1;
        let unqueued = self.ready.pop_back();
        assert_eq!(unqueued, Some(request), "it was queued just now");
    }

    /// Lets those begin that may, of all nodes. Is there one?
    #[cold]
    pub fn let_held_go(&mut self) -> bool {
        let mut some = false;
        for at in 0..self.nodes.len() {
            if self.nodes[at].hold.held.is_empty() {
                continue;
            }
            let there = self.abandoned_there(at).to_vec();
            let Core { nodes, ops, now, .. } = self;
            let record = &mut nodes[at];
            let is_over = record.stage != Stage::Open || record.is_closing;
            let gone = record.hold.let_go(*now, is_over, &there, |request| ops.slot(request).io);
            self.held -= gone.len();
            some |= !gone.is_empty();
            for request in gone {
                self.ops.slot_mut(request).waits = Waits::Nothing;
                self.ready.push(request);
            }
            record.set_open_to();
        }
        some
    }

    /// When time alone lets one begin.
    pub fn held_due(&self) -> Option<Time> {
        if self.held == 0 {
            return None;
        }
        let io_of = |request| self.ops.slot(request).io;
        let deadline_of = |at: usize| self.nodes[at].hold.deadline(self.abandoned_there(at), io_of);
        (0..self.nodes.len()).filter_map(deadline_of).min()
    }

    /// Abandoned writes where a node's disk is now, if it has moved: what was held before waits for them, too.
    fn abandoned_there(&self, at: usize) -> &[Abandoned] {
        let there = self.moved_and_told(self.nodes[at].id).index();
        let is_here = there == at || mutant!("held_write_stays_behind");
        if is_here { &[] } else { &self.nodes[there].hold.abandoned }
    }

    /// As [`Core::op_done`]; apart, because layers nest.
    #[inline(never)]
    fn child_done(&mut self, parent: ReqId, result: Result<(), Errno>) {
        let result = if mutant!("error_of_a_piece_swallowed") { Ok(()) } else { result };
        self.op_done(parent, result);
    }

    pub fn park(&mut self, request: ReqId, list: &mut WaitList, on: On) {
        let slot = self.ops.slot_mut(request);
        assert_eq!(slot.waits, Waits::Nothing, "{request:?} would wait for two things");
        assert!(!slot.issued, "{request:?} would wait for its ops and a list");
        slot.waits = Waits::List(on);
        slot.next = Link::NONE;
        list.ends = Some(match list.ends {
            None => (request, request),
            Some((head, tail)) => {
                self.ops.slot_mut(tail).next = Link::to(request);
                (head, request)
            }
        });
    }

    pub fn wake_first(&mut self, list: &mut WaitList) -> Option<ReqId> {
        let (head, tail) = list.ends?;
        let slot = self.ops.slot_mut(head);
        let Waits::List(on) = slot.waits else {
            panic!("{head:?} is on a list without waiting for it: {:?}", slot.waits)
        };
        self.stats.lists[on as usize].record(self.now, slot.entered, 1);
        slot.waits = Waits::Nothing;
        let next = std::mem::replace(&mut slot.next, Link::NONE);
        list.ends = next.get().map(|next| (next, tail));
        slot.cause = Cause::Woken;
        self.ready.push(head);
        Some(head)
    }

    #[inline]
    pub fn wake_all(&mut self, list: &mut WaitList) {
        while self.wake_first(list).is_some() {}
    }

    /// Takes `N` buffers for `request`, if its disk may have them.
    pub fn take_bufs<const N: usize>(&mut self, request: ReqId) -> Option<[BufId; N]> {
        let disk = self.disk_of(request);
        if !self.may_take(Share::Bufs, disk, N) {
            return None;
        }
        let left = self.bufs_free.len() - N;
        let mut bufs = [BufId(0); N];
        bufs.copy_from_slice(&self.bufs_free[left..]);
        self.bufs_free.truncate(left);
        bufs.iter().for_each(|&buf| self.taken(Share::Bufs, buf, disk));
        Some(bufs)
    }

    pub fn take_bounce(&mut self, request: ReqId) -> Option<BufId> {
        let disk = self.disk_of(request);
        if !self.may_take(Share::Bounces, disk, 1) {
            return None;
        }
        let buf = self.bounce_free.pop()?;
        self.taken(Share::Bounces, buf, disk);
        Some(buf)
    }

    pub fn give_bounce(&mut self, buf: BufId) {
        self.given(Share::Bounces, buf);
        self.bounce_free.push(buf);
        let mut waiters = std::mem::take(&mut self.bounce_waiters);
        self.wake_all(&mut waiters);
    }

    pub fn give_buf(&mut self, buf: BufId) {
        debug_assert!(!self.bufs_free.contains(&buf), "{buf:?} given back twice");
        self.given(Share::Bufs, buf);
        self.bufs_free.push(buf);
        let mut waiters = std::mem::take(&mut self.buf_waiters);
        self.wake_all(&mut waiters);
    }

    fn taken(&mut self, share: Share, buf: BufId, disk: usize) {
        self.mem.buf_taken(buf, self.limits.buffer_size);
        self.buf_owner[buf.index()] = disk;
        if let Some(record) = self.nodes.get_mut(disk) {
            record.shares[share as usize] += 1;
        }
    }

    fn given(&mut self, share: Share, buf: BufId) {
        if let Some(record) = self.nodes.get_mut(self.buf_owner[buf.index()]) {
            record.shares[share as usize] -= 1;
        }
    }

    /// The disk that a request works for, whichever layer it is of: its node's index.
    fn disk_of(&self, mut request: ReqId) -> usize {
        while let Origin::Child(parent) = self.ops.slot(request).origin {
            request = parent;
        }
        self.ops.slot(request).node.index()
    }

    /// May this disk take so many more? Enough to go on with are kept for each other disk, and for
    /// one more, that has fewer: a disk whose storage hangs does not have all there are.
    fn may_take(&self, share: Share, disk: usize, count: usize) -> bool {
        let (free, all) = match share {
            Share::Bufs => (self.bufs_free.len(), self.limits.buffers),
            Share::Bounces => (self.bounce_free.len(), self.limits.bounce_buffers),
        };
        let enough = share.enough();
        let Some(left) = free.checked_sub(count) else { return false };
        if left >= (self.nodes.len() + 1) * enough {
            return true;
        }
        let held = |record: &NodeRecord| record.shares[share as usize];
        if let Some(its) = self.nodes.get(disk)
            && its.is_top
            && held(its) + count <= enough
        {
            return true;
        }
        let others = self.nodes.iter().enumerate();
        let others = others.filter(|&(at, record)| record.is_top && at != disk);
        let kept: usize = others.map(|(_, record)| enough.saturating_sub(held(record))).sum();
        let for_one_more = if all >= 4 * enough { enough } else { 0 };
        left >= (kept + for_one_more).min(all - enough)
    }

    /// What was kept for a disk that is gone is for others.
    pub fn wake_for_shares(&mut self) {
        let mut waiters = std::mem::take(&mut self.buf_waiters);
        self.wake_all(&mut waiters);
        let mut waiters = std::mem::take(&mut self.bounce_waiters);
        self.wake_all(&mut waiters);
    }

    /// Is this a node? Not one that was closed, nor another engine's.
    #[inline]
    pub fn has_node(&self, node: NodeId) -> bool {
        self.nodes.get(node.index()).is_some_and(|record| record.id == node && !record.is_vacant)
    }

    /// A node begins to be looked at, or nothing is to be seen of it any more.
    pub fn recount_moving(&mut self) {
        self.moving = self.nodes.iter().filter(|node| node.is_moving()).count();
    }

    /// The place of the next node: its index.
    pub fn next_node(&mut self, tag: u16) -> usize {
        let index = self.nodes_free.pop().unwrap_or_else(|| {
            self.nodes.push(NodeRecord::new(NodeId::new(tag, self.nodes.len())));
            self.nodes.len() - 1
        });
        let record = &mut self.nodes[index];
        *record = NodeRecord::new(record.id);
        record.regions = std::mem::take(&mut self.loose_regions);
        index
    }

    /// A node goes: its memory is freed, its place is for the next one.
    pub fn free_node(&mut self, index: usize) {
        let record = &mut self.nodes[index];
        let is_at_rest = record.is_quiet() && record.shares == [0; 2];
        assert!(is_at_rest || mutant!("close_waits_for_nothing"), "{record:?} goes at work");
        let id = record.id;
        let regions = std::mem::take(&mut record.regions);
        let next = id.next_generation();
        *record = NodeRecord {
            is_vacant: true,
            is_top: false,
            open_to: 0,
            ..NodeRecord::new(next.unwrap_or(NodeId::NONE))
        };
        regions.into_iter().for_each(|region| self.mem.free_region(region));
        self.corrupt.retain(|&node| node != id);
        if next.is_some() {
            self.nodes_free.push(index);
        }
        if mutant!("id_used_again") {
            self.nodes[index].id = id;
        }
    }

    /// The id of the next file, which is attached if `attach` says so.
    pub fn add_file(
        &mut self,
        attach: impl FnOnce(FileId) -> io::Result<FileInfo>,
    ) -> io::Result<(FileId, FileInfo)> {
        let free = self.files_free.iter().min().map(|&at| self.files[at].id);
        let id = free.unwrap_or(FileId(self.files.len() as u32));
        if free.is_none() && self.files.len() >= FileId::MAX {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let info = attach(id)?;
        let state = FileState::new(id, info, &self.limits);
        match free {
            Some(_) => self.files[id.index()] = state,
            None => self.files.push(state),
        }
        self.files_free.retain(|&at| at != id.index());
        Ok((id, info))
    }

    /// A file goes: its memory is freed, its place is for the next one.
    pub fn free_file(&mut self, file: FileId) {
        let is_in_use = !self.is_file_quiet(file) && !mutant!("close_waits_for_nothing");
        assert!(!is_in_use, "{file:?} goes with ops in flight");
        let next = file.next_generation();
        self.files[file.index()] = FileState::vacant(next.unwrap_or(file));
        if next.is_some() {
            self.files_free.push(file.index());
        }
    }

    /// Is this a file, and nothing in flight on it?
    pub fn is_file_quiet(&self, file: FileId) -> bool {
        let target = Target::File(file);
        let state = self.files.get(file.index());
        state.is_some_and(|state| !state.is_vacant && !state.given_up.is_going_on)
            && !self.ops.iter().any(|(_, record)| record.op.target == target)
            && !self.jobs.iter().any(|(_, job)| job.is_on(file))
    }

    /// Is anything left undone inside? For tests: when nothing runs, nothing may be left.
    pub fn assert_idle(&self) {
        assert_eq!(self.ops.live(), 0, "requests left: {:?}", self.ops);
        assert!(self.ops.is_empty() && self.out.is_empty(), "ops left: {:?}", self.ops);
        assert!(self.jobs.is_empty(), "jobs left: {:?}", self.jobs);
        assert!(self.copies.is_empty() && self.workers.is_empty(), "left: {:?}", self.copies);
        assert!(self.guards.is_empty(), "left: {:?}", self.guards);
        assert_eq!(self.bufs_free.len(), self.limits.buffers, "buffers leaked");
        assert_eq!(self.bounce_free.len(), self.limits.bounce_buffers, "bounce buffers leaked");
        assert!(self.buf_waiters.is_empty() && self.bounce_waiters.is_empty());
        assert!(self.write_waiters.is_empty() && self.past_waiters.is_empty());
        for file in &self.files {
            file.assert_idle();
        }
    }
}

impl Clone for Core {
    fn clone(&self) -> Core {
        self.clone_with(Memory::default(), Ops::new(0, 0))
    }

    /// Uses the memory that is there: half the time of a simulation would go into having it.
    fn clone_from(&mut self, source: &Core) {
        let (mem, ops) =
            (std::mem::take(&mut self.mem), std::mem::replace(&mut self.ops, Ops::new(0, 0)));
        *self = source.clone_with(mem, ops);
    }
}

impl Core {
    /// A copy, made with the memory of an older one.
    fn clone_with(&self, mut mem: Memory, mut ops: Ops) -> Core {
        mem.copy_but_free(&self.mem, &[&self.bufs_free, &self.bounce_free]);
        ops.clone_from(&self.ops);
        Core {
            limits: self.limits,
            now: self.now,
            ops,
            out: self.out.clone(),
            ready: self.ready.clone(),
            files: self.files.clone(),
            files_free: self.files_free.clone(),
            nodes: self.nodes.clone(),
            nodes_free: self.nodes_free.clone(),
            moving: self.moving,
            loose_regions: self.loose_regions.clone(),
            jobs: self.jobs.clone(),
            copies: self.copies.clone(),
            workers: self.workers.clone(),
            guards: self.guards.clone(),
            next_job: self.next_job,
            mem,
            bufs_free: self.bufs_free.clone(),
            buf_owner: self.buf_owner.clone(),
            buf_waiters: self.buf_waiters,
            bounce_free: self.bounce_free.clone(),
            bounce_waiters: self.bounce_waiters,
            write_waiters: self.write_waiters,
            past_waiters: self.past_waiters,
            held: self.held,
            abandoned: self.abandoned,
            abandoned_ended: self.abandoned_ended,
            closed: self.closed,
            events: self.events.clone(),
            corrupt: self.corrupt.clone(),
            asked: self.asked.clone(),
            finished: self.finished.clone(),
            serial: self.serial,
            epoch: self.epoch,
            stats: self.stats.clone(),
            touched: self.touched.clone(),
        }
    }
}

impl Core {
    /// Hashes everything that decides what can happen next, and nothing that only records what
    /// did. `order` has all requests.
    pub fn hash_in_order<H: Hasher>(&self, order: &[ReqId], h: &mut H) {
        self.now.hash(h);
        for &id in order {
            let slot = self.ops.slot(id);
            (id, slot, self.epoch.wrapping_sub(slot.epoch)).hash(h);
            self.mem.guest(id).hash(h);
        }
        for (key, job) in &self.jobs {
            (key, job).hash(h);
        }
        for (key, copy) in &self.copies {
            (key, copy).hash(h);
        }
        for (key, worker) in &self.workers {
            (key, worker).hash(h);
        }
        for (key, guard) in &self.guards {
            (key, guard).hash(h);
        }
        for &id in self.out.as_slice() {
            let OpRecord { op, moved, owner, .. } = &self.ops[id];
            (owner.request, op, moved).hash(h);
        }
        (self.out.len(), &self.ready, &self.files).hash(h);
        self.mem.hash_but_free(&[&self.bufs_free, &self.bounce_free], h);
        (self.buf_waiters, self.bounce_waiters, self.write_waiters, self.past_waiters).hash(h);
        (self.bufs_free.len(), &self.corrupt).hash(h);
        self.nodes.iter().for_each(|record| record.decisive().hash(h));
    }
}
