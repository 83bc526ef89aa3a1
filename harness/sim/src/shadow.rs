//! The oracle: what every byte may be, to a reader now and after a crash.
//!
//! # The model
//! The disk is cut into *cells* at every border of every request of the workload, so that a
//! request covers a cell or does not. Each cell keeps two sets of writers (bits of a word; bit 0
//! is what was there before):
//! - `live`: whose bytes a read may return now;
//! - `crash`: whose bytes may be there after a crash.
//!
//! A write joins both sets when it is submitted. When it has succeeded, all that had ended before
//! it was submitted leave `live`: what it overlapped with in time stays, for either may have been
//! the last. A write that failed stays in both until another overwrites it. A flush that has
//! succeeded takes from `crash` whatever was not live when it was *submitted*; a write that must be
//! stable takes away all that had ended before it. A read may return what was live at any moment
//! between its submission and its end. A discard may or may not have happened, until it is read;
//! who read a cell that nobody is changing, and that no failed write left in doubt, has settled
//! what is there.
//!
//! Each sector of a cell is judged by itself: writes tear.
//!
//! The disk's size is a cell of its own, behind all others. Setting it writes that cell, and zeros
//! to whatever lies behind the new end.
//!
//! # Copies
//! A job that copies another disk to this one is a write of each cell for as long as it runs. What it
//! writes is what the source may have held at any moment of that: the bits of *its* live writers. When
//! it has ended well, all that had ended before it began is gone, after a crash too; if it has failed,
//! anything may be there. The disk beside has a shadow of its own, cut as this one is; two bits are
//! kept for what it had before and for what its guest writes.

use crate::shared::Shared as Rc;
use std::hash::{Hash, Hasher};
use std::ops::Range;

use cowbell_engine::status::Status;
use cowbell_engine::step::IoKind;

use crate::disk::{Contents, SECTOR, Sector, fixed_hash};
use crate::verdicts::Verdict;
use crate::workload::{Request, Workload, pattern};

/// A set of writers: bit 0 is what was there before, bit n + 1 request number n.
pub type Writers = u64;

const BEFORE: Writers = 1;

/// What the disk beside had before, and what its guest writes there: two writers that are no requests
/// of this disk's.
pub const OTHERS: usize = 61;
/// See [`OTHERS`].
pub const OTHERS_WRITE: usize = 62;

/// The disk beside, whose bytes may come to be on this one, or this one's on that.
pub struct Other<'a> {
    /// Its size in bytes.
    pub size: u64,
    /// What is there before anything happens.
    pub before: &'a dyn Fn(u64, &mut [u8]),
    /// What its guest writes.
    pub write: Request,
    /// The number with whose pattern it does so.
    pub tag: usize,
}

impl std::fmt::Debug for Other<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes, and {}", self.size, self.write)
    }
}

impl Other<'_> {
    fn known(&self, start: u64, bytes: &mut [u8], written: bool) {
        let end = start + bytes.len() as u64;
        if written && self.write.offset <= start && end <= self.write.end() {
            pattern(self.tag, start, bytes);
        } else if end <= self.size {
            (self.before)(start, bytes);
        } else {
            bytes.fill(0);
        }
    }
}

fn writer(which: usize) -> Writers {
    2 << which
}

/// A part of a sector that lies in one cell.
#[derive(Clone, Debug)]
struct Piece {
    cell: usize,
    start: u64,
    end: u64,
    /// Whose bytes have which hash.
    known: Vec<(u64, Writers)>,
}

/// How a disk is cut, and what each writer's bytes look like. The same for all worlds of a
/// workload.
#[derive(Clone, Debug)]
pub struct Cut {
    cells: Vec<Range<u64>>,
    pieces: Vec<Piece>,
    /// Who sets which size.
    sizes: Vec<(u64, Writers)>,
    /// A size may be found rounded up to a multiple of this.
    size_unit: u64,
}

