//! Several disks in one engine, on a device that does nothing: what each gets done, and what it loses by
//! others that come and go, are paused, or hang.
//!
//! Images of all formats are filled on a real file system first, flushed, and warm in memory; from then on
//! nothing reaches a file. So a request costs what it costs in the engine, and whatever else the loop
//! does is taken from that. Rounds alternate, and medians are told; on a machine with other work to do
//! the time on a processor tells more than the time of day.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};

use cowbell_benches::scattered;
use cowbell_engine::backend::{Backend, FileInfo, Harvest, Submission};
use cowbell_engine::faulty::{Fault, Faulty};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Driver, Io};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::sys::null::Null;
use cowbell_engine::units::{FileId, NodeId, Time};
use cowbell_engine::{Engine, Limits, NodeEvent};
use cowbell_formats::{
    Chain, CreateOptions, DiskHost, Format, Node, OpenOptions, RunOptions, attach, create, open,
};

const FORMATS: [Format; 5] = [Format::Raw, Format::Qed, Format::Qcow2, Format::Vmdk, Format::Vdi];
const SIZE: u64 = 16 << 20;
const BLOCK: u64 = 4096;
const DEPTH: usize = 64;
const ROUNDS: usize = 41;
/// Short, so that both kinds meet the same moods of the machine.
const ROUND_NS: u64 = 200_000_000;
/// How often the disk that comes and goes does so, and the one that is paused.
const EVERY_NS: u64 = 10_000_000;

/// Files that are real until everything is warm, and nothing from then on.
struct Warm {
    inline: Inline,
    null: Null,
    is_warm: bool,
}

impl Backend for Warm {
    type File = DiskFile;

    fn attach(&mut self, id: FileId, file: DiskFile) -> io::Result<FileInfo> {
        self.inline.attach(id, file)
    }

    fn detach(&mut self, id: FileId) -> Option<DiskFile> {
        self.inline.detach(id)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        if self.is_warm {
            self.null.submit(submission);
        } else {
            self.inline.submit(submission);
        }
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        self.inline.harvest(harvest);
        self.null.harvest(harvest);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn clock(&self) -> Time {
        clock()
    }
}

/// A disk, and memory for each request that it may have in flight.
struct Disk {
    node: NodeId,
    spare: Vec<Mem>,
    sent: u64,
    ended: u64,
}

impl Disk {
    fn new(node: NodeId, depth: usize) -> Disk {
        let spare = (0..depth).map(|_| Buf::zeroed(BLOCK as usize).into()).collect();
        Disk { node, spare, sent: 0, ended: 0 }
    }
}

type Host = Engine<Node, Faulty<Warm>>;

fn chain(path: &Path, format: Format) -> Chain<DiskFile> {
    let options = OpenOptions { format: Some(format), write: true, ..OpenOptions::default() };
    open(&DiskHost::default(), path, &options).expect("the image opens")
}

fn made(folder: &Path, name: &str, format: Format) -> PathBuf {
    let path = folder.join(name);
    let options = CreateOptions { size: Some(SIZE), ..CreateOptions::default() };
    create(&DiskHost::default(), &path, format, &options).expect("the image is made");
    path
}

fn put(engine: &mut Host, chain: Chain<DiskFile>) -> NodeId {
    let run = RunOptions { quota: Some(DEPTH), trust_probed: true, ..RunOptions::default() };
    attach(engine, chain, &run).expect("the image attaches")
}

fn settle(engine: &mut Host) {
    while engine.in_flight() > 0 {
        engine.run(clock());
        while let Some(done) = engine.poll() {
            done.result.expect("the disk works");
        }
    }
}

/// An engine with a disk of each of these formats, all of whose blocks are mapped, known and stable.
fn warm(folder: &Path, formats: &[Format], name: &str) -> (Host, Vec<NodeId>) {
    let limits = Limits { requests: 8 * DEPTH, ..Limits::default() };
    let warm = Warm { inline: Inline::new(), null: Null::new(), is_warm: false };
    let mut engine = Engine::new(Faulty::new(warm), limits);
    let mut nodes = Vec::new();
    for (n, &format) in formats.iter().enumerate() {
        let path = made(folder, &format!("{name}{n}"), format);
        let node = put(&mut engine, chain(&path, format));
        for at in (0..SIZE).step_by(1 << 20) {
            let mem = Buf::zeroed(1 << 20);
            engine.submit(node, Io::write(at, 1 << 20), mem, 0).expect("room");
            settle(&mut engine);
        }
        engine.submit(node, Io::flush(), Mem::None, 0).expect("room");
        settle(&mut engine);
        nodes.push(node);
    }
    (engine, nodes)
}

/// What goes on beside the disks that work.
struct Unrest {
    /// Opened beside the loop, and where files go that are to be closed.
    opened: Receiver<Chain<DiskFile>>,
    closed: Sender<Vec<DiskFile>>,
    guest: Option<NodeId>,
    lives: u64,
    /// At a time one request in flight.
    paused: Disk,
    is_paused: bool,
    pauses: u64,
    due: Time,
}

impl Unrest {
    fn new(folder: &Path, paused: NodeId) -> Unrest {
        let path = made(folder, "guest", Format::Qcow2);
        let (to_loop, opened) = channel();
        let (closed, to_close) = channel::<Vec<DiskFile>>();
        std::thread::spawn(move || {
            while to_loop.send(chain(&path, Format::Qcow2)).is_ok() {
                // Closed before it is opened again: it is locked.
                let Ok(files) = to_close.recv() else { return };
                drop(files);
            }
        });
        let (guest, paused, due) = (None, Disk::new(paused, 1), Time(0));
        let (lives, is_paused, pauses) = (0, false, 0);
        Unrest { opened, closed, guest, lives, paused, is_paused, pauses, due }
    }

