//! Which clusters hold metadata. No data is written there, whatever a table says.

use std::collections::{BTreeSet, btree_set};
use std::hash::{Hash, Hasher};
use std::iter::Copied;
use std::ops::Range;

use crate::qcow2::disk::layout::L1Entry;
use crate::qcow2::rest::open::Opened;
use crate::qcow2::run::image::Image;

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Metadata {
    clusters: BTreeSet<u64>,
    filter: Filter,
    cluster_bits: u32,
    /// Is the data in a file of its own, where no metadata is?
    has_data_file: bool,
}

impl Metadata {
    /// Of an image that is only read, nothing is known, as nothing is written.
    pub fn new(opened: &Opened, image: &Image) -> Metadata {
        let clusters = if image.writable { clusters_of(opened) } else { BTreeSet::new() };
        let mut filter = Filter::of(opened.l1.len() + clusters.len());
        clusters.iter().for_each(|&cluster| filter.add(cluster));
        let (cluster_bits, has_data_file) = (image.geometry.cluster_bits(), image.has_data_file());
        Metadata { clusters, filter, cluster_bits, has_data_file }
    }

    /// Does the range of bytes, where a table leads, hold metadata? In a sound image it never does.
    #[inline]
    pub fn is_hit(&self, host: u64, len: u64) -> bool {
        let (first, last) = (host >> self.cluster_bits, (host + len - 1) >> self.cluster_bits);
        self.filter.may_have(first, last) && self.has(first, last)
    }

    #[inline(never)]
    fn has(&self, first: u64, last: u64) -> bool {
        !self.has_data_file && self.clusters.range(first..=last).next().is_some()
    }

    /// The clusters of `clusters` that hold some.
    pub fn within(&self, clusters: Range<u64>) -> Copied<btree_set::Range<'_, u64>> {
        self.clusters.range(clusters).copied()
    }

    pub fn add(&mut self, clusters: Range<u64>) {
        clusters.clone().for_each(|cluster| self.filter.add(cluster));
        self.clusters.extend(clusters);
    }

    pub fn remove(&mut self, clusters: Range<u64>) {
        for cluster in clusters {
            self.clusters.remove(&cluster);
        }
    }
}

/// Which numbers may be in a set: every write asks, and this answers most. A number has a bit, which
/// others share; once it is set it stays.
#[derive(Clone, Debug)]
struct Filter(Vec<u64>);

impl Filter {
    /// For about so many numbers: 16 bits each, 128 KiB at most.
    fn of(count: usize) -> Filter {
        Filter(vec![0; count.div_ceil(4).next_power_of_two().min(1 << 14)])
    }

    /// The word that `number` has its bit in, and that bit.
    #[inline]
    fn bit(&self, number: u64) -> (usize, u64) {
        ((number >> 6) as usize & (self.0.len() - 1), 1 << (number & 63))
    }

    fn add(&mut self, number: u64) {
        let (word, bit) = self.bit(number);
        self.0[word] |= bit;
    }

    /// May there be any of `first..=last`? Of more than a few numbers, it is not known.
    #[inline]
    fn may_have(&self, first: u64, last: u64) -> bool {
        let is_set = |number| {
            let (word, bit) = self.bit(number);
            self.0[word] & bit != 0
        };
        last - first > 8 || (first..=last).any(is_set)
    }
}

/// What follows from the set makes no difference.
impl Hash for Filter {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

/// The clusters that hold metadata; of snapshots, their L1 tables. As many as the tables, which are
/// in memory too, have entries.
fn clusters_of(opened: &Opened) -> BTreeSet<u64> {
    let (geometry, header) = (opened.geometry(), &opened.header);
    let bits = geometry.cluster_bits();
    let mut clusters = BTreeSet::from([0]);
    let mut area = |offset: u64, len: u64| {
        if len > 0 && offset.checked_add(len).is_some() {
            clusters.extend(offset >> bits..=(offset + len - 1) >> bits);
        }
    };
    area(header.l1_offset, opened.l1.len() as u64 * 8);
    area(header.refcount_table_offset, header.refcount_table_bytes());
    for snapshot in &opened.snapshots {
        area(snapshot.l1_offset, u64::from(snapshot.l1_size) * 8);
    }
    for &block in opened.refcount_table.iter().filter(|&&block| block != 0) {
        area(block, 1);
    }
    for &word in &opened.l1 {
        if let Ok(Some(entry)) = L1Entry::decode(word, geometry) {
            area(entry.table.0, 1);
        }
    }
    clusters
}

#[cfg(test)]
mod tests {
    use super::Filter;

    #[test]
    fn what_was_added_may_be_there_and_little_else() {
        for count in [0, 1, 100, 1 << 20] {
            let mut filter = Filter::of(count);
            let numbers = || (0..64).map(|i| i * 1000 + 7);
            numbers().for_each(|number| filter.add(number));
            for number in numbers() {
                assert!(filter.may_have(number, number) && filter.may_have(number - 3, number + 3));
            }
            let others = (0..64_000).filter(|&other| filter.may_have(other, other)).count();
            assert!(others <= 64_000 / filter.0.len().min(500), "{others} of {count}");
        }
    }
}
