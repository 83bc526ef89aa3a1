//! `sim` prints what was tried, replays traces, and says in one line what it cannot do.

use crate::common::Place;

#[test]
fn exploring_prints_counts_for_people_and_for_programs() {
    let place = Place::new();
    let said = place.ok("cowbell sim explore --format raw --ops 1 --faults 1");
    for word in ["workloads", "schedules", "crash images", "no failure"] {
        assert!(said.contains(word), "{said}");
    }
    let json = place.ok("cowbell sim explore --format qed --ops 1 --faults 0 --json");
    assert!(json.starts_with('{') && json.contains("\"good\":true"), "{json}");
}

#[test]
fn random_runs_are_made_by_seed() {
    let place = Place::new();
    let once = || {
        let json = place.ok("cowbell sim random --seed 7 --runs 20 --json");
        json.split(",\"transitions\":").nth(1).and_then(|s| s.split(',').next()).map(str::to_owned)
    };
    assert!(once().is_some());
    assert_eq!(once(), once());
}

#[test]
fn runs_end_when_time_is_over() {
    let place = Place::new();
    let said = place.ok("cowbell sim random --time 0.2s --cores 1");
    assert!(said.contains("on 1 threads") && said.contains("no failure"), "{said}");
    let said = place.ok("cowbell sim explore -f raw --time 0m");
    assert!(said.contains("stopped before the end"), "{said}");
    let out = place.ours("cowbell sim random --time 3d");
    assert_eq!(out.status.code(), Some(1));
}

#[test]
fn a_recorded_trace_is_run_again() {
    let place = Place::new();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../sim/regressions");
    for entry in std::fs::read_dir(folder).expect("it is there") {
        let path = entry.expect("it is readable").path();
        let said = place.ok(&format!("cowbell sim replay {}", path.display()));
        assert!(said.contains("no failure"), "{said}");
    }
}

#[test]
fn what_is_no_trace_is_refused_in_one_line() {
    let place = Place::new();
    std::fs::write(place.path("junk"), "this is\nno trace\n").expect("it is written");
    for line in [
        "cowbell sim replay junk",
        "cowbell sim replay missing",
        "cowbell sim explore --format floppy",
    ] {
        let out = place.ours(line);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{line}: {said}");
        assert_eq!(said.lines().count(), 1, "{line}: {said}");
        assert!(said.starts_with("cowbell: sim: "), "{line}: {said}");
    }
}
