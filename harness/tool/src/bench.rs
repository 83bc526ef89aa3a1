//! `bench`: sends requests as fast as they are answered, and says how long that took.
//!
//! The loop does as little as it can, for what is measured is the engine: each request's memory
//! comes back with it and goes out with the next, nothing is allocated, and no clock is read but
//! that of the engine's turns. Requests are sent and counted, and flushes fall due, as in
//! `qemu-img bench`.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::Target;
use cowbell_engine::stats::{Call, Held, Histogram, Stats};
use cowbell_engine::step::{Driver, Io, IoKind};
use cowbell_engine::wait::On;
use cowbell_engine::{Finished, Limits};
use cowbell_formats::Node;
use cowbell_formats::parts::growth::{Grow, Growth};

use crate::beside::Backup;
use crate::cache::{Cache, How};
use crate::device;
use crate::fail::Fail;
use crate::form::Form;
use crate::json::Json;
use crate::naming::Naming;
use crate::number::{count, duration, human, size};
use crate::out::Out;
use crate::session::{Session, Setup};
use crate::slowest::{Kept, draw};
use crate::stop::Stop;

/// The options of `bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Meanwhile the disk is copied, as it was when this began, into this new qcow2 image
    #[arg(long, value_name = "FILE", help_heading = "Beyond QEMU")]
    backup: Option<OsString>,
    /// With --backup: what becomes smaller is compressed
    #[arg(long, help_heading = "Beyond QEMU")]
    compressed: bool,
    /// Requests to send
    ///
    /// By default 75000.
    #[arg(short, long, allow_hyphen_values = true)]
    count: Option<String>,
    /// Requests at a time
    ///
    /// By default 64.
    #[arg(short, long, allow_hyphen_values = true)]
    depth: Option<String>,
    /// The image's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Native AIO, if the cache mode allows it
    #[arg(short, long)]
    native: bool,
    /// Who does the I/O: threads, native or io_uring
    #[arg(short = 'i', long, value_name = "AIO")]
    aio: Option<String>,
    /// Where the first request starts
    #[arg(short, long, default_value = "0", allow_hyphen_values = true)]
    offset: String,
    /// Bytes in a request
    #[arg(
        short = 's',
        long,
        value_name = "SIZE",
        default_value = "4096",
        allow_hyphen_values = true
    )]
    buffer_size: String,
    /// From the start of one request to that of the next; a request's size if not said
    #[arg(short = 'S', long, value_name = "SIZE", allow_hyphen_values = true)]
    step_size: Option<String>,
    /// Cache mode: none, writeback, writethrough, directsync or unsafe
    ///
    /// By default writeback.
    #[arg(short = 't', long)]
    cache: Option<String>,
    /// Write
    #[arg(short, long)]
    write: bool,
    /// The byte to write
    #[arg(long, default_value = "0", value_name = "BYTE", allow_hyphen_values = true)]
    pattern: String,
    /// Flush after this many requests
    #[arg(long, value_name = "COUNT", default_value = "0", allow_hyphen_values = true)]
    flush_interval: String,
    /// Do not wait for requests in flight before a flush
    #[arg(long)]
    no_drain: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Send to random blocks, chosen by this seed
    #[arg(long, value_name = "SEED", help_heading = "Beyond QEMU")]
    random: Option<u64>,
    /// Where the time went: percentiles, how long the loop was held, states
    #[arg(long, help_heading = "Beyond QEMU")]
    latency: bool,
    /// Record all that the engine is asked and sees into this file, without a byte of data: see `replay`
    #[arg(long, value_name = "FILE", help_heading = "Beyond QEMU")]
    record: Option<PathBuf>,
    /// Say which request was slowest and where its time went, and draw that: a page for a browser, OUT.html, or a
    /// trace that Perfetto opens, OUT.json
    ///
    /// For this the run is recorded in memory, 64 MiB of it at most: some millions of requests. What comes after is
    /// not looked at.
    #[arg(
        long,
        value_name = "OUT",
        help_heading = "Beyond QEMU",
        conflicts_with_all = ["record", "backup", "is_asked"]
    )]
    trace: Option<PathBuf>,
    /// The result as JSON
    #[arg(long, help_heading = "Beyond QEMU")]
    json: bool,
    /// Native AIO that may block in a submission: without RWF_NOWAIT
    #[arg(long, help_heading = "Beyond QEMU")]
    may_block: bool,
    /// How long one turn of the engine may hold the loop, about, in microseconds
    ///
    /// By default 500. Counting instructions on a slow emulation of this processor wants more.
    #[arg(long, value_name = "US", help_heading = "Beyond QEMU", allow_hyphen_values = true)]
    turn: Option<String>,
    /// How a QED file grows: truncate, allocate or write
    #[arg(long, value_name = "HOW", help_heading = "Beyond QEMU")]
    growth: Option<String>,
    #[command(flatten)]
    device: device::Looped,
    #[command(flatten)]
    naming: Naming,
    /// The image
    #[arg(required_unless_present = "is_asked")]
    file: Option<OsString>,
}

