//! VDI images with something wrong: what the check counts, what a repair makes of it, and what a
//! guest gets before that.

use std::path::Path;

use crate::common::drive::{add, folder, settle};
use crate::common::{MemFile, MemHost, have_qemu, run};
use cowbell_engine::backend::Backend;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::store::Store;
use cowbell_engine::sys::clock;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, NodeId};
use cowbell_engine::{Engine, NodeEvent};
use cowbell_formats::check::Repair;
use cowbell_formats::vdi::disk::layout::{UNALLOCATED, ZERO};
use cowbell_formats::vdi::rest::check::check;
use cowbell_formats::vdi::rest::open::open;
use cowbell_formats::{CreateOptions, Format, Node, OpenOptions, create, map};

const BLOCK: u64 = 1 << 20;
const MAP: u64 = 4096;
const COUNT: u64 = 0x184;

/// An image of ten blocks, of which these have data: so many blocks each is of its number plus 1.
fn image(mapped: &[u64]) -> MemFile {
    let host = MemHost::default();
    let options = CreateOptions { size: Some(10 * BLOCK), ..CreateOptions::default() };
    create(&host, Path::new("/a"), Format::Vdi, &options).expect("it is made");
    let file = host.get("/a").expect("made");
    let data = open(&file, false).expect("sound").header.data_offset;
    for (block, &index) in (0..).zip(mapped) {
        file.poke_u32(MAP + index * 4, block);
        let bytes = vec![index as u8 + 1; BLOCK as usize];
        file.write_at(data + u64::from(block) * BLOCK, &bytes).expect("memory");
    }
    file.poke_u32(COUNT, mapped.len() as u32);
    file
}

/// The first byte of each block; `None` where it cannot be read.
fn bytes(file: &MemFile) -> Vec<Option<u8>> {
    let host = MemHost::default();
    host.put("/a", file);
    let options = OpenOptions { format: Some(Format::Vdi), ..OpenOptions::default() };
    let chain = cowbell_formats::open(&host, Path::new("/a"), &options).expect("it opens");
    let mut block = vec![0; BLOCK as usize];
    let mut first = |index| {
        map::read(&chain, index * BLOCK, &mut block).ok()?;
        assert!(block.iter().all(|&byte| byte == block[0]), "block {index} is of one kind");
        Some(block[0])
    };
    (0..10).map(&mut first).collect()
}

/// Errors and leaks that a check finds; and after a repair of `what`.
fn counts(file: &MemFile, what: Repair) -> [(u64, u64); 2] {
    let found = check(file, Repair::None).expect("checked");
    let fixed = check(file, what).expect("repaired");
    assert_eq!(fixed.corruptions + fixed.corruptions_fixed, found.corruptions);
    let after = check(file, Repair::None).expect("checked");
    assert_eq!((after.corruptions, after.leaks), (fixed.corruptions, fixed.leaks));
    [found, after].map(|report| (report.corruptions, report.leaks))
}

/// QEMU finds nothing wrong, if it is here.
fn qemu_agrees(file: &MemFile) {
    if have_qemu() {
        let folder = folder();
        std::fs::write(folder.path().join("a"), file.bytes()).expect("written");
        assert!(run(folder.path(), "qemu-img check -f vdi a").status.success());
    }
}

/// QEMU takes the count for the next free block, and would give a block away a second time.
#[test]
fn an_open_for_writing_raises_a_count_that_is_too_low() {
    let file = image(&[3, 0, 9]);
    let counted = |file: &MemFile| open(file, false).expect("sound").header.allocated;
    file.poke_u32(COUNT, 1);
    assert_eq!(counted(&file), 1, "a reader changes nothing");
    open(&file, true).expect("it opens");
    assert_eq!(counted(&file), 3);
    assert_eq!(bytes(&file)[9], Some(10));
    qemu_agrees(&file);
}

#[test]
fn nothing_is_wrong_with_a_sound_one() {
    let file = image(&[3, 0, 9]);
    file.poke_u32(MAP + 5 * 4, ZERO);
    let writes = file.inner().writes;
    assert_eq!(counts(&file, Repair::All), [(0, 0); 2]);
    assert_eq!(file.inner().writes, writes, "a sound one is not written");
    let mut expected = [Some(0); 10];
    for index in [3, 0, 9] {
        expected[index] = Some(index as u8 + 1);
    }
    assert_eq!(bytes(&file), expected);
    qemu_agrees(&file);
}

#[test]
fn leaks_at_the_end_are_cut_off() {
    let file = image(&[1, 2, 4, 6]);
    for index in [4, 6] {
        file.poke_u32(MAP + index * 4, UNALLOCATED);
    }
    let before = bytes(&file);
    assert_eq!(counts(&file, Repair::Leaks), [(0, 2), (0, 0)]);
    assert_eq!(bytes(&file), before);
    assert_eq!(file.bytes().len() as u64, 3 * BLOCK, "map and data");
    qemu_agrees(&file);
}

