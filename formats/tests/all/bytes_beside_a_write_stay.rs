//! Requests that are aligned to nothing, many at a time over a few blocks, on engines with hardly
//! any room: a write changes its own bytes and no others, whoever else is at work in the block, and
//! a read sees of each byte what it was or what is being written to it.

use crate::common::drive::{add, drain, folder, is_readable, make};
use cowbell_engine::backend::Backend;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::sys::pool::{Pool, PoolOptions};
use cowbell_engine::units::NodeId;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{CreateOptions, DiskHost, Format, Node, create};

/// As little as an engine can be made with.
const TIGHT: Limits = Limits {
    requests: 24,
    ops: 4,
    buffers: 2,
    bounce_buffers: 1,
    buffer_size: 4096,
    zeros_written: 4096,
    discards_kept: 1,
    steps: 4096,
    turn: std::time::Duration::from_micros(500),
    measure: true,
};

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % n
    }
}

/// A byte on the disk, and what a write in flight makes of it.
#[derive(Clone, Copy)]
struct Byte {
    is: u8,
    becomes: Option<u8>,
}

/// What a read may see of one byte. Two values, or anything: it was written twice meanwhile.
#[derive(Clone, Copy)]
enum Seen {
    Either(u8, u8),
    Anything,
}

enum Flying {
    Write(Io),
    Read(Io, Vec<Seen>),
    Flush,
}

struct Rig<B: Backend> {
    engine: Engine<Node, B>,
    disk: NodeId,
    bytes: Vec<Byte>,
    flying: Vec<Option<Flying>>,
    rng: Rng,
}

impl<B: Backend<File = DiskFile>> Rig<B> {
    fn new(engine: Engine<Node, B>, disk: NodeId, contents: &[u8], seed: u64) -> Rig<B> {
        let size = engine.node(disk).size_of_disk() as usize;
        let mut bytes = vec![Byte { is: 0, becomes: None }; size];
        for (byte, &is) in bytes.iter_mut().zip(contents) {
            byte.is = is;
        }
        let flying = (0..TIGHT.requests).map(|_| None).collect();
        Rig { engine, disk, bytes, flying, rng: Rng(seed) }
    }

    fn turn(&mut self) {
        let again = self.engine.run(clock()).again;
        let mut finished = 0;
        while let Some(done) = self.engine.poll() {
            finished += 1;
            let flying = self.flying[done.tag as usize].take().expect("one answer");
            assert_eq!(done.result, Ok(()));
            match flying {
                Flying::Flush => {}
                Flying::Write(io) => {
                    for byte in &mut self.bytes[io.offset as usize..io.end() as usize] {
                        byte.is = byte.becomes.take().expect("it was being written");
                    }
                }
                Flying::Read(io, seen) => {
                    let buf = done.mem.into_buf().expect("it is ours");
                    for (at, (&got, seen)) in buf.iter().zip(seen).enumerate() {
                        if let Seen::Either(a, b) = seen {
                            let at = io.offset as usize + at;
                            assert!(got == a || got == b, "{io:?}: {got} at {at}, not {a} or {b}");
                        }
                    }
                }
            }
        }
        if finished == 0 && self.engine.in_flight() > 0 && !again {
            assert!(is_readable(&self.engine, 20_000), "nothing wakes the loop: {:?}", self.engine);
        }
    }

    fn submit(&mut self, io: Io, mem: Mem, flying: Flying) {
        let tag = loop {
            match self.flying.iter().position(Option::is_none) {
                Some(tag) => break tag,
                None => self.turn(),
            }
        };
        self.flying[tag] = Some(flying);
        self.engine.submit(self.disk, io, mem, tag as u64).expect("there is room");
    }

    fn write(&mut self, offset: u64, len: u64) {
        let range = offset as usize..(offset + len) as usize;
        while self.bytes[range.clone()].iter().any(|byte| byte.becomes.is_some()) {
            self.turn();
        }
        // Zeros in one of four: then it is a zero write.
        let zero = self.rng.below(4) == 0;
        let mut buf = Buf::zeroed(len as usize);
        if !zero {
            buf.iter_mut().for_each(|b| *b = self.rng.below(256) as u8);
        }
        for (byte, &becomes) in self.bytes[range].iter_mut().zip(buf.iter()) {
            byte.becomes = Some(becomes);
        }
        for flying in self.flying.iter_mut().flatten() {
            if let Flying::Read(io, seen) = flying {
                for at in io.offset.max(offset)..io.end().min(offset + len) {
                    let seen = &mut seen[(at - io.offset) as usize];
                    let becomes = buf[(at - offset) as usize];
                    *seen = match *seen {
                        Seen::Either(a, b) if a == b => Seen::Either(a, becomes),
                        Seen::Either(a, b) if a == becomes || b == becomes => *seen,
                        _ => Seen::Anything,
                    };
                }
            }
        }
        let fua = self.rng.below(8) == 0;
        let (kind, mem) = match zero {
            true => (IoKind::Zero { unmap: self.rng.below(2) == 0, fua }, Mem::None),
            false => (IoKind::Write { fua, compressed: false }, buf.into()),
        };
        let io = Io { kind, offset, len };
        self.submit(io, mem, Flying::Write(io));
    }

