//! Images that the command and `qemu-img` make larger and smaller hold the same disk afterwards, of
//! the same clusters, with files of the same lengths where these are the disk.

use crate::common::{Place, have_qemu, read};

const BACKED: &str = "backing_file=base.raw,backing_fmt=raw";

/// The disk is the same, and as many of its clusters are allocated.
fn same(place: &Place, what: &str) {
    place.qemu("qemu-img compare -q -f qcow2 -F qcow2 ours.qcow2 theirs.qcow2");
    let clusters = |name: &str| {
        let text = place.qemu(&format!("qemu-img check -f qcow2 {name}"));
        text.split(" = ").next().unwrap_or_default().to_string()
    };
    assert_eq!(clusters("ours.qcow2"), clusters("theirs.qcow2"), "{what}");
}

#[test]
fn with_space_taken_ahead() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu("qemu-img create -q -f raw base.raw 4M");
    place.qemu("qemu-io -f raw -c 'write -q -P 9 0 4M' base.raw");
    let backed_v3 = format!("cluster_size=64k,{BACKED}");
    let backed_extended = format!("extended_l2=on,{BACKED}");
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "compat=v2",
        "extended_l2=on",
        "refcount_bits=1,cluster_size=2M",
        "data_file=NAME.raw",
        "data_file=NAME.raw,data_file_raw=on",
        &backed_v3,
        &backed_extended,
    ] {
        for mode in ["off", "metadata", "falloc", "full"] {
            let what = format!("{options}, {mode}");
            let each = |size: &str| {
                format!(
                    "rm -f NAME.raw; qemu-img create -q -f qcow2 -o {options} NAME.qcow2 1000448 && \
                     qemu-io -f qcow2 -c 'write -q -P 7 500k 3k' -c 'write -q -P 8 1000000 448' \
                     NAME.qcow2 && qemu-img resize -q -f qcow2 --preallocation={mode} NAME.qcow2 \
                     {size} && qemu-io -f qcow2 -c 'read -q -P 0 1000448 2097152' NAME.qcow2"
                )
            };
            place.ok(&each("+3M").replace("NAME", "ours"));
            place.qemu(&each("+3M").replace("NAME", "theirs"));
            same(&place, &what);
            if options.contains("data_file") {
                let len = std::fs::metadata(place.path("ours.raw")).expect("it is there").len();
                assert_eq!(len, 1_000_448 + (3 << 20), "{what}");
            }
        }
    }
}

#[test]
fn back_and_forth() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu("qemu-img create -q -f raw base.raw 4M");
    place.qemu("qemu-io -f raw -c 'write -q -P 9 0 4M' base.raw");
    for options in ["cluster_size=64k", BACKED] {
        let line = format!(
            "rm -f NAME.raw; qemu-img create -q -f qcow2 -o {options} NAME.qcow2 5M && \
             qemu-io -f qcow2 -c 'write -q -P 7 0 5M' NAME.qcow2 && \
             qemu-img resize -q -f qcow2 --shrink NAME.qcow2 1M && \
             qemu-img resize -q -f qcow2 NAME.qcow2 3M"
        );
        place.ok(&line.replace("NAME", "ours"));
        place.qemu(&line.replace("NAME", "theirs"));
        same(&place, options);
    }
    // A data file is cut, and made longer.
    place.ok("qemu-img create -q -f qcow2 -o data_file=ours.raw ours.qcow2 5M && \
         qemu-io -f qcow2 -c 'write -q -P 7 0 5M' ours.qcow2 && \
         qemu-img resize -q -f qcow2 --shrink ours.qcow2 1M && \
         qemu-img resize -q -f qcow2 ours.qcow2 3M && \
         qemu-io -f qcow2 -c 'read -q -P 0 1M 2M' -c 'read -q -P 7 0 1M' ours.qcow2");
    place.qemu("qemu-img check -q -f qcow2 ours.qcow2");
    assert_eq!(std::fs::metadata(place.path("ours.raw")).expect("it is there").len(), 3 << 20);
    // Growing cuts off nothing that was behind the disk.
    place.ok("rm ours.raw ours.qcow2 && \
         qemu-img create -q -f qcow2 -o data_file=ours.raw ours.qcow2 1M && \
         truncate -s 5M ours.raw && qemu-img resize -q -f qcow2 ours.qcow2 3M && \
         qemu-io -f qcow2 -c 'read -q -P 0 0 3M' ours.qcow2");
    assert_eq!(std::fs::metadata(place.path("ours.raw")).expect("it is there").len(), 5 << 20);
    // Where QEMU cannot, since no table of version 2 says that a cluster is zeros.
    place.ok(&format!(
        "qemu-img create -q -f qcow2 -o compat=v2,{BACKED} ours.qcow2 1000448 && \
         qemu-img resize -q -f qcow2 ours.qcow2 6M && \
         qemu-io -f qcow2 -c 'read -q -P 0 1000448 5M' -c 'read -q -P 9 0 1000448' ours.qcow2"
    ));
    place.qemu("qemu-img check -q -f qcow2 ours.qcow2");
}

