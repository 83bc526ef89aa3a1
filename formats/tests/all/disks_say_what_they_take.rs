//! What an embedder asks before it shows a disk to its guest; and disks whose files somebody else has opened.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::disk::{DiskFile, DiskOptions};
use cowbell_engine::units::Errno;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{
    CreateOptions, DiskHost, Format, GivenFiles, Node, OpenOptions, Policy, RunOptions, attach,
    create, open,
};

use crate::common::drive::{add, drain, folder, make, settle};

const SIZE: u64 = 8 << 20;

fn engine() -> Engine<Node, Aio> {
    Engine::new(Aio::new(AioOptions::default()).expect("native AIO"), Limits::default())
}

#[test]
fn its_size_and_its_units() {
    let folder = folder();
    let mut engine = engine();
    let units = [
        (Format::Raw, 1),
        (Format::Qed, 64 << 10),
        (Format::Qcow2, 64 << 10),
        (Format::Vmdk, 64 << 10),
        (Format::Vdi, 1 << 20),
    ];
    for (format, unit) in units {
        for direct in [false, true] {
            let path = folder.path().join(format!("{format}{direct}"));
            make(&path, format, SIZE);
            let disk = add(&mut engine, &path, format, direct);
            let limits = engine.limits(disk).expect("it is there");
            assert_eq!((limits.size, limits.is_writable), (SIZE, true), "{format}");
            let align = limits.request_align;
            assert_eq!(align > 1, direct, "{format}: {limits:?}");
            assert!(
                limits.unit >= unit && limits.unit.is_multiple_of(u64::from(align)),
                "{limits:?}"
            );
            assert!(limits.memory_align <= 4096 && limits.request_max >= 1 << 30, "{limits:?}");
            // So it is.
            for io in
                [Io::write(0, unit), Io::zero(unit, unit, true).stable(), Io::discard(0, unit)]
            {
                let mem = if io.kind == Io::write(0, 1).kind {
                    Buf::zeroed(unit as usize).into()
                } else {
                    Mem::None
                };
                engine.submit(disk, io, mem, 0).expect("room");
                assert_eq!(settle(&mut engine)[0].result, Ok(()), "{format}: {io:?}");
            }
            let grown = Io::truncate(2 * SIZE);
            engine.submit(disk, grown, Mem::None, 0).expect("room");
            let size = if settle(&mut engine)[0].result.is_ok() { 2 * SIZE } else { SIZE };
            assert_eq!(engine.limits(disk).map(|limits| limits.size), Some(size), "{format}");
        }
    }
    drain(&mut engine);
}

/// An overlay over a base, both given.
fn given(folder: &Path, write: bool) -> GivenFiles {
    let open = |name: &str, write: bool| -> OwnedFd {
        let file = File::options().read(true).write(write).open(folder.join(name));
        file.expect("it is there").into()
    };
    let mut files = GivenFiles::new();
    let take = |fd, write| {
        let options = DiskOptions { write, ..DiskOptions::default() };
        DiskFile::from_fd(fd, &options).expect("it is taken")
    };
    files.give("top", take(open("top.qcow2", write), write));
    files.give("./base.img", take(open("base.img", false), false));
    files
}

#[test]
fn files_that_somebody_else_has_opened() {
    let folder = folder();
    std::fs::write(folder.path().join("base.img"), vec![7; SIZE as usize]).expect("it is written");
    let backed = CreateOptions {
        backing_file: Some("base.img".into()),
        backing_format: Some(Format::Raw),
        ..CreateOptions::default()
    };
    create(&DiskHost::default(), &folder.path().join("top.qcow2"), Format::Qcow2, &backed)
        .expect("it is made");
    for (write, result) in [(true, Ok(())), (false, Err(Errno::READ_ONLY))] {
        let host = given(folder.path(), write);
        let options = OpenOptions { write, backing: Policy::Any, ..OpenOptions::default() };
        let chain = open(&host, Path::new("top"), &options).expect("it opens");
        let mut engine = engine();
        let disk = attach(&mut engine, chain, &RunOptions::default()).expect("it attaches");
        assert_eq!(engine.limits(disk).map(|limits| limits.is_writable), Some(write));
        engine.submit(disk, Io::write(0, 4096), Buf::copied(&[9; 4096]), 0).expect("room");
        assert_eq!(settle(&mut engine)[0].result, result);
        engine.submit(disk, Io::read(0, 8192), Buf::zeroed(8192), 0).expect("room");
        let ended = settle(&mut engine).remove(0).mem.into_buf().expect("its buffer");
        assert!(ended[..4096].iter().all(|&byte| byte == 9), "{write}");
        assert!(ended[4096..].iter().all(|&byte| byte == 7), "{write}");
        drain(&mut engine);
    }
    // What is not given is not there, and nothing is made.
    let mut host = given(folder.path(), false);
    let wanted = OpenOptions { write: true, ..OpenOptions::default() };
    assert!(open(&host, Path::new("top"), &wanted).is_err(), "it is not open for writing");
    assert!(open(&host, Path::new("base"), &OpenOptions::default()).is_err());
    assert!(create(&host, Path::new("new"), Format::Raw, &CreateOptions::default()).is_err());
    host = GivenFiles::new();
    let top = File::open(folder.path().join("top.qcow2")).expect("it is there");
    host.give("top", DiskFile::from_fd(top.into(), &DiskOptions::default()).expect("it is taken"));
    let any = OpenOptions { backing: Policy::Any, ..OpenOptions::default() };
    assert!(open(&host, Path::new("top"), &any).is_err(), "no base");
}

#[test]
fn descriptors_that_cannot_be_used_are_refused() {
    let folder = folder();
    let path = folder.path().join("file");
    std::fs::write(&path, [0; 4096]).expect("it is written");
    let write = DiskOptions { write: true, ..DiskOptions::default() };
    let taken = |file: File, options: &DiskOptions| {
        DiskFile::from_fd(file.into(), options).map(drop).map_err(|why| why.kind())
    };
    let readable = || File::open(&path).expect("it opens");
    assert_eq!(taken(readable(), &DiskOptions::default()), Ok(()));
    assert_eq!(taken(readable(), &write), Err(ErrorKind::PermissionDenied));
    let only_written = File::options().write(true).open(&path).expect("it opens");
    assert_eq!(taken(only_written, &write), Err(ErrorKind::InvalidInput));
    let appends = || File::options().read(true).append(true).open(&path).expect("it opens");
    assert_eq!(taken(appends(), &write), Err(ErrorKind::InvalidInput));
    assert_eq!(taken(appends(), &DiskOptions::default()), Ok(()));
    const PATH_ONLY: i32 = 0o10_000_000;
    let path_only = File::options().read(true).custom_flags(PATH_ONLY).open(&path);
    assert!(taken(path_only.expect("it opens"), &DiskOptions::default()).is_err());
    for other in ["/dev/null", "/"] {
        let file = File::open(other).expect("it opens");
        assert_eq!(taken(file, &DiskOptions::default()), Err(ErrorKind::InvalidInput), "{other}");
    }
}
