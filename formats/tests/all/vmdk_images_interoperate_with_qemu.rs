//! VMDK images made by qemu-img read the same here, map the same and check clean; those made here
//! are clean and the same there. Every layout.

use std::path::Path;

use crate::common::{DISK, have_qemu, ok};
use cowbell_formats::chain::{Chain, open_whole_layer};
use cowbell_formats::check::Repair;
use cowbell_formats::map::{extents, read};
use cowbell_formats::vmdk::disk::descriptor::Kind;
use cowbell_formats::vmdk::rest::check::check;
use cowbell_formats::vmdk::rest::create::Wanted;
use cowbell_formats::{CreateOptions, Format, OpenOptions, Policy, create, open};

const KINDS: [Kind; 5] = [
    Kind::MonolithicSparse,
    Kind::MonolithicFlat,
    Kind::TwoGbMaxExtentSparse,
    Kind::TwoGbMaxExtentFlat,
    Kind::StreamOptimized,
];

fn chain(path: &Path) -> Chain<cowbell_engine::sys::disk::DiskFile> {
    let options = OpenOptions { backing: Policy::SameDirectory, ..OpenOptions::default() };
    open(&DISK, path, &options).expect("it opens")
}

/// Has our reader see what `raw` holds?
fn assert_reads_as(path: &Path, raw: &Path) {
    let chain = chain(path);
    let want = std::fs::read(raw).expect("it is there");
    assert_eq!(chain.size(), want.len() as u64);
    let mut got = vec![0xee; want.len()];
    for (i, part) in got.chunks_mut(300_000).enumerate() {
        read(&chain, i as u64 * 300_000, part).expect("it reads");
    }
    assert!(got == want, "{} differs", path.display());
}

#[test]
fn what_qemu_wrote_reads_the_same() {
    if !have_qemu() {
        return;
    }
    for kind in KINDS {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let dir = dir.path();
        ok(dir, "qemu-img create -q -f raw src 40M");
        ok(
            dir,
            "qemu-io -f raw -c 'write -P 1 0 64k' -c 'write -P 2 1000k 3M' -c 'write -P 3 39M 1M' \
             -c 'write -P 4 33554000 1000' src",
        );
        let name = kind.name();
        ok(dir, &format!("qemu-img convert -f raw -O vmdk -o subformat={name} src d.vmdk"));
        assert_reads_as(&dir.join("d.vmdk"), &dir.join("src"));
        let options = OpenOptions::default();
        let layer = open_whole_layer(&DISK, &dir.join("d.vmdk"), &options).expect("it opens");
        let report = check(&layer, Repair::None).expect("it is checked");
        // QEMU writes its grains and then the tables: nothing is left over.
        assert!(report.is_clean(), "{name}: {report:?}");
        let total: u64 = extents(&chain(&dir.join("d.vmdk"))).map(|e| e.expect("mapped").len).sum();
        assert_eq!(total, 40 << 20);
    }
}

#[test]
fn what_is_made_here_is_clean_and_empty_there() {
    if !have_qemu() {
        return;
    }
    for kind in KINDS {
        for size in [3 << 30, 10 << 20, 70_144] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let dir = dir.path();
            let vmdk = Wanted { kind: Some(kind), ..Default::default() };
            let options = CreateOptions { size: Some(size), vmdk, ..Default::default() };
            create(&DISK, &dir.join("d.vmdk"), Format::Vmdk, &options).expect("it is made");
            let name = kind.name();
            ok(dir, &format!("qemu-img create -q -f raw zeros {size}"));
            let compared = ok(dir, "qemu-img compare -f vmdk -F raw d.vmdk zeros");
            assert!(compared.contains("identical"), "{name}: {compared}");
            if !kind.is_flat() {
                ok(dir, "qemu-img check -f vmdk d.vmdk");
            }
            let info = ok(dir, "qemu-img info d.vmdk");
            assert!(info.contains(&format!("create type: {name}")), "{info}");
        }
    }
}

