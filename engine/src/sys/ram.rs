//! Memory that belongs to the embedder, such as a guest's RAM, lent for the time of a request.

use std::any::Any;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use smallvec::SmallVec;

/// One contiguous piece of borrowed memory, laid out as the kernel's `iovec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct RamPiece {
    /// First byte.
    pub base: *mut u8,
    /// Bytes.
    pub len: usize,
}

const _: () = {
    assert!(size_of::<RamPiece>() == size_of::<libc::iovec>());
    assert!(std::mem::offset_of!(RamPiece, base) == std::mem::offset_of!(libc::iovec, iov_base));
    assert!(std::mem::offset_of!(RamPiece, len) == std::mem::offset_of!(libc::iovec, iov_len));
};

// SAFETY: a piece is an address and a length. Whoever made the `Ram` around it promised that the
// memory may be used from wherever the engine runs until the request has finished.
unsafe impl Send for RamPiece {}

/// A scatter list over memory that the embedder owns.
///
/// It comes back with the finished request, so that a long list can be used again.
#[derive(Clone, Debug)]
pub struct Ram(Box<Pieces>);

#[derive(Clone, Debug, Default)]
struct Pieces {
    pieces: SmallVec<[RamPiece; 6]>,
    len: usize,
    /// The bits set in any address or length.
    bits: u32,
    /// It can only be written from.
    is_read_only: bool,
    /// What keeps the memory there, unless the embedder has promised to.
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl Ram {
    /// Lends `pieces` to the engine.
    ///
    /// # Safety
    /// Memory of a file that others may make shorter is not valid any more where the file has ended: touching it is a SIGBUS. Who
    /// lends such memory has the file sealed (F_SEAL_SHRINK), as monitors seal a guest's memfd.
    ///
    /// Until the request that this value (or a clone of it) was submitted with has come back from
    /// `Engine::poll`, every piece must stay valid for reads and writes, and no Rust reference to
    /// it may be held. Others, such as a running guest, may change the bytes: the engine treats
    /// them as bytes that can change at any time.
    pub unsafe fn new(pieces: impl IntoIterator<Item = RamPiece>) -> Ram {
        let mut ram = Ram(Box::default());
        // SAFETY: the caller's promise is the same.
        unsafe { ram.refill(pieces) };
        ram
    }

    /// Lends `pieces` instead, in the memory of this list: what comes back from one request can
    /// carry the next one without an allocation.
    ///
    /// # Safety
    /// As for [`Ram::new`].
    pub unsafe fn refill(&mut self, pieces: impl IntoIterator<Item = RamPiece>) {
        (self.0.owner, self.0.is_read_only) = (None, false);
        self.0.pieces.clear();
        self.0.pieces.extend(pieces.into_iter().filter(|p| p.len > 0));
        self.measure();
    }

    /// Lends `pieces` of what `owner` owns: it is kept for as long as this list, or a clone, is there. So
    /// a request may be [given up](crate::Engine::abandon), and the engine dropped, at any time.
    ///
    /// # Safety
    /// As long as `owner` is there, and this list, or a clone, every piece must stay valid for reads and writes, and no
    /// Rust reference to it may be held. Others may change the bytes, as for [`Ram::new`].
    pub unsafe fn owned(
        pieces: impl IntoIterator<Item = RamPiece>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Ram {
        // SAFETY: the caller's promise is about a longer time, since the list keeps the owner.
        let mut ram = unsafe { Ram::new(pieces) };
        ram.0.owner = Some(owner);
        ram
    }

    /// Memory of its own, `len` bytes of 0, in one piece, that is as far from being aligned as other memory with
    /// these bits below 4096 in its addresses and lengths: for doing again what was [recorded](crate::record).
    pub fn standing_in(len: usize, bits: u16) -> Ram {
        let mut memory = vec![0u8; len + 2 * 4096];
        let page = memory.as_ptr().addr().wrapping_neg() & 4095;
        let base = memory.as_mut_ptr().wrapping_add(page + usize::from(bits & 0xfff));
        let piece = RamPiece { base, len };
        // SAFETY: the bytes are the owner's, at the same place for as long as it is there, and nobody looks at them through it.
        let mut ram = unsafe { Ram::owned([piece], Arc::new(memory)) };
        ram.0.bits |= u32::from(bits);
        ram
    }

    /// The same, of memory that cannot be written (mapped without PROT_WRITE: a guest's ROM). A request that
    /// would fill it fails with [`Errno::BAD_MEMORY`](crate::units::Errno::BAD_MEMORY); without this the engine's own copies into it would be
    /// a SIGSEGV. `Ram::of_guest` (with the feature `vm-memory`) finds out by itself.
    #[must_use]
    pub fn read_only(mut self) -> Ram {
        self.0.is_read_only = true;
        self
    }

    /// Can it only be written from?
    #[inline(always)]
    pub(crate) fn is_read_only(&self) -> bool {
        self.0.is_read_only
    }

    /// Is what it leads into kept by it?
    pub fn has_owner(&self) -> bool {
        self.0.owner.is_some()
    }

    fn measure(&mut self) {
        self.0.len = self.0.pieces.iter().map(|p| p.len).sum();
        self.0.bits = self.0.pieces.iter().fold(0, |bits, p| bits | (p.base.addr() | p.len) as u32);
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// The bits that are set in any piece's address or length.
    #[inline(always)]
    pub(crate) fn misaligned_bits(&self) -> u32 {
        self.0.bits
    }

    /// No bytes?
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// The address of `len` bytes from byte `off` on, if all of this is one piece.
    #[inline]
    pub(crate) fn single(&self, off: usize, len: usize) -> Option<RamPiece> {
        let [piece] = self.0.pieces.as_slice() else { return None };
        assert!(off + len <= piece.len, "outside the lent memory");
        Some(RamPiece { base: piece.base.wrapping_add(off), len })
    }

    /// Calls `each` for the pieces of `len` bytes from byte `off` on.
    #[inline]
    pub(crate) fn pieces(&self, mut off: usize, mut len: usize, mut each: impl FnMut(RamPiece)) {
        assert!(
            off.checked_add(len).is_some_and(|end| end <= self.0.len),
            "outside the lent memory"
        );
        for piece in &self.0.pieces {
            if len == 0 {
                return;
            }
            if off >= piece.len {
                off -= piece.len;
                continue;
            }
            let take = len.min(piece.len - off);
            // SAFETY: off < piece.len, so the address is within the piece.
            each(RamPiece { base: unsafe { piece.base.add(off) }, len: take });
            len -= take;
            off = 0;
        }
    }

    /// Copies the bytes from `off` on into `target`.
    pub(crate) fn copy_to(&self, off: usize, target: &mut [u8]) {
        let mut at = 0;
        let len = target.len();
        self.pieces(off, len, |piece| {
            // SAFETY: the piece is valid for reads (contract of `new`), `target` has `len` bytes
            // and the pieces sum to `len`; a Rust slice cannot overlap lent memory.
            unsafe { piece.base.copy_to_nonoverlapping(target[at..].as_mut_ptr(), piece.len) };
            at += piece.len;
        });
    }

    /// Copies `source` to the bytes from `off` on.
    pub(crate) fn copy_from(&self, off: usize, source: &[u8]) {
        let mut at = 0;
        self.pieces(off, source.len(), |piece| {
            // SAFETY: as in `copy_to`, for writes.
            unsafe { piece.base.copy_from_nonoverlapping(source[at..].as_ptr(), piece.len) };
            at += piece.len;
        });
    }

    /// Sets `len` bytes from `off` on to zero.
    pub(crate) fn zero(&self, off: usize, len: usize) {
        // SAFETY: the piece is valid for writes (contract of `new`).
        self.pieces(off, len, |piece| unsafe { piece.base.write_bytes(0, piece.len) });
    }
}

/// With the feature `vm-memory`: guest RAM as Rust's virtual machine monitors have it. Nothing has
/// to be promised, for the list keeps the mappings that it leads into.
#[cfg(feature = "vm-memory")]
mod guest {
    use std::sync::Arc;

    use vm_memory::bitmap::Bitmap;
    use vm_memory::{
        Address, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
        GuestMemoryRegion,
    };

    use super::{Ram, RamPiece};

    impl Ram {
        /// Lends ranges of a guest's memory, each an address as the guest counts and a number of
        /// bytes: the scatter list of a virtqueue. A range may go on from one region to the next.
        ///
        /// A list with a region that is mapped for reading only is [read-only](Ram::read_only).
        ///
        /// The memory stays mapped for as long as the list is there, also if the guest loses it.
        /// What a request has read into it is not noted in a bitmap of dirty pages: the embedder
        /// does that.
        ///
        /// # Errors
        /// A range is not, or not wholly, in the guest's memory; or is in a region that is mapped
        /// only while it is used (grants of Xen).
        pub fn of_guest<B: Bitmap + Send + Sync + 'static>(
            memory: &Arc<GuestMemoryMmap<B>>,
            ranges: impl IntoIterator<Item = (GuestAddress, usize)>,
        ) -> Result<Ram, GuestMemoryError> {
            let mut ram = Ram(Box::default());
            ram.refill_of_guest(memory, ranges)?;
            Ok(ram)
        }

        /// As [`Ram::of_guest`], in the memory of this list. After an error it is empty.
        ///
        /// # Errors
        /// As for [`Ram::of_guest`].
        pub fn refill_of_guest<B: Bitmap + Send + Sync + 'static>(
            &mut self,
            memory: &Arc<GuestMemoryMmap<B>>,
            ranges: impl IntoIterator<Item = (GuestAddress, usize)>,
        ) -> Result<(), GuestMemoryError> {
            self.0.pieces.clear();
            self.0.is_read_only = false;
            let mut ranges = ranges.into_iter();
            let added = ranges.try_for_each(|(at, len)| self.add_of_guest(memory, at, len));
            if added.is_err() {
                self.0.pieces.clear();
            }
            // Every piece leads into it, and it does not unmap anything before it is dropped; no
            // reference to its bytes can be had from safe code.
            self.0.owner = Some(Arc::<GuestMemoryMmap<B>>::clone(memory));
            self.measure();
            added
        }

        fn add_of_guest<B: Bitmap>(
            &mut self,
            memory: &GuestMemoryMmap<B>,
            mut at: GuestAddress,
            mut len: usize,
        ) -> Result<(), GuestMemoryError> {
            while len > 0 {
                let (region, within) =
                    memory.to_region_addr(at).ok_or(GuestMemoryError::InvalidGuestAddress(at))?;
                if region.as_ptr().is_null() {
                    return Err(GuestMemoryError::HostAddressNotAvailable);
                }
                self.0.is_read_only |= region.prot() & libc::PROT_WRITE == 0;
                let left = region.len() - within.raw_value();
                let take = len.min(usize::try_from(left).unwrap_or(usize::MAX));
                self.0.pieces.push(RamPiece { base: region.get_host_address(within)?, len: take });
                len -= take;
                if len > 0 {
                    let next = at.checked_add(take as u64);
                    at = next.ok_or(GuestMemoryError::InvalidGuestAddress(at))?;
                }
            }
            Ok(())
        }
    }
}

impl Hash for Ram {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.len.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{Buf, Mem};
    use crate::op::{Op, OpKind, Segs, Target};
    use crate::step::{Chore, Cx, Driver, Event, Io, IoKind, Step};
    use crate::sys::aio::{Aio, AioOptions};
    use crate::sys::clock;
    use crate::sys::disk::{Create, DiskFile, DiskOptions};
    use crate::sys::syscalls::wait_readable;
    use crate::units::{Errno, FileId, Time};
    use crate::{Engine, Limits};
    use std::os::fd::AsRawFd;

