//! What the files of an image held where it was looked at when the image was opened: enough to open it again, anywhere, without
//! the files.
//!
//! A [`KeptHost`] over a real one opens files for a trial: what is read is kept, what is written stays in memory. Without a
//! host below it has what was kept, from text, and zeros elsewhere. Opening an image reads its header and tables, and
//! nothing of a guest's, but for the first sector of a raw image, which tells that it is no other format.
#![expect(
    clippy::disallowed_types,
    reason = "a file is written through a shared reference, as on a real system"
)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cowbell_engine::store::{Extent, Store};
use cowbell_formats::Host;

const SECTOR: u64 = 512;
type Sector = [u8; SECTOR as usize];

/// What is known of a file.
#[derive(Debug, Default)]
struct Kept {
    /// As it was, and as it is after what the trial did.
    len: u64,
    len_now: u64,
    has_fixed_len: bool,
    /// Its sectors, as far as they were read.
    read: BTreeMap<u64, Sector>,
    /// Those that the trial wrote.
    written: BTreeMap<u64, Sector>,
}

/// Files under their names, and what the names lead to.
#[derive(Debug, Default)]
struct Files {
    by_name: BTreeMap<PathBuf, Rc<RefCell<Kept>>>,
    resolved: BTreeMap<PathBuf, PathBuf>,
}

/// See the module.
#[derive(Debug)]
pub struct KeptHost<H> {
    below: Option<H>,
    files: Rc<RefCell<Files>>,
}

/// A file of a [`KeptHost`].
#[derive(Debug)]
pub struct KeptFile<F> {
    name: PathBuf,
    below: Option<F>,
    kept: Rc<RefCell<Kept>>,
    is_writable: bool,
}

impl<H: Host> KeptHost<H> {
    /// Keeps what is read of the files of `below`.
    pub fn over(below: H) -> KeptHost<H> {
        KeptHost { below: Some(below), files: Rc::default() }
    }

    /// What was kept, as text: a line for each name, file and sector.
    pub fn to_text(&self) -> String {
        let files = self.files.borrow();
        let mut text = String::new();
        for (from, to) in &files.resolved {
            let _ = writeln!(text, "name {} {}", word_of(from), word_of(to));
        }
        for (name, kept) in &files.by_name {
            let kept = kept.borrow();
            let fixed = u8::from(kept.has_fixed_len);
            let _ = writeln!(text, "file {} {} {fixed}", word_of(name), kept.len);
            for (index, sector) in &kept.read {
                let _ = writeln!(text, "sector {index} {}", hex(sector));
            }
        }
        text
    }

    /// The same again, without the files: from the lines that [`KeptHost::to_text`] has made.
    ///
    /// # Errors
    ///
    /// Which line is none of them.
    pub fn from_lines<'t>(lines: impl Iterator<Item = &'t str>) -> Result<KeptHost<H>, String> {
        let mut files = Files::default();
        let mut last: Option<Rc<RefCell<Kept>>> = None;
        for line in lines {
            let bad = || format!("'{line:.60}' is no line of a file");
            let mut words = line.split(' ');
            let mut word = || words.next().ok_or_else(bad);
            match word()? {
                "name" => {
                    let (from, to) = (path_of(word()?), path_of(word()?));
                    files.resolved.insert(from.ok_or_else(bad)?, to.ok_or_else(bad)?);
                }
                "file" => {
                    let name = path_of(word()?).ok_or_else(bad)?;
                    let len = word()?.parse().map_err(|_| bad())?;
                    let has_fixed_len = word()? == "1";
                    let kept = Kept { len, len_now: len, has_fixed_len, ..Kept::default() };
                    let kept = Rc::new(RefCell::new(kept));
                    files.by_name.insert(name, Rc::clone(&kept));
                    last = Some(kept);
                }
                "sector" => {
                    let index = word()?.parse().map_err(|_| bad())?;
                    let bytes = unhex(word()?).ok_or_else(bad)?;
                    let sector = Sector::try_from(bytes).map_err(|_| bad())?;
                    let kept = last.as_ref().ok_or_else(bad)?;
                    kept.borrow_mut().read.insert(index, sector);
                }
                _ => return Err(bad()),
            }
        }
        Ok(KeptHost { below: None, files: Rc::new(RefCell::new(files)) })
    }
}

impl<H: Host> Host for KeptHost<H> {
    type File = KeptFile<H::File>;

