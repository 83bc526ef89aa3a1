//! Requests over real files with native AIO: read hits and allocating writes, in every format, on
//! tmpfs (no device: what the software costs) and on the file system of the build folder.

use std::path::PathBuf;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

use cowbell_benches::{image, scattered};
use cowbell_engine::step::Io;
use cowbell_formats::Format;

const FORMATS: [Format; 5] = [Format::Raw, Format::Qed, Format::Qcow2, Format::Vmdk, Format::Vdi];

/// Where there is a tmpfs, and where the build is.
fn places() -> Vec<(&'static str, PathBuf)> {
    let mut places = vec![("disk", PathBuf::from(env!("CARGO_TARGET_TMPDIR")))];
    if PathBuf::from("/dev/shm").is_dir() {
        places.insert(0, ("tmpfs", PathBuf::from("/dev/shm")));
    }
    places
}

fn read_hit(c: &mut Criterion) {
    const SIZE: u64 = 64 << 20;
    for (place, folder) in places() {
        let folder = tempfile::tempdir_in(folder).expect("a folder");
        let mut group = c.benchmark_group(format!("4K read hit, {place}"));
        group.throughput(Throughput::Elements(1024));
        group.measurement_time(Duration::from_secs(3)).sample_size(20);
        for format in FORMATS {
            let path = folder.path().join(format.name());
            let mut fill = image(&path, format, SIZE, 8, 1 << 20);
            fill.run(SIZE >> 20, |n| Io::write(n << 20, 1 << 20));
            for depth in [1, 32] {
                let mut load = fill.with_buffers(depth, 4096);
                group.bench_function(format!("{format} depth {depth}"), |b| {
                    b.iter(|| load.run(1024, |n| Io::read(scattered(n, SIZE / 4096, 4096), 4096)));
                });
                fill = load;
            }
            fill.drain();
        }
    }
}

fn write_alloc(c: &mut Criterion) {
    const WRITES: u64 = 256;
    for (place, folder) in places() {
        let folder = tempfile::tempdir_in(folder).expect("a folder");
        let mut group = c.benchmark_group(format!("64K allocating write, {place}"));
        group.throughput(Throughput::Elements(WRITES));
        group.measurement_time(Duration::from_secs(3)).sample_size(10);
        for format in FORMATS {
            for depth in [1, 16] {
                let path = folder.path().join(format.name());
                group.bench_function(format!("{format} depth {depth}"), |b| {
                    b.iter_batched_ref(
                        || image(&path, format, WRITES << 16, depth, 64 << 10),
                        |load| load.run(WRITES, |n| Io::write(n << 16, 64 << 10)),
                        BatchSize::PerIteration,
                    );
                });
            }
        }
    }
}

criterion_group!(benches, read_hit, write_alloc);
criterion_main!(benches);
