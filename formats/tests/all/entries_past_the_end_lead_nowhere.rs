//! An entry of a table that leads past the file's end fails what comes upon it and nothing else: not
//! other requests under the same table, not flushes, not later sessions. And it does not come to
//! lead to what is allocated later.

use std::fs::OpenOptions as File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::drive::{add, folder, make_with, settle};
use cowbell_engine::Engine;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::clock;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, NodeId};
use cowbell_formats::vmdk::disk::layout::{Header, SECTOR};
use cowbell_formats::{CreateOptions, Format, Node, qed};

const GRAIN: u64 = 64 << 10;
/// The cluster or grain whose entry is bad.
const BAD: u64 = 5;
const SIZE: u64 = 64 << 20;

fn made(format: Format) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = folder();
    let path = folder.path().join("disk");
    let options = CreateOptions { size: Some(SIZE), ..CreateOptions::default() };
    make_with(&path, format, &options);
    (folder, path)
}

/// Makes `BAD`'s entry in a VMDK lead `sectors` behind the file's end.
fn spoil_vmdk(path: &Path, sectors: u64) {
    let file = File::new().read(true).write(true).open(path).expect("it is there");
    let mut first = [0; SECTOR as usize];
    file.read_exact_at(&mut first, 0).expect("a header");
    let header = Header::parse(&first).expect("sound");
    let end = file.metadata().expect("a file").len() / SECTOR;
    for directory in [header.directory_at, header.redundant_at] {
        let mut table = [0; 4];
        file.read_exact_at(&mut table, directory * SECTOR).expect("a directory");
        let at = u64::from(u32::from_le_bytes(table)) * SECTOR + BAD * 4;
        file.write_all_at(&((end + sectors) as u32).to_le_bytes(), at).expect("it is written");
    }
}

/// Gives a QED image an L2 table, with an entry for `BAD` that leads `clusters` behind the file's
/// end; or, if `table` says so, makes the second L1 entry lead there.
fn spoil_qed(path: &Path, clusters: u64, table: bool) {
    let mut engine = Engine::new(Inline::new(), Default::default());
    let disk = add(&mut engine, path, Format::Qed, false);
    assert!(one(&mut engine, disk, Io::write(0, GRAIN), filled(9)).is_ok());
    drain(&mut engine).expect("sound");
    drop(engine);
    let file = File::new().read(true).write(true).open(path).expect("it is there");
    let mut block = [0; qed::disk::layout::HEADER_BLOCK];
    file.read_exact_at(&mut block, 0).expect("a header");
    let len = file.metadata().expect("a file").len();
    let header = qed::disk::layout::Header::parse(&block, len).expect("sound");
    let mut l2 = [0; 8];
    file.read_exact_at(&mut l2, header.l1_offset.0).expect("an L1 table");
    let at = match table {
        false => u64::from_le_bytes(l2) + BAD * 8,
        true => header.l1_offset.0,
    };
    let past = len.next_multiple_of(GRAIN) + clusters * GRAIN;
    file.write_all_at(&past.to_le_bytes(), at).expect("it is written");
}

fn one(engine: &mut Engine<Node, Inline>, disk: NodeId, io: Io, mem: Mem) -> Result<Mem, Errno> {
    engine.submit(disk, io, mem, 0).expect("there is room");
    let done = settle(engine).remove(0);
    done.result.map(|()| done.mem)
}

fn drain(engine: &mut Engine<Node, Inline>) -> Result<(), Errno> {
    engine.drain();
    while engine.drained().is_none() {
        engine.run(clock());
    }
    engine.drained().expect("it is")
}

fn filled(byte: u8) -> Mem {
    let mut buf = Buf::zeroed(GRAIN as usize);
    buf.fill(byte);
    buf.into()
}

/// Two sessions, in which the file grows.
fn bad_stays_bad(path: &Path, format: Format, said: &str) {
    for session in 0..2 {
        let mut engine = Engine::new(Inline::new(), Default::default());
        let disk = add(&mut engine, path, format, false);
        for turn in 0..8 {
            let fill = 1 + turn + 8 * session;
            let at = (u64::from(fill) + BAD) * GRAIN;
            let bad = |io| one(&mut engine, disk, io, filled(0xbd)).map(drop);
            let what = format!("{format}, {said}, session {session}, turn {turn}");
            let answers = [Io::read(BAD * GRAIN, GRAIN), Io::write(BAD * GRAIN, GRAIN)].map(bad);
            assert_eq!(answers, [Err(Errno::IO); 2], "{what}");
            let write = Io::write(at, GRAIN);
            assert!(one(&mut engine, disk, write, filled(fill)).is_ok(), "{what}");
            assert!(one(&mut engine, disk, Io::flush(), Mem::None).is_ok(), "{what}");
            let read = one(&mut engine, disk, Io::read(at, GRAIN), filled(0)).expect("read");
            let buf = read.into_buf().expect("reads own a buffer");
            assert!(buf.iter().all(|&byte| byte == fill), "{what}");
        }
        // All is written, and yet the image is not sound.
        assert_eq!(drain(&mut engine), Err(Errno::IO));
    }
}

#[test]
fn in_vmdk() {
    for sectors in [0, 1, 128, 256, 1 << 30] {
        let (_folder, path) = made(Format::Vmdk);
        spoil_vmdk(&path, sectors);
        bad_stays_bad(&path, Format::Vmdk, &format!("{sectors} sectors"));
    }
}

#[test]
fn in_qed() {
    for clusters in [0, 1, 2, 3, 100, 1 << 30] {
        let (_folder, path) = made(Format::Qed);
        spoil_qed(&path, clusters, false);
        bad_stays_bad(&path, Format::Qed, &format!("{clusters} clusters"));
    }
}

/// The disk is larger than one L2 table maps: under the second, the file grows over the place that
/// the first one's entry names.
#[test]
fn in_qeds_l1_table() {
    for clusters in [0, 1, 4, 5, 1 << 30] {
        let folder = folder();
        let path = folder.path().join("disk");
        let options = CreateOptions { size: Some(8 << 30), ..CreateOptions::default() };
        make_with(&path, Format::Qed, &options);
        spoil_qed(&path, clusters, true);
        let mut engine = Engine::new(Inline::new(), Default::default());
        let disk = add(&mut engine, &path, Format::Qed, false);
        for turn in 0..8 {
            let at = (4 << 30) + u64::from(turn) * GRAIN;
            assert!(one(&mut engine, disk, Io::write(at, GRAIN), filled(turn)).is_ok());
            let read = one(&mut engine, disk, Io::read(0, 4096), Buf::zeroed(4096).into());
            assert_eq!(read.map(drop), Err(Errno::IO), "{clusters} clusters, turn {turn}");
        }
        assert_eq!(drain(&mut engine), Err(Errno::IO));
    }
}
