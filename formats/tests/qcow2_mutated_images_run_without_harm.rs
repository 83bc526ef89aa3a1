//! Whatever the tables of an image say: requests end, nothing panics, the header stays a header.
//!
//! `COWBELL_FUZZ_RUNS` sets how many images are tried.

mod common;

use common::MemFile;
use common::drive::{add, drain, folder, make_with, settle};
use common::held::Held;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, Time};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::qcow2::driver::Regions;
use cowbell_formats::qcow2::open::{Access, open};
use cowbell_formats::qcow2::{Qcow2, Qcow2Options};
use cowbell_formats::qed::Growth;
use cowbell_formats::{CreateOptions, Format, Node};

const CLUSTER: u64 = 4096;
const SIZE: u64 = 5 << 20;
/// More than any of these images comes to.
const FILE_MAX: u64 = 64 << 20;
/// More than any of these workloads takes.
const ROUNDS_MAX: usize = 5000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 7
    }

    /// Numbers that break things, and some at random.
    fn nasty(&mut self) -> u64 {
        let (kind, small) = (self.next() % 9, self.next() % 64);
        let flags = [0, 1, 1 << 63, 1 << 62, 3 << 62][self.next() as usize % 5];
        match kind {
            0 => small,
            1..=4 => (small * CLUSTER) | flags,
            5 => 1 << small,
            6 => (1_u64 << small).wrapping_sub(1),
            7 => self.next() | flags,
            _ => u64::MAX - small * 512,
        }
    }
}

/// A sound image with a bit of everything, as bytes.
fn sound(extended: bool) -> Vec<u8> {
    let folder = folder();
    let path = folder.path().join("image");
    let options = CreateOptions {
        size: Some(SIZE),
        cluster_size: Some(if extended { 16384 } else { CLUSTER }),
        extended_l2: Some(extended),
        ..CreateOptions::default()
    };
    make_with(&path, Format::Qcow2, &options);
    let mut engine: Engine<Node, Inline> = Engine::new(Inline::new(), Limits::default());
    let disk = add(&mut engine, &path, Format::Qcow2, false);
    for (offset, len) in [(0, 3 * CLUSTER), (2 << 20, 5000), (4 << 20, 100)] {
        let bytes = Buf::copied(&vec![7; len as usize]);
        engine.submit(disk, Io::write(offset, len), bytes, 0).expect("room");
    }
    let zero = IoKind::Zero { unmap: false, fua: false };
    let zeros = Io { kind: zero, offset: CLUSTER, len: CLUSTER };
    settle(&mut engine);
    engine.submit(disk, zeros, Mem::None, 0).expect("room");
    settle(&mut engine);
    drain(&mut engine);
    std::fs::read(&path).expect("read")
}

fn request(random: &mut Random) -> (Io, Mem) {
    let offset = random.next() % (SIZE - 40_000);
    let len = 1 + random.next() % 40_000;
    let buf = || Mem::from(Buf::zeroed(len as usize));
    let (kind, mem) = match random.next() % 10 {
        0..4 => (IoKind::Read, buf()),
        4..7 => (IoKind::Write { fua: random.next().is_multiple_of(4) }, buf()),
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
    let options = Qcow2Options { cache_slices: 2, growth, stock_max: 4, ..Qcow2Options::default() };
    if opened.header.has_data_file() || opened.header.disk_size() < SIZE {
        return false;
    }
    let regions = Regions::new(opened.geometry(), &options, |len| engine.region(len));
    let node = Qcow2::new((file, file), opened, (true, true), None, regions, options);
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
        let len = bytes.len() as u64;
        for _ in 0..random.next() % 4 {
            // Tables are clusters near the front; fields are in the header.
            let at = match random.next() % 8 {
                0 => random.next() % 14 * 8,
                1..=6 => random.next() % (len / CLUSTER) * CLUSTER + random.next() % 24 * 8,
                _ => random.next() % (len - 8),
            } as usize;
            let value = random.nasty();
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        if random.next().is_multiple_of(16) {
            bytes.truncate((random.next() % len) as usize);
        }
        ran += u64::from(torture(&bytes, &mut random));
    }
    assert!(ran > runs / 4, "hardly any image opened: {ran} of {runs}");
}
