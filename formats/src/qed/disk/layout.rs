//! QED on disk: bytes to typed values and back. No I/O.
//!
//! The model: a file is a run of clusters. The header takes the first few; one L1 table and any
//! number of L2 tables, all of the same size, map a guest offset to a data cluster. All integers
//! are little-endian. The file's length is the allocator: new clusters go at the end.
//!
//! The invariant: whatever comes out of this module satisfies the limits written on it, so that
//! nobody above has to look at a raw number from an image again. Nothing here panics, whatever the
//! bytes.
//!
//! Sections named below are those of the QED specification (QEMU's `docs/interop/qed_spec.txt`).

use std::hash::{Hash, Hasher};

use cowbell_engine::units::{GuestOffset, HostOffset};

use crate::error::Error;
use crate::probe::Format;

/// The first four bytes of every image (§ "Header").
pub const MAGIC: [u8; 4] = *b"QED\0";

/// Bytes of the header that have a meaning (§ "Header").
pub const HEADER_BYTES: usize = 64;

/// Where the backing file name's two fields start; without a backing file they are free.
const NAME_FIELDS: usize = 56;

/// The header is read and rewritten as one block of this many bytes, which every disk's sector
/// divides and every legal cluster contains. All but its first 64 bytes never change.
pub const HEADER_BLOCK: usize = 4096;

/// The smallest cluster, in bytes (§ "Header", `cluster_size`).
pub const CLUSTER_MIN: u64 = 1 << 12;
/// The largest cluster, in bytes (§ "Header", `cluster_size`).
pub const CLUSTER_MAX: u64 = 1 << 26;
/// The largest table, in clusters (§ "Header", `table_size`).
pub const TABLE_CLUSTERS_MAX: u64 = 16;
/// A backing file's name is shorter than this, in bytes.
pub const NAME_MAX: usize = 1023;
/// The guest sees whole sectors of this many bytes.
pub const SECTOR: u64 = 512;
/// No offset in a file or a disk is beyond this: the system's file offsets are signed.
pub const OFFSET_MAX: u64 = i64::MAX as u64;

/// The image has a backing file (§ "Feature bits").
pub const BACKING_FILE: u64 = 0x01;
/// The image was not closed cleanly and has to be checked before it is written.
pub const NEED_CHECK: u64 = 0x02;
/// The backing file is raw: do not probe it.
pub const BACKING_FORMAT_NO_PROBE: u64 = 0x04;

const KNOWN_FEATURES: u64 = BACKING_FILE | NEED_CHECK | BACKING_FORMAT_NO_PROBE;

/// The header, checked (§ "Header").
///
/// Holds on to the bytes around its own fields, so that writing it again loses nothing that other
/// programs keep there, the backing file's name included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Cluster and table sizes.
    pub geometry: Geometry,
    /// Clusters that the header takes, at least 1.
    pub header_clusters: u32,
    /// Feature bits; none that is unknown.
    pub features: u64,
    /// Features that a program may ignore; unknown ones are kept.
    pub compat_features: u64,
    /// Features that a program which does not know them must clear before it writes. We know none.
    pub autoclear_features: u64,
    /// Start of the L1 table, on a cluster boundary behind the header.
    pub l1_offset: HostOffset,
    /// The disk's size in bytes, a multiple of 512, at most [`Geometry::max_image_size`].
    pub image_size: u64,
    /// Where the backing file's name is; `None` without [`BACKING_FILE`].
    pub backing_name: Option<NameAt>,
    /// The block's first bytes as they were read, with zeros for the fields above; whole sectors
    /// up to the last that is not zero.
    kept: Vec<u8>,
}

/// Where in the file the backing file's name is. It lies in the header's clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NameAt {
    /// First byte.
    pub offset: u32,
    /// Length in bytes, 1 to [`NAME_MAX`].
    pub len: u32,
}

