//! How a new image takes its space.

use std::fmt;

use cowbell_engine::store::Store;

use crate::error::Error;

/// How an image takes its space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preallocation {
    /// Not at all: the file is a hole.
    Off,
    /// Not at all, but there is a place for everything. Only qcow2 knows this.
    Metadata,
    /// Reserved by the file system.
    Falloc,
    /// By writing zeros.
    Full,
}

impl fmt::Display for Preallocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        })
    }
}

/// Takes the space of `len` bytes at `at`, which read as zeros.
pub(crate) fn preallocate<F: Store>(
    file: &F,
    at: u64,
    len: u64,
    how: Preallocation,
) -> Result<(), Error> {
    const CHUNK: u64 = 1 << 20;
    match how {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc if len == 0 => {}
        Preallocation::Falloc => {
            file.allocate(at, len).map_err(Error::io("reserve the file's space"))?;
        }
        Preallocation::Full => {
            let zeros = vec![0; CHUNK.min(len) as usize];
            let mut done = 0;
            while done < len {
                let part = CHUNK.min(len - done);
                file.write_at(at + done, &zeros[..part as usize])
                    .map_err(Error::io("write the file's zeros"))?;
                done += part;
            }
        }
    }
    Ok(())
}