#[test]
fn leaks_between_blocks_stay_and_are_used_next() {
    let file = image(&[1, 2, 4, 6]);
    file.poke_u32(MAP + 4, UNALLOCATED);
    assert_eq!(counts(&file, Repair::All), [(0, 1); 2]);
    let folder = folder();
    let path = folder.path().join("a");
    std::fs::write(&path, file.bytes()).expect("written");
    let mut engine = Engine::new(Inline::new(), Default::default());
    let disk = add(&mut engine, &path, Format::Vdi, false);
    assert!(one(&mut engine, disk, Io::write(8 * BLOCK + 5, 3), vec![7; 3]).is_ok());
    let block = one(&mut engine, disk, Io::read(8 * BLOCK, BLOCK), vec![1; BLOCK as usize]);
    let mut expected = vec![0; BLOCK as usize];
    expected[5..8].fill(7);
    assert!(block.expect("read") == expected, "zeros around what was written");
    assert_eq!(drain(&mut engine), Ok(()));
    drop(engine);
    let file = MemFile::new(&std::fs::read(&path).expect("there"));
    assert_eq!(counts(&file, Repair::None), [(0, 0); 2]);
    qemu_agrees(&file);
}

#[test]
fn a_wrong_count_is_put_right() {
    for (count, found) in [(0, (1, 0)), (2, (1, 0)), (4, (0, 1)), (1000, (0, 997))] {
        let file = image(&[1, 2, 4]);
        file.poke_u32(COUNT, count);
        let before = bytes(&file);
        assert_eq!(counts(&file, Repair::All), [found, (0, 0)], "count {count}");
        assert_eq!(bytes(&file), before);
        qemu_agrees(&file);
    }
}

#[test]
fn an_entry_past_the_end_becomes_zeros() {
    for bad in [3, 9, 10, 1 << 20, 0xffff_fffd] {
        let file = image(&[1, 2, 4]);
        file.poke_u32(MAP + 7 * 4, bad);
        let mut expected = bytes(&file);
        assert_eq!(expected[7], None, "entry {bad}");
        assert_eq!(counts(&file, Repair::Leaks), [(1, 0); 2]);
        assert_eq!(counts(&file, Repair::All), [(1, 0), (0, 0)], "entry {bad}");
        expected[7] = Some(0);
        assert_eq!(bytes(&file), expected);
        qemu_agrees(&file);
    }
}

#[test]
fn a_block_named_twice_becomes_two() {
    let file = image(&[1, 2, 4]);
    for index in [0, 7, 9] {
        file.poke_u32(MAP + index * 4, 1);
    }
    let mut expected = bytes(&file);
    assert_eq!([0, 2, 7, 9].map(|index| expected[index]), [None; 4]);
    assert_eq!(counts(&file, Repair::All), [(3, 0), (0, 0)]);
    for index in [0, 2, 7, 9] {
        expected[index] = Some(3);
    }
    assert_eq!(bytes(&file), expected);
    qemu_agrees(&file);
}

#[test]
fn a_full_map_of_one_block_becomes_one_of_ten() {
    let file = image(&[4]);
    for index in 0..10 {
        file.poke_u32(MAP + index * 4, 0);
    }
    assert_eq!(counts(&file, Repair::All), [(9, 0), (0, 0)]);
    assert_eq!(bytes(&file), [Some(5); 10]);
    qemu_agrees(&file);
}

fn one<B: Backend>(
    engine: &mut Engine<Node, B>,
    disk: NodeId,
    io: Io,
    bytes: Vec<u8>,
) -> Result<Vec<u8>, Errno> {
    let mem: Mem = if bytes.is_empty() { Mem::None } else { Buf::copied(&bytes).into() };
    engine.submit(disk, io, mem, 0).expect("there is room");
    let done = settle(engine).remove(0);
    done.result.map(|()| done.mem.into_buf().map(|buf| buf.to_vec()).unwrap_or_default())
}

fn drain<B: Backend>(engine: &mut Engine<Node, B>) -> Result<(), Errno> {
    engine.drain();
    while engine.drained().is_none() {
        engine.run(clock());
    }
    engine.drained().expect("it is")
}

/// Whoever needs a bad entry gets EIO, and others do not; also when the file has grown over the
/// place that it names, and in the next session.
#[test]
fn bad_entries_fail_those_who_need_them_and_stay_bad() {
    for (name, bad) in [("past the end", 4), ("far past it", 9), ("named twice", 1)] {
        let file = image(&[1, 2, 4]);
        file.poke_u32(MAP + 7 * 4, bad);
        let folder = folder();
        let path = folder.path().join("a");
        std::fs::write(&path, file.bytes()).expect("written");
        for session in 0..2 {
            let mut engine = Engine::new(Inline::new(), Default::default());
            let disk = add(&mut engine, &path, Format::Vdi, false);
            for index in [0, 3, 5, 6, 8, 9] {
                let fill = vec![index as u8 + 20 + session; 4096];
                let at = index * BLOCK;
                assert!(one(&mut engine, disk, Io::write(at, 4096), fill.clone()).is_ok());
                let read = one(&mut engine, disk, Io::read(at, 4096), vec![0; 4096]);
                assert!(read.expect("sound") == fill, "{name}, block {index}");
                for io in [Io::read(7 * BLOCK, 512), Io::write(7 * BLOCK, 512)] {
                    let answer = one(&mut engine, disk, io, vec![0; 512]);
                    assert_eq!(answer, Err(Errno::IO), "{name}, session {session}, {index}");
                }
            }
            assert!(one(&mut engine, disk, Io::flush(), Vec::new()).is_ok());
            let event = engine.poll_event();
            let told = matches!(event, Some(NodeEvent::Corrupt { at, .. }) if at == MAP + 7 * 4);
            assert!(told, "{event:?}");
            assert_eq!(drain(&mut engine), Err(Errno::IO), "{name}: it is not sound");
        }
    }
}
