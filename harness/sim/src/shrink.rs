//! Smaller traces of the same failure: fewer requests, fewer choices, a plainer image, less that may go wrong.
//!
//! Delta debugging: parts are left out, largest first, and whatever still fails in the same way is
//! gone on with. A request that is left out shifts the names of ops, so that a schedule may no
//! longer fit; what is left of a small workload is therefore searched through as well.

use cowbell_engine::step::IoKind;

use crate::explore::{Limit, exhaust};
use crate::mutants::planted;
use crate::subject::Subject;
use crate::trace::Trace;
use crate::workload::Request;

/// The smallest trace that was found to fail as `trace` does; `None` if it does not fail at all.
pub fn shrink<S: Subject + PartialEq>(trace: &Trace<S>) -> Option<Trace<S>> {
    let failed = trace.replay().err()?;
    let mut best = trace.failing(&failed);
    let class = class_of(&failed.verdict);
    loop {
        let before = weight(&best);
        best = fewer_requests(best, &class);
        best = fewer_flushes(best, &class);
        best = plainer(best, &class);
        best = calmer(best, &class);
        best = fewer_choices(best, &class);
        if weight(&best) >= before {
            return Some(best);
        }
    }
}

/// What kind of failure it is: the verdict without numbers.
pub(crate) fn class_of(verdict: &str) -> String {
    let line = verdict.lines().next().unwrap_or_default();
    let line = line.strip_prefix("seed ").map_or(line, |rest| rest.trim_start_matches(digit));
    let words = line.split(|c: char| c.is_ascii_digit() || c == '[' || c == '{').next();
    let words = words.unwrap_or_default().trim_start_matches(": ");
    // Whose bytes were found, and by whom, is a matter of which requests there are.
    let whose = ["a crash left", "the disk holds", "a read returned"];
    match whose.iter().find(|start| words.starts_with(**start)) {
        Some(&"a read returned") => "the disk holds".to_string(),
        Some(start) => start.to_string(),
        None => words.to_string(),
    }
}

fn digit(c: char) -> bool {
    c.is_ascii_digit()
}

/// What is to become less.
fn weight<S: Subject>(trace: &Trace<S>) -> usize {
    let bytes: u64 = trace.workload.requests.iter().map(|request| request.len / 512).sum();
    let unlike = trace.image.plainer().len() + trace.budget.calmer().len();
    trace.workload.requests.len() * 1000 + trace.choices.len() * 10 + unlike + bytes as usize
}

/// `candidate` as it fails in the same way, if it does.
fn fails<S: Subject>(candidate: &Trace<S>, class: &str) -> Option<Trace<S>> {
    let failure = candidate.replay().err()?;
    (class_of(&failure.verdict) == class).then(|| candidate.failing(&failure))
}

/// As [`fails`]; a small workload is searched for another way to fail.
fn fails_somehow<S: Subject>(candidate: &Trace<S>, class: &str) -> Option<Trace<S>> {
    if let Some(found) = fails(candidate, class) {
        return Some(found);
    }
    if candidate.workload.requests.len() > SEARCHED_REQUESTS {
        return None;
    }
    let limit = Limit { states: SEARCHED_STATES, ..Limit::default() };
    let world = candidate.world().ok()?;
    let failure = planted(candidate.plant, || exhaust(&world, limit)).err()?;
    (class_of(&failure.verdict) == class).then(|| candidate.failing(&failure))
}

const SEARCHED_REQUESTS: usize = 4;
const SEARCHED_STATES: u64 = 100_000;

/// Leaves out parts of `items`, from halves down to single ones, as long as `keep` finds that
/// what is left will do.
fn leave_out<T: Clone>(mut items: Vec<T>, mut keep: impl FnMut(&[T]) -> bool) {
    let mut part = items.len().div_ceil(2);
    while part > 0 {
        let mut at = 0;
        while at < items.len() {
            let mut left = items.clone();
            left.drain(at..(at + part).min(items.len()));
            if keep(&left) { items = left } else { at += part }
        }
        part /= 2;
    }
}

fn fewer_requests<S: Subject>(mut best: Trace<S>, class: &str) -> Trace<S> {
    let all = best.workload.clone();
    leave_out((0..all.requests.len()).collect(), |kept: &[usize]| {
        let workload = all.only(kept);
        let found = fails_somehow(&Trace { workload, ..best.clone() }, class);
        let better = found.is_some();
        best = found.unwrap_or_else(|| best.clone());
        better
    });
    best
}

