//! The simulated device: takes ops, and completes the one that it is told to, as it is told to.
//!
//! It never completes anything by itself ([`Mode::Fifo`] apart). Somebody chooses an op in flight
//! and an [`Outcome`]; the next `harvest` makes it so. A read sees what had completed when it
//! completes, or, with [`Outcome::Early`], when the first change since its submission did: the
//! device may have served it at any time in between. A write's bytes are taken at submission, and
//! compared at completion: whoever uses memory again while it is in flight is found here. A
//! computation is done when it completes, under the same rule; its output is scribbled on first.
//!
//! It is a strict device. It panics on ops that are not aligned, on overlapping writes in flight
//! that no guest asked for, on reads of metadata that is being written, and on writes behind the
//! end of a file that cannot grow.

use std::collections::VecDeque;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::io;
use std::os::fd::BorrowedFd;

use cowbell_engine::backend::{Backend, Completion, FileInfo, Harvest, Submission};
use cowbell_engine::mem::Memory;
use cowbell_engine::op::{Base, Compute, OpKind, OpOwner, Seg};
use cowbell_engine::ops::{OpRecord, Ops};
use cowbell_engine::units::{Errno, FileId, OpId, ReqId, Time, align_down};

use crate::disk::{
    Change, Contents, File, Left, Length, Mark, Patch, SECTOR, Sector, Sites, fixed_hash, splitmix,
};
use crate::host::SimFile;

/// How an op in flight ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Outcome {
    /// Well.
    Done,
    /// A read: well, with what was there before a write that has completed meanwhile.
    Early,
    /// A read or write: well, about half of it.
    Short,
    /// With EIO, nothing done. A flush: what it covered is in limbo.
    Fail,
    /// With EIO, about half of it done.
    FailPart,
    /// With EIO, all of it done.
    FailAll,
    /// With ENOSPC, nothing done.
    NoSpace,
    /// With EOPNOTSUPP, nothing done: the file system cannot do that, or not any more.
    Unsupported,
    /// A write: well, it says, and has done nothing but make the file longer.
    Lost,
    /// A write: well, it says, and is a sector too far.
    Astray,
    /// A write: well, it says, and is eight sectors too far.
    FarAstray,
}

impl Outcome {
    /// All outcomes.
    pub const ALL: [Outcome; 11] = [
        Outcome::Done,
        Outcome::Early,
        Outcome::Short,
        Outcome::Fail,
        Outcome::FailPart,
        Outcome::FailAll,
        Outcome::NoSpace,
        Outcome::Unsupported,
        Outcome::Lost,
        Outcome::Astray,
        Outcome::FarAstray,
    ];

    /// What may become of a write that nobody is told of.
    pub const SILENT: [Outcome; 3] = [Outcome::Lost, Outcome::Astray, Outcome::FarAstray];

    /// Does it use up a fault?
    pub fn is_fault(self) -> bool {
        !matches!(self, Outcome::Done | Outcome::Early)
    }

    /// Does the op fail?
    pub fn is_error(self) -> bool {
        !matches!(self, Outcome::Done | Outcome::Early | Outcome::Short) && !self.is_silent()
    }

    /// Does it damage the file, and say that all is well?
    pub fn is_silent(self) -> bool {
        Outcome::SILENT.contains(&self)
    }

    /// Its name in traces.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Done => "ok",
            Outcome::Early => "early",
            Outcome::Short => "short",
            Outcome::Fail => "eio",
            Outcome::FailPart => "eio-part",
            Outcome::FailAll => "eio-all",
            Outcome::NoSpace => "enospc",
            Outcome::Unsupported => "eopnotsupp",
            Outcome::Lost => "lost",
            Outcome::Astray => "astray",
            Outcome::FarAstray => "far-astray",
        }
    }

    /// The outcome of this name.
    pub fn from_name(name: &str) -> Option<Outcome> {
        Outcome::ALL.into_iter().find(|outcome| outcome.name() == name)
    }
}

/// Names an op whatever the order of everything else: its request and which of its ops it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpName {
    /// The request, as the engine counts them.
    pub request: u32,
    /// Which of its ops.
    pub ordinal: u32,
}

impl fmt::Display for OpName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.request, self.ordinal)
    }
}

/// Who decides what completes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mode {
    /// [`SimBackend::choose`].
    Chosen,
    /// Everything completes well at the next harvest, oldest first.
    Fifo,
}

/// What a device may cease to do: every such op that ends from then on, until it is mended, ends with
/// EIO.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Breakage {
    /// Reads.
    Reads,
    /// Writes and zeroes.
    Writes,
    /// Flushes.
    Flushes,
    /// Makes files longer or shorter, or reserves space.
    Lengths,
}

impl Breakage {
    /// All of them.
    pub const ALL: [Breakage; 4] =
        [Breakage::Reads, Breakage::Writes, Breakage::Flushes, Breakage::Lengths];

    /// Its name in traces.
    pub fn name(self) -> &'static str {
        match self {
            Breakage::Reads => "reads",
            Breakage::Writes => "writes",
            Breakage::Flushes => "flushes",
            Breakage::Lengths => "lengths",
        }
    }

    /// The breakage of this name.
    pub fn from_name(name: &str) -> Option<Breakage> {
        Breakage::ALL.into_iter().find(|breakage| breakage.name() == name)
    }

    fn concerns(self, kind: OpKind) -> bool {
        match kind {
            OpKind::Read => self == Breakage::Reads,
            OpKind::Write { .. } | OpKind::Zero { .. } | OpKind::Copy { .. } => {
                self == Breakage::Writes
            }
            OpKind::Flush => self == Breakage::Flushes,
            OpKind::Truncate | OpKind::Allocate => self == Breakage::Lengths,
            OpKind::Discard | OpKind::Compute(_) | OpKind::Hole => false,
        }
    }
}

