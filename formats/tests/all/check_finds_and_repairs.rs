//! What check finds in an image, what it repairs, and in which order it writes.

use std::path::Path;

use crate::common::{MemFile, MemHost, add_data, add_l2, have_qemu, ok, small_qed};
use cowbell_engine::store::Store;
use cowbell_formats::qed::disk::layout::NEED_CHECK;
use cowbell_formats::qed::rest::check::{Repair, Report, check};
use cowbell_formats::{Error, OpenOptions, open};

fn found(file: &MemFile) -> Report {
    let before = file.bytes();
    let report = check(file, Repair::None).expect("it can be checked");
    assert!(file.bytes() == before, "a check writes nothing");
    report
}

/// Repairs, and makes sure that a second time changes nothing.
fn repaired(file: &MemFile) -> Report {
    let report = check(file, Repair::All).expect("it can be repaired");
    let after = file.bytes();
    let writes = file.inner().writes;
    let again = check(file, Repair::All).expect("it can be checked again");
    assert_eq!((again.corruptions, again.leaks), (report.corruptions, report.leaks));
    assert_eq!((again.corruptions_fixed, again.leaks_fixed), (0, 0));
    assert!(file.bytes() == after && file.inner().writes == writes);
    report
}

/// One L2 table for the first 2 MiB, three data clusters, the second of them elsewhere.
fn sample() -> (MemFile, u64) {
    let file = small_qed(4 << 20, None);
    let l2 = add_l2(&file, 0);
    add_data(&file, l2, 0, 1);
    add_data(&file, l2, 2, 2);
    add_data(&file, l2, 1, 3);
    file.poke_u64(l2 + 8 * 8, 1);
    (file, l2)
}

#[test]
fn a_sound_image_is_clean_and_counted() {
    let (file, _) = sample();
    let report = found(&file);
    assert!(report.is_clean());
    assert_eq!(
        (report.total_clusters, report.allocated_clusters, report.fragmented_clusters),
        (1024, 3, 2)
    );
    assert_eq!(report.image_end, 6 * 4096);
    let writes = file.inner().writes;
    assert_eq!(repaired(&file), report);
    assert_eq!(file.inner().writes, writes);
}

#[test]
fn invalid_entries_are_set_to_zero() {
    let (file, l2) = sample();
    let len = file.len().expect("memory");
    let bad = [2, 511, 4097, 512, len, len + 4096, 1 << 40, u64::MAX, u64::MAX - 4095, 1 << 63];
    for (i, offset) in (100..).zip(bad) {
        file.poke_u64(l2 + i * 8, offset);
    }
    for (i, offset) in (100..).zip([1].iter().chain(&bad)) {
        file.poke_u64(4096 + i * 8, *offset);
    }
    let all = 2 * bad.len() as u64 + 1;
    assert_eq!(found(&file).corruptions, all);
    assert_eq!(check(&file, Repair::Leaks).expect("checked").corruptions, all);
    let report = repaired(&file);
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, all));
    assert!(found(&file).is_clean());
    assert_eq!(file.peek_u64(l2 + 8 * 8), 1, "the zero cluster is still one");
    assert_eq!(file.peek_u64(16), 0, "no mark is left");
}

#[test]
fn double_references_are_reported_and_stay() {
    for double in 0..4 {
        let (file, l2) = sample();
        match double {
            0 => file.poke_u64(l2 + 9 * 8, file.peek_u64(l2)), // data twice
            1 => file.poke_u64(l2 + 9 * 8, l2),                // data in a table
            2 => file.poke_u64(4096 + 8, l2),                  // a table twice
            _ => file.poke_u64(4096 + 8, 4096),                // the L1 table as an L2 table
        }
        file.poke_u64(l2 + 10 * 8, 77); // and one that can be repaired
        assert_eq!(found(&file).corruptions, 2);
        let report = repaired(&file);
        assert_eq!((report.corruptions, report.corruptions_fixed), (1, 1));
        assert_eq!(file.peek_u64(16) & NEED_CHECK, NEED_CHECK, "marked, and it stays so");
    }
}

#[test]
fn leaks_at_the_end_are_cut_off_and_others_counted() {
    let (file, l2) = sample();
    let inside = file.peek_u64(l2 + 2 * 8);
    file.poke_u64(l2 + 2 * 8, 0);
    let end = file.len().expect("memory");
    file.set_len(end + 3 * 4096 + 100).expect("memory");
    let report = found(&file);
    assert_eq!((report.leaks, report.image_end), (4, end));
    let report = repaired(&file);
    assert_eq!((report.leaks, report.leaks_fixed), (1, 3));
    assert_eq!(file.len().expect("memory"), end);
    assert!(inside < end);
}

#[test]
fn nothing_is_cut_while_something_is_unknown() {
    // A table that somebody else claimed first is not walked: its clusters look like leaks.
    let (file, l2) = sample();
    file.poke_u64(4096 + 8, file.peek_u64(l2));
    let end = file.len().expect("memory") + 8 * 4096;
    file.set_len(end).expect("memory");
    for repair in [Repair::Leaks, Repair::All] {
        let report = check(&file, repair).expect("checked");
        assert!(!report.is_sound() && report.leaks_fixed == 0);
        assert_eq!(file.len().expect("memory"), end);
    }
}

#[test]
fn a_cluster_that_the_file_ends_in_is_invalid() {
    let (file, l2) = sample();
    let end = file.len().expect("memory");
    file.poke_u64(l2 + 20 * 8, end);
    file.set_len(end + 4096 - 512).expect("memory");
    assert_eq!((found(&file).corruptions, found(&file).leaks), (1, 0));
    repaired(&file);
    assert_eq!(file.len().expect("memory"), end);
    file.poke_u64(l2 + 20 * 8, end);
    // Bytes missing from its last sector are not held against it; QEMU sees none of them.
    file.set_len(end + 4096 - 511).expect("memory");
    assert!(found(&file).is_clean());
}

