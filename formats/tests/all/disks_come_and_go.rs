//! Disks come and go in an engine that runs: each is attached, closed, paused and resumed while others
//! work, nobody waits for one whose storage hangs, and nothing is left of those that are gone.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use crate::common::drive::{check, folder, is_readable, make, make_with};
use crate::common::shadow::Rng;
use crate::common::{have_qemu, ok};
use cowbell_engine::backend::{Backend, Completion, FileInfo, Harvest, Submission};
use cowbell_engine::faulty::{Fault, Faulty, What};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::Target;
use cowbell_engine::step::{Driver, Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, FileId, NodeId, OpId, Time};
use cowbell_engine::{Engine, Limits, NodeEvent, Why};
use cowbell_formats::{
    Chain, CreateOptions, DiskHost, Format, Node, OpenOptions, Policy, RunOptions, attach,
    attach_overlay, map, open,
};

const FORMATS: [Format; 5] = [Format::Raw, Format::Qed, Format::Qcow2, Format::Vmdk, Format::Vdi];
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 1024;
const SIZE: u64 = BLOCK * BLOCKS;
const DEPTH: usize = 64;

/// A backend whose files may hang: what is asked of them does not come back until they are mended, and
/// then it has failed.
struct Hangs<B> {
    inner: B,
    hung: Vec<FileId>,
    kept: Vec<OpId>,
}

impl<B> Hangs<B> {
    fn new(inner: B) -> Hangs<B> {
        Hangs { inner, hung: Vec::new(), kept: Vec::new() }
    }
}

impl<B: Backend> Backend for Hangs<B> {
    type File = B::File;

    fn attach(&mut self, id: FileId, file: B::File) -> io::Result<FileInfo> {
        self.inner.attach(id, file)
    }

    fn detach(&mut self, id: FileId) -> Option<B::File> {
        self.inner.detach(id)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        let Hangs { hung, kept, inner } = self;
        submission.take_if(|id, record| {
            let hangs = matches!(record.op.target, Target::File(file) if hung.contains(&file));
            if hangs {
                kept.push(id);
            }
            hangs
        });
        inner.submit(submission);
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        self.inner.harvest(harvest);
        if self.hung.is_empty() {
            let failed = self.kept.drain(..).map(|op| Completion::new(op, Err(Errno::IO)));
            harvest.done.extend(failed);
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event_fd()
    }

    fn wants_retry(&self) -> bool {
        self.hung.is_empty() && !self.kept.is_empty() || self.inner.wants_retry()
    }

    fn next_deadline(&self) -> Option<Time> {
        self.inner.next_deadline()
    }

    fn clock(&self) -> Time {
        self.inner.clock()
    }
}

fn options(format: Format, write: bool) -> OpenOptions {
    let (backing, force_share) = (Policy::SameDirectory, !write);
    OpenOptions { format: Some(format), write, backing, force_share, ..OpenOptions::default() }
}

fn chain(path: &Path, format: Format, direct: bool) -> Chain<DiskFile> {
    open(&DiskHost { direct }, path, &options(format, true)).expect("it opens")
}

/// The engine's files that a node uses.
fn files_of<B: Backend>(engine: &Engine<Node, B>, node: NodeId) -> Vec<FileId> {
    let all = (0..64).map(FileId);
    all.filter(|&file| engine.node(node).uses(file)).collect()
}

/// Is the image on disk clean, and does it hold these bytes?
fn holds(path: &Path, format: Format, bytes: &[u8]) {
    assert_eq!(check(path, format), (0, 0), "{format}");
    let chain = open(&DiskHost::default(), path, &options(format, false)).expect("it opens");
    let mut found = vec![0; bytes.len()];
    map::read(&chain, 0, &mut found).expect("it reads");
    let differs = found.iter().zip(bytes).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{format}");
    if format != Format::Raw && have_qemu() {
        let folder = path.parent().expect("a folder");
        ok(folder, &format!("qemu-img check -q -f {format} '{}'", path.display()));
    }
}

/// What a block of a disk is waited for.
#[derive(Clone, Copy)]
enum Pending {
    Read,
    /// From where in the block, how many bytes, and of what.
    Write(usize, usize, u8),
}

/// A disk at work, and what is on it.
struct Disk {
    path: PathBuf,
    format: Format,
    node: NodeId,
    model: Vec<u8>,
    pending: Vec<Option<Pending>>,
    in_flight: usize,
    ended: u64,
    /// Submits requests.
    goes: bool,
}

impl Disk {
    fn new(path: PathBuf, format: Format, node: NodeId) -> Disk {
        let (model, pending) = (vec![0; SIZE as usize], vec![None; BLOCKS as usize]);
        Disk { path, format, node, model, pending, in_flight: 0, ended: 0, goes: true }
    }

