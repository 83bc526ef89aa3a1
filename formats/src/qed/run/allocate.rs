//! Allocating writes: claim, copy-on-write, data, link.
//!
//! A claim covers guest clusters from before their space is taken until their entries are on disk.
//! Others who would allocate there wait on it; readers do not: they see what was there before.
//! A claim lies within one table slice, which stays in memory meanwhile.
//!
//! Links are written by slice. The first request that wants to link writes the entries of everyone
//! who is ready by then; whoever comes while that write is in flight goes with the next one. So
//! neighbouring updates merge, and no two writes of one sector are ever in flight (R63).

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::{Cx, Event, IoKind, Step};
use cowbell_engine::units::{BufId, Errno, HostOffset, align_down};
use cowbell_engine::wait::WaitList;

use crate::parts::claims::Around;
use crate::parts::cow::{Copied, Cow, CowState, Fill, Place};
use crate::qed::disk::layout::Entry;
use crate::qed::run::{Qed, SLICE_BITS, State};

/// Guest clusters being allocated, or being made zero clusters.
#[derive(Clone, Hash, Debug)]
pub(super) struct Claim {
    cluster: u64,
    count: u64,
    /// The slot of their table slice, pinned.
    slot: usize,
    /// What the first one's entry will be; data clusters follow one another in the file.
    entry: Entry,
    /// The guest range that this piece writes.
    at: u64,
    end: u64,
    /// The rest of the clusters.
    cow: Cow,
    /// Does the backing file show there? Then the data is fenced.
    owes: bool,
    link: Link,
    waiters: WaitList,
}

/// How far a claim's entries have got.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Link {
    /// The data is not there yet.
    No,
    /// The next write of the slice takes them along.
    Queued,
    /// In the write under way.
    InFlight,
    /// On disk and published.
    Done,
    /// That write failed.
    Failed(Errno),
}

/// A table slice's writer.
#[derive(Clone, Copy, Hash, Debug, Default)]
pub(super) struct SliceLink {
    /// A write is in flight.
    pub busy: bool,
    /// The slice on disk has entries that led past the file's end when the image was opened.
    pub past_end: bool,
    /// Claims waiting for it, or for the next.
    pub waiters: WaitList,
}

/// An L2 table being allocated.
#[derive(Clone, Hash, Debug)]
pub(super) struct TableAlloc {
    l1_index: u64,
    offset: u64,
    /// Who needs that table.
    waiters: WaitList,
}

/// Bytes that one piece allocates at most: its op's lengths are 32 bits wide.
const PIECE_MAX: u64 = 1 << 30;

impl Qed {
    /// Claims clusters for the run `at..run_end` and begins to fill them.
    pub(super) fn allocate(
        &mut self,
        at: u64,
        run_end: u64,
        entry: Entry,
        slot: usize,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let bits = self.geometry.cluster_bits();
        let size = self.geometry.cluster_size();
        let first = at >> bits;
        let free_to = match self.claims.around(first << bits, (first + 1) << bits) {
            _ if mutant!("no_claims") => u64::MAX,
            Around::Within(claim) => {
                cx.park(&mut self.claims[claim].waiters);
                return Step::Wait(State::Next { at });
            }
            Around::Before(next) => next,
        };
        let mut cow = entry == Entry::Unallocated && self.shows_backing(at);
        if mutant!("zero_cluster_shows_backing") && entry == Entry::Zero {
            cow = self.shows_backing(at);
        }
        let mut end = self.piece_end(at, run_end.min(free_to), cow);
        let zero = self.becomes_zero(at, end, cx);
        if let Some(zero_end) = zero {
            end = zero_end;
        } else if !matches!(cx.io().kind, IoKind::Write { .. }) {
            // A cut cluster of a zero write is written as data, by itself.
            end = end.min((first + 1) << bits);
        }
        let count = end.div_ceil(size) - first;
        let entry = match zero {
            Some(_) => Entry::Zero,
            None => {
                if let Err(step) = self.ready_to_allocate(at, cx) {
                    return step;
                }
                match self.take_space(count << bits, false, at, cx) {
                    Ok(offset) => Entry::Data(HostOffset(offset)),
                    Err(step) => return step,
                }
            }
        };
        if !mutant!("slice_not_pinned") {
            self.tables.pin(slot);
        }
        self.header.unmark_at = None;
        let short = u64::from(mutant!("claim_one_cluster_short"));
        let range = first << bits..(first + count - short) << bits;
        let claim = Claim {
            cluster: first,
            count,
            slot,
            entry,
            at,
            end,
            cow: self.cow_of(first, count, (at, end), cow && zero.is_none()),
            owes: cow,
            link: Link::No,
            waiters: WaitList::new(),
        };
        let claim = self.claims.insert(range, claim);
        if mutant!("published_early") {
            self.publish(claim, cx);
        }
        match zero {
            Some(_) => self.link(claim, cx),
            None => self.copy(claim, CowState::Bufs, Event::Start, cx),
        }
    }

