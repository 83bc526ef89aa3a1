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
use cowbell_engine::step::{Cx, Event, IoKind};
use cowbell_engine::units::{BufId, Errno, HostOffset, align_down};

use crate::parts::cow::{self, Copied, Cow, CowState, Edges, Fill, Place};
use crate::qcow2::disk::layout::{Compressed, L2Entry, Mapping, units_mask};
use crate::qcow2::run::piece::{Claim, PieceStep, Progress, RequestState};
use crate::qcow2::run::reserve::{Short, Taken};
use crate::qcow2::run::tables::Run;

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

impl PieceStep<'_> {
    /// Claims clusters for the run at `at`, and begins to fill them.
    pub fn allocate(&mut self, at: u64, run: Run, cx: &mut Cx<'_>) -> Progress {
        let bits = self.image.geometry.cluster_bits();
        if !self.tables.owns_table(at) {
            return self.provide_table(at, cx);
        }
        let plan = self.plan(at, run);
        let mut to = run.end;
        if !matches!(cx.io().kind, IoKind::Write { .. }) {
            // A cut unit of a zero write is written as data, by itself; where a table cannot say
            // that the others are zeros, they are too.
            let says_so = self.image.geometry.has_zero_clusters() || !self.disk.shows_backing(at);
            let most = if says_so { plan.grain } else { plan.grain.max(ZEROS_MAX) };
            to = to.min(align_down(at, plan.grain) + most);
        }
        let reach = if plan.place.is_some() { plan.grain } else { 1 << bits };
        let start = align_down(at, reach);
        let short = if mutant!("qcow2_claim_short") { reach } else { 0 };
        let Some(free_to) = self.claims.free_to(start, start + reach - short, cx) else {
            return Progress::LookAgain(at);
        };
        to = to.min(free_to);
        let fill = if plan.was_zeros { Fill::Zeros } else { Fill::Read };
        // Before anything is claimed, so that who waits for buffers holds nothing.
        let bufs = match fill {
            Fill::Read => cow::take_bufs(edges(at, to, plan.grain), cx),
            Fill::Nothing | Fill::Zeros => Some([None; 2]),
        };
        let Some(bufs) = bufs else {
            cx.park_for_bufs();
            return Progress::LookAgain(at);
        };
        let (host, is_fresh) = match plan.place {
            Some(place) => (place, false),
            None => match self.take(start, to, cx) {
                Ok(taken) => {
                    to = to.min(start + (taken.count << bits));
                    (HostOffset(taken.first << bits), taken.is_zeros)
                }
                Err(short) => {
                    bufs.into_iter().flatten().for_each(|buf| cx.give_buf(buf));
                    return Progress::short(at, short);
                }
            },
        };
        let edges = edges(at, to, plan.grain);
        let exposed = (edges[0].0, edges[1].1);
        let is_zeros = is_fresh && plan.was_zeros;
        self.tables.slices.pin(run.slot.expect("a claim is made of what a slice says"));
        let claim = Claim {
            start,
            end: to.next_multiple_of(reach),
            slot: run.slot.expect("as above"),
            host,
            is_new: plan.place.is_none(),
            at,
            to,
            exposed,
            cow: Cow::new(
                if mutant!("qcow2_cow_tail_skipped") { [edges[0], (to, to)] } else { edges },
                if is_zeros { Fill::Nothing } else { fill },
                u64::MAX,
            )
            .with_bufs(bufs),
            owes: !is_zeros && !mutant!("qcow2_no_fence_for_data"),
        };
        let key = self.claims.insert(start..claim.end, claim);
        if mutant!("qcow2_published_early") {
            self.put_entries(key, cx);
        }
        self.copy(key, CowState::Bufs, Event::Start, cx)
    }

    fn plan(&self, at: u64, run: Run) -> Plan {
        let (cluster, unit) = (self.image.geometry.cluster_size(), self.image.geometry.unit_size());
        let (place, grain, was_zeros) = match run.mapping {
            Mapping::Data(_) | Mapping::Compressed(_) => (None, cluster, false),
            Mapping::Zero(Some(_)) | Mapping::Unallocated(Some(_)) if !run.copied => {
                (None, cluster, false)
            }
            Mapping::Zero(place) => (place, unit, true),
            Mapping::Unallocated(place) => (place, unit, !self.disk.shows_backing(at)),
        };
        // The place is that of the run's first cluster, where the claim's may begin with.
        Plan { place, grain, was_zeros }
    }

    /// New clusters for `start..to`, or as many as there are. A data file has them where the guest
    /// has them.
    fn take(&mut self, start: u64, to: u64, cx: &mut Cx<'_>) -> Result<Taken, Short> {
        let bits = self.image.geometry.cluster_bits();
        let count = (to - start).div_ceil(1 << bits);
        if self.image.has_data_file() {
            return Ok(Taken { first: start >> bits, count, is_zeros: false });
        }
        self.reserve.take(count, cx)
    }

    /// The host offset of the guest's byte `at` in a claim.
    fn host_of(&self, claim: &Claim, at: u64) -> u64 {
        claim.host.0 + (at - align_down(claim.start, self.image.geometry.cluster_size()))
    }

    /// Goes on with what the entries will expose; then publishes them.
    pub fn copy(&mut self, key: u32, state: CowState, event: Event, cx: &mut Cx<'_>) -> Progress {
        let claim = &self.claims[key];
        let (file, start) = (self.image.data, claim.at);
        let place = Place { file, start, end: claim.to, host: self.host_of(claim, start) };
        let claim = &mut self.claims[key];
        match claim.cow.step(state, event, place, read_own, cx) {
            Copied::Wait(state) => Progress::Wait(RequestState::Cow { claim: key, state }),
            Copied::Failed(errno) => self.fail(key, errno, cx),
            Copied::Written => self.publish(key, cx),
        }
    }

    /// There is room for what the entries give up, or none will be made.
    pub fn publish_in_room(&mut self, key: u32, attempt: u32, cx: &mut Cx<'_>) -> Progress {
        match self.writeback.no_room(attempt) {
            Some(errno) => self.fail(key, errno, cx),
            None => self.publish(key, cx),
        }
    }

    /// The data is there: the entries say so.
    fn publish(&mut self, key: u32, cx: &mut Cx<'_>) -> Progress {
        let claim = &self.claims[key];
        let (slot, to, owes) = (claim.slot, claim.to, claim.owes);
        if !self.writeback.has_room_for_frees() {
            let attempt = self.writeback.park_for_room(cx);
            return Progress::Wait(RequestState::Publish { claim: key, attempt });
        }
        self.put_entries(key, cx);
        self.writeback.touch(slot, owes, self.tables, cx);
        self.end_claim(key, true, cx);
        Progress::To(to)
    }

    /// Puts a claim's entries into its slice, in memory.
    fn put_entries(&mut self, key: u32, cx: &mut Cx<'_>) {
        let geometry = self.image.geometry;
        let size = geometry.cluster_size();
        let claim = &self.claims[key];
        let (slot, exposed, is_new) = (claim.slot, claim.exposed, claim.is_new);
        let mut host = claim.host;
        let (mut cluster, end) = (align_down(claim.start, size), claim.end);
        while cluster < end {
            let index = self.image.slice_index(cluster);
            let bytes = self.tables.slices.bytes_mut(slot, cx.mem());
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
            cluster += size;
            if is_new
                && !old.is_none()
                && let Ok(Some(place)) = old.place(geometry)
            {
                self.give_up(place, old.is_copied(), false);
            }
        }
    }

    /// An entry gave up `place`. Was it the only one that led there, and may the space go?
    pub fn give_up(&mut self, place: Mapping, sole: bool, discard: bool) {
        if let Mapping::Compressed(old) = place {
            self.packing.seal(old);
            self.forget_inflated(old);
        }
        self.writeback.give_up(place, sole, discard, self.image);
    }

    /// Nobody is to find there what was.
    pub fn forget_inflated(&mut self, place: Compressed) {
        if let Some(slot) = self.inflated.find(place.host.0)
            && self.inflated.is_ready(slot)
        {
            self.inflated.forget(slot);
        }
    }

    /// Fails. What was there before is still there.
    pub fn fail(&mut self, key: u32, errno: Errno, cx: &mut Cx<'_>) -> Progress {
        let claim = &self.claims[key];
        if claim.is_new && !self.image.has_data_file() && !mutant!("qcow2_published_early") {
            let bits = self.image.geometry.cluster_bits();
            let count = (claim.end - claim.start) >> bits;
            self.reserve.give_back(claim.host.0 >> bits, count);
        }
        if mutant!("qcow2_claim_kept_on_error") {
            return Progress::Failed(errno);
        }
        self.end_claim(key, false, cx);
        Progress::Failed(errno)
    }

    pub fn end_claim(&mut self, key: u32, is_there: bool, cx: &mut Cx<'_>) {
        let mut claim = self.claims.end(key, is_there, cx);
        claim.cow.give_bufs(cx);
        self.tables.unpin(claim.slot, cx);
    }
}

/// What is exposed in grains of `grain` bytes around a write of `at..to`: in front, behind.
fn edges(at: u64, to: u64, grain: u64) -> Edges {
    [(align_down(at, grain), at), (to, to.next_multiple_of(grain))]
}

/// Reads `from..to` of this node's disk into the start of `buf`. There is always something to wait for.
fn read_own(from: u64, to: u64, buf: BufId, cx: &mut Cx<'_>) -> bool {
    let seg = Seg { base: Base::Pool(buf), off: 0, len: (to - from) as u32 };
    let from = if mutant!("qcow2_cow_from_wrong_cluster") { from & 511 } else { from };
    cx.issue(Op::read(Target::Node(cx.node()), from, Segs::one(seg)));
    true
}
