//! A guest's resize: QED only grows, and only the header tells.
//!
//! ```text
//! Turn ─> [LoadL1 …] ─> WriteSize ─> done
//! ```

use cowbell_engine::op::Segs;
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::Errno;

use crate::qed::run::image::{Disk, Image, SLICE_BYTES};
use crate::qed::run::live_header::LiveHeader;
use crate::qed::run::tables::Tables;

/// What a resize awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ResizeState {
    /// The header's turn.
    Turn,
    /// Another block of the L1 table.
    LoadL1,
    /// The header with the new size, stable.
    WriteSize,
}

/// A step of a resize, and what it works with.
pub(super) struct ResizeStep<'a> {
    pub image: &'a Image,
    pub disk: &'a mut Disk,
    pub tables: &'a mut Tables,
    pub header: &'a mut LiveHeader,
}

impl ResizeStep<'_> {
    pub fn run(&mut self, state: ResizeState, event: Event, cx: &mut Cx<'_>) -> Step<ResizeState> {
        match (state, event) {
            (ResizeState::Turn, Event::Woken) => self.begin(cx),
            (ResizeState::LoadL1, Event::Io(Ok(()))) => self.l1_loaded(cx),
            (ResizeState::WriteSize, Event::Io(Ok(()))) => self.size_written(cx),
            (ResizeState::LoadL1 | ResizeState::WriteSize, Event::Io(error)) => {
                self.header.end_turn(cx);
                Step::Done(error)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    pub fn begin(&mut self, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let (size, now) = (cx.io().offset, self.disk.size());
        if self.image.geometry.check_image_size(size).is_err() {
            return Step::Done(Err(Errno::INVALID));
        }
        // A longer backing file would shine through where the guest is to see zeros.
        let uncovers = size > now && self.disk.backing().is_some_and(|b| b.size > now);
        if size < now || uncovers {
            return Step::Done(Err(Errno::NOT_SUPPORTED));
        }
        if !self.header.take_turn(cx) {
            return Step::Wait(ResizeState::Turn);
        }
        self.load_l1_or_write_size(cx)
    }

    /// The L1 entries that the new size needs are read first: they need not be zeros. Whole blocks,
    /// as at open: they are written whole.
    fn load_l1_or_write_size(&mut self, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let size = cx.io().offset;
        let have = self.tables.l1_len();
        if have < self.image.geometry.l1_entries(size) {
            let at = self.image.l1_offset.0 + have * 8;
            cx.issue(self.image.read_op(at, Segs::one(self.image.regions.header())));
            return Step::Wait(ResizeState::LoadL1);
        }
        self.header.write_size(size, cx);
        Step::Wait(ResizeState::WriteSize)
    }

    fn l1_loaded(&mut self, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let off = self.image.regions.header().off as usize;
        let block = &cx.memory().region(self.image.regions.copies())[off..off + SLICE_BYTES];
        self.tables.extend_l1(block);
        self.load_l1_or_write_size(cx)
    }

    fn size_written(&mut self, cx: &mut Cx<'_>) -> Step<ResizeState> {
        let size = cx.io().offset;
        self.disk.set_size(size);
        self.header.size_written(size);
        self.tables.grow_disk(self.image.slices_of(size));
        self.header.end_turn(cx);
        Step::Done(Ok(()))
    }
}