impl Header {
    /// A header for a new image whose L1 table follows one cluster of header.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the size is no multiple of 512 or more than the geometry can map, or
    /// the name is empty or too long.
    pub fn new(
        geometry: Geometry,
        image_size: u64,
        backing: Option<(&[u8], bool)>,
    ) -> Result<Header, Error> {
        geometry.check_image_size(image_size)?;
        let mut header = Header {
            geometry,
            header_clusters: 1,
            features: 0,
            compat_features: 0,
            autoclear_features: 0,
            l1_offset: HostOffset(geometry.cluster_size()),
            image_size,
            backing_name: None,
            kept: vec![0; SECTOR as usize],
        };
        if let Some((name, is_raw)) = backing {
            if name.is_empty() || name.len() > NAME_MAX || name.contains(&0) {
                return Err(Error::Invalid(format!(
                    "the backing file's name must be 1 to {NAME_MAX} bytes long"
                )));
            }
            header.features |= BACKING_FILE | if is_raw { BACKING_FORMAT_NO_PROBE } else { 0 };
            header.backing_name =
                Some(NameAt { offset: HEADER_BYTES as u32, len: name.len() as u32 });
            header.kept.resize((HEADER_BYTES + name.len()).next_multiple_of(SECTOR as usize), 0);
            header.kept[HEADER_BYTES..][..name.len()].copy_from_slice(name);
        }
        Ok(header)
    }

    /// Parses the first bytes of a file of `file_len` bytes. [`HEADER_BLOCK`] of them, or all
    /// there are, is the amount to give; what is beyond that is not looked at.
    ///
    /// # Errors
    ///
    /// [`Error::NotThisFormat`] without the magic, [`Error::Unsupported`] naming unknown feature
    /// bits, [`Error::Corrupt`] for everything else that cannot be.
    pub fn parse(first: &[u8], file_len: u64) -> Result<Header, Error> {
        if !first.starts_with(&MAGIC) {
            return Err(Error::NotThisFormat(Format::Qed));
        }
        let Some(fields) = first.first_chunk::<HEADER_BYTES>() else {
            return corrupt("QED header is cut short", 0);
        };
        let features = u64_at(fields, 16);
        if features & !KNOWN_FEATURES != 0 {
            let unknown = features & !KNOWN_FEATURES;
            return Err(Error::Unsupported(format!("Unsupported QED features: {unknown:x}")));
        }
        let geometry = match Geometry::new(u32_at(fields, 4).into(), u32_at(fields, 8).into()) {
            Ok(geometry) => geometry,
            Err(BadGeometry::Cluster) => return corrupt("QED cluster size is invalid", 4),
            Err(BadGeometry::Table) => return corrupt("QED table size is invalid", 8),
        };
        let image_size = u64_at(fields, 48);
        if geometry.check_image_size(image_size).is_err() {
            return corrupt("QED image size is invalid", 48);
        }
        let header_clusters = u32_at(fields, 12);
        let header_bytes = u64::from(header_clusters) << geometry.cluster_bits;
        if header_clusters == 0 || header_bytes > file_len {
            return corrupt("QED header size is invalid", 12);
        }
        let bounds = Bounds { geometry, header_bytes, file_len };
        let Some(l1_offset) = bounds.table(u64_at(fields, 40)) else {
            return corrupt("QED table offset is invalid", 40);
        };
        let mut header = Header {
            geometry,
            header_clusters,
            features,
            compat_features: u64_at(fields, 24),
            autoclear_features: u64_at(fields, 32),
            l1_offset,
            image_size,
            backing_name: None,
            kept: kept_bytes(first),
        };
        if features & BACKING_FILE != 0 {
            let name = NameAt { offset: u32_at(fields, 56), len: u32_at(fields, 60) };
            let end = u64::from(name.offset) + u64::from(name.len);
            if name.len == 0 || name.len as usize > NAME_MAX {
                return corrupt("QED backing file name has an invalid length", 60);
            }
            if end > header_bytes || (name.offset as usize) < HEADER_BYTES {
                return corrupt("QED backing file name lies outside the header", 56);
            }
            header.backing_name = Some(name);
            header.kept[NAME_FIELDS..HEADER_BYTES].fill(0);
        }
        Ok(header)
    }

    /// The header block: these fields, and around them what was there when it was read. Writing
    /// it is one write; only its first 64 bytes differ from what is on disk.
    pub fn encode(&self) -> [u8; HEADER_BLOCK] {
        let mut block = [0; HEADER_BLOCK];
        block[..self.kept.len()].copy_from_slice(&self.kept);
        let clusters = |bytes: u64| (bytes >> self.geometry.cluster_bits) as u32;
        block[0..4].copy_from_slice(&MAGIC);
        put_u32(&mut block, 4, self.geometry.cluster_size() as u32);
        put_u32(&mut block, 8, clusters(self.geometry.table_bytes()));
        put_u32(&mut block, 12, self.header_clusters);
        put_u64(&mut block, 16, self.features);
        put_u64(&mut block, 24, self.compat_features);
        put_u64(&mut block, 32, self.autoclear_features);
        put_u64(&mut block, 40, self.l1_offset.0);
        put_u64(&mut block, 48, self.image_size);
        if let Some(name) = self.backing_name {
            put_u32(&mut block, 56, name.offset);
            put_u32(&mut block, 60, name.len);
        }
        block
    }

