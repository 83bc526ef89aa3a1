//! A backend that remembers what went through it: the last events, to be looked at when something has
//! gone wrong.
//!
//! What is remembered is in memory that is taken once, and no byte of a guest's is among it. An event
//! costs a few dozen instructions and no look at the clock, so it may stay in place where things go
//! wrong seldom. Times are those of the engine's last look at the clock before: in a turn that is not
//! cut short a submission has the time of its beginning, a completion that of the harvest.
//!
//! An engine that is stuck, or answers wrongly, is printed with what led there:
//!
//! ```
//! # use cowbell_engine::{Engine, Limits, backend::Backend, step::Driver, sys::null::Null, trace::Trace};
//! # fn stuck<D: Driver>(engine: &Engine<D, Trace<Null>>) {
//! // Requests and what they wait for, ops in flight; then the last events, oldest first.
//! eprintln!("{engine:?}{}", engine.backend());
//! # }
//! ```
//!
//! Both name ops and requests alike, so each op in flight is found among the events. A line reads
//!
//! ```text
//! 12.000350210 > o3 r3 #17 write 4096 at 65536 of f0
//! 12.000417004 < o3 r3 #17 write 4096 at 65536 of f0: 4096
//! ```
//!
//! seconds, submitted or completed, the op, its request's place, its number in time, what is to be done, and
//! how it ended: the bytes that it moved, or why it failed.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use crate::backend::{Backend, FileInfo, Harvest, Submission};
use crate::op::{Completion, OpKind, Target};
use crate::ops::{OpRecord, Ops};
use crate::units::{Errno, FileId, OpId, ReqId, Time};

/// An op's kind, as a byte.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    /// [`OpKind::Read`]
    Read,
    /// [`OpKind::Write`]
    Write,
    /// The same, stable when it comes back.
    StableWrite,
    /// [`OpKind::Flush`]
    Flush,
    /// [`OpKind::Zero`]
    Zero,
    /// The same, and the space may be given back.
    Unmap,
    /// [`OpKind::Discard`]
    Discard,
    /// [`OpKind::Truncate`]
    Truncate,
    /// [`OpKind::Allocate`]
    Allocate,
    /// [`OpKind::Compute`]
    Compute,
    /// [`OpKind::Hole`]
    Hole,
    /// [`OpKind::Copy`]
    Copy,
}

impl Kind {
    /// That of an op.
    #[inline]
    pub fn of(kind: OpKind) -> Kind {
        match kind {
            OpKind::Read => Kind::Read,
            OpKind::Write { fua: false } => Kind::Write,
            OpKind::Write { fua: true } => Kind::StableWrite,
            OpKind::Flush => Kind::Flush,
            OpKind::Zero { unmap: false } => Kind::Zero,
            OpKind::Zero { unmap: true } => Kind::Unmap,
            OpKind::Discard => Kind::Discard,
            OpKind::Truncate => Kind::Truncate,
            OpKind::Allocate => Kind::Allocate,
            OpKind::Compute(_) => Kind::Compute,
            OpKind::Hole => Kind::Hole,
            OpKind::Copy { .. } => Kind::Copy,
        }
    }

    /// In a word or two, for people.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::StableWrite => "stable write",
            Kind::Flush => "flush",
            Kind::Zero => "zero",
            Kind::Unmap => "unmap",
            Kind::Discard => "discard",
            Kind::Truncate => "truncate",
            Kind::Allocate => "allocate",
            Kind::Compute => "compute",
            Kind::Hole => "hole",
            Kind::Copy => "copy",
        }
    }
}

/// An event: a few numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Record {
    /// When, by the backend's clock.
    pub time: Time,
    /// The op it happened to.
    pub op: OpId,
    /// What happened.
    pub event: Event,
}