impl Cut {
    /// Cuts the clusters of `cluster` bytes that `workload` touches on a disk of `size` bytes, and
    /// the first and the last of what the disk gains; `before` tells what is there. A size may be found rounded
    /// up to a multiple of `size_unit`. Where something is copied, `copied` are the parts that are looked at besides; `None`: with
    /// another disk, all of both.
    pub fn new(
        workload: &Workload,
        cluster: u64,
        (size, size_unit): (u64, u64),
        before: impl Fn(u64, &mut [u8]),
        other: Option<&Other<'_>>,
        copied: Option<&[Range<u64>]>,
    ) -> Cut {
        let ranged = || workload.requests.iter().filter(|request| request.len > 0);
        let largest = workload.largest_size(size).max(other.map_or(0, |other| other.size));
        let around = |start: u64, end: u64| {
            start / cluster * cluster..end.next_multiple_of(cluster).min(largest)
        };
        let mut clusters: Vec<Range<u64>> =
            ranged().map(|request| around(request.offset, request.end())).collect();
        let mut borders: Vec<u64> = Vec::new();
        let mut sizes = vec![(size, BEFORE)];
        for (which, request) in workload.requests.iter().enumerate() {
            if request.kind == IoKind::Truncate {
                let at = request.offset.min(size);
                clusters.push(around(at.saturating_sub(1), at + 1));
                clusters.push(around(request.offset.saturating_sub(1), request.offset));
                borders.extend([request.offset, size]);
                sizes.push((request.offset, writer(which)));
            }
        }
        match copied {
            Some(parts) => {
                clusters.extend(parts.iter().map(|part| part.start..part.end.min(largest)))
            }
            None => clusters.extend(other.map(|_| 0..largest)),
        }
        if let Some(other) = other {
            borders.extend([other.write.offset, other.write.end(), other.size, size]);
        }
        for range in &clusters {
            borders.extend((range.start..range.end).step_by(cluster as usize));
            borders.push(range.end);
        }
        for request in ranged() {
            borders.extend([request.offset, request.end()]);
            if request.kind == IoKind::Discard {
                // Only whole sectors, or whole clusters, of what is discarded may change.
                for unit in [SECTOR, cluster] {
                    let last = whole_end(request, unit, &sizes);
                    borders.extend([request.offset.next_multiple_of(unit), last]);
                }
            }
        }
        borders.sort_unstable();
        borders.dedup();
        let inside = |cell: &Range<u64>| {
            clusters.iter().any(|range| range.start <= cell.start && cell.end <= range.end)
        };
        let cells: Vec<Range<u64>> =
            borders.windows(2).map(|pair| pair[0]..pair[1]).filter(inside).collect();
        let mut pieces = Vec::new();
        for (index, cell) in cells.iter().enumerate() {
            // All at once: what is compressed is inflated once.
            let mut there = vec![0; (cell.end - cell.start) as usize];
            if cell.start < size {
                before(cell.start, &mut there);
            }
            let mut start = cell.start;
            while start < cell.end {
                let end = cell.end.min((start / SECTOR + 1) * SECTOR);
                let there = &there[(start - cell.start) as usize..(end - cell.start) as usize];
                let known = known_bytes(workload, start, there, other);
                pieces.push(Piece { cell: index, start, end, known });
                start = end;
            }
        }
        Cut { cells, pieces, sizes, size_unit }
    }

