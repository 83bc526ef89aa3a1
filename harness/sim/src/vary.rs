//! Variations of a real run: from its [record](cowbell_engine::record), other orders of what happened, faults and crashes.
//!
//! Of the run's last requests (or of those before some turn) a *window* is taken. What came before it is done first, one request
//! after the other, on a simulated disk which begins as the real one did: that makes an [image](Recorded) of tables without a guest's
//! bytes. From there the window is a [workload](crate::workload) like others. Its guest submits in the order of the record, and
//! who was submitted only when another had ended and was taken waits for that here, too; all else may go any way.
//!
//! First every order of the last few requests is tried, then the whole window in orders that are drawn from seeds.
//!
//! The last copy that had begun by then, and in which the disk takes part, may begin at any time in the window. It is of the
//! clusters that the window's requests go to, and of some others: the first and the last, or those where it was.

use std::collections::BTreeMap;
use std::ops::Range;

use cowbell_engine::backend::COPY_NUMBERS;
use cowbell_engine::op::{OpKind, Target};
use cowbell_engine::ops::OpRecord;
use cowbell_engine::record::{Entry, Reader};
use cowbell_engine::step::{Driver, Io, IoKind};
use cowbell_engine::units::NodeId;
use cowbell_engine::{Asker, Copy, Moment as Of, Zeros};
use cowbell_formats::Format;

use crate::choose::{Chooser, Pct, Random};
use crate::clock::Stopwatch;
use crate::disk::SECTOR;
use crate::explore::{Counts, Failure, Limit, exhaust, run};
use crate::gate::Report;
use crate::mutants::planted;
use crate::played::{Moment, Player, Verdict};
use crate::subject::Subject;
use crate::subjects::recorded::{NOISE_MAX, PIECE_MAX, Parts, Recorded, SEED_BESIDE, reach};
use crate::trace::Trace;
use crate::workload::{REQUESTS_MAX, Request, Workload};
use crate::world::{Base, Budget, CopyPlan, QUIET, Way};

/// What is tried.
#[derive(Clone, Copy, Debug)]
pub struct Variation {
    /// The window ends with what was submitted before this turn of the loop was over; `None`: with the last request.
    pub near: Option<u64>,
    /// Requests in the window, at most.
    pub requests: usize,
    /// Faults in a run, at most.
    pub faults: u8,
    /// Crashes in a run after which it goes on, at most. What a crash would leave is looked at anyway.
    pub crashes: u8,
    /// The first seed.
    pub seed: u64,
    /// How many seeds.
    pub runs: u64,
    /// Seconds, at most.
    pub seconds: f64,
    /// Of this disk; `None`: of that which the last request went to; if there was none, of that which was copied to last.
    pub disk: Option<usize>,
    /// A [planted defect](crate::mutants).
    pub plant: Option<&'static str>,
}

/// What was tried, and what came of it.
#[derive(Debug)]
pub struct Varied {
    /// Which disk.
    pub disk: usize,
    /// Requests to it before the window.
    pub before: usize,
    /// The window.
    pub window: Workload,
    /// The copy that is varied with it, and the disk that it is from or to; itself: from what is below it.
    pub copy: Option<(Way, usize)>,
    /// Of how many of its last requests every order was tried. `None`: time ran out before.
    pub exhausted: Option<usize>,
    /// Those, and what failed.
    pub report: Report<Recorded>,
    /// Runs that were drawn.
    pub drawn: u64,
    /// The seed that failed, if one did.
    pub failed_seed: Option<u64>,
}

/// What ops of a run have brought of the tables that nobody had written before: so the files began.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    files: BTreeMap<u32, Learnt>,
}

#[derive(Clone, Debug, Default)]
struct Learnt {
    sectors: BTreeMap<u64, [u8; SECTOR as usize]>,
    /// Where ops have written: first byte, and end, apart from each other.
    written: BTreeMap<u64, u64>,
}

