//! New refcounts from nothing: blocks and table behind everything that is in use, then one write
//! of the header's sector.
//!
//! Until that write the image is what it was, with more bytes behind its end; after it the new
//! refcounts are the image's, and the old ones are clusters that nothing refers to and no refcount
//! counts. There is no state in between.

use cowbell_engine::store::Store;

use super::disk::DiskRefs;
use super::refs::Refs;
use super::scan::{BEYOND, BEYOND_MAX};
use super::{Checker, Report, Unwatched, Watch, scan};
use crate::error::Error;
use crate::qcow2::disk::header::{OFFSET_MAX, REFTABLE_BYTES_MAX};
use crate::qcow2::rest::open::write_fields;

/// Places that are tried.
const TRIES: usize = 64;

/// Where the new structure goes. In clusters.
#[derive(PartialEq, Eq)]
struct Place {
    /// The table.
    table: u64,
    table_clusters: u64,
    /// The indexes of the blocks that are needed, which follow the table in this order.
    blocks: Vec<u64>,
}

impl Place {
    fn end(&self) -> u64 {
        self.table + self.table_clusters + self.blocks.len() as u64
    }
}

impl<F: Store, W: Watch> Checker<'_, F, W> {
    /// Makes new refcounts the image's. Answers what is wrong besides.
    pub(super) fn rebuild(&mut self) -> Result<Report, Error> {
        // Behind all that is in use, and behind the old refcounts, which are in use until the end.
        let mut first = self.before.refs.end().max(1);
        (_, self.before, _) = scan(self.file, &self.header, None, true, &mut Unwatched)?;
        for _ in 0..TRIES {
            let place = self.place(first)?;
            if let Some(next) = self.beyond(&place)? {
                first = next;
                continue;
            }
            // A longer file has room for more of what refers to places behind its end: such places
            // are from now on as good as others, and have to be counted.
            let end = place.end() << self.geometry.cluster_bits();
            let len = self.file.len().map_err(Error::io("find the image's length"))?;
            if len < end {
                self.file.set_len(end).map_err(Error::io("make room for refcounts"))?;
            }
            let (report, before, _) = scan(self.file, &self.header, None, true, &mut Unwatched)?;
            self.before = before;
            let is_free = self.before.refs.next(place.table, place.end()).is_none();
            if is_free && self.place(first)? == place {
                self.write(&place)?;
                return Ok(report);
            }
            first = first.max(self.before.refs.end());
        }
        Err(Error::Limit("no room is found for new refcounts".into()))
    }

    /// If something refers to this place although it is behind the file's end: a place behind that.
    fn beyond(&self, place: &Place) -> Result<Option<u64>, Error> {
        let ranges = &self.before.beyond;
        let end = self.clusters + (BEYOND >> self.geometry.cluster_bits());
        if ranges.len() >= BEYOND_MAX || place.end() > end {
            return Err(Error::Limit("no room is found for new refcounts".into()));
        }
        let hits =
            ranges.iter().filter(|range| range.start < place.end() && range.end >= place.table);
        Ok(hits.map(|range| range.end + 1).max())
    }

    fn write(&mut self, place: &Place) -> Result<(), Error> {
        for cluster in place.table..place.end() {
            self.before.refs.add(cluster, 1)?;
        }
        self.write_blocks(place)?;
        let table = self.write_table(place)?;
        self.file.flush().map_err(Error::io("flush the new refcounts"))?;
        self.header.refcount_table_offset = place.table << self.geometry.cluster_bits();
        self.header.refcount_table_clusters = place.table_clusters as u32;
        write_fields(self.file, &self.header)?;
        self.disk = DiskRefs::new(self.file, self.geometry, table);
        self.clusters = self.clusters.max(place.end());
        Ok(())
    }

    /// Room for a structure that counts everything there is, and itself.
    fn place(&self, first: u64) -> Result<Place, Error> {
        let (geometry, size) = (self.geometry, self.geometry.cluster_size());
        let used = blocks_of(&self.before.refs, geometry.block_bits());
        let mut place = Place { table: first, table_clusters: 1, blocks: used.clone() };
        loop {
            let mut blocks = used.clone();
            let own = first >> geometry.block_bits()..=(place.end() - 1) >> geometry.block_bits();
            blocks.extend(own);
            blocks.sort_unstable();
            blocks.dedup();
            let entries = blocks.last().map_or(0, |last| last + 1);
            let table_clusters = entries.saturating_mul(8).div_ceil(size);
            let next = Place { table: first, table_clusters, blocks };
            let bytes = next.end().checked_mul(size);
            if table_clusters * size > REFTABLE_BYTES_MAX
                || bytes.is_none_or(|end| end > OFFSET_MAX)
            {
                let what = "the image is too large for its refcounts to be rebuilt";
                return Err(Error::Limit(what.into()));
            }
            if next.end() == place.end() && next.blocks == place.blocks {
                return Ok(next);
            }
            place = next;
        }
    }

    fn write_blocks(&mut self, place: &Place) -> Result<(), Error> {
        let (geometry, size) = (self.geometry, self.geometry.cluster_size());
        let first_at = (place.table + place.table_clusters) * size;
        let mut bytes = vec![0; size as usize];
        for (i, &index) in place.blocks.iter().enumerate() {
            bytes.fill(0);
            let start = index << geometry.block_bits();
            let mut at = start;
            while let Some(cluster) =
                self.before.refs.next(at, start + (1 << geometry.block_bits()))
            {
                let count = self.before.refs.get(cluster);
                geometry.set_refcount(&mut bytes, (cluster - start) as usize, count);
                at = cluster + 1;
            }
            self.file
                .write_at(first_at + i as u64 * size, &bytes)
                .map_err(Error::io("write a refcount block"))?;
        }
        Ok(())
    }

    fn write_table(&mut self, place: &Place) -> Result<Vec<u64>, Error> {
        let size = self.geometry.cluster_size();
        let mut table = vec![0; (place.table_clusters * size / 8) as usize];
        let first = place.table + place.table_clusters;
        for (i, &index) in place.blocks.iter().enumerate() {
            table[index as usize] = (first + i as u64) * size;
        }
        let bytes: Vec<u8> = table.iter().flat_map(|word: &u64| word.to_be_bytes()).collect();
        self.file
            .write_at(place.table * size, &bytes)
            .map_err(Error::io("write the refcount table"))?;
        Ok(table)
    }
}

/// The indexes of the blocks that count something.
fn blocks_of(refs: &Refs, block_bits: u32) -> Vec<u64> {
    let mut blocks = Vec::new();
    let (mut at, end) = (0, refs.end());
    while let Some(cluster) = refs.next(at, end) {
        let block = cluster >> block_bits;
        blocks.push(block);
        at = (block + 1) << block_bits;
    }
    blocks
}
