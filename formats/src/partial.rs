//! Files that have their name only when they are done.
//!
//! Whoever fills an image for a long time makes it as `NAME.partial`. What an image says of its own
//! files are their later names. When all is written and stable, [`PartialFiles::keep`] gives them
//! these, in place of what has them until then; if it never comes to that, the partial files go, and
//! nobody has seen half an image under its name.
//!
//! What is no regular file, a block device above all, cannot be replaced: it is written in place.
//! A link stays, and what it leads to is replaced.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::lock::{Lock, LockError, Locking};

use crate::chain::Host;
use crate::disk_host::DiskHost;

/// The files that are made for one image. Dropped, it removes them, but for one that was taken up.
#[derive(Debug)]
pub struct PartialFiles {
    locking: Locking,
    made: Mutex<Vec<Made>>,
    /// What is to be replaced: nobody else has it open.
    replaced: Mutex<Vec<DiskFile>>,
}

#[derive(Debug)]
struct Made {
    name: PathBuf,
    partial: PathBuf,
    /// Somebody else has begun it.
    is_taken_up: bool,
}

/// Where what is asked for by a name is written.
enum Place {
    InPlace,
    Beside(Made),
}

impl PartialFiles {
    /// None yet. What they are to replace is locked so.
    pub fn new(locking: Locking) -> PartialFiles {
        PartialFiles { locking, made: Mutex::default(), replaced: Mutex::default() }
    }

    /// `host`, of this machine's files, through which an image is made and then opened for writing.
    /// What is opened for reading only is what has the name.
    pub fn host<H: Host>(&self, host: H) -> PartialHost<'_, H> {
        PartialHost { host, files: self }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        locked(&self.made).len()
    }

    /// Takes up the file that somebody else has begun of an image of this name, instead of making one.
    ///
    /// # Errors
    ///
    /// If what has the name is locked. (The file itself is locked by who opens it.)
    pub fn take_up(&self, name: &Path) -> io::Result<()> {
        if let Place::Beside(made) = place(name) {
            self.hold(&made.name)?;
            locked(&self.made).push(Made { is_taken_up: true, ..made });
        }
        Ok(())
    }

    /// Leaves them there, partial as they are.
    pub fn leave(self) {
        locked(&self.made).clear();
    }

    /// Are there none? Then all is written in place.
    pub fn is_empty(&self) -> bool {
        locked(&self.made).is_empty()
    }

    /// Gives all of them their names, and makes that stable. What they contain has to be stable.
    ///
    /// # Errors
    ///
    /// The first that fails; some may have their names then, but not the one that was made first,
    /// which is the image's own.
    pub fn keep(self) -> io::Result<()> {
        let mut folders = Vec::new();
        while let Some(Made { name, partial, .. }) = self.next() {
            let result = take_place(&name, &partial);
            if result.is_err() {
                // The first error is the one to report, not that of the tidying up.
                let _ = fs::remove_file(&partial);
                return result;
            }
            let folder = name.parent().filter(|folder| !folder.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new(".")).to_path_buf();
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
        folders.iter().try_for_each(|folder| sync_folder(folder))
    }

    /// The file that was made last of those that have no name yet.
    fn next(&self) -> Option<Made> {
        locked(&self.made).pop()
    }

    /// Opens what a new file will replace, and locks it.
    fn hold(&self, name: &Path) -> io::Result<()> {
        let mut old = match DiskHost::default().open(name, true) {
            Ok(old) => old,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        lock(&mut old, self.locking)?;
        locked(&self.replaced).push(old);
        Ok(())
    }
}

impl Drop for PartialFiles {
    fn drop(&mut self) {
        for made in locked(&self.made).iter().filter(|made| !made.is_taken_up) {
            // Whoever is told of an error is told of the one that led here.
            let _ = fs::remove_file(&made.partial);
        }
    }
}

/// See [`PartialFiles::host`].
#[derive(Debug)]
pub struct PartialHost<'a, H> {
    host: H,
    files: &'a PartialFiles,
}

