//! The first cluster of a qcow2 image: bytes to typed values and back. No I/O.
//!
//! The model: fixed fields (72 bytes in version 2, 104 or more in version 3), then a list of header
//! extensions, then, anywhere in the cluster, the backing file's name. Everything that is not a
//! field we know is kept as it was read, so that writing the header again loses nothing that other
//! programs keep there: fields behind ours, extensions of unknown type, bytes in between.
//!
//! Every field lies in the first 112 bytes. So what changes while an image is in use is one write
//! of one sector ([`Header::sector`]); only who changes an extension or the backing file's name
//! lays the cluster out anew ([`Header::lay_out`]) and writes it whole.
//!
//! The invariant: a parsed header obeys every limit written here. Where its tables are, and how
//! large, is checked by [`Header::check_tables`], apart, since a repair has to open what fails it.
//!
//! Sections are those of the specification (QEMU's `docs/interop/qcow2.txt`).

use std::hash::{Hash, Hasher};
use std::ops::Range;

use crate::error::{Error, Shown};
use crate::parts::name_place::place_beside;
use crate::probe::Format;
use crate::qcow2::disk::layout::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, Geometry, Shape};

/// The first four bytes of every image (§ "Header").
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The guest sees whole sectors of this many bytes; also what a disk writes as a whole.
pub const SECTOR: u64 = 512;
/// No offset in a file or a disk is beyond this: the system's file offsets are signed.
pub const OFFSET_MAX: u64 = i64::MAX as u64;
/// A backing file's name has at most this many bytes.
pub const NAME_MAX: usize = 1023;
/// An L1 table has at most this many bytes (QEMU's limit).
pub const L1_BYTES_MAX: u64 = 32 << 20;
/// A refcount table has at most this many bytes (QEMU's limit).
pub const REFTABLE_BYTES_MAX: u64 = 8 << 20;
/// An image has at most this many snapshots (QEMU's limit).
pub const SNAPSHOTS_MAX: u32 = 65536;
/// A bitmap directory has at most this many entries (QEMU's limit).
pub const BITMAPS_MAX: u32 = 65535;
/// A bitmap directory has at most this many bytes (QEMU's limit).
pub const BITMAP_DIRECTORY_MAX: u64 = 64 << 20;

/// Bytes of header in version 2.
pub const HEADER_BYTES_V2: usize = 72;
/// The least bytes of header in version 3.
pub const HEADER_BYTES_V3: usize = 104;
/// The bytes of header that we write into new images of version 3, all fields known today.
pub const HEADER_BYTES_NEW: usize = 112;

/// Refcounts may be wrong: repair before writing (§ "incompatible_features").
pub const INCOMPAT_DIRTY: u64 = 1 << 0;
/// Some structure is broken: not to be written.
pub const INCOMPAT_CORRUPT: u64 = 1 << 1;
/// Guest data is in another file.
pub const INCOMPAT_DATA_FILE: u64 = 1 << 2;
/// The compression type is not zlib.
pub const INCOMPAT_COMPRESSION: u64 = 1 << 3;
/// L2 entries are 16 bytes and have subclusters.
pub const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
/// All that we can handle.
pub const INCOMPAT_KNOWN: u64 = (1 << 5) - 1;
/// Refcounts may be written late (§ "compatible_features").
pub const COMPAT_LAZY_REFCOUNTS: u64 = 1 << 0;
/// The bitmaps extension is consistent (§ "autoclear_features").
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// The data file is the disk, byte for byte.
pub const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;
/// All that we keep true.
pub const AUTOCLEAR_KNOWN: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA;

/// Type of the extension with the backing file's format (§ "Header extensions").
pub const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Type of the extension with names of feature bits.
pub const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Type of the extension that locates the bitmap directory.
pub const EXT_BITMAPS: u32 = 0x2385_2875;
/// Type of the extension that locates the LUKS header.
pub const EXT_CRYPTO: u32 = 0x0537_be77;
/// Type of the extension with the data file's name.
pub const EXT_DATA_FILE: u32 = 0x4441_5441;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Compression {
    /// A raw deflate stream.
    #[default]
    Zlib,
    /// A Zstandard frame.
    Zstd,
}

impl Compression {
    /// The name used on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// How an image is encrypted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Encryption {
    /// QEMU's old way, with AES.
    Aes,
    /// With LUKS; where its header is, if the image says.
    Luks(Option<Area>),
}

impl Encryption {
    /// The name used on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Encryption::Aes => "aes",
            Encryption::Luks(_) => "luks",
        }
    }
}

