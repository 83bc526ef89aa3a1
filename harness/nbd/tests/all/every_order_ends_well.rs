//! A client and a server face to face, over pipes, with a small disk between them: every order in which
//! bytes, the disk's results, cut connections and the server's end can come, for small workloads.
//!
//! A *world* is all of it, as plain data. What may happen next in it are *choices*; each is done on a copy, and worlds
//! that were seen before are not gone through again. What is asked of each:
//!
//! - a request ends once, with the right bytes, or with an error that it may have;
//! - a flush that ended well covers all that had ended when it was asked;
//! - a world without choices is one where all has ended, and nobody holds anything.
//!
//! Whoever drives the [`Client`] in here does what the backend of remote disks does: after a lost connection it connects
//! again, and asks again for what has not ended.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::IoSlice;
use std::sync::Arc;

use cowbell_engine::mem::Buf;
use cowbell_nbd::wire::{error, state};
use cowbell_nbd::{Client, Connection, Event, Export, Extent, Limits, Request, Want, What};

/// Bytes of the disk.
const SIZE: usize = 16;
/// Worlds of one workload before it counts as too large.
const WORLDS_MAX: usize = 2_000_000;

/// A request of a workload. It is asked when the one at `after` has ended well, or at once.
#[derive(Clone, Copy, Debug)]
struct Step {
    what: What,
    offset: usize,
    len: usize,
    /// Of a write: its bytes. Of a read: what it has to find.
    byte: u8,
    after: Option<usize>,
    /// The only error that it may end with, if it may.
    error: Option<u32>,
}

/// What is done, and what may go wrong.
#[derive(Clone, Debug)]
struct Workload {
    name: &'static str,
    steps: Vec<Step>,
    read_only: bool,
    limits: Limits,
    /// Connections that may be cut.
    cuts: u8,
    /// The server may be told to end; another one comes then.
    ends: bool,
    /// The handshake too is cut into pieces.
    is_slow: bool,
}

/// A request in flight on the disk.
#[derive(Clone, Debug, Hash)]
struct Job {
    of: Side,
    slot: u32,
    what: What,
    offset: usize,
    len: usize,
    mem: Option<Buf>,
}

/// Whose a job is: of this connection, of the one before, or of one that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Side {
    Now,
    Old,
    Gone,
}

/// How a request stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Standing {
    /// Not asked yet.
    Waits,
    /// Asked, with the bytes that were read.
    Asked(Vec<u8>),
    Ended,
}

#[derive(Clone, Hash)]
struct World {
    /// `None`: not connected.
    client: Option<Client>,
    standing: Vec<Standing>,
    /// Of flushes: what had been written and answered when it was asked.
    covered: Vec<Vec<u8>>,
    to_server: Vec<u8>,
    to_client: Vec<u8>,
    /// Nothing more comes to the client.
    is_closed: bool,
    server: Option<Connection>,
    /// A connection that the client has left, and what it had sent.
    old: Option<(Connection, Vec<u8>)>,
    /// The server was told to end.
    is_ending: bool,
    jobs: Vec<Job>,
    disk: [u8; SIZE],
    stable: [u8; SIZE],
    cuts: u8,
    may_end: bool,
}

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    /// So many bytes come to the server, or to the client.
    ToServer(usize),
    ToClient(usize),
    /// The server has memory for a request, or room for it.
    Give,
    Submit,
    /// The disk's job at this place ends, well or not.
    Ends(usize),
    Fails(usize),
    /// The client learns that the server has closed the connection.
    Closed,
    Connect,
    /// The server takes what a client sent that has gone; or learns that it has.
    OldReads,
    OldGoes,
    /// The connection is cut.
    Cut,
    /// SIGTERM.
    End,
}

impl Choice {
    /// It happens some time. Others may, or may not.
    fn is_due(self) -> bool {
        !matches!(self, Choice::Cut | Choice::End | Choice::Fails(_))
    }
}

impl World {
    fn new(workload: &Workload) -> World {
        let count = workload.steps.len();
        World {
            client: None,
            standing: vec![Standing::Waits; count],
            covered: vec![Vec::new(); count],
            to_server: Vec::new(),
            to_client: Vec::new(),
            is_closed: false,
            server: None,
            old: None,
            is_ending: false,
            jobs: Vec::new(),
            disk: [0; SIZE],
            stable: [0; SIZE],
            cuts: workload.cuts,
            may_end: workload.ends,
        }
    }

