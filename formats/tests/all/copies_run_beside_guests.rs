//! A job copies one disk to another while the engine goes on: of any format, with holes and without,
//! paused, canceled, slowed down, and failing.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::common::drive::{add, check, drain, folder, is_readable, make, make_with, settle, wait};
use crate::common::shadow::Rng;
use cowbell_engine::backend::Backend;
use cowbell_engine::faulty::{Fault, Faulty, What};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Driver, Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, FileId, JobId, NodeId, Time};
use cowbell_engine::{Copy, Engine, Limits, Moment, NodeEvent, Why, Zeros};
use cowbell_formats::{CreateOptions, Format, Node};

pub const FORMATS: [Format; 5] =
    [Format::Raw, Format::Qed, Format::Qcow2, Format::Vmdk, Format::Vdi];
pub const SIZE: u64 = 4 << 20;

pub fn aio(limits: Limits) -> Engine<Node, Aio> {
    Engine::new(Aio::new(AioOptions::default()).expect("native AIO"), limits)
}

/// Writes some stretches of any length; what is on the disk then, of `size` bytes.
pub fn fill<B: Backend>(
    engine: &mut Engine<Node, B>,
    disk: NodeId,
    model: &mut [u8],
    rng: &mut Rng,
) {
    for _ in 0..12 {
        let at = rng.below(model.len() as u64 - 1);
        let len = (1 + rng.below(100_000)).min(model.len() as u64 - at);
        let byte = 1 + rng.below(255) as u8;
        let range = at as usize..(at + len) as usize;
        model[range.clone()].fill(byte);
        let bytes = Buf::copied(&model[range]);
        engine.submit(disk, Io::write(at, len), bytes, 0).expect("room");
        assert!(settle(engine).iter().all(|done| done.result == Ok(())));
    }
}

pub fn read<B: Backend>(engine: &mut Engine<Node, B>, disk: NodeId, size: u64) -> Vec<u8> {
    engine.submit(disk, Io::read(0, size), Buf::zeroed(size as usize), 0).expect("room");
    let done = settle(engine).pop().expect("it ended");
    assert_eq!(done.result, Ok(()));
    done.mem.into_buf().expect("it was lent").to_vec()
}

/// Runs until the job has ended.
pub fn end_of<B: Backend>(engine: &mut Engine<Node, B>, job: JobId) -> Result<(), Errno> {
    loop {
        let again = engine.run(clock()).again;
        let mut events = std::iter::from_fn(|| engine.poll_event());
        let ended = events.find_map(|event| match event {
            NodeEvent::JobEnded { job, result } => Some((job, result)),
            _ => None,
        });
        if let Some((ended, result)) = ended {
            assert_eq!(ended, job);
            assert_eq!(engine.job_progress(job), None);
            assert!(!engine.cancel_job(job), "it is gone");
            return result;
        }
        assert!(again || wait(engine), "nothing wakes the loop: {engine:?}");
    }
}

/// Copies with these limits between two formats, onto a disk that has other bytes, or none.
fn copies(from: Format, to: Format, limits: Limits, is_new: bool, longer: u64) {
    let (folder, mut rng) = (folder(), Rng(7));
    let mut engine = aio(limits);
    let paths = [folder.path().join("from"), folder.path().join("to")];
    let (formats, sizes) = ([from, to], [SIZE, SIZE + longer]);
    let mut models = sizes.map(|size| vec![0; size as usize]);
    let mut disks = Vec::new();
    for i in 0..2 {
        make(&paths[i], formats[i], sizes[i]);
        let disk = add(&mut engine, &paths[i], formats[i], i == 1);
        if i == 0 || !is_new {
            fill(&mut engine, disk, &mut models[i], &mut rng);
        }
        disks.push(disk);
    }
    let options = Copy { target_is_zero: is_new, ..Copy::new(disks[0], disks[1]) };
    let job = engine.start(options).expect("it starts");
    assert_eq!(engine.job_progress(job).map(|its| its.total), Some(sizes[1]));
    assert_eq!(end_of(&mut engine, job), Ok(()), "{from} to {to}");
    let mut copied = models[0].clone();
    copied.resize(sizes[1] as usize, 0);
    let differs =
        read(&mut engine, disks[1], sizes[1]).iter().zip(&copied).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{from} to {to}");
    assert!(read(&mut engine, disks[0], SIZE) == models[0], "the source stays");
    drain(&mut engine);
    drop(engine);
    assert_eq!(check(&paths[1], to), (0, 0), "{to}");
}

