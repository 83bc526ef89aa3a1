//! Workloads: what guests ask for, and what they write.
//!
//! A workload is a list of requests. Every write's bytes follow from its place in the list and
//! from where they go, so that any byte found anywhere later tells who wrote it.

use std::fmt;
use std::str::FromStr;

use cowbell_engine::mem::Buf;
use cowbell_engine::status::Status;
use cowbell_engine::step::{Io, IoKind};

use crate::disk::splitmix;

/// A guest's request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Request {
    /// What.
    pub kind: IoKind,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Request {
    /// Reads.
    pub fn read(offset: u64, len: u64) -> Request {
        Request { kind: IoKind::Read, offset, len }
    }

    /// Writes.
    pub const fn write(offset: u64, len: u64) -> Request {
        Request { kind: IoKind::Write { fua: false, compressed: false }, offset, len }
    }

    /// Writes, compressed where the format can.
    pub const fn write_compressed(offset: u64, len: u64) -> Request {
        Request { kind: IoKind::Write { fua: false, compressed: true }, offset, len }
    }

    /// Writes, and is done when that is stable.
    pub fn write_fua(offset: u64, len: u64) -> Request {
        Request { kind: IoKind::Write { fua: true, compressed: false }, offset, len }
    }

    /// Writes zeros.
    pub fn zero(offset: u64, len: u64) -> Request {
        Request { kind: IoKind::Zero { unmap: true, fua: false }, offset, len }
    }

    /// Discards.
    pub fn discard(offset: u64, len: u64) -> Request {
        Request { kind: IoKind::Discard, offset, len }
    }

    /// Sets the disk's size.
    pub fn truncate(size: u64) -> Request {
        Request { kind: IoKind::Truncate, offset: size, len: 0 }
    }

    /// Flushes.
    pub const fn flush() -> Request {
        Request { kind: IoKind::Flush, offset: 0, len: 0 }
    }

    /// Asks what is where.
    pub fn status(offset: u64, len: u64) -> Request {
        Request { kind: IoKind::Status { depth: 0 }, offset, len }
    }

    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// May it change the disk?
    pub fn modifies(&self) -> bool {
        !matches!(self.kind, IoKind::Read | IoKind::Flush | IoKind::Status { .. })
    }

    /// As the engine takes it.
    pub fn io(&self) -> Io {
        Io { kind: self.kind, offset: self.offset, len: self.len }
    }

    /// What it writes from `offset` on, as request number `which`. What is to be compressed can be: every
    /// other one to less than half, the others to nearly as much as it was.
    pub fn fill(&self, which: usize, offset: u64, bytes: &mut [u8]) {
        if !matches!(self.kind, IoKind::Write { compressed: true, .. }) {
            return pattern(which, offset, bytes);
        }
        let mask = if which.is_multiple_of(2) { 0x0f } else { 0x7f };
        for (at, byte) in (offset..).zip(bytes) {
            *byte = splitmix(at << 8 | which as u64) as u8 & mask | 1;
        }
    }

    /// The memory it brings, as request number `which`.
    pub fn memory(&self, which: usize) -> Option<Buf> {
        match self.kind {
            // A read that fills nothing must not look like zeros.
            IoKind::Read => Some(Buf::copied(&vec![UNREAD; self.len as usize])),
            IoKind::Status { .. } => Some(Buf::copied(&[UNREAD; Status::BYTES])),
            IoKind::Write { .. } => {
                let mut bytes = vec![0; self.len as usize];
                self.fill(which, self.offset, &mut bytes);
                Some(Buf::copied(&bytes))
            }
            _ => None,
        }
    }
}

const UNREAD: u8 = 0xee;

/// The bytes that request number `which` writes from `offset` on, but for what [`Request::fill`] says.
pub fn pattern(which: usize, offset: u64, bytes: &mut [u8]) {
    for (at, byte) in (offset..).zip(bytes) {
        let mixed = (which as u64 + 1).wrapping_mul(0x9e37_79b9) ^ at.wrapping_mul(0x85eb_ca6b);
        *byte = (mixed >> 13) as u8 | 1;
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, flags) = match self.kind {
            IoKind::Read => ("read", ""),
            IoKind::Write { fua: false, compressed: false } => ("write", ""),
            IoKind::Write { fua: true, compressed: false } => ("write", " fua"),
            IoKind::Write { fua: false, compressed: true } => ("write", " compressed"),
            IoKind::Write { fua: true, compressed: true } => ("write", " fua compressed"),
            IoKind::Flush => return f.write_str("flush"),
            IoKind::Zero { unmap: false, fua: false } => ("zero", ""),
            IoKind::Zero { unmap: true, fua: false } => ("zero", " unmap"),
            IoKind::Zero { unmap: false, fua: true } => ("zero", " fua"),
            IoKind::Zero { unmap: true, fua: true } => ("zero", " unmap fua"),
            IoKind::Discard => ("discard", ""),
            IoKind::Status { .. } => ("status", ""),
            IoKind::Truncate => return write!(f, "truncate {:#x}", self.offset),
        };
        write!(f, "{verb} {:#x}+{:#x}{flags}", self.offset, self.len)
    }
}

