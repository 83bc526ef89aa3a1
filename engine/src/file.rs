//! What the engine knows of a file: its alignment, whether a flush is owed, who rewrites blocks.
//!
//! Flushes are merged here. A flush in flight covers only what completed before it was issued, so
//! whoever asks meanwhile rides on the next one, together with everybody else who asks (R55).

use std::hash::{Hash, Hasher};

use crate::backend::FileInfo;
use crate::core::Core;
use crate::given_up::GivenUp;
use crate::limits::Limits;
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
            OpKind::Write { .. } | OpKind::Zero { .. } | OpKind::Allocate => {
                self.len = self.len.max(end);
            }
            // It may fail: what it cuts off is counted until it has not.
            OpKind::Truncate => self.len = self.len.max(op.offset),
            OpKind::Read | OpKind::Flush | OpKind::Discard | OpKind::Compute(_) => {}
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
            OpKind::Discard | OpKind::Flush | OpKind::Compute(_) => return None,
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

impl Core {
    /// `request` wants everything that has completed on `file` to be stable.
    pub(crate) fn issue_flush(&mut self, request: ReqId, file: FileId) {
        let state = &mut self.files[file.index()];
        if let Some(errno) = state.poisoned
            && !mutant!("failed_flush_tried_again")
        {
            let slot = self.ops.slot_mut(request);
            slot.issued = true;
            slot.failed = slot.failed.or(Some(errno));
            return;
        }
        let owed = state.changed || !state.riders.is_empty();
        if !owed || mutant!("flush_does_nothing") {
            self.ops.slot_mut(request).issued = true;
            return;
        }
        if state.riders.is_empty() {
            state.riders.push(request);
            self.enqueue_flush(request, file);
        } else if mutant!("flush_rides_on_one_in_flight") {
            state.riders.push(request);
            self.expect_result(request);
        } else {
            state.next_riders.push(request);
            self.expect_result(request);
        }
    }

    /// A flush of a file has come back.
    pub(crate) fn complete_flush(
        &mut self,
        file: FileId,
        leader: ReqId,
        result: Result<(), Errno>,
    ) {
        let state = &mut self.files[file.index()];
        debug_assert_eq!(state.riders.first(), Some(&leader));
        let result = if mutant!("flush_error_swallowed") { Ok(()) } else { result };
        if let Err(errno) = result {
            (state.poisoned, state.changed) = (Some(errno), true);
            if mutant!("failed_flush_poisons_others") {
                self.files.iter_mut().for_each(|other| other.poisoned = Some(errno));
            }
        }
        let state = &mut self.files[file.index()];
        let mut riders = std::mem::take(&mut state.riders);
        let waiting = std::mem::take(&mut state.next_riders);
        for &rider in &riders {
            self.op_done(rider, result);
        }
        riders.clear();
        self.files[file.index()].next_riders = riders;
        let Some(&first) = waiting.first() else {
            self.files[file.index()].riders = waiting;
            return;
        };
        // The next flush belongs to the first who asked for it; its result was announced to all.
        let state = &mut self.files[file.index()];
        match state.poisoned {
            Some(errno) => {
                let mut waiting = waiting;
                for &rider in &waiting {
                    self.op_done(rider, Err(errno));
                }
                waiting.clear();
                self.files[file.index()].riders = waiting;
            }
            None => {
                state.riders = waiting;
                self.ops.slot_mut(first).pending -= 1;
                self.enqueue_flush(first, file);
            }
        }
    }

    fn enqueue_flush(&mut self, request: ReqId, file: FileId) {
        let uncovered = self.ops.are_changing(file) && !mutant!("flush_covers_what_is_in_flight");
        self.files[file.index()].changed = uncovered;
        self.stats.flushes += 1;
        self.enqueue(request, Op::flush(file));
    }
}
