//! Counting who refers to what: one walk over everything in an image but its refcounts.
//!
//! Snapshots share most of their tables. So tables are collected first, sorted, and each is read
//! once and counted as often as it is referred to: the time is that of the tables there are, however
//! many snapshots say the same, or however often a hostile table repeats itself.
//!
//! What cannot be is counted and reported as `qemu-img check` does.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cowbell_engine::store::Store;

use super::refs::Refs;
use super::{Event, Report, Watch};
use crate::error::{Error, Shown};
use crate::qcow2::disk::header::{Header, L1_BYTES_MAX, SECTOR, u64_at};
use crate::qcow2::disk::layout::{Geometry, L2Entry};
use crate::qcow2::disk::snapshot_table;
use crate::qcow2::rest::bitmap;

/// Tables are read in pieces of this many bytes.
const CHUNK: u64 = 64 << 10;
/// All the snapshots' L1 tables have at most this many bytes, and so have all bitmap tables.
const TABLES_MAX: u64 = 16 << 30;
/// At most this many different L2 tables are remembered at a time: 256 MiB.
const L2_TABLES_MAX: usize = 1 << 24;

/// Tables that lie over each other are read again: at most this many bytes, in all.
const AGAIN_MAX: u64 = 256 << 20;

/// How far behind the end of the file a repair may put something.
pub const BEYOND: u64 = 16 << 30;
/// At most this many areas are remembered that lie behind it; with more, nothing is put there.
pub const BEYOND_MAX: usize = 1 << 16;

const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const COMPRESSED: u64 = 1 << 62;
const COPIED: u64 = 1 << 63;
const ZERO: u64 = 1;

/// The walk.
pub struct Scan<'a, F, W> {
    /// The image's file.
    pub file: &'a F,
    /// Its header.
    pub header: &'a Header,
    /// The same.
    pub geometry: Geometry,
    /// The file's length in bytes, in whole sectors.
    pub file_len: u64,
    /// What was counted.
    pub refs: Refs,
    /// What was found.
    pub report: Report,
    /// Who watches.
    pub watch: &'a mut W,
    /// The L2 tables of the active L1 table, sorted, each with how often it refers to it.
    pub active: Vec<(u64, u64)>,
    /// Those of the snapshots' L1 tables.
    pub inactive: Vec<(u64, u64)>,
    /// How many misplaced clusters hold nothing and could be set to zeros.
    pub fixable: u64,
    /// Areas that lie behind the end of the file, but not by more than [`BEYOND`]: by clusters.
    pub beyond: Vec<Range<u64>>,
    /// From a scan before: set them to zeros, in tables that are nothing but tables.
    pub fix: Option<Before>,
    /// Read of a snapshot table that breaks bounds what can be read.
    pub salvage: bool,
    /// The snapshot table.
    pub snapshots: snapshot_table::Table,
    /// Where everything is that is neither an L2 table nor data: clusters.
    pub fixed: Vec<Range<u64>>,
    /// Bytes of tables that were read again, since other tables lie over them.
    pub again: u64,
}

/// What a scan found: what is needed to know where it is safe to write.
pub struct Before {
    /// How often each cluster is referred to.
    pub refs: Refs,
    pub(super) active: Vec<(u64, u64)>,
    pub(super) beyond: Vec<Range<u64>>,
    /// The snapshot table, as far as it could be read.
    pub(super) snapshots: snapshot_table::Table,
    inactive: Vec<(u64, u64)>,
    fixed: Vec<Range<u64>>,
}

impl Before {
    /// Is the cluster at `table` referred to as an L2 table, and as nothing else? Only then may an
    /// entry of it be given up.
    pub fn is_only_a_table(&self, table: u64, geometry: Geometry) -> bool {
        let as_table = self.as_table(table);
        geometry.is_aligned(table)
            && as_table > 0
            && self.refs.real(table >> geometry.cluster_bits()) == as_table
    }

    /// Is there an L2 table, and nothing else but data of a guest? Only there may a flag be written:
    /// a hostile image may have a table where its header is. Whoever has the data shares a cluster
    /// with a table; the flags are what keeps him from writing over it.
    pub fn is_a_table(&self, table: u64, geometry: Geometry) -> bool {
        let cluster = table >> geometry.cluster_bits();
        geometry.is_aligned(table) && self.as_table(table) > 0 && !self.is_fixed(cluster)
    }

