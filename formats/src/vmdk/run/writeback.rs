//! Writing changed tables, and flushing.
//!
//! One writeback at a time. It *seals* every changed table: copies it, within its slot. Then, if the
//! copies rely on something that may not be stable, it *fences*: flushes that. Then it writes the
//! changed sectors of the copies, of all primary tables at once, and those of the directory. Then it
//! flushes, which is what a guest's flush is for, and only then writes the redundant tables: what
//! they say is in the primary ones after any crash, so where they know more, it is damage, and can
//! be repaired. Meanwhile everybody may publish: what comes after the seal goes with the next writeback.
//!
//! A guest's flush that finds a writeback running waits for the next one that begins, with everybody
//! else who asks.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, OpKind, Seg, Segs};
use cowbell_engine::step::{Cx, Step};
use cowbell_engine::units::{BufId, Errno, Time};
use cowbell_engine::wait::WaitList;

use crate::parts::past_end::PastEnd;
use crate::vmdk::disk::layout::{Header, NOWHERE, SECTOR, SECTOR_BITS};
use crate::vmdk::rest::open::{SECTOR_ENTRIES, Sparse};
use crate::vmdk::run::{
    COPY_AT, CidState, FLUSH, Grains, PartKind, SLOT_BYTES, State, Vmdk, write_at,
};

/// What a slot of the cache is for, and what of it is to be written.
#[derive(Clone, Copy, Hash, Debug, Default)]
pub(super) struct Slot {
    /// The part and its table.
    pub origin: (u32, u32),
    /// Bytes that have changed since the last seal, in whole sectors. A pin goes with it.
    dirty: Option<(u16, u16)>,
    /// Bytes that the writeback under way writes. A pin goes with it.
    sealed: Option<(u16, u16)>,
}

impl Slot {
    pub fn is_dirty(&self) -> bool {
        self.dirty.is_some()
    }
}

/// A part's directories.
#[derive(Clone, Hash, Debug)]
pub(super) struct Root {
    pub directory: Vec<u32>,
    redundant: Option<Vec<u32>>,
    directory_at: u64,
    redundant_at: u64,
    /// The directory is on disk only when a stream is closed.
    pub has_footer: bool,
    /// Sectors that have changed, and copies of those that the writeback under way writes.
    dirty: Vec<u32>,
    sealed: Vec<(u32, Copies)>,
    /// Tables change by sectors.
    past_end: PastEnd,
    /// The length that the file has after any crash.
    stable_len: u64,
    /// That, once the fence under way has ended.
    fenced_len: u64,
}

/// A sector of each directory.
type Copies = [[u32; SECTOR_ENTRIES as usize]; 2];

impl Root {
    /// Where entry `index` of the directory is in the file.
    pub fn entry_at(&self, index: u64) -> u64 {
        self.directory_at + index * 4
    }

    pub fn new(mut sparse: Sparse) -> Root {
        let (header, opened_end) = (&sparse.header, sparse.grains_end());
        let count = header.directory_entries() as usize;
        let directories = [Some(&mut sparse.directory), sparse.redundant.as_mut()];
        for entry in directories.into_iter().flatten().flat_map(|entries| &mut entries[..count]) {
            if header.table(*entry, opened_end).is_none() {
                *entry = NOWHERE;
            }
        }
        let sectors = count * sectors_of_table(header);
        Root {
            past_end: PastEnd::new(opened_end, sectors as u64),
            directory_at: sparse.header.directory_at << SECTOR_BITS,
            redundant_at: sparse.header.redundant_at << SECTOR_BITS,
            has_footer: sparse.has_footer,
            directory: sparse.directory,
            redundant: sparse.redundant,
            dirty: Vec::new(),
            sealed: Vec::new(),
            stable_len: sparse.file_len,
            fenced_len: sparse.file_len,
        }
    }

    /// Bytes `from..to` of a table are about to be changed.
    fn note_changed(&mut self, header: &Header, table: u32, from: usize, to: usize) {
        let first = u64::from(table) * sectors_of_table(header) as u64;
        self.past_end.changed(first + from as u64 / SECTOR..first + (to as u64).div_ceil(SECTOR));
    }

    /// A table has been loaded: see [`PastEnd`].
    pub fn disarm(&self, header: &Header, table: u32, bytes: &mut [u8]) {
        let end = header.bounds(self.past_end.end()).end;
        let first = u64::from(table) * sectors_of_table(header) as u64;
        let past = |entry| u64::from(u32::from_le_bytes(entry)) >= end;
        self.past_end.disarm(first, SECTOR as usize, bytes, past);
    }

