//! QED under random requests at depth, over every backend, with and without a backing file.

use crate::common::shadow::{Rig, Rng, SIZE};
use cowbell_engine::backend::Backend;
use cowbell_engine::mem::Buf;
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::sys::pool::{Pool, PoolOptions};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::parts::growth::Growth;
use cowbell_formats::qed::QedOptions;
use cowbell_formats::qed::rest::check;
use cowbell_formats::{
    CreateOptions, DiskHost, Format, OpenOptions, RunOptions, attach, create, open,
};

fn drive<B: Backend<File = DiskFile>>(backend: impl Fn() -> B, direct: bool, seed: u64) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    for (n, (cluster, tables)) in
        [(4096, 1), (65536, 2), (4096, 16), (2 << 20, 4)].into_iter().enumerate()
    {
        for backing in [None, Some(Format::Raw), Some(Format::Qed)] {
            let host = DiskHost { direct: false };
            let mut shadow = vec![0; SIZE as usize];
            let base = folder.path().join(format!("base{n}{backing:?}"));
            if let Some(format) = backing {
                // A backing file shorter than the disk, its end in the middle of a cluster.
                let len = (3 << 20) + 512 * 3;
                let options = CreateOptions { size: Some(len), ..CreateOptions::default() };
                create(&host, &base, format, &options).expect("the base is made");
                let chain =
                    open(&host, &base, &OpenOptions { write: true, ..OpenOptions::default() })
                        .expect("opens");
                let mut engine = Engine::new(backend(), Limits::default());
                let disk = attach(
                    &mut engine,
                    chain,
                    &RunOptions { trust_probed: true, ..RunOptions::default() },
                )
                .expect("attaches");
                let mut buf = Buf::zeroed(len as usize);
                buf.iter_mut().enumerate().for_each(|(i, b)| *b = (i / 513) as u8 | 1);
                shadow[..len as usize].copy_from_slice(&buf);
                engine.submit(disk, Io::write(0, len), buf, 0).expect("room");
                engine.drain();
                while engine.drained().is_none() {
                    engine.run(clock());
                }
                assert_eq!(engine.poll().expect("one").result, Ok(()));
            }
            let path = folder.path().join(format!("image{n}{backing:?}"));
            let options = CreateOptions {
                size: Some(SIZE),
                cluster_size: Some(cluster),
                table_size: Some(tables),
                backing_file: backing.map(|_| base.file_name().expect("a name").into()),
                backing_format: backing,
                ..CreateOptions::default()
            };
            create(&host, &path, Format::Qed, &options).expect("the image is made");
            let mut rng = Rng(seed + n as u64);
            for round in 0..2 {
                let growth = Growth { step_min: 64 << 10, step_max: 1 << 20, ..Growth::default() };
                let qed = QedOptions {
                    cache_slices: 2,
                    growth,
                    unmark_after_ms: 1,
                    writeback_after_ms: 2,
                };
                let run = RunOptions { qed, ..RunOptions::default() };
                let mut rig = Rig::open(backend(), &path, direct, cluster, shadow, &run);
                assert_eq!(rig.has_backing, backing.is_some());
                for _ in 0..300 {
                    rig.one(&mut rng);
                }
                shadow = rig.finish();
                let file = DiskFile::open(&path, &Default::default()).expect("opens");
                let report = check::check(&file, check::Repair::None).expect("checks");
                assert!(
                    report.is_clean(),
                    "round {round}, {cluster}, {tables}, {backing:?}: {report:?}"
                );
            }
        }
    }
}

#[test]
fn qed_over_the_inline_backend() {
    drive(Inline::new, false, 1);
}

#[test]
fn qed_over_the_inline_backend_past_the_page_cache() {
    drive(Inline::new, true, 2);
}

#[test]
fn qed_over_a_pool() {
    drive(|| Pool::new(PoolOptions::default()).expect("a pool"), false, 3);
}

#[test]
fn qed_over_native_aio() {
    drive(|| Aio::new(AioOptions::default()).expect("native AIO"), true, 4);
}

#[test]
fn qed_over_io_uring() {
    let Some(uring) = crate::common::uring() else { return };
    drive(&uring, true, 7);
    drive(&uring, false, 8);
}

#[test]
fn qed_over_native_aio_that_may_wait() {
    let options = AioOptions { nowait: false, ..AioOptions::default() };
    drive(|| Aio::new(options).expect("native AIO"), true, 5);
}
