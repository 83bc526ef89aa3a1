//! Jobs: work over several nodes that an embedder starts. What a copy does is said in `copy.rs`.

use std::collections::VecDeque;
use std::ops::Range;

use super::Engine;
use crate::backend::{Backend, Called, JobCall};
use crate::copy;
use crate::copy_job::{Copy, CopyJob, JobProgress, Mirror, Moment, Worker, Zeros};
use crate::life::{Drain, Why};
use crate::mem::Looked;
use crate::mutant;
use crate::request::{Io, IoKind};
use crate::slots::{Cause, Origin, Work};
use crate::step::Driver;
use crate::units::{FileId, JobId, NodeId, Time};
use crate::wait::WaitList;

impl<D: Driver, B: Backend> Engine<D, B> {
    /// Begins to copy one node to another, while others go on. Go on as ever, with `run` and `poll`,
    /// until [`poll_event`](Engine::poll_event) answers
    /// [`NodeEvent::JobEnded`](crate::NodeEvent::JobEnded); `run` once before waiting. `Ok` there means that all bytes are in
    /// the target and stable. After an error, or a cancel, any part of the target may have been
    /// written.
    ///
    /// Each byte is copied as it was at some moment of the job, or all as they were at its start:
    /// [`Moment`](crate::Moment). Neither node is closed, paused or resized while the job runs
    /// ([`Why::InUse`]; a truncation fails). A [`drain`](Engine::drain) cancels the job.
    ///
    /// # Errors
    ///
    /// And nothing was begun. As a [`submit`](Engine::submit) to each of them;
    /// [`Why::InUse`]: they are one node (for that there is [`Copy::pull`]), another node reads from the target ([`Copy::top_layers`] says when it may), or one of them is being
    /// resized; [`Why::TooSmall`]: what is to be copied does not fit into the target, or begins behind
    /// the source's end; [`Why::TooLarge`]: what is read before it is changed is remembered, and that
    /// would take more than 64 MiB (32 TiB in granules of 64 KiB; of larger ones more);
    /// [`Why::OutOfOrder`]: it is to be [shown](Copy::shown), and not of [`Moment::Any`].
    pub fn start(&mut self, copy: Copy) -> Result<JobId, Why> {
        self.start_copy(copy, None)
    }

    /// The same, of these parts of the source alone, each rounded out to granules of 64 KiB (units, if
    /// they are more): what has changed since another copy was made, say. What is behind the source's end
    /// is zeroed all the same, and a mirror is of everything. A job's [progress](Engine::job_progress) is of what is copied.
    ///
    /// # Errors
    ///
    /// As [`start`](Engine::start); [`Why::TooLarge`] whatever moment the copy is of.
    pub fn start_parts(&mut self, copy: Copy, parts: &[Range<u64>]) -> Result<JobId, Why> {
        self.start_copy(copy, Some(parts))
    }

    fn start_copy(&mut self, copy: Copy, parts: Option<&[Range<u64>]>) -> Result<JobId, Why> {
        let (source, target) = (copy.source, copy.target);
        let uses = [source, target];
        if uses.iter().any(|&node| !self.has(node)) {
            return Err(Why::NoSuchNode);
        }
        self.called(Called::Start { source, target, copy: &copy.to_numbers(), parts });
        let copy = copy.within_ranges();
        let is_resized = self
            .core
            .ops
            .slots()
            .any(|(_, slot)| slot.io.kind == IoKind::Truncate && uses.contains(&slot.node));
        // What a layer itself says is not seen through those that are copied.
        let is_below = !self.core.nodes[copy.target.index()].is_top && copy.top_layers.is_none();
        // A mirror takes the source's place, which nobody reads from then.
        let is_read = copy.moment == Moment::End && !self.core.nodes[copy.source.index()].is_top;
        let has_moved = uses.iter().any(|&node| self.core.has_moved(node));
        let is_one = !copy.is_between_disks();
        if is_one || is_resized || is_below || is_read || has_moved {
            return Err(Why::InUse);
        }
        let passes_by = |job: &CopyJob| copy.passes_by(&job.copy) || job.copy.passes_by(&copy);
        if self.core.copies.iter().any(|(_, job)| passes_by(job)) {
            return Err(Why::InUse);
        }
        if copy.shown && copy.moment != Moment::Any {
            return Err(Why::OutOfOrder);
        }
        let (source_size, total) = self.extent_of(&copy).ok_or(Why::TooSmall)?;
        for node in uses {
            self.life.why_not(&mut self.core, node)?;
        }
        let ahead = copy.marks(source_size, parts).ok_or(Why::TooLarge)?;
        let files = self.file_of(copy.source, false).zip(self.file_of(copy.target, true));
        let between = files.filter(|(from, to)| copy.may_offload() && from != to);
        let core = &mut self.core;
        let id = JobId { engine: self.tag, serial: core.next_job };
        core.next_job = core.next_job.wrapping_add(1);
        let lane = copy::memory_of(copy.piece);
        let region = core.mem.add_region(lane * copy.in_flight);
        core.mem.set_looked_at(region, Looked::First(0));
        if copy.zeros == Zeros::Found {
            core.mem.seek_zeros(true);
        }
        let job = CopyJob {
            id,
            copy,
            between,
            region,
            source_size,
            total,
            left_out: parts.map_or(0, |_| ahead.marked(source_size)),
            next: 0,
            data: (0, 0),
            asking: 0,
            done: 0,
            given_up: u64::MAX,
            workers: copy.in_flight as u32,
            is_paused: false,
            failed: None,
            due: Time(0),
            awaits_due: false,
            waiters: WaitList::new(),
            stopped: WaitList::new(),
            unseen: WaitList::new(),
            key: core.copies.vacant_key() as u32,
            ahead,
            mirror: Mirror { first_seen: core.serial, ..Mirror::default() },
            wanted: VecDeque::new(),
            guests: WaitList::new(),
            held_since: None,
        };
        let job = core.copies.insert(job) as u32;
        if copy.moment != Moment::Any {
            let record = &mut core.nodes[copy.source.index()];
            record.guards += 1;
            record.set_open_to();
        }
        uses.iter().for_each(|node| core.nodes[node.index()].jobs += 1);
        for at in 0..copy.in_flight {
            let memory = (at * lane) as u32;
            let worker = Worker::new(job, memory);
            let key = core.workers.insert(worker) as u32;
            let id = core.begin(copy.target, Io::flush(), Origin::Chore, 0, 0);
            let slot = core.ops.slot_mut(id);
            (slot.work, slot.cause) = (Work::Copy(key), Cause::Start);
        }
        Ok(id)
    }

