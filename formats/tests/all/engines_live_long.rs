//! Two engines, four threads that submit, sixty-four disks that are attached and closed at random under load: nothing is
//! lost, and nothing is left.
//!
//! `COWBELL_SECONDS` is how long (3 if not said).

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::units::{Errno, NodeId};
use cowbell_engine::{Engine, Limits, NodeEvent, Queues, Submitter};
use cowbell_formats::{Format, Node};

use crate::common::drive::{add, check, folder, is_any_readable, make};
use crate::common::shadow::Rng;

const DISKS: usize = 64;
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 32;
const FORMATS: [Format; 5] = [Format::Raw, Format::Qed, Format::Qcow2, Format::Vmdk, Format::Vdi];

/// A disk that one thread at a time has.
struct Disk {
    path: PathBuf,
    format: Format,
    shadow: [u8; BLOCKS as usize],
}

/// What an engine's thread is asked for, and its answer.
enum Ask {
    Attach(PathBuf, Format, Sender<NodeId>),
    Close(NodeId, Sender<()>),
}

/// An engine's thread.
fn serve(mut queues: Queues, asked: &Receiver<Ask>, is_over: &AtomicBool) {
    let backend = Aio::new(AioOptions::default()).expect("native AIO");
    let mut engine: Engine<Node, Aio> =
        Engine::new(backend, Limits { requests: 64, ..Limits::default() });
    let mut closing: Vec<(NodeId, Sender<()>)> = Vec::new();
    let mut more = false;
    while !is_over.load(Ordering::Acquire) {
        if !more {
            is_any_readable(&[&engine.fd().expect("it has one"), &queues.fd()], 2);
        }
        while let Ok(ask) = asked.try_recv() {
            match ask {
                Ask::Attach(path, format, answer) => {
                    answer.send(add(&mut engine, &path, format, true)).expect("it is awaited");
                }
                Ask::Close(disk, answer) => {
                    engine.close(disk).expect("it is open");
                    closing.push((disk, answer));
                }
            }
        }
        queues.take_in(|node, io, mem, tag| engine.submit(node, io, mem, tag));
        more = engine.run(clock()).again;
        while let Some(done) = engine.poll() {
            assert!(queues.hand_back(done).is_none());
            more = true;
        }
        while let Some(event) = engine.poll_event() {
            let NodeEvent::Closed { node, result } = event else { panic!("{event:?}") };
            assert_eq!(result, Ok(()));
            drop(engine.take_files(node));
            let at = closing.iter().position(|(disk, _)| *disk == node).expect("it was asked for");
            closing.swap_remove(at).1.send(()).expect("it is awaited");
        }
    }
    assert!(engine.is_idle());
    engine.assert_idle();
}

