//! Disks in one engine have nothing to do with each other but the room they share.

use crate::common::drive::{add, drain, folder, make, settle};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::units::Errno;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::Format;

#[test]
fn and_their_bytes_stay_apart() {
    let folder = folder();
    let backend = Aio::new(AioOptions::default()).expect("native AIO");
    let mut engine = Engine::new(backend, Limits::default());
    let disks =
        [(Format::Raw, true), (Format::Qed, true), (Format::Raw, false), (Format::Qed, false)];
    let disks = disks.map(|(format, direct)| {
        let path = folder.path().join(format!("{format}{direct}"));
        make(&path, format, 1 << 20);
        add(&mut engine, &path, format, direct)
    });
    for at in 0..40u64 {
        for (n, &disk) in disks.iter().enumerate() {
            let bytes = Buf::copied(&[(at * 4 + n as u64) as u8; 9999]);
            engine.submit(disk, Io::write(at * 10_000, 9999), bytes, 0).expect("room");
        }
    }
    assert!(settle(&mut engine).iter().all(|done| done.result == Ok(())));
    // One of them has a trouble of its own.
    let beyond = Io { kind: IoKind::Truncate, offset: 511, len: 0 };
    engine.submit(disks[0], beyond, Mem::None, 0).expect("room");
    for at in 0..40u64 {
        for (n, &disk) in disks.iter().enumerate() {
            let tag = at * 4 + n as u64;
            engine
                .submit(disk, Io::read(at * 10_000, 10_000), Buf::zeroed(10_000), tag)
                .expect("room");
        }
    }
    for done in settle(&mut engine) {
        let Some(buf) = done.mem.into_buf() else {
            assert_eq!(done.result, Err(Errno::NOT_SUPPORTED));
            continue;
        };
        assert_eq!(done.result, Ok(()));
        assert!(buf[..9999].iter().all(|&b| b == done.tag as u8), "tag {}", done.tag);
        assert_eq!(buf[9999], 0);
    }
    drain(&mut engine);
}
