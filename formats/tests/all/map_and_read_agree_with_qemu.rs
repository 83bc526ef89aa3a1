//! Images that QEMU has written: the map is QEMU's map and the bytes are QEMU's bytes.

use std::fmt::Write as _;
use std::path::Path;

use crate::common::{DISK, have_qemu, ok};
use cowbell_formats::create::parse_size;
use cowbell_formats::map::{Kind, extents, read, status};
use cowbell_formats::qed::disk::layout::Geometry;
use cowbell_formats::qed::rest::check::{Repair, check};
use cowbell_formats::{OpenOptions, Policy, open};

/// The map in the form of `qemu-img map --output json`.
fn json(path: &Path) -> String {
    let options = OpenOptions { backing: Policy::SameDirectory, ..Default::default() };
    let chain = open(&DISK, path, &options).expect("opens");
    let mut text = String::from("[");
    for extent in extents(&chain) {
        let e = extent.expect("sound tables");
        let separator = if e.start == 0 { "" } else { ",\n" };
        let (present, zero, data) = (e.is_present(), e.is_zero(), !e.is_zero());
        write!(
            text,
            "{separator}{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {present}, \
             \"zero\": {zero}, \"data\": {data}, \"compressed\": false",
            e.start, e.len, e.depth
        )
        .expect("a string");
        if let Some(host) = e.host() {
            write!(text, ", \"offset\": {}", host.0).expect("a string");
        }
        text += "}";
    }
    text + "]\n"
}

fn compare(dir: &Path, name: &str, what: &str) {
    let path = dir.join(name);
    assert_eq!(json(&path), ok(dir, &format!("qemu-img map --output json {name}")), "{what}");

    // The bytes, in pieces that respect no border.
    ok(dir, &format!("qemu-img convert -O raw {name} flat.raw"));
    let flat = std::fs::read(dir.join("flat.raw")).expect("made");
    let options = OpenOptions { backing: Policy::SameDirectory, ..Default::default() };
    let chain = open(&DISK, &path, &options).expect("opens");
    assert_eq!(chain.size(), flat.len() as u64, "{what}");
    let mut ours = vec![0xee; flat.len()];
    for (index, part) in ours.chunks_mut(77_777).enumerate() {
        read(&chain, index as u64 * 77_777, part).expect("reads");
    }
    assert!(ours == flat, "{what}");

    // Asked from anywhere, the answer is the rest of what `extents` says.
    for extent in extents(&chain).take(50) {
        let e = extent.expect("sound tables");
        let middle = e.start + e.len / 2;
        let half = status(&chain, middle, e.start + e.len - middle).expect("sound tables");
        assert_eq!((half.start, half.depth), (middle, e.depth));
        if let (Kind::Data(a), Kind::Data(b)) = (e.kind, half.kind) {
            assert_eq!(a.0 + e.len / 2, b.0);
        } else {
            assert_eq!(half.is_present(), e.is_present());
        }
    }
}

#[test]
fn a_matrix_of_geometries_and_backings() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    // No holes in it: whether a file system tells of them is its own affair.
    ok(dir, "qemu-img create -q -f raw base.raw 3M");
    ok(dir, "qemu-io -f raw -c 'write -q -P 0x11 0 3M' base.raw");
    ok(dir, "qemu-img create -q -f qed -b base.raw -F raw base.qed 4M");
    ok(dir, "qemu-io -f qed -c 'write -q -P 0x22 1M 300k' -c 'write -q -z 2M 64k' base.qed");
    for cluster in ["4k", "64k", "2M", "8M", "64M"] {
        for table in [1, 2, 4, 16] {
            let size = parse_size(cluster).expect("a size");
            // What QEMU cannot make (maximum beyond 64 bits) or not open (one cluster, B12).
            let geometry = Geometry::new(size, table).expect("legal");
            if geometry.max_mapped() >= 1 << 64 || table == 1 {
                continue;
            }
            for backing in ["", "-b base.raw -F raw", "-b base.qed -F qed"] {
                let what = format!("cluster_size={cluster},table_size={table}");
                ok(dir, &format!("qemu-img create -q -f qed -o {what} {backing} a.qed 9M"));
                ok(
                    dir,
                    "qemu-io -f qed -c 'write -q -P 1 8191k 5k' -c 'write -q -P 2 0 100k' \
                     -c 'write -q -z 64k 128k' -c 'write -q -P 3 512k 64k' \
                     -c 'write -q -P 4 576k 1100k' -c 'write -q -P 5 3M 1k' a.qed",
                );
                compare(dir, "a.qed", &format!("{what} {backing}"));
                let file =
                    crate::common::MemFile::new(&std::fs::read(dir.join("a.qed")).expect("made"));
                let report = check(&file, Repair::None).expect("checked");
                assert!(report.is_clean(), "{what} {backing}: {report:?}");
            }
        }
    }
    compare(dir, "base.raw", "raw");
    compare(dir, "base.qed", "qed");
}

#[test]
fn backing_files_shorter_than_their_overlay_and_of_odd_length() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    std::fs::write(dir.join("odd.raw"), [9; 70_001]).expect("written");
    ok(dir, "qemu-img create -q -f qed -b odd.raw -F raw mid.qed 1M");
    ok(dir, "qemu-img create -q -f qed -b mid.qed -F qed top.qed 2M");
    ok(dir, "qemu-img create -q -f qed -b top.qed -F qed small.qed 50k");
    ok(dir, "qemu-io -f qed -c 'write -q -P 1 512k 4k' top.qed");
    ok(dir, "qemu-img create -q -f raw holes.raw 1M");
    ok(dir, "qemu-io -f raw -c 'write -q -P 1 64k 64k' -c 'write -q -P 2 512k 4k' holes.raw");
    ok(dir, "qemu-img create -q -f qed -b holes.raw -F raw holes.qed 1M");
    for name in ["odd.raw", "mid.qed", "top.qed", "small.qed", "holes.raw", "holes.qed"] {
        compare(dir, name, name);
    }
}

#[test]
fn a_disk_of_exabytes_is_mapped_at_once() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -q -f qed -o cluster_size=4M,table_size=2 big.qed 3E");
    ok(dir, "qemu-io -f qed -c 'write -q -P 1 2E 4k' big.qed");
    // qemu-img map itself aborts on this one.
    let expected = [(2 << 60, false), (4 << 20, true), ((1 << 60) - (4 << 20), false)];
    let chain = open(&DISK, &dir.join("big.qed"), &OpenOptions::default()).expect("opens");
    let found = extents(&chain).map(|e| e.map(|e| (e.len, e.is_present())));
    assert_eq!(found.collect::<Result<Vec<_>, _>>().expect("sound tables"), expected);
}
