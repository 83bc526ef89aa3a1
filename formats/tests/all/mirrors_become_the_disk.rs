//! A mirror is the disk when it has ended, while its guest goes on: nothing that was written is lost on the
//! way, and the guest does not notice.

use crate::backups_are_of_one_moment::{Guest, file_of, two};
use crate::common::drive::{add, check, drain, folder, make, make_with, settle, wait};
use crate::copies_run_beside_guests::{FORMATS, SIZE, aio, end_of, read};
use cowbell_engine::backend::Backend;
use cowbell_engine::faulty::{Fault, Faulty, What};
use cowbell_engine::mem::Buf;
use cowbell_engine::step::Io;
use cowbell_engine::sys::clock;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, NodeId};
use cowbell_engine::{Copy, Engine, Limits, Moment, NodeEvent, Why};
use cowbell_formats::{CreateOptions, Format, Node};
use std::time::Duration;

/// Closes a node, and looks that it went well.
pub fn close<B: Backend>(engine: &mut Engine<Node, B>, node: NodeId, leaves_below: bool) {
    let closing = if leaves_below { engine.close_filter(node) } else { engine.close(node) };
    closing.expect("it is closed");
    loop {
        let again = engine.run(clock()).again;
        if let Some(NodeEvent::Closed { node: gone, result }) = engine.poll_event() {
            assert_eq!((gone, result), (node, Ok(())));
            return;
        }
        assert!(again || wait(engine), "nothing wakes the loop: {engine:?}");
    }
}

/// Some more requests, to whichever disk it is now.
pub fn goes_on<B: Backend>(engine: &mut Engine<Node, B>, guest: &mut Guest) {
    let before = guest.ended;
    while guest.ended < before + 100 {
        guest.submit(engine);
        let again = engine.run(clock()).again;
        assert!(guest.poll(engine) || again || wait(engine), "{engine:?}");
    }
    while !guest.busy.is_empty() {
        let again = engine.run(clock()).again;
        assert!(guest.poll(engine) || again || wait(engine), "{engine:?}");
    }
}

#[test]
fn of_every_format() {
    for (n, from) in FORMATS.into_iter().enumerate() {
        let to = FORMATS[(n + 2) % FORMATS.len()];
        let folder = folder();
        let mut engine = aio(Limits::default());
        let ([source, target], model) = two(&mut engine, folder.path(), (from, to));
        let mut guest = Guest::new(source, &model);
        // There are writes in flight already.
        guest.submit(&mut engine);
        engine.run(clock());
        let copy = Copy { moment: Moment::End, piece: 65_536, ..Copy::new(source, target) };
        let job = engine.start(copy).expect("it starts");
        assert_eq!(guest.run_beside(&mut engine, job), Ok(()), "{from} to {to}");
        assert_eq!(guest.misses(&mut engine), None, "{from} to {to}: by the old id");
        goes_on(&mut engine, &mut guest);
        assert_eq!(engine.close(target), Err(Why::InUse), "the old id still leads to it");
        close(&mut engine, source, false);
        let gone = engine.submit(source, Io::flush(), cowbell_engine::mem::Mem::None, 0);
        assert_eq!(gone.map_err(|refused| refused.why), Err(Why::NoSuchNode));
        guest.disk = target;
        assert_eq!(guest.misses(&mut engine), None, "{from} to {to}: by its own");
        goes_on(&mut engine, &mut guest);
        assert_eq!(guest.misses(&mut engine), None);
        drain(&mut engine);
        drop(engine);
        assert_eq!(check(&folder.path().join("to"), to), (0, 0), "{to}");
    }
}

/// An overlay's contents go down while it is written, and its guest goes on below.
#[test]
fn into_the_layer_below() {
    for format in [Format::Qcow2, Format::Qed] {
        let folder = folder();
        let mut engine = aio(Limits::default());
        let base = folder.path().join("base");
        make(&base, Format::Qcow2, SIZE);
        let below = add(&mut engine, &base, Format::Qcow2, false);
        let mut model = vec![0; SIZE as usize];
        let mut rng = crate::common::shadow::Rng(8);
        crate::copies_run_beside_guests::fill(&mut engine, below, &mut model, &mut rng);
        let options = CreateOptions {
            backing_file: Some("base".into()),
            backing_format: Some(Format::Qcow2),
            size: Some(SIZE),
            ..CreateOptions::default()
        };
        let path = folder.path().join("top");
        make_with(&path, format, &options);
        let options = cowbell_formats::OpenOptions {
            format: Some(format),
            write: true,
            ..cowbell_formats::OpenOptions::default()
        };
        let host = cowbell_formats::DiskHost::default();
        let layer = cowbell_formats::chain::open_layer(&host, &path, &options).expect("it opens");
        let chain = cowbell_formats::Chain { layers: vec![layer] };
        let run = cowbell_formats::RunOptions::default();
        let top =
            cowbell_formats::attach_overlay(&mut engine, chain, below, &run).expect("over it");
        let mut guest = Guest::new(top, &model);
        goes_on(&mut engine, &mut guest);
        let copy = Copy { moment: Moment::End, top_layers: Some(1), ..Copy::new(top, below) };
        let job = engine.start(copy).expect("it starts");
        assert_eq!(guest.run_beside(&mut engine, job), Ok(()), "{format}");
        goes_on(&mut engine, &mut guest);
        close(&mut engine, top, true);
        guest.disk = below;
        assert_eq!(guest.misses(&mut engine), None, "{format}");
        drain(&mut engine);
        drop(engine);
        assert_eq!(check(&base, Format::Qcow2), (0, 0));
    }
}

