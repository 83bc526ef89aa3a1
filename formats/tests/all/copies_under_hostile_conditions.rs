//! Copies whose source is written to meanwhile, whose target is full, that are canceled at any moment;
//! of chains, of odd sizes, of compressed images, of disks that are huge and empty.

use std::path::Path;

use crate::common::drive::{add, check, drain, folder, make, make_with, settle, wait};
use crate::common::shadow::Rng;
use crate::common::{have_qemu, ok, run};
use crate::copies_run_beside_guests::{FORMATS, SIZE, aio, end_of, fill, read, two};
use cowbell_engine::backend::Backend;
use cowbell_engine::faulty::{Fault, Faulty, What};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Driver, Io, IoKind};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, FileId, JobId, NodeId, Time};
use cowbell_engine::{Copy, Engine, Limits, NodeEvent};
use cowbell_formats::vmdk::disk::descriptor::Kind;
use cowbell_formats::vmdk::rest::create::Wanted;
use cowbell_formats::{CreateOptions, Format, Node};

/// What each byte of a disk has been: a bit for each value.
struct History(Vec<[u64; 4]>);

impl History {
    fn new(bytes: &[u8]) -> History {
        let mut history = History(vec![[0; 4]; bytes.len()]);
        for (at, &byte) in bytes.iter().enumerate() {
            history.may_be(at as u64, 1, byte);
        }
        history
    }

    fn may_be(&mut self, at: u64, len: u64, byte: u8) {
        for values in &mut self.0[at as usize..(at + len) as usize] {
            values[usize::from(byte) / 64] |= 1 << (byte % 64);
        }
    }

    fn was(&self, at: usize, byte: u8) -> bool {
        self.0[at][usize::from(byte) / 64] >> (byte % 64) & 1 == 1
    }
}

/// A guest that writes and zeroes at random, until the job has ended. How many it began.
fn copy_beside_a_guest<B: Backend>(engine: &mut Engine<Node, B>, copy: Copy, model: &[u8]) -> u64 {
    let (mut history, mut rng) = (History::new(model), Rng(model.len() as u64));
    let job = engine.start(copy).expect("it starts");
    let mut written = 0;
    let source = copy.source;
    let ended = loop {
        while engine.in_flight() < 12 {
            let at = rng.below(model.len() as u64 - 1);
            let len = (1 + rng.below(20_000)).min(model.len() as u64 - at);
            let byte = if written % 5 == 0 { 0 } else { 1 + rng.below(255) as u8 };
            let zero = IoKind::Zero { unmap: written % 2 == 0, fua: false };
            let (io, mem): (Io, Mem) = match byte {
                0 => (Io { kind: zero, offset: at, len }, Mem::None),
                _ => (Io::write(at, len), Buf::copied(&vec![byte; len as usize]).into()),
            };
            engine.submit(source, io, mem, 0).expect("room");
            history.may_be(at, len, byte);
            written += 1;
        }
        let again = engine.run(clock()).again;
        let mut any = false;
        while let Some(done) = engine.poll() {
            assert_eq!(done.result, Ok(()));
            any = true;
        }
        match engine.poll_event() {
            Some(NodeEvent::JobEnded { job: ended, result }) => {
                assert_eq!(ended, job);
                break result;
            }
            Some(event) => panic!("{event:?}"),
            None => {}
        }
        assert!(again || any || wait(engine), "nothing wakes the loop: {engine:?}");
    };
    assert_eq!(ended, Ok(()));
    settle(engine);
    let copied = read(engine, copy.target, model.len() as u64);
    let differs = (0..copied.len()).find(|&at| !history.was(at, copied[at]));
    assert_eq!(differs, None, "the source never had this");
    written
}

#[test]
fn each_byte_is_as_it_was_at_some_moment() {
    let size = (1 << 20) + 5 * 512;
    let mut written = 0;
    for (n, from) in FORMATS.into_iter().enumerate() {
        let (folder, mut rng) = (folder(), Rng(n as u64));
        let to = FORMATS[(n + 2) % FORMATS.len()];
        let mut engine = aio(Limits::default());
        let paths = [folder.path().join("from"), folder.path().join("to")];
        make(&paths[0], from, size);
        make(&paths[1], to, size);
        let source = add(&mut engine, &paths[0], from, n % 2 == 0);
        let target = add(&mut engine, &paths[1], to, n % 2 == 1);
        let mut model = vec![0; size as usize];
        fill(&mut engine, source, &mut model, &mut rng);
        let copy = Copy { piece: 8192, in_flight: 3, ..Copy::new(source, target) };
        written += copy_beside_a_guest(&mut engine, Copy { target_is_zero: true, ..copy }, &model);
        // Onto what is there.
        let model = read(&mut engine, source, size);
        written += copy_beside_a_guest(&mut engine, copy, &model);
        drain(&mut engine);
        drop(engine);
        assert_eq!(check(&paths[1], to), (0, 0), "{to}");
    }
    // Twelve are begun before anything is copied.
    assert!(written > 200, "{written} writes were begun in ten copies");
}

