//! A disk is drained, paused, closed and opened again, gives up requests and has a quota, all in one run, with faults
//! and deadlines between: each of these alone is in the gate.

use cowbell_formats::Format;
use cowbell_sim::subject::Subject;
use cowbell_sim::subjects::{Image, State};
use cowbell_sim::trace::search;
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Budget, CopyPlan, QUIET, Way};

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

/// One of them before a copy and after it, of each format, with a fault; a mirror apart, which makes two disks one.
#[test]
fn beside_a_copy() {
    let (to, from) = (CopyPlan::new(Way::In), CopyPlan::new(Way::Out));
    let of_start = CopyPlan { of_start: true, ..from };
    for format in Format::ALL {
        let plain = Image { ahead: 2, frees: 1, size: Some(2 * 4096 + 1536), ..Image::new(format) };
        let state = if format == Format::Raw { State::Cold } else { State::Warm };
        let image = Image { state, beside: Some(Format::Raw), ..plain };
        let pulled = Image { state, backing: true, ..plain };
        let mut all = vec![(image, to), (image, from), (image, of_start)];
        if matches!(format, Format::Qed | Format::Qcow2) {
            all.push((pulled, CopyPlan::new(Way::Up)));
        }
        let mut states = 0;
        for (image, plan) in all {
            let base = Budget { faults: 1, copy: Some(plan), ..QUIET };
            let workload = Workload::new([Request::write(4096, 1024)]);
            for budget in [
                Budget { pauses: 1, ..base },
                Budget { closes: 1, ..base },
                Budget { abandons: 1, ..base },
                Budget { quota: true, ..base },
            ] {
                let found = search(&image, budget, std::slice::from_ref(&workload));
                states += found.unwrap_or_else(|trace| panic!("{}", trace.explained())).states;
            }
        }
        assert!(states > 1000, "{format}: {states} states");
    }
}