    /// Submits until there are as many as may be.
    fn fill<B: Backend>(&mut self, engine: &mut Engine<Node, B>, which: usize, rng: &mut Rng) {
        while self.goes && self.in_flight < DEPTH {
            let block = rng.below(BLOCKS) as usize;
            if self.pending[block].is_some() {
                continue;
            }
            let at = block as u64 * BLOCK;
            let byte = 1 + rng.below(255) as u8;
            let (io, mem, pending): (Io, Mem, Pending) = match rng.below(16) {
                0..6 => (Io::read(at, BLOCK), Buf::zeroed(BLOCK as usize).into(), Pending::Read),
                // Read, changed, written back.
                6 => {
                    let (from, len) = (rng.below(BLOCK / 2), 1 + rng.below(BLOCK / 2));
                    let mem = Buf::copied(&vec![byte; len as usize]).into();
                    let pending = Pending::Write(from as usize, len as usize, byte);
                    (Io::write(at + from, len), mem, pending)
                }
                7 => {
                    let kind = IoKind::Zero { unmap: false, fua: false };
                    let pending = Pending::Write(0, BLOCK as usize, 0);
                    (Io { kind, offset: at, len: BLOCK }, Mem::None, pending)
                }
                _ => {
                    let mem = Buf::copied(&vec![byte; BLOCK as usize]).into();
                    (Io::write(at, BLOCK), mem, Pending::Write(0, BLOCK as usize, byte))
                }
            };
            let tag = (which as u64) << 32 | block as u64;
            engine.submit(self.node, io, mem, tag).expect("there is room: each has its quota");
            self.pending[block] = Some(pending);
            self.in_flight += 1;
        }
    }

    fn end(&mut self, block: usize, result: Result<(), Errno>, mem: Mem) {
        let pending = self.pending[block].take().expect("it was asked for");
        (self.in_flight, self.ended) = (self.in_flight - 1, self.ended + 1);
        let its = &mut self.model[block * BLOCK as usize..][..BLOCK as usize];
        match (pending, result) {
            (_, Err(errno)) => assert_eq!(errno, Errno::IO, "only where the storage hung"),
            (Pending::Read, Ok(())) => {
                let read = mem.into_buf().expect("its own");
                assert!(*read == *its, "{} block {block}", self.format);
            }
            (Pending::Write(from, len, byte), Ok(())) => its[from..from + len].fill(byte),
        }
    }
}

/// An engine with disks at work.
struct Host4<B: Backend> {
    engine: Engine<Node, B>,
    disks: Vec<Disk>,
    rng: Rng,
    events: Vec<NodeEvent>,
}

impl<B: Backend<File = DiskFile>> Host4<B> {
    fn turn(&mut self) {
        for (which, disk) in self.disks.iter_mut().enumerate() {
            disk.fill(&mut self.engine, which, &mut self.rng);
        }
        let again = self.engine.run(clock()).again;
        let mut any = false;
        while let Some(done) = self.engine.poll() {
            let (which, block) = ((done.tag >> 32) as usize, done.tag as u32 as usize);
            self.disks[which].end(block, done.result, done.mem);
            any = true;
        }
        while let Some(event) = self.engine.poll_event() {
            self.events.push(event);
            any = true;
        }
        assert!(again || any || is_readable(&self.engine, 20_000), "{:?}", self.engine);
    }

    /// Until these have each ended so many more requests.
    fn work(&mut self, disks: &[usize], requests: u64) {
        let goals: Vec<u64> = disks.iter().map(|&at| self.disks[at].ended + requests).collect();
        while disks.iter().zip(&goals).any(|(&at, &goal)| self.disks[at].ended < goal) {
            self.turn();
        }
    }