    /// The stretches of the disk that are looked at, neighbouring cells joined.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for cell in &self.cells {
            match ranges.last_mut() {
                Some(last) if last.end == cell.start => last.end = cell.end,
                _ => ranges.push(cell.clone()),
            }
        }
        ranges
    }

    /// Whose bytes the disk in `files` holds, piece by piece, as an examination has found it.
    pub fn found(&self, verdict: &Verdict, files: &[Contents]) -> Found {
        let mut bytes = [0; SECTOR as usize];
        let writers = |piece: &Piece| {
            let (place, until) = verdict.locate(piece.start, files.len());
            assert!(piece.end <= until, "what is where changes at whole sectors");
            let Some((file, at)) = place else { return piece.writers_of(0) };
            let len = (piece.end - piece.start) as usize;
            if len == SECTOR as usize && at.is_multiple_of(SECTOR) {
                return piece.writers_of(files[file].sector_hash(at / SECTOR));
            }
            files[file].read(at, &mut bytes[..len]);
            piece.recognise(&bytes[..len])
        };
        let size = self.writers_of_size(verdict.size());
        Found(self.pieces.iter().map(writers).chain([size]).collect())
    }

    fn writers_of_size(&self, size: u64) -> Writers {
        let is = |known: u64| (known..=known.next_multiple_of(self.size_unit)).contains(&size);
        let same = self.sizes.iter().filter(|(known, _)| is(*known));
        same.fold(0, |all, (_, writers)| all | writers)
    }

    /// Whose bytes a disk of `size` bytes holds, piece by piece; `read` reads it.
    pub fn recognise(
        &self,
        size: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), String>,
    ) -> Result<Found, String> {
        let mut found = Vec::with_capacity(self.pieces.len());
        for range in self.ranges() {
            found.extend(self.recognise_part(&range, size, &mut read)?);
        }
        found.push(self.writers_of_size(size));
        Ok(Found(found))
    }

    /// The same, of a part that is looked at.
    pub fn recognise_part(
        &self,
        part: &Range<u64>,
        size: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), String>,
    ) -> Result<Vec<Writers>, String> {
        let mut bytes = vec![0; (part.end - part.start) as usize];
        let there = part.end.min(size).saturating_sub(part.start) as usize;
        if there > 0 {
            read(part.start, &mut bytes[..there])?;
        }
        let first = self.pieces.partition_point(|piece| piece.start < part.start);
        let pieces = self.pieces[first..].iter().take_while(|piece| piece.start < part.end);
        let found = pieces.map(|piece| {
            let at = (piece.start - part.start) as usize;
            piece.recognise(&bytes[at..at + (piece.end - piece.start) as usize])
        });
        Ok(found.collect())
    }

    /// The same of all, cluster after cluster of `cluster` bytes: `part` recognises one.
    pub fn recognise_clusters<P: AsRef<Vec<Writers>>>(
        &self,
        size: u64,
        cluster: u64,
        mut part: impl FnMut(&Range<u64>) -> Result<P, String>,
    ) -> Result<Found, String> {
        let mut found = Vec::with_capacity(self.pieces.len());
        for range in self.ranges() {
            let mut start = range.start;
            while start < range.end {
                let end = range.end.min((start / cluster + 1) * cluster);
                found.extend(part(&(start..end))?.as_ref());
                start = end;
            }
        }
        found.push(self.writers_of_size(size));
        Ok(Found(found))
    }

    fn cells_of(&self, request: &Request) -> Range<usize> {
        if request.kind == IoKind::Truncate {
            let first = self.cells.partition_point(|cell| cell.start < request.offset);
            return first..self.cells.len() + 1;
        }
        let first = self.cells.partition_point(|cell| cell.end <= request.offset);
        let last = self.cells.partition_point(|cell| cell.start < request.end());
        first..last.max(first)
    }

    fn pieces_of(&self, cells: &Range<usize>) -> impl Iterator<Item = &Piece> {
        let first = self.pieces.partition_point(|piece| piece.cell < cells.start);
        let end = cells.end;
        self.pieces[first..].iter().take_while(move |piece| piece.cell < end)
    }
}

fn known_bytes(
    workload: &Workload,
    start: u64,
    before: &[u8],
    other: Option<&Other<'_>>,
) -> Vec<(u64, Writers)> {
    let end = start + before.len() as u64;
    let mut known: Vec<(u64, Writers)> = Vec::new();
    let mut add = |hash: u64, who: Writers| match known.iter_mut().find(|(h, _)| *h == hash) {
        Some((_, writers)) => *writers |= who,
        None => known.push((hash, who)),
    };
    let mut bytes = [0; SECTOR as usize];
    let bytes = &mut bytes[..before.len()];
    add(hash_of(before), BEFORE);
    for (which, request) in workload.requests.iter().enumerate() {
        let reaches = request.kind == IoKind::Truncate || end <= request.end();
        if !request.modifies() || request.offset > start || !reaches {
            continue;
        }
        match request.kind {
            IoKind::Write { .. } => request.fill(which, start, bytes),
            _ => bytes.fill(0),
        }
        add(hash_of(bytes), writer(which));
    }
    if let Some(other) = other {
        for (written, who) in [(false, OTHERS), (true, OTHERS_WRITE)] {
            other.known(start, bytes, written);
            add(hash_of(bytes), writer(who));
        }
    }
    known
}

/// As sectors are hashed, so that those need not be.
fn hash_of(bytes: &[u8]) -> u64 {
    Sector::from_bytes(bytes).hash_value()
}

impl Piece {
    /// Whose bytes these are; nobody's: 0.
    fn recognise(&self, bytes: &[u8]) -> Writers {
        self.writers_of(hash_of(bytes))
    }

    fn writers_of(&self, hash: u64) -> Writers {
        self.known.iter().find(|(known, _)| *known == hash).map_or(0, |&(_, writers)| writers)
    }
}

