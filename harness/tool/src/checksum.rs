//! A checksum of what a disk holds, as its guest reads it: taken while it is copied, from front to back.
//!
//! Zeros count as bytes, wherever they come from: so it is the checksum of a raw image of the disk.
//! BLAKE3 and SHA-256 must go over each of them (BLAKE3 counts its chunks, so that even a part of its
//! tree that is all zeros has another value in each place). fs-verity has a tree in which equal parts
//! have equal values: any number of zeros takes a few steps.

use std::io::{self, Write};

use sha2::{Digest, Sha256};

use crate::session::eprint_quietly;

/// Which one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Kind {
    /// BLAKE3, as `b3sum` of a raw image; holes take time, a second for some GiB
    Blake3,
    /// SHA-256, as `sha256sum` of a raw image; holes take time, a second for a GiB or less
    Sha256,
    /// The digest of Linux' fs-verity, as `fsverity digest` of a raw image; holes take none
    FsVerity,
}

impl Kind {
    /// As it is asked for.
    fn name(self) -> &'static str {
        match self {
            Kind::Blake3 => "blake3",
            Kind::Sha256 => "sha256",
            Kind::FsVerity => "fs-verity",
        }
    }
}

/// A checksum that is being taken.
pub struct Checksum {
    kind: Kind,
    /// Bytes that it is of so far.
    at: u64,
    hasher: Hasher,
}

enum Hasher {
    Blake3(Box<blake3::Hasher>),
    Sha256(Sha256),
    FsVerity(Tree),
}

/// Bytes of zeros that are hashed at once.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// And in a row, before something else is looked after.
const ZEROS_MAX: u64 = 64 << 20;

impl Checksum {
    /// Of nothing yet.
    pub fn new(kind: Kind) -> Checksum {
        let hasher = match kind {
            Kind::Blake3 => Hasher::Blake3(Box::default()),
            Kind::Sha256 => Hasher::Sha256(Sha256::new()),
            Kind::FsVerity => Hasher::FsVerity(Tree::default()),
        };
        Checksum { kind, at: 0, hasher }
    }

    /// How many bytes it is of so far.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// The next bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        match &mut self.hasher {
            Hasher::Blake3(hasher) => drop(hasher.update(bytes)),
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::FsVerity(tree) => tree.add(bytes),
        }
        self.at += bytes.len() as u64;
    }

    /// Zeros up to byte `to`. False: that takes its time, and some are left.
    pub fn add_zeros_to(&mut self, to: u64) -> bool {
        if let Hasher::FsVerity(tree) = &mut self.hasher {
            tree.add_zeros(to.saturating_sub(self.at));
            self.at = self.at.max(to);
            return true;
        }
        let stop = to.min(self.at.saturating_add(ZEROS_MAX));
        while self.at < stop {
            let len = (stop - self.at).min(ZEROS.len() as u64);
            self.add(&ZEROS[..len as usize]);
        }
        self.at >= to
    }

    /// It is of all now.
    pub fn end(self) -> Sum {
        let value = match self.hasher {
            Hasher::Blake3(hasher) => hasher.finalize().into(),
            Hasher::Sha256(hasher) => hasher.finalize().into(),
            Hasher::FsVerity(tree) => tree.end(self.at),
        };
        Sum { kind: self.kind, value }
    }
}

/// One that was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sum {
    kind: Kind,
    value: Hash,
}

impl Sum {
    /// Says it on a line of standard output; of standard error, if that is an image's.
    pub fn say(&self, is_stdout_taken: bool) -> io::Result<()> {
        let line = format!("{}: {}\n", self.kind.name(), self.hex());
        if is_stdout_taken {
            eprint_quietly(&line);
            return Ok(());
        }
        let mut out = io::stdout().lock();
        out.write_all(line.as_bytes())?;
        out.flush()
    }

    /// The same for programs.
    pub fn json(&self) -> String {
        format!("{{\"checksum\":\"{}\",\"value\":\"{}\"}}\n", self.kind.name(), self.hex())
    }

