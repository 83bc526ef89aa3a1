//! Opening one QED image: header, backing file name, L1 table.
//!
//! The order of an open for writing is fixed. Unknown autoclear bits go first, since any later
//! write could break what they promise. Then an image marked [`NEED_CHECK`] is checked and
//! repaired; one that cannot be is not opened for writing. An open for reading writes nothing and
//! takes a marked image as it is.
//!
//! [`NEED_CHECK`]: crate::qed::disk::layout::NEED_CHECK

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::parts::entries::read_entries;
use crate::parts::length::file_len;
use crate::qed::disk::layout::{Bounds, Geometry, HEADER_BLOCK, Header};
use crate::qed::rest::check::{self, Repair};

pub use crate::parts::access::Access;

/// [`Opened::l1`] is filled up to a multiple of this many entries, 4 KiB, so that any part of it
/// can be written back as whole sectors of any disk. Every table's size is a multiple of it too.
pub const L1_BLOCK_ENTRIES: u64 = 512;

/// The metadata of an open image that the driver keeps in memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Opened {
    /// The header as it is on disk.
    pub header: Header,
    /// The part of the L1 table that the disk's size needs, rounded up to whole
    /// [`L1_BLOCK_ENTRIES`]: at most 2^21 entries, 16 MiB. As on disk: an entry has to pass
    /// [`Bounds::l1_entry`] before use.
    pub l1: Vec<u64>,
    /// The file's length in bytes when it was opened, after any repair; as [`file_len`] has it.
    pub file_len: u64,
    /// Does the file keep its length, as a block device does? Then there is no room for clusters more.
    pub has_fixed_len: bool,
    /// The backing file's name as the image spells it, up to its first NUL; never empty.
    pub backing_name: Option<Vec<u8>>,
}

impl Opened {
    /// Cluster and table sizes.
    #[inline]
    pub fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// What an entry may point at, as long as the file keeps the length it was opened with.
    #[inline]
    pub fn bounds(&self) -> Bounds {
        self.header.bounds(self.file_len)
    }

    /// Where the next new cluster goes: the file's end, rounded up. Rounding down would give a
    /// cluster to somebody with the bytes of a cut-off write in it.
    ///
    /// `None` if there is no room below the largest file offset.
    #[inline]
    pub fn next_cluster(&self) -> Option<u64> {
        let size = self.geometry().cluster_size();
        self.file_len.checked_next_multiple_of(size).filter(|&at| at <= i64::MAX as u64 - size)
    }
}

/// Opens the image in `file`.
///
/// # Errors
///
/// What [`Header::parse`] says; [`Error::Corrupt`] for a marked image that cannot be repaired;
/// [`Error::Io`].
pub fn open<F: Store>(file: &F, access: Access) -> Result<Opened, Error> {
    let mut header = read_header(file)?;
    let backing_name = read_backing_name(file, &header)?;
    if access != Access::Read {
        if header.autoclear_features != 0 {
            header.autoclear_features = 0;
            write_header(file, &header)?;
        }
        if header.needs_check() && access == Access::Write {
            let report = check::check(file, Repair::All)?;
            if !report.is_sound() {
                return Err(Error::Corrupt {
                    what: "QED image needs a check, and it found errors that cannot be repaired",
                    at: 0,
                });
            }
            header = read_header(file)?;
        }
    }
    let l1 = read_l1(file, &header)?;
    let file_len = file_len(file)?;
    let has_fixed_len = file.has_fixed_len();
    Ok(Opened { header, l1, file_len, has_fixed_len, backing_name })
}

/// Reads and parses the header.
pub fn read_header<F: Store>(file: &F) -> Result<Header, Error> {
    let mut block = [0; HEADER_BLOCK];
    let file_len = file_len(file)?;
    let there = &mut block[..file_len.min(HEADER_BLOCK as u64) as usize];
    file.read_at(0, there).map_err(Error::io("read the header"))?;
    Header::parse(there, file_len)
}

/// Writes the header and makes it stable.
pub fn write_header<F: Store>(file: &F, header: &Header) -> Result<(), Error> {
    file.write_at(0, &header.encode()).map_err(Error::io("write the header"))?;
    file.flush().map_err(Error::io("flush the header"))
}

/// The backing file's name, up to its first NUL as C programs read it.
pub fn read_backing_name<F: Store>(file: &F, header: &Header) -> Result<Option<Vec<u8>>, Error> {
    let Some(at) = header.backing_name else { return Ok(None) };
    let mut name = vec![0; at.len as usize];
    file.read_at(at.offset.into(), &mut name).map_err(Error::io("read the backing file's name"))?;
    let len = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    if len == 0 {
        return Err(Error::Corrupt {
            what: "QED backing file name is empty",
            at: at.offset.into(),
        });
    }
    name.truncate(len);
    Ok(Some(name))
}

fn read_l1<F: Store>(file: &F, header: &Header) -> Result<Vec<u64>, Error> {
    let entries = header.l1_entries().next_multiple_of(L1_BLOCK_ENTRIES);
    assert!(entries <= header.geometry.table_entries(), "a table has whole blocks of entries");
    let l1 = header.l1_offset.0;
    read_entries(file, l1, entries as usize, u64::from_le_bytes, "read the L1 table")
}
