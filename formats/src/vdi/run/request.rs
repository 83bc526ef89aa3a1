//! What a guest's request does: what is at a byte of the disk, and how what is not mapped there is
//! allocated. `parts::pieces` walks over its range.
//!
//! An allocation *claims* its blocks of the disk from before they have a place until their entries are
//! published. Others who would allocate there wait on it; readers do not: they see zeros, as before.

use cowbell_engine::mutant;
use cowbell_engine::op::{Op, Seg, Segs};
use cowbell_engine::step::{Cx, Event};
use cowbell_engine::units::{Errno, FileId, RegionId};

use crate::parts::claims::Claims;
use crate::parts::growth::Growth;
use crate::parts::in_place::{Content, in_place};
use crate::parts::pieces::{self, Pieces};
use crate::parts::units;
use crate::parts::writeback::{Changes, Writeback};
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

/// What an allocating piece awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PieceState {
    /// Space that attempt number `attempt` to grow the file was to give: it goes on at `at`.
    Space { at: u64, attempt: u32 },
    /// Guest data, in a hole with zeros around it: for the claim of this key.
    WriteData { claim: u32 },
}

type Progress = pieces::Progress<PieceState>;

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
        self.map.image().header.block_size()
    }

    /// Panics if something is claimed, parked or busy. For tests, at rest.
    pub fn assert_idle(&self) {
        assert!(self.claims.is_empty(), "something is claimed");
        self.writeback.assert_idle();
        self.map.assert_idle();
    }

    /// Claims blocks for the unallocated run `at..run_end` and writes them.
    fn allocate(&mut self, at: u64, run_end: u64, cx: &mut Cx<'_>) -> Progress {
        let bits = self.map.image().header.block_bits;
        let index = at >> bits;
        let Some(free_to) = self.claims.free_to(index << bits, (index + 1) << bits, cx) else {
            return Progress::LookAgain(at);
        };
        let blocks = ((run_end.min(free_to) - 1) >> bits) + 1 - index;
        let new = match self.map.take(blocks.min((PIECE_MAX >> bits).max(1)), cx) {
            Ok(new) => new,
            // In the end: the device is full.
            Err(lack) => return Progress::lacks(lack, |attempt| PieceState::Space { at, attempt }),
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
        cx.issue(Op::write(self.map.file(), self.map.image().host_of(new.first, from), segs));
        Progress::Wait(PieceState::WriteData { claim })
    }

    /// The data is there: the entries lead to it. If it could not be written, its blocks are holes: others take them.
    fn data_written(&mut self, key: u32, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Progress {
        if let Err(errno) = result
            && !mutant!("vdi_data_error_ignored")
        {
            let claim = self.claims.end(key, false, cx);
            self.map.leave(claim.new);
            return Progress::Failed(errno);
        }
        let claim = self.claims.end(key, true, cx);
        self.map.publish(claim.index, claim.new);
        self.writeback.set_due(cx);
        Progress::To(claim.end)
    }
}

impl Pieces for Vdi {
    type State = PieceState;
    /// `None`: an entry that cannot be.
    type Found = Option<(Entry, u64)>;

    const PIECES: u8 = PIECES;

    fn find(&mut self, at: u64, end: u64, _: &mut Cx<'_>) -> Self::Found {
        self.map.image().run_at(at, end)
    }

    fn in_place(&mut self, at: u64, found: Self::Found, cx: &mut Cx<'_>) -> Option<Progress> {
        let ((entry, end), image) = (found?, self.map.image());
        let content = match entry {
            Entry::Block(block) => Content::Data(self.map.file(), image.host_of(block, at)),
            Entry::Zero => Content::Zeros,
        };
        let (size, disk) = (image.header.block_size(), image.header.size);
        let whole = |at, end| units::whole(at, end, size, 0..disk);
        in_place((at, end), content, None, whole, cx)
    }

    fn provide(&mut self, at: u64, found: Self::Found, cx: &mut Cx<'_>) -> Progress {
        match found {
            Some((_, end)) => self.allocate(at, end, cx),
            None => {
                self.map.tell_corrupt(at, cx);
                Progress::Failed(Errno::IO)
            }
        }
    }

    fn run_piece(&mut self, state: PieceState, event: Event, cx: &mut Cx<'_>) -> Progress {
        match (state, event) {
            (PieceState::Space { at, attempt }, Event::Woken) => {
                Progress::tried(at, self.map.space.failure_of(attempt))
            }
            (PieceState::WriteData { claim }, Event::Io(result)) => {
                self.data_written(claim, result, cx)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn changes(&mut self) -> (&mut Writeback, impl Changes) {
        (&mut self.writeback, &mut self.map)
    }
}
