//! Images are locked against other programs and other parts of this one, as QEMU locks them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use cowbell_engine::Engine;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::sys::lock::{LockError, LockState, Locking, Permission};
use cowbell_formats::{
    Chain, CreateOptions, DiskHost, Error, Format, OpenOptions, Policy, RunOptions, attach, create,
    open,
};
use tempfile::TempDir;

const FORMATS: [Format; 5] = [Format::Raw, Format::Qed, Format::Qcow2, Format::Vmdk, Format::Vdi];

fn made(dir: &TempDir, format: Format, options: CreateOptions) -> PathBuf {
    let path = dir.path().join(format!("disk.{format}"));
    let options = CreateOptions { size: Some(1 << 20), ..options };
    create(&DiskHost::default(), &path, format, &options).expect("it is made");
    path
}

fn options(format: Format, write: bool) -> OpenOptions {
    OpenOptions { format: Some(format), write, backing: Policy::Any, ..OpenOptions::default() }
}

fn try_open(path: &Path, options: &OpenOptions) -> Result<Chain<DiskFile>, Error> {
    open(&DiskHost::default(), path, options)
}

#[track_caller]
fn refused(result: Result<Chain<DiskFile>, Error>) -> (PathBuf, LockError) {
    match result.expect_err("somebody has it") {
        Error::Locked { path, why } => (path, why),
        Error::Backing(inner) => match *inner {
            Error::Locked { path, why } => (path, why),
            error => panic!("{error}"),
        },
        error => panic!("{error}"),
    }
}

#[test]
fn a_second_writer_is_refused_and_told_who_the_first_is() {
    for format in FORMATS {
        let dir = TempDir::new().expect("a folder");
        let path = made(&dir, format, CreateOptions::default());
        let first = try_open(&path, &options(format, true)).expect("it is free");
        let before = fs::read(&path).expect("it is there");
        let (named, why) = refused(try_open(&path, &options(format, true)));
        assert_eq!(named, path);
        let LockError::Conflict { permission, denied, holders } = &why else { panic!("{why}") };
        assert_eq!((*permission, *denied), (Permission::Write, false), "{format}");
        assert!(holders.iter().any(|holder| holder.pid == process::id()), "{holders:?}");
        let text = Error::Locked { path: path.clone(), why }.to_string();
        let asks = format!("\nIs another process using the image [{}]?", path.display());
        assert!(
            text.starts_with("Failed to get \"write\" lock\n") && text.contains(&asks),
            "{text}"
        );

        assert_eq!(fs::read(&path).expect("it is there"), before);
        drop(first);
        drop(try_open(&path, &options(format, true)).expect("it is free again"));
    }
}

#[test]
fn create_leaves_an_open_image_as_it_is() {
    for format in FORMATS {
        let dir = TempDir::new().expect("a folder");
        let path = made(&dir, format, CreateOptions::default());
        let first = try_open(&path, &options(format, true)).expect("it is free");
        let before = fs::read(&path).expect("it is there");
        for over in FORMATS {
            let wanted = CreateOptions { size: Some(4 << 20), ..CreateOptions::default() };
            let error = create(&DiskHost::default(), &path, over, &wanted).expect_err("it is open");
            assert!(matches!(error, Error::Locked { .. }), "{over} over {format}: {error}");
            assert_eq!(fs::read(&path).expect("it is there"), before, "{over} over {format}");
        }
        drop(first);
        made(&dir, format, CreateOptions::default());
    }
}

#[test]
fn readers_go_together_and_keep_writers_out() {
    for format in FORMATS {
        let dir = TempDir::new().expect("a folder");
        let path = made(&dir, format, CreateOptions::default());
        let readers: Vec<_> =
            (0..2).map(|_| try_open(&path, &options(format, false)).expect("readers")).collect();
        let writer = try_open(&path, &options(format, true));
        if format == Format::Raw {
            // It has no tables that could change under a reader.
            drop(writer.expect("raw readers let others write"));
        } else {
            let LockError::Conflict { permission, denied, .. } = refused(writer).1 else {
                panic!("no conflict")
            };
            assert_eq!((permission, denied), (Permission::Write, false), "{format}");
        }
        drop(readers);
        let writer = try_open(&path, &options(format, true)).expect("nobody has it");
        let reader = try_open(&path, &options(format, false));
        assert_eq!(reader.is_ok(), format == Format::Raw, "{format}");
        let sharing = OpenOptions { force_share: true, ..options(format, false) };
        drop(try_open(&path, &sharing).expect("it shares"));
        drop(writer);
    }
}