    /// There is a table now, and a redundant one if there is such a directory.
    pub fn set(&mut self, index: usize, primary: u32, redundant: u32) {
        self.directory[index] = primary;
        if let Some(entries) = &mut self.redundant {
            entries[index] = redundant;
        }
        let sector = (index as u64 / SECTOR_ENTRIES) as u32;
        if !self.dirty.contains(&sector) {
            self.dirty.push(sector);
        }
    }

    /// The file's end is being set.
    pub fn forget_length(&mut self) {
        self.stable_len = 0;
    }

    /// Copies the sectors that have changed: that is what gets written.
    fn seal(&mut self) {
        while let Some(sector) = self.dirty.pop() {
            let copies = self.copies(sector);
            self.sealed.push((sector, copies));
        }
    }

    fn copies(&self, sector: u32) -> Copies {
        let first = sector as usize * SECTOR_ENTRIES as usize;
        let of = |entries: &[u32]| {
            let mut copy = [0; SECTOR_ENTRIES as usize];
            copy.copy_from_slice(&entries[first..first + SECTOR_ENTRIES as usize]);
            copy
        };
        [of(&self.directory), self.redundant.as_deref().map_or([0; _], of)]
    }
}

fn sectors_of_table(header: &Header) -> usize {
    header.table_bytes().div_ceil(SECTOR) as usize
}

/// Which tables a writeback is writing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    /// The tables that count.
    Primary,
    /// The directories that name new ones. Then everything is flushed.
    Roots,
    /// The tables' copies.
    Redundant,
    /// The directories that name them.
    RedundantRoots,
}

/// Why a writeback was begun.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum For {
    /// A guest's flush.
    Flush,
    /// Room in the cache, or a deadline: nothing has to be stable in the end.
    Room,
    /// The image is being closed.
    Tidy,
}

/// Tables to be written, and who writes them. See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Writeback {
    running: Option<For>,
    /// Writebacks begun that end with a flush.
    flushes: u32,
    flush_failed: Option<(u32, Errno)>,
    /// Writebacks begun.
    count: u32,
    failed: Option<(u32, Errno)>,
    /// Slots with something to write, and those being written.
    dirty: Vec<u32>,
    sealed: Vec<u32>,
    /// A directory has changed, a new table is to be named on disk.
    roots: bool,
    pub due: Option<Time>,
    waiters: WaitList,
}

impl Writeback {
    pub fn new(slots: usize) -> Writeback {
        Writeback {
            running: None,
            flushes: 0,
            flush_failed: None,
            count: 0,
            failed: None,
            dirty: Vec::with_capacity(slots),
            sealed: Vec::with_capacity(slots),
            roots: false,
            due: None,
            waiters: WaitList::new(),
        }
    }

    /// Is there anything to write?
    pub fn has_work(&self) -> bool {
        !self.dirty.is_empty() || self.roots
    }

    /// Would a writeback make room in the cache, and is none under way?
    pub fn wants_chore(&self) -> bool {
        self.running.is_none() && !self.dirty.is_empty()
    }

    /// The number of the writeback that runs, or will be next.
    pub fn next_attempt(&self) -> u32 {
        self.count.wrapping_add(u32::from(self.running.is_none()))
    }

    /// Why writeback number `attempt`, or one after it, failed; `None` if none did.
    pub fn failure_of(&self, attempt: u32) -> Option<Errno> {
        since(self.failed, attempt)
    }

    pub fn assert_idle(&self) {
        assert!(self.running.is_none() && self.waiters.is_empty(), "{self:?}");
        assert!(self.sealed.is_empty(), "{self:?}");
    }
}

fn since(failed: Option<(u32, Errno)>, attempt: u32) -> Option<Errno> {
    let (number, errno) = failed?;
    (number.wrapping_sub(attempt) < u32::MAX / 2).then_some(errno)
}

fn union(a: Option<(u16, u16)>, b: Option<(u16, u16)>) -> Option<(u16, u16)> {
    match (a, b) {
        (Some(a), Some(b)) => Some((a.0.min(b.0), a.1.max(b.1))),
        (a, b) => a.or(b),
    }
}

impl Vmdk {
    /// Bytes `from..to` of a slot's table have changed.
    pub(super) fn mark_dirty(&mut self, slot: usize, from: usize, to: usize, cx: &mut Cx<'_>) {
        let sector = SECTOR as usize;
        let range = (from / sector * sector, to.next_multiple_of(sector));
        let state = &mut self.slots[slot];
        if state.dirty.is_none() {
            self.tables.pin(slot);
            self.writeback.dirty.push(slot as u32);
        }
        state.dirty = union(state.dirty, Some((range.0 as u16, range.1 as u16)));
        let (part, table) = state.origin;
        let Grains { header, root, .. } = self.grains_mut(part as usize);
        root.note_changed(header, table, range.0, range.1);
        self.set_due(cx);
    }

