//! Persistent bitmaps: we do not keep them up to date, so whoever opens an image next must not
//! believe what they say once we have had it open for writing. Everything else of them stays.

use std::path::Path;

use crate::common::drive::{add, drain, settle};
use crate::common::{have_qemu, ok};
use cowbell_engine::mem::Buf;
use cowbell_engine::step::Io;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{DiskHost, Format, OpenOptions, open};

/// What QEMU says of the image's bitmaps, and how many of them are not to be believed.
fn bitmaps(folder: &Path) -> (String, usize) {
    let info = ok(folder, "qemu-img info -U a.qcow2");
    let from = info.find("bitmaps:").expect("it has some");
    let text = info[from..info.find("refcount bits:").expect("what comes after")].to_owned();
    assert_eq!(text.matches("name: ").count(), 2, "{text}");
    let doubted = text.matches("in-use").count();
    (text, doubted)
}

#[test]
fn bitmaps_of_an_image_that_was_written() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (folder, path) = (folder.path(), folder.path().join("a.qcow2"));
    ok(folder, "qemu-img create -q -f qcow2 a.qcow2 8M");
    ok(folder, "qemu-img bitmap --add -g 4096 a.qcow2 on");
    ok(folder, "qemu-img bitmap --add --disable a.qcow2 off");
    ok(folder, "qemu-io -f qcow2 -c 'write -q -P 6 32k 700k' a.qcow2");
    assert_eq!(bitmaps(folder).1, 0);

    // To read is to leave them as they are.
    let bytes = std::fs::read(&path).expect("it is there");
    let options = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
    drop(open(&DiskHost::default(), &path, &options).expect("it opens"));
    assert!(std::fs::read(&path).expect("it is there") == bytes, "an image was changed by looking");

    let mut engine = Engine::new(Inline::new(), Limits::default());
    let disk = add(&mut engine, &path, Format::Qcow2, false);
    // Before the first write: a crash from here on must not leave them believed.
    let (marked, doubted) = bitmaps(folder);
    assert_eq!(doubted, 2, "{marked}");
    let data = Buf::copied(&[0x33; 65536]);
    engine.submit(disk, Io::write(5 << 20, 65536), data, 0).expect("there is room");
    assert!(settle(&mut engine).iter().all(|done| done.result == Ok(())));
    drain(&mut engine);
    drop(engine);

    assert_eq!(bitmaps(folder), (marked, 2));
    ok(folder, "qemu-img check -q -f qcow2 a.qcow2");
    ok(folder, "qemu-io -f qcow2 -c 'read -q -P 6 32k 700k' -c 'read -q -P 0x33 5M 64k' a.qcow2");
    // Who made them finds them by their names, and takes them away.
    ok(folder, "qemu-img bitmap --remove a.qcow2 on");
    ok(folder, "qemu-img bitmap --remove a.qcow2 off");
    ok(folder, "qemu-img check -q -f qcow2 a.qcow2");
}