    /// Until it comes.
    fn event(&mut self, wanted: NodeEvent) {
        while !self.events.contains(&wanted) {
            self.turn();
        }
        self.events.retain(|event| *event != wanted);
    }

    fn attach(&mut self, path: &Path, chain: Chain<DiskFile>) -> usize {
        let format = chain.layers[0].format;
        let run = RunOptions { quota: Some(DEPTH), trust_probed: true, ..RunOptions::default() };
        let node = attach(&mut self.engine, chain, &run).expect("it attaches");
        self.disks.push(Disk::new(path.to_path_buf(), format, node));
        self.disks.len() - 1
    }

    fn refuses(&mut self, node: NodeId, why: Why) {
        let refused = self.engine.submit(node, Io::flush(), Mem::None, 0).expect_err("not taken");
        assert_eq!(refused.why, why);
    }
}

#[test]
fn others_neither_wait_nor_notice() {
    let folder = folder();
    let limits = Limits { requests: 5 * DEPTH, ..Limits::default() };
    let backend = Hangs::new(Aio::new(AioOptions::default()).expect("native AIO"));
    let mut host = Host4 {
        engine: Engine::new(backend, limits),
        disks: Vec::new(),
        rng: Rng(7),
        events: Vec::new(),
    };
    // An overlay, so that what hangs holds buffers for copying.
    make(&folder.path().join("base"), Format::Raw, SIZE);
    let hanging = CreateOptions {
        backing_file: Some("base".into()),
        backing_format: Some(Format::Raw),
        ..CreateOptions::default()
    };
    let [a, b, c, hung] =
        [("a", Format::Qcow2), ("b", Format::Vmdk), ("c", Format::Qed), ("hung", Format::Qcow2)]
            .map(|(name, format)| {
                let path = folder.path().join(name);
                match name {
                    "hung" => make_with(&path, format, &hanging),
                    _ => make(&path, format, SIZE),
                }
                let chain = chain(&path, format, true);
                host.attach(&path, chain)
            });
    let node = |host: &Host4<_>, at: usize| host.disks[at].node;

    host.work(&[a, b, c, hung], 500);
    let files = files_of(&host.engine, node(&host, hung));
    host.engine.backend_mut().hung = files;
    host.work(&[a, b, c], 1000);
    assert!(host.disks[hung].in_flight > 0, "it hangs");

    // One is closed at work, and one that hangs: that one stays.
    host.disks[hung].goes = false;
    host.disks[c].goes = false;
    assert!(host.disks[c].in_flight > 0);
    assert_eq!(host.engine.close(node(&host, hung)), Ok(()));
    assert_eq!(host.engine.close(node(&host, c)), Ok(()));
    assert_eq!(host.engine.close(node(&host, c)), Err(Why::Closing));
    let gone = node(&host, c);
    host.refuses(gone, Why::Closing);
    host.event(NodeEvent::Closed { node: gone, result: Ok(()) });
    assert_eq!(host.disks[c].in_flight, 0);
    assert_eq!(host.engine.take_files(gone).len(), 1);
    host.refuses(gone, Why::NoSuchNode);
    assert_eq!(host.engine.close(gone), Err(Why::NoSuchNode));
    holds(&host.disks[c].path, Format::Qed, &host.disks[c].model);
    host.work(&[a, b], 500);

    // Another comes, opened beside the loop. It has the place of the one that is gone, not its id.
    let path = folder.path().join("d");
    let opened = {
        let path = path.clone();
        std::thread::spawn(move || {
            make(&path, Format::Raw, SIZE);
            chain(&path, Format::Raw, true)
        })
    };
    while !opened.is_finished() {
        host.turn();
    }
    let d = host.attach(&path, opened.join().expect("it was opened"));
    assert_eq!(node(&host, d).index(), gone.index());
    host.refuses(gone, Why::NoSuchNode);
    host.work(&[a, b, d], 1000);

    // One is paused: its files lie still. Then it goes on.
    let paused = node(&host, b);
    host.disks[b].goes = false;
    assert_eq!(host.engine.pause(paused), Ok(()));
    host.refuses(paused, Why::Paused);
    host.event(NodeEvent::Paused { node: paused });
    assert!(host.engine.is_quiet(paused) && host.disks[b].in_flight == 0);
    let before = std::fs::read(&host.disks[b].path).expect("read");
    host.work(&[a, d], 1000);
    assert!(std::fs::read(&host.disks[b].path).expect("read") == before, "it is paused");
    assert_eq!(host.engine.resume(paused), Ok(()));
    host.disks[b].goes = true;
    host.work(&[a, b, d], 500);

    // What hung fails at last. Whoever closed it is told.
    assert!(host.disks[hung].in_flight > 0 && !host.engine.is_quiet(node(&host, hung)));
    assert!(host.events.is_empty(), "{:?}", host.events);
    host.engine.backend_mut().hung.clear();
    let hung_node = node(&host, hung);
    while host.events.is_empty() {
        host.turn();
    }
    let event = host.events.pop().expect("one");
    let is_told = matches!(event, NodeEvent::Closed { node, .. } if node == hung_node);
    assert!(is_told && host.disks[hung].in_flight == 0, "{event:?}");
    assert_eq!(check(&host.disks[hung].path, Format::Qcow2).0, 0);

    for at in [a, b, d] {
        host.disks[at].goes = false;
        let node = node(&host, at);
        assert_eq!(host.engine.close(node), Ok(()));
        host.event(NodeEvent::Closed { node, result: Ok(()) });
        drop(host.engine.take_files(node));
        holds(&host.disks[at].path, host.disks[at].format, &host.disks[at].model);
    }
    host.engine.assert_idle();
}

/// Runs until the event comes that says how it was closed.
fn close<B: Backend>(engine: &mut Engine<Node, B>, node: NodeId) -> Result<(), Errno> {
    assert_eq!(engine.close(node), Ok(()));
    loop {
        engine.run(clock());
        while engine.poll().is_some() {}
        if let Some(event) = engine.poll_event() {
            let NodeEvent::Closed { node: closed, result } = event else { panic!("{event:?}") };
            assert_eq!(closed, node);
            return result;
        }
    }
}

fn write<B: Backend>(engine: &mut Engine<Node, B>, node: NodeId, at: u64, byte: u8) {
    let mem = Buf::copied(&[byte; BLOCK as usize]);
    engine.submit(node, Io::write(at, BLOCK), mem, 0).expect("room");
}

#[test]
fn a_thousand_disks_leave_nothing_behind() {
    let folder = folder();
    let limits = Limits { requests: 8, ops: 16, ..Limits::default() };
    let mut engine: Engine<Node, _> = Engine::new(Inline::new(), limits);
    let paths = FORMATS.map(|format| {
        let path = folder.path().join(format.name());
        make(&path, format, SIZE);
        path
    });
    let stays = folder.path().join("stays");
    make(&stays, Format::Qcow2, SIZE);
    let stays = attach(&mut engine, chain(&stays, Format::Qcow2, false), &RunOptions::default());
    let stays = stays.expect("it attaches");
    let mut last = None;
    let mut rounds = |engine: &mut Engine<Node, _>, count: usize| {
        for round in 0..count {
            for (path, format) in paths.iter().zip(FORMATS) {
                let chain = chain(path, format, false);
                let node = attach(engine, chain, &RunOptions::default()).expect("it attaches");
                assert!(node.index() < 2, "places are used again: {node:?}");
                assert!(last.is_none_or(|last| node > last), "ids are not: {node:?}, {last:?}");
                last = Some(node);
                write(engine, node, round as u64 % BLOCKS * BLOCK, 7);
                write(engine, stays, round as u64 % BLOCKS * BLOCK, 7);
                assert_eq!(close(engine, node), Ok(()), "{format}");
            }
        }
    };
    rounds(&mut engine, 10);
    let (regions, slots) = (engine.memory().region_count(), engine.ops().places());
    let counted = allocation_counter::measure(|| rounds(&mut engine, 250));
    assert_eq!(counted.bytes_current, 0, "{counted:?}");
    assert_eq!((engine.memory().region_count(), engine.ops().places()), (regions, slots));
    assert_eq!(close(&mut engine, stays), Ok(()));
    engine.assert_idle();
}

fn engine_of<B: Backend>(backend: B, requests: usize) -> Engine<Node, B> {
    Engine::new(backend, Limits { requests, ..Limits::default() })
}

/// Runs until nothing of the guests' is in flight; how they ended.
fn settle<B: Backend>(engine: &mut Engine<Node, B>) -> Vec<Result<(), Errno>> {
    let mut results = Vec::new();
    while engine.in_flight() > 0 {
        engine.run(clock());
        results.extend(std::iter::from_fn(|| engine.poll()).map(|done| done.result));
    }
    results
}

fn read<B: Backend>(engine: &mut Engine<Node, B>, node: NodeId, at: u64) -> u8 {
    let mem = Buf::zeroed(BLOCK as usize);
    engine.submit(node, Io::read(at, BLOCK), mem, 0).expect("room");
    loop {
        engine.run(clock());
        if let Some(done) = engine.poll() {
            assert_eq!(done.result, Ok(()));
            let bytes = done.mem.into_buf().expect("its own");
            assert!(bytes.iter().all(|&byte| byte == bytes[0]));
            return bytes[0];
        }
    }
}

#[test]
fn a_base_stays_until_its_last_overlay_goes() {
    let folder = folder();
    let base = folder.path().join("base");
    make(&base, Format::Qcow2, SIZE);
    let mut engine = engine_of(Inline::new(), 8);
    let run = RunOptions::default();
    let node = attach(&mut engine, chain(&base, Format::Qcow2, false), &run).expect("it attaches");
    write(&mut engine, node, 0, 5);
    assert_eq!(close(&mut engine, node), Ok(()));
    drop(engine.take_files(node));
    let read_only = open(&DiskHost::default(), &base, &options(Format::Qcow2, false));
    let below = attach(&mut engine, read_only.expect("it opens"), &run).expect("it attaches");
    let [first, second] = ["first", "second"].map(|name| {
        let path = folder.path().join(name);
        let over = CreateOptions {
            backing_file: Some("base".into()),
            backing_format: Some(Format::Qcow2),
            ..CreateOptions::default()
        };
        make_with(&path, Format::Qcow2, &over);
        let mut chain = chain(&path, Format::Qcow2, false);
        chain.layers.truncate(1);
        attach_overlay(&mut engine, chain, below, &run).expect("it attaches")
    });
    assert_eq!(engine.close(below), Err(Why::InUse));
    assert_eq!(read(&mut engine, first, 0), 5);
    write(&mut engine, first, 0, 6);
    assert_eq!(close(&mut engine, first), Ok(()));
    assert_eq!(engine.take_files(first).len(), 1, "the base is the other's still");
    assert!(engine.has(below));
    assert_eq!(read(&mut engine, second, 0), 5);
    assert_eq!(close(&mut engine, second), Ok(()));
    assert_eq!(engine.take_files(second).len(), 2, "and went with it");
    assert!(!engine.has(below));
    let path = folder.path().join("first");
    let over = chain(&path, Format::Qcow2, false);
    let why = attach_overlay(&mut engine, over, below, &run).expect_err("the base is gone");
    assert_eq!(why.kind(), io::ErrorKind::InvalidInput);
    engine.assert_idle();
}

/// A disk whose first block holds sevens, in an engine whose backend can be made to fail.
fn written(path: &Path, format: Format) -> (Engine<Node, Faulty<Inline>>, NodeId) {
    make(path, format, SIZE);
    let mut engine = engine_of(Faulty::new(Inline::new()), 8);
    let run = RunOptions::default();
    let node = attach(&mut engine, chain(path, format, false), &run).expect("it attaches");
    write(&mut engine, node, 0, 7);
    assert_eq!(settle(&mut engine), [Ok(())]);
    (engine, node)
}

#[test]
fn what_could_not_be_written_is_told() {
    let folder = folder();
    for format in [Format::Qed, Format::Qcow2, Format::Vmdk, Format::Vdi] {
        let path = folder.path().join(format.name());
        let (mut engine, node) = written(&path, format);
        let fault = Fault { what: Some(What::Flush), ..Fault::default() };
        engine.backend_mut().plan_mut().push(fault);
        assert_eq!(close(&mut engine, node), Err(Errno::IO), "{format}");
        assert!(!engine.has(node), "it goes all the same");
        assert_eq!(engine.take_files(node).len(), 1);
        engine.assert_idle();
    }
}

/// Refuses the file after so many.
struct Refuses(Inline, u32);

impl Backend for Refuses {
    type File = DiskFile;
    fn attach(&mut self, id: FileId, file: DiskFile) -> io::Result<FileInfo> {
        if self.1 == 0 {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.1 -= 1;
        self.0.attach(id, file)
    }
    fn detach(&mut self, id: FileId) -> Option<DiskFile> {
        self.0.detach(id)
    }
    fn submit(&mut self, submission: &mut Submission<'_>) {
        self.0.submit(submission);
    }
    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        self.0.harvest(harvest);
    }
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.event_fd()
    }
    fn next_deadline(&self) -> Option<Time> {
        self.0.next_deadline()
    }
    fn clock(&self) -> Time {
        self.0.clock()
    }
}

