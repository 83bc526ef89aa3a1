//! qcow2 on devices that keep their length and their old bytes, and after cuts, flushes and drains
//! that failed: every request ends, no old byte is shown, and no free cluster is forgotten.

use crate::common::drive::{folder, make_with};
use crate::common::held::Held;
use crate::common::{MemFile, small_qcow2};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::step::{Driver, Io, IoKind};
use cowbell_engine::units::{Errno, NodeId, Time};
use cowbell_engine::{Engine, Finished, Limits, NodeEvent};
use cowbell_formats::parts::growth::Growth;
use cowbell_formats::qcow2::rest::open::{Access, open};
use cowbell_formats::qcow2::run::Regions;
use cowbell_formats::qcow2::{Qcow2, Qcow2Options};
use cowbell_formats::{CreateOptions, Format, Node};

type Disk = (Engine<Node, Held>, NodeId);

/// What fails, and how.
type Faults<'a> = &'a dyn Fn(&Op) -> Option<Errno>;

const NOISE: u8 = 0xbe;
const DISCARD: IoKind = IoKind::Discard;

fn image(cluster: u64, size: u64) -> Vec<u8> {
    let folder = folder();
    let path = folder.path().join("image");
    let options =
        CreateOptions { size: Some(size), cluster_size: Some(cluster), ..CreateOptions::default() };
    make_with(&path, Format::Qcow2, &options);
    std::fs::read(&path).expect("read")
}

/// A device of `len` bytes with an image at its front, and behind that what was there before.
fn device(cluster: u64, size: u64, len: u64) -> Disk {
    let mut bytes = image(cluster, size);
    bytes.resize(len as usize, NOISE);
    run(bytes, true)
}

fn run(bytes: Vec<u8>, fixed: bool) -> Disk {
    let file = MemFile::new(&bytes);
    let opened = open(&file, Access::Write).expect("it opens");
    let limits = Limits { requests: 2048, ops: 64, ..Limits::default() };
    let mut engine: Engine<Node, Held> = Engine::new(Held { fixed, ..Held::default() }, limits);
    let (file, _) = engine.attach(file.bytes()).expect("memory");
    let growth = Growth { step_min: 64 << 10, step_max: 64 << 10, ..Growth::default() };
    let options = Qcow2Options { growth, ..Qcow2Options::default() };
    let regions = Regions::new(opened.geometry(), true, &options, |len| engine.region(len));
    let may = (true, !fixed, !fixed);
    let node = Qcow2::new((file, file), opened, may, None, regions, options);
    let disk = engine.add(Node::Qcow2(Box::new(node)));
    (engine, disk)
}

/// Runs until nothing is in flight. Fails if that takes too many turns, or one of them too long.
fn finish(engine: &mut Engine<Node, Held>, faults: Faults<'_>) -> Vec<Finished> {
    let mut finished = Vec::new();
    for _ in 0..200_000 {
        let progress = engine.run(Time(0));
        assert!(progress.steps < 10_000, "a turn of {} steps", progress.steps);
        finished.extend(std::iter::from_fn(|| engine.poll()));
        let held = engine.backend_mut();
        if held.ops.is_empty() && held.go.is_empty() && engine.is_idle() {
            return finished;
        }
        let held = engine.backend_mut();
        while let Some((_, op)) = held.ops.first() {
            let fail = faults(op);
            held.release(fail, |_| true);
        }
    }
    panic!("it goes on for ever: {engine:?}");
}

const NOTHING: Faults<'static> = &|_| None;

fn go(disk: &mut Disk, io: Io, mem: impl Into<Mem>) -> (Result<(), Errno>, Option<Buf>) {
    disk.0.submit(disk.1, io, mem, 0).expect("room");
    let done = finish(&mut disk.0, NOTHING).pop().expect("it is answered");
    (done.result, done.mem.into_buf())
}

fn write(disk: &mut Disk, at: u64, len: u64, byte: u8) -> Result<(), Errno> {
    go(disk, Io::write(at, len), Buf::copied(&vec![byte; len as usize])).0
}

fn read(disk: &mut Disk, at: u64, len: u64) -> Vec<u8> {
    let (result, buf) = go(disk, Io::read(at, len), Buf::zeroed(len as usize));
    assert_eq!(result, Ok(()));
    buf.expect("its own").to_vec()
}

fn discard(disk: &mut Disk, at: u64, len: u64) {
    assert_eq!(go(disk, Io { kind: DISCARD, offset: at, len }, Mem::None).0, Ok(()));
}

fn drain(disk: &mut Disk, faults: Faults<'_>) -> Result<(), Errno> {
    disk.0.drain();
    finish(&mut disk.0, faults);
    disk.0.drained().expect("it is drained")
}

