//! A disk is drained, paused, closed and opened again, gives up requests and has a quota, all in one run, with faults
//! and deadlines between: each of these alone is in the gate.

use cowbell_formats::Format;
use cowbell_sim::subject::Subject;
use cowbell_sim::subjects::{Image, State};
use cowbell_sim::trace::search;
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Budget, QUIET};

/// Two of them at a time, with each other and with a fault and a deadline.
fn budgets() -> Vec<Budget> {
    let base = Budget { faults: 1, ticks: 1, ..QUIET };
    let lives: [fn(Budget) -> Budget; 8] = [
        |budget| Budget { drains: 1, ..budget },
        |budget| Budget { drains: 1, reopens: true, ..budget },
        |budget| Budget { pauses: 1, ..budget },
        |budget| Budget { closes: 1, ..budget },
        |budget| Budget { abandons: 1, ..budget },
        |budget| Budget { quota: true, ..budget },
        |budget| Budget { breaks: true, mends: true, ..budget },
        |budget| Budget { crashes: 1, ..budget },
    ];
    let mut all = Vec::new();
    for (n, first) in lives.iter().enumerate() {
        for second in &lives[n + 1..] {
            all.push(second(first(base)));
        }
    }
    all
}

#[test]
fn two_at_a_time() {
    for format in Format::ALL {
        let mut states = 0;
        let image = Image { ahead: 2, frees: 1, ..Image::new(format) };
        let image = match format {
            Format::Raw => image,
            _ => Image { state: State::Warm, ..image },
        };
        let at = image.place(0, 0);
        let write = Request::write(at, 1024);
        let workloads = [
            Workload::new([write, Request::flush()]),
            Workload::new([Request::discard(at, image.cluster()), write]),
        ];
        for budget in budgets() {
            let found = search(&image, budget, &workloads);
            states += found.unwrap_or_else(|trace| panic!("{}", trace.explained())).states;
        }
        assert!(states > 10_000, "{format}: {states} states");
    }
}
