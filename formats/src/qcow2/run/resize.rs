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
use cowbell_engine::wait::{On, WaitList};

use crate::qcow2::disk::header::{self, L1_BYTES_MAX, SECTOR};
use crate::qcow2::run::image::{Disk, Image};
use crate::qcow2::run::live_header::LiveHeader;
use crate::qcow2::run::metadata::Metadata;
use crate::qcow2::run::reserve::{Free, Reserve, Short};
use crate::qcow2::run::tables::Tables;
use crate::qcow2::run::writeback::Writeback;

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
    /// The header's turn, or the header, stable.
    WriteHeader,
}

/// Who is resizing, and how far it is.
#[derive(Clone, Hash, Debug, Default)]
pub(super) struct Resize {
    /// Somebody is; others wait.
    busy: bool,
    waiters: WaitList,
    /// A longer L1 table: its first cluster.
    l1_first: u64,
}

impl Resize {
    pub fn assert_idle(&self) {
        assert!(!self.busy && self.waiters.is_empty(), "a resize");
    }
}

/// A step of a resize, and what it works with.
pub(super) struct ResizeStep<'a> {
    pub image: &'a Image,
    pub resize: &'a mut Resize,
    pub disk: &'a mut Disk,
    pub tables: &'a mut Tables,
    pub metadata: &'a mut Metadata,
    pub header: &'a mut LiveHeader,
    pub writeback: &'a mut Writeback,
    pub reserve: &'a mut Reserve,
}

