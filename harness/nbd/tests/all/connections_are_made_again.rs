//! A connection that is lost at any moment is made again, and nothing is missing; or it is not, and all
//! that is in flight fails.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cowbell_engine::both::Either;
use cowbell_engine::event_loop::EventLoop;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::{Op, OpKind, Segs, Target};
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Step};
use cowbell_engine::store::Store;
use cowbell_engine::sys::clock;
use cowbell_engine::units::{Errno, FileId, NodeId, Time};
use cowbell_engine::{Engine, Limits};
use cowbell_nbd::{Address, RemoteFile, RemoteOptions};

use crate::remote_files_keep_the_contract::{Beside, beside};
use crate::serving::{Qemu, Server};
use crate::side::Random;

/// The file is the disk.
pub struct Through {
    file: FileId,
    size: u64,
}

impl Driver for Through {
    type State = ();
    const STATES: &'static [&'static str] = &["op"];
    fn label(_: &()) -> usize {
        0
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn uses(&self, file: FileId) -> bool {
        file == self.file
    }
    fn deadline(&self) -> Option<Time> {
        None
    }
    fn chore(&mut self, _: Chore) -> Option<()> {
        None
    }
    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<()> {
        let io = cx.io();
        let op = match io.kind {
            IoKind::Read => {
                Op::read(Target::File(self.file), io.offset, Segs::one(cx.guest(0, io.len)))
            }
            IoKind::Write { fua, .. } => {
                let op = Op::write(self.file, io.offset, Segs::one(cx.guest(0, io.len)));
                Op { kind: OpKind::Write { fua }, ..op }
            }
            IoKind::Flush => Op::flush(self.file),
            IoKind::Zero { unmap, .. } => {
                Op::bare(OpKind::Zero { unmap }, self.file, io.offset, io.len)
            }
            _ => return Step::Done(Err(Errno::NOT_SUPPORTED)),
        };
        cx.issue(op);
        Step::Last { label: 0 }
    }
    fn step(&mut self, _: (), event: Event, _: &mut Cx<'_>) -> Step<()> {
        unreachable!("{event:?}: no request waits in a state")
    }
}

/// An engine with one remote disk, and a loop.
pub struct Host<D: Driver = Through> {
    pub engine: Engine<D, Beside>,
    file: Option<FileId>,
    pub node: NodeId,
    events: EventLoop,
}

impl Host {
    pub fn new(address: Address, reconnect: Duration) -> Host {
        let options = RemoteOptions { reconnect, ..RemoteOptions::default() };
        let file = RemoteFile::open(address, options).expect("it opens");
        let size = file.info().len;
        let limits = Limits { requests: 64, ..Limits::default() };
        let mut engine = Engine::new(beside(), limits);
        let (file, _) = engine.attach(Either::Second(file)).expect("it attaches");
        let node = engine.add(Through { file, size });
        Host { file: Some(file), ..Host::of(engine, node) }
    }
}

impl<D: Driver> Host<D> {
    pub fn of(engine: Engine<D, Beside>, node: NodeId) -> Host<D> {
        let events = EventLoop::new(engine.fd()).expect("a loop");
        Host { engine, file: None, node, events }
    }

    fn trouble(&self) -> Option<&str> {
        self.file.and_then(|file| self.engine.backend().second().trouble(file))
    }

    /// Once around the loop; what has ended, by tag.
    pub fn turn(&mut self, done: &mut Vec<(u64, Result<(), Errno>, Mem)>) {
        let before = done.len();
        let more = self.engine.run(clock()).again;
        while let Some(one) = self.engine.poll() {
            done.push((one.tag, one.result, one.mem));
        }
        if !more && done.len() == before && self.engine.drained().is_none() {
            let limit = clock().plus_ms(20_000);
            let until = self.engine.next_deadline().map_or(limit, |due| due.min(limit));
            self.events.wait(Some(until), clock()).expect("it waits");
            assert!(clock() < limit, "nothing has happened for 20 seconds");
        }
    }
}