/// What to send.
struct Plan {
    total: u64,
    depth: u64,
    offset: u64,
    len: u64,
    step: u64,
    write: bool,
    fua: bool,
    pattern: u8,
    flush_interval: u64,
    flushes_wait: bool,
    random: Option<u64>,
}

const INT_MAX: u64 = i32::MAX as u64;

/// Runs it.
pub fn run(args: &Args) -> Result<u8, Fail> {
    let (cache, how) = cache_and_how(args)?;
    if args.device.is_asked {
        return device::run(&args.device, &given(args, cache, how)?);
    }
    let Some(file) = &args.file else { return Err(Fail::other("Expecting one image file name")) };
    args.trace.as_deref().map(Form::of).transpose()?;
    let (plan, setup) = plan(args, cache, how)?;
    let stop = Stop::on_signals()?;
    let image = args.naming.image(file, args.format.as_deref())?;
    let mut session = Session::open(&image, &setup)?;
    let mut out = Out::new(args.quiet || args.json);
    writeln!(
        out,
        "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, {})",
        plan.total,
        if plan.write { "write" } else { "read" },
        plan.len,
        plan.depth,
        plan.offset,
        match plan.random {
            None => format!("step size {}", plan.step),
            Some(seed) => format!("random blocks, seed {seed}"),
        },
    )?;
    if plan.flush_interval > 0 {
        writeln!(out, "Sending flush every {} requests", plan.flush_interval)?;
    }
    out.flush()?;
    let backup = args.backup.as_ref();
    let backup = backup.map(|to| Backup::begin(&mut session, to, args.compressed, cache));
    let mut backup = backup.transpose()?;
    let began = session.now();
    let sent = send(&mut session, &plan, &setup, &stop, backup.as_mut());
    let sent = sent.map_err(|why| failed(&image.given, why));
    let nanos = session.now().since(began);
    // What closing the image takes is not part of what was measured, neither time nor states.
    let stats = session.engine.stats().clone();
    let goes_on = sent.is_ok() && !stop.is_asked();
    let copied = backup.as_mut().filter(|_| goes_on).map(|backup| backup.wait(&mut session));
    let is_whole = setup.kept.is_some() && session.engine.backend().is_recording();
    let closed = session.drain();
    session.engine.backend_mut().stop();
    let sent = sent?;
    closed?;
    let copied = copied.transpose()?;
    if let (Some(backup), Some(_)) = (backup, copied) {
        backup.keep()?;
    }
    writeln!(out, "Run completed in {:.3} seconds.", nanos as f64 / 1e9)?;
    if let Some(nanos) = copied {
        writeln!(out, "Backup completed in {:.3} seconds.", nanos as f64 / 1e9)?;
    }
    if stop.is_asked() {
        writeln!(out, "Stopped after {sent} of {} requests.", plan.total)?;
    }
    if args.latency && !args.json {
        report(&mut out, &stats, sent, nanos, plan.len)?;
    }
    if let (Some(path), Some(kept)) = (&args.trace, &setup.kept) {
        if !is_whole {
            writeln!(
                out,
                "The run was longer than what is recorded of one: this is of its first part."
            )?;
        }
        draw(kept, path, &mut out)?;
    }
    out.flush()?;
    if args.json {
        let mut out = Out::new(args.quiet);
        writeln!(out, "{}", to_json(&stats, sent, nanos, &plan).pretty())?;
        out.flush()?;
    }
    Ok(if stop.is_asked() { 130 } else { 0 })
}

