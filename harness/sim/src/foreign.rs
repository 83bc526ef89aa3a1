//! Crashes under a program that is not ours: what it wrote is known from a log of its device.
//!
//! The log is that of the kernel's dm-log-writes target; QEMU's `blklogwrites` writes the same. The
//! [disk](crate::disk) is the simulator's: a crash leaves what was flushed and any part of what was
//! written since, sector by sector. Whoever calls says of each image whether it is fine.
//!
//! # The log
//! Little-endian, in sectors of the log's own size, which places and lengths count in too.
//! - The first holds the number `0x6a736677736872`, the version (1) and how many entries there are, 8
//!   bytes each, and the size of a sector, 4 bytes.
//! - Each entry begins a sector: place, length, flags and the length of a text, 8 bytes each; the text of a mark follows at once.
//! - The data of a write is in the sectors behind it. A discard has none.
//!
//! # Memory
//! Only sectors that the log changes are kept, at most [`SECTORS_MAX`] of them, and as many versions that
//! are not flushed. The log is read twice: first what it changes, then with its data.
#![expect(clippy::disallowed_types, reason = "a set of hashes that is never iterated")]

use std::collections::HashSet;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};

use crate::disk::{Change, Contents, File, Length, Patch, SECTOR, Sector, Sites, fixed_hash};
use crate::explore::Picks;

/// So many sectors a log may change, and have written without a flush: 256 MiB.
pub const SECTORS_MAX: u64 = 1 << 19;
/// So many entries may wait for a flush.
const WRITES_MAX: usize = 1 << 16;
/// Images tried in one state, known ones among them.
const TRIED_MAX: u64 = 1 << 14;
/// So many failures are told in full, and so many writes of each.
const TOLD: usize = 100;
/// Sectors of a write that make one change: the model looks through a change from its start.
const PIECE: u64 = 128;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
const METADATA: u64 = 16;
const ENTRY_BYTES: u64 = 32;

/// A log that is being read.
#[derive(Debug)]
pub struct Log<R> {
    from: BufReader<R>,
    /// Its length in bytes.
    len: u64,
    sector_bytes: u64,
    entries: u64,
    /// Entries read.
    number: u64,
    /// Where the next one begins.
    next: u64,
}

#[derive(Debug)]
struct Entry {
    /// Counted from 0.
    number: u64,
    flags: u64,
    /// In sectors of 512 bytes.
    sector: u64,
    sectors: u64,
    mark: Option<String>,
}

impl Entry {
    fn is(&self, flag: u64) -> bool {
        self.flags & flag != 0
    }
}

impl<R: Read + Seek> Log<R> {
    /// Begins to read.
    ///
    /// # Errors
    ///
    /// It is no such log, or cannot be read.
    pub fn new(mut from: R) -> Result<Log<R>, String> {
        let len = from.seek(SeekFrom::End(0)).map_err(|error| error.to_string())?;
        let mut log = Log {
            from: BufReader::new(from),
            len,
            sector_bytes: 512,
            entries: 0,
            number: 0,
            next: 0,
        };
        log.rewind()?;
        Ok(log)
    }

    fn rewind(&mut self) -> Result<(), String> {
        let mut head = [0; 28];
        if self.len < head.len() as u64 {
            return Err("it is too short for a log of writes".into());
        }
        self.from.rewind().map_err(|error| error.to_string())?;
        self.bytes(&mut head)?;
        let (magic, version) = (word(&head, 0), word(&head, 1));
        if magic != MAGIC {
            return Err("it is no log of dm-log-writes".into());
        }
        if version != 1 {
            return Err(format!("version {version} of the log is not known"));
        }
        let sector_bytes = word(&head, 3);
        if !sector_bytes.is_power_of_two() || !(SECTOR..=8 << 20).contains(&sector_bytes) {
            return Err(format!("sectors of {sector_bytes} bytes make no sense"));
        }
        self.sector_bytes = sector_bytes;
        self.entries = word(&head, 2);
        (self.number, self.next) = (0, sector_bytes);
        Ok(())
    }

