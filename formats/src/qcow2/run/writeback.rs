//! The writeback: writing changed metadata back.
//!
//! One chore, one writeback at a time. It *takes* the L2 slices and L1 blocks that are changed when it
//! begins, makes the data stable that they owe a fence for, writes copies of them, and makes those
//! stable. Whoever wants a flush waits for the first writeback that begins after he came: any number go
//! with one.
//!
//! A taken slice is *sealed* until it is copied: entries that owe a fence of their own wait, since
//! the fence under way may not cover their data. Everything else goes on: lookups, data, other
//! entries. A changed slice is pinned, and stays in memory until it is written. A header whose
//! write has failed goes with the next writeback.
//!
//! References that were given up in memory (`Free`) leave with the writeback after: when it has made
//! stable that nothing on disk refers to them, they go to the reserve.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::Errno;
use cowbell_engine::wait::WaitList;

use crate::parts::attempts::Attempts;
use crate::qcow2::disk::layout::Mapping;
use crate::qcow2::run::image::{Image, Qcow2Options};
use crate::qcow2::run::live_header::LiveHeader;
use crate::qcow2::run::reserve::{Free, Reserve};
use crate::qcow2::run::tables::Tables;

/// What the chore awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum WritebackState {
    /// Its turn.
    Turn,
    /// The data that changed slices owe a fence for, stable.
    Fence,
    /// Copies of changed slices and L1 blocks, written.
    Write,
    /// The header's turn, or the header, written again.
    Header,
    /// All of it, stable, the header too.
    FlushHeader,
    /// All of it, stable.
    Flush,
}

/// What there is to know about a slice in the cache.
#[derive(Clone, Copy, Hash, Debug, Default)]
struct Slice {
    /// Memory is ahead of the disk.
    dirty: bool,
    /// Data must be stable before the slice is written.
    owes: bool,
    /// Taken by the writeback under way, not copied yet.
    sealed: bool,
}

/// What is in flight.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Staged {
    Slice(u32),
    Root(u32),
}

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Writeback {
    asked: bool,
    running: bool,
    again: bool,
    /// By their slots in the cache.
    slices: Vec<Slice>,
    /// Slots of changed slices, and changed L1 blocks, that no writeback has taken.
    dirty: Vec<u32>,
    dirty_l1: Vec<u32>,
    /// Does an L1 block owe a fence?
    l1_owes: bool,
    /// What this writeback has taken and not copied, last first.
    taken: Vec<u32>,
    taken_l1: Vec<u32>,
    l1_sealed: bool,
    l1_waiters: WaitList,
    /// What it has in flight; so much at most.
    staged: Vec<Staged>,
    depth: usize,
    /// Who waits for the next writeback; for this one.
    next: WaitList,
    current: WaitList,
    result: Result<(), Errno>,
    /// Counts them, for those who wait for room.
    attempts: Attempts,
    frees: Vec<Free>,
    freeing: Vec<Free>,
    /// Runs that may wait.
    frees_max: usize,
    freed_in: u32,
    /// Who has something to give up, and must wait for a writeback first.
    room: WaitList,
}

impl Writeback {
    /// Of a cache of `slots` slices.
    pub fn new(slots: usize, options: &Qcow2Options) -> Writeback {
        let (depth, frees_max) = (options.writeback_depth.max(1), options.frees_max.max(1));
        Writeback {
            asked: false,
            running: false,
            again: false,
            slices: vec![Slice::default(); slots],
            dirty: Vec::with_capacity(slots),
            dirty_l1: Vec::with_capacity(slots),
            l1_owes: false,
            taken: Vec::with_capacity(slots),
            taken_l1: Vec::with_capacity(slots),
            l1_sealed: false,
            l1_waiters: WaitList::new(),
            depth,
            staged: Vec::with_capacity(depth),
            next: WaitList::new(),
            current: WaitList::new(),
            result: Ok(()),
            attempts: Attempts::default(),
            frees: Vec::with_capacity(frees_max),
            freeing: Vec::with_capacity(frees_max),
            frees_max,
            freed_in: 0,
            room: WaitList::new(),
        }
    }