    fn turn(&mut self, engine: &mut Host, now: Time) {
        if now >= self.due {
            self.due = now.plus_ns(EVERY_NS);
            match self.guest {
                Some(guest) if engine.has(guest) => {
                    // (It may be closing still.)
                    let _ = engine.close(guest);
                }
                _ => {
                    if let Ok(chain) = self.opened.try_recv() {
                        let guest = put(engine, chain);
                        for at in 0..16 {
                            let mem = Buf::zeroed(BLOCK as usize);
                            let taken =
                                engine.submit(guest, Io::read(at * BLOCK, BLOCK), mem, OTHER);
                            taken.expect("room");
                        }
                        (self.guest, self.lives) = (Some(guest), self.lives + 1);
                    }
                }
            }
            self.is_paused = !self.is_paused;
            if self.is_paused {
                engine.pause(self.paused.node).expect("it is there");
                self.pauses += 1;
            } else {
                engine.resume(self.paused.node).expect("it is there");
            }
        }
        while let Some(event) = engine.poll_event() {
            if let NodeEvent::Closed { node, result } = event {
                result.expect("it is left clean");
                self.closed.send(engine.take_files(node)).expect("somebody closes them");
                self.guest = None;
            }
        }
    }
}

/// The tag of requests that nobody counts; others have their disk's number.
const OTHER: u64 = 1000;
const PAUSED: u64 = 1001;

/// Nanoseconds that this thread has had a processor.
fn on_processor() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0)
}

/// What a round told: requests a second of each disk, by the time of day and by that on a processor.
struct Round {
    by_day: Vec<f64>,
    by_processor: Vec<f64>,
    longest: u64,
    p999: u64,
}

fn send(engine: &mut Host, disk: &mut Disk, tag: u64) {
    while let Some(mem) = disk.spare.pop() {
        let at = scattered(disk.sent, SIZE / BLOCK, BLOCK);
        let io =
            if disk.sent.is_multiple_of(3) { Io::write(at, BLOCK) } else { Io::read(at, BLOCK) };
        match engine.submit(disk.node, io, mem, tag) {
            Ok(()) => disk.sent += 1,
            // It is paused.
            Err(refused) => {
                disk.spare.push(refused.mem);
                return;
            }
        }
    }
}