    fn open(&self, path: &Path, write: bool) -> io::Result<Self::File> {
        let known = self.files.borrow().by_name.get(path).cloned();
        // A name may mean another file to who writes it. Nobody writes to it here.
        let below = self.below.as_ref().map(|host| host.open(path, write)).transpose()?;
        let kept = match (known, &below) {
            (Some(kept), _) => kept,
            (None, None) => return Err(io::ErrorKind::NotFound.into()),
            (None, Some(file)) => {
                let (len, has_fixed_len) = (file.len()?, file.has_fixed_len());
                let kept = Kept { len, len_now: len, has_fixed_len, ..Kept::default() };
                let kept = Rc::new(RefCell::new(kept));
                self.files.borrow_mut().by_name.insert(path.into(), Rc::clone(&kept));
                kept
            }
        };
        Ok(KeptFile { name: path.into(), below, kept, is_writable: write })
    }

    fn create_new(&self, _path: &Path) -> io::Result<Self::File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn remove(&self, _path: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        if let Some(host) = &self.below {
            let to = host.resolve(path)?;
            self.files.borrow_mut().resolved.insert(path.into(), to);
        }
        let files = self.files.borrow();
        files.resolved.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn identity(&self, file: &Self::File) -> io::Result<(u64, u64)> {
        Ok((0, Rc::as_ptr(&file.kept).addr() as u64))
    }
}

impl<F> KeptFile<F> {
    /// Under which name it was opened.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Its sectors, as far as they were read, with their numbers.
    pub fn sectors(&self) -> BTreeMap<u64, [u8; 512]> {
        self.kept.borrow().read.clone()
    }
}

impl<F: Store> KeptFile<F> {
    fn sector(&self, index: u64) -> io::Result<Sector> {
        let mut kept = self.kept.borrow_mut();
        let known = kept.written.get(&index).or_else(|| kept.read.get(&index));
        if let Some(sector) = known {
            return Ok(*sector);
        }
        let mut sector = [0; SECTOR as usize];
        if let Some(file) = &self.below
            && index < kept.len.div_ceil(SECTOR)
        {
            file.read_at(index * SECTOR, &mut sector)?;
            kept.read.insert(index, sector);
        }
        Ok(sector)
    }

    fn may_write(&self) -> io::Result<()> {
        if self.is_writable { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }
}

/// The parts of sectors that a range is: sector, first byte in it, bytes, and where these are in the range.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset.checked_add(done as u64).filter(|_| done < len)?;
        let from = (at % SECTOR) as usize;
        let count = (SECTOR as usize - from).min(len - done);
        done += count;
        Some((at / SECTOR, from, count, done - count))
    })
}

impl<F: Store> Store for KeptFile<F> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (index, from, count, at) in parts(offset, buf.len()) {
            buf[at..at + count].copy_from_slice(&self.sector(index)?[from..from + count]);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.may_write()?;
        for (index, from, count, at) in parts(offset, buf.len()) {
            let mut sector = self.sector(index)?;
            sector[from..from + count].copy_from_slice(&buf[at..at + count]);
            self.kept.borrow_mut().written.insert(index, sector);
        }
        let mut kept = self.kept.borrow_mut();
        kept.len_now = kept.len_now.max(offset.saturating_add(buf.len() as u64));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.kept.borrow().len_now)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.may_write()?;
        let mut kept = self.kept.borrow_mut();
        // What is cut off is zeros from then on.
        for index in len.div_ceil(SECTOR)..kept.len_now.div_ceil(SECTOR).min(len / SECTOR + 4096) {
            kept.written.insert(index, [0; SECTOR as usize]);
        }
        kept.len_now = len;
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.may_write()?;
        let mut kept = self.kept.borrow_mut();
        kept.len_now = kept.len_now.max(offset.saturating_add(len));
        Ok(())
    }

    fn extent_at(&self, _offset: u64) -> io::Result<Extent> {
        Ok(Extent { data: true, end: self.kept.borrow().len_now })
    }

    fn is_writable(&self) -> bool {
        self.is_writable
    }

    fn has_fixed_len(&self) -> bool {
        self.kept.borrow().has_fixed_len
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from(b"0123456789abcdef"[usize::from(nibble & 15)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
}

/// The bytes again.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    let pairs = text.as_bytes().chunks_exact(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// A path as a word of a record's head: in hexadecimal digits, and not empty.
pub fn word_of(path: &Path) -> String {
    format!("x{}", hex(path.as_os_str().as_bytes()))
}

/// The path again. `None`: that is no such word.
pub fn path_of(word: &str) -> Option<PathBuf> {
    Some(OsString::from_vec(unhex(word.strip_prefix('x')?)?).into())
}
