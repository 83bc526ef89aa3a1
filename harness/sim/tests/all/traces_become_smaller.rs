//! Of a trace that fails what it does not need is left out: requests, and what else may have gone wrong.

use cowbell_formats::Format;
use cowbell_sim::backend::Lie;
use cowbell_sim::explore::{Limit, exhaust};
use cowbell_sim::shrink::shrink;
use cowbell_sim::subjects::Image;
use cowbell_sim::trace::Trace;
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Budget, QUIET};

#[test]
fn what_else_may_go_wrong_is_left_out() {
    for format in [Format::Raw, Format::Qed] {
        let image = Image { lie: Some(Lie::ShortIsWhole), ..Image::new(format) };
        let budget = Budget {
            faults: 3,
            ticks: 1,
            crashes: 1,
            drains: 1,
            stalls: true,
            breaks: true,
            closes: 1,
            pauses: 1,
            quota: true,
            abandons: 1,
            ..QUIET
        };
        let requests = [Request::write(8192, 512), Request::write(0, 2048), Request::flush()];
        let workload = Workload::new(requests);
        let trace = Trace { image, budget, workload, choices: vec![], plant: None, verdict: None };
        let world = trace.world().expect("the image is made");
        let failure = exhaust(&world, Limit::default()).expect_err("the device lies");
        let trace = Trace { choices: failure.path, verdict: Some(failure.verdict), ..trace };
        let small = shrink(&trace).expect("it fails again");
        assert_eq!(small.budget, Budget { faults: 1, ..QUIET }, "{}", small.explained());
        assert!(small.workload.requests.len() <= 2, "{}", small.explained());
        let again: Trace = small.explained().parse().expect("own traces are read");
        again.replay().expect_err("it fails again");
    }
}
