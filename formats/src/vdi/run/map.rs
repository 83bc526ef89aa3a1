//! The block map of a running image, in memory whole, and the blocks that it may name next.
//!
//! Entries are published in memory; a writeback brings the units of the map that have changed to disk, after
//! what they rely on: blocks that may have held anything hold what they are to, and the file is as
//! long, and its header counts as many blocks, as the entries need.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, OpKind, Seg, Segs};
use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::{Errno, FileId, RegionId};

use crate::parts::changed::Changed;
use crate::parts::growth::{Grow, Growing, Growth, Lack, Space};
use crate::parts::writeback::{Changes, Phase, Writeback, WritebackState};
use crate::vdi::disk::layout::HEADER_BYTES;
use crate::vdi::rest::open::Opened;

/// The label of a flush that is all that is left to do.
pub(super) const FLUSH: u8 = 4;

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Map {
    files: [FileId; 1],
    image: Opened,
    /// The map as it was sealed, unit by unit, and behind it the header as it is written.
    copies: RegionId,
    /// Units that have changed.
    changed: Changed,
    /// Does a changed entry, or a sealed one, name a block whose contents must be stable first?
    owes: bool,
    sealed_owes: bool,
    /// The file's end, counted from the first block on.
    pub space: Space,
    /// As many blocks the header on disk counts; `None`: nobody knows, its write failed.
    counted: Option<u32>,
}

/// What the chore awaits that leaves the image clean.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CloseState {
    /// Nothing stands in the way.
    Turn,
    /// The map, written and stable.
    Writeback(WritebackState),
    /// The spare end, cut off; the exact count, written.
    Ends,
}

/// New blocks, in a row.
#[derive(Clone, Copy, Hash, Debug)]
pub(super) struct New {
    pub first: u32,
    pub count: u64,
    /// What is there is unknown, as in a hole or on a device: it is one block, to be written whole.
    pub unknown: bool,
}

/// Bytes of memory for the copies of an image's map and header.
pub(super) fn copies_bytes(image: &Opened) -> usize {
    image.map.len() * 4 + HEADER_BYTES
}

impl Map {
    pub fn new(file: FileId, image: Opened, copies: RegionId, mut growth: Growth) -> Map {
        if growth.by == Grow::Write {
            growth.by = Grow::Truncate;
        }
        let header = &image.header;
        let bytes = |blocks: u32| u64::from(blocks) << header.block_bits;
        // An entry of more than that no program takes.
        let max = bytes(header.blocks.min(match image.fixed_len {
            Some(len) => header.blocks_in(len),
            None => header.blocks,
        }));
        let space = Space::new(bytes(image.file_blocks), header.block_size(), max, growth);
        let units = image.map.len() * 4 / header.map_unit();
        Map {
            files: [file],
            copies,
            changed: Changed::new(units),
            owes: false,
            sealed_owes: false,
            space,
            counted: Some(header.allocated),
            image,
        }
    }

    #[inline]
    pub fn file(&self) -> FileId {
        self.files[0]
    }

    /// The image: its header, and the map as everybody sees it.
    #[inline]
    pub fn image(&self) -> &Opened {
        &self.image
    }

    /// The entry for byte `at` cannot be.
    pub fn tell_corrupt(&self, at: u64, cx: &mut Cx<'_>) {
        let index = at >> self.image.header.block_bits;
        cx.tell_corrupt("block map entry is invalid", self.image.entry_offset(index));
    }

    /// Does it lie on a block device? Nothing there is known to be zeros, nor cut off.
    fn is_device(&self) -> bool {
        self.image.fixed_len.is_some()
    }

