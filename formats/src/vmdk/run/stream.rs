//! Writing a stream: whole grains, each once, appended in the order in which they were asked for.
//!
//! A write must cover whole grains (the disk's end counts as the end of the last one); one that
//! does not is refused, as is a second write of a grain: a stream cannot take anything back. Each
//! grain is copied into the cache, deflated by an op, and appended behind its marker when it is its
//! turn. It stays in the cache: who has just written it can read it.
//!
//! Grain tables are in the stream too, each behind a marker and in front of its first grain; they
//! are written again by writebacks. When the image is closed directory, footer and end mark follow. A
//! stream that is opened again goes on where these were: from its first write until it is closed it
//! has no end, and a crash leaves it without one. So nothing is appended before the content id is
//! written.

use std::collections::VecDeque;

use cowbell_engine::op::{Base, Op, OpKind, Seg, Segs};
use cowbell_engine::step::{Cx, Event, IoKind};
use cowbell_engine::units::{BufId, Errno, FileId, RegionId};
use cowbell_engine::wait::{On, WaitList};

use crate::parts::cow::Cow;
use crate::parts::growth::{Lack, Space};
use crate::parts::pieces;
use crate::vmdk::disk::layout::end_of_stream;
use crate::vmdk::disk::layout::{Entry, GRAIN_MARKER_BYTES, Marker, SECTOR, SECTOR_BITS};
use crate::vmdk::run::allocate::AllocateStep;
use crate::vmdk::run::compressed::Compressed;
use crate::vmdk::run::extents::{Extents, Place};
use crate::vmdk::run::tables::{Grown, Tables};

/// A stream being written.
#[derive(Clone, Hash, Debug)]
pub(super) struct Stream {
    /// Claims of grains that have no place yet, oldest first: whose turn it is.
    queue: VecDeque<u32>,
    turn: WaitList,
    /// A grain table is being put into the stream.
    making: bool,
    making_waiters: WaitList,
    /// Something was written: the stream has no end.
    open: bool,
    /// For the end.
    tail: RegionId,
}

/// What a grain, or a table, on its way into a stream awaits. `claim` is the key of its claim, `slot`
/// where it is in the cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum StreamState {
    /// The grain, deflated beside its slot.
    Deflate { claim: u32, slot: u32 },
    /// Its turn to be appended.
    Append { claim: u32, slot: u32 },
    /// Space for it, that attempt number `attempt` to grow the file was to give.
    Space { claim: u32, slot: u32, attempt: u32 },
    /// That grain, written.
    WriteGrain { claim: u32, slot: u32 },
    /// Space for a table of byte `at` of the disk, as above.
    TableSpace { at: u64, attempt: u32 },
    /// An empty table for byte `at` of the disk, at `sector`, written from `buf`.
    WriteTable { at: u64, buf: BufId, sector: u32 },
}

type Progress = pieces::Progress<StreamState>;

impl Stream {
    pub fn new(tail: RegionId) -> Stream {
        Stream {
            queue: VecDeque::with_capacity(64),
            turn: WaitList::new(),
            making: false,
            making_waiters: WaitList::new(),
            open: false,
            tail,
        }
    }

    /// The claim has its place, or will have none.
    fn next_turn(&mut self, claim: u32, cx: &mut Cx<'_>) {
        self.queue.retain(|&waiting| waiting != claim);
        cx.wake_all(&mut self.turn);
    }

    /// Closing: writes the stream's end if it has none, which may be; false: it has.
    pub fn write_end(&self, extents: &Extents, tables: &Tables, cx: &mut Cx<'_>) -> bool {
        if !self.open || !extents.grains(0).has_footer {
            return false;
        }
        let grains = extents.grains(0);
        let end = grains.space.end();
        let bytes = end_of_stream(&grains.header, end >> SECTOR_BITS, tables.directory(0));
        cx.mem().region_mut(self.tail)[..bytes.len()].copy_from_slice(&bytes);
        let seg = Seg { base: Base::Region(self.tail), off: 0, len: bytes.len() as u32 };
        cx.issue(Op::write(extents.get(0).file, end, Segs::one(seg)));
        true
    }

