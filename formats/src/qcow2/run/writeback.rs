//! The writeback: writing changed metadata back.
//!
//! ```text
//! Counts ─> [Fence] ─> Write ─> … once for each round … ─> [Header] ─> Flush
//! ```
//!
//! One chore, one writeback at a time. It *takes* the L2 slices and L1 blocks that are changed when it
//! begins, and writes them in rounds, as many at once as there is memory for copies. A round waits
//! until the clusters in use are counted, copies, makes stable the data that entries owe a fence
//! for, and writes the copies. When all is written it is made stable. Whoever wants a flush waits for the
//! first writeback that begins after he came: any number go with one.
//!
//! What changes after it was copied goes with the next writeback; no change waits for this one. A
//! changed slice is pinned, and stays in memory until it is written. A header whose write has
//! failed goes with the next writeback.
//!
//! References that were given up in memory (`Free`) leave with the writeback after: when it has made
//! stable that nothing on disk refers to them, they go to the reserve.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::Errno;
use cowbell_engine::wait::{On, WaitList};

use crate::parts::attempts::Attempts;
use crate::qcow2::disk::layout::Mapping;
use crate::qcow2::run::image::{Image, Qcow2Options};
use crate::qcow2::run::live_header::LiveHeader;
use crate::qcow2::run::packing::Packing;
use crate::qcow2::run::reserve::{Free, Reserve};
use crate::qcow2::run::tables::Tables;

/// What the chore awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum WritebackState {
    /// The counts of clusters in use, stable.
    Counts {
        /// Has it taken what is changed?
        begun: bool,
    },
    /// Host clusters of compressed ones, written: those that entries among the copies lead to.
    Packed {
        /// The one that is being written, if this chore writes it.
        buffer: Option<u32>,
    },
    /// The data that the copies owe a fence for, stable.
    Fence,
    /// Copies, written.
    Write {
        /// Up to this one.
        next: u32,
    },
    /// The header's turn, or the header, written again.
    Header,
    /// All of it, stable.
    Flush,
}

/// What a copy is of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Copied {
    /// The slice in this slot.
    Slice(u32),
    /// This block of the L1 table.
    L1(u32),
}

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Writeback {
    asked: bool,
    running: bool,
    again: bool,
    /// Is memory ahead of the disk? By the slots in the cache.
    is_changed: Vec<bool>,
    /// Slots of changed slices, and changed L1 blocks, that no writeback has taken.
    dirty: Vec<u32>,
    dirty_l1: Vec<u32>,
    /// Must data be stable before some of it is written?
    owes: bool,
    /// What this writeback has taken and not copied, last first.
    taken: Vec<u32>,
    taken_l1: Vec<u32>,
    /// What it has copied, and where in the file that goes; so many at most.
    copies: Vec<(Copied, u64)>,
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
            is_changed: vec![false; slots],
            dirty: Vec::with_capacity(slots),
            dirty_l1: Vec::with_capacity(slots),
            owes: false,
            taken: Vec::with_capacity(slots),
            taken_l1: Vec::with_capacity(slots),
            copies: Vec::with_capacity(depth),
            depth,
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
        self.is_changed[slot]
    }

    /// A slice was changed in memory. If much is changed, some of it had better be written before
    /// somebody has to wait for that.
    #[inline]
    pub fn touch(&mut self, slot: usize, owes: bool, tables: &mut Tables, cx: &mut Cx<'_>) {
        self.owes |= owes;
        if !std::mem::replace(&mut self.is_changed[slot], true) {
            tables.slices.pin(slot);
            self.dirty.push(slot as u32);
        }
        let (dirty, frees) = (self.dirty.len(), self.frees.len());
        if !self.running && (dirty > self.is_changed.len() / 2 || frees > self.frees_max / 2) {
            self.ask(cx);
        }
    }

    /// A block of the L1 table was changed in memory.
    pub fn touch_l1(&mut self, block: u32, owes: bool) {
        self.owes |= owes;
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
            cx.park(&mut self.current, On::Writeback);
        } else {
            self.park(cx);
        }
        true
    }

    /// Parks the request until all that was changed before is stable.
    pub fn park(&mut self, cx: &mut Cx<'_>) {
        cx.park(&mut self.next, On::Writeback);
        self.ask(cx);
    }

    /// Asks for one that begins later.
    pub fn ask(&mut self, cx: &mut Cx<'_>) {
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
        cx.park(&mut tables.slices.full, On::CacheSlot);
        // Nobody waits for a writeback that is not asked for: slots come back otherwise, too.
        let asked = self.running || self.asked;
        self.attempts.latest().wrapping_add(u32::from(!asked))
    }

    /// Too much has been given up: a writeback is to make it leave. Parks the request; answers the
    /// writeback's number.
    pub fn park_for_room(&mut self, cx: &mut Cx<'_>) -> u32 {
        cx.park(&mut self.room, On::Writeback);
        self.ask(cx);
        self.attempts.latest()
    }

    /// Why there is no room, if the writeback that was to make it failed. Then it is no use to ask for
    /// another: after a failed flush every one fails.
    pub fn no_room(&self, attempt: u32) -> Option<Errno> {
        let failure = self.attempts.failure_of(attempt);
        failure.filter(|_| !mutant!("qcow2_asks_again_after_a_failed_writeback"))
    }

    pub fn assert_idle(&self) {
        assert!(!self.running && !self.asked, "a writeback is under way");
        assert!(self.next.is_empty() && self.current.is_empty() && self.room.is_empty());
        assert!(self.taken.is_empty() && self.taken_l1.is_empty() && self.copies.is_empty());
    }
}

