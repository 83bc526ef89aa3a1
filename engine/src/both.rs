//! One engine over two backends: each file is in one of them.
//!
//! For disks that are on different kinds of storage, or one that is: an overlay in a file of this machine
//! whose backing file is reached some other way. Ops go where their file is, each backend's in the order
//! in which the engine offers them; computations go to the first.
//!
//! Neither waits for the other: what one has no room for is kept here, and offered to it again with
//! each harvest, while the other's ops pass by.

use std::io;
use std::os::fd::BorrowedFd;

use crate::backend::{self, Backend, Completion, FileInfo, Harvest, Submission};
use crate::mem::Memory;
use crate::op::Target;
use crate::ops::{OpRecord, Ops};
use crate::queue::Queue;
use crate::store::{Extent, Store};
use crate::sys::syscalls::Epoll;
use crate::units::{FileId, OpId, Time};

/// One of two.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Either<A, B> {
    /// Of the first backend.
    First(A),
    /// Of the second.
    Second(B),
}

/// Two backends as one. See the module.
#[derive(Debug)]
pub struct Both<A, B> {
    first: Side<A>,
    second: Side<B>,
    /// By a file's index: is it the second's?
    is_second: Vec<bool>,
    /// If both have a descriptor: one that holds the two.
    joint: Option<Epoll>,
}

/// One of the backends.
#[derive(Debug)]
struct Side<T> {
    backend: T,
    /// Ops that it has not taken yet, oldest first.
    left: Queue<OpId>,
    /// Ops that it has.
    in_flight: usize,
    /// It took less than it was offered last.
    is_full: bool,
}

/// Ops that are offered again at once.
const OFFERED_AGAIN: usize = 32;

impl<T: Backend> Side<T> {
    fn new(backend: T) -> Side<T> {
        Side { backend, left: Queue::with_capacity(64), in_flight: 0, is_full: false }
    }

    /// Offers the first `most` of what is left to it.
    fn offer(&mut self, most: usize, ops: &Ops, mem: &mut Memory) {
        let offered = self.left.len().min(most);
        if offered == 0 {
            return;
        }
        let mut submission = Submission { queue: &mut self.left, slice: offered, ops, mem };
        self.backend.submit(&mut submission);
        let taken = offered - submission.len();
        self.in_flight += taken;
        self.is_full = taken < offered;
    }

    fn harvest(&mut self, done: &mut Vec<Completion>, ops: &Ops, mem: &mut Memory) {
        let before = done.len();
        self.backend.harvest(&mut Harvest { done, ops, mem });
        self.in_flight -= done.len() - before;
        self.offer(OFFERED_AGAIN, ops, mem);
    }

    fn wants_retry(&self) -> bool {
        let is_owed = !self.left.is_empty() && !self.is_full;
        is_owed || backend::is_to_be_asked(&self.backend, self.in_flight)
    }
}

impl<A: Backend, B: Backend> Both<A, B> {
    /// Both of them. They have the same clock.
    ///
    /// # Errors
    ///
    /// If both have a descriptor, those of making one for the two.
    pub fn new(first: A, second: B) -> io::Result<Both<A, B>> {
        let joint = match (first.event_fd(), second.event_fd()) {
            (Some(a), Some(b)) => Some(Epoll::of([a, b])?),
            _ => None,
        };
        let (first, second) = (Side::new(first), Side::new(second));
        Ok(Both { first, second, is_second: Vec::new(), joint })
    }

    /// The first.
    pub fn first(&self) -> &A {
        &self.first.backend
    }

    /// The second.
    pub fn second(&self) -> &B {
        &self.second.backend
    }

    /// The first, for tests that tell it what to do.
    pub fn first_mut(&mut self) -> &mut A {
        &mut self.first.backend
    }

    /// The second, for tests that tell it what to do.
    pub fn second_mut(&mut self) -> &mut B {
        &mut self.second.backend
    }

    /// What is for neither is the first's to refuse.
    fn is_seconds(&self, record: &OpRecord) -> bool {
        let Target::File(file) = record.op.target else { return false };
        self.is_second.get(file.index()).is_some_and(|&is| is)
    }
}

impl<A: Backend, B: Backend> Backend for Both<A, B> {
    type File = Either<A::File, B::File>;

