//! Zero writes and discards: changes of L2 entries where whole units are concerned, writes of
//! zeros where not.
//!
//! The entry changes in memory at once, and the request is done; a place that it gives up is kept
//! back until the change is stable and nobody in flight can be using it (`writeback.rs`). In images of
//! version 2 a table cannot say that a cluster is zeros: where a backing file would show, zeros are
//! written instead, and discards do nothing.

use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::step::{Cx, IoKind};
use cowbell_engine::units::align_down;

use crate::parts::claims::Around;
use crate::qcow2::disk::layout::{L2Entry, Mapping, units_mask};
use crate::qcow2::run::piece::{Piece, PieceStep, Progress, RequestState};

/// How far a piece has got; `None`: it is to be allocated.
type Cleared = Option<Progress>;

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

impl PieceStep<'_> {
    /// Clears what it can of the piece.
    pub fn clear(&mut self, piece: Piece, cx: &mut Cx<'_>) -> Cleared {
        match cx.io().kind {
            IoKind::Zero { unmap, .. } => self.zero(piece, unmap, cx),
            _ => self.discard(piece, cx),
        }
    }

    fn zero(&mut self, piece: Piece, unmap: bool, cx: &mut Cx<'_>) -> Cleared {
        let Piece { at, run, .. } = piece;
        let geometry = self.image.geometry;
        if self.header.is_raw_external() {
            return self.issue(OpKind::Zero { unmap }, at, at, run.end, cx);
        }
        match run.mapping {
            Mapping::Zero(None) => return Some(Progress::To(run.end)),
            Mapping::Zero(Some(_)) if !unmap => return Some(Progress::To(run.end)),
            Mapping::Unallocated(_) if !self.disk.shows_backing(at) => {
                return Some(Progress::To(run.end));
            }
            _ => {}
        }
        let unit = match run.mapping {
            Mapping::Compressed(_) => geometry.cluster_size(),
            _ => geometry.unit_size(),
        };
        let can_say_so = geometry.has_zero_clusters() || !self.disk.shows_backing(at);
        match self.disk.whole(at, run.end, unit).filter(|_| can_say_so) {
            Some((first, last)) if first == at => {
                self.mark(piece, last, if unmap { Mark::Unmap } else { Mark::Zero }, cx)
            }
            whole => {
                let end = whole.map_or(run.end, |(first, _)| first);
                let Mapping::Data(host) = run.mapping else { return None };
                if !run.copied {
                    return None;
                }
                let host = host.0 + (at & (geometry.cluster_size() - 1));
                if self.metadata.is_hit(host, end - at) {
                    return Some(self.hits_metadata(host, cx));
                }
                self.issue(OpKind::Zero { unmap: false }, host, at, end, cx)
            }
        }
    }

    /// Zeroes or discards `at..to` of the guest's disk where it is in the data file, at `host`.
    fn issue(&self, kind: OpKind, host: u64, at: u64, to: u64, cx: &mut Cx<'_>) -> Cleared {
        cx.issue(Op::bare(kind, self.image.data, host, to - at));
        Some(Progress::Issued(to))
    }

    fn discard(&mut self, piece: Piece, cx: &mut Cx<'_>) -> Cleared {
        let Piece { at, end, run, .. } = piece;
        // A cluster may be of several kinds, subcluster by subcluster: it goes as a whole.
        let end = if self.image.geometry.has_subclusters() { end } else { run.end };
        let (first, last) = match self.disk.whole_clusters(at, end) {
            None => return Some(Progress::To(end)),
            Some((first, _)) if first > at => return Some(Progress::To(first)),
            Some(whole) => whole,
        };
        if self.image.has_data_file() && self.image.pass_discards {
            return self.issue(OpKind::Discard, first, first, last, cx);
        }
        let shows_backing = self.disk.shows_backing(at);
        let is_nothing = matches!(run.mapping, Mapping::Zero(None))
            || matches!(run.mapping, Mapping::Unallocated(None)) && !shows_backing;
        let is_nothing = is_nothing && !self.image.geometry.has_subclusters();
        let cannot_say_so = shows_backing && !self.image.geometry.has_zero_clusters();
        if self.image.has_data_file() || is_nothing || cannot_say_so {
            return Some(Progress::To(last));
        }
        self.mark(piece, last, Mark::Discard, cx)
    }

    /// Changes the entries of the piece up to `last`, whole units in one slice.
    fn mark(&mut self, piece: Piece, last: u64, mark: Mark, cx: &mut Cx<'_>) -> Cleared {
        let bits = self.image.geometry.cluster_bits();
        let Piece { at, run, after_ops, .. } = piece;
        let slot = run.slot?;
        let claim = match self.claims.around(at, last) {
            Around::Within(key) if !mutant!("qcow2_zero_ignores_claims") => Some(key),
            _ => None,
        };
        let (has_table, has_room) =
            (self.tables.owns_table(at), self.writeback.has_room_for_frees());
        if after_ops && (!has_table || !has_room || claim.is_some()) {
            return Some(Progress::Wait(RequestState::Pieces { at }));
        }
        if !has_table {
            return Some(self.provide_table(at, cx));
        }
        if let Some(key) = claim {
            self.claims.park(key, cx);
            return Some(Progress::LookAgain(at));
        }
        if !has_room {
            let attempt = self.writeback.park_for_room(cx);
            return Some(Progress::Wait(RequestState::Room { at, attempt }));
        }
        for cluster in at >> bits..=(last - 1) >> bits {
            let from = at.max(cluster << bits);
            // What lies behind the disk's end goes with its last unit.
            let end = if last == self.disk.reach() { u64::MAX } else { last };
            let to = end.min((cluster + 1) << bits);
            self.mark_cluster(slot, from, to, mark, cx);
        }
        self.writeback.touch(slot, false, self.tables, cx);
        Some(Progress::To(last))
    }

    /// Changes the entry of one cluster, of which `from..to` is concerned.
    fn mark_cluster(&mut self, slot: usize, from: u64, to: u64, mark: Mark, cx: &mut Cx<'_>) {
        let geometry = self.image.geometry;
        let index = self.image.slice_index(from);
        let start = align_down(from, geometry.cluster_size());
        let old = L2Entry::read(self.tables.slices.bytes(slot, cx.mem()), index, geometry);
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
        let was_nothing =
            mark == Mark::Discard && place.is_none() && !self.disk.shows_backing(start);
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
        new.write(self.tables.slices.bytes_mut(slot, cx.mem()), index, geometry);
        if let (Some(place), true) = (place, is_whole && (host.is_none() || new.is_none())) {
            self.give_up(place, old.is_copied(), true);
        }
    }
}
