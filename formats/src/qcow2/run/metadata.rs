//! Which clusters hold metadata. No data is written there, whatever a table says.

use std::collections::{BTreeSet, btree_set};
use std::iter::Copied;
use std::ops::Range;

use crate::qcow2::disk::layout::L1Entry;
use crate::qcow2::rest::open::Opened;
use crate::qcow2::run::image::Image;

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Metadata {
    clusters: BTreeSet<u64>,
    cluster_bits: u32,
    /// Is the data in a file of its own, where no metadata is?
    has_data_file: bool,
}

impl Metadata {
    /// Of an image that is only read, nothing is known, as nothing is written.
    pub fn new(opened: &Opened, image: &Image) -> Metadata {
        Metadata {
            clusters: if image.writable { clusters_of(opened) } else { BTreeSet::new() },
            cluster_bits: image.geometry.cluster_bits(),
            has_data_file: image.has_data_file(),
        }
    }

    /// Does the range of bytes, where a table leads, hold metadata? In a sound image it never does.
    #[inline]
    pub fn is_hit(&self, host: u64, len: u64) -> bool {
        let (first, last) = (host >> self.cluster_bits, (host + len - 1) >> self.cluster_bits);
        !self.has_data_file && self.clusters.range(first..=last).next().is_some()
    }

    /// The clusters of `clusters` that hold some.
    pub fn within(&self, clusters: Range<u64>) -> Copied<btree_set::Range<'_, u64>> {
        self.clusters.range(clusters).copied()
    }

    pub fn add(&mut self, clusters: Range<u64>) {
        self.clusters.extend(clusters);
    }

    pub fn remove(&mut self, clusters: Range<u64>) {
        for cluster in clusters {
            self.clusters.remove(&cluster);
        }
    }
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