impl Tables {
    /// An op is taken.
    pub fn take(&mut self, record: &OpRecord) {
        let Target::File(file) = record.op.target else { return };
        if matches!(record.op.kind, OpKind::Read | OpKind::Hole) || record.remaining() == 0 {
            return;
        }
        let (start, end) = (record.offset(), record.offset().saturating_add(record.remaining()));
        self.files.entry(file.0).or_default().write(start, end);
    }

    /// An op comes back, and has brought this of what the engine looks at.
    pub fn bring(&mut self, record: &OpRecord, brought: &[u8]) {
        let Target::File(file) = record.op.target else { return };
        if record.op.kind == OpKind::Read && !brought.is_empty() {
            self.files.entry(file.0).or_default().read(record.offset(), brought);
        }
    }
}

impl Learnt {
    fn write(&mut self, mut start: u64, mut end: u64) {
        while let Some((&from, &to)) = self.written.range(..=end).next_back() {
            if to < start {
                break;
            }
            (start, end) = (start.min(from), end.max(to));
            self.written.remove(&from);
        }
        self.written.insert(start, end);
    }

    fn was_written(&self, start: u64, end: u64) -> bool {
        self.written.range(..end).next_back().is_some_and(|(_, &to)| to > start)
    }

    fn read(&mut self, offset: u64, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let Some(place) = offset.checked_add(at as u64) else { return };
            let (index, from) = (place / SECTOR, (place % SECTOR) as usize);
            let len = (SECTOR as usize - from).min(bytes.len() - at);
            if !self.was_written(place, place.saturating_add(len as u64)) {
                let sector = self.sectors.entry(index).or_insert([0; SECTOR as usize]);
                sector[from..from + len].copy_from_slice(&bytes[at..at + len]);
            }
            at += len;
        }
    }
}

/// A request to the disk, and its number among all that were submitted.
#[derive(Clone, Copy, Debug)]
struct Asked {
    number: u64,
    request: Request,
}

/// A copy that was begun.
#[derive(Clone, Copy, Debug)]
struct Job {
    /// Its place among all.
    place: usize,
    numbers: [u64; COPY_NUMBERS],
    /// The nodes.
    source: u32,
    target: u32,
    /// Was it of some parts alone?
    is_of_parts: bool,
    /// Requests that were submitted before it.
    behind: u64,
    pauses: u8,
    is_cancelled: bool,
}

/// Of a disk, all that it was asked until the window ends.
struct Story {
    disk: usize,
    asked: Vec<Asked>,
    /// The last copy that it takes part in.
    job: Option<Job>,
    /// What other disks were asked.
    others: Vec<(usize, Asked)>,
}

impl Story {
    /// As the record tells it. `tops`: the index of each disk's node.
    fn of(record: &[u8], tops: &[u32], how: &Variation) -> Result<Story, String> {
        let mut asked: Vec<(usize, Asked)> = Vec::new();
        let mut jobs: Vec<Job> = Vec::new();
        let (mut number, mut turns) = (0, 0);
        for entry in Reader::new(record) {
            match entry {
                Entry::Submitted { node, io, .. } => {
                    number += 1;
                    let Io { kind, offset, len } = io;
                    let request = Request { kind, offset, len };
                    if let Some(disk) = tops.iter().position(|&top| top == node) {
                        asked.push((disk, Asked { number, request }));
                    }
                }
                Entry::Run(_) => {
                    turns += 1;
                    if how.near.is_some_and(|near| turns > near) {
                        break;
                    }
                }
                Entry::Attached(_) => {
                    return Err("a disk came while it ran; name an earlier turn".into());
                }
                Entry::Started { copy: numbers, source, target, parts } => {
                    jobs.push(Job {
                        place: jobs.len(),
                        numbers,
                        source,
                        target,
                        is_of_parts: parts.is_some(),
                        behind: number,
                        pauses: 0,
                        is_cancelled: false,
                    });
                }
                Entry::Job { what, job } => {
                    let Some(job) = jobs.get_mut(job as usize) else { continue };
                    job.pauses += u8::from(what == 1 && job.pauses < PAUSES_MAX);
                    job.is_cancelled |= what == 3;
                }
                _ => {}
            }
        }
        let disk_of = |node: u32| tops.iter().position(|&top| top == node);
        let copied = || jobs.last().and_then(|job| disk_of(job.target));
        let last = || asked.last().map(|(disk, _)| *disk).or_else(copied);
        let disk = how.disk.or_else(last).ok_or("no request was submitted until then")?;
        let Some(&top) = tops.get(disk) else { return Err(format!("it has no disk {disk}")) };
        let job = jobs.into_iter().rev().find(|job| job.source == top || job.target == top);
        let (asked, others): (Vec<_>, Vec<_>) =
            asked.into_iter().partition(|(its, _)| *its == disk);
        let asked = asked.into_iter().map(|(_, asked)| asked).collect();
        Ok(Story { disk, asked, job, others })
    }
}

