//! The guest of `bench --loop`: what it asks for, where in its memory, and what its disks hold.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use cowbell_engine::mem::Mem;
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::ram::Ram;
use cowbell_engine::units::Time;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::fail::Fail;
use crate::scratch::Random;

/// Bytes that offsets and lengths are multiples of.
pub const BLOCK: u64 = 4096;
/// The longest request, in blocks.
const BLOCKS_MAX: u64 = 16;
/// Guest memory for each request that may be in flight: its pieces lie in it with gaps between.
const ROOM: u64 = 2 * BLOCKS_MAX * BLOCK;
/// How often another place is tried for a request that would overlap one in flight.
const TRIES: usize = 64;

/// What a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    Write,
    Zero,
    Discard,
    Flush,
}

impl Kind {
    /// All, in the order of [`Mix`].
    pub const ALL: [Kind; 5] = [Kind::Read, Kind::Write, Kind::Zero, Kind::Discard, Kind::Flush];

    /// By name.
    pub fn name(self) -> &'static str {
        ["read", "write", "zero", "discard", "flush"][self as usize]
    }
}

/// How many of all requests are of each kind: reads, writes, zeroes, discards, flushes.
#[derive(Clone, Copy, Debug)]
pub struct Mix([u64; 5]);

impl Mix {
    /// From five numbers with commas between. Only their ratios count.
    pub fn parse(text: &str) -> Result<Mix, Fail> {
        let numbers: Vec<u64> = text.split(',').map_while(|n| n.trim().parse().ok()).collect();
        match <[u64; 5]>::try_from(numbers) {
            Ok(mix)
                if text.split(',').count() == 5
                    && mix.iter().all(|&n| n <= 1_000_000)
                    && mix.iter().sum::<u64>() > 0 =>
            {
                Ok(Mix(mix))
            }
            _ => Err(Fail::other(format!(
                "'{text}' is no mix: five numbers, for reads, writes, zeroes, discards, flushes"
            ))),
        }
    }

    fn choose(&self, random: &mut Random) -> Kind {
        let mut at = random.below(self.0.iter().sum());
        for (kind, &share) in Kind::ALL.into_iter().zip(&self.0) {
            match at.checked_sub(share) {
                None => return kind,
                Some(rest) => at = rest,
            }
        }
        Kind::Flush
    }
}

/// What a block of a disk holds: this word, again and again.
#[derive(Clone, Copy, Debug)]
struct Holds {
    word: u64,
    /// Or zeros: it was given up, and may have kept its contents.
    or_zero: bool,
}

