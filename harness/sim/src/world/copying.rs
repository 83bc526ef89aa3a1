//! A copy between the disk and the one beside it: when it is started, paused, resumed and cancelled,
//! and what must be so when it has ended.

use cowbell_engine::mem::Mem;
use cowbell_engine::step::{Driver, Io};
use cowbell_engine::units::{Errno, JobId, NodeId};
use std::ops::Range;
use std::time::Duration;

use cowbell_engine::{Copy, Moment, Why, Zeros};

use super::{PROBE_TAG, Stage, World};
use crate::choose::Choice;
use crate::disk::{Contents, Sites};
use crate::subject::{Copied, Subject};

/// A copy that is started once, at any time, and what may be done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyPlan {
    /// From where to where.
    pub way: Way,
    /// The target is known to be zeros: then it is started before anything is written there.
    pub target_is_zero: bool,
    /// Times that it is paused.
    pub pauses: u8,
    /// May it be cancelled?
    pub cancels: bool,
    /// May the engine be drained while it runs?
    pub drains: bool,
    /// Does the guest of the disk beside use that?
    pub beside: bool,
    /// Is the target to be as the source was when it began?
    pub of_start: bool,
    /// Is it given up when it has held up a write for too long?
    pub gives_up: bool,
    /// Is the target the disk when it has ended?
    pub mirrors: bool,
    /// Does it stop when something fails, until it is resumed?
    pub stops: bool,
    /// Is what it reads shown, and seen at any time?
    pub shown: bool,
    /// Is the copying left to the kernel?
    pub offload: bool,
    /// Is a piece as large as two clusters, which may be of two kinds?
    pub wide: bool,
    /// Is what it writes compressed, where that makes it smaller?
    pub compressed: bool,
    /// Are zeros written as data?
    pub written: bool,
}

/// From where to where a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the disk beside to the disk.
    In,
    /// From the disk to the one beside.
    Out,
    /// From the layers below the disk into it.
    Up,
}

impl CopyPlan {
    /// Nothing is done with it.
    pub const fn new(way: Way) -> CopyPlan {
        CopyPlan {
            way,
            target_is_zero: false,
            pauses: 0,
            cancels: false,
            drains: false,
            beside: false,
            of_start: false,
            gives_up: false,
            mirrors: false,
            stops: false,
            shown: false,
            offload: false,
            wide: false,
            compressed: false,
            written: false,
        }
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Phase {
    #[default]
    ToCome,
    Runs,
    Paused,
    /// Somebody has cancelled it.
    Cancelled,
    Ended,
}

/// The copy of a world.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Copying {
    plan: Option<CopyPlan>,
    phase: Phase,
    job: Option<JobId>,
    /// Bytes that are said to be done.
    done: u64,
    /// Where what was seen ends.
    seen: u64,
    has_moved: bool,
    /// Things that failed, where it stops then.
    errors: u8,
}

/// A disk that fails so often takes nothing more: the copy is called off.
const ERRORS_MAX: u8 = 2;

impl std::hash::Hash for Copying {
    fn hash<H: std::hash::Hasher>(&self, h: &mut H) {
        let left = self.plan.map(|plan| (plan.pauses, plan.cancels));
        (self.phase, left, self.seen, self.has_moved, self.errors).hash(h);
    }
}

impl Copying {
    pub fn new(plan: Option<CopyPlan>) -> Copying {
        Copying { plan, ..Copying::default() }
    }

    /// Something of it has failed: one that stops then is to be resumed.
    pub fn has_met_error(&mut self) {
        if self.phase == Phase::Runs && self.plan.is_some_and(|plan| plan.stops) {
            self.phase = Phase::Paused;
            self.errors += 1;
        }
    }

    /// Is it under way?
    pub fn runs(&self) -> bool {
        matches!(self.phase, Phase::Runs | Phase::Paused | Phase::Cancelled)
    }

    /// Has the disk beside taken the disk's place?
    pub fn has_moved(&self) -> bool {
        self.has_moved
    }

    /// Has it begun to write to the disk?
    pub fn has_written_here(&self) -> bool {
        let writes = self.plan.is_some_and(|plan| plan.way != Way::Out);
        writes && self.phase != Phase::ToCome
    }

