//! Whatever the bytes of a VDI image: no panic, no hang, bounded memory, and repair converges.
//! Headers that cannot be are refused, and say why.

use std::path::Path;

use crate::common::shadow::Rng;
use crate::common::{MemFile, MemHost};
use cowbell_engine::Engine;
use cowbell_engine::mem::Buf;
use cowbell_engine::step::Io;
use cowbell_engine::sys::clock;
use cowbell_engine::sys::inline::Inline;
use cowbell_formats::check::Repair;
use cowbell_formats::map::{extents, read};
use cowbell_formats::vdi::disk::layout::Header;
use cowbell_formats::vdi::rest::check::check;
use cowbell_formats::vdi::rest::open;
use cowbell_formats::{
    CreateOptions, DiskHost, Error, Format, OpenOptions, RunOptions, attach, create,
};

const SIZE: u64 = 40 << 12;
const MAP: usize = 4096;

fn sound(fixed: bool) -> Vec<u8> {
    let host = MemHost::default();
    let options = CreateOptions {
        size: Some(SIZE),
        cluster_size: Some(4096),
        fixed: Some(fixed),
        ..CreateOptions::default()
    };
    create(&host, Path::new("/a"), Format::Vdi, &options).expect("it is made");
    let mut bytes = host.get("/a").expect("made").bytes();
    // As tight as QEMU makes them: the map at once, then the data.
    let data = Header::parse(&bytes, u64::MAX).expect("sound").data_offset as usize;
    bytes.drain(2 * MAP..data);
    bytes[0x158..0x15c].copy_from_slice(&8192_u32.to_le_bytes());
    if !fixed {
        for (block, index) in [3, 9, 2, 30].into_iter().enumerate() {
            bytes[MAP + index * 4..][..4].copy_from_slice(&(block as u32).to_le_bytes());
            bytes.resize(bytes.len() + 4096, index as u8 | 1);
        }
        bytes[0x184] = 4;
    }
    bytes
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let sound = sound(false);
    let open = |bytes: &[u8]| open::open(&MemFile::new(bytes), false).map(drop);
    assert_eq!(open(&sound), Ok(()));
    let cases: &[(usize, u32, &str)] = &[
        (0x40, 0, "not in VDI format"),
        (0x44, 0x10000, "version 1.0"),
        (0x44, 0x20001, "version 2.1"),
        (0x4c, 0, "type 0"),
        (0x4c, 3, "differencing"),
        (0x4c, 4, "differencing"),
        (0x4c, 5, "type 5"),
        (0x1a8, 1, "link UUID"),
        (0x1b8, 1, "parent UUID"),
        (0x154, 0, "block map offset"),
        (0x154, 4097, "block map offset"),
        (0x154, 8192, "data offset"),
        (0x154, 0xffff_fe00, "cut short"),
        (0x158, 0, "data offset"),
        (0x158, 4096, "data offset"),
        (0x158, 8193, "data offset"),
        (0x168, 4096, "sector size 4096"),
        (0x17c, 512, "extra data"),
        (0x178, 0, "block size 0"),
        (0x178, 512, "block size 512"),
        (0x178, 12288, "block size 12288"),
        (0x178, 1 << 29, "block size 536870912"),
        (0x180, 39, "larger than its block map"),
        (0x180, 1 << 25, "cut short"),
        (0x180, u32::MAX, "too many blocks"),
        (0x174, 1, "larger than its block map"),
        (0x174, u32::MAX, "larger than its block map"),
    ];
    for &(at, value, says) in cases {
        let mut bytes = sound.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let error = open(&bytes).expect_err(says).to_string();
        assert!(error.contains(says), "{at:#x} = {value:#x}: '{error}' says nothing of '{says}'");
    }
    for len in 0..512 {
        assert!(open(&sound[..len]).is_err(), "{len} bytes");
    }
}