    /// Is [`NEED_CHECK`] set?
    #[inline]
    pub fn needs_check(&self) -> bool {
        self.features & NEED_CHECK != 0
    }

    /// Sets or clears [`NEED_CHECK`], in memory.
    #[inline]
    pub fn set_needs_check(&mut self, on: bool) {
        self.features = if on { self.features | NEED_CHECK } else { self.features & !NEED_CHECK };
    }

    /// Does the header say that the backing file is raw?
    #[inline]
    pub fn backing_is_raw(&self) -> bool {
        self.features & BACKING_FORMAT_NO_PROBE != 0
    }

    /// Bytes that the header's clusters take: no table and no data is below this.
    #[inline]
    pub fn header_bytes(&self) -> u64 {
        u64::from(self.header_clusters) << self.geometry.cluster_bits
    }

    /// What an entry may point at while the file is `file_len` bytes long.
    #[inline]
    pub fn bounds(&self, file_len: u64) -> Bounds {
        Bounds { geometry: self.geometry, header_bytes: self.header_bytes(), file_len }
    }

    /// How many L1 entries the disk's size needs; see [`Geometry::l1_entries`].
    #[inline]
    pub fn l1_entries(&self) -> u64 {
        self.geometry.l1_entries(self.image_size)
    }
}

/// The fields alone: what was kept around them is as old as the image and never changes.
impl Hash for Header {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.geometry.hash(state);
        self.header_clusters.hash(state);
        self.features.hash(state);
        self.compat_features.hash(state);
        self.autoclear_features.hash(state);
        self.l1_offset.hash(state);
        self.image_size.hash(state);
        self.backing_name.hash(state);
    }
}

/// Cluster and table sizes, and the arithmetic that follows from them.
///
/// Every size is a power of two. Clusters are 4 KiB to 64 MiB, tables 1 to 16 clusters
/// (§ "Header"), so a table has 2^9 to 2^27 entries of 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    cluster_bits: u32,
    table_bits: u32,
}

/// What [`Geometry::new`] has against its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadGeometry {
    /// The cluster size is no power of two from 4 KiB to 64 MiB.
    Cluster,
    /// The table size is no power of two from 1 to 16.
    Table,
}

impl Geometry {
    /// A geometry of clusters of `cluster_size` bytes and tables of `table_clusters` clusters.
    pub fn new(cluster_size: u64, table_clusters: u64) -> Result<Geometry, BadGeometry> {
        if !cluster_size.is_power_of_two() || !(CLUSTER_MIN..=CLUSTER_MAX).contains(&cluster_size) {
            return Err(BadGeometry::Cluster);
        }
        if !table_clusters.is_power_of_two() || table_clusters > TABLE_CLUSTERS_MAX {
            return Err(BadGeometry::Table);
        }
        let cluster_bits = cluster_size.trailing_zeros();
        Ok(Geometry { cluster_bits, table_bits: cluster_bits + table_clusters.trailing_zeros() })
    }

    /// log2 of the cluster size in bytes: 12 to 26.
    #[inline]
    pub fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Bytes in a cluster.
    #[inline]
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes in a table, L1 or L2: at most 1 GiB.
    #[inline]
    pub fn table_bytes(self) -> u64 {
        1 << self.table_bits
    }

    /// Clusters in a table: 1 to 16.
    #[inline]
    pub fn table_clusters(self) -> u64 {
        1 << (self.table_bits - self.cluster_bits)
    }

    /// Entries in a table: 2^9 to 2^27.
    #[inline]
    pub fn table_entries(self) -> u64 {
        1 << (self.table_bits - 3)
    }

    /// Guest bytes that one L2 table maps: 2^21 to 2^53.
    #[inline]
    pub fn l2_span(self) -> u64 {
        1 << (self.table_bits - 3 + self.cluster_bits)
    }

