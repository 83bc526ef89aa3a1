//! `convert --bitmaps` copies a qcow2 image's persistent bitmaps, bit for bit as QEMU does.

use crate::common::{Place, Random, have_qemu, read};

/// What a bitmap says, as QEMU's server tells its clients. It only reads; told to end, it once did not, for an hour.
fn dirty(place: &Place, image: &str, bitmap: &str) -> String {
    let name = format!("qemu:dirty-bitmap:{bitmap}");
    let server = "driver=nbd,server.type=unix,server.path=sock";
    place.qemu(&format!(
        "rm -f sock; qemu-nbd -r -t -k $PWD/sock -f qcow2 -B {bitmap} {image} & pid=$!; \
         while [ ! -S sock ]; do kill -0 $pid || exit; sleep 0.01; done; \
         qemu-img map --output json --image-opts {server},x-dirty-bitmap={name}; rc=$?; \
         kill -9 $pid; wait $pid; exit $rc"
    ))
}

/// Names, granularities and flags.
fn listed(place: &Place, image: &str) -> String {
    let info = place.qemu(&format!("qemu-img info --output json -f qcow2 {image}"));
    let from = info.find("\"bitmaps\"").map_or("", |at| &info[at..]);
    from.split_once(']').map_or("", |_| from.split("\"refcount-bits\"").next().unwrap_or("")).into()
}

fn source(place: &Place, cluster: &str, size: &str, options: &str) {
    place.ok("rm -f a");
    // QEMU makes none that would be too long.
    let fine = if size.ends_with('T') { "32k" } else { "512" };
    place.qemu(&format!(
        "qemu-img create -q -f qcow2 -o cluster_size={cluster}{options} a {size} && \
         qemu-img bitmap --add -g {fine} a fine && qemu-img bitmap --add -g 64k a coarse && \
         qemu-img bitmap --add a empty && qemu-img bitmap --add -g 2M a full"
    ));
    let mut random = Random(size.len() as u64);
    let mut writes = String::new();
    for _ in 0..20 {
        let at = random.below(39 << 20) & !511;
        writes += &format!(" -c 'write -q -P 3 {at} {}'", 512 + random.below(300) * 512);
    }
    place.qemu(&format!("qemu-img bitmap --disable a empty && qemu-io -f qcow2 {writes} a"));
    place.qemu("qemu-img bitmap --disable a fine && qemu-io -f qcow2 -c 'write -q -z 0 40M' a");
    place.qemu("qemu-img bitmap --disable a full");
}

#[test]
fn bit_for_bit() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu("qemu-img create -q -f qcow2 base 40M");
    for (cluster, size, options, target) in [
        ("64k", "40M", "", ""),
        ("4k", "41943552", "", "-o cluster_size=64k -m 16"),
        ("64k", "100M", "", "-o cluster_size=512"),
        ("2M", "40M", ",extended_l2=on", "-c -o cluster_size=4k,compression_type=zstd"),
        ("64k", "40M", ",data_file=data", "-o data_file=data2"),
        ("64k", "3T", "", "-o lazy_refcounts=on"),
        ("64k", "40M", "", "-B base -F qcow2"),
        ("64k", "40M", "", "-o cluster_size=512 -B base -F qcow2"),
    ] {
        source(&place, cluster, size, options);
        let line = format!("convert --bitmaps -O qcow2 {target} a");
        place.ok(&format!("cowbell {line} ours"));
        place.qemu("qemu-img check -q -f qcow2 ours && qemu-img compare -q a ours");
        place.ok("cowbell check -q ours");
        assert_eq!(listed(&place, "ours"), listed(&place, "a"), "{line}");
        assert!(listed(&place, "ours").contains("coarse"), "{line}");
        for name in ["fine", "coarse", "empty", "full"] {
            assert!(dirty(&place, "ours", name) == dirty(&place, "a", name), "{line}: {name}");
        }
        // Who uses the image uses them.
        place.qemu("qemu-io -f qcow2 -c 'write -q 10M 64k' ours && qemu-img check -q ours");
        place.qemu("qemu-img bitmap --add --merge full ours more && qemu-img check -q ours");
        place.ok("rm -f ours data2");
    }
}

#[test]
fn what_cannot_be_copied_is_told_as_qemu_tells_it() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu(
        "qemu-img create -q -f qcow2 a 8M && qemu-img bitmap --add a one && \
         qemu-img bitmap --add a two && qemu-img create -q -f raw r 8M && \
         qemu-img create -q -f qcow2 -o compat=0.10 old 8M",
    );
    let same = |line: &str| {
        let ours = place.ours(&format!("qemu-img {line}"));
        assert!(!place.ok("ls").contains("partial"), "{line}");
        let theirs = place.theirs(&format!("rm -f x; qemu-img {line}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(text(&ours.stderr), text(&theirs.stderr), "{line}");
        assert_eq!(ours.status.code(), theirs.status.code(), "{line}");
    };
    for line in [
        "convert --bitmaps -O raw a x",
        "convert --bitmaps -O qed a x",
        "convert --bitmaps -f raw -O qcow2 r x",
        "convert --bitmaps -O qcow2 old x",
        "convert --bitmaps -O qcow2 -o compat=0.10 a x",
        "convert --bitmaps -O qcow2 a a x",
        "convert --skip-broken-bitmaps -O qcow2 a x",
    ] {
        let out = place.ours(&format!("rm -f x; cowbell {line}"));
        assert!(out.status.code() == Some(1) && !place.path("x").exists(), "{line}");
        same(line);
    }
    // The first is left as by somebody who has written the disk without keeping it.
    let mut bytes = read(&place.path("a"));
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let at =
        bytes.windows(4).position(|four| four == [0x23, 0x85, 0x28, 0x75]).expect("it is there");
    let directory = word(at + 24) as usize;
    bytes[directory + 15] |= 1;
    std::fs::write(place.path("a"), bytes).expect("written");
    same("convert --bitmaps -O qcow2 a x");
    same("convert --bitmaps --skip-broken-bitmaps -O qcow2 a x");
    place.ok("rm -f x && cowbell convert --bitmaps --skip-broken-bitmaps -O qcow2 a x");
    let listed = listed(&place, "x");
    assert!(listed.contains("two") && !listed.contains("one"), "{listed}");
    for line in ["convert --bitmaps -n -O qcow2 a x", "convert --bitmaps -l s -O qcow2 a y"] {
        assert_eq!(place.ours(&format!("cowbell {line}")).status.code(), Some(1), "{line}");
    }
}
