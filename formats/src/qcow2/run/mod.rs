//! qcow2 as a state machine: the image, the states, and where each leads.
//!
//! ```text
//!            ┌──────────────── look again ◄─────────────────────────────────┐
//! Next ──────┤ slice not there ─> LoadSlice ────────────────────────────────┤
//!  │ │ │ │   │ no L2 table, or a shared one ─> [ZeroTable | CopyTable] ─────┤
//!  │ │ │ │   └ no space, a claim, a buffer, … : parked where it lacks ──────┘
//!  │ │ │ └─ compressed: ReadCompressed ─> Inflate ─> Next
//!  │ │ └─── mapped, zero, or several pieces: Pieces (all ops joined) ─> Next
//!  │ └───── allocate: [Cow] ─> WriteData ─> Publish ─> Next
//!  └─────── end of the range: [Swept] ─> done
//!
//! resize, by its own states: [Space ─> Swept ─> WriteL1 ─> FlushL1 ─> WriteHeader ─> FlushHeader]
//!          ─> [DataLength] ─> ClearBeyond ─> Swept, before WriteHeader ─> FlushHeader
//!          if the disk grows, and after them if it shrinks                   (resize.rs)
//! chores:  Writeback: Turn ─> [Fence] ─> Write ─> [Header] ─> Flush          (writeback.rs)
//!          Reserve: Turn ─> Load, Grow, Write; Table ─> Link or Header       (reserve.rs)
//!          Close: Turn ─> EmptyReserve ─> [CutEnd] ─> Flush                  (close.rs)
//! ```
//!
//! Metadata is written back: a write is done when its data is, its L2 entry changed in memory. Two
//! chores do the rest, one of each at a time, beside the requests and never in their way:
//!
//! - the *writeback* writes changed L2 slices and L1 blocks, from copies, and makes them stable. A
//!   guest's flush waits for the first writeback that begins after it came;
//! - the *reserve* keeps clusters at hand whose refcount is 1, and which nothing refers to. Requests
//!   allocate from it, in memory, while the count is on its way to disk; the writeback waits for
//!   that. Nobody else touches refcounts.
//!
//! # Why a crash leaves leaks at worst
//! See `DESIGN.md`; in short: (1) what an entry can point at is counted, stably, before a table with
//! that entry is written; (2) an entry that exposes bytes which would be wrong if the data were
//! lost *owes a fence*: its slice is written only after a flush of that data; (3) a reference is
//! given up on disk only after the entry that held it is gone from disk, stably, and nobody in
//! flight can still use what it led to; (4) tables come from space that reads as zeros, or are
//! filled and fenced before anything leads to them.

mod allocate;
mod close;
mod compressed;
mod corrupt;
mod l2_table;
mod live_header;
mod lookup;
mod reserve;
mod resize;
mod writeback;
mod zero_discard;

use std::collections::BTreeSet;

use cowbell_engine::mem::Memory;
use cowbell_engine::op::{Compute, Op, Segs, Target};
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Pass, Step};
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{BufId, Errno, FileId, HostOffset, NodeId, RegionId, Time};

use crate::parts::backing::Backing;
use crate::parts::claims::Claims;
use crate::parts::cow::CowState;
use crate::parts::growth::Growth;
use crate::qcow2::disk::layout::{Geometry, L1Entry};
use crate::qcow2::rest::open::Opened;
use crate::qcow2::run::allocate::Claim;
use crate::qcow2::run::compressed::{codec, slot_bytes};
use crate::qcow2::run::corrupt::Corrupt;
use crate::qcow2::run::l2_table::TableAlloc;

use crate::qcow2::run::close::CloseState;
use crate::qcow2::run::live_header::Header;
use crate::qcow2::run::reserve::{Reserve, ReserveState};
use crate::qcow2::run::resize::{ResizeState, Resizing};
use crate::qcow2::run::writeback::{Slice, Writeback, WritebackState};

