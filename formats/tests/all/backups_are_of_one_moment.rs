//! Copies of a disk as it was when the job began, while its guest goes on: the target is that disk, the
//! guest's disk is what it wrote, and what goes wrong with the target is not the guest's.

use crate::common::drive::{add, check, drain, folder, make, make_with, settle, wait};
use crate::common::shadow::Rng;
use crate::copies_run_beside_guests::{FORMATS, SIZE, aio, end_of, fill, read};
use cowbell_engine::backend::Backend;
use cowbell_engine::faulty::{Fault, Faulty, What};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Driver, Io, IoKind};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, FileId, JobId, NodeId};
use cowbell_engine::{Copy, Engine, Limits, Moment, NodeEvent, Why, Zeros};
use cowbell_formats::{CreateOptions, Format, Node};
use std::path::Path;
use std::time::Duration;

/// A guest that writes, zeroes and discards at random, no two requests in flight on the same block.
pub struct Guest {
    pub disk: NodeId,
    depth: usize,
    pub model: Vec<u8>,
    /// Blocks that were discarded, and may be zeros or not.
    open: Vec<bool>,
    pub busy: Vec<(u64, u64)>,
    rng: Rng,
    pub ended: usize,
}

const BLOCK: u64 = 4096;

impl Guest {
    pub fn new(disk: NodeId, model: &[u8]) -> Guest {
        let (busy, rng) = (Vec::new(), Rng(model.len() as u64));
        let open = vec![false; model.len() / BLOCK as usize];
        Guest { disk, depth: 16, model: model.to_vec(), open, busy, rng, ended: 0 }
    }

    /// As many requests as it has room for.
    pub fn submit<B: Backend>(&mut self, engine: &mut Engine<Node, B>) {
        for _ in 0..64 {
            if self.busy.len() == self.depth {
                return;
            }
            let blocks = self.model.len() as u64 / BLOCK;
            let first = self.rng.below(blocks);
            let len = (BLOCK * (1 + self.rng.below(20))).min((blocks - first) * BLOCK);
            let at = first * BLOCK;
            if self.busy.iter().any(|&(from, to)| at < to && from < at + len) {
                continue;
            }
            let byte = self.rng.below(256) as u8;
            let zero = IoKind::Zero { unmap: byte < 16, fua: byte.is_multiple_of(2) };
            let (kind, byte) = match byte {
                0..32 => (zero, 0),
                32..48 => (IoKind::Discard, 0),
                byte => (IoKind::Write { fua: byte == 77, compressed: false }, byte),
            };
            let mem: Mem = match kind {
                IoKind::Write { .. } => Buf::copied(&vec![byte; len as usize]).into(),
                _ => Mem::None,
            };
            engine.submit(self.disk, Io { kind, offset: at, len }, mem, at).expect("room");
            self.busy.push((at, at + len));
            self.model[at as usize..(at + len) as usize].fill(byte);
            let blocks = (at / BLOCK) as usize..((at + len) / BLOCK) as usize;
            self.open[blocks].fill(kind == IoKind::Discard);
        }
    }

    /// Where its disk does not hold what it has written.
    pub fn misses<B: Backend>(&self, engine: &mut Engine<Node, B>) -> Option<usize> {
        let found = read(engine, self.disk, self.model.len() as u64);
        let blocks = found.chunks(BLOCK as usize).zip(self.model.chunks(BLOCK as usize));
        let mut blocks = blocks.zip(&self.open);
        blocks.position(|((found, expected), open)| !open && found != expected)
    }

    /// What has ended has ended well.
    pub fn poll<B: Backend>(&mut self, engine: &mut Engine<Node, B>) -> bool {
        let before = self.ended;
        while let Some(done) = engine.poll() {
            assert_eq!(done.result, Ok(()), "a guest's request");
            self.busy.retain(|&(at, _)| at != done.tag);
            self.ended += 1;
        }
        self.ended > before
    }

    /// Goes on until the job has ended: how?
    pub fn run_beside<B: Backend>(
        &mut self,
        engine: &mut Engine<Node, B>,
        job: JobId,
    ) -> Result<(), Errno> {
        let ended = loop {
            self.submit(engine);
            let again = engine.run(clock()).again;
            let any = self.poll(engine);
            match engine.poll_event() {
                Some(NodeEvent::JobEnded { job: ended, result }) => {
                    assert_eq!(ended, job);
                    break result;
                }
                Some(NodeEvent::JobError { .. }) | None => {}
                Some(event) => panic!("{event:?}"),
            }
            assert!(again || any || wait(engine), "nothing wakes the loop: {engine:?}");
        };
        while !self.busy.is_empty() {
            let again = engine.run(clock()).again;
            let any = self.poll(engine);
            assert!(again || any || wait(engine), "nothing wakes the loop: {engine:?}");
        }
        ended
    }
}

