//! Random runs: long workloads at depth, on images and with faults drawn from a seed.
//!
//! The seed decides the image, the workload and every choice. Some kinds of requests, faults and
//! features are off altogether in a given run, so that what they would hide can show (Groce et al.,
//! "swarm testing"). Every run is made twice, and
//! what happened is compared: nothing may depend on anything but the seed.

use cowbell_formats::Format;
use cowbell_formats::parts::growth::Grow;

use crate::choose::{Chooser, Pct, Random};
use crate::clock::Stopwatch;
use crate::disk::splitmix;
use crate::explore::{Counts, Failure, run};
use crate::gate::{FAILURES_MAX, Report};
use crate::subject::Subject;
use crate::subjects::{CLUSTER, FILLED, Image, Layout, Medium, State};
use crate::trace::Trace;
use crate::workload::{Request, Workload};
use crate::world::{Base, Budget, CopyPlan, QUIET, Way};

/// Numbers drawn from a seed.
#[derive(Clone, Copy, Debug)]
struct Draw(u64);

impl Draw {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        splitmix(self.0) % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, among: &[T]) -> T {
        among[self.below(among.len() as u64) as usize]
    }
}

/// What a seed stands for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The image.
    pub image: Image,
    /// What may go wrong.
    pub budget: Budget,
    /// What guests ask for.
    pub workload: Workload,
    /// One choice in so many is a fault, if one is possible.
    pub fault_in: u64,
    /// Choices are made by [`Pct`] with so many turns, or at random.
    pub turns: Option<usize>,
}

impl Plan {
    fn chooser(&self, seed: u64) -> Box<dyn Chooser> {
        let seed = splitmix(!seed);
        match self.turns {
            Some(turns) => Box::new(Pct::new(seed, turns, self.fault_in)),
            None => Box::new(Random::new(seed, self.fault_in)),
        }
    }
}

