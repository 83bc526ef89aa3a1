//! The requests' headers, and the ops that have not come back: fixed memory, no search.
//!
//! A header has a place for its request's first op beside it, under the same number: most requests
//! never need another, and what comes back is found with its request in one look. Further ops of a
//! request with many pieces have places of their own, with numbers from `OTHERS` on.

use std::hash::{Hash, Hasher};
use std::ops::{Index, IndexMut};

use crate::op::{Base, Completion, Op, OpKind, Seg, Segs, Target};
use crate::request::Pass;
use crate::slots::{Link, Origin, Slot, Waits, Work};
use crate::units::{FileId, OpId, ReqId};

pub use crate::op::OpOwner;

/// An op on its way, as the engine keeps it.
#[derive(Clone, Debug, Hash)]
pub struct OpRecord {
    /// The op.
    pub op: Op,
    /// Bytes already moved by earlier, short attempts: go on from there.
    pub moved: u64,
    /// Whose op it is, for traces and fault plans.
    pub owner: OpOwner,
    /// Is it on its way? Otherwise this is a place for the next.
    pub(crate) busy: bool,
}

impl OpRecord {
    /// The file it is for.
    ///
    /// # Panics
    ///
    /// If it is for none: a [`Compute`](crate::op::Compute).
    #[inline]
    pub fn file(&self) -> FileId {
        match self.op.target {
            Target::File(file) => file,
            other => panic!("an op on {other:?} is on no file"),
        }
    }

    /// Offset of the first byte still to be moved.
    #[inline]
    pub fn offset(&self) -> u64 {
        self.op.offset + self.moved
    }

    /// Bytes still to be moved.
    #[inline]
    pub fn remaining(&self) -> u64 {
        self.op.len - self.moved
    }

    /// Makes it a read or write of `seg`, written where it stays: most ops are made so.
    #[inline(always)]
    pub(crate) fn transfer(&mut self, kind: OpKind, file: FileId, offset: u64, seg: Seg) {
        let op = &mut self.op;
        (op.kind, op.target) = (kind, Target::File(file));
        (op.offset, op.len) = (offset, seg.len.into());
        op.segs.set(seg);
        self.moved = 0;
    }
}

/// Where the numbers begin of ops that are not their request's first.
const OTHERS: u32 = 1 << 31;

/// All ops that are waiting or in flight, by [`OpId`]; inside the engine the requests' headers, too.
#[derive(Debug)]
pub struct Ops {
    requests: Vec<Request>,
    /// The first header that is free; [`Slot::next`] leads on.
    free: Link,
    live: usize,
    others: Vec<OpRecord>,
    others_free: Vec<OpId>,
    len: usize,
}

/// A request's header, and its first op.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    pub slot: Slot,
    first: OpRecord,
}

// Finding one is a shift.
const _: () = assert!(size_of::<Request>() == 256);

impl Request {
    /// The request has become one op, which moves its memory, all of `seg`.
    #[inline(always)]
    pub fn pass_on(&mut self, kind: OpKind, pass: Pass, seg: Seg) {
        let Request { slot, first: record } = self;
        debug_assert!(!record.busy && slot.pending == 0, "a new request has no ops");
        record.busy = true;
        record.owner.ordinal = 0;
        record.transfer(kind, pass.file, pass.offset, seg);
        slot.pending = 1;
        (slot.waits, slot.label) = (Waits::Pass, pass.label);
    }
}

impl Ops {
    /// With memory for `requests` requests, and for `others` ops besides the first of each.
    pub(crate) fn new(requests: usize, others: usize) -> Ops {
        Ops {
            requests: Vec::with_capacity(requests),
            free: Link::NONE,
            live: 0,
            others: Vec::with_capacity(others),
            others_free: Vec::with_capacity(others),
            len: 0,
        }
    }

    /// A free header: its id, and where to write it. Nothing is pending in it, nothing has failed,
    /// its memory is its own and its work its node's.
    #[inline(always)]
    pub(crate) fn claim_slot(&mut self) -> (ReqId, &mut Slot) {
        self.live += 1;
        let id = match self.free.get() {
            Some(id) => id,
            None => self.one_more(),
        };
        let slot = &mut self.requests[id.index()].slot;
        self.free = slot.next;
        debug_assert!(slot.pending == 0 && slot.failed.is_none(), "{slot:?}");
        debug_assert_eq!((slot.work, slot.base, slot.base_off), (Work::Node, Base::Guest(id), 0));
        (id, slot)
    }