    /// The file is the disk.
    struct Through(FileId);

    impl Driver for Through {
        type State = ();
        const STATES: &'static [&'static str] = &["op"];
        fn label(_: &()) -> usize {
            0
        }
        fn size(&self) -> u64 {
            1 << 20
        }
        fn uses(&self, file: FileId) -> bool {
            file == self.0
        }
        fn begin(&mut self, cx: &mut Cx<'_>) -> Step<()> {
            let io = cx.io();
            let segs = Segs::one(cx.guest(0, io.len));
            cx.issue(match io.kind {
                IoKind::Read => Op::read(Target::File(self.0), io.offset, segs),
                IoKind::Write { .. } => Op::write(self.0, io.offset, segs),
                _ => Op::bare(OpKind::Flush, self.0, 0, 0),
            });
            Step::Last { label: 0 }
        }
        fn chore(&mut self, _: Chore) -> Option<()> {
            None
        }
        fn deadline(&self) -> Option<Time> {
            None
        }
        fn step(&mut self, (): (), _: Event, _: &mut Cx<'_>) -> Step<()> {
            Step::Done(Err(Errno::INVALID))
        }
    }

    struct Rig {
        engine: Engine<Through, Aio>,
        node: crate::units::NodeId,
        _folder: tempfile::TempDir,
    }