    fn bytes(&mut self, buf: &mut [u8]) -> Result<(), String> {
        self.from.read_exact(buf).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "the log ends too early".to_string(),
            _ => error.to_string(),
        })
    }

    /// The next entry; [`Log::bytes`] reads its data then.
    fn entry(&mut self) -> Result<Option<Entry>, String> {
        if self.number == self.entries {
            return Ok(None);
        }
        let number = self.number;
        self.entry_at(number).map(Some).map_err(|what| format!("entry {number}: {what}"))
    }

    fn entry_at(&mut self, number: u64) -> Result<Entry, String> {
        let data = self.next.checked_add(self.sector_bytes).filter(|&data| data <= self.len);
        let data = data.ok_or("the log ends too early")?;
        let here = self.from.stream_position().map_err(|error| error.to_string())?;
        // Stays in the buffer where it can.
        let by = self.next as i64 - here as i64;
        self.from.seek_relative(by).map_err(|error| error.to_string())?;
        let mut head = [0; ENTRY_BYTES as usize];
        self.bytes(&mut head)?;
        let [sector, sectors, flags, text] = [0, 1, 2, 3].map(|i| word(&head, i));
        if flags & !(FLUSH | FUA | DISCARD | MARK | METADATA) != 0 {
            return Err(format!("flags {flags:#x} are not known"));
        }
        let mut mark = None;
        if flags & MARK != 0 {
            if sectors != 0 {
                return Err("a mark that writes".into());
            }
            if text > self.sector_bytes - ENTRY_BYTES {
                return Err("the text of a mark is longer than its sector".into());
            }
            let mut bytes = vec![0; text as usize];
            self.bytes(&mut bytes)?;
            let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
            mark = Some(String::from_utf8_lossy(&bytes[..end]).into_owned());
        }
        let ratio = self.sector_bytes / SECTOR;
        let end = sector.checked_add(sectors).and_then(|end| end.checked_mul(self.sector_bytes));
        if end.is_none_or(|end| end > i64::MAX as u64) {
            return Err("it lies behind the end of any device".into());
        }
        self.next = data;
        if flags & DISCARD == 0 {
            self.next = data
                .checked_add(sectors * self.sector_bytes)
                .filter(|&end| end <= self.len)
                .ok_or("the log ends within its data")?;
            // A mark, and an entry of no length, may have left us within its sector.
            let here = self.from.stream_position().map_err(|error| error.to_string())?;
            let by = data as i64 - here as i64;
            self.from.seek_relative(by).map_err(|error| error.to_string())?;
        }
        self.number += 1;
        Ok(Entry { number, flags, sector: sector * ratio, sectors: sectors * ratio, mark })
    }
}

/// The `index`-th number of a head; one that is cut off has zeros for what is missing.
fn word(head: &[u8], index: usize) -> u64 {
    let from = &head[index * 8..head.len().min(index * 8 + 8)];
    let mut bytes = [0; 8];
    bytes[..from.len()].copy_from_slice(from);
    u64::from_le_bytes(bytes)
}

/// What the device held before: an image, or zeros.
#[derive(Debug)]
pub struct Device<B> {
    from: Option<B>,
    /// Bytes.
    len: u64,
    /// Where there is something else than zeros: sectors from, to; ascending, apart.
    data: Vec<(u64, u64)>,
}

/// The image is looked through in pieces of so many bytes.
const LOOKED: usize = 64 << 10;

impl<B: Read + Seek> Device<B> {
    /// Zeros, as many as needed.
    pub fn zeros() -> Device<B> {
        Device { from: None, len: 0, data: Vec::new() }
    }

    /// This image, which is looked through for zeros.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn of(mut from: B) -> io::Result<Device<B>> {
        from.rewind()?;
        let (mut at, mut data, mut buf) = (0, Vec::<(u64, u64)>::new(), vec![0; LOOKED]);
        loop {
            let mut filled = 0;
            while filled < LOOKED {
                match from.read(&mut buf[filled..]) {
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            if buf[..filled].iter().any(|&byte| byte != 0) {
                let (start, end) = (at / SECTOR, (at + filled as u64).div_ceil(SECTOR));
                match data.last_mut() {
                    Some(last) if last.1 == start => last.1 = end,
                    _ => data.push((start, end)),
                }
            }
            at += filled as u64;
            if filled < LOOKED {
                return Ok(Device { from: Some(from), len: at, data });
            }
        }
    }

    fn has_data(&self, sector: u64) -> bool {
        let next = self.data.partition_point(|&(_, end)| end <= sector);
        self.data.get(next).is_some_and(|&(start, _)| start <= sector)
    }

    /// A sector; zeros behind the end.
    fn sector(&mut self, index: u64) -> io::Result<Sector> {
        if !self.has_data(index) {
            return Ok(Sector::ZEROS);
        }
        let Some(from) = &mut self.from else { return Ok(Sector::ZEROS) };
        from.seek(SeekFrom::Start(index * SECTOR))?;
        let mut bytes = Vec::new();
        from.take(SECTOR).read_to_end(&mut bytes)?;
        Ok(Sector::from_bytes(&bytes))
    }
}

/// When a crash is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Every {
    /// While each write is in flight.
    Write,
    /// Before something becomes stable, and at the end.
    Flush,
}

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// When.
    pub every: Every,
    /// So many distinct images at most.
    pub images: u64,
    /// Bytes of the device. If not said, as many as it held before, or up to the last that is written.
    pub size: Option<u64>,
}

