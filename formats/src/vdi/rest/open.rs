//! Opening a VDI image: header and block map.
//!
//! An open for writing puts right first what others would take space by: it cuts off what lies
//! behind the blocks that are counted or named, and raises a count that is too low.

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::parts::entries::read_entries;
use crate::parts::length::file_len;
use crate::vdi::disk::layout::{Entry, HEADER_BYTES, Header, NOWHERE};

/// An open image: all of its metadata.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Opened {
    /// The header as it is on disk.
    pub header: Header,
    /// The block map, filled up to whole units of [`Header::map_unit`] with what follows it. As on
    /// disk, but that [`NOWHERE`] stands for what led past the file's end.
    pub map: Vec<u32>,
    /// As many blocks the file holds whole; no entry leads past them.
    pub file_blocks: u32,
    /// Blocks of the file that no entry names, the last first.
    pub holes: Vec<u32>,
    /// Blocks that more than one entry names, in order.
    pub doubled: Vec<u32>,
    /// The length of a file that keeps it, as a block device does. Blocks that are not counted there
    /// hold anything.
    pub fixed_len: Option<u64>,
}

impl Opened {
    /// What is in the guest's block `index`; `None`: its entry cannot be.
    #[inline]
    pub fn entry(&self, index: u64) -> Option<Entry> {
        let entry = self.header.entry(*self.map.get(index as usize)?)?;
        match entry {
            Entry::Block(block) if self.doubled.binary_search(&block).is_ok() => None,
            entry => Some(entry),
        }
    }

    /// What is at `at`, and up to where at most `end` it is so: data is in one piece then.
    #[inline]
    pub fn run_at(&self, at: u64, end: u64) -> Option<(Entry, u64)> {
        let bits = self.header.block_bits;
        let mut index = at >> bits;
        let entry = self.entry(index)?;
        let mut expected = entry;
        while (index + 1) << bits < end {
            if let Entry::Block(block) = &mut expected {
                *block += 1;
            }
            if self.entry(index + 1) != Some(expected) {
                break;
            }
            index += 1;
        }
        Some((entry, ((index + 1) << bits).min(end)))
    }

    /// Where byte `at` of the guest's disk is, if it is in this block.
    #[inline]
    pub fn host_of(&self, block: u32, at: u64) -> u64 {
        self.header.offset_of(block) + (at & (self.header.block_size() - 1))
    }

    /// Where the entry of that block is in the file.
    pub fn entry_offset(&self, index: u64) -> u64 {
        self.header.map_offset + index * 4
    }

    /// The entries that the disk or a spare end of the map has, as they are.
    pub fn entries(&self) -> &[u32] {
        &self.map[..self.header.blocks as usize]
    }
}

/// Opens the image in `file`.
///
/// # Errors
///
/// What [`Header::parse`] says; [`Error::Io`].
pub fn open<F: Store>(file: &F, write: bool) -> Result<Opened, Error> {
    let mut len = file_len(file)?;
    let header = read_header(file, len)?;
    let map = read_map(file, &header)?;
    let (file_blocks, holes, doubled) = (header.blocks_in(len), Vec::new(), Vec::new());
    let fixed_len = file.has_fixed_len().then_some(len);
    let mut image = Opened { header, map, file_blocks, holes, doubled, fixed_len };
    let named = image.entries().iter().filter(|&&raw| raw < file_blocks).max();
    let counted = image.header.allocated.min(file_blocks).max(named.map_or(0, |max| max + 1));
    if fixed_len.is_some() {
        image.file_blocks = counted;
    }
    if write {
        let end = image.header.offset_of(counted);
        if fixed_len.is_none() && len > end {
            file.set_len(end).map_err(Error::io("cut off the image's end"))?;
            len = file_len(file)?;
            image.file_blocks = image.header.blocks_in(len);
        }
        if image.header.allocated < image.file_blocks {
            image.header.allocated = image.file_blocks;
            write_header(file, &image.header)?;
        }
    }
    image.look_through();
    Ok(image)
}

impl Opened {
    /// Finds what is wrong with the map, and what is free.
    fn look_through(&mut self) {
        let blocks = self.header.blocks as usize;
        let mut used = vec![false; self.file_blocks as usize];
        for raw in &mut self.map[..blocks] {
            match self.header.entry(*raw) {
                Some(Entry::Block(block)) => match used.get_mut(block as usize) {
                    Some(used) if *used => self.doubled.push(block),
                    Some(used) => *used = true,
                    None => *raw = NOWHERE,
                },
                Some(Entry::Zero) => {}
                None => *raw = NOWHERE,
            }
        }
        self.doubled.sort_unstable();
        self.doubled.dedup();
        let free = (0..self.file_blocks).rev().filter(|&block| !used[block as usize]);
        self.holes = free.collect();
    }
}

/// Reads and parses the header of a file of `len` bytes.
///
/// # Errors
///
/// As [`open`].
pub fn read_header<F: Store>(file: &F, len: u64) -> Result<Header, Error> {
    let mut sector = [0; HEADER_BYTES];
    let there = &mut sector[..len.min(HEADER_BYTES as u64) as usize];
    file.read_at(0, there).map_err(Error::io("read the header"))?;
    Header::parse(there, len)
}

/// Writes the header and makes it stable.
///
/// # Errors
///
/// [`Error::Io`].
pub fn write_header<F: Store>(file: &F, header: &Header) -> Result<(), Error> {
    file.write_at(0, &header.encode()).map_err(Error::io("write the header"))?;
    file.flush().map_err(Error::io("flush the header"))
}

/// Reads the map, in whole units.
///
/// # Errors
///
/// [`Error::Io`].
pub fn read_map<F: Store>(file: &F, header: &Header) -> Result<Vec<u32>, Error> {
    let len = (header.blocks as usize * 4).next_multiple_of(header.map_unit());
    read_entries(file, header.map_offset, len / 4, u32::from_le_bytes, "read the block map")
}