/// An area of the file that a header extension or the header locates.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Area {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// The bitmaps extension (§ "Bitmaps extension").
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Bitmaps {
    /// Entries in the directory: 1 to [`BITMAPS_MAX`].
    pub count: u32,
    /// The directory: on a cluster boundary, at most [`BITMAP_DIRECTORY_MAX`] bytes.
    pub directory: Area,
}

/// One header extension: its type, and where its data is within the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Extension {
    kind: u32,
    data: Range<usize>,
}

/// The header, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// The disk's size in bytes as the image says; see [`Header::disk_size`].
    pub size: u64,
    /// Entries in the active L1 table.
    pub l1_size: u32,
    /// The active L1 table's first byte; 0 without entries.
    pub l1_offset: u64,
    /// The refcount table's first byte.
    pub refcount_table_offset: u64,
    /// Clusters that the refcount table takes.
    pub refcount_table_clusters: u32,
    /// Snapshots in the snapshot table.
    pub snapshot_count: u32,
    /// The snapshot table's first byte.
    pub snapshots_offset: u64,
    /// Feature bits that have to be known; none that is not. 0 in version 2, as are the next two.
    pub incompatible: u64,
    /// Feature bits that may be ignored; unknown ones are kept.
    pub compatible: u64,
    /// Feature bits that have to be cleared by who does not know them.
    pub autoclear: u64,
    /// log2 of the bits in a refcount: 0 to 6; 4 in version 2.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// How the disk is encrypted, if it is. Such an image can be described, and no more.
    pub encryption: Option<Encryption>,
    /// Where the backing file's name is within the cluster; `None`: there is no backing file.
    backing: Option<Range<usize>>,
    extensions: Vec<Extension>,
    /// The cluster's bytes with zeros for the fields above, up to the last that the fields,
    /// extensions or name take, in whole sectors.
    kept: Vec<u8>,
    /// Bytes that the fields take, known or not.
    fields_len: usize,
}

impl Header {
    /// A header for a new image, with tables nowhere yet. `version` is 2 or 3.
    pub fn new(version: u32, cluster_bits: u32, refcount_order: u32) -> Header {
        assert!(version == 2 || version == 3, "version {version}");
        assert!(
            (CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&cluster_bits),
            "cluster_bits {cluster_bits}"
        );
        assert!(refcount_order == 4 || version == 3 && refcount_order <= 6, "{refcount_order}");
        Header {
            version,
            cluster_bits,
            size: 0,
            l1_size: 0,
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order,
            compression: Compression::Zlib,
            encryption: None,
            backing: None,
            extensions: Vec::new(),
            kept: vec![0; SECTOR as usize],
            fields_len: if version == 2 { HEADER_BYTES_V2 } else { HEADER_BYTES_NEW },
        }
    }