    /// How often an L1 table refers to an L2 table here.
    fn as_table(&self, table: u64) -> u64 {
        let count = |list: &[(u64, u64)]| {
            list.binary_search_by_key(&table, |&(table, _)| table).map_or(0, |i| list[i].1)
        };
        count(&self.active) + count(&self.inactive)
    }

    /// Is something in this cluster that is neither an L2 table nor data?
    fn is_fixed(&self, cluster: u64) -> bool {
        let i = self.fixed.partition_point(|range| range.start <= cluster);
        i > 0 && self.fixed[i - 1].contains(&cluster)
    }

    /// Something that is neither an L2 table nor data is in these clusters.
    pub(super) fn fix_in_place(&mut self, clusters: Range<u64>) {
        self.fixed.push(clusters);
    }

    /// To be called when all of that is said.
    pub(super) fn sort_fixed(&mut self) {
        self.fixed.sort_unstable_by_key(|range| (range.start, range.end));
        self.fixed.dedup_by(|next, kept| {
            let joins = next.start <= kept.end;
            if joins {
                kept.end = kept.end.max(next.end);
            }
            joins
        });
    }
}

/// An L2 entry, and what it is to us.
#[derive(Clone, Copy)]
struct Entry {
    word: u64,
    bitmap: u64,
    /// In its table.
    index: u64,
    /// How often its table is referred to.
    n: u64,
    /// Does the active L1 table lead to it?
    active: bool,
    /// May its table be written?
    fix: bool,
}

/// A table that is read piece by piece, holes left out.
pub struct Pieces {
    at: u64,
    end: u64,
    /// The piece.
    pub bytes: Vec<u8>,
}

impl Pieces {
    /// Of `len` bytes at `at`.
    pub fn new(at: u64, len: u64) -> Pieces {
        Pieces { at, end: at.saturating_add(len), bytes: Vec::new() }
    }

    /// Loads the next piece; answers where it starts, `None` at the end. Pieces start and end with
    /// 16-byte entries, counted from the table's start, whatever holes the file has.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]; going on is going on behind what could not be read.
    pub fn next<F: Store>(&mut self, file: &F) -> Option<Result<u64, Error>> {
        let len = file.len().unwrap_or(u64::MAX);
        while self.at < self.end.min(len) {
            let mut end = self.end;
            if let Ok(extent) = file.extent_at(self.at) {
                let past = extent.end.min(len);
                if extent.data {
                    end = past.checked_next_multiple_of(SECTOR).unwrap_or(end);
                } else if past & !(SECTOR - 1) > self.at {
                    // Whole sectors only, and in steps of entries from where the table starts.
                    self.at += ((past & !(SECTOR - 1)) - self.at) & !15;
                    if self.at >= self.end.min(len) {
                        break;
                    }
                    continue;
                }
            }
            let want = (end.max(self.at + 16).min(self.end) - self.at).min(CHUNK);
            let want = if want < self.end - self.at { want.next_multiple_of(16) } else { want };
            let from = self.at;
            self.at += want;
            self.bytes.clear();
            self.bytes.resize(want as usize, 0);
            let read = file.read_at(from, &mut self.bytes).map_err(Error::io("read a table"));
            return Some(read.map(|()| from));
        }
        None
    }
}

