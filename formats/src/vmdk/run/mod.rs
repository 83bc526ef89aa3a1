//! VMDK as a state machine: the image, the states, and where each leads.
//!
//! ```text
//!            ┌────────────── look again ◄─────────────────────────────┐
//! Next ──────┤ table not there ─> LoadTable ──────────────────────────┤
//!  │ │ │ │   │ no slot for it ─> Room (a writeback makes it) ─────────────┤
//!  │ │ │ │   │ first write of all ─> WriteCid ────────────────────────┤
//!  │ │ │ │   └ no space, a claim, a buffer, … : parked where it lacks ┘
//!  │ │ │ └─ pieces under different tables: each a request of its own, joined
//!  │ │ └─── mapped or zero: Pieces (all ops of the step, joined) ─> Next
//!  │ └───── allocate: [Cow] ─> WriteData ─> published in memory ─> Next
//!  └─────── flush: [Fence] ─> WriteTables ─> FlushFiles ─> WriteTables (the redundant ones)
//! ```
//!
//! A request walks its range piece by piece. An allocating piece is all the grains that it needs
//! under one grain table, up to 512: it claims them, takes one run of space, copies at most the two
//! ends from the parent, and writes data and copies as one. Then its entries are *published*: in
//! memory, where everybody sees them. On disk they come later, whole sectors of a table at a time,
//! by a *writeback*: at a guest's flush, when the cache has no room, or when a deadline has come.
//! Nothing is flushed before.
//!
//! # Why a crash harms nothing
//! 1. *A writeback seals before it fences.* It copies each changed table, flushes whatever those
//!    copies rely on, and writes the copies. What is published meanwhile waits for the next one.
//! 2. *Space is zeros before anything points at it*: it is gained by truncation and never used
//!    twice. So an entry whose data is lost shows zeros, the old contents where there is no parent;
//!    the fence is needed only if the file's length may not be stable yet.
//! 3. *With a parent the fence is always there*: data and copies are stable before an entry
//!    replaces the parent's contents.
//! 4. *Redundant tables are written after the primary ones are stable*: they never know more.
//! 5. *The new content id is stable before the first entry*, by the same fence, *and before any
//!    flush is answered*.

mod allocate;
mod compressed;
mod lookup;
mod stream;
mod writeback;

use std::hash::Hash;

use cowbell_engine::op::Op;
use cowbell_engine::step::{Chore, Cx, Driver, Event, IoKind, Step};
use cowbell_engine::sys::random;
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{BufId, Errno, FileId, NodeId, RegionId, Time};
use cowbell_engine::wait::WaitList;

use crate::parts::backing::Backing;
use crate::parts::claims::Claims;
use crate::parts::cow::CowState;
use crate::parts::growth::{Growth, Space};
use crate::vmdk::disk::grain::size_max;
use crate::vmdk::disk::layout::{AT_END, Bounds, FILE_MAX, Header, SECTOR, SECTOR_BITS};
use crate::vmdk::rest::open::{ExtentKind, Opened};
use crate::vmdk::run::allocate::Claim;
use crate::vmdk::run::compressed::Compressed;
use crate::vmdk::run::stream::Stream;
use crate::vmdk::run::writeback::{Phase, Root, Slot, Writeback};

/// Bytes that the cache has for a table: what is published, and behind it what is being written.
const SLOT_BYTES: usize = 2 * COPY_AT;
/// Where in a slot the copy is that a writeback writes.
const COPY_AT: usize = 2048;

/// How a VMDK image is run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VmdkOptions {
    /// Memory for grain tables, 4096 bytes each (each maps 32 MiB).
    pub cache_tables: usize,
    /// Memory for inflated grains of a stream, in grains.
    pub cache_grains: usize,
    /// How the files grow.
    pub growth: Growth,
    /// How long after it has changed a table is written although nobody flushes, in milliseconds.
    pub writeback_after_ms: u64,
    /// Random bits for the new content id, the same ones each time for who wants to repeat a run.
    /// `None`, the default: from the system. An image whose ids repeat passes for one that has not
    /// changed, and overlays then show wrong data.
    pub entropy: Option<u32>,
}

