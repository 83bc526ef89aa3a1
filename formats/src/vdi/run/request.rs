//! A guest's request: looked up piece by piece, done where it is mapped; what is not is allocated.
//!
//! An allocation *claims* its blocks of the disk from before they have a place until their entries are
//! published. Others who would allocate there wait on it; readers do not: they see zeros, as before.

use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind, Seg, Segs};
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::{Cx, Event, IoKind, Step};
use cowbell_engine::units::{Errno, FileId, HostOffset, RegionId};

use crate::parts::claims::Claims;
use crate::parts::growth::{Growth, Lack};
use crate::parts::units;
use crate::parts::writeback::{Writeback, WritebackState};
use crate::vdi::disk::layout::Entry;
use crate::vdi::rest::open::Opened;
use crate::vdi::run::map::{Map, New, copies_bytes};

/// How a VDI image is run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VdiOptions {
    /// How the file grows. [`Grow::Write`](crate::parts::growth::Grow::Write) is taken as
    /// [`Grow::Truncate`](crate::parts::growth::Grow::Truncate).
    pub growth: Growth,
    /// How long after it has changed the map is written although nobody flushes, in milliseconds.
    pub writeback_after_ms: u64,
}

impl Default for VdiOptions {
    fn default() -> Self {
        VdiOptions { growth: Growth::default(), writeback_after_ms: 5000 }
    }
}

/// The label of data ops that are all that is left to do.
pub(super) const PIECES: u8 = 2;

/// An opened VDI image: all of its state.
#[derive(Clone, Hash, Debug)]
pub struct Vdi {
    pub(super) map: Map,
    pub(super) writeback: Writeback,
    pub(super) writable: bool,
    claims: Claims<Claim>,
}

/// Blocks of the disk that are being allocated.
#[derive(Clone, Hash, Debug)]
struct Claim {
    /// The first one's index in the map.
    index: u64,
    new: New,
    /// Where the guest range that this piece writes ends.
    end: u64,
}

/// What a request awaits. `at` is the first byte of its range that is not done yet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RequestState {
    /// Whatever it was parked on: look up what is at `at`.
    Next { at: u64 },
    /// As `Next`, for space that attempt number `attempt` to grow the file was to give.
    Space { at: u64, attempt: u32 },
    /// The ops of mapped pieces, up to `at`.
    Pieces { at: u64 },
    /// Guest data, in a hole with zeros around it: for the claim of this key.
    WriteData { claim: u32 },
    /// A flush, at the request's end or all that it is.
    Flush(WritebackState),
}

/// Bytes that one piece allocates at most, or one block: its op's lengths are 32 bits wide.
const PIECE_MAX: u64 = 1 << 30;

impl Vdi {
    /// The image that `opened` describes, in `file`. `region` gives as many bytes as it is asked for.
    pub fn new(
        file: FileId,
        opened: Opened,
        writable: bool,
        options: VdiOptions,
        region: impl FnOnce(usize) -> RegionId,
    ) -> Vdi {
        let copies = region(if writable { copies_bytes(&opened) } else { 0 });
        Vdi {
            map: Map::new(file, opened, copies, options.growth),
            writeback: Writeback::new(options.writeback_after_ms),
            writable,
            claims: Claims::new(),
        }
    }

    /// Bytes in a block.
    pub fn block_size(&self) -> u64 {
        self.map.header().block_size()
    }

    /// Panics if something is claimed, parked or busy. For tests, at rest.
    pub fn assert_idle(&self) {
        assert!(self.claims.is_empty(), "something is claimed");
        self.writeback.assert_idle();
        self.map.assert_idle();
    }

    pub(super) fn begin_request(&mut self, cx: &mut Cx<'_>) -> Step<RequestState> {
        let io = cx.io();
        match io.kind {
            IoKind::Flush => self.flush(cx),
            IoKind::Read | IoKind::Status { .. } => self.walk(io.offset, cx),
            _ if !self.writable => Step::Done(Err(Errno::READ_ONLY)),
            IoKind::Truncate => Step::Done(Err(Errno::NOT_SUPPORTED)),
            _ => self.walk(io.offset, cx),
        }
    }