/// How a qcow2 image is run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Qcow2Options {
    /// Memory for L2 tables, in slices of 4096 bytes or one cluster, whichever is less.
    pub cache_slices: usize,
    /// How many inflated clusters are kept.
    pub cache_inflated: usize,
    /// How the file grows.
    pub growth: Growth,
    /// The most clusters that are counted ahead of their use: what a crash may leak.
    pub reserve_max: u64,
    /// Are clusters that a guest discards given back to the file system?
    pub pass_discards: bool,
    /// Clusters that are counted at once at first; doubled at each need, up to `reserve_max`.
    pub reserve_min: u64,
    /// Runs of clusters that were given up and may wait for a writeback; at least 1.
    pub frees_max: usize,
    /// Changed slices and L1 blocks that are written back at once, from copies; at least 1.
    pub writeback_depth: usize,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Qcow2Options {
            cache_slices: 2048,
            cache_inflated: 8,
            growth: Growth::default(),
            reserve_max: 2048,
            reserve_min: 64,
            frees_max: 1024,
            pass_discards: true,
            writeback_depth: 64,
        }
    }
}

/// The memory that an image's tables and copies live in.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Regions {
    /// L2 slices.
    tables: RegionId,
    /// Inflated clusters, each behind its compressed bytes.
    inflated: RegionId,
    /// Copies of what a writeback writes.
    staging: RegionId,
    /// The piece of a refcount block, or of the refcount table, that the reserve works on.
    counts: RegionId,
    /// What whoever changes the header writes.
    header: RegionId,
    /// A piece of a longer L1 table.
    root: RegionId,
}

impl Regions {
    /// The memory for an image of this geometry. `region` makes one of so many bytes.
    pub fn new(
        geometry: Geometry,
        options: &Qcow2Options,
        mut region: impl FnMut(usize) -> RegionId,
    ) -> Regions {
        let slice = 1 << geometry.slice_bits();
        let pair = slot_bytes(geometry);
        Regions {
            tables: region(TableCache::bytes_for(slice, options.cache_slices)),
            inflated: region(TableCache::bytes_for(pair, options.cache_inflated)),
            staging: region(options.writeback_depth.max(1) * slice),
            counts: region(slice),
            header: region(slice),
            root: region(slice),
        }
    }
}

/// An opened qcow2 image: all of its state.
#[derive(Clone, Hash, Debug)]
pub struct Qcow2 {
    /// Metadata; data too, unless that has a file of its own.
    file: FileId,
    data: FileId,
    geometry: Geometry,
    size: u64,
    /// Where its last cluster is cut: its size, or what that is growing to.
    reach: u64,
    writable: bool,
    /// Is the data in a file that can be made longer or shorter?
    data_can_grow: bool,
    backing: Option<Backing>,
    /// Metadata was found that cannot be right. See `corrupt.rs`.
    corrupt: Corrupt,
    codec: Compute,
    /// As on disk, but for the byte order.
    l1: Vec<u64>,
    tables: TableCache,
    /// What there is to know about each of the cache's slots.
    slices: Vec<Slice>,
    /// What is being allocated.
    claims: Claims<Claim>,
    allocs: Vec<TableAlloc>,
    reserve: Reserve,
    writeback: Writeback,
    inflated: TableCache,
    header: Header,
    resizing: Resizing,
    /// Clusters that hold metadata: no data is written there, whatever a table says.
    metadata: BTreeSet<u64>,
    regions: Regions,
    options: Qcow2Options,
}

/// A request's state, named by what it awaits. `at` is the first byte of the guest range not yet
/// done; `claim` the key of the request's own claim; `buf` a buffer that it holds.
#[expect(missing_docs, reason = "said above, once")]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// Nothing, or whatever it was parked on: look up what is at `at`.
    Next { at: u64 },
    /// As `Next`, for clusters that attempt number `attempt` to get some was to bring.
    Space { at: u64, attempt: u32 },
    /// As `Next`, for room in memory that writeback number `attempt` was to make.
    Room { at: u64, attempt: u32 },
    /// The ops of the pieces up to `at`, pieces with requests of their own among them.
    Pieces { at: u64 },
    /// A slice of an L2 table on its way into `slot`.
    LoadSlice { at: u64, slot: u32 },
    /// The `bytes` of a compressed cluster, on their way into `slot`.
    ReadCompressed { at: u64, slot: u32, bytes: u32 },
    /// That cluster, inflated.
    Inflate { at: u64, slot: u32 },
    /// A new L2 table's place, filled with zeros.
    ZeroTable { at: u64, l1_index: u32 },
    /// A piece of a shared L2 table, read; `done` bytes of the table are copied.
    ReadTable { at: u64, l1_index: u32, done: u32, buf: BufId },
    /// That piece, written to the table's copy.
    CopyTable { at: u64, l1_index: u32, done: u32, buf: BufId },
    /// The turn to change an L1 block that a writeback is about to write.
    LinkTable { at: u64, l1_index: u32 },
    /// What the new clusters hold around the write.
    Cow { claim: u32, state: CowState },
    /// Head, guest data and tail, written as one.
    WriteData { claim: u32 },
    /// The turn to change a slice that a writeback is about to write.
    Publish { claim: u32 },
    /// Room for what the entries give up, that writeback number `attempt` was to make.
    PublishRoom { claim: u32, attempt: u32 },
    /// A writeback that began after the request came.
    Swept,
    /// A guest's resize.
    Resize(ResizeState),
    /// Chore: the header with the corrupt mark, written.
    MarkCorrupt,
    /// Chore: changed tables go to disk.
    Writeback(WritebackState),
    /// Chore: the reserve of clusters is filled, or emptied.
    Reserve(ReserveState),
    /// Chore: the image is left clean.
    Close(CloseState),
}