/// Whose bytes a disk was found to hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Found(Vec<Writers>);

impl Found {
    /// Of files that are no image.
    pub fn nothing() -> Found {
        Found(Vec::new())
    }
}

/// What may be in a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Cell {
    live: Writers,
    crash: Writers,
}

/// A request in flight.
#[derive(Clone, Debug)]
struct Pending {
    which: usize,
    kind: IoKind,
    /// What it is about.
    range: Range<u64>,
    cells: Range<usize>,
    /// Per cell. A read, or who asks what is where: what it may find. A write: what had ended when it was submitted. A
    /// flush: what it takes from `crash`.
    sets: Vec<Writers>,
    /// A read: did nothing happen to what it reads?
    quiet: bool,
}

impl Hash for Pending {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.which, &self.sets, self.quiet).hash(state);
    }
}

/// A copy that runs, per cell of its target.
#[derive(Clone, Debug, Hash)]
struct Copying {
    /// Whose bytes it may bring: what was live in the source at some moment of it.
    brings: Vec<Writers>,
    /// What had ended when it began.
    older: Vec<Writers>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Shadow {
    cut: Rc<Cut>,
    /// Discards reach whole units of this many bytes.
    discard_unit: u64,
    cells: Vec<Cell>,
    pending: Vec<Pending>,
    copying: Option<Copying>,
    failed: Writers,
}

impl Hash for Shadow {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (&self.cells, &self.pending, &self.copying, self.failed).hash(state);
    }
}

impl Shadow {
    /// Nothing written yet.
    pub fn new(cut: Rc<Cut>, discard_unit: u64) -> Shadow {
        Shadow::holding(BEFORE, cut, discard_unit)
    }

    /// The shadow of the disk beside: what is there is its own.
    pub fn of_other(cut: Rc<Cut>, discard_unit: u64) -> Shadow {
        Shadow::holding(writer(OTHERS), cut, discard_unit)
    }

    fn holding(who: Writers, cut: Rc<Cut>, discard_unit: u64) -> Shadow {
        let cells = vec![Cell { live: who, crash: who }; cut.cells.len() + 1];
        Shadow { cut, discard_unit, cells, pending: Vec::new(), copying: None, failed: 0 }
    }

    /// A hash of all that a crash would be judged by.
    pub fn crash_hash(&self) -> u64 {
        let sets: Vec<Writers> = self.cells.iter().map(|cell| cell.crash).collect();
        fixed_hash(sets)
    }

    /// Writers that have not ended.
    fn unended(&self) -> Writers {
        let writing = self.pending.iter().filter(|pending| pending.modifies());
        writing.fold(0, |all, pending| all | writer(pending.which))
    }

    /// Request number `which` is submitted.
    pub fn submit(&mut self, which: usize, request: &Request) {
        let reach = match request.kind {
            IoKind::Discard => whole_units(request, self.discard_unit, &self.cut.sizes),
            _ => *request,
        };
        let all = 0..self.cells.len();
        let is_flush = request.kind == IoKind::Flush;
        let cells = if is_flush { all } else { self.cut.cells_of(&reach) };
        let unended = self.unended();
        let sets: Vec<Writers> = cells
            .clone()
            .map(|at| (self.cells[at], unended | self.being_copied(at)))
            .map(|(cell, unended)| match request.kind {
                IoKind::Read | IoKind::Status { .. } => cell.live,
                IoKind::Flush => cell.crash & !cell.live,
                _ => (cell.live | cell.crash) & !unended,
            })
            .collect();
        let quiet = self.copying.is_none()
            && !self.pending.iter().any(|other| other.modifies() && overlap(&other.cells, &cells));
        let range = request.offset..request.end();
        let pending = Pending { which, kind: request.kind, range, cells, sets, quiet };
        if pending.modifies() {
            for cell in &mut self.cells[pending.cells.clone()] {
                cell.live |= writer(which);
                cell.crash |= writer(which);
            }
            let looks =
                |read: &&mut Pending| matches!(read.kind, IoKind::Read | IoKind::Status { .. });
            for read in self.pending.iter_mut().filter(looks) {
                for (set, cell) in read.sets.iter_mut().zip(read.cells.clone()) {
                    if pending.cells.contains(&cell) {
                        *set |= writer(which);
                        read.quiet = false;
                    }
                }
            }
        }
        self.pending.push(pending);
    }

