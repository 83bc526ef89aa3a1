//! A timeline tells all that happened in a run, and what is written from it is what it should be: JSON that
//! can be read, spans that nest, and no text that becomes part of a page.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use cowbell_engine::wait::On;
use cowbell_sim::page;
use cowbell_sim::perfetto;
use cowbell_sim::timeline::{By, EventKind, Op, Timeline, Verdict, Wait};
use cowbell_sim::trace::Trace;
use serde_json::Value;

const RAW: &str = "image format=raw state=cold backing=false cache=2 buffers=4 align=512 depth=64 \
                   grow=truncate ahead=16 can-zero=true probed=false lie=none";

fn trace(lines: &str) -> Trace {
    let text = format!("cowbell trace 1\n{lines}\n");
    text.parse().unwrap_or_else(|why| panic!("{why}:\n{text}"))
}

fn seen(lines: &str) -> Timeline {
    trace(lines).timeline().expect("the image can be made")
}

/// A disk whose flushes do nothing: a crash loses what is told to be stable.
const LIE: &str = "image format=qed state=cold backing=true cache=2 buffers=4 align=512 depth=64 grow=write \
                   ahead=16 can-zero=true probed=false lie=flush-does-nothing\n\
                   budget faults=0 ticks=0 stalls=false\n\
                   request zero 0x0+0x1000 unmap\nrequest flush\nrequest write 0x12c+0x12c fua";

/// Many requests to each format, in whatever order that comes to, with a crash after the first half.
fn long(format: &str) -> String {
    let mut lines =
        format!("{}\nbudget faults=0 ticks=0 crashes=1 stalls=false", RAW.replace("raw", format));
    for n in 0..40 {
        let at = n % 5 * 0x1000;
        lines += &match n % 8 {
            3 => "\nrequest flush".to_string(),
            5 => format!("\nrequest read {at:#x}+0x600"),
            6 => format!("\nrequest zero {at:#x}+0x1000 unmap"),
            _ => format!("\nrequest write {:#x}+0x600", at + 0x100 * (n % 3)),
        };
    }
    (0..20).for_each(|n| lines += &format!("\nchoice submit {n}"));
    lines + "\nchoice crash 0"
}

/// Traces of all kinds: each old defect's, a failing one, long ones.
fn traces() -> Vec<(String, Trace)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    let entries = fs::read_dir(folder).expect("the folder is there");
    let mut all: Vec<(String, Trace)> = entries
        .map(|entry| {
            let path = entry.expect("it can be read").path();
            let text = fs::read_to_string(&path).expect("traces are text");
            (path.display().to_string(), text.parse().expect("it is a trace"))
        })
        .collect();
    all.push(("a disk that lies".into(), trace(LIE)));
    for format in ["raw", "qed", "qcow2", "vmdk", "vdi"] {
        all.push((format!("a long run on {format}"), trace(&long(format))));
    }
    all
}

/// The data in a page.
fn data_of(html: &str) -> Value {
    let (_, rest) = html.split_once("id=\"data\">").expect("it has data");
    let (json, _) = rest.split_once("</script>").expect("it ends");
    serde_json::from_str(json).expect("it is JSON")
}

fn count(value: &Value) -> usize {
    value.as_array().expect("a list").len()
}