    fn file_of(&self, node: NodeId, written: bool) -> Option<FileId> {
        self.node(node).file_of_disk(written)
    }

    /// How many bytes there are to copy from the source, and to write to the target. `None`: they do
    /// not fit.
    fn extent_of(&self, copy: &Copy) -> Option<(u64, u64)> {
        let source = self.size(copy.source).checked_sub(copy.source_offset)?;
        let room = self.size(copy.target).checked_sub(copy.target_offset)?;
        match copy.len {
            Some(len) => (len <= room).then_some((source.min(len), len)),
            None => (source <= room).then_some((source, room)),
        }
    }

    fn job_mut(&mut self, job: JobId) -> Option<&mut CopyJob> {
        self.core.copies.iter_mut().map(|(_, copy)| copy).find(|copy| copy.id == job)
    }

    /// How far a job is. `None`: there is no such job (any more).
    pub fn job_progress(&self, job: JobId) -> Option<JobProgress> {
        let copies = self.core.copies.iter().map(|(_, copy)| copy);
        let copy = copies.into_iter().find(|copy| copy.id == job)?;
        let (done, total) = (copy.done, copy.total - copy.left_out);
        Some(JobProgress { done, total, up_to: copy.up_to(&self.core.workers) })
    }

    /// What a job that is to be [shown](Copy::shown) has read, where its turn has come: at which byte of
    /// the copy, and the bytes. They come in order, each once, and are written only when they have
    /// [been seen](Engine::job_seen). All that lies between them reads as zeros, or is not copied; so does the rest, when the
    /// job has ended well. `None`: nothing yet; ask after each `run`.
    pub fn job_read(&self, job: JobId) -> Option<(u64, &[u8])> {
        let copy = self.core.copies.iter().map(|(_, copy)| copy).find(|copy| copy.id == job)?;
        let worker = &self.core.workers[copy.to_be_seen(&self.core.workers)? as usize];
        let (at, end) = worker.held;
        let bytes = &self.core.mem.region(copy.region)[worker.memory as usize..];
        Some((at, &bytes[..(end - at) as usize]))
    }

    /// [`job_read`](Engine::job_read) has been seen: the job goes on with it at the next `run`. False: there was nothing.
    pub fn job_seen(&mut self, job: JobId) -> bool {
        self.called(Called::Job(JobCall::Seen, job.serial));
        let core = &mut self.core;
        let found = core.copies.iter().find(|(_, copy)| copy.id == job);
        let seen = found.and_then(|(at, copy)| Some((at, copy.to_be_seen(&core.workers)?)));
        let Some((copy, key)) = seen else { return false };
        let worker = &mut core.workers[key as usize];
        worker.read_to = worker.held.1;
        core.wake_unseen(copy as u32);
        true
    }

    /// The job begins no more pieces; those in flight run to their end. False: there is no such job.
    pub fn pause_job(&mut self, job: JobId) -> bool {
        self.called(Called::Job(JobCall::Pause, job.serial));
        let Some(key) = self.job_mut(job).map(|found| found.key) else { return false };
        self.core.pause_copy(key);
        true
    }

    /// Ends a pause; the job goes on at the next `run`. False: there is no such job.
    pub fn resume_job(&mut self, job: JobId) -> bool {
        self.called(Called::Job(JobCall::Resume, job.serial));
        let Some(found) = self.job_mut(job) else { return false };
        found.is_paused = mutant!("resumed_copy_sleeps_on");
        let key = found.key;
        if !mutant!("stopped_copy_sleeps_on") {
            self.core.wake_stopped(key);
        }
        self.core.wake_workers(key);
        true
    }

    /// The job is to end: it begins nothing more, what is in flight runs to its end, and then it has
    /// ended with `ECANCELED`. One that is just ending may end well. False: there is no such job.
    pub fn cancel_job(&mut self, job: JobId) -> bool {
        self.called(Called::Job(JobCall::Cancel, job.serial));
        let Some(at) = self.core.copies.iter().find(|(_, copy)| copy.id == job).map(|(at, _)| at)
        else {
            return false;
        };
        self.core.cancel_copy(at);
        true
    }

    /// A drain begins: no job writes to a node that has settled.
    pub(super) fn cancel_jobs(&mut self) {
        if self.life.drain == Drain::Going || mutant!("drain_leaves_copies") {
            return;
        }
        let all: Vec<usize> = self.core.copies.iter().map(|(at, _)| at).collect();
        all.into_iter().for_each(|at| self.core.cancel_copy(at));
    }
}