/// A device that is not what it says, to see whether anybody notices.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Lie {
    /// Flushes make nothing stable.
    FlushDoesNothing,
    /// Writes with FUA are like others.
    FuaDoesNothing,
    /// Short writes say that they were whole.
    ShortIsWhole,
    /// Zeroing zeroes nothing.
    ZeroDoesNothing,
    /// Every write ends after a sector.
    SectorAtATime,
}

/// What kind of device it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Device {
    /// Ops start and end at multiples of this.
    pub request_align: u32,
    /// Memory starts at multiples of this.
    pub memory_align: u32,
    /// It zeroes and discards blocks of this many bytes.
    pub hole_align: u32,
    /// So many ops at once, no more.
    pub depth: usize,
    /// Can files grow?
    pub can_grow: bool,
    /// Handing an op over holds the loop for so long, in nanoseconds.
    pub nanos_per_op: u64,
    /// Can it zero a range by itself?
    pub can_zero: bool,
    /// Pool buffers from this number on are for unaligned requests: what is written from them is
    /// a guest's.
    pub bounce_from: u32,
    /// See [`Lie`].
    pub lie: Option<Lie>,
}

impl Default for Device {
    fn default() -> Self {
        Device {
            request_align: 512,
            memory_align: 1,
            hole_align: 4096,
            depth: 64,
            can_grow: true,
            nanos_per_op: 0,
            can_zero: true,
            bounce_from: u32::MAX,
            lie: None,
        }
    }
}

/// What has become of damage.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Since {
    /// It is there, and nobody has read it.
    Unread,
    /// Somebody has read it, or may have.
    Read,
    /// It was written over before anybody had read it: as if it had never been, if there is no crash.
    WrittenOver,
}

/// A sector that was damaged, and nobody was told.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Damaged {
    /// Of which file.
    pub file: usize,
    /// Which.
    pub index: u64,
    /// What it should hold.
    pub should: Sector,
    /// What it held instead.
    pub is: Sector,
    /// Was it part of the format's tables?
    pub is_metadata: bool,
    /// Was it to be the format's own, though perhaps not yet part of its tables, or a copy of a guest's?
    pub is_own: bool,
    /// What has become of it.
    pub since: Since,
}

/// A bit of a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Bit {
    /// Which file.
    pub file: u32,
    /// Which byte.
    pub byte: u64,
    /// Which bit of it: 0 is the lowest.
    pub bit: u8,
}

/// Tells whether a range of a file, as it is now, is part of the format's tables.
pub type IsMetadata = fn(&Contents, u64, u64) -> bool;

/// An op in flight.
#[derive(Clone)]
struct Flying {
    op: OpId,
    request: ReqId,
    name: OpName,
    file: usize,
    kind: OpKind,
    offset: u64,
    len: u64,
    /// What it writes.
    change: Option<Change>,
    /// A flush: what it covers.
    mark: Option<Mark>,
    /// A read: what was there before a change that has completed since.
    early: Option<Vec<u8>>,
    /// A computation: what it is made from, hashed.
    input: u64,
}

/// So many words of a sector have a [bit that tells something](SimBackend::telling_bits).
const WORDS_MAX: usize = 16;

/// The file of an op that is on none.
const NO_FILE: usize = usize::MAX;

impl fmt::Debug for Flying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.what())
    }
}