/// The label of a flush that is all that is left to do; of data ops likewise.
const FLUSH: u8 = 12;
const PIECES: u8 = 2;

impl Qcow2 {
    /// The image that `opened` describes, in `file`, with its data in `data`. Can it be written to,
    /// and each of the two be made longer?
    pub fn new(
        (file, data): (FileId, FileId),
        opened: Opened,
        (writable, can_grow, data_can_grow): (bool, bool, bool),
        backing: Option<Backing>,
        regions: Regions,
        options: Qcow2Options,
    ) -> Qcow2 {
        let geometry = opened.geometry();
        let unit = 1 << geometry.slice_bits();
        let tables = TableCache::new(regions.tables, unit, options.cache_slices);
        let pair = slot_bytes(geometry);
        let slots = tables.len();
        Qcow2 {
            file,
            data,
            geometry,
            size: opened.header.disk_size(),
            reach: opened.header.disk_size(),
            writable,
            data_can_grow,
            backing,
            corrupt: Corrupt::default(),
            codec: codec(opened.header.compression),
            slices: vec![Slice::default(); slots],
            tables,
            claims: Claims::new(),
            allocs: Vec::with_capacity(4),
            reserve: Reserve::new(&opened, can_grow, options),
            writeback: Writeback::new(slots, &options),
            inflated: TableCache::new(regions.inflated, pair, options.cache_inflated),
            metadata: if writable { metadata_of(&opened) } else { BTreeSet::new() },
            header: Header::new(&opened),
            resizing: Resizing::default(),
            l1: opened.l1,
            regions,
            options,
        }
    }

    /// The clusters' geometry.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Panics if something is claimed, pinned, parked or busy. For tests, at rest.
    pub fn assert_idle(&self) {
        // What could not be written stays in memory.
        self.tables.assert_idle(|slot| self.slices[slot].is_dirty().into());
        self.inflated.assert_idle(|_| 0);
        assert!(self.claims.is_empty() && self.allocs.is_empty(), "something is claimed");
        self.writeback.assert_idle();
        self.reserve.assert_idle();
        self.header.assert_idle();
        self.resizing.assert_idle();
    }

    fn begin_io(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match cx.io().kind {
            IoKind::Flush => self.flush(cx),
            IoKind::Read | IoKind::Status { .. } => self.walk(cx.io().offset, cx),
            _ if !self.writable => Step::Done(Err(Errno::READ_ONLY)),
            IoKind::Truncate => self.resize(cx),
            _ => self.walk(cx.io().offset, cx),
        }
    }

    /// The whole range is done.
    fn end(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match cx.io().kind {
            IoKind::Write { fua: true } | IoKind::Zero { fua: true, .. } => self.flush(cx),
            _ => Step::Done(Ok(())),
        }
    }

    /// Flushes the file, and the data's own if it has one.
    fn flush_files(&self, cx: &mut Cx<'_>) {
        cx.issue(Op::flush(self.file));
        if self.data != self.file {
            cx.issue(Op::flush(self.data));
        }
    }

    fn read_op(&self, offset: u64, segs: Segs) -> Op {
        Op::read(Target::File(self.file), offset, segs)
    }

    /// log2 of the entries in a slice of an L2 table.
    #[inline]
    fn slice_entry_bits(&self) -> u32 {
        self.geometry.slice_bits() - self.geometry.entry_bits()
    }

