//! The simulated disk: what a file holds now, what of it is stable, what a crash may leave.
//!
//! # The model
//! A file is a row of 512-byte sectors. `now` is what reads see: every change that has completed.
//! `stable` is what no crash takes away. Between the two stands the list of completed changes
//! that no flush has covered yet, in the order in which they completed.
//! - A flush covers exactly the changes that had completed when it was *issued*.
//! - A crash leaves, in each sector, what is stable there or what any one of the uncovered and
//!   in-flight writes put there: writes tear at every sector border. Within a sector, order is
//!   kept. The file's length is old or new just so; what a file gains by growing reads as zeros,
//!   because file systems promise that and nothing less.
//! - A flush that fails leaves what it covered in limbo: any part of it may be stable, and no
//!   later flush covers it, for the system took the pages for clean.
//! - A zeroed range is a write of zeros.
//! - A file made by [`Contents::noise`] holds noise where nothing was ever written, so that nobody
//!   takes luck for correctness.
//!
//! Everything is copy-on-write, sector by sector: copying a disk costs a few counters, and each
//! sector's hash is computed once.
#![expect(clippy::disallowed_types, reason = "sectors are shared between millions of worlds")]

use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hash, Hasher};
use std::ops::Range;
use std::rc::Rc;

use foldhash::fast::FixedState;

use crate::backend::OpName;

/// Bytes that a disk writes whole or not at all.
pub const SECTOR: u64 = 512;
const SECTOR_BYTES: usize = SECTOR as usize;

/// A hash that is the same in every run and on every machine of the same word size.
pub fn fixed_hash(value: impl Hash) -> u64 {
    FixedState::with_seed(0xc0bbe11).hash_one(value)
}

/// The contents of one sector.
#[derive(Clone, Debug, Default)]
pub struct Sector(Option<Rc<Filled>>);

#[derive(Debug)]
struct Filled {
    bytes: [u8; SECTOR_BYTES],
    hash: u64,
}

static ZEROS: [u8; SECTOR_BYTES] = [0; SECTOR_BYTES];

impl Sector {
    /// Zeros.
    pub const ZEROS: Sector = Sector(None);

    /// These bytes, up to a sector of them; zeros behind.
    pub fn from_bytes(source: &[u8]) -> Sector {
        if *source == ZEROS[..source.len()] {
            return Sector::ZEROS;
        }
        let mut bytes = [0; SECTOR_BYTES];
        bytes[..source.len()].copy_from_slice(source);
        Sector(Some(Rc::new(Filled { bytes, hash: fixed_hash(bytes) })))
    }

    /// Noise that depends on the seed and the place alone.
    pub fn noise(seed: u64, index: u64) -> Sector {
        let mut bytes = [0; SECTOR_BYTES];
        let mut state = seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for word in bytes.as_chunks_mut::<8>().0 {
            state = splitmix(state);
            *word = state.to_le_bytes();
        }
        Sector::from_bytes(&bytes)
    }

    /// Its bytes.
    #[inline]
    pub fn bytes(&self) -> &[u8; SECTOR_BYTES] {
        self.0.as_ref().map_or(&ZEROS, |filled| &filled.bytes)
    }

    /// Its hash; 0 for zeros.
    #[inline]
    pub fn hash_value(&self) -> u64 {
        self.0.as_ref().map_or(0, |filled| filled.hash)
    }

    /// With bytes `from..to` taken from `other`.
    #[must_use]
    pub fn merged(&self, other: &Sector, from: usize, to: usize) -> Sector {
        if from == 0 && to == SECTOR_BYTES {
            return other.clone();
        }
        if from >= to {
            return self.clone();
        }
        let mut bytes = *self.bytes();
        bytes[from..to].copy_from_slice(&other.bytes()[from..to]);
        Sector::from_bytes(&bytes)
    }
}

impl PartialEq for Sector {
    fn eq(&self, other: &Sector) -> bool {
        self.hash_value() == other.hash_value()
    }
}
impl Eq for Sector {}

impl Hash for Sector {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.hash_value().hash(state);
    }
}

/// The next number of a small, good enough generator (SplitMix64).
pub fn splitmix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a file holds: its sectors and its length in bytes.
///
/// Invariant: of the sectors in the first 8 MiB there are as many as the length needs; those of the others that are kept go up the file,
/// none is zeros, and none lies behind the length. So what a long file takes in memory follows from what is in it,
/// not from how long it is, and a short one's sectors are found at once.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    low: Rc<Vec<Sector>>,
    high: Rc<Vec<(u64, Sector)>>,
    len: u64,
    /// The sum of all sectors' hashes, each mixed with its place.
    sum: u64,
    /// A device's: its length does not change.
    fixed: bool,
}

/// Sectors in a row: those of the first 8 MiB.
const LOW: u64 = 16384;

