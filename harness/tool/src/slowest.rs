//! `bench --trace`: where the slowest request spent its time. The run is recorded in memory as it happens, and the part
//! around that request is done again and drawn.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use cowbell_engine::record::{CHUNK, Sink};
use cowbell_engine::step::Io;
use cowbell_engine::{Asker, Awaits};
use cowbell_sim::played::{Moment, Verdict};
use cowbell_sim::timeline::{By, Focus, Request, Timeline, words};

use crate::fail::Fail;
use crate::form::Form;
use crate::number::duration;
use crate::out::Out;
use crate::record::again;

/// A record in memory. What comes when it is full is not recorded any more.
#[derive(Clone, Debug, Default)]
pub struct Kept(Arc<Mutex<Vec<u8>>>);

/// Bytes of it, at most: some millions of requests.
pub const KEPT_MAX: usize = 64 << 20;

impl Kept {
    /// An empty one, which begins with this.
    pub fn begin(&self, head: &str) -> Box<dyn Sink> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = head.as_bytes().to_vec();
        Box::new(self.clone())
    }
}

impl Sink for Kept {
    fn take(&mut self, mut chunk: Vec<u8>) -> Option<Vec<u8>> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes.len() + chunk.len() > KEPT_MAX {
            return None;
        }
        bytes.append(&mut chunk);
        drop(bytes);
        chunk.reserve(CHUNK + CHUNK / 4);
        Some(chunk)
    }
}

/// A request that has ended.
#[derive(Clone, Copy, Debug)]
struct Slow {
    tag: u64,
    io: Io,
    nanos: u64,
    /// In which turn it was there first, and in which it ended.
    turns: (u64, u64),
}

/// Turns that are shown before it and after it, and of it at most: a page of more is too large to be looked at.
const BEFORE: u64 = 8;
const AFTER: u64 = 4;
const SHOWN: u64 = 10_000;

/// Finds the slowest request of what was kept, says where its time went, and draws that.
pub fn draw(kept: &Kept, path: &Path, out: &mut Out) -> Result<(), Fail> {
    let form = Form::of(path)?;
    let bytes = std::mem::take(&mut *kept.0.lock().unwrap_or_else(PoisonError::into_inner));
    let Some((slow, count)) = slowest(&bytes, path)? else {
        return Err(Fail::at(path, "no request has ended"));
    };
    let (mut player, about) = again(&bytes, path)?;
    let (first, last) = slow.turns;
    let from = first.saturating_sub(BEFORE);
    let until = (last + AFTER).min(from + SHOWN);
    let title = format!("The slowest of {count} requests");
    let (_, mut timeline) = player.play_seen((title, about), from, &mut |engine, moment| {
        engine.backend().done.runs < until || moment != Moment::Ran
    });
    let mine = timeline.requests.iter().position(|request| request.by == By::Guest(slow.tag));
    let mine = mine.ok_or_else(|| Fail::at(path, "the slowest request is not done again"))?;
    let mut lines = vec![format!(
        "Slowest of {count} requests: {}, {}, {}",
        timeline.requests[mine].name(),
        words(&slow.io),
        duration(slow.nanos)
    )];
    lines.extend(stays(&timeline, &timeline.requests[mine]).into_iter().map(
        |(state, waits, nanos)| format!("  {} in {state}: waits for {waits}", duration(nanos)),
    ));
    lines.push(match last + AFTER > until {
        true => format!("Drawn are turns {from} to {until} of the loop; it ended in {last}."),
        false => format!("Drawn are turns {from} to {until} of the loop."),
    });
    lines.iter().try_for_each(|line| writeln!(out, "{line}"))?;
    timeline.focus = Some(Focus { request: mine, lines });
    form.draw(&timeline, path)
}

/// The slowest request, and how many have ended.
fn slowest(bytes: &[u8], path: &Path) -> Result<Option<(Slow, u64)>, Fail> {
    let (mut player, _) = again(bytes, path)?;
    let (mut tag, mut count) = (0, 0);
    let mut there: BTreeMap<u64, (Io, u64, u64)> = BTreeMap::new();
    let mut slowest: Option<Slow> = None;
    let verdict = player.play(&mut |engine, moment| {
        let (now, turn) = (engine.backend().time().0, engine.backend().done.runs);
        match moment {
            Moment::Submitted(io) => {
                // As they are counted there.
                tag += 1;
                there.insert(tag, (io, now, turn));
            }
            Moment::Ran => {
                // Before the first turn nobody had looked at a clock.
                there.values_mut().filter(|(_, since, _)| *since == 0).for_each(|it| it.1 = now);
                for request in engine.requests() {
                    let (Asker::Guest(tag), Awaits::Poll(_)) = (request.asker, request.awaits)
                    else {
                        continue;
                    };
                    let Some((io, since, first)) = there.remove(&tag) else { continue };
                    count += 1;
                    let nanos = now.saturating_sub(since);
                    if slowest.is_none_or(|slow| nanos > slow.nanos) {
                        slowest = Some(Slow { tag, io, nanos, turns: (first, turn) });
                    }
                }
            }
            Moment::Called => {}
        }
        true
    });
    match verdict {
        Verdict::Differs(how) => {
            Err(Fail::at(path, format!("done again it goes another way: {how}")))
        }
        Verdict::Same | Verdict::Untold(_) => Ok(slowest.map(|slow| (slow, count))),
    }
}

/// Where a request was for how long, longest first: the state, what it waited for, nanoseconds.
fn stays(line: &Timeline, request: &Request) -> Vec<(&'static str, &'static str, u64)> {
    let time = |at: u32| line.events.get(at as usize).map_or(0, |event| event.time);
    let mut sums: Vec<(&str, &str, u64)> = Vec::new();
    for stay in &request.stays {
        let nanos = time(stay.to).saturating_sub(time(stay.from));
        let words = stay.wait.words();
        match sums.iter_mut().find(|(state, waits, _)| (*state, *waits) == (stay.state, words)) {
            Some((.., sum)) => *sum += nanos,
            None => sums.push((stay.state, words, nanos)),
        }
    }
    sums.sort_by_key(|&(.., nanos)| std::cmp::Reverse(nanos));
    sums
}
