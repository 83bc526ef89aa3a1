//! A node is known by an id that no other engine takes, and files are taken away only from nodes that
//! have nothing left to write.

use crate::common::drive::{add, drain, folder, make, settle};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::FileId;
use cowbell_engine::{Engine, Limits, Why};
use cowbell_formats::{Format, Node};

const FORMATS: [Format; 5] = [Format::Raw, Format::Qed, Format::Qcow2, Format::Vmdk, Format::Vdi];

fn engine() -> Engine<Node, Inline> {
    Engine::new(Inline::new(), Limits::default())
}

#[test]
fn another_engine_refuses_them_and_writes_nothing() {
    let folder = folder();
    for format in FORMATS {
        let [ours, theirs] = ["a", "b"].map(|name| folder.path().join(format!("{name}{format}")));
        let mut engines = [engine(), engine()];
        make(&ours, format, 1 << 20);
        make(&theirs, format, 1 << 20);
        let mine = add(&mut engines[0], &ours, format, false);
        let other = add(&mut engines[1], &theirs, format, false);
        assert_ne!(mine, other);
        let before = std::fs::read(&theirs).expect("read");
        let bytes = Buf::copied(&[7; 512]);
        let refused =
            engines[1].submit(mine, Io::write(0, 512), bytes, 0).expect_err("not its own");
        assert_eq!((refused.why, refused.mem.len()), (Why::NoSuchNode, 512));
        assert!(settle(&mut engines[1]).is_empty());
        assert_eq!(std::fs::read(&theirs).expect("read"), before);
        // Nor one that it does not have yet.
        let mut empty = engine();
        let refused = empty.submit(mine, Io::flush(), Mem::None, 0).expect_err("it has none");
        assert_eq!(refused.why, Why::NoSuchNode);
    }
}

#[test]
fn files_stay_until_all_is_written() {
    let folder = folder();
    for format in FORMATS {
        let paths = ["a", "b"].map(|name| folder.path().join(format!("{name}{format}")));
        let mut engine = engine();
        let [gone, kept] = paths.each_ref().map(|path| {
            make(path, format, 1 << 20);
            add(&mut engine, path, format, false)
        });
        let write = |at| (Io::write(at, 512), Buf::copied(&[7; 512]));
        for node in [gone, kept] {
            let (io, buf) = write(0);
            engine.submit(node, io, buf, 0).expect("room");
        }
        assert!(settle(&mut engine).iter().all(|done| done.result == Ok(())));
        let file = FileId(0);
        assert!(engine.detach(file).is_none(), "{format}: there may be changes in memory");
        drain(&mut engine);
        assert!(engine.detach(file).is_some());
        assert!(engine.detach(file).is_none(), "it is gone");
        let (io, buf) = write(4096);
        assert_eq!(engine.submit(gone, io, buf, 0).expect_err("gone").why, Why::NoSuchNode);
        // The other goes on, and a drain speaks of it alone.
        let (io, buf) = write(4096);
        engine.submit(kept, io, buf, 0).expect("room");
        assert_eq!(settle(&mut engine).pop().expect("one").result, Ok(()));
        drain(&mut engine);
    }
}
