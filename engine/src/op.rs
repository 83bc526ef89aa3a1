//! Ops: the things the outside does for a request.
//!
//! An op names its memory symbolically ([`Seg`]), never by address. A request can therefore be
//! copied with the ops it has in flight, which is what lets the simulator branch.

use std::hash::{Hash, Hasher};

use crate::units::{BufId, Errno, FileId, NodeId, OpId, RegionId, ReqId};

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OpKind {
    /// Read `len` bytes at `offset`; what lies past the end of the file reads as zeros.
    Read,
    /// Write `len` bytes at `offset`.
    Write {
        /// Complete only when this write is stable (RWF_DSYNC).
        fua: bool,
    },
    /// Make every write that completed before this op was issued stable (fdatasync).
    Flush,
    /// Make `len` bytes at `offset` read as zeros.
    Zero {
        /// The space may be given back to the file system.
        unmap: bool,
    },
    /// The contents of `len` bytes at `offset` are no longer needed; a hint.
    Discard,
    /// Set the file's length to `offset`. What it gains reads as zeros.
    Truncate,
    /// Reserve space for `len` bytes at `offset`, and make the file at least that long.
    Allocate,
    /// Work for a processor: from the first segment into the second.
    Compute(Compute),
    /// Copy `len` bytes at `at` of the file `from` to `offset`, without bringing them here: the two may come to share
    /// their space. They do not overlap. What `from` holds there may be taken at any moment until the op
    /// comes back. Whoever cannot answers an error, and may have copied a part.
    Copy {
        /// Where they come from.
        from: FileId,
        /// Byte offset in it; all `len` bytes lie within the file.
        at: u64,
    },
    /// Say whether the byte at `offset` is in a hole of the file, and for how many of the `len` bytes from
    /// there. Only of files that [know](crate::backend::FileInfo::knows_holes).
    Hole,
}

/// The answer to [`OpKind::Hole`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Hole {
    /// Nothing has been written there: zeros.
    pub is_hole: bool,
    /// For how many bytes.
    pub len: u64,
}

impl Hole {
    /// As an op's result. What is longer than 2^62 bytes is told in parts.
    #[inline]
    pub fn to_answer(self) -> u64 {
        self.len.min((1 << 62) - 1) << 1 | u64::from(self.is_hole)
    }

    /// Out of an op's result.
    #[inline]
    pub fn from_answer(answer: u64) -> Hole {
        Hole { is_hole: answer & 1 == 1, len: answer >> 1 }
    }
}

impl OpKind {
    /// Does it change the file's bytes?
    #[inline]
    pub fn modifies(self) -> bool {
        !matches!(self, OpKind::Read | OpKind::Flush | OpKind::Compute(_) | OpKind::Hole)
    }

    /// Is it done under the file's lock, so that everything else on the file waits meanwhile, and it
    /// for what is in flight? (The inode's rwsem, and `inode_dio_wait`, in Linux.)
    #[inline]
    pub fn locks_file(self) -> bool {
        match self {
            OpKind::Read | OpKind::Write { .. } | OpKind::Flush => false,
            OpKind::Compute(_) | OpKind::Hole => false,
            OpKind::Zero { .. } | OpKind::Discard | OpKind::Truncate | OpKind::Allocate => true,
            OpKind::Copy { .. } => true,
        }
    }

    /// Does it move bytes between memory and a file?
    #[inline]
    pub fn has_memory(self) -> bool {
        matches!(self, OpKind::Read | OpKind::Write { .. })
    }
}

/// Work that takes a processor longer than a step may: inflating, deflating.
///
/// Two of one name are the same work, whatever their addresses, which no two runs share.
#[derive(Clone, Copy)]
pub struct Compute {
    /// What it is called in traces; unique.
    pub name: &'static str,
    /// Makes the output from the input, and touches nothing else. After an error nobody looks at
    /// the output. How much of it is used, it must say itself. A panic is a defect of ours.
    pub run: fn(&[u8], &mut [u8]) -> Result<(), Errno>,
}

impl PartialEq for Compute {
    fn eq(&self, other: &Compute) -> bool {
        self.name == other.name
    }
}

impl Eq for Compute {}

