//! Files that somebody else has opened, as a [`Host`]: for a program that may open none itself.

use std::io;
use std::path::{Component, Path, PathBuf};

use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::lock::{Lock, LockError, Locking};

use crate::chain::Host;
use crate::disk_host::lock_patiently;

/// Open files by name, which is all that there is: a sandboxed program was given descriptors
/// ([`DiskFile::from_fd`]), one for each file of an image and of those below it.
///
/// The names are those by which the files will be asked for: the image's own as the program says it, the
/// others (backing files, data files, extents) as the image's headers do, in the folder of the
/// image that names them. `disk`, whose header names `base.img`, is given as `disk` and `base.img`;
/// `a/disk` as `a/disk` and `a/base.img`. There are no links; `.` and `..` go as they are written.
///
/// [`Policy::Any`](crate::Policy::Any) lets an image lead to no more than what was given.
#[derive(Debug, Default)]
pub struct GivenFiles {
    files: Vec<(PathBuf, DiskFile)>,
}

impl GivenFiles {
    /// None.
    pub fn new() -> GivenFiles {
        GivenFiles::default()
    }

    /// Is there one of this name?
    pub fn has(&self, name: impl AsRef<Path>) -> bool {
        let name = plain(name.as_ref());
        self.files.iter().any(|(other, _)| *other == name)
    }

    /// One more file, in the place of the one that had the name. An image that is to be written has to be open for
    /// writing.
    pub fn give(&mut self, name: impl AsRef<Path>, file: DiskFile) {
        let name = plain(name.as_ref());
        self.files.retain(|(other, _)| *other != name);
        self.files.push((name, file));
    }
}

impl Host for GivenFiles {
    type File = DiskFile;

    fn open(&self, path: &Path, write: bool) -> io::Result<DiskFile> {
        let name = plain(path);
        let found = self.files.iter().find(|(other, _)| *other == name);
        let (_, file) = found.ok_or(io::ErrorKind::NotFound)?;
        if write && !cowbell_engine::store::Store::is_writable(file) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        file.try_clone()
    }

    fn create_new(&self, _: &Path) -> io::Result<DiskFile> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn remove(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(plain(path))
    }

    fn identity(&self, file: &DiskFile) -> io::Result<(u64, u64)> {
        file.identity()
    }

    fn lock(&self, file: &mut DiskFile, lock: Lock, locking: Locking) -> Result<(), LockError> {
        lock_patiently(file, lock, locking)
    }
}

/// Without `.`, and without `..` where something is before it.
fn plain(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir
                if matches!(out.components().next_back(), Some(Component::Normal(_))) =>
            {
                out.pop();
            }
            part => out.push(part),
        }
    }
    out
}