impl<H: Host> Host for PartialHost<'_, H> {
    type File = H::File;

    fn open(&self, path: &Path, write: bool) -> io::Result<H::File> {
        match place(path) {
            Place::Beside(made) if write => self.host.open(&made.partial, write),
            _ => self.host.open(path, write),
        }
    }

    fn create_new(&self, path: &Path) -> io::Result<H::File> {
        let Place::Beside(made) = place(path) else { return self.host.create_new(path) };
        self.files.hold(&made.name)?;
        // Notes on another file of that name are no longer of use.
        let forget = || match self.host.remove(&notes(&made.partial)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        if !fs::exists(&made.partial)? {
            forget()?;
        }
        let file = match self.host.create_new(&made.partial) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // Somebody's who was killed, or is still at it.
                let mut old = DiskHost::default().open(&made.partial, true)?;
                lock(&mut old, self.files.locking)?;
                forget()?;
                self.host.remove(&made.partial)?;
                self.host.create_new(&made.partial)
            }
            file => file,
        }?;
        locked(&self.files.made).push(made);
        Ok(file)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let Place::Beside(gone) = place(path) else { return self.host.remove(path) };
        locked(&self.files.made).retain(|made| made.partial != gone.partial);
        self.host.remove(&gone.partial)
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        self.host.resolve(path)
    }

    fn set_nocow(&self, file: &H::File) -> io::Result<()> {
        self.host.set_nocow(file)
    }

    fn identity(&self, file: &H::File) -> io::Result<(u64, u64)> {
        self.host.identity(file)
    }

    fn lock(&self, file: &mut H::File, lock: Lock, locking: Locking) -> Result<(), LockError> {
        self.host.lock(file, lock, locking)
    }

    fn entropy(&self) -> u32 {
        self.host.entropy()
    }
}

/// Where an image of this name is made; `None`: in place.
pub fn beside(name: &Path) -> Option<PathBuf> {
    match place(name) {
        Place::Beside(made) => Some(made.partial),
        Place::InPlace => None,
    }
}

/// Where somebody who wants to go on with a partial file keeps notes on it. They go when it is made anew.
pub fn notes(partial: &Path) -> PathBuf {
    let mut name = partial.as_os_str().to_owned();
    name.push(".resume");
    name.into()
}

/// A panic elsewhere leaves the list whole.
fn locked<T>(list: &Mutex<T>) -> MutexGuard<'_, T> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lock(file: &mut DiskFile, locking: Locking) -> io::Result<()> {
    let locked = DiskHost::default().lock(file, Lock::WRITER, locking);
    locked.map_err(|why| io::Error::other(why.to_string()))
}

/// Where `path` is written: beside its name, if that is a regular file's or nobody's.
fn place(path: &Path) -> Place {
    /// As many links lead on as the kernel follows.
    const LINKS_MAX: usize = 40;
    let mut name = path.to_path_buf();
    for _ in 0..LINKS_MAX {
        let Ok(next) = fs::read_link(&name) else { break };
        name = name.parent().unwrap_or(Path::new("")).join(next);
    }
    if let Ok(there) = fs::metadata(path) {
        let id = |meta: &fs::Metadata| (meta.dev(), meta.ino());
        // (A link in /proc may lead to a file that no name leads to.)
        let is_named = fs::symlink_metadata(&name).is_ok_and(|named| id(&named) == id(&there));
        if !there.is_file() || !is_named {
            return Place::InPlace;
        }
    }
    let Some(last) = name.file_name() else { return Place::InPlace };
    let mut last = OsString::from(last);
    last.push(".partial");
    let partial = name.with_file_name(last);
    Place::Beside(Made { name, partial, is_taken_up: false })
}

/// Puts one file in the other's place. Who may use it stays as it was.
fn take_place(name: &Path, partial: &Path) -> io::Result<()> {
    if let Ok(before) = fs::metadata(name) {
        // Only the superuser can, and others need not.
        let _ = chown(partial, Some(before.uid()), Some(before.gid()));
        fs::set_permissions(partial, before.permissions())?;
    }
    fs::rename(partial, name)
}