#[test]
fn sharing_is_for_readers() {
    let dir = TempDir::new().expect("a folder");
    let path = made(&dir, Format::Qcow2, CreateOptions::default());
    let sharing = OpenOptions { force_share: true, ..options(Format::Qcow2, true) };
    let error = try_open(&path, &sharing).expect_err("it writes");
    assert_eq!(error.to_string(), "force-share=on can only be used with read-only images");
}

#[test]
fn every_file_of_an_image_is_locked() {
    let dir = TempDir::new().expect("a folder");
    let data = dir.path().join("data");
    let wanted = CreateOptions { data_file: Some("data".into()), ..CreateOptions::default() };
    let path = made(&dir, Format::Qcow2, wanted);
    let first = try_open(&path, &options(Format::Qcow2, true)).expect("it is free");
    assert_eq!(refused(try_open(&data, &options(Format::Raw, true))).0, data);
    drop(first);
    let other = try_open(&data, &options(Format::Raw, true)).expect("it is free");
    assert_eq!(refused(try_open(&path, &options(Format::Qcow2, true))).0, data);
    drop(other);

    let mut wanted = CreateOptions::default();
    wanted.set(Format::Vmdk, "subformat", "monolithicFlat").expect("it is an option");
    let path = made(&dir, Format::Vmdk, wanted);
    let flat = dir.path().join("disk-flat.vmdk");
    let first = try_open(&path, &options(Format::Vmdk, true)).expect("it is free");
    assert_eq!(refused(try_open(&flat, &options(Format::Raw, true))).0, flat);
    drop(first);
    let other = try_open(&flat, &options(Format::Raw, true)).expect("it is free");
    assert_eq!(refused(try_open(&path, &options(Format::Vmdk, true))).0, flat);
    drop(other);
}

#[test]
fn backing_files_are_shared_among_overlays_and_kept_from_writers() {
    for format in [Format::Raw, Format::Qed, Format::Qcow2] {
        let dir = TempDir::new().expect("a folder");
        let base = made(&dir, format, CreateOptions::default());
        let overlays = ["one", "two"].map(|name| {
            let path = dir.path().join(name);
            let wanted = CreateOptions {
                backing_file: Some(base.file_name().expect("a name").into()),
                backing_format: Some(format),
                ..CreateOptions::default()
            };
            create(&DiskHost::default(), &path, Format::Qcow2, &wanted).expect("it is made");
            path
        });
        let open = overlays.each_ref().map(|path| {
            try_open(path, &options(Format::Qcow2, true)).expect("overlays share what is below")
        });
        assert_eq!(refused(try_open(&base, &options(format, true))).0, base);
        drop(open);
        let writer = try_open(&base, &options(format, true)).expect("it is free");
        assert_eq!(refused(try_open(&overlays[0], &options(Format::Qcow2, true))).0, base);
        drop(writer);
    }
}

#[test]
fn parts_of_a_backing_image_are_kept_from_writers_while_an_overlay_is_written() {
    let dir = TempDir::new().expect("a folder");
    let overlay = |base: &Path, format| {
        let path = base.with_extension(format!("over-{format}"));
        let wanted = CreateOptions {
            backing_file: Some(base.file_name().expect("a name").into()),
            backing_format: Some(format),
            ..CreateOptions::default()
        };
        create(&DiskHost::default(), &path, Format::Qcow2, &wanted).expect("it is made");
        path
    };
    let wanted = CreateOptions { data_file: Some("data".into()), ..CreateOptions::default() };
    let base = made(&dir, Format::Qcow2, wanted);
    let mut wanted = CreateOptions::default();
    wanted.set(Format::Vmdk, "subformat", "monolithicFlat").expect("it is an option");
    let flat = made(&dir, Format::Vmdk, wanted);
    let cases = [
        (overlay(&base, Format::Qcow2), dir.path().join("data")),
        (overlay(&flat, Format::Vmdk), dir.path().join("disk-flat.vmdk")),
    ];
    for (top, part) in cases {
        let first = try_open(&top, &options(Format::Qcow2, true)).expect("it is free");
        assert_eq!(refused(try_open(&part, &options(Format::Raw, true))).0, part);
        drop(first);
        let writer = try_open(&part, &options(Format::Raw, true)).expect("it is free");
        for write in [false, true] {
            refused(try_open(&top, &options(Format::Qcow2, write)));
        }
        drop(writer);
    }
}