fn failed(file: &Path, why: Stopped) -> Fail {
    match why {
        Stopped::Request(errno) => Fail::at(file, format!("Failed request: {errno}")),
        Stopped::Flush(errno) => Fail::at(file, format!("Failed flush request: {errno}")),
        Stopped::Beyond => Fail::at(file, "Failed request: Input/output error"),
        Stopped::Loop(fail) => fail,
    }
}

/// What the options say about the cache, and who does the I/O.
fn cache_and_how(args: &Args) -> Result<(Cache, Option<How>), Fail> {
    let default = if args.device.is_asked { "none" } else { "writeback" };
    let cache = Cache::named(args.cache.as_deref().unwrap_or(default));
    let cache = cache.ok_or_else(|| Fail::other("Invalid cache mode"))?;
    let how = match &args.aio {
        Some(name) => {
            let bad = || Fail::other(format!("Invalid aio option: {name}"));
            Some(How::named(name).ok_or_else(bad)?)
        }
        None => None,
    };
    Ok((cache, if args.native { Some(How::Native) } else { how }))
}

fn turn(args: &Args) -> Result<Duration, Fail> {
    let text = args.turn.as_deref();
    let micros = text.map(|text| count("turn", text, 1, 60_000_000)).transpose()?;
    Ok(micros.map_or(Limits::default().turn, Duration::from_micros))
}

/// What counts for `--loop` too.
fn given(args: &Args, cache: Cache, how: Option<How>) -> Result<device::Given<'_>, Fail> {
    let default = if cache.direct { How::Native } else { How::Threads };
    Ok(device::Given {
        folder: args.file.as_deref().map(Path::new),
        count: args.count.as_deref(),
        depth: args.depth.as_deref(),
        cache,
        how: how.unwrap_or(default),
        may_block: args.may_block,
        turn: turn(args)?,
        seed: args.random.unwrap_or(1),
        quiet: args.quiet,
        json: args.json,
    })
}

fn plan(args: &Args, cache: Cache, how: Option<How>) -> Result<(Plan, Setup), Fail> {
    let total = count("request count", args.count.as_deref().unwrap_or("75000"), 1, INT_MAX)?;
    let depth = count("queue depth", args.depth.as_deref().unwrap_or("64"), 1, INT_MAX)?;
    let offset = size("offset", &args.offset, 0, i64::MAX as u64)?;
    let len = size("buffer size", &args.buffer_size, 1, INT_MAX)?;
    let step = match &args.step_size {
        Some(text) => size("step size", text, 0, INT_MAX)?,
        None => 0,
    };
    let pattern = count("pattern byte", &args.pattern, 0, 255)? as u8;
    let flush_interval = count("flush interval", &args.flush_interval, 0, INT_MAX)?;
    if !args.write && flush_interval > 0 {
        return Err(Fail::other("--flush-interval is only available in write tests"));
    }
    if flush_interval > 0 && flush_interval < depth {
        return Err(Fail::other("Flush interval can't be smaller than depth"));
    }
    let growth = match args.growth.as_deref() {
        None => None,
        Some(name) => {
            let by = match name {
                "truncate" => Grow::Truncate,
                "allocate" => Grow::Allocate,
                "write" => Grow::Write,
                _ => return Err(Fail::other(format!("'{name}' is no way for a file to grow"))),
            };
            Some(Growth { by, ..Growth::default() })
        }
    };
    if depth > DEPTH_MAX {
        return Err(Fail::other(format!("more than {DEPTH_MAX} requests at a time")));
    }
    let plan = Plan {
        total,
        depth,
        offset,
        len,
        step: if step > 0 || args.step_size.is_some() { step } else { len },
        write: args.write,
        fua: cache.fua,
        pattern,
        flush_interval,
        flushes_wait: !args.no_drain,
        random: args.random,
    };
    let setup = Setup {
        write: args.write,
        cache,
        how,
        may_block: args.may_block,
        turn: turn(args)?,
        depth: depth as usize + 1,
        growth,
        record: args.record.clone(),
        kept: args.trace.is_some().then(Kept::default),
        has_remote: false,
    };
    Ok((plan, setup))
}

