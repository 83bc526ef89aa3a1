//! A piece of a request: what it is, what it awaits, how it gets on, what it works with.
//!
//! What is done to pieces is in other files: `allocate.rs`, `l2_table.rs`, `zero_discard.rs`,
//! `compressed.rs`, `compress.rs`.

use cowbell_engine::step::Cx;
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{BufId, HostOffset};
use cowbell_engine::wait::WaitList;

use crate::parts::claims::Claims;
use crate::parts::cow::{Cow, CowState};
use crate::parts::pieces;
use crate::qcow2::run::corrupt::Corrupt;
use crate::qcow2::run::image::{Disk, Image};
use crate::qcow2::run::live_header::LiveHeader;
use crate::qcow2::run::metadata::Metadata;
use crate::qcow2::run::packing::{PackState, Packing};
use crate::qcow2::run::reserve::{Reserve, Short};
use crate::qcow2::run::tables::{Run, Tables};
use crate::qcow2::run::writeback::Writeback;

/// A piece of a request, `at..end` of the guest's disk, which one slice of an L2 table maps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub at: u64,
    pub end: u64,
    /// What it begins with.
    pub run: Run,
    /// Has the request ops under way? Then it is not parked, but waits for those first.
    pub after_ops: bool,
}

/// A request's state, named by what it awaits. `at` is the first byte of the guest range not yet
/// done, `claim` the key of its claim.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RequestState {
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
    /// The `bytes` of a compressed cluster, on their way into `slot` of the inflated ones.
    ReadCompressed { at: u64, slot: u32, bytes: u32 },
    /// The cluster in `slot`, inflated.
    Inflate { at: u64, slot: u32 },
    /// A new L2 table's place, filled with zeros.
    ZeroTable { at: u64 },
    /// A piece of a shared L2 table, read into `buf`; `done` bytes of the table are copied.
    ReadTable { at: u64, done: u32, buf: BufId },
    /// That piece, written to the table's copy.
    CopyTable { at: u64, done: u32, buf: BufId },
    /// The L1 table, at rest, to link an L2 table.
    LinkTable { at: u64 },
    /// What new clusters are to hold.
    Cow { claim: u32, state: CowState },
    /// Room for what the entries give up, that writeback number `attempt` was to make.
    Publish { claim: u32, attempt: u32 },
    /// What a compressed write waits for.
    Pack(PackState),
    /// A writeback that began after the request came.
    Swept,
}

/// The label of a flush that is all that is left to do; of data ops likewise.
pub(super) const FLUSH: u8 = 12;
pub(super) const PIECES: u8 = 2;

impl RequestState {
    /// Where its name is in the list of the driver's states.
    #[inline]
    pub(super) fn label(&self) -> usize {
        match self {
            RequestState::Next { .. } => 0,
            RequestState::Space { .. } | RequestState::Room { .. } => 1,
            RequestState::Pieces { .. } => PIECES.into(),
            RequestState::LoadSlice { .. } => 3,
            RequestState::ReadCompressed { .. } => 4,
            RequestState::Inflate { .. } => 5,
            RequestState::ZeroTable { .. }
            | RequestState::ReadTable { .. }
            | RequestState::CopyTable { .. } => 6,
            RequestState::LinkTable { .. } => 7,
            RequestState::Cow { state, .. } => state.label([8, 8, 9, 10]),
            RequestState::Publish { .. } => 11,
            RequestState::Pack(PackState::Deflate { .. }) => 18,
            RequestState::Pack(_) => 19,
            RequestState::Swept => 13,
        }
    }
}

/// How far a piece has got.
pub(super) type Progress = pieces::Progress<RequestState>;

impl Progress {
    /// The clusters that it needs were not to be had.
    pub(super) fn short(at: u64, short: Short) -> Progress {
        match short {
            Short::Failed(errno) => Progress::Failed(errno),
            Short::Later(attempt) => Progress::Wait(RequestState::Space { at, attempt }),
        }
    }
}

/// Guest bytes being allocated.
#[derive(Clone, Hash, Debug)]
pub(super) struct Claim {
    /// Whole clusters, or units of one that has its place already.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// The slot of their table slice, pinned.
    pub slot: usize,
    /// Where the cluster of `start` is, or will be, in the data file; others follow it.
    pub host: HostOffset,
    /// Was that place taken from the reserve?
    pub is_new: bool,
    /// The guest range that this piece writes.
    pub at: u64,
    pub to: u64,
    /// What the entries will expose: units, or whole clusters, around that.
    pub exposed: (u64, u64),
    /// What these hold around the write.
    pub cow: Cow,
    /// Would the new place, without this data, show what was never there?
    pub owes: bool,
}

/// An L2 table being provided.
#[derive(Clone, Hash, Debug)]
pub(super) struct NewTable {
    pub l1_index: u32,
    pub table: HostOffset,
    /// The shared table that it is a copy of.
    pub old: Option<HostOffset>,
    /// Must a flush come before its link: was the table written?
    pub owes: bool,
    /// Who needs it.
    pub waiters: WaitList,
}

/// A step of a piece that takes more than an op, and what it works with.
pub(super) struct PieceStep<'a> {
    pub image: &'a Image,
    pub disk: &'a Disk,
    pub claims: &'a mut Claims<Claim>,
    pub new_tables: &'a mut Vec<NewTable>,
    pub tables: &'a mut Tables,
    pub metadata: &'a mut Metadata,
    pub inflated: &'a mut TableCache,
    pub packing: &'a mut Packing,
    pub reserve: &'a mut Reserve,
    pub writeback: &'a mut Writeback,
    pub header: &'a LiveHeader,
    pub corrupt: &'a mut Corrupt,
}

impl PieceStep<'_> {
    /// A table says something impossible of the guest's byte `at`.
    pub fn invalid_entry(&self, at: u64, cx: &mut Cx<'_>) -> Progress {
        Progress::Failed(self.corrupt.invalid_entry(at, self.tables, self.header, cx))
    }

    /// An entry leads a write to `host`, where metadata is.
    pub fn hits_metadata(&mut self, host: u64, cx: &mut Cx<'_>) -> Progress {
        Progress::Failed(self.corrupt.hit_metadata(host, cx))
    }
}