/// Three layers of different formats and sizes, each with bytes of its own; what the top one shows.
fn chain_of_three(folder: &Path, size: u64) -> Vec<u8> {
    let mut rng = Rng(9);
    let mut model = vec![0; size as usize];
    let layers = [
        ("base", Format::Raw, (1 << 20) + 3 * 512),
        ("middle", Format::Qed, 3 << 20),
        ("top", Format::Qcow2, size),
    ];
    let mut below: Option<(&str, Format)> = None;
    for (name, format, size) in layers {
        let options = CreateOptions {
            backing_file: below.map(|(name, _)| name.into()),
            backing_format: below.map(|(_, format)| format),
            size: Some(size),
            ..CreateOptions::default()
        };
        make_with(&folder.join(name), format, &options);
        let mut engine = aio(Limits::default());
        let disk = add(&mut engine, &folder.join(name), format, false);
        fill(&mut engine, disk, &mut model[..size as usize], &mut rng);
        drain(&mut engine);
        below = Some((name, format));
    }
    model
}

#[test]
fn a_chain_is_copied_as_its_guest_sees_it() {
    let size = (5 << 20) + 7 * 512;
    let folder = folder();
    let model = chain_of_three(folder.path(), size);
    for to in FORMATS {
        let path = folder.path().join(format!("to.{to}"));
        make(&path, to, size);
        let mut engine = aio(Limits::default());
        let top = add(&mut engine, &folder.path().join("top"), Format::Qcow2, true);
        let target = add(&mut engine, &path, to, true);
        let copy = Copy { target_is_zero: true, ..Copy::new(top, target) };
        let job = engine.start(copy).expect("it starts");
        assert_eq!(end_of(&mut engine, job), Ok(()));
        assert!(read(&mut engine, target, size) == model, "{to}");
        drain(&mut engine);
        drop(engine);
        assert_eq!(check(&path, to), (0, 0), "{to}");
    }
    // And while a guest writes to the top of it.
    let mut engine = aio(Limits::default());
    let top = add(&mut engine, &folder.path().join("top"), Format::Qcow2, true);
    let target = add(&mut engine, &folder.path().join("to.raw"), Format::Raw, true);
    let copy = Copy { piece: 8192, in_flight: 3, ..Copy::new(top, target) };
    assert!(copy_beside_a_guest(&mut engine, copy, &model) > 12, "none was begun meanwhile");
    drain(&mut engine);
}

#[test]
fn sizes_need_fit_no_piece() {
    let folder = folder();
    for (size, piece, in_flight) in [
        (512, 4096, 1),
        (4096 + 512, 4096, 64),
        (65_536 - 512, 12_288, 3),
        (3 * (1 << 20) + 512, 1 << 20, 2),
        ((1 << 20) + 1536, 12_288, 5),
    ] {
        for (from, to) in [(Format::Raw, Format::Qcow2), (Format::Qcow2, Format::Vmdk)] {
            let paths = [folder.path().join("from"), folder.path().join("to")];
            paths.iter().for_each(|path| drop(std::fs::remove_file(path)));
            make(&paths[0], from, size);
            make(&paths[1], to, size);
            let mut engine: Engine<Node, _> = Engine::new(Inline::new(), Limits::default());
            let source = add(&mut engine, &paths[0], from, false);
            let target = add(&mut engine, &paths[1], to, false);
            let mut model = vec![0; size as usize];
            fill(&mut engine, source, &mut model, &mut Rng(size));
            let copy = Copy { piece, in_flight, ..Copy::new(source, target) };
            let job = engine.start(copy).expect("it starts");
            assert_eq!(end_of(&mut engine, job), Ok(()));
            assert!(read(&mut engine, target, size) == model, "{size} bytes in pieces of {piece}");
            drain(&mut engine);
        }
    }
}

