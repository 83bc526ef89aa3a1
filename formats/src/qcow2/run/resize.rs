//! What changes the header of a running image: a guest's resize, a longer refcount table, the
//! corrupt mark. One of them at a time; the header's fields go out as one sector.
//!
//! A disk grows in three steps: the L1 table, if it is too short, is copied to new clusters and made
//! stable, and a write of the header names it; while it moves, no L2 table is linked. Then what the
//! disk gains is zeroed, by a zero write to this very node, and made stable. Then the header says
//! the size. To shrink, the header says the size first; then what lies behind it is cleared.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, OpKind, Seg, Segs, Target};
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::Errno;
use cowbell_engine::wait::WaitList;

use crate::qcow2::disk::header::{
    self, AUTOCLEAR_RAW_DATA, INCOMPAT_CORRUPT, L1_BYTES_MAX, SECTOR,
};
use crate::qcow2::rest::open::Opened;
use crate::qcow2::run::writeback::Free;
use crate::qcow2::run::{Qcow2, State};

/// The header of a running image.
#[derive(Clone, Hash, Debug)]
pub(super) struct Header {
    /// As it is on disk.
    on_disk: header::Header,
    /// As it is being written.
    next: header::Header,
    /// Somebody is changing it; others wait.
    busy: bool,
    /// Nobody knows what is on disk: a write of it has failed. The next writeback writes it again.
    pub is_doubted: bool,
    pub waiters: WaitList,
    /// Somebody is resizing the disk; others wait.
    resizing: bool,
    resizers: WaitList,
    /// The L1 table is moving: no entry of it changes.
    pub moving_l1: bool,
    /// A longer L1 table: its first cluster.
    root: u64,
    pub raw_external: bool,
    has_snapshots: bool,
}

impl Header {
    pub fn new(opened: &Opened) -> Header {
        let header = opened.header.clone();
        Header {
            next: header.clone(),
            busy: false,
            is_doubted: false,
            waiters: WaitList::new(),
            resizing: false,
            resizers: WaitList::new(),
            moving_l1: false,
            root: 0,
            raw_external: header.has_data_file() && header.autoclear & AUTOCLEAR_RAW_DATA != 0,
            has_snapshots: header.snapshot_count > 0,
            on_disk: header,
        }
    }

    pub fn l1_offset(&self) -> u64 {
        self.on_disk.l1_offset
    }

    pub fn assert_idle(&self) {
        assert!(!self.busy && self.waiters.is_empty(), "the header is busy");
        assert!(!self.resizing && self.resizers.is_empty() && !self.moving_l1, "a resize");
    }
}

impl Qcow2 {
    /// Writes the header as it is to be; its turn is the caller's.
    fn write_header(&mut self, cx: &mut Cx<'_>) {
        let bytes = cx.mem().region_mut(self.regions.header);
        bytes[..SECTOR as usize].copy_from_slice(&self.header.next.sector());
        let base = Base::Region(self.regions.header);
        let seg = Seg { base, off: 0, len: SECTOR as u32 };
        cx.issue(Op::write(self.file, 0, Segs::one(seg)));
    }

    /// The header is on disk, stably, or nobody knows; the next one's turn.
    fn free_header(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) {
        match result {
            Ok(()) => self.header.on_disk = self.header.next.clone(),
            Err(_) => self.header.next = self.header.on_disk.clone(),
        }
        self.header.is_doubted = result.is_err() && !mutant!("qcow2_header_not_doubted");
        self.header.busy = false;
        cx.wake_all(&mut self.header.waiters);
    }

    /// Chore: says on disk that the image is corrupt.
    pub(super) fn write_corrupt_mark(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.geometry.version() < 3 {
            return Step::Done(Ok(()));
        }
        if self.header.busy {
            cx.park(&mut self.header.waiters);
            return Step::Wait(State::MarkCorrupt);
        }
        self.header.busy = true;
        self.header.next.set_incompatible(INCOMPAT_CORRUPT, true);
        self.write_header(cx);
        Step::Wait(State::MarkCorrupt)
    }

