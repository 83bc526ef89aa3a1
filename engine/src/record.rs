//! A record of a real run: what an engine was asked, when, and what its backend did. With it, and the images' tables as
//! they were when the run began, the run can be done again, step for step, anywhere.
//!
//! An engine does nothing of its own accord. What it does is decided by the calls of its embedder, the clock, how many ops the backend
//! takes at a time, in which order they come back, and how. That, and no more, is kept; the ops themselves are not, since they
//! follow from it. Each `run` ends with a number that sums up what has been done: the states that requests wait in, the
//! ops, the answers. Whoever does the run again comes to the same numbers, or knows in which `run` he did not.
//!
//! No byte of a guest's is kept, only lengths. Of what is read those bytes are kept that the engine itself looks
//! at: tables, headers ([`Memory::looked_at`]).
//!
//! A record is a sequence of [`Entry`]s, little-endian, each with a byte first that says what it is. It may end anywhere: a process that
//! was killed leaves one that is short.
//!
//! | byte | what | then |
//! |---|---|---|
//! | 0x01, 0x02 | `run` is called | nanoseconds since the last time (i32), or the time (u64) |
//! | 0x03, 0x04 | the clock is looked at | the same |
//! | 0x05 | `run` ends | the sum so far (u32) |
//! | 0x06 | the backend took ops, from the front | how many (u16) |
//! | 0x07 | others | how many (u16), the place of each among those offered (u16) |
//! | 0x08 | an op came back well: it moved all, or did what it was to do | the op (u32) |
//! | 0x09 | it came back otherwise | the op (u32), its answer (i64) |
//! | 0x0a | what it read, before it came back | length (u32), bytes |
//! | 0x0b | finished requests were taken | how many (u8) |
//! | 0x0c | a method was called | which (u8), the node's index (u32) |
//! | 0x0e | requests were given up | the node's index (u32), how many (u32), the place of each (u32) |
//! | 0x0d | a file was attached | 1, or 0 if the backend refused it (u8), and what it said of it (below) |
//! | 0x0f | a limit was set | the node's index (u32), what there is of it (u8: 1 a limit, 2 of bytes, 4 of requests), bytes and requests a second, the burst in nanoseconds (u64 each) |
//! | 0x30 | a copy was started | the nodes' indices (u32 each), what it is (below), how many parts it is of, and one more (u32; 0: of all), from and to of each (u64 each) |
//! | 0x31 | something was said about a job | what (u8), which (u32) |
//! | 0x32 | which sectors of what an op brought are zeros, before it came back: while a copy looks for such | how many (u32), a bit for each |
//! | 0x33 | several came back well | how many (u8), the ops (u32 each) |
//! | 0x34 | a quota was set | the node's index (u32), requests (u32; 2^32-1: no bound) |
//! | 0x35 | a file was detached | which (u32) |
//! | 0x36 | memory for a node's tables was asked for | bytes (u64) |
//! | 0x37 | a node was added | |
//! | 0x10 to 0x1f | a request: its kind, less 0x10 | node (6 bits), memory (2 bits), offset and length in sectors (u32, u16) |
//! | 0x50 to 0x5f | a finished request was taken, then this: its kind, less 0x50 | the same |
//! | 0x20 to 0x2f | the same, less 0x20 | node (u32), memory (u8), its bits (u16), offset, length, bytes of memory (u64 each) |
//!
//! Of a file a backend says: the alignments of requests, memory and holes (u32 each), its length (u64), and whether it can grow
//! and knows its holes (u8: 1 and 2). Those that were attached before the record began are not in it ([`Recorder::infos`]). What was
//! read of an image before it was attached, by whoever opened it, is not in it either.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::backend::{Backend, COPY_NUMBERS, Called, FileInfo, Harvest, Note, Submission};
use crate::held::Rate;
use crate::mem::{Looked, Mem, Memory};
use crate::op::{Base, Completion, Op, OpKind, Target};
use crate::ops::{OpRecord, Ops};
use crate::request::{Io, IoKind};
use crate::trace::Kind;
use crate::units::{Errno, FileId, NodeId, OpId, ReqId, Time};

/// Where a record goes, a chunk at a time.
pub trait Sink {
    /// Takes a chunk; answers an empty one to go on with. `None`: it has no room, and nothing more is
    /// recorded. Must not wait.
    fn take(&mut self, chunk: Vec<u8>) -> Option<Vec<u8>>;
}

/// Bytes that are made ready to be written at a time.
const AT_ONCE: usize = 1024;

/// Bytes in a chunk, about, if nothing else is said.
pub const CHUNK: usize = 256 << 10;

