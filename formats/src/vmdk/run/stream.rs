//! Writing a stream: whole grains, each once, appended up the disk as far as that is known.
//!
//! A write must cover whole grains (the disk's end counts as the end of the last one); one that
//! does not is refused, as is a second write of a grain: a stream cannot take anything back. Each
//! grain is claimed, copied into the cache when there is a slot, deflated by an op, and appended behind its
//! marker when it is its turn. It stays in the cache: who has just written it can read it.
//!
//! Grain tables are in the stream too, each behind a marker and in front of its first grain; they
//! are written again by writebacks. Nothing is written before the content id is, and before the stream's
//! [end](super::end) is gone.
//!
//! Of those that wait the lowest gets the next slot; of those that have one the lowest is the next to be
//! appended. Many grains are deflated at once; *one thing is appended at a time*, a grain or a table. So the next
//! one follows what is in the file, and what could not be written is taken back: who goes through a
//! stream from marker to marker finds no gap in it, whatever has failed.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::{Cx, Event, IoKind};
use cowbell_engine::units::{BufId, Errno, FileId};
use cowbell_engine::wait::{On, WaitList};

use crate::parts::cow::Cow;
use crate::parts::growth::{Lack, Space};
use crate::parts::pieces;
use crate::vmdk::disk::grain::marked_len;
use crate::vmdk::disk::layout::{Entry, Marker, SECTOR, SECTOR_BITS};
use crate::vmdk::run::allocate::AllocateStep;
use crate::vmdk::run::compressed::Compressed;
use crate::vmdk::run::end::End;
use crate::vmdk::run::extents::Place;
use crate::vmdk::run::tables::Grown;

/// A stream being written.
#[derive(Clone, Hash, Debug)]
pub(super) struct Stream {
    /// Grains that are not in the file yet, up the disk.
    queue: Vec<Waiting>,
    turn: WaitList,
    /// A grain or a table is being appended.
    appending: bool,
    pub end: End,
}

/// A grain that is not in the file yet.
#[derive(Clone, Copy, Hash, Debug)]
struct Waiting {
    /// Its first byte on the disk.
    at: u64,
    claim: u32,
    has_slot: bool,
}

/// What a grain, or a table, on its way into a stream awaits. `claim` is the key of its claim, `slot`
/// where it is in the cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum StreamState {
    /// The stream's end, taken away by attempt number `attempt`.
    EndGone { at: u64, attempt: u32 },
    /// A slot of the cache.
    Slot { claim: u32 },
    /// The grain, deflated beside its slot.
    Deflate { claim: u32, slot: u32 },
    /// Its turn to be appended.
    Append { claim: u32, slot: u32 },
    /// Space for it, that attempt number `attempt` to grow the file was to give.
    Space { claim: u32, slot: u32, attempt: u32 },
    /// That grain, written at `offset`.
    WriteGrain { claim: u32, slot: u32, offset: u64 },
    /// Space for a table of byte `at` of the disk, as above.
    TableSpace { at: u64, attempt: u32 },
    /// An empty table for byte `at` of the disk, at `sector`, written from `buf`.
    WriteTable { at: u64, buf: BufId, sector: u32 },
}

type Progress = pieces::Progress<StreamState>;

impl Stream {
    pub fn new(end: End) -> Stream {
        let queue = Vec::with_capacity(64);
        Stream { queue, turn: WaitList::new(), appending: false, end }
    }

    fn enqueue(&mut self, at: u64, claim: u32) {
        let place = self.queue.partition_point(|waiting| waiting.at < at);
        self.queue.insert(place, Waiting { at, claim, has_slot: false });
    }

    /// Of the grains that have a slot, or of those that have none: is this the lowest?
    fn is_next(&mut self, claim: u32, has_slot: bool) -> bool {
        let next = self.queue.iter().find(|waiting| waiting.has_slot == has_slot);
        next.is_some_and(|next| next.claim == claim)
    }

    fn got_slot(&mut self, claim: u32) {
        let mine = self.queue.iter_mut().filter(|waiting| waiting.claim == claim);
        mine.for_each(|waiting| waiting.has_slot = true);
    }

    /// The claim is done, one way or the other: it is the next one's turn.
    fn next_turn(&mut self, claim: u32, cx: &mut Cx<'_>) {
        self.queue.retain(|waiting| waiting.claim != claim);
        cx.wake_all(&mut self.turn);
    }

    /// What was being appended is in the file, or is not; then its space, from `offset` on, is the next
    /// one's.
    fn appended(&mut self, result: Result<(), Errno>, offset: u64, space: &mut Space) {
        self.appending = false;
        if result.is_err() && !mutant!("vmdk_stream_gap_stays") {
            space.take_back(offset);
        }
    }