    /// May the guest of the disk beside use it?
    pub fn may_use_beside(&self) -> bool {
        self.plan.is_none_or(|plan| plan.beside)
    }

    /// May the engine be drained now?
    pub fn may_drain(&self) -> bool {
        let Some(plan) = self.plan else { return true };
        self.phase == Phase::Ended || self.runs() && plan.drains
    }

    /// Nobody pauses or cancels it any more.
    pub fn is_left_alone(&mut self) {
        if let Some(plan) = &mut self.plan {
            (plan.pauses, plan.cancels, plan.drains) = (0, false, false);
        }
    }

    /// The engine is being drained: it is to end.
    pub fn is_drained(&mut self) {
        if self.runs() {
            self.phase = Phase::Cancelled;
        }
    }
}

/// Bytes of a piece, and pieces in flight at once: as small as may be, so that orders are many.
pub(super) const PIECE: usize = 4096;
const IN_FLIGHT: usize = 2;
/// Pieces of a copy of all, and as many as any copy has.
const PIECES: u64 = 3;
const PIECES_MAX: u64 = 1 << 12;

impl<S: Subject> World<S> {
    /// What can be done with the copy now.
    pub(super) fn copy_choices(&self, out: &mut Vec<Choice>) {
        let Some(plan) = self.copying.plan.filter(|_| self.stage == Stage::Running) else { return };
        match self.copying.phase {
            Phase::ToCome if self.may_copy(plan) => out.push(Choice::Copy),
            Phase::Runs if plan.pauses > 0 => out.push(Choice::PauseCopy),
            Phase::Paused if self.copying.errors < ERRORS_MAX => out.push(Choice::ResumeCopy),
            _ => {}
        }
        let goes_on = matches!(self.copying.phase, Phase::Runs | Phase::Paused);
        let job = self.copying.job.filter(|_| self.copying.runs());
        if plan.shown && job.is_some_and(|job| self.engine.job_read(job).is_some()) {
            out.push(Choice::SeeCopy);
        }
        if goes_on && (plan.cancels || self.copying.errors >= ERRORS_MAX) {
            out.push(Choice::CancelCopy);
        }
    }

    /// Is there room for it, and is its target as it is said to be?
    fn may_copy(&self, plan: CopyPlan) -> bool {
        let beside = usize::from(self.beside.is_some());
        let room = self.plan.workload.requests.len().max(1) + beside;
        let is_known = !plan.target_is_zero || self.is_unwritten(plan.way);
        // What was given up has its place in the engine until it ends.
        let has_room = self.engine.in_flight() + self.engine.abandoned() < room;
        let may_ask = !self.life.is_paused && self.is_within_quota();
        has_room && is_known && may_ask
    }

    /// Has nobody written to the target of a copy?
    fn is_unwritten(&self, way: Way) -> bool {
        let asked = &self.plan.workload.requests[..self.next as usize];
        match way {
            Way::In => !asked.iter().any(|request| request.modifies()),
            Way::Out => self.beside_next == 0,
            Way::Up => true,
        }
    }

    /// Source and target.
    fn ends_of(&self, way: Way) -> (NodeId, NodeId) {
        let beside = || self.beside.expect("a copy is between two disks");
        match way {
            Way::In => (beside(), self.node),
            Way::Out => (self.node, beside()),
            Way::Up => (self.node, self.node),
        }
    }