pub fn differs(found: &[u8], expected: &[u8]) -> Option<usize> {
    found.iter().zip(expected).position(|(found, expected)| found != expected)
}

/// Backs up a disk of one format to one of another while a guest uses it.
fn backs_up(from: Format, to: Format, options: Plan) {
    let (folder, mut rng) = (folder(), Rng(5));
    let paths = [folder.path().join("from"), folder.path().join("to")];
    let mut engine = aio(Limits::default());
    make(&paths[0], from, SIZE);
    make(&paths[1], to, SIZE + options.target_offset);
    let source = add(&mut engine, &paths[0], from, options.direct);
    let target = add(&mut engine, &paths[1], to, !options.direct);
    let mut model = vec![0; SIZE as usize];
    fill(&mut engine, source, &mut model, &mut rng);
    let mut guest = Guest::new(source, &model);
    let copy = Copy {
        moment: Moment::Start,
        target_is_zero: true,
        target_offset: options.target_offset,
        compressed: options.compressed,
        unit: options.unit,
        piece: options.piece,
        in_flight: 3,
        zeros: if options.compressed { Zeros::Found } else { Zeros::Told },
        // Slow enough for the guest to come first, mostly.
        rate: Some(20 << 20),
        ..Copy::new(source, target)
    };
    let job = engine.start(copy).expect("it starts");
    assert_eq!(guest.run_beside(&mut engine, job), Ok(()));
    assert!(guest.ended > 20, "{} requests ended meanwhile", guest.ended);
    // Since they were submitted, not since the clock began.
    let longest = engine.stats().latency.max();
    assert!(longest < clock().0 / 2 && longest < 600_000_000_000, "{longest} ns");
    let found = read(&mut engine, target, SIZE + options.target_offset);
    let found = &found[options.target_offset as usize..];
    assert_eq!(differs(found, &model), None, "{from} to {to}: the target is the disk at its start");
    assert_eq!(guest.misses(&mut engine), None, "{from} to {to}: the disk is what was written");
    drain(&mut engine);
    drop(engine);
    for (path, format) in paths.iter().zip([from, to]) {
        assert_eq!(check(path, format), (0, 0), "{format}");
    }
}

/// How a backup is made.
#[derive(Clone, Copy)]
struct Plan {
    direct: bool,
    compressed: bool,
    target_offset: u64,
    unit: usize,
    piece: usize,
}

const PLAIN: Plan =
    Plan { direct: false, compressed: false, target_offset: 0, unit: 512, piece: 256 << 10 };

#[test]
fn of_every_format() {
    for (n, from) in FORMATS.into_iter().enumerate() {
        let to = FORMATS[(n + 3) % FORMATS.len()];
        backs_up(from, to, PLAIN);
        backs_up(from, to, Plan { direct: true, piece: 8192, ..PLAIN });
    }
}

#[test]
fn compressed() {
    for from in FORMATS {
        let whole = Plan { compressed: true, unit: 65_536, ..PLAIN };
        backs_up(from, Format::Qcow2, whole);
        backs_up(from, Format::Qcow2, Plan { direct: true, ..whole });
    }
}

#[test]
fn to_a_place_where_units_begin_elsewhere() {
    let plan = Plan { target_offset: 3 * 4096 + 512, unit: 4096, piece: 128 << 10, ..PLAIN };
    for to in FORMATS {
        backs_up(Format::Qcow2, to, plan);
        backs_up(Format::Raw, to, Plan { direct: true, ..plan });
    }
}

/// A disk of this format that has something on it, and an empty one.
pub fn two<B: Backend<File = DiskFile>>(
    engine: &mut Engine<Node, B>,
    folder: &Path,
    (from, to): (Format, Format),
) -> ([NodeId; 2], Vec<u8>) {
    let paths = [folder.join("from"), folder.join("to")];
    make(&paths[0], from, SIZE);
    make(&paths[1], to, SIZE);
    let disks = [add(engine, &paths[0], from, false), add(engine, &paths[1], to, false)];
    let mut model = vec![0; SIZE as usize];
    fill(engine, disks[0], &mut model, &mut Rng(3));
    (disks, model)
}

