//! What a full or a draining engine does not take is handed back with its memory, at once; room is
//! made by `poll`. Nothing is ever waited for that has ended already.

use std::collections::VecDeque;

use crate::common::drive::{add, folder, is_readable, make};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::{Engine, Limits, Why};
use cowbell_formats::Format;

const BLOCK: u64 = 4096;

#[test]
fn until_somebody_polls() {
    let folder = folder();
    let path = folder.path().join("disk");
    make(&path, Format::Raw, 1 << 20);
    let backend = Aio::new(AioOptions::default()).expect("native AIO");
    let mut engine = Engine::new(backend, Limits { requests: 3, ..Limits::default() });
    let disk = add(&mut engine, &path, Format::Raw, true);
    for round in 0..100 {
        for tag in 0..3 {
            engine.submit(disk, Io::read(0, BLOCK), Buf::zeroed(4096), tag).expect("room");
        }
        let mine = Buf::copied(&[round; 4096]);
        let refused = engine.submit(disk, Io::read(0, BLOCK), mine, 9).expect_err("it is full");
        assert_eq!(refused.why, Why::Full);
        let mine = refused.mem.into_buf().expect("the memory comes back");
        assert!(mine.len() == 4096 && mine.iter().all(|&b| b == round), "and as it was");
        while engine.in_flight() > 0 {
            engine.run(clock());
            assert!(engine.in_flight() == 0 || is_readable(&engine, 20_000));
        }
        // They have ended; the room is theirs until that has been seen.
        let refused = engine.submit(disk, Io::flush(), Mem::None, 9).expect_err("it is full");
        assert_eq!(refused.why, Why::Full);
        assert!(engine.poll().is_some());
        engine.submit(disk, Io::flush(), Mem::None, 9).expect("room for one");
        assert!(engine.submit(disk, Io::flush(), Mem::None, 9).is_err());
        while engine.poll().is_some() || engine.in_flight() > 0 {
            engine.run(clock());
        }
    }
}

#[test]
fn and_a_queue_of_requests_that_need_no_io_is_served_to_its_end() {
    let folder = folder();
    let path = folder.path().join("disk");
    make(&path, Format::Qed, 1 << 20);
    let backend = Aio::new(AioOptions::default()).expect("native AIO");
    let mut engine = Engine::new(backend, Limits { requests: 2, ..Limits::default() });
    let disk = add(&mut engine, &path, Format::Qed, true);
    let mut queue: VecDeque<Mem> = (0..1000).map(|_| Buf::zeroed(4096).into()).collect();
    let mut ended = 0;
    let mut more = true;
    while ended < 1000 {
        // As the examples' loops: wait only when there is nothing left to do.
        assert!(more || is_readable(&engine, 20_000), "{ended} ended: nothing wakes the loop");
        while let Some(mem) = queue.pop_front() {
            if let Err(refused) = engine.submit(disk, Io::read(0, BLOCK), mem, 0) {
                queue.push_front(refused.mem);
                break;
            }
        }
        more = engine.run(clock()).again;
        while let Some(done) = engine.poll() {
            assert_eq!(done.result, Ok(()));
            more |= !queue.is_empty();
            ended += 1;
        }
    }
}
