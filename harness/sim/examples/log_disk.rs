//! A format of one's own under the simulator: a log-structured disk, and a mistake in it.
//!
//! `cargo run -p cowbell-sim --example log_disk [PAGE]` tries every order, fault and crash of small workloads on it: first
//! as it should be, then with a mistake, which is found, made smaller, explained and, if a file is named, drawn.
//!
//! The disk is a log: each write of a block appends a record, which is a sector that says what it is and a sector of data. Opening it
//! reads the log up to the first record that is not whole.

use std::env;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Step};
use cowbell_engine::store::Store;
use cowbell_engine::units::{BufId, Errno, FileId, HostOffset, NodeId, Time};
use cowbell_engine::wait::{On, WaitList};
use cowbell_formats::Host;
use cowbell_formats::map::{Extent, Kind};
use cowbell_sim::cause::{STATES, cause};
use cowbell_sim::disk::{Contents, splitmix};
use cowbell_sim::host::SimHost;
use cowbell_sim::page::to_html;
use cowbell_sim::shrink::shrink;
use cowbell_sim::subject::{Checked, SimEngine, Subject};
use cowbell_sim::trace::{Trace, search};
use cowbell_sim::workload::{Request, Workload};
use cowbell_sim::world::{Budget, QUIET};

const SECTOR: u64 = 512;
const RECORD: u64 = 2 * SECTOR;
const BLOCKS: u64 = 8;

/// The disk: plain data that can be copied and hashed.
#[derive(Clone, Hash, Debug)]
pub struct LogDisk {
    file: FileId,
    log: Log,
    /// An append is under way.
    is_busy: bool,
    waiters: WaitList,
    /// The mistake: nobody waits for the append before. What is written behind one that is not there yet is
    /// lost in a crash, flushed or not, since the log ends before it.
    is_hasty: bool,
}

/// What the log says: where each block's data is, and where and as which the next record goes.
#[derive(Clone, Hash, Debug, Default)]
struct Log {
    places: [Option<u64>; BLOCKS as usize],
    end: u64,
    number: u64,
}

/// What a request awaits.
#[derive(Clone, Hash, Debug)]
pub enum State {
    /// Its turn to append.
    Turn,
    /// Its record, written from this buffer to this place in the log.
    Append {
        /// The record.
        buf: BufId,
        /// Its first byte in the file.
        place: u64,
    },
    /// Its blocks, each of which is a request of its own.
    Blocks,
    /// All that was written to be stable.
    Stable,
}

impl Driver for LogDisk {
    type State = State;
    const STATES: &'static [&'static str] = &["turn", "append", "blocks", "stable"];

    fn label(state: &State) -> usize {
        match state {
            State::Turn => 0,
            State::Append { .. } => 1,
            State::Blocks => 2,
            State::Stable => 3,
        }
    }

    fn size(&self) -> u64 {
        BLOCKS * SECTOR
    }

    fn uses(&self, file: FileId) -> bool {
        file == self.file
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let Io { kind, offset, len } = cx.io();
        match kind {
            IoKind::Flush => self.stable(cx),
            IoKind::Read | IoKind::Write { .. } if (offset | len) % SECTOR > 0 => {
                Step::Done(Err(Errno::INVALID))
            }
            IoKind::Read => self.read(offset, len, cx),
            IoKind::Write { .. } if len == SECTOR => self.append(cx),
            IoKind::Write { .. } => {
                (0..len / SECTOR).for_each(|n| cx.issue_part(offset + n * SECTOR, SECTOR));
                Step::Wait(State::Blocks)
            }
            _ => Step::Done(Err(Errno::NOT_SUPPORTED)),
        }
    }

    fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        match (state, event) {
            (State::Turn, _) => self.append(cx),
            (State::Append { buf, place }, Event::Io(result)) => {
                cx.give_buf(buf);
                self.is_busy = false;
                cx.hand_over(&mut self.waiters);
                if let Err(errno) = result {
                    // The next record goes to the same place.
                    return Step::Done(Err(errno));
                }
                if !self.is_hasty {
                    self.log.goes_on();
                }
                self.log.places[(cx.io().offset / SECTOR) as usize] = Some(place + SECTOR);
                self.written(cx)
            }
            (State::Blocks, Event::Io(Ok(()))) => self.written(cx),
            (State::Blocks, Event::Io(Err(errno))) => Step::Done(Err(errno)),
            (State::Stable, _) => self.stable(cx),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn chore(&mut self, chore: Chore) -> Option<State> {
        (chore == Chore::Settle).then_some(State::Stable)
    }

    fn deadline(&self) -> Option<Time> {
        None
    }
}

