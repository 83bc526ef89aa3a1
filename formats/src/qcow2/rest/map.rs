//! Saying what is where in one image, and reading what is compressed: blocking, without a cache.

use cowbell_engine::store::Store;
use cowbell_engine::units::{Errno, GuestOffset, HostOffset};

use crate::error::Error;
use crate::map::Kind;
use crate::qcow2::disk::codec::inflate;
use crate::qcow2::disk::header::SECTOR;
use crate::qcow2::disk::layout::{Compressed, Geometry, L1Entry, L2Entry, Mapping};
use crate::qcow2::rest::open::Opened;

/// What `offset` is, and for how many bytes: 1 to `len`. It lies within the disk.
///
/// # Errors
///
/// [`Error::Corrupt`] for an entry that says something impossible; [`Error::Io`].
pub fn lookup<F: Store>(
    file: &F,
    image: &Opened,
    offset: u64,
    len: u64,
) -> Result<(Kind, u64), Error> {
    let geometry = image.geometry();
    let Some(table) = table_of(image, offset)? else {
        return Ok((Kind::Unallocated, len.min(no_table_end(image, offset, len) - offset)));
    };
    let units = Units::load(file, geometry, table, offset)?;
    let first = units.mapping(0)?;
    let unit = geometry.unit_size();
    let inside = offset & (unit - 1);
    let mut covered = unit - inside;
    // A compressed cluster is looked up by itself, all its subclusters at once.
    if let Mapping::Compressed(_) = first {
        let cluster = geometry.cluster_size();
        return Ok((Kind::Compressed, len.min(cluster - (offset & (cluster - 1)))));
    }
    for i in 1..units.count {
        let joins =
            units.mapping(i).is_ok_and(|next| joins(first, next, i as u64, geometry, offset));
        if covered >= len || !joins {
            break;
        }
        covered += unit;
    }
    let here = |host: HostOffset| HostOffset(host.0 + (offset & (geometry.cluster_size() - 1)));
    let kind = match first {
        Mapping::Data(host) => Kind::Data(here(host)),
        Mapping::Zero(host) => Kind::Zero(host.map(here)),
        Mapping::Unallocated(_) | Mapping::Compressed(_) => Kind::Unallocated,
    };
    Ok((kind, len.min(covered)))
}

/// Where the compressed cluster is in the file that `offset` lies in.
///
/// # Errors
///
/// [`Error::Corrupt`] if it is no such cluster any more; [`Error::Io`].
pub fn packed<F: Store>(file: &F, image: &Opened, offset: u64) -> Result<Compressed, Error> {
    let mapping = match table_of(image, offset)? {
        Some(table) => Units::load(file, image.geometry(), table, offset)?.mapping(0)?,
        None => Mapping::Unallocated(None),
    };
    match mapping {
        Mapping::Compressed(place) => Ok(place),
        _ => Err(Error::Corrupt { what: "a compressed cluster is gone", at: 0 }),
    }
}

/// Reads the disk from `offset` on, which lies in a compressed cluster, into all of `part`, which
/// does not go beyond it.
///
/// # Errors
///
/// [`Error::Corrupt`] if it is no such cluster any more; [`Error::Io`], also for bytes that are no
/// compressed cluster.
pub fn read_compressed<F: Store>(
    file: &F,
    image: &Opened,
    offset: u64,
    part: &mut [u8],
) -> Result<(), Error> {
    let geometry = image.geometry();
    let Compressed { host, bytes } = packed(file, image, offset)?;
    const DOING: &str = "read a compressed cluster";
    let mut input = vec![0; bytes as usize];
    file.read_at(host.0, &mut input).map_err(Error::io(DOING))?;
    let size = geometry.cluster_size();
    let inside = (offset & (size - 1)) as usize;
    let mut cluster = vec![0; size as usize];
    inflate(image.header.compression, &input, &mut cluster)
        .map_err(|_| Error::Io { doing: DOING, errno: Errno::IO })?;
    part.copy_from_slice(&cluster[inside..inside + part.len()]);
    Ok(())
}