#[test]
fn every_request_is_there_and_ends_once() {
    for (name, trace) in traces() {
        let line = trace.timeline().expect("the image can be made");
        let failure = trace.replay().err().map(|failure| failure.verdict);
        let verdict = line.verdict.as_ref().map(|verdict| verdict.text.clone());
        assert_eq!(verdict, failure, "{name}: it goes as when it is replayed");

        let submitted = line.events.iter().filter(|event| event.kind == EventKind::Submit).count();
        let mut guests: Vec<u64> = Vec::new();
        for (place, request) in line.requests.iter().enumerate() {
            let last = line.events.len() as u32 - 1;
            let end = request.end.unwrap_or(last);
            let text = format!("{name}: {place} {request:?}");
            assert!(request.begin <= end && end <= last, "{text}");
            assert!(request.end.is_some() || failure.is_some(), "{text}");
            let mut free_from = request.begin;
            for stay in &request.stays {
                assert!(free_from <= stay.from && stay.from <= stay.to && stay.to <= end, "{text}");
                free_from = stay.to;
                for other in [stay.keeper, stay.ahead, stay.let_go_by].into_iter().flatten() {
                    let other = &line.requests[other];
                    assert!(other.begin <= stay.to, "{text}: {other:?}");
                    assert!(other.end.is_none_or(|gone| gone >= stay.from), "{text}: {other:?}");
                }
            }
            match request.by {
                By::Guest(tag) => guests.push(tag),
                By::Nobody => {}
                By::Request(parent) => {
                    // It may have something left to do when it has answered.
                    let parent = &line.requests[parent];
                    let meets = parent.end.is_none_or(|its| request.begin <= its);
                    assert!(parent.begin <= request.begin && meets, "{text}: {parent:?}");
                }
            }
        }
        assert_eq!(guests.len(), submitted, "{name}: {:#?}", line.requests);
        guests.sort_unstable();
        guests.dedup();
        assert_eq!(guests.len(), submitted, "{name}: none is there twice");
        for op in &line.ops {
            let owner = &line.requests[op.request];
            assert!(owner.begin <= op.from, "{name}: {op:?} {owner:?}");
            assert!(op.to.is_some() || failure.is_some(), "{name}: {op:?}");
            let in_time = |to| op.from <= to && owner.end.is_none_or(|end| to <= end);
            assert!(op.to.is_none_or(in_time), "{name}: {op:?} {owner:?}");
        }
        // Each completion that was chosen is that of an op which is there.
        let ends = line.events.iter().filter(|event| event.what.starts_with("op ")).count();
        let told = |op: &&Op| !op.how.is_empty() && op.how != "crash";
        let tries: usize = line.ops.iter().map(|op| op.tries.len()).sum();
        assert_eq!(line.ops.iter().filter(told).count() + tries, ends, "{name}");
    }
}

#[test]
fn what_a_request_waits_for_and_for_whom_is_told() {
    // Two writes into one block of the disk: the second waits until the first has put the block together.
    let line = seen(&format!(
        "{RAW}\nbudget faults=0 ticks=0 stalls=false\nrequest write 0x10+0x10\nrequest write 0x80+0x10\n\
         choice submit 0\nchoice submit 1"
    ));
    let blocks = Wait::List(On::Blocks);
    let (waiter, stay) = line
        .requests
        .iter()
        .flat_map(|request| request.stays.iter().map(move |stay| (request, stay)))
        .find(|(_, stay)| stay.wait == blocks)
        .expect("one waits for the other's blocks");
    let keeper = &line.requests[stay.keeper.expect("it is known for whom")];
    assert!(waiter.what.contains("0x80+0x10"), "{waiter:?}");
    assert!(keeper.what.contains("0x10+0x10"), "{keeper:?}");
    assert_eq!((stay.to, stay.let_go_by), (keeper.end.expect("it ends"), stay.keeper));

    // Three flushes: the second and the third come too late for the first, and share the next.
    let line = seen(&format!(
        "{RAW}\nbudget faults=0 ticks=0 stalls=false\nrequest write 0x0+0x200\nrequest flush\nrequest flush\n\
         request flush\nchoice submit 0\nchoice end 0.0 ok\nchoice submit 1\nchoice submit 2\nchoice submit 3"
    ));
    let flushes: Vec<_> = line.requests.iter().filter(|request| request.what == "flush").collect();
    assert_eq!(flushes.len(), 3);
    let for_whom = |which: usize| {
        let stay = flushes[which].stays.iter().find(|stay| stay.wait == Wait::Flush);
        stay.and_then(|stay| stay.keeper).map(|keeper| line.requests[keeper].number)
    };
    assert_eq!(for_whom(0), None);
    assert_eq!((for_whom(1), for_whom(2)), (Some(flushes[0].number), Some(flushes[0].number)));
    assert_eq!(line.ops.iter().filter(|op| op.is_flush).count(), 2, "{:#?}", line.ops);
}

