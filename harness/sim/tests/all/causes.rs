//! From which choice on a run could only fail: after it everything fails, before it something does not.

use cowbell_formats::Format;
use cowbell_sim::backend::Lie;
use cowbell_sim::cause::{STATES, cause};
use cowbell_sim::choose::{Choice, Random};
use cowbell_sim::explore::{Counts, Limit, exhaust, run};
use cowbell_sim::page::to_html;
use cowbell_sim::subjects::Image;
use cowbell_sim::trace::Trace;
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Budget, QUIET};

fn failing(lie: Lie, faults: u8, requests: &[Request]) -> Trace {
    let image = Image { lie: Some(lie), ..Image::new(Format::Raw) };
    let budget = Budget { faults, ..QUIET };
    let workload = Workload::new(requests.iter().copied());
    let trace = Trace { image, budget, workload, choices: vec![], plant: None, verdict: None };
    let world = trace.world().expect("the image is made");
    let failure = exhaust(&world, Limit::default()).expect_err("the device lies");
    Trace { choices: failure.path, verdict: Some(failure.verdict), ..trace }
}

/// Every one of many runs after it fails; the run that is said to end well does so.
fn holds(trace: &Trace, states: u64) {
    let cause = cause(trace, states).expect("it fails");
    let Some(at) = cause.at else { panic!("{cause}") };
    let path = trace.replay().expect_err("it fails").path;
    let mut world = trace.world().expect("the image is made");
    for &choice in &path[..=at] {
        world.apply(choice).expect("it goes wrong later");
    }
    for seed in 0..200 {
        let mut chooser = Random::new(seed, 4);
        let outcome = run(&world, &mut chooser, 1, &mut Counts::default(), &mut Vec::new());
        assert!(outcome.is_err(), "{cause}");
    }
    let passing = cause.passing.as_ref().expect("something ends well");
    assert_eq!(passing.verdict, None);
    assert_eq!(passing.missed, 0, "all of its choices are possible");
    let same = |n: usize| cause.failing.events[n].what == passing.events[n].what;
    assert!((0..=at).all(same) && !same(at + 1), "{cause}");
    let mark = cause.failing.cause.as_ref().expect("the page shows it");
    assert_eq!(mark.at as usize, at + 1);
    let page = to_html(&cause.failing);
    assert!(page.contains(&format!("\"cause\":{{\"at\":{},", at + 1)));
    let said = cause.to_string();
    assert!(said.contains("made that certain") && said.contains("It ends well:"), "{said}");
}

#[test]
fn a_write_that_says_it_was_whole_is_the_cause() {
    let requests = [Request::write(0, 2048), Request::write(8192, 512), Request::flush()];
    let trace = failing(Lie::ShortIsWhole, 1, &requests);
    holds(&trace, STATES);
    let found = cause(&trace, STATES).expect("it fails");
    let path = trace.replay().expect_err("it fails").path;
    let Some(Choice::End(_, outcome)) = found.at.map(|at| path[at]) else { panic!("{found}") };
    assert_eq!(outcome.name(), "short", "{found}");
    assert_eq!(found.drawn, 0, "all was tried");
}

#[test]
fn where_there_is_too_much_to_try_runs_are_drawn() {
    let requests = [Request::write(0, 2048), Request::write(8192, 512), Request::flush()];
    let trace = failing(Lie::ShortIsWhole, 1, &requests);
    holds(&trace, 3);
    assert!(cause(&trace, 3).expect("it fails").drawn > 0);
}

#[test]
fn what_fails_whatever_happens_has_no_cause() {
    let trace = failing(Lie::FlushDoesNothing, 0, &[Request::write(0, 1024), Request::flush()]);
    let found = cause(&trace, STATES).expect("it fails");
    assert_eq!(found.at, None, "{found}");
    assert!(found.to_string().contains("It fails whatever happens"), "{found}");
    assert!(to_html(&found.failing).contains("It fails whatever happens"), "the page says so, too");
}

#[test]
fn what_does_not_fail_has_none() {
    let trace = failing(Lie::ShortIsWhole, 1, &[Request::write(0, 2048)]);
    let honest = Trace { image: Image::new(Format::Raw), ..trace };
    let why = cause(&honest, STATES).expect_err("nothing is wrong");
    assert_eq!(why, "this trace does not fail");
}

/// Each of other engines' defects is found by seed, is shown by three requests or fewer, and is explained.
#[test]
fn published_defects_are_found_and_explained() {
    let all = cowbell_sim::published::all();
    assert!(all.len() >= 8);
    for published in all {
        let found = cowbell_sim::published::hunt(published, 600.0).expect("it is found");
        assert!(found.trace.workload.requests.len() <= 3, "{found}");
        let text = found.trace.explained();
        let again: Trace = text.parse().expect("own traces are read");
        assert!(again.replay().is_err(), "{text}");
        let honest = Trace { plant: None, ..again };
        assert!(honest.replay().is_ok(), "without the defect nothing is wrong: {text}");
        let Some(at) = found.cause.at else { continue };
        let (failing, passing) = (&found.cause.failing, found.cause.passing.as_ref());
        let passing = passing.expect("something ends well");
        assert_eq!((&passing.verdict, passing.missed), (&None, 0), "{found}");
        let same = |n: usize| failing.events[n].what == passing.events[n].what;
        assert!((0..=at).all(same) && !same(at + 1), "{found}");
        let page = to_html(&found.cause.failing);
        assert!(page.contains(&format!("\"cause\":{{\"at\":{},", at + 1)));
    }
}