/// What is flushed may as well be stable when it ends, without another request.
fn fewer_flushes<S: Subject>(mut best: Trace<S>, class: &str) -> Trace<S> {
    let mut flush = best.workload.requests.len();
    while flush > 0 {
        flush -= 1;
        if best.workload.requests.get(flush) != Some(&Request::flush()) {
            continue;
        }
        for changed in 0..flush {
            let mut workload = best.workload.clone();
            let request = &mut workload.requests[changed];
            request.kind = match request.kind {
                IoKind::Write { compressed, .. } => IoKind::Write { fua: true, compressed },
                IoKind::Zero { .. } | IoKind::Discard => IoKind::Zero { unmap: true, fua: true },
                _ => continue,
            };
            let workload = workload.without(flush);
            if let Some(found) = fails_somehow(&Trace { workload, ..best.clone() }, class) {
                best = found;
                break;
            }
        }
    }
    best
}

fn fewer_choices<S: Subject>(mut best: Trace<S>, class: &str) -> Trace<S> {
    leave_out(best.choices.clone(), |choices| {
        let found = fails(&Trace { choices: choices.to_vec(), ..best.clone() }, class);
        // What is left out is replaced by what happens in a calm run: only shorter is better.
        let found = found.filter(|found| found.choices.len() < best.choices.len());
        let better = found.is_some();
        best = found.unwrap_or_else(|| best.clone());
        better
    });
    best
}

/// Options towards those of an ordinary image, requests towards small and aligned ones.
fn plainer<S: Subject + PartialEq>(mut best: Trace<S>, class: &str) -> Trace<S> {
    for image in best.image.plainer() {
        // Each is made from the first; what was gained before is kept.
        let image = best.image.plainer().into_iter().find(|plain| *plain == image);
        if let Some(found) = image.and_then(|image| fails_in(&best, image, class)) {
            best = found;
        }
    }
    for which in 0..best.workload.requests.len() {
        for request in plainer_requests(&best.workload.requests[which]) {
            let mut candidate = best.clone();
            candidate.workload.requests[which] = request;
            if let Some(found) = fails_somehow(&candidate, class) {
                best = found;
            }
        }
    }
    best
}

/// Less of what may go wrong, where that is not what it is about.
fn calmer<S: Subject>(mut best: Trace<S>, class: &str) -> Trace<S> {
    let mut tried = 0;
    while let Some(&budget) = best.budget.calmer().get(tried) {
        match fails_somehow(&Trace { budget, ..best.clone() }, class) {
            Some(found) => best = found,
            None => tried += 1,
        }
    }
    best
}

fn fails_in<S: Subject>(best: &Trace<S>, image: S, class: &str) -> Option<Trace<S>> {
    let largest = best.workload.largest_size(image.size());
    let fits = best.workload.requests.iter().all(|request| request.end() <= largest);
    if fits { fails_somehow(&Trace { image, ..best.clone() }, class) } else { None }
}

fn plainer_requests(request: &Request) -> Vec<Request> {
    if request.len == 0 {
        return Vec::new();
    }
    let kind = match request.kind {
        IoKind::Write { compressed, .. } => IoKind::Write { fua: false, compressed },
        IoKind::Zero { .. } => IoKind::Zero { unmap: true, fua: false },
        kind => kind,
    };
    let candidates = [
        Request { len: 512, ..*request },
        Request { len: request.len.min(1024), ..*request },
        Request { offset: request.offset / 512 * 512, ..*request },
        Request { kind, ..*request },
    ];
    candidates
        .into_iter()
        .filter(|candidate| candidate != request && smaller(candidate, request))
        .collect()
}

fn smaller(a: &Request, b: &Request) -> bool {
    a.len <= b.len && a.offset <= b.offset
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_is_kept_and_nothing_else() {
        let mut left = Vec::new();
        leave_out((0..40).collect(), |items: &[u32]| {
            let will_do = items.contains(&7) && items.contains(&33);
            if will_do {
                left = items.to_vec();
            }
            will_do
        });
        assert_eq!(left, [7, 33]);
    }

    #[test]
    fn failures_are_of_one_kind_whatever_their_numbers() {
        let read = class_of("a read returned request 1 at 0x0..0x200; legal: request 0");
        assert_eq!(read, class_of("the disk holds request 1 at 0x400..0x600; legal: request 0"));
        let a = class_of("seed 12: a crash left request 3 at 0x0..0x200; legal: request 5");
        assert_eq!(a, class_of("a crash left what was there before at 0x400..0x600; legal: 1"));
        assert_ne!(a, class_of("after a crash: 1 corruptions"));
    }
}
