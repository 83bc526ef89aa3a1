//! How often each cluster of a file is referred to: a sparse array in memory.
//!
//! It is made of pages that are there only where something is counted, so that a sparse file of
//! exabytes takes the memory of what is really in it; and of at most [`PAGES_MAX`] of them, so that
//! no image takes more. Counts that do not fit a page's numbers are kept apart, also bounded.

use std::collections::BTreeMap;

use crate::error::Error;

/// Counts in a page.
const PAGE: u64 = 2048;
/// At most this many pages: 256 MiB, counts for 2^27 clusters.
pub const PAGES_MAX: usize = 1 << 16;
/// At most this many counts of [`LARGE`] or more.
const LARGE_MAX: usize = 1 << 20;
/// Stands for a count that is in `large`.
const LARGE: u16 = u16::MAX;

type Page = Box<[u16; PAGE as usize]>;

/// See the module.
#[derive(Debug)]
pub struct Refs {
    pages: BTreeMap<u64, usize>,
    store: Vec<Page>,
    large: BTreeMap<u64, u64>,
    /// The page used last, and its place in the store.
    last: (u64, usize),
    /// What the image's refcounts can hold.
    max: u64,
}

impl Refs {
    /// Nothing is counted yet; the image's refcounts can hold up to `max`.
    pub fn new(max: u64) -> Refs {
        let (pages, store, large) = Default::default();
        Refs { pages, store, large, last: (u64::MAX, 0), max }
    }

    /// Counts `n` more references to a cluster. Answers how many of them were too many for the
    /// image's refcounts.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`].
    pub fn add(&mut self, cluster: u64, n: u64) -> Result<u64, Error> {
        let slot = self.page(cluster / PAGE)?;
        let count = &mut self.store[slot][(cluster % PAGE) as usize];
        let old = match *count {
            LARGE => self.large.get(&cluster).copied().unwrap_or_default(),
            small => small.into(),
        };
        let new = old.saturating_add(n);
        let excess = new.saturating_sub(self.max) - old.saturating_sub(self.max);
        if new < LARGE.into() {
            *count = new as u16;
            return Ok(excess);
        }
        *count = LARGE;
        self.large.insert(cluster, new);
        if self.large.len() > LARGE_MAX {
            return Err(Error::Limit("too many clusters with very many references".into()));
        }
        Ok(excess)
    }

    /// Nothing refers to these clusters, which are counted once.
    pub fn forget(&mut self, clusters: std::ops::Range<u64>) {
        for cluster in clusters {
            if let Some(slot) = self.slot(cluster / PAGE) {
                self.store[slot][(cluster % PAGE) as usize] = 0;
            }
        }
    }

    /// What the refcount of this cluster should be.
    pub fn get(&self, cluster: u64) -> u64 {
        self.real(cluster).min(self.max)
    }

    /// How many references to this cluster were counted, whatever the image's refcounts can hold.
    pub fn real(&self, cluster: u64) -> u64 {
        let page = cluster / PAGE;
        let slot = if self.last.0 == page { Some(self.last.1) } else { self.slot(page) };
        let Some(slot) = slot else { return 0 };
        match self.store[slot][(cluster % PAGE) as usize] {
            LARGE => self.large.get(&cluster).copied().unwrap_or_default(),
            small => small.into(),
        }
    }

    /// The first cluster from `from` on, but below `end`, that something refers to.
    pub fn next(&self, from: u64, end: u64) -> Option<u64> {
        if from >= end {
            return None;
        }
        for (&page, &slot) in self.pages.range(from / PAGE..end.div_ceil(PAGE)) {
            let first = from.saturating_sub(page * PAGE).min(PAGE) as usize;
            let found = self.store[slot][first..].iter().position(|&count| count != 0);
            if let Some(i) = found {
                let cluster = page * PAGE + (first + i) as u64;
                return (cluster < end).then_some(cluster);
            }
        }
        None
    }

    /// One past the last cluster that something refers to.
    pub fn end(&self) -> u64 {
        for (&page, &slot) in self.pages.iter().rev() {
            if let Some(i) = self.store[slot].iter().rposition(|&count| count != 0) {
                return page * PAGE + i as u64 + 1;
            }
        }
        0
    }

    fn slot(&self, page: u64) -> Option<usize> {
        self.pages.get(&page).copied()
    }

    fn page(&mut self, page: u64) -> Result<usize, Error> {
        if self.last.0 == page {
            return Ok(self.last.1);
        }
        let slot = match self.slot(page) {
            Some(slot) => slot,
            None if self.store.len() == PAGES_MAX => {
                return Err(Error::Limit(format!(
                    "the image has too many clusters to check: more than {} at least",
                    PAGES_MAX as u64 * PAGE
                )));
            }
            None => {
                self.store.push(Box::new([0; PAGE as usize]));
                self.pages.insert(page, self.store.len() - 1);
                self.store.len() - 1
            }
        };
        self.last = (page, slot);
        Ok(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_far_apart_and_large_ones() {
        let mut refs = Refs::new(70_000);
        for (cluster, n) in [(0, 1), (5, 3), (1 << 50, 65_534), (1 << 50, 2), (PAGE, 1)] {
            assert_eq!(refs.add(cluster, n), Ok(0));
        }
        assert_eq!(refs.add(5, 70_000), Ok(3));
        assert_eq!((refs.real(5), refs.add(5, 1)), (70_003, Ok(1)));
        assert_eq!([0, 1, 5, PAGE, 1 << 50].map(|c| refs.get(c)), [1, 0, 70_000, 1, 65_536]);
        assert_eq!(refs.end(), (1 << 50) + 1);
        assert_eq!(refs.next(0, 100), Some(0));
        assert_eq!(refs.next(1, 100), Some(5));
        assert_eq!(refs.next(6, 100), None);
        assert_eq!(refs.next(6, u64::MAX / 2), Some(PAGE));
        assert_eq!(refs.next(PAGE + 1, u64::MAX / 2), Some(1 << 50));
    }

    #[test]
    fn memory_is_bounded() {
        let mut refs = Refs::new(u64::MAX);
        let mut added = 0;
        while refs.add(added * PAGE, 1).is_ok() {
            added += 1;
        }
        assert_eq!(added as usize, PAGES_MAX);
    }
}