#[inline]
fn placed(index: u64, sector: &Sector) -> u64 {
    match sector.hash_value() {
        0 => 0,
        hash => splitmix(hash ^ index.wrapping_mul(0xd6e8_feb8_6659_fd93)),
    }
}

impl Contents {
    /// `len` bytes of noise.
    pub fn noise(seed: u64, len: u64) -> Contents {
        let mut contents = Contents::default();
        contents.set_len(len);
        for index in 0..len.div_ceil(SECTOR) {
            contents.put(index, Sector::noise(seed, index));
        }
        let end = contents.len;
        contents.zero_behind(end);
        contents
    }

    /// As of a device, which keeps its length from now on.
    #[must_use]
    pub fn with_fixed_len(self) -> Contents {
        Contents { fixed: true, ..self }
    }

    /// Does it keep its length?
    pub fn has_fixed_len(&self) -> bool {
        self.fixed
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// No bytes?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The sectors that are not zeros, with their numbers, up the file.
    pub fn filled(&self) -> impl Iterator<Item = (u64, &Sector)> {
        let low = (0..).zip(&*self.low).filter(|(_, sector)| **sector != Sector::ZEROS);
        low.chain(self.high.iter().map(|(index, sector)| (*index, sector)))
    }

    #[inline]
    fn at(&self, index: u64) -> Option<&Sector> {
        if index < LOW {
            return self.low.get(index as usize);
        }
        let place = self.high.binary_search_by_key(&index, |(at, _)| *at);
        place.ok().map(|place| &self.high[place].1)
    }

    /// A sector; zeros behind the end.
    #[inline]
    pub fn sector(&self, index: u64) -> Sector {
        self.at(index).cloned().unwrap_or_default()
    }

    /// A sector's hash.
    #[inline]
    pub fn sector_hash(&self, index: u64) -> u64 {
        self.at(index).map_or(0, Sector::hash_value)
    }

    fn put(&mut self, index: u64, sector: Sector) {
        let old = self.at(index).map_or(0, |old| placed(index, old));
        let new = placed(index, &sector);
        if old == new {
            return;
        }
        self.sum = self.sum.wrapping_sub(old).wrapping_add(new);
        if index < LOW {
            Rc::make_mut(&mut self.low)[index as usize] = sector;
            return;
        }
        let high = Rc::make_mut(&mut self.high);
        match high.binary_search_by_key(&index, |(at, _)| *at) {
            Ok(at) if sector == Sector::ZEROS => drop(high.remove(at)),
            Ok(at) => high[at].1 = sector,
            Err(at) => high.insert(at, (index, sector)),
        }
    }

    /// Reads; zeros behind the end.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        let mut at = 0;
        while at < buf.len() {
            let (index, from) = split(offset + at as u64);
            let take = (SECTOR_BYTES - from).min(buf.len() - at);
            match self.at(index) {
                Some(sector) => {
                    buf[at..at + take].copy_from_slice(&sector.bytes()[from..from + take]);
                }
                None => buf[at..at + take].fill(0),
            }
            at += take;
        }
    }

    /// Writes; the file grows where need be.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.set_len(self.len.max(offset + bytes.len() as u64));
        for patch in Patch::cut(offset, bytes) {
            self.patch(&patch);
        }
    }

    /// Sets the length; what is gained reads as zeros.
    pub fn set_len(&mut self, len: u64) {
        assert!(!self.fixed || len == self.len, "a device keeps its length");
        let count = len.div_ceil(SECTOR);
        let shrinks = len < self.len;
        if shrinks {
            for index in count..self.low.len() as u64 {
                self.put(index, Sector::ZEROS);
            }
            let kept = self.high.partition_point(|(index, _)| *index < count);
            if kept < self.high.len() {
                for (index, sector) in Rc::make_mut(&mut self.high).drain(kept..) {
                    self.sum = self.sum.wrapping_sub(placed(index, &sector));
                }
            }
        }
        let low = count.min(LOW) as usize;
        if low != self.low.len() {
            Rc::make_mut(&mut self.low).resize(low, Sector::ZEROS);
        }
        self.len = len;
        if shrinks {
            self.zero_behind(len);
        }
    }

    fn zero_behind(&mut self, len: u64) {
        let (index, from) = split(len);
        if from > 0 {
            let cut = self.sector(index).merged(&Sector::ZEROS, from, SECTOR_BYTES);
            self.put(index, cut);
        }
    }

    /// Puts a patch in, if it lies within the length.
    pub fn patch(&mut self, patch: &Patch) {
        let start = patch.index * SECTOR;
        if start >= self.len {
            return;
        }
        let to = (patch.to as u64).min(self.len - start) as usize;
        let from = (patch.from as usize).min(to);
        let merged = self.sector(patch.index).merged(&patch.data, from, to);
        self.put(patch.index, merged);
    }

    /// A number that differs whenever the contents do, short of a collision.
    pub fn sum(&self) -> u64 {
        self.sum ^ splitmix(self.len)
    }
}