    impl Rig {
        fn new() -> Rig {
            // Beside the test program: a file system that can be written past its cache.
            let exe = std::env::current_exe().expect("a path");
            let folder = exe.parent().expect("it is in a folder");
            let folder = tempfile::tempdir_in(folder).expect("a folder");
            let options =
                DiskOptions { write: true, direct: true, create: Create::New, no_follow: false };
            let file = DiskFile::open(folder.path().join("disk"), &options).expect("it opens");
            let backend = Aio::new(AioOptions::default()).expect("native AIO");
            let limits = Limits { bounce_buffers: 1, buffer_size: 4096, ..Limits::default() };
            let mut engine = Engine::new(backend, limits);
            let (file, _) = engine.attach(file).expect("it attaches");
            let node = engine.add(Through(file));
            Rig { engine, node, _folder: folder }
        }

        fn run(&mut self, io: Io, mem: impl Into<Mem>) -> Mem {
            self.engine.submit(self.node, io, mem, 0).expect("room");
            loop {
                self.engine.run(clock());
                if let Some(done) = self.engine.poll() {
                    assert_eq!(done.result, Ok(()), "{io:?}");
                    return done.mem;
                }
                let fd = self.engine.fd().expect("it has one").as_raw_fd();
                assert!(wait_readable(fd, 20_000));
            }
        }
    }