impl LogDisk {
    fn read(&mut self, offset: u64, len: u64, cx: &mut Cx<'_>) -> Step<State> {
        let mut is_all_zeros = true;
        for off in (0..len).step_by(SECTOR as usize) {
            match self.log.places[((offset + off) / SECTOR) as usize] {
                Some(place) => {
                    cx.read_guest(self.file, place, off, SECTOR);
                    is_all_zeros = false;
                }
                None => cx.zero_guest(off, SECTOR),
            }
        }
        if is_all_zeros { Step::Done(Ok(())) } else { Step::Last { label: 2 } }
    }

    fn append(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.is_busy && !self.is_hasty {
            cx.park(&mut self.waiters, On::Turn);
            return Step::Wait(State::Turn);
        }
        let Some([buf]) = cx.take_bufs::<1>() else {
            cx.park_for_bufs();
            return Step::Wait(State::Turn);
        };
        self.is_busy = true;
        // What is summed up is what is written, whatever the guest does to its memory meanwhile.
        let mut record = [0; RECORD as usize];
        let (head, data) = record.split_at_mut(SECTOR as usize);
        cx.copy_guest(0, data);
        let block = cx.io().offset / SECTOR;
        let words = [block, self.log.number, sum_of(block, self.log.number, data)];
        for (place, word) in head.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        cx.mem().pool_mut(buf)[..record.len()].copy_from_slice(&record);
        let seg = Seg { base: Base::Pool(buf), off: 0, len: RECORD as u32 };
        let place = self.log.end;
        cx.issue(Op::write(self.file, place, Segs::one(seg)));
        if self.is_hasty {
            self.log.goes_on();
        }
        Step::Wait(State::Append { buf, place })
    }

    /// A write is in the log. Must it be stable?
    fn written(&self, cx: &mut Cx<'_>) -> Step<State> {
        match cx.io().kind {
            IoKind::Write { fua: true, .. } => self.stable(cx),
            _ => Step::Done(Ok(())),
        }
    }

    fn stable(&self, cx: &mut Cx<'_>) -> Step<State> {
        cx.issue(Op::flush(self.file));
        Step::Last { label: 3 }
    }
}

impl Log {
    /// Behind another record.
    fn goes_on(&mut self) {
        (self.end, self.number) = (self.end + RECORD, self.number + 1);
    }

    /// Up to the first record that is not whole, or not the next one.
    fn in_file(file: &impl Store) -> Result<Log, String> {
        let mut log = Log::default();
        let mut record = [0; RECORD as usize];
        while log.end + RECORD <= file.len().map_err(|why| why.to_string())? {
            file.read_at(log.end, &mut record).map_err(|why| why.to_string())?;
            let (head, data) = record.split_at(SECTOR as usize);
            let word =
                |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
            let (block, number, sum) = (word(0), word(8), word(16));
            if block >= BLOCKS || number != log.number || sum != sum_of(block, number, data) {
                break;
            }
            log.places[block as usize] = Some(log.end + SECTOR);
            log.goes_on();
        }
        Ok(log)
    }
}

fn sum_of(block: u64, number: u64, data: &[u8]) -> u64 {
    data.iter().fold(splitmix(block ^ number << 8), |sum, &byte| splitmix(sum ^ u64::from(byte)))
}