    #[cold]
    fn one_more(&mut self) -> ReqId {
        let id = ReqId(self.requests.len() as u32);
        let slot = Slot { base: Base::Guest(id), ..Slot::default() };
        let first = OpRecord { owner: OpOwner { request: id, ordinal: 0 }, ..OpRecord::default() };
        self.requests.push(Request { slot, first });
        id
    }

    /// Frees a header, for a last look at it. Whoever ends a request has seen that it waited for
    /// nothing, or has it from the queue of those that ended, where it is once.
    #[inline(always)]
    pub(crate) fn free_slot(&mut self, id: ReqId) -> &mut Slot {
        let slot = &mut self.requests[id.index()].slot;
        debug_assert!(slot.waits != Waits::Free, "{id:?} ends twice");
        slot.waits = Waits::Free;
        slot.next = self.free;
        self.free = Link::to(id);
        self.live -= 1;
        slot
    }

    /// A request's header, with its first op.
    #[inline(always)]
    pub(crate) fn request_mut(&mut self, id: ReqId) -> &mut Request {
        &mut self.requests[id.index()]
    }

    /// A request's header.
    #[inline(always)]
    pub(crate) fn slot(&self, id: ReqId) -> &Slot {
        &self.requests[id.index()].slot
    }

    /// A request's header.
    #[inline(always)]
    pub(crate) fn slot_mut(&mut self, id: ReqId) -> &mut Slot {
        &mut self.requests[id.index()].slot
    }

    /// The request of an op on its way, as the engine counts them: in order of submission, inner ones
    /// included. A recorded schedule that names ops so survives unrelated changes.
    pub fn serial(&self, request: ReqId) -> u32 {
        self.slot(request).serial
    }

    /// Is this the memory that the request came with, or one that it is made for? What is written from
    /// there is a disk's bytes, a guest's or a copy's, not the format's own.
    pub fn came_with(&self, mut request: ReqId, memory: Base) -> bool {
        loop {
            let slot = self.slot(request);
            match slot.origin {
                _ if slot.base == memory => return true,
                Origin::Child(parent) => request = parent,
                Origin::Guest | Origin::Abandoned | Origin::Chore => return false,
            }
        }
    }

    /// Headers that have not been freed.
    #[inline]
    pub(crate) fn live(&self) -> usize {
        self.live
    }

    /// The headers that have not been freed.
    pub(crate) fn slots(&self) -> impl Iterator<Item = (ReqId, &Slot)> {
        let slots = self.requests.iter().map(|request| &request.slot).enumerate();
        let live = slots.filter(|(_, slot)| slot.waits != Waits::Free);
        live.map(|(i, slot)| (ReqId(i as u32), slot))
    }