/// The file that is only this node's.
fn file_of<B: Backend>(engine: &Engine<Node, B>, node: NodeId) -> FileId {
    let mut files = (0..4).map(FileId);
    files.find(|&file| engine.node(node).uses(file)).expect("it has a file")
}

#[test]
fn a_target_that_becomes_full_ends_it_and_stays_sound() {
    for to in FORMATS {
        for (what, after) in [0, 1, 2, 3, 5, 8, 13, 21, 34]
            .into_iter()
            .flat_map(|after| [(Some(What::Write), after), (None, after)])
        {
            let folder = folder();
            let backend = Faulty::new(Inline::new());
            let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
            let [from, target] = two(folder.path(), &mut engine, to);
            let file = Some(file_of(&engine, target));
            let errno = Some(Errno::NO_SPACE);
            let plan = Fault { what, file, after, errno, ..Fault::default() };
            engine.backend_mut().plan_mut().push(plan);
            let copy = Copy { piece: 131_072, ..Copy::new(from, target) };
            let job = engine.start(copy).expect("it starts");
            let ended = end_of(&mut engine, job);
            let is_full = engine.backend().injected() > 0;
            assert!(ended == Err(Errno::NO_SPACE) || !is_full && ended == Ok(()), "{to} {after}");
            drop(engine);
            let path = folder.path().join("to");
            assert_eq!(check(&path, to).0, 0, "{to} {what:?} {after}");
            // Opened again, when there is room, it takes the copy.
            let mut engine: Engine<Node, _> = Engine::new(Inline::new(), Limits::default());
            let from = add(&mut engine, &folder.path().join("from"), Format::Raw, false);
            let target = add(&mut engine, &path, to, false);
            let job = engine.start(Copy::new(from, target)).expect("it starts");
            assert_eq!(end_of(&mut engine, job), Ok(()), "{to} {what:?} {after}");
            assert!(read(&mut engine, target, SIZE).iter().all(|&byte| byte == 0x5a));
            drain(&mut engine);
            drop(engine);
            assert_eq!(check(&path, to).0, 0, "{to} {what:?} {after}");
        }
    }
}

/// A file system in memory of 2 MiB, for as long as it lives.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    /// `None`: there may be none here, as is said.
    fn mounted_on(path: &'a Path) -> Option<Small<'a>> {
        std::fs::create_dir(path).expect("a folder");
        let there = path.display();
        let mounted = run(path, &format!("mount -t tmpfs -o size=2m tmpfs '{there}'"));
        if !mounted.status.success() {
            let why = String::from_utf8_lossy(&mounted.stderr);
            let why = format!("SKIPPED: no small file system can be mounted: {why}\n");
            let _ = std::io::Write::write_all(&mut std::io::stderr(), why.as_bytes());
            return None;
        }
        Some(Small(path))
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        run(Path::new("/"), &format!("umount -l '{}'", self.0.display()));
    }
}

#[test]
fn a_file_system_that_is_full_ends_it() {
    for to in FORMATS {
        let folder = folder();
        let path = folder.path().join("small");
        let Some(small) = Small::mounted_on(&path) else { return };
        let mut engine = aio(Limits::default());
        let [from, _] = two(folder.path(), &mut engine, Format::Raw);
        make(&small.0.join("target"), to, SIZE);
        let target = add(&mut engine, &small.0.join("target"), to, false);
        let job = engine.start(Copy::new(from, target)).expect("it starts");
        assert_eq!(end_of(&mut engine, job), Err(Errno::NO_SPACE), "{to}");
        drop(engine);
        assert_eq!(check(&small.0.join("target"), to).0, 0, "{to}");
    }
}

/// Runs until so many turns had something to do, or the job has ended: how, then.
fn run_up_to<B: Backend>(
    engine: &mut Engine<Node, B>,
    turns: usize,
    job: JobId,
) -> Option<Result<(), Errno>> {
    let mut done = 0;
    while done < turns {
        done += usize::from(engine.run(clock()).steps > 0);
        if let Some(event) = engine.poll_event() {
            let NodeEvent::JobEnded { job: ended, result } = event else { panic!("{event:?}") };
            assert_eq!(ended, job);
            return Some(result);
        }
    }
    None
}

