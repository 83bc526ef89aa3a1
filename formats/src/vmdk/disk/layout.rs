//! A sparse extent on disk: bytes to typed values and back. No I/O.
//!
//! The model: a header; a grain directory whose entries point at grain tables; their entries point
//! at grains, the units of allocation. Directory and tables usually exist twice (the *redundant*
//! ones). All integers are little-endian, all places in the file are counted in sectors of 512
//! bytes. A *stream* (streamOptimized) holds deflated grains, each behind a marker; its directory
//! is found through a second header, the footer, near the file's end.
//!
//! The invariant: whatever comes out of this module satisfies the limits written on it. Nothing
//! here panics, whatever the bytes.
//!
//! Sections named below are those of VMware's *Virtual Disk Format 5.0*.

use crate::error::Error;
use crate::probe::Format;

/// The first four bytes of a sparse extent (§ "Hosted Sparse Extent Header").
pub const MAGIC: [u8; 4] = *b"KDMV";
/// The first four bytes of an ESX sparse extent, which is another format.
pub const COWD_MAGIC: [u8; 4] = *b"COWD";
/// The first eight bytes of a space-efficient sparse extent, which is yet another.
pub const SESPARSE_MAGIC: [u8; 8] = 0xcafe_babe_u64.to_le_bytes();

/// Bytes in a sector; also of the header.
pub const SECTOR: u64 = 512;
/// log2 of [`SECTOR`].
pub const SECTOR_BITS: u32 = 9;
/// log2 of the smallest grain in bytes: a sector. (Nearly everybody writes 64 KiB.)
pub const GRAIN_BITS_MIN: u32 = 9;
/// log2 of the smallest grain that is written: 4 KiB, room for a table and its copy.
pub const WRITABLE_GRAIN_BITS_MIN: u32 = 12;
/// log2 of the largest grain in bytes: 4 MiB. A run of grains under one table is less than 4 GiB.
pub const GRAIN_BITS_MAX: u32 = 22;
/// log2 of the largest deflated grain in bytes: 1 MiB. Several are kept in memory.
pub const PACKED_GRAIN_BITS_MAX: u32 = 20;
/// The most entries of a grain table; everybody writes as many.
pub const TABLE_ENTRIES_MAX: u64 = 512;
/// The most bytes of a grain table.
pub const TABLE_BYTES_MAX: usize = 2048;
/// A grain directory has at most this many entries: a whole extent of 2 TiB with grains of 4 KiB
/// and tables of 512 entries.
pub const DIRECTORY_ENTRIES_MAX: u64 = 1 << 20;
/// A sparse extent's file cannot be longer: a grain's place is a 32-bit number of sectors.
pub const FILE_MAX: u64 = 1 << (32 + SECTOR_BITS);
/// No offset in a disk is beyond this.
pub const OFFSET_MAX: u64 = i64::MAX as u64;

/// The bytes that a file transfer in text mode would change are to be checked.
pub const NEWLINE_TEST: u32 = 1;
/// There are a redundant directory and redundant tables.
pub const REDUNDANT: u32 = 1 << 1;
/// An entry of 1 says that the grain is all zeros.
pub const ZEROED_GRAIN: u32 = 1 << 2;
/// Grains are compressed.
pub const COMPRESSED: u32 = 1 << 16;
/// There are markers.
pub const MARKERS: u32 = 1 << 17;

/// The directory's place in a header that says: look into the footer.
pub const AT_END: u64 = u64::MAX;

/// An entry that leads nowhere, however long the file is: nothing begins in the last sector that
/// there can be.
pub const NOWHERE: u32 = u32::MAX;

const NEWLINES: [u8; 4] = *b"\n \r\n";
const DEFLATE: u16 = 1;

