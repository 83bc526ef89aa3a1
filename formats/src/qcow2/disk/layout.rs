//! qcow2 on disk: geometry, table entries, refcounts. Pure codecs, no I/O.
//!
//! Everything is big-endian. An entry is decoded into a typed value or refused as [`Invalid`];
//! what is above this file never sees a raw bit. Terms and bits are those of the qcow2
//! specification (QEMU's `docs/interop/qcow2.txt`), sections in brackets.

use cowbell_engine::units::{GuestOffset, HostOffset};

/// Cluster sizes are 2^9 to 2^21 bytes.
pub const CLUSTER_BITS_MIN: u32 = 9;
/// See [`CLUSTER_BITS_MIN`].
pub const CLUSTER_BITS_MAX: u32 = 21;
/// Refcounts are up to 2^6 bits wide.
pub const REFCOUNT_ORDER_MAX: u32 = 6;
/// A cluster of an image with extended L2 entries has this many subclusters.
pub const SUBCLUSTERS: u32 = 32;
/// Bytes of an L2 table or refcount block that are cached as one, at most.
const SLICE_BITS_MAX: u32 = 12;

/// The cluster is referenced exactly once: it may be written in place.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits 9 to 55.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// One past the highest host offset that an entry can hold.
pub const HOST_MAX: u64 = 1 << 56;

/// An entry that says something impossible.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Invalid;

/// The sizes that follow from a header; those that every request asks for are not computed each time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Geometry {
    cluster_bits: u8,
    refcount_order: u8,
    version: u8,
    extended: bool,
    external: bool,
    plain: bool,
    unit_bits: u8,
    slice_span_bits: u8,
    slice_index_mask: u16,
}

/// What [`Geometry::new`] is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// log2 of the bytes in a cluster.
    pub cluster_bits: u32,
    /// log2 of the bits in a refcount.
    pub refcount_order: u32,
    /// 2 or 3.
    pub version: u32,
    /// Extended L2 entries: clusters have subclusters.
    pub extended: bool,
    /// Data is in a file of its own, at the guest's offsets.
    pub external: bool,
}

impl Geometry {
    /// The geometry of this shape, if there is one.
    pub fn new(shape: Shape) -> Option<Geometry> {
        let Shape { cluster_bits, refcount_order, version, extended, external } = shape;
        // [Extended L2 Entries]: clusters of at least 16 KiB, so that subclusters have sectors.
        let least = if extended { 14 } else { CLUSTER_BITS_MIN };
        let good = (least..=CLUSTER_BITS_MAX).contains(&cluster_bits)
            && refcount_order <= REFCOUNT_ORDER_MAX
            && (2..=3).contains(&version)
            && (version == 3 || (!extended && !external && refcount_order == 4));
        if !good {
            return None;
        }
        let unit_bits = cluster_bits - if extended { SUBCLUSTERS.trailing_zeros() } else { 0 };
        let entry_bits = if extended { 4 } else { 3 };
        let slice_entry_bits = cluster_bits.min(SLICE_BITS_MAX) - entry_bits;
        Some(Geometry {
            cluster_bits: cluster_bits as u8,
            refcount_order: refcount_order as u8,
            version: version as u8,
            extended,
            external,
            plain: !extended && !external,
            unit_bits: unit_bits as u8,
            slice_span_bits: (cluster_bits + slice_entry_bits) as u8,
            slice_index_mask: (1 << slice_entry_bits) - 1,
        })
    }

    /// log2 of the bytes in a cluster.
    #[inline]
    pub fn cluster_bits(self) -> u32 {
        self.cluster_bits.into()
    }

    /// Bytes in a cluster.
    #[inline]
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// 2 or 3.
    pub fn version(self) -> u32 {
        self.version.into()
    }

    /// Have clusters subclusters?
    #[inline]
    pub fn has_subclusters(self) -> bool {
        self.extended
    }

    /// Is the data in a file of its own?
    #[inline]
    pub fn has_data_file(self) -> bool {
        self.external
    }

    /// Has it neither subclusters nor a data file?
    #[inline]
    pub fn is_plain(self) -> bool {
        self.plain
    }

    /// Can a table say that a cluster without a place reads as zeros?
    pub fn has_zero_clusters(self) -> bool {
        self.version >= 3
    }

