//! A real run done again, from its [record](cowbell_engine::record): the same calls at the same times, over a backend that
//! takes and gives back what the real one did. No disk is needed, and no time passes.
//!
//! After every `run` the sum over all that was done (states, ops, answers) is compared. The first that is not the same is where
//! this program is another one than that which was recorded, or where something decides that the record does not know of.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use cowbell_engine::backend::{Backend, Called, Completion, FileInfo, Harvest, Note, Submission};
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::op::{Base, OpKind};
use cowbell_engine::ops::OpRecord;
use cowbell_engine::record::{Entry, Lent, Reader, SECTOR, Sum};
use cowbell_engine::step::{Driver, Io};
use cowbell_engine::sys::ram::Ram;
use cowbell_engine::units::{Errno, FileId, JobId, NodeId, OpId, ReqId, Time};
use cowbell_engine::{Copy, Engine, JobProgress};

use crate::timeline::{Ended, EventKind, Observer, Timeline, words};
use crate::vary::Tables;

/// A place between two entries of a record.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// Bytes before it.
    at: usize,
    /// The last time before it.
    time: Time,
}

impl Place {
    /// The entry behind it, and it moves on.
    fn next<'r>(&mut self, record: &'r [u8]) -> Option<Entry<'r>> {
        let mut reader = Reader::after(self.time, &record[self.at..]);
        let entry = reader.next()?;
        *self = Place { at: record.len() - reader.left(), time: reader.time() };
        Some(entry)
    }
}

/// What was recorded, as a backend.
#[derive(Debug)]
pub struct Played<F> {
    record: Arc<Vec<u8>>,
    /// How much of it has been done.
    place: Place,
    /// What the real backend said of the files that were there before, in the order in which they came.
    infos: Vec<FileInfo>,
    /// How many of those have been attached.
    attached: usize,
    /// Is somebody bringing what came later?
    is_brought: bool,
    files: BTreeMap<FileId, F>,
    sum: Sum,
    /// The last time.
    time: Time,
    /// Ops that were taken and have not come back, and the bytes that each may move.
    in_flight: BTreeMap<OpId, u64>,
    /// How far it is.
    pub done: Done,
    /// How the ops of this `run` came back, if somebody wants to see it.
    came_back: Option<Vec<Ended>>,
    /// What is learnt of the files, if somebody wants it.
    tables: Option<Tables>,
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
    /// It was, as far as the record tells: then comes something that it does not tell enough of.
    Untold(String),
    /// In this `run` something was not as recorded.
    Differs(String),
}

impl<F> Played<F> {
    /// The record, and what the real backend said of the files that were attached before it began, in that order.
    pub fn new(record: Vec<u8>, infos: Vec<FileInfo>) -> Played<F> {
        Played {
            record: Arc::new(record),
            place: Place::default(),
            infos,
            attached: 0,
            is_brought: false,
            files: BTreeMap::new(),
            sum: Sum::default(),
            time: Time(0),
            in_flight: BTreeMap::new(),
            done: Done::default(),
            came_back: None,
            tables: None,
            differs: None,
        }
    }

    /// The time of the record.
    pub fn time(&self) -> Time {
        self.time
    }

    /// What the real backend said of the file that is attached next, if it did not refuse it.
    pub fn next_info(&self) -> Option<FileInfo> {
        match self.peek() {
            (Some(Entry::Attached(info)), _) if self.is_brought => info,
            _ => self.infos.get(self.attached).copied(),
        }
    }

    /// What comes next, and where what is behind it begins.
    fn peek(&self) -> (Option<Entry<'_>>, Place) {
        let mut place = self.place;
        (place.next(&self.record), place)
    }

