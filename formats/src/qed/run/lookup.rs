//! Looking up a guest range, and the pieces that need no allocation.
//!
//! One step issues the ops of as many pieces as it can, joined: a fragmented request costs one
//! round trip, not one per fragment. It stops where something is missing (a table slice, a
//! mapping), waits for what it has issued, and looks again.

use cowbell_engine::mem::Memory;
use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind, Segs};
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::{Cx, Event, Io, IoKind, Step};
use cowbell_engine::units::{Errno, GuestOffset, HostOffset, align_down};

use crate::parts::backing;
use crate::qed::disk::layout::Entry;
use crate::qed::run::{PIECES, Qed, SLICE_BITS, SLICE_BYTES, State};

/// What is at a guest offset.
enum Found {
    /// The table slice is not in memory.
    NotLoaded { table: HostOffset },
    /// It is being loaded into this slot, or is about to be.
    Loading { slot: usize },
    /// There is no L2 table: unallocated up to `end`.
    NoTable { l1_index: u64, end: u64 },
    /// Up to `end` all is as `entry` says; data is contiguous from `entry`'s cluster on.
    Run { entry: Entry, end: u64, slot: usize },
    /// A table says something impossible.
    Invalid,
}

impl Qed {
    /// Where all of a request's bytes are, if that is known and in one piece: what most requests
    /// come down to.
    #[inline(always)]
    pub(super) fn in_one_piece(&mut self, io: &Io, mem: &Memory) -> Option<HostOffset> {
        let cluster = io.offset >> self.geometry.cluster_bits();
        let slot = self.tables.find(cluster >> SLICE_BITS)?;
        if !self.tables.is_ready(slot) {
            return None;
        }
        match self.run_in(slot, cluster, io.end(), mem) {
            Found::Run { entry: Entry::Data(offset), end, .. } if end == io.end() => {
                let inside = io.offset & (self.geometry.cluster_size() - 1);
                Some(HostOffset(offset.0 + inside))
            }
            _ => None,
        }
    }

    /// Goes on at `at`.
    pub(super) fn walk(&mut self, mut at: u64, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        let end = cx.io().end();
        if at >= end {
            return self.end(cx);
        }
        let mut issued = false;
        while at < end {
            if issued && cx.room() == 0 {
                return Step::Wait(State::Pieces { at });
            }
            at = match self.piece(at, end, event, &mut issued, cx) {
                Ok(at) => at,
                Err(step) => return step,
            };
        }
        self.walked(at, issued, cx)
    }

    /// Everything is done or on its way.
    fn walked(&mut self, at: u64, issued: bool, cx: &mut Cx<'_>) -> Step<State> {
        match cx.io().kind {
            _ if !issued => self.end(cx),
            IoKind::Write { fua: true } | IoKind::Zero { fua: true, .. } => {
                Step::Wait(State::Pieces { at })
            }
            _ => Step::Last { label: PIECES },
        }
    }

