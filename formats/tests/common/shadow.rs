//! Random requests at depth over a real file, against a shadow in memory: every byte of every read,
//! and of the whole disk at the end. Ranges in flight do not overlap, so that there is one answer.

use std::path::Path;

use cowbell_engine::backend::Backend;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{DiskHost, Node, OpenOptions, Policy, RunOptions, attach, open};

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// The disk's size in bytes.
pub const SIZE: u64 = 6 << 20;
const DEPTH: usize = 32;

/// An open image, its shadow, and what is in flight.
pub struct Rig<B: Backend> {
    engine: Engine<Node, B>,
    disk: cowbell_engine::units::NodeId,
    shadow: Vec<u8>,
    in_flight: Vec<Option<(Io, Option<Vec<u8>>)>>,
    cluster: u64,
    pub has_backing: bool,
    /// With nothing in flight.
    turns: u64,
    /// Do discarded clusters read as zeros?
    pub discards: bool,
}

impl<B: Backend<File = DiskFile>> Rig<B> {
    /// Opens the image at `path`, whose contents are `shadow`.
    pub fn open(
        backend: B,
        path: &Path,
        direct: bool,
        cluster: u64,
        shadow: Vec<u8>,
        run: &RunOptions,
    ) -> Self {
        let options = OpenOptions {
            write: true,
            backing: Policy::SameDirectory,
            format: None,
            ..OpenOptions::default()
        };
        let chain = open(&DiskHost { direct }, path, &options).expect("it opens");
        let has_backing = chain.layers.len() > 1;
        let limits = Limits { requests: DEPTH, ..Limits::default() };
        let mut engine = Engine::new(backend, limits);
        let disk = attach(&mut engine, chain, run).expect("it attaches");
        Rig {
            engine,
            disk,
            shadow,
            in_flight: vec![None; DEPTH],
            cluster,
            has_backing,
            turns: 0,
            discards: true,
        }
    }

    fn turn(&mut self) {
        self.engine.run(clock());
        self.turns = if self.engine.ops().is_empty() { self.turns + 1 } else { 0 };
        assert!(self.turns < 100_000, "nothing ends any more: {:?}", self.engine);
        while let Some(done) = self.engine.poll() {
            let (io, expected) = self.in_flight[done.tag as usize].take().expect("one answer");
            done.result.unwrap_or_else(|errno| panic!("{io:?}: {errno}"));
            if let (IoKind::Read, Some(expected)) = (io.kind, expected) {
                let buf = done.mem.into_buf().expect("reads own a buffer");
                let wrong = buf.iter().zip(&expected).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "{io:?}: wrong from byte {wrong:?} on");
            }
        }
    }

    fn submit(&mut self, io: Io, mem: Mem, expected: Option<Vec<u8>>) {
        while !self.in_flight.iter().any(Option::is_none) || self.overlaps(&io) {
            self.turn();
        }
        let tag = self.in_flight.iter().position(Option::is_none).expect("waited for");
        self.in_flight[tag] = Some((io, expected));
        self.engine.submit(self.disk, io, mem, tag as u64).expect("there is room");
    }

    fn overlaps(&self, io: &Io) -> bool {
        let hit = |o: &Io| o.offset < io.end() && io.offset < o.end();
        self.in_flight.iter().flatten().any(|(o, _)| hit(o))
    }

    /// One random request.
    pub fn one(&mut self, rng: &mut Rng) {
        let unit = [1, 512, 4096, self.cluster][rng.below(4) as usize];
        let len = (1 + rng.below(3 * self.cluster.min(200_000) / unit + 1)) * unit;
        let len = len.min(SIZE / 2);
        let offset = rng.below((SIZE - len) / unit + 1) * unit;
        let range = offset as usize..(offset + len) as usize;
        let (kind, mem, expected) = match rng.below(10) {
            0..4 => {
                while self.overlaps(&Io::read(offset, len)) {
                    self.turn();
                }
                (IoKind::Read, Buf::zeroed(len as usize).into(), Some(self.shadow[range].to_vec()))
            }
            4..7 => {
                let seed = rng.next() as u8;
                let mut buf = Buf::zeroed(len as usize);
                buf.iter_mut().enumerate().for_each(|(i, b)| *b = seed.wrapping_add((i / 7) as u8));
                self.shadow[range].copy_from_slice(&buf);
                (
                    IoKind::Write { fua: rng.below(20) == 0, compressed: rng.below(8) == 0 },
                    buf.into(),
                    None,
                )
            }
            7 => {
                self.shadow[range].fill(0);
                (IoKind::Zero { unmap: rng.below(2) == 0, fua: false }, Mem::None, None)
            }
            8 if self.discards => {
                // Whole clusters read as zeros afterwards; the rest keeps its contents.
                let first = offset.next_multiple_of(self.cluster);
                let last =
                    if offset + len == SIZE { SIZE } else { (offset + len) & !(self.cluster - 1) };
                if first < last {
                    self.shadow[first as usize..last as usize].fill(0);
                }
                (IoKind::Discard, Mem::None, None)
            }
            _ => (IoKind::Flush, Mem::None, None),
        };
        let (offset, len) = if kind == IoKind::Flush { (0, 0) } else { (offset, len) };
        self.submit(Io { kind, offset, len }, mem, expected);
    }

    /// Reads all of it, and closes the image; answers what it holds.
    pub fn finish(mut self) -> Vec<u8> {
        while self.engine.in_flight() > 0 {
            self.turn();
        }
        for offset in (0..SIZE).step_by(1 << 20) {
            let range = offset as usize..(offset + (1 << 20)) as usize;
            let expected = Some(self.shadow[range].to_vec());
            self.submit(Io::read(offset, 1 << 20), Buf::zeroed(1 << 20).into(), expected);
        }
        self.engine.drain();
        while self.engine.drained().is_none() {
            self.turn();
        }
        assert_eq!(self.engine.drained(), Some(Ok(())));
        self.engine.assert_idle();
        self.engine.node(self.disk).assert_idle();
        self.shadow
    }
}
