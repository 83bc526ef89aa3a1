//! When did it become inevitable? From which choice on a run that failed could only fail.
//!
//! A failure shows late: the choice that made it certain lies before, often long before. So from the end of the run
//! backwards each state is asked whether *any* run that goes on from it ends well, as the explorer does it, in
//! every order, with every fault that is still allowed and every crash. The first state that says yes is the last one from
//! which it could have gone well, and the choice that was made there is the cause.
//!
//! Where there is too much to try, runs are drawn instead; then it is said how many.

use std::fmt;

use crate::choose::{Choice, Chooser, Random, Replay, calm_order};
use crate::explore::{Asked, CALM, Calm, Counts, Crash, HashedMap, quietly, run_watched};
use crate::mutants::planted;
use crate::subject::Subject;
use crate::timeline::{Mark, Timeline, Wait};
use crate::trace::Trace;
use crate::world::World;

/// What was found out about a run that failed.
#[derive(Clone, Debug)]
pub struct Cause {
    /// The choice that made it certain: so many were made before it. `None`: it fails whatever happens.
    pub at: Option<usize>,
    /// States that were tried after it. In none of them it could still go well.
    pub states: u64,
    /// Where that were too many: runs that were drawn instead. All failed.
    pub drawn: u64,
    /// The run.
    pub failing: Timeline,
    /// A run that ends well and does the same up to that choice; of those that were tried the one that does most of the
    /// rest, too.
    pub passing: Option<Timeline>,
}

/// States that are tried by default.
pub const STATES: u64 = 200_000;

/// So many runs are drawn where there are more.
const DRAWN: u64 = 300;

/// Finds it, trying up to so many states.
///
/// # Errors
///
/// When the trace does not fail, or its image cannot be made.
pub fn cause<S: Subject>(trace: &Trace<S>, states: u64) -> Result<Cause, String> {
    let (path, verdict) = match trace.replay() {
        Ok(_) => return Err("this trace does not fail".into()),
        Err(failure) => (failure.path, failure.verdict),
    };
    let asks_calm = verdict.starts_with(CALM);
    let root = trace.world()?;
    let Found { at, way, tried, drawn } =
        planted(trace.plant, || find(root, &path, asks_calm, states));
    let with = |choices: Vec<Choice>| Trace { choices, ..trace.clone() };
    let mut failing = with(path.clone()).timeline()?;
    let Some(at) = at else {
        if let Some(verdict) = &mut failing.verdict {
            let states = plural(tried, "state");
            verdict.more.push(format!("It fails whatever happens: no run ends well ({states})."));
        }
        return Ok(Cause { at: None, states: tried, drawn, failing, passing: None });
    };
    let passing = with(path[..at].iter().copied().chain(way).collect());
    let passing = passing.timeline_asking(asks_calm)?;
    let mut cause = Cause { at: Some(at), states: tried, drawn, failing, passing: Some(passing) };
    let text = cause.in_a_sentence();
    cause.failing.cause = Some(Mark { at: at as u32 + 1, text });
    Ok(cause)
}

struct Found {
    /// So many choices are the same.
    at: Option<usize>,
    /// Those that end well then.
    way: Vec<Choice>,
    tried: u64,
    drawn: u64,
}

fn find<S: Subject>(root: World<S>, path: &[Choice], asks_calm: bool, states: u64) -> Found {
    let mut worlds = vec![root];
    for &choice in path {
        let mut next = worlds[worlds.len() - 1].clone();
        if quietly(|| next.apply(choice)).is_err() {
            break;
        }
        worlds.push(next);
    }
    let asked = Asked { crash_in: 1, calm: asks_calm };
    let calm = asks_calm.then(Calm::default);
    let mut search =
        Search { seen: HashedMap::default(), crash: Crash::default(), calm, left: states };
    let (mut tried, mut drawn) = (0, 0);
    let mut way = Vec::new();
    for at in (0..worlds.len()).rev() {
        way.clear();
        let passes = match drawn {
            0 => search.passes(&worlds[at], &mut way),
            _ => None,
        };
        let passes = passes.unwrap_or_else(|| {
            drawn += DRAWN;
            draw(&worlds[at], asked, &mut way)
        });
        if passes {
            let way = nearest(&worlds[at], asked, &path[at..]).unwrap_or(way);
            return Found { at: Some(at), way, tried, drawn };
        }
        tried = search.seen.len() as u64;
    }
    Found { at: None, way, tried, drawn }
}

struct Search {
    /// States from which no run that was tried ends well.
    seen: HashedMap<()>,
    crash: Crash,
    /// The failure is that it does not end well although nothing more goes wrong: so that is asked.
    calm: Option<Calm>,
    /// So many more may be tried.
    left: u64,
}

impl Search {
    /// Does a run that goes on from here end well? `way` is then how. `None`: there is too much to try.
    fn passes<S: Subject>(&mut self, world: &World<S>, way: &mut Vec<Choice>) -> Option<bool> {
        if self.seen.insert(world.state_hash(), ()).is_some() {
            return Some(false);
        }
        self.left = self.left.checked_sub(1)?;
        if quietly(|| self.crash.check(world)).is_err() {
            return Some(false);
        }
        if let Some(calm) = &mut self.calm
            && quietly(|| calm.check(world)).is_err()
        {
            return Some(false);
        }
        let mut choices = Vec::new();
        world.choices(&mut choices);
        if choices.is_empty() {
            return Some(quietly(|| world.finish()).is_ok());
        }
        if let Some(op) = world.unnoticed() {
            choices.retain(|choice| matches!(choice, Choice::End(name, _) if *name == op));
        }
        calm_order(&mut choices);
        for choice in choices {
            let mut next = world.clone();
            if quietly(|| next.apply(choice)).is_err() {
                continue;
            }
            way.push(choice);
            if self.passes(&next, way)? {
                return Some(true);
            }
            way.pop();
        }
        Some(false)
    }
}

