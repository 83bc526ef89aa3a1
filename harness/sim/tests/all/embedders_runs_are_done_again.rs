//! Whatever an embedder calls, in whatever order: its run is recorded, and done again without what it had.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cowbell_engine::backend::FileInfo;
use cowbell_engine::events::NodeEvent;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::record::{Entry, Reader, Recorder, Sink};
use cowbell_engine::step::Io;
use cowbell_engine::units::{NodeId, Time};
use cowbell_engine::{Copy, Engine, Limits, Rate, Why};
use cowbell_formats::chain::Policy;
use cowbell_formats::{
    CreateOptions, Format, Host, Node, OpenOptions, RunOptions, attach, chain, create, rebase,
};
use cowbell_sim::backend::{Device, Mode, SimBackend};
use cowbell_sim::disk::splitmix;
use cowbell_sim::host::{SimFile, SimHost};
use cowbell_sim::kept::{KeptFile, KeptHost};
use cowbell_sim::played::{Done, Played, Player, Verdict};

const SIZE: u64 = 1 << 20;

/// A record in memory.
#[derive(Clone, Default)]
pub struct Kept(Arc<Mutex<Vec<u8>>>);

impl Kept {
    /// What there is of it.
    pub fn record(&self) -> Vec<u8> {
        self.0.lock().expect("nobody has panicked").clone()
    }
}

impl Sink for Kept {
    fn take(&mut self, mut chunk: Vec<u8>) -> Option<Vec<u8>> {
        self.0.lock().expect("nobody has panicked").append(&mut chunk);
        Some(chunk)
    }
}

fn limits() -> Limits {
    Limits { requests: 8, ..Limits::default() }
}

/// New images with these names.
fn images(format: Format, names: &[&str]) -> SimHost {
    let (host, size) =
        (SimHost::new(), CreateOptions { size: Some(SIZE), ..CreateOptions::default() });
    for name in names {
        create(&host, Path::new(name), format, &size).expect("it is made");
    }
    host
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 += 1;
        splitmix(self.0) % n
    }
}

fn options(format: Format) -> OpenOptions {
    let backing = Policy::Any;
    OpenOptions { write: true, format: Some(format), backing, ..OpenOptions::default() }
}