    /// An op comes back, with this answer, or with that of one that did all it was to do; it brought these bytes, and these
    /// sectors of it are zeros.
    fn comes_back(
        &mut self,
        harvest: &mut Harvest<'_>,
        (op, answer, brought): (OpId, Option<i64>, &[u8]),
        zeros: Option<(u32, &[u8])>,
    ) {
        let Some(moves) = self.in_flight.remove(&op) else {
            return self.differs(|| format!("{op:?} comes back, and is not in flight"));
        };
        let answer = answer.unwrap_or(moves as i64);
        let OpRecord { op: what, owner, .. } = &harvest.ops[op];
        let is_hole = matches!(what.kind, OpKind::Hole);
        if answer > moves as i64 && !is_hole {
            return self.differs(|| format!("{op:?} moves {answer} bytes, and has {moves}"));
        }
        let seg = what.brings_into();
        if let (Some(seg), Some((sectors, bits))) = (seg, zeros) {
            let (from, len) = (seg.off as usize, seg.len as usize);
            let bytes = match seg.base {
                Base::Region(region) => Some(harvest.mem.region_mut(region)),
                Base::Pool(buf) => Some(harvest.mem.pool_mut(buf)),
                _ => None,
            };
            let told = len.div_ceil(SECTOR) == sectors as usize;
            if let Some(bytes) = bytes.filter(|_| told) {
                // What is no zeros may be anything else.
                for (at, sector) in bytes[from..from + len].chunks_mut(SECTOR).enumerate() {
                    sector.fill(u8::from(bits[at / 8] >> (at % 8) & 1 == 0));
                }
            }
        }
        if let Some(seg) = seg
            && let Base::Region(region) = seg.base
            && brought.len() <= seg.len as usize
        {
            let bytes = harvest.mem.region_mut(region);
            bytes[seg.off as usize..][..brought.len()].copy_from_slice(brought);
        }
        self.tables.iter_mut().for_each(|tables| tables.bring(&harvest.ops[op], brought));
        let errno = i32::try_from(answer.unsigned_abs()).unwrap_or(i32::MAX);
        let result = u64::try_from(answer).map_err(|_| Errno(errno));
        if let Some(came_back) = &mut self.came_back {
            let how = match result {
                Err(errno) => errno.to_string(),
                Ok(moved) if moved < moves => "short".into(),
                Ok(_) => "ok".into(),
            };
            let is_bad = how != "ok";
            let number = harvest.ops.serial(owner.request);
            came_back.push(Ended { number, ordinal: owner.ordinal, how, is_bad });
        }
        harvest.done.push(Completion::new(op, result));
    }

    /// Is this what comes next? Then it has been done.
    fn is_next(&mut self, what: &str, is_it: impl FnOnce(&Entry<'_>) -> bool) {
        match self.peek() {
            (Some(entry), place) if is_it(&entry) => self.place = place,
            // The record has ended in the middle of it.
            (None, _) => {}
            _ => self.differs(|| format!("{what}, and something else was done")),
        }
    }

    fn differs(&mut self, how: impl FnOnce() -> String) {
        self.differs.get_or_insert_with(how);
    }
}

impl<F> Backend for Played<F> {
    type File = F;

    fn attach(&mut self, id: FileId, file: F) -> io::Result<FileInfo> {
        let info = self.next_info();
        if self.is_brought {
            self.is_next("a file is attached", |entry| matches!(entry, Entry::Attached(_)));
        } else {
            self.attached += 1;
        }
        let info = info.ok_or_else(|| io::Error::other("no such file was recorded"))?;
        self.files.insert(id, file);
        Ok(info)
    }

    fn detach(&mut self, id: FileId) -> Option<F> {
        self.files.remove(&id)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        let offered: Vec<OpId> = submission.waiting().to_vec();
        for &op in &offered {
            self.sum.takes(op, &submission.ops[op]);
        }
        let record = Arc::clone(&self.record);
        let mut place = self.place;
        let Some(Entry::Took { count, places }) = place.next(&record) else {
            return self.differs(|| format!("{} ops are offered, and none were", offered.len()));
        };
        self.place = place;
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
            self.tables.iter_mut().for_each(|tables| tables.take(record));
            let moves = matches!(record.op.kind, OpKind::Read | OpKind::Write { .. });
            self.in_flight.insert(op, if moves { record.remaining() } else { 0 });
        }
        self.done.ops += taken.len() as u64;
        submission.take_if(|op, _| taken.contains(&op));
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        let record = Arc::clone(&self.record);
        loop {
            let mut place = self.place;
            let mut next = place.next(&record);
            let mut zeros = None;
            if let Some(Entry::Zeros { sectors, bits }) = next {
                zeros = Some((sectors, bits));
                self.place = place;
                next = place.next(&record);
            }
            match next {
                Some(Entry::Whole(ops)) => {
                    self.place = place;
                    let number = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_le_bytes);
                    for op in ops.chunks_exact(4) {
                        self.comes_back(harvest, (OpId(number(op)), None, &[]), None);
                    }
                }
                Some(Entry::Done { op, answer, brought }) => {
                    self.place = place;
                    self.comes_back(harvest, (op, answer, brought), zeros);
                }
                _ => return,
            }
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn clock(&self) -> Time {
        match self.peek() {
            (Some(Entry::Clock(time)), _) => time,
            _ => self.time,
        }
    }