/// A sum over all that was done, order included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    #[inline(always)]
    fn add(&mut self, what: u64) {
        self.0 = (self.0.rotate_left(23) ^ what).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// A request waits in this state.
    #[inline(always)]
    pub fn waits(&mut self, request: ReqId, label: u8) {
        self.add(u64::from(request.0) << 8 | u64::from(label));
    }

    /// The backend takes an op.
    #[inline(always)]
    pub fn takes(&mut self, id: OpId, record: &OpRecord) {
        let Op { kind, target, .. } = record.op;
        let file = if let Target::File(file) = target { file.0 } else { u32::MAX };
        let kind = match kind {
            OpKind::Read => 0,
            other => 1 + Kind::of(other) as u64,
        };
        let what = u64::from(id.0) << 32 | u64::from(file) << 8 | kind;
        // One word: the offset's low bits, and the length's, lie where the others are few.
        let at = record.offset() ^ record.remaining().rotate_left(40);
        self.add(what.wrapping_mul(0xd6e8_feb8_6659_fd93) ^ at);
    }

    /// A request ended so.
    #[inline(always)]
    pub fn ends(&mut self, result: Result<(), Errno>) {
        // How many have ended is recorded, so those that have ended well need no number.
        if let Err(errno) = result {
            self.add(errno.0 as u64 ^ u64::MAX);
        }
    }

    /// As it is recorded.
    #[inline(always)]
    pub fn short(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// A backend whose engine's runs are recorded, from [`Recorder::start`] on. Until then it costs a look.
pub struct Recorder<B> {
    inner: B,
    /// What the backend said of the files that came before it began, in the order in which they did.
    infos: Vec<FileInfo>,
    log: Option<Box<Log>>,
}

struct Log {
    sink: Box<dyn Sink>,
    chunk: Chunk,
    /// The last time that was recorded.
    time: Time,
    sum: Sum,
    /// Requests that were taken, and not yet recorded.
    polled: u32,
    /// Ops that were offered, to know which of them are taken.
    offered: Vec<OpId>,
}

/// What has been recorded and not yet handed over.
struct Chunk {
    /// Of these the first `at` have been written. That others are there, too, makes writing a word cheap.
    bytes: Vec<u8>,
    at: usize,
    /// With so many it is handed over.
    enough: usize,
}

impl Chunk {
    fn new(mut bytes: Vec<u8>, enough: usize) -> Chunk {
        bytes.clear();
        bytes.reserve(enough + enough / 4);
        Chunk { bytes, at: 0, enough }
    }

    /// The next `len` bytes, to be written; then some of them count ([`Chunk::at`]).
    #[inline(always)]
    fn room(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len() - self.at < len {
            self.grow(len);
        }
        &mut self.bytes[self.at..][..len]
    }

    #[cold]
    fn grow(&mut self, len: usize) {
        self.bytes.resize(self.at + len + AT_ONCE, 0);
    }

    /// Appends the first `len` bytes of a word.
    #[inline(always)]
    fn word(&mut self, word: u64, len: usize) {
        self.room(8).copy_from_slice(&word.to_le_bytes());
        self.at += len;
    }

    #[inline(always)]
    fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.at += bytes.len();
    }
}

impl<B> Recorder<B> {
    /// One that records nothing yet.
    pub fn new(inner: B) -> Recorder<B> {
        Recorder { inner, infos: Vec::new(), log: None }
    }

    /// From now on all is recorded. Nothing is in flight, and the clock stands at `now` or after it.
    pub fn start(&mut self, sink: Box<dyn Sink>) {
        self.start_with(sink, CHUNK);
    }

    /// The same, with chunks of about so many bytes.
    pub fn start_with(&mut self, sink: Box<dyn Sink>, enough: usize) {
        let chunk = Chunk::new(Vec::new(), enough);
        let (time, sum, offered) = (Time(0), Sum::default(), Vec::new());
        let log = Log { sink, chunk, time, sum, polled: 0, offered };
        self.log = Some(Box::new(log));
    }

    /// Hands what has been recorded to the sink, and records no more.
    pub fn stop(&mut self) {
        self.hand_over();
        self.log = None;
    }

    /// Hands what has been recorded so far to the sink, as it does when there is enough of it.
    pub fn hand_over(&mut self) {
        if let Some(log) = &mut self.log {
            log.write_polled();
            if log.chunk.at > 0 && !log.hands_over() {
                self.log = None;
            }
        }
    }

    /// Is it recorded still?
    pub fn is_recording(&self) -> bool {
        self.log.is_some()
    }

    /// What it said of the files that were attached before the record began, in that order: who does the run again needs
    /// it.
    pub fn infos(&self) -> &[FileInfo] {
        &self.infos
    }

    /// The backend that does the ops.
    pub fn inner(&self) -> &B {
        &self.inner
    }
}

impl<B> Drop for Recorder<B> {
    fn drop(&mut self) {
        self.stop();
    }
}

impl<B: std::fmt::Debug> std::fmt::Debug for Recorder<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Recorder({:?})", self.inner)
    }
}

impl Log {
    #[inline(always)]
    fn put<const N: usize>(&mut self, bytes: [u8; N]) {
        self.chunk.put(&bytes);
    }

    #[inline(always)]
    fn tagged<const N: usize, const M: usize>(&mut self, tag: u8, bytes: [u8; N]) {
        let mut all = [0; M];
        all[0] = tag;
        all[1..=N].copy_from_slice(&bytes);
        self.put(all);
    }

    #[inline(always)]
    fn time(&mut self, tag: u8, time: Time) {
        let delta = time.0.wrapping_sub(self.time.0) as i64;
        self.time = time;
        match i32::try_from(delta) {
            Ok(delta) => self.tagged::<4, 5>(tag, delta.to_le_bytes()),
            Err(_) => self.tagged::<8, 9>(tag + 1, time.0.to_le_bytes()),
        }
    }

