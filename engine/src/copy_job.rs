//! A copy of one node to another: how far it is, as plain data. What is done with it says `copy.rs`.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use slab::Slab;

use crate::backend::COPY_NUMBERS;
use crate::marks::Marks;
use crate::mutant;
use crate::units::{Errno, FileId, JobId, NodeId, RegionId, Time};
use crate::wait::WaitList;

/// Of which moment a copy is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Moment {
    /// Each byte is as it was at some moment of the job: for a source that nobody writes meanwhile.
    Any,
    /// Everything is as it was when the job was started: a backup of a disk that is in use. A write,
    /// zero write or discard waits until what it would change has been read (copy-before-write). What was in
    /// flight at the start counts as done or as not done, as after a power cut.
    Start,
    /// Everything is as it is when the job ends, and from then on the target is the disk: a mirror. What was
    /// written meanwhile is copied again; for the last of that writes wait. When the job has ended well, and
    /// [`poll_event`](crate::Engine::poll_event) has said so, whatever is submitted to the source's id goes to
    /// the target, the writes that have waited first; before that the two hold the same, and it is the time to
    /// note down which is the disk. (A drain, or closing the source, does not wait for that.) The source is to be [closed](crate::Engine::close) then
    /// ([`close_filter`](crate::Engine::close_filter), if the target is a layer below it: that was a commit).
    End,
}

/// What a copy does about zeros.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Zeros {
    /// What the source says to be zeros is zeroed in the target, or skipped if that is zeros already.
    Told,
    /// So is data that turns out to be zeros when it has been read.
    Found,
    /// All is written as data, so that the target has space for it.
    Written,
}

/// What [`Engine::start`](crate::Engine::start) is to copy.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Copy {
    /// The disk that is read, with the layers below it.
    pub source: NodeId,
    /// The disk that is written.
    pub target: NodeId,
    /// Where in the source the copy begins, in bytes. Default: 0.
    pub source_offset: u64,
    /// Where in the target it goes, in bytes. Default: 0.
    pub target_offset: u64,
    /// How many bytes of the target are written; where the source ends before, the rest becomes zeros.
    /// `None`: all from `target_offset` on, which is no less than the source has. Default: `None`.
    pub len: Option<u64>,
    /// The target is known to read as zeros: what is zeros in the source is skipped, not written.
    /// Default: false.
    pub target_is_zero: bool,
    /// Only what the uppermost so many layers of the source say is copied. What they leave to those below
    /// stays in the target as it is: for a target that lies over the same disk as the source, or is that
    /// disk, a layer below the source. `None`: all is copied. Default: `None`.
    pub top_layers: Option<u8>,
    /// What the uppermost so many layers of the source say is left out, as what the layers behind
    /// [`top_layers`](Copy::top_layers) say is. Not 0 for a [pull](Copy::pull) alone. Default: 0.
    pub skip_layers: u8,
    /// What is written is compressed, where the target's format can: as
    /// [`IoKind::Write`](crate::step::IoKind::Write) says. For that units are whole clusters. Default: false.
    pub compressed: bool,
    /// What becomes of zeros. Default: [`Zeros::Told`].
    pub zeros: Zeros,
    /// Bytes in a unit: a power of two from 512 to the size of a piece; the nearest below is taken. The
    /// target is written, zeroed and skipped in whole units, counted from its first byte, but for the
    /// ends of what is copied. A unit is zeros if all of it is. Default: 512.
    pub unit: usize,
    /// The kernel is asked to copy from file to file (`copy_file_range(2)`), where both disks are such
    /// files ([`Driver::file_of_disk`](crate::step::Driver::file_of_disk)): raw images. Nothing comes into memory then, and file
    /// systems that can let the two share their space. What it cannot copy is read and written. Not
    /// with [`Zeros::Found`], [`shown`](Copy::shown) or [`compressed`](Copy::compressed), which look at the bytes.
    /// No other job may have the target as its source or target meanwhile
    /// ([`Why::InUse`](crate::Why::InUse)). Default: false.
    pub offload: bool,
    /// What cannot be read becomes zeros, sector by sector, and the copy goes on; each time
    /// [`NodeEvent::JobError`](crate::NodeEvent::JobError) tells where. Default: false.
    pub salvage: bool,
    /// When something fails the job does not end: [`NodeEvent::JobError`](crate::NodeEvent::JobError) tells what, and it is
    /// [paused](crate::Engine::pause_job) as by the caller, who makes room, say, and
    /// [resumes](crate::Engine::resume_job) it, or cancels it. What has failed is then tried again. Writes that wait for the job wait on, for
    /// [`hold_max`](Copy::hold_max) at most: with `None` there the copy comes before the guest. Not of a failure to flush the target:
    /// what was written before may be lost. Default: false.
    pub stops_on_error: bool,
    /// What is read is shown to the embedder, in the order of the disk, before any of it is written:
    /// for a checksum, say. [`Engine::job_read`](crate::Engine::job_read) tells how. Only of
    /// [`Moment::Any`]. Default: false.
    pub shown: bool,
    /// Pieces in flight at once: 1 to 64, the nearest is taken. Default: 8.
    pub in_flight: usize,
    /// Bytes in a piece: a multiple of 4096, up to 2 MiB; the nearest is taken. Default: 256 KiB.
    /// The job's memory is `in_flight` pieces, and a page for each.
    pub piece: usize,
    /// At most so many bytes a second are read; what is zeros costs nothing, and what somebody waits for
    /// to be read is read at once. `None`: no limit. Default: `None`.
    pub rate: Option<u64>,
    /// Of which moment the target shall be. Default: [`Moment::Any`].
    pub moment: Moment,
    /// How long the job may hold up a write, where it does. If nothing that somebody waits for has been
    /// read for so long, because the target or the source hangs, the job ends with
    /// [`Errno::TIMED_OUT`], and the writes go on; a mirror tries again instead, until it waits for its
    /// flush. `None`: for ever. Default: 10 seconds.
    pub hold_max: Option<Duration>,
}