    /// How the writeback ended that just woke the request.
    pub fn result(&self) -> Result<(), Errno> {
        self.result
    }

    /// Was a writeback asked for, and is it to begin?
    pub fn begin_asked(&mut self) -> bool {
        let begins = self.asked && !self.running;
        if begins {
            (self.asked, self.running) = (false, true);
        }
        begins
    }

    /// Is this slice ahead of the disk?
    pub fn is_changed(&self, slot: usize) -> bool {
        self.slices[slot].dirty
    }

    /// Is this slice sealed? Then no entry that owes a fence enters it.
    #[inline]
    pub fn is_sealed(&self, slot: usize) -> bool {
        self.slices[slot].sealed
    }

    /// A slice was changed in memory.
    #[inline]
    pub fn touch(&mut self, slot: usize, owes: bool, tables: &mut Tables) {
        let slice = &mut self.slices[slot];
        slice.owes |= owes;
        if !slice.dirty {
            slice.dirty = true;
            tables.slices.pin(slot);
            self.dirty.push(slot as u32);
        }
    }

    /// Is the L1 table sealed? Then no entry that owes a fence enters it.
    pub fn is_l1_sealed(&self) -> bool {
        self.l1_sealed
    }

    /// Parks the request until an entry may enter the L1 table.
    pub fn park_for_l1(&mut self, cx: &mut Cx<'_>) {
        cx.park(&mut self.l1_waiters);
    }

    /// Wakes who waits to change the L1 table.
    pub fn wake_for_l1(&mut self, cx: &mut Cx<'_>) {
        cx.wake_all(&mut self.l1_waiters);
    }

    /// A block of the L1 table was changed in memory.
    pub fn touch_l1(&mut self, block: u32, owes: bool) {
        self.l1_owes |= owes;
        if !self.dirty_l1.contains(&block) {
            self.dirty_l1.push(block);
        }
    }

    /// A reference to `place`, in the image's own file, was given up in memory.
    pub fn give_up(&mut self, place: Mapping, sole: bool, discard: bool, image: &Image) {
        let bits = image.geometry.cluster_bits();
        let (host, len) = match place {
            Mapping::Data(host) if !image.has_data_file() => (host, 1 << bits),
            Mapping::Compressed(compressed) => (compressed.host, compressed.bytes.into()),
            Mapping::Data(_) | Mapping::Zero(_) | Mapping::Unallocated(_) => return,
        };
        let (first, last) = (host.0 >> bits, (host.0 + len - 1) >> bits);
        let discard = discard && sole && image.pass_discards;
        self.free(Free { first, count: last - first + 1, sole, discard });
    }

    /// Takes in references that were given up.
    pub fn free(&mut self, free: Free) {
        if let Some(last) = self.frees.last_mut()
            && last.first + last.count == free.first
            && (last.sole, last.discard) == (free.sole, free.discard)
        {
            last.count += free.count;
            return;
        }
        self.frees.push(free);
    }

    /// Are references that were given up on their way to the reserve?
    pub fn has_frees(&self) -> bool {
        !self.frees.is_empty() || !self.freeing.is_empty()
    }

    pub fn has_room_for_frees(&self) -> bool {
        self.frees.len() < self.frees_max
    }

    /// Is there nothing to be written, and no writeback under way?
    fn is_clean(&self, header: &LiveHeader) -> bool {
        let is_clean = !self.running && self.dirty.is_empty() && self.dirty_l1.is_empty();
        is_clean && !header.is_doubted()
    }

    /// Is memory ahead of the disk, or a writeback under way?
    pub fn is_dirty(&self, header: &LiveHeader) -> bool {
        !self.is_clean(header) || !self.frees.is_empty()
    }

    /// Has what was acknowledged made stable, by a writeback that the request is parked for. False: no
    /// writeback is needed, only a flush of the files.
    pub fn park_to_flush(&mut self, header: &LiveHeader, cx: &mut Cx<'_>) -> bool {
        if self.is_clean(header) || mutant!("qcow2_flush_writes_no_tables") {
            return false;
        }
        if mutant!("qcow2_flush_joins_writeback_under_way") && self.running {
            cx.park(&mut self.current);
        } else {
            self.park(cx);
        }
        true
    }

