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
//! A worker asks on while it is told of data, and then reads all of it at once. What it has read it
//! may look through for zeros, and writes stretch after stretch. Stretches end where units of the
//! target do: a unit that is data in part is data. If it is to salvage what it can, what cannot be read
//! together is read sector by sector.
//!
//! It asks about as much as there is, and nobody begins a piece meanwhile: a piece that begins with zeros is as long
//! as these.
//!
//! *Of one moment* ([`Moment::Start`]): what somebody wants to change is read first. He waits ([`guard`](crate::guard)), and
//! what he waits for is the next piece, whatever else holds up the job: a pause, the rate, who asks. What was taken so is marked,
//! and left out when its turn comes. From the moment that a stretch is read, or known to be zeros, it may change.
//!
//! *A pull* is of one moment, of a disk into itself: what the layers below have of it. There a stretch may change when it has been
//! written, so that nothing older comes after what a guest wrote; and nothing begins while a write is in
//! flight that nobody has looked at, because it is older than the job. What is found to be in the disk's own layers is left.
//!
//! *Shown to the embedder* ([`Copy::shown`]): a worker that has read waits until that has been seen. It is shown in order,
//! and pieces are taken in order: so the worker whose turn it is never waits for another one.
//!
//! *Offloaded* ([`Copy::offload`]): where both disks are files, byte for byte, `Offload` takes the place of `Read` and
//! `Write`: one op of the target's file has the kernel copy. The first that fails is the last; it, and the rest of
//! the job, is read and written.
//!
//! Pieces end in any order. A worker that waits for its turn or to be resumed holds nothing that
//! others wait for. The memory is given up when the last worker has ended, so when nothing of the job
//! is in flight.

use crate::copy_job::{Copy, CopyJob, Moment, PAGE, SECTOR, State, Worker, Zeros};
use crate::core::{Core, GO_MAX};
use crate::events::NodeEvent;
use crate::mutant;
use crate::op::{Base, Op, OpKind, Seg, Segs, Target};
use crate::request::{Event, Io, IoKind, Step};
use crate::status::{Status, StatusKind};
use crate::units::{Errno, ReqId};
use crate::wait::On;

/// Delivers an event; answers when the worker has ended.
pub(crate) fn step(core: &mut Core, me: ReqId, key: u32, mut event: Event) -> Option<()> {
    let mut worker = core.workers[key as usize];
    for _ in 0..GO_MAX {
        let mut machine = Machine { core, me, key, worker: &mut worker };
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
                if worker.at < worker.end && !mutant!("what_a_copy_gave_up_is_done") {
                    let job = &mut core.copies[worker.job as usize];
                    job.given_up = job.given_up.min(worker.at);
                }
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
    let forgets = job.failed.is_some() && mutant!("cancelled_copy_forgets_workers");
    let is_over = job.workers == 0 || forgets;
    let is_failed = job.failed.is_some();
    core.wake_workers(key);
    if is_failed {
        core.wake_stopped(key);
    }
    if is_failed && !mutant!("failed_copy_waits_to_be_seen") {
        core.wake_unseen(key);
    }
    // What a mirror holds goes on when it has become the disk, and that was told.
    let is_held = job_is_held(core, key);
    if !is_held {
        core.let_guests_go(key);
    }
    if !is_over {
        return;
    }
    let job = core.copies.remove(key as usize);
    core.mem.free_region(job.region);
    if job.copy.zeros == Zeros::Found {
        core.mem.seek_zeros(false);
    }
    for node in [job.copy.source, job.copy.target] {
        core.nodes[node.index()].jobs -= u32::from(!mutant!("copied_disk_stays_in_use"));
    }
    if job.copy.moment != Moment::Any {
        let record = &mut core.nodes[job.copy.source.index()];
        record.guards -= 1;
        if job.copy.moment == Moment::End && job.failed.is_none() {
            record.moved_to = Some(job.copy.target);
            record.moved_untold = Some(job.id);
            record.wait_for_move = job.guests;
        }
        record.set_open_to();
    }
    let result = job.failed.map_or(Ok(()), Err);
    core.events.push(NodeEvent::JobEnded { job: job.id, result });
}

/// Do writes wait for the end of a mirror that goes well?
fn job_is_held(core: &Core, key: u32) -> bool {
    let job = &core.copies[key as usize];
    job.mirror.holds && job.failed.is_none()
}

struct Machine<'a> {
    core: &'a mut Core,
    me: ReqId,
    /// The worker's.
    key: u32,
    worker: &'a mut Worker,
}

