//! A record of an embedder that copies a disk while its guest writes: what the copy and the guest do is done in other orders.

use std::path::Path;

use cowbell_engine::backend::FileInfo;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::record::{Entry, Reader, Recorder};
use cowbell_engine::step::Io;
use cowbell_engine::units::{FileId, JobId, NodeId, Time};
use cowbell_engine::{Copy, Engine, Limits, Moment, NodeEvent};
use cowbell_formats::{
    CreateOptions, Format, Node, OpenOptions, RunOptions, attach, chain, create,
};
use cowbell_sim::backend::{Device, Mode, SimBackend};
use cowbell_sim::disk::splitmix;
use cowbell_sim::host::SimHost;
use cowbell_sim::kept::KeptHost;
use cowbell_sim::played::{Played, Player};
use cowbell_sim::subjects::recorded::{Parts, Recorded};
use cowbell_sim::trace::Trace;
use cowbell_sim::vary::{Variation, Varied, vary};
use cowbell_sim::world::Way;

use crate::embedders_runs_are_done_again::Kept;

const SIZE: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

/// What is copied where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The disk, as it was at the start, to an empty one.
    Backup,
    /// The disk, to an empty one that becomes the disk.
    Mirror,
    /// What is below the disk, into it.
    Pull,
    /// The disk, as it is at any moment, to one that has other bytes; it is paused, and called off.
    CalledOff,
}

fn options(format: Format) -> OpenOptions {
    let backing = chain::Policy::Any;
    OpenOptions { write: true, format: Some(format), backing, ..OpenOptions::default() }
}

type Recording = Engine<Node, Recorder<SimBackend>>;

