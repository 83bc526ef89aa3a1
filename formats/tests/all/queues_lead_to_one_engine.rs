//! Each virtqueue on a thread of its own, all into one engine.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::units::{Errno, NodeId};
use cowbell_engine::{Engine, Limits, Queues, Submitter, Why};
use cowbell_formats::{Format, Node};

use crate::common::drive::{add, drain, folder, is_any_readable, make, settle};
use crate::common::shadow::Rng;

const BLOCK: u64 = 4096;
/// Blocks of each queue.
const BLOCKS: u64 = 64;
const QUEUES: u64 = 4;
const DEPTH: usize = 16;

/// A guest's processor: writes and reads blocks of its own, each one request at a time, and looks at all bytes.
fn guest(mut queue: Submitter, disk: NodeId, number: u64, rounds: usize) {
    let mut rng = Rng(number + 1);
    let mut shadow = [0_u8; BLOCKS as usize];
    let mut busy = [false; BLOCKS as usize];
    let (mut begun, mut ended) = (0, 0);
    while ended < rounds {
        while begun < rounds && queue.outstanding() < DEPTH {
            let block = rng.below(BLOCKS) as usize;
            if std::mem::replace(&mut busy[block], true) {
                break;
            }
            let offset = (number * BLOCKS + block as u64) * BLOCK;
            let (io, mem) = if rng.below(2) == 0 {
                shadow[block] = rng.below(256) as u8;
                (Io::write(offset, BLOCK), Buf::copied(&[shadow[block]; BLOCK as usize]))
            } else {
                (Io::read(offset, BLOCK), Buf::zeroed(BLOCK as usize))
            };
            queue.submit(disk, io, mem, block as u64).expect("there is room");
            begun += 1;
        }
        match queue.poll() {
            Some(done) => {
                assert_eq!(done.result, Ok(()));
                let block = done.tag as usize;
                let buf = done.mem.into_buf().expect("its buffer");
                assert!(buf.iter().all(|&byte| byte == shadow[block]), "queue {number}");
                busy[block] = false;
                ended += 1;
            }
            None => assert!(is_any_readable(&[&queue.fd()], 20_000), "an answer is lost"),
        }
    }
    assert!(queue.poll().is_none() && queue.outstanding() == 0);
}

#[test]
fn every_queue_gets_its_answers_and_no_other_s() {
    for format in [Format::Raw, Format::Qcow2] {
        let folder = folder();
        let path = folder.path().join("disk");
        make(&path, format, QUEUES * BLOCKS * BLOCK);
        let backend = Aio::new(AioOptions::default()).expect("native AIO");
        // Fewer places than the queues have together.
        let mut engine = Engine::new(backend, Limits { requests: 8, ..Limits::default() });
        let disk = add(&mut engine, &path, format, true);
        let mut queues = Queues::new().expect("a descriptor");
        let running = AtomicUsize::new(QUEUES as usize);
        std::thread::scope(|scope| {
            for number in 0..QUEUES {
                let queue = queues.add(DEPTH).expect("a descriptor");
                let running = &running;
                scope.spawn(move || {
                    guest(queue, disk, number, 2000);
                    running.fetch_sub(1, Ordering::Relaxed);
                });
            }
            let mut more = false;
            while running.load(Ordering::Relaxed) > 0 {
                if !more {
                    let fd = engine.fd().expect("it has one");
                    is_any_readable(&[&fd, &queues.fd()], 50);
                }
                queues.take_in(|node, io, mem, tag| engine.submit(node, io, mem, tag));
                more = engine.run(clock()).again;
                while let Some(done) = engine.poll() {
                    assert!(queues.hand_back(done).is_none(), "it is a queue's");
                    more = true;
                }
            }
        });
        assert_eq!(queues.in_flight(), 0);
        drain(&mut engine);
    }
}

fn rig() -> (Engine<Node, Aio>, NodeId, tempfile::TempDir) {
    let folder = folder();
    let path = folder.path().join("disk");
    make(&path, Format::Raw, 1 << 20);
    let mut engine =
        Engine::new(Aio::new(AioOptions::default()).expect("native AIO"), Limits::default());
    let disk = add(&mut engine, &path, Format::Raw, false);
    (engine, disk, folder)
}

