//! `--record`: what an engine is asked and sees goes into a file, as it happens; and `replay`, which does it again.
//!
//! The file begins with text: how the images were opened, and what was read of them then. What follows `begin` is the
//! [record](cowbell_engine::record). A thread writes it, so that the loop never waits; if that falls behind by more than a few MiB
//! the record ends there.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cowbell_engine::backend::FileInfo;
use cowbell_engine::mutants::ARE_PLANTED;
use cowbell_engine::record::{CHUNK, Recorder, Sink};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::parts::growth::{Grow, Growth};
use cowbell_formats::{Host, Node, attach};
use cowbell_sim::kept::{KeptFile, KeptHost};
use cowbell_sim::mutants::MUTANTS;
use cowbell_sim::played::{Done, Moment, Played, Player, Verdict};
use cowbell_sim::subjects::recorded::Parts;
use cowbell_sim::vary::{Variation, Varied, vary};
use cowbell_sim::world::Way;

use crate::disk::{AnyFile, Disk, Files};
use crate::fail::Fail;
use crate::form::Form;
use crate::naming::Image;
use crate::out::Out;
use crate::session::run_options;
use crate::sim::{duration, say};
use crate::slowest::Kept;

/// The first line.
const MAGIC: &str = "cowbell record 2";

/// What comes before the record: how the engine and its disks came to be.
pub struct Head<H: Host = Files> {
    lines: String,
    host: KeptHost<H>,
}

/// A head of which all disks have been told.
pub struct Told(String);

impl Head {
    /// For an engine with these limits, over disks whose files grow so. `direct`: past the page cache.
    pub fn new(limits: &Limits, growth: Option<Growth>, direct: bool) -> Head {
        Head::over(limits, growth, Files { direct })
    }
}

impl<H: Host> Head<H> {
    /// The same, over files of this host.
    pub fn over(limits: &Limits, growth: Option<Growth>, host: H) -> Head<H> {
        let growth = match growth {
            None => "- 0 0".into(),
            Some(Growth { by, step_min, step_max }) => {
                let by = match by {
                    Grow::Truncate => "truncate",
                    Grow::Allocate => "allocate",
                    Grow::Write => "write",
                };
                format!("{by} {step_min} {step_max}")
            }
        };
        let Limits { requests, ops, turn, .. } = limits;
        let turn = turn.as_nanos();
        let lines = format!("{MAGIC}\nengine {requests} {ops} {turn} {growth}\n");
        Head { lines, host: KeptHost::over(host) }
    }

    /// The next disk is this image. It is opened for a trial, which writes nothing.
    pub fn disk(&mut self, image: &Image, write: bool) -> Result<(), Fail> {
        image.open(&self.host, write)?;
        self.lines.push_str(&format!("disk {} {}\n", u8::from(write), image.to_words()));
        Ok(())
    }

    /// These are all disks.
    pub fn told(self) -> Told {
        Told(self.lines + &self.host.to_text())
    }
}

impl Told {
    /// Makes the file at `path`; from now on all goes there.
    pub fn begin(self, path: &Path, recorder: &mut Recorder<Disk>) -> Result<(), Fail> {
        let writer = Writer::create(path, &self.finish(recorder.infos()))?;
        recorder.start(Box::new(writer));
        Ok(())
    }

    /// From now on all is kept in memory.
    pub fn keep(self, kept: &Kept, recorder: &mut Recorder<Disk>) {
        let sink = kept.begin(&self.finish(recorder.infos()));
        recorder.start(sink);
    }

    /// With what the backend said of the files.
    pub fn finish(self, infos: &[FileInfo]) -> String {
        let mut text = self.0;
        for info in infos {
            let FileInfo { request_align, memory_align, hole_align, len, .. } = *info;
            let (grows, holes) = (u8::from(info.can_grow), u8::from(info.knows_holes));
            text.push_str(&format!(
                "info {request_align} {memory_align} {hole_align} {len} {grows} {holes}\n"
            ));
        }
        text.push_str("begin\n");
        text
    }
}

/// A file that is written on a thread.
struct Writer {
    full: Option<SyncSender<Vec<u8>>>,
    empty: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<()>>,
}

/// Chunks on their way to the file at once.
const AHEAD: usize = 16;

