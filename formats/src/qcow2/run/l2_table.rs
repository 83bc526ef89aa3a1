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
use cowbell_engine::step::{Cx, Event};
use cowbell_engine::units::{BufId, Errno, HostOffset};
use cowbell_engine::wait::WaitList;

use crate::qcow2::disk::layout::{L1Entry, Mapping};
use crate::qcow2::run::image::Image;
use crate::qcow2::run::metadata::Metadata;
use crate::qcow2::run::piece::Progress;
use crate::qcow2::run::reserve::Reserve;
use crate::qcow2::run::tables::Tables;
use crate::qcow2::run::writeback::Writeback;

/// What the request awaits that provides a table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TableState {
    /// A new table's place, filled with zeros.
    Zero,
    /// A piece of a shared table, read; `done` bytes of the table are copied.
    Read {
        /// Bytes.
        done: u32,
        /// Of that piece.
        buf: BufId,
    },
    /// That piece, written to the table's copy.
    Copy {
        /// Bytes.
        done: u32,
        /// Of that piece.
        buf: BufId,
    },
    /// The L1 table, at rest.
    Link,
}

/// An L2 table being provided.
#[derive(Clone, Hash, Debug)]
struct TableAlloc {
    l1_index: u32,
    table: HostOffset,
    /// The shared table that it is a copy of.
    old: Option<HostOffset>,
    /// Must a flush come before its link: was the table written?
    owes: bool,
    /// Who needs it.
    waiters: WaitList,
}

/// The L2 tables that are being provided.
#[derive(Clone, Hash, Debug)]
pub(super) struct NewTables(Vec<TableAlloc>);

impl NewTables {
    pub fn new() -> NewTables {
        NewTables(Vec::with_capacity(4))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn find(&self, l1_index: u32) -> usize {
        let mine = self.0.iter().position(|alloc| alloc.l1_index == l1_index);
        mine.expect("the request that provides a table holds its entry")
    }
}

/// A step of providing the table for the guest's byte `at`, and what it works with.
pub(super) struct TableStep<'a> {
    pub at: u64,
    pub image: &'a Image,
    pub new: &'a mut NewTables,
    pub tables: &'a mut Tables,
    pub metadata: &'a mut Metadata,
    pub reserve: &'a mut Reserve,
    pub writeback: &'a mut Writeback,
}

