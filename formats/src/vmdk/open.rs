//! Opening a VMDK image: its descriptor, then its extents.
//!
//! In two stages, because the extents are files that somebody has to be allowed to open. [`open`]
//! looks at the image's own file and says which others there are; [`Opened::complete`] reads their
//! headers and grain directories. Neither writes anything.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::vmdk::descriptor::{Descriptor, Kind, TEXT_MAX};
use crate::vmdk::layout::{
    AT_END, Bounds, COWD_MAGIC, Header, MAGIC, MARKERS, Marker, REDUNDANT, SECTOR, SECTOR_BITS,
    SESPARSE_MAGIC, corrupt,
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
    /// The disk's size in bytes.
    pub size: u64,
    /// The extents, in the disk's order and without gaps. Of images with other files, none before
    /// [`Opened::complete`].
    pub extents: Vec<Extent>,
    /// The parent is not the one that this image was made for: it has changed since. Whoever
    /// opened it says so.
    pub parent_changed: bool,
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

/// How an extent is kept.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// As it is, from this byte of the file on.
    Flat(u64),
    /// In grains.
    Sparse(Box<Sparse>),
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
    /// The file's length in bytes when it was opened.
    pub file_len: u64,
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
    /// The names of the image's other files.
    pub fn files(&self) -> Vec<&Path> {
        if self.descriptor.kind.is_embedded() {
            return Vec::new();
        }
        self.descriptor.lines.iter().map(|line| Path::new(OsStr::from_bytes(&line.name))).collect()
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
        if self.descriptor.kind.is_embedded() {
            return Ok(());
        }
        self.extents.clear();
        let (mut start, mut entries) = (0, 0);
        for (i, (line, file)) in self.descriptor.lines.iter().zip(more).enumerate() {
            let len = line.sectors << SECTOR_BITS;
            let name = Path::new(OsStr::from_bytes(&line.name)).to_path_buf();
            let part = |error| Error::Part(name.clone(), Box::new(error));
            let kind = match line.flat_at {
                Some(at) => ExtentKind::Flat(open_flat(file, at, len).map_err(part)?),
                None => {
                    let sparse = open_sparse(file).map_err(part)?;
                    if sparse.header.is_compressed() {
                        let what = "VMDK compressed extents of an image of several files";
                        return Err(part(Error::Unsupported(what.into())));
                    }
                    if sparse.header.capacity != line.sectors || len == 0 {
                        let what = "VMDK extent is not of the size that the descriptor says";
                        return Err(part(Error::Corrupt { what, at: 12 }));
                    }
                    entries += sparse.directory.len() as u64;
                    ExtentKind::Sparse(Box::new(sparse))
                }
            };
            if entries > DIRECTORIES_MAX {
                return Err(Error::Limit("VMDK grain directories are too large".into()));
            }
            self.extents.push(Extent { start, len, file: i + 1, kind });
            start += len;
        }
        Ok(())
    }

    /// Can this image be written?
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`], saying what stands in the way.
    pub fn check_writable(&self) -> Result<(), Error> {
        let no = |why: &str| Err(Error::Unsupported(why.into()));
        for extent in &self.extents {
            let ExtentKind::Sparse(sparse) = &extent.kind else { continue };
            let header = &sparse.header;
            if header.version == 3 && !header.is_compressed() {
                return no("VMDK version 3 must be read only");
            }
            if header.table_bytes() < SECTOR {
                return no("VMDK grain tables smaller than a sector: the image is read-only");
            }
            if sparse.has_footer && sparse.end_of_stream() != sparse.file_len.div_ceil(SECTOR) {
                return no("VMDK stream with something between its directory and its footer");
            }
        }
        Ok(())
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
    let descriptor = Descriptor::parse(&text)?;
    if !descriptor.kind.is_embedded() {
        return corrupt("VMDK descriptor inside an extent is of another type", text_at);
    }
    if (descriptor.kind == Kind::StreamOptimized) != header.is_compressed() {
        return corrupt("VMDK descriptor and header disagree about compression", text_at);
    }
    let size = header.capacity << SECTOR_BITS;
    let kind = ExtentKind::Sparse(Box::new(sparse));
    let extents = vec![Extent { start: 0, len: size, file: 0, kind }];
    Ok(Opened { descriptor, text_at, size, extents, parent_changed: false })
}

fn open_descriptor<F: Store>(file: &F) -> Result<Opened, Error> {
    let len = file.len().map_err(Error::io("find the image's length"))?;
    // One byte more than is allowed tells that it is too long.
    let mut text = vec![0; len.min(TEXT_MAX as u64 + 1) as usize];
    file.read_at(0, &mut text).map_err(Error::io("read the descriptor"))?;
    let descriptor = Descriptor::parse(&text)?;
    if descriptor.kind.is_embedded() {
        return corrupt("VMDK descriptor outside an extent is of another type", 0);
    }
    if descriptor.lines.is_empty() {
        return corrupt("invalid VMDK image descriptor: no extents", 0);
    }
    let size = descriptor.size();
    Ok(Opened { descriptor, text_at: 0, size, extents: Vec::new(), parent_changed: false })
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
    if has_footer {
        // A stream has one directory, whatever its flags.
        header.flags &= !REDUNDANT;
    }
    if header.overlaps_itself() {
        return corrupt("VMDK header, descriptor and grain directories overlap", 28);
    }
    let directory = read_directory(file, &header, header.directory_at, file_len)?;
    let redundant = match header.flags & REDUNDANT {
        0 => None,
        _ => Some(read_directory(file, &header, header.redundant_at, file_len)?),
    };
    Ok(Sparse { header, directory, redundant, file_len, has_footer })
}

/// The footer: between its marker and the end of the stream.
fn read_footer<F: Store>(file: &F, header: &Header, file_len: u64) -> Result<Header, Error> {
    let mut end = [0; 3 * SECTOR as usize];
    let at = (file_len & !(SECTOR - 1)).checked_sub(end.len() as u64);
    let Some(at) = at.filter(|&at| at >= SECTOR) else {
        return corrupt("VMDK stream has no footer", 0);
    };
    file.read_at(at, &mut end).map_err(Error::io("read the footer"))?;
    let [marker, footer, last] =
        [0, 1, 2].map(|i| &end[i * SECTOR as usize..(i + 1) * SECTOR as usize]);
    let ends = Marker::parse(last) == Some(Marker::EndOfStream);
    if Marker::parse(marker) != Some(Marker::Footer) || !ends {
        return corrupt("VMDK stream has no footer", at);
    }
    let footer = Header::parse(footer)?;
    let same = |h: &Header| (h.capacity, h.grain_bits, h.table_bits, h.flags & !REDUNDANT);
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
