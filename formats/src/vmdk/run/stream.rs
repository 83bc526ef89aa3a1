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
//! has no end, and a crash leaves it without one.

use std::collections::VecDeque;

use cowbell_engine::op::{Base, Compute, Op, OpKind, Seg, Segs};
use cowbell_engine::step::{Cx, Event, IoKind, Step};
use cowbell_engine::units::{BufId, Errno, RegionId};
use cowbell_engine::wait::WaitList;

use crate::parts::growth::Taken;
use crate::vmdk::disk::grain;
use crate::vmdk::disk::layout::end_of_stream;
use crate::vmdk::disk::layout::{Entry, GRAIN_MARKER_BYTES, Header, Marker, SECTOR, SECTOR_BITS};
use crate::vmdk::run::lookup::Place;
use crate::vmdk::run::{Asked, PartKind, State, Vmdk};

const DEFLATE: Compute = Compute { name: "deflate-grain", run: grain::deflate };

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

    /// Bytes of the end of a stream with this header.
    pub fn tail_bytes(header: &Header) -> usize {
        let directory = header.directory_entries() as usize * 4;
        directory.next_multiple_of(SECTOR as usize) + 4 * SECTOR as usize
    }

    pub fn assert_idle(&self) {
        assert!(self.queue.is_empty() && self.turn.is_empty(), "{self:?}");
        assert!(!self.making && self.making_waiters.is_empty(), "{self:?}");
    }
}

impl Vmdk {
    fn stream(&mut self) -> &mut Stream {
        &mut self.compressed().stream
    }

    /// Is this a stream whose directory is at its end?
    pub(super) fn has_footer(&self) -> bool {
        self.compressed.is_some()
            && matches!(&self.parts[0].kind, PartKind::Sparse(grains) if grains.root.has_footer)
    }

    /// A write of a stream at `at`; nothing is there yet. Claims the grain and deflates it.
    pub(super) fn pack(
        &mut self,
        at: u64,
        table: usize,
        place: Place,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let io = cx.io();
        let grain = place.grain_of(at);
        let end = place.grain_start(grain + 1).min(place.end);
        if !matches!(io.kind, IoKind::Write { .. }) {
            return Step::Done(Err(Errno::NOT_SUPPORTED));
        }
        if at != place.grain_start(grain) || io.end() < end {
            return Step::Done(Err(Errno::INVALID));
        }
        let key = place.grain_key(at);
        let compressed = self.compressed();
        // In order of arrival: whoever comes later waits behind those who wait.
        let first = compressed.grains.full.is_empty();
        let Some(slot) = first.then(|| compressed.grains.reserve(key)).flatten() else {
            cx.park(&mut compressed.grains.full);
            return Step::Wait(State::Next { at });
        };
        let (region, off) = (compressed.grains.region(), slot << place.grain_bits);
        let len = (end - at) as usize;
        cx.copy_guest_to_region(at - io.offset, region, off, len);
        let grain_size = place.grain_size() as usize;
        cx.mem().region_mut(region)[off + len..off + grain_size].fill(0);
        let room = compressed.input_size;
        let (input, output) =
            (compressed.grains.seg(slot, 0, grain_size), compressed.beside(slot, 0, room));
        cx.issue(Op::compute(DEFLATE, input, output));
        let claim = self.claim_compressed(at, end, table, place);
        let stream = self.stream();
        stream.queue.push_back(claim);
        stream.open = true;
        Step::Wait(State::Deflate { claim, slot: slot as u32 })
    }

    /// The grain is deflated, or it is its turn: takes space and writes it.
    pub(super) fn append(
        &mut self,
        key: u32,
        slot: u32,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if let Event::Io(Err(errno)) = event {
            return self.fail_compressed(key, slot, errno, cx);
        }
        if self.stream().queue.front() != Some(&key) {
            cx.park(&mut self.stream().turn);
            return Step::Wait(State::Append { claim: key, slot });
        }
        let (at, _) = self.claims[key].range();
        let place = self.place(self.part_at(at));
        let lba = (at - place.start) >> SECTOR_BITS;
        let compressed = self.compressed();
        let start = slot as usize * compressed.input_size as usize;
        let marker = &mut cx.mem().region_mut(compressed.input)[start..][..16];
        marker[..8].copy_from_slice(&lba.to_le_bytes());
        let Some(Marker::Grain { size, .. }) = Marker::parse(marker) else {
            unreachable!("a deflated grain has a marker and a size");
        };
        let len = (u64::from(size) + GRAIN_MARKER_BYTES as u64).next_multiple_of(SECTOR);
        let offset = match self.take_stream(len, place, cx) {
            Ok(offset) => offset,
            Err(Errno::AGAIN) => {
                let space = &mut self.grains_mut(place.part).space;
                cx.park(&mut space.waiters);
                let attempt = space.attempt;
                return Step::Wait(State::AppendSpace { claim: key, slot, attempt });
            }
            Err(errno) => return self.fail_compressed(key, slot, errno, cx),
        };
        self.claims[key].set_entry(Entry::Data(offset));
        self.next_turn(key, cx);
        let file = self.parts[place.part].file;
        let seg = self.compressed().beside(slot as usize, 0, len);
        cx.issue(Op::write(file, offset, Segs::one(seg)));
        Step::Wait(State::WriteGrain { claim: key, slot })
    }