    pub(super) fn step_request(
        &mut self,
        state: RequestState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<RequestState> {
        match (state, event) {
            (RequestState::Next { at }, Event::Woken) => self.walk(at, cx),
            (RequestState::Space { at, attempt }, Event::Woken) => {
                match self.map.failure_of(attempt) {
                    Some(errno) => Step::Done(Err(errno)),
                    None => self.walk(at, cx),
                }
            }
            (RequestState::Pieces { at }, Event::Io(Ok(()))) => self.walk(at, cx),
            (RequestState::Pieces { .. }, Event::Io(error)) => Step::Done(error),
            (RequestState::WriteData { claim }, Event::Io(result)) => {
                self.data_written(claim, result, cx)
            }
            (RequestState::Flush(state), event) => {
                self.writeback.step(state, event, &mut self.map, cx).map(RequestState::Flush)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn flush(&mut self, cx: &mut Cx<'_>) -> Step<RequestState> {
        self.writeback.flush(&mut self.map, cx).map(RequestState::Flush)
    }

    /// Goes on at `at`.
    fn walk(&mut self, mut at: u64, cx: &mut Cx<'_>) -> Step<RequestState> {
        let (io, mut issued) = (cx.io(), false);
        while at < io.end() {
            if issued && cx.room() == 0 {
                return Step::Wait(RequestState::Pieces { at });
            }
            let Some((entry, end)) = self.map.run_at(at, io.end()) else {
                if issued {
                    return Step::Wait(RequestState::Pieces { at });
                }
                self.map.tell_corrupt(at, cx);
                return Step::Done(Err(Errno::IO));
            };
            match (entry, io.kind) {
                (entry, IoKind::Status { .. }) => return self.answer_status(entry, at, end, cx),
                (Entry::Block(block), _) => issued |= self.in_place(block, at, end, cx),
                (Entry::Zero, IoKind::Read) => cx.zero_guest(at - io.offset, end - at),
                // First what is under way; then this, looked up again.
                (Entry::Zero, IoKind::Write { .. }) if issued => {
                    return Step::Wait(RequestState::Pieces { at });
                }
                (Entry::Zero, IoKind::Write { .. }) => return self.allocate(at, end, cx),
                // Zeros are there already.
                (Entry::Zero, _) => {}
            }
            at = end;
        }
        match io.kind {
            IoKind::Write { fua: true } | IoKind::Zero { fua: true, .. } if issued => {
                Step::Wait(RequestState::Pieces { at })
            }
            IoKind::Write { fua: true } | IoKind::Zero { fua: true, .. } => self.flush(cx),
            _ if issued => Step::Last { label: PIECES },
            _ => Step::Done(Ok(())),
        }
    }

    /// Says what `at..end` is.
    fn answer_status(
        &self,
        entry: Entry,
        at: u64,
        end: u64,
        cx: &mut Cx<'_>,
    ) -> Step<RequestState> {
        let (kind, host) = match entry {
            Entry::Block(block) => {
                let host = HostOffset(self.map.host_of(block, at));
                (StatusKind::Data, Some((self.map.file(), host)))
            }
            Entry::Zero => (StatusKind::Zero, None),
        };
        cx.answer_status(kind, end - at, host);
        Step::Done(Ok(()))
    }

    /// Does what is asked for to `at..end`, which is mapped from `block` on. Was there an op?
    fn in_place(&self, block: u32, at: u64, end: u64, cx: &mut Cx<'_>) -> bool {
        let (io, file) = (cx.io(), self.map.file());
        let (host, len) = (self.map.host_of(block, at), end - at);
        match io.kind {
            IoKind::Read => cx.read_guest(file, host, at - io.offset, len),
            IoKind::Write { .. } => cx.write_guest(file, host, at - io.offset, len, false),
            IoKind::Zero { unmap, .. } => {
                cx.issue(Op::bare(OpKind::Zero { unmap }, file, host, len));
            }
            _ => {
                let disk = 0..self.map.header().size;
                let Some((first, last)) = units::whole(at, end, self.block_size(), disk) else {
                    return false;
                };
                let host = host + (first - at);
                cx.issue(Op::bare(OpKind::Discard, file, host, last - first));
            }
        }
        true
    }

    /// Claims blocks for the unallocated run `at..run_end` and writes them.
    fn allocate(&mut self, at: u64, run_end: u64, cx: &mut Cx<'_>) -> Step<RequestState> {
        let bits = self.map.header().block_bits;
        let index = at >> bits;
        let Some(free_to) = self.claims.free_to(index << bits, (index + 1) << bits, cx) else {
            return Step::Wait(RequestState::Next { at });
        };
        let blocks = ((run_end.min(free_to) - 1) >> bits) + 1 - index;
        let new = match self.map.take(blocks.min((PIECE_MAX >> bits).max(1)), cx) {
            Ok(new) => new,
            Err(Lack::Parked(attempt)) => return Step::Wait(RequestState::Space { at, attempt }),
            // The device is full, or all blocks that the map can name are taken: some are leaked.
            Err(Lack::Never(errno)) => return Step::Done(Err(errno)),
        };
        let (start, blocks_end) = (index << bits, (index + new.count) << bits);
        let end = run_end.min(blocks_end);
        let claim = self.claims.insert(start..blocks_end, Claim { index, new, end });
        if mutant!("vdi_published_early") {
            self.map.publish(index, new);
        }
        let data = cx.guest(at - cx.io().offset, end - at);
        let (mut segs, mut from) = (Segs::one(data), at);
        if new.unknown && !mutant!("vdi_hole_not_filled") {
            (segs, from) = (Segs::none(), start);
            segs.push(Seg::zeros((at - start) as u32));
            segs.push(data);
            segs.push(Seg::zeros((blocks_end - end) as u32));
        }
        cx.issue(Op::write(self.map.file(), self.map.host_of(new.first, from), segs));
        Step::Wait(RequestState::WriteData { claim })
    }

    /// The data is there: the entries lead to it. If it could not be written, its blocks are leaked
    /// until the image is opened again.
    fn data_written(
        &mut self,
        key: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<RequestState> {
        if result.is_err() && !mutant!("vdi_data_error_ignored") {
            self.claims.end_failed(key, cx);
            return Step::Done(result);
        }
        let claim = self.claims.end(key, cx);
        self.map.publish(claim.index, claim.new);
        self.writeback.set_due(cx);
        self.walk(claim.end, cx)
    }
}
