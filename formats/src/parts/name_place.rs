//! Where in a header a backing file's name goes that is to take the place of another.

use std::ops::Range;

/// A place for a name of `len` bytes from byte `start` on, below byte `end`, beside the old name if
/// there is room.
pub fn place_beside(start: usize, end: usize, len: usize, old: &Range<usize>) -> Option<usize> {
    let fits = |at: usize| at.checked_add(len).is_some_and(|last| last <= end);
    let is_beside = |at: usize| at + len <= old.start || old.end <= at;
    let places = [start, old.end.next_multiple_of(8).max(start)];
    let beside = places.into_iter().find(|&at| fits(at) && is_beside(at));
    beside.or(Some(start).filter(|&at| fits(at)))
}

#[cfg(test)]
mod tests {
    use super::place_beside;

    #[test]
    fn a_name_goes_beside_the_old_one_if_it_can() {
        assert_eq!(place_beside(100, 512, 20, &(0..0)), Some(100));
        assert_eq!(place_beside(100, 512, 20, &(120..140)), Some(100));
        assert_eq!(place_beside(100, 512, 20, &(110..140)), Some(144));
        assert_eq!(
            place_beside(100, 150, 20, &(110..140)),
            Some(100),
            "over it: better than not at all"
        );
        assert_eq!(place_beside(100, 110, 20, &(0..0)), None);
    }
}
