//! VMDK under random requests at depth: sparse and flat, whole and split, with and without a
//! parent, with grains and tables of several sizes, zeroed grains, two tables in memory; checked
//! afterwards.

use std::path::{Path, PathBuf};

use crate::common::shadow::{Rig, Rng, SIZE};
use cowbell_engine::backend::Backend;
use cowbell_engine::mem::Buf;
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::chain::{open_layer, open_whole_layer};
use cowbell_formats::check::Repair;
use cowbell_formats::parts::growth::Growth;
use cowbell_formats::vmdk::VmdkOptions;
use cowbell_formats::vmdk::disk::descriptor::Kind;
use cowbell_formats::vmdk::rest::check::check;
use cowbell_formats::vmdk::rest::create::{Options, write_file};
use cowbell_formats::{DiskHost, Host, LayerMeta, OpenOptions, RunOptions, attach, open};

const HOST: DiskHost = DiskHost { direct: false };

/// Makes the image that `options` describe, in `folder`.
fn make(folder: &Path, options: &Options) -> PathBuf {
    let place = |name: &[u8]| folder.join(String::from_utf8_lossy(name).as_ref());
    for (i, name) in options.files().iter().enumerate() {
        let file = HOST.create_new(&place(name)).expect("it is made");
        write_file(&file, options, i).expect("it is filled");
    }
    place(&options.name)
}

/// A parent, shorter than the disk, its end in the middle of a grain; its contents go to `shadow`.
fn make_parent<B: Backend<File = DiskFile>>(
    backend: B,
    folder: &Path,
    kind: Kind,
    shadow: &mut [u8],
) -> (Vec<u8>, u32) {
    let len = (3 << 20) + 512 * 3;
    let path = make(folder, &Options::new(kind, b"base.vmdk", len, 1));
    let write = OpenOptions { write: true, ..OpenOptions::default() };
    let chain = open(&HOST, &path, &write).expect("it opens");
    let mut engine = Engine::new(backend, Limits::default());
    let disk = attach(&mut engine, chain, &RunOptions::default()).expect("it attaches");
    let mut buf = Buf::zeroed(len as usize);
    buf.iter_mut().enumerate().for_each(|(i, b)| *b = (i / 513) as u8 | 1);
    shadow[..len as usize].copy_from_slice(&buf);
    engine.submit(disk, Io::write(0, len), buf, 0).expect("there is room");
    engine.drain();
    while engine.drained().is_none() {
        engine.run(clock());
    }
    assert_eq!(engine.poll().expect("one").result, Ok(()));
    drop(engine);
    let layer = open_layer(&HOST, &path, &OpenOptions::default()).expect("it opens");
    let LayerMeta::Vmdk(image) = layer.meta else { panic!("it is another format") };
    assert_ne!(image.descriptor.cid, 1, "a session that wrote leaves another content id");
    (b"base.vmdk".to_vec(), image.descriptor.cid)
}

fn drive<B: Backend<File = DiskFile>>(backend: impl Fn() -> B, direct: bool, seed: u64) {
    let kinds = [
        (Kind::MonolithicSparse, 12, 7, false),
        (Kind::MonolithicSparse, 16, 9, false),
        (Kind::MonolithicSparse, 12, 8, true),
        // Larger than a buffer: what is around a write is copied in a loop.
        (Kind::MonolithicSparse, 20, 9, false),
        (Kind::MonolithicSparse, 18, 7, true),
        (Kind::TwoGbMaxExtentSparse, 12, 7, false),
        (Kind::TwoGbMaxExtentFlat, 16, 9, false),
        (Kind::MonolithicFlat, 16, 9, false),
    ];
    for (n, (kind, grain_bits, table_bits, zeroed_grain)) in kinds.into_iter().enumerate() {
        for with_parent in [false, true] {
            if kind.is_flat() && with_parent {
                continue;
            }
            let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
            let mut shadow = vec![0; SIZE as usize];
            let parent =
                with_parent.then(|| make_parent(backend(), folder.path(), kind, &mut shadow));
            let options = Options {
                grain_bits,
                table_bits,
                zeroed_grain,
                parent,
                lazy: n == 1,
                sizes: matches!(kind, Kind::TwoGbMaxExtentSparse | Kind::TwoGbMaxExtentFlat)
                    .then(|| vec![(2 << 20) + 8192 * 5, 65536 * 3, SIZE - (2 << 20) - 237_568]),
                ..Options::new(kind, b"image.vmdk", SIZE, 0x1234_5678)
            };
            let path = make(folder.path(), &options);
            let mut rng = Rng(seed + n as u64);
            for round in 0..2 {
                let growth = Growth { step_min: 64 << 10, step_max: 1 << 20, ..Growth::default() };
                let vmdk = VmdkOptions {
                    cache_tables: 2,
                    growth,
                    writeback_after_ms: 1,
                    ..VmdkOptions::default()
                };
                let run = RunOptions { vmdk, ..RunOptions::default() };
                let mut rig = Rig::open(backend(), &path, direct, 1 << grain_bits, shadow, &run);
                rig.discards = zeroed_grain || !with_parent && !kind.is_flat();
                assert_eq!(rig.has_backing, with_parent);
                for _ in 0..300 {
                    rig.one(&mut rng);
                }
                shadow = rig.finish();
                let layer = open_whole_layer(&HOST, &path, &OpenOptions::default());
                let report = check(&layer.expect("it opens"), Repair::None).expect("it is checked");
                assert!(report.is_clean(), "round {round}, case {n} {with_parent}: {report:?}");
            }
        }
    }
}

#[test]
fn over_the_inline_backend() {
    drive(Inline::new, false, 11);
}

#[test]
fn over_the_inline_backend_past_the_page_cache() {
    drive(Inline::new, true, 12);
}

#[test]
fn over_native_aio() {
    drive(|| Aio::new(AioOptions::default()).expect("native AIO"), true, 14);
}

#[test]
fn over_io_uring() {
    let Some(uring) = crate::common::uring() else { return };
    drive(&uring, true, 15);
    drive(&uring, false, 16);
}
