//! `run` and `poll` may be called as often as one likes, with whatever time.

use crate::common::drive::{add, drain, folder, make};
use cowbell_engine::mem::Buf;
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::Time;
use cowbell_engine::{Engine, Limits, Progress};
use cowbell_formats::{Format, Node};

#[test]
fn at_any_time() {
    let folder = folder();
    let path = folder.path().join("disk");
    make(&path, Format::Qed, 1 << 20);
    let backend = Aio::new(AioOptions::default()).expect("native AIO");
    let mut engine: Engine<Node, Aio> = Engine::new(backend, Limits::default());
    for now in [0, 5, 3, u64::MAX, 0] {
        assert_eq!(engine.run(Time(now)), Progress::default(), "without any node");
        assert!(engine.poll().is_none());
    }
    let disk = add(&mut engine, &path, Format::Qed, true);
    for round in 0..100 {
        engine.submit(disk, Io::write(round * 5000, 5000), Buf::zeroed(5000), 0).expect("room");
        let mut now = 0;
        loop {
            // Time may stand still, and go back.
            now = if now % 7 == 6 { now / 2 } else { now + 1 };
            engine.run(Time(now));
            if let Some(done) = engine.poll() {
                assert_eq!(done.result, Ok(()));
                assert!(engine.poll().is_none());
                break;
            }
        }
    }
    // The end of time: every deadline has come.
    assert!(engine.next_deadline().is_some(), "the need-check mark is to go");
    while engine.next_deadline().is_some() || !engine.is_idle() {
        engine.run(Time(u64::MAX));
    }
    for _ in 0..10 {
        assert_eq!(engine.run(Time(u64::MAX)), Progress::default());
    }
    drain(&mut engine);
}

/// A device without latency has answered before `run` returns, and time has passed meanwhile.
#[test]
fn at_the_end_of_time_with_an_answer_at_once() {
    let folder = folder();
    let path = folder.path().join("disk");
    make(&path, Format::Qed, 1 << 20);
    let mut engine: Engine<Node, Inline> = Engine::new(Inline::new(), Limits::default());
    let disk = add(&mut engine, &path, Format::Qed, false);
    engine.submit(disk, Io::write(0, 5000), Buf::zeroed(5000), 0).expect("room");
    while engine.in_flight() > 0 {
        engine.run(Time(u64::MAX));
        while let Some(done) = engine.poll() {
            assert_eq!(done.result, Ok(()));
        }
    }
    drain(&mut engine);
}
