//! A cache of table slices: fixed memory, named by what it maps, never moved while somebody waits.
//!
//! A slice is a fixed number of bytes of a mapping table, so that an image with huge tables costs
//! no more memory than any other. The cache is set-associative: a key has a handful of slots it
//! may live in, and the one not used for longest (CLOCK) gives way. A slot being loaded and a
//! pinned slot stay where they are; who finds all slots of his set so waits on [`TableCache::full`].
//!
//! The cache does no I/O. The first request that misses reserves a slot and loads it; others park
//! on the slot's list and look again when it is there (or could not be loaded).

use crate::mem::Memory;
use crate::op::{Base, Seg};
use crate::step::Cx;
use crate::units::{BufId, RegionId};
use crate::wait::WaitList;

/// What a slot holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SlotState {
    /// Nothing.
    Empty,
    /// A slice on its way from disk.
    Loading,
    /// A slice.
    Ready,
}

/// A place for one slice.
#[derive(Clone, Hash, Debug)]
pub struct TableSlot {
    /// What it holds.
    pub state: SlotState,
    /// Who waits for it to be loaded.
    pub waiters: WaitList,
    pins: u32,
    used: bool,
    /// The disk may say something else.
    doubtful: bool,
}

/// The cache. See the module.
#[derive(Clone, Hash, Debug)]
pub struct TableCache {
    region: RegionId,
    unit: usize,
    ways: usize,
    keys: Vec<u64>,
    slots: Vec<TableSlot>,
    hands: Vec<usize>,
    /// Requests that found no slot; wake them when a slot becomes [`SlotState::Ready`] or is
    /// unpinned.
    pub full: WaitList,
}

/// The key of an empty slot.
const NO_KEY: u64 = u64::MAX;

/// Slots that one key may live in.
const WAYS: usize = 8;

impl TableCache {
    /// A cache of `slices` slices (rounded up to whole sets) of `unit` bytes each; `region` has
    /// at least [`TableCache::bytes_for`] bytes.
    pub fn new(region: RegionId, unit: usize, slices: usize) -> TableCache {
        let (sets, ways) = shape(slices);
        let slot = TableSlot {
            state: SlotState::Empty,
            waiters: WaitList::new(),
            pins: 0,
            used: false,
            doubtful: false,
        };
        TableCache {
            region,
            unit,
            ways,
            keys: vec![NO_KEY; sets * ways],
            slots: vec![slot; sets * ways],
            hands: vec![0; sets],
            full: WaitList::new(),
        }
    }

    /// Bytes that a cache of `slices` slices of `unit` bytes needs.
    pub fn bytes_for(unit: usize, slices: usize) -> usize {
        let (sets, ways) = shape(slices);
        sets * ways * unit
    }

    /// Slots in all.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// No slots?
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The slot of `key`, loaded or being loaded.
    #[inline]
    pub fn find(&mut self, key: u64) -> Option<usize> {
        let first = self.first_of(key);
        let i = self.keys[first..first + self.ways].iter().position(|&k| k == key)?;
        self.slots[first + i].used = true;
        Some(first + i)
    }

    /// Makes room for `key`, which is not there, and marks it as being loaded. `None`: every slot
    /// it could have is pinned or being loaded.
    pub fn reserve(&mut self, key: u64) -> Option<usize> {
        debug_assert!(key != NO_KEY && self.find(key).is_none());
        let first = self.first_of(key);
        let hand = &mut self.hands[first / self.ways];
        // Twice around: the first round takes away the second chances.
        for _ in 0..2 * self.ways {
            let i = first + *hand;
            *hand = (*hand + 1) % self.ways;
            let slot = &mut self.slots[i];
            if slot.state == SlotState::Loading || slot.pins > 0 {
                continue;
            }
            if slot.state == SlotState::Ready && std::mem::take(&mut slot.used) {
                continue;
            }
            slot.state = SlotState::Loading;
            slot.used = true;
            self.keys[i] = key;
            return Some(i);
        }
        None
    }

    /// The slice of `key` is known to be zeros, as that of a new table is: it need not be loaded.
    /// Answers its slot; `None`: there is none to be had now, or the slice has one.
    pub fn put_zeros(&mut self, key: u64, cx: &mut Cx<'_>) -> Option<usize> {
        if self.find(key).is_some() {
            return None;
        }
        let slot = self.reserve(key)?;
        self.bytes_mut(slot, cx.mem()).fill(0);
        self.load_ended(slot, true, cx);
        Some(slot)
    }

    /// A slot.
    #[inline]
    pub fn slot(&self, slot: usize) -> &TableSlot {
        &self.slots[slot]
    }

    /// The list of those who wait for a slot to be loaded.
    pub fn waiters(&mut self, slot: usize) -> &mut WaitList {
        &mut self.slots[slot].waiters
    }

    /// What was being loaded is there, or could not be. Wakes who waits for it, or for any slot.
    pub fn load_ended(&mut self, slot: usize, is_there: bool, cx: &mut Cx<'_>) {
        if is_there {
            self.loaded(slot)
        } else {
            self.forget(slot)
        }
        cx.wake_all(&mut self.slots[slot].waiters);
        cx.wake_all(&mut self.full);
    }

    fn loaded(&mut self, slot: usize) {
        debug_assert_eq!(self.slots[slot].state, SlotState::Loading);
        self.slots[slot].state = SlotState::Ready;
    }

    /// Forgets what is in a slot, which nobody has pinned or waits for.
    pub fn forget(&mut self, slot: usize) {
        self.slots[slot].state = SlotState::Empty;
        self.keys[slot] = NO_KEY;
    }