#[test]
fn a_crash_during_repair_leaves_the_image_marked() {
    let build = || {
        let (file, l2) = sample();
        file.poke_u64(32, 0xff); // autoclear bits nobody knows
        for at in [l2 + 9 * 8, l2 + 400 * 8, 4096 + 5 * 8, 4096 + 500 * 8] {
            file.poke_u64(at, 77);
        }
        file.set_len(file.len().expect("memory") + 4096).expect("memory");
        file.inner().writes = 0;
        file
    };
    let whole = build();
    repaired(&whole);
    for crash in 0.. {
        let file = build();
        file.inner().fail_after = Some(crash);
        let result = check(&file, Repair::All);
        file.inner().fail_after = None;
        if result.is_ok() {
            assert_eq!(crash, 5, "mark, L2, L1, tail, mark");
            break;
        }
        if crash > 0 {
            assert_eq!(file.peek_u64(16) & NEED_CHECK, NEED_CHECK);
            assert_eq!(file.peek_u64(32), 0, "autoclear bits go with the first write");
        }
        check(&file, Repair::All).expect("it can be repaired again");
        assert!(file.bytes() == whole.bytes());
    }
}

#[test]
fn opening_for_writing_repairs_a_marked_image() {
    let host = MemHost::default();
    let path = Path::new("a.qed");
    let (file, l2) = sample();
    file.poke_u64(16, NEED_CHECK);
    file.poke_u64(l2 + 9 * 8, 77);
    host.put("a.qed", &file);
    let before = file.bytes();
    let mut options = OpenOptions::default();
    open(&host, path, &options).expect("reading takes it as it is");
    options.write = true;
    options.ignore_need_check = true;
    open(&host, path, &options).expect("it is ignored");
    assert!(file.bytes() == before);
    options.ignore_need_check = false;
    let chain = open(&host, path, &options).expect("repaired");
    let cowbell_formats::LayerMeta::Qed(image) = &chain.layers[0].meta else {
        panic!("it is QED");
    };
    assert!(!image.header.needs_check());
    assert_eq!((file.peek_u64(16), file.peek_u64(l2 + 9 * 8)), (0, 0));

    file.poke_u64(16, NEED_CHECK);
    file.poke_u64(l2 + 9 * 8, l2);
    let error = open(&host, path, &options).expect_err("a double reference");
    assert!(error.to_string().contains("cannot be repaired"));
    assert_eq!(file.peek_u64(16), NEED_CHECK);
    options.write = false;
    open(&host, path, &options).expect("it can still be read");
}

#[test]
fn huge_sparse_files_take_little_memory_and_time() {
    for len in [1 << 62, 1 << 44] {
        let file = small_qed(1 << 20, None);
        file.set_len(len).expect("memory");
        assert!(matches!(check(&file, Repair::None), Err(Error::Limit(_))));
    }
    // The largest clusters and tables, an L1 table full of empty L2 tables: 2^16 tables of a
    // gigabyte each, nearly all of it holes.
    let file = small_qed(1 << 20, None);
    file.poke_u32(4, 1 << 26);
    file.poke_u32(8, 16);
    file.poke_u64(40, 1 << 26);
    file.set_len(1 << 48).expect("memory");
    for index in 0..1 << 16 {
        file.poke_u64((1 << 26) + index * 8, (index + 1) << 31);
    }
    file.inner().bytes_read = 0;
    let report = found_in_sparse(&file);
    assert_eq!(report.corruptions, 0);
    assert!(report.leaks > 0);
    assert!(file.inner().bytes_read < 1 << 21);
}

fn found_in_sparse(file: &MemFile) -> Report {
    check(file, Repair::None).expect("it can be checked")
}

#[test]
fn a_table_that_cannot_be_read_is_an_error_of_the_check() {
    struct Broken(MemFile, u64);
    impl Store for Broken {
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
            if (offset..offset + buf.len() as u64).contains(&self.1) {
                return Err(std::io::Error::from_raw_os_error(5));
            }
            self.0.read_at(offset, buf)
        }
        fn write_at(&self, offset: u64, buf: &[u8]) -> std::io::Result<()> {
            self.0.write_at(offset, buf)
        }
        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }
        fn len(&self) -> std::io::Result<u64> {
            self.0.len()
        }
        fn set_len(&self, len: u64) -> std::io::Result<()> {
            self.0.set_len(len)
        }
        fn allocate(&self, _: u64, _: u64) -> std::io::Result<()> {
            Ok(())
        }
        fn extent_at(&self, offset: u64) -> std::io::Result<cowbell_engine::store::Extent> {
            self.0.extent_at(offset)
        }
        fn is_writable(&self) -> bool {
            true
        }
    }
    let (file, l2) = sample();
    file.poke_u64(16, NEED_CHECK);
    let before = file.bytes();
    let report = check(&Broken(file.clone(), l2), Repair::All).expect("checked");
    assert_eq!(report.check_errors, 1);
    assert!(!report.is_sound());
    assert!(file.bytes() == before, "nothing is cut off that was not seen");
}

#[test]
fn no_phantom_leaks_where_qemu_counts_them() {
    // B5: one for every cluster_size - 1 clusters.
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    ok(dir, "qemu-img create -q -f qed -o cluster_size=4k a.qed 64M");
    ok(dir, "qemu-io -f qed -c 'write -q 0 20M' a.qed");
    let file = MemFile::new(&std::fs::read(dir.join("a.qed")).expect("made"));
    let report = found(&file);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!((report.allocated_clusters, report.total_clusters), (5120, 16384));
    assert_eq!(report.image_end, file.len().expect("memory"));
}