impl<F: Store, W: Watch> Scan<'_, F, W> {
    /// Counts everything but refcount table and blocks.
    pub fn all(&mut self) -> Result<(), Error> {
        let size = self.geometry.cluster_size();
        self.fixed_area(0, size, 1)?;
        let mut tables = Vec::new();
        let l1_bytes = u64::from(self.header.l1_size) * 8;
        self.l1(self.header.l1_offset, l1_bytes, 1, &mut tables)?;
        self.l2_tables(tables, true)?;
        self.snapshots()?;
        self.bitmaps()
    }

    /// What is needed to write, after [`all`](Self::all).
    pub fn before(self) -> (Report, Before, u64) {
        let Scan { refs, active, inactive, beyond, report, fixable, snapshots, fixed, .. } = self;
        (report, Before { refs, active, inactive, beyond, snapshots, fixed }, fixable)
    }

    fn wrong(&mut self, n: u64, what: std::fmt::Arguments<'_>) {
        self.report.corruptions += n;
        self.watch.event(Event::Found(what));
    }

    /// Tables at these places are about to be read: sorted, each by its offset and length.
    fn overlaps(&mut self, tables: impl Iterator<Item = (u64, u64)>) -> Result<(), Error> {
        let mut end = 0;
        for (at, len) in tables {
            let next = at.saturating_add(len);
            self.again += end.min(next).saturating_sub(at);
            end = end.max(next);
        }
        if self.again > AGAIN_MAX {
            return Err(Error::Limit("too many tables of the image lie over each other".into()));
        }
        Ok(())
    }

    /// Counts the clusters of an area of neither L2 tables nor data.
    fn fixed_area(&mut self, offset: u64, len: u64, n: u64) -> Result<(), Error> {
        self.area(offset, len, n)?;
        let bits = self.geometry.cluster_bits();
        if len > 0 {
            self.fixed.push(offset >> bits..(offset.saturating_add(len - 1) >> bits) + 1);
        }
        Ok(())
    }

    /// Counts the clusters of an area `n` times.
    pub fn area(&mut self, offset: u64, len: u64, n: u64) -> Result<(), Error> {
        let size = self.geometry.cluster_size();
        if len == 0 || n == 0 {
            return Ok(());
        }
        // The last cluster may be cut short: what is missing was never written.
        let bits = self.geometry.cluster_bits();
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end.saturating_sub(self.file_len) >= size) {
            if self.beyond.len() < BEYOND_MAX && offset < self.file_len.saturating_add(BEYOND) {
                self.beyond.push(offset >> bits..offset.saturating_add(len - 1) >> bits);
            }
            self.wrong(
                n,
                format_args!(
                    "ERROR: counting reference for region exceeding the end of the file by one \
                     cluster or more: offset {offset:#x} size {len:#x}"
                ),
            );
            return Ok(());
        }
        for cluster in offset >> bits..=(offset + len - 1) >> bits {
            let excess = self.refs.add(cluster, n)?;
            if excess > 0 {
                let at = cluster << bits;
                self.wrong(excess, format_args!("ERROR: overflow cluster offset={at:#x}"));
            }
        }
        Ok(())
    }

    /// An L1 table that is referred to `n` times: collects the L2 tables.
    fn l1(&mut self, at: u64, len: u64, n: u64, tables: &mut Vec<(u64, u64)>) -> Result<(), Error> {
        self.fixed_area(at, len, n)?;
        let mut pieces = Pieces::new(at, len);
        while let Some(read) = pieces.next(self.file) {
            if read.is_err() {
                self.report.check_errors += 1;
                continue;
            }
            for i in 0..pieces.bytes.len() / 8 {
                let entry = u64_at(&pieces.bytes, i * 8);
                if entry == 0 {
                    continue;
                }
                if entry & L1_RESERVED != 0 {
                    self.wrong(
                        n,
                        format_args!("ERROR found L1 entry with reserved bits set: {entry:x}"),
                    );
                }
                tables.push((entry & L1_OFFSET, n));
            }
            if tables.len() > L2_TABLES_MAX / 2 {
                join(tables);
            }
            if tables.len() > L2_TABLES_MAX {
                return Err(Error::Limit("the image has too many L2 tables to check".into()));
            }
        }
        Ok(())
    }

    /// These L2 tables, each with how often it is referred to.
    fn l2_tables(&mut self, mut tables: Vec<(u64, u64)>, active: bool) -> Result<(), Error> {
        join(&mut tables);
        let total = tables.len() as u64;
        let size = self.geometry.cluster_size();
        self.overlaps(tables.iter().map(|&(table, _)| (table, size)))?;
        for (done, &(table, n)) in tables.iter().enumerate() {
            self.watch.event(Event::Progress { done: done as u64, total });
            self.area(table, self.geometry.cluster_size(), n)?;
            if !self.geometry.is_aligned(table) {
                self.wrong(
                    n,
                    format_args!(
                        "ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted"
                    ),
                );
            }
            self.l2(table, n, active)?;
        }
        *(if active { &mut self.active } else { &mut self.inactive }) = tables;
        Ok(())
    }

    fn l2(&mut self, table: u64, n: u64, active: bool) -> Result<(), Error> {
        let mut pieces = Pieces::new(table, self.geometry.cluster_size());
        let bytes = 1usize << self.geometry.entry_bits();
        let geometry = self.geometry;
        let fix = self.fix.as_ref().is_some_and(|before| before.is_only_a_table(table, geometry));
        // Where the next cluster would be if this table's were in one piece.
        let mut next = 0;
        while let Some(read) = pieces.next(self.file) {
            let Ok(from) = read else {
                self.report.check_errors += 1;
                continue;
            };
            let mut dirty: Option<(usize, usize)> = None;
            for i in 0..pieces.bytes.len() / bytes {
                let at = i * bytes;
                let word = u64_at(&pieces.bytes, at);
                let bitmap = if bytes == 16 { u64_at(&pieces.bytes, at + 8) } else { 0 };
                if word == 0 && bitmap == 0 {
                    continue;
                }
                let index = (from - table) / bytes as u64 + i as u64;
                let entry = Entry { word, bitmap, index, n, active, fix };
                let before = self.report.corruptions;
                if self.entry(entry, &mut next)? {
                    // With it goes whatever else was wrong about it.
                    self.report.corruptions_fixed += self.report.corruptions - before;
                    self.report.corruptions = before;
                    L2Entry::zero(None, self.geometry).write(&mut pieces.bytes, i, self.geometry);
                    dirty = Some((dirty.map_or(at, |(start, _)| start), at + bytes));
                }
            }
            if let Some((start, end)) = dirty {
                let start = start & !(SECTOR as usize - 1);
                let end = end.next_multiple_of(SECTOR as usize).min(pieces.bytes.len());
                self.file
                    .write_at(from + start as u64, &pieces.bytes[start..end])
                    .map_err(Error::io("repair an L2 table"))?;
            }
        }
        Ok(())
    }

    /// One L2 entry. True: it is to be set to zeros.
    fn entry(&mut self, entry: Entry, next: &mut u64) -> Result<bool, Error> {
        let Entry { word, bitmap, n, active, fix, .. } = entry;
        if word & COMPRESSED != 0 {
            self.compressed(entry)?;
            return Ok(false);
        }
        if word & L2_RESERVED != 0 {
            self.wrong(n, format_args!("ERROR found l2 entry with reserved bits set: {word:x}"));
        }
        let geometry = self.geometry;
        let offset = word & L1_OFFSET;
        let both = bitmap >> 32 & bitmap & 0xffff_ffff;
        if both != 0 {
            self.wrong(n, format_args!("ERROR: subclusters both allocated and zero: {bitmap:x}"));
        }
        let is_there = offset != 0 || geometry.has_data_file() && word & COPIED != 0;
        if !is_there {
            if both == 0 && bitmap & 0xffff_ffff != 0 {
                self.wrong(n, format_args!("ERROR: subclusters allocated nowhere: {bitmap:x}"));
            }
            return Ok(false);
        }
        if !geometry.is_aligned(offset) && self.misplaced(entry, offset, fix) {
            return Ok(true);
        }
        if active {
            self.report.allocated_clusters += n;
            if *next != 0 && *next != offset {
                self.report.fragmented_clusters += n;
            }
            *next = offset + geometry.cluster_size();
        }
        if !geometry.has_data_file() {
            self.area(offset, geometry.cluster_size(), n)?;
        }
        Ok(false)
    }

    /// A cluster that is on no cluster boundary. True: it is to be set to zeros.
    fn misplaced(&mut self, entry: Entry, offset: u64, fix: bool) -> bool {
        let Entry { word, bitmap, n, .. } = entry;
        let has_data = if self.geometry.has_subclusters() {
            bitmap & 0xffff_ffff != 0
        } else {
            word & ZERO == 0
        };
        let kind = if has_data { "Data" } else { "Preallocated" };
        let can_fix = !has_data && self.geometry.has_zero_clusters();
        let fixed = can_fix && fix;
        let verb = if fixed { "Repairing" } else { "ERROR" };
        self.wrong(
            n,
            format_args!(
                "{verb} offset={offset:x}: {kind} cluster is not properly aligned; L2 entry \
                 corrupted."
            ),
        );
        self.fixable += u64::from(can_fix);
        fixed
    }

    fn compressed(&mut self, entry: Entry) -> Result<(), Error> {
        let Entry { word, bitmap, index, n, active, .. } = entry;
        let bits = 62 - (self.geometry.cluster_bits() - 8);
        let at = word & ((1 << bits) - 1);
        if word & COPIED != 0 {
            self.wrong(
                n,
                format_args!(
                    "ERROR: coffset={at:#x}: copied flag must never be set for compressed clusters"
                ),
            );
        }
        if self.geometry.has_data_file() {
            let entry = word & !COPIED;
            self.wrong(
                n,
                format_args!("ERROR compressed cluster {index} with data file, entry=0x{entry:x}"),
            );
            return Ok(());
        }
        if bitmap != 0 {
            self.wrong(
                n,
                format_args!(
                    "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, \
                     entry=0x{word:x}"
                ),
            );
            return Ok(());
        }
        let sectors = (word & !(COPIED | COMPRESSED)) >> bits;
        self.area(at, (sectors + 1) * SECTOR - (at & (SECTOR - 1)), n)?;
        if active {
            self.report.allocated_clusters += n;
            self.report.compressed_clusters += n;
            // They are read one by one, wherever they are.
            self.report.fragmented_clusters += n;
        }
        Ok(())
    }

    fn snapshots(&mut self) -> Result<(), Error> {
        self.snapshots = snapshot_table::read_table(self.file, self.header, self.salvage)?;
        let table = std::mem::take(&mut self.snapshots);
        let verb = if self.salvage { "Repairing" } else { "ERROR" };
        if table.dropped > 0 {
            let n = table.dropped;
            self.wrong(n, format_args!("Discarding {n} overhanging snapshots"));
        }
        for i in &table.cut {
            let what = format_args!("{verb} snapshot table entry {i} has too much extra data");
            self.wrong(1, what);
        }
        for i in &table.incomplete {
            self.wrong(1, format_args!("{verb} snapshot table entry {i} is incomplete"));
        }
        let list = &table.list;
        let mut l1_tables = Vec::new();
        for one in list {
            if one.check_l1(self.header).is_err() {
                let [id, name] =
                    [&one.id, &one.name].map(|text| Path::new(OsStr::from_bytes(text)));
                let (id, name) = (Shown(id), Shown(name));
                let (at, n) = (one.l1_offset, one.l1_size);
                let why = if u64::from(n) * 8 > L1_BYTES_MAX {
                    format!("l1_size={n:#x}: L1 table is too large")
                } else {
                    format!("l1_offset={at:#x}: L1 table is not cluster aligned")
                };
                let what = "snapshot table entry corrupted";
                self.wrong(1, format_args!("ERROR snapshot {id} ({name}) {why}; {what}"));
                continue;
            }
            l1_tables.push((one.l1_offset, u64::from(one.l1_size) * 8));
        }
        l1_tables.sort_unstable();
        self.overlaps(l1_tables.chunk_by(|a, b| a == b).map(|same| same[0]))?;
        let mut tables = Vec::new();
        let mut total = 0;
        for same in l1_tables.chunk_by(|a, b| a == b) {
            let (at, len) = same[0];
            total += len;
            if total > TABLES_MAX {
                return Err(Error::Limit("the snapshots' L1 tables are too large".into()));
            }
            self.l1(at, len, same.len() as u64, &mut tables)?;
        }
        self.l2_tables(tables, false)?;
        let before = self.report.corruptions;
        self.fixed_area(self.header.snapshots_offset, table.bytes, 1)?;
        self.snapshots = table;
        self.snapshots.misplaced = self.report.corruptions - before;
        Ok(())
    }

    fn bitmaps(&mut self) -> Result<(), Error> {
        let Some(bitmaps) = self.header.bitmaps() else { return Ok(()) };
        self.fixed_area(bitmaps.directory.offset, bitmaps.directory.len, 1)?;
        let mut list = bitmap::read(self.file, self.header)?;
        list.sort_unstable_by_key(|one| (one.table.offset, one.table.len));
        self.overlaps(list.iter().map(|one| (one.table.offset, one.table.len)))?;
        let mut total = 0;
        for one in list {
            total += one.table.len;
            if total > TABLES_MAX {
                return Err(Error::Limit("the bitmap tables are too large".into()));
            }
            self.fixed_area(one.table.offset, one.table.len, 1)?;
            let mut pieces = Pieces::new(one.table.offset, one.table.len);
            while let Some(read) = pieces.next(self.file) {
                if read.is_err() {
                    self.report.check_errors += 1;
                    continue;
                }
                for i in 0..pieces.bytes.len() / 8 {
                    let entry = u64_at(&pieces.bytes, i * 8);
                    self.bitmap_entry(entry)?;
                }
            }
        }
        Ok(())
    }

    fn bitmap_entry(&mut self, entry: u64) -> Result<(), Error> {
        const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
        let offset = entry & OFFSET;
        let all_ones = entry & 1 != 0;
        let reserved = entry & !(OFFSET | 1) != 0;
        if reserved || !self.geometry.is_aligned(offset) || offset != 0 && all_ones {
            self.wrong(1, format_args!("ERROR bitmap table entry {entry:x} is invalid"));
        } else if offset != 0 {
            self.area(offset, self.geometry.cluster_size(), 1)?;
        }
        Ok(())
    }
}

/// Sorts by table, and adds up what is there more than once.
fn join(tables: &mut Vec<(u64, u64)>) {
    tables.sort_unstable();
    tables.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        if same {
            kept.1 += next.1;
        }
        same
    });
}