    #[inline(always)]
    fn write_polled(&mut self) {
        while self.polled > 0 {
            let count = self.polled.min(u8::MAX.into());
            self.polled -= count;
            self.chunk.word(0x0b | u64::from(count) << 8, 2);
        }
    }

    /// Most requests: read or write whole sectors of the first 2 TiB, at most 32 MiB, on one of the first 64 disks,
    /// with memory that is aligned and as long.
    #[inline(always)]
    fn submitted(&mut self, node: NodeId, io: &Io, mem: &Mem) {
        let code = match io.kind {
            IoKind::Read => 0,
            IoKind::Write { fua: false, compressed: false } => 1,
            _ => return self.submitted_otherwise(node, io, mem),
        };
        let (memory, len, bits) = match mem {
            Mem::Owned(_) => (1, mem.len(), 0),
            Mem::Ram(ram) => (2 + u64::from(ram.is_read_only()), ram.len(), ram.misaligned_bits()),
            Mem::None => return self.submitted_otherwise(node, io, mem),
        };
        // Rotated, what is less than a sector stands above all else.
        let (start, sectors) = (io.offset.rotate_right(9), io.len.rotate_right(9));
        let index = node.index() as u64;
        let odd = start >> 32 | sectors >> 16 | index >> 6 | (len as u64 ^ io.len);
        if odd | u64::from(bits & 0xfff) != 0 || self.polled > 1 {
            return self.submitted_otherwise(node, io, mem);
        }
        let tag = 0x10 | code | u64::from(std::mem::take(&mut self.polled)) << 6;
        self.chunk.word(tag | index << 8 | memory << 14 | start << 16 | sectors << 48, 8);
    }

    #[inline(never)]
    fn submitted_otherwise(&mut self, node: NodeId, io: &Io, mem: &Mem) {
        self.write_polled();
        let (memory, bits) = match mem {
            Mem::None => (0, 0),
            Mem::Owned(_) => (1, 0),
            Mem::Ram(ram) => {
                (2 + u8::from(ram.is_read_only()), ram.misaligned_bits() as u16 & 0xfff)
            }
        };
        self.tagged::<4, 5>(0x20 | code_of(io.kind), (node.index() as u32).to_le_bytes());
        self.put([memory]);
        self.put(bits.to_le_bytes());
        for number in [io.offset, io.len, mem.len() as u64] {
            self.put(number.to_le_bytes());
        }
    }

    fn called(&mut self, called: Called<'_>) {
        let (which, node) = match called {
            Called::Detach(file) => return self.tagged::<4, 5>(0x35, file.0.to_le_bytes()),
            Called::Region(len) => return self.tagged::<8, 9>(0x36, (len as u64).to_le_bytes()),
            Called::Add => return self.put([0x37]),
            Called::Abandon(node, requests) => {
                self.put([0x0e]);
                for number in [node.index() as u32, requests.len() as u32] {
                    self.put(number.to_le_bytes());
                }
                requests.iter().for_each(|request| self.put(request.0.to_le_bytes()));
                return;
            }
            Called::Start { source, target, copy, parts } => {
                return self.started([source, target], copy, parts);
            }
            Called::Job(what, job) => {
                self.put([0x31, what as u8]);
                self.put(job.to_le_bytes());
                return;
            }
            Called::SetQuota(node, most) => {
                self.put([0x34]);
                let most = most.map_or(u32::MAX, |most| u32::try_from(most).unwrap_or(u32::MAX));
                for number in [node.index() as u32, most] {
                    self.put(number.to_le_bytes());
                }
                return;
            }
            Called::SetRate(node, rate) => {
                let Rate { bytes, requests, burst } = rate.unwrap_or_default();
                let has = [rate.is_some(), bytes.is_some(), requests.is_some()];
                let has = has.iter().rev().fold(0, |bits, &has| bits << 1 | u8::from(has));
                self.put([0x0f]);
                self.put((node.index() as u32).to_le_bytes());
                self.put([has]);
                let burst = u64::try_from(burst.as_nanos()).unwrap_or(u64::MAX);
                for number in [bytes.unwrap_or(0), requests.unwrap_or(0), burst] {
                    self.put(number.to_le_bytes());
                }
                return;
            }
            Called::Drain => (0, NodeId::default()),
            Called::PollEvent => (1, NodeId::default()),
            Called::Close(node) => (2, node),
            Called::CloseFilter(node) => (3, node),
            Called::Pause(node) => (4, node),
            Called::Resume(node) => (5, node),
            Called::TakeFiles(node) => (6, node),
        };
        self.put([0x0c, which]);
        self.put((node.index() as u32).to_le_bytes());
    }

    fn attached(&mut self, info: Option<&FileInfo>) {
        self.write_polled();
        self.put([0x0d, u8::from(info.is_some())]);
        let Some(info) = info else { return };
        for align in [info.request_align, info.memory_align, info.hole_align] {
            self.put(align.to_le_bytes());
        }
        self.put(info.len.to_le_bytes());
        self.put([u8::from(info.can_grow) | u8::from(info.knows_holes) << 1]);
    }

