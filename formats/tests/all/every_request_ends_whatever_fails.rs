//! Random requests over files that are real and a backend that fails: every kind of op, with every
//! error, once or for ever, done or not. Every request ends. What is read is what may be there, the
//! image is never corrupt, and what was flushed is there when it is opened again.
//!
//! More seeds, elsewhere: `COWBELL_SEEDS` is their number, `COWBELL_SEED` the first (1 if not said),
//! `COWBELL_TEST_DIR` a folder on the file system to try.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::common::drive::check;
use crate::common::have_qemu;
use crate::common::shadow::Rng;
use cowbell_engine::backend::Backend;
use cowbell_engine::faulty::{Fault, Faulty, What};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::units::{Errno, NodeId, Time};
use cowbell_engine::{Engine, Finished, Limits};
use cowbell_formats::parts::growth::Growth;
use cowbell_formats::qcow2::Qcow2Options;
use cowbell_formats::qed::QedOptions;
use cowbell_formats::vmdk::VmdkOptions;
use cowbell_formats::{
    CreateOptions, DiskHost, Format, Node, OpenOptions, RunOptions, attach, create, open, vdi,
};

const SIZE: u64 = 192 << 10;
/// Far more than any request needs.
const RUNS_MAX: usize = 20_000;
/// Requests at once.
const DEPTH: usize = 8;

/// The values that a byte may have.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Values([u64; 4]);

impl Values {
    fn only(value: u8) -> Values {
        let mut bits = [0; 4];
        bits[usize::from(value) / 64] = 1 << (value % 64);
        Values(bits)
    }

    fn has(&self, value: u8) -> bool {
        self.0[usize::from(value) / 64] >> (value % 64) & 1 == 1
    }

    fn add(&mut self, other: Values) {
        self.0.iter_mut().zip(other.0).for_each(|(bits, more)| *bits |= more);
    }
}

/// What each byte of the disk may be: as long as the image is open, and when it is opened again.
struct Shadow {
    now: Vec<Values>,
    later: Vec<Values>,
}

impl Shadow {
    /// The request `io`, which leaves `value`, has ended.
    fn ended(&mut self, io: &Io, value: u8, ok: bool) {
        let (range, new) = (io.offset as usize..io.end() as usize, Values::only(value));
        let certain = ok && io.kind != IoKind::Discard;
        let stable =
            matches!(io.kind, IoKind::Write { fua: true, .. } | IoKind::Zero { fua: true, .. });
        for at in range {
            self.now[at].add(new);
            self.later[at].add(new);
            if certain {
                self.now[at] = new;
            }
            if certain && stable {
                self.later[at] = new;
            }
        }
    }

    fn look(&mut self, offset: u64, bytes: &[u8], what: &str) {
        for (now, (i, &byte)) in
            self.now[offset as usize..].iter_mut().zip(bytes.iter().enumerate())
        {
            assert!(now.has(byte), "{what}: byte {} is {byte:#x}", offset as usize + i);
            // It stays what it is.
            *now = Values::only(byte);
        }
    }
}

/// A kind of image.
#[derive(Clone, Copy, Debug)]
struct Shape {
    format: Format,
    cluster: u64,
    extended: bool,
}

const fn shape(format: Format, cluster: u64) -> Shape {
    Shape { format, cluster, extended: false }
}

const SHAPES: [Shape; 7] = [
    shape(Format::Raw, 4096),
    shape(Format::Qed, 4096),
    shape(Format::Vmdk, 65536),
    shape(Format::Vdi, 4096),
    shape(Format::Qcow2, 512),
    shape(Format::Qcow2, 4096),
    Shape { extended: true, ..shape(Format::Qcow2, 16384) },
];

impl Shape {
    fn make(self, path: &Path) {
        let own = matches!(self.format, Format::Qed | Format::Qcow2 | Format::Vdi)
            .then_some(self.cluster);
        let options = CreateOptions {
            size: Some(SIZE),
            cluster_size: own,
            // QEMU refuses tables of one cluster, which it makes.
            table_size: (self.format == Format::Qed).then_some(2),
            extended_l2: self.extended.then_some(true),
            ..CreateOptions::default()
        };
        create(&DiskHost::default(), path, self.format, &options).expect("it is made");
    }
}

