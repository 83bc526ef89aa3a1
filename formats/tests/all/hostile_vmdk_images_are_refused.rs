//! A VMDK header or extent that says something impossible is refused, in words, and nothing is
//! written. A table that does fails the reads that come upon it, no others, and `check` counts it.
//! (What descriptors may not say is tested beside their parser; bad grains of streams, with streams.)

use std::path::Path;

use crate::common::{MemFile, MemHost};
use cowbell_engine::store::Store;
use cowbell_formats::chain::open_whole_layer;
use cowbell_formats::check::Repair;
use cowbell_formats::map::{extents, read};
use cowbell_formats::vmdk::disk::descriptor::Kind;
use cowbell_formats::vmdk::disk::layout::{Header, SECTOR};
use cowbell_formats::vmdk::rest::check::check;
use cowbell_formats::vmdk::rest::create::{Options, write_file};
use cowbell_formats::{Chain, Error, Format, OpenOptions, Policy, open};

const SIZE: u64 = 8 << 20;
const GRAIN: u64 = 4096;
/// Bytes of the disk under one table.
const SPAN: u64 = 128 * GRAIN;

fn make(kind: Kind) -> MemFile {
    let options =
        Options { grain_bits: 12, table_bits: 7, ..Options::new(kind, b"top.vmdk", SIZE, 7) };
    let file = MemFile::new(&[]);
    write_file(&file, &options, 0).expect("memory");
    file
}

fn host(file: &MemFile) -> MemHost {
    let host = MemHost::default();
    host.put("top.vmdk", file);
    host
}

fn open_in(host: &MemHost, write: bool) -> Result<Chain<MemFile>, Error> {
    let format = Some(Format::Vmdk);
    let options = OpenOptions { format, write, files: Policy::SameDirectory, ..Default::default() };
    open(host, Path::new("top.vmdk"), &options)
}

/// What opening it says, for reading and for writing; neither writes.
fn refused(file: &MemFile) -> String {
    let before = file.bytes();
    let said = [false, true].map(|write| {
        let error = open_in(&host(file), write).expect_err("hostile").to_string();
        assert!(!error.contains(char::is_control), "{error}");
        error
    });
    assert!(file.bytes() == before, "it was written");
    assert_eq!(said[0], said[1]);
    said[0].clone()
}

#[test]
fn hostile_headers() {
    let u32s = |value: u32| value.to_le_bytes().to_vec();
    let u64s = |value: u64| value.to_le_bytes().to_vec();
    let cases = [
        (4, u32s(0), "version"),
        (4, u32s(4), "version"),
        (77, vec![2, 0], "deflate"),
        (73, b"\n \n\n".to_vec(), "transfer"),
        (20, u64s(0), "granularity"),
        (20, u64s(7), "granularity"),
        (20, u64s(24), "granularity"),
        (20, u64s(0x20_0000), "granularity"),
        (20, u64s(1 << 63), "granularity"),
        (44, u32s(0), "number of entries"),
        (44, u32s(96), "number of entries"),
        (44, u32s(1024), "number of entries"),
        (44, u32s(u32::MAX), "number of entries"),
        (12, u64s(u64::MAX), "too large"),
        (12, u64s(1 << 54), "too large"),
        (12, u64s(1 << 45), "too large"),
        (56, u64s(1 << 40), "directory"),
        (56, u64s(u64::MAX - 1), "directory"),
        (56, u64s(0), ""),
        (28, u64s(1 << 62), ""),
        (36, u64s(u64::MAX), ""),
        (64, u64s(1 << 40), "truncated"),
        (64, u64s(u64::MAX), "truncated"),
    ];
    for (at, value, named) in cases {
        let file = make(Kind::MonolithicSparse);
        file.clone().write_at(at, &value).expect("memory");
        let said = refused(&file);
        assert!(said.contains(named), "{at}: {value:?}: {said}");
    }
}

#[test]
fn files_cut_off() {
    let whole = make(Kind::MonolithicSparse).bytes();
    for len in [0, 1, 511, 512, 600, 1024, 20 * 512, whole.len() - 513] {
        let said = refused(&MemFile::new(&whole[..len]));
        assert!(!said.is_empty());
    }
    let stream = make(Kind::StreamOptimized).bytes();
    for cut in [1024, 1536, 2048] {
        refused(&MemFile::new(&stream[..stream.len() - cut]));
    }
}

#[test]
fn streams_with_bad_ends() {
    let stream = make(Kind::StreamOptimized).bytes();
    let footer = stream.len() - 1024;
    // The footer's magic, its directory's place, its grains; the markers before and behind.
    for (at, value) in [
        (footer, 0),
        (footer + 56, u64::MAX),
        (footer + 56, 1 << 40),
        (footer + 20, 1),
        (footer - 512 + 12, 7),
        (footer + 512 + 12, 7),
    ] {
        let mut bytes = stream.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        refused(&MemFile::new(&bytes));
    }
}

