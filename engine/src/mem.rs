//! Memory: the buffers that requests bring, the engine's pool, and the regions of nodes.
//!
//! Everything that an op reads into or writes from lives here and is named by a
//! [`Seg`]. Real backends ask for addresses at the moment of submission;
//! the simulator copies bytes. All buffers of ours start on a page.

use std::cell::Cell;
use std::hash::{Hash, Hasher};
use std::ops::{Deref, DerefMut};

use crate::op::{Base, Seg, Segs};
use crate::sys::pages::Bytes;
use crate::sys::ram::{Ram, RamPiece};
use crate::units::{BufId, RegionId, ReqId};

/// Alignment of every buffer of ours, in bytes; no device asks for more.
pub const BUF_ALIGN: usize = 4096;

/// Owned memory that starts on a page, fit for O_DIRECT.
pub struct Buf {
    /// A page longer than asked for: the buffer starts on the first page boundary in it.
    bytes: Bytes,
}

impl Buf {
    /// `len` zeros. The memory is reserved at once and touched only when used.
    pub fn zeroed(len: usize) -> Buf {
        Buf { bytes: Bytes::zeroed(len + BUF_ALIGN) }
    }

    /// The same, of which nothing is touched before it is used, however short.
    pub(crate) fn untouched(len: usize) -> Buf {
        Buf { bytes: Bytes::mapped(len + BUF_ALIGN) }
    }

    /// A copy of `bytes`.
    pub fn copied(bytes: &[u8]) -> Buf {
        // Not zeroed first: the simulator copies millions of these.
        let mut copy: Vec<u8> = Vec::with_capacity(bytes.len() + BUF_ALIGN);
        let start = copy.as_ptr().addr().wrapping_neg() & (BUF_ALIGN - 1);
        copy.resize(start, 0);
        copy.extend_from_slice(bytes);
        copy.resize(bytes.len() + BUF_ALIGN, 0);
        Buf { bytes: copy.into() }
    }

    /// A stand-in that owns nothing.
    fn empty() -> Buf {
        Buf { bytes: Vec::new().into() }
    }

    #[inline(always)]
    fn start(&self) -> usize {
        self.bytes.as_ptr().addr().wrapping_neg() & (BUF_ALIGN - 1)
    }

    #[inline(always)]
    fn size(&self) -> usize {
        self.bytes.len().saturating_sub(BUF_ALIGN)
    }

    /// The address of `len` bytes from byte `off` on.
    #[inline(always)]
    fn piece(&mut self, off: usize, len: usize) -> RamPiece {
        assert!(off + len + BUF_ALIGN <= self.bytes.len(), "outside the buffer");
        let start = self.start() + off;
        RamPiece { base: self.bytes.as_mut_ptr().wrapping_add(start), len }
    }
}

impl Deref for Buf {
    type Target = [u8];
    #[inline(always)]
    fn deref(&self) -> &[u8] {
        // A stand-in has no page to start on.
        self.bytes.get(self.start()..).map_or(&[], |bytes| &bytes[..self.size()])
    }
}

impl DerefMut for Buf {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [u8] {
        let (start, size) = (self.start(), self.size());
        self.bytes.get_mut(start..).map_or(&mut [], |bytes| &mut bytes[..size])
    }
}

impl Clone for Buf {
    fn clone(&self) -> Buf {
        Buf::copied(self)
    }

    fn clone_from(&mut self, source: &Buf) {
        if self.size() == source.size() {
            self.copy_from_slice(source);
        } else {
            *self = source.clone();
        }
    }
}

impl Hash for Buf {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self);
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} bytes)", self.len())
    }
}

/// Memory of the engine's own: a pool buffer, or a node's region. Knows what its bytes hash to, if
/// nobody had it in hand to change since that was asked for: simulations hash and copy engines by
/// the million, and few steps change a table.
#[derive(Debug)]
struct Held {
    bytes: Buf,
    /// 0: not known.
    hash: Cell<u64>,
}

impl Held {
    fn zeroed(len: usize) -> Held {
        Held { bytes: Buf::zeroed(len), hash: Cell::new(0) }
    }

    fn untouched(len: usize) -> Held {
        Held { bytes: Buf::untouched(len), hash: Cell::new(0) }
    }

    /// A stand-in that owns nothing.
    fn empty() -> Held {
        Held { bytes: Buf::empty(), hash: Cell::new(0) }
    }