impl ResizeStep<'_> {
    /// Guest resize.
    pub fn begin(&mut self, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let size = cx.io().offset;
        let l1_bytes = self.image.geometry.l1_entries(size).checked_mul(8);
        if !size.is_multiple_of(SECTOR) || l1_bytes.is_none_or(|bytes| bytes > L1_BYTES_MAX) {
            return Step::Done(Err(Errno::INVALID));
        }
        // Version 2 does not say how large a snapshot's disk is.
        if self.header.has_snapshots() && !self.image.geometry.has_zero_clusters() {
            return Step::Done(Err(Errno::NOT_SUPPORTED));
        }
        if self.resize.busy {
            cx.park(&mut self.resize.waiters, On::Resize);
            return Step::Wait(ResizeState::Turn);
        }
        self.resize.busy = true;
        if size > self.disk.size() { self.grow_l1(cx) } else { self.write_change(cx) }
    }

    pub fn run(&mut self, state: ResizeState, event: Event, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let result = match event {
            Event::Io(result) => result,
            _ if state == ResizeState::Swept => self.writeback.result(),
            _ => Ok(()),
        };
        match (state, event, result) {
            (ResizeState::WriteHeader, _, Err(errno)) => {
                self.header.changed(Err(errno), cx);
                self.resized(Err(errno), cx)
            }
            (_, _, Err(errno)) => self.resized(Err(errno), cx),
            (ResizeState::Turn, Event::Woken, _) => self.begin(cx),
            (ResizeState::Space { attempt }, Event::Woken, _) => {
                match self.reserve.failure_of(attempt) {
                    Some(errno) => self.resized(Err(errno), cx),
                    None => self.grow_l1(cx),
                }
            }
            (ResizeState::Swept, Event::Woken, _) if self.tables.l1_moves() => self.write_l1(0, cx),
            (ResizeState::Swept, Event::Woken, _) if self.disk.size() == self.disk.reach() => {
                self.resized(Ok(()), cx)
            }
            (ResizeState::Swept, Event::Woken, _) => self.write_change(cx),
            (ResizeState::WriteL1 { from }, Event::Io(_), _) => self.write_l1(from, cx),
            (ResizeState::FlushL1, Event::Io(_), _) => self.write_change(cx),
            (ResizeState::WriteHeader, Event::Woken, _) => self.write_change(cx),
            (ResizeState::WriteHeader, Event::Io(_), _) => self.changed(cx),
            (ResizeState::DataLength, Event::Io(_), _) => self.clear_beyond(cx),
            (ResizeState::ClearBeyond, Event::Io(_), _) => self.cleared(cx),
            (state, event, _) => panic!("{event:?} in {state:?}"),
        }
    }

    /// Clusters of the L1 table that a disk of this size needs, if there are fewer entries.
    fn l1_clusters(&self, size: u64) -> Option<u64> {
        let needed = self.image.geometry.l1_entries(size);
        let is_short = needed > self.tables.l1_len();
        is_short.then(|| (needed * 8).div_ceil(self.image.geometry.cluster_size()))
    }

    fn grow_l1(&mut self, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let Some(count) = self.l1_clusters(cx.io().offset) else {
            return self.set_data_length(cx);
        };
        match self.reserve.take_contiguous(count, cx) {
            Ok(first) => self.resize.l1_first = first,
            Err(Short::Failed(errno)) => return self.resized(Err(errno), cx),
            Err(Short::Later(attempt)) => return Step::Wait(ResizeState::Space { attempt }),
        }
        // First everything that is changed in the old table, while nothing more is.
        self.tables.move_l1();
        self.writeback.park(cx);
        Step::Wait(ResizeState::Swept)
    }

    /// Writes the longer L1 table from entry `from` on, a piece at a time.
    fn write_l1(&mut self, from: u32, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let bits = self.image.geometry.slice_bits();
        let count = self.l1_clusters(cx.io().offset).expect("it is too short");
        let entries = (count << self.image.geometry.cluster_bits()) / 8;
        if u64::from(from) >= entries {
            if mutant!("qcow2_root_linked_unstable") {
                return self.write_change(cx);
            }
            self.image.flush_files(cx);
            return Step::Wait(ResizeState::FlushL1);
        }
        let bytes = &mut cx.mem().region_mut(self.image.regions.l1)[..1 << bits];
        self.tables.copy_l1(from as usize, bytes);
        let seg = Seg { base: Base::Region(self.image.regions.l1), off: 0, len: 1 << bits };
        let offset =
            (self.resize.l1_first << self.image.geometry.cluster_bits()) + u64::from(from) * 8;
        cx.issue(Op::write(self.image.file, offset, Segs::one(seg)));
        Step::Wait(ResizeState::WriteL1 { from: from + (1 << (bits - 3)) })
    }

    /// Writes the header that names the longer L1 table, or else the size.
    fn write_change(&mut self, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let size = cx.io().offset;
        let (moves, l1) = (self.tables.l1_moves(), self.resize.l1_first);
        let geometry = self.image.geometry;
        let change = |header: &mut header::Header| {
            if moves {
                header.l1_offset = l1 << geometry.cluster_bits();
                header.l1_size = geometry.l1_entries(size) as u32;
            } else {
                header.size = size;
            }
        };
        self.header.change(change, cx);
        Step::Wait(ResizeState::WriteHeader)
    }

    /// The header says so, stably.
    fn changed(&mut self, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let size = cx.io().offset;
        if self.tables.l1_moves() {
            self.l1_moved(size, cx);
            return self.set_data_length(cx);
        }
        self.header.changed(Ok(()), cx);
        let is_smaller = size < self.disk.size();
        self.disk.set_size(size);
        if is_smaller { self.set_data_length(cx) } else { self.resized(Ok(()), cx) }
    }

    /// The longer L1 table is the image's; the old one's place is free.
    fn l1_moved(&mut self, size: u64, cx: &mut Cx<'_>) {
        let bits = self.image.geometry.cluster_bits();
        let count = self.l1_clusters(size).expect("it was too short");
        let first = self.header.l1_offset() >> bits;
        let old = first..first + (self.tables.l1_len() * 8).div_ceil(1 << bits);
        self.free_l1(first, old.end - old.start);
        self.metadata.remove(old);
        self.metadata.add(self.resize.l1_first..self.resize.l1_first + count);
        self.tables.grow_l1(self.image.geometry.l1_entries(size) as usize);
        self.header.changed(Ok(()), cx);
        self.tables.l1_at_rest(cx);
    }

    /// Nothing leads to these clusters of an L1 table, once a header is stable.
    fn free_l1(&mut self, first: u64, count: u64) {
        if count > 0 {
            self.writeback.free(Free { first, count, sole: true, discard: false });
        }
    }

    /// A data file is as long as the disk, if it is no device; growing cuts nothing off one that is
    /// longer.
    fn set_data_length(&mut self, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let size = cx.io().offset;
        let is_long = self.disk.size() < size && size <= cx.file_len(self.image.data);
        if !self.image.has_data_file() || !self.image.data_can_grow || is_long {
            return self.clear_beyond(cx);
        }
        cx.issue(Op::bare(OpKind::Truncate, self.image.data, size, 0));
        Step::Wait(ResizeState::DataLength)
    }

    /// Growing: zeroes what the disk gains. Otherwise: clears what lies behind its end.
    fn clear_beyond(&mut self, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let size = cx.io().offset;
        let target = Target::Node(cx.node());
        let op = |kind, offset, to| {
            let (len, segs) = (to - offset, Segs::none());
            Op { kind, target, offset, len, segs }
        };
        let zero = OpKind::Zero { unmap: true };
        if self.disk.size() < size {
            self.disk.set_reach(size);
            if self.header.is_raw_external() || mutant!("qcow2_gained_not_zeroed") {
                return self.write_change(cx);
            }
            cx.issue(op(zero, self.disk.size(), size));
            return Step::Wait(ResizeState::ClearBeyond);
        }
        if self.image.has_data_file() {
            return self.cleared(cx);
        }
        // The disk was larger, so its tables map this cluster.
        let whole = size.next_multiple_of(self.image.geometry.cluster_size());
        let end = (self.tables.l1_len()) << self.image.geometry.l2_span_bits();
        if size < whole {
            cx.issue(op(zero, size, whole));
        }
        cx.issue(op(OpKind::Discard, whole, end.max(whole)));
        Step::Wait(ResizeState::ClearBeyond)
    }

    fn cleared(&mut self, cx: &mut Cx<'_>) -> Step<ResizeState> {
        if self.disk.size() < self.disk.reach() && mutant!("qcow2_size_before_zeros") {
            return self.write_change(cx);
        }
        self.writeback.park(cx);
        Step::Wait(ResizeState::Swept)
    }

    fn resized(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<ResizeState> {
        if self.tables.l1_moves() {
            let count = self.l1_clusters(cx.io().offset).expect("it is too short");
            self.free_l1(self.resize.l1_first, count);
            self.tables.l1_at_rest(cx);
        }
        self.disk.set_reach(self.disk.size());
        self.resize.busy = false;
        cx.wake_all(&mut self.resize.waiters);
        Step::Done(result)
    }
}
