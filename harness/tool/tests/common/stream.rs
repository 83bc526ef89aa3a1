//! A reader of VMDK streams (streamOptimized), written from VMware's *Virtual Disk Format 5.0* and from
//! what open-vmdk, VMware's own program, takes: front to back, as an importer sees a stream that comes
//! over a network, and then by its directory, as a program that opens the file. It shares no code with
//! the one that writes them.
//!
//! A rule that is not kept is noted by its name, and reading goes on where that can be: so it can be
//! said which rules a program does not keep.

use std::collections::{BTreeMap, BTreeSet};

use flate2::{Decompress, FlushDecompress, Status};

const SECTOR: usize = 512;
const AT_END: u64 = u64::MAX;

/// What was found. All places are sectors.
#[derive(Debug, Default)]
pub struct Stream {
    /// The rules that are not kept, each once.
    pub broken: BTreeSet<&'static str>,
    /// What the grains hold, in whole sectors up to the capacity.
    pub disk: Vec<u8>,
    /// Where the marker of each grain is, in the order of the file: the grain's first sector, and that.
    pub grains: Vec<(u64, usize)>,
    /// Where each table is, behind its marker if it has one.
    pub tables: Vec<usize>,
    /// Where the directory is.
    pub directory: usize,
}

impl Stream {
    /// Notes a rule that is not kept.
    fn rule(&mut self, name: &'static str, is_kept: bool) {
        if !is_kept {
            self.broken.insert(name);
        }
    }

    /// Do the grains lie in the order of the disk?
    pub fn is_ascending(&self) -> bool {
        self.grains.windows(2).all(|pair| pair[0].0 < pair[1].0)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// `len` sectors from sector `at` on.
fn sectors(file: &[u8], at: usize, len: usize) -> Option<&[u8]> {
    file.get(at.checked_mul(SECTOR)?..at.checked_add(len)?.checked_mul(SECTOR)?)
}

/// What the rest needs of a header.
struct Header {
    capacity: u64,
    grain: u64,
    entries: u64,
    directory: u64,
    overhead: u64,
    descriptor: (u64, u64),
}

impl Header {
    fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.grain * self.entries)
    }
}

/// A header, or a footer. `None`: nothing can be read by it.
fn header(bytes: &[u8], found: &mut Stream) -> Option<Header> {
    let flags = u32_at(bytes, 8);
    let (capacity, grain) = (u64_at(bytes, 12), u64_at(bytes, 20));
    let (descriptor, overhead) = ((u64_at(bytes, 28), u64_at(bytes, 36)), u64_at(bytes, 64));
    let entries = u64::from(u32_at(bytes, 44));
    found.rule("magic number", bytes.starts_with(b"KDMV"));
    found.rule("version 3", u32_at(bytes, 4) == 3);
    found.rule("flag for the line ends", flags & 1 != 0);
    found.rule("no redundant directory", flags & 2 == 0 && u64_at(bytes, 48) == 0);
    found.rule("flag for compression", flags & 1 << 16 != 0);
    found.rule("flag for markers", flags & 1 << 17 != 0);
    found.rule("no unknown flags", flags & !(7 | 3 << 16) == 0);
    // VMware's programs write no other grains, and take none that are larger.
    let is_grain = grain.is_power_of_two() && grain > 8 && grain <= 128;
    found.rule("grain size", is_grain);
    // No other number is taken by VMware's library for disks.
    found.rule("512 entries in a table", entries == 512);
    found.rule("capacity", capacity < 1 << 40);
    let descriptor_end = descriptor.0.saturating_add(descriptor.1);
    found.rule("place of the descriptor", descriptor.0 >= 1 && descriptor.1 >= 1);
    found.rule("descriptor in front of the grains", descriptor_end <= overhead);
    found.rule("closed cleanly", bytes[72] == 0);
    found.rule("line end characters", bytes[73..77] == *b"\n \r\n");
    found.rule("deflate", u16_at(bytes, 77) == 1);
    found.rule("zeros behind the header", is_zero(&bytes[79..]));
    let directory = u64_at(bytes, 56);
    let header = Header { capacity, grain, entries, directory, overhead, descriptor };
    let can_be = is_grain && entries == 512 && capacity < 1 << 40;
    can_be.then_some(header)
}

