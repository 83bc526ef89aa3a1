//! The real disk as a [`Host`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cowbell_engine::sys::disk::{Create, DiskFile, DiskOptions};
use cowbell_engine::sys::lock::{Lock, LockError, Locking};

use crate::chain::Host;

/// Opens files of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskHost {
    /// Past the page cache (O_DIRECT). Opening fails where a file system cannot do it.
    pub direct: bool,
}

impl Host for DiskHost {
    type File = DiskFile;

    fn open(&self, path: &Path, write: bool) -> io::Result<DiskFile> {
        DiskFile::open(path, &DiskOptions { write, direct: self.direct, ..DiskOptions::default() })
    }

    fn create_new(&self, path: &Path) -> io::Result<DiskFile> {
        let (write, create) = (true, Create::New);
        DiskFile::open(path, &DiskOptions { write, create, ..DiskOptions::default() })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        fs::canonicalize(path)
    }

    fn set_nocow(&self, file: &DiskFile) -> io::Result<()> {
        file.set_nocow()
    }

    fn lock(&self, file: &mut DiskFile, lock: Lock, locking: Locking) -> Result<(), LockError> {
        file.lock(lock, locking)
    }

    fn identity(&self, file: &DiskFile) -> io::Result<(u64, u64)> {
        file.identity()
    }
}
