//! A guest cannot make its image look like another format to whoever probes it next: not by a
//! write, not by several at once that are harmless each, not by zeroing or discarding a byte.
//! (CVE-2008-2004.)

use crate::common::drive::{folder, settle};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::units::{Errno, NodeId};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{DiskHost, Format, Node, OpenOptions, RunOptions, attach, open};

struct Rig {
    engine: Engine<Node, Aio>,
    disk: NodeId,
    path: std::path::PathBuf,
    _folder: tempfile::TempDir,
}

impl Rig {
    fn new(direct: bool) -> Rig {
        let folder = folder();
        let path = folder.path().join("disk");
        std::fs::write(&path, [0; 8192]).expect("it writes");
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let chain = open(&DiskHost { direct }, &path, &options).expect("it opens");
        let backend = Aio::new(AioOptions::default()).expect("native AIO");
        let mut engine = Engine::new(backend, Limits::default());
        let disk = attach(&mut engine, chain, &RunOptions::default()).expect("it attaches");
        Rig { engine, disk, path, _folder: folder }
    }

    fn submit(&mut self, io: Io, mem: Mem) {
        self.engine.submit(self.disk, io, mem, 0).expect("there is room");
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.submit(Io::write(offset, bytes.len() as u64), Buf::copied(bytes).into());
    }

    /// How many of the requests were refused. None was lost, and the image is still raw.
    fn refused(&mut self) -> usize {
        let finished = settle(&mut self.engine);
        let options = OpenOptions::default();
        let format =
            open(&DiskHost::default(), &self.path, &options).expect("raw opens").layers[0].format;
        assert_eq!(format, Format::Raw, "the guest chose the format");
        let no = Err(Errno::NOT_PERMITTED);
        assert!(finished.iter().all(|done| done.result == Ok(()) || done.result == no));
        finished.iter().filter(|done| done.result == no).count()
    }
}

#[test]
fn one_write() {
    for direct in [true, false] {
        let mut rig = Rig::new(direct);
        rig.write(0, b"QED\0");
        assert_eq!(rig.refused(), 1);
        rig.write(0, b"QEMU");
        assert_eq!(rig.refused(), 0);
    }
}

#[test]
fn two_writes_at_once() {
    for direct in [true, false] {
        let mut rig = Rig::new(direct);
        rig.write(0, b"QE");
        rig.write(2, b"D");
        assert_eq!(rig.refused(), 1, "direct: {direct}");
    }
}

#[test]
fn many_writes_at_once() {
    for direct in [true, false] {
        let mut rig = Rig::new(direct);
        for round in 0..50 {
            for (offset, bytes) in [(3, "V"), (0, "K"), (1, "DM"), (0, "C"), (1, "OWD"), (0, "QF")]
            {
                rig.write(offset, bytes.as_bytes());
            }
            assert!(rig.refused() > 0, "round {round}");
        }
    }
}

#[test]
fn a_zeroed_byte() {
    for direct in [true, false] {
        for unmap in [true, false] {
            let mut rig = Rig::new(direct);
            rig.write(0, b"QED!");
            assert_eq!(rig.refused(), 0);
            rig.submit(
                Io { kind: IoKind::Zero { unmap, fua: true }, offset: 3, len: 1 },
                Mem::None,
            );
            assert_eq!(rig.refused(), 1, "direct: {direct}, unmap: {unmap}");
            // All of it may go.
            rig.submit(
                Io { kind: IoKind::Zero { unmap, fua: true }, offset: 0, len: 600 },
                Mem::None,
            );
            assert_eq!(rig.refused(), 0, "direct: {direct}, unmap: {unmap}");
        }
    }
}

#[test]
fn a_discarded_byte() {
    for direct in [true, false] {
        let mut rig = Rig::new(direct);
        rig.write(0, b"QED!");
        assert_eq!(rig.refused(), 0);
        rig.submit(Io { kind: IoKind::Discard, offset: 3, len: 1 }, Mem::None);
        rig.refused(); // refused or nothing done: it is a hint
    }
}

#[test]
fn a_zeroed_byte_while_a_write_is_in_flight() {
    let mut rig = Rig::new(true);
    rig.write(3, b"!");
    assert_eq!(rig.refused(), 0);
    rig.write(0, b"QED");
    rig.submit(
        Io { kind: IoKind::Zero { unmap: false, fua: false }, offset: 3, len: 1 },
        Mem::None,
    );
    assert_eq!(rig.refused(), 1);
}