/// What an embedder has brought while its engine ran, and what was read of it before.
enum Brought {
    /// A disk.
    Disk(&'static str, String),
    /// A file that was taken back at once.
    File(&'static str, String),
}

/// An embedder's calls, at random, over its disks, some of which go and come again.
struct Embedder {
    engine: Engine<Node, Recorder<SimBackend>>,
    host: SimHost,
    format: Format,
    disks: Vec<(NodeId, &'static str)>,
    closing: Vec<(NodeId, &'static str)>,
    /// Images that are in no engine.
    absent: Vec<&'static str>,
    brought: Vec<Brought>,
    random: Random,
    now: u64,
    tag: u64,
    refused: u64,
    given_up: usize,
}

impl Embedder {
    /// With these images at hand, and no disk.
    fn new(host: SimHost, format: Format, seed: u64, names: &[&'static str]) -> Embedder {
        let device = Device { memory_align: 512, ..Device::default() };
        let backend = Recorder::new(SimBackend::new(device, Mode::Fifo));
        Embedder {
            engine: Engine::new(backend, limits()),
            host,
            format,
            disks: Vec::new(),
            closing: Vec::new(),
            absent: names.to_vec(),
            brought: Vec::new(),
            random: Random(seed << 32),
            now: 0,
            tag: 0,
            refused: 0,
            given_up: 0,
        }
    }

    /// Opens an image that is in no engine, for a trial and then in earnest.
    fn opens(&mut self, kept: &KeptHost<SimHost>) {
        let Some(name) = self.absent.pop() else { return };
        chain::open(kept, Path::new(name), &options(self.format)).expect("it opens for a trial");
        let chain = chain::open(&self.host, Path::new(name), &options(self.format));
        let attached = attach(&mut self.engine, chain.expect("it opens"), &RunOptions::default());
        self.disks.push((attached.expect("it is attached"), name));
    }

    /// A disk comes.
    fn brings(&mut self) {
        let kept = KeptHost::over(self.host.clone());
        let Some(&name) = self.absent.last() else { return };
        self.opens(&kept);
        self.brought.push(Brought::Disk(name, kept.to_text()));
    }

    /// A disk goes, or one comes.
    fn plugs(&mut self) {
        match (self.random.below(3), self.absent.last().copied()) {
            (0, Some(_)) => self.brings(),
            (1, Some(name)) => {
                let kept = KeptHost::over(self.host.clone());
                kept.open(Path::new(name), false).expect("it opens for a trial");
                let file = self.host.open(Path::new(name), false).expect("it opens");
                let (file, _) = self.engine.attach(file).expect("it is attached");
                self.engine.detach(file).expect("nobody uses it");
                self.brought.push(Brought::File(name, kept.to_text()));
            }
            _ => self.closes(),
        }
    }

    fn closes(&mut self) {
        let Some(at) = self.picks() else { return };
        let (disk, name) = self.disks[at];
        if self.engine.close(disk).is_ok() {
            self.disks.remove(at);
            self.closing.push((disk, name));
        }
    }

    fn picks(&mut self) -> Option<usize> {
        let count = self.disks.len() as u64;
        (count > 0).then(|| self.random.below(count) as usize)
    }

    fn sees(&mut self, event: &NodeEvent) {
        let NodeEvent::Closed { node, result } = *event else { return };
        assert_eq!(result, Ok(()));
        let at = self.closing.iter().position(|&(closing, _)| closing == node);
        let (node, name) = self.closing.remove(at.expect("it was to be closed"));
        let files = self.engine.take_files(node);
        // Files of layers come behind.
        self.host.put(name, files[0].contents());
        self.absent.push(name);
    }

    fn submits(&mut self) {
        let Some(at) = self.picks() else { return };
        let (disk, _) = self.disks[at];
        let at = self.random.below(SIZE / 512) * 512;
        let len = ((1 + self.random.below(16)) * 512).min(SIZE - at);
        let (io, mem): (Io, Mem) = match self.random.below(6) {
            0 | 1 => (Io::read(at, len), Buf::zeroed(len as usize).into()),
            2 | 3 => (Io::write(at, len), Buf::zeroed(len as usize).into()),
            4 => (Io::discard(at, len), Mem::None),
            _ => (Io::flush(), Mem::None),
        };
        self.tag += 1;
        match self.engine.submit(disk, io, mem, self.tag) {
            Ok(()) => {}
            Err(refused) if matches!(refused.why, Why::Full | Why::Paused | Why::Draining) => {
                self.refused += 1;
            }
            Err(refused) => panic!("{:?}", refused.why),
        }
    }

    fn runs(&mut self) {
        self.now += self.random.below(200_000);
        self.engine.run(Time(self.now));
        for _ in 0..self.random.below(4) {
            let _ = self.engine.poll();
        }
        while let Some(event) = self.engine.poll_event() {
            self.sees(&event);
        }
    }

    fn calls(&mut self) {
        let Some(at) = self.picks() else { return };
        let (disk, _) = self.disks[at];
        match self.random.below(7) {
            0 => {
                let quota = self.random.below(4);
                self.engine.set_quota(disk, (quota > 0).then_some(quota as usize));
            }
            1 => {
                let requests = Some(1 + self.random.below(100_000));
                let rate = Rate { requests, burst: Duration::from_micros(10), bytes: None };
                let rate = (self.random.below(2) == 0).then_some(rate);
                self.engine.set_rate(disk, rate);
            }
            2 => drop(self.engine.pause(disk)),
            3 => drop(self.engine.resume(disk)),
            4 => {
                let odd = self.random.below(2);
                self.given_up += self.engine.abandon(disk, |tag| tag % 2 == odd).len();
            }
            5 => self.engine.drain(),
            _ => self.submits(),
        }
    }
}

/// What there is of a run, to do it again.
struct Run {
    record: Vec<u8>,
    /// What was read of the images.
    text: String,
    /// The disks that were there when it began.
    disks: Vec<&'static str>,
    brought: Vec<Brought>,
    infos: Vec<FileInfo>,
    format: Format,
    /// Requests that were taken, and that ended and were polled.
    requests: u64,
    refused: u64,
    given_up: usize,
}

/// What this embedder does, beginning with so many of its images as disks.
fn recorded(mut embedder: Embedder, count: usize, does: impl FnOnce(&mut Embedder)) -> Run {
    let kept = KeptHost::over(embedder.host.clone());
    (0..count).for_each(|_| embedder.opens(&kept));
    let disks = embedder.disks.iter().map(|&(_, name)| name).collect();
    let sink = Kept::default();
    embedder.engine.backend_mut().start_with(Box::new(sink.clone()), 512);
    does(&mut embedder);
    let Embedder { mut engine, tag, refused, given_up, brought, format, .. } = embedder;
    engine.backend_mut().stop();
    let record = sink.record();
    let infos = engine.backend().infos().to_vec();
    let (requests, text) = (tag - refused, kept.to_text());
    Run { record, text, disks, brought, infos, format, requests, refused, given_up }
}

/// Calls at random, of which some are about disks that go and come.
fn at_random(format: Format, seed: u64, plugs: bool) -> Run {
    let names = if plugs { &["a", "b", "c"][..] } else { &["a", "b"] };
    let embedder = Embedder::new(images(format, names), format, seed, names);
    recorded(embedder, 2, |embedder| {
        for _ in 0..600 {
            match embedder.random.below(8) {
                0 if plugs && embedder.random.below(2) == 0 => embedder.plugs(),
                0 => embedder.calls(),
                1..=4 => embedder.submits(),
                _ => embedder.runs(),
            }
        }
    })
}

type Again = Engine<Node, Played<KeptFile<SimFile>>>;

fn opens_again(run: &Run, text: &str, names: &[&str], engine: &mut Again) -> Result<(), String> {
    let host: KeptHost<SimHost> = KeptHost::from_lines(text.lines())?;
    for name in names {
        let chain = chain::open(&host, Path::new(name), &options(run.format));
        let chain = chain.map_err(|why| why.to_string())?;
        attach(engine, chain, &RunOptions::default()).map_err(|why| why.to_string())?;
    }
    Ok(())
}

/// Does it again, without what was there: the verdict, and what was done.
fn again(run: &Run, record: &[u8]) -> (Verdict, Done) {
    let mut engine = Engine::new(Played::new(record.to_vec(), run.infos.clone()), limits());
    opens_again(run, &run.text, &run.disks, &mut engine).expect("what was kept is enough");
    let mut brought = run.brought.iter();
    let mut player = Player::new(engine).with_later_disks(|engine| match brought.next() {
        Some(Brought::Disk(name, text)) => opens_again(run, text, &[name], engine),
        Some(Brought::File(name, text)) => {
            let host: KeptHost<SimHost> = KeptHost::from_lines(text.lines())?;
            let file = host.open(Path::new(name), false).map_err(|why| why.to_string())?;
            let (file, _) = engine.attach(file).map_err(|why| why.to_string())?;
            engine.detach(file).map(drop).ok_or("somebody uses it".into())
        }
        None => Err("no more disks came".into()),
    });
    let verdict = player.play(&mut |_, _| true);
    (verdict, player.engine().backend().done)
}

/// Calls at random, which are done again as they were.
fn done_again(format: Format, seed: u64, plugs: bool) -> Run {
    let run = at_random(format, seed, plugs);
    let (verdict, done) = again(&run, &run.record);
    assert_eq!(verdict, Verdict::Same, "{format}, seed {seed}, after {done:?}");
    assert_eq!(done.requests, run.requests, "{format}, seed {seed}");
    run
}

#[test]
fn whatever_is_called() {
    let (mut refused, mut given_up, mut kinds) = (0, 0, [0; 8]);
    for format in Format::ALL {
        for seed in 0..20 {
            let run = done_again(format, seed, false);
            refused += run.refused;
            given_up += run.given_up;
            for entry in Reader::new(&run.record) {
                let kind = match entry {
                    Entry::Quota { .. } => 0,
                    Entry::Rated { .. } => 1,
                    Entry::Called { which: 4, .. } => 2,
                    Entry::Called { which: 5, .. } => 3,
                    Entry::Abandoned { .. } => 4,
                    Entry::Called { which: 0, .. } => 5,
                    Entry::Whole(_) => 6,
                    Entry::Submitted { polled: true, .. } => 7,
                    _ => continue,
                };
                kinds[kind] += 1;
            }
        }
    }
    assert!(refused > 100 && given_up > 100, "{refused} refused, {given_up} given up");
    assert!(kinds.iter().all(|&kind| kind > 50), "{kinds:?}");
}

/// Disks go and come while others are at work, and so do files that become none.
#[test]
fn disks_come_and_go() {
    let (mut came, mut other) = (0, 0);
    for format in Format::ALL {
        for seed in 0..20 {
            let run = done_again(format, seed, true);
            came += run.brought.len();
            // Whoever brings another one, or none, is told.
            if run.brought.is_empty() {
                continue;
            }
            let mut without = run;
            without.brought.pop();
            let (verdict, _) = again(&without, &without.record);
            assert!(matches!(verdict, Verdict::Untold(_)), "{verdict:?}");
            let Some(Brought::Disk(name, text)) = without.brought.pop() else { continue };
            without.brought.push(Brought::File(name, text));
            let (verdict, _) = again(&without, &without.record);
            assert!(matches!(verdict, Verdict::Differs(_)), "{verdict:?}");
            other += 1;
        }
    }
    assert!(came > 500 && other > 20, "{came} came, {other} of them were another");
}

/// A record with disks that come is input like any other.
#[test]
fn changed_records_harm_nobody() {
    let run = at_random(Format::Qcow2, 5, true);
    assert!(!run.brought.is_empty());
    let (mut random, mut others) = (Random(9), 0);
    for _ in 0..400 {
        let mut record = run.record.clone();
        let at = random.below(record.len() as u64) as usize;
        record[at] ^= 1 << random.below(8);
        others += u64::from(again(&run, &record).0 != Verdict::Same);
    }
    assert!(others > 30, "{others}");
}

/// Blocks that are larger than the engine's buffers could never be written in part.
#[test]
fn files_of_large_blocks_are_refused() {
    for request_align in [4096, 8192, 12288] {
        let device = Device { request_align, ..Device::default() };
        let limits = Limits { buffer_size: 4096, ..Limits::default() };
        let mut engine: Engine<Node, _> = Engine::new(SimBackend::new(device, Mode::Fifo), limits);
        let image = images(Format::Raw, &["a"]).open(Path::new("a"), true).expect("it opens");
        let attached = engine.attach(image).map(drop).map_err(|why| why.kind());
        let refused = Err(std::io::ErrorKind::Unsupported);
        assert_eq!(attached, if request_align == 4096 { Ok(()) } else { refused });
    }
}

/// Layers are pulled up while a guest writes; the disk is closed, cut off from them, and opened again.
#[test]
fn layers_are_cut_off() {
    for format in [Format::Qcow2, Format::Qed] {
        let host = images(format, &["base", "top"]);
        let mut below = Embedder::new(host.clone(), format, 1, &["base"]);
        below.opens(&KeptHost::over(host.clone()));
        (0..100).for_each(|_| {
            below.submits();
            below.runs();
        });
        below.closes();
        while below.absent.is_empty() {
            below.runs();
        }
        let top = host.open(Path::new("top"), true).expect("it opens");
        let base = Some((Path::new("base"), format.name()));
        rebase::set_backing(&top, format, base).expect("it gets a backing file");
        let run = recorded(Embedder::new(host, format, 2, &["top"]), 1, |embedder| {
            let job = embedder.engine.start(Copy::pull(embedder.disks[0].0, 1)).expect("it begins");
            while embedder.engine.job_progress(job).is_some() {
                embedder.submits();
                embedder.runs();
            }
            embedder.closes();
            while embedder.absent.is_empty() {
                embedder.runs();
            }
            let top = embedder.host.open(Path::new("top"), true).expect("it opens");
            rebase::set_backing(&top, format, None).expect("it is cut off");
            embedder.brings();
            for _ in 0..100 {
                embedder.submits();
                embedder.runs();
            }
        });
        let (verdict, done) = again(&run, &run.record);
        assert_eq!((verdict, done.requests), (Verdict::Same, run.requests), "{format}");
        assert!(run.requests > 100 && run.brought.len() == 1, "{} requests", run.requests);
    }
}

/// An entry that is left out is noticed: what it decides goes another way. (But for a request that does nothing, if with it
/// another one's end is left out; and for the last entry, behind which there is nothing.)
#[test]
fn each_entry_decides() {
    let run = at_random(Format::Qcow2, 3, false);
    let mut reader = Reader::new(&run.record);
    let (mut at, mut left_out, mut unnoticed) = (0, 0, Vec::new());
    let mut time = Time(0);
    while let Some(entry) = reader.next() {
        let end = run.record.len() - reader.left();
        // Times are told by how much later they are.
        let is_time = reader.time() != std::mem::replace(&mut time, reader.time());
        let decides = matches!(
            entry,
            Entry::Submitted { polled: false, .. }
                | Entry::Whole(_)
                | Entry::Took { .. }
                | Entry::Ran(_)
        );
        if decides && !is_time && end < run.record.len() {
            let without = [&run.record[..at], &run.record[end..]].concat();
            left_out += 1;
            if again(&run, &without).0 == Verdict::Same {
                unnoticed.push((at, format!("{entry:?}")));
            }
        }
        at = end;
    }
    assert!(left_out > 300, "{left_out}");
    assert!(unnoticed.is_empty(), "of {}: {unnoticed:?}", run.record.len());
}