/// What was done and found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report<T> {
    /// Entries of the log.
    pub entries: u64,
    /// Writes and discards among them.
    pub writes: u64,
    /// Distinct states in which a crash was tried.
    pub states: u64,
    /// Those of them with so many images that a selection was tried.
    pub selected: u64,
    /// Those of which the limit of images, or of time, cut off some.
    pub cut_off: u64,
    /// Distinct images, each looked at once.
    pub images: u64,
    /// How many are wrong.
    pub wrong: u64,
    /// The first of these.
    pub failures: Vec<Failure<T>>,
}

/// An image that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure<T> {
    /// The last entry that had begun.
    pub entry: u64,
    /// The last mark before it.
    pub mark: Option<String>,
    /// The first of the writes that no flush covered, in order.
    pub writes: Vec<Unflushed>,
    /// How many more there were.
    pub more: u64,
    /// What is wrong, in the words of whoever looked.
    pub what: T,
}

/// A write that no flush covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unflushed {
    /// Its entry.
    pub entry: u64,
    /// Where, in sectors of 512 bytes.
    pub sector: u64,
    /// How many sectors.
    pub sectors: u64,
    /// A discard?
    pub discard: bool,
    /// Of its sectors, so many count: those that differ from crash to crash.
    pub counted: u64,
    /// So many of these hold what it wrote.
    pub there: u64,
}

/// What a crash left.
#[derive(Debug)]
pub struct CrashImage<'a, B> {
    device: &'a mut Device<B>,
    len: u64,
    places: &'a [u64],
    contents: &'a Contents,
}

impl<B: Read + Seek> CrashImage<'_, B> {
    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// No bytes?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Writes it into a file that holds zeros, as many as it is long; zeros are left out.
    ///
    /// # Errors
    ///
    /// It cannot be written, or what was there before not be read.
    pub fn write_to(&mut self, to: &mut (impl Write + Seek)) -> io::Result<()> {
        if let Some(from) = &mut self.device.from {
            for &(start, end) in &self.device.data {
                let (start, end) = (start * SECTOR, (end * SECTOR).min(self.device.len));
                from.seek(SeekFrom::Start(start))?;
                to.seek(SeekFrom::Start(start))?;
                io::copy(&mut from.take(end - start), to)?;
            }
        }
        let mut at = None;
        for (slot, &place) in self.places.iter().enumerate() {
            let sector = self.contents.sector(slot as u64);
            if sector == Sector::ZEROS && !self.device.has_data(place) {
                continue;
            }
            let start = place * SECTOR;
            if at != Some(start) {
                to.seek(SeekFrom::Start(start))?;
            }
            let bytes = SECTOR.min(self.len - start) as usize;
            to.write_all(&sector.bytes()[..bytes])?;
            at = Some(start + SECTOR);
        }
        to.flush()
    }
}

/// Sectors as a list of pieces, which is put in order when it has grown.
#[derive(Debug, Default)]
struct Pieces {
    list: Vec<(u64, u64)>,
    tidy: usize,
}

impl Pieces {
    fn add(&mut self, start: u64, end: u64) -> Result<(), String> {
        self.list.push((start, end));
        if self.list.len() < 2 * self.tidy + 1024 {
            return Ok(());
        }
        self.tidy();
        match self.list.len() as u64 > SECTORS_MAX {
            true => Err(too_many()),
            false => Ok(()),
        }
    }

    fn tidy(&mut self) {
        self.list.sort_unstable();
        self.list.dedup_by(|next, last| {
            let joins = next.0 <= last.1;
            if joins {
                last.1 = last.1.max(next.1);
            }
            joins
        });
        self.tidy = self.list.len();
    }

