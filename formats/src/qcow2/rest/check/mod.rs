//! Checking a qcow2 image, and repairing what can be repaired.
//!
//! The model: everything in an image but the refcounts says which clusters it refers to (`scan.rs`).
//! What it says is right; the refcounts on disk are compared with it ([`disk`]). A refcount that is
//! too high is a *leak*, one that is too low a *corruption*, and so is an entry that points where
//! nothing can be. Last, the COPIED flags have to say where a refcount is 1 (`copied.rs`).
//!
//! Bounds: a 16-bit count for each cluster that is referred to, in pages taken as needed, at most
//! 256 MiB ([`refs`]); a list of L2 tables; pieces of tables. Holes are skipped. Each table is read
//! once however often it is referred to. What would take more is refused as a limit.
//!
//! The order of repair. Each step leaves the image no worse than it was, and is stable before the
//! next begins; repairing twice is the same as repairing once.
//!
//! 1. Unknown autoclear bits go. Misplaced clusters that hold no data become zeros.
//! 2. Refcounts that are too low are raised: nothing that is in use can be allocated any more.
//! 3. Those that are too high are lowered: nothing refers to what they counted.
//! 4. COPIED flags follow the refcounts.
//! 5. If nothing is wrong any more, the marks go: dirty, corrupt.
//!
//! Where the refcounts' own structure is broken (a block that is missing, misplaced or used for
//! something else), 2 and 3 are one step: new blocks and a new table are written behind everything
//! that is in use, the old ones included, and one write of the header's sector makes them the
//! image's (`rebuild.rs`). A table is written in place only if nothing else is in its cluster.

pub(crate) mod change;
mod copied;
pub mod disk;
mod rebuild;
pub mod refs;
mod scan;

use std::fmt;

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::qcow2::disk::header::{Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, SECTOR};
use crate::qcow2::disk::layout::Geometry;
use crate::qcow2::disk::snapshot_table;
use crate::qcow2::rest::open::{clear_unknown_autoclear, read_header, read_words, write_fields};
use disk::{Block, DiskRefs};
use refs::Refs;
use scan::{Before, Scan};

pub use crate::parts::report::{Event, Repair, Report, Unwatched, Watch};

/// At most this many entries of a refcount table may lead to a block that another one leads to.
const BLOCKS_TWICE_MAX: u64 = 1024;
/// At most this many clusters may be counted by such blocks.
const TWICE_MAX: u64 = 1 << 20;

/// Checks the image in `file`, and repairs it as told.
///
/// # Errors
///
/// [`Error::Limit`] for an image that takes more memory than we are ready to give; what
/// [`Header::parse`] and [`Header::check_tables`] say, but for a refcount table that is not there;
/// bad tables of snapshots and bitmaps; [`Error::Io`] for a failed write. A failed read of a table
/// is counted in the report instead.
pub fn check<F: Store>(file: &F, repair: Repair) -> Result<Report, Error> {
    check_watched(file, repair, &mut Unwatched)
}

/// As [`check`], with somebody who watches.
///
/// # Errors
///
/// The same.
pub fn check_watched<F: Store, W: Watch>(
    file: &F,
    repair: Repair,
    watch: &mut W,
) -> Result<Report, Error> {
    let (mut report, mut again) = check_once(file, repair, watch)?;
    for _ in 0..3 {
        if !again {
            break;
        }
        let (fixed, leaks_fixed) = (report.corruptions_fixed, report.leaks_fixed);
        (report, again) = check_once(file, repair, watch)?;
        report.corruptions_fixed += fixed;
        report.leaks_fixed += leaks_fixed;
    }
    Ok(report)
}