    /// One piece: where it ends, if it is done or on its way; else the step that waits for what
    /// it lacks.
    fn piece(
        &mut self,
        at: u64,
        end: u64,
        event: Event,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Result<u64, Step<State>> {
        let found = match self.look_up(at, end, cx) {
            Found::NoTable { end, .. } if self.needs_no_table(at, end, cx) => {
                Found::Run { entry: Entry::Unallocated, end, slot: usize::MAX }
            }
            found => found,
        };
        if let Found::Run { entry, end: run_end, .. } = found
            && let Some(done_to) = self.in_place(at, run_end, entry, event, issued, cx)
        {
            return Ok(done_to);
        }
        // First what is under way; then this, looked up again.
        Err(if *issued { Step::Wait(State::Pieces { at }) } else { self.provide(at, found, cx) })
    }

    /// Provides what is missing at `at`.
    fn provide(&mut self, at: u64, found: Found, cx: &mut Cx<'_>) -> Step<State> {
        match found {
            Found::Run { entry, end, slot } => self.allocate(at, end, entry, slot, cx),
            Found::NoTable { l1_index, .. } => self.allocate_table(at, l1_index, cx),
            Found::NotLoaded { table } => self.load_slice(at, table, cx),
            Found::Loading { slot } => {
                cx.park(self.tables.waiters(slot));
                Step::Wait(State::Next { at })
            }
            Found::Invalid => self.invalid_entry(at, cx),
        }
    }

    /// The entry that maps byte `at` cannot be. The request fails; others go on.
    fn invalid_entry(&self, at: u64, cx: &mut Cx<'_>) -> Step<State> {
        let index = self.geometry.l1_index(GuestOffset(at));
        let raw = self.l1.get(index as usize).copied().unwrap_or(0);
        match self.bounds().l1_entry(raw) {
            Some(Some(table)) => {
                let cluster = at >> self.geometry.cluster_bits();
                let inside = (cluster & ((1 << SLICE_BITS) - 1)) * 8;
                cx.tell_corrupt("L2 entry is invalid", self.slice_offset(table, cluster) + inside);
            }
            _ => cx.tell_corrupt("L1 entry is invalid", self.header.l1_offset().0 + index * 8),
        }
        Step::Done(Err(Errno::IO))
    }

    fn look_up(&mut self, at: u64, end: u64, cx: &mut Cx<'_>) -> Found {
        let cluster = at >> self.geometry.cluster_bits();
        match self.tables.find(cluster >> SLICE_BITS) {
            Some(slot) if self.tables.is_ready(slot) || mutant!("slice_used_while_loading") => {
                self.run_in(slot, cluster, end, cx.memory())
            }
            Some(slot) => Found::Loading { slot },
            None => self.look_up_l1(at, end),
        }
    }

    /// What the L1 table says: a slice is in memory only where it names a table.
    fn look_up_l1(&self, at: u64, end: u64) -> Found {
        let l1_index = self.geometry.l1_index(GuestOffset(at));
        let raw = self.l1.get(l1_index as usize).copied().unwrap_or(0);
        match self.bounds().l1_entry(raw) {
            None => Found::Invalid,
            Some(None) => {
                let span_end = (l1_index + 1).saturating_mul(self.geometry.l2_span());
                Found::NoTable { l1_index, end: span_end.min(end) }
            }
            Some(Some(table)) => Found::NotLoaded { table },
        }
    }

    #[inline(always)]
    fn run_in(&self, slot: usize, cluster: u64, end: u64, mem: &Memory) -> Found {
        let bits = self.geometry.cluster_bits();
        let bounds = self.bounds();
        let index = (cluster & ((1 << SLICE_BITS) - 1)) as usize;
        let (entries, _) = self.tables.bytes_from(slot, index * 8, mem).as_chunks::<8>();
        let first = entries.first().map(|entry| bounds.l2_entry(u64::from_le_bytes(*entry)));
        let Some(Some(entry)) = first else { return Found::Invalid };
        let mut run_end = (cluster + 1) << bits;
        let mut next = 1;
        let mut expected = entry;
        while run_end < end && next < entries.len() {
            if let Entry::Data(offset) = expected {
                expected = Entry::Data(HostOffset(offset.0 + self.geometry.cluster_size()));
            }
            let here = bounds.l2_entry(u64::from_le_bytes(entries[next]));
            if here != Some(expected) && !mutant!("run_ignores_type") {
                break;
            }
            run_end += 1 << bits;
            next += 1;
        }
        Found::Run { entry, end: run_end.min(end), slot }
    }

    /// Does a range without an L2 table do without one? Reads do, and what would only say zeros
    /// where zeros are.
    fn needs_no_table(&self, at: u64, end: u64, cx: &Cx<'_>) -> bool {
        match cx.io().kind {
            IoKind::Read | IoKind::Status { .. } => true,
            IoKind::Zero { .. } => !self.shows_backing(at),
            IoKind::Discard => !self.shows_backing(at) || self.whole_clusters(at, end).is_none(),
            _ => false,
        }
    }

    /// Would an unallocated cluster at `at` show the backing file's contents?
    #[inline]
    pub(super) fn shows_backing(&self, at: u64) -> bool {
        let start = align_down(at, self.geometry.cluster_size());
        self.backing.is_some_and(|backing| start < backing.size)
    }

    /// The whole clusters in `at..end`. The image's end counts as the end of its last cluster.
    pub(super) fn whole_clusters(&self, at: u64, end: u64) -> Option<(u64, u64)> {
        let size = self.geometry.cluster_size();
        let first = at.checked_next_multiple_of(size)?;
        let last = if end == self.size { end } else { align_down(end, size) };
        (first < last).then_some((first, last))
    }

    /// Does what needs no allocation for the run `at..run_end`; answers how far it got. `None`:
    /// something must be allocated at `at`.
    fn in_place(
        &mut self,
        at: u64,
        run_end: u64,
        entry: Entry,
        event: Event,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Option<u64> {
        let io = cx.io();
        let (from, len) = (at - io.offset, run_end - at);
        let Entry::Data(offset) = entry else {
            return self.without_data(at, run_end, entry, issued, cx);
        };
        if mutant!("woken_trusts_old_lookup") && event == Event::Woken && io.kind != IoKind::Read {
            return None;
        }
        let host = offset.0 + (at & (self.geometry.cluster_size() - 1));
        match io.kind {
            IoKind::Read => cx.read_guest(self.file, host, from, len),
            IoKind::Write { .. } => cx.write_guest(self.file, host, from, len, false),
            IoKind::Status { .. } => {
                cx.answer_status(StatusKind::Data, len, Some((self.file, HostOffset(host))));
                return Some(io.end());
            }
            _ => {
                let Some(op) = self.clear_op(at, run_end, host, cx) else { return Some(run_end) };
                cx.issue(op);
            }
        }
        *issued = true;
        Some(run_end)
    }

    /// The op that zeroes or discards the run `at..run_end`, whose data is at `host`.
    fn clear_op(&self, at: u64, run_end: u64, host: u64, cx: &Cx<'_>) -> Option<Op> {
        if let IoKind::Zero { unmap, .. } = cx.io().kind {
            return Some(Op::bare(OpKind::Zero { unmap }, self.file, host, run_end - at));
        }
        let (first, last) = self.whole_clusters(at, run_end)?;
        Some(Op::bare(OpKind::Discard, self.file, host + (first - at), last - first))
    }

    /// As `in_place`, for a run without data of its own.
    fn without_data(
        &mut self,
        at: u64,
        run_end: u64,
        entry: Entry,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Option<u64> {
        let io = cx.io();
        match (io.kind, entry) {
            (IoKind::Read, Entry::Zero) => {
                cx.zero_guest(at - io.offset, run_end - at);
                Some(run_end)
            }
            (IoKind::Read, _) => {
                *issued |= backing::read(self.backing, at, run_end, cx);
                Some(run_end)
            }
            (IoKind::Status { .. }, Entry::Zero) => {
                cx.answer_status(StatusKind::Zero, run_end - at, None);
                Some(io.end())
            }
            (IoKind::Status { .. }, _) => {
                *issued |= backing::status(self.backing, at, run_end, cx);
                Some(io.end())
            }
            (IoKind::Write { .. }, _) => None,
            (_, Entry::Zero) => Some(run_end),
            // Zero write or discard of an unallocated run.
            _ if !self.shows_backing(at) => Some(run_end),
            (IoKind::Discard, _) => match self.whole_clusters(at, run_end) {
                None => Some(run_end),
                // The cut cluster in front keeps its contents.
                Some((first, _)) if first > at => Some(first),
                Some(_) => None,
            },
            _ => None,
        }
    }

    fn load_slice(&mut self, at: u64, table: HostOffset, cx: &mut Cx<'_>) -> Step<State> {
        let cluster = at >> self.geometry.cluster_bits();
        let Some(slot) = self.tables.reserve(cluster >> SLICE_BITS) else {
            cx.park(&mut self.tables.full);
            return Step::Wait(State::Next { at });
        };
        let seg = self.tables.seg(slot, 0, SLICE_BYTES);
        cx.issue(self.read_op(self.slice_offset(table, cluster), Segs::one(seg)));
        Step::Wait(State::LoadSlice { at, slot: slot as u32 })
    }

    pub(super) fn slice_loaded(
        &mut self,
        at: u64,
        slot: usize,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if result.is_ok() && self.writable {
            let slice = at >> self.geometry.cluster_bits() >> SLICE_BITS;
            let (bounds, size) = (self.bounds_at_open(), self.geometry.cluster_size());
            let bytes = self.tables.bytes_mut(slot, cx.mem());
            let past = |entry| bounds.is_past_end(u64::from_le_bytes(entry), size);
            self.links[slot].past_end = self.past_end.disarm(slice, SLICE_BYTES, bytes, past);
        }
        self.tables.load_ended(slot, result.is_ok(), cx);
        match result {
            Ok(()) => self.walk(at, Event::Start, cx),
            Err(errno) => Step::Done(Err(errno)),
        }
    }
}
