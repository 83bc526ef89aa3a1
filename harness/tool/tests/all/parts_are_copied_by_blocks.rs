//! `dd` copies what QEMU's copies, out of every format and into every other, and is as careful with the
//! target as `convert` is.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{COWBELL, Place, Random, have_qemu, read};

/// A disk of an odd size with data and zeros in it, as raw and as qcow2 over raw.
fn sources(place: &Place) {
    let mut random = Random(7);
    let mut bytes = vec![0; 3_000_111];
    for _ in 0..30 {
        let at = random.below(2_900_000) as usize;
        let len = random.below(70_000) as usize;
        bytes[at..at + len].fill_with(|| random.next() as u8);
    }
    std::fs::write(place.path("a.raw"), &bytes).expect("a scratch file");
    place.ok("cowbell create -q -f qcow2 -b a.raw -F raw a.qcow2 && \
         cowbell io -f qcow2 -c 'write -q -P 5 1000 200k' -c 'write -q -z 1M 128k' a.qcow2");
}

const PARTS: [&str; 24] = [
    "",
    "bs=1M",
    "bs=1000",
    "bs=1 count=100",
    "bs=1 count=100 skip=3",
    "bs=513 skip=1",
    "bs=513 count=77 skip=5",
    "bs=65536 count=20 skip=7",
    "bs=1.5k skip=10",
    "bs=64k skip=15",
    "bs=3000 count=3 skip=2",
    "bs=3000 count=3 skip=3",
    "bs=3000 count=3 skip=4",
    "count=0",
    "count=0 skip=1",
    "skip=5860",
    "skip=5861",
    "bs=0x1000 count=010 skip=0x2",
    "bs=2147483647",
    "bs=2147483647 count=9223372036854775807",
    "bs=2147483647 skip=9223372036854775807",
    "count=9223372036854775807 skip=1",
    "skip=2 count=3 skip=1",
    "bs=4096 count=+9",
];

#[test]
fn parts_of_disks() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    sources(&place);
    for source in ["-f raw if=a.raw", "-f qcow2 if=a.qcow2", "-U if=a.qcow2"] {
        for part in PARTS {
            let line = format!("qemu-img dd {source} {part}");
            let ours = place.ours(&format!("{line} of=ours"));
            let theirs = place.theirs(&format!("{line} of=theirs"));
            assert_eq!(ours.status.code(), Some(0), "{line}");
            assert_eq!((ours.stderr, ours.stdout), (theirs.stderr, theirs.stdout), "{line}");
            assert!(read(&place.path("ours")) == read(&place.path("theirs")), "{line}");
        }
    }
    // What is zeros takes no space.
    place.ok("truncate -s 50M hole && cowbell dd -f raw if=hole of=x && test $(du -k x | cut -f1) -lt 100");
}

#[test]
fn into_every_format() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    sources(&place);
    for format in ["raw", "qcow2", "qed", "vdi", "vmdk"] {
        for part in PARTS {
            let line = format!("qemu-img dd -O {format} if=a.qcow2 {part}");
            // QEMU opens no VMDK image without a byte.
            if place.theirs(&format!("{line} of=theirs")).status.code() != Some(0) {
                continue;
            }
            place.ok(&format!("{line} of=ours"));
            let size = |name: &str| {
                place.qemu(&format!("qemu-img info -f {format} {name} | grep '^virtual size'"))
            };
            assert_eq!(size("ours"), size("theirs"), "{line}");
            let compare = format!("compare -f {format} -F {format} ours theirs");
            place.qemu(&format!("qemu-img {compare}"));
            place.ok(&format!("cowbell {compare}"));
            if format != "raw" {
                place.qemu(&format!("qemu-img check -q -f {format} ours"));
            }
        }
    }
    place.ok("cowbell dd --image-opts if=driver=qcow2,file.filename=a.qcow2 -O qcow2 of=file:x");
    place.qemu("qemu-img compare -f qcow2 -F qcow2 a.qcow2 x");
    assert!(!place.ok("ls").contains("partial"));
}

