//! A guest's request, done piece by piece.
//!
//! A step looks up what is at the first byte that is not done yet, and does it in place where that
//! can be; then what is behind it. So one step issues the ops of as many pieces as it can, joined: a
//! fragmented request costs one round trip, not one per fragment. Where something is missing it
//! waits for what it has issued, looks again, and then has the format provide what is missing.
//!
//! ```text
//! begin, Next, Pieces ─> find ─┬─ in place: and the next one, as long as there is room ─> Pieces
//!                              ├─ else provided: [Piece …] ─> find, or parked ─> Next
//!                              └─ the end of the range: [Flush] ─> done
//! ```

use std::fmt::Debug;

use cowbell_engine::mutant;
use cowbell_engine::step::{Cx, Driver, Event, IoKind, Step};
use cowbell_engine::units::Errno;

use crate::parts::growth::Lack;
use crate::parts::writeback::{Changes, Writeback, WritebackState};

/// What a request awaits. `at` is the first byte of its range that is not done yet; `S` is what a
/// piece awaits that something is missing for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RequestState<S> {
    /// Whatever it was parked on: look up what is at `at`.
    Next { at: u64 },
    /// The ops of pieces, up to `at`.
    Pieces { at: u64 },
    /// What a piece lacks.
    Piece(S),
    /// A writeback that began after the request came, or a flush.
    Flush(WritebackState),
}

impl<S> RequestState<S> {
    /// Where its name is in the list of the driver's states, whose first is "lookup".
    #[inline]
    pub fn label(&self, pieces: u8, flush: u8, piece: impl Fn(&S) -> usize) -> usize {
        match self {
            RequestState::Next { .. } => 0,
            RequestState::Pieces { .. } => pieces.into(),
            RequestState::Piece(state) => piece(state),
            RequestState::Flush(_) => flush.into(),
        }
    }
}

/// How far a piece has got.
#[derive(Debug)]
pub(crate) enum Progress<S> {
    /// Done, up to here.
    To(u64),
    /// Its op is on its way, up to here.
    Issued(u64),
    /// It waits, in this state.
    Wait(S),
    /// The request is parked, and looks up again what is here.
    LookAgain(u64),
    /// It could not be done.
    Failed(Errno),
}

impl<S> Progress<S> {
    /// Done up to `to`; is an op on its way?
    pub fn done(to: u64, is_issued: bool) -> Progress<S> {
        if is_issued { Progress::Issued(to) } else { Progress::To(to) }
    }

    /// What was missing at `at` has been tried: go on there. If it failed, the request fails at once:
    /// who looked again first would ask for it again, and two requests that take turns would never
    /// give up.
    pub fn tried(at: u64, failure: Option<Errno>) -> Progress<S> {
        failure.map_or(Progress::To(at), Progress::Failed)
    }

    /// Space is lacking: the state of who waits for attempt number so-and-so to get some.
    pub fn lacks(lack: Lack, space: impl FnOnce(u32) -> S) -> Progress<S> {
        match lack {
            Lack::Parked(attempt) => Progress::Wait(space(attempt)),
            Lack::Never(errno) => Progress::Failed(errno),
        }
    }

    /// The same, of a state that holds this one.
    #[inline]
    pub fn map<T>(self, wrap: impl FnOnce(S) -> T) -> Progress<T> {
        match self {
            Progress::To(to) => Progress::To(to),
            Progress::Issued(to) => Progress::Issued(to),
            Progress::Wait(state) => Progress::Wait(wrap(state)),
            Progress::LookAgain(at) => Progress::LookAgain(at),
            Progress::Failed(errno) => Progress::Failed(errno),
        }
    }
}

/// An image whose requests are done so, and whose tables are written late.
pub(crate) trait Pieces {
    /// What a piece awaits that something is missing for.
    type State: Debug;
    /// What is at a byte of the disk.
    type Found: Copy;

    /// The label of data ops that are all that is left to do.
    const PIECES: u8;