    fn note(&mut self, note: Note<'_>) {
        match note {
            Note::Clock(_) => match self.peek() {
                (Some(Entry::Clock(time)), place) => {
                    self.time = time;
                    self.place = place;
                }
                (Some(_), _) => self.differs(|| "the clock is looked at, and was not".into()),
                // The record has ended in the middle of a run.
                (None, _) => {}
            },
            Note::Waits { request, label } => {
                self.sum.waits(request, label);
                self.done.waits += 1;
            }
            Note::Polled(result) => self.sum.ends(result),
            Note::Ran => match self.peek() {
                (Some(Entry::Ran(sum)), place) => {
                    self.place = place;
                    if sum != self.sum.short() {
                        self.differs(|| "states, ops or answers are others".into());
                    }
                }
                (Some(_), _) => self.differs(|| "a run ends, and more was recorded of it".into()),
                (None, _) => {}
            },
            Note::Called(called) if self.is_brought => match called {
                Called::Region(len) => {
                    self.is_next("memory is asked for", |entry| *entry == Entry::Region(len as u64))
                }
                Called::Add => self.is_next("a node is added", |entry| *entry == Entry::Added),
                Called::Detach(file) => {
                    self.is_next("a file is detached", |entry| *entry == Entry::Detached(file))
                }
                Called::SetQuota(its, quota) => self.is_next("a quota is set", |entry| {
                    let Entry::Quota { node, requests_max } = *entry else { return false };
                    (node as usize, requests_max) == (its.index(), quota)
                }),
                _ => self.differs(|| "a disk is brought, and something else is done".into()),
            },
            Note::Submitted { .. } | Note::Run(_) | Note::Called(_) => {}
        }
    }
}

/// What has just been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A request was submitted.
    Submitted(Io),
    /// `run` was called.
    Ran,
    /// Something else was called: a drain, a disk that is closed, paused or resumed, or gives up requests.
    Called,
}

/// What to do after each moment: go on?
pub type Each<'a, D, F> = &'a mut dyn FnMut(&Engine<D, Played<F>>, Moment) -> bool;

/// Who brings a disk that came later: it opens the image as it was then, and [attaches](cowbell_formats::attach) it as was done
/// then. An error says why it cannot.
pub type Bring<'p, D, F> = Box<dyn FnMut(&mut Engine<D, Played<F>>) -> Result<(), String> + 'p>;

/// A run that is done again.
pub struct Player<'p, D: Driver, F> {
    engine: Engine<D, Played<F>>,
    /// The disks.
    nodes: Vec<Option<NodeId>>,
    bring: Option<Bring<'p, D, F>>,
    /// The last request's tag.
    tag: u64,
    /// The copies that were started.
    jobs: Vec<JobId>,
}

impl<D: Driver, F> std::fmt::Debug for Player<'_, D, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Player({:?})", self.engine.backend().done)
    }
}

