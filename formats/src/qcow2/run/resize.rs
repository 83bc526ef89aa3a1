//! A guest resizes its disk.
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

use crate::qcow2::disk::header::{self, L1_BYTES_MAX, SECTOR};
use crate::qcow2::run::writeback::Free;
use crate::qcow2::run::{Qcow2, State};

/// What a resize awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ResizeState {
    /// Its turn.
    Turn,
    /// Clusters for a longer L1 table.
    Space {
        /// Which attempt of the reserve is to give them.
        attempt: u32,
    },
    /// A longer L1 table, written.
    WriteL1 {
        /// Up to this entry.
        from: u32,
    },
    /// The longer L1 table, stable.
    FlushL1,
    /// The data file's new length.
    DataLength,
    /// What lies between the sizes, zeroed or given up.
    ClearBeyond,
    /// A writeback.
    Swept,
    /// The header's turn, or the header, written.
    WriteHeader,
    /// The header, stable.
    FlushHeader,
}

/// Who is resizing, and how far it is.
#[derive(Clone, Hash, Debug, Default)]
pub(super) struct Resizing {
    /// Somebody is; others wait.
    busy: bool,
    waiters: WaitList,
    /// The L1 table is moving: no entry of it changes.
    moving_l1: bool,
    /// A longer L1 table: its first cluster.
    l1_first: u64,
}

impl Resizing {
    /// Is the L1 table moving? Then no entry of it changes.
    pub fn moves_l1(&self) -> bool {
        self.moving_l1
    }

    pub fn assert_idle(&self) {
        assert!(!self.busy && self.waiters.is_empty() && !self.moving_l1, "a resize");
    }
}

impl Qcow2 {
    /// Guest resize.
    pub(super) fn resize(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        let l1_bytes = self.geometry.l1_entries(size).checked_mul(8);
        if !size.is_multiple_of(SECTOR) || l1_bytes.is_none_or(|bytes| bytes > L1_BYTES_MAX) {
            return Step::Done(Err(Errno::INVALID));
        }
        // Version 2 does not say how large a snapshot's disk is.
        if self.header.has_snapshots() && !self.geometry.has_zero_clusters() {
            return Step::Done(Err(Errno::NOT_SUPPORTED));
        }
        if self.resizing.busy {
            cx.park(&mut self.resizing.waiters);
            return Step::Wait(State::Resize(ResizeState::Turn));
        }
        self.resizing.busy = true;
        if size > self.size { self.grow_l1(cx) } else { self.write_change(cx) }
    }