    /// log2 of the bytes that one mapping is for: a subcluster, or a cluster without such.
    #[inline]
    pub fn unit_bits(self) -> u32 {
        self.unit_bits.into()
    }

    /// Bytes that one mapping is for.
    #[inline]
    pub fn unit_size(self) -> u64 {
        1 << self.unit_bits()
    }

    /// log2 of the bytes in an L2 entry.
    #[inline]
    pub fn entry_bits(self) -> u32 {
        if self.extended { 4 } else { 3 }
    }

    /// log2 of the entries in an L2 table, which is one cluster.
    #[inline]
    pub fn l2_bits(self) -> u32 {
        self.cluster_bits() - self.entry_bits()
    }

    /// log2 of the guest bytes that one L2 table maps.
    #[inline]
    pub fn l2_span_bits(self) -> u32 {
        self.cluster_bits() + self.l2_bits()
    }

    /// The L1 entry that maps `guest`.
    #[inline]
    pub fn l1_index(self, guest: GuestOffset) -> u64 {
        guest.0 >> self.l2_span_bits()
    }

    /// The entry of its L2 table that maps `guest`.
    #[inline]
    pub fn l2_index(self, guest: GuestOffset) -> u64 {
        (guest.0 >> self.cluster_bits) & ((1 << self.l2_bits()) - 1)
    }

    /// The subcluster, or 0, that `guest` is in.
    #[inline]
    pub fn sub_index(self, guest: GuestOffset) -> u32 {
        if !self.extended {
            return 0;
        }
        (guest.0 >> self.unit_bits()) as u32 & (SUBCLUSTERS - 1)
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries(self, size: u64) -> u64 {
        let bits = self.l2_span_bits();
        (size >> bits) + u64::from(size & ((1 << bits) - 1) != 0)
    }

    /// log2 of the bits in a refcount.
    pub fn refcount_order(self) -> u32 {
        self.refcount_order.into()
    }

    /// The largest refcount.
    pub fn refcount_max(self) -> u64 {
        u64::MAX >> (64 - (1 << self.refcount_order))
    }

    /// log2 of the refcounts in a block, which is one cluster.
    #[inline]
    pub fn block_bits(self) -> u32 {
        self.cluster_bits() + 3 - self.refcount_order()
    }

    /// log2 of the bytes of an L2 table or refcount block that are cached as one.
    #[inline]
    pub fn slice_bits(self) -> u32 {
        self.cluster_bits().min(SLICE_BITS_MAX)
    }

    /// log2 of the guest bytes that such a slice of an L2 table maps.
    #[inline]
    pub fn slice_span_bits(self) -> u32 {
        self.slice_span_bits.into()
    }

    /// The index in its slice of the entry for `guest`.
    #[inline]
    pub fn slice_index(self, guest: GuestOffset) -> usize {
        (guest.0 >> self.cluster_bits) as usize & usize::from(self.slice_index_mask)
    }

    /// Is `offset` where a cluster may begin?
    #[inline]
    pub fn is_aligned(self, offset: u64) -> bool {
        offset & (self.cluster_size() - 1) == 0
    }

    /// The refcount of cluster `index` of `block` (or of a slice of one).
    #[inline]
    pub fn refcount(self, block: &[u8], index: usize) -> u64 {
        match self.refcount_order {
            order @ 0..=2 => {
                let bits = 1 << order;
                let bit = index << order;
                u64::from(block[bit / 8] >> (bit % 8)) & ((1 << bits) - 1)
            }
            // Nearly all images.
            4 => u16::from_be_bytes(block.as_chunks::<2>().0[index]).into(),
            order => {
                let bytes = 1 << (order - 3);
                let field = &block[index * bytes..][..bytes];
                field.iter().fold(0, |count, &byte| count << 8 | u64::from(byte))
            }
        }
    }

    /// Sets the refcount of cluster `index` of `block` (or of a slice of one); `count` fits.
    #[inline]
    pub fn set_refcount(self, block: &mut [u8], index: usize, count: u64) {
        debug_assert!(count <= self.refcount_max());
        match self.refcount_order {
            order @ 0..=2 => {
                let bit = index << order;
                let mask = (((1u32 << (1 << order)) - 1) << (bit % 8)) as u8;
                let byte = &mut block[bit / 8];
                *byte = *byte & !mask | (count as u8) << (bit % 8);
            }
            4 => block.as_chunks_mut::<2>().0[index] = (count as u16).to_be_bytes(),
            order => {
                let bytes = 1 << (order - 3);
                block[index * bytes..][..bytes].copy_from_slice(&count.to_be_bytes()[8 - bytes..]);
            }
        }
    }
}

/// An L1 entry [Cluster mapping].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct L1Entry {
    /// The L2 table.
    pub table: HostOffset,
    /// Is the table referenced just here?
    pub copied: bool,
}

