//! Allocating writes: claim, copy-on-write, data, publish.
//!
//! A claim covers guest bytes from before their clusters are taken until their entries say so in
//! memory. Others who would allocate there, or clear it, wait on it; readers do not: they see what
//! was there before. A claim lies within one table slice, which stays in memory meanwhile.
//!
//! What the new clusters must hold around the write is read as a guest reads it, by a request to
//! this very node: through zero clusters, compressed ones, shared ones and the backing file.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs, Target};
use cowbell_engine::step::{Cx, IoKind, Step};
use cowbell_engine::units::{BufId, Errno, HostOffset, align_down};
use cowbell_engine::wait::WaitList;

use crate::parts::claims::Around;
use crate::parts::cow;
use crate::qcow2::disk::layout::{L2Entry, Mapping};
use crate::qcow2::run::lookup::Run;
use crate::qcow2::run::zero_discard::units_mask;
use crate::qcow2::run::{Qcow2, State};

/// Guest bytes being allocated.
#[derive(Clone, Hash, Debug)]
pub(super) struct Claim {
    /// Whole clusters, or units of one that has its place already.
    start: u64,
    /// One past the last.
    end: u64,
    waiters: WaitList,
    /// The slot of their table slice, pinned.
    slot: usize,
    /// Where the cluster of `start` is, or will be, in the data file; others follow it.
    host: HostOffset,
    /// Was that place taken from the reserve?
    is_new: bool,
    /// The guest range that this piece writes.
    at: u64,
    to: u64,
    /// What the entries will expose: units, or whole clusters, around that.
    exposed: (u64, u64),
    fill: Fill,
    /// Would the new place, without this data, show what was never there?
    owes: bool,
    bufs: [Option<BufId>; 2],
}

impl Claim {
    /// Who waits for it to end.
    pub fn waiters(&mut self) -> &mut WaitList {
        &mut self.waiters
    }
}

/// What the exposed bytes around the write come from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Fill {
    /// They are there: durable zeros.
    Nothing,
    /// Zeros are written.
    Zeros,
    /// What a guest reads there.
    Own,
}

/// Where a piece is to go.
struct Plan {
    /// A place that is kept.
    place: Option<HostOffset>,
    /// Bytes of what the entries expose in one: a unit, or a cluster that is copied as a whole.
    grain: u64,
    /// What is there now reads as zeros.
    was_zeros: bool,
}

/// Bytes of zeros that are written at once.
const ZEROS_MAX: u64 = 2 << 20;

impl Qcow2 {
    /// Claims clusters for the run at `at` and begins to fill them.
    pub(super) fn allocate(&mut self, at: u64, run: Run, cx: &mut Cx<'_>) -> Step<State> {
        let bits = self.geometry.cluster_bits();
        if !self.owns_table(at) {
            return self.provide_table(at, (at >> self.geometry.l2_span_bits()) as u32, cx);
        }
        let plan = self.plan(at, run);
        let mut to = run.end;
        if !matches!(cx.io().kind, IoKind::Write { .. }) {
            // A cut unit of a zero write is written as data, by itself; where a table cannot say
            // that the others are zeros, they are too.
            let says_so = self.geometry.has_zero_clusters() || !self.shows_backing(at);
            let most = if says_so { plan.grain } else { plan.grain.max(ZEROS_MAX) };
            to = to.min(align_down(at, plan.grain) + most);
        }
        let reach = if plan.place.is_some() { plan.grain } else { 1 << bits };
        let start = align_down(at, reach);
        let short = if mutant!("qcow2_claim_short") { reach } else { 0 };
        match self.claims.around(start, start + reach - short) {
            _ if mutant!("qcow2_no_claims") => {}
            Around::Within(key) => {
                cx.park(&mut self.claims[key].waiters);
                return Step::Wait(State::Next { at });
            }
            Around::Before(next) => to = to.min(next),
        }
        let fill = match plan.was_zeros {
            true => Fill::Zeros,
            false => Fill::Own,
        };
        let bufs = match self.take_cow_bufs(at, to, plan.grain, fill, cx) {
            Ok(bufs) => bufs,
            Err(step) => return step,
        };
        let (host, is_fresh, is_stable) = match plan.place {
            Some(place) => (place, false, true),
            None => match self.take_place(start, to, at, cx) {
                Ok((host, count, is_fresh, is_stable)) => {
                    to = to.min(start + (count << bits));
                    (host, is_fresh, is_stable)
                }
                Err(step) => {
                    bufs.into_iter().flatten().for_each(|buf| cx.give_buf(buf));
                    return step;
                }
            },
        };
        let exposed = (align_down(at, plan.grain), to.next_multiple_of(plan.grain));
        let is_zeros = is_fresh && plan.was_zeros;
        self.tables.pin(run.slot.expect("a claim is made of what a slice says"));
        let claim = Claim {
            start,
            end: to.next_multiple_of(reach),
            waiters: WaitList::new(),
            slot: run.slot.expect("as above"),
            host,
            is_new: plan.place.is_none(),
            at,
            to,
            exposed,
            fill: if is_zeros { Fill::Nothing } else { fill },
            owes: !(is_zeros && is_stable) && !mutant!("qcow2_no_fence_for_data"),
            bufs,
        };
        let key = self.claims.insert(start..claim.end, claim);
        if mutant!("qcow2_published_early") {
            self.put_entries(key, cx);
        }
        self.begin_cow(key, cx)
    }