    pub(super) fn corrupt_marked(
        &mut self,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        self.free_header(result, cx);
        Step::Done(result)
    }

    /// Chore: names another refcount table in the header.
    pub(super) fn link_refcount_table(
        &mut self,
        offset: u64,
        clusters: u32,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if self.header.busy {
            cx.park(&mut self.header.waiters);
            return Step::Wait(State::ReserveHeader);
        }
        self.header.busy = true;
        self.header.next.refcount_table_offset = offset;
        self.header.next.refcount_table_clusters = clusters;
        self.write_header(cx);
        Step::Wait(State::ReserveHeader)
    }

    /// That header is stable, or not.
    pub(super) fn refcount_table_linked(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) {
        self.free_header(result, cx);
    }

    /// The writeback's part: writes the header again as it is in memory.
    pub(super) fn write_doubted(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.header.busy {
            cx.park(&mut self.header.waiters);
            return Step::Wait(State::WritebackHeader);
        }
        self.header.busy = true;
        self.write_header(cx);
        Step::Wait(State::WritebackHeader)
    }

    /// That header is stable, or not.
    pub(super) fn doubted_written(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) {
        self.free_header(result, cx);
    }

    /// Guest resize.
    pub(super) fn resize(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        let l1_bytes = self.geometry.l1_entries(size).checked_mul(8);
        if !size.is_multiple_of(SECTOR) || l1_bytes.is_none_or(|bytes| bytes > L1_BYTES_MAX) {
            return Step::Done(Err(Errno::INVALID));
        }
        // Version 2 does not say how large a snapshot's disk is.
        if self.header.has_snapshots && !self.geometry.has_zero_clusters() {
            return Step::Done(Err(Errno::NOT_SUPPORTED));
        }
        if self.header.resizing {
            cx.park(&mut self.header.resizers);
            return Step::Wait(State::Resize);
        }
        self.header.resizing = true;
        if size > self.size { self.grow_l1(cx) } else { self.write_change(cx) }
    }

    pub(super) fn step_resize(
        &mut self,
        state: State,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let result = match event {
            Event::Io(result) => result,
            _ if state == State::ResizeSwept => self.writeback.result(),
            _ => Ok(()),
        };
        match (state, event, result) {
            (State::WriteHeader | State::FlushHeader, _, Err(errno)) => {
                self.free_header(Err(errno), cx);
                self.resized(Err(errno), cx)
            }
            (_, _, Err(errno)) => self.resized(Err(errno), cx),
            (State::Resize, Event::Woken, _) => self.resize(cx),
            (State::ResizeSpace { attempt }, Event::Woken, _) => {
                match self.reserve.failure_of(attempt) {
                    Some(errno) => self.resized(Err(errno), cx),
                    None => self.grow_l1(cx),
                }
            }
            (State::ResizeSwept, Event::Woken, _) if self.header.moving_l1 => self.write_l1(0, cx),
            (State::ResizeSwept, Event::Woken, _) if self.size == self.reach => {
                self.resized(Ok(()), cx)
            }
            (State::ResizeSwept, Event::Woken, _) => self.write_change(cx),
            (State::WriteL1 { from }, Event::Io(_), _) => self.write_l1(from, cx),
            (State::FlushRoot, Event::Io(_), _) => self.write_change(cx),
            (State::WriteHeader, Event::Woken, _) => self.write_change(cx),
            (State::WriteHeader, Event::Io(_), _) => {
                self.flush_files(cx);
                Step::Wait(State::FlushHeader)
            }
            (State::FlushHeader, Event::Io(_), _) => self.changed(cx),
            (State::DataLength, Event::Io(_), _) => self.clear_beyond(cx),
            (State::ClearBeyond, Event::Io(_), _) => self.cleared(cx),
            (state, event, _) => panic!("{event:?} in {state:?}"),
        }
    }

    /// Clusters of the L1 table that a disk of this size needs, if there are fewer entries.
    fn l1_clusters(&self, size: u64) -> Option<u64> {
        let needed = self.geometry.l1_entries(size);
        let is_short = needed > self.l1.len() as u64;
        is_short.then(|| (needed * 8).div_ceil(self.geometry.cluster_size()))
    }