/// Makes the names in a folder stable.
fn sync_folder(folder: &Path) -> io::Result<()> {
    match fs::File::open(folder)?.sync_all() {
        // Not every file system knows of that.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::{CreateOptions, Format, OpenOptions, Policy, create, open};

    fn names(folder: &Path) -> Vec<String> {
        let names = fs::read_dir(folder).expect("it is there");
        let name = |entry: io::Result<fs::DirEntry>| entry.expect("read").file_name();
        let mut names: Vec<String> =
            names.map(|entry| name(entry).into_string().expect("text")).collect();
        names.sort();
        names
    }

    fn make(files: &PartialFiles, path: &Path, format: Format, options: &str) {
        let mut wanted = CreateOptions { size: Some(1 << 20), ..CreateOptions::default() };
        wanted.parse(format, options).expect("valid");
        create(&files.host(DiskHost::default()), path, format, &wanted).expect("it is made");
    }

    #[test]
    fn all_files_of_an_image_get_their_names_at_once() {
        for (format, options, parts) in [
            (Format::Raw, "", &["a"][..]),
            (Format::Qcow2, "data_file=d", &["a", "d"]),
            (Format::Vmdk, "subformat=twoGbMaxExtentFlat", &["a", "a-f001"]),
        ] {
            for is_kept in [true, false] {
                let folder = tempfile::tempdir().expect("a folder");
                let path = folder.path().join("a");
                let files = PartialFiles::new(Locking::Auto);
                make(&files, &path, format, options);
                let mut partial: Vec<_> =
                    parts.iter().map(|part| format!("{part}.partial")).collect();
                partial.sort();
                assert_eq!(names(folder.path()), partial);
                let as_known = OpenOptions {
                    format: Some(format),
                    write: true,
                    files: Policy::Any,
                    ..OpenOptions::default()
                };
                let host = files.host(DiskHost::default());
                drop(open(&host, &path, &as_known).expect("what was made opens"));
                if is_kept {
                    files.keep().expect("nothing is in its way");
                    assert_eq!(names(folder.path()), parts);
                    open(&DiskHost::default(), &path, &as_known).expect("its names are right");
                } else {
                    drop(files);
                    assert_eq!(names(folder.path()), [""; 0]);
                }
            }
        }
    }

    #[test]
    fn what_has_the_name_stays_until_it_is_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, link) = (folder.path().join("a"), folder.path().join("link"));
        fs::write(&path, "old").expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o604)).expect("set");
        symlink("a", &link).expect("a link");
        // Left by somebody who was killed.
        fs::write(folder.path().join("a.partial"), "older").expect("written");
        let files = PartialFiles::new(Locking::On);
        make(&files, &link, Format::Raw, "");
        assert_eq!(fs::read(&path).expect("it is there"), b"old");
        // Somebody else wants the same.
        let others = PartialFiles::new(Locking::On);
        others.host(DiskHost::default()).create_new(&path).expect_err("it is locked");
        drop(others);
        assert_eq!(names(folder.path()), ["a", "a.partial", "link"]);
        files.keep().expect("nothing is in its way");
        assert_eq!(names(folder.path()), ["a", "link"]);
        let meta = fs::metadata(&path).expect("it is there");
        assert_eq!((meta.len(), meta.permissions().mode() & 0o777), (1 << 20, 0o604));
        assert!(fs::read_link(&link).is_ok(), "a link stays one");
    }

    #[test]
    fn what_was_begun_can_be_taken_up() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        let begun = PartialFiles::new(Locking::Auto);
        make(&begun, &path, Format::Raw, "");
        fs::write(notes(&beside(&path).expect("a file")), "").expect("written");
        begun.leave();
        let both = ["a.partial", "a.partial.resume"];
        assert_eq!(names(folder.path()), both);
        // Who fails leaves it once more.
        let files = PartialFiles::new(Locking::Auto);
        files.take_up(&path).expect("it is free");
        assert_eq!(files.count(), 1);
        files.host(DiskHost::default()).open(&path, true).expect("it is there");
        drop(files);
        assert_eq!(names(folder.path()), both);
        let files = PartialFiles::new(Locking::Auto);
        files.take_up(&path).expect("it is free");
        files.keep().expect("nothing is in its way");
        assert_eq!(names(folder.path()), ["a", "a.partial.resume"]);
        // Notes are on what was there, not on what is made.
        for is_there in [false, true] {
            fs::write(folder.path().join("a.partial.resume"), "").expect("written");
            if is_there {
                fs::write(folder.path().join("a.partial"), "").expect("written");
            }
            let files = PartialFiles::new(Locking::Auto);
            make(&files, &path, Format::Raw, "");
            assert_eq!(names(folder.path()), ["a", "a.partial"]);
        }
    }

    #[test]
    fn what_is_no_file_is_written_in_place() {
        assert!(matches!(place(Path::new("/dev/null")), Place::InPlace));
        assert!(matches!(place(Path::new("/")), Place::InPlace));
        let file = tempfile::tempfile().expect("one without a name");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let path = PathBuf::from(format!("/proc/self/fd/{fd}"));
        assert!(matches!(place(&path), Place::InPlace));
    }
}
