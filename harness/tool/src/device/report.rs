//! What `bench --loop` says.

use std::io::Write;

use cowbell_engine::stats::Histogram;

use super::guest::Kind;
use super::{Felt, Given, Measured, Plan, TICK, Thin};
use crate::bench::{quantiles as times, times_to_json, write_longest};
use crate::cache::How;
use crate::fail::Fail;
use crate::json::Json;
use crate::number::{duration, human};
use crate::out::Out;

impl Measured {
    fn requests(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn rate(&self) -> f64 {
        self.requests() as f64 / seconds(self.busy.nanos)
    }

    /// Latency, whatever the kind.
    fn latency_of_all(&self) -> Histogram {
        let mut all = Histogram::default();
        self.latency.iter().filter(|times| times.count() > 0).for_each(|times| all.merge(times));
        all
    }

    /// Ops that a thread does with fallocate.
    fn fallocates(&self) -> u64 {
        self.pool.zeroes + self.pool.discards + self.pool.allocates
    }

    /// Of those, what zeroed or gave up: for each 64 KiB that the guest zeroed or gave up.
    fn per_64k(&self) -> f64 {
        let asked = self.given_up.max(1) as f64 / f64::from(64 << 10);
        (self.pool.zeroes + self.pool.discards) as f64 / asked
    }
}

impl Felt {
    fn missed_share(&self) -> f64 {
        self.missed as f64 * 100.0 / self.ticks.max(1) as f64
    }
}

fn seconds(nanos: u64) -> f64 {
    nanos.max(1) as f64 / 1e9
}

/// Says it.
pub fn write(
    given: &Given<'_>,
    plan: &Plan,
    disks: &[Thin],
    measured: &Measured,
) -> Result<(), Fail> {
    let mut out = Out::new(given.quiet);
    if given.json {
        writeln!(out, "{}", to_json(plan, disks, measured).pretty())?;
    } else {
        write_text(&mut out, given, plan, disks, measured)?;
    }
    out.flush()?;
    Ok(())
}

fn write_text(
    out: &mut Out,
    given: &Given<'_>,
    plan: &Plan,
    disks: &[Thin],
    measured: &Measured,
) -> Result<(), Fail> {
    let Measured { busy, quiet, pool, .. } = measured;
    let kinds: Vec<&str> = disks.iter().map(|disk| disk.kind.as_str()).collect();
    let cache = if given.cache.direct { "O_DIRECT" } else { "page cache" };
    let how = match given.how {
        How::Native if given.may_block => "native AIO that may block",
        How::Native => "native AIO",
        #[cfg(feature = "io_uring")]
        How::IoUring => "io_uring",
        How::Threads => "threads",
    };
    let kinds = kinds.join(", ");
    writeln!(out, "Disks: {kinds}, {} each; {cache}, {how}", human(plan.size))?;
    let counts =
        Kind::ALL.map(|kind| format!("{} {}", measured.counts[kind as usize], kind.name()));
    writeln!(
        out,
        "Requests: {} in {}, {} at a time: {}",
        measured.requests(),
        duration(busy.nanos),
        plan.depth,
        counts.join(", "),
    )?;
    writeln!(out, "Rate: {:.0} requests/s", measured.rate())?;
    writeln!(out, "Loop held per turn: {}, {} turns", times(&busy.turns), busy.turns.count())?;
    writeln!(
        out,
        "Inside run: {} of {}; {}",
        duration(busy.runs.sum()),
        duration(busy.nanos),
        times(&busy.runs)
    )?;
    write_longest(out, measured.longest.as_ref())?;
    write_ticks(out, "Timer", busy)?;
    writeln!(out, "Latency: {}", times(&measured.latency_of_all()))?;
    for kind in Kind::ALL {
        let latency = &measured.latency[kind as usize];
        if latency.count() > 0 {
            writeln!(out, "  {:<8} {}", kind.name(), times(latency))?;
        }
    }
    writeln!(
        out,
        "Threads did: {} reads, {} writes, {} flushes, {} zeroes, {} discards, {} allocations, {} \
         truncations",
        pool.reads,
        pool.writes,
        pool.flushes,
        pool.zeroes,
        pool.discards,
        pool.allocates,
        pool.truncates,
    )?;
    writeln!(
        out,
        "Fallocates: {}; to zero or discard {:.2} for each 64 KiB of {}",
        measured.fallocates(),
        measured.per_64k(),
        human(measured.given_up),
    )?;
    writeln!(
        out,
        "Quiet: space is back after {} ({}); loop held per turn: {}",
        duration(measured.space_back),
        human(measured.space),
        times(&quiet.turns),
    )?;
    write_ticks(out, "Timer meanwhile", quiet)?;
    if let Some((blocks, wrong)) = measured.checked {
        writeln!(out, "Check: {wrong} of {blocks} blocks are wrong")?;
    }
    if measured.stopped {
        writeln!(out, "Stopped early.")?;
    }
    Ok(())
}

fn write_ticks(out: &mut Out, what: &str, felt: &Felt) -> Result<(), Fail> {
    writeln!(
        out,
        "{what}: {} of {} ticks missed ({:.1} %), late by {}",
        felt.missed,
        felt.ticks,
        felt.missed_share(),
        times(&felt.late),
    )?;
    Ok(())
}

fn to_json(plan: &Plan, disks: &[Thin], measured: &Measured) -> Json {
    let Measured { busy, quiet, pool, .. } = measured;
    let by_kind = |value: &dyn Fn(usize) -> Json| {
        Kind::ALL.into_iter().map(|kind| (kind.name(), value(kind as usize))).collect::<Vec<_>>()
    };
    let mut latency = vec![("all", times_to_json(&measured.latency_of_all()))];
    latency.extend(by_kind(&|kind| times_to_json(&measured.latency[kind])));
    let mut members = vec![
        ("disks", Json::List(disks.iter().map(|disk| Json::text(&disk.kind)).collect())),
        ("disk-size", Json::Int(plan.size)),
        ("depth", Json::Int(plan.depth as u64)),
        ("requests", Json::Int(measured.requests())),
        ("counts", Json::Object(by_kind(&|kind| Json::Int(measured.counts[kind])))),
        ("requests-per-second", Json::Float(measured.rate())),
        ("busy", felt_to_json(busy)),
        ("latency-ns", Json::Object(latency)),
        (
            "threads",
            Json::Object(vec![
                ("reads", Json::Int(pool.reads)),
                ("writes", Json::Int(pool.writes)),
                ("flushes", Json::Int(pool.flushes)),
                ("zeroes", Json::Int(pool.zeroes)),
                ("discards", Json::Int(pool.discards)),
                ("allocates", Json::Int(pool.allocates)),
                ("truncates", Json::Int(pool.truncates)),
            ]),
        ),
        ("fallocates", Json::Int(measured.fallocates())),
        ("given-up-bytes", Json::Int(measured.given_up)),
        ("fallocates-per-64k", Json::Float(measured.per_64k())),
        ("quiet", felt_to_json(quiet)),
        ("space-back-ns", Json::Int(measured.space_back)),
        ("space-back-bytes", Json::Int(measured.space)),
        ("stopped", Json::Bool(measured.stopped)),
    ];
    if let Some((blocks, wrong)) = measured.checked {
        members.push(("checked-blocks", Json::Int(blocks)));
        members.push(("wrong-blocks", Json::Int(wrong)));
    }
    Json::Object(members)
}

fn felt_to_json(felt: &Felt) -> Json {
    Json::Object(vec![
        ("seconds", Json::Float(felt.nanos as f64 / 1e9)),
        ("turn-ns", times_to_json(&felt.turns)),
        ("run-ns", times_to_json(&felt.runs)),
        ("tick-ns", Json::Int(TICK.as_nanos() as u64)),
        ("ticks", Json::Int(felt.ticks)),
        ("ticks-missed", Json::Int(felt.missed)),
        ("tick-late-ns", times_to_json(&felt.late)),
    ])
}
