//! Choices: everything that the engine can observe, and who makes them.
//!
//! A choice is named by what it is about, never by its place in a list, so that a recorded
//! schedule survives changes of code that do not concern it.

use std::fmt;
use std::str::FromStr;

use crate::backend::{Bit, Breakage, OpName, Outcome};
use crate::disk::splitmix;
use crate::workload::number;

/// One thing that happens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Choice {
    /// The guest submits its next request.
    Submit(u32),
    /// The guest of the disk beside submits its next request.
    Beside,
    /// The disk is closed, whatever is in flight.
    Close,
    /// The disk is paused.
    Pause,
    /// It is resumed.
    Unpause,
    /// Its guest gives up all that it has in flight.
    Abandon,
    /// A copy between the disk and the one beside it is started.
    Copy,
    /// It is paused.
    PauseCopy,
    /// It is resumed.
    ResumeCopy,
    /// It is cancelled.
    CancelCopy,
    /// What it has read next is seen.
    SeeCopy,
    /// An op in flight ends.
    End(OpName, Outcome),
    /// The loop goes on with what the last turn left.
    Turn,
    /// Time passes, until the next deadline.
    Tick,
    /// The device takes no more ops.
    Stall,
    /// It takes ops again.
    Resume,
    /// The device ceases to do something.
    Break(Breakage),
    /// It does it again.
    Mend,
    /// A bit at rest changes, and nobody is told.
    Flip(Bit),
    /// All requests have ended that were submitted: the image is to be left clean.
    Drain,
    /// The machine stops, and starts again with what that leaves: 0 nothing that was not stable,
    /// 1 everything, others a mixture.
    Crash(u32),
}

impl Choice {
    /// Does it use up a fault?
    pub fn is_fault(self) -> bool {
        match self {
            Choice::End(_, outcome) => outcome.is_fault(),
            Choice::Stall | Choice::Break(_) | Choice::Crash(_) | Choice::Flip(_) => true,
            _ => false,
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Choice::Submit(which) => write!(f, "submit {which}"),
            Choice::End(name, outcome) => write!(f, "end {name} {}", outcome.name()),
            Choice::Beside => f.write_str("beside"),
            Choice::Close => f.write_str("close"),
            Choice::Pause => f.write_str("pause"),
            Choice::Unpause => f.write_str("unpause"),
            Choice::Abandon => f.write_str("abandon"),
            Choice::Copy => f.write_str("copy"),
            Choice::PauseCopy => f.write_str("pause-copy"),
            Choice::ResumeCopy => f.write_str("resume-copy"),
            Choice::CancelCopy => f.write_str("cancel-copy"),
            Choice::SeeCopy => f.write_str("see-copy"),
            Choice::Turn => f.write_str("turn"),
            Choice::Tick => f.write_str("tick"),
            Choice::Stall => f.write_str("stall"),
            Choice::Resume => f.write_str("resume"),
            Choice::Break(breakage) => write!(f, "break {}", breakage.name()),
            Choice::Mend => f.write_str("mend"),
            Choice::Flip(Bit { file, byte, bit }) => write!(f, "flip {file} {byte:#x} {bit}"),
            Choice::Drain => f.write_str("drain"),
            Choice::Crash(pick) => write!(f, "crash {pick}"),
        }
    }
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Choice, String> {
        let wrong = || format!("'{text}' is no choice");
        let words: Vec<&str> = text.split_whitespace().collect();
        match words[..] {
            ["submit", which] => Ok(Choice::Submit(which.parse().map_err(|_| wrong())?)),
            ["end", name, outcome] => {
                let (request, ordinal) = name.split_once('.').ok_or_else(wrong)?;
                let request = request.parse().map_err(|_| wrong())?;
                let ordinal = ordinal.parse().map_err(|_| wrong())?;
                let outcome = Outcome::from_name(outcome).ok_or_else(wrong)?;
                Ok(Choice::End(OpName { request, ordinal }, outcome))
            }
            ["beside"] => Ok(Choice::Beside),
            ["close"] => Ok(Choice::Close),
            ["pause"] => Ok(Choice::Pause),
            ["unpause"] => Ok(Choice::Unpause),
            ["abandon"] => Ok(Choice::Abandon),
            ["copy"] => Ok(Choice::Copy),
            ["pause-copy"] => Ok(Choice::PauseCopy),
            ["resume-copy"] => Ok(Choice::ResumeCopy),
            ["cancel-copy"] => Ok(Choice::CancelCopy),
            ["see-copy"] => Ok(Choice::SeeCopy),
            ["turn"] => Ok(Choice::Turn),
            ["tick"] => Ok(Choice::Tick),
            ["stall"] => Ok(Choice::Stall),
            ["resume"] => Ok(Choice::Resume),
            ["break", what] => Ok(Choice::Break(Breakage::from_name(what).ok_or_else(wrong)?)),
            ["mend"] => Ok(Choice::Mend),
            ["flip", file, byte, bit] => {
                let file = file.parse().map_err(|_| wrong())?;
                let bit = bit.parse().ok().filter(|bit| *bit < 8).ok_or_else(wrong)?;
                Ok(Choice::Flip(Bit { file, byte: number(byte)?, bit }))
            }
            ["drain"] => Ok(Choice::Drain),
            ["crash", pick] => Ok(Choice::Crash(pick.parse().map_err(|_| wrong())?)),
            _ => Err(wrong()),
        }
    }
}

