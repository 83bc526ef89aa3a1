//! An engine over files of the real disk, driven as an embedder drives it.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use cowbell_engine::backend::Backend;
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::units::NodeId;
use cowbell_engine::{Engine, Finished};
use cowbell_formats::check::{self, Repair, Unwatched};
use cowbell_formats::{
    CreateOptions, DiskHost, Format, Host, Node, OpenOptions, Policy, RunOptions, attach, create,
    open,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A folder where files can be opened with O_DIRECT.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

/// Makes an image of `size` bytes.
pub fn make(path: &Path, format: Format, size: u64) {
    make_with(path, format, &CreateOptions { size: Some(size), ..CreateOptions::default() });
}

/// Makes an image.
pub fn make_with(path: &Path, format: Format, options: &CreateOptions) {
    create(&DiskHost::default(), path, format, options).expect("it is made");
}

/// Errors and leaks of an image, as our check counts them.
pub fn check(path: &Path, format: Format) -> (u64, u64) {
    let host = DiskHost::default();
    // An engine may have it open still.
    let options = OpenOptions { format: Some(format), force_share: true, ..OpenOptions::default() };
    let file = host.open(path, false).expect("it opens");
    let report = check::check(&host, path, &file, &options, Repair::None, &mut Unwatched);
    let report = report.expect("it is checked").unwrap_or_default();
    (report.corruptions + report.check_errors, report.leaks + report.stale)
}

/// Opens an image for writing, past the page cache or not, and hands it to `engine`.
pub fn add<B: Backend<File = DiskFile>>(
    engine: &mut Engine<Node, B>,
    path: &Path,
    format: Format,
    direct: bool,
) -> NodeId {
    let options = OpenOptions {
        format: Some(format),
        write: true,
        backing: Policy::SameDirectory,
        ..OpenOptions::default()
    };
    let chain = open(&DiskHost { direct }, path, &options).expect("it opens");
    attach(engine, chain, &RunOptions::default()).expect("it attaches")
}

/// Is one of these descriptors readable within `ms` milliseconds?
pub fn is_any_readable(fds: &[&dyn AsFd], ms: u64) -> bool {
    let mut fds: Vec<PollFd<'_>> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)).collect();
    let timeout = Timespec { tv_sec: (ms / 1000) as i64, tv_nsec: (ms % 1000 * 1_000_000) as i64 };
    poll(&mut fds, Some(&timeout)).expect("it polls") > 0
}

/// Is the engine's descriptor readable within `ms` milliseconds?
pub fn is_readable<B: Backend>(engine: &Engine<Node, B>, ms: u64) -> bool {
    is_any_readable(&[&engine.fd().expect("this backend has a descriptor")], ms)
}

/// Waits as a loop does, for the descriptor or the moment that the engine has named. False: neither has
/// come for 20 seconds.
pub fn wait<B: Backend>(engine: &Engine<Node, B>) -> bool {
    let left = engine.next_deadline().map(|due| due.since(clock()).div_ceil(1_000_000));
    let left = left.filter(|&ms| ms < 20_000);
    match (engine.fd(), left) {
        (Some(_), left) => is_readable(engine, left.unwrap_or(20_000)) || left.is_some(),
        (None, Some(ms)) => {
            std::thread::sleep(Duration::from_millis(ms));
            true
        }
        (None, None) => false,
    }
}

/// Runs until nothing of the guest's is in flight, waiting as a loop waits; what has finished.
pub fn settle<B: Backend>(engine: &mut Engine<Node, B>) -> Vec<Finished> {
    let mut finished = Vec::new();
    loop {
        let again = engine.run(clock()).again;
        finished.extend(std::iter::from_fn(|| engine.poll()));
        if engine.in_flight() == 0 {
            return finished;
        }
        assert!(again || wait(engine), "nothing wakes the loop: {engine:?}");
    }
}

/// Drains, and looks that nothing is left.
pub fn drain<B: Backend>(engine: &mut Engine<Node, B>) -> Vec<Finished> {
    engine.drain();
    let mut finished = Vec::new();
    loop {
        let again = engine.run(clock()).again;
        finished.extend(std::iter::from_fn(|| engine.poll()));
        if let Some(result) = engine.drained() {
            assert_eq!(result, Ok(()));
            engine.assert_idle();
            return finished;
        }
        assert!(again || wait(engine), "nothing wakes the loop: {engine:?}");
    }
}