#[test]
fn of_every_format_to_every_other() {
    for from in FORMATS {
        for to in FORMATS {
            copies(from, to, Limits::default(), true, 0);
            copies(from, to, Limits::default(), false, 1 << 20);
        }
    }
}

/// A disk of the first format with something on it, and one of the second, full of something else.
fn filled<B: Backend<File = DiskFile>>(
    engine: &mut Engine<Node, B>,
    folder: &Path,
    (from, to): (Format, Format),
    sizes: [u64; 2],
) -> ([NodeId; 2], [Vec<u8>; 2]) {
    let mut rng = Rng(11);
    let paths = [folder.join("from"), folder.join("to")];
    let mut models = sizes.map(|size| vec![0; size as usize]);
    let mut disks = Vec::new();
    for (i, format) in [from, to].into_iter().enumerate() {
        make(&paths[i], format, sizes[i]);
        disks.push(add(engine, &paths[i], format, false));
        fill(engine, disks[i], &mut models[i], &mut rng);
    }
    ([disks[0], disks[1]], models)
}

#[test]
fn a_part_goes_to_another_place() {
    for (from, to) in [(Format::Raw, Format::Qcow2), (Format::Qed, Format::Raw)] {
        let folder = folder();
        let mut engine = aio(Limits::default());
        let sizes = [SIZE, 2 * SIZE];
        let (disks, mut models) = filled(&mut engine, folder.path(), (from, to), sizes);
        for (source_offset, target_offset, len) in [
            (12_800, 3584, Some(1 << 20)),
            (SIZE - 65_536, 1 << 20, Some(1 << 18)),
            (SIZE - 512, 512, Some(0)),
            (1 << 20, 5 << 20, None),
        ] {
            let copy = Copy { source_offset, target_offset, len, ..Copy::new(disks[0], disks[1]) };
            let job = engine.start(copy).expect("it starts");
            let len = len.unwrap_or(sizes[1] - target_offset) as usize;
            assert_eq!(engine.job_progress(job).map(|its| its.total), Some(len as u64));
            assert_eq!(end_of(&mut engine, job), Ok(()));
            let mut part = models[0][source_offset as usize..].to_vec();
            part.resize(len, 0);
            models[1][target_offset as usize..][..len].copy_from_slice(&part);
            assert!(read(&mut engine, disks[1], sizes[1]) == models[1], "{copy:?}");
        }
        for (source_offset, target_offset, len) in [
            (SIZE + 1, 0, Some(0)),
            (0, 2 * SIZE + 1, Some(0)),
            (0, SIZE, Some(SIZE + 1)),
            (0, SIZE + 512, None),
            (u64::MAX, u64::MAX, Some(u64::MAX)),
        ] {
            let copy = Copy { source_offset, target_offset, len, ..Copy::new(disks[0], disks[1]) };
            assert_eq!(engine.start(copy), Err(Why::TooSmall), "{copy:?}");
        }
        drain(&mut engine);
    }
}

#[test]
fn zeros_are_found_or_written_in_whole_units() {
    // A block of bytes in each 20 KiB, one byte at the end of a 64 KiB unit, and nothing else.
    let mut bytes = vec![0; SIZE as usize];
    (0..bytes.len() - 4096).step_by(20_480).for_each(|at| bytes[at..at + 4096].fill(7));
    bytes[2 << 20..3 << 20].fill(0);
    bytes[(5 << 19) - 1] = 1;
    let forms = [
        (Zeros::Told, 0),
        (Zeros::Told, 65_536),
        (Zeros::Found, 0),
        (Zeros::Found, 4096),
        (Zeros::Found, 5000),
        (Zeros::Found, 1 << 30),
        (Zeros::Written, 0),
        (Zeros::Written, 65_536),
    ];
    for (zeros, unit) in forms {
        for (to, is_new) in [(Format::Raw, true), (Format::Raw, false), (Format::Vdi, true)] {
            let folder = folder();
            let mut engine = aio(Limits::default());
            let path = |name: &str| folder.path().join(name);
            std::fs::write(path("from"), &bytes).expect("a scratch file");
            make(&path("to"), to, SIZE);
            let source = add(&mut engine, &path("from"), Format::Raw, false);
            let target = add(&mut engine, &path("to"), to, false);
            if !is_new {
                fill(&mut engine, target, &mut vec![0; SIZE as usize], &mut Rng(5));
            }
            let copy = Copy::new(source, target);
            let copy = Copy { zeros, unit, target_is_zero: is_new, ..copy };
            let job = engine.start(copy).expect("it starts");
            assert_eq!(end_of(&mut engine, job), Ok(()));
            assert!(read(&mut engine, target, SIZE) == bytes, "{copy:?}");
            drain(&mut engine);
            if to == Format::Raw && is_new {
                // What a file system gives is a whole number of its blocks.
                let blocks = bytes.chunks(4096);
                let found = blocks.filter(|block| block.iter().any(|&byte| byte != 0)).count();
                let taken = std::fs::metadata(path("to")).expect("it is there").blocks() * 512;
                match (zeros, unit) {
                    (Zeros::Found, 1_073_741_824) => assert!(taken < SIZE, "{taken}"),
                    (Zeros::Found, _) => assert!(taken <= found as u64 * 4096 + 65_536, "{taken}"),
                    _ => assert!(taken >= SIZE, "{copy:?}: {taken}"),
                }
            }
        }
    }
}

