//! A qcow2 header that says something impossible is refused, in words, and nothing is written. A
//! table that does fails the request that comes upon it, and no other.

use std::path::Path;

use crate::common::{MemFile, MemHost, have_qemu, qcow2, run};
use cowbell_engine::store::Store;
use cowbell_formats::info::info;
use cowbell_formats::map::{extents, read};
use cowbell_formats::qcow2::disk::header::{Compression, EXT_BITMAPS, EXT_FEATURE_NAMES, Header};
use cowbell_formats::qcow2::rest::check::{Repair, check};
use cowbell_formats::qcow2::rest::create::Options;
use cowbell_formats::qcow2::rest::open::read_header;
use cowbell_formats::qcow2::rest::snapshots::{Moment, create};
use cowbell_formats::{Chain, Error, Format, OpenOptions, Policy, open};

const MB: Options<'_> = Options {
    size: 1 << 20,
    version: 3,
    cluster_size: 65536,
    refcount_bits: 16,
    lazy_refcounts: false,
    extended_l2: false,
    compression: Compression::Zlib,
    backing: None,
    data_file: None,
    data_file_raw: false,
    preallocation: cowbell_formats::preallocation::Preallocation::Off,
};
const L1: u64 = 0x3_0000;

fn open_with(file: &MemFile, write: bool) -> Result<Chain<MemFile>, Error> {
    let host = MemHost::default();
    host.put("a.qcow2", file);
    host.put("base", &MemFile::new(&[3; 4096]));
    let format = Some(Format::Qcow2);
    let options = OpenOptions { format, write, backing: Policy::Any, ..Default::default() };
    open(&host, Path::new("a.qcow2"), &options)
}

/// Opening it must fail, for reading (if `read`) and for writing, and write nothing.
fn refused_for(file: &MemFile, read: bool) -> String {
    let before = file.bytes();
    let writes = file.inner().writes;
    let mut said = String::new();
    if read {
        said = open_with(file, false).expect_err("hostile").to_string();
    }
    let for_writing = open_with(file, true).expect_err("hostile").to_string();
    if read {
        assert_eq!(said, for_writing);
    }
    assert!(!for_writing.contains(char::is_control), "{for_writing}");
    assert!(file.bytes() == before && file.inner().writes == writes, "{for_writing}");
    for_writing
}

fn refused(file: &MemFile) -> String {
    refused_for(file, true)
}

/// Offset, value, its bytes, and what is said; as QEMU says it.
const FIELDS: &[(u64, u64, usize, &str)] = &[
    (4, 4, 4, "Unsupported qcow2 version 4"),
    (4, 1, 4, "Unsupported qcow2 version 1"),
    (20, 8, 4, "Unsupported cluster size: 2^8"),
    (20, 22, 4, "Unsupported cluster size: 2^22"),
    (20, u32::MAX as u64, 4, "Unsupported cluster size: 2^4294967295"),
    (72, 0x20, 8, "Unsupported qcow2 feature(s): Unknown incompatible feature: 20"),
    (72, 8, 8, "qcow2: Compression type incompatible feature bit must not be set"),
    (104, 1, 1, "qcow2: Compression type incompatible feature bit must be set"),
    (104, 2, 1, "qcow2: unknown compression type: 2"),
    (96, 7, 4, "Reference count entry width too large; may not exceed 64 bits"),
    (96, u32::MAX as u64, 4, "Reference count entry width too large"),
    (100, 96, 4, "qcow2 header too short"),
    (100, 0, 4, "qcow2 header too short"),
    (100, 65544, 4, "qcow2 header exceeds cluster size"),
    (100, u32::MAX as u64, 4, "qcow2 header exceeds cluster size"),
    (56, 0, 4, "Image does not contain a reference count table"),
    (56, 129, 4, "Reference count table too large"),
    (56, u32::MAX as u64, 4, "Reference count table too large"),
    (48, 0x10001, 8, "Reference count table offset invalid"),
    (48, 1 << 63, 8, "Reference count table offset invalid"),
    (48, (1 << 63) - 65536, 8, "Reference count table offset invalid"),
    (40, 0x30001, 8, "Active L1 table offset invalid"),
    (40, 0x80 << 56, 8, "Active L1 table offset invalid"),
    (40, u64::MAX - 65535, 8, "Active L1 table offset invalid"),
    (36, 0, 4, "L1 table is too small"),
    (36, 0x1000_0001, 4, "Active L1 table too large"),
    (36, u32::MAX as u64, 4, "Active L1 table too large"),
    (24, 1 << 40, 8, "L1 table is too small"),
    (24, 1 << 63, 8, "Image is too big"),
    (24, u64::MAX, 8, "Image is too big"),
    (24, (1 << 63) - 1, 8, "Image is too big"),
    (8, 65537, 8, "Invalid backing file offset"),
    (8, u64::MAX, 8, "Invalid backing file offset"),
    (32, 1, 4, "AES encryption of qcow2 images is not supported"),
    (32, 2, 4, "LUKS encryption of qcow2 images is not supported"),
    (32, 3, 4, "Unsupported encryption method 3"),
    (60, 65537, 4, "Snapshot table too large"),
    (60, u32::MAX as u64, 4, "Snapshot table too large"),
    (64, 0, 0, ""),
];