impl Flying {
    fn what(&self) -> String {
        match *self {
            Flying { kind: kind @ OpKind::Compute(_), .. } => format!("{kind:?}"),
            Flying { kind, file, offset, len, .. } => {
                format!("{kind:?} f{file} {offset:#x}+{len:#x}")
            }
        }
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    fn overlaps(&self, other: &Flying) -> bool {
        self.file == other.file && self.offset < other.end() && other.offset < self.end()
    }

    /// Does it read of this sector?
    fn reads(&self, sector: &Damaged) -> bool {
        let (file, offset) = match self.kind {
            OpKind::Read => (self.file, self.offset),
            OpKind::Copy { from, at } => (from.index(), at),
            _ => return false,
        };
        let start = sector.index * SECTOR;
        let end = offset.saturating_add(self.len);
        file == sector.file && offset < start + SECTOR && start < end
    }

    /// A guest's own write, zeroing or discard, which may overlap another of a guest's.
    fn is_guests(&self) -> bool {
        match self.kind {
            OpKind::Zero { .. } | OpKind::Discard => true,
            _ => self.change.as_ref().is_some_and(|change| !change.own),
        }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct SimBackend {
    device: Device,
    mode: Mode,
    files: Vec<File>,
    flying: Vec<Flying>,
    verdicts: VecDeque<(OpName, Outcome)>,
    /// Ops that could not be started.
    refused: Vec<OpId>,
    is_metadata: Option<IsMetadata>,
    stalled: bool,
    broken: Option<Breakage>,
    /// Files from this on are another disk's: nothing happens to them.
    beside_from: usize,
    left_behind: bool,
    /// Files that were taken away: what they hold is looked at, and nobody else may use them.
    detached: Vec<usize>,
    /// See [`SimBackend::take_held`].
    held: u64,
    /// Sectors that were damaged, in order.
    damaged: Vec<Damaged>,
}

impl SimBackend {
    /// A device without files.
    pub fn new(device: Device, mode: Mode) -> SimBackend {
        SimBackend {
            device,
            mode,
            files: Vec::new(),
            flying: Vec::new(),
            verdicts: VecDeque::new(),
            refused: Vec::new(),
            is_metadata: None,
            stalled: false,
            broken: None,
            beside_from: NO_FILE,
            left_behind: false,
            detached: Vec::new(),
            held: 0,
            damaged: Vec::new(),
        }
    }

    /// What was damaged so far, and nobody was told.
    pub fn damaged(&self) -> &[Damaged] {
        &self.damaged
    }

    /// The silent ways in which an op in flight may end: only writes have any.
    pub fn silent_outcomes(&self, name: OpName) -> &'static [Outcome] {
        let mut flying = self.flying.iter().filter(|flying| flying.name == name);
        let is_write = |flying: &Flying| {
            matches!(flying.kind, OpKind::Write { .. }) && flying.file < self.beside_from
        };
        if flying.any(is_write) { &Outcome::SILENT } else { &[] }
    }

    /// Bits of the tables of this disk's files, from file number `first` on, that tell something: of each word that
    /// is not zero the lowest that is set and one other, and one of a word that is.
    pub fn telling_bits(&self, first: usize) -> Vec<Bit> {
        let Some(is_metadata) = self.is_metadata else { return Vec::new() };
        let files = self.files.iter().enumerate().take(self.beside_from).skip(first);
        let mut bits = Vec::new();
        for (file, contents) in files.map(|(at, file)| (at as u32, file.now())) {
            for (index, sector) in contents.filled() {
                let start = index * SECTOR;
                if start + SECTOR > contents.len() || !is_metadata(contents, start, start + SECTOR)
                {
                    continue;
                }
                let words = sector.bytes().as_chunks::<4>().0.iter().enumerate();
                let words =
                    words.map(|(at, word)| (start + 4 * at as u64, u32::from_le_bytes(*word)));
                let (filled, empty): (Vec<_>, Vec<_>) = words.partition(|(_, word)| *word != 0);
                let mut add = |at: u64, bit: u32| {
                    let (byte, bit) = (at + u64::from(bit / 8), (bit % 8) as u8);
                    bits.push(Bit { file, byte, bit });
                };
                for &(at, word) in filled.iter().step_by(filled.len().div_ceil(WORDS_MAX)) {
                    add(at, word.trailing_zeros());
                    add(at, (splitmix(at) % 32) as u32);
                }
                empty.first().into_iter().for_each(|&(at, _)| add(at, (splitmix(at) % 32) as u32));
            }
        }
        bits
    }

    /// A bit that is at rest changes.
    pub fn flip(&mut self, Bit { file, byte, bit }: Bit) {
        let contents = self.files[file as usize].now();
        let index = byte / SECTOR;
        let should = contents.sector(index);
        let mut bytes = *should.bytes();
        bytes[(byte % SECTOR) as usize] ^= 1 << bit;
        let is = Sector::from_bytes(&bytes);
        let patch = Patch { index, from: 0, to: SECTOR as u16, data: is };
        self.harm(file as usize, vec![patch], &[], false);
    }

    /// Puts `patches` where they do not belong, and not `meant` where they do; or only leaves these out.
    fn harm(&mut self, file: usize, patches: Vec<Patch>, meant: &[Patch], is_own: bool) {
        let now = self.files[file].now().clone();
        let len = now.len();
        let sector = |index: u64, should: Sector, is: Sector, is_own: bool| {
            let start = index * SECTOR;
            let is_metadata = self.is_metadata.is_some_and(|is| is(&now, start, start + SECTOR));
            let (is_own, since) = (is_own || is_metadata, Since::Unread);
            Damaged { file, index, should, is, is_metadata, is_own, since }
        };
        let merged = |sector: &Sector, patch: &Patch| {
            sector.merged(&patch.data, patch.from as usize, patch.to as usize)
        };
        let mut damaged = Vec::new();
        for patch in meant {
            let (index, is) = (patch.index, now.sector(patch.index));
            let should = merged(&is, patch);
            damaged.push(sector(index, should, is, is_own));
        }
        for patch in patches.iter().filter(|patch| patch.index * SECTOR < len) {
            let (index, should) = (patch.index, now.sector(patch.index));
            let is = merged(&should, patch);
            match damaged.iter_mut().find(|known| known.index == index) {
                Some(known) => known.is = is,
                None => damaged.push(sector(index, should, is, false)),
            }
        }
        // It holds what it should, and may not after a crash: as if it had been written over.
        for sector in damaged.iter_mut().filter(|sector| sector.should == sector.is) {
            sector.since = Since::WrittenOver;
        }
        self.damaged.append(&mut damaged);
        let change = Change::new(patches, Length::Keep, true);
        self.remember_for_reads(file, &change);
        // As if it had always been so.
        self.files[file].complete(change, true);
    }

    /// Makes the device panic on reads that overlap a write in flight to what `is_metadata` says.
    pub fn watch_metadata(&mut self, is_metadata: IsMetadata) {
        self.is_metadata = Some(is_metadata);
    }

    /// Files that are attached from now on are another disk's: they do not fail, and nobody looks at
    /// what a crash would leave of them.
    pub fn begin_beside(&mut self) {
        self.beside_from = self.files.len();
    }

    /// Changes who decides.
    pub fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Makes the device lie, from now on.
    pub fn set_lie(&mut self, lie: Option<Lie>) {
        self.device.lie = lie;
    }

    /// How long handing ops over has held the loop since this was last asked, in nanoseconds.
    pub fn take_held(&mut self) -> u64 {
        std::mem::take(&mut self.held)
    }

    /// While stalled, the device takes no ops.
    pub fn set_stalled(&mut self, stalled: bool) {
        self.stalled = stalled;
    }

    /// Does it take no ops?
    pub fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// From now on the device fails at this.
    pub fn break_down(&mut self, breakage: Breakage) {
        self.broken = Some(breakage);
    }

    /// It fails at nothing any more.
    pub fn mend(&mut self) {
        self.broken = None;
    }

    /// Is this op in flight a flush?
    pub fn is_flush(&self, name: OpName) -> bool {
        self.flying.iter().any(|flying| flying.name == name && flying.kind == OpKind::Flush)
    }

    /// What it fails at.
    pub fn broken(&self) -> Option<Breakage> {
        self.broken
    }

    /// A file of the disk.
    pub fn file(&self, id: FileId) -> &File {
        &self.files[id.index()]
    }

    /// How many files there are.
    pub fn file_count(&self) -> usize {
        self.files.len()
    }

    /// Ops in flight, oldest first.
    pub fn in_flight(&self) -> impl Iterator<Item = OpName> + '_ {
        self.flying.iter().map(|flying| flying.name)
    }

    /// Reads in flight of files below `file`, and who the engine takes them for.
    pub fn reads_below(&self, file: usize) -> impl Iterator<Item = (OpName, OpId)> + '_ {
        let below = move |flying: &&Flying| flying.kind == OpKind::Read && flying.file < file;
        self.flying.iter().filter(below).map(|flying| (flying.name, flying.op))
    }

