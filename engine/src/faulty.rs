//! A backend that fails as it is told, and is as slow: any other backend, and a plan of faults between
//! it and the engine. For tests of what happens when a device breaks or hangs, over files that are real.
//!
//! An op that is to fail either never reaches the inner backend, or is done there and reported as
//! failed nevertheless, as when a cable breaks before the answer is through. Callers must be right
//! in both cases. One that is to be late is done (or not) at once, and reported later.

use std::io;
use std::os::fd::BorrowedFd;

use crate::backend::{self, Backend, Completion, FileInfo, Harvest, Submission};
use crate::op::{Op, OpKind, Target};
use crate::units::{Errno, FileId, OpId, Time};

/// A kind of op on a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum What {
    /// [`OpKind::Read`].
    Read,
    /// [`OpKind::Write`] and [`OpKind::Copy`].
    Write,
    /// [`OpKind::Flush`].
    Flush,
    /// [`OpKind::Zero`].
    Zero,
    /// [`OpKind::Discard`].
    Discard,
    /// [`OpKind::Truncate`].
    Truncate,
    /// [`OpKind::Allocate`].
    Allocate,
}

impl What {
    /// Each kind once.
    pub const ALL: [What; 7] = [
        What::Read,
        What::Write,
        What::Flush,
        What::Zero,
        What::Discard,
        What::Truncate,
        What::Allocate,
    ];

    /// `None` for work that is on no file, and for what cannot fail.
    fn of(kind: OpKind) -> Option<What> {
        Some(match kind {
            OpKind::Read => What::Read,
            OpKind::Write { .. } | OpKind::Copy { .. } => What::Write,
            OpKind::Flush => What::Flush,
            OpKind::Zero { .. } => What::Zero,
            OpKind::Discard => What::Discard,
            OpKind::Truncate => What::Truncate,
            OpKind::Allocate => What::Allocate,
            OpKind::Compute(_) | OpKind::Hole => return None,
        })
    }
}

/// Which ops fail or are late, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Ops of this kind; `None`: of any, but never a computation.
    pub what: Option<What>,
    /// Ops on this file; `None`: on any.
    pub file: Option<FileId>,
    /// Ops on some of the bytes of a file from the first of these up to the second.
    pub bytes: (u64, u64),
    /// So many such ops are let through first. Counted down.
    pub after: u64,
    /// So many are hit; [`u64::MAX`]: all from then on. Counted down.
    pub times: u64,
    /// How they fail; `None`: they do not, and are only late.
    pub errno: Option<Errno>,
    /// Is an op that fails done nevertheless? A done op that failed by itself keeps its own error.
    pub done: bool,
    /// The completion is held back for so many nanoseconds by the backend's clock, from when the op
    /// ended; [`u64::MAX`]: until [`Faulty::let_go`].
    pub delay: u64,
}

impl Default for Fault {
    /// All ops fail with EIO, at once, and are not done.
    fn default() -> Fault {
        Fault {
            what: None,
            file: None,
            bytes: (0, u64::MAX),
            after: 0,
            times: u64::MAX,
            errno: Some(Errno::IO),
            done: false,
            delay: 0,
        }
    }
}

impl Fault {
    /// All ops are done, and are so many nanoseconds late.
    pub fn late(delay: u64) -> Fault {
        Fault { errno: None, delay, ..Fault::default() }
    }

    fn is_about(&self, op: &Op, what: What) -> bool {
        self.what.is_none_or(|wanted| wanted == what)
            && self.file.is_none_or(|file| op.target == Target::File(file))
            && op.offset < self.bytes.1
            && op.offset.saturating_add(op.len.max(1)) > self.bytes.0
    }

    /// One more op that it is about: does it hit that?
    fn hits(&mut self) -> bool {
        if self.after > 0 {
            self.after -= 1;
            return false;
        }
        let hit = self.times > 0;
        if self.times != u64::MAX {
            self.times -= u64::from(hit);
        }
        hit
    }
}

/// A backend with faults. See the module.
#[derive(Debug)]
pub struct Faulty<B> {
    inner: B,
    plan: Vec<Fault>,
    injected: u64,
    /// Ops at the front of the engine's queue that the inner backend has left there: judged.
    judged: usize,
    /// Ops that the inner backend has.
    in_flight: usize,
    /// Those of them that are hit.
    marked: Vec<(OpId, Fault)>,
    /// Ops that ended, and when that is to be told.
    held: Vec<(Time, Completion)>,
    /// Ops that ended, which is told when they are let go.
    hung: Vec<Completion>,
}

/// When to tell of what is not late.
const AT_ONCE: Time = Time(0);

