//! Images that the command and `qemu-img` make larger and smaller hold the same disk afterwards, of
//! the same clusters, with files of the same lengths where these are the disk.

mod common;

use common::{Place, have_qemu};

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
