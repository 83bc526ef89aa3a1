//! The writeback: tables that requests have changed in memory go to disk later, many at a time.
//!
//! ```text
//! Begin, a flush: [Write, ahead] ─> [Fence] ─> Write ─> Flush ─> [Write, again] ─> over
//! Ride: the one under way ends ─> as above, or over
//! FlushOnly: nothing has changed
//! ```
//!
//! One runs at a time: a guest's flush, whoever closes the image, or a chore of its own because there
//! is no room in memory or it is time. What is to be written, and whether it relies on anything that
//! may not be stable, the format says: `Changes`.
//!
//! It *seals*: has the format copy what has changed. Then it fences if it must, writes the copies,
//! and flushes. What changes after the seal goes with the next one: so a flush that finds one under
//! way waits for the next that begins, with everybody else who asks.

use cowbell_engine::mutant;
use cowbell_engine::op::Op;
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::{Errno, FileId, Time};
use cowbell_engine::wait::{On, WaitList};

use crate::parts::attempts::Attempts;

/// What a format has changed in memory, and how it gets to disk.
pub(crate) trait Changes {
    /// The label of a flush that is all that is left to do.
    const FLUSH: u8;

    /// The image's files: a flush is of them all.
    fn files(&self) -> &[FileId];

    /// Has nothing changed that is not sealed?
    fn is_empty(&self) -> bool;

    /// Does what has changed rely on anything that may not be stable?
    fn needs_fence(&self) -> bool;

    /// Copies what has changed: the copies get written. Nothing is sealed.
    fn seal(&mut self, cx: &mut Cx<'_>);

    /// What was done when the copies were sealed is stable.
    fn stable(&mut self);

    /// Issues the ops that write the copies of a phase from number `next` on, as many as there is
    /// room for; answers the number of the next copy. `None`: there was none left.
    fn write(&mut self, phase: Phase, next: u32, cx: &mut Cx<'_>) -> Option<u32>;

    /// Drops the copies; unless all have been written, what they hold has changed still. Wakes who
    /// waits for room.
    fn unseal(&mut self, written: bool, cx: &mut Cx<'_>);
}

/// Which copies are written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    /// What must be stable before the others are written. If there is any, a fence follows.
    Ahead,
    /// Those that count.
    Primary,
    /// Those that may be on disk only when the former are stable.
    Redundant,
}

/// What a writeback, or who waits for one, awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum WritebackState {
    /// Chore: to begin.
    Begin,
    /// One under way to end, and after that one that is number `target` or later.
    Ride {
        /// Among those that end with a flush.
        target: u32,
    },
    /// What the copies rely on, stable.
    Fence {
        /// The file whose flush is to be issued next.
        next: u32,
    },
    /// Copies, written.
    Write {
        /// Which.
        phase: Phase,
        /// The copy that is to be written next.
        next: u32,
    },
    /// The copies, stable.
    Flush {
        /// As in [`WritebackState::Fence`].
        next: u32,
    },
    /// A flush with nothing to write.
    FlushOnly {
        /// As in [`WritebackState::Fence`].
        next: u32,
    },
}

/// Why one was begun.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum For {
    /// Somebody wants everything to be stable.
    Flush,
    /// There is no room, or it is time.
    Room,
}

/// Who writes changed tables, and who waits for that. See the module.
#[derive(Clone, Hash, Debug)]
pub(crate) struct Writeback {
    running: Option<For>,
    /// Those begun.
    all: Attempts,
    /// Those begun that answer a flush.
    flushes: Attempts,
    /// How long a change may wait, in milliseconds.
    after_ms: u64,
    due: Option<Time>,
    /// A chore was asked for, and is not begun yet.
    asked: bool,
    waiters: WaitList,
}

impl Writeback {
    /// Of a format whose changes may wait for so many milliseconds.
    pub fn new(after_ms: u64) -> Writeback {
        Writeback {
            running: None,
            all: Attempts::default(),
            flushes: Attempts::default(),
            after_ms,
            due: None,
            asked: false,
            waiters: WaitList::new(),
        }
    }