    /// Is nothing in flight on files of this disk, those of the one beside apart?
    pub fn is_still(&self) -> bool {
        !self.flying.iter().any(|flying| flying.file < self.beside_from)
    }

    /// How many ops are in flight.
    pub fn in_flight_count(&self) -> usize {
        self.flying.len()
    }

    /// An op in flight, for people.
    pub fn describe(&self, name: OpName) -> String {
        match self.flying.iter().find(|flying| flying.name == name) {
            Some(flying) => flying.what(),
            None => "not in flight".into(),
        }
    }

    /// What a crash may leave of each file.
    pub fn crash_sites(&self) -> Vec<Sites> {
        let files = self.files.iter().enumerate().take(self.beside_from);
        files.map(|(at, file)| self.sites_of(at, file)).collect()
    }

    /// The same, of the disk beside.
    pub fn crash_sites_beside(&self) -> Vec<Sites> {
        let files = self.files.iter().enumerate().skip(self.beside_from);
        files.map(|(at, file)| self.sites_of(at, file)).collect()
    }

    fn sites_of(&self, at: usize, file: &File) -> Sites {
        let mine = self.flying.iter().filter(|flying| flying.file == at);
        file.crash_sites(mine.filter_map(|flying| flying.change.as_ref()))
    }

    /// What images that a crash has left of these files, or those of the disk beside, have of each change.
    pub fn left(&self, beside: bool, images: &[Contents]) -> Vec<Left> {
        let is_mine = |&(at, _): &(usize, &File)| (at >= self.beside_from) == beside;
        let files = self.files.iter().enumerate().filter(is_mine).zip(images);
        let left = files.flat_map(|((at, file), image)| {
            let mine = self.flying.iter().filter(move |flying| flying.file == at);
            file.left(mine.filter_map(|flying| flying.change.as_ref()), image)
        });
        left.collect()
    }

    /// A hash of all that [`SimBackend::crash_sites`] follows from, or those of the disk beside.
    pub fn crash_hash(&self, beside: bool) -> u64 {
        let is_mine = |file: usize| (file >= self.beside_from) == beside;
        let files = self.files.iter().enumerate().filter(|&(at, _)| is_mine(at));
        let files = files.fold(0, |hash, (_, file)| splitmix(hash ^ file.crash_hash()));
        // In whatever order they were submitted: a crash knows none.
        let mine = self.flying.iter().filter(|flying| is_mine(flying.file));
        let changes = mine.filter_map(|flying| {
            flying.change.as_ref().map(|change| fixed_hash((flying.file, change)))
        });
        changes.fold(files, |sum, change| sum.wrapping_add(splitmix(change)))
    }

