//! The engine: owns nodes and requests, routes completions in, steps states, sends ops out.

use std::hash::{Hash, Hasher};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU16, Ordering};

use crate::align;
use crate::backend::{self, Backend, Called, Completion, FileInfo, Harvest, Note, Submission};
use crate::copy;
use crate::core::{Core, GO_MAX};
use crate::guard;
use crate::life::{Drain, Life, Move, Why};
use crate::limits::Limits;
use crate::mem::{Looked, Mem, Memory};
use crate::mutant;
use crate::op::{Op, OpKind, Segs, Target};
use crate::ops::Ops;
use crate::request::{Chore, Event, Io, IoKind, Pass, REQUEST_MAX, Step};
use crate::slots::{Cause, Origin, Renamed, Waits, Work};
use crate::stats::{Call, NodeStats, STATES_MAX, Stats};
use crate::status::Status;
use crate::step::{Cx, Driver};
use crate::units::{Errno, FileId, NodeId, OpId, RegionId, ReqId, Time};

mod asked;
mod jobs;
mod nodes;
mod queues;

pub use asked::{Asker, Awaits, RequestInfo};
pub use queues::{QUEUED, Queues, Submitter};

/// A finished request.
#[derive(Debug)]
pub struct Finished {
    /// The name given at submission. The engine makes nothing of it.
    pub tag: u64,
    /// How it ended. [`Errno::INVALID`]: the range does not fit the disk or the memory;
    /// [`Errno::READ_ONLY`], [`Errno::NOT_PERMITTED`] and [`Errno::NOT_SUPPORTED`]: the image does
    /// not take it; others as the backend said. After an error any part of the range may have been
    /// read or written.
    pub result: Result<(), Errno>,
    /// The memory given at submission: what was read, or what was written, unchanged.
    pub mem: Mem,
}

/// A request that was not taken, and its memory back.
#[derive(Debug)]
pub struct Refused {
    /// Why.
    pub why: Why,
    /// The memory.
    pub mem: Mem,
}

/// What one `run` did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Events delivered to requests.
    pub steps: usize,
    /// Ops handed to the backend.
    pub submitted: usize,
    /// `run` again before waiting for anything: nothing will wake the loop for what is left.
    pub again: bool,
    /// Something is left because the turn is over: [`Limits::turn`].
    pub is_over: bool,
}

/// Owns images and a slab of requests, and drives them over a [`Backend`].
///
/// The methods are of four kinds, and one rule binds them: **after any `submit`, readiness of
/// [`fd`](Engine::fd), or deadline: call [`run`](Engine::run), then [`poll`](Engine::poll) until
/// it answers `None`.** Completions never call back into the embedder.
///
/// 1. disks that come and go, at any time: `attach` a file, `add` a node; `pause`, `resume` and
///    `close` it, which only begin: `poll_event` tells when it is done;
/// 2. `submit`: only records, never does I/O;
/// 3. `run(now)`: collects completions, steps every request that has an event, submits the ops
///    they issued in one batch. It never waits;
/// 4. asking: `poll`, `poll_event`, `fd`, `next_deadline`, `stats`. Their answers change only in
///    calls of the other kinds.
///
/// To end one disk: [`close`](Engine::close). To end all: [`drain`](Engine::drain), and go on until [`drained`](Engine::drained) answers. An engine
/// that is merely dropped waits for the ops in flight, since they name its memory, and begins no
/// more: requests are left as a crash would leave them, and an image may want a check.
pub struct Engine<D: Driver, B: Backend> {
    /// First, so that it is dropped first: it waits for ops in flight, which name memory below.
    backend: B,
    life: Life<D, B::File>,
    /// Their sizes: only a truncation changes one.
    sizes: Vec<u64>,
    /// The states of requests, by slab key; taken out for the time of a step.
    states: Vec<Option<D::State>>,
    core: Core,
    completions: Vec<Completion>,
    /// Ops that the backend takes in a quarter of a turn, about.
    pace: usize,
    /// What its nodes' ids carry.
    tag: u16,
}

/// The tag of the next engine.
static TAGS: AtomicU16 = AtomicU16::new(0);

