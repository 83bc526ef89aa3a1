//! A `run` ends when its time is over, however much is ready; what is left is done in the next, in
//! turn, whatever node it is of.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use cowbell_engine::backend::{Backend, FileInfo, Harvest, Submission};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::stats::Call;
use cowbell_engine::step::Io;
use cowbell_engine::sys::null::{Null, NullFile};
use cowbell_engine::units::{FileId, NodeId, Time};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::raw::Raw;

const TURN: Duration = Duration::from_micros(500);
const BLOCK: u64 = 4096;

/// Handing over an op takes a while, and so does each look at the clock: time passes.
struct Slow {
    inner: Null,
    nanos_per_op: u64,
    nanos_per_look: u64,
    now: Cell<u64>,
    most_at_once: usize,
}

impl Slow {
    fn new(nanos_per_op: u64, nanos_per_look: u64) -> Slow {
        let (now, most_at_once) = (Cell::new(0), 0);
        Slow { inner: Null::new(), nanos_per_op, nanos_per_look, now, most_at_once }
    }
}

impl Backend for Slow {
    type File = NullFile;

    fn attach(&mut self, id: FileId, file: NullFile) -> io::Result<FileInfo> {
        self.inner.attach(id, file)
    }

    fn detach(&mut self, id: FileId) -> Option<NullFile> {
        self.inner.detach(id)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        let count = submission.len();
        self.inner.submit(submission);
        self.most_at_once = self.most_at_once.max(count);
        self.now.set(self.now.get() + self.nanos_per_op * count as u64);
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        self.inner.harvest(harvest);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn next_deadline(&self) -> Option<Time> {
        self.inner.next_deadline()
    }

    fn clock(&self) -> Time {
        self.now.set(self.now.get() + self.nanos_per_look);
        Time(self.now.get())
    }
}

fn engine(backend: Slow, requests: usize) -> (Engine<Raw, Slow>, [NodeId; 2]) {
    let mut engine = Engine::new(backend, Limits { requests, turn: TURN, ..Limits::default() });
    let nodes = [0, 1].map(|_| {
        let align = 512;
        let info = FileInfo {
            request_align: align,
            memory_align: align,
            hole_align: align,
            len: 1 << 30,
            can_grow: true,
            knows_holes: false,
        };
        let (file, _) = engine.attach(NullFile { info }).expect("it is attached");
        engine.add(Raw::new(file, info.len, true, false, true))
    });
    (engine, nodes)
}

fn read(engine: &mut Engine<Raw, Slow>, node: NodeId, tag: u64) {
    let mem: Mem = Buf::zeroed(BLOCK as usize).into();
    engine.submit(node, Io::read(tag % 1024 * BLOCK, BLOCK), mem, tag).expect("there is room");
}

/// How long a `run` took; tags of what it finished.
fn turn(engine: &mut Engine<Raw, Slow>) -> (u64, Vec<u64>, bool) {
    let began = engine.backend().now.get();
    let progress = engine.run(Time(began));
    let spent = engine.backend().now.get() - began;
    let mut ended = Vec::new();
    while let Some(done) = engine.poll() {
        assert_eq!(done.result, Ok(()));
        ended.push(done.tag);
    }
    (spent, ended, progress.is_over)
}

#[test]
fn however_slow_the_backend_is() {
    take_turns();
}

fn take_turns() {
    for nanos_per_op in [100, 6_000, 20_000, 90_000] {
        let (mut engine, [node, _]) = engine(Slow::new(nanos_per_op, 0), 2048);
        (0..2048).for_each(|tag| read(&mut engine, node, tag));
        let (mut ended, mut turns) = (Vec::new(), 0);
        while ended.len() < 2048 {
            let (spent, some, is_over) = turn(&mut engine);
            assert!(is_over || ended.len() + some.len() == 2048);
            let slice = TURN.as_nanos() as u64 / 4;
            let longest = TURN.as_nanos() as u64 + slice.max(nanos_per_op);
            assert!(spent <= longest, "{spent} ns, {nanos_per_op} for an op");
            ended.extend(some);
            turns += 1;
        }
        assert!(ended.is_sorted(), "what waited longest is first");
        let least = 2048 * nanos_per_op / (TURN.as_nanos() as u64 * 2);
        assert!(turns >= least, "{turns} turns");
        let longest = engine.stats().longest.expect("something was measured");
        assert_eq!(longest.call, Call::Submit);
        assert!(longest.count > 0 && longest.first.is_some());
        engine.assert_idle();
    }
}

#[test]
fn what_costs_nothing_goes_out_at_once() {
    let (mut engine, [node, _]) = engine(Slow::new(10, 0), 512);
    for round in 0..8 {
        (0..512).for_each(|tag| read(&mut engine, node, tag));
        let (mut ended, mut turns) = (0, 0);
        while ended < 512 {
            ended += turn(&mut engine).1.len();
            turns += 1;
        }
        assert!(turns == 1, "{turns} turns in round {round}");
    }
    assert_eq!(engine.backend().most_at_once, 512, "in one call");
}

#[test]
fn steps_take_time_too() {
    // 32 events are between two looks.
    let (mut engine, [node, _]) = engine(Slow::new(0, 200_000), 1024);
    (0..1024).for_each(|tag| read(&mut engine, node, tag));
    let (_, ended, is_over) = turn(&mut engine);
    assert!(is_over && ended.is_empty());
    assert!(engine.backend().most_at_once <= 128, "not all are begun in one turn");
    let mut ended = 0;
    while ended < 1024 {
        ended += turn(&mut engine).1.len();
    }
}

#[test]
fn one_disk_does_not_keep_the_loop_from_another() {
    share_the_loop();
}

#[test]
fn planted_defects_are_found() {
    let found_by = |mutant, test: fn()| {
        cowbell_engine::mutants::activate(Some(mutant));
        let found = std::panic::catch_unwind(test);
        cowbell_engine::mutants::activate(None);
        assert!(found.is_err(), "{mutant}, and nobody sees it");
    };
    found_by("newest_first", share_the_loop);
    found_by("end_of_turn_not_said", take_turns);
    found_by("turn_ignored", take_turns);
}

/// 200 ops of 50 us are 20 turns: so long does one wait for those before it, and never for what comes
/// after it.
fn share_the_loop() {
    const BUSY: u64 = 200;
    const LONGEST: u64 = 24;
    let (mut engine, [busy, other]) = engine(Slow::new(50_000, 0), BUSY as usize + 1);
    // Since which turn each waits, by tag; of the other disk one at a time.
    let (mut waiting, mut tag) = (BTreeMap::new(), 0);
    for now in 0..400 {
        while waiting.len() < BUSY as usize + 1 {
            let is_others = !waiting.values().any(|&(_, is_others)| is_others);
            read(&mut engine, if is_others { other } else { busy }, tag);
            waiting.insert(tag, (now, is_others));
            tag += 1;
        }
        for ended in turn(&mut engine).1 {
            waiting.remove(&ended).expect("it was waiting");
        }
        let longest = waiting.values().map(|&(since, _)| now - since).max();
        assert!(longest <= Some(LONGEST), "something waits for {longest:?} turns");
    }
}
