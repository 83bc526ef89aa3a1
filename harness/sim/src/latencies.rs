//! How often a request waits for the device, one time after the other.
//!
//! The device takes one unit of time for whatever it does, and does any number of things at once. So
//! what is counted is the longest chain of ops that had to wait for one another: what a guest waits
//! for, whatever the device is like.

use crate::backend::Outcome;
use crate::choose::Choice;
use crate::subject::Subject;
use crate::subjects::Image;
use crate::workload::{Request, Workload};
use crate::world::{Base, QUIET, World};

/// A request, and how often it waited.
#[derive(Clone, Debug)]
pub struct Waited {
    /// What it is, for people.
    pub what: &'static str,
    /// For what, each time: the ops that were in flight together.
    pub ops: Vec<String>,
}

/// What is asked of an image, one after the other: what each one does is over before the next.
fn requests(image: &Image) -> Vec<(&'static str, Request)> {
    let write = |table, cluster| Request::write(image.place(table, cluster), 512);
    vec![
        ("first write", write(0, 0)),
        ("flush after it", Request::flush()),
        ("write beside it", write(0, 1)),
        ("write under another table", write(1, 0)),
        ("flush after that", Request::flush()),
        ("write again in place", write(1, 0)),
    ]
}

/// What the requests of a small list wait for on a new image.
///
/// # Errors
///
/// When the image cannot be made, or something is wrong in the end.
pub fn latencies(image: Image) -> Result<Vec<Waited>, String> {
    let asked = requests(&image);
    let workload = Workload::new(asked.iter().map(|(_, request)| *request));
    let mut world = Base::new(image, asked.len())?.world(&workload, QUIET);
    let mut all = Vec::new();
    for (which, (what, _)) in asked.into_iter().enumerate() {
        let which = which as u32;
        world.apply(Choice::Submit(which))?;
        let mut ops = Vec::new();
        while world.ended() <= which {
            match one_latency(&mut world)? {
                Some(together) => ops.push(together),
                None => return Err(format!("{what} waits for ever")),
            }
        }
        while one_latency(&mut world)?.is_some() {}
        all.push(Waited { what, ops });
    }
    world.apply(Choice::Drain)?;
    while one_latency(&mut world)?.is_some() {}
    world.finish()?;
    Ok(all)
}

/// Everything ends that is in flight now: what that is, if there is something.
fn one_latency<S: Subject>(world: &mut World<S>) -> Result<Option<String>, String> {
    let mut choices = Vec::new();
    world.choices(&mut choices);
    let is_end = |choice: &Choice| matches!(choice, Choice::End(_, Outcome::Done));
    let ends: Vec<Choice> = choices.into_iter().filter(is_end).collect();
    let ops: Vec<String> = ends.iter().map(|&end| world.describe(end)).collect();
    for &end in &ends {
        world.apply(end)?;
    }
    Ok((!ops.is_empty()).then(|| ops.join(" + ")))
}
