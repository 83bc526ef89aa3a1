//! Making an empty VDI image: a header, a block map and, for a fixed one, its blocks.

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::preallocation::{Preallocation, preallocate};
use crate::vdi::disk::layout::{Header, UNALLOCATED};
use crate::vdi::rest::open::write_header;

/// Writes an empty image with this header over whatever is in `file`, and makes it stable. The
/// blocks of a fixed one take their space as `how` says.
///
/// # Errors
///
/// [`Error::Io`]; the file's contents are then undefined, and they are no VDI image: the header is
/// written last. [`Error::Unsupported`] for a block device.
pub fn write<F: Store>(file: &F, header: &Header, how: Preallocation) -> Result<(), Error> {
    file.set_len(0).map_err(Error::io("empty the file"))?;
    if file.len().map_err(Error::io("find the file's length"))? != 0 {
        return Err(Error::Unsupported("VDI images cannot be made on a block device".into()));
    }
    let fixed = header.allocated;
    file.set_len(header.offset_of(fixed)).map_err(Error::io("set the file's length"))?;
    let entry = |index: u32| if index < fixed { index } else { UNALLOCATED }.to_le_bytes();
    const CHUNK: u32 = 1 << 18;
    for from in (0..header.blocks).step_by(CHUNK as usize) {
        let to = header.blocks.min(from + CHUNK);
        let bytes: Vec<u8> = (from..to).flat_map(entry).collect();
        let at = header.map_offset + u64::from(from) * 4;
        file.write_at(at, &bytes).map_err(Error::io("write the block map"))?;
    }
    let bytes = header.offset_of(fixed) - header.data_offset;
    preallocate(file, header.data_offset, bytes, how)?;
    file.flush().map_err(Error::io("flush the block map"))?;
    write_header(file, header)
}
