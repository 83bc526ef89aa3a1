//! streamOptimized images: whole grains, each once; what is written reads back here and there, also
//! when the stream is opened again; reading in order inflates each grain once.

use std::path::Path;

use crate::common::{DISK, have_qemu, ok};
use cowbell_engine::event_loop::EventLoop;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Driver, Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::units::{Errno, NodeId};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::chain::open_whole_layer;
use cowbell_formats::check::Repair;
use cowbell_formats::map;
use cowbell_formats::vmdk::disk::descriptor::Kind;
use cowbell_formats::vmdk::rest::check::check;
use cowbell_formats::vmdk::rest::create::Wanted;
use cowbell_formats::{
    CreateOptions, Format, LayerMeta, Node, OpenOptions, RunOptions, attach, create, open,
};

const SIZE: u64 = (40 << 20) + 5 * 512;
const GRAIN: u64 = 64 << 10;

fn make(path: &Path) {
    let vmdk = Wanted { kind: Some(Kind::StreamOptimized), ..Wanted::default() };
    let options = CreateOptions { size: Some(SIZE), vmdk, ..CreateOptions::default() };
    create(&DISK, path, Format::Vmdk, &options).expect("it is made");
}

/// Contents that deflate well, badly, and not at all.
fn fill(bytes: &mut [u8], at: u64) {
    for (i, byte) in bytes.iter_mut().enumerate() {
        let place = at + i as u64;
        let noise = place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
        *byte = match place / GRAIN % 3 {
            0 => 7,
            1 => (place / 100) as u8,
            _ => noise as u8,
        };
    }
}

struct Rig {
    engine: Engine<Node, Aio>,
    disk: NodeId,
    events: EventLoop,
}

impl Rig {
    fn open(path: &Path) -> Rig {
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let chain = open(&DISK, path, &options).expect("it opens");
        let aio = Aio::new(AioOptions::default()).expect("a backend");
        let mut engine = Engine::new(aio, Limits::default());
        let disk = attach(&mut engine, chain, &RunOptions::default()).expect("it attaches");
        let events = EventLoop::new(engine.fd()).expect("an event loop");
        Rig { engine, disk, events }
    }

    fn one(&mut self, io: Io, mem: impl Into<Mem>) -> Result<Mem, Errno> {
        self.engine.submit(self.disk, io, mem, 0).expect("there is room");
        loop {
            let again = self.engine.run(clock()).again;
            if let Some(done) = self.engine.poll() {
                return done.result.map(|()| done.mem);
            }
            if !again {
                self.events.wait(None, clock()).expect("it waits");
            }
        }
    }

    fn write(&mut self, at: u64, len: u64) -> Result<(), Errno> {
        let mut buf = Buf::zeroed(len as usize);
        fill(&mut buf, at);
        self.one(Io::write(at, len), buf).map(|_| ())
    }

    fn read(&mut self, at: u64, len: u64) -> Vec<u8> {
        let mem = self.one(Io::read(at, len), Buf::zeroed(len as usize)).expect("it reads");
        mem.into_buf().expect("reads own a buffer").to_vec()
    }

    fn close(mut self) {
        self.engine.drain();
        while self.engine.drained().is_none() {
            if !self.engine.run(clock()).again && self.engine.drained().is_none() {
                self.events.wait(None, clock()).expect("it waits");
            }
        }
        assert_eq!(self.engine.drained(), Some(Ok(())));
        self.engine.assert_idle();
        self.engine.node(self.disk).assert_idle();
    }
}

fn expected(written: &[(u64, u64)]) -> Vec<u8> {
    let mut disk = vec![0; SIZE as usize];
    for &(at, len) in written {
        fill(&mut disk[at as usize..][..len as usize], at);
    }
    disk
}

fn assert_holds(path: &Path, want: &[u8]) {
    let chain = open(&DISK, path, &OpenOptions::default()).expect("it opens");
    let mut got = vec![1; want.len()];
    map::read(&chain, 0, &mut got).expect("it reads");
    assert!(got == want, "other contents");
    let layer = open_whole_layer(&DISK, path, &OpenOptions::default()).expect("it opens");
    let report = check(&layer, Repair::None).expect("it is checked");
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn what_is_written_is_there_also_after_opening_again() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = dir.path().join("d.vmdk");
    make(&path);
    assert_holds(&path, &expected(&[]));
    let last = SIZE - SIZE % GRAIN;
    let mut rig = Rig::open(&path);
    rig.write(0, 3 * GRAIN).expect("three grains");
    rig.write((32 << 20) - GRAIN, 4 * GRAIN).expect("under two tables");
    rig.write(last, SIZE - last).expect("the last grain is short");
    let mut written = vec![(0, 3 * GRAIN), ((32 << 20) - GRAIN, 4 * GRAIN), (last, SIZE - last)];
    let disk = expected(&written);
    assert_eq!(rig.read(0, 4 * GRAIN), disk[..4 * GRAIN as usize]);
    // A second write, parts of grains, zeros: a stream takes none of them.
    assert_eq!(rig.write(GRAIN, GRAIN), Err(Errno::IO));
    assert_eq!(rig.write(8 * GRAIN + 512, GRAIN), Err(Errno::INVALID));
    assert_eq!(rig.write(8 * GRAIN, GRAIN - 512), Err(Errno::INVALID));
    let zero = Io { kind: IoKind::Zero { unmap: false, fua: false }, offset: GRAIN, len: GRAIN };
    assert_eq!(rig.one(zero, Mem::None).map(|_| ()), Err(Errno::IO));
    rig.close();
    assert_holds(&path, &disk);

    let unwritten = std::fs::read(&path).expect("it is there");
    Rig::open(&path).close();
    assert!(std::fs::read(&path).expect("it is there") == unwritten, "nothing was asked for");

    let mut rig = Rig::open(&path);
    rig.write(10 * GRAIN, 20 * GRAIN).expect("more grains");
    written.push((10 * GRAIN, 20 * GRAIN));
    rig.one(Io::flush(), Mem::None).expect("a flush");
    rig.close();
    assert_holds(&path, &expected(&written));
    if have_qemu() {
        ok(dir.path(), "qemu-img check -f vmdk d.vmdk");
        ok(dir.path(), "qemu-img convert -f vmdk -O raw d.vmdk back");
        assert!(std::fs::read(dir.path().join("back")).expect("it is there") == expected(&written));
    }
}