    /// Parks the request until all that was changed before is stable.
    pub fn park(&mut self, cx: &mut Cx<'_>) {
        cx.park(&mut self.next);
        self.ask(cx);
    }

    fn ask(&mut self, cx: &mut Cx<'_>) {
        if self.running {
            self.again = true;
        } else if !self.asked {
            self.asked = true;
            self.attempts.begin();
            cx.ask();
        }
    }

    /// The request finds no slot for a slice: changed ones are written to make room. Parks it; answers
    /// the number of the writeback that it waits for.
    pub fn park_for_slot(&mut self, tables: &mut Tables, cx: &mut Cx<'_>) -> u32 {
        if !self.dirty.is_empty() {
            self.ask(cx);
        }
        cx.park(&mut tables.slices.full);
        // Nobody waits for a writeback that is not asked for: slots come back otherwise, too.
        let asked = self.running || self.asked;
        self.attempts.latest().wrapping_add(u32::from(!asked))
    }

    /// Too much has been given up: a writeback is to make it leave. Parks the request; answers the
    /// writeback's number.
    pub fn park_for_room(&mut self, cx: &mut Cx<'_>) -> u32 {
        cx.park(&mut self.room);
        self.ask(cx);
        self.attempts.latest()
    }

    /// Why there is no room, if the writeback that was to make it failed. Then it is no use to ask for
    /// another: after a failed flush every one fails.
    pub fn no_room(&self, attempt: u32) -> Option<Errno> {
        let failure = self.attempts.failure_of(attempt);
        failure.filter(|_| !mutant!("qcow2_asks_again_after_a_failed_writeback"))
    }

    /// Much is changed: better write some of it back before somebody has to wait for that.
    pub fn begin_if_full(&mut self, cx: &mut Cx<'_>) {
        let (dirty, frees) = (self.dirty.len(), self.frees.len());
        if !self.running && (dirty > self.slices.len() / 2 || frees > self.frees_max / 2) {
            self.ask(cx);
        }
    }

    pub fn assert_idle(&self) {
        assert!(!self.running && !self.asked, "a writeback is under way");
        assert!(self.next.is_empty() && self.current.is_empty() && self.room.is_empty());
        assert!(self.l1_waiters.is_empty() && self.taken.is_empty() && self.staged.is_empty());
    }
}

/// A step of the chore: the writeback, and what it works with.
pub(super) struct WritebackStep<'a> {
    pub image: &'a Image,
    pub writeback: &'a mut Writeback,
    pub tables: &'a mut Tables,
    pub header: &'a mut LiveHeader,
    pub reserve: &'a mut Reserve,
}

