//! Which parts of what is copied are marked: a bit for each granule.

use std::ops::Range;

/// A set of granules of a job, each a power of two in bytes. Granules are counted so that they begin
/// where units of the target do.
#[derive(Clone, Hash, Debug, Default)]
pub(crate) struct Marks {
    /// Bytes in a granule, as a power of two.
    bits: u32,
    /// How far into a granule the job begins.
    shift: u64,
    words: Vec<u64>,
    /// Granules that are marked.
    count: u64,
}

impl Marks {
    /// The most granules that there may be: 64 MiB of marks.
    pub const GRANULES_MAX: u64 = 1 << 29;

    /// Nothing is marked of `len` bytes, of which the first lies at `first`. `None`: these are too many
    /// granules.
    pub fn new(len: u64, first: u64, bits: u32) -> Option<Marks> {
        let shift = first & ((1 << bits) - 1);
        let granules = len.checked_add(shift)?.div_ceil(1 << bits);
        let words = granules.div_ceil(64) as usize;
        (granules <= Marks::GRANULES_MAX).then(|| Marks {
            bits,
            shift,
            words: vec![0; words],
            count: 0,
        })
    }

    fn index(&self, at: u64) -> u64 {
        (at + self.shift) >> self.bits
    }

    /// Where the granule begins that byte `at` lies in: 0 at the least.
    pub fn floor(&self, at: u64) -> u64 {
        (self.index(at) << self.bits).saturating_sub(self.shift)
    }

    /// Where it ends.
    pub fn end(&self, at: u64) -> u64 {
        ((self.index(at) + 1) << self.bits) - self.shift
    }

    /// Marks every granule that has one of these bytes.
    pub fn mark(&mut self, from: u64, to: u64) {
        for index in self.index(from)..=self.index(to - 1) {
            let (word, bit) = (&mut self.words[(index / 64) as usize], 1 << (index % 64));
            self.count += u64::from(*word & bit == 0);
            *word |= bit;
        }
    }

    /// Marks no granule any more that has one of these bytes.
    pub fn unmark(&mut self, from: u64, to: u64) {
        for index in self.index(from)..=self.index(to - 1) {
            let (word, bit) = (&mut self.words[(index / 64) as usize], 1 << (index % 64));
            self.count -= u64::from(*word & bit != 0);
            *word &= !bit;
        }
    }

    /// How many granules are marked: those that were marked one by one.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Marks all but the granules that have one of these bytes.
    pub fn mark_all_but(&mut self, parts: &[Range<u64>]) {
        self.words.fill(u64::MAX);
        for part in parts.iter().filter(|part| !part.is_empty()) {
            for index in self.index(part.start)..=self.index(part.end - 1) {
                self.words[(index / 64) as usize] &= !(1 << (index % 64));
            }
        }
    }

    /// How many of the first `len` bytes are marked.
    pub fn marked(&self, len: u64) -> u64 {
        let (mut at, mut sum) = (0, 0);
        while let Some(start) = self.next(true, at, len) {
            at = self.next(false, start, len).unwrap_or(len);
            sum += at - start;
        }
        sum
    }

    /// The first byte from `from` on whose granule is marked, or is not; not looked for from `to` on.
    pub fn next(&self, marked: bool, from: u64, to: u64) -> Option<u64> {
        if from >= to {
            return None;
        }
        if self.words.is_empty() {
            return (!marked).then_some(from);
        }
        let (mut index, last) = (self.index(from), self.index(to - 1));
        while index <= last {
            let word = self.words.get((index / 64) as usize).copied().unwrap_or(0);
            let sought = if marked { word } else { !word } >> (index % 64);
            if sought != 0 {
                let found = index + u64::from(sought.trailing_zeros());
                let at = (found << self.bits).saturating_sub(self.shift).max(from);
                return (at < to).then_some(at);
            }
            index = (index / 64 + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_are_found_from_anywhere() {
        // Granules of 16 bytes; the job begins 5 bytes into one, and ends in the 70th.
        let mut marks = Marks::new(16 * 69, 21, 4).unwrap();
        assert_eq!((marks.floor(0), marks.end(0), marks.floor(11)), (0, 11, 11));
        assert_eq!(marks.next(true, 0, 1104), None);
        assert_eq!(marks.next(false, 0, 1104), Some(0));
        marks.mark(12, 13);
        marks.mark(16 * 66, 16 * 66 + 1);
        assert_eq!(marks.next(true, 0, 1104), Some(11));
        assert_eq!(marks.next(true, 14, 1104), Some(14));
        assert_eq!(marks.next(false, 14, 1104), Some(27));
        assert_eq!(marks.next(true, 27, 1104), Some(16 * 66 - 5));
        assert_eq!(marks.next(true, 27, 16 * 66 - 5), None, "not looked for from there on");
        assert_eq!(marks.next(false, 14, 27), None);
        marks.mark(0, 1104);
        assert_eq!(marks.next(false, 0, 1104), None);
        marks.mark_all_but(&[10..12, 500..500, 600..601]);
        assert_eq!((marks.next(false, 0, 1104), marks.next(true, 0, 1104)), (Some(0), Some(27)));
        assert_eq!(marks.next(false, 27, 1104), Some(16 * 37 - 5));
        assert_eq!(marks.marked(1104), 1104 - 27 - 16);
        assert_eq!(marks.next(false, 16 * 38 - 5, 1104), None);
    }

    #[test]
    fn what_would_take_too_much_memory_is_refused() {
        assert!(Marks::new(u64::MAX, 0, 16).is_none());
        assert!(Marks::new(u64::MAX, 1 << 20, 21).is_none());
        assert!(Marks::new(1 << 45, 0, 16).is_some());
    }
}
