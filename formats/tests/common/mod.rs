//! Hosts for tests: one in memory, sparse; one of real files. And QEMU's tools, if there are any.

pub mod crash;
pub mod drive;
pub mod held;
pub mod shadow;
pub mod small_qcow2;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, MutexGuard};

use cowbell_engine::store::{Extent, Store};
use cowbell_engine::sys::uring::{Uring, UringOptions};
use cowbell_formats::{DiskHost, Host};

const PAGE: u64 = 4096;

/// Makes backends of io_uring. `None`: there is none here, as is said.
pub fn uring() -> Option<impl Fn() -> Uring> {
    let make = || Uring::new(UringOptions::default());
    if let Err(why) = make() {
        let _ = io::Write::write_all(&mut io::stderr(), format!("SKIPPED: {why}\n").as_bytes());
        return None;
    }
    Some(move || make().expect("io_uring"))
}

/// A sparse file in memory. Clones share the bytes.
#[derive(Clone, Debug, Default)]
pub struct MemFile {
    inner: Arc<Mutex<Inner>>,
    writable: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inner {
    pub len: u64,
    pub pages: BTreeMap<u64, Box<[u8]>>,
    /// Writes and truncations so far.
    pub writes: u64,
    /// Bytes read so far.
    pub bytes_read: u64,
    /// Fail every write from this one on.
    pub fail_after: Option<u64>,
}

impl MemFile {
    pub fn new(bytes: &[u8]) -> MemFile {
        let file = MemFile { inner: Arc::default(), writable: true };
        file.write_at(0, bytes).expect("memory");
        file.inner().writes = 0;
        file
    }

    pub fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no test panics while it holds this")
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.inner().len as usize];
        self.read_at(0, &mut bytes).expect("memory");
        bytes
    }

    pub fn poke_u64(&self, at: u64, value: u64) {
        self.write_at(at, &value.to_le_bytes()).expect("memory");
    }

    pub fn poke_u32(&self, at: u64, value: u32) {
        self.write_at(at, &value.to_le_bytes()).expect("memory");
    }

    /// As qcow2 has its numbers.
    pub fn poke_be64(&self, at: u64, value: u64) {
        self.write_at(at, &value.to_be_bytes()).expect("memory");
    }

    pub fn poke_be32(&self, at: u64, value: u32) {
        self.write_at(at, &value.to_be_bytes()).expect("memory");
    }

    pub fn peek_be64(&self, at: u64) -> u64 {
        self.peek_u64(at).swap_bytes()
    }

    pub fn peek_u64(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read_at(at, &mut bytes).expect("memory");
        u64::from_le_bytes(bytes)
    }

    fn may_write(&self) -> io::Result<MutexGuard<'_, Inner>> {
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut inner = self.inner();
        if inner.fail_after.is_some_and(|limit| inner.writes >= limit) {
            return Err(io::Error::from_raw_os_error(28));
        }
        inner.writes += 1;
        Ok(inner)
    }
}

impl Store for MemFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut inner = self.inner();
        inner.bytes_read += buf.len() as u64;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let skip = (at % PAGE) as usize;
            let n = (buf.len() - done).min(PAGE as usize - skip);
            match inner.pages.get(&(at / PAGE)) {
                Some(page) => buf[done..done + n].copy_from_slice(&page[skip..skip + n]),
                None => buf[done..done + n].fill(0),
            }
            done += n;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut inner = self.may_write()?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let skip = (at % PAGE) as usize;
            let n = (buf.len() - done).min(PAGE as usize - skip);
            let page =
                inner.pages.entry(at / PAGE).or_insert_with(|| vec![0; PAGE as usize].into());
            page[skip..skip + n].copy_from_slice(&buf[done..done + n]);
            done += n;
        }
        inner.len = inner.len.max(offset + buf.len() as u64);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.inner().len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inner = self.may_write()?;
        inner.len = len;
        let _ = inner.pages.split_off(&len.div_ceil(PAGE));
        if let Some(page) = inner.pages.get_mut(&(len / PAGE)) {
            page[(len % PAGE) as usize..].fill(0);
        }
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut inner = self.may_write()?;
        inner.len = inner.len.max(offset + len);
        Ok(())
    }

    fn extent_at(&self, offset: u64) -> io::Result<Extent> {
        let inner = self.inner();
        assert!(offset < inner.len);
        let page = offset / PAGE;
        let data = inner.pages.contains_key(&page);
        let end = if data {
            let mut end = page + 1;
            while inner.pages.contains_key(&end) {
                end += 1;
            }
            end
        } else {
            inner.pages.range(page..).next().map_or(u64::MAX / PAGE, |(&next, _)| next)
        };
        Ok(Extent { data, end: (end * PAGE).min(inner.len) })
    }

    fn is_writable(&self) -> bool {
        self.writable
    }
}

