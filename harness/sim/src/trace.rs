//! Traces: a run as text, to be run again without the seed that led to it.
//!
//! ```text
//! cowbell trace 1
//! image format=qed state=cold …
//! budget faults=1 ticks=1 crashes=0 stalls=false
//! request write 0x0+0x400
//! request flush
//! after 0
//! choice submit 0 # write 0x0+0x400
//! choice end 0.0 ok # Write { fua: false } f0 0x0+0x200
//! verdict after a crash: invalid L2 entry
//! ```
//!
//! `after` belongs to the request above it: its guest submits it only when those have ended; what is missing
//! in the list may be in flight still. What follows a `#` is for people. A choice that is not possible when the trace is run again is
//! left out, and where the trace ends the oldest op ends well: so old traces stay useful.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::choose::{Choice, Replay};
use crate::clock::Stopwatch;
use crate::explore::{Asked, Counts, Failure, Limit, exhaust, run, run_watched};
use crate::gate::Report;
use crate::mutants::{MUTANTS, planted};
use crate::recorder::Recorder;
use crate::subject::Subject;
use crate::subjects::Image;
use crate::timeline::Timeline;
use crate::workload::{REQUESTS_MAX, Request, Workload, number};
use crate::world::{Base, Budget, CopyPlan, Way, World};

/// Tries all that can happen to an image in each of some workloads: every order of completions, every fault that the
/// budget allows, every crash.
///
/// # Errors
///
/// The trace of the first failure.
pub fn search<S: Subject>(
    image: &S,
    budget: Budget,
    workloads: &[Workload],
) -> Result<Counts, Box<Trace<S>>> {
    let trace = |workload: &Workload, failure: &Failure| {
        Box::new(Trace::of(image.clone(), budget, workload, failure))
    };
    let most = workloads.iter().map(|workload| workload.requests.len()).max().unwrap_or(0);
    let base = Base::new(image.clone(), most)
        .map_err(|verdict| trace(&Workload::default(), &Failure { verdict, path: Vec::new() }))?;
    let mut counts = Counts::default();
    for workload in workloads {
        let outcome = exhaust(&base.world(workload, budget), Limit::default());
        counts += outcome.map_err(|failure| trace(workload, &failure))?;
    }
    Ok(counts)
}

/// A run, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace<S = Image> {
    /// The image that was run.
    pub image: S,
    /// What was allowed to happen.
    pub budget: Budget,
    /// What guests asked for.
    pub workload: Workload,
    /// What happened.
    pub choices: Vec<Choice>,
    /// The [planted defect](crate::mutants) that it shows, if it is one of those.
    pub plant: Option<&'static str>,
    /// What went wrong, if anything did.
    pub verdict: Option<String>,
}

impl<S: Subject> Trace<S> {
    /// The trace of a failure.
    pub fn of(image: S, budget: Budget, workload: &Workload, failure: &Failure) -> Trace<S> {
        Trace {
            image,
            budget,
            workload: workload.clone(),
            choices: failure.path.clone(),
            plant: None,
            verdict: Some(failure.verdict.clone()),
        }
    }

    /// The same, failing so.
    pub fn failing(&self, failure: &Failure) -> Trace<S> {
        let (choices, verdict) = (failure.path.clone(), Some(failure.verdict.clone()));
        Trace { choices, verdict, ..self.clone() }
    }

    /// The world that it begins in.
    ///
    /// # Errors
    ///
    /// When the image cannot be made.
    pub fn world(&self) -> Result<World<S>, String> {
        let base = Base::new(self.image.clone(), self.workload.requests.len())?;
        Ok(base.world(&self.workload, self.budget))
    }

    /// Runs it again, looking at every crash on the way.
    ///
    /// # Errors
    ///
    /// What went wrong this time.
    pub fn replay(&self) -> Result<Counts, Box<Failure>> {
        let broken = |verdict| Box::new(Failure { verdict, path: Vec::new() });
        let world = self.world().map_err(broken)?;
        let mut counts = Counts::default();
        let mut path = Vec::new();
        let mut chooser = Replay::new(self.choices.iter().copied());
        planted(self.plant, || run(&world, &mut chooser, 1, &mut counts, &mut path))?;
        Ok(counts)
    }

