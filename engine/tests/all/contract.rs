//! The backends of real files, held to the contract.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cowbell_engine::backend::{Backend, FileInfo};
use cowbell_engine::both::{Both, Either};
use cowbell_engine::contract::{FILE, Rig, run_all};
use cowbell_engine::faulty::{Fault, Faulty};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::disk::{DiskFile, DiskOptions};
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::sys::pool::{Pool, PoolOptions, Threads};
use cowbell_engine::sys::uring::{Uring, UringOptions};
use cowbell_engine::trace::Trace;
use tempfile::TempDir;

/// Files in a directory of their own, opened one way, under backends made one way, which know them as
/// something of their own.
struct Disk<F, T = DiskFile> {
    dir: TempDir,
    direct: bool,
    made: u32,
    backend: F,
    known_as: fn(DiskFile) -> T,
}

impl<F> Disk<F> {
    fn new(parent: &Path, direct: bool, backend: F) -> Disk<F> {
        Disk::known_as(parent, direct, |file| file, backend)
    }
}

impl<F, T> Disk<F, T> {
    fn known_as(
        parent: &Path,
        direct: bool,
        known_as: fn(DiskFile) -> T,
        backend: F,
    ) -> Disk<F, T> {
        let dir = tempfile::tempdir_in(parent).expect("a directory for scratch files");
        Disk { dir, direct, made: 0, backend, known_as }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join(format!("file-{}", self.made))
    }
}

impl<B: Backend, F: FnMut() -> io::Result<B>> Rig for Disk<F, B::File> {
    type Backend = B;

    fn make(&mut self, contents: &[u8]) -> (B, FileInfo) {
        self.made += 1;
        fs::write(self.path(), contents).expect("a scratch file");
        let options = DiskOptions { write: true, direct: self.direct, ..DiskOptions::default() };
        let file = DiskFile::open(self.path(), &options).expect("the scratch file opens");
        let mut backend = (self.backend)().expect("a backend");
        let info = backend.attach(FILE, (self.known_as)(file)).expect("it attaches");
        (backend, info)
    }

    fn contents(&mut self, _: &mut B) -> Vec<u8> {
        fs::read(self.path()).expect("the scratch file reads")
    }
}

/// Where files are opened with O_DIRECT.
fn on_disk() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// A file system in memory, if there is one.
fn in_memory() -> Option<&'static Path> {
    let path = Path::new("/dev/shm");
    if path.is_dir() {
        return Some(path);
    }
    let _ = writeln!(io::stderr(), "SKIPPED: there is no {}", path.display());
    None
}

fn aio(depth: u32, nowait: bool) -> impl FnMut() -> io::Result<Aio> {
    move || Aio::new(AioOptions { depth, nowait, ..AioOptions::default() })
}

fn pool(threads: usize, depth: usize) -> impl FnMut() -> io::Result<Pool> {
    move || Pool::new(PoolOptions { threads, depth, ..PoolOptions::default() })
}

/// `None`: there is no io_uring here, as is said.
fn uring(depth: u32) -> Option<impl FnMut() -> io::Result<Uring>> {
    let make = move || Uring::new(UringOptions { depth, ..UringOptions::default() });
    let tried = make();
    if let Err(why) = &tried {
        let _ = writeln!(io::stderr(), "SKIPPED: {why}");
    }
    tried.is_ok().then_some(make)
}

#[test]
fn inline() {
    run_all(&mut Disk::new(on_disk(), false, || Ok(Inline::new())));
    run_all(&mut Disk::new(on_disk(), true, || Ok(Inline::new())));
}

#[test]
fn pool_buffered() {
    run_all(&mut Disk::new(on_disk(), false, pool(16, 256)));
}

#[test]
fn pool_direct() {
    run_all(&mut Disk::new(on_disk(), true, pool(4, 32)));
}

#[test]
fn pool_of_one_thread() {
    run_all(&mut Disk::new(on_disk(), false, pool(1, 8)));
}

