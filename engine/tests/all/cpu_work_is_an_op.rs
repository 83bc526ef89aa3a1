//! What takes a processor long is an op like any other: joined with others, never in a step.

use cowbell_engine::backend::Backend;
use cowbell_engine::mem::Buf;
use cowbell_engine::op::{Base, Compute, Op, Seg, Segs, Target};
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, Step};
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::disk::{Create, DiskFile, DiskOptions};
use cowbell_engine::sys::inline::Inline;
use cowbell_engine::sys::pool::{Pool, PoolOptions};
use cowbell_engine::units::{BufId, Errno, FileId, NodeId, RegionId, ReqId, Time};
use cowbell_engine::{Engine, Finished, Limits};

const BLOCK: u32 = 4096;
const BLOCKS: u64 = 64;

/// Adds up the bytes of a block, and tells whether a thread of a pool did; [`BAD`] ones are no
/// sum's, [`UNSOUND`] ones are a defect.
const SUM: Compute = Compute {
    name: "sum",
    run: |input, output| {
        match input[0] {
            BAD => return Err(Errno::INVALID),
            UNSOUND => panic!("planted"),
            _ => {}
        }
        let sum: u64 = input.iter().map(|&byte| u64::from(byte)).sum();
        output[..8].copy_from_slice(&sum.to_le_bytes());
        output[8] = u8::from(std::thread::current().name() == Some("cowbell-pool"));
        Ok(())
    },
};
const BAD: u8 = 0xbb;
const UNSOUND: u8 = 0xdd;

/// Reads a block; then its sum is made while the next block is read into the guest's memory; then
/// the sum takes its beginning.
struct Sums {
    file: FileId,
    region: RegionId,
}

#[derive(Clone, Copy, Hash, Debug)]
enum State {
    Read { buf: BufId },
    Sum { buf: BufId },
}

fn block(base: Base) -> Seg {
    Seg { base, off: 0, len: BLOCK }
}

impl Sums {
    fn sum(&self, buf: BufId) -> Seg {
        Seg { base: Base::Region(self.region), off: 16 * buf.0, len: 16 }
    }
}

impl Driver for Sums {
    type State = State;
    const STATES: &'static [&'static str] = &["read", "sum"];
    fn label(state: &State) -> usize {
        matches!(state, State::Sum { .. }).into()
    }
    fn size(&self) -> u64 {
        BLOCKS * u64::from(BLOCK)
    }
    fn uses(&self, file: FileId) -> bool {
        file == self.file
    }
    fn deadline(&self) -> Option<Time> {
        None
    }
    fn chore(&mut self, _: Chore) -> Option<State> {
        None
    }
    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        let [buf] = cx.take_bufs().expect("there is one for each request");
        let segs = Segs::one(block(Base::Pool(buf)));
        cx.issue(Op::read(Target::File(self.file), cx.io().offset, segs));
        Step::Wait(State::Read { buf })
    }
    fn step(&mut self, state: State, event: Event, cx: &mut Cx<'_>) -> Step<State> {
        match (state, event) {
            (State::Read { buf }, Event::Io(Ok(()))) => {
                cx.issue(Op::compute(SUM, block(Base::Pool(buf)), self.sum(buf)));
                let io = cx.io();
                cx.read_guest(self.file, io.end(), 0, io.len);
                Step::Wait(State::Sum { buf })
            }
            (State::Sum { buf }, Event::Io(result)) => {
                let sum = cx.mem().region(self.region)[16 * buf.index()..][..16].to_vec();
                let guest = Segs::one(cx.guest(0, 16));
                cx.mem().scatter(&guest, 0, &sum);
                cx.give_buf(buf);
                Step::Done(result)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }
}

/// Each block is of one byte, its number's, but those that are `odd`.
fn run(backend: impl Backend<File = DiskFile>, odd: &[(usize, u8)]) -> Vec<Finished> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a scratch directory");
    let path = dir.path().join("file");
    let byte = |at: usize| odd.iter().find(|odd| odd.0 == at).map_or(at as u8, |odd| odd.1);
    let bytes: Vec<u8> = (0..=BLOCKS as usize).flat_map(|at| [byte(at); BLOCK as usize]).collect();
    std::fs::write(&path, bytes).expect("a scratch file");
    let options = DiskOptions { direct: true, create: Create::No, ..DiskOptions::default() };
    let file = DiskFile::open(&path, &options).expect("it opens");

    // Two are kept for another disk that may come.
    let (requests, buffers) = (BLOCKS as usize, BLOCKS as usize + 2);
    let limits = Limits { requests, buffers, ..Limits::default() };
    let mut engine = Engine::new(backend, limits);
    let region = engine.region(16 * limits.buffers);
    let (file, _) = engine.attach(file).expect("it attaches");
    let node = engine.add(Sums { file, region });
    for at in 0..BLOCKS {
        let io = Io::read(at * u64::from(BLOCK), u64::from(BLOCK));
        engine.submit(node, io, Buf::zeroed(BLOCK as usize), at).expect("room");
    }
    let mut finished = Vec::new();
    while finished.len() < BLOCKS as usize {
        engine.run(clock());
        finished.extend(std::iter::from_fn(|| engine.poll()));
    }
    engine.assert_idle();
    finished
}

fn check(backend: impl Backend<File = DiskFile>, on_a_thread: bool) {
    let finished = run(backend, &[(9, BAD)]);
    for Finished { tag, result, mem } in finished {
        if tag == 9 {
            assert_eq!(result, Err(Errno::INVALID));
            continue;
        }
        assert_eq!(result, Ok(()));
        let mem = mem.into_buf().expect("it was lent");
        assert_eq!(mem[..8], (tag * u64::from(BLOCK)).to_le_bytes());
        assert_eq!(mem[8], u8::from(on_a_thread), "where it was done");
        let next = if tag == 8 { BAD } else { tag as u8 + 1 };
        assert!(mem[16..].iter().all(|&byte| byte == next), "what was read meanwhile");
    }
}

fn aio() -> Aio {
    Aio::new(AioOptions::default()).expect("native AIO")
}

#[test]
fn is_done_by_every_backend_and_by_those_for_loops_on_threads() {
    check(Inline::new(), false);
    check(Pool::new(PoolOptions::default()).expect("a thread"), true);
    check(aio(), true);
}

#[test]
#[should_panic(expected = "an op panicked on its thread")]
fn a_panic_in_it_is_one_of_the_loop() {
    run(aio(), &[(3, UNSOUND)]);
}

#[test]
#[should_panic(expected = "sum from")]
fn does_not_write_what_it_reads() {
    let pool = |off| Seg { base: Base::Pool(BufId(0)), off, len: 512 };
    Op::compute(SUM, pool(0), pool(511));
}

#[test]
#[should_panic(expected = "sum from")]
fn looks_at_nothing_that_a_guest_may_change() {
    let pool = Seg { base: Base::Pool(BufId(0)), off: 0, len: 512 };
    Op::compute(SUM, Seg { base: Base::Guest(ReqId(0)), ..pool }, pool);
}

#[test]
fn neighbours_do_not_overlap_and_names_are_what_it_is() {
    let region = |off| Seg { base: Base::Region(RegionId(1)), off, len: 512 };
    let other = Compute { name: "other", ..SUM };
    let op = |work| Op::compute(work, region(512), region(0));
    assert_eq!(op(SUM), op(Compute { run: |_, _| Ok(()), ..SUM }));
    assert_ne!(op(SUM), op(other));
    assert_eq!(format!("{:?} {:?}", op(SUM).kind, NodeId::default()), "Compute(sum) n0");
}