    fn total(&self) -> u64 {
        self.list.iter().fold(0, |sum, &(start, end)| sum.saturating_add(end - start))
    }
}

fn too_many() -> String {
    format!("it changes more than {} MiB", (SECTORS_MAX * SECTOR) >> 20)
}

/// What a log changes, and how often a crash will be tried.
#[derive(Debug)]
struct Survey {
    places: Vec<u64>,
    len: u64,
    writes: u64,
    looks: u64,
}

fn survey<R: Read + Seek, B: Read + Seek>(
    log: &mut Log<R>,
    device: &Device<B>,
    limits: &Limits,
) -> Result<Survey, String> {
    let (mut written, mut discarded) = (Pieces::default(), Pieces::default());
    let (mut writes, mut looks, mut end, mut waiting) = (0, 1, 0, false);
    while let Some(entry) = log.entry()? {
        if limits.every == Every::Flush && entry.is(FLUSH) {
            looks += u64::from(std::mem::take(&mut waiting));
        }
        if entry.sectors == 0 {
            continue;
        }
        writes += 1;
        looks += u64::from(limits.every == Every::Write || entry.is(FUA));
        waiting |= !entry.is(FUA);
        let (start, stop) = (entry.sector, entry.sector + entry.sectors);
        end = stop.max(end);
        if limits.size.is_some_and(|size| stop * SECTOR > size.next_multiple_of(SECTOR)) {
            return Err(format!("entry {}: it lies behind the device's end", entry.number));
        }
        if entry.is(DISCARD) { &mut discarded } else { &mut written }.add(start, stop)?;
    }
    discarded.tidy();
    // A discard of what is zeros anyway changes nothing.
    for &(start, end) in &discarded.list {
        let first = device.data.partition_point(|&(_, stop)| stop <= start);
        for &(from, to) in device.data[first..].iter().take_while(|&&(from, _)| from < end) {
            written.add(from.max(start), to.min(end))?;
        }
    }
    written.tidy();
    if written.total() > SECTORS_MAX {
        return Err(too_many());
    }
    let places = written.list.iter().flat_map(|&(start, end)| start..end).collect();
    let len = limits.size.unwrap_or(device.len.max(end * SECTOR));
    Ok(Survey { places, len, writes, looks })
}

/// A write that waits for a flush.
#[derive(Clone, Debug)]
struct Waiting {
    told: Unflushed,
    changes: Vec<Change>,
}

impl Waiting {
    fn patches(&self) -> impl Iterator<Item = &Patch> {
        self.changes.iter().flat_map(|change| change.patches.iter())
    }
}

