//! A node passes every kind of request on to the node below it: nothing is lost, errors come back, and
//! the node below settles last.

use cowbell_engine::backend::Backend;
use cowbell_engine::faulty::{Fault, Faulty, What};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::{Op, OpKind, Segs, Target};
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Step};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::{Create, DiskFile, DiskOptions};
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, FileId, NodeId, Time};
use cowbell_engine::{Engine, Finished, Limits, NodeEvent, Why};

const SIZE: u64 = 1 << 20;

/// A file, or a node over another that adds nothing, or one that does everything twice.
#[derive(Clone, Copy)]
enum Layer {
    File(FileId),
    Filter(NodeId),
    Twice([NodeId; 2]),
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
    fn below(&self) -> &[NodeId] {
        match self {
            Layer::File(_) => &[],
            Layer::Filter(below) => std::slice::from_ref(below),
            Layer::Twice(below) => below,
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
            IoKind::Write { fua, .. } => OpKind::Write { fua },
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
            Layer::Filter(below) | Layer::Twice([below, _]) => Target::Node(below),
        };
        if let Layer::Twice([_, other]) = self
            && kind != OpKind::Read
        {
            let target = Target::Node(other);
            cx.issue(Op { kind, target, offset, len, segs });
        }
        cx.issue(Op { kind, target, offset, len, segs });
        Step::Last { label: 0 }
    }
}

fn event(engine: &mut Engine<Layer, impl Backend>) -> NodeEvent {
    loop {
        engine.run(clock());
        if let Some(event) = engine.poll_event() {
            return event;
        }
    }
}

fn done(engine: &mut Engine<Layer, impl Backend>) -> Finished {
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
            let kind = IoKind::Write { fua: byte == 2, compressed: false };
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
        assert_eq!(event(&mut engine), NodeEvent::Closed { node: top, result: Ok(()) });
        assert!(!engine.has(disk));
        engine.assert_idle();
        drop(engine);
        let found = std::fs::read(&path).expect("the file");
        assert!(found[..kept] == model[..kept], "direct: {direct}");
        model[kept..].copy_from_slice(&found[kept..]);
    }
}

/// Two files of zeros in an engine, and a node that writes both.
fn two(dir: &std::path::Path) -> (Engine<Layer, Faulty<Inline>>, [NodeId; 2], [FileId; 2]) {
    let mut engine = Engine::new(Faulty::new(Inline::new()), Limits::default());
    let mut files = [FileId(0); 2];
    let disks = [0, 1].map(|which| {
        let path = dir.join(format!("disk{which}"));
        std::fs::write(&path, vec![0; SIZE as usize]).expect("a scratch file");
        let options = DiskOptions { write: true, create: Create::No, ..DiskOptions::default() };
        let file = DiskFile::open(&path, &options).expect("it opens");
        let (file, _) = engine.attach(file).expect("it attaches");
        files[which] = file;
        engine.add(Layer::File(file))
    });
    (engine, disks, files)
}

fn write_and_flush(engine: &mut Engine<Layer, Faulty<Inline>>, top: NodeId, byte: u8) {
    for (io, mem) in
        [(Io::write(4096, 512), Mem::from(Buf::copied(&[byte; 512]))), (Io::flush(), Mem::None)]
    {
        engine.submit(top, io, mem, 0).expect("room");
        assert_eq!(done(engine).result, Ok(()));
    }
}

fn read_from(engine: &mut Engine<Layer, Faulty<Inline>>, node: NodeId) -> u8 {
    engine.submit(node, Io::read(4096, 512), Buf::zeroed(512), 0).expect("room");
    let read = done(engine);
    assert_eq!(read.result, Ok(()));
    read.mem.into_buf().expect("it was lent")[0]
}

#[test]
fn to_two_nodes_below_which_go_with_it() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a scratch directory");
    let (mut engine, disks, _) = two(dir.path());
    let top = engine.add(Layer::Twice(disks));
    write_and_flush(&mut engine, top, 7);
    assert_eq!(disks.map(|disk| engine.close(disk)), [Err(Why::InUse); 2]);
    engine.close(top).expect("nobody is above it");
    assert_eq!(event(&mut engine), NodeEvent::Closed { node: top, result: Ok(()) });
    assert!(disks.iter().all(|&disk| !engine.has(disk)), "both are gone when it is told");
    assert_eq!(engine.take_files(top).len(), 2);
    assert_eq!(engine.poll_event(), None);
    engine.assert_idle();
    for which in [0, 1] {
        let found = std::fs::read(dir.path().join(format!("disk{which}"))).expect("the file");
        assert!(found[4096..4608].iter().all(|&byte| byte == 7));
    }
}

#[test]
fn to_two_nodes_below_of_which_another_uses_one() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a scratch directory");
    let (mut engine, disks, _) = two(dir.path());
    let top = engine.add(Layer::Twice(disks));
    let other = engine.add(Layer::Filter(disks[1]));
    engine.close(top).expect("nobody is above it");
    assert_eq!(event(&mut engine), NodeEvent::Closed { node: top, result: Ok(()) });
    assert_eq!(disks.map(|disk| engine.has(disk)), [false, true]);
    assert_eq!(read_from(&mut engine, other), 0);
}

#[test]
fn a_filter_goes_and_what_is_below_it_stays() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a scratch directory");
    let (mut engine, disks, _) = two(dir.path());
    for byte in [1, 2, 3] {
        let top = engine.add(Layer::Twice(disks));
        write_and_flush(&mut engine, top, byte);
        engine.close_filter(top).expect("nobody is above it");
        assert_eq!(event(&mut engine), NodeEvent::Closed { node: top, result: Ok(()) });
        assert!(!engine.has(top) && engine.take_files(top).is_empty());
        assert_eq!(disks.map(|disk| read_from(&mut engine, disk)), [byte; 2]);
    }
    // Each is a disk by itself again.
    for disk in disks {
        engine.close(disk).expect("nobody is above it");
        assert_eq!(event(&mut engine), NodeEvent::Closed { node: disk, result: Ok(()) });
    }
    engine.assert_idle();
}