    fn started(&mut self, nodes: [NodeId; 2], copy: &[u64], parts: Option<&[Range<u64>]>) {
        self.put([0x30]);
        for node in nodes {
            self.put((node.index() as u32).to_le_bytes());
        }
        for number in copy {
            self.put(number.to_le_bytes());
        }
        self.put(parts.map_or(0, |parts| parts.len() as u32 + 1).to_le_bytes());
        for part in parts.unwrap_or_default() {
            self.put(part.start.to_le_bytes());
            self.put(part.end.to_le_bytes());
        }
    }

    /// Which sectors of what an op has brought are zeros.
    fn zeros(&mut self, bytes: &[u8]) {
        self.put([0x32]);
        self.put((bytes.len().div_ceil(SECTOR) as u32).to_le_bytes());
        for eight in bytes.chunks(8 * SECTOR) {
            let is_zero = |sector: &[u8]| u8::from(sector.iter().all(|&byte| byte == 0));
            let bits = eight.chunks(SECTOR).enumerate();
            self.put([bits.fold(0, |bits, (at, sector)| bits | is_zero(sector) << at)]);
        }
    }

    /// Those that come first of these, have moved all, and brought nothing that the engine looks at: most. What is
    /// left.
    #[inline(never)]
    fn came_back_whole<'d>(&mut self, done: &'d [Completion], ops: &Ops) -> &'d [Completion] {
        let some = &done[..done.len().min(u8::MAX.into())];
        let (counted, room) = self.chunk.room(2 + 4 * some.len()).split_at_mut(2);
        let mut count = 0;
        for (done, place) in some.iter().zip(room.as_chunks_mut().0) {
            let record = &ops[done.op];
            if !is_plain(record) || !done.is(record.remaining()) {
                break;
            }
            *place = done.op.0.to_le_bytes();
            count += 1;
        }
        if count > 0 {
            counted.copy_from_slice(&[0x33, count as u8]);
            self.chunk.at += 2 + 4 * count;
        }
        &done[count..]
    }

    /// Which of the ops that were offered have been taken?
    fn took(&mut self, left: &[OpId]) {
        let Log { offered, chunk, .. } = self;
        let taken = offered.len() - left.len();
        if left.is_empty() || offered[taken..] == *left {
            chunk.word(0x06 | (taken as u64) << 8, 3);
            return;
        }
        chunk.word(0x07 | (taken as u64) << 8, 3);
        let mut left = left.iter().peekable();
        for (place, op) in offered.iter().enumerate() {
            if left.next_if_eq(&op).is_none() {
                chunk.put(&(place as u16).to_le_bytes());
            }
        }
    }

    /// Hands over the chunk if it is full. False: nothing more is recorded.
    fn is_going_on(&mut self) -> bool {
        self.chunk.at < self.chunk.enough || self.hands_over()
    }

    /// False: nothing more is recorded.
    fn hands_over(&mut self) -> bool {
        let Chunk { bytes, at, enough } = &mut self.chunk;
        bytes.truncate(*at);
        let Some(empty) = self.sink.take(std::mem::take(bytes)) else { return false };
        self.chunk = Chunk::new(empty, *enough);
        true
    }
}

impl<B: Backend> Backend for Recorder<B> {
    type File = B::File;

    fn attach(&mut self, id: FileId, file: B::File) -> io::Result<FileInfo> {
        let attached = self.inner.attach(id, file);
        match (&mut self.log, &attached) {
            (Some(log), attached) => log.attached(attached.as_ref().ok()),
            (None, Ok(info)) => self.infos.push(*info),
            (None, Err(_)) => {}
        }
        attached
    }

    fn detach(&mut self, id: FileId) -> Option<B::File> {
        self.inner.detach(id)
    }

    #[inline]
    fn submit(&mut self, submission: &mut Submission<'_>) {
        let Some(log) = &mut self.log else { return self.inner.submit(submission) };
        log.offered.clear();
        log.offered.extend_from_slice(submission.waiting());
        let mut sum = log.sum;
        for &op in submission.waiting() {
            sum.takes(op, &submission.ops[op]);
        }
        log.sum = sum;
        self.inner.submit(submission);
        log.took(submission.waiting());
    }

    #[inline]
    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        let before = harvest.done.len();
        self.inner.harvest(harvest);
        let Some(log) = &mut self.log else { return };
        let Harvest { done, ops, mem } = harvest;
        let are_zeros_sought = mem.are_zeros_sought();
        let mut new = &done[before..];
        loop {
            if !are_zeros_sought {
                new = log.came_back_whole(new, ops);
            }
            let Some((done, rest)) = new.split_first() else { return };
            new = rest;
            let record = &ops[done.op];
            if are_zeros_sought && let Some(bytes) = brought_by(record, mem, done.answer()) {
                log.zeros(bytes);
            }
            let seen = seen_of(record, mem, done.answer());
            if let Some(bytes) = seen {
                log.put([0x0a]);
                log.put((bytes.len() as u32).to_le_bytes());
                log.chunk.put(bytes);
            }
            if done.answer() == expected_of(record) {
                log.tagged::<4, 5>(0x08, done.op.0.to_le_bytes());
            } else {
                log.tagged::<4, 5>(0x09, done.op.0.to_le_bytes());
                log.put(done.answer().to_le_bytes());
            }
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event_fd()
    }

    fn wants_retry(&self) -> bool {
        self.inner.wants_retry()
    }