#[test]
fn of_a_chain_whose_top_is_written() {
    let folder = folder();
    let mut engine = aio(Limits::default());
    let base = folder.path().join("base");
    make(&base, Format::Raw, SIZE);
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 4096) as u8).collect();
    std::fs::write(&base, &bytes).expect("a scratch file");
    let options = CreateOptions {
        backing_file: Some("base".into()),
        backing_format: Some(Format::Raw),
        size: Some(SIZE),
        ..CreateOptions::default()
    };
    for format in [Format::Qcow2, Format::Qed] {
        let path = folder.path().join(format!("top.{format}"));
        make_with(&path, format, &options);
        make(&folder.path().join("to"), Format::Qcow2, SIZE);
        let top = add(&mut engine, &path, format, true);
        let target = add(&mut engine, &folder.path().join("to"), Format::Qcow2, false);
        let mut guest = Guest::new(top, &bytes);
        let copy = Copy { moment: Moment::Start, rate: Some(20 << 20), ..Copy::new(top, target) };
        let job = engine.start(copy).expect("it starts");
        assert_eq!(guest.run_beside(&mut engine, job), Ok(()));
        assert_eq!(differs(&read(&mut engine, target, SIZE), &bytes), None, "{format}");
        assert_eq!(guest.misses(&mut engine), None, "{format}");
        for node in [top, target] {
            engine.close(node).expect("it is closed");
        }
        loop {
            let again = engine.run(clock()).again;
            if !engine.has(top) && !engine.has(target) {
                break;
            }
            assert!(again || wait(&engine), "nothing wakes the loop: {engine:?}");
        }
        while engine.poll_event().is_some() {}
        std::fs::remove_file(folder.path().join("to")).expect("it is there");
    }
}

#[test]
fn two_at_once_are_each_of_their_own_moment() {
    let folder = folder();
    let mut engine = aio(Limits::default());
    let ([source, first], model) = two(&mut engine, folder.path(), (Format::Qcow2, Format::Raw));
    let path = folder.path().join("second");
    make(&path, Format::Qed, SIZE);
    let second = add(&mut engine, &path, Format::Qed, true);
    let mut guest = Guest::new(source, &model);
    let slow = |target| Copy {
        moment: Moment::Start,
        rate: Some(8 << 20),
        in_flight: 2,
        ..Copy::new(source, target)
    };
    let one = engine.start(slow(first)).expect("it starts");
    // Up to here the guest has written something.
    while guest.ended < 40 {
        guest.submit(&mut engine);
        let again = engine.run(clock()).again;
        assert!(guest.poll(&mut engine) || again || wait(&engine), "{engine:?}");
    }
    while !guest.busy.is_empty() {
        let again = engine.run(clock()).again;
        assert!(guest.poll(&mut engine) || again || wait(&engine), "{engine:?}");
    }
    let later = read(&mut engine, source, SIZE);
    assert!(later != model);
    let other = engine.start(slow(second)).expect("it starts");
    let mut left = vec![one, other];
    while !left.is_empty() {
        guest.submit(&mut engine);
        let again = engine.run(clock()).again;
        let any = guest.poll(&mut engine);
        while let Some(event) = engine.poll_event() {
            let NodeEvent::JobEnded { job, result } = event else { panic!("{event:?}") };
            assert_eq!(result, Ok(()));
            left.retain(|&other| other != job);
        }
        assert!(again || any || wait(&engine), "nothing wakes the loop: {engine:?}");
    }
    settle(&mut engine);
    assert_eq!(differs(&read(&mut engine, first, SIZE), &model), None);
    assert_eq!(differs(&read(&mut engine, second, SIZE), &later), None);
    drain(&mut engine);
}

/// The file that is only this node's.
pub fn file_of<B: Backend>(engine: &Engine<Node, B>, node: NodeId) -> FileId {
    let mut files = (0..4).map(FileId);
    files.find(|&file| engine.node(node).uses(file)).expect("it has a file")
}

#[test]
fn a_target_that_fails_is_not_the_guests_affair() {
    for to in FORMATS {
        for after in [0, 1, 3, 7] {
            let folder = folder();
            let backend = Faulty::new(Inline::new());
            let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
            let ([source, target], model) = two(&mut engine, folder.path(), (Format::Qcow2, to));
            let file = Some(file_of(&engine, target));
            let (what, errno) = (Some(What::Write), Some(Errno::NO_SPACE));
            let plan = Fault { what, file, after, errno, ..Fault::default() };
            engine.backend_mut().plan_mut().push(plan);
            let mut guest = Guest::new(source, &model);
            let copy = Copy { moment: Moment::Start, piece: 65_536, ..Copy::new(source, target) };
            let job = engine.start(copy).expect("it starts");
            let ended = guest.run_beside(&mut engine, job);
            let is_full = engine.backend().injected() > 0;
            assert!(ended == Err(Errno::NO_SPACE) || !is_full && ended == Ok(()), "{to} {after}");
            assert_eq!(guest.misses(&mut engine), None, "{to} {after}");
        }
    }
}

