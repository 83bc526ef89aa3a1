//! Where writes to a file were refused because they would have waited: into holes, mostly. The next
//! ones there are not tried first.
//!
//! By regions of 1 MiB, in a table of fixed size in which a later region takes an earlier one's
//! place. A file that never refused anything has none.

#[derive(Debug, Default)]
pub(super) struct Regions(Vec<Mark>);

#[derive(Clone, Copy, Debug)]
struct Mark {
    region: u32,
    /// So many more writes are not tried.
    left: u32,
}

const REGION_BITS: u32 = 20;
const MARKS: usize = 1024;

/// After so many one is tried again: the hole may be filled by now.
const UNTRIED: u32 = 16;

impl Regions {
    /// A write at `offset` was refused.
    pub(super) fn refused(&mut self, offset: u64) {
        if self.0.is_empty() {
            self.0 = vec![Mark { region: u32::MAX, left: 0 }; MARKS];
        }
        let region = region_of(offset);
        self.0[region as usize % MARKS] = Mark { region, left: UNTRIED };
    }

    /// Is a write at `offset` one that need not be tried?
    #[inline]
    pub(super) fn refuses(&mut self, offset: u64) -> bool {
        let region = region_of(offset);
        match self.0.get_mut(region as usize % MARKS) {
            Some(mark) if mark.region == region && mark.left > 0 => {
                mark.left -= 1;
                true
            }
            _ => false,
        }
    }
}

fn region_of(offset: u64) -> u32 {
    (offset >> REGION_BITS) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_refused_is_not_tried_for_a_while() {
        let mut regions = Regions::default();
        assert!(!regions.refuses(5 << 20));
        regions.refused((5 << 20) + 4096);
        assert!(!regions.refuses(4 << 20) && !regions.refuses(6 << 20));
        assert!((0..UNTRIED).all(|_| regions.refuses(5 << 20)));
        assert!(!regions.refuses(5 << 20), "one is tried");
        regions.refused(5 << 20);
        regions.refused((5 + MARKS as u64) << 20);
        assert!(!regions.refuses(5 << 20), "another has its place");
        assert!(regions.refuses((5 + MARKS as u64) << 20));
        assert!(!regions.refuses(u64::MAX));
    }
}