#[test]
fn one_that_fails_leaves_the_guest_where_it_was() {
    for to in FORMATS {
        for (what, after) in [(What::Write, 0), (What::Write, 9), (What::Flush, 0)] {
            let folder = folder();
            let backend = Faulty::new(Inline::new());
            let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
            let ([source, target], model) = two(&mut engine, folder.path(), (Format::Vdi, to));
            let file = Some(file_of(&engine, target));
            let plan =
                Fault { what: Some(what), file, after, errno: Some(Errno::IO), ..Fault::default() };
            engine.backend_mut().plan_mut().push(plan);
            let mut guest = Guest::new(source, &model);
            let copy = Copy { moment: Moment::End, piece: 65_536, ..Copy::new(source, target) };
            let job = engine.start(copy).expect("it starts");
            let ended = guest.run_beside(&mut engine, job);
            let failed = engine.backend().injected() > 0;
            assert!(
                ended == Err(Errno::IO) || !failed && ended == Ok(()),
                "{to} {what:?} {ended:?}"
            );
            goes_on(&mut engine, &mut guest);
            assert_eq!(guest.misses(&mut engine), None, "{to} {what:?}");
        }
    }
}

#[test]
fn a_pause_lets_the_guest_go_and_a_cancel_ends_it() {
    let folder = folder();
    let mut engine = aio(Limits::default());
    let ([source, target], model) = two(&mut engine, folder.path(), (Format::Qcow2, Format::Raw));
    let copy =
        Copy { moment: Moment::End, piece: 65_536, in_flight: 2, ..Copy::new(source, target) };
    let job = engine.start(copy).expect("it starts");
    let mut guest = Guest::new(source, &model);
    for _ in 0..5 {
        assert!(engine.pause_job(job));
        goes_on(&mut engine, &mut guest);
        assert!(engine.resume_job(job));
        guest.submit(&mut engine);
        engine.run(clock());
        guest.poll(&mut engine);
        if engine.job_progress(job).is_none() {
            break;
        }
    }
    if engine.cancel_job(job) {
        assert_eq!(guest.run_beside(&mut engine, job), Err(Errno::CANCELED));
    }
    goes_on(&mut engine, &mut guest);
    assert_eq!(guest.misses(&mut engine), None);
    // Again, to its end.
    while engine.poll_event().is_some() {}
    if engine.start(copy).is_ok_and(|job| guest.run_beside(&mut engine, job) == Ok(())) {
        close(&mut engine, source, false);
        guest.disk = target;
        assert_eq!(guest.misses(&mut engine), None);
    }
    drain(&mut engine);
}

/// What a slow target cannot keep up with is waited for in the end, and no longer than said.
#[test]
fn a_busy_guest_does_not_keep_it_from_its_end() {
    let folder = folder();
    let backend = Faulty::new(Inline::new());
    let mut engine: Engine<Node, _> = Engine::new(backend, Limits::default());
    let ([source, target], model) = two(&mut engine, folder.path(), (Format::Raw, Format::Raw));
    let file = Some(file_of(&engine, target));
    let slow = Fault { what: Some(What::Write), file, ..Fault::late(300_000) };
    engine.backend_mut().plan_mut().push(slow);
    let mut guest = Guest::new(source, &model);
    let copy = Copy {
        moment: Moment::End,
        in_flight: 2,
        piece: 65_536,
        hold_max: Some(Duration::from_secs(5)),
        ..Copy::new(source, target)
    };
    let job = engine.start(copy).expect("it starts");
    assert_eq!(guest.run_beside(&mut engine, job), Ok(()));
    assert_eq!(guest.misses(&mut engine), None);
    settle(&mut engine);
}