    /// Panics if something is being appended. For tests, at rest.
    pub fn assert_idle(&self) {
        assert!(self.queue.is_empty() && self.turn.is_empty(), "{self:?}");
        assert!(!self.appending, "{self:?}");
        self.end.assert_idle();
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
            (StreamState::EndGone { at, attempt }, Event::Woken) => {
                Progress::tried(at, self.stream.end.failure_of(attempt))
            }
            (StreamState::Slot { claim }, Event::Woken) => self.deflate(claim, cx),
            (StreamState::Deflate { claim, slot }, Event::Io(Err(errno))) => {
                self.fail(claim, slot, errno, cx)
            }
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
            (StreamState::WriteGrain { claim, slot, offset }, Event::Io(result)) => {
                self.grain_written(claim, slot, offset, result, cx)
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
        if let Some(state) = self.lacks_end(at, place, cx) {
            return Progress::Wait(state);
        }
        let grown = Grown { grain, count: 1, slot: table, entry: Entry::Unallocated };
        let claim = self.allocate.claim(grown, (at, end), Cow::NONE, place);
        self.stream.enqueue(at, claim);
        self.deflate(claim, cx)
    }

    /// Deflates the grain, if it is the next to get a slot, and there is one.
    fn deflate(&mut self, claim: u32, cx: &mut Cx<'_>) -> Progress {
        let (place, range) = (self.place_of(claim), self.allocate.range_of(claim));
        let is_next = self.stream.is_next(claim, false);
        match self.compressed.deflate(range, is_next, place, cx) {
            Some(slot) => {
                self.stream.got_slot(claim);
                Progress::Wait(StreamState::Deflate { claim, slot: slot as u32 })
            }
            None => Progress::Wait(StreamState::Slot { claim }),
        }
    }

    /// The stream has its end still, or may have it: what the request waits for.
    fn lacks_end(&mut self, at: u64, place: Place, cx: &mut Cx<'_>) -> Option<StreamState> {
        let has_end = self.allocate.extents.grains(place.extent).has_footer;
        let waits = has_end && !self.stream.end.is_gone();
        waits.then(|| StreamState::EndGone { at, attempt: self.stream.end.park(cx) })
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

    /// The grain is deflated: if it is its turn, and nothing is being appended, takes space and writes it.
    fn append(&mut self, claim: u32, slot: u32, cx: &mut Cx<'_>) -> Progress {
        if !self.stream.is_next(claim, true) || self.stream.appending {
            cx.park(&mut self.stream.turn, On::Turn);
            return Progress::Wait(StreamState::Append { claim, slot });
        }
        let place = self.place_of(claim);
        let lba = (self.allocate.start_of(claim) - place.start) >> SECTOR_BITS;
        let marker = self.compressed.marker(slot as usize, cx);
        marker[..8].copy_from_slice(&lba.to_le_bytes());
        // Only a record that was changed says something else.
        let Ok(len) = marked_len(marker, lba, 1 << place.grain_bits) else {
            return self.fail(claim, slot, Errno::INVALID, cx);
        };
        let len = len.next_multiple_of(SECTOR);
        let offset = match self.space(place).take_or_park(len, false, cx) {
            Ok(offset) => offset,
            Err(Lack::Parked(attempt)) => {
                return Progress::Wait(StreamState::Space { claim, slot, attempt });
            }
            Err(Lack::Never(errno)) => return self.fail(claim, slot, errno, cx),
        };
        self.allocate.set_entry(claim, Entry::Data(offset));
        self.stream.appending = true;
        if mutant!("vmdk_stream_two_in_one_place") {
            self.space(place).take_back(offset);
        }
        let seg = self.compressed.beside(slot as usize, 0, len);
        cx.issue(Op::write(self.file(place), offset, Segs::one(seg)));
        Progress::Wait(StreamState::WriteGrain { claim, slot, offset })
    }

    fn grain_written(
        &mut self,
        claim: u32,
        slot: u32,
        offset: u64,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Progress {
        let place = self.place_of(claim);
        let result = if mutant!("vmdk_stream_error_ignored") { Ok(()) } else { result };
        self.stream.appended(result, offset, self.allocate.extents.space(place.extent));
        if let Err(errno) = result {
            return self.fail(claim, slot, errno, cx);
        }
        self.stream.next_turn(claim, cx);
        self.compressed.written(slot, true, cx);
        Progress::To(self.allocate.publish_and_end(claim, cx))
    }

    fn fail(&mut self, claim: u32, slot: u32, errno: Errno, cx: &mut Cx<'_>) -> Progress {
        self.stream.next_turn(claim, cx);
        self.compressed.written(slot, false, cx);
        self.allocate.end_claim(claim, false, cx);
        Progress::Failed(errno)
    }

    /// Puts an empty grain table for `at` into the stream.
    pub fn make_table(&mut self, at: u64, place: Place, cx: &mut Cx<'_>) -> Progress {
        if let Some(state) = self.lacks_end(at, place, cx) {
            return Progress::Wait(state);
        }
        if self.stream.appending {
            cx.park(&mut self.stream.turn, On::Turn);
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
        self.stream.appending = true;
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
        let extents = &mut self.allocate.extents;
        let place = extents.place(extents.index_at(at));
        let offset = u64::from(sector - 1) << SECTOR_BITS;
        self.stream.appended(result, offset, extents.space(place.extent));
        cx.wake_all(&mut self.stream.turn);
        if let Err(errno) = result {
            return Progress::Failed(errno);
        }
        self.allocate.tables.link_in_stream(place, at, sector);
        Progress::To(at)
    }
}