#[test]
fn an_error_of_either_is_told_when_both_have_gone() {
    for bad in [0, 1] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a scratch directory");
        let (mut engine, disks, files) = two(dir.path());
        let top = engine.add(Layer::Twice(disks));
        write_and_flush(&mut engine, top, 9);
        engine.submit(top, Io::write(0, 512), Buf::copied(&[4; 512]), 0).expect("room");
        assert_eq!(done(&mut engine).result, Ok(()));
        let fault = Fault { what: Some(What::Flush), file: Some(files[bad]), ..Fault::default() };
        engine.backend_mut().plan_mut().push(fault);
        engine.close(top).expect("nobody is above it");
        assert_eq!(event(&mut engine), NodeEvent::Closed { node: top, result: Err(Errno::IO) });
        assert!(disks.iter().all(|&disk| !engine.has(disk)));
    }
}

/// Runs until `node` is said to be still.
fn is_still(engine: &mut Engine<Layer, Faulty<Inline>>, node: NodeId) {
    engine.run(clock());
    assert_eq!(event(engine), NodeEvent::Paused { node });
}

#[test]
fn what_others_read_from_is_not_paused_before_they_are() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut engine, [below, other], _) = two(dir.path());
    let top = engine.add(Layer::Filter(below));
    assert_eq!(engine.pause(below), Err(Why::InUse));
    assert_eq!(engine.pause(other), Ok(()), "nobody reads from it");
    is_still(&mut engine, other);
    assert!(!engine.may_be_read_from(other));
    assert_eq!(engine.pause(top), Ok(()));
    is_still(&mut engine, top);
    assert_eq!(engine.pause(below), Ok(()));
    is_still(&mut engine, below);
    assert_eq!(engine.resume(top), Err(Why::InUse), "what it reads from is to be still");
    assert_eq!(engine.resume(below), Ok(()));
    assert_eq!(engine.resume(top), Ok(()));
    write_and_flush(&mut engine, top, 3);
    assert_eq!(read_from(&mut engine, top), 3);
}

/// There are 2^40 ways down, and forty nodes.
#[test]
fn each_layer_is_looked_at_once_however_many_ways_lead_there() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut engine, [below, other], _) = two(dir.path());
    let mut pair = [below, other];
    for _ in 0..40 {
        let (a, b) = (engine.add(Layer::Twice(pair)), engine.add(Layer::Twice(pair)));
        pair = [a, b];
    }
    let top = engine.add(Layer::Twice(pair));
    assert_eq!(engine.pause(top), Ok(()));
    is_still(&mut engine, top);
    assert_eq!(engine.pause(below), Ok(()), "all that read from it are held");
    is_still(&mut engine, below);
    assert_eq!(engine.resume(below), Ok(()));
    assert_eq!(engine.resume(top), Ok(()));
    assert_eq!(engine.pause(below), Err(Why::InUse));
}

fn drained(engine: &mut Engine<Layer, Faulty<Inline>>) -> Result<(), Errno> {
    loop {
        engine.run(clock());
        if let Some(result) = engine.drained() {
            return result;
        }
    }
}

/// What is added to them, or closed, asks nothing of what a drain has left clean.
#[test]
fn of_nodes_that_are_drained() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut engine, [below, _], _) = two(dir.path());
    let first = engine.add(Layer::Filter(below));
    write_and_flush(&mut engine, first, 1);
    engine.drain();
    engine.run(clock());
    let meanwhile = engine.add(Layer::Filter(below));
    assert_eq!(drained(&mut engine), Ok(()));
    let afterwards = engine.add(Layer::Filter(below));
    for node in [first, meanwhile, afterwards] {
        engine.close_filter(node).expect("nobody is above it");
        assert_eq!(event(&mut engine), NodeEvent::Closed { node, result: Ok(()) });
    }
    assert_eq!(engine.drained(), Some(Ok(())));
    // A request opens all of them again.
    let top = engine.add(Layer::Filter(below));
    write_and_flush(&mut engine, top, 2);
    assert_eq!(engine.drained(), None);
    engine.close(top).expect("nobody is above it");
    assert_eq!(event(&mut engine), NodeEvent::Closed { node: top, result: Ok(()) });
    let found = std::fs::read(dir.path().join("disk0")).expect("the file");
    assert!(found[4096..4608].iter().all(|&byte| byte == 2));
}

/// What a drain says that is going on, or has ended, closing says, too: after a flush that failed nobody knows what is
/// stable.
#[test]
fn of_nodes_that_could_not_be_drained() {
    for waits in [true, false] {
        let dir = tempfile::tempdir().expect("a folder");
        let (mut engine, [below, _], files) = two(dir.path());
        let top = engine.add(Layer::Filter(below));
        engine.submit(top, Io::write(0, 512), Buf::copied(&[4; 512]), 0).expect("room");
        assert_eq!(done(&mut engine).result, Ok(()));
        let fault = Fault { what: Some(What::Flush), file: Some(files[0]), ..Fault::default() };
        engine.backend_mut().plan_mut().push(fault);
        engine.drain();
        if waits {
            assert_eq!(drained(&mut engine), Err(Errno::IO));
        }
        engine.close(top).expect("nobody is above it");
        assert_eq!(event(&mut engine), NodeEvent::Closed { node: top, result: Err(Errno::IO) });
    }
}
