//! What every part of a running image knows of it: its files, its geometry, its memory, how it is
//! run. And the disk as a guest sees it: how long it is, and what shows where it has nothing.

use std::hash::{Hash, Hasher};

use cowbell_engine::op::{Op, OpKind, Segs, Target};
use cowbell_engine::step::Cx;
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{FileId, GuestOffset, RegionId, align_down};

use crate::parts::backing::Backing;
use crate::parts::growth::Growth;
use crate::parts::units;
use crate::qcow2::disk::codec::DEFLATED_HEADER;
use crate::qcow2::disk::layout::Geometry;

/// How a qcow2 image is run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Qcow2Options {
    /// Memory for L2 tables, in slices of 4096 bytes or one cluster, whichever is less.
    pub cache_slices: usize,
    /// How many inflated clusters are kept.
    pub cache_inflated: usize,
    /// Clusters that are deflated at once; at least 1.
    pub deflate_depth: usize,
    /// Host clusters of compressed ones that are kept in memory until they are full; at least 3.
    pub cache_packed: usize,
    /// How the file grows.
    pub growth: Growth,
    /// The most clusters that are counted ahead of their use: what a crash may leak.
    pub reserve_max: u64,
    /// Are clusters that a guest discards given back to the file system?
    pub pass_discards: bool,
    /// Clusters that are counted at once at first; doubled at each need, up to `reserve_max`.
    pub reserve_min: u64,
    /// Runs of clusters that were given up and may wait for a writeback; at least 1.
    pub frees_max: usize,
    /// Changed slices and L1 blocks that are written back at once, from copies; at least 1.
    pub writeback_depth: usize,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Qcow2Options {
            cache_slices: 2048,
            cache_inflated: 8,
            deflate_depth: 8,
            cache_packed: 8,
            growth: Growth::default(),
            reserve_max: 2048,
            reserve_min: 64,
            frees_max: 1024,
            pass_discards: true,
            writeback_depth: 64,
        }
    }
}

/// The memory that an image's tables and copies live in.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Regions {
    /// L2 slices.
    pub(super) tables: RegionId,
    /// Inflated clusters, each behind its compressed bytes.
    pub(super) inflated: RegionId,
    /// Clusters that are deflated, and what they become.
    pub(super) deflated: RegionId,
    /// Host clusters that compressed ones are packed into.
    pub(super) packed: RegionId,
    /// Copies of what a writeback writes.
    pub(super) staging: RegionId,
    /// Pieces of refcount blocks, or one of the refcount table, that the reserve works on.
    pub(super) counts: RegionId,
    /// What whoever changes the header writes.
    pub(super) header: RegionId,
    /// A piece of a longer L1 table.
    pub(super) l1: RegionId,
}

impl Regions {
    /// The memory for an image of this geometry. Only one that may be written needs all of it. `region` makes one
    /// of so many bytes.
    pub fn new(
        geometry: Geometry,
        writable: bool,
        options: &Qcow2Options,
        mut region: impl FnMut(usize) -> RegionId,
    ) -> Regions {
        let slice = 1 << geometry.slice_bits();
        let pair = inflated_slot_bytes(geometry);
        let cluster = geometry.cluster_size();
        let when_written = |bytes| if writable { bytes } else { 0 };
        let deflated = deflate_depth(options, cluster) * deflate_slot_bytes(cluster);
        let packed = buffers_for(options.cache_packed) * cluster as usize;
        Regions {
            tables: region(TableCache::bytes_for(slice, options.cache_slices)),
            inflated: region(TableCache::bytes_for(pair, options.cache_inflated)),
            deflated: region(when_written(deflated)),
            packed: region(when_written(packed)),
            staging: region(options.writeback_depth.max(1) * slice),
            counts: region(PIECES_MAX as usize * slice),
            header: region(slice),
            l1: region(slice),
        }
    }

    /// Those that hold what is a guest's, and how many of the first bytes brought into each are looked at.
    pub fn of_data(&self) -> [(RegionId, usize); 3] {
        [(self.inflated, 0), (self.deflated, DEFLATED_HEADER), (self.packed, 0)]
    }
}

/// Bytes of a slot, for an image with clusters of `cluster` bytes: one as the guest has it, and what it
/// is deflated to, behind that.
pub(super) const fn deflate_slot_bytes(cluster: u64) -> usize {
    (2 * cluster) as usize + DEFLATED_HEADER
}

/// Host clusters in memory: one that is filled, one behind it, and others that are written.
pub(super) fn buffers_for(wanted: usize) -> usize {
    wanted.max(3)
}