impl Hash for Compute {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.name.hash(h);
    }
}

impl std::fmt::Debug for Compute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Where to do it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Target {
    /// On a file, by the backend.
    File(FileId),
    /// On a layer, by its driver, as a request of its own: of the layer below, or a piece of the
    /// request that issues it. Reads, writes, zeros, discards and flushes, of one segment at most;
    /// what is written to another layer is not in a pool buffer.
    Node(NodeId),
    /// Wherever there is a processor: [`OpKind::Compute`].
    Cpu,
}

/// One thing to do.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Op {
    /// What.
    pub kind: OpKind,
    /// Where.
    pub target: Target,
    /// Byte offset in the target.
    pub offset: u64,
    /// Bytes. For reads and writes the sum of `segs`.
    pub len: u64,
    /// The memory, in file order; of a [`Compute`]: its input and its output.
    pub segs: Segs,
}

impl Op {
    /// Read into `segs`.
    #[inline]
    pub fn read(target: Target, offset: u64, segs: Segs) -> Op {
        Op { kind: OpKind::Read, target, offset, len: segs.len(), segs }
    }

    /// The first memory that it brings something into.
    #[inline]
    pub fn brings_into(&self) -> Option<&Seg> {
        match self.kind {
            OpKind::Read => self.segs.as_slice().first(),
            OpKind::Compute(_) => self.segs.as_slice().get(1),
            _ => None,
        }
    }

    /// Write from `segs`.
    #[inline]
    pub fn write(file: FileId, offset: u64, segs: Segs) -> Op {
        let kind = OpKind::Write { fua: false };
        Op { kind, target: Target::File(file), offset, len: segs.len(), segs }
    }

    /// An op without memory.
    #[inline]
    pub fn bare(kind: OpKind, file: FileId, offset: u64, len: u64) -> Op {
        debug_assert!(!kind.has_memory());
        Op { kind, target: Target::File(file), offset, len, segs: Segs::none() }
    }

    /// Make completed writes stable.
    #[inline]
    pub fn flush(file: FileId) -> Op {
        Op::bare(OpKind::Flush, file, 0, 0)
    }

    /// `work`, from `input` into `output`.
    ///
    /// # Panics
    ///
    /// If one of them is empty, if they overlap, or if one is not part of a pool buffer or a
    /// region: a guest may change its memory while the work looks at it.
    pub fn compute(work: Compute, input: Seg, output: Seg) -> Op {
        let ours = |seg: &Seg| matches!(seg.base, Base::Pool(_) | Base::Region(_)) && seg.len > 0;
        assert!(ours(&input) && ours(&output), "{work:?} from {input:?} into {output:?}");
        assert!(!input.overlaps(&output), "{work:?} from {input:?} into {output:?}");
        let mut segs = Segs::one(input);
        segs.push(output);
        Op { kind: OpKind::Compute(work), target: Target::Cpu, offset: 0, len: 0, segs }
    }

    /// One past the last byte, saturating.
    #[inline]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// Names an op by its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpOwner {
    /// The request's place in the slab; [`Ops::serial`](crate::ops::Ops::serial) tells which it was in time.
    pub request: ReqId,
    /// Its number among that request's ops, from 0.
    pub ordinal: u32,
}

/// How an op ended: the bytes it moved (0 for ops that move none; of [`OpKind::Hole`] the answer), or
/// why it failed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Which op.
    pub op: OpId,
    /// As the kernel puts it: bytes, or an error number below 0.
    answer: i64,
}

impl Completion {
    /// `op` ended so.
    #[inline]
    pub fn new(op: OpId, result: Result<u64, Errno>) -> Completion {
        let answer = match result {
            Ok(moved) => moved as i64,
            Err(Errno(number)) => -i64::from(number),
        };
        Completion { op, answer }
    }

    /// As the kernel answers.
    #[inline(always)]
    pub(crate) fn raw(op: OpId, answer: i64) -> Completion {
        Completion { op, answer }
    }

    /// As the kernel puts it: bytes, or an error number below 0.
    #[inline(always)]
    pub(crate) fn answer(self) -> i64 {
        self.answer
    }