    /// Memory cut into pieces of these lengths, each `skew` bytes past a page, with guards around.
    struct Guest {
        pieces: Vec<(Buf, usize)>,
        skew: usize,
    }

    impl Guest {
        fn new(lens: &[usize], skew: usize) -> Guest {
            let pieces = lens.iter().map(|&len| {
                let mut buf = Buf::zeroed(skew + len + 64);
                buf.fill(0xee);
                (buf, len)
            });
            Guest { pieces: pieces.collect(), skew }
        }

        fn len(&self) -> u64 {
            self.pieces.iter().map(|(_, len)| *len as u64).sum()
        }

        fn lend(&mut self) -> Ram {
            let skew = self.skew;
            let piece = |(buf, len): &mut (Buf, usize)| {
                assert!(skew + *len <= buf.len());
                RamPiece { base: buf.as_mut_ptr().wrapping_add(skew), len: *len }
            };
            let pieces: Vec<RamPiece> = self.pieces.iter_mut().map(piece).collect();
            // SAFETY: the buffers live, and nobody looks at them, until `Rig::run` has polled the
            // request's end; it does not return before.
            unsafe { Ram::new(pieces) }
        }

        fn fill(&mut self, bytes: &[u8]) {
            let mut at = 0;
            for (buf, len) in &mut self.pieces {
                buf[self.skew..self.skew + *len].copy_from_slice(&bytes[at..at + *len]);
                at += *len;
            }
        }