#[test]
fn create_writes_no_file_while_another_of_the_image_is_open() {
    // Two extents, of which somebody has the second; and a data file.
    let sizes = 3 << 30;
    for nocow in [None, Some(true)] {
        let dir = TempDir::new().expect("a folder");
        let mut wanted = CreateOptions { size: Some(sizes), nocow, ..CreateOptions::default() };
        wanted.set(Format::Vmdk, "subformat", "twoGbMaxExtentSparse").expect("it is an option");
        let again = |wanted: &CreateOptions, format: Format| {
            create(&DiskHost::default(), &dir.path().join("d.x"), format, wanted)
        };
        again(&wanted, Format::Vmdk).expect("it is made");
        let names = ["d.x", "d-s001.x", "d-s002.x"].map(|name| dir.path().join(name));
        let before = names.each_ref().map(|name| fs::read(name).expect("it is there"));
        let held = try_open(&names[2], &options(Format::Raw, true)).expect("it is free");
        let error = again(&wanted, Format::Vmdk).expect_err("somebody has an extent");
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        let data_file = Some("d-s002.x".into());
        let wanted =
            CreateOptions { size: Some(1 << 20), nocow, data_file, ..CreateOptions::default() };
        let error = again(&wanted, Format::Qcow2).expect_err("somebody has the data file");
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        let after = names.each_ref().map(|name| fs::read(name).expect("it is there"));
        assert!(before == after);
        drop(held);
    }
}

#[test]
fn nothing_is_held_after_a_refusal() {
    let dir = TempDir::new().expect("a folder");
    let wanted = CreateOptions { data_file: Some("data".into()), ..CreateOptions::default() };
    let path = made(&dir, Format::Qcow2, wanted);
    let holder = try_open(&dir.path().join("data"), &options(Format::Raw, true)).expect("free");
    refused(try_open(&path, &options(Format::Qcow2, true)));
    // The image's own file was locked first: it is free again, though the data file is not.
    let options = OpenOptions { locking: Locking::On, ..options(Format::Raw, true) };
    drop(try_open(&path, &options).expect("it is free"));
    drop(holder);
}

#[test]
fn two_engines_cannot_have_one_image_and_give_it_up_with_their_files() {
    let dir = TempDir::new().expect("a folder");
    let path = made(&dir, Format::Qcow2, CreateOptions::default());
    let chain = try_open(&path, &options(Format::Qcow2, true)).expect("it is free");
    let mut engine = Engine::new(Inline::new(), Default::default());
    attach(&mut engine, chain, &RunOptions::default()).expect("it is attached");
    refused(try_open(&path, &options(Format::Qcow2, true)));
    drop(engine);
    drop(try_open(&path, &options(Format::Qcow2, true)).expect("its files are closed"));
}

#[test]
fn locks_of_a_running_image_are_released_and_taken_again() {
    let dir = TempDir::new().expect("a folder");
    for format in FORMATS {
        let path = made(&dir, format, CreateOptions::default());
        let chain = try_open(&path, &options(format, true)).expect("it is free");
        let mut locks = chain.locks().expect("descriptors are duplicated");
        assert!(locks.are_held());
        let mut engine = Engine::new(Inline::new(), Default::default());
        attach(&mut engine, chain, &RunOptions::default()).expect("it is attached");
        refused(try_open(&path, &options(format, true)));

        locks.release();
        assert!(!locks.are_held());
        let other = try_open(&path, &options(format, true)).expect("it was released");
        let error = locks.take().expect_err("another has it");
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        assert!(!locks.are_held());
        drop(other);

        locks.take().expect("it is free again");
        refused(try_open(&path, &options(format, true)));
        drop((engine, locks));
        drop(try_open(&path, &options(format, true)).expect("all are closed"));
    }
}

#[test]
fn locking_can_be_left_out() {
    let dir = TempDir::new().expect("a folder");
    let path = made(&dir, Format::Qed, CreateOptions::default());
    let first = try_open(&path, &options(Format::Qed, true)).expect("it is free");
    let off = OpenOptions { locking: Locking::Off, ..options(Format::Qed, true) };
    let second = try_open(&path, &off).expect("nobody asked");
    assert_eq!(second.layers[0].file.lock_state(), LockState::None);
    assert!(matches!(first.layers[0].file.lock_state(), LockState::Held(_)));
    assert!(second.unlockable().is_empty());
}
