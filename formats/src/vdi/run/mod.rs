//! VDI as a state machine: the image, the states, and where each leads.
//!
//! ```text
//!             ┌───────── look again ◄──────────────────────────────────────────┐
//! Next, Space ┼─ mapped or zeros: Pieces (all ops of the step, joined) ─> Next │
//!             ├─ allocate: WriteData ─> [Fence] ─> Link ─> WriteMap ─> Next    │
//!             │                                     └─ failed ─> Reread ─> done│
//!             ├─ no space, or a claim in the way: parked where it lacks ───────┘
//!             └─ end of the range: [flush] ─> done
//! Grow ─> WriteCount ─> FlushGrow        Tidy ─> Ends ─> FlushTidy
//! ```
//!
//! The block map is in memory whole: a lookup never waits. Allocating pieces of different requests
//! run side by side: each *claims* its blocks, takes them from a hole or from the file's grown end,
//! writes its data, and is then linked: one write of the map at a time takes along whoever is
//! ready. The crash argument is in `DESIGN.md`.

mod allocate;
mod growth;

use std::hash::Hash;

use cowbell_engine::mem::Memory;
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Pass, Step};
use cowbell_engine::units::{BufId, Errno, FileId, HostOffset, Time, align_down};
use cowbell_engine::wait::WaitList;

use crate::parts::claims::Claims;
use crate::parts::growth::{Grow, Growth, Space};
use crate::vdi::disk::layout::Entry;
use crate::vdi::rest::open::Opened;
use crate::vdi::run::allocate::Claim;

/// How a VDI image is run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct VdiOptions {
    /// How the file grows. [`Grow::Write`] is taken as [`Grow::Truncate`].
    pub growth: Growth,
}

/// An opened VDI image: all of its state.
#[derive(Clone, Hash, Debug)]
pub struct Vdi {
    file: FileId,
    image: Opened,
    writable: bool,
    claims: Claims<Claim>,
    /// The map is being written; who wants to write it waits here.
    writing: bool,
    map_waiters: WaitList,
    /// The file's end, counted from the first block on.
    space: Space,
    /// The header on disk counts what [`Space::end`] says, as far as is known.
    exact: bool,
}

/// A request's state, named by what it awaits. `at` is the first byte of the guest range not yet
/// done; `claim` the key of the request's own claim; `buf` a buffer that it holds.
#[expect(missing_docs, reason = "said above, once")]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// Whatever it was parked on: look up what is at `at`.
    Next { at: u64 },
    /// As `Next`, for space that attempt number `attempt` to grow the file was to give.
    Space { at: u64, attempt: u32 },
    /// The ops of mapped pieces, up to `at`.
    Pieces { at: u64 },
    /// Guest data, in a hole with zeros around it.
    WriteData { claim: u32 },
    /// The data, stable: the entry that exposes a hole may be written.
    Fence { claim: u32 },
    /// The turn to write the map, or somebody who writes this claim's entries with his own.
    Link { claim: u32 },
    /// A unit of the map, written from `buf`.
    WriteMap { claim: u32, buf: BufId },
    /// That write failed: what the disk says, read into `buf`.
    Reread { claim: u32, buf: BufId },
    /// Chore: the file's new length.
    Grow { to: u64, exact: bool },
    /// Chore: the header that counts it; a buffer for that first.
    WriteCount { to: u64, buf: Option<BufId> },
    /// Chore: length and count, stable.
    FlushGrow { to: u64 },
    /// Chore: nothing stands in the way of tidying up.
    Tidy,
    /// Chore: the spare end, cut off; the exact count, written.
    Ends { buf: BufId },
    /// Chore: all of it, stable.
    FlushTidy,
}

const PIECES: u8 = 2;
const FLUSH: u8 = 10;

impl Vdi {
    /// The image that `opened` describes, in `file`.
    pub fn new(file: FileId, opened: Opened, writable: bool, options: VdiOptions) -> Vdi {
        let mut growth = options.growth;
        if growth.by == Grow::Write {
            growth.by = Grow::Truncate;
        }
        let header = &opened.header;
        let bytes = |blocks: u32| u64::from(blocks) << header.block_bits;
        // An entry of more than that no program takes.
        let max = bytes(header.blocks.min(match opened.fixed_len {
            Some(len) => header.blocks_in(len),
            None => header.blocks,
        }));
        let space = Space::new(bytes(opened.file_blocks), header.block_size(), max, growth);
        Vdi {
            file,
            exact: header.allocated == opened.file_blocks,
            image: opened,
            writable,
            claims: Claims::new(),
            writing: false,
            map_waiters: WaitList::new(),
            space,
        }
    }