    /// Makes this a copy of `source`; copies nothing if it is known to be one.
    fn copy(&mut self, source: &Held) {
        let known = source.hash.get();
        if known == 0 || self.hash.get() != known {
            self.bytes.clone_from(&source.bytes);
            self.hash.set(known);
        }
    }
}

impl Deref for Held {
    type Target = [u8];
    #[inline(always)]
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Held {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [u8] {
        *self.hash.get_mut() = 0;
        &mut self.bytes
    }
}

impl Hash for Held {
    fn hash<H: Hasher>(&self, state: &mut H) {
        if self.hash.get() == 0 {
            self.hash.set(digest(self).max(1));
        }
        state.write_u64(self.hash.get());
    }
}

/// A hash of some bytes and of how many they are: good enough to tell states apart, and fast.
fn digest(bytes: &[u8]) -> u64 {
    const MIX: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9];
    const WORDS: usize = 8;
    fn fold(a: u64, b: u64) -> u64 {
        let product = u128::from(a) * u128::from(b);
        product as u64 ^ (product >> 64) as u64
    }
    // Four sums side by side: a product takes longer than it takes to begin the next.
    let mut sums = [1_u64, 2, 3, 4];
    let (words, rest) = bytes.as_chunks::<8>();
    let (blocks, others) = words.as_chunks::<WORDS>();
    for block in blocks {
        for i in 0..WORDS / 2 {
            let (a, b) = (u64::from_le_bytes(block[2 * i]), u64::from_le_bytes(block[2 * i + 1]));
            sums[i] = fold(sums[i] ^ a ^ MIX[0], b ^ MIX[1]);
        }
    }
    let mut sum = fold(bytes.len() as u64 ^ MIX[0], MIX[1]);
    for &word in others {
        sum = fold(sum ^ u64::from_le_bytes(word), MIX[0]);
    }
    for &byte in rest {
        sum = fold(sum ^ u64::from(byte), MIX[0]);
    }
    sums.iter().fold(sum, |all, &each| fold(all ^ each, MIX[1]))
}

/// The memory of a request: what a read fills and a write takes its bytes from.
#[derive(Hash, Debug, Default)]
pub enum Mem {
    /// None: flushes, zero writes, discards.
    #[default]
    None,
    /// Owned by the engine until the request has finished, then handed back.
    Owned(Buf),
    /// Lent by the embedder.
    Ram(Ram),
}

// Moved with every request.
const _: () = assert!(size_of::<Mem>() <= 24);

impl Mem {
    /// Bytes.
    #[inline]
    pub fn len(&self) -> usize {
        match self {
            Mem::None => 0,
            // Never a stand-in: those take the place of pool buffers and regions.
            Mem::Owned(buf) => buf.bytes.len() - BUF_ALIGN,
            Mem::Ram(ram) => ram.len(),
        }
    }

    /// No bytes?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bits that are set in any address or length, as far as alignment cares.
    #[inline(always)]
    pub(crate) fn misaligned_bits(&self) -> u32 {
        match self {
            Mem::Ram(ram) => ram.misaligned_bits(),
            // Buffers of ours start on a page, and lengths are looked at one by one.
            Mem::Owned(_) | Mem::None => 0,
        }
    }

    /// Can it only be written from?
    #[inline(always)]
    pub(crate) fn is_read_only(&self) -> bool {
        matches!(self, Mem::Ram(ram) if ram.is_read_only())
    }

    /// Does it stay for as long as this is there, whatever its lender does?
    pub(crate) fn is_kept(&self) -> bool {
        match self {
            Mem::Ram(ram) => ram.has_owner(),
            Mem::None | Mem::Owned(_) => true,
        }
    }

    /// The list of what was lent, if it is one: to be filled again for the next request.
    pub fn into_ram(self) -> Option<Ram> {
        match self {
            Mem::Ram(ram) => Some(ram),
            _ => None,
        }
    }

    /// The owned buffer, if it is one.
    pub fn into_buf(self) -> Option<Buf> {
        match self {
            Mem::Owned(buf) => Some(buf),
            _ => None,
        }
    }
}

impl Clone for Mem {
    fn clone(&self) -> Mem {
        match self {
            Mem::None => Mem::None,
            Mem::Owned(buf) => Mem::Owned(buf.clone()),
            Mem::Ram(ram) => Mem::Ram(ram.clone()),
        }
    }