impl Default for VmdkOptions {
    fn default() -> Self {
        let growth = Growth::default();
        VmdkOptions {
            cache_tables: 1024,
            cache_grains: 16,
            growth,
            writeback_after_ms: 5000,
            entropy: None,
        }
    }
}

/// An opened VMDK image: all of its state.
#[derive(Clone, Hash, Debug)]
pub struct Vmdk {
    /// The image's own file and the others, as the extents number them.
    files: Vec<FileId>,
    parts: Vec<Part>,
    size: u64,
    writable: bool,
    backing: Option<Backing>,
    /// The parent is not the one that this image was made for: nothing of it is shown.
    parent_changed: bool,
    tables: TableCache,
    slots: Vec<Slot>,
    /// Of a stream.
    compressed: Option<Compressed>,
    claims: Claims<Claim>,
    writeback: Writeback,
    cid: Cid,
    /// Chores that were asked for and not begun yet.
    asked: Vec<Asked>,
    options: VmdkOptions,
}

/// The memory that an image holds for as long as it is open.
#[derive(Clone, Debug)]
pub struct Regions {
    tables: TableCache,
    compressed: Option<Compressed>,
}

impl Regions {
    /// For the image that `opened` describes; `region` gives as many bytes as it is asked for.
    pub fn new(
        opened: &Opened,
        options: &VmdkOptions,
        mut region: impl FnMut(usize) -> RegionId,
    ) -> Regions {
        let memory = region(TableCache::bytes_for(SLOT_BYTES, options.cache_tables));
        let tables = TableCache::new(memory, SLOT_BYTES, options.cache_tables);
        let compressed = opened.extents.iter().find_map(|extent| match &extent.kind {
            ExtentKind::Sparse(sparse) if sparse.header.is_compressed() => Some(&sparse.header),
            _ => None,
        });
        let compressed = compressed.map(|header| {
            let (unit, slots) = (header.grain_size() as usize, options.cache_grains);
            let grains = TableCache::new(region(TableCache::bytes_for(unit, slots)), unit, slots);
            let input_size = size_max(header.grain_size());
            let input = region(grains.len() * input_size as usize);
            let stream = Stream::new(region(Stream::tail_bytes(header)));
            Compressed { grains, input, input_size, stream }
        });
        Regions { tables, compressed }
    }
}

/// An extent.
#[derive(Clone, Hash, Debug)]
struct Part {
    /// Its range on the disk.
    pub start: u64,
    pub end: u64,
    pub file: FileId,
    pub kind: PartKind,
}

#[derive(Clone, Hash, Debug)]
enum PartKind {
    /// As it is, from this byte on.
    Flat(u64),
    /// Zeros. An image with such a part is not written.
    Zero,
    Sparse(Box<Grains>),
}

/// A sparse extent.
#[derive(Clone, Hash, Debug)]
struct Grains {
    pub header: Header,
    /// What the cache calls this extent's first table.
    pub first_key: u64,
    pub root: Root,
    pub space: Space,
}

impl Grains {
    /// What an entry may point at now.
    #[inline]
    pub fn bounds(&self) -> Bounds {
        self.header.bounds(self.space.end())
    }
}

/// The content id, which says that this image is not what it was when somebody else last looked.
#[derive(Clone, Hash, Debug)]
struct Cid {
    /// Where its digits are, in the image's own file.
    pub at: u64,
    pub digits: [u8; 8],
    /// How many of them there are.
    pub len: u32,
    pub state: CidState,
    pub waiters: WaitList,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum CidState {
    /// Nothing has been written since the image was opened.
    Old,
    /// The new one is being written.
    Writing,
    /// It is written.
    New,
    /// It is stable.
    Stable,
}

/// A chore that a step asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Asked {
    /// Make the file of this part longer.
    Grow(u32),
    /// Write tables, so that there is room for others.
    Writeback,
}

