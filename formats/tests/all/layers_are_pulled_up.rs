//! What the layers below a disk have of it is pulled up into the disk while its guest goes on: in the
//! end it needs them no more.

use crate::backups_are_of_one_moment::Guest;
use crate::common::drive::{check, folder, make, make_with, wait};
use crate::common::shadow::Rng;
use crate::copies_run_beside_guests::{SIZE, fill};
use crate::mirrors_become_the_disk::{close, goes_on};
use cowbell_engine::backend::Backend;
use cowbell_engine::faulty::{Fault, Faulty, What};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, JobId, NodeId};
use cowbell_engine::{Copy, Engine, JobProgress, Limits, Moment, NodeEvent, Why};
use cowbell_formats::rebase::set_backing;
use cowbell_formats::{
    CreateOptions, DiskHost, Format, Host, Node, OpenOptions, Policy, RunOptions, attach, open,
};
use std::fs;
use std::path::Path;

const OVERLAYS: [Format; 3] = [Format::Qcow2, Format::Qed, Format::Vmdk];

type Disks = Engine<Node, Faulty<Inline>>;

fn engine() -> Disks {
    Engine::new(Faulty::new(Inline::new()), Limits::default())
}

/// Opens a disk of several layers.
fn chain_of(engine: &mut Disks, path: &Path, format: Format) -> NodeId {
    let options = OpenOptions {
        format: Some(format),
        write: true,
        backing: Policy::Any,
        ..OpenOptions::default()
    };
    let chain = open(&DiskHost::default(), path, &options).expect("it opens");
    attach(engine, chain, &RunOptions::default()).expect("it attaches")
}

fn leave(engine: &mut Disks, node: NodeId) {
    close(engine, node, false);
    drop(engine.take_files(node));
}

/// Three layers, `base`, `middle` and `top`, each with something of its own; and what the disk holds.
fn three_layers(folder: &Path, format: Format) -> Vec<u8> {
    // Where an overlay of VMDK's is it is over VMDK.
    let base = if format == Format::Vmdk { format } else { Format::Raw };
    make(&folder.join("base"), base, SIZE);
    let mut model = vec![0; SIZE as usize];
    let mut rng = Rng(3);
    let mut below = ("base", base);
    for name in ["base", "middle", "top"] {
        if name != "base" {
            let options = CreateOptions {
                backing_file: Some(below.0.into()),
                backing_format: Some(below.1),
                size: Some(SIZE),
                ..CreateOptions::default()
            };
            make_with(&folder.join(name), format, &options);
            below = (name, format);
        }
        let mut engine = engine();
        let disk = chain_of(&mut engine, &folder.join(name), below.1);
        let bytes = match name {
            "base" => SIZE as usize,
            "middle" => SIZE as usize / 2,
            _ => SIZE as usize / 8,
        };
        fill(&mut engine, disk, &mut model[..bytes], &mut rng);
        leave(&mut engine, disk);
    }
    model
}

/// The disk's backing file is another, or none.
fn cut_off(path: &Path, format: Format, backing: Option<&str>) {
    let file = DiskHost::default().open(path, true).expect("it opens");
    let backing = backing.map(|name| (Path::new(name), Format::Raw.name()));
    set_backing(&file, format, backing).expect("it names another");
}

fn pull(node: NodeId) -> Copy {
    // Of several pieces, slow enough for the guest to come first, mostly.
    Copy { piece: 65_536, in_flight: 3, rate: Some(30 << 20), ..Copy::pull(node, 1) }
}

#[test]
fn and_needs_nothing_of_them_any_more() {
    for format in OVERLAYS {
        for is_partial in [false, true] {
            let folder = folder();
            let path = folder.path().join("top");
            let model = three_layers(folder.path(), format);
            let mut engine = engine();
            let disk = chain_of(&mut engine, &path, format);
            let mut guest = Guest::new(disk, &model);
            goes_on(&mut engine, &mut guest);
            let copy = Copy { top_layers: is_partial.then_some(2), ..pull(disk) };
            let job = engine.start(copy).expect("it starts");
            assert_eq!(engine.close(disk), Err(Why::InUse));
            assert_eq!(guest.run_beside(&mut engine, job), Ok(()), "{format}");
            assert_eq!(guest.misses(&mut engine), None, "{format}");
            goes_on(&mut engine, &mut guest);
            leave(&mut engine, disk);
            let gone = if is_partial { "middle" } else { "base" };
            let (kept, hidden) = (folder.path().join(gone), folder.path().join("hidden"));
            if format == Format::Vmdk {
                // (It cannot name another. What it reads of its parent is garbage now, and nobody's.)
                if is_partial {
                    continue;
                }
                spoil_grains(&kept);
            } else {
                cut_off(&path, format, is_partial.then_some("base"));
                fs::rename(&kept, &hidden).expect("it is there");
            }
            guest.disk = chain_of(&mut engine, &path, format);
            assert_eq!(guest.misses(&mut engine), None, "{format}: cut off");
            goes_on(&mut engine, &mut guest);
            leave(&mut engine, guest.disk);
            assert_eq!(check(&path, format), (0, 0), "{format}");
        }
    }
}