/// The plan of a seed; `format` as given, or drawn.
pub fn plan(seed: u64, format: Option<Format>) -> Plan {
    let mut draw = Draw(splitmix(seed));
    let all = [Format::Raw, Format::Qed, Format::Qcow2, Format::Vmdk, Format::Vdi];
    let format = format.unwrap_or_else(|| draw.of(&all));
    let raw = format == Format::Raw;
    let qcow2 = format == Format::Qcow2;
    let state = draw.of(&[State::Cold, State::Warm, State::Zeros]);
    // What only qcow2 has: snapshots that share, clusters that are free again.
    let state =
        if qcow2 && draw.one_in(3) { draw.of(&[State::Shared, State::Holes]) } else { state };
    let layout = draw.of(&[Layout::Plain, Layout::Split, Layout::Lazy]);
    let image = Image {
        state: if raw { State::Cold } else { state },
        backing: !raw && draw.one_in(2) && format != Format::Vdi,
        layout: match format {
            Format::Vmdk => layout,
            Format::Vdi if draw.one_in(2) => Layout::Tight,
            _ => Layout::Plain,
        },
        cache: 1 + draw.below(3) as usize,
        buffers: 2 + draw.below(4) as usize,
        align: draw.of(&[1, 512, 512, 4096]),
        depth: draw.of(&[1, 2, 64, 64]),
        grow: draw.of(&[Grow::Truncate, Grow::Truncate, Grow::Allocate, Grow::Write]),
        ahead: draw.of(&[2, 4, 16]),
        can_zero: !draw.one_in(3),
        probed: raw && draw.one_in(2),
        ..Image::new(format)
    };
    let image = if qcow2 { of_qcow2(&mut draw, image) } else { image };
    let image = surroundings(&mut draw, image);
    let faults = draw.of(&[0, 0, 1, 2, 4]);
    let crashes = if draw.one_in(3) { 1 + draw.below(2) as u8 } else { 0 };
    // What a crash leaves of a stream is no disk.
    let is_stream = image.layout == Layout::Stream;
    let crashes = if is_stream { 0 } else { crashes };
    let ticks = draw.below(4) as u8;
    let stalls = draw.one_in(4);
    let breaks = draw.one_in(4);
    let mends = breaks && draw.one_in(2);
    // What was damaged ends well in few ways: it would hide all else.
    // What is not noticed of split images is told at `damage_scopes`.
    let is_told = !matches!(image.layout, Layout::Split | Layout::Stream);
    let damage = if is_told { draw.below(12) } else { 12 };
    let (lost_writes, bit_rots) = (u8::from(damage == 0), u8::from(damage == 1));
    let drains = if draw.one_in(4) { 1 + draw.below(2) as u8 } else { 0 };
    let abandons = u8::from(draw.one_in(6));
    // The disk's comings and goings. (Not of one that is damaged: it may not open again.)
    let is_whole = lost_writes + bit_rots == 0;
    let (closes, pauses) = (u8::from(is_whole && draw.one_in(8)), u8::from(draw.one_in(8)));
    let (quota, reopens) = (draw.one_in(12), is_whole && drains > 0 && draw.one_in(2));
    let lives = Budget { closes, pauses, quota, reopens, ..QUIET };
    let lasting = Budget { drains, abandons, lost_writes, bit_rots, ..lives };
    let budget = Budget { faults, ticks, crashes, stalls, breaks, mends, ..lasting };
    let mut kinds = Kinds::draw(&mut draw, qcow2);
    // Where a copy runs beside it the disk is small, for all of it is copied, and keeps its size.
    let has_another = is_whole && crashes == 0 && !image.filter && !is_stream;
    let copy = (has_another && draw.one_in(5)).then(|| copy(&mut draw, image));
    let (copy, image) = match copy {
        Some((plan, image)) => (Some(plan), image),
        None if has_another => (None, beside(&mut draw, image, faults == 0)),
        None => (None, image),
    };
    // Of version 2 a disk with snapshots keeps its size, too; and what lies on a device has no room.
    kinds.resizes &= copy.is_none() && !(image.old && image.state == State::Shared);
    kinds.resizes &= image.medium == Medium::File;
    // Which of two disks that are one is taken away is nobody's guess.
    let budget = match copy {
        // What both read from does not lie still because one of them does.
        None if image.shares => Budget { reopens: false, pauses: 0, ..budget },
        None if image.beside.is_some() => Budget { reopens: false, ..budget },
        Some(plan) if plan.mirrors => {
            Budget { copy, closes: 0, pauses: 0, quota: false, reopens: false, ..budget }
        }
        Some(_) => Budget { copy, reopens: false, ..budget },
        None => budget,
    };
    let count = if draw.one_in(8) { 20 + draw.below(20) } else { 4 + draw.below(8) };
    let mut size = image.size();
    let requests: Vec<Request> = match is_stream {
        true => of_stream(&mut draw, &image, count),
        false => (0..count).map(|_| request(&mut draw, &kinds, &image, &mut size)).collect(),
    };
    let fault_in = 4 + draw.below(12);
    let turns = draw.one_in(2).then(|| draw.below(4) as usize);
    Plan { image, budget, workload: Workload::new(requests), fault_in, turns }
}

/// What only qcow2 has, or may have: an old version, small clusters of which few are counted in one refcount block, little
/// room for what is given up, discards that are not passed on.
fn of_qcow2(draw: &mut Draw, image: Image) -> Image {
    let old = draw.one_in(6) && image.state != State::Zeros;
    let small = !old && draw.one_in(5);
    Image {
        old,
        cluster: if small { 512 } else { image.cluster },
        ahead: if small { draw.of(&[1, 8, 64]) } else { draw.of(&[1, image.ahead]) },
        frees: if draw.one_in(4) { 1 } else { image.frees },
        pass_discards: !draw.one_in(4),
        ..image
    }
}