/// What of a copy is varied.
struct Plan {
    plan: CopyPlan,
    /// The other disk.
    beside: usize,
    unit: usize,
    in_flight: usize,
    /// Where it ended.
    end: u64,
    /// Where it was at the window's end, if it ran then.
    at: Option<u64>,
}

impl Plan {
    /// Of a job that the disk with the node `top` takes part in.
    fn of(job: &Job, disk: usize, tops: &[u32]) -> Result<Plan, String> {
        let wrong = |what: &str| Err(format!("a copy ran there, {what}: it cannot be varied"));
        let Job { numbers, source, target, .. } = *job;
        let node = NodeId::default();
        let copy = Copy::from_numbers(node, node, numbers);
        let copy = copy.ok_or("a copy is started that is none")?;
        let top = tops.get(disk).copied().unwrap_or_default();
        let other = if source == top { target } else { source };
        let Some(beside) = tops.iter().position(|&top| top == other) else {
            return wrong("between a disk and a layer below one");
        };
        let is_pull = source == target;
        let way = match (is_pull, target == top) {
            (true, _) => Way::Up,
            (false, true) => Way::In,
            (false, false) => Way::Out,
        };
        if copy.top_layers.is_some() || copy.skip_layers != u8::from(is_pull) {
            return wrong("of what some layers say");
        }
        if job.is_of_parts {
            return wrong("of some parts of the disk");
        }
        if copy.source_offset != 0 || copy.target_offset != 0 {
            return wrong("of a part of the disk, or to a part of one");
        }
        let (of_start, mirrors) = (copy.moment == Of::Start, copy.moment == Of::End);
        if mirrors && way == Way::In {
            return wrong("a mirror, and this is what it writes to (--disk names the other)");
        }
        let of_start = of_start && !is_pull;
        let plan = CopyPlan {
            target_is_zero: copy.target_is_zero && !is_pull,
            pauses: job.pauses,
            cancels: job.is_cancelled,
            of_start,
            gives_up: of_start && copy.hold_max.is_some(),
            mirrors,
            stops: copy.stops_on_error,
            shown: copy.shown && way == Way::In && !of_start,
            offload: copy.offload,
            compressed: copy.compressed,
            written: copy.zeros == Zeros::Written,
            ..CopyPlan::new(way)
        };
        let unit = copy.unit.clamp(512, PIECE_MAX);
        let unit = 1 << unit.ilog2();
        let in_flight = copy.in_flight.clamp(1, 2);
        Ok(Plan { plan, beside, unit, in_flight, end: copy.len.unwrap_or(u64::MAX), at: None })
    }
}