    /// Bytes in a block.
    pub fn block_size(&self) -> u64 {
        self.image.header.block_size()
    }

    /// Panics if something is claimed, parked or busy. For tests, at rest.
    pub fn assert_idle(&self) {
        assert!(self.claims.is_empty(), "something is claimed");
        assert!(!self.writing && self.map_waiters.is_empty());
        self.space.assert_idle();
    }

    /// Does it lie on a block device? Nothing there is known to be zeros, nor cut off.
    fn is_device(&self) -> bool {
        self.image.fixed_len.is_some()
    }

    fn flush(&self, cx: &mut Cx<'_>) {
        cx.issue(Op::flush(self.file));
    }

    /// Goes on at `at`.
    fn walk(&mut self, mut at: u64, cx: &mut Cx<'_>) -> Step<State> {
        let (io, mut issued) = (cx.io(), false);
        while at < io.end() {
            if issued && cx.room() == 0 {
                return Step::Wait(State::Pieces { at });
            }
            let Some((entry, end)) = self.image.run_at(at, io.end()) else {
                if issued {
                    return Step::Wait(State::Pieces { at });
                }
                let index = at >> self.image.header.block_bits;
                cx.tell_corrupt("block map entry is invalid", self.image.entry_offset(index));
                return Step::Done(Err(Errno::IO));
            };
            match (entry, io.kind) {
                (entry, IoKind::Status { .. }) => return self.answer_status(entry, at, end, cx),
                (Entry::Block(block), _) => issued |= self.in_place(block, at, end, cx),
                (Entry::Zero, IoKind::Read) => cx.zero_guest(at - io.offset, end - at),
                (Entry::Zero, IoKind::Write { .. }) => {
                    // First what is under way; then this, looked up again.
                    return if issued {
                        Step::Wait(State::Pieces { at })
                    } else {
                        self.allocate(at, end, cx)
                    };
                }
                // Zeros are there already.
                (Entry::Zero, _) => {}
            }
            at = end;
        }
        match io.kind {
            IoKind::Write { fua: true } | IoKind::Zero { fua: true, .. } if issued => {
                Step::Wait(State::Pieces { at })
            }
            IoKind::Write { fua: true } | IoKind::Zero { fua: true, .. } => {
                self.flush(cx);
                Step::Last { label: FLUSH }
            }
            _ if issued => Step::Last { label: PIECES },
            _ => Step::Done(Ok(())),
        }
    }

    /// Says what `at..end` is.
    fn answer_status(&self, entry: Entry, at: u64, end: u64, cx: &mut Cx<'_>) -> Step<State> {
        let (kind, host) = match entry {
            Entry::Block(block) => {
                let host = HostOffset(self.image.host_of(block, at));
                (StatusKind::Data, Some((self.file, host)))
            }
            Entry::Zero => (StatusKind::Zero, None),
        };
        cx.answer_status(kind, end - at, host);
        Step::Done(Ok(()))
    }

    /// Does what is asked for to `at..end`, which is mapped from `block` on. Was there an op?
    fn in_place(&self, block: u32, at: u64, end: u64, cx: &mut Cx<'_>) -> bool {
        let (io, host, len) = (cx.io(), self.image.host_of(block, at), end - at);
        match io.kind {
            IoKind::Read => cx.read_guest(self.file, host, at - io.offset, len),
            IoKind::Write { .. } => cx.write_guest(self.file, host, at - io.offset, len, false),
            IoKind::Zero { unmap, .. } => {
                cx.issue(Op::bare(OpKind::Zero { unmap }, self.file, host, len));
            }
            _ => {
                let size = self.block_size();
                let first = at.next_multiple_of(size);
                let last = if end == self.size() { end } else { align_down(end, size) };
                if first >= last {
                    return false;
                }
                let host = host + (first - at);
                cx.issue(Op::bare(OpKind::Discard, self.file, host, last - first));
            }
        }
        true
    }
}

