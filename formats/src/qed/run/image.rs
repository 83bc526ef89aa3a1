//! What every part of a running image knows of it: its file, its geometry, its memory, how it is
//! run. And the disk as a guest sees it: how long it is, and what shows where it has nothing.

use cowbell_engine::op::{Base, Op, Seg, Segs, Target};
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{FileId, HostOffset, RegionId, align_down};

use crate::parts::backing::Backing;
use crate::parts::growth::Growth;
use crate::parts::units;
use crate::qed::disk::layout::{Bounds, Geometry};

/// Bytes of a table that are cached, and written, as one: a block of most file systems. A direct
/// write of less makes ext4 lock the file, wait for every other write in flight, and do all of it
/// inside `io_submit`.
pub(super) const SLICE_BYTES: usize = 4096;
/// log2 of the entries in a slice.
pub(super) const SLICE_BITS: u32 = 9;
/// The label of a flush that is all that is left to do.
pub(super) const FLUSH: u8 = 10;

/// How a QED image is run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct QedOptions {
    /// Memory for table slices, 8192 bytes each: the slice, which maps 512 clusters, and the copy
    /// of it that is being written.
    pub cache_slices: usize,
    /// How the file grows.
    pub growth: Growth,
    /// How long after it has changed a table is written although nobody flushes, in milliseconds.
    pub writeback_after_ms: u64,
    /// How long after the last allocation the need-check mark is taken off, in milliseconds.
    pub unmark_after_ms: u64,
}

impl Default for QedOptions {
    fn default() -> Self {
        QedOptions {
            cache_slices: 1024,
            growth: Growth::default(),
            writeback_after_ms: 5000,
            unmark_after_ms: 5000,
        }
    }
}

/// The memory that an image's tables and copies live in.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Regions {
    tables: RegionId,
    /// For each slot of the cache a copy of its slice; behind them one of a block of the L1 table,
    /// and one of the header's block.
    copies: RegionId,
    slots: usize,
}

impl Regions {
    /// The memory for an image run with `options`. `region` makes one of so many bytes.
    pub fn new(options: &QedOptions, mut region: impl FnMut(usize) -> RegionId) -> Regions {
        let bytes = TableCache::bytes_for(SLICE_BYTES, options.cache_slices);
        let (tables, copies) = (region(bytes), region(bytes + 2 * SLICE_BYTES));
        Regions { tables, copies, slots: bytes / SLICE_BYTES }
    }

    /// A cache of slices, empty.
    pub(super) fn cache(self) -> TableCache {
        TableCache::new(self.tables, SLICE_BYTES, self.slots)
    }

    /// Where the copy of a slot is.
    pub(super) fn copy_of_slot(self, slot: usize) -> Seg {
        let off = (slot * SLICE_BYTES) as u32;
        Seg { base: Base::Region(self.copies), off, len: SLICE_BYTES as u32 }
    }

    /// Where a block of the L1 table is copied to.
    pub(super) fn copy_of_l1(self) -> Seg {
        self.copy_of_slot(self.slots)
    }

    /// Where the header's block is put together, and blocks of the L1 table are read, by whoever has
    /// the header's turn.
    pub(super) fn header(self) -> Seg {
        self.copy_of_slot(self.slots + 1)
    }

    /// The region that the copies are in.
    pub(super) fn copies(self) -> RegionId {
        self.copies
    }
}

/// What of an image never changes while it runs: each of its components has a copy.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Image {
    pub file: FileId,
    pub geometry: Geometry,
    pub writable: bool,
    pub header_bytes: u64,
    pub l1_offset: HostOffset,
    pub regions: Regions,
}

impl Image {
    pub fn read_op(&self, offset: u64, segs: Segs) -> Op {
        Op::read(Target::File(self.file), offset, segs)
    }

    /// What an entry may point at in a file that ends at `file_len`.
    #[inline]
    pub fn bounds(&self, file_len: u64) -> Bounds {
        Bounds { geometry: self.geometry, header_bytes: self.header_bytes, file_len }
    }

    /// The key of the slice that maps the guest's byte `at`: it is number so-and-so on the disk.
    #[inline]
    pub fn slice_key(&self, at: u64) -> u64 {
        at >> self.geometry.cluster_bits() >> SLICE_BITS
    }

    /// The index in its slice of the entry for the guest's byte `at`.
    #[inline]
    pub fn slice_index(&self, at: u64) -> usize {
        (at >> self.geometry.cluster_bits()) as usize & ((1 << SLICE_BITS) - 1)
    }

    /// How many slices map a disk of `size` bytes.
    pub fn slices_of(&self, size: u64) -> u64 {
        size.div_ceil(self.geometry.cluster_size()).div_ceil(1 << SLICE_BITS)
    }
}

/// The disk as a guest sees it.
#[derive(Clone, Hash, Debug)]
pub(super) struct Disk {
    size: u64,
    backing: Option<Backing>,
    cluster_size: u64,
}

impl Disk {
    pub fn new(size: u64, backing: Option<Backing>, geometry: Geometry) -> Disk {
        Disk { size, backing, cluster_size: geometry.cluster_size() }
    }

    #[inline]
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn set_size(&mut self, size: u64) {
        self.size = size;
    }

    pub fn backing(&self) -> Option<Backing> {
        self.backing
    }

    pub fn backing_ref(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Would an unallocated cluster at `at` show the backing file's contents?
    #[inline]
    pub fn shows_backing(&self, at: u64) -> bool {
        let start = align_down(at, self.cluster_size);
        self.backing.is_some_and(|backing| start < backing.size)
    }

    /// The whole clusters in `at..end`. The disk's end counts as the end of its last cluster.
    pub fn whole_clusters(&self, at: u64, end: u64) -> Option<(u64, u64)> {
        units::whole(at, end, self.cluster_size, 0..self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_do_not_lie_over_each_other() {
        let options = QedOptions { cache_slices: 3, ..QedOptions::default() };
        let mut sizes = Vec::new();
        let regions = Regions::new(&options, |bytes| {
            sizes.push(bytes);
            RegionId(sizes.len() as u32 - 1)
        });
        let slots = regions.cache().len();
        assert_eq!(sizes, [slots * SLICE_BYTES, (slots + 2) * SLICE_BYTES]);
        let all = (0..slots).map(|slot| regions.copy_of_slot(slot));
        let all = all.chain([regions.copy_of_l1(), regions.header()]);
        let places: Vec<u32> = all.map(|seg| seg.off).collect();
        assert!(places.is_sorted_by(|a, b| a + SLICE_BYTES as u32 <= *b));
        assert!(places[places.len() - 1] as usize + SLICE_BYTES <= sizes[1]);
    }
}
