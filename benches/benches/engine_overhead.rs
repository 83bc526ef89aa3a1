//! The engine by itself: a raw read whose device answers at once and does nothing.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

use cowbell_benches::Load;
use cowbell_engine::backend::FileInfo;
use cowbell_engine::step::Io;
use cowbell_engine::sys::null::{Null, NullFile};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::Node;
use cowbell_formats::raw::Raw;

const SIZE: u64 = 1 << 30;

fn engine_overhead(c: &mut Criterion) {
    let mut group = c.benchmark_group("engine overhead, null backend, raw 4K read");
    for depth in [1, 32] {
        let mut engine = Engine::new(Null::new(), Limits::default());
        let info = FileInfo {
            request_align: 512,
            memory_align: 512,
            hole_align: 4096,
            len: SIZE,
            can_grow: true,
            knows_holes: false,
        };
        let (file, _) = engine.attach(NullFile { info }).expect("a pretended file");
        let disk = engine.add(Node::Raw(Raw::new(file, SIZE, true, false, true)));
        let mut load = Load::new(engine, disk, depth, 4096);
        group.throughput(Throughput::Elements(1024));
        group.bench_function(format!("depth {depth}"), |b| {
            b.iter(|| load.run(1024, |n| Io::read(n * 4096, 4096)));
        });
    }
    group.finish();
}

criterion_group!(benches, engine_overhead);
criterion_main!(benches);