impl L1Entry {
    /// What `word` says; `Ok(None)`: there is no table.
    #[inline]
    pub fn decode(word: u64, geometry: Geometry) -> Result<Option<L1Entry>, Invalid> {
        let offset = word & OFFSET;
        if word & !(OFFSET | COPIED) != 0 || !geometry.is_aligned(offset) {
            return Err(Invalid);
        }
        let entry = L1Entry { table: HostOffset(offset), copied: word & COPIED != 0 };
        Ok((offset != 0).then_some(entry))
    }

    /// As it is on disk.
    pub fn encode(self) -> u64 {
        self.table.0 | if self.copied { COPIED } else { 0 }
    }
}

/// What an L2 table says of a unit: a cluster, or one of its subclusters. Host offsets are those
/// of the cluster's first byte.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mapping {
    /// Nothing: the backing file shows. In an image with subclusters the cluster may have a place
    /// nevertheless.
    Unallocated(Option<HostOffset>),
    /// Zeros, whatever is at the place that it may have.
    Zero(Option<HostOffset>),
    /// Bytes in the data file.
    Data(HostOffset),
    /// The cluster, compressed.
    Compressed(Compressed),
}

impl Mapping {
    /// The place in the data file, if there is one.
    pub fn host(self) -> Option<HostOffset> {
        match self {
            Mapping::Data(host) => Some(host),
            Mapping::Zero(host) | Mapping::Unallocated(host) => host,
            Mapping::Compressed(_) => None,
        }
    }
}

/// A compressed cluster [Compressed Clusters Descriptor].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Compressed {
    /// The first byte, which need not be aligned to anything.
    pub host: HostOffset,
    /// Bytes up to the end of the last sector: what is compressed may end before.
    pub bytes: u32,
}

/// An L2 entry [Cluster mapping; Extended L2 Entries].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct L2Entry {
    word: u64,
    /// Bits 0 to 31: allocated subclusters; 32 to 63: those that read as zeros.
    bitmap: u64,
}

impl L2Entry {
    /// Nothing is allocated.
    pub const NONE: L2Entry = L2Entry { word: 0, bitmap: 0 };

    /// From its bytes in the table.
    #[inline(always)]
    pub fn read(table: &[u8], index: usize, geometry: Geometry) -> L2Entry {
        let (words, _) = table.as_chunks::<8>();
        if geometry.extended {
            let [word, bitmap] = [words[2 * index], words[2 * index + 1]].map(u64::from_be_bytes);
            return L2Entry { word, bitmap };
        }
        L2Entry { word: u64::from_be_bytes(words[index]), bitmap: 0 }
    }

    /// As `read` and then `mapping`, of data in an image that is plain: where is it, and is it
    /// referenced just there?
    #[inline(always)]
    pub fn plain(table: &[u8], index: usize, geometry: Geometry) -> Option<(HostOffset, bool)> {
        let word = u64::from_be_bytes(*table.as_chunks::<8>().0.get(index)?);
        let host = word & !COPIED;
        let is_data = host & !OFFSET == 0 && host != 0 && geometry.is_aligned(host);
        is_data.then_some((HostOffset(host), word & COPIED != 0))
    }

    /// To its bytes in the table.
    pub fn write(self, table: &mut [u8], index: usize, geometry: Geometry) {
        let (words, _) = table.as_chunks_mut::<8>();
        if geometry.extended {
            words[2 * index] = self.word.to_be_bytes();
            words[2 * index + 1] = self.bitmap.to_be_bytes();
        } else {
            words[index] = self.word.to_be_bytes();
        }
    }

    /// A cluster of data at `host`, whole.
    pub fn data(host: HostOffset, geometry: Geometry) -> L2Entry {
        let bitmap = if geometry.extended { u64::from(u32::MAX) } else { 0 };
        L2Entry { word: host.0 | COPIED, bitmap }
    }