/// A disk as the guest knows it.
#[derive(Debug)]
struct Disk {
    blocks: u64,
    /// By block: a request in flight is on it.
    busy: Vec<bool>,
    /// By block; empty if nobody wants to know.
    holds: Vec<Holds>,
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    pub kind: Kind,
    pub disk: usize,
    pub io: Io,
    pub at: Time,
    /// What a write writes.
    word: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Guest {
    memory: Arc<GuestMemoryMmap<()>>,
    random: Random,
    mix: Mix,
    disks: Vec<Disk>,
    /// Requests in flight, by tag.
    sent: Vec<Option<Sent>>,
    /// Lists of requests that have ended, by tag.
    lists: Vec<Option<Ram>>,
    /// Tags that are free, for each disk.
    free: Vec<Vec<u64>>,
    check: bool,
    words: u64,
}

impl Guest {
    /// A guest with so many requests at a time for all its disks, which are of `bytes` each.
    /// With `check` it remembers what they hold; `backed` bytes of the first come from
    /// [`write_backing`].
    pub fn new(
        seed: u64,
        mix: Mix,
        depth: usize,
        disks: &[(u64, u64)],
        check: bool,
    ) -> Result<Guest, Fail> {
        let room = depth as u64 * ROOM;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), room as usize)])
            .map_err(|why| Fail::other(format!("guest memory of {room} bytes: {why}")))?;
        // Pages that were never written to are not what is measured.
        let page = [0xa5; BLOCK as usize];
        for at in (0..room).step_by(BLOCK as usize) {
            memory.write_slice(&page, GuestAddress(at)).map_err(of_memory)?;
        }
        let disks: Vec<Disk> = disks
            .iter()
            .map(|&(bytes, backed)| {
                let blocks = bytes / BLOCK;
                let holds = |block| {
                    let word = if block < backed / BLOCK { backing_word(block) } else { 0 };
                    Holds { word, or_zero: false }
                };
                let holds = if check { (0..blocks).map(holds).collect() } else { Vec::new() };
                Disk { blocks, busy: vec![false; blocks as usize], holds }
            })
            .collect();
        let share = |disk| (disk..depth).step_by(disks.len()).map(|tag| tag as u64).collect();
        let free = (0..disks.len()).map(share).collect();
        Ok(Guest {
            memory: Arc::new(memory),
            random: Random(seed),
            mix,
            disks,
            sent: vec![None; depth],
            lists: vec![None; depth],
            free,
            check,
            words: 0,
        })
    }

    /// The next request to `disk`, with its memory and tag. `None`: as many as may be are in
    /// flight, or they are in the way.
    pub fn next(&mut self, disk: usize, now: Time) -> Result<Option<(Io, Mem, u64)>, Fail> {
        let Some(&tag) = self.free[disk].last() else { return Ok(None) };
        let kind = self.mix.choose(&mut self.random);
        let Some(io) = self.place(disk, kind) else { return Ok(None) };
        self.free[disk].pop();
        self.words += 1 << 8;
        let sent = Sent { kind, disk, io, at: now, word: self.words };
        let mem = match kind {
            Kind::Read => self.list(tag, io.len)?.into(),
            Kind::Write => {
                let list = self.list(tag, io.len)?;
                if self.check {
                    self.fill(tag, &sent)?;
                }
                list.into()
            }
            _ => Mem::None,
        };
        self.occupy(&sent, true);
        self.sent[tag as usize] = Some(sent);
        Ok(Some((io, mem, tag)))
    }

    /// A request has come back.
    pub fn ended(&mut self, tag: u64, mem: Mem) -> Sent {
        let sent = self.sent[tag as usize].take().expect("it was sent");
        if let Mem::Ram(ram) = mem {
            self.lists[tag as usize] = Some(ram);
        }
        self.occupy(&sent, false);
        self.free[sent.disk].push(tag);
        if self.check {
            let holds = &mut self.disks[sent.disk].holds;
            for (n, block) in blocks(&sent.io).enumerate() {
                match sent.kind {
                    Kind::Write => {
                        holds[block] = Holds { word: sent.word + n as u64, or_zero: false };
                    }
                    Kind::Zero => holds[block] = Holds { word: 0, or_zero: false },
                    Kind::Discard => holds[block].or_zero = true,
                    Kind::Read | Kind::Flush => {}
                }
            }
        }
        sent
    }

    /// Where nothing in flight is.
    fn place(&mut self, disk: usize, kind: Kind) -> Option<Io> {
        if kind == Kind::Flush {
            return Some(Io::flush());
        }
        let Disk { blocks: all, ref busy, .. } = self.disks[disk];
        let kind = match kind {
            Kind::Write => IoKind::Write { fua: false, compressed: false },
            Kind::Zero => IoKind::Zero { unmap: self.random.below(2) == 0, fua: false },
            Kind::Discard => IoKind::Discard,
            Kind::Read | Kind::Flush => IoKind::Read,
        };
        for _ in 0..TRIES {
            let len = 1 + self.random.below(BLOCKS_MAX);
            let first = self.random.below(all - len + 1);
            if !busy[first as usize..(first + len) as usize].contains(&true) {
                return Some(Io { kind, offset: first * BLOCK, len: len * BLOCK });
            }
        }
        None
    }

    fn occupy(&mut self, sent: &Sent, busy: bool) {
        self.disks[sent.disk].busy[blocks(&sent.io)].fill(busy);
    }

    /// A scatter list of `len` bytes in the memory of this tag: pieces of one to four pages, a
    /// page between them.
    fn list(&mut self, tag: u64, len: u64) -> Result<Ram, Fail> {
        let ranges = pieces(tag, len).map(|(at, len)| (at, len as usize));
        match self.lists[tag as usize].take() {
            Some(mut ram) => {
                ram.refill_of_guest(&self.memory, ranges).map_err(of_memory)?;
                Ok(ram)
            }
            None => Ram::of_guest(&self.memory, ranges).map_err(of_memory),
        }
    }

    /// Each block of what is written says which it is.
    fn fill(&self, tag: u64, sent: &Sent) -> Result<(), Fail> {
        let mut word = sent.word;
        for (at, len) in pieces(tag, sent.io.len) {
            for page in (0..len).step_by(BLOCK as usize) {
                let at = GuestAddress(at.0 + page);
                self.memory.write_slice(&block_of(word), at).map_err(of_memory)?;
                word += 1;
            }
        }
        Ok(())
    }

    /// How many blocks of `bytes`, read at `offset` of a disk, are not what they have to be.
    pub fn count_wrong(&self, disk: usize, offset: u64, bytes: &[u8]) -> u64 {
        let holds = &self.disks[disk].holds[(offset / BLOCK) as usize..];
        let wrong = bytes.chunks(BLOCK as usize).zip(holds).filter(|(bytes, holds)| {
            let is = |word| **bytes == block_of(word);
            !(is(holds.word) || holds.or_zero && is(0))
        });
        wrong.count() as u64
    }
}

fn of_memory(why: vm_memory::GuestMemoryError) -> Fail {
    Fail::other(format!("guest memory: {why}"))
}

fn blocks(io: &Io) -> std::ops::Range<usize> {
    (io.offset / BLOCK) as usize..(io.end() / BLOCK) as usize
}

/// The pieces of a request of `len` bytes: address and bytes.
fn pieces(tag: u64, len: u64) -> impl Iterator<Item = (GuestAddress, u64)> {
    let (mut at, mut left) = (tag * ROOM, len);
    std::iter::from_fn(move || {
        let take = left.min((1 + (left / BLOCK + tag) % 4) * BLOCK);
        let piece = (GuestAddress(at), take);
        (at, left) = (at + take + BLOCK, left - take);
        (take > 0).then_some(piece)
    })
}

fn block_of(word: u64) -> [u8; BLOCK as usize] {
    let mut block = [0; BLOCK as usize];
    block.as_chunks_mut().0.fill(word.to_le_bytes());
    block
}

/// No write's word.
fn backing_word(block: u64) -> u64 {
    1 << 63 | block
}

/// Makes a backing file that is full of data.
pub fn write_backing(path: &Path, bytes: u64) -> io::Result<()> {
    let file = File::create_new(path)?;
    let mut out = io::BufWriter::with_capacity(1 << 20, &file);
    for block in 0..bytes / BLOCK {
        out.write_all(&block_of(backing_word(block)))?;
    }
    out.flush()?;
    // Stable now: else the first read past the page cache would wait for all of it.
    file.sync_all()
}