    /// log2 of the cluster size that `first`, a file's first bytes, claim: so that who parses knows
    /// how many bytes to read.
    ///
    /// # Errors
    ///
    /// [`Error::NotThisFormat`] without the magic; [`Error::Unsupported`] for another version;
    /// [`Error::Corrupt`] for a size that cannot be.
    pub fn cluster_bits_of(first: &[u8]) -> Result<u32, Error> {
        if !first.starts_with(&MAGIC) {
            return Err(Error::NotThisFormat(Format::Qcow2));
        }
        if first.len() < HEADER_BYTES_V2 {
            return corrupt("qcow2 header is cut short", 0);
        }
        let version = u32_at(first, 4);
        if version != 2 && version != 3 {
            return Err(Error::Unsupported(format!("Unsupported qcow2 version {version}")));
        }
        let bits = u32_at(first, 20);
        if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits) {
            return Err(Error::Invalid(format!("Unsupported cluster size: 2^{bits}")));
        }
        Ok(bits)
    }

    /// Parses the first bytes of a file: its first cluster, or all there is of it.
    ///
    /// # Errors
    ///
    /// [`Error::NotThisFormat`] without the magic; [`Error::Unsupported`] naming what we cannot
    /// handle, feature bits by name; [`Error::Corrupt`] or [`Error::Invalid`] for
    /// what cannot be.
    pub fn parse(first: &[u8]) -> Result<Header, Error> {
        let cluster_bits = Header::cluster_bits_of(first)?;
        let first = &first[..first.len().min(1 << cluster_bits)];
        let version = u32_at(first, 4);
        let fields_len = fields_len(first, version)?;
        let mut header = Header::new(version, cluster_bits, 4);
        header.fields_len = fields_len;
        header.fields(first)?;
        header.extensions = parse_extensions(first, fields_len, name_offset(first))?;
        header.check_features(first)?;
        header.encryption = header.encryption_in(first)?;
        header.name_fields(first)?;
        header.check_extensions(first)?;
        header.check_size()?;
        header.keep(first);
        Ok(header)
    }

    /// The fields that need nothing but their own bytes.
    fn fields(&mut self, first: &[u8]) -> Result<(), Error> {
        self.size = u64_at(first, 24);
        self.l1_size = u32_at(first, 36);
        self.l1_offset = u64_at(first, 40);
        self.refcount_table_offset = u64_at(first, 48);
        self.refcount_table_clusters = u32_at(first, 56);
        self.snapshot_count = u32_at(first, 60);
        self.snapshots_offset = u64_at(first, 64);
        if self.version == 2 {
            return Ok(());
        }
        self.incompatible = u64_at(first, 72);
        self.compatible = u64_at(first, 80);
        self.autoclear = u64_at(first, 88);
        self.refcount_order = u32_at(first, 96);
        if self.refcount_order > 6 {
            let what = "Reference count entry width too large; may not exceed 64 bits";
            return corrupt(what, 96);
        }
        let kind = if self.fields_len > HEADER_BYTES_V3 { first[HEADER_BYTES_V3] } else { 0 };
        self.compression = match kind {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            _ => {
                let text = format!("qcow2: unknown compression type: {kind}");
                return Err(Error::Unsupported(text));
            }
        };
        Ok(())
    }

    fn check_features(&self, first: &[u8]) -> Result<(), Error> {
        let unknown = self.incompatible & !INCOMPAT_KNOWN;
        if unknown != 0 {
            return Err(Error::Unsupported(format!(
                "Unsupported qcow2 feature(s): {}",
                self.feature_names(first, unknown)
            )));
        }
        let not_zlib = self.compression != Compression::Zlib;
        match (self.incompatible & INCOMPAT_COMPRESSION != 0, not_zlib) {
            (true, false) => {
                corrupt("qcow2: Compression type incompatible feature bit must not be set", 72)
            }
            (false, true) => {
                corrupt("qcow2: Compression type incompatible feature bit must be set", 72)
            }
            _ if self.has_subclusters() && self.cluster_bits < 14 => {
                corrupt("qcow2: Extended L2 entries need clusters of at least 16 KiB", 72)
            }
            _ => Ok(()),
        }
    }

    /// The names of these incompatible bits from the image's own table, which is untrusted text.
    fn feature_names(&self, first: &[u8], mut bits: u64) -> String {
        let mut names: Vec<String> = Vec::new();
        let table = self.extension_in(first, EXT_FEATURE_NAMES).unwrap_or_default();
        for entry in table.chunks_exact(48) {
            let (kind, bit) = (entry[0], u32::from(entry[1]));
            if kind == 0 && bit < 64 && bits & 1 << bit != 0 {
                let name = &entry[2..];
                let len = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
                let name = String::from_utf8_lossy(&name[..len]).into_owned();
                names.push(Shown(name.as_ref()).to_string());
                bits &= !(1 << bit);
            }
        }
        if bits != 0 {
            names.push(format!("Unknown incompatible feature: {bits:x}"));
        }
        names.join(", ")
    }

    /// Refuses an encrypted image, whose disk cannot be read or written without its key.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`].
    pub fn refuse_encryption(&self) -> Result<(), Error> {
        let Some(encryption) = self.encryption else { return Ok(()) };
        let name = encryption.name().to_uppercase();
        Err(Error::Unsupported(format!("{name} encryption of qcow2 images is not supported")))
    }

    fn encryption_in(&self, first: &[u8]) -> Result<Option<Encryption>, Error> {
        let pointer = self.extension_in(first, EXT_CRYPTO);
        match u32_at(first, 32) {
            0 if pointer.is_none() => Ok(None),
            0 => corrupt("qcow2: LUKS header pointer in an image that is not encrypted", 32),
            1 => Ok(Some(Encryption::Aes)),
            2 => Ok(Some(Encryption::Luks(match pointer {
                Some(data) if data.len() >= 16 => {
                    Some(Area { offset: u64_at(data, 0), len: u64_at(data, 8) })
                }
                _ => None,
            }))),
            other => Err(Error::Unsupported(format!("Unsupported encryption method {other}"))),
        }
    }

    fn name_fields(&mut self, first: &[u8]) -> Result<(), Error> {
        let (offset, len) = (u64_at(first, 8), u32_at(first, 16) as usize);
        if offset == 0 {
            return Ok(());
        }
        let cluster_size = self.cluster_size() as usize;
        if offset > cluster_size as u64 {
            return corrupt("Invalid backing file offset", 8);
        }
        let offset = offset as usize;
        if len > NAME_MAX || len > cluster_size - offset {
            return corrupt("Backing file name too long", 16);
        }
        if offset + len > first.len() {
            return corrupt("Backing file name lies beyond the end of the file", 8);
        }
        if len > 0 && offset < self.fields_len {
            return corrupt("Backing file name lies within the header", 8);
        }
        // As C programs read it; an empty name is none.
        let name = &first[offset..offset + len];
        let len = name.iter().position(|&byte| byte == 0).unwrap_or(len);
        if len > 0 {
            self.backing = Some(offset..offset + len);
        }
        Ok(())
    }

    fn check_extensions(&self, first: &[u8]) -> Result<(), Error> {
        if self.extension_in(first, EXT_BACKING_FORMAT).is_some_and(|text| text.len() > 15) {
            return corrupt("The backing file format's name is too long", 0);
        }
        if self.extension_in(first, EXT_DATA_FILE).is_some_and(|text| text.len() > NAME_MAX) {
            return corrupt("The data file's name is too long", 0);
        }
        match self.extension_in(first, EXT_BITMAPS) {
            Some(data) if self.autoclear & AUTOCLEAR_BITMAPS != 0 => {
                parse_bitmaps(data, self.cluster_size()).map(|_| ())
            }
            _ => Ok(()),
        }
    }

    fn check_size(&self) -> Result<(), Error> {
        if self.size > OFFSET_MAX || self.l1_needed() > L1_BYTES_MAX / 8 {
            return corrupt("Image is too big", 24);
        }
        if u64::from(self.l1_size) > L1_BYTES_MAX / 8 {
            return corrupt("Active L1 table too large", 36);
        }
        if u64::from(self.l1_size) < self.l1_needed() {
            return corrupt("L1 table is too small", 36);
        }
        Ok(())
    }

    /// Do the tables lie where tables can be, and are they of a legal size? (Whether the file goes
    /// that far is not asked: what is beyond its end reads as zeros.)
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`].
    pub fn check_tables(&self) -> Result<(), Error> {
        self.check_l1()?;
        self.check_refcount_table()?;
        self.check_snapshot_table(self.snapshot_count)
    }

    /// As [`check_tables`](Self::check_tables), for the active L1 table.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`].
    pub fn check_l1(&self) -> Result<(), Error> {
        if !self.l1_can_be_read() || self.l1_size > 0 && self.l1_offset == 0 {
            return corrupt("Active L1 table offset invalid", 40);
        }
        Ok(())
    }

    /// Can something be read where the active L1 table should be? A check asks no more.
    pub fn l1_can_be_read(&self) -> bool {
        self.can_be_at(self.l1_offset, u64::from(self.l1_size) * 8)
    }

    /// As [`check_tables`](Self::check_tables), for the refcount table.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`].
    pub fn check_refcount_table(&self) -> Result<(), Error> {
        if self.refcount_table_clusters == 0 {
            return corrupt("Image does not contain a reference count table", 56);
        }
        if self.refcount_table_bytes() > REFTABLE_BYTES_MAX {
            return corrupt("Reference count table too large", 56);
        }
        if !self.refcount_table_can_be_read() || self.refcount_table_offset == 0 {
            return corrupt("Reference count table offset invalid", 48);
        }
        Ok(())
    }

    /// Can something be read where the refcount table should be? A check asks no more.
    pub fn refcount_table_can_be_read(&self) -> bool {
        let bytes = self.refcount_table_bytes();
        bytes <= REFTABLE_BYTES_MAX && self.can_be_at(self.refcount_table_offset, bytes)
    }

    /// As [`check_tables`](Self::check_tables), for a snapshot table of `count` entries.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`].
    pub fn check_snapshot_table(&self, count: u32) -> Result<(), Error> {
        if count > SNAPSHOTS_MAX {
            return corrupt("Snapshot table too large", 60);
        }
        // 40 bytes are the least that an entry takes.
        let least = u64::from(count) * 40;
        if !self.can_be_at(self.snapshots_offset, least) || count > 0 && self.snapshots_offset == 0
        {
            return corrupt("Snapshot table offset invalid", 64);
        }
        Ok(())
    }

    /// Can an area of whole clusters start here?
    pub fn can_be_at(&self, offset: u64, len: u64) -> bool {
        offset & (self.cluster_size() - 1) == 0
            && offset.checked_add(len).is_some_and(|end| end <= OFFSET_MAX)
    }

    /// Keeps the bytes around the fields.
    fn keep(&mut self, first: &[u8]) {
        let ends = [self.fields_len, self.backing.as_ref().map_or(0, |name| name.end)];
        let extensions = self.extensions.last().map_or(0, |last| last.data.end);
        let end = ends.into_iter().max().unwrap_or(0).max(extensions);
        let len = end.next_multiple_of(SECTOR as usize);
        self.kept = first[..first.len().min(len)].to_vec();
        self.kept.resize(len, 0);
        // Equal headers are equal: what the fields hold is not held twice.
        let name_fields = if self.backing.is_some() { 8..16 } else { 8..8 };
        let last = if self.version == 2 { HEADER_BYTES_V2 } else { HEADER_BYTES_V3 };
        let compression = last..(last + 1).min(self.fields_len).max(last);
        for fields in [0..8, name_fields, 20..32, 36..last, compression] {
            self.kept[fields].fill(0);
        }
    }

    /// Bytes in a cluster: 512 to 2 MiB.
    #[inline]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The disk's size as the guest sees it: whole sectors. (QEMU rounds down too.)
    #[inline]
    pub fn disk_size(&self) -> u64 {
        self.size & !(SECTOR - 1)
    }

    /// The sizes that follow.
    pub fn geometry(&self) -> Geometry {
        let shape = Shape {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            version: self.version,
            extended: self.has_subclusters(),
            external: self.has_data_file(),
        };
        Geometry::new(shape).expect("a header has a legal shape")
    }

    /// L1 entries that the disk's size needs.
    #[inline]
    pub fn l1_needed(&self) -> u64 {
        self.geometry().l1_entries(self.size)
    }

    /// Bytes of refcount table.
    #[inline]
    pub fn refcount_table_bytes(&self) -> u64 {
        u64::from(self.refcount_table_clusters) << self.cluster_bits
    }

    /// Have L2 entries subclusters?
    #[inline]
    pub fn has_subclusters(&self) -> bool {
        self.incompatible & INCOMPAT_EXTENDED_L2 != 0
    }

    /// Is guest data in another file?
    #[inline]
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPAT_DATA_FILE != 0
    }

    /// May refcounts be wrong?
    #[inline]
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPAT_DIRTY != 0
    }

    /// Has somebody marked the image as broken?
    #[inline]
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & INCOMPAT_CORRUPT != 0
    }

    /// Sets or clears incompatible bits, in memory. Version 2 has none.
    pub fn set_incompatible(&mut self, bits: u64, on: bool) {
        assert!(self.version > 2, "version 2 has no feature bits");
        self.incompatible = if on { self.incompatible | bits } else { self.incompatible & !bits };
    }

    /// The backing file's name as the image spells it; never empty.
    pub fn backing_name(&self) -> Option<&[u8]> {
        self.backing.clone().map(|range| &self.kept[range])
    }

    /// The data file's name as the image spells it, if it has one and says so.
    pub fn data_file_name(&self) -> Option<&[u8]> {
        self.extension(EXT_DATA_FILE).filter(|name| self.has_data_file() && !name.is_empty())
    }

    /// The backing file's format as the image spells it.
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.extension(EXT_BACKING_FORMAT).filter(|_| self.backing.is_some())
    }

    /// Where the bitmap directory is; `None` without bitmaps, or with such as nobody may believe.
    pub fn bitmaps(&self) -> Option<Bitmaps> {
        if self.autoclear & AUTOCLEAR_BITMAPS == 0 {
            return None;
        }
        parse_bitmaps(self.extension(EXT_BITMAPS)?, self.cluster_size()).ok()
    }

    /// The data of the last extension of this type.
    pub fn extension(&self, kind: u32) -> Option<&[u8]> {
        self.extension_in(&self.kept, kind)
    }

    fn extension_in<'a>(&self, bytes: &'a [u8], kind: u32) -> Option<&'a [u8]> {
        let last = self.extensions.iter().rev().find(|extension| extension.kind == kind)?;
        Some(&bytes[last.data.clone()])
    }

    /// The header's first sector with the fields as they are now: what to write when only fields
    /// have changed.
    pub fn sector(&self) -> [u8; SECTOR as usize] {
        let mut sector = *self.kept.first_chunk().expect("at least a sector is kept");
        self.put_fields(&mut sector);
        sector
    }

    /// The sector of the extension in which this header differs from `old`, and where in the file it
    /// is; `None`: no other sector than that of the fields does. At most one word of an extension is
    /// different, and no sector boundary cuts it.
    pub fn extension_sector(&self, old: &Header) -> Option<(u64, &[u8])> {
        let sectors = self.kept.chunks(SECTOR as usize).zip(old.kept.chunks(SECTOR as usize));
        let mut changed = sectors.enumerate().skip(1).filter(|(_, (new, old))| new != old);
        let (i, (sector, _)) = changed.next()?;
        assert!(changed.next().is_none(), "one word is different");
        Some((i as u64 * SECTOR, sector))
    }

    /// Moves the bitmap directory, which keeps its length.
    pub fn set_bitmap_directory(&mut self, offset: u64) {
        let at = self.bitmaps_at();
        put_u64(&mut self.kept, at + 16, offset);
    }

    /// Makes room for the extension that locates a bitmap directory, in front of the others: so it is in
    /// the first sector. Nobody believes what it says.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if version 2 is too old for that, or if there is such an extension;
    /// [`Error::Invalid`] if it does not fit into a cluster.
    pub fn make_room_for_bitmaps(&mut self) -> Result<(), Error> {
        if self.version < 3 || self.extension(EXT_BITMAPS).is_some() {
            return Err(Error::Unsupported("bitmaps of this image cannot be added to".into()));
        }
        let name = self.backing_name().map(<[u8]>::to_vec);
        self.lay_out(name.as_deref(), &[(EXT_BITMAPS, Some(&[0; BITMAPS_BYTES]))])
    }

    /// Fills the room that was made, and says that it is to be believed.
    pub fn set_bitmaps(&mut self, bitmaps: Bitmaps) {
        let at = self.bitmaps_at();
        let Bitmaps { count, directory } = bitmaps;
        put_u32(&mut self.kept, at, count);
        put_u64(&mut self.kept, at + 8, directory.len);
        put_u64(&mut self.kept, at + 16, directory.offset);
        self.autoclear |= AUTOCLEAR_BITMAPS;
    }

    /// Where the last extension that locates a bitmap directory has its data.
    fn bitmaps_at(&self) -> usize {
        let last = self.extensions.iter().rev().find(|extension| extension.kind == EXT_BITMAPS);
        last.expect("it has bitmaps").data.start
    }

    /// The first cluster: fields, extensions, name, zeros behind.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.kept.clone();
        self.put_fields(&mut bytes);
        bytes.resize(self.cluster_size() as usize, 0);
        bytes
    }

    fn put_fields(&self, bytes: &mut [u8]) {
        let name = self.backing.clone().unwrap_or(0..0);
        bytes[..4].copy_from_slice(&MAGIC);
        put_u32(bytes, 4, self.version);
        if !name.is_empty() {
            put_u64(bytes, 8, name.start as u64);
            // The length stays as it was: behind a NUL in the name somebody may keep something.
            if u32_at(bytes, 16) < name.len() as u32 {
                put_u32(bytes, 16, name.len() as u32);
            }
        }
        put_u32(bytes, 20, self.cluster_bits);
        put_u64(bytes, 24, self.size);
        put_u32(bytes, 36, self.l1_size);
        put_u64(bytes, 40, self.l1_offset);
        put_u64(bytes, 48, self.refcount_table_offset);
        put_u32(bytes, 56, self.refcount_table_clusters);
        put_u32(bytes, 60, self.snapshot_count);
        put_u64(bytes, 64, self.snapshots_offset);
        if self.version == 2 {
            return;
        }
        put_u64(bytes, 72, self.incompatible);
        put_u64(bytes, 80, self.compatible);
        put_u64(bytes, 88, self.autoclear);
        put_u32(bytes, 96, self.refcount_order);
        put_u32(bytes, 100, self.fields_len as u32);
        if self.fields_len > HEADER_BYTES_V3 {
            bytes[HEADER_BYTES_V3] = u8::from(self.compression == Compression::Zstd);
        }
    }

    /// Replaces the backing file's name and extensions, and lays the cluster out anew: fields,
    /// extensions in their old order with new ones in front, name. `None` as data removes one.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if it does not fit into a cluster.
    pub fn lay_out(
        &mut self,
        backing: Option<&[u8]>,
        changes: &[(u32, Option<&[u8]>)],
    ) -> Result<(), Error> {
        let mut list: Vec<(u32, Vec<u8>)> = Vec::new();
        for &(kind, data) in changes {
            let is_there = self.extensions.iter().any(|extension| extension.kind == kind);
            if let (Some(data), false) = (data, is_there) {
                list.push((kind, data.to_vec()));
            }
        }
        for extension in &self.extensions {
            let change = changes.iter().find(|(kind, _)| *kind == extension.kind);
            match change {
                Some((_, None)) => {}
                Some((kind, Some(data))) => list.push((*kind, data.to_vec())),
                None => list.push((extension.kind, self.kept[extension.data.clone()].to_vec())),
            }
        }
        let mut bytes = self.kept[..self.fields_len].to_vec();
        let mut extensions = Vec::new();
        for (kind, data) in list {
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            let start = bytes.len();
            bytes.extend(&data);
            extensions.push(Extension { kind, data: start..bytes.len() });
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; 8]);
        let name = backing.filter(|name| !name.is_empty());
        let name_range = name.map(|name| bytes.len()..bytes.len() + name.len());
        bytes.extend(name.unwrap_or_default());
        if bytes.len() as u64 > self.cluster_size() || name.is_some_and(|n| n.len() > NAME_MAX) {
            return Err(Error::Invalid("the header does not fit into one cluster".into()));
        }
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        bytes[8..20].fill(0);
        if let Some(range) = &name_range {
            put_u32(&mut bytes, 16, range.len() as u32);
        }
        (self.backing, self.extensions, self.kept) = (name_range, extensions, bytes);
        Ok(())
    }
}