    /// The L1 entry that `guest` belongs to. Only for an offset below the image's size is it
    /// certain to be less than [`table_entries`](Self::table_entries).
    #[inline]
    pub fn l1_index(self, guest: GuestOffset) -> u64 {
        guest.0 >> (self.table_bits - 3 + self.cluster_bits)
    }

    /// The entry of its L2 table that `guest` belongs to.
    #[inline]
    pub fn l2_index(self, guest: GuestOffset) -> u64 {
        (guest.0 >> self.cluster_bits) & (self.table_entries() - 1)
    }

    /// How far into its cluster `guest` lies.
    #[inline]
    pub fn offset_in_cluster(self, guest: GuestOffset) -> u64 {
        guest.0 & (self.cluster_size() - 1)
    }

    /// How many L1 entries a disk of `image_size` bytes needs. Never more than 2^21, 16 MiB of
    /// them: the largest number that both a table can hold and 2^63 bytes of disk can need
    /// (reached by tables of 16 clusters of 1 MiB, and of 8 of 2 MiB).
    #[inline]
    pub fn l1_entries(self, image_size: u64) -> u64 {
        image_size.div_ceil(self.l2_span())
    }

    /// The most bytes that the two levels can map: entries × entries × cluster size, up to 2^80.
    /// Not a `u64`: programs that compute it in one find 0 for the largest geometries.
    #[inline]
    pub fn max_mapped(self) -> u128 {
        let entries = u128::from(self.table_entries());
        (entries * entries) << self.cluster_bits
    }

    /// The largest disk: what can be mapped, or the largest file offset rounded down to a sector.
    #[inline]
    pub fn max_image_size(self) -> u64 {
        let limit = OFFSET_MAX & !(SECTOR - 1);
        u64::try_from(self.max_mapped()).map_or(limit, |mapped| mapped.min(limit))
    }

    /// Whole clusters that hold `bytes` bytes, rounded up.
    #[inline]
    pub fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Can a disk have this many bytes?
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], saying what is legal.
    pub fn check_image_size(self, image_size: u64) -> Result<(), Error> {
        if !image_size.is_multiple_of(SECTOR) || image_size > self.max_image_size() {
            return Err(Error::Invalid(format!(
                "QED image size must be a multiple of {SECTOR} and at most {} bytes",
                self.max_image_size()
            )));
        }
        Ok(())
    }
}

/// A table entry (§ "Tables"; for the meaning of 1, § "Zero data clusters").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// 0: the backing file's contents, or zeros.
    Unallocated,
    /// 1: zeros, whatever the backing file has. Only an L2 table may say this.
    Zero,
    /// The cluster (in an L1 table: the L2 table) that starts here.
    Data(HostOffset),
}

impl Entry {
    /// What `raw` means, unchecked: an offset still has to pass [`Bounds`].
    #[inline]
    pub fn decode(raw: u64) -> Entry {
        match raw {
            0 => Entry::Unallocated,
            1 => Entry::Zero,
            offset => Entry::Data(HostOffset(offset)),
        }
    }

    /// The number that stands for this entry.
    #[inline]
    pub fn encode(self) -> u64 {
        match self {
            Entry::Unallocated => 0,
            Entry::Zero => 1,
            Entry::Data(offset) => offset.0,
        }
    }
}

/// What an entry may point at: whole clusters between the header and the end of the file.
///
/// A cluster that the file ends in the middle of is out of bounds, as it is for QEMU: clusters are
/// written whole, and one that a crash cut off was never acknowledged. (Less than a sector may be
/// missing: see [`file_len`](crate::parts::length::file_len).)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Cluster and table sizes.
    pub geometry: Geometry,
    /// First byte behind the header's clusters.
    pub header_bytes: u64,
    /// The file's length in bytes, a multiple of 512.
    pub file_len: u64,
}

impl Bounds {
    /// Is there room for `bytes` bytes at `offset`, a cluster boundary behind the header?
    #[inline]
    fn holds(self, offset: u64, bytes: u64) -> bool {
        offset & (self.geometry.cluster_size() - 1) == 0
            && offset >= self.header_bytes
            && offset.checked_add(bytes).is_some_and(|end| end <= self.file_len)
    }

    /// An L1 table at `offset`, or an L2 table that an L1 entry points at; `None` if none can be
    /// there. A table may end where the file ends.
    #[inline]
    pub fn table(self, offset: u64) -> Option<HostOffset> {
        self.holds(offset, self.geometry.table_bytes()).then_some(HostOffset(offset))
    }

