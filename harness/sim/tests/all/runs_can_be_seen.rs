//! A timeline tells all that happened in a run, and what is written from it is what it should be: JSON that
//! can be read, spans that nest, and no text that becomes part of a page.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use cowbell_engine::step::Driver;
use cowbell_engine::units::FileId;
use cowbell_engine::wait::On;
use cowbell_formats::Node;
use cowbell_sim::choose::{Choice, Replay};
use cowbell_sim::explore::{Counts, run};
use cowbell_sim::page;
use cowbell_sim::perfetto;
use cowbell_sim::states::{STATES, meaning};
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

/// What is done and not flushed: the timeline finds it from what came before what, the simulated disk knows it.
#[test]
fn what_is_not_safe_yet_is_what_the_disk_says() {
    let mut seen = [0; 2];
    let honest = |(_, trace): &(String, Trace)| trace.image.lie.is_none();
    for (name, trace) in traces().into_iter().filter(honest) {
        let mut path = Vec::new();
        let mut chooser = Replay::new(trace.choices.iter().copied());
        let mut world = trace.world().expect("the image can be made");
        let _ = run(&world, &mut chooser, 1, &mut Counts::default(), &mut path);
        let line = trace.timeline().expect("the image can be made");
        // A stable write takes older ones to the same sectors with it.
        let is_plain = line.ops.iter().all(|op| op.kind != "stable write");
        let mut life = 0;
        for (at, &choice) in path.iter().enumerate() {
            life += u32::from(matches!(choice, Choice::Crash(_)));
            if world.apply(choice).is_err() {
                break;
            }
            let at = at as u32 + 1;
            let backend = world.engine().backend();
            let files = (0..backend.file_count()).map(|file| backend.file(FileId(file as u32)));
            let known: BTreeSet<(u32, u32)> = files
                .flat_map(|file| file.uncovered())
                .map(|op| (op.request, op.ordinal))
                .collect();
            let is_loose = |op: &&Op| {
                line.requests[op.request].life == life
                    && op.to.is_some_and(|to| to <= at)
                    && op.unsafe_until.is_some_and(|until| at < until)
            };
            let loose = line.ops.iter().filter(is_loose);
            let told: BTreeSet<(u32, u32)> =
                loose.map(|op| (line.requests[op.request].number, op.ordinal)).collect();
            // Of an op that has done a part so far the disk has that part.
            let begun = line.ops.iter().filter(|op| !op.tries.is_empty());
            let begun: BTreeSet<(u32, u32)> =
                begun.map(|op| (line.requests[op.request].number, op.ordinal)).collect();
            let known: BTreeSet<_> = known.difference(&begun).copied().collect();
            let told: BTreeSet<_> = told.difference(&begun).copied().collect();
            assert!(known.is_subset(&told), "{name}: after event {at}: {known:?} {told:?}");
            if is_plain {
                assert_eq!(told, known, "{name}: after event {at}: {:#?}", line.ops);
            }
            seen[0] += known.len();
            seen[1] += usize::from(is_plain);
        }
    }
    assert!(seen.iter().all(|count| *count > 50), "{seen:?}");
}

#[test]
fn a_flush_that_comes_too_early_makes_nothing_safe() {
    let line = seen(&format!(
        "{RAW}\nbudget faults=0 ticks=0 stalls=false\nrequest write 0x0+0x200\nrequest write 0x1000+0x200\n\
         request flush\nchoice submit 0\nchoice submit 1\nchoice end 0.0 ok\nchoice submit 2\n\
         choice end 1.0 ok\nchoice end 2.0 ok"
    ));
    let flushes: Vec<&Op> = line.ops.iter().filter(|op| op.is_flush).collect();
    let told = |which: usize| (line.ops[which].unsafe_until, line.ops[which].is_safe);
    assert_eq!(told(0), (flushes[0].to, true), "{:#?}", line.ops);
    assert_eq!((told(1).0 > flushes[0].to, told(1).1), (true, true), "the drain flushes it");
    // Nobody flushes after a flush that has failed.
    let line = seen(&format!(
        "{RAW}\nbudget faults=1 ticks=0 stalls=false\nrequest write 0x0+0x200\nrequest flush\n\
         choice submit 0\nchoice end 0.0 ok\nchoice submit 1\nchoice end 1.0 eio"
    ));
    let end = line.events.len() as u32;
    assert_eq!((line.ops[0].unsafe_until, line.ops[0].is_safe), (Some(end), false));
}

#[test]
fn it_is_told_what_the_failing_crash_has_kept_and_lost() {
    let line = seen(LIE);
    let verdict = line.verdict.as_ref().expect("it fails");
    assert!(verdict.is_crash && !verdict.left.is_empty(), "{verdict:?}");
    let words = verdict.more.join("\n");
    for left in &verdict.left {
        let op = &line.ops[left.op];
        let of_op = op.offset..op.offset + op.len;
        let ranges = left.kept.iter().chain(&left.lost);
        for range in ranges {
            assert!(range.start >= of_op.start && range.end <= of_op.end, "{range:?} of {op:?}");
        }
        assert!(words.contains(&line.op_name(op)), "{words}");
    }
    assert!(verdict.left.iter().any(|left| !left.lost.is_empty()), "{words}");
    let data = data_of(&page::to_html(&line));
    assert_eq!(count(&data["verdict"]["left"]), verdict.left.len());
    assert_eq!(count(&data["verdict"]["more"]), verdict.more.len());
}