    /// What a copy may bring to a cell.
    fn being_copied(&self, at: usize) -> Writers {
        let brings = self.copying.as_ref().and_then(|copying| copying.brings.get(at));
        brings.copied().unwrap_or(0)
    }

    /// A copy of `source` to this disk begins.
    pub fn copy_begins(&mut self, source: &Shadow) {
        let unended = self.unended();
        let older = self.cells.iter().map(|cell| (cell.live | cell.crash) & !unended).collect();
        self.copying = Some(Copying { brings: vec![0; self.cut.cells.len()], older });
        self.copy_sees(source);
    }

    /// It goes on: what `source` holds now may come to be here, too. The size is not copied.
    pub fn copy_sees(&mut self, source: &Shadow) {
        let Some(copying) = &mut self.copying else { return };
        let looks = |read: &&mut Pending| matches!(read.kind, IoKind::Read | IoKind::Status { .. });
        for (at, brings) in copying.brings.iter_mut().enumerate() {
            let live = source.cells[at].live;
            *brings |= live;
            self.cells[at].live |= live;
            self.cells[at].crash |= live;
            for read in self.pending.iter_mut().filter(looks) {
                if read.cells.contains(&at) {
                    read.sets[at - read.cells.start] |= live;
                    read.quiet = false;
                }
            }
        }
    }

    /// It has ended: well, and then all is here and stable; or not.
    pub fn copy_ends(&mut self, ok: bool) {
        let Some(Copying { brings, older }) = self.copying.take() else { return };
        for ((cell, brings), older) in self.cells.iter_mut().zip(brings).zip(older) {
            if ok {
                cell.live &= !older | brings;
                cell.crash &= !older | brings;
            } else {
                self.failed |= brings;
            }
        }
    }

    /// How many bytes of a disk are not as they were before.
    pub fn bytes_changed(&self, found: &Found) -> u64 {
        let pieces = self.cut.pieces.iter().zip(&found.0);
        let changed = pieces.filter(|(_, found)| **found & !BEFORE != 0);
        changed.map(|(piece, _)| piece.end - piece.start).sum()
    }

    /// Request number `which` has ended.
    ///
    /// # Errors
    ///
    /// When a read returned what it may not.
    pub fn end(&mut self, which: usize, ok: bool, bytes: Option<&[u8]>) -> Result<(), String> {
        let at = self.pending.iter().position(|pending| pending.which == which);
        let pending = self.pending.remove(at.ok_or("a request ended twice, or unasked")?);
        if !ok {
            if pending.modifies() {
                self.failed |= writer(which);
            }
            return Ok(());
        }
        match pending.kind {
            IoKind::Read => self.end_read(&pending, bytes.ok_or("a read without memory")?),
            IoKind::Status { .. } => {
                self.end_status(&pending, bytes.ok_or("a status without memory")?)
            }
            IoKind::Flush => {
                for (cell, gone) in self.cells.iter_mut().zip(&pending.sets) {
                    cell.crash &= !gone;
                }
                Ok(())
            }
            IoKind::Write { fua, .. } | IoKind::Zero { fua, .. } => {
                for (cell, older) in self.cells[pending.cells].iter_mut().zip(&pending.sets) {
                    cell.live &= !older;
                    if fua {
                        cell.crash &= !older;
                    }
                }
                Ok(())
            }
            IoKind::Truncate => {
                for (cell, older) in self.cells[pending.cells].iter_mut().zip(&pending.sets) {
                    cell.live &= !older;
                }
                Ok(())
            }
            IoKind::Discard => Ok(()),
        }
    }

    fn end_read(&mut self, pending: &Pending, bytes: &[u8]) -> Result<(), String> {
        let cut = Rc::clone(&self.cut);
        let Some(first) = cut.cells.get(pending.cells.start) else { return Ok(()) };
        let mut agreed = vec![Writers::MAX; pending.cells.len()];
        for piece in cut.pieces_of(&pending.cells) {
            let from = (piece.start - first.start) as usize;
            let to = (piece.end - first.start) as usize;
            let nth = piece.cell - pending.cells.start;
            let found = piece.recognise(&bytes[from..to]);
            let legal = pending.sets[nth];
            if found & legal == 0 {
                return Err(wrong("a read returned", piece, found, legal));
            }
            agreed[nth] &= found;
        }
        if pending.quiet {
            // Two reads with nothing between them agree.
            for (cell, agreed) in self.cells[pending.cells.clone()].iter_mut().zip(agreed) {
                if cell.live & agreed != 0 && cell.live & self.failed == 0 {
                    cell.live &= agreed;
                }
            }
        }
        Ok(())
    }