/// What happened to an op.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Event {
    /// The backend was offered it.
    Submitted {
        /// What is to be done.
        kind: Kind,
        /// On this file; no file's for a computation.
        file: FileId,
        /// The place of the request whose op it is.
        request: ReqId,
        /// Which request that is in time: see [`Ops::serial`].
        serial: u32,
        /// The first byte in the file that is still to be moved.
        offset: u64,
        /// Bytes that are still to be moved.
        len: u64,
    },
    /// It came back.
    Completed {
        /// The bytes that it moved, or an error number below 0.
        answer: i64,
    },
}

const _: () = assert!(size_of::<Record>() <= 56);

impl Event {
    /// How it ended, if it did.
    pub fn result(&self) -> Option<Result<u64, Errno>> {
        match *self {
            Event::Submitted { .. } => None,
            Event::Completed { answer } => Some(Completion::raw(OpId(0), answer).result()),
        }
    }
}

/// What was to be done.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Event::Submitted { kind, file, request, serial, offset, len } = *self else {
            return Ok(());
        };
        write!(f, " {request:?} #{serial} {}", kind.name())?;
        match kind {
            Kind::Compute => Ok(()),
            Kind::Flush => write!(f, " of {file:?}"),
            Kind::Truncate => write!(f, " to {offset} of {file:?}"),
            _ => write!(f, " {len} at {offset} of {file:?}"),
        }
    }
}

/// The last records.
struct Ring {
    /// As many as there are places.
    records: Box<[Record]>,
    /// The place of the next.
    next: usize,
    /// How many there have been.
    count: u64,
}

impl Ring {
    fn new(places: usize) -> Ring {
        let (time, op, event) = (Time(0), OpId(0), Event::Completed { answer: 0 });
        let records = vec![Record { time, op, event }; places.max(1)].into();
        Ring { records, next: 0, count: 0 }
    }

    #[inline(always)]
    fn note(&mut self, record: Record) {
        self.records[self.next] = record;
        self.next = if self.next + 1 == self.records.len() { 0 } else { self.next + 1 };
    }
}

/// An op, as it is offered.
#[inline(always)]
fn submitted(record: &OpRecord, ops: &Ops) -> Event {
    let file = match record.op.target {
        Target::File(file) => file,
        _ => FileId(u32::MAX),
    };
    let request = record.owner.request;
    Event::Submitted {
        kind: Kind::of(record.op.kind),
        file,
        request,
        serial: ops.serial(request),
        offset: record.offset(),
        len: record.remaining(),
    }
}

/// A backend whose last events are remembered. See the module.
pub struct Trace<B> {
    inner: B,
    ring: Ring,
    /// When the engine last looked at the clock.
    seen: Cell<Time>,
    /// Ops at the front of the engine's queue that were offered before, and noted.
    noted: usize,
}

impl<B> Trace<B> {
    /// `inner`, and room for the last `events`: one at least.
    pub fn new(inner: B, events: usize) -> Trace<B> {
        Trace { inner, ring: Ring::new(events), seen: Cell::new(Time(0)), noted: 0 }
    }

    /// The backend that does the ops.
    pub fn inner(&self) -> &B {
        &self.inner
    }

    /// The same, for a test that tells it what to do.
    pub fn inner_mut(&mut self) -> &mut B {
        &mut self.inner
    }

    /// How many events there have been.
    pub fn count(&self) -> u64 {
        self.ring.count
    }

    /// The last of them, oldest first.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        let Ring { records, next, count } = &self.ring;
        let is_full = *count >= records.len() as u64;
        let older = if is_full { &records[*next..] } else { &[] };
        older.iter().chain(&records[..*next])
    }
}

impl<B: Backend> Backend for Trace<B> {
    type File = B::File;

    fn attach(&mut self, id: FileId, file: B::File) -> io::Result<FileInfo> {
        self.inner.attach(id, file)
    }