    fn grow_l1(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let Some(count) = self.l1_clusters(cx.io().offset) else {
            return self.set_data_length(cx);
        };
        match self.take_contiguous(count, cx) {
            Ok(first) => self.header.root = first,
            Err(step) => return step,
        }
        // First everything that is changed in the old table, while nothing more is.
        self.header.moving_l1 = true;
        self.park_for_writeback(cx);
        Step::Wait(State::ResizeSwept)
    }

    /// Writes the longer L1 table from entry `from` on, a piece at a time.
    fn write_l1(&mut self, from: u32, cx: &mut Cx<'_>) -> Step<State> {
        let bits = self.geometry.slice_bits();
        let count = self.l1_clusters(cx.io().offset).expect("it is too short");
        let entries = (count << self.geometry.cluster_bits()) / 8;
        if u64::from(from) >= entries {
            if mutant!("qcow2_root_linked_unstable") {
                return self.write_change(cx);
            }
            self.flush_files(cx);
            return Step::Wait(State::FlushRoot);
        }
        let bytes = &mut cx.mem().region_mut(self.regions.root)[..1 << bits];
        for (i, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = self.l1.get(from as usize + i).copied().unwrap_or(0).to_be_bytes();
        }
        let seg = Seg { base: Base::Region(self.regions.root), off: 0, len: 1 << bits };
        let offset = (self.header.root << self.geometry.cluster_bits()) + u64::from(from) * 8;
        cx.issue(Op::write(self.file, offset, Segs::one(seg)));
        Step::Wait(State::WriteL1 { from: from + (1 << (bits - 3)) })
    }

    /// Writes the header that names the longer L1 table, or else the size.
    fn write_change(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        if self.header.busy {
            cx.park(&mut self.header.waiters);
            return Step::Wait(State::WriteHeader);
        }
        self.header.busy = true;
        if self.header.moving_l1 {
            self.header.next.l1_offset = self.header.root << self.geometry.cluster_bits();
            self.header.next.l1_size = self.geometry.l1_entries(size) as u32;
        } else {
            self.header.next.size = size;
        }
        self.write_header(cx);
        Step::Wait(State::WriteHeader)
    }

    /// The header says so, stably.
    fn changed(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        if self.header.moving_l1 {
            self.l1_moved(size, cx);
            return self.set_data_length(cx);
        }
        self.free_header(Ok(()), cx);
        let is_smaller = size < self.size;
        (self.size, self.reach) = (size, size);
        if is_smaller { self.set_data_length(cx) } else { self.resized(Ok(()), cx) }
    }

    /// The longer L1 table is the image's; the old one's place is free.
    fn l1_moved(&mut self, size: u64, cx: &mut Cx<'_>) {
        let bits = self.geometry.cluster_bits();
        let count = self.l1_clusters(size).expect("it was too short");
        let first = self.header.on_disk.l1_offset >> bits;
        let old = first..first + (self.l1.len() as u64 * 8).div_ceil(1 << bits);
        self.free_l1(first, old.end - old.start);
        for cluster in old {
            self.metadata.remove(&cluster);
        }
        self.metadata.extend(self.header.root..self.header.root + count);
        self.l1.resize(self.geometry.l1_entries(size) as usize, 0);
        self.free_header(Ok(()), cx);
        self.l1_at_rest(cx);
    }

    /// Nothing leads to these clusters of an L1 table, once a header is stable.
    fn free_l1(&mut self, first: u64, count: u64) {
        if count > 0 {
            self.writeback.free(Free { first, count, sole: true, discard: false });
        }
    }

    /// The L1 table moves no more.
    fn l1_at_rest(&mut self, cx: &mut Cx<'_>) {
        self.header.moving_l1 = false;
        cx.wake_all(&mut self.writeback.l1_waiters);
    }

