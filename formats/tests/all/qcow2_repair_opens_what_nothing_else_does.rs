//! Images that are damaged so that nothing but a repair opens them, or that have a cluster with two
//! owners: what a repair leaves, `qemu-img check` finds nothing wrong with, wherever QEMU's own repair
//! leaves that, and in more cases; the disk is that of QEMU's repair.

use std::path::Path;

use crate::common::{MemFile, have_qemu, ok, run};
use cowbell_engine::store::Store;
use cowbell_formats::qcow2::rest::check::{Repair, check};

/// An image with two snapshots, and where in it everything is.
struct Image {
    bytes: Vec<u8>,
    l1: u64,
    l2: u64,
    table: u64,
    block: u64,
    snapshots: u64,
}

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().expect("8 bytes"))
}

fn image(dir: &Path, options: &str) -> Image {
    ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} a.qcow2 2M"));
    ok(dir, "qemu-io -f qcow2 -c 'write -q -P 3 0 1M' a.qcow2");
    ok(dir, "qemu-img snapshot -c one a.qcow2");
    ok(dir, "qemu-io -f qcow2 -c 'write -q -P 4 0 64k' a.qcow2");
    ok(dir, "qemu-img snapshot -c two a.qcow2");
    let mut bytes = std::fs::read(dir.join("a.qcow2")).expect("made");
    let (l1, table, snapshots) = (word(&bytes, 40), word(&bytes, 48), word(&bytes, 64));
    bytes.resize(bytes.len().max(snapshots as usize + (1 << 17)), 0);
    let l2 = word(&bytes, l1) & 0xff_ffff_ffff_fe00;
    let block = word(&bytes, table);
    Image { bytes, l1, l2, table, block, snapshots }
}

/// Bytes at an offset.
type Damage = (u64, Vec<u8>);

fn be64(at: u64, value: u64) -> Damage {
    (at, value.to_be_bytes().to_vec())
}

fn be32(at: u64, value: u32) -> Damage {
    (at, value.to_be_bytes().to_vec())
}

fn damages(image: &Image) -> Vec<(&'static str, Damage)> {
    const COPIED: u64 = 1 << 63;
    let Image { l1, l2, table, block, snapshots, .. } = *image;
    let entry = l2 + 40;
    vec![
        ("no refcount table", be64(48, 0)),
        ("a refcount table without clusters", be32(56, 0)),
        ("a refcount table behind the end", be64(48, 1 << 30)),
        ("a refcount table far behind it", be64(48, 1 << 62)),
        ("a refcount table on no cluster boundary", be64(48, table + 256)),
        ("a refcount table that is too large", be32(56, 1 << 20)),
        ("a refcount table of zeros", (table, vec![0; 512])),
        ("a refcount block on no cluster boundary", be64(table, block + 512)),
        ("a refcount block behind the end", be64(table, 1 << 24)),
        ("reserved bits in the refcount table", be64(table, block + 1)),
        ("a refcount block of zeros", (block, vec![0; 512])),
        ("a refcount block of ones", (block, vec![255; 200])),
        ("a snapshot table behind the end", be64(64, 1 << 30)),
        ("a snapshot table far behind it", be64(64, 1 << 62)),
        ("a snapshot more than there are", be32(60, 3)),
        ("many more", be32(60, 100)),
        ("2000 bytes of extra data", be32(snapshots + 36, 2000)),
        ("4 GiB of extra data", be32(snapshots + 36, u32::MAX)),
        ("1000 bytes of extra data", be32(snapshots + 36, 1000)),
        ("8 bytes of extra data", be32(snapshots + 36, 8)),
        ("no extra data", be32(snapshots + 36, 0)),
        ("an L2 table that is its own data", be64(entry, COPIED | l2)),
        ("an L1 table that is data", be64(entry, COPIED | l1)),
        ("a refcount table that is data", be64(entry, COPIED | table)),
        ("a refcount block that is data", be64(entry, COPIED | block)),
        ("a snapshot table that is data", be64(entry, COPIED | snapshots)),
        ("a header that is data", be64(entry, COPIED)),
        ("a refcount table that is an L2 table", be64(l1, COPIED | table)),
        ("an L1 table that is an L2 table", be64(l1, COPIED | l1)),
        ("an L1 table at the image's start", be64(40, 0)),
        ("an L1 table behind the end", be64(40, 1 << 40)),
        ("an L2 table behind the end", be64(l1, COPIED | 1 << 40)),
        ("data behind the end", be64(entry, COPIED | 1 << 40)),
        ("marked as corrupt", be64(72, 2)),
        ("marked as dirty", be64(72, 1)),
    ]
}