impl<'p, D: Driver, F> Player<'p, D, F> {
    /// On this engine, to which the images have been attached that were there when the record began, as they were then.
    pub fn new(engine: Engine<D, Played<F>>) -> Player<'p, D, F> {
        let nodes = engine.nodes().collect();
        Player { engine, nodes, bring: None, tag: 0, jobs: Vec::new() }
    }

    /// `bring` is called for each disk that came later. Without it the run is done again up to the first of them.
    #[must_use]
    pub fn with_later_disks(
        mut self,
        bring: impl FnMut(&mut Engine<D, Played<F>>) -> Result<(), String> + 'p,
    ) -> Player<'p, D, F> {
        self.bring = Some(Box::new(bring));
        self
    }

    /// The engine, as it is now.
    pub fn engine(&self) -> &Engine<D, Played<F>> {
        &self.engine
    }

    /// How far the so many'th copy is, if it runs.
    pub fn progress(&self, job: usize) -> Option<JobProgress> {
        self.jobs.get(job).and_then(|&job| self.engine.job_progress(job))
    }

    /// Where what is learnt of tables is put, if somebody wants to know it.
    pub fn tables(&mut self) -> &mut Option<Tables> {
        &mut self.engine.backend_mut().tables
    }

    /// The record goes on with this, if all that came before has been done. Whole chunks, as a
    /// [`Sink`](cowbell_engine::record::Sink) gets them.
    pub fn goes_on(&mut self, record: Vec<u8>) {
        let played = self.engine.backend_mut();
        (played.record, played.place.at) = (Arc::new(record), 0);
    }

    /// Does all that is left of the record, until `each`, which is asked after everything that was done, says that it
    /// is enough.
    pub fn play(&mut self, each: Each<'_, D, F>) -> Verdict {
        loop {
            let played = self.engine.backend_mut();
            let (record, before) = (Arc::clone(&played.record), played.place);
            let Some(entry) = played.place.next(&record) else { return Verdict::Same };
            let does = match entry {
                Entry::Attached(_) | Entry::Region(_) | Entry::Added => self.is_brought(before),
                entry => self.does(entry),
            };
            let moment = match does {
                Ok(None) => continue,
                Ok(Some(moment)) => moment,
                Err(verdict) => return verdict,
            };
            let goes_on = each(&self.engine, moment);
            if let Some(how) = self.engine.backend_mut().differs.take() {
                return Verdict::Differs(how);
            }
            if !goes_on {
                return Verdict::Same;
            }
        }
    }

    /// The same, and what happens from turn `from` on is noted. `title` and `about`: of what.
    pub fn play_seen(
        &mut self,
        (title, about): (String, Vec<String>),
        from: u64,
        each: Each<'_, D, F>,
    ) -> (Verdict, Timeline) {
        let mut observer = Observer::new(title, about);
        self.engine.backend_mut().came_back = Some(Vec::new());
        let mut begun = from <= self.engine.backend().done.runs;
        if begun {
            observer.begin(&self.engine, self.engine.backend().time);
        }
        let verdict = self.play(&mut |engine, moment| {
            let Played { time, done, came_back, .. } = engine.backend();
            if done.runs >= from {
                if !std::mem::replace(&mut begun, true) {
                    observer.begin(engine, *time);
                }
                let came_back = came_back.as_deref().unwrap_or_default();
                let (what, kind) = match moment {
                    Moment::Submitted(io) => {
                        (format!("the guest submits: {}", words(&io)), EventKind::Submit)
                    }
                    Moment::Ran => {
                        let bad = came_back.iter().any(|ended| ended.is_bad);
                        let kind = if bad { EventKind::Fault } else { EventKind::Complete };
                        (format!("turn {}: {} ops come back", done.runs, came_back.len()), kind)
                    }
                    Moment::Called => ("the embedder calls".into(), EventKind::Life),
                };
                let ended = came_back.iter().filter(|_| moment == Moment::Ran).cloned();
                observer.happens(what, kind, ended);
                observer.look(engine, *time);
            }
            each(engine, moment)
        });
        self.engine.backend_mut().came_back = None;
        if let Verdict::Differs(how) = &verdict {
            observer.went_wrong(how.as_str(), false);
        }
        let mut timeline = observer.finish();
        timeline.has_times();
        (verdict, timeline)
    }

    /// What begins at this place is a disk that came later.
    fn is_brought(&mut self, begins: Place) -> Result<Option<Moment>, Verdict> {
        let Some(bring) = &mut self.bring else {
            return Err(Verdict::Untold("a disk comes".into()));
        };
        let played = self.engine.backend_mut();
        (played.place, played.is_brought) = (begins, true);
        let brought = bring(&mut self.engine);
        let played = self.engine.backend_mut();
        played.is_brought = false;
        if let Err(why) = brought {
            return Err(Verdict::Untold(format!("a disk comes: {why}")));
        }
        if played.place.at == begins.at {
            return Err(Verdict::Differs("a disk comes, and nobody has brought it".into()));
        }
        self.nodes = self.engine.nodes().collect();
        Ok(Some(Moment::Called))
    }

    fn node(&self, index: u32, what: &str) -> Result<NodeId, Verdict> {
        let node = self.nodes.get(index as usize).copied().flatten();
        node.ok_or_else(|| Verdict::Differs(format!("a disk that is not there {what}")))
    }

    /// Takes so many finished requests.
    fn polls(&mut self, count: u8) -> Result<(), Verdict> {
        for _ in 0..count {
            if self.engine.poll().is_none() {
                return Err(Verdict::Differs("fewer requests have ended".into()));
            }
            self.engine.backend_mut().done.ended += 1;
        }
        Ok(())
    }

    /// Does what this entry says. `None`: of what comes of it there is nothing to be seen.
    fn does(&mut self, entry: Entry<'_>) -> Result<Option<Moment>, Verdict> {
        let differs = |how: &str| Err(Verdict::Differs(how.into()));
        match entry {
            Entry::Submitted { polled, node, io, lent, bytes } => {
                if polled {
                    self.polls(1)?;
                }
                let node = self.node(node, "is asked")?;
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                if bytes > BYTES_MAX {
                    return differs("a request has more memory than any has");
                }
                let mem = match lent {
                    Lent::Nothing => Mem::None,
                    Lent::Buffer => Buf::zeroed(bytes).into(),
                    Lent::Ram { read_only, bits } => {
                        let ram = Ram::standing_in(bytes, bits);
                        Mem::Ram(if read_only { ram.read_only() } else { ram })
                    }
                };
                self.tag += 1;
                if let Err(refused) = self.engine.submit(node, io, mem, self.tag) {
                    return differs(&format!("a request is refused: {:?}", refused.why));
                }
                self.engine.backend_mut().done.requests += 1;
                return Ok(Some(Moment::Submitted(io)));
            }
            Entry::Run(now) => {
                let backend = self.engine.backend_mut();
                backend.time = now;
                backend.done.runs += 1;
                backend.came_back.iter_mut().for_each(Vec::clear);
                self.engine.run(now);
                return Ok(Some(Moment::Ran));
            }
            Entry::Polled(count) => {
                self.polls(count)?;
                return Ok(None);
            }
            Entry::Called { which: 1, .. } => {
                self.engine.poll_event();
                return Ok(None);
            }
            Entry::Called { which: 0, .. } => self.engine.drain(),
            Entry::Called { which, node } => {
                let node = self.node(node, "is asked for")?;
                // Whether it could is recorded by what comes of it.
                match which {
                    2 => drop(self.engine.close(node)),
                    3 => drop(self.engine.close_filter(node)),
                    4 => drop(self.engine.pause(node)),
                    5 => drop(self.engine.resume(node)),
                    6 => drop(self.engine.take_files(node)),
                    _ => return Err(Verdict::Untold(format!("method {which}"))),
                }
            }
            Entry::Abandoned { node, requests } => {
                let node = self.node(node, "gives up requests")?;
                let place = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_le_bytes);
                let places = requests.chunks_exact(4).map(|bytes| ReqId(place(bytes)));
                let tags: Vec<Option<u64>> = places.map(|id| self.engine.tag_of(id)).collect();
                let given_up = self.engine.abandon(node, |tag| tags.contains(&Some(tag)));
                if given_up.len() != tags.len() {
                    return differs("other requests are given up");
                }
            }
            Entry::Started { copy, source, target, parts } => {
                let source = self.node(source, "is copied")?;
                let target = self.node(target, "is copied to")?;
                let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
                let part = |pair: &[u8]| number(&pair[..8])..number(&pair[8..]);
                let parts: Option<Vec<_>> =
                    parts.map(|parts| parts.chunks_exact(16).map(part).collect());
                let Some(copy) = Copy::from_numbers(source, target, copy) else {
                    return differs("a copy is started that is none");
                };
                let runs = |job: &&JobId| self.engine.job_progress(**job).is_some();
                if self.jobs.iter().filter(runs).count() >= JOBS_MAX {
                    return differs("more copies at a time than a program has");
                }
                // Whether it could is recorded by what comes of it.
                let started = match parts {
                    Some(parts) => self.engine.start_parts(copy, &parts),
                    None => self.engine.start(copy),
                };
                self.jobs.extend(started);
            }
            Entry::Job { what, job } => {
                let Some(&job) = self.jobs.get(job as usize) else {
                    return differs("a job that is not there is spoken of");
                };
                match what {
                    0 => self.engine.job_seen(job),
                    1 => self.engine.pause_job(job),
                    2 => self.engine.resume_job(job),
                    3 => self.engine.cancel_job(job),
                    _ => return Err(Verdict::Untold(format!("method {what} of a job"))),
                };
            }
            Entry::Quota { node, requests_max } => {
                let node = self.node(node, "has a quota")?;
                if !self.engine.set_quota(node, requests_max) {
                    return differs("a disk that is gone has a quota");
                }
            }
            Entry::Rated { node, rate } => {
                let node = self.node(node, "has a limit")?;
                if !self.engine.set_rate(node, rate) {
                    return differs("a disk that is gone has a limit");
                }
            }
            Entry::Detached(file) => drop(self.engine.detach(file)),
            Entry::Attached(_)
            | Entry::Region(_)
            | Entry::Added
            | Entry::Clock(_)
            | Entry::Ran(_)
            | Entry::Took { .. }
            | Entry::Zeros { .. }
            | Entry::Done { .. }
            | Entry::Whole(_) => {
                return differs(&format!("{entry:?} comes outside of a run"));
            }
        }
        Ok(Some(Moment::Called))
    }
}

/// More copies at a time nobody has. Each takes 128 MiB at most, whatever the record says.
const JOBS_MAX: usize = 16;

/// No request has more memory.
const BYTES_MAX: usize = 1 << 28;
