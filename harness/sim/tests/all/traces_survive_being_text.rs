//! A trace is its text: what is written is read back as it was.

use cowbell_formats::Format;
use cowbell_sim::backend::{Bit, OpName, Outcome};
use cowbell_sim::choose::Choice;
use cowbell_sim::random::plan;
use cowbell_sim::trace::Trace;
use quickcheck::quickcheck;

fn choice(draw: (u8, u32, u32)) -> Choice {
    let (kind, request, ordinal) = draw;
    match kind % 17 {
        0 => Choice::Submit(request),
        1 => Choice::Tick,
        2 => Choice::Stall,
        3 => Choice::Resume,
        4 => Choice::Drain,
        5 => Choice::Flip(Bit { file: request, byte: ordinal.into(), bit: request as u8 % 8 }),
        n => Choice::End(OpName { request, ordinal }, Outcome::ALL[n as usize - 6]),
    }
}

quickcheck! {
    fn a_trace_is_read_as_it_was_written(seed: u64, draws: Vec<(u8, u32, u32)>, raw: bool) -> bool {
        let mut plan = plan(seed, Some(if raw { Format::Raw } else { Format::Qed }));
        for which in 0..plan.workload.requests.len() {
            plan.workload.submit_after(which, seed.rotate_left(which as u32 * 7));
        }
        let trace = Trace {
            image: plan.image,
            budget: plan.budget,
            workload: plan.workload,
            choices: draws.into_iter().map(choice).collect(),
            plant: raw.then_some("flush_error_swallowed"),
            verdict: Some("it went wrong".into()),
        };
        trace.to_string().parse() == Ok(trace)
    }
}