impl Driver for Vdi {
    type State = State;

    const STATES: &'static [&'static str] = &[
        "lookup",
        "space",
        "pieces",
        "write-data",
        "fence",
        "link",
        "write-map",
        "reread",
        "grow",
        "tidy",
        "flush",
    ];

    fn label(state: &State) -> usize {
        match state {
            State::Next { .. } => 0,
            State::Space { .. } => 1,
            State::Pieces { .. } => 2,
            State::WriteData { .. } => 3,
            State::Fence { .. } => 4,
            State::Link { .. } => 5,
            State::WriteMap { .. } => 6,
            State::Reread { .. } => 7,
            State::Grow { .. } | State::WriteCount { .. } | State::FlushGrow { .. } => 8,
            State::Tidy | State::Ends { .. } | State::FlushTidy => 9,
        }
    }

    #[inline]
    fn size(&self) -> u64 {
        self.image.header.size
    }

    fn uses(&self, file: FileId) -> bool {
        file == self.file
    }

    #[inline(always)]
    fn pass_on(&mut self, io: &Io, _: &Memory) -> Option<Pass> {
        let passes = match io.kind {
            IoKind::Read => true,
            IoKind::Write { fua } => self.writable && !fua,
            _ => false,
        };
        match self.image.run_at(io.offset, io.end()) {
            Some((Entry::Block(block), end)) if passes && end == io.end() => {
                let offset = self.image.host_of(block, io.offset);
                Some(Pass { file: self.file, offset, label: PIECES })
            }
            _ => None,
        }
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let io = cx.io();
        match io.kind {
            IoKind::Flush => {
                self.flush(cx);
                Step::Last { label: FLUSH }
            }
            IoKind::Read | IoKind::Status { .. } => self.walk(io.offset, cx),
            _ if !self.writable => Step::Done(Err(Errno::READ_ONLY)),
            IoKind::Truncate => Step::Done(Err(Errno::NOT_SUPPORTED)),
            _ => self.walk(io.offset, cx),
        }
    }

    fn chore(&mut self, chore: Chore) -> Option<State> {
        match chore {
            Chore::Asked => {
                let (to, exact) = self.space.goal();
                Some(State::Grow { to, exact })
            }
            Chore::Settle => self.writable.then_some(State::Tidy),
            Chore::Deadline => None,
        }
    }

    fn deadline(&self) -> Option<Time> {
        None
    }

    fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        match (state, event) {
            (State::Next { at }, Event::Woken) => self.walk(at, cx),
            (State::Space { at, attempt }, Event::Woken) => match self.space.failure_of(attempt) {
                Some(errno) => Step::Done(Err(errno)),
                None => self.walk(at, cx),
            },
            (State::Pieces { at }, Event::Io(Ok(()))) => self.walk(at, cx),
            (State::Pieces { .. }, Event::Io(error)) => Step::Done(error),
            (State::WriteData { claim }, Event::Io(result)) => self.data_written(claim, result, cx),
            (State::Fence { claim }, Event::Io(Ok(()))) => self.link(claim, cx),
            (State::Fence { claim }, Event::Io(Err(errno))) => self.fail(claim, errno, cx),
            (State::Link { claim }, Event::Woken) => self.link(claim, cx),
            (State::WriteMap { claim, buf }, Event::Io(result)) => {
                self.map_written(claim, buf, result, cx)
            }
            (State::Reread { claim, buf }, Event::Io(result)) => {
                self.map_reread(claim, buf, result, cx)
            }
            (State::Grow { to, exact }, Event::Start) => self.grow(to, exact, cx),
            (State::Grow { to, exact }, Event::Io(result)) => self.grown(to, exact, result, cx),
            (State::WriteCount { to, buf: None }, Event::Woken) => self.write_count(to, cx),
            (State::WriteCount { to, buf: Some(buf) }, Event::Io(result)) => {
                self.count_written(to, buf, result, cx)
            }
            (State::FlushGrow { to }, Event::Io(result)) => self.growth_flushed(to, result, cx),
            (State::Tidy, Event::Start | Event::Woken) => self.tidy(cx),
            (State::Ends { buf }, Event::Io(result)) => self.ends_made(buf, result, cx),
            (State::FlushTidy, Event::Io(result)) => Step::Done(result),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }
}
