//! Making a qcow2 image.
//!
//! [`Options::plan`] checks everything there is to check and works out where everything goes;
//! [`Plan::write`] writes it. A new image is laid out without gaps: header, refcount table,
//! refcount blocks, L1 table, then, where space is preallocated, L2 tables and data. So every
//! cluster of the file has one reference, and the refcounts need no search.
//!
//! The header is written last, after a flush: a crash before leaves no image.

use cowbell_engine::store::Store;
use cowbell_engine::units::HostOffset;

use crate::error::Error;
use crate::preallocation::{Preallocation, preallocate};
use crate::qcow2::disk::header::{
    AUTOCLEAR_RAW_DATA, COMPAT_LAZY_REFCOUNTS, Compression, EXT_BACKING_FORMAT, EXT_DATA_FILE,
    EXT_FEATURE_NAMES, Header, INCOMPAT_COMPRESSION, INCOMPAT_DATA_FILE, INCOMPAT_EXTENDED_L2,
    L1_BYTES_MAX, OFFSET_MAX, REFTABLE_BYTES_MAX, SECTOR, feature_name_table,
};
use crate::qcow2::disk::layout::{Geometry, L1Entry, L2Entry};
use crate::qcow2::rest::open::write_fields;

/// Cluster size in bytes unless the user says otherwise; QEMU's.
pub const DEFAULT_CLUSTER_SIZE: u64 = 64 << 10;
/// Bits in a refcount unless the user says otherwise; QEMU's.
pub const DEFAULT_REFCOUNT_BITS: u64 = 16;

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options<'a> {
    /// The disk's size in bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes in a cluster: a power of two, 512 to 2 MiB.
    pub cluster_size: u64,
    /// Bits in a refcount: a power of two, 1 to 64.
    pub refcount_bits: u64,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// L2 entries have subclusters.
    pub extended_l2: bool,
    /// How compressed clusters will be compressed.
    pub compression: Compression,
    /// The backing file's name as it shall be in the image, and its format's.
    pub backing: Option<(&'a [u8], &'a str)>,
    /// The data file's name as it shall be in the image.
    pub data_file: Option<&'a [u8]>,
    /// The data file is the disk, byte for byte.
    pub data_file_raw: bool,
    /// How to take the space.
    pub preallocation: Preallocation,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Options {
            size: 0,
            version: 3,
            cluster_size: DEFAULT_CLUSTER_SIZE,
            refcount_bits: DEFAULT_REFCOUNT_BITS,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
        }
    }
}

/// Where everything of a new image goes. In clusters, unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The header.
    pub header: Header,
    preallocation: Preallocation,
    /// Refcount blocks, from [`Plan::blocks_at`] on.
    blocks: u64,
    l2_tables: u64,
    l2_at: u64,
    /// Clusters of data that the L2 tables map, in this file or in the data file.
    data: u64,
    /// Where they are in this file.
    data_at: u64,
    /// All clusters of this file.
    total: u64,
    /// Its length in bytes.
    file_len: u64,
}

fn invalid<T>(what: &str) -> Result<T, Error> {
    Err(Error::Invalid(what.into()))
}