impl PartialEq for Contents {
    fn eq(&self, other: &Contents) -> bool {
        self.sum() == other.sum() && self.len == other.len
    }
}
impl Eq for Contents {}

impl Hash for Contents {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.sum().hash(state);
    }
}

fn split(offset: u64) -> (u64, usize) {
    (offset / SECTOR, (offset % SECTOR) as usize)
}

/// What a write does to one sector.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Patch {
    /// Which sector.
    pub index: u64,
    /// The bytes that change: from here,
    pub from: u16,
    /// to here.
    pub to: u16,
    /// The new bytes, at their places.
    pub data: Sector,
}

impl Patch {
    /// `bytes` at `offset`, cut at sector borders.
    pub fn cut(offset: u64, bytes: &[u8]) -> Vec<Patch> {
        let mut patches = Vec::with_capacity(bytes.len() / SECTOR_BYTES + 2);
        let mut at = 0;
        while at < bytes.len() {
            let (index, from) = split(offset + at as u64);
            let take = (SECTOR_BYTES - from).min(bytes.len() - at);
            let data = if from == 0 {
                Sector::from_bytes(&bytes[at..at + take])
            } else {
                let mut padded = [0; SECTOR_BYTES];
                padded[from..from + take].copy_from_slice(&bytes[at..at + take]);
                Sector::from_bytes(&padded)
            };
            patches.push(Patch { index, from: from as u16, to: (from + take) as u16, data });
            at += take;
        }
        patches
    }

    /// `len` zeros at `offset`, cut at sector borders.
    pub fn zeros(offset: u64, len: u64) -> Vec<Patch> {
        let (mut at, end) = (offset, offset + len);
        let mut patches = Vec::new();
        while at < end {
            let (index, from) = split(at);
            let to = (end - index * SECTOR).min(SECTOR);
            patches.push(Patch { index, from: from as u16, to: to as u16, data: Sector::ZEROS });
            at = index * SECTOR + to;
        }
        patches
    }

    fn overlaps(&self, other: &Patch) -> bool {
        self.index == other.index && self.from < other.to && other.from < self.to
    }

    fn covers(&self, other: &Patch) -> bool {
        self.index == other.index && self.from <= other.from && other.to <= self.to
    }
}

/// How an op changes a file.
#[derive(Clone, Debug)]
pub struct Change {
    /// The bytes.
    pub patches: Rc<Vec<Patch>>,
    /// Their hash.
    digest: u64,
    /// The length.
    pub length: Length,
    /// Are these bytes the format's own, not a guest's? Their sectors tear independently.
    pub own: bool,
    /// Whose it is. Nothing follows from it.
    pub by: Option<OpName>,
}

/// How an op changes a file's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Length {
    /// Not at all.
    Keep,
    /// At least this.
    AtLeast(u64),
    /// Exactly this.
    Exactly(u64),
}

impl Length {
    /// What becomes of a length.
    pub fn of(self, len: u64) -> u64 {
        match self {
            Length::Keep => len,
            Length::AtLeast(end) => len.max(end),
            Length::Exactly(end) => end,
        }
    }
}

impl PartialEq for Change {
    fn eq(&self, other: &Change) -> bool {
        (self.digest, self.length, self.own) == (other.digest, other.length, other.own)
    }
}

impl Hash for Change {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.digest, self.length, self.own).hash(state);
    }
}

impl Change {
    /// A change; see its fields.
    pub fn new(patches: Vec<Patch>, length: Length, own: bool) -> Change {
        Change { digest: fixed_hash(&patches), patches: Rc::new(patches), length, own, by: None }
    }

    /// The same, of this op.
    #[must_use]
    pub fn of(self, op: OpName) -> Change {
        Change { by: Some(op), ..self }
    }

    /// The first part of it: `share` of its sectors, and the length that these need.
    pub fn part(&self, share: usize) -> Change {
        let patches: Vec<Patch> = self.patches[..share.min(self.patches.len())].to_vec();
        let length = match (self.length, patches.last()) {
            (Length::AtLeast(_), Some(last)) => {
                Length::AtLeast(last.index * SECTOR + last.to as u64)
            }
            _ => Length::Keep,
        };
        Change { by: self.by, ..Change::new(patches, length, self.own) }
    }

    /// Are these the bytes that it writes from `offset` on?
    pub fn is_of(&self, offset: u64, bytes: &[u8]) -> bool {
        let mut at = 0;
        self.patches.iter().all(|patch| {
            let len = (patch.to - patch.from) as usize;
            let same = patch.index * SECTOR + patch.from as u64 == offset + at as u64
                && patch.data.bytes()[patch.from as usize..patch.to as usize]
                    == bytes[at..at + len];
            at += len;
            same
        }) && at == bytes.len()
    }

