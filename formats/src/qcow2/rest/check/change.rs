//! Changing what an image refers to, in one step: for snapshots, for space taken ahead, for bitmaps.
//!
//! The model: whatever is to be different is written into clusters that nothing uses. Nothing that
//! the image refers to is touched. Then one write of one sector of its header makes it the new
//! image. So a crash leaves the old image or the new one, each as sound as a check can find it, and
//! at worst a file that is longer than it has to be.
//!
//! 1. Tables are written by who wants the change, who answers with a header that refers to them.
//! 2. The walk of a check over *that* header says what every refcount has to be.
//! 3. A COPIED flag and the refcount that it speaks of are in different sectors, so that neither can
//!    change in place: an L2 table with flags that have to change is copied, and so is the L1 table.
//! 4. The refcounts are written anew, blocks and table: what is new is counted, what was before is
//!    not.
//! 5. All that is made stable. Then the header is written.
//!
//! What it costs: the room of the tables that change and of all refcounts, until the next change can
//! have that of those before. They may lie anywhere in the file, so that a device has room for them.

use std::collections::BTreeMap;

use cowbell_engine::mutant;
use cowbell_engine::store::Store;
use cowbell_engine::units::Errno;

use super::copied::{COPIED, OFFSET, with_flag};
use super::refs::Refs;
use super::scan::Before;
use super::{Checker, Pass, Repair, Unwatched, check, scan};
use crate::error::Error;
use crate::qcow2::disk::header::{Header, REFTABLE_BYTES_MAX, u64_at};
use crate::qcow2::disk::layout::{Geometry, HOST_MAX};
use crate::qcow2::disk::snapshot_table::{Snapshot, encode};
use crate::qcow2::rest::open::{clear_unknown_autoclear, read_header, read_words, write_fields};

/// Room for what is new.
pub(crate) struct Room<'a, F> {
    checker: Checker<'a, F, Unwatched>,
    /// The file's length before the change, in bytes.
    len: u64,
    /// Clusters below this one are taken.
    cursor: u64,
    /// What was taken: first clusters, and how many.
    taken: BTreeMap<u64, u64>,
    /// The L1 tables among it: offsets and entries.
    l1_tables: Vec<(u64, u64)>,
}

/// A run of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Its first byte.
    pub at: u64,
    /// Clusters.
    pub count: u64,
    /// They read as zeros.
    pub is_zero: bool,
}

