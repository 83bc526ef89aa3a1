//! What the engine knows of a file: its alignment, whether a flush is owed, who rewrites blocks.
//!
//! Flushes are merged here. A flush in flight covers only what completed before it was issued, so
//! whoever asks meanwhile rides on the next one, together with everybody else who asks (R55).
//!
//! A file does nothing by itself: it answers what is to be done, and `core.rs` does it.

use std::hash::{Hash, Hasher};

use crate::backend::FileInfo;
use crate::given_up::GivenUp;
use crate::limits::Limits;
use crate::mem::Memory;
use crate::mutant;
use crate::op::{Op, OpKind, Seg};
use crate::units::{Errno, FileId, ReqId, Time, align_down, align_up};
use crate::wait::WaitList;

/// A range of a file that somebody reads, changes and writes back.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Claim {
    pub owner: ReqId,
    pub start: u64,
    pub end: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct FileState {
    /// Whose this place is; if it is vacant: whose it will be.
    pub id: FileId,
    pub is_vacant: bool,
    /// A node that uses it is paused: what was given up does not go back when its time comes.
    pub is_held: bool,
    pub info: FileInfo,
    /// The bits that are 0 in an offset or length, and in an address, that the file takes.
    pub block_mask: u32,
    pub address_mask: u32,
    /// The same of what it zeroes and discards by itself.
    pub hole_mask: u64,
    /// The length that the ops issued so far make the file have; never too small.
    pub len: u64,
    /// Has a modifying op been on its way since the last flush was issued? What ends after that is
    /// not covered by it.
    changed: bool,
    /// A flush failed: nobody knows what is stable any more, and every later flush says so (R56).
    poisoned: Option<Errno>,
    /// Who waits for the flush in flight.
    riders: Vec<ReqId>,
    /// Who waits for the flush after it.
    next_riders: Vec<ReqId>,
    /// Zeroing without writing zeros does not work here.
    pub zero_unsupported: bool,
    /// Ranges being read, changed and written back.
    pub claims: Vec<Claim>,
    /// Requests that wait for a claim to end, or for the gate to open.
    pub claim_waiters: WaitList,
    pub gate: Gate,
    pub given_up: GivenUp,
}

/// Through it goes everything on a file but what is done under the file's lock. That one closes it,
/// waits until nothing is in flight, and opens it again when it is done: inside the kernel others
/// would wait for it, and hold the loop.
#[derive(Clone, Copy, Default, Hash, Debug)]
pub(crate) struct Gate {
    /// Who has closed it.
    pub closed_by: Option<ReqId>,
    /// He, while something is in flight.
    pub quiet_waiter: WaitList,
    /// Who wants to close it next.
    pub next: WaitList,
    /// Since when it has been closed.
    pub since: Time,
    /// By how many in turn.
    pub turns: u32,
}

/// What is to be done for who asks for a flush.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Flush {
    /// Nothing: an earlier one failed so.
    Failed(Errno),
    /// Nothing: all is stable.
    NotOwed,
    /// It is issued.
    Issue,
    /// Nothing but to wait: one that is in flight, or will be, is for him too.
    Ride,
}

/// What is to be done when a flush has ended.
#[derive(Debug)]
pub(crate) enum NextFlush {
    /// Nothing.
    NotOwed,
    /// The next one is issued, for him.
    Issue(ReqId),
    /// They are told that it failed, as those before were.
    Failed(Vec<ReqId>, Errno),
}

impl FileState {
    /// A file of an engine of these limits.
    pub fn new(id: FileId, info: FileInfo, limits: &Limits) -> FileState {
        let (requests, discards) = (limits.requests, limits.discards_kept);
        FileState::with_room(id, info, requests, discards)
    }

    /// A place for a file that is to come. It takes no memory.
    pub fn vacant(id: FileId) -> FileState {
        let align = 1;
        let info = FileInfo {
            request_align: align,
            memory_align: align,
            hole_align: align,
            len: 0,
            can_grow: false,
            knows_holes: false,
        };
        FileState { is_vacant: true, ..FileState::with_room(id, info, 0, 0) }
    }

    fn with_room(id: FileId, info: FileInfo, requests: usize, discards: usize) -> FileState {
        FileState {
            id,
            is_vacant: false,
            is_held: false,
            info,
            block_mask: info.request_align - 1,
            hole_mask: u64::from(info.hole_align) - 1,
            address_mask: info.memory_align - 1,
            len: info.len,
            // What an earlier process wrote may not be stable: the first flush is a real one.
            changed: true,
            poisoned: None,
            riders: Vec::with_capacity(requests),
            next_riders: Vec::with_capacity(requests),
            zero_unsupported: false,
            claims: Vec::with_capacity(requests),
            claim_waiters: WaitList::new(),
            gate: Gate::default(),
            given_up: GivenUp::new(discards),
        }
    }