    /// What an L1 entry means; `None` if it is invalid. The inner `None` is "no table".
    #[inline]
    pub fn l1_entry(self, raw: u64) -> Option<Option<HostOffset>> {
        if raw == 0 { Some(None) } else { self.table(raw).map(Some) }
    }

    /// Does an L1 or L2 entry name `bytes` bytes that are not all in the file?
    pub(crate) fn is_past_end(self, raw: u64, bytes: u64) -> bool {
        matches!(Entry::decode(raw), Entry::Data(at) if at.0 > self.file_len.saturating_sub(bytes))
    }

    /// What an L2 entry means; `None` if it is invalid.
    #[inline]
    pub fn l2_entry(self, raw: u64) -> Option<Entry> {
        match Entry::decode(raw) {
            Entry::Data(offset) if !self.holds(offset.0, self.geometry.cluster_size()) => None,
            entry => Some(entry),
        }
    }
}

/// The first bytes without the zeros behind them, in whole sectors, at most a block.
fn kept_bytes(first: &[u8]) -> Vec<u8> {
    let first = &first[..first.len().min(HEADER_BLOCK)];
    let is_used = |sector: &[u8]| *sector != [0; SECTOR as usize][..sector.len()];
    let sectors = first.chunks(SECTOR as usize).rposition(is_used).map_or(1, |last| last + 1);
    let len = sectors * SECTOR as usize;
    let mut kept = first[..len.min(first.len())].to_vec();
    kept.resize(len, 0);
    kept[..NAME_FIELDS].fill(0);
    kept
}

fn corrupt<T>(what: &'static str, at: u64) -> Result<T, Error> {
    Err(Error::Corrupt { what, at })
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("fields lie within the header"))
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("fields lie within the header"))
}

fn put_u32(block: &mut [u8], at: usize, value: u32) {
    block[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put_u64(block: &mut [u8], at: usize, value: u64) {
    block[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometries() -> impl Iterator<Item = Geometry> {
        (12..=26).flat_map(|bits| {
            (0..=4).map(move |table| Geometry::new(1 << bits, 1 << table).expect("legal"))
        })
    }

    #[test]
    fn no_size_needs_more_l1_entries_than_documented() {
        let most = geometries().map(|g| g.l1_entries(g.max_image_size())).max();
        assert_eq!(most, Some(1 << 21));
        for g in geometries() {
            assert!(g.l1_entries(g.max_image_size()) <= g.table_entries());
        }
    }

    #[test]
    fn the_largest_geometry_maps_more_than_64_bits() {
        let g = Geometry::new(1 << 26, 16).expect("legal");
        assert_eq!(g.max_mapped(), 1 << 80);
        assert_eq!(g.max_image_size(), (1 << 63) - 512);
    }

    #[test]
    fn indexes_take_an_offset_apart() {
        for g in geometries() {
            let guest = GuestOffset(g.max_image_size() - 1);
            let whole = (u128::from(g.l1_index(guest)) * u128::from(g.table_entries())
                + u128::from(g.l2_index(guest)))
                * u128::from(g.cluster_size())
                + u128::from(g.offset_in_cluster(guest));
            assert_eq!(whole, u128::from(guest.0));
        }
    }

    #[test]
    fn a_header_survives_encode_and_parse() {
        let g = Geometry::new(4096, 1).expect("legal");
        let mut header = Header::new(g, 1 << 20, Some((b"base.raw", true))).expect("legal");
        header.compat_features = 0xdead << 40;
        let block = header.encode();
        let parsed = Header::parse(&block, 8192).expect("own header");
        assert_eq!(parsed, header);
        assert_eq!(parsed.encode(), block);
        assert_eq!(&block[64..72], b"base.raw");
    }

    #[test]
    fn unknown_header_bytes_are_kept() {
        let g = Geometry::new(4096, 1).expect("legal");
        let mut block = Header::new(g, 512, None).expect("legal").encode();
        block[56..64].copy_from_slice(&[7; 8]); // no backing file: these two fields are free
        block[4000] = 9;
        let mut header = Header::parse(&block, 8192).expect("legal");
        header.set_needs_check(true);
        block[16] = 2;
        assert_eq!(header.encode(), block);
    }
}
