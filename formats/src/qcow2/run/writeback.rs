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
use crate::qcow2::run::{FLUSH, Qcow2, Qcow2Options, State};

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
pub(super) struct Slice {
    /// Memory is ahead of the disk.
    dirty: bool,
    /// Data must be stable before the slice is written.
    owes: bool,
    /// Taken by the writeback under way, not copied yet.
    sealed: bool,
}

impl Slice {
    pub fn is_dirty(&self) -> bool {
        self.dirty
    }

    #[inline]
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }
}

/// References to clusters that were given up, one to each.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Free {
    /// The first cluster.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Was it the only reference?
    pub sole: bool,
    /// May the space be given back to the file system?
    pub discard: bool,
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
    /// Slots of changed slices, and changed L1 blocks, that no writeback has taken.
    dirty: Vec<u32>,
    dirty_l1: Vec<u32>,
    /// Does an L1 block owe a fence?
    l1_owes: bool,
    /// What this writeback has taken and not copied, last first.
    taken: Vec<u32>,
    taken_l1: Vec<u32>,
    l1_sealed: bool,
    pub l1_waiters: WaitList,
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
    pub room: WaitList,
}

impl Writeback {
    /// Of a cache of `slots` slices.
    pub fn new(slots: usize, options: &Qcow2Options) -> Writeback {
        let (depth, frees_max) = (options.writeback_depth.max(1), options.frees_max.max(1));
        Writeback {
            asked: false,
            running: false,
            again: false,
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

    pub fn is_l1_sealed(&self) -> bool {
        self.l1_sealed
    }

    /// An L1 block was changed.
    pub fn touch_l1(&mut self, block: u32, owes: bool) {
        self.l1_owes |= owes;
        if !self.dirty_l1.contains(&block) {
            self.dirty_l1.push(block);
        }
    }

    /// Takes in a reference that was given up.
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

    fn is_clean(&self) -> bool {
        !self.running && self.dirty.is_empty() && self.dirty_l1.is_empty()
    }

    pub fn assert_idle(&self) {
        assert!(!self.running && !self.asked, "a writeback is under way");
        assert!(self.next.is_empty() && self.current.is_empty() && self.room.is_empty());
        assert!(self.l1_waiters.is_empty() && self.taken.is_empty() && self.staged.is_empty());
    }
}

impl Qcow2 {
    /// A slice was changed in memory.
    #[inline]
    pub(super) fn touch(&mut self, slot: usize, owes: bool) {
        let slice = &mut self.slices[slot];
        slice.owes |= owes;
        if !slice.dirty {
            slice.dirty = true;
            self.tables.pin(slot);
            self.writeback.dirty.push(slot as u32);
        }
    }

    /// Guest flush, and the end of a write that is to be stable.
    pub(super) fn flush(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.is_clean() || mutant!("qcow2_flush_writes_no_tables") {
            self.flush_files(cx);
            return Step::Last { label: FLUSH };
        }
        if mutant!("qcow2_flush_joins_writeback_under_way") && self.writeback.running {
            cx.park(&mut self.writeback.current);
            return Step::Wait(State::Swept);
        }
        cx.park(&mut self.writeback.next);
        self.ask_for_writeback(cx);
        Step::Wait(State::Swept)
    }

    /// Parks the request until all that was changed before is stable.
    pub(super) fn park_for_writeback(&mut self, cx: &mut Cx<'_>) {
        cx.park(&mut self.writeback.next);
        self.ask_for_writeback(cx);
    }

    /// Is memory ahead of the disk, or a writeback under way?
    pub(super) fn is_dirty(&self) -> bool {
        !self.is_clean() || !self.writeback.frees.is_empty()
    }

    fn is_clean(&self) -> bool {
        self.writeback.is_clean() && !self.header.is_doubted()
    }

    pub(super) fn ask_for_writeback(&mut self, cx: &mut Cx<'_>) {
        if self.writeback.running {
            self.writeback.again = true;
        } else if !self.writeback.asked {
            self.writeback.asked = true;
            self.writeback.attempts.begin();
            cx.ask();
        }
    }

    /// Somebody finds no slot for a slice: changed ones are written to make room. Answers the state
    /// of the request at `at`, which waits for that.
    pub(super) fn wait_for_slot(&mut self, at: u64, cx: &mut Cx<'_>) -> Step<State> {
        if !self.writeback.dirty.is_empty() {
            self.ask_for_writeback(cx);
        }
        cx.park(&mut self.tables.full);
        // Nobody waits for a writeback that is not asked for: slots come back otherwise, too.
        let asked = self.writeback.running || self.writeback.asked;
        let attempt = self.writeback.attempts.latest().wrapping_add(u32::from(!asked));
        Step::Wait(State::Room { at, attempt })
    }

    /// Too much has been given up: a writeback is to make it leave. Parks the request; answers the
    /// writeback's number.
    pub(super) fn park_for_room(&mut self, cx: &mut Cx<'_>) -> u32 {
        cx.park(&mut self.writeback.room);
        self.ask_for_writeback(cx);
        self.writeback.attempts.latest()
    }

    /// Why there is no room, if the writeback that was to make it failed. Then it is no use to ask for
    /// another: after a failed flush every one fails.
    pub(super) fn no_room(&self, attempt: u32) -> Option<Errno> {
        let failure = self.writeback.attempts.failure_of(attempt);
        failure.filter(|_| !mutant!("qcow2_asks_again_after_a_failed_writeback"))
    }

    /// Much is changed: better write some of it back before somebody has to wait for that.
    pub(super) fn writeback_if_full(&mut self, cx: &mut Cx<'_>) {
        let (dirty, frees) = (self.writeback.dirty.len(), self.writeback.frees.len());
        if !self.writeback.running
            && (dirty > self.slices.len() / 2 || frees > self.writeback.frees_max / 2)
        {
            self.ask_for_writeback(cx);
        }
    }

    pub(super) fn step_writeback(
        &mut self,
        state: WritebackState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match (state, event) {
            (WritebackState::Turn, Event::Start) if self.reserve.is_uncounted() => {
                self.park_for_counts(cx);
                Step::Wait(State::Writeback(WritebackState::Turn))
            }
            (WritebackState::Turn, Event::Woken) if self.reserve.is_uncounted() => {
                match self.reserve.result() {
                    Err(errno) => self.not_begun(errno, cx),
                    // Others have been counted meanwhile.
                    Ok(()) => {
                        self.park_for_counts(cx);
                        Step::Wait(State::Writeback(WritebackState::Turn))
                    }
                }
            }
            (WritebackState::Turn, Event::Start | Event::Woken) => self.begin_writeback(cx),
            (WritebackState::Fence, Event::Io(Ok(()))) => {
                self.reserve.fence_ended();
                self.write_batch(cx)
            }
            (WritebackState::Fence, Event::Io(Err(errno))) => self.writeback_failed(errno, cx),
            (WritebackState::Write, Event::Io(result)) => self.batch_written(result, cx),
            (WritebackState::Header, Event::Woken) => self.write_batch(cx),
            (WritebackState::Header, Event::Io(Ok(()))) => {
                self.flush_files(cx);
                Step::Wait(State::Writeback(WritebackState::FlushHeader))
            }
            (WritebackState::Header, Event::Io(Err(errno))) => {
                self.header_changed(Err(errno), cx);
                self.writeback_failed(errno, cx)
            }
            (WritebackState::FlushHeader, Event::Io(result)) => {
                self.header_changed(result, cx);
                self.writeback_flushed(result, cx)
            }
            (WritebackState::Flush, Event::Io(result)) => self.writeback_flushed(result, cx),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// The counts of what is in use could not be written: no table may be.
    fn not_begun(&mut self, errno: Errno, cx: &mut Cx<'_>) -> Step<State> {
        self.writeback.current = std::mem::take(&mut self.writeback.next);
        self.writeback_ended(Err(errno), cx)
    }

    fn begin_writeback(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let tables = &self.tables;
        let writeback = &mut self.writeback;
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
            let slice = &mut self.slices[slot as usize];
            slice.sealed = true;
            owes |= std::mem::take(&mut slice.owes);
        }
        if owes && !mutant!("qcow2_no_fence_in_writeback") {
            self.reserve.fence_begins();
            self.flush_files(cx);
            return Step::Wait(State::Writeback(WritebackState::Fence));
        }
        self.write_batch(cx)
    }

    /// Writes copies of as much as there is room for; then there is no more to write.
    fn write_batch(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let unit = 1 << self.geometry.slice_bits();
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
            return Step::Wait(State::Writeback(WritebackState::Write));
        }
        if self.writeback.current.is_empty() && self.writeback.freeing.is_empty() {
            return self.writeback_ended(Ok(()), cx);
        }
        if self.header.is_doubted() {
            return self.change_header(State::Writeback(WritebackState::Header), |_| {}, cx);
        }
        if mutant!("qcow2_writeback_not_flushed") {
            return self.writeback_flushed(Ok(()), cx);
        }
        self.flush_files(cx);
        Step::Wait(State::Writeback(WritebackState::Flush))
    }

    fn write_staged(&mut self, (offset, from, len): (u64, usize, usize), cx: &mut Cx<'_>) {
        let base = Base::Region(self.regions.staging);
        let seg = Seg { base, off: from as u32, len: len as u32 };
        cx.issue(Op::write(self.file, offset, Segs::one(seg)));
    }

    /// Copies the next taken slice or L1 block to `off` of the staging region; where does it go?
    fn stage(&mut self, off: usize, cx: &mut Cx<'_>) -> Option<u64> {
        let bits = self.geometry.slice_bits();
        if let Some(slot) = self.writeback.taken.pop() {
            self.writeback.staged.push(Staged::Slice(slot));
            let slot = slot as usize;
            self.tables.copy_to_region(slot, self.regions.staging, off, cx.mem());
            self.slices[slot].dirty = false;
            self.slices[slot].sealed = false;
            cx.wake_all(self.tables.waiters(slot));
            let guest =
                self.tables.key(slot) << (self.geometry.cluster_bits() + self.slice_entry_bits());
            return Some(self.slice_offset(guest));
        }
        let block = self.writeback.taken_l1.pop()?;
        self.writeback.staged.push(Staged::Root(block));
        let first = (block as usize) << (bits - 3);
        let bytes = &mut cx.mem().region_mut(self.regions.staging)[off..off + (1 << bits)];
        for (i, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = self.l1.get(first + i).copied().unwrap_or(0).to_be_bytes();
        }
        if self.writeback.taken_l1.is_empty() {
            self.writeback.l1_sealed = false;
            cx.wake_all(&mut self.writeback.l1_waiters);
        }
        Some(self.header.l1_offset() + (u64::from(block) << bits))
    }

    fn batch_written(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<State> {
        let result = if mutant!("qcow2_table_error_ignored") { Ok(()) } else { result };
        while let Some(staged) = self.writeback.staged.pop() {
            match (staged, result) {
                (Staged::Slice(slot), Ok(())) => self.unpin(slot as usize, cx),
                (Staged::Root(_), Ok(())) => {}
                // Nobody knows which of them are on disk: all are written again.
                (Staged::Slice(slot), Err(_)) => {
                    self.touch(slot as usize, false);
                    self.unpin(slot as usize, cx);
                }
                (Staged::Root(block), Err(_)) => self.writeback.touch_l1(block, false),
            }
        }
        match result {
            Ok(()) => self.write_batch(cx),
            Err(errno) => self.writeback_failed(errno, cx),
        }
    }

    /// What was taken and not written is as it was before.
    fn writeback_failed(&mut self, errno: Errno, cx: &mut Cx<'_>) -> Step<State> {
        while let Some(slot) = self.writeback.taken.pop() {
            let slice = &mut self.slices[slot as usize];
            slice.sealed = false;
            // The fence may have failed.
            slice.owes = true;
            self.writeback.dirty.push(slot);
            cx.wake_all(self.tables.waiters(slot as usize));
        }
        while let Some(block) = self.writeback.taken_l1.pop() {
            self.writeback.touch_l1(block, true);
        }
        self.writeback.l1_sealed = false;
        cx.wake_all(&mut self.writeback.l1_waiters);
        self.writeback_flushed(Err(errno), cx)
    }

    fn writeback_flushed(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<State> {
        let writeback = &mut self.writeback;
        match result {
            Ok(()) => {
                let epoch = writeback.freed_in;
                let freed = writeback.freeing.drain(..);
                self.reserve.take_in(freed, epoch);
            }
            Err(_) => writeback.frees.append(&mut writeback.freeing),
        }
        self.writeback_ended(result, cx)
    }

    fn writeback_ended(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<State> {
        let writeback = &mut self.writeback;
        writeback.running = false;
        writeback.result = result;
        if let Err(errno) = result {
            writeback.attempts.failed(errno);
        }
        cx.wake_all(&mut writeback.current);
        cx.wake_all(&mut writeback.room);
        cx.wake_all(&mut self.tables.full);
        if std::mem::take(&mut self.writeback.again) || !self.writeback.next.is_empty() {
            self.ask_for_writeback(cx);
        }
        self.reserve_if_low(cx);
        Step::Done(result)
    }
}
