//! A world: an engine on a simulated disk, guests that use it, and the oracle that watches.
//!
//! A world is plain data: it can be copied with ops in flight, and hashed. Two worlds with the
//! same hash have the same future, short of a collision.
//!
//! It lives in three stages. While *running*, requests are submitted and ops end, in any order and
//! any way. When all requests have ended it is *draining*. Then it is *over*: nothing may be left
//! in the engine, and the files must hold a clean image of what the oracle knows.

use std::hash::{Hash, Hasher};

use cowbell_engine::mem::Mem;
use cowbell_engine::step::{Driver, IoKind};
use cowbell_engine::units::{Errno, NodeId, Time};
use cowbell_engine::{Asker, Limits, NodeEvent, Progress, RequestInfo, Why};

use crate::backend::{Breakage, Mode, OpName, SimBackend};
use crate::choose::Choice;
use crate::disk::{Contents, Left, Sites, fixed_hash, splitmix};
use crate::host::SimHost;
use crate::shadow::{Cut, Found, OTHERS_WRITE, Other, Shadow};
use crate::shared::Shared;
use crate::subject::{Checked, SimEngine, Subject};
use crate::verdicts::{Inflated, Verdict, Verdicts};
use crate::workload::{Request, Workload, pattern};

mod copying;
mod damage;

pub use copying::{CopyPlan, Way};
use copying::{Copying, PIECE};
use damage::Silence;

/// An image that was made and opened, for any number of worlds to begin with.
#[derive(Debug)]
pub struct Base<S: Subject> {
    subject: S,
    host: SimHost,
    engine: SimEngine<S::Driver>,
    node: NodeId,
    beside: Option<NodeId>,
    beside_host: Option<SimHost>,
    verdicts: Verdicts,
    verdicts_beside: Verdicts,
}

/// What an image was found to be.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// Whose bytes the disk holds.
    pub found: Found,
    /// What the check says.
    pub checked: Checked,
    /// The disk's size in bytes.
    pub size: u64,
    /// It is none: see [`Subject::is_unfinished`]. Then the rest says nothing.
    pub is_unfinished: bool,
}

/// How much may go wrong or happen besides requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Faults.
    pub faults: u8,
    /// Deadlines.
    pub ticks: u8,
    /// Crashes after which the rest of the workload goes on.
    pub crashes: u8,
    /// Drains after which the rest of the workload goes on.
    pub drains: u8,
    /// Is a device that takes no ops for a while among the faults?
    pub stalls: bool,
    /// Do those drains close the image, and is it opened again?
    pub reopens: bool,
    /// Is a device that [breaks](Breakage) among the faults?
    pub breaks: bool,
    /// May it be mended?
    pub mends: bool,
    /// Times that the disk is closed with whatever is in flight; if that went well, it is attached
    /// again to the engine, which goes on meanwhile.
    pub closes: u8,
    /// Times that it is paused.
    pub pauses: u8,
    /// May it have one request at a time?
    pub quota: bool,
    /// Times that its guest gives up all that it has in flight.
    pub abandons: u8,
    /// Writes that are lost or go astray, and nobody is told.
    pub lost_writes: u8,
    /// Bits of tables that change at rest.
    pub bit_rots: u8,
    /// A copy between it and the disk beside.
    pub copy: Option<CopyPlan>,
}

/// Nothing goes wrong, and nothing happens but requests.
pub const QUIET: Budget = Budget {
    faults: 0,
    ticks: 0,
    crashes: 0,
    drains: 0,
    stalls: false,
    reopens: false,
    breaks: false,
    mends: false,
    closes: 0,
    pauses: 0,
    quota: false,
    abandons: 0,
    lost_writes: 0,
    bit_rots: 0,
    copy: None,
};

impl Budget {
    /// The same with less of one thing: for each that there is any of.
    pub(crate) fn calmer(self) -> Vec<Budget> {
        let nones = [
            Budget { copy: None, ..self },
            Budget { faults: 0, ..self },
            Budget { ticks: 0, ..self },
            Budget { crashes: 0, ..self },
            Budget { drains: 0, ..self },
            Budget { stalls: false, ..self },
            Budget { reopens: false, ..self },
            Budget { breaks: false, ..self },
            Budget { mends: false, ..self },
            Budget { closes: 0, ..self },
            Budget { pauses: 0, ..self },
            Budget { quota: false, ..self },
            Budget { abandons: 0, ..self },
            Budget { lost_writes: 0, ..self },
            Budget { bit_rots: 0, ..self },
        ];
        let less = |count: u8| count.saturating_sub(1);
        let fewer = [
            Budget { faults: less(self.faults), ..self },
            Budget { crashes: less(self.crashes), ..self },
            Budget { drains: less(self.drains), ..self },
        ];
        let all = nones.into_iter().chain(fewer);
        all.filter(|calmer| *calmer != self).collect()
    }
}

impl Default for Budget {
    fn default() -> Self {
        Budget { ticks: 1, ..QUIET }
    }
}

impl<S: Subject> Base<S> {
    /// Makes the image and opens it, for workloads of up to `requests` requests.
    ///
    /// # Errors
    ///
    /// When that fails.
    pub fn new(subject: S, requests: usize) -> Result<Base<S>, String> {
        let host = SimHost::new();
        subject.make(&host)?;
        let (mut engine, node) = open(&subject, &host, requests)?;
        let (mut beside, mut beside_host) = (None, None);
        if let Some(other) = subject.beside() {
            let host = SimHost::new();
            other.make(&host)?;
            engine.backend_mut().begin_beside();
            beside = Some(other.open_beside(&host, &mut engine, node)?);
            // What it was before, whatever is written to it.
            beside_host = Some(host);
        }
        let (verdicts, verdicts_beside) = (Verdicts::default(), Verdicts::default());
        Ok(Base { subject, host, engine, node, beside, beside_host, verdicts, verdicts_beside })
    }

