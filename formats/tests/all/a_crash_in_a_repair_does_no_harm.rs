//! A repair that a crash ends at any write, and space that is being taken then: what a guest reads is
//! what it was or what it shall be, and the next repair comes to the same end.

use std::io;
use std::path::{Path, PathBuf};

use crate::common::crash::Logged;
use crate::common::{MemFile, add_data, add_l2, have_qemu, ok, small_qed};
use cowbell_engine::store::Store;
use cowbell_formats::check::{Repair, Unwatched, check};
use cowbell_formats::preallocation::Preallocation;
use cowbell_formats::qcow2::rest::open::read_header;
use cowbell_formats::qcow2::rest::preallocate::preallocate_from;
use cowbell_formats::vmdk::disk::layout::{Header, SECTOR};
use cowbell_formats::{Format, Host, OpenOptions, map, open, qcow2};

/// A host of one file, whatever its name.
struct One<F>(F);

impl<F: Store + Clone> Host for One<F> {
    type File = F;
    fn open(&self, _: &Path, _: bool) -> io::Result<F> {
        Ok(self.0.clone())
    }
    fn create_new(&self, _: &Path) -> io::Result<F> {
        Err(io::ErrorKind::AlreadyExists.into())
    }
    fn remove(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(path.into())
    }
    fn identity(&self, _: &F) -> io::Result<(u64, u64)> {
        Ok((0, 0))
    }
}

const BLOCK: u64 = 512;

/// What a guest reads, block by block; `None` where it cannot.
fn contents<F: Store + Clone>(file: &F, format: Format) -> Vec<Option<u8>> {
    let options = OpenOptions { format: Some(format), ..OpenOptions::default() };
    let chain = open(&One(file.clone()), Path::new("/a"), &options).expect("it opens");
    let mut block = [0; BLOCK as usize];
    let mut read = |at| {
        map::read(&chain, at * BLOCK, &mut block).ok()?;
        assert!(block.iter().all(|&byte| byte == block[0]), "blocks are written whole");
        Some(block[0])
    };
    (0..chain.size() / BLOCK).map(&mut read).collect()
}

/// Repairs all; the errors that are left.
fn repair<F: Store + Clone>(file: &F, format: Format) -> u64 {
    let options = OpenOptions { format: Some(format), ..OpenOptions::default() };
    let host = One(file.clone());
    let report = check(&host, Path::new("/a"), file, &options, Repair::All, &mut Unwatched);
    report.expect("checked").map_or(0, |report| report.corruptions)
}

fn crash_in_repair(template: &[u8], format: Format) {
    let whole = Logged::new(template);
    assert_eq!(repair(&whole, format), 0, "{format}: all can be mended");
    let old = contents(&MemFile::new(template), format);
    let new = contents(whole.file(), format);
    let mut crashes = 0;
    whole.crashes(template, |left, what| {
        crashes += 1;
        let here = contents(left, format);
        for (at, here) in here.iter().enumerate() {
            assert!([old[at], new[at]].contains(here), "{format}, {what}: block {at}: {here:?}");
        }
        assert_eq!(repair(left, format), 0, "{format}, {what}");
        assert!(contents(left, format) == new, "{format}, {what}: after another repair");
    });
    assert!(crashes > 4, "{format}: {crashes}");
}

#[test]
fn of_a_qed_image() {
    let file = small_qed(4 << 20, None);
    let l2 = add_l2(&file, 0);
    for index in [0, 2, 1] {
        add_data(&file, l2, index, index as u8 + 1);
    }
    // Entries that cannot be, one of them a table's, and a leak at the end.
    file.poke_u64(l2 + 8 * 8, 12_345);
    file.poke_u64(l2 + 300 * 8, 1 << 40);
    let (l1, end) = (file.peek_u64(40), file.bytes().len() as u64);
    file.poke_u64(l1 + 8, 1 << 41);
    file.write_at(end, &[9; 8192]).expect("memory");
    crash_in_repair(&file.bytes(), Format::Qed);
}