impl TableStep<'_> {
    fn l1_index(&self) -> u32 {
        (self.at >> self.image.geometry.l2_span_bits()) as u32
    }

    /// Begins; or waits for who is providing it already.
    pub fn begin(&mut self, cx: &mut Cx<'_>) -> Progress<TableState> {
        let l1_index = self.l1_index();
        let under_way = self.new.0.iter_mut().find(|alloc| alloc.l1_index == l1_index);
        if let Some(alloc) = under_way.filter(|_| !mutant!("qcow2_no_table_freeze")) {
            cx.park(&mut alloc.waiters);
            return Progress::LookAgain { at: self.at };
        }
        if u64::from(l1_index) >= self.tables.l1_len() {
            return Progress::Failed(Errno::IO);
        }
        let old = match self.tables.l1_entry(self.at) {
            Err(_) => return Progress::Invalid { at: self.at },
            Ok(entry) => entry.map(|entry| entry.table),
        };
        let buf = match old {
            None => None,
            Some(_) => match cx.take_bufs() {
                Some([buf]) => Some(buf),
                None => {
                    cx.park_for_bufs();
                    return Progress::LookAgain { at: self.at };
                }
            },
        };
        let taken = match self.reserve.take(1, cx) {
            Ok(taken) => taken,
            Err(short) => {
                buf.into_iter().for_each(|buf| cx.give_buf(buf));
                return Progress::short(self.at, short);
            }
        };
        let table = HostOffset(taken.first << self.image.geometry.cluster_bits());
        self.metadata.add(taken.first..taken.first + 1);
        let is_written = !taken.is_zeros || old.is_some();
        let alloc = TableAlloc { l1_index, table, old, owes: is_written, waiters: WaitList::new() };
        self.new.0.push(alloc);
        match buf {
            Some(buf) => self.read(0, buf, cx),
            None if is_written && !mutant!("qcow2_table_not_filled") => {
                let zeros = Seg::zeros(self.image.geometry.cluster_size() as u32);
                cx.issue(Op::write(self.image.file, table.0, Segs::one(zeros)));
                Progress::Wait(TableState::Zero)
            }
            None => self.link(cx),
        }
    }

    pub fn run(
        &mut self,
        state: TableState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Progress<TableState> {
        match (state, event) {
            (TableState::Zero, Event::Io(result)) => self.filled(result, cx),
            (TableState::Read { done, buf }, Event::Io(Ok(()))) => self.write(done, buf, cx),
            (TableState::Copy { done, buf }, Event::Io(Ok(()))) => {
                let done = done + self.piece(done, buf, cx).len;
                if u64::from(done) < self.image.geometry.cluster_size() {
                    return self.read(done, buf, cx);
                }
                cx.give_buf(buf);
                self.filled(Ok(()), cx)
            }
            (TableState::Read { buf, .. } | TableState::Copy { buf, .. }, Event::Io(result)) => {
                cx.give_buf(buf);
                self.filled(result, cx)
            }
            (TableState::Link, Event::Woken) => self.link(cx),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// Bytes of the table from `done` on that one buffer takes.
    fn piece(&self, done: u32, buf: BufId, cx: &Cx<'_>) -> Seg {
        let left = self.image.geometry.cluster_size() - u64::from(done);
        Seg { base: Base::Pool(buf), off: 0, len: left.min(cx.buf_size()) as u32 }
    }

    fn alloc(&self) -> &TableAlloc {
        &self.new.0[self.new.find(self.l1_index())]
    }

    fn read(&mut self, done: u32, buf: BufId, cx: &mut Cx<'_>) -> Progress<TableState> {
        let old = self.alloc().old.expect("a copy has an original");
        let seg = self.piece(done, buf, cx);
        cx.issue(self.image.read_op(old.0 + u64::from(done), Segs::one(seg)));
        Progress::Wait(TableState::Read { done, buf })
    }

    fn write(&mut self, done: u32, buf: BufId, cx: &mut Cx<'_>) -> Progress<TableState> {
        let offset = self.alloc().table.0 + u64::from(done);
        let seg = self.piece(done, buf, cx);
        cx.issue(Op::write(self.image.file, offset, Segs::one(seg)));
        Progress::Wait(TableState::Copy { done, buf })
    }

    /// The table is as it should be, but perhaps not stably.
    fn filled(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Progress<TableState> {
        let Err(errno) = result else { return self.link(cx) };
        let mut alloc = self.new.0.remove(self.new.find(self.l1_index()));
        let cluster = alloc.table.0 >> self.image.geometry.cluster_bits();
        self.metadata.remove(cluster..cluster + 1);
        self.reserve.give_back(cluster, 1);
        cx.wake_all(&mut alloc.waiters);
        Progress::Failed(errno)
    }

    /// Links the table, in memory, unless the L1 table is moving.
    fn link(&mut self, cx: &mut Cx<'_>) -> Progress<TableState> {
        let l1_index = self.l1_index();
        let place = self.new.find(l1_index);
        let owes = self.new.0[place].owes && !mutant!("qcow2_table_owes_nothing");
        if self.tables.l1_moves() && !mutant!("qcow2_root_linked_while_moving") {
            cx.park(&mut self.tables.l1_waiters);
            return Progress::Wait(TableState::Link);
        }
        let mut alloc = self.new.0.remove(place);
        self.tables.set_l1_entry(l1_index, L1Entry { table: alloc.table, copied: true });
        // The block of the L1 table: what is written of it at once.
        self.writeback.touch_l1(l1_index >> (self.image.geometry.slice_bits() - 3), owes);
        match alloc.old {
            Some(old) => self.writeback.give_up(Mapping::Data(old), false, false, self.image),
            // It is known to be zeros.
            None => drop(self.tables.slices.put_zeros(self.image.slice_key(self.at), cx)),
        }
        cx.wake_all(&mut alloc.waiters);
        Progress::To(self.at)
    }
}