/// More requests at a time than this are a mistake.
const DEPTH_MAX: u64 = 65536;

/// Why requests are no longer sent.
enum Stopped {
    Request(cowbell_engine::units::Errno),
    Flush(cowbell_engine::units::Errno),
    /// A request would lie behind the disk's end.
    Beyond,
    Loop(Fail),
}

/// The tag of requests that have no memory to send again.
const FLUSH: u64 = 1;
/// The tag of all others.
const DATA: u64 = 0;

/// Sends what is planned; answers how many requests finished.
fn send(
    session: &mut Session,
    plan: &Plan,
    setup: &Setup,
    stop: &Stop,
    mut backup: Option<&mut Backup>,
) -> Result<u64, Stopped> {
    let mut offsets = Offsets::new(plan, session.size())?;
    // Each slot has memory from the start; from then on it is handed from one request to the next.
    let slots = plan.depth.min(plan.total);
    let mut spare: Vec<Mem> = (0..slots).map(|_| memory(plan)).collect();
    let kind =
        if plan.write { IoKind::Write { fua: plan.fua, compressed: false } } else { IoKind::Read };
    let node = session.node;
    let (mut unsent, mut in_flight, mut flushing) = (plan.total, 0, false);
    let mut flushes = 0;
    loop {
        while !flushing && unsent > 0 && in_flight < plan.depth {
            let mem = spare.pop().expect("as many as requests in flight at most");
            submit(session, Io { kind, offset: offsets.next()?, len: plan.len }, mem);
            (unsent, in_flight) = (unsent - 1, in_flight + 1);
        }
        let progress = session.run();
        if let Some(backup) = &mut backup {
            backup.look(session).map_err(Stopped::Loop)?;
        }
        let mut finished_any = false;
        while let Some(Finished { tag, result, mem }) = session.engine.poll() {
            finished_any = true;
            if tag == FLUSH {
                result.map_err(Stopped::Flush)?;
                flushes -= 1;
                flushing = false;
                continue;
            }
            result.map_err(Stopped::Request)?;
            if plan.flush_interval != 0 && unsent.is_multiple_of(plan.flush_interval) {
                // With requests drained first, nothing is sent until it is done.
                flushing = plan.flushes_wait;
                let due = !plan.flushes_wait || in_flight == 1;
                if due && setup.cache.no_flush {
                    flushing = false;
                } else if due && flushes < FLUSHES_MAX {
                    let sent = session.engine.submit(node, Io::flush(), Mem::None, FLUSH);
                    flushes += u64::from(sent.is_ok());
                }
            }
            if flushing || unsent == 0 {
                in_flight -= 1;
                spare.push(mem);
            } else {
                unsent -= 1;
                submit(session, Io { kind, offset: offsets.next()?, len: plan.len }, mem);
            }
        }
        if unsent + in_flight + flushes == 0 {
            return Ok(plan.total);
        }
        if stop.is_asked() {
            return Ok(plan.total - unsent - in_flight);
        }
        if !finished_any && !progress.again {
            session.wait(None).map_err(Stopped::Loop)?;
        }
    }
}

#[inline(always)]
fn submit(session: &mut Session, io: Io, mem: Mem) {
    let sent = session.engine.submit(session.node, io, mem, DATA);
    assert!(sent.is_ok(), "the engine was made for this depth");
}

/// Flushes in flight. One more would tell nothing that these do not.
const FLUSHES_MAX: u64 = 1;

fn memory(plan: &Plan) -> Mem {
    let mut buf = Buf::zeroed(plan.len as usize);
    // Also when zero: memory that was never written to is not what is measured.
    buf.fill(plan.pattern);
    Mem::Owned(buf)
}