/// A number in hexadecimal with `0x`, or in decimal.
pub fn number(text: &str) -> Result<u64, String> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .map_err(|_| format!("'{text}' is no number"))
}

impl FromStr for Request {
    type Err = String;

    fn from_str(text: &str) -> Result<Request, String> {
        let mut words = text.split_whitespace();
        let verb = words.next().ok_or("an empty request")?;
        if verb == "flush" {
            return Ok(Request::flush());
        }
        let range = words.next().ok_or_else(|| format!("'{text}' has no range"))?;
        let flags: Vec<&str> = words.collect();
        let (unmap, fua) = (flags.contains(&"unmap"), flags.contains(&"fua"));
        if verb == "truncate" {
            return Ok(Request::truncate(number(range)?));
        }
        let (offset, len) =
            range.split_once('+').ok_or_else(|| format!("'{range}' is no offset+length"))?;
        let kind = match verb {
            "read" => IoKind::Read,
            "write" => IoKind::Write { fua, compressed: flags.contains(&"compressed") },
            "zero" => IoKind::Zero { unmap, fua },
            "discard" => IoKind::Discard,
            "status" => IoKind::Status { depth: 0 },
            _ => return Err(format!("'{verb}' is no request")),
        };
        Ok(Request { kind, offset: number(offset)?, len: number(len)? })
    }
}

/// Requests, in the order in which they are submitted.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Workload {
    /// They. At most [`REQUESTS_MAX`].
    pub requests: Vec<Request>,
    /// For each, bit `n`: its guest submits it only when request number `n` has ended. Where there is nothing: it waits for none.
    after: Vec<u64>,
}

/// Requests in a workload at most: who wrote what is kept in the bits of a word; one bit is for what
/// was there before, and two are for [another disk](crate::shadow::OTHERS).
pub const REQUESTS_MAX: usize = 61;

impl Workload {
    /// Of these requests.
    pub fn new(requests: impl IntoIterator<Item = Request>) -> Workload {
        let requests: Vec<Request> = requests.into_iter().collect();
        assert!(requests.len() <= REQUESTS_MAX, "{} requests are too many", requests.len());
        Workload { requests, after: Vec::new() }
    }

    /// Request number `which` is submitted only when those before it have ended whose bits are set.
    pub fn submit_after(&mut self, which: usize, others: u64) {
        let others = others & !(u64::MAX << which.min(63));
        if others != 0 && which < self.requests.len() {
            self.after.resize(self.after.len().max(which + 1), 0);
            self.after[which] |= others;
        }
    }

    /// Bit `n`: request number `which` is submitted only when number `n` has ended.
    pub fn waits_for(&self, which: usize) -> u64 {
        self.after.get(which).copied().unwrap_or(0)
    }

    /// Only these of them, in ascending order. Who waits for one that is left out waits for what that has waited for.
    #[must_use]
    pub fn only(&self, kept: &[usize]) -> Workload {
        let mut only = Workload::new(kept.iter().map(|&which| self.requests[which]));
        for (place, &which) in kept.iter().enumerate() {
            // Submissions are in order: what one has waited for, those behind it have waited for, too.
            let waited = (0..=which).fold(0, |all, which| all | self.waits_for(which));
            let bit = |(at, other): (usize, &usize)| (waited >> other & 1) << at;
            only.submit_after(
                place,
                kept.iter().enumerate().map(bit).fold(0, |all, bit| all | bit),
            );
        }
        only
    }

    /// All but one.
    #[must_use]
    pub fn without(&self, which: usize) -> Workload {
        let kept: Vec<usize> = (0..self.requests.len()).filter(|&other| other != which).collect();
        self.only(&kept)
    }
}

impl Workload {
    /// The largest size that a disk of `size` bytes may come to have.
    pub fn largest_size(&self, size: u64) -> u64 {
        let sizes = self.requests.iter().filter(|request| request.kind == IoKind::Truncate);
        sizes.map(|request| request.offset).fold(size, u64::max)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self.requests.iter().map(Request::to_string).collect();
        f.write_str(&texts.join("; "))
    }
}
