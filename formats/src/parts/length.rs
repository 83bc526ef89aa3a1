//! How long a file is taken to be.

use cowbell_engine::store::Store;

use crate::error::Error;

const SECTOR: u64 = 512;

/// The file's length, rounded up to a multiple of 512 as QEMU does: the bytes that are missing
/// from a last sector read as zeros, and a cluster is not lost for want of them.
///
/// # Errors
///
/// [`Error::Io`].
pub fn file_len<F: Store>(file: &F) -> Result<u64, Error> {
    let len = file.len().map_err(Error::io("find the image's length"))?;
    Ok(len.checked_next_multiple_of(SECTOR).unwrap_or(len))
}