    fn choices(&self, workload: &Workload) -> Vec<Choice> {
        let mut choices = Vec::new();
        // One, half, and all: the machines' own tests cut them everywhere.
        let pieces = |len: usize| {
            let mut pieces = vec![len, 1, len / 2];
            pieces.retain(|&piece| 0 < piece && piece <= len);
            pieces.dedup();
            pieces
        };
        let want = self.server.as_ref().map(Connection::want);
        match want {
            Some(Want::Memory(_)) => choices.push(Choice::Give),
            Some(Want::Submit) => choices.push(Choice::Submit),
            Some(Want::Bytes) => {
                choices.extend(pieces(self.to_server.len()).into_iter().map(Choice::ToServer));
            }
            _ => {}
        }
        if self.client.is_some() {
            choices.extend(pieces(self.to_client.len()).into_iter().map(Choice::ToClient));
            if self.is_closed && self.to_client.is_empty() {
                choices.push(Choice::Closed);
            }
            if self.cuts > 0 {
                choices.push(Choice::Cut);
            }
        } else if !self.is_ending && !self.has_all_ended() {
            choices.push(Choice::Connect);
        }
        for (at, job) in self.jobs.iter().enumerate() {
            choices.push(Choice::Ends(at));
            let may_fail = |step: &Step| step.what == job.what && step.error == Some(error::IO);
            if workload.steps.iter().any(may_fail) {
                choices.push(Choice::Fails(at));
            }
        }
        if let Some((_, bytes)) = &self.old {
            if !bytes.is_empty() {
                choices.push(Choice::OldReads);
            }
            choices.push(Choice::OldGoes);
        }
        if self.may_end && self.server.as_ref().is_some_and(Connection::is_serving) {
            choices.push(Choice::End);
        }
        choices
    }

    fn has_all_ended(&self) -> bool {
        self.standing.iter().all(|standing| *standing == Standing::Ended)
    }

    fn choose(&mut self, workload: &Workload, choice: Choice) {
        match choice {
            Choice::ToServer(count) => {
                let server = self.server.as_mut().expect("a server");
                let bytes: Vec<u8> = self.to_server.drain(..count).collect();
                let mut rest = &bytes[..];
                if count > 1
                    && let Some(payload) = server.payload()
                {
                    // As who reads from a socket straight into its place.
                    let now = payload.len().min(count);
                    payload[..now].copy_from_slice(&rest[..now]);
                    server.payload_filled(now);
                    rest = &rest[now..];
                }
                let taken = server.take(rest);
                self.to_server.splice(..0, rest[taken..].iter().copied());
                self.pump_server();
            }
            Choice::ToClient(count) => {
                let bytes: Vec<u8> = self.to_client.drain(..count).collect();
                self.heard(workload, &bytes);
            }
            Choice::Give => {
                let server = self.server.as_mut().expect("a server");
                let Want::Memory(len) = server.want() else { panic!("it wanted memory") };
                server.give(Buf::zeroed(len));
            }
            Choice::Submit => {
                let request = self.server.as_mut().and_then(Connection::next).expect("a request");
                self.jobs.push(Job::of(request, Side::Now));
            }
            Choice::Ends(at) => self.job_ends(at, Ok(())),
            Choice::Fails(at) => self.job_ends(at, Err(error::IO)),
            Choice::Closed => self.lose(),
            Choice::Connect => {
                let name = Export { read_only: workload.read_only, ..Export::new("", SIZE as u64) };
                let exports: Arc<[Export]> = [name].into();
                self.server = Some(Connection::new(exports, workload.limits));
                self.client = Some(Client::new(""));
                self.pump_server();
                while !workload.is_slow && self.client.as_ref().is_some_and(|c| c.info().is_none())
                {
                    let bytes = std::mem::take(&mut self.to_client);
                    self.heard(workload, &bytes);
                    let bytes = std::mem::take(&mut self.to_server);
                    let taken = self.server.as_mut().expect("a server").take(&bytes);
                    self.to_server.extend_from_slice(&bytes[taken..]);
                    self.pump_server();
                }
            }
            Choice::OldReads => {
                self.pump_old();
            }
            Choice::OldGoes => {
                let (old, _) = self.old.take().expect("an old one");
                old.abandon(drop);
                self.leave_jobs(Side::Old, Side::Gone);
                self.ended_when_empty();
            }
            Choice::Cut => {
                self.cuts -= 1;
                self.lose();
            }
            Choice::End => {
                self.may_end = false;
                self.is_ending = true;
                self.server.as_mut().expect("a server").end(drop);
                if let Some((old, bytes)) = &mut self.old {
                    old.end(drop);
                    bytes.clear();
                }
                self.pump_server();
            }
        }
    }

