//! A node passes every kind of request on to the node below it: nothing is lost, errors come back, and
//! the node below settles last.

use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::{Op, OpKind, Segs, Target};
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Step};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::{Create, DiskFile, DiskOptions};
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, FileId, NodeId, Time};
use cowbell_engine::{Engine, Finished, Limits, NodeEvent, Why};

const SIZE: u64 = 1 << 20;

/// A file, or a node over another that adds nothing.
#[derive(Clone, Copy)]
enum Layer {
    File(FileId),
    Filter(NodeId),
}

impl Driver for Layer {
    type State = ();
    const STATES: &'static [&'static str] = &["op"];
    fn label(_: &()) -> usize {
        0
    }
    fn size(&self) -> u64 {
        SIZE
    }
    fn uses(&self, file: FileId) -> bool {
        matches!(self, Layer::File(its) if *its == file)
    }
    fn below(&self) -> Option<NodeId> {
        match *self {
            Layer::File(_) => None,
            Layer::Filter(below) => Some(below),
        }
    }
    fn deadline(&self) -> Option<Time> {
        None
    }
    fn chore(&mut self, chore: Chore) -> Option<()> {
        (chore == Chore::Settle).then_some(())
    }
    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<()> {
        let io = cx.io();
        let kind = match io.kind {
            IoKind::Read => OpKind::Read,
            IoKind::Write { fua } => OpKind::Write { fua },
            IoKind::Flush => OpKind::Flush,
            IoKind::Zero { unmap, .. } => OpKind::Zero { unmap },
            IoKind::Discard => OpKind::Discard,
            _ => return Step::Done(Err(Errno::NOT_SUPPORTED)),
        };
        let segs = if kind.has_memory() { Segs::one(cx.guest(0, io.len)) } else { Segs::none() };
        self.issue(kind, io.offset, io.len, segs, cx)
    }
    fn step(&mut self, _: (), event: Event, cx: &mut Cx<'_>) -> Step<()> {
        assert_eq!(event, Event::Start, "only a chore waits in a state");
        self.issue(OpKind::Flush, 0, 0, Segs::none(), cx)
    }
}

impl Layer {
    fn issue(self, kind: OpKind, offset: u64, len: u64, segs: Segs, cx: &mut Cx<'_>) -> Step<()> {
        let target = match self {
            Layer::File(file) => Target::File(file),
            Layer::Filter(below) => Target::Node(below),
        };
        cx.issue(Op { kind, target, offset, len, segs });
        Step::Last { label: 0 }
    }
}

fn done(engine: &mut Engine<Layer, Inline>) -> Finished {
    loop {
        engine.run(clock());
        if let Some(done) = engine.poll() {
            return done;
        }
    }
}

#[test]
fn through_three_of_them() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a scratch directory");
    let path = dir.path().join("disk");
    let mut model: Vec<u8> = (0..SIZE).map(|at| (at % 251) as u8).collect();
    std::fs::write(&path, &model).expect("a scratch file");
    for direct in [false, true] {
        let options =
            DiskOptions { write: true, direct, create: Create::No, ..DiskOptions::default() };
        let file = DiskFile::open(&path, &options).expect("it opens");
        let least = Limits {
            requests: 1,
            ops: 4,
            buffers: 2,
            bounce_buffers: 1,
            buffer_size: 4096,
            ..Limits::default()
        };
        let mut engine = Engine::new(Inline::new(), least);
        let (file, _) = engine.attach(file).expect("it attaches");
        let disk = engine.add(Layer::File(file));
        let mut top = disk;
        for _ in 0..3 {
            top = engine.add(Layer::Filter(top));
        }
        let (at, len) = (5_001, 9_000);
        let range = at as usize..(at + len) as usize;
        for byte in [1, 2] {
            let kind = IoKind::Write { fua: byte == 2 };
            let mem = Buf::copied(&[byte; 9_000]);
            engine.submit(top, Io { kind, offset: at, len }, mem, 0).expect("room");
            assert_eq!(done(&mut engine).result, Ok(()));
            model[range.clone()].fill(byte);
        }
        for (kind, from, to) in [
            (IoKind::Zero { unmap: false, fua: false }, 6_000, 7_000),
            (IoKind::Zero { unmap: true, fua: false }, 100_000, 300_000),
            (IoKind::Flush, 0, 0),
        ] {
            let io = Io { kind, offset: from, len: to - from };
            engine.submit(top, io, Mem::None, 0).expect("room");
            assert_eq!(done(&mut engine).result, Ok(()));
            model[from as usize..to as usize].fill(0);
        }
        // What is said of these nobody relies on.
        let discard = Io { kind: IoKind::Discard, offset: SIZE - 8192, len: 8192 };
        engine.submit(top, discard, Mem::None, 0).expect("room");
        assert_eq!(done(&mut engine).result, Ok(()));
        engine.submit(top, Io::read(0, SIZE), Buf::zeroed(SIZE as usize), 0).expect("room");
        let read = done(&mut engine);
        assert_eq!(read.result, Ok(()));
        let read = read.mem.into_buf().expect("it was lent");
        let kept = SIZE as usize - 8192;
        assert!(read[..kept] == model[..kept], "direct: {direct}");
        // An error of the lowest is that of all.
        let status = Io::status(0, SIZE);
        engine.submit(top, status, Buf::zeroed(32), 0).expect("room");
        assert_eq!(done(&mut engine).result, Err(Errno::NOT_SUPPORTED));
        assert_eq!(engine.close(disk), Err(Why::InUse));
        engine.close(top).expect("nobody is above it");
        let closed = loop {
            engine.run(clock());
            if let Some(event) = engine.poll_event() {
                break event;
            }
        };
        assert_eq!(closed, NodeEvent::Closed { node: top, result: Ok(()) });
        assert!(!engine.has(disk));
        engine.assert_idle();
        drop(engine);
        let found = std::fs::read(&path).expect("the file");
        assert!(found[..kept] == model[..kept], "direct: {direct}");
        model[kept..].copy_from_slice(&found[kept..]);
    }
}
