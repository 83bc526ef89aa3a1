//! Opening a VMDK image: its descriptor, then its extents.
//!
//! In two stages, because the extents are files that somebody has to be allowed to open. [`open`]
//! looks at the image's own file and says which others there are; [`Opened::complete`] reads their
//! headers and grain directories. Neither writes anything.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cowbell_engine::store::Store;
use cowbell_engine::units::align_down;

use crate::error::Error;
use crate::vmdk::disk::descriptor::{Descriptor, Kind, LineKind, TEXT_MAX};
use crate::vmdk::disk::layout::{
    AT_END, Bounds, COWD_MAGIC, Header, MAGIC, MARKERS, Marker, OFFSET_MAX, REDUNDANT, SECTOR,
    SECTOR_BITS, SESPARSE_MAGIC, WRITABLE_GRAIN_BITS_MIN, corrupt,
};

/// All grain directories of an image together have at most this many entries.
pub const DIRECTORIES_MAX: u64 = 4 << 20;
/// Directories are filled up to a multiple of this many entries: to whole sectors.
pub const SECTOR_ENTRIES: u64 = SECTOR / 4;

/// The metadata of an open image that the driver keeps in memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Opened {
    /// What the descriptor says.
    pub descriptor: Descriptor,
    /// The descriptor's first byte in the image's own file.
    pub text_at: u64,
    /// What is around the content id in that file.
    pub id_block: IdBlock,
    /// The disk's size in bytes.
    pub size: u64,
    /// The extents, in the disk's order and without gaps. Of images with other files, none before
    /// [`Opened::complete`].
    pub extents: Vec<Extent>,
    /// The parent is not the one that this image was made for: it has changed since. Whoever
    /// opened it says so.
    pub parent_changed: bool,
}

/// The content id and what is around it in the file, as far as it is the header's and the descriptor's:
/// nobody changes it while the image is open. So it can be written without being read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IdBlock {
    /// The first byte in the image's own file.
    pub at: u64,
    /// What is there.
    pub bytes: Vec<u8>,
    /// The first digit in it.
    pub digits_at: usize,
}

/// A direct write of less than a block of the file system waits for every other write.
const ID_BLOCK_BYTES: u64 = 4096;

impl IdBlock {
    /// Reads it. The digits, `len` of them, are at byte `at` of the file, in a text that begins at
    /// `text_at`; nobody else's bytes are in front of `end`.
    fn read<F: Store>(
        file: &F,
        (at, len): (u64, u64),
        text_at: u64,
        end: u64,
    ) -> Result<IdBlock, Error> {
        // Behind the header.
        let own = if text_at == SECTOR { 0 } else { text_at };
        let first = align_down(at, ID_BLOCK_BYTES).max(own);
        let end = (at + len).next_multiple_of(ID_BLOCK_BYTES).min(end).max(at + len);
        let mut bytes = vec![0; (end - first) as usize];
        file.read_at(first, &mut bytes).map_err(Error::io("read the descriptor"))?;
        Ok(IdBlock { at: first, bytes, digits_at: (at - first) as usize })
    }
}

/// A part of the disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First byte on the disk.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Its file: 0 is the image's own, the others follow.
    pub file: usize,
    /// What is in the file.
    pub kind: ExtentKind,
}

impl Extent {
    /// Its metadata, if it is sparse.
    pub fn sparse(&self) -> Option<&Sparse> {
        match &self.kind {
            ExtentKind::Sparse(sparse) => Some(sparse),
            ExtentKind::Flat(_) | ExtentKind::Zero => None,
        }
    }
}

/// How an extent is kept.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// As it is, from this byte of the file on.
    Flat(u64),
    /// In grains.
    Sparse(Box<Sparse>),
    /// Nowhere: zeros.
    Zero,
}

