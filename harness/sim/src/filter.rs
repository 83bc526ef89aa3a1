//! A layer of the simulator's own over whatever is tested: it adds nothing, and passes all that comes
//! on to the node below it. Longer reads and writes it takes apart, into as many pieces as there is
//! room for at once.

use cowbell_engine::mem::Memory;
use cowbell_engine::op::{Op, OpKind, Segs, Target};
use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Pass, Step};
use cowbell_engine::units::{Errno, FileId, NodeId, Time};

/// A driver, or a filter over one.
#[derive(Clone, Hash, Debug)]
pub enum Over<D> {
    /// What is tested.
    Below(D),
    /// What is over it.
    Filter(Filter),
}

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Filter {
    below: NodeId,
    size: u64,
}

/// The state of a request to either.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State<S> {
    /// Of what is tested.
    Below(S),
    /// The pieces before this byte of the request.
    Pieces(u64),
    /// Zeros that are to be stable.
    Zeros,
    /// A flush.
    Flush,
}

/// Bytes in a piece.
const PIECE: u64 = 1024;

impl<D> From<D> for Over<D> {
    fn from(driver: D) -> Over<D> {
        Over::Below(driver)
    }
}

impl Filter {
    /// Over this node, which has so many bytes.
    pub fn new(below: NodeId, size: u64) -> Filter {
        Filter { below, size }
    }

    fn op(self, kind: OpKind, offset: u64, len: u64) -> Op {
        Op { kind, target: Target::Node(self.below), offset, len, segs: Segs::none() }
    }

    fn begin<S>(self, cx: &mut Cx<'_>) -> Step<State<S>> {
        let Io { kind, offset, len } = cx.io();
        let (kind, waits) = match kind {
            IoKind::Read | IoKind::Write { .. } => return self.pieces(0, cx),
            IoKind::Status { .. } => {
                cx.ask_status_of(self.below, len);
                return Step::Last { label: 0 };
            }
            IoKind::Truncate => return Step::Done(Err(Errno::NOT_SUPPORTED)),
            IoKind::Flush => (OpKind::Flush, None),
            IoKind::Discard => (OpKind::Discard, None),
            IoKind::Zero { unmap, fua } => (OpKind::Zero { unmap }, fua.then_some(State::Zeros)),
        };
        cx.issue(self.op(kind, offset, len));
        waits.map_or(Step::Last { label: 0 }, Step::Wait)
    }

    /// Pieces from byte `from` of the request on, as many as there is room for.
    fn pieces<S>(self, from: u64, cx: &mut Cx<'_>) -> Step<State<S>> {
        let Io { kind, offset, len } = cx.io();
        let kind = match kind {
            IoKind::Write { fua, .. } => OpKind::Write { fua },
            _ => OpKind::Read,
        };
        let mut at = from;
        while at < len && cx.room() > 0 {
            // The first ends where others begin and end.
            let end = ((offset + at) / PIECE + 1) * PIECE - offset;
            let piece = end.min(len) - at;
            let segs = Segs::one(cx.guest(at, piece));
            cx.issue(Op { segs, ..self.op(kind, offset + at, piece) });
            at += piece;
        }
        if at == len { Step::Last { label: 0 } } else { Step::Wait(State::Pieces(at)) }
    }

    fn flush<S>(self, cx: &mut Cx<'_>) -> Step<State<S>> {
        cx.issue(self.op(OpKind::Flush, 0, 0));
        Step::Last { label: 0 }
    }
}

impl<D: Driver> Driver for Over<D> {
    type State = State<D::State>;

    const STATES: &'static [&'static str] = D::STATES;

    fn label(state: &State<D::State>) -> usize {
        match state {
            State::Below(state) => D::label(state),
            State::Pieces(_) | State::Zeros | State::Flush => 0,
        }
    }

    fn size(&self) -> u64 {
        match self {
            Over::Below(driver) => driver.size(),
            Over::Filter(filter) => filter.size,
        }
    }

    fn pass_on(&mut self, io: &Io, mem: &Memory) -> Option<Pass> {
        match self {
            Over::Below(driver) => driver.pass_on(io, mem),
            Over::Filter(_) => None,
        }
    }

    fn file_of_disk(&self, written: bool) -> Option<FileId> {
        match self {
            Over::Below(driver) => driver.file_of_disk(written),
            Over::Filter(_) => None,
        }
    }

    fn uses(&self, file: FileId) -> bool {
        match self {
            Over::Below(driver) => driver.uses(file),
            Over::Filter(_) => false,
        }
    }

    fn below(&self) -> &[NodeId] {
        match self {
            Over::Below(driver) => driver.below(),
            Over::Filter(filter) => std::slice::from_ref(&filter.below),
        }
    }

    fn begin(&mut self, cx: &mut Cx<'_>) -> Step<State<D::State>> {
        match self {
            Over::Below(driver) => driver.begin(cx).map(State::Below),
            Over::Filter(filter) => filter.begin(cx),
        }
    }

    fn chore(&mut self, chore: Chore) -> Option<State<D::State>> {
        match self {
            Over::Below(driver) => driver.chore(chore).map(State::Below),
            // What it has passed on is stable when it has settled.
            Over::Filter(_) => (chore == Chore::Settle).then_some(State::Flush),
        }
    }

    fn deadline(&self) -> Option<Time> {
        match self {
            Over::Below(driver) => driver.deadline(),
            Over::Filter(_) => None,
        }
    }

    fn step(
        &mut self,
        state: State<D::State>,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<State<D::State>> {
        match (self, state, event) {
            (Over::Below(driver), State::Below(state), event) => {
                driver.step(state, event, cx).map(State::Below)
            }
            (Over::Filter(_), _, Event::Io(Err(errno))) => Step::Done(Err(errno)),
            (Over::Filter(filter), State::Pieces(at), _) => filter.pieces(at, cx),
            (Over::Filter(filter), State::Zeros | State::Flush, _) => filter.flush(cx),
            (_, state, _) => panic!("{state:?} is of a request to the other"),
        }
    }
}