    /// A world in which nothing has happened yet.
    pub fn world(&self, workload: &Workload, budget: Budget) -> World<S> {
        let Base { subject, host, engine, node, beside, verdicts, .. } = self;
        let read = |subject: &S, host: &SimHost, offset: u64, bytes: &mut [u8]| {
            subject.read(host, offset, bytes).expect("the image was just made");
        };
        let before = |offset: u64, bytes: &mut [u8]| read(subject, host, offset, bytes);
        let sizes = (subject.size(), subject.size_unit());
        let other = subject.beside().filter(|_| budget.copy.is_some());
        let copied = subject.copied().filter(|_| budget.copy.is_some());
        let parts = copied.map(|copied| copied.parts);
        let cut = match other.as_ref().zip(self.beside_host.as_ref()) {
            Some((other, host)) => {
                let others = |offset: u64, bytes: &mut [u8]| read(other, host, offset, bytes);
                let (size, write, tag) = (other.size(), BESIDE[0], BESIDE_TAG as usize);
                let other = Other { size, before: &others, write, tag };
                Cut::new(workload, subject.cluster(), sizes, before, Some(&other), parts)
            }
            None => Cut::new(workload, subject.cluster(), sizes, before, None, parts),
        };
        let cut = Shared::new(cut);
        // What is discarded may come to be discarded where a mirror has the disk, in its units.
        let moves = budget.copy.is_some_and(|copy| copy.mirrors);
        let there = other.as_ref().filter(|_| moves).map_or(u64::MAX, S::discard_unit);
        let shadow = Shadow::new(cut.clone(), subject.discard_unit().min(there));
        let others = other.map(|other| Shadow::of_other(cut.clone(), other.discard_unit()));
        let (subject, workload) = (subject.clone(), workload.clone());
        let room = Room::of(&subject, &files_of(engine)[..subject.files().len()]);
        let (verdicts, verdicts_beside) = (verdicts.clone(), self.verdicts_beside.clone());
        let inflated = Inflated::default();
        let plan = Plan { subject, workload, cut, verdicts, verdicts_beside, inflated };
        let Budget { closes, pauses, quota, abandons, lost_writes, bit_rots, .. } = budget;
        let mut world = World {
            plan: Shared::new(plan),
            engine: engine.clone(),
            life: Life { closes, pauses, quota, abandons, ..Life::default() },
            node: *node,
            beside: *beside,
            beside_next: 0,
            beside_ended: 0,
            copying: Copying::new(budget.copy),
            silence: Silence { lost_writes, bit_rots, ..Silence::default() },
            shadow,
            others,
            next: 0,
            ended: 0,
            faults: budget.faults,
            ticks: budget.ticks,
            crashes: budget.crashes,
            drains: budget.drains,
            stalls: budget.stalls,
            reopens: budget.reopens,
            breaks: budget.breaks,
            mends: budget.mends,
            room,
            faulted: false,
            flush_failed: false,
            sure: 0,
            crashed: false,
            beyond: 0,
            stage: Stage::Running,
            now: Time(0),
            is_behind: false,
            steps: 0,
        };
        world.is_there();
        world
    }
}

/// So begins what is said of requests that wait for ever.
pub(crate) const STUCK: &str = "stuck: nothing can happen any more";

/// Opens the image in an engine with room for so many requests.
fn open<S: Subject>(
    subject: &S,
    host: &SimHost,
    requests: usize,
) -> Result<(SimEngine<S::Driver>, NodeId), String> {
    let backend = SimBackend::new(subject.device(), Mode::Chosen);
    // What an engine has room for is copied with it.
    let beside = usize::from(subject.beside().is_some());
    let limits = Limits { requests: requests.max(1) + beside, ..subject.limits() };
    let mut engine = SimEngine::new(backend, limits);
    if let Some(is_metadata) = subject.metadata() {
        engine.backend_mut().watch_metadata(is_metadata);
    }
    let node = subject.open(host, &mut engine)?;
    Ok((engine, node))
}

/// What the last of an image's files had room for when a session began: between two drains, or from
/// one opening to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Room {
    /// The session's first request.
    from: u32,
    /// The file's length in bytes.
    len: u64,
    /// Clusters in it that nobody used, if that is known.
    holes: Option<u64>,
}

impl Room {
    fn of<S: Subject>(subject: &S, files: &[Contents]) -> Room {
        let last = files.last().expect("an image has a file");
        Room { from: 0, len: last.len(), holes: subject.holes(last) }
    }

    /// A file grows by what was asked for and does not fit its holes, no more.
    fn judge(&self, cluster: u64, requests: &[Request], files: &[Contents]) -> Result<(), String> {
        let needed = requests.iter().try_fold(0, |sum, request| {
            let clusters = request.end().div_ceil(cluster) - request.offset / cluster;
            match request.kind {
                IoKind::Read | IoKind::Flush | IoKind::Status { .. } => Some(sum),
                // Whatever there is of tables.
                IoKind::Truncate => None,
                // Its clusters, and a table; where they lie on a border of tables, two.
                _ => Some(sum + clusters + clusters.min(2)),
            }
        });
        let (len, Some(holes)) = (self.len, self.holes) else { return Ok(()) };
        let now = files.last().expect("an image has a file").len();
        // The cluster that the file ends in is somebody's.
        let len = len.next_multiple_of(cluster);
        match needed.map(|needed: u64| len + needed.saturating_sub(holes) * cluster) {
            Some(most) if now > most => Err(format!(
                "the file grew from {len} to {now} bytes, although it had {holes} holes"
            )),
            _ => Ok(()),
        }
    }
}

/// What does not change in a world.
#[derive(Debug)]
struct Plan<S> {
    subject: S,
    workload: Workload,
    cut: Shared<Cut>,
    verdicts: Verdicts,
    verdicts_beside: Verdicts,
    inflated: Inflated,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Running,
    Draining,
    /// The disk is being closed; the one beside goes on.
    Closing,
    /// It is gone.
    Closed,
    Over,
}

/// The disk's comings and goings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Life {
    closes: u8,
    pauses: u8,
    quota: bool,
    /// How often its guest may still give up what it has in flight.
    abandons: u8,
    is_paused: bool,
    /// It is paused, and the engine has said that nothing is in flight.
    lies_still: bool,
    /// It could not be closed clean.
    is_lost: bool,
}