impl Copy {
    /// Of `source` to `target`, with the defaults.
    pub fn new(source: NodeId, target: NodeId) -> Copy {
        Copy {
            source,
            target,
            source_offset: 0,
            target_offset: 0,
            len: None,
            target_is_zero: false,
            top_layers: None,
            skip_layers: 0,
            compressed: false,
            zeros: Zeros::Told,
            unit: UNIT_MIN,
            offload: false,
            salvage: false,
            stops_on_error: false,
            shown: false,
            in_flight: 8,
            piece: 256 << 10,
            rate: None,
            moment: Moment::Any,
            hold_max: Some(Duration::from_secs(10)),
        }
    }

    /// A *pull*: what the layers below have of the disk that `node` shows, and its uppermost `layers`
    /// have not, is copied into itself while its guest goes on. When it has ended well the disk needs
    /// nothing of the layers below those: with 1 for `layers` it may be cut off from all of them when it
    /// has been closed. (With [`top_layers`](Copy::top_layers) set, of what is between.)
    ///
    /// A write, zero write or discard waits until what it is about has been copied, or found to be the
    /// disk's own; so its [`moment`](Copy::moment) is [`Moment::Start`]. It is the disk itself that a write waits for, so there is
    /// no [`hold_max`](Copy::hold_max). Units are best whole clusters.
    pub fn pull(node: NodeId, layers: u8) -> Copy {
        let skip_layers = layers.max(1);
        Copy { skip_layers, moment: Moment::Start, hold_max: None, ..Copy::new(node, node) }
    }

    /// Is it into the disk that it is from?
    pub(crate) fn is_pull(&self) -> bool {
        self.source == self.target
    }

    /// Can it be, as to which layers of which disk it is of and where they go?
    pub(crate) fn is_between_disks(&self) -> bool {
        if !self.is_pull() {
            return self.skip_layers == 0;
        }
        self.skip_layers > 0
            && self.source_offset == self.target_offset
            && self.moment == Moment::Start
            && self.hold_max.is_none()
            && !self.target_is_zero
    }

