//! Reading a deflated grain where that may wait.

use cowbell_engine::store::Store;

use crate::chain::Layer;
use crate::error::Error;
use crate::vmdk::Opened;
use crate::vmdk::disk::grain::{inflate, inflate_last, is_last, marked_len};
use crate::vmdk::disk::layout::{Entry, Header, SECTOR, SECTOR_BITS, corrupt};
use crate::vmdk::rest::open::{ExtentKind, read_entries};

/// Reads from byte `at` of the disk on into `part`, all in one compressed grain.
///
/// # Errors
///
/// [`Error::Corrupt`] if it is none after all; [`Error::Io`].
pub fn read<F: Store>(
    image: &Opened,
    layer: &Layer<F>,
    at: u64,
    part: &mut [u8],
) -> Result<(), Error> {
    let extent = image.extent_at(at);
    let file = layer.numbered(extent.file);
    let ExtentKind::Sparse(sparse) = &extent.kind else {
        return corrupt("VMDK flat extents have no grains", at);
    };
    let header = &sparse.header;
    let inside = at - extent.start;
    let Some(table) = sparse.table(inside >> header.span_bits())? else {
        return corrupt("grain table is gone", at);
    };
    let entry = (inside >> header.grain_bits) & ((1 << header.table_bits) - 1);
    let raw = read_entries(file, table + entry * 4, 1)?[0];
    let Some(Entry::Data(place)) = sparse.bounds().entry(raw) else {
        return corrupt("grain is gone", table + entry * 4);
    };
    let start = inside & !(header.grain_size() - 1);
    let grain = read_grain(file, header, place, start >> SECTOR_BITS)?;
    part.copy_from_slice(&grain[(inside - start) as usize..][..part.len()]);
    Ok(())
}

/// The contents of the grain at byte `place` of the file, which belongs at sector `lba`.
///
/// # Errors
///
/// [`Error::Corrupt`] if it is not that grain or cannot be inflated; [`Error::Io`].
pub fn read_grain<F: Store>(
    file: &F,
    header: &Header,
    place: u64,
    lba: u64,
) -> Result<Vec<u8>, Error> {
    let bad = |_| Error::Corrupt { what: "invalid compressed grain", at: place };
    let mut input = vec![0; SECTOR as usize];
    file.read_at(place, &mut input).map_err(Error::io("read a grain"))?;
    let len = marked_len(&input, lba, header.grain_size()).map_err(bad)?;
    input.resize(len as usize, 0);
    file.read_at(place, &mut input).map_err(Error::io("read a grain"))?;
    let mut grain = vec![0; header.grain_size() as usize];
    let inflate = if is_last(header, lba) { inflate_last } else { inflate };
    inflate(&input, &mut grain).map_err(bad)?;
    Ok(grain)
}