    /// The ways in which an op in flight may end; with faults or without.
    pub fn outcomes(&self, name: OpName, faults: bool, out: &mut Vec<Outcome>) {
        let flying = self.flying.iter().find(|flying| flying.name == name);
        let flying = flying.expect("only ops in flight end");
        let mine = flying.file < self.beside_from || flying.file == NO_FILE;
        if mine && self.broken.is_some_and(|breakage| breakage.concerns(flying.kind)) {
            return out.push(Outcome::Fail);
        }
        out.push(Outcome::Done);
        if flying.early.is_some() {
            out.push(Outcome::Early);
        }
        if !faults || !mine {
            return;
        }
        let sectors = flying.change.as_ref().map_or(0, |change| change.patches.len());
        let halves = self.half(flying) > 0;
        match flying.kind {
            OpKind::Read if halves => out.extend([Outcome::Short, Outcome::Fail]),
            OpKind::Read => out.push(Outcome::Fail),
            OpKind::Flush => out.push(Outcome::Fail),
            OpKind::Write { .. } | OpKind::Zero { .. } => {
                out.extend([Outcome::Fail, Outcome::FailAll]);
                // A guest's torn write is looked at at every crash; a table's may be read again.
                if sectors > 1 && flying.change.as_ref().is_some_and(|change| change.own) {
                    out.push(Outcome::FailPart);
                }
                if matches!(flying.kind, OpKind::Write { .. }) && halves {
                    out.push(Outcome::Short);
                }
                if flying.end() > self.files[flying.file].now().len() {
                    out.push(Outcome::NoSpace);
                }
                if matches!(flying.kind, OpKind::Zero { .. }) && self.device.can_zero {
                    out.push(Outcome::Unsupported);
                }
            }
            OpKind::Truncate | OpKind::Allocate => {
                out.extend([Outcome::Fail, Outcome::FailAll, Outcome::NoSpace]);
            }
            OpKind::Discard => {
                out.extend([Outcome::Fail, Outcome::FailAll, Outcome::Unsupported]);
            }
            OpKind::Copy { .. } => {
                out.extend([Outcome::Unsupported, Outcome::FailAll]);
                if sectors > 1 {
                    out.push(Outcome::FailPart);
                }
            }
            OpKind::Compute(_) => out.push(Outcome::Fail),
            OpKind::Hole => {}
        }
    }

    /// How an op in flight ends if this is chosen: a device that cannot zero refuses.
    pub fn becomes(&self, name: OpName, outcome: Outcome) -> Outcome {
        let is_zero = |it: &Flying| it.name == name && matches!(it.kind, OpKind::Zero { .. });
        let refuses = !self.device.can_zero && outcome == Outcome::Done;
        match refuses && self.flying.iter().any(is_zero) {
            true => Outcome::Unsupported,
            false => outcome,
        }
    }

    /// Makes an op in flight end so at the next harvest.
    pub fn choose(&mut self, name: OpName, outcome: Outcome) {
        assert!(self.flying.iter().any(|flying| flying.name == name), "{name} is not in flight");
        self.verdicts.push_back((name, outcome));
    }

    /// About half of a read or write, in whole blocks; 0 if it has only one.
    fn half(&self, flying: &Flying) -> u64 {
        let unit = (self.device.request_align as u64).max(SECTOR);
        align_down(flying.offset + flying.len / 2, unit).saturating_sub(flying.offset)
    }

    fn start(&mut self, id: OpId, record: &OpRecord, ops: &Ops, mem: &Memory) {
        let owner = record.owner;
        let op = &record.op;
        let computes = matches!(op.kind, OpKind::Compute(_));
        let file = if computes { NO_FILE } else { record.file().index() };
        if file >= self.files.len() && !computes {
            self.refused.push(id);
            return;
        }
        let mut flying = Flying {
            op: id,
            request: owner.request,
            name: OpName { request: ops.serial(owner.request), ordinal: owner.ordinal },
            file,
            kind: op.kind,
            offset: record.offset(),
            len: record.remaining(),
            change: None,
            mark: None,
            early: None,
            input: if computes { input_hash(record, mem) } else { 0 },
        };
        flying.change = self.change_of(record, ops, mem);
        if op.kind == OpKind::Flush {
            flying.mark = Some(self.files[file].mark());
        }
        if !computes {
            self.assert_allowed(&flying);
        }
        self.flying.push(flying);
    }

    fn assert_allowed(&self, new: &Flying) {
        // Tables that are wrong lead anywhere.
        if !self.damaged.is_empty() {
            return;
        }
        let len = self.files[new.file].now().len();
        let mask = self.device.request_align as u64 - 1;
        if new.kind.has_memory() {
            assert_eq!((new.offset | new.len) & mask, 0, "an op that is not aligned: {new:?}");
            assert!(new.len > 0, "an empty op: {new:?}");
        }
        let grows = match new.kind {
            OpKind::Write { .. } | OpKind::Zero { .. } => new.end() > len,
            OpKind::Allocate | OpKind::Copy { .. } => new.end() > len,
            // Of a device nobody can cut off anything either.
            OpKind::Truncate => new.offset > len || !self.device.can_grow,
            _ => false,
        };
        assert!(self.device.can_grow || !grows, "behind the end of the disk: {new:?}");
        let holes = u64::from(self.device.hole_align) - 1;
        let is_cut = matches!(new.kind, OpKind::Zero { .. } | OpKind::Discard)
            && (new.offset | new.len) & holes != 0;
        assert!(!is_cut, "the file's blocks are cut: {new:?}");
        for old in self.flying.iter().filter(|old| old.file == new.file) {
            // The suite for backends asks more of them than the engine does.
            let asked = self.mode == Mode::Chosen;
            let locks = asked && (new.kind.locks_file() || old.kind.locks_file());
            let waits = new.kind != OpKind::Flush && old.kind != OpKind::Flush;
            assert!(!(locks && waits), "the loop is held: {new:?} waits for the lock of {old:?}");
            if new.kind.modifies() && old.kind.modifies() {
                self.assert_apart(old, new);
            }
            let (read, write) = match (old.kind, new.kind) {
                (OpKind::Read, kind) if kind.modifies() => (old, new),
                (kind, OpKind::Read) if kind.modifies() => (new, old),
                _ => continue,
            };
            if let Some(is_metadata) = self.is_metadata
                && read.overlaps(write)
                && read.file < self.beside_from
            {
                let now = self.files[read.file].now();
                let (start, end) = (read.offset.max(write.offset), read.end().min(write.end()));
                assert!(
                    !is_metadata(now, start, end),
                    "metadata is read while it is written: {read:?} {write:?}"
                );
            }
        }
    }

