//! Checking a VMDK image, and repairing it from its redundant tables.
//!
//! The model: every entry of every grain table, primary and redundant, is looked at once. An entry
//! that points where no grain can be is *invalid*, and so is one of 0 whose redundant copy names a
//! grain: redundant tables are written when the primary ones are stable. A redundant entry that
//! differs otherwise is *stale*, which is what a crash between the two leaves; a grain or table that
//! overlaps something else is a *double reference*; grains that nothing refers to are *leaks*.
//!
//! What is repaired: an invalid primary entry takes the redundant one if that is possible and its
//! grain not in use, else it becomes 0. A stale redundant entry takes the primary one. Leaks at the
//! end of the file are cut off. Double references are reported and stay: which of two is right
//! nobody can know. Repairing twice is the same as repairing once.
//!
//! Bounds: eight bytes for each grain that something refers to, at most [`GRAINS_MAX`] of them.

use std::collections::BTreeSet;

use cowbell_engine::mutant;
use cowbell_engine::store::Store;

use crate::chain::Layer;
use crate::error::Error;
use crate::format::LayerMeta;
use crate::vmdk::disk::layout::entry_bytes;
use crate::vmdk::disk::layout::{Bounds, Entry, SECTOR, SECTOR_BITS};
use crate::vmdk::rest::grain::read_grain;
use crate::vmdk::rest::open::{Extent, ExtentKind, Sparse, read_entries};

pub use crate::parts::report::{Repair, Report};

/// Grains that one extent may refer to, for a check: 256 MiB of memory, 2 TiB of data.
pub const GRAINS_MAX: usize = 32 << 20;

/// Checks the image whose files `layer` holds, and repairs it as told.
///
/// # Errors
///
/// [`Error::Limit`] for more grains than [`GRAINS_MAX`]; [`Error::Io`] for a failed write. A failed
/// read of a table is counted in the report instead. [`Error::Invalid`] for another format.
pub fn check<F: Store>(layer: &Layer<F>, repair: Repair) -> Result<Report, Error> {
    let LayerMeta::Vmdk(image) = &layer.meta else {
        return Err(Error::Invalid("not a VMDK image".into()));
    };
    let mut report = Report::default();
    for extent in &image.extents {
        let file = layer.numbered(extent.file);
        check_extent(file, extent, repair, &mut report)?;
    }
    if repair != Repair::None {
        for i in 0..=layer.more.len() {
            layer.numbered(i).flush().map_err(Error::io("flush the image"))?;
        }
    }
    Ok(report)
}

fn check_extent<F: Store>(
    file: &F,
    extent: &Extent,
    repair: Repair,
    report: &mut Report,
) -> Result<(), Error> {
    let ExtentKind::Sparse(sparse) = &extent.kind else { return Ok(()) };
    // What its tables hold is not known: nothing is changed.
    let repair = if sparse.redundant_lost { Repair::None } else { repair };
    report.corruptions += u64::from(sparse.redundant_lost);
    let mut shared = shared_tables(sparse);
    let mut taken = Vec::new();
    if repair == Repair::All && sparse.redundant.is_some() {
        // What is in use is known before anything is taken from the redundant tables.
        let mut scan = Walk::new(file, sparse, Repair::None, shared, taken);
        scan.all()?;
        (shared, taken) = (scan.shared, scan.used);
    }
    let mut walk = Walk::new(file, sparse, repair, shared, taken);
    let end = walk.all()?;
    walk.cut(end)?;
    *report = sum(report, &walk.report);
    Ok(())
}

/// What was found in several extents.
fn sum(one: &Report, other: &Report) -> Report {
    Report {
        corruptions: one.corruptions + other.corruptions,
        corruptions_fixed: one.corruptions_fixed + other.corruptions_fixed,
        leaks: one.leaks + other.leaks,
        leaks_fixed: one.leaks_fixed + other.leaks_fixed,
        stale: one.stale + other.stale,
        stale_fixed: one.stale_fixed + other.stale_fixed,
        check_errors: one.check_errors + other.check_errors,
        total_clusters: one.total_clusters + other.total_clusters,
        allocated_clusters: one.allocated_clusters + other.allocated_clusters,
        ..Report::default()
    }
}