/// A request's state, named by what it awaits. `at` is the first byte of the guest range not yet
/// done; `claim` the key of the request's own claim; `buf` a buffer that it holds.
#[expect(missing_docs, reason = "said above, once")]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// Nothing, or whatever it was parked on: look up what is at `at`.
    Next { at: u64 },
    /// As `Next`, for space in `part` that attempt number `attempt` to grow it was to give.
    Space { at: u64, part: u32, attempt: u32 },
    /// As `Next`, for a slot of the cache that writeback number `attempt` was to give.
    Room { at: u64, attempt: u32 },
    /// The ops of mapped pieces, or the requests for pieces, up to `at`.
    Pieces { at: u64 },
    /// A grain table on its way into `slot`.
    LoadTable { at: u64, slot: u32 },
    /// The first `have` bytes of a grain at `host`, beside `slot`.
    ReadGrain { at: u64, host: u64, slot: u32, have: u32 },
    /// That grain, inflated into `slot`.
    Inflate { at: u64, slot: u32 },
    /// A grain of a stream, deflated beside `slot`.
    Deflate { claim: u32, slot: u32 },
    /// Its turn to be appended.
    Append { claim: u32, slot: u32 },
    /// Space for it, that attempt number `attempt` to grow the file was to give.
    AppendSpace { claim: u32, slot: u32, attempt: u32 },
    /// That grain, written.
    WriteGrain { claim: u32, slot: u32 },
    /// An empty table at `sector` of a stream, written from `buf`.
    WriteTable { at: u64, buf: BufId, sector: u32 },
    /// Chore: the end of a stream, written.
    WriteTail,
    /// The new content id, written.
    WriteCid { at: u64, buf: BufId },
    /// What the new grains hold around the write.
    Cow { claim: u32, state: CowState },
    /// Head, guest data and tail, written as one.
    WriteData { claim: u32 },
    /// A running writeback to end, and after that one that is number `target` or later.
    Ride { target: u32 },
    /// What the sealed tables rely on, stable; the flushes from file `next` on are to be issued.
    Fence { next: u32 },
    /// The sealed tables from the `next` one on.
    WriteTables { phase: Phase, next: u32 },
    /// Sector number `next` of the sealed ones of a directory, written from `buf`.
    WriteRoot { phase: Phase, next: u32, buf: BufId },
    /// Everything, stable: the flushes from file `next` on are to be issued.
    FlushFiles { next: u32 },
    /// A flush with no table to write.
    FlushOnly { next: u32 },
    /// Chore: write tables.
    Writeback,
    /// Chore: the file's new length.
    Grow { part: u32, to: u64, exact: bool },
    /// Chore: leave the image as one that was closed.
    Tidy,
    /// Chore: the spare ends of the files before part `next`, cut off.
    CutEnds { next: u32 },
}

/// The label of a flush that is all that is left to do; of data ops likewise.
const FLUSH: u8 = 10;
const PIECES: u8 = 3;

impl Vmdk {
    /// The image that `opened` describes, in `files`: its own and the others.
    pub fn new(
        files: Vec<FileId>,
        opened: Opened,
        writable: bool,
        backing: Option<Backing>,
        regions: Regions,
        options: VmdkOptions,
    ) -> Vmdk {
        let Regions { tables, compressed } = regions;
        let slots = vec![Slot::default(); tables.len()];
        let entropy = options.entropy.unwrap_or_else(random);
        let digits = super::digits(&opened.descriptor, entropy);
        let at = opened.text_at + opened.descriptor.cid_at as u64;
        let len = opened.descriptor.cid_len as u32;
        let mut first_key = 0;
        let parts = opened.extents.into_iter().map(|extent| {
            let kind = match extent.kind {
                ExtentKind::Flat(at) => PartKind::Flat(at),
                ExtentKind::Zero => PartKind::Zero,
                ExtentKind::Sparse(sparse) => {
                    let compressed = sparse.header.is_compressed();
                    let unit = if compressed { SECTOR } else { sparse.header.grain_size() };
                    let end = sparse.grains_end();
                    // Nothing says which grains of a device are free.
                    let max = if sparse.has_fixed_len { end } else { FILE_MAX };
                    let space = Space::new(end, unit, max, options.growth);
                    let mut header = sparse.header.clone();
                    if sparse.has_footer {
                        // A stream goes on where its directory is, and gets another behind it.
                        header.directory_at = AT_END;
                    }
                    let grains = Grains { header, first_key, root: Root::new(*sparse), space };
                    first_key += grains.header.directory_entries();
                    PartKind::Sparse(Box::new(grains))
                }
            };
            let (start, end) = (extent.start, extent.start + extent.len);
            Part { start, end, file: files[extent.file], kind }
        });
        Vmdk {
            parts: parts.collect(),
            files,
            size: opened.size,
            writable,
            backing,
            parent_changed: opened.parent_changed,
            writeback: Writeback::new(slots.len()),
            slots,
            tables,
            compressed,
            claims: Claims::new(),
            cid: Cid { at, digits, len, state: CidState::Old, waiters: WaitList::new() },
            asked: Vec::with_capacity(4),
            options,
        }
    }