    /// Something has changed: it is written in time, whoever asks or does not.
    #[inline]
    pub fn set_due(&mut self, cx: &Cx<'_>) {
        let after_ms = self.after_ms;
        self.due.get_or_insert_with(|| cx.now().plus_ms(after_ms));
    }

    /// When the chore is due.
    #[inline]
    pub fn deadline(&self) -> Option<Time> {
        self.due
    }

    /// The chore, if it was asked for.
    pub fn begin_asked(&mut self) -> Option<WritebackState> {
        std::mem::take(&mut self.asked).then_some(WritebackState::Begin)
    }

    /// The chore, which is due.
    pub fn begin_due(&mut self) -> WritebackState {
        self.due = None;
        WritebackState::Begin
    }

    /// There is no room for another table. Parks the request on `room`, which the next writeback that
    /// ends wakes; answers that one's number. One is begun if it is of use: if a changed table
    /// takes up the room.
    pub fn park_for_room(&mut self, of_use: bool, room: &mut WaitList, cx: &mut Cx<'_>) -> u32 {
        if of_use && self.running.is_none() && !self.asked {
            self.asked = true;
            cx.ask();
        }
        cx.park(room, On::Writeback);
        self.all.latest().wrapping_add(u32::from(self.running.is_none()))
    }

    /// Why writeback number `attempt`, or one after it, failed; `None` if none did.
    pub fn failure_of(&self, attempt: u32) -> Option<Errno> {
        self.all.failure_of(attempt)
    }

    /// Panics if one is under way, or waited for.
    pub fn assert_idle(&self) {
        assert!(self.running.is_none() && !self.asked && self.waiters.is_empty(), "{self:?}");
    }

    /// A guest's flush: makes stable what was acknowledged.
    pub fn flush<C: Changes>(&mut self, changes: &mut C, cx: &mut Cx<'_>) -> Step<WritebackState> {
        if self.running.is_some() && !mutant!("flush_rides_on_a_running_writeback") {
            cx.park(&mut self.waiters, On::Writeback);
            let target = self.flushes.latest().wrapping_add(1);
            return Step::Wait(WritebackState::Ride { target });
        }
        if changes.is_empty() || mutant!("flush_writes_no_tables") {
            return flush_only(0, changes, cx);
        }
        self.begin(For::Flush, changes, cx)
    }

    /// For who leaves the image clean: as a flush, but with all of a writeback's steps.
    pub fn settle<C: Changes>(&mut self, changes: &mut C, cx: &mut Cx<'_>) -> Step<WritebackState> {
        match self.running {
            Some(_) => self.flush(changes, cx),
            None => self.begin(For::Flush, changes, cx),
        }
    }

