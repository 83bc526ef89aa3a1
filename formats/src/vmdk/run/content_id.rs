//! The content id: it says that this image is not what it was when somebody else last looked.
//!
//! ```text
//! Old ─> Asked ─> Writing ─> Written ─> Stable
//!  ^────────────────┘ failed
//! ```
//!
//! A chore writes the new one, once a session, when a request comes that changes something. Nothing
//! that a reader of the file could see changes before: what is written in place, or to disk at once,
//! waits for that write before it is issued; what is allocated waits before its entries are published.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::{Errno, FileId, RegionId};
use cowbell_engine::wait::{On, WaitList};

use crate::parts::attempts::Attempts;

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct ContentId {
    file: FileId,
    /// Where the block with the new id in it is to be, and where it is put together.
    at: u64,
    block: Block,
    memory: RegionId,
    state: IdState,
    /// It was written when the copies were sealed that are being written back.
    sealed: bool,
    attempts: Attempts,
    waiters: WaitList,
}

/// What never changes, and so needs no hash.
#[derive(Clone, Debug)]
struct Block(Arc<[u8]>);

impl Hash for Block {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum IdState {
    /// Nothing has been written since the image was opened; or nobody knows, the write failed.
    Old,
    /// The chore is to begin.
    Asked,
    /// The new one is on its way.
    Writing,
    /// It is written.
    Written,
    /// It is stable.
    Stable,
}

/// The chore: it awaits the new id, written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct WritingId;

impl ContentId {
    /// Of an image whose `file` is to have `block` at byte `at`; `memory` has room for it.
    pub fn new(file: FileId, at: u64, block: Vec<u8>, memory: RegionId) -> ContentId {
        ContentId {
            file,
            at,
            block: Block(block.into()),
            memory,
            state: IdState::Old,
            sealed: false,
            attempts: Attempts::default(),
            waiters: WaitList::new(),
        }
    }

    /// Is the new one written?
    #[inline]
    pub fn is_written(&self) -> bool {
        matches!(self.state, IdState::Written | IdState::Stable)
            || mutant!("vmdk_cid_never_changes")
    }

    /// Is it written, but perhaps not stable?
    pub fn needs_fence(&self) -> bool {
        self.state == IdState::Written
    }

    /// Something is about to change: has the new one written, unless it is.
    #[inline]
    pub fn want(&mut self, cx: &mut Cx<'_>) {
        if self.state == IdState::Old && !self.is_written() {
            self.state = IdState::Asked;
            self.attempts.begin();
            cx.ask();
        }
    }

    /// As [`ContentId::want`], and parks the request until it is written, which it is not yet.
    /// Answers the attempt's number.
    pub fn park(&mut self, cx: &mut Cx<'_>) -> u32 {
        self.want(cx);
        cx.park(&mut self.waiters, On::ContentId);
        self.attempts.latest()
    }

    /// Why attempt number `attempt` to write it failed; `None` if it did not.
    pub fn failure_of(&self, attempt: u32) -> Option<Errno> {
        self.attempts.failure_of(attempt)
    }

    /// The chore, if it was asked for.
    pub fn begin_asked(&mut self) -> Option<WritingId> {
        let begins = self.state == IdState::Asked;
        if begins {
            self.state = IdState::Writing;
        }
        begins.then_some(WritingId)
    }

    /// A step of the chore.
    pub fn run(&mut self, state: WritingId, event: Event, cx: &mut Cx<'_>) -> Step<WritingId> {
        match event {
            Event::Start => {
                let Block(block) = &self.block;
                cx.mem().region_mut(self.memory)[..block.len()].copy_from_slice(block);
                let len = block.len() as u32;
                let seg = Seg { base: Base::Region(self.memory), off: 0, len };
                cx.issue(Op::write(self.file, self.at, Segs::one(seg)));
                Step::Wait(state)
            }
            Event::Io(result) => {
                let result = if mutant!("vmdk_cid_error_ignored") { Ok(()) } else { result };
                self.state = if result.is_ok() { IdState::Written } else { IdState::Old };
                if let Err(errno) = result {
                    self.attempts.failed(errno);
                }
                if !mutant!("vmdk_cid_wakes_nobody") {
                    cx.wake_all(&mut self.waiters);
                }
                Step::Done(result)
            }
            Event::Woken => panic!("{event:?} in {state:?}"),
        }
    }

    /// A writeback seals: what it flushes covers the id if that is written now.
    pub fn seal(&mut self) {
        self.sealed = self.state == IdState::Written;
    }

    /// What was done when it was sealed is stable.
    pub fn sealed_is_stable(&mut self) {
        if std::mem::take(&mut self.sealed) {
            self.state = IdState::Stable;
        }
    }

    /// Panics if it is being written. For tests, at rest.
    pub fn assert_idle(&self) {
        let is_idle = !matches!(self.state, IdState::Asked | IdState::Writing);
        assert!(is_idle && self.waiters.is_empty(), "{self:?}");
    }
}
