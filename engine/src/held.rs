//! Requests that may not begin yet: a disk has a limit, or an older write is still under way that its
//! guest knows nothing of any more.
//!
//! A held request is recorded and has its place, and nothing of it is in flight. Each `run` looks
//! at those that are held, oldest first, and lets go those that may begin:
//!
//! * *Rate.* Two accounts for each disk, of bytes and of requests, each a moment up to which all is
//!   paid for (the virtual schedule of a leaky bucket, ITU-T I.371). A request begins when that is no
//!   further ahead than the burst, and moves it. One that has to wait makes those behind it wait.
//! * *Abandoned writes.* What would change bytes that one in flight changes waits until that has ended.
//!   Otherwise what is old might come after what is new.

use std::time::Duration;

use crate::mutant;
use crate::request::{Io, IoKind};
use crate::units::{ReqId, Time};

/// A disk's limit. Reads and writes count by their bytes, and with zero writes and discards as
/// requests; flushes and questions go at once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Rate {
    /// Bytes a second. `None`: no limit. 0 counts as 1. Default: `None`.
    pub bytes: Option<u64>,
    /// Requests a second. `None`: no limit. 0 counts as 1. Default: `None`.
    pub requests: Option<u64>,
    /// What so long a time allows may go at once after a pause as long. Whatever it is, one request
    /// of any length goes. Default: 100 ms.
    pub burst: Duration,
}

impl Default for Rate {
    fn default() -> Rate {
        Rate { bytes: None, requests: None, burst: Duration::from_millis(100) }
    }
}

/// What is held of a node, and why.
#[derive(Clone, Debug, Default, Hash)]
pub(crate) struct Hold {
    rate: Option<Rate>,
    /// Up to when bytes and requests are paid for.
    paid: [Time; 2],
    /// Not begun, oldest first.
    pub held: Vec<ReqId>,
    /// In flight, and nobody's any more.
    pub abandoned: Vec<Abandoned>,
}

/// Whose write it was, and what it changes: from and to.
pub(crate) type Abandoned = (ReqId, u64, u64);

impl Hold {
    /// Must new requests be looked at?
    pub fn is_needed(&self) -> bool {
        self.rate.is_some() || !self.abandoned.is_empty() || !self.held.is_empty()
    }

    /// From now on this is the limit.
    pub fn set_rate(&mut self, rate: Option<Rate>, now: Time) {
        (self.rate, self.paid) = (rate, [now; 2]);
    }

    /// Which of those that are held may begin; `io_of` tells what one is about. `is_over`: limits do
    /// not count any more. `there`: abandoned writes where the disk is now, if it has moved.
    pub fn let_go(
        &mut self,
        now: Time,
        is_over: bool,
        there: &[Abandoned],
        io_of: impl Fn(ReqId) -> Io,
    ) -> Vec<ReqId> {
        let mut is_late = false;
        let mut gone = Vec::new();
        let held = std::mem::take(&mut self.held);
        for request in held {
            let io = io_of(request);
            let counts = self.rate.filter(|_| !is_over && is_limited(&io));
            let overtakes = self.overtakes(&io, there);
            let waits_for_write = overtakes && !mutant!("write_overtakes_abandoned_one");
            is_late |= counts.is_some_and(|rate| self.due(rate) > now);
            if waits_for_write || counts.is_some() && is_late {
                self.held.push(request);
                continue;
            }
            if let Some(rate) = counts {
                self.pay(rate, &io, now);
            }
            gone.push(request);
        }
        gone
    }

    /// Would it change bytes that an abandoned write may still change?
    fn overtakes(&self, io: &Io, there: &[Abandoned]) -> bool {
        let changes = io.kind.modifies() || io.kind == IoKind::Truncate;
        let mut abandoned = self.abandoned.iter().chain(there);
        changes && abandoned.any(|&(_, from, to)| meets(io, from, to))
    }

    /// When the next one may begin.
    fn due(&self, rate: Rate) -> Time {
        let burst = u64::try_from(rate.burst.as_nanos()).unwrap_or(u64::MAX);
        Time(self.paid[0].max(self.paid[1]).0.saturating_sub(burst))
    }

    fn pay(&mut self, rate: Rate, io: &Io, now: Time) {
        let moves = matches!(io.kind, IoKind::Read | IoKind::Write { .. });
        let costs = [(rate.bytes, if moves { io.len } else { 0 }), (rate.requests, 1)];
        for (paid, (per_second, count)) in self.paid.iter_mut().zip(costs) {
            if let Some(per_second) = per_second {
                *paid = (*paid).max(now).plus_at_rate(count, per_second);
            }
        }
    }

