//! What was served: counted, and said to people and programs.

use cowbell_engine::units::Time;

use crate::json::Json;
use crate::number::human;

/// Everything since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Clients that came.
    pub clients: u64,
    /// Clients that did not speak the protocol.
    pub broken: u64,
    /// Clients that stood still for too long.
    pub stalled: u64,
    /// Requests, by [`KINDS`].
    pub requests: [u64; 7],
    /// Bytes read.
    pub read: u64,
    /// Bytes written.
    pub written: u64,
    /// Requests that failed.
    pub failed: u64,
}

/// What a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    Write,
    Flush,
    Trim,
    Zero,
    Cache,
    Status,
}

/// Kinds of requests.
const KINDS: [&str; 7] = ["read", "write", "flush", "trim", "zero", "cache", "status"];

impl Counts {
    /// A request of `len` bytes has begun.
    #[inline]
    pub fn begun(&mut self, kind: Kind, len: u64) {
        self.requests[kind as usize] += 1;
        match kind {
            Kind::Read => self.read += len,
            Kind::Write => self.written += len,
            _ => {}
        }
    }

    /// Of two front ends together.
    pub fn plus(mut self, other: &Counts) -> Counts {
        self.clients += other.clients;
        self.broken += other.broken;
        self.stalled += other.stalled;
        self.requests.iter_mut().zip(other.requests).for_each(|(all, more)| *all += more);
        self.read += other.read;
        self.written += other.written;
        self.failed += other.failed;
        self
    }

    /// For programs.
    pub fn to_json(self, seconds: f64, now: usize) -> Json {
        let requests = KINDS.iter().copied().zip(self.requests.map(Json::Int)).collect();
        Json::Object(vec![
            ("seconds", Json::Float(seconds)),
            ("clients", Json::Int(now as u64)),
            ("clients-ever", Json::Int(self.clients)),
            ("clients-broken", Json::Int(self.broken)),
            ("clients-stalled", Json::Int(self.stalled)),
            ("requests", Json::Object(requests)),
            ("failed", Json::Int(self.failed)),
            ("bytes-read", Json::Int(self.read)),
            ("bytes-written", Json::Int(self.written)),
        ])
    }

    /// For people: all of it.
    pub fn to_line(self, seconds: f64) -> String {
        let [reads, writes, ..] = self.requests;
        let all: u64 = self.requests.iter().sum();
        format!(
            "{} clients in {seconds:.0} s; {all} requests, {} failed: {reads} reads ({}), {writes} writes ({})",
            self.clients,
            self.failed,
            human(self.read),
            human(self.written)
        )
    }
}

/// Rates, as they are shown again and again.
#[derive(Debug)]
pub struct Rates {
    at: Time,
    then: Counts,
}

impl Rates {
    /// From now on.
    pub fn new(now: Time) -> Rates {
        Rates { at: now, then: Counts::default() }
    }

    /// Since the last time this was asked.
    pub fn line(&mut self, now: Time, counts: &Counts, clients: usize) -> String {
        let seconds = (now.since(self.at) as f64 / 1e9).max(1e-3);
        let rate = |new: u64, old: u64| ((new - old) as f64 / seconds) as u64;
        let all = |counts: &Counts| counts.requests.iter().sum::<u64>();
        let line = format!(
            "{clients} clients  {} requests/s  read {}/s  written {}/s",
            rate(all(counts), all(&self.then)),
            human(rate(counts.read, self.then.read)),
            human(rate(counts.written, self.then.written)),
        );
        (self.at, self.then) = (now, *counts);
        line
    }
}