#[test]
fn a_far_longer_target_holds_nobody_up() {
    // Only where that is a few numbers: the rest is not looked at.
    for to in [Format::Raw, Format::Qcow2] {
        let folder = folder();
        let mut engine = aio(Limits::default());
        let paths = [folder.path().join("from"), folder.path().join("to")];
        make(&paths[0], Format::Qed, SIZE);
        make(&paths[1], to, 1 << 40);
        let source = add(&mut engine, &paths[0], Format::Qed, false);
        let target = add(&mut engine, &paths[1], to, true);
        let mut model = vec![0; SIZE as usize];
        fill(&mut engine, source, &mut model, &mut Rng(3));
        let options = Copy { target_is_zero: true, piece: 4096, ..Copy::new(source, target) };
        let job = engine.start(options).expect("it starts");
        assert_eq!(end_of(&mut engine, job), Ok(()));
        assert!(read(&mut engine, target, SIZE) == model, "{to}");
    }
}

#[test]
fn with_the_least_that_an_engine_can_have() {
    let limits = Limits {
        requests: 1,
        ops: 4,
        buffers: 2,
        bounce_buffers: 1,
        buffer_size: 64 << 10,
        ..Limits::default()
    };
    for (from, to) in [
        (Format::Raw, Format::Qcow2),
        (Format::Qcow2, Format::Qed),
        (Format::Qed, Format::Qcow2),
        (Format::Vmdk, Format::Vdi),
        (Format::Vdi, Format::Vmdk),
    ] {
        copies(from, to, limits, true, 0);
        copies(from, to, limits, false, 65_536);
    }
}

#[test]
fn of_an_overlay_with_what_is_below_it() {
    let (folder, mut rng) = (folder(), Rng(3));
    let path = |name: &str| folder.path().join(name);
    let mut model = vec![0; SIZE as usize];
    make(&path("base"), Format::Qed, SIZE);
    let mut engine = aio(Limits::default());
    let base = add(&mut engine, &path("base"), Format::Qed, false);
    fill(&mut engine, base, &mut model, &mut rng);
    drain(&mut engine);
    drop(engine);
    let options = CreateOptions {
        backing_file: Some("base".into()),
        backing_format: Some(Format::Qed),
        size: Some(SIZE),
        ..CreateOptions::default()
    };
    make_with(&path("top"), Format::Qcow2, &options);
    make(&path("copy"), Format::Raw, SIZE);
    let mut engine = aio(Limits::default());
    let top = add(&mut engine, &path("top"), Format::Qcow2, false);
    fill(&mut engine, top, &mut model, &mut rng);
    let copy = add(&mut engine, &path("copy"), Format::Raw, false);
    let job = engine.start(Copy::new(top, copy)).expect("it starts");
    assert_eq!(end_of(&mut engine, job), Ok(()));
    assert!(read(&mut engine, copy, SIZE) == model);
    drain(&mut engine);
}

