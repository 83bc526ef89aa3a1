//! A million mixed requests, after warming up, allocate nothing.

use cowbell_engine::backend::Backend;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::pool::PoolOptions;
use cowbell_engine::sys::uring::{Uring, UringOptions};
use cowbell_engine::units::NodeId;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{
    CreateOptions, DiskHost, Format, Node, OpenOptions, RunOptions, attach, create, open,
};

const FORMATS: [Format; 5] = [Format::Raw, Format::Qed, Format::Qcow2, Format::Vmdk, Format::Vdi];
const SIZE: u64 = 64 << 20;
const CLUSTER: u64 = 64 << 10;
const DEPTH: usize = 32;
const BLOCK: u64 = 4096;

struct Load<B: Backend> {
    engine: Engine<Node, B>,
    disks: [NodeId; FORMATS.len()],
    spare: Vec<Mem>,
    random: u64,
}

impl<B: Backend<File = DiskFile>> Load<B> {
    fn run(&mut self, requests: u64) {
        let mut submitted = 0;
        let mut finished = 0;
        while finished < requests {
            while submitted < requests && !self.spare.is_empty() {
                self.submit(submitted);
                submitted += 1;
            }
            self.engine.run(clock());
            while let Some(done) = self.engine.poll() {
                assert_eq!(done.result, Ok(()));
                self.spare.push(done.mem);
                finished += 1;
            }
        }
    }

    /// Reads and writes in place, allocating writes, unaligned writes, zero writes, discards of
    /// whole clusters, which are allocated again, flushes: over all formats, at random.
    fn submit(&mut self, n: u64) {
        self.random = self.random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let r = self.random >> 33;
        let offset = r % (SIZE / BLOCK) * BLOCK;
        let mem = self.spare.pop().expect("checked by the caller");
        let disk = self.disks[(r >> 20) as usize % FORMATS.len()];
        let io = match n % 1024 {
            0 => Io::flush(),
            1 => Io { kind: IoKind::Zero { unmap: false, fua: false }, offset, len: BLOCK },
            2..10 => {
                let kind = IoKind::Discard;
                Io { kind, offset: offset / CLUSTER * CLUSTER, len: CLUSTER }
            }
            10..400 => Io::write(offset, BLOCK),
            // Past a sector's start: read, changed, written back.
            400..410 if offset > 0 => Io::write(offset - 100, BLOCK),
            _ => Io::read(offset, BLOCK),
        };
        self.engine.submit(disk, io, mem, n).expect("as many buffers as slots");
    }
}

/// One thread, so that no second one is started late.
const ONE_THREAD: PoolOptions = PoolOptions { threads: 1, depth: 256, up_front: false };

#[test]
fn a_million_mixed_requests_allocate_nothing() {
    let options = AioOptions { pool: ONE_THREAD, ..AioOptions::default() };
    allocates_nothing(Aio::new(options).expect("native AIO"));
}

#[test]
fn nor_over_io_uring() {
    if crate::common::uring().is_some() {
        let options = UringOptions { pool: ONE_THREAD, ..UringOptions::default() };
        allocates_nothing(Uring::new(options).expect("io_uring"));
    }
}

fn allocates_nothing(backend: impl Backend<File = DiskFile>) {
    let folder = match tempfile::tempdir_in("/dev/shm") {
        Ok(folder) => folder,
        Err(_) => tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder"),
    };
    let limits = Limits { requests: DEPTH, ..Limits::default() };
    let mut engine = Engine::new(backend, limits);
    let disks = FORMATS.map(|format| {
        let path = folder.path().join(format.name());
        let options = CreateOptions { size: Some(SIZE), ..CreateOptions::default() };
        create(&DiskHost::default(), &path, format, &options).expect("it is made");
        let options = OpenOptions { format: Some(format), write: true, ..OpenOptions::default() };
        let chain = open(&DiskHost { direct: true }, &path, &options).expect("it opens");
        attach(&mut engine, chain, &RunOptions::default()).expect("it attaches")
    });
    let spare = (0..DEPTH).map(|_| Buf::zeroed(BLOCK as usize).into()).collect();
    let mut load = Load { engine, disks, spare, random: 1 };
    // Warm: half of the clusters are allocated, some given up again, the pool's threads are there.
    load.run(5_000);
    let counted = allocation_counter::measure(|| load.run(1_000_000));
    assert_eq!(counted.count_total, 0, "{counted:?}");
}