impl<B> Faulty<B> {
    /// `inner`, without faults as yet.
    pub fn new(inner: B) -> Faulty<B> {
        let (plan, marked, held, hung) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Faulty { inner, plan, injected: 0, judged: 0, in_flight: 0, marked, held, hung }
    }

    /// The faults. Of several that hit one op, the first counts. What is changed here holds for ops
    /// that have not been taken or left waiting by a submission yet.
    pub fn plan_mut(&mut self) -> &mut Vec<Fault> {
        &mut self.plan
    }

    /// Ops that were made to fail, or to be late.
    pub fn injected(&self) -> u64 {
        self.injected
    }

    /// Ops that ended and are held back.
    pub fn held_back(&self) -> usize {
        self.held.len() + self.hung.len()
    }

    /// Whatever is held back comes with the next harvest.
    pub fn let_go(&mut self) {
        self.held.iter_mut().for_each(|held| held.0 = AT_ONCE);
        self.held.extend(self.hung.drain(..).map(|completion| (AT_ONCE, completion)));
    }

    /// The backend that does the ops.
    pub fn inner(&self) -> &B {
        &self.inner
    }

    /// The same, for a test that tells it what to do.
    pub fn inner_mut(&mut self) -> &mut B {
        &mut self.inner
    }

    fn judge(&mut self, op: &Op) -> Option<Fault> {
        let what = What::of(op.kind)?;
        let fault = self.plan.iter_mut().find_map(|fault| {
            let hit = fault.is_about(op, what) && fault.hits();
            hit.then_some(*fault)
        })?;
        self.injected += 1;
        Some(fault)
    }
}

impl<B: Backend> Faulty<B> {
    /// Judges what is offered and has not been judged: takes what fails before it is done.
    fn judge_all(&mut self, submission: &mut Submission<'_>) {
        let mut at = 0;
        submission.take_if(|id, record| {
            at += 1;
            if at <= self.judged {
                return false;
            }
            match self.judge(&record.op) {
                Some(Fault { errno: Some(errno), done: false, delay, .. }) => {
                    self.hold(delay, Completion::new(id, Err(errno)));
                    return true;
                }
                Some(fault) => self.marked.push((id, fault)),
                None => {}
            }
            self.judged += 1;
            at = self.judged;
            false
        });
    }

    /// Holds back the completion of an op that has ended now.
    fn hold(&mut self, delay: u64, completion: Completion) {
        match delay {
            0 => self.held.push((AT_ONCE, completion)),
            u64::MAX => self.hung.push(completion),
            _ => self.held.push((self.inner.clock().plus_ns(delay), completion)),
        }
    }
}

impl<B: Backend> Backend for Faulty<B> {
    type File = B::File;

    fn attach(&mut self, id: FileId, file: B::File) -> io::Result<FileInfo> {
        self.inner.attach(id, file)
    }

    fn detach(&mut self, id: FileId) -> Option<B::File> {
        self.inner.detach(id)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        if self.plan.is_empty() {
            self.judged = self.judged.max(submission.len());
        }
        if self.judged < submission.len() {
            self.judge_all(submission);
        }
        let offered = submission.len();
        if offered > 0 {
            self.inner.submit(submission);
        }
        let taken = offered - submission.len();
        self.judged -= taken;
        self.in_flight += taken;
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        let before = harvest.done.len();
        self.inner.harvest(harvest);
        self.in_flight -= harvest.done.len() - before;
        if !self.marked.is_empty() {
            let ended = harvest.done.split_off(before);
            for mut completion in ended {
                let mark = self.marked.iter().position(|mark| mark.0 == completion.op);
                let Some(at) = mark else {
                    harvest.done.push(completion);
                    continue;
                };
                let (op, Fault { errno, delay, .. }) = self.marked.swap_remove(at);
                if let (Ok(_), Some(errno)) = (completion.result(), errno) {
                    completion = Completion::new(op, Err(errno));
                }
                self.hold(delay, completion);
            }
        }
        if self.held.is_empty() {
            return;
        }
        let now = self.inner.clock();
        self.held.retain(|&(due, completion)| {
            if due <= now {
                harvest.done.push(completion);
            }
            due > now
        });
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event_fd()
    }

    fn wants_retry(&self) -> bool {
        self.held.iter().any(|held| held.0 == AT_ONCE)
            || backend::is_to_be_asked(&self.inner, self.in_flight)
    }

    fn next_deadline(&self) -> Option<Time> {
        let late = self.held.iter().map(|held| held.0).filter(|due| *due != AT_ONCE);
        late.chain(self.inner.next_deadline()).min()
    }

    fn clock(&self) -> Time {
        self.inner.clock()
    }
}

