//! A draining engine takes nothing new, ends what it has, leaves every image clean on the disk, and
//! then is as usable as before.

use std::path::Path;

use crate::common::drive::{add, drain, folder, is_readable, make, settle};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::{Engine, Limits, Why};
use cowbell_formats::Format;
use cowbell_formats::qed::rest::check::{self, Repair};
use cowbell_formats::{DiskHost, LayerMeta, OpenOptions, open};

fn assert_clean(path: &Path) {
    // The drained engine still has it.
    let options =
        OpenOptions { ignore_need_check: true, force_share: true, ..OpenOptions::default() };
    let layer = open(&DiskHost::default(), path, &options).expect("opens").layers.remove(0);
    let LayerMeta::Qed(image) = layer.meta else { panic!("it is QED") };
    assert!(!image.header.needs_check(), "the mark is still set");
    let report = check::check(&layer.file, Repair::None).expect("it checks");
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn with_requests_in_flight() {
    let folder = folder();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let backend = Aio::new(AioOptions::default()).expect("native AIO");
    let mut engine = Engine::new(backend, Limits::default());
    let disks = paths.each_ref().map(|path| {
        make(path, Format::Qed, 64 << 20);
        add(&mut engine, path, Format::Qed, true)
    });
    for round in 0..3u64 {
        for tag in 0..64 {
            let disk = disks[tag as usize % 2];
            let offset = (round * 64 + tag) * 70_000;
            let bytes = Buf::copied(&[tag as u8 + 1; 5000]);
            engine.submit(disk, Io::write(offset, 5000), bytes, tag).expect("new ones are taken");
        }
        if round > 0 {
            engine.run(clock());
        }
        engine.drain();
        assert_eq!(engine.drained(), None);
        let refused =
            engine.submit(disks[0], Io::flush(), Mem::None, 0).expect_err("none is taken");
        assert_eq!(refused.why, Why::Draining);
        engine.drain(); // once more changes nothing
        let finished = drain(&mut engine);
        assert!(finished.len() == 64 && finished.iter().all(|done| done.result == Ok(())));
        paths.iter().for_each(|path| assert_clean(path));
        assert_eq!(engine.drained(), Some(Ok(())), "until something is submitted");
    }
    let bytes = Buf::zeroed(5000);
    engine.submit(disks[1], Io::read(70_000, 5000), bytes, 0).expect("taken");
    assert_eq!(engine.drained(), None);
    let finished = settle(&mut engine);
    let buf = finished.into_iter().next().expect("one").mem.into_buf().expect("ours");
    assert!(buf.iter().all(|&b| b == 2));
}

#[test]
fn with_nothing_to_do() {
    let folder = folder();
    let path = folder.path().join("disk");
    make(&path, Format::Qed, 1 << 20);
    let backend = Aio::new(AioOptions::default()).expect("native AIO");
    let mut engine = Engine::new(backend, Limits::default());
    // Without any node, too.
    drain(&mut engine);
    add(&mut engine, &path, Format::Qed, true);
    for _ in 0..3 {
        drain(&mut engine);
    }
    assert!(!is_readable(&engine, 0));
    let _ = DiskFile::open(&path, &Default::default()).expect("it opens");
    assert_clean(&path);
}