    /// Are layers of this depth left out?
    pub(crate) fn leaves_out(&self, depth: u8) -> bool {
        let skip =
            self.skip_layers + u8::from(self.is_pull() && mutant!("pull_leaves_out_a_layer"));
        depth < skip || self.top_layers.is_some_and(|layers| depth >= layers)
    }

    /// Each number brought within its range.
    pub(crate) fn within_ranges(self) -> Copy {
        let piece = self.piece.clamp(PAGE as usize, 2 << 20) & !(PAGE as usize - 1);
        // A power of two, and below that.
        let unit = 1 << self.unit.clamp(UNIT_MIN, piece).ilog2();
        let piece = piece & !(unit - 1);
        let rate = self.rate.map(|rate| rate.max(1));
        Copy { in_flight: self.in_flight.clamp(1, 64), piece, unit, rate, ..self }
    }

    /// May the kernel copy without showing the bytes to anybody?
    pub(crate) fn may_offload(&self) -> bool {
        self.offload && self.zeros != Zeros::Found && !self.shown && !self.compressed
    }

    /// Does it write to a disk of the other one past that disk's requests?
    pub(crate) fn passes_by(&self, other: &Copy) -> bool {
        self.may_offload() && [other.source, other.target].contains(&self.target)
    }

    /// Where the unit ends that byte `at` of the copy lies in.
    pub(crate) fn unit_end(&self, at: u64) -> u64 {
        at + self.unit as u64 - ((self.target_offset + at) & (self.unit as u64 - 1))
    }

    /// The last place at or before `at` where a unit begins; 0 if that is before the copy.
    pub(crate) fn unit_floor(&self, at: u64) -> u64 {
        at.saturating_sub((self.target_offset + at) & (self.unit as u64 - 1))
    }
}

impl Copy {
    /// All that is said of it but for its nodes, for a [record](crate::record).
    pub fn to_numbers(&self) -> [u64; COPY_NUMBERS] {
        let copy = self;
        let switches = [
            copy.target_is_zero,
            copy.compressed,
            copy.offload,
            copy.salvage,
            copy.stops_on_error,
            copy.shown,
            copy.len.is_some(),
            copy.rate.is_some(),
            copy.hold_max.is_some(),
            copy.top_layers.is_some(),
        ];
        let set = switches.iter().rev().fold(0, |bits, &set| bits << 1 | u64::from(set));
        let nanos = copy.hold_max.unwrap_or_default().as_nanos();
        let layers = u64::from(copy.skip_layers) | u64::from(copy.top_layers.unwrap_or(0)) << 8;
        [
            set,
            copy.zeros as u64 | (copy.moment as u64) << 8,
            layers,
            copy.source_offset,
            copy.target_offset,
            copy.len.unwrap_or(0),
            copy.unit as u64,
            copy.in_flight as u64,
            copy.piece as u64,
            copy.rate.unwrap_or(0),
            u64::try_from(nanos).unwrap_or(u64::MAX),
        ]
    }

    /// The copy again, of these nodes. `None`: these are no copy's.
    pub fn from_numbers(
        source: NodeId,
        target: NodeId,
        numbers: [u64; COPY_NUMBERS],
    ) -> Option<Copy> {
        let [
            set,
            choices,
            layers,
            source_offset,
            target_offset,
            len,
            unit,
            in_flight,
            piece,
            rate,
            nanos,
        ] = numbers;
        let is_set = |bit: u32| set >> bit & 1 == 1;
        let zeros = match choices & 0xff {
            0 => Zeros::Told,
            1 => Zeros::Found,
            2 => Zeros::Written,
            _ => return None,
        };
        let moment = match choices >> 8 {
            0 => Moment::Any,
            1 => Moment::Start,
            2 => Moment::End,
            _ => return None,
        };
        Some(Copy {
            source,
            target,
            source_offset,
            target_offset,
            len: is_set(6).then_some(len),
            target_is_zero: is_set(0),
            top_layers: is_set(9).then_some((layers >> 8) as u8),
            skip_layers: layers as u8,
            compressed: is_set(1),
            zeros,
            unit: usize::try_from(unit).ok()?,
            offload: is_set(2),
            salvage: is_set(3),
            stops_on_error: is_set(4),
            shown: is_set(5),
            in_flight: usize::try_from(in_flight).ok()?,
            piece: usize::try_from(piece).ok()?,
            rate: is_set(7).then_some(rate),
            moment,
            hold_max: is_set(8).then(|| Duration::from_nanos(nanos)),
        })
    }
}