    fn plan(&self, at: u64, run: Run) -> Plan {
        let (cluster, unit) = (self.geometry.cluster_size(), self.geometry.unit_size());
        let (place, grain, was_zeros) = match run.mapping {
            Mapping::Data(_) | Mapping::Compressed(_) => (None, cluster, false),
            Mapping::Zero(Some(_)) | Mapping::Unallocated(Some(_)) if !run.copied => {
                (None, cluster, false)
            }
            Mapping::Zero(place) => (place, unit, true),
            Mapping::Unallocated(place) => (place, unit, !self.shows_backing(at)),
        };
        // The place is that of the run's first cluster, where the claim's may begin with.
        Plan { place, grain, was_zeros }
    }

    /// Buffers for what is around `at..to`, in grains of `grain` bytes: before anything is claimed,
    /// so that who waits for buffers holds nothing.
    fn take_cow_bufs(
        &self,
        at: u64,
        to: u64,
        grain: u64,
        fill: Fill,
        cx: &mut Cx<'_>,
    ) -> Result<[Option<BufId>; 2], Step<State>> {
        let (head, tail) = (at & (grain - 1), to.next_multiple_of(grain) - to);
        let size = cx.buf_size();
        let bufs = match (head > 0, tail > 0) {
            _ if fill != Fill::Own => return Ok([None; 2]),
            (false, false) => return Ok([None; 2]),
            (true, true) if head <= size && tail <= size => {
                cx.take_bufs().map(|[a, b]| [Some(a), Some(b)])
            }
            (false, true) if tail <= size => cx.take_bufs().map(|[b]| [None, Some(b)]),
            _ => cx.take_bufs().map(|[a]| [Some(a), None]),
        };
        bufs.ok_or_else(|| {
            cx.park_for_bufs();
            Step::Wait(State::Next { at })
        })
    }

