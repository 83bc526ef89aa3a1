//! A small qcow2 image, and ways to make it wrong.

use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{CreateOptions, Format, Node};

use super::drive::{add, drain, folder, make_with, settle};

/// Bytes of a cluster.
pub const CLUSTER: u64 = 4096;
/// Bytes of the disk.
pub const SIZE: u64 = 5 << 20;

/// Random numbers.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 7
    }

    /// Numbers that break things, and some at random.
    pub fn nasty(&mut self) -> u64 {
        let (kind, small) = (self.next() % 9, self.next() % 64);
        let flags = [0, 1, 1 << 63, 1 << 62, 3 << 62][self.next() as usize % 5];
        match kind {
            0 => small,
            1..=4 => (small * CLUSTER) | flags,
            5 => 1 << small,
            6 => (1_u64 << small).wrapping_sub(1),
            7 => self.next() | flags,
            _ => u64::MAX - small * 512,
        }
    }

    /// Changes up to three words of an image's header and tables, or cuts it off.
    pub fn mutate(&mut self, bytes: &mut Vec<u8>) {
        let len = bytes.len() as u64;
        for _ in 0..self.next() % 4 {
            // Tables are clusters near the front; fields are in the header.
            let at = match self.next() % 8 {
                0 => self.next() % 14 * 8,
                1..=6 => self.next() % (len / CLUSTER) * CLUSTER + self.next() % 24 * 8,
                _ => self.next() % (len - 8),
            } as usize;
            let value = self.nasty();
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        if self.next().is_multiple_of(16) {
            bytes.truncate((self.next() % len) as usize);
        }
    }
}

/// A sound image with a bit of everything, as bytes.
pub fn sound(extended: bool) -> Vec<u8> {
    let folder = folder();
    let path = folder.path().join("image");
    let options = CreateOptions {
        size: Some(SIZE),
        cluster_size: Some(if extended { 16384 } else { CLUSTER }),
        extended_l2: Some(extended),
        ..CreateOptions::default()
    };
    make_with(&path, Format::Qcow2, &options);
    let mut engine: Engine<Node, Inline> = Engine::new(Inline::new(), Limits::default());
    let disk = add(&mut engine, &path, Format::Qcow2, false);
    for (offset, len) in [(0, 3 * CLUSTER), (2 << 20, 5000), (4 << 20, 100)] {
        let bytes = Buf::copied(&vec![7; len as usize]);
        engine.submit(disk, Io::write(offset, len), bytes, 0).expect("room");
    }
    let zero = IoKind::Zero { unmap: false, fua: false };
    let zeros = Io { kind: zero, offset: CLUSTER, len: CLUSTER };
    settle(&mut engine);
    engine.submit(disk, zeros, Mem::None, 0).expect("room");
    settle(&mut engine);
    drain(&mut engine);
    std::fs::read(&path).expect("read")
}