/// Clusters that are deflated at once: fewer, if they are large.
pub(super) fn deflate_depth(options: &Qcow2Options, cluster: u64) -> usize {
    let most = (DEFLATE_BYTES_MAX / cluster).max(1) as usize;
    options.deflate_depth.clamp(1, most)
}

/// Bytes of clusters that are deflated at once.
const DEFLATE_BYTES_MAX: u64 = 4 << 20;

/// The most pieces of refcount blocks that are read at once.
pub(super) const PIECES_MAX: u64 = 16;

/// The most bytes that a compressed cluster takes: less than a cluster, and the rest of the
/// sectors that it begins and ends in.
pub(super) fn compressed_max(geometry: Geometry) -> u64 {
    geometry.cluster_size() + 512
}

/// Bytes for an inflated cluster, behind its compressed bytes.
pub(super) fn inflated_slot_bytes(geometry: Geometry) -> usize {
    (compressed_max(geometry) + geometry.cluster_size()) as usize
}

/// What of an image never changes while it runs: each of its components has a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Image {
    /// Metadata; data too, unless that has a file of its own.
    pub file: FileId,
    pub data: FileId,
    pub geometry: Geometry,
    pub writable: bool,
    /// Is the data in a file that can be made longer or shorter?
    pub data_can_grow: bool,
    /// Are clusters that a guest discards given back to the file system?
    pub pass_discards: bool,
    pub regions: Regions,
}

/// Where it lies. All else is the same in every state of a run.
impl Hash for Image {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.file, self.data, self.regions.tables).hash(state);
    }
}

impl Image {
    /// Has the data a file of its own?
    #[inline]
    pub fn has_data_file(&self) -> bool {
        self.data != self.file
    }

    /// Flushes the file, and the data's own if it has one.
    pub fn flush_files(&self, cx: &mut Cx<'_>) {
        cx.issue(Op::flush(self.file));
        if self.has_data_file() {
            cx.issue(Op::flush(self.data));
        }
    }

    pub fn read_op(&self, offset: u64, segs: Segs) -> Op {
        Op::read(Target::File(self.file), offset, segs)
    }

    /// A write that is stable when it ends.
    pub fn stable_write(&self, offset: u64, segs: Segs) -> Op {
        Op { kind: OpKind::Write { fua: true }, ..Op::write(self.file, offset, segs) }
    }

    /// The key of the slice that maps the guest's byte `at`.
    #[inline]
    pub fn slice_key(&self, at: u64) -> u64 {
        at >> self.geometry.slice_span_bits()
    }

    /// The index in its slice of the entry for the guest's byte `at`.
    #[inline]
    pub fn slice_index(&self, at: u64) -> usize {
        self.geometry.slice_index(GuestOffset(at))
    }

    /// One past the last guest byte that the slice of `at` maps.
    #[inline]
    pub fn slice_end(&self, at: u64) -> u64 {
        (self.slice_key(at) + 1) << self.geometry.slice_span_bits()
    }
}

/// The disk as a guest sees it.
#[derive(Clone, Hash, Debug)]
pub(super) struct Disk {
    size: u64,
    /// Where its last cluster is cut: its size, or what that is growing to.
    reach: u64,
    backing: Option<Backing>,
    geometry: Geometry,
}

impl Disk {
    pub fn new(size: u64, backing: Option<Backing>, geometry: Geometry) -> Disk {
        Disk { size, reach: size, backing, geometry }
    }

    #[inline]
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn reach(&self) -> u64 {
        self.reach
    }

    pub fn backing(&self) -> Option<Backing> {
        self.backing
    }

    pub fn backing_ref(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Begins to grow to `reach`.
    pub fn set_reach(&mut self, reach: u64) {
        self.reach = reach;
    }

    pub fn set_size(&mut self, size: u64) {
        (self.size, self.reach) = (size, size);
    }

    /// Would an unallocated unit at `at` show the backing file's contents? Behind the disk's end
    /// nobody looks.
    #[inline]
    pub fn shows_backing(&self, at: u64) -> bool {
        let start = align_down(at, self.geometry.unit_size());
        self.backing.is_some_and(|backing| start < backing.size.min(self.reach))
    }

    /// The whole clusters in `at..end`. The disk's end counts as the end of its last cluster.
    pub fn whole_clusters(&self, at: u64, end: u64) -> Option<(u64, u64)> {
        self.whole(at, end, self.geometry.cluster_size())
    }

    /// The whole units of `size` bytes in `at..end`.
    pub fn whole(&self, at: u64, end: u64, size: u64) -> Option<(u64, u64)> {
        units::whole(at, end, size, 0..self.reach)
    }
}