    /// Begins it. Both disks stay as they are while it runs.
    pub(super) fn start_copy(&mut self) -> Result<(), String> {
        let plan = self.copying.plan.expect("chosen because there is one");
        let (source, target) = self.ends_of(plan.way);
        // What is stopped has several pieces: zeros, which most of these disks are, make one.
        let is_written = plan.pauses > 0 || plan.written;
        let zeros = if is_written { Zeros::Written } else { Zeros::Told };
        let between = Copy {
            moment: match plan {
                CopyPlan { of_start: true, .. } => Moment::Start,
                CopyPlan { mirrors: true, .. } => Moment::End,
                _ => Moment::Any,
            },
            hold_max: plan.gives_up.then_some(Duration::from_millis(1)),
            target_is_zero: plan.target_is_zero,
            shown: plan.shown,
            offload: plan.offload,
            compressed: plan.compressed,
            zeros,
            ..Copy::new(source, target)
        };
        let pull = Copy::pull(self.node, 1);
        let copy = if plan.way == Way::Up { pull } else { between };
        let piece = if plan.wide { 2 * PIECE } else { PIECE };
        let copy = Copy { in_flight: IN_FLIGHT, piece, stops_on_error: plan.stops, ..copy };
        let started = match self.plan.subject.copied() {
            None => self.engine.start(copy),
            Some(Copied { parts, unit, piece, in_flight }) => {
                let all = self.span_copied(parts);
                let (at, len) = (all.start, Some(all.end - all.start));
                let (source_offset, target_offset) = (at, at);
                let of_parts = Copy { unit, piece, in_flight, ..copy };
                let copy = Copy { source_offset, target_offset, len, ..of_parts };
                self.engine.start_parts(copy, parts)
            }
        };
        let job = started.map_err(|why| format!("no copy: {why:?}"))?;
        (self.copying.job, self.copying.phase) = (Some(job), Phase::Runs);
        let World { shadow, others, .. } = self;
        match (plan.way, others) {
            (Way::In, Some(others)) => shadow.copy_begins(others),
            (Way::Out, Some(others)) => others.copy_begins(shadow),
            // The disk shows the same, before and after.
            _ => {}
        }
        for node in [source, target] {
            if self.engine.close(node) != Err(Why::InUse)
                || self.engine.pause(node) != Err(Why::InUse)
            {
                return Err(format!("{node:?} is closed or paused while it is copied"));
            }
            let cut = Io::truncate(512);
            let taken = self.engine.submit(node, cut, Mem::None, PROBE_TAG);
            taken.map_err(|refused| format!("a truncation is refused: {:?}", refused.why))?;
            let ended = self.engine.poll().map(|ended| (ended.tag, ended.result));
            if ended != Some((PROBE_TAG, Err(Errno::INVALID))) {
                return Err(format!("{node:?} is resized while it is copied: {ended:?}"));
            }
        }
        Ok(())
    }

    /// From the first to the last byte of the target that is copied.
    fn span_copied(&self, parts: &[Range<u64>]) -> Range<u64> {
        let (_, target) = self.ends_of(self.copying.plan.map_or(Way::Up, |plan| plan.way));
        let size = self.engine.node(target).size();
        let start = parts.first().map_or(0, |part| part.start).min(size);
        start..parts.last().map_or(0, |part| part.end).min(size).max(start)
    }

    /// How many bytes are copied, at least and at most: parts are rounded out to what is marked of them.
    fn bytes_copied(&self) -> (u64, u64) {
        let plan = self.copying.plan.expect("it runs");
        let (_, target) = self.ends_of(plan.way);
        let size = self.engine.node(target).size();
        let Some(Copied { parts, .. }) = self.plan.subject.copied() else { return (size, size) };
        let all = self.span_copied(parts);
        let len = |part: &Range<u64>| part.end.min(all.end).saturating_sub(part.start);
        let of_parts = parts.iter().map(len).sum();
        let all = all.end - all.start;
        (if plan.mirrors { all } else { of_parts }, all)
    }

    /// How many bytes of what is copied lie before this one of the copy.
    fn bytes_before(&self, up_to: u64) -> u64 {
        let Some(Copied { parts, .. }) = self.plan.subject.copied() else { return up_to };
        let end = self.span_copied(parts).start.saturating_add(up_to);
        let before = |part: &Range<u64>| part.end.min(end).saturating_sub(part.start);
        parts.iter().map(before).sum()
    }

    /// How many pieces are copied.
    pub(super) fn pieces_copied(&self) -> usize {
        let Some(plan) = self.copying.plan else { return 0 };
        let Some(Copied { parts, piece, .. }) = self.plan.subject.copied() else {
            return if self.others.is_some() { PIECES as usize } else { 0 };
        };
        let pieces = |from: u64, to: u64| to.saturating_sub(from) / piece.max(1) as u64 + 1;
        let of_all = || Some(pieces(parts.first()?.start, parts.last()?.end));
        let count = match plan.mirrors {
            true => of_all().unwrap_or(0),
            false => parts.iter().map(|part| pieces(part.start, part.end)).sum(),
        };
        count.clamp(PIECES, PIECES_MAX) as usize
    }