    /// Leaves out what lies behind `end`.
    pub fn cut_at(&mut self, end: u64) {
        let patches = Rc::make_mut(&mut self.patches);
        for patch in patches.iter_mut() {
            patch.to = patch.to.min(end.saturating_sub(patch.index * SECTOR).min(SECTOR) as u16);
        }
        patches.retain(|patch| patch.from < patch.to);
        self.digest = fixed_hash(&*patches);
        if let Length::AtLeast(len) = &mut self.length {
            *len = end.min(*len);
        }
    }

    /// Do they change a byte in common? Both go up the file.
    fn overlaps(&self, other: &Change) -> bool {
        let (mut a, mut b) = (&self.patches[..], &other.patches[..]);
        while let ([first, rest @ ..], [second, others @ ..]) = (a, b) {
            if first.overlaps(second) {
                return true;
            }
            if (first.index, first.to) < (second.index, second.to) { a = rest } else { b = others }
        }
        false
    }

    fn apply(&self, contents: &mut Contents) {
        let len = self.length.of(contents.len());
        if len != contents.len() {
            contents.set_len(len);
        }
        for patch in self.patches.iter() {
            contents.patch(patch);
        }
    }
}

/// A completed change that is not stable.
#[derive(Clone, Debug)]
struct Entry {
    change: Change,
    /// When it completed, among this file's changes.
    seq: u64,
    /// A flush that covered it failed.
    limbo: bool,
}

/// A file of the simulated disk.
#[derive(Clone, Debug)]
pub struct File {
    now: Contents,
    stable: Contents,
    uncovered: Vec<Entry>,
    seq: u64,
}

/// Which changes a flush covers: those that completed before this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(u64);

impl File {
    /// A file with these contents, all stable.
    pub fn new(contents: Contents) -> File {
        File { stable: contents.clone(), now: contents, uncovered: Vec::new(), seq: 0 }
    }

    /// What reads see.
    pub fn now(&self) -> &Contents {
        &self.now
    }

    /// What no crash takes away.
    pub fn stable(&self) -> &Contents {
        &self.stable
    }

    /// A change has completed; with `fua` it is stable at once.
    pub fn complete(&mut self, change: Change, fua: bool) {
        change.apply(&mut self.now);
        if fua {
            self.settle_sectors(&change);
        } else if !change.patches.is_empty() || change.length != Length::Keep {
            self.uncovered.push(Entry { change, seq: self.seq, limbo: false });
        }
        self.seq += 1;
    }

    /// Writes a change through. Its sectors go out whole, with what was written to their other
    /// bytes before.
    fn settle_sectors(&mut self, change: &Change) {
        // What cannot be found after a crash is not stable: the length goes with it.
        let end = change.patches.iter().map(|patch| patch.index * SECTOR + patch.to as u64).max();
        let end = end.unwrap_or(0);
        let cuts = |entry: &Entry| matches!(entry.change.length, Length::Exactly(len) if len < end);
        if end > self.stable.len() || self.uncovered.iter().any(cuts) {
            self.settle_length();
            self.stable.set_len(self.stable.len().max(end));
        }
        for patch in change.patches.iter() {
            let whole =
                Patch { index: patch.index, from: 0, to: SECTOR as u16, data: Sector::ZEROS };
            let data = self.now.sector(patch.index);
            self.forget_overwritten(self.uncovered.len(), &whole);
            self.stable.patch(&Patch { data, ..whole });
        }
    }

    /// All changes of the length are stable, and what they cut off is gone.
    fn settle_length(&mut self) {
        for i in 0..self.uncovered.len() {
            let (older, entry) = self.uncovered.split_at_mut(i);
            let change = &mut entry[0].change;
            self.stable.set_len(change.length.of(self.stable.len()));
            if let Length::Exactly(len) = change.length {
                older.iter_mut().for_each(|older| older.change.cut_at(len));
            }
            change.length = Length::Keep;
        }
    }

    /// Patches of the first `count` entries that `newer` lies over are of no more consequence.
    fn forget_overwritten(&mut self, count: usize, newer: &Patch) {
        for entry in &mut self.uncovered[..count] {
            if entry.change.patches.iter().any(|patch| patch.overlaps(newer)) {
                let patches = Rc::make_mut(&mut entry.change.patches);
                patches.retain(|patch| !newer.covers(patch));
                entry.change.digest = fixed_hash(&*patches);
            }
        }
    }

    /// What a flush issued now would cover.
    pub fn mark(&self) -> Mark {
        Mark(self.seq)
    }

    /// How many uncovered changes a mark covers.
    pub fn covered(&self, mark: Mark) -> usize {
        self.uncovered.iter().filter(|entry| entry.seq < mark.0 && !entry.limbo).count()
    }

    /// A flush has succeeded.
    pub fn flushed(&mut self, mark: Mark) {
        let mut i = 0;
        while i < self.uncovered.len() {
            if self.uncovered[i].seq >= mark.0 || self.uncovered[i].limbo {
                i += 1;
                continue;
            }
            let entry = self.uncovered.remove(i);
            for patch in entry.change.patches.iter() {
                self.forget_overwritten(i, patch);
            }
            entry.change.apply(&mut self.stable);
        }
    }

