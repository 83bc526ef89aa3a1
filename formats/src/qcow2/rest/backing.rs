//! The backing file of an image that nobody runs: another name, or all contents left to it.

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::qcow2::disk::header::{AUTOCLEAR_RAW_DATA, SECTOR};
use crate::qcow2::rest::bitmap;
use crate::qcow2::rest::check::change::change;
use crate::qcow2::rest::check::{Repair, check};
use crate::qcow2::rest::open::{clear_unknown_autoclear, read_header, write_fields};

/// See [`crate::rebase::set_backing`]: a name, and the name of a format.
///
/// Behind the first sector the new header differs from the old one only in bytes that this does not
/// refer to, if a cluster has room for both names: so those are written first.
pub fn set<F: Store>(file: &F, backing: Option<(&[u8], &[u8])>) -> Result<(), Error> {
    let mut old = read_header(file)?;
    if old.is_corrupt() {
        let what = "qcow2: Image is corrupt; cannot be opened read/write";
        return Err(Error::Corrupt { what, at: 72 });
    }
    if backing.is_some() && old.autoclear & AUTOCLEAR_RAW_DATA != 0 {
        let what = "Cannot set a backing file on images with data-file-raw";
        return Err(Error::Invalid(what.into()));
    }
    clear_unknown_autoclear(file, &mut old)?;
    let new = old.with_backing(backing)?;
    let (before, after) = (old.encode(), new.encode());
    let sectors = before.chunks(SECTOR as usize).zip(after.chunks(SECTOR as usize));
    for (at, (_, sector)) in sectors.enumerate().skip(1).filter(|(_, (old, new))| old != new) {
        let at = at as u64 * SECTOR;
        file.write_at(at, sector).map_err(Error::io("write the backing file's name"))?;
    }
    file.flush().map_err(Error::io("flush the backing file's name"))?;
    write_fields(file, &new)
}

/// See [`crate::rebase::empty`]. Two changes: the first leaves all that there was, the second moves what
/// is left to the file's beginning, so that the rest can be cut off.
pub fn empty<F: Store>(file: &F) -> Result<(), Error> {
    let header = read_header(file)?;
    if header.has_data_file() {
        let what = "an image with a data file cannot be emptied";
        return Err(Error::Unsupported(what.into()));
    }
    if !bitmap::read(file, &header)?.is_empty() {
        return Err(Error::Unsupported("an image with bitmaps cannot be emptied".into()));
    }
    for _ in 0..2 {
        change(file, |mut header, room| {
            header.l1_offset = room.put_l1(&vec![0; header.l1_size as usize])?;
            Ok(header)
        })?;
    }
    let end = check(file, Repair::None)?.image_end;
    if !file.has_fixed_len() && file.len().map_err(Error::io("find the image's length"))? > end {
        file.set_len(end).map_err(Error::io("cut off what is not needed"))?;
        file.flush().map_err(Error::io("flush the image"))?;
    }
    Ok(())
}
