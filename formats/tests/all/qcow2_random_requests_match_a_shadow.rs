//! qcow2 under random requests at depth, in every shape of image, with caches so small that every
//! path is taken; then `qemu-img` checks the image and compares it with the shadow.

use std::path::Path;

use crate::common::shadow::{Rig, Rng, SIZE};
use crate::common::{have_qemu, ok};
use cowbell_engine::backend::Backend;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::sys::pool::{Pool, PoolOptions};
use cowbell_formats::parts::growth::Growth;
use cowbell_formats::qcow2::Qcow2Options;
use cowbell_formats::{CreateOptions, DiskHost, Format, RunOptions, create};

/// An image's shape, and what is behind it.
struct Shape {
    cluster: u64,
    refcount_bits: u64,
    compat: &'static str,
    extended: bool,
    backing: Option<Format>,
}

const fn shape(cluster: u64, refcount_bits: u64) -> Shape {
    Shape { cluster, refcount_bits, compat: "v3", extended: false, backing: None }
}

/// Every cluster size, refcount width and version, every kind of backing file, subclusters.
const SHAPES: [Shape; 16] = [
    shape(512, 16),
    shape(1024, 1),
    Shape { backing: Some(Format::Raw), ..shape(2048, 2) },
    shape(4096, 4),
    Shape { backing: Some(Format::Qcow2), ..shape(8192, 8) },
    shape(16384, 32),
    Shape { backing: Some(Format::Qed), ..shape(32768, 64) },
    shape(65536, 16),
    Shape { backing: Some(Format::Raw), ..shape(131072, 16) },
    shape(262144, 16),
    Shape { backing: Some(Format::Qcow2), ..shape(524288, 64) },
    shape(1 << 20, 1),
    Shape { backing: Some(Format::Raw), ..shape(2 << 20, 16) },
    Shape { compat: "v2", ..shape(65536, 16) },
    Shape { extended: true, ..shape(16384, 16) },
    Shape { extended: true, backing: Some(Format::Qcow2), ..shape(65536, 16) },
];

fn run_options() -> RunOptions {
    let growth = Growth { step_min: 64 << 10, step_max: 1 << 20, ..Growth::default() };
    let qcow2 = Qcow2Options {
        cache_slices: 2,
        cache_packed: 3,
        deflate_depth: 2,
        growth,
        reserve_max: 32,
        ..Qcow2Options::default()
    };
    RunOptions { qcow2, trust_probed: true, ..RunOptions::default() }
}

/// A backing file shorter than the disk, its end in the middle of a cluster.
fn make_base(path: &Path, format: Format, shadow: &mut [u8]) {
    let len = (3 << 20) + 512 * 3;
    let raw = path.with_extension("raw");
    shadow[..len].iter_mut().enumerate().for_each(|(i, b)| *b = (i / 513) as u8 | 1);
    std::fs::write(&raw, &shadow[..len]).expect("written");
    let (folder, to) = (raw.parent().expect("a folder"), path.display());
    ok(folder, &format!("qemu-img convert -f raw -O {format} {} {to}", raw.display()));
}

fn drive<B: Backend<File = DiskFile>>(backend: impl Fn() -> B, direct: bool, seed: u64) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let has_qemu = have_qemu();
    for (n, shape) in SHAPES.iter().enumerate() {
        if !has_qemu && shape.backing.is_some() {
            continue;
        }
        let mut shadow = vec![0; SIZE as usize];
        let base = folder.path().join(format!("base{n}"));
        if let Some(format) = shape.backing {
            make_base(&base, format, &mut shadow);
        }
        let path = folder.path().join(format!("image{n}"));
        let options = CreateOptions {
            size: Some(SIZE),
            cluster_size: Some(shape.cluster),
            refcount_bits: Some(shape.refcount_bits),
            compat: Some(shape.compat.into()),
            extended_l2: Some(shape.extended),
            backing_file: shape.backing.map(|_| base.file_name().expect("a name").into()),
            backing_format: shape.backing,
            ..CreateOptions::default()
        };
        create(&DiskHost::default(), &path, Format::Qcow2, &options).expect("the image is made");
        let mut rng = Rng(seed + n as u64);
        for round in 0..2 {
            let run = run_options();
            let mut rig = Rig::open(backend(), &path, direct, shape.cluster, shadow, &run);
            rig.discards = shape.compat == "v3" || shape.backing.is_none();
            for _ in 0..300 {
                rig.one(&mut rng);
            }
            shadow = rig.finish();
            if has_qemu {
                println!("image {n}, round {round}");
                std::fs::write(folder.path().join("shadow"), &shadow).expect("written");
                ok(folder.path(), &format!("qemu-img check -f qcow2 image{n}"));
                ok(folder.path(), &format!("qemu-img compare -f qcow2 -F raw image{n} shadow"));
            }
        }
    }
}

#[test]
fn over_the_inline_backend() {
    drive(Inline::new, false, 1);
}

#[test]
fn over_a_pool() {
    drive(|| Pool::new(PoolOptions::default()).expect("a pool"), false, 3);
}

#[test]
fn over_native_aio() {
    drive(|| Aio::new(AioOptions::default()).expect("native AIO"), true, 4);
}

#[test]
fn over_io_uring() {
    let Some(uring) = crate::common::uring() else { return };
    drive(&uring, true, 5);
    drive(&uring, false, 6);
}