/// A piece is so many times as long where the kernel copies it: 16 MiB by default.
const OFFLOADED: u64 = 64;

/// Bytes that are read before one of them is written: the least, if the unit is not more.
const GRANULE: usize = 64 << 10;

impl Copy {
    /// What is marked of a job that copies `len` bytes: what need not be read. `None`: that would be too
    /// much.
    pub(crate) fn marks(&self, len: u64, parts: Option<&[Range<u64>]>) -> Option<Marks> {
        if self.moment == Moment::Any && parts.is_none() {
            return Some(Marks::default());
        }
        let most = 1usize << self.piece.ilog2();
        let granule = GRANULE.clamp(self.unit, most.max(self.unit));
        let mut marks = Marks::new(len, self.target_offset, granule.ilog2())?;
        if let Some(parts) = parts.filter(|_| self.moment != Moment::End) {
            let within = |at: u64| at.saturating_sub(self.source_offset).min(len);
            let parts = parts.iter().map(|part| within(part.start)..within(part.end));
            marks.mark_all_but(&parts.collect::<Vec<_>>());
        }
        Some(marks)
    }
}

/// How far a job is, in bytes of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JobProgress {
    /// Copied, skipped or zeroed.
    pub done: u64,
    /// In all.
    pub total: u64,
    /// All before this byte of the copy is done; of a mirror, which goes over things again: 0.
    pub up_to: u64,
}

/// Bytes in a sector: nothing smaller is told apart.
pub(crate) const SECTOR: u64 = 512;

const UNIT_MIN: usize = SECTOR as usize;

/// Bytes behind each piece's memory: what is where is answered into them.
pub(crate) const PAGE: u64 = 4096;

/// A copy that runs.
#[derive(Clone, Hash, Debug)]
pub(crate) struct CopyJob {
    pub id: JobId,
    /// Its key.
    pub key: u32,
    pub copy: Copy,
    /// The files of source and target, between which the kernel is asked to copy.
    pub between: Option<(FileId, FileId)>,
    /// Memory of all pieces.
    pub region: RegionId,
    /// Bytes to copy, and how many of these the source has. Places in the job are counted from its
    /// own beginning.
    pub source_size: u64,
    pub total: u64,
    /// How many of these are none of the parts that are to be copied.
    pub left_out: u64,
    /// Where the next piece begins.
    pub next: u64,
    /// What the source was last told to have data in, from and to. To read it is right whatever it becomes.
    pub data: (u64, u64),
    /// Workers that ask what is where: nobody begins a piece before they know.
    pub asking: u32,
    pub done: u64,
    /// Where the first begins of the pieces that were given up: `u64::MAX` for none.
    pub given_up: u64,
    /// Workers that have not ended.
    pub workers: u32,
    pub is_paused: bool,
    /// Why it ends early.
    pub failed: Option<Errno>,
    /// When the next piece may begin.
    pub due: Time,
    /// Does somebody wait for that?
    pub awaits_due: bool,
    /// Workers that wait for that, for others, or to be resumed.
    pub waiters: WaitList,
    /// Those that have to be resumed because something has failed.
    pub stopped: WaitList,
    /// Workers that wait until the embedder has seen what they have read.
    pub unseen: WaitList,
    /// What was taken before its turn, because somebody waits for it; of a mirror: what has changed since it
    /// was copied.
    pub ahead: Marks,
    /// Of a mirror.
    pub mirror: Mirror,
    /// What somebody waits for, from and to, oldest first: it is taken next.
    pub wanted: VecDeque<(u64, u64)>,
    /// Writes that wait until something has been read.
    pub guests: WaitList,
    /// Since when they do, and nothing has been read.
    pub held_since: Option<Time>,
}

