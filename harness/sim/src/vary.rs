//! Variations of a real run: from its [record](cowbell_engine::record), other orders of what happened, faults and crashes.
//!
//! Of the run's last requests (or of those before some turn) a *window* is taken. What came before it is done first, one request
//! after the other, on a simulated disk which begins as the real one did: that makes an [image](Recorded) of tables without a guest's
//! bytes. From there the window is a [workload](crate::workload) like others. Its guest submits in the order of the record, and
//! who was submitted only when another had ended and was taken waits for that here, too; all else may go any way.
//!
//! First every order of the last few requests is tried, then the whole window in orders that are drawn from seeds.

use std::collections::BTreeMap;
use std::ops::Range;

use cowbell_engine::Asker;
use cowbell_engine::op::{OpKind, Target};
use cowbell_engine::ops::OpRecord;
use cowbell_engine::record::{Entry, Reader};
use cowbell_engine::step::{Driver, Io, IoKind};

use crate::choose::{Chooser, Pct, Random};
use crate::clock::Stopwatch;
use crate::disk::SECTOR;
use crate::explore::{Counts, Failure, Limit, exhaust, run};
use crate::gate::Report;
use crate::mutants::planted;
use crate::played::{Moment, Player, Verdict};
use crate::subject::Subject;
use crate::subjects::recorded::{NOISE_MAX, Parts, Recorded, reach};
use crate::trace::Trace;
use crate::workload::{REQUESTS_MAX, Request, Workload};
use crate::world::{Base, Budget, QUIET};

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
    /// Of this disk; `None`: of that which the last request went to.
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
    /// Of how many of its last requests every order was tried. 0: time ran out before.
    pub exhausted: usize,
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

/// Of a disk, all that it was asked until the window ends.
struct Story {
    disk: usize,
    asked: Vec<Asked>,
}

impl Story {
    /// As the record tells it. `tops`: the index of each disk's node.
    fn of(record: &[u8], tops: &[u32], how: &Variation) -> Result<Story, String> {
        let mut asked: Vec<(usize, Asked)> = Vec::new();
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
                Entry::Started { .. } => {
                    return Err("copies ran in it, which are not varied".into());
                }
                _ => {}
            }
        }
        let last = || asked.last().map(|(disk, _)| *disk);
        let disk = how.disk.or_else(last).ok_or("no request was submitted until then")?;
        if disk >= tops.len() {
            return Err(format!("it has no disk {disk}"));
        }
        let asked = asked.into_iter().filter(|(its, _)| *its == disk).map(|(_, asked)| asked);
        Ok(Story { disk, asked: asked.collect() })
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
    let Story { disk, asked } = Story::of(record, &tops, how)?;
    let first_file = sums(disks[..disk].iter().map(|disk| disk.files.len() as u32)).last();
    let count = how.requests.clamp(1, REQUESTS_MAX).min(asked.len());
    let begin = asked.len() - count;
    let (after, tables) = again(player, &asked[begin..])?;
    let mut parts = disks[disk].clone();
    learn(&mut parts, &tables, first_file.unwrap_or(0));
    let start = Recorded::new(parts)?;
    let mut window = Workload::new(asked[begin..].iter().map(|asked| asked.request));
    after.iter().enumerate().for_each(|(which, &others)| window.submit_after(which, others));
    let before: Vec<Request> = asked[..begin].iter().map(|asked| asked.request).collect();
    let (title, threads) = ("varied".to_string(), 1);
    let report = Report { title, threads, complete: true, ..Report::default() };
    let mut varied = Varied {
        disk,
        before: begin,
        window: window.clone(),
        exhausted: 0,
        report,
        drawn: 0,
        failed_seed: None,
    };
    let search = Search { start: &start, before: &before, window: &window, how, watch };
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

