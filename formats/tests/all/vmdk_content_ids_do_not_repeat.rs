//! Each session that changes a VMDK image leaves a content id that it never had before, with options
//! that nobody set: so an overlay never takes a parent that was changed for the one it was made on.

use std::path::Path;

use crate::common::drive::{add, drain, folder, make_with, settle};
use cowbell_engine::Engine;
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
