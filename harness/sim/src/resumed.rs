//! Long runs that go on where the last one stopped.
//!
//! A state says which seed is next, and has the traces of what failed. Those are run again first: what does not fail any
//! more is mended, what still does is known. A failure of a kind that is known is not a new one. It is text:
//!
//! ```text
//! cowbell runs 1
//! next 4096
//! trace
//! cowbell trace 1
//! …
//! end
//! ```

use std::fmt;
use std::str::FromStr;

use cowbell_formats::Format;

use crate::clock::Stopwatch;
use crate::gate::Report;
use crate::random::random_for;
use crate::shrink::class_of;
use crate::trace::Trace;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The next seed.
    pub next: u64,
    /// Failures, oldest first: one of a kind, and [`KNOWN_MAX`] at most.
    pub known: Vec<Trace>,
}

/// Failures that are kept.
pub const KNOWN_MAX: usize = 100;

/// Seeds between two moments at which the state is kept, for each thread.
const ROUND: u64 = 64;

/// What became of the failures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Known ones that still fail.
    pub known: Vec<Trace>,
    /// Known ones that do not fail any more. The state has them no longer.
    pub mended: Vec<Trace>,
    /// Of kinds that nobody knew.
    pub new: Vec<Trace>,
}

/// How far to go.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// So many seeds, about.
    pub runs: u64,
    /// Seconds, about.
    pub seconds: Option<f64>,
    /// Threads.
    pub threads: usize,
}

impl State {
    /// Runs what is known again, and then goes on. `keep` is told of the state again and again, and may end it.
    ///
    /// # Errors
    ///
    /// What `keep` says.
    pub fn go_on<E>(
        &mut self,
        format: Option<Format>,
        extent: Extent,
        keep: &mut dyn FnMut(&State) -> Result<(), E>,
    ) -> Result<(Report, Outcome), E> {
        let watch = Stopwatch::start();
        let Extent { runs, seconds, threads } = extent;
        let mut outcome = Outcome::default();
        for trace in std::mem::take(&mut self.known) {
            match trace.replay() {
                Ok(_) => outcome.mended.push(trace),
                Err(_) => self.known.push(trace),
            }
        }
        outcome.known = self.known.clone();
        keep(self)?;
        let mut report =
            Report { title: "random".into(), threads, complete: true, ..Report::default() };
        let end = self.next.saturating_add(runs);
        while self.next < end {
            let left = seconds.map(|limit| limit - watch.seconds());
            if left.is_some_and(|left| left <= 0.0) {
                break;
            }
            let count = (ROUND * threads as u64).min(end - self.next);
            let round = random_for(self.next, count, format, threads, left);
            report.counts += round.counts;
            for trace in round.failures {
                let kind = |trace: &Trace| class_of(trace.verdict.as_deref().unwrap_or_default());
                if !self.known.iter().any(|known| kind(known) == kind(&trace)) {
                    outcome.new.push(trace.clone());
                    self.known.extend((self.known.len() < KNOWN_MAX).then_some(trace));
                }
            }
            // What was cut off is done again.
            if seconds.is_none_or(|limit| watch.seconds() < limit) {
                self.next += count;
            }
            keep(self)?;
        }
        report.failures = outcome.new.clone();
        report.seconds = watch.seconds();
        Ok((report, outcome))
    }
}

const MAGIC: &str = "cowbell runs 1";

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{MAGIC}\nnext {}", self.next)?;
        self.known.iter().try_for_each(|trace| write!(f, "trace\n{trace}end\n"))
    }
}

impl FromStr for State {
    type Err = String;

    fn from_str(text: &str) -> Result<State, String> {
        let mut lines = text.lines();
        if lines.next() != Some(MAGIC) {
            return Err(format!("not a state of runs: the first line is not '{MAGIC}'"));
        }
        let next = lines.next().and_then(|line| line.strip_prefix("next "));
        let next = next.and_then(|number| number.parse().ok()).ok_or("it names no next seed")?;
        let mut known = Vec::new();
        while let Some(line) = lines.next() {
            if line != "trace" {
                return Err(format!("'{line:.40}' begins no trace"));
            }
            let mut trace = String::new();
            for line in lines.by_ref().take_while(|line| *line != "end") {
                trace += line;
                trace.push('\n');
            }
            known.push(trace.parse()?);
            if known.len() > KNOWN_MAX {
                return Err(format!("more than {KNOWN_MAX} traces"));
            }
        }
        Ok(State { next, known })
    }
}