    fn clone_from(&mut self, source: &Mem) {
        match (self, source) {
            (Mem::Owned(buf), Mem::Owned(from)) => buf.clone_from(from),
            (mem, from) => *mem = from.clone(),
        }
    }
}

impl From<Buf> for Mem {
    fn from(buf: Buf) -> Mem {
        Mem::Owned(buf)
    }
}

impl From<Ram> for Mem {
    fn from(ram: Ram) -> Mem {
        Mem::Ram(ram)
    }
}

/// A page-aligned stretch of zeros to write from; longer runs repeat it.
#[repr(align(4096))]
struct Zeros([u8; 64 << 10]);
static ZEROS: Zeros = Zeros([0; 64 << 10]);

/// What is in a buffer that was used before: anything but zeros.
const STALE: u8 = 0xa5;

fn is_free(buf: usize, free: &[&[BufId]]) -> bool {
    free.iter().any(|list| list.contains(&BufId(buf as u32)))
}

/// How much of what is brought into a region the engine or a driver looks at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Looked {
    /// All: it holds tables.
    All,
    /// So many of the first bytes. What is behind them is a guest's.
    First(usize),
}

/// All memory that ops can name.
#[derive(Debug, Default)]
pub struct Memory {
    guest: Vec<Mem>,
    pool: Vec<Held>,
    regions: Vec<Held>,
    /// How much of what is brought into each the engine looks at.
    looked_at: Vec<Looked>,
    /// Who runs looks whether what has been read is zeros: so many of them.
    zero_seekers: u32,
    /// Places in it that nobody has.
    regions_free: Vec<RegionId>,
    /// See [`Memory::copy_but_free`].
    is_copy: bool,
}

impl Memory {
    /// Room for the memory of `requests` requests and `buffers` pool buffers of `size` bytes.
    pub(crate) fn new(requests: usize, buffers: usize, size: usize) -> Memory {
        Memory {
            guest: Vec::with_capacity(requests),
            pool: (0..buffers).map(|_| Held::untouched(size)).collect(),
            regions: Vec::new(),
            looked_at: Vec::new(),
            zero_seekers: 0,
            regions_free: Vec::new(),
            is_copy: false,
        }
    }

    /// Makes this a copy of `source`, for simulations. What is in free buffers is not copied; when
    /// one is taken from a copy, what is in it does not depend on who had it before.
    pub(crate) fn copy_but_free(&mut self, source: &Memory, free: &[&[BufId]]) {
        self.guest.clone_from(&source.guest);
        self.regions.resize_with(source.regions.len(), Held::empty);
        self.regions_free.clone_from(&source.regions_free);
        self.looked_at.clone_from(&source.looked_at);
        self.zero_seekers = source.zero_seekers;
        self.regions.iter_mut().zip(&source.regions).for_each(|(region, from)| region.copy(from));
        self.pool.resize_with(source.pool.len(), Held::empty);
        for (i, (buf, from)) in self.pool.iter_mut().zip(&source.pool).enumerate() {
            if !is_free(i, free) {
                buf.copy(from);
            }
        }
        self.is_copy = true;
    }

    /// A free buffer of `size` bytes is taken.
    #[inline]
    pub(crate) fn buf_taken(&mut self, buf: BufId, size: usize) {
        if self.is_copy {
            let buf = &mut self.pool[buf.index()];
            if buf.bytes.size() != size {
                *buf = Held::zeroed(size);
            }
            buf.fill(STALE);
        }
    }

    /// A request's memory.
    pub(crate) fn guest(&self, request: ReqId) -> &Mem {
        self.guest.get(request.index()).unwrap_or(&Mem::None)
    }

    /// Hashes regions and buffers, except what is in free ones: nobody reads that.
    pub(crate) fn hash_but_free<H: Hasher>(&self, free: &[&[BufId]], h: &mut H) {
        self.regions.hash(h);
        for (i, buf) in self.pool.iter().enumerate() {
            if !is_free(i, free) {
                (i, buf).hash(h);
            }
        }
    }

    #[inline(always)]
    pub(crate) fn set_guest(&mut self, request: ReqId, mem: Mem) {
        match self.guest.get_mut(request.index()) {
            // Not dropped: it is none. Who had the place before took his memory with him.
            Some(place) => {
                debug_assert!(matches!(place, Mem::None));
                std::mem::forget(std::mem::replace(place, mem));
            }
            None => self.add_guest(request, mem),
        }
    }

