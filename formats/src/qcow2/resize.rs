//! What changes the header of a running image: a guest's resize, a longer refcount table, the
//! corrupt mark. One of them at a time; the header's fields go out as one sector.
//!
//! Growing: the L1 table, if it is too short, is copied to new clusters and made stable; then one
//! write of the header names it, and the size. While it moves, no L2 table is linked. Shrinking:
//! what lies beyond the new size is cleared and made stable; then the header says so.

use cowbell_engine::op::{Base, Op, OpKind, Seg, Segs, Target};
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::{Errno, HostOffset};
use cowbell_engine::wait::WaitList;

use super::driver::{Qcow2, State};
use super::header::{self, AUTOCLEAR_RAW_DATA, INCOMPAT_CORRUPT, L1_BYTES_MAX, SECTOR};
use super::layout::Mapping;
use super::open::Opened;

/// The header of a running image.
#[derive(Clone, Hash, Debug)]
pub(super) struct Header {
    /// As it is on disk.
    on_disk: header::Header,
    /// As it is being written.
    next: header::Header,
    /// Somebody is changing it; others wait.
    busy: bool,
    pub waiters: WaitList,
    /// The L1 table is moving: no entry of it changes.
    pub moving_root: bool,
    /// A longer L1 table: its first cluster.
    root: u64,
    pub mark_corrupt: bool,
    pub raw_external: bool,
    has_snapshots: bool,
}

impl Header {
    pub fn new(opened: &Opened) -> Header {
        let header = opened.header.clone();
        Header {
            next: header.clone(),
            busy: false,
            waiters: WaitList::new(),
            moving_root: false,
            root: 0,
            mark_corrupt: false,
            raw_external: header.has_data_file() && header.autoclear & AUTOCLEAR_RAW_DATA != 0,
            has_snapshots: header.snapshot_count > 0,
            on_disk: header,
        }
    }

    pub fn l1_offset(&self) -> u64 {
        self.on_disk.l1_offset
    }

