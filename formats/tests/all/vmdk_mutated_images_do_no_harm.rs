//! Whatever the bytes of a VMDK image: no panic, no hang, bounded memory, and repair converges.
//!
//! `COWBELL_FUZZ_RUNS` says how many images; a million take some minutes.

use std::path::Path;

use crate::common::{MemFile, MemHost};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::Errno;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::chain::{open_layer, open_whole_layer};
use cowbell_formats::check::Repair;
use cowbell_formats::info::info_of;
use cowbell_formats::map::{extents, read};
use cowbell_formats::vmdk::disk::descriptor::{Descriptor, Kind};
use cowbell_formats::vmdk::disk::grain;
use cowbell_formats::vmdk::disk::layout::end_of_stream;
use cowbell_formats::vmdk::disk::layout::{Header, SECTOR};
use cowbell_formats::vmdk::rest::check::check;
use cowbell_formats::vmdk::rest::create::{Options, write_file};
use cowbell_formats::vmdk::rest::open::open as open_image;
use cowbell_formats::{DiskHost, Error, OpenOptions, Policy, RunOptions, attach, open};

const SIZE: u64 = 3 << 20;

/// The files of an image, its own last.
type Files = Vec<(String, Vec<u8>)>;

fn make(options: &Options) -> Files {
    let file = |(i, name): (usize, &Vec<u8>)| {
        let file = MemFile::new(&[]);
        write_file(&file, options, i).expect("memory");
        (String::from_utf8_lossy(name).into_owned(), file.bytes())
    };
    options.files().iter().enumerate().map(file).collect()
}

/// Puts a few grains of data into a sparse image.
fn fill(bytes: &mut Vec<u8>) {
    let header = Header::parse(bytes).expect("sound");
    for (i, (table, entry)) in [(0, 0), (0, 1), (0, 9), (1, 3)].into_iter().enumerate() {
        let grain = header.overhead + i as u64 * (header.grain_size() / SECTOR);
        for directory in [header.directory_at, header.redundant_at] {
            let at = (directory * SECTOR + table * 4) as usize;
            let gt = u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
            let at = (u64::from(gt) * SECTOR + entry * 4) as usize;
            bytes[at..at + 4].copy_from_slice(&(grain as u32).to_le_bytes());
        }
        bytes.resize(((grain * SECTOR) + header.grain_size()) as usize, 7);
    }
}

/// A stream with two grains.
fn stream() -> Files {
    let options = Options {
        grain_bits: 12,
        table_bits: 7,
        ..Options::new(Kind::StreamOptimized, b"top.vmdk", SIZE, 5)
    };
    let mut files = make(&options);
    let bytes = &mut files[0].1;
    let header = Header::parse(bytes).expect("sound");
    bytes.truncate((header.overhead * SECTOR) as usize);
    let table_at = header.overhead;
    bytes.resize(bytes.len() + header.table_bytes() as usize, 0);
    for i in 0..2u64 {
        let place = bytes.len() as u64 / SECTOR;
        let at = (table_at * SECTOR + i * 4) as usize;
        bytes[at..at + 4].copy_from_slice(&(place as u32).to_le_bytes());
        let mut packed = vec![0; grain::size_max(4096) as usize];
        grain::deflate(&[9; 4096], &mut packed).expect("there is room");
        packed[..8].copy_from_slice(&(i * 8).to_le_bytes());
        let len = grain::marked_len(&packed, i * 8, 4096).expect("it is marked");
        bytes.extend_from_slice(&packed[..len.next_multiple_of(SECTOR) as usize]);
    }
    let mut directory = vec![0; 128];
    directory[0] = table_at as u32;
    let end = end_of_stream(&header, bytes.len() as u64 / SECTOR, &directory);
    bytes.extend_from_slice(&end);
    files
}

fn sound() -> Vec<Files> {
    let small = |kind, zeroed_grain| Options {
        grain_bits: 12,
        table_bits: 7,
        zeroed_grain,
        ..Options::new(kind, b"top.vmdk", SIZE, 0x1234_5678)
    };
    let mut sparse = make(&small(Kind::MonolithicSparse, true));
    fill(&mut sparse[0].1);
    let split = Options {
        sizes: Some(vec![1 << 20, SIZE - (1 << 20)]),
        ..small(Kind::TwoGbMaxExtentSparse, false)
    };
    let mut split = make(&split);
    fill(&mut split[1].1);
    vec![sparse, split, make(&small(Kind::MonolithicFlat, false)), stream()]
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn nasty(&mut self) -> u64 {
        let small = self.below(256);
        match self.below(8) {
            0 => small,
            1 => small * 128,
            2 => 1 << (small % 64),
            3 => (1u64 << (small % 64)).wrapping_sub(1),
            4 => u64::MAX - small,
            5 => self.next(),
            _ => small % 24,
        }
    }
}

/// Changes a few numbers, or bytes of text.
fn mutate(bytes: &mut Vec<u8>, rng: &mut Rng) {
    if bytes.is_empty() {
        return;
    }
    let is_text = bytes[0] == b'#';
    for _ in 0..1 + rng.below(3) {
        let len = bytes.len() as u64;
        let at = match rng.below(6) {
            0..=2 if !is_text => rng.below(20) * 4,
            3 => SECTOR + rng.below(400),
            4 => len.saturating_sub(1 + rng.below(2048)),
            _ => rng.below(len.min(40_000)),
        };
        let at = at.min(len - 1) as usize;
        let value = rng.nasty().to_le_bytes();
        let count = [1, 4, 8][rng.below(3) as usize].min(bytes.len() - at);
        if is_text || rng.below(4) == 0 {
            let texts =
                [&b"\""[..], b"\n", b"0", b"99999999999999999999", b"-1", b"=", b"RW 1 FLAT"];
            let text = texts[rng.below(texts.len() as u64) as usize];
            let end = (at + count).min(bytes.len());
            bytes.splice(at..end, text.iter().copied());
        } else {
            bytes[at..at + count].copy_from_slice(&value[..count]);
        }
    }
    match rng.below(16) {
        0 => bytes.truncate(rng.below(bytes.len() as u64 + 1) as usize),
        1 => bytes.truncate(bytes.len().saturating_sub(512)),
        _ => {}
    }
}