    pub fn step<C: Changes>(
        &mut self,
        state: WritebackState,
        event: Event,
        changes: &mut C,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        match (state, event) {
            (WritebackState::Begin, Event::Start) => {
                if self.running.is_some() || changes.is_empty() {
                    return Step::Done(Ok(()));
                }
                self.begin(For::Room, changes, cx)
            }
            (WritebackState::Ride { target }, Event::Woken) => self.ride(target, changes, cx),
            (WritebackState::Fence { next }, Event::Io(Ok(()))) => self.fence(next, changes, cx),
            (WritebackState::Write { phase, next }, Event::Io(Ok(()))) => {
                self.write(phase, next, changes, cx)
            }
            (WritebackState::Flush { next }, Event::Io(Ok(()))) => self.flushed(next, changes, cx),
            (
                WritebackState::Fence { .. }
                | WritebackState::Write { .. }
                | WritebackState::Flush { .. },
                Event::Io(error),
            ) => self.over(error, changes, cx),
            (WritebackState::FlushOnly { next }, Event::Io(Ok(()))) => {
                flush_only(next, changes, cx)
            }
            (WritebackState::FlushOnly { .. }, Event::Io(error)) => Step::Done(error),
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// A writeback has ended: was it the one that was waited for?
    fn ride<C: Changes>(
        &mut self,
        target: u32,
        changes: &mut C,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        let latest = self.flushes.latest();
        let begun = latest.wrapping_sub(target) < u32::MAX / 2;
        if begun && !(self.running == Some(For::Flush) && latest == target) {
            return Step::Done(self.flushes.failure_of(target).map_or(Ok(()), Err));
        }
        if self.running.is_some() {
            cx.park(&mut self.waiters, On::Writeback);
            return Step::Wait(WritebackState::Ride { target });
        }
        // Even if there is nothing to write: others wait for a writeback of this number.
        self.begin(For::Flush, changes, cx)
    }

    fn begin<C: Changes>(
        &mut self,
        reason: For,
        changes: &mut C,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        self.running = Some(reason);
        self.all.begin();
        if reason == For::Flush {
            self.flushes.begin();
        }
        self.due = None;
        let fences = !changes.is_empty() && changes.needs_fence();
        if mutant!("sealed_after_fence") && fences {
            return self.fence(0, changes, cx);
        }
        changes.seal(cx);
        if let Some(next) = changes.write(Phase::Ahead, 0, cx) {
            return Step::Wait(WritebackState::Write { phase: Phase::Ahead, next });
        }
        if fences && !mutant!("writeback_without_fence") {
            return self.fence(0, changes, cx);
        }
        self.write(Phase::Primary, 0, changes, cx)
    }

    /// Flushes what the copies rely on, from file `next` on.
    fn fence<C: Changes>(
        &mut self,
        next: u32,
        changes: &mut C,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        if (next as usize) < changes.files().len() {
            let next = issue_flushes(next, changes.files(), cx);
            return Step::Wait(WritebackState::Fence { next });
        }
        if mutant!("sealed_after_fence") {
            changes.seal(cx);
        }
        changes.stable();
        self.write(Phase::Primary, 0, changes, cx)
    }

    /// Writes the copies of `phase` from number `next` on, and goes on behind them.
    fn write<C: Changes>(
        &mut self,
        phase: Phase,
        next: u32,
        changes: &mut C,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        if let Some(next) = changes.write(phase, next, cx) {
            return Step::Wait(WritebackState::Write { phase, next });
        }
        match phase {
            Phase::Ahead if mutant!("vdi_growth_not_stable") => {
                self.write(Phase::Primary, 0, changes, cx)
            }
            Phase::Ahead => self.fence(0, changes, cx),
            Phase::Primary if mutant!("redundant_tables_before_flush") => {
                self.write(Phase::Redundant, 0, changes, cx)
            }
            Phase::Primary => self.flushed(0, changes, cx),
            Phase::Redundant => self.over(Ok(()), changes, cx),
        }
    }

    /// Flushes the files from number `next` on, then goes on to the redundant copies.
    fn flushed<C: Changes>(
        &mut self,
        next: u32,
        changes: &mut C,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        if (next as usize) < changes.files().len() {
            let next = issue_flushes(next, changes.files(), cx);
            return Step::Wait(WritebackState::Flush { next });
        }
        changes.stable();
        if mutant!("redundant_tables_not_written") {
            return self.over(Ok(()), changes, cx);
        }
        self.write(Phase::Redundant, 0, changes, cx)
    }

    /// The writeback has ended.
    fn over<C: Changes>(
        &mut self,
        result: Result<(), Errno>,
        changes: &mut C,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        let written = result.is_ok() || mutant!("failed_writeback_counts_as_written");
        changes.unseal(written, cx);
        if !changes.is_empty() {
            self.set_due(cx);
        }
        let reason = self.running.take();
        if let Err(errno) = result {
            self.all.failed(errno);
            if reason == Some(For::Flush) {
                self.flushes.failed(errno);
            }
        }
        if !mutant!("writeback_wakes_nobody") {
            cx.wake_all(&mut self.waiters);
        }
        Step::Done(result)
    }
}

/// Flushes the files from number `next` on, and that is all.
fn flush_only<C: Changes>(next: u32, changes: &C, cx: &mut Cx<'_>) -> Step<WritebackState> {
    let files = changes.files();
    if next as usize == files.len() {
        return Step::Done(Ok(()));
    }
    let next = issue_flushes(next, files, cx);
    if next as usize == files.len() {
        return Step::Last { label: C::FLUSH };
    }
    Step::Wait(WritebackState::FlushOnly { next })
}

/// Issues as many flushes as there is room for; answers the number of the next file.
fn issue_flushes(next: u32, files: &[FileId], cx: &mut Cx<'_>) -> u32 {
    let mut next = next as usize;
    loop {
        cx.issue(Op::flush(files[next]));
        next += 1;
        if next == files.len() || cx.room() == 0 {
            return next as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::BorrowedFd;

    use cowbell_engine::backend::{Backend, Completion, FileInfo, Harvest, Submission};
    use cowbell_engine::mem::Buf;
    use cowbell_engine::op::{OpKind, Seg, Segs};
    use cowbell_engine::step::{Chore, Driver, Io, IoKind};
    use cowbell_engine::units::{NodeId, OpId};
    use cowbell_engine::{Engine, Limits};

    use super::*;

    /// Ops wait until the test ends them.
    #[derive(Default)]
    struct Held {
        ops: Vec<(OpId, &'static str, u64)>,
        done: Vec<Completion>,
    }

    impl Backend for Held {
        type File = ();
        fn attach(&mut self, _: FileId, (): ()) -> io::Result<FileInfo> {
            let len = 1 << 20;
            let (request_align, memory_align, hole_align) = (1, 1, 1);
            let (can_grow, knows_holes) = (true, false);
            Ok(FileInfo { request_align, memory_align, hole_align, len, can_grow, knows_holes })
        }
        fn detach(&mut self, _: FileId) -> Option<()> {
            Some(())
        }
        fn submit(&mut self, submission: &mut Submission<'_>) {
            for &id in submission.waiting() {
                let op = &submission.ops[id].op;
                self.ops.push(match op.kind {
                    OpKind::Flush => (id, "flush", 0),
                    _ => (id, NAMES[op.offset as usize / PHASE], op.len),
                });
            }
            submission.take(submission.len());
        }
        fn harvest(&mut self, harvest: &mut Harvest<'_>) {
            harvest.done.append(&mut self.done);
        }
        fn event_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
        fn clock(&self) -> Time {
            Time::default()
        }
    }

    /// Copies of a phase are written from here on: so the op's offset tells the phase.
    const PHASE: usize = 1 << 16;
    const NAMES: [&str; 4] = ["ahead", "primary", "redundant", "data"];

    /// Numbers of things that have changed.
    #[derive(Default)]
    struct List {
        files: Vec<FileId>,
        changed: u32,
        sealed: u32,
        written_ahead: bool,
        owes: bool,
        stable: u32,
    }

    impl Changes for List {
        const FLUSH: u8 = 0;
        fn files(&self) -> &[FileId] {
            &self.files
        }
        fn is_empty(&self) -> bool {
            self.changed == 0
        }
        fn needs_fence(&self) -> bool {
            self.owes
        }
        fn seal(&mut self, _: &mut Cx<'_>) {
            assert_eq!(self.sealed, 0);
            self.sealed = std::mem::take(&mut self.changed);
        }
        fn stable(&mut self) {
            self.stable += 1;
        }
        fn write(&mut self, phase: Phase, next: u32, cx: &mut Cx<'_>) -> Option<u32> {
            let count = match phase {
                Phase::Ahead => u32::from(self.written_ahead),
                Phase::Primary | Phase::Redundant => self.sealed,
            };
            let offset = phase as u64 * PHASE as u64 + u64::from(next) * 512;
            (next < count).then(|| {
                cx.issue(Op::write(self.files[0], offset, Segs::one(Seg::zeros(512))));
                next + 1
            })
        }
        fn unseal(&mut self, written: bool, _: &mut Cx<'_>) {
            let sealed = std::mem::take(&mut self.sealed);
            self.changed += if written { 0 } else { sealed };
        }
    }

    /// A write changes something and is answered; a read wants room.
    struct Disk {
        list: List,
        writeback: Writeback,
        room: WaitList,
    }

    #[derive(Clone, Hash, Debug)]
    enum State {
        Writeback(WritebackState),
        Room(u32),
    }

    impl Driver for Disk {
        type State = State;
        const STATES: &'static [&'static str] = &["any"];
        fn label(_: &State) -> usize {
            0
        }
        fn size(&self) -> u64 {
            1 << 20
        }
        fn uses(&self, file: FileId) -> bool {
            self.list.files.contains(&file)
        }
        fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
            match cx.io().kind {
                IoKind::Flush => self.writeback.flush(&mut self.list, cx).map(State::Writeback),
                IoKind::Read => {
                    let of_use = !self.list.is_empty();
                    Step::Wait(State::Room(self.writeback.park_for_room(
                        of_use,
                        &mut self.room,
                        cx,
                    )))
                }
                _ => {
                    self.list.changed += 1;
                    self.writeback.set_due(cx);
                    cx.write_guest(self.list.files[0], 3 * PHASE as u64, 0, 512, false);
                    Step::Last { label: 0 }
                }
            }
        }
        fn chore(&mut self, chore: Chore) -> Option<State> {
            let state = match chore {
                Chore::Asked => self.writeback.begin_asked()?,
                Chore::Deadline => self.writeback.begin_due(),
                Chore::Settle => return None,
            };
            Some(State::Writeback(state))
        }
        fn deadline(&self) -> Option<Time> {
            self.writeback.deadline()
        }
        fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
            match state {
                State::Room(attempt) => {
                    Step::Done(self.writeback.failure_of(attempt).map_or(Ok(()), Err))
                }
                State::Writeback(state) => {
                    let step = self.writeback.step(state, event, &mut self.list, cx);
                    if matches!(step, Step::Done(_)) {
                        cx.wake_all(&mut self.room);
                    }
                    step.map(State::Writeback)
                }
            }
        }
    }

    struct Bench {
        engine: Engine<Disk, Held>,
        disk: NodeId,
        now: Time,
    }

    impl Bench {
        fn new(list: List) -> Bench {
            let mut engine = Engine::new(Held::default(), Limits::default());
            let files = vec![engine.attach(()).expect("it is taken").0];
            let (writeback, room) = (Writeback::new(5000), WaitList::new());
            let disk = engine.add(Disk { list: List { files, ..list }, writeback, room });
            Bench { engine, disk, now: Time::default() }
        }

        fn submit(&mut self, tag: u64, io: Io) {
            let mem = Buf::copied(&vec![0; io.len as usize]);
            self.engine.submit(self.disk, io, mem, tag).expect("there is room");
            self.engine.run(self.now);
        }

        fn write(&mut self) {
            let held = std::mem::take(&mut self.engine.backend_mut().ops);
            self.submit(0, Io::write(0, 512));
            assert_eq!((self.end(), self.ended()), (vec!["data"], vec![(0, Ok(()))]));
            self.engine.backend_mut().ops = held;
        }

        fn flush(&mut self, tag: u64) {
            self.submit(tag, Io::flush());
        }

        fn ended(&mut self) -> Vec<(u64, Result<(), Errno>)> {
            let ended = std::iter::from_fn(|| self.engine.poll());
            let mut ended: Vec<_> = ended.map(|done| (done.tag, done.result)).collect();
            ended.sort_unstable_by_key(|(tag, _)| *tag);
            ended
        }

        fn end_as(&mut self, result: Result<(), Errno>) -> Vec<&'static str> {
            let backend = self.engine.backend_mut();
            let ops = std::mem::take(&mut backend.ops);
            let ends = ops.iter().map(|&(id, _, len)| Completion::new(id, result.map(|()| len)));
            backend.done.extend(ends);
            self.engine.run(self.now);
            ops.into_iter().map(|(_, name, _)| name).collect()
        }

        /// Ends all ops in flight: what they were.
        fn end(&mut self) -> Vec<&'static str> {
            self.end_as(Ok(()))
        }

        /// Ends all, and what follows, until nothing is in flight.
        fn end_all(&mut self) -> Vec<&'static str> {
            let mut all = Vec::new();
            while !self.engine.backend().ops.is_empty() {
                all.extend(self.end());
            }
            all
        }