#[test]
fn what_is_refused_is_told_and_what_may_wait_waits() {
    let (mut engine, disk, _folder) = rig();
    let mut queues = Queues::new().expect("a descriptor");
    let (mut one, mut two) =
        (queues.add(2).expect("a descriptor"), queues.add(0).expect("a descriptor"));
    for tag in 0..2 {
        one.submit(disk, Io::flush(), Mem::None, tag).expect("there is room");
    }
    let refused = one.submit(disk, Io::flush(), Mem::None, 2);
    assert_eq!(refused.map_err(|refused| refused.why), Err(Why::Full));
    two.submit(disk, Io::read(0, BLOCK), Buf::zeroed(BLOCK as usize), 7).expect("one at least");

    // Paused: it stays. Then it goes on.
    engine.pause(disk).expect("it can be paused");
    assert!(queues.take_in(|node, io, mem, tag| engine.submit(node, io, mem, tag)));
    assert_eq!((queues.in_flight(), engine.in_flight()), (0, 0));
    engine.resume(disk).expect("it was paused");
    assert!(!queues.take_in(|node, io, mem, tag| engine.submit(node, io, mem, tag)));
    assert_eq!(queues.in_flight(), 3);
    for done in settle(&mut engine) {
        assert!(queues.hand_back(done).is_none());
    }
    let tags: Vec<u64> = std::iter::from_fn(|| one.poll()).map(|done| done.tag).collect();
    assert_eq!((tags.len(), tags.contains(&0), tags.contains(&1)), (2, true, true));
    assert!(two.poll().is_some_and(|done| done.tag == 7 && done.mem.len() as u64 == BLOCK));

    // The embedder's own stay his.
    engine.submit(disk, Io::flush(), Mem::None, 5).expect("room");
    let own = settle(&mut engine).remove(0);
    assert_eq!(queues.hand_back(own).map(|done| done.tag), Some(5));

    // Closed: it fails.
    drain(&mut engine);
    engine.close(disk).expect("it is there");
    one.submit(disk, Io::write(0, 512), Buf::zeroed(512), 9).expect("room");
    queues.take_in(|node, io, mem, tag| engine.submit(node, io, mem, tag));
    let done = one.poll().expect("it has ended");
    assert_eq!((done.tag, done.result, done.mem.len()), (9, Err(Errno::SHUT_DOWN), 512));
    drop(queues);
    assert!(one.submit(disk, Io::flush(), Mem::None, 0).is_err(), "the engine's end is gone");
}

#[test]
fn who_goes_is_forgotten_when_his_requests_have_ended() {
    let (mut engine, disk, _folder) = rig();
    let mut queues = Queues::new().expect("a descriptor");
    let has_gone = AtomicBool::new(false);
    let mut gone = queues.add(8).expect("a descriptor");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            gone.submit(disk, Io::write(0, 512), Buf::copied(&[3; 512]), 1).expect("room");
            gone.submit(disk, Io::flush(), Mem::None, 2).expect("room");
            drop(gone);
            has_gone.store(true, Ordering::Release);
        });
    });
    assert!(has_gone.load(Ordering::Acquire));
    queues.take_in(|node, io, mem, tag| engine.submit(node, io, mem, tag));
    assert_eq!(queues.in_flight(), 2);
    // Somebody else comes meanwhile, and gets nothing of it.
    let mut next = queues.add(1).expect("a descriptor");
    for done in settle(&mut engine) {
        assert!(queues.hand_back(done).is_none());
    }
    assert_eq!(queues.in_flight(), 0);
    assert!(next.poll().is_none());
    next.submit(disk, Io::read(0, 512), Buf::zeroed(512), 3).expect("room");
    queues.take_in(|node, io, mem, tag| engine.submit(node, io, mem, tag));
    for done in settle(&mut engine) {
        assert!(queues.hand_back(done).is_none());
    }
    let buf = next.poll().and_then(|done| done.mem.into_buf()).expect("its buffer");
    assert!(buf.iter().all(|&byte| byte == 3), "what was asked by who has gone was done");
    drain(&mut engine);
}
