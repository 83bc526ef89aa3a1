//! The real disk as a [`Host`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::{Create, DiskFile, DiskOptions};
use cowbell_engine::sys::lock::{Lock, LockError, Locking};

use crate::chain::Host;
use crate::name::is_remote;

/// How long the lock of a process that has ended may outlast it: so long is a lock asked for again
/// that nobody seems to hold. (Another user's process may hold it, unseen; it is refused after that.)
const LINGER: Duration = Duration::from_secs(1);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// Opens files of this machine; what has [an address](is_remote) is refused.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskHost {
    /// Past the page cache (O_DIRECT). Opening fails where a file system cannot do it.
    pub direct: bool,
}

impl Host for DiskHost {
    type File = DiskFile;

    fn open(&self, path: &Path, write: bool) -> io::Result<DiskFile> {
        refuse_remote(path)?;
        DiskFile::open(path, &DiskOptions { write, direct: self.direct, ..DiskOptions::default() })
    }

    fn create_new(&self, path: &Path) -> io::Result<DiskFile> {
        refuse_remote(path)?;
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
        lock_patiently(file, lock, locking)
    }

    fn identity(&self, file: &DiskFile) -> io::Result<(u64, u64)> {
        file.identity()
    }
}

/// A file that is really called so is spelled `./nbd:...`.
fn refuse_remote(path: &Path) -> io::Result<()> {
    if !is_remote(path) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "disks of servers are not reached from here"))
}

/// Locks a file; waits a moment for what seems to be the lock of a process that has ended.
pub(crate) fn lock_patiently(
    file: &mut DiskFile,
    lock: Lock,
    locking: Locking,
) -> Result<(), LockError> {
    let begun = clock();
    loop {
        let taken = file.lock(lock, locking);
        let is_ownerless =
            matches!(&taken, Err(LockError::Conflict { holders, .. }) if holders.is_empty());
        if !is_ownerless || clock().since(begun) >= LINGER.as_nanos() as u64 {
            return taken;
        }
        std::thread::sleep(PAUSE);
    }
}
