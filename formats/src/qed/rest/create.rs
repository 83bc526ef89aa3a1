//! Making an empty QED image: a header cluster and an L1 table of zeros.
//!
//! [`Options::header`] checks everything there is to check, [`write()`] writes. Nothing is written
//! before all options are known to be valid.

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::qed::disk::layout::{BadGeometry, CLUSTER_MAX, CLUSTER_MIN, Geometry, Header};
use crate::qed::disk::layout::{SECTOR, TABLE_CLUSTERS_MAX};

/// Cluster size in bytes unless the user says otherwise; QEMU's.
pub const DEFAULT_CLUSTER_SIZE: u64 = 64 << 10;
/// Table size in clusters unless the user says otherwise; QEMU's.
pub const DEFAULT_TABLE_CLUSTERS: u64 = 4;

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options<'a> {
    /// The disk's size in bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// Bytes in a cluster: a power of two, 4 KiB to 64 MiB.
    pub cluster_size: u64,
    /// Clusters in a table: a power of two, 1 to 16.
    pub table_clusters: u64,
    /// The backing file's name as it shall be in the image.
    pub backing_name: Option<&'a [u8]>,
    /// The backing file is raw and must never be probed.
    pub backing_is_raw: bool,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Options {
            size: 0,
            cluster_size: DEFAULT_CLUSTER_SIZE,
            table_clusters: DEFAULT_TABLE_CLUSTERS,
            backing_name: None,
            backing_is_raw: false,
        }
    }
}

impl Options<'_> {
    /// The header of such an image.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], naming the option and what is legal.
    pub fn header(&self) -> Result<Header, Error> {
        let geometry = match Geometry::new(self.cluster_size, self.table_clusters) {
            Ok(geometry) => geometry,
            Err(BadGeometry::Cluster) => {
                return Err(Error::Invalid(format!(
                    "QED cluster size must be within range [{CLUSTER_MIN}, {CLUSTER_MAX}] \
                     and power of 2"
                )));
            }
            Err(BadGeometry::Table) => {
                return Err(Error::Invalid(format!(
                    "QED table size must be within range [1, {TABLE_CLUSTERS_MAX}] and power of 2"
                )));
            }
        };
        let size = self.size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
        Header::new(geometry, size, self.backing_name.map(|name| (name, self.backing_is_raw)))
    }
}

/// Writes an empty image with this header over whatever is in `file`, and makes it stable.
///
/// # Errors
///
/// [`Error::Io`]; the file's contents are then undefined, and they are no QED image: the header
/// is written last. [`Error::Unsupported`] for a block device: QED takes new clusters from the end
/// of a file that can grow.
pub fn write<F: Store>(file: &F, header: &Header) -> Result<(), Error> {
    let end = header.l1_offset.0 + header.geometry.table_bytes();
    file.set_len(0).map_err(Error::io("empty the file"))?;
    if file.len().map_err(Error::io("find the file's length"))? != 0 {
        return Err(Error::Unsupported("QED images cannot be made on a block device".into()));
    }
    file.set_len(end).map_err(Error::io("set the file's length"))?;
    file.flush().map_err(Error::io("flush the tables"))?;
    file.write_at(0, &header.encode()).map_err(Error::io("write the header"))?;
    file.flush().map_err(Error::io("flush the header"))
}