/// What was known of a piece when it was copied is not believed when a part of it is copied again, by the same
/// worker: that was zeros.
#[test]
fn zeros_that_became_data_are_seen() {
    let (folder, size) = (folder(), 256 << 10);
    let mut engine = aio(Limits::default());
    let mut disks = Vec::new();
    for (name, format) in [("from", Format::Qed), ("to", Format::Raw)] {
        make(&folder.path().join(name), format, size);
        disks.push(add(&mut engine, &folder.path().join(name), format, false));
    }
    let write = |engine: &mut Engine<Node, _>, at, byte| {
        let bytes = Buf::copied(&[byte; 4096]);
        engine.submit(disks[0], Io::write(at, 4096), bytes, 0).expect("room");
    };
    for at in [0, 64 << 10] {
        write(&mut engine, at, 1);
        assert_eq!(settle(&mut engine).pop().expect("it ended").result, Ok(()));
    }
    let copy = Copy {
        moment: Moment::End,
        in_flight: 1,
        piece: size as usize,
        ..Copy::new(disks[0], disks[1])
    };
    let job = engine.start(copy).expect("it starts");
    engine.run(clock());
    // Its first piece is all of the disk: data, and nothing behind it.
    assert!(engine.pause_job(job));
    while engine.job_progress(job).expect("it goes on").done < size {
        assert!(engine.run(clock()).again || wait(&engine), "{engine:?}");
    }
    write(&mut engine, 128 << 10, 2);
    while engine.poll().is_none() {
        assert!(engine.run(clock()).again || wait(&engine), "{engine:?}");
    }
    assert!(engine.resume_job(job));
    assert_eq!(end_of(&mut engine, job), Ok(()));
    for (at, byte) in [(0, 1), (64 << 10, 1), (128 << 10, 2)] {
        engine.submit(disks[1], Io::read(at, 512), Buf::zeroed(512), 0).expect("room");
        let done = settle(&mut engine).pop().expect("it ended");
        assert!(
            done.mem.into_buf().expect("it was lent").iter().all(|&its| its == byte),
            "at {at}"
        );
    }
    drain(&mut engine);
}

#[test]
fn what_others_read_from_is_not_mirrored() {
    let folder = folder();
    let mut engine = aio(Limits::default());
    let ([source, target], _) = two(&mut engine, folder.path(), (Format::Qcow2, Format::Raw));
    let path = folder.path().join("third");
    make(&path, Format::Raw, SIZE);
    let third = add(&mut engine, &path, Format::Raw, false);
    let mirror = |source, target| Copy { moment: Moment::End, ..Copy::new(source, target) };
    let job = engine.start(mirror(source, target)).expect("it starts");
    assert_eq!(end_of(&mut engine, job), Ok(()));
    assert!(!engine.may_be_read_from(source) && engine.may_be_read_from(target));
    assert_eq!(engine.start(mirror(source, third)), Err(Why::InUse), "it is the other now");
    // That may be mirrored in turn; the first id leads to the last.
    let job = engine.start(mirror(target, third)).expect("it starts");
    assert_eq!(end_of(&mut engine, job), Ok(()));
    engine.submit(source, Io::write(0, 512), Buf::copied(&[7; 512]), 0).expect("room");
    assert_eq!(settle(&mut engine).pop().expect("it ended").result, Ok(()));
    assert!(read(&mut engine, third, 512).iter().all(|&byte| byte == 7));
    drain(&mut engine);
}

/// Until its end is told the two hold the same: so who must remember which is the disk does so in time.
#[test]
fn nothing_is_written_there_before_its_end_is_told() {
    let folder = folder();
    let mut engine: Engine<Node, _> = Engine::new(Inline::new(), Limits::default());
    let ([source, target], model) = two(&mut engine, folder.path(), (Format::Qcow2, Format::Raw));
    let copy = Copy { moment: Moment::End, ..Copy::new(source, target) };
    let job = engine.start(copy).expect("it starts");
    while engine.job_progress(job).is_some() {
        engine.run(clock());
    }
    let write = Io::write(0, 512);
    let bytes = Buf::copied(&[7; 512]);
    engine.submit(source, write, bytes, 0).expect("room");
    for _ in 0..20 {
        assert!(engine.run(clock()).again, "there is something to be told");
        assert!(engine.poll().is_none());
    }
    let to = std::fs::read(folder.path().join("to")).expect("a raw image");
    assert!(to == model, "the target is what the source was");
    assert_eq!(engine.poll_event(), Some(NodeEvent::JobEnded { job, result: Ok(()) }));
    assert_eq!(settle(&mut engine).pop().expect("it ended").result, Ok(()));
    assert!(read(&mut engine, target, 512).iter().all(|&byte| byte == 7));
    drain(&mut engine);
}