/// What it lies on and below what: a device, a longer disk, a filter; a stream instead of a disk.
fn surroundings(draw: &mut Draw, image: Image) -> Image {
    if image.format == Format::Vmdk && draw.one_in(8) {
        // A grain of it that is there stays as it is.
        let state = if image.state == State::Zeros { State::Cold } else { image.state };
        return Image { layout: Layout::Stream, backing: false, state, ..image };
    }
    let long = image.format == Format::Qcow2 && image.backing && draw.one_in(4);
    let ahead = if long { image.ahead.max(8) } else { image.ahead };
    let image = Image { long, ahead, slow: draw.one_in(8), ..image };
    match draw.below(16) {
        0 | 1 if image.layout != Layout::Split => {
            // Where it may not be full there is room for all that can be asked for.
            let room = match image.format {
                Format::Qcow2 => 256,
                Format::Vdi => draw.of(&[4, 5, 256]),
                _ => 0,
            };
            // A disk that is a device has whole blocks.
            let align =
                if image.format == Format::Raw { image.align.min(512) } else { image.align };
            let image = Image { align, ..image };
            Image { medium: Medium::Device(room), ..image }
        }
        2 => Image { filter: true, ..image },
        _ => image,
    }
}

/// Another disk of the same engine, of which a guest makes use.
fn beside(draw: &mut Draw, image: Image, is_sound: bool) -> Image {
    if image.medium != Medium::File || !draw.one_in(6) {
        return image;
    }
    // What goes wrong in a file that both read goes wrong for both.
    let shares = is_sound && image.backing && image.format != Format::Vmdk && draw.one_in(2);
    let formats = [Format::Qed, Format::Qcow2];
    let beside = if shares { draw.of(&formats) } else { draw.of(&Format::ALL) };
    Image { beside: Some(beside), shares, ..image }
}

/// A copy, what may be done with it, and the image as one that is copied or copied to.
fn copy(draw: &mut Draw, image: Image) -> (CopyPlan, Image) {
    let image = copied(draw, image);
    let ways = [Way::In, Way::Out, Way::Out, if image.backing { Way::Up } else { Way::In }];
    let plan = CopyPlan::new(draw.of(&ways));
    let plan = CopyPlan {
        pauses: draw.below(3) as u8,
        cancels: draw.one_in(2),
        drains: draw.one_in(2),
        stops: draw.one_in(3),
        wide: draw.one_in(2),
        written: draw.one_in(4),
        ..plan
    };
    let beside = image.beside.unwrap_or(Format::Raw);
    // Nobody else has written to the other disk.
    let is_new = plan.way == Way::Out && beside != Format::Raw;
    let target = if plan.way == Way::Out { beside } else { image.format };
    let plan = CopyPlan {
        target_is_zero: is_new && draw.one_in(3),
        compressed: target == Format::Qcow2 && plan.way != Way::Up && draw.one_in(4),
        offload: image.format == Format::Raw && beside == Format::Raw && draw.one_in(3),
        ..plan
    };
    let plan = match plan.way {
        Way::In => CopyPlan { beside: draw.one_in(2), shown: draw.one_in(3), ..plan },
        Way::Out => {
            let of = draw.below(3);
            let gives_up = of == 1 && draw.one_in(3);
            CopyPlan { of_start: of == 1, mirrors: of == 2, gives_up, ..plan }
        }
        Way::Up => plan,
    };
    (plan, image)
}

fn copied(draw: &mut Draw, image: Image) -> Image {
    // Half a block at the end of a raw disk goes with what is discarded in front of it.
    let by = if image.format == Format::Raw { 4096 } else { u64::from(image.align).max(512) };
    let rest = draw.below(4096 / by) * by;
    let size = (2 + draw.below(4)) * image.cluster.max(CLUSTER) + rest;
    let beside = draw.of(&[Format::Raw, Format::Qcow2, image.format]);
    let state = if image.state == State::Zeros { State::Cold } else { image.state };
    let image = Image { medium: Medium::File, long: false, ..image };
    Image { size: Some(size), beside: Some(beside), state, ..image }
}

/// What guests ask for in a run: about half of what there is. Of what is asked for all the time, some
/// things are never seen.
#[derive(Clone, Debug)]
struct Kinds {
    among: Vec<Kind>,
    resizes: bool,
    /// Only whole sectors?
    whole_sectors: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Status,
    Write,
    WriteStable,
    WriteCompressed,
    Zero,
    Discard,
    Flush,
}