/// Crashes the device in each state of a log. `check` answers what is wrong with an image, if
/// something is.
///
/// # Errors
///
/// The log is damaged or too large, or `check` could not do its work.
pub fn crash<R: Read + Seek, B: Read + Seek, T>(
    log: &mut Log<R>,
    device: &mut Device<B>,
    limits: &Limits,
    check: impl FnMut(&mut CrashImage<'_, B>) -> Result<Option<T>, String>,
) -> Result<Report<T>, String> {
    log.rewind()?;
    let survey = survey(log, device, limits)?;
    if device.len > survey.len {
        return Err(format!("the device's {} bytes are fewer than it held before", survey.len));
    }
    let mut contents = Contents::default();
    contents.set_len(survey.places.len() as u64 * SECTOR);
    for (slot, &place) in survey.places.iter().enumerate() {
        let sector = device.sector(place).map_err(|error| format!("what was before: {error}"))?;
        if sector != Sector::ZEROS {
            contents.write(slot as u64 * SECTOR, sector.bytes());
        }
    }
    let report = Report {
        entries: log.entries,
        writes: survey.writes,
        states: 0,
        selected: 0,
        cut_off: 0,
        images: 0,
        wrong: 0,
        failures: Vec::new(),
    };
    let mut crashes = Crashes {
        device,
        places: &survey.places,
        len: survey.len,
        images_max: limits.images,
        looks: survey.looks,
        states: HashSet::new(),
        seen: HashSet::new(),
        entry: 0,
        mark: None,
        report,
        check,
    };
    log.rewind()?;
    let mut file = File::new(contents.with_fixed_len());
    let mut waiting: Vec<Waiting> = Vec::new();
    let mut unflushed = 0;
    let of_flush = limits.every == Every::Flush;
    while let Some(entry) = log.entry()? {
        if entry.is(FLUSH) {
            if of_flush && !waiting.is_empty() {
                crashes.look(&file, &waiting)?;
            }
            file.flushed(file.mark());
            waiting.clear();
            unflushed = 0;
        }
        crashes.entry = entry.number;
        if let Some(mark) = entry.mark {
            crashes.mark = Some(mark);
        }
        if entry.sectors == 0 {
            continue;
        }
        let told = Unflushed {
            entry: entry.number,
            sector: entry.sector,
            sectors: entry.sectors,
            discard: entry.flags & DISCARD != 0,
            counted: 0,
            there: 0,
        };
        let fail = |what: String| format!("entry {}: {what}", entry.number);
        let first = survey.places.partition_point(|&place| place < entry.sector) as u64;
        let end = entry.sector + entry.sectors;
        let last = survey.places.partition_point(|&place| place < end) as u64;
        unflushed += last - first;
        if unflushed > SECTORS_MAX || waiting.len() >= WRITES_MAX {
            return Err(fail("too much was written without a flush".into()));
        }
        let mut changes = Vec::new();
        let mut bytes = vec![0; (PIECE * SECTOR) as usize];
        let mut at = first;
        while at < last {
            let sectors = PIECE.min(last - at);
            let patches = if told.discard {
                Patch::zeros(at * SECTOR, sectors * SECTOR)
            } else {
                let bytes = &mut bytes[..(sectors * SECTOR) as usize];
                log.bytes(bytes).map_err(fail)?;
                Patch::cut(at * SECTOR, bytes)
            };
            changes.push(Change::new(patches, Length::Keep, true));
            at += sectors;
        }
        let fua = entry.flags & FUA != 0;
        let mut during = file.clone();
        changes.iter().for_each(|change| during.complete(change.clone(), false));
        waiting.push(Waiting { told, changes });
        if fua || !of_flush {
            crashes.look(&during, &waiting)?;
        }
        if !fua {
            file = during;
            continue;
        }
        let written = waiting.pop().expect("it was just put there");
        written.changes.into_iter().for_each(|change| file.complete(change, true));
        unflushed = 0;
        for older in &mut waiting {
            for change in &mut older.changes {
                let left = change.patches.iter().filter(|p| !(first..last).contains(&p.index));
                let left: Vec<Patch> = left.cloned().collect();
                if left.len() < change.patches.len() {
                    *change = Change::new(left, Length::Keep, true);
                }
                unflushed += change.patches.len() as u64;
            }
        }
        waiting.retain(|older| older.patches().next().is_some());
    }
    crashes.look(&file, &waiting)?;
    Ok(crashes.report)
}

struct Crashes<'a, B, T, C> {
    device: &'a mut Device<B>,
    places: &'a [u64],
    len: u64,
    images_max: u64,
    /// So often a crash is still to be tried.
    looks: u64,
    states: HashSet<u64>,
    seen: HashSet<u64>,
    entry: u64,
    mark: Option<String>,
    report: Report<T>,
    check: C,
}

/// Why no more images of a state are looked at.
enum Halt {
    Enough,
    Failed(String),
}

