//! Misses do not wait for each other: on a device where every op takes one round, any number of
//! cold reads takes as many rounds as one does, and so does one read of many tables.

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

    let opened = open(&DiskFile::open(&path, &Default::default()).expect("opens"), Access::Read);
    let opened = opened.expect("an image");
    let mut engine: Engine<Node, Held> = Engine::new(Held::default(), Limits::default());
    let bytes = std::fs::read(&path).expect("read");
    let (file, _) = engine.attach(bytes).expect("memory");
    let options = Qcow2Options::default();
    let regions = Regions::new(opened.geometry(), &options, |len| engine.region(len));
    let node = Qcow2::new((file, file), opened, (false, false, false), None, regions, options);
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