#[test]
fn of_what_the_top_layer_has() {
    let (folder, mut rng) = (folder(), Rng(3));
    let path = |name: &str| folder.path().join(name);
    let mut below = vec![0; SIZE as usize];
    // Shorter than its overlay.
    let half = SIZE / 2;
    make(&path("base"), Format::Raw, half);
    let mut engine = aio(Limits::default());
    let base = add(&mut engine, &path("base"), Format::Raw, false);
    fill(&mut engine, base, &mut below[..half as usize], &mut rng);
    drain(&mut engine);
    drop(engine);
    let options = CreateOptions {
        backing_file: Some("base".into()),
        backing_format: Some(Format::Raw),
        cluster_size: Some(4096),
        size: Some(SIZE),
        ..CreateOptions::default()
    };
    make_with(&path("top"), Format::Qcow2, &options);
    make(&path("to"), Format::Raw, SIZE);
    let mut engine = aio(Limits::default());
    let top = add(&mut engine, &path("top"), Format::Qcow2, false);
    let to = add(&mut engine, &path("to"), Format::Raw, false);
    // Where the top layer says nothing the target stays.
    let mut model = vec![9; SIZE as usize];
    engine.submit(to, Io::write(0, SIZE), Buf::copied(&model), 0).expect("room");
    for (at, byte) in [(4096, 1), (100_000, 2), (SIZE - 4096, 3)] {
        let at = at / 4096 * 4096;
        model[at as usize..][..4096].fill(byte);
        engine.submit(top, Io::write(at, 4096), Buf::copied(&[byte; 4096]), 0).expect("room");
    }
    let zero = Io { kind: IoKind::Zero { unmap: false, fua: false }, offset: 65_536, len: 8192 };
    model[65_536..][..8192].fill(0);
    engine.submit(top, zero, Mem::None, 0).expect("room");
    assert!(settle(&mut engine).iter().all(|done| done.result == Ok(())));
    // Where nobody is below it, its silence means zeros.
    model[half as usize..(SIZE - 4096) as usize].fill(0);
    let job = engine.start(Copy { top_layers: Some(1), ..Copy::new(top, to) }).expect("it starts");
    assert_eq!(end_of(&mut engine, job), Ok(()));
    let copied = read(&mut engine, to, SIZE);
    assert_eq!(copied.iter().zip(&model).position(|(a, b)| a != b), None);
    drain(&mut engine);
}

/// An engine with a source full of bytes, and a target.
pub fn two<B: Backend<File = DiskFile>>(
    folder: &Path,
    engine: &mut Engine<Node, B>,
    to: Format,
) -> [NodeId; 2] {
    let paths = [folder.join("from"), folder.join("to")];
    make(&paths[0], Format::Raw, SIZE);
    make(&paths[1], to, SIZE);
    std::fs::write(&paths[0], vec![0x5a; SIZE as usize]).expect("a scratch file");
    [add(engine, &paths[0], Format::Raw, false), add(engine, &paths[1], to, false)]
}

#[test]
fn one_that_is_paused_or_canceled_stands_still() {
    let folder = folder();
    let mut engine = aio(Limits::default());
    let [from, to] = two(folder.path(), &mut engine, Format::Qcow2);
    let options = Copy { piece: 4096, in_flight: 3, ..Copy::new(from, to) };
    let job = engine.start(options).expect("it starts");
    // What it uses stays as it is.
    for node in [from, to] {
        assert_eq!(engine.close(node), Err(Why::InUse));
        assert_eq!(engine.pause(node), Err(Why::InUse));
        let shrink = Io { kind: IoKind::Truncate, offset: 512, len: 0 };
        engine.submit(node, shrink, Mem::None, 0).expect("room");
        assert_eq!(engine.poll().expect("it ended").result, Err(Errno::INVALID));
    }
    while engine.job_progress(job).expect("it runs").done == 0 {
        engine.run(clock());
    }
    assert!(engine.pause_job(job));
    while engine.run(clock()).again || is_readable(&engine, 50) {}
    let before = engine.job_progress(job);
    for _ in 0..100 {
        engine.run(clock());
    }
    assert_eq!(engine.job_progress(job), before);
    let done = before.expect("it is there").done;
    assert!(0 < done && done < SIZE, "{done} bytes");
    assert!(engine.resume_job(job));
    while engine.job_progress(job) == before {
        engine.run(clock());
    }
    assert!(engine.pause_job(job) && engine.cancel_job(job));
    assert_eq!(end_of(&mut engine, job), Err(Errno::CANCELED));
    assert!(engine.close(to).is_ok(), "nobody uses it any more");
    assert!(!engine.resume_job(job) && !engine.pause_job(job));
    // Another one, ended by a drain.
    make(&folder.path().join("other"), Format::Raw, SIZE);
    let other = add(&mut engine, &folder.path().join("other"), Format::Raw, false);
    let job = engine.start(Copy::new(from, other)).expect("it starts");
    engine.pause_job(job);
    engine.run(clock());
    drain(&mut engine);
    let canceled = NodeEvent::JobEnded { job, result: Err(Errno::CANCELED) };
    assert!(std::iter::from_fn(|| engine.poll_event()).any(|event| event == canceled));
}