    /// Takes at most `count` new blocks; the request is parked if there are none yet.
    pub fn take(&mut self, count: u64, cx: &mut Cx<'_>) -> Result<New, Lack> {
        let hole = match mutant!("vdi_hole_used_twice") {
            true => self.image.holes.last().copied(),
            false => self.image.holes.pop(),
        };
        if let Some(first) = hole {
            return Ok(New { first, count: 1, unknown: true });
        }
        let bits = self.image.header.block_bits;
        let unknown = self.is_device() && !mutant!("vdi_device_is_zeros");
        let mut count = if unknown { 1 } else { count };
        let mut taken = self.space.take_or_park(count << bits, false, cx);
        if matches!(taken, Err(Lack::Never(_))) && count > 1 {
            count = 1;
            taken = self.space.take_or_park(1 << bits, false, cx);
        }
        taken.map(|offset| New { first: (offset >> bits) as u32, count, unknown })
    }

    /// The blocks could not be written, and may hold anything.
    pub fn leave(&mut self, new: New) {
        self.image.holes.extend((new.first..new.first + new.count as u32).rev());
    }

    /// The blocks hold what they are to: entry `index` and those behind it name them.
    pub fn publish(&mut self, index: u64, new: New) {
        let index = index as usize;
        let entries = &mut self.image.map[index..][..new.count as usize];
        entries.iter_mut().zip(new.first..).for_each(|(entry, block)| *entry = block);
        self.owes |= new.unknown;
        let per_unit = self.per_unit();
        for unit in index / per_unit..=(index + new.count as usize - 1) / per_unit {
            self.changed.note(unit);
        }
    }

    /// Entries in a unit of the map.
    fn per_unit(&self) -> usize {
        self.image.header.map_unit() / 4
    }

    /// A step of the growing chore.
    pub fn grow(&mut self, state: Growing, event: Event, cx: &mut Cx<'_>) -> Step<Growing> {
        // What a device has behind the image's end is there already.
        let place = (!self.is_device()).then_some((self.file(), self.image.header.data_offset));
        self.space.grow(state, event, place, cx)
    }

    fn blocks(&self, bytes: u64) -> u32 {
        (bytes >> self.image.header.block_bits) as u32
    }

    /// Does the header count too few blocks?
    fn counts_too_few(&self) -> bool {
        let end = self.blocks(self.space.end());
        self.counted.is_none_or(|counted| counted < end) && !mutant!("vdi_count_not_written")
    }

    /// Writes the header with a count of so many blocks.
    fn write_count(&mut self, blocks: u32, cx: &mut Cx<'_>) {
        self.counted = mutant!("vdi_failed_count_is_counted").then_some(blocks);
        self.image.header.allocated = blocks;
        let at = self.image.map.len() * 4;
        let bytes = self.image.header.encode();
        cx.mem().region_mut(self.copies)[at..at + HEADER_BYTES].copy_from_slice(&bytes);
        let len = HEADER_BYTES as u32;
        let seg = Seg { base: Base::Region(self.copies), off: at as u32, len };
        cx.issue(Op::write(self.file(), 0, Segs::one(seg)));
    }