/// Overwrites every grain of an image.
fn spoil_grains(path: &Path) {
    let mut engine = engine();
    let disk = chain_of(&mut engine, path, Format::Vmdk);
    let mut model = vec![0; SIZE as usize];
    fill(&mut engine, disk, &mut model, &mut Rng(99));
    leave(&mut engine, disk);
}

#[test]
fn one_that_fails_or_is_called_off_leaves_the_disk_as_it_is() {
    for format in OVERLAYS {
        for (what, after) in
            [(What::Read, 30), (What::Write, 5), (What::Write, 40), (What::Flush, 0)]
        {
            let folder = folder();
            let path = folder.path().join("top");
            let model = three_layers(folder.path(), format);
            let mut engine = engine();
            let disk = chain_of(&mut engine, &path, format);
            let job = engine.start(pull(disk)).expect("it starts");
            let fault = Fault { what: Some(what), after, times: 1, ..Fault::default() };
            engine.backend_mut().plan_mut().push(fault);
            let ended = end(&mut engine, job);
            let failed = engine.backend().injected() > 0;
            assert!(ended == Err(Errno::IO) || !failed && ended == Ok(()), "{format} {ended:?}");
            engine.backend_mut().plan_mut().clear();
            let mut guest = Guest::new(disk, &model);
            assert_eq!(guest.misses(&mut engine), None, "{format} {what:?}");
            if what != What::Read {
                // (A flush of the guest's may have to tell that what was written is lost.)
                continue;
            }
            goes_on(&mut engine, &mut guest);
            // And again, called off in the middle.
            let job = engine.start(pull(disk)).expect("it starts");
            loop {
                guest.submit(&mut engine);
                engine.run(clock());
                guest.poll(&mut engine);
                match engine.job_progress(job) {
                    Some(JobProgress { done, total, .. }) if done < total / 4 => {}
                    _ => break,
                }
            }
            engine.cancel_job(job);
            let ended = guest.run_beside(&mut engine, job);
            assert!(ended == Err(Errno::CANCELED) || ended == Ok(()), "{format} {ended:?}");
            assert_eq!(guest.misses(&mut engine), None, "{format} {what:?}");
            leave(&mut engine, disk);
            assert_eq!(check(&path, format).0, 0, "{format}");
        }
    }
}

/// Goes on until a job has ended: how?
fn end<B: Backend>(engine: &mut Engine<Node, B>, job: JobId) -> Result<(), Errno> {
    loop {
        let again = engine.run(clock()).again;
        match engine.poll_event() {
            Some(NodeEvent::JobEnded { job: ended, result }) if ended == job => return result,
            Some(_) => {}
            None => assert!(again || wait(engine), "nothing wakes the loop: {engine:?}"),
        }
    }
}

#[test]
fn nothing_else_is_copied_into_the_disk_that_it_is_of() {
    let folder = folder();
    three_layers(folder.path(), Format::Qcow2);
    let mut engine = engine();
    let disk = chain_of(&mut engine, &folder.path().join("top"), Format::Qcow2);
    let pull = Copy::pull(disk, 1);
    for copy in [
        Copy::new(disk, disk),
        Copy { skip_layers: 0, ..pull },
        Copy { source_offset: 4096, ..pull },
        Copy { moment: Moment::Any, ..pull },
        Copy { moment: Moment::End, ..pull },
        Copy { target_is_zero: true, ..pull },
        Copy { hold_max: Copy::new(disk, disk).hold_max, ..pull },
    ] {
        assert_eq!(engine.start(copy), Err(Why::InUse), "{copy:?}");
    }
    let job = engine.start(pull).expect("that is");
    assert_eq!(end(&mut engine, job), Ok(()));
}