    /// `op`, which modifies, is on its way, and means the file to reach to `end`. If it fails, it may
    /// have happened in part: it counts too.
    #[inline]
    pub fn note_issued(&mut self, op: &Op, end: u64) {
        self.changed = true;
        self.note_used(op);
        match op.kind {
            OpKind::Write { .. } | OpKind::Zero { .. } | OpKind::Allocate | OpKind::Copy { .. } => {
                self.len = self.len.max(end);
            }
            // It may fail: what it cuts off is counted until it has not.
            OpKind::Truncate => self.len = self.len.max(op.offset),
            OpKind::Read | OpKind::Flush | OpKind::Discard | OpKind::Compute(_) | OpKind::Hole => {}
        }
    }

    /// `op`, which modifies, is on its way. What it writes is given up no more.
    #[inline]
    fn note_used(&mut self, op: &Op) {
        if self.given_up.is_empty() || mutant!("given_up_although_in_use") {
            return;
        }
        let end = if op.kind == OpKind::Truncate { u64::MAX } else { op.end() };
        self.given_up.remove(op.offset, end, self.hole_mask + 1);
    }

    /// Where there is something that was given up, and is to be given back before `op` can be done:
    /// what it reads, and the rest of blocks of which it changes a part.
    pub fn to_give_back(&self, op: &Op) -> Option<(u64, u64)> {
        if self.given_up.is_empty() {
            return None;
        }
        let (start, end) = (op.offset, op.end());
        let parts = match op.kind {
            OpKind::Read if mutant!("given_up_is_read_as_it_was") => return None,
            OpKind::Read => [(start, end); 2],
            OpKind::Discard | OpKind::Flush | OpKind::Compute(_) | OpKind::Hole => return None,
            _ => {
                let block = self.hole_mask + 1;
                let last = if op.kind == OpKind::Truncate { start } else { end };
                let rest = align_up(last, block).unwrap_or(u64::MAX);
                [(align_down(start, block), start), (last, rest)]
            }
        };
        parts.into_iter().find(|&(start, end)| self.given_up.overlaps(start, end))
    }

    /// Can it take a read or write as it is, now, at `offset`, of `seg`, which is memory with
    /// `bits` set in its addresses and lengths?
    #[inline(always)]
    pub fn takes(&self, kind: OpKind, offset: u64, seg: Seg, bits: u32) -> bool {
        let block = (offset as u32 | seg.len | bits) & self.block_mask;
        let address = (seg.off | bits) & self.address_mask;
        block | address == 0
            && self.gate.closed_by.is_none()
            && self.given_up.is_empty()
            && (matches!(kind, OpKind::Read) || self.claims.is_empty())
    }

    /// A write that ends at `end` is on its way.
    #[inline(always)]
    pub fn note_issued_to(&mut self, end: u64) {
        self.changed = true;
        if end > self.len {
            self.len = end;
        }
    }

    /// Can it take this read or write as it is, now?
    pub fn is_direct(&self, op: &Op, mem: &Memory) -> bool {
        (op.offset | op.len) & u64::from(self.block_mask) == 0
            && mem.is_aligned(&op.segs, self.address_mask, self.block_mask)
            && !self.is_closed()
            && self.to_give_back(op).is_none()
            && (!op.kind.modifies() || !self.is_claimed(op.offset, op.end()))
    }

    /// Does a read or write wait for somebody who has, or wants, the file to himself?
    pub fn is_closed(&self) -> bool {
        self.gate.closed_by.is_some() && !mutant!("gate_ignored")
    }

    /// Can it take this zeroing, discard or change of length as it is, now?
    pub fn is_whole(&self, op: &Op) -> bool {
        let cut = (op.offset | op.len) & self.hole_mask != 0 && !mutant!("zeroes_cut_blocks");
        let written = matches!(op.kind, OpKind::Zero { .. }) && (cut || self.zero_unsupported);
        let (start, end) = self.claim_of(op);
        !written && self.moved_end(op).is_none() && !self.is_claimed(start, end)
    }