    /// A step of the chore that leaves the image as one that was closed: the map written, no spare end,
    /// an exact count, all stable.
    pub fn close(
        mut self: &mut Self,
        writeback: &mut Writeback,
        state: CloseState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<CloseState> {
        let step = match (state, event) {
            (CloseState::Turn, Event::Start | Event::Woken) => {
                if self.space.park_while_growing(cx) {
                    return Step::Wait(CloseState::Turn);
                }
                writeback.settle(&mut self, cx)
            }
            (CloseState::Writeback(state), event) => writeback.step(state, event, &mut self, cx),
            (CloseState::Ends, Event::Io(result)) => {
                self.made_exact(result);
                if result.is_err() {
                    return Step::Done(result);
                }
                cx.issue(Op::flush(self.file()));
                return Step::Last { label: FLUSH };
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        };
        match step {
            Step::Done(Ok(())) if self.make_exact(cx) => Step::Wait(CloseState::Ends),
            step => step.map(CloseState::Writeback),
        }
    }

    /// Cuts off the spare end, and writes the exact count. False: there is none, and it is exact.
    fn make_exact(&mut self, cx: &mut Cx<'_>) -> bool {
        let (spare, end) = (self.space.has_spare_end(), self.space.end());
        let blocks = self.blocks(end);
        if !spare && self.counted == Some(blocks) {
            return false;
        }
        // In either order: no entry names a block in the spare end.
        self.write_count(if mutant!("vdi_count_not_exact") { u32::MAX } else { blocks }, cx);
        if spare && !self.is_device() {
            let len = self.image.header.data_offset + end;
            cx.issue(Op::bare(OpKind::Truncate, self.file(), len, 0));
        }
        true
    }

    /// That is done, or may be.
    fn made_exact(&mut self, result: Result<(), Errno>) {
        // Also when it failed: it may have happened, and what may be gone is not handed out.
        if result.is_ok() || !mutant!("vdi_spare_end_kept") {
            self.space.cut();
        }
        if result.is_ok() {
            self.counted = Some(self.image.header.allocated);
        }
    }

    /// Panics if something is changed, sealed or waited for. For tests, at rest.
    pub fn assert_idle(&self) {
        assert!(self.changed.sealed().is_empty(), "the map is being written");
        self.space.assert_idle();
    }

    /// Copies a unit as it is now.
    fn copy(&self, unit: u32, cx: &mut Cx<'_>) {
        let per_unit = self.per_unit();
        let first = unit as usize * per_unit;
        let bytes = &mut cx.mem().region_mut(self.copies)[first * 4..][..per_unit * 4];
        let entries = &self.image.map[first..];
        bytes.as_chunks_mut().0.iter_mut().zip(entries).for_each(|(to, e)| *to = e.to_le_bytes());
    }
}

impl Changes for &mut Map {
    const FLUSH: u8 = FLUSH;

    fn files(&self) -> &[FileId] {
        &self.files
    }

    fn is_empty(&self) -> bool {
        self.changed.is_empty()
    }

    fn needs_fence(&self) -> bool {
        self.owes && !mutant!("vdi_hole_not_fenced") || !self.space.is_stable()
    }

    fn seal(&mut self, cx: &mut Cx<'_>) {
        self.changed.seal();
        self.sealed_owes = std::mem::take(&mut self.owes);
        self.space.seal();
        self.changed.sealed().iter().for_each(|&unit| self.copy(unit, cx));
    }

    fn stable(&mut self) {
        self.sealed_owes = false;
        self.space.sealed_is_stable();
    }

    fn write(&mut self, phase: Phase, next: u32, cx: &mut Cx<'_>) -> Option<u32> {
        match phase {
            Phase::Ahead if next > 0 => self.counted = Some(self.image.header.allocated),
            Phase::Ahead if self.changed.sealed().is_empty() || !self.counts_too_few() => {}
            Phase::Ahead => {
                // Ahead of need, but no block that may not be there.
                let (goal, _) = self.space.goal();
                self.write_count(self.blocks(goal.min(self.space.ready())), cx);
                return Some(1);
            }
            Phase::Primary => {
                let unit_bytes = self.image.header.map_unit();
                let left = &self.changed.sealed()[next as usize..];
                let count = left.len().min(cx.room().max(1));
                for &unit in &left[..count] {
                    if mutant!("vdi_seal_ignored") {
                        self.copy(unit, cx);
                    }
                    let at = unit as usize * unit_bytes;
                    let base = Base::Region(self.copies);
                    let seg = Seg { base, off: at as u32, len: unit_bytes as u32 };
                    let offset = self.image.header.map_offset + at as u64;
                    cx.issue(Op::write(self.file(), offset, Segs::one(seg)));
                }
                return (count > 0).then_some(next + count as u32);
            }
            Phase::Redundant => {}
        }
        None
    }

    fn unseal(&mut self, written: bool, _: &mut Cx<'_>) {
        if !written {
            self.owes |= std::mem::take(&mut self.sealed_owes);
            // A count whose fence failed may be lost, though its write went well.
            self.counted = None;
        }
        self.changed.unseal(written || mutant!("vdi_failed_write_forgotten"), |_| {});
    }
}