        fn list(&self) -> &List {
            &self.engine.node(self.disk).list
        }
    }

    #[test]
    fn the_steps_come_in_their_order() {
        let short = ["primary", "flush", "redundant"];
        let fenced = ["flush", "primary", "flush", "redundant"];
        let ahead = ["ahead", "flush", "primary", "flush", "redundant"];
        for (owes, written_ahead, expected) in
            [(false, false, &short[..]), (true, false, &fenced), (false, true, &ahead)]
        {
            let mut bench = Bench::new(List { owes, written_ahead, ..List::default() });
            bench.write();
            bench.flush(1);
            assert_eq!(bench.end_all(), expected);
            assert_eq!(bench.ended(), [(1, Ok(()))]);
            assert_eq!((bench.list().changed, bench.list().sealed), (0, 0));
            bench.engine.node(bench.disk).writeback.assert_idle();
        }
    }

    #[test]
    fn who_flushes_while_one_is_under_way_goes_with_the_next() {
        let mut bench = Bench::new(List::default());
        bench.write();
        bench.flush(1);
        bench.write();
        bench.flush(2);
        bench.flush(3);
        assert_eq!(bench.end(), ["primary"]);
        assert_eq!(bench.end(), ["flush"]);
        assert_eq!((bench.ended(), bench.list().changed), (vec![], 1));
        assert_eq!(bench.end(), ["redundant"]);
        assert_eq!((bench.ended(), bench.list().sealed), (vec![(1, Ok(()))], 1));
        assert_eq!(bench.end_all(), ["primary", "flush", "redundant"]);
        assert_eq!(bench.ended(), [(2, Ok(())), (3, Ok(()))]);
    }

    #[test]
    fn a_failure_is_told_to_who_waited_and_what_it_left_is_written_again() {
        let mut bench = Bench::new(List::default());
        bench.write();
        bench.submit(1, Io::read(0, 512));
        bench.flush(2);
        bench.submit(3, Io::read(0, 512));
        assert_eq!(bench.end_as(Err(Errno::NO_SPACE)), ["primary"]);
        // The flush came while the chore was at it: it goes with the next one.
        assert_eq!(bench.ended(), [(1, Err(Errno::NO_SPACE)), (3, Err(Errno::NO_SPACE))]);
        assert_eq!(bench.end_all(), ["primary", "flush", "redundant"]);
        assert_eq!((bench.ended(), bench.list().changed), (vec![(2, Ok(()))], 0));
        bench.submit(4, Io::read(0, 512));
        bench.write();
        bench.flush(5);
        bench.end_all();
        assert_eq!(bench.ended(), [(4, Ok(())), (5, Ok(()))]);
    }

    #[test]
    fn a_change_is_written_in_time_though_nobody_asks() {
        let mut bench = Bench::new(List::default());
        bench.write();
        assert_eq!(bench.engine.next_deadline(), Some(Time::default().plus_ms(5000)));
        bench.now = Time::default().plus_ms(5000);
        bench.engine.run(bench.now);
        assert_eq!(bench.end_as(Err(Errno::IO)), ["primary"]);
        // It failed: it is tried again as long after.
        assert_eq!(bench.engine.next_deadline(), Some(Time::default().plus_ms(10_000)));
        bench.now = Time::default().plus_ms(10_000);
        bench.engine.run(bench.now);
        assert_eq!(bench.end_all(), ["primary", "flush", "redundant"]);
        assert_eq!(bench.engine.next_deadline(), None);
    }
}
