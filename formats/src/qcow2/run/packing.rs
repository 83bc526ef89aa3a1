//! Compressed clusters that guests write: packed one behind the other into host clusters, in memory.
//!
//! ```text
//! Deflate ─> pack: [Space | Frees | Room | MakeRoom ─>] ─> [Write] ─> done
//! ```
//!
//! A cluster is deflated beside its copy, as an op. What came out goes behind what came before, in
//! the host cluster that is being filled; it may reach into the next one, if that follows it in
//! the file. The entry leads there at once: reads find the bytes in memory. Whoever fills a host
//! cluster writes it, whole. What is not full is written by a writeback, before any entry that
//! leads to it ([`Packing::begin_to_write`]); more may follow it there later.
//!
//! A host cluster is counted when it leaves the reserve; each compressed cluster in it but the first
//! is one more reference ([`Reserve::raise`]). When one is given up, nothing more goes where it
//! lies ([`Packing::seal`]): what is counted down to nothing is not filled any more.
//!
//! A write that fails leaves the bytes in memory, to be written again: the flush after it fails, or
//! makes it good.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::Cx;
use cowbell_engine::units::{Errno, HostOffset};
use cowbell_engine::wait::{On, WaitList};

use crate::qcow2::disk::codec::{DEFLATED_HEADER, deflating};
use crate::qcow2::disk::header::Compression;
use crate::qcow2::disk::layout::{Compressed, L2Entry};
use crate::qcow2::run::image::{Image, buffers_for, deflate_slot_bytes};
use crate::qcow2::run::reserve::{Reserve, Short};

/// What a compressed write awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PackState {
    /// The cluster in `slot`, deflated.
    Deflate { claim: u32, slot: u32 },
    /// A host cluster, which attempt number `attempt` to get some was to bring.
    Space { packed: Packed, attempt: u32 },
    /// Room for what the entry gives up, that writeback number `attempt` was to make.
    Frees { packed: Packed, attempt: u32 },
    /// A host cluster in memory, written by others.
    Room { packed: Packed },
    /// A host cluster in memory, written to make room.
    MakeRoom { packed: Packed, buffer: u32 },
    /// The host cluster that was filled, written: the guest's bytes are done up to `to`.
    Write { to: u64, buffer: u32 },
}

/// A deflated cluster.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Packed {
    /// The claim of its guest bytes.
    pub claim: u32,
    /// Where it is.
    pub slot: u32,
    /// How long.
    pub bytes: u32,
}

/// A host cluster in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Buffer {
    cluster: u64,
    /// Bytes that are packed.
    fill: u32,
    /// Compressed clusters in it.
    members: u32,
    /// Are there bytes that are not on disk?
    is_dirty: bool,
    is_writing: bool,
    /// Does a writeback wait for it?
    is_due: bool,
}

impl Buffer {
    /// Where in the file the next byte goes.
    fn end(&self, cluster_bits: u32) -> u64 {
        (self.cluster << cluster_bits) + u64::from(self.fill)
    }
}

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(super) struct Packing {
    image: Image,
    buffers: Vec<Option<Buffer>>,
    /// The one that is being filled.
    open: Option<u32>,
    /// Places for clusters and what they are deflated to: is one taken?
    slots: Vec<bool>,
    slot_waiters: WaitList,
    /// Who waits for room, or for a write to end.
    waiters: WaitList,
}

/// Why bytes were not packed.
#[derive(Debug)]
pub(super) enum Lack {
    /// No cluster is free.
    Space(Short),
    /// The request is parked until a host cluster in memory is written.
    Room,
    /// The request is to write this one.
    Full(u32),
    /// No entry can say where it would be.
    TooFar,
}

impl Packing {
    /// With so many host clusters and places to deflate in.
    pub fn new(image: Image, buffers: usize, slots: usize) -> Packing {
        Packing {
            image,
            buffers: vec![None; buffers_for(buffers)],
            open: None,
            slots: vec![false; slots.max(1)],
            slot_waiters: WaitList::new(),
            waiters: WaitList::new(),
        }
    }