/// How far a mirror is.
#[derive(Clone, Copy, Hash, Debug, Default)]
pub(crate) struct Mirror {
    /// Requests that began before this one may have changed the source unseen.
    pub first_seen: u32,
    /// They have ended. Of a pull as well.
    pub is_seen: bool,
    /// How often all that had changed was gone through.
    pub passes: u8,
    /// Where that goes on.
    pub at: u64,
    /// Workers that wait.
    pub parked: u32,
    /// Writes wait: what is left is the last.
    pub holds: bool,
    /// Nothing is left but to make it stable.
    pub is_over: bool,
}

/// After so many passes writes wait, however much is left.
const PASSES_MAX: u8 = 4;

impl CopyJob {
    /// Is there nothing to do for zeros?
    pub fn skips_zeros(&self) -> bool {
        self.copy.target_is_zero && self.copy.zeros != Zeros::Written
    }

    /// When workers that wait are to be woken, or the job is to be given up.
    pub fn deadline(&self) -> Option<Time> {
        // Who asks wakes the others.
        let waits = self.awaits_due && !self.is_paused && self.asking == 0;
        let due = waits.then_some(self.due);
        due.into_iter().chain(self.holds_until()).min()
    }

    /// Until when it may hold up those that it does.
    pub fn holds_until(&self) -> Option<Time> {
        let nanos = |max: Duration| u64::try_from(max.as_nanos()).unwrap_or(u64::MAX);
        Some(self.held_since?.plus_ns(nanos(self.copy.hold_max?)))
    }

    /// Is nothing of this node to be changed before the job has read it? (What a pull writes into it
    /// at the moment, not even when the job has failed.)
    pub fn reads_first(&self, node: NodeId) -> bool {
        let pulls = self.copy.is_pull() && !mutant!("cancelled_pull_lets_writes_pass");
        let goes_on = self.failed.is_none() || pulls;
        self.copy.moment == Moment::Start && self.copy.source == node && goes_on
    }

    /// Bytes of a piece.
    pub fn piece(&self) -> u64 {
        let piece = self.copy.piece as u64;
        // What the kernel does takes no memory; but somebody may wait for it.
        let is_offloaded = self.between.is_some() && self.copy.moment == Moment::Any;
        if is_offloaded { piece * OFFLOADED } else { piece }
    }

    /// Does it mirror this node?
    pub fn mirrors(&self, node: NodeId) -> bool {
        self.copy.moment == Moment::End && self.copy.source == node
    }

    /// These bytes of the source have been written.
    pub fn note_changed(&mut self, from: u64, to: u64) {
        let (from, to) = self.within(from, to);
        // What is asked about may be counted as copied before the answer is there.
        if from < to && (from < self.next || self.asking > 0) {
            self.ahead.mark(from, to);
        }
    }