impl<'a, F: Store> Room<'a, F> {
    /// Writes `bytes` into clusters that nothing uses; answers where they are. 0 for no bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<u64, Error> {
        let size = self.size();
        if bytes.is_empty() {
            return Ok(0);
        }
        let count = (bytes.len() as u64).div_ceil(size);
        let at = self.take(count)? * size;
        let mut padded = bytes.to_vec();
        padded.resize((count * size) as usize, 0);
        self.file().write_at(at, &padded).map_err(Error::io("write a table"))?;
        Ok(at)
    }

    /// As [`put`](Self::put), for an L1 table: a copy of one of the image's, or a new one. Its flags
    /// are set later.
    pub(crate) fn put_l1(&mut self, l1: &[u64]) -> Result<u64, Error> {
        let words: Vec<u64> = l1.iter().map(|entry| entry & !COPIED).collect();
        let at = self.put(&bytes_of(&words))?;
        self.l1_tables.push((at, l1.len() as u64));
        Ok(at)
    }

    /// Clusters for data, at most `max` of them in a row: at the file's end, where they read as zeros,
    /// if it can grow, and else anywhere.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`]; [`Error::Io`], also if there is no space.
    pub(crate) fn take_data(&mut self, max: u64) -> Result<Run, Error> {
        let size = self.size();
        let end = self.end().max(self.len.div_ceil(size));
        let bytes = end.checked_add(max).and_then(|end| end.checked_mul(size));
        let bytes = bytes.filter(|&end| end <= HOST_MAX);
        let bytes = bytes.ok_or_else(|| Error::Limit("the image would be too large".into()))?;
        let now = self.file().len().map_err(Error::io("find the image's length"))?;
        if bytes <= now || self.file().set_len(bytes).is_ok() {
            self.occupy(end, max)?;
            let is_zero = end * size >= self.len;
            return Ok(Run { at: end * size, count: max, is_zero });
        }
        let first = self.take(1)?;
        let mut count = 1;
        while count < max && first + count < self.end() && self.is_free(first + count)? {
            count += 1;
        }
        // Behind all that is in use, as far as there is a file.
        if first + count >= self.end() {
            let there = (now / size).saturating_sub(first);
            count = max.min(there);
        }
        if count == 0 {
            return Err(Error::io("take space")(Errno::NO_SPACE.into()));
        }
        self.occupy(first + 1, count - 1)?;
        self.cursor = self.cursor.max(first + count);
        Ok(Run { at: first * size, count, is_zero: false })
    }

    /// What is left of a run of clusters for data is not needed. At the file's end, it is cut off.
    pub(crate) fn give_back(&mut self, rest: Run) {
        if rest.count == 0 {
            return;
        }
        let first = rest.at >> self.checker.geometry.cluster_bits();
        if let Some((_, count)) = self.taken.range_mut(..=first).next_back() {
            *count -= rest.count;
        }
        self.checker.before.refs.forget(first..first + rest.count);
        let end = self.end() * self.size();
        if self.file().len().is_ok_and(|len| len > end) && end > self.len {
            // It is longer than it has to be, at worst.
            let _ = self.file().set_len(end);
        }
    }

    fn file(&self) -> &'a F {
        self.checker.file
    }

    fn size(&self) -> u64 {
        self.checker.geometry.cluster_size()
    }

    /// One past the last cluster that is used or counted.
    fn end(&self) -> u64 {
        let counted = self.checker.report.image_end >> self.checker.geometry.cluster_bits();
        counted.max(self.checker.before.refs.end())
    }

    fn is_free(&mut self, cluster: u64) -> Result<bool, Error> {
        Ok(self.checker.before.refs.real(cluster) == 0
            && self.checker.disk.get(cluster)? == Some(0))
    }

    fn occupy(&mut self, first: u64, count: u64) -> Result<(), Error> {
        for cluster in first..first + count {
            self.checker.before.refs.add(cluster, 1)?;
        }
        self.taken.insert(first, count);
        Ok(())
    }

    /// The first `count` clusters in a row that nothing refers to and no refcount counts.
    fn take(&mut self, count: u64) -> Result<u64, Error> {
        let end = self.end();
        let mut first = self.cursor;
        let mut is_first = true;
        loop {
            match self.next_used(first, end)? {
                // Behind the end all is free.
                None => break,
                Some(used) if used - first >= count => break,
                Some(used) => {
                    if is_first && used == first {
                        self.cursor = used + 1;
                    } else {
                        is_first = false;
                    }
                    first = used + 1;
                }
            }
        }
        if first == self.cursor {
            self.cursor = first + count;
        }
        self.occupy(first, count)?;
        Ok(first)
    }

    /// The first cluster from `from` on that is used or counted.
    fn next_used(&mut self, from: u64, end: u64) -> Result<Option<u64>, Error> {
        let referred = self.checker.before.refs.next(from, end);
        let end = referred.unwrap_or(end);
        let bits = self.checker.geometry.block_bits();
        let mut at = from;
        while at < end {
            let index = at >> bits;
            let stop = if index < self.checker.disk.table.len() as u64 {
                ((index + 1) << bits).min(end)
            } else {
                end
            };
            match self.checker.disk.next(at, stop) {
                Ok(None) => at = stop,
                Ok(Some(cluster)) => return Ok(Some(cluster)),
                Err(lost) => return Ok(Some(lost.start)),
            }
        }
        Ok(referred)
    }

    fn is_taken(&self, at: u64) -> bool {
        let cluster = at >> self.checker.geometry.cluster_bits();
        let before = self.taken.range(..=cluster).next_back();
        before.is_some_and(|(first, count)| cluster - first < *count)
    }
}