    /// A place to deflate in; `None`: there is none, the request is parked.
    pub fn take_slot(&mut self, cx: &mut Cx<'_>) -> Option<u32> {
        match self.slots.iter().position(|taken| !taken) {
            Some(slot) => {
                self.slots[slot] = true;
                Some(slot as u32)
            }
            None => {
                cx.park(&mut self.slot_waiters, On::Compressed);
                None
            }
        }
    }

    pub fn give_slot(&mut self, slot: u32, cx: &mut Cx<'_>) {
        self.slots[slot as usize] = false;
        cx.wake_all(&mut self.slot_waiters);
    }

    /// Copies `len` of the request's bytes, from `from` on, into a slot, and deflates them: a cluster,
    /// with zeros behind the disk's end.
    pub fn deflate(
        &self,
        slot: u32,
        (from, len): (u64, u64),
        compression: Compression,
        cx: &mut Cx<'_>,
    ) {
        let cluster = self.image.geometry.cluster_size();
        let unit = deflate_slot_bytes(cluster);
        let (region, off) = (self.image.regions.deflated, slot as usize * unit);
        cx.copy_guest_to_region(from, region, off, len as usize);
        let end = off + cluster as usize;
        cx.mem().region_mut(region)[off + len as usize..end].fill(0);
        let seg = |off: usize, len: usize| Seg {
            base: Base::Region(region),
            off: off as u32,
            len: len as u32,
        };
        let work = deflating(compression);
        cx.issue(Op::compute(work, seg(off, cluster as usize), seg(end, unit - cluster as usize)));
    }

    /// How long the deflated cluster in `slot` is; `None`: it did not become smaller. A record that was changed may
    /// say anything.
    pub fn deflated_bytes(&self, slot: u32, cx: &Cx<'_>) -> Option<u32> {
        let off = self.deflated_at(slot);
        let header = &cx.memory().region(self.image.regions.deflated)[off..off + DEFLATED_HEADER];
        let bytes = u32::from_le_bytes(header.try_into().expect("four bytes"));
        (1..self.cluster_bytes()).contains(&bytes).then_some(bytes)
    }

    fn deflated_at(&self, slot: u32) -> usize {
        let cluster = self.image.geometry.cluster_size();
        slot as usize * deflate_slot_bytes(cluster) + cluster as usize
    }

    fn cluster_bytes(&self) -> u32 {
        1 << self.image.geometry.cluster_bits()
    }

    /// Puts a deflated cluster behind what came before it, and answers where that is.
    pub fn pack(
        &mut self,
        packed: Packed,
        reserve: &mut Reserve,
        cx: &mut Cx<'_>,
    ) -> Result<Compressed, Lack> {
        let cluster = self.cluster_bytes();
        if self.open_buffer().is_some_and(|open| open.is_writing) {
            cx.park(&mut self.waiters, On::Cluster);
            return Err(Lack::Room);
        }
        let most = self.image.geometry.refcount_max();
        if self.open_buffer().is_some_and(|open| u64::from(open.members) >= most) {
            self.close();
        }
        let bits = self.image.geometry.cluster_bits();
        let host = match self.open_buffer() {
            Some(open) if packed.bytes <= cluster - open.fill => open.end(bits),
            before => {
                let next = self.open_next(reserve, cx)?;
                // They may begin in the one before it.
                let before = before.filter(|before| before.cluster + 1 == next);
                before.map_or(next << bits, |before| before.end(bits))
            }
        };
        self.copy_in(packed, host, reserve, cx);
        // Up to the end of the sector that it ends in.
        let bytes = (host + u64::from(packed.bytes)).next_multiple_of(512) - host;
        Ok(Compressed { host: HostOffset(host), bytes: bytes as u32 })
    }

    fn open_buffer(&self) -> Option<Buffer> {
        self.open.and_then(|open| self.buffers[open as usize])
    }