    /// What is at `at`, and up to where at most `end`, as far as memory says.
    fn find(&mut self, at: u64, end: u64, cx: &mut Cx<'_>) -> Self::Found;

    /// Does what the request wants where that is. `None`: something is missing at `at`.
    fn in_place(
        &mut self,
        at: u64,
        found: Self::Found,
        cx: &mut Cx<'_>,
    ) -> Option<Progress<Self::State>>;

    /// Begins to provide what is missing at `at`. No op of the request is in flight.
    fn provide(&mut self, at: u64, found: Self::Found, cx: &mut Cx<'_>) -> Progress<Self::State>;

    /// Goes on with that.
    fn run_piece(
        &mut self,
        state: Self::State,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Progress<Self::State>;

    /// Who writes changed tables, and what there is to write.
    fn changes(&mut self) -> (&mut Writeback, impl Changes);

    #[inline]
    fn begin_request(&mut self, cx: &mut Cx<'_>) -> Step<RequestState<<Self as Pieces>::State>>
    where
        Self: Driver,
    {
        let io = cx.io();
        match io.kind {
            IoKind::Flush => self.flush(cx),
            IoKind::Read | IoKind::Status { .. } => self.walk(io.offset, false, cx),
            _ if !self.is_writable() => Step::Done(Err(Errno::READ_ONLY)),
            IoKind::Truncate => Step::Done(Err(Errno::NOT_SUPPORTED)),
            _ => self.walk(io.offset, false, cx),
        }
    }

    #[inline]
    fn step_request(
        &mut self,
        state: RequestState<Self::State>,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<RequestState<Self::State>> {
        match (state, event) {
            (RequestState::Piece(state), event) => {
                let progress = self.run_piece(state, event, cx);
                self.go_on(progress, cx)
            }
            (RequestState::Next { at }, Event::Woken) => self.walk(at, true, cx),
            (RequestState::Pieces { at }, Event::Io(Ok(()))) => self.walk(at, false, cx),
            (RequestState::Pieces { .. }, Event::Io(error)) => Step::Done(error),
            (RequestState::Flush(state), event) => {
                self.write_back(state, event, cx).map(RequestState::Flush)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    /// Goes on as a piece has got on.
    fn go_on(
        &mut self,
        progress: Progress<Self::State>,
        cx: &mut Cx<'_>,
    ) -> Step<RequestState<Self::State>> {
        match progress {
            Progress::To(at) => self.walk(at, false, cx),
            Progress::Issued(at) => Step::Wait(RequestState::Pieces { at }),
            Progress::Wait(state) => Step::Wait(RequestState::Piece(state)),
            Progress::LookAgain(at) => Step::Wait(RequestState::Next { at }),
            Progress::Failed(errno) => Step::Done(Err(errno)),
        }
    }

    /// Goes on at `at`; was the request woken there?
    fn walk(
        &mut self,
        mut at: u64,
        woken: bool,
        cx: &mut Cx<'_>,
    ) -> Step<RequestState<Self::State>> {
        let (io, mut issued) = (cx.io(), false);
        while at < io.end() {
            if issued && cx.room() == 0 {
                return Step::Wait(RequestState::Pieces { at });
            }
            let found = self.find(at, io.end(), cx);
            let trusts =
                mutant!("woken_trusts_old_lookup") || mutant!("vmdk_woken_trusts_old_lookup");
            let done = match trusts && woken && !issued && io.kind != IoKind::Read {
                true => None,
                false => self.in_place(at, found, cx),
            };
            match done {
                Some(Progress::To(to)) => at = to,
                Some(Progress::Issued(to)) => (at, issued) = (to, true),
                // First what is under way; then this, looked up again.
                _ if issued => return Step::Wait(RequestState::Pieces { at }),
                Some(progress) => return self.go_on(progress, cx),
                None => {
                    let progress = self.provide(at, found, cx);
                    return self.go_on(progress, cx);
                }
            }
        }
        match io.kind {
            IoKind::Write { fua: true, .. } | IoKind::Zero { fua: true, .. } if issued => {
                Step::Wait(RequestState::Pieces { at })
            }
            IoKind::Write { fua: true, .. } | IoKind::Zero { fua: true, .. } => self.flush(cx),
            _ if issued => Step::Last { label: Self::PIECES },
            _ => Step::Done(Ok(())),
        }
    }

    /// A flush, and the end of a write that is to be stable.
    fn flush(&mut self, cx: &mut Cx<'_>) -> Step<RequestState<Self::State>> {
        let (writeback, mut changes) = self.changes();
        writeback.flush(&mut changes, cx).map(RequestState::Flush)
    }

    /// A step of a writeback, or of who waits for one.
    fn write_back(
        &mut self,
        state: WritebackState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<WritebackState> {
        let (writeback, mut changes) = self.changes();
        writeback.step(state, event, &mut changes, cx)
    }
}

/// May a request be passed on to where all its bytes are? A stable write may not: it is flushed,
/// tables and all.
#[inline(always)]
pub(crate) fn may_pass(kind: IoKind, is_writable: bool) -> bool {
    match kind {
        IoKind::Read => true,
        IoKind::Write { fua, compressed } => is_writable && !(fua || compressed),
        _ => false,
    }
}
