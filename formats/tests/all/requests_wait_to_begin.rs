//! Requests that wait before they begin: for a disk's limit, and for what a guest has given up.

use std::sync::{Arc, Weak};
use std::time::Duration;

use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::OpKind;
use cowbell_engine::step::Io;
use cowbell_engine::sys::ram::Ram;
use cowbell_engine::units::{Errno, NodeId, Time};
use cowbell_engine::{Engine, Limits, NodeEvent, Rate, Why};
use cowbell_formats::raw::Raw;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::common::held::Held;

const SIZE: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const SECOND: u64 = 1_000_000_000;

fn rig(limits: Limits) -> (Engine<Raw, Held>, NodeId) {
    let mut engine = Engine::new(Held::default(), limits);
    let (file, _) = engine.attach(vec![0; SIZE as usize]).expect("it attaches");
    let disk = engine.add(Raw::new(file, SIZE, true, false, true));
    (engine, disk)
}

fn write(engine: &mut Engine<Raw, Held>, disk: NodeId, at: u64, byte: u8, tag: u64) {
    let io = Io::write(at * BLOCK, BLOCK);
    let taken = engine.submit(disk, io, Buf::copied(&[byte; BLOCK as usize]), tag);
    taken.expect("there is room");
}

/// Lets everything go until nothing moves; the tags of what has ended.
fn settle(engine: &mut Engine<Raw, Held>, now: Time) -> Vec<u64> {
    let mut ended = Vec::new();
    loop {
        engine.run(now);
        while engine.backend_mut().release(None, |_| true) {}
        engine.run(now);
        while let Some(done) = engine.poll() {
            assert_eq!(done.result, Ok(()));
            ended.push(done.tag);
        }
        if engine.backend().ops.is_empty() {
            return ended;
        }
    }
}

#[test]
fn a_disk_does_as_much_as_its_limit_allows() {
    let (mut engine, disk) = rig(Limits::default());
    let rate =
        Rate { bytes: Some(100 * BLOCK), burst: Duration::from_millis(50), ..Rate::default() };
    assert!(engine.set_rate(disk, Some(rate)));
    for tag in 0..200 {
        write(&mut engine, disk, tag, 1, tag);
    }
    let mut ended = settle(&mut engine, Time(SECOND));
    assert!((5..=7).contains(&ended.len()), "a burst: {ended:?}");
    // Whoever does not wait for anything is not held up.
    engine.submit(disk, Io::flush(), Mem::None, 1000).expect("room");
    assert_eq!(settle(&mut engine, Time(SECOND)), [1000]);
    let mut now = SECOND;
    while now < 2 * SECOND {
        now = engine.next_deadline().expect("some wait").0.max(now + 1);
        ended.extend(settle(&mut engine, Time(now)));
    }
    assert!((104..=107).contains(&ended.len()), "in a second: {}", ended.len());
    assert_eq!(ended, (0..ended.len() as u64).collect::<Vec<_>>(), "in their order");
    // Faster from now on.
    assert!(engine.set_rate(disk, Some(Rate { bytes: Some(1 << 40), ..rate })));
    let waiting = 200 - ended.len();
    assert_eq!(settle(&mut engine, Time(now)).len(), waiting);
    assert_eq!(engine.next_deadline(), None);
}

#[test]
fn who_closes_a_disk_does_not_wait_for_its_limit() {
    for drains in [false, true] {
        let (mut engine, disk) = rig(Limits::default());
        engine.set_rate(
            disk,
            Some(Rate { requests: Some(1), burst: Duration::ZERO, ..Rate::default() }),
        );
        for tag in 0..50 {
            write(&mut engine, disk, tag, 1, tag);
        }
        assert_eq!(settle(&mut engine, Time(1)), [0]);
        if drains {
            engine.drain();
        } else {
            engine.close(disk).expect("it is open");
        }
        assert_eq!(settle(&mut engine, Time(2)).len(), 49);
        settle(&mut engine, Time(2));
        if drains {
            assert_eq!(engine.drained(), Some(Ok(())));
        } else {
            assert_eq!(engine.poll_event(), Some(NodeEvent::Closed { node: disk, result: Ok(()) }));
        }
        engine.assert_idle();
    }
}

