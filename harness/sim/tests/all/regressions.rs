//! Every defect that was ever found stays found: its trace is run again.

use std::fs;
use std::path::Path;

use cowbell_sim::trace::Trace;

#[test]
fn no_old_defect_comes_back() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    let mut count = 0;
    for entry in fs::read_dir(folder).expect("the folder is there") {
        let path = entry.expect("it can be read").path();
        let text = fs::read_to_string(&path).expect("traces are text");
        let trace: Trace = text.parse().unwrap_or_else(|why| panic!("{}: {why}", path.display()));
        if let Err(failure) = trace.replay() {
            let now = Trace::of(trace.image, trace.budget, &trace.workload, &failure);
            panic!("{}:\n{}", path.display(), now.explained());
        }
        count += 1;
    }
    assert!(count > 0, "no traces were found");
}