/// Searches around a run. `player`: of `record`, of which nothing has been done; `disks`: they, and the layers of each.
///
/// # Errors
///
/// When the record does not tell enough, or it is too much.
pub fn vary<F, D: Driver>(
    player: &mut Player<'_, D, F>,
    record: &[u8],
    disks: &[Parts],
    how: &Variation,
) -> Result<Varied, String> {
    let watch = Stopwatch::start();
    let tops: Vec<u32> = sums(disks.iter().map(|disk| disk.layers.len() as u32))
        .map(|nodes| nodes.saturating_sub(1))
        .collect();
    let Story { disk, asked, job, others } = Story::of(record, &tops, how)?;
    let plan = job.as_ref().map(|job| Plan::of(job, disk, &tops)).transpose()?;
    if plan.is_some() && how.crashes > 0 {
        return Err("a copy ran there: no run goes on after a crash (--crashes 0)".into());
    }
    // Both disks of a copy keep their size.
    let resized = asked.iter().rposition(|asked| asked.request.kind == IoKind::Truncate);
    let first = resized.filter(|_| plan.is_some()).map_or(0, |last| last + 1);
    let count = how.requests.clamp(1, REQUESTS_MAX).min(asked.len() - first);
    let begin = asked.len() - count;
    let until = plan.is_some().then(|| how.near.unwrap_or(u64::MAX));
    let (after, tables) = again(player, &asked[begin..], until)?;
    let made = |disk: usize| {
        let first = sums(disks[..disk].iter().map(|disk| disk.files.len() as u32)).last();
        let mut parts = disks[disk].clone();
        learn(&mut parts, &tables, first.unwrap_or(0));
        Recorded::new(parts)
    };
    let start = made(disk)?;
    let mut window = Workload::new(asked[begin..].iter().map(|asked| asked.request));
    after.iter().enumerate().for_each(|(which, &others)| window.submit_after(which, others));
    let before: Vec<Request> = asked[..begin].iter().map(|asked| asked.request).collect();
    let copying = match (plan, job) {
        (Some(plan), Some(job)) => {
            let at = player.progress(job.place).map(|progress| progress.up_to);
            let plan = Plan { at, ..plan };
            let number = asked.get(begin).map_or(job.behind + 1, |asked| asked.number);
            let is_its = |one: &&(usize, Asked)| one.0 == plan.beside && one.1.number < number;
            let its = others.iter().filter(is_its).map(|(_, asked)| asked.request);
            let its: Vec<Request> = its.filter(Request::modifies).collect();
            let beside = match plan.plan.way {
                Way::Up => None,
                Way::In | Way::Out => {
                    can_be_done(&its)?;
                    Some(made(plan.beside)?.after(its.into_iter(), Vec::new())?)
                }
            };
            Some(Copying::new(plan, &start, beside)?)
        }
        _ => None,
    };
    let (title, threads) = ("varied".to_string(), 1);
    let report = Report { title, threads, complete: true, ..Report::default() };
    let mut varied = Varied {
        disk,
        before: begin,
        window: window.clone(),
        copy: copying.as_ref().map(|copying| (copying.plan.plan.way, copying.plan.beside)),
        exhausted: None,
        report,
        drawn: 0,
        failed_seed: None,
    };
    let copying = copying.as_ref();
    let search = Search { start: &start, before: &before, window: &window, copying, how, watch };
    search.run(&mut varied)?;
    varied.report.seconds = watch.seconds();
    Ok(varied)
}

/// The sums of the first, of the first two, and so on.
fn sums(numbers: impl Iterator<Item = u32>) -> impl Iterator<Item = u32> {
    numbers.scan(0_u32, |sum, number| {
        *sum = sum.saturating_add(number);
        Some(*sum)
    })
}

/// Does the run again until all of these have been submitted, and this turn is over. Answers which of them had ended and been taken
/// when each was, and what was learnt of tables.
fn again<F, D: Driver>(
    player: &mut Player<'_, D, F>,
    window: &[Asked],
    until: Option<u64>,
) -> Result<(Vec<u64>, Tables), String> {
    *player.tables() = Some(Tables::default());
    let mut after = Vec::with_capacity(window.len());
    let verdict = player.play(&mut |engine, moment| {
        let done = engine.backend().done;
        let is_next = |next: &Asked| done.requests == next.number;
        if matches!(moment, Moment::Submitted(_)) && window.get(after.len()).is_some_and(is_next) {
            let in_flight = |asked: &Asked| {
                let is_it = |asker| asker == Asker::Guest(asked.number);
                engine.requests().any(|request| is_it(request.asker))
            };
            let taken = window[..after.len()].iter().enumerate();
            let taken = taken.filter(|(_, asked)| !in_flight(asked));
            after.push(taken.fold(0, |bits, (which, _)| bits | 1 << which));
        }
        after.len() < window.len() || until.is_some_and(|until| done.runs < until)
    });
    let runs = player.engine().backend().done.runs;
    match verdict {
        Verdict::Differs(how) => {
            Err(format!("in turn {runs} it goes another way than it was recorded: {how}"))
        }
        _ if after.len() < window.len() => Err(format!("after turn {runs} it tells no more")),
        _ => Ok((after, player.tables().take().unwrap_or_default())),
    }
}