#[cfg(all(test, feature = "contract"))]
pub(crate) mod tests {
    use super::{Fault, Faulty, What};
    use crate::backend::{Backend, FileInfo, Harvest, Submission};
    use crate::contract::{BLOCK, Bench, FILE, Rig, pattern, pool, range, seg};
    use crate::op::{Base, Op, OpKind, Target};
    use crate::sys::disk::{DiskFile, DiskOptions};
    use crate::sys::inline::Inline;
    use crate::units::{BufId, Errno, FileId, Time};
    use std::fs;
    use std::os::fd::BorrowedFd;

    /// Takes one op of each submission, and leaves the rest.
    pub(crate) struct OneByOne(Inline, usize);

    impl OneByOne {
        pub(crate) fn new() -> OneByOne {
            OneByOne(Inline::new(), 0)
        }
    }

    impl Backend for OneByOne {
        type File = DiskFile;
        fn attach(&mut self, id: FileId, file: DiskFile) -> std::io::Result<FileInfo> {
            self.0.attach(id, file)
        }
        fn detach(&mut self, id: FileId) -> Option<DiskFile> {
            self.0.detach(id)
        }
        fn submit(&mut self, submission: &mut Submission<'_>) {
            self.1 = submission.len().saturating_sub(1);
            submission.slice -= self.1;
            self.0.submit(submission);
            submission.slice += self.1;
        }
        fn harvest(&mut self, harvest: &mut Harvest<'_>) {
            self.0.harvest(harvest);
        }
        fn event_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
        fn wants_retry(&self) -> bool {
            self.1 > 0
        }
        fn next_deadline(&self) -> Option<Time> {
            self.0.next_deadline()
        }
        fn clock(&self) -> Time {
            self.0.clock()
        }
    }

    struct Disk(tempfile::TempDir);

    impl Disk {
        fn new() -> Disk {
            Disk(tempfile::tempdir().expect("a folder"))
        }
    }

    impl Rig for Disk {
        type Backend = Faulty<OneByOne>;
        fn make(&mut self, contents: &[u8]) -> (Self::Backend, FileInfo) {
            let path = self.0.path().join("file");
            fs::write(&path, contents).expect("a file");
            let options = DiskOptions { write: true, ..DiskOptions::default() };
            let file = DiskFile::open(path, &options).expect("it opens");
            let mut backend = Faulty::new(OneByOne::new());
            let info = backend.attach(FILE, file).expect("it attaches");
            (backend, info)
        }
        fn contents(&mut self, _: &mut Self::Backend) -> Vec<u8> {
            fs::read(self.0.path().join("file")).expect("a file")
        }
    }

    fn write(block: u64) -> Op {
        Op::write(FILE, block * BLOCK, pool(0, block, 1))
    }

    #[test]
    fn keeps_the_contract_while_it_has_no_faults() {
        crate::contract::run_all(&mut Disk::new());
    }

    #[test]
    fn the_ops_of_the_plan_fail_and_no_others() {
        let (mut disk, file) = (Disk::new(), pattern(8, 1));
        let mut bench = Bench::new(&mut disk, &file);
        let fault = Fault { what: Some(What::Write), after: 2, times: 3, ..Fault::default() };
        bench.backend.plan_mut().push(Fault { errno: Some(Errno::NO_SPACE), ..fault });
        let flush = bench.push(Op::flush(FILE));
        let writes: Vec<_> = (0..8).map(|block| bench.push(write(block))).collect();
        // Those left in the queue are offered again and again, and judged once.
        let back = bench.drain();
        assert_eq!(back.len(), 9);
        for (id, record, result) in back {
            let expected = match writes.iter().position(|&write| write == id) {
                Some(2..5) => Err(Errno::NO_SPACE),
                Some(_) => Ok(BLOCK),
                None => Ok(0),
            };
            assert_eq!(result, expected, "{record:?}");
            assert!(id == flush || writes.contains(&id));
        }
        assert_eq!(bench.backend.injected(), 3);
        let mut expected = vec![0; file.len()];
        expected[range(2, 3)].copy_from_slice(&file[range(2, 3)]);
        bench.assert_contents(&expected);
    }

    #[test]
    fn an_op_may_be_done_and_reported_as_failed() {
        let (mut disk, file) = (Disk::new(), pattern(2, 2));
        let mut bench = Bench::new(&mut disk, &file);
        bench.backend.plan_mut().push(Fault { done: true, times: 1, ..Fault::default() });
        bench.push(write(0));
        assert_eq!(bench.drain()[0].2, Err(Errno::IO));
        bench.push(write(1));
        assert_eq!(bench.drain()[0].2, Ok(BLOCK));
        bench.assert_contents(&vec![0; file.len()]);
    }

