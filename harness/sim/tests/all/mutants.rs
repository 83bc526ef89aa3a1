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
