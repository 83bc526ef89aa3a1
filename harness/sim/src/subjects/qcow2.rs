//! qcow2 images made small.

use cowbell_formats::qcow2::rest::open::{Access, open, read_words};
use cowbell_formats::qcow2::rest::snapshots::{self, Moment};

use crate::disk::Contents;
use crate::host::SimFile;

/// A snapshot shares all that there is.
pub fn take_snapshot(file: &SimFile) -> Result<(), String> {
    let now = Moment { seconds: 0, nanos: 0 };
    snapshots::create(file, b"all", now).map(|_| ()).map_err(|why| why.to_string())
}

/// Does `start..end` of a qcow2 image touch its header or tables?
pub fn is_metadata(contents: &Contents, start: u64, end: u64) -> bool {
    let file = SimFile::new(contents.clone(), false);
    let Ok(image) = open(&file, Access::Read) else { return false };
    let header = &image.header;
    let entries = header.refcount_table_bytes() as usize / 8;
    let blocks = read_words(&file, header.refcount_table_offset, entries, "read the table");
    let offset = |word: &u64| word & 0x00ff_ffff_ffff_fe00;
    let tables = image.l1.iter().map(offset).chain(blocks.unwrap_or_default());
    let fixed = [0, header.l1_offset, header.refcount_table_offset];
    let mut all = tables.filter(|&table| table != 0).chain(fixed);
    let size = header.cluster_size();
    all.any(|table| table < end && start < table.saturating_add(size))
}

/// Whole clusters of a qcow2 image with refcounts of 16 bits that have a refcount of 0, as far as
/// refcount blocks count them.
pub fn holes(contents: &Contents) -> u64 {
    let file = SimFile::new(contents.clone(), false);
    let Ok(image) = open(&file, Access::Read) else { return 0 };
    let cluster = image.header.cluster_size();
    let per_block = cluster / 2;
    let clusters = contents.len() / cluster;
    let blocks = clusters.div_ceil(per_block) as usize;
    let table = read_words(&file, image.header.refcount_table_offset, blocks, "read the table");
    let mut holes = 0;
    let mut counts = vec![0; cluster as usize];
    for (i, block) in table.unwrap_or_default().into_iter().enumerate().filter(|(_, b)| *b != 0) {
        contents.read(block, &mut counts);
        let there = (clusters - i as u64 * per_block).min(per_block) as usize;
        let counts = counts.as_chunks::<2>().0;
        holes += counts[..there].iter().filter(|count| **count == [0, 0]).count() as u64;
    }
    holes
}
