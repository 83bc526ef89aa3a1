//! `sim`: the simulator. What it finds is written as traces that `sim replay` runs again.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cowbell_engine::mutants::ARE_PLANTED;
use cowbell_formats::Format;
use cowbell_sim::cause::{STATES, cause};
use cowbell_sim::gate::{Report, explore, gate_scopes_of, scopes};
use cowbell_sim::latencies::latencies;
use cowbell_sim::mutants::hunt_all;
use cowbell_sim::published;
use cowbell_sim::random::random_for;
use cowbell_sim::resumed::{Extent, Outcome, State};
use cowbell_sim::shrink::shrink;
use cowbell_sim::subject::Subject;
use cowbell_sim::subjects::Image;
use cowbell_sim::subjects::recorded::{Recorded, WORD};
use cowbell_sim::trace::Trace;

use crate::fail::Fail;
use crate::form::Form;
use crate::import;
use crate::out::{Out, to_file};

/// The options of `sim`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Try every order of completions, every fault, every crash of small workloads
    Explore {
        /// raw, qed, qcow2 or vmdk; all if not said
        #[arg(short, long, value_name = "FMT")]
        format: Option<String>,
        /// Requests in a workload
        #[arg(long, default_value = "2", value_parser = clap::value_parser!(u8).range(1..=3))]
        ops: u8,
        /// Faults in a run, at most
        #[arg(long, default_value = "1", value_parser = clap::value_parser!(u8).range(0..=2))]
        faults: u8,
        /// The scopes that every change must pass, and nothing else
        #[arg(long, conflicts_with_all = ["ops", "faults"])]
        gate: bool,
        /// Say what was done on each kind of image
        #[arg(long)]
        scopes: bool,
        /// Only images that say this of themselves, such as `state=shared`
        #[arg(long, value_name = "TEXT", default_value = "")]
        images: String,
        /// Stop after so long: seconds, or with s, m or h behind
        #[arg(long, visible_alias = "seconds", value_parser = duration)]
        time: Option<f64>,
        #[command(flatten)]
        how: How,
    },
    /// Longer workloads, one order each, chosen by seed; each run twice and compared
    Random {
        /// raw, qed, qcow2 or vmdk; all if not said
        #[arg(short, long, value_name = "FMT")]
        format: Option<String>,
        /// The first seed
        #[arg(long, default_value = "0")]
        seed: u64,
        /// How many seeds
        #[arg(long, default_value = "1000")]
        runs: u64,
        /// As many as there is time for: seconds, or with s, m or h behind
        #[arg(long, conflicts_with = "runs", value_parser = duration)]
        time: Option<f64>,
        /// Go on where the run that kept this file ended: it says which seed is next, and has what failed. That is
        /// tried again first: what does not fail any more is mended, what does is known, the rest is new
        #[arg(long, value_name = "FILE", conflicts_with = "seed")]
        state: Option<PathBuf>,
        #[command(flatten)]
        how: How,
    },
    /// Run a trace again
    Replay {
        /// The trace
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Write a page for a browser, which shows what happened
        #[arg(long, value_name = "OUT")]
        html: Option<PathBuf>,
        /// Write what happened as a trace that Perfetto opens
        #[arg(long, value_name = "OUT")]
        perfetto: Option<PathBuf>,
    },
    /// Find the choice of a failure after which nothing could save it, and the nearest run that ends well
    Cause {
        /// The trace
        file: PathBuf,
        /// Try so many states at most, and draw runs if there are more
        #[arg(long, value_name = "N", default_value_t = STATES)]
        states: u64,
        /// Write a page for a browser, which shows it
        #[arg(long, value_name = "OUT")]
        html: Option<PathBuf>,
    },
    /// Crash under another program, whose writes were logged, in every state, and let a command look at what is
    /// left. Exit code 1: something was wrong; 2: an error
    Import(import::Args),
    /// Make the trace of a failure smaller, as long as it fails in the same way
    Shrink {
        /// The trace
        file: PathBuf,
    },
    /// How often requests on a new image wait for the device, one time after the other
    Latencies {
        /// raw, qed, qcow2 or vmdk; all if not said
        #[arg(short, long, value_name = "FMT")]
        format: Option<String>,
    },
    /// Plant defects, one at a time, and find each (a release has none)
    Mutants {
        /// Only those whose name contains this
        #[arg(long, default_value = "")]
        only: String,
        /// Give one up after so long
        #[arg(long, default_value = "30")]
        seconds: f64,
        /// Write the trace of each, made smaller, into this folder
        #[arg(long, value_name = "DIR")]
        keep: Option<PathBuf>,
        #[command(flatten)]
        how: How,
    },
    /// Find defects of other engines that were published, planted in ours, each from a workload like its
    /// report's; make them smaller, and explain them (a release has none)
    Published {
        /// Only those whose source or name contains this
        #[arg(long, default_value = "")]
        only: String,
        /// Give one up after so long
        #[arg(long, default_value = "60")]
        seconds: f64,
        /// Write each one's trace and page into this folder
        #[arg(long, value_name = "DIR")]
        keep: Option<PathBuf>,
    },
}