    fn assert_apart(&self, old: &Flying, new: &Flying) {
        let truncated = |truncate: &Flying, other: &Flying| {
            truncate.kind == OpKind::Truncate
                && (other.kind == OpKind::Truncate || other.end() > truncate.offset)
        };
        assert!(
            !truncated(old, new) && !truncated(new, old),
            "a file's length is set while something happens behind it: {old:?} {new:?}"
        );
        // A block in which the file ends, or will, is changed with the length. What extends the
        // file is done under the file system's own lock.
        let holes = u64::from(self.device.hole_align);
        let len = self.files[new.file].now().len();
        let moves_end = |op: &Flying| match op.kind {
            OpKind::Truncate => Some(op.offset.min(len)),
            OpKind::Allocate | OpKind::Zero { .. } => (op.end() > len).then_some(len),
            _ => None,
        };
        let in_block = |op: &Flying, end: u64| {
            end & (holes - 1) != 0
                && op.kind != OpKind::Allocate
                && op.end() <= len
                && op.offset < align_down(end, holes) + holes
                && op.end() > align_down(end, holes)
        };
        for (one, other) in [(old, new), (new, old)] {
            let shared = moves_end(one).is_some_and(|end| in_block(other, end));
            assert!(!shared, "a block in which a file ends is written meanwhile: {old:?} {new:?}");
        }
        // Reserving space changes no byte.
        let reserves = |op: &Flying| op.kind == OpKind::Allocate;
        let apart = !old.overlaps(new) || reserves(old) || reserves(new);
        assert!(
            apart || (old.is_guests() && new.is_guests()),
            "two writes to one place in flight: {old:?} {new:?}"
        );
    }

    /// Ends an op, and says so to the engine.
    fn end(&mut self, name: OpName, outcome: Outcome, ops: &Ops, mem: &mut Memory) -> Completion {
        let at = self.flying.iter().position(|flying| flying.name == name);
        let mut flying = self.flying.remove(at.expect("chosen while in flight"));
        let op = flying.op;
        let record = &ops[op];
        for sector in self.damaged.iter_mut().filter(|sector| sector.since == Since::Unread) {
            if flying.reads(sector) {
                sector.since = Since::Read;
            }
        }
        if matches!(flying.kind, OpKind::Copy { .. }) {
            // It is taken as late as may be; a crash may find it as it was at first.
            flying.change = self.change_of(record, ops, mem);
        }
        if let OpKind::Copy { from, at } = flying.kind
            && at + flying.len > self.files[from.index()].now().len()
        {
            return Completion::new(op, Err(Errno::INVALID));
        }
        let result = match flying.kind {
            OpKind::Read => self.end_read(&flying, outcome, record, mem),
            OpKind::Flush => self.end_flush(&flying, outcome),
            OpKind::Compute(work) => end_compute(work, &flying, outcome, record, mem),
            _ => {
                if let (true, Some(change)) = (flying.kind.has_memory(), &flying.change) {
                    let mut bytes = vec![0; flying.len as usize];
                    mem.gather(&record.op.segs, record.moved, &mut bytes);
                    assert!(
                        change.is_of(flying.offset, &bytes),
                        "memory was used again while a write from it was in flight: {flying:?}"
                    );
                }
                self.end_change(flying, outcome)
            }
        };
        Completion::new(op, result)
    }

    fn end_read(
        &mut self,
        flying: &Flying,
        outcome: Outcome,
        record: &OpRecord,
        mem: &mut Memory,
    ) -> Result<u64, Errno> {
        if outcome.is_error() {
            return Err(Errno::IO);
        }
        let now = self.files[flying.file].now();
        let asked = if outcome == Outcome::Short { self.half(flying) } else { flying.len };
        let moved = asked.min(now.len().saturating_sub(flying.offset));
        let mut bytes = vec![0; moved as usize];
        match &flying.early {
            Some(early) if outcome == Outcome::Early => {
                let there = early.len().min(bytes.len());
                bytes[..there].copy_from_slice(&early[..there]);
            }
            _ => now.read(flying.offset, &mut bytes),
        }
        mem.scatter(&record.op.segs, record.moved, &bytes);
        Ok(moved)
    }

    fn end_flush(&mut self, flying: &Flying, outcome: Outcome) -> Result<u64, Errno> {
        let mark = flying.mark.expect("flushes are marked when they start");
        let file = &mut self.files[flying.file];
        if outcome.is_error() {
            file.flush_failed(mark);
            return Err(Errno::IO);
        }
        if self.device.lie != Some(Lie::FlushDoesNothing) {
            file.flushed(mark);
        }
        Ok(0)
    }