    fn hex(&self) -> String {
        self.value.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

type Hash = [u8; 32];

/// Bytes in a block of a tree.
const BLOCK: usize = 4096;
/// Hashes in a block, as a power of two.
const FAN_BITS: u32 = 7;

/// The Merkle tree of fs-verity: blocks of 4096 bytes, SHA-256, no salt. Of each level there is the
/// block that is not full yet.
#[derive(Default)]
struct Tree {
    /// Data.
    block: Vec<u8>,
    /// Hashes, of data first.
    levels: Vec<Vec<u8>>,
    /// Blocks of data that are in it.
    blocks: u64,
}

impl Tree {
    fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(BLOCK - self.block.len()));
            if now.len() == BLOCK {
                self.put(0, Sha256::digest(now).into());
            } else {
                self.block.extend_from_slice(now);
                self.end_block();
            }
            bytes = rest;
        }
    }

    /// A block of data that is full goes into the tree.
    fn end_block(&mut self) {
        if self.block.len() == BLOCK {
            let hash = Sha256::digest(&self.block).into();
            self.block.clear();
            self.put(0, hash);
        }
    }

    fn add_zeros(&mut self, mut len: u64) {
        if !self.block.is_empty() {
            let first = len.min((BLOCK - self.block.len()) as u64);
            self.add(&ZEROS[..first as usize]);
            len -= first;
        }
        let mut left = len / BLOCK as u64;
        // Of a tree of zeros with so many levels.
        let mut zeros: Vec<Hash> = vec![Sha256::digest(&ZEROS[..BLOCK]).into()];
        while left > 0 {
            // The largest that begins here and is not too large.
            let mut level = 0;
            let blocks = |level: usize| 1u64.checked_shl(level as u32 * FAN_BITS).unwrap_or(0);
            while matches!(blocks(level + 1), most if most > 0 && most <= left
                && self.blocks.is_multiple_of(most))
            {
                level += 1;
            }
            while zeros.len() <= level {
                let last = zeros[zeros.len() - 1];
                zeros.push(Sha256::digest(last.repeat(1 << FAN_BITS)).into());
            }
            self.put(level, zeros[level]);
            left -= blocks(level);
        }
        self.add(&ZEROS[..(len % BLOCK as u64) as usize]);
    }

    /// The hash of as much as a hash of this level is of.
    fn put(&mut self, level: usize, hash: Hash) {
        self.blocks += 1 << (level as u32 * FAN_BITS);
        self.put_hash(level, hash);
    }

    fn put_hash(&mut self, level: usize, hash: Hash) {
        if self.levels.len() <= level {
            self.levels.resize(level + 1, Vec::new());
        }
        let hashes = &mut self.levels[level];
        hashes.extend_from_slice(&hash);
        if hashes.len() == BLOCK {
            let hash = Sha256::digest(&hashes).into();
            hashes.clear();
            self.put_hash(level + 1, hash);
        }
    }

    /// The digest of `len` bytes, which are all in it.
    fn end(mut self, len: u64) -> Hash {
        if !self.block.is_empty() {
            self.block.resize(BLOCK, 0);
            self.end_block();
        }
        let mut root = Hash::default();
        let mut level = 0;
        while let Some(hashes) = self.levels.get(level).cloned() {
            let is_top = self.levels[level + 1..].iter().all(Vec::is_empty);
            if let (true, Ok(hash)) = (is_top, Hash::try_from(&hashes[..])) {
                root = hash;
                break;
            }
            if !hashes.is_empty() {
                let mut block = hashes;
                block.resize(BLOCK, 0);
                self.put_hash(level + 1, Sha256::digest(&block).into());
            }
            level += 1;
        }
        // What describes it: version 1, SHA-256, blocks of 2^12 bytes, no salt, the length, the root.
        let mut described = vec![1, 1, 12, 0, 0, 0, 0, 0];
        described.extend_from_slice(&len.to_le_bytes());
        described.extend_from_slice(&root);
        described.resize(256, 0);
        Sha256::digest(&described).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the definition has it: all of the hashes of a level, then those of the next.
    fn fs_verity(bytes: &[u8]) -> Hash {
        let hashes = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
            bytes.chunks(BLOCK).flat_map(|block| Sha256::digest(block).to_vec()).collect::<Vec<_>>()
        };
        let mut root = vec![0; 32];
        if !bytes.is_empty() {
            root = hashes(bytes);
            while root.len() > 32 {
                root = hashes(&root);
            }
        }
        let mut described = [0; 256];
        described[..3].copy_from_slice(&[1, 1, 12]);
        described[8..16].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        described[16..48].copy_from_slice(&root);
        Sha256::digest(described).into()
    }

    #[test]
    fn bytes_and_zeros_in_any_parts_are_one_disk() {
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        for size in [0, 1, 4095, 4096, 4097, 128 << 12, (128 << 12) + 1, 67 << 20, (64 << 20) + 5] {
            for kind in [Kind::Blake3, Kind::Sha256, Kind::FsVerity] {
                let (mut sum, mut bytes) = (Checksum::new(kind), vec![0; size]);
                while sum.at() < size as u64 {
                    let at = sum.at() as usize;
                    let most = [300, 9000, 2 << 20, 64 << 20][random(4) as usize];
                    let end = (at + 1 + random(most) as usize).min(size);
                    if random(2) == 0 {
                        bytes[at..end].fill(random(256) as u8);
                        sum.add(&bytes[at..end]);
                    } else {
                        while !sum.add_zeros_to(end as u64) {}
                    }
                }
                let expected: Hash = match kind {
                    Kind::Blake3 => blake3::hash(&bytes).into(),
                    Kind::Sha256 => Sha256::digest(&bytes).into(),
                    Kind::FsVerity => fs_verity(&bytes),
                };
                assert_eq!(sum.end().value, expected, "{kind:?} of {size} bytes");
            }
        }
    }

    /// A value that others have computed; and the largest disk that there may be.
    #[test]
    fn fs_verity_is_that_of_linux() {
        let empty = Checksum::new(Kind::FsVerity).end();
        assert_eq!(empty.hex(), "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95");
        let mut all = Checksum::new(Kind::FsVerity);
        assert!(all.add_zeros_to(i64::MAX as u64), "it takes no time");
        assert_ne!(all.end().value, empty.value);
    }
}