/// The check of one extent.
struct Walk<'a, F> {
    file: &'a F,
    sparse: &'a Sparse,
    bounds: Bounds,
    repair: Repair,
    report: Report,
    /// The first sectors of the grains that something refers to.
    used: Vec<u32>,
    /// Other stretches in use, in sectors: start and length.
    odd: Vec<(u64, u64)>,
    /// Tables that overlap others, sorted: nothing in them is changed.
    shared: Vec<u32>,
    /// The first sectors of the grains that were in use before the repair, sorted.
    taken: Vec<u32>,
    /// And those that it has taken from redundant tables.
    picked: BTreeSet<u32>,
}

/// The tables of both directories that overlap, sorted. That both directories name one table at
/// one place is no overlap.
fn shared_tables(sparse: &Sparse) -> Vec<u32> {
    let entries = sparse.header.directory_entries() as usize;
    let mut all = sparse.directory[..entries].to_vec();
    if let Some(redundant) = &sparse.redundant {
        let differ = redundant[..entries].iter().zip(&sparse.directory);
        all.extend(differ.filter(|(a, b)| a != b).map(|(a, _)| a));
    }
    all.retain(|&raw| raw != 0);
    all.sort_unstable();
    let sectors = sparse.header.table_bytes().div_ceil(SECTOR) as u32;
    let mut shared = Vec::new();
    for pair in all.windows(2) {
        if pair[1] - pair[0] < sectors {
            shared.extend_from_slice(pair);
        }
    }
    shared.dedup();
    shared
}

/// A copy of a table.
struct Table {
    at: u64,
    entries: Vec<u32>,
    changed: bool,
}