    pub fn assert_idle(&self) {
        assert!(!self.busy && self.waiters.is_empty() && !self.moving_root, "the header is busy");
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
        self.header.busy = false;
        self.header.moving_root = false;
        cx.wake_all(&mut self.header.waiters);
        cx.wake_all(&mut self.sweep.root_waiters);
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
            return Step::Wait(State::StockHeader);
        }
        self.header.busy = true;
        self.header.next.refcount_table_offset = offset;
        self.header.next.refcount_table_clusters = clusters;
        self.write_header(cx);
        Step::Wait(State::StockHeader)
    }

    /// That header is stable, or not.
    pub(super) fn refcount_table_linked(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) {
        self.free_header(result, cx);
    }

    /// Guest resize.
    pub(super) fn resize(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        let l1_bytes = self.geometry.l1_entries(size).checked_mul(8);
        if !size.is_multiple_of(SECTOR) || l1_bytes.is_none_or(|bytes| bytes > L1_BYTES_MAX) {
            return Step::Done(Err(Errno::INVALID));
        }
        // A longer backing file would shine through where the guest is to see zeros; a table of
        // version 2, or a data file, cannot hide what is cut off from a later, larger size.
        let uncovers = size > self.size && self.backing.is_some_and(|b| b.size > self.size);
        let cannot_clear =
            self.data != self.file || self.backing.is_some() && !self.geometry.has_zero_clusters();
        let loses = self.header.has_snapshots && !self.geometry.has_zero_clusters();
        if uncovers || loses || (size < self.size && cannot_clear) {
            return Step::Done(Err(Errno::NOT_SUPPORTED));
        }
        if self.header.busy {
            cx.park(&mut self.header.waiters);
            return Step::Wait(State::Resize);
        }
        self.header.busy = true;
        if size >= self.size {
            return self.grow_root(cx);
        }
        let cluster = self.geometry.cluster_size();
        let whole = size.next_multiple_of(cluster).min(self.size);
        let target = Target::Node(cx.node());
        if size < whole {
            let segs = Segs::one(Seg::zeros((whole - size) as u32));
            let kind = OpKind::Write { fua: false };
            cx.issue(Op { kind, target, offset: size, len: whole - size, segs });
        }
        if whole < self.size {
            let (kind, len) = (OpKind::Discard, self.size - whole);
            cx.issue(Op { kind, target, offset: whole, len, segs: Segs::none() });
        }
        Step::Wait(State::Resize)
    }

    pub(super) fn step_resize(
        &mut self,
        state: State,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match (state, event) {
            (State::Resize, Event::Woken) => self.resize(cx),
            // What was beyond is cleared, in memory.
            (State::Resize, Event::Io(Ok(()))) => {
                self.park_for_sweep(cx);
                Step::Wait(State::ResizeSwept)
            }
            (State::ResizeSwept, Event::Woken) if self.header.moving_root => self.root_at_rest(cx),
            (State::ResizeSwept, Event::Woken) => match self.sweep.result() {
                Ok(()) => self.write_size(cx),
                Err(errno) => self.resized(Err(errno), cx),
            },
            (State::ResizeSpace { attempt }, Event::Woken) => {
                match self.stock.failure_of(attempt) {
                    Some(errno) => self.resized(Err(errno), cx),
                    None => self.grow_root(cx),
                }
            }
            (State::WriteRoot { from }, Event::Io(Ok(()))) => self.write_root(from, cx),
            (State::FlushRoot, Event::Io(Ok(()))) => self.write_size(cx),
            (State::WriteHeader, Event::Io(Ok(()))) => {
                self.flush_files(cx);
                Step::Wait(State::FlushHeader)
            }
            (State::FlushHeader, Event::Io(Ok(()))) => self.resized(Ok(()), cx),
            (_, Event::Io(Err(errno))) => self.resized(Err(errno), cx),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// L1 entries that the size being set needs and that there are not.
    fn root_clusters(&self, size: u64) -> Option<u64> {
        let needed = self.geometry.l1_entries(size);
        let is_short = needed > self.l1.len() as u64;
        is_short.then(|| (needed * 8).div_ceil(self.geometry.cluster_size()))
    }

    fn grow_root(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let Some(count) = self.root_clusters(cx.io().offset) else { return self.write_size(cx) };
        match self.take_contiguous(count, cx) {
            Ok(first) => self.header.root = first,
            Err(step) => return step,
        }
        // First everything that is changed in the old table, while nothing more is.
        self.header.moving_root = true;
        self.park_for_sweep(cx);
        Step::Wait(State::ResizeSwept)
    }

    fn root_at_rest(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match self.sweep.result() {
            Ok(()) => self.write_root(0, cx),
            Err(errno) => self.resized(Err(errno), cx),
        }
    }

    /// Writes the longer L1 table from entry `from` on, a piece at a time.
    fn write_root(&mut self, from: u32, cx: &mut Cx<'_>) -> Step<State> {
        let bits = self.geometry.slice_bits();
        let count = self.root_clusters(cx.io().offset).expect("it is too short");
        let entries = (count << self.geometry.cluster_bits()) / 8;
        if u64::from(from) >= entries {
            self.flush_files(cx);
            return Step::Wait(State::FlushRoot);
        }
        let bytes = &mut cx.mem().region_mut(self.regions.header)[..1 << bits];
        for (i, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = self.l1.get(from as usize + i).copied().unwrap_or(0).to_be_bytes();
        }
        let seg = Seg { base: Base::Region(self.regions.header), off: 0, len: 1 << bits };
        let offset = (self.header.root << self.geometry.cluster_bits()) + u64::from(from) * 8;
        cx.issue(Op::write(self.file, offset, Segs::one(seg)));
        Step::Wait(State::WriteRoot { from: from + (1 << (bits - 3)) })
    }

    /// Everything is as the new size wants it: say so.
    fn write_size(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        self.header.next.size = size;
        if self.root_clusters(size).is_some() {
            self.header.next.l1_offset = self.header.root << self.geometry.cluster_bits();
            self.header.next.l1_size = self.geometry.l1_entries(size) as u32;
        }
        self.write_header(cx);
        Step::Wait(State::WriteHeader)
    }

    fn resized(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        let bits = self.geometry.cluster_bits();
        let moved = self.root_clusters(size).filter(|_| self.header.moving_root);
        if let (Ok(()), Some(count)) = (result, moved) {
            let old = self.header.on_disk.l1_offset >> bits;
            let old_count = (self.l1.len() as u64 * 8).div_ceil(1 << bits);
            for cluster in old..old + old_count {
                self.metadata.remove(&cluster);
                self.free(Some(Mapping::Data(HostOffset(cluster << bits))), true, false);
            }
            let root = self.header.root;
            self.metadata.extend(root..root + count);
            self.l1.resize(self.geometry.l1_entries(size) as usize, 0);
        }
        if result.is_ok() {
            self.size = size;
        }
        self.free_header(result, cx);
        Step::Done(result)
    }

    /// Chore: the engine is drained. All that is in memory goes to disk, what is in stock is
    /// counted down, the file's spare end is cut off.
    pub(super) fn step_settle(
        &mut self,
        state: State,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match (state, event) {
            (State::Settle, Event::Start) if self.is_dirty() => {
                self.park_for_sweep(cx);
                Step::Wait(State::Settle)
            }
            (State::Settle, Event::Start) => self.empty_stock(cx),
            (State::Settle, Event::Woken) => match self.sweep.result() {
                Ok(()) => self.empty_stock(cx),
                Err(errno) => Step::Done(Err(errno)),
            },
            (State::EmptyStock, Event::Woken) if !self.stock.is_settled() => self.empty_stock(cx),
            (State::EmptyStock, Event::Woken) => match self.stock_emptied() {
                Ok(()) => self.cut_end(cx),
                Err(errno) => Step::Done(Err(errno)),
            },
            (State::CutEnd, Event::Io(result)) => {
                self.stock.cut();
                match result {
                    Ok(()) => self.flush_settled(cx),
                    Err(errno) => Step::Done(Err(errno)),
                }
            }
            (State::FlushSettled, Event::Io(result)) => Step::Done(result),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn cut_end(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match self.stock.spare_end() {
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