#[test]
fn mistakes_are_told_as_qemu_tells_them() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu("qemu-img create -q -f raw a.raw 1M");
    for line in [
        "",
        "if=a.raw",
        "of=x",
        "-f raw",
        "if= of=x",
        "if=nothere of=x",
        "-f foo if=a.raw of=x",
        "-f qcow2 if=a.raw of=x",
        "-O foo if=a.raw of=x",
        "-O foo if=nothere of=x",
        "-O foo bs=x if=a.raw of=x",
        "foo=1 bs=x if=a.raw of=x",
        "bs=x foo=1 if=a.raw of=x",
        "if=a.raw of=x foo=1",
        "if=a.raw of=x foo",
        "if=a.raw of=x count",
        "if=a.raw of=x ''",
        "if=a.raw of=x ' bs=1'",
        "if=a.raw of=x seek=1",
        "if=a.raw of=x conv=notrunc",
        "if=a.raw of=x isize=1 osize=1",
        "if=a.raw of=x bs=0",
        "if=a.raw of=x bs=-1",
        "if=a.raw of=x bs=x",
        "if=a.raw of=x bs=",
        "if=a.raw of=x bs=2G",
        "if=a.raw of=x bs=16E",
        "if=a.raw of=x count=-1",
        "if=a.raw of=x count=x",
        "if=a.raw of=x count=1k",
        "if=a.raw of=x count=1.5",
        "if=a.raw of=x count=99999999999999999999",
        "if=a.raw of=x skip=-1",
        "if=a.raw of=x skip=",
        "if=a.raw of=x skip=1k",
        "--image-opts -f raw if=driver=raw,file.filename=a.raw of=x",
        "-n if=a.raw of=x",
        "-q if=a.raw of=x",
        "--foo if=a.raw of=x",
        "if=a.raw of=x -f",
    ] {
        let ours = place.ours(&format!("qemu-img dd {line}"));
        let left = place.ok("ls");
        assert!(!left.contains('x') && !left.contains("partial"), "{line}: {left}");
        let theirs = place.theirs(&format!("qemu-img dd {line}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(text(&ours.stderr), text(&theirs.stderr), "{line}");
        assert_eq!(ours.status.code(), Some(1), "{line}");
    }
    // What is read is not written over.
    assert_eq!(place.ours("cowbell dd -O qcow2 if=a.raw of=a.raw").status.code(), Some(1));
    assert_eq!(read(&place.path("a.raw")).len(), 1 << 20);
    let out = place.ours("cowbell dd if=a.raw of=x skip=2049");
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(text, "cowbell: dd: a.raw: cannot skip to specified offset\n");
    assert_eq!((out.status.code(), read(&place.path("x")).len()), (Some(0), 0));
}

#[test]
fn what_cannot_be_read_leaves_what_was_there() {
    let place = Place::new();
    let text: Vec<u8> =
        (0..300_000).flat_map(|line| format!("line {line}\n").into_bytes()).collect();
    std::fs::write(place.path("text"), text).expect("a scratch file");
    place.ok("cowbell convert -c -O qcow2 text bad.qcow2 && echo old > x");
    // Compressed clusters that do not inflate, whichever lie there.
    let mut bytes = read(&place.path("bad.qcow2"));
    let at = bytes.len() / 2;
    bytes[at..at + 100_000].fill(0xff);
    std::fs::write(place.path("bad.qcow2"), bytes).expect("written");
    let out = place.ours("cowbell dd -f qcow2 if=bad.qcow2 of=x bs=100k skip=1");
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1));
    assert!(text.starts_with("cowbell: dd: error while reading at byte "), "{text}");
    assert_eq!(read(&place.path("x")), b"old\n");
    assert!(!place.path("x.partial").exists());
}

#[test]
fn nothing_is_left_of_one_that_was_ended() {
    let place = Place::new();
    place.ok("truncate -s 1G big && head -c 300M /dev/zero | tr '\\0' x | dd of=big bs=1M conv=notrunc status=none");
    std::fs::write(place.path("old"), "old").expect("a scratch file");
    let mut child = Command::new(COWBELL)
        .args(["dd", "-f", "raw", "if=big", "of=old"])
        .current_dir(place.dir.path())
        .stderr(Stdio::null())
        .spawn()
        .expect("it runs");
    while !place.path("old.partial").exists() && child.try_wait().expect("it is ours").is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    place.ours(&format!("kill -INT {}", child.id()));
    let code = child.wait().expect("it ends").code();
    let there = read(&place.path("old"));
    match code {
        // It was quicker.
        Some(0) => assert_eq!(there.len(), 1 << 30),
        // While the target was made; while it was copied.
        Some(1 | 130) => assert_eq!(there, b"old"),
        code => panic!("{code:?}"),
    }
    assert!(!place.path("old.partial").exists());
}