    /// The same, in the order in which the requests began.
    pub(crate) fn in_order(&self) -> Vec<ReqId> {
        let mut all: Vec<(u32, ReqId)> = self.slots().map(|(id, slot)| (slot.serial, id)).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, id)| id).collect()
    }

    /// [`Request::pass_on`] has begun an op.
    #[inline(always)]
    pub(crate) fn passed_on(&mut self) {
        self.len += 1;
    }

    /// A place for an op of `request`, which waits for one more from now on: its id, and the
    /// record to write.
    pub(crate) fn claim(&mut self, request: ReqId) -> (OpId, &mut OpRecord) {
        if self.requests[request.index()].first.busy {
            let owner = self.slot_mut(request).next_op(request);
            return self.claim_other(owner);
        }
        let Request { slot, first } = &mut self.requests[request.index()];
        first.busy = true;
        first.owner = slot.next_op(request);
        self.len += 1;
        (OpId(request.0), first)
    }

    fn claim_other(&mut self, owner: OpOwner) -> (OpId, &mut OpRecord) {
        self.len += 1;
        let id = self.others_free.pop().unwrap_or_else(|| {
            self.others.push(OpRecord::default());
            OpId(OTHERS + self.others.len() as u32 - 1)
        });
        let record = &mut self[id];
        (record.busy, record.owner) = (true, owner);
        (id, record)
    }

    /// A guest's request that was passed on, if its op has just done all it was asked to: the op
    /// is gone then, and the request waits to be polled.
    #[inline(always)]
    pub(crate) fn take_passed(&mut self, done: Completion) -> Option<&Slot> {
        let Request { slot, first } = self.requests.get_mut(done.op.index())?;
        let is_guests = slot.origin == Origin::Guest;
        if slot.waits != Waits::Pass || !is_guests || !done.is(first.remaining()) {
            return None;
        }
        debug_assert!(first.busy && slot.pending == 1, "as it was passed on: {slot:?}");
        first.busy = false;
        (slot.pending, slot.waits) = (0, Waits::Poll);
        self.len -= 1;
        Some(slot)
    }

    /// A read or write, if it has just done all it was asked to: it is gone then. Whose it was.
    #[inline(always)]
    pub(crate) fn take_whole(&mut self, done: Completion) -> Option<ReqId> {
        let record = &self[done.op];
        if !record.op.kind.has_memory() || !done.is(record.remaining()) {
            return None;
        }
        let request = record.owner.request;
        self.free_op(done.op);
        Some(request)
    }

    /// Puts in an op as it is.
    pub fn insert(&mut self, record: OpRecord) -> OpId {
        let (id, place) = self.claim_other(record.owner);
        *place = OpRecord { busy: true, ..record };
        id
    }

    /// The op has come back.
    pub fn remove(&mut self, id: OpId) -> OpRecord {
        let record = self[id].clone();
        self.free_op(id);
        record
    }

    /// Frees an op's place.
    #[inline(always)]
    fn free_op(&mut self, id: OpId) {
        let place = &mut self[id];
        assert!(place.busy, "{id:?} came back twice");
        place.busy = false;
        self.len -= 1;
        if id.0 >= OTHERS {
            self.others_free.push(id);
        }
    }

    #[inline(never)]
    fn other(&self, id: OpId) -> &OpRecord {
        &self.others[id.0.wrapping_sub(OTHERS) as usize]
    }

    /// Is this op on its way?
    pub fn contains(&self, id: OpId) -> bool {
        self.iter().any(|(other, _)| other == id)
    }

    /// Is there one that changes `file`?
    pub(crate) fn are_changing(&self, file: FileId) -> bool {
        let target = Target::File(file);
        self.iter().any(|(_, record)| record.op.target == target && record.op.kind.modifies())
    }

    /// Places of requests and of ops, those that nobody has included.
    pub fn places(&self) -> usize {
        self.requests.len() + self.others.len()
    }

    /// Ops on their way.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// None?
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All ops on their way, in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = (OpId, &OpRecord)> {
        let firsts = self.requests.iter().map(|request| &request.first).zip(0..);
        let others = self.others.iter().zip(OTHERS..);
        let busy = firsts.chain(others).filter(|(record, _)| record.busy);
        busy.map(|(record, id)| (OpId(id), record))
    }
}

impl Clone for Ops {
    fn clone(&self) -> Ops {
        let mut copy = Ops::new(0, 0);
        copy.clone_from(self);
        copy
    }

    fn clone_from(&mut self, source: &Ops) {
        self.requests.clone_from(&source.requests);
        self.others.clone_from(&source.others);
        self.others_free.clone_from(&source.others_free);
        (self.free, self.live, self.len) = (source.free, source.live, source.len);
    }
}

impl Default for OpRecord {
    fn default() -> OpRecord {
        let target = Target::File(FileId(0));
        let op = Op { kind: OpKind::Flush, target, offset: 0, len: 0, segs: Segs::none() };
        let owner = OpOwner { request: ReqId(0), ordinal: 0 };
        OpRecord { op, moved: 0, owner, busy: false }
    }
}

impl Index<OpId> for Ops {
    type Output = OpRecord;
    #[inline(always)]
    fn index(&self, id: OpId) -> &OpRecord {
        match self.requests.get(id.index()) {
            Some(request) => &request.first,
            None => self.other(id),
        }
    }
}

impl IndexMut<OpId> for Ops {
    fn index_mut(&mut self, id: OpId) -> &mut OpRecord {
        match self.requests.get_mut(id.index()) {
            Some(request) => &mut request.first,
            None => &mut self.others[id.0.wrapping_sub(OTHERS) as usize],
        }
    }
}

impl Hash for Ops {
    fn hash<H: Hasher>(&self, h: &mut H) {
        for (id, record) in self.iter() {
            (id, &record.op, record.moved, record.owner.request).hash(h);
        }
    }
}