/// A sparse extent's header, checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Header {
    /// 1 to 3.
    pub version: u32,
    /// Feature bits.
    pub flags: u32,
    /// The extent's size in sectors; in bytes at most [`OFFSET_MAX`].
    pub capacity: u64,
    /// log2 of the bytes in a grain: [`GRAIN_BITS_MIN`] to [`GRAIN_BITS_MAX`]; of a deflated one to
    /// [`PACKED_GRAIN_BITS_MAX`].
    pub grain_bits: u32,
    /// Sector of the embedded descriptor; 0: there is none.
    pub descriptor_at: u64,
    /// Sectors that it may take.
    pub descriptor_len: u64,
    /// log2 of the entries in a grain table: at most 9.
    pub table_bits: u32,
    /// Sector of the redundant directory, if [`REDUNDANT`].
    pub redundant_at: u64,
    /// Sector of the directory; [`AT_END`] in a stream.
    pub directory_at: u64,
    /// Sectors in front of the first grain.
    pub overhead: u64,
    /// The extent was not closed cleanly. QEMU never says so, and neither do we.
    pub unclean: bool,
}

impl Header {
    /// Parses the first sector of an extent, or a footer.
    ///
    /// # Errors
    ///
    /// [`Error::NotThisFormat`] without the magic; [`Error::Unsupported`] naming the relative that
    /// it is, or the version; [`Error::Corrupt`] for what cannot be.
    pub fn parse(sector: &[u8]) -> Result<Header, Error> {
        if sector.starts_with(&COWD_MAGIC) {
            return unsupported("VMDK extents of type COWD (vmfsSparse) are not supported");
        }
        if sector.starts_with(&SESPARSE_MAGIC) {
            return unsupported("VMDK extents of type seSparse are not supported");
        }
        if !sector.starts_with(&MAGIC) {
            return Err(Error::NotThisFormat(Format::Vmdk));
        }
        let Some(fields) = sector.first_chunk::<{ SECTOR as usize }>() else {
            return corrupt("VMDK header is cut short", 0);
        };
        let version = u32_at(fields, 4);
        if !(1..=3).contains(&version) {
            return Err(Error::Unsupported(format!("Unsupported VMDK version {version}")));
        }
        let flags = u32_at(fields, 8);
        // Some programs set the flag and write no such bytes.
        if flags & NEWLINE_TEST != 0
            && ![NEWLINES, [0; 4]].iter().any(|bytes| fields[73..77] == *bytes)
        {
            return corrupt("VMDK header was damaged by a transfer as text", 73);
        }
        // The algorithm says whether there is compression: not every program sets the flag too.
        let flags = match u16::from_le_bytes([fields[77], fields[78]]) {
            0 => flags & !COMPRESSED,
            DEFLATE => flags | COMPRESSED,
            _ => return corrupt("VMDK compression is neither none nor deflate", 77),
        };
        let grain = u64_at(fields, 20);
        let bits = grain.trailing_zeros() + SECTOR_BITS;
        let most = match flags & COMPRESSED {
            0 => GRAIN_BITS_MAX,
            _ => PACKED_GRAIN_BITS_MAX,
        };
        if !grain.is_power_of_two() || !(GRAIN_BITS_MIN..=most).contains(&bits) {
            let what = "VMDK granularity is invalid: no power of two, or too large";
            return corrupt(what, 20);
        }
        let entries = u64::from(u32_at(fields, 44));
        if !entries.is_power_of_two() || entries > TABLE_ENTRIES_MAX {
            return corrupt("VMDK grain tables have an invalid number of entries", 44);
        }
        let header = Header {
            version,
            flags,
            capacity: u64_at(fields, 12),
            grain_bits: bits,
            descriptor_at: u64_at(fields, 28),
            descriptor_len: u64_at(fields, 36),
            table_bits: entries.trailing_zeros(),
            redundant_at: u64_at(fields, 48),
            directory_at: u64_at(fields, 56),
            overhead: u64_at(fields, 64),
            unclean: fields[72] != 0,
        };
        if header.capacity > OFFSET_MAX >> SECTOR_BITS {
            return corrupt("VMDK capacity is too large", 12);
        }
        if header.directory_entries() > DIRECTORY_ENTRIES_MAX {
            let n = header.directory_entries();
            return Err(Error::Limit(format!(
                "VMDK grain directory with {n} entries is too large"
            )));
        }
        Ok(header)
    }