    pub(super) fn step_resize(
        &mut self,
        state: ResizeState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let result = match event {
            Event::Io(result) => result,
            _ if state == ResizeState::Swept => self.writeback.result(),
            _ => Ok(()),
        };
        match (state, event, result) {
            (ResizeState::WriteHeader | ResizeState::FlushHeader, _, Err(errno)) => {
                self.header_changed(Err(errno), cx);
                self.resized(Err(errno), cx)
            }
            (_, _, Err(errno)) => self.resized(Err(errno), cx),
            (ResizeState::Turn, Event::Woken, _) => self.resize(cx),
            (ResizeState::Space { attempt }, Event::Woken, _) => {
                match self.reserve.failure_of(attempt) {
                    Some(errno) => self.resized(Err(errno), cx),
                    None => self.grow_l1(cx),
                }
            }
            (ResizeState::Swept, Event::Woken, _) if self.resizing.moving_l1 => {
                self.write_l1(0, cx)
            }
            (ResizeState::Swept, Event::Woken, _) if self.size == self.reach => {
                self.resized(Ok(()), cx)
            }
            (ResizeState::Swept, Event::Woken, _) => self.write_change(cx),
            (ResizeState::WriteL1 { from }, Event::Io(_), _) => self.write_l1(from, cx),
            (ResizeState::FlushL1, Event::Io(_), _) => self.write_change(cx),
            (ResizeState::WriteHeader, Event::Woken, _) => self.write_change(cx),
            (ResizeState::WriteHeader, Event::Io(_), _) => {
                self.flush_files(cx);
                Step::Wait(State::Resize(ResizeState::FlushHeader))
            }
            (ResizeState::FlushHeader, Event::Io(_), _) => self.changed(cx),
            (ResizeState::DataLength, Event::Io(_), _) => self.clear_beyond(cx),
            (ResizeState::ClearBeyond, Event::Io(_), _) => self.cleared(cx),
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
            Ok(first) => self.resizing.l1_first = first,
            Err(step) => return step,
        }
        // First everything that is changed in the old table, while nothing more is.
        self.resizing.moving_l1 = true;
        self.park_for_writeback(cx);
        Step::Wait(State::Resize(ResizeState::Swept))
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
            return Step::Wait(State::Resize(ResizeState::FlushL1));
        }
        let bytes = &mut cx.mem().region_mut(self.regions.root)[..1 << bits];
        for (i, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = self.l1.get(from as usize + i).copied().unwrap_or(0).to_be_bytes();
        }
        let seg = Seg { base: Base::Region(self.regions.root), off: 0, len: 1 << bits };
        let offset = (self.resizing.l1_first << self.geometry.cluster_bits()) + u64::from(from) * 8;
        cx.issue(Op::write(self.file, offset, Segs::one(seg)));
        Step::Wait(State::Resize(ResizeState::WriteL1 { from: from + (1 << (bits - 3)) }))
    }

    /// Writes the header that names the longer L1 table, or else the size.
    fn write_change(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        let (moves, l1) = (self.resizing.moving_l1, self.resizing.l1_first);
        let geometry = self.geometry;
        let change = |header: &mut header::Header| {
            if moves {
                header.l1_offset = l1 << geometry.cluster_bits();
                header.l1_size = geometry.l1_entries(size) as u32;
            } else {
                header.size = size;
            }
        };
        self.change_header(State::Resize(ResizeState::WriteHeader), change, cx)
    }

    /// The header says so, stably.
    fn changed(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        if self.resizing.moving_l1 {
            self.l1_moved(size, cx);
            return self.set_data_length(cx);
        }
        self.header_changed(Ok(()), cx);
        let is_smaller = size < self.size;
        (self.size, self.reach) = (size, size);
        if is_smaller { self.set_data_length(cx) } else { self.resized(Ok(()), cx) }
    }

    /// The longer L1 table is the image's; the old one's place is free.
    fn l1_moved(&mut self, size: u64, cx: &mut Cx<'_>) {
        let bits = self.geometry.cluster_bits();
        let count = self.l1_clusters(size).expect("it was too short");
        let first = self.header.l1_offset() >> bits;
        let old = first..first + (self.l1.len() as u64 * 8).div_ceil(1 << bits);
        self.free_l1(first, old.end - old.start);
        for cluster in old {
            self.metadata.remove(&cluster);
        }
        self.metadata.extend(self.resizing.l1_first..self.resizing.l1_first + count);
        self.l1.resize(self.geometry.l1_entries(size) as usize, 0);
        self.header_changed(Ok(()), cx);
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
        self.resizing.moving_l1 = false;
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
        Step::Wait(State::Resize(ResizeState::DataLength))
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
            return Step::Wait(State::Resize(ResizeState::ClearBeyond));
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
        Step::Wait(State::Resize(ResizeState::ClearBeyond))
    }

    fn cleared(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.size < self.reach && mutant!("qcow2_size_before_zeros") {
            return self.write_change(cx);
        }
        self.park_for_writeback(cx);
        Step::Wait(State::Resize(ResizeState::Swept))
    }

    fn resized(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<State> {
        if self.resizing.moving_l1 {
            let count = self.l1_clusters(cx.io().offset).expect("it is too short");
            self.free_l1(self.resizing.l1_first, count);
            self.l1_at_rest(cx);
        }
        self.reach = self.size;
        self.resizing.busy = false;
        cx.wake_all(&mut self.resizing.waiters);
        Step::Done(result)
    }
}
