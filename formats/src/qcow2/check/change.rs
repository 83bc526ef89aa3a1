//! Changing what an image refers to, in one step: for snapshots, and for space taken ahead.
//!
//! The model: what is new is written into clusters that nothing uses. Then there is a header that
//! refers to it, in memory, and the walk of a check over *that* header says what every refcount
//! will have to be. Nothing that a crash leaves may be worse than a leak, so:
//!
//! 1. The image is marked as dirty, if its version has the mark: whoever opens it after a crash
//!    repairs it first. It has to be sound to begin with.
//! 2. What is new is written and made stable. Nobody refers to it yet.
//! 3. COPIED flags go where the refcount will not be 1, and are stable before
//! 4. refcounts that will be higher are raised, and are stable before
//! 5. the header is written: one sector, the only moment at which anything changes.
//! 6. A repair lowers the refcounts that are too high now, sets the COPIED flags that may be set,
//!    and takes the mark away.
//!
//! Before 5 the image is the old one, with leaks and with flags that cost a copy; after it the new
//! one, likewise. Where a refcount has no block to be in, 4 and 5 are one: the structure is built
//! anew and the same sector of the header points at it.

use cowbell_engine::store::Store;

use super::disk::Block;
use super::{Checker, Pass, Repair, Unwatched, check, scan};
use crate::error::Error;
use crate::qcow2::header::{Header, INCOMPAT_DIRTY};
use crate::qcow2::layout::HOST_MAX;
use crate::qcow2::open::{clear_unknown_autoclear, read_header, write_fields};

/// Room for what is new.
pub(crate) struct Room<'a, F> {
    checker: Checker<'a, F, Unwatched>,
}

impl<F: Store> Room<'_, F> {
    /// Writes `bytes` into clusters that nothing uses; answers where they are. 0 for no bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<u64, Error> {
        let size = self.checker.geometry.cluster_size();
        if bytes.is_empty() {
            return Ok(0);
        }
        let count = (bytes.len() as u64).div_ceil(size);
        let first = self.take(count)?;
        let mut padded = bytes.to_vec();
        padded.resize((count * size) as usize, 0);
        let file = self.checker.file;
        file.write_at(first * size, &padded).map_err(Error::io("write a table"))?;
        Ok(first * size)
    }

    /// Makes the file longer by `count` clusters, which read as zeros; answers where they are.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`]; [`Error::Io`].
    pub(crate) fn at_end(&mut self, count: u64) -> Result<u64, Error> {
        let checker = &mut self.checker;
        let size = checker.geometry.cluster_size();
        let len = checker.file.len().map_err(Error::io("find the image's length"))?;
        let first = len.div_ceil(size).max(checker.before.refs.end());
        let end = first.checked_add(count).and_then(|end| end.checked_mul(size));
        let end = end.filter(|&end| end <= HOST_MAX);
        let end = end.ok_or_else(|| Error::Limit("the image would be too large".into()))?;
        for cluster in first..first + count {
            checker.before.refs.add(cluster, 1)?;
        }
        checker.file.set_len(end).map_err(Error::io("set the image's length"))?;
        Ok(first * size)
    }

    /// The first `count` clusters in a row that nothing refers to and no refcount counts.
    fn take(&mut self, count: u64) -> Result<u64, Error> {
        let checker = &mut self.checker;
        let used = checker.report.image_end >> checker.geometry.cluster_bits();
        let end = used.max(checker.before.refs.end());
        let (mut first, mut at) = (1, 1);
        // Behind the end all is free.
        while at < end && at - first < count {
            let index = at >> checker.geometry.block_bits();
            let is_free = checker.before.refs.real(at) == 0
                && (checker.disk.block(index) == Block::None || checker.disk.get(at)? == Some(0));
            at += 1;
            if !is_free {
                first = at;
            }
        }
        for cluster in first..first + count {
            checker.before.refs.add(cluster, 1)?;
        }
        Ok(first)
    }
}

/// Changes the image in `file` to what `build` makes of its header, with what it puts into the
/// room that it is given.
///
/// # Errors
///
/// [`Error::Corrupt`] if the image is not sound; what `build` says; [`Error::Limit`] if the image's
/// refcounts cannot count that high; [`Error::Io`].
pub(crate) fn change<F: Store>(
    file: &F,
    build: impl FnOnce(Header, &mut Room<'_, F>) -> Result<Header, Error>,
) -> Result<(), Error> {
    let repair = if read_header(file)?.is_dirty() { Repair::All } else { Repair::None };
    if !check(file, repair)?.is_sound() {
        let what = "the image has errors: repair it first";
        return Err(Error::Corrupt { what, at: 0 });
    }
    let mut header = read_header(file)?;
    header.check_tables()?;
    clear_unknown_autoclear(file, &mut header)?;
    if header.version > 2 {
        header.set_incompatible(INCOMPAT_DIRTY, true);
        write_fields(file, &header)?;
    }
    let changed = make(file, header, build);
    // Also after a failure: what was begun are leaks now. The first error is the one to report.
    let repaired = check(file, Repair::All);
    changed?;
    if !repaired?.is_sound() {
        let what = "the image has errors after the change";
        return Err(Error::Corrupt { what, at: 0 });
    }
    Ok(())
}

fn make<F: Store>(
    file: &F,
    header: Header,
    build: impl FnOnce(Header, &mut Room<'_, F>) -> Result<Header, Error>,
) -> Result<(), Error> {
    let (report, before, _) = scan(file, &header, None, &mut Unwatched)?;
    let mut watch = Unwatched;
    let mut checker = Checker::new(file, header.clone(), before, report, &mut watch)?;
    checker.refcount_structure()?;
    checker.visit(Pass::Count)?;
    let next = build(header, &mut Room { checker })?;
    file.flush().map_err(Error::io("flush the new tables"))?;

    let (report, before, _) = scan(file, &next, None, &mut Unwatched)?;
    if report.corruptions > 0 {
        let bits = 1 << next.refcount_order;
        return Err(Error::Limit(format!("refcounts of {bits} bits cannot count that high")));
    }
    let mut checker = Checker::new(file, next, before, report, &mut watch)?;
    checker.refcount_structure()?;
    checker.visit(Pass::Count)?;
    checker.clear_copied()?;
    if checker.report.needs_rebuild {
        return checker.rebuild().map(|_| ());
    }
    checker.visit(Pass::Raise)?;
    checker.disk.flush()?;
    write_fields(file, &checker.header)
}