impl<D: Driver, B: Backend> Engine<D, B> {
    /// An engine over `backend`. Takes all the memory that it will use, tables apart.
    ///
    /// # Panics
    ///
    /// If a limit is below its least value.
    pub fn new(backend: B, limits: Limits) -> Self {
        assert!(limits.requests > 0 && limits.ops >= 4 && limits.steps > 0, "{limits:?}");
        assert!(limits.buffers >= 2 && limits.bounce_buffers >= 1, "{limits:?}");
        assert!(limits.buffer_size.is_power_of_two() && limits.buffer_size >= 4096, "{limits:?}");
        assert!(D::STATES.len() <= STATES_MAX);
        Engine {
            life: Life::new(limits.requests),
            sizes: Vec::new(),
            states: Vec::with_capacity(limits.requests * 4),
            core: Core::new(limits),
            backend,
            completions: Vec::with_capacity(limits.ops),
            pace: PACE_FIRST,
            // It only tells engines apart. After 65 536 of them tags repeat.
            tag: TAGS.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Makes a file known to the engine and its backend, at any time: whatever else is in flight goes
    /// on. Takes the time that the backend takes to look at the file, and never waits for requests.
    ///
    /// # Errors
    ///
    /// The backend's; EMFILE if there are [`FileId::MAX`] already; [`io::ErrorKind::Unsupported`] if the file's blocks are
    /// no powers of two, or larger than [`Limits::buffer_size`]. Nothing has changed then.
    pub fn attach(&mut self, file: B::File) -> io::Result<(FileId, FileInfo)> {
        let backend = &mut self.backend;
        let most = self.core.limits.buffer_size;
        self.core.add_file(|id| {
            let info = backend.attach(id, file)?;
            let aligns = [info.request_align, info.memory_align, info.hole_align];
            if aligns.iter().any(|align| !align.is_power_of_two()) || aligns[0] as usize > most {
                backend.detach(id);
                return Err(io::ErrorKind::Unsupported.into());
            }
            Ok(info)
        })
    }

    /// The file back. Nodes that use it take no more requests ([`Why::NoSuchNode`]), and have
    /// nothing left to do when the engine is drained again; requests of a node above them that
    /// come to them fail. To take a whole disk out of an engine at work, [`close`](Engine::close)
    /// it: this is for files that no node came to use, and for the end of all.
    ///
    /// `None`, and nothing has changed: the backend has no such file (any more); or nodes use it and
    /// the engine is not drained, so that they may have work in flight or changes in memory that are
    /// not on disk. See [`Engine::drain`]. A drain that ended with an error is enough: whoever takes
    /// the file after that has been told what is lost.
    pub fn detach(&mut self, file: FileId) -> Option<B::File> {
        self.called(Called::Detach(file));
        let is_its = self.core.files.get(file.index()).is_some_and(|its| its.id == file);
        if !is_its || !self.core.is_file_quiet(file) {
            return None;
        }
        let is_used = self.life.nodes.iter().flatten().any(|node| node.uses(file));
        let is_at_rest = self.is_idle() && matches!(self.life.drain, Drain::Drained(_));
        if is_used && !is_at_rest {
            return None;
        }
        let taken = self.backend.detach(file)?;
        for (node, record) in self.life.nodes.iter().zip(&mut self.core.nodes) {
            if node.as_ref().is_some_and(|node| node.uses(file)) {
                (record.is_gone, record.open_to) = (true, 0);
            }
        }
        if !is_used {
            self.core.free_file(file);
        }
        Some(taken)
    }

    /// `len` bytes of memory, zeros, for the tables of the node that is [added](Engine::add) next,
    /// for as long as that lives.
    pub fn region(&mut self, len: usize) -> RegionId {
        self.called(Called::Region(len));
        let region = self.core.mem.add_region(len);
        self.core.loose_regions.push(region);
        region
    }

    /// Adds an opened layer, at any time: whatever else is in flight goes on. The memory that was
    /// asked for since the last one was added is the new one's.
    ///
    /// # Panics
    ///
    /// If there are [`NodeId::MAX`] already, or a node [below](Driver::below) is not
    /// [there](Engine::has), is being closed, or is paused ([`may_be_read_from`](Engine::may_be_read_from)).
    pub fn add(&mut self, node: D) -> NodeId {
        self.called(Called::Add);
        for &below in node.below() {
            assert!(self.may_be_read_from(below), "{below:?} is not there to be read from");
            self.core.nodes[below.index()].is_top = false;
        }
        let (size, index) = (node.size(), self.core.next_node(self.tag));
        if index == self.life.nodes.len() {
            self.life.nodes.push(None);
            self.sizes.push(0);
        }
        (self.life.nodes[index], self.sizes[index]) = (Some(node), size);
        let id = self.core.nodes[index].id;
        // It is not paused, so what is below it is not held.
        self.life.hold(&mut self.core, id);
        self.life.added(&mut self.core, index);
        id
    }

    /// A node, to look at. What it says, such as its size, may change in `run`.
    ///
    /// # Panics
    ///
    /// If the engine does not [have](Engine::has) it.
    pub fn node(&self, node: NodeId) -> &D {
        assert!(self.has(node), "{node:?} is no node of this engine");
        self.life.nodes[node.index()].as_ref().expect("what is there has a driver")
    }

    #[inline(always)]
    fn size(&self, node: NodeId) -> u64 {
        self.sizes[node.index()]
    }

    /// This region holds what is a guest's, not tables: of what an op brings into it no more than the first
    /// `looked_at` bytes decide what is done next. So the rest is in no [record](crate::record).
    pub fn holds_data(&mut self, region: RegionId, looked_at: usize) {
        self.core.mem.set_looked_at(region, Looked::First(looked_at));
    }

    /// The tag of a request of a guest's that has not been taken from `poll`. `None`: there is no such request.
    pub fn tag_of(&self, request: ReqId) -> Option<u64> {
        let slot = self.core.ops.slots().find(|&(id, _)| id == request).map(|(_, slot)| slot)?;
        (slot.origin == Origin::Guest).then_some(slot.tag)
    }

    /// The ids of its nodes, in the order of their places; `None` where there is none.
    pub fn nodes(&self) -> impl Iterator<Item = Option<NodeId>> {
        (0..self.life.nodes.len())
            .map(|index| self.life.nodes[index].as_ref().map(|_| self.core.nodes[index].id))
    }

    /// Takes a request. It is begun at the next [`run`](Engine::run); `mem` belongs to the engine
    /// until [`poll`](Engine::poll) hands it back. `tag` comes back too; it need not be unique.
    ///
    /// Offset and length may be any bytes within the disk; for a read or write the length is that
    /// of `mem`, and [`REQUEST_MAX`] at most; for a status `mem` has [`Status::BYTES`]. What does not fit is answered as every other failure:
    /// through `poll`, with [`Errno::INVALID`]. A length of 0 is a success.
    ///
    /// No order holds among requests in flight. Where their ranges overlap and one of them writes,
    /// each byte is read or left as one of the orders would have it; not so the request as a whole.
    ///
    /// # Errors
    ///
    /// The memory back, and [`Why`] nothing was done.
    #[inline(always)]
    pub fn submit(
        &mut self,
        node: NodeId,
        io: Io,
        mem: impl Into<Mem>,
        tag: u64,
    ) -> Result<(), Refused> {
        let (mem, given, mut node) = (mem.into(), node, node);
        let record = match self.core.nodes.get_mut(node.index()) {
            Some(record) if record.id == node => record,
            _ => return Err(Refused { why: Why::NoSuchNode, mem }),
        };
        let is_looked_at = self.life.guests >= self.life.open_to || record.guests >= record.open_to;
        if !is_looked_at {
            record.guests += 1;
        } else {
            node = self.core.moved_and_told(node);
            if let Err(why) = self.life.why_not(&mut self.core, node) {
                return Err(Refused { why, mem });
            }
            self.core.nodes[node.index()].guests += 1;
        }
        self.backend.note(Note::Submitted { node: given, io: &io, mem: &mem });
        if !self.is_valid(node, &io, &mem) {
            self.end_at_once(node, io, mem, tag);
            return Ok(());
        }
        let id = self.record(node, io, mem, tag);
        if is_looked_at {
            self.core.guard(id);
            self.core.hold(id);
        }
        Ok(())
    }

    #[inline(always)]
    fn record(&mut self, node: NodeId, io: Io, mem: Mem, tag: u64) -> ReqId {
        let bits = mem.misaligned_bits();
        let id = self.core.begin(node, io, Origin::Guest, tag, bits);
        self.core.mem.set_guest(id, mem);
        self.life.guests += 1;
        id
    }

    /// Nothing to do, or nothing that can be done: the request is not begun.
    #[cold]
    fn end_at_once(&mut self, node: NodeId, io: Io, mem: Mem, tag: u64) {
        let is_resize = io.kind == IoKind::Truncate;
        let fits = !is_resize && io.len == 0 && io.offset <= self.size(node) && mem_fits(&io, &mem);
        let id = self.record(node, io, mem, tag);
        let unqueued = self.core.ready.pop_back();
        assert_eq!(unqueued, Some(id), "it was queued just now");
        let is_filled = matches!(io.kind, IoKind::Read | IoKind::Status { .. });
        let refused = is_filled && self.core.mem.guest(id).is_read_only();
        let errno = if refused { Errno::BAD_MEMORY } else { Errno::INVALID };
        self.core.end(id, if fits { Ok(()) } else { Err(errno) });
    }

    /// Is there something to do, and can it be done?
    #[inline(always)]
    fn is_valid(&self, node: NodeId, io: &Io, mem: &Mem) -> bool {
        let size = self.size(node);
        if matches!(io.kind, IoKind::Flush | IoKind::Truncate) {
            // What a job copies keeps its size.
            return io.kind == IoKind::Flush || self.core.nodes[node.index()].jobs == 0;
        }
        let end = io.offset.checked_add(io.len);
        io.len > 0 && end.is_some_and(|end| end <= size) && mem_fits(io, mem)
    }

    /// Collects completions, steps requests that have an event, hands their ops to the backend.
    /// Never waits. Calling it without need is harmless.
    ///
    /// Ends when all that is ready is done, or after [`Limits::turn`], about; the rest is for the next
    /// `run`, oldest first whatever node it is of, and [`Progress::again`] says that there is some.
    ///
    /// `now` decides which deadlines have come: it is of the clock that
    /// [`next_deadline`](Engine::next_deadline) is compared with, for real disks
    /// [`sys::clock`](crate::sys::clock). Time that stands still or goes back delays chores, no more.
    pub fn run(&mut self, now: Time) -> Progress {
        let began = self.backend.clock();
        let mut turn = Turn { began, seen: began, is_over: false };
        self.backend.note(Note::Run(now));
        self.backend.note(Note::Clock(began));
        self.core.now = now;
        let mut progress = Progress::default();
        if self.life.has_left() {
            self.life.drop_left();
        }
        self.harvest();
        self.begin_chores(now);
        self.step_all(&mut turn, &mut progress);
        self.send(&mut turn, &mut progress);
        // What a device without latency has done already is not left for another turn of the loop.
        if progress.submitted > 0 && !turn.is_over && self.harvest() {
            self.core.now = now.plus_ns(turn.seen.since(began));
            self.step_all(&mut turn, &mut progress);
            self.send(&mut turn, &mut progress);
        }
        progress.is_over = turn.is_over && !mutant!("end_of_turn_not_said");
        // What waits for the end of a mirror to be told goes on right after: its event is there still.
        let is_untold = !self.core.events.is_empty()
            && self.core.nodes.iter().any(|record| record.moved_untold.is_some());
        progress.again = progress.is_over
            || is_untold
            || !self.core.ready.is_empty()
            || backend::is_to_be_asked(&self.backend, self.core.ops.len());
        if self.core.limits.measure {
            let spent = self.look(&mut turn).since(began);
            self.core.stats.run.record(spent);
            if progress.submitted > 0 {
                self.core.stats.run_per_op.record(spent / progress.submitted as u64);
            }
        }
        self.backend.note(Note::Ran);
        progress
    }

    /// Somebody called a method that changes something.
    #[inline]
    fn called(&mut self, called: Called<'_>) {
        self.backend.note(Note::Called(called));
    }

    /// The same, if the node is there: otherwise it changes nothing, and another may have its place.
    fn called_of(&mut self, node: NodeId, called: Called<'_>) {
        if self.has(node) {
            self.called(called);
        }
    }

    /// The backend's clock, looked at.
    fn look(&mut self, turn: &mut Turn) -> Time {
        turn.seen = self.backend.clock();
        self.backend.note(Note::Clock(turn.seen));
        turn.is_over |= self.is_over_after(turn, 0);
        turn.seen
    }

    /// Will the turn have lasted long enough when another `nanos` have passed?
    #[inline(always)]
    fn is_over_after(&self, turn: &Turn, nanos: u64) -> bool {
        turn.seen.since(turn.began) + nanos >= self.turn_ns() && !mutant!("turn_ignored")
    }

    fn turn_ns(&self) -> u64 {
        self.core.limits.turn.as_nanos() as u64
    }

    /// Collects what has come back; was there anything?
    #[inline(always)]
    fn harvest(&mut self) -> bool {
        let Core { ops, mem, .. } = &mut self.core;
        self.backend.harvest(&mut Harvest { done: &mut self.completions, ops, mem });
        if self.completions.is_empty() {
            return false;
        }
        let Engine { core, completions, .. } = self;
        for &completion in completions.iter() {
            core.complete(completion);
        }
        core.completed();
        completions.clear();
        true
    }

    /// Steps what is ready, for as long as the turn lasts; 32 at least.
    #[inline(always)]
    fn step_all(&mut self, turn: &mut Turn, progress: &mut Progress) {
        loop {
            while let Some(id) = self.core.ready.pop() {
                self.step(id);
                progress.steps += 1;
                if progress.steps.is_multiple_of(STEPS_PER_LOOK) && self.is_to_stop(turn, progress)
                {
                    return;
                }
            }
            let moves = self.core.moving > 0 || self.life.drain == Drain::Going;
            let moves = moves || self.core.held > 0 || self.core.abandoned_ended > 0;
            if !moves || !self.go_on_living() {
                return;
            }
        }
    }

    /// Nothing is ready: is there something that nodes do by themselves?
    #[cold]
    #[inline(never)]
    fn go_on_living(&mut self) -> bool {
        self.life.guests -= std::mem::take(&mut self.core.abandoned_ended);
        let mut goes_on = self.core.held > 0 && self.core.let_held_go();
        for index in 0..self.life.nodes.len() {
            while self.core.nodes[index].is_moving() {
                match self.life.move_on(&mut self.core, &mut self.backend, index) {
                    Move::Waits => break,
                    Move::On => {}
                    Move::Settle(node) => self.begin_chore(node, Chore::Settle),
                }
                goes_on = true;
            }
        }
        self.core.recount_moving();
        if self.life.drain == Drain::Going && self.is_idle() {
            self.life.end_drain(&self.core);
        }
        goes_on
    }

    #[inline(never)]
    fn is_to_stop(&mut self, turn: &mut Turn, progress: &Progress) -> bool {
        let before = turn.seen;
        let spent = self.look(turn).since(before);
        self.core.stats.held_by(spent, Call::Steps, STEPS_PER_LOOK, None);
        turn.is_over && !self.core.ready.is_empty() || progress.steps >= self.core.limits.steps
    }

    /// Hands over what waits for the backend, a slice at a time, for as long as the turn lasts; one
    /// slice at least.
    fn send(&mut self, turn: &mut Turn, progress: &mut Progress) {
        while !self.core.out.is_empty() {
            let before = self.core.out.len();
            let slice = before.min(self.pace);
            if mutant!("newest_first") {
                self.core.out.bring_forward(slice);
            }
            let began = turn.seen;
            let Core { out, ops, mem, .. } = &mut self.core;
            let first = out.as_slice()[0];
            self.backend.submit(&mut Submission { queue: out, slice, ops, mem });
            let taken = before - self.core.out.len();
            progress.submitted += taken;
            let spent = self.look(turn).since(began);
            self.core.stats.held_by(spent, Call::Submit, taken, Some(&self.core.ops[first].op));
            self.set_pace(if mutant!("pace_of_what_is_not_taken") { slice } else { taken }, spent);
            // The next slice may take as long as this one.
            turn.is_over |= self.is_over_after(turn, spent.min(self.turn_ns() / 4));
            if taken < slice || turn.is_over {
                break;
            }
        }
        turn.is_over &= !self.core.ready.is_empty() || !self.core.out.is_empty();
    }

    /// The next slices: as many ops as take a quarter of a turn, going by those of the last that were
    /// taken; twice as many as those at most.
    #[inline]
    fn set_pace(&mut self, taken: usize, spent: u64) {
        let quarter = self.turn_ns() / 4;
        if spent > quarter {
            self.pace = ((taken as u64 * quarter / spent) as usize).max(1);
        } else if taken == self.pace && spent <= quarter / 2 {
            self.pace = (self.pace * 2).min(PACE_MAX);
        }
    }

    fn begin_chores(&mut self, now: Time) {
        if !self.core.copies.is_empty() {
            self.core.wake_copies();
        }
        if self.core.give_back_due().is_some_and(|due| due <= now) {
            self.core.give_back(|file| file.given_up.due <= now && !file.is_held);
        }
        for i in 0..self.life.nodes.len() {
            if self.deadline_of(i).is_some_and(|due| due <= now) {
                self.begin_chore(self.core.nodes[i].id, Chore::Deadline);
            }
        }
    }

    fn deadline_of(&self, index: usize) -> Option<Time> {
        let deadline = self.life.nodes[index].as_ref()?.deadline();
        deadline.filter(|_| self.core.nodes[index].may_begin_chores())
    }

    fn begin_chore(&mut self, node: NodeId, chore: Chore) {
        let Some(driver) = &mut self.life.nodes[node.index()] else { return };
        if let Some(state) = driver.chore(chore) {
            let io = Io { kind: IoKind::Flush, offset: 0, len: 0 };
            let id = self.core.begin(node, io, Origin::Chore, 0, 0);
            let slot = self.core.ops.slot_mut(id);
            (slot.cause, slot.entered) = (Cause::Start, self.core.now);
            self.put_state(id, state);
        }
    }

    #[inline]
    fn put_state(&mut self, id: ReqId, state: D::State) {
        if id.index() >= self.states.len() {
            self.states.resize_with(id.index() + 1, || None);
        }
        self.states[id.index()] = Some(state);
    }

    /// Delivers a request's event to its state.
    #[inline(always)]
    fn step(&mut self, id: ReqId) {
        let Core { ops, files, mem, out, now, .. } = &mut self.core;
        let request = ops.request_mut(id);
        let slot = &mut request.slot;
        debug_assert_eq!((slot.pending, slot.waits), (0, Waits::Nothing), "{id:?}");
        if slot.cause != Cause::Begin {
            return self.step_on(id);
        }
        slot.submitted = *now;
        let kind = match slot.io.kind {
            IoKind::Read => OpKind::Read,
            IoKind::Write { fua, .. } => OpKind::Write { fua },
            _ => return self.begin(id),
        };
        let driver = driver_of(&mut self.life.nodes, slot.node);
        let Some(pass) = driver.pass_on(&slot.io, mem) else {
            return self.begin(id);
        };
        let file = &mut files[pass.file.index()];
        let seg = slot.guest(0, slot.io.len);
        if !file.takes(kind, pass.offset, seg, slot.base_bits) {
            return self.pass_on_carefully(id);
        }
        if !matches!(kind, OpKind::Read) {
            file.note_issued_to(pass.offset + slot.io.len);
        }
        request.pass_on(kind, pass, seg);
        ops.passed_on();
        out.push(OpId(id.0));
    }

    /// The file may not take as it is what is passed on to it.
    #[inline(never)]
    fn pass_on_carefully(&mut self, id: ReqId) {
        let slot = self.core.ops.slot(id);
        let (io, driver) = (slot.io, driver_of(&mut self.life.nodes, slot.node));
        let passed = driver.pass_on(&io, &self.core.mem);
        let Pass { file, offset, label } = passed.expect("asked again, it answers the same");
        let mut cx = Cx { core: &mut self.core, me: id };
        let (target, segs) = (Target::File(file), Segs::one(cx.guest(0, io.len)));
        let kind = match io.kind {
            IoKind::Write { fua, .. } => OpKind::Write { fua },
            _ => OpKind::Read,
        };
        cx.issue(Op { kind, target, offset, len: io.len, segs });
        self.wait(id, label, Waits::Last);
    }

    /// Begins a request that is not merely passed on.
    #[inline(never)]
    fn begin(&mut self, id: ReqId) {
        let driver = driver_of(&mut self.life.nodes, self.core.ops.slot(id).node);
        let step = driver.begin(&mut Cx { core: &mut self.core, me: id });
        self.stepped(id, step);
    }

    /// Delivers its event to a request that has been begun.
    #[inline(never)]
    fn step_on(&mut self, id: ReqId) {
        let slot = self.core.ops.slot_mut(id);
        slot.issued = false;
        let event = match slot.cause {
            Cause::Begin | Cause::Start => Event::Start,
            Cause::Io => Event::Io(slot.take_result()),
            Cause::Woken => Event::Woken,
        };
        if slot.work != Work::Node {
            return self.step_own(id, event);
        }
        let driver = driver_of(&mut self.life.nodes, slot.node);
        debug_assert_eq!(driver.size(), self.sizes[slot.node.index()], "nobody truncated it");
        self.core.stats.states[slot.label as usize].record(self.core.now, slot.entered, 1);
        let state = self.states[id.index()].take().expect("a request has a state");
        let step = driver.step(state, event, &mut Cx { core: &mut self.core, me: id });
        self.stepped(id, step);
    }

    fn stepped(&mut self, id: ReqId, step: Step<D::State>) {
        if self.core.ops.slot(id).io.kind == IoKind::Truncate {
            self.resized(id);
        }
        match step {
            Step::Last { label } => self.wait(id, label, Waits::Last),
            Step::Wait(state) => {
                self.wait(id, D::label(&state) as u8, Waits::Io);
                self.put_state(id, state);
            }
            Step::Done(result) => self.core.end(id, result),
            Step::Go(state) => return self.go_on(id, state),
        }
        if !self.core.asked.is_empty() {
            self.begin_asked();
        }
    }

    /// A truncation has made a step.
    #[cold]
    fn resized(&mut self, id: ReqId) {
        let node = self.core.ops.slot(id).node;
        self.sizes[node.index()] = driver_of(&mut self.life.nodes, node).size();
    }

    fn go_on(&mut self, id: ReqId, mut state: D::State) {
        for _ in 0..GO_MAX {
            let node = self.core.ops.slot(id).node;
            let driver = driver_of(&mut self.life.nodes, node);
            match driver.step(state, Event::Start, &mut Cx { core: &mut self.core, me: id }) {
                Step::Go(next) => state = next,
                next => return self.stepped(id, next),
            }
        }
        panic!("{id:?} goes on and on: {state:?}");
    }

    /// Delivers an event to a machine of the engine's own.
    #[inline(never)]
    fn step_own(&mut self, id: ReqId, event: Event) {
        match self.core.ops.slot(id).work {
            Work::Node => unreachable!("{id:?} is of its node's driver"),
            Work::Align(key) => self.step_job(id, key, event),
            Work::Copy(key) => self.step_copy(id, key, event),
            Work::Guard(key) => self.step_guard(id, key, event),
        }
    }

    fn step_job(&mut self, id: ReqId, key: u32, event: Event) {
        match align::step(&mut self.core, id, key, event) {
            Some(result) => {
                self.core.end(id, result);
                self.core.wake_past_waiters();
            }
            None => self.wait(id, 0, Waits::Io),
        }
    }

    fn step_copy(&mut self, id: ReqId, key: u32, event: Event) {
        match copy::step(&mut self.core, id, key, event) {
            Some(()) => self.core.end(id, Ok(())),
            None => self.wait(id, 0, Waits::Io),
        }
    }

    fn step_guard(&mut self, id: ReqId, key: u32, event: Event) {
        match guard::step(&mut self.core, id, key, event) {
            Some(result) => {
                // A guest's place is used again as it is.
                self.core.ops.slot_mut(id).work = Work::Node;
                self.core.end(id, result);
            }
            None => self.wait(id, 0, Waits::Io),
        }
    }

    #[cold]
    fn begin_asked(&mut self) {
        while let Some(node) = self.core.asked.pop() {
            self.begin_chore(node, Chore::Asked);
        }
    }

    /// A step answered that it waits: for exactly one thing.
    fn wait(&mut self, id: ReqId, label: u8, waits: Waits) {
        self.backend.note(Note::Waits { request: id, label });
        let slot = self.core.ops.slot_mut(id);
        slot.label = label;
        slot.entered = self.core.now;
        if matches!(slot.waits, Waits::List(_)) {
            assert!(waits == Waits::Io, "{id:?} is on a wait list and has nothing left to do");
            return;
        }
        slot.waits = waits;
        if slot.pending == 0 {
            self.done_already(id);
        }
    }

    /// All that a step issued was done at once.
    #[cold]
    fn done_already(&mut self, id: ReqId) {
        let slot = self.core.ops.slot_mut(id);
        assert!(slot.issued, "{id:?} would wait for nothing");
        if slot.waits == Waits::Last {
            return self.core.end_last(id);
        }
        slot.deliver_io();
        self.core.ready.push(id);
    }

    /// Since [`Engine::drain`]: has everything ended, and how? An error is the first that kept an
    /// image from being left clean; those of requests come through `poll`. [`Errno::IO`] also if an
    /// image was found corrupt, now or before ([`NodeEvent::Corrupt`](crate::NodeEvent::Corrupt)): all is written that could be.
    /// Nodes that are being closed are waited for; what became of them their own events tell.
    ///
    /// `Some` from the `run` that ends the last of it until the next `submit` or `drain`. There may
    /// be finished requests to poll.
    pub fn drained(&self) -> Option<Result<(), Errno>> {
        match self.life.drain {
            Drain::Drained(result) => Some(result),
            _ => None,
        }
    }

    /// A finished request, oldest first. Makes room for another. `None`: there will be no more
    /// before the next `run`, or `submit` of a request that has nothing to do.
    #[inline(always)]
    pub fn poll(&mut self) -> Option<Finished> {
        let id = self.core.finished.pop()?;
        let slot = self.core.ops.free_slot(id);
        let (tag, result) = (slot.tag, slot.take_result());
        self.life.guests -= 1;
        self.backend.note(Note::Polled(result));
        Some(Finished { tag, result, mem: self.core.mem.take_guest(id) })
    }

    /// When `run` must be called although nothing else happens; `None`: never. May change in every
    /// `run`. Being late leaves images marked as in use for longer, jobs and backends that wait for their
    /// time waiting, no more.
    pub fn next_deadline(&self) -> Option<Time> {
        let nodes = (0..self.life.nodes.len()).filter_map(|index| self.deadline_of(index));
        let copies = self.core.copies.iter().filter_map(|(_, copy)| copy.deadline());
        let own = nodes.chain(self.core.give_back_due()).chain(copies).chain(self.core.held_due());
        own.chain(self.backend.next_deadline()).min()
    }

    /// Readable when `run` has something to collect, until it has; never read it. The same one for
    /// as long as the engine lives, to be looked at for levels or for edges: a `run` collects all
    /// there is. `None`: run again as long as [`Progress::again`] says so.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.event_fd()
    }

    /// Guest requests that have not ended: those submitted, less those that `poll` has given or
    /// will give. Nodes' own work is not counted: see [`Engine::is_idle`].
    pub fn in_flight(&self) -> usize {
        self.life.guests
            - self.core.finished.len()
            - self.core.abandoned
            - self.core.abandoned_ended
    }

    /// Requests that were [given up](Engine::abandon) and have not ended: they have their places among
    /// [`Limits::requests`](crate::Limits::requests) still. Changes in `run`.
    pub fn abandoned(&self) -> usize {
        self.core.abandoned + self.core.abandoned_ended
    }

    /// Is nothing at all in flight, chores included? There may be finished requests to poll.
    pub fn is_idle(&self) -> bool {
        self.core.ops.live() == self.core.finished.len()
    }

    /// What was counted.
    pub fn stats(&self) -> &Stats {
        &self.core.stats
    }

    /// Counts from zero.
    pub fn reset_stats(&mut self) {
        self.core.stats = Stats::default();
        self.core.nodes.iter_mut().for_each(|record| record.stats = NodeStats::default());
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The backend, for a simulator that decides what completes next.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// The memory that requests, nodes and the engine hold, for a simulator to look at.
    pub fn memory(&self) -> &Memory {
        &self.core.mem
    }

    /// The ops that have not come back, for a simulator to choose from.
    pub fn ops(&self) -> &Ops {
        &self.core.ops
    }

    /// Would anybody be stepped if this op came back now? Not if its request waits for others too.
    /// For a simulator: in which order such ops come back makes no difference.
    pub fn is_awaited(&self, op: OpId) -> bool {
        let mut slot = self.core.ops.slot(self.core.ops[op].owner.request);
        while let (1, Waits::Last | Waits::Pass, Origin::Child(parent)) =
            (slot.pending, slot.waits, slot.origin)
        {
            slot = self.core.ops.slot(parent);
        }
        slot.pending == 1
    }

    /// Panics if a request, op, buffer, claim or waiter is left behind. For tests, at rest.
    pub fn assert_idle(&self) {
        self.core.assert_idle();
    }
}

/// The driver of a node that has requests: that is there.
#[inline(always)]
fn driver_of<D>(nodes: &mut [Option<D>], node: NodeId) -> &mut D {
    match &mut nodes[node.index()] {
        Some(driver) => driver,
        None => no_driver(node),
    }
}

#[cold]
fn no_driver(node: NodeId) -> ! {
    panic!("{node:?} has requests, and is gone")
}

/// Has a read or write the memory that it says?
#[inline(always)]
fn mem_fits(io: &Io, mem: &Mem) -> bool {
    match io.kind {
        IoKind::Read if mem.is_read_only() => false,
        IoKind::Read | IoKind::Write { .. } => io.len == mem.len() as u64 && io.len <= REQUEST_MAX,
        IoKind::Status { .. } => mem.len() == Status::BYTES && !mem.is_read_only(),
        _ => true,
    }
}

/// How much of a turn is over.
struct Turn {
    began: Time,
    /// When the clock was last looked at.
    seen: Time,
    /// It has lasted as long as it may. Then: and something is left for the next.
    is_over: bool,
}

/// Events between two looks at the clock.
const STEPS_PER_LOOK: usize = 32;

/// Ops in the first slice, before anything is known of the backend: twice as many in the next.
const PACE_FIRST: usize = 1;
const PACE_MAX: usize = 1024;

impl<D: Driver + Clone, B: Backend + Clone> Clone for Engine<D, B> {
    fn clone(&self) -> Self {
        Engine {
            life: self.life.clone(),
            sizes: self.sizes.clone(),
            states: self.states.clone(),
            core: self.core.clone(),
            backend: self.backend.clone(),
            completions: Vec::new(),
            pace: self.pace,
            tag: self.tag,
        }
    }

    fn clone_from(&mut self, source: &Self) {
        self.life.clone_from(&source.life);
        self.sizes.clone_from(&source.sizes);
        self.states.clone_from(&source.states);
        self.core.clone_from(&source.core);
        self.backend.clone_from(&source.backend);
        self.completions.clear();
        (self.tag, self.pace) = (source.tag, source.pace);
    }
}

impl<D: Driver + Hash, B: Backend + Hash> Hash for Engine<D, B> {
    /// Everything that decides what can happen next; not the statistics.
    fn hash<H: Hasher>(&self, h: &mut H) {
        let names = self.core.ops.in_order();
        let h = &mut Renamed { names: &names, inner: h };
        self.life.nodes.hash(h);
        for id in &names {
            self.states.get(id.index()).hash(h);
        }
        self.core.hash_in_order(&names, h);
        self.backend.hash(h);
        self.life.drain.hash(h);
    }
}

impl<D: Driver, B: Backend> std::fmt::Debug for Engine<D, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (id, slot) in self.core.ops.slots() {
            let state = self.states.get(id.index());
            writeln!(
                f,
                "{id:?} {:?} {:?} waits for {:?}: {state:?}",
                slot.io, slot.origin, slot.waits
            )?;
        }
        for (id, record) in self.core.ops.iter() {
            writeln!(f, "{id:?} {:?} of {:?}", record.op, record.owner)?;
        }
        Ok(())
    }
}