/// Little is kept, counted and grown ahead, so that every path is taken.
fn run_options(rng: &mut Rng) -> RunOptions {
    let growth = Growth { step_min: 4096, step_max: 65536, ..Growth::default() };
    let small = |rng: &mut Rng| 1 + rng.below(3);
    RunOptions {
        trust_probed: true,
        quota: None,
        vdi: vdi::VdiOptions { growth, writeback_after_ms: 5 },
        qed: QedOptions { cache_slices: 1, growth, unmark_after_ms: 5, writeback_after_ms: 5 },
        qcow2: Qcow2Options {
            cache_slices: 1 + rng.below(2) as usize,
            growth,
            reserve_min: small(rng),
            reserve_max: 4 * small(rng),
            frees_max: small(rng) as usize,
            writeback_depth: small(rng) as usize,
            ..Qcow2Options::default()
        },
        vmdk: VmdkOptions {
            cache_tables: 1,
            growth,
            writeback_after_ms: 5,
            entropy: Some(rng.next() as u32),
            ..VmdkOptions::default()
        },
    }
}

/// An open image under a faulty backend.
struct Disk<B: Backend> {
    engine: Engine<Node, Faulty<B>>,
    node: NodeId,
    now: Time,
}

impl<B: Backend<File = DiskFile>> Disk<B> {
    fn open(backend: B, path: &Path, shape: Shape, direct: bool, run: &RunOptions) -> Disk<B> {
        let format = Some(shape.format);
        let options = OpenOptions { format, write: true, ..OpenOptions::default() };
        let chain = open(&DiskHost { direct }, path, &options).expect("it opens");
        let limits = Limits { requests: DEPTH, ..Limits::default() };
        let mut engine = Engine::new(Faulty::new(backend), limits);
        let node = attach(&mut engine, chain, run).expect("it attaches");
        Disk { engine, node, now: Time(1) }
    }

    /// One turn of the loop. Time passes a millisecond at a time.
    fn turn(&mut self) -> Vec<Finished> {
        self.now = self.now.plus_ms(1);
        let again = self.engine.run(self.now).again;
        let finished: Vec<_> = std::iter::from_fn(|| self.engine.poll()).collect();
        if !again && finished.is_empty() && self.engine.fd().is_some() {
            crate::common::drive::is_readable(&self.engine, 1);
        }
        finished
    }

    /// All that `ios` say, at once; how each ended, and what it read.
    fn all(&mut self, ios: &[(Io, u8)]) -> Vec<(Result<(), Errno>, Mem)> {
        for (tag, &(io, value)) in ios.iter().enumerate() {
            let mem: Mem = match io.kind {
                IoKind::Read => Buf::zeroed(io.len as usize).into(),
                IoKind::Write { .. } => Buf::copied(&vec![value; io.len as usize]).into(),
                _ => Mem::None,
            };
            self.engine.submit(self.node, io, mem, tag as u64).expect("there is room");
        }
        let mut ended: Vec<_> = ios.iter().map(|_| None).collect();
        for _ in 0..RUNS_MAX {
            for done in self.turn() {
                let slot = &mut ended[done.tag as usize];
                assert!(slot.is_none(), "it ends once");
                *slot = Some((done.result, done.mem));
            }
            if ended.iter().all(Option::is_some) {
                return ended.into_iter().flatten().collect();
            }
        }
        let left: Vec<_> = ios.iter().zip(&ended).filter(|(_, end)| end.is_none()).collect();
        panic!(
            "after {RUNS_MAX} runs, not ended: {:?}",
            left.iter().map(|l| l.0.0).collect::<Vec<_>>()
        );
    }