#[test]
fn what_a_crash_cuts_off_is_marked() {
    let line = seen(&long("qcow2"));
    let crash = line.events.iter().position(|event| event.kind == EventKind::Crash);
    let crash = crash.expect("it is in the trace") as u32;
    let cut: Vec<_> = line.requests.iter().filter(|request| request.result == "crash").collect();
    assert!(!cut.is_empty());
    assert!(cut.iter().all(|request| request.end == Some(crash) && request.life == 0), "{cut:#?}");
    assert!(line.requests.iter().any(|request| request.life == 1 && request.begin >= crash));

    let line = seen(LIE);
    let Some(Verdict { at, is_crash: true, .. }) = line.verdict else {
        panic!("a crash leaves something wrong: {:?}", line.verdict)
    };
    assert_eq!(at as usize, line.events.len() - 1);
    // What fails in an event is said of that event; what was in flight then is there, and has no end.
    let mut lines = format!(
        "{RAW}\nbudget faults=0 ticks=0 stalls=false pauses=100\nrequest write 0x0+0x200\nchoice submit 0"
    );
    (0..100).for_each(|_| lines += "\nchoice pause\nchoice unpause");
    let line = seen(&lines);
    let verdict = line.verdict.as_ref().expect("a run is over after so many events");
    assert!(!verdict.is_crash && verdict.text.starts_with("not over after 128"), "{verdict:?}");
    assert_eq!((verdict.at, line.events.len()), (129, 130));
    assert_eq!((line.requests[0].end, line.ops[0].to), (None, None), "{:#?}", line.requests);
    assert_eq!(line.requests[0].stays.last().map(|stay| stay.to), Some(129));
}

#[test]
fn deadlines_and_ends_that_did_a_part_are_noted() {
    let line = seen(&format!(
        "{RAW}\nbudget faults=1 ticks=0 stalls=false\nrequest write 0x0+0x1000\nchoice submit 0\n\
         choice end 0.0 short"
    ));
    let op = &line.ops[0];
    assert_eq!((op.tries.as_slice(), op.how.as_str()), (&[(2, "short".to_string())][..], "ok"));
    assert!(!op.is_bad && op.to == Some(3), "{op:?}");
    let line = seen(&LIE.replace("flush-does-nothing", "none").replace("ticks=0", "ticks=1"));
    assert_eq!(line.verdict, None);
    assert!(line.events.iter().any(|event| event.deadline.is_some()));
}

#[test]
fn a_page_has_it_all() {
    for (name, trace) in traces() {
        let line = trace.timeline().expect("the image can be made");
        let html = page::to_html(&line);
        let data = data_of(&html);
        assert_eq!(count(&data["events"]), line.events.len(), "{name}");
        assert_eq!(count(&data["requests"]), line.requests.len(), "{name}");
        assert_eq!(count(&data["ops"]), line.ops.len(), "{name}");
        for (told, request) in
            data["requests"].as_array().expect("a list").iter().zip(&line.requests)
        {
            assert_eq!(told["what"], request.what.as_str(), "{name}");
            assert_eq!(told["begin"], request.begin, "{name}");
            assert_eq!(told["end"].as_u64(), request.end.map(u64::from), "{name}");
            assert_eq!(count(&told["stays"]), request.stays.len(), "{name}");
        }
        assert_eq!(data["verdict"].is_null(), line.verdict.is_none(), "{name}");
        // It needs nothing but itself.
        for word in ["http:", "https:", "src=", "@import", "url(", "fetch("] {
            assert!(!html.contains(word), "{name}: {word}");
        }
    }
}

#[test]
fn no_text_becomes_part_of_a_page() {
    let hostile =
        "</script><script>document.title='hacked'</script><!--<script>\u{2028}\"'\\\n\u{1}/*JS*/";
    let mut line = seen(LIE);
    line.title = hostile.into();
    line.about = vec![hostile.into()];
    line.recorded = Some(hostile.into());
    line.verdict.as_mut().expect("it fails").text = hostile.into();
    line.events.iter_mut().for_each(|event| event.what = hostile.into());
    for request in &mut line.requests {
        (request.what, request.result, request.node) =
            (hostile.into(), hostile.into(), hostile.into());
    }
    line.ops.iter_mut().for_each(|op| (op.file, op.how) = (hostile.into(), hostile.into()));
    let (html, plain) = (page::to_html(&line), page::to_html(&seen(LIE)));
    for mark in ["<script", "</script", "<!--", "<"] {
        assert_eq!(html.matches(mark).count(), plain.matches(mark).count(), "{mark}");
    }
    let data = data_of(&html);
    for value in
        [&data["title"], &data["about"][0], &data["events"][1]["what"], &data["ops"][0]["file"]]
    {
        assert_eq!(value, hostile);
    }
    // The page's code makes no markup.
    for word in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
        assert!(!plain.contains(word), "{word}");
    }
    let all: Value = serde_json::from_str(&perfetto::to_json(&line)).expect("it is JSON");
    let events = all["traceEvents"].as_array().expect("a list");
    assert!(events.iter().any(|event| event["name"] == hostile));
}