    fn next_deadline(&self) -> Option<Time> {
        self.inner.next_deadline()
    }

    #[inline]
    fn clock(&self) -> Time {
        self.inner.clock()
    }

    #[inline(always)]
    fn note(&mut self, note: Note<'_>) {
        let Some(log) = &mut self.log else { return };
        match note {
            Note::Waits { request, label } => return log.sum.waits(request, label),
            Note::Polled(result) => {
                log.sum.ends(result);
                log.polled += 1;
                return;
            }
            Note::Submitted { node, io, mem } => return log.submitted(node, io, mem),
            _ => log.write_polled(),
        }
        match note {
            Note::Waits { .. } | Note::Polled(_) | Note::Submitted { .. } => {}
            Note::Run(time) => log.time(0x01, time),
            Note::Clock(time) => log.time(0x03, time),
            Note::Called(called) => log.called(called),
            Note::Ran => {
                log.tagged::<4, 5>(0x05, log.sum.short().to_le_bytes());
                if !log.is_going_on() {
                    self.log = None;
                }
            }
        }
    }
}

/// Does it move bytes, and the engine looks at none of those?
#[inline(always)]
fn is_plain(record: &OpRecord) -> bool {
    match record.op.kind {
        OpKind::Read => {
            record.op.segs.only().is_some_and(|seg| !matches!(seg.base, Base::Region(_)))
        }
        kind => matches!(kind, OpKind::Write { .. }),
    }
}

/// The answer of an op that has done all that it was to do.
#[inline(always)]
fn expected_of(record: &OpRecord) -> i64 {
    match record.op.kind {
        OpKind::Read | OpKind::Write { .. } => record.remaining() as i64,
        _ => 0,
    }
}

/// What an op has brought, where that may decide what is done next: whether it is zeros.
fn brought_by<'m>(record: &OpRecord, mem: &'m Memory, answer: i64) -> Option<&'m [u8]> {
    let seg = record.op.brings_into()?;
    let from = seg.off as usize;
    let bytes = match seg.base {
        Base::Region(region) if mem.looked_at(region) != Looked::All => mem.region(region),
        Base::Pool(buf) => mem.pool(buf),
        _ => return None,
    };
    (answer >= 0).then(|| &bytes[from..from + seg.len as usize])
}

/// What an op has brought that the engine looks at.
#[inline]
fn seen_of<'m>(record: &OpRecord, mem: &'m Memory, answer: i64) -> Option<&'m [u8]> {
    let seg = record.op.brings_into()?;
    let Base::Region(region) = seg.base else { return None };
    let len = match mem.looked_at(region) {
        Looked::All => seg.len as usize,
        Looked::First(most) => most.min(seg.len as usize),
    };
    let bytes = &mem.region(region)[seg.off as usize..][..len];
    (answer >= 0 && !bytes.is_empty()).then_some(bytes)
}

fn code_of(kind: IoKind) -> u8 {
    match kind {
        IoKind::Read => 0,
        IoKind::Write { fua, compressed } => 1 + u8::from(fua) + 2 * u8::from(compressed),
        IoKind::Flush => 5,
        IoKind::Zero { unmap, fua } => 6 + u8::from(fua) + 2 * u8::from(unmap),
        IoKind::Discard => 10,
        IoKind::Truncate => 11,
        IoKind::Status { .. } => 12,
    }
}

fn kind_of(code: u8) -> Option<IoKind> {
    Some(match code {
        0 => IoKind::Read,
        1..=4 => IoKind::Write { fua: (code - 1) & 1 != 0, compressed: (code - 1) & 2 != 0 },
        5 => IoKind::Flush,
        6..=9 => IoKind::Zero { unmap: (code - 6) & 2 != 0, fua: (code - 6) & 1 != 0 },
        10 => IoKind::Discard,
        11 => IoKind::Truncate,
        12 => IoKind::Status { depth: 0 },
        _ => return None,
    })
}

/// The memory that a request came with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lent {
    /// None.
    Nothing,
    /// A buffer of the engine's kind.
    Buffer,
    /// Pieces of the embedder's.
    Ram {
        /// Can it only be written from?
        read_only: bool,
        /// The bits below 4096 that are set in any piece's address or length.
        bits: u16,
    },
}