    pub(super) fn pause_copy(&mut self) -> Result<(), String> {
        if let Some(plan) = &mut self.copying.plan {
            plan.pauses -= 1;
        }
        self.copying.phase = Phase::Paused;
        self.is_known(|engine, job| engine.pause_job(job))
    }

    pub(super) fn resume_copy(&mut self) -> Result<(), String> {
        self.copying.phase = Phase::Runs;
        self.is_known(|engine, job| engine.resume_job(job))
    }

    pub(super) fn cancel_copy(&mut self) -> Result<(), String> {
        self.copying.phase = Phase::Cancelled;
        self.is_known(|engine, job| engine.cancel_job(job))
    }

    /// What is shown comes in order, and each byte once.
    pub(super) fn see_copy(&mut self) -> Result<(), String> {
        let job = self.copying.job.expect("chosen because it runs");
        let read = self.engine.job_read(job);
        let (at, len) = read.map(|(at, bytes)| (at, bytes.len() as u64)).unwrap_or_default();
        if len == 0 || at < self.copying.seen {
            return Err(format!("{len} bytes at {at} are shown after {}", self.copying.seen));
        }
        self.copying.seen = at + len;
        if self.engine.job_seen(job) { Ok(()) } else { Err("what is shown is not there".into()) }
    }

    fn is_known(
        &mut self,
        ask: impl FnOnce(&mut crate::subject::SimEngine<S::Driver>, JobId) -> bool,
    ) -> Result<(), String> {
        let job = self.copying.job.expect("chosen because it runs");
        if ask(&mut self.engine, job) {
            Ok(())
        } else {
            Err("a copy that runs is not known".into())
        }
    }

    /// What the source holds now may come to be in the target.
    pub(super) fn copy_sees(&mut self) {
        // What the kernel is to copy when that is cancelled, or has failed, it may copy as it is then.
        let gives_up = self.copying.plan.is_some_and(|plan| plan.gives_up);
        let is_over = self.copying.phase == Phase::Cancelled || self.faulted || gives_up;
        let is_of_start =
            self.copying.plan.is_some_and(|plan| plan.of_start && !(plan.offload && is_over));
        if !self.copying.runs() || is_of_start {
            return;
        }
        let World { shadow, others, .. } = self;
        match (self.copying.plan.map(|plan| plan.way), others) {
            (Some(Way::In), Some(others)) => shadow.copy_sees(others),
            (Some(Way::Out), Some(others)) => others.copy_sees(shadow),
            _ => {}
        }
    }

    /// How far it says that it is: never back, never more than there is, and never more than is there.
    pub(super) fn see_progress(&mut self) -> Result<(), String> {
        if !self.copying.runs() {
            return Ok(());
        }
        let progress = self.copying.job.and_then(|job| self.engine.job_progress(job));
        let progress = progress.ok_or("a copy that runs has no progress")?;
        let CopyPlan { way, of_start, mirrors, stops, .. } = self.copying.plan.expect("it runs");
        let of_start = of_start || mirrors || way == Way::Up;
        // Whatever it waits for itself, it reads what others wait for.
        let is_idle = self.engine.backend().in_flight_count() == 0 && !self.is_behind;
        let is_idle = is_idle && !(stops && self.copying.phase == Phase::Paused);
        if of_start && is_idle && self.ended < self.next && !self.engine.backend().is_stalled() {
            return Err("a copy holds a request up, and does nothing".into());
        }
        let (least, most) = self.bytes_copied();
        let is_so = (least..=most).contains(&progress.total) && progress.done <= progress.total;
        if !is_so || progress.done < self.copying.done {
            return Err(format!("a copy of {least} bytes is at {progress:?}"));
        }
        if self.bytes_before(progress.up_to) > progress.done {
            return Err(format!("a copy is not done as far as it says: {progress:?}"));
        }
        self.copying.done = progress.done;
        // What is written there is in its file at once; its bytes were noise.
        if way == Way::In && !self.plan.subject.writes_back() {
            let files = self.files();
            let there = self.shadow.bytes_changed(&self.inspect(&files)?.found);
            if there < progress.done {
                return Err(format!("{} bytes are copied, and {there} are there", progress.done));
            }
        }
        Ok(())
    }

