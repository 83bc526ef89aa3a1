//! Images that qemu-img and qemu-io made, of every kind, are mapped and read as qemu-img does.

use std::path::Path;

use crate::common::{DISK, have_qemu, ok};
use cowbell_formats::map::{extents, read};
use cowbell_formats::{Format, OpenOptions, Policy, open};

/// Start, length, depth, present, zero, compressed, and where it is.
type Shown = (u64, u64, usize, bool, bool, bool, Option<u64>);

/// What `qemu-img map` says.
fn mapped(dir: &Path, name: &str) -> Vec<Shown> {
    let text = ok(dir, &format!("qemu-img map --output json {name}"));
    let field = |line: &str, key: &str| {
        let rest = line.split_once(&format!("\"{key}\": "))?.1;
        Some(rest.split([',', '}']).next()?.trim().to_string())
    };
    let number = |line: &str, key: &str| field(line, key)?.parse::<u64>().ok();
    let lines = text.lines().filter(|line| line.contains("\"start\""));
    let all = lines
        .map(|line| {
            let is = |key| field(line, key).as_deref() == Some("true");
            (
                number(line, "start").expect("a number"),
                number(line, "length").expect("a number"),
                number(line, "depth").expect("a number") as usize,
                is("present"),
                is("zero"),
                is("compressed"),
                // The place of a subcluster that is not allocated means nothing.
                number(line, "offset").filter(|_| is("present")),
            )
        })
        .collect::<Vec<Shown>>();
    let mut joined: Vec<Shown> = Vec::new();
    for next in all {
        match joined.last_mut() {
            Some(last) if !last.3 && !next.3 && last.2 == next.2 => last.1 += next.1,
            _ => joined.push(next),
        }
    }
    joined
}

/// Maps and reads `name`, by us and by QEMU.
fn compare(dir: &Path, name: &str, what: &str) {
    let options = OpenOptions {
        format: Some(Format::Qcow2),
        backing: Policy::SameDirectory,
        ..Default::default()
    };
    let chain = open(&DISK, &dir.join(name), &options).expect(what);
    let ours: Vec<Shown> = extents(&chain)
        .map(|extent| {
            let e = extent.expect(what);
            let compressed = e.kind == cowbell_formats::map::Kind::Compressed;
            let host = e.host().map(|host| host.0);
            (e.start, e.len, e.depth, e.is_present(), e.is_zero(), compressed, host)
        })
        .collect();
    // QEMU guesses that large clusters with few bytes are preallocated, and shows their holes.
    if !what.starts_with("extended_l2=on,cluster_size=2M") {
        assert_eq!(ours, mapped(dir, name), "{what}");
    }
    ok(dir, &format!("qemu-img convert -O raw {name} plain.raw"));
    let expected = std::fs::read(dir.join("plain.raw")).expect("made");
    assert_eq!(chain.size(), expected.len() as u64, "{what}");
    for step in [1 << 20, 10_007] {
        let mut at = 0;
        let mut buf = vec![0xee; step];
        while at < expected.len() {
            let len = step.min(expected.len() - at);
            read(&chain, at as u64, &mut buf[..len]).expect(what);
            assert!(buf[..len] == expected[at..at + len], "{what}: bytes at {at}");
            at += len;
        }
    }
}

const WRITES: &str = "-c 'write -q -P 1 8191k 5k' -c 'write -q -P 2 0 100k' \
    -c 'write -q -z 64k 128k' -c 'write -q -P 3 512k 64k' -c 'write -q -P 4 576k 1100k' \
    -c 'write -q -P 5 3M 1k' -c 'discard -q 600k 128k' -c 'write -q -z -u 1M 200k'";

#[test]
fn every_option() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -q -f raw base.raw 3M");
    ok(dir, "qemu-io -f raw -c 'write -q -P 7 0 700k' -c 'write -q -P 8 2M 64k' base.raw");
    ok(dir, "qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2 5M");
    ok(dir, "qemu-io -f qcow2 -c 'write -q -P 9 300k 10k' -c 'write -q -z 640k 64k' mid.qcow2");
    for options in [
        "cluster_size=64k",
        "compat=v2",
        "compat=v2,cluster_size=512",
        "cluster_size=512",
        "cluster_size=1k,refcount_bits=1",
        "cluster_size=4k,refcount_bits=2",
        "cluster_size=32k,refcount_bits=4",
        "cluster_size=128k,refcount_bits=8",
        "cluster_size=2M,refcount_bits=32",
        "refcount_bits=64,lazy_refcounts=on",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on",
        "extended_l2=on,cluster_size=2M",
        "data_file=d.raw",
        "data_file=d.raw,extended_l2=on",
        "compression_type=zstd",
    ] {
        for backing in ["", "-b base.raw -F raw", "-b mid.qcow2 -F qcow2"] {
            let what = format!("{options} {backing}");
            let _ = std::fs::remove_file(dir.join("d.raw"));
            ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} {backing} a.qcow2 9M"));
            // A version 2 image cannot say that there are zeros over a backing file.
            let zeros = !options.contains("v2") || backing.is_empty();
            let writes =
                if zeros { WRITES.into() } else { WRITES.replace("write -q -z", "read -q") };
            let writes = writes.replace("read -q -u", "read -q");
            ok(dir, &format!("qemu-io -f qcow2 -d unmap {writes} a.qcow2"));
            compare(dir, "a.qcow2", &what);
            // A refcount of one bit cannot count two.
            if !options.contains("data_file") && !options.ends_with("refcount_bits=1") {
                ok(dir, "qemu-img snapshot -c one a.qcow2");
                ok(dir, "qemu-io -f qcow2 -c 'write -q -P 6 32k 700k' a.qcow2");
                compare(dir, "a.qcow2", &format!("{what}, a snapshot"));
                if !options.contains("v2") {
                    ok(dir, "qemu-img bitmap --add a.qcow2 bits");
                    compare(dir, "a.qcow2", &format!("{what}, a bitmap"));
                }
            }
        }
    }
}

#[test]
fn compressed_ones() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    // Text, noise, zeros, and an end that is no whole cluster.
    let mut bytes = Vec::new();
    let mut random = 7u64;
    for i in 0..300_000u64 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let word = if i % 4000 < 2500 { i / 50 } else { random };
        bytes.extend(if i % 90_000 < 60_000 { word.to_le_bytes() } else { [0; 8] });
    }
    std::fs::write(dir.join("in.raw"), &bytes[..bytes.len() - 1000]).expect("written");
    for kind in ["zlib", "zstd"] {
        for options in [
            "cluster_size=512",
            "cluster_size=4k",
            "cluster_size=64k",
            "cluster_size=2M",
            "cluster_size=64k,extended_l2=on",
        ] {
            let what = format!("{options},compression_type={kind}");
            ok(dir, &format!("qemu-img convert -c -O qcow2 -o {what} in.raw a.qcow2"));
            compare(dir, "a.qcow2", &what);
            ok(dir, "qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2 3M");
            ok(dir, "qemu-io -f qcow2 -c 'write -q -P 1 70k 1k' b.qcow2");
            compare(dir, "b.qcow2", &format!("an overlay of {what}"));
        }
    }
}
