//! A guest that waits for a request before it submits another does so in every order that is tried.

use cowbell_formats::Format;
use cowbell_sim::choose::{Choice, Chooser, Fifo};
use cowbell_sim::explore::{Limit, exhaust};
use cowbell_sim::subjects::Image;
use cowbell_sim::trace::Trace;
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Base, QUIET};

fn three() -> Workload {
    Workload::new([Request::write(0, 512), Request::write(512, 512), Request::write(1024, 512)])
}

#[test]
fn nothing_is_submitted_before_its_time() {
    let mut workload = three();
    workload.submit_after(2, 0b01);
    let base = Base::new(Image::ample(Format::Raw), 3).expect("it is made");
    let mut world = base.world(&workload, QUIET);
    world.apply(Choice::Submit(0)).expect("it is submitted");
    world.apply(Choice::Submit(1)).expect("it is submitted");
    let mut choices = Vec::new();
    while world.ended() == 0 {
        world.choices(&mut choices);
        assert!(!choices.contains(&Choice::Submit(2)), "{choices:?}");
        let choice = choices[Fifo.choose(&choices)];
        world.apply(choice).expect("nothing is wrong");
    }
    // The second is in flight still.
    world.choices(&mut choices);
    assert!(world.ended() == 1 && choices.contains(&Choice::Submit(2)), "{choices:?}");
}

#[test]
fn fewer_orders_are_left() {
    let base = Base::new(Image::ample(Format::Raw), 3).expect("it is made");
    let schedules = |workload: &Workload| {
        let counts = exhaust(&base.world(workload, QUIET), Limit::default());
        counts.expect("nothing is wrong").schedules
    };
    let mut one_by_one = three();
    one_by_one.submit_after(1, 0b1);
    one_by_one.submit_after(2, 0b11);
    assert!(schedules(&one_by_one) < schedules(&three()));
}

#[test]
fn who_waits_for_one_that_is_left_out_waits_as_long() {
    let mut workload = three();
    workload.submit_after(1, 0b1);
    workload.submit_after(2, 0b10);
    // The third is behind the second, which is behind the first.
    assert_eq!(workload.without(1).waits_for(1), 0b1);
    assert_eq!(workload.without(0).waits_for(1), 0b1);
    assert_eq!(workload.without(2).waits_for(1), 0b1);
    // Nobody waits for himself, or for who comes later.
    workload.submit_after(0, u64::MAX);
    assert_eq!(workload.waits_for(0), 0);
}

#[test]
fn a_search_without_time_says_that_it_ended_early() {
    let base = Base::new(Image::ample(Format::Qcow2), 3).expect("it is made");
    let limit = Limit { millis: 1, ..Limit::default() };
    let counts = exhaust(&base.world(&three(), QUIET), limit).expect("nothing is wrong");
    assert_eq!(counts.cut_short, 1);
}

#[test]
fn traces_say_so() {
    let text = "cowbell trace 1\nimage format=raw\nbudget faults=0\nrequest flush\nrequest flush\nafter 0\n";
    let trace: Trace = text.parse().expect("it is one");
    assert_eq!(trace.workload.waits_for(1), 1);
    let out_of_place = text.replace("request flush\n", "");
    assert!(out_of_place.parse::<Trace>().is_err());
    assert!(text.replace("after 0", "after 61").parse::<Trace>().is_err());
}