/// Backends of each kind, one after the other and two at once, on the same two threads.
#[test]
fn threads_of_several() {
    let threads = Threads::new(2, false).expect("a thread");
    let _other = Pool::over(&threads, 8).expect("a backend");
    run_all(&mut Disk::new(on_disk(), false, || Pool::over(&threads, 32)));
    run_all(&mut Disk::new(on_disk(), true, || Pool::over(&threads, 8)));
    let options = AioOptions { depth: 5, ..AioOptions::default() };
    run_all(&mut Disk::new(on_disk(), true, || Aio::over(&threads, options)));
    run_all(&mut Disk::new(on_disk(), false, || Aio::over(&threads, options)));
    run_all(&mut Disk::known_as(on_disk(), false, Either::Second, || {
        Both::new(Aio::over(&threads, options)?, Pool::over(&threads, 8)?)
    }));
    if uring(5).is_some() {
        let options = UringOptions { depth: 5, ..UringOptions::default() };
        run_all(&mut Disk::new(on_disk(), true, || Uring::over(&threads, options)));
    }
}

#[test]
fn aio_direct() {
    run_all(&mut Disk::new(on_disk(), true, aio(128, false)));
}

#[test]
fn aio_of_small_depth() {
    run_all(&mut Disk::new(on_disk(), true, aio(5, false)));
    run_all(&mut Disk::new(on_disk(), true, aio(5, true)));
}

#[test]
fn aio_buffered() {
    run_all(&mut Disk::new(on_disk(), false, aio(128, false)));
}

#[test]
fn aio_that_may_not_wait() {
    run_all(&mut Disk::new(on_disk(), true, aio(128, true)));
}

#[test]
fn aio_in_memory() {
    let Some(dir) = in_memory() else { return };
    run_all(&mut Disk::new(dir, true, aio(128, false)));
    run_all(&mut Disk::new(dir, true, aio(128, true)));
}

#[test]
fn uring_direct() {
    let Some(uring) = uring(128) else { return };
    run_all(&mut Disk::new(on_disk(), true, uring));
}

#[test]
fn uring_of_small_depth() {
    let Some(uring) = uring(5) else { return };
    run_all(&mut Disk::new(on_disk(), true, uring));
}

#[test]
fn uring_buffered() {
    let Some(uring) = uring(128) else { return };
    run_all(&mut Disk::new(on_disk(), false, uring));
}

#[test]
fn uring_in_memory() {
    let (Some(dir), Some(uring)) = (in_memory(), uring(128)) else { return };
    run_all(&mut Disk::new(dir, true, uring));
}

#[test]
fn faulty_without_faults() {
    run_all(&mut Disk::new(on_disk(), false, || Ok(Faulty::new(Inline::new()))));
    let mut aio = aio(5, false);
    run_all(&mut Disk::new(on_disk(), true, move || aio().map(Faulty::new)));
}

#[test]
fn faulty_that_is_late() {
    let late = |backend: io::Result<_>| {
        backend.map(|backend| {
            let mut faulty = Faulty::new(backend);
            faulty.plan_mut().push(Fault::late(100_000));
            faulty
        })
    };
    let mut aio = aio(5, false);
    run_all(&mut Disk::new(on_disk(), true, move || late(aio())));
}

/// The file is in either of two backends that have a descriptor both, one, or none.
#[test]
fn both() {
    let dir = on_disk();
    let with_inline = || Both::new(aio(5, true)()?, Inline::new());
    run_all(&mut Disk::known_as(dir, true, Either::First, with_inline));
    run_all(&mut Disk::known_as(dir, true, Either::Second, with_inline));
    let without_aio = || Both::new(Inline::new(), aio(5, true)()?);
    run_all(&mut Disk::known_as(dir, true, Either::Second, without_aio));
    let with_pool = || Both::new(aio(128, true)()?, pool(4, 32)()?);
    run_all(&mut Disk::known_as(dir, true, Either::First, with_pool));
    run_all(&mut Disk::known_as(dir, true, Either::Second, with_pool));
    let of_none = || Both::new(Inline::new(), Faulty::new(Inline::new()));
    run_all(&mut Disk::known_as(dir, false, Either::Second, of_none));
}

#[test]
fn traced() {
    let mut aio = aio(5, true);
    run_all(&mut Disk::new(on_disk(), true, move || Ok(Trace::new(aio()?, 100))));
}