    /// A directory has changed.
    pub(super) fn note_change(&mut self, cx: &mut Cx<'_>) {
        self.writeback.roots = true;
        self.set_due(cx);
    }

    fn set_due(&mut self, cx: &Cx<'_>) {
        let after = self.options.writeback_after_ms;
        self.writeback.due.get_or_insert_with(|| cx.now().plus_ms(after));
    }

    /// A guest's flush, or the end of a write that wants one.
    pub(super) fn flush_all(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.writeback.running.is_some() && !mutant!("vmdk_flush_rides_on_a_running_writeback") {
            cx.park(&mut self.writeback.waiters);
            return Step::Wait(State::Ride { target: self.writeback.flushes.wrapping_add(1) });
        }
        if !self.writeback.has_work() || mutant!("vmdk_flush_writes_no_tables") {
            return self.flush_only(0, cx);
        }
        self.begin_writeback(For::Flush, cx)
    }

    /// A writeback has ended: was it the one that was waited for?
    pub(super) fn ride(&mut self, target: u32, cx: &mut Cx<'_>) -> Step<State> {
        let begun = self.writeback.flushes.wrapping_sub(target) < u32::MAX / 2;
        let flushing = self.writeback.running.is_some_and(|reason| reason != For::Room);
        if begun && !(flushing && self.writeback.flushes == target) {
            let failure = since(self.writeback.flush_failed, target);
            return Step::Done(failure.map_or(Ok(()), Err));
        }
        if self.writeback.running.is_some() {
            cx.park(&mut self.writeback.waiters);
            return Step::Wait(State::Ride { target });
        }
        // Even if there is nothing to write: others wait for a writeback of this number.
        self.begin_writeback(For::Flush, cx)
    }

    /// Flushes every file from number `next` on.
    pub(super) fn flush_only(&mut self, next: u32, cx: &mut Cx<'_>) -> Step<State> {
        let next = self.issue_flushes(next, cx);
        if next as usize == self.files.len() {
            return Step::Last { label: FLUSH };
        }
        Step::Wait(State::FlushOnly { next })
    }

    /// Issues as many flushes as there is room for; answers the number of the next file.
    fn issue_flushes(&self, next: u32, cx: &mut Cx<'_>) -> u32 {
        let mut next = next as usize;
        loop {
            cx.issue(Op::flush(self.files[next]));
            next += 1;
            if next == self.files.len() || cx.room() == 0 {
                return next as u32;
            }
        }
    }

    /// Chore: a writeback that makes room, or because it is time.
    pub(super) fn writeback_for_room(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.writeback.running.is_some() || !self.writeback.has_work() {
            return Step::Done(Ok(()));
        }
        self.begin_writeback(For::Room, cx)
    }

    fn begin_writeback(&mut self, reason: For, cx: &mut Cx<'_>) -> Step<State> {
        let writeback = &mut self.writeback;
        writeback.running = Some(reason);
        writeback.count = writeback.count.wrapping_add(1);
        if reason != For::Room {
            writeback.flushes = writeback.flushes.wrapping_add(1);
        }
        writeback.due = None;
        let fences = self.needs_fence();
        if mutant!("vmdk_sealed_after_fence") && fences {
            return self.fence(0, cx);
        }
        self.seal(cx);
        if fences && !mutant!("vmdk_writeback_without_fence") {
            return self.fence(0, cx);
        }
        self.write_tables(Phase::Primary, 0, cx)
    }

    /// Does what is to be written rely on anything that may not be stable?
    fn needs_fence(&self) -> bool {
        if !self.writeback.has_work() {
            return false;
        }
        let grown = self.parts.iter().any(|part| match &part.kind {
            PartKind::Sparse(grains) => grains.space.end() > grains.root.stable_len,
            PartKind::Flat(_) | PartKind::Zero => false,
        });
        let grown = grown && !mutant!("vmdk_length_not_fenced");
        let covers = self.backing.is_some() && !mutant!("vmdk_parent_not_fenced");
        grown || covers || self.cid.state == CidState::New
    }