/// Makes choices.
pub trait Chooser {
    /// The index of one of `among`, which is not empty.
    fn choose(&mut self, among: &[Choice]) -> usize;
}

/// What comes first in a run without surprises: everything is submitted, then ops end well.
fn rank(choice: &Choice) -> u8 {
    match choice {
        Choice::Resume | Choice::Unpause | Choice::ResumeCopy | Choice::Turn => 0,
        Choice::Submit(_) | Choice::Beside | Choice::Copy => 1,
        Choice::End(_, Outcome::Done) => 2,
        // All that a broken device does.
        Choice::End(_, Outcome::Fail) => 3,
        Choice::Drain => 4,
        _ => 5,
    }
}

/// Puts first what a run without surprises does.
pub(crate) fn calm_order(choices: &mut [Choice]) {
    choices.sort_by_key(rank);
}

/// What a run without surprises does: everything is submitted, then the oldest op ends well.
fn calm(among: &[Choice], newest: bool) -> usize {
    let best = among.iter().map(rank).min().expect("there is something to choose from");
    let mut of_that_rank = (0..among.len()).filter(|&i| rank(&among[i]) == best);
    let index = if newest { of_that_rank.next_back() } else { of_that_rank.next() };
    index.expect("the best rank is somebody's")
}

/// Everything well, oldest first.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fifo;

impl Chooser for Fifo {
    fn choose(&mut self, among: &[Choice]) -> usize {
        calm(among, false)
    }
}

/// Everything well, newest first.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lifo;

impl Chooser for Lifo {
    fn choose(&mut self, among: &[Choice]) -> usize {
        calm(among, true)
    }
}

/// Anything, by a generator that starts from a seed.
#[derive(Clone, Copy, Debug)]
pub struct Random {
    state: u64,
    /// One choice in so many may be a fault.
    fault_in: u64,
}

impl Random {
    /// Starts from `seed`; a fault is drawn in one of `fault_in` choices where one is possible.
    pub fn new(seed: u64, fault_in: u64) -> Random {
        Random { state: seed, fault_in }
    }

    /// Either the faults among them, or the others.
    fn fit(&mut self, among: &[Choice]) -> Vec<usize> {
        let faulty = self.below(self.fault_in) == 0;
        let fit = |i: &usize| among[*i].is_fault() == faulty;
        let fit: Vec<usize> = (0..among.len()).filter(fit).collect();
        if fit.is_empty() { (0..among.len()).collect() } else { fit }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        splitmix(self.state) % bound.max(1)
    }
}

impl Chooser for Random {
    fn choose(&mut self, among: &[Choice]) -> usize {
        let fit = self.fit(among);
        fit[self.below(fit.len() as u64) as usize]
    }
}

