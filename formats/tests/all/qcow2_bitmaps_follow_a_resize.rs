//! Bitmaps of an image whose size changes, and nothing else, are as long as the disk afterwards, bit for
//! bit what QEMU makes of them; a crash on the way leaves leaks at worst.

use std::path::Path;

use crate::common::crash::Logged;
use crate::common::{MemFile, have_qemu, ok};
use cowbell_engine::store::Store;
use cowbell_formats::Error;
use cowbell_formats::qcow2::rest::bitmap;
use cowbell_formats::qcow2::rest::check::{Repair, check};
use cowbell_formats::qcow2::rest::open::read_header;

/// The name, flags, granularity and bits of each bitmap.
type Bits = Vec<(Vec<u8>, u32, u8, Vec<u8>)>;

fn bits(file: &impl Store) -> Bits {
    let header = read_header(file).expect("legal");
    let list = bitmap::read(file, &header).expect("legal");
    let cluster = header.cluster_size();
    let each = list.iter().map(|one| {
        let mut bytes = Vec::new();
        for at in (0..one.table.len).step_by(8) {
            let mut word = [0; 8];
            file.read_at(one.table.offset + at, &mut word).expect("memory");
            let mut part = vec![0; cluster as usize];
            match u64::from_be_bytes(word) {
                0 => {}
                1 => part.fill(0xff),
                at => file.read_at(at, &mut part).expect("memory"),
            }
            bytes.extend(part);
        }
        // What QEMU leaves behind the last bit is nobody's business.
        let bits = header.disk_size().div_ceil(1 << one.granularity_bits) as usize;
        bytes.truncate(bits.div_ceil(8));
        if !bits.is_multiple_of(8) {
            *bytes.last_mut().expect("some") &= (1 << (bits % 8)) - 1;
        }
        (one.name.clone(), one.flags, one.granularity_bits, bytes)
    });
    each.collect()
}

fn image(dir: &Path, cluster: u64, writes: &str) -> Vec<u8> {
    ok(dir, &format!("qemu-img create -q -f qcow2 -o cluster_size={cluster} a.qcow2 9M"));
    ok(dir, "qemu-img bitmap --add -g 512 a.qcow2 one");
    ok(dir, "qemu-img bitmap --add -g 4k a.qcow2 two");
    ok(dir, "qemu-img bitmap --add --disable -g 64k a.qcow2 three");
    ok(dir, &format!("qemu-io -f qcow2 {writes} a.qcow2"));
    std::fs::read(dir.join("a.qcow2")).expect("made")
}

/// The image that QEMU makes of another size, and the same with the bitmaps it had before.
fn resized(dir: &Path, bytes: &[u8], size: u64) -> (MemFile, MemFile, Vec<bitmap::Bitmap>) {
    let path = dir.join("a.qcow2");
    std::fs::write(&path, bytes).expect("written");
    ok(dir, &format!("qemu-img resize -q -f qcow2 --shrink a.qcow2 {size}"));
    let theirs = MemFile::new(&std::fs::read(&path).expect("made"));
    // Ours: a disk of that size under marked bitmaps of the old one.
    let old = MemFile::new(bytes);
    let bitmaps = bitmap::read(&old, &read_header(&old).expect("legal")).expect("legal");
    bitmap::mark_in_use(&old, &bitmaps).expect("memory");
    (theirs, old, bitmaps)
}

const OLD: u64 = 9 << 20;
const SOME: &str = "-c 'write -q 100k 3M' -c 'write -q 9210k 4k'";

#[test]
fn longer_and_shorter() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    for cluster in [512, 4096, 65536] {
        for writes in [SOME, "-c 'write -q 0 9M'", "-c 'write -q 3000k 1k'"] {
            let bytes = image(dir, cluster, writes);
            for size in [512, 5120, 1 << 20, 3_000_320, OLD - 512, OLD + 512, 10 << 20, 12 << 20] {
                let line = format!("{cluster}, {writes}, {size}");
                let (theirs, ours, bitmaps) = resized(dir, &bytes, size);
                // Only the size: an L1 table for 12 MiB is there in clusters of 4 KiB and more.
                let l1_size = ours.peek_be64(36) >> 32;
                if read_header(&theirs).expect("legal").l1_needed() > l1_size {
                    continue;
                }
                ours.poke_be64(24, size);
                bitmap::resize(&ours, &bitmaps, OLD).expect(&line);
                assert!(bits(&ours) == bits(&theirs), "{line}");
                // What lies behind a smaller disk's end is still mapped here.
                if size >= OLD {
                    std::fs::write(dir.join("b.qcow2"), ours.bytes()).expect("written");
                    ok(dir, "qemu-img bitmap --add --merge one b.qcow2 four");
                }
                let report = check(&ours, Repair::None).expect(&line);
                assert!(report.is_clean(), "{line}: {report:?}");
            }
        }
    }
}

#[test]
fn crashed() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    for cluster in [512, 4096] {
        let bytes = image(dir.path(), cluster, SOME);
        let before = MemFile::new(&bytes);
        let bitmaps = bitmap::read(&before, &read_header(&before).expect("legal")).expect("legal");
        bitmap::mark_in_use(&before, &bitmaps).expect("memory");
        before.poke_be64(24, OLD - 4096);
        let before = before.bytes();
        let file = Logged::new(&before);
        bitmap::resize(&file, &bitmaps, OLD).expect("resized");
        let new = bits(file.file());
        assert!(new.iter().all(|(_, flags, ..)| flags & 1 == 0), "to be believed");
        let (mut olds, mut news) = (0, 0);
        file.crashes(&before, |file, when| {
            let report = check(file, Repair::None).expect(when);
            assert!(report.is_sound(), "{cluster}, {when}: {report:?}");
            let now = bits(file);
            let old = now.iter().all(|(_, flags, ..)| flags & 1 == 1);
            assert!(old || now == new, "{cluster}, {when}");
            if old {
                olds += 1
            } else {
                news += 1
            }
            let report = check(file, Repair::All).expect(when);
            assert!(report.is_clean(), "{cluster}, {when}: {report:?}");
        });
        assert!(olds > 0 && news > 0);
    }
}

#[test]
fn what_cannot_follow_is_refused() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = MemFile::new(&image(dir.path(), 65536, SOME));
    let header = read_header(&file).expect("legal");
    let mut bitmaps = bitmap::read(&file, &header).expect("legal");
    bitmap::check_resize(&bitmaps, &header, OLD, 1 << 40).expect("large, but legal");
    let error = bitmap::check_resize(&bitmaps, &header, OLD, 1 << 50).expect_err("too large");
    assert!(matches!(error, Error::Limit(_)), "{error}");
    bitmaps[1].flags |= 1;
    let error = bitmap::check_resize(&bitmaps, &header, OLD, OLD + 512).expect_err("in use");
    assert_eq!(error.to_string(), "Bitmap 'two' is inconsistent and cannot be used");
    bitmaps.remove(1);
    let error = bitmap::check_resize(&bitmaps, &header, OLD << 10, OLD).expect_err("too short");
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}