    /// Runs it again, looking at every crash on the way, and notes all that happens.
    ///
    /// # Errors
    ///
    /// When the image cannot be made. What goes wrong in the run is in the timeline.
    pub fn timeline(&self) -> Result<Timeline, String> {
        self.timeline_asking(true)
    }

    /// The same; `calm`: it fails, too, where all would not end well if faults were over.
    pub(crate) fn timeline_asking(&self, calm: bool) -> Result<Timeline, String> {
        let asked = Asked { crash_in: 1, calm };
        let world = self.world()?;
        let mut recorder = Recorder::new(self.title(), self.about(), &world);
        let mut chooser = Replay::new(self.choices.iter().copied());
        let (mut counts, mut path) = (Counts::default(), Vec::new());
        // A failure is told to the recorder, too.
        let _ = planted(self.plant, || {
            run_watched(&world, &mut chooser, asked, &mut counts, &mut path, &mut recorder)
        });
        let mut timeline = recorder.finish();
        (timeline.recorded, timeline.missed) = (self.verdict.clone(), chooser.missed);
        Ok(timeline)
    }

    fn title(&self) -> String {
        let count = self.workload.requests.len();
        let requests = match count {
            1 => format!("1 request ({})", self.workload),
            2..=TITLE_REQUESTS => format!("{count} requests ({})", self.workload),
            _ => format!("{count} requests"),
        };
        let copy = self.budget.copy.map_or("", |plan| match plan.way {
            Way::In => " and a copy of the disk beside it into it",
            Way::Out => " and a copy of it to the disk beside it",
            Way::Up => " and a copy of what it lies on into it",
        });
        let (files, still) = (self.image.files().len(), self.image.still_files());
        let list = |files: Range<usize>| {
            let names: Vec<String> = files.map(|file| format!("f{file}")).collect();
            names.join(", ")
        };
        let over = if still > 0 { format!(", over {}", list(0..still)) } else { String::new() };
        let files = list(still..files);
        format!("{requests} to {} on a simulated disk ({files}{over}){copy}", self.image.name())
    }

    fn about(&self) -> Vec<String> {
        let mut lines = vec![format!("image {}", self.image.about())];
        let requests = self.workload.requests.iter().enumerate();
        lines.extend(requests.map(|(which, request)| format!("request {which}: {request}")));
        lines
    }

    /// The text, with each choice explained by running it once more.
    pub fn explained(&self) -> String {
        self.explained_of(&self.image.text())
    }

    /// The same for people: of the image only what they want to know.
    pub fn shown(&self) -> String {
        self.explained_of(&self.image.about())
    }

    fn explained_of(&self, image: &str) -> String {
        let mut lines = self.head(image);
        let mut world = self.world().ok();
        planted(self.plant, || {
            for choice in &self.choices {
                let what = world.as_ref().map_or(String::new(), |world| world.describe(*choice));
                lines.push(format!("choice {choice} # {what}"));
                world = world.take().and_then(|world| next(world, *choice));
            }
        });
        lines.extend(self.tail());
        lines.join("\n") + "\n"
    }

