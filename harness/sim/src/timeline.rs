//! What happened in a run, as plain data: for a page or another program to show.
//!
//! An [`Observer`] looks at an engine after every event and notes what has changed. It needs nothing of
//! the simulator: who runs a real engine step by step may look at that one. Moments are counted in events,
//! from 0 on; each event has its [time](Event::time) as well.
//!
//! *What is seen* is what there is when the observer looks. A request of the engine's own that begins and ends
//! between two looks is counted ([`Event::unseen`]), no more; so is a state that a request leaves in the
//! step that it entered it with.

use std::collections::BTreeMap;
use std::ops::Range;

use cowbell_engine::backend::Backend;
use cowbell_engine::op::{OpKind, Target};
use cowbell_engine::step::{Driver, Io, IoKind};
use cowbell_engine::trace::Kind as OpWord;
use cowbell_engine::units::{ReqId, Time};
use cowbell_engine::wait::On;
use cowbell_engine::{Asker, Awaits, Engine, RequestInfo};

use crate::disk;

/// An event, by its number.
pub type At = u32;

/// A run. What belongs to what is said by places in these lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    /// What was run, in a few words.
    pub title: String,
    /// What was asked for, and on which image: a line each.
    pub about: Vec<String>,
    /// Are the events' times those of a real run?
    pub is_timed: bool,
    /// What went wrong, if anything did.
    pub verdict: Option<Verdict>,
    /// From when on it could only go wrong, if that was [asked](crate::cause).
    pub cause: Option<Mark>,
    /// From when on nothing more went wrong, and still it did not end well.
    pub calm_from: Option<At>,
    /// What it is shown for, if that is one request.
    pub focus: Option<Focus>,
    /// What the trace says went wrong when it was recorded.
    pub recorded: Option<String>,
    /// Choices of the trace that were not possible any more.
    pub missed: usize,
    /// What happened, first to last. The first is the beginning.
    pub events: Vec<Event>,
    /// The requests that were seen, in the order in which they began.
    pub requests: Vec<Request>,
    /// The ops that were seen, in the order in which they were submitted.
    pub ops: Vec<Op>,
}

/// A request to be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Focus {
    /// Which: a place.
    pub request: usize,
    /// What is to be said of it, a line each.
    pub lines: Vec<String>,
}

/// Something to be said of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Which.
    pub at: At,
    /// What.
    pub text: String,
}

/// How a run went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// In which moment.
    pub at: At,
    /// What.
    pub text: String,
    /// Is it what a crash in that moment would leave?
    pub is_crash: bool,
    /// Then: what that crash has kept and lost of what was not safe.
    pub left: Vec<Left>,
    /// More of it in words, a line each.
    pub more: Vec<String>,
}

/// What the crash has left of an op's change. What was there already before, or was changed again, is in neither.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// Which op: a place.
    pub op: usize,
    /// The bytes of its file that are as it left them.
    pub kept: Vec<Range<u64>>,
    /// Those that are not.
    pub lost: Vec<Range<u64>>,
}

/// What kind of event it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EventKind {
    /// The beginning, or something else.
    #[default]
    Other,
    /// A guest submits a request.
    Submit,
    /// An op comes back, well.
    Complete,
    /// Something fails, or the device does.
    Fault,
    /// A deadline passes.
    Deadline,
    /// The machine stops, and starts again.
    Crash,
    /// A disk is drained, closed, paused or resumed.
    Life,
}

impl EventKind {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            EventKind::Other => "other",
            EventKind::Submit => "submit",
            EventKind::Complete => "complete",
            EventKind::Fault => "fault",
            EventKind::Deadline => "deadline",
            EventKind::Crash => "crash",
            EventKind::Life => "life",
        }
    }
}

/// What happened in a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// In plain words.
    pub what: String,
    /// What kind it is.
    pub kind: EventKind,
    /// The engine's time then: nanoseconds.
    pub time: u64,
    /// When the engine wanted to be woken next, after it.
    pub deadline: Option<u64>,
    /// So many images that a crash might have left after it were looked at.
    pub crash_images: u64,
    /// Requests of the engine's own that began and ended in it.
    pub unseen: u32,
}

