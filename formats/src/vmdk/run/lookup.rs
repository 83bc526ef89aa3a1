//! Looking up a guest range, and the pieces that need no allocation.
//!
//! One step issues the ops of as many pieces as it can, joined, whatever extents they are in. Where
//! something is missing it waits for what it has issued and looks again. A range that is under
//! several tables, one of which is missing something, is cut: what is under each becomes a request
//! of its own, so that they are done side by side.

use cowbell_engine::mutant;
use cowbell_engine::op::{Op, OpKind, Segs, Target};
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::{Cx, Event, IoKind, Step};
use cowbell_engine::units::{Errno, FileId, HostOffset, align_down};

use crate::parts::backing;
use crate::vmdk::disk::layout::Entry;
use crate::vmdk::run::{Asked, COPY_AT, CidState, Grains, PIECES, PartKind, State, Vmdk};

/// What is at a guest offset.
enum Found {
    /// A flat extent: byte `host` of its file, up to `end`.
    Flat { host: u64, end: u64 },
    /// An extent that is nothing but zeros, up to `end`.
    Zeros { end: u64 },
    /// The table is not in memory; this is its place.
    NotLoaded { table: u64 },
    /// It is being loaded into this slot, or is about to be.
    Loading { slot: usize },
    /// There is no table: unallocated up to `end`.
    NoTable { end: u64 },
    /// Up to `end` all is as `entry` says; data is contiguous from `entry`'s grain on.
    Run { entry: Entry, end: u64, slot: usize },
    /// A table says something impossible.
    Invalid,
}

/// Where a byte of the disk is.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub part: usize,
    /// The first byte of the part.
    pub start: u64,
    /// One past its last.
    pub end: u64,
    pub grain_bits: u32,
    pub table_bits: u32,
}

impl Place {
    pub fn grain_size(&self) -> u64 {
        1 << self.grain_bits
    }

    /// The grain in the part that byte `at` of the disk lies in.
    #[inline]
    pub fn grain_of(&self, at: u64) -> u64 {
        (at - self.start) >> self.grain_bits
    }

    /// The first byte of a grain on the disk.
    #[inline]
    pub fn grain_start(&self, grain: u64) -> u64 {
        self.start + (grain << self.grain_bits)
    }

    /// What the cache of inflated grains calls the one that byte `at` of the disk lies in: its first
    /// byte on the disk.
    pub fn grain_key(&self, at: u64) -> u64 {
        self.grain_start(self.grain_of(at))
    }

    /// Where the grains of the table end that maps byte `at`.
    pub fn table_end(&self, at: u64) -> u64 {
        let bits = self.grain_bits + self.table_bits;
        let next = (((at - self.start) >> bits) + 1) << bits;
        self.start.saturating_add(next).min(self.end)
    }

    /// The whole grains in `at..end`. The part's end counts as the end of its last grain.
    pub fn whole_grains(&self, at: u64, end: u64) -> Option<(u64, u64)> {
        let size = self.grain_size();
        let first = self.start + (at - self.start).next_multiple_of(size);
        let last =
            if end == self.end { end } else { self.start + align_down(end - self.start, size) };
        (first < last).then_some((first, last))
    }
}

/// Answers that the next `len` bytes are data, at `host`; how far that gets the request.
#[inline(never)]
fn status_at(len: u64, host: (FileId, HostOffset), cx: &mut Cx<'_>) -> u64 {
    cx.answer_status(StatusKind::Data, len, Some(host));
    cx.io().end()
}

impl Vmdk {
    /// Goes on at `at`, once the content id is a new one.
    #[inline(never)]
    pub(super) fn walk_with_new_cid(&mut self, at: u64, cx: &mut Cx<'_>) -> Step<State> {
        match self.cid.state {
            CidState::New | CidState::Stable => self.walk_from(at, Event::Woken, cx),
            _ if mutant!("vmdk_cid_never_changes") => self.walk_from(at, Event::Woken, cx),
            CidState::Writing => {
                cx.park(&mut self.cid.waiters);
                Step::Wait(State::Next { at })
            }
            CidState::Old => self.write_cid(at, cx),
        }
    }

