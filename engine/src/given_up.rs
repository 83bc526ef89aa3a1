//! Ranges of a file whose contents nobody needs any more, and whose space has not been given back
//! yet.
//!
//! A discard is a hint, so it is done as far as its request is concerned when its range is noted here.
//! The file gets it later, together with others and in pieces as large as they have become: a hole
//! is made under the file's lock, for which everything else on the file waits (`align.rs`). Blocks that
//! are written again meanwhile are taken out. Who would read some of it, or change part of a block, has
//! it given back first: nobody sees that it came late.

use crate::units::{Time, align_down, align_up};

/// Disjoint ranges, none beside another, sorted.
#[derive(Clone, Hash, Debug)]
pub(crate) struct GivenUp {
    ranges: Vec<(u64, u64)>,
    ranges_max: usize,
    /// When the next of it is given back; of an empty list nothing.
    pub due: Time,
    /// Somebody is giving it back.
    pub is_going_on: bool,
}

impl GivenUp {
    /// With room for so many ranges.
    pub fn new(ranges_max: usize) -> GivenUp {
        let ranges = Vec::with_capacity(ranges_max);
        GivenUp { ranges, ranges_max, due: Time(0), is_going_on: false }
    }

    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Notes `start..end`. False: there is no room.
    pub fn add(&mut self, start: u64, end: u64) -> bool {
        if start >= end {
            return true;
        }
        // Those that it touches become one with it.
        let from = self.ranges.partition_point(|range| range.1 < start);
        let to = self.ranges.partition_point(|range| range.0 <= end);
        if from == to && self.ranges.len() >= self.ranges_max {
            return false;
        }
        let start = self.ranges[from..to].first().map_or(start, |range| range.0.min(start));
        let end = self.ranges[from..to].last().map_or(end, |range| range.1.max(end));
        self.ranges.splice(from..to, [(start, end)]);
        true
    }

    /// `start..end` is in use again, and with it the blocks of `block` bytes that it cuts.
    pub fn remove(&mut self, start: u64, end: u64, block: u64) {
        let (start, end) = (align_down(start, block), align_up(end, block).unwrap_or(u64::MAX));
        let from = self.ranges.partition_point(|range| range.1 <= start);
        let to = self.ranges.partition_point(|range| range.0 < end);
        if from >= to {
            return;
        }
        let (first, last) = (self.ranges[from], self.ranges[to - 1]);
        let left = [(first.0, start), (end, last.1)].into_iter().filter(|(from, to)| from < to);
        let mut kept: smallvec::SmallVec<[(u64, u64); 2]> = left.collect();
        if kept.len() > to - from && self.ranges.len() >= self.ranges_max {
            // A hint is forgotten.
            kept.pop();
        }
        self.ranges.splice(from..to, kept);
    }

    /// Is some of `start..end` among it?
    pub fn overlaps(&self, start: u64, end: u64) -> bool {
        let from = self.ranges.partition_point(|range| range.1 <= start);
        start < end && self.ranges.get(from).is_some_and(|range| range.0 < end)
    }

    /// The first range that has some of `start..end`, taken out.
    pub fn take(&mut self, start: u64, end: u64) -> Option<(u64, u64)> {
        let at = self.ranges.partition_point(|range| range.1 <= start);
        self.overlaps(start, end).then(|| self.ranges.remove(at))
    }

    /// The next range to be given back.
    pub fn pop(&mut self) -> Option<(u64, u64)> {
        self.ranges.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGES_MAX: usize = 1024;

    /// Against a set of blocks, one byte each.
    #[test]
    fn it_has_what_was_added_and_not_removed() {
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 33) % below
        };
        let (mut given_up, mut model) = (GivenUp::new(RANGES_MAX), [false; 64]);
        for _ in 0..20_000 {
            let (start, len) = (random(64), random(12));
            let end = (start + len).min(64);
            if random(2) == 0 {
                assert!(given_up.add(start, end));
                model[start as usize..end as usize].fill(true);
            } else if start < end {
                given_up.remove(start, end, 4);
                let (from, to) = (start / 4 * 4, end.div_ceil(4) * 4);
                model[from as usize..to.min(64) as usize].fill(false);
            }
            let mut found = [false; 64];
            for pair in given_up.ranges.windows(2) {
                assert!(pair[0].1 < pair[1].0, "{:?}", given_up.ranges);
            }
            for &(start, end) in &given_up.ranges {
                assert!(start < end);
                found[start as usize..end as usize].fill(true);
            }
            assert_eq!(found, model);
            let (start, end) = (random(64), random(65));
            let has = (start..end).any(|at| model[at as usize]);
            assert_eq!(given_up.overlaps(start, end), has);
            assert_eq!(given_up.clone().take(start, end).is_some(), has);
        }
    }

    #[test]
    fn it_is_bounded() {
        let mut given_up = GivenUp::new(RANGES_MAX);
        let count = RANGES_MAX as u64;
        assert!((0..count).all(|at| given_up.add(at * 30, at * 30 + 20)));
        assert!(!given_up.add(count * 30, count * 30 + 20), "it is full");
        assert!(given_up.add(20, 30), "it joins two");
        assert_eq!(given_up.ranges.len(), RANGES_MAX - 1);
        assert!(given_up.add(count * 30, count * 30 + 20));
        given_up.remove(68, 72, 1);
        assert_eq!(
            given_up.ranges.len(),
            RANGES_MAX,
            "one half of a range that is cut is forgotten"
        );
        assert_eq!(given_up.ranges[1], (60, 68));
    }
}
