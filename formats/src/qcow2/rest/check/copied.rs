//! The COPIED flags: set exactly where a refcount is 1, in the active tables.
//!
//! A flag that is set where it should not be lets a shared cluster be overwritten; one that is not
//! where it could be costs a copy. They are compared with the refcounts on disk, as these are after
//! any repair, for that is what whoever writes the image goes by.

use cowbell_engine::store::Store;

use super::scan::Pieces;
use super::{Checker, Repair, Watch};
use crate::error::Error;
use crate::qcow2::disk::header::{SECTOR, u64_at};

pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

impl<F: Store, W: Watch> Checker<'_, F, W> {
    /// Checks the flags, and repairs them if told; leaks alone are a reason to if all else is
    /// right.
    pub(super) fn copied(&mut self, repair: Repair) -> Result<(), Error> {
        let fix = match repair {
            Repair::None => false,
            Repair::Leaks => self.report.is_clean(),
            Repair::All => true,
        };
        let old = self.report.corruptions_fixed;
        self.before.sort_fixed();
        self.l1_flags(fix && self.l1_is_alone())?;
        for i in 0..self.before.active.len() {
            let (table, n) = self.before.active[i];
            let fix = fix && self.before.is_a_table(table, self.geometry);
            self.l2_flags(table, n, fix)?;
        }
        if self.report.corruptions_fixed > old {
            self.file.flush().map_err(Error::io("flush the repaired flags"))?;
        }
        Ok(())
    }

    /// Is nothing else in the active L1 table's clusters?
    fn l1_is_alone(&self) -> bool {
        let bits = self.geometry.cluster_bits();
        let start = self.header.l1_offset;
        let end = start + u64::from(self.header.l1_size) * 8;
        let mut clusters = start >> bits..end.div_ceil(1 << bits);
        start > 0 && clusters.all(|cluster| self.before.refs.real(cluster) == 1)
    }

    fn l1_flags(&mut self, fix: bool) -> Result<(), Error> {
        let start = self.header.l1_offset;
        let mut pieces = Pieces::new(start, u64::from(self.header.l1_size) * 8);
        while let Some(read) = pieces.next(self.file) {
            // What cannot be read was counted before.
            let Ok(from) = read else { continue };
            let mut dirty = Dirty::default();
            for at in (0..pieces.bytes.len()).step_by(8) {
                let entry = u64_at(&pieces.bytes, at);
                if entry & OFFSET == 0 {
                    continue;
                }
                let Some((is_copied, count)) = self.flag(entry) else { continue };
                let index = (from - start) / 8 + at as u64 / 8;
                self.flagged(
                    1,
                    fix,
                    format_args!(
                        "L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}"
                    ),
                );
                if fix {
                    dirty.set(&mut pieces.bytes, at, with_flag(entry, is_copied));
                }
            }
            dirty.store(self.file, from, &pieces.bytes)?;
        }
        Ok(())
    }

    fn l2_flags(&mut self, table: u64, n: u64, fix: bool) -> Result<(), Error> {
        let is_counted = self.disk.get(table >> self.geometry.cluster_bits());
        if table == 0 || self.geometry.has_data_file() || !matches!(is_counted, Ok(Some(_))) {
            return Ok(());
        }
        let mut pieces = Pieces::new(table, self.geometry.cluster_size());
        while let Some(read) = pieces.next(self.file) {
            let Ok(from) = read else { continue };
            let mut dirty = Dirty::default();
            for at in (0..pieces.bytes.len()).step_by(1 << self.geometry.entry_bits()) {
                let entry = u64_at(&pieces.bytes, at);
                if entry & COMPRESSED != 0 || entry & OFFSET == 0 {
                    continue;
                }
                let Some((is_copied, count)) = self.flag(entry) else { continue };
                self.flagged(
                    n,
                    fix,
                    format_args!("data cluster: l2_entry={entry:x} refcount={count}"),
                );
                if fix {
                    dirty.set(&mut pieces.bytes, at, with_flag(entry, is_copied));
                }
            }
            dirty.store(self.file, from, &pieces.bytes)?;
        }
        Ok(())
    }

    /// What the flag of an entry should be, and the refcount; `None` if it is right or nobody
    /// knows.
    fn flag(&mut self, entry: u64) -> Option<(bool, u64)> {
        let cluster = (entry & OFFSET) >> self.geometry.cluster_bits();
        let count = self.disk.get(cluster).ok().flatten()?;
        ((count == 1) != (entry & COPIED != 0)).then_some((count == 1, count))
    }

    fn flagged(&mut self, n: u64, fix: bool, what: std::fmt::Arguments<'_>) {
        if fix {
            self.wrong(0, format_args!("Repairing OFLAG_COPIED {what}"));
            self.report.corruptions_fixed += n;
        } else {
            self.wrong(n, format_args!("ERROR OFLAG_COPIED {what}"));
        }
    }
}

pub(super) fn with_flag(entry: u64, on: bool) -> u64 {
    if on { entry | COPIED } else { entry & !COPIED }
}

/// What was changed of a piece of a table.
#[derive(Default)]
struct Dirty(Option<(usize, usize)>);

impl Dirty {
    fn set(&mut self, bytes: &mut [u8], at: usize, word: u64) {
        bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
        self.0 = Some((self.0.map_or(at, |(start, _)| start), at + 8));
    }

    /// Writes it, in whole sectors, to the piece at `from`.
    fn store<F: Store>(self, file: &F, from: u64, bytes: &[u8]) -> Result<(), Error> {
        let Some((start, end)) = self.0 else { return Ok(()) };
        let start = start & !(SECTOR as usize - 1);
        let end = end.next_multiple_of(SECTOR as usize).min(bytes.len());
        file.write_at(from + start as u64, &bytes[start..end]).map_err(Error::io("repair a table"))
    }
}
