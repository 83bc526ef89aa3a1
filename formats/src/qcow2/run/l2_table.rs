//! L2 tables of one's own: new ones, and copies of those that snapshots share.
//!
//! A table's space reads as zeros before anything leads to it: because it comes fresh from the
//! file's grown end, or because zeros were written. A shared table is copied whole first. What was
//! written owes a fence, as data does: its L1 block is not written before a flush of the table.
//!
//! One request provides a table; others that need it wait for that, and look again. Readers of a
//! shared table go on reading it.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::{Cx, Step};
use cowbell_engine::units::{BufId, Errno, HostOffset};
use cowbell_engine::wait::WaitList;

use crate::qcow2::disk::layout::{L1Entry, Mapping};
use crate::qcow2::run::{Qcow2, State};

/// An L2 table being provided.
#[derive(Clone, Hash, Debug)]
pub(super) struct TableAlloc {
    l1_index: u32,
    table: HostOffset,
    /// The shared table that it is a copy of.
    old: Option<HostOffset>,
    /// Must a flush come before its link: was the table written, or the file made longer for it?
    owes: bool,
    /// Who needs it.
    waiters: WaitList,
}

impl Qcow2 {
    /// Is there an L2 table for `at` that nobody shares?
    pub(super) fn owns_table(&self, at: u64) -> bool {
        let l1_index = at >> self.geometry.l2_span_bits();
        let word = self.l1.get(l1_index as usize).copied().unwrap_or(0);
        let entry = L1Entry::decode(word, self.geometry).ok().flatten();
        entry.is_some_and(|entry| entry.copied) || mutant!("qcow2_shared_table_changed")
    }

    /// Provides the L2 table of `l1_index` for the request, which is at `at`.
    pub(super) fn provide_table(&mut self, at: u64, l1_index: u32, cx: &mut Cx<'_>) -> Step<State> {
        let under_way = self.allocs.iter_mut().find(|alloc| alloc.l1_index == l1_index);
        if let Some(alloc) = under_way.filter(|_| !mutant!("qcow2_no_table_freeze")) {
            cx.park(&mut alloc.waiters);
            return Step::Wait(State::Next { at });
        }
        let Some(&word) = self.l1.get(l1_index as usize) else {
            return Step::Done(Err(Errno::IO));
        };
        let old = match L1Entry::decode(word, self.geometry) {
            Err(_) => return self.invalid_entry(at, cx),
            Ok(entry) => entry.map(|entry| entry.table),
        };
        let buf = match old {
            None => None,
            Some(_) => match cx.take_bufs() {
                Some([buf]) => Some(buf),
                None => {
                    cx.park_for_bufs();
                    return Step::Wait(State::Next { at });
                }
            },
        };
        let taken = match self.take_clusters(1, at, cx) {
            Ok(taken) => taken,
            Err(step) => {
                buf.into_iter().for_each(|buf| cx.give_buf(buf));
                return step;
            }
        };
        let bits = self.geometry.cluster_bits();
        let table = HostOffset(taken.first << bits);
        self.metadata.insert(taken.first);
        let is_written = !taken.is_zeros || old.is_some();
        let owes = is_written || taken.owes;
        self.allocs.push(TableAlloc { l1_index, table, old, owes, waiters: WaitList::new() });
        match buf {
            Some(buf) => self.read_table(at, (l1_index, 0, buf), cx),
            None if is_written && !mutant!("qcow2_table_not_filled") => {
                let zeros = Seg::zeros(self.geometry.cluster_size() as u32);
                cx.issue(Op::write(self.file, table.0, Segs::one(zeros)));
                Step::Wait(State::ZeroTable { at, l1_index })
            }
            None => self.link_table(at, l1_index, cx),
        }
    }

    fn alloc_of(&self, l1_index: u32) -> usize {
        let mine = self.allocs.iter().position(|alloc| alloc.l1_index == l1_index);
        mine.expect("the request that provides a table holds its entry")
    }