    /// The key of the slice that maps the guest's byte `at`.
    #[inline]
    fn slice_key(&self, at: u64) -> u64 {
        at >> (self.geometry.cluster_bits() + self.slice_entry_bits())
    }

    /// The index in its slice of the entry for the guest's byte `at`.
    #[inline]
    fn slice_index(&self, at: u64) -> usize {
        (at >> self.geometry.cluster_bits()) as usize & ((1 << self.slice_entry_bits()) - 1)
    }

    /// One past the last guest byte that the slice of `at` maps.
    #[inline]
    fn slice_end(&self, at: u64) -> u64 {
        let bits = self.geometry.cluster_bits() + self.slice_entry_bits();
        ((at >> bits) + 1) << bits
    }

    /// Does the host range hold metadata? What a table leads to never does, in a sound image.
    #[inline]
    fn hits_metadata(&self, host: u64, len: u64) -> bool {
        let bits = self.geometry.cluster_bits();
        let (first, last) = (host >> bits, (host + len - 1) >> bits);
        self.data == self.file && self.metadata.range(first..=last).next().is_some()
    }
}

/// The clusters that hold metadata; of snapshots, their L1 tables. As many as the tables, which are
/// in memory too, have entries.
fn metadata_of(opened: &Opened) -> BTreeSet<u64> {
    let (geometry, header) = (opened.geometry(), &opened.header);
    let bits = geometry.cluster_bits();
    let mut clusters = BTreeSet::from([0]);
    let mut area = |offset: u64, len: u64| {
        if len > 0 && offset.checked_add(len).is_some() {
            clusters.extend(offset >> bits..=(offset + len - 1) >> bits);
        }
    };
    area(header.l1_offset, opened.l1.len() as u64 * 8);
    area(header.refcount_table_offset, header.refcount_table_bytes());
    for snapshot in &opened.snapshots {
        area(snapshot.l1_offset, u64::from(snapshot.l1_size) * 8);
    }
    for &block in opened.refcount_table.iter().filter(|&&block| block != 0) {
        area(block, 1);
    }
    for &word in &opened.l1 {
        if let Ok(Some(entry)) = L1Entry::decode(word, geometry) {
            area(entry.table.0, 1);
        }
    }
    clusters
}

impl Driver for Qcow2 {
    type State = State;

    const STATES: &'static [&'static str] = &[
        "lookup",
        "space",
        "pieces",
        "load-slice",
        "read-compressed",
        "inflate",
        "table",
        "link-table",
        "read-cow",
        "copy",
        "write-data",
        "publish",
        "flush",
        "swept",
        "resize",
        "writeback",
        "reserve",
        "close",
    ];

    #[inline]
    fn label(state: &State) -> usize {
        match state {
            State::Next { .. } => 0,
            State::Space { .. } | State::Room { .. } => 1,
            State::Pieces { .. } => 2,
            State::LoadSlice { .. } => 3,
            State::ReadCompressed { .. } => 4,
            State::Inflate { .. } => 5,
            State::ZeroTable { .. } | State::ReadTable { .. } | State::CopyTable { .. } => 6,
            State::LinkTable { .. } => 7,
            State::Cow { state: CowState::Bufs | CowState::Read, .. } => 8,
            State::Cow { .. } => 9,
            State::WriteData { .. } => 10,
            State::Publish { .. } | State::PublishRoom { .. } => 11,
            State::Swept => 13,
            State::Resize(ResizeState::Space { .. }) => 1,
            State::Resize(_) | State::MarkCorrupt => 14,
            State::Writeback(_) => 15,
            State::Reserve(_) => 16,
            State::Close(_) => 17,
        }
    }

    #[inline]
    fn size(&self) -> u64 {
        self.size
    }

    fn uses(&self, file: FileId) -> bool {
        file == self.file || file == self.data
    }

    fn below(&self) -> Option<NodeId> {
        self.backing.map(|backing| backing.node)
    }

    #[inline(always)]
    fn pass_on(&mut self, io: &Io, mem: &Memory) -> Option<Pass> {
        let passes = match io.kind {
            IoKind::Read => true,
            // A stable one is flushed, tables and all.
            IoKind::Write { fua } => self.writable && !fua,
            _ => false,
        };
        let offset = if passes { self.in_one_piece(io, mem)? } else { return None };
        Some(Pass { file: self.data, offset, label: PIECES })
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        self.begin_io(cx)
    }

    fn chore(&mut self, chore: Chore) -> Option<State> {
        match chore {
            Chore::Asked if std::mem::take(&mut self.corrupt.wants_mark) => {
                Some(State::MarkCorrupt)
            }
            Chore::Asked if self.writeback.begin_asked() => {
                Some(State::Writeback(WritebackState::Turn))
            }
            Chore::Asked if self.reserve.begin_asked() => Some(State::Reserve(ReserveState::Turn)),
            Chore::Asked | Chore::Deadline => None,
            Chore::Settle => self.writable.then_some(State::Close(CloseState::Turn)),
        }
    }

    #[inline]
    fn deadline(&self) -> Option<Time> {
        None
    }

    #[inline]
    fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        match (state, event) {
            (State::WriteData { claim }, Event::Io(result)) => self.data_written(claim, result, cx),
            (State::Next { at }, Event::Start | Event::Woken) => self.walk(at, cx),
            (State::Pieces { at }, Event::Io(Ok(()))) => self.walk(at, cx),
            (State::Pieces { .. }, Event::Io(error)) => Step::Done(error),
            (state, event) => self.step_rarely(state, event, cx),
        }
    }
}