/// Does the run again until all of these have been submitted. Answers which of them had ended and been taken when each was, and
/// what was learnt of tables.
fn again<F, D: Driver>(
    player: &mut Player<'_, D, F>,
    window: &[Asked],
) -> Result<(Vec<u64>, Tables), String> {
    *player.tables() = Some(Tables::default());
    let mut after = Vec::with_capacity(window.len());
    let verdict = player.play(&mut |engine, moment| {
        let Some(next) = window.get(after.len()) else { return false };
        if matches!(moment, Moment::Submitted(_)) && engine.backend().done.requests == next.number {
            let in_flight = |asked: &Asked| {
                let is_it = |asker| asker == Asker::Guest(asked.number);
                engine.requests().any(|request| is_it(request.asker))
            };
            let taken = window[..after.len()].iter().enumerate();
            let taken = taken.filter(|(_, asked)| !in_flight(asked));
            after.push(taken.fold(0, |bits, (which, _)| bits | 1 << which));
        }
        after.len() < window.len()
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

struct Search<'a> {
    start: &'a Recorded,
    before: &'a [Request],
    window: &'a Workload,
    how: &'a Variation,
    watch: Stopwatch,
}

impl Search<'_> {
    fn run(&self, varied: &mut Varied) -> Result<(), String> {
        let Variation { faults, crashes, seed, runs, seconds, plant, .. } = *self.how;
        let budget = Budget { faults, crashes, ticks: 1, ..QUIET };
        let told = |image: &Recorded, workload: &Workload, failure: &Failure| Trace {
            plant,
            ..Trace::of(image.clone(), budget, workload, failure)
        };
        let all = self.window.requests.len();
        for last in 1..=all.min(EXHAUSTED_MAX) {
            let left = (seconds / 2.0 - self.watch.seconds()) * 1e3;
            if left < 1.0 {
                break;
            }
            let (image, workload) = self.from(all - last)?;
            let base = Base::new(image.clone(), workload.requests.len())?;
            let limit = Limit { millis: left as u64, ..Limit::default() };
            let outcome = planted(plant, || exhaust(&base.world(&workload, budget), limit));
            match outcome {
                Ok(counts) => {
                    varied.report.counts += counts;
                    if counts.cut_short > 0 {
                        break;
                    }
                    varied.exhausted = last;
                }
                Err(failure) => {
                    varied.report.failures.push(told(&image, &workload, &failure));
                    return Ok(());
                }
            }
        }
        let (image, workload) = self.from(0)?;
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

    /// The image that the requests before number `from` of the window leave, and the others.
    fn from(&self, from: usize) -> Result<(Recorded, Workload), String> {
        let kept: Vec<usize> = (from..self.window.requests.len()).collect();
        let all = self.before.iter().chain(&self.window.requests[..from]);
        let before: Vec<Request> = all.filter(|request| request.modifies()).copied().collect();
        let bytes = before.iter().map(|request| request.len);
        let bytes = bytes.fold(0_u64, u64::saturating_add);
        if before.len() > BEFORE_MAX || bytes > BEFORE_BYTES_MAX {
            return Err(format!(
                "{} requests of {bytes} bytes come before those that are varied: more than can be done again ({BEFORE_MAX}, {BEFORE_BYTES_MAX} bytes); name an earlier turn",
                before.len()
            ));
        }
        let workload = self.window.only(&kept);
        let image = self.start.after(before.into_iter(), Vec::new())?;
        let looked_at = looked_at(&image, &workload)?;
        let image = image.after(std::iter::empty(), looked_at)?;
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

/// The parts of the disk that a workload goes to, in whole clusters.
fn looked_at(image: &Recorded, workload: &Workload) -> Result<Vec<Range<u64>>, String> {
    let (size, cluster) = (image.size(), image.cluster());
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
        let Range { start, end } = reach(request, size);
        let end = end.checked_next_multiple_of(cluster).unwrap_or(end).min(size);
        let start = start / cluster * cluster;
        if start < end {
            parts.push(start..end);
        }
    }
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
/// One choice in so many is a fault, if one is possible.
const FAULT_IN: u64 = 8;
/// In one state of so many of a drawn run it is looked at what a crash would leave.
const CRASH_IN: u64 = 8;
/// Requests that are done before the window, at most, and their bytes.
const BEFORE_MAX: usize = 100_000;
const BEFORE_BYTES_MAX: u64 = 1 << 30;