/// Writes parts of clusters that were never written: beside them there is nothing.
fn shows_nothing_old(disk: &mut Disk, cluster: u64, first: u64, count: u64) {
    for i in first..first + count {
        let (from, to) = (cluster / 4, cluster / 2);
        assert_eq!(write(disk, i * cluster + from, to - from, 1), Ok(()));
        let bytes = read(disk, i * cluster, cluster);
        let old = bytes
            .iter()
            .enumerate()
            .find(|&(at, &b)| b != u8::from((from..to).contains(&(at as u64))));
        assert_eq!(old, None, "cluster {i}");
    }
}

fn is_sound(disk: &Disk) {
    let file = MemFile::new(&disk.0.backend().bytes);
    let opened = open(&file, Access::Read).expect("it opens");
    let report = cowbell_formats::qcow2::rest::check::check(
        &file,
        cowbell_formats::qcow2::rest::check::Repair::None,
    );
    let report = report.expect("it checks");
    assert_eq!((report.corruptions, report.check_errors, report.leaks), (0, 0, 0), "{report:?}");
    drop(opened);
}

#[test]
fn a_device_shows_nothing_of_what_was_there_before() {
    for cluster in [512, 4096, 65536] {
        let mut disk = device(cluster, 64 * cluster, 200 * cluster);
        shows_nothing_old(&mut disk, cluster, 0, 3);
        for round in 1..4 {
            assert_eq!(drain(&mut disk, NOTHING), Ok(()));
            is_sound(&disk);
            shows_nothing_old(&mut disk, cluster, 4 * round, 3);
        }
    }
}

#[test]
fn a_file_that_could_not_be_cut_shows_nothing_old() {
    for cluster in [4096, 65536] {
        let mut disk = run(image(cluster, 64 * cluster), false);
        assert_eq!(write(&mut disk, 0, 30 * cluster, NOISE), Ok(()));
        discard(&mut disk, 4 * cluster, 26 * cluster);
        let cuts = |op: &Op| (op.kind == OpKind::Truncate).then_some(Errno::IO);
        assert_eq!(drain(&mut disk, &cuts), Err(Errno::IO));
        shows_nothing_old(&mut disk, cluster, 32, 30);
        assert_eq!(drain(&mut disk, NOTHING), Ok(()));
        is_sound(&disk);
    }
}

#[test]
fn after_a_drain_that_failed_at_any_op_nothing_old_is_shown() {
    let cluster = 4096;
    for fails in 0..40 {
        let mut disk = run(image(cluster, 64 * cluster), false);
        assert_eq!(write(&mut disk, 0, 30 * cluster, NOISE), Ok(()));
        discard(&mut disk, 2 * cluster, 28 * cluster);
        let count = std::cell::Cell::new(0);
        let nth = |op: &Op| {
            count.set(count.get() + 1);
            // A failed flush is never got over.
            (count.get() == fails + 1 && op.kind != OpKind::Flush).then_some(Errno::IO)
        };
        let result = drain(&mut disk, &nth);
        shows_nothing_old(&mut disk, cluster, 32, 30);
        let _ = (result, drain(&mut disk, NOTHING));
        assert_eq!(read(&mut disk, 0, 2 * cluster), vec![NOISE; 2 * cluster as usize]);
    }
}

#[test]
fn what_a_guest_gives_up_it_can_write_again_on_a_full_device() {
    for cluster in [512, 4096, 65536] {
        let mut disk = device(cluster, 60 * cluster, 40 * cluster);
        let mut full = 0;
        while write(&mut disk, full * cluster, cluster, 5) == Ok(()) {
            full += 1;
        }
        assert!((25..36).contains(&full), "{full} clusters of {cluster} bytes");
        // In one go, with a write of the rest in flight.
        discard(&mut disk, 0, 10 * cluster);
        assert_eq!(write(&mut disk, 40 * cluster, 10 * cluster, 6), Ok(()));
        assert_eq!(write(&mut disk, 50 * cluster, cluster, 7), Err(Errno::NO_SPACE));
        let zero = IoKind::Zero { unmap: true, fua: false };
        let (engine, node) = (&mut disk.0, disk.1);
        for i in 0..5 {
            let io = Io { kind: zero, offset: (40 + i) * cluster, len: cluster };
            engine.submit(node, io, Mem::None, 0).expect("room");
            let bytes = Buf::copied(&vec![8; cluster as usize]);
            engine.submit(node, Io::write((51 + i) * cluster, cluster), bytes, 0).expect("room");
        }
        for done in finish(engine, NOTHING) {
            assert_eq!(done.result, Ok(()));
        }
        assert_eq!(read(&mut disk, 45 * cluster, 5 * cluster), vec![6; 5 * cluster as usize]);
        assert_eq!(read(&mut disk, 51 * cluster, 5 * cluster), vec![8; 5 * cluster as usize]);
        assert_eq!(drain(&mut disk, NOTHING), Ok(()));
        is_sound(&disk);
    }
}