/// Does one of some runs that go on from here, drawn, end well? `way` is then how.
fn draw<S: Subject>(world: &World<S>, asked: Asked, way: &mut Vec<Choice>) -> bool {
    (0..DRAWN).any(|seed| {
        way.clear();
        // Seldom a fault: what ends well has few.
        let mut chooser = Random::new(seed, 64);
        ends_well(world, &mut chooser, asked, way)
    })
}

/// A run from here that ends well. It does something else first, and then what the failed one did, as far as that is
/// possible.
fn nearest<S: Subject>(world: &World<S>, asked: Asked, failed: &[Choice]) -> Option<Vec<Choice>> {
    let mut choices = Vec::new();
    world.choices(&mut choices);
    calm_order(&mut choices);
    let mut best: Option<(usize, Vec<Choice>)> = None;
    for choice in choices.into_iter().filter(|choice| *choice != failed[0]) {
        let mut next = world.clone();
        if quietly(|| next.apply(choice)).is_err() {
            continue;
        }
        let mut way = vec![choice];
        let mut chooser = Replay::new(failed.iter().copied());
        let passes = ends_well(&next, &mut chooser, asked, &mut way);
        if passes && best.as_ref().is_none_or(|(missed, _)| chooser.missed < *missed) {
            best = Some((chooser.missed, way));
        }
    }
    best.map(|(_, way)| way)
}

/// Does this run end well? It is asked the same as in [`Search::passes`].
fn ends_well<S: Subject>(
    world: &World<S>,
    chooser: &mut dyn Chooser,
    asked: Asked,
    way: &mut Vec<Choice>,
) -> bool {
    run_watched(world, chooser, asked, &mut Counts::default(), way, &mut ()).is_ok()
}

fn plural(count: u64, word: &str) -> String {
    format!("{count} {word}{}", if count == 1 { "" } else { "s" })
}

/// Lines of what comes after that are printed.
const SHOWN: usize = 8;

impl Cause {
    /// In words.
    fn in_a_sentence(&self) -> String {
        let tried = match self.drawn {
            0 => {
                format!("every run that goes on from here fails ({})", plural(self.states, "state"))
            }
            drawn => format!(
                "every run that was tried from here fails ({}, and {drawn} runs that were drawn)",
                plural(self.states, "state")
            ),
        };
        let instead = self.passing.as_ref().zip(self.at).and_then(|(line, at)| {
            let event = line.events.get(at + 1)?;
            Some(format!(" The nearest run that ends well does this instead: {}.", event.what))
        });
        let instead = instead.unwrap_or_default();
        let hint = "The mistake may have been made before, or be made later.";
        format!("From here on it could only go wrong: {tried}. {hint}{instead}")
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = self.failing.verdict.as_ref().map_or("", |verdict| verdict.text.as_str());
        writeln!(f, "It fails: {}", verdict.lines().next().unwrap_or_default())?;
        for line in self.failing.verdict.iter().flat_map(|verdict| &verdict.more) {
            writeln!(f, "  {line}")?;
        }
        let Some(at) = self.at else { return Ok(()) };
        let events = &self.failing.events;
        writeln!(f, "Of its {} events number {} made that certain:", events.len() - 1, at + 1)?;
        writeln!(f, "  {}", events[at + 1].what)?;
        writeln!(f, "{}", self.in_a_sentence())?;
        writeln!(
            f,
            "\nJust before it (request 0: as the guest counts; #0: as the engine counts, op #0.1 is the second of #0's):"
        )?;
        for (place, request) in self.failing.requests.iter().enumerate() {
            let at = at as u32;
            let Some(stay) = request.stays.iter().find(|stay| stay.from <= at && at <= stay.to)
            else {
                continue;
            };
            if request.end.is_some_and(|end| end <= at) {
                continue;
            }
            let of = |other: usize| self.failing.requests[other].name();
            let whom = match (stay.keeper, stay.let_go_by.filter(|_| stay.wait.is_for_others())) {
                (Some(keeper), _) => format!(", which is {}'s", of(keeper)),
                (None, Some(by)) => format!("; {} lets it go on later", of(by)),
                (None, None) => String::new(),
            };
            let mut ops = String::new();
            let mine = self.failing.ops.iter().filter(|op| op.request == place);
            if stay.wait == Wait::Ops {
                for op in mine.filter(|op| op.from <= at && op.to.is_none_or(|to| at < to)) {
                    let comma = if ops.is_empty() { ": " } else { ", " };
                    ops += &format!("{comma}{}", self.failing.op_name(op));
                }
            }
            writeln!(
                f,
                "  {} ({}) is in state {}, waits for {}{ops}{whom}",
                request.name(),
                request.what,
                stay.state,
                stay.wait.words()
            )?;
        }
        let Some(passing) = &self.passing else { return Ok(()) };
        for (title, line) in [("It went on", &self.failing), ("It ends well", passing)] {
            writeln!(f, "\n{title}:")?;
            let rest = &line.events[at + 1..];
            for event in rest.iter().take(SHOWN) {
                writeln!(f, "  {}", event.what)?;
            }
            if rest.len() > SHOWN {
                writeln!(f, "  ... and {} events more", rest.len() - SHOWN)?;
            }
        }
        Ok(())
    }
}
