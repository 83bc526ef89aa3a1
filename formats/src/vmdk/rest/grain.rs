//! Reading a deflated grain where that may wait.

use cowbell_engine::store::Store;

use crate::chain::Layer;
use crate::error::Error;
use crate::vmdk::Opened;
use crate::vmdk::disk::grain::{inflate, inflate_last, is_last, marked_len};
use crate::vmdk::disk::layout::{Entry, Header, SECTOR, SECTOR_BITS, corrupt};
use crate::vmdk::rest::open::{ExtentKind, read_entries};

/// A grain that is compressed.
pub(crate) struct Packed<'a> {
    /// Which of the layer's files it is in, and that file's header.
    pub file: usize,
    pub header: &'a Header,
    /// Its first byte on the disk, and the sector of the extent that this is.
    pub start: u64,
    pub lba: u64,
    /// The first byte of its marker in the file.
    pub place: u64,
}

/// The compressed grain that byte `at` of the disk lies in.
///
/// # Errors
///
/// [`Error::Corrupt`] if it is none after all; [`Error::Io`].
pub(crate) fn packed<'a, F: Store>(
    image: &'a Opened,
    layer: &Layer<F>,
    at: u64,
) -> Result<Packed<'a>, Error> {
    let extent = image.extent_at(at);
    let ExtentKind::Sparse(sparse) = &extent.kind else {
        return corrupt("VMDK flat extents have no grains", at);
    };
    let header = &sparse.header;
    let inside = at - extent.start;
    let Some(table) = sparse.table(inside >> header.span_bits())? else {
        return corrupt("grain table is gone", at);
    };
    let entry = (inside >> header.grain_bits) & ((1 << header.table_bits) - 1);
    let raw = read_entries(layer.numbered(extent.file), table + entry * 4, 1)?[0];
    let Some(Entry::Data(place)) = sparse.bounds().entry(raw) else {
        return corrupt("grain is gone", table + entry * 4);
    };
    let first = inside & !(header.grain_size() - 1);
    let (start, lba) = (extent.start + first, first >> SECTOR_BITS);
    Ok(Packed { file: extent.file, header, start, lba, place })
}

impl Packed<'_> {
    /// Bytes in the file, marker included, up to the end of a sector: as the marker says. Where none is, it has one sector at least.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn bytes<F: Store>(&self, layer: &Layer<F>) -> Result<u64, Error> {
        let mut marker = [0; SECTOR as usize];
        let file = layer.numbered(self.file);
        file.read_at(self.place, &mut marker).map_err(Error::io("read a grain"))?;
        let len = marked_len(&marker, self.lba, self.header.grain_size());
        Ok(len.unwrap_or(1).next_multiple_of(SECTOR))
    }
}

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
    let Packed { file, header, start, lba, place } = packed(image, layer, at)?;
    let grain = read_grain(layer.numbered(file), header, place, lba)?;
    part.copy_from_slice(&grain[(at - start) as usize..][..part.len()]);
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
