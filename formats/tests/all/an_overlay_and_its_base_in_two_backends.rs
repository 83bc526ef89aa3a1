//! An overlay in a file that native AIO does, over a base in one that another backend does: one engine,
//! one descriptor for both, and one that hangs holds up nobody else.

use std::io;
use std::path::{Path, PathBuf};

use crate::common::drive::{check, drain, folder, is_readable, make, make_with, settle};
use crate::common::shadow::Rng;
use cowbell_engine::backend::Backend;
use cowbell_engine::both::{Both, Either};
use cowbell_engine::event_loop::EventLoop;
use cowbell_engine::faulty::{Fault, Faulty, What};
use cowbell_engine::mem::Buf;
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::sys::pool::{Pool, PoolOptions};
use cowbell_engine::units::NodeId;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{
    CreateOptions, DiskHost, Format, Host, Node, OpenOptions, Policy, RunOptions, attach, open,
};

const SIZE: u64 = 2 << 20;

/// Files of this machine; those called `base` are for the second backend.
struct Halves;

impl Host for Halves {
    type File = Either<DiskFile, DiskFile>;

    fn open(&self, path: &Path, write: bool) -> io::Result<Self::File> {
        if path.file_name().is_some_and(|name| name == "base") {
            return DiskHost::default().open(path, write).map(Either::Second);
        }
        DiskHost { direct: true }.open(path, write).map(Either::First)
    }
    fn create_new(&self, path: &Path) -> io::Result<Self::File> {
        DiskHost::default().create_new(path).map(Either::First)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        DiskHost::default().remove(path)
    }
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        DiskHost::default().resolve(path)
    }
    fn identity(&self, file: &Self::File) -> io::Result<(u64, u64)> {
        match file {
            Either::First(file) | Either::Second(file) => file.identity(),
        }
    }
}

fn aio() -> Aio {
    Aio::new(AioOptions::default()).expect("native AIO")
}

fn attach_at<B: Backend<File = DiskFile>>(
    engine: &mut Engine<Node, Both<Aio, B>>,
    path: &Path,
    format: Format,
) -> NodeId {
    let (write, backing) = (true, Policy::SameDirectory);
    let options = OpenOptions { format: Some(format), write, backing, ..OpenOptions::default() };
    let chain = open(&Halves, path, &options).expect("it opens");
    attach(engine, chain, &RunOptions::default()).expect("it attaches")
}

/// A base full of bytes, and an overlay of it in a format.
fn two_layers(folder: &Path) -> Vec<u8> {
    let bytes: Vec<u8> = (0..SIZE).map(|at| 1 + (at / 512 % 251) as u8).collect();
    std::fs::write(folder.join("base"), &bytes).expect("a scratch file");
    let over = CreateOptions {
        backing_file: Some("base".into()),
        backing_format: Some(Format::Raw),
        ..CreateOptions::default()
    };
    make_with(&folder.join("top"), Format::Qcow2, &over);
    bytes
}

fn goes_through_both<B: Backend<File = DiskFile>>(second: B) {
    let folder = folder();
    let mut model = two_layers(folder.path());
    let backend = Both::new(aio(), second).expect("a descriptor for the two");
    let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
    let disk = attach_at(&mut engine, &folder.path().join("top"), Format::Qcow2);
    let mut rng = Rng(5);
    for round in 0..40 {
        // Parts of clusters: read from one backend, changed, written by the other.
        for _ in 0..8 {
            let at = rng.below(SIZE - 1);
            let len = (1 + rng.below(9_000)).min(SIZE - at);
            let byte = rng.below(256) as u8;
            let range = at as usize..(at + len) as usize;
            model[range.clone()].fill(byte);
            engine.submit(disk, Io::write(at, len), Buf::copied(&model[range]), 0).expect("room");
            // (In turn: they may overlap.)
            assert!(settle(&mut engine).iter().all(|done| done.result == Ok(())), "{round}");
        }
        let whole = Io::read(0, SIZE);
        engine.submit(disk, whole, Buf::zeroed(SIZE as usize), 0).expect("room");
        for at in 0..64 {
            engine.submit(disk, Io::read(at * 4096, 4096), Buf::zeroed(4096), 1).expect("room");
        }
        for done in settle(&mut engine) {
            assert_eq!(done.result, Ok(()));
            let read = done.mem.into_buf().expect("it was lent");
            assert!(done.tag == 1 || *read == model);
        }
    }
    drain(&mut engine);
    drop(engine);
    assert_eq!(check(&folder.path().join("top"), Format::Qcow2), (0, 0));
}