/// The metadata of a sparse extent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sparse {
    /// The header; a stream's is its footer, where it has one.
    pub header: Header,
    /// The grain directory as it is on disk, in whole sectors; an entry has to pass
    /// [`Header::table`] before use.
    pub directory: Vec<u32>,
    /// The redundant directory, as long.
    pub redundant: Option<Vec<u32>>,
    /// The header says that there is one, and it cannot be where it says.
    pub redundant_lost: bool,
    /// The file's length in bytes when it was opened.
    pub file_len: u64,
    /// Does the file keep its length, as a block device does? Then there is no room for grains more.
    pub has_fixed_len: bool,
    /// The directory was found through a footer.
    pub has_footer: bool,
}

impl Sparse {
    /// What an entry may point at, as long as the file keeps the length it was opened with.
    pub fn bounds(&self) -> Bounds {
        self.header.bounds(self.file_len)
    }

    /// The sector behind the stream's end, if its footer follows its directory.
    fn end_of_stream(&self) -> u64 {
        let sectors = self.directory.len() as u64 / SECTOR_ENTRIES;
        self.header.directory_at.saturating_add(sectors + 3)
    }

    /// The byte at which new grains go: the file's end, or that of a stream's grains and tables.
    pub fn grains_end(&self) -> u64 {
        match self.has_footer {
            // In front of the directory's marker.
            true => self.header.directory_at.saturating_sub(1) << SECTOR_BITS,
            false => self.file_len,
        }
    }

    /// Where a table is that the directory, or the redundant one, names at `index`.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] if it cannot be there.
    pub fn table(&self, index: u64) -> Result<Option<u64>, Error> {
        let table = self.header.table(self.directory[index as usize], self.file_len);
        table.ok_or(Error::Corrupt {
            what: "invalid grain directory entry",
            at: (self.header.directory_at << SECTOR_BITS) + index * 4,
        })
    }
}

impl Opened {
    /// Is the descriptor inside the one extent?
    pub fn is_embedded(&self) -> bool {
        self.text_at != 0
    }

    /// The names of the image's other files, each once.
    pub fn files(&self) -> Vec<&Path> {
        let (names, _) = self.descriptor.files();
        names.into_iter().map(|name| Path::new(OsStr::from_bytes(name))).collect()
    }

    /// The extent that byte `offset` of the disk lies in.
    ///
    /// # Panics
    ///
    /// If there is none: beyond the disk, or not [complete](Opened::complete).
    pub fn extent_at(&self, offset: u64) -> &Extent {
        &self.extents[self.extents.partition_point(|extent| extent.start + extent.len <= offset)]
    }

    /// The name of the parent, as the image spells it.
    pub fn parent(&self) -> Option<&Path> {
        self.descriptor.parent.as_deref().map(|name| Path::new(OsStr::from_bytes(name)))
    }

    /// Reads the extents that are in other files.
    ///
    /// # Errors
    ///
    /// [`Error::Part`] with what is wrong with one of them; [`Error::Limit`] for directories that
    /// are too large together.
    pub fn complete<F: Store>(&mut self, more: &[F]) -> Result<(), Error> {
        if self.is_embedded() {
            return Ok(());
        }
        self.extents.clear();
        let (mut start, mut entries) = (0_u64, 0);
        let mut compressed_bits = None;
        let (_, numbers) = self.descriptor.files();
        for (line, file) in self.descriptor.lines.iter().zip(numbers) {
            let mut len = line.sectors << SECTOR_BITS;
            let name = Path::new(OsStr::from_bytes(&line.name)).to_path_buf();
            let part = |error| Error::Part(name.clone(), Box::new(error));
            let no = |why: &str| Err(part(Error::Unsupported(why.into())));
            let kind = match line.kind {
                LineKind::Zero => ExtentKind::Zero,
                LineKind::Flat(at) => {
                    ExtentKind::Flat(open_flat(&more[file - 1], at, len).map_err(part)?)
                }
                LineKind::Sparse => {
                    let sparse = open_sparse(&more[file - 1]).map_err(part)?;
                    // Where the two disagree the header counts, as for QEMU.
                    len = sparse.header.capacity << SECTOR_BITS;
                    if len == 0 {
                        let what = "VMDK extent of no size";
                        return Err(part(Error::Corrupt { what, at: 12 }));
                    }
                    let bits = sparse.header.grain_bits;
                    if sparse.header.is_compressed() && *compressed_bits.get_or_insert(bits) != bits
                    {
                        return no("VMDK compressed extents with grains of several sizes");
                    }
                    entries += sparse.directory.len() as u64;
                    ExtentKind::Sparse(Box::new(sparse))
                }
            };
            if entries > DIRECTORIES_MAX {
                return Err(Error::Limit("VMDK grain directories are too large".into()));
            }
            self.extents.push(Extent { start, len, file, kind });
            start = match start.checked_add(len).filter(|&end| end <= OFFSET_MAX) {
                Some(end) => end,
                None => return corrupt("VMDK extents are too large together", 0),
            };
        }
        self.size = start;
        Ok(())
    }

