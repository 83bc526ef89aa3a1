//! Ends that nobody notices are not tried in every order: the crashes and the endings that are
//! found are those of every order.

use cowbell_formats::Format;
use cowbell_sim::explore::{Counts, Limit, exhaust};
use cowbell_sim::gate::{Scope, scopes};
use cowbell_sim::mutants::special;
use cowbell_sim::world::Base;

fn counts(scope: &Scope, all_orders: bool) -> Vec<Counts> {
    let limit = Limit { all_orders, ..Limit::default() };
    // Without memory of what the other search has examined.
    let base = Base::new(scope.image, scope.most_requests()).expect("the image is made");
    let explore = |workload| {
        let explored = exhaust(&base.world(workload, scope.budget), limit);
        explored.unwrap_or_else(|failure| panic!("{}", failure.verdict))
    };
    scope.workloads.iter().map(explore).collect()
}

#[test]
fn crashes_and_endings_are_the_same() {
    let (mut fewer, mut more) = (0, 0);
    for scope in scopes(Format::Qed, 1, 1).iter().chain(&special(Format::Qed)) {
        for (some, all) in counts(scope, false).into_iter().zip(counts(scope, true)) {
            assert_eq!(some.crash_states, all.crash_states, "{}", scope.image);
            assert_eq!(some.crash_images, all.crash_images, "{}", scope.image);
            assert_eq!(some.crash_images_distinct, all.crash_images_distinct, "{}", scope.image);
            assert_eq!(some.endings, all.endings, "{}", scope.image);
            (fewer, more) = (fewer + some.states, more + all.states);
        }
    }
    assert!(fewer < more, "{fewer} states of {more}: nothing was left out");
    println!("{fewer} states instead of {more}");
}