impl Writer {
    /// Makes the file at `path` and begins it with `head`.
    fn create(path: &Path, head: &str) -> Result<Writer, Fail> {
        let at = |error: io::Error| Fail::at(path, error);
        let mut file = File::create(path).map_err(at)?;
        file.write_all(head.as_bytes()).map_err(at)?;
        let (full, to_write) = sync_channel::<Vec<u8>>(AHEAD);
        let (give_back, empty) = sync_channel(AHEAD);
        let write = move || {
            for mut chunk in to_write {
                if file.write_all(&chunk).is_err() {
                    return;
                }
                chunk.clear();
                let _ = give_back.try_send(chunk);
            }
        };
        let thread =
            thread::Builder::new().name("cowbell-record".into()).spawn(write).map_err(at)?;
        Ok(Writer { full: Some(full), empty, thread: Some(thread) })
    }
}

impl Sink for Writer {
    fn take(&mut self, chunk: Vec<u8>) -> Option<Vec<u8>> {
        match self.full.as_ref()?.try_send(chunk) {
            Ok(()) => {
                let empty = self.empty.try_recv();
                Some(empty.unwrap_or_else(|_| Vec::with_capacity(CHUNK + CHUNK / 4)))
            }
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => None,
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.full = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The options of `replay`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Stop after so many turns of the loop
    #[arg(long, value_name = "N")]
    until: Option<u64>,
    /// Stop where a request is in this state, as a page or `--dump` names it
    #[arg(long = "break", value_name = "STATE")]
    break_at: Option<String>,
    /// Print the engine where it stops: its requests, what each waits for, its ops
    #[arg(long)]
    dump: bool,
    /// Write a page for a browser, which shows what happened
    #[arg(long, value_name = "OUT")]
    html: Option<PathBuf>,
    /// Write what happened as a trace that Perfetto opens
    #[arg(long, value_name = "OUT")]
    perfetto: Option<PathBuf>,
    /// Show what happened from this turn on. Of a long run a page is large: some ten thousand turns are well
    #[arg(long, value_name = "N", default_value = "0")]
    from: u64,
    /// Search around it: other orders of its last requests, faults, crashes. Exit code 1: something was found
    #[arg(long, conflicts_with_all = ["until", "break_at", "dump", "html", "perfetto", "from"])]
    vary: bool,
    #[command(flatten)]
    variation: Varying,
    /// The record
    file: PathBuf,
}

/// The options of `replay --vary`.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "With --vary")]
struct Varying {
    /// The last of the requests that are varied is the last one submitted in this turn, or before
    #[arg(long, value_name = "TURN", requires = "vary")]
    near: Option<u64>,
    /// How many requests are varied
    #[arg(
        long,
        value_name = "N",
        default_value = "12",
        requires = "vary",
        value_parser = clap::value_parser!(u8).range(1..=61)
    )]
    requests: u8,
    /// Faults in a run, at most
    #[arg(
        long,
        value_name = "N",
        default_value = "1",
        requires = "vary",
        value_parser = clap::value_parser!(u8).range(0..=4)
    )]
    faults: u8,
    /// Crashes after which a run goes on, at most
    #[arg(
        long,
        value_name = "N",
        default_value = "0",
        requires = "vary",
        value_parser = clap::value_parser!(u8).range(0..=4)
    )]
    crashes: u8,
    /// The first seed
    #[arg(long, value_name = "N", default_value = "0", requires = "vary")]
    seed: u64,
    /// How many seeds
    #[arg(long, value_name = "N", default_value = "1000", requires = "vary")]
    runs: u64,
    /// Stop after so long: seconds, or with s, m or h behind
    #[arg(long, default_value = "10", requires = "vary", value_parser = duration)]
    time: f64,
    /// Of a run with several disks: which, from 0 on; that of the last request if not said, or the
    /// one that was copied to last
    #[arg(long, value_name = "N", requires = "vary")]
    disk: Option<usize>,
    /// Where the trace of what is found goes
    #[arg(long, value_name = "DIR", default_value = ".", requires = "vary")]
    traces: PathBuf,
    /// A defect that is planted, in a build with debug assertions
    #[arg(long, value_name = "NAME", hide = true, requires = "vary", value_parser = defect)]
    plant: Option<&'static str>,
}

/// The name of a planted defect.
fn defect(name: &str) -> Result<&'static str, String> {
    let known = MUTANTS.iter().find(|mutant| mutant.name == name && ARE_PLANTED);
    known.map(|mutant| mutant.name).ok_or_else(|| "no such defect is planted".into())
}

/// What a record says of how it was made.
struct Recorded<'f> {
    limits: Limits,
    growth: Option<Growth>,
    /// The disks, and whether each may be written.
    disks: Vec<(Image, bool)>,
    infos: Vec<FileInfo>,
    host: KeptHost<Files>,
    record: &'f [u8],
}

/// What does a run again, over files as they were.
pub type Replay = Player<'static, Node, KeptFile<AnyFile>>;

