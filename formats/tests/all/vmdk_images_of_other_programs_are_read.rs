//! VMDK images as programs other than QEMU write them: what such an image says is read as it is
//! meant, and what cannot be written without harm is opened for reading only.

use std::path::Path;

use crate::common::{MemFile, MemHost};
use cowbell_engine::store::Store;
use cowbell_formats::chain::probe_file;
use cowbell_formats::check::Repair;
use cowbell_formats::map::read;
use cowbell_formats::vmdk::disk::descriptor::Kind;
use cowbell_formats::vmdk::disk::grain::deflate;
use cowbell_formats::vmdk::disk::layout::{Header, Marker, SECTOR};
use cowbell_formats::vmdk::rest::check::check;
use cowbell_formats::vmdk::rest::create::{Options, write_file};
use cowbell_formats::{Chain, Error, Format, OpenOptions, open};

const SECTORS: u64 = 4096;
const GRAIN: u64 = 128;

/// The sectors that are filled, and with what.
const FILLED: [(u64, u8); 3] = [(0, 1), (3 * GRAIN, 2), (SECTORS - GRAIN, 3)];

fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// A stream of one table, as a converter writes it: header, descriptor, grains, table, directory,
/// footer. `header` and `footer` may change either.
fn stream(text: &str, header: impl Fn(&mut [u8]), footer: impl Fn(&mut [u8])) -> Vec<u8> {
    let empty = Header {
        version: 3,
        flags: 0x3_0001,
        capacity: SECTORS,
        grain_bits: 16,
        descriptor_at: 1,
        descriptor_len: 20,
        table_bits: 9,
        redundant_at: 0,
        directory_at: u64::MAX,
        overhead: GRAIN,
        unclean: false,
    };
    let mut bytes = empty.encode().to_vec();
    header(&mut bytes);
    bytes.extend(text.as_bytes());
    bytes.resize((GRAIN * SECTOR) as usize, 0);
    let (mut table, mut deflated) = ([0_u32; 512], vec![0; 2 << 16]);
    for (lba, fill) in FILLED {
        deflate(&vec![fill; (GRAIN * SECTOR) as usize], &mut deflated).expect("there is room");
        put_u64(&mut deflated, 0, lba);
        let len = u32::from_le_bytes(deflated[8..12].try_into().expect("four")) as usize + 12;
        table[(lba / GRAIN) as usize] = (bytes.len() as u64 / SECTOR) as u32;
        bytes.extend(&deflated[..len.next_multiple_of(SECTOR as usize)]);
    }
    let marker = |bytes: &mut Vec<u8>, marker: Marker, sectors: u64| {
        bytes.extend(marker.encode(sectors));
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        bytes.len() as u64 / SECTOR
    };
    let table_at = marker(&mut bytes, Marker::Table, 4);
    bytes.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
    let directory_at = marker(&mut bytes, Marker::Directory, 1);
    bytes.extend((table_at as u32).to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
    let at = marker(&mut bytes, Marker::Footer, 1);
    bytes.extend(Header { directory_at, ..empty }.encode());
    footer(&mut bytes[(at * SECTOR) as usize..]);
    marker(&mut bytes, Marker::EndOfStream, 0);
    bytes
}

fn descriptor(kind: &str, extents: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
         createType=\"{kind}\"\n\n{extents}\n"
    )
}

/// The descriptor inside a stream that was made under another name.
fn inside() -> String {
    descriptor("streamOptimized", "RDONLY 4096 SPARSE \"call-me-stream.vmdk\"")
}

fn host(files: &[(&str, &[u8])]) -> MemHost {
    let host = MemHost::default();
    for (name, bytes) in files {
        host.put(name, &MemFile::new(bytes));
    }
    host
}

fn open_in(host: &MemHost, write: bool) -> Result<Chain<MemFile>, Error> {
    let options = OpenOptions { format: Some(Format::Vmdk), write, ..OpenOptions::default() };
    open(host, Path::new("top.vmdk"), &options)
}

/// Are the stretches of sectors filled so, and the disk as large?
fn holds(host: &MemHost, sectors: u64, filled: &[(u64, u8)], what: &str) {
    let chain = open_in(host, false).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(chain.size(), sectors * SECTOR, "{what}");
    for &(sector, fill) in filled {
        let mut bytes = [0; SECTOR as usize];
        read(&chain, sector * SECTOR, &mut bytes).unwrap_or_else(|why| panic!("{what}: {why}"));
        assert_eq!(bytes, [fill; SECTOR as usize], "{what}: sector {sector}");
    }
}