    fn end_change(&mut self, flying: Flying, outcome: Outcome) -> Result<u64, Errno> {
        let mut half = self.half(&flying);
        let mut outcome = outcome;
        let moves = flying.kind.has_memory();
        let is_slow = self.device.lie == Some(Lie::SectorAtATime) && outcome == Outcome::Done;
        if is_slow && moves && flying.len > SECTOR {
            (half, outcome) = (SECTOR, Outcome::Short);
        }
        let change = flying.change.expect("what modifies has a change");
        let is_zero = matches!(flying.kind, OpKind::Zero { .. });
        if is_zero && !self.device.can_zero && outcome == Outcome::Done {
            return Err(Errno::NOT_SUPPORTED);
        }
        let change = match is_zero && self.device.lie == Some(Lie::ZeroDoesNothing) {
            true => change.part(0),
            false => change,
        };
        let length = self.files[flying.file].now().len();
        if !self.device.can_grow && !self.damaged.is_empty() && change.length.of(length) != length {
            // Tables that are wrong lead behind the end of a device.
            return Err(Errno::INVALID);
        }
        let fua = flying.kind == OpKind::Write { fua: true }
            && self.device.lie != Some(Lie::FuaDoesNothing);
        let (done, fua, result) = match outcome {
            Outcome::Done | Outcome::Early => (change, fua, Ok(if moves { flying.len } else { 0 })),
            Outcome::Short => {
                let sectors = (flying.offset + half).div_ceil(SECTOR) - flying.offset / SECTOR;
                let lie = self.device.lie == Some(Lie::ShortIsWhole);
                let moved = if lie { flying.len } else { half };
                let mut part = change.part(sectors as usize);
                part.cut_at(flying.offset + half);
                (part, fua, Ok(moved))
            }
            Outcome::Fail => (change.part(0), false, Err(Errno::IO)),
            Outcome::FailPart => {
                let share = change.patches.len() / 2;
                (change.part(share), false, Err(Errno::IO))
            }
            Outcome::FailAll => (change, false, Err(Errno::IO)),
            Outcome::NoSpace => (change.part(0), false, Err(Errno::NO_SPACE)),
            Outcome::Unsupported => (change.part(0), false, Err(Errno::NOT_SUPPORTED)),
            Outcome::Lost | Outcome::Astray | Outcome::FarAstray => {
                let longer = Change::new(Vec::new(), change.length, change.own);
                self.files[flying.file].complete(longer, fua);
                let patches = self.led_astray(flying.file, outcome, &change);
                self.harm(flying.file, patches, &change.patches, change.own);
                return Ok(flying.len);
            }
        };
        self.remember_for_reads(flying.file, &done);
        self.write_over_damage(flying.file, &done);
        self.files[flying.file].complete(done, fua);
        result
    }

    /// Damage over which `change` is written is gone, if nobody has read it, nor is about to.
    fn write_over_damage(&mut self, file: usize, change: &Change) {
        let (flying, damaged) = (&self.flying, &mut self.damaged);
        for sector in damaged.iter_mut().filter(|it| it.file == file && it.since == Since::Unread) {
            for patch in change.patches.iter().filter(|patch| patch.index == sector.index) {
                let (from, to) = (patch.from as usize, patch.to as usize);
                sector.should = sector.should.merged(&patch.data, from, to);
                sector.is = sector.is.merged(&patch.data, from, to);
            }
            if flying.iter().any(|flying| flying.reads(sector)) {
                sector.since = Since::Read;
            } else if sector.should == sector.is {
                sector.since = Since::WrittenOver;
            }
        }
    }

    /// A write's patches, where they go instead. Nowhere, if the file is too short.
    fn led_astray(&self, file: usize, outcome: Outcome, change: &Change) -> Vec<Patch> {
        let far = match outcome {
            Outcome::Astray => 1,
            Outcome::FarAstray => 8,
            _ => return Vec::new(),
        };
        let sectors = self.files[file].now().len() / SECTOR;
        let fits = change.patches.iter().all(|patch| patch.index + far < sectors);
        let is_above = change.patches.iter().all(|patch| patch.index >= far);
        let patches = change.patches.iter();
        let moved = |index: u64| if fits { index + far } else { index - far };
        if !fits && !is_above {
            return Vec::new();
        }
        patches.map(|patch| Patch { index: moved(patch.index), ..patch.clone() }).collect()
    }

    /// What an op does to its file, its bytes as they are now.
    fn change_of(&self, record: &OpRecord, ops: &Ops, mem: &Memory) -> Option<Change> {
        let op = &record.op;
        let (offset, len) = (record.offset(), record.remaining());
        let segs = op.segs.as_slice();
        let (patches, length, own) = match op.kind {
            OpKind::Read | OpKind::Flush | OpKind::Compute(_) | OpKind::Hole => return None,
            OpKind::Write { .. } => {
                let mut bytes = vec![0; len as usize];
                mem.gather(&op.segs, record.moved, &mut bytes);
                let is_guests = |seg: &Seg| match seg.base {
                    Base::Guest(_) => true,
                    Base::Pool(buf) => buf.0 >= self.device.bounce_from,
                    base @ Base::Region(_) => ops.came_with(record.owner.request, base),
                    Base::Zeros => false,
                };
                // Zeros and nothing else are what a guest's zeroing has become.
                let zeroes = segs.iter().all(|seg| seg.base == Base::Zeros);
                let own = !zeroes && !segs.iter().any(is_guests);
                (Patch::cut(offset, &bytes), self.extended(record), own)
            }
            OpKind::Copy { from, at } => {
                let mut bytes = vec![0; len as usize];
                self.files[from.index()].now().read(at, &mut bytes);
                (Patch::cut(offset, &bytes), self.extended(record), false)
            }
            OpKind::Zero { .. } => (Patch::zeros(offset, len), self.extended(record), false),
            // A device may take a discard for the hint that it is.
            OpKind::Discard if !self.device.can_grow => (Vec::new(), Length::Keep, false),
            // Only whole sectors go away.
            OpKind::Discard => {
                let start = offset.next_multiple_of(SECTOR);
                let end = align_down(op.end(), SECTOR);
                (Patch::zeros(start, end.saturating_sub(start)), Length::Keep, false)
            }
            OpKind::Truncate => (Vec::new(), Length::Exactly(op.offset), true),
            OpKind::Allocate => (Vec::new(), Length::AtLeast(op.end()), true),
        };
        let OpOwner { request, ordinal } = record.owner;
        let name = OpName { request: ops.serial(request), ordinal };
        Some(Change::new(patches, length, own).of(name))
    }

