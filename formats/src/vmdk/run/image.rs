//! What every part of a running image knows of it, how it is run, and its memory.

use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{FileId, RegionId};

use crate::parts::backing::Backing;
use crate::parts::growth::Growth;
use crate::vmdk::disk::grain::size_max;
use crate::vmdk::disk::layout::{GRAIN_MARKER_BYTES, TABLE_BYTES_MAX};
use crate::vmdk::rest::open::{Extent, Opened};
use crate::vmdk::run::extents::Place;

/// Where in a slot of the cache the copy is that a writeback writes.
pub(super) const COPY_AT: usize = TABLE_BYTES_MAX;
/// Bytes in a slot: a table, and its copy.
pub(super) const SLOT_BYTES: usize = 2 * COPY_AT;
/// The label of a flush that is all that is left to do; of data ops likewise.
pub(super) const FLUSH: u8 = 10;
pub(super) const PIECES: u8 = 3;

/// How a VMDK image is run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VmdkOptions {
    /// Memory for grain tables, 4096 bytes each (each maps 32 MiB).
    pub cache_tables: usize,
    /// Memory for inflated grains of a stream, in grains.
    pub cache_grains: usize,
    /// How the files grow.
    pub growth: Growth,
    /// How long after it has changed a table is written although nobody flushes, in milliseconds.
    pub writeback_after_ms: u64,
    /// Random bits for the new content id, the same ones each time for who wants to repeat a run.
    /// `None`, the default: from the system. An image whose ids repeat passes for one that has not
    /// changed, and overlays then show wrong data.
    pub entropy: Option<u32>,
}

impl Default for VmdkOptions {
    fn default() -> Self {
        VmdkOptions {
            cache_tables: 1024,
            cache_grains: 16,
            growth: Growth::default(),
            writeback_after_ms: 5000,
            entropy: None,
        }
    }
}

/// The memory that an image holds for as long as it is open.
#[derive(Clone, Debug)]
pub struct Regions {
    pub(super) tables: TableCache,
    /// For copies of the directories, as they are written; for the block with the content id.
    pub(super) directories: RegionId,
    pub(super) id_block: RegionId,
    pub(super) grains: Option<GrainRegions>,
}

/// The memory for the grains of a stream.
#[derive(Clone, Debug)]
pub(super) struct GrainRegions {
    pub grains: TableCache,
    /// For each slot a grain as it is in the file, and bytes for one.
    pub input: RegionId,
    pub input_size: u64,
    /// For the stream's end.
    pub tail: RegionId,
}

impl Regions {
    /// For the image that `opened` describes; `region` gives as many bytes as it is asked for.
    pub fn new(
        opened: &Opened,
        writable: bool,
        options: &VmdkOptions,
        mut region: impl FnMut(usize) -> RegionId,
    ) -> Regions {
        let sparse = || opened.extents.iter().filter_map(Extent::sparse);
        let memory = region(TableCache::bytes_for(SLOT_BYTES, options.cache_tables));
        let tables = TableCache::new(memory, SLOT_BYTES, options.cache_tables);
        let copies = sparse().map(|sparse| {
            4 * (sparse.directory.len() + sparse.redundant.as_ref().map_or(0, Vec::len))
        });
        let when_written = |bytes| if writable { bytes } else { 0 };
        let directories = region(when_written(copies.sum()));
        let id_block = region(when_written(opened.id_block.bytes.len()));
        let compressed = sparse().find(|sparse| sparse.header.is_compressed());
        let grains = compressed.map(|sparse| {
            let grain_size = sparse.header.grain_size();
            let (unit, slots) = (grain_size as usize, options.cache_grains);
            let grains = TableCache::new(region(TableCache::bytes_for(unit, slots)), unit, slots);
            let input_size = size_max(grain_size);
            let input = region(grains.len() * input_size as usize);
            let tail = region(sparse.header.end_of_stream_bytes());
            GrainRegions { grains, input, input_size, tail }
        });
        Regions { tables, directories, id_block, grains }
    }

    /// Those that hold what is a guest's, and how many of the first bytes brought into each are looked at: a
    /// grain's marker.
    pub fn of_data(&self) -> impl Iterator<Item = (RegionId, usize)> {
        let grains = self.grains.iter();
        grains.flat_map(|its| [(its.grains.region(), 0), (its.input, GRAIN_MARKER_BYTES)])
    }
}

/// What of an image never changes while it runs.
#[derive(Clone, Hash, Debug)]
pub(super) struct Image {
    /// The image's own file and the others, as the extents number them.
    pub files: Vec<FileId>,
    pub size: u64,
    pub writable: bool,
    pub backing: Option<Backing>,
    /// The parent is not the one that this image was made for: nothing of it is shown.
    pub parent_changed: bool,
}

impl Image {
    /// Would an unallocated grain at `at` show the parent's contents?
    #[inline]
    pub fn shows_parent(&self, at: u64, place: Place) -> bool {
        let start = place.grain_start(place.grain_of(at));
        self.backing.is_some_and(|backing| start < backing.size)
    }
}