    /// The sector that says so.
    pub fn encode(&self) -> [u8; SECTOR as usize] {
        let mut sector = [0; SECTOR as usize];
        let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(4, &self.version.to_le_bytes());
        put(8, &self.flags.to_le_bytes());
        put(12, &self.capacity.to_le_bytes());
        put(20, &(self.grain_size() >> SECTOR_BITS).to_le_bytes());
        put(28, &self.descriptor_at.to_le_bytes());
        put(36, &self.descriptor_len.to_le_bytes());
        put(44, &(1u32 << self.table_bits).to_le_bytes());
        put(48, &self.redundant_at.to_le_bytes());
        put(56, &self.directory_at.to_le_bytes());
        put(64, &self.overhead.to_le_bytes());
        put(72, &[self.unclean.into()]);
        put(73, &NEWLINES);
        put(77, &(if self.is_compressed() { DEFLATE } else { 0 }).to_le_bytes());
        sector
    }

    /// Bytes in a grain.
    #[inline]
    pub fn grain_size(&self) -> u64 {
        1 << self.grain_bits
    }

    /// log2 of the bytes that one table maps.
    #[inline]
    pub fn span_bits(&self) -> u32 {
        self.grain_bits + self.table_bits
    }

    /// Bytes in a table.
    #[inline]
    pub fn table_bytes(&self) -> u64 {
        4 << self.table_bits
    }

    /// Entries in the directory: tables that the capacity needs.
    pub fn directory_entries(&self) -> u64 {
        self.capacity.div_ceil(1 << (self.span_bits() - SECTOR_BITS))
    }

    /// Bytes in the end of a stream: [`end_of_stream`].
    pub fn end_of_stream_bytes(&self) -> usize {
        let directory = self.directory_entries() as usize * 4;
        directory.next_multiple_of(SECTOR as usize) + 4 * SECTOR as usize
    }

    /// Are the grains deflated?
    pub fn is_compressed(&self) -> bool {
        self.flags & COMPRESSED != 0
    }

    /// Does an entry of 1 mean zeros?
    pub fn has_zeroed_grains(&self) -> bool {
        self.flags & ZEROED_GRAIN != 0
    }

    /// Header, descriptor and directories: first sector and length of each.
    fn fixed_parts(&self) -> [(u64, u64); 4] {
        let directory = (self.directory_entries() * 4).div_ceil(SECTOR);
        let redundant = if self.flags & REDUNDANT == 0 { 0 } else { directory };
        [
            (0, 1),
            (self.descriptor_at, if self.descriptor_at == 0 { 0 } else { self.descriptor_len }),
            (self.directory_at, directory),
            (self.redundant_at, redundant),
        ]
    }

    /// Do header, descriptor and directories overlap?
    pub fn overlaps_itself(&self) -> bool {
        let mut parts = self.fixed_parts();
        parts.sort_unstable();
        let parts = parts.iter().filter(|part| part.1 > 0);
        let mut end = 0;
        parts.into_iter().any(|&(start, len)| {
            let overlaps = start < end;
            end = start.saturating_add(len);
            overlaps
        })
    }

    /// A directory's entry, in a file of `file_len` bytes: the table's first byte, or none. `None`
    /// if no table can be there: behind the end, or over the header, the descriptor, a directory.
    pub fn table(&self, raw: u32, file_len: u64) -> Option<Option<u64>> {
        let at = u64::from(raw);
        if at == 0 {
            return Some(None);
        }
        let end = at + self.table_bytes().div_ceil(SECTOR);
        let collides = |&(start, len): &(u64, u64)| at < start.saturating_add(len) && start < end;
        let collides = self.fixed_parts().iter().any(collides) || raw == NOWHERE;
        (end <= file_len.div_ceil(SECTOR) && !collides).then_some(Some(at << SECTOR_BITS))
    }

