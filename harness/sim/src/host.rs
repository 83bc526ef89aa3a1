//! A folder of simulated files, for everything that may wait: making images, opening chains,
//! checking, reading what a crash has left.
//!
//! Whatever is written is stable at once. A file that is open stays the file it was when its name
//! goes away, as on a real system.
#![expect(
    clippy::disallowed_types,
    reason = "a file is written through a shared reference, as on a real system"
)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cowbell_engine::store::{Extent, Store};
use cowbell_engine::units::Errno;
use cowbell_formats::Host;

use crate::backend::Damaged;
use crate::disk::{Contents, SECTOR, splitmix};

/// A part of one of several files: whole sectors, or everything from `first` on, its length
/// included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Which file.
    pub file: usize,
    /// Its first sector.
    pub first: u64,
    /// The sector behind its last; [`u64::MAX`]: the file's length.
    pub end: u64,
}

impl Place {
    /// Is this sector in it?
    pub fn has(self, sector: &Damaged) -> bool {
        self.file == sector.file && (self.first..self.end).contains(&sector.index)
    }

    /// A hash of what is there.
    pub fn hash_in(self, files: &[Contents]) -> u64 {
        let contents = &files[self.file];
        if self.end == u64::MAX {
            return contents.len();
        }
        (self.first..self.end).fold(0, |hash, i| splitmix(hash ^ contents.sector_hash(i)))
    }
}

/// Remembers which places of some files were read and written.
#[derive(Clone, Debug, Default)]
pub struct Watch(Rc<RefCell<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    looks: u64,
    reads: Vec<Place>,
    /// The same, to be found.
    known: BTreeSet<Place>,
    writes: Vec<Place>,
}

impl Watch {
    /// What was read, in order, each place once.
    pub fn reads(&self) -> Vec<Place> {
        self.0.borrow().reads.clone()
    }

    /// What was written, cut off or added.
    pub fn writes(&self) -> Vec<Place> {
        self.0.borrow().writes.clone()
    }

    /// How often something was read, or a length asked for.
    pub fn looks(&self) -> u64 {
        self.0.borrow().looks
    }

    fn saw_read(&self, place: Place) {
        let mut seen = self.0.borrow_mut();
        seen.looks += 1;
        if seen.known.insert(place) {
            seen.reads.push(place);
        }
    }
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct SimHost {
    files: Rc<RefCell<BTreeMap<PathBuf, SimFile>>>,
}

impl SimHost {
    /// An empty folder.
    pub fn new() -> SimHost {
        SimHost::default()
    }

    /// Puts a file there, in place of one that there was.
    pub fn put(&self, path: impl Into<PathBuf>, contents: Contents) {
        self.files.borrow_mut().insert(path.into(), SimFile::new(contents, false));
    }

    /// A folder of these files, and somebody who watches what is done with them.
    pub fn watched(names: &[&str], files: &[Contents], watch: &Watch) -> SimHost {
        let host = SimHost::new();
        for (file, (name, contents)) in names.iter().zip(files).enumerate() {
            let watched = Some((watch.clone(), file));
            let file = SimFile { watched, ..SimFile::new(contents.clone(), false) };
            host.files.borrow_mut().insert(name.into(), file);
        }
        host
    }

    /// What a file holds.
    pub fn contents(&self, path: impl AsRef<Path>) -> Option<Contents> {
        self.files.borrow().get(path.as_ref()).map(SimFile::contents)
    }
}

fn error(errno: Errno) -> io::Error {
    errno.into()
}

impl Host for SimHost {
    type File = SimFile;

    fn open(&self, path: &Path, write: bool) -> io::Result<SimFile> {
        let files = self.files.borrow();
        let file = files.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(SimFile { writable: write, ..file.clone() })
    }

    fn create_new(&self, path: &Path) -> io::Result<SimFile> {
        if self.files.borrow().contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.put(path, Contents::default());
        self.open(path, true)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let removed = self.files.borrow_mut().remove(path);
        removed.map(|_| ()).ok_or(io::ErrorKind::NotFound.into())
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(path.to_path_buf())
    }

    fn entropy(&self) -> u32 {
        0x5eed_c1d5
    }

    fn identity(&self, file: &SimFile) -> io::Result<(u64, u64)> {
        Ok((0, Rc::as_ptr(&file.contents).addr() as u64))
    }
}

/// An open file of a [`SimHost`].
#[derive(Clone, Debug)]
pub struct SimFile {
    contents: Rc<RefCell<Contents>>,
    writable: bool,
    /// Who watches, and what he calls this file.
    watched: Option<(Watch, usize)>,
}

impl SimFile {
    /// A file without a name.
    pub fn new(contents: Contents, writable: bool) -> SimFile {
        SimFile { contents: Rc::new(RefCell::new(contents)), writable, watched: None }
    }

    /// What it holds.
    pub fn contents(&self) -> Contents {
        self.contents.borrow().clone()
    }

    fn saw_read(&self, offset: u64, len: u64) {
        if let Some((watch, file)) = &self.watched {
            let (first, end) = (offset / SECTOR, (offset + len).div_ceil(SECTOR));
            watch.saw_read(Place { file: *file, first, end });
        }
    }

    fn saw_len(&self) {
        if let Some((watch, file)) = &self.watched {
            watch.saw_read(Place { file: *file, first: 0, end: u64::MAX });
        }
    }

    fn change(&self, start: u64, end: u64, change: impl FnOnce(&mut Contents)) -> io::Result<()> {
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if let Some((watch, file)) = &self.watched {
            let (first, end) = (start / SECTOR, end.div_ceil(SECTOR));
            watch.0.borrow_mut().writes.push(Place { file: *file, first, end });
        }
        change(&mut self.contents.borrow_mut());
        Ok(())
    }
}

impl Store for SimFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.saw_read(offset, buf.len() as u64);
        self.contents.borrow().read(offset, buf);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|&end| end <= LEN_MAX);
        let end = end.ok_or_else(|| error(Errno::TOO_BIG))?;
        if self.has_fixed_len() && end > self.contents.borrow().len() {
            return Err(error(Errno::NO_SPACE));
        }
        self.change(offset, end, |contents| contents.write(offset, buf))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.saw_len();
        Ok(self.contents.borrow().len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > LEN_MAX {
            return Err(error(Errno::TOO_BIG));
        }
        if self.has_fixed_len() {
            let is_there = len <= self.contents.borrow().len();
            return if is_there { Ok(()) } else { Err(error(Errno::NO_SPACE)) };
        }
        self.change(len, u64::MAX, |contents| contents.set_len(len))
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|&end| end <= LEN_MAX);
        let end = end.ok_or_else(|| error(Errno::TOO_BIG))?;
        if self.has_fixed_len() {
            return self.set_len(end);
        }
        self.change(offset, end, |contents| contents.set_len(contents.len().max(end)))
    }

    fn extent_at(&self, _offset: u64) -> io::Result<Extent> {
        self.saw_len();
        Ok(Extent { data: true, end: self.contents.borrow().len() })
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn has_fixed_len(&self) -> bool {
        self.contents.borrow().has_fixed_len()
    }
}

/// Bytes of a file, at most: as of ext4. It takes no memory where it is zeros.
pub(crate) const LEN_MAX: u64 = 1 << 44;