#[track_caller]
fn is_read_only(host: &MemHost, named: &str) {
    let error = open_in(host, true).expect_err("it is not written").to_string();
    assert!(error.contains(named), "{error}");
}

#[test]
fn streams_are_read_however_header_and_footer_differ() {
    let nothing = |_: &mut [u8]| {};
    let is_filled = |bytes: &[u8], what: &str| {
        let host = host(&[("top.vmdk", bytes)]);
        holds(&host, SECTORS, &[(0, 1), (GRAIN, 0), (3 * GRAIN + 127, 2), (SECTORS - 1, 3)], what);
        host
    };
    open_in(&is_filled(&stream(&inside(), nothing, nothing), "plain"), true).expect("written, too");
    for capacity in [0, 128, 4095, 1 << 20] {
        let header = |bytes: &mut [u8]| put_u64(bytes, 12, capacity);
        is_filled(&stream(&inside(), header, nothing), "the header was written before the grains");
    }
    for version in [1, 2, 3] {
        let version = |bytes: &mut [u8]| bytes[4] = version;
        is_filled(&stream(&inside(), version, nothing), "another version in the header");
        is_filled(&stream(&inside(), nothing, version), "another version in the footer");
    }
    let no_check = |bytes: &mut [u8]| bytes[73..77].fill(0);
    is_filled(&stream(&inside(), no_check, no_check), "no check bytes");
    let no_flag = |bytes: &mut [u8]| bytes[10] = 2;
    is_filled(&stream(&inside(), no_flag, no_flag), "deflated without the flag");
    let redundant = |bytes: &mut [u8]| {
        bytes[8] |= 2;
        put_u64(bytes, 48, u64::MAX);
    };
    is_filled(&stream(&inside(), redundant, redundant), "a redundant directory at the end");
    for text in [
        descriptor("monolithicSparse", "RW 4096 SPARSE \"x\""),
        "version=1\nCID=1\nparentCID=ffffffff\n".into(),
        inside().replace('\n', "\r\n"),
    ] {
        is_filled(&stream(&text, nothing, nothing), &text);
    }
}

#[test]
fn streams_that_end_otherwise_are_read_and_not_written() {
    let whole = stream(&inside(), |_| {}, |_| {});
    let padded = |zeros: usize| [&whole[..], &vec![0; zeros]].concat();
    let no_end = whole[..whole.len() - SECTOR as usize].to_vec();
    for bytes in [no_end, padded(512), padded(65536), padded(300 << 10)] {
        let host = host(&[("top.vmdk", &bytes)]);
        holds(&host, SECTORS, &FILLED, "an end of another length");
        is_read_only(&host, "between its directory and its footer");
    }
    let far = host(&[("top.vmdk", &padded(2 << 20))]);
    assert!(open_in(&far, false).is_err(), "a footer is not looked for in a whole file");
}

#[test]
fn streams_may_be_extents_that_a_descriptor_names() {
    let part = stream(&inside(), |_| {}, |_| {});
    let flat = [9; 4096];
    let lines = "RDONLY 4096 SPARSE \"a b\"\nRDONLY 8 FLAT \"f\" 0\nRDONLY 4096 SPARSE \"c\"";
    for kind in ["streamOptimized", "twoGbMaxExtentSparse", "custom"] {
        let top = descriptor(kind, lines);
        let host =
            host(&[("top.vmdk", top.as_bytes()), ("a b", &part), ("f", &flat), ("c", &part)]);
        let second = SECTORS + 8;
        let filled = [(0, 1), (3 * GRAIN, 2), (SECTORS, 9), (second, 1), (second + 3 * GRAIN, 2)];
        holds(&host, 2 * SECTORS + 8, &filled, kind);
        is_read_only(&host, "read-only");
    }
    let top = descriptor("streamOptimized", "RW 4096 SPARSE \"c\"");
    is_read_only(&host(&[("top.vmdk", top.as_bytes()), ("c", &part)]), "compressed extents");
}