        fn bytes(&self) -> Vec<u8> {
            let mut bytes = Vec::new();
            for (buf, len) in &self.pieces {
                let (before, rest) = buf.split_at(self.skew);
                assert!(before.iter().chain(&rest[*len..]).all(|&b| b == 0xee), "a guard is gone");
                bytes.extend_from_slice(&rest[..*len]);
            }
            bytes
        }
    }

    fn pattern(len: u64, seed: u64) -> Vec<u8> {
        (0..len).map(|at| (at * 31 + at / 256 + seed) as u8).collect()
    }

    #[test]
    fn lists_of_any_lengths_at_any_address_are_read_and_written_right() {
        let many = vec![7; 3000];
        let sectors = vec![512; 2500]; // more than the kernel takes in one call
        let lists: &[&[usize]] = &[
            &[4096],
            &[1],
            &[4096, 4096, 8192],
            &[511, 1],
            &[3, 4090, 3],
            &[0, 512, 0, 512],
            &[4095, 4097, 1, 12_287],
            &[100_000, 33],
            &many,
            &sectors[..1200],
        ];
        let mut rig = Rig::new();
        let mut disk = vec![0; 1 << 20];
        for (n, &list) in lists.iter().enumerate() {
            for skew in [0, 1, 512, 513] {
                for offset in [0, 1, 4095, 65_536] {
                    let mut guest = Guest::new(list, skew);
                    let bytes = pattern(guest.len(), (n * 97 + skew + offset) as u64);
                    guest.fill(&bytes);
                    disk[offset..offset + bytes.len()].copy_from_slice(&bytes);
                    let ram = guest.lend();
                    let back = rig.run(Io::write(offset as u64, guest.len()), ram);
                    assert!(matches!(back, Mem::Ram(ram) if ram.len() as u64 == guest.len()));
                    assert!(guest.bytes() == bytes, "writing changed what was written");

                    let mut guest = Guest::new(list, skew ^ 1);
                    let ram = guest.lend();
                    rig.run(Io::read(offset as u64, guest.len()), ram);
                    assert!(guest.bytes() == bytes, "list {n}, skew {skew}, at {offset}");
                }
            }
        }
        // What was beside is untouched.
        let mut guest = Guest::new(&[1 << 20], 0);
        let ram = guest.lend();
        rig.run(Io::read(0, 1 << 20), ram);
        assert!(guest.bytes() == disk);
    }

    #[test]
    fn a_list_longer_than_the_kernel_takes_is_done_in_parts() {
        let mut rig = Rig::new();
        let lens = vec![512; 2000];
        let mut guest = Guest::new(&lens, 0);
        let bytes = pattern(guest.len(), 3);
        guest.fill(&bytes);
        let ram = guest.lend();
        rig.run(Io::write(512, guest.len()), ram);
        let mut guest = Guest::new(&lens, 0);
        let ram = guest.lend();
        rig.run(Io::read(512, guest.len()), ram);
        assert!(guest.bytes() == bytes);
        assert!(rig.engine.ops().is_empty());
    }

    #[cfg(feature = "vm-memory")]
    mod of_a_guest {
        use std::sync::{Arc, Weak};

        use vm_memory::mmap::MmapRegionBuilder;
        use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap, GuestRegionMmap};

        use super::{Errno, Io, Mem, Ram, Rig, pattern};