    /// What a write does to its file's length: nothing, if it lies within.
    fn extended(&self, record: &OpRecord) -> Length {
        let end = record.op.end();
        let within = end <= self.files[record.file().index()].now().len();
        if within { Length::Keep } else { Length::AtLeast(end) }
    }

    /// Reads in flight that a change is about to alter may still see what was there.
    fn remember_for_reads(&mut self, file: usize, change: &Change) {
        let now = self.files[file].now();
        for read in &mut self.flying {
            if read.file != file || read.kind != OpKind::Read || read.early.is_some() {
                continue;
            }
            let (start, end) = (read.offset, read.end());
            let touched = change.patches.iter().any(|patch| {
                let at = patch.index * SECTOR;
                at + (patch.from as u64) < end && start < at + patch.to as u64
            });
            if touched {
                let mut bytes = vec![0; read.len as usize];
                now.read(start, &mut bytes);
                read.early = Some(bytes);
            }
        }
    }
}

fn input_hash(record: &OpRecord, mem: &Memory) -> u64 {
    let input = record.op.segs.as_slice()[0];
    let mut bytes = vec![0; input.len as usize];
    mem.gather(&record.op.segs, 0, &mut bytes);
    fixed_hash(bytes)
}

fn end_compute(
    work: Compute,
    flying: &Flying,
    outcome: Outcome,
    record: &OpRecord,
    mem: &mut Memory,
) -> Result<u64, Errno> {
    assert!(
        flying.input == input_hash(record, mem),
        "memory was used again while {work:?} was at work on it"
    );
    let &[input, output] = record.op.segs.as_slice() else { panic!("not computed: {record:?}") };
    let (input, output) = mem.input_and_output(input, output);
    output.fill(SCRIBBLE);
    if outcome.is_error() {
        return Err(Errno::IO);
    }
    (work.run)(input, output).map(|()| 0)
}

/// What is in the output of a computation that failed, or did not write all of it.
const SCRIBBLE: u8 = 0xd1;

impl Hash for SimBackend {
    /// What decides what can happen next: not the names of ops, which only record the past, but for
    /// the order that they give.
    fn hash<H: Hasher>(&self, h: &mut H) {
        (self.stalled, self.broken, self.mode).hash(h);
        self.damaged.hash(h);
        let mut order: Vec<&Flying> = self.flying.iter().collect();
        order.sort_unstable_by_key(|flying| flying.name);
        for flying in &order {
            let Flying { request, file, kind, offset, len, .. } = flying;
            (request, file, kind, offset, len).hash(h);
            (&flying.change, &flying.early).hash(h);
        }
        for (i, file) in self.files.iter().enumerate() {
            let mine = order.iter().filter(|flying| flying.file == i);
            let flushes: Vec<Mark> = mine.filter_map(|flying| flying.mark).collect();
            h.write_u64(file.state_hash(&flushes));
        }
    }
}

impl Backend for SimBackend {
    type File = SimFile;

    fn attach(&mut self, id: FileId, file: SimFile) -> io::Result<FileInfo> {
        let contents = file.contents();
        let len = contents.len();
        if let Some(place) = self.files.get_mut(id.index()) {
            assert!(self.detached.contains(&id.index()), "{id:?} is there already");
            self.detached.retain(|&file| file != id.index());
            *place = File::new(contents);
        } else {
            assert_eq!(id.index(), self.files.len(), "files are attached in order");
            self.files.push(File::new(contents));
        }
        Ok(FileInfo {
            request_align: self.device.request_align,
            memory_align: self.device.memory_align,
            hole_align: self.device.hole_align,
            len,
            can_grow: self.device.can_grow,
            knows_holes: false,
        })
    }

    fn detach(&mut self, id: FileId) -> Option<SimFile> {
        let is_used = self.flying.iter().any(|flying| flying.file == id.index());
        assert!(!is_used, "{id:?} is taken away with ops in flight");
        self.detached.push(id.index());
        Some(SimFile::new(self.files[id.index()].now().clone(), true))
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        while !self.stalled && self.flying.len() < self.device.depth {
            let Some((id, record)) = submission.peek() else { break };
            self.start(id, record, submission.ops, submission.mem);
            self.held += self.device.nanos_per_op;
            submission.take(1);
        }
        self.left_behind = !submission.is_empty();
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        if self.mode == Mode::Fifo && self.verdicts.is_empty() {
            let names: Vec<OpName> = self.in_flight().collect();
            self.verdicts.extend(names.into_iter().map(|name| (name, Outcome::Done)));
        }
        let failed = |op| Completion::new(op, Err(Errno::IO));
        harvest.done.extend(self.refused.drain(..).map(failed));
        while let Some((name, outcome)) = self.verdicts.pop_front() {
            let completion = self.end(name, outcome, harvest.ops, harvest.mem);
            harvest.done.push(completion);
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn wants_retry(&self) -> bool {
        self.left_behind && self.flying.is_empty()
    }

    /// Time stands still but while ops are handed over.
    fn clock(&self) -> Time {
        Time(self.held)
    }
}