/// Who asked for something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// A guest, who calls it so.
    Guest(u64),
    /// Nobody: a disk's own work, or the engine's.
    Nobody,
    /// Another request, by its place.
    Request(usize),
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its number in time, as the engine counts.
    pub number: u32,
    /// Crashes before it: the engine counts anew after each.
    pub life: u32,
    /// The disk or layer, as the engine prints it; empty: work on a file.
    pub node: String,
    /// Who asked.
    pub by: By,
    /// What was asked.
    pub what: String,
    /// When it was first seen.
    pub begin: At,
    /// When it had ended; `None`: it never did.
    pub end: Option<At>,
    /// How: `ok`, an error, `crash`, or empty where nobody can tell.
    pub result: String,
    /// The states that it was in, first to last; none overlap.
    pub stays: Vec<Stay>,
}

/// What a request waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Nothing: its turn to be stepped.
    Step,
    /// Its own ops, and requests made for it.
    Ops,
    /// A flush that another has asked for.
    Flush,
    /// Something that others have.
    List(On),
}

impl Wait {
    /// In plain words.
    pub fn words(self) -> &'static str {
        let Wait::List(on) = self else {
            return match self {
                Wait::Ops => "its own ops",
                Wait::Flush => "a flush that another request has asked for",
                _ => "its turn to be stepped",
            };
        };
        match on {
            On::Table => "a mapping table that another request loads, makes or moves",
            On::CacheSlot => "room in the cache of tables",
            On::Cluster => "a cluster that another request allocates or frees",
            On::Compressed => "compressed contents that another request reads",
            On::FreeClusters => "free clusters",
            On::Refcounts => "refcounts that are being written",
            On::Writeback => "tables that are being written",
            On::FileLength => "a file that is being made longer",
            On::Header => "the header, which another request changes",
            On::ContentId => "the image's content id to change on disk",
            On::Turn => "its turn: one request at a time goes on here",
            On::Resize => "a change of the disk's size",
            On::Buffer => "a buffer",
            On::Blocks => "blocks of the file that another request has to itself",
            On::Quiet => "the end of what is in flight on the file",
            On::Users => "the end of all who may still use what was given up",
            On::Job => "its job: time, to be resumed, or that what was read is seen",
            On::Copy => "a copy that reads first what is to be changed",
            On::Held => "to be let begin: a limit, or an older write",
        }
    }

    /// Does it wait for others?
    pub fn is_for_others(self) -> bool {
        matches!(self, Wait::Flush | Wait::List(_))
    }
}

/// A request in one state, waiting for one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stay {
    /// The state's name.
    pub state: &'static str,
    /// What it waits for.
    pub wait: Wait,
    /// Who has to go on first, if the engine can tell: a place.
    pub keeper: Option<usize>,
    /// Who is before it on the list it waits on: a place.
    pub ahead: Option<usize>,
    /// From when.
    pub from: At,
    /// Until when. Where the run stopped, that is the last moment.
    pub to: At,
    /// Of a wait for others that is over: the request that let it go on, if that can be told.
    pub let_go_by: Option<usize>,
}

/// An op: what the disk, or a processor, did for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// Whose: a place.
    pub request: usize,
    /// Which of its ops.
    pub ordinal: u32,
    /// What, in a word or two.
    pub kind: &'static str,
    /// Is it a flush?
    pub is_flush: bool,
    /// Does it change its file?
    pub changes: bool,
    /// The file, as the engine prints it; empty: none.
    pub file: String,
    /// The first byte in it.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// When it was submitted.
    pub from: At,
    /// When it was done; `None`: it never was.
    pub to: Option<At>,
    /// How, if that was told. `crash`: the machine stopped.
    pub how: String,
    /// Did it fail, or do a part only?
    pub is_bad: bool,
    /// Earlier ends that did not do all of it, so that it went on: when, and how.
    pub tries: Vec<(At, String)>,
    /// It is done, and has changed its file: until then a crash could take that away. Behind the last moment: to the
    /// end. `None`: there was nothing that it could take away.
    pub unsafe_until: Option<At>,
    /// Was it safe then? If not, the run was over, or the machine stopped.
    pub is_safe: bool,
}

/// What is told of the end of an op: whose it is, by number, which of them, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The request's number.
    pub number: u32,
    /// Which of its ops.
    pub ordinal: u32,
    /// How it ended, in a word.
    pub how: String,
    /// Did it fail, or do a part only?
    pub is_bad: bool,
}