/// A drain comes before its end was told: then the source is the disk still, and has what was held.
#[test]
fn a_drain_cancels_one_whose_end_was_not_told() {
    for (from, to) in [(Format::Qcow2, Format::Raw), (Format::Vmdk, Format::Raw)] {
        let folder = folder();
        let mut engine: Engine<Node, _> = Engine::new(Inline::new(), Limits::default());
        let ([source, target], model) = two(&mut engine, folder.path(), (from, to));
        let copy = Copy { moment: Moment::End, ..Copy::new(source, target) };
        let job = engine.start(copy).expect("it starts");
        while engine.job_progress(job).is_some() {
            engine.run(clock());
        }
        let bytes = Buf::copied(&[7; 512]);
        engine.submit(source, Io::write(0, 512), bytes, 0).expect("room");
        engine.run(clock());
        assert!(engine.poll().is_none(), "it waits");
        for node in [source, target] {
            assert_eq!(engine.close(node), Err(Why::InUse), "as far as anybody has heard");
        }
        assert_eq!(engine.pause(source), Err(Why::InUse));
        engine.drain();
        let mut written = None;
        while engine.drained().is_none() {
            let again = engine.run(clock()).again;
            written = written.or(engine.poll().map(|ended| ended.result));
            assert!(again || written.is_some() || wait(&engine), "{engine:?}");
        }
        assert_eq!((engine.drained(), written), (Some(Ok(())), Some(Ok(()))));
        let ended = NodeEvent::JobEnded { job, result: Err(Errno::CANCELED) };
        assert_eq!(engine.poll_event(), Some(ended));
        let there = std::fs::read(folder.path().join("to")).expect("a raw image");
        assert!(there == model, "the target is what the source was");
        drop(engine);
        assert_eq!(check(&folder.path().join("from"), from), (0, 0), "{from}");
        let mut engine: Engine<Node, _> = Engine::new(Inline::new(), Limits::default());
        let source = add(&mut engine, &folder.path().join("from"), from, false);
        assert!(read(&mut engine, source, 512).iter().all(|&byte| byte == 7));
    }
}

/// What was given up goes with the disk, and whoever copies to that waits for it, and no longer.
#[test]
fn a_copy_to_it_waits_for_what_was_given_up_before() {
    let folder = folder();
    let mut engine: Engine<Node, _> = Engine::new(Faulty::new(Inline::new()), Limits::default());
    let raw = (Format::Raw, Format::Raw);
    let ([source, target], model) = two(&mut engine, folder.path(), raw);
    let other = folder.path().join("other");
    std::fs::write(&other, vec![3; SIZE as usize]).expect("a scratch file");
    let other = add(&mut engine, &other, Format::Raw, false);
    let copy = Copy { moment: Moment::End, ..Copy::new(source, target) };
    let job = engine.start(copy).expect("it starts");
    let is_over = |engine: &Engine<Node, Faulty<Inline>>| engine.job_progress(job).is_none();
    while !is_over(&engine) {
        engine.run(clock());
    }
    // It waits until the end was heard of; then its op is slow.
    engine.submit(source, Io::write(0, 512), Buf::copied(&[9; 512]), 7).expect("room");
    engine.run(clock());
    assert_eq!(engine.abandon(source, |tag| tag == 7), [7]);
    let file = Some(file_of(&engine, target));
    let slow =
        Fault { what: Some(What::Write), file, errno: None, delay: u64::MAX, ..Fault::default() };
    engine.backend_mut().plan_mut().push(slow);
    assert_eq!(engine.poll_event(), Some(NodeEvent::JobEnded { job, result: Ok(()) }));
    for _ in 0..100 {
        engine.run(clock());
    }
    assert_eq!(engine.abandoned(), 1, "it is under way");
    engine.backend_mut().plan_mut().clear();
    let next = engine.start(Copy::new(other, target)).expect("it starts");
    for _ in 0..100 {
        engine.run(clock());
    }
    assert_eq!(engine.job_progress(next).map(|progress| progress.done), Some(0));
    let is_due = engine.next_deadline().is_some_and(|due| due <= clock());
    assert!(!is_due, "there is nothing to be run for");
    engine.backend_mut().let_go();
    assert_eq!(end_of(&mut engine, next), Ok(()));
    let found = read(&mut engine, target, SIZE);
    assert!(found.iter().all(|&byte| byte == 3), "what was given up came first");
    assert_ne!(found, model);
}