impl Kinds {
    fn draw(draw: &mut Draw, compresses: bool) -> Kinds {
        // How often each is asked for where it is asked for at all.
        let all = [
            (Kind::Read, 2),
            (Kind::Status, 1),
            (Kind::Write, 4),
            (Kind::WriteStable, 1),
            (Kind::Zero, 1),
            (Kind::Discard, 1),
            (Kind::Flush, 2),
        ];
        let mut among = Vec::new();
        for (kind, weight) in all {
            if draw.one_in(2) {
                among.extend([kind].repeat(weight));
            }
        }
        if compresses && draw.one_in(3) {
            among.extend([Kind::WriteCompressed; 2]);
        }
        if !among.iter().any(|kind| !matches!(kind, Kind::Read | Kind::Status | Kind::Flush)) {
            among.extend([Kind::Write; 4]);
        }
        Kinds { among, resizes: draw.one_in(2), whole_sectors: draw.one_in(2) }
    }
}

/// What may be asked of a stream: each grain is written once and whole.
fn of_stream(draw: &mut Draw, image: &Image, count: u64) -> Vec<Request> {
    let whole = image.cluster();
    let is_warm = image.state == State::Warm;
    let mut free: Vec<u64> =
        [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
            .into_iter()
            .filter(|place| !(is_warm && FILLED.contains(place)))
            .map(|(table, grain)| image.place(table, grain))
            .collect();
    let kinds =
        [Kind::Write, Kind::Write, Kind::WriteStable, Kind::Read, Kind::Status, Kind::Flush];
    let mut one = |draw: &mut Draw| match draw.of(&kinds) {
        kind @ (Kind::Write | Kind::WriteStable) if !free.is_empty() => {
            let at = free.remove(draw.below(free.len() as u64) as usize);
            // Two in a row at once, if the next is free.
            let next = free.iter().position(|&next| next == at + whole && draw.one_in(2));
            let len = if next.map(|next| free.remove(next)).is_some() { 2 * whole } else { whole };
            if kind == Kind::Write { Request::write(at, len) } else { Request::write_fua(at, len) }
        }
        Kind::Read => Request::read(image.place(draw.below(3), 0) + draw.below(2) * 512, 2 * whole),
        Kind::Status => Request::status(image.place(draw.below(3), 0), 2 * whole),
        _ => Request::flush(),
    };
    (0..count).map(|_| one(draw)).collect()
}

/// A request; `size` is the disk's by then.
fn request(draw: &mut Draw, kinds: &Kinds, image: &Image, size: &mut u64) -> Request {
    let cluster = image.cluster();
    if kinds.resizes && image.can_grow() && draw.one_in(6) {
        let unit = draw.of(&[512, cluster]);
        let by = unit * (1 + draw.below(6));
        *size = match image.can_shrink() && draw.one_in(2) {
            true => size.saturating_sub(by).max(cluster),
            false => *size + by,
        };
        return Request::truncate(*size);
    }
    let table = draw.below(3);
    let clusters = if table == 2 { 2 } else { 3 };
    let mut start = match image.size {
        Some(size) => draw.below(size.div_ceil(cluster)) * cluster,
        None => image.place(table, draw.below(clusters)),
    };
    if image.size.is_none() && draw.one_in(8) {
        // Across the border of two tables, or at the disk's end.
        let borders = [image.place(1, 0), image.place(2, 0), image.size()];
        start = draw.of(&borders) - cluster / 2;
    }
    let unit = draw.of(&[cluster, 512, 512, if kinds.whole_sectors { 512 } else { 100 }]);
    let offset = (start + draw.below(cluster / unit) * unit).min(*size - 1);
    let len = (unit * (1 + draw.below(2 * cluster / unit))).min(*size - offset);
    match draw.of(&kinds.among) {
        Kind::WriteCompressed => {
            let start = offset / cluster * cluster;
            Request::write_compressed(start, (len.div_ceil(cluster) * cluster).min(*size - start))
        }
        Kind::Read => Request::read(offset, len),
        Kind::Status => Request::status(offset, len),
        Kind::Write => Request::write(offset, len),
        Kind::WriteStable => Request::write_fua(offset, len),
        Kind::Zero => Request::zero(offset, len),
        Kind::Discard => Request::discard(offset, len),
        Kind::Flush => Request::flush(),
    }
}

/// Makes runs number `first` to `first + runs`, on `threads` threads.
pub fn random(first: u64, runs: u64, format: Option<Format>, threads: usize) -> Report {
    random_for(first, runs, format, threads, None)
}

/// The same, for at most `seconds`.
pub fn random_for(
    first: u64,
    runs: u64,
    format: Option<Format>,
    threads: usize,
    seconds: Option<f64>,
) -> Report {
    let watch = Stopwatch::start();
    let mut report = Report { title: "random".into(), threads, ..Report::default() };
    let share = |thread: usize| {
        let mut counts = Counts::default();
        let mut failures = Vec::new();
        for seed in (first..first.saturating_add(runs)).skip(thread).step_by(threads) {
            failures.extend(run_twice(seed, format, &mut counts).err().map(|trace| *trace));
            let is_late = seconds.is_some_and(|limit| watch.seconds() > limit);
            if failures.len() >= FAILURES_MAX || is_late {
                break;
            }
        }
        (counts, failures)
    };
    std::thread::scope(|scope| {
        let share = &share;
        let threads: Vec<_> = (0..threads).map(|i| scope.spawn(move || share(i))).collect();
        for thread in threads {
            let (counts, failures) = thread.join().expect("a run's panics are caught within");
            report.counts += counts;
            report.failures.extend(failures);
        }
    });
    report.complete = report.failures.len() < FAILURES_MAX;
    report.seconds = watch.seconds();
    report
}

/// One run in so many states looks at what a crash would leave.
const CRASH_IN: u64 = 8;

/// The run of a seed, once.
///
/// # Errors
///
/// Its trace, when it goes wrong.
pub fn run_once(seed: u64, format: Option<Format>) -> Result<(), Box<Trace>> {
    let plan = plan(seed, format);
    let Plan { image, budget, ref workload, .. } = plan;
    let trace = |failure: &Failure| Box::new(Trace::of(image, budget, workload, failure));
    let base = Base::new(image, workload.requests.len())
        .map_err(|verdict| trace(&Failure { verdict, path: Vec::new() }))?;
    let mut path = Vec::new();
    let mut chooser = plan.chooser(seed);
    let world = base.world(workload, budget);
    run(&world, &mut *chooser, CRASH_IN, &mut Counts::default(), &mut path)
        .map_err(|failure| trace(&failure))?;
    Ok(())
}

fn run_twice(seed: u64, format: Option<Format>, counts: &mut Counts) -> Result<(), Box<Trace>> {
    let plan = plan(seed, format);
    let Plan { image, budget, ref workload, .. } = plan;
    let fail = |failure: &Failure| {
        let mut trace = Trace::of(image, budget, workload, failure);
        let verdict = trace.verdict.take().unwrap_or_default();
        trace.verdict = Some(format!("seed {seed}: {verdict}"));
        Box::new(trace)
    };
    let base = Base::new(image, workload.requests.len())
        .map_err(|verdict| fail(&Failure { verdict, path: Vec::new() }))?;
    let world = base.world(workload, budget);
    let once = |crash_in: u64, counts: &mut Counts| {
        let mut path = Vec::new();
        let mut chooser = plan.chooser(seed);
        run(&world, &mut *chooser, crash_in, counts, &mut path)
            .map(|hash| (hash, path))
            .map_err(|failure| fail(&failure))
    };
    let (first, path) = once(CRASH_IN, counts)?;
    let (again, _) = once(0, &mut Counts::default())?;
    if first != again {
        let verdict = "the same seed led to two different runs".to_string();
        return Err(fail(&Failure { verdict, path }));
    }
    Ok(())
}