    /// How far one piece reaches: to where the backing file ends, and not beyond what one op can
    /// carry.
    fn piece_end(&self, at: u64, run_end: u64, cow: bool) -> u64 {
        let bits = self.geometry.cluster_bits();
        let end = run_end.min(align_down(at, 1 << bits).saturating_add(PIECE_MAX.max(1 << bits)));
        match self.backing {
            Some(backing) if cow => end.min(backing.size.next_multiple_of(1 << bits)),
            _ => end,
        }
    }

    /// Where a zero write or discard can just say so in the table: up to where.
    fn becomes_zero(&self, at: u64, end: u64, cx: &Cx<'_>) -> Option<u64> {
        if matches!(cx.io().kind, IoKind::Write { .. }) {
            return None;
        }
        let (first, last) = self.whole_clusters(at, end)?;
        (first == at).then_some(last)
    }

    /// The host offset of the guest's byte `at` in a claim of data clusters.
    fn host_of(&self, claim: &Claim, at: u64) -> u64 {
        let Entry::Data(offset) = claim.entry else { unreachable!("zero clusters have no data") };
        offset.0 + (at - (claim.cluster << self.geometry.cluster_bits()))
    }

    /// What a write of `at..end` into `count` clusters from `first` on copies. The rest of new clusters
    /// is zeros; where the data writes make the file longer, they write these too.
    fn cow_of(&self, first: u64, count: u64, (at, end): (u64, u64), copies: bool) -> Cow {
        let bits = self.geometry.cluster_bits();
        let (start, clusters_end) = (first << bits, (first + count) << bits);
        let by_writes = self.space.grows_by_writes();
        match self.backing.filter(|_| copies) {
            Some(backing) => {
                let limit = if by_writes { u64::MAX } else { backing.size };
                let tail_end = clusters_end.min(limit).max(end);
                let tail_end = if mutant!("cow_tail_skipped") { end } else { tail_end };
                Cow::new([(start, at), (end, tail_end)], Fill::Read, limit)
            }
            None if by_writes => Cow::new([(at, at), (end, clusters_end)], Fill::Zeros, u64::MAX),
            None => Cow::NONE,
        }
    }