    /// A compressed cluster, which begins where one [may](L2Entry::may_be_compressed_in).
    pub fn compressed(place: Compressed, geometry: Geometry) -> L2Entry {
        let bits = 62 - (geometry.cluster_bits() - 8);
        let host = place.host.0;
        let sectors = (u64::from(place.bytes) + (host & 511)).div_ceil(512) - 1;
        debug_assert!(host >> bits == 0 && sectors >> (62 - bits) == 0);
        L2Entry { word: COMPRESSED | sectors << bits | host, bitmap: 0 }
    }

    /// Can an entry say that a compressed cluster begins in this host cluster?
    pub fn may_be_compressed_in(cluster: u64, geometry: Geometry) -> bool {
        let bits = (62 - (geometry.cluster_bits() - 8)).min(HOST_MAX.ilog2() - 1);
        cluster >> (bits - geometry.cluster_bits()) == 0
    }

    /// A cluster of zeros, that keeps its place if it has one.
    pub fn zero(host: Option<HostOffset>, geometry: Geometry) -> L2Entry {
        let place = host.map_or(0, |host| host.0 | COPIED);
        if geometry.extended {
            return L2Entry { word: place, bitmap: u64::from(u32::MAX) << 32 };
        }
        L2Entry { word: place | ZERO, bitmap: 0 }
    }

    /// Is this cluster, or its compressed bytes, referenced just here?
    #[inline]
    pub fn is_copied(self) -> bool {
        self.word & COPIED != 0
    }

    /// If it is of a cluster of plain data: the entry of the cluster behind it, in the file as on
    /// the guest's disk. `None`, too, where that cannot be told from the entry alone.
    #[inline(always)]
    pub fn following(self, geometry: Geometry) -> Option<L2Entry> {
        let word = self.word.wrapping_add(geometry.cluster_size());
        let is_plain = (self.word | word) & !(OFFSET | COPIED) == 0;
        let is_said = is_plain && geometry.plain;
        is_said.then_some(L2Entry { word, bitmap: 0 })
    }

    /// Does it lead where `other` does, copied flags apart?
    #[inline(always)]
    pub fn leads_with(self, other: L2Entry) -> bool {
        (self.word ^ other.word) & !COPIED == 0 && self.bitmap == other.bitmap
    }

    /// Is nothing said at all?
    #[inline]
    pub fn is_none(self) -> bool {
        self == L2Entry::NONE
    }

    /// The same with the copied flag set or not. Compressed clusters never carry it.
    #[must_use]
    pub fn with_copied(self, copied: bool) -> L2Entry {
        let word = self.word & !COPIED;
        L2Entry { word: word | if copied { COPIED } else { 0 }, ..self }
    }

    /// The same with the subclusters of `mask` data, if `data`, else zeros.
    #[must_use]
    pub fn with_subclusters(self, mask: u32, data: bool) -> L2Entry {
        let (data_bits, zero_bits) = (u64::from(mask), u64::from(mask) << 32);
        let bitmap = self.bitmap & !(data_bits | zero_bits);
        L2Entry { bitmap: bitmap | if data { data_bits } else { zero_bits }, ..self }
    }

    /// The same with a place for its data.
    #[must_use]
    pub fn with_place(self, host: HostOffset) -> L2Entry {
        L2Entry { word: host.0 | COPIED, ..self }
    }

    /// The subclusters that are data (bits 0 to 31) and that are zeros (32 to 63).
    pub fn bitmap(self) -> u64 {
        self.bitmap
    }

    /// The place in the data file, or the compressed bytes; whatever the subclusters are.
    pub fn place(self, geometry: Geometry) -> Result<Option<Mapping>, Invalid> {
        if self.word & COMPRESSED != 0 {
            return self.compressed_place(geometry).map(Some);
        }
        Ok(self.host(geometry)?.map(Mapping::Data))
    }

    /// What is at subcluster `sub` (0 where there are none).
    #[inline(always)]
    pub fn mapping(self, sub: u32, geometry: Geometry) -> Result<Mapping, Invalid> {
        // Most entries.
        if self.word & !OFFSET == COPIED && geometry.plain {
            let host = self.word & OFFSET;
            if host != 0 && geometry.is_aligned(host) {
                return Ok(Mapping::Data(HostOffset(host)));
            }
        }
        self.other_mapping(sub, geometry)
    }

