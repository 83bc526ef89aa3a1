//! The suite that every backend must pass: the contract of [`crate::backend`], as tests.
//!
//! A [`Rig`] makes backends with one file attached and shows that file's bytes. The suite drives
//! them as the engine does, keeping the ops, the memory and the books: every op comes back once,
//! in whatever order, and short answers are asked again. Nothing here knows where bytes are kept.
//! A broken promise is a panic that says which.

use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::backend::{Backend, Completion, FileInfo, Harvest, Submission};
use crate::mem::{Buf, Mem, Memory};
use crate::op::{Base, Compute, Op, OpKind, Seg, Segs, Target};
use crate::ops::{OpOwner, OpRecord, Ops};
use crate::queue::Queue;
use crate::sys::syscalls::wait_readable;
use crate::units::{BufId, Errno, FileId, OpId, RegionId, ReqId, Time};

/// Makes what the suite tests.
pub trait Rig {
    /// The backend.
    type Backend: Backend;

    /// A fresh backend, with a file of these bytes attached as [`FILE`].
    fn make(&mut self, contents: &[u8]) -> (Self::Backend, FileInfo);

    /// The bytes of the file that was made last. No op is in flight.
    fn contents(&mut self, backend: &mut Self::Backend) -> Vec<u8>;

    /// Something is in flight: lets time pass until there may be something to harvest.
    fn wait(&mut self, backend: &mut Self::Backend) {
        wait_for(backend);
    }
}

/// As a loop does: until the backend's descriptor is readable, or the moment has come that it has named.
/// Is it readable?
fn wait_for(backend: &impl Backend) -> bool {
    // Rounded up: a loop that wakes too early would go round for nothing.
    let left = |due: Time| due.since(backend.clock()).div_ceil(1_000_000);
    let due_ms = backend.next_deadline().map(left);
    let most = due_ms.map_or(20_000, |ms| ms.min(20_000) as i32);
    let Some(fd) = backend.event_fd() else {
        std::thread::sleep(Duration::from_millis(due_ms.map_or(0, |_| most as u64)));
        return false;
    };
    let is_readable = wait_readable(fd.as_raw_fd(), most);
    let is_due = due_ms.is_some_and(|ms| ms <= 20_000);
    assert!(is_readable || is_due, "ops in flight, and no wake-up for 20 seconds");
    is_readable
}

/// The file that a [`Rig`] attaches.
pub const FILE: FileId = FileId(0);

/// A block: the unit of all offsets and lengths here, aligned for every device.
pub(crate) const BLOCK: u64 = 4096;

/// Runs the whole suite.
pub fn run_all<R: Rig>(rig: &mut R) {
    macro_rules! run {
        ($($name:ident)*) => {
            $( eprintln!("contract: {}", stringify!($name)); $name(rig); )*
        };
    }
    run! {
        nothing_in_nothing_out
        a_read_fills_its_own_memory_only
        a_read_ends_with_the_file
        a_read_of_several_segments
        a_write_changes_its_own_bytes_only
        a_write_extends_the_file
        a_write_of_several_segments
        a_write_that_is_stable_when_it_comes_back
        a_partly_moved_op_goes_on_where_it_stopped
        a_flush_answers_zero
        zeroing_inside_the_file
        zeroing_past_the_end
        copying_from_file_to_file
        a_discard_harms_nobody_else
        truncating_up_and_down
        allocating_keeps_bytes_and_grows
        no_length_is_no_error
        a_computation_changes_its_own_output_only
        a_computation_that_fails_says_why
        computations_among_reads_and_writes
        more_ops_than_fit
        ops_of_all_kinds_at_once
        errors_come_back_as_completions
        the_descriptor_tells_when_to_harvest
        nothing_is_asked_for_without_a_reason
    }
}

/// An op that has come back.
pub(crate) type Back = (OpId, OpRecord, Result<u64, Errno>);

/// The engine's part in it.
pub(crate) struct Bench<'r, R: Rig> {
    // Dropped before the memory that ops in flight name, as in the engine.
    pub(crate) backend: R::Backend,
    rig: &'r mut R,
    pub(crate) mem: Memory,
    can_grow: bool,
    ops: Ops,
    pub(crate) queue: Queue<OpId>,
    done: Vec<Completion>,
    next_ordinal: u32,
}

