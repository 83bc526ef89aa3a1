//! A driver that is not of this project's is tested as ours are: the example, a log-structured disk.

#[path = "../../examples/log_disk.rs"]
#[allow(dead_code)]
mod log_disk;

use cowbell_sim::cause::{STATES, cause};
use cowbell_sim::page::to_html;
use cowbell_sim::shrink::shrink;
use cowbell_sim::trace::Trace;

use log_disk::{LogImage, try_all};

#[test]
fn one_that_is_as_it_should_be_passes() {
    let states = try_all(&LogImage { is_hasty: false }).expect("nothing is wrong");
    assert!(states > 10_000, "{states} states");
}

#[test]
fn a_mistake_in_one_is_found_made_smaller_explained_and_drawn() {
    let found = try_all(&LogImage { is_hasty: true }).expect_err("what is flushed is lost");
    let small = shrink(&found).expect("it fails again");
    assert!(small.workload.requests.len() <= 2, "{}", small.explained());
    let again: Trace<LogImage> = small.explained().parse().expect("own traces are read");
    let verdict = again.replay().expect_err("it fails again").verdict;
    assert!(verdict.starts_with("a crash left"), "{verdict}");
    let cause = cause(&again, STATES).expect("it fails");
    assert!(cause.at.is_some() && cause.passing.is_some(), "{cause}");
    let page = to_html(&cause.failing);
    assert!(page.contains("a log-structured disk on a simulated disk"), "the page says what it is");
    // Whoever waits does not make it.
    let text = small.explained().replace("hasty=true", "hasty=false");
    let careful: Trace<LogImage> = text.parse().expect("it is one");
    careful.replay().expect("nothing is wrong");
}