/// The text of the descriptor.
fn descriptor(bytes: &[u8], capacity: u64, found: &mut Stream) {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    found.rule("zeros behind the descriptor", is_zero(&bytes[end..]));
    let text = String::from_utf8_lossy(&bytes[..end]);
    found.rule("first line of the descriptor", text.starts_with("# Disk DescriptorFile\n"));
    let mut values = BTreeMap::new();
    let mut extents = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line.starts_with('#') {
            continue;
        }
        match line.split_once('=') {
            Some((key, value)) => {
                let is_new = values.insert(key.trim(), value.trim().trim_matches('"')).is_none();
                found.rule("each key of the descriptor once", is_new);
            }
            None => extents.push(line),
        }
    }
    let value = |key: &str| values.get(key).copied().unwrap_or("");
    let number = |key: &str| value(key).parse::<u64>().ok();
    found.rule("version of the descriptor", value("version") == "1");
    let id = value("CID");
    // Some leave out zeros in front.
    let id = (1..=8).contains(&id.len()).then(|| u32::from_str_radix(id, 16).ok()).flatten();
    // These two stand for no parent, and for an empty disk.
    found.rule("content id", id.is_some_and(|id| id < u32::MAX - 1));
    found.rule("no parent", value("parentCID") == "ffffffff");
    found.rule("type in the descriptor", value("createType") == "streamOptimized");
    let words: Vec<&str> = extents.iter().flat_map(|line| line.splitn(4, ' ')).collect();
    let is_extent = match words[..] {
        ["RW" | "RDONLY", len, "SPARSE", name] => {
            let inside = name.strip_prefix('"').and_then(|name| name.strip_suffix('"'));
            let is_name = inside.is_some_and(|name| !name.is_empty() && !name.contains(['"', '/']));
            len.parse() == Ok(capacity) && is_name
        }
        _ => false,
    };
    found.rule("one extent, as long as the capacity", is_extent);
    let adapter = ["ide", "buslogic", "lsilogic", "legacyESX"].contains(&value("ddb.adapterType"));
    found.rule("adapter", adapter);
    found.rule("version of the hardware", number("ddb.virtualHWVersion").is_some_and(|v| v > 0));
    let geometry = ["cylinders", "heads", "sectors"];
    let is_geometry = match geometry.map(|key| number(&format!("ddb.geometry.{key}"))) {
        [Some(cylinders), Some(heads @ 1..=255), Some(sectors @ 1..=63)] => {
            // All that are whole; a disk of less than one has none.
            cylinders == capacity / (heads * sectors)
        }
        _ => false,
    };
    found.rule("geometry", is_geometry);
}

/// Inflates the grain that begins at byte `from` of the file and has `size` bytes.
fn inflate(file: &[u8], from: usize, size: usize, grain: usize) -> Option<Vec<u8>> {
    let data = file.get(from..from.checked_add(size)?)?;
    let mut bytes = vec![0; grain + 1];
    let mut inflater = Decompress::new(true);
    let end = inflater.decompress(data, &mut bytes, FlushDecompress::Finish);
    // The whole of what the marker says, and nothing more.
    let is_end = matches!(end, Ok(Status::StreamEnd));
    let is_whole = is_end && inflater.total_in() == size as u64;
    bytes.truncate(inflater.total_out() as usize);
    is_whole.then_some(bytes)
}

/// Reads a stream. `Err`: why it cannot be read any further.
pub fn read(file: &[u8]) -> Result<Stream, String> {
    let mut found = Stream::default();
    found.rule("whole sectors", file.len().is_multiple_of(SECTOR));
    let first = sectors(file, 0, 1).ok_or("no header")?;
    let Some(header) = header(first, &mut found) else {
        return Err(format!("the header cannot be: {:?}", found.broken));
    };
    let (text_at, text_len) = header.descriptor;
    let text = sectors(file, text_at as usize, text_len as usize).ok_or("no descriptor")?;
    descriptor(text, header.capacity, &mut found);
    found.disk = vec![0; header.capacity as usize * SECTOR];
    let front = Front { file, header: &header, found: &mut found }.read();
    let read = front.and_then(|tables| by_directory(file, &header, tables, &mut found));
    match read {
        Ok(()) => Ok(found),
        Err(why) => Err(format!("{why}; before that: {:?}", found.broken)),
    }
}

/// Front to back.
struct Front<'a> {
    file: &'a [u8],
    header: &'a Header,
    found: &'a mut Stream,
}

