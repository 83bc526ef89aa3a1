//! Misses do not wait for each other: on a device where every op takes one round, any number of
//! cold reads takes as many rounds as one does, and so does one read of many tables.

use std::path::Path;

use crate::common::drive::{add, drain, folder, make_with, settle};
use crate::common::held::Held;
use cowbell_engine::mem::Buf;
use cowbell_engine::step::Io;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{NodeId, Time};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::qcow2::rest::open::{Access, open};
use cowbell_formats::qcow2::run::Regions;
use cowbell_formats::qcow2::{Qcow2, Qcow2Options};
use cowbell_formats::{CreateOptions, Format, Node};

const CLUSTER: u64 = 4096;
/// Bytes that one L2 table, which is one slice, maps.
const SPAN: u64 = CLUSTER * CLUSTER / 8;
const TABLES: u64 = 32;

/// An image with one cluster in each of its tables, in memory, opened and cold.
fn cold() -> (Engine<Node, Held>, NodeId) {
    let folder = folder();
    let path = folder.path().join("image");
    let options = CreateOptions {
        size: Some(TABLES * SPAN),
        cluster_size: Some(CLUSTER),
        ..CreateOptions::default()
    };
    make_with(&path, Format::Qcow2, &options);
    let mut engine: Engine<Node, Inline> = Engine::new(Inline::new(), Limits::default());
    let disk = add(&mut engine, &path, Format::Qcow2, false);
    for table in 0..TABLES {
        let bytes = Buf::copied(&[table as u8 + 1; CLUSTER as usize]);
        engine.submit(disk, Io::write(table * SPAN, CLUSTER), bytes, 0).expect("room");
    }
    settle(&mut engine);
    drain(&mut engine);

    in_memory(&path, Access::Read)
}

/// The image at `path`, in memory, opened and cold.
fn in_memory(path: &Path, access: Access) -> (Engine<Node, Held>, NodeId) {
    let opened = open(&DiskFile::open(path, &Default::default()).expect("opens"), access);
    let opened = opened.expect("an image");
    let mut engine: Engine<Node, Held> = Engine::new(Held::default(), Limits::default());
    let bytes = std::fs::read(path).expect("read");
    let (file, _) = engine.attach(bytes).expect("memory");
    let options = Qcow2Options::default();
    let regions = Regions::new(opened.geometry(), true, &options, |len| engine.region(len));
    let can_write = access == Access::Write;
    let can = (can_write, can_write, can_write);
    let node = Qcow2::new((file, file), opened, can, None, regions, options);
    let disk = engine.add(Node::Qcow2(Box::new(node)));
    (engine, disk)
}

/// Lets everything in flight complete at once, again and again; how often.
fn rounds(engine: &mut Engine<Node, Held>) -> usize {
    let mut rounds = 0;
    loop {
        engine.run(Time(0));
        if engine.backend().ops.is_empty() {
            return rounds;
        }
        rounds += 1;
        while engine.backend_mut().release(None, |_| true) {}
    }
}

#[test]
fn many_requests_take_as_long_as_one() {
    for count in [1, TABLES] {
        let (mut engine, disk) = cold();
        for table in 0..count {
            let buf = Buf::zeroed(CLUSTER as usize);
            engine.submit(disk, Io::read(table * SPAN, CLUSTER), buf, table).expect("room");
        }
        assert_eq!(rounds(&mut engine), 2, "{count} tables, then {count} clusters");
        for _ in 0..count {
            let done = engine.poll().expect("all are done");
            assert_eq!(done.result, Ok(()));
            assert_eq!(done.mem.into_buf().expect("its own")[0], done.tag as u8 + 1);
        }
    }
}

#[test]
fn one_request_of_many_tables_too() {
    let (mut engine, disk) = cold();
    let len = TABLES * SPAN;
    engine.submit(disk, Io::read(0, len), Buf::zeroed(len as usize), 0).expect("room");
    assert_eq!(rounds(&mut engine), 2);
    let done = engine.poll().expect("it is done");
    assert_eq!(done.result, Ok(()));
    let bytes = done.mem.into_buf().expect("its own");
    for table in 0..TABLES {
        let at = (table * SPAN) as usize;
        assert_eq!((bytes[at], bytes[at + CLUSTER as usize]), (table as u8 + 1, 0));
    }
}

/// A hole is looked for in all refcount blocks: sixteen are read in a round.
#[test]
fn the_search_for_a_hole_too() {
    const SIZE: u64 = 8 << 20;
    let folder = folder();
    let path = folder.path().join("image");
    let size = Some(2 * SIZE);
    let options = CreateOptions { size, cluster_size: Some(512), ..CreateOptions::default() };
    make_with(&path, Format::Qcow2, &options);
    let mut engine: Engine<Node, Inline> = Engine::new(Inline::new(), Limits::default());
    let disk = add(&mut engine, &path, Format::Qcow2, true);
    engine.submit(disk, Io::write(0, SIZE), Buf::copied(&[1; SIZE as usize]), 0).expect("room");
    settle(&mut engine);
    drain(&mut engine);

    let blocks = (SIZE / 512 / 256) as usize;
    let (mut engine, disk) = in_memory(&path, Access::Write);
    engine.submit(disk, Io::write(SIZE, 512), Buf::copied(&[2; 512]), 0).expect("room");
    let rounds = rounds(&mut engine);
    assert!((blocks / 16..blocks / 16 + 12).contains(&rounds), "{rounds} for {blocks} blocks");
    assert_eq!(engine.poll().expect("it is done").result, Ok(()));
}