/// Sees what changes. Call [`Observer::begin`] first; then, for each event, [`Observer::happens`] and
/// [`Observer::look`].
#[derive(Debug, Default)]
pub struct Observer {
    line: Timeline,
    /// The places of requests that are there, by number.
    requests: BTreeMap<u32, usize>,
    /// The places of ops that are there, by request number and ordinal.
    ops: BTreeMap<(u32, u32), usize>,
    next_number: u32,
    life: u32,
    /// What was told of this event.
    ended: Vec<Ended>,
}

impl Observer {
    /// One that has seen nothing yet.
    pub fn new(title: impl Into<String>, about: Vec<String>) -> Observer {
        let line = Timeline { title: title.into(), about, ..Timeline::default() };
        Observer { line, ..Observer::default() }
    }

    /// The engine as it is at first.
    pub fn begin<D: Driver, B: Backend>(&mut self, engine: &Engine<D, B>, now: Time) {
        self.next_number = engine.next_number();
        self.happens("the run begins".into(), EventKind::Other, None);
        self.look(engine, now);
    }

    /// Something is to happen; `ended`: the ops that come back.
    pub fn happens(
        &mut self,
        what: String,
        kind: EventKind,
        ended: impl IntoIterator<Item = Ended>,
    ) {
        let time = self.line.events.last().map_or(0, |last| last.time);
        self.line.events.push(Event { what, kind, time, ..Event::default() });
        self.ended.clear();
        self.ended.extend(ended);
        if kind == EventKind::Crash {
            self.stop();
        }
    }

    /// What is in flight is gone: an engine that was never seen comes next.
    fn stop(&mut self) {
        let at = self.at();
        for place in std::mem::take(&mut self.requests).into_values() {
            let request = &mut self.line.requests[place];
            (request.end, request.result) = (Some(at), "crash".into());
            request.leave(at, None);
        }
        for place in std::mem::take(&mut self.ops).into_values() {
            let op = &mut self.line.ops[place];
            (op.to, op.how) = (Some(at), "crash".into());
        }
        (self.life, self.next_number) = (self.life + 1, 0);
    }

    /// The event that is happening.
    fn at(&self) -> At {
        self.line.events.len().saturating_sub(1) as At
    }

    /// It has happened: what has changed? Best before those who have ended are polled, since how they ended
    /// is gone afterwards.
    pub fn look<D: Driver, B: Backend>(&mut self, engine: &Engine<D, B>, now: Time) {
        let at = self.at();
        let known = self.line.requests.len();
        let mut there: Vec<RequestInfo> = engine.requests().collect();
        there.sort_unstable_by_key(|info| info.number.wrapping_sub(self.next_number) as i32);
        let mut places = BTreeMap::new();
        for info in &there {
            let place = match self.requests.get(&info.number) {
                Some(&place) => place,
                None => self.add(info, at),
            };
            places.insert(info.id, place);
        }
        for info in &there {
            if let Asker::Request(parent) = info.asker
                && let Some(&parent) = places.get(&parent)
            {
                self.line.requests[places[&info.id]].by = By::Request(parent);
            }
        }
        let causes = self.look_at_ops(engine, &places, at);
        self.look_at_requests(&there, &places, &causes, at);
        let began = engine.next_number().wrapping_sub(self.next_number);
        let seen = (self.line.requests.len() - known) as u32;
        self.next_number = engine.next_number();
        if let Some(event) = self.line.events.last_mut() {
            event.unseen = began.saturating_sub(seen);
            (event.time, event.deadline) = (now.0, engine.next_deadline().map(|due| due.0));
        }
    }

    fn add(&mut self, info: &RequestInfo, at: At) -> usize {
        let place = self.line.requests.len();
        let by = match info.asker {
            Asker::Guest(tag) | Asker::GivenUp(tag) => By::Guest(tag),
            Asker::Nobody | Asker::Request(_) => By::Nobody,
        };
        self.line.requests.push(Request {
            number: info.number,
            life: self.life,
            node: info.node.map_or(String::new(), |node| format!("{node:?}")),
            by,
            what: match (info.apart, info.asker) {
                (Some(OpKind::Truncate), _) => {
                    format!("set a file's length to {:#x}", info.io.offset)
                }
                (Some(kind), _) => {
                    let (word, io) = (OpWord::of(kind).name(), info.io);
                    format!("{word} {:#x}+{:#x} of a file", io.offset, io.len)
                }
                (None, Asker::Nobody) => format!("own work: {}", info.state),
                (None, _) => words(&info.io),
            },
            begin: at,
            end: None,
            result: String::new(),
            stays: Vec::new(),
        });
        self.requests.insert(info.number, place);
        place
    }

