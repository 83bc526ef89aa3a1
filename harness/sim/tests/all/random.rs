//! Random runs at depth, each made twice: the same seed is the same run.

use cowbell_engine::step::IoKind;
use cowbell_sim::random::{Plan, plan, random};
use cowbell_sim::subjects::{Image, Layout, Medium, State};

#[test]
fn random_runs_hold_and_repeat() {
    let report = random(0, 400, None, 2);
    assert!(report.is_good() && report.complete, "{report}");
    println!("{report}");
}

/// In a run some things are never asked for and some never go wrong, and over many runs all are.
#[test]
fn in_each_run_some_things_are_off() {
    let (mut kinds, mut off) = ([0; 6], [0; 8]);
    for seed in 0..400 {
        let plan = plan(seed, None);
        let asks = |fit: fn(&IoKind) -> bool| {
            plan.workload.requests.iter().any(|request| fit(&request.kind))
        };
        let asked = [
            asks(|kind| matches!(kind, IoKind::Read)),
            asks(|kind| matches!(kind, IoKind::Write { .. })),
            asks(|kind| matches!(kind, IoKind::Zero { .. })),
            asks(|kind| matches!(kind, IoKind::Discard)),
            asks(|kind| matches!(kind, IoKind::Flush)),
            asks(|kind| matches!(kind, IoKind::Truncate)),
        ];
        let budget = plan.budget;
        let on = [
            budget.faults > 0,
            budget.crashes > 0,
            budget.stalls,
            budget.breaks,
            budget.lost_writes > 0,
            budget.bit_rots > 0,
            budget.drains > 0,
            budget.abandons > 0,
        ];
        kinds.iter_mut().zip(asked).for_each(|(count, is)| *count += u32::from(is));
        off.iter_mut().zip(on).for_each(|(count, is)| *count += u32::from(!is));
    }
    // Not in every run, and not in none.
    assert!(kinds.iter().all(|count| (20..380).contains(count)), "{kinds:?}");
    assert!(off.iter().all(|count| (20..390).contains(count)), "{off:?}");
}

/// All kinds of images are drawn, and copies between them.
#[test]
fn every_kind_of_image_is_drawn() {
    let mut seen = [0; 12];
    for seed in 0..2000 {
        let Plan { image, budget, .. } = plan(seed, None);
        let copy = budget.copy;
        let is = [
            image.medium != Medium::File,
            image.layout == Layout::Stream,
            image.filter,
            image.slow,
            image.long,
            image.shares,
            image.beside.is_some() && copy.is_none(),
            copy.is_some() && image.state == State::Shared,
            copy.is_some() && image.cluster < Image::new(image.format).cluster,
            copy.is_some_and(|copy| copy.compressed),
            copy.is_some_and(|copy| copy.offload),
            copy.is_some_and(|copy| copy.mirrors && copy.target_is_zero),
        ];
        seen.iter_mut().zip(is).for_each(|(count, is)| *count += u32::from(is));
    }
    assert!(seen.iter().all(|&count| count > 2), "{seen:?}");
}