impl Machine<'_> {
    fn step(&mut self, event: Event) -> Step<State> {
        if self.worker.state == State::Piece && event == Event::Woken {
            self.job_mut().mirror.parked -= 1;
        }
        if self.job().failed.is_some() {
            return Step::Done(Ok(()));
        }
        if self.worker.state == State::Status && matches!(event, Event::Io(_)) {
            self.job_mut().asking -= u32::from(!self.worker.is_wanted);
        }
        match (self.worker.state, event) {
            (State::Offload { len }, Event::Io(result)) => self.offloaded(len, result),
            (state, Event::Io(Err(errno))) => self.failed(state, errno),
            (State::Piece, _) => self.take_piece(),
            (State::Status, Event::Start) => self.go_on(),
            (State::Status, _) => self.answered(true),
            (State::Read | State::Look, _) => self.show(),
            (State::ReadSector { at }, _) => self.read_sectors(at + SECTOR),
            (State::Write { len }, _) => self.written(len),
            // What has been read is in memory.
            (State::Again | State::Offload { .. }, _) => Step::Go(State::Status),
            (State::Flush, _) => Step::Done(Ok(())),
        }
    }

    fn job(&self) -> &CopyJob {
        &self.core.copies[self.worker.job as usize]
    }

    fn job_mut(&mut self) -> &mut CopyJob {
        &mut self.core.copies[self.worker.job as usize]
    }

    /// `len` bytes of the worker's memory, from byte `off` on.
    fn memory(&self, off: u64, len: u64) -> Seg {
        let region = self.job().region;
        let off = self.worker.memory + off as u32;
        Seg { base: Base::Region(region), off, len: len as u32 }
    }

    fn take_piece(&mut self) -> Step<State> {
        let now = self.core.now;
        if self.job().copy.is_pull()
            && !mutant!("pull_begins_before_old_writes_end")
            && let Some(step) = self.await_old_writes()
        {
            return step;
        }
        let job = &mut self.core.copies[self.worker.job as usize];
        let sleeps = job.is_paused && mutant!("paused_copy_holds_guests");
        let wanted = if sleeps { None } else { job.take_wanted() };
        if let Some(piece) = wanted {
            self.take(piece, true);
            self.wake_next();
            return Step::Go(State::Status);
        }
        if job.copy.moment == Moment::End
            && !job.mirror.is_over
            && let Some(step) = self.take_of_mirror()
        {
            return step;
        }
        let job = &mut self.core.copies[self.worker.job as usize];
        job.skip_taken();
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
        if job.is_paused || job.asking > 0 || job.due > now {
            return self.park_until_due();
        }
        if self.may_be_overtaken() {
            return self.park();
        }
        let job = &mut self.core.copies[self.worker.job as usize];
        let mut end = job.next.saturating_add(job.piece()).min(job.total);
        if end < job.total {
            end = job.copy.unit_floor(end);
        }
        end = job.free_up_to(end);
        if job.next < job.source_size {
            // No piece is of both.
            end = end.min(job.source_size);
        } else if job.skips_zeros() {
            // Nothing has to be done for the rest, however long it is.
            end = job.total;
        } else if job.copy.zeros != Zeros::Written {
            end = job.next.saturating_add(AT_ONCE).min(job.total);
        }
        let at = std::mem::replace(&mut job.next, end);
        self.take((at, end), false);
        Step::Go(State::Status)
    }

    /// Are writes to the target in flight that its guest has given up? What is old shall not come after what is
    /// new. (To what a pull copies its guest's writes come in their turn.)
    fn may_be_overtaken(&self) -> bool {
        let copy = &self.job().copy;
        let target = &self.core.nodes[copy.target.index()];
        let any = !copy.is_pull() && !target.hold.abandoned.is_empty();
        any && !mutant!("copy_overtakes_abandoned_write")
    }

    /// Waits while a write is in flight that began before the job did. `None`: there is none.
    fn await_old_writes(&mut self) -> Option<Step<State>> {
        let CopyJob { copy, mirror, .. } = *self.job();
        if mirror.is_seen {
            return None;
        }
        if self.core.is_changed_unseen(copy.source, mirror.first_seen) {
            let mut list = std::mem::take(&mut self.core.past_waiters);
            self.core.park(self.me, &mut list, On::Users);
            self.core.past_waiters = list;
            self.job_mut().mirror.parked += 1;
            return Some(Step::Wait(State::Piece));
        }
        self.job_mut().mirror.is_seen = true;
        None
    }

    /// What a mirror has to do besides going through the source once: `None`, that.
    fn take_of_mirror(&mut self) -> Option<Step<State>> {
        if !mutant!("mirror_begins_before_old_writes_end")
            && let Some(step) = self.await_old_writes()
        {
            return Some(step);
        }
        let CopyJob { copy, mirror, next, total, workers, .. } = *self.job();
        let job = self.job();
        let must_wait = job.is_paused || job.due > self.core.now && !mirror.holds;
        if next < total {
            return None;
        }
        if must_wait {
            return Some(self.park_until_due());
        }
        if job.is_near() {
            self.job_mut().mirror.holds = true;
        }
        let Core { copies, workers: all, .. } = &mut *self.core;
        let piece = copies[self.worker.job as usize].take_changed(all, self.key);
        if let Some(piece) = piece {
            self.take(piece, true);
            self.wake_next();
            return Some(Step::Go(State::Status));
        }
        // Others may find, or write, what has to be copied again.
        let others_go_on = workers - self.job().mirror.parked > 1;
        let writes_go_on = self.core.nodes[copy.source.index()].guarded > 0;
        if others_go_on || writes_go_on && !mutant!("mirror_ends_with_writes_in_flight") {
            return Some(self.park());
        }
        debug_assert!(self.job().ahead.count() == 0, "{:?}", self.job());
        self.job_mut().mirror.is_over = true;
        let mut waiters = std::mem::take(&mut self.job_mut().waiters);
        self.core.wake_all(&mut waiters);
        None
    }

    fn take(&mut self, (at, end): (u64, u64), is_wanted: bool) {
        let held = (at, at);
        let (data_end, answer_at, read_to) = (at, None, at);
        *self.worker =
            Worker { at, end, data_end, answer_at, read_to, is_wanted, held, ..*self.worker };
        let counts = mutant!("copy_counted_before_it_is_written");
        self.job_mut().done += if counts { end - at } else { 0 };
    }

    /// Waits for the time at which the next piece may begin, if that is to come.
    fn park_until_due(&mut self) -> Step<State> {
        let is_to_come = self.job().due > self.core.now;
        self.job_mut().awaits_due |= is_to_come;
        self.park()
    }

    /// Waits until somebody looks again: who asks, who is done, or who resumes the job.
    fn park(&mut self) -> Step<State> {
        let mut list = std::mem::take(&mut self.job_mut().waiters);
        self.core.park(self.me, &mut list, On::Job);
        let job = self.job_mut();
        job.waiters = list;
        job.mirror.parked += 1;
        job.awaits_due |= mutant!("copy_waits_for_a_time_that_has_come");
        Step::Wait(State::Piece)
    }

    /// What has been read is written first; then the rest of the piece is asked about.
    fn go_on(&mut self) -> Step<State> {
        let Worker { at, end, held, .. } = *self.worker;
        if at < held.1 {
            return self.store();
        }
        if at == end {
            return Step::Go(State::Piece);
        }
        self.ask_status()
    }

    fn ask_status(&mut self) -> Step<State> {
        let Worker { data_end: from, end, .. } = *self.worker;
        let job = self.job();
        let (source, offset) = (job.copy.source, job.copy.source_offset + from);
        if from >= job.source_size {
            if mutant!("copy_leaves_the_rest") {
                return self.written(end - from);
            }
            return self.zero(end - from);
        }
        // A file system may look through all of it to tell where data ends: it is asked once.
        if (job.data.0..job.data.1).contains(&from) && !self.worker.is_wanted {
            return self.is_data_to(job.data.1.min(job.source_size));
        }
        if self.worker.answer_at == Some(from) {
            // What changes the piece meanwhile waits, or is copied again.
            return self.answered(false);
        }
        let asked = self.asked_from(from);
        let seg = self.memory(job.copy.piece as u64, Status::BYTES as u64);
        self.worker.answer_at = None;
        self.job_mut().asking += u32::from(!self.worker.is_wanted);
        self.core.mem.region_mut_of(seg).fill(0);
        self.core.ask_status(self.me, source, (offset, asked), seg);
        Step::Wait(State::Status)
    }

    /// What was taken is on its way: it is somebody else's turn.
    fn wake_next(&mut self) {
        let mut waiters = std::mem::take(&mut self.job_mut().waiters);
        self.core.wake_first(&mut waiters);
        self.job_mut().waiters = waiters;
    }

    /// Nothing is to be read up to here: the piece is as long, if nobody has taken the next one.
    fn grow_to(&mut self, said: u64) {
        let job = &mut self.core.copies[self.worker.job as usize];
        if job.next != self.worker.end || self.worker.is_wanted {
            return;
        }
        let said = job.free_up_to(said);
        let is_end = said >= job.source_size;
        let end = if is_end { job.source_size } else { job.copy.unit_floor(said) };
        if end > job.next {
            (job.next, self.worker.end) = (end, end);
        }
    }

    /// The disk has told what is there: just now, or before the data in front of it was copied. Of what lies behind
    /// the piece a mirror notes who writes there only while it is asked about, so that an old answer is none.
    fn answered(&mut self, is_new: bool) -> Step<State> {
        let Worker { at, data_end: from, end, .. } = *self.worker;
        let job = self.job();
        let (copy, asked) = (job.copy, self.asked_from(from));
        let seg = self.memory(copy.piece as u64, Status::BYTES as u64);
        let status = Status::from_bytes(self.core.mem.region_mut_of(seg));
        let Some(status) = status.filter(|status| (1..=asked).contains(&status.len)) else {
            return Step::Done(Err(Errno::IO));
        };
        let said = from + status.len;
        // Where no layer says anything, a disk that is cut off shows the same.
        let says_nothing = copy.is_pull() && status.kind == StatusKind::Unallocated;
        let is_left = copy.leaves_out(status.depth) || says_nothing;
        let grows = is_left || status.kind.is_zero() && copy.zeros != Zeros::Written;
        let is_current =
            is_new || copy.moment != Moment::End || mutant!("mirror_goes_by_an_old_answer");
        let grows = grows && is_current;
        if grows && from == at && said > end {
            self.grow_to(said);
        }
        let whole = self.whole_up_to(said);
        if (is_left || status.kind.is_zero()) && whole > from {
            if from > at {
                // What is data before it comes first.
                self.worker.answer_at = Some(from);
                return self.read();
            }
            if is_left || !copy.is_pull() {
                self.has_read(whole);
            }
            return if is_left { self.written(whole - from) } else { self.zero(whole - from) };
        }
        if !copy.is_pull() && !is_left && !status.kind.is_zero() {
            self.job_mut().data = (from, said);
        }
        self.is_data_to(said)
    }

    /// Where the last whole unit of the piece ends that is all before `said`; the piece's own end counts.
    fn whole_up_to(&self, said: u64) -> u64 {
        let end = self.worker.end;
        if said >= end { end } else { self.job().copy.unit_floor(said) }
    }

    /// What follows is data, or counts as data, up to `said`: with what is in one unit with it.
    fn is_data_to(&mut self, said: u64) -> Step<State> {
        let end = self.worker.end;
        let (to, copy) = (said.min(end), self.job().copy);
        let is_whole = self.whole_up_to(said) == to;
        self.worker.data_end = if is_whole { to } else { copy.unit_end(to).min(end) };
        if self.worker.data_end == end { self.read() } else { self.ask_status() }
    }

    fn read(&mut self) -> Step<State> {
        let Worker { at, data_end, .. } = *self.worker;
        self.count_for_rate(data_end - at);
        if let Some(op) = self.offload(at, data_end - at) {
            self.core.issue(self.me, op);
            if mutant!("offloaded_copy_counts_as_read_at_once") {
                self.has_read(data_end);
            }
            self.wake_next();
            return Step::Wait(State::Offload { len: data_end - at });
        }
        self.read_into_memory()
    }

    /// What is read makes the next piece due later, if there is a limit.
    fn count_for_rate(&mut self, len: u64) {
        let now = self.core.now;
        let job = &mut self.core.copies[self.worker.job as usize];
        if let Some(rate) = job.copy.rate {
            job.due = job.due.max(now).plus_at_rate(len, rate);
        }
    }

    /// The op that has the kernel copy these bytes. `None`: they are to be read and written.
    fn offload(&self, at: u64, len: u64) -> Option<Op> {
        let CopyJob { copy, between, .. } = self.job();
        let (from, to) = (*between)?;
        let (from_offset, to_offset) = (copy.source_offset + at, copy.target_offset + at);
        // What was given up there and is not yet given back may change meanwhile.
        let file = &self.core.files[from.index()];
        let is_settled = !file.given_up.overlaps(from_offset, from_offset + len);
        let kind = OpKind::Copy { from, at: from_offset };
        // A file may end before its disk does.
        let is_there = from_offset + len <= file.len;
        (is_settled && is_there).then(|| Op::bare(kind, to, to_offset, len))
    }

    /// The kernel has copied so many bytes, or it could not.
    fn offloaded(&mut self, len: u64, result: Result<(), Errno>) -> Step<State> {
        if result.is_err() && !mutant!("failed_offload_counts_as_copied") {
            // Whatever it was: it comes again where it can be told, if it is a disk's error.
            self.job_mut().between = None;
            return self.read_into_memory();
        }
        self.has_read(self.worker.at + len);
        self.written(len)
    }

    fn read_into_memory(&mut self) -> Step<State> {
        let Worker { at, data_end, .. } = *self.worker;
        let copy = self.job().copy;
        // More than the memory holds may have been to offload.
        let most = copy.unit_floor(at.saturating_add(copy.piece as u64)).max(at + 1);
        let data_end = if data_end - at > copy.piece as u64 { most } else { data_end };
        let (source, offset) = (Target::Node(copy.source), copy.source_offset + at);
        let segs = Segs::one(self.memory(0, data_end - at));
        (self.worker.held, self.worker.data_end) = ((at, data_end), data_end);
        self.core.issue(self.me, Op::read(source, offset, segs));
        self.wake_next();
        Step::Wait(State::Read)
    }

    /// What was awaited came to nothing.
    fn failed(&mut self, state: State, errno: Errno) -> Step<State> {
        let Worker { at, data_end, held, .. } = *self.worker;
        let copy = self.job().copy;
        let (node, start, len) = match state {
            State::Status if copy.salvage => {
                // Then what is there is seen when it is read.
                self.worker.data_end = self.worker.end;
                return self.read();
            }
            State::Read if copy.salvage => return self.read_sectors(at),
            State::ReadSector { at } => {
                let len = SECTOR.min(held.1 - at);
                let seg = self.memory(at - held.0, len);
                self.core.mem.region_mut_of(seg).fill(0);
                (copy.source, copy.source_offset + at, len)
            }
            State::Status => (copy.source, copy.source_offset + data_end, 0),
            State::Read => (copy.source, copy.source_offset + at, data_end - at),
            State::Write { len } => (copy.target, copy.target_offset + at, len),
            State::Piece | State::Look | State::Again | State::Offload { .. } | State::Flush => {
                (copy.target, 0, 0)
            }
        };
        let job = self.job().id;
        self.core.tell_job_error(job, node, (start, len), errno);
        match state {
            State::ReadSector { at } => self.read_sectors(at + SECTOR),
            State::Flush => Step::Done(Err(errno)),
            _ if !copy.stops_on_error => Step::Done(Err(errno)),
            _ => self.stop(state),
        }
    }

    /// The job stands still until somebody resumes it; then this is tried again.
    fn stop(&mut self, failed: State) -> Step<State> {
        let Worker { at, held, .. } = *self.worker;
        if let State::Write { len } = failed
            && mutant!("stopped_copy_skips_what_failed")
        {
            self.worker.at += len;
        }
        if matches!(failed, State::Status | State::Read) {
            // Nothing of it is in memory; all of it is asked about again.
            (self.worker.data_end, self.worker.held) = (at, (at, at));
            self.worker.answer_at = None;
        } else {
            debug_assert!(held.0 <= at, "{:?}", self.worker);
        }
        self.core.pause_copy(self.worker.job);
        let mut list = std::mem::take(&mut self.job_mut().stopped);
        self.core.park(self.me, &mut list, On::Job);
        self.job_mut().stopped = list;
        // What others wait for is others' turn.
        self.wake_next();
        Step::Wait(State::Again)
    }

    /// Reads again, from `at` on, what could not be read together.
    fn read_sectors(&mut self, at: u64) -> Step<State> {
        let held = self.worker.held;
        if at >= held.1 {
            return self.show();
        }
        let copy = self.job().copy;
        let (source, offset) = (Target::Node(copy.source), copy.source_offset + at);
        let segs = Segs::one(self.memory(at - held.0, SECTOR.min(held.1 - at)));
        self.core.issue(self.me, Op::read(source, offset, segs));
        Step::Wait(State::ReadSector { at })
    }

    /// Up to here the source may change.
    fn has_read(&mut self, to: u64) {
        if to > self.worker.read_to {
            self.worker.read_to = to;
            self.core.let_guests_go(self.worker.job);
        }
    }

    /// How much is asked about from `from` on: about as much as there is; of what somebody waits for, no
    /// more than that.
    fn asked_from(&self, from: u64) -> u64 {
        let end = if self.worker.is_wanted { self.worker.end } else { self.job().source_size };
        (end - from).min(AT_ONCE)
    }

    /// What has been read is to be seen, before it is written.
    fn show(&mut self) -> Step<State> {
        let is_seen = self.worker.read_to >= self.worker.held.1;
        if !self.job().copy.shown || is_seen {
            return self.store();
        }
        let mut list = std::mem::take(&mut self.job_mut().unseen);
        self.core.park(self.me, &mut list, On::Job);
        self.job_mut().unseen = list;
        Step::Wait(State::Look)
    }

    /// Writes the first stretch of what has been read and not yet been written.
    fn store(&mut self) -> Step<State> {
        let Worker { at, held, .. } = *self.worker;
        let copy = self.job().copy;
        if !copy.is_pull() || mutant!("pull_lets_writes_pass_before_its_own") {
            self.has_read(held.1);
        }
        if copy.zeros != Zeros::Found {
            return self.write(held.1 - at);
        }
        let seg = self.memory(at - held.0, held.1 - at);
        let bytes = self.core.mem.region_mut_of(seg);
        let is_zeros =
            |from: u64, to: u64| is_zeros(&bytes[(from - at) as usize..(to - at) as usize]);
        let mut end = copy.unit_end(at).min(held.1);
        let zeros = is_zeros(at, end);
        while end < held.1 {
            let next = copy.unit_end(end).min(held.1);
            if is_zeros(end, next) != zeros {
                break;
            }
            end = next;
        }
        if zeros { self.zero(end - at) } else { self.write(end - at) }
    }

    /// Does it copy what a mirror has copied, and a guest has changed since?
    fn copies_again(&self) -> bool {
        self.worker.is_wanted && self.job().copy.moment == Moment::End
    }

    /// The next `len` bytes are zeros.
    fn zero(&mut self, len: u64) -> Step<State> {
        let job = self.job();
        let copy = job.copy;
        // What a mirror has copied, and is zeros since, is to be zeros there, too.
        let again = self.copies_again() && !mutant!("mirror_skips_zeros_again");
        if job.skips_zeros() && !again || mutant!("copy_skips_zeros") {
            return self.written(len);
        }
        let at = self.worker.at;
        if copy.zeros == Zeros::Written {
            let seg = self.memory(0, len);
            self.core.mem.region_mut_of(seg).fill(0);
            self.worker.held = (at, at + len);
            self.wake_next();
            return self.write(len);
        }
        let (kind, target) = (OpKind::Zero { unmap: true }, Target::Node(copy.target));
        let op = Op { kind, target, offset: copy.target_offset + at, len, segs: Segs::none() };
        self.core.issue(self.me, op);
        self.wake_next();
        Step::Wait(State::Write { len })
    }

    /// Writes the next `len` bytes, which are in memory.
    fn write(&mut self, len: u64) -> Step<State> {
        let Worker { at, held, .. } = *self.worker;
        let Copy { target, target_offset, compressed, .. } = self.job().copy;
        let kind = IoKind::Write { fua: false, compressed };
        let (io, seg) =
            (Io { kind, offset: target_offset + at, len }, self.memory(at - held.0, len));
        self.core.issue_request(self.me, target, io, seg);
        Step::Wait(State::Write { len })
    }

    fn written(&mut self, len: u64) -> Step<State> {
        self.worker.at += len;
        self.worker.data_end = self.worker.data_end.max(self.worker.at);
        if self.job().copy.is_pull() {
            self.has_read(self.worker.at);
        }
        let counted = mutant!("copy_counted_before_it_is_written");
        // What a mirror copies again counts once.
        let again = self.copies_again();
        self.job_mut().done += if counted || again { 0 } else { len };
        Step::Go(State::Status)
    }
}

/// Are they all 0?
fn is_zeros(bytes: &[u8]) -> bool {
    let chunks = bytes.chunks_exact(64);
    let rest = chunks.remainder();
    let or = |bytes: &[u8]| bytes.iter().fold(0, |or, byte| or | byte);
    or(rest) == 0 && chunks.into_iter().all(|chunk| or(chunk) == 0)
}

/// Bytes that are asked about, and zeroed, at once: bounds what a driver does in one step.
const AT_ONCE: u64 = 1 << 30;

/// Bytes of memory that each worker has.
pub(crate) fn memory_of(piece: usize) -> usize {
    piece + PAGE as usize
}