#[test]
fn extents_may_be_ranges_of_one_file() {
    let disk = [[5; 4096], [6; 4096], [7; 4096]].concat();
    let flat = |lines: &str| {
        let top = descriptor("monolithicFlat", lines);
        host(&[("top.vmdk", top.as_bytes()), ("disk", &disk)])
    };
    let apart = flat("RW 8 FLAT \"disk\" 16\nRW 8 FLAT \"disk\" 0 0e2a1b3c-1111 t10.ATA__1");
    holds(&apart, 16, &[(0, 7), (7, 7), (8, 5), (15, 5)], "apart");
    open_in(&apart, true).expect("nothing is in two places");
    let overlap = flat("RW 9 FLAT \"disk\" 0\nRW 8 FLAT \"disk\" 8");
    holds(&overlap, 17, &[(0, 5), (8, 6), (9, 6), (16, 6)], "overlapping");
    is_read_only(&overlap, "overlap");
}

#[test]
fn extents_may_be_zeros() {
    let disk = [5; 8192];
    for (kind, zeros) in [("partitionedDevice", "RW 8 ZERO"), ("custom", "NOACCESS 8 ZERO")] {
        let lines = format!("RW 8 FLAT \"disk\" 0\n{zeros}\nRW 8 FLAT \"disk\" 8");
        let top = descriptor(kind, &lines);
        let host = host(&[("top.vmdk", top.as_bytes()), ("disk", &disk)]);
        holds(&host, 24, &[(0, 5), (7, 5), (8, 0), (15, 0), (16, 5)], kind);
        is_read_only(&host, "read-only");
    }
}

/// A sparse image with data in its first grain.
fn sparse(grain_bits: u32) -> MemFile {
    let options =
        Options { grain_bits, ..Options::new(Kind::MonolithicSparse, b"top.vmdk", 8 << 20, 7) };
    let file = MemFile::new(&[]);
    write_file(&file, &options, 0).expect("memory");
    let header = header(&file);
    let at = header.overhead * SECTOR;
    file.write_at(at, &vec![4; 1 << grain_bits]).expect("memory");
    for directory in [header.directory_at, header.redundant_at] {
        let mut table = [0; 4];
        file.read_at(directory * SECTOR, &mut table).expect("memory");
        file.poke_u32(u64::from(u32::from_le_bytes(table)) * SECTOR, header.overhead as u32);
    }
    file
}

fn header(file: &MemFile) -> Header {
    let mut sector = [0; SECTOR as usize];
    file.read_at(0, &mut sector).expect("memory");
    Header::parse(&sector).expect("sound")
}

#[test]
fn a_redundant_directory_that_cannot_be_there_is_not_needed() {
    for at in [1 << 30, 1 << 62, u64::MAX, 1, 2] {
        let file = sparse(16);
        file.poke_u64(48, at);
        let host = MemHost::default();
        host.put("top.vmdk", &file);
        holds(&host, 16384, &[(0, 4), (128, 0)], "a bad place");
        is_read_only(&host, "redundant");
        let before = file.bytes();
        let chain = open_in(&host, false).expect("as before");
        let report = check(&chain.layers[0], Repair::All).expect("it is checked");
        assert_eq!((report.corruptions, report.corruptions_fixed), (1, 0));
        assert!(file.bytes() == before, "nobody knows what to repair");
    }
    // Nowhere, or no other than the one.
    for at in [0, header(&sparse(16)).directory_at] {
        let file = sparse(16);
        file.poke_u64(48, at);
        let host = MemHost::default();
        host.put("top.vmdk", &file);
        holds(&host, 16384, &[(0, 4), (128, 0)], "no place");
        open_in(&host, true).expect("it has one directory");
    }
}

#[test]
fn grains_of_many_sizes_are_read() {
    for grain_bits in [9, 10, 12, 13, 16, 20, 21, 22] {
        let file = sparse(grain_bits);
        let host = MemHost::default();
        host.put("top.vmdk", &file);
        let last = (1 << (grain_bits - 9)) - 1;
        holds(&host, 16384, &[(0, 4), (last, 4), (last + 1, 0)], "a size");
        assert_eq!(open_in(&host, true).is_ok(), grain_bits >= 12, "{grain_bits}");
    }
}

#[test]
fn descriptors_are_told_by_their_version_where_the_title_is_missing() {
    for (text, format) in [
        ("version=1\nCID=1\n", Format::Vmdk),
        ("# made by hand\n\n  \nversion=3\r\nCID=1\n", Format::Vmdk),
        ("# Disk DescriptorFile\nencoding=\"UTF-8\"\nversion=1\n", Format::Vmdk),
        ("version=7\nCID=1\n", Format::Raw),
        ("versions=1\n", Format::Raw),
    ] {
        assert_eq!(probe_file(&MemFile::new(text.as_bytes())).expect("memory"), format, "{text}");
    }
}
