//! An engine dropped with I/O in flight waits for it: the memory outlives what writes into it.

use crate::common::drive::{add, folder, make};
use cowbell_engine::backend::Backend;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::pool::{Pool, PoolOptions};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{DiskHost, Format, OpenOptions, open};

fn drop_at_work<B: Backend<File = DiskFile>>(backend: impl Fn() -> B, direct: bool) {
    let folder = folder();
    for format in [Format::Raw, Format::Qed] {
        let path = folder.path().join(format.name());
        make(&path, format, 16 << 20);
        for runs in 0..20 {
            let options = OpenOptions { write: true, ..OpenOptions::default() };
            // A QED image that was not left clean is checked now.
            drop(open(&DiskHost::default(), &path, &options).expect("it opens"));
            let mut engine = Engine::new(backend(), Limits::default());
            let disk = add(&mut engine, &path, format, direct);
            for n in 0..100 {
                let (offset, len) = (n * 160_001, 3 * 4096 + n);
                let buf = Buf::zeroed(len as usize);
                let io = if n % 2 == 0 { Io::read(offset, len) } else { Io::write(offset, len) };
                engine.submit(disk, io, buf, n).expect("room");
            }
            let zero = IoKind::Zero { unmap: true, fua: true };
            let io = Io { kind: zero, offset: 100, len: 3 << 20 };
            engine.submit(disk, io, Mem::None, 0).expect("room");
            engine.submit(disk, Io::flush(), Mem::None, 0).expect("room");
            for _ in 0..runs {
                engine.run(clock());
            }
            drop(engine);
        }
    }
}

#[test]
fn over_native_aio() {
    drop_at_work(|| Aio::new(AioOptions::default()).expect("native AIO"), true);
}

#[test]
fn over_io_uring() {
    let Some(uring) = crate::common::uring() else { return };
    drop_at_work(&uring, true);
    drop_at_work(&uring, false);
}

#[test]
fn over_threads() {
    let options = PoolOptions { threads: 3, depth: 20, ..PoolOptions::default() };
    drop_at_work(|| Pool::new(options).expect("a pool"), false);
}
