//! Snapshots that we make, apply and delete are those of qemu-img, whatever the image; and a crash
//! at any write leaves the disk as it was or as it shall be.

use std::path::Path;

use crate::common::crash::Logged;
use crate::common::{DISK, MemFile, have_qemu, ok};
use cowbell_engine::store::Store;
use cowbell_formats::qcow2::disk::snapshot_table;
use cowbell_formats::qcow2::rest::check::{Repair, check};
use cowbell_formats::qcow2::rest::open::read_header;
use cowbell_formats::qcow2::rest::snapshots::{Moment, apply, create, delete};
use cowbell_formats::{Error, Host};

const NOW: Moment = Moment { seconds: 1_700_000_000, nanos: 5 };

fn names(file: &impl Store) -> Vec<(String, String)> {
    let header = read_header(file).expect("legal");
    let list = snapshot_table::read(file, &header).expect("legal");
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

/// Each planted defect is found by the crashes of the test below.
#[test]
fn crashes_find_planted_defects() {
    for mutant in ["qcow2_change_not_fenced", "qcow2_flags_in_place", "qcow2_flags_stay"] {
        let found = std::panic::catch_unwind(|| {
            cowbell_engine::mutants::activate(Some(mutant));
            a_crash_at_any_write_leaves_the_old_or_the_new();
        });
        cowbell_engine::mutants::activate(None);
        assert!(found.is_err(), "{mutant} is not found");
    }
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
        type Change = fn(&Logged) -> Result<(), Error>;
        let changes: [(&str, Change); 3] = [
            ("create", |file| create(file, b"two", NOW).map(|_| ())),
            ("apply", |file| apply(file, b"one")),
            ("delete", |file| delete(file, b"one")),
        ];
        for (what, change) in changes {
            let whole = Logged::new(&template);
            change(&whole).expect(what);
            let (old, new) = (contents(&MemFile::new(&template)), contents(whole.file()));
            let mut news = 0;
            whole.crashes(&template, |file, when| {
                let line = format!("{options}: {what}, {when}");
                let now = contents(file);
                assert!(now == old || now == new, "{line}");
                news += u64::from(now == new);
                let report = check(file, Repair::None).expect(&line);
                assert!(report.is_clean(), "{line}: {report:?}");
            });
            assert!(news > 0, "{what}");
            // A device that takes no more.
            let writes = whole.file().inner().writes;
            for limit in 0..writes {
                let file = MemFile::new(&template);
                file.inner().fail_after = Some(limit);
                let failing = Logged::over(file.clone());
                change(&failing).expect_err(what);
                file.inner().fail_after = None;
                let line = format!("{options}: {what}, after {limit} of {writes} writes");
                assert!(contents(&file) == old, "{line}");
                let report = check(&file, Repair::None).expect(&line);
                assert!(report.is_clean(), "{line}: {report:?}");
            }
        }
    }
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

/// Where in `bytes` the snapshot table is.
fn table_at(bytes: &[u8]) -> usize {
    u64::from_be_bytes(bytes[64..72].try_into().expect("8 bytes")) as usize
}

#[test]
fn what_a_table_says_that_we_do_not_know_stays() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    for compat in ["0.10", "1.1"] {
        ok(dir, &format!("qemu-img create -q -f qcow2 -o compat={compat} a.qcow2 1M"));
        ok(dir, "qemu-io -f qcow2 -c 'write -q -P 17 0 1M' a.qcow2");
        ok(dir, "qemu-img snapshot -c old a.qcow2");
        let mut bytes = std::fs::read(dir.join("a.qcow2")).expect("made");
        let at = table_at(&bytes);
        bytes.resize(at + 200, 0);
        let with_extra = |extra: &[u8]| {
            let mut bytes = bytes.clone();
            let rest = bytes[at + 64..at + 80].to_vec();
            bytes[at + 36..at + 40].copy_from_slice(&(extra.len() as u32).to_be_bytes());
            bytes.truncate(at + 40);
            bytes.extend([extra, &rest].concat());
            bytes
        };
        // Without extra data: as programs wrote it that did not change a disk's size.
        let file = MemFile::new(&with_extra(&[]));
        create(&file, b"new", NOW).expect("made");
        delete(&file, b"new").expect("deleted");
        let header = read_header(&file).expect("legal");
        let list = snapshot_table::read(&file, &header).expect("legal");
        assert_eq!((list.len(), list[0].disk_size), (1, Some(1 << 20)), "{compat}");
        std::fs::write(dir.join("a.qcow2"), file.bytes()).expect("written");
        ok(dir, "qemu-img snapshot -a old a.qcow2");
        ok(dir, "qemu-io -f qcow2 -c 'read -q -P 17 0 1M' a.qcow2");
        // With more of it than anybody knows.
        let extra: Vec<u8> = [&bytes[at + 40..at + 64], &[0xab; 72]].concat();
        let file = MemFile::new(&with_extra(&extra));
        create(&file, b"new", NOW).expect("made");
        let bytes = file.bytes();
        let at = table_at(&bytes);
        assert_eq!(bytes[at + 36..at + 40], 96u32.to_be_bytes(), "{compat}");
        assert_eq!(bytes[at + 40..at + 136], extra, "{compat}");
    }
}

#[test]
fn what_a_header_says_that_we_do_not_know_stays() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -q -f qcow2 a.qcow2 1M");
    ok(dir, "qemu-io -f qcow2 -c 'write -q -P 17 0 1M' a.qcow2");
    let mut bytes = std::fs::read(dir.join("a.qcow2")).expect("made");
    // A longer header, then an extension and a compatible bit that nobody knows.
    let extensions = bytes[112..512].to_vec();
    bytes[103] = 144;
    bytes[81] = 0x40;
    bytes[112..144].fill(0xcd);
    let unknown = [0x12, 0x34, 0x56, 0x78, 0, 0, 0, 5, 1, 2, 3, 4, 5, 0, 0, 0];
    bytes[144..160].copy_from_slice(&unknown);
    bytes[160..560].copy_from_slice(&extensions);
    bytes[60_000..60_010].fill(0xee);
    let file = MemFile::new(&bytes);
    let same = |what: &str| {
        let now = file.bytes();
        // Fields: tables, and features that are ours.
        assert!(now[..24] == bytes[..24] && now[80..88] == bytes[80..88], "{what}");
        assert!(now[96..65536] == bytes[96..65536], "{what}");
    };
    create(&file, b"one", NOW).expect("made");
    same("create");
    apply(&file, b"one").expect("applied");
    same("apply");
    delete(&file, b"one").expect("deleted");
    same("delete");
    file.poke_be64(72, 1);
    check(&file, Repair::All).expect("checked");
    assert_eq!(file.peek_be64(72), 0);
    same("check");
    // Autoclear bits that nobody knows go: who set one may rely on what is changed now.
    file.poke_be64(88, 1 << 40);
    create(&file, b"two", NOW).expect("made");
    assert_eq!(file.peek_be64(88), 0);
}
