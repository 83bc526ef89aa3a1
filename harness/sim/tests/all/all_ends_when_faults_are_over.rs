//! From every state all ends well, and soon, when nothing more goes wrong.

use cowbell_formats::Format;
use cowbell_sim::backend::Lie;
use cowbell_sim::explore::{Limit, exhaust};
use cowbell_sim::gate::Scope;
use cowbell_sim::mutants::special;
use cowbell_sim::subjects::Image;
use cowbell_sim::trace::Trace;
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Base, Budget, QUIET};

/// Explores it; in every state of `calm_in` the question is asked.
fn ends(scope: &Scope, calm_in: u64) -> Result<(), Box<Trace>> {
    let base = Base::new(scope.image, scope.most_requests()).expect("the image is made");
    for workload in &scope.workloads {
        let limit = Limit { calm_in, ..Limit::default() };
        let explored = exhaust(&base.world(workload, scope.budget), limit);
        explored.map_err(|failure| {
            Box::new(Trace::of(scope.image, scope.budget, workload, &failure))
        })?;
    }
    Ok(())
}

#[test]
fn of_what_is_telling() {
    for format in Format::ALL {
        for scope in special(format) {
            ends(&scope, 1).unwrap_or_else(|trace| panic!("{}", trace.explained()));
        }
    }
}

/// Devices that break for good are not mended in any other test of these.
#[test]
fn of_devices_that_break() {
    for format in Format::ALL {
        let image = Image { ahead: 2, ..Image::new(format) };
        let budget = Budget { faults: 1, breaks: true, stalls: true, ..QUIET };
        let at = |cluster| image.place(0, cluster);
        let requests = [
            vec![Request::write_fua(at(0), 1024)],
            vec![Request::zero(at(0), 4096), Request::flush()],
            vec![Request::write(at(0), 1024), Request::discard(at(0), 4096)],
        ];
        let workloads = requests.map(Workload::new).to_vec();
        let scope = Scope { image, budget, workloads };
        ends(&scope, 1).unwrap_or_else(|trace| panic!("{}", trace.explained()));
    }
}

#[test]
fn what_ends_too_late_is_seen_by_nothing_else() {
    let image = Image { lie: Some(Lie::SectorAtATime), ..Image::new(Format::Raw) };
    let workloads = vec![Workload::new([Request::write(0, 12 * 4096)])];
    let scope = Scope { image, budget: QUIET, workloads };
    ends(&scope, 0).expect("it ends");
    let trace = ends(&scope, 1).expect_err("it ends late");
    let verdict = trace.verdict.clone().expect("it has failed");
    assert!(verdict.starts_with("when all is well again: not over after 64 events"), "{verdict}");
    assert_eq!(trace.replay().expect_err("it still does").verdict, verdict);
}
