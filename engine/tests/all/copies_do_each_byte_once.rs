//! A piece of a copy becomes as long as the zeros that it begins with, but not over what another worker
//! has taken: each byte of the target is written or zeroed once.

use cowbell_engine::mem::Mem;
use cowbell_engine::status::StatusKind;
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Step};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, FileId, Time};
use cowbell_engine::wait::{On, WaitList};
use cowbell_engine::{Copy, Engine, Limits, NodeEvent};

const SIZE: u64 = 4 << 20;
const PIECE: u64 = 256 << 10;
/// Up to here there are bytes, then zeros.
const DATA: u64 = 64 << 10;

/// Disks without files.
enum Disk {
    /// Says what is behind its first piece only when it has been flushed.
    Source { is_silent: bool, waiters: WaitList },
    /// Counts.
    Target { written: u64, zeroed: u64 },
}

impl Disk {
    fn say(cx: &mut Cx<'_>) -> Step<()> {
        let Io { offset, len, .. } = cx.io();
        match DATA.checked_sub(offset).filter(|&left| left > 0) {
            Some(left) => cx.answer_status(StatusKind::Data, left.min(len), None),
            None => cx.answer_status(StatusKind::Zero, len, None),
        }
        Step::Done(Ok(()))
    }
}

impl Driver for Disk {
    type State = ();
    const STATES: &'static [&'static str] = &["silent"];
    fn label(_: &()) -> usize {
        0
    }
    fn size(&self) -> u64 {
        SIZE
    }
    fn uses(&self, _: FileId) -> bool {
        false
    }
    fn deadline(&self) -> Option<Time> {
        None
    }
    fn chore(&mut self, _: Chore) -> Option<()> {
        None
    }
    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<()> {
        let Io { kind, offset, len } = cx.io();
        match (self, kind) {
            (Disk::Source { is_silent: true, waiters }, IoKind::Status { .. })
                if offset == PIECE =>
            {
                cx.park(waiters, On::Table);
                return Step::Wait(());
            }
            (Disk::Source { .. }, IoKind::Status { .. }) => return Disk::say(cx),
            (Disk::Source { .. }, IoKind::Read) => cx.zero_guest(0, len),
            (Disk::Source { is_silent, waiters }, IoKind::Flush) => {
                *is_silent = false;
                cx.wake_all(waiters);
            }
            (Disk::Target { written, .. }, IoKind::Write { .. }) => *written += len,
            (Disk::Target { zeroed, .. }, IoKind::Zero { .. }) => *zeroed += len,
            (Disk::Target { .. }, IoKind::Flush) => {}
            _ => return Step::Done(Err(Errno::NOT_SUPPORTED)),
        }
        Step::Done(Ok(()))
    }
    fn step(&mut self, _: (), event: Event, cx: &mut Cx<'_>) -> Step<()> {
        assert_eq!(event, Event::Woken);
        Disk::say(cx)
    }
}

#[test]
fn though_one_worker_waits_for_an_answer() {
    let mut engine = Engine::new(Inline::new(), Limits::default());
    let source = engine.add(Disk::Source { is_silent: true, waiters: WaitList::new() });
    let target = engine.add(Disk::Target { written: 0, zeroed: 0 });
    let counts = |engine: &Engine<Disk, Inline>| match *engine.node(target) {
        Disk::Target { written, zeroed } => (written, zeroed),
        Disk::Source { .. } => unreachable!("it is the target"),
    };
    let copy = Copy { in_flight: 2, piece: PIECE as usize, ..Copy::new(source, target) };
    let job = engine.start(copy).expect("it starts");
    for _ in 0..10 {
        engine.run(clock());
    }
    // The first piece is done, with the zeros in it; the second is somebody's.
    assert_eq!(counts(&engine), (DATA, PIECE - DATA));
    engine.submit(source, Io::flush(), Mem::None, 0).expect("room");
    let ended = loop {
        engine.run(clock());
        while engine.poll().is_some() {}
        if let Some(event) = engine.poll_event() {
            break event;
        }
    };
    assert_eq!(ended, NodeEvent::JobEnded { job, result: Ok(()) });
    assert_eq!(counts(&engine), (DATA, SIZE - DATA));
}