    fn attach(&mut self, id: FileId, file: Self::File) -> io::Result<FileInfo> {
        let (info, is_second) = match file {
            Either::First(file) => (self.first.backend.attach(id, file)?, false),
            Either::Second(file) => (self.second.backend.attach(id, file)?, true),
        };
        if id.index() >= self.is_second.len() {
            self.is_second.resize(id.index() + 1, false);
        }
        self.is_second[id.index()] = is_second;
        Ok(info)
    }

    fn detach(&mut self, id: FileId) -> Option<Self::File> {
        if self.is_second.get(id.index()).is_some_and(|&is| is) {
            return self.second.backend.detach(id).map(Either::Second);
        }
        self.first.backend.detach(id).map(Either::First)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        let offered = submission.len();
        for &id in submission.waiting() {
            if self.is_seconds(&submission.ops[id]) {
                self.second.left.push(id);
            } else {
                self.first.left.push(id);
            }
        }
        submission.take(offered);
        self.first.offer(offered.max(OFFERED_AGAIN), submission.ops, submission.mem);
        self.second.offer(offered.max(OFFERED_AGAIN), submission.ops, submission.mem);
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        self.first.harvest(harvest.done, harvest.ops, harvest.mem);
        self.second.harvest(harvest.done, harvest.ops, harvest.mem);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.joint {
            Some(joint) => Some(joint.borrow()),
            None => self.first.backend.event_fd().or(self.second.backend.event_fd()),
        }
    }

    fn wants_retry(&self) -> bool {
        self.first.wants_retry() || self.second.wants_retry()
    }

    fn next_deadline(&self) -> Option<Time> {
        let (first, second) = (&self.first.backend, &self.second.backend);
        first.next_deadline().into_iter().chain(second.next_deadline()).min()
    }

    fn clock(&self) -> Time {
        self.first.backend.clock()
    }
}

/// Calls the same on whichever it is.
macro_rules! of_either {
    ($either:expr, $file:ident => $call:expr) => {
        match $either {
            Either::First($file) => $call,
            Either::Second($file) => $call,
        }
    };
}

impl<A: Store, B: Store> Store for Either<A, B> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        of_either!(self, file => file.read_at(offset, buf))
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        of_either!(self, file => file.write_at(offset, buf))
    }
    fn flush(&self) -> io::Result<()> {
        of_either!(self, file => file.flush())
    }
    fn len(&self) -> io::Result<u64> {
        of_either!(self, file => file.len())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        of_either!(self, file => file.set_len(len))
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        of_either!(self, file => file.allocate(offset, len))
    }
    fn extent_at(&self, offset: u64) -> io::Result<Extent> {
        of_either!(self, file => file.extent_at(offset))
    }
    fn is_writable(&self) -> bool {
        of_either!(self, file => file.is_writable())
    }
    fn has_fixed_len(&self) -> bool {
        of_either!(self, file => file.has_fixed_len())
    }
}

#[cfg(all(test, feature = "contract"))]
mod tests {
    use super::{Both, Either};
    use crate::backend::{Backend, Completion, FileInfo, Harvest, Submission};
    use crate::contract::{BLOCK, Bench, FILE, Rig, pattern, pool};
    use crate::op::{Op, Target};
    use crate::units::{FileId, OpId, Time};
    use std::io;
    use std::os::fd::BorrowedFd;

    /// Takes as many ops as it has room for; what it has taken ends when the test says so.
    #[derive(Default)]
    struct Narrow {
        room: usize,
        taken: Vec<OpId>,
        ended: usize,
    }

    impl Backend for Narrow {
        type File = u64;
        fn attach(&mut self, _: FileId, len: u64) -> io::Result<FileInfo> {
            let (request_align, memory_align, hole_align) = (1, 1, 1);
            let (can_grow, knows_holes) = (true, false);
            Ok(FileInfo { request_align, memory_align, hole_align, len, can_grow, knows_holes })
        }
        fn detach(&mut self, _: FileId) -> Option<u64> {
            Some(0)
        }
        fn submit(&mut self, submission: &mut Submission<'_>) {
            let count = submission.len().min(self.room);
            self.taken.extend(&submission.waiting()[..count]);
            self.room -= count;
            submission.take(count);
        }
        fn harvest(&mut self, harvest: &mut Harvest<'_>) {
            for op in self.taken.drain(..self.ended) {
                harvest.done.push(Completion::new(op, Ok(BLOCK)));
            }
            self.room += self.ended;
            self.ended = 0;
        }
        fn event_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
        // What it has is not ready: nobody shall ask.
        fn next_deadline(&self) -> Option<Time> {
            (!self.taken.is_empty()).then_some(Time(u64::MAX))
        }
        fn clock(&self) -> Time {
            Time(0)
        }
    }

