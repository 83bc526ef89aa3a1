//! The tables that map the guest's disk, in memory: the L1 table, and slices of L2 tables.

use cowbell_engine::mutant;
use cowbell_engine::step::Cx;
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{GuestOffset, HostOffset, align_down};
use cowbell_engine::wait::WaitList;

use crate::qcow2::disk::layout::{Invalid, L1Entry};
use crate::qcow2::run::image::Image;

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Tables {
    image: Image,
    /// As on disk, but for the byte order.
    l1: Vec<u64>,
    /// It is moving, to where it can be longer: no entry of it changes.
    l1_moves: bool,
    /// Who waits to change one.
    pub l1_waiters: WaitList,
    /// A slice is in memory only where the L1 table names an L2 table.
    pub slices: TableCache,
}

impl Tables {
    pub fn new(l1: Vec<u64>, slices: usize, image: Image) -> Tables {
        let unit = 1 << image.geometry.slice_bits();
        let slices = TableCache::new(image.regions.tables, unit, slices);
        Tables { image, l1, l1_moves: false, l1_waiters: WaitList::new(), slices }
    }

    #[inline]
    pub fn image(&self) -> &Image {
        &self.image
    }

    pub fn l1_len(&self) -> u64 {
        self.l1.len() as u64
    }

    pub fn l1_moves(&self) -> bool {
        self.l1_moves
    }

    /// The L1 table begins to move.
    pub fn move_l1(&mut self) {
        self.l1_moves = true;
    }

    /// It moves no more.
    pub fn l1_at_rest(&mut self, cx: &mut Cx<'_>) {
        self.l1_moves = false;
        cx.wake_all(&mut self.l1_waiters);
    }

    /// The L1 table has as many entries from now on, not fewer than before.
    pub fn grow_l1(&mut self, entries: usize) {
        self.l1.resize(entries, 0);
    }

    /// What the L1 table says of the guest's byte `at`.
    pub fn l1_entry(&self, at: u64) -> Result<Option<L1Entry>, Invalid> {
        let index = self.image.geometry.l1_index(GuestOffset(at));
        let word = self.l1.get(index as usize).copied().unwrap_or(0);
        L1Entry::decode(word, self.image.geometry)
    }

    pub fn set_l1_entry(&mut self, index: u32, entry: L1Entry) {
        self.l1[index as usize] = entry.encode();
    }

    /// Copies the L1 table's entries from `first` on, as they are on disk; behind its end are zeros.
    pub fn copy_l1(&self, first: usize, bytes: &mut [u8]) {
        for (i, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = self.l1.get(first + i).copied().unwrap_or(0).to_be_bytes();
        }
    }

    /// Is there an L2 table for `at` that nobody shares?
    pub fn owns_table(&self, at: u64) -> bool {
        let entry = self.l1_entry(at).ok().flatten();
        entry.is_some_and(|entry| entry.copied) || mutant!("qcow2_shared_table_changed")
    }

    /// The host offset of the L2 table that maps `at`, which has one.
    fn table_of(&self, at: u64) -> HostOffset {
        let entry = self.l1_entry(at).ok().flatten();
        entry.expect("its slice was loaded through this entry").table
    }

    /// Where the slice that maps `at` is in the file.
    pub fn slice_offset(&self, at: u64) -> u64 {
        let geometry = self.image.geometry;
        let inside = geometry.l2_index(GuestOffset(at)) << geometry.entry_bits();
        self.table_of(at).0 + align_down(inside, 1 << geometry.slice_bits())
    }

    /// Panics if somebody waits or loads, or a slice has not as many pins as `pins` says.
    pub fn assert_idle(&self, pins: impl Fn(usize) -> u32) {
        assert!(!self.l1_moves && self.l1_waiters.is_empty(), "the L1 table is moving");
        self.slices.assert_idle(pins);
    }

    /// Ends one pin of a slice, and wakes who needs its slot.
    pub fn unpin(&mut self, slot: usize, cx: &mut Cx<'_>) {
        self.slices.unpin(slot);
        if !self.slices.full.is_empty() {
            cx.wake_all(&mut self.slices.full);
        }
    }
}
