//! What an embedder's loop feels is measured and said: how long a turn takes, and what that does to
//! everything else in the loop. No time is looked at here, only that the figures fit together.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{COWBELL, Place};

/// The number that is called by the last of `names`, in the objects that are called by the others.
fn number(json: &str, names: &[&str]) -> f64 {
    let mut rest = json;
    for name in names {
        let name = format!("\"{name}\": ");
        let at = rest.find(&name).unwrap_or_else(|| panic!("no {names:?} in {json}"));
        rest = &rest[at + name.len()..];
    }
    let end = rest.find([',', '\n']).expect("it ends");
    rest[..end].parse().unwrap_or_else(|_| panic!("{names:?} is no number in {json}"))
}

/// Times are in order, and so many.
fn assert_times(json: &str, names: &[&str], count: Option<f64>) {
    let of = |what| number(json, &[names, &[what]].concat());
    let (p50, p99, p999, max) = (of("p50"), of("p99"), of("p99.9"), of("max"));
    assert!(p50 <= p99 && p99 <= p999 && p999 <= max, "{names:?} in {json}");
    assert!(of("sum") >= max && of("sum") <= max * of("count"), "{names:?} in {json}");
    assert!(count.is_none_or(|count| of("count") == count), "{names:?} in {json}");
}

/// What `bench --loop` says about so many requests; their sum if it is not known.
fn assert_sane(json: &str, requests: Option<f64>) {
    let all = number(json, &["requests"]);
    assert!(all > 0.0 && requests.is_none_or(|requests| requests == all), "{json}");
    let mut sum = 0.0;
    for kind in ["read", "write", "zero", "discard", "flush"] {
        let count = number(json, &["counts", kind]);
        assert_times(json, &["latency-ns", kind], Some(count));
        sum += count;
    }
    assert_eq!(sum, all, "{json}");
    assert_times(json, &["latency-ns", "all"], Some(all));
    assert_times(json, &["busy", "turn-ns"], None);
    assert_times(json, &["busy", "run-ns"], Some(number(json, &["busy", "turn-ns", "count"])));
    assert!(number(json, &["busy", "turn-ns", "sum"]) >= number(json, &["busy", "run-ns", "sum"]));
    assert!(number(json, &["requests-per-second"]) > 0.0);
    for phase in ["busy", "quiet"] {
        let [ticks, missed] = ["ticks", "ticks-missed"].map(|name| number(json, &[phase, name]));
        assert_times(json, &[phase, "tick-late-ns"], Some(ticks - missed));
    }
    assert!(number(json, &["quiet", "ticks"]) > 0.0, "{json}");
    let by_threads = |what| number(json, &["threads", what]);
    let fallocates = by_threads("zeroes") + by_threads("discards") + by_threads("allocates");
    assert_eq!(number(json, &["fallocates"]), fallocates);
}

#[test]
fn by_a_device_model_on_thin_disks() {
    let place = Place::new();
    std::fs::create_dir(place.path("disks")).expect("a folder");
    let line = "cowbell bench --loop -c 300 --disk-size 32M --check --json disks";
    let json = place.ok(line);
    assert_sane(&json, Some(300.0));
    assert_eq!(number(&json, &["wrong-blocks"]), 0.0, "{json}");
    assert_eq!(number(&json, &["checked-blocks"]), 2.0 * 8192.0);
    assert_eq!(std::fs::read_dir(place.path("disks")).expect("it is there").count(), 0);
}

#[test]
fn by_a_device_model_on_disks_of_every_format() {
    let place = Place::new();
    let text = place.ok("cowbell bench --loop -c 2000 -d 40 --disks raw,qed,qcow2,overlay,vmdk \
        --disk-size 4M --mix 2,3,2,2,1 --check --random 7 .");
    for line in ["Requests: 2000 in ", "Loop held per turn: p50 ", "Timer: ", "Quiet: "] {
        assert!(text.contains(line), "{text}");
    }
    assert!(text.contains("Check: 0 of 5120 blocks are wrong"), "{text}");
}

#[test]
fn by_a_device_model_that_is_stopped() {
    let place = Place::new();
    let child = Command::new(COWBELL)
        .args(["bench", "--loop", "--seconds", "1000", "--disk-size", "16M", "--json"])
        .args(["-t", "writeback", "--check", "."])
        .current_dir(place.dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    std::thread::sleep(Duration::from_millis(700));
    place.ok(&format!("kill -INT {}", child.id()));
    let out = child.wait_with_output().expect("it ends");
    let json = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(130), "{json}");
    assert!(json.contains("\"stopped\": true"), "{json}");
    assert_eq!(number(&json, &["wrong-blocks"]), 0.0, "{json}");
    let left = std::fs::read_dir(place.dir.path()).expect("it is there");
    assert_eq!(left.count(), 1, "only the links to the command are left");
}

#[test]
fn what_a_device_model_cannot_do_is_refused() {
    let place = Place::new();
    for (options, why) in [
        ("--disks floppy", "'floppy' is no kind of disk"),
        ("--disks raw,,", "'' is no kind of disk"),
        ("-d 1", "less than one request at a time for each disk"),
        ("-d 4097", "Invalid queue depth specified. Must be between 1 and 4096."),
        ("--mix 1,2,3,4", "'1,2,3,4' is no mix"),
        ("--mix 1,2,3,4,x", "'1,2,3,4,x' is no mix"),
        ("--mix 1,2,3,4,5,x", "'1,2,3,4,5,x' is no mix"),
        ("--mix 0,0,0,0,0", "'0,0,0,0,0' is no mix"),
        ("--seconds 0", "Invalid seconds specified"),
        ("--disk-size 4k", "Invalid disk size specified"),
        ("-t unsafe", "cache modes none and writeback"),
        ("-t writeback -n", "native AIO requires the cache mode none"),
    ] {
        let out = place.ours(&format!("cowbell bench --loop --disk-size 1M {options} ."));
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(1) && said.contains(why), "{options}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert_eq!(std::fs::read_dir(place.dir.path()).expect("it is there").count(), 1);
}

#[test]
fn by_a_benchmark_that_is_asked_for_latency() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 a 64M");
    let bench = "cowbell bench -w -n -t none -f qcow2 --random 7 -c 2000 -d 32";
    let text = place.ok(&format!("{bench} --latency a"));
    let line = text.lines().find_map(|line| line.strip_prefix("Loop held per turn: "));
    let names: Vec<&str> = line.unwrap_or_default().split(", ").map(|item| &item[..3]).collect();
    assert_eq!(names, ["p50", "p99", "p99", "max"], "{text}");
    assert!(text.contains("\nLoop held in all: "), "{text}");
    let json = place.ok(&format!("{bench} --json a"));
    assert_times(&json, &["run-ns"], None);
    assert_times(&json, &["latency-ns"], Some(2000.0));
}
