//! Ranges of the guest's disk that requests have claimed, to allocate them: none overlaps another.
//! Who would claim one that is claimed already waits for the end of that claim, and looks again.
//!
//! Found by key, which a request keeps in its state, and by place: in order, so that a range is
//! looked for by halves however many there are.

use std::hash::{Hash, Hasher};
use std::ops::{Index, IndexMut, Range};

use cowbell_engine::mutant;
use cowbell_engine::step::Cx;
use cowbell_engine::wait::{On, WaitList};
use slab::Slab;

/// The claims, and what is known of each.
#[derive(Clone, Debug)]
pub(crate) struct Claims<T> {
    claims: Slab<Claim<T>>,
    /// Where they are, first byte first.
    places: Vec<Place>,
}

#[derive(Clone, Hash, Debug)]
struct Claim<T> {
    start: u64,
    waiters: WaitList,
    what: T,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    start: u64,
    /// One past the last byte.
    end: u64,
    key: u32,
}

/// Where a range is among the claims.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Around {
    /// Part of it is claimed, by this one.
    Within(u32),
    /// It is free, and so is what follows it up to here.
    Before(u64),
}

impl<T> Claims<T> {
    pub fn new() -> Claims<T> {
        Claims { claims: Slab::with_capacity(64), places: Vec::with_capacity(64) }
    }

    pub fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    /// Claims `range`, which is free; answers the key.
    pub fn insert(&mut self, range: Range<u64>, what: T) -> u32 {
        let claim = Claim { start: range.start, waiters: WaitList::new(), what };
        let key = self.claims.insert(claim) as u32;
        let at = self.count_before(range.start);
        self.places.insert(at, Place { start: range.start, end: range.end, key });
        key
    }

    /// Ends a claim, and wakes who waits for that. Is what was to be allocated there?
    pub fn end(&mut self, key: u32, is_there: bool, cx: &mut Cx<'_>) -> T {
        let Claim { mut waiters, what, .. } = self.remove(key);
        let forgets = mutant!("no_wake_on_error") || mutant!("vmdk_no_wake_on_error");
        let forgets = (forgets || mutant!("vdi_no_wake_on_error")) && !is_there;
        if !forgets && !mutant!("claim_never_wakes") && !mutant!("qcow2_claim_never_wakes") {
            cx.wake_all(&mut waiters);
        }
        what
    }

    fn remove(&mut self, key: u32) -> Claim<T> {
        let claim = self.claims.remove(key as usize);
        let at = self.count_before(claim.start);
        let mine = self.places[at..].iter().position(|place| place.key == key);
        self.places.remove(at + mine.expect("a claim is where it was made"));
        claim
    }

    /// Up to where nobody has claimed anything, from `start` on. `None`: somebody has claimed some of
    /// `start..end`; the request is parked until that claim ends.
    pub fn free_to(&mut self, start: u64, end: u64, cx: &mut Cx<'_>) -> Option<u64> {
        match self.around(start, end) {
            _ if mutant!("no_claims") || mutant!("vmdk_no_claims") => Some(u64::MAX),
            _ if mutant!("qcow2_no_claims") || mutant!("vdi_no_claims") => Some(u64::MAX),
            Around::Within(key) => {
                self.park(key, cx);
                None
            }
            Around::Before(next) => Some(next),
        }
    }

    /// Parks the request until this claim ends.
    pub fn park(&mut self, key: u32, cx: &mut Cx<'_>) {
        cx.park(&mut self.claims[key as usize].waiters, On::Cluster);
    }

    /// Where `start..end` is among the claims.
    pub fn around(&self, start: u64, end: u64) -> Around {
        let (before, behind) = self.places.split_at(self.count_before(end));
        match before.last() {
            Some(last) if start < last.end => Around::Within(last.key),
            _ => Around::Before(behind.first().map_or(u64::MAX, |next| next.start)),
        }
    }

    /// How many places begin before `at`.
    fn count_before(&self, at: u64) -> usize {
        match self.places.last() {
            Some(last) if at <= last.start => self.places.partition_point(|place| place.start < at),
            // Who walks over the disk is behind all others.
            _ => self.places.len(),
        }
    }
}

impl<T> Index<u32> for Claims<T> {
    type Output = T;
    fn index(&self, key: u32) -> &T {
        &self.claims[key as usize].what
    }
}

impl<T> IndexMut<u32> for Claims<T> {
    fn index_mut(&mut self, key: u32) -> &mut T {
        &mut self.claims[key as usize].what
    }
}

/// Hashes the claims, in the order of their keys: each knows its place.
impl<T: Hash> Hash for Claims<T> {
    fn hash<H: Hasher>(&self, h: &mut H) {
        for entry in &self.claims {
            entry.hash(h);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Around, Claims};

    #[test]
    fn a_range_is_found_where_it_is_however_claims_come_and_go() {
        let mut claims = Claims::new();
        let mut known: Vec<(u32, u64, u64)> = Vec::new();
        let mut random = 7_u64;
        let mut met = [0; 3];
        for _ in 0..4000 {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let (start, len) = (random >> 40 & 255, 1 + (random >> 50 & 7));
            let end = start + len;
            let hit = known.iter().find(|&&(_, from, to)| from < end && start < to).copied();
            let next = known.iter().map(|&(_, from, _)| from).filter(|&from| from >= end).min();
            match claims.around(start, end) {
                Around::Within(key) => {
                    assert!(
                        known.iter().any(|&(k, from, to)| k == key && from < end && start < to)
                    );
                    met[0] += 1;
                }
                Around::Before(found) => {
                    assert_eq!((hit, found), (None, next.unwrap_or(u64::MAX)));
                    let key = claims.insert(start..end, (start, end));
                    known.push((key, start, end));
                    met[1] += 1;
                }
            }
            if random >> 60 < 7 && !known.is_empty() {
                let (key, start, end) = known.swap_remove((random >> 20) as usize % known.len());
                assert_eq!(claims[key], (start, end));
                assert_eq!(claims.remove(key).what, (start, end));
                met[2] += 1;
            }
        }
        assert!(met.iter().all(|&n| n > 500), "{met:?}");
        for (key, ..) in known {
            claims.remove(key);
        }
        assert!(claims.is_empty());
    }
}