/// Opens, maps, reads, checks and repairs; asserts what has to hold of anything.
fn torture(host: &MemHost) {
    let path = Path::new("top.vmdk");
    let options = OpenOptions {
        format: Some(cowbell_formats::Format::Vmdk),
        backing: Policy::SameDirectory,
        files: Policy::Any,
        ..OpenOptions::default()
    };
    if let Ok(layer) = open_layer(host, path, &options) {
        info_of(&layer).expect("what opens can be described");
    }
    if let Ok(chain) = open(host, path, &options) {
        let size = chain.size();
        for extent in extents(&chain).take(16) {
            let Ok(extent) = extent else { break };
            assert!(extent.len > 0 && extent.start + extent.len <= size);
        }
        let mut buf = [0; 5000];
        for at in [0, 4096, 1 << 20, size / 2, size.saturating_sub(5000)] {
            let inside = at.checked_add(5000).is_some_and(|end| end <= size);
            match read(&chain, at, &mut buf) {
                Ok(()) => assert!(inside),
                Err(Error::Invalid(_)) => assert!(!inside),
                Err(error) => assert!(matches!(error, Error::Corrupt { .. }), "{error}"),
            }
        }
    }
    let options = OpenOptions { write: true, ..options };
    let check_it = |repair| {
        let layer = open_whole_layer(host, path, &options).ok()?;
        Some(check(&layer, repair).expect("what opens can be checked"))
    };
    let Some(before) = check_it(Repair::None) else { return };
    let after = check_it(Repair::All).expect("it still opens");
    // A table that comes back may bring grains that are in use.
    let brought = after.corruptions_fixed * 512;
    assert!(after.corruptions <= before.corruptions + brought, "{before:?} {after:?}");
    let Some(again) = check_it(Repair::All) else { return };
    let last = check_it(Repair::All).expect("it still opens");
    assert_eq!((last.corruptions_fixed, last.stale_fixed), (0, 0), "{again:?} {last:?}");
}

fn runs(default: u64) -> u64 {
    std::env::var("COWBELL_FUZZ_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

#[test]
fn twenty_thousand_mutated_images() {
    let images = sound();
    let mut rng = Rng(0x5eed);
    for run in 0..runs(20_000) {
        let host = MemHost::default();
        let image = &images[rng.below(images.len() as u64) as usize];
        let victim = rng.below(image.len() as u64) as usize;
        for (i, (name, bytes)) in image.iter().enumerate() {
            let mut bytes = bytes.clone();
            if i == victim && run >= 4 {
                mutate(&mut bytes, &mut rng);
            }
            host.put(name, &MemFile::new(&bytes));
        }
        torture(&host);
    }
}

/// A few requests through the driver; how they end is not looked at, only that they do.
fn run_it(folder: &Path) {
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    let path = folder.join("top.vmdk");
    let Ok(chain) = open(&DiskHost::default(), &path, &options) else { return };
    let size = chain.size();
    let mut engine = Engine::new(Inline::new(), Limits::default());
    let disk = attach(&mut engine, chain, &RunOptions::default()).expect("it attaches");
    for at in [0, 4096 * 9, (1 << 20) - 2048, size / 2, size.saturating_sub(8192)] {
        let at = at & !511;
        let zero = Io { kind: IoKind::Zero { unmap: true, fua: false }, offset: at, len: 8192 };
        for (io, mem) in [
            (Io::read(at, 8192), Buf::zeroed(8192).into()),
            (Io::write(at, 8192), Buf::zeroed(8192).into()),
            (zero, Mem::None),
            (Io::read(at, 8192), Buf::zeroed(8192).into()),
            (Io::flush(), Mem::None),
        ] {
            engine.submit(disk, io, mem, 0).expect("there is room");
        }
    }
    engine.drain();
    for _ in 0..10_000 {
        engine.run(clock());
        while let Some(done) = engine.poll() {
            assert_ne!(done.result, Err(Errno::AGAIN));
        }
        if engine.drained().is_some() {
            engine.assert_idle();
            return;
        }
    }
    panic!("it never ends: {engine:?}");
}

#[test]
fn a_thousand_mutated_images_run() {
    let images = sound();
    let folder = tempfile::tempdir().expect("a folder");
    let mut rng = Rng(0xd15c);
    for _ in 0..runs(20_000) / 20 {
        let image = &images[rng.below(images.len() as u64) as usize];
        let victim = rng.below(image.len() as u64) as usize;
        for (i, (name, bytes)) in image.iter().enumerate() {
            let mut bytes = bytes.clone();
            if i == victim {
                mutate(&mut bytes, &mut rng);
            }
            std::fs::write(folder.path().join(name), bytes).expect("written");
        }
        run_it(folder.path());
    }
}

#[test]
fn parsers_take_anything() {
    let mut rng = Rng(7);
    for _ in 0..runs(20_000) {
        let bytes: Vec<u8> = (0..rng.below(700)).map(|_| rng.next() as u8).collect();
        let _ = Header::parse(&bytes);
        let _ = Descriptor::parse(&bytes);
        let _ = open_image(&MemFile::new(&bytes));
        let mut out = [0; 4096];
        let _ = grain::inflate_last(&bytes, &mut out);
    }
}
