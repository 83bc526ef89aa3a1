//! Zero writes and discards: changes of L2 entries where whole units are concerned, writes of
//! zeros where not.
//!
//! The entry changes in memory at once, and the request is done; a place that it gives up is kept
//! back until the change is stable and nobody in flight can be using it (`writeback.rs`). In images of
//! version 2 a table cannot say that a cluster is zeros: where a backing file would show, zeros are
//! written instead, and discards do nothing.

use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::step::{Cx, IoKind, Step};
use cowbell_engine::units::{HostOffset, align_down};

use crate::parts::claims::Around;
use crate::qcow2::disk::layout::{L2Entry, Mapping, SUBCLUSTERS};
use crate::qcow2::run::lookup::{Piece, Run};
use crate::qcow2::run::writeback::Free;
use crate::qcow2::run::{Qcow2, State};

/// What becomes of entries.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// They read as zeros, and keep their places.
    Zero,
    /// They read as zeros, and give their places up.
    Unmap,
    /// Their contents are no longer needed.
    Discard,
}

impl Qcow2 {
    /// Clears what it can from `at` on, which `run` describes; its slice maps all of `at..end`.
    pub(super) fn clear(
        &mut self,
        at: u64,
        end: u64,
        run: Run,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Piece {
        match cx.io().kind {
            IoKind::Zero { unmap, .. } => self.zero(at, run, unmap, issued, cx),
            _ => self.discard(at, end, run, issued, cx),
        }
    }

    /// Is the data file to read, by itself, as the guest's disk does?
    pub(super) fn is_raw_external(&self) -> bool {
        self.header.is_raw_external()
    }

    fn zero(
        &mut self,
        at: u64,
        run: Run,
        unmap: bool,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Piece {
        let (geometry, len) = (self.geometry, run.end - at);
        if self.is_raw_external() {
            cx.issue(Op::bare(OpKind::Zero { unmap }, self.data, at, len));
            *issued = true;
            return Piece::To(run.end);
        }
        match run.mapping {
            Mapping::Zero(None) => return Piece::To(run.end),
            Mapping::Zero(Some(_)) if !unmap => return Piece::To(run.end),
            Mapping::Unallocated(_) if !self.shows_backing(at) => return Piece::To(run.end),
            _ => {}
        }
        let unit = match run.mapping {
            Mapping::Compressed(_) => geometry.cluster_size(),
            _ => geometry.unit_size(),
        };
        let can_say_so = geometry.has_zero_clusters() || !self.shows_backing(at);
        match self.whole(at, run.end, unit).filter(|_| can_say_so) {
            Some((first, last)) if first == at => {
                let mark = if unmap { Mark::Unmap } else { Mark::Zero };
                self.mark(at, last, run, mark, issued, cx)
            }
            whole => {
                let end = whole.map_or(run.end, |(first, _)| first);
                let Mapping::Data(host) = run.mapping else { return Piece::Lacks };
                if !run.copied {
                    return Piece::Lacks;
                }
                let host = host.0 + (at & (geometry.cluster_size() - 1));
                if self.hits_metadata(host, end - at) {
                    return Piece::Step(self.hit_metadata(host, cx));
                }
                let kind = OpKind::Zero { unmap: false };
                cx.issue(Op::bare(kind, self.data, host, end - at));
                *issued = true;
                Piece::To(end)
            }
        }
    }

    fn discard(
        &mut self,
        at: u64,
        end: u64,
        run: Run,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Piece {
        // A cluster may be of several kinds, subcluster by subcluster: it goes as a whole.
        let end = if self.geometry.has_subclusters() { end } else { run.end };
        let (first, last) = match self.whole_clusters(at, end) {
            None => return Piece::To(end),
            Some((first, _)) if first > at => return Piece::To(first),
            Some(whole) => whole,
        };
        if self.data != self.file {
            if self.options.pass_discards {
                cx.issue(Op::bare(OpKind::Discard, self.data, first, last - first));
                *issued = true;
            }
            return Piece::To(last);
        }
        let shows_backing = self.shows_backing(at);
        let is_nothing = matches!(run.mapping, Mapping::Zero(None))
            || matches!(run.mapping, Mapping::Unallocated(None)) && !shows_backing;
        let is_nothing = is_nothing && !self.geometry.has_subclusters();
        if is_nothing || shows_backing && !self.geometry.has_zero_clusters() {
            return Piece::To(last);
        }
        self.mark(at, last, run, Mark::Discard, issued, cx)
    }

    /// Changes the entries of `at..last`, whole units in one slice.
    fn mark(
        &mut self,
        at: u64,
        last: u64,
        run: Run,
        mark: Mark,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Piece {
        let bits = self.geometry.cluster_bits();
        let Some(slot) = run.slot else { return Piece::Lacks };
        if *issued && (!self.owns_table(at) || !self.writeback.has_room_for_frees()) {
            return Piece::Step(Step::Wait(State::Pieces { at }));
        }
        if !self.owns_table(at) {
            let l1_index = (at >> self.geometry.l2_span_bits()) as u32;
            return Piece::Step(self.provide_table(at, l1_index, cx));
        }
        if let Around::Within(key) = self.claims.around(at, last)
            && !mutant!("qcow2_zero_ignores_claims")
        {
            if *issued {
                return Piece::Step(Step::Wait(State::Pieces { at }));
            }
            cx.park(self.claims[key].waiters());
            return Piece::Step(Step::Wait(State::Next { at }));
        }
        if !self.writeback.has_room_for_frees() {
            let attempt = self.park_for_room(cx);
            return Piece::Step(Step::Wait(State::Room { at, attempt }));
        }
        for cluster in at >> bits..=(last - 1) >> bits {
            let from = at.max(cluster << bits);
            // What lies behind the disk's end goes with its last unit.
            let end = if last == self.reach { u64::MAX } else { last };
            let to = end.min((cluster + 1) << bits);
            self.mark_cluster(slot, from, to, mark, cx);
        }
        self.touch(slot, false);
        self.writeback_if_full(cx);
        Piece::To(last)
    }

    /// Changes the entry of one cluster, of which `from..to` is concerned.
    fn mark_cluster(&mut self, slot: usize, from: u64, to: u64, mark: Mark, cx: &mut Cx<'_>) {
        let geometry = self.geometry;
        let index = self.slice_index(from);
        let start = align_down(from, geometry.cluster_size());
        let old = L2Entry::read(self.tables.bytes(slot, cx.mem()), index, geometry);
        let Ok(place) = old.place(geometry) else {
            // Found when it is next looked up; its unit is not this one.
            return;
        };
        let is_whole = to - from == geometry.cluster_size();
        let keeps_place = match mark {
            Mark::Zero => old.is_copied() || !is_whole,
            Mark::Unmap => !is_whole,
            Mark::Discard => false,
        };
        let host = place.and_then(Mapping::host).filter(|_| keeps_place);
        let was_nothing = mark == Mark::Discard && place.is_none() && !self.shows_backing(start);
        let new = if !is_whole {
            let mask = units_mask(from - start, to - start, geometry.unit_bits());
            old.with_subclusters(mask, false)
        } else if !geometry.has_zero_clusters() || was_nothing {
            L2Entry::NONE
        } else {
            L2Entry::zero(host, geometry)
        };
        if new == old {
            return;
        }
        new.write(self.tables.bytes_mut(slot, cx.mem()), index, geometry);
        if is_whole && (host.is_none() || new.is_none()) {
            self.free(place, old.is_copied(), true);
        }
    }

    /// A reference to `place` was given up in memory.
    pub(super) fn free(&mut self, place: Option<Mapping>, sole: bool, discard: bool) {
        let bits = self.geometry.cluster_bits();
        let (host, len) = match place {
            Some(Mapping::Data(host)) if self.data == self.file => (host, 1 << bits),
            Some(Mapping::Compressed(compressed)) => {
                self.forget_inflated(compressed.host);
                (compressed.host, compressed.bytes.into())
            }
            _ => return,
        };
        let (first, last) = (host.0 >> bits, (host.0 + len - 1) >> bits);
        let discard = discard && sole && self.options.pass_discards;
        self.writeback.free(Free { first, count: last - first + 1, sole, discard });
    }

    /// A cluster that was allocated, and that nothing came to refer to.
    pub(super) fn give_back(&mut self, host: HostOffset, count: u64) {
        if self.data == self.file {
            self.reserve.give_back(host.0 >> self.geometry.cluster_bits(), count);
        }
    }
}

/// The subclusters of `from..to`, bytes of their cluster.
pub(super) fn units_mask(from: u64, to: u64, unit_bits: u32) -> u32 {
    let (first, end) = ((from >> unit_bits) as u32, (to >> unit_bits) as u32);
    debug_assert!(first < end && end <= SUBCLUSTERS);
    (u32::MAX >> (SUBCLUSTERS - (end - first))) << first
}