#[test]
fn of_a_vdi_image() {
    let host = crate::common::MemHost::default();
    let options = cowbell_formats::CreateOptions {
        size: Some(12 << 12),
        cluster_size: Some(4096),
        ..Default::default()
    };
    let made = cowbell_formats::create(&host, Path::new("/a"), Format::Vdi, &options);
    made.expect("it is made");
    let file = host.get("/a").expect("made");
    let data = file.bytes().len() as u64;
    file.write_at(data, &[1, 2, 3, 4, 5].map(|byte| [byte; 4096]).concat()).expect("memory");
    // A block named twice, another three times, entries that cannot be, a count too low, a leak
    // between and one at the end.
    for (index, block) in [0, 1, 1, 3, 3, 7, 1 << 30, 3].into_iter().enumerate() {
        file.write_at(4096 + index as u64 * 4, &u32::to_le_bytes(block)).expect("memory");
    }
    file.write_at(0x184, &[2]).expect("memory");
    crash_in_repair(&file.bytes(), Format::Vdi);
}

#[test]
fn of_a_qcow2_image() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    for options in ["cluster_size=512", "cluster_size=4k,compat=v2", "cluster_size=16k"] {
        ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} a 2M"));
        ok(dir, "qemu-io -f qcow2 -c 'write -q -P 1 0 100k' -c 'write -q -P 2 1M 100k' a");
        ok(dir, "qemu-img snapshot -c one a");
        ok(dir, "qemu-io -f qcow2 -c 'write -q -P 3 48k 64k' a");
        let file = MemFile::new(&std::fs::read(dir.join("a")).expect("made"));
        let header = read_header(&file).expect("legal");
        let blocks = file.peek_be64(header.refcount_table_offset);
        // Counts that are too low, a count of nothing, a flag that is not true.
        let size = header.geometry().cluster_size();
        let used = file.bytes().len() as u64 / size;
        for (cluster, count) in [(used / 2, 0_u16), (used - 1, 7), (used + 20, 1)] {
            if cluster * 2 < size {
                file.write_at(blocks + cluster * 2, &count.to_be_bytes()).expect("memory");
            }
        }
        let l1 = header.l1_offset;
        file.poke_be64(l1, file.peek_be64(l1) ^ 1 << 63);
        crash_in_repair(&file.bytes(), Format::Qcow2);
    }
}

#[test]
fn of_a_vmdk_image() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -q -f vmdk a 64M");
    ok(dir, "qemu-io -f vmdk -c 'write -q -P 1 0 256k' -c 'write -q -P 2 40M 128k' a");
    let file = MemFile::new(&std::fs::read(dir.join("a")).expect("made"));
    let mut first = [0; SECTOR as usize];
    file.read_at(0, &mut first).expect("memory");
    let header = Header::parse(&first).expect("legal");
    let word = |at: u64| {
        let mut word = [0; 4];
        file.read_at(at, &mut word).expect("memory");
        u64::from(u32::from_le_bytes(word))
    };
    let table = |directory: u64| word(directory * SECTOR) * SECTOR;
    let (primary, redundant) = (table(header.directory_at), table(header.redundant_at));
    // An entry that cannot be, in both; a copy that lags behind; a leak at the end.
    file.poke_u32(primary + 9 * 4, 1 << 30);
    file.poke_u32(redundant + 9 * 4, 1 << 30);
    file.poke_u32(redundant + 4, 0);
    let end = file.bytes().len() as u64;
    file.write_at(end, &[9; 128 << 10]).expect("memory");
    crash_in_repair(&file.bytes(), Format::Vmdk);
}

#[test]
fn nor_does_one_while_space_is_taken() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    const OLD: u64 = 1 << 20;
    for options in
        ["cluster_size=4k", "cluster_size=4k,compat=v2", "cluster_size=16k,extended_l2=on"]
    {
        ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} a 1M"));
        ok(dir, "qemu-io -f qcow2 -c 'write -q -P 1 0 100k' -c 'write -q -P 2 1000k 24k' a");
        ok(dir, "qemu-img resize -q -f qcow2 a 2M");
        let template = std::fs::read(dir.join("a")).expect("made");
        let old = contents(&MemFile::new(&template), Format::Qcow2);
        for how in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let whole = Logged::new(&template);
            preallocate_from(&whole, None, OLD, how).expect("there is room");
            whole.crashes(&template, |left, what| {
                let what = format!("{options}, {how}, {what}");
                assert!(contents(left, Format::Qcow2) == old, "{what}");
                let report = qcow2::rest::check::check(left, Repair::None).expect("checked");
                assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}");
            });
        }
    }
}