/// Changes the image in `file` to what `build` makes of its header, with what it puts into the
/// room that it is given.
///
/// # Errors
///
/// [`Error::Corrupt`] if the image is not sound; what `build` says; [`Error::Limit`] if the image's
/// refcounts cannot count that high; [`Error::Io`]. The image is then what it was.
pub(crate) fn change<F: Store>(
    file: &F,
    build: impl FnOnce(Header, &mut Room<'_, F>) -> Result<Header, Error>,
) -> Result<(), Error> {
    if read_header(file)?.is_dirty() && !check(file, Repair::All)?.is_sound() {
        return Err(not_sound());
    }
    change_read(file, false, build)
}

/// Puts this snapshot table in the place of one that breaks bounds: the end of a repair.
pub(super) fn put_snapshots<F: Store>(file: &F, list: Vec<Snapshot>) -> Result<(), Error> {
    change_read(file, true, |header, room| with_snapshots(header, room, &list))
}

/// The header with these snapshots.
pub(crate) fn with_snapshots<F: Store>(
    mut header: Header,
    room: &mut Room<'_, F>,
    list: &[Snapshot],
) -> Result<Header, Error> {
    header.snapshots_offset = room.put(&encode(list, header.disk_size())?)?;
    header.snapshot_count = list.len() as u32;
    Ok(header)
}

fn not_sound() -> Error {
    Error::Corrupt { what: "the image has errors: repair it first", at: 0 }
}

fn change_read<F: Store>(
    file: &F,
    salvage: bool,
    build: impl FnOnce(Header, &mut Room<'_, F>) -> Result<Header, Error>,
) -> Result<(), Error> {
    let mut header = read_header(file)?;
    let mut watch = Unwatched;
    let checker = sound(file, &header, salvage, &mut watch)?;
    clear_unknown_autoclear(file, &mut header)?;
    let len = file.len().map_err(Error::io("find the image's length"))?;
    let (taken, l1_tables) = Default::default();
    let mut room = Room { checker, len, cursor: 1, taken, l1_tables };
    match make(file, &header, &mut room, build) {
        Ok(next) => write_header(file, &header, &next),
        Err(why) => {
            // What there is no room for is not kept. Nothing refers to it, come what may.
            let _ = file.set_len(len);
            Err(why)
        }
    }
}

/// Would [`change`] take the image as it is?
///
/// # Errors
///
/// As [`change`].
pub(crate) fn check_sound<F: Store>(file: &F) -> Result<(), Error> {
    sound(file, &read_header(file)?, false, &mut Unwatched).map(|_| ())
}

/// What a check knows of the image, which is sound.
fn sound<'a, F: Store>(
    file: &'a F,
    header: &Header,
    salvage: bool,
    watch: &'a mut Unwatched,
) -> Result<Checker<'a, F, Unwatched>, Error> {
    if !salvage {
        header.check_tables()?;
    }
    // Holes are believed to be zeros: what was written has to be there.
    file.flush().map_err(Error::io("flush the image"))?;
    let (report, before, _) = scan(file, header, None, salvage, &mut Unwatched)?;
    let mut checker = Checker::new(file, header.clone(), before, report, watch)?;
    checker.refcount_structure()?;
    checker.visit(Pass::Count)?;
    checker.copied(Repair::None)?;
    // Entries that old programs wrote are no reason to refuse.
    let snapshots = &checker.before.snapshots;
    let known = if salvage { snapshots.errors() } else { snapshots.incomplete.len() as u64 };
    if checker.report.check_errors > 0 || checker.report.corruptions > known {
        return Err(not_sound());
    }
    Ok(checker)
}

/// The one write that changes the image. An extension may be in another sector than the fields: then
/// they go first, with refcounts for both.
fn write_header<F: Store>(file: &F, old: &Header, next: &Header) -> Result<(), Error> {
    write_fields(file, next)?;
    if let Some((at, sector)) = next.extension_sector(old) {
        file.write_at(at, sector).map_err(Error::io("write the header"))?;
        file.flush().map_err(Error::io("flush the header"))?;
        check(file, Repair::Leaks)?;
    }
    Ok(())
}