#[test]
fn tables_become_longer_on_a_device() {
    // With 512-byte clusters a refcount table of one cluster counts 8 MiB.
    let (cluster, size) = (512, 12 << 20);
    let mut disk = device(cluster, size, 16 << 20);
    for at in (0..size).step_by(1 << 20) {
        assert_eq!(write(&mut disk, at, 1 << 20, 9), Ok(()), "at {at}");
    }
    // And an L1 table of more clusters than a piece of a refcount block counts.
    let larger = Io { kind: IoKind::Truncate, offset: 1 << 30, len: 0 };
    assert_eq!(go(&mut disk, larger, Mem::None).0, Ok(()));
    assert_eq!(read(&mut disk, size - 4096, 8192)[..4096], vec![9; 4096]);
    assert_eq!(disk.0.node(disk.1).size(), 1 << 30);
    assert_eq!(drain(&mut disk, NOTHING), Ok(()));
    is_sound(&disk);
}

#[test]
fn a_file_does_not_grow_while_it_has_holes() {
    let cluster = 512;
    let mut disk = run(image(cluster, 8 << 20), false);
    assert_eq!(write(&mut disk, 0, 3 << 20, 1), Ok(()));
    // The last third is free, behind more refcount blocks than are looked at in a moment.
    discard(&mut disk, 2 << 20, 1 << 20);
    assert_eq!(write(&mut disk, 7 << 20, 4096, 2), Ok(()));
    assert_eq!(drain(&mut disk, NOTHING), Ok(()));
    let len = disk.0.backend().bytes.len();
    for session in 0..6 {
        let bytes = disk.0.backend().bytes.clone();
        disk = run(bytes, false);
        let at = (4 + session % 2) << 20;
        assert_eq!(write(&mut disk, at, 512 << 10, 3), Ok(()));
        discard(&mut disk, (5 - session % 2) << 20, 512 << 10);
        assert_eq!(drain(&mut disk, NOTHING), Ok(()));
        is_sound(&disk);
    }
    let now = disk.0.backend().bytes.len();
    assert!(now <= len + (64 << 10), "it grew from {len} to {now} bytes");
}

#[test]
fn after_a_failed_flush_every_request_ends() {
    let cluster = 4096;
    let mut disk = run(image(cluster, 16 << 20), false);
    for at in (0..16 << 20).step_by(1 << 20) {
        assert_eq!(write(&mut disk, at, 1 << 20, 5), Ok(()));
    }
    let (engine, node) = (&mut disk.0, disk.1);
    for i in 0..1300 {
        let io = Io { kind: DISCARD, offset: i * 2 * cluster, len: cluster };
        engine.submit(node, io, Mem::None, 0).expect("room");
    }
    engine.submit(node, Io::flush(), Mem::None, 1).expect("room");
    let flushes = |op: &Op| (op.kind == OpKind::Flush).then_some(Errno::IO);
    let finished = finish(engine, &flushes);
    assert_eq!(finished.len(), 1301);
    for i in 0..1300 {
        let io = Io { kind: DISCARD, offset: (i * 2 + 1) * cluster, len: cluster };
        engine.submit(node, io, Mem::None, 0).expect("room");
        let bytes = Buf::zeroed(512);
        if i < 700 {
            engine.submit(node, Io::write(i * cluster, 512), bytes, 0).expect("room");
        }
    }
    assert_eq!(finish(engine, NOTHING).len(), 2000);
    // Reads need nothing that failed.
    assert_eq!(read(&mut disk, 15 << 20, 4096), vec![5; 4096]);
    assert_eq!(drain(&mut disk, NOTHING), Err(Errno::IO));
}

/// The offset in the file of the L2 entry of guest cluster `index`.
fn entry_at(bytes: &[u8], index: usize) -> usize {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let table = word(word(40) as usize) & 0x00ff_ffff_ffff_fe00;
    table as usize + index * 8
}

