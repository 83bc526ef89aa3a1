//! qcow2 images that `create` makes are those of `qemu-img create`: byte for byte where there is
//! no choice of places, and checked and described alike everywhere.

use std::path::Path;

use crate::common::{DISK, have_qemu, ok, run};
use cowbell_formats::create::{CreateOptions, create, plan};
use cowbell_formats::{Format, OpenOptions, Policy, open};

fn make(dir: &Path, name: &str, options: &str) {
    let mut parsed = CreateOptions::default();
    parsed.parse(Format::Qcow2, options).expect(options);
    create(&DISK, &dir.join(name), Format::Qcow2, &parsed).expect(options);
}

/// What `qemu-img info` says, without names and what depends on the file system.
fn description(dir: &Path, name: &str) -> String {
    let text = ok(dir, &format!("qemu-img info {name}")).replace(name, "IMAGE");
    let lines = text.lines().filter(|line| !line.contains("disk size"));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn every_option() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -q -f raw base.raw 3M");
    // With more L2 tables or refcount blocks than one there is a choice of places; where space is
    // reserved QEMU moves the refcount table.
    let same = [
        "size=1M",
        "size=0",
        "size=1",
        "size=1G,compat=v2",
        "size=1M,compat=0.10,cluster_size=512",
        "size=1M,cluster_size=512",
        "size=1M,cluster_size=4k,refcount_bits=1",
        "size=1M,cluster_size=8k,refcount_bits=64",
        "size=2E,cluster_size=2M",
        "size=1M,lazy_refcounts=on",
        "size=1M,extended_l2=on",
        "size=1M,compression_type=zstd",
        "size=1M,preallocation=metadata",
        "size=1M,extended_l2=on,preallocation=metadata",
        "backing_file=base.raw,backing_fmt=raw",
        "backing_file=base.raw,backing_fmt=raw,cluster_size=512,compat=v2",
        "backing_file=base.raw,backing_fmt=raw,extended_l2=on,preallocation=metadata",
        "size=1M,data_file=d.raw",
        "size=1M,data_file=d.raw,data_file_raw=on",
        "size=1M,data_file=d.raw,preallocation=full",
        "size=1M,data_file=d.raw,backing_file=base.raw,backing_fmt=raw",
    ];
    let alike = [
        "size=1M,preallocation=full",
        "size=1M,preallocation=falloc",
        "size=100G,cluster_size=512,extended_l2=off",
        "size=1G,cluster_size=512,refcount_bits=64",
        "size=20M,cluster_size=512,preallocation=metadata",
        "size=200M,cluster_size=4k,refcount_bits=64,preallocation=metadata",
        "size=20M,cluster_size=512,refcount_bits=1,preallocation=falloc",
        "size=3G,preallocation=metadata",
        "size=40M,cluster_size=512,data_file=d.raw,data_file_raw=on",
    ];
    for options in same.into_iter().chain(alike) {
        for name in ["d.raw", "ours.qcow2", "theirs.qcow2"] {
            let _ = std::fs::remove_file(dir.join(name));
        }
        make(dir, "ours.qcow2", options);
        let data = std::fs::read(dir.join("d.raw")).ok();
        ok(dir, "qemu-img check -q ours.qcow2");
        let ours = description(dir, "ours.qcow2");
        let _ = std::fs::remove_file(dir.join("d.raw"));
        ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} theirs.qcow2"));
        assert!(data == std::fs::read(dir.join("d.raw")).ok(), "{options}");
        if same.contains(&options) {
            assert_eq!(ours, description(dir, "theirs.qcow2"), "{options}");
            let [a, b] = ["ours.qcow2", "theirs.qcow2"].map(|name| std::fs::read(dir.join(name)));
            assert!(a.expect("made") == b.expect("made"), "{options}");
        } else {
            let lines = |text: String| {
                text.lines().filter(|line| !line.contains("length")).collect::<String>()
            };
            assert_eq!(lines(ours), lines(description(dir, "theirs.qcow2")), "{options}");
        }
        if !options.contains("size=2E") {
            ok(dir, "qemu-img compare -q ours.qcow2 theirs.qcow2");
        }
        let files = OpenOptions { backing: Policy::SameDirectory, ..Default::default() };
        for write in [false, true] {
            let options_ = OpenOptions { write, ..files.clone() };
            let chain = open(&DISK, &dir.join("ours.qcow2"), &options_).expect(options);
            assert_eq!(chain.layers.len(), 1 + usize::from(options.contains("backing")));
            assert_eq!(chain.layers[0].more.len(), usize::from(options.contains("data_file=")));
        }
    }
}

#[test]
fn it_announces_and_complains_as_qemu_does() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -q -f raw base 3M");
    let path = &dir.join("x");
    let (whole, folder) = (&path.to_string_lossy(), &dir.to_string_lossy());
    for text in [
        "size=1M",
        "size=1M,cluster_size=4k,refcount_bits=1,lazy_refcounts=on,extended_l2=off",
        "size=1M,compat=0.10",
        "size=1M,extended_l2=on,compression_type=zstd,preallocation=metadata",
        "backing_file=base,backing_fmt=raw,cluster_size=2M",
        "size=1M,data_file=%/d.raw,data_file_raw=off",
        "size=1M,compat=v4",
        "size=1M,cluster_size=3k",
        "size=1M,cluster_size=256",
        "size=1M,cluster_size=4M",
        "size=1M,lazy_refcounts=bla",
        "size=1M,lazy_refcounts=on,compat=v2",
        "size=1M,refcount_bits=3",
        "size=1M,refcount_bits=0",
        "size=1M,refcount_bits=128",
        "size=1M,refcount_bits=8,compat=v2",
        "size=1M,extended_l2=on,compat=v2",
        "size=1M,extended_l2=on,cluster_size=8k",
        "size=1M,compression_type=zstd,compat=v2",
        "size=1M,compression_type=foo",
        "size=1M,preallocation=bla",
        "size=1M,backing_file=base,backing_fmt=raw,preallocation=metadata",
        "size=1M,data_file_raw=on",
        "size=1M,data_file=%/d.raw,compat=v2",
        "size=1M,data_file=%/d.raw,data_file_raw=on,backing_file=base,backing_fmt=raw",
        "size=7E",
        "size=1T,cluster_size=512",
        "size=1M,table_size=1",
        "size=1M,foo=1",
    ] {
        let text = &text.replace('%', folder);
        let mut options = CreateOptions::default();
        let mut said = String::new();
        let result = options.parse(Format::Qcow2, text).and_then(|()| {
            let plan = plan(&DISK, path, Format::Qcow2, &options)?;
            said = plan.formatting(path) + "\n";
            plan.run(&DISK)
        });
        let out = run(dir, &format!("qemu-img create -f qcow2 -o '{text}' y"));
        let theirs = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace("'y'", "'x'");
        match result {
            Ok(()) => assert_eq!(said.replace(&**whole, "x"), theirs(&out.stdout), "{text}"),
            Err(error) => {
                let line = theirs(&out.stderr);
                assert_eq!(format!("qemu-img: y: {error}"), line.trim_end(), "{text}");
            }
        }
    }
}

#[test]
fn encryption_is_refused_by_name() {
    for text in ["encryption=on", "encrypt.format=luks", "encrypt.key-secret=sec0"] {
        let error = CreateOptions::default().parse(Format::Qcow2, text).expect_err(text);
        assert!(error.to_string().contains("encryption of qcow2 images"), "{error}");
    }
}