#[derive(Debug, clap::Args)]
struct How {
    /// Threads
    #[arg(
        long,
        visible_alias = "cores",
        default_value = "2",
        value_parser = clap::value_parser!(u8).range(1..=64)
    )]
    threads: u8,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Where traces of failures go
    #[arg(long, value_name = "DIR", default_value = ".")]
    traces: PathBuf,
}

/// Runs it.
pub fn run(args: &Args) -> Result<u8, Fail> {
    match &args.what {
        What::Latencies { format } => {
            let mut out = Out::new(false);
            for format in formats(format.as_deref())? {
                writeln!(out, "{format}")?;
                for waited in latencies(Image::ample(format)).map_err(Fail::other)? {
                    writeln!(out, "  {:<26} {}", waited.what, waited.ops.len())?;
                    for ops in waited.ops {
                        writeln!(out, "    {ops}")?;
                    }
                }
            }
            out.flush()?;
            Ok(0)
        }
        What::Explore { format, ops, faults, gate, scopes: each, images, time, how } => {
            let of = |format| match gate {
                true => gate_scopes_of(format),
                false => scopes(format, usize::from(*ops), *faults),
            };
            let formats = formats(format.as_deref())?;
            let mut scopes: Vec<_> = formats.into_iter().flat_map(of).collect();
            scopes.retain(|scope| scope.image.to_string().contains(images));
            let report = explore(&scopes, usize::from(how.threads), *time);
            if *each && !how.json {
                let mut out = Out::new(false);
                for scope in &report.scopes {
                    writeln!(out, "{scope}")?;
                }
                out.flush()?;
            }
            say(&report, how.json, &how.traces)
        }
        What::Random { format, seed, runs, time, state, how } => {
            let format = match format.as_deref() {
                Some(name) => formats(Some(name))?.first().copied(),
                None => None,
            };
            let runs = if time.is_some() { u64::MAX } else { *runs };
            if let Some(file) = state {
                let threads = usize::from(how.threads);
                return go_on(file, format, Extent { runs, seconds: *time, threads }, how);
            }
            let report = random_for(*seed, runs, format, usize::from(how.threads), *time);
            say(&report, how.json, &how.traces)
        }
        What::Replay { file, json, html, perfetto } => {
            let (html, perfetto) = (html.as_deref(), perfetto.as_deref());
            match trace_in(file)? {
                Any::Made(trace) => replay(&trace, file, *json, html, perfetto),
                Any::Recorded(trace) => replay(&trace, file, *json, html, perfetto),
            }
        }
        What::Cause { file, states, html } => match trace_in(file)? {
            Any::Made(trace) => explain(&trace, file, *states, html.as_deref()),
            Any::Recorded(trace) => explain(&trace, file, *states, html.as_deref()),
        },
        What::Import(args) => import::run(args),
        What::Shrink { file } => match trace_in(file)? {
            Any::Made(trace) => make_smaller(&trace, file),
            Any::Recorded(trace) => make_smaller(&trace, file),
        },
        What::Published { only, seconds, keep } => published(only, *seconds, keep.as_deref()),
        What::Mutants { only, seconds, keep, how } => {
            let score = hunt_all(only, usize::from(how.threads), *seconds).map_err(Fail::other)?;
            let mut out = Out::new(false);
            if how.json {
                writeln!(out, "{}", score.to_json())?;
            } else {
                writeln!(out, "{score}")?;
            }
            out.flush()?;
            for fate in score.fates.iter().filter(|_| keep.is_some()) {
                let small = fate.killed.as_ref().and_then(|(_, trace)| shrink(trace));
                if let (Some(folder), Some(trace)) = (keep, small) {
                    let path = folder.join(format!("{}.trace", fate.mutant.name));
                    to_file(&path, trace.explained())?;
                }
            }
            Ok(u8::from(!score.is_good()))
        }
    }
}

fn published(only: &str, seconds: f64, keep: Option<&Path>) -> Result<u8, Fail> {
    if !ARE_PLANTED {
        return Err(Fail::other("this is a release: no defects are planted"));
    }
    let mut out = Out::new(false);
    let mut all_found = true;
    let wanted = published::all()
        .into_iter()
        .filter(|one| one.source.contains(only) || one.mutant.contains(only));
    for one in wanted {
        let name = one.mutant;
        let found = match published::hunt(one, seconds) {
            Ok(found) => found,
            Err(what) => {
                writeln!(out, "{what}\n")?;
                all_found = false;
                continue;
            }
        };
        writeln!(out, "{found}")?;
        if let Some(folder) = keep {
            to_file(&folder.join(format!("{name}.trace")), found.trace.explained())?;
            Form::Page.draw(&found.cause.failing, &folder.join(format!("{name}.html")))?;
        }
    }
    out.flush()?;
    Ok(u8::from(!all_found))
}

