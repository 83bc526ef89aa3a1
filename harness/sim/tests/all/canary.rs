//! The test of the tests: what must fail, fails, and can be run again from its trace.

use cowbell_formats::Format;
use cowbell_sim::backend::Lie;
use cowbell_sim::explore::{Limit, exhaust};
use cowbell_sim::subjects::Image;
use cowbell_sim::trace::Trace;
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Base, Budget, QUIET};

fn failure_with(lie: Lie, faults: u8, requests: &[Request]) -> Option<Trace> {
    let image = Image { lie: Some(lie), ..Image::new(Format::Raw) };
    let budget = Budget { faults, ..QUIET };
    let workload = Workload::new(requests.iter().copied());
    let world =
        Base::new(image, requests.len()).expect("a raw image is made").world(&workload, budget);
    let failure = exhaust(&world, Limit::default()).err()?;
    Some(Trace::of(image, budget, &workload, &failure))
}

#[test]
fn a_disk_that_ignores_flushes_is_found_out() {
    let requests = [Request::write(0, 1024), Request::flush()];
    let trace = failure_with(Lie::FlushDoesNothing, 0, &requests).expect("it lies");
    let verdict = trace.verdict.clone().expect("a failure has a verdict");
    assert!(verdict.starts_with("a crash left what was there before"), "{verdict}");
    // The text alone leads to the same failure.
    let again: Trace = trace.to_string().parse().expect("own traces are read");
    assert_eq!(again.replay().expect_err("it still lies").verdict, verdict);
}

#[test]
fn a_disk_whose_stable_writes_are_not_is_found_out() {
    assert!(failure_with(Lie::FuaDoesNothing, 0, &[Request::write_fua(0, 512)]).is_some());
}

#[test]
fn a_disk_that_hides_short_writes_is_found_out() {
    assert!(failure_with(Lie::ShortIsWhole, 1, &[Request::write(0, 2048)]).is_some());
}