fn with_field(at: u64, value: u64, bytes: usize) -> MemFile {
    let file = qcow2(&MB);
    file.write_at(at, &value.to_be_bytes()[8 - bytes..]).expect("memory");
    file
}

#[test]
fn fields_that_cannot_be() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let compares = have_qemu();
    for &(at, value, bytes, text) in FIELDS.iter().filter(|field| field.2 > 0) {
        let file = with_field(at, value, bytes);
        let said = refused(&file);
        assert!(said.starts_with(text), "{at} {value:#x}: {said}");
        if compares && !text.contains("crypt") {
            std::fs::write(dir.path().join("a.qcow2"), file.bytes()).expect("written");
            let out = run(dir.path(), "qemu-img info -f qcow2 a.qcow2");
            let theirs = String::from_utf8_lossy(&out.stderr).into_owned();
            // Some of these it finds out later, or looks at in another order.
            assert!(!out.status.success() || text.contains("L1") || at == 24, "{text}: {theirs}");
        }
    }
}

#[test]
fn a_header_that_is_cut_short() {
    let bytes = qcow2(&MB).bytes();
    for len in [4, 8, 71, 72, 103, 104, 111] {
        let said = refused(&MemFile::new(&bytes[..len]));
        assert!(said.contains("cut short"), "{len}: {said}");
    }
    for len in [0, 3] {
        assert_eq!(refused(&MemFile::new(&bytes[..len])), "Image is not in qcow2 format");
    }
}

#[test]
fn version_2_has_no_feature_bits() {
    let file = qcow2(&Options { version: 2, ..MB });
    file.write_at(72, &[0; 8]).expect("memory"); // no extensions
    file.write_at(80, &[0xff; 28]).expect("memory");
    let header = read_header(&file).expect("they are no fields");
    assert_eq!((header.incompatible, header.compatible, header.autoclear), (0, 0, 0));
    assert_eq!((header.refcount_order, header.has_subclusters()), (4, false));
    open_with(&file, true).expect("opens");
}

#[test]
fn names_outside_the_first_cluster() {
    for (offset, len) in [(112u64, 1024u32), (112, u32::MAX), (65530, 7), (65536, 1)] {
        let file = qcow2(&MB);
        file.poke_be64(8, offset);
        file.poke_be32(16, len);
        assert!(refused(&file).starts_with("Backing file name too long"), "{offset} {len}");
    }
    for offset in [1u64, 8, 111] {
        let file = qcow2(&MB);
        file.poke_be64(8, offset);
        file.poke_be32(16, 4);
        assert!(refused(&file).contains("lies within the header"), "{offset}");
    }
    // A format that nobody knows is not guessed again.
    let file = qcow2(&Options { backing: Some((b"base", "raw")), ..MB });
    file.write_at(120, b"\x1b[2").expect("memory");
    assert!(refused(&file).contains("Unknown driver '\\u{1b}[2'"), "{}", refused(&file));
    open_with(&qcow2(&Options { backing: Some((b"base", "raw")), ..MB }), true).expect("opens");
}

#[test]
fn extensions_that_go_too_far() {
    for len in [65536u32 - 119, 1 << 31, u32::MAX, u32::MAX - 7] {
        let file = qcow2(&MB);
        file.poke_be32(112, 0x1234);
        file.poke_be32(116, len);
        assert!(refused(&file).starts_with("Header extension too large"), "{len}");
    }
    // As many as there can be.
    let file = qcow2(&MB);
    for at in (112..65536).step_by(8) {
        file.poke_be64(at, 0x1234 << 32);
    }
    open_with(&file, false).expect("opens");
    assert!(read_header(&file).expect("legal").encode() == file.bytes()[..65536]);
}