#[test]
fn chains_of_qemu_read_the_same_and_a_changed_parent_is_noticed() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -q -f vmdk base.vmdk 4M");
    ok(dir, "qemu-io -f vmdk -c 'write -P 1 0 2M' base.vmdk");
    ok(dir, "qemu-img create -q -f vmdk -b base.vmdk -F vmdk -o zeroed_grain=on top.vmdk");
    ok(dir, "qemu-io -f vmdk -c 'write -P 2 100k 5k' -c 'write -z 640k 64k' top.vmdk");
    ok(dir, "qemu-img convert -f vmdk -O raw top.vmdk flat");
    assert_reads_as(&dir.join("top.vmdk"), &dir.join("flat"));
    ok(dir, "qemu-io -f vmdk -c 'write -P 9 3M 64k' base.vmdk");
    let chain = chain(&dir.join("top.vmdk"));
    let mut buf = [0; 512];
    read(&chain, 64 << 10, &mut buf).expect("the overlay's own grains can be read");
    assert!(read(&chain, 1 << 20, &mut buf).is_err(), "the parent is another now");
}

#[test]
fn overlays_made_here_are_read_there() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    let size = CreateOptions { size: Some(4 << 20), ..Default::default() };
    create(&DISK, &dir.join("base.vmdk"), Format::Vmdk, &size).expect("it is made");
    ok(dir, "qemu-io -f vmdk -c 'write -P 1 0 2M' base.vmdk");
    for kind in [Kind::MonolithicSparse, Kind::TwoGbMaxExtentSparse] {
        let options = CreateOptions {
            backing_file: Some("base.vmdk".into()),
            backing_format: Some(Format::Vmdk),
            vmdk: Wanted { kind: Some(kind), ..Default::default() },
            ..Default::default()
        };
        create(&DISK, &dir.join("top.vmdk"), Format::Vmdk, &options).expect("it is made");
        let compared = ok(dir, "qemu-img compare -f vmdk -F vmdk base.vmdk top.vmdk");
        assert!(compared.contains("identical"), "{compared}");
    }
}

/// An image's descriptor, but for its content id.
fn descriptor(path: &Path) -> String {
    let bytes = std::fs::read(path).expect("it is there");
    let text = if bytes.starts_with(b"KDMV") { &bytes[512..21 * 512] } else { &bytes[..] };
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
    let text = String::from_utf8_lossy(&text[..end]);
    let lines = text.lines().filter(|line| !line.starts_with("CID="));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn options_end_up_in_the_descriptor_as_there() {
    if !have_qemu() {
        return;
    }
    for options in [
        "",
        "adapter_type=lsilogic,hwversion=8",
        "adapter_type=buslogic,subformat=monolithicFlat",
        "adapter_type=legacyESX,subformat=twoGbMaxExtentFlat",
        "subformat=twoGbMaxExtentSparse,toolsversion=9",
        "compat6",
        "compat6=off,zeroed_grain=on",
        "subformat=streamOptimized,hwversion=11",
    ] {
        let folders = [(); 2].map(|()| tempfile::tempdir().expect("a temporary folder"));
        let [theirs, ours] = folders.each_ref().map(|folder| folder.path().join("d.vmdk"));
        let said = if options.is_empty() { String::new() } else { format!("-o {options}") };
        ok(folders[0].path(), &format!("qemu-img create -q -f vmdk {said} d.vmdk 3G"));
        let mut wanted = CreateOptions { size: Some(3 << 30), ..CreateOptions::default() };
        wanted.parse(Format::Vmdk, options).expect("valid");
        create(&DISK, &ours, Format::Vmdk, &wanted).expect("it is made");
        assert_eq!(descriptor(&ours), descriptor(&theirs), "{options}");
    }
}

#[test]
fn a_vmfs_disk_is_read_as_a_flat_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("d.vmdk");
    let text = "# Disk DescriptorFile\nversion=1\nCID=0000000a\nparentCID=ffffffff\n\
                createType=\"vmfs\"\n\nRW 8 VMFS \"d-flat.vmdk\"\n";
    std::fs::write(&path, text).expect("written");
    std::fs::write(folder.path().join("d-flat.vmdk"), [7; 4096]).expect("written");
    let chain = chain(&path);
    let mut bytes = [0; 4096];
    read(&chain, 0, &mut bytes).expect("it reads");
    assert_eq!((chain.size(), bytes), (4096, [7; 4096]));
}
