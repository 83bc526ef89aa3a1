//! QED as a state machine: the image, the states, and where each leads.
//!
//! ```text
//!            ┌────────────── look again ◄───────────────────────────────┐
//! Next ──────┤ slice not there ─> LoadSlice ────────────────────────────┤
//!  │ │ │     │ first allocation ─> WriteMark ───────────────────────────┤
//!  │ │ │     │ no L2 table ─> TakeL1 ─> WriteL1 ────────────────────────┤
//!  │ │ │     └ no space, a claim, a buffer, … : parked where it lacks ──┘
//!  │ │ └─ mapped or zero: Pieces (all ops of the step, joined) ─> Next
//!  │ └─── allocate: [Cow] ─> WriteData ─> [Fence] ─> Link ─> WriteSlice ─> Next
//!  └───── end of the range: [FlushEnd] ─> done
//! ```
//!
//! A request walks its range piece by piece. Allocating pieces of different requests run side by
//! side: each *claims* its clusters, takes space from a bump counter, writes, and then links. What
//! freezes is only: overlapping allocations (one waits for the other's claim), requests to one L1
//! entry while its table is allocated, and all allocations while the header's need-check mark
//! changes.
//!
//! # Why a crash leaves leaks at worst
//! 1. *Space is durable zeros before anything points at it.* The file is grown ahead by a truncate
//!    and a flush (`space.rs`); only what lies below the flushed end is handed out.
//!    So no entry on disk ever points past the file's end, and a table or cluster that was linked
//!    but not yet written reads as an empty table, as zeros.
//! 2. *Where there is a backing file, data is stable before its entry is written* (state `Fence`):
//!    else a crash could replace backing contents, in and around the write, by those zeros. Where
//!    there is none, zeros are what was there before, and no fence is owed.
//! 3. *An entry is written to disk in a copy and published in memory when that write has
//!    succeeded.* Nobody relies on a link that may not exist.
//! 4. *The need-check mark is stable before the first allocation, and goes only when everything is
//!    stable, nothing is being allocated and the file's spare end is cut off.* An image without
//!    the mark has no leaks; one with it is checked when next opened.

mod allocate;
mod growth;
mod lookup;
mod need_check;

use std::hash::Hash;

use cowbell_engine::mem::Memory;
use cowbell_engine::op::{Op, Segs, Target};
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Pass, Step};
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{BufId, Errno, FileId, HostOffset, NodeId, Time};
use cowbell_engine::wait::WaitList;

use crate::parts::backing::Backing;
use crate::parts::claims::Claims;
use crate::parts::cow::CowState;
use crate::parts::growth::{FILE_MAX, Growth, Space};
use crate::parts::past_end::PastEnd;
use crate::qed::disk::layout::{Bounds, Geometry};
use crate::qed::rest::open::Opened;
use crate::qed::run::allocate::{Claim, SliceLink, TableAlloc};
use crate::qed::run::need_check::Header;

/// Bytes of a table that are cached as one.
const SLICE_BYTES: usize = 4096;
/// log2 of the entries in a slice.
const SLICE_BITS: u32 = 9;

/// How many slices map a disk of `image_size` bytes.
fn slices_of(geometry: Geometry, image_size: u64) -> u64 {
    image_size.div_ceil(geometry.cluster_size()).div_ceil(1 << SLICE_BITS)
}

/// How a QED image is run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct QedOptions {
    /// Memory for table slices, in slices of 4096 bytes (each maps 512 clusters).
    pub cache_slices: usize,
    /// How the file grows.
    pub growth: Growth,
    /// How long after the last allocation the need-check mark is taken off, in milliseconds.
    pub unmark_after_ms: u64,
}

impl Default for QedOptions {
    fn default() -> Self {
        QedOptions { cache_slices: 2048, growth: Growth::default(), unmark_after_ms: 5000 }
    }
}

/// An opened QED image: all of its state.
#[derive(Clone, Hash, Debug)]
pub struct Qed {
    file: FileId,
    geometry: Geometry,
    size: u64,
    writable: bool,
    backing: Option<Backing>,
    l1: Vec<u64>,
    tables: TableCache,
    past_end: PastEnd,
    links: Vec<SliceLink>,
    claims: Claims<Claim>,
    allocs: Vec<TableAlloc>,
    /// An L1 sector is being written; the next writer waits here.
    l1_busy: bool,
    l1_waiters: WaitList,
    space: Space,
    header: Header,
    options: QedOptions,
}