#[test]
fn unknown_features_are_named_from_untrusted_text() {
    let mut header = read_header(&qcow2(&MB)).expect("legal");
    let mut names = vec![0u8; 96];
    (names[1], names[49]) = (40, 41);
    names[2..48].fill(b'x');
    names[50..58].copy_from_slice(b"\x1b[31mred");
    header.lay_out(None, &[(EXT_FEATURE_NAMES, Some(&names))]).expect("fits");
    header.incompatible = 1 << 40 | 1 << 41 | 1 << 42;
    let file = qcow2(&MB);
    file.write_at(0, &header.encode()).expect("memory");
    let x = "x".repeat(46);
    let expected = format!(
        "Unsupported qcow2 feature(s): {x}, \\u{{1b}}[31mred, Unknown incompatible feature: \
         40000000000"
    );
    assert_eq!(refused(&file), expected);
}

#[test]
fn subclusters_need_room() {
    let file = qcow2(&Options { cluster_size: 8192, ..MB });
    file.poke_be64(72, 16);
    assert!(refused(&file).contains("at least 16 KiB"));
}

#[test]
fn marked_images() {
    // Corrupt: read, not written.
    let file = with_field(72, 2, 8);
    open_with(&file, false).expect("for reading");
    assert!(refused_for(&file, false).starts_with("qcow2: Image is corrupt"));
    // Dirty: repaired when it is opened for writing.
    let file = with_field(72, 1, 8);
    file.poke_be64(0x2_0008, 0); // no refcount for the L1 table
    file.write_at(0x2_0000, &[0; 8]).expect("memory");
    open_with(&file, false).expect("for reading");
    assert_eq!(file.peek_be64(72), 1);
    open_with(&file, true).expect("repaired");
    assert_eq!(file.peek_be64(72), 0);
    assert!(check(&file, Repair::None).expect("checked").is_clean());
    // Dirty, and what is wrong cannot be repaired: never written to.
    let file = with_field(72, 1, 8);
    file.poke_be64(L1, 0x4_0200);
    let said = open_with(&file, true).expect_err("broken").to_string();
    assert!(said.contains("cannot be repaired"), "{said}");
    assert_eq!(file.peek_be64(72), 1);
}

#[test]
fn snapshot_tables() {
    let file = qcow2(&MB);
    let table = 0x4_0000;
    file.poke_be32(60, 2);
    file.poke_be64(64, table + 8);
    assert!(refused(&file).starts_with("Snapshot table offset invalid"));
    file.poke_be64(64, table);
    // Two empty ones are legal.
    open_with(&file, true).expect("opens");
    let file = &file;
    let with_extra = |len: u32| {
        file.poke_be32(table + 36, len);
        open_with(file, true)
    };
    with_extra(1024).expect("the most that is legal");
    let error = with_extra(1025).expect_err("too much").to_string();
    assert!(error.starts_with("Too much extra metadata in snapshot table"), "{error}");
    open_with(file, false).expect("nobody needs it to read the disk");
    with_extra(0).expect("opens");
    // 65536 snapshots of nearly 2 KiB each are more than 64 MiB.
    file.poke_be32(60, 65536);
    let mut entry = [0; 40];
    entry[36..].copy_from_slice(&1024u32.to_be_bytes());
    for i in 0..65536 {
        file.write_at(table + i * 1064, &entry).expect("memory");
    }
    let error = open_with(file, true).expect_err("too large").to_string();
    assert!(error.contains("too large"), "{error}");
}