#[test]
fn a_cancel_at_any_moment_leaves_nothing() {
    const SMALL: u64 = 300 << 10;
    for to in FORMATS {
        let mut moments = 0;
        for turns in 0.. {
            let folder = folder();
            // Each op comes back in a later turn: so there are many moments.
            let mut backend = Faulty::new(Inline::new());
            backend.plan_mut().push(Fault::late(50_000));
            let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
            let paths = [folder.path().join("from"), folder.path().join("to")];
            make(&paths[0], Format::Raw, SMALL);
            make(&paths[1], to, SMALL);
            std::fs::write(&paths[0], vec![0x5a; SMALL as usize]).expect("a scratch file");
            let from = add(&mut engine, &paths[0], Format::Raw, false);
            let target = add(&mut engine, &paths[1], to, false);
            let copy = Copy { piece: 12_288, in_flight: 3, ..Copy::new(from, target) };
            let job = engine.start(copy).expect("it starts");
            if let Some(result) = run_up_to(&mut engine, turns, job) {
                assert_eq!(result, Ok(()));
                break;
            }
            moments += 1;
            let before = engine.job_progress(job).expect("it runs");
            assert!(before.done <= before.total);
            assert!(engine.cancel_job(job) && engine.cancel_job(job));
            let ended = end_of(&mut engine, job);
            let was_ending = before.done == before.total && ended == Ok(());
            assert!(ended == Err(Errno::CANCELED) || was_ending, "{ended:?}");
            // Both are free.
            assert_eq!(engine.pause(from), Ok(()));
            assert_eq!(engine.close(target), Ok(()));
            while engine.has(target) {
                engine.run(clock());
            }
            drop(engine.take_files(target));
            drain(&mut engine);
            drop(engine);
            assert_eq!(check(&paths[1], to), (0, 0), "{to}, {turns}");
        }
        assert!(moments > 15, "{moments} moments");
    }
}

#[test]
fn what_is_compressed_is_copied_and_a_stream_takes_a_copy() {
    let (folder, size) = (folder(), SIZE + 512);
    let path = |name: &str| folder.path().join(name);
    make(&path("plain"), Format::Raw, size);
    let mut engine = aio(Limits::default());
    let disk = add(&mut engine, &path("plain"), Format::Raw, false);
    let mut model = vec![0; size as usize];
    fill(&mut engine, disk, &mut model, &mut Rng(4));
    drain(&mut engine);
    drop(engine);
    // A stream is written once, whole grains of 64 KiB, zeros not at all.
    let vmdk = Wanted { kind: Some(Kind::StreamOptimized), ..Wanted::default() };
    let stream = CreateOptions { size: Some(size), vmdk, ..CreateOptions::default() };
    make_with(&path("stream"), Format::Vmdk, &stream);
    let mut sources = vec![("plain", Format::Raw, "stream", Format::Vmdk)];
    sources.push(("stream", Format::Vmdk, "again", Format::Qcow2));
    if have_qemu() {
        ok(folder.path(), "qemu-img convert -c -f raw -O qcow2 plain packed");
        sources.push(("packed", Format::Qcow2, "unpacked", Format::Qed));
        make_with(&path("stream2"), Format::Vmdk, &stream);
        sources.push(("packed", Format::Qcow2, "stream2", Format::Vmdk));
    }
    for (from, format, to, target_format) in sources {
        if !path(to).exists() {
            make(&path(to), target_format, size);
        }
        let mut engine = aio(Limits::default());
        let source = add(&mut engine, &path(from), format, false);
        let target = add(&mut engine, &path(to), target_format, false);
        let copy = Copy { target_is_zero: true, unit: 64 << 10, ..Copy::new(source, target) };
        let job = engine.start(copy).expect("it starts");
        assert_eq!(end_of(&mut engine, job), Ok(()), "{from} to {to}");
        assert!(read(&mut engine, target, size) == model, "{from} to {to}");
        drain(&mut engine);
        drop(engine);
        assert_eq!(check(&path(to), target_format), (0, 0), "{from} to {to}");
    }
}

const HUGE: u64 = 8 << 40;

/// A disk of 8 TiB with a few bytes here and there, and an empty one.
fn huge<B: Backend<File = cowbell_engine::sys::disk::DiskFile>>(
    folder: &Path,
    engine: &mut Engine<Node, B>,
    bytes: &[u64],
) -> [NodeId; 2] {
    let disks = ["from", "to"].map(|name| {
        make(&folder.join(name), Format::Qcow2, HUGE);
        add(engine, &folder.join(name), Format::Qcow2, false)
    });
    for &at in bytes {
        engine.submit(disks[0], Io::write(at, 512), Buf::copied(&[7; 512]), 0).expect("room");
        settle(engine);
    }
    disks
}

