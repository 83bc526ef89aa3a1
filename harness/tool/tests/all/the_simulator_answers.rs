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

#[test]
fn the_cause_of_a_failure_is_told() {
    let place = Place::new();
    let text = "cowbell trace 1\n\
        image format=raw lie=short-is-whole\n\
        budget faults=1 ticks=0\n\
        request write 0x0+0x800\n\
        request flush\n\
        choice submit 0\n\
        choice submit 1\n\
        choice end 0.0 short\n";
    std::fs::write(place.path("t"), text).expect("it is written");
    let said = place.ok("cowbell sim cause t --html page");
    assert!(said.contains("number 3 made that certain"), "{said}");
    assert!(said.contains("comes back with about half of it done"), "{said}");
    let page = std::fs::read_to_string(place.path("page")).expect("it was written");
    assert!(page.contains("\"cause\":{\"at\":3,"), "the page marks it");
    // Nothing is wrong with an honest device's.
    std::fs::write(place.path("t"), text.replace("lie=short-is-whole", "")).expect("it is written");
    let out = place.ours("cowbell sim cause t");
    assert_eq!(out.status.code(), Some(1));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(said, "cowbell: sim: t: this trace does not fail\n");
    // There is no such defect.
    std::fs::write(place.path("t"), text.replace("budget", "plant all_is_well\nbudget"))
        .expect("it is written");
    let out = place.ours("cowbell sim replay t");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("all_is_well"), "{said}");
}

/// Runs go on where they stopped; what failed is tried again, and told apart from what is new.
#[test]
fn long_runs_go_on() {
    let place = Place::new();
    let said = place.ok("cowbell sim random -f raw --runs 200 --state s");
    assert!(said.contains("next seed 200; failures: 0 new, 0 known, 0 mended"), "{said}");
    let said = place.ok("cowbell sim random -f raw --runs 100 --state s");
    assert!(said.contains("next seed 300; "), "{said}");
    // One that fails still, for its device lies, and one that does not any more.
    let failing = "cowbell trace 1\nimage format=raw lie=flush-does-nothing\nbudget faults=0 ticks=0\n\
        request write 0x0+0x400\nrequest flush\nverdict a crash left what was there before\n";
    let mended = "cowbell trace 1\nimage format=raw\nbudget faults=0 ticks=0\n\
        request write 0x0+0x400\nverdict after a crash: 1 leaks\n";
    let state = format!("cowbell runs 1\nnext 300\ntrace\n{failing}end\ntrace\n{mended}end\n");
    std::fs::write(place.path("s"), &state).expect("it is written");
    let out = place.ours("cowbell sim random -f raw --runs 50 --state s");
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("next seed 350; failures: 0 new, 1 known, 1 mended"), "{said}");
    assert!(said.contains("known: a crash left what was there before"), "{said}");
    assert!(said.contains("mended: after a crash: 1 leaks"), "{said}");
    let kept = std::fs::read_to_string(place.path("s")).expect("it is there");
    assert!(kept.contains("lie=flush-does-nothing") && !kept.contains("1 leaks"), "{kept}");
    for junk in ["", "cowbell runs 1\n", "cowbell runs 1\nnext 5\ntrace\njunk\nend\n"] {
        std::fs::write(place.path("s"), junk).expect("it is written");
        let out = place.ours("cowbell sim random -f raw --runs 50 --state s");
        assert_eq!(out.status.code(), Some(1), "{junk}");
        assert_eq!(String::from_utf8_lossy(&out.stderr).lines().count(), 1, "{junk}");
    }
}