fn go_on(file: &Path, format: Option<Format>, extent: Extent, how: &How) -> Result<u8, Fail> {
    let at = |why: io::Error| Fail::at(file, why);
    let mut state = match fs::read_to_string(file) {
        Ok(text) => text.parse().map_err(|what: String| Fail::at(file, what))?,
        Err(why) if why.kind() == io::ErrorKind::NotFound => State::default(),
        Err(why) => return Err(at(why)),
    };
    // Who is killed leaves the state before, or this one.
    let mut beside = file.as_os_str().to_owned();
    beside.push(".new");
    let mut keep = |state: &State| {
        fs::write(&beside, state.to_string()).and_then(|()| fs::rename(&beside, file)).map_err(at)
    };
    let (report, outcome) = state.go_on(format, extent, &mut keep)?;
    if !how.json {
        let mut out = Out::new(false);
        for (what, traces) in [("mended", &outcome.mended), ("known", &outcome.known)] {
            for trace in traces {
                writeln!(out, "{what}: {}", trace.verdict.as_deref().unwrap_or_default())?;
            }
        }
        let Outcome { new, known, mended } = &outcome;
        let (new, known, mended) = (new.len(), known.len(), mended.len());
        writeln!(
            out,
            "next seed {}; failures: {new} new, {known} known, {mended} mended",
            state.next
        )?;
        out.flush()?;
    }
    let code = say(&report, how.json, &how.traces)?;
    Ok(code.max(u8::from(!outcome.known.is_empty())))
}

/// `90`, `90s`, `10m` or `8h`, in seconds.
pub fn duration(text: &str) -> Result<f64, String> {
    let units = [("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let unit = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)));
    let (number, unit) = unit.unwrap_or((text, 1.0));
    let seconds = number.parse::<f64>().ok().map(|number| number * unit);
    seconds.filter(|seconds| seconds.is_finite() && *seconds >= 0.0).ok_or_else(|| {
        format!("'{text}' is no time: a number of seconds, or with s, m or h behind")
    })
}

fn replay<S: Subject>(
    trace: &Trace<S>,
    file: &Path,
    json: bool,
    html: Option<&Path>,
    perfetto: Option<&Path>,
) -> Result<u8, Fail> {
    if html.is_some() || perfetto.is_some() {
        let timeline = trace.timeline().map_err(|what| Fail::at(file, what))?;
        html.iter().try_for_each(|path| Form::Page.draw(&timeline, path))?;
        perfetto.iter().try_for_each(|path| Form::Perfetto.draw(&timeline, path))?;
    }
    say(&trace.clone().report(), json, Path::new("."))
}

fn explain<S: Subject>(
    trace: &Trace<S>,
    file: &Path,
    states: u64,
    html: Option<&Path>,
) -> Result<u8, Fail> {
    let cause = cause(trace, states).map_err(|what| Fail::at(file, what))?;
    if let Some(path) = html {
        Form::Page.draw(&cause.failing, path)?;
    }
    let mut out = Out::new(false);
    write!(out, "{cause}")?;
    out.flush()?;
    Ok(0)
}

fn make_smaller<S: Subject + PartialEq>(trace: &Trace<S>, file: &Path) -> Result<u8, Fail> {
    let small = shrink(trace).ok_or_else(|| Fail::at(file, "this trace does not fail"))?;
    let mut out = Out::new(false);
    write!(out, "{}", small.explained())?;
    out.flush()?;
    Ok(0)
}

/// A trace of an image that the simulator makes, or of a real run's.
enum Any {
    Made(Trace),
    Recorded(Trace<Recorded>),
}

fn trace_in(file: &Path) -> Result<Any, Fail> {
    let text = fs::read_to_string(file).map_err(|error| Fail::at(file, error))?;
    let at = |what: String| Fail::at(file, what);
    let is_recorded = |line: &str| line.trim().starts_with(&format!("image {WORD} "));
    let trace = match text.lines().any(is_recorded) {
        true => Any::Recorded(text.parse().map_err(at)?),
        false => Any::Made(text.parse().map_err(at)?),
    };
    let plant = match &trace {
        Any::Made(trace) => trace.plant,
        Any::Recorded(trace) => trace.plant,
    };
    match plant.filter(|_| !ARE_PLANTED) {
        Some(name) => {
            Err(at(format!("its defect '{name}' is planted only in a build with debug assertions")))
        }
        None => Ok(trace),
    }
}

fn formats(name: Option<&str>) -> Result<Vec<Format>, Fail> {
    match name {
        None => Ok(Format::ALL.to_vec()),
        Some(name) => match Format::from_name(name) {
            Some(format) => Ok(vec![format]),
            None => Err(Fail::other(format!("Unknown format '{name}'"))),
        },
    }
}

/// Prints a report; keeps the traces of what failed. The exit code is 1 if something did.
pub fn say<S: Subject>(report: &Report<S>, json: bool, traces: &Path) -> Result<u8, Fail> {
    let mut out = Out::new(false);
    if json {
        writeln!(out, "{}", report.to_json())?;
    } else {
        writeln!(out, "{report}")?;
    }
    for (i, trace) in report.failures.iter().enumerate() {
        let path = traces.join(format!("failure-{}-{i}.trace", std::process::id()));
        to_file(&path, trace.explained())?;
        writeln!(out, "written: {}", path.display())?;
    }
    out.flush()?;
    Ok(u8::from(!report.is_good()))
}