    /// Can this image be written?
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`], saying what stands in the way.
    pub fn check_writable(&self) -> Result<(), Error> {
        let no = |why: &str| Err(Error::Unsupported(why.into()));
        if self.descriptor.lines.iter().any(|line| !line.writable) {
            return no("VMDK with read-only extents: the image is read-only");
        }
        if self.extents_overlap() {
            return no("VMDK extents that overlap in their file: the image is read-only");
        }
        for (i, extent) in self.extents.iter().enumerate() {
            let ExtentKind::Sparse(sparse) = &extent.kind else { continue };
            let header = &sparse.header;
            if self.descriptor.lines.get(i).is_some_and(|line| line.sectors != header.capacity) {
                return no("VMDK extent is not of the size that the descriptor says");
            }
            if header.is_compressed() && !self.is_embedded() {
                return no("VMDK compressed extents of another file: the image is read-only");
            }
            if sparse.redundant_lost {
                return no(
                    "VMDK redundant grain directory lies where none can be: the image is read-only",
                );
            }
            if header.version == 3 && !header.is_compressed() {
                return no("VMDK version 3 must be read only");
            }
            if header.table_bytes() < SECTOR {
                return no("VMDK grain tables smaller than a sector: the image is read-only");
            }
            if header.grain_bits < WRITABLE_GRAIN_BITS_MIN {
                return no("VMDK grains smaller than 4 KiB: the image is read-only");
            }
            if sparse.has_footer && sparse.end_of_stream() != sparse.file_len.div_ceil(SECTOR) {
                return no("VMDK stream with something between its directory and its footer");
            }
        }
        Ok(())
    }

    /// Is a byte of a file in two places of the disk?
    fn extents_overlap(&self) -> bool {
        let range = |extent: &Extent| match extent.kind {
            ExtentKind::Flat(at) => Some((extent.file, at, at + extent.len)),
            ExtentKind::Sparse(_) => Some((extent.file, 0, u64::MAX)),
            ExtentKind::Zero => None,
        };
        let mut ranges: Vec<_> = self.extents.iter().filter_map(range).collect();
        ranges.sort_unstable();
        ranges.windows(2).any(|pair| pair[0].0 == pair[1].0 && pair[1].1 < pair[0].2)
    }
}

/// Opens the image in `file`, as far as this file says what it is.
///
/// # Errors
///
/// What [`Header::parse`] and [`Descriptor::parse`] say; [`Error::Corrupt`] for a file that is too
/// short; [`Error::Io`].
pub fn open<F: Store>(file: &F) -> Result<Opened, Error> {
    let mut first = [0; SECTOR as usize];
    file.read_at(0, &mut first).map_err(Error::io("read the first sector"))?;
    let is_extent = [&MAGIC[..], &COWD_MAGIC, &SESPARSE_MAGIC].iter().any(|m| first.starts_with(m));
    if is_extent { open_embedded(file) } else { open_descriptor(file) }
}

fn open_embedded<F: Store>(file: &F) -> Result<Opened, Error> {
    let sparse = open_sparse(file)?;
    let header = &sparse.header;
    if header.descriptor_at == 0 {
        let why = "VMDK extent without a descriptor: open the file that describes the image";
        return Err(Error::Unsupported(why.into()));
    }
    let text_at = header.descriptor_at.checked_mul(SECTOR);
    let len = header.descriptor_len.checked_mul(SECTOR).filter(|&len| len <= TEXT_MAX as u64);
    let (Some(text_at), Some(len)) = (text_at, len) else {
        return corrupt("VMDK embedded descriptor is too long", 36);
    };
    if text_at.checked_add(len).is_none_or(|end| end > sparse.file_len.next_multiple_of(SECTOR)) {
        return corrupt("VMDK embedded descriptor lies outside the file", 28);
    }
    let mut text = vec![0; len as usize];
    file.read_at(text_at, &mut text).map_err(Error::io("read the descriptor"))?;
    let kind = match header.is_compressed() {
        true => Kind::StreamOptimized,
        false => Kind::MonolithicSparse,
    };
    let descriptor = Descriptor::parse_embedded(&text, kind)?;
    let size = header.capacity << SECTOR_BITS;
    let digits = (text_at + descriptor.cid_at as u64, descriptor.cid_len as u64);
    // In front of the grains, wherever the text is said to end.
    let own_end =
        (header.overhead << SECTOR_BITS).max((digits.0 + digits.1).next_multiple_of(SECTOR));
    let id_end = own_end.min(text_at + len).min(sparse.file_len);
    let id_block = IdBlock::read(file, digits, text_at, id_end)?;
    let kind = ExtentKind::Sparse(Box::new(sparse));
    let extents = vec![Extent { start: 0, len: size, file: 0, kind }];
    Ok(Opened { descriptor, text_at, id_block, size, extents, parent_changed: false })
}

fn open_descriptor<F: Store>(file: &F) -> Result<Opened, Error> {
    let len = file.len().map_err(Error::io("find the image's length"))?;
    // One byte more than is allowed tells that it is too long.
    let mut text = vec![0; len.min(TEXT_MAX as u64 + 1) as usize];
    file.read_at(0, &mut text).map_err(Error::io("read the descriptor"))?;
    let descriptor = Descriptor::parse(&text)?;
    if descriptor.lines.is_empty() {
        return corrupt("invalid VMDK image descriptor: no extents", 0);
    }
    let size = descriptor.size();
    let digits = (descriptor.cid_at as u64, descriptor.cid_len as u64);
    let id_block = IdBlock::read(file, digits, 0, len)?;
    let extents = Vec::new();
    Ok(Opened { descriptor, text_at: 0, id_block, size, extents, parent_changed: false })
}

fn open_flat<F: Store>(file: &F, sector: u64, len: u64) -> Result<u64, Error> {
    let at = sector << SECTOR_BITS;
    let file_len = file.len().map_err(Error::io("find the extent's length"))?;
    if at + len > file_len.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX) {
        return corrupt("VMDK flat extent is longer than its file", file_len);
    }
    Ok(at)
}

/// Reads a sparse extent's header and directories.
///
/// # Errors
///
/// As [`open`].
pub fn open_sparse<F: Store>(file: &F) -> Result<Sparse, Error> {
    let file_len = file.len().map_err(Error::io("find the extent's length"))?;
    let mut sector = [0; SECTOR as usize];
    let there = &mut sector[..file_len.min(SECTOR) as usize];
    file.read_at(0, there).map_err(Error::io("read the header"))?;
    let mut header = Header::parse(there)?;
    let has_footer = header.directory_at == AT_END;
    if has_footer {
        header = read_footer(file, &header, file_len)?;
    }
    if header.is_compressed() && header.flags & MARKERS == 0 {
        return Err(Error::Unsupported("VMDK compressed grains without markers".into()));
    }
    if header.overhead.checked_mul(SECTOR).is_none_or(|at| at > file_len) {
        let least = header.overhead.saturating_mul(SECTOR);
        return Err(Error::Invalid(format!("File truncated, expecting at least {least} bytes")));
    }
    if has_footer || [0, header.directory_at].contains(&header.redundant_at) {
        // A stream has one directory, whatever its flags; and one is not two.
        header.flags &= !REDUNDANT;
    }
    let (mut redundant, mut redundant_lost) = (None, false);
    if header.flags & REDUNDANT != 0 {
        // Nothing is ever read from it but by a repair: an image can do without.
        let sound = !header.overlaps_itself();
        let entries = sound.then(|| read_directory(file, &header, header.redundant_at, file_len));
        match entries {
            Some(Ok(entries)) => redundant = Some(entries),
            Some(Err(error @ Error::Io { .. })) => return Err(error),
            _ => {
                redundant_lost = true;
                header.flags &= !REDUNDANT;
            }
        }
    }
    if header.overlaps_itself() {
        return corrupt("VMDK header, descriptor and grain directories overlap", 28);
    }
    let directory = read_directory(file, &header, header.directory_at, file_len)?;
    let has_fixed_len = file.has_fixed_len();
    Ok(Sparse { header, directory, redundant, redundant_lost, file_len, has_fixed_len, has_footer })
}

/// How far from a stream's end its footer may be, in bytes: some programs write zeros behind it.
const FOOTER_REACH: u64 = 1 << 20;

/// The footer: the last sector that is not zeros, behind its marker. (The end of the stream is
/// marked by zeros, which some programs leave away, and others write more of.) What it says counts,
/// whatever the header said when the stream was begun.
fn read_footer<F: Store>(file: &F, header: &Header, file_len: u64) -> Result<Header, Error> {
    let end = file_len & !(SECTOR - 1);
    let from = end.saturating_sub(FOOTER_REACH).max(SECTOR).min(end);
    let mut bytes = vec![0; (end - from) as usize];
    file.read_at(from, &mut bytes).map_err(Error::io("read the footer"))?;
    let (sectors, _) = bytes.as_chunks::<{ SECTOR as usize }>();
    let last = sectors.iter().rposition(|sector| sector.iter().any(|&byte| byte != 0));
    let Some(marker) = last.and_then(|last| last.checked_sub(1)) else {
        return corrupt("VMDK stream has no footer", end);
    };
    let at = from + marker as u64 * SECTOR;
    if Marker::parse(&sectors[marker]) != Some(Marker::Footer) {
        return corrupt("VMDK stream has no footer", at);
    }
    let footer = Header::parse(&sectors[marker + 1])?;
    let same = |h: &Header| (h.grain_bits, h.table_bits, h.is_compressed());
    if footer.directory_at == AT_END || same(&footer) != same(header) {
        return corrupt("VMDK footer is not that of the header", at);
    }
    // Where the descriptor is, the header knows best.
    let Header { descriptor_at, descriptor_len, overhead, .. } = *header;
    Ok(Header { descriptor_at, descriptor_len, overhead, ..footer })
}

fn read_directory<F: Store>(
    file: &F,
    header: &Header,
    sector: u64,
    file_len: u64,
) -> Result<Vec<u32>, Error> {
    let entries = header.directory_entries().next_multiple_of(SECTOR_ENTRIES);
    let end = sector.checked_add(entries / SECTOR_ENTRIES);
    if sector == 0 || end.is_none_or(|end| end > file_len.div_ceil(SECTOR)) {
        return corrupt("VMDK grain directory lies outside the file", 56);
    }
    read_entries(file, sector << SECTOR_BITS, entries as usize)
}

/// Reads `count` entries of a directory or table.
pub(crate) fn read_entries<F: Store>(file: &F, at: u64, count: usize) -> Result<Vec<u32>, Error> {
    let mut bytes = vec![0; count * 4];
    file.read_at(at, &mut bytes).map_err(Error::io("read a grain directory"))?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry)).collect())
}
