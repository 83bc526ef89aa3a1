//! Whatever the bytes of an image: no panic, no hang, bounded memory, and repair converges.

use std::path::Path;

use crate::common::{MemFile, MemHost, add_data, add_l2, small_qed};
use cowbell_engine::store::Store;
use cowbell_formats::create::{CreateOptions, parse_size};
use cowbell_formats::map::{extents, read, status};
use cowbell_formats::probe::probe;
use cowbell_formats::qed::disk::layout::{Bounds, Entry, HEADER_BLOCK, Header};
use cowbell_formats::qed::rest::check::{Repair, check};
use cowbell_formats::{Error, Format, OpenOptions, Policy, open};
use quickcheck::{Arbitrary, Gen, QuickCheck};

/// Numbers that break things, and some at random.
#[derive(Clone, Copy, Debug)]
struct Nasty(u64);

impl Nasty {
    fn pick(random: u64) -> u64 {
        let small = random >> 8 & 0xff;
        match random % 8 {
            0 => small,
            1 => small * 4096,
            2 => small * 512,
            3 => 1 << (small % 64),
            4 => (1u64 << (small % 64)).wrapping_sub(1 + (random >> 16 & 1)),
            5 => u64::MAX - small * 512,
            6 => random.rotate_left(7),
            _ => (small % 16) * 4096,
        }
    }
}

impl Arbitrary for Nasty {
    fn arbitrary(g: &mut Gen) -> Nasty {
        Nasty(Nasty::pick(u64::arbitrary(g)))
    }
}

/// Eight clusters of a sound image: header, L1, two L2 tables, data.
fn sound() -> MemFile {
    let file = small_qed(4 << 20, Some(("base", true)));
    let first = add_l2(&file, 0);
    let second = add_l2(&file, 1);
    for (i, l2) in [(0, first), (1, first), (5, second), (3, first)] {
        add_data(&file, l2, i, 7);
    }
    file.poke_u64(second + 8, 1);
    file
}

/// Where a mutation hits: the header's fields, the start of a table, or anywhere.
fn place(random: u64) -> u64 {
    let slot = random >> 4 & 0xff;
    match random % 8 {
        0..=2 => slot % 16 * 4,
        3 => 4096 + slot % 16 * 8,
        4 | 5 => 8192 + slot % 64 * 8,
        6 => 12288 + slot % 64 * 8,
        _ => (random >> 12) % (8 * 4096),
    }
}

/// Opens, maps, reads, checks and repairs; asserts what has to hold of anything.
fn torture(host: &MemHost, file: &MemFile) {
    host.put("top", file);
    let mut options = OpenOptions {
        format: Some(Format::Qed),
        backing: Policy::SameDirectory,
        ..Default::default()
    };
    let path = Path::new("top");
    if let Ok(chain) = open(host, path, &options) {
        let size = chain.size();
        let mut at = 0;
        for extent in extents(&chain).take(16) {
            let Ok(extent) = extent else { break };
            assert!(extent.start == at && extent.len > 0);
            at += extent.len;
            assert!(at <= size);
        }
        let mut buf = [0; 1000];
        for at in [0, 1, 4000, 2 << 20, size / 2, size.saturating_sub(1000), size, u64::MAX] {
            let inside = at.checked_add(1000).is_some_and(|end| end <= size);
            match read(&chain, at, &mut buf) {
                Ok(()) => assert!(inside),
                Err(Error::Invalid(_)) => assert!(!inside),
                Err(error) => assert!(matches!(error, Error::Corrupt { .. }), "{error}"),
            }
            if let Ok(extent) = status(&chain, at, 5000) {
                assert!((1..=5000).contains(&extent.len) && at < size);
            }
        }
    }
    let Ok(before) = check(file, Repair::None) else { return };
    let after = check(file, Repair::All).expect("what can be checked can be repaired");
    assert_eq!(after.corruptions + after.corruptions_fixed, before.corruptions);
    let again = check(file, Repair::All).expect("and checked again");
    assert_eq!((again.corruptions_fixed, again.leaks_fixed), (0, 0));
    assert_eq!((again.corruptions, again.leaks), (after.corruptions, after.leaks));
    options.write = true;
    match open(host, path, &options) {
        Ok(chain) => {
            for extent in extents(&chain).take(16) {
                assert!(extent.is_ok() || !again.is_sound(), "{extent:?}");
            }
        }
        Err(error) => assert!(!again.is_sound() || !matches!(error, Error::Io { .. }), "{error}"),
    }
}