    /// Bytes of the table from `done` on that one buffer takes.
    fn table_piece(&self, done: u32, buf: BufId, cx: &Cx<'_>) -> Seg {
        let left = self.geometry.cluster_size() - u64::from(done);
        Seg { base: Base::Pool(buf), off: 0, len: left.min(cx.buf_size()) as u32 }
    }

    fn read_table(
        &mut self,
        at: u64,
        (l1_index, done, buf): (u32, u32, BufId),
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let old = self.allocs[self.alloc_of(l1_index)].old.expect("a copy has an original");
        let seg = self.table_piece(done, buf, cx);
        cx.issue(self.read_op(old.0 + u64::from(done), Segs::one(seg)));
        Step::Wait(State::ReadTable { at, l1_index, done, buf })
    }

    pub(super) fn table_read(
        &mut self,
        at: u64,
        (l1_index, done, buf): (u32, u32, BufId),
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if result.is_err() {
            cx.give_buf(buf);
            return self.table_filled(at, l1_index, result, cx);
        }
        let table = self.allocs[self.alloc_of(l1_index)].table;
        let seg = self.table_piece(done, buf, cx);
        cx.issue(Op::write(self.file, table.0 + u64::from(done), Segs::one(seg)));
        Step::Wait(State::CopyTable { at, l1_index, done, buf })
    }

    pub(super) fn table_copied(
        &mut self,
        at: u64,
        (l1_index, done, buf): (u32, u32, BufId),
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let done = done + self.table_piece(done, buf, cx).len;
        if result.is_ok() && u64::from(done) < self.geometry.cluster_size() {
            return self.read_table(at, (l1_index, done, buf), cx);
        }
        cx.give_buf(buf);
        self.table_filled(at, l1_index, result, cx)
    }

    /// The table is as it should be, but perhaps not stably.
    pub(super) fn table_filled(
        &mut self,
        at: u64,
        l1_index: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let Err(errno) = result else { return self.link_table(at, l1_index, cx) };
        let mut alloc = self.allocs.remove(self.alloc_of(l1_index));
        self.metadata.remove(&(alloc.table.0 >> self.geometry.cluster_bits()));
        self.reserve.give_back(alloc.table.0 >> self.geometry.cluster_bits(), 1);
        cx.wake_all(&mut alloc.waiters);
        Step::Done(Err(errno))
    }

    /// Links the table, in memory, unless a writeback has just fenced what its L1 block would owe
    /// another fence for.
    pub(super) fn link_table(&mut self, at: u64, l1_index: u32, cx: &mut Cx<'_>) -> Step<State> {
        let place = self.alloc_of(l1_index);
        let owes = self.allocs[place].owes && !mutant!("qcow2_table_owes_nothing");
        let waits = owes || self.reserve.is_uncounted();
        let is_sealed = waits && self.writeback.is_l1_sealed() && !mutant!("qcow2_seal_ignored");
        let is_moving = self.resizing.moves_l1() && !mutant!("qcow2_root_linked_while_moving");
        if is_sealed || is_moving {
            cx.park(&mut self.writeback.l1_waiters);
            return Step::Wait(State::LinkTable { at, l1_index });
        }
        let mut alloc = self.allocs.remove(place);
        let entry = L1Entry { table: alloc.table, copied: true };
        self.l1[l1_index as usize] = entry.encode();
        self.writeback.touch_l1(self.l1_block(l1_index), owes);
        match alloc.old {
            Some(old) => self.free(Some(Mapping::Data(old)), false, false),
            // It is known to be zeros.
            None => drop(self.tables.put_zeros(self.slice_key(at), cx)),
        }
        cx.wake_all(&mut alloc.waiters);
        self.walk(at, cx)
    }

    /// The block of the L1 table that holds an entry: what is written of it at once.
    fn l1_block(&self, l1_index: u32) -> u32 {
        l1_index >> (self.geometry.slice_bits() - 3)
    }
}
