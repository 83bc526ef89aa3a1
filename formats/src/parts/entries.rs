//! Reading tables of an image at rest.

use cowbell_engine::store::Store;

use crate::error::Error;

/// Bytes read at once: whole entries, whatever their size.
const CHUNK: usize = 1 << 20;

/// Reads `count` entries of a table from byte `at` on, each of `N` bytes that `decode` takes apart.
/// `doing` says for people what was to be done.
///
/// # Errors
///
/// [`Error::Io`].
pub(crate) fn read_entries<F: Store, T, const N: usize>(
    file: &F,
    mut at: u64,
    count: usize,
    decode: impl Fn([u8; N]) -> T,
    doing: &'static str,
) -> Result<Vec<T>, Error> {
    let mut entries = Vec::with_capacity(count);
    let mut chunk = vec![0; (count * N).min(CHUNK)];
    while entries.len() < count {
        let len = chunk.len().min((count - entries.len()) * N);
        file.read_at(at, &mut chunk[..len]).map_err(Error::io(doing))?;
        entries.extend(chunk[..len].as_chunks::<N>().0.iter().map(|entry| decode(*entry)));
        at += len as u64;
    }
    Ok(entries)
}
