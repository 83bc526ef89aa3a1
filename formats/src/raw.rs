//! raw: the file is the disk.
//!
//! Every request is one op, with one exception. An image that nobody said was raw, that was only
//! *probed* to be raw, may not be turned into an image of another format by its guest, or the next
//! open would follow the guest's pointers (CVE-2008-2004). What changes the first sector of such an
//! image is therefore looked at: a write on a private copy that is then what gets written. One at
//! a time, because two harmless halves may make a header; zeros too, because a 0 may end one.

use cowbell_engine::mem::Memory;
use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, OpKind, Seg, Segs, Target};
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Pass, Step};
use cowbell_engine::units::{BufId, Errno, FileId, Time};
use cowbell_engine::wait::{On, WaitList};

use crate::probe::{Format, PROBE_BYTES, Probed, probe};

/// The request's one op is on its way.
const LAST: Step<State> = Step::Last { label: 0 };

/// An opened raw image.
#[derive(Clone, Hash, Debug)]
pub struct Raw {
    file: FileId,
    size: u64,
    writes: Writes,
    can_grow: bool,
    /// Somebody is changing the guarded sector or the size; the next waits for the turn.
    busy: bool,
    waiters: WaitList,
}

/// What becomes of what would change it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Writes {
    Pass,
    /// Nobody said that it is raw: it is kept so.
    Guarded,
    Refused,
}

/// A request's state, named by what it awaits; `buf` a buffer that it holds.
#[expect(missing_docs, reason = "said above, once")]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// The turn to change the guarded sector or the size.
    Turn,
    /// A buffer for it.
    Begin,
    /// A zero write that must be stable: the flush behind it follows.
    ThenFlush,
    /// The first sector as it is, to see what the write makes of it.
    ReadGuarded { buf: BufId },
    /// A write whose first sector comes from `buf`.
    WriteGuarded { buf: BufId },
    /// Zeros, from within the guarded sector on.
    ZeroGuarded,
    /// The file's new length.
    Resize,
}

impl Raw {
    /// The image in `file`, of `size` bytes.
    pub fn new(file: FileId, size: u64, writable: bool, guarded: bool, can_grow: bool) -> Raw {
        let (busy, waiters) = (false, WaitList::new());
        let writes = match (writable, guarded) {
            (false, _) => Writes::Refused,
            (true, true) => Writes::Guarded,
            (true, false) => Writes::Pass,
        };
        Raw { file, size, writes, can_grow, busy, waiters }
    }

    /// Panics if something is parked or has the turn. For tests, at rest.
    pub fn assert_idle(&self) {
        assert!(!self.busy && self.waiters.is_empty(), "somebody has the turn");
    }

    fn begin_io(&mut self, io: Io, cx: &mut Cx<'_>) -> Step<State> {
        if let IoKind::Status { .. } = io.kind {
            // Where the file has holes the file system knows, which may take its time.
            cx.issue(Op::bare(OpKind::Hole, self.file, io.offset, io.len));
            return LAST;
        }
        if self.writes == Writes::Refused && io.kind != IoKind::Flush {
            return Step::Done(Err(Errno::READ_ONLY));
        }
        if self.needs_turn(io) {
            return self.take_turn(cx);
        }
        let op = match io.kind {
            IoKind::Read | IoKind::Write { .. } => unreachable!("passed on"),
            IoKind::Status { .. } => unreachable!("answered above"),
            IoKind::Flush => Op::flush(self.file),
            IoKind::Zero { unmap, fua } => {
                cx.issue(Op::bare(OpKind::Zero { unmap }, self.file, io.offset, io.len));
                return if fua { Step::Wait(State::ThenFlush) } else { LAST };
            }
            IoKind::Discard => Op::bare(OpKind::Discard, self.file, io.offset, io.len),
            IoKind::Truncate => unreachable!("it takes a turn"),
        };
        cx.issue(op);
        LAST
    }

    /// What changes the guarded sector, and what changes the size: of two sizes the file and this
    /// driver must take the same for the last.
    fn needs_turn(&self, io: Io) -> bool {
        io.kind == IoKind::Truncate || self.writes == Writes::Guarded && changes_first_sector(io)
    }

    fn resize(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let size = cx.io().offset;
        if !self.can_grow || !size.is_multiple_of(512) {
            return self.end(Err(Errno::NOT_SUPPORTED), cx);
        }
        cx.issue(Op::bare(OpKind::Truncate, self.file, size, 0));
        Step::Wait(State::Resize)
    }

    fn take_turn(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let io = cx.io();
        if io.kind == IoKind::Discard {
            // Only a hint: the sector is left out of it, and nobody need look.
            let from = io.end().min(PROBE_BYTES as u64);
            if from == io.end() {
                return Step::Done(Ok(()));
            }
            cx.issue(Op::bare(OpKind::Discard, self.file, from, io.end() - from));
            return LAST;
        }
        if self.busy {
            cx.park(&mut self.waiters, On::Turn);
            return Step::Wait(State::Turn);
        }
        self.busy = true;
        self.begin_guarded(cx)
    }

    /// The request has the turn. The sector as it would become is put together in a buffer: what
    /// the request does not cover is read first.
    fn begin_guarded(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let io = cx.io();
        if io.kind == IoKind::Truncate {
            return self.resize(cx);
        }
        let Some([buf]) = cx.take_bufs() else {
            cx.park_for_bufs();
            return Step::Wait(State::Begin);
        };
        if io.offset == 0 && io.len >= PROBE_BYTES as u64 {
            return self.change_guarded(buf, cx);
        }
        let seg = Seg { base: Base::Pool(buf), off: 0, len: PROBE_BYTES as u32 };
        cx.issue(Op::read(Target::File(self.file), 0, Segs::one(seg)));
        Step::Wait(State::ReadGuarded { buf })
    }