    /// `bytes` bytes at the stream's end; [`Errno::AGAIN`] if they are not there yet.
    fn take_stream(&mut self, bytes: u64, place: Place, cx: &mut Cx<'_>) -> Result<u64, Errno> {
        let (taken, grow) = self.grains_mut(place.part).space.take(bytes, false);
        if grow {
            self.asked.push(Asked::Grow(place.part as u32));
            cx.ask();
        }
        match taken {
            Taken::At(offset) => Ok(offset),
            Taken::Later => Err(Errno::AGAIN),
            Taken::None(errno) => Err(errno),
        }
    }

    pub(super) fn append_woken(
        &mut self,
        key: u32,
        slot: u32,
        attempt: u32,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let (at, _) = self.claims[key].range();
        match self.grains(self.part_at(at)).space.failure_of(attempt) {
            Some(errno) => self.fail_compressed(key, slot, errno, cx),
            None => self.append(key, slot, Event::Woken, cx),
        }
    }

    /// The claim has its place, or will have none.
    fn next_turn(&mut self, key: u32, cx: &mut Cx<'_>) {
        let stream = self.stream();
        stream.queue.retain(|&waiting| waiting != key);
        cx.wake_all(&mut stream.turn);
    }

    pub(super) fn grain_written(
        &mut self,
        key: u32,
        slot: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if let Err(errno) = result {
            return self.fail_compressed(key, slot, errno, cx);
        }
        self.compressed().grains.load_ended(slot as usize, true, cx);
        self.published(key, cx)
    }

    fn fail_compressed(
        &mut self,
        key: u32,
        slot: u32,
        errno: Errno,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        self.next_turn(key, cx);
        self.compressed().grains.load_ended(slot as usize, false, cx);
        self.fail(key, errno, cx)
    }

    /// Puts an empty grain table for `at` into the stream.
    pub(super) fn stream_table(&mut self, at: u64, place: Place, cx: &mut Cx<'_>) -> Step<State> {
        if self.stream().making {
            cx.park(&mut self.stream().making_waiters);
            return Step::Wait(State::Next { at });
        }
        let bytes = self.grains(place.part).header.table_bytes();
        let Some([buf]) = cx.take_bufs() else {
            cx.park_for_bufs();
            return Step::Wait(State::Next { at });
        };
        let offset = match self.take_stream(SECTOR + bytes, place, cx) {
            Ok(offset) => offset,
            Err(Errno::AGAIN) => {
                cx.give_buf(buf);
                let (part, space) = (place.part as u32, &mut self.grains_mut(place.part).space);
                cx.park(&mut space.waiters);
                return Step::Wait(State::Space { at, part, attempt: space.attempt });
            }
            Err(errno) => {
                cx.give_buf(buf);
                return Step::Done(Err(errno));
            }
        };
        let stream = self.stream();
        (stream.making, stream.open) = (true, true);
        let len = (SECTOR + bytes) as usize;
        let memory = &mut cx.mem().pool_mut(buf)[..len];
        memory.fill(0);
        memory[..16].copy_from_slice(&Marker::Table.encode(bytes >> SECTOR_BITS));
        let seg = Seg { base: Base::Pool(buf), off: 0, len: len as u32 };
        cx.issue(Op::write(self.parts[place.part].file, offset, Segs::one(seg)));
        let sector = (offset >> SECTOR_BITS) as u32 + 1;
        Step::Wait(State::WriteTable { at, buf, sector })
    }

    pub(super) fn stream_table_written(
        &mut self,
        at: u64,
        buf: BufId,
        sector: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        cx.give_buf(buf);
        let place = self.place(self.part_at(at));
        if result.is_ok() {
            let index = (at - place.start) >> (place.grain_bits + place.table_bits);
            self.grains_mut(place.part).root.directory[index as usize] = sector;
        }
        let stream = self.stream();
        stream.making = false;
        cx.wake_all(&mut stream.making_waiters);
        match result {
            Ok(()) => Step::Go(State::Next { at }),
            Err(errno) => Step::Done(Err(errno)),
        }
    }

    /// Closing: writes the stream's end if it has none.
    pub(super) fn write_tail(&mut self, cx: &mut Cx<'_>) -> Option<Step<State>> {
        if !self.has_footer() || !self.stream().open {
            return None;
        }
        let grains = self.grains(0);
        let end = grains.space.end();
        let bytes = end_of_stream(&grains.header, end >> SECTOR_BITS, &grains.root.directory);
        let tail = self.stream().tail;
        cx.mem().region_mut(tail)[..bytes.len()].copy_from_slice(&bytes);
        let seg = Seg { base: Base::Region(tail), off: 0, len: bytes.len() as u32 };
        cx.issue(Op::write(self.parts[0].file, end, Segs::one(seg)));
        Some(Step::Wait(State::WriteTail))
    }

    /// The end is written: it is the file's.
    pub(super) fn tail_written(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let file = self.parts[0].file;
        let PartKind::Sparse(grains) = &mut self.parts[0].kind else {
            unreachable!("a stream is sparse");
        };
        let len = grains.space.end() + Stream::tail_bytes(&grains.header) as u64;
        grains.space.cut();
        grains.root.forget_length();
        self.stream().open = false;
        cx.issue(Op::bare(OpKind::Truncate, file, len, 0));
        Step::Wait(State::CutEnds { next: self.parts.len() as u32 })
    }
}
