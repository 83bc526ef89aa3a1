//! Each session that changes a VMDK image leaves a content id that it never had before, with options
//! that nobody set: so an overlay never takes a parent that was changed for the one it was made on.

use std::path::Path;

use crate::common::drive::{add, drain, folder, make_with, settle};
use cowbell_engine::Engine;
use cowbell_engine::faulty::{Fault, Faulty, What};
use cowbell_engine::mem::Buf;
use cowbell_engine::step::Io;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::Errno;
use cowbell_formats::chain::open_layer;
use cowbell_formats::vmdk::disk::descriptor::NO_PARENT;
use cowbell_formats::{CreateOptions, Format, LayerMeta, Node, OpenOptions};

/// A session that writes.
fn change(path: &Path) {
    let mut engine: Engine<Node, Inline> = Engine::new(Inline::new(), Default::default());
    let disk = add(&mut engine, path, Format::Vmdk, false);
    engine.submit(disk, Io::write(0, 512), Buf::zeroed(512), 0).expect("there is room");
    assert_eq!(drain(&mut engine)[0].result, Ok(()));
}

fn read_at(path: &Path, at: u64) -> Result<(), Errno> {
    let mut engine: Engine<Node, Inline> = Engine::new(Inline::new(), Default::default());
    let disk = add(&mut engine, path, Format::Vmdk, false);
    engine.submit(disk, Io::read(at, 512), Buf::zeroed(512), 0).expect("there is room");
    settle(&mut engine).remove(0).result
}

fn cid(path: &Path) -> u32 {
    let layer = open_layer(&crate::common::DISK, path, &OpenOptions::default()).expect("it opens");
    let LayerMeta::Vmdk(image) = layer.meta else { panic!("it is another format") };
    image.descriptor.cid
}

#[test]
fn however_often_an_image_is_changed() {
    let folder = folder();
    let path = folder.path().join("disk.vmdk");
    let options = CreateOptions { size: Some(1 << 20), ..CreateOptions::default() };
    make_with(&path, Format::Vmdk, &options);
    let mut ids = vec![cid(&path)];
    for _ in 0..8 {
        change(&path);
        ids.push(cid(&path));
    }
    let again = folder.path().join("again.vmdk");
    make_with(&again, Format::Vmdk, &options);
    ids.push(cid(&again));
    assert!(!ids.contains(&NO_PARENT));
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "{ids:x?}");
}

#[test]
fn an_overlay_refuses_a_parent_that_was_changed_twice() {
    let folder = folder();
    let (base, top) = (folder.path().join("base.vmdk"), folder.path().join("top.vmdk"));
    make_with(
        &base,
        Format::Vmdk,
        &CreateOptions { size: Some(1 << 20), ..CreateOptions::default() },
    );
    change(&base);
    let overlay = CreateOptions {
        backing_file: Some("base.vmdk".into()),
        backing_format: Some(Format::Vmdk),
        ..CreateOptions::default()
    };
    make_with(&top, Format::Vmdk, &overlay);
    assert_eq!(read_at(&top, 0), Ok(()));
    for _ in 0..4 {
        change(&base);
        assert_eq!(read_at(&top, 0), Err(Errno::INVALID));
    }
}

/// Who waits for the id's write is told how it ended; nothing of his is changed without it, and the next
/// one who asks has it written again.
#[test]
fn a_change_in_place_comes_after_the_id() {
    let folder = folder();
    let path = folder.path().join("disk.vmdk");
    let options = CreateOptions { size: Some(1 << 20), ..CreateOptions::default() };
    make_with(&path, Format::Vmdk, &options);
    change(&path);
    let (old, bytes) = (cid(&path), std::fs::read(&path).expect("it is there"));
    let mut engine: Engine<Node, Faulty<Inline>> =
        Engine::new(Faulty::new(Inline::new()), Default::default());
    let disk = add(&mut engine, &path, Format::Vmdk, false);
    let fault = Fault { what: Some(What::Write), times: 1, ..Fault::default() };
    engine.backend_mut().plan_mut().push(fault);
    let mut write = || {
        let ones = Buf::copied(&[1; 512]);
        engine.submit(disk, Io::write(0, 512), ones, 0).expect("there is room");
        settle(&mut engine).remove(0).result
    };
    assert_eq!(write(), Err(Errno::IO));
    assert!(std::fs::read(&path).expect("it is there") == bytes, "nothing has changed");
    assert_eq!(write(), Ok(()));
    drain(&mut engine);
    drop(engine);
    assert_ne!(cid(&path), old);
    let now = std::fs::read(&path).expect("it is there");
    let differ = now.iter().zip(&bytes).filter(|(now, before)| now != before).count();
    // The data, and the id's digits.
    assert!((512..=512 + 8).contains(&differ), "{differ} bytes differ");
}

/// Of a write under a table that is not in memory yet: it is read, and beside it the id is written.
#[test]
fn an_id_that_cannot_be_written_fails_what_would_be_published() {
    let folder = folder();
    let path = folder.path().join("disk.vmdk");
    let options = CreateOptions { size: Some(1 << 20), ..CreateOptions::default() };
    make_with(&path, Format::Vmdk, &options);
    let old = cid(&path);
    let mut engine: Engine<Node, Faulty<Inline>> =
        Engine::new(Faulty::new(Inline::new()), Default::default());
    let disk = add(&mut engine, &path, Format::Vmdk, false);
    let fault = Fault { what: Some(What::Write), ..Fault::default() };
    engine.backend_mut().plan_mut().push(fault);
    engine.submit(disk, Io::write(0, 512), Buf::zeroed(512), 0).expect("there is room");
    assert_eq!(settle(&mut engine).remove(0).result, Err(Errno::IO));
    engine.backend_mut().plan_mut().clear();
    drain(&mut engine);
    drop(engine);
    assert_eq!(cid(&path), old);
    change(&path);
    assert_ne!(cid(&path), old);
}