impl<B, T, C> Crashes<'_, B, T, C>
where
    B: Read + Seek,
    C: FnMut(&mut CrashImage<'_, B>) -> Result<Option<T>, String>,
{
    /// Crashes the device in every way, or in a selection. What is left of the limit is shared by the
    /// states to come.
    fn look(&mut self, file: &File, waiting: &[Waiting]) -> Result<(), String> {
        let share = (self.images_max - self.report.images).div_ceil(self.looks.max(1));
        self.looks = self.looks.saturating_sub(1);
        let sites = file.crash_sites(std::iter::empty());
        let key = fixed_hash(&sites);
        if !self.states.insert(key) {
            return Ok(());
        }
        self.report.states += 1;
        let end = self.report.images + share;
        match self.try_images(&sites, waiting, key, end) {
            Ok(()) => Ok(()),
            Err(Halt::Enough) => {
                self.report.cut_off += 1;
                Ok(())
            }
            Err(Halt::Failed(what)) => Err(what),
        }
    }

    fn try_images(
        &mut self,
        sites: &Sites,
        waiting: &[Waiting],
        key: u64,
        end: u64,
    ) -> Result<(), Halt> {
        let sums = sites.sums();
        let mut tried = 0;
        let mut one = |this: &mut Self, options: &[usize]| {
            tried += 1;
            let is_new = !this.seen.contains(&sums.of(options, 0));
            if is_new && this.report.images >= end || tried > TRIED_MAX {
                return Err(Halt::Enough);
            }
            if is_new {
                this.seen.insert(sums.of(options, 0));
                let contents = sites.image(|site| options[site], 0);
                this.check(&contents, sites, waiting).map_err(Halt::Failed)?;
            }
            Ok(())
        };
        let picks = Picks::new(std::slice::from_ref(sites));
        if picks.are_many() {
            self.report.selected += 1;
            // Writes as wholes tell most: all up to one, one alone, all but one.
            for i in 0..waiting.len() {
                one(self, &options_with(sites, waiting, |j| j <= i))?;
                one(self, &options_with(sites, waiting, |j| j == i))?;
                one(self, &options_with(sites, waiting, |j| j != i))?;
            }
        }
        picks.each(key, |picked| one(self, &picked[..sites.sites.len()]))
    }

    fn check(
        &mut self,
        contents: &Contents,
        sites: &Sites,
        waiting: &[Waiting],
    ) -> Result<(), String> {
        self.report.images += 1;
        let (len, places) = (self.len, self.places);
        let mut image = CrashImage { device: self.device, len, places, contents };
        let what =
            (self.check)(&mut image).map_err(|what| format!("entry {}: {what}", self.entry))?;
        let Some(what) = what else { return Ok(()) };
        self.report.wrong += 1;
        if self.report.failures.len() < TOLD {
            let told = |write: &Waiting| {
                let differs = |patch: &&Patch| site_of(sites, patch).is_some();
                let holds = |patch: &&Patch| contents.sector(patch.index) == patch.data;
                let there = write.patches().filter(differs).filter(holds).count() as u64;
                let counted = write.patches().filter(differs).count() as u64;
                Unflushed { counted, there, ..write.told }
            };
            self.report.failures.push(Failure {
                entry: self.entry,
                mark: self.mark.clone(),
                writes: waiting.iter().take(TOLD).map(told).collect(),
                more: waiting.len().saturating_sub(TOLD) as u64,
                what,
            });
        }
        Ok(())
    }
}

/// Where the choice of a patch's sector stands; `None`: it is the same after every crash.
fn site_of(sites: &Sites, patch: &Patch) -> Option<usize> {
    sites.sites.binary_search_by_key(&patch.index, |site| site.options[0][0].0).ok()
}

/// The options that show these writes and no others.
fn options_with(sites: &Sites, waiting: &[Waiting], chosen: impl Fn(usize) -> bool) -> Vec<usize> {
    let mut options = vec![0; sites.sites.len()];
    for (_, write) in waiting.iter().enumerate().filter(|(i, _)| chosen(*i)) {
        for patch in write.patches() {
            let Some(at) = site_of(sites, patch) else { continue };
            let holds = |option: &Vec<(u64, Sector)>| option[0].1 == patch.data;
            options[at] = sites.sites[at].options.iter().rposition(holds).unwrap_or(0);
        }
    }
    options
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use quickcheck::quickcheck;

    use super::*;

    const ALL: Limits = Limits { every: Every::Write, images: 1 << 20, size: None };

    /// A log with sectors of 512 bytes: place, flags, data (of a discard: its length).
    fn log(entries: &[(u64, u64, &[u8])]) -> Vec<u8> {
        let mut log = [MAGIC, 1, entries.len() as u64, 512].map(u64::to_le_bytes).concat();
        log.resize(512, 0);
        for &(sector, flags, data) in entries {
            let (sectors, text) = match flags & MARK {
                0 => (data.len() as u64 / 512, 0),
                _ => (0, data.len() as u64),
            };
            log.extend([sector, sectors, flags, text].map(u64::to_le_bytes).concat());
            if flags & DISCARD == 0 {
                log.extend(data);
            }
            log.resize(log.len().next_multiple_of(512), 0);
        }
        log
    }

    type Seen = (Report<()>, Vec<Vec<u8>>);

    fn images(log: &[u8], base: &[u8], limits: &Limits) -> Result<Seen, String> {
        let mut seen = Vec::new();
        let mut log = Log::new(Cursor::new(log))?;
        let mut device = Device::of(Cursor::new(base.to_vec())).expect("it is in memory");
        let report = crash(&mut log, &mut device, limits, |image| {
            let mut bytes = Cursor::new(vec![0; image.len() as usize]);
            image.write_to(&mut bytes).expect("it is in memory");
            // A sector's first byte stands for it.
            seen.push(bytes.into_inner().chunks(512).map(|sector| sector[0]).collect());
            Ok(None)
        })?;
        seen.sort();
        Ok((report, seen))
    }

    fn all(log: &[u8]) -> Vec<Vec<u8>> {
        images(log, &[], &ALL).expect("it is sound").1
    }

    const fn sector(byte: u8) -> [u8; 512] {
        [byte; 512]
    }

    #[test]
    fn any_part_of_what_is_not_flushed_is_there_and_all_that_is() {
        let (one, two) = (sector(1), sector(2));
        let without = [(0, 0, &one[..]), (2, 0, &two[..])];
        assert_eq!(all(&log(&without)), [[0, 0, 0], [0, 0, 2], [1, 0, 0], [1, 0, 2]]);
        let flushed = [(0, 0, &one[..]), (0, FLUSH, &[]), (2, 0, &two[..])];
        assert_eq!(all(&log(&flushed)), [[0, 0, 0], [1, 0, 0], [1, 0, 2]]);
        // The flush goes before the write that carries it.
        let carried = [(0, 0, &one[..]), (2, FLUSH | METADATA, &two[..])];
        assert_eq!(all(&log(&carried)), [[0, 0, 0], [1, 0, 0], [1, 0, 2]]);
    }

    #[test]
    fn a_write_tears_at_every_sector() {
        let both = [sector(1), sector(2)].concat();
        assert_eq!(all(&log(&[(0, 0, &both)])), [[0, 0], [0, 2], [1, 0], [1, 2]]);
        // Also one that is to be stable when it ends; then it is.
        let then = log(&[(0, FUA, &both), (2, 0, &sector(3))]);
        let torn = [[0, 0, 0], [0, 2, 0], [1, 0, 0], [1, 2, 0], [1, 2, 3]];
        assert_eq!(all(&then), torn);
    }

    #[test]
    fn a_write_through_does_not_wait_and_takes_nobody_along() {
        let entries = log(&[(0, 0, &sector(1)), (1, FUA, &sector(2)), (2, 0, &sector(3))]);
        let seen = all(&entries);
        for image in [[0, 0, 0], [1, 0, 0], [0, 2, 0], [1, 2, 0], [0, 2, 3], [1, 2, 3]] {
            assert!(seen.contains(&image.to_vec()), "{image:?}");
        }
        assert_eq!(seen.len(), 6);
        // The same without a look at each write: nothing is missed but what is in flight at the end.
        let rare = images(&entries, &[], &Limits { every: Every::Flush, ..ALL });
        assert_eq!(rare.expect("it is sound").1, seen);
    }

    #[test]
    fn a_discard_is_a_write_of_zeros_however_long() {
        let base = [sector(7), sector(8), sector(0), sector(9)].concat();
        let mut entries = log(&[(1, DISCARD, &[0; 512])]);
        // Up to two exbibytes; only what holds something counts.
        entries[512 + 8..512 + 16].copy_from_slice(&(1_u64 << 52).to_le_bytes());
        let limits = Limits { size: Some(2048), ..ALL };
        let refused = images(&entries, &base, &limits).expect_err("it is too long");
        assert!(refused.contains("behind the device's end"), "{refused}");
        let mut log = Log::new(Cursor::new(&entries)).expect("a log");
        let mut device = Device::of(Cursor::new(base)).expect("a device");
        let report = crash(&mut log, &mut device, &ALL, |image| {
            assert_eq!(image.len(), ((1 << 52) + 1) * 512);
            Ok(None::<()>)
        });
        assert_eq!(report.expect("it is sound").images, 4, "two sectors, each old or gone");
    }

    #[test]
    fn of_many_images_whole_writes_are_tried_first_and_all_states_have_a_share() {
        let data = vec![5; 512 * 40];
        let entries = log(&[(0, 0, &data), (64, 0, &data), (0, FLUSH, &[]), (128, 0, &sector(6))]);
        let (report, seen) = images(&entries, &[], &Limits { images: 20, ..ALL }).expect("sound");
        assert_eq!((report.selected, report.cut_off), (2, 2));
        assert!(report.images <= 20, "{}", report.images);
        let wanted = |first: u8, second: u8, last: u8| {
            seen.iter().any(|image| {
                image[..40].iter().all(|&byte| byte == first)
                    && image[64..104].iter().all(|&byte| byte == second)
                    && image[128] == last
            })
        };
        assert!(wanted(5, 0, 0) && wanted(0, 5, 0) && wanted(5, 5, 0) && wanted(5, 5, 6));
    }

    #[test]
    fn a_failure_tells_what_was_there_and_the_last_mark() {
        let two = [sector(1), sector(2)].concat();
        let entries =
            log(&[(0, MARK, b"begins"), (0, 0, &two), (4, 0, &sector(3)), (0, MARK, b"ends")]);
        let mut log = Log::new(Cursor::new(&entries)).expect("a log");
        let report = crash(&mut log, &mut Device::<Cursor<Vec<u8>>>::zeros(), &ALL, |image| {
            let mut bytes = Cursor::new(vec![0; image.len() as usize]);
            image.write_to(&mut bytes).expect("it is in memory");
            let bytes = bytes.into_inner();
            Ok((bytes[0] == 0 && bytes[512] == 2 && bytes[2048] == 3).then_some("torn"))
        });
        let report = report.expect("it is sound");
        assert_eq!((report.wrong, report.failures.len()), (1, 1));
        let failure = &report.failures[0];
        assert_eq!((failure.entry, failure.mark.as_deref()), (2, Some("begins")));
        let there: Vec<_> = failure.writes.iter().map(|w| (w.entry, w.there, w.counted)).collect();
        assert_eq!(there, [(1, 1, 2), (2, 1, 1)]);
    }

    #[test]
    fn damaged_logs_are_refused() {
        let sound = log(&[(0, 0, &sector(1)), (3, FLUSH, &[]), (0, MARK, b"m")]);
        let with = |at: usize, value: u64| {
            let mut log = sound.clone();
            log[at..at + 8].copy_from_slice(&value.to_le_bytes());
            images(&log, &[], &ALL).map(|_| ()).expect_err("it is damaged")
        };
        for (at, value, said) in [
            (0, 1, "no log"),
            (8, 2, "version 2"),
            (16, 4, "entry 3: the log ends too early"),
            (16, u64::MAX, "entry 3: the log ends too early"),
            (24, 511, "511 bytes"),
            (24, 1 << 31, "make no sense"),
            (512, u64::MAX, "entry 0: it lies behind"),
            (520, u64::MAX, "entry 0: it lies behind"),
            (520, 1 << 40, "entry 0: the log ends within"),
            (528, 32, "entry 0: flags 0x20"),
            (528, MARK, "entry 0: a mark that writes"),
            (512 * 4 + 24, 481, "entry 2: the text"),
        ] {
            let what = with(at, value);
            assert!(what.contains(said), "{at}, {value}: {what}");
        }
        for len in 0..sound.len() - 512 {
            assert!(images(&sound[..len], &[], &ALL).is_err(), "{len}");
        }
    }

    #[test]
    fn a_log_of_a_device_that_changes_too_much_is_refused() {
        // All the data is there: a file with a hole would do.
        let mut head = log(&[(0, 0, &[])]);
        head[520..528].copy_from_slice(&(SECTORS_MAX + 1).to_le_bytes());
        head.resize(1024 + (SECTORS_MAX as usize + 1) * 512, 0);
        let what = images(&head, &[], &ALL).expect_err("it is too much");
        assert!(what.contains("more than 256 MiB"), "{what}");
    }

    quickcheck! {
        fn a_changed_log_never_panics(changes: Vec<(u16, u8)>) -> bool {
            let mut entries = log(&[
                (0, 0, &sector(1)),
                (1, FUA, &sector(2)),
                (0, MARK, b"mark"),
                (3, DISCARD, &sector(0)),
                (0, FLUSH, &[]),
                (2, FLUSH | FUA | METADATA, &sector(3)),
            ]);
            // Heads rather than data.
            let count = entries.len() / 512;
            for (at, byte) in changes {
                let at = usize::from(at);
                entries[at % count * 512 + at / count % 32] = byte;
            }
            let limits = Limits { images: 50, size: Some(1 << 20), ..ALL };
            let _ = images(&entries, &[], &limits);
            true
        }
    }
}