    /// The end is written: it is made the file's.
    pub fn end_written(&mut self, extents: &mut Extents, cx: &mut Cx<'_>) {
        let file = extents.get(0).file;
        let bytes = extents.grains(0).header.end_of_stream_bytes() as u64;
        extents.space(0).cut();
        self.open = false;
        let len = extents.grains(0).space.end() + bytes;
        cx.issue(Op::bare(OpKind::Truncate, file, len, 0));
    }

    /// Panics if something is being appended. For tests, at rest.
    pub fn assert_idle(&self) {
        assert!(self.queue.is_empty() && self.turn.is_empty(), "{self:?}");
        assert!(!self.making && self.making_waiters.is_empty(), "{self:?}");
    }
}

/// A step of what is put into a stream, and what it works with.
pub(super) struct StreamStep<'a> {
    pub stream: &'a mut Stream,
    pub compressed: &'a mut Compressed,
    pub allocate: AllocateStep<'a>,
}

impl StreamStep<'_> {
    pub fn run(&mut self, state: StreamState, event: Event, cx: &mut Cx<'_>) -> Progress {
        match (state, event) {
            (
                StreamState::Deflate { claim, slot } | StreamState::WriteGrain { claim, slot },
                Event::Io(Err(errno)),
            ) => self.fail(claim, slot, errno, cx),
            (StreamState::Deflate { claim, slot }, Event::Io(Ok(())))
            | (StreamState::Append { claim, slot }, Event::Woken) => self.append(claim, slot, cx),
            (StreamState::Space { claim, slot, attempt }, Event::Woken) => {
                match self.space(self.place_of(claim)).failure_of(attempt) {
                    Some(errno) => self.fail(claim, slot, errno, cx),
                    None => self.append(claim, slot, cx),
                }
            }
            (StreamState::TableSpace { at, attempt }, Event::Woken) => {
                let extents = &mut *self.allocate.extents;
                Progress::tried(at, extents.space(extents.index_at(at)).failure_of(attempt))
            }
            (StreamState::WriteGrain { claim, slot }, Event::Io(Ok(()))) => {
                self.compressed.written(slot, true, cx);
                Progress::To(self.allocate.publish_and_end(claim, cx))
            }
            (StreamState::WriteTable { at, buf, sector }, Event::Io(result)) => {
                self.table_written(at, buf, sector, result, cx)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// A write at `at`, where nothing is yet; `table` is the slot of its table. Claims the grain and
    /// deflates it.
    pub fn begin(&mut self, at: u64, table: usize, place: Place, cx: &mut Cx<'_>) -> Progress {
        if self.allocate.free_to(at, place, cx).is_none() {
            return Progress::LookAgain(at);
        }
        let (io, grain) = (cx.io(), place.grain_of(at));
        let end = place.grain_start(grain + 1).min(place.end);
        if !matches!(io.kind, IoKind::Write { .. }) {
            return Progress::Failed(Errno::NOT_SUPPORTED);
        }
        if at != place.grain_start(grain) || io.end() < end {
            return Progress::Failed(Errno::INVALID);
        }
        let Some(slot) = self.compressed.deflate(at, end, place, cx) else {
            return Progress::LookAgain(at);
        };
        let grown = Grown { grain, count: 1, slot: table, entry: Entry::Unallocated };
        let claim = self.allocate.claim(grown, (at, end), Cow::NONE, place);
        self.stream.queue.push_back(claim);
        self.stream.open = true;
        Progress::Wait(StreamState::Deflate { claim, slot: slot as u32 })
    }

    fn place_of(&self, claim: u32) -> Place {
        let extents = &self.allocate.extents;
        extents.place(extents.index_at(self.allocate.start_of(claim)))
    }

    fn space(&mut self, place: Place) -> &mut Space {
        self.allocate.extents.space(place.extent)
    }

    fn file(&self, place: Place) -> FileId {
        self.allocate.extents.get(place.extent).file
    }

    /// The grain is deflated: if it is its turn, takes space and writes it.
    fn append(&mut self, claim: u32, slot: u32, cx: &mut Cx<'_>) -> Progress {
        if self.stream.queue.front() != Some(&claim) {
            cx.park(&mut self.stream.turn, On::Turn);
            return Progress::Wait(StreamState::Append { claim, slot });
        }
        let place = self.place_of(claim);
        let lba = (self.allocate.start_of(claim) - place.start) >> SECTOR_BITS;
        let marker = self.compressed.marker(slot as usize, cx);
        marker[..8].copy_from_slice(&lba.to_le_bytes());
        let Some(Marker::Grain { size, .. }) = Marker::parse(marker) else {
            unreachable!("a deflated grain has a marker and a size");
        };
        let len = (u64::from(size) + GRAIN_MARKER_BYTES as u64).next_multiple_of(SECTOR);
        let offset = match self.space(place).take_or_park(len, false, cx) {
            Ok(offset) => offset,
            Err(Lack::Parked(attempt)) => {
                return Progress::Wait(StreamState::Space { claim, slot, attempt });
            }
            Err(Lack::Never(errno)) => return self.fail(claim, slot, errno, cx),
        };
        self.allocate.set_entry(claim, Entry::Data(offset));
        self.stream.next_turn(claim, cx);
        let seg = self.compressed.beside(slot as usize, 0, len);
        cx.issue(Op::write(self.file(place), offset, Segs::one(seg)));
        Progress::Wait(StreamState::WriteGrain { claim, slot })
    }

    fn fail(&mut self, claim: u32, slot: u32, errno: Errno, cx: &mut Cx<'_>) -> Progress {
        self.stream.next_turn(claim, cx);
        self.compressed.written(slot, false, cx);
        self.allocate.end_claim(claim, false, cx);
        Progress::Failed(errno)
    }

    /// Puts an empty grain table for `at` into the stream.
    pub fn make_table(&mut self, at: u64, place: Place, cx: &mut Cx<'_>) -> Progress {
        if self.stream.making {
            cx.park(&mut self.stream.making_waiters, On::Table);
            return Progress::LookAgain(at);
        }
        let bytes = self.allocate.extents.grains(place.extent).header.table_bytes();
        let Some([buf]) = cx.take_bufs() else {
            cx.park_for_bufs();
            return Progress::LookAgain(at);
        };
        let offset = match self.space(place).take_or_park(SECTOR + bytes, false, cx) {
            Ok(offset) => offset,
            Err(lack) => {
                cx.give_buf(buf);
                return Progress::lacks(lack, |attempt| StreamState::TableSpace { at, attempt });
            }
        };
        (self.stream.making, self.stream.open) = (true, true);
        let len = (SECTOR + bytes) as usize;
        let memory = &mut cx.mem().pool_mut(buf)[..len];
        memory.fill(0);
        memory[..16].copy_from_slice(&Marker::Table.encode(bytes >> SECTOR_BITS));
        let seg = Seg { base: Base::Pool(buf), off: 0, len: len as u32 };
        cx.issue(Op::write(self.file(place), offset, Segs::one(seg)));
        let sector = (offset >> SECTOR_BITS) as u32 + 1;
        Progress::Wait(StreamState::WriteTable { at, buf, sector })
    }

    fn table_written(
        &mut self,
        at: u64,
        buf: BufId,
        sector: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Progress {
        cx.give_buf(buf);
        self.stream.making = false;
        cx.wake_all(&mut self.stream.making_waiters);
        if let Err(errno) = result {
            return Progress::Failed(errno);
        }
        let extents = &self.allocate.extents;
        let place = extents.place(extents.index_at(at));
        self.allocate.tables.link_in_stream(place, at, sector);
        Progress::To(at)
    }
}