/// Files in memory, by path.
#[derive(Debug, Default)]
pub struct MemHost {
    files: Mutex<BTreeMap<PathBuf, MemFile>>,
    /// Where paths that were opened are listed.
    pub opened: Mutex<Vec<PathBuf>>,
}

impl MemHost {
    pub fn put(&self, path: &str, file: &MemFile) {
        self.files.lock().expect("no panics").insert(plain(Path::new(path)), file.clone());
    }

    pub fn get(&self, path: &str) -> Option<MemFile> {
        self.files.lock().expect("no panics").get(&plain(Path::new(path))).cloned()
    }
}

/// The path without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut real = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                real.pop();
            }
            std::path::Component::CurDir => {}
            part => real.push(part),
        }
    }
    real
}

impl Host for MemHost {
    type File = MemFile;

    fn open(&self, path: &Path, write: bool) -> io::Result<MemFile> {
        self.opened.lock().expect("no panics").push(path.into());
        let files = self.files.lock().expect("no panics");
        let file = files.get(&plain(path)).ok_or(io::Error::from_raw_os_error(2))?;
        Ok(MemFile { inner: file.inner.clone(), writable: write })
    }

    fn create_new(&self, path: &Path) -> io::Result<MemFile> {
        let path = &plain(path);
        let mut files = self.files.lock().expect("no panics");
        if files.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = MemFile::new(&[]);
        files.insert(path.clone(), file.clone());
        Ok(file)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.files.lock().expect("no panics").remove(&plain(path));
        Ok(())
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(plain(path))
    }

    fn identity(&self, file: &MemFile) -> io::Result<(u64, u64)> {
        Ok((0, Arc::as_ptr(&file.inner) as usize as u64))
    }
}

/// The real disk, through the page cache.
pub const DISK: DiskHost = DiskHost { direct: false };

/// Is QEMU here? Says so loudly if not; in CI its absence is a failure.
pub fn have_qemu() -> bool {
    if Command::new("qemu-img").arg("--version").output().is_ok_and(|out| out.status.success()) {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "qemu-img is missing");
    eprintln!("SKIPPED: qemu-img is not installed, nothing is compared with it");
    false
}

/// Runs a program in `dir`; its arguments are the words of `line`, or quoted by single quotes.
pub fn run(dir: &Path, line: &str) -> Output {
    let mut words = Vec::new();
    for (index, part) in line.split('\'').enumerate() {
        if index % 2 == 1 {
            words.push(part);
        } else {
            words.extend(part.split_whitespace());
        }
    }
    let (program, args) = words.split_first().expect("a program");
    Command::new(program).args(args).current_dir(dir).output().expect("it can be started")
}

/// As [`run`], must succeed; its output, both streams.
pub fn ok(dir: &Path, line: &str) -> String {
    let out = run(dir, line);
    let text =
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{line}: {text}");
    assert!(!text.contains("failed"), "{line}: {text}");
    text
}

/// An empty qcow2 image in memory. With clusters of 64 KiB: refcount table at 0x10000, block at
/// 0x20000, L1 table at 0x30000.
pub fn qcow2(options: &cowbell_formats::qcow2::rest::create::Options<'_>) -> MemFile {
    let file = MemFile::new(&[]);
    options.plan().expect("legal").write(&file).expect("memory");
    file.inner().writes = 0;
    file
}

/// A QED image in memory with 4 KiB clusters and tables of one cluster, 512 entries: header at 0,
/// L1 table at 4096. `backing` is a name and whether it is recorded as raw.
pub fn small_qed(size: u64, backing: Option<(&str, bool)>) -> MemFile {
    use cowbell_formats::qed::rest::create::{Options, write};
    let file = MemFile::new(&[]);
    let header = Options {
        size,
        cluster_size: 4096,
        table_clusters: 1,
        backing_name: backing.map(|(name, _)| name.as_bytes()),
        backing_is_raw: backing.is_some_and(|(_, raw)| raw),
    };
    write(&file, &header.header().expect("legal")).expect("memory");
    file.inner().writes = 0;
    file
}

/// Gives a [`small_qed`] an L2 table at the end of the file for L1 entry `index`; where it is.
pub fn add_l2(file: &MemFile, index: u64) -> u64 {
    let at = file.len().expect("memory").next_multiple_of(4096);
    file.set_len(at + 4096).expect("memory");
    file.poke_u64(4096 + index * 8, at);
    at
}

/// Gives the table at `l2` a data cluster full of `byte` at the end of the file; where it is.
pub fn add_data(file: &MemFile, l2: u64, index: u64, byte: u8) -> u64 {
    let at = file.len().expect("memory").next_multiple_of(4096);
    file.write_at(at, &[byte; 4096]).expect("memory");
    file.poke_u64(l2 + index * 8, at);
    at
}
