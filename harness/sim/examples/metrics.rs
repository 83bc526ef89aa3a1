//! Measures, and prints `METRICS.md`.

use std::process::Command;

use cowbell_formats::Format;
use cowbell_sim::gate::gate;
use cowbell_sim::metrics::{Metrics, machine};
use cowbell_sim::mutants::hunt_all;
use cowbell_sim::random::random;
use cowbell_sim::sleep::measured;

fn main() {
    let git = Command::new("git").args(["describe", "--always", "--dirty"]).output();
    let commit = git.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_string());
    let gate = gate(2);
    let random = random(0, 4000, None, 2);
    let mutants = hunt_all("", 1, 30.0).ok();
    let sleep = Format::ALL.map(|format| (format, measured(format).expect("all is well")));
    let metrics = Metrics {
        commit: commit.as_deref().unwrap_or("unknown"),
        machine: &machine(),
        gate: &gate,
        random: &random,
        sleep: &sleep,
        mutants: mutants.as_ref(),
    };
    print!("{}", metrics.page());
}
