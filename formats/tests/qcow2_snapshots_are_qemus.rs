//! Snapshots that we make, apply and delete are those of qemu-img, whatever the image; and a crash
//! at any write leaves the disk as it was or as it shall be.

mod common;

use std::path::Path;

use common::{DISK, MemFile, have_qemu, ok};
use cowbell_engine::store::Store;
use cowbell_formats::qcow2::check::{Repair, check};
use cowbell_formats::qcow2::open::read_header;
use cowbell_formats::qcow2::snapshot;
use cowbell_formats::qcow2::snapshots::{Moment, apply, create, delete};
use cowbell_formats::{Error, Host};

const NOW: Moment = Moment { seconds: 1_700_000_000, nanos: 5 };

fn names(file: &impl Store) -> Vec<(String, String)> {
    let header = read_header(file).expect("legal");
    let list = snapshot::read(file, &header).expect("legal");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    list.iter().map(|one| (text(&one.id), text(&one.name))).collect()
}

/// The whole disk, by QEMU.
fn disk(dir: &Path) -> Vec<u8> {
    ok(dir, "qemu-img convert -f qcow2 -O raw a.qcow2 disk.raw");
    std::fs::read(dir.join("disk.raw")).expect("made")
}

#[test]
fn in_images_of_every_kind() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    for options in [
        "cluster_size=64k",
        "compat=v2,cluster_size=4k",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=512,refcount_bits=2",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=2M,refcount_bits=8",
        "lazy_refcounts=on,cluster_size=1k",
    ] {
        ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} a.qcow2 6M"));
        let write = |commands: &str| ok(dir, &format!("qemu-io -f qcow2 {commands} a.qcow2"));
        let clean = || ok(dir, "qemu-img check -f qcow2 a.qcow2");
        let file = DISK.open(&dir.join("a.qcow2"), true).expect("it is there");
        write("-c 'write -q -P 1 0 100k' -c 'write -q -P 2 3M 700k'");
        let first = disk(dir);
        assert_eq!(create(&file, b"one", NOW), Ok(1), "{options}");
        clean();
        assert!(disk(dir) == first, "{options}");
        write("-c 'write -q -P 3 50k 100k' -c 'write -q -P 4 5M 64k'");
        clean();
        let second = disk(dir);
        assert_eq!(create(&file, b"two", NOW), Ok(2), "{options}");
        if !options.contains("v2") {
            // Version 2 does not say how large a snapshot's disk is.
            ok(dir, "qemu-img resize -q -f qcow2 a.qcow2 7M");
        }
        write("-c 'write -q -P 5 0 512k'");
        clean();
        // QEMU finds in them what was there.
        ok(dir, "qemu-img convert -f qcow2 -l one -O raw a.qcow2 one.raw");
        // (It keeps the size that the disk has now.)
        let one = std::fs::read(dir.join("one.raw")).expect("made");
        assert!(one[..first.len()] == first, "{options}");

        apply(&file, b"one").expect(options);
        clean();
        assert!(disk(dir) == first, "{options}");
        write("-c 'write -q -P 6 1M 64k' -c 'write -q -P 7 0 1k'");
        clean();
        apply(&file, b"2").expect(options);
        clean();
        assert!(disk(dir) == second, "{options}: by id");
        delete(&file, b"one").expect(options);
        clean();
        assert!(disk(dir) == second, "{options}");
        assert_eq!(names(&file), [("2".into(), "two".into())]);
        write("-c 'write -q -P 8 0 6M'");
        clean();
        // Those of QEMU.
        ok(dir, "qemu-img snapshot -c 'three and more' a.qcow2");
        ok(dir, "qemu-img snapshot -a two a.qcow2");
        assert!(disk(dir) == second, "{options}");
        apply(&file, b"three and more").expect(options);
        assert!(disk(dir) == vec![8; 6 << 20], "{options}");
        delete(&file, b"three and more").expect(options);
        ok(dir, "qemu-img snapshot -d two a.qcow2");
        let clean = clean();
        assert!(clean.contains("No errors"), "{clean}");
        assert_eq!(names(&file), []);
    }
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    let image = |options: &str| {
        let _ = std::fs::remove_file(dir.join("d.raw"));
        ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} a.qcow2 1M"));
        ok(dir, "qemu-io -f qcow2 -c 'write -q 0 100k' a.qcow2");
        MemFile::new(&std::fs::read(dir.join("a.qcow2")).expect("made"))
    };
    let narrow = image("refcount_bits=1");
    let before = narrow.bytes();
    let error = create(&narrow, b"x", NOW).expect_err("a refcount of one bit");
    assert!(matches!(error, Error::Limit(_)), "{error}");
    assert!(check(&narrow, Repair::None).expect("checked").is_clean());
    assert!(narrow.bytes()[..before.len()] == before);
    let external = image("data_file=d.raw");
    assert!(matches!(create(&external, b"x", NOW), Err(Error::Unsupported(_))));
    let file = image("cluster_size=4k");
    for result in [apply(&file, b"nope"), delete(&file, b"nope")] {
        assert_eq!(result, Err(Error::Invalid("there is no snapshot 'nope'".into())));
    }
    assert!(create(&file, &[b'x'; 70_000], NOW).is_err(), "a name that does not fit");
    assert_eq!(file.inner().writes, 0);
    // An image that has errors is not touched.
    let l1 = read_header(&file).expect("legal").l1_offset;
    file.write_at(l1 + 3, &[0x77]).expect("memory");
    let before = file.bytes();
    let error = create(&file, b"x", NOW).expect_err("broken");
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(file.bytes() == before);
}