    /// Answers the requests of which an op has come back.
    fn look_at_ops<D: Driver, B: Backend>(
        &mut self,
        engine: &Engine<D, B>,
        places: &BTreeMap<ReqId, usize>,
        at: At,
    ) -> Vec<usize> {
        let mut left = std::mem::take(&mut self.ops);
        let mut causes = Vec::new();
        for told in std::mem::take(&mut self.ended) {
            let Some(&place) = left.get(&(told.number, told.ordinal)) else { continue };
            let op = &mut self.line.ops[place];
            (op.how, op.is_bad) = (told.how, told.is_bad);
            if !causes.contains(&op.request) {
                causes.push(op.request);
            }
        }
        for (_, record) in engine.ops().iter() {
            let Some(&request) = places.get(&record.owner.request) else { continue };
            let number = self.line.requests[request].number;
            let key = (number, record.owner.ordinal);
            if let Some(place) = left.remove(&key) {
                let op = &mut self.line.ops[place];
                if !op.how.is_empty() {
                    op.tries.push((at, std::mem::take(&mut op.how)));
                    op.is_bad = false;
                }
                self.ops.insert(key, place);
                continue;
            }
            self.ops.insert(key, self.line.ops.len());
            let op = &record.op;
            let is_flush = op.kind == OpKind::Flush;
            let changes = op.kind.modifies();
            self.line.ops.push(Op {
                request,
                ordinal: record.owner.ordinal,
                kind: OpWord::of(op.kind).name(),
                is_flush,
                changes,
                file: match op.target {
                    Target::File(file) => format!("{file:?}"),
                    Target::Node(_) | Target::Cpu => String::new(),
                },
                offset: op.offset,
                len: op.len,
                from: at,
                to: None,
                how: String::new(),
                is_bad: false,
                tries: Vec::new(),
                unsafe_until: None,
                is_safe: false,
            });
        }
        for place in left.into_values() {
            let op = &mut self.line.ops[place];
            op.to = Some(at);
            if !causes.contains(&op.request) {
                causes.push(op.request);
            }
        }
        causes
    }

    fn look_at_requests(
        &mut self,
        there: &[RequestInfo],
        places: &BTreeMap<ReqId, usize>,
        causes: &[usize],
        at: At,
    ) {
        let ahead: BTreeMap<ReqId, ReqId> =
            there.iter().filter_map(|info| Some((info.next?, info.id))).collect();
        let mut gone = std::mem::take(&mut self.requests);
        for info in there {
            let place = places[&info.id];
            let wait = match info.awaits {
                Awaits::Poll(result) => {
                    let request = &mut self.line.requests[place];
                    if request.end.is_none() {
                        let result =
                            result.map_or_else(|errno| errno.to_string(), |()| "ok".into());
                        (request.end, request.result) = (Some(at), result);
                        request.leave(at, causes.first().copied().filter(|&by| by != place));
                    }
                    // It may be there at the next look, too.
                    self.requests.insert(info.number, place);
                    gone.remove(&info.number);
                    continue;
                }
                Awaits::Nothing => Wait::Step,
                Awaits::Ops(_) => Wait::Ops,
                Awaits::Flush => Wait::Flush,
                Awaits::List(on) => Wait::List(on),
            };
            gone.remove(&info.number);
            self.requests.insert(info.number, place);
            let of = |id: Option<ReqId>| id.and_then(|id| places.get(&id).copied());
            let (keeper, ahead) = (of(info.keeper), of(ahead.get(&info.id).copied()));
            let by = self.by_whom(place, causes);
            self.line.requests[place].stays_in(info.state, wait, keeper, ahead, by, at);
        }
        // Whose end nobody polls.
        for place in gone.into_values() {
            let by = self.by_whom(place, causes);
            let request = &mut self.line.requests[place];
            if request.end.is_none() {
                request.end = Some(at);
                request.leave(at, by);
            }
        }
    }

