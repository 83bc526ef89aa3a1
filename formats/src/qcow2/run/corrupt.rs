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

use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::{Errno, GuestOffset};

use crate::qcow2::disk::header::{Header, INCOMPAT_CORRUPT};
use crate::qcow2::run::image::Image;
use crate::qcow2::run::live_header::LiveHeader;
use crate::qcow2::run::tables::Tables;

/// What the chore awaits that says on disk that the image is corrupt.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MarkState {
    /// The header's turn, or the header with the mark, written.
    Header,
}

/// Whether the corrupt mark is to be written, and was.
#[derive(Clone, Copy, Hash, Debug)]
pub(super) struct Corrupt {
    image: Image,
    /// It was written, or is to be.
    marked: bool,
    /// It is to be.
    asked: bool,
}

impl Corrupt {
    pub fn new(image: Image) -> Corrupt {
        Corrupt { image, marked: false, asked: false }
    }

    /// An L1 or L2 entry that maps the guest's byte `at` cannot be.
    pub fn invalid_entry(
        &self,
        at: u64,
        tables: &Tables,
        header: &LiveHeader,
        cx: &mut Cx<'_>,
    ) -> Errno {
        let geometry = self.image.geometry;
        let (what, place) = match tables.l1_entry(at) {
            Ok(Some(_)) => {
                let inside = (self.image.slice_index(at) as u64) << geometry.entry_bits();
                ("L2 entry is invalid", tables.slice_offset(at) + inside)
            }
            _ => {
                let index = geometry.l1_index(GuestOffset(at));
                ("L1 entry is invalid", header.l1_offset() + index * 8)
            }
        };
        cx.tell_corrupt(what, place);
        Errno::IO
    }

    /// An entry leads a write to `host`, where metadata is.
    pub fn hit_metadata(&mut self, host: u64, cx: &mut Cx<'_>) -> Errno {
        self.mark("L2 entry leads a write to metadata", host, cx);
        Errno::IO
    }

    /// The image is corrupt: `what`, at byte `at` of the file.
    pub fn mark(&mut self, what: &'static str, at: u64, cx: &mut Cx<'_>) {
        cx.tell_corrupt(what, at);
        if self.image.writable && !std::mem::replace(&mut self.marked, true) {
            self.asked = true;
            cx.ask();
        }
    }

    /// Is the mark to be written, and to be begun with now?
    pub fn begin_asked(&mut self) -> bool {
        std::mem::take(&mut self.asked)
    }

    pub fn step(
        &self,
        state: MarkState,
        event: Event,
        header: &mut LiveHeader,
        cx: &mut Cx<'_>,
    ) -> Step<MarkState> {
        match (state, event) {
            (MarkState::Header, Event::Start | Event::Woken) => {
                if self.image.geometry.version() < 3 {
                    return Step::Done(Ok(()));
                }
                let mark = |header: &mut Header| header.set_incompatible(INCOMPAT_CORRUPT, true);
                header.change(mark, cx);
                Step::Wait(MarkState::Header)
            }
            (MarkState::Header, Event::Io(result)) => {
                header.changed(result, cx);
                Step::Done(result)
            }
        }
    }
}
