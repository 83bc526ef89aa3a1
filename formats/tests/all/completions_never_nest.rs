//! However many requests end at once, and however they do, the stack does not grow: nothing is
//! stepped, and nobody called, from within a completion.

use crate::common::drive::{add, folder, make, settle};
use cowbell_engine::backend::Backend;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{Format, Node, OpenOptions, Policy, RunOptions, attach, open};

const REQUESTS: u64 = 65536;
const BLOCK: u64 = 4096;
const SIZE: u64 = 16 << 20;

/// Runs `test` on a stack that a few hundred nested calls would fill.
fn on_a_small_stack(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().stack_size(64 << 10);
        builder.spawn_scoped(scope, test).expect("a thread").join().expect("it passes");
    });
}

/// Each that ends begins the next, as a guest does that has that many under way.
fn read_at_depth<B: Backend<File = DiskFile> + Send>(backend: B, format: Format, depth: usize) {
    let folder = folder();
    let path = folder.path().join("disk");
    make(&path, format, SIZE);
    let mut engine = Engine::new(backend, Limits { requests: depth, ..Limits::default() });
    let disk = add(&mut engine, &path, format, true);
    on_a_small_stack(move || {
        let mut free: Vec<Mem> = (0..depth).map(|_| Buf::zeroed(BLOCK as usize).into()).collect();
        let (mut begun, mut ended) = (0, 0);
        while ended < REQUESTS {
            while begun < REQUESTS
                && let Some(mem) = free.pop()
            {
                let io = Io::read(begun * BLOCK % SIZE, BLOCK);
                engine.submit(disk, io, mem, begun).expect("as many buffers as room");
                begun += 1;
            }
            engine.run(clock());
            while let Some(done) = engine.poll() {
                assert_eq!(done.result, Ok(()));
                free.push(done.mem);
                ended += 1;
            }
        }
        engine.assert_idle();
    });
}

fn aio() -> Aio {
    Aio::new(AioOptions { depth: 1024, ..AioOptions::default() }).expect("native AIO")
}

#[test]
fn one_at_a_time() {
    read_at_depth(aio(), Format::Raw, 1);
    read_at_depth(Inline::new(), Format::Raw, 1);
}

#[test]
fn a_thousand_at_a_time() {
    read_at_depth(aio(), Format::Raw, 1024);
    read_at_depth(Inline::new(), Format::Raw, 1024);
}

#[test]
fn all_of_them_without_any_io() {
    // Nothing is allocated: each ends in the very step that begins it.
    read_at_depth(aio(), Format::Qed, 1);
    read_at_depth(aio(), Format::Qed, REQUESTS as usize);
}

#[test]
fn all_of_them_behind_one_flush() {
    let folder = folder();
    let path = folder.path().join("disk");
    make(&path, Format::Raw, SIZE);
    // All of them in one turn.
    let turn = std::time::Duration::from_secs(60);
    let (requests, steps) = (REQUESTS as usize, usize::MAX);
    let limits = Limits { requests, steps, turn, ..Limits::default() };
    let mut engine = Engine::new(aio(), limits);
    let disk = add(&mut engine, &path, Format::Raw, true);
    on_a_small_stack(move || {
        for tag in 0..REQUESTS {
            engine.submit(disk, Io::flush(), Mem::None, tag).expect("room");
        }
        let finished = settle(&mut engine);
        assert!(finished.len() as u64 == REQUESTS && finished.iter().all(|f| f.result == Ok(())));
        // One that has been in flight, and one for everybody who came meanwhile.
        let flushes = engine.stats().flushes;
        assert!((1..=2).contains(&flushes), "{flushes}");
    });
}

#[test]
fn all_of_them_behind_one_claim() {
    let folder = folder();
    let path = folder.path().join("disk");
    make(&path, Format::Raw, SIZE);
    let mut engine = Engine::new(aio(), Limits { requests: 2048, ..Limits::default() });
    let disk = add(&mut engine, &path, Format::Raw, true);
    on_a_small_stack(move || {
        for tag in 0..2048 {
            let byte = Buf::copied(&[tag as u8]);
            engine.submit(disk, Io::write(tag % 512, 1), byte, tag).expect("room");
        }
        let finished = settle(&mut engine);
        assert!(finished.len() == 2048 && finished.iter().all(|f| f.result == Ok(())));
    });
}

#[test]
fn through_the_longest_chain() {
    let folder = folder();
    let mut below = None;
    for n in 0..200 {
        let path = folder.path().join(format!("{n}"));
        let options = cowbell_formats::CreateOptions {
            size: Some(1 << 20),
            backing_file: below.replace(format!("{n}").into()),
            backing_format: (n > 0).then_some(Format::Qed),
            ..Default::default()
        };
        let host = cowbell_formats::DiskHost::default();
        cowbell_formats::create(&host, &path, Format::Qed, &options).expect("it is made");
    }
    let mut engine: Engine<Node, Inline> = Engine::new(Inline::new(), Limits::default());
    let host = cowbell_formats::DiskHost::default();
    let options = OpenOptions { backing: Policy::SameDirectory, ..OpenOptions::default() };
    let chain = open(&host, &folder.path().join("199"), &options).expect("it opens");
    let mut run = RunOptions::default();
    run.qed.cache_slices = 4;
    let disk = attach(&mut engine, chain, &run).expect("it attaches");
    on_a_small_stack(move || {
        let buf = Buf::copied(&[1; 100_000]);
        engine.submit(disk, Io::read(3, 100_000), buf, 0).expect("room");
        let finished = settle(&mut engine);
        assert_eq!(finished[0].result, Ok(()));
        let Mem::Owned(buf) = &finished[0].mem else { panic!("it is ours") };
        assert!(buf.iter().all(|&b| b == 0));
    });
}