    #[cold]
    fn add_guest(&mut self, request: ReqId, mem: Mem) {
        self.guest.resize_with(request.index(), Mem::default);
        self.guest.push(mem);
    }

    #[inline]
    pub(crate) fn take_guest(&mut self, request: ReqId) -> Mem {
        self.guest.get_mut(request.index()).map(std::mem::take).unwrap_or_default()
    }

    /// Frees a region's memory; its place is for the next one.
    pub(crate) fn free_region(&mut self, id: RegionId) {
        self.regions[id.index()] = Held::empty();
        self.regions_free.push(id);
    }

    pub(crate) fn add_region(&mut self, len: usize) -> RegionId {
        if let Some(id) = self.regions_free.pop() {
            self.regions[id.index()] = Held::zeroed(len);
            self.looked_at[id.index()] = Looked::All;
            return id;
        }
        self.regions.push(Held::zeroed(len));
        self.looked_at.push(Looked::All);
        RegionId(self.regions.len() as u32 - 1)
    }

    /// How much of what an op brings into this region is looked at by the engine or a driver.
    #[inline]
    pub fn looked_at(&self, id: RegionId) -> Looked {
        self.looked_at[id.index()]
    }

    pub(crate) fn set_looked_at(&mut self, id: RegionId, looked: Looked) {
        self.looked_at[id.index()] = looked;
    }

    /// Does a job look whether what it has read is zeros?
    #[inline]
    pub fn are_zeros_sought(&self) -> bool {
        self.zero_seekers > 0
    }

    /// One more such job; or one has ended.
    pub(crate) fn seek_zeros(&mut self, begins: bool) {
        self.zero_seekers = match begins {
            true => self.zero_seekers + 1,
            false => self.zero_seekers - 1,
        };
    }