    struct Two;

    impl Rig for Two {
        type Backend = Both<Narrow, Narrow>;
        fn make(&mut self, contents: &[u8]) -> (Self::Backend, FileInfo) {
            let narrow = |room| Narrow { room, ..Narrow::default() };
            let mut both = Both::new(narrow(3), narrow(2)).expect("without descriptors");
            both.attach(FileId(1), Either::Second(0)).expect("it attaches");
            let info = both.attach(FILE, Either::First(contents.len() as u64));
            (both, info.expect("it attaches"))
        }
        fn contents(&mut self, _: &mut Self::Backend) -> Vec<u8> {
            Vec::new()
        }
    }

    #[test]
    fn who_has_no_room_holds_up_nobody_and_gets_his_ops_in_order() {
        let (mut rig, contents) = (Two, pattern(1, 1));
        let mut bench = Bench::new(&mut rig, &contents);
        let push = |bench: &mut Bench<'_, Two>, file| {
            let target = Target::File(FileId(file));
            bench.push(Op { target, ..Op::write(FILE, 0, pool(0, 0, 1)) })
        };
        // One of the second's after each two of the first's.
        let ids: Vec<OpId> = (0..60).map(|n| push(&mut bench, u32::from(n % 3 == 2))).collect();
        let of = |second: bool| -> Vec<OpId> {
            let its = ids.iter().enumerate().filter(|(n, _)| (n % 3 == 2) == second);
            its.map(|(_, &id)| id).collect()
        };
        let (firsts, seconds) = (of(false), of(true));
        bench.submit();
        assert!(bench.queue.is_empty(), "what has no room is kept");
        assert_eq!(bench.backend.first().taken, firsts[..3]);
        assert_eq!(bench.backend.second().taken, seconds[..2]);
        assert!(!bench.backend.wants_retry(), "both are full, and will say when they are not");
        // The first hangs; the second goes on to its end, two by two.
        for at in (0..seconds.len()).step_by(2) {
            assert_eq!(bench.backend.second().taken, seconds[at..at + 2]);
            bench.backend.second_mut().ended = 2;
            assert_eq!(bench.harvest().len(), 2);
        }
        assert_eq!(bench.backend.first().taken, firsts[..3]);
        // New ones of the first's stay behind those that wait.
        let last = push(&mut bench, 0);
        bench.submit();
        assert_eq!(bench.backend.first().taken, firsts[..3]);
        let mut order = Vec::new();
        while order.len() <= firsts.len() {
            let backend = bench.backend.first_mut();
            backend.ended = backend.taken.len();
            let back: Vec<OpId> = bench.harvest().into_iter().map(|back| back.0).collect();
            assert!(!back.is_empty(), "{} of them are kept for ever", 41 - order.len());
            order.extend(back);
        }
        assert_eq!(order[..firsts.len()], firsts);
        assert_eq!(order[firsts.len()..], [last]);
        assert!(bench.backend.first().taken.is_empty() && !bench.backend.wants_retry());
    }

    #[test]
    fn what_is_kept_is_offered_again_while_there_is_room() {
        let (mut rig, contents) = (Two, pattern(1, 1));
        let mut bench = Bench::new(&mut rig, &contents);
        for _ in 0..100 {
            bench.push(Op::write(FILE, 0, pool(0, 0, 1)));
        }
        bench.submit();
        // It has room for all of them suddenly, and takes what it is offered at a time.
        let backend = bench.backend.first_mut();
        (backend.ended, backend.room) = (3, 1000);
        assert_eq!(bench.harvest().len(), 3);
        assert!(bench.backend.wants_retry(), "nothing else wakes the loop for the rest");
        let mut turns = 0;
        while bench.backend.first().taken.len() < 97 {
            assert!(bench.backend.wants_retry() && bench.harvest().is_empty());
            turns += 1;
        }
        assert!(turns < 5 && !bench.backend.wants_retry());
    }
}