    /// Keeps the slice where it is until it is unpinned as often.
    pub fn pin(&mut self, slot: usize) {
        debug_assert_eq!(self.slots[slot].state, SlotState::Ready);
        self.slots[slot].pins += 1;
    }

    /// Ends one pin. When none is left, wake [`TableCache::full`], and the slot's waiters.
    pub fn unpin(&mut self, slot: usize) {
        assert!(self.slots[slot].pins > 0, "unpinned more often than pinned");
        self.slots[slot].pins -= 1;
        if self.slots[slot].pins == 0 && self.slots[slot].doubtful {
            self.slots[slot].doubtful = false;
            self.forget(slot);
        }
    }

    /// A write of a pinned slice has failed, and may have happened nevertheless: what is in memory
    /// is not to be relied on. Forgets it as soon as it is not pinned; whoever wants it meanwhile
    /// parks on the slot's list.
    pub fn doubt(&mut self, slot: usize) {
        assert!(self.slots[slot].pins > 0, "only what is being changed is written");
        self.slots[slot].doubtful = true;
    }

    /// Is a slot's slice there, and as it is on disk?
    #[inline]
    pub fn is_ready(&self, slot: usize) -> bool {
        self.slots[slot].state == SlotState::Ready && !self.slots[slot].doubtful
    }

    /// `len` bytes at `off` of a slot, for an op.
    pub fn seg(&self, slot: usize, off: usize, len: usize) -> Seg {
        debug_assert!(off + len <= self.unit);
        let off = slot * self.unit + off;
        Seg { base: Base::Region(self.region), off: off as u32, len: len as u32 }
    }

    /// A slot's bytes from `off` on.
    #[inline(always)]
    pub fn bytes_from<'m>(&self, slot: usize, off: usize, mem: &'m Memory) -> &'m [u8] {
        &mem.region(self.region)[slot * self.unit + off..(slot + 1) * self.unit]
    }

    /// A slot's bytes.
    #[inline]
    pub fn bytes<'m>(&self, slot: usize, mem: &'m Memory) -> &'m [u8] {
        &mem.region(self.region)[slot * self.unit..(slot + 1) * self.unit]
    }

    /// A slot's bytes.
    pub fn bytes_mut<'m>(&self, slot: usize, mem: &'m mut Memory) -> &'m mut [u8] {
        &mut mem.region_mut(self.region)[slot * self.unit..(slot + 1) * self.unit]
    }

    /// Copies a slot's bytes to `off` of another region.
    pub fn copy_to_region(&self, slot: usize, region: RegionId, off: usize, mem: &mut Memory) {
        mem.copy_regions((self.region, slot * self.unit), (region, off), self.unit);
    }

    /// The region that the slices are in.
    pub fn region(&self) -> RegionId {
        self.region
    }

    /// The key of what a slot holds.
    pub fn key(&self, slot: usize) -> u64 {
        self.keys[slot]
    }

    /// Copies a slot's bytes to the start of a pool buffer, to be changed and written; answers
    /// the copy.
    pub fn copy_to_pool<'m>(&self, slot: usize, buf: BufId, mem: &'m mut Memory) -> &'m mut [u8] {
        let (pool, region) = mem.pool_and_region(buf, self.region);
        let copy = &mut pool[..self.unit];
        copy.copy_from_slice(&region[slot * self.unit..(slot + 1) * self.unit]);
        copy
    }

    /// Panics if somebody waits or loads, or if a slot has not as many pins as `pins` says. For
    /// tests, at rest.
    pub fn assert_idle(&self, pins: impl Fn(usize) -> u32) {
        assert!(self.full.is_empty(), "somebody waits for a free slot");
        for (i, (slot, key)) in self.slots.iter().zip(&self.keys).enumerate() {
            assert!(slot.waiters.is_empty() && slot.pins == pins(i), "slice {key}: {slot:?}");
            assert_ne!(slot.state, SlotState::Loading, "slice {key}");
        }
    }

    #[inline]
    fn first_of(&self, key: u64) -> usize {
        // Neighbouring keys go to neighbouring sets: a sequential walk fills the cache evenly.
        (key as usize & (self.hands.len() - 1)) * self.ways
    }
}

fn shape(slices: usize) -> (usize, usize) {
    let ways = slices.clamp(1, WAYS);
    // A power of two, so that finding the set is cheap.
    (slices.div_ceil(ways).next_power_of_two(), ways)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(cache: &mut TableCache, key: u64) -> Option<usize> {
        let slot = cache.reserve(key)?;
        cache.loaded(slot);
        Some(slot)
    }

    #[test]
    fn the_slice_not_used_for_longest_gives_way() {
        let mut cache = TableCache::new(RegionId(0), 4096, 2);
        let a = ready(&mut cache, 1).unwrap();
        let b = ready(&mut cache, 2).unwrap();
        assert_ne!(a, b);
        // Both have a second chance left; the hand passes both and takes the older one.
        assert_eq!(ready(&mut cache, 3), Some(a));
        assert_eq!(cache.find(1), None);
        assert_eq!(cache.find(2), Some(b));
    }

    #[test]
    fn pinned_and_loading_slots_stay() {
        let mut cache = TableCache::new(RegionId(0), 4096, 2);
        let a = ready(&mut cache, 1).unwrap();
        cache.pin(a);
        let b = cache.reserve(2).unwrap();
        assert_eq!(cache.reserve(3), None);
        cache.forget(b);
        assert_eq!(cache.find(2), None);
        assert_eq!(cache.reserve(3), Some(b));
        cache.unpin(a);
        assert_eq!(cache.find(1), Some(a));
    }
}