    /// A few requests on ranges that do not overlap, or a flush alone.
    fn batch(&mut self, shape: Shape, rng: &mut Rng, shadow: &mut Shadow) -> bool {
        let mut ios: Vec<(Io, u8)> = Vec::new();
        let quiet = rng.below(5) == 0;
        for _ in 0..if quiet { 1 } else { 1 + rng.below(DEPTH as u64) } {
            let unit = [1, 512, 4096, shape.cluster][rng.below(4) as usize];
            let len = (1 + rng.below((3 * shape.cluster).min(40_000) / unit + 1)) * unit;
            let offset = rng.below((SIZE - len) / unit + 1) * unit;
            let kind = match rng.below(if quiet { 1 } else { 12 }) {
                0 => IoKind::Flush,
                1..4 => IoKind::Read,
                4..8 => IoKind::Write { fua: rng.below(6) == 0, compressed: rng.below(4) == 0 },
                8..10 => IoKind::Zero { unmap: rng.below(2) == 0, fua: rng.below(6) == 0 },
                _ => IoKind::Discard,
            };
            if kind == IoKind::Flush {
                ios.push((Io { kind, offset: 0, len: 0 }, 0));
                continue;
            }
            let io = Io { kind, offset, len };
            if ios.iter().all(|(other, _)| other.end() <= io.offset || io.end() <= other.offset) {
                let value = matches!(kind, IoKind::Write { .. }).then(|| 1 + rng.below(255) as u8);
                ios.push((io, value.unwrap_or(0)));
            }
        }
        let mut ok = true;
        for ((io, value), (result, mem)) in ios.iter().zip(self.all(&ios)) {
            ok &= result.is_ok();
            match io.kind {
                IoKind::Read if result.is_ok() => {
                    let bytes = mem.into_buf().expect("reads own a buffer");
                    shadow.look(io.offset, &bytes, &format!("{io:?}"));
                }
                IoKind::Read => {}
                IoKind::Flush if quiet && result.is_ok() => shadow.later.clone_from(&shadow.now),
                IoKind::Flush => {}
                _ => shadow.ended(io, *value, result.is_ok()),
            }
        }
        ok
    }

    fn drain(&mut self) -> Result<(), Errno> {
        self.engine.drain();
        for _ in 0..RUNS_MAX {
            self.turn();
            if let Some(result) = self.engine.drained() {
                return result;
            }
        }
        panic!("not drained after {RUNS_MAX} runs");
    }

    /// Reads all of it.
    fn read(&mut self, shadow: &mut Shadow, what: &str) -> Result<(), Errno> {
        let (result, mem) = self.all(&[(Io::read(0, SIZE), 0)]).pop().expect("one");
        result?;
        shadow.look(0, &mem.into_buf().expect("a buffer"), what);
        Ok(())
    }
}

/// One image, one plan.
struct Case {
    shape: Shape,
    fault: Fault,
    seed: u64,
    direct: bool,
}

impl Case {
    /// Lives through it; answers how many ops failed.
    fn live<B: Backend<File = DiskFile>>(
        &self,
        backend: &impl Fn() -> B,
        path: &Path,
        qemu: bool,
    ) -> u64 {
        let (shape, direct) = (self.shape, self.direct);
        let _ = std::fs::remove_file(path);
        shape.make(path);
        let zeros = vec![Values::only(0); SIZE as usize];
        let mut shadow = Shadow { now: zeros.clone(), later: zeros };
        let mut rng = Rng(self.seed);
        let run = run_options(&mut rng);
        let mut disk = Disk::open(backend(), path, shape, direct, &run);
        for _ in 0..2 {
            assert!(disk.batch(shape, &mut rng, &mut shadow), "nothing fails as yet");
        }
        let fault = Fault { after: rng.below(6), ..self.fault };
        disk.engine.backend_mut().plan_mut().push(fault);
        for _ in 0..5 {
            disk.batch(shape, &mut rng, &mut shadow);
        }
        let mut drained = None;
        if rng.below(3) == 0 {
            drained = Some(disk.drain());
        } else {
            disk.engine.backend_mut().plan_mut().clear();
            for _ in 0..3 {
                disk.batch(shape, &mut rng, &mut shadow);
            }
            let result = disk.read(&mut shadow, "the faults are over");
            // After a failed flush no table is written any more: with a cache so small, where all
            // that is in it has changed, there may be no place for the table of a read.
            let may_fail = matches!(self.fault.what, None | Some(What::Flush));
            assert!(result.is_ok() || may_fail, "the faults are over: {result:?}");
        }
        let drained = drained.unwrap_or_else(|| disk.drain());
        let injected = disk.engine.backend().injected();
        assert!(injected > 0 || drained.is_ok(), "nothing has failed: {drained:?}");
        drop(disk);

        let (corruptions, leaks) = check(path, shape.format);
        assert_eq!(corruptions, 0, "our check");
        assert!(injected > 0 || leaks == 0, "nothing has failed, {leaks} leaks");
        // QEMU knows no VDI images of small blocks.
        if qemu && !matches!(shape.format, Format::Raw | Format::Vdi) {
            let folder = path.parent().expect("a folder");
            let out =
                crate::common::run(folder, &format!("qemu-img check -f {} image", shape.format));
            let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
            assert!(matches!(out.status.code(), Some(0 | 3)), "qemu-img check: {said}");
        }
        if drained.is_err() {
            shadow.now.clone_from(&shadow.later);
        }
        let mut disk = Disk::open(backend(), path, shape, direct, &run);
        assert_eq!(disk.read(&mut shadow, "opened again"), Ok(()));
        // It is as good as new.
        for _ in 0..2 {
            assert!(disk.batch(shape, &mut rng, &mut shadow), "nothing fails any more");
        }
        assert_eq!(disk.read(&mut shadow, "at last"), Ok(()));
        assert_eq!(disk.drain(), Ok(()));
        drop(disk);
        assert_eq!(check(path, shape.format).0, 0, "at last");
        injected
    }
}