#[test]
fn a_raw_image_takes_space() {
    let place = Place::new();
    for (mode, allocated) in [("off", 0), ("falloc", 3 << 20), ("full", 3 << 20)] {
        place.ok(&format!(
            "cowbell create -q -f raw a.raw 1M && \
             cowbell resize -q -f raw --preallocation {mode} a.raw 4M"
        ));
        let meta = std::fs::metadata(place.path("a.raw")).expect("it is there");
        assert_eq!(meta.len(), 4 << 20);
        let blocks = std::os::unix::fs::MetadataExt::blocks(&meta) * 512;
        assert!((allocated..allocated + (1 << 20)).contains(&blocks), "{mode}: {blocks}");
    }
}

#[test]
fn with_bitmaps() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu(
        "qemu-img create -q -f qcow2 a.qcow2 1M && qemu-img bitmap --add -g 512 a.qcow2 one && \
         qemu-img bitmap --add a.qcow2 two && qemu-io -f qcow2 -c 'write -q 0 70k' a.qcow2",
    );
    // Up, down, and with space taken ahead: both are to be used afterwards.
    for how in ["--shrink a.qcow2 200G", "--shrink a.qcow2 300k", "--preallocation=full a.qcow2 4M"]
    {
        place.ok(&format!("qemu-img resize -q -f qcow2 {how}"));
        place.qemu("qemu-img check -q -f qcow2 a.qcow2");
        let info = place.qemu("qemu-img info -f qcow2 a.qcow2");
        assert!(info.contains("name: one") && !info.contains("in-use"), "{how}: {info}");
        place.qemu(
            "qemu-img bitmap --add --merge one --merge two a.qcow2 all && \
             qemu-img bitmap --remove a.qcow2 all && qemu-img check -q -f qcow2 a.qcow2",
        );
    }
    // Not one that is not to be believed; then the other is as it was, too.
    let mut bytes = read(&place.path("a.qcow2"));
    // Older directories are still there, where nothing refers to them.
    for at in 24..bytes.len() {
        if bytes[at..].starts_with(b"two\0") {
            bytes[at - 24 + 15] |= 1;
        }
    }
    std::fs::write(place.path("a.qcow2"), &bytes).expect("written");
    let out = place.ours("qemu-img resize -q -f qcow2 a.qcow2 5M");
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&out.stderr),
        "qemu-img: Bitmap 'two' is inconsistent and cannot be used\n\
         Try block-dirty-bitmap-remove to delete this bitmap from disk\n"
    );
    assert!(read(&place.path("a.qcow2")) == bytes, "it was refused");
}

/// Where there is no space, an image has the size and the space that it had.
#[test]
fn without_space() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu(
        "qemu-img create -q -f qcow2 a.qcow2 4M && qemu-img bitmap --add a.qcow2 one && \
         qemu-io -f qcow2 -c 'write -q -P 5 1M 1M' a.qcow2",
    );
    let old = read(&place.path("a.qcow2")).len();
    for mode in ["falloc", "full"] {
        // No file may be longer than 8 MiB.
        let line = format!("qemu-img resize -q -f qcow2 --preallocation={mode} a.qcow2 60M");
        let out = place.ours(&format!("trap '' XFSZ; ulimit -f 16384; {line}"));
        assert_eq!(out.status.code(), Some(1), "{mode}: {out:?}");
        let info = place.qemu("qemu-img info -f qcow2 a.qcow2 && qemu-img check -f qcow2 a.qcow2");
        assert!(info.contains("(4194304 bytes)") && info.contains("No errors"), "{mode}: {info}");
        assert!(!info.contains("in-use"), "{mode}: {info}");
        let len = read(&place.path("a.qcow2")).len();
        assert!(len < old + (1 << 20), "{mode}: {len} bytes, {old} before");
        place.qemu("qemu-io -f qcow2 -c 'read -q -P 5 1M 1M' -c 'read -q -P 0 2M 2M' a.qcow2");
    }
}