impl Options<'_> {
    /// The image that they ask for.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], naming the option; [`Error::Limit`] if the image would be too large.
    pub fn plan(&self) -> Result<Plan, Error> {
        self.check()?;
        let order = self.refcount_bits.trailing_zeros();
        let mut header = Header::new(self.version, self.cluster_size.trailing_zeros(), order);
        let size = self.size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
        header.size = size;
        if self.extended_l2 {
            header.set_incompatible(INCOMPAT_EXTENDED_L2, true);
        }
        if self.data_file.is_some() {
            header.set_incompatible(INCOMPAT_DATA_FILE, true);
        }
        if self.compression != Compression::Zlib {
            header.compression = self.compression;
            header.set_incompatible(INCOMPAT_COMPRESSION, true);
        }
        header.compatible |= if self.lazy_refcounts { COMPAT_LAZY_REFCOUNTS } else { 0 };
        header.autoclear |= if self.data_file_raw { AUTOCLEAR_RAW_DATA } else { 0 };
        // No room for names in small clusters.
        let names = (self.version > 2 && self.cluster_size > 4096).then(feature_name_table);
        let format = self.backing.map(|(_, format)| format.as_bytes());
        let extensions = [
            (EXT_BACKING_FORMAT, format),
            (EXT_DATA_FILE, self.data_file),
            (EXT_FEATURE_NAMES, names.as_deref()),
        ];
        header.lay_out(self.backing.map(|(name, _)| name), &extensions)?;
        Plan::new(header, self.preallocation)
    }

    fn check(&self) -> Result<(), Error> {
        assert!(self.version == 2 || self.version == 3, "version {}", self.version);
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return invalid("Cluster size must be a power of two between 512 and 2048k");
        }
        if self.version < 3 {
            let needs = |what| invalid::<()>(&format!("{what} (use version=v3 or greater)"));
            let above = "compatibility level 1.1 and above";
            if self.data_file.is_some() {
                return needs(format!("External data files are only supported with {above}"));
            }
            if self.lazy_refcounts {
                return needs(format!("Lazy refcounts only supported with {above}"));
            }
            if self.extended_l2 {
                return needs(format!("Extended L2 entries are only supported with {above}"));
            }
            if self.compression != Compression::Zlib {
                return needs(format!("Non-zlib compression type is only supported with {above}"));
            }
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return invalid("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if self.version < 3 && self.refcount_bits != DEFAULT_REFCOUNT_BITS {
            return invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            );
        }
        if self.extended_l2 && self.cluster_size < 16384 {
            return invalid(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            );
        }
        if self.data_file_raw && self.data_file.is_none() {
            return invalid("data-file-raw requires data-file");
        }
        if self.data_file_raw && self.backing.is_some() {
            return invalid("Backing file and data-file-raw cannot be used at the same time");
        }
        let preallocates = self.preallocation != Preallocation::Off;
        if self.backing.is_some() && preallocates && !self.extended_l2 {
            return invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 \
                 is on",
            );
        }
        Ok(())
    }
}

fn too_large() -> Error {
    Error::Limit(
        "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
            .into(),
    )
}

impl Plan {
    /// Lays out an image with this header.
    fn new(mut header: Header, preallocation: Preallocation) -> Result<Plan, Error> {
        let geometry = header.geometry();
        let cluster_size = geometry.cluster_size();
        let l1_size = geometry.l1_entries(header.size);
        if header.size > OFFSET_MAX || l1_size > L1_BYTES_MAX / 8 {
            return Err(too_large());
        }
        // A raw data file is the disk from the start: every cluster is mapped, or a program that
        // reads only the file and one that reads the tables could see two disks.
        let raw = header.autoclear & AUTOCLEAR_RAW_DATA != 0;
        let (mut l2_tables, mut data) = (0, 0);
        if preallocation != Preallocation::Off || raw {
            (l2_tables, data) = (l1_size, header.size.div_ceil(cluster_size));
        }
        let data_here = if geometry.has_data_file() { 0 } else { data };
        let l1_clusters = (l1_size * 8).div_ceil(cluster_size);
        let rest = 1 + l1_clusters + l2_tables + data_here;
        let (blocks, table) = refcount_clusters(geometry, rest);
        if table * cluster_size > REFTABLE_BYTES_MAX {
            return Err(too_large());
        }
        let total = rest + blocks + table;
        if total.checked_mul(cluster_size).is_none_or(|len| len > OFFSET_MAX) {
            return Err(too_large());
        }
        let l1_at = 1 + table + blocks;
        (header.refcount_table_offset, header.refcount_table_clusters) =
            (cluster_size, table as u32);
        header.l1_size = l1_size as u32;
        header.l1_offset = if l1_size > 0 { l1_at * cluster_size } else { 0 };
        let l2_at = l1_at + l1_clusters;
        // As QEMU leaves it: the file ends with what was written last.
        let file_len =
            if l2_tables > 0 { total * cluster_size } else { l1_at * cluster_size + l1_size * 8 };
        let data_at = l2_at + l2_tables;
        Ok(Plan { header, preallocation, blocks, l2_tables, l2_at, data, data_at, total, file_len })
    }