impl Header {
    /// The header with another backing file's name and format, or none, that can take this one's place:
    /// first what is behind the first sector is written, which changes nothing that this header refers to,
    /// then that sector. For that the names of features, which are there for people, may be left out. Only
    /// where it is too narrow even so (clusters of 512 bytes are one sector; a data file has a long name)
    /// is something written over that this header refers to.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if it does not fit into a cluster.
    pub fn with_backing(&self, backing: Option<(&[u8], &[u8])>) -> Result<Header, Error> {
        let Some((name, format)) = backing else {
            let mut header = self.clone();
            header.kept[8..20].fill(0);
            header.backing = None;
            return Ok(header);
        };
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(Error::Invalid(format!(
                "the backing file's name must be 1 to {NAME_MAX} bytes long"
            )));
        }
        let changes = [(EXT_BACKING_FORMAT, Some(format)), (EXT_FEATURE_NAMES, None)];
        let mut last = Err(Error::Invalid("the header does not fit into one cluster".into()));
        for count in 1..=changes.len() {
            let laid_out = self.laid_out_beside(name, &changes[..count]);
            match laid_out {
                Ok((header, true)) => return Ok(header),
                Ok((header, false)) if last.is_err() => last = Ok(header),
                Err(why) if last.is_err() => last = Err(why),
                _ => {}
            }
        }
        last
    }

    /// As [`lay_out`](Self::lay_out), with the name where this header refers to nothing, if there is room; is
    /// nothing written over that this one refers to, behind the first sector?
    fn laid_out_beside(
        &self,
        name: &[u8],
        changes: &[(u32, Option<&[u8]>)],
    ) -> Result<(Header, bool), Error> {
        let mut header = self.clone();
        header.lay_out(None, changes)?;
        let end_of = |header: &Header| {
            let ends = header
                .extensions
                .iter()
                .map(|one| one.data.start + one.data.len().next_multiple_of(8));
            ends.max().unwrap_or(header.fields_len) + 8
        };
        let (new_end, old_end) = (end_of(&header), end_of(self));
        let old_name = self.backing.clone().unwrap_or(0..0);
        let whole = self.cluster_size() as usize;
        let start = place_beside(new_end.max(old_end), whole, name.len(), &old_name)
            .or_else(|| place_beside(new_end, whole, name.len(), &old_name))
            .ok_or_else(|| Error::Invalid("the header does not fit into one cluster".into()))?;
        let range = start..start + name.len();
        // All that is not the new one's stays as it was.
        let mut bytes = self.kept.clone();
        bytes.resize(whole.max(bytes.len()), 0);
        header.kept.resize(whole.max(header.kept.len()), 0);
        bytes[..new_end].copy_from_slice(&header.kept[..new_end]);
        bytes[range.clone()].copy_from_slice(name);
        put_u32(&mut bytes, 16, name.len() as u32);
        let essential = self.extensions.iter().filter(|one| one.kind != EXT_FEATURE_NAMES);
        let mut used: Vec<Range<usize>> =
            essential.map(|one| one.data.start - 8..one.data.end).collect();
        used.extend([old_end - 8..old_end, old_name.clone()]);
        let is_same = |range: &Range<usize>| {
            let behind = range.start.max(SECTOR as usize)..range.end.max(SECTOR as usize);
            behind.clone().all(|at| self.kept.get(at).copied().unwrap_or(0) == bytes[at])
        };
        let is_beside = used.iter().all(is_same);
        let last = range.end.max(old_name.end).max(new_end).max(old_end);
        bytes.truncate(last.next_multiple_of(SECTOR as usize));
        (header.backing, header.kept) = (Some(range), bytes);
        Ok((header, is_beside))
    }
}