    /// What an entry may point at in a file of `file_len` bytes.
    #[inline]
    pub fn bounds(&self, file_len: u64) -> Bounds {
        Bounds {
            first: self.overhead.max(1),
            end: file_len.div_ceil(SECTOR),
            zeroed: self.has_zeroed_grains(),
        }
    }
}

/// What is in a grain table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// Nothing: the parent's contents, or zeros.
    Unallocated,
    /// Zeros.
    Zero,
    /// A grain: its first byte in the file.
    Data(u64),
}

impl Entry {
    /// As a table has it.
    #[inline]
    pub fn encode(self) -> u32 {
        match self {
            Entry::Unallocated => 0,
            Entry::Zero => 1,
            Entry::Data(offset) => (offset >> SECTOR_BITS) as u32,
        }
    }
}

/// What entries may point at, in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Where grains begin.
    pub first: u64,
    /// Where the file ends: the grain must begin before. A last grain may be cut.
    pub end: u64,
    /// Does 1 mean zeros?
    pub zeroed: bool,
}

impl Bounds {
    /// A grain table's entry; `None` if it cannot be.
    #[inline]
    pub fn entry(&self, raw: u32) -> Option<Entry> {
        let sector = u64::from(raw);
        match raw {
            0 => Some(Entry::Unallocated),
            1 if self.zeroed => Some(Entry::Zero),
            NOWHERE => None,
            _ if sector >= self.first && sector < self.end => {
                Some(Entry::Data(sector << SECTOR_BITS))
            }
            _ => None,
        }
    }
}

/// What stands in front of a deflated grain (§ "Compressed Grain").
pub const GRAIN_MARKER_BYTES: usize = 12;

/// A marker (§ "Markers").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Marker {
    /// The end of the stream.
    EndOfStream,
    /// A grain table follows.
    Table,
    /// The grain directory follows.
    Directory,
    /// The footer follows.
    Footer,
    /// `size` bytes of deflated grain follow, 12 bytes into the marker's sector.
    Grain {
        /// The grain's first sector on the extent.
        lba: u64,
        /// Bytes.
        size: u32,
    },
}

impl Marker {
    /// Parses a sector that begins with a marker; `None` if it does not.
    pub fn parse(sector: &[u8]) -> Option<Marker> {
        let fields = sector.first_chunk::<16>()?;
        let (value, size) = (u64_at(fields, 0), u32_at(fields, 8));
        if size > 0 {
            return Some(Marker::Grain { lba: value, size });
        }
        match u32_at(fields, 12) {
            0 => Some(Marker::EndOfStream),
            1 => Some(Marker::Table),
            2 => Some(Marker::Directory),
            3 => Some(Marker::Footer),
            _ => None,
        }
    }

    /// The first bytes of a sector that is one. `sectors`: how many follow.
    pub fn encode(self, sectors: u64) -> [u8; 16] {
        let mut bytes = [0; 16];
        let kind: u32 = match self {
            Marker::EndOfStream => 0,
            Marker::Table => 1,
            Marker::Directory => 2,
            Marker::Footer => 3,
            Marker::Grain { lba, size } => {
                bytes[..8].copy_from_slice(&lba.to_le_bytes());
                bytes[8..12].copy_from_slice(&size.to_le_bytes());
                return bytes;
            }
        };
        bytes[..8].copy_from_slice(&sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&kind.to_le_bytes());
        bytes
    }
}

pub(crate) fn corrupt<T>(what: &'static str, at: u64) -> Result<T, Error> {
    Err(Error::Corrupt { what, at })
}