#[test]
fn bitmap_extensions_and_directories() {
    let with = |count: u32, reserved: u32, len: u64, at: u64| {
        let file = qcow2(&MB);
        let mut header = read_header(&file).expect("legal");
        let mut data = Vec::new();
        data.extend(count.to_be_bytes());
        data.extend(reserved.to_be_bytes());
        data.extend(len.to_be_bytes());
        data.extend(at.to_be_bytes());
        header.lay_out(None, &[(EXT_BITMAPS, Some(&data))]).expect("fits");
        header.autoclear = 1;
        file.write_at(0, &header.encode()).expect("memory");
        file
    };
    let directory = 0x4_0000u64;
    for (count, reserved, len, at) in [
        (0, 0, 32, directory),
        (65536, 0, 1 << 22, directory),
        (1, 1, 32, directory),
        (1, 0, (64 << 20) + 1, directory),
        (1, 0, 32, directory + 512),
        (1, 0, 32, 0),
        (1, 0, 1 << 20, (1 << 63) - 65536),
    ] {
        let said = refused(&with(count, reserved, len, at));
        assert!(said.starts_with("bitmaps_ext"), "{count} {reserved} {len} {at:#x}: {said}");
    }
    // Without the autoclear bit nobody believes it.
    let file = with(0, 1, 0, 1);
    file.poke_be64(88, 0);
    open_with(&file, true).expect("opens");

    let entry = |table: u64, size: u32, flags: u32, kind: u8, bits: u8, name: &[u8]| {
        let mut bytes = Vec::new();
        bytes.extend(table.to_be_bytes());
        bytes.extend(size.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend([kind, bits]);
        bytes.extend((name.len() as u16).to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    };
    let table = 0x5_0000u64;
    let good = entry(table, 1, 2, 1, 16, b"bits");
    let cases = [
        entry(table + 512, 1, 2, 1, 16, b"bits"),
        entry(0, 1, 2, 1, 16, b"bits"),
        entry(table, 0, 2, 1, 16, b"bits"),
        entry(table, u32::MAX, 2, 1, 16, b"bits"),
        entry(table, 1, 8, 1, 16, b"bits"),
        entry(table, 1, 2, 0, 16, b"bits"),
        entry(table, 1, 2, 1, 8, b"bits"),
        entry(table, 1, 2, 1, 32, b"bits"),
        entry(table, 1, 2, 1, 16, b""),
        [good.clone(), good.clone()].concat(),
    ];
    for (i, bytes) in cases.iter().enumerate() {
        let count = if i == 9 { 2 } else { 1 };
        let file = with(count, 0, bytes.len() as u64, directory);
        file.write_at(directory, bytes).expect("memory");
        open_with(&file, false).expect("for reading nobody looks");
        refused_for(&file, false);
    }
    // A good one is marked as in use, once.
    let file = with(1, 0, good.len() as u64, directory);
    file.write_at(directory, &good).expect("memory");
    open_with(&file, true).expect("opens");
    assert_eq!(file.peek_be64(directory + 8), 1 << 32 | 3);
    let writes = file.inner().writes;
    open_with(&file, true).expect("opens");
    assert_eq!(file.inner().writes, writes);
    assert_eq!(read_header(&file).map(|header| header.autoclear), Ok(1));
}

/// An image with one L2 table at 0x40000 and a cluster of data at 0x50000.
fn mapped(options: &Options<'_>) -> MemFile {
    let file = qcow2(options);
    file.poke_be64(L1, 1 << 63 | 0x4_0000);
    file.poke_be64(0x4_0000, 1 << 63 | 0x5_0000);
    file.write_at(0x5_0000, &[7; 65536]).expect("memory");
    file
}

/// Mapping and reading the first cluster fails, and says this; the next one is as good as ever.
fn fails(file: &MemFile, text: &str) {
    let chain = open_with(file, false).expect("only a table is wrong");
    let mut buf = [0; 512];
    let error = read(&chain, 0, &mut buf).expect_err(text).to_string();
    assert!(error.contains(text), "{error}");
    if !text.contains("compressed") {
        let found = extents(&chain).next().expect("something");
        assert!(found.expect_err("wrong").to_string().contains(text));
    }
    if !text.contains("L1") {
        read(&chain, 65536, &mut buf).expect("the next one");
    }
}

#[test]
fn entries_that_cannot_be() {
    for word in [0x4_0200, 0x4_0001, 1 << 57 | 0x4_0000, u64::MAX] {
        let file = mapped(&MB);
        file.poke_be64(L1, word);
        fails(&file, "invalid L1 entry");
    }
    let file = mapped(&MB);
    file.poke_be64(L1, 0x77_0000);
    fails(&file, "an L1 entry points beyond the end of the file");
    for word in [0x5_0200, 1 << 57 | 0x5_0000, 0x5_0002, 3 << 62, 1 << 62] {
        let file = mapped(&MB);
        file.poke_be64(0x4_0000, word);
        fails(&file, "invalid L2 entry");
    }
    let file = mapped(&Options { version: 2, ..MB });
    file.poke_be64(0x4_0000, 1);
    fails(&file, "invalid L2 entry");
    let extended = Options { extended_l2: true, ..MB };
    for (word, bitmap) in [(0x5_0000, 1 << 32 | 1), (0, 1), (1 << 62 | 0x5_0000, 1)] {
        let file = mapped(&extended);
        file.poke_be64(0x4_0000, word);
        file.poke_be64(0x4_0008, bitmap);
        file.poke_be64(0x4_0010, 0);
        fails(&file, "invalid L2 entry");
    }
}

#[test]
fn compressed_clusters_that_are_none() {
    for compression in [Compression::Zlib, Compression::Zstd] {
        let options = Options { compression, ..MB };
        let sectors = |n: u64| n << (62 - 8);
        let cases: [(u64, &[u8]); 4] = [
            (1 << 62 | 0x5_0000, &[0xff; 600]),
            (1 << 62 | sectors(255) | 0x5_0003, &[0; 600]),
            (1 << 62 | sectors(1) | 0x5_0000, b"\x03\x00"),
            // Behind the end of the file.
            (1 << 62 | sectors(200) | 0x80_0000_0001, &[]),
        ];
        for (word, bytes) in cases {
            let file = mapped(&options);
            file.poke_be64(0x4_0000, word);
            file.write_at(0x5_0000, bytes).expect("memory");
            fails(&file, "compressed cluster");
        }
    }
}

#[test]
fn data_files_are_found_only_where_the_caller_allows() {
    let names: [&[u8]; 5] =
        [b"/etc/hostname", b"../d", b"json:{\"driver\":\"raw\"}", b"nbd://h/x", b"s/d"];
    for name in names {
        let file = qcow2(&Options { data_file: Some(name), ..MB });
        let host = MemHost::default();
        host.put("/e/a.qcow2", &file);
        for path in ["/etc/hostname", "/d", "/e/s/d"] {
            host.put(path, &MemFile::new(&[9; 512]));
        }
        let path = Path::new("/e/a.qcow2");
        let found = info(&host, path, None).expect("info opens one file");
        assert_eq!(
            found.qcow2.and_then(|it| it.header.data_file_name().map(<[u8]>::to_vec)),
            Some(name.to_vec())
        );
        open(&host, path, &OpenOptions::default()).expect_err("not beside the image");
        let opened = host.opened.lock().expect("no panics").clone();
        let others = opened.iter().filter(|other| {
            *other != path && !other.ends_with(Path::new(std::str::from_utf8(name).expect("text")))
        });
        assert_eq!(others.count(), 0, "{opened:?}");
    }
    // It is raw, whatever it looks like, and never the image itself.
    let host = MemHost::default();
    host.put("a.qcow2", &qcow2(&Options { data_file: Some(b"d"), ..MB }));
    host.put("d", &qcow2(&MB));
    let chain = open(&host, Path::new("a.qcow2"), &OpenOptions::default()).expect("opens");
    assert_eq!((chain.layers.len(), chain.layers[0].more.len()), (1, 1));
    host.put("b.qcow2", &qcow2(&Options { data_file: Some(b"b.qcow2"), ..MB }));
    open(&host, Path::new("b.qcow2"), &OpenOptions::default()).expect_err("itself");
    // Named, but not there; there, but not named.
    let file = qcow2(&MB);
    file.poke_be64(72, 4);
    host.put("c.qcow2", &file);
    let error = open(&host, Path::new("c.qcow2"), &OpenOptions::default()).expect_err("no name");
    assert!(error.to_string().contains("'data-file' is required"), "{error}");
}

#[test]
fn files_of_exabytes_are_checked_at_once_or_refused() {
    // A hole behind a small image: nothing there, nothing to count.
    let file = mapped(&MB);
    file.write_at(0x2_0000, &[0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]).expect("memory");
    file.set_len(1 << 62).expect("memory");
    let report = check(&file, Repair::All).expect("checked");
    assert!(report.is_clean(), "{report:?}");
    // Its refcounts are gone, and one cluster is far away: new ones are too large a table.
    file.poke_be64(0x4_0008, 1 << 63 | 1 << 54);
    file.poke_be64(0x1_0000, 0);
    let found = check(&file, Repair::None).expect("checked");
    assert!(found.needs_rebuild && found.corruptions > 0, "{found:?}");
    let error = check(&file, Repair::All).expect_err("too large");
    assert!(matches!(error, Error::Limit(_)), "{error}");
    // A table of refcount blocks that is one and the same block.
    let file = mapped(&MB);
    for i in 0..8192 {
        file.poke_be64(0x1_0000 + i * 8, 0x2_0000);
    }
    let error = check(&file, Repair::None).expect_err("too much work");
    assert!(matches!(error, Error::Limit(_)), "{error}");
    // An L1 table whose entries are all the same table.
    let file = qcow2(&Options { size: 2 << 60, cluster_size: 2 << 20, ..MB });
    let header = read_header(&file).expect("legal");
    let l2 = file.len().expect("memory").next_multiple_of(2 << 20);
    file.set_len(l2 + (2 << 20)).expect("memory");
    file.write_at(l2, &[0xff; 4096]).expect("memory");
    let words = l2.to_be_bytes().repeat(header.l1_size as usize);
    file.write_at(header.l1_offset, &words).expect("memory");
    let report = check(&file, Repair::None).expect("each table is read once");
    assert!(report.corruptions > 1 << 30, "{report:?}");
}

#[test]
fn a_header_that_parses_survives_encoding() {
    let mut random = 5u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let templates = [
        qcow2(&MB),
        qcow2(&Options { version: 2, cluster_size: 512, ..MB }),
        qcow2(&Options { backing: Some((b"base", "raw")), data_file: Some(b"d"), ..MB }),
    ];
    let mut parsed = 0;
    for _ in 0..100_000 {
        let template = &templates[next(3) as usize];
        let mut bytes = vec![0; 512];
        template.read_at(0, &mut bytes).expect("memory");
        for _ in 0..1 + next(3) {
            let at = next(180) as usize;
            bytes[at] = if next(2) == 0 { next(256) as u8 } else { 1 << next(8) };
        }
        let Ok(header) = Header::parse(&bytes) else { continue };
        parsed += 1;
        let again = Header::parse(&header.encode()).expect("as legal as before");
        assert_eq!(again.encode(), header.encode());
        assert!(header.sector()[..] == bytes[..], "nothing is lost");
        let _ = header.check_tables();
    }
    assert!(parsed > 10_000, "{parsed}");
}

/// A header of version 3 without features: clusters of 2 MiB, tables at the clusters given.
fn large_clusters(l1_entries: u32, refcount_order: u32) -> MemFile {
    let file = MemFile::new(b"QFI\xfb\0\0\0\x03");
    file.poke_be32(20, 21);
    file.poke_be64(24, u64::from(l1_entries) << 39);
    file.poke_be32(36, l1_entries);
    file.poke_be64(40, 1 << 21);
    file.poke_be64(48, 2 << 21);
    file.poke_be32(56, 1);
    file.poke_be32(96, refcount_order);
    file.poke_be32(100, 104);
    file.poke_be64(2 << 21, 3 << 21);
    file
}

/// What is read, and what is said, follows what is in a file, not how long it is or how often it says
/// the same.
#[test]
fn small_files_with_much_to_check() {
    let read = |file: &MemFile| {
        let before = file.inner().bytes_read;
        for repair in [Repair::None, Repair::All] {
            let _ = check(file, repair);
        }
        let _ = create(file, b"x", Moment::default());
        file.inner().bytes_read - before
    };
    // Blocks of refcounts of one bit, with a byte in each, far behind everything.
    let file = large_clusters(1, 0);
    file.poke_be64(3 << 21, 0x0f00_0000_0000_0000);
    for i in 1..300 {
        file.poke_be64((2 << 21) + 8 * i, (1 << 40) + (i << 21));
        file.write_at((1 << 40) + (i << 21), &[1]).expect("memory");
    }
    file.set_len(1 << 62).expect("memory");
    assert!(read(&file) < 1 << 30, "sparse refcounts");
    // One block, full, for a thousand runs of clusters.
    let file = large_clusters(1, 0);
    for i in 1..1000 {
        file.poke_be64((2 << 21) + 8 * i, 3 << 21);
    }
    file.write_at(3 << 21, &vec![0xff; 1 << 21]).expect("memory");
    file.set_len(1 << 62).expect("memory");
    assert!(matches!(check(&file, Repair::None), Err(Error::Limit(_))));
    // L2 tables that lie over each other.
    let file = large_clusters(1 << 17, 4);
    file.write_at(4 << 21, &vec![0x11; 4 << 21]).expect("memory");
    for i in 0..1 << 12 {
        file.poke_be64((1 << 21) + 8 * i, (4 << 21) + 512 * i);
    }
    assert!(matches!(check(&file, Repair::None), Err(Error::Limit(_))));
    assert!(read(&file) < 1 << 28, "tables over each other");
    // The same L2 table again and again.
    for i in 0..1 << 17 {
        file.poke_be64((1 << 21) + 8 * i, 4 << 21);
    }
    assert!(read(&file) < 1 << 30, "one table");
}