/// Process, thread and time.
type Place = (u64, u64, u64);

/// What a reader of Chrome traces asks of one.
#[test]
fn a_perfetto_trace_is_as_its_format_wants_it() {
    for (name, trace) in traces() {
        let line = trace.timeline().expect("the image can be made");
        let json = perfetto::to_json(&line);
        let all: Value = serde_json::from_str(&json).expect("it is JSON");
        let events = all["traceEvents"].as_array().expect("a list");
        let (mut spans, mut open) =
            (BTreeMap::<_, usize>::new(), BTreeMap::<_, Vec<(&str, u64)>>::new());
        let mut slices: BTreeMap<(u64, u64), Vec<(u64, u64)>> = BTreeMap::new();
        let mut flows: BTreeMap<u64, [Vec<Place>; 2]> = BTreeMap::new();
        let mut counters = BTreeMap::new();
        for event in events {
            let number =
                |key: &str| event[key].as_u64().unwrap_or_else(|| panic!("{key} of {event}"));
            let text =
                |key: &str| event[key].as_str().unwrap_or_else(|| panic!("{key} of {event}"));
            match text("ph") {
                "b" => {
                    *spans.entry(text("cat")).or_default() +=
                        usize::from(open.get(&(text("cat"), text("id"))).is_none_or(Vec::is_empty));
                    open.entry((text("cat"), text("id")))
                        .or_default()
                        .push((text("name"), number("ts")));
                }
                "e" => {
                    let began = open.get_mut(&(text("cat"), text("id"))).and_then(Vec::pop);
                    let (its, from) =
                        began.unwrap_or_else(|| panic!("{name}: {event} has no begin"));
                    assert!(
                        its == text("name") && from < number("ts"),
                        "{name}: {its} {from} {event}"
                    );
                }
                "X" => {
                    let span = (number("ts"), number("ts") + number("dur"));
                    slices.entry((number("pid"), number("tid"))).or_default().push(span);
                }
                "s" | "f" => {
                    let at = (number("pid"), number("tid"), number("ts"));
                    flows.entry(number("id")).or_default()[usize::from(text("ph") == "f")].push(at);
                }
                "C" => {
                    let now = event["args"]["count"].as_i64().expect("a number");
                    assert!(now >= 0, "{name}: {event}");
                    counters.insert(text("name"), now);
                }
                "M" | "i" => {}
                other => panic!("{name}: {other} in {event}"),
            }
        }
        assert!(open.values().all(Vec::is_empty), "{name}: {open:?}");
        assert_eq!(spans.get("request"), Some(&line.requests.len()), "{name}");
        assert_eq!(spans.get("op").copied().unwrap_or(0), line.ops.len(), "{name}");
        for (thread, slices) in &slices {
            for a in slices {
                for b in slices {
                    assert!(
                        !(a.0 < b.0 && b.0 < a.1 && a.1 < b.1),
                        "{name}: {thread:?}: {a:?} {b:?} overlap"
                    );
                }
            }
        }
        for (id, [starts, ends]) in &flows {
            let ([start], [end]) = (starts.as_slice(), ends.as_slice()) else {
                panic!("{name}: flow {id} has no start and end: {starts:?} {ends:?}")
            };
            assert!(start.2 < end.2, "{name}: flow {id} goes back");
            for &(pid, tid, ts) in [start, end] {
                let is_in = |span: &&(u64, u64)| span.0 <= ts && ts < span.1;
                assert!(
                    slices[&(pid, tid)].iter().any(|span| is_in(&span)),
                    "{name}: flow {id} hangs at {ts}"
                );
            }
        }
        if line.verdict.is_none() {
            assert_eq!(
                counters.values().copied().collect::<Vec<_>>(),
                [0, 0],
                "{name}: {counters:?}"
            );
        }
        let goes_on = line.requests.iter().flat_map(|request| &request.stays);
        let goes_on = goes_on.filter(|stay| stay.let_go_by.is_some() && stay.to > stay.from);
        assert_eq!(flows.len(), goes_on.count(), "{name}");
    }
}