impl<'r, R: Rig> Bench<'r, R> {
    pub(crate) fn new(rig: &'r mut R, contents: &[u8]) -> Bench<'r, R> {
        let (backend, info) = rig.make(contents);
        assert_eq!(info.len, contents.len() as u64, "attach tells the file's length");
        for align in [info.request_align, info.memory_align] {
            assert!(align.is_power_of_two() && u64::from(align) <= BLOCK, "alignment {align}");
        }
        let mem = Memory::new(4, 4, 16 * BLOCK as usize);
        let (mut ops, queue, done) = (Ops::new(1, 16), Queue::with_capacity(16), Vec::new());
        ops.claim_slot(); // of the request whose ops they all are
        let can_grow = info.can_grow;
        Bench { backend, rig, mem, can_grow, ops, queue, done, next_ordinal: 0 }
    }

    pub(crate) fn push(&mut self, op: Op) -> OpId {
        self.push_from(op, 0)
    }

    /// Queues an op of which `moved` bytes have been moved already.
    pub(crate) fn push_from(&mut self, op: Op, moved: u64) -> OpId {
        let owner = OpOwner { request: ReqId(0), ordinal: self.next_ordinal };
        self.next_ordinal += 1;
        let id = self.ops.insert(OpRecord { op, moved, owner, busy: true });
        self.queue.push(id);
        id
    }

    pub(crate) fn submit(&mut self) {
        let Bench { queue, ops, mem, .. } = self;
        self.backend.submit(&mut Submission { slice: queue.len(), queue, ops, mem });
    }

    /// Runs `f` with what a harvest sees.
    pub(crate) fn with_harvest(&mut self, f: impl FnOnce(&mut R::Backend, &mut Harvest<'_>)) {
        let Bench { done, ops, mem, .. } = self;
        f(&mut self.backend, &mut Harvest { done, ops, mem });
    }

    /// Harvests once; what has come back is out of the books.
    pub(crate) fn harvest(&mut self) -> Vec<Back> {
        self.with_harvest(|backend, harvest| backend.harvest(harvest));
        let mut back = Vec::new();
        for done in self.done.drain(..) {
            let op = done.op;
            assert!(
                !self.queue.as_slice().contains(&op),
                "{op:?} came back without having been taken"
            );
            assert!(self.ops.contains(op), "{op:?} came back twice, or never existed");
            back.push((op, self.ops.remove(op), done.result()));
        }
        back
    }

    /// Until everything has come back.
    pub(crate) fn drain(&mut self) -> Vec<Back> {
        let mut back = Vec::new();
        while !self.ops.is_empty() {
            back.extend(self.drain_some());
        }
        assert!(self.harvest().is_empty(), "nothing was in flight");
        back
    }

    /// Until something has come back, if there is anything to wait for.
    fn drain_some(&mut self) -> Vec<Back> {
        let mut turns = 0;
        while !self.ops.is_empty() {
            self.submit();
            let back = self.harvest();
            if !back.is_empty() {
                return back;
            }
            if !self.backend.wants_retry() && self.queue.len() < self.ops.len() {
                self.rig.wait(&mut self.backend);
            }
            turns += 1;
            assert!(turns < 1_000_000, "{} ops never came back", self.ops.len());
        }
        Vec::new()
    }

    /// Does one op, asking again after short answers; what is behind the end of the file becomes
    /// zeros.
    pub(crate) fn complete(&mut self, op: Op) -> Result<(), Errno> {
        let mut moved = 0;
        loop {
            self.push_from(op.clone(), moved);
            let (_, record, result) = self.drain().pop().expect("one op, one completion");
            let count = result?;
            check_count(&record, count);
            if !op.kind.has_memory() {
                return Ok(());
            }
            moved += count;
            if moved == op.len {
                return Ok(());
            }
            if count == 0 {
                assert_eq!(op.kind, OpKind::Read, "a write never answers 0");
                self.mem.zero(&op.segs, moved, op.len - moved);
                return Ok(());
            }
        }
    }

    /// As `complete`, for ops that a file may not be able to do. False: it is not.
    fn complete_if_supported(&mut self, op: Op) -> bool {
        match self.complete(op) {
            Ok(()) => true,
            Err(Errno::NOT_SUPPORTED) => false,
            Err(error) => panic!("{error:?}"),
        }
    }

    /// Of a file that cannot grow: an op that would make it grow fails, and changes nothing. Answers
    /// whether it is such a file.
    fn is_refused(&mut self, op: Op, contents: &[u8]) -> bool {
        if !self.can_grow {
            let may_be_unknown = matches!(op.kind, OpKind::Zero { .. });
            let error = self.complete(op).expect_err("the file cannot grow");
            let is_unknown = may_be_unknown && error == Errno::NOT_SUPPORTED;
            assert!(is_unknown || error == Errno::NO_SPACE, "{error:?}");
            self.assert_contents(contents);
        }
        !self.can_grow
    }

    fn contents(&mut self) -> Vec<u8> {
        assert!(self.ops.is_empty());
        self.rig.contents(&mut self.backend)
    }

    pub(crate) fn assert_contents(&mut self, expected: &[u8]) {
        let contents = self.contents();
        assert_eq!(contents.len(), expected.len(), "the file's length");
        if let Some(at) = contents.iter().zip(expected).position(|(a, b)| a != b) {
            panic!("byte {at} is {:#x}, not {:#x}", contents[at], expected[at]);
        }
    }
}

fn check_count(record: &OpRecord, count: u64) {
    let most = if record.op.kind.has_memory() { record.remaining() } else { 0 };
    assert!(count <= most, "{record:?} answered {count}");
}

/// Bytes of which no two blocks are alike.
pub(crate) fn pattern(blocks: u64, seed: u64) -> Vec<u8> {
    let word = |i: u64| (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed);
    (0..blocks * BLOCK / 8).flat_map(|i| word(i).to_le_bytes()).collect()
}

pub(crate) fn range(start: u64, blocks: u64) -> std::ops::Range<usize> {
    (start * BLOCK) as usize..((start + blocks) * BLOCK) as usize
}

pub(crate) fn seg(base: Base, start: u64, blocks: u64) -> Seg {
    Seg { base, off: (start * BLOCK) as u32, len: (blocks * BLOCK) as u32 }
}

pub(crate) fn pool(buf: u32, start: u64, blocks: u64) -> Segs {
    Segs::one(seg(Base::Pool(BufId(buf)), start, blocks))
}

pub(crate) fn read(start: u64, segs: Segs) -> Op {
    Op::read(Target::File(FILE), start * BLOCK, segs)
}

pub(crate) fn write(start: u64, segs: Segs) -> Op {
    Op::write(FILE, start * BLOCK, segs)
}

pub(crate) fn bare(kind: OpKind, start: u64, blocks: u64) -> Op {
    Op::bare(kind, FILE, start * BLOCK, blocks * BLOCK)
}

fn nothing_in_nothing_out<R: Rig>(rig: &mut R) {
    let mut bench = Bench::new(rig, &pattern(1, 0));
    bench.submit();
    assert!(bench.harvest().is_empty());
    assert!(!bench.backend.wants_retry());
}

fn a_read_fills_its_own_memory_only<R: Rig>(rig: &mut R) {
    let file = pattern(16, 1);
    let mut bench = Bench::new(rig, &file);
    for buf in 0..4 {
        bench.mem.pool_mut(BufId(buf)).fill(0xee);
    }
    bench.complete(read(3, pool(1, 2, 4))).expect("a read inside the file");
    let filled = bench.mem.pool(BufId(1));
    assert_eq!(filled[range(2, 4)], file[range(3, 4)]);
    assert!(filled[range(0, 2)].iter().chain(&filled[range(6, 10)]).all(|&b| b == 0xee));
    for buf in [0, 2, 3] {
        assert!(bench.mem.pool(BufId(buf)).iter().all(|&b| b == 0xee));
    }
    bench.assert_contents(&file);
}

fn a_read_ends_with_the_file<R: Rig>(rig: &mut R) {
    let mut file = pattern(4, 2);
    file.truncate(3 * BLOCK as usize + 512);
    let mut bench = Bench::new(rig, &file);
    bench.push(read(3, pool(0, 0, 2)));
    let (_, _, result) = bench.drain()[0];
    assert_eq!(result, Ok(512), "what there is");
    assert_eq!(bench.mem.pool(BufId(0))[..512], file[range(3, 0).start..]);
    bench.push(read(4, pool(0, 0, 1)));
    bench.push(read(100, pool(1, 0, 1)));
    for (_, _, result) in bench.drain() {
        assert_eq!(result, Ok(0), "nothing behind the end");
    }
    // Across the end, asked again as the engine does.
    bench.complete(read(2, pool(2, 0, 4))).expect("a read across the end");
    let got = bench.mem.pool(BufId(2));
    assert_eq!(got[..BLOCK as usize + 512], file[2 * BLOCK as usize..]);
    assert!(got[BLOCK as usize + 512..range(0, 4).end].iter().all(|&b| b == 0));
}

fn a_read_of_several_segments<R: Rig>(rig: &mut R) {
    let file = pattern(16, 3);
    let mut bench = Bench::new(rig, &file);
    let region = bench.mem.add_region(8 * BLOCK as usize);
    bench.mem.set_guest(ReqId(2), Mem::Owned(Buf::zeroed(8 * BLOCK as usize)));
    let mut segs = pool(0, 1, 2);
    segs.push(seg(Base::Guest(ReqId(2)), 3, 4));
    segs.push(seg(Base::Region(region), 0, 1));
    bench.complete(read(5, segs)).expect("a read inside the file");
    let guest = bench.mem.take_guest(ReqId(2)).into_buf().expect("it was lent");
    assert_eq!(bench.mem.pool(BufId(0))[range(1, 2)], file[range(5, 2)]);
    assert_eq!(guest[range(3, 4)], file[range(7, 4)]);
    assert_eq!(bench.mem.region(region)[range(0, 1)], file[range(11, 1)]);
}

fn a_write_changes_its_own_bytes_only<R: Rig>(rig: &mut R) {
    let mut file = pattern(16, 4);
    let new = pattern(3, 5);
    let mut bench = Bench::new(rig, &file);
    bench.mem.pool_mut(BufId(0))[range(1, 3)].copy_from_slice(&new);
    bench.complete(write(6, pool(0, 1, 3))).expect("a write inside the file");
    file[range(6, 3)].copy_from_slice(&new);
    bench.assert_contents(&file);
    bench.complete(read(6, pool(1, 0, 3))).expect("a read of it");
    assert_eq!(bench.mem.pool(BufId(1))[range(0, 3)], new);
}

fn a_write_extends_the_file<R: Rig>(rig: &mut R) {
    let mut file = pattern(2, 6);
    let new = pattern(2, 7);
    let mut bench = Bench::new(rig, &file);
    bench.mem.pool_mut(BufId(0))[range(0, 2)].copy_from_slice(&new);
    if bench.is_refused(write(5, pool(0, 0, 2)), &file) {
        return;
    }
    bench.complete(write(5, pool(0, 0, 2))).expect("a write past the end");
    file.resize(7 * BLOCK as usize, 0);
    file[range(5, 2)].copy_from_slice(&new);
    bench.assert_contents(&file);
}

fn a_write_of_several_segments<R: Rig>(rig: &mut R) {
    let mut file = pattern(48, 8);
    let mut bench = Bench::new(rig, &file);
    let (head, guest) = (pattern(1, 9), pattern(8, 10));
    bench.mem.pool_mut(BufId(0))[range(3, 1)].copy_from_slice(&head);
    bench.mem.set_guest(ReqId(1), Mem::Owned(Buf::copied(&guest)));
    let mut segs = pool(0, 3, 1);
    segs.push(seg(Base::Guest(ReqId(1)), 2, 5));
    // Longer than any stretch of zeros that a backend may keep.
    segs.push(Seg::zeros(20 * BLOCK as u32));
    bench.complete(write(4, segs)).expect("a write inside the file");
    file[range(4, 1)].copy_from_slice(&head);
    file[range(5, 5)].copy_from_slice(&guest[range(2, 5)]);
    file[range(10, 20)].fill(0);
    bench.assert_contents(&file);
}

fn a_write_that_is_stable_when_it_comes_back<R: Rig>(rig: &mut R) {
    let mut file = pattern(4, 11);
    let mut bench = Bench::new(rig, &file);
    let new = pattern(1, 12);
    bench.mem.pool_mut(BufId(0))[range(0, 1)].copy_from_slice(&new);
    let op = Op { kind: OpKind::Write { fua: true }, ..write(1, pool(0, 0, 1)) };
    bench.complete(op).expect("a write inside the file");
    file[range(1, 1)].copy_from_slice(&new);
    bench.assert_contents(&file);
}

fn a_partly_moved_op_goes_on_where_it_stopped<R: Rig>(rig: &mut R) {
    let mut file = pattern(8, 13);
    let mut bench = Bench::new(rig, &file);
    bench.mem.pool_mut(BufId(0)).fill(0xee);
    let mut segs = pool(0, 0, 2);
    segs.push(seg(Base::Pool(BufId(1)), 0, 2));
    bench.push_from(read(1, segs), 3 * BLOCK);
    let (_, _, result) = bench.drain()[0];
    assert_eq!(result, Ok(BLOCK));
    assert_eq!(bench.mem.pool(BufId(1))[range(1, 1)], file[range(4, 1)]);
    assert!(bench.mem.pool(BufId(0)).iter().all(|&b| b == 0xee));

    let new = pattern(2, 14);
    bench.mem.pool_mut(BufId(1))[range(0, 2)].copy_from_slice(&new);
    bench.push_from(write(4, segs), 2 * BLOCK);
    let (_, _, result) = bench.drain()[0];
    assert_eq!(result, Ok(2 * BLOCK));
    file[range(6, 2)].copy_from_slice(&new);
    bench.assert_contents(&file);
}

fn a_flush_answers_zero<R: Rig>(rig: &mut R) {
    let file = pattern(2, 15);
    let mut bench = Bench::new(rig, &file);
    for _ in 0..2 {
        bench.complete(write(1, pool(0, 0, 1))).expect("a write inside the file");
        bench.push(Op::flush(FILE));
        let (_, _, result) = bench.drain()[0];
        assert_eq!(result, Ok(0));
    }
}

fn zeroing_inside_the_file<R: Rig>(rig: &mut R) {
    for unmap in [false, true] {
        let mut file = pattern(64, 16);
        let mut bench = Bench::new(rig, &file);
        if bench.complete_if_supported(bare(OpKind::Zero { unmap }, 7, 33)) {
            file[range(7, 33)].fill(0);
        }
        bench.assert_contents(&file);
    }
}

fn zeroing_past_the_end<R: Rig>(rig: &mut R) {
    for unmap in [false, true] {
        for start in [3, 4, 9] {
            let mut file = pattern(4, 17);
            let mut bench = Bench::new(rig, &file);
            let zero = bare(OpKind::Zero { unmap }, start, 12);
            if !bench.is_refused(zero.clone(), &file) && bench.complete_if_supported(zero) {
                file.resize((start as usize + 12) * BLOCK as usize, 0);
                file[range(start, 12)].fill(0);
                bench.assert_contents(&file);
            }
        }
    }
}

fn copying_from_file_to_file<R: Rig>(rig: &mut R) {
    for (from, to, len) in [(0, 16, 8), (24, 4, 1), (0, 28, 12)] {
        let mut file = pattern(32, 22);
        let mut bench = Bench::new(rig, &file);
        let copy = OpKind::Copy { from: FILE, at: from * BLOCK };
        if !bench.can_grow && to + len > 32 {
            continue;
        }
        if bench.complete_if_supported(bare(copy, to, len)) {
            let source = file[range(from, len)].to_vec();
            file.resize(file.len().max((to + len) as usize * BLOCK as usize), 0);
            file[range(to, len)].copy_from_slice(&source);
            bench.assert_contents(&file);
        }
    }
    // What lies behind the end of a file cannot be copied.
    let file = pattern(4, 23);
    let mut bench = Bench::new(rig, &file);
    let copy = OpKind::Copy { from: FILE, at: 3 * BLOCK };
    bench.complete(bare(copy, 0, 2)).expect_err("half of it is not there");
}

fn a_discard_harms_nobody_else<R: Rig>(rig: &mut R) {
    let file = pattern(32, 18);
    let mut bench = Bench::new(rig, &file);
    bench.complete(bare(OpKind::Discard, 8, 16)).expect("a hint cannot fail");
    bench.complete(bare(OpKind::Discard, 30, 16)).expect("not even past the end");
    let contents = bench.contents();
    assert_eq!(contents.len(), file.len());
    assert_eq!(contents[range(0, 8)], file[range(0, 8)]);
    assert_eq!(contents[range(24, 6)], file[range(24, 6)]);
}

fn truncating_up_and_down<R: Rig>(rig: &mut R) {
    let mut file = pattern(8, 19);
    let mut bench = Bench::new(rig, &file);
    bench.complete(bare(OpKind::Truncate, 3, 0)).expect("down");
    if bench.is_refused(bare(OpKind::Truncate, 10, 0), &file) {
        return;
    }
    file.truncate(3 * BLOCK as usize);
    bench.assert_contents(&file);
    bench.complete(bare(OpKind::Truncate, 10, 0)).expect("up");
    file.resize(10 * BLOCK as usize, 0);
    bench.assert_contents(&file);
    bench.complete(read(2, pool(0, 0, 8))).expect("a read of what it gained");
    assert_eq!(bench.mem.pool(BufId(0))[range(0, 8)], file[range(2, 8)]);
}

fn allocating_keeps_bytes_and_grows<R: Rig>(rig: &mut R) {
    let mut file = pattern(4, 20);
    let mut bench = Bench::new(rig, &file);
    bench.complete(bare(OpKind::Allocate, 1, 2)).expect("inside");
    bench.assert_contents(&file);
    if bench.is_refused(bare(OpKind::Allocate, 2, 10), &file) {
        return;
    }
    bench.complete(bare(OpKind::Allocate, 2, 10)).expect("past the end");
    file.resize(12 * BLOCK as usize, 0);
    bench.assert_contents(&file);
}

fn no_length_is_no_error<R: Rig>(rig: &mut R) {
    let file = pattern(2, 21);
    let mut bench = Bench::new(rig, &file);
    for kind in [OpKind::Zero { unmap: true }, OpKind::Discard, OpKind::Allocate] {
        bench.complete(bare(kind, 1, 0)).expect("nothing to do");
    }
    bench.assert_contents(&file);
}

/// Every bit of the input turned round, as often as the output has room for it.
const INVERT: Compute = Compute {
    name: "invert",
    run: |input, output| {
        for (to, from) in output.iter_mut().zip(input.iter().cycle()) {
            *to = !from;
        }
        Ok(())
    },
};

const REFUSE: Compute = Compute { name: "refuse", run: |_, _| Err(Errno::INVALID) };

fn a_computation_changes_its_own_output_only<R: Rig>(rig: &mut R) {
    let mut bench = Bench::new(rig, &pattern(1, 50));
    let regions: [RegionId; 2] = std::array::from_fn(|_| bench.mem.add_region(16 * BLOCK as usize));
    let bases = [0, 1].map(|n| [Base::Pool(BufId(n)), Base::Region(regions[n as usize])]).concat();
    // Within a buffer, and from each to each, forwards and back.
    for (n, &from) in bases.iter().enumerate() {
        for &to in &bases {
            for (from_at, to_at) in [(0, 4), (9, 5)] {
                let old = pattern(16, n as u64);
                for &base in &bases {
                    bench.mem.scatter(&Segs::one(seg(base, 0, 16)), 0, &old);
                }
                let op = Op::compute(INVERT, seg(from, from_at, 4), seg(to, to_at, 4));
                let id = bench.push(op);
                let (back, _, result) = bench.drain()[0];
                assert_eq!((back, result), (id, Ok(0)));
                for &base in &bases {
                    let mut new = vec![0; old.len()];
                    bench.mem.gather(&Segs::one(seg(base, 0, 16)), 0, &mut new);
                    let mut expected = old.clone();
                    if base == to {
                        let inverted = old[range(from_at, 4)].iter().map(|byte| !byte);
                        expected.splice(range(to_at, 4), inverted);
                    }
                    assert!(new == expected, "{base:?} after {from:?} into {to:?}");
                }
            }
        }
    }
}

fn a_computation_that_fails_says_why<R: Rig>(rig: &mut R) {
    let file = pattern(2, 51);
    let mut bench = Bench::new(rig, &file);
    let (from, to) = (seg(Base::Pool(BufId(0)), 0, 1), seg(Base::Pool(BufId(0)), 1, 1));
    let good = bench.push(Op::compute(INVERT, from, to));
    bench.push(Op::compute(REFUSE, seg(Base::Pool(BufId(1)), 0, 1), seg(to.base, 2, 1)));
    for (op, _, result) in bench.drain() {
        assert_eq!(result, if op == good { Ok(0) } else { Err(Errno::INVALID) });
    }
    bench.assert_contents(&file);
}

fn computations_among_reads_and_writes<R: Rig>(rig: &mut R) {
    const OPS: u64 = 300;
    let old = pattern(OPS, 52);
    let mut bench = Bench::new(rig, &old);
    let region = bench.mem.add_region(3 * old.len());
    let at = |start| seg(Base::Region(region), start, 1);
    // Each block is read; then inverted while others are still being read; then written.
    let mut ended = 0;
    for block in 0..OPS {
        bench.push(read(block, Segs::one(at(3 * block))));
    }
    while ended < OPS {
        for (_, record, result) in bench.drain_some() {
            let done = record.op.segs.as_slice()[0].off / BLOCK as u32;
            let block = u64::from(done / 3);
            match record.op.kind {
                OpKind::Compute(_) => {
                    assert_eq!(result, Ok(0));
                    bench.push(write(block, Segs::one(at(3 * block + 1))));
                }
                kind => {
                    assert_eq!(result, Ok(BLOCK), "{record:?}");
                    if kind == OpKind::Read {
                        bench.push(Op::compute(INVERT, at(3 * block), at(3 * block + 1)));
                    } else {
                        ended += 1;
                    }
                }
            }
        }
    }
    let inverted: Vec<u8> = old.iter().map(|byte| !byte).collect();
    bench.assert_contents(&inverted);
}

fn more_ops_than_fit<R: Rig>(rig: &mut R) {
    const OPS: u64 = 700;
    let old = pattern(OPS, 22);
    let new = pattern(OPS, 23);
    let mut bench = Bench::new(rig, &old);
    let region = bench.mem.add_region(2 * old.len());
    bench.mem.region_mut(region)[..new.len()].copy_from_slice(&new);
    let at = |start| Segs::one(seg(Base::Region(region), start, 1));

    for block in 0..OPS {
        bench.push(write(block, at(block)));
    }
    drain_in_full(&mut bench, OPS);
    bench.assert_contents(&new);
    for block in 0..OPS {
        bench.push(read(block, at(OPS + block)));
    }
    drain_in_full(&mut bench, OPS);
    assert!(bench.mem.region(region)[new.len()..] == new, "each read got its own block");
}

/// Drains `count` ops of one block each, all of which must move it whole.
fn drain_in_full<R: Rig>(bench: &mut Bench<'_, R>, count: u64) {
    let back = bench.drain();
    assert_eq!(back.len() as u64, count);
    for (op, _, result) in back {
        assert_eq!(result, Ok(BLOCK), "{op:?}");
    }
}

fn ops_of_all_kinds_at_once<R: Rig>(rig: &mut R) {
    let mut file = pattern(64, 24);
    let mut bench = Bench::new(rig, &file);
    let region: RegionId = bench.mem.add_region(file.len());
    let at = |start, blocks| Segs::one(seg(Base::Region(region), start, blocks));
    // Four stretches, each worked on by one op at a time, with everything else in between.
    for round in 0..8u64 {
        let new = pattern(8, 25 + round);
        bench.mem.region_mut(region)[range(0, 8)].copy_from_slice(&new);
        let fua = round % 2 == 1;
        bench.push(Op { kind: OpKind::Write { fua }, ..write(round, at(0, 8)) });
        bench.push(Op::flush(FILE));
        bench.push(read(40, at(40, 8)));
        bench.push(bare(OpKind::Discard, 56, 1));
        bench.push(Op::flush(FILE));
        bench.push(bare(OpKind::Zero { unmap: round % 2 == 0 }, 20 + round, 1));
        bench.push(read(50, at(50, 2)));
        for (_, record, result) in bench.drain() {
            match (record.op.kind, result) {
                (OpKind::Zero { .. }, Err(Errno::NOT_SUPPORTED)) => {}
                (OpKind::Zero { .. }, Ok(0)) => file[range(20 + round, 1)].fill(0),
                (kind, result) => {
                    let whole = if kind.has_memory() { record.op.len } else { 0 };
                    assert_eq!(result, Ok(whole), "{record:?}");
                }
            }
        }
        file[range(round, 8)].copy_from_slice(&new);
        let got = bench.mem.region(region);
        assert!(got[range(40, 8)] == file[range(40, 8)] && got[range(50, 2)] == file[range(50, 2)]);
    }
    let contents = bench.contents();
    assert!(contents[range(0, 56)] == file[range(0, 56)]);
    assert!(contents[range(57, 7)] == file[range(57, 7)]);
}

fn errors_come_back_as_completions<R: Rig>(rig: &mut R) {
    let file = pattern(8, 40);
    let mut bench = Bench::new(rig, &file);
    let nowhere = FileId(3);
    let mut bad = Vec::new();
    for block in 0..4 {
        let op = read(block, pool(0, block, 1));
        bad.push(bench.push(Op { target: Target::File(nowhere), ..op }));
        bench.push(read(block, pool(1, block, 1)));
        bad.push(bench.push(Op::flush(nowhere)));
    }
    for (op, record, result) in bench.drain() {
        if bad.contains(&op) {
            assert!(result.is_err(), "{record:?} answered {result:?}");
        } else {
            assert_eq!(result, Ok(BLOCK));
        }
    }
    assert_eq!(bench.mem.pool(BufId(1))[range(0, 4)], file[range(0, 4)]);
}

fn the_descriptor_tells_when_to_harvest<R: Rig>(rig: &mut R) {
    let mut bench = Bench::new(rig, &pattern(8, 41));
    let Some(fd) = bench.backend.event_fd().map(|fd| fd.as_raw_fd()) else { return };
    for round in 0..20 {
        assert!(!wait_readable(fd, 0), "round {round}: nothing in flight, yet readable");
        let ops = 1 + round % 4;
        for block in 0..ops {
            bench.push(match round % 4 {
                0 => read(block, pool(0, block, 1)),
                1 => write(block, pool(0, block, 1)),
                2 => Op::compute(
                    INVERT,
                    seg(Base::Pool(BufId(0)), block, 1),
                    seg(Base::Pool(BufId(1)), block, 1),
                ),
                _ => Op::flush(FILE),
            });
        }
        while !bench.queue.is_empty() {
            bench.submit(); // a few ops always fit, at the latest when asked again
        }
        let mut back = 0;
        while back < ops {
            // One that wants to be asked again does not say so by its descriptor.
            let is_readable = !bench.backend.wants_retry() && wait_for(&bench.backend);
            assert!(!is_readable || wait_readable(fd, 0), "looking does not harvest");
            back += bench.harvest().len() as u64;
        }
        // A signal may come after what it tells of was seen: harvesting once more settles it.
        let mut turns = 0;
        while wait_readable(fd, 1) {
            assert!(bench.harvest().is_empty());
            turns += 1;
            assert!(turns < 10, "round {round}: all harvested, and still readable");
        }
    }
}

/// A loop that asks when it is told to, and waits otherwise, has everything back.
fn nothing_is_asked_for_without_a_reason<R: Rig>(rig: &mut R) {
    const OPS: u64 = 24;
    let file = pattern(OPS, 60);
    let mut bench = Bench::new(rig, &file);
    let region = bench.mem.add_region(file.len());
    for block in 0..OPS {
        bench.push(read(block, Segs::one(seg(Base::Region(region), block, 1))));
    }
    let mut back = 0;
    while back < OPS {
        if !bench.queue.is_empty() {
            bench.submit();
        }
        let ended = bench.harvest().len() as u64;
        back += ended;
        // (What has ended has made room for those that were left.)
        if ended == 0 && !bench.backend.wants_retry() {
            bench.rig.wait(&mut bench.backend);
        }
    }
    assert!(bench.mem.region(region) == file);
    // Nothing is in flight: a moment that it names is its own affair, and asking does no harm.
    let due = bench.backend.next_deadline();
    assert!(due.is_none() || bench.harvest().is_empty());
}