#[test]
fn a_rate_is_kept() {
    let folder = folder();
    let mut engine: Engine<Node, _> = Engine::new(Inline::new(), Limits::default());
    let [from, to] = two(folder.path(), &mut engine, Format::Qed);
    let options = Copy { piece: 65_536, rate: Some(1 << 20), ..Copy::new(from, to) };
    let job = engine.start(options).expect("it starts");
    let (mut now, mut seconds) = (Time(1_000_000_000), 0.0);
    loop {
        while engine.run(now).again {}
        if let Some(event) = engine.poll_event() {
            assert_eq!(event, NodeEvent::JobEnded { job, result: Ok(()) });
            break;
        }
        let done = engine.job_progress(job).expect("it runs").done as f64;
        assert!(done <= (seconds + 0.07) * 1_048_576.0, "{done} bytes in {seconds} s");
        let due = engine.next_deadline().expect("it waits for its time");
        assert!(due > now, "{due:?} has come");
        (now, seconds) = (due, due.since(Time(1_000_000_000)) as f64 / 1e9);
    }
    // 4 MiB, of which the last piece begins a sixteenth of a second before.
    assert!((3.8..4.2).contains(&seconds), "{seconds} s");
    assert!(read(&mut engine, to, SIZE).iter().all(|&byte| byte == 0x5a));
}

#[test]
fn what_cannot_be_copied_is_refused() {
    let folder = folder();
    let mut engine = aio(Limits::default());
    let [from, to] = two(folder.path(), &mut engine, Format::Qed);
    make(&folder.path().join("small"), Format::Raw, SIZE / 2);
    let small = add(&mut engine, &folder.path().join("small"), Format::Raw, false);
    assert_eq!(engine.start(Copy::new(from, from)), Err(Why::InUse));
    assert_eq!(engine.start(Copy::new(from, small)), Err(Why::TooSmall));
    engine.close(to).expect("nobody uses it");
    assert_eq!(engine.start(Copy::new(from, to)), Err(Why::Closing));
    drain(&mut engine);
    assert_eq!(engine.start(Copy::new(from, to)), Err(Why::NoSuchNode));
    assert!(engine.drained().is_some(), "who is refused does not open it again");
}

#[test]
fn the_first_error_ends_it() {
    for (on_target, what) in [(false, What::Read), (true, What::Write), (true, What::Flush)] {
        let folder = folder();
        let backend = Faulty::new(Aio::new(AioOptions::default()).expect("native AIO"));
        let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
        let [from, to] = two(folder.path(), &mut engine, Format::Qed);
        let failing = [from, to][usize::from(on_target)];
        let mut files = (0..2).map(FileId);
        let file = files.find(|&file| engine.node(failing).uses(file)).expect("it has a file");
        let errno = Errno::NO_SPACE;
        let fails = Some(errno);
        let plan = Fault { what: Some(what), file: Some(file), errno: fails, ..Fault::default() };
        engine.backend_mut().plan_mut().push(plan);
        let copy = Copy { piece: 65_536, in_flight: 1, ..Copy::new(from, to) };
        let job = engine.start(copy).expect("it starts");
        let mut told = None;
        let result = loop {
            engine.run(clock());
            match engine.poll_event() {
                Some(NodeEvent::JobEnded { result, .. }) => break result,
                event => told = event.or(told),
            }
        };
        assert_eq!(result, Err(errno), "{what:?}");
        // (A flush may be part of a write.)
        let error = NodeEvent::JobError { job, node: failing, at: 0, len: 65_536, errno };
        assert!(told == Some(error) || what == What::Flush && told.is_some(), "{what:?}: {told:?}");
        assert!(engine.backend().injected() > 0);
        // Nothing of it is left, and both can be used on.
        engine.backend_mut().plan_mut().clear();
        if what != What::Flush {
            let job = engine.start(Copy::new(from, to)).expect("it starts");
            assert_eq!(end_of(&mut engine, job), Ok(()), "{what:?}");
            assert!(read(&mut engine, to, SIZE).iter().all(|&byte| byte == 0x5a));
            drain(&mut engine);
        }
    }
}