/// See the module.
#[derive(Debug)]
pub struct World<S: Subject> {
    plan: Shared<Plan<S>>,
    engine: SimEngine<S::Driver>,
    node: NodeId,
    life: Life,
    beside: Option<NodeId>,
    /// Requests to the disk beside that were submitted, and that have ended.
    beside_next: u8,
    beside_ended: u8,
    copying: Copying,
    silence: Silence,
    shadow: Shadow,
    /// The shadow of the disk beside, if something is copied.
    others: Option<Shadow>,
    next: u32,
    ended: u32,
    faults: u8,
    ticks: u8,
    crashes: u8,
    drains: u8,
    stalls: bool,
    reopens: bool,
    breaks: bool,
    mends: bool,
    room: Room,
    /// Has an op failed?
    faulted: bool,
    /// Has a flush failed? What comes after it, and needs one, fails: for good.
    flush_failed: bool,
    /// Requests that began when nothing was wrong any more: bits of a word.
    sure: u64,
    /// Was there a crash?
    crashed: bool,
    /// Requests that began behind the disk's end: bits of a word.
    beyond: u64,
    stage: Stage,
    now: Time,
    /// Did the last turn leave something?
    is_behind: bool,
    steps: u32,
}

impl<S: Subject> Clone for World<S> {
    fn clone(&self) -> Self {
        World {
            plan: self.plan.clone(),
            engine: self.engine.clone(),
            shadow: self.shadow.clone(),
            others: self.others.clone(),
            ..*self
        }
    }

    fn clone_from(&mut self, source: &Self) {
        self.engine.clone_from(&source.engine);
        let World { node, next, ended, faults, ticks, stalls, faulted, beyond, .. } = *source;
        let World { stage, now, is_behind, steps, crashes, crashed, drains, breaks, .. } = *source;
        let World { beside, beside_next, beside_ended, .. } = *source;
        (self.beside, self.beside_next, self.beside_ended) = (beside, beside_next, beside_ended);
        let World { reopens, mends, room, flush_failed, sure, life, .. } = *source;
        self.life = life;
        self.plan.clone_from(&source.plan);
        self.shadow.clone_from(&source.shadow);
        self.others.clone_from(&source.others);
        (self.copying, self.silence) = (source.copying, source.silence);
        (self.node, self.next, self.ended, self.faults) = (node, next, ended, faults);
        (self.ticks, self.stalls, self.faulted, self.beyond) = (ticks, stalls, faulted, beyond);
        (self.stage, self.now, self.is_behind, self.steps) = (stage, now, is_behind, steps);
        (self.crashes, self.crashed) = (crashes, crashed);
        (self.drains, self.breaks, self.reopens, self.mends) = (drains, breaks, reopens, mends);
        (self.room, self.flush_failed, self.sure) = (room, flush_failed, sure);
    }
}

impl<S: Subject> Hash for World<S> {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.engine.hash(h);
        self.shadow.hash(h);
        (self.next, self.faults, self.ticks, self.faulted, self.beyond, self.stage, self.is_behind)
            .hash(h);
        (self.crashes, self.crashed, self.drains).hash(h);
        (self.room, self.flush_failed, self.sure).hash(h);
        (self.beside_next, self.beside_ended, self.life).hash(h);
        (&self.others, self.copying, self.silence).hash(h);
    }
}

impl<S: Subject> World<S> {
    /// A hash of all that decides what can happen next.
    pub fn state_hash(&self) -> u64 {
        fixed_hash(self)
    }

    /// What can happen now, in an order that depends on names alone. Nothing: the world is over,
    /// or stuck.
    pub fn choices(&self, out: &mut Vec<Choice>) {
        out.clear();
        if self.stage == Stage::Over {
            return;
        }
        let all = self.plan.workload.requests.len() as u32;
        let running = self.stage == Stage::Running;
        if running && self.next < all && self.may_submit() {
            out.push(Choice::Submit(self.next));
        }
        let backend = self.engine.backend();
        let mut names: Vec<OpName> = backend.in_flight().collect();
        names.sort_unstable();
        let mut outcomes = Vec::new();
        for name in names {
            backend.outcomes(name, self.faults > 0, &mut outcomes);
            out.extend(outcomes.drain(..).map(|outcome| Choice::End(name, outcome)));
            self.silent_ends(name, out);
        }
        if self.is_behind {
            out.push(Choice::Turn);
        }
        if self.deadline().is_some() && self.ticks > 0 {
            out.push(Choice::Tick);
        }
        if backend.is_stalled() {
            out.push(Choice::Resume);
        } else if self.stalls && self.faults > 0 {
            out.push(Choice::Stall);
        }
        if self.breaks && self.faults > 0 && backend.broken().is_none() {
            out.extend(Breakage::ALL.map(Choice::Break));
        }
        if self.mends && backend.broken().is_some() {
            out.push(Choice::Mend);
        }
        if running {
            self.flips(out);
        }
        let beside = self.beside_next == self.beside_ended;
        let goes_on = matches!(self.stage, Stage::Running | Stage::Closing | Stage::Closed);
        let uses = goes_on && self.copying.may_use_beside();
        if uses && beside && self.beside.is_some() && self.beside_next < BESIDE.len() as u8 {
            out.push(Choice::Beside);
        }
        self.copy_choices(out);
        // Before the first request there is nothing to be kept or lost.
        if running && self.next > 0 && self.life.abandons > 0 && self.ended < self.next {
            out.push(Choice::Abandon);
        }
        if running && self.next > 0 && !self.copying.runs() {
            if self.life.closes > 0 {
                out.push(Choice::Close);
            }
            match self.life.is_paused {
                true => out.push(Choice::Unpause),
                false if self.life.pauses > 0 => out.push(Choice::Pause),
                false => {}
            }
        }
        let early = self.drains > 0 && 0 < self.next && self.ended == self.next;
        let is_gone = self.stage == Stage::Closed;
        let may_drain = running && (self.ended == all || early) && self.copying.may_drain();
        if beside && (may_drain || is_gone) {
            out.push(Choice::Drain);
        }
        // Before the first request and after the last nothing would follow.
        if self.crashes > 0 && 0 < self.next && self.next < all && !self.is_damaged() {
            out.extend((0..CRASH_PICKS).map(Choice::Crash));
        }
    }

    /// Who makes a disk smaller waits for others, and others wait for him: what they would find
    /// behind the new end is anybody's guess.
    fn may_submit(&self) -> bool {
        let requests = &self.plan.workload.requests;
        let (next, alone) = (self.next as usize, self.ended == self.next);
        // It may become larger first.
        let others = requests[..next].iter().filter(|request| request.kind == IoKind::Truncate);
        let sizes = others.map(|request| request.offset).chain([self.disk_size()]);
        let largest = if alone { self.disk_size() } else { sizes.max().unwrap_or(0) };
        let shrinks =
            |request: &Request| request.kind == IoKind::Truncate && request.offset < largest;
        if self.life.is_paused || !self.is_within_quota() {
            return false;
        }
        alone
            || !shrinks(&requests[next])
                && !shrinks(&requests[next - 1])
                && !self.waits_for_one(next)
    }