    /// If a request that waits for others goes on now: who has let it go on? The one that kept it, if it is
    /// known; else the one of which an op has come back.
    fn by_whom(&self, place: usize, causes: &[usize]) -> Option<usize> {
        let keeper = self.line.requests[place].stays.last().and_then(|stay| stay.keeper);
        let cause = causes.first().copied().filter(|_| causes.len() == 1);
        keeper.or(cause).filter(|&by| by != place)
    }

    /// Crashes after the last event would leave so many images, and none is wrong.
    pub fn crashes_looked_at(&mut self, images: u64) {
        if let Some(event) = self.line.events.last_mut() {
            event.crash_images += images;
        }
    }

    /// It went wrong in the last event; `is_crash`: in what a crash after it would leave.
    pub fn went_wrong(&mut self, text: impl Into<String>, is_crash: bool) {
        let (at, text) = (self.at(), text.into());
        let (left, more) = (Vec::new(), Vec::new());
        self.line.verdict = Some(Verdict { at, text, is_crash, left, more });
    }

    /// From the last event on nothing more goes wrong.
    pub fn is_calm(&mut self) {
        self.line.calm_from = Some(self.at());
    }

    /// Nothing can happen any more: who waits, and for what.
    pub fn who_waits(&mut self) {
        let mut lines = Vec::new();
        for &place in self.requests.values() {
            let request = &self.line.requests[place];
            let Some(stay) = request.stays.last().filter(|_| request.end.is_none()) else {
                continue;
            };
            let whose = stay.keeper.map_or(String::new(), |keeper| {
                format!(", which is {}'s", self.line.requests[keeper].name())
            });
            let (name, what, wait) = (request.name(), &request.what, stay.wait.words());
            lines.push(format!("{name} ({what}) waits for {wait}{whose}."));
        }
        let more = lines.len().saturating_sub(NAMED);
        lines.truncate(NAMED);
        lines.extend((more > 0).then(|| format!("So do {more} more.")));
        if self.ops.is_empty() {
            lines.push("No op is in flight whose end could let anybody go on.".into());
        }
        if let Some(verdict) = &mut self.line.verdict {
            verdict.more = lines;
        }
    }

    /// The crash by which it went wrong has left this. `wrong`: the first byte of the disk that is, and where it lies;
    /// `complaints`: what a check says.
    pub fn crash_left(
        &mut self,
        changes: &[disk::Left],
        wrong: Option<(u64, Option<(usize, u64)>)>,
        complaints: &[String],
    ) {
        let mut left: Vec<Left> = Vec::new();
        for change in changes {
            let is_it = |op: &Op| {
                let request = &self.line.requests[op.request];
                change.by.is_some_and(|by| (by.request, by.ordinal) == (request.number, op.ordinal))
                    && request.life == self.life
            };
            let Some(op) = self.line.ops.iter().rposition(is_it) else { continue };
            let (mut kept, mut lost) = (change.kept.clone(), change.lost.clone());
            let whole = self.line.ops[op].offset
                ..self.line.ops[op].offset.saturating_add(self.line.ops[op].len);
            match change.length {
                Some(true) => kept.push(whole),
                Some(false) => lost.push(whole),
                None => {}
            }
            match left.iter_mut().find(|known| known.op == op) {
                // It did a part at first.
                Some(known) => {
                    known.kept.append(&mut kept);
                    known.lost.append(&mut lost);
                }
                None => left.push(Left { op, kept, lost }),
            }
        }
        left.retain(|left| !left.kept.is_empty() || !left.lost.is_empty());
        let mut lines = self.line.in_words(&left);
        if let Some((at, place)) = wrong {
            let lies = match place {
                Some((file, host)) => {
                    let history = self.history(&format!("f{file}"), host);
                    format!("byte {host:#x} of f{file}. {history}")
                }
                None => "in no file: it reads as zeros.".into(),
            };
            let wrong = "Wrong is, first of all, byte";
            lines.push(format!("{wrong} {at:#x} of the disk, which is then {lies}"));
        }
        lines.extend(complaints.iter().map(|line| format!("A check says: {line}")));
        if let Some(verdict) = &mut self.line.verdict {
            (verdict.left, verdict.more) = (left, lines);
        }
    }