/// Everything but the header, stably.
fn make<'a, F: Store>(
    file: &'a F,
    header: &Header,
    room: &mut Room<'a, F>,
    build: impl FnOnce(Header, &mut Room<'a, F>) -> Result<Header, Error>,
) -> Result<Header, Error> {
    let mut next = build(header.clone(), room)?;
    let mut refs = set_flags(file, &mut next, room)?;
    if next.extension_sector(header).is_some() {
        keep_old(&mut refs, &count(file, header)?.refs)?;
    }
    put_refcounts(&mut next, room, refs)?;
    if !mutant!("qcow2_change_not_fenced") {
        file.flush().map_err(Error::io("flush the new tables"))?;
    }
    Ok(next)
}

/// Every reference there will be.
fn count<F: Store>(file: &F, next: &Header) -> Result<Before, Error> {
    file.flush().map_err(Error::io("flush the new tables"))?;
    let (report, after, _) = scan(file, next, None, false, &mut Unwatched)?;
    if report.corruptions > after.snapshots.incomplete.len() as u64 {
        let bits = 1 << next.refcount_order;
        return Err(Error::Limit(format!("refcounts of {bits} bits cannot count that high")));
    }
    Ok(after)
}

/// Counts at least what `old` counts.
fn keep_old(refs: &mut Refs, old: &Refs) -> Result<(), Error> {
    let (mut at, end) = (0, old.end());
    while let Some(cluster) = old.next(at, end) {
        let missing = old.real(cluster).saturating_sub(refs.real(cluster));
        if missing > 0 {
            refs.add(cluster, missing)?;
        }
        at = cluster + 1;
    }
    Ok(())
}

/// The flags of the active tables say what the refcounts will be. Answers these.
fn set_flags<F: Store>(file: &F, next: &mut Header, room: &mut Room<'_, F>) -> Result<Refs, Error> {
    let mut after = count(file, next)?;
    let geometry = next.geometry();
    if geometry.has_data_file() {
        let old = read_words(file, next.l1_offset, next.l1_size as usize, "read the L1 table")?;
        let moved = set_l1_flags(file, next, room, &after.refs, old)?;
        return if moved { Ok(count(file, next)?.refs) } else { Ok(after.refs) };
    }
    // Tables of the image that are shared by what is new are copied once for all of that.
    let mut moved = BTreeMap::new();
    let mut bytes = vec![0; geometry.cluster_size() as usize];
    for &(table, _) in &after.active {
        if table == 0 {
            continue;
        }
        file.read_at(table, &mut bytes).map_err(Error::io("read an L2 table"))?;
        if !set_l2_flags(&mut bytes, &after.refs, geometry) || mutant!("qcow2_flags_stay") {
            continue;
        }
        if room.is_taken(table) || mutant!("qcow2_flags_in_place") {
            file.write_at(table, &bytes).map_err(Error::io("write an L2 table"))?;
        } else {
            moved.insert(table, room.put(&bytes)?);
        }
    }
    let mut l1 = read_words(file, next.l1_offset, next.l1_size as usize, "read the L1 table")?;
    if !moved.is_empty() {
        if !room.is_taken(next.l1_offset) {
            next.l1_offset = room.put_l1(&l1)?;
        }
        for (at, entries) in room.l1_tables.clone() {
            let mut table = read_words(file, at, entries as usize, "read an L1 table")?;
            for entry in &mut table {
                if let Some(&to) = moved.get(&(*entry & OFFSET)) {
                    *entry = *entry & !OFFSET | to;
                }
            }
            file.write_at(at, &bytes_of(&table)).map_err(Error::io("write an L1 table"))?;
            if at == next.l1_offset {
                l1 = table;
            }
        }
        after = count(file, next)?;
    }
    let moved = set_l1_flags(file, next, room, &after.refs, l1)?;
    if moved { Ok(count(file, next)?.refs) } else { Ok(after.refs) }
}