    fn detach(&mut self, id: FileId) -> Option<B::File> {
        self.inner.detach(id)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        let (offered, time, ops) = (submission.len(), self.seen.get(), submission.ops);
        let new = submission.waiting().get(self.noted..).unwrap_or_default();
        for &op in new {
            self.ring.note(Record { time, op, event: submitted(&ops[op], ops) });
        }
        self.ring.count += new.len() as u64;
        self.inner.submit(submission);
        // What it has left comes again, first.
        self.noted = self.noted.max(offered) - (offered - submission.len());
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        let before = harvest.done.len();
        self.inner.harvest(harvest);
        let (time, new) = (self.seen.get(), &harvest.done[before..]);
        for done in new {
            let event = Event::Completed { answer: done.answer() };
            self.ring.note(Record { time, op: done.op, event });
        }
        self.ring.count += new.len() as u64;
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event_fd()
    }

    fn wants_retry(&self) -> bool {
        self.inner.wants_retry()
    }

    fn next_deadline(&self) -> Option<Time> {
        self.inner.next_deadline()
    }

    #[inline]
    fn clock(&self) -> Time {
        let now = self.inner.clock();
        self.seen.set(now);
        now
    }
}

impl<B> fmt::Display for Trace<B> {
    /// A line for each event, oldest first. Of an op that came back it says what was to be done, if that
    /// is remembered.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut wanted = BTreeMap::new();
        for Record { time: Time(nanos), op, event } in self.records() {
            let (seconds, nanos) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
            match event.result() {
                None => {
                    wanted.insert(*op, event);
                    writeln!(f, "{seconds}.{nanos:09} > {op:?}{event}")?;
                }
                Some(result) => {
                    let wanted = wanted.remove(op).map(Event::to_string).unwrap_or_default();
                    write!(f, "{seconds}.{nanos:09} < {op:?}{wanted}: ")?;
                    match result {
                        Ok(moved) => writeln!(f, "{moved}")?,
                        Err(errno) => writeln!(f, "{errno}")?,
                    }
                }
            }
        }
        Ok(())
    }
}

impl<B: fmt::Debug> fmt::Debug for Trace<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Trace({:?}, {} events)", self.inner, self.ring.count)
    }
}

#[cfg(all(test, feature = "contract"))]
mod tests {
    use super::{Event, Kind, Trace};
    use crate::backend::{Backend, FileInfo};
    use crate::contract::{BLOCK, Bench, FILE, Rig, bare, pattern, pool, read, write};
    use crate::faulty::{Fault, Faulty, What};
    use crate::op::{Op, OpKind};
    use crate::sys::disk::{DiskFile, DiskOptions};
    use crate::sys::inline::Inline;
    use crate::units::OpId;
    use std::fs;

    struct Disk(tempfile::TempDir, usize);

    impl Disk {
        fn new(events: usize) -> Disk {
            Disk(tempfile::tempdir().expect("a folder"), events)
        }
    }

    impl Rig for Disk {
        type Backend = Trace<Faulty<Inline>>;
        fn make(&mut self, contents: &[u8]) -> (Self::Backend, FileInfo) {
            let path = self.0.path().join("file");
            fs::write(&path, contents).expect("a file");
            let options = DiskOptions { write: true, ..DiskOptions::default() };
            let file = DiskFile::open(path, &options).expect("it opens");
            let mut backend = Trace::new(Faulty::new(Inline::new()), self.1);
            let info = backend.attach(FILE, file).expect("it attaches");
            (backend, info)
        }
        fn contents(&mut self, _: &mut Self::Backend) -> Vec<u8> {
            fs::read(self.0.path().join("file")).expect("a file")
        }
    }

    #[test]
    fn keeps_the_contract() {
        crate::contract::run_all(&mut Disk::new(7));
    }

