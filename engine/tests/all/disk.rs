//! Files of the operating system: what opens, what is refused, and waiting reads and writes.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use cowbell_engine::mem::Buf;
use cowbell_engine::store::{Extent, Store};
use cowbell_engine::sys::disk::{Create, DiskFile, DiskOptions};
use tempfile::TempDir;

fn scratch() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory for scratch files")
}

fn options(direct: bool) -> DiskOptions {
    DiskOptions { write: true, direct, ..DiskOptions::default() }
}

fn open(path: &Path, direct: bool) -> DiskFile {
    DiskFile::open(path, &options(direct)).expect("it opens")
}

fn refused(path: &Path, what: &str) {
    for (write, direct) in [(false, false), (false, true), (true, true)] {
        let options = DiskOptions { write, direct, ..DiskOptions::default() };
        let error = DiskFile::open(path, &options).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[test]
fn only_files_and_block_devices_open() {
    let dir = scratch();
    let fifo = dir.path().join("fifo");
    // With nobody at its other end: opening it without care would wait for ever.
    assert!(Command::new("mkfifo").arg(&fifo).status().is_ok_and(|status| status.success()));
    refused(&fifo, "a FIFO");
    refused(dir.path(), "a directory");
    refused(Path::new("/dev/null"), "a character device");
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).expect("a socket");
    refused(&socket, "a socket");
    let missing = DiskFile::open(dir.path().join("missing"), &options(true)).expect_err("refused");
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

#[test]
fn a_link_is_followed_unless_told_otherwise() {
    let dir = scratch();
    let (file, link) = (dir.path().join("file"), dir.path().join("link"));
    fs::write(&file, b"x").expect("a file");
    symlink(&file, &link).expect("a link");
    let same = open(&link, false).identity().expect("it has one");
    assert_eq!(same, open(&file, true).identity().expect("it has one"));
    let no_follow = DiskOptions { no_follow: true, ..options(false) };
    assert!(DiskFile::open(&link, &no_follow).is_err());
    assert!(DiskFile::open(&file, &no_follow).is_ok());
}

#[test]
fn creating() {
    let dir = scratch();
    let path = dir.path().join("file");
    let new = DiskOptions { create: Create::New, ..options(true) };
    let truncate = DiskOptions { create: Create::Truncate, ..options(true) };
    let file = DiskFile::open(&path, &new).expect("it is made");
    file.write_at(3, b"bytes").expect("it is written");
    let error = DiskFile::open(&path, &new).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&path).expect("still there"), b"\0\0\0bytes");
    let file = DiskFile::open(&path, &truncate).expect("it opens");
    assert_eq!(file.len().expect("it has one"), 0);
    assert!(DiskFile::open(dir.path().join("other"), &truncate).is_ok());
}

#[test]
fn alignment_is_that_of_direct_files_alone() {
    let dir = scratch();
    let path = dir.path().join("file");
    fs::write(&path, vec![7; 12345]).expect("a file");
    let info = open(&path, false).info().expect("it is known");
    assert_eq!((info.request_align, info.memory_align, info.hole_align), (1, 1, 1));
    assert_eq!((info.len, info.can_grow), (12345, true));

    let file = open(&path, true);
    let info = file.info().expect("it is known");
    assert!((512..=4096).contains(&info.request_align), "{info:?}");
    assert!((1..=4096).contains(&info.memory_align), "{info:?}");
    // A page of the cache is shared by all that is in it.
    assert!(info.hole_align >= 4096.max(info.request_align), "{info:?}");
    assert!(file.is_direct() && file.is_writable() && !file.is_block_device());
}

#[test]
fn waiting_reads_and_writes_take_any_offset() -> io::Result<()> {
    let dir = scratch();
    let path = dir.path().join("file");
    for direct in [false, true] {
        let mut model: Vec<u8> = (0..10_000u32).map(|i| (i * 7 / 5) as u8).collect();
        fs::write(&path, &model)?;
        let file = open(&path, direct);
        let big = (2 << 20) + 777;
        for (offset, len) in
            [(0, 1), (511, 2), (4095, 4098), (9_990, 20), (30_000, 5), (100_001, big), (512, 512)]
        {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 13 + offset) as u8).collect();
            file.write_at(offset as u64, &bytes)?;
            model.resize(model.len().max(offset + len), 0);
            model[offset..offset + len].copy_from_slice(&bytes);
            assert_eq!(file.len()?, model.len() as u64, "not a byte more than was written");
        }
        assert!(fs::read(&path)? == model);
        for (offset, len) in [(0, model.len()), (1, 3), (4000, 70_000), (model.len() - 1, 1)] {
            let mut got = vec![0xee; len];
            file.read_at(offset as u64, &mut got)?;
            assert!(got == model[offset..offset + len]);
        }
        // Across the end and behind it, aligned and not.
        let mut got = Buf::zeroed(8192);
        for offset in [model.len() as u64 & !4095, model.len() as u64 - 5, 1 << 30] {
            got.fill(0xee);
            file.read_at(offset, &mut got)?;
            let left = model.get(offset as usize..).unwrap_or_default();
            let inside = left.len().min(got.len());
            assert!(got[..inside] == left[..inside]);
            assert!(got[inside..].iter().all(|&b| b == 0));
        }
        assert!(file.read_at(u64::MAX - 3, &mut got).is_err());
        assert!(file.write_at(u64::MAX - 3, &got).is_err());
    }
    Ok(())
}

#[test]
fn extents_are_data_and_holes() -> io::Result<()> {
    const MIB: u64 = 1 << 20;
    let dir = scratch();
    let file = DiskFile::open(
        dir.path().join("file"),
        &DiskOptions { create: Create::New, ..options(false) },
    )?;
    file.set_len(8 * MIB)?;
    file.write_at(2 * MIB, &vec![1; MIB as usize])?;
    file.flush()?;
    assert_eq!(file.extent_at(0)?, Extent { data: false, end: 2 * MIB });
    assert_eq!(file.extent_at(2 * MIB + 5)?, Extent { data: true, end: 3 * MIB });
    assert_eq!(file.extent_at(3 * MIB)?, Extent { data: false, end: 8 * MIB });
    assert!(file.extent_at(8 * MIB).is_err());
    file.allocate(8 * MIB, MIB)?;
    assert_eq!(file.len()?, 9 * MIB);
    file.set_len(MIB)?;
    assert_eq!(file.extent_at(0)?, Extent { data: false, end: MIB });
    Ok(())
}

/// Else a read waits inside `io_submit` to change it. Where a file system keeps no access times,
/// there is nothing to see.
#[test]
fn reads_leave_the_access_time_alone() -> io::Result<()> {
    let dir = scratch();
    let path = dir.path().join("a");
    fs::write(&path, [1; 8192])?;
    let old = fs::FileTimes::new().set_accessed(std::time::UNIX_EPOCH);
    for direct in [false, true] {
        fs::File::options().write(true).open(&path)?.set_times(old)?;
        open(&path, direct).read_at(0, &mut Buf::zeroed(4096))?;
        assert_eq!(fs::metadata(&path)?.accessed()?, std::time::UNIX_EPOCH, "direct: {direct}");
    }
    Ok(())
}
