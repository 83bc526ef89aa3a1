//! Checking a QED image, and repairing what can be repaired.
//!
//! The model: one walk over the L1 table and every L2 table marks each cluster that something
//! refers to in a bitmap. An entry that points where nothing can be is *invalid*; a cluster that
//! is referred to twice is a *double reference*; one that nothing refers to is a *leak*. Invalid
//! entries can be set to zero, and leaks at the end of the file cut off. Which of two references
//! is the right one nobody can know: double references are reported and stay.
//!
//! Bounds: one bit per cluster of the file, at most [`BITMAP_MAX`] bytes, computed before it is
//! allocated; tables are read in chunks; holes in the file are skipped, so that a sparse file of
//! exabytes takes the time of the bytes that are really there.
//!
//! The order of repair: the image is marked as needing a check (and unknown autoclear bits are
//! cleared) before anything else is written, and the mark goes last, after a flush, and only if
//! nothing is wrong any more. A crash in between leaves an image that is still marked. Repairing
//! twice is the same as repairing once.

use std::ops::Range;

use cowbell_engine::mutant;
use cowbell_engine::store::Store;
use cowbell_engine::units::HostOffset;

use crate::error::Error;
use crate::parts::length::file_len;
use crate::qed::disk::layout::{Bounds, Entry, Header, SECTOR};
use crate::qed::rest::open::{read_header, write_header};

pub use crate::parts::report::{Repair, Report};

/// The most memory that the bitmap of used clusters may take, in bytes: enough for 2^31 clusters,
/// which is a file of 8 TiB at 4 KiB a cluster and 128 TiB at 64 KiB.
pub const BITMAP_MAX: u64 = 256 << 20;

/// Tables are read in pieces of this many bytes.
const CHUNK: usize = 64 << 10;

/// Checks the image in `file`, and repairs it as told.
///
/// # Errors
///
/// [`Error::Limit`] for a file of more clusters than [`BITMAP_MAX`] has room for; what
/// [`Header::parse`] says; [`Error::Io`] for a failed write. A failed read of a table is counted
/// in the report instead.
pub fn check<F: Store>(file: &F, repair: Repair) -> Result<Report, Error> {
    let mut header = read_header(file)?;
    if repair != Repair::None {
        // Holes are believed to be zeros, and what nothing refers to is cut off. Some file
        // systems have told of holes where there was data not yet written back.
        file.flush().map_err(Error::io("flush the image"))?;
    }
    let file_len = file_len(file)?;
    let geometry = header.geometry;
    let used = Bitmap::new(file_len >> geometry.cluster_bits())?;
    let mut walk = Walk {
        file,
        bounds: header.bounds(file_len),
        used,
        fix: repair == Repair::All,
        report: Report {
            total_clusters: geometry.clusters_for(header.image_size),
            ..Report::default()
        },
        header: &mut header,
    };
    walk.claim(HostOffset(0), walk.header.header_clusters.into());
    walk.claim(walk.header.l1_offset, geometry.table_clusters());
    walk.l1(&mut Chunk::new(), &mut Chunk::new())?;
    let Walk { used, mut report, .. } = walk;
    // What lies behind the image on a device is not its own.
    let end = if file.has_fixed_len() { used.end } else { used.len };
    report.leaks = end - used.count;
    report.image_end = used.end << geometry.cluster_bits();
    if repair != Repair::None && report.is_sound() {
        finish(file, &mut header, file_len, &mut report)?;
    }
    if mutant!("qed_leaks_not_counted") {
        report.leaks = 0;
    }
    Ok(report)
}

/// The image is sound: cuts off its tail and takes away the mark.
fn finish<F: Store>(
    file: &F,
    header: &mut Header,
    file_len: u64,
    report: &mut Report,
) -> Result<(), Error> {
    if report.image_end < file_len && !file.has_fixed_len() {
        if header.autoclear_features != 0 {
            header.autoclear_features = 0;
            write_header(file, header)?;
        }
        file.set_len(report.image_end).map_err(Error::io("cut off the image's tail"))?;
        let cut = (file_len - report.image_end) >> header.geometry.cluster_bits();
        report.leaks_fixed = cut;
        report.leaks -= cut;
    }
    if header.needs_check() {
        file.flush().map_err(Error::io("flush the repaired tables"))?;
        header.set_needs_check(false);
        header.autoclear_features = 0;
        write_header(file, header)?;
    }
    Ok(())
}

struct Walk<'a, F> {
    file: &'a F,
    header: &'a mut Header,
    bounds: Bounds,
    used: Bitmap,
    fix: bool,
    report: Report,
}

/// Part of a table.
struct Chunk {
    bytes: Vec<u8>,
    /// From the first to behind the last byte that was changed.
    dirty: Range<usize>,
}

impl Chunk {
    fn new() -> Chunk {
        Chunk { bytes: Vec::with_capacity(CHUNK), dirty: 0..0 }
    }

    fn entry(&self, index: usize) -> u64 {
        let bytes = self.bytes[index * 8..].first_chunk().expect("index < bytes.len() / 8");
        u64::from_le_bytes(*bytes)
    }

    fn clear(&mut self, index: usize) {
        self.bytes[index * 8..][..8].fill(0);
        let first = if self.dirty.is_empty() { index * 8 } else { self.dirty.start };
        self.dirty = first..index * 8 + 8;
    }
}

