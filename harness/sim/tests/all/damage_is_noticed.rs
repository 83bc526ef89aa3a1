//! Writes that are lost, writes that go astray, bits that change at rest: somebody notices, if anybody
//! can, and nobody panics or works without end.

use cowbell_formats::Format;
use cowbell_sim::backend::Outcome;
use cowbell_sim::choose::Choice;
use cowbell_sim::gate::{damage_scopes, explore};
use cowbell_sim::subjects::{Image, State};
use cowbell_sim::trace::Trace;
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Base, Budget, QUIET};

#[test]
fn of_all_formats() {
    for format in Format::ALL {
        let report = explore(&damage_scopes(format), 2, None);
        assert!(report.is_good() && report.complete, "{report}");
        println!("{report}");
    }
}

/// All ways in which the last op of a warm image's write may end silently.
fn ends(format: Format) -> Vec<Outcome> {
    let image = Image { state: State::Warm, ..Image::new(format) };
    let workload = Workload::new([Request::write(0, 1024)]);
    let budget = Budget { lost_writes: 1, ..QUIET };
    let mut world = Base::new(image, 1).expect("it is made").world(&workload, budget);
    let mut found = Vec::new();
    let mut choices = Vec::new();
    loop {
        world.choices(&mut choices);
        for choice in &choices {
            if let Choice::End(_, outcome) = choice
                && outcome.is_silent()
            {
                found.push(*outcome);
            }
        }
        let Some(&calm) = choices.iter().find(|choice| !choice.is_fault()) else { return found };
        world.apply(calm).expect("nothing goes wrong");
    }
}

#[test]
fn every_write_may_be_lost_or_go_astray() {
    let ends = ends(Format::Qed);
    for outcome in Outcome::SILENT {
        assert!(ends.contains(&outcome), "{outcome:?} in {ends:?}");
    }
}

#[test]
fn a_trace_says_what_was_damaged() {
    let text = "cowbell trace 1\n\
                image format=qed state=warm\n\
                budget faults=0 ticks=0 crashes=0 stalls=false lost-writes=1 bit-rots=1\n\
                request read 0x0+0x400\n\
                choice flip 0 0x2000 4\n\
                choice submit 0\n\
                choice end 0.0 far-astray\n";
    let trace: Trace = text.parse().expect("it is one");
    assert_eq!((trace.budget.lost_writes, trace.budget.bit_rots), (1, 1));
    assert_eq!(trace.to_string().parse(), Ok(trace.clone()));
    trace.replay().expect("somebody says so");
}
