//! VDI on disk: bytes to typed values and back. No I/O.
//!
//! The model: a header of one sector, a *block map* of 32-bit entries, and data blocks of one size
//! behind both, numbered from 0. All integers are little-endian.
//!
//! Whatever comes out of this module satisfies the limits written on it. Nothing here panics,
//! whatever the bytes.

use crate::error::Error;
use crate::probe::Format;

/// The unit of the header and of its writes, in bytes.
pub const SECTOR: u64 = 512;
/// Where the magic number is: text for people is in front of it.
pub const MAGIC_AT: usize = 64;
/// The magic number.
pub const MAGIC: [u8; 4] = 0xbeda_107f_u32.to_le_bytes();
/// Where the header says where the block map is.
pub const MAP_OFFSET_AT: u64 = 0x154;
/// Where it says where block 0 is.
pub const DATA_OFFSET_AT: u64 = 0x158;
/// The header is read and written as one sector of this many bytes.
pub const HEADER_BYTES: usize = SECTOR as usize;
/// Bytes in a block unless the user says otherwise.
pub const DEFAULT_BLOCK: u64 = 1 << 20;
/// The smallest block, in bytes.
pub const BLOCK_MIN: u64 = 1 << 12;
/// The largest block, in bytes.
pub const BLOCK_MAX: u64 = 1 << 28;
/// The most blocks of a disk: a map of 256 MiB.
pub const BLOCKS_MAX: u32 = 1 << 26;

/// An entry: no block, zeros.
pub const UNALLOCATED: u32 = 0xffff_ffff;
/// An entry: zeros, said so.
pub const ZERO: u32 = 0xffff_fffe;
/// An entry: what stands for one that led past the file's end. No block has this number.
pub const NOWHERE: u32 = 0xffff_fffd;

const TEXT: &[u8] = b"<<< cowbell VirtualBox disk image >>>\n";
const VERSION: u32 = 0x0001_0001;
const DYNAMIC: u32 = 1;
const FIXED: u32 = 2;

/// The header, checked. Holds on to the bytes around its own fields.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Header {
    sector: Box<[u8; HEADER_BYTES]>,
    /// Start of the block map in the file, on a sector's boundary.
    pub map_offset: u64,
    /// Start of block 0 in the file, on a sector's boundary behind the map.
    pub data_offset: u64,
    /// The disk's size in bytes, a multiple of 512, at most `blocks` blocks.
    pub size: u64,
    /// log2 of the block size in bytes: 12 to 28.
    pub block_bits: u32,
    /// Entries of the map, at most [`BLOCKS_MAX`].
    pub blocks: u32,
    /// As many blocks are counted as allocated: others give the next one this number.
    pub allocated: u32,
}

