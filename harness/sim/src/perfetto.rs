//! A timeline in the Chrome trace event format, which Perfetto opens.
//!
//! Requests are asynchronous spans with their states nested in them, ops are such spans as well: they may
//! overlap. Waits for others are slices on a thread for each request, since only slices have arrows
//! (flows): one leads from whoever let a request go on to the wait that it ended. Counters say how much is
//! in flight. An event lasts a millisecond: what matters is what came before what.

use std::fmt::Write;

use crate::gate::quoted;
use crate::timeline::{By, Request, Timeline};

/// Nanoseconds of the picture for an event of a simulated run.
const STEP: u64 = 1_000_000;

/// Where each event stands, in nanoseconds, and behind the last where the picture ends. None is where another is.
struct Times {
    of: Vec<u64>,
    /// Less than is between any two.
    short: u64,
}

impl Times {
    fn new(line: &Timeline) -> Times {
        if !line.is_timed {
            let of = (0..=line.events.len() as u64).map(|at| at * STEP).collect();
            return Times { of, short: STEP / 10 };
        }
        let first = line.events.first().map_or(0, |event| event.time);
        let mut of: Vec<u64> = Vec::new();
        for event in &line.events {
            let after = of.last().map_or(0, |last| last + LEAST);
            of.push(after.max(event.time.saturating_sub(first)));
        }
        of.push(of.last().map_or(0, |last| last + LEAST));
        Times { of, short: LEAST / 10 }
    }

    fn at(&self, at: u32) -> u64 {
        self.of[at as usize]
    }

    fn len(&self, from: u32, to: u32) -> u64 {
        self.at(to) - self.at(from)
    }
}

/// Nanoseconds between two events of a real run, at least.
const LEAST: u64 = 100;

/// As the format has it: microseconds.
fn micros(nanos: u64) -> String {
    match nanos % 1000 {
        0 => (nanos / 1000).to_string(),
        rest => format!("{}.{rest:03}", nanos / 1000),
    }
}

/// The process ids: what happened, requests, ops, waits.
const RUN: u32 = 1;
const WAITS: u32 = 2;

/// The timeline as JSON text.
pub fn to_json(line: &Timeline) -> String {
    let mut events = vec![
        meta("process_name", RUN, None, &format!("cowbell: {}", line.title)),
        meta("process_name", WAITS, None, "waits for others"),
        meta("thread_name", RUN, Some(0), "what happens"),
    ];
    let times = Times::new(line);
    happenings(line, &times, &mut events);
    for (place, request) in line.requests.iter().enumerate() {
        spans(line, &times, place, request, &mut events);
    }
    for (place, op) in line.ops.iter().enumerate() {
        let name = format!("op #{}.{} {}", line.requests[op.request].number, op.ordinal, op.kind);
        let how = if op.to.is_none() { "never came back" } else { &op.how };
        let args = format!(
            "{{\"file\":{},\"offset\":{},\"len\":{},\"how\":{}}}",
            quoted(&op.file),
            op.offset,
            op.len,
            quoted(how)
        );
        let (from, to) = (op.from, op.to.unwrap_or(last(line)));
        pair(&mut events, &times, "op", &format!("o{place}"), &name, (from, to), &args);
    }
    waits(line, &times, &mut events);
    counters(line, &times, &mut events);
    format!("{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}\n]}}\n", events.join(",\n"))
}

fn last(line: &Timeline) -> u32 {
    line.events.len().saturating_sub(1) as u32
}

fn meta(what: &str, pid: u32, tid: Option<usize>, name: &str) -> String {
    let tid = tid.map_or(String::new(), |tid| format!("\"tid\":{tid},"));
    format!(
        "{{\"ph\":\"M\",\"pid\":{pid},{tid}\"name\":\"{what}\",\"args\":{{\"name\":{}}}}}",
        quoted(name)
    )
}

