//! The end of a stream: directory, footer and end mark. A file is a stream only with its end.
//!
//! ```text
//! There ─> Asked ─> Going (zeros, flushed) ─> Gone          a chore, for the first write
//!   ^                  └─ failed ─> Doubtful ─> Asked …
//!   └── Length <─ Footer <─ Flush <─ Directory <─┘          closing
//! ```
//!
//! What is written into a stream goes where its end was. So first the footer is overwritten with zeros,
//! and that is made stable: no crash leaves an old footer over new contents. When the image is closed
//! the footer is written after all else is stable: no crash leaves a new footer over old contents.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, OpKind, Seg, Segs};
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::{Errno, RegionId};
use cowbell_engine::wait::{On, WaitList};

use crate::parts::attempts::Attempts;
use crate::vmdk::disk::layout::{Header, SECTOR, SECTOR_BITS, end_of_stream};
use crate::vmdk::run::extents::Extents;
use crate::vmdk::run::tables::Tables;

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct End {
    state: EndState,
    /// Where it is put together.
    memory: RegionId,
    attempts: Attempts,
    waiters: WaitList,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum EndState {
    /// The file has it.
    There,
    /// The chore is to begin.
    Asked,
    /// It is being taken away.
    Going,
    /// Nobody knows.
    Doubtful,
    /// There is none, after any crash.
    Gone,
}

/// The chore that takes the end away: what it awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TakingEnd {
    /// The footer, overwritten.
    Zeros,
    /// That, stable.
    Flush,
}

/// What closing awaits of the end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum WritingEnd {
    /// The directory, and the footer's marker.
    Directory,
    /// That and all that is in front of it, stable.
    Flush,
    /// The footer and the end mark.
    Footer,
    /// The file's length: that of the stream.
    Length,
}

/// Bytes of footer and end mark.
const FOOTER_BYTES: u64 = 2 * SECTOR;

impl End {
    /// Of a stream that was opened; `memory` has room for its end.
    pub fn new(memory: RegionId) -> End {
        let (attempts, waiters) = (Attempts::default(), WaitList::new());
        End { state: EndState::There, memory, attempts, waiters }
    }

    /// May something be written where it was?
    pub fn is_gone(&self) -> bool {
        self.state == EndState::Gone || mutant!("vmdk_stream_end_stays")
    }

    /// Parks the request until the end is gone. Answers the attempt's number.
    pub fn park(&mut self, cx: &mut Cx<'_>) -> u32 {
        if matches!(self.state, EndState::There | EndState::Doubtful) {
            self.state = EndState::Asked;
            self.attempts.begin();
            cx.ask();
        }
        cx.park(&mut self.waiters, On::Header);
        self.attempts.latest()
    }

    /// Why attempt number `attempt` to take it away failed; `None` if it did not.
    pub fn failure_of(&self, attempt: u32) -> Option<Errno> {
        self.attempts.failure_of(attempt)
    }

    /// The chore, if it was asked for.
    pub fn begin_asked(&mut self) -> Option<TakingEnd> {
        let begins = self.state == EndState::Asked;
        if begins {
            self.state = EndState::Going;
        }
        begins.then_some(TakingEnd::Zeros)
    }

    /// A step of the chore.
    pub fn take(
        &mut self,
        state: TakingEnd,
        event: Event,
        extents: &Extents,
        cx: &mut Cx<'_>,
    ) -> Step<TakingEnd> {
        let file = extents.get(0).file;
        let result = match (state, event) {
            (TakingEnd::Zeros, Event::Start) => {
                let at = footer_at(&extents.grains(0).header, extents.grains(0).space.end());
                cx.issue(Op::write(file, at, Segs::one(Seg::zeros(SECTOR as u32))));
                return Step::Wait(TakingEnd::Zeros);
            }
            (TakingEnd::Zeros, Event::Io(Ok(()))) if !mutant!("vmdk_stream_end_not_flushed") => {
                cx.issue(Op::flush(file));
                return Step::Wait(TakingEnd::Flush);
            }
            (_, Event::Io(result)) => result,
            (state, event) => panic!("{event:?} in {state:?}"),
        };
        self.state = if result.is_ok() { EndState::Gone } else { EndState::Doubtful };
        if let Err(errno) = result {
            self.attempts.failed(errno);
        }
        cx.wake_all(&mut self.waiters);
        Step::Done(result)
    }

    /// Closing: writes the end if the file has none, or may have none. `None`: it has.
    pub fn begin_writing(
        &mut self,
        extents: &Extents,
        tables: &Tables,
        cx: &mut Cx<'_>,
    ) -> Option<WritingEnd> {
        let is_there = self.state == EndState::There && !mutant!("vmdk_stream_end_stays");
        if is_there || !extents.grains(0).has_footer {
            return None;
        }
        let (header, at) = (&extents.grains(0).header, extents.grains(0).space.end());
        let bytes = end_of_stream(header, at >> SECTOR_BITS, tables.directory(0));
        cx.mem().region_mut(self.memory)[..bytes.len()].copy_from_slice(&bytes);
        self.write(0, bytes.len() as u64 - FOOTER_BYTES, extents, cx);
        Some(WritingEnd::Directory)
    }

    /// The next step of that, when one has gone well; `None`: it is done.
    pub fn go_on_writing(
        &mut self,
        state: WritingEnd,
        extents: &mut Extents,
        cx: &mut Cx<'_>,
    ) -> Option<WritingEnd> {
        let (file, end) = (extents.get(0).file, extents.grains(0).space.end());
        let len = extents.grains(0).header.end_of_stream_bytes() as u64;
        match state {
            WritingEnd::Directory if !mutant!("vmdk_stream_footer_too_early") => {
                cx.issue(Op::flush(file));
                Some(WritingEnd::Flush)
            }
            WritingEnd::Directory | WritingEnd::Flush => {
                self.state = EndState::Doubtful;
                self.write(len - FOOTER_BYTES, FOOTER_BYTES, extents, cx);
                Some(WritingEnd::Footer)
            }
            WritingEnd::Footer => {
                // Also if it fails: what may be gone is not handed out.
                extents.space(0).cut();
                cx.issue(Op::bare(OpKind::Truncate, file, end + len, 0));
                Some(WritingEnd::Length)
            }
            WritingEnd::Length => {
                self.state = EndState::There;
                None
            }
        }
    }

    /// Writes `len` bytes of the end, from byte `off` of it on.
    fn write(&self, off: u64, len: u64, extents: &Extents, cx: &mut Cx<'_>) {
        let seg = Seg { base: Base::Region(self.memory), off: off as u32, len: len as u32 };
        let at = extents.grains(0).space.end() + off;
        cx.issue(Op::write(extents.get(0).file, at, Segs::one(seg)));
    }

    /// Panics if it is being taken away. For tests, at rest.
    pub fn assert_idle(&self) {
        let is_idle = !matches!(self.state, EndState::Asked | EndState::Going);
        assert!(is_idle && self.waiters.is_empty(), "{self:?}");
    }
}

/// Where the footer is of a stream whose grains and tables end at byte `grains_end`.
fn footer_at(header: &Header, grains_end: u64) -> u64 {
    grains_end + header.end_of_stream_bytes() as u64 - FOOTER_BYTES
}