    /// May the disk be asked for one thing more? What the guest has given up has its place in the quota until it ends.
    fn is_within_quota(&self) -> bool {
        let is_given_up = |asker: &Asker| matches!(asker, Asker::GivenUp(_));
        let goes_on = || self.engine.requests().any(|request| is_given_up(&request.asker));
        !self.life.quota || self.ended == self.next && !goes_on()
    }

    /// Is there one in flight without whose end the guest does not submit this?
    fn waits_for_one(&self, which: usize) -> bool {
        let others = self.plan.workload.waits_for(which);
        let is_one = |request: RequestInfo| match request.asker {
            Asker::Guest(tag) => tag < u64::from(u64::BITS) && others >> tag & 1 == 1,
            _ => false,
        };
        others != 0 && self.engine.requests().any(is_one)
    }

    fn disk_size(&self) -> u64 {
        self.engine.node(self.node).size()
    }

    /// An op in flight whose end makes no difference to anything but itself: a read of a file that
    /// nobody changes, for a request that waits for another op too. Whatever else happens may as
    /// well happen after it.
    pub fn unnoticed(&self) -> Option<OpName> {
        let backend = self.engine.backend();
        // A device that is full has room for another op when one ends.
        if backend.in_flight_count() >= backend.device().depth {
            return None;
        }
        let mut reads = backend.reads_below(self.plan.subject.still_files());
        reads.find(|&(_, op)| !self.engine.is_awaited(op)).map(|(name, _)| name)
    }

    fn deadline(&self) -> Option<Time> {
        self.engine.next_deadline().filter(|_| self.stage == Stage::Running)
    }

    /// Makes one of the choices happen.
    ///
    /// # Errors
    ///
    /// When something happens that may not. The engine and the device panic besides.
    pub fn apply(&mut self, choice: Choice) -> Result<(), String> {
        self.apply_watched(choice, |_| ())
    }

    /// The same. `look` sees the engine when all has happened that follows at once, before who has ended is
    /// polled.
    ///
    /// # Errors
    ///
    /// When something happens that may not. The engine and the device panic besides.
    pub fn apply_watched(
        &mut self,
        choice: Choice,
        look: impl FnOnce(&SimEngine<S::Driver>),
    ) -> Result<(), String> {
        self.steps += 1;
        let limit = STEPS_PER_REQUEST * self.tasks() as u32;
        if self.steps > limit {
            return Err(format!("not over after {limit} steps\n{:?}", self.engine));
        }
        match choice {
            Choice::Submit(which) => self.submit(which as usize)?,
            Choice::Beside => self.submit_beside(),
            Choice::Copy => self.start_copy()?,
            Choice::PauseCopy => self.pause_copy()?,
            Choice::ResumeCopy => self.resume_copy()?,
            Choice::CancelCopy => self.cancel_copy()?,
            Choice::SeeCopy => self.see_copy()?,
            Choice::End(name, outcome) => {
                let is_broken = self.engine.backend().broken().is_some();
                if outcome.is_silent() {
                    self.silence.lost_writes -= 1;
                    self.faulted = true;
                } else if outcome.is_fault() && !(is_broken && self.faults == 0) {
                    self.faults -= 1;
                }
                self.faulted |= outcome.is_error();
                self.flush_failed |= outcome.is_error() && self.engine.backend().is_flush(name);
                self.engine.backend_mut().choose(name, outcome);
            }
            Choice::Turn => {}
            Choice::Tick => {
                self.ticks -= 1;
                self.now = self.deadline().expect("chosen because there is one").max(self.now);
            }
            Choice::Stall => {
                self.faults -= 1;
                self.engine.backend_mut().set_stalled(true);
            }
            Choice::Resume => self.engine.backend_mut().set_stalled(false),
            Choice::Break(breakage) => {
                self.faults -= 1;
                self.engine.backend_mut().break_down(breakage);
            }
            Choice::Mend => self.engine.backend_mut().mend(),
            Choice::Flip(bit) => {
                self.silence.bit_rots -= 1;
                self.faulted = true;
                self.engine.backend_mut().flip(bit);
            }
            Choice::Crash(pick) => self.crash(pick)?,
            Choice::Drain => {
                let is_early = self.next < self.plan.workload.requests.len() as u32;
                self.drains -= u8::from(is_early && self.stage == Stage::Running);
                self.stage = Stage::Draining;
                self.life.lies_still = false;
                self.copying.is_drained();
                self.engine.drain();
            }
            Choice::Close => {
                self.life.closes -= 1;
                (self.life.is_paused, self.life.lies_still) = (false, false);
                self.stage = Stage::Closing;
                self.engine.close(self.node).map_err(|why| format!("not closed: {why:?}"))?;
                self.is_refused(self.node, Why::Closing)?;
            }
            Choice::Abandon => self.abandon()?,
            Choice::Pause => {
                self.life.pauses -= 1;
                self.life.is_paused = true;
                self.engine.pause(self.node).map_err(|why| format!("not paused: {why:?}"))?;
                self.is_refused(self.node, Why::Paused)?;
            }
            Choice::Unpause => {
                (self.life.is_paused, self.life.lies_still) = (false, false);
                self.engine.resume(self.node).map_err(|why| format!("not resumed: {why:?}"))?;
            }
        }
        self.copy_sees();
        let steps = self.run_until_its_time()?;
        look(&self.engine);
        let limit = STEPS_PER_RUN * self.tasks();
        if steps > limit {
            return Err(format!("it does not come to rest: {steps} steps in one run"));
        }
        self.take_finished()?;
        self.see_events()?;
        self.see_progress()?;
        if self.life.lies_still && !self.engine.backend().is_still() {
            return Err("a paused disk is used".into());
        }
        self.see_drained()
    }

    /// Runs the engine, and again as long as it says that its time has come: a loop that waits for events would.
    fn run_until_its_time(&mut self) -> Result<usize, String> {
        let mut all = 0;
        for _ in 0..RUNS_AT_ONCE {
            let Progress { steps, is_over, .. } = self.engine.run(self.now);
            all += steps;
            self.is_behind = is_over;
            self.assert_in_time()?;
            let is_due = self.engine.next_deadline().is_some_and(|due| due <= self.now);
            if is_over || !is_due {
                return Ok(all);
            }
        }
        Err(format!("nothing can be done, and it is to be run again at once\n{:?}", self.engine))
    }