#[test]
fn two_hundred_thousand_mutated_images() {
    let host = MemHost::default();
    host.put("base", &MemFile::new(&[3; 5000]));
    let template = sound();
    torture(&host, &MemFile::new(&template.bytes()));
    let snapshot = template.inner().clone();
    let mut random = 0x5eed_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    let file = MemFile::new(&[]);
    for _ in 0..200_000 {
        file.inner().clone_from(&snapshot);
        for _ in 0..1 + next() % 3 {
            let value = Nasty::pick(next());
            let at = place(next());
            if next() % 2 == 0 { file.poke_u64(at, value) } else { file.poke_u32(at, value as u32) }
        }
        match next() % 16 {
            0 => file.set_len(Nasty::pick(next()) >> 1).expect("memory"),
            1 => file.set_len(next() % 40_000).expect("memory"),
            _ => {}
        }
        torture(&host, &file);
    }
}

#[test]
fn a_header_that_parses_survives_encoding() {
    fn holds(pokes: Vec<(u8, Nasty)>, junk: Vec<u8>, len: Nasty) -> bool {
        let mut block = small_qed(1 << 20, None).bytes();
        block.truncate(HEADER_BLOCK);
        for (at, Nasty(value)) in pokes {
            let at = usize::from(at) % 14 * 4;
            block[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        for (index, byte) in junk.into_iter().enumerate() {
            block[64 + index * 37 % 4000] = byte;
        }
        match Header::parse(&block, len.0.max(8192)) {
            Ok(header) => {
                let again = Header::parse(&header.encode(), len.0.max(8192));
                header.encode()[..] == block[..] && again == Ok(header)
            }
            Err(_) => true,
        }
    }
    QuickCheck::new().tests(20_000).quickcheck(holds as fn(_, _, _) -> _);
}

#[test]
fn any_first_bytes_are_parsed_or_refused() {
    fn holds(bytes: Vec<u8>, len: u64, magic: bool) -> bool {
        let mut bytes = bytes;
        if magic {
            bytes.splice(0..bytes.len().min(4), *b"QED\0");
        }
        probe(&bytes);
        Header::parse(&bytes, len).is_err() || bytes.len() >= 64
    }
    QuickCheck::new().tests(20_000).quickcheck(holds as fn(_, _, _) -> _);
}

#[test]
fn a_valid_entry_points_at_whole_clusters_of_the_file() {
    fn holds(raw: Nasty, header: Nasty, file: Nasty, cluster: u8, table: u8) -> bool {
        let geometry = cowbell_formats::qed::disk::layout::Geometry::new(
            1 << (12 + cluster % 15),
            1 << (table % 5),
        )
        .expect("legal");
        let bounds = Bounds { geometry, header_bytes: header.0, file_len: file.0 };
        let fits = |at: u64, len: u64| {
            at.is_multiple_of(geometry.cluster_size())
                && at >= header.0
                && u128::from(at) + u128::from(len) <= u128::from(file.0)
        };
        let l2 = match bounds.l2_entry(raw.0) {
            Some(entry @ Entry::Data(at)) => {
                entry.encode() == raw.0 && fits(at.0, geometry.cluster_size())
            }
            Some(entry) => entry.encode() == raw.0 && raw.0 < 2,
            None => raw.0 > 1 && !fits(raw.0, geometry.cluster_size()),
        };
        let l1 = match bounds.l1_entry(raw.0) {
            Some(Some(at)) => fits(at.0, geometry.table_bytes()),
            Some(None) => raw.0 == 0,
            None => !fits(raw.0, geometry.table_bytes()),
        };
        l1 && l2
    }
    QuickCheck::new().tests(50_000).quickcheck(holds as fn(_, _, _, _, _) -> _);
}

#[test]
fn any_option_text_is_parsed_or_refused() {
    fn holds(text: String, digits: u64, suffix: char) -> bool {
        let _ = parse_size(&text);
        let _ = parse_size(&format!("{digits}.{digits}{suffix}"));
        let _ = CreateOptions::default().parse(Format::Qed, &text);
        let _ = CreateOptions::default().parse(Format::Qed, &format!("size={text}"));
        parse_size(&digits.to_string()) == Ok(digits)
    }
    QuickCheck::new().tests(20_000).quickcheck(holds as fn(_, _, _) -> _);
}