fn happenings(line: &Timeline, times: &Times, out: &mut Vec<String>) {
    for (at, event) in line.events.iter().enumerate() {
        out.push(format!(
            "{{\"ph\":\"X\",\"pid\":{RUN},\"tid\":0,\"ts\":{},\"dur\":{},\"cat\":\"{}\",\"name\":{},\
             \"args\":{{\"time_ns\":{},\"crash_images\":{}}}}}",
            micros(times.at(at as u32)),
            micros(times.len(at as u32, at as u32 + 1) * 9 / 10),
            event.kind.name(),
            quoted(&event.what),
            event.time,
            event.crash_images
        ));
    }
    if let Some(verdict) = &line.verdict {
        let name = format!("WRONG: {}", first_line(&verdict.text));
        out.push(format!(
            "{{\"ph\":\"i\",\"s\":\"g\",\"pid\":{RUN},\"tid\":0,\"ts\":{},\"cat\":\"verdict\",\
             \"name\":{},\"args\":{{\"all\":{}}}}}",
            micros(times.at(verdict.at)),
            quoted(&name),
            quoted(&verdict.text)
        ));
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// A span, which may overlap others: those of one `id` nest.
fn pair(
    out: &mut Vec<String>,
    times: &Times,
    cat: &str,
    id: &str,
    name: &str,
    (from, to): (u32, u32),
    args: &str,
) {
    // What begins and ends in one event is seen nevertheless.
    let end = if to > from { times.at(to) } else { times.at(from) + 5 * times.short };
    let (from, to) = (micros(times.at(from)), micros(end));
    let name = quoted(name);
    for (ph, ts) in [("b", from), ("e", to)] {
        let mut text = format!(
            "{{\"ph\":\"{ph}\",\"pid\":{RUN},\"tid\":0,\"cat\":\"{cat}\",\"id\":\"{id}\",\"ts\":{ts},\
             \"name\":{name}"
        );
        if ph == "b" {
            // Writing to a string cannot fail.
            let _ = write!(text, ",\"args\":{args}");
        }
        out.push(text + "}");
    }
}

fn spans(line: &Timeline, times: &Times, place: usize, request: &Request, out: &mut Vec<String>) {
    let (id, end) = (format!("r{place}"), request.end.unwrap_or(last(line)));
    let name = format!("{}: {}", request.name(), request.what);
    let by = match request.by {
        By::Guest(tag) => format!("a guest, as {tag}"),
        By::Nobody => "nobody".into(),
        By::Request(other) => line.requests[other].name(),
    };
    let result = if request.end.is_none() { "never ended" } else { &request.result };
    let args = format!(
        "{{\"node\":{},\"asked by\":{},\"result\":{}}}",
        quoted(&request.node),
        quoted(&by),
        quoted(result)
    );
    // Within its begin and its end come its states, in their order.
    let mut states = Vec::new();
    pair(&mut states, times, "request", &id, &name, (request.begin, end), &args);
    let close = states.pop();
    for stay in request.stays.iter().filter(|stay| stay.to > stay.from) {
        let args = format!("{{\"waits for\":{}}}", quoted(stay.wait.words()));
        pair(&mut states, times, "request", &id, stay.state, (stay.from, stay.to), &args);
    }
    states.extend(close);
    out.extend(states);
}

/// A thread for each request that waits for others, or lets others go on.
fn waits(line: &Timeline, times: &Times, out: &mut Vec<String>) {
    let mut named = vec![false; line.requests.len()];
    let mut flow = 0;
    for (place, request) in line.requests.iter().enumerate() {
        for stay in request.stays.iter().filter(|stay| stay.wait.is_for_others()) {
            if stay.to == stay.from {
                continue;
            }
            named[place] = true;
            let (ts, dur) = (times.at(stay.from), times.len(stay.from, stay.to));
            let (from, length) = (micros(ts), micros(dur));
            out.push(format!(
                "{{\"ph\":\"X\",\"pid\":{WAITS},\"tid\":{place},\"ts\":{from},\"dur\":{length},\"cat\":\"wait\",\
                 \"name\":{}}}",
                quoted(&format!("waits for {}", stay.wait.words()))
            ));
            let Some(by) = stay.let_go_by else { continue };
            named[by] = true;
            flow += 1;
            // It ends where a wait of the other may begin: each arrow has a slice of its own at its start,
            // which ends before that moment.
            let (end, short) = (ts + dur, times.short);
            let name = quoted(&format!("lets {} go on", request.name()));
            out.push(format!(
                "{{\"ph\":\"X\",\"pid\":{WAITS},\"tid\":{by},\"ts\":{},\"dur\":{},\"cat\":\"wait\",\
                 \"name\":{name}}}",
                micros(end - 2 * short),
                micros(short)
            ));
            for (ph, tid, ts, more) in
                [("s", by, end - 3 * short / 2, ""), ("f", place, end - short, ",\"bp\":\"e\"")]
            {
                let ts = micros(ts);
                out.push(format!(
                    "{{\"ph\":\"{ph}\"{more},\"pid\":{WAITS},\"tid\":{tid},\"ts\":{ts},\"cat\":\"wait\",\
                     \"id\":{flow},\"name\":\"goes on\"}}"
                ));
            }
        }
    }
    for (place, _) in named.iter().enumerate().filter(|(_, named)| **named) {
        let request = &line.requests[place];
        let name = format!("{}: {}", request.name(), request.what);
        out.push(meta("thread_name", WAITS, Some(place), &name));
    }
}

fn counters(line: &Timeline, times: &Times, out: &mut Vec<String>) {
    let count = |spans: &mut dyn Iterator<Item = (u32, Option<u32>)>| {
        let mut change = vec![0_i64; line.events.len() + 1];
        for (from, to) in spans {
            change[from as usize] += 1;
            change[to.map_or(line.events.len(), |to| to as usize)] -= 1;
        }
        change
    };
    let requests = count(&mut line.requests.iter().map(|request| (request.begin, request.end)));
    let ops = count(&mut line.ops.iter().map(|op| (op.from, op.to)));
    for (name, change) in [("requests in flight", requests), ("ops in flight", ops)] {
        let mut now = 0;
        for (at, change) in change.iter().enumerate().take(line.events.len()) {
            now += change;
            if *change == 0 && at > 0 {
                continue;
            }
            out.push(format!(
                "{{\"ph\":\"C\",\"pid\":{RUN},\"ts\":{},\"name\":\"{name}\",\"args\":{{\"count\":{now}}}}}",
                micros(times.at(at as u32))
            ));
        }
    }
}