    /// Takes the next piece that has changed, and that nobody is copying: what he has read may be older,
    /// and be written later.
    pub fn take_changed(&mut self, workers: &Slab<Worker>, me: u32) -> Option<(u64, u64)> {
        let Mirror { at, passes, .. } = self.mirror;
        let busy: Vec<(u64, u64)> = workers
            .iter()
            .filter(|&(key, worker)| key != me as usize && worker.job == self.key)
            .filter(|(_, worker)| worker.at < worker.end)
            .filter(|_| !mutant!("mirror_copies_one_piece_twice_at_once"))
            .map(|(_, worker)| (self.ahead.floor(worker.at), self.ahead.end(worker.end - 1)))
            .collect();
        let found = self.next_changed(at, self.source_size, &busy);
        let start = found.or_else(|| self.next_changed(0, at.min(self.source_size), &busy))?;
        if start < at {
            self.mirror.passes = passes.saturating_add(1);
        }
        let piece = start.saturating_add(self.copy.piece as u64);
        let end = self.ahead.floor(piece).max(self.ahead.end(start)).min(self.source_size);
        let end = self.ahead.next(false, start, end).unwrap_or(end);
        let end = busy.iter().map(|busy| busy.0).filter(|&at| at > start).fold(end, u64::min);
        self.ahead.unmark(start, end);
        self.mirror.at = end;
        Some((start, end))
    }

    /// The first byte from `from` on that has changed and lies in none of the busy stretches.
    fn next_changed(&self, from: u64, to: u64, busy: &[(u64, u64)]) -> Option<u64> {
        let mut at = from;
        loop {
            at = self.ahead.next(true, at, to)?;
            match busy.iter().find(|busy| busy.0 <= at && at < busy.1) {
                Some(busy) => at = busy.1,
                None => return Some(at),
            }
        }
    }

    /// Is so little left of what has changed, or was it gone through so often, that writes are to wait?
    pub fn is_near(&self) -> bool {
        let few = self.copy.in_flight as u64;
        self.mirror.passes >= PASSES_MAX || self.ahead.count() <= few
    }

    /// All before this byte is done.
    pub fn up_to(&self, workers: &Slab<Worker>) -> u64 {
        if self.copy.moment == Moment::End {
            return 0;
        }
        let its = workers.iter().filter(|(_, worker)| worker.job == self.key);
        let open = its.filter(|(_, worker)| worker.at < worker.end).map(|(_, worker)| worker.at);
        let first = open.min().unwrap_or(self.next).min(self.next).min(self.given_up);
        if mutant!("copy_is_done_up_to_the_next_piece") { self.next } else { first }
    }

    /// The worker whose bytes are to be seen next, if it waits for that: nothing before them is still
    /// to be read.
    pub fn to_be_seen(&self, workers: &Slab<Worker>) -> Option<u32> {
        let its = workers.iter().filter(|(_, worker)| worker.job == self.key);
        let unread = its.filter(|(_, worker)| worker.read_to < worker.end);
        let early = mutant!("copy_shows_what_it_has_first");
        let unread = unread.filter(|(_, worker)| !early || worker.state == State::Look);
        let (key, first) = unread.min_by_key(|(_, worker)| worker.read_to)?;
        let is_read = first.state == State::Look && self.failed.is_none();
        is_read.then_some(key as u32)
    }

    /// What the job has of these bytes of the source: from and to, in the job.
    fn within(&self, from: u64, to: u64) -> (u64, u64) {
        let inside = |at: u64| at.saturating_sub(self.copy.source_offset).min(self.source_size);
        (inside(from), inside(to))
    }

    /// The first of these bytes of the source that has not been read.
    pub fn first_unread(&self, workers: &Slab<Worker>, from: u64, to: u64) -> Option<u64> {
        let (from, to) = self.within(from, to);
        // Of a job that has failed nothing more is taken.
        let untaken = self.first_untaken(from, to).filter(|_| self.failed.is_none());
        let reads = |worker: &Worker| {
            let at = worker.read_to.max(from);
            (at < worker.end.min(to)).then_some(at)
        };
        let its = workers.iter().filter(|(_, worker)| worker.job == self.key);
        let unread = its.filter_map(|(_, worker)| reads(worker));
        let unread = unread.filter(|_| !mutant!("taken_counts_as_read"));
        let first = untaken.into_iter().chain(unread).min();
        first.map(|at| self.copy.source_offset + at)
    }

    /// The first byte of the job from `from` on that no worker has taken.
    fn first_untaken(&self, from: u64, to: u64) -> Option<u64> {
        self.ahead.next(false, from.max(self.next), to)
    }