/// A run that is to be done again.
struct Again<'f> {
    player: Replay,
    /// A line of each disk.
    about: Vec<String>,
    /// What each disk consists of, if that was wanted.
    parts: Vec<Parts>,
    record: &'f [u8],
}

impl<'f> Recorded<'f> {
    /// All that is to be done again. It is of the file `name`.
    fn again(self, name: &Path, with_parts: bool) -> Result<Again<'f>, Fail> {
        let at = |what: String| Fail::at(name, what);
        let Recorded { limits, growth, disks, infos, host, record } = self;
        let mut engine = Engine::new(Played::new(record.to_vec(), infos), limits);
        let (mut about, mut parts) = (Vec::new(), Vec::new());
        for (image, write) in disks {
            about.push(format!("disk {}", image.given.display()));
            let chain = image.open(&host, write)?;
            if with_parts {
                let align = engine.backend().next_info().map_or(512, |info| info.request_align);
                parts.push(Parts::of(&chain, align, growth).map_err(at)?);
            }
            attach(&mut engine, chain, &run_options(growth))
                .map_err(|error| at(error.to_string()))?;
        }
        Ok(Again { player: Player::new(engine), about, parts, record })
    }
}

/// What does again what `bytes`, of the file `name`, record; and a line of each of its disks.
pub fn again(bytes: &[u8], name: &Path) -> Result<(Replay, Vec<String>), Fail> {
    let recorded = parse(bytes).map_err(|what| Fail::at(name, what))?;
    let Again { player, about, .. } = recorded.again(name, false)?;
    Ok((player, about))
}

fn parse(file: &[u8]) -> Result<Recorded<'_>, String> {
    let mark = b"\nbegin\n";
    let found = file.windows(mark.len()).position(|window| window == mark);
    let (head, record) = match found {
        Some(at) => (&file[..at], &file[at + mark.len()..]),
        None => return Err("this is no record of a run".into()),
    };
    let head = std::str::from_utf8(head).map_err(|_| "its head is no text")?;
    let mut lines = head.lines();
    if lines.next() != Some(MAGIC) {
        return Err("this is no record of a run".into());
    }
    let (mut engine, mut disks, mut infos, mut kept) = (None, Vec::new(), Vec::new(), Vec::new());
    for line in lines {
        let bad = || format!("'{line:.60}' is no line of a head");
        match line.split_once(' ') {
            Some(("engine", words)) => engine = Some(engine_of(words).ok_or_else(bad)?),
            Some(("disk", words)) => {
                let (write, words) = words.split_once(' ').ok_or_else(bad)?;
                disks.push((Image::from_words(words).ok_or_else(bad)?, write == "1"));
            }
            Some(("info", words)) => infos.push(info_of(words).ok_or_else(bad)?),
            _ => kept.push(line),
        }
    }
    let (limits, growth) = engine.ok_or("it does not say what the engine was like")?;
    let host = KeptHost::from_lines(kept.into_iter())?;
    Ok(Recorded { limits, growth, disks, infos, host, record })
}

fn engine_of(words: &str) -> Option<(Limits, Option<Growth>)> {
    let words: Vec<&str> = words.split(' ').collect();
    let &[requests, ops, turn, by, step_min, step_max] = words.as_slice() else { return None };
    let by = match by {
        "-" => None,
        "truncate" => Some(Grow::Truncate),
        "allocate" => Some(Grow::Allocate),
        "write" => Some(Grow::Write),
        _ => return None,
    };
    let (step_min, step_max) = (step_min.parse().ok()?, step_max.parse().ok()?);
    let growth = by.map(|by| Growth { by, step_min, step_max });
    let few = |word: &str, least| {
        word.parse().ok().filter(|count: &usize| (least..=PLACES_MAX).contains(count))
    };
    let (requests, ops) = (few(requests, 1)?, few(ops, 4)?);
    let turn = Duration::from_nanos(turn.parse().ok()?);
    Some((Limits { requests, ops, turn, ..Limits::default() }, growth))
}

/// More requests and ops at a time no command has.
const PLACES_MAX: usize = 1 << 19;

fn info_of(words: &str) -> Option<FileInfo> {
    let numbers: Option<Vec<u64>> = words.split(' ').map(|word| word.parse().ok()).collect();
    let &[request, memory, hole, len, grows, holes] = numbers?.as_slice() else { return None };
    let align = |number: u64| {
        u32::try_from(number).ok().filter(|align| align.is_power_of_two() && *align <= 1 << 20)
    };
    Some(FileInfo {
        request_align: align(request)?,
        memory_align: align(memory)?,
        hole_align: align(hole)?,
        len,
        can_grow: grows == 1,
        knows_holes: holes == 1,
    })
}