    /// A flush has failed.
    pub fn flush_failed(&mut self, mark: Mark) {
        for entry in &mut self.uncovered {
            entry.limbo |= entry.seq < mark.0;
        }
    }

    /// A hash of all that [`File::crash_sites`] follows from, changes in flight apart.
    pub fn crash_hash(&self) -> u64 {
        splitmix(self.stable.sum()) ^ self.uncovered_hash(|_| 0)
    }

    /// A hash of all that decides what can become of this file, with these flushes in flight.
    pub fn state_hash(&self, flushes: &[Mark]) -> u64 {
        let uncovered = self.uncovered_hash(|entry| {
            let covered = flushes.iter().map(|mark| u64::from(entry.seq < mark.0));
            covered.fold(u64::from(entry.limbo), |bits, bit| bits << 1 | bit)
        });
        splitmix(self.now.sum() ^ splitmix(self.stable.sum())) ^ uncovered
    }

    /// A hash of the uncovered changes, each with what `mark` says of it. In which order they
    /// completed counts only where it has consequences.
    fn uncovered_hash(&self, mark: impl Fn(&Entry) -> u64) -> u64 {
        let mut sum = 0_u64;
        for (i, entry) in self.uncovered.iter().enumerate() {
            let hash = fixed_hash((&entry.change, mark(entry)));
            sum = sum.wrapping_add(hash);
            for older in &self.uncovered[..i] {
                if !self.commute(&older.change, &entry.change) {
                    let pair = splitmix(older.change.digest).wrapping_sub(hash);
                    sum = sum.wrapping_add(splitmix(pair));
                }
            }
        }
        splitmix(sum)
    }

    /// Does it make no difference which of two completed first?
    fn commute(&self, a: &Change, b: &Change) -> bool {
        let resizes = |length: Length| match length {
            Length::Keep => false,
            Length::AtLeast(end) => end > self.stable.len(),
            Length::Exactly(_) => true,
        };
        let exactly = |change: &Change| matches!(change.length, Length::Exactly(_));
        !(exactly(a) || exactly(b) || resizes(a.length) && resizes(b.length) || a.overlaps(b))
    }

    /// What a crash may leave, with these changes in flight.
    pub fn crash_sites<'a>(&'a self, in_flight: impl Iterator<Item = &'a Change>) -> Sites {
        let done = self.uncovered.iter().map(|entry| &entry.change);
        let count = self.uncovered.len();
        let changes: Vec<&Change> = done.chain(in_flight).collect();
        let lengths = self.lengths(&changes, count);
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut full = self.stable.clone();
        full.set_len(longest.max(full.len()));
        Sites { sites: sites_of(&full, &changes), base: full, lengths }
    }

    /// What an image that a crash has left of this file has of each change that was not stable, with these in
    /// flight.
    pub fn left<'a>(
        &'a self,
        in_flight: impl Iterator<Item = &'a Change>,
        image: &Contents,
    ) -> Vec<Left> {
        let done = self.uncovered.iter().map(|entry| &entry.change);
        let changes: Vec<&Change> = done.chain(in_flight).collect();
        let left = changes.iter().enumerate().map(|(which, change)| {
            let mut left = Left { by: change.by, ..Left::default() };
            if change.patches.is_empty() {
                let (was, len) = (self.stable.len(), change.length.of(self.stable.len()));
                let is_there = match change.length {
                    Length::Exactly(len) => image.len() == len,
                    _ => image.len() >= len,
                };
                left.length = (was != len).then_some(is_there);
            }
            for patch in change.patches.iter() {
                let start = patch.index * SECTOR;
                let range = start + u64::from(patch.from)..start + u64::from(patch.to);
                let bytes = |sector: &Sector| {
                    sector.bytes()[usize::from(patch.from)..usize::from(patch.to)].to_vec()
                };
                let (new, is) = (bytes(&patch.data), bytes(&image.sector(patch.index)));
                if new == bytes(&self.stable.sector(patch.index)) {
                    continue;
                }
                let mut newer = changes[which + 1..].iter().flat_map(|newer| newer.patches.iter());
                let is_under = |newer: &Patch| newer.covers(patch) && bytes(&newer.data) == is;
                if new == is {
                    add(&mut left.kept, range);
                } else if !newer.any(is_under) {
                    add(&mut left.lost, range);
                }
            }
            left
        });
        left.collect()
    }

    /// Changes that are done and not stable: whose they are.
    pub fn uncovered(&self) -> impl Iterator<Item = OpName> + '_ {
        let is_any = |entry: &&Entry| {
            !entry.change.patches.is_empty() || entry.change.length != Length::Keep
        };
        self.uncovered.iter().filter(is_any).filter_map(|entry| entry.change.by)
    }

    /// The lengths that a crash may leave. Completed changes of length become stable in order;
    /// those in flight, each or not.
    fn lengths(&self, changes: &[&Change], completed: usize) -> Vec<u64> {
        // A set: they are no more than the changes, however many of these are in flight.
        let mut lengths = BTreeSet::from([self.stable.len()]);
        let mut len = self.stable.len();
        for change in &changes[..completed] {
            len = change.length.of(len);
            lengths.insert(len);
        }
        for change in &changes[completed..] {
            let more: Vec<u64> = lengths.iter().map(|&len| change.length.of(len)).collect();
            lengths.extend(more);
        }
        lengths.into_iter().collect()
    }
}