    #[test]
    fn a_fault_comes_back_from_harvest_and_wants_a_retry_until_then() {
        let mut disk = Disk::new();
        let mut bench = Bench::new(&mut disk, &pattern(2, 3));
        bench.backend.plan_mut().push(Fault::default());
        bench.push(write(0));
        assert!(!bench.backend.wants_retry());
        bench.submit();
        assert!(bench.queue.is_empty() && bench.backend.wants_retry());
        assert_eq!(bench.harvest().len(), 1);
        assert!(!bench.backend.wants_retry());
        // The plan may change at work.
        bench.backend.plan_mut().clear();
        bench.push(write(0));
        assert_eq!(bench.drain()[0].2, Ok(BLOCK));
    }

    #[test]
    fn what_is_late_is_done_at_once_and_told_in_its_time() {
        const LATE: u64 = 20_000_000;
        let mut disk = Disk::new();
        let mut bench = Bench::new(&mut disk, &pattern(4, 5));
        let late = Fault { times: 1, ..Fault::late(LATE) };
        // One is done, one fails without being done; the others are in time.
        let both = [late, Fault { errno: Some(Errno::IO), ..late }];
        bench.backend.plan_mut().extend(both);
        let began = bench.backend.clock();
        let writes: Vec<_> = (0..4).map(|block| bench.push(write(block))).collect();
        let mut back = Vec::new();
        while back.len() < 2 {
            bench.submit();
            back.extend(bench.harvest());
        }
        assert!(back.iter().all(|(id, ..)| writes[2..].contains(id)));
        assert_eq!(bench.backend.held_back(), 2);
        assert!(!bench.backend.wants_retry(), "there is nothing to do meanwhile");
        let due = bench.backend.next_deadline().expect("when there is");
        assert!(due >= began.plus_ns(LATE) && due <= bench.backend.clock().plus_ns(LATE));
        let back = bench.drain();
        assert!(bench.backend.clock() >= due);
        for (id, _, result) in back {
            assert_eq!(result, if id == writes[0] { Ok(BLOCK) } else { Err(Errno::IO) });
        }
        assert_eq!(bench.backend.next_deadline(), None);
    }

    #[test]
    fn what_hangs_does_so_until_it_is_let_go() {
        let mut disk = Disk::new();
        let mut bench = Bench::new(&mut disk, &pattern(2, 6));
        bench.backend.plan_mut().push(Fault { times: 1, ..Fault::late(u64::MAX) });
        let hung = bench.push(write(0));
        bench.push(write(1));
        let mut back = Vec::new();
        while back.is_empty() {
            bench.submit();
            back.extend(bench.harvest());
        }
        assert!(bench.harvest().is_empty() && !bench.backend.wants_retry());
        assert_eq!(bench.backend.next_deadline(), None);
        bench.backend.let_go();
        assert!(bench.backend.wants_retry() && bench.backend.next_deadline().is_none());
        let (id, _, result) = bench.harvest().pop().expect("it comes");
        assert_eq!((id, result), (hung, Ok(BLOCK)));
    }

    #[test]
    fn keeps_the_contract_while_all_is_late() {
        struct Late(Disk);
        impl Rig for Late {
            type Backend = Faulty<OneByOne>;
            fn make(&mut self, contents: &[u8]) -> (Self::Backend, FileInfo) {
                let (mut backend, info) = self.0.make(contents);
                backend.plan_mut().push(Fault::late(100_000));
                (backend, info)
            }
            fn contents(&mut self, backend: &mut Self::Backend) -> Vec<u8> {
                self.0.contents(backend)
            }
        }
        crate::contract::run_all(&mut Late(Disk::new()));
    }

    #[test]
    fn files_can_be_told_apart_and_computations_never_fail() {
        const COPY: crate::op::Compute = crate::op::Compute {
            name: "copy",
            run: |input, output| {
                output.copy_from_slice(input);
                Ok(())
            },
        };
        let mut disk = Disk::new();
        let mut bench = Bench::new(&mut disk, &pattern(2, 4));
        let errno = Some(Errno::NO_SPACE);
        let other = Fault { file: Some(FileId(7)), errno, ..Fault::default() };
        bench.backend.plan_mut().push(other);
        bench.push(write(0));
        assert_eq!(bench.drain()[0].2, Ok(BLOCK));
        bench.push(Op { target: Target::File(FileId(7)), ..write(0) });
        assert_eq!(bench.drain()[0].2, Err(Errno::NO_SPACE));
        bench.backend.plan_mut()[0] = Fault::default();
        let base = |buf| seg(Base::Pool(BufId(buf)), 0, 1);
        bench.push(Op::compute(COPY, base(0), base(1)));
        bench.push(Op::bare(OpKind::Discard, FILE, 0, BLOCK));
        let mut results: Vec<_> = bench.drain().into_iter().map(|back| back.2).collect();
        results.sort_by_key(Result::is_err);
        assert_eq!(results, [Ok(0), Err(Errno::IO)]);
    }
}