    fn read(&mut self, offset: u64, len: u64) {
        let seen = |byte: &Byte| Seen::Either(byte.is, byte.becomes.unwrap_or(byte.is));
        let io = Io::read(offset, len);
        // Only once there is room: until then what may be seen changes.
        while self.flying.iter().all(Option::is_some) {
            self.turn();
        }
        let seen = self.bytes[offset as usize..io.end() as usize].iter().map(seen).collect();
        self.submit(io, Buf::zeroed(len as usize).into(), Flying::Read(io, seen));
    }

    fn drive(mut self, requests: u64, direct: bool) {
        let size = self.bytes.len() as u64;
        for n in 0..requests {
            // Mostly over the first blocks and the last ones, of any length up to two buffers.
            let most = [7, 100, 600, 9000][self.rng.below(4) as usize];
            let len = 1 + self.rng.below(most).min(size - 1);
            let at = self.rng.below((size - len + 1).min(5000));
            let offset = if self.rng.below(2) == 0 { at } else { size - len - at };
            match self.rng.below(10) {
                0 => self.submit(Io::flush(), Mem::None, Flying::Flush),
                1..4 => self.read(offset, len),
                _ => self.write(offset, len),
            }
            if self.rng.below(3) == 0 {
                self.turn();
            }
            if n % 500 == 499 {
                while self.engine.in_flight() > 0 {
                    self.turn();
                }
                self.turn();
                drain(&mut self.engine);
            }
        }
        for offset in (0..size).step_by(3000) {
            self.read(offset, 3000.min(size - offset));
        }
        while self.flying.iter().any(Option::is_some) {
            self.turn();
        }
        drain(&mut self.engine);
        let bounced = self.engine.stats().bounced;
        assert_eq!(bounced > 0, direct, "{bounced} requests were read, changed and written back");
    }
}

trait SizeOfDisk {
    fn size_of_disk(&self) -> u64;
}

impl SizeOfDisk for Node {
    fn size_of_disk(&self) -> u64 {
        cowbell_engine::step::Driver::size(self)
    }
}

fn run<B: Backend<File = DiskFile>>(backend: impl Fn() -> B, direct: bool, seed: u64) {
    let folder = folder();
    let contents: Vec<u8> = (0..9_000).map(|n| (n / 7) as u8).collect();
    for (n, format) in ["raw", "odd", "qed", "backed"].into_iter().enumerate() {
        let path = folder.path().join(format!("{n}"));
        let (format, contents) = match format {
            "raw" => {
                make(&path, Format::Raw, 24 << 10);
                (Format::Raw, &[][..])
            }
            // A disk that ends behind its file: at a whole sector.
            "odd" => {
                std::fs::write(&path, &contents).expect("it writes");
                (Format::Raw, &contents[..])
            }
            "qed" => {
                make(&path, Format::Qed, 300_032);
                (Format::Qed, &[][..])
            }
            _ => {
                std::fs::write(folder.path().join("base"), &contents).expect("it writes");
                let options = CreateOptions {
                    size: Some(24 << 10),
                    cluster_size: Some(4096),
                    table_size: Some(1),
                    backing_file: Some("base".into()),
                    backing_format: Some(Format::Raw),
                    ..CreateOptions::default()
                };
                create(&DiskHost::default(), &path, Format::Qed, &options).expect("it is made");
                (Format::Qed, &contents[..])
            }
        };
        let mut engine = Engine::new(backend(), TIGHT);
        let disk = add(&mut engine, &path, format, direct);
        Rig::new(engine, disk, contents, seed + n as u64).drive(2000, direct);
    }
}

#[test]
fn over_native_aio() {
    run(|| Aio::new(AioOptions::default()).expect("native AIO"), true, 1);
}

#[test]
fn over_io_uring() {
    let Some(uring) = crate::common::uring() else { return };
    run(&uring, true, 5);
    run(&uring, false, 6);
}

#[test]
fn over_native_aio_one_op_at_a_time() {
    let options = AioOptions { depth: 1, ..AioOptions::default() };
    run(|| Aio::new(options).expect("native AIO"), true, 2);
}

#[test]
fn over_one_thread() {
    let options = PoolOptions { threads: 1, depth: 1, ..PoolOptions::default() };
    run(|| Pool::new(options).expect("a pool"), true, 3);
}

#[test]
fn over_threads_through_the_page_cache() {
    run(|| Pool::new(PoolOptions::default()).expect("a pool"), false, 4);
}

#[test]
fn inline() {
    run(Inline::new, true, 5);
}