/// What a crash has left of a change that was not stable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Whose change it was.
    pub by: Option<OpName>,
    /// Bytes of the file that it changed, and that are as it left them.
    pub kept: Vec<Range<u64>>,
    /// Those that are not, and were not changed again.
    pub lost: Vec<Range<u64>>,
    /// If it changed the length alone: is that so?
    pub length: Option<bool>,
}

/// Adds a range behind others.
fn add(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// Sectors that a crash leaves in one of several states, together.
#[derive(Clone, Debug)]
pub struct Site {
    /// What each state puts where; the first is the stable one, the last the newest.
    pub options: Vec<Vec<(u64, Sector)>>,
}

/// Everything that a crash may do to one file.
#[derive(Clone, Debug)]
pub struct Sites {
    /// The stable contents, as long as any crash may leave them.
    base: Contents,
    /// Independent choices of contents.
    pub sites: Vec<Site>,
    /// The possible lengths, ascending.
    pub lengths: Vec<u64>,
}

impl Sites {
    /// The file after a crash: for each site an option, and one of the lengths.
    pub fn image(&self, pick: impl Fn(usize) -> usize, length: usize) -> Contents {
        let mut contents = self.base.clone();
        for (i, site) in self.sites.iter().enumerate() {
            for (index, sector) in &site.options[pick(i)] {
                contents.put(*index, sector.clone());
            }
        }
        contents.set_len(self.lengths[length]);
        contents
    }

    /// What each choice adds to an image's sum.
    pub fn sums(&self) -> Sums {
        let of_length = |&len: &u64| {
            let mut base = self.base.clone();
            base.set_len(len);
            let adds = |option: &Vec<(u64, Sector)>| {
                let changes = option.iter().map(|(index, sector)| {
                    let (new, old) = (cut_off(sector, *index, len), base.sector(*index));
                    placed(*index, &new).wrapping_sub(placed(*index, &old))
                });
                changes.fold(0, u64::wrapping_add)
            };
            let of_site = |site: &Site| site.options.iter().map(adds).collect();
            (base.sum, splitmix(len), self.sites.iter().map(of_site).collect())
        };
        Sums(self.lengths.iter().map(of_length).collect())
    }

    /// How many combinations there are, saturating.
    pub fn count(&self) -> u64 {
        self.sites
            .iter()
            .fold(self.lengths.len() as u64, |n, site| n.saturating_mul(site.options.len() as u64))
    }
}

/// The sums of all images that [`Sites::image`] can form, without forming them.
#[derive(Clone, Debug)]
pub struct Sums(Vec<(u64, u64, Vec<Vec<u64>>)>);

impl Sums {
    /// The [`Contents::sum`] of the image with these options and this length.
    pub fn of(&self, options: &[usize], length: usize) -> u64 {
        let (base, len, sites) = &self.0[length];
        let adds = sites.iter().zip(options).map(|(site, &option)| site[option]);
        adds.fold(*base, u64::wrapping_add) ^ len
    }
}

/// What is left of a sector in a file that ends at `len`.
fn cut_off(sector: &Sector, index: u64, len: u64) -> Sector {
    let left = len.saturating_sub(index * SECTOR).min(SECTOR) as usize;
    if left == 0 { Sector::ZEROS } else { sector.merged(&Sector::ZEROS, left, SECTOR_BYTES) }
}

impl Hash for Sites {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.base, &self.lengths).hash(state);
        for site in &self.sites {
            site.options.hash(state);
        }
    }
}