/// Answers also whether the repair has changed what it went by: a header that is taken for a table
/// as well.
fn check_once<F: Store, W: Watch>(
    file: &F,
    repair: Repair,
    watch: &mut W,
) -> Result<(Report, bool), Error> {
    let mut header = read_header(file)?;
    if !header.l1_can_be_read() {
        header.check_l1()?;
    }
    if repair != Repair::None {
        // Holes are believed to be zeros. Some file systems have told of holes where there was
        // data not yet written back.
        file.flush().map_err(Error::io("flush the image"))?;
        clear_unknown_autoclear(file, &mut header)?;
    }
    let salvage = repair == Repair::All;
    let (mut report, mut before, fixable) = scan(file, &header, None, salvage, watch)?;
    if repair == Repair::All && fixable > 0 {
        let (again, now, _) = scan(file, &header, Some(before), salvage, watch)?;
        (report, before) = (again, now);
        file.flush().map_err(Error::io("flush the repaired tables"))?;
    }
    let old_table = header.refcount_table_offset;
    let mut checker = Checker::new(file, header, before, report, watch)?;
    checker.refcount_structure()?;
    checker.compare(repair)?;
    checker.copied(repair)?;
    let moved = old_table != checker.header.refcount_table_offset;
    let again = moved && checker.before.refs.real(0) > 1;
    let Checker { mut report, header, before, .. } = checker;
    let errors = before.snapshots.errors();
    if salvage && errors > 0 && report.check_errors == 0 && report.corruptions == errors {
        change::put_snapshots(file, before.snapshots.list)?;
        watch.event(Event::Found(format_args!("Repairing the snapshot table")));
        report.corruptions = 0;
        report.corruptions_fixed += errors;
        if repair != Repair::None && report.is_sound() {
            unmark(file, read_header(file)?)?;
        }
        return Ok((report, again));
    }
    if repair != Repair::None && report.is_sound() {
        unmark(file, header)?;
    }
    Ok((report, again))
}

/// One walk over everything but the refcounts.
fn scan<F: Store, W: Watch>(
    file: &F,
    header: &Header,
    fix: Option<Before>,
    salvage: bool,
    watch: &mut W,
) -> Result<(Report, Before, u64), Error> {
    let geometry = header.geometry();
    let len = file.len().map_err(Error::io("find the image's length"))?;
    let mut scan = Scan {
        file,
        header,
        geometry,
        file_len: len.checked_next_multiple_of(SECTOR).unwrap_or(len),
        refs: Refs::new(geometry.refcount_max()),
        report: Report {
            total_clusters: header.disk_size().div_ceil(geometry.cluster_size()),
            image_end: geometry.cluster_size(),
            ..Report::default()
        },
        watch,
        active: Vec::new(),
        inactive: Vec::new(),
        fixable: 0,
        beyond: Vec::new(),
        fix,
        salvage,
        snapshots: snapshot_table::Table::default(),
        fixed: Vec::new(),
        again: 0,
    };
    scan.all()?;
    Ok(scan.before())
}

/// Nothing is wrong: takes the marks away.
fn unmark<F: Store>(file: &F, mut header: Header) -> Result<(), Error> {
    if header.incompatible & (INCOMPAT_DIRTY | INCOMPAT_CORRUPT) == 0 {
        return Ok(());
    }
    file.flush().map_err(Error::io("flush the image"))?;
    header.set_incompatible(INCOMPAT_DIRTY | INCOMPAT_CORRUPT, false);
    write_fields(file, &header)
}

/// The second half of a check: refcounts and flags.
struct Checker<'a, F, W> {
    file: &'a F,
    header: Header,
    geometry: Geometry,
    /// Clusters in the file.
    clusters: u64,
    /// What refers to what.
    before: Before,
    disk: DiskRefs<'a, F>,
    report: Report,
    /// Clusters that are counted by blocks that other entries of the refcount table name, too.
    twice: u64,
    watch: &'a mut W,
}

impl<'a, F: Store, W: Watch> Checker<'a, F, W> {
    fn new(
        file: &'a F,
        header: Header,
        before: Before,
        report: Report,
        watch: &'a mut W,
    ) -> Result<Self, Error> {
        let geometry = header.geometry();
        let len = file.len().map_err(Error::io("find the image's length"))?;
        let clusters = len.div_ceil(geometry.cluster_size());
        let table = if header.refcount_table_can_be_read() {
            read_table(file, &header)?
        } else {
            Vec::new()
        };
        let disk = DiskRefs::new(file, geometry, table);
        Ok(Checker { file, header, geometry, clusters, before, disk, report, twice: 0, watch })
    }

    fn wrong(&mut self, n: u64, what: fmt::Arguments<'_>) {
        self.report.corruptions += n;
        self.watch.event(Event::Found(what));
    }