impl Front<'_> {
    /// Answers where a marker says that there is a table.
    fn read(&mut self) -> Result<Vec<usize>, String> {
        let Header { entries, directory, overhead, .. } = *self.header;
        let table_len = entries as usize * 4 / SECTOR;
        let directory_len = (self.header.tables() as usize * 4).div_ceil(SECTOR);
        let (mut tables, mut has_footer, mut has_directory) = (Vec::new(), false, false);
        let end = self.file.len() / SECTOR;
        let mut at = overhead as usize;
        loop {
            let Some(sector) = sectors(self.file, at, 1) else {
                self.found.rule("end-of-stream marker", false);
                break;
            };
            let (value, size) = (u64_at(sector, 0), u32_at(sector, 8) as usize);
            if size > 0 {
                self.found.rule("grains in front of the directory", !has_directory);
                at = self.grain(at, value, size)?;
                continue;
            }
            self.found.rule("zeros behind a marker", is_zero(&sector[16..]));
            let len = match u32_at(sector, 12) {
                0 => {
                    self.found.rule("end-of-stream marker is all zeros", is_zero(sector));
                    self.found.rule("end-of-stream marker is last", at + 1 == end);
                    break;
                }
                1 => {
                    self.found.rule("tables in front of the directory", !has_directory);
                    tables.push(at + 1);
                    table_len
                }
                2 => {
                    self.found.rule("one directory", !has_directory);
                    has_directory = true;
                    self.found.directory = at + 1;
                    directory_len
                }
                3 => {
                    self.found.rule("directory in front of the footer", has_directory);
                    self.found.rule("one footer", !has_footer);
                    has_footer = true;
                    self.footer(at + 1)?;
                    1
                }
                kind => return Err(format!("a marker of type {kind} at sector {at}")),
            };
            self.found.rule("length in a marker", value == len as u64);
            at += 1 + len;
        }
        if directory == AT_END && !has_footer {
            return Err("no footer".into());
        }
        Ok(tables)
    }

    /// A grain whose marker is at sector `at`. Where the next marker is.
    fn grain(&mut self, at: usize, lba: u64, size: usize) -> Result<usize, String> {
        let Header { capacity, grain, .. } = *self.header;
        let bytes = grain as usize * SECTOR;
        let from = at * SECTOR + 12;
        let next = (from + size).div_ceil(SECTOR);
        if !lba.is_multiple_of(grain) || lba >= capacity {
            return Err(format!("a grain of sector {lba}"));
        }
        let is_new = self.found.grains.iter().all(|&(other, _)| other != lba);
        self.found.rule("each grain once", is_new);
        // As much room as VMware's program has.
        self.found.rule("room for a deflated grain", 12 + size <= bytes + SECTOR);
        let Some(data) = inflate(self.file, from, size, bytes) else {
            return Err(format!("the grain of sector {lba} does not inflate"));
        };
        let start = lba as usize * SECTOR;
        let len = bytes.min(self.found.disk.len() - start);
        let is_last = lba + grain > capacity;
        let fits = data.len() == bytes || is_last && (len..=bytes).contains(&data.len());
        if !fits {
            return Err(format!("the grain of sector {lba} has {} bytes", data.len()));
        }
        self.found.disk[start..start + len].copy_from_slice(&data[..len]);
        let padding = self.file.get(from + size..next * SECTOR);
        self.found.rule("zeros behind a grain", padding.is_some_and(is_zero));
        self.found.grains.push((lba, at));
        Ok(next)
    }

    /// The footer: the header again, with the directory's place.
    fn footer(&mut self, at: usize) -> Result<(), String> {
        let footer = sectors(self.file, at, 1).ok_or("the footer is cut off")?;
        let mut first = self.file[..SECTOR].to_vec();
        self.found.rule("place of the directory: at the end", u64_at(&first, 56) == AT_END);
        self.found.rule("footer in the last but one sector", (at + 2) * SECTOR == self.file.len());
        let directory = u64_at(footer, 56);
        self.found.rule("footer names the directory", directory == self.found.directory as u64);
        first[56..64].copy_from_slice(&directory.to_le_bytes());
        self.found.rule("footer is as the header", first == footer);
        Ok(())
    }
}

/// By the directory: what a program finds that looks up where a grain is.
fn by_directory(
    file: &[u8],
    header: &Header,
    marked: Vec<usize>,
    found: &mut Stream,
) -> Result<(), String> {
    let (tables, entries) = (header.tables() as usize, header.entries as usize);
    let is_at_end = header.directory == AT_END;
    if !is_at_end {
        found.directory = header.directory as usize;
    }
    let len = (tables * 4).div_ceil(SECTOR);
    let directory = sectors(file, found.directory, len).ok_or("the directory is cut off")?;
    found.rule("zeros behind the directory", is_zero(&directory[tables * 4..]));
    let places: BTreeMap<usize, u64> = found.grains.iter().map(|&(lba, at)| (at, lba)).collect();
    let mut named = BTreeSet::new();
    for number in 0..tables {
        let at = u32_at(directory, number * 4) as usize;
        if at == 0 {
            continue;
        }
        found.rule("each table once in the directory", !found.tables.contains(&at));
        found.tables.push(at);
        match is_at_end {
            true => found.rule("tables have markers", marked.contains(&at)),
            false => found.rule("tables are in front of the grains", at < header.overhead as usize),
        }
        let table = sectors(file, at, entries * 4 / SECTOR).ok_or("a table is cut off")?;
        for entry in 0..entries {
            let (place, number) = (u32_at(table, entry * 4) as usize, number * entries + entry);
            if place == 0 {
                continue;
            }
            let lba = number as u64 * header.grain;
            found.rule("entry leads to its grain", places.get(&place) == Some(&lba));
            named.insert(place);
        }
    }
    found.rule("each grain has an entry", places.keys().all(|place| named.contains(place)));
    found.rule("each table is in the directory", marked.iter().all(|at| found.tables.contains(at)));
    Ok(())
}
