//! What becomes of an image whose metadata is found to say something impossible, while it runs.
//!
//! | found | the request | others | on disk |
//! |---|---|---|---|
//! | an L1 or L2 entry that cannot be | fails | go on | nothing |
//! | an entry that leads a write to metadata | fails, nothing is written | go on | the corrupt mark |
//! | refcounts that contradict the tables or themselves | fails, if it needs a new cluster | go on, without new clusters | the corrupt mark |
//!
//! Nothing of this can hurt what a request does that needs none of it: its own entries are sound. New
//! clusters are another matter: which of them are free, only the refcounts say. A reader of an image
//! writes no mark. The embedder is told each time, and a drain says that the image is not sound.

use cowbell_engine::step::{Cx, Step};
use cowbell_engine::units::{Errno, GuestOffset};

use crate::qcow2::disk::header::{Header, INCOMPAT_CORRUPT};
use crate::qcow2::disk::layout::L1Entry;
use crate::qcow2::run::{Qcow2, State};

/// What was found so far.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct Corrupt {
    /// Refcounts: no cluster is handed out, and none counted.
    counts: bool,
    /// The corrupt mark was written, or is to be.
    marked: bool,
    /// It is to be.
    pub wants_mark: bool,
}

impl Corrupt {
    /// Can the refcounts not be relied on?
    pub fn are_counts(self) -> bool {
        self.counts
    }
}

impl Qcow2 {
    /// The L1 or L2 entry that maps the guest's byte `at` cannot be.
    pub(super) fn invalid_entry(&mut self, at: u64, cx: &mut Cx<'_>) -> Step<State> {
        let index = self.geometry.l1_index(GuestOffset(at));
        let word = self.l1.get(index as usize).copied().unwrap_or(0);
        let (what, place) = match L1Entry::decode(word, self.geometry) {
            Ok(Some(_)) => {
                let inside = (self.slice_index(at) as u64) << self.geometry.entry_bits();
                ("L2 entry is invalid", self.slice_offset(at) + inside)
            }
            _ => ("L1 entry is invalid", self.header.l1_offset() + index * 8),
        };
        cx.tell_corrupt(what, place);
        Step::Done(Err(Errno::IO))
    }

    /// An entry leads a write to `host`, where metadata is.
    pub(super) fn hit_metadata(&mut self, host: u64, cx: &mut Cx<'_>) -> Step<State> {
        self.mark_corrupt("L2 entry leads a write to metadata", host, cx);
        Step::Done(Err(Errno::IO))
    }

    /// The refcounts cannot be right: `what`, at byte `at` of the file.
    pub(super) fn counts_are_wrong(&mut self, what: &'static str, at: u64, cx: &mut Cx<'_>) {
        self.corrupt.counts = true;
        self.mark_corrupt(what, at, cx);
    }

    /// Chore: says on disk that the image is corrupt.
    pub(super) fn write_corrupt_mark(&mut self, cx: &mut Cx<'_>) -> Step<State> {
        if self.geometry.version() < 3 {
            return Step::Done(Ok(()));
        }
        let mark = |header: &mut Header| header.set_incompatible(INCOMPAT_CORRUPT, true);
        self.change_header(State::MarkCorrupt, mark, cx)
    }

    pub(super) fn corrupt_marked(
        &mut self,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        self.header_changed(result, cx);
        Step::Done(result)
    }

    fn mark_corrupt(&mut self, what: &'static str, at: u64, cx: &mut Cx<'_>) {
        cx.tell_corrupt(what, at);
        if self.writable && !std::mem::replace(&mut self.corrupt.marked, true) {
            self.corrupt.wants_mark = true;
            cx.ask();
        }
    }
}
