//! An entry of a table that cannot be fails the requests that need it, and says where it is; the rest
//! of the disk goes on, in every format. A drain writes what there is, and says that it is not sound.

use std::path::Path;

use crate::common::drive::{add, folder, make, settle};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::clock;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, NodeId};
use cowbell_engine::{Engine, Limits, NodeEvent};
use cowbell_formats::{Format, Node};

const SIZE: u64 = 64 << 20;
/// Guest bytes that are mapped by entries of their own in every format.
const CLUSTER: u64 = 64 << 10;

fn go(
    engine: &mut Engine<Node, Inline>,
    disk: NodeId,
    io: Io,
    mem: impl Into<Mem>,
) -> Result<(), Errno> {
    engine.submit(disk, io, mem, 0).expect("room");
    settle(engine).pop().expect("one").result
}

fn drain(engine: &mut Engine<Node, Inline>) -> Result<(), Errno> {
    engine.drain();
    while engine.drained().is_none() {
        engine.run(clock());
    }
    engine.drained().expect("it is")
}

fn le(bytes: &[u8], at: usize, len: usize) -> usize {
    let mut word = [0; 8];
    word[..len].copy_from_slice(&bytes[at..at + len]);
    u64::from_le_bytes(word) as usize
}

/// Where the entry of the disk's first cluster is, and its bytes; and what it is made.
fn spoil(path: &Path, format: Format) -> u64 {
    let mut bytes = std::fs::read(path).expect("read");
    let at = match format {
        // The L1 table's offset, its first entry, the L2 table's first entry.
        Format::Qed => le(&bytes, le(&bytes, 40, 8), 8),
        // The grain directory's sector, its first entry.
        _ => le(&bytes, le(&bytes, 56, 8) * 512, 4) * 512,
    };
    // Far behind the file's end.
    let len = if format == Format::Qed { 8 } else { 4 };
    bytes[at..at + len].copy_from_slice(&0x7fff_0000_7fff_0000_u64.to_le_bytes()[..len]);
    std::fs::write(path, bytes).expect("written");
    at as u64
}

#[test]
fn in_qed_and_vmdk() {
    let folder = folder();
    for format in [Format::Qed, Format::Vmdk] {
        let path = folder.path().join(format.to_string());
        make(&path, format, SIZE);
        let mut engine: Engine<Node, Inline> = Engine::new(Inline::new(), Limits::default());
        let disk = add(&mut engine, &path, format, false);
        for at in [0, 4 * CLUSTER] {
            let bytes = Buf::copied(&vec![7; CLUSTER as usize]);
            assert_eq!(go(&mut engine, disk, Io::write(at, CLUSTER), bytes), Ok(()));
        }
        assert_eq!(drain(&mut engine), Ok(()));
        drop(engine);
        let bad = spoil(&path, format);
        let mut engine: Engine<Node, Inline> = Engine::new(Inline::new(), Limits::default());
        let disk = add(&mut engine, &path, format, false);
        for _ in 0..2 {
            let read = go(&mut engine, disk, Io::read(0, 512), Buf::zeroed(512));
            assert_eq!(read, Err(Errno::IO), "{format}");
            let write = go(&mut engine, disk, Io::write(0, 512), Buf::zeroed(512));
            assert_eq!(write, Err(Errno::IO), "{format}");
        }
        // Mapped, and not mapped yet.
        for at in [4 * CLUSTER, 9 * CLUSTER] {
            let write = go(&mut engine, disk, Io::write(at, 512), Buf::copied(&[3; 512]));
            assert_eq!(write, Ok(()), "{format}");
            assert_eq!(go(&mut engine, disk, Io::read(at, 512), Buf::zeroed(512)), Ok(()));
        }
        assert_eq!(go(&mut engine, disk, Io::flush(), Mem::None), Ok(()));
        let event = engine.poll_event();
        let here = |at| at == bad;
        assert!(
            matches!(event, Some(NodeEvent::Corrupt { at, .. }) if here(at)),
            "{event:?} {bad}"
        );
        assert_eq!(engine.poll_event(), None, "it is told once");
        assert_eq!(drain(&mut engine), Err(Errno::IO));
    }
}