    /// When to look again, if time alone lets somebody go. `there` and `io_of` as above.
    pub fn deadline(&self, there: &[Abandoned], io_of: impl Fn(ReqId) -> Io) -> Option<Time> {
        let rate = self.rate?;
        let waits = |&request: &ReqId| {
            let io = io_of(request);
            is_limited(&io) && !self.overtakes(&io, there)
        };
        self.held.iter().any(waits).then(|| self.due(rate))
    }
}

/// Does a limit count it?
fn is_limited(io: &Io) -> bool {
    io.kind == IoKind::Read || io.kind.modifies()
}

/// Is a request about bytes of `from..to`? Setting the size is about all behind the new end: a write
/// from before it would make the disk longer again.
pub fn meets(io: &Io, from: u64, to: u64) -> bool {
    io.offset < to && (from < io.end() || io.kind == IoKind::Truncate)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn let_go(hold: &mut Hold, now: u64, ios: &[Io]) -> Vec<u32> {
        let gone = hold.let_go(Time(now), false, &[], |request| ios[request.index()]);
        gone.into_iter().map(|request| request.0).collect()
    }

    #[test]
    fn as_much_as_the_rate_allows_goes_and_a_burst_at_once() {
        let rate = Rate { bytes: Some(1 << 20), requests: None, burst: Duration::from_millis(100) };
        let mut hold = Hold::default();
        hold.set_rate(Some(rate), Time(0));
        // 1 MiB a second in pieces of 64 KiB: 16 a second.
        let ios = [Io::write(0, 64 << 10); 40];
        hold.held = (0..40).map(ReqId).collect();
        let burst = let_go(&mut hold, 0, &ios).len();
        assert!((2..=3).contains(&burst), "100 ms of it: {burst}");
        let mut count = burst;
        for ms in 1..=1000 {
            let due = hold.deadline(&[], |request| ios[request.index()]);
            let gone = let_go(&mut hold, ms * MS, &ios).len();
            assert_eq!(gone > 0, due.is_some_and(|due| due <= Time(ms * MS)), "at {ms} ms");
            count += gone;
        }
        assert!((17..=19).contains(&count), "{count} in a second and a burst");
    }

    #[test]
    fn requests_count_whatever_their_length_and_flushes_do_not() {
        let rate = Rate { requests: Some(1000), burst: Duration::ZERO, ..Rate::default() };
        let mut hold = Hold::default();
        hold.set_rate(Some(rate), Time(0));
        let ios =
            [Io::discard(0, 1 << 40), Io::zero(0, 1 << 40, true), Io::flush(), Io::status(0, 1)];
        hold.held = (0..4).map(ReqId).collect();
        assert_eq!(let_go(&mut hold, 0, &ios), [0, 2, 3]);
        assert!(let_go(&mut hold, MS - 1, &ios).is_empty());
        assert_eq!(let_go(&mut hold, MS, &ios), [1]);
        assert_eq!(hold.deadline(&[], |_| ios[0]), None);
    }

    #[test]
    fn what_is_larger_than_any_burst_goes_and_is_paid_for_afterwards() {
        let rate = Rate { bytes: Some(0), requests: Some(0), burst: Duration::ZERO };
        let mut hold = Hold::default();
        hold.set_rate(Some(rate), Time(0));
        let ios = [Io::read(0, 1 << 31), Io::read(0, 1)];
        hold.held = vec![ReqId(0), ReqId(1)];
        assert_eq!(let_go(&mut hold, 0, &ios), [0]);
        assert!(let_go(&mut hold, 1 << 60, &ios).is_empty(), "68 years, at a byte a second");
        hold.set_rate(None, Time(1));
        assert_eq!(let_go(&mut hold, 1, &ios), [1]);
    }

    #[test]
    fn only_what_changes_the_same_bytes_waits_for_an_abandoned_write() {
        let mut hold = Hold { abandoned: vec![(ReqId(9), 4096, 8192)], ..Hold::default() };
        let ios = [
            Io::write(0, 4096),
            Io::write(8191, 1),
            Io::read(4096, 4096),
            Io::discard(4000, 97),
            Io::flush(),
            Io::zero(8192, 512, false),
            Io::truncate(512),
            Io::truncate(8192),
        ];
        hold.held = (0..8).map(ReqId).collect();
        assert_eq!(let_go(&mut hold, 0, &ios), [0, 2, 4, 5, 7]);
        assert_eq!(hold.deadline(&[], |_| ios[0]), None, "no time lets them go");
        hold.abandoned.clear();
        assert_eq!(let_go(&mut hold, 0, &ios), [1, 3, 6]);
        assert!(!hold.is_needed());
    }
}
