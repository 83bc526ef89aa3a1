//! Whatever the tables of an image say: requests end, nothing panics, the header stays a header.
//!
//! `COWBELL_FUZZ_RUNS` sets how many images are tried.

use crate::common::MemFile;
use crate::common::held::Held;
use crate::common::small_qcow2::{CLUSTER, Random, SIZE, sound};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::units::{Errno, Time};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::Node;
use cowbell_formats::parts::growth::Growth;
use cowbell_formats::qcow2::rest::open::{Access, open};
use cowbell_formats::qcow2::run::Regions;
use cowbell_formats::qcow2::{Qcow2, Qcow2Options};

/// More than any of these images comes to.
const FILE_MAX: u64 = 64 << 20;
/// More than any of these workloads takes.
const ROUNDS_MAX: usize = 5000;

fn request(random: &mut Random) -> (Io, Mem) {
    let offset = random.next() % (SIZE - 40_000);
    let len = 1 + random.next() % 40_000;
    let buf = || Mem::from(Buf::zeroed(len as usize));
    let (kind, mem) = match random.next() % 10 {
        0..4 => (IoKind::Read, buf()),
        4..7 => (
            IoKind::Write {
                fua: random.next().is_multiple_of(4),
                compressed: random.next().is_multiple_of(4),
            },
            buf(),
        ),
        7 => (IoKind::Zero { unmap: random.next().is_multiple_of(2), fua: false }, Mem::None),
        8 => (IoKind::Discard, Mem::None),
        _ => (IoKind::Flush, Mem::None),
    };
    (Io { kind, offset, len }, mem)
}

/// Lets everything in flight complete, until nothing is.
fn finish(engine: &mut Engine<Node, Held>) {
    for _ in 0..ROUNDS_MAX {
        engine.run(Time(0));
        while engine.poll().is_some() {}
        if engine.is_idle() {
            return;
        }
        let far = |op: &cowbell_engine::op::Op| op.kind.modifies() && op.end() > FILE_MAX;
        while engine.backend_mut().release(Some(Errno::NO_SPACE), far) {}
        while engine.backend_mut().release(None, |_| true) {}
    }
    panic!("it goes on for ever: {engine:?}");
}

fn torture(bytes: &[u8], random: &mut Random) -> bool {
    let file = MemFile::new(bytes);
    let Ok(opened) = open(&file, Access::Write) else { return false };
    let limits = Limits { requests: 8, ops: 16, buffers: 2, ..Limits::default() };
    let mut engine: Engine<Node, Held> = Engine::new(Held::default(), limits);
    let (file, _) = engine.attach(file.bytes()).expect("memory");
    let growth = Growth { step_min: 4 * CLUSTER, step_max: 4 * CLUSTER, ..Growth::default() };
    let options =
        Qcow2Options { cache_slices: 2, growth, reserve_max: 4, ..Qcow2Options::default() };
    if opened.header.has_data_file() || opened.header.disk_size() < SIZE {
        return false;
    }
    let regions = Regions::new(opened.geometry(), true, &options, |len| engine.region(len));
    let node = Qcow2::new((file, file), opened, (true, true, true), None, regions, options);
    let disk = engine.add(Node::Qcow2(Box::new(node)));
    for _ in 0..3 {
        for _ in 0..6 {
            let (io, mem) = request(random);
            engine.submit(disk, io, mem, 0).expect("room");
        }
        finish(&mut engine);
    }
    engine.drain();
    finish(&mut engine);
    assert!(engine.drained().is_some());
    engine.node(disk).assert_idle();
    assert_eq!(engine.backend().bytes[..4], *b"QFI\xfb", "the header was overwritten");
    true
}

#[test]
fn thousands_of_them() {
    let runs = std::env::var("COWBELL_FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok());
    let runs: u64 = runs.unwrap_or(10_000);
    let templates = [sound(false), sound(true)];
    let mut random = Random(0x5eed);
    let mut ran = 0;
    for run in 0..runs {
        let mut bytes = templates[run as usize % 2].clone();
        random.mutate(&mut bytes);
        ran += u64::from(torture(&bytes, &mut random));
    }
    assert!(ran > runs / 4, "hardly any image opened: {ran} of {runs}");
}