/// Bytes of a request.
pub const BLOCK: u64 = 4096;
pub const BLOCKS: u64 = 64;

/// Reads, writes, zeros and flushes of one to eight blocks, no two in flight at one place, while `disturb` does what it likes;
/// all of them end well. Answers what the disk is then.
pub fn work<D: Driver>(
    host: &mut Host<D>,
    block: u64,
    rounds: u64,
    mut disturb: impl FnMut(u64),
) -> Vec<u8> {
    let mut model = vec![0; (BLOCK * BLOCKS) as usize];
    let mut random = Random(11);
    let mut busy: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    let mut done = Vec::new();
    let mut tag = 0;
    while tag < rounds || !busy.is_empty() {
        while tag < rounds && busy.len() < 12 {
            let len = 1 + random.below(8);
            let start = random.below(BLOCKS - len);
            if busy.values().any(|&(from, to)| start < to && from < start + len) {
                break;
            }
            tag += 1;
            disturb(tag);
            let (offset, bytes) = (start * block, len * block);
            let range = offset as usize..(offset + bytes) as usize;
            let mut mem = Buf::zeroed(bytes as usize);
            let io = match random.below(8) {
                0 => Io::flush(),
                1 => {
                    model[range].fill(0);
                    Io::zero(offset, bytes, true)
                }
                2 | 3 => Io::read(offset, bytes),
                _ => {
                    mem.iter_mut()
                        .enumerate()
                        .for_each(|(at, byte)| *byte = (at as u64 % 251 + tag) as u8);
                    model[range].copy_from_slice(&mem);
                    Io::write(offset, bytes)
                }
            };
            let has_mem = matches!(io.kind, IoKind::Read | IoKind::Write { .. });
            let mem = if has_mem { mem.into() } else { Mem::default() };
            busy.insert(tag, (start, start + len));
            assert!(host.engine.submit(host.node, io, mem, tag).is_ok());
        }
        host.turn(&mut done);
        for (tag, result, mem) in done.drain(..) {
            let (start, end) = busy.remove(&tag).expect("it ends once");
            assert_eq!(result, Ok(()), "{:?}", host.trouble());
            if let Some(mem) = mem.into_buf() {
                // What was read or written: the disk has it at this moment.
                let range = (start * block) as usize..(end * block) as usize;
                assert!(*mem == model[range], "request {tag}");
            }
        }
    }
    model
}

#[test]
fn connections_cut_at_any_byte() {
    for (life, block, cuts) in
        [(700, 16, 20), (3000, 200, 20), (70_000, BLOCK, 20), (200_000, BLOCK, 4)]
    {
        let server = Server::new(&vec![0; (BLOCK * BLOCKS) as usize]);
        server.shared.short_lived.store(life, Ordering::SeqCst);
        let mut host = Host::new(server.address(), Duration::from_secs(60));
        let model = work(&mut host, block, 400, |_| {});
        assert!(server.contents() == model, "with {life} bytes a connection");
        let connections = server.shared.connections.load(Ordering::SeqCst);
        assert!(connections > cuts, "{connections} connections of {life} bytes");
    }
}

/// More than one harvest receives, and more than a socket has room for.
#[test]
fn a_lot_at_once() {
    const LEN: u64 = 1 << 20;
    let contents: Vec<u8> = (0..64 * LEN).map(|at| (at / 4096 % 251) as u8).collect();
    let server = Server::new(&contents);
    let mut host = Host::new(server.address(), Duration::ZERO);
    let mut done = Vec::new();
    for is_write in [false, true] {
        for tag in 0..64 {
            let offset = tag * LEN;
            let range = offset as usize..(offset + LEN) as usize;
            let (io, mem) = match is_write {
                true => (Io::write(offset, LEN), {
                    let inverted: Vec<u8> = contents[range].iter().map(|byte| !byte).collect();
                    Buf::copied(&inverted)
                }),
                false => (Io::read(offset, LEN), Buf::zeroed(LEN as usize)),
            };
            assert!(host.engine.submit(host.node, io, mem, tag).is_ok());
        }
        while done.len() < 64 {
            host.turn(&mut done);
        }
        for (tag, result, mem) in done.drain(..) {
            assert_eq!(result, Ok(()));
            let range = (tag * LEN) as usize..((tag + 1) * LEN) as usize;
            let mem = mem.into_buf().expect("it is ours");
            assert!(is_write || *mem == contents[range], "request {tag}");
        }
    }
    assert!(server.contents().iter().zip(&contents).all(|(now, before)| *now == !before));
}

