//! Random runs at depth, each made twice: the same seed is the same run.

use cowbell_sim::random::random;

#[test]
fn random_runs_hold_and_repeat() {
    let report = random(0, 400, None, 2);
    assert!(report.is_good() && report.complete, "{report}");
    println!("{report}");
}