    /// How much there is to do: requests, the end, and a copy, each of whose pieces is as much as one of them. Where
    /// clusters are small each counts; and where a turn ends with every op that is handed over, twice.
    fn tasks(&self) -> usize {
        let cluster = self.plan.subject.cluster().max(1);
        let clusters = |offset: u64, len: u64| match cluster < PIECE as u64 {
            true => (len.div_ceil(cluster) + u64::from(!offset.is_multiple_of(cluster)))
                .clamp(1, TASKS_MAX),
            false => 1,
        };
        let of_one = |request: &Request| match request.kind {
            // A size is no place.
            IoKind::Truncate => 1,
            _ => clusters(request.offset, request.len),
        };
        let of_all: u64 = self.plan.workload.requests.iter().map(of_one).sum();
        let all = of_all as usize + 1 + self.pieces_copied() * clusters(0, PIECE as u64) as usize;
        let is_slow = self.plan.subject.device().nanos_per_op > 0;
        if is_slow { 2 * all } else { all }
    }

    fn files(&self) -> Vec<Contents> {
        let mut files = files_of(&self.engine);
        files.truncate(self.plan.subject.files().len());
        files
    }

    /// A request that is not to be taken is not taken.
    fn is_refused(&mut self, node: NodeId, expected: Why) -> Result<(), String> {
        match self.engine.submit(node, Request::flush().io(), Mem::None, PROBE_TAG) {
            Err(refused) if refused.why == expected => Ok(()),
            Err(refused) => Err(format!("refused as {:?}, not as {expected:?}", refused.why)),
            Ok(()) => Err(format!("{node:?} takes a request, although {expected:?}")),
        }
    }

    fn see_events(&mut self) -> Result<(), String> {
        while let Some(event) = self.engine.poll_event() {
            match event {
                NodeEvent::Corrupt { .. } => self.is_told(),
                NodeEvent::JobError { .. } => self.copying.has_met_error(),
                NodeEvent::JobEnded { job, result } => self.see_copied(job, result)?,
                NodeEvent::Paused { node } => {
                    let is_so = self.engine.backend().is_still() && self.ended == self.next;
                    if node != self.node || !self.life.is_paused || !is_so {
                        return Err("told to lie still, and does not".into());
                    }
                    // In a drain it is written to.
                    self.life.lies_still = self.stage == Stage::Running;
                }
                NodeEvent::Closed { node, result } => {
                    if node != self.node || self.stage != Stage::Closing || self.ended != self.next
                    {
                        return Err(format!("{node:?} is closed at work"));
                    }
                    self.see_closed(result)?;
                }
            }
        }
        Ok(())
    }

    /// The disk has been attached: nothing that was said of the one before it holds.
    fn is_there(&mut self) {
        (self.life.is_paused, self.life.lies_still) = (false, false);
        if self.life.quota {
            self.engine.set_quota(self.node, Some(1));
        }
    }

    /// The disk is gone. If all is well it is attached again, beside what else goes on; its old id is
    /// refused nevertheless.
    fn see_closed(&mut self, result: Result<(), Errno>) -> Result<(), String> {
        let gone = self.node;
        self.is_refused(gone, Why::NoSuchNode)?;
        self.engine.take_files(gone);
        self.stage = Stage::Closed;
        match result {
            Err(errno) if !self.faulted => {
                return Err(format!("closing failed although nothing did: {errno}"));
            }
            Err(_) => {
                self.life.is_lost = true;
                return Ok(());
            }
            Ok(()) => self.shadow.settle(),
        }
        let Plan { subject, workload, .. } = &*self.plan;
        let files = files_of(&self.engine);
        let files = &files[..subject.files().len()];
        let done = &workload.requests[self.room.from as usize..self.next as usize];
        if !self.faulted && !self.crashed && !self.copying.has_written_here() {
            self.room.judge(subject.cluster(), done, files)?;
        }
        // Its layer below is the other's, too.
        if subject.shares() {
            return Ok(());
        }
        self.room = Room { from: self.next, ..Room::of(subject, files) };
        let opened = subject.open(&host_of(subject, files), &mut self.engine);
        self.node = opened.map_err(|why| format!("attached again: {why}"))?;
        self.is_there();
        self.stage = Stage::Running;
        self.is_refused(gone, Why::NoSuchNode)
    }

    /// A run ends when the turn does, or with the op that is being handed over then.
    fn assert_in_time(&mut self) -> Result<(), String> {
        let held = self.engine.backend_mut().take_held();
        let turn = self.plan.subject.limits().turn.as_nanos() as u64;
        let per_op = self.engine.backend().device().nanos_per_op.max(1);
        let longest = turn.next_multiple_of(per_op);
        if held > longest {
            return Err(format!("the loop is held for {held} ns, {longest} at most"));
        }
        Ok(())
    }

    fn submit(&mut self, which: usize) -> Result<(), String> {
        let request = self.plan.workload.requests[which];
        if self.must_succeed(&request) {
            self.sure |= 1 << which;
        }
        if request.len > 0 && request.end() > self.disk_size() {
            self.beyond |= 1 << which;
        } else {
            self.shadow.submit(which, &request);
        }
        let mem = request.memory(which).map_or(Mem::None, Mem::Owned);
        let taken = self.engine.submit(self.node, request.io(), mem, which as u64);
        taken.map_err(|refused| format!("request {which} is refused: {:?}", refused.why))?;
        self.next += 1;
        // What cannot be done has ended at once.
        if self.life.quota && self.beyond >> which & 1 == 0 {
            self.is_refused(self.node, Why::Full)?;
        }
        Ok(())
    }

    /// The guest gives up all that it has in flight: it may happen or not, but not after anything newer.
    fn abandon(&mut self) -> Result<(), String> {
        self.life.abandons -= 1;
        for tag in self.engine.abandon(self.node, |tag| tag != BESIDE_TAG) {
            self.ended += 1;
            let which = tag as usize;
            if self.beyond >> which & 1 == 0 {
                self.shadow.end(which, false, None)?;
            }
        }
        if self.engine.abandon(self.node, |_| true).is_empty() {
            Ok(())
        } else {
            Err("a request is given up twice".into())
        }
    }

