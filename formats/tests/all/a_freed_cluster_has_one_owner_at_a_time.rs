//! A rewrite in place, a discard of the same cluster and an allocating write, all in flight at once:
//! the old bytes must not end up in the new owner's cluster. (QEMU reuses a discarded cluster while
//! a write to it is in flight.)

use crate::common::drive::{drain, folder, settle};
use crate::common::{have_qemu, ok};
use cowbell_engine::mem::Buf;
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::qcow2::Qcow2Options;
use cowbell_formats::{
    CreateOptions, DiskHost, Format, Node, OpenOptions, RunOptions, attach, create, open,
};

const CLUSTER: u64 = 4096;
const CLUSTERS: u64 = 64;

fn filled(byte: u8) -> Buf {
    Buf::copied(&[byte; CLUSTER as usize])
}

#[test]
fn with_as_little_in_reserve_as_can_be() {
    let folder = folder();
    let path = folder.path().join("image");
    let options = CreateOptions {
        size: Some(CLUSTERS * CLUSTER),
        cluster_size: Some(CLUSTER),
        ..CreateOptions::default()
    };
    create(&DiskHost::default(), &path, Format::Qcow2, &options).expect("it is made");
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    let chain = open(&DiskHost { direct: true }, &path, &options).expect("it opens");
    let aio = Aio::new(AioOptions::default()).expect("native AIO");
    let mut engine: Engine<Node, Aio> = Engine::new(aio, Limits::default());
    let qcow2 = Qcow2Options { reserve_max: 1, ..Qcow2Options::default() };
    let run = RunOptions { qcow2, ..RunOptions::default() };
    let disk = attach(&mut engine, chain, &run).expect("it attaches");

    let mut expected = vec![0; CLUSTERS as usize];
    for round in 0..2000_u64 {
        let byte = (round % 250) as u8 + 1;
        // Cluster `old` is rewritten and discarded while `new` is written for the first time, or
        // since it was last discarded.
        let (old, new) = (round % CLUSTERS, (round * 7 + 3) % CLUSTERS);
        if old == new {
            continue;
        }
        let mut submit = |io: Io, mem: Option<Buf>| {
            let mem = mem.map_or(cowbell_engine::mem::Mem::None, Into::into);
            engine.submit(disk, io, mem, 0).expect("there is room");
        };
        let discard = Io { kind: IoKind::Discard, offset: old * CLUSTER, len: CLUSTER };
        submit(Io::write(old * CLUSTER, CLUSTER), Some(filled(255)));
        submit(discard, None);
        submit(Io::flush(), None);
        submit(Io::write(new * CLUSTER, CLUSTER), Some(filled(byte)));
        for done in settle(&mut engine) {
            assert_eq!(done.result, Ok(()));
        }
        expected[new as usize] = byte;
        // The rewrite or the discard came last.
        for (cluster, legal) in [(new, [byte; 2]), (old, [0, 255])] {
            let read = Io::read(cluster * CLUSTER, CLUSTER);
            engine.submit(disk, read, Buf::zeroed(CLUSTER as usize), 0).expect("room");
            let done = settle(&mut engine).pop().expect("one");
            let bytes = done.mem.into_buf().expect("its own");
            assert!(legal.contains(&bytes[0]), "round {round}, cluster {cluster}: {}", bytes[0]);
            assert!(bytes.iter().all(|&b| b == bytes[0]), "round {round}, cluster {cluster}");
            expected[cluster as usize] = bytes[0];
        }
        if round % 100 == 0 {
            for (cluster, &byte) in expected.iter().enumerate() {
                let read = Io::read(cluster as u64 * CLUSTER, CLUSTER);
                engine.submit(disk, read, Buf::zeroed(CLUSTER as usize), 0).expect("room");
                let done = settle(&mut engine).pop().expect("one");
                let bytes = done.mem.into_buf().expect("its own");
                assert!(bytes.iter().all(|&b| b == byte), "round {round}, cluster {cluster}");
            }
        }
    }
    drain(&mut engine);
    if have_qemu() {
        ok(folder.path(), "qemu-img check -U -f qcow2 image");
    }
}