    /// Somebody waits for what is not read yet of these bytes of the source.
    pub fn want(&mut self, from: u64, to: u64) {
        let (from, to) = self.within(from, to);
        let wants = self.first_untaken(from, to).map(|from| (from, to));
        if let Some(wanted) = wants.filter(|wanted| !self.wanted.contains(wanted)) {
            self.wanted.push_back(wanted);
        }
    }

    /// Takes the next piece that somebody waits for.
    pub fn take_wanted(&mut self) -> Option<(u64, u64)> {
        while let Some(&(from, to)) = self.wanted.front() {
            let Some(at) = self.first_untaken(from, to) else {
                self.wanted.pop_front();
                continue;
            };
            let start = self.ahead.floor(at).max(self.next);
            let most = self.ahead.end(to - 1).min(self.source_size);
            let most = most.min(self.ahead.floor(start.saturating_add(self.copy.piece as u64)));
            let end = most.max(self.ahead.end(start).min(self.source_size));
            let end = self.ahead.next(true, start, end).unwrap_or(end);
            self.ahead.mark(start, end);
            return Some((start, end));
        }
        None
    }

    /// The next piece begins where nothing was taken ahead, and ends before.
    pub fn skip_taken(&mut self) {
        if self.copy.moment != Moment::End && !mutant!("copy_takes_again_what_it_has") {
            let free = self.ahead.next(false, self.next, self.source_size);
            self.next = free.unwrap_or(self.next.max(self.source_size));
        }
    }

    /// Where the next thing that was taken ahead begins, if it is before `end`; else `end`.
    pub fn free_up_to(&self, end: u64) -> u64 {
        if self.copy.moment == Moment::End {
            return end;
        }
        let taken = self.ahead.next(true, self.next, end.min(self.source_size));
        taken.filter(|_| !mutant!("copy_takes_again_what_it_has")).unwrap_or(end)
    }
}

/// Who copies one piece after the other.
#[derive(Clone, Copy, Hash, Debug)]
pub(crate) struct Worker {
    /// The key of its job.
    pub job: u32,
    /// Where its memory begins in the job's region.
    pub memory: u32,
    /// What is left of its piece.
    pub at: u64,
    pub end: u64,
    /// What is known to be data ends here.
    pub data_end: u64,
    /// What was last answered, which is in the worker's memory still, is about what begins here.
    pub answer_at: Option<u64>,
    /// Up to here the source has been read, or need not be: others may change it. A pull has written it too.
    pub read_to: u64,
    /// Somebody waits for the piece: it was taken before its turn.
    pub is_wanted: bool,
    /// What has been read, from and to: it is at the start of the memory.
    pub held: (u64, u64),
    pub state: State,
}

impl Worker {
    /// Of this job, with memory from this byte of its region on.
    pub fn new(job: u32, memory: u32) -> Worker {
        let (at, end, data_end, answer_at, read_to) = (0, 0, 0, None, 0);
        let (is_wanted, held, state) = (false, (0, 0), State::Piece);
        Worker { job, memory, at, end, data_end, answer_at, read_to, is_wanted, held, state }
    }
}

/// Named by what is awaited.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum State {
    /// A piece to copy.
    Piece,
    /// What is where.
    Status,
    /// What is known to be data, in memory.
    Read,
    /// One sector of that, from this place on: all together could not be read.
    ReadSector { at: u64 },
    /// The embedder, who looks at what has been read.
    Look,
    /// So many bytes, written to the target or zeroed there.
    Write { len: u64 },
    /// So many bytes, which the kernel copies from file to file.
    Offload { len: u64 },
    /// What has failed: it is tried again when the job is resumed.
    Again,
    /// All that was written is stable.
    Flush,
}

/// A write that may have to wait.
#[derive(Clone, Copy, Hash, Debug, Default)]
pub(crate) struct Guard {
    /// So many of its bytes, from the first on, are read by all jobs that read them first.
    pub safe: u64,
}
