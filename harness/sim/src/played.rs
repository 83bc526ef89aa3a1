//! A real run done again, from its [record](cowbell_engine::record): the same calls at the same times, over a backend that
//! takes and gives back what the real one did. No disk is needed, and no time passes.
//!
//! After every `run` the sum over all that was done (states, ops, answers) is compared. The first that is not the same is where
//! this program is another one than that which was recorded, or where something decides that the record does not know of.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;

use cowbell_engine::Engine;
use cowbell_engine::backend::{Backend, Completion, FileInfo, Harvest, Note, Submission};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::{Base, OpKind};
use cowbell_engine::record::{Entry, Lent, Reader, Sum};
use cowbell_engine::step::Driver;
use cowbell_engine::sys::ram::Ram;
use cowbell_engine::units::{Errno, FileId, NodeId, OpId, ReqId, Time};

/// What was recorded, as a backend.
#[derive(Debug)]
pub struct Played<'r, F> {
    reader: Reader<'r>,
    /// What the real backend said of its files, in the order in which they came.
    infos: Vec<FileInfo>,
    files: BTreeMap<FileId, F>,
    sum: Sum,
    /// The last time.
    time: Time,
    /// Ops that were taken and have not come back, and the bytes that each may move.
    in_flight: BTreeMap<OpId, u64>,
    /// How far it is.
    pub done: Done,
    /// What was not as recorded.
    differs: Option<String>,
}

/// How much has been done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Calls of `run`.
    pub runs: u64,
    /// Requests submitted.
    pub requests: u64,
    /// Requests that have ended and were taken.
    pub ended: u64,
    /// Ops that the backend took.
    pub ops: u64,
    /// Times that a request began to wait in a state.
    pub waits: u64,
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything was as recorded.
    Same,
    /// It was, as far as the record tells: then comes a call that it does not tell enough of.
    Untold(String),
    /// In this `run` something was not as recorded.
    Differs(String),
}

impl<'r, F> Played<'r, F> {
    /// The record, and what the real backend said of its files, in the order in which they were attached.
    pub fn new(record: &'r [u8], infos: Vec<FileInfo>) -> Played<'r, F> {
        Played {
            reader: Reader::new(record),
            infos,
            files: BTreeMap::new(),
            sum: Sum::default(),
            time: Time(0),
            in_flight: BTreeMap::new(),
            done: Done::default(),
            differs: None,
        }
    }

    /// The time of the record.
    pub fn time(&self) -> Time {
        self.time
    }

    fn peek(&self) -> Option<Entry<'r>> {
        self.reader.clone().next()
    }

    fn differs(&mut self, how: impl FnOnce() -> String) {
        self.differs.get_or_insert_with(how);
    }
}

