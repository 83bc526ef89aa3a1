//! The engine's descriptor is readable when `run` has something to collect, and but for late signals
//! only then: a loop that looks at levels neither spins nor sleeps through a completion.

use crate::common::drive::{add, drain, folder, is_readable, make};
use cowbell_engine::backend::Backend;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::pool::{Pool, PoolOptions};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{Format, Node};

fn look<B: Backend<File = DiskFile>>(backend: impl Fn() -> B, direct: bool) {
    let folder = folder();
    for format in [Format::Raw, Format::Qed] {
        let path = folder.path().join(format.name());
        make(&path, format, 16 << 20);
        let mut engine = Engine::new(backend(), Limits::default());
        let disk = add(&mut engine, &path, format, direct);
        assert!(!is_readable(&engine, 0), "nothing has been submitted");
        for round in 0..200u64 {
            for n in 0..1 + round % 5 {
                let io = Io::write((round * 5 + n) * 13_000, 12_345);
                engine.submit(disk, io, Buf::zeroed(12_345), n).expect("room");
            }
            engine.submit(disk, Io::flush(), Mem::None, 9).expect("room");
            assert!(round > 0 || !is_readable(&engine, 0), "submitting does no I/O");
            let mut runs = 0;
            while !engine.is_idle() {
                // Collected is what there is: a wake-up each, and hardly one for nothing.
                assert!(runs == 0 || is_readable(&engine, 20_000), "{engine:?}");
                engine.run(clock());
                while engine.poll().is_some() {}
                runs += 1;
            }
            assert!(runs < 200, "{runs} wake-ups");
            assert!(falls_silent(&mut engine), "all has been collected, round {round}");
        }
        drain(&mut engine);
        assert!(falls_silent(&mut engine));
    }
}

/// The kernel shows a completion first and signals it then, so a signal may come for what has been
/// collected already. Runs take those in, and no more follow.
fn falls_silent<B: Backend<File = DiskFile>>(engine: &mut Engine<Node, B>) -> bool {
    (0..50).any(|_| {
        let silent = !is_readable(engine, 2);
        engine.run(clock());
        silent
    })
}

#[test]
fn of_native_aio() {
    look(|| Aio::new(AioOptions::default()).expect("native AIO"), true);
}

#[test]
fn of_io_uring() {
    let Some(uring) = crate::common::uring() else { return };
    look(&uring, true);
    look(&uring, false);
}

#[test]
fn of_threads() {
    look(|| Pool::new(PoolOptions::default()).expect("a pool"), false);
}
