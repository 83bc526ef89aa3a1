//! Opening one qcow2 image: header, L1 table, and for writing the refcount and snapshot tables.
//!
//! The order of an open for writing is fixed. First everything is read that may be refused, so
//! that nothing is written to an image that does not open. Then unknown autoclear bits go, since
//! any later write could break what they promise. Then an image marked as dirty is repaired; one
//! that cannot be is not opened for writing. Last, the bitmaps are marked as in use
//! ([`bitmap::mark_in_use`]): nobody keeps them up to date from here on.
//!
//! An open for reading writes nothing and takes a dirty or corrupt image as it is.

use cowbell_engine::store::Store;
use cowbell_engine::units::HostOffset;

use crate::error::Error;
use crate::parts::entries::read_entries;
use crate::qcow2::disk::header::{AUTOCLEAR_KNOWN, HEADER_BYTES_NEW, Header, SECTOR};
use crate::qcow2::disk::layout::Geometry;
use crate::qcow2::disk::snapshot_table::{self, Snapshot};
use crate::qcow2::rest::bitmap::{self, Bitmap};
use crate::qcow2::rest::check::{self, Repair};

pub use crate::parts::access::Access;

/// The metadata of an open image that a driver keeps in memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Opened {
    /// The header as it is on disk.
    pub header: Header,
    /// The active L1 table, all [`Header::l1_size`] entries of it: at least what the disk's size
    /// needs, at most 32 MiB. As on disk but in our byte order: an entry has to be decoded before
    /// use.
    pub l1: Vec<u64>,
    /// The refcount table, whole: at most 8 MiB; likewise. Empty if opened for reading.
    pub refcount_table: Vec<u64>,
    /// The refcounts of the file's first clusters, as many as are looked at at once: a small image's
    /// first allocation need not wait for them. Empty if opened for reading, or not to be had.
    pub first_counts: Vec<u8>,
    /// The snapshots; their tables are not looked at. Empty if opened for reading.
    pub snapshots: Vec<Snapshot>,
    /// The bitmaps as they were before this open marked them. Empty if opened for reading.
    pub bitmaps: Vec<Bitmap>,
    /// The file's length in bytes when it was opened, after any repair; any number.
    pub file_len: u64,
}

impl Opened {
    /// The sizes that follow from the header.
    #[inline]
    pub fn geometry(&self) -> Geometry {
        self.header.geometry()
    }

    /// The first whole cluster at or behind the file's end; `None` if the largest file offset
    /// comes before its end.
    pub fn next_cluster(&self) -> Option<HostOffset> {
        let size = self.header.cluster_size();
        let at = self.file_len.checked_next_multiple_of(size)?;
        (at <= i64::MAX as u64 - size).then_some(HostOffset(at))
    }
}

/// Opens the image in `file`.
///
/// # Errors
///
/// What [`Header::parse`] and [`Header::check_tables`] say. For writing also [`Error::Corrupt`]
/// for an image marked as corrupt, for one that is dirty and cannot be repaired, and for bad
/// snapshot and bitmap tables. [`Error::Io`].
pub fn open<F: Store>(file: &F, access: Access) -> Result<Opened, Error> {
    let mut opened = load(file, access)?;
    if access == Access::Read {
        return Ok(opened);
    }
    if opened.header.is_corrupt() {
        let what = "qcow2: Image is corrupt; cannot be opened read/write";
        return Err(Error::Corrupt { what, at: 72 });
    }
    if opened.header.has_data_file() && opened.header.data_file_name().is_none() {
        return Err(Error::Invalid("'data-file' is required for this image".into()));
    }
    let bitmaps = bitmap::read(file, &opened.header)?;
    clear_unknown_autoclear(file, &mut opened.header)?;
    if opened.header.is_dirty() && access == Access::Write {
        if !check::check(file, Repair::All)?.is_sound() {
            let what = "qcow2: Image is dirty, and a check found errors that cannot be repaired";
            return Err(Error::Corrupt { what, at: 72 });
        }
        opened = load(file, access)?;
    }
    bitmap::mark_in_use(file, &bitmaps)?;
    opened.first_counts = first_counts(file, &opened);
    opened.bitmaps = bitmaps;
    Ok(opened)
}