    /// Goes on at `at`.
    #[inline(always)]
    pub(super) fn walk_from(&mut self, at: u64, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        let end = cx.io().end();
        if at >= end {
            return self.end(cx);
        }
        let mut issued = false;
        // Most requests are one piece.
        match self.piece(at, end, event, &mut issued, cx) {
            Ok(at) if at < end => self.walk_on(at, end, event, issued, cx),
            Ok(at) => self.walked(at, issued, cx),
            Err(step) => step,
        }
    }

    #[inline(never)]
    fn walk_on(
        &mut self,
        mut at: u64,
        end: u64,
        event: Event,
        mut issued: bool,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
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
    #[inline(always)]
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
    #[inline(always)]
    fn piece(
        &mut self,
        at: u64,
        end: u64,
        event: Event,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Result<u64, Step<State>> {
        let found = match self.look_up(at, end, cx) {
            Found::NoTable { end } if self.needs_no_table(at, end, cx) => {
                Found::Run { entry: Entry::Unallocated, end, slot: usize::MAX }
            }
            found => found,
        };
        match found {
            Found::Flat { host, end } => {
                return Ok(self.at_host(at, end, host, 1, issued, cx));
            }
            Found::Zeros { end } => {
                let io = cx.io();
                if let IoKind::Status { .. } = io.kind {
                    cx.answer_status(StatusKind::Zero, end - at, None);
                    return Ok(io.end());
                }
                cx.zero_guest(at - io.offset, end - at);
                return Ok(end);
            }
            Found::Run { entry, end, .. } => {
                if let Some(done) = self.in_place(at, end, entry, event, issued, cx) {
                    return done;
                }
            }
            _ => {}
        }
        // First what is under way; then this, looked up again.
        Err(if *issued { Step::Wait(State::Pieces { at }) } else { self.provide(at, found, cx) })
    }

    /// Provides what is missing at `at`.
    #[inline(never)]
    fn provide(&mut self, at: u64, found: Found, cx: &mut Cx<'_>) -> Step<State> {
        if let Found::Invalid = found {
            return self.invalid_entry(at, cx);
        }
        let place = self.place(self.part_at(at));
        if self.piece_of_part(at) < cx.io().end()
            && let Some(step) = self.cut_up(at, cx)
        {
            return step;
        }
        match found {
            Found::Run { entry: Entry::Data(host), slot, .. } if self.is_compressed(place.part) => {
                match cx.io().kind {
                    IoKind::Read => self.load_compressed(at, host, slot, place, cx),
                    // A stream takes nothing back.
                    _ => Step::Done(Err(Errno::IO)),
                }
            }
            Found::Run { entry, end, slot } => self.allocate(at, end, entry, slot, place, cx),
            Found::NoTable { .. } => self.allocate_table(at, place, cx),
            Found::NotLoaded { table } => self.load_table(at, table, cx),
            Found::Loading { slot } => {
                cx.park(self.tables.waiters(slot));
                Step::Wait(State::Next { at })
            }
            Found::Flat { .. } | Found::Zeros { .. } | Found::Invalid => {
                unreachable!("dealt with before")
            }
        }
    }

    /// Makes what is under each table from `at` on a request of its own.
    fn cut_up(&mut self, mut at: u64, cx: &mut Cx<'_>) -> Option<Step<State>> {
        let io = cx.io();
        let kind = match io.kind {
            IoKind::Read => OpKind::Read,
            // Stable when all of them are: see `end`.
            IoKind::Write { .. } => OpKind::Write { fua: false },
            _ => return None,
        };
        let me = Target::Node(cx.node());
        while at < io.end() && cx.room() > 0 {
            let end = self.piece_of_part(at).min(io.end());
            let segs = Segs::one(cx.guest(at - io.offset, end - at));
            cx.issue(Op { kind, target: me, offset: at, len: end - at, segs });
            at = end;
        }
        Some(Step::Wait(State::Pieces { at }))
    }

    /// Where the table, or the flat extent, ends that byte `at` is in; in a stream the grain.
    fn piece_of_part(&self, at: u64) -> u64 {
        let part = self.part_at(at);
        match self.parts[part].kind {
            PartKind::Flat(_) | PartKind::Zero => self.parts[part].end,
            PartKind::Sparse(_) if self.is_compressed(part) => {
                let place = self.place(part);
                place.grain_start(place.grain_of(at) + 1).min(place.end)
            }
            PartKind::Sparse(_) => self.place(part).table_end(at),
        }
    }

    /// The entry that maps byte `at` cannot be. The request fails; others go on.
    fn invalid_entry(&self, at: u64, cx: &mut Cx<'_>) -> Step<State> {
        let part = self.part_at(at);
        let (place, grains) = (self.place(part), self.grains(part));
        let index = (at - place.start) >> grains.header.span_bits();
        let raw = grains.root.directory[index as usize];
        match grains.header.table(raw, grains.space.end()) {
            Some(Some(table)) => {
                let inside = place.grain_of(at) & ((1 << place.table_bits) - 1);
                cx.tell_corrupt("grain table entry is invalid", table + inside * 4);
            }
            _ => cx.tell_corrupt("grain directory entry is invalid", grains.root.entry_at(index)),
        }
        Step::Done(Err(Errno::IO))
    }

    /// The geometry of a sparse part.
    #[inline]
    pub(super) fn place(&self, part: usize) -> Place {
        let (start, end) = (self.parts[part].start, self.parts[part].end);
        let header = &self.grains(part).header;
        let (grain_bits, table_bits) = (header.grain_bits, header.table_bits);
        Place { part, start, end, grain_bits, table_bits }
    }

    #[inline(always)]
    fn look_up(&mut self, at: u64, end: u64, cx: &mut Cx<'_>) -> Found {
        let index = self.part_at(at);
        let part = &self.parts[index];
        let end = end.min(part.end);
        let grains = match &part.kind {
            PartKind::Flat(host) => return Found::Flat { host: host + (at - part.start), end },
            PartKind::Zero => return Found::Zeros { end },
            PartKind::Sparse(grains) => grains,
        };
        let table = (at - part.start) >> grains.header.span_bits();
        match self.tables.find(grains.first_key + table) {
            Some(slot) if self.tables.is_ready(slot) => self.run_in(slot, index, at, end, cx),
            Some(slot) => Found::Loading { slot },
            None => self.look_up_root(index, table, at, end),
        }
    }

    /// What the directory says: a table is in memory only where it names one.
    #[inline(never)]
    fn look_up_root(&self, part: usize, table: u64, at: u64, end: u64) -> Found {
        let grains = self.grains(part);
        match grains.header.table(grains.root.directory[table as usize], grains.space.end()) {
            None => Found::Invalid,
            Some(None) => Found::NoTable { end: self.place(part).table_end(at).min(end) },
            Some(Some(table)) => Found::NotLoaded { table },
        }
    }

    #[inline(always)]
    fn run_in(&mut self, slot: usize, part: usize, at: u64, end: u64, cx: &mut Cx<'_>) -> Found {
        let place = self.place(part);
        let grains = self.grains(part);
        let bounds = grains.bounds();
        let grain = place.grain_of(at);
        let count = 1 << place.table_bits;
        let index = (grain & (count - 1)) as usize;
        let bytes =
            &self.tables.bytes_from(slot, index * 4, cx.mem())[..count as usize * 4 - index * 4];
        let (entries, _) = bytes.as_chunks::<4>();
        let first = entries.first().and_then(|entry| bounds.entry(u32::from_le_bytes(*entry)));
        let Some(entry) = first else { return Found::Invalid };
        let mut run_end = place.grain_start(grain + 1);
        let mut next = 1;
        let mut expected = entry;
        // Deflated grains do not follow one another at a grain's distance.
        let alone = matches!(entry, Entry::Data(_)) && self.is_compressed(part);
        while run_end < end && next < entries.len() && !alone {
            if let Entry::Data(offset) = expected {
                expected = Entry::Data(offset + place.grain_size());
            }
            let here = bounds.entry(u32::from_le_bytes(entries[next]));
            if here != Some(expected) && !mutant!("vmdk_run_ignores_type") {
                break;
            }
            run_end += place.grain_size();
            next += 1;
        }
        Found::Run { entry, end: run_end.min(end), slot }
    }

    /// Does a range without a table do without one? Reads do, and what would only say zeros where
    /// zeros are, or could not say so.
    fn needs_no_table(&self, at: u64, end: u64, cx: &Cx<'_>) -> bool {
        let place = self.place(self.part_at(at));
        match cx.io().kind {
            IoKind::Read | IoKind::Status { .. } => true,
            IoKind::Zero { .. } => !self.shows_parent(at, place),
            IoKind::Discard => {
                !self.shows_parent(at, place)
                    || !self.can_say_zero(place)
                    || place.whole_grains(at, end).is_none()
            }
            _ => false,
        }
    }

    /// Can a table say that a grain is zeros?
    pub(super) fn can_say_zero(&self, place: Place) -> bool {
        self.grains(place.part).header.has_zeroed_grains()
    }

    /// Would an unallocated grain at `at` show the parent's contents?
    #[inline]
    pub(super) fn shows_parent(&self, at: u64, place: Place) -> bool {
        let start = place.grain_start(place.grain_of(at));
        self.backing.is_some_and(|backing| start < backing.size)
    }

    /// Does what needs no allocation for the run `at..run_end`; answers how far it got. `None`:
    /// something must be allocated at `at`.
    #[inline(always)]
    fn in_place(
        &mut self,
        at: u64,
        run_end: u64,
        entry: Entry,
        event: Event,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Option<Result<u64, Step<State>>> {
        let place = self.place(self.part_at(at));
        let Entry::Data(offset) = entry else {
            return self.without_data(at, run_end, entry, place, issued, cx);
        };
        if self.is_compressed(place.part) {
            if let IoKind::Status { .. } = cx.io().kind {
                cx.answer_status(StatusKind::Compressed, run_end - at, None);
                return Some(Ok(cx.io().end()));
            }
            let is_read = cx.io().kind == IoKind::Read;
            return (is_read && self.read_compressed(at, run_end, place, cx))
                .then_some(Ok(run_end));
        }
        if mutant!("vmdk_woken_trusts_old_lookup")
            && event == Event::Woken
            && cx.io().kind != IoKind::Read
        {
            return None;
        }
        let host = offset + ((at - place.start) & (place.grain_size() - 1));
        Some(Ok(self.at_host(at, run_end, host, place.grain_size(), issued, cx)))
    }

    /// Does `at..end` where it is: at byte `host` of its part's file, in grains of `grain` bytes.
    /// Answers how far it got.
    #[inline(always)]
    fn at_host(
        &mut self,
        at: u64,
        end: u64,
        host: u64,
        grain: u64,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> u64 {
        let io = cx.io();
        let file = self.parts[self.part_at(at)].file;
        let (from, len) = (at - io.offset, end - at);
        match io.kind {
            IoKind::Read => cx.read_guest(file, host, from, len),
            IoKind::Write { .. } => cx.write_guest(file, host, from, len, false),
            IoKind::Status { .. } => {
                return status_at(len, (file, HostOffset(host)), cx);
            }
            IoKind::Zero { .. } | IoKind::Discard | IoKind::Flush | IoKind::Truncate => {
                *issued |= self.clear_at(at, end, host, grain, cx);
                return end;
            }
        }
        *issued = true;
        end
    }

    /// As [`Vmdk::at_host`], to zero or discard. Was there an op?
    #[inline(never)]
    fn clear_at(&self, at: u64, end: u64, host: u64, grain: u64, cx: &mut Cx<'_>) -> bool {
        let file = self.parts[self.part_at(at)].file;
        if let IoKind::Zero { unmap, .. } = cx.io().kind {
            cx.issue(Op::bare(OpKind::Zero { unmap }, file, host, end - at));
            return true;
        }
        let whole = match grain {
            1 => Some((at, end)),
            _ => self.place(self.part_at(at)).whole_grains(at, end),
        };
        let Some((first, last)) = whole else { return false };
        cx.issue(Op::bare(OpKind::Discard, file, host + (first - at), last - first));
        true
    }

    /// As `in_place`, for a run without data of its own.
    #[inline(never)]
    fn without_data(
        &mut self,
        at: u64,
        run_end: u64,
        entry: Entry,
        place: Place,
        issued: &mut bool,
        cx: &mut Cx<'_>,
    ) -> Option<Result<u64, Step<State>>> {
        let io = cx.io();
        let done = match (io.kind, entry) {
            (IoKind::Read, Entry::Zero) => {
                cx.zero_guest(at - io.offset, run_end - at);
                run_end
            }
            (IoKind::Read, _) => match self.read_parent(at, run_end, cx) {
                Ok(read) => {
                    *issued |= read;
                    run_end
                }
                // What is under way has to come back first; then this fails again.
                Err(_) if *issued => return Some(Err(Step::Wait(State::Pieces { at }))),
                Err(errno) => return Some(Err(Step::Done(Err(errno)))),
            },
            (IoKind::Status { .. }, Entry::Zero) => {
                cx.answer_status(StatusKind::Zero, run_end - at, None);
                io.end()
            }
            (IoKind::Status { .. }, _) if self.parent_changed => {
                return Some(Err(Step::Done(Err(Errno::INVALID))));
            }
            (IoKind::Status { .. }, _) => {
                *issued |= backing::status(self.backing, at, run_end, cx);
                io.end()
            }
            (IoKind::Write { .. }, _) => return None,
            (_, Entry::Zero) => run_end,
            // Zero write or discard of an unallocated run.
            _ if !self.shows_parent(at, place) => run_end,
            (IoKind::Discard, _) if !self.can_say_zero(place) => run_end,
            (IoKind::Discard, _) => match place.whole_grains(at, run_end) {
                None => run_end,
                // The cut grain in front keeps its contents.
                Some((first, _)) if first > at => first,
                Some(_) => return None,
            },
            _ => return None,
        };
        Some(Ok(done))
    }

    /// Reads `at..end` of the parent; what it is too short for reads as zeros.
    fn read_parent(&mut self, at: u64, end: u64, cx: &mut Cx<'_>) -> Result<bool, Errno> {
        if self.parent_changed {
            return Err(Errno::INVALID);
        }
        Ok(backing::read(self.backing, at, end, cx))
    }

    fn load_table(&mut self, at: u64, table: u64, cx: &mut Cx<'_>) -> Step<State> {
        let part = self.part_at(at);
        let place = self.place(part);
        let grains = self.grains(part);
        let index = (at - place.start) >> grains.header.span_bits();
        let (key, bytes) = (grains.first_key + index, grains.header.table_bytes() as usize);
        debug_assert!(bytes <= COPY_AT);
        let Some(slot) = self.tables.reserve(key) else { return self.wait_for_room(at, cx) };
        let origin = (part as u32, index as u32);
        self.slots[slot].origin = origin;
        let seg = self.tables.seg(slot, 0, bytes);
        cx.issue(Op::read(Target::File(self.parts[part].file), table, Segs::one(seg)));
        Step::Wait(State::LoadTable { at, slot: slot as u32 })
    }

    /// Every slot that the table could have is pinned: by claims, or because it is to be written.
    fn wait_for_room(&mut self, at: u64, cx: &mut Cx<'_>) -> Step<State> {
        if self.writeback.wants_chore() && !self.asked.contains(&Asked::Writeback) {
            self.asked.push(Asked::Writeback);
            cx.ask();
        }
        cx.park(&mut self.tables.full);
        Step::Wait(State::Room { at, attempt: self.writeback.next_attempt() })
    }

    pub(super) fn table_loaded(
        &mut self,
        at: u64,
        slot: usize,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if result.is_ok() && self.writable {
            let (part, table) = self.slots[slot].origin;
            let Grains { header, root, .. } = self.grains(part as usize);
            let len = header.table_bytes() as usize;
            root.disarm(header, table, &mut self.tables.bytes_mut(slot, cx.mem())[..len]);
        }
        self.tables.load_ended(slot, result.is_ok(), cx);
        match result {
            Ok(()) => self.walk_from(at, Event::Start, cx),
            Err(errno) => Step::Done(Err(errno)),
        }
    }
}