fn unsupported<T>(what: &str) -> Result<T, Error> {
    Err(Error::Unsupported(what.into()))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Entries as they are on disk.
pub(crate) fn entry_bytes(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// The end of a stream whose grains and tables end at sector `at`: its directory, in whole sectors,
/// the footer and the end mark.
pub fn end_of_stream(header: &Header, at: u64, directory: &[u32]) -> Vec<u8> {
    let footer = Header { directory_at: at + 1, ..header.clone() };
    let sector = |marker: Marker, sectors: u64| {
        let mut bytes = vec![0; SECTOR as usize];
        bytes[..16].copy_from_slice(&marker.encode(sectors));
        bytes
    };
    let directory = entry_bytes(directory);
    [
        sector(Marker::Directory, directory.len() as u64 >> SECTOR_BITS),
        directory,
        sector(Marker::Footer, 1),
        footer.encode().to_vec(),
        sector(Marker::EndOfStream, 0),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            version: 1,
            flags: NEWLINE_TEST | REDUNDANT,
            capacity: 2048,
            grain_bits: 16,
            descriptor_at: 1,
            descriptor_len: 20,
            table_bits: 9,
            redundant_at: 21,
            directory_at: 26,
            overhead: 128,
            unclean: false,
        }
    }

    #[test]
    fn headers_round_trip() {
        let header = header();
        assert_eq!(Header::parse(&header.encode()), Ok(header.clone()));
        let stream = Header {
            version: 3,
            flags: NEWLINE_TEST | COMPRESSED | MARKERS,
            directory_at: AT_END,
            ..header
        };
        assert_eq!(Header::parse(&stream.encode()), Ok(stream));
    }

    #[test]
    fn no_header_panics() {
        for at in 0..SECTOR as usize {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut sector = header().encode();
                sector[at] = value;
                if let Ok(header) = Header::parse(&sector) {
                    assert!(header.directory_entries() <= DIRECTORY_ENTRIES_MAX);
                }
            }
        }
        for len in 0..SECTOR as usize {
            assert!(Header::parse(&header().encode()[..len]).is_err());
        }
    }

    #[test]
    fn entries_are_held_to_their_bounds() {
        let bounds = Bounds { first: 128, end: 256, zeroed: false };
        assert_eq!(bounds.entry(0), Some(Entry::Unallocated));
        assert_eq!(bounds.entry(1), None);
        assert_eq!(bounds.entry(127), None);
        assert_eq!(bounds.entry(128), Some(Entry::Data(128 << 9)));
        assert_eq!(bounds.entry(255), Some(Entry::Data(255 << 9)));
        assert_eq!(bounds.entry(256), None);
        assert_eq!(Bounds { end: u64::MAX, ..bounds }.entry(NOWHERE), None);
        assert_eq!(Bounds { zeroed: true, ..bounds }.entry(1), Some(Entry::Zero));
    }

    #[test]
    fn tables_are_where_nothing_else_is() {
        let header = header();
        assert_eq!(header.table(0, 256 << 9), Some(None));
        assert_eq!(header.table(252, 256 << 9), Some(Some(252 << 9)));
        assert_eq!(header.table(253, 256 << 9), None);
        let last = u32::MAX - 1;
        assert_eq!(header.table(last, u64::MAX), Some(Some(u64::from(last) << 9)));
        assert_eq!(header.table(NOWHERE, u64::MAX), None);
        // Descriptor: 1 to 21; directories: 21 and 26.
        for (raw, is_free) in [(1, false), (20, false), (21, false), (22, true), (23, false)] {
            assert_eq!(header.table(raw, 256 << 9).is_some(), is_free, "{raw}");
        }
        assert!(header.table(27, 256 << 9).is_some());
    }

    #[test]
    fn markers_round_trip() {
        for marker in [
            Marker::EndOfStream,
            Marker::Table,
            Marker::Directory,
            Marker::Footer,
            Marker::Grain { lba: 128, size: 77 },
        ] {
            assert_eq!(Marker::parse(&marker.encode(4)), Some(marker));
        }
        assert_eq!(Marker::parse(&[0; 15]), None);
        assert_eq!(Marker::parse(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0]), None);
    }
}