fn mutate(bytes: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..1 + rng.below(4) {
        let at = match rng.below(4) {
            0 => 0x40 + rng.below(0x60) as usize * 4,
            _ => MAP + rng.below(40) as usize * 4,
        };
        let value = match rng.below(6) {
            0 => rng.next() as u32,
            1 => 1 << rng.below(32),
            2 => u32::MAX - rng.below(4) as u32,
            _ => rng.below(48) as u32,
        };
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    match rng.below(10) {
        0 => bytes.truncate(rng.below(bytes.len() as u64) as usize),
        1 => bytes.resize(bytes.len() + rng.below(20_000) as usize, 0xee),
        _ => {}
    }
}

/// Opens, maps, reads, checks and repairs; was it taken?
fn torture(bytes: &[u8]) -> bool {
    let host = MemHost::default();
    let file = MemFile::new(bytes);
    host.put("/a", &file);
    let options = OpenOptions { format: Some(Format::Vdi), ..OpenOptions::default() };
    let Ok(chain) = cowbell_formats::open(&host, Path::new("/a"), &options) else {
        assert!(check(&file, Repair::All).is_err(), "what does not open is not repaired");
        return false;
    };
    let size = chain.size();
    for extent in extents(&chain) {
        let Ok(extent) = extent else { break };
        assert!(extent.len > 0 && extent.start + extent.len <= size);
    }
    let contents = |file: &MemFile| -> Vec<Option<Vec<u8>>> {
        host.put("/a", file);
        let chain = cowbell_formats::open(&host, Path::new("/a"), &options).expect("it opened");
        let mut block = vec![0; 512];
        let mut read = |at| match read(&chain, at, &mut block) {
            Ok(()) => Some(block.clone()),
            Err(Error::Corrupt { .. }) => None,
            Err(error) => panic!("{error}"),
        };
        (0..size.min(SIZE) / 512).map(|sector| read(sector * 512)).collect()
    };
    let old = contents(&file);
    check(&file, Repair::None).expect("what opens can be checked");
    let fixed = check(&file, Repair::All).expect("and repaired");
    assert_eq!(fixed.corruptions, 0);
    let again = file.bytes();
    let after = check(&file, Repair::All).expect("it still opens");
    assert_eq!((after.corruptions_fixed, after.leaks_fixed), (0, 0));
    assert!(again == file.bytes(), "a second repair changes nothing");
    for (old, new) in old.iter().zip(contents(&file)) {
        assert!(new.is_some() && (old.is_none() || *old == new), "what could be read stays");
    }
    true
}

#[test]
fn at_rest() {
    let mut rng = Rng(77);
    let mut taken = 0;
    for n in 0..1500 {
        let mut bytes = sound(n % 4 == 0);
        mutate(&mut bytes, &mut rng);
        taken += u32::from(torture(&bytes));
    }
    assert!((300..1500).contains(&taken), "{taken} were taken");
}

#[test]
fn at_work() {
    let mut rng = Rng(78);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let path = folder.path().join("a");
    let mut failed = 0;
    for n in 0..300 {
        let mut bytes = sound(n % 4 == 0);
        mutate(&mut bytes, &mut rng);
        std::fs::write(&path, &bytes).expect("written");
        let format = Some(Format::Vdi);
        let options = OpenOptions { format, write: true, ..OpenOptions::default() };
        let host = DiskHost { direct: false };
        let Ok(chain) = cowbell_formats::open(&host, &path, &options) else { continue };
        let size = chain.size();
        let mut engine = Engine::new(Inline::new(), Default::default());
        let disk = attach(&mut engine, chain, &RunOptions::default()).expect("it attaches");
        for tag in 0..24 {
            let len = 512 + rng.below(9000).min(size.saturating_sub(512));
            if len > size {
                break;
            }
            let offset = rng.below(size - len + 1);
            let io = if tag % 3 == 0 { Io::read(offset, len) } else { Io::write(offset, len) };
            engine.submit(disk, io, Buf::zeroed(len as usize), tag).expect("there is room");
            engine.run(clock());
            while let Some(done) = engine.poll() {
                failed += u32::from(done.result.is_err());
            }
        }
        engine.drain();
        while engine.drained().is_none() {
            engine.run(clock());
        }
        drop(engine);
        let file = MemFile::new(&std::fs::read(&path).expect("there"));
        check(&file, Repair::All).expect("it can still be checked");
    }
    assert!(failed > 10, "{failed} requests met a bad entry");
}
