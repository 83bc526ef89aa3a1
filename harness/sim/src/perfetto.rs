//! A timeline in the Chrome trace event format, which Perfetto opens.
//!
//! Requests are asynchronous spans with their states nested in them, ops are such spans as well: they may
//! overlap. Waits for others are slices on a thread for each request, since only slices have arrows
//! (flows): one leads from whoever let a request go on to the wait that it ended. Counters say how much is
//! in flight. An event lasts a millisecond: what matters is what came before what.

use std::fmt::Write;

use crate::gate::quoted;
use crate::timeline::{By, Request, Timeline};

/// Microseconds of the picture for an event.
const STEP: u64 = 1000;

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
    happenings(line, &mut events);
    for (place, request) in line.requests.iter().enumerate() {
        spans(line, place, request, &mut events);
    }
    for (place, op) in line.ops.iter().enumerate() {
        let name = format!("op {}.{} {}", line.requests[op.request].number, op.ordinal, op.kind);
        let how = if op.to.is_none() { "never came back" } else { &op.how };
        let args = format!(
            "{{\"file\":{},\"offset\":{},\"len\":{},\"how\":{}}}",
            quoted(&op.file),
            op.offset,
            op.len,
            quoted(how)
        );
        let (from, to) = (op.from, op.to.unwrap_or(last(line)));
        pair(&mut events, "op", &format!("o{place}"), &name, from.into(), to.into(), &args);
    }
    waits(line, &mut events);
    counters(line, &mut events);
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

fn happenings(line: &Timeline, out: &mut Vec<String>) {
    for (at, event) in line.events.iter().enumerate() {
        out.push(format!(
            "{{\"ph\":\"X\",\"pid\":{RUN},\"tid\":0,\"ts\":{},\"dur\":{},\"cat\":\"{}\",\"name\":{},\
             \"args\":{{\"time_ns\":{},\"crash_images\":{}}}}}",
            at as u64 * STEP,
            STEP * 9 / 10,
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
            u64::from(verdict.at) * STEP,
            quoted(&name),
            quoted(&verdict.text)
        ));
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// A span, which may overlap others: those of one `id` nest.
fn pair(out: &mut Vec<String>, cat: &str, id: &str, name: &str, from: u64, to: u64, args: &str) {
    // What begins and ends in one event is seen nevertheless.
    let (from, to) = (from * STEP, if to > from { to * STEP } else { from * STEP + STEP / 2 });
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

fn spans(line: &Timeline, place: usize, request: &Request, out: &mut Vec<String>) {
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
    pair(&mut states, "request", &id, &name, request.begin.into(), end.into(), &args);
    let close = states.pop();
    for stay in request.stays.iter().filter(|stay| stay.to > stay.from) {
        let args = format!("{{\"waits for\":{}}}", quoted(stay.wait.words()));
        let (from, to) = (stay.from.into(), stay.to.into());
        pair(&mut states, "request", &id, stay.state, from, to, &args);
    }
    states.extend(close);
    out.extend(states);
}

/// A thread for each request that waits for others, or lets others go on.
fn waits(line: &Timeline, out: &mut Vec<String>) {
    let mut named = vec![false; line.requests.len()];
    let mut flow = 0;
    for (place, request) in line.requests.iter().enumerate() {
        for stay in request.stays.iter().filter(|stay| stay.wait.is_for_others()) {
            if stay.to == stay.from {
                continue;
            }
            named[place] = true;
            let (ts, dur) = (u64::from(stay.from) * STEP, u64::from(stay.to - stay.from) * STEP);
            out.push(format!(
                "{{\"ph\":\"X\",\"pid\":{WAITS},\"tid\":{place},\"ts\":{ts},\"dur\":{dur},\"cat\":\"wait\",\
                 \"name\":{}}}",
                quoted(&format!("waits for {}", stay.wait.words()))
            ));
            let Some(by) = stay.let_go_by else { continue };
            named[by] = true;
            flow += 1;
            // It ends where a wait of the other may begin: each arrow has a slice of its own at its start,
            // which ends before that moment.
            let (end, short) = (ts + dur, STEP / 10);
            let name = quoted(&format!("lets {} go on", request.name()));
            out.push(format!(
                "{{\"ph\":\"X\",\"pid\":{WAITS},\"tid\":{by},\"ts\":{},\"dur\":{short},\"cat\":\"wait\",\
                 \"name\":{name}}}",
                end - 2 * short
            ));
            for (ph, tid, ts, more) in
                [("s", by, end - 3 * short / 2, ""), ("f", place, end - short, ",\"bp\":\"e\"")]
            {
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

fn counters(line: &Timeline, out: &mut Vec<String>) {
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
                at as u64 * STEP
            ));
        }
    }
}
