//! A file system's block may be larger than the sectors that direct I/O takes. Zeroing, discarding
//! or cutting off a part of it harms neither the writes to the rest of it nor the flush after them.

use crate::common::drive::{add, drain, folder, settle};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::units::NodeId;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{Format, Node};

const SECTOR: u64 = 512;
/// Sectors of the disk: a few blocks of any file system.
const SECTORS: u64 = 64;
const ROUNDS: u64 = 200;

struct Rig {
    engine: Engine<Node, Aio>,
    disk: NodeId,
    shadow: Vec<u8>,
}

impl Rig {
    fn submit(&mut self, kind: IoKind, sector: u64, count: u64, mem: Mem) {
        let io = Io { kind, offset: sector * SECTOR, len: count * SECTOR };
        self.engine.submit(self.disk, io, mem, sector).expect("there is room");
        self.engine.run(clock());
    }

    fn write(&mut self, sector: u64, byte: u8, fua: bool) {
        self.of(sector).fill(byte);
        let data = Buf::copied(&[byte; SECTOR as usize]);
        self.submit(IoKind::Write { fua, compressed: false }, sector, 1, data.into());
    }

    fn of(&mut self, sector: u64) -> &mut [u8] {
        &mut self.shadow[(sector * SECTOR) as usize..][..SECTOR as usize]
    }

    fn flush(&mut self) {
        self.submit(IoKind::Flush, 0, 0, Mem::None);
        for done in settle(&mut self.engine) {
            assert_eq!(done.result, Ok(()), "sector {}", done.tag);
        }
    }

    /// Every sector but the `unknown` ones is as the shadow says; those are as they are found.
    fn compare(&mut self, unknown: impl Fn(u64) -> bool) {
        let mem = Buf::zeroed((SECTORS * SECTOR) as usize);
        self.submit(IoKind::Read, 0, SECTORS, mem.into());
        let read = settle(&mut self.engine).pop().expect("a read");
        assert_eq!(read.result, Ok(()));
        let found = read.mem.into_buf().expect("its memory");
        for (sector, found) in (0..SECTORS).zip(found.chunks(SECTOR as usize)) {
            let expected = self.of(sector);
            if unknown(sector) {
                expected.copy_from_slice(found);
            }
            assert!(expected == found, "sector {sector}");
        }
    }
}

/// In every round one sector in three is what `hole` makes of it; all others are written meanwhile.
fn beside(hole: IoKind) {
    let folder = folder();
    let path = folder.path().join("disk");
    let shadow = vec![0x11; (SECTORS * SECTOR) as usize];
    std::fs::write(&path, &shadow).expect("written");
    let aio = Aio::new(AioOptions::default()).expect("native AIO");
    let limits = Limits { requests: 2 * SECTORS as usize, ..Limits::default() };
    let mut engine = Engine::new(aio, limits);
    let disk = add(&mut engine, &path, Format::Raw, true);
    let mut rig = Rig { engine, disk, shadow };
    for n in 0..ROUNDS {
        let is_hole = |sector: u64| (sector * sector + sector + n).is_multiple_of(3);
        for sector in 0..SECTORS {
            if !is_hole(sector) {
                rig.write(sector, (n + sector) as u8 | 1, n % 4 == 0);
                continue;
            }
            rig.of(sector).fill(0);
            rig.submit(hole, sector, 1, Mem::None);
        }
        rig.flush();
        rig.compare(|sector| hole == IoKind::Discard && is_hole(sector));
    }
    drain(&mut rig.engine);
}

#[test]
fn zeroing() {
    beside(IoKind::Zero { unmap: false, fua: false });
}

#[test]
fn zeroing_with_unmap() {
    beside(IoKind::Zero { unmap: true, fua: false });
}

#[test]
fn discarding() {
    beside(IoKind::Discard);
}

#[test]
fn changing_the_length() {
    let folder = folder();
    let path = folder.path().join("disk");
    let shadow = vec![0x11; (SECTORS * SECTOR) as usize];
    std::fs::write(&path, &shadow).expect("written");
    let aio = Aio::new(AioOptions::default()).expect("native AIO");
    let mut engine = Engine::new(aio, Limits::default());
    let disk = add(&mut engine, &path, Format::Raw, true);
    let mut rig = Rig { engine, disk, shadow };
    for n in 0..ROUNDS {
        // Down into the middle of a block and up again, while the sectors before it are written.
        let end = SECTORS - 1 - n % 15;
        for (to, written) in [(end, 0..end / 2), (SECTORS, end / 2..end)] {
            for sector in written.clone().take(written.clone().count() / 2) {
                rig.write(sector, (n + sector) as u8 | 1, false);
            }
            rig.submit(IoKind::Truncate, to, 0, Mem::None);
            for sector in written.clone().skip(written.count() / 2) {
                rig.write(sector, (n + sector) as u8 | 1, n % 4 == 0);
            }
            rig.flush();
        }
        (end..SECTORS).for_each(|sector| rig.of(sector).fill(0));
        rig.compare(|_| false);
    }
    drain(&mut rig.engine);
}
