//! What is where in a VDI image.

use cowbell_engine::store::Store;
use cowbell_engine::units::HostOffset;

use crate::error::Error;
use crate::map::{Holes, Kind, raw};
use crate::vdi::disk::layout::Entry;
use crate::vdi::rest::open::Opened;

/// What is at `offset`, and for how long at most `len` bytes. The file system is asked for the
/// holes of a fixed image alone, as QEMU does.
pub(crate) fn piece<F: Store>(
    file: &F,
    image: &Opened,
    offset: u64,
    len: u64,
    holes: Holes,
) -> Result<(Kind, u64), Error> {
    let Some((entry, end)) = image.run_at(offset, offset + len) else {
        let at = image.entry_offset(offset >> image.header.block_bits);
        return Err(Error::Corrupt { what: "invalid block map entry", at });
    };
    match entry {
        Entry::Zero => Ok((Kind::Zero(None), end - offset)),
        Entry::Block(block) => {
            let host = image.host_of(block, offset);
            if image.header.is_fixed() && holes == Holes::Told {
                return raw(file, host, end - offset, holes);
            }
            Ok((Kind::Data(HostOffset(host)), end - offset))
        }
    }
}