    /// A data file is as long as the disk, if it is no device; growing cuts nothing off one that is
    /// longer.
    fn set_data_length(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        let is_long = self.size < size && size <= cx.file_len(self.data);
        if self.data == self.file || !self.data_can_grow || is_long {
            return self.clear_beyond(cx);
        }
        cx.issue(Op::bare(OpKind::Truncate, self.data, size, 0));
        Step::Wait(State::DataLength)
    }

    /// Growing: zeroes what the disk gains. Otherwise: clears what lies behind its end.
    fn clear_beyond(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        let target = Target::Node(cx.node());
        let op = |kind, offset, to| {
            let (len, segs) = (to - offset, Segs::none());
            Op { kind, target, offset, len, segs }
        };
        let zero = OpKind::Zero { unmap: true };
        if self.size < size {
            self.reach = size;
            if self.is_raw_external() || mutant!("qcow2_gained_not_zeroed") {
                return self.write_change(cx);
            }
            cx.issue(op(zero, self.size, size));
            return Step::Wait(State::ClearBeyond);
        }
        if self.data != self.file {
            return self.cleared(cx);
        }
        // The disk was larger, so its tables map this cluster.
        let whole = size.next_multiple_of(self.geometry.cluster_size());
        let end = (self.l1.len() as u64) << self.geometry.l2_span_bits();
        if size < whole {
            cx.issue(op(zero, size, whole));
        }
        cx.issue(op(OpKind::Discard, whole, end.max(whole)));
        Step::Wait(State::ClearBeyond)
    }

    fn cleared(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.size < self.reach && mutant!("qcow2_size_before_zeros") {
            return self.write_change(cx);
        }
        self.park_for_writeback(cx);
        Step::Wait(State::ResizeSwept)
    }

    fn resized(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<State> {
        if self.header.moving_l1 {
            let count = self.l1_clusters(cx.io().offset).expect("it is too short");
            self.free_l1(self.header.root, count);
            self.l1_at_rest(cx);
        }
        self.reach = self.size;
        self.header.resizing = false;
        cx.wake_all(&mut self.header.resizers);
        Step::Done(result)
    }

    /// Chore: the engine is drained. All that is in memory goes to disk, what is in reserve is
    /// counted down, the file's spare end is cut off.
    pub(super) fn step_settle(
        &mut self,
        state: State,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match (state, event) {
            (State::Settle, Event::Start) if self.corrupt.are_counts() && !self.is_dirty() => {
                self.flush_settled(cx)
            }
            (State::Settle, Event::Start) if self.is_dirty() => {
                self.park_for_writeback(cx);
                Step::Wait(State::Settle)
            }
            (State::Settle, Event::Start) => self.empty_reserve(cx),
            (State::Settle, Event::Woken) => match self.writeback.result() {
                // What is in reserve stays counted: a leak.
                Ok(()) if self.corrupt.are_counts() => self.flush_settled(cx),
                Ok(()) => self.empty_reserve(cx),
                Err(errno) => Step::Done(Err(errno)),
            },
            (State::EmptyReserve, Event::Woken) if !self.reserve.is_settled() => {
                self.empty_reserve(cx)
            }
            (State::EmptyReserve, Event::Woken) => match self.reserve_emptied() {
                Ok(()) => self.cut_end(cx),
                Err(errno) => Step::Done(Err(errno)),
            },
            (State::CutEnd, Event::Io(Ok(()))) => {
                self.reserve.cut();
                self.flush_settled(cx)
            }
            // The spare end may still be there, with whatever was in it: it is as it was before.
            (State::CutEnd, Event::Io(Err(errno))) => {
                if mutant!("qcow2_failed_cut_is_done") {
                    self.reserve.cut();
                }
                Step::Done(Err(errno))
            }
            (State::FlushSettled, Event::Io(result)) => Step::Done(result),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn cut_end(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match self.reserve.spare_end() {
            Some(end) => {
                cx.issue(Op::bare(OpKind::Truncate, self.file, end, 0));
                Step::Wait(State::CutEnd)
            }
            None => self.flush_settled(cx),
        }
    }

    fn flush_settled(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        self.flush_files(cx);
        Step::Wait(State::FlushSettled)
    }
}