#[test]
fn a_server_of_qemu_that_is_killed_and_started_again() {
    let Some(mut qemu) = Qemu::new(&vec![0; (BLOCK * BLOCKS) as usize], &[]) else { return };
    let mut host = Host::new(qemu.address(), Duration::from_secs(60));
    let model = work(&mut host, BLOCK, 600, |tag| {
        if tag % 100 == 50 {
            qemu.restart();
        }
    });
    drop(host);
    assert!(qemu.contents() == model);
}

#[test]
fn a_deadline_that_is_over() {
    let server = Server::new(&vec![0; (BLOCK * BLOCKS) as usize]);
    let mut host = Host::new(server.address(), Duration::from_millis(200));
    let mut done = Vec::new();
    let mut ask = |host: &mut Host, tag| {
        let mem = Mem::from(Buf::zeroed(BLOCK as usize));
        assert!(host.engine.submit(host.node, Io::read(0, BLOCK), mem, tag).is_ok());
        while done.is_empty() {
            host.turn(&mut done);
        }
        done.pop().expect("it has ended").1
    };
    assert_eq!(ask(&mut host, 1), Ok(()));
    server.shared.is_closed.store(true, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(100));
    // What comes while it is away waits so long, and no longer; what comes later does not wait.
    let before = clock();
    assert_eq!(ask(&mut host, 2), Err(Errno::IO));
    let waited = clock().since(before) / 1_000_000;
    assert!((100..5000).contains(&waited), "{waited} ms");
    let before = clock();
    for tag in 3..20 {
        assert_eq!(ask(&mut host, tag), Err(Errno::IO));
    }
    assert!(clock().since(before) / 1_000_000 < 1000);
    assert!(host.trouble().is_some());
    // It is back.
    server.shared.is_closed.store(false, Ordering::SeqCst);
    let limit = clock().plus_ms(20_000);
    while ask(&mut host, 30).is_err() {
        assert!(clock() < limit, "it does not find the server");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn without_reconnecting_all_fails_at_once_and_for_ever() {
    let server = Server::new(&vec![0; (BLOCK * BLOCKS) as usize]);
    let mut host = Host::new(server.address(), Duration::ZERO);
    server.shared.is_closed.store(true, Ordering::SeqCst);
    // Until it has noticed, too.
    let (mut done, mut tag) = (Vec::new(), 0);
    for round in 0..3 {
        for _ in 0..10 {
            let mem = Mem::from(Buf::zeroed(BLOCK as usize));
            assert!(host.engine.submit(host.node, Io::write(tag * BLOCK, BLOCK), mem, tag).is_ok());
            tag += 1;
        }
        while done.len() < 10 {
            host.turn(&mut done);
        }
        for (_, result, _) in done.drain(..) {
            assert!(round == 0 || result == Err(Errno::IO), "{result:?}");
        }
        server.shared.is_closed.store(round == 0, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(host.engine.next_deadline(), None, "nobody tries");
}

#[test]
fn another_disk_is_not_taken_for_the_one_that_was() {
    let Some(mut qemu) = Qemu::new(&vec![1; 1 << 20], &[]) else { return };
    let options =
        RemoteOptions { reconnect: Duration::from_millis(300), ..RemoteOptions::default() };
    let file = RemoteFile::open(qemu.address(), options).expect("it opens");
    let mut byte = [0];
    qemu.restart();
    file.read_at(5, &mut byte).expect("the same disk again");
    assert_eq!(byte, [1]);
    qemu.kill();
    qemu.grow(2 << 20);
    qemu.restart();
    file.read_at(5, &mut byte).expect_err("it is longer");
}