/// Likewise, those of the L1 table. True: it has moved.
fn set_l1_flags<F: Store>(
    file: &F,
    next: &mut Header,
    room: &mut Room<'_, F>,
    refs: &Refs,
    mut l1: Vec<u64>,
) -> Result<bool, Error> {
    let bits = next.cluster_bits;
    let mut is_changed = false;
    for entry in l1.iter_mut().filter(|entry| **entry & OFFSET != 0) {
        let flagged = with_flag(*entry, refs.get((*entry & OFFSET) >> bits) == 1);
        is_changed |= flagged != *entry;
        *entry = flagged;
    }
    if is_changed && !room.is_taken(next.l1_offset) {
        next.l1_offset = room.put_l1(&l1)?;
        return Ok(true);
    }
    if is_changed {
        let done = file.write_at(next.l1_offset, &bytes_of(&l1));
        done.map_err(Error::io("write the L1 table"))?;
    }
    Ok(false)
}

/// True: something is different now.
fn set_l2_flags(bytes: &mut [u8], refs: &Refs, geometry: Geometry) -> bool {
    const COMPRESSED: u64 = 1 << 62;
    let mut is_changed = false;
    for at in (0..bytes.len()).step_by(1 << geometry.entry_bits()) {
        let entry = u64_at(bytes, at);
        if entry & COMPRESSED != 0 || entry & OFFSET == 0 {
            continue;
        }
        let is_alone = refs.get((entry & OFFSET) >> geometry.cluster_bits()) == 1;
        if is_alone != (entry & COPIED != 0) {
            bytes[at..at + 8].copy_from_slice(&with_flag(entry, is_alone).to_be_bytes());
            is_changed = true;
        }
    }
    is_changed
}

/// Writes new refcounts: blocks that count `refs`, and themselves, and a table that leads to them.
fn put_refcounts<F: Store>(
    next: &mut Header,
    room: &mut Room<'_, F>,
    mut refs: Refs,
) -> Result<(), Error> {
    let (geometry, size) = (next.geometry(), next.cluster_size());
    let bits = geometry.block_bits();
    // Index and cluster of each block.
    let mut blocks: BTreeMap<u64, u64> = BTreeMap::new();
    let mut table = (0, 0);
    loop {
        let (mut at, end) = (0, refs.end());
        let mut is_new = false;
        while let Some(cluster) = refs.next(at, end) {
            let index = cluster >> bits;
            if let std::collections::btree_map::Entry::Vacant(entry) = blocks.entry(index) {
                let cluster = room.take(1)?;
                entry.insert(cluster);
                refs.add(cluster, 1)?;
                is_new = true;
            }
            at = (index + 1) << bits;
        }
        let entries = blocks.last_key_value().map_or(1, |(index, _)| index + 1);
        let clusters = (entries * 8).div_ceil(size);
        if clusters * size > REFTABLE_BYTES_MAX {
            return Err(Error::Limit("the image would be too large for its refcounts".into()));
        }
        if clusters > table.1 {
            // A shorter one that was taken before stays free.
            table = (room.take(clusters)?, clusters);
            is_new = true;
        }
        let own = table.0 >> bits..=(table.0 + table.1 - 1) >> bits;
        for index in own {
            if let std::collections::btree_map::Entry::Vacant(entry) = blocks.entry(index) {
                let cluster = room.take(1)?;
                entry.insert(cluster);
                refs.add(cluster, 1)?;
                is_new = true;
            }
        }
        if !is_new {
            break;
        }
    }
    for cluster in table.0..table.0 + table.1 {
        refs.add(cluster, 1)?;
    }
    let mut words = vec![0; (table.1 * size / 8) as usize];
    let mut bytes = vec![0; size as usize];
    for (&index, &cluster) in &blocks {
        words[index as usize] = cluster * size;
        bytes.fill(0);
        let start = index << bits;
        let (mut at, end) = (start, start + (1 << bits));
        while let Some(cluster) = refs.next(at, end) {
            geometry.set_refcount(&mut bytes, (cluster - start) as usize, refs.get(cluster));
            at = cluster + 1;
        }
        room.file()
            .write_at(cluster * size, &bytes)
            .map_err(Error::io("write a refcount block"))?;
    }
    let done = room.file().write_at(table.0 * size, &bytes_of(&words));
    done.map_err(Error::io("write the refcount table"))?;
    next.refcount_table_offset = table.0 * size;
    next.refcount_table_clusters = table.1 as u32;
    Ok(())
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}