    /// New clusters for `start..to`: where, how many, are they zeros, and is the file known to hold
    /// them after any crash? Or the step that waits.
    fn take_place(
        &mut self,
        start: u64,
        to: u64,
        at: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(HostOffset, u64, bool, bool), Step<State>> {
        let bits = self.geometry.cluster_bits();
        let count = (to - start).div_ceil(1 << bits);
        if self.data != self.file {
            return Ok((HostOffset(start), count, false, true));
        }
        let taken = self.take_clusters(count, at, cx)?;
        Ok((HostOffset(taken.first << bits), taken.count, taken.is_zeros, !taken.owes))
    }

    /// The guest ranges around the write that the entries expose: in front, behind.
    fn edges(claim: &Claim) -> [(u64, u64); 2] {
        let tail = if mutant!("qcow2_cow_tail_skipped") { claim.to } else { claim.exposed.1 };
        [(claim.exposed.0, claim.at), (claim.to, tail)]
    }

    /// The host offset of the guest's byte `at` in a claim.
    fn host_of(&self, claim: &Claim, at: u64) -> u64 {
        claim.host.0 + (at - align_down(claim.start, self.geometry.cluster_size()))
    }

    fn begin_cow(&mut self, key: u32, cx: &mut Cx<'_>) -> Step<State> {
        let claim = &self.claims[key];
        let edges = Qcow2::edges(claim);
        let longest = edges.iter().map(|(from, to)| to - from).max().unwrap_or(0);
        if claim.fill != Fill::Own || longest == 0 {
            return self.write_data(key, cx);
        }
        if longest > cx.buf_size() {
            return self.copy_next(key, edges[0].0, cx);
        }
        for ((from, to), buf) in edges.into_iter().zip(claim.bufs) {
            if let (Some(buf), true) = (buf, from < to) {
                read_own(from, to, buf, cx);
            }
        }
        Step::Wait(State::ReadCow { claim: key })
    }

    pub(super) fn cow_read(
        &mut self,
        key: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match result {
            Ok(()) => self.write_data(key, cx),
            Err(errno) => self.fail(key, errno, cx),
        }
    }

    /// The next stretch to copy from `from` on: the rest of the head, then the tail.
    fn copy_range(claim: &Claim, from: u64, buf_size: u64) -> Option<(u64, u64)> {
        cow::stretch(Qcow2::edges(claim), from, buf_size)
    }

    fn copy_next(&mut self, key: u32, from: u64, cx: &mut Cx<'_>) -> Step<State> {
        let claim = &mut self.claims[key];
        match Qcow2::copy_range(claim, from, cx.buf_size()) {
            Some((from, to)) => {
                read_own(from, to, claim.bufs[0].expect("a copy has a buffer"), cx);
                Step::Wait(State::CopyRead { claim: key, from })
            }
            None => {
                claim.fill = Fill::Nothing;
                self.write_data(key, cx)
            }
        }
    }

    pub(super) fn copy_read(
        &mut self,
        key: u32,
        from: u64,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if let Err(errno) = result {
            return self.fail(key, errno, cx);
        }
        let claim = &self.claims[key];
        let range = Qcow2::copy_range(claim, from, cx.buf_size());
        let (from, to) = range.expect("it was just read");
        let buf = claim.bufs[0].expect("a copy has a buffer");
        let seg = Seg { base: Base::Pool(buf), off: 0, len: (to - from) as u32 };
        cx.issue(Op::write(self.data, self.host_of(claim, from), Segs::one(seg)));
        Step::Wait(State::CopyWrite { claim: key, from: to })
    }

    pub(super) fn copy_written(
        &mut self,
        key: u32,
        from: u64,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match result {
            Ok(()) => self.copy_next(key, from, cx),
            Err(errno) => self.fail(key, errno, cx),
        }
    }

    /// Head, data and tail go out as one write.
    fn write_data(&mut self, key: u32, cx: &mut Cx<'_>) -> Step<State> {
        let claim = &self.claims[key];
        let io = cx.io();
        let (from, len) = (claim.at - io.offset, claim.to - claim.at);
        if claim.fill == Fill::Nothing && matches!(io.kind, IoKind::Write { .. }) {
            cx.write_guest(self.data, self.host_of(claim, claim.at), from, len, false);
            return Step::Wait(State::WriteData { claim: key });
        }
        let edge = |(from, to): (u64, u64), buf: Option<BufId>| match (claim.fill, buf) {
            (Fill::Zeros, _) => Seg::zeros((to - from) as u32),
            (Fill::Own, Some(buf)) => {
                Seg { base: Base::Pool(buf), off: 0, len: (to - from) as u32 }
            }
            _ => Seg::zeros(0),
        };
        let [head, tail] = Qcow2::edges(claim);
        let (head, tail) = (edge(head, claim.bufs[0]), edge(tail, claim.bufs[1]));
        let mut segs = Segs::none();
        segs.push(head);
        segs.push(match io.kind {
            IoKind::Write { .. } => cx.guest(from, len),
            _ => Seg::zeros(len as u32),
        });
        segs.push(tail);
        let host = self.host_of(claim, claim.at) - u64::from(head.len);
        cx.issue(Op::write(self.data, host, segs));
        Step::Wait(State::WriteData { claim: key })
    }

    pub(super) fn data_written(
        &mut self,
        key: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match result {
            Err(errno) if !mutant!("qcow2_data_error_ignored") => self.fail(key, errno, cx),
            _ => self.publish(key, cx),
        }
    }

    /// The data is there: the entries may say so, unless a writeback has just fenced what they would
    /// owe another fence for.
    pub(super) fn publish(&mut self, key: u32, cx: &mut Cx<'_>) -> Step<State> {
        let claim = &self.claims[key];
        let (slot, to, owes) = (claim.slot, claim.to, claim.owes);
        let waits = owes || self.reserve.is_uncounted();
        if waits && self.slices[slot].is_sealed() && !mutant!("qcow2_seal_ignored") {
            cx.park(self.tables.waiters(slot));
            return Step::Wait(State::Publish { claim: key });
        }
        if !self.writeback.has_room_for_frees() {
            let attempt = self.park_for_room(cx);
            return Step::Wait(State::PublishRoom { claim: key, attempt });
        }
        self.put_entries(key, cx);
        self.touch(slot, owes);
        self.end_claim(key, cx);
        self.writeback_if_full(cx);
        if to < cx.io().end() { self.walk(to, cx) } else { self.end(cx) }
    }

    /// A writeback has ended that was to make room for what the entries give up.
    pub(super) fn publish_in_room(
        &mut self,
        key: u32,
        attempt: u32,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        match self.no_room(attempt) {
            Some(errno) => self.fail(key, errno, cx),
            None => self.publish(key, cx),
        }
    }

    /// Puts a claim's entries into its slice, in memory.
    fn put_entries(&mut self, key: u32, cx: &mut Cx<'_>) {
        let geometry = self.geometry;
        let size = geometry.cluster_size();
        let claim = &self.claims[key];
        let (slot, exposed, is_new) = (claim.slot, claim.exposed, claim.is_new);
        let first = align_down(claim.start, size);
        let mut host = claim.host;
        for cluster in (first..claim.end).step_by(size as usize) {
            let index = self.slice_index(cluster);
            let bytes = self.tables.bytes_mut(slot, cx.mem());
            let old = L2Entry::read(bytes, index, geometry);
            let new = if geometry.has_subclusters() {
                let (from, to) = (exposed.0.max(cluster), exposed.1.min(cluster + size));
                let mask = units_mask(from - cluster, to - cluster, geometry.unit_bits());
                let old = if matches!(old.place(geometry), Ok(Some(Mapping::Compressed(_)))) {
                    L2Entry::NONE
                } else {
                    old
                };
                old.with_place(host).with_subclusters(mask, true)
            } else {
                L2Entry::data(host, geometry)
            };
            new.write(bytes, index, geometry);
            host.0 += size;
            if is_new && let Ok(place) = old.place(geometry) {
                self.free(place, old.is_copied(), false);
            }
        }
    }

    /// Gives up. What was there before is still there.
    fn fail(&mut self, key: u32, errno: Errno, cx: &mut Cx<'_>) -> Step<State> {
        let claim = &self.claims[key];
        if claim.is_new && !mutant!("qcow2_published_early") {
            let count = (claim.end - claim.start) >> self.geometry.cluster_bits();
            self.give_back(claim.host, count);
        }
        if mutant!("qcow2_claim_kept_on_error") {
            return Step::Done(Err(errno));
        }
        self.end_claim(key, cx);
        Step::Done(Err(errno))
    }

    fn end_claim(&mut self, key: u32, cx: &mut Cx<'_>) {
        let start = self.claims[key].start;
        let mut claim = self.claims.remove(key, start);
        for buf in claim.bufs.into_iter().flatten() {
            cx.give_buf(buf);
        }
        self.unpin(claim.slot, cx);
        if !mutant!("qcow2_claim_never_wakes") {
            cx.wake_all(&mut claim.waiters);
        }
    }

    /// Ends one pin of a slice, and wakes who needs its slot.
    pub(super) fn unpin(&mut self, slot: usize, cx: &mut Cx<'_>) {
        self.tables.unpin(slot);
        if !self.tables.full.is_empty() {
            cx.wake_all(&mut self.tables.full);
        }
    }
}

/// Reads `from..to` of this node's disk into the start of `buf`.
fn read_own(from: u64, to: u64, buf: BufId, cx: &mut Cx<'_>) {
    let seg = Seg { base: Base::Pool(buf), off: 0, len: (to - from) as u32 };
    let from = if mutant!("qcow2_cow_from_wrong_cluster") { from & 511 } else { from };
    let target = Target::Node(cx.node());
    cx.issue(Op::read(target, from, Segs::one(seg)));
}