/// Puts in what was learnt of a disk's files, of which the first has this number.
fn learn(parts: &mut Parts, tables: &Tables, first: u32) {
    for (number, file) in (first..).zip(&mut parts.files) {
        let Some(learnt) = tables.files.get(&number) else { continue };
        for (&index, sector) in &learnt.sectors {
            file.sectors.entry(index).or_insert(*sector);
        }
    }
}

/// A copy that is varied.
struct Copying {
    plan: Plan,
    /// The disk beside, as it is when the window begins.
    beside: Option<Recorded>,
    /// What is looked at is whole clusters of both disks, and whole units.
    align: u64,
    /// Bytes of the source.
    size: u64,
    /// The first cluster that has anything to be copied, or that where it was; the last one that has; and the one behind that, or
    /// behind where it was.
    ends: Vec<Range<u64>>,
}

impl Copying {
    fn new(mut plan: Plan, disk: &Recorded, beside: Option<Recorded>) -> Result<Copying, String> {
        let wrong = |what: &str| Err(format!("a copy ran there, {what}: it cannot be varied"));
        let way = plan.plan.way;
        let other = beside.as_ref().unwrap_or(disk);
        let (source, target) = if way == Way::In { (other, disk) } else { (disk, other) };
        let size = source.size();
        if target.size() < size || plan.end < size {
            return wrong("of a part of the disk");
        }
        if size == 0 {
            return wrong("of nothing");
        }
        if way == Way::Out && source.may_be_full() != target.may_be_full() {
            return wrong("between a file and a device");
        }
        plan.plan.offload &= [source, target].iter().all(|disk| disk.format() == Format::Raw);
        let align = disk.cluster().max(other.cluster()).max(plan.unit as u64).max(4096);
        let cluster = |at: u64| at / align * align..(at / align + 1).saturating_mul(align);
        let below = usize::from(way == Way::Up);
        let data = source.data(below)?.unwrap_or(0..size);
        let last = data.end.min(size).saturating_sub(1);
        let first = plan.at.map_or(data.start, |at| at.max(data.start)).min(last);
        let behind = if plan.at.is_some() { first } else { last };
        let mut ends = vec![cluster(first), cluster(last), cluster(behind.saturating_add(align))];
        ends.retain(|part| part.start < size);
        ends.dedup();
        Ok(Copying { plan, beside, align, size, ends })
    }

    /// What is looked at of the disks besides what requests go to, which are these parts.
    fn more(&self, parts: &[Range<u64>], is_all: bool) -> &[Range<u64>] {
        let begins = parts.first().is_some_and(|part| part.start < self.size);
        match (is_all, begins) {
            (true, _) => &self.ends,
            (false, true) => &[],
            (false, false) => &self.ends[..self.ends.len().min(2)],
        }
    }

    /// The disk with the one beside it, of both of which these parts are looked at. There are so many pieces, or a few more.
    fn made(&self, disk: &Recorded, parts: &[Range<u64>], pieces: u64) -> Result<Recorded, String> {
        let Plan { plan, unit, in_flight, .. } = self.plan;
        let span =
            parts.last().map_or(0, |part| part.end) - parts.first().map_or(0, |part| part.start);
        let bytes = match plan.mirrors {
            true => span,
            false => parts.iter().map(|part| part.end - part.start).sum(),
        };
        if span > SPAN_MAX || bytes > NOISE_MAX {
            return Err(format!(
                "the copy of what these requests go to is of {bytes} bytes in {span}: more than can be varied; take fewer requests"
            ));
        }
        let mut piece = unit.max(4096);
        while piece < PIECE_MAX
            && (bytes / piece as u64 > pieces || span / piece as u64 > MARKS_MAX)
        {
            piece *= 2;
        }
        let is_zero = plan.target_is_zero;
        let beside = match &self.beside {
            Some(beside) => {
                let seed = if is_zero && plan.way == Way::Out { 0 } else { SEED_BESIDE };
                Some(beside.after(std::iter::empty(), parts.to_vec())?.seeded(seed)?)
            }
            None => None,
        };
        let disk = if is_zero && plan.way == Way::In { disk.seeded(0)? } else { disk.clone() };
        disk.copying(beside, (unit, piece, in_flight))
    }
}