#[test]
fn a_huge_empty_disk_is_copied_at_once() {
    let there = [0, 5 << 40, HUGE - 512];
    for (bytes, target_is_zero) in [(&there[..0], true), (&there[..], true), (&there[..], false)] {
        let folder = folder();
        let mut engine: Engine<Node, _> = Engine::new(Inline::new(), Limits::default());
        let [from, to] = huge(folder.path(), &mut engine, bytes);
        let job = engine.start(Copy { target_is_zero, ..Copy::new(from, to) }).expect("it starts");
        let (mut steps, mut before) = (0, 0);
        let result = loop {
            let progress = engine.run(clock());
            steps += progress.steps;
            if let Some(NodeEvent::JobEnded { result, .. }) = engine.poll_event() {
                break result;
            }
            let done = engine.job_progress(job).expect("it runs").done;
            assert!(before <= done && done <= HUGE);
            before = done;
        };
        assert_eq!(result, Ok(()));
        // A question for each slice of a table, of 32 MiB, its answer, and what becomes of it.
        let slices = (HUGE / (32 << 20)) as usize;
        assert!(steps < 6 * slices, "{steps} steps");
        for at in [0, 5 << 40, 6 << 40, HUGE - 512] {
            let expected = if bytes.contains(&at) { 7 } else { 0 };
            engine.submit(to, Io::read(at, 512), Buf::zeroed(512), 0).expect("room");
            let done = settle(&mut engine).pop().expect("it ended");
            let read = done.mem.into_buf().expect("it was lent");
            assert!(read.iter().all(|&byte| byte == expected), "at {at}");
        }
        drain(&mut engine);
    }
}

#[test]
fn zeros_cost_no_rate() {
    let folder = folder();
    let mut engine: Engine<Node, _> = Engine::new(Inline::new(), Limits::default());
    let cluster = 65_536;
    // Thirty-two clusters of 64 KiB, far apart.
    let bytes: Vec<u64> = (0..32).map(|n| n * (HUGE / 32)).collect();
    let [from, to] = huge(folder.path(), &mut engine, &bytes);
    let rate = Some(cluster * 16);
    let copy = Copy { target_is_zero: true, rate, ..Copy::new(from, to) };
    let job = engine.start(copy).expect("it starts");
    let began = clock();
    let mut now = began;
    loop {
        while engine.run(now).again {}
        if let Some(event) = engine.poll_event() {
            assert_eq!(event, NodeEvent::JobEnded { job, result: Ok(()) });
            break;
        }
        now = engine.next_deadline().expect("it waits for its time").max(Time(now.0 + 1));
    }
    let seconds = now.since(began) as f64 / 1e9;
    // The last of them begins a sixteenth of a second before the second is over.
    assert!((1.8..2.2).contains(&seconds), "{seconds} s");
}

#[test]
fn a_pause_in_the_middle_of_zeros_holds_it() {
    let folder = folder();
    let mut engine: Engine<Node, _> = Engine::new(Inline::new(), Limits::default());
    let [from, to] = huge(folder.path(), &mut engine, &[HUGE / 2]);
    let copy = Copy { target_is_zero: true, ..Copy::new(from, to) };
    let job = engine.start(copy).expect("it starts");
    while engine.job_progress(job).expect("it runs").done == 0 {
        engine.run(clock());
    }
    assert!(engine.pause_job(job));
    while engine.run(clock()).again {}
    let before = engine.job_progress(job);
    let at = before.expect("it runs").done;
    assert!(0 < at && at < HUGE, "{at} bytes");
    // What is written now is copied, although zeros were seen there just before.
    engine.submit(from, Io::write(at, 512), Buf::copied(&[9; 512]), 0).expect("room");
    settle(&mut engine);
    assert_eq!(engine.job_progress(job), before);
    assert_eq!(engine.next_deadline().filter(|due| *due <= clock()), None, "nothing is due");
    assert!(engine.resume_job(job));
    assert_eq!(end_of(&mut engine, job), Ok(()));
    engine.submit(to, Io::read(at, 512), Buf::zeroed(512), 0).expect("room");
    let read = settle(&mut engine).pop().expect("it ended").mem.into_buf().expect("it was lent");
    assert!(read.iter().all(|&byte| byte == 9));
    drain(&mut engine);
}