impl WritebackStep<'_> {
    pub fn run(
        &mut self,
        state: WritebackState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        match (state, event) {
            (WritebackState::Turn, Event::Start) if self.reserve.is_uncounted() => {
                self.reserve.park_for_counts(cx);
                Step::Wait(WritebackState::Turn)
            }
            (WritebackState::Turn, Event::Woken) if self.reserve.is_uncounted() => {
                match self.reserve.result() {
                    Err(errno) => self.not_begun(errno, cx),
                    // Others have been counted meanwhile.
                    Ok(()) => {
                        self.reserve.park_for_counts(cx);
                        Step::Wait(WritebackState::Turn)
                    }
                }
            }
            (WritebackState::Turn, Event::Start | Event::Woken) => self.begin(cx),
            (WritebackState::Fence, Event::Io(Ok(()))) => self.write_batch(cx),
            (WritebackState::Fence, Event::Io(Err(errno))) => self.failed(errno, cx),
            (WritebackState::Write, Event::Io(result)) => self.batch_written(result, cx),
            (WritebackState::Header, Event::Woken) => self.write_batch(cx),
            (WritebackState::Header, Event::Io(Ok(()))) => {
                self.image.flush_files(cx);
                Step::Wait(WritebackState::FlushHeader)
            }
            (WritebackState::Header, Event::Io(Err(errno))) => {
                self.header.changed(Err(errno), cx);
                self.failed(errno, cx)
            }
            (WritebackState::FlushHeader, Event::Io(result)) => {
                self.header.changed(result, cx);
                self.flushed(result, cx)
            }
            (WritebackState::Flush, Event::Io(result)) => self.flushed(result, cx),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// The counts of what is in use could not be written: no table may be.
    fn not_begun(&mut self, errno: Errno, cx: &mut Cx<'_>) -> Step<WritebackState> {
        self.writeback.current = std::mem::take(&mut self.writeback.next);
        self.ended(Err(errno), cx)
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<WritebackState> {
        let tables = &self.tables.slices;
        let writeback = &mut *self.writeback;
        writeback.current = std::mem::take(&mut writeback.next);
        std::mem::swap(&mut writeback.taken, &mut writeback.dirty);
        std::mem::swap(&mut writeback.taken_l1, &mut writeback.dirty_l1);
        std::mem::swap(&mut writeback.freeing, &mut writeback.frees);
        // In the order of the disk's tables, from the back.
        writeback.taken.sort_unstable_by_key(|&slot| std::cmp::Reverse(tables.key(slot as usize)));
        if !writeback.freeing.is_empty() {
            writeback.freed_in = cx.end_epoch();
        }
        let mut owes = std::mem::take(&mut writeback.l1_owes);
        writeback.l1_sealed = !writeback.taken_l1.is_empty();
        for &slot in &writeback.taken {
            let slice = &mut writeback.slices[slot as usize];
            slice.sealed = true;
            owes |= std::mem::take(&mut slice.owes);
        }
        if owes && !mutant!("qcow2_no_fence_in_writeback") {
            self.image.flush_files(cx);
            return Step::Wait(WritebackState::Fence);
        }
        self.write_batch(cx)
    }

    /// Writes copies of as much as there is room for; then there is no more to write.
    fn write_batch(&mut self, cx: &mut Cx<'_>) -> Step<WritebackState> {
        let unit = 1 << self.image.geometry.slice_bits();
        let mut run: Option<(u64, usize, usize)> = None;
        while self.writeback.staged.len() < self.writeback.depth && (run.is_none() || cx.room() > 1)
        {
            let off = self.writeback.staged.len() * unit;
            let Some(offset) = self.stage(off, cx) else { break };
            run = match run {
                Some((start, from, len)) if start + len as u64 == offset => {
                    Some((start, from, len + unit))
                }
                Some(done) => {
                    self.write_staged(done, cx);
                    Some((offset, off, unit))
                }
                None => Some((offset, off, unit)),
            };
        }
        if let Some(last) = run {
            self.write_staged(last, cx);
            return Step::Wait(WritebackState::Write);
        }
        if self.writeback.current.is_empty() && self.writeback.freeing.is_empty() {
            return self.ended(Ok(()), cx);
        }
        if self.header.is_doubted() {
            self.header.change(|_| {}, cx);
            return Step::Wait(WritebackState::Header);
        }
        if mutant!("qcow2_writeback_not_flushed") {
            return self.flushed(Ok(()), cx);
        }
        self.image.flush_files(cx);
        Step::Wait(WritebackState::Flush)
    }

    fn write_staged(&mut self, (offset, from, len): (u64, usize, usize), cx: &mut Cx<'_>) {
        let base = Base::Region(self.image.regions.staging);
        let seg = Seg { base, off: from as u32, len: len as u32 };
        cx.issue(Op::write(self.image.file, offset, Segs::one(seg)));
    }

    /// Copies the next taken slice or L1 block to `off` of the staging region; where does it go?
    fn stage(&mut self, off: usize, cx: &mut Cx<'_>) -> Option<u64> {
        let bits = self.image.geometry.slice_bits();
        if let Some(slot) = self.writeback.taken.pop() {
            self.writeback.staged.push(Staged::Slice(slot));
            let slot = slot as usize;
            self.tables.slices.copy_to_region(slot, self.image.regions.staging, off, cx.mem());
            self.writeback.slices[slot].dirty = false;
            self.writeback.slices[slot].sealed = false;
            cx.wake_all(self.tables.slices.waiters(slot));
            let guest = self.tables.slices.key(slot) << self.image.geometry.slice_span_bits();
            return Some(self.tables.slice_offset(guest));
        }
        let block = self.writeback.taken_l1.pop()?;
        self.writeback.staged.push(Staged::Root(block));
        let first = (block as usize) << (bits - 3);
        let bytes = &mut cx.mem().region_mut(self.image.regions.staging)[off..off + (1 << bits)];
        self.tables.copy_l1(first, bytes);
        if self.writeback.taken_l1.is_empty() {
            self.writeback.l1_sealed = false;
            cx.wake_all(&mut self.writeback.l1_waiters);
        }
        Some(self.header.l1_offset() + (u64::from(block) << bits))
    }

    fn batch_written(
        &mut self,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        let result = if mutant!("qcow2_table_error_ignored") { Ok(()) } else { result };
        while let Some(staged) = self.writeback.staged.pop() {
            match (staged, result) {
                (Staged::Slice(slot), Ok(())) => self.tables.unpin(slot as usize, cx),
                (Staged::Root(_), Ok(())) => {}
                // Nobody knows which of them are on disk: all are written again.
                (Staged::Slice(slot), Err(_)) => {
                    self.writeback.touch(slot as usize, false, self.tables);
                    self.tables.unpin(slot as usize, cx);
                }
                (Staged::Root(block), Err(_)) => self.writeback.touch_l1(block, false),
            }
        }
        match result {
            Ok(()) => self.write_batch(cx),
            Err(errno) => self.failed(errno, cx),
        }
    }

    /// What was taken and not written is as it was before.
    fn failed(&mut self, errno: Errno, cx: &mut Cx<'_>) -> Step<WritebackState> {
        while let Some(slot) = self.writeback.taken.pop() {
            let slice = &mut self.writeback.slices[slot as usize];
            slice.sealed = false;
            // The fence may have failed.
            slice.owes = true;
            self.writeback.dirty.push(slot);
            cx.wake_all(self.tables.slices.waiters(slot as usize));
        }
        while let Some(block) = self.writeback.taken_l1.pop() {
            self.writeback.touch_l1(block, true);
        }
        self.writeback.l1_sealed = false;
        cx.wake_all(&mut self.writeback.l1_waiters);
        self.flushed(Err(errno), cx)
    }

    fn flushed(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<WritebackState> {
        let writeback = &mut *self.writeback;
        match result {
            Ok(()) => {
                let epoch = writeback.freed_in;
                let freed = writeback.freeing.drain(..);
                self.reserve.take_in(freed, epoch);
            }
            Err(_) => writeback.frees.append(&mut writeback.freeing),
        }
        self.ended(result, cx)
    }

    fn ended(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<WritebackState> {
        let writeback = &mut *self.writeback;
        writeback.running = false;
        writeback.result = result;
        if let Err(errno) = result {
            writeback.attempts.failed(errno);
        }
        cx.wake_all(&mut writeback.current);
        cx.wake_all(&mut writeback.room);
        cx.wake_all(&mut self.tables.slices.full);
        if std::mem::take(&mut self.writeback.again) || !self.writeback.next.is_empty() {
            self.writeback.ask(cx);
        }
        self.reserve.ask_if_returned(cx);
        Step::Done(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_up_side_by_side_takes_one_place() {
        let options = Qcow2Options { frees_max: 3, ..Qcow2Options::default() };
        let mut writeback = Writeback::new(4, &options);
        let free = |first, sole| Free { first, count: 2, sole, discard: false };
        for free in [free(10, true), free(12, true), free(14, false), free(18, false)] {
            assert!(writeback.has_room_for_frees());
            writeback.free(free);
        }
        let kept = [Free { count: 4, ..free(10, true) }, free(14, false), free(18, false)];
        assert_eq!(writeback.frees, kept);
        assert!(writeback.has_frees() && !writeback.has_room_for_frees());
    }

    #[test]
    fn a_block_of_the_l1_table_is_written_once_and_owes_what_any_entry_owes() {
        let mut writeback = Writeback::new(4, &Qcow2Options::default());
        for (block, owes) in [(3, false), (3, true), (5, false)] {
            writeback.touch_l1(block, owes);
        }
        assert_eq!((writeback.dirty_l1, writeback.l1_owes), (vec![3, 5], true));
    }
}