#[test]
fn an_attach_that_fails_leaves_nothing() {
    let folder = folder();
    make(&folder.path().join("base"), Format::Raw, SIZE);
    let path = folder.path().join("top");
    let over = CreateOptions {
        backing_file: Some("base".into()),
        backing_format: Some(Format::Raw),
        ..CreateOptions::default()
    };
    make_with(&path, Format::Qcow2, &over);
    let mut engine = engine_of(Refuses(Inline::new(), 1), 8);
    let run = RunOptions::default();
    let counted = allocation_counter::measure(|| {
        let chain = chain(&path, Format::Qcow2, false);
        let why = attach(&mut engine, chain, &run).expect_err("the second file is refused");
        assert_eq!(why.kind(), io::ErrorKind::OutOfMemory);
    });
    // The tables of files, which grew: no buffers, no caches.
    assert!(counted.bytes_current < 16 << 10, "{counted:?}");
    engine.backend_mut().1 = 8;
    let node = attach(&mut engine, chain(&path, Format::Qcow2, false), &run).expect("it attaches");
    assert_eq!(read(&mut engine, node, 0), 0);
    assert_eq!(close(&mut engine, node), Ok(()));
    assert_eq!(engine.take_files(node).len(), 2);
}

#[test]
fn a_quota_is_full_for_one_disk_alone() {
    let folder = folder();
    let mut engine = engine_of(Inline::new(), 8);
    let [bounded, free] = ["a", "b"].map(|name| {
        let path = folder.path().join(name);
        make(&path, Format::Raw, SIZE);
        let quota = (name == "a").then_some(3);
        let run = RunOptions { quota, ..RunOptions::default() };
        attach(&mut engine, chain(&path, Format::Raw, false), &run).expect("it attaches")
    });
    let full = |engine: &mut Engine<Node, _>, node| {
        let refused = engine.submit(node, Io::flush(), Mem::None, 0).expect_err("it is full");
        assert_eq!(refused.why, Why::Full);
    };
    (0..3).for_each(|at| write(&mut engine, bounded, at * BLOCK, 1));
    full(&mut engine, bounded);
    (0..5).for_each(|at| write(&mut engine, free, at * BLOCK, 1));
    full(&mut engine, free);
    while engine.in_flight() > 0 {
        engine.run(clock());
    }
    assert_eq!(std::iter::from_fn(|| engine.poll()).count(), 8);
    (0..3).for_each(|at| write(&mut engine, bounded, at * BLOCK, 1));
    full(&mut engine, bounded);
    assert!(engine.set_quota(bounded, None));
    (3..8).for_each(|at| write(&mut engine, bounded, at * BLOCK, 1));
    full(&mut engine, bounded);
    while engine.in_flight() > 0 {
        engine.run(clock());
    }
    assert_eq!(std::iter::from_fn(|| engine.poll()).count(), 8);
    assert!(engine.set_quota(bounded, Some(0)));
    full(&mut engine, bounded);
}