    /// Copies what has changed: that is what gets written.
    fn seal(&mut self, cx: &mut Cx<'_>) {
        std::mem::swap(&mut self.writeback.dirty, &mut self.writeback.sealed);
        self.writeback.roots = false;
        for &slot in &self.writeback.sealed {
            let state = &mut self.slots[slot as usize];
            state.sealed = state.dirty.take();
            let bytes = self.tables.bytes_mut(slot as usize, cx.mem());
            let (current, copy) = bytes.split_at_mut(COPY_AT);
            copy.copy_from_slice(current);
        }
        for part in &mut self.parts {
            let PartKind::Sparse(grains) = &mut part.kind else { continue };
            grains.root.seal();
            grains.root.fenced_len = grains.space.ready();
        }
    }

    /// Flushes what the sealed tables rely on, from file `next` on.
    pub(super) fn fence(&mut self, next: u32, cx: &mut Cx<'_>) -> Step<State> {
        if (next as usize) < self.files.len() {
            let next = self.issue_flushes(next, cx);
            return Step::Wait(State::Fence { next });
        }
        if mutant!("vmdk_sealed_after_fence") {
            self.seal(cx);
        }
        self.all_stable();
        self.write_tables(Phase::Primary, 0, cx)
    }

    /// Every file has been flushed since the seal.
    fn all_stable(&mut self) {
        if self.cid.state == CidState::New {
            self.cid.state = CidState::Stable;
        }
        for part in &mut self.parts {
            if let PartKind::Sparse(grains) = &mut part.kind {
                let root = &mut grains.root;
                root.stable_len = root.stable_len.max(root.fenced_len);
            }
        }
    }

    /// Writes the sealed tables and directories from number `next` of `phase` on, phase after
    /// phase.
    pub(super) fn write_tables(
        &mut self,
        mut phase: Phase,
        mut next: u32,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let mut issued = false;
        loop {
            if matches!(phase, Phase::Roots | Phase::RedundantRoots) {
                if let Some(step) = self.write_root(phase, next, cx) {
                    return step;
                }
            } else {
                while (next as usize) < self.writeback.sealed.len() {
                    if issued && cx.room() == 0 {
                        return Step::Wait(State::WriteTables { phase, next });
                    }
                    let slot = self.writeback.sealed[next as usize] as usize;
                    issued |= self.write_table(slot, phase == Phase::Redundant, cx);
                    next += 1;
                }
            }
            if issued {
                return Step::Wait(State::WriteTables { phase, next });
            }
            next = 0;
            phase = match phase {
                Phase::Primary => Phase::Roots,
                Phase::Redundant => Phase::RedundantRoots,
                Phase::Roots if mutant!("vmdk_redundant_tables_before_flush") => Phase::Redundant,
                Phase::Roots => return self.flush_files(0, cx),
                Phase::RedundantRoots => return self.writeback_over(Ok(()), cx),
            };
        }
    }

    fn write_table(&self, slot: usize, redundant: bool, cx: &mut Cx<'_>) -> bool {
        let Slot { origin: (part, index), sealed, .. } = self.slots[slot];
        let grains = self.grains(part as usize);
        let entry = match (&grains.root.redundant, redundant) {
            (_, false) => grains.root.directory[index as usize],
            (Some(entries), true) => entries[index as usize],
            (None, true) => 0,
        };
        let is_same = redundant && entry == grains.root.directory[index as usize];
        let is_there = matches!(grains.header.table(entry, grains.space.end()), Some(Some(_)));
        let (Some((from, to)), true, false) = (sealed, is_there, is_same) else { return false };
        let (from, to) = (usize::from(from), usize::from(to));
        debug_assert!(COPY_AT + to <= SLOT_BYTES);
        let seg = self.tables.seg(slot, COPY_AT + from, to - from);
        cx.issue(write_at(self.parts[part as usize].file, entry, from as u64, seg));
        true
    }

    /// Writes sector number `next` of those of the directories that are sealed. They are rare, and
    /// written one by one.
    fn write_root(&mut self, phase: Phase, next: u32, cx: &mut Cx<'_>) -> Option<Step<State>> {
        let mut left = next as usize;
        let (file, root) = self.parts.iter().find_map(|part| match &part.kind {
            PartKind::Sparse(grains) if left < grains.root.sealed.len() => {
                Some((part.file, &grains.root))
            }
            PartKind::Sparse(grains) => {
                left -= grains.root.sealed.len();
                None
            }
            PartKind::Flat(_) | PartKind::Zero => None,
        })?;
        let (sector, copies) = &root.sealed[left];
        let (copy, place) = match (phase, &root.redundant) {
            (Phase::Roots, _) => (&copies[0], root.directory_at),
            (_, Some(_)) => (&copies[1], root.redundant_at),
            (_, None) => return None,
        };
        let Some([buf]) = cx.take_bufs() else {
            cx.park_for_bufs();
            return Some(Step::Wait(State::WriteTables { phase, next }));
        };
        for (to, from) in cx.mem().pool_mut(buf).as_chunks_mut::<4>().0.iter_mut().zip(copy) {
            *to = from.to_le_bytes();
        }
        let seg = Seg { base: Base::Pool(buf), off: 0, len: SECTOR as u32 };
        let offset = place + u64::from(*sector) * SECTOR;
        cx.issue(Op::write(file, offset, Segs::one(seg)));
        Some(Step::Wait(State::WriteRoot { phase, next, buf }))
    }