/// What is in a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry<'r> {
    /// A request was submitted.
    Submitted {
        /// A finished request was taken before.
        polled: bool,
        /// To the disk with this index.
        node: u32,
        /// What it wants.
        io: Io,
        /// With this memory,
        lent: Lent,
        /// of so many bytes.
        bytes: u64,
    },
    /// `run` was called, with this time.
    Run(Time),
    /// The clock was looked at.
    Clock(Time),
    /// `run` ended, and this is the sum of all that was done.
    Ran(u32),
    /// The backend took ops: those at these places (of 2 bytes each) among those offered, or so many from the
    /// front.
    Took {
        /// How many.
        count: u16,
        /// Where, if not in front.
        places: Option<&'r [u8]>,
    },
    /// An op came back.
    Done {
        /// Which.
        op: OpId,
        /// How, if it did not just do all that it was to do.
        answer: Option<i64>,
        /// What it has brought that the engine looks at.
        brought: &'r [u8],
    },
    /// Ops came back, and each did all that it was to do: of 4 bytes each.
    Whole(&'r [u8]),
    /// So many finished requests were taken.
    Polled(u8),
    /// A method was called, of the disk with this index.
    Called {
        /// Which: 0 drain, 1 `poll_event`, 2 close, 3 `close_filter`, 4 pause, 5 resume, 6 `take_files`.
        which: u8,
        /// The disk.
        node: u32,
    },
    /// Requests of the disk with this index were given up: the places of these, of 4 bytes each.
    Abandoned {
        /// The disk.
        node: u32,
        /// The requests.
        requests: &'r [u8],
    },
    /// The disk with this index has this quota from now on.
    Quota {
        /// The disk.
        node: u32,
        /// How many requests.
        requests_max: Option<usize>,
    },
    /// The disk with this index has this limit from now on.
    Rated {
        /// The disk.
        node: u32,
        /// The limit.
        rate: Option<Rate>,
    },
    /// A copy was started.
    Started {
        /// What: see [`Copy::from_numbers`](crate::Copy::from_numbers).
        copy: [u64; COPY_NUMBERS],
        /// The source.
        source: u32,
        /// The target.
        target: u32,
        /// If it is of parts only: from and to of each, of 8 bytes each.
        parts: Option<&'r [u8]>,
    },
    /// Something was said about a job.
    Job {
        /// What: as [`JobCall`](crate::backend::JobCall) counts.
        what: u8,
        /// The engine's so many'th job, from 0 on.
        job: u32,
    },
    /// Of the op that comes back next: a bit for each of so many sectors, which is set where that is zeros.
    Zeros {
        /// How many.
        sectors: u32,
        /// The bits.
        bits: &'r [u8],
    },
    /// A file was attached, of which the backend said this. `None`: it refused it.
    Attached(Option<FileInfo>),
    /// A file was detached, if that could be.
    Detached(FileId),
    /// So many bytes of memory were asked for.
    Region(u64),
    /// A node was added.
    Added,
}

/// Bytes that are zeros or not.
pub const SECTOR: usize = 512;

/// Reads a record, entry by entry. Ends where it does, in the middle of an entry too, and at what is no entry.
#[derive(Clone, Debug)]
pub struct Reader<'r> {
    rest: &'r [u8],
    time: Time,
}