impl Qcow2 {
    #[inline(never)]
    fn step_rarely(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        use Event::{Io, Start, Woken};
        match (state, event) {
            (State::Space { at, attempt }, Woken) => match self.reserve.failure_of(attempt) {
                Some(errno) if self.reserve.is_empty() => Step::Done(Err(errno)),
                _ => self.walk(at, cx),
            },
            (State::Room { at, attempt }, Woken) => match self.no_room(attempt) {
                Some(errno) => Step::Done(Err(errno)),
                None => self.walk(at, cx),
            },
            (State::LoadSlice { at, slot }, Io(result)) => {
                self.slice_loaded(at, slot as usize, result, cx)
            }
            (State::ReadCompressed { at, slot, bytes }, Io(result)) => {
                self.compressed_read(at, (slot as usize, bytes), result, cx)
            }
            (State::Inflate { at, slot }, Io(result)) => {
                self.cluster_inflated(at, slot as usize, result, cx)
            }
            (State::ZeroTable { at, l1_index }, Io(result)) => {
                self.table_filled(at, l1_index, result, cx)
            }
            (State::ReadTable { at, l1_index, done, buf }, Io(result)) => {
                self.table_read(at, (l1_index, done, buf), result, cx)
            }
            (State::CopyTable { at, l1_index, done, buf }, Io(result)) => {
                self.table_copied(at, (l1_index, done, buf), result, cx)
            }
            (State::LinkTable { at, l1_index }, Woken) => self.link_table(at, l1_index, cx),
            (State::Cow { claim, state }, event) => self.copy(claim, state, event, cx),
            (State::Publish { claim }, Woken) => self.publish(claim, cx),
            (State::PublishRoom { claim, attempt }, Woken) => {
                self.publish_in_room(claim, attempt, cx)
            }
            (State::Swept, Woken) => Step::Done(self.writeback.result()),
            (State::MarkCorrupt, Start | Woken) => self.write_corrupt_mark(cx),
            (State::MarkCorrupt, Io(result)) => self.corrupt_marked(result, cx),
            (State::Resize(state), event) => self.step_resize(state, event, cx),
            (State::Writeback(state), event) => self.step_writeback(state, event, cx),
            (State::Reserve(state), event) => self.step_reserve(state, event, cx),
            (State::Close(state), event) => self.step_close(state, event, cx),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// The host offset of the L2 table that maps `at`, which has one.
    fn table_of(&self, at: u64) -> HostOffset {
        let l1_index = at >> self.geometry.l2_span_bits();
        let entry = L1Entry::decode(self.l1[l1_index as usize], self.geometry);
        entry.ok().flatten().expect("its slice was loaded through this entry").table
    }

    /// Where the slice that maps `at` is in the file.
    fn slice_offset(&self, at: u64) -> u64 {
        let index = self.geometry.l2_index(cowbell_engine::units::GuestOffset(at));
        let slice = index >> self.slice_entry_bits();
        self.table_of(at).0 + (slice << self.geometry.slice_bits())
    }
}