/// A step of the chore: the writeback, and what it works with.
pub(super) struct WritebackStep<'a> {
    pub image: &'a Image,
    pub writeback: &'a mut Writeback,
    pub tables: &'a mut Tables,
    pub header: &'a mut LiveHeader,
    pub reserve: &'a mut Reserve,
    pub packing: &'a mut Packing,
}

impl WritebackStep<'_> {
    pub fn run(
        &mut self,
        state: WritebackState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        match (state, event) {
            (WritebackState::Counts { begun }, Event::Start) => {
                self.when_counted(begun, Ok(()), cx)
            }
            (WritebackState::Counts { begun }, Event::Woken) => {
                self.when_counted(begun, self.reserve.result(), cx)
            }
            (WritebackState::Packed { buffer: None }, Event::Woken) => self.write_packed(cx),
            (WritebackState::Packed { buffer: Some(buffer) }, Event::Io(result)) => {
                self.packing.written(buffer, result, cx);
                if result.is_ok() { self.write_packed(cx) } else { self.ended(result, cx) }
            }
            (WritebackState::Fence, Event::Io(Ok(()))) if mutant!("qcow2_copied_after_fence") => {
                self.writeback.owes = false;
                self.copy(cx)
            }
            (WritebackState::Fence, Event::Io(Ok(()))) => self.write(0, cx),
            (WritebackState::Write { next }, Event::Io(result))
                if result.is_ok() || mutant!("qcow2_table_error_ignored") =>
            {
                self.write(next, cx)
            }
            (WritebackState::Fence | WritebackState::Write { .. }, Event::Io(result)) => {
                self.ended(result, cx)
            }
            (WritebackState::Header, Event::Woken) => self.written(cx),
            (WritebackState::Header, Event::Io(result)) => {
                self.header.changed(result, cx);
                if result.is_ok() { self.written(cx) } else { self.ended(result, cx) }
            }
            (WritebackState::Flush, Event::Io(result)) => self.ended(result, cx),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// Begins a round if what is in use is counted; no table is written if that failed.
    fn when_counted(
        &mut self,
        begun: bool,
        counted: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        let is_uncounted = self.reserve.is_uncounted();
        if is_uncounted && counted.is_ok() {
            self.reserve.park_for_counts(cx);
            return Step::Wait(WritebackState::Counts { begun });
        }
        if !begun {
            self.begin(cx);
        }
        if is_uncounted { self.ended(counted, cx) } else { self.copy(cx) }
    }

    fn begin(&mut self, cx: &mut Cx<'_>) {
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
    }

    /// Copies as much as there is room for, and makes stable what it relies on; then it is written.
    fn copy(&mut self, cx: &mut Cx<'_>) -> Step<WritebackState> {
        let owes = std::mem::take(&mut self.writeback.owes);
        if owes && mutant!("qcow2_copied_after_fence") {
            self.image.flush_files(cx);
            return Step::Wait(WritebackState::Fence);
        }
        while self.writeback.copies.len() < self.writeback.depth && self.copy_next(cx) {}
        if !owes || mutant!("qcow2_no_fence_in_writeback") {
            return self.write(0, cx);
        }
        if mutant!("qcow2_packed_after_tables") {
            self.image.flush_files(cx);
            return Step::Wait(WritebackState::Fence);
        }
        self.packing.begin_to_write();
        self.write_packed(cx)
    }

    /// Writes what is packed; then makes it stable.
    fn write_packed(&mut self, cx: &mut Cx<'_>) -> Step<WritebackState> {
        if let Some(buffer) = self.packing.next_due() {
            self.packing.write(buffer, cx);
            return Step::Wait(WritebackState::Packed { buffer: Some(buffer) });
        }
        if self.packing.park_for_writes(cx) {
            return Step::Wait(WritebackState::Packed { buffer: None });
        }
        self.image.flush_files(cx);
        Step::Wait(WritebackState::Fence)
    }

    /// Copies the next slice or L1 block that was taken, if there is one, and notes where it goes.
    fn copy_next(&mut self, cx: &mut Cx<'_>) -> bool {
        let bits = self.image.geometry.slice_bits();
        let (region, off) = (self.image.regions.staging, self.writeback.copies.len() << bits);
        if let Some(slot) = self.writeback.taken.pop() {
            let slices = &self.tables.slices;
            slices.copy_to_region(slot as usize, region, off, cx.mem());
            self.writeback.is_changed[slot as usize] = false;
            let guest = slices.key(slot as usize) << self.image.geometry.slice_span_bits();
            let offset = self.tables.slice_offset(guest);
            self.writeback.copies.push((Copied::Slice(slot), offset));
            return true;
        }
        let Some(block) = self.writeback.taken_l1.pop() else { return false };
        let bytes = &mut cx.mem().region_mut(region)[off..off + (1 << bits)];
        self.tables.copy_l1((block as usize) << (bits - 3), bytes);
        let offset = self.header.l1_offset() + (u64::from(block) << bits);
        self.writeback.copies.push((Copied::L1(block), offset));
        true
    }

    /// Writes the copies from number `next` on, those that follow each other in the file at once.
    fn write(&mut self, next: u32, cx: &mut Cx<'_>) -> Step<WritebackState> {
        let unit = 1 << self.image.geometry.slice_bits();
        let copies = &self.writeback.copies;
        let (mut next, count) = (next as usize, copies.len());
        if next == count {
            return self.copies_written(cx);
        }
        while next < count && cx.room() > 0 {
            let first = next;
            next += 1;
            while next < count && copies[next].1 == copies[next - 1].1 + unit {
                next += 1;
            }
            let (off, len) = (first as u64 * unit, (next - first) as u64 * unit);
            let base = Base::Region(self.image.regions.staging);
            let seg = Seg { base, off: off as u32, len: len as u32 };
            cx.issue(Op::write(self.image.file, copies[first].1, Segs::one(seg)));
        }
        Step::Wait(WritebackState::Write { next: next as u32 })
    }

    fn copies_written(&mut self, cx: &mut Cx<'_>) -> Step<WritebackState> {
        while let Some((copied, _)) = self.writeback.copies.pop() {
            if let Copied::Slice(slot) = copied {
                self.tables.unpin(slot as usize, cx);
            }
        }
        if self.writeback.taken.is_empty() && self.writeback.taken_l1.is_empty() {
            return self.written(cx);
        }
        self.when_counted(true, Ok(()), cx)
    }

    /// All that was taken is written: it is made stable, if anybody cares.
    fn written(&mut self, cx: &mut Cx<'_>) -> Step<WritebackState> {
        let Writeback { current, freeing, .. } = &*self.writeback;
        if current.is_empty() && freeing.is_empty() && !self.reserve.awaits_writeback() {
            return self.ended(Ok(()), cx);
        }
        if self.header.is_doubted() {
            self.header.change(|_| {}, cx);
            return Step::Wait(WritebackState::Header);
        }
        if mutant!("qcow2_writeback_not_flushed") {
            return self.ended(Ok(()), cx);
        }
        self.image.flush_files(cx);
        Step::Wait(WritebackState::Flush)
    }

    /// What was taken has changed still: nobody knows what of it is on disk, nor whether the fence
    /// was one. What was given up has not left.
    fn take_back(&mut self, cx: &mut Cx<'_>) {
        let writeback = &mut *self.writeback;
        writeback.owes = true;
        writeback.dirty.append(&mut writeback.taken);
        while let Some(block) = writeback.taken_l1.pop() {
            writeback.touch_l1(block, true);
        }
        while let Some((copied, _)) = writeback.copies.pop() {
            match copied {
                Copied::Slice(slot) => {
                    writeback.touch(slot as usize, true, self.tables, cx);
                    self.tables.unpin(slot as usize, cx);
                }
                Copied::L1(block) => writeback.touch_l1(block, true),
            }
        }
        writeback.frees.append(&mut writeback.freeing);
    }

    fn ended(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<WritebackState> {
        match result {
            Ok(()) => {
                let freed = self.writeback.freeing.drain(..);
                self.reserve.take_in(freed, self.writeback.freed_in);
            }
            Err(errno) => {
                self.packing.nothing_is_due();
                self.take_back(cx);
                self.writeback.attempts.failed(errno);
            }
        }
        let writeback = &mut *self.writeback;
        (writeback.running, writeback.result) = (false, result);
        cx.wake_all(&mut writeback.current);
        cx.wake_all(&mut writeback.room);
        cx.wake_all(&mut self.tables.slices.full);
        if std::mem::take(&mut self.writeback.again) || !self.writeback.next.is_empty() {
            self.writeback.ask(cx);
        }
        self.reserve.writeback_ended(cx);
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
        assert_eq!((writeback.dirty_l1, writeback.owes), (vec![3, 5], true));
    }
}
