//! Two worlds in which requests have ended in another order, and a later one has another's place
//! for it, are the same; those in which different things are in flight are not.

use cowbell_formats::Format;
use cowbell_sim::backend::{OpName, Outcome};
use cowbell_sim::choose::Choice;
use cowbell_sim::subjects::Image;
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Base, QUIET};

/// What a world hashes to after writes 0 and 1 have ended in this order, and `last` was submitted.
fn after(ends: [u32; 2], last: Request) -> u64 {
    let base = Base::new(Image::new(Format::Raw), 3).expect("the image is made");
    let requests = [Request::write(0, 512), Request::write(4096, 512), last];
    let mut world = base.world(&Workload::new(requests), QUIET);
    let end = |request| Choice::End(OpName { request, ordinal: 0 }, Outcome::Done);
    let [first, second] = ends.map(end);
    for choice in [Choice::Submit(0), Choice::Submit(1), first, second, Choice::Submit(2)] {
        world.apply(choice).expect("nothing is wrong");
    }
    world.state_hash()
}

#[test]
fn the_order_in_which_others_ended_is_forgotten() {
    let last = Request::read(8192, 512);
    assert_eq!(after([0, 1], last), after([1, 0], last));
    assert_ne!(after([0, 1], last), after([0, 1], Request::read(8704, 512)));
}