fn sites_of(stable: &Contents, changes: &[&Change]) -> Vec<Site> {
    let mut touched: Vec<(u64, usize)> = Vec::new();
    for (which, change) in changes.iter().enumerate() {
        touched.extend(change.patches.iter().map(|patch| (patch.index, which)));
    }
    touched.sort_unstable();
    let mut sites: Vec<Site> = Vec::new();
    // Guest sectors that the same writes touch go together: whether each sector's contents are
    // legal does not depend on its neighbours, and no other sector's meaning depends on it.
    let mut guests: Vec<(Vec<usize>, usize)> = Vec::new();
    for run in touched.chunk_by(|a, b| a.0 == b.0) {
        let index = run[0].0;
        let writers: Vec<usize> = run.iter().map(|&(_, which)| which).collect();
        let options = options_of(&stable.sector(index), index, changes, &writers);
        if options.iter().all(|option| *option == options[0]) {
            continue;
        }
        let guest = !writers.iter().any(|&which| changes[which].own);
        let options = options.into_iter().map(|sector| (index, sector));
        if !guest {
            let mut options: Vec<Vec<_>> = options.map(|option| vec![option]).collect();
            options.dedup();
            sites.push(Site { options });
            continue;
        }
        match guests.iter().find(|(who, _)| *who == writers) {
            Some(&(_, site)) => {
                for (together, option) in sites[site].options.iter_mut().zip(options) {
                    together.push(option);
                }
            }
            None => {
                guests.push((writers, sites.len()));
                sites.push(Site { options: options.map(|option| vec![option]).collect() });
            }
        }
    }
    sites
}

/// What a sector may hold after a crash, in an order that depends on the writers alone.
fn options_of(stable: &Sector, index: u64, changes: &[&Change], writers: &[usize]) -> Vec<Sector> {
    let patch_of = |which: &usize| {
        let patches = &changes[*which].patches;
        patches.iter().find(|patch| patch.index == index).expect("the writer touches the sector")
    };
    let whole = |which: &usize| {
        let patch = patch_of(which);
        patch.from == 0 && patch.to == SECTOR as u16
    };
    let merge = |sector: &Sector, which: &usize| {
        let patch = patch_of(which);
        sector.merged(&patch.data, patch.from as usize, patch.to as usize)
    };
    if writers.len() > SUBSETS_MAX || writers.iter().all(whole) {
        let one = writers.iter().map(|which| merge(stable, which));
        return std::iter::once(stable.clone()).chain(one).collect();
    }
    (0..1_u32 << writers.len())
        .map(|subset| {
            let chosen = writers.iter().enumerate().filter(|(i, _)| subset & (1 << i) != 0);
            chosen.fold(stable.clone(), |sector, (_, which)| merge(&sector, which))
        })
        .collect()
}

