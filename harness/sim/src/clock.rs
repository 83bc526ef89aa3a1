//! The one clock here: how long runs take. Nothing that is simulated ever sees it.
#![expect(clippy::disallowed_methods, reason = "rates are measured in real time")]

use std::time::Instant;

/// Measures.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts.
    pub fn start() -> Stopwatch {
        Stopwatch(Instant::now())
    }

    /// Seconds since then.
    pub fn seconds(&self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }
}