/// Reads what an image keeps in memory; writes nothing.
fn load<F: Store>(file: &F, access: Access) -> Result<Opened, Error> {
    let header = describe_header(file)?;
    if access != Access::Read {
        header.refuse_encryption()?;
    }
    header.check_tables()?;
    let file_len = file.len().map_err(Error::io("find the image's length"))?;
    let entries = header.l1_size as usize;
    let l1 = read_words(file, header.l1_offset, entries, "read the L1 table")?;
    let (mut refcount_table, mut snapshots) = (Vec::new(), Vec::new());
    if access != Access::Read {
        let entries = header.refcount_table_bytes() as usize / 8;
        let at = header.refcount_table_offset;
        refcount_table = read_words(file, at, entries, "read the refcount table")?;
        snapshots = snapshot_table::read(file, &header)?;
    }
    let (first_counts, bitmaps) = (Vec::new(), Vec::new());
    Ok(Opened { header, l1, refcount_table, first_counts, snapshots, bitmaps, file_len })
}

/// What is at the start of the first refcount block. Whatever is wrong with it is told to who needs
/// it.
fn first_counts<F: Store>(file: &F, opened: &Opened) -> Vec<u8> {
    let block = opened.refcount_table.first().copied().unwrap_or(0);
    if block == 0 || !opened.geometry().is_aligned(block) || block >= opened.file_len {
        return Vec::new();
    }
    let mut counts = vec![0; 1 << opened.geometry().slice_bits()];
    file.read_at(block, &mut counts).map_or(Vec::new(), |()| counts)
}

/// Reads and parses the header. Where the tables are is not looked at.
///
/// # Errors
///
/// What [`Header::parse`] and [`Header::refuse_encryption`] say; [`Error::Io`].
pub fn read_header<F: Store>(file: &F) -> Result<Header, Error> {
    let header = describe_header(file)?;
    header.refuse_encryption()?;
    Ok(header)
}

/// As [`read_header`], but of encrypted images too: enough to describe them.
///
/// # Errors
///
/// What [`Header::parse`] says; [`Error::Io`].
pub fn describe_header<F: Store>(file: &F) -> Result<Header, Error> {
    let file_len = file.len().map_err(Error::io("find the image's length"))?;
    let read = |len: u64| {
        let mut first = vec![0; len as usize];
        file.read_at(0, &mut first).map_err(Error::io("read the header"))?;
        Ok(first)
    };
    let bits = Header::cluster_bits_of(&read(file_len.min(SECTOR))?)?;
    // What a file misses of its first cluster is zeros, as it will be when the file grows; but the
    // fields have to be there.
    let fields = HEADER_BYTES_NEW as u64;
    Header::parse(&read(if file_len < fields { file_len } else { 1 << bits })?)
}

/// Writes the header's first sector, which holds every field, and makes it stable.
///
/// # Errors
///
/// [`Error::Io`].
pub fn write_fields<F: Store>(file: &F, header: &Header) -> Result<(), Error> {
    file.write_at(0, &header.sector()).map_err(Error::io("write the header"))?;
    file.flush().map_err(Error::io("flush the header"))
}

/// Clears the autoclear bits that we know nothing of, in memory and on disk: before anything else
/// is written.
///
/// # Errors
///
/// [`Error::Io`].
pub fn clear_unknown_autoclear<F: Store>(file: &F, header: &mut Header) -> Result<(), Error> {
    if header.autoclear & !AUTOCLEAR_KNOWN == 0 {
        return Ok(());
    }
    header.autoclear &= AUTOCLEAR_KNOWN;
    write_fields(file, header)
}

/// Reads `count` table words from `at` on.
///
/// # Errors
///
/// [`Error::Io`].
pub fn read_words<F: Store>(
    file: &F,
    at: u64,
    count: usize,
    doing: &'static str,
) -> Result<Vec<u64>, Error> {
    read_entries(file, at, count, u64::from_be_bytes, doing)
}