#[test]
fn a_crash_at_any_write_leaves_the_old_or_the_new() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    for options in
        ["cluster_size=512,refcount_bits=16", "compat=v2,cluster_size=4k", "cluster_size=64k"]
    {
        ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} a.qcow2 2M"));
        ok(dir, "qemu-io -f qcow2 -c 'write -q -P 1 0 100k' -c 'write -q -P 2 1M 100k' a.qcow2");
        ok(dir, "qemu-img snapshot -c one a.qcow2");
        ok(dir, "qemu-io -f qcow2 -c 'write -q -P 3 50k 100k' a.qcow2");
        let template = std::fs::read(dir.join("a.qcow2")).expect("made");
        type Change = fn(&MemFile) -> Result<(), Error>;
        let changes: [(&str, Change); 3] = [
            ("create", |file| create(file, b"two", NOW).map(|_| ())),
            ("apply", |file| apply(file, b"one")),
            ("delete", |file| delete(file, b"one")),
        ];
        for (what, change) in changes {
            let whole = MemFile::new(&template);
            change(&whole).expect(what);
            let writes = whole.inner().writes;
            let (old, new) = (contents(&MemFile::new(&template)), contents(&whole));
            for limit in 0..writes {
                let file = MemFile::new(&template);
                file.inner().fail_after = Some(limit);
                change(&file).expect_err(what);
                file.inner().fail_after = None;
                let line = format!("{options}: {what}, after {limit} of {writes} writes");
                let now = contents(&file);
                assert!(now == old || now == new, "{line}");
                // No refcount is too low, and no flag lets a shared cluster be written.
                let report = check(&file, Repair::None).expect(&line);
                assert_eq!(report.check_errors, 0, "{line}");
                let header = read_header(&file).expect("legal");
                assert!(
                    report.corruptions == 0 || harmless(&file),
                    "{line}: {report:?} {header:?}"
                );
                let report = check(&file, Repair::All).expect(&line);
                assert!(report.is_clean(), "{line}: {report:?}");
                assert!(contents(&file) == now, "{line}: after the repair");
            }
        }
    }
}

/// Are all errors COPIED flags that are not set although they may be?
fn harmless(file: &MemFile) -> bool {
    use cowbell_formats::qcow2::check::{Event, Watch, check_watched};
    struct Flags(bool);
    impl Watch for Flags {
        fn event(&mut self, event: Event<'_>) {
            if let Event::Found(what) = event {
                let what = what.to_string();
                let is_copy = what.contains("OFLAG_COPIED") && what.ends_with("refcount=1");
                self.0 &= is_copy || what.starts_with("Leaked");
            }
        }
    }
    let mut flags = Flags(true);
    check_watched(file, Repair::None, &mut flags).expect("checked");
    flags.0
}

/// The active disk and the names of the snapshots.
fn contents(file: &MemFile) -> (Vec<u8>, Vec<(String, String)>) {
    use cowbell_formats::chain::layer_in;
    use cowbell_formats::{Chain, OpenOptions, map};
    let layer = layer_in(file.clone(), Path::new("a.qcow2"), &OpenOptions::default());
    let chain = Chain { layers: vec![layer.expect("opens")] };
    let mut bytes = vec![0; chain.size() as usize];
    map::read(&chain, 0, &mut bytes).expect("reads");
    (bytes, names(file))
}