/// Can all of these be done again?
fn can_be_done(requests: &[Request]) -> Result<(), String> {
    let bytes = requests.iter().map(|request| request.len).fold(0_u64, u64::saturating_add);
    if requests.len() > BEFORE_MAX || bytes > BEFORE_BYTES_MAX {
        return Err(format!(
            "{} requests of {bytes} bytes come before those that are varied: more than can be done again ({BEFORE_MAX}, {BEFORE_BYTES_MAX} bytes); name an earlier turn",
            requests.len()
        ));
    }
    Ok(())
}

struct Search<'a> {
    start: &'a Recorded,
    before: &'a [Request],
    window: &'a Workload,
    copying: Option<&'a Copying>,
    how: &'a Variation,
    watch: Stopwatch,
}

impl Search<'_> {
    fn run(&self, varied: &mut Varied) -> Result<(), String> {
        let Variation { faults, crashes, seed, runs, seconds, plant, .. } = *self.how;
        let copy = self.copying.map(|copying| copying.plan.plan);
        let budget = Budget { faults, crashes, ticks: 1, copy, ..QUIET };
        let told = |image: &Recorded, workload: &Workload, failure: &Failure| Trace {
            plant,
            ..Trace::of(image.clone(), budget, workload, failure)
        };
        let all = self.window.requests.len();
        for last in usize::from(copy.is_none())..=all.min(EXHAUSTED_MAX) {
            let left = (seconds / 2.0 - self.watch.seconds()) * 1e3;
            if left < 1.0 {
                break;
            }
            let (image, workload) = self.from(all - last, PIECES_FEW)?;
            let base = Base::new(image.clone(), workload.requests.len())?;
            let limit = Limit { millis: left as u64, ..Limit::default() };
            let outcome = planted(plant, || exhaust(&base.world(&workload, budget), limit));
            match outcome {
                Ok(counts) => {
                    varied.report.counts += counts;
                    if counts.cut_short > 0 {
                        break;
                    }
                    varied.exhausted = Some(last);
                }
                Err(failure) => {
                    varied.report.failures.push(told(&image, &workload, &failure));
                    return Ok(());
                }
            }
        }
        let (image, workload) = self.from(0, PIECES_MANY)?;
        let base = Base::new(image.clone(), workload.requests.len())?;
        let world = base.world(&workload, budget);
        for seed in seed..seed.saturating_add(runs) {
            if self.watch.seconds() > seconds {
                varied.report.complete = false;
                break;
            }
            let (mut random, mut pct) = (Random::new(seed, FAULT_IN), Pct::new(seed, 2, FAULT_IN));
            let chooser: &mut dyn Chooser =
                if seed.is_multiple_of(2) { &mut random } else { &mut pct };
            let (mut counts, mut path) = (Counts::default(), Vec::new());
            let outcome = planted(plant, || run(&world, chooser, CRASH_IN, &mut counts, &mut path));
            varied.report.counts += counts;
            varied.drawn += 1;
            if let Err(failure) = outcome {
                varied.report.failures.push(told(&image, &workload, &failure));
                varied.failed_seed = Some(seed);
                return Ok(());
            }
        }
        Ok(())
    }

    /// The image that the requests before number `from` of the window leave, and the others. If something is copied it is of about so many
    /// pieces.
    fn from(&self, from: usize, pieces: u64) -> Result<(Recorded, Workload), String> {
        if self.copying.is_none() && self.start.is_stream() {
            return Err("a stream of VMDK is an image only when it was closed".into());
        }
        let kept: Vec<usize> = (from..self.window.requests.len()).collect();
        let all = self.before.iter().chain(&self.window.requests[..from]);
        let before: Vec<Request> = all.filter(|request| request.modifies()).copied().collect();
        can_be_done(&before)?;
        let workload = self.window.only(&kept);
        let image = self.start.after(before.into_iter(), Vec::new())?;
        let align = self.copying.map_or(0, |copying| copying.align).max(image.cluster());
        let asked = looked_at(&image, &workload, align)?;
        let more =
            self.copying.map_or(&[][..], |copying| copying.more(&asked, pieces > PIECES_FEW));
        let parts = joined(asked.into_iter().chain(more.iter().cloned()), image.size())?;
        let image = image.after(std::iter::empty(), parts.clone())?;
        let image = match self.copying {
            Some(copying) => copying.made(&image, &parts, pieces)?,
            None => image,
        };
        let size = workload.largest_size(image.size());
        let fits = |which: &usize| {
            let Request { offset, len, .. } = workload.requests[*which];
            offset.checked_add(len).is_some_and(|end| end <= size)
        };
        // What lay beyond the disk's end did nothing.
        let kept: Vec<usize> = (0..workload.requests.len()).filter(fits).collect();
        Ok((image, workload.only(&kept)))
    }
}