/// What there is of a run.
struct Run {
    record: Vec<u8>,
    text: String,
    infos: Vec<FileInfo>,
    disks: Vec<(&'static str, Format)>,
}

/// Submits a guest's request.
fn asks(engine: &mut Recording, disk: NodeId, io: Io) {
    let mem = if io.len > 0 { Buf::zeroed(io.len as usize).into() } else { Mem::None };
    engine.submit(disk, io, mem, 0).map_err(|refused| refused.why).expect("there is room");
}

/// Writes to a disk of one file that nobody uses yet.
fn fills(host: &SimHost, name: &str, format: Format) {
    let mut engine = Engine::new(SimBackend::new(Device::default(), Mode::Fifo), Limits::default());
    let chain = chain::open(host, Path::new(name), &options(format)).expect("it opens");
    let disk: NodeId = attach(&mut engine, chain, &RunOptions::default()).expect("it is attached");
    for at in [1, 6, 15] {
        let mem: Mem = Buf::copied(&[7; CLUSTER as usize]).into();
        let taken = engine.submit(disk, Io::write(at * CLUSTER, CLUSTER), mem, 0);
        taken.map_err(|refused| refused.why).expect("there is room");
    }
    engine.drain();
    while engine.drained().is_none() {
        engine.run(Time(0));
    }
    host.put(name, engine.backend().file(FileId(0)).now().clone());
}

/// Goes on, for a while; has the job ended?
fn runs(engine: &mut Recording, now: &mut u64, turns: usize) -> bool {
    let mut ended = false;
    for _ in 0..turns {
        *now += 1000;
        engine.run(Time(*now));
        while engine.poll().is_some() {}
        while let Some(event) = engine.poll_event() {
            ended |= matches!(event, NodeEvent::JobEnded { .. });
        }
    }
    ended
}

fn starts(engine: &mut Recording, kind: Kind, disks: &[NodeId]) -> JobId {
    let copy = match kind {
        Kind::Pull => Copy::pull(disks[0], 1),
        Kind::Backup => {
            let copy = Copy::new(disks[0], disks[1]);
            Copy { moment: Moment::Start, target_is_zero: true, ..copy }
        }
        Kind::Mirror => Copy { moment: Moment::End, ..Copy::new(disks[0], disks[1]) },
        Kind::CalledOff => Copy::new(disks[0], disks[1]),
    };
    let copy = Copy { piece: CLUSTER as usize, in_flight: 2, unit: 4096, ..copy };
    engine.start(copy).expect("it begins")
}

fn recorded(kind: Kind, format: Format, other: Format) -> Run {
    let host = SimHost::new();
    let size = CreateOptions { size: Some(SIZE), ..CreateOptions::default() };
    let kept = KeptHost::over(host.clone());
    let device = Device { memory_align: 512, ..Device::default() };
    let backend = SimBackend::new(device, Mode::Fifo);
    let limits = Limits { requests: 16, ..Limits::default() };
    let mut engine = Engine::new(Recorder::new(backend), limits);
    let mut disks = vec![("a", format)];
    if kind == Kind::Pull {
        create(&host, Path::new("below"), other, &size).expect("it is made");
        fills(&host, "below", other);
        let (backing_file, backing_format) = (Some("below".into()), Some(other));
        let over = CreateOptions { backing_file, backing_format, ..size.clone() };
        create(&host, Path::new("a"), format, &over).expect("it is made");
    } else {
        create(&host, Path::new("a"), format, &size).expect("it is made");
        create(&host, Path::new("b"), other, &size).expect("it is made");
        disks.push(("b", other));
    }
    let nodes: Vec<NodeId> = disks
        .iter()
        .map(|&(name, format)| {
            let name = Path::new(name);
            chain::open(&kept, name, &options(format)).expect("it opens for a trial");
            let chain = chain::open(&host, name, &options(format)).expect("it opens");
            attach(&mut engine, chain, &RunOptions::default()).expect("it is attached")
        })
        .collect();
    let sink = Kept::default();
    engine.backend_mut().start_with(Box::new(sink.clone()), 512);
    let mut now = 0;
    // What is there when the copy begins.
    for at in [0, 3, 4, 9] {
        asks(&mut engine, nodes[0], Io::write(at * CLUSTER, CLUSTER + 4096));
        runs(&mut engine, &mut now, 20);
    }
    if kind == Kind::CalledOff {
        asks(&mut engine, nodes[1], Io::write(2 * CLUSTER, 3 * CLUSTER));
        runs(&mut engine, &mut now, 20);
    }
    let job = starts(&mut engine, kind, &nodes);
    let mut ended = runs(&mut engine, &mut now, 2);
    let disk = nodes[0];
    asks(&mut engine, disk, Io::write(9 * CLUSTER + 512, 1024));
    asks(&mut engine, disk, Io::read(3 * CLUSTER, 4096));
    ended |= runs(&mut engine, &mut now, 1);
    if kind == Kind::CalledOff {
        assert!(engine.pause_job(job));
        runs(&mut engine, &mut now, 3);
        assert!(engine.resume_job(job));
        runs(&mut engine, &mut now, 1);
        engine.cancel_job(job);
    }
    asks(&mut engine, disk, Io::flush());
    asks(&mut engine, disk, Io::write(9 * CLUSTER, 1024));
    ended |= runs(&mut engine, &mut now, 1);
    asks(&mut engine, disk, Io::write(6 * CLUSTER, 4096));
    ended |= runs(&mut engine, &mut now, 100);
    assert!(ended || kind == Kind::CalledOff, "{kind:?} has an end");
    engine.drain();
    runs(&mut engine, &mut now, 100);
    assert_eq!(engine.drained(), Some(Ok(())), "{kind:?}");
    engine.backend_mut().stop();
    let record = sink.record();
    let infos = engine.backend().infos().to_vec();
    Run { record, text: kept.to_text(), infos, disks }
}

const HOW: Variation = Variation {
    near: None,
    requests: 5,
    faults: 1,
    crashes: 0,
    seed: 0,
    runs: 12,
    seconds: 4.0,
    disk: None,
    plant: None,
};

fn varied(run: &Run, record: &[u8], how: &Variation) -> Result<Varied, String> {
    let host: KeptHost<SimHost> = KeptHost::from_lines(run.text.lines()).expect("it is kept text");
    let limits = Limits { requests: 16, ..Limits::default() };
    let mut engine = Engine::new(Played::new(record.to_vec(), run.infos.clone()), limits);
    let mut parts = Vec::new();
    for &(name, format) in &run.disks {
        let chain = chain::open(&host, Path::new(name), &options(format)).expect("it opens");
        parts.push(Parts::of(&chain, 512, None).expect("it is small"));
        attach(&mut engine, chain, &RunOptions::default()).expect("it is attached");
    }
    vary(&mut Player::new(engine), record, &parts, how)
}

#[test]
fn of_every_moment() {
    let (way_out, way_up) = (Some((Way::Out, 1)), Some((Way::Up, 0)));
    for (kind, format, other, copy) in [
        (Kind::Backup, Format::Raw, Format::Qcow2, way_out),
        (Kind::Backup, Format::Qcow2, Format::Raw, way_out),
        (Kind::Backup, Format::Vdi, Format::Qcow2, way_out),
        (Kind::Mirror, Format::Raw, Format::Qed, way_out),
        (Kind::Mirror, Format::Vmdk, Format::Raw, way_out),
        (Kind::Pull, Format::Qcow2, Format::Raw, way_up),
        (Kind::Pull, Format::Qed, Format::Vmdk, way_up),
        (Kind::CalledOff, Format::Qed, Format::Qcow2, way_out),
    ] {
        let run = recorded(kind, format, other);
        let what = format!("{kind:?} of {format} and {other}");
        let varied = varied(&run, &run.record, &HOW).unwrap_or_else(|why| panic!("{what}: {why}"));
        let failures = &varied.report.failures;
        assert!(failures.is_empty(), "{what}: {}", failures[0].shown());
        assert_eq!(varied.copy, copy, "{what}");
        assert_eq!((varied.before, varied.window.requests.len()), (4, 5), "{what}");
        assert!(varied.drawn > 0, "{what}: {varied:?}");
    }
}

/// From the target's side.
#[test]
fn of_the_disk_that_is_copied_to() {
    let run = recorded(Kind::CalledOff, Format::Qcow2, Format::Qcow2);
    let how = Variation { disk: Some(1), ..HOW };
    let seen = varied(&run, &run.record, &how).expect("it can be varied");
    assert!(seen.report.failures.is_empty(), "{}", seen.report.failures[0].shown());
    assert_eq!((seen.copy, seen.window.requests.len()), (Some((Way::In, 0)), 1));
    let run = recorded(Kind::Mirror, Format::Qcow2, Format::Qcow2);
    let why = varied(&run, &run.record, &how).expect_err("the other disk is the one");
    assert!(why.contains("--disk names the other"), "{why}");
}

/// Of runs that ended well; their traces need no record.
#[test]
fn defects_that_a_run_has_missed_are_found() {
    for (plant, kind, format, other) in [
        ("guest_writes_before_copy", Kind::Backup, Format::Qcow2, Format::Qcow2),
        ("taken_counts_as_read", Kind::Backup, Format::Raw, Format::Qcow2),
        ("mirror_forgets_writes", Kind::Mirror, Format::Qcow2, Format::Qcow2),
        ("mirror_lets_writes_pass", Kind::Mirror, Format::Raw, Format::Raw),
        ("pull_lets_writes_pass_before_its_own", Kind::Pull, Format::Qcow2, Format::Qcow2),
        ("resumed_copy_sleeps_on", Kind::CalledOff, Format::Raw, Format::Qcow2),
    ] {
        let run = recorded(kind, format, other);
        let how = Variation { plant: Some(plant), runs: 2000, seconds: 30.0, ..HOW };
        let varied = varied(&run, &run.record, &how).expect("it can be varied");
        let found = varied.report.failures.first().unwrap_or_else(|| panic!("{plant}: {varied:?}"));
        let text = found.to_string();
        let read: Trace<Recorded> = text.parse().expect("it is a trace");
        assert_eq!((read.to_string(), &read.image), (text.clone(), &found.image), "{plant}");
        // Every crash on the way is looked at then: it may be seen earlier.
        read.replay().expect_err("it fails again");
        let honest: Trace<Recorded> =
            text.replace(&format!("plant {plant}\n"), "").parse().expect("it is a trace");
        honest.replay().unwrap_or_else(|failure| panic!("{plant}: {}", failure.verdict));
    }
}

/// A copy in a record that was changed is another one, or none.
#[test]
fn changed_records_harm_nobody() {
    let mut state = 11;
    let mut below = |bound: usize| {
        state = splitmix(state);
        (state % bound as u64) as usize
    };
    let how = Variation { runs: 2, seconds: 0.1, requests: 2, ..HOW };
    let (mut refused, mut tried) = (0, 0);
    for kind in [Kind::Backup, Kind::Mirror, Kind::Pull, Kind::CalledOff] {
        let run = recorded(kind, Format::Qcow2, Format::Qcow2);
        let mut reader = Reader::new(&run.record);
        let (mut at, mut started) = (0, 0..0);
        while let Some(entry) = reader.next() {
            let end = run.record.len() - reader.left();
            if matches!(entry, Entry::Started { .. }) {
                started = at..end;
            }
            at = end;
        }
        assert!(!started.is_empty(), "{kind:?}");
        for round in 0..40 {
            let within = if round % 2 == 0 { started.clone() } else { 0..run.record.len() };
            let mut changed = run.record.clone();
            changed[within.start + below(within.len())] ^= 1 << below(8);
            match varied(&run, &changed, &how) {
                Ok(_) => tried += 1,
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 20 && tried > 10, "{refused}, {tried}");
}

/// Nor do changed traces.
#[test]
fn changed_traces_harm_nobody() {
    let mut state = 5;
    let mut below = |bound: usize| {
        state = splitmix(state);
        (state % bound as u64) as usize
    };
    let how = Variation { plant: Some("guest_writes_before_copy"), runs: 500, ..HOW };
    let (mut read, mut ran) = (0, 0);
    for (format, other) in [(Format::Qcow2, Format::Qed), (Format::Vdi, Format::Vmdk)] {
        let run = recorded(Kind::Backup, format, other);
        let varied = varied(&run, &run.record, &how).expect("it can be varied");
        let text = varied.report.failures.first().expect("it is found").to_string();
        let text = text.replace("plant guest_writes_before_copy\n", "");
        // What is said of the copy, of the parts and of the other disk's header is a small part of it.
        let words: Vec<usize> = [" copied=", " copy", " noise=", " beside ", " seed="]
            .into_iter()
            .flat_map(|word| text.match_indices(word).map(|(at, _)| at))
            .collect();
        assert!(words.len() > 6, "{text}");
        for round in 0..100 {
            let mut changed = text.clone().into_bytes();
            for _ in 0..=below(2) {
                let at = match round % 2 {
                    0 => words[below(words.len())] + below(24),
                    _ => below(changed.len()),
                };
                let end = changed.len() - 1;
                changed[at.min(end)] = b"0123456789abcdef=:+ x-"[below(22)];
            }
            let changed = String::from_utf8(changed).expect("it is ASCII");
            let Ok(trace) = changed.parse::<Trace<Recorded>>() else { continue };
            read += 1;
            ran += usize::from(trace.replay().is_ok());
        }
    }
    assert!(read > 20 && ran > 5, "{read}, {ran}");
}