    fn head(&self, image: &str) -> Vec<String> {
        let Budget { faults, ticks, crashes, drains, stalls, reopens, breaks, mends, .. } =
            self.budget;
        let Budget { closes, pauses, quota, abandons, .. } = self.budget;
        let mut more = String::new();
        let counts = [("drains", drains), ("closes", closes), ("pauses", pauses)];
        let Budget { lost_writes, bit_rots, .. } = self.budget;
        let silent = [("lost-writes", lost_writes), ("bit-rots", bit_rots)];
        for (key, count) in counts.into_iter().chain([("abandons", abandons)]).chain(silent) {
            more += &if count > 0 { format!(" {key}={count}") } else { String::new() };
        }
        let set = [("reopens", reopens), ("breaks", breaks), ("mends", mends), ("quota", quota)];
        for (key, set) in set {
            more += &if set { format!(" {key}=true") } else { String::new() };
        }
        if let Some(plan) = self.budget.copy {
            let CopyPlan { way, target_is_zero, pauses, cancels, drains, beside, .. } = plan;
            let way = match way {
                Way::In => "in",
                Way::Out => "out",
                Way::Up => "up",
            };
            more += &format!(" copy={way}");
            let set = [
                ("zero", target_is_zero),
                ("cancels", cancels),
                ("drains", drains),
                ("beside", beside),
                ("of-start", plan.of_start),
                ("gives-up", plan.gives_up),
                ("mirrors", plan.mirrors),
                ("stops", plan.stops),
                ("offload", plan.offload),
                ("shown", plan.shown),
                ("wide", plan.wide),
                ("compressed", plan.compressed),
                ("written", plan.written),
            ];
            for (key, set) in set {
                more += &if set { format!(" copy-{key}=true") } else { String::new() };
            }
            more += &if pauses > 0 { format!(" copy-pauses={pauses}") } else { String::new() };
        }
        let mut lines = vec![
            MAGIC.to_string(),
            format!("image {image}"),
            format!("budget faults={faults} ticks={ticks} crashes={crashes} stalls={stalls}{more}"),
        ];
        lines.extend(self.plant.map(|name| format!("plant {name}")));
        for (which, request) in self.workload.requests.iter().enumerate() {
            lines.push(format!("request {request}"));
            let others = self.workload.waits_for(which);
            let others = (0..which).filter(|other| others >> other & 1 == 1);
            let others: Vec<String> = others.map(|other| other.to_string()).collect();
            if !others.is_empty() {
                lines.push(format!("after {}", others.join(" ")));
            }
        }
        lines
    }

    fn tail(&self) -> Option<String> {
        let first = self.verdict.as_ref()?.lines().next().unwrap_or_default();
        Some(format!("verdict {}", first.replace('#', "no.")))
    }
}

impl<S: Subject> Trace<S> {
    /// Runs it again and says what came of it, as other runs do.
    pub fn report(&self) -> Report<S> {
        let watch = Stopwatch::start();
        let mut report = Report { title: "replayed".into(), threads: 1, ..Report::default() };
        report.complete = true;
        match self.replay() {
            Ok(counts) => report.counts = counts,
            Err(failure) => report.failures.push(self.failing(&failure)),
        }
        report.seconds = watch.seconds();
        report
    }
}

/// The world after a choice; `None` when that fails.
fn next<S: Subject>(mut world: World<S>, choice: Choice) -> Option<World<S>> {
    let mut possible = Vec::new();
    world.choices(&mut possible);
    if !possible.contains(&choice) {
        return Some(world);
    }
    crate::explore::quietly(|| world.apply(choice).map(|()| world)).ok()
}

const MAGIC: &str = "cowbell trace 1";

impl<S: Subject> fmt::Display for Trace<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = self.head(&self.image.text());
        lines.extend(self.choices.iter().map(|choice| format!("choice {choice}")));
        lines.extend(self.tail());
        writeln!(f, "{}", lines.join("\n"))
    }
}

impl<S: Subject + FromStr<Err = String>> FromStr for Trace<S> {
    type Err = String;