    /// Which ops have changed this byte of a file, in words: in the order in which they were done, the last few.
    fn history(&self, file: &str, byte: u64) -> String {
        let end = self.line.events.len() as At;
        let is_it = |op: &&Op| {
            let range = op.offset..op.offset.saturating_add(op.len);
            op.changes && op.file == file && range.contains(&byte)
        };
        let mut ops: Vec<&Op> = self.line.ops.iter().filter(is_it).collect();
        ops.sort_by_key(|op| op.to.unwrap_or(end));
        let told = |op: &&Op| {
            let name = self.line.op_name(op);
            match op.to {
                Some(to) if op.is_bad => format!("{name}, which failed in event {to}"),
                Some(to) => format!("{name}, done in event {to}"),
                None => format!("{name}, in flight"),
            }
        };
        let last = &ops[ops.len().saturating_sub(HISTORY)..];
        match last {
            [] => "No op of this run changes that byte.".into(),
            _ => {
                let told: Vec<String> = last.iter().map(told).collect();
                format!("Ops that change that byte: {}.", told.join("; "))
            }
        }
    }

    /// All that was seen.
    pub fn finish(mut self) -> Timeline {
        let at = self.at();
        for &place in self.requests.values() {
            let request = &mut self.line.requests[place];
            if request.end.is_none()
                && let Some(last) = request.stays.last_mut()
            {
                last.to = at;
            }
        }
        self.line.find_what_is_safe();
        self.line
    }
}

/// A flush: its begin, its end, and whether that was well.
type Flushed = (At, At, bool);

/// So many ops that changed a byte are told.
const HISTORY: usize = 4;

/// So many ops are named in one line.
const NAMED: usize = 12;

impl Timeline {
    /// Its times are those of a real run. Before the first turn nobody had looked at a clock: that is as it were in it.
    pub(crate) fn has_times(&mut self) {
        self.is_timed = true;
        let first = self.events.iter().map(|event| event.time).find(|time| *time > 0);
        for event in self.events.iter_mut().take_while(|event| event.time == 0) {
            event.time = first.unwrap_or(0);
        }
    }