    /// What the server has to say is said; a connection that is over is closed.
    fn pump_server(&mut self) {
        let Some(server) = &mut self.server else { return };
        sent(server, &mut self.to_client);
        assert_eq!(server.complaint(), None, "the server takes the client for none");
        if server.is_over() {
            assert_eq!(server.held(), 0, "memory is left");
            self.server = None;
            self.is_closed = true;
            self.to_server.clear();
            assert!(self.jobs.iter().all(|job| job.of != Side::Now), "a job is left");
            self.ended_when_empty();
        }
    }

    /// The process of a server that ends is there until all that it had is done.
    fn ended_when_empty(&mut self) {
        let is_empty = self.server.is_none() && self.old.is_none() && self.jobs.is_empty();
        self.is_ending &= !is_empty;
    }

    /// The one that the client has left goes on with what it has, and talks to nobody.
    fn pump_old(&mut self) {
        let Some((old, bytes)) = &mut self.old else { return };
        loop {
            match old.want() {
                Want::Bytes if !bytes.is_empty() => {
                    let taken = old.take(bytes);
                    bytes.drain(..taken);
                }
                Want::Memory(len) => old.give(Buf::zeroed(len)),
                Want::Submit => {
                    self.jobs.push(Job::of(old.next().expect("a request"), Side::Old));
                }
                _ => break,
            }
        }
        sent(old, &mut Vec::new());
    }

    /// The client has no connection any more. The server does not know yet.
    fn lose(&mut self) {
        self.client = None;
        self.to_client.clear();
        self.is_closed = false;
        if self.old.take().is_some() {
            self.leave_jobs(Side::Old, Side::Gone);
        }
        let bytes = std::mem::take(&mut self.to_server);
        self.old = self.server.take().map(|server| (server, bytes));
        self.leave_jobs(Side::Now, Side::Old);
        self.ended_when_empty();
    }

    fn leave_jobs(&mut self, from: Side, to: Side) {
        self.jobs.iter_mut().filter(|job| job.of == from).for_each(|job| job.of = to);
    }

    fn job_ends(&mut self, at: usize, result: Result<(), u32>) {
        let Job { of, slot, what, offset, len, mut mem } = self.jobs.remove(at);
        let place = &mut self.disk[offset..offset + len];
        if result.is_ok() {
            match (what, &mut mem) {
                (What::Read, Some(mem)) => mem.copy_from_slice(place),
                (What::Write { .. }, Some(mem)) => place.copy_from_slice(mem),
                (What::Zero { .. }, _) => place.fill(0),
                (What::Flush, _) => self.stable = self.disk,
                _ => {}
            }
        }
        let connection = match of {
            Side::Now => self.server.as_mut(),
            Side::Old => self.old.as_mut().map(|(old, _)| old),
            Side::Gone => None,
        };
        if let Some(connection) = connection {
            if let (What::Status { .. }, Ok(())) = (what, result) {
                connection.finish_status(slot, &[Extent { len: len as u64, flags: state::ZERO }]);
            } else {
                drop(connection.finish(slot, result, mem));
            }
        }
        match of {
            Side::Now => self.pump_server(),
            Side::Old => self.pump_old(),
            Side::Gone => {}
        }
        self.ended_when_empty();
    }

    /// The client hears this.
    fn heard(&mut self, workload: &Workload, bytes: &[u8]) {
        let mut at = 0;
        loop {
            let client = self.client.as_mut().expect("a client");
            let (count, event) = client.take(&bytes[at..]);
            at += count;
            match event {
                Event::Nothing => break,
                Event::Over => panic!("{}", client.complaint().expect("a reason")),
                Event::Ready => {
                    for step in 0..workload.steps.len() {
                        if matches!(self.standing[step], Standing::Asked(_)) {
                            self.ask(workload, step);
                        }
                    }
                    self.ask_more(workload);
                }
                Event::Data { cookie, at: from, len } => {
                    let read = self.buffer(cookie);
                    read[from as usize..][..len].copy_from_slice(&bytes[at - len..at]);
                }
                Event::Zeros { cookie, at: from, len } => {
                    self.buffer(cookie)[from as usize..][..len as usize].fill(0);
                }
                // It will not do it; the next one may.
                Event::Done { result: Err(error::SHUTDOWN), .. } => return self.lose(),
                Event::Done { cookie, result } => self.done(workload, cookie as usize, result),
            }
        }
        self.pump_client(workload);
    }