#[test]
fn relatives_are_refused_by_name() {
    for (magic, named) in [(*b"COWD", "COWD"), (*b"\xbe\xba\xfe\xca", "seSparse")] {
        let mut bytes = vec![0; 4096];
        bytes[..4].copy_from_slice(&magic);
        bytes[4] = if named == "COWD" { 1 } else { 0 };
        let said = refused(&MemFile::new(&bytes));
        assert!(said.contains(named), "{said}");
    }
}

/// A descriptor alone, whose extents are `lines`.
fn split(lines: &str, kind: &str) -> MemFile {
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=00000007\nparentCID=ffffffff\n\
         createType=\"{kind}\"\n\n{lines}\n"
    );
    MemFile::new(text.as_bytes())
}

#[test]
fn hostile_extents() {
    let flat = |lines: &str| split(lines, "twoGbMaxExtentFlat");
    let host = |top: &MemFile| {
        let host = host(top);
        host.put("a", &MemFile::new(&[1; 4096]));
        host.put("/etc/hostname", &MemFile::new(&[2; 4096]));
        host.put("../a", &MemFile::new(&[2; 4096]));
        host
    };
    let sound = flat("RW 8 FLAT \"a\" 0");
    assert_eq!(open_in(&host(&sound), true).expect("sound").size(), 4096);
    for lines in [
        "RW 8 FLAT \"/etc/hostname\" 0",
        "RW 8 FLAT \"../a\" 0",
        "RW 8 FLAT \"nowhere\" 0",
        // Longer than the file.
        "RW 9 FLAT \"a\" 0",
        "RW 8 FLAT \"a\" 1",
        "RW 4611686018427387904 FLAT \"a\" 0",
        // The descriptor.
        "RW 1 FLAT \"top.vmdk\" 0",
    ] {
        for write in [false, true] {
            let top = flat(lines);
            let error = open_in(&host(&top), write).expect_err(lines).to_string();
            assert!(!error.contains(char::is_control), "{error}");
        }
    }
    // A sparse extent that is none.
    let none = host(&split("RW 8 SPARSE \"a\"", "twoGbMaxExtentSparse"));
    assert!(open_in(&none, false).is_err());
}

/// Where entry `entry` of the primary table `table` is.
fn entry_at(file: &MemFile, table: u64, entry: u64) -> u64 {
    let mut first = [0; SECTOR as usize];
    file.read_at(0, &mut first).expect("memory");
    let header = Header::parse(&first).expect("sound");
    let mut sector = [0; 4];
    file.read_at(header.directory_at * SECTOR + table * 4, &mut sector).expect("memory");
    u64::from(u32::from_le_bytes(sector)) * SECTOR + entry * 4
}

#[test]
fn hostile_tables() {
    let file = make(Kind::MonolithicSparse);
    let mut first = [0; SECTOR as usize];
    file.read_at(0, &mut first).expect("memory");
    let header = Header::parse(&first).expect("sound");
    let data = header.overhead as u32;
    file.set_len(header.overhead * SECTOR + 2 * GRAIN).expect("memory");
    let end = data + 2 * (GRAIN / SECTOR) as u32;
    let directory = header.directory_at * SECTOR;
    // Beyond the end; on the header, the descriptor, the directories, the tables; zeros that the
    // header does not know.
    for (i, raw) in
        [end, u32::MAX, 2, data - 1, header.directory_at as u32, 1].into_iter().enumerate()
    {
        file.poke_u32(entry_at(&file, 0, i as u64), raw);
    }
    file.poke_u32(entry_at(&file, 0, 20), data);
    // Tables that cannot be where the directory says.
    for (table, raw) in [(1, u32::MAX), (2, 1), (3, header.directory_at as u32)] {
        file.poke_u32(directory + table * 4, raw);
    }
    let chain = open_in(&host(&file), false).expect("tables are not looked at");
    let mut buf = [0; 512];
    for i in 0..6 {
        assert!(read(&chain, i * GRAIN, &mut buf).is_err(), "{i}");
    }
    for table in 1..4 {
        assert!(read(&chain, table * SPAN, &mut buf).is_err(), "{table}");
    }
    read(&chain, 20 * GRAIN, &mut buf).expect("a sound entry");
    read(&chain, 6 * GRAIN, &mut buf).expect("nothing there");
    read(&chain, 4 * SPAN, &mut buf).expect("a sound table");
    assert!(extents(&chain).any(|extent| extent.is_err()));
    // A grain that two entries lead to: each can be read, and it is an error.
    file.poke_u32(entry_at(&file, 0, 21), data);
    let options = OpenOptions { format: Some(Format::Vmdk), ..OpenOptions::default() };
    let before = file.bytes();
    let host = host(&file);
    let layer = open_whole_layer(&host, Path::new("top.vmdk"), &options).expect("it opens");
    let report = check(&layer, Repair::None).expect("it is checked");
    let (entries, tables, shared) = (6, 3, 1);
    assert!(report.corruptions >= entries + tables + shared, "{report:?}");
    assert!(file.bytes() == before, "a check that repairs nothing writes nothing");
}