fn round(engine: &mut Host, disks: &mut [Disk], mut unrest: Option<&mut Unrest>) -> Round {
    let before: Vec<u64> = disks.iter().map(|disk| disk.ended).collect();
    engine.reset_stats();
    let (began, had) = (clock(), on_processor());
    let mut now = began;
    while now.since(began) < ROUND_NS {
        for (n, disk) in disks.iter_mut().enumerate() {
            send(engine, disk, n as u64);
        }
        if let Some(unrest) = &mut unrest {
            unrest.turn(engine, now);
            send(engine, &mut unrest.paused, PAUSED);
        }
        engine.run(now);
        while let Some(done) = engine.poll() {
            done.result.expect("the disk works");
            let disk = match (done.tag, &mut unrest) {
                (OTHER, _) => continue,
                (PAUSED, Some(unrest)) => &mut unrest.paused,
                (n, _) => &mut disks[n as usize],
            };
            disk.spare.push(done.mem);
            disk.ended += 1;
        }
        now = clock();
    }
    let (day, had) = (now.since(began) as f64 / 1e9, (on_processor() - had) as f64 / 1e9);
    let ended = |n: usize| (disks[n].ended - before[n]) as f64;
    let run = &engine.stats().run;
    Round {
        by_day: (0..disks.len()).map(|n| ended(n) / day).collect(),
        by_processor: (0..disks.len()).map(|n| ended(n) / had).collect(),
        longest: run.max(),
        p999: run.quantile(999),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Medians for each disk of what these rounds told.
fn medians(rounds: &[Round], of: impl Fn(&Round) -> &[f64]) -> Vec<f64> {
    let disks = of(&rounds[0]).len();
    (0..disks).map(|n| median(rounds.iter().map(|round| of(round)[n]).collect())).collect()
}

fn each_of_many(folder: &Path) {
    println!("thousands of requests a second on a processor, {DEPTH} at a time of each disk");
    for (name, formats) in FORMATS.iter().map(|format| (format.name(), vec![*format])).chain([
        ("raw and qcow2", vec![Format::Raw, Format::Qcow2]),
        ("four qcow2", vec![Format::Qcow2; 4]),
        ("one of each", FORMATS.to_vec()),
    ]) {
        let (mut engine, nodes) = warm(folder, &formats, &format!("many-{name}-"));
        engine.backend_mut().inner_mut().is_warm = true;
        let mut disks: Vec<Disk> = nodes.into_iter().map(|node| Disk::new(node, DEPTH)).collect();
        let rounds: Vec<Round> = (0..9).map(|_| round(&mut engine, &mut disks, None)).collect();
        let rates = medians(&rounds, |round| &round.by_processor);
        let each: Vec<String> = rates.iter().map(|rate| format!("{:.0}", rate / 1e3)).collect();
        let all = rates.iter().sum::<f64>() / 1e3;
        println!("  {name:<14} {} (all {all:.0})", each.join(", "));
    }
}

fn two_beside_others(folder: &Path) {
    // Two that work; one to be paused, one to hang. Another comes and goes.
    // (The last has no chores of its own that would hang as well.)
    let formats = [Format::Raw, Format::Qcow2, Format::Vmdk, Format::Vdi];
    let (mut engine, nodes) = warm(folder, &formats, "beside-");
    engine.backend_mut().inner_mut().is_warm = true;
    let mut disks: Vec<Disk> = nodes[..2].iter().map(|&node| Disk::new(node, DEPTH)).collect();
    let mut unrest = Unrest::new(folder, nodes[2]);
    let mut hung = Disk::new(nodes[3], DEPTH);
    let mut files = (0..8).map(FileId);
    let its = files.find(|&file| engine.node(nodes[3]).uses(file)).expect("it has a file");
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        // Looking at each op is the wrapper's, and costs the same in both rounds.
        let hangs = Fault { file: Some(its), ..Fault::late(u64::MAX) };
        engine.backend_mut().plan_mut().push(hangs);
        alone.push(round(&mut engine, &mut disks, None));
        send(&mut engine, &mut hung, OTHER);
        beside.push(round(&mut engine, &mut disks, Some(&mut unrest)));
        assert_eq!(engine.backend().held_back(), DEPTH, "it hangs");
        engine.backend_mut().plan_mut().clear();
        engine.backend_mut().let_go();
        // At rest again: what ended is nobody's any more.
        let (resumed, paused) = (engine.resume(unrest.paused.node), &mut unrest.paused);
        resumed.expect("it is there");
        unrest.is_paused = false;
        while engine.in_flight() > 0 {
            engine.run(clock());
            while let Some(done) = engine.poll() {
                match done.tag {
                    OTHER => hung.spare.push(done.mem),
                    PAUSED => paused.spare.push(done.mem),
                    n => disks[n as usize].spare.push(done.mem),
                }
            }
        }
        hung.spare.truncate(DEPTH);
    }
    println!(
        "raw and qcow2, thousands of requests a second, alone and beside a disk that comes and goes,"
    );
    println!("one that is paused and resumed, one that hangs; medians of {ROUNDS} rounds in turn");
    for (name, of) in [
        ("time of day", (|round: &Round| &round.by_day[..]) as fn(&Round) -> &[f64]),
        ("on a processor", |round| &round.by_processor[..]),
    ] {
        let (alone, beside) = (medians(&alone, of), medians(&beside, of));
        for n in 0..2 {
            let lost = 100.0 * (1.0 - beside[n] / alone[n]);
            let (alone, beside) = (alone[n] / 1e3, beside[n] / 1e3);
            println!(
                "  {name:<14} {:<5} {alone:.0}, {beside:.0}: {lost:.1} % lost",
                formats[n].name()
            );
        }
    }
    for (name, rounds) in [("alone", &alone), ("beside", &beside)] {
        let us =
            |of: fn(&Round) -> u64| median(rounds.iter().map(|r| of(r) as f64 / 1e3).collect());
        let most = rounds.iter().map(|round| round.longest).max().unwrap_or(0) as f64 / 1e3;
        println!(
            "  a turn, {name:<6} p99.9 {:.0} us, longest {:.0} us (median of rounds), {most:.0} us (of all)",
            us(|round| round.p999),
            us(|round| round.longest),
        );
    }
    println!("  {} disks came and went, {} pauses", unrest.lives, unrest.pauses);
}

fn main() {
    if !std::env::args().any(|arg| arg == "--bench") {
        return; // It is only tested that it builds.
    }
    // In memory, if there is a file system there.
    let shm = Path::new("/dev/shm");
    let parent = if shm.is_dir() { shm } else { Path::new(env!("CARGO_TARGET_TMPDIR")) };
    let folder = tempfile::tempdir_in(parent).expect("a folder for scratch files");
    each_of_many(folder.path());
    two_beside_others(folder.path());
}