    #[inline(never)]
    fn other_mapping(self, sub: u32, geometry: Geometry) -> Result<Mapping, Invalid> {
        if self.is_none() {
            return Ok(Mapping::Unallocated(None));
        }
        if self.word & COMPRESSED != 0 {
            return self.compressed_place(geometry);
        }
        let host = self.host(geometry)?;
        if !geometry.extended {
            return match (self.word & ZERO != 0, host) {
                (true, _) if !geometry.has_zero_clusters() => Err(Invalid),
                (true, host) => Ok(Mapping::Zero(host)),
                (false, Some(host)) => Ok(Mapping::Data(host)),
                (false, None) => Ok(Mapping::Unallocated(None)),
            };
        }
        let bit = |from: u32| self.bitmap >> (from + sub) & 1 != 0;
        match (bit(0), bit(SUBCLUSTERS), host) {
            (true, true, _) | (true, false, None) => Err(Invalid),
            (true, false, Some(host)) => Ok(Mapping::Data(host)),
            (false, true, host) => Ok(Mapping::Zero(host)),
            (false, false, host) => Ok(Mapping::Unallocated(host)),
        }
    }

    /// The place of what is not compressed.
    fn host(self, geometry: Geometry) -> Result<Option<HostOffset>, Invalid> {
        let flags = COPIED | if geometry.extended { 0 } else { ZERO };
        let offset = self.word & OFFSET;
        if self.word & !(OFFSET | flags) != 0 || !geometry.is_aligned(offset) {
            return Err(Invalid);
        }
        // [Cluster mapping]: in a data file offset 0 is a place like any other.
        let is_there = offset != 0 || (geometry.external && self.is_copied());
        Ok(is_there.then_some(HostOffset(offset)))
    }

    fn compressed_place(self, geometry: Geometry) -> Result<Mapping, Invalid> {
        let is_whole = !geometry.extended || self.bitmap == 0;
        if self.is_copied() || geometry.external || !is_whole {
            return Err(Invalid);
        }
        let bits = 62 - (geometry.cluster_bits() - 8);
        let host = self.word & ((1 << bits) - 1);
        let sectors = (self.word & !COMPRESSED) >> bits;
        let bytes = (sectors + 1) * 512 - (host & 511);
        let end = host + bytes;
        if host < geometry.cluster_size() || end > HOST_MAX {
            return Err(Invalid);
        }
        Ok(Mapping::Compressed(Compressed { host: HostOffset(host), bytes: bytes as u32 }))
    }
}