    /// Goes on with what the new clusters must hold around the write; then the data is written.
    pub(super) fn copy(
        &mut self,
        key: u32,
        state: CowState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let claim = &self.claims[key];
        let (file, start, backing) = (self.file, claim.at, self.backing);
        let place = Place { file, start, host: self.host_of(claim, start) };
        let read = |from, to, buf, cx: &mut Cx<'_>| {
            backing.expect("only an overlay copies").read(from, to, buf, cx)
        };
        let claim = &mut self.claims[key];
        match claim.cow.step(state, event, place, read, cx) {
            Copied::Wait(state) => Step::Wait(State::Cow { claim: key, state }),
            Copied::Failed(errno) => self.fail(key, errno, cx),
            Copied::Ready => {
                claim.cow.write(claim.at, claim.end, place, cx);
                Step::Wait(State::WriteData { claim: key })
            }
        }
    }

    pub(super) fn data_written(
        &mut self,
        key: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        self.claims[key].cow.give_bufs(cx);
        if let Err(errno) = result
            && !mutant!("data_error_ignored")
        {
            return self.fail(key, errno, cx);
        }
        // An entry that points past the file's end is dropped by the check, and the backing file
        // shown instead, also where there were zeros.
        let may_be_dropped = self.space.grows_by_writes() && self.backing.is_some();
        let owed = self.claims[key].owes || may_be_dropped;
        if owed && !mutant!("no_fence_before_link") {
            self.flush(cx);
            return Step::Wait(State::Fence { claim: key });
        }
        self.link(key, cx)
    }

    /// The data is there: have the entries written, or see what became of them.
    pub(super) fn link(&mut self, key: u32, cx: &mut Cx<'_>) -> Step<State> {
        let claim = &mut self.claims[key];
        let slot = claim.slot;
        match claim.link {
            Link::Done => return self.linked(key, cx),
            Link::Failed(errno) => return self.fail(key, errno, cx),
            Link::No => claim.link = Link::Queued,
            Link::Queued | Link::InFlight => {}
        }
        if claim.link == Link::InFlight
            || self.links[slot].busy && !mutant!("two_slice_writes_at_once")
        {
            cx.park(&mut self.links[slot].waiters);
            return Step::Wait(State::Link { claim: key });
        }
        let Some([buf]) = cx.take_bufs() else {
            // Somebody else may take this claim's entries along meanwhile.
            cx.park_for_bufs();
            return Step::Wait(State::Link { claim: key });
        };
        self.links[slot].busy = true;
        self.write_slice(slot, buf, cx);
        Step::Wait(State::WriteSlice { claim: key, buf })
    }

    /// Writes the sectors of a slice that hold queued entries: what is published, and they.
    fn write_slice(&mut self, slot: usize, buf: BufId, cx: &mut Cx<'_>) {
        let unit = self.block(cx) as usize;
        let bytes = self.tables.copy_to_pool(slot, buf, cx.mem());
        let (mut from, mut to) = (bytes.len(), 0);
        let mut any = 0;
        for claim in self.claims.iter_mut() {
            if claim.slot == slot && claim.link == Link::Queued {
                claim.link = Link::InFlight;
                let (first, last) = put_entries(claim, self.geometry.cluster_size(), bytes);
                (from, to) = (from.min(first), to.max(last));
                any = claim.cluster;
            }
        }
        let (from, to) = (from & !(unit - 1), to.next_multiple_of(unit));
        if !self.links[slot].past_end {
            self.slice_is_ours(any);
        }
        let table = self.table_of(any);
        let offset = self.slice_offset(table, any) + from as u64;
        let seg = Seg { base: Base::Pool(buf), off: from as u32, len: (to - from) as u32 };
        cx.issue(Op::write(self.file, offset, Segs::one(seg)));
    }

    /// What is on disk of the slice that maps `cluster` was written by this session, or may have
    /// been. If the write fails and there were bad entries, that is not so: which of the two is
    /// there, nobody knows, and a new cluster that cannot be read is better than a wrong one.
    fn slice_is_ours(&mut self, cluster: u64) {
        let slice = cluster >> SLICE_BITS;
        self.past_end.changed(slice..slice + 1);
    }

    /// The L2 table that maps guest cluster `cluster`, which has one.
    fn table_of(&self, cluster: u64) -> HostOffset {
        let l1_index = cluster / self.geometry.table_entries();
        HostOffset(self.l1[l1_index as usize])
    }

    fn publish(&self, key: u32, cx: &mut Cx<'_>) {
        let claim = &self.claims[key];
        let bytes = self.tables.bytes_mut(claim.slot, cx.mem());
        put_entries(claim, self.geometry.cluster_size(), bytes);
    }

    pub(super) fn slice_written(
        &mut self,
        key: u32,
        buf: BufId,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        cx.give_buf(buf);
        let slot = self.claims[key].slot;
        if result.is_ok() && self.links[slot].past_end {
            self.slice_is_ours(self.claims[key].cluster);
            self.links[slot].past_end = false;
        }
        let latecomers = mutant!("latecomers_count_as_linked");
        let bytes = self.tables.bytes_mut(slot, cx.mem());
        let size = self.geometry.cluster_size();
        for claim in self.claims.iter_mut() {
            let taken = claim.link == Link::InFlight || latecomers && claim.link == Link::Queued;
            if claim.slot != slot || !taken {
                continue;
            }
            match result {
                Ok(()) => {
                    claim.link = Link::Done;
                    put_entries(claim, size, bytes);
                }
                Err(errno) => {
                    claim.link = Link::Failed(errno);
                    if mutant!("link_error_ignored") {
                        claim.link = Link::Done;
                        put_entries(claim, size, bytes);
                    }
                }
            }
        }
        if result.is_err() && !mutant!("failed_link_not_doubted") {
            // It may have happened: what the disk says counts, once nobody holds the slice.
            self.tables.doubt(slot);
        }
        self.links[slot].busy = false;
        cx.wake_all(&mut self.links[slot].waiters);
        self.link(key, cx)
    }

    /// The piece is done; go on behind it.
    fn linked(&mut self, key: u32, cx: &mut Cx<'_>) -> Step<State> {
        let end = self.claims[key].end;
        self.end_claim(key, cx);
        self.walk(end, Event::Start, cx)
    }

    /// Gives up. What was allocated is leaked; what was there before is still there.
    pub(super) fn fail(&mut self, key: u32, errno: Errno, cx: &mut Cx<'_>) -> Step<State> {
        if mutant!("claim_kept_on_error") {
            self.claims[key].cow.give_bufs(cx);
            return Step::Done(Err(errno));
        }
        if mutant!("no_wake_on_error") {
            self.claims[key].waiters = WaitList::new();
        }
        self.end_claim(key, cx);
        Step::Done(Err(errno))
    }

    fn end_claim(&mut self, key: u32, cx: &mut Cx<'_>) {
        self.claims[key].cow.give_bufs(cx);
        let start = self.claims[key].cluster << self.geometry.cluster_bits();
        let mut claim = self.claims.remove(key, start);
        if !mutant!("slice_not_pinned") {
            self.tables.unpin(claim.slot);
        }
        if !self.tables.is_ready(claim.slot) {
            cx.wake_all(self.tables.waiters(claim.slot));
        }
        cx.wake_all(&mut self.tables.full);
        if !mutant!("claim_never_wakes") {
            cx.wake_all(&mut claim.waiters);
        }
        self.allocation_ended(cx);
    }

    /// Allocates the L2 table of `l1_index` and links it, empty.
    pub(super) fn allocate_table(
        &mut self,
        at: u64,
        l1_index: u64,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        let under_way = self.allocs.iter_mut().find(|alloc| alloc.l1_index == l1_index);
        if let Some(alloc) = under_way.filter(|_| !mutant!("no_table_freeze")) {
            cx.park(&mut alloc.waiters);
            return Step::Wait(State::Next { at });
        }
        if let Err(step) = self.ready_to_allocate(at, cx) {
            return step;
        }
        let bytes = self.geometry.table_bytes();
        let offset = match self.take_space(bytes, true, at, cx) {
            Ok(offset) => offset,
            Err(step) => return step,
        };
        self.header.unmark_at = None;
        self.allocs.push(TableAlloc { l1_index, offset, waiters: WaitList::new() });
        let l1_index = l1_index as u32;
        if self.l1_busy {
            cx.park(&mut self.l1_waiters);
            return Step::Wait(State::TakeL1 { at, l1_index });
        }
        self.l1_busy = true;
        self.write_l1(at, l1_index, cx)
    }

    /// It is this request's turn to write an L1 sector: what is published, and its own table.
    pub(super) fn write_l1(&mut self, at: u64, l1_index: u32, cx: &mut Cx<'_>) -> Step<State> {
        let Some([buf]) = cx.take_bufs() else {
            cx.park_for_bufs();
            return Step::Wait(State::TakeL1 { at, l1_index });
        };
        let unit = self.block(cx);
        let first = align_down(u64::from(l1_index) * 8, unit) / 8;
        let alloc = self.alloc_of(l1_index);
        let bytes = &mut cx.mem().pool_mut(buf)[..unit as usize];
        let (entries, _) = bytes.as_chunks_mut::<8>();
        for (i, entry) in entries.iter_mut().enumerate() {
            let index = first as usize + i;
            let is_mine = index == l1_index as usize;
            let value =
                if is_mine { alloc.offset } else { self.l1.get(index).copied().unwrap_or(0) };
            *entry = value.to_le_bytes();
        }
        let seg = Seg { base: Base::Pool(buf), off: 0, len: unit as u32 };
        let offset = self.header.l1_offset().0 + first * 8;
        cx.issue(Op::write(self.file, offset, Segs::one(seg)));
        Step::Wait(State::WriteL1 { at, l1_index, buf })
    }

    /// The slice that maps `at` in a table that has just been made: zeros.
    fn new_slice(&mut self, at: u64, cx: &mut Cx<'_>) {
        let key = at >> self.geometry.cluster_bits() >> SLICE_BITS;
        if let Some(slot) = self.tables.put_zeros(key, cx) {
            self.links[slot].past_end = false;
        }
    }

    fn alloc_of(&self, l1_index: u32) -> &TableAlloc {
        let mine = self.allocs.iter().find(|alloc| alloc.l1_index == u64::from(l1_index));
        mine.expect("the request that allocates a table holds its entry")
    }

    pub(super) fn l1_written(
        &mut self,
        at: u64,
        l1_index: u32,
        buf: BufId,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        cx.give_buf(buf);
        let mine = self.allocs.iter().position(|alloc| alloc.l1_index == u64::from(l1_index));
        let mut alloc = self.allocs.remove(mine.expect("the request holds its entry"));
        if result.is_ok() || mutant!("l1_error_ignored") {
            self.l1[l1_index as usize] = alloc.offset;
            self.new_slice(at, cx);
        }
        if mutant!("l1_baton_dropped") {
            self.l1_busy = false;
            cx.hand_over(&mut self.l1_waiters);
        } else if cx.hand_over(&mut self.l1_waiters).is_none() {
            self.l1_busy = false;
        }
        cx.wake_all(&mut alloc.waiters);
        self.allocation_ended(cx);
        match result {
            Ok(()) => self.walk(at, Event::Start, cx),
            Err(errno) => Step::Done(Err(errno)),
        }
    }
}

/// Puts a claim's entries into the bytes of its slice; answers the bytes' range.
fn put_entries(claim: &Claim, cluster_size: u64, slice: &mut [u8]) -> (usize, usize) {
    let first = (claim.cluster & ((1 << SLICE_BITS) - 1)) as usize;
    let (entries, _) = slice.as_chunks_mut::<8>();
    for (i, entry) in entries[first..first + claim.count as usize].iter_mut().enumerate() {
        let value = match claim.entry {
            Entry::Data(offset) => offset.0 + i as u64 * cluster_size,
            other => other.encode(),
        };
        *entry = value.to_le_bytes();
    }
    (first * 8, (first + claim.count as usize) * 8)
}
