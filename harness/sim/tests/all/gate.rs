//! The gate, and a part of it that takes seconds.

use cowbell_formats::Format;
use cowbell_sim::gate::{Scope, explore, gate, scopes};
use cowbell_sim::mutants::special;

fn holds(scopes: &[Scope]) {
    let report = explore(scopes, 2, None);
    assert!(report.is_good() && report.complete, "{report}");
    println!("{report}");
}

#[test]
fn single_requests_with_a_fault() {
    for format in Format::ALL {
        holds(&scopes(format, 1, 1));
    }
}

#[test]
fn what_kills_mutants_holds_without_them() {
    for format in Format::ALL {
        holds(&special(format));
    }
}

#[test]
fn pairs_on_raw_with_a_fault() {
    holds(&scopes(Format::Raw, 2, 1));
}

#[test]
#[ignore = "a minute on two cores: run with --ignored, or `cowbell sim explore --gate`"]
fn the_whole_gate() {
    let report = gate(2);
    assert!(report.is_good() && report.complete, "{report}");
    println!("{report}");
}