/// Runs it.
pub fn run(args: &Args) -> Result<u8, Fail> {
    let bytes = std::fs::read(&args.file).map_err(|error| Fail::at(&args.file, error))?;
    let recorded = parse(&bytes).map_err(|what| Fail::at(&args.file, what))?;
    let Again { mut player, about, parts, record } = recorded.again(&args.file, args.vary)?;
    if args.vary {
        return search(args, &mut player, record, &parts);
    }
    let until = args.until.unwrap_or(u64::MAX);
    let mut is_there = false;
    let mut each = |engine: &Engine<_, Played<_>>, moment| {
        let mut waiting = args.break_at.iter().filter(|_| moment == Moment::Ran);
        is_there = waiting.any(|state| engine.requests().any(|request| request.state == state));
        !is_there && (engine.backend().done.runs < until || moment != Moment::Ran)
    };
    let verdict = if args.html.is_some() || args.perfetto.is_some() {
        let title = format!("The run recorded as {}", args.file.display());
        let (verdict, timeline) = player.play_seen((title, about), args.from, &mut each);
        args.html.iter().try_for_each(|path| Form::Page.draw(&timeline, path))?;
        args.perfetto.iter().try_for_each(|path| Form::Perfetto.draw(&timeline, path))?;
        verdict
    } else {
        player.play(&mut each)
    };
    let engine = player.engine();
    let Done { runs, requests, ended, ops, waits } = engine.backend().done;
    let mut out = Out::new(false);
    writeln!(
        out,
        "{requests} requests, of which {ended} ended; {ops} ops; {waits} waits; {runs} turns."
    )?;
    if args.dump {
        writeln!(out, "{engine:#?}")?;
    }
    if let Some(state) = &args.break_at {
        match is_there {
            true => writeln!(out, "After turn {runs} a request is in state {state}.")?,
            false => writeln!(out, "After no turn a request is in state {state}.")?,
        }
    }
    let code = match verdict {
        Verdict::Same if args.break_at.is_some() && !is_there => 1,
        Verdict::Same => {
            writeln!(out, "Every transition was as it was recorded.")?;
            0
        }
        Verdict::Untold(name) => {
            writeln!(
                out,
                "Every transition was as it was recorded, up to a call of {name}, which a record does not tell enough of."
            )?;
            0
        }
        Verdict::Differs(how) => {
            let nanos = engine.backend().time().0;
            writeln!(out, "In turn {runs}, at {nanos} ns, it went another way: {how}.")?;
            1
        }
    };
    out.flush()?;
    Ok(code)
}

/// Searches around a run.
fn search(args: &Args, player: &mut Replay, record: &[u8], disks: &[Parts]) -> Result<u8, Fail> {
    let Varying { near, requests, faults, crashes, seed, runs, time, disk, ref traces, plant } =
        args.variation;
    let requests = usize::from(requests);
    let how = Variation { near, requests, faults, crashes, seed, runs, seconds: time, disk, plant };
    let varied = vary(player, record, disks, &how).map_err(|what| Fail::at(&args.file, what))?;
    let Varied { disk, before, window, copy, exhausted, drawn, failed_seed, report } = &varied;
    let mut out = Out::new(false);
    writeln!(
        out,
        "Disk {disk}: {} requests are varied, behind {before} that are done as they were{}",
        window.requests.len(),
        if window.requests.is_empty() { "." } else { ":" }
    )?;
    for (which, request) in window.requests.iter().enumerate() {
        writeln!(out, "  {which}: {request}")?;
    }
    match copy {
        None => {}
        Some((Way::In, other)) => writeln!(out, "So is a copy of disk {other} to it.")?,
        Some((Way::Out, other)) => writeln!(out, "So is a copy of it to disk {other}.")?,
        Some((Way::Up, _)) => writeln!(out, "So is a copy of what it lies on into it.")?,
    }
    let also = if copy.is_some() { "the copy and " } else { "" };
    match exhausted {
        None => writeln!(out, "Not every order was tried of any; there was no time.")?,
        Some(0) => writeln!(out, "Everything was tried that can happen with the copy.")?,
        Some(1) => writeln!(out, "Everything was tried that can happen with {also}the last one.")?,
        Some(last) => {
            writeln!(out, "Everything was tried that can happen with {also}the last {last}.")?;
        }
    }
    match (drawn, failed_seed) {
        (0, _) => {}
        (_, Some(failed)) => {
            writeln!(
                out,
                "Of all, {drawn} runs were drawn; the last one, of --seed {failed}, failed."
            )?;
        }
        (_, None) => {
            writeln!(out, "Of all, {drawn} runs were drawn, from --seed {seed} on.")?;
        }
    }
    out.flush()?;
    say(report, false, traces)
}