    /// What is said to be zeros is zeros, or was meanwhile. What is said to be data may be anything.
    fn end_status(&self, pending: &Pending, bytes: &[u8]) -> Result<(), String> {
        let Range { start, end } = pending.range;
        if start == end {
            return Ok(());
        }
        let status = Status::from_bytes(bytes).ok_or("no answer to what is where")?;
        if !(1..=end - start).contains(&status.len) {
            return Err(format!("an answer about {} bytes at {start:#x}", status.len));
        }
        if !status.kind.is_zero() {
            return Ok(());
        }
        let zeros = [0; SECTOR as usize];
        let inside = |piece: &&Piece| start <= piece.start && piece.end <= start + status.len;
        for piece in self.cut.pieces_of(&pending.cells).filter(inside) {
            let found = piece.recognise(&zeros[..(piece.end - piece.start) as usize]);
            let legal = pending.sets[piece.cell - pending.cells.start];
            if found & legal == 0 {
                return Err(wrong("zeros are said to be there,", piece, found, legal));
            }
        }
        Ok(())
    }

    /// A crash has left this, legally, and nothing else is left of what was in flight.
    pub fn crashed(&mut self, found: &Found) {
        self.pending.clear();
        self.copying = None;
        let mut left = vec![0; self.cells.len()];
        for (piece, found) in self.cut.pieces.iter().zip(&found.0) {
            left[piece.cell] |= found;
        }
        left[self.cut.cells.len()] = found.0.last().copied().unwrap_or(0);
        for (cell, left) in self.cells.iter_mut().zip(left) {
            // A size that nobody set may be left where setting it has failed.
            let set = if left & cell.crash == 0 { cell.crash } else { left & cell.crash };
            (cell.live, cell.crash) = (set, set);
        }
    }

    /// May the disk hold this, to a reader now?
    ///
    /// # Errors
    ///
    /// Says what is wrong where.
    pub fn check_live(&self, found: &Found) -> Result<(), String> {
        self.check(found, "the disk holds", |cell| cell.live)
    }

    /// May the disk beside hold this, to a reader now? Its size does not change.
    ///
    /// # Errors
    ///
    /// Says what is wrong where.
    pub fn check_other_live(&self, found: &Found) -> Result<(), String> {
        self.check_pieces(found, "the disk beside holds", |cell| cell.live)
    }

    /// The same, after a crash.
    ///
    /// # Errors
    ///
    /// Says what is wrong where.
    pub fn check_other_crash(&self, found: &Found) -> Result<(), String> {
        self.check_pieces(found, "a crash left of the disk beside", |cell| cell.crash)
    }

    /// May the disk hold this after a crash?
    ///
    /// # Errors
    ///
    /// Says what is wrong where.
    pub fn check_crash(&self, found: &Found) -> Result<(), String> {
        self.check(found, "a crash left", |cell| cell.crash)
    }

    fn check_pieces(
        &self,
        found: &Found,
        verb: &str,
        legal: impl Fn(&Cell) -> Writers,
    ) -> Result<(), String> {
        for (piece, &found) in self.cut.pieces.iter().zip(&found.0) {
            let legal = legal(&self.cells[piece.cell]);
            if found & legal == 0 {
                return Err(wrong(verb, piece, found, legal));
            }
        }
        Ok(())
    }

    fn check(
        &self,
        found: &Found,
        verb: &str,
        legal: impl Fn(&Cell) -> Writers,
    ) -> Result<(), String> {
        self.check_pieces(found, verb, &legal)?;
        let size = self.cells.last().expect("the size has a cell");
        let found_size = found.0.last().copied().unwrap_or(0);
        // Who failed to set it may have left any.
        if found_size & legal(size) == 0 && legal(size) & self.failed == 0 {
            let legal = names(legal(size));
            return Err(match found_size {
                0 => format!("{verb} a size that nobody set; legal: {legal}"),
                _ => format!("{verb} the size of {}; legal: {legal}", names(found_size)),
            });
        }
        Ok(())
    }