/// A request's state, named by what it awaits. `at` is the first byte of the guest range not yet
/// done; `claim` the key of the request's own claim; `buf` a buffer that it holds.
#[expect(missing_docs, reason = "said above, once")]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// Nothing, or whatever it was parked on: look up what is at `at`.
    Next { at: u64 },
    /// As `Next`, for space that attempt number `attempt` to grow the file was to give.
    Space { at: u64, attempt: u32 },
    /// The ops of mapped pieces, up to `at`.
    Pieces { at: u64 },
    /// A table slice on its way into `slot`.
    LoadSlice { at: u64, slot: u32 },
    /// The header with the need-check mark, stable.
    WriteMark { at: u64, buf: BufId },
    /// The turn to write the L1 sector that links the new table of `l1_index`.
    TakeL1 { at: u64, l1_index: u32 },
    /// That sector, written from `buf`.
    WriteL1 { at: u64, l1_index: u32, buf: BufId },
    /// What the new clusters hold around the write.
    Cow { claim: u32, state: CowState },
    /// Head, guest data and tail, written as one.
    WriteData { claim: u32 },
    /// The data, stable: the entry that exposes it may be written.
    Fence { claim: u32 },
    /// The turn to write the slice, or somebody who writes this claim's entries with his own.
    Link { claim: u32 },
    /// The slice's changed sectors, written from `buf`.
    WriteSlice { claim: u32, buf: BufId },
    /// Guest resize: the header's turn.
    Resize,
    /// Guest resize: more of the L1 table, from entry `from` on.
    LoadL1 { from: u32, buf: BufId },
    /// Guest resize: the header with the new size, written; then stable.
    WriteSize { buf: BufId },
    /// Guest resize: the new size, stable.
    FlushSize,
    /// Chore: the file's new length.
    Grow { to: u64, exact: bool },
    /// Chore: that length, stable.
    FlushGrow { to: u64 },
    /// Chore: nothing stands in the way of tidying up.
    Tidy,
    /// Chore: the spare end, cut off.
    CutEnd,
    /// Chore: data, tables and the file's length, stable.
    FlushTidy,
    /// Chore: a buffer for the header.
    MarkBuf,
    /// Chore: the header without the mark, written.
    ClearMark { buf: BufId },
    /// Chore: that header, stable.
    FlushClear,
}

/// The label of a flush that is all that is left to do; of data ops likewise.
const FLUSH: u8 = 15;
const PIECES: u8 = 2;

impl Qed {
    /// The image that `opened` describes, in `file`.
    pub fn new(
        file: FileId,
        opened: Opened,
        writable: bool,
        backing: Option<Backing>,
        tables: TableCache,
        options: QedOptions,
    ) -> Qed {
        let geometry = opened.geometry();
        let slots = tables.len();
        let slices = slices_of(geometry, opened.header.image_size);
        // Nothing says which clusters of a device are free.
        let max = if opened.has_fixed_len { opened.file_len } else { FILE_MAX };
        let mut image = Qed {
            file,
            geometry,
            size: opened.header.image_size,
            writable,
            backing,
            l1: opened.l1,
            tables,
            past_end: PastEnd::new(opened.file_len, slices),
            links: vec![SliceLink::default(); slots],
            claims: Claims::new(),
            allocs: Vec::with_capacity(4),
            l1_busy: false,
            l1_waiters: WaitList::new(),
            space: Space::new(opened.file_len, geometry.cluster_size(), max, options.growth),
            header: Header::new(opened.header),
            options,
        };
        image.disarm_l1(0);
        image
    }

    /// What an entry could point at when the image was opened.
    fn bounds_at_open(&self) -> Bounds {
        Bounds { file_len: self.past_end.end(), ..self.bounds() }
    }

    /// L1 entries from `from` on have been loaded: see [`PastEnd`].
    fn disarm_l1(&mut self, from: usize) {
        let (bounds, bytes) = (self.bounds_at_open(), self.geometry.table_bytes());
        if self.writable {
            let loaded = self.l1[from..].iter_mut();
            loaded.filter(|raw| bounds.is_past_end(**raw, bytes)).for_each(|raw| *raw = u64::MAX);
        }
    }