/// The disk, or `None`.
fn disk(dir: &Path, name: &str) -> Option<Vec<u8>> {
    let out = run(dir, &format!("qemu-img convert -f qcow2 -O raw {name} disk.raw"));
    out.status.success().then(|| std::fs::read(dir.join("disk.raw")).expect("made"))
}

#[test]
fn as_well_as_the_repair_of_qemu() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    for options in ["cluster_size=64k", "cluster_size=4k", "cluster_size=512,refcount_bits=64"] {
        let image = image(dir, options);
        for (what, (at, bytes)) in damages(&image) {
            let line = format!("{options}: {what}");
            let file = MemFile::new(&image.bytes);
            file.write_at(at, &bytes).expect("memory");
            let damaged = file.bytes();
            let ours = check(&file, Repair::All);
            std::fs::write(dir.join("ours"), file.bytes()).expect("written");
            std::fs::write(dir.join("theirs"), &damaged).expect("written");
            run(dir, "qemu-img check -f qcow2 -r all theirs");
            let code =
                |name: &str| run(dir, &format!("qemu-img check -f qcow2 {name}")).status.code();
            let (ours_left, theirs_left) = (code("ours"), code("theirs"));
            assert!(
                ours_left == Some(0) || theirs_left != Some(0),
                "{line}: {ours:?}, QEMU finds {ours_left:?}; in its own: {theirs_left:?}"
            );
            if theirs_left == Some(0) {
                let sound = ours.expect(&line);
                assert!(sound.is_clean(), "{line}: {sound:?}");
                assert!(disk(dir, "ours") == disk(dir, "theirs"), "{line}: another disk");
            }
            // Done once, there is nothing more to do.
            let repaired = file.bytes();
            let clean = check(&file, Repair::All).is_ok_and(|report| report.is_clean());
            assert!(
                !clean || file.bytes() == repaired,
                "{line}: repairing twice is repairing once"
            );
        }
    }
}

/// QEMU takes seconds for such an image, so it is not asked.
#[test]
fn more_snapshots_than_there_can_be() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    for count in [65_537, u32::MAX] {
        let file = MemFile::new(&image(dir.path(), "cluster_size=64k").bytes);
        file.poke_be32(60, count);
        check(&file, Repair::None).expect_err("too many");
        let report = check(&file, Repair::All).expect("repaired");
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(file.peek_be64(60) >> 32, 65_536, "as many as there can be");
        assert!(check(&file, Repair::None).expect("checked").is_clean());
    }
}

/// A cluster is an L2 table and a guest's data. After a repair no flag says that either may be written
/// where it is.
#[test]
fn a_guest_does_not_write_over_a_table() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    let image = image(dir, "cluster_size=64k");
    let file = MemFile::new(&image.bytes);
    file.poke_be64(image.l2 + 40, 1 << 63 | image.l2);
    check(&file, Repair::All).expect("repaired");
    std::fs::write(dir.join("a.qcow2"), file.bytes()).expect("written");
    ok(dir, "qemu-io -f qcow2 -c 'write -q -P 9 320k 64k' -c 'write -q -P 8 2000k 1k' a.qcow2");
    ok(dir, "qemu-io -f qcow2 -c 'read -q -P 4 0 64k' -c 'read -q -P 3 64k 256k' a.qcow2");
    ok(dir, "qemu-io -f qcow2 -c 'read -q -P 9 320k 64k' -c 'read -q -P 3 384k 640k' a.qcow2");
    ok(dir, "qemu-img check -q -f qcow2 a.qcow2");
}