#[test]
fn a_target_that_hangs_holds_the_guest_no_longer_than_said() {
    let folder = folder();
    let backend = Faulty::new(Inline::new());
    let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
    let ([source, target], model) = two(&mut engine, folder.path(), (Format::Raw, Format::Raw));
    let file = Some(file_of(&engine, target));
    let hangs = Fault { what: Some(What::Write), file, ..Fault::late(600_000_000) };
    engine.backend_mut().plan_mut().push(hangs);
    let mut guest = Guest::new(source, &model);
    let hold_max = Some(Duration::from_millis(50));
    let copy = Copy { moment: Moment::Start, hold_max, in_flight: 2, ..Copy::new(source, target) };
    let job = engine.start(copy).expect("it starts");
    // It has all its pieces in flight to the target: from now on the guest waits, and then no more.
    assert_eq!(guest.run_beside(&mut engine, job), Err(Errno::TIMED_OUT));
    assert!(guest.ended >= 16);
    assert_eq!(guest.misses(&mut engine), None);
}

#[test]
fn a_cancel_lets_the_guest_go_at_once() {
    let folder = folder();
    let backend = Faulty::new(Inline::new());
    let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
    let ([source, target], model) = two(&mut engine, folder.path(), (Format::Raw, Format::Raw));
    let file = Some(file_of(&engine, target));
    let hangs = Fault { what: Some(What::Write), file, ..Fault::late(300_000_000) };
    engine.backend_mut().plan_mut().push(hangs);
    let mut guest = Guest::new(source, &model);
    let copy =
        Copy { moment: Moment::Start, hold_max: None, in_flight: 1, ..Copy::new(source, target) };
    let job = engine.start(copy).expect("it starts");
    guest.submit(&mut engine);
    for _ in 0..50 {
        engine.run(clock());
        guest.poll(&mut engine);
    }
    assert!(!guest.busy.is_empty(), "somebody waits for what a target keeps from being read");
    assert!(engine.cancel_job(job));
    while !guest.busy.is_empty() {
        engine.run(clock());
        guest.poll(&mut engine);
        assert_eq!(engine.poll_event(), None, "the job's write is still on its way");
    }
    assert_eq!(end_of(&mut engine, job), Err(Errno::CANCELED));
    assert_eq!(guest.misses(&mut engine), None);
}

#[test]
fn a_paused_backup_still_reads_first_what_is_to_change() {
    let folder = folder();
    let mut engine = aio(Limits::default());
    let ([source, target], model) = two(&mut engine, folder.path(), (Format::Vmdk, Format::Vdi));
    let copy = Copy { moment: Moment::Start, ..Copy::new(source, target) };
    let job = engine.start(copy).expect("it starts");
    assert!(engine.pause_job(job));
    let mut guest = Guest::new(source, &model);
    while guest.ended < 60 {
        guest.submit(&mut engine);
        let again = engine.run(clock()).again;
        assert!(guest.poll(&mut engine) || again || wait(&engine), "{engine:?}");
    }
    assert!(engine.resume_job(job));
    assert_eq!(guest.run_beside(&mut engine, job), Ok(()));
    assert_eq!(differs(&read(&mut engine, target, SIZE), &model), None);
    drain(&mut engine);
}

#[test]
fn a_discard_of_all_waits_for_all() {
    for format in [Format::Qcow2, Format::Raw] {
        let folder = folder();
        let mut engine = aio(Limits::default());
        let ([source, target], model) = two(&mut engine, folder.path(), (format, Format::Qcow2));
        let copy = Copy { moment: Moment::Start, piece: 65_536, ..Copy::new(source, target) };
        let job = engine.start(copy).expect("it starts");
        let zero = Io { kind: IoKind::Zero { unmap: true, fua: false }, offset: 0, len: SIZE };
        engine.submit(source, zero, Mem::None, 0).expect("room");
        assert_eq!(end_of(&mut engine, job), Ok(()));
        settle(&mut engine);
        assert_eq!(differs(&read(&mut engine, target, SIZE), &model), None, "{format}");
        assert!(read(&mut engine, source, SIZE).iter().all(|&byte| byte == 0));
        drain(&mut engine);
    }
}

#[test]
fn what_cannot_be_kept_account_of_is_refused() {
    let folder = folder();
    let mut engine: Engine<Node, _> = Engine::new(Inline::new(), Limits::default());
    let paths = [folder.path().join("from"), folder.path().join("to")];
    // 64 TiB, in granules of 64 KiB.
    paths.iter().for_each(|path| make(path, Format::Qcow2, 1 << 46));
    let disks = paths.map(|path| add(&mut engine, &path, Format::Qcow2, false));
    let copy = Copy { moment: Moment::Start, ..Copy::new(disks[0], disks[1]) };
    assert_eq!(engine.start(copy), Err(Why::TooLarge));
    let copy = Copy { unit: 256 << 10, target_is_zero: true, ..copy };
    let job = engine.start(copy).expect("larger granules are fewer");
    assert_eq!(end_of(&mut engine, job), Ok(()));
    drain(&mut engine);
}