    /// Bytes in a grain, where all extents have the same.
    pub fn grain_size(&self) -> Option<u64> {
        let mut sizes = self.parts.iter().map(|part| match &part.kind {
            PartKind::Sparse(grains) => Some(grains.header.grain_size()),
            PartKind::Flat(_) | PartKind::Zero => None,
        });
        let first = sizes.next().flatten();
        first.filter(|&first| sizes.all(|size| size == Some(first)))
    }

    /// The number of the part that holds byte `at` of the disk.
    #[inline]
    fn part_at(&self, at: u64) -> usize {
        match self.parts.len() {
            1 => 0,
            _ => self.parts.partition_point(|part| part.end <= at),
        }
    }

    /// A sparse part.
    #[inline]
    fn grains(&self, part: usize) -> &Grains {
        match &self.parts[part].kind {
            PartKind::Sparse(grains) => grains,
            _ => unreachable!("only sparse extents have tables"),
        }
    }

    fn grains_mut(&mut self, part: usize) -> &mut Grains {
        match &mut self.parts[part].kind {
            PartKind::Sparse(grains) => grains,
            _ => unreachable!("only sparse extents have tables"),
        }
    }

    /// Panics if something is claimed, pinned, parked or busy. For tests, at rest.
    pub fn assert_idle(&self) {
        assert!(self.claims.is_empty() && self.asked.is_empty(), "something is claimed");
        assert!(self.cid.state != CidState::Writing && self.cid.waiters.is_empty());
        self.writeback.assert_idle();
        self.tables.assert_idle(|slot| u32::from(self.slots[slot].is_dirty()));
        if let Some(compressed) = &self.compressed {
            compressed.grains.assert_idle(|_| 0);
            compressed.stream.assert_idle();
        }
        for part in &self.parts {
            if let PartKind::Sparse(grains) = &part.kind {
                grains.space.assert_idle();
            }
        }
    }

    #[inline(always)]
    fn begin_io(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let io = cx.io();
        let is_new = matches!(self.cid.state, CidState::New | CidState::Stable);
        match io.kind {
            IoKind::Read => self.walk_from(io.offset, Event::Start, cx),
            IoKind::Write { .. } if is_new => self.walk_from(io.offset, Event::Start, cx),
            _ => self.begin_other(cx),
        }
    }

    #[inline(never)]
    fn begin_other(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let io = cx.io();
        match io.kind {
            IoKind::Flush => self.flush_all(cx),
            IoKind::Status { .. } => self.walk_from(io.offset, Event::Start, cx),
            _ if !self.writable => Step::Done(Err(Errno::READ_ONLY)),
            IoKind::Truncate => Step::Done(Err(Errno::NOT_SUPPORTED)),
            _ => self.walk_with_new_cid(io.offset, cx),
        }
    }

    /// The whole range is done.
    fn end(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        match cx.io().kind {
            IoKind::Write { fua: true } | IoKind::Zero { fua: true, .. } => self.flush_all(cx),
            _ => Step::Done(Ok(())),
        }
    }

