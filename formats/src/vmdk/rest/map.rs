//! What is where in an extent, looked up where that may wait.

use cowbell_engine::store::Store;
use cowbell_engine::units::HostOffset;

use crate::error::Error;
use crate::map::{Holes, Kind, raw};
use crate::vmdk::disk::layout::{Entry, SECTOR};
use crate::vmdk::rest::open::{Extent, ExtentKind, SECTOR_ENTRIES, read_entries};

/// What `offset` is in the extent that it lies in, whose file is `file`.
pub(crate) fn piece<F: Store>(
    file: &F,
    extent: &Extent,
    offset: u64,
    len: u64,
    holes: Holes,
) -> Result<(Kind, u64), Error> {
    let inside = offset - extent.start;
    let len = len.min(extent.len - inside);
    let sparse = match &extent.kind {
        ExtentKind::Flat(at) => return raw(file, at + inside, len, holes),
        ExtentKind::Zero => return Ok((Kind::Zero(None), len)),
        ExtentKind::Sparse(sparse) => sparse,
    };
    let header = &sparse.header;
    let span_bits = header.span_bits();
    let index = inside >> span_bits;
    let Some(table) = sparse.table(index)? else {
        let wanted = (len >> span_bits) as usize + 1;
        let next = sparse.directory[index as usize + 1..].iter().take(wanted);
        let more = next.take_while(|&&raw| raw == 0).count() as u64;
        let end = (index + 1 + more) << span_bits;
        return Ok((Kind::Unallocated, len.min(end - inside)));
    };
    let first = (inside >> header.grain_bits) & ((1 << header.table_bits) - 1);
    // One sector of the table, 128 entries.
    let at = table + first * 4;
    let in_sector = SECTOR_ENTRIES - (at % SECTOR) / 4;
    let count = in_sector.min((1 << header.table_bits) - first);
    let raw = read_entries(file, at, count as usize)?;
    let bounds = sparse.bounds();
    let Some(entry) = bounds.entry(raw[0]) else {
        return Err(Error::Corrupt { what: "invalid grain table entry", at });
    };
    let in_grain = inside & (header.grain_size() - 1);
    let mut covered = header.grain_size() - in_grain;
    let joins = |i: usize| match entry {
        _ if header.is_compressed() => false,
        Entry::Data(start) => {
            let next = start + ((i as u64) << header.grain_bits);
            bounds.entry(raw[i]) == Some(Entry::Data(next))
        }
        entry => bounds.entry(raw[i]) == Some(entry),
    };
    for i in 1..raw.len() {
        if covered >= len || !joins(i) {
            break;
        }
        covered += header.grain_size();
    }
    let kind = match entry {
        Entry::Unallocated => Kind::Unallocated,
        Entry::Zero => Kind::Zero(None),
        Entry::Data(_) if header.is_compressed() => Kind::Compressed,
        Entry::Data(start) => Kind::Data(HostOffset(start + in_grain)),
    };
    Ok((kind, len.min(covered)))
}