impl<F> Backend for Played<'_, F> {
    type File = F;

    fn attach(&mut self, id: FileId, file: F) -> io::Result<FileInfo> {
        let info = self.infos.get(self.files.len()).copied();
        self.files.insert(id, file);
        info.ok_or_else(|| io::Error::other("more files than were recorded"))
    }

    fn detach(&mut self, id: FileId) -> Option<F> {
        self.files.remove(&id)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        let offered: Vec<OpId> = submission.waiting().to_vec();
        for &op in &offered {
            self.sum.takes(op, &submission.ops[op]);
        }
        let Some(Entry::Took { count, places }) = self.peek() else {
            return self.differs(|| format!("{} ops are offered, and none were", offered.len()));
        };
        self.reader.next();
        let place = |pair: &[u8]| usize::from(pair[0]) | usize::from(pair[1]) << 8;
        let places: Vec<usize> = match places {
            None => (0..usize::from(count)).collect(),
            Some(places) => places.chunks_exact(2).map(place).collect(),
        };
        let taken: Option<Vec<OpId>> =
            places.iter().map(|&place| offered.get(place).copied()).collect();
        let Some(taken) = taken else {
            return self.differs(|| format!("{} ops are offered, fewer than were", offered.len()));
        };
        for &op in &taken {
            let record = &submission.ops[op];
            let moves = matches!(record.op.kind, OpKind::Read | OpKind::Write { .. });
            self.in_flight.insert(op, if moves { record.remaining() } else { 0 });
        }
        self.done.ops += taken.len() as u64;
        submission.take_if(|op, _| taken.contains(&op));
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        while let Some(Entry::Done { op, answer, brought }) = self.peek() {
            self.reader.next();
            let Some(moves) = self.in_flight.remove(&op) else {
                return self.differs(|| format!("{op:?} comes back, and is not in flight"));
            };
            let answer = answer.unwrap_or(moves as i64);
            let record = &harvest.ops[op];
            let is_hole = matches!(record.op.kind, OpKind::Hole);
            if answer > moves as i64 && !is_hole {
                return self.differs(|| format!("{op:?} moves {answer} bytes, and has {moves}"));
            }
            let seg = match record.op.kind {
                OpKind::Compute(_) => record.op.segs.as_slice().get(1),
                _ => record.op.segs.as_slice().first(),
            };
            if let Some(seg) = seg
                && let Base::Region(region) = seg.base
                && brought.len() <= seg.len as usize
            {
                let bytes = harvest.mem.region_mut(region);
                bytes[seg.off as usize..][..brought.len()].copy_from_slice(brought);
            }
            let errno = i32::try_from(answer.unsigned_abs()).unwrap_or(i32::MAX);
            let result = u64::try_from(answer).map_err(|_| Errno(errno));
            harvest.done.push(Completion::new(op, result));
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn clock(&self) -> Time {
        match self.peek() {
            Some(Entry::Clock(time)) => time,
            _ => self.time,
        }
    }

    fn note(&mut self, note: Note<'_>) {
        match note {
            Note::Clock(_) => match self.peek() {
                Some(Entry::Clock(time)) => {
                    self.time = time;
                    self.reader.next();
                }
                Some(_) => self.differs(|| "the clock is looked at, and was not".into()),
                // The record has ended in the middle of a run.
                None => {}
            },
            Note::Waits { request, label } => {
                self.sum.waits(request, label);
                self.done.waits += 1;
            }
            Note::Polled(result) => self.sum.ends(result),
            Note::Ran => match self.peek() {
                Some(Entry::Ran(sum)) => {
                    self.reader.next();
                    if sum != self.sum.short() {
                        self.differs(|| "states, ops or answers are others".into());
                    }
                }
                Some(_) => self.differs(|| "a run ends, and more was recorded of it".into()),
                None => {}
            },
            Note::Submitted { .. } | Note::Run(_) | Note::Called(_) => {}
        }
    }
}

/// What to do after each `run`: go on?
pub type EachRun<'a, D, B> = &'a mut dyn FnMut(&Engine<D, B>) -> bool;

/// Does all that was recorded on this engine, to which the images have been attached as they were then, until `each`, which is
/// asked after every `run`, says that it is enough.
pub fn play<'r, F, D: Driver>(
    engine: &mut Engine<D, Played<'r, F>>,
    each: EachRun<'_, D, Played<'r, F>>,
) -> Verdict {
    let nodes: Vec<Option<NodeId>> = engine.nodes().collect();
    let id = |index: u32| nodes.get(index as usize).copied().flatten();
    let mut tag = 0;
    loop {
        let Some(entry) = engine.backend_mut().reader.next() else {
            return Verdict::Same;
        };
        match entry {
            Entry::Submitted { node, io, lent, bytes } => {
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                let Some(node) = id(node).filter(|_| bytes <= BYTES_MAX) else {
                    return Verdict::Differs("a request is to a disk that is not there".into());
                };
                let mem = match lent {
                    Lent::Nothing => Mem::None,
                    Lent::Buffer => Buf::zeroed(bytes).into(),
                    Lent::Ram { read_only, bits } => {
                        let ram = Ram::standing_in(bytes, bits);
                        Mem::Ram(if read_only { ram.read_only() } else { ram })
                    }
                };
                tag += 1;
                if let Err(refused) = engine.submit(node, io, mem, tag) {
                    return Verdict::Differs(format!("a request is refused: {:?}", refused.why));
                }
                engine.backend_mut().done.requests += 1;
            }
            Entry::Run(now) => {
                engine.backend_mut().time = now;
                engine.backend_mut().done.runs += 1;
                engine.run(now);
                let goes_on = each(engine);
                let backend = engine.backend_mut();
                if let Some(how) = backend.differs.take() {
                    return Verdict::Differs(how);
                }
                if !goes_on {
                    return Verdict::Same;
                }
            }
            Entry::Polled(count) => {
                for _ in 0..count {
                    if engine.poll().is_none() {
                        return Verdict::Differs("fewer requests have ended".into());
                    }
                    engine.backend_mut().done.ended += 1;
                }
            }
            Entry::Called { which: 0, .. } => engine.drain(),
            Entry::Called { which: 1, .. } => drop(engine.poll_event()),
            Entry::Called { which, node } => {
                let Some(node) = id(node) else {
                    return Verdict::Differs("a disk that is not there is asked for".into());
                };
                // Whether it could is recorded by what comes of it.
                match which {
                    2 => drop(engine.close(node)),
                    3 => drop(engine.close_filter(node)),
                    4 => drop(engine.pause(node)),
                    5 => drop(engine.resume(node)),
                    6 => drop(engine.take_files(node)),
                    _ => return Verdict::Untold(format!("method {which}")),
                }
            }
            Entry::Abandoned { node, requests } => {
                let Some(node) = id(node) else {
                    return Verdict::Differs("a disk that is not there gives up requests".into());
                };
                let place = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_le_bytes);
                let places = requests.chunks_exact(4).map(|bytes| ReqId(place(bytes)));
                let tags: Vec<Option<u64>> = places.map(|id| engine.tag_of(id)).collect();
                let given_up = engine.abandon(node, |tag| tags.contains(&Some(tag)));
                if given_up.len() != tags.len() {
                    return Verdict::Differs("other requests are given up".into());
                }
            }
            Entry::Rated { node, rate } => {
                if !id(node).is_some_and(|node| engine.set_rate(node, rate)) {
                    return Verdict::Differs("a disk that is not there has a limit".into());
                }
            }
            Entry::Untold(name) => return Verdict::Untold(name.into()),
            Entry::Clock(_) | Entry::Ran(_) | Entry::Took { .. } | Entry::Done { .. } => {
                return Verdict::Differs(format!("{entry:?} comes outside of a run"));
            }
        }
    }
}

/// No request has more memory.
const BYTES_MAX: usize = 1 << 28;