/// What is shown of a source is all that it has: in order, each byte once, zeros between.
#[test]
fn what_is_read_is_shown_in_order() {
    for (format, zeros, piece, in_flight) in [
        (Format::Raw, Zeros::Found, 4096, 16),
        (Format::Qcow2, Zeros::Told, 65_536, 8),
        (Format::Qed, Zeros::Written, 256 << 10, 3),
    ] {
        let folder = folder();
        let mut engine = aio(Limits::default());
        let formats = (format, Format::Raw);
        let (disks, models) = filled(&mut engine, folder.path(), formats, [SIZE, 2 * SIZE]);
        let forms = Copy { shown: true, zeros, piece, in_flight, ..Copy::new(disks[0], disks[1]) };
        let copy = Copy { source_offset: 512, target_offset: 1024, ..forms };
        let job = engine.start(copy).expect("it starts");
        let mut shown = vec![0; SIZE as usize - 512];
        let mut last = 0;
        let result = loop {
            let again = engine.run(clock()).again;
            if let Some((at, bytes)) = engine.job_read(job) {
                let at = at as usize;
                assert!(at >= last && !bytes.is_empty(), "{at} after {last}");
                last = at + bytes.len();
                shown[at..last].copy_from_slice(bytes);
                assert!(engine.job_seen(job), "it waits for that");
                continue;
            }
            match engine.poll_event() {
                Some(NodeEvent::JobEnded { result, .. }) => break result,
                Some(event) => panic!("{event:?}"),
                None => assert!(again || wait(&engine), "nothing wakes the loop: {engine:?}"),
            }
        };
        assert_eq!(result, Ok(()));
        assert!(shown == models[0][512..], "{copy:?}");
        assert!(read(&mut engine, disks[1], 2 * SIZE)[1024..][..shown.len()] == shown);
        // One that nobody looks at can be cancelled.
        let job = engine.start(copy).expect("it starts");
        while engine.job_read(job).is_none() {
            assert!(engine.run(clock()).again || wait(&engine), "nothing is read: {engine:?}");
        }
        engine.cancel_job(job);
        assert_eq!(engine.job_read(job), None);
        assert!(!engine.job_seen(job), "nothing waits for that");
        assert_eq!(end_of(&mut engine, job), Err(Errno::CANCELED));
        for moment in [Moment::Start, Moment::End] {
            assert_eq!(engine.start(Copy { moment, ..copy }), Err(Why::OutOfOrder));
        }
        drain(&mut engine);
    }
}

#[test]
fn what_cannot_be_read_becomes_zeros() {
    for (zeros, piece) in [(Zeros::Told, 65_536), (Zeros::Found, 4096), (Zeros::Found, 1 << 20)] {
        let folder = folder();
        let backend = Faulty::new(Aio::new(AioOptions::default()).expect("native AIO"));
        let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
        let [from, to] = two(folder.path(), &mut engine, Format::Qcow2);
        let file = (0..2).map(FileId).find(|&file| engine.node(from).uses(file)).expect("its file");
        let errno = Errno::IO;
        // Also at a piece's first byte, and its last.
        let mut bad = vec![(65_536, 512), (200_000, 700), ((1 << 20) - 1, 1), (SIZE - 512, 512)];
        bad.sort();
        for &(start, len) in &bad {
            let (what, bytes) = (Some(What::Read), (start, start + len));
            let plan =
                Fault { what, file: Some(file), errno: Some(errno), bytes, ..Fault::default() };
            engine.backend_mut().plan_mut().push(plan);
        }
        let copy = Copy { salvage: true, zeros, piece, in_flight: 3, ..Copy::new(from, to) };
        let job = engine.start(copy).expect("it starts");
        let mut lost = vec![0x5a; SIZE as usize];
        let result = loop {
            engine.run(clock());
            match engine.poll_event() {
                Some(NodeEvent::JobEnded { result, .. }) => break result,
                Some(NodeEvent::JobError { job: of, node, at, len, errno: why }) => {
                    assert_eq!((of, node, why, at % 512), (job, from, errno, 0));
                    lost[at as usize..][..len as usize].fill(0);
                }
                _ => {}
            }
        };
        assert_eq!(result, Ok(()));
        let mut model = vec![0x5a; SIZE as usize];
        for (start, len) in bad {
            let (from, to) = (start / 512 * 512, (start + len).next_multiple_of(512));
            model[from as usize..to as usize].fill(0);
        }
        assert!(lost == model, "each is told of");
        assert!(read(&mut engine, to, SIZE) == model, "{zeros:?}");
    }
}