#[test]
fn requests_are_counted_for_their_disk() {
    let folder = folder();
    let mut engine = engine_of(Inline::new(), 8);
    let disks = FORMATS.map(|format| {
        let path = folder.path().join(format.name());
        make(&path, format, SIZE);
        let run = RunOptions { trust_probed: true, ..RunOptions::default() };
        attach(&mut engine, chain(&path, format, false), &run).expect("it attaches")
    });
    let [_, _, one, other, _] = disks;
    for at in 0..4 {
        write(&mut engine, one, at * BLOCK, 1);
        write(&mut engine, other, at * BLOCK, 1);
    }
    while engine.in_flight() > 0 {
        engine.run(clock());
    }
    assert_eq!(std::iter::from_fn(|| engine.poll()).count(), 8);
    for at in 0..3 {
        assert_eq!(read(&mut engine, one, at * BLOCK), 1);
    }
    let beyond = Io::read(SIZE, BLOCK);
    engine.submit(one, beyond, Buf::zeroed(BLOCK as usize), 0).expect("room");
    assert_eq!(engine.poll().expect("at once").result, Err(Errno::INVALID));
    let stats = engine.node_stats(one).expect("it is there");
    assert_eq!((stats.requests, stats.failed), (8, 1));
    assert_eq!((stats.reads, stats.bytes_read), (3, 3 * BLOCK));
    assert_eq!((stats.writes, stats.bytes_written), (4, 4 * BLOCK));
    assert_eq!(stats.latency.count(), 8);
    let stats = engine.node_stats(other).expect("it is there");
    assert_eq!((stats.requests, stats.writes, stats.reads), (4, 4, 0));
    assert_eq!(engine.stats().latency.count(), 12);
    engine.reset_stats();
    assert_eq!(engine.node_stats(one).expect("it is there").requests, 0);
    assert_eq!(close(&mut engine, one), Ok(()));
    assert!(engine.node_stats(one).is_none());
}