        /// Two regions side by side, and one apart.
        fn memory() -> Arc<GuestMemoryMmap<()>> {
            let at = |at, len| (GuestAddress(at), len);
            let ranges = [at(0x1000, 0x2000), at(0x3000, 0x1000), at(0x9000, 0x1000)];
            Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("it is mapped"))
        }

        #[test]
        fn lists_are_read_and_written_right_across_regions() {
            let mut rig = Rig::new();
            let memory = memory();
            let bytes = pattern(0x1234 + 7, 5);
            let ranges = [(GuestAddress(0x2345), 0x1234), (GuestAddress(0x9001), 7)];
            memory.write_slice(&bytes[..0x1234], ranges[0].0).expect("it is there");
            memory.write_slice(&bytes[0x1234..], ranges[1].0).expect("it is there");
            let ram = Ram::of_guest(&memory, ranges).expect("it is there");
            assert_eq!(ram.len(), bytes.len());
            let mem = rig.run(Io::write(513, bytes.len() as u64), ram);

            let Mem::Ram(mut ram) = mem else { panic!("{mem:?}") };
            let back = [(GuestAddress(0x1001), bytes.len())];
            ram.refill_of_guest(&memory, back).expect("it is there");
            rig.run(Io::read(513, bytes.len() as u64), ram);
            let mut got = vec![0; bytes.len() + 2];
            memory.read_slice(&mut got, GuestAddress(0x1000)).expect("it is there");
            assert!(got[1..=bytes.len()] == bytes && got[0] == 0 && got[bytes.len() + 1] == 0);
        }

        #[test]
        fn what_is_not_in_it_is_refused_and_nothing_lent() {
            let memory = memory();
            let beyond = [
                (GuestAddress(0), 1),
                (GuestAddress(0x3fff), 2),
                (GuestAddress(0x9000), 0x1001),
                (GuestAddress(u64::MAX), 2),
                (GuestAddress(0x1000), usize::MAX),
            ];
            for range in beyond {
                let good = (GuestAddress(0x1000), 16);
                let mut ram = Ram::of_guest(&memory, [good]).expect("it is there");
                let refused = ram.refill_of_guest(&memory, [good, range]);
                assert!(
                    matches!(refused, Err(GuestMemoryError::InvalidGuestAddress(_))),
                    "{range:?}: {refused:?}"
                );
                assert!(ram.is_empty() && Ram::of_guest(&memory, [range]).is_err());
            }
            let empty = Ram::of_guest(&memory, [(GuestAddress(0), 0)]).expect("no bytes of it");
            assert!(empty.is_empty());
        }

        #[test]
        fn memory_that_cannot_be_written_is_written_from_only() {
            let mut rig = Rig::new();
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let rom = MmapRegionBuilder::new(0x1000).with_mmap_prot(libc::PROT_READ);
            let rom = rom.with_mmap_flags(flags).build().expect("it is mapped");
            let rom = GuestRegionMmap::new(rom, GuestAddress(0x4000)).expect("it fits");
            let ram = GuestRegionMmap::from_range(GuestAddress(0x3000), 0x1000, None);
            let regions = vec![ram.expect("it is mapped"), rom];
            let memory = GuestMemoryMmap::<()>::from_regions(regions);
            let memory = Arc::new(memory.expect("they are apart"));
            for (at, len) in [(0x4000, 512), (0x3f00, 512), (0x4000, 511)] {
                let range = [(GuestAddress(at), len)];
                let list = || Ram::of_guest(&memory, range).expect("it is there");
                rig.run(Io::write(0, len as u64), list());
                rig.engine.submit(rig.node, Io::read(0, len as u64), list(), 0).expect("room");
                let ended = rig.engine.poll().expect("at once");
                assert_eq!(ended.result, Err(Errno::BAD_MEMORY), "{at:#x}");
                // The same list, elsewhere.
                let mut list = ended.mem.into_ram().expect("it comes back");
                list.refill_of_guest(&memory, [(GuestAddress(0x3000), len)]).expect("it is there");
                rig.run(Io::read(0, len as u64), list);
            }
        }

        #[test]
        fn memory_stays_for_as_long_as_a_list_leads_into_it() {
            let memory = memory();
            let there: Weak<GuestMemoryMmap<()>> = Arc::downgrade(&memory);
            let ram = Ram::of_guest(&memory, [(GuestAddress(0x1000), 512)]).expect("it is there");
            let mut clone = ram.clone();
            drop((memory, ram));
            let mut bytes = [1; 512];
            clone.copy_to(0, &mut bytes);
            assert_eq!(bytes, [0; 512]);
            let other = self::memory();
            clone.refill_of_guest(&other, []).expect("nothing is lent");
            assert!(there.upgrade().is_none());
        }
    }
}