/// The fields alone: what was kept around them is as old as the image.
impl Hash for Header {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.size, self.l1_offset, self.l1_size, self.snapshots_offset, self.snapshot_count)
            .hash(state);
        (self.refcount_table_offset, self.refcount_table_clusters).hash(state);
        (self.incompatible, self.compatible, self.autoclear).hash(state);
        (self.version, self.cluster_bits, self.refcount_order, self.compression, self.fields_len)
            .hash(state);
        self.backing.hash(state);
    }
}

/// The names of all feature bits there are, as the extension of that name holds them: 48 bytes a
/// name.
pub fn feature_name_table() -> Vec<u8> {
    const NAMES: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut table = Vec::new();
    for (kind, bit, name) in NAMES {
        let start = table.len();
        table.extend([kind, bit]);
        table.extend(name.as_bytes());
        table.resize(start + 48, 0);
    }
    table
}

/// How many bytes the fields take.
fn fields_len(first: &[u8], version: u32) -> Result<usize, Error> {
    if version == 2 {
        return Ok(HEADER_BYTES_V2);
    }
    if first.len() < HEADER_BYTES_V3 {
        return corrupt("qcow2 header is cut short", 0);
    }
    let len = u32_at(first, 100) as usize;
    if len < HEADER_BYTES_V3 {
        return corrupt("qcow2 header too short", 100);
    }
    if len > 1 << u32_at(first, 20) {
        return corrupt("qcow2 header exceeds cluster size", 100);
    }
    if len > first.len() {
        return corrupt("qcow2 header is cut short", 100);
    }
    if !len.is_multiple_of(8) {
        return corrupt("qcow2 header length is no multiple of 8", 100);
    }
    Ok(len)
}