    pub(super) fn root_written(
        &mut self,
        phase: Phase,
        next: u32,
        buf: BufId,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        cx.give_buf(buf);
        match result {
            Ok(()) => self.write_tables(phase, next + 1, cx),
            Err(_) => self.writeback_over(result, cx),
        }
    }

    /// Flushes every file from number `next` on, then goes on to the redundant tables.
    pub(super) fn flush_files(&mut self, next: u32, cx: &mut Cx<'_>) -> Step<State> {
        if (next as usize) < self.files.len() {
            let next = self.issue_flushes(next, cx);
            return Step::Wait(State::FlushFiles { next });
        }
        self.all_stable();
        if mutant!("vmdk_redundant_tables_before_flush")
            || mutant!("vmdk_redundant_tables_not_written")
        {
            return self.writeback_over(Ok(()), cx);
        }
        self.write_tables(Phase::Redundant, 0, cx)
    }

    /// The writeback has ended. What could not be written is to be written again.
    pub(super) fn writeback_over(
        &mut self,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let failed = result.is_err() && !mutant!("vmdk_failed_writeback_counts_as_written");
        for i in 0..self.writeback.sealed.len() {
            let slot = self.writeback.sealed[i] as usize;
            let state = &mut self.slots[slot];
            let sealed = state.sealed.take();
            let was_dirty = state.dirty.is_some();
            if failed {
                state.dirty = union(state.dirty, sealed);
            }
            if failed && !was_dirty {
                self.writeback.dirty.push(slot as u32);
            } else {
                self.tables.unpin(slot);
            }
        }
        self.writeback.sealed.clear();
        for part in &mut self.parts {
            let PartKind::Sparse(grains) = &mut part.kind else { continue };
            let root = &mut grains.root;
            self.writeback.roots |= failed && !root.sealed.is_empty();
            for (sector, _) in root.sealed.drain(..).filter(|_| failed) {
                if !root.dirty.contains(&sector) {
                    root.dirty.push(sector);
                }
            }
        }
        if self.writeback.has_work() {
            self.set_due(cx);
        }
        let writeback = &mut self.writeback;
        let reason = writeback.running.take().expect("it was running");
        if let Err(errno) = result {
            writeback.failed = Some((writeback.count, errno));
            if reason != For::Room {
                writeback.flush_failed = Some((writeback.flushes, errno));
            }
        }
        if !mutant!("vmdk_writeback_wakes_nobody") {
            cx.wake_all(&mut writeback.waiters);
        }
        cx.wake_all(&mut self.tables.full);
        match (reason, result) {
            (For::Tidy, Ok(())) => match self.write_tail(cx) {
                Some(step) => step,
                None => self.cut_ends(0, cx),
            },
            _ => Step::Done(result),
        }
    }

    /// Chore: writes what is to be written, makes it stable, and cuts off the files' spare ends.
    pub(super) fn tidy(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.writeback.running.is_some() {
            cx.park(&mut self.writeback.waiters);
            return Step::Wait(State::Tidy);
        }
        self.begin_writeback(For::Tidy, cx)
    }

    /// Cuts the spare ends of the files off, from part `next` on.
    pub(super) fn cut_ends(&mut self, next: u32, cx: &mut Cx<'_>) -> Step<State> {
        let (mut next, mut issued) = (next as usize, false);
        while next < self.parts.len() && !(issued && cx.room() == 0) {
            let part = &mut self.parts[next];
            next += 1;
            let PartKind::Sparse(grains) = &mut part.kind else { continue };
            let has_spare = grains.space.has_spare_end() && !grains.root.has_footer;
            if !has_spare || grains.space.is_growing() {
                continue;
            }
            let end = grains.space.end();
            cx.issue(Op::bare(OpKind::Truncate, part.file, end, 0));
            issued = true;
            // Also if it fails: it may have happened, and what may be gone is not handed out.
            grains.space.cut();
            grains.root.stable_len = grains.root.stable_len.min(end);
        }
        if issued {
            return Step::Wait(State::CutEnds { next: next as u32 });
        }
        self.flush_only(0, cx)
    }
}