/// Where the disk's bytes are wrong, the ops that change the first of them are named: of a write in place and one to a
/// new cluster the one that is done last.
#[test]
fn it_is_told_which_ops_change_the_wrong_byte() {
    let line = seen(
        "image format=qed state=cold backing=true cache=2 buffers=4 align=512 depth=64 grow=truncate ahead=16 \
         can-zero=true probed=false lie=none\nbudget faults=0 ticks=0 stalls=false\nplant cow_from_wrong_cluster\n\
         request write 0x400+0x200",
    );
    let words = line.verdict.as_ref().expect("it fails").more.join("\n");
    let (_, history) = words.split_once("Ops that change that byte: ").expect(&words);
    let is_write = |op: &&Op| {
        op.kind == "write" && op.len == 0x1000 && line.requests[op.request].by == By::Guest(0)
    };
    let write = line.ops.iter().rfind(is_write).expect("the cluster is written");
    let to = write.to.expect("it is done");
    assert!(
        history.starts_with(&format!("{}, done in event {to}.", line.op_name(write))),
        "{words}"
    );
    assert!(line.title.ends_with("on a simulated disk (f1, over f0)"), "{}", line.title);
}

#[test]
fn it_is_told_what_a_check_says_of_what_a_crash_has_left() {
    let line = seen(&format!(
        "{}\nbudget faults=0 ticks=0 stalls=false\nplant qcow2_reserve_before_stable\nrequest write 0x1400+0x200 fua\n\
         choice submit 0\nchoice end 2.0 ok\nchoice end 2.1 ok\nchoice end 0.0 ok",
        RAW.replace("raw", "qcow2")
    ));
    let verdict = line.verdict.as_ref().expect("a cluster counts as free");
    assert!(verdict.is_crash && verdict.text.contains("2 corruptions"), "{verdict:?}");
    let says = verdict.more.iter().filter(|line| line.starts_with("A check says: ERROR "));
    assert_eq!(says.count(), 2, "{verdict:?}");
}

#[test]
fn it_is_told_who_waits_for_ever() {
    let line = seen(
        "image format=qed state=cold backing=false cache=2 device=0 buffers=4 align=512 depth=64 grow=truncate \
         ahead=16 can-zero=true probed=false lie=none\nbudget faults=0 ticks=0 stalls=false\nplant device_grows\n\
         request write 0x2000+0x200",
    );
    let verdict = line.verdict.as_ref().expect("it is stuck");
    assert!(verdict.text.starts_with("stuck: "), "{verdict:?}");
    let waits = "request 0 (#0) (write 0x2000+0x200) waits for a file that is being made longer.";
    let none = "No op is in flight whose end could let anybody go on.";
    assert_eq!(verdict.more, [waits, none]);
}

/// The state that was asked is marked, and what came of it is shown behind.
#[test]
fn what_does_not_end_well_when_all_is_well_is_shown_from_there() {
    let lines = format!(
        "{}\nbudget faults=0 ticks=0 stalls=false\nrequest write 0x0+0xc000",
        RAW.replace("lie=none", "lie=sector-at-a-time")
    );
    let line = seen(&lines);
    let verdict = line.verdict.as_ref().expect("it ends late");
    assert!(verdict.text.starts_with("when all is well again: not over after 64"), "{verdict:?}");
    let asked = line.calm_from.expect("it is known when it was asked");
    let failed = trace(&lines).replay().expect_err("it fails");
    assert_eq!(asked as usize, failed.path.len() + 1);
    assert_eq!((verdict.at, verdict.at - asked), (line.events.len() as u32 - 1, 64));
    assert_eq!(data_of(&page::to_html(&line))["calm"], asked);
    let cause = cowbell_sim::cause::cause(&trace(&lines), 1000).expect("it fails");
    assert_eq!(cause.at, None, "{cause}");
}

/// The names of states are in the drivers and the engine, what they mean is in one list.
#[test]
fn each_state_has_a_meaning_and_each_meaning_a_state() {
    let mut names: BTreeSet<&str> = <Node as Driver>::STATES.iter().copied().collect();
    let engine = concat!(env!("CARGO_MANIFEST_DIR"), "/../../engine/src/engine/asked.rs");
    let engine = fs::read_to_string(engine).expect("the engine's names are there");
    names.extend(
        engine
            .lines()
            .filter(|line| !line.trim().starts_with("//"))
            .flat_map(|line| line.split('"').skip(1).step_by(2)),
    );
    let told: BTreeSet<&str> = STATES.iter().map(|(name, _)| *name).collect();
    assert_eq!(told.len(), STATES.len(), "none is there twice");
    assert_eq!(told, names);
    let line = seen(LIE);
    let data = data_of(&page::to_html(&line));
    for stay in line.requests.iter().flat_map(|request| &request.stays) {
        assert_eq!(data["states"][stay.state].as_str(), meaning(stay.state), "{}", stay.state);
        assert!(meaning(stay.state).is_some());
    }
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