impl<'r> Reader<'r> {
    /// From the first entry on.
    pub fn new(record: &'r [u8]) -> Reader<'r> {
        Reader::after(Time(0), record)
    }

    /// Of what a record goes on with after this time.
    pub fn after(time: Time, rest: &'r [u8]) -> Reader<'r> {
        Reader { rest, time }
    }

    /// The last time that was read.
    pub fn time(&self) -> Time {
        self.time
    }

    /// Bytes that are not read yet: 0 at the end of a record that is whole.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    fn entry(&mut self, rest: &mut &'r [u8]) -> Option<Entry<'r>> {
        let tag = byte(rest)?;
        Some(match tag {
            0x01 => Entry::Run(self.later(rest)?),
            0x02 => Entry::Run(Time(u64::from_le_bytes(take(rest)?))),
            0x03 => Entry::Clock(self.later(rest)?),
            0x04 => Entry::Clock(Time(u64::from_le_bytes(take(rest)?))),
            0x05 => Entry::Ran(u32::from_le_bytes(take(rest)?)),
            0x06 => Entry::Took { count: u16::from_le_bytes(take(rest)?), places: None },
            0x07 => {
                let count = u16::from_le_bytes(take(rest)?);
                Entry::Took { count, places: Some(bytes(rest, 2 * usize::from(count))?) }
            }
            0x08 => done(rest, &[], false)?,
            0x09 => done(rest, &[], true)?,
            0x0a => {
                let len = u32::from_le_bytes(take(rest)?);
                let brought = bytes(rest, len as usize)?;
                match byte(rest)? {
                    0x08 => done(rest, brought, false)?,
                    0x09 => done(rest, brought, true)?,
                    _ => return None,
                }
            }
            0x0b => Entry::Polled(byte(rest)?),
            0x0c => {
                let which = byte(rest)?;
                Entry::Called { which, node: u32::from_le_bytes(take(rest)?) }
            }
            0x0d => {
                if byte(rest)? == 0 {
                    return Some(Entry::Attached(None));
                }
                let mut number = || Some(u32::from_le_bytes(take(rest)?));
                let (request_align, memory_align, hole_align) = (number()?, number()?, number()?);
                let (len, flags) = (u64::from_le_bytes(take(rest)?), byte(rest)?);
                let (can_grow, knows_holes) = (flags & 1 != 0, flags & 2 != 0);
                Entry::Attached(Some(FileInfo {
                    request_align,
                    memory_align,
                    hole_align,
                    len,
                    can_grow,
                    knows_holes,
                }))
            }
            0x35 => Entry::Detached(FileId(u32::from_le_bytes(take(rest)?))),
            0x36 => Entry::Region(u64::from_le_bytes(take(rest)?)),
            0x37 => Entry::Added,
            0x0e => {
                let (node, count) =
                    (u32::from_le_bytes(take(rest)?), u32::from_le_bytes(take(rest)?));
                let requests = bytes(rest, (count as usize).checked_mul(4)?)?;
                Entry::Abandoned { node, requests }
            }
            0x0f => {
                let (node, has) = (u32::from_le_bytes(take(rest)?), byte(rest)?);
                let mut number = || Some(u64::from_le_bytes(take(rest)?));
                let (bytes, requests) = (number()?, number()?);
                let burst = Duration::from_nanos(number()?);
                let bytes = (has & 2 != 0).then_some(bytes);
                let requests = (has & 4 != 0).then_some(requests);
                let rate = (has & 1 != 0).then_some(Rate { bytes, requests, burst });
                Entry::Rated { node, rate }
            }
            0x30 => {
                let (source, target) =
                    (u32::from_le_bytes(take(rest)?), u32::from_le_bytes(take(rest)?));
                let mut copy = [0; COPY_NUMBERS];
                for number in &mut copy {
                    *number = u64::from_le_bytes(take(rest)?);
                }
                let count = u32::from_le_bytes(take(rest)?) as usize;
                let parts = match count.checked_sub(1) {
                    Some(count) => Some(bytes(rest, count.checked_mul(16)?)?),
                    None => None,
                };
                Entry::Started { copy, source, target, parts }
            }
            0x31 => Entry::Job { what: byte(rest)?, job: u32::from_le_bytes(take(rest)?) },
            0x32 => {
                let sectors = u32::from_le_bytes(take(rest)?);
                Entry::Zeros { sectors, bits: bytes(rest, sectors.div_ceil(8) as usize)? }
            }
            0x34 => {
                let (node, most) =
                    (u32::from_le_bytes(take(rest)?), u32::from_le_bytes(take(rest)?));
                let requests_max = (most != u32::MAX).then_some(most as usize);
                Entry::Quota { node, requests_max }
            }
            0x33 => {
                let count = byte(rest)?;
                Entry::Whole(bytes(rest, 4 * usize::from(count))?)
            }
            0x10..=0x1f | 0x50..=0x5f => {
                let kind = kind_of(tag & 0xf)?;
                let which = byte(rest)?;
                let (node, memory) = (u32::from(which & 63), which >> 6);
                let offset = u64::from(u32::from_le_bytes(take(rest)?)) << 9;
                let len = u64::from(u16::from_le_bytes(take(rest)?)) << 9;
                let lent = lent(memory, 0)?;
                let bytes = if lent == Lent::Nothing { 0 } else { len };
                Entry::Submitted {
                    polled: tag & 0x40 != 0,
                    node,
                    io: Io { kind, offset, len },
                    lent,
                    bytes,
                }
            }
            0x20..=0x2f => {
                let kind = kind_of(tag & 0xf)?;
                let (node, memory) = (u32::from_le_bytes(take(rest)?), byte(rest)?);
                let lent = lent(memory, u16::from_le_bytes(take(rest)?))?;
                let mut number = || Some(u64::from_le_bytes(take(rest)?));
                let io = Io { kind, offset: number()?, len: number()? };
                Entry::Submitted { polled: false, node, io, lent, bytes: number()? }
            }
            _ => return None,
        })
    }

    fn later(&self, rest: &mut &'r [u8]) -> Option<Time> {
        let delta = i32::from_le_bytes(take(rest)?);
        Some(Time(self.time.0.wrapping_add_signed(delta.into())))
    }
}

impl<'r> Iterator for Reader<'r> {
    type Item = Entry<'r>;

    fn next(&mut self) -> Option<Entry<'r>> {
        let mut rest = self.rest;
        let entry = self.entry(&mut rest)?;
        if let Entry::Run(time) | Entry::Clock(time) = entry {
            self.time = time;
        }
        self.rest = rest;
        Some(entry)
    }
}

fn bytes<'r>(rest: &mut &'r [u8], len: usize) -> Option<&'r [u8]> {
    let (bytes, behind) = rest.split_at_checked(len)?;
    *rest = behind;
    Some(bytes)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    bytes(rest, N)?.try_into().ok()
}

fn byte(rest: &mut &[u8]) -> Option<u8> {
    take::<1>(rest).map(|[byte]| byte)
}

fn done<'r>(rest: &mut &'r [u8], brought: &'r [u8], is_odd: bool) -> Option<Entry<'r>> {
    let op = OpId(u32::from_le_bytes(take(rest)?));
    let answer = if is_odd { Some(i64::from_le_bytes(take(rest)?)) } else { None };
    Some(Entry::Done { op, answer, brought })
}

fn lent(code: u8, bits: u16) -> Option<Lent> {
    Some(match code {
        0 => Lent::Nothing,
        1 => Lent::Buffer,
        2 | 3 => Lent::Ram { read_only: code == 3, bits },
        _ => return None,
    })
}

