//! What is converted into a VMDK stream can be read by a reader that is written from the specification
//! alone, front to back and by the directory, and holds what the disk held. What QEMU writes is read by
//! it too, and it is said which rules QEMU does not keep. And the reader's rules can fail: each is broken
//! once, in a stream that was good.

use std::fs;

use crate::common::stream::{self, Stream};
use crate::common::{Place, Random, have_qemu, read};

const GRAIN: u64 = 64 << 10;
const MIB: u64 = 1 << 20;
/// What one grain table maps.
const SPAN: u64 = 32 * MIB;

/// Text, or what deflates like it.
fn text(random: &mut Random, len: u64) -> Vec<u8> {
    let words = ["grain ", "table ", "extent ", "the ", "of ", "a ", "is ", "image ", "sector\n"];
    let mut bytes = Vec::with_capacity(len as usize + 8);
    while bytes.len() < len as usize {
        bytes.extend(words[random.below(words.len() as u64) as usize].as_bytes());
        bytes.extend(format!("{:x} ", random.below(4096)).as_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

fn noise(random: &mut Random, len: u64) -> Vec<u8> {
    let words = std::iter::repeat_with(|| random.next().to_le_bytes());
    let mut bytes: Vec<u8> = words.take(len.div_ceil(8) as usize).flatten().collect();
    bytes.truncate(len as usize);
    bytes
}

/// A disk of zeros, with text or noise at these places.
fn sparse(random: &mut Random, size: u64, pieces: &[(u64, u64)]) -> Vec<u8> {
    let mut disk = vec![0; size as usize];
    for &(at, len) in pieces {
        let bytes = if random.below(2) == 0 { text(random, len) } else { noise(random, len) };
        disk[at as usize..(at + len) as usize].copy_from_slice(&bytes);
    }
    disk
}

/// Disks, each with a name.
fn disks() -> Vec<(&'static str, Vec<u8>)> {
    let random = &mut Random(7);
    let far = 3 * SPAN + 5 * GRAIN + 1024;
    let last = far - far % GRAIN;
    vec![
        ("one-sector", noise(random, 512)),
        ("one-grain", text(random, GRAIN)),
        ("empty", vec![0; (40 * MIB) as usize]),
        ("dense-text", text(random, 5 * MIB)),
        ("dense-noise", noise(random, 3 * MIB)),
        ("odd-text", text(random, 2 * MIB + 512)),
        ("odd-noise", noise(random, MIB + GRAIN - 512)),
        ("a-whole-table", text(random, SPAN)),
        ("tables", text(random, SPAN + 3 * GRAIN)),
        ("ends-of-tables", sparse(random, far, &[(SPAN - 4096, 8192), (2 * SPAN, 512)])),
        ("holes", sparse(random, far, &[(0, GRAIN), (3 * GRAIN, 700), (last, far - last)])),
    ]
}

const CONVERT: &str = "convert -f raw -O vmdk -o subformat=streamOptimized";

fn read_stream(place: &Place, name: &str) -> Stream {
    stream::read(&read(&place.path(name))).unwrap_or_else(|why| panic!("{name}: {why}"))
}

/// Has it all that the disk has, and no grain of zeros?
fn assert_holds(name: &str, found: &Stream, disk: &[u8]) {
    assert!(found.disk == disk, "{name}: other contents");
    let grains = disk.chunks(GRAIN as usize).filter(|grain| grain.iter().any(|&byte| byte != 0));
    assert_eq!(found.grains.len(), grains.count(), "{name}");
}

#[test]
fn ours_keep_every_rule() {
    let place = Place::new();
    for (name, disk) in disks() {
        fs::write(place.path("disk"), &disk).expect("a scratch file");
        place.ok(&format!("cowbell {CONVERT} disk {name}.vmdk"));
        let found = read_stream(&place, &format!("{name}.vmdk"));
        assert_eq!(found.broken, Default::default(), "{name}");
        assert_holds(name, &found, &disk);
        // There are importers that go through disk and stream at once.
        assert!(found.is_ascending(), "{name}");
    }
}

#[test]
fn a_stream_that_goes_on_keeps_every_rule() {
    let place = Place::new();
    let mut disk = sparse(&mut Random(3), 2 * SPAN, &[(0, 2 * GRAIN)]);
    fs::write(place.path("disk"), &disk).expect("a scratch file");
    place.ok(&format!("cowbell {CONVERT} disk d.vmdk"));
    // Back and forth, also under a table that is there already.
    for at in [5 * GRAIN, SPAN + GRAIN, 3 * GRAIN] {
        place.ok(&format!("qemu-io -f vmdk -c 'write -P 7 {at} {GRAIN}' d.vmdk"));
        disk[at as usize..(at + GRAIN) as usize].fill(7);
    }
    let found = read_stream(&place, "d.vmdk");
    assert_eq!(found.broken, Default::default());
    assert_holds("d", &found, &disk);
    assert!(!found.is_ascending());
}

/// QEMU puts directory and tables in front, as open-vmdk does. It says that there is a redundant
/// directory, which a stream has none of, and it ends a file with as many zeros as there happen to be: some
/// sectors, which an importer may take for the end-of-stream marker, or none.
#[test]
fn those_of_qemu_keep_most() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let known = ["no redundant directory", "end-of-stream marker", "end-of-stream marker is last"];
    for (name, disk) in disks() {
        fs::write(place.path("disk"), &disk).expect("a scratch file");
        place.qemu(&format!("qemu-img {CONVERT} disk {name}.vmdk"));
        let found = read_stream(&place, &format!("{name}.vmdk"));
        let others: Vec<_> = found.broken.iter().filter(|rule| !known.contains(rule)).collect();
        assert!(others.is_empty(), "{name}: {others:?}");
        assert_holds(name, &found, &disk);
    }
}

/// A stream with two grains under the first table and one under the second, and what was found in it.
struct Good {
    file: Vec<u8>,
    found: Stream,
}

impl Good {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.file[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn flip(&mut self, at: usize) {
        self.file[at] ^= 1;
    }

    /// The first byte of the marker of a grain.
    fn grain(&self, which: usize) -> usize {
        self.found.grains[which].1 * 512
    }

    /// The first byte of a table, and of the directory.
    fn table(&self, which: usize) -> usize {
        self.found.tables[which] * 512
    }

    fn directory(&self) -> usize {
        self.found.directory * 512
    }

    fn footer(&self) -> usize {
        self.file.len() - 1024
    }

    /// Both of header and footer.
    fn put_twice(&mut self, at: usize, bytes: &[u8]) {
        let footer = self.footer();
        self.put(at, bytes);
        self.put(footer + at, bytes);
    }

    /// Replaces what the descriptor says by something as long.
    fn say(&mut self, from: &str, to: &str) {
        assert_eq!(from.len(), to.len());
        let text = self.file[512..21 * 512].windows(from.len());
        let mut places = text.enumerate().filter(|(_, bytes)| *bytes == from.as_bytes());
        let (at, _) = places.next().unwrap_or_else(|| panic!("{from} is in the descriptor"));
        self.put(512 + at, to.as_bytes());
    }
}

/// The rule that is broken, or what reading fails with; and what breaks it.
type Breach = (&'static str, fn(&mut Good));

/// A breach of each field, and of each rule.
const BREACHES: &[Breach] = &[
    // The header.
    ("magic number", |good| good.put_twice(0, b"k")),
    ("version 3", |good| good.put_twice(4, &[1])),
    ("flag for the line ends", |good| good.put_twice(8, &[0])),
    ("no redundant directory", |good| good.put_twice(8, &[3])),
    ("no redundant directory", |good| good.put_twice(48, &[21])),
    ("flag for compression", |good| good.put_twice(10, &[2])),
    ("flag for markers", |good| good.put_twice(10, &[1])),
    ("no unknown flags", |good| good.put_twice(11, &[1])),
    ("one extent, as long as the capacity", |good| good.put_twice(12, &[1])),
    ("the header cannot be", |good| good.put_twice(17, &[1])),
    ("the header cannot be", |good| good.put_twice(20, &[127])),
    ("the header cannot be", |good| good.put_twice(20, &[8])),
    ("grain of sector", |good| good.put_twice(20, &[64])),
    ("no descriptor", |good| good.put_twice(30, &[99])),
    ("first line of the descriptor", |good| good.put_twice(28, &[2])),
    ("place of the descriptor", |good| good.put_twice(28, &[0])),
    ("descriptor in front of the grains", |good| good.put_twice(36, &[128])),
    ("the header cannot be", |good| good.put_twice(45, &[1])),
    ("closed cleanly", |good| good.put_twice(72, &[1])),
    ("line end characters", |good| good.put_twice(73, b"\r")),
    ("line end characters", |good| good.put_twice(76, b"\r")),
    ("deflate", |good| good.put_twice(77, &[0])),
    ("zeros behind the header", |good| good.put_twice(511, &[1])),
    // Where grains begin: at the first marker.
    ("end-of-stream marker is last", |good| good.put_twice(64, &[127])),
    // The descriptor.
    ("version of the descriptor", |good| good.say("version=1", "version=9")),
    ("content id", |good| good.say("\nCID=", "\nDIC=")),
    ("no parent", |good| good.say("parentCID=f", "parentCID=0")),
    ("type in the descriptor", |good| good.say("streamOptimized", "monolithicSpars")),
    ("one extent, as long as the capacity", |good| good.say("RW ", "R? ")),
    ("one extent, as long as the capacity", |good| good.say("SPARSE", "FLAT  ")),
    ("one extent, as long as the capacity", |good| good.say("d.vmdk", "/.vmdk")),
    ("adapter", |good| good.say("\"ide\"", "\"idf\"")),
    ("version of the hardware", |good| good.say("HWVersion = \"4", "HWVersion = \"0")),
    ("geometry", |good| good.say("cylinders", "cylinderz")),
    ("geometry", |good| good.say("heads = \"1", "heads = \"0")),
    ("geometry", |good| good.say("sectors = \"63", "sectors = \"64")),
    ("each key of the descriptor once", |good| good.say("ddb.toolsVersion", "ddb.adapterType ")),
    ("zeros behind the descriptor", |good| good.flip(21 * 512 - 1)),
    // Grains.
    ("a grain of sector", |good| good.flip(good.grain(0))),
    ("a grain of sector", |good| good.put(good.grain(0) + 7, &[1])),
    ("each grain once", |good| {
        let first = good.file[good.grain(0)..][..8].to_vec();
        good.put(good.grain(1), &first);
    }),
    ("entry leads to its grain", |good| good.put(good.grain(1), &[0, 2])),
    ("does not inflate", |good| good.flip(good.grain(0) + 8)),
    ("does not inflate", |good| good.flip(good.grain(0) + 12)),
    ("does not inflate", |good| good.flip(good.grain(0) + 40)),
    ("zeros behind a grain", |good| good.flip(good.table(1) - 512 - 1)),
    ("end-of-stream marker", |good| good.put(good.grain(0) + 8, &[0; 8])),
    // Tables.
    ("length in a marker", |good| good.flip(good.table(0) - 512)),
    ("a marker of type 9", |good| good.put(good.table(0) - 500, &[9])),
    ("one directory", |good| {
        let (directory, footer) = (good.directory() - 512, good.footer() - 512);
        let again = good.file[directory..footer].to_vec();
        good.file.splice(footer..footer, again);
    }),
    ("zeros behind a marker", |good| good.flip(good.table(0) - 1)),
    ("entry leads to its grain", |good| good.flip(good.table(0))),
    ("each grain has an entry", |good| good.put(good.table(0), &[0; 4])),
    ("entry leads to its grain", |good| {
        let entries = good.file[good.table(0)..][..8].to_vec();
        good.put(good.table(0), &entries[4..]);
        good.put(good.table(0) + 4, &entries[..4]);
    }),
    ("entry leads to its grain", |good| {
        let entry = good.file[good.table(1)..][..4].to_vec();
        // Behind the disk's end.
        good.put(good.table(1) + 2044, &entry);
    }),
    // The directory.
    ("directory in front of the footer", |good| {
        let (directory, footer) = (good.directory() - 512, good.footer() - 512);
        good.file.drain(directory..footer);
    }),
    ("tables have markers", |good| good.flip(good.directory())),
    ("each table is in the directory", |good| good.put(good.directory(), &[0; 4])),
    ("each table once in the directory", |good| {
        let entry = good.file[good.directory()..][..4].to_vec();
        good.put(good.directory() + 4, &entry);
    }),
    ("zeros behind the directory", |good| good.flip(good.directory() + 8)),
    ("a table is cut off", |good| good.put(good.directory(), &[0xff; 4])),
    // The footer and the end.
    ("no footer", |good| {
        let end = good.file.len();
        good.file.drain(end - 1536..end - 512);
    }),
    ("footer names the directory", |good| good.flip(good.footer() + 56)),
    ("place of the directory: at the end", |good| {
        let place = good.file[good.footer() + 56..][..8].to_vec();
        good.put(56, &place);
    }),
    ("footer is as the header", |good| good.flip(good.footer() + 4)),
    ("footer is as the header", |good| good.flip(good.footer() + 12)),
    ("footer in the last but one sector", |good| good.file.extend([0; 512])),
    ("end-of-stream marker is all zeros", |good| good.flip(good.file.len() - 1)),
    ("end-of-stream marker", |good| good.file.truncate(good.file.len() - 512)),
    ("whole sectors", |good| good.file.extend([0])),
    ("one footer", |good| {
        let end = good.file.len();
        let footer = good.file[end - 1536..end - 512].to_vec();
        good.file.splice(end - 512..end - 512, footer);
    }),
    ("grains in front of the directory", |good| {
        let grain = good.file[good.grain(2)..good.directory() - 512].to_vec();
        good.file.splice(good.footer() - 512..good.footer() - 512, grain);
    }),
    ("tables in front of the directory", |good| {
        let table = good.file[good.table(0) - 512..][..5 * 512].to_vec();
        good.file.splice(good.footer() - 512..good.footer() - 512, table);
    }),
];

#[test]
fn each_rule_can_be_broken() {
    let place = Place::new();
    let size = SPAN + 2 * GRAIN;
    let disk = sparse(&mut Random(5), size, &[(0, 2 * GRAIN), (SPAN, GRAIN)]);
    fs::write(place.path("disk"), &disk).expect("a scratch file");
    place.ok(&format!("cowbell {CONVERT} disk d.vmdk"));
    let mut unseen = Vec::new();
    for (i, (name, breach)) in BREACHES.iter().enumerate() {
        let file = read(&place.path("d.vmdk"));
        let mut good = Good { found: stream::read(&file).expect("it is good"), file };
        assert_eq!((good.found.grains.len(), good.found.tables.len()), (3, 2));
        breach(&mut good);
        let (is_seen, why) = match stream::read(&good.file) {
            Ok(found) => (found.broken.contains(name), format!("{:?}", found.broken)),
            Err(why) => (why.contains(name), why),
        };
        if !is_seen {
            unseen.push(format!("number {i}, {name}: {why}"));
        }
    }
    assert!(unseen.is_empty(), "{unseen:#?}");
}