impl<'a, F: Store> Walk<'a, F> {
    fn new(
        file: &'a F,
        sparse: &'a Sparse,
        repair: Repair,
        shared: Vec<u32>,
        taken: Vec<u32>,
    ) -> Walk<'a, F> {
        let (used, odd, picked) = (Vec::new(), Vec::new(), BTreeSet::new());
        let (bounds, report) = (sparse.bounds(), Report::default());
        Walk { file, sparse, bounds, repair, report, used, odd, shared, taken, picked }
    }

    /// Looks at everything; answers the first sector behind all that is in use.
    fn all(&mut self) -> Result<u64, Error> {
        self.fixed_parts();
        for index in 0..self.sparse.header.directory_entries() {
            self.table(index)?;
        }
        Ok(self.overlaps())
    }

    /// Is nothing in use where a redundant entry says that a grain is?
    fn is_free(&self, raw: u32) -> bool {
        let grain = (self.sparse.header.grain_size() >> SECTOR_BITS) as u32;
        let (from, to) = (raw.saturating_sub(grain - 1), raw.saturating_add(grain));
        let first = self.taken.partition_point(|&at| at < from);
        self.taken.get(first).is_none_or(|&at| at >= to)
            && self.picked.range(from..to).next().is_none()
    }

    /// Header, descriptor, directories.
    fn fixed_parts(&mut self) {
        let header = &self.sparse.header;
        let front = header.overhead.max(1);
        self.odd.push((0, front));
        let sectors = self.sparse.directory.len() as u64 * 4 / SECTOR;
        let redundant = self.sparse.redundant.as_ref().map(|_| header.redundant_at);
        for at in redundant.into_iter().chain([header.directory_at]) {
            self.meta(at, sectors);
        }
        if self.sparse.has_footer {
            self.odd.push((self.bounds.end.saturating_sub(3), 3));
        }
    }

    /// A directory or table: in front of the grains there is nothing to collide with.
    fn meta(&mut self, at: u64, sectors: u64) {
        // In a stream a marker stands before it.
        let marker = u64::from(self.sparse.has_footer);
        if at >= self.bounds.first {
            self.odd.push((at - marker, sectors + marker));
        }
    }

    fn table(&mut self, index: u64) -> Result<(), Error> {
        let mut primary = self.copy(self.sparse.directory[index as usize]);
        let redundant = self.sparse.redundant.as_ref().map(|r| r[index as usize]);
        let is_same = redundant == Some(self.sparse.directory[index as usize]);
        let mut redundant = match redundant {
            Some(raw) if !is_same => self.copy(raw),
            _ => Ok(None),
        };
        let sectors = self.sparse.header.table_bytes().div_ceil(SECTOR);
        for table in [&primary, &redundant] {
            if let Ok(Some(table)) = table {
                let at = table.at >> SECTOR_BITS;
                self.meta(at, sectors);
            }
        }
        if self.repair == Repair::All {
            self.mend_directory(index, &mut primary, &mut redundant, is_same)?;
        } else if let (Err(_), _) | (_, Err(_)) = (&primary, &redundant) {
            self.report.corruptions += 1;
        } else if let (Ok(None), Ok(Some(_))) = (&primary, &redundant) {
            self.report.corruptions += 1;
        } else if let (Ok(Some(_)), Ok(None), Some(_)) =
            (&primary, &redundant, &self.sparse.redundant)
            && !is_same
        {
            self.report.stale += 1;
        }
        let (Ok(Some(mut primary)), redundant) = (primary, redundant) else { return Ok(()) };
        let mut redundant = redundant.ok().flatten();
        let is_shared =
            |table: &Table| self.shared.binary_search(&((table.at >> SECTOR_BITS) as u32)).is_ok();
        let repair = self.repair;
        if is_shared(&primary) || redundant.as_ref().is_some_and(is_shared) {
            self.repair = Repair::None;
        }
        let result = self.entries(index, &mut primary, redundant.as_mut());
        self.repair = repair;
        result?;
        for table in [Some(primary), redundant].into_iter().flatten() {
            if table.changed {
                self.file
                    .write_at(table.at, &entry_bytes(&table.entries))
                    .map_err(Error::io("write a grain table"))?;
            }
        }
        Ok(())
    }

    /// The table that a directory names; `Err` if it cannot be there or cannot be read.
    fn copy(&mut self, raw: u32) -> Result<Option<Table>, ()> {
        let bytes = self.sparse.header.table_bytes();
        let table = self.sparse.header.table(raw, self.sparse.file_len);
        let Some(at) = table.ok_or(())? else { return Ok(None) };
        match read_entries(self.file, at, bytes as usize / 4) {
            Ok(entries) => Ok(Some(Table { at, entries, changed: false })),
            Err(_) => {
                self.report.check_errors += 1;
                Err(())
            }
        }
    }

    /// Makes a directory entry that cannot be what the other directory says, or 0.
    fn mend_directory(
        &mut self,
        index: u64,
        primary: &mut Result<Option<Table>, ()>,
        redundant: &mut Result<Option<Table>, ()>,
        is_same: bool,
    ) -> Result<(), Error> {
        let raw = match (&*primary, &*redundant) {
            (Ok(Some(_)), Err(())) | (Ok(Some(_)), Ok(None))
                if self.sparse.redundant.is_some() && !is_same =>
            {
                // Two directories, one table.
                match redundant {
                    Ok(_) => self.report.stale_fixed += 1,
                    Err(()) => self.report.corruptions_fixed += 1,
                }
                let raw = self.sparse.directory[index as usize];
                return self.write_directory(self.sparse.header.redundant_at, index, raw);
            }
            (Err(()), Ok(Some(table))) => {
                self.report.corruptions_fixed += 1;
                (table.at >> SECTOR_BITS) as u32
            }
            (Ok(None), Ok(Some(table))) => {
                self.report.corruptions_fixed += 1;
                (table.at >> SECTOR_BITS) as u32
            }
            (Err(()), _) => {
                self.report.corruptions_fixed += 1;
                0
            }
            _ => return Ok(()),
        };
        *primary = std::mem::replace(redundant, Ok(None)).or(Ok(None));
        self.write_directory(self.sparse.header.directory_at, index, raw)
    }

    fn write_directory(&self, at: u64, index: u64, raw: u32) -> Result<(), Error> {
        self.file
            .write_at((at << SECTOR_BITS) + index * 4, &raw.to_le_bytes())
            .map_err(Error::io("write a grain directory"))
    }

    fn entries(
        &mut self,
        index: u64,
        primary: &mut Table,
        mut redundant: Option<&mut Table>,
    ) -> Result<(), Error> {
        let header = &self.sparse.header;
        let grain_sectors = header.grain_size() >> SECTOR_BITS;
        let first = index << (header.span_bits() - SECTOR_BITS);
        let left = header.capacity - first;
        let count = left.div_ceil(grain_sectors).min(primary.entries.len() as u64);
        self.report.total_clusters += count;
        for i in 0..count as usize {
            let found = primary.entries[i];
            let other = redundant.as_ref().map(|table| table.entries[i]);
            let value = self.decide(found, other);
            if value != found {
                primary.entries[i] = value;
                primary.changed = true;
            }
            if let Some(table) = redundant.as_deref_mut()
                && table.entries[i] != value
                && self.mends_copy(value)
            {
                table.entries[i] = value;
                table.changed = true;
            }
            if let Some(Entry::Data(place)) = self.bounds.entry(value) {
                self.grain(place, first + i as u64 * grain_sectors)?;
            }
        }
        Ok(())
    }

    fn mends_copy(&self, value: u32) -> bool {
        self.repair == Repair::All || self.repair == Repair::Leaks && value != 0
    }

    /// What an entry is to be, given its copies; counts what is wrong with them.
    fn decide(&mut self, found: u32, other: Option<u32>) -> u32 {
        let is_possible = |raw| self.bounds.entry(raw).is_some();
        let mend = self.repair == Repair::All;
        let other = other.filter(|&other| other != found && !mutant!("vmdk_copies_not_compared"));
        let other_is_possible = other.is_some_and(&is_possible);
        let free = other.filter(|&other| mend && other_is_possible && self.is_free(other));
        let report = &mut self.report;
        if is_possible(found) && (found != 0 || !other_is_possible) {
            if other.is_some() && (mend || self.repair == Repair::Leaks && found != 0) {
                report.stale_fixed += 1;
            } else if other.is_some() {
                report.stale += 1;
            }
            return found;
        }
        if !mend {
            report.corruptions += 1;
            return found;
        }
        report.corruptions_fixed += 1;
        let Some(other) = free else { return 0 };
        self.picked.insert(other);
        other
    }

    /// Something refers to the grain at byte `place` of the file, for sector `lba` of the extent.
    fn grain(&mut self, place: u64, lba: u64) -> Result<(), Error> {
        self.report.allocated_clusters += 1;
        if self.used.len() + self.odd.len() >= GRAINS_MAX {
            return Err(Error::Limit("the image has too many grains to be checked".into()));
        }
        let header = &self.sparse.header;
        if !header.is_compressed() {
            self.used.push((place >> SECTOR_BITS) as u32);
            return Ok(());
        }
        let mut marker = [0; 16];
        let read = self.file.read_at(place, &mut marker).map_err(Error::io("read a grain"));
        let len = read.and_then(|()| read_grain(self.file, header, place, lba)).map(|_| {
            let size = u32::from_le_bytes([marker[8], marker[9], marker[10], marker[11]]);
            u64::from(size) + 12
        });
        match len {
            Ok(len) => self.odd.push((place >> SECTOR_BITS, len.div_ceil(SECTOR))),
            Err(Error::Corrupt { .. }) => self.report.corruptions += 1,
            Err(_) => self.report.check_errors += 1,
        }
        Ok(())
    }

    /// Counts overlaps and leaks; answers the first sector behind everything in use.
    fn overlaps(&mut self) -> u64 {
        let grain = self.sparse.header.grain_size() >> SECTOR_BITS;
        self.used.sort_unstable();
        self.odd.sort_unstable();
        let mut grains = self.used.iter().map(|&at| (u64::from(at), grain)).peekable();
        let mut others = self.odd.iter().copied().peekable();
        let mut end = 0;
        loop {
            let next = match (grains.peek(), others.peek()) {
                (Some(a), Some(b)) if a < b => grains.next(),
                (Some(_), None) => grains.next(),
                _ => others.next(),
            };
            let Some((at, len)) = next else { break };
            if at < end {
                self.report.corruptions += 1;
            } else {
                self.report.leaks += (at - end) / grain;
            }
            end = end.max(at + len);
        }
        let end = end.min(self.bounds.end);
        // What lies behind the extent on a device is not its own.
        let tail = if self.file.has_fixed_len() { 0 } else { self.bounds.end - end };
        self.report.leaks += tail / grain;
        end
    }

    /// Cuts leaks off the end of the file, if nothing is wrong with the rest.
    fn cut(&mut self, end: u64) -> Result<(), Error> {
        let report = &mut self.report;
        let sound = report.corruptions + report.check_errors == 0;
        let has_tail = end < self.bounds.end && !self.file.has_fixed_len();
        if self.repair == Repair::None || !sound || !has_tail {
            return Ok(());
        }
        // What the entries of the tables say must be on disk before what they left is gone.
        self.file.flush().map_err(Error::io("flush the tables"))?;
        self.file.set_len(end << SECTOR_BITS).map_err(Error::io("cut off the image's tail"))?;
        let grain = self.sparse.header.grain_size() >> SECTOR_BITS;
        let cut = (self.bounds.end - end) / grain;
        report.leaks_fixed += cut;
        report.leaks -= cut;
        Ok(())
    }
}
