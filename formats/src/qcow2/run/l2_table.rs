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
use cowbell_engine::step::Cx;
use cowbell_engine::units::{BufId, Errno, HostOffset};
use cowbell_engine::wait::{On, WaitList};

use crate::qcow2::disk::layout::{L1Entry, Mapping};
use crate::qcow2::run::piece::{NewTable, PieceStep, Progress, RequestState};

impl PieceStep<'_> {
    fn l1_index(&self, at: u64) -> u32 {
        (at >> self.image.geometry.l2_span_bits()) as u32
    }

    /// Where the table for `at` is among those being provided.
    fn new_table(&self, at: u64) -> Option<usize> {
        let l1_index = self.l1_index(at);
        self.new_tables.iter().position(|new| new.l1_index == l1_index)
    }

    /// The same, for the request that provides it.
    fn my_table(&self, at: u64) -> usize {
        self.new_table(at).expect("the request that provides a table holds its entry")
    }

    /// Provides the table for the guest's byte `at`; or waits for who is providing it already.
    pub fn provide_table(&mut self, at: u64, cx: &mut Cx<'_>) -> Progress {
        if let Some(place) = self.new_table(at).filter(|_| !mutant!("qcow2_no_table_freeze")) {
            cx.park(&mut self.new_tables[place].waiters, On::Table);
            return Progress::LookAgain(at);
        }
        let l1_index = self.l1_index(at);
        if u64::from(l1_index) >= self.tables.l1_len() {
            return Progress::Failed(Errno::IO);
        }
        let old = match self.tables.l1_entry(at) {
            Err(_) => return self.invalid_entry(at, cx),
            Ok(entry) => entry.map(|entry| entry.table),
        };
        let buf = match old.map(|_| cx.take_bufs()) {
            None => None,
            Some(Some([buf])) => Some(buf),
            Some(None) => {
                cx.park_for_bufs();
                return Progress::LookAgain(at);
            }
        };
        let taken = match self.reserve.take(1, cx) {
            Ok(taken) => taken,
            Err(short) => {
                buf.into_iter().for_each(|buf| cx.give_buf(buf));
                return Progress::short(at, short);
            }
        };
        let table = HostOffset(taken.first << self.image.geometry.cluster_bits());
        self.metadata.add(taken.first..taken.first + 1);
        let owes = !taken.is_zeros || old.is_some();
        let waiters = WaitList::new();
        self.new_tables.push(NewTable { l1_index, table, old, owes, waiters });
        match buf {
            Some(buf) => self.read_table(at, 0, buf, cx),
            None if owes && !mutant!("qcow2_table_not_filled") => {
                let zeros = Seg::zeros(self.image.geometry.cluster_size() as u32);
                cx.issue(Op::write(self.image.file, table.0, Segs::one(zeros)));
                Progress::Wait(RequestState::ZeroTable { at })
            }
            None => self.link_table(at, cx),
        }
    }

    /// Bytes of the table from `done` on that one buffer takes.
    fn stretch(&self, done: u32, buf: BufId, cx: &Cx<'_>) -> Seg {
        let left = self.image.geometry.cluster_size() - u64::from(done);
        Seg { base: Base::Pool(buf), off: 0, len: left.min(cx.buf_size()) as u32 }
    }

    fn read_table(&mut self, at: u64, done: u32, buf: BufId, cx: &mut Cx<'_>) -> Progress {
        let old = self.new_tables[self.my_table(at)].old.expect("a copy has an original");
        let seg = self.stretch(done, buf, cx);
        cx.issue(self.image.read_op(old.0 + u64::from(done), Segs::one(seg)));
        Progress::Wait(RequestState::ReadTable { at, done, buf })
    }

    /// A piece of the shared table was read: it is written to the copy. Or it was written there: the
    /// next one's turn.
    pub fn copy_table(
        &mut self,
        at: u64,
        (done, buf): (u32, BufId),
        is_read: bool,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Progress {
        let seg = self.stretch(done, buf, cx);
        if result.is_ok() && is_read {
            let offset = self.new_tables[self.my_table(at)].table.0 + u64::from(done);
            cx.issue(Op::write(self.image.file, offset, Segs::one(seg)));
            return Progress::Wait(RequestState::CopyTable { at, done, buf });
        }
        let done = done + seg.len;
        if result.is_ok() && u64::from(done) < self.image.geometry.cluster_size() {
            return self.read_table(at, done, buf, cx);
        }
        cx.give_buf(buf);
        self.table_filled(at, result, cx)
    }

    /// The table is as it should be, but perhaps not stably.
    pub fn table_filled(
        &mut self,
        at: u64,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Progress {
        let Err(errno) = result else { return self.link_table(at, cx) };
        let mut new = self.new_tables.remove(self.my_table(at));
        let cluster = new.table.0 >> self.image.geometry.cluster_bits();
        self.metadata.remove(cluster..cluster + 1);
        self.reserve.give_back(cluster, 1);
        cx.wake_all(&mut new.waiters);
        Progress::Failed(errno)
    }

    /// Links the table, in memory, unless the L1 table is moving.
    pub fn link_table(&mut self, at: u64, cx: &mut Cx<'_>) -> Progress {
        if self.tables.l1_moves() && !mutant!("qcow2_root_linked_while_moving") {
            cx.park(&mut self.tables.l1_waiters, On::Table);
            return Progress::Wait(RequestState::LinkTable { at });
        }
        let mut new = self.new_tables.remove(self.my_table(at));
        self.tables.set_l1_entry(new.l1_index, L1Entry { table: new.table, copied: true });
        // The block of the L1 table: what is written of it at once.
        let block = new.l1_index >> (self.image.geometry.slice_bits() - 3);
        self.writeback.touch_l1(block, new.owes && !mutant!("qcow2_table_owes_nothing"));
        match new.old {
            Some(old) => {
                let sole = mutant!("qcow2_live_table_handed_out");
                self.give_up(Mapping::Data(old), sole, false);
            }
            // It is known to be zeros.
            None => drop(self.tables.slices.put_zeros(self.image.slice_key(at), cx)),
        }
        cx.wake_all(&mut new.waiters);
        Progress::To(at)
    }
}