/// Where the backing file's name says it is; extensions end there.
fn name_offset(first: &[u8]) -> usize {
    match u64_at(first, 8) {
        0 => first.len(),
        offset => usize::try_from(offset).unwrap_or(usize::MAX).min(first.len()),
    }
}

/// The extensions from `start` on, up to their end mark or `end`.
fn parse_extensions(first: &[u8], start: usize, end: usize) -> Result<Vec<Extension>, Error> {
    let mut list = Vec::new();
    let mut at = start;
    while at + 8 <= end {
        let (kind, len) = (u32_at(first, at), u32_at(first, at + 4) as usize);
        if kind == 0 {
            break;
        }
        let data = at + 8;
        if len > end - data {
            return corrupt("Header extension too large", at as u64);
        }
        list.push(Extension { kind, data: data..data + len });
        at = data + len.next_multiple_of(8);
    }
    Ok(list)
}

/// Bytes of the extension that locates a bitmap directory.
const BITMAPS_BYTES: usize = 24;

fn parse_bitmaps(data: &[u8], cluster_size: u64) -> Result<Bitmaps, Error> {
    if data.len() != BITMAPS_BYTES {
        return corrupt("bitmaps_ext: Invalid extension length", 0);
    }
    if u32_at(data, 4) != 0 {
        return corrupt("bitmaps_ext: Reserved field is not zero", 0);
    }
    let count = u32_at(data, 0);
    let directory = Area { len: u64_at(data, 8), offset: u64_at(data, 16) };
    if count == 0 {
        return corrupt("bitmaps_ext: found bitmaps extension with zero bitmaps", 0);
    }
    if count > BITMAPS_MAX {
        return corrupt("bitmaps_ext: too many bitmaps", 0);
    }
    if directory.len > BITMAP_DIRECTORY_MAX {
        return corrupt("bitmaps_ext: the bitmap directory is too large", 0);
    }
    let end = directory.offset.checked_add(directory.len);
    if directory.offset & (cluster_size - 1) != 0
        || directory.offset == 0
        || end.is_none_or(|end| end > OFFSET_MAX)
    {
        return corrupt("bitmaps_ext: invalid bitmap directory offset", 0);
    }
    Ok(Bitmaps { count, directory })
}

fn corrupt<T>(what: &'static str, at: u64) -> Result<T, Error> {
    Err(Error::Corrupt { what, at })
}

/// Big-endian; the caller knows that it is there.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(*bytes[at..].first_chunk().expect("the caller looked at the length"))
}

/// As [`u32_at`].
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(*bytes[at..].first_chunk().expect("the caller looked at the length"))
}

/// As [`u32_at`].
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(*bytes[at..].first_chunk().expect("the caller looked at the length"))
}

fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}