    fn change_guarded(&mut self, buf: BufId, cx: &mut Cx<'_>) -> Step<State> {
        let io = cx.io();
        let in_sector = io.len.min(PROBE_BYTES as u64 - io.offset);
        let mut sector = [0; PROBE_BYTES];
        sector.copy_from_slice(&cx.mem().pool(buf)[..PROBE_BYTES]);
        let start = io.offset as usize;
        let changed = &mut sector[start..start + in_sector as usize];
        match io.kind {
            IoKind::Zero { .. } => changed.fill(0),
            _ => cx.copy_guest(0, changed),
        }
        if probe(&sector) != Probed::Handled(Format::Raw) && !mutant!("probed_raw_unguarded") {
            cx.give_buf(buf);
            return self.end(Err(Errno::NOT_PERMITTED), cx);
        }
        if let IoKind::Zero { unmap, .. } = io.kind {
            cx.give_buf(buf);
            cx.issue(Op::bare(OpKind::Zero { unmap }, self.file, io.offset, io.len));
            return Step::Wait(State::ZeroGuarded);
        }
        cx.mem().pool_mut(buf)[..PROBE_BYTES].copy_from_slice(&sector);
        let mut segs = Segs::none();
        segs.push(Seg { base: Base::Pool(buf), off: start as u32, len: in_sector as u32 });
        if io.len > in_sector {
            segs.push(cx.guest(in_sector, io.len - in_sector));
        }
        let fua = matches!(io.kind, IoKind::Write { fua: true, .. });
        let op = Op { kind: OpKind::Write { fua }, ..Op::write(self.file, io.offset, segs) };
        cx.issue(op);
        Step::Wait(State::WriteGuarded { buf })
    }

    /// The request has ended: if it had the turn, the next one gets it.
    fn end(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) -> Step<State> {
        if self.needs_turn(cx.io()) {
            self.busy = cx.hand_over(&mut self.waiters).is_some();
        }
        Step::Done(result)
    }
}

/// Would this request change the sector that a format is told by? (What a truncation names as its
/// offset is the new size.)
fn changes_first_sector(io: Io) -> bool {
    !matches!(io.kind, IoKind::Read | IoKind::Flush | IoKind::Status { .. })
        && io.offset < PROBE_BYTES as u64
}

impl Driver for Raw {
    type State = State;

    const STATES: &'static [&'static str] = &[
        "op",
        "buffer",
        "then-flush",
        "read-guarded",
        "write-guarded",
        "resize",
        "turn",
        "zero-guarded",
    ];

    #[inline]
    fn label(state: &State) -> usize {
        match state {
            State::Begin => 1,
            State::ThenFlush => 2,
            State::ReadGuarded { .. } => 3,
            State::WriteGuarded { .. } => 4,
            State::Resize => 5,
            State::Turn => 6,
            State::ZeroGuarded => 7,
        }
    }

    #[inline]
    fn size(&self) -> u64 {
        self.size
    }

    fn unit(&self) -> u64 {
        1
    }

    fn is_writable(&self) -> bool {
        self.writes != Writes::Refused
    }

    fn uses(&self, file: FileId) -> bool {
        file == self.file
    }

    fn file_of_disk(&self, written: bool) -> Option<FileId> {
        (!written || self.writes == Writes::Pass).then_some(self.file)
    }

    #[inline(always)]
    fn pass_on(&mut self, io: &Io, _: &Memory) -> Option<Pass> {
        let passes = io.kind == IoKind::Read
            || self.writes == Writes::Pass
            || self.writes == Writes::Guarded && !changes_first_sector(*io);
        passes.then_some(Pass { file: self.file, offset: io.offset, label: 0 })
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        self.begin_io(cx.io(), cx)
    }

    fn chore(&mut self, chore: Chore) -> Option<State> {
        (chore == Chore::Settle && self.writes != Writes::Refused).then_some(State::ThenFlush)
    }

    #[inline]
    fn deadline(&self) -> Option<Time> {
        None
    }

    #[inline(always)]
    fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        match (state, event) {
            (State::Turn | State::Begin, Event::Woken) => self.begin_guarded(cx),
            // Start: a settling engine wants everything stable, and nothing before it.
            (State::ThenFlush, Event::Io(Ok(())) | Event::Start) => {
                cx.issue(Op::flush(self.file));
                LAST
            }
            (State::ThenFlush, Event::Io(error)) => Step::Done(error),
            (State::ReadGuarded { buf }, Event::Io(Ok(()))) => self.change_guarded(buf, cx),
            (State::ReadGuarded { buf } | State::WriteGuarded { buf }, Event::Io(result)) => {
                cx.give_buf(buf);
                self.end(result, cx)
            }
            (State::ZeroGuarded, Event::Io(result)) => {
                let fua = matches!(cx.io().kind, IoKind::Zero { fua: true, .. });
                match self.end(result, cx) {
                    Step::Done(Ok(())) if fua => {
                        cx.issue(Op::flush(self.file));
                        LAST
                    }
                    ended => ended,
                }
            }
            (State::Resize, Event::Io(result)) => {
                if result.is_ok() {
                    self.size = cx.io().offset;
                }
                self.end(result, cx)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }
}