    fn from_str(text: &str) -> Result<Trace<S>, String> {
        let mut lines = text.lines();
        if lines.next().map(str::trim) != Some(MAGIC) {
            return Err(format!("not a trace: the first line is not '{MAGIC}'"));
        }
        let (mut image, mut plant) = (None, None);
        let mut budget = Budget::default();
        let (mut requests, mut choices, mut verdict) = (Vec::new(), Vec::new(), None);
        let mut waits = Vec::new();
        for (at, line) in lines.enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            let take: Result<(), String> = match word {
                "image" => rest.parse().map(|parsed| image = Some(parsed)),
                "budget" => parse_budget(rest).map(|parsed| budget = parsed),
                "plant" => match MUTANTS.iter().find(|mutant| mutant.name == rest) {
                    Some(mutant) => {
                        plant = Some(mutant.name);
                        Ok(())
                    }
                    None => Err(format!("'{rest}' is no planted defect")),
                },
                "request" => rest.parse::<Request>().map(|request| requests.push(request)),
                "after" => others(rest).map(|others| waits.push((requests.len(), others))),
                "choice" => rest.parse::<Choice>().map(|choice| choices.push(choice)),
                "verdict" => {
                    verdict = Some(rest.to_string());
                    Ok(())
                }
                _ => Err(format!("'{word}' begins no line of a trace")),
            };
            take.map_err(|why| format!("line {}: {why}", at + 2))?;
        }
        if requests.len() > REQUESTS_MAX {
            return Err(format!("more than {REQUESTS_MAX} requests"));
        }
        let image: S = image.ok_or("the trace names no image")?;
        let is_between = budget.copy.is_some_and(|plan| plan.way != Way::Up);
        if is_between && image.beside().is_none() {
            return Err("a copy between two disks, and there is one".into());
        }
        let mut workload = Workload::new(requests);
        for (behind, others) in waits {
            let which = behind.checked_sub(1).ok_or("'after' comes before all requests")?;
            workload.submit_after(which, others);
        }
        let size = workload.largest_size(image.size());
        if size > image.size_max() {
            return Err(format!("{size} bytes are too many"));
        }
        if let Some(bad) = workload.requests.iter().find(|request| !fits(request, size)) {
            return Err(format!("'{bad}' does not fit the image's {size} bytes"));
        }
        Ok(Trace { image, budget, workload, choices, plant, verdict })
    }
}

/// So many requests a title names.
const TITLE_REQUESTS: usize = 4;

/// Numbers of requests, as bits.
fn others(text: &str) -> Result<u64, String> {
    text.split_whitespace().try_fold(0, |bits, word| match word.parse::<usize>() {
        Ok(which) if which < REQUESTS_MAX => Ok(bits | 1 << which),
        _ => Err(format!("'{word}' is no request's number")),
    })
}

fn fits(request: &Request, size: u64) -> bool {
    request.offset.checked_add(request.len).is_some_and(|end| end <= size)
}

fn parse_budget(text: &str) -> Result<Budget, String> {
    let mut budget = Budget::default();
    for word in text.split_whitespace() {
        let (key, value) = word.split_once('=').ok_or_else(|| format!("'{word}' has no ="))?;
        let small = || number(value)?.try_into().map_err(|_| format!("{value} is too many"));
        let mut copy = budget.copy.unwrap_or(CopyPlan::new(Way::In));
        if key.starts_with("copy") {
            match key {
                "copy" if value == "in" => copy.way = Way::In,
                "copy" if value == "out" => copy.way = Way::Out,
                "copy" if value == "up" => copy.way = Way::Up,
                "copy-zero" => copy.target_is_zero = value == "true",
                "copy-cancels" => copy.cancels = value == "true",
                "copy-drains" => copy.drains = value == "true",
                "copy-of-start" => copy.of_start = value == "true",
                "copy-mirrors" => copy.mirrors = value == "true",
                "copy-stops" => copy.stops = value == "true",
                "copy-offload" => copy.offload = value == "true",
                "copy-wide" => copy.wide = value == "true",
                "copy-compressed" => copy.compressed = value == "true",
                "copy-written" => copy.written = value == "true",
                "copy-shown" => copy.shown = value == "true",
                "copy-gives-up" => copy.gives_up = value == "true",
                "copy-beside" => copy.beside = value == "true",
                "copy-pauses" => copy.pauses = small()?,
                _ => return Err(format!("'{word}' is no part of a copy")),
            }
            budget.copy = Some(copy);
            continue;
        }
        match key {
            "faults" => budget.faults = small()?,
            "ticks" => budget.ticks = small()?,
            "crashes" => budget.crashes = small()?,
            "drains" => budget.drains = small()?,
            "closes" => budget.closes = small()?,
            "pauses" => budget.pauses = small()?,
            "abandons" => budget.abandons = small()?,
            "lost-writes" => budget.lost_writes = small()?,
            "bit-rots" => budget.bit_rots = small()?,
            "quota" => budget.quota = value == "true",
            "breaks" => budget.breaks = value == "true",
            "mends" => budget.mends = value == "true",
            "reopens" => budget.reopens = value == "true",
            "stalls" => budget.stalls = value == "true",
            _ => return Err(format!("'{key}' is no part of a budget")),
        }
    }
    Ok(budget)
}