    /// Places of regions, those that nobody has included.
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }

    /// A region's bytes.
    #[inline]
    pub fn region(&self, id: RegionId) -> &[u8] {
        &self.regions[id.index()]
    }

    /// A region's bytes.
    #[inline]
    pub fn region_mut(&mut self, id: RegionId) -> &mut [u8] {
        &mut self.regions[id.index()]
    }

    /// The bytes of `seg`, part of a region.
    pub(crate) fn region_mut_of(&mut self, seg: Seg) -> &mut [u8] {
        let Base::Region(region) = seg.base else { panic!("{seg:?} is in no region") };
        &mut self.regions[region.index()][seg.off as usize..][..seg.len as usize]
    }

    /// A pool buffer's bytes.
    #[inline]
    pub fn pool(&self, id: BufId) -> &[u8] {
        &self.pool[id.index()]
    }

    /// A pool buffer's bytes.
    #[inline]
    pub fn pool_mut(&mut self, id: BufId) -> &mut [u8] {
        &mut self.pool[id.index()]
    }

    /// A pool buffer and a region at once, to copy between them.
    pub fn pool_and_region(&mut self, buf: BufId, region: RegionId) -> (&mut [u8], &mut [u8]) {
        (&mut self.pool[buf.index()], &mut self.regions[region.index()])
    }

    /// The bytes of `input` to look at, and those of `output` to change: what a
    /// [`Compute`](crate::op::Compute) works on. Both in pool buffers or regions, and apart.
    pub fn input_and_output(&mut self, input: Seg, output: Seg) -> (&[u8], &mut [u8]) {
        assert!(!input.overlaps(&output), "{input:?} and {output:?}");
        let range = |seg: Seg| seg.off as usize..seg.off as usize + seg.len as usize;
        if input.base == output.base {
            let both = [range(input), range(output)];
            let both = self.owned_mut(input.base).get_disjoint_mut(both);
            let [from, to] = both.expect("they are inside, and apart");
            return (from, to);
        }
        let Memory { pool, regions, .. } = self;
        let two = "two buffers that there are";
        let (from, to) = match (input.base, output.base) {
            (Base::Pool(a), Base::Pool(b)) => {
                pool.get_disjoint_mut([a.index(), b.index()]).map(|[a, b]| (a, b)).expect(two)
            }
            (Base::Region(a), Base::Region(b)) => {
                regions.get_disjoint_mut([a.index(), b.index()]).map(|[a, b]| (a, b)).expect(two)
            }
            (Base::Pool(a), Base::Region(b)) => (&mut pool[a.index()], &mut regions[b.index()]),
            (Base::Region(a), Base::Pool(b)) => (&mut regions[a.index()], &mut pool[b.index()]),
            _ => panic!("{input:?} and {output:?}"),
        };
        (&from[range(input)], &mut to[range(output)])
    }

    /// The address of `segs` from byte `skip` on, if that is plainly one piece of a request's
    /// memory: the common case, cheaper than [`Memory::pieces`].
    #[inline(always)]
    pub(crate) fn single(&mut self, segs: &Segs, skip: u64) -> Option<RamPiece> {
        let seg = segs.only()?;
        let off = seg.off as usize + skip as usize;
        let len = seg.len as usize - skip as usize;
        let Base::Guest(request) = seg.base else { return None };
        match &mut self.guest[request.index()] {
            Mem::Owned(buf) => Some(buf.piece(off, len)),
            Mem::Ram(ram) => ram.single(off, len),
            Mem::None => panic!("an op names memory that {request:?} does not have"),
        }
    }

    /// The addresses of `segs` from byte `skip` on, one call of `each` per contiguous piece.
    ///
    /// For backends, at the moment of submission. The addresses hold until the op completes:
    /// nothing frees or moves memory that an op in flight names.
    #[inline]
    pub fn pieces(&mut self, segs: &Segs, skip: u64, mut each: impl FnMut(RamPiece)) {
        let mut skip = skip as usize;
        for seg in segs.as_slice() {
            let here = seg.len as usize;
            if skip >= here {
                skip -= here;
                continue;
            }
            let (off, len) = (seg.off as usize + skip, here - skip);
            skip = 0;
            let owned: &mut [u8] = match seg.base {
                Base::Guest(r) => match &mut self.guest[r.index()] {
                    Mem::Owned(buf) => buf,
                    Mem::Ram(ram) => {
                        ram.pieces(off, len, &mut each);
                        continue;
                    }
                    Mem::None => panic!("an op names memory that {r:?} does not have"),
                },
                Base::Pool(b) => &mut self.pool[b.index()],
                Base::Region(m) => &mut self.regions[m.index()],
                Base::Zeros => {
                    let mut left = len;
                    while left > 0 {
                        let take = left.min(ZEROS.0.len());
                        // Only ever read: ops that fill memory never name zeros.
                        each(RamPiece { base: ZEROS.0.as_ptr().cast_mut(), len: take });
                        left -= take;
                    }
                    continue;
                }
            };
            each(RamPiece { base: owned[off..off + len].as_mut_ptr(), len });
        }
    }

    /// Does every piece of `segs` start at a multiple of `address_mask + 1` and have a length
    /// that is a multiple of `len_mask + 1`? A scatter list counts as a whole.
    pub fn is_aligned(&self, segs: &Segs, address_mask: u32, len_mask: u32) -> bool {
        segs.as_slice().iter().all(|seg| {
            let bits = self.misaligned_bits(seg.base);
            (seg.off | bits) & address_mask == 0 && (seg.len | bits) & len_mask == 0
        })
    }

    /// The bits that are set in any address or length of `base`, as far as they can be in the
    /// way of alignment. Buffers of ours start on a page.
    #[inline(always)]
    pub(crate) fn misaligned_bits(&self, base: Base) -> u32 {
        match base {
            Base::Guest(r) => self.guest[r.index()].misaligned_bits(),
            _ => 0,
        }
    }

    #[inline(always)]
    fn ram_of(&self, seg: &Seg) -> Option<&Ram> {
        match seg.base {
            Base::Guest(r) => match &self.guest[r.index()] {
                Mem::Ram(ram) => Some(ram),
                _ => None,
            },
            _ => None,
        }
    }

    fn owned(&self, base: Base) -> &[u8] {
        match base {
            Base::Guest(r) => match &self.guest[r.index()] {
                Mem::Owned(buf) => buf,
                other => panic!("{r:?} has {other:?}, not a buffer"),
            },
            Base::Pool(b) => &self.pool[b.index()],
            Base::Region(m) => &self.regions[m.index()],
            Base::Zeros => panic!("zeros have no length of their own"),
        }
    }

    fn owned_mut(&mut self, base: Base) -> &mut [u8] {
        match base {
            Base::Guest(r) => match &mut self.guest[r.index()] {
                Mem::Owned(buf) => buf,
                other => panic!("{r:?} has {other:?}, not a buffer"),
            },
            Base::Pool(b) => &mut self.pool[b.index()],
            Base::Region(m) => &mut self.regions[m.index()],
            Base::Zeros => panic!("zeros are only to write from"),
        }
    }

    /// Copies `target.len()` bytes of `segs`, from byte `skip` on, into `target`.
    pub fn gather(&self, segs: &Segs, skip: u64, target: &mut [u8]) {
        let part = segs.slice(skip, target.len() as u64);
        let mut at = 0;
        for seg in part.as_slice() {
            let (off, len) = (seg.off as usize, seg.len as usize);
            let to = &mut target[at..at + len];
            match (seg.base, self.ram_of(seg)) {
                (_, Some(ram)) => ram.copy_to(off, to),
                (Base::Zeros, None) => to.fill(0),
                (base, None) => to.copy_from_slice(&self.owned(base)[off..off + len]),
            }
            at += len;
        }
    }

    /// Copies `source` to `segs`, from byte `skip` on.
    pub fn scatter(&mut self, segs: &Segs, skip: u64, source: &[u8]) {
        let part = segs.slice(skip, source.len() as u64);
        let mut at = 0;
        for seg in part.as_slice() {
            let (off, len) = (seg.off as usize, seg.len as usize);
            let from = &source[at..at + len];
            match self.ram_of(seg) {
                Some(ram) => ram.copy_from(off, from),
                None => self.owned_mut(seg.base)[off..off + len].copy_from_slice(from),
            }
            at += len;
        }
    }

    /// Sets `len` bytes of `segs`, from byte `skip` on, to zero.
    pub fn zero(&mut self, segs: &Segs, skip: u64, len: u64) {
        let part = segs.slice(skip, len);
        for seg in part.as_slice() {
            let (off, len) = (seg.off as usize, seg.len as usize);
            match self.ram_of(seg) {
                Some(ram) => ram.zero(off, len),
                None => self.owned_mut(seg.base)[off..off + len].fill(0),
            }
        }
    }

    /// Copies `len` bytes of `segs`, from byte `skip` on, into the pool buffer `buf` at `at`.
    pub(crate) fn gather_to_pool(
        &mut self,
        segs: &Segs,
        skip: u64,
        buf: BufId,
        at: usize,
        len: usize,
    ) {
        let mut taken = std::mem::replace(&mut self.pool[buf.index()], Held::empty());
        self.gather(segs, skip, &mut taken[at..at + len]);
        self.pool[buf.index()] = taken;
    }

    /// The reverse: from `buf` at `at` into `segs`, byte `skip` on.
    pub(crate) fn scatter_from_pool(
        &mut self,
        segs: &Segs,
        skip: u64,
        buf: BufId,
        at: usize,
        len: usize,
    ) {
        let taken = std::mem::replace(&mut self.pool[buf.index()], Held::empty());
        self.scatter(segs, skip, &taken[at..at + len]);
        self.pool[buf.index()] = taken;
    }

    /// The same from `off` of a region.
    pub(crate) fn gather_to_region(
        &mut self,
        segs: &Segs,
        region: RegionId,
        off: usize,
        len: usize,
    ) {
        let mut taken = std::mem::replace(&mut self.regions[region.index()], Held::empty());
        self.gather(segs, 0, &mut taken[off..off + len]);
        self.regions[region.index()] = taken;
    }

    pub(crate) fn scatter_from_region(
        &mut self,
        segs: &Segs,
        region: RegionId,
        off: usize,
        len: usize,
    ) {
        let taken = std::mem::replace(&mut self.regions[region.index()], Held::empty());
        self.scatter(segs, 0, &taken[off..off + len]);
        self.regions[region.index()] = taken;
    }

    /// Copies `len` bytes from one region, at an offset, to another.
    pub fn copy_regions(&mut self, from: (RegionId, usize), to: (RegionId, usize), len: usize) {
        assert_ne!(from.0, to.0, "a region is not copied onto itself");
        let taken = std::mem::replace(&mut self.regions[from.0.index()], Held::empty());
        let target = &mut self.regions[to.0.index()][to.1..to.1 + len];
        target.copy_from_slice(&taken[from.1..from.1 + len]);
        self.regions[from.0.index()] = taken;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::Segs;
    use std::hash::DefaultHasher;

    const LEN: usize = 4096;

    fn hash(mem: &Memory) -> u64 {
        let mut h = DefaultHasher::new();
        mem.hash_but_free(&[], &mut h);
        h.finish()
    }

    /// Byte 100 of a region or buffer.
    fn byte(base: Base) -> Seg {
        Seg { base, off: 100, len: 1 }
    }

    #[test]
    fn whatever_changes_memory_changes_its_hash_and_changing_it_back_too() {
        let mut mem = Memory::new(1, 1, LEN);
        let [region, other] = [mem.add_region(LEN), mem.add_region(LEN)];
        mem.region_mut(other)[100] = 1;
        let (buf, inside) = (BufId(0), Segs::one(byte(Base::Region(region))));
        let at_first = hash(&mem);
        type Change<'a> = &'a dyn Fn(&mut Memory);
        let changes: [(&str, Change<'_>); 8] = [
            ("region_mut", &|mem| mem.region_mut(region)[100] = 1),
            ("pool_and_region", &|mem| mem.pool_and_region(buf, region).1[100] = 1),
            ("scatter", &|mem| mem.scatter(&inside, 0, &[1])),
            ("copy_regions", &|mem| mem.copy_regions((other, 100), (region, 100), 1)),
            ("gather_to_region", &|mem| {
                mem.gather_to_region(&Segs::one(byte(Base::Region(other))), region, 100, 1);
            }),
            ("input_and_output", &|mem| {
                let (input, output) = (byte(Base::Region(other)), byte(Base::Region(region)));
                let (from, to) = mem.input_and_output(input, output);
                to.copy_from_slice(from);
            }),
            ("pool_mut", &|mem| mem.pool_mut(buf)[100] = 1),
            ("gather_to_pool", &|mem| {
                mem.gather_to_pool(&Segs::one(byte(Base::Region(other))), 0, buf, 100, 1);
            }),
        ];
        for (what, change) in changes {
            change(&mut mem);
            assert_ne!(hash(&mem), at_first, "{what}");
            mem.zero(&inside, 0, 1);
            mem.zero(&Segs::one(byte(Base::Pool(buf))), 0, 1);
            assert_eq!(hash(&mem), at_first, "{what}, undone");
        }
    }

    #[test]
    fn a_region_that_is_freed_takes_no_memory_and_its_place_is_used_again() {
        let mut mem = Memory::new(1, 1, LEN);
        let [first, second] = [mem.add_region(LEN), mem.add_region(LEN)];
        mem.region_mut(first)[7] = 1;
        let before = hash(&mem);
        mem.free_region(first);
        assert_ne!(hash(&mem), before);
        assert!(mem.region(first).is_empty());
        let mut copy = Memory::default();
        copy.copy_but_free(&mem, &[]);
        for mem in [&mut mem, &mut copy] {
            let again = mem.add_region(2 * LEN);
            assert_eq!((again, mem.region_count()), (first, 2));
            assert!(mem.region(again).iter().all(|&byte| byte == 0));
            assert_eq!((mem.region(again).len(), mem.region(second).len()), (2 * LEN, LEN));
        }
        assert_eq!(hash(&mem), hash(&copy));
    }

    #[test]
    fn a_copy_is_one_whatever_was_there_before() {
        let mut mem = Memory::new(1, 1, LEN);
        let region = mem.add_region(LEN);
        let mut copy = Memory::default();
        for value in [0, 1, 0, 2] {
            mem.region_mut(region)[7] = value;
            let hashed = hash(&mem);
            copy.copy_but_free(&mem, &[]);
            assert_eq!((copy.region(region)[7], hash(&copy)), (value, hashed));
            copy.region_mut(region)[7] = 9;
        }
    }

    #[test]
    fn a_digest_tells_any_byte_and_the_length() {
        let mut seen = std::collections::BTreeSet::new();
        for len in 0..200 {
            let mut bytes = vec![0; len];
            assert!(seen.insert(digest(&bytes)), "{len} zeros");
            for i in 0..len {
                bytes[i] = 1;
                assert!(seen.insert(digest(&bytes)), "byte {i} of {len}");
                bytes[i] = 0;
            }
        }
    }
}
