//! Clusters, grains, blocks: the units that a disk, or an extent of it, is mapped in.

use std::ops::Range;

use cowbell_engine::units::align_down;

/// The whole units of `size` bytes in `at..end`, all within `disk`, where the first one begins at its
/// start, and whose end counts as the end of its last one.
pub(crate) fn whole(at: u64, end: u64, size: u64, disk: Range<u64>) -> Option<(u64, u64)> {
    let first = (at - disk.start).checked_next_multiple_of(size)?.checked_add(disk.start)?;
    let is_end = end == disk.end;
    let last = if is_end { end } else { disk.start + align_down(end - disk.start, size) };
    (first < last).then_some((first, last))
}

#[cfg(test)]
mod tests {
    use super::whole;

    #[test]
    fn the_disks_end_ends_its_last_unit() {
        for start in [0, 512] {
            let disk = start..start + 3 * 4096 + 512;
            let whole = |from: u64, to: u64| {
                let found = whole(start + from, start + to, 4096, disk.clone());
                found.map(|(first, last)| (first - start, last - start))
            };
            assert_eq!(whole(0, 4096), Some((0, 4096)));
            assert_eq!(whole(1, 4096), None);
            assert_eq!(whole(1, 9000), Some((4096, 8192)));
            assert_eq!(whole(9000, 12800), Some((12288, 12800)));
            assert_eq!(whole(1, 12799), Some((4096, 12288)));
            assert_eq!(whole(9000, 12799), None);
        }
        assert_eq!(whole(u64::MAX - 1, u64::MAX, 4096, 0..512), None);
    }
}