    /// What a crash has kept and lost: three lines at most.
    fn in_words(&self, left: &[Left]) -> Vec<String> {
        if left.is_empty() {
            return vec!["What it kept or lost of writes made no difference.".into()];
        }
        let of = |is_it: fn(&Left) -> bool| left.iter().filter(move |left| is_it(left));
        let list = |what: &str, ops: &mut dyn Iterator<Item = String>| {
            let names: Vec<String> = ops.collect();
            let more = names.len().saturating_sub(NAMED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let names = names[..names.len().min(NAMED)].join(", ");
            (!names.is_empty()).then(|| format!("{what} {names}{more}."))
        };
        let name = |left: &Left| self.op_name(&self.ops[left.op]);
        let ranges = |ranges: &[Range<u64>]| {
            let mut names: Vec<String> = ranges
                .iter()
                .take(NAMED)
                .map(|range| format!("{:#x}+{:#x}", range.start, range.end - range.start))
                .collect();
            names.extend((ranges.len() > NAMED).then(|| "...".to_string()));
            names.join(" ")
        };
        let mut kept = of(|left| left.lost.is_empty()).map(name);
        let mut lost = of(|left| left.kept.is_empty()).map(name);
        let mut both = of(|left| !left.kept.is_empty() && !left.lost.is_empty()).map(|left| {
            format!("{}: kept {}, lost {}", name(left), ranges(&left.kept), ranges(&left.lost))
        });
        let lines = [
            list("Of what could be lost the crash kept", &mut kept),
            list("It lost", &mut lost),
            list("It kept a part of", &mut both),
        ];
        lines.into_iter().flatten().collect()
    }

    /// An op, as people name it, and what it does.
    pub fn op_name(&self, op: &Op) -> String {
        let what = match op.kind {
            kind if op.file.is_empty() => kind.to_string(),
            _ if op.is_flush => format!("flush of {}", op.file),
            "truncate" => format!("set the length of {} to {:#x}", op.file, op.offset),
            kind => format!("{kind} {:#x}+{:#x} of {}", op.offset, op.len, op.file),
        };
        format!("op #{}.{} ({what})", self.requests[op.request].number, op.ordinal)
    }

    /// From when on is what each op has changed safe? A flush makes safe what was done when it began, and FUA at once.
    /// After one that failed nothing does. In a real run a flush that begins in the turn in which an op comes
    /// back counts as begun after that.
    fn find_what_is_safe(&mut self) {
        let end = self.events.len() as At;
        let is_crash =
            |(at, event): (usize, &Event)| (event.kind == EventKind::Crash).then_some(at as At);
        let crashes: Vec<At> = self.events.iter().enumerate().filter_map(is_crash).collect();
        // Of each file: flushes by their beginning; and the end of the one, begun then or later, that ends first.
        let mut flushes = BTreeMap::<(u32, &str), Vec<Flushed>>::new();
        for op in self.ops.iter().filter(|op| op.is_flush && op.how != "crash") {
            let Some(to) = op.to else { continue };
            let file = (self.requests[op.request].life, op.file.as_str());
            flushes.entry(file).or_default().push((op.from, to, !op.is_bad));
        }
        for flushes in flushes.values_mut() {
            flushes.sort_unstable();
            let mut first = (At::MAX, true);
            for (_, to, is_well) in flushes.iter_mut().rev() {
                if first.0 <= *to {
                    (*to, *is_well) = first;
                }
                first = (*to, *is_well);
            }
        }
        let of = |op: &Op| {
            let done = op.to.filter(|_| op.changes && op.how != "crash")?;
            // A device that says so has done nothing; one that lies has no more to lose.
            let nothing = ["eio", "enospc", "eopnotsupp", "lost", "astray", "far-astray"];
            let is_nothing = op.tries.is_empty() && nothing.contains(&op.how.as_str());
            if is_nothing || op.kind == OpWord::StableWrite.name() && !op.is_bad {
                return None;
            }
            let life = self.requests[op.request].life;
            let stops = crashes.get(life as usize).copied().unwrap_or(end);
            let flushes = flushes.get(&(life, op.file.as_str())).map_or(&[][..], Vec::as_slice);
            let next = flushes.partition_point(|&(from, ..)| from < done);
            match flushes.get(next) {
                Some(&(_, to, true)) => Some((to, true)),
                _ => Some((stops, false)),
            }
        };
        let found: Vec<_> = self.ops.iter().map(of).collect();
        for (op, found) in self.ops.iter_mut().zip(found) {
            (op.unsafe_until, op.is_safe) = match found {
                Some((at, is_safe)) => (Some(at), is_safe),
                None => (None, false),
            };
        }
    }
}

impl Request {
    /// What people call it. `request 2`: as the guest counts, of whom it is. `#5`: as the engine counts, whoever asked; its
    /// ops are named so, too.
    pub fn name(&self) -> String {
        let number = match self.life {
            0 => format!("#{}", self.number),
            life => format!("#{} after crash {life}", self.number),
        };
        match self.by {
            By::Guest(tag) => format!("request {tag} ({number})"),
            _ => number,
        }
    }

    /// From `at` on it is in this state and waits for this.
    fn stays_in(
        &mut self,
        state: &'static str,
        wait: Wait,
        keeper: Option<usize>,
        ahead: Option<usize>,
        by: Option<usize>,
        at: At,
    ) {
        if let Some(last) = self.stays.last_mut()
            && (last.state, last.wait, last.keeper) == (state, wait, keeper)
        {
            last.to = at;
            return;
        }
        self.leave(at, by);
        let (from, to, let_go_by) = (at, at, None);
        self.stays.push(Stay { state, wait, keeper, ahead, from, to, let_go_by });
    }

    /// Its last stay ends.
    fn leave(&mut self, at: At, by: Option<usize>) {
        if let Some(last) = self.stays.last_mut() {
            last.to = at;
            last.let_go_by = by.filter(|_| last.wait.is_for_others());
        }
    }
}

/// What is asked for, in plain words; numbers in bytes.
pub fn words(io: &Io) -> String {
    let Io { kind, offset, len } = *io;
    let verb = match kind {
        IoKind::Read => "read",
        IoKind::Write { fua: false, compressed: false } => "write",
        IoKind::Write { fua: true, compressed: false } => "stable write",
        IoKind::Write { fua: false, compressed: true } => "compressed write",
        IoKind::Write { fua: true, compressed: true } => "stable compressed write",
        IoKind::Flush => return "flush".into(),
        IoKind::Zero { unmap: false, .. } => "write zeros",
        IoKind::Zero { unmap: true, .. } => "write zeros or unmap",
        IoKind::Discard => "discard",
        IoKind::Truncate => return format!("set the size to {offset:#x}"),
        IoKind::Status { .. } => "ask what is where",
    };
    format!("{verb} {offset:#x}+{len:#x}")
}
