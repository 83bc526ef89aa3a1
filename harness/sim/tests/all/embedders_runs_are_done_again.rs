//! Whatever an embedder calls, in whatever order: its run is recorded, and done again without what it had.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cowbell_engine::backend::FileInfo;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::record::{Entry, Reader, Recorder, Sink};
use cowbell_engine::step::Io;
use cowbell_engine::units::{NodeId, Time};
use cowbell_engine::{Engine, Limits, Rate, Why};
use cowbell_formats::{
    CreateOptions, Format, Node, OpenOptions, RunOptions, attach, chain, create,
};
use cowbell_sim::backend::{Device, Mode, SimBackend};
use cowbell_sim::disk::splitmix;
use cowbell_sim::host::SimHost;
use cowbell_sim::kept::KeptHost;
use cowbell_sim::played::{Done, Played, Player, Verdict};

const SIZE: u64 = 1 << 20;

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Sink for Kept {
    fn take(&mut self, mut chunk: Vec<u8>) -> Option<Vec<u8>> {
        self.0.lock().expect("nobody has panicked").append(&mut chunk);
        Some(chunk)
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 += 1;
        splitmix(self.0) % n
    }
}

fn options(format: Format) -> OpenOptions {
    OpenOptions { write: true, format: Some(format), ..OpenOptions::default() }
}

/// An embedder's calls, at random, over two disks.
struct Embedder<'e> {
    engine: &'e mut Engine<Node, Recorder<SimBackend>>,
    disks: [NodeId; 2],
    random: Random,
    now: u64,
    tag: u64,
    refused: u64,
    given_up: usize,
}

impl Embedder<'_> {
    fn submits(&mut self) {
        let disk = self.disks[self.random.below(2) as usize];
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
        while self.engine.poll_event().is_some() {}
    }

    fn calls(&mut self) {
        let disk = self.disks[self.random.below(2) as usize];
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
    infos: Vec<FileInfo>,
    limits: Limits,
    format: Format,
    /// Requests that were taken, and that ended and were polled.
    requests: u64,
    refused: u64,
    given_up: usize,
}

fn recorded(format: Format, seed: u64) -> Run {
    let host = SimHost::new();
    let size = CreateOptions { size: Some(SIZE), ..CreateOptions::default() };
    let kept = KeptHost::over(host.clone());
    let limits = Limits { requests: 8, ..Limits::default() };
    let backend = SimBackend::new(Device { memory_align: 512, ..Device::default() }, Mode::Fifo);
    let mut engine = Engine::new(Recorder::new(backend), limits);
    let disks = ["a", "b"].map(|name| {
        create(&host, Path::new(name), format, &size).expect("it is made");
        chain::open(&kept, Path::new(name), &options(format)).expect("it opens for a trial");
        let chain = chain::open(&host, Path::new(name), &options(format)).expect("it opens");
        attach(&mut engine, chain, &RunOptions::default()).expect("it is attached")
    });
    let sink = Kept::default();
    engine.backend_mut().start_with(Box::new(sink.clone()), 512);
    let random = Random(seed << 32);
    let mut embedder =
        Embedder { engine: &mut engine, disks, random, now: 0, tag: 0, refused: 0, given_up: 0 };
    for _ in 0..600 {
        match embedder.random.below(8) {
            0 => embedder.calls(),
            1..=4 => embedder.submits(),
            _ => embedder.runs(),
        }
    }
    let Embedder { tag, refused, given_up, .. } = embedder;
    engine.backend_mut().stop();
    let record = sink.0.lock().expect("nobody has panicked").clone();
    let infos = engine.backend().infos().to_vec();
    let requests = tag - refused;
    Run { record, text: kept.to_text(), infos, limits, format, requests, refused, given_up }
}

/// Does it again, without what was there: the verdict, and what was done.
fn again(run: &Run, record: &[u8]) -> (Verdict, Done) {
    let host: KeptHost<SimHost> = KeptHost::from_lines(run.text.lines()).expect("it is kept text");
    let mut engine = Engine::new(Played::new(record.to_vec(), run.infos.clone()), run.limits);
    for name in ["a", "b"] {
        let chain = chain::open(&host, Path::new(name), &options(run.format)).expect("it opens");
        attach(&mut engine, chain, &RunOptions::default()).expect("it is attached");
    }
    let mut player = Player::new(engine);
    let verdict = player.play(&mut |_, _| true);
    (verdict, player.engine().backend().done)
}

#[test]
fn whatever_is_called() {
    let (mut refused, mut given_up, mut kinds) = (0, 0, [0; 8]);
    for format in Format::ALL {
        for seed in 0..20 {
            let run = recorded(format, seed);
            let (verdict, done) = again(&run, &run.record);
            assert_eq!(verdict, Verdict::Same, "{format}, seed {seed}, after {done:?}");
            assert_eq!(done.requests, run.requests, "{format}, seed {seed}");
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

/// An entry that is left out is noticed: what it decides goes another way. (But for a request that does nothing, if with it
/// another one's end is left out; and for the last entry, behind which there is nothing.)
#[test]
fn each_entry_decides() {
    let run = recorded(Format::Qcow2, 3);
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