#[test]
fn a_reset_does_not_wait_and_nothing_old_comes_after_what_is_new() {
    let (mut engine, disk) = rig(Limits { requests: 3, ..Limits::default() });
    write(&mut engine, disk, 0, 1, 10);
    engine.submit(disk, Io::read(BLOCK, BLOCK), Buf::zeroed(BLOCK as usize), 11).expect("room");
    engine.run(Time(1));
    assert_eq!(engine.backend().ops.len(), 2);
    assert_eq!(engine.abandon(disk, |tag| tag == 10), [10]);
    assert_eq!(engine.abandon(disk, |_| true), [11], "and 10 only once");
    assert!((engine.in_flight(), engine.poll().is_none()) == (0, true));
    assert_eq!(engine.abandoned(), 2, "they have their places");

    // The same place again, and another one.
    write(&mut engine, disk, 0, 2, 20);
    engine.run(Time(2));
    assert_eq!(engine.backend().ops.len(), 2, "it waits for what was given up");
    // The places of what is in flight are taken, whoever it belongs to.
    let refused = engine.submit(disk, Io::flush(), Mem::None, 21);
    assert_eq!(refused.map_err(|refused| refused.why), Err(Why::Full));
    assert!(engine.backend_mut().release(None, |op| op.kind == OpKind::Read));
    engine.run(Time(3));
    assert!(engine.poll().is_none(), "nobody is told of it");
    write(&mut engine, disk, 1, 3, 22);
    engine.run(Time(3));
    assert!(engine.backend_mut().release(None, |op| op.offset == BLOCK));
    engine.run(Time(4));
    assert_eq!(engine.poll().map(|done| (done.tag, done.result)), Some((22, Ok(()))));

    // What was given up fails, late.
    assert!(engine.backend_mut().release(Some(Errno::IO), |_| true));
    assert_eq!(settle(&mut engine, Time(5)), [20]);
    assert_eq!((engine.backend().bytes[0], engine.backend().bytes[BLOCK as usize]), (2, 3));
    engine.drain();
    settle(&mut engine, Time(6));
    assert_eq!(engine.drained(), Some(Ok(())));
    assert_eq!(engine.abandoned(), 0);
    engine.assert_idle();
}

#[test]
fn what_has_not_begun_and_is_given_up_never_begins() {
    let (mut engine, disk) = rig(Limits::default());
    engine
        .set_rate(disk, Some(Rate { requests: Some(1), burst: Duration::ZERO, ..Rate::default() }));
    write(&mut engine, disk, 0, 1, 0);
    write(&mut engine, disk, 1, 1, 1);
    engine.run(Time(1));
    assert_eq!(engine.abandon(disk, |_| true), [0, 1]);
    assert_eq!(settle(&mut engine, Time(100 * SECOND)), [0; 0]);
    assert_eq!((engine.backend().bytes[0], engine.backend().bytes[BLOCK as usize]), (1, 0));
    engine.assert_idle();
}

#[test]
fn memory_that_has_an_owner_stays_until_the_device_lets_go_of_it() {
    let (mut engine, disk) = rig(Limits::default());
    let at = GuestAddress(0x1000);
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(at, BLOCK as usize)]).expect("it is mapped");
    memory.write_slice(&[7; BLOCK as usize], at).expect("it is there");
    let memory = Arc::new(memory);
    let there: Weak<GuestMemoryMmap<()>> = Arc::downgrade(&memory);
    let ram = Ram::of_guest(&memory, [(at, BLOCK as usize)]).expect("it is there");
    engine.submit(disk, Io::write(0, BLOCK), ram, 1).expect("room");
    engine.run(Time(1));
    drop(memory);
    assert_eq!(engine.abandon(disk, |_| true), [1]);
    assert!(there.upgrade().is_some(), "the device may still look at it");
    assert_eq!(settle(&mut engine, Time(2)), [0; 0]);
    assert!(there.upgrade().is_none(), "nobody needs it any more");
    assert_eq!(engine.backend().bytes[0], 7);
    engine.assert_idle();
}