    fn submit_beside(&mut self) {
        let node = self.beside.expect("chosen because there is one");
        let request = BESIDE[self.beside_next as usize];
        if let Some(others) = &mut self.others {
            others.submit(BESIDE_NUMBERS[self.beside_next as usize], &request);
        }
        let mem = request.memory(BESIDE_TAG as usize).map_or(Mem::None, Mem::Owned);
        let taken = self.engine.submit(node, request.io(), mem, BESIDE_TAG);
        taken.expect("there is room for one more");
        self.beside_next += 1;
    }

    /// What was asked of the disk beside was done, whatever happened to this one.
    fn inspect_beside(&self, other: &S, files: &[Contents]) -> Result<(), String> {
        let host = host_of(other, files);
        let checked = other.check(&host)?;
        if checked.marked || checked.corruptions > 0 || checked.leaks > 0 {
            return Err(format!("it was not left clean: {checked:?}"));
        }
        if self.copying.has_moved() {
            return Ok(());
        }
        if let Some(others) = &self.others {
            let read = |offset: u64, bytes: &mut [u8]| other.read(&host, offset, bytes);
            return others.check_other_live(&self.plan.cut.recognise(other.size(), read)?);
        }
        let write = BESIDE[0];
        let mut expected = vec![0; write.len as usize];
        if self.beside_next > 0 {
            pattern(BESIDE_TAG as usize, write.offset, &mut expected);
            let mut found = vec![0; write.len as usize];
            other.read(&host, write.offset, &mut found)?;
            if found != expected {
                return Err("what was written is not there".into());
            }
        }
        Ok(())
    }

    /// Faults are over, and nothing is left of them: whoever asks now gets what he asks for. After a
    /// flush that failed nobody knows what is stable: only reads are sure to succeed then, and those
    /// only where no table waits in memory to be written, and keeps others out.
    fn must_succeed(&self, request: &Request) -> bool {
        let backend = self.engine.backend();
        let is_over = self.faults == 0 && backend.broken().is_none() && !backend.is_stalled();
        let is_quiet = self.ended == self.next && backend.in_flight_count() == 0;
        let is_read = request.kind == IoKind::Read && !self.plan.subject.writes_back();
        is_over && is_quiet && !self.is_damaged() && (!self.flush_failed || is_read)
    }

    /// The machine stops and starts again: of what it left, one image is opened. Requests that
    /// were in flight are gone.
    fn crash(&mut self, pick: u32) -> Result<(), String> {
        self.crashes -= 1;
        let mut state = u64::from(pick);
        let mut choose = |options: usize| match pick {
            0 => 0,
            1 => options - 1,
            _ => {
                state = splitmix(state);
                (state % options as u64) as usize
            }
        };
        let mut files = Vec::new();
        for sites in self.crash_sites() {
            let options: Vec<usize> =
                sites.sites.iter().map(|site| choose(site.options.len())).collect();
            let length = choose(sites.lengths.len());
            files.push(sites.image(|site| options[site], length));
        }
        let image = self.inspect_crash(&files)?;
        self.judge_crash(&image)?;
        let Plan { subject, workload, .. } = &*self.plan;
        let host = host_of(subject, &files);
        let opened = open(subject, &host, workload.requests.len());
        (self.engine, self.node) = opened.map_err(|why| format!("opened after a crash: {why}"))?;
        self.shadow.crashed(&image.found);
        self.ended = self.next;
        self.room = Room::of(subject, &files);
        self.crashed = true;
        self.stage = Stage::Running;
        self.is_there();
        Ok(())
    }

    /// The same world, in which nothing more goes wrong, and nobody wants anything but what is in the workload:
    /// the device does what it is asked.
    #[must_use]
    pub fn calmed(&self) -> World<S> {
        let mut calmed = self.clone();
        (calmed.faults, calmed.crashes, calmed.drains, calmed.steps) = (0, 0, 0, 0);
        (calmed.stalls, calmed.breaks, calmed.mends) = (false, false, false);
        calmed.ticks = CALM_TICKS;
        calmed.life = Life { closes: 0, pauses: 0, abandons: 0, ..self.life };
        (calmed.silence.lost_writes, calmed.silence.bit_rots) = (0, 0);
        calmed.copying.is_left_alone();
        let backend = calmed.engine.backend_mut();
        backend.mend();
        // Who was left with something to hand over is asked for it again, as by the choice to do so.
        if backend.is_stalled() {
            backend.set_stalled(false);
            calmed.is_behind = true;
        }
        calmed
    }

    /// When faults are over, all is over after so many events.
    pub fn calm_events_max(&self) -> usize {
        CALM_EVENTS * self.tasks()
    }

    fn take_finished(&mut self) -> Result<(), String> {
        while let Some(finished) = self.engine.poll() {
            if finished.tag == BESIDE_TAG {
                let which = BESIDE_NUMBERS[self.beside_ended as usize];
                self.beside_ended += 1;
                let told = |errno| format!("the disk beside has nothing wrong, and says: {errno}");
                finished.result.map_err(told)?;
                if let Some(others) = &mut self.others {
                    others.end(which, true, None)?;
                }
                continue;
            }
            let which = finished.tag as usize;
            self.ended += 1;
            let beyond = self.beyond >> which & 1 == 1;
            match finished.result {
                Err(Errno::NO_SPACE) if self.plan.subject.may_be_full() => {}
                Err(errno) if self.sure >> which & 1 == 1 && !beyond && !self.is_damaged() => {
                    return Err(format!(
                        "request {which} failed although all is well again: {errno}"
                    ));
                }
                Err(errno) if !self.faulted && !beyond => {
                    return Err(format!("request {which} failed although nothing did: {errno}"));
                }
                Ok(()) if beyond => {
                    return Err(format!("request {which} succeeded beyond the disk's end"));
                }
                _ if beyond => continue,
                _ => {}
            }
            if finished.result.is_err() {
                self.is_told();
            }
            let bytes = finished.mem.into_buf();
            let right = self.shadow.end(which, finished.result.is_ok(), bytes.as_deref());
            self.is_right(right)?;
        }
        Ok(())
    }