#[test]
fn a_paused_disk_is_drained_and_closed_clean() {
    let folder = folder();
    for format in FORMATS {
        let path = folder.path().join(format.name());
        make(&path, format, SIZE);
        let mut engine = engine_of(Inline::new(), 8);
        let run = RunOptions::default();
        let node = attach(&mut engine, chain(&path, format, false), &run).expect("it attaches");
        write(&mut engine, node, 0, 7);
        assert_eq!(engine.pause(node), Ok(()));
        assert_eq!(engine.pause(node), Err(Why::Paused));
        assert_eq!(settle(&mut engine), [Ok(())]);
        engine.run(clock());
        assert_eq!(engine.poll_event(), Some(NodeEvent::Paused { node }));
        // Nothing becomes due.
        assert_eq!(engine.next_deadline(), None, "{format}");
        let still = std::fs::read(&path).expect("read");
        engine.run(Time(u64::MAX / 2));
        assert!(std::fs::read(&path).expect("read") == still);
        engine.drain();
        while engine.drained().is_none() {
            engine.run(clock());
        }
        assert_eq!(engine.drained(), Some(Ok(())));
        assert_eq!(check(&path, format), (0, 0), "{format}");
        let refused = engine.submit(node, Io::flush(), Mem::None, 0).expect_err("not taken");
        assert_eq!(refused.why, Why::Paused);
        assert_eq!(engine.resume(node), Ok(()));
        write(&mut engine, node, BLOCK, 8);
        assert_eq!(engine.pause(node), Ok(()));
        assert_eq!(close(&mut engine, node), Ok(()));
        let mut model = vec![0; SIZE as usize];
        model[..BLOCK as usize].fill(7);
        model[BLOCK as usize..2 * BLOCK as usize].fill(8);
        drop(engine.take_files(node));
        holds(&path, format, &model);
    }
}

/// What a drain had no room for is written when there is some: closing tries it once more.
#[test]
fn a_disk_that_could_not_be_drained_is_closed_clean() {
    let folder = folder();
    let mut failed = 0;
    for format in FORMATS {
        let path = folder.path().join(format.name());
        let (mut engine, node) = written(&path, format);
        let fault =
            Fault { what: Some(What::Write), errno: Some(Errno::NO_SPACE), ..Fault::default() };
        engine.backend_mut().plan_mut().push(fault);
        engine.drain();
        while engine.drained().is_none() {
            engine.run(clock());
        }
        failed += u32::from(engine.drained() == Some(Err(Errno::NO_SPACE)));
        engine.backend_mut().plan_mut().clear();
        assert_eq!(close(&mut engine, node), Ok(()), "{format}");
        assert_eq!(check(&path, format), (0, 0), "{format}");
        let mut model = vec![0; SIZE as usize];
        model[..BLOCK as usize].fill(7);
        drop(engine.take_files(node));
        holds(&path, format, &model);
    }
    assert!(failed >= 2, "{failed} drains have failed");
}