/// The subclusters of `from..to`, bytes of their cluster.
pub fn units_mask(from: u64, to: u64, unit_bits: u32) -> u32 {
    let (first, end) = ((from >> unit_bits) as u32, (to >> unit_bits) as u32);
    debug_assert!(first < end && end <= SUBCLUSTERS);
    (u32::MAX >> (SUBCLUSTERS - (end - first))) << first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32, refcount_order: u32, extended: bool) -> Geometry {
        let shape = Shape { cluster_bits, refcount_order, version: 3, extended, external: false };
        Geometry::new(shape).expect("a legal shape")
    }

    #[test]
    fn a_compressed_clusters_place_is_what_its_entry_says() {
        for (bits, extended) in [(9, false), (12, false), (16, false), (21, false), (16, true)] {
            let geometry = geometry(bits, 4, extended);
            let size = geometry.cluster_size();
            let last = (1 << (62 - (bits - 8)).min(55)) - size;
            for (host, len) in
                [(size, 1), (size + 511, 2), (3 * size - 7, size - 1), (last, size / 2)]
            {
                assert!(L2Entry::may_be_compressed_in(host >> bits, geometry));
                let end = (host + len).next_multiple_of(512);
                let place = Compressed { host: HostOffset(host), bytes: (end - host) as u32 };
                let entry = L2Entry::compressed(place, geometry);
                assert_eq!(entry.mapping(0, geometry), Ok(Mapping::Compressed(place)));
                assert!(!entry.is_copied());
            }
            assert!(!L2Entry::may_be_compressed_in((last >> bits) + 1, geometry));
        }
    }

    #[test]
    fn refcounts_of_every_width_keep_to_themselves() {
        for order in 0..=REFCOUNT_ORDER_MAX {
            let geometry = geometry(9, order, false);
            let mut block = [0; 512];
            let last = (1 << geometry.block_bits()) - 1;
            for (index, count) in [(0, 1), (3, geometry.refcount_max()), (last, 1)] {
                geometry.set_refcount(&mut block, index, count);
                assert_eq!(geometry.refcount(&block, index), count);
            }
            assert_eq!(geometry.refcount(&block, 1), 0);
            assert_eq!(geometry.refcount(&block, 2), 0);
            geometry.set_refcount(&mut block, 3, 0);
            assert_eq!(geometry.refcount(&block, 0), 1);
            assert_eq!(geometry.refcount(&block, 3), 0);
        }
        // [Refcounts]: below a byte, the least significant bits come first.
        let mut block = [0; 512];
        geometry(9, 2, false).set_refcount(&mut block, 0, 5);
        assert_eq!(block[0], 5);
    }

    #[test]
    fn entries_say_what_the_specification_says() {
        let plain = geometry(16, 4, false);
        let of = |word, bitmap, sub, geometry| L2Entry { word, bitmap }.mapping(sub, geometry);
        let host = HostOffset(0x5_0000);
        assert_eq!(of(0, 0, 0, plain), Ok(Mapping::Unallocated(None)));
        assert_eq!(of(1, 0, 0, plain), Ok(Mapping::Zero(None)));
        assert_eq!(of(0x5_0001, 0, 0, plain), Ok(Mapping::Zero(Some(host))));
        assert_eq!(of(0x5_0000, 0, 0, plain), Ok(Mapping::Data(host)));
        assert_eq!(of(COPIED | 0x5_0000, 0, 0, plain), Ok(Mapping::Data(host)));
        for wrong in [0x5_0200, 0x5_0002, 1 << 56 | 0x5_0000, COMPRESSED | COPIED | 0x5_0000] {
            assert_eq!(of(wrong, 0, 0, plain), Err(Invalid), "{wrong:#x}");
        }
        let extended = geometry(16, 4, true);
        assert_eq!(of(0x5_0000, 1 << 3, 3, extended), Ok(Mapping::Data(host)));
        assert_eq!(of(0x5_0000, 1 << 3, 2, extended), Ok(Mapping::Unallocated(Some(host))));
        assert_eq!(of(0, 1 << 35, 3, extended), Ok(Mapping::Zero(None)));
        assert_eq!(of(0x5_0000, 1 << 35 | 1 << 3, 3, extended), Err(Invalid));
        assert_eq!(of(0, 1 << 3, 3, extended), Err(Invalid));
        assert_eq!(of(0x5_0001, 0, 3, extended), Err(Invalid));
    }

    #[test]
    fn the_entry_that_follows_data_is_that_of_the_next_cluster() {
        let words = [
            0,
            ZERO,
            0x4_0000,
            0x5_0000,
            0x5_0001,
            0x5_0200,
            0x6_0000,
            OFFSET & !0xffff,
            1 << 56,
            COMPRESSED | 0x5_0000,
            COMPRESSED | 0x6_0000,
            u64::MAX,
        ];
        let entries = || {
            let flagged = words.into_iter().flat_map(|word| [word, word | COPIED]);
            flagged.map(|word| L2Entry { word, bitmap: 0 })
        };
        let plain = geometry(16, 4, false);
        let mut followed = 0;
        for entry in entries() {
            let following = entry.following(plain);
            let Ok(Mapping::Data(host)) = entry.mapping(0, plain) else { continue };
            let next = Ok(Mapping::Data(HostOffset(host.0 + plain.cluster_size())));
            for other in entries() {
                let goes_on = other.mapping(0, plain) == next;
                assert_eq!(following.is_some_and(|entry| other.leads_with(entry)), goes_on);
                let same = goes_on && other.is_copied() == entry.is_copied();
                assert_eq!(following == Some(other), same);
                followed += u64::from(goes_on);
            }
        }
        assert_eq!(followed, 8);
        assert!(entries().all(|entry| entry.following(geometry(16, 4, true)).is_none()));
    }

    #[test]
    fn a_compressed_cluster_ends_with_a_sector() {
        let geometry = geometry(16, 4, false);
        let bits = 62 - (16 - 8);
        let word = COMPRESSED | 2 << bits | 0x5_0123;
        let expected = Compressed { host: HostOffset(0x5_0123), bytes: 3 * 512 - 0x123 };
        let found = L2Entry { word, bitmap: 0 }.mapping(0, geometry);
        assert_eq!(found, Ok(Mapping::Compressed(expected)));
    }
}