    /// Writes the image over whatever is in `file`, and makes it stable. A data file is not
    /// touched.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]; the file's contents are then undefined, and they are no qcow2 image.
    pub fn write<F: Store>(&self, file: &F) -> Result<(), Error> {
        const DOING: &str = "write the image's tables";
        let size = self.header.cluster_size();
        file.set_len(0).map_err(Error::io("empty the file"))?;
        // A block device keeps its length and its bytes.
        if file.len().map_err(Error::io("find the file's length"))? < self.file_len {
            file.set_len(self.file_len).map_err(Error::io("set the file's length"))?;
        }
        let write = |cluster: u64, bytes: &[u8]| {
            let here = (self.file_len - cluster * size).min(bytes.len() as u64) as usize;
            file.write_at(cluster * size, &bytes[..here]).map_err(Error::io(DOING))
        };
        write(0, &vec![0; size as usize])?;
        self.write_refcounts(write)?;
        self.write_map(write)?;
        if self.data > 0 && !self.header.has_data_file() {
            preallocate(file, self.data_at * size, self.data * size, self.preallocation)?;
        }
        file.flush().map_err(Error::io("flush the image's tables"))?;
        // All of the cluster but its first sector, which is what makes it an image.
        let header = self.header.encode();
        let (_, rest) = header.split_at(SECTOR as usize);
        file.write_at(SECTOR, rest).map_err(Error::io("write the header"))?;
        file.flush().map_err(Error::io("flush the header"))?;
        write_fields(file, &self.header)
    }

    /// The disk's size in bytes, a multiple of 512: the length that the data file has to have.
    pub fn disk_size(&self) -> u64 {
        self.header.size
    }

    fn write_refcounts(
        &self,
        write: impl Fn(u64, &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let geometry = self.header.geometry();
        let size = geometry.cluster_size();
        let table_clusters = u64::from(self.header.refcount_table_clusters);
        let blocks_at = 1 + table_clusters;
        let entries = size / 8;
        for cluster in 0..table_clusters {
            let first = cluster * entries;
            let words = (first..first + entries)
                .map(|i| if i < self.blocks { (blocks_at + i) * size } else { 0 });
            write(1 + cluster, &words.flat_map(u64::to_be_bytes).collect::<Vec<_>>())?;
        }
        let per_block = 1u64 << geometry.block_bits();
        let mut bytes = vec![0; size as usize];
        let mut filled = 0;
        for block in 0..self.blocks {
            let count = per_block.min(self.total - block * per_block);
            if count != filled {
                bytes.fill(0);
                for index in 0..count as usize {
                    geometry.set_refcount(&mut bytes, index, 1);
                }
                filled = count;
            }
            write(blocks_at + block, &bytes)?;
        }
        Ok(())
    }

    fn write_map(&self, write: impl Fn(u64, &[u8]) -> Result<(), Error>) -> Result<(), Error> {
        let geometry = self.header.geometry();
        let size = geometry.cluster_size();
        let l1_at = self.header.l1_offset / size;
        let l1_size = u64::from(self.header.l1_size);
        let per_cluster = size / 8;
        for cluster in 0..l1_size.div_ceil(per_cluster) {
            let first = cluster * per_cluster;
            let words = (first..first + per_cluster).map(|i| {
                let table = HostOffset((self.l2_at + i) * size);
                if i < self.l2_tables { L1Entry { table, copied: true }.encode() } else { 0 }
            });
            write(l1_at + cluster, &words.flat_map(u64::to_be_bytes).collect::<Vec<_>>())?;
        }
        let per_table = 1u64 << geometry.l2_bits();
        for table in 0..self.l2_tables {
            let mut bytes = vec![0; size as usize];
            for index in 0..per_table.min(self.data - table * per_table) {
                let data = table * per_table + index;
                let start = if geometry.has_data_file() { 0 } else { self.data_at };
                // With subclusters, a place and no data: the backing file shows.
                let entry = L2Entry::NONE.with_place(HostOffset((start + data) * size));
                entry.write(&mut bytes, index as usize, geometry);
            }
            write(self.l2_at + table, &bytes)?;
        }
        Ok(())
    }
}

/// How many refcount blocks, and clusters of table for them, a file needs that has `rest` other
/// clusters. Both count themselves.
pub(crate) fn refcount_clusters(geometry: Geometry, rest: u64) -> (u64, u64) {
    let per_block = 1u64 << geometry.block_bits();
    let per_table = geometry.cluster_size() / 8;
    let (mut blocks, mut table) = (1, 1);
    loop {
        let more_blocks = (rest + blocks + table).div_ceil(per_block);
        let more_table = more_blocks.div_ceil(per_table);
        if (more_blocks, more_table) == (blocks, table) {
            return (blocks, table);
        }
        (blocks, table) = (more_blocks.max(blocks), more_table.max(table));
    }
}