    /// Takes another host cluster, and answers which. It is the one that is filled from now on; the one
    /// before it keeps what room it has only if this one follows it in the file.
    fn open_next(&mut self, reserve: &mut Reserve, cx: &mut Cx<'_>) -> Result<u64, Lack> {
        let Some(vacant) = self.buffers.iter().position(Option::is_none) else {
            let waits = self.buffers.iter().flatten().any(|buffer| buffer.is_writing);
            let full = (0..self.buffers.len() as u32).find(|&at| self.may_write(at));
            return match full {
                Some(buffer) if !waits => Err(Lack::Full(buffer)),
                _ => {
                    cx.park(&mut self.waiters, On::CacheSlot);
                    Err(Lack::Room)
                }
            };
        };
        let taken = reserve.take(1, cx).map_err(Lack::Space)?;
        if !L2Entry::may_be_compressed_in(taken.first, self.image.geometry) {
            reserve.give_back(taken.first, 1);
            return Err(Lack::TooFar);
        }
        let buffer = Buffer {
            cluster: taken.first,
            fill: 0,
            members: 0,
            is_dirty: false,
            is_writing: false,
            is_due: false,
        };
        // It keeps what room it has only for bytes that reach into the next.
        if self.open_buffer().is_some_and(|open| open.cluster + 1 != taken.first) {
            self.close();
        }
        self.bytes_mut(vacant as u32, cx).fill(0);
        self.buffers[vacant] = Some(buffer);
        self.open = Some(vacant as u32);
        Ok(taken.first)
    }

    /// Copies the bytes to where they are to be on disk.
    fn copy_in(&mut self, packed: Packed, host: u64, reserve: &mut Reserve, cx: &mut Cx<'_>) {
        let (bits, cluster) = (self.image.geometry.cluster_bits(), u64::from(self.cluster_bytes()));
        let source = self.deflated_at(packed.slot) + DEFLATED_HEADER;
        let (mut at, end) = (host, host + u64::from(packed.bytes));
        while at < end {
            let to = end.min(((at >> bits) + 1) << bits);
            let buffer = self.find(at >> bits).expect("it was opened");
            let off = buffer as usize * cluster as usize + (at & (cluster - 1)) as usize;
            let from = (self.image.regions.deflated, source + (at - host) as usize);
            let region = self.image.regions.packed;
            cx.mem().copy_regions(from, (region, off), (to - at) as usize);
            let held = self.buffers[buffer as usize].as_mut().expect("it was found");
            if held.members > 0 && !mutant!("qcow2_packed_not_counted") {
                reserve.raise(held.cluster, cx);
            }
            held.members += 1;
            held.fill += (to - at) as u32;
            held.is_dirty = true;
            at = to;
        }
        if self.open_buffer().is_some_and(|open| u64::from(open.fill) == cluster) {
            self.open = None;
        }
    }

    fn find(&self, cluster: u64) -> Option<u32> {
        let held = |buffer: &Option<Buffer>| buffer.is_some_and(|its| its.cluster == cluster);
        self.buffers.iter().position(held).map(|at| at as u32)
    }

    fn bytes_mut<'m>(&self, buffer: u32, cx: &'m mut Cx<'_>) -> &'m mut [u8] {
        let cluster = self.cluster_bytes() as usize;
        let region = cx.mem().region_mut(self.image.regions.packed);
        &mut region[buffer as usize * cluster..][..cluster]
    }

    /// Is it filled, and nobody writes it?
    fn may_write(&self, buffer: u32) -> bool {
        let held = self.buffers[buffer as usize];
        self.open != Some(buffer) && held.is_some_and(|held| held.is_dirty && !held.is_writing)
    }

    /// A host cluster that is filled, for who filled it to write.
    pub fn filled(&self) -> Option<u32> {
        (0..self.buffers.len() as u32).find(|&at| {
            let held = self.buffers[at as usize];
            let is_full = held.is_some_and(|held| held.fill == self.cluster_bytes());
            is_full && self.may_write(at)
        })
    }

    /// Writes a host cluster, whole.
    pub fn write(&mut self, buffer: u32, cx: &mut Cx<'_>) {
        let len = self.cluster_bytes();
        let held = self.buffers[buffer as usize].as_mut().expect("it is held");
        (held.is_writing, held.is_dirty) = (true, false);
        let offset = held.cluster << self.image.geometry.cluster_bits();
        let base = Base::Region(self.image.regions.packed);
        let seg = Seg { base, off: buffer * len, len };
        cx.issue(Op::write(self.image.file, offset, Segs::one(seg)));
    }