    fn buffer(&mut self, cookie: u64) -> &mut Vec<u8> {
        match &mut self.standing[cookie as usize] {
            Standing::Asked(read) => read,
            other => panic!("data for request {cookie}, which is {other:?}"),
        }
    }

    /// A request has ended.
    fn done(&mut self, workload: &Workload, at: usize, result: Result<Option<Extent>, u32>) {
        let step = &workload.steps[at];
        let standing = std::mem::replace(&mut self.standing[at], Standing::Ended);
        let Standing::Asked(read) = standing else { panic!("request {at} ends twice") };
        match (result, step.what) {
            (Err(why), _) => assert_eq!(Some(why), step.error, "request {at}"),
            (Ok(_), What::Write { .. }) if workload.read_only => panic!("it is read-only"),
            (Ok(_), What::Read) => assert_eq!(read, vec![step.byte; step.len], "request {at}"),
            (Ok(extent), What::Status { .. }) => {
                let wanted = Extent { len: step.len as u64, flags: state::ZERO };
                assert_eq!(extent, Some(wanted), "request {at}");
            }
            (Ok(_), What::Flush) => {
                for &other in &self.covered[at] {
                    let Step { offset, len, byte, .. } = workload.steps[usize::from(other)];
                    let found = &self.stable[offset..offset + len];
                    assert_eq!(found, vec![byte; len], "write {other} is not stable");
                }
            }
            (Ok(_), _) => {}
        }
        self.ask_more(workload);
    }

    /// Asks what may be asked now.
    fn ask_more(&mut self, workload: &Workload) {
        if self.client.as_ref().is_none_or(|client| client.info().is_none()) {
            return;
        }
        for (at, step) in workload.steps.iter().enumerate() {
            let may = step.after.is_none_or(|other| self.standing[other] == Standing::Ended);
            if self.standing[at] == Standing::Waits && may {
                let writes = workload.steps.iter().enumerate().filter(|(other, step)| {
                    let is_done = self.standing[*other] == Standing::Ended;
                    is_done && matches!(step.what, What::Write { .. }) && step.error.is_none()
                });
                self.covered[at] = writes.map(|(other, _)| other as u8).collect();
                self.ask(workload, at);
            }
        }
    }

    fn ask(&mut self, workload: &Workload, at: usize) {
        let Step { what, offset, len, .. } = workload.steps[at];
        self.standing[at] = Standing::Asked(vec![0xee; if what == What::Read { len } else { 0 }]);
        let client = self.client.as_mut().expect("a client");
        client.ask(at as u64, what, offset as u64, len as u64);
    }

    /// What the client has to say is said.
    fn pump_client(&mut self, workload: &Workload) {
        let Some(client) = &mut self.client else { return };
        let mut bytes = Vec::new();
        client.output(&mut bytes, usize::MAX, |cookie, _, to| {
            to.fill(workload.steps[cookie as usize].byte);
        });
        // A server that goes reads no more.
        if self.server.is_some() {
            self.to_server.extend(bytes);
        }
    }

    /// Nothing more is to come: is all as it should be?
    fn assert_rest(mut self, workload: &Workload) {
        let left: Vec<_> = self.standing.iter().filter(|its| **its != Standing::Ended).collect();
        assert!(left.is_empty(), "it is stuck: {left:?}");
        assert!(self.jobs.is_empty() && self.old.is_none());
        for &Step { what, offset, len, byte, error, .. } in &workload.steps {
            if matches!(what, What::Write { .. }) && error.is_none() {
                assert_eq!(self.disk[offset..offset + len], vec![byte; len], "it was written");
            }
        }
        let Some(server) = &mut self.server else { return };
        assert_eq!((server.in_flight(), server.held()), (0, 0), "the server holds something");
        let client = self.client.as_mut().expect("they are connected");
        assert_eq!(client.in_flight(), 0);
        client.leave();
        let mut bytes = Vec::new();
        client.output(&mut bytes, usize::MAX, |_, _, _| panic!("there is no payload"));
        server.take(&bytes);
        assert!(server.is_over(), "it was said good-bye");
    }