    /// Bytes that the cache of an image run with `options` needs.
    pub fn cache_bytes(options: &QedOptions) -> usize {
        TableCache::bytes_for(SLICE_BYTES, options.cache_slices)
    }

    /// A cache for [`Qed::new`], in `region`.
    pub fn cache(region: cowbell_engine::units::RegionId, options: &QedOptions) -> TableCache {
        TableCache::new(region, SLICE_BYTES, options.cache_slices)
    }

    /// The clusters' geometry.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// What an entry may point at now.
    #[inline]
    fn bounds(&self) -> Bounds {
        Bounds {
            geometry: self.geometry,
            header_bytes: self.header.header_bytes(),
            file_len: self.space.end(),
        }
    }

    /// The unit in which metadata is written, in bytes: a block of the file system below, or of the
    /// device if that is larger. A direct write of less makes ext4 lock the file, wait for every
    /// other write in flight, and do all of it inside `io_submit`.
    fn block(&self, cx: &Cx<'_>) -> u64 {
        cx.request_align(self.file).max(SLICE_BYTES as u64)
    }

    /// Where the slice that maps guest cluster `cluster` is on disk; `table` is its L2 table.
    fn slice_offset(&self, table: HostOffset, cluster: u64) -> u64 {
        let index = cluster & (self.geometry.table_entries() - 1);
        table.0 + (index >> SLICE_BITS) * SLICE_BYTES as u64
    }

    /// Panics if something is claimed, pinned, parked or busy. For tests, at rest.
    pub fn assert_idle(&self) {
        self.tables.assert_idle(|_| 0);
        assert!(self.claims.is_empty() && self.allocs.is_empty(), "something is claimed");
        assert!(!self.l1_busy && self.l1_waiters.is_empty());
        assert!(self.links.iter().all(|l| !l.busy && l.waiters.is_empty()));
        self.space.assert_idle();
        self.header.assert_idle();
    }

    fn begin_io(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let io = cx.io();
        match io.kind {
            IoKind::Flush => {
                self.flush(cx);
                Step::Last { label: FLUSH }
            }
            IoKind::Read | IoKind::Status { .. } => self.walk(io.offset, Event::Start, cx),
            _ if !self.writable => Step::Done(Err(Errno::READ_ONLY)),
            IoKind::Truncate => self.resize(cx),
            _ => self.walk(io.offset, Event::Start, cx),
        }
    }

    /// The whole range is done.
    fn end(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match cx.io().kind {
            IoKind::Write { fua: true } | IoKind::Zero { fua: true, .. } => {
                self.flush(cx);
                Step::Last { label: FLUSH }
            }
            _ => Step::Done(Ok(())),
        }
    }

    fn flush(&self, cx: &mut Cx<'_>) {
        cx.issue(Op::flush(self.file));
    }

    fn read_op(&self, offset: u64, segs: Segs) -> Op {
        Op::read(Target::File(self.file), offset, segs)
    }
}

impl Driver for Qed {
    type State = State;

