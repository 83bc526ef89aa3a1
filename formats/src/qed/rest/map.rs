//! Where a stretch of a QED disk is, from its tables on disk.

use cowbell_engine::store::Store;
use cowbell_engine::units::{GuestOffset, HostOffset};

use crate::error::Error;
use crate::map::Kind;
use crate::qed::disk::layout::Entry;
use crate::qed::rest::open::Opened;

/// One lookup: `offset` lies within the disk, and so do the `len` bytes from there, at least 1.
pub(crate) fn piece<F: Store>(
    file: &F,
    image: &Opened,
    offset: u64,
    len: u64,
) -> Result<(Kind, u64), Error> {
    let geometry = image.geometry();
    let bounds = image.bounds();
    let guest = GuestOffset(offset);
    let l1_index = geometry.l1_index(guest);
    let span_end = (l1_index + 1).saturating_mul(geometry.l2_span());
    let table = match bounds.l1_entry(image.l1[l1_index as usize]) {
        Some(Some(table)) => table,
        Some(None) => {
            let wanted = (len / geometry.l2_span() + 1) as usize;
            let next = image.l1[l1_index as usize + 1..].iter().take(wanted);
            let more = next.take_while(|&&raw| raw == 0).count() as u64;
            let end = span_end.saturating_add(more.saturating_mul(geometry.l2_span()));
            return Ok((Kind::Unallocated, len.min(end - offset)));
        }
        None => {
            let at = image.header.l1_offset.0 + l1_index * 8;
            return Err(Error::Corrupt { what: "invalid L1 entry", at });
        }
    };
    // One sector of the table: 64 entries, and whatever disk it is on, no more than it has to read.
    const SECTOR: u64 = 512;
    let at = table.0 + geometry.l2_index(guest) * 8;
    let mut sector = [0; SECTOR as usize];
    file.read_at(at & !(SECTOR - 1), &mut sector).map_err(Error::io("read an L2 table"))?;
    let first = (at % SECTOR) as usize / 8;
    let mut entries = sector.as_chunks::<8>().0[first..].iter().map(|raw| u64::from_le_bytes(*raw));
    let inside = geometry.offset_in_cluster(guest);
    let size = geometry.cluster_size();
    let entry = entries.next().and_then(|raw| bounds.l2_entry(raw));
    let Some(entry) = entry else {
        return Err(Error::Corrupt { what: "invalid L2 entry", at });
    };
    let mut covered = size - inside;
    for raw in entries {
        let goes_on = match entry {
            Entry::Data(start) => {
                // `covered` bytes from `offset`, that is `covered + inside` from the cluster.
                Some(raw) == start.0.checked_add(covered + inside) && bounds.l2_entry(raw).is_some()
            }
            entry => Entry::decode(raw) == entry,
        };
        if covered >= len || !goes_on {
            break;
        }
        covered += size;
    }
    let kind = match entry {
        Entry::Unallocated => Kind::Unallocated,
        Entry::Zero => Kind::Zero(None),
        Entry::Data(start) => Kind::Data(HostOffset(start.0 + inside)),
    };
    Ok((kind, len.min(covered)))
}