/// Where requests go.
struct Offsets {
    at: u64,
    step: u64,
    len: u64,
    size: u64,
    /// Where the last request can start.
    last: u64,
    /// The random state, and how many blocks there are.
    random: Option<(u64, u64)>,
}

impl Offsets {
    fn new(plan: &Plan, size: u64) -> Result<Offsets, Stopped> {
        let blocks = size / plan.len;
        if size == 0 || plan.random.is_some() && blocks == 0 {
            return Err(Stopped::Beyond);
        }
        let random = plan.random.map(|seed| (seed, blocks));
        let step = plan.step % size;
        let last = size.checked_sub(plan.len).ok_or(Stopped::Beyond)?;
        Ok(Offsets { at: plan.offset, step, len: plan.len, size, last, random })
    }

    #[inline]
    fn next(&mut self) -> Result<u64, Stopped> {
        if let Some((state, blocks)) = &mut self.random {
            // splitmix64; the high half of a product takes it to 0..blocks without a division.
            *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut x = *state;
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^= x >> 31;
            return Ok(((u128::from(x) * u128::from(*blocks)) >> 64) as u64 * self.len);
        }
        let at = self.at;
        if at > self.last {
            return Err(Stopped::Beyond);
        }
        self.at += self.step;
        if self.at >= self.size {
            self.at -= self.size;
        }
        Ok(at)
    }
}

/// The states in which requests waited: name, visits, nanoseconds; longest first.
pub fn states(stats: &Stats) -> Vec<(&'static str, u64, u64)> {
    let names = Node::STATES.iter().copied();
    let mut states: Vec<_> = names
        .zip(&stats.states)
        .map(|(name, state)| (name, state.visits, state.nanos))
        .filter(|&(_, visits, _)| visits > 0)
        .collect();
    states.sort_by_key(|&(_, _, nanos)| std::cmp::Reverse(nanos));
    states
}

fn report(out: &mut Out, stats: &Stats, sent: u64, nanos: u64, len: u64) -> Result<(), Fail> {
    let seconds = nanos.max(1) as f64 / 1e9;
    let rate = sent as f64 / seconds;
    let mib = rate * len as f64 / f64::from(1 << 20);
    writeln!(out, "Rate: {rate:.0} requests/s, {mib:.1} MiB/s")?;
    write_times(out, "Latency", &stats.latency)?;
    // What an embedder feels: for so long nothing else in its loop is served.
    write_times(out, "Loop held per turn", &stats.run)?;
    writeln!(
        out,
        "Loop held in all: {} of {}, in {} turns",
        duration(stats.run.sum()),
        duration(nanos),
        stats.run.count()
    )?;
    write_times(out, "Turn by ops submitted", &stats.run_per_op)?;
    write_longest(out, stats.longest.as_ref())?;
    write_states(out, stats)
}

fn write_times(out: &mut Out, what: &str, times: &Histogram) -> Result<(), Fail> {
    writeln!(out, "{what}: {}", quantiles(times))?;
    Ok(())
}

/// Quantiles of times, for people.
pub fn quantiles(times: &Histogram) -> String {
    let at = |per_mille| duration(times.quantile(per_mille));
    format!("p50 {}, p99 {}, p99.9 {}, max {}", at(500), at(990), at(999), duration(times.max()))
}

/// What held one turn for longest.
pub fn write_longest(out: &mut Out, longest: Option<&Held>) -> Result<(), Fail> {
    let Some(Held { nanos, call, count, first }) = longest else { return Ok(()) };
    let nanos = duration(*nanos);
    match (call, first) {
        (Call::Submit, Some((kind, Target::File(file), offset, len))) => writeln!(
            out,
            "Held for longest: {nanos}, handing over {count} ops; the first is a {} of {} at {offset} \
             of file {}",
            format!("{kind:?}").split(' ').next().unwrap_or_default().to_lowercase(),
            human(*len),
            file.index(),
        )?,
        (Call::Submit, _) => writeln!(out, "Held for longest: {nanos}, handing over {count} ops")?,
        (Call::Steps, _) => writeln!(out, "Held for longest: {nanos}, by steps of requests")?,
    }
    Ok(())
}

