//! An image is resized while requests are in flight, and flushed as if by a fool: nothing waits for
//! ever, and what lies within both sizes keeps its bytes.

use crate::common::drive::{add, drain, folder, make, settle};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Driver, Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::qed::rest::check::{self, Repair};
use cowbell_formats::{CreateOptions, DiskHost, Format, OpenOptions, Policy, create, map, open};

const BLOCK: u64 = 10_000;

fn truncate(to: u64) -> Io {
    Io { kind: IoKind::Truncate, offset: to, len: 0 }
}

fn engine() -> Engine<cowbell_formats::Node, Aio> {
    let limits = Limits { requests: 512, buffers: 2, bounce_buffers: 1, ..Limits::default() };
    Engine::new(Aio::new(AioOptions::default()).expect("native AIO"), limits)
}

#[test]
fn growing_at_work() {
    for format in [Format::Raw, Format::Qed, Format::Qcow2] {
        let folder = folder();
        let path = folder.path().join("disk");
        make(&path, format, 1 << 20);
        let mut engine = engine();
        let disk = add(&mut engine, &path, format, true);
        let mut size = 1 << 20;
        for round in 0..30u64 {
            let next = size + 512 * (1 + round % 7) * 300;
            for n in 0..40 {
                let tag = round * 40 + n;
                let offset = tag * 10_007 % (size - BLOCK);
                let io = match n % 4 {
                    0 => Io::flush(),
                    1 => Io::read(offset, BLOCK),
                    _ => Io::write(offset, BLOCK),
                };
                let mem = if n % 4 == 0 { Mem::None } else { Buf::copied(&[1; 10_000]).into() };
                engine.submit(disk, io, mem, tag).expect("room");
                if n % 16 == 3 {
                    engine.submit(disk, truncate(next), Mem::None, tag).expect("room");
                    engine.run(clock());
                }
            }
            // The last byte of the old size and the first of the new are written as soon as can be.
            for done in settle(&mut engine) {
                assert_eq!(done.result, Ok(()), "{format}, {}", done.tag);
            }
            assert_eq!(engine.node(disk).size(), next);
            engine.submit(disk, Io::write(next - 1, 1), Buf::copied(&[9]), 0).expect("room");
            assert_eq!(settle(&mut engine)[0].result, Ok(()));
            size = next;
        }
        drain(&mut engine);
        drop(engine);
        let options = OpenOptions { format: Some(format), ..OpenOptions::default() };
        let chain = open(&DiskHost::default(), &path, &options).expect("it opens");
        assert_eq!(chain.size(), size, "{format}");
        let mut last = [0];
        map::read(&chain, size - 1, &mut last).expect("it reads");
        assert_eq!(last, [9]);
        if format == Format::Qed {
            let report = check::check(&chain.layers[0].file, Repair::None).expect("it checks");
            assert!(report.is_clean(), "{report:?}");
        }
    }
}

#[test]
fn shrinking_at_work() {
    let folder = folder();
    let path = folder.path().join("disk");
    make(&path, Format::Raw, 1 << 20);
    let mut engine = engine();
    let disk = add(&mut engine, &path, Format::Raw, true);
    for round in 0..50u64 {
        let byte = round as u8 + 1;
        // Within the new size.
        for n in 0..20 {
            let mem = Buf::copied(&[byte; 999]);
            engine.submit(disk, Io::write(n * 999, 999), mem, n).expect("room");
            if n == round % 20 {
                engine.submit(disk, truncate(512 * 64), Mem::None, 99).expect("room");
                engine.run(clock());
            }
        }
        assert!(settle(&mut engine).iter().all(|done| done.result == Ok(())));
        assert_eq!(std::fs::metadata(&path).expect("a file").len(), 512 * 64);
        let bytes = std::fs::read(&path).expect("it reads");
        assert!(bytes[..20 * 999].iter().all(|&b| b == byte), "round {round}");
        engine.submit(disk, truncate(1 << 20), Mem::None, 0).expect("room");
        assert_eq!(settle(&mut engine)[0].result, Ok(()));
    }
    drain(&mut engine);
}

#[test]
fn nothing_but_flushes_and_resizes() {
    for format in [Format::Raw, Format::Qed, Format::Qcow2] {
        let folder = folder();
        let path = folder.path().join("disk");
        make(&path, format, 1 << 20);
        let mut engine = engine();
        let disk = add(&mut engine, &path, format, true);
        let mut ended = 0;
        for n in 0..400u64 {
            let io = if n % 5 == 0 { truncate((1 << 20) + n * 512) } else { Io::flush() };
            engine.submit(disk, io, Mem::None, n).expect("room");
            if n % 3 == 0 {
                engine.run(clock());
                ended += std::iter::from_fn(|| engine.poll()).count();
            }
        }
        ended += settle(&mut engine).len();
        assert_eq!(ended, 400);
        drain(&mut engine);
    }
}

/// Growing shows zeros. Where a longer backing file has bytes it is refused, as by QEMU.
#[test]
fn growing_over_a_longer_backing_file() {
    let folder = folder();
    let base = folder.path().join("base");
    std::fs::write(&base, vec![0xbb; 1 << 20]).expect("it writes");
    let path = folder.path().join("disk");
    let options = CreateOptions {
        size: Some(512 << 10),
        backing_file: Some("base".into()),
        backing_format: Some(Format::Raw),
        ..CreateOptions::default()
    };
    create(&DiskHost::default(), &path, Format::Qed, &options).expect("it is made");
    let mut engine = engine();
    let disk = add(&mut engine, &path, Format::Qed, true);
    engine.submit(disk, truncate(1 << 20), Mem::None, 0).expect("room");
    if settle(&mut engine)[0].result == Ok(()) {
        let io = Io::read(512 << 10, 512 << 10);
        engine.submit(disk, io, Buf::zeroed(512 << 10), 0).expect("room");
        let buf = settle(&mut engine).remove(0).mem.into_buf().expect("ours");
        assert!(buf.iter().all(|&b| b == 0), "the backing file shines through");
    }
    engine.submit(disk, truncate(512 << 10), Mem::None, 0).expect("room");
    assert_eq!(settle(&mut engine)[0].result, Ok(()), "to the size that it has");
    drain(&mut engine);
    let options = OpenOptions { backing: Policy::Any, force_share: true, ..OpenOptions::default() };
    drop(open(&DiskHost::default(), &path, &options).expect("it opens"));
}
