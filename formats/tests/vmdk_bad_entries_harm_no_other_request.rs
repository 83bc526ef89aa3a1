//! An entry of a grain table that leads past the file's end fails what comes upon it and nothing
//! else: not other requests under the same table, not flushes, not later sessions. And it does not
//! come to lead to what is allocated later.

mod common;

use std::fs::OpenOptions as File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::drive::{add, folder, make_with, settle};
use cowbell_engine::Engine;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::clock;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, NodeId};
use cowbell_formats::vmdk::layout::{Header, SECTOR};
use cowbell_formats::{CreateOptions, Format, Node};

const GRAIN: u64 = 64 << 10;
/// The grain whose entry is bad.
const BAD: u64 = 5;

/// Makes `BAD`'s entry lead `sectors` behind the file's end.
fn spoil(path: &Path, sectors: u64) {
    let file = File::new().read(true).write(true).open(path).expect("it is there");
    let mut first = [0; SECTOR as usize];
    file.read_exact_at(&mut first, 0).expect("a header");
    let header = Header::parse(&first).expect("sound");
    let end = file.metadata().expect("a file").len() / SECTOR;
    for directory in [header.directory_at, header.redundant_at] {
        let mut table = [0; 4];
        file.read_exact_at(&mut table, directory * SECTOR).expect("a directory");
        let at = u64::from(u32::from_le_bytes(table)) * SECTOR + BAD * 4;
        file.write_all_at(&((end + sectors) as u32).to_le_bytes(), at).expect("it is written");
    }
}

fn one(engine: &mut Engine<Node, Inline>, disk: NodeId, io: Io, mem: Mem) -> Result<Mem, Errno> {
    engine.submit(disk, io, mem, 0).expect("there is room");
    let done = settle(engine).remove(0);
    done.result.map(|()| done.mem)
}

fn filled(byte: u8) -> Mem {
    let mut buf = Buf::zeroed(GRAIN as usize);
    buf.fill(byte);
    buf.into()
}

#[test]
fn a_bad_entry_fails_its_own_requests_only() {
    for sectors in [0, 1, 128, 256, 1 << 30] {
        let folder = folder();
        let path = folder.path().join("disk.vmdk");
        let options = CreateOptions { size: Some(64 << 20), ..CreateOptions::default() };
        make_with(&path, Format::Vmdk, &options);
        spoil(&path, sectors);
        for session in 0..2 {
            let mut engine = Engine::new(Inline::new(), Default::default());
            let disk = add(&mut engine, &path, Format::Vmdk, false);
            for turn in 0..8 {
                let fill = 1 + turn + 8 * session;
                let at = (u64::from(fill) + BAD) * GRAIN;
                let bad = |io| one(&mut engine, disk, io, filled(0xbd)).map(drop);
                let said = [Io::read(BAD * GRAIN, GRAIN), Io::write(BAD * GRAIN, GRAIN)].map(bad);
                let whole = format!("{sectors} sectors, session {session}, turn {turn}");
                assert_eq!(said, [Err(Errno::IO); 2], "{whole}");
                let write = Io::write(at, GRAIN);
                assert!(one(&mut engine, disk, write, filled(fill)).is_ok(), "{whole}");
                assert!(one(&mut engine, disk, Io::flush(), Mem::None).is_ok(), "{whole}");
                let read = one(&mut engine, disk, Io::read(at, GRAIN), filled(0)).expect("read");
                let buf = read.into_buf().expect("reads own a buffer");
                assert!(buf.iter().all(|&byte| byte == fill), "{whole}");
            }
            engine.drain();
            while engine.drained().is_none() {
                engine.run(clock());
            }
            // All is written, and yet the image is not sound.
            assert_eq!(engine.drained(), Some(Err(Errno::IO)));
        }
    }
}