    fn hash_of(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

impl Job {
    fn of(request: Request, of: Side) -> Job {
        let Request { slot, what, offset, len, mem, .. } = request;
        Job { of, slot, what, offset: offset as usize, len: len as usize, mem }
    }
}

/// What a connection has to say goes to `to`.
fn sent(connection: &mut Connection, to: &mut Vec<u8>) {
    while connection.has_output() {
        let mut slices = [IoSlice::new(&[]); 4];
        let count = connection.output(&mut slices);
        let start = to.len();
        slices[..count].iter().for_each(|slice| to.extend_from_slice(slice));
        connection.sent(to.len() - start, drop);
    }
}

/// What led to where something went wrong.
struct Path(&'static str, Vec<Choice>);

impl Drop for Path {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}, after {:?}", self.0, self.1);
        }
    }
}

/// Goes through all worlds; how many there are, and how many of them are at rest.
fn explore(workload: &Workload) -> (usize, usize) {
    let (mut seen, mut at_rest) = (BTreeSet::new(), 0);
    let mut path = Path(workload.name, Vec::new());
    // What is to be tried in each world on the way.
    let first = World::new(workload);
    let mut way = vec![(first.choices(workload), first)];
    while let Some((choices, world)) = way.last_mut() {
        let Some(choice) = choices.pop() else {
            way.pop();
            path.1.pop();
            continue;
        };
        let mut next = world.clone();
        path.1.push(choice);
        next.choose(workload, choice);
        if !seen.insert(next.hash_of()) {
            path.1.pop();
            continue;
        }
        assert!(seen.len() < WORLDS_MAX, "more worlds than anybody waits for");
        let choices = next.choices(workload);
        if !choices.iter().any(|choice| choice.is_due()) {
            at_rest += 1;
            next.clone().assert_rest(workload);
        }
        way.push((choices, next));
    }
    (seen.len(), at_rest)
}

const WRITE: What = What::Write { fua: false };
const ZERO: What = What::Zero { keep: false, fast: false, fua: false };

fn step(what: What, offset: usize, len: usize, byte: u8) -> Step {
    Step { what, offset, len, byte, after: None, error: None }
}

fn then(after: usize, step: Step) -> Step {
    Step { after: Some(after), ..step }
}

fn may_fail(error: u32, step: Step) -> Step {
    Step { error: Some(error), ..step }
}

fn workload(name: &'static str, steps: Vec<Step>) -> Workload {
    let limits = Limits::default();
    Workload { name, steps, read_only: false, limits, cuts: 0, ends: false, is_slow: false }
}

fn workloads() -> Vec<Workload> {
    let read = step(What::Read, 8, 3, 0);
    let write = step(WRITE, 0, 3, 7);
    let flush = step(What::Flush, 0, 0, 0);
    let status = step(What::Status { one: true }, 8, 4, 0);
    vec![
        Workload {
            cuts: 1,
            ends: true,
            is_slow: true,
            ..workload("a handshake in pieces", vec![read])
        },
        workload("three at once", vec![write, read, status]),
        Workload { cuts: 1, ..workload("two, and a cut", vec![write, read]) },
        Workload { ends: true, ..workload("two, and the end", vec![write, read]) },
        Workload { cuts: 1, ends: true, ..workload("one, a cut and the end", vec![write]) },
        Workload {
            cuts: 2,
            ..workload("what was written is read", vec![write, then(0, step(What::Read, 0, 3, 7))])
        },
        Workload {
            cuts: 1,
            ends: true,
            ..workload("what was written is flushed", vec![write, then(0, flush)])
        },
        Workload {
            cuts: 1,
            read_only: true,
            ..workload("what is refused", vec![may_fail(error::PERM, write), read])
        },
        workload("what fails", vec![may_fail(error::IO, write), flush, read]),
        Workload {
            cuts: 1,
            limits: Limits { requests: 1, bytes: 3 },
            ..workload("little room", vec![write, step(ZERO, 12, 4, 0)])
        },
    ]
}

#[test]
fn of_small_workloads() {
    let mut all = 0;
    for workload in workloads() {
        let (worlds, at_rest) = explore(&workload);
        println!("{}: {worlds} worlds, {at_rest} at rest", workload.name);
        assert!(at_rest > 0, "{}", workload.name);
        all += worlds;
    }
    println!("{all} worlds");
}
