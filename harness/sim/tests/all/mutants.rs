//! Planted defects: all are known, and all are found.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use cowbell_sim::mutants::{AT_LENGTH, AT_REST, EQUIVALENT, MUTANTS};

#[test]
fn every_planted_defect_is_on_the_list_and_every_listed_one_is_planted() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut planted = BTreeSet::new();
    for folder in ["engine/src", "formats/src"] {
        collect(&root.join(folder), &mut planted);
    }
    let code = MUTANTS.iter().filter(|mutant| mutant.lie.is_none()).map(|mutant| mutant.name);
    let listed: BTreeSet<String> = code
        .chain(EQUIVALENT.iter().chain(AT_REST).chain(AT_LENGTH).map(|(name, _)| *name))
        .map(str::to_string)
        .collect();
    assert_eq!(planted, listed);
}

fn collect(folder: &Path, planted: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("sources are there") {
        let path = entry.expect("they can be read").path();
        if path.is_dir() {
            collect(&path, planted);
            continue;
        }
        if path.ends_with("mutants.rs") {
            continue;
        }
        let text = fs::read_to_string(&path).expect("sources are text");
        for rest in text.split("mutant!(\"").skip(1) {
            planted.extend(rest.split('"').next().map(str::to_string));
        }
    }
}

#[cfg(feature = "mutants")]
#[test]
fn every_mutant_is_killed() {
    let score = cowbell_sim::mutants::hunt_all("", 2, 30.0).expect("mutants are built in");
    println!("{score}");
    assert!(score.is_good(), "{score}");
}

/// A trace of a defect that was found is worth keeping only if it finds the defect again.
#[cfg(feature = "mutants")]
#[test]
fn regression_traces_bite() {
    let bites = [
        ("spare_end_kept_after_failed_cut", "space_cut_off_by_a_failed_truncate_is_not_handed_out"),
        ("qcow2_header_not_doubted", "a_failed_shrink_may_be_on_disk"),
        ("write_end_wakes_nobody", "refused_zero_writes_do_not_wait_for_each_other"),
    ];
    for (mutant, trace) in bites {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
        let path = folder.join(trace).with_extension("trace");
        let text = fs::read_to_string(path).expect("the trace is there");
        let trace: cowbell_sim::trace::Trace = text.parse().expect("it is one");
        cowbell_engine::mutants::activate(Some(mutant));
        let outcome = trace.replay();
        cowbell_engine::mutants::activate(None);
        assert!(outcome.is_err(), "{mutant} is not found");
    }
}