/// One task's ops before another's, whatever is in flight: each request has a priority, the highest
/// that can go on does, and at a few moments whoever is highest becomes the lowest. What takes few
/// such turns to go wrong is found soon (Burckhardt et al., "probabilistic concurrency testing").
#[derive(Clone, Debug)]
pub struct Pct {
    draw: Random,
    /// Priorities; who is not there has a drawn one.
    demoted: Vec<u32>,
    /// Choices to come until each moment.
    turns: Vec<u64>,
    seed: u64,
}

impl Pct {
    /// Starts from `seed`, for defects of `depth` turns; faults as with [`Random`].
    pub fn new(seed: u64, depth: usize, fault_in: u64) -> Pct {
        let mut draw = Random::new(seed, fault_in);
        let turns = (0..depth).map(|_| draw.below(CHOICES_EXPECTED)).collect();
        Pct { draw, demoted: Vec::new(), turns, seed }
    }

    fn priority(&self, choice: Choice) -> (usize, u64) {
        let task = match choice {
            Choice::End(name, _) => name.request,
            _ => u32::MAX,
        };
        let lower = self.demoted.iter().position(|demoted| *demoted == task);
        // Who was demoted last is the lowest; the others are above, in an order that is drawn.
        (lower.map_or(usize::MAX, |at| self.demoted.len() - at), splitmix(self.seed ^ task as u64))
    }
}

/// So many choices a run has, more or less.
const CHOICES_EXPECTED: u64 = 80;

impl Chooser for Pct {
    fn choose(&mut self, among: &[Choice]) -> usize {
        let fit = self.draw.fit(among);
        let highest = fit.iter().map(|&i| self.priority(among[i])).max();
        let highest = highest.expect("there is something to choose from");
        let tied: Vec<usize> =
            fit.into_iter().filter(|&i| self.priority(among[i]) == highest).collect();
        let chosen = tied[self.draw.below(tied.len() as u64) as usize];
        self.turns.iter_mut().for_each(|turn| *turn = turn.wrapping_sub(1));
        if let (true, Choice::End(name, _)) = (self.turns.contains(&u64::MAX), among[chosen]) {
            self.demoted.retain(|demoted| *demoted != name.request);
            self.demoted.push(name.request);
        }
        chosen
    }
}

/// What bytes say, one a choice, for whoever makes schedules out of bytes: a fuzzer, quickcheck. Fewer
/// bytes or smaller ones are a calmer run: byte `n` is the choice number `n` of those there are, the
/// calmest first; behind the last all is calm.
#[derive(Clone, Debug)]
pub struct Bytes {
    bytes: std::collections::VecDeque<u8>,
}

impl Bytes {
    /// Of these bytes.
    pub fn new(bytes: impl IntoIterator<Item = u8>) -> Bytes {
        Bytes { bytes: bytes.into_iter().collect() }
    }
}

impl Chooser for Bytes {
    fn choose(&mut self, among: &[Choice]) -> usize {
        let first = calm(among, false);
        let byte = usize::from(self.bytes.pop_front().unwrap_or(0)) % among.len();
        match byte {
            0 => first,
            // The others, in their order.
            n if n <= first => n - 1,
            n => n,
        }
    }
}

/// What a trace says. Where the trace names nothing that is possible, as after a change of code,
/// it goes on with the oldest op, which ends well.
#[derive(Clone, Debug)]
pub struct Replay {
    choices: std::collections::VecDeque<Choice>,
    /// Choices of the trace that were not possible.
    pub missed: usize,
}

impl Replay {
    /// Of these choices.
    pub fn new(choices: impl IntoIterator<Item = Choice>) -> Replay {
        Replay { choices: choices.into_iter().collect(), missed: 0 }
    }
}

impl Chooser for Replay {
    fn choose(&mut self, among: &[Choice]) -> usize {
        while let Some(next) = self.choices.pop_front() {
            match among.iter().position(|choice| *choice == next) {
                Some(index) => return index,
                None => self.missed += 1,
            }
        }
        calm(among, false)
    }
}