/// What requests waited for that they had no ops for, in the same way.
fn lists(stats: &Stats) -> Vec<(String, u64, u64)> {
    let names = On::ALL.iter().map(|on| in_words(&format!("{on:?}")));
    let lists = names.zip(&stats.lists).map(|(name, list)| (name, list.visits, list.nanos));
    let mut lists: Vec<_> = lists.filter(|&(_, visits, _)| visits > 0).collect();
    lists.sort_by_key(|&(_, _, nanos)| std::cmp::Reverse(nanos));
    lists
}

/// `CacheSlot` as `cache slot`.
fn in_words(name: &str) -> String {
    let mut words = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !words.is_empty() {
            words.push(' ');
        }
        words.extend(letter.to_lowercase());
    }
    words
}

/// Time by state, as a chart of bars; then by what was waited for.
pub fn write_states(out: &mut Out, stats: &Stats) -> Result<(), Fail> {
    let states = states(stats);
    let total: u64 = states.iter().map(|&(_, _, nanos)| nanos).sum();
    writeln!(out, "Time by state:")?;
    for (name, visits, nanos) in states {
        write_bar(out, name, total, (visits, nanos))?;
    }
    let lists = lists(stats);
    if !lists.is_empty() {
        writeln!(out, "Of that, waiting for:")?;
    }
    for (name, visits, nanos) in lists {
        write_bar(out, &name, total, (visits, nanos))?;
    }
    Ok(())
}

fn write_bar(
    out: &mut Out,
    name: &str,
    total: u64,
    (visits, nanos): (u64, u64),
) -> Result<(), Fail> {
    let share = nanos as f64 / total.max(1) as f64;
    let mean = duration(nanos / visits);
    let bar = out.paint("36", &bar(share));
    let share = share * 100.0;
    writeln!(out, "  {name:<13} {share:5.1} % {mean:>8} x {visits:<8} {bar}")?;
    Ok(())
}

/// A bar of up to 30 columns, in eighths.
fn bar(share: f64) -> String {
    let eighths = (share * 240.0).round() as usize;
    let mut bar = "█".repeat(eighths / 8);
    bar.push_str(["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8]);
    bar
}

/// Quantiles, in nanoseconds.
pub fn times_to_json(times: &Histogram) -> Json {
    Json::Object(vec![
        ("p50", Json::Int(times.quantile(500))),
        ("p99", Json::Int(times.quantile(990))),
        ("p99.9", Json::Int(times.quantile(999))),
        ("max", Json::Int(times.max())),
        ("count", Json::Int(times.count())),
        ("sum", Json::Int(times.sum())),
    ])
}

fn to_json(stats: &Stats, sent: u64, nanos: u64, plan: &Plan) -> Json {
    let states = states(stats).into_iter().map(|(name, visits, nanos)| {
        Json::Object(vec![
            ("state", Json::text(name)),
            ("visits", Json::Int(visits)),
            ("ns", Json::Int(nanos)),
        ])
    });
    let lists = lists(stats).into_iter().map(|(name, visits, nanos)| {
        Json::Object(vec![
            ("for", Json::text(&name)),
            ("visits", Json::Int(visits)),
            ("ns", Json::Int(nanos)),
        ])
    });
    Json::Object(vec![
        ("requests", Json::Int(sent)),
        ("bytes-each", Json::Int(plan.len)),
        ("depth", Json::Int(plan.depth)),
        ("seconds", Json::Float(nanos as f64 / 1e9)),
        ("latency-ns", times_to_json(&stats.latency)),
        ("run-ns", times_to_json(&stats.run)),
        ("run-per-op-ns", times_to_json(&stats.run_per_op)),
        ("states", Json::List(states.collect())),
        ("waited", Json::List(lists.collect())),
        ("flushes", Json::Int(stats.flushes)),
        ("bounced", Json::Int(stats.bounced)),
    ])
}