#[test]
fn markers_lead_from_the_first_grain_to_the_end_in_the_disks_order() {
    use cowbell_formats::vmdk::disk::layout::{Marker, SECTOR};
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = dir.path().join("d.vmdk");
    make(&path);
    let mut rig = Rig::open(&path);
    rig.write(0, 16 << 20).expect("many grains at once");
    rig.close();
    let bytes = std::fs::read(&path).expect("it is there");
    let (mut at, mut next_lba, mut kinds) = (128 * SECTOR as usize, 0, Vec::new());
    loop {
        let marker = Marker::parse(&bytes[at..]).expect("a marker");
        at += match marker {
            Marker::Grain { lba, size } => {
                assert_eq!(lba, next_lba);
                next_lba += GRAIN / SECTOR;
                (size as usize + 12).next_multiple_of(SECTOR as usize)
            }
            other => {
                kinds.push(other);
                let sectors = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
                (SECTOR * (1 + sectors)) as usize
            }
        };
        if marker == Marker::EndOfStream {
            break;
        }
    }
    assert_eq!(at, bytes.len());
    assert_eq!(next_lba, (16 << 20) / SECTOR);
    let end = [Marker::Table, Marker::Directory, Marker::Footer, Marker::EndOfStream];
    assert_eq!(kinds, end);
}

#[test]
fn reading_in_order_inflates_each_grain_once() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = dir.path().join("d.vmdk");
    make(&path);
    let mut rig = Rig::open(&path);
    rig.write(0, 4 << 20).expect("64 grains");
    rig.close();
    let mut rig = Rig::open(&path);
    let disk = expected(&[(0, 4 << 20)]);
    for at in (0..4 << 20).step_by(4096) {
        assert_eq!(rig.read(at, 4096), disk[at as usize..][..4096]);
    }
    let label = Node::STATES.iter().position(|&name| name == "inflate").expect("it has a name");
    let vmdk = Node::STATES.iter().rposition(|&name| name == "inflate").unwrap_or(label);
    // Each grain: once read, once inflated.
    assert_eq!(rig.engine.stats().states[vmdk].visits, 2 * 64);
    rig.close();
}

#[test]
fn streams_of_qemu_go_on() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = dir.path().join("d.vmdk");
    ok(
        dir.path(),
        &format!("qemu-img create -q -f vmdk -o subformat=streamOptimized d.vmdk {SIZE}"),
    );
    let mut rig = Rig::open(&path);
    rig.write(0, 3 * GRAIN).expect("three grains");
    rig.write(35 << 20, 2 * GRAIN).expect("two");
    rig.close();
    let written = expected(&[(0, 3 * GRAIN), (35 << 20, 2 * GRAIN)]);
    assert_holds(&path, &written);
    ok(dir.path(), "qemu-img convert -f vmdk -O raw d.vmdk back");
    assert!(std::fs::read(dir.path().join("back")).expect("it is there") == written);
}

#[test]
fn a_bad_grain_fails_its_readers_and_nobody_else() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = dir.path().join("d.vmdk");
    make(&path);
    let mut rig = Rig::open(&path);
    rig.write(0, 3 * GRAIN).expect("three grains");
    rig.close();
    let good = std::fs::read(&path).expect("it is there");
    let grains = good.len() - 4 * 512 - 512;
    // The second grain's marker: behind header, descriptor, table and the first grain.
    let first = (128 + 5) * 512;
    let second = first
        + (u32::from_le_bytes(good[first + 8..first + 12].try_into().expect("4")) as usize + 12)
            .next_multiple_of(512);
    assert!(second < grains);
    for (at, value) in [(second, 1u8), (second + 8, 0), (second + 11, 0x7f), (second + 20, 0xff)] {
        let mut bad = good.clone();
        bad[at] ^= value.max(1);
        if at == second + 8 {
            bad[at..at + 4].fill(0);
        }
        std::fs::write(&path, &bad).expect("written");
        let mut rig = Rig::open(&path);
        assert_eq!(rig.read(0, GRAIN), expected(&[(0, GRAIN)])[..GRAIN as usize]);
        let read = rig.one(Io::read(GRAIN, 4096), Buf::zeroed(4096));
        assert_eq!(read.map(|_| ()), Err(Errno::INVALID), "byte {at}");
        rig.read(2 * GRAIN, GRAIN);
        rig.close();
        let layer = open_whole_layer(&DISK, &path, &OpenOptions::default()).expect("it opens");
        assert!(matches!(layer.meta, LayerMeta::Vmdk(_)));
        assert_eq!(check(&layer, Repair::None).expect("it is checked").corruptions, 1);
    }
}