/// Every kind of op, with every error.
fn faults() -> Vec<Fault> {
    let mut faults = Vec::new();
    for what in What::ALL.map(Some).into_iter().chain([None]) {
        for errno in [Errno::IO, Errno::NO_SPACE, Errno::NOT_SUPPORTED].map(Some) {
            let optional = [Some(What::Zero), Some(What::Discard), Some(What::Allocate)];
            if errno == Some(Errno::NOT_SUPPORTED) && !optional.contains(&what) {
                continue;
            }
            for (times, done) in
                [(1, false), (1, true), (3, false), (u64::MAX, false), (u64::MAX, true)]
            {
                faults.push(Fault { what, errno, times, done, ..Fault::default() });
            }
        }
    }
    faults
}

fn number(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().expect("a number"))
}

/// A child that is just being started has the files of its parent, and their locks, for a moment:
/// an image could not be opened again while another test starts QEMU.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Every `nth` case.
fn drive<B: Backend<File = DiskFile>>(backend: impl Fn() -> B, direct: bool, nth: u64) {
    let _alone = ONE_AT_A_TIME.lock();
    let parent = std::env::var_os("COWBELL_TEST_DIR").map(PathBuf::from);
    let parent = parent.unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
    let folder = tempfile::tempdir_in(parent).expect("a folder");
    let has_qemu = have_qemu();
    let first = number("COWBELL_SEED").unwrap_or(1);
    let (mut cases, mut injected, mut failures) = (0, 0, 0);
    for seed in first..first + number("COWBELL_SEEDS").unwrap_or(1) {
        for (s, shape) in SHAPES.into_iter().enumerate() {
            for (f, fault) in faults().into_iter().enumerate() {
                let case_seed = (seed * 1000 + f as u64) * 10 + s as u64;
                if (f + s) as u64 % nth != seed % nth {
                    continue;
                }
                let case = Case { shape, fault, seed: case_seed, direct };
                let qemu = has_qemu && case_seed.is_multiple_of(7);
                let path = folder.path().join("image");
                let live = || case.live(&backend, &path, qemu);
                match std::panic::catch_unwind(std::panic::AssertUnwindSafe(live)) {
                    Ok(ops) => injected += ops,
                    Err(_) => {
                        eprintln!("COWBELL_SEED={seed}: {shape:?} {fault:?}");
                        failures += 1;
                    }
                }
                cases += 1;
            }
        }
    }
    println!("{cases} cases, {injected} ops failed");
    assert!(injected > cases / 4, "the faults hit something");
    assert_eq!(failures, 0, "of {cases} cases");
}

#[test]
fn over_the_inline_backend() {
    drive(Inline::new, false, 1);
}

#[test]
fn over_native_aio() {
    drive(|| Aio::new(AioOptions::default()).expect("native AIO"), true, 6);
}

#[test]
fn over_io_uring() {
    let Some(uring) = crate::common::uring() else { return };
    drive(uring, true, 7);
}