    fn see_drained(&mut self) -> Result<(), String> {
        match self.engine.drained() {
            Some(_) if self.copying.runs() => Err("drained, and a copy runs".into()),
            Some(result) if self.stage == Stage::Draining => {
                let is_gone = !self.engine.has(self.node);
                let over = is_gone || self.next == self.plan.workload.requests.len() as u32;
                self.stage = if over { Stage::Over } else { Stage::Running };
                match result {
                    // Of the disk beside alone.
                    Ok(()) if is_gone => {}
                    Ok(()) => {
                        self.shadow.settle();
                        self.end_session(over)?;
                    }
                    Err(errno) if !self.faulted => {
                        return Err(format!("draining failed although nothing did: {errno}"));
                    }
                    Err(_) => self.is_told(),
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// All is written and nothing is counted ahead: is the file as short as it can be? Then perhaps
    /// the image is opened again.
    fn end_session(&mut self, over: bool) -> Result<(), String> {
        let Plan { subject, workload, .. } = &*self.plan;
        let files = files_of(&self.engine);
        let files = &files[..subject.files().len()];
        let done = &workload.requests[self.room.from as usize..self.next as usize];
        if !self.faulted && !self.crashed && !self.copying.has_written_here() {
            self.room.judge(subject.cluster(), done, files)?;
        }
        if over {
            return Ok(());
        }
        self.room = Room { from: self.next, ..Room::of(subject, files) };
        if self.reopens {
            self.engine.assert_idle();
            let opened = open(subject, &host_of(subject, files), workload.requests.len());
            (self.engine, self.node) = opened.map_err(|why| format!("opened again: {why}"))?;
            self.is_there();
        }
        Ok(())
    }

    /// Nothing can happen any more: is everything as it should be?
    ///
    /// # Errors
    ///
    /// When it is not.
    pub fn finish(&self) -> Result<(), String> {
        if self.stage != Stage::Over {
            return Err(format!("{STUCK}\n{:?}", self.engine));
        }
        self.engine.assert_idle();
        let mut layer = Some(self.node).filter(|&node| self.engine.has(node));
        while let Some(node) = layer {
            self.plan.subject.assert_idle(self.engine.node(node));
            layer = self.engine.node(node).below().first().copied();
        }
        let mut files = files_of(&self.engine);
        let mut beside = files.split_off(self.plan.subject.files().len());
        if self.plan.subject.shares() {
            beside.insert(0, files[0].clone());
        }
        if let Some(other) = self.plan.subject.beside() {
            let found = self.inspect_beside(&other, &beside);
            found.map_err(|why| format!("the disk beside: {why}"))?;
        }
        let files = if self.copying.has_moved() { beside } else { files };
        if self.is_left_damaged() {
            return self.finish_damaged(&files);
        }
        let image = self.inspect(&files).map_err(|why| format!("closed: {why}"))?;
        if image.is_unfinished {
            return self.judge_crash(&image).map_err(|why| format!("closed: {why}"));
        }
        self.read_again(&files, &image)?;
        // What was not flushed and could not be written back is lost with the memory it was in.
        let is_lost = self.life.is_lost || self.engine.drained() != Some(Ok(()));
        let is_lost = self.plan.subject.writes_back() && is_lost;
        match is_lost {
            true => self.shadow.check_crash(&image.found)?,
            false => self.shadow.check_live(&image.found)?,
        }
        let Checked { marked, corruptions, leaks, untold } = image.checked;
        if untold && !self.faulted && !self.crashed && self.shadow.has_changed(&image.found) {
            return Err("closed: changed, and yet it has its old content id".into());
        }
        if corruptions > 0 {
            return Err(format!("the closed image has {corruptions} corruptions"));
        }
        if !self.faulted && (marked || leaks > 0 && !self.crashed) {
            return Err(format!("closed without a failure, yet: marked {marked}, leaks {leaks}"));
        }
        Ok(())
    }

    /// Reads the disk as a guest would: where [`World::inspect`] looks is where reads go.
    fn read_again(&self, files: &[Contents], image: &Inspection) -> Result<(), String> {
        let (subject, cut) = (self.disk_now(), &self.plan.cut);
        let host = host_of(&subject, files);
        let read = |offset: u64, bytes: &mut [u8]| subject.read(&host, offset, bytes);
        if cut.recognise(image.size, read)? == image.found {
            Ok(())
        } else {
            Err("reads and the map do not agree".into())
        }
    }

    /// What a crash may leave of each file, now.
    pub fn crash_sites(&self) -> Vec<Sites> {
        match self.copying.has_moved() {
            true => self.engine.backend().crash_sites_beside(),
            false => self.engine.backend().crash_sites(),
        }
    }

    /// What images that a crash has left of the files that it is looked at of have of each change.
    pub fn left_by_crash(&self, images: &[Contents]) -> Vec<Left> {
        self.engine.backend().left(self.copying.has_moved(), images)
    }

    /// The first byte of the disk that a crash may not leave as it is in these files, and where that lies: in which file
    /// and where in it, if it does.
    pub fn wrong_byte(&self, files: &[Contents]) -> Option<(u64, Option<(usize, u64)>)> {
        let image = self.inspect(files).ok().filter(|image| !image.is_unfinished)?;
        let at = self.shadow.first_wrong(&image.found)?;
        let verdicts = match self.copying.has_moved() {
            true => &self.plan.verdicts_beside,
            false => &self.plan.verdicts,
        };
        let verdict = verdicts.of(&self.disk_now(), files).ok()?;
        let place = (!verdict.has_compressed()).then(|| verdict.locate(at, files.len()).0);
        Some((at, place.flatten()))
    }

    /// What a check says of these files that a crash has left: its first lines.
    pub fn complaints(&self, files: &[Contents]) -> Vec<String> {
        let subject = self.disk_now();
        match subject.is_unfinished(files) {
            true => Vec::new(),
            false => subject.complaints(&host_of(&subject, files)),
        }
    }

    /// What the guest writes to: the disk, or the one beside, if that has taken its place.
    fn disk_now(&self) -> S {
        let beside = self.plan.subject.beside().filter(|_| self.copying.has_moved());
        beside.unwrap_or_else(|| self.plan.subject.clone())
    }

    /// A hash of all that [`World::crash_sites`] follows from.
    pub fn crash_hash(&self) -> u64 {
        self.engine.backend().crash_hash(self.copying.has_moved())
    }

    /// A hash of what a crash would be judged by.
    pub fn judge_hash(&self) -> u64 {
        let moved = u64::from(self.copying.has_moved()) << 2;
        let unfinished = u64::from(self.may_be_unfinished()) << 3;
        let faulted = u64::from(self.faulted) ^ u64::from(self.crashed) << 1;
        self.shadow.crash_hash() ^ faulted ^ moved ^ unfinished
    }

    /// Was something to be written since the image was last closed well, if it ever was?
    fn may_be_unfinished(&self) -> bool {
        if self.life.is_lost {
            return true;
        }
        let asked = &self.plan.workload.requests[self.room.from as usize..self.next as usize];
        let is_closed = self.stage == Stage::Over && self.engine.drained() == Some(Ok(()));
        let writes = asked.iter().any(Request::modifies) || self.copying.has_written_here();
        writes && !is_closed
    }

    /// May a crash leave this now?
    ///
    /// # Errors
    ///
    /// When it may not.
    pub fn judge_crash(&self, image: &Inspection) -> Result<(), String> {
        if image.is_unfinished {
            let told = "it is no image, and nobody has begun to write it".to_string();
            return if self.may_be_unfinished() { Ok(()) } else { Err(told) };
        }
        let Checked { marked, leaks, untold, .. } = image.checked;
        let marks_leaks = self.disk_now().marks_leaks();
        let unmarked = leaks > 0 && !marked;
        if unmarked && !self.faulted && !self.crashed && marks_leaks {
            return Err(format!("after a crash: {leaks} leaks, and no mark says so"));
        }
        // A change that no flush has made stable may survive alone.
        if untold && !self.crashed && self.shadow.has_changed(&image.found) {
            return Err(
                "after a crash: a change that a flush has made stable, and the old content id"
                    .into(),
            );
        }
        self.shadow.check_crash(&image.found)
    }

    /// What an image that a crash has left is found to be.
    ///
    /// # Errors
    ///
    /// When something is wrong with the image, whatever the guest may have written.
    pub fn inspect_crash(&self, files: &[Contents]) -> Result<Inspection, String> {
        self.inspect(files).map_err(|why| format!("after a crash: {why}"))
    }

    fn inspect(&self, files: &[Contents]) -> Result<Inspection, String> {
        let subject = self.disk_now();
        if subject.is_unfinished(files) {
            let (found, checked) = (Found::nothing(), Checked::default());
            return Ok(Inspection { found, checked, size: 0, is_unfinished: true });
        }
        let verdicts = match self.copying.has_moved() {
            true => &self.plan.verdicts_beside,
            false => &self.plan.verdicts,
        };
        let verdict = verdicts.of(&subject, files)?;
        let found = self.found_of(&subject, self.copying.has_moved(), &verdict, files)?;
        let (checked, size) = (verdict.checked, verdict.size());
        Ok(Inspection { found, checked, size, is_unfinished: false })
    }

    /// Whose bytes a disk in these files holds, as an examination has found it: this one, or the one beside it.
    fn found_of(
        &self,
        subject: &S,
        is_beside: bool,
        verdict: &Verdict,
        files: &[Contents],
    ) -> Result<Found, String> {
        let Plan { cut, inflated, subject: disk, .. } = &*self.plan;
        if !verdict.has_compressed() {
            return Ok(cut.found(verdict, files));
        }
        let (size, names) = (verdict.size(), subject.files());
        cut.recognise_clusters(size, disk.cluster(), |part| {
            inflated.of((is_beside, part.start, size), (&names, files), |host| {
                let read = |at: u64, bytes: &mut [u8]| subject.read(host, at, bytes);
                cut.recognise_part(part, size, read)
            })
        })
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// An op in flight, for people.
    pub fn describe(&self, choice: Choice) -> String {
        match choice {
            Choice::End(name, _) => self.engine.backend().describe(name),
            Choice::Submit(which) => self.plan.workload.requests[which as usize].to_string(),
            _ => String::new(),
        }
    }

    /// The drivers' states and the ops in flight, for people.
    pub fn dump(&self) -> String {
        format!("{:?}", self.engine)
    }

    /// The engine, to look at.
    pub fn engine(&self) -> &SimEngine<S::Driver> {
        &self.engine
    }

    /// The world's time.
    pub fn now(&self) -> Time {
        self.now
    }

    /// How many requests have ended.
    pub fn ended(&self) -> u32 {
        self.ended
    }

    /// The workload.
    pub fn workload(&self) -> &Workload {
        &self.plan.workload
    }

    /// What is being tested.
    pub fn subject(&self) -> &S {
        &self.plan.subject
    }

    /// The states that a driver has, for coverage.
    pub fn state_names(&self) -> &'static [&'static str] {
        <S::Driver as Driver>::STATES
    }
}

/// A folder of these files.
fn host_of<S: Subject>(subject: &S, files: &[Contents]) -> SimHost {
    let host = SimHost::new();
    for (name, contents) in subject.files().into_iter().zip(files) {
        host.put(name, contents.clone());
    }
    host
}

/// What an engine's files hold now.
fn files_of<D: Driver>(engine: &SimEngine<D>) -> Vec<Contents> {
    let backend = engine.backend();
    (0..backend.file_count()).map(|i| backend.file(file_id(i)).now().clone()).collect()
}

fn file_id(index: usize) -> cowbell_engine::units::FileId {
    cowbell_engine::units::FileId(index as u32)
}

/// What is asked of the disk beside, one after the other.
const BESIDE: [Request; 2] = [Request::write(0, 1024), Request::flush()];

/// What its shadow calls them.
const BESIDE_NUMBERS: [usize; 2] = [OTHERS_WRITE, OTHERS_WRITE + 1];

/// How its requests are known; and whose pattern it is written with.
const BESIDE_TAG: u64 = 2000;

/// How requests are known that are not to be taken.
const PROBE_TAG: u64 = 3000;

/// Of so many images that a crash may leave, one is gone on with.
const CRASH_PICKS: u32 = 4;

/// A request counts as no more of them: what is so long is done in pieces that are longer.
const TASKS_MAX: u64 = 64;

/// Events in which all is over when nothing goes wrong any more, for each [task](World::tasks). A disk that grows
/// far writes a table of some forty pieces.
const CALM_EVENTS: usize = 32;

/// Deadlines that may pass meanwhile.
const CALM_TICKS: u8 = 4;

/// So many runs follow each other while nothing ends, because a time has come: each begins what is due of every disk.
const RUNS_AT_ONCE: usize = 4;

/// Steps that requests take in one run, for each [task](World::tasks): more is a loop.
const STEPS_PER_RUN: usize = 64;

/// A world takes at most so many steps for each [task](World::tasks).
const STEPS_PER_REQUEST: u32 = 64;