/// The L2 table that maps `offset`.
fn table_of(image: &Opened, offset: u64) -> Result<Option<HostOffset>, Error> {
    let geometry = image.geometry();
    let index = geometry.l1_index(GuestOffset(offset));
    let at = image.header.l1_offset + index * 8;
    let entry = L1Entry::decode(image.l1[index as usize], geometry)
        .map_err(|_| Error::Corrupt { what: "invalid L1 entry", at })?;
    match entry {
        Some(entry) if entry.table.0 >= image.file_len => {
            Err(Error::Corrupt { what: "an L1 entry points beyond the end of the file", at })
        }
        entry => Ok(entry.map(|entry| entry.table)),
    }
}

/// Where the stretch of L1 entries without a table ends that `offset` belongs to; not looking
/// further than `len` needs.
fn no_table_end(image: &Opened, offset: u64, len: u64) -> u64 {
    let geometry = image.geometry();
    let bits = geometry.l2_span_bits();
    let index = geometry.l1_index(GuestOffset(offset)) as usize;
    let wanted = (len >> bits) as usize + 1;
    let next = image.l1[index + 1..].iter().take(wanted);
    let more = next.take_while(|&&word| word == 0).count() as u64;
    (index as u64 + 1 + more).saturating_mul(1 << bits)
}

/// A few L2 entries, unit by unit: the cluster or subcluster that was asked for and those behind
/// it in the same sector of the table.
struct Units {
    sector: [u8; SECTOR as usize],
    geometry: Geometry,
    /// Where the sector is in the file.
    at: u64,
    /// The first unit, counted from the sector's first.
    first: usize,
    count: usize,
}

impl Units {
    fn load<F: Store>(
        file: &F,
        geometry: Geometry,
        table: HostOffset,
        offset: u64,
    ) -> Result<Units, Error> {
        let guest = GuestOffset(offset);
        let entry_at = table.0 + (geometry.l2_index(guest) << geometry.entry_bits());
        let at = entry_at & !(SECTOR - 1);
        let mut sector = [0; SECTOR as usize];
        file.read_at(at, &mut sector).map_err(Error::io("read an L2 table"))?;
        let per_entry = 1usize << (geometry.cluster_bits() - geometry.unit_bits());
        let entry = ((entry_at - at) >> geometry.entry_bits()) as usize;
        let first = entry * per_entry + geometry.sub_index(guest) as usize;
        let all = (SECTOR as usize >> geometry.entry_bits()) * per_entry;
        Ok(Units { sector, geometry, at, first, count: all - first })
    }

    fn mapping(&self, i: usize) -> Result<Mapping, Error> {
        let shift = self.geometry.cluster_bits() - self.geometry.unit_bits();
        let unit = self.first + i;
        let (entry, sub) = (unit >> shift, unit & ((1 << shift) - 1));
        let at = self.at + ((entry as u64) << self.geometry.entry_bits());
        L2Entry::read(&self.sector, entry, self.geometry)
            .mapping(sub as u32, self.geometry)
            .map_err(|_| Error::Corrupt { what: "invalid L2 entry", at })
    }
}

/// Does the unit that is `i` behind the one at `offset`, and maps to `next`, go on where that one,
/// which maps to `first`, began?
fn joins(first: Mapping, next: Mapping, i: u64, geometry: Geometry, offset: u64) -> bool {
    let size = geometry.cluster_size();
    // Hosts are those of whole clusters.
    let behind = (offset & (size - 1) & !(geometry.unit_size() - 1)) + i * geometry.unit_size();
    let expected = |host: HostOffset| host.0.checked_add(behind & !(size - 1)).map(HostOffset);
    match (first, next) {
        (Mapping::Data(a), Mapping::Data(b)) => expected(a) == Some(b),
        (Mapping::Zero(Some(a)), Mapping::Zero(Some(b))) => expected(a) == Some(b),
        (Mapping::Zero(None), Mapping::Zero(None)) => true,
        (Mapping::Unallocated(_), Mapping::Unallocated(_)) => true,
        _ => false,
    }
}
