//! Which locks the files of an image get, and giving them back for a while.
//!
//! Other programs see them, and theirs are seen: they are QEMU's ([`cowbell_engine::sys::lock`]). An
//! image that is open for writing is held as a virtual machine's disk is: nobody else may write any
//! of its files. Readers ask of the files what QEMU's tools ask; raw files have no tables that a
//! writer could change under a reader, so their readers let others write.

use std::io;
use std::path::{Path, PathBuf};

use cowbell_engine::both::Either;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::lock::{Lock, LockState, Locking};

use crate::chain::{Chain, Host, OpenOptions};
use crate::error::Error;
use crate::probe::Format;

/// What a file is to the image that is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The image's own file.
    Image,
    /// One of the other files that it consists of: its data file, its extents.
    Part,
    /// The own file of an image that it is backed by.
    Backing,
    /// One of the other files of such an image.
    BackingPart,
}

/// The lock for a file of an image that is opened with these options. For [`Role::Part`], `write` in
/// the options says whether the part is written; for the backing ones, whether the top image is.
pub fn lock_for(role: Role, format: Format, options: &OpenOptions) -> Lock {
    match (role, format) {
        _ if options.force_share => Lock::SHARED_READER,
        (Role::Image | Role::Part, _) if options.write => Lock::WRITER,
        // Whoever writes the overlay relies on what is below it.
        (Role::Backing, Format::Raw) | (Role::BackingPart, _) if options.write => Lock::READER,
        (Role::Part | Role::BackingPart, _) => Lock::PART_READER,
        (Role::Image | Role::Backing, Format::Raw) => Lock::SHARED_READER,
        (Role::Image | Role::Backing, _) => Lock::READER,
    }
}

/// Takes the lock of an image's own file, which `host` has opened.
///
/// # Errors
///
/// [`Error::Locked`]; [`Error::Invalid`] for options that share and write.
pub fn lock_image<H: Host>(
    host: &H,
    file: &mut H::File,
    path: &Path,
    format: Format,
    options: &OpenOptions,
) -> Result<(), Error> {
    check_options(options)?;
    take(host, file, path, lock_for(Role::Image, format, options), options.locking)
}

/// Sharing is for readers.
pub(crate) fn check_options(options: &OpenOptions) -> Result<(), Error> {
    if options.force_share && options.write {
        let why = "force-share=on can only be used with read-only images";
        return Err(Error::Invalid(why.into()));
    }
    Ok(())
}

pub(crate) fn take<H: Host>(
    host: &H,
    file: &mut H::File,
    path: &Path,
    lock: Lock,
    locking: Locking,
) -> Result<(), Error> {
    let locked = host.lock(file, lock, locking);
    locked.map_err(|why| Error::Locked { path: path.to_path_buf(), why })
}

/// The locks of an open chain, to be given back and taken again while it runs: for an emulator that
/// hands its disk over to another one.
///
/// Get it from [`Chain::locks`] before the chain goes to an engine, and keep it beside the node.
/// The locks are those of the open files, whoever holds this: dropping it gives back nothing by
/// itself. But it keeps the files open, so drop it when the node is gone, or they stay locked.
///
/// [`release`](Locks::release) only when the node is drained and gets no requests. Others may write
/// the image afterwards; then what the node remembers of its tables is wrong, and the image has to
/// be opened anew instead of [`take`](Locks::take).
#[derive(Debug)]
pub struct Locks {
    files: Vec<(PathBuf, DiskFile, Lock)>,
    locking: Locking,
}

impl Locks {
    /// Gives all locks back. Again is no mistake.
    pub fn release(&mut self) {
        for (_, file, _) in &mut self.files {
            file.unlock();
        }
    }

    /// Takes all locks again, or none of them.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`]: somebody else has one of the files.
    pub fn take(&mut self) -> Result<(), Error> {
        let mut failed = None;
        for (path, file, lock) in &mut self.files {
            if file.lock_state() == LockState::Held(*lock) {
                continue;
            }
            if let Err(why) = file.lock(*lock, self.locking) {
                failed = Some(Error::Locked { path: path.clone(), why });
                break;
            }
        }
        match failed {
            Some(error) => {
                self.release();
                Err(error)
            }
            None => Ok(()),
        }
    }

    /// Are all of them held?
    pub fn are_held(&self) -> bool {
        self.files.iter().all(|(_, file, lock)| file.lock_state() == LockState::Held(*lock))
    }
}

/// A file that may be one of this machine, which has locks.
pub trait MaybeLocal {
    /// The file of this machine, if it is one.
    fn local(&self) -> Option<&DiskFile>;
}

impl MaybeLocal for DiskFile {
    fn local(&self) -> Option<&DiskFile> {
        Some(self)
    }
}

/// What is in the second backend is elsewhere.
impl<B> MaybeLocal for Either<DiskFile, B> {
    fn local(&self) -> Option<&DiskFile> {
        match self {
            Either::First(file) => Some(file),
            Either::Second(_) => None,
        }
    }
}

impl<F: MaybeLocal> Chain<F> {
    /// A handle to the locks of all files of this chain.
    ///
    /// # Errors
    ///
    /// When the descriptors cannot be duplicated.
    pub fn locks(&self) -> io::Result<Locks> {
        let mut files = Vec::new();
        for (path, file) in self.files() {
            if let LockState::Held(lock) = file.lock_state() {
                files.push((path, file.try_clone()?, lock));
            }
        }
        Ok(Locks { files, locking: Locking::On })
    }

    /// The files of this machine that should have been locked and that their file systems have no locks for.
    pub fn unlockable(&self) -> Vec<PathBuf> {
        let is_unlockable =
            |file: &DiskFile| matches!(file.lock_state(), LockState::Unsupported(_));
        self.files().filter(|(_, file)| is_unlockable(file)).map(|(path, _)| path).collect()
    }

    fn files(&self) -> impl Iterator<Item = (PathBuf, &DiskFile)> {
        self.layers.iter().flat_map(|layer| {
            (0..=layer.more.len())
                .filter_map(|i| Some((layer.numbered_path(i), layer.numbered(i).local()?)))
        })
    }
}