    /// The first byte that may not be so after a crash.
    pub fn first_wrong(&self, found: &Found) -> Option<u64> {
        let mut pieces = self.cut.pieces.iter().zip(&found.0);
        let wrong = pieces.find(|(piece, found)| self.cells[piece.cell].crash & *found == 0);
        wrong.map(|(piece, _)| piece.start)
    }

    /// Is something else there than before, and must be after any crash?
    pub fn has_changed(&self, found: &Found) -> bool {
        let mut pieces = self.cut.pieces.iter().zip(&found.0);
        pieces.any(|(piece, found)| (self.cells[piece.cell].crash | found) & BEFORE == 0)
    }

    /// Everything that had ended is stable now: the image was closed.
    pub fn settle(&mut self) {
        for cell in &mut self.cells {
            cell.crash &= cell.live;
        }
    }
}

impl Pending {
    fn modifies(&self) -> bool {
        !matches!(self.kind, IoKind::Read | IoKind::Flush | IoKind::Status { .. })
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// The end of the whole units in a request's range; the disk's end counts as one's end.
fn whole_end(request: &Request, unit: u64, sizes: &[(u64, Writers)]) -> u64 {
    let end = request.end();
    if sizes.iter().any(|&(size, _)| size == end) { end } else { end / unit * unit }
}

/// The whole units in a request's range.
fn whole_units(request: &Request, unit: u64, sizes: &[(u64, Writers)]) -> Request {
    let start = request.offset.next_multiple_of(unit);
    let end = whole_end(request, unit, sizes);
    Request { offset: start, len: end.saturating_sub(start), ..*request }
}

fn wrong(verb: &str, piece: &Piece, found: Writers, legal: Writers) -> String {
    let (start, end) = (piece.start, piece.end);
    format!("{verb} {} at {start:#x}..{end:#x} of the disk; legal: {}", names(found), names(legal))
}

fn names(writers: Writers) -> String {
    if writers == 0 {
        return "bytes that nobody wrote".into();
    }
    let bits = (0..64_usize).filter(|bit| writers & (1 << bit) != 0);
    let name = |bit: usize| match bit {
        0 => "what was there before".into(),
        _ if bit == OTHERS + 1 => "what the disk beside had".into(),
        _ if bit == OTHERS_WRITE + 1 => "what the disk beside was written".into(),
        _ => format!("request {}", bit - 1),
    };
    bits.map(name).collect::<Vec<String>>().join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shadow(requests: &[Request]) -> Shadow {
        let workload = Workload::new(requests.iter().copied());
        let cut = Cut::new(&workload, 4096, (1 << 20, 1), |_, bytes| bytes.fill(0), None, None);
        let mut shadow = Shadow::new(Rc::new(cut), 4096);
        shadow.pending.clear();
        shadow
    }

    fn cell(shadow: &Shadow, offset: u64) -> Cell {
        let at = shadow.cut.cells.iter().position(|cell| cell.contains(&offset));
        shadow.cells[at.expect("the cell is looked at")]
    }

    #[test]
    fn only_what_a_flush_found_acknowledged_becomes_stable() {
        let requests =
            [Request::write(0, 512), Request::flush(), Request::write(0, 512), Request::flush()];
        let mut s = shadow(&requests);
        s.submit(0, &requests[0]);
        s.submit(1, &requests[1]);
        s.end(0, true, None).unwrap();
        s.end(1, true, None).unwrap();
        assert_eq!(cell(&s, 0), Cell { live: 2, crash: 3 }, "the flush came too early");
        s.submit(2, &requests[2]);
        s.end(2, false, None).unwrap();
        assert_eq!(cell(&s, 0).live, 2 | 8, "a failed write may have happened");
        s.submit(3, &requests[3]);
        s.end(3, true, None).unwrap();
        assert_eq!(cell(&s, 0).crash, 2 | 8);
        assert_eq!(cell(&s, 512), Cell { live: 1, crash: 1 });
    }

    #[test]
    fn writes_that_overlap_in_time_may_end_in_either_order() {
        let requests = [Request::write(0, 1024), Request::write(512, 1024)];
        let mut s = shadow(&requests);
        s.submit(0, &requests[0]);
        s.submit(1, &requests[1]);
        s.end(1, true, None).unwrap();
        s.end(0, true, None).unwrap();
        assert_eq!(cell(&s, 0).live, 2);
        assert_eq!(cell(&s, 512).live, 2 | 4);
        assert_eq!(cell(&s, 1024).live, 4);
    }
}