impl Header {
    /// A header for a new image, of a fixed size or not, with a UUID for the image and one for its
    /// last change.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a block size that cannot be; [`Error::Limit`] for too large a disk.
    pub fn new(size: u64, block: u64, fixed: bool, uuids: [u128; 2]) -> Result<Header, Error> {
        if !is_block_size(block) {
            return Err(Error::Invalid(format!(
                "VDI block size must be a power of two from {BLOCK_MIN} to {BLOCK_MAX}"
            )));
        }
        let blocks = u32::try_from(size.div_ceil(block)).unwrap_or(u32::MAX);
        if blocks > BLOCKS_MAX || size.checked_next_multiple_of(SECTOR).is_none() {
            let max = u64::from(BLOCKS_MAX) * block;
            return Err(Error::Limit(format!("a VDI disk has at most {max} bytes, not {size}")));
        }
        let map_end = MAP_OFFSET + u64::from(blocks) * 4;
        let mut sector = [0; HEADER_BYTES];
        sector[..TEXT.len()].copy_from_slice(TEXT);
        sector[MAGIC_AT..MAGIC_AT + 4].copy_from_slice(&MAGIC);
        let data_offset = map_end.next_multiple_of(block.max(DEFAULT_BLOCK)) as u32;
        let image_type = if fixed { FIXED } else { DYNAMIC };
        let fields = [(0x44, VERSION), (0x48, 400), (0x4c, image_type), (0x168, 512)];
        let places = [(0x154, MAP_OFFSET as u32), (0x158, data_offset)];
        let sizes = [(0x178, block as u32), (0x180, blocks)];
        for (at, value) in fields.into_iter().chain(places).chain(sizes) {
            sector[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        sector[0x170..0x178].copy_from_slice(&size.next_multiple_of(SECTOR).to_le_bytes());
        for (at, uuid) in [0x188, 0x198].into_iter().zip(uuids) {
            sector[at..at + 16].copy_from_slice(&uuid.to_le_bytes());
        }
        let mut header = Header::parse(&sector, u64::MAX)?;
        header.allocated = if fixed { blocks } else { 0 };
        Ok(header)
    }

    /// Parses the first sector of a file of `file_len` bytes, or all there is of it.
    ///
    /// # Errors
    ///
    /// [`Error::NotThisFormat`] without the magic number, [`Error::Unsupported`] naming what is not
    /// handled, [`Error::Limit`] for a map that is too large, [`Error::Corrupt`] for everything else
    /// that cannot be.
    pub fn parse(first: &[u8], file_len: u64) -> Result<Header, Error> {
        if first.get(MAGIC_AT..MAGIC_AT + 4) != Some(&MAGIC) {
            return Err(Error::NotThisFormat(Format::Vdi));
        }
        let Some(sector) = first.first_chunk::<HEADER_BYTES>() else {
            return corrupt("VDI header is cut short", 0);
        };
        let word = |at: usize| {
            u32::from_le_bytes([sector[at], sector[at + 1], sector[at + 2], sector[at + 3]])
        };
        let unsupported = |what: String| Err(Error::Unsupported(what));
        let version = word(0x44);
        if version != VERSION {
            let (major, minor) = (version >> 16, version & 0xffff);
            return unsupported(format!("unsupported VDI image (version {major}.{minor})"));
        }
        match word(0x4c) {
            DYNAMIC | FIXED => {}
            3 | 4 => return unsupported("differencing VDI images are not supported".into()),
            other => return unsupported(format!("unsupported VDI image (type {other})")),
        }
        for (at, name) in [(0x1a8, "link"), (0x1b8, "parent")] {
            if sector[at..at + 16] != [0; 16] {
                let what = "differencing VDI images are not supported";
                return unsupported(format!("{what} (non-NULL {name} UUID)"));
            }
        }
        if word(0x168) != SECTOR as u32 {
            return unsupported(format!("unsupported VDI image (sector size {})", word(0x168)));
        }
        if word(0x17c) != 0 {
            return unsupported("unsupported VDI image (blocks with extra data)".into());
        }
        let block = u64::from(word(0x178));
        if !is_block_size(block) {
            return unsupported(format!("unsupported VDI image (block size {block})"));
        }
        let (map_offset, data_offset) = (u64::from(word(0x154)), u64::from(word(0x158)));
        let (blocks, block_bits) = (word(0x180), block.trailing_zeros());
        if blocks > BLOCKS_MAX {
            let what = format!("unsupported VDI image (too many blocks {blocks}, max is ");
            return Err(Error::Limit(format!("{what}{BLOCKS_MAX})")));
        }
        let stored = u64::from_le_bytes(*sector[0x170..].first_chunk().expect("it is inside"));
        let size = stored.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
        if size > u64::from(blocks) << block_bits {
            return corrupt("VDI disk is larger than its block map has room for", 0x170);
        }
        let map_end = map_offset + u64::from(blocks) * 4;
        if !map_offset.is_multiple_of(SECTOR) || map_offset < SECTOR {
            return corrupt("VDI block map offset is invalid", 0x154);
        }
        if map_end > file_len {
            return corrupt("VDI block map is cut short", 0x154);
        }
        if !data_offset.is_multiple_of(SECTOR) || map_end > data_offset {
            return corrupt("VDI data offset is invalid", 0x158);
        }
        let allocated = word(0x184);
        let sector = Box::new(*sector);
        Ok(Header { sector, map_offset, data_offset, size, block_bits, blocks, allocated })
    }

    /// The sector: these fields, and around them what was there when it was read.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut sector = *self.sector;
        sector[0x184..0x188].copy_from_slice(&self.allocated.to_le_bytes());
        sector
    }

    /// Are all blocks there from the start?
    pub fn is_fixed(&self) -> bool {
        self.sector[0x4c] == FIXED as u8
    }

    /// Bytes in a block.
    #[inline]
    pub fn block_size(&self) -> u64 {
        1 << self.block_bits
    }

    /// Where this block is in the file; for a number up to [`BLOCKS_MAX`].
    #[inline]
    pub fn offset_of(&self, block: u32) -> u64 {
        self.data_offset + (u64::from(block) << self.block_bits)
    }

    /// The unit in bytes in which the map is written: a block of most file systems, if it lies so
    /// that no data is in one.
    pub fn map_unit(&self) -> usize {
        let apart = self.map_offset.is_multiple_of(4096) && self.data_offset.is_multiple_of(4096);
        if apart { 4096 } else { SECTOR as usize }
    }

    /// How many blocks a file of `file_len` bytes holds whole; not more than the map has entries.
    pub fn blocks_in(&self, file_len: u64) -> u32 {
        let whole = file_len.saturating_sub(self.data_offset) >> self.block_bits;
        whole.min(self.blocks.into()) as u32
    }

    /// What an entry of the map means; `None`: nothing that can be.
    #[inline]
    pub fn entry(&self, raw: u32) -> Option<Entry> {
        match raw {
            UNALLOCATED | ZERO => Some(Entry::Zero),
            block => (block < self.blocks).then_some(Entry::Block(block)),
        }
    }
}

/// What an entry of the map says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// Zeros, without a place.
    Zero,
    /// The block of this number.
    Block(u32),
}

/// Where new images have their map: not in the header's file system block.
const MAP_OFFSET: u64 = 4096;

fn is_block_size(block: u64) -> bool {
    block.is_power_of_two() && (BLOCK_MIN..=BLOCK_MAX).contains(&block)
}

fn corrupt<T>(what: &'static str, at: u64) -> Result<T, Error> {
    Err(Error::Corrupt { what, at })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_encode_and_parse() {
        for (size, block, fixed) in
            [(0, 1 << 20, false), (512, 4096, true), (1 << 46, 1 << 20, true)]
        {
            let mut header = Header::new(size, block, fixed, [1, 2]).expect("legal");
            header.allocated = 7;
            assert_eq!(
                Header::parse(&header.encode(), u64::MAX).expect("own").encode(),
                header.encode()
            );
            assert_eq!((header.size, header.block_size()), (size, block));
            assert!(header.offset_of(BLOCKS_MAX) < i64::MAX as u64);
        }
        assert!(Header::new(u64::MAX, 1 << 20, false, [1, 2]).is_err());
        assert!(Header::new(1, 3 << 20, false, [1, 2]).is_err());
    }

    #[test]
    fn data_offsets_fit_their_field() {
        for bits in 12..=28 {
            let block = 1_u64 << bits;
            let header = Header::new(u64::from(BLOCKS_MAX) << bits, block, false, [1, 2]);
            let header = header.expect("the largest disk");
            assert!(header.data_offset >= header.map_offset + u64::from(header.blocks) * 4);
        }
    }
}
