//! The examples do what they are there to show: everybody in the loop is served while the disk
//! works, the engine is full at times and nothing is lost, and the image is left clean.

use std::path::Path;

use cowbell_engine::sys::disk::DiskFile;
use cowbell_formats::qed::rest::check::{self, Repair};
use cowbell_formats::{DiskHost, OpenOptions, map, open};

#[path = "../../examples/epoll.rs"]
mod epoll;
#[path = "../../examples/executor.rs"]
mod executor;
#[path = "../../examples/mio.rs"]
mod mio;
#[path = "../../examples/vm.rs"]
mod vm;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

fn assert_clean(path: &Path) {
    let file = DiskFile::open(path, &Default::default()).expect("it opens");
    let report = check::check(&file, Repair::None).expect("it checks");
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn a_plain_epoll_loop() {
    let folder = folder();
    let served = epoll::serve(folder.path()).expect("it serves");
    assert_eq!(served.requests, 2 * (32 << 20) / 8192);
    assert!(served.held_back > 0, "the engine was never full: {served:?}");
    assert!(served.ticks_meanwhile > 0, "the timer waited for the disk: {served:?}");
    assert!(served.kicks_meanwhile > 0, "the kicks waited for the disk: {served:?}");
    assert_clean(&folder.path().join("disk.qed"));
}

#[test]
fn a_loop_around_mio() {
    let folder = folder();
    let served = mio::serve(folder.path()).expect("it serves");
    assert_eq!(served.copied, (32 << 20) / (16 << 10));
    assert!(served.answers > 0, "the pipe waited for the disk: {served:?}");
    assert!(served.beats > 0, "the heartbeat waited for the disk: {served:?}");
    let copy = folder.path().join("to.qed");
    assert_clean(&copy);
    let chain = open(&DiskHost::default(), &copy, &OpenOptions::default()).expect("it opens");
    let mut bytes = vec![0; 32 << 20];
    map::read(&chain, 0, &mut bytes).expect("it reads");
    assert!(bytes == mio::contents(), "the copy differs");
}

#[test]
fn an_executor_of_futures() {
    let folder = folder();
    let served = executor::serve(folder.path()).expect("it serves");
    assert_eq!(served.copied, (16 << 20) / (16 << 10));
    assert!(served.given_up > 0, "nothing was dropped while it was under way: {served:?}");
    assert!(served.held_back > 0, "the engine was never full: {served:?}");
    let copy = folder.path().join("to.qed");
    assert_clean(&copy);
    let chain = open(&DiskHost::default(), &copy, &OpenOptions::default()).expect("it opens");
    let mut bytes = vec![0; 16 << 20];
    map::read(&chain, 0, &mut bytes).expect("it reads");
    assert!(bytes == executor::contents(), "the copy differs");
}

#[test]
fn a_virtual_machine_of_two_disks() {
    let folder = folder();
    // It looks at every byte that its guest reads.
    let served = vm::serve(folder.path()).expect("it serves");
    assert_eq!(served.requests, 2 * 2 * ((4 << 20) / 13_337));
    assert!(served.ticks > 0, "the timer waited for the disks: {served:?}");
}
