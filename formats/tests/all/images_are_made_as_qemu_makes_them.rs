//! What `create` makes is byte for byte what `qemu-img create` makes, and opens there.

use crate::common::{DISK, have_qemu, ok, run};
use cowbell_formats::create::{CreateOptions, create, parse_size, plan};
use cowbell_formats::qed::disk::layout::Geometry;
use cowbell_formats::{Format, OpenOptions, Policy, open};

/// The file in compact form: length and the bytes that are not zero.
fn digest(path: &std::path::Path) -> (usize, Vec<(usize, u8)>) {
    let bytes = std::fs::read(path).expect("made");
    let set = bytes.iter().copied().enumerate().filter(|&(_, byte)| byte != 0).collect();
    (bytes.len(), set)
}

#[test]
fn every_geometry_and_kind_of_backing() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -f raw base.raw 3M");
    ok(dir, "qemu-img create -f qed base.qed 5M");
    for cluster in ["4k", "64k", "2M", "8M", "64M"] {
        for table in [1, 2, 4, 16] {
            let bytes = parse_size(cluster).expect("a size");
            let geometry = Geometry::new(bytes, table).expect("legal");
            // QEMU computes the maximum in 64 bits, finds 0, and makes and opens no such image.
            let qemu_can = geometry.max_mapped() < 1 << 64;
            for backing in ["none", "raw", "qed"] {
                let text = format!("cluster_size={cluster},table_size={table}");
                let mut options = CreateOptions::default();
                options.parse(Format::Qed, &text).expect("valid options");
                let mut theirs = format!("qemu-img create -q -f qed -o {text}");
                if backing == "none" {
                    options.size = Some(10 << 20);
                    theirs += " theirs.qed 10M";
                } else {
                    let text = format!("backing_file=base.{backing},backing_fmt={backing}");
                    options.parse(Format::Qed, &text).expect("valid options");
                    theirs += &format!(" -b base.{backing} -F {backing} theirs.qed");
                }
                let line = format!("{cluster} {table} {backing}");
                let path = dir.join("ours.qed");
                create(&DISK, &path, Format::Qed, &options).expect(&line);
                if qemu_can {
                    ok(dir, &theirs);
                    assert!(digest(&path) == digest(&dir.join("theirs.qed")), "{line}");
                }
                let options = OpenOptions { backing: Policy::SameDirectory, ..Default::default() };
                let chain = open(&DISK, &path, &options).expect(&line);
                assert_eq!(chain.layers.len(), if backing == "none" { 1 } else { 2 });
                assert_eq!(chain.layers[0].format, Format::Qed);
                std::fs::remove_file(&path).expect("made");
            }
        }
    }
}

#[test]
fn the_largest_geometry_and_the_smallest_table_are_legal() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("big.qed");
    for text in ["size=7E,cluster_size=64M,table_size=16", "size=1M,cluster_size=4k,table_size=1"] {
        let mut options = CreateOptions::default();
        options.parse(Format::Qed, text).expect("valid options");
        create(&DISK, &path, Format::Qed, &options).expect(text);
        let chain = open(&DISK, &path, &OpenOptions::default()).expect(text);
        assert_eq!(Some(chain.size()), options.size);
    }
    if have_qemu() {
        // B12: QEMU makes such an image and does not open it.
        ok(dir.path(), "qemu-img create -q -f qed -o cluster_size=4k,table_size=1 b12.qed 1M");
        let chain = open(&DISK, &dir.path().join("b12.qed"), &OpenOptions::default());
        assert_eq!(chain.expect("ours opens it").size(), 1 << 20);
    }
}

#[test]
fn raw_images_have_qemus_length() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    for size in ["0", "1", "0.3k", "64k", "1.5M"] {
        for how in ["off", "falloc", "full"] {
            let mut options = CreateOptions::default();
            options.parse(Format::Raw, &format!("size={size},preallocation={how}")).expect("ok");
            create(&DISK, &dir.join("ours"), Format::Raw, &options).expect("made");
            ok(dir, &format!("qemu-img create -q -f raw -o preallocation={how} theirs {size}"));
            assert_eq!(digest(&dir.join("ours")), digest(&dir.join("theirs")), "{size} {how}");
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
    let path = &dir.join("x");
    let whole = &path.to_string_lossy();
    ok(dir, "qemu-img create -f raw base 3M");
    let cases = [
        (Format::Qed, "size=1M"),
        (Format::Qed, "size=1M,cluster_size=4k,table_size=2"),
        (Format::Qed, "backing_file=base,backing_fmt=raw"),
        (Format::Raw, "size=1M,preallocation=full"),
        (Format::Qed, "foo=1"),
        (Format::Raw, "cluster_size=4k"),
        (Format::Qed, "size=1M,cluster_size=3k"),
        (Format::Qed, "size=1M,table_size=3"),
        (Format::Raw, "size=1M,preallocation=bla"),
        (Format::Raw, "size=1M,backing_file=base"),
        (Format::Raw, "size=7E"),
        (Format::Qed, "size=1M,cluster_size=-1"),
    ];
    for (format, text) in cases {
        let mut options = CreateOptions::default();
        let mut said = String::new();
        let result = options.parse(format, text).and_then(|()| {
            let plan = plan(&DISK, path, format, &options)?;
            said = plan.formatting(path) + "\n";
            plan.run(&DISK)
        });
        let rest: Vec<&str> = text.split(',').filter(|o| !o.is_empty()).collect();
        let out = run(dir, &format!("qemu-img create -f {format} -o '{}' y", rest.join(",")));
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