    /// A copy has ended.
    pub(super) fn see_copied(
        &mut self,
        job: JobId,
        result: Result<(), Errno>,
    ) -> Result<(), String> {
        if !self.copying.runs() || self.copying.job != Some(job) {
            return Err(format!("{job:?} has ended, which does not run"));
        }
        let way = self.copying.plan.expect("it ran").way;
        let was_cancelled = self.copying.phase == Phase::Cancelled;
        self.copying.phase = Phase::Ended;
        let engine = &mut self.engine;
        let knows = engine.job_progress(job).is_some()
            || engine.pause_job(job)
            || engine.resume_job(job)
            || engine.cancel_job(job);
        if knows {
            return Err("a copy has ended, and is there still".into());
        }
        let is_full = way != Way::Out && self.plan.subject.may_be_full();
        match result {
            Err(Errno::CANCELED) if was_cancelled => {}
            Err(Errno::TIMED_OUT) if self.copying.plan.is_some_and(|plan| plan.gives_up) => {}
            Err(Errno::NO_SPACE) if is_full => {}
            Err(errno) if !self.faulted => {
                return Err(format!("a copy failed although nothing did: {errno}"));
            }
            _ => {}
        }
        match way {
            Way::In => self.shadow.copy_ends(result.is_ok()),
            Way::Up => {
                if result.is_ok() {
                    self.inspect_cut_off()?;
                }
            }
            Way::Out => {
                let others = self.others.as_mut().expect("a copy is between two disks");
                others.copy_ends(result.is_ok());
                let mirrors = self.copying.plan.is_some_and(|plan| plan.mirrors);
                self.copying.has_moved = mirrors && result.is_ok();
                // What has waited goes on now that this is known.
                self.is_behind |= self.copying.has_moved;
                if result.is_ok() && !mirrors {
                    self.inspect_copy()?;
                }
            }
        }
        Ok(())
    }

    /// All has been copied to the disk beside, and is stable: so it is whatever a crash leaves.
    fn inspect_copy(&self) -> Result<(), String> {
        let sites = self.engine.backend().crash_sites_beside();
        let least = |sites: &Sites| sites.image(|_| 0, 0);
        let most = |sites: &Sites| {
            let last = |site: usize| sites.sites[site].options.len() - 1;
            sites.image(last, sites.lengths.len() - 1)
        };
        for left in [sites.iter().map(least).collect(), sites.iter().map(most).collect()] {
            let left: Vec<Contents> = left;
            self.inspect_others(&left)?;
        }
        Ok(())
    }

    /// All has been pulled up, and is stable: whatever a crash leaves, the disk is the same when nothing is below it.
    fn inspect_cut_off(&self) -> Result<(), String> {
        if !self.plan.subject.has_raw_below() {
            return Ok(());
        }
        let sites = self.engine.backend().crash_sites();
        let least: Vec<Contents> = sites.iter().map(|sites| sites.image(|_| 0, 0)).collect();
        let most = |sites: &Sites| {
            let last = |site: usize| sites.sites[site].options.len() - 1;
            sites.image(last, sites.lengths.len() - 1)
        };
        for mut left in [least, sites.iter().map(most).collect()] {
            // Zeros below are as nothing.
            let mut nothing = Contents::default();
            nothing.set_len(left[0].len());
            left[0] = nothing;
            let cut_off = self.inspect(&left)?;
            let shows = self.shadow.check_crash(&cut_off.found);
            shows.map_err(|why| format!("cut off from what was below: {why}"))?;
        }
        Ok(())
    }

    /// What a crash may leave of the disk beside, now.
    fn inspect_others(&self, files: &[Contents]) -> Result<(), String> {
        let (Some(other), Some(others)) = (self.plan.subject.beside(), &self.others) else {
            return Ok(());
        };
        let verdict = self.plan.verdicts_beside.of(&other, files)?;
        others.check_other_crash(&self.found_of(&other, true, &verdict, files)?)
    }
}