    /// Chore: makes the file of `part` `to` bytes long.
    fn grow(&mut self, part: u32, to: u64, exact: bool, cx: &mut Cx<'_>) -> Step<State> {
        let file = self.parts[part as usize].file;
        cx.issue(self.grains(part as usize).space.op(file, to));
        Step::Wait(State::Grow { part, to, exact })
    }

    /// It is that long, or could not become so.
    fn grown(
        &mut self,
        part: u32,
        to: u64,
        exact: bool,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let space = &mut self.grains_mut(part as usize).space;
        if result.is_err()
            && !exact
            && let Some(to) = space.lesser_goal()
        {
            return Step::Go(State::Grow { part, to, exact: true });
        }
        space.grown(to, result);
        cx.wake_all(&mut space.waiters);
        Step::Done(result)
    }

    fn woken(&mut self, at: u64, failure: Option<Errno>, cx: &mut Cx<'_>) -> Step<State> {
        match failure {
            Some(errno) => Step::Done(Err(errno)),
            None => self.walk_from(at, Event::Woken, cx),
        }
    }
}

impl Driver for Vmdk {
    type State = State;

    const STATES: &'static [&'static str] = &[
        "lookup",
        "space",
        "room",
        "pieces",
        "load-table",
        "inflate",
        "write-cid",
        "cow-buffers",
        "read-cow",
        "write-data",
        "flush",
        "fence",
        "write-tables",
        "grow",
        "tidy",
        "deflate",
        "copy",
    ];

    #[inline]
    fn label(state: &State) -> usize {
        match state {
            State::Next { .. } => 0,
            State::Space { .. } => 1,
            State::Room { .. } => 2,
            State::Pieces { .. } => 3,
            State::LoadTable { .. } => 4,
            State::ReadGrain { .. } | State::Inflate { .. } => 5,
            State::Deflate { .. } | State::Append { .. } | State::AppendSpace { .. } => 15,
            State::WriteGrain { .. } | State::WriteTable { .. } => 9,
            State::WriteCid { .. } => 6,
            State::Cow { state: CowState::Bufs, .. } => 7,
            State::Cow { state: CowState::Read, .. } => 8,
            State::Cow { .. } => 16,
            State::WriteData { .. } => 9,
            State::Ride { .. } | State::FlushFiles { .. } | State::FlushOnly { .. } => 10,
            State::Fence { .. } => 11,
            State::WriteTables { .. } | State::WriteRoot { .. } | State::Writeback => 12,
            State::Grow { .. } => 13,
            State::Tidy | State::WriteTail | State::CutEnds { .. } => 14,
        }
    }

    #[inline]
    fn size(&self) -> u64 {
        self.size
    }

    fn uses(&self, file: FileId) -> bool {
        self.files.contains(&file)
    }

    fn below(&self) -> Option<NodeId> {
        self.backing.map(|backing| backing.node)
    }

    #[inline(always)]
    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        self.begin_io(cx)
    }

    fn chore(&mut self, chore: Chore) -> Option<State> {
        match chore {
            Chore::Asked if self.asked.is_empty() => None,
            Chore::Asked => match self.asked.remove(0) {
                Asked::Grow(part) => {
                    let (to, exact) = self.grains(part as usize).space.goal();
                    Some(State::Grow { part, to, exact })
                }
                Asked::Writeback => Some(State::Writeback),
            },
            Chore::Deadline => {
                self.writeback.due = None;
                Some(State::Writeback)
            }
            Chore::Settle => self.writable.then_some(State::Tidy),
        }
    }

    #[inline]
    fn deadline(&self) -> Option<Time> {
        self.writeback.due
    }

    fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        match (state, event) {
            (State::Next { at }, Event::Woken)
                if !matches!(cx.io().kind, IoKind::Read | IoKind::Status { .. }) =>
            {
                self.walk_with_new_cid(at, cx)
            }
            (State::Next { at }, Event::Start | Event::Woken) => self.walk_from(at, event, cx),
            (State::Space { at, part, attempt }, Event::Woken) => {
                // At once: who looked again first would begin another growth, for ever.
                let failure = self.grains(part as usize).space.failure_of(attempt);
                self.woken(at, failure, cx)
            }
            (State::Room { at, attempt }, Event::Woken) => {
                let failure = self.writeback.failure_of(attempt);
                self.woken(at, failure, cx)
            }
            (State::Pieces { at }, Event::Io(Ok(()))) => self.walk_from(at, Event::Start, cx),
            (State::Pieces { .. }, Event::Io(error)) => Step::Done(error),
            (State::LoadTable { at, slot }, Event::Io(result)) => {
                self.table_loaded(at, slot as usize, result, cx)
            }
            (State::ReadGrain { at, host, slot, have }, Event::Io(Ok(()))) => {
                self.grain_read(at, host, slot as usize, have, cx)
            }
            (
                State::ReadGrain { at, slot, .. } | State::Inflate { at, slot },
                Event::Io(result),
            ) => self.compressed_loaded(at, slot as usize, result, cx),
            (State::Deflate { claim, slot }, Event::Io(_))
            | (State::Append { claim, slot }, Event::Woken) => self.append(claim, slot, event, cx),
            (State::AppendSpace { claim, slot, attempt }, Event::Woken) => {
                self.append_woken(claim, slot, attempt, cx)
            }
            (State::WriteGrain { claim, slot }, Event::Io(result)) => {
                self.grain_written(claim, slot, result, cx)
            }
            (State::WriteTable { at, buf, sector }, Event::Io(result)) => {
                self.stream_table_written(at, buf, sector, result, cx)
            }
            (State::WriteTail, Event::Io(Ok(()))) => self.tail_written(cx),
            (State::WriteTail, Event::Io(error)) => Step::Done(error),
            (State::WriteCid { at, buf }, Event::Io(result)) => {
                self.cid_written(at, buf, result, cx)
            }
            (State::Cow { claim, state }, event) => self.copy(claim, state, event, cx),
            (State::WriteData { claim }, Event::Io(result)) => self.data_written(claim, result, cx),
            (State::Ride { target }, Event::Woken) => self.ride(target, cx),
            (State::Fence { next }, Event::Io(Ok(()))) => self.fence(next, cx),
            (State::WriteTables { phase, next }, Event::Io(Ok(()))) => {
                self.write_tables(phase, next, cx)
            }
            // It was waiting for a buffer.
            (State::WriteTables { phase, next }, Event::Woken) => {
                self.write_tables(phase, next, cx)
            }
            (State::WriteRoot { phase, next, buf }, Event::Io(result)) => {
                self.root_written(phase, next, buf, result, cx)
            }
            (State::FlushFiles { next }, Event::Io(Ok(()))) => self.flush_files(next, cx),
            (
                State::Fence { .. } | State::WriteTables { .. } | State::FlushFiles { .. },
                Event::Io(result),
            ) => self.writeback_over(result, cx),
            (State::FlushOnly { next }, Event::Io(Ok(()))) => self.flush_only(next, cx),
            (State::FlushOnly { .. }, Event::Io(error)) => Step::Done(error),
            (State::Writeback, Event::Start) => self.writeback_for_room(cx),
            (State::Grow { part, to, exact }, Event::Start) => self.grow(part, to, exact, cx),
            (State::Grow { part, to, exact }, Event::Io(result)) => {
                self.grown(part, to, exact, result, cx)
            }
            (State::Tidy, Event::Start | Event::Woken) => self.tidy(cx),
            (State::CutEnds { next }, Event::Io(Ok(()))) => self.cut_ends(next, cx),
            (State::CutEnds { .. }, Event::Io(error)) => Step::Done(error),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }
}

/// Sector `sector` of `file` and so on, from `len` bytes of memory.
fn write_at(file: FileId, sector: u32, off: u64, seg: cowbell_engine::op::Seg) -> Op {
    let offset = (u64::from(sector) << SECTOR_BITS) + off;
    Op::write(file, offset, cowbell_engine::op::Segs::one(seg))
}