    #[test]
    fn events_are_told_oldest_first_and_the_oldest_are_forgotten() {
        let mut disk = Disk::new(6);
        let mut bench = Bench::new(&mut disk, &pattern(4, 1));
        assert_eq!(bench.backend.to_string(), "");
        let full = Fault {
            what: Some(What::Write),
            errno: Some(crate::units::Errno::NO_SPACE),
            ..Fault::default()
        };
        bench.backend.inner_mut().plan_mut().push(full);
        let mut ids = Vec::new();
        for op in [
            write(1, pool(0, 0, 1)),
            Op::flush(FILE),
            bare(OpKind::Truncate, 2, 0),
            read(1, pool(0, 0, 2)),
        ] {
            bench.backend.clock();
            ids.push(bench.push(op));
            assert_eq!(bench.drain().len(), 1);
        }
        assert_eq!(bench.backend.count(), 8);
        let records: Vec<_> = bench.backend.records().collect();
        assert_eq!(records.len(), 6);
        let kinds = [Kind::Flush, Kind::Truncate, Kind::Read];
        for (n, pair) in records.chunks(2).enumerate() {
            let [submitted, completed] = pair else { panic!("two for each") };
            let Event::Submitted { kind, file, .. } = submitted.event else {
                panic!("{submitted:?}")
            };
            assert_eq!((kind, file, submitted.op), (kinds[n], FILE, ids[n + 1]));
            assert!(completed.op == submitted.op && completed.event.result().is_some());
            assert!(submitted.time <= completed.time && submitted.time.0 > 0);
        }
        assert_eq!(records[5].event.result(), Some(Ok(BLOCK)), "the end of the file");
        let text = bench.backend.to_string();
        assert_eq!(text.lines().count(), 6);
        let ends = |n: usize, end: &str| {
            let line = text.lines().nth(n).expect("a line");
            assert!(line.ends_with(end), "{line}, not {end}");
        };
        ends(0, "r0 #0 flush of f0");
        ends(1, "r0 #0 flush of f0: 0");
        ends(2, "r0 #0 truncate to 8192 of f0");
        ends(4, "r0 #0 read 8192 at 4096 of f0");
        ends(5, "r0 #0 read 8192 at 4096 of f0: 4096");
        bench.push(write(1, pool(0, 0, 1)));
        bench.drain();
        let text = bench.backend.to_string();
        assert!(text.ends_with("write 4096 at 4096 of f0: No space left on device\n"), "{text}");
        // One whose submission is forgotten.
        let mut disk = Disk::new(1);
        let mut bench = Bench::new(&mut disk, &pattern(1, 1));
        let id = bench.push(Op::flush(FILE));
        bench.drain();
        assert!(bench.backend.to_string().ends_with(&format!(" < {id:?}: 0\n")));
    }

    #[test]
    fn what_is_offered_again_is_told_once() {
        use crate::faulty::tests::OneByOne;
        struct Slow(tempfile::TempDir);
        impl Rig for Slow {
            type Backend = Trace<OneByOne>;
            fn make(&mut self, contents: &[u8]) -> (Self::Backend, FileInfo) {
                let path = self.0.path().join("file");
                fs::write(&path, contents).expect("a file");
                let options = DiskOptions { write: true, ..DiskOptions::default() };
                let file = DiskFile::open(path, &options).expect("it opens");
                let mut backend = Trace::new(OneByOne::new(), 64);
                let info = backend.attach(FILE, file).expect("it attaches");
                (backend, info)
            }
            fn contents(&mut self, _: &mut Self::Backend) -> Vec<u8> {
                Vec::new()
            }
        }
        let mut rig = Slow(tempfile::tempdir().expect("a folder"));
        let mut bench = Bench::new(&mut rig, &pattern(8, 1));
        let mut ids: Vec<OpId> = (0..6).map(|n| bench.push(write(n, pool(0, n, 1)))).collect();
        bench.submit();
        ids.push(bench.push(write(6, pool(0, 6, 1))));
        assert_eq!(bench.drain().len(), 7);
        for is_end in [false, true] {
            let records = bench.backend.records();
            let its = records.filter(|record| record.event.result().is_some() == is_end);
            assert_eq!(its.map(|record| record.op).collect::<Vec<_>>(), ids);
        }
    }
}