    /// Bytes moved, or why it failed.
    #[inline]
    pub fn result(self) -> Result<u64, Errno> {
        u64::try_from(self.answer)
            .map_err(|_| Errno(i32::try_from(self.answer.wrapping_neg()).unwrap_or(Errno::IO.0)))
    }

    /// Did it move `len` bytes, no less?
    #[inline(always)]
    pub(crate) fn is(self, len: u64) -> bool {
        self.answer as u64 == len
    }
}

impl std::fmt::Debug for Completion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}: {:?}", self.op, self.result())
    }
}

/// Whose memory a segment is part of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Base {
    /// The memory that a request was submitted with.
    Guest(ReqId),
    /// A buffer of the engine's pool.
    Pool(BufId),
    /// A region that a node holds.
    Region(RegionId),
    /// As many zeros as wanted; only to write from.
    Zeros,
}

/// A piece of memory: `len` bytes at `off` of `base`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Seg {
    /// Whose memory.
    pub base: Base,
    /// First byte.
    pub off: u32,
    /// Bytes.
    pub len: u32,
}

impl Seg {
    /// `len` bytes at `off` of this segment.
    #[must_use]
    #[inline]
    pub fn slice(self, off: u32, len: u32) -> Seg {
        debug_assert!(off as u64 + len as u64 <= self.len as u64);
        let off = if self.base == Base::Zeros { 0 } else { self.off + off };
        Seg { base: self.base, off, len }
    }

    /// Have they a byte in common?
    pub fn overlaps(&self, other: &Seg) -> bool {
        let end = |seg: &Seg| u64::from(seg.off) + u64::from(seg.len);
        self.base == other.base
            && u64::from(self.off) < end(other)
            && u64::from(other.off) < end(self)
    }

    /// `len` zeros to write from.
    #[inline]
    pub fn zeros(len: u32) -> Seg {
        Seg { base: Base::Zeros, off: 0, len }
    }
}

/// Up to three segments, in file order: what stands before the guest's bytes, they, and what
/// stands behind them.
#[derive(Clone, Copy)]
pub struct Segs {
    segs: [Seg; 3],
    count: u8,
}

impl Segs {
    /// No memory.
    #[inline]
    pub fn none() -> Segs {
        Segs { segs: [Seg::zeros(0); 3], count: 0 }
    }

    /// One segment.
    #[inline]
    pub fn one(seg: Seg) -> Segs {
        Segs { segs: [seg, Seg::zeros(0), Seg::zeros(0)], count: 1 }
    }

    /// Makes it this one segment.
    #[inline(always)]
    pub fn set(&mut self, seg: Seg) {
        self.segs[0] = seg;
        self.count = 1;
    }

    /// Appends a segment; an empty one is left out. Panics when a fourth is added.
    #[inline]
    pub fn push(&mut self, seg: Seg) {
        if seg.len > 0 {
            self.segs[self.count as usize] = seg;
            self.count += 1;
        }
    }

    /// The segment, if there is just one.
    #[inline(always)]
    pub fn only(&self) -> Option<Seg> {
        (self.count == 1).then_some(self.segs[0])
    }

    /// The segments.
    #[inline]
    pub fn as_slice(&self) -> &[Seg] {
        &self.segs[..self.count as usize]
    }

    /// Bytes in all.
    #[inline]
    pub fn len(&self) -> u64 {
        self.as_slice().iter().map(|s| s.len as u64).sum()
    }

    /// No bytes?
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `len` bytes from byte `skip` on.
    #[must_use]
    pub fn slice(&self, mut skip: u64, mut len: u64) -> Segs {
        let mut out = Segs::none();
        for seg in self.as_slice() {
            if len == 0 {
                break;
            }
            let here = seg.len as u64;
            if skip >= here {
                skip -= here;
                continue;
            }
            let take = len.min(here - skip);
            out.push(seg.slice(skip as u32, take as u32));
            len -= take;
            skip = 0;
        }
        debug_assert_eq!(len, 0, "slice past the end of the segments");
        out
    }
}

impl PartialEq for Segs {
    fn eq(&self, other: &Segs) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Segs {}

impl Hash for Segs {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.as_slice().hash(h);
    }
}

impl std::fmt::Debug for Segs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.as_slice()).finish()
    }
}
