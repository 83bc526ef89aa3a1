//! A header that says something impossible: the open fails, says why, and writes nothing.

use std::path::Path;

use crate::common::{DISK, MemFile, MemHost, have_qemu, ok, run, small_qed};
use cowbell_engine::store::Store;
use cowbell_formats::{Error, Format, OpenOptions, Policy, open};

/// Opens `file` as QED for writing; it must fail and write nothing.
fn refused(file: &MemFile) -> String {
    let before = file.bytes();
    let host = MemHost::default();
    host.put("a.qed", file);
    let mut said = String::new();
    for write in [false, true] {
        let options = OpenOptions {
            format: Some(Format::Qed),
            write,
            backing: Policy::Any,
            ..Default::default()
        };
        said = open(&host, Path::new("a.qed"), &options).expect_err("hostile").to_string();
        assert!(!said.contains('\n'));
    }
    assert!(file.bytes() == before);
    said
}

const U32_FIELDS: [(&str, u64, &[u32], &str); 3] = [
    ("cluster", 4, &[0, 1, 512, 2048, 4097, 6144, 1 << 27, 1 << 31, u32::MAX], "cluster size"),
    ("table", 8, &[0, 3, 5, 15, 17, 32, 1 << 31, u32::MAX], "table size"),
    ("header", 12, &[0, 2, 3, 1 << 20, u32::MAX], ""),
];

#[test]
fn sizes_out_of_range() {
    for (field, at, values, text) in U32_FIELDS {
        for &value in values {
            let file = small_qed(1 << 20, None);
            file.poke_u32(at, value);
            let said = refused(&file);
            assert!(said.contains("invalid") && said.contains(text), "{field} {value}: {said}");
        }
    }
}

#[test]
fn a_header_that_is_cut_short() {
    for len in [4, 5, 63] {
        let file = small_qed(1 << 20, None);
        file.set_len(len).expect("memory");
        refused(&file);
    }
    for len in [64, 511, 4096, 8192 - 512] {
        let file = small_qed(1 << 20, None);
        file.set_len(len).expect("memory");
        refused(&file);
    }
}

#[test]
fn another_formats_magic() {
    let file = small_qed(1 << 20, None);
    file.write_at(0, b"QFI\xfb").expect("memory");
    assert_eq!(refused(&file), "Image not in QED format");
}

#[test]
fn disk_sizes_that_cannot_be_mapped() {
    // 512 * 512 clusters of 4 KiB are a GiB.
    for size in [1, 511, (1 << 30) + 512, 1 << 63, u64::MAX, u64::MAX - 511] {
        let file = small_qed(1 << 20, None);
        file.poke_u64(48, size);
        assert!(refused(&file).contains("image size"), "{size}");
    }
}

#[test]
fn an_l1_table_that_is_not_there() {
    for at in [0, 1, 512, 4095, 4097, 8192, 1 << 40, 1 << 63, u64::MAX, u64::MAX - 4095] {
        let file = small_qed(1 << 20, None);
        file.poke_u64(40, at);
        assert!(refused(&file).contains("table offset"), "{at}");
    }
    // Room for three of four clusters of table.
    let file = small_qed(1 << 20, None);
    file.poke_u32(8, 4);
    file.set_len(4096 * 4).expect("memory");
    refused(&file);
    file.set_len(4096 * 5 - 512).expect("memory");
    refused(&file);
    file.set_len(4096 * 5 - 511).expect("memory");
    let host = MemHost::default();
    host.put("a.qed", &file);
    open(&host, Path::new("a.qed"), &OpenOptions::default()).expect("it fits exactly");
}

#[test]
fn backing_file_names_outside_the_header() {
    for (offset, len) in [
        (64, 0),
        (64, 1024),
        (64, u32::MAX),
        (4096, 1),
        (4095, 2),
        (0, 8),
        (63, 8),
        (u32::MAX, 1),
        (u32::MAX, u32::MAX),
    ] {
        let file = small_qed(1 << 20, Some(("base", true)));
        file.poke_u32(56, offset);
        file.poke_u32(60, len);
        assert!(refused(&file).contains("backing file name"), "{offset} {len}");
    }
    let file = small_qed(1 << 20, Some(("base", true)));
    file.write_at(64, &[0; 4]).expect("memory");
    assert!(refused(&file).contains("empty"));
}

#[test]
fn unknown_features_are_named() {
    for bit in 3..64 {
        let file = small_qed(1 << 20, None);
        file.poke_u64(16, 1 << bit | 2);
        let said = refused(&file);
        assert_eq!(said, format!("Unsupported QED features: {:x}", 1u64 << bit));
    }
}

#[test]
fn unknown_compat_bits_are_kept_and_autoclear_bits_cleared_first() {
    let host = MemHost::default();
    let file = small_qed(1 << 20, None);
    file.poke_u64(24, 0xdead_beef);
    file.poke_u64(32, 0xff00);
    file.write_at(4000, b"somebody's").expect("memory");
    host.put("a.qed", &file);
    let path = Path::new("a.qed");
    open(&host, path, &OpenOptions::default()).expect("opens for reading");
    assert_eq!(file.peek_u64(32), 0xff00);
    let options = OpenOptions { write: true, ..Default::default() };
    let chain = open(&host, path, &options).expect("opens for writing");
    assert_eq!(file.peek_u64(32), 0);
    assert_eq!(file.peek_u64(24), 0xdead_beef);
    assert_eq!(&file.bytes()[4000..4010], b"somebody's");
    assert_eq!(chain.layers[0].file.inner().writes, 4, "three by this test, one header");
}

#[test]
fn qemu_refuses_them_too() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("a.qed");
    // As QEMU makes it: B12 makes the small images of the other tests unreadable for it.
    ok(dir.path(), "qemu-img create -q -f qed -o cluster_size=4k,table_size=2 a.qed 1M");
    let good = std::fs::read(&path).expect("made");
    let options = OpenOptions { format: Some(Format::Qed), ..Default::default() };
    open(&DISK, &path, &options).expect("good");
    for (at, value) in
        [(4, 3u32), (4, 1 << 27), (8, 3), (8, 32), (12, 9), (16, 8), (40, 1), (40, 1 << 30)]
    {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&path, bytes).expect("written");
        let theirs = run(dir.path(), "qemu-img info -f qed a.qed");
        assert!(!theirs.status.success(), "{at} {value}");
        let ours = open(&DISK, &path, &options).expect_err("refused").to_string();
        if let Error::Unsupported(_) = open(&DISK, &path, &options).expect_err("refused") {
            let theirs = String::from_utf8_lossy(&theirs.stderr).into_owned();
            assert!(theirs.trim_end().ends_with(&ours), "{ours}: {theirs}");
        }
    }
}

#[test]
fn raw_files_of_any_length_open() {
    let host = MemHost::default();
    for (len, size) in [(0, 0), (1, 512), (512, 512), (513, 1024), (1 << 62, 1 << 62)] {
        let file = MemFile::new(&[]);
        file.set_len(len).expect("memory");
        host.put("raw", &file);
        let chain = open(&host, Path::new("raw"), &OpenOptions::default()).expect("raw");
        assert_eq!((chain.size(), chain.layers[0].probed), (size, true));
    }
    let file = MemFile::new(&[]);
    file.set_len(i64::MAX as u64).expect("memory");
    host.put("raw", &file);
    let error = open(&host, Path::new("raw"), &OpenOptions::default()).expect_err("too long");
    assert!(matches!(error, Error::Limit(_)));
}