    /// Counts refcount table and blocks, and looks whether they can be where they are.
    fn refcount_structure(&mut self) -> Result<(), Error> {
        let bits = self.geometry.cluster_bits();
        let table_at = self.header.refcount_table_offset;
        if !self.header.refcount_table_can_be_read() {
            self.wrong(1, format_args!("ERROR: no refcount table can be at {table_at:#x}"));
            self.report.needs_rebuild = true;
            return Ok(());
        }
        let table_end = table_at + self.header.refcount_table_bytes();
        if self.header.refcount_table_clusters > 0
            && table_end.div_ceil(1 << bits) > self.clusters + 1
        {
            self.wrong(1, format_args!("ERROR: the refcount table ends outside the image"));
            self.report.needs_rebuild = true;
        } else {
            for cluster in table_at >> bits..table_end >> bits {
                self.count(cluster)?;
            }
            self.before.fix_in_place(table_at >> bits..table_end >> bits);
        }
        let mut twice = 0;
        for i in 0..self.disk.table.len() as u64 {
            if self.disk.table[i as usize] & 0x1ff != 0 {
                self.wrong(1, format_args!("ERROR refcount table entry {i} has reserved bits set"));
                self.report.needs_rebuild = true;
                continue;
            }
            let at = match self.disk.block(i) {
                Block::None => continue,
                Block::Bad(at) if !self.geometry.is_aligned(at) => {
                    self.wrong(
                        1,
                        format_args!(
                            "ERROR refcount block {i} is not cluster aligned; refcount table \
                             entry corrupted"
                        ),
                    );
                    self.report.needs_rebuild = true;
                    continue;
                }
                Block::At(at) | Block::Bad(at) => at,
            };
            if at >> bits >= self.clusters {
                self.wrong(1, format_args!("ERROR refcount block {i} is outside image"));
                self.report.needs_rebuild = true;
                continue;
            }
            self.count(at >> bits)?;
            self.before.fix_in_place(at >> bits..(at >> bits) + 1);
            let count = self.before.refs.get(at >> bits);
            if count != 1 {
                self.wrong(1, format_args!("ERROR refcount block {i} refcount={count}"));
            }
            if self.before.refs.real(at >> bits) != 1 {
                self.report.needs_rebuild = true;
                twice += 1;
                if twice > BLOCKS_TWICE_MAX {
                    let what = "too many refcount blocks are used for something else as well";
                    return Err(Error::Limit(what.into()));
                }
            }
        }
        Ok(())
    }

    /// Counts a cluster of the refcounts' own.
    fn count(&mut self, cluster: u64) -> Result<(), Error> {
        let excess = self.before.refs.add(cluster, 1)?;
        if excess > 0 {
            let at = cluster << self.geometry.cluster_bits();
            self.wrong(excess, format_args!("ERROR: overflow cluster offset={at:#x}"));
        }
        Ok(())
    }

    /// Compares the refcounts with what was counted, and repairs them.
    fn compare(&mut self, repair: Repair) -> Result<(), Error> {
        self.visit(Pass::Count)?;
        if repair == Repair::All && self.report.needs_rebuild {
            self.watch.event(Event::Found(format_args!("Rebuilding refcount structure")));
            let found = self.report;
            let left = self.rebuild()?;
            self.report = Report {
                corruptions_fixed: found.corruptions_fixed
                    + found.corruptions.saturating_sub(left.corruptions),
                leaks_fixed: found.leaks,
                image_end: self.before.refs.end() << self.geometry.cluster_bits(),
                ..left
            };
            return Ok(());
        }
        // In blocks that something else is in, nothing is changed.
        if repair == Repair::None || self.report.needs_rebuild {
            return Ok(());
        }
        if repair == Repair::All {
            self.visit(Pass::Raise)?;
            self.disk.flush()?;
        }
        self.visit(Pass::Lower)?;
        self.disk.flush()
    }

    /// Goes over all clusters whose refcount is not what was counted.
    fn visit(&mut self, pass: Pass) -> Result<(), Error> {
        let end = self.clusters.max(self.before.refs.end());
        let per_block = 1u64 << self.geometry.block_bits();
        let with_blocks = (self.disk.table.len() as u64).saturating_mul(per_block).min(end);
        let mut start = 0;
        while start < with_blocks {
            let stop = (start + per_block).min(with_blocks);
            if pass == Pass::Count {
                let (done, total) = (start / per_block, with_blocks.div_ceil(per_block));
                self.watch.event(Event::Progress { done, total });
            }
            match self.disk.block(start / per_block) {
                Block::At(at) => {
                    let is_twice = self.before.refs.real(at >> self.geometry.cluster_bits()) > 1;
                    self.visit_block(pass, start, stop, is_twice)?;
                }
                Block::None => self.uncounted(pass, start, stop)?,
                Block::Bad(_) if pass == Pass::Count => self.lost(start, stop - start),
                Block::Bad(_) => {}
            }
            start = stop;
        }
        self.uncounted(pass, start, end)
    }