/// Such a disk, for the simulator: how it is made, opened, and looked at after a crash.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogImage {
    /// With the mistake?
    pub is_hasty: bool,
}

const NAME: &str = "log";

impl LogImage {
    fn log(&self, host: &SimHost) -> Result<Log, String> {
        Log::in_file(&host.open(Path::new(NAME), false).map_err(|why| why.to_string())?)
    }
}

impl Subject for LogImage {
    type Driver = LogDisk;

    fn name(&self) -> String {
        "a log-structured disk".into()
    }

    fn text(&self) -> String {
        format!("hasty={}", self.is_hasty)
    }

    fn make(&self, host: &SimHost) -> Result<(), String> {
        host.put(NAME, Contents::default());
        Ok(())
    }

    fn files(&self) -> Vec<&'static str> {
        vec![NAME]
    }

    fn open(&self, host: &SimHost, engine: &mut SimEngine<LogDisk>) -> Result<NodeId, String> {
        let file = host.open(Path::new(NAME), true).map_err(|why| why.to_string())?;
        let log = Log::in_file(&file)?;
        let (file, _) = engine.attach(file).map_err(|why| why.to_string())?;
        let (waiters, is_hasty) = (WaitList::new(), self.is_hasty);
        Ok(engine.add(LogDisk { file, log, is_busy: false, waiters, is_hasty }))
    }

    fn size(&self) -> u64 {
        BLOCKS * SECTOR
    }

    /// A log is never wrong: where it is not whole it ends.
    fn check(&self, host: &SimHost) -> Result<Checked, String> {
        self.log(host).map(|_| Checked::default())
    }

    fn map(&self, host: &SimHost) -> Result<Vec<Extent>, String> {
        let places = self.log(host)?.places.into_iter().enumerate();
        let extents = places.map(|(block, place)| Extent {
            start: block as u64 * SECTOR,
            len: SECTOR,
            depth: 0,
            file: 0,
            kind: place.map_or(Kind::Unallocated, |place| Kind::Data(HostOffset(place))),
        });
        Ok(extents.collect())
    }
}

/// So that traces can be read again.
impl FromStr for LogImage {
    type Err = String;

    fn from_str(text: &str) -> Result<LogImage, String> {
        match text {
            "hasty=true" => Ok(LogImage { is_hasty: true }),
            "hasty=false" => Ok(LogImage { is_hasty: false }),
            _ => Err(format!("'{text}' is no such disk")),
        }
    }
}

/// All pairs and triples of a few requests, a fault in each, and a crash in every state.
///
/// # Errors
///
/// The trace of the first failure.
pub fn try_all(image: &LogImage) -> Result<u64, Box<Trace<LogImage>>> {
    let block = |n| n * SECTOR;
    let kinds = [
        Request::write(block(0), SECTOR),
        Request::write(block(0), 2 * SECTOR),
        Request::write_fua(block(1), SECTOR),
        Request::read(block(0), 3 * SECTOR),
        Request::flush(),
    ];
    let mut workloads = Vec::new();
    for a in kinds {
        for b in kinds {
            workloads.push(Workload::new([a, b]));
            workloads.extend(kinds.map(|c| Workload::new([a, b, c])));
        }
    }
    let budget = Budget { faults: 1, ..QUIET };
    search(image, budget, &workloads).map(|counts| counts.states)
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match try_all(&LogImage { is_hasty: false }) {
        Ok(states) => println!("As it should be: {states} states, nothing wrong.\n"),
        Err(trace) => panic!("{}", trace.explained()),
    }
    let trace = try_all(&LogImage { is_hasty: true }).expect_err("what is flushed is lost");
    let trace = shrink(&trace).expect("it fails again");
    println!("With the mistake:\n\n{}", trace.explained());
    let cause = cause(&trace, STATES).expect("it fails");
    println!("{cause}");
    if let Some(page) = arguments.first() {
        fs::write(page, to_html(&cause.failing)).expect("the page is written");
    }
}