    const STATES: &'static [&'static str] = &[
        "lookup",
        "space",
        "pieces",
        "load-slice",
        "write-mark",
        "grow",
        "take-l1",
        "write-l1",
        "cow-buffers",
        "read-cow",
        "copy",
        "write-data",
        "fence",
        "link",
        "write-slice",
        "flush",
        "resize",
        "tidy",
    ];

    #[inline]
    fn label(state: &State) -> usize {
        match state {
            State::Next { .. } => 0,
            State::Space { .. } => 1,
            State::Pieces { .. } => 2,
            State::LoadSlice { .. } => 3,
            State::WriteMark { .. } => 4,
            State::TakeL1 { .. } => 6,
            State::WriteL1 { .. } => 7,
            State::Cow { state: CowState::Bufs, .. } => 8,
            State::Cow { state: CowState::Read, .. } => 9,
            State::Cow { .. } => 10,
            State::WriteData { .. } => 11,
            State::Fence { .. } => 12,
            State::Link { .. } => 13,
            State::WriteSlice { .. } => 14,
            State::Resize | State::LoadL1 { .. } | State::WriteSize { .. } | State::FlushSize => 16,
            State::Grow { .. } | State::FlushGrow { .. } => 5,
            State::Tidy
            | State::FlushTidy
            | State::CutEnd
            | State::MarkBuf
            | State::ClearMark { .. }
            | State::FlushClear => 17,
        }
    }

    #[inline]
    fn size(&self) -> u64 {
        self.size
    }

    fn uses(&self, file: FileId) -> bool {
        file == self.file
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
        let offset = if passes { self.in_one_piece(io, mem)?.0 } else { return None };
        Some(Pass { file: self.file, offset, label: PIECES })
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        self.begin_io(cx)
    }

    fn chore(&mut self, chore: Chore) -> Option<State> {
        match chore {
            Chore::Asked => {
                let (to, exact) = self.space.goal();
                Some(State::Grow { to, exact })
            }
            Chore::Deadline => {
                self.header.unmark_at = None;
                Some(State::Tidy)
            }
            Chore::Settle => {
                self.header.unmark_at = None;
                self.writable.then_some(State::Tidy)
            }
        }
    }

    #[inline]
    fn deadline(&self) -> Option<Time> {
        self.header.unmark_at
    }

    fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        match (state, event) {
            (State::Next { at }, Event::Start | Event::Woken) => self.walk(at, event, cx),
            (State::Space { at, attempt }, Event::Woken) => match self.space.failure_of(attempt) {
                // At once: who first waits for a table slice again would then ask for space again,
                // and two requests that take turns in one slot would never give up.
                Some(errno) => {
                    self.allocation_ended(cx);
                    Step::Done(Err(errno))
                }
                None => self.walk(at, event, cx),
            },
            (State::Pieces { at }, Event::Io(Ok(()))) => self.walk(at, Event::Start, cx),
            (State::Pieces { .. }, Event::Io(error)) => Step::Done(error),
            (State::LoadSlice { at, slot }, Event::Io(result)) => {
                self.slice_loaded(at, slot as usize, result, cx)
            }
            (State::WriteMark { at, buf }, Event::Io(result)) => {
                self.mark_written(at, buf, result, cx)
            }
            (State::TakeL1 { at, l1_index }, Event::Woken) => self.write_l1(at, l1_index, cx),
            (State::WriteL1 { at, l1_index, buf }, Event::Io(result)) => {
                self.l1_written(at, l1_index, buf, result, cx)
            }
            (State::Cow { claim, state }, event) => self.copy(claim, state, event, cx),
            (State::WriteData { claim }, Event::Io(result)) => self.data_written(claim, result, cx),
            (State::Fence { claim }, Event::Io(Ok(()))) => self.link(claim, cx),
            (State::Fence { claim }, Event::Io(Err(errno))) => self.fail(claim, errno, cx),
            (State::Link { claim }, Event::Woken) => self.link(claim, cx),
            (State::WriteSlice { claim, buf }, Event::Io(result)) => {
                self.slice_written(claim, buf, result, cx)
            }
            (State::Resize, Event::Woken) => self.resize(cx),
            (State::LoadL1 { from, buf }, Event::Io(result)) => {
                self.l1_loaded(from, buf, result, cx)
            }
            (State::WriteSize { buf }, Event::Io(result)) => {
                self.header_written(buf, result, State::FlushSize, cx)
            }
            (State::FlushSize, Event::Io(result)) => self.size_flushed(result, cx),
            (State::Grow { to, exact }, Event::Start) => self.grow(to, exact, cx),
            (State::Grow { to, exact }, Event::Io(result)) => self.grown(to, exact, result, cx),
            (State::FlushGrow { to }, Event::Io(result)) => self.growth_flushed(to, result, cx),
            (State::Tidy, Event::Start | Event::Woken) => self.tidy(cx),
            (State::FlushTidy, Event::Io(result)) => self.tidy_flushed(result, cx),
            // It was waiting for a buffer; the flush has succeeded.
            (State::FlushTidy, Event::Woken) => self.tidy_flushed(Ok(()), cx),
            (State::CutEnd, Event::Io(result)) => self.end_cut(result, cx),
            (State::MarkBuf, Event::Woken) => self.tidy_flushed(Ok(()), cx),
            (State::ClearMark { buf }, Event::Io(result)) => {
                self.header_written(buf, result, State::FlushClear, cx)
            }
            (State::FlushClear, Event::Io(result)) => self.tidied(result, cx),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }
}
