//! A request that cannot be done is not refused and does not panic: it comes back through `poll`,
//! as every other failure does, with its memory. One that asks for nothing is done.

use crate::common::drive::{add, folder, make, settle};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::units::{Errno, NodeId};
use cowbell_engine::{Engine, Limits, REQUEST_MAX};
use cowbell_formats::{Format, Node};

const SIZE: u64 = 1 << 20;

fn engine() -> Engine<Node, Aio> {
    Engine::new(Aio::new(AioOptions::default()).expect("native AIO"), Limits::default())
}

fn with_images(test: impl Fn(&mut Engine<Node, Aio>, NodeId, u64)) {
    let folder = folder();
    for format in [Format::Raw, Format::Qed] {
        for size in [0, 512, SIZE] {
            let path = folder.path().join(format!("{format}{size}"));
            make(&path, format, size);
            let mut engine = engine();
            let disk = add(&mut engine, &path, format, true);
            test(&mut engine, disk, size);
            assert_eq!(settle(&mut engine).len(), 0, "all was answered");
            engine.assert_idle();
        }
    }
}

/// What becomes of one request; its memory comes back.
fn answer(engine: &mut Engine<Node, Aio>, disk: NodeId, io: Io, len: usize) -> Result<(), Errno> {
    let mem = if len == 0 { Mem::None } else { Buf::copied(&vec![7; len]).into() };
    engine.submit(disk, io, mem, 77).expect("there is room");
    let mut finished = settle(engine);
    let done = finished.pop().expect("it is answered");
    assert!(finished.is_empty() && done.tag == 77 && done.mem.len() == len);
    done.result
}

const ZERO: IoKind = IoKind::Zero { unmap: true, fua: true };
const WRITE: IoKind = IoKind::Write { fua: true, compressed: false };

#[test]
fn ranges_behind_the_end() {
    with_images(|engine, disk, size| {
        for kind in [IoKind::Read, WRITE, ZERO, IoKind::Discard] {
            let carries = matches!(kind, IoKind::Read | IoKind::Write { .. });
            for (offset, len) in [
                (size, 1),
                (size.saturating_sub(1), 2),
                (0, size + 1),
                (u64::MAX, 1),
                (u64::MAX - 511, 512),
                (u64::MAX, 0),
                (size + 1, 0),
                (1 << 63, 512),
            ] {
                let io = Io { kind, offset, len };
                let memory = if carries { len as usize } else { 0 };
                assert_eq!(answer(engine, disk, io, memory), Err(Errno::INVALID), "{io:?}");
            }
            if !carries {
                let io = Io { kind, offset: 0, len: u64::MAX };
                assert_eq!(answer(engine, disk, io, 0), Err(Errno::INVALID), "{io:?}");
                let io = Io { kind, offset: 1, len: u64::MAX };
                assert_eq!(answer(engine, disk, io, 0), Err(Errno::INVALID), "{io:?}");
            }
        }
    });
}

#[test]
fn memory_of_the_wrong_length() {
    with_images(|engine, disk, size| {
        for kind in [IoKind::Read, WRITE] {
            for (len, memory) in [(512, 511), (512, 513), (512, 0), (0, 512), (u64::MAX, 512)] {
                let io = Io { kind, offset: 0, len };
                assert_eq!(answer(engine, disk, io, memory), Err(Errno::INVALID), "{io:?}, {size}");
            }
        }
    });
}

#[test]
fn more_than_the_most() {
    let folder = folder();
    let path = folder.path().join("disk");
    make(&path, Format::Raw, 4 << 30);
    let mut engine = engine();
    let disk = add(&mut engine, &path, Format::Raw, true);
    // Memory is reserved, and touched only when used.
    let len = REQUEST_MAX + 1;
    let mem = Buf::zeroed(len as usize);
    engine.submit(disk, Io::write(0, len), mem, 0).expect("there is room");
    let finished = settle(&mut engine);
    assert_eq!(finished[0].result, Err(Errno::INVALID));
    assert_eq!(finished[0].mem.len() as u64, len);
}

#[test]
fn nothing() {
    with_images(|engine, disk, size| {
        for kind in [IoKind::Read, WRITE, ZERO, IoKind::Discard] {
            for offset in [0, size / 2, size] {
                let io = Io { kind, offset, len: 0 };
                assert_eq!(answer(engine, disk, io, 0), Ok(()), "{io:?}");
            }
        }
        // Memory and a range mean nothing to a flush.
        assert_eq!(answer(engine, disk, Io::flush(), 0), Ok(()));
        let io = Io { kind: IoKind::Flush, offset: u64::MAX, len: u64::MAX };
        assert_eq!(answer(engine, disk, io, 512), Ok(()));
    });
}

#[test]
fn everything_at_once() {
    with_images(|engine, disk, size| {
        let kinds = [ZERO, IoKind::Discard];
        for kind in kinds {
            let io = Io { kind, offset: 0, len: size };
            assert_eq!(answer(engine, disk, io, 0), Ok(()), "{io:?}");
        }
        assert_eq!(answer(engine, disk, Io::write(0, size), size as usize), Ok(()));
        assert_eq!(answer(engine, disk, Io::read(0, size), size as usize), Ok(()));
    });
}

#[test]
fn sizes_that_cannot_be() {
    with_images(|engine, disk, size| {
        for to in [u64::MAX, !511, 1 << 63, size + 1, size + 511] {
            let io = Io { kind: IoKind::Truncate, offset: to, len: 0 };
            assert!(answer(engine, disk, io, 0).is_err(), "from {size} to {to}");
        }
        // It is what it was.
        assert_eq!(answer(engine, disk, Io::read(0, size), size as usize), Ok(()));
        let io = Io::read(size, 512);
        assert_eq!(answer(engine, disk, io, 512), Err(Errno::INVALID));
    });
}