/// A thread that submits: takes a disk, attaches it to one of the engines, works on it, closes it.
fn work(
    number: u64,
    disks: &Mutex<Vec<Disk>>,
    engines: &[Sender<Ask>],
    mut queues: Vec<Submitter>,
    until: &AtomicBool,
) -> u64 {
    let mut rng = Rng(number);
    let mut lives = 0;
    while !until.load(Ordering::Relaxed) {
        let mut disk = {
            let mut disks = disks.lock().expect("nobody panics with it");
            let at = rng.below(disks.len() as u64) as usize;
            disks.swap_remove(at)
        };
        let which = rng.below(2) as usize;
        let (engine, queue) = (&engines[which], &mut queues[which]);
        let (answer, answered) = channel();
        engine.send(Ask::Attach(disk.path.clone(), disk.format, answer)).expect("it is there");
        let node = answered.recv().expect("it is attached");
        let mut left = 20 + rng.below(100);
        let mut busy = [false; BLOCKS as usize];
        while left > 0 || queue.outstanding() > 0 {
            let block = rng.below(BLOCKS) as usize;
            if left > 0 && queue.outstanding() < 8 && !busy[block] {
                let offset = block as u64 * BLOCK;
                let (io, mem) = match rng.below(4) {
                    0 | 1 => {
                        disk.shadow[block] = rng.below(256) as u8;
                        let bytes = Buf::copied(&[disk.shadow[block]; BLOCK as usize]);
                        (Io::write(offset, BLOCK), bytes.into())
                    }
                    2 => (Io::read(offset, BLOCK), Buf::zeroed(BLOCK as usize).into()),
                    _ => {
                        disk.shadow[block] = 0;
                        (Io::zero(offset, BLOCK, rng.below(2) == 0), Mem::None)
                    }
                };
                queue.submit(node, io, mem, block as u64).expect("room");
                (busy[block], left) = (true, left - 1);
            } else if let Some(done) = queue.poll() {
                assert_eq!(done.result, Ok::<(), Errno>(()));
                let block = done.tag as usize;
                if let Some(buf) = done.mem.into_buf() {
                    assert!(buf.iter().all(|&byte| byte == disk.shadow[block]), "{:?}", disk.path);
                }
                busy[block] = false;
            } else {
                is_any_readable(&[&queue.fd()], 20);
            }
        }
        let (closed, is_closed) = channel();
        engine.send(Ask::Close(node, closed)).expect("it is there");
        is_closed.recv().expect("it is closed");
        lives += 1;
        disks.lock().expect("nobody panics with it").push(disk);
    }
    lives
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("Linux tells").count()
}

#[test]
fn and_their_disks_come_and_go() {
    let seconds =
        std::env::var("COWBELL_SECONDS").map_or(3, |text| text.parse().expect("a number"));
    let folder = folder();
    let before = descriptors();
    let disks: Vec<Disk> = (0..DISKS)
        .map(|number| {
            let (path, format) = (folder.path().join(format!("{number}")), FORMATS[number % 5]);
            make(&path, format, BLOCKS * BLOCK);
            Disk { path, format, shadow: [0; BLOCKS as usize] }
        })
        .collect();
    let disks = Mutex::new(disks);
    let (until, is_over) = (AtomicBool::new(false), Arc::new(AtomicBool::new(false)));
    let mut ends: Vec<Queues> = (0..2).map(|_| Queues::new().expect("a descriptor")).collect();
    let lives = std::thread::scope(|scope| {
        let submitters: Vec<Vec<Submitter>> = (0..4)
            .map(|_| ends.iter_mut().map(|end| end.add(16).expect("a descriptor")).collect())
            .collect();
        let (engines, asked): (Vec<_>, Vec<_>) = (0..2).map(|_| channel()).unzip();
        let servers: Vec<_> = ends
            .drain(..)
            .zip(asked)
            .map(|(queues, asked)| {
                let is_over = Arc::clone(&is_over);
                scope.spawn(move || serve(queues, &asked, &is_over))
            })
            .collect();
        let workers: Vec<_> = submitters
            .into_iter()
            .enumerate()
            .map(|(number, queues)| {
                let (disks, engines, until) = (&disks, engines.clone(), &until);
                scope.spawn(move || work(number as u64, disks, &engines, queues, until))
            })
            .collect();
        std::thread::sleep(std::time::Duration::from_secs(seconds));
        until.store(true, Ordering::Relaxed);
        let lives =
            workers.into_iter().map(|worker| worker.join().expect("it ends well")).sum::<u64>();
        is_over.store(true, Ordering::Release);
        servers.into_iter().for_each(|server| server.join().expect("it ends well"));
        lives
    });
    assert!(lives > 8, "{lives} lives");
    for disk in disks.into_inner().expect("nobody has panicked") {
        assert_eq!(check(&disk.path, disk.format), (0, 0), "{:?}", disk.path);
    }
    // Other tests have some open, too.
    assert!(descriptors() < before + 60, "{before} descriptors, and then {}", descriptors());
    println!("{lives} lives");
}