impl<F: Store> Walk<'_, F> {
    fn l1(&mut self, l1: &mut Chunk, l2: &mut Chunk) -> Result<(), Error> {
        let start = self.header.l1_offset.0;
        let mut at = start;
        while let Some(from) = self.load(l1, at, start + self.bounds.geometry.table_bytes()) {
            for index in 0..l1.bytes.len() / 8 {
                match self.bounds.l1_entry(l1.entry(index)) {
                    Some(None) => {}
                    Some(Some(table)) => {
                        // A table in somebody else's clusters holds somebody else's bytes.
                        if self.claim(table, self.bounds.geometry.table_clusters()) {
                            self.l2(table, l2)?;
                        }
                    }
                    None => self.invalid(l1, index),
                }
            }
            self.store(l1, from)?;
            at = from + l1.bytes.len() as u64;
        }
        Ok(())
    }

    fn l2(&mut self, table: HostOffset, l2: &mut Chunk) -> Result<(), Error> {
        let mut at = table.0;
        let mut last = None;
        while let Some(from) = self.load(l2, at, table.0 + self.bounds.geometry.table_bytes()) {
            for index in 0..l2.bytes.len() / 8 {
                let Entry::Data(raw) = Entry::decode(l2.entry(index)) else { continue };
                self.report.allocated_clusters += 1;
                let next = |last: u64| last.checked_add(self.bounds.geometry.cluster_size());
                if last.is_some_and(|last| next(last) != Some(raw.0)) {
                    self.report.fragmented_clusters += 1;
                }
                last = Some(raw.0);
                match self.bounds.l2_entry(raw.0) {
                    Some(Entry::Data(cluster)) => {
                        self.claim(cluster, 1);
                    }
                    _ => self.invalid(l2, index),
                }
            }
            self.store(l2, from)?;
            at = from + l2.bytes.len() as u64;
        }
        Ok(())
    }

    /// Loads the next piece of a table that ends at `end`, from `at` on, holes left out. Answers
    /// where the piece starts; `None` at the end. What cannot be read is counted and left out.
    fn load(&mut self, chunk: &mut Chunk, mut at: u64, end: u64) -> Option<u64> {
        while at < end {
            let mut data_end = end;
            if let Ok(extent) = self.file.extent_at(at) {
                if extent.data {
                    data_end = extent.end.checked_next_multiple_of(SECTOR).unwrap_or(end);
                } else if extent.end & !(SECTOR - 1) > at {
                    at = extent.end & !(SECTOR - 1);
                    continue;
                }
            }
            // An answer that does not get us on is as good as none.
            if data_end <= at {
                data_end = end;
            }
            let len = (data_end.min(end) - at).min(CHUNK as u64) as usize;
            chunk.bytes.clear();
            chunk.bytes.resize(len, 0);
            chunk.dirty = 0..0;
            if self.file.read_at(at, &mut chunk.bytes).is_ok() {
                return Some(at);
            }
            self.report.check_errors += 1;
            at += len as u64;
        }
        None
    }

    /// Writes the chunk at `from` back, from the first sector that was changed to the last.
    fn store(&mut self, chunk: &mut Chunk, from: u64) -> Result<(), Error> {
        if chunk.dirty.is_empty() {
            return Ok(());
        }
        if !self.header.needs_check() || self.header.autoclear_features != 0 {
            self.header.set_needs_check(true);
            self.header.autoclear_features = 0;
            write_header(self.file, self.header)?;
        }
        let start = chunk.dirty.start & !(SECTOR as usize - 1);
        let end = chunk.dirty.end.next_multiple_of(SECTOR as usize);
        self.file
            .write_at(from + start as u64, &chunk.bytes[start..end])
            .map_err(Error::io("repair a table"))?;
        chunk.dirty = 0..0;
        Ok(())
    }

    fn invalid(&mut self, chunk: &mut Chunk, index: usize) {
        if self.fix {
            chunk.clear(index);
            self.report.corruptions_fixed += 1;
        } else {
            self.report.corruptions += 1;
        }
    }

    /// Marks `count` clusters from `offset` on as used; false if any already was. They lie within
    /// the file: the header says so of itself and the L1 table, `Bounds` of the others.
    fn claim(&mut self, offset: HostOffset, count: u64) -> bool {
        let first = offset.0 >> self.bounds.geometry.cluster_bits();
        let doubles = (first..first + count).filter(|&cluster| !self.used.set(cluster)).count();
        self.report.corruptions += doubles as u64;
        doubles == 0
    }
}

/// One bit for each cluster of the file. Counted as bits are set, so that the memory of clusters
/// that nothing refers to is never touched.
struct Bitmap {
    words: Vec<u64>,
    len: u64,
    /// How many are set.
    count: u64,
    /// First bit behind the last that is set.
    end: u64,
}

impl Bitmap {
    fn new(len: u64) -> Result<Bitmap, Error> {
        if len > BITMAP_MAX * 8 {
            return Err(Error::Limit(format!(
                "a file of {len} clusters is too large to check: at most {} are possible",
                BITMAP_MAX * 8
            )));
        }
        Ok(Bitmap { words: vec![0; len.div_ceil(64) as usize], len, count: 0, end: 0 })
    }

    /// Sets a bit; false if it was set.
    fn set(&mut self, bit: u64) -> bool {
        assert!(bit < self.len, "cluster {bit} of {}", self.len);
        let word = &mut self.words[(bit / 64) as usize];
        if *word >> (bit % 64) & 1 == 1 {
            return false;
        }
        *word |= 1 << (bit % 64);
        self.count += 1;
        self.end = self.end.max(bit + 1);
        true
    }
}