    /// Where a block of the file system is cut by the file's end, as it is or will be, if `op` moves it.
    fn moved_end(&self, op: &Op) -> Option<u64> {
        let end = match op.kind {
            OpKind::Truncate => op.offset.min(self.len),
            OpKind::Allocate | OpKind::Zero { .. } if op.end() > self.len => self.len,
            _ => return None,
        };
        (end & self.hole_mask != 0 && !mutant!("file_end_cuts_unclaimed")).then_some(end)
    }

    /// The whole blocks, of the file and of its file system, that `op` changes something in.
    pub fn claim_of(&self, op: &Op) -> (u64, u64) {
        let (start, end) = match op.kind {
            OpKind::Truncate => (op.offset.min(self.len), u64::MAX),
            _ => (op.offset, op.end()),
        };
        let start = self.moved_end(op).map_or(start, |moved| start.min(moved));
        let block = u64::from(self.info.request_align.max(self.info.hole_align));
        (align_down(start, block), align_up(end, block).unwrap_or(u64::MAX))
    }

    /// A discard without the blocks that it cuts.
    pub fn within_blocks(&self, op: Op) -> Op {
        let block = self.hole_mask + 1;
        let Some(start) = align_up(op.offset, block) else { return Op { len: 0, ..op } };
        let end = align_down(op.end(), block);
        Op { offset: start, len: end.saturating_sub(start), ..op }
    }

    /// Does somebody have a claim that overlaps this range?
    pub fn is_claimed(&self, start: u64, end: u64) -> bool {
        self.claims.iter().any(|claim| claim.start < end && start < claim.end)
    }

    /// `request` wants everything that has completed to be stable.
    pub fn ask_flush(&mut self, request: ReqId) -> Flush {
        if let Some(errno) = self.poisoned
            && !mutant!("failed_flush_tried_again")
        {
            return Flush::Failed(errno);
        }
        let owed = self.changed || !self.riders.is_empty();
        if !owed || mutant!("flush_does_nothing") {
            return Flush::NotOwed;
        }
        if self.riders.is_empty() {
            self.riders.push(request);
            return Flush::Issue;
        }
        if mutant!("flush_rides_on_one_in_flight") {
            self.riders.push(request);
        } else {
            self.next_riders.push(request);
        }
        Flush::Ride
    }

    /// A flush is issued. `uncovered`: writes are in flight, which it does not cover.
    pub fn flush_issued(&mut self, uncovered: bool) {
        self.changed = uncovered;
    }

    /// Nobody knows any more what is stable.
    pub fn poison(&mut self, errno: Errno) {
        self.poisoned = Some(errno);
    }

    /// A flush has come back: whom it was for. They are told, then comes [`FileState::next_flush`].
    pub fn flush_ended(&mut self, leader: ReqId, result: Result<(), Errno>) -> Vec<ReqId> {
        debug_assert_eq!(self.riders.first(), Some(&leader));
        if let Err(errno) = result {
            (self.poisoned, self.changed) = (Some(errno), true);
        }
        std::mem::take(&mut self.riders)
    }

    /// `told` know how their flush ended. Who asked meanwhile is next.
    pub fn next_flush(&mut self, mut told: Vec<ReqId>) -> NextFlush {
        told.clear();
        let waiting = std::mem::replace(&mut self.next_riders, told);
        match (waiting.first(), self.poisoned) {
            (Some(_), Some(errno)) => NextFlush::Failed(waiting, errno),
            // It belongs to the first who asked for it; its result was announced to all.
            (Some(&first), None) => {
                self.riders = waiting;
                NextFlush::Issue(first)
            }
            (None, _) => {
                self.riders = waiting;
                NextFlush::NotOwed
            }
        }
    }

    /// Does this request wait for a flush, its own or another's?
    pub fn waits_for_flush(&self, request: ReqId) -> bool {
        self.riders.contains(&request) || self.next_riders.contains(&request)
    }

    pub fn assert_idle(&self) {
        assert!(self.riders.is_empty() && self.next_riders.is_empty(), "a flush was forgotten");
        assert!(self.claims.is_empty(), "claims left: {:?}", self.claims);
        assert!(self.claim_waiters.is_empty());
        assert!(self.gate.closed_by.is_none() && self.gate.next.is_empty(), "{:?}", self.gate);
        assert!(!self.given_up.is_going_on);
    }
}

impl Hash for FileState {
    fn hash<H: Hasher>(&self, h: &mut H) {
        (self.info, self.len, self.changed, self.poisoned).hash(h);
        (self.is_vacant, self.is_held).hash(h);
        (&self.riders, &self.next_riders, self.zero_unsupported, &self.claims).hash(h);
        (self.claim_waiters, &self.gate, &self.given_up).hash(h);
    }
}