    /// It was written, or could not be: then it is still to be.
    pub fn written(&mut self, buffer: u32, result: Result<(), Errno>, cx: &mut Cx<'_>) {
        let held = self.buffers[buffer as usize].as_mut().expect("it is held");
        held.is_writing = false;
        held.is_dirty |= result.is_err() && !mutant!("qcow2_packed_error_forgotten");
        held.is_due &= held.is_dirty;
        let is_done = !held.is_dirty && self.open != Some(buffer);
        if is_done {
            self.buffers[buffer as usize] = None;
        }
        cx.wake_all(&mut self.waiters);
    }

    /// A writeback begins: what is packed now is to be written by it.
    pub fn begin_to_write(&mut self) {
        for held in self.buffers.iter_mut().flatten() {
            held.is_due = held.is_dirty || held.is_writing;
        }
    }

    /// The next one that a writeback is to write.
    pub fn next_due(&self) -> Option<u32> {
        (0..self.buffers.len() as u32).find(|&at| {
            let held = self.buffers[at as usize];
            held.is_some_and(|held| held.is_due && held.is_dirty && !held.is_writing)
        })
    }

    /// Does a writeback have to wait for what others write? Then it is parked.
    pub fn park_for_writes(&mut self, cx: &mut Cx<'_>) -> bool {
        let waits = self.buffers.iter().flatten().any(|held| held.is_due && held.is_writing);
        let waits = waits && !mutant!("qcow2_packed_not_awaited");
        if waits {
            cx.park(&mut self.waiters, On::Quiet);
        }
        waits
    }

    /// A writeback has failed.
    pub fn nothing_is_due(&mut self) {
        self.buffers.iter_mut().flatten().for_each(|held| held.is_due = false);
    }

    /// A compressed cluster was given up: nothing more goes into the host clusters that it lies in.
    pub fn seal(&mut self, place: Compressed) {
        let bits = self.image.geometry.cluster_bits();
        let last = (place.host.0 + u64::from(place.bytes) - 1) >> bits;
        let is_its = |held: Buffer| (place.host.0 >> bits..=last).contains(&held.cluster);
        if self.open_buffer().is_some_and(is_its) && !mutant!("qcow2_packed_beside_given_up") {
            self.close();
        }
    }

    /// The one that is being filled is filled no more.
    pub fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        let held = self.buffers[open as usize];
        if held.is_some_and(|held| !held.is_dirty && !held.is_writing) {
            self.buffers[open as usize] = None;
        }
    }

    /// Brings `bytes` bytes from `host` on to `off` of the inflated ones: those in memory are copied,
    /// others read. False: there is nothing to wait for.
    pub fn fetch(&self, host: u64, bytes: u32, off: u32, cx: &mut Cx<'_>) -> bool {
        let (bits, cluster) = (self.image.geometry.cluster_bits(), u64::from(self.cluster_bytes()));
        let region = self.image.regions.inflated;
        let (mut at, end, mut waits) = (host, host + u64::from(bytes), false);
        let is_held = |cluster: u64| self.find(cluster).is_some();
        while at < end {
            let mut to = end.min(((at >> bits) + 1) << bits);
            let target = off + (at - host) as u32;
            match self.find(at >> bits).filter(|_| !mutant!("qcow2_packed_not_read")) {
                Some(buffer) => {
                    let from = buffer as usize * cluster as usize + (at & (cluster - 1)) as usize;
                    let from = (self.image.regions.packed, from);
                    cx.mem().copy_regions(from, (region, target as usize), (to - at) as usize);
                }
                None => {
                    while to < end && !is_held(to >> bits) {
                        to = end.min(to + cluster);
                    }
                    let base = Base::Region(region);
                    let seg = Seg { base, off: target, len: (to - at) as u32 };
                    cx.issue(self.image.read_op(at, Segs::one(seg)));
                    waits = true;
                }
            }
            at = to;
        }
        waits
    }

    pub fn assert_idle(&self) {
        assert!(self.slots.iter().all(|taken| !taken), "something is being deflated");
        assert!(self.slot_waiters.is_empty() && self.waiters.is_empty());
        let is_idle = |held: &Buffer| !held.is_writing && !held.is_due;
        assert!(self.buffers.iter().flatten().all(is_idle), "{:?}", self.buffers);
    }
}
