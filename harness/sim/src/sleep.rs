//! What sleep sets would save: measured, not used.
//!
//! Two choices are independent in a state if both orders are possible and lead to the same state. Then
//! one order is enough (Godefroid, "partial-order methods"): whoever has tried `a` first and goes on
//! to `b` tells what follows that `a` need not be tried again, until something that depends on it has
//! happened. The explorer knows states that it has seen, so that no state is saved, only ways to it.
//!
//! Here independence is found by going both ways, which costs more than it saves: nobody else knows
//! what an end touches. So this tells what could be saved at best, if somebody told it for nothing.

use cowbell_formats::Format;

use crate::choose::Choice;
use crate::explore::{HashedMap, quietly};
use crate::gate::scopes;
use crate::subject::Subject;
use crate::world::{Base, World};

/// What was gone through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slept {
    /// Distinct states.
    pub states: u64,
    /// Distinct contents of all files at the end.
    pub endings: u64,
    /// A sum over them: two searches with the same have found the same, short of a collision.
    pub sum: u64,
    /// Choices made, those apart that only told what is independent.
    pub transitions: u64,
}

/// What was gone through without sleep sets and with them, on the first two kinds of image of a format: all
/// single requests with a fault and a deadline, and one in sixteen of the pairs with a deadline.
///
/// # Errors
///
/// What goes wrong; also when the files are left in other ways with them than without.
pub fn measured(format: Format) -> Result<(u64, u64), String> {
    let (mut plain, mut slept) = (0, 0);
    let singles = scopes(format, 1, 1).into_iter().take(2).map(|scope| (scope, 1));
    for (scope, step) in singles.chain(scopes(format, 2, 0).into_iter().take(2).map(|s| (s, 16))) {
        let base = Base::new(scope.image, scope.most_requests())?;
        for workload in scope.workloads.iter().step_by(step) {
            let world = base.world(workload, scope.budget);
            let (without, with) = (search(&world, false)?, search(&world, true)?);
            if (without.endings, without.sum) != (with.endings, with.sum) {
                return Err(format!("{workload} on {}: {without:?}, {with:?}", scope.image));
            }
            (plain, slept) = (plain + without.transitions, slept + with.transitions);
        }
    }
    Ok((plain, slept))
}

/// Goes through every state that can follow from a world, with sleep sets, or without.
///
/// # Errors
///
/// What goes wrong. Crashes are not looked at.
pub fn search<S: Subject>(world: &World<S>, sleeps: bool) -> Result<Slept, String> {
    let (seen, endings) = (HashedMap::default(), HashedMap::default());
    let mut search = Search { sleeps, seen, endings, slept: Slept::default() };
    quietly(|| search.visit(world, &[]))?;
    Ok(search.slept)
}

struct Search {
    sleeps: bool,
    /// Of each state, the choices that were not tried there: by where they lead, for names of ops tell of
    /// the past, which states do not.
    seen: HashedMap<Vec<u64>>,
    endings: HashedMap<()>,
    slept: Slept,
}

impl Search {
    fn visit<S: Subject>(&mut self, world: &World<S>, asleep: &[Choice]) -> Result<(), String> {
        let hash = world.state_hash();
        let mut choices = Vec::new();
        world.choices(&mut choices);
        let mut ways = Vec::with_capacity(choices.len());
        for choice in choices {
            let mut next = world.clone();
            next.apply(choice)?;
            let to = next.state_hash();
            ways.push((choice, next, to));
        }
        let to = |way: &(Choice, World<S>, u64)| way.2;
        let sleeps = ways.iter().filter(|(choice, ..)| asleep.contains(choice)).map(to);
        let sleeps: Vec<u64> = sleeps.collect();
        match self.seen.get_mut(&hash) {
            // Who was asleep then and is not now is still to be tried.
            Some(untried) => {
                ways.retain(|(.., to)| untried.contains(to) && !sleeps.contains(to));
                untried.retain(|to| sleeps.contains(to));
            }
            None => {
                self.slept.states += 1;
                if ways.is_empty() {
                    world.finish()?;
                    let ending = world.crash_hash();
                    if self.endings.insert(ending, ()).is_none() {
                        self.slept.endings += 1;
                        self.slept.sum = self.slept.sum.wrapping_add(ending);
                    }
                }
                ways.retain(|(.., to)| !sleeps.contains(to));
                self.seen.insert(hash, sleeps);
            }
        }
        let mut sleeping = asleep.to_vec();
        for (choice, next, _) in ways {
            self.slept.transitions += 1;
            let still = sleeping.iter().copied();
            let still: Vec<Choice> =
                still.filter(|&other| are_independent(world, &next, other, choice)).collect();
            self.visit(&next, &still)?;
            if self.sleeps {
                sleeping.push(choice);
            }
        }
        Ok(())
    }
}

/// Do both orders of two choices lead from `world` to one state? `next` is where `choice` leads.
fn are_independent<S: Subject>(
    world: &World<S>,
    next: &World<S>,
    other: Choice,
    choice: Choice,
) -> bool {
    let after = |world: &World<S>, choice: Choice| {
        let mut choices = Vec::new();
        world.choices(&mut choices);
        let mut after = choices.contains(&choice).then(|| world.clone())?;
        after.apply(choice).ok().map(|()| after)
    };
    let there = after(next, other);
    let back = after(world, other).and_then(|world| after(&world, choice));
    there.zip(back).is_some_and(|(there, back)| there.state_hash() == back.state_hash())
}