#[test]
fn one_bad_entry_fails_those_who_need_it() {
    let mut bytes = small_qcow2::sound(false);
    let (bad, data) = (entry_at(&bytes, 0), entry_at(&bytes, 2));
    // A reserved bit.
    bytes[bad + 7] |= 2;
    let mut disk = run(bytes, false);
    let cluster = small_qcow2::CLUSTER;
    for _ in 0..3 {
        let (result, _) = go(&mut disk, Io::read(0, 512), Buf::zeroed(512));
        assert_eq!(result, Err(Errno::IO));
        assert_eq!(write(&mut disk, 0, 512, 1), Err(Errno::IO));
    }
    assert_eq!(read(&mut disk, 2 * cluster, cluster), vec![7; cluster as usize]);
    assert_eq!(write(&mut disk, 2 * cluster, 512, 1), Ok(()));
    assert_eq!(write(&mut disk, 100 * cluster, 512, 2), Ok(()));
    assert_eq!(go(&mut disk, Io::flush(), Mem::None).0, Ok(()));
    let what = "L2 entry is invalid";
    let told = NodeEvent::Corrupt { node: disk.1, what, at: bad as u64 };
    assert_eq!((disk.0.poll_event(), disk.0.poll_event()), (Some(told), None));
    // All is written, and yet the image is not sound.
    assert_eq!(drain(&mut disk, NOTHING), Err(Errno::IO));
    let bytes = &disk.0.backend().bytes;
    assert_eq!(bytes[79] & 2, 0, "no mark keeps others from opening it");
    assert_eq!(bytes[data..data + 8], disk.0.backend().bytes[data..data + 8]);
}

#[test]
fn a_write_that_is_led_to_metadata_fails_alone() {
    let mut bytes = small_qcow2::sound(false);
    let bad = entry_at(&bytes, 0);
    // The cluster of the refcount table, as if it were the guest's own.
    let table = u64::from_be_bytes(bytes[48..56].try_into().expect("8 bytes"));
    bytes[bad..bad + 8].copy_from_slice(&(table | 1 << 63).to_be_bytes());
    let before = bytes[table as usize..][..4096].to_vec();
    let mut disk = run(bytes, false);
    let cluster = small_qcow2::CLUSTER;
    let zero = IoKind::Zero { unmap: false, fua: false };
    assert_eq!(write(&mut disk, 0, 512, 1), Err(Errno::IO));
    assert_eq!(
        go(&mut disk, Io { kind: zero, offset: 512, len: 512 }, Mem::None).0,
        Err(Errno::IO)
    );
    assert_eq!(read(&mut disk, 2 * cluster, cluster), vec![7; cluster as usize]);
    assert_eq!(write(&mut disk, 2 * cluster, 512, 1), Ok(()));
    assert_eq!(write(&mut disk, 100 * cluster, 512, 2), Ok(()));
    assert_eq!(read(&mut disk, 100 * cluster, 512), vec![2; 512]);
    let event = disk.0.poll_event();
    assert!(matches!(event, Some(NodeEvent::Corrupt { at, .. }) if at == table), "{event:?}");
    assert_eq!(drain(&mut disk, NOTHING), Err(Errno::IO));
    let bytes = &disk.0.backend().bytes;
    assert_eq!(bytes[79] & 2, 2, "it is marked");
    assert_eq!(bytes[table as usize..][..4096], before);
}

#[test]
fn refcounts_that_are_wrong_end_allocation_and_nothing_else() {
    let mut bytes = small_qcow2::sound(false);
    let table = u64::from_be_bytes(bytes[48..56].try_into().expect("8 bytes"));
    // The refcount block lies within a cluster.
    bytes[table as usize + 7] = 8;
    let mut disk = run(bytes, false);
    let cluster = small_qcow2::CLUSTER;
    assert_eq!(write(&mut disk, 100 * cluster, 512, 2), Err(Errno::IO));
    assert_eq!(write(&mut disk, 101 * cluster, 512, 2), Err(Errno::IO));
    assert_eq!(write(&mut disk, 2 * cluster, 512, 1), Ok(()));
    assert_eq!(go(&mut disk, Io::flush(), Mem::None).0, Ok(()));
    assert_eq!(read(&mut disk, 2 * cluster, 512), vec![1; 512]);
    // A longer L1 table needs clusters; the second finds that the first has ended.
    let grow = Io { kind: IoKind::Truncate, offset: 1 << 30, len: 0 };
    assert_eq!(go(&mut disk, grow, Mem::None).0, Err(Errno::IO));
    assert_eq!(go(&mut disk, grow, Mem::None).0, Err(Errno::IO));
    let told = NodeEvent::Corrupt { node: disk.1, what: "refcount block is misplaced", at: table };
    assert_eq!(disk.0.poll_event(), Some(told));
    assert_eq!(drain(&mut disk, NOTHING), Err(Errno::IO));
}