    /// Those from `start` to `stop`, which one block counts. What is neither counted nor referred to
    /// is skipped.
    fn visit_block(
        &mut self,
        pass: Pass,
        start: u64,
        stop: u64,
        is_twice: bool,
    ) -> Result<(), Error> {
        let mut at = start;
        let mut referred = self.before.refs.next(at, stop);
        while at < stop {
            if referred.is_some_and(|cluster| cluster < at) {
                referred = self.before.refs.next(at, stop);
            }
            let until = referred.unwrap_or(stop);
            let (cluster, count) = match self.disk.next(at, until) {
                Ok(None) if until == stop => return Ok(()),
                Ok(next) => {
                    let cluster = next.unwrap_or(until);
                    (cluster, self.disk.get(cluster))
                }
                Err(lost) => {
                    if pass == Pass::Count {
                        self.lost(lost.start, lost.end - lost.start);
                    }
                    at = lost.end;
                    continue;
                }
            };
            self.twice += u64::from(is_twice);
            if self.twice > TWICE_MAX {
                let what = "too many clusters are counted by blocks that are not theirs alone";
                return Err(Error::Limit(what.into()));
            }
            match count {
                Ok(count) => self.cluster(pass, cluster, count.unwrap_or_default())?,
                Err(_) if pass == Pass::Count => self.lost(cluster, 1),
                Err(_) => {}
            }
            at = cluster + 1;
        }
        Ok(())
    }

    /// Clusters whose refcount has no block to be in, and is 0.
    fn uncounted(&mut self, pass: Pass, start: u64, end: u64) -> Result<(), Error> {
        let mut at = start;
        while let Some(cluster) = self.before.refs.next(at, end) {
            self.report.needs_rebuild = true;
            self.cluster(pass, cluster, 0)?;
            at = cluster + 1;
        }
        Ok(())
    }

    /// Refcounts that are nowhere to be found.
    fn lost(&mut self, cluster: u64, n: u64) {
        self.report.check_errors += n;
        self.report.needs_rebuild = true;
        let what = format_args!("Can't get refcount for cluster {cluster}, of {n}");
        self.watch.event(Event::Found(what));
    }

    /// One cluster, with its refcount on disk.
    fn cluster(&mut self, pass: Pass, cluster: u64, count: u64) -> Result<(), Error> {
        let counted = self.before.refs.get(cluster);
        if pass == Pass::Count && (count > 0 || counted > 0) {
            self.report.image_end = (cluster + 1) << self.geometry.cluster_bits();
        }
        let says = match pass {
            _ if count == counted => return Ok(()),
            Pass::Count if count < counted => {
                self.report.corruptions += 1;
                "ERROR"
            }
            Pass::Count => {
                self.report.leaks += 1;
                "Leaked"
            }
            Pass::Raise if count < counted => {
                self.report.corruptions -= 1;
                self.report.corruptions_fixed += 1;
                "Repairing"
            }
            Pass::Lower if count > counted => {
                self.report.leaks -= 1;
                self.report.leaks_fixed += 1;
                "Repairing"
            }
            Pass::Raise | Pass::Lower => return Ok(()),
        };
        self.watch.event(Event::Found(format_args!(
            "{says} cluster {cluster} refcount={count} reference={counted}"
        )));
        if pass == Pass::Count { Ok(()) } else { self.disk.set(cluster, counted) }
    }
}

/// What is done with refcounts that are wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pass {
    /// They are reported.
    Count,
    /// Those that are too low are raised.
    Raise,
    /// Those that are too high are lowered.
    Lower,
}

/// The refcount table; none if the header says that there is none.
fn read_table<F: Store>(file: &F, header: &Header) -> Result<Vec<u64>, Error> {
    let entries = header.refcount_table_bytes() as usize / 8;
    read_words(file, header.refcount_table_offset, entries, "read the refcount table")
}