#[test]
fn whose_files_have_no_descriptor() {
    goes_through_both(Inline::new());
}

#[test]
fn whose_files_have_a_descriptor_too() {
    goes_through_both(Pool::new(PoolOptions::default()).expect("a pool"));
}

#[test]
fn whose_base_is_slow() {
    let mut slow = Faulty::new(Inline::new());
    slow.plan_mut().push(Fault { what: Some(What::Read), ..Fault::late(50_000) });
    goes_through_both_in_time(slow);
    let mut slow = Faulty::new(Pool::new(PoolOptions::default()).expect("a pool"));
    slow.plan_mut().push(Fault { what: Some(What::Read), ..Fault::late(50_000) });
    goes_through_both_in_time(slow);
}

/// Some reads, in a loop that waits for deadlines as well, and sees edges only.
fn goes_through_both_in_time<B: Backend<File = DiskFile>>(second: B) {
    let folder = folder();
    let model = two_layers(folder.path());
    let backend = Both::new(aio(), second).expect("a descriptor for the two");
    let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
    let disk = attach_at(&mut engine, &folder.path().join("top"), Format::Qcow2);
    let mut events = EventLoop::new(engine.fd()).expect("a loop");
    let (mut sent, mut ended, mut turns) = (0, 0, 0);
    while ended < 400 {
        while sent < 400 && engine.in_flight() < 16 {
            let at = sent % 500 * 4096;
            // Every fourth is written, and so in the first backend from then on.
            let bytes = &model[at..at + 4096];
            let io = Io::write(at as u64, 4096);
            let io = if sent % 4 == 0 { io } else { Io::read(at as u64, 4096) };
            engine.submit(disk, io, Buf::copied(bytes), at as u64).expect("room");
            sent += 1;
        }
        let again = engine.run(clock()).again;
        let before = ended;
        while let Some(done) = engine.poll() {
            assert_eq!(done.result, Ok(()));
            let read = done.mem.into_buf().expect("it was lent");
            assert!(*read == model[done.tag as usize..][..4096]);
            ended += 1;
        }
        if !again && ended == before {
            let due = engine.next_deadline().unwrap_or(clock().plus_ms(20_000));
            events.wait(Some(due), clock()).expect("it waits");
        }
        turns += 1;
        assert!(turns < 100_000, "it goes round for nothing: {engine:?}");
    }
}

#[test]
fn one_that_hangs_holds_up_nobody_in_the_other() {
    let folder = folder();
    let bytes = two_layers(folder.path());
    let hangs = Faulty::new(Pool::new(PoolOptions::default()).expect("a pool"));
    let backend = Both::new(aio(), hangs).expect("a descriptor for the two");
    let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
    let over = attach_at(&mut engine, &folder.path().join("top"), Format::Qcow2);
    make(&folder.path().join("other"), Format::Qcow2, SIZE);
    let other = attach_at(&mut engine, &folder.path().join("other"), Format::Qcow2);
    engine.backend_mut().second_mut().plan_mut().push(Fault::late(u64::MAX));
    for at in 0..32 {
        engine.submit(over, Io::read(at * 4096, 4096), Buf::zeroed(4096), 1).expect("room");
    }
    for round in 0..20u64 {
        for at in 0..32 {
            let mem = Buf::copied(&[round as u8; 4096]);
            engine.submit(other, Io::write(at * 4096, 4096), mem, 2).expect("room");
        }
        let mut ended = 0;
        while ended < 32 {
            let again = engine.run(clock()).again;
            while let Some(done) = engine.poll() {
                assert_eq!((done.tag, done.result), (2, Ok(())));
                ended += 1;
            }
            assert!(again || ended == 32 || is_readable(&engine, 20_000));
        }
    }
    assert_eq!(engine.in_flight(), 32);
    assert!(engine.backend().second().held_back() > 0);
    let second = engine.backend_mut().second_mut();
    second.plan_mut().clear();
    second.let_go();
    for done in settle(&mut engine) {
        assert_eq!((done.tag, done.result), (1, Ok(())));
        assert!(done.mem.into_buf().expect("it was lent").iter().all(|byte| bytes.contains(byte)));
    }
    drain(&mut engine);
}