/// The parts of the disk that a workload goes to, in whole clusters of so many bytes.
fn looked_at(
    image: &Recorded,
    workload: &Workload,
    cluster: u64,
) -> Result<Vec<Range<u64>>, String> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    for request in &workload.requests {
        let Some(end) = request.offset.checked_add(request.len) else { continue };
        if request.kind == IoKind::Truncate && request.offset > image.size_max() {
            return Err(format!(
                "a disk of {} bytes is more than can be simulated",
                request.offset
            ));
        }
        if end.saturating_sub(request.offset) > NOISE_MAX {
            return Err(format!("a request of {} bytes is more than can be varied", request.len));
        }
        let Range { start, end } = reach(request, image.size());
        let end = end.checked_next_multiple_of(cluster).unwrap_or(end);
        let start = start / cluster * cluster;
        if start < end.min(image.size()) {
            parts.push(start..end);
        }
    }
    joined(parts.into_iter(), image.size())
}

/// Up the disk of `size` bytes, and apart from each other.
fn joined(parts: impl Iterator<Item = Range<u64>>, size: u64) -> Result<Vec<Range<u64>>, String> {
    let mut parts: Vec<Range<u64>> =
        parts.map(|part| part.start..part.end.min(size)).filter(|part| !part.is_empty()).collect();
    parts.sort_unstable_by_key(|part| part.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for part in parts {
        match joined.last_mut() {
            Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
            _ => joined.push(part),
        }
    }
    let bytes: u64 = joined.iter().map(|part| part.end - part.start).sum();
    if bytes > NOISE_MAX {
        return Err(format!(
            "the clusters that these requests go to have {bytes} bytes, {NOISE_MAX} at most are varied; take fewer requests"
        ));
    }
    Ok(joined)
}

/// Of more requests not every order is tried.
const EXHAUSTED_MAX: usize = 4;
/// Pieces of a copy where every order is tried, and where they are drawn.
const PIECES_FEW: u64 = 4;
const PIECES_MANY: u64 = 16;
/// Bytes from the first to the last of what is copied, and pieces that are marked of that, at most.
const SPAN_MAX: u64 = 1 << 40;
const MARKS_MAX: u64 = 1 << 20;
/// Times that a copy is paused, at most.
const PAUSES_MAX: u8 = 2;
/// One choice in so many is a fault, if one is possible.
const FAULT_IN: u64 = 8;
/// In one state of so many of a drawn run it is looked at what a crash would leave.
const CRASH_IN: u64 = 8;
/// Requests that are done before the window, at most, and their bytes.
const BEFORE_MAX: usize = 100_000;
const BEFORE_BYTES_MAX: u64 = 1 << 30;
