//! An image names the old backing file or the new one, whenever a crash comes; and one that is emptied has
//! all that it had, or nothing.

use std::path::{Path, PathBuf};

use crate::common::MemFile;
use crate::common::crash::Logged;
use crate::common::{have_qemu, ok};
use cowbell_formats::chain::layer_in;
use cowbell_formats::map::extents;
use cowbell_formats::qcow2::rest::check::{Repair, check};
use cowbell_formats::rebase::{empty, set_backing};
use cowbell_formats::{Chain, Format, OpenOptions};

/// What it names, and what it says itself.
type Said = (Option<PathBuf>, Option<String>, Vec<(u64, u64)>);

fn said(file: &MemFile, format: Format) -> Said {
    let options = OpenOptions { format: Some(format), ..OpenOptions::default() };
    let layer = layer_in(file.clone(), Path::new("image"), &options).expect("it opens");
    let backing = layer.backing_name().map(Path::to_path_buf);
    let backing_format = layer.backing_format_name().filter(|_| backing.is_some());
    let chain = Chain { layers: vec![layer] };
    let own = extents(&chain).map(|extent| extent.expect("it is sound"));
    let own = own.filter(|extent| extent.is_present()).map(|extent| (extent.start, extent.len));
    (backing, backing_format, own.collect())
}

#[test]
fn whatever_is_named_instead() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -q -f raw base 2M");
    for (format, options, named) in [
        (Format::Qcow2, "-o cluster_size=64k", "-b base -F raw"),
        (Format::Qcow2, "-o cluster_size=64k", ""),
        (Format::Qcow2, "-o cluster_size=4k,compat=v2", "-b base -F raw"),
        (Format::Qcow2, "-o cluster_size=4k,compat=v2", ""),
        (Format::Qcow2, "-o cluster_size=512", "-b base -F raw"),
        (
            Format::Qcow2,
            "-o cluster_size=64k,extended_l2=on,compression_type=zstd",
            "-b base -F raw",
        ),
        (Format::Qed, "", "-b base -F raw"),
        (Format::Qed, "", ""),
    ] {
        ok(dir, &format!("qemu-img create -q -f {format} {options} {named} i 2M"));
        ok(dir, &format!("qemu-io -f {format} -c 'write -q -P 1 300k 100k' i"));
        let long = "l".repeat(if options.contains("=512") { 20 } else { 700 });
        let names: [Option<(&str, &str)>; 4] =
            [Some(("b.qcow2", "qcow2")), Some((&long, "qed")), None, Some(("base", "raw"))];
        let mut template = std::fs::read(dir.join("i")).expect("made");
        for new in names {
            let new = new.map(|(name, format)| (Path::new(name), format));
            let line = format!("{format} {options} {named}: to {new:?}");
            let whole = Logged::new(&template);
            set_backing(&whole, format, new).expect(&line);
            let (before, after) =
                (said(&MemFile::new(&template), format), said(whole.file(), format));
            assert_eq!(after.0.as_deref(), new.map(|(name, _)| name), "{line}");
            assert_eq!(before.2, after.2, "{line}");
            whole.crashes(&template, |file, when| {
                let now = said(file, format);
                assert!(now == before || now == after, "{line}, {when}: {now:?}");
            });
            template = whole.file().bytes();
        }
    }
}

#[test]
fn an_emptied_image_has_all_that_it_had_or_nothing() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -q -f raw base 2M");
    for options in ["cluster_size=64k", "cluster_size=512", "cluster_size=4k,extended_l2=off"] {
        ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} -b base -F raw i"));
        ok(dir, "qemu-io -f qcow2 -c 'write -q -P 1 0 700k' -c 'write -q -z 1M 100k' i");
        let template = std::fs::read(dir.join("i")).expect("made");
        let whole = Logged::new(&template);
        empty(&whole, Format::Qcow2).expect(options);
        let before = said(&MemFile::new(&template), Format::Qcow2);
        let after = said(whole.file(), Format::Qcow2);
        assert!(after.2.is_empty() && !before.2.is_empty(), "{after:?}");
        assert!(whole.file().bytes().len() < template.len() / 2, "{options}");
        whole.crashes(&template, |file, when| {
            let now = said(file, Format::Qcow2);
            assert!(now == before || now == after, "{options}, {when}: {now:?}");
            let report = check(file, Repair::None).expect("checked");
            assert!(report.is_clean(), "{options}, {when}: {report:?}");
        });
    }
}