/// So many writes to parts of one sector are combined in every way; more are taken one by one.
const SUBSETS_MAX: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64, bytes: &[u8]) -> Change {
        let end = offset + bytes.len() as u64;
        Change::new(Patch::cut(offset, bytes), Length::AtLeast(end), true)
    }

    #[test]
    fn a_flush_covers_what_completed_before_it_was_issued_and_nothing_else() {
        let mut file = File::new(Contents::noise(1, 2048));
        file.complete(write(0, &[1; 512]), false);
        let mark = file.mark();
        file.complete(write(512, &[2; 512]), false);
        file.flushed(mark);
        assert_eq!(file.stable().sector(0), Sector::from_bytes(&[1; 512]));
        assert_eq!(file.stable().sector(1), Sector::noise(1, 1));
        assert_eq!(file.now().sector(1), Sector::from_bytes(&[2; 512]));
        assert_eq!(file.crash_sites(std::iter::empty()).count(), 2);
    }

    /// They are as many as there are ends, however many make the file longer, or not, side by side.
    #[test]
    fn many_changes_in_flight_leave_few_lengths() {
        let file = File::new(Contents::noise(1, 4096));
        let longer = |n: u64| Change::new(Vec::new(), Length::AtLeast(4096 + 512 * (n % 40)), true);
        let changes: Vec<Change> = (0..80).map(longer).collect();
        let sites = file.crash_sites(changes.iter());
        assert_eq!(sites.lengths, (0..40).map(|n| 4096 + 512 * n).collect::<Vec<u64>>());
    }

    #[test]
    fn what_a_crash_has_left_is_told_of_each_change() {
        let mut file = File::new(Contents::noise(1, 4096));
        let named = |ordinal, change: Change| change.of(OpName { request: 0, ordinal });
        file.complete(named(0, write(0, &[1; 1024])), false);
        file.complete(named(1, write(512, &[2; 1024])), false);
        let resize = Change::new(Vec::new(), Length::Exactly(8192), true);
        let in_flight = [named(2, write(2048, &[3; 512])), named(3, resize)];
        let names: Vec<u32> = file.uncovered().map(|name| name.ordinal).collect();
        assert_eq!(names, [0, 1]);
        let mut image = file.stable().clone();
        image.write(512, &[2; 512]);
        image.write(2048, &[3; 512]);
        let left = file.left(in_flight.iter(), &image);
        let told = |left: &Left| format!("kept {:?} lost {:?}", left.kept, left.lost);
        // Its second sector was written again, and that is there.
        assert_eq!(told(&left[0]), "kept [] lost [0..512]");
        assert_eq!(told(&left[1]), "kept [512..1024] lost [1024..1536]");
        assert_eq!(told(&left[2]), "kept [2048..2560] lost []");
        assert_eq!((left[2].length, left[3].length), (None, Some(false)));
        // It is not, so this one was lost, whatever is there of the one before.
        image.write(512, &[1; 512]);
        let left = file.left(in_flight.iter(), &image);
        assert_eq!(told(&left[0]), "kept [512..1024] lost [0..512]");
        assert_eq!(told(&left[1]), "kept [] lost [512..1536]");
    }

    #[test]
    fn a_failed_flush_counts_as_clean() {
        let mut file = File::new(Contents::noise(1, 512));
        file.complete(write(0, &[1; 512]), false);
        file.flush_failed(file.mark());
        file.flushed(file.mark());
        assert_eq!(file.crash_sites(std::iter::empty()).count(), 2, "still old or new");
        file.complete(write(0, &[2; 512]), false);
        file.flushed(file.mark());
        assert_eq!(file.crash_sites(std::iter::empty()).count(), 1, "overwritten and stable");
    }

    #[test]
    fn a_stable_write_stays_where_the_file_was_cut_before() {
        let mut file = File::new(Contents::noise(1, 2048));
        let resize = |len| Change::new(Vec::new(), Length::Exactly(len), true);
        file.complete(write(1024, &[1; 512]), false);
        file.complete(resize(512), false);
        file.complete(resize(2048), false);
        file.complete(write(1536, &[2; 512]), true);
        let sites = file.crash_sites(std::iter::empty());
        assert_eq!((sites.count(), &sites.lengths[..]), (1, &[2048][..]));
        let image = sites.image(|_| 0, 0);
        assert_eq!(image.sector(2), Sector::ZEROS);
        assert_eq!(image.sector(3), Sector::from_bytes(&[2; 512]));
    }

    #[test]
    fn growth_reads_as_zeros_and_may_be_lost() {
        let mut file = File::new(Contents::noise(1, 512));
        file.complete(write(1024, &[3; 512]), false);
        let sites = file.crash_sites(std::iter::empty());
        assert_eq!(sites.lengths, [512, 1536]);
        let torn = sites.image(|_| 0, 1);
        assert_eq!((torn.len(), torn.sector(2)), (1536, Sector::ZEROS));
        let lost = sites.image(|_| 1, 0);
        assert_eq!(lost, Contents::noise(1, 512));
    }

    #[test]
    fn images_have_the_sums_foretold() {
        let mut file = File::new(Contents::noise(1, 1024));
        file.complete(write(300, &[1; 700]), false);
        file.complete(write(400, &[2; 400]), false);
        file.complete(write(1024, &[3; 700]), false);
        file.complete(Change::new(Vec::new(), Length::Exactly(1300), true), false);
        let sites = file.crash_sites(std::iter::empty());
        let sums = sites.sums();
        let options: Vec<usize> = sites.sites.iter().map(|site| site.options.len()).collect();
        assert_eq!(sites.lengths, [1024, 1300, 1724]);
        let mut picked = vec![0; options.len()];
        loop {
            for length in 0..3 {
                let image = sites.image(|site| picked[site], length);
                assert_eq!(sums.of(&picked, length), image.sum());
            }
            let Some(next) = (0..picked.len()).find(|&i| picked[i] + 1 < options[i]) else {
                return;
            };
            picked[next] += 1;
            picked[..next].fill(0);
        }
    }

    #[test]
    fn zeros_take_no_memory_wherever_they_are() {
        let mut contents = Contents::default();
        contents.set_len(1 << 44);
        let empty = contents.clone();
        contents.write((1 << 43) + 300, &[7; 500]);
        contents.write(100, &[8; 100]);
        let kept: Vec<u64> = contents.filled().map(|(index, _)| index).collect();
        assert_eq!(kept, [0, 1 << 34, (1 << 34) + 1]);
        let mut bytes = [1; 1024];
        contents.read(1 << 43, &mut bytes);
        assert_eq!((bytes[299], bytes[300], bytes[799], bytes[800]), (0, 7, 7, 0));
        contents.set_len((1 << 43) + 400);
        contents.set_len(1 << 44);
        contents.read(1 << 43, &mut bytes);
        assert_eq!((bytes[399], bytes[400], bytes[512]), (7, 0, 0));
        contents.write((1 << 43) + 300, &[0; 100]);
        contents.write(100, &[0; 100]);
        assert!(contents == empty && contents.filled().next().is_none());
    }

    #[test]
    fn the_sum_forgets_no_change_and_no_undoing() {
        let mut contents = Contents::noise(7, 4096);
        let before = contents.clone();
        contents.write(100, &[0; 1000]);
        assert_ne!(contents, before);
        let mut old = [0; 1000];
        before.read(100, &mut old);
        contents.write(100, &old);
        assert_eq!(contents, before);
        contents.set_len(8192);
        contents.set_len(4096);
        assert_eq!(contents, before);
        contents.set_len(4000);
        contents.set_len(4096);
        assert_ne!(contents, before);
    }
}