#[cfg(all(test, feature = "contract"))]
mod tests {
    use std::fs;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::contract::{BLOCK, Bench, FILE, Rig, pattern, pool, read, write};
    use crate::sys::disk::{DiskFile, DiskOptions};
    use crate::sys::inline::Inline;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>, bool);

    impl Sink for Kept {
        fn take(&mut self, mut chunk: Vec<u8>) -> Option<Vec<u8>> {
            self.0.lock().expect("not poisoned").append(&mut chunk);
            (!self.1).then_some(chunk)
        }
    }

    struct Disk(tempfile::TempDir, Kept);

    impl Rig for Disk {
        type Backend = Recorder<Inline>;
        fn make(&mut self, contents: &[u8]) -> (Self::Backend, FileInfo) {
            let path = self.0.path().join("file");
            fs::write(&path, contents).expect("a file");
            let options = DiskOptions { write: true, ..DiskOptions::default() };
            let file = DiskFile::open(path, &options).expect("it opens");
            let mut backend = Recorder::new(Inline::new());
            let info = backend.attach(FILE, file).expect("it attaches");
            backend.start(Box::new(self.1.clone()));
            (backend, info)
        }
        fn contents(&mut self, _: &mut Self::Backend) -> Vec<u8> {
            fs::read(self.0.path().join("file")).expect("a file")
        }
    }

    fn disk() -> Disk {
        Disk(tempfile::tempdir().expect("a folder"), Kept::default())
    }

    #[test]
    fn keeps_the_contract() {
        crate::contract::run_all(&mut disk());
    }

    #[test]
    fn what_is_written_down_is_read_again() {
        let mut disk = disk();
        let mut bench = Bench::new(&mut disk, &pattern(4, 1));
        let good = bench.push(write(1, pool(0, 0, 1)));
        bench.drain();
        let short = bench.push(read(3, pool(0, 0, 2)));
        bench.drain();
        let (node, aligned) = (NodeId::default(), Io::write(4096, 8192));
        let odd = Io { kind: IoKind::Zero { unmap: true, fua: false }, offset: 5, len: 1 << 40 };
        for note in [
            Note::Run(Time(5_000_000_000)),
            Note::Clock(Time(5_000_000_700)),
            Note::Submitted { node, io: &aligned, mem: &crate::mem::Buf::zeroed(8192).into() },
            Note::Submitted { node, io: &odd, mem: &Mem::None },
            Note::Submitted {
                node,
                io: &Io::read(0, 512),
                mem: &Mem::Ram(crate::sys::ram::Ram::standing_in(512, 0x208)),
            },
            Note::Called(Called::Close(node)),
            Note::Called(Called::Detach(FileId(7))),
            Note::Called(Called::Region(65536)),
            Note::Called(Called::Add),
            Note::Polled(Ok(())),
            Note::Polled(Err(Errno::IO)),
            Note::Called(Called::Drain),
            Note::Polled(Ok(())),
            Note::Submitted { node, io: &aligned, mem: &crate::mem::Buf::zeroed(8192).into() },
            Note::Ran,
        ] {
            bench.backend.note(note);
        }
        bench.backend.stop();
        assert!(!bench.backend.is_recording());
        let record = disk.1.0.lock().expect("not poisoned").clone();
        let mut reader = Reader::new(&record);
        let entries: Vec<Entry<'_>> = reader.by_ref().collect();
        assert_eq!(reader.left(), 0);
        let took = Entry::Took { count: 1, places: None };
        let (lent, none) = (Lent::Buffer, Lent::Nothing);
        let bits = Lent::Ram { read_only: false, bits: 0x208 };
        let Some(Entry::Ran(sum)) = entries.last().copied() else { panic!("{entries:?}") };
        assert_eq!(
            entries,
            [
                took,
                Entry::Whole(&good.0.to_le_bytes()),
                took,
                Entry::Done { op: short, answer: Some(BLOCK as i64), brought: &[] },
                Entry::Run(Time(5_000_000_000)),
                Entry::Clock(Time(5_000_000_700)),
                Entry::Submitted { polled: false, node: 0, io: aligned, lent, bytes: 8192 },
                Entry::Submitted { polled: false, node: 0, io: odd, lent: none, bytes: 0 },
                Entry::Submitted {
                    polled: false,
                    node: 0,
                    io: Io::read(0, 512),
                    lent: bits,
                    bytes: 512
                },
                Entry::Called { which: 2, node: 0 },
                Entry::Detached(FileId(7)),
                Entry::Region(65536),
                Entry::Added,
                Entry::Polled(2),
                Entry::Called { which: 0, node: 0 },
                Entry::Submitted { polled: true, node: 0, io: aligned, lent, bytes: 8192 },
                Entry::Ran(sum),
            ]
        );
        // It may end anywhere: what is there is read as before.
        for len in 0..record.len() {
            let some: Vec<Entry<'_>> = Reader::new(&record[..len]).collect();
            assert!(some.len() < entries.len() && entries.starts_with(&some), "{len}");
        }
    }

    #[test]
    fn a_sink_without_room_ends_it() {
        let mut disk = Disk(tempfile::tempdir().expect("a folder"), Kept(Arc::default(), true));
        let (mut backend, _) = disk.make(&pattern(1, 1));
        let before = backend.note_until_full();
        assert!(before >= CHUNK as u64 / 12 && !backend.is_recording());
        assert!(disk.1.0.lock().expect("not poisoned").len() >= CHUNK);
    }

    impl Recorder<Inline> {
        /// Runs, until no more is recorded; answers how many.
        fn note_until_full(&mut self) -> u64 {
            for n in 1.. {
                self.note(Note::Run(Time(n * 1000)));
                self.note(Note::Ran);
                if !self.is_recording() {
                    return n;
                }
            }
            0
        }
    }
}
