//! What a chain of descriptors asks for: virtio-blk's requests, as plain logic.
//!
//! A chain is two strings of bytes, whatever pieces they are in: what the device reads (a header, then
//! data), and what it writes (data, then one byte that says how it went). All numbers in it are the
//! guest's, and may be anything.

use std::mem::offset_of;
use std::ops::Deref;
use std::sync::Arc;

use cowbell_engine::NodeLimits;
use cowbell_engine::mem::Mem;
use cowbell_engine::step::Io;
use cowbell_engine::sys::ram::Ram;
use cowbell_engine::units::Errno;
use virtio_bindings::bindings::virtio_blk::*;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::serve::vhost::queue::Guest;

/// The unit of the disk's addresses.
const SECTOR: u64 = 512;
/// Pieces of data in a request.
const SEGMENTS_MAX: u32 = 254;
/// Descriptors in a chain: those of the data, of a header and of a status that are in pieces.
const DESCRIPTORS_MAX: usize = 1024;
/// Sectors that one request discards or zeroes at most: 2 GiB.
const RANGE_MAX: u32 = 1 << 22;
/// Bytes of the configuration that can be asked for: there is nothing behind what we know.
const CONFIG: usize = 256;
/// What comes before a request's data.
const HEADER: usize = size_of::<virtio_blk_outhdr>();

/// What a guest is told of its disk.
#[derive(Debug)]
pub struct Facts {
    /// Of the device and its rings, by bits.
    pub features: u64,
    config: [u8; CONFIG],
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    sectors: u64,
}

impl Facts {
    /// Of the disk with this name.
    pub fn new(name: &str, limits: &NodeLimits, read_only: bool, queues: u16) -> Facts {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        if read_only {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        let sectors = limits.size / SECTOR;
        let in_sectors = |bytes: u64| (bytes / SECTOR).max(1);
        let align = in_sectors(limits.request_align.into());
        let unit = u32::try_from(in_sectors(limits.unit)).unwrap_or(1);
        let mut config = [0; CONFIG];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        type C = virtio_blk_config;
        put(offset_of!(C, capacity), &sectors.to_le_bytes());
        put(offset_of!(C, seg_max), &SEGMENTS_MAX.to_le_bytes());
        put(offset_of!(C, blk_size), &(SECTOR as u32).to_le_bytes());
        put(offset_of!(C, physical_block_exp), &[align.ilog2() as u8]);
        put(offset_of!(C, min_io_size), &u16::try_from(align).unwrap_or(1).to_le_bytes());
        put(offset_of!(C, opt_io_size), &unit.to_le_bytes());
        put(offset_of!(C, num_queues), &queues.to_le_bytes());
        put(offset_of!(C, max_discard_sectors), &RANGE_MAX.to_le_bytes());
        put(offset_of!(C, max_discard_seg), &1_u32.to_le_bytes());
        put(offset_of!(C, discard_sector_alignment), &unit.to_le_bytes());
        put(offset_of!(C, max_write_zeroes_sectors), &RANGE_MAX.to_le_bytes());
        put(offset_of!(C, max_write_zeroes_seg), &1_u32.to_le_bytes());
        put(offset_of!(C, write_zeroes_may_unmap), &[1]);
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        id.iter_mut().zip(name.bytes()).for_each(|(to, byte)| *to = byte);
        let features = bits.into_iter().fold(0, |all, bit| all | 1 << bit);
        Facts { features, config, id, sectors }
    }

    /// A part of the configuration.
    pub fn config(&self, offset: u32, len: u32) -> Option<&[u8]> {
        let offset = offset as usize;
        self.config.get(offset..offset.checked_add(len as usize)?)
    }
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// Its first descriptor.
    pub head: u16,
    /// Where it is said how it went.
    pub status: GuestAddress,
    pub todo: Todo,
}

/// What is to be done.
#[derive(Debug)]
pub enum Todo {
    /// This.
    Submit(Io, Mem),
    /// Nothing more: how it went, and how many bytes of data were written into the guest's memory.
    Answer(u8, u32),
}

/// A chain that has no place for an answer, or no header.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed;

/// A piece of the guest's memory.
type Piece = (GuestAddress, usize);

/// Understands requests. It is kept for its memory alone.
#[derive(Debug, Default)]
pub struct Parser {
    readable: Vec<Piece>,
    writable: Vec<Piece>,
}

impl Parser {
    /// What does this chain ask for?
    ///
    /// # Errors
    /// It is none of a request's.
    pub fn parse<M: Clone + Deref<Target = Guest>>(
        &mut self,
        chain: DescriptorChain<M>,
        guest: &Arc<Guest>,
        facts: &Facts,
    ) -> Result<Request, Malformed> {
        let head = chain.head_index();
        self.take_pieces(chain)?;
        let status = self.take_status(guest).ok_or(Malformed)?;
        let mut header = [0; HEADER];
        take_bytes(&mut self.readable, guest, &mut header).ok_or(Malformed)?;
        let (kind, rest) = header.split_first_chunk().expect("it is longer");
        let (_, sector) = rest.split_last_chunk().expect("it is longer");
        let kind = u32::from_le_bytes(*kind);
        let todo = self.todo(kind, u64::from_le_bytes(*sector), guest, facts);
        let todo = todo.unwrap_or_else(|status| Todo::Answer(status as u8, 0));
        Ok(Request { head, status, todo })
    }

    fn take_pieces<M: Clone + Deref<Target = Guest>>(
        &mut self,
        chain: DescriptorChain<M>,
    ) -> Result<(), Malformed> {
        self.readable.clear();
        self.writable.clear();
        // A chain that ends although there is more of it leads somewhere where nothing is.
        let mut is_whole = false;
        for (at, piece) in chain.enumerate() {
            let may_be_there = piece.is_write_only() || self.writable.is_empty();
            if at >= DESCRIPTORS_MAX || !may_be_there {
                return Err(Malformed);
            }
            is_whole = !piece.has_next();
            let pieces =
                if piece.is_write_only() { &mut self.writable } else { &mut self.readable };
            if piece.len() > 0 {
                pieces.push((piece.addr(), piece.len() as usize));
            }
        }
        if is_whole { Ok(()) } else { Err(Malformed) }
    }

    /// The last byte that can be written.
    fn take_status(&mut self, guest: &Guest) -> Option<GuestAddress> {
        let (at, len) = self.writable.last_mut()?;
        *len -= 1;
        let status = at.checked_add(*len as u64)?;
        if *len == 0 {
            self.writable.pop();
        }
        guest.address_in_range(status).then_some(status)
    }

    /// What is to be done, or why that is not done.
    fn todo(
        &mut self,
        kind: u32,
        sector: u64,
        guest: &Arc<Guest>,
        facts: &Facts,
    ) -> Result<Todo, u32> {
        match kind {
            VIRTIO_BLK_T_IN => {
                let (offset, len) = range(sector, &self.writable, facts)?;
                Ok(Todo::Submit(Io::read(offset, len), lend(guest, &self.writable)?))
            }
            VIRTIO_BLK_T_OUT => {
                let (offset, len) = range(sector, &self.readable, facts)?;
                Ok(Todo::Submit(Io::write(offset, len), lend(guest, &self.readable)?))
            }
            VIRTIO_BLK_T_FLUSH => Ok(Todo::Submit(Io::flush(), Mem::None)),
            VIRTIO_BLK_T_GET_ID => {
                let mut left = facts.id.as_slice();
                for &(at, len) in &self.writable {
                    let (now, later) = left.split_at(len.min(left.len()));
                    guest.write_slice(now, at).map_err(|_| VIRTIO_BLK_S_IOERR)?;
                    left = later;
                }
                Ok(Todo::Answer(VIRTIO_BLK_S_OK as u8, (facts.id.len() - left.len()) as u32))
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.zeros(kind == VIRTIO_BLK_T_DISCARD, guest, facts)
            }
            _ => Err(VIRTIO_BLK_S_UNSUPP),
        }
    }

    /// One range, which is the data.
    fn zeros(&mut self, discard: bool, guest: &Guest, facts: &Facts) -> Result<Todo, u32> {
        type Range = virtio_blk_discard_write_zeroes;
        let mut bytes = [0; size_of::<Range>()];
        take_bytes(&mut self.readable, guest, &mut bytes).ok_or(VIRTIO_BLK_S_IOERR)?;
        if !self.readable.is_empty() {
            return Err(VIRTIO_BLK_S_UNSUPP);
        }
        let (sector, rest) = bytes.split_first_chunk().expect("it is longer");
        let (sectors, flags) = rest.split_first_chunk().expect("it is longer");
        let sector = u64::from_le_bytes(*sector);
        let sectors = u32::from_le_bytes(*sectors);
        let flags = u32::from_le_bytes(*flags.first_chunk().expect("it is as long"));
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && unmap {
            return Err(VIRTIO_BLK_S_UNSUPP);
        }
        let end = sector.checked_add(sectors.into());
        if sectors > RANGE_MAX || end.is_none_or(|end| end > facts.sectors) {
            return Err(VIRTIO_BLK_S_IOERR);
        }
        let (offset, len) = (sector * SECTOR, u64::from(sectors) * SECTOR);
        let io = if discard { Io::discard(offset, len) } else { Io::zero(offset, len, unmap) };
        Ok(Todo::Submit(io, Mem::None))
    }
}

/// The bytes of the disk that go to or come from these pieces.
fn range(sector: u64, pieces: &[Piece], facts: &Facts) -> Result<(u64, u64), u32> {
    let len: u64 = pieces.iter().map(|&(_, len)| len as u64).sum();
    let end = sector.checked_add(len / SECTOR);
    if !len.is_multiple_of(SECTOR) || end.is_none_or(|end| end > facts.sectors) {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    Ok((sector * SECTOR, len))
}

fn lend(guest: &Arc<Guest>, pieces: &[Piece]) -> Result<Mem, u32> {
    let ram = Ram::of_guest(guest, pieces.iter().copied());
    ram.map(Mem::Ram).map_err(|_| VIRTIO_BLK_S_IOERR)
}

/// Takes the first bytes of all these pieces. `None`: there are not as many.
fn take_bytes(pieces: &mut Vec<Piece>, guest: &Guest, bytes: &mut [u8]) -> Option<()> {
    let (mut taken, mut whole) = (0, 0);
    for (at, len) in pieces.iter_mut() {
        let now = (*len).min(bytes.len() - taken);
        guest.read_slice(&mut bytes[taken..taken + now], *at).ok()?;
        taken += now;
        if now < *len {
            (*at, *len) = (at.checked_add(now as u64)?, *len - now);
            break;
        }
        whole += 1;
    }
    pieces.drain(..whole);
    (taken == bytes.len()).then_some(())
}

/// How a request went, as guests are told.
pub fn status_of(result: Result<(), Errno>) -> u8 {
    let status = match result {
        Ok(()) => VIRTIO_BLK_S_OK,
        Err(Errno::NOT_SUPPORTED) => VIRTIO_BLK_S_UNSUPP,
        Err(_) => VIRTIO_BLK_S_IOERR,
    };
    status as u8
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use cowbell_engine::step::IoKind;
    use rustix::event::{EventfdFlags, eventfd};
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;

    use super::*;
    use crate::serve::vhost::queue::{Places, Queue};

    const SIZE: u16 = 16;
    const SECTORS: u64 = 2048;
    const TABLE: u64 = 0;
    const AVAILABLE: u64 = 0x1000;
    const USED: u64 = 0x2000;
    const MEMORY: u64 = 1 << 20;

    fn facts() -> Facts {
        let limits = NodeLimits {
            size: SECTORS * SECTOR,
            is_writable: true,
            request_max: 1 << 31,
            request_align: 4096,
            memory_align: 512,
            unit: 65536,
        };
        Facts::new("a disk", &limits, false, 4)
    }

    /// A guest whose memory is of two regions, with a queue that runs.
    fn guest(event_index: bool) -> (Arc<Guest>, Queue) {
        let half = MEMORY as usize / 2;
        let regions = [(GuestAddress(0), half), (GuestAddress(half as u64), half)];
        let guest = Arc::new(Guest::from_ranges(&regions).expect("memory"));
        let mut queue = Queue::new();
        assert!(queue.set_size(SIZE.into()) && queue.set_base(0));
        let places = [TABLE, AVAILABLE, USED].map(GuestAddress);
        let [table, available, used] = places;
        queue
            .start(&guest, Places { table, available, used }, event_index, None)
            .expect("it is there");
        queue.is_enabled = true;
        (guest, queue)
    }

    fn put(guest: &Guest, at: u16, (addr, len, flags, next): (u64, u32, u32, u16)) {
        let one = RawDescriptor::from(Descriptor::new(addr, len, flags as u16, next));
        guest.write_obj(one, GuestAddress(TABLE + u64::from(at) * 16)).expect("memory");
    }

    fn offer(guest: &Guest, index: u16, head: u16) {
        let at = AVAILABLE + 4 + u64::from(index % SIZE) * 2;
        guest.write_obj(head, GuestAddress(at)).expect("memory");
        guest.write_obj(index.wrapping_add(1), GuestAddress(AVAILABLE + 2)).expect("memory");
    }

    fn random(state: &mut u64) -> u64 {
        *state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *state >> 24
    }

    #[test]
    fn whatever_is_in_a_table_what_is_asked_of_the_disk_is_within_it_and_fits() {
        let facts = facts();
        let mut parser = Parser::default();
        let mut seed = 1;
        let (mut submitted, mut answered, mut malformed) = (0, 0, 0);
        for _ in 0..20_000 {
            let (guest, mut queue) = guest(false);
            let mut below = |n: u64| random(&mut seed) % n;
            for at in 0..SIZE {
                let addr = match below(8) {
                    0 => below(u64::MAX),
                    1 => u64::MAX - below(16),
                    2 => MEMORY / 2 - below(1024),
                    3 => MEMORY - below(1024),
                    4 => TABLE,
                    _ => 0x3000,
                };
                let len = [16, 512, 512, 1, 0, 32, 1 << 20, u32::MAX][below(8) as usize];
                let flags = [0, 1, 1, 1, 2, 3, 2, 5][below(8) as usize];
                let next = if below(9) == 0 { 0 } else { at + 1 };
                put(&guest, at, (addr, len, flags, next));
            }
            // In every second table there is one that begins well.
            let is_better = below(2) == 0;
            if is_better {
                put(&guest, 0, (0x3000, 16, 1, 1));
            }
            let kind = [0, 1, 4, 8, 11, 13, 0, 1][below(8) as usize];
            guest.write_obj::<u32>(kind, GuestAddress(0x3000)).expect("memory");
            let sector = if below(4) == 0 { below(u64::MAX) } else { below(SECTORS + 2) };
            guest.write_obj(sector, GuestAddress(0x3008)).expect("memory");
            for at in 0..4 {
                let head = if is_better { 0 } else { below(u64::from(SIZE) + 1) as u16 };
                offer(&guest, at, head);
            }
            while queue.is_pending() {
                let Some(chain) = queue.take(&guest) else { break };
                match parser.parse(chain, &guest, &facts) {
                    Ok(Request { todo: Todo::Submit(io, mem), .. }) => {
                        submitted += 1;
                        assert!(io.end() <= SECTORS * SECTOR, "{io:?}");
                        let moves = matches!(io.kind, IoKind::Read | IoKind::Write { .. });
                        assert_eq!(mem.len() as u64, if moves { io.len } else { 0 });
                    }
                    Ok(_) => answered += 1,
                    Err(Malformed) => {
                        malformed += 1;
                        queue.refuse();
                    }
                }
            }
        }
        // All ways were taken.
        assert!(
            submitted > 500 && answered > 500 && malformed > 500,
            "{submitted} {answered} {malformed}"
        );
    }

    #[test]
    fn a_header_and_a_status_may_be_in_any_pieces() {
        let (guest, mut queue) = guest(true);
        guest.write_obj(VIRTIO_BLK_T_OUT, GuestAddress(0x3000)).expect("memory");
        guest.write_obj(5_u64, GuestAddress(0x3008)).expect("memory");
        // The header in three, the last one with the data, which goes on in the other region.
        put(&guest, 0, (0x3000, 5, 1, 1));
        put(&guest, 1, (0x3005, 3, 1, 2));
        put(&guest, 2, (0x3008, 8 + 100, 1, 3));
        put(&guest, 3, (MEMORY / 2 - 12, 412, 1, 4));
        put(&guest, 4, (0x4000, 0, 3, 5));
        put(&guest, 5, (0x4000, 7, 2, 0));
        offer(&guest, 0, 0);
        let chain = queue.take(&guest).expect("there is one");
        let request = Parser::default().parse(chain, &guest, &facts()).expect("it is one");
        assert_eq!((request.head, request.status), (0, GuestAddress(0x4006)));
        let Todo::Submit(io, mem) = request.todo else { panic!("{:?}", request.todo) };
        assert_eq!((io.offset, io.len, mem.len()), (5 * 512, 512, 512));
    }

    #[test]
    fn many_that_are_done_are_one_call_and_none_if_it_is_not_wanted() {
        let read = |fd: &File| {
            let mut count = [0; 8];
            let read = rustix::io::read(fd, &mut count);
            read.map_or(0, |_| u64::from_ne_bytes(count))
        };
        for (event_index, wanted) in [(false, true), (false, false), (true, true), (true, false)] {
            let (guest, mut queue) = guest(event_index);
            let fd: OwnedFd = eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd");
            let call = File::from(fd);
            queue.set_call(Some(call.try_clone().expect("a descriptor")));
            assert_eq!(read(&call), 1, "whatever was done before");
            let at = if event_index { AVAILABLE + 4 + u64::from(SIZE) * 2 } else { AVAILABLE };
            let says: u16 =
                if event_index { if wanted { 2 } else { 9 } } else { u16::from(!wanted) };
            guest.write_obj(says, GuestAddress(at)).expect("memory");
            put(&guest, 0, (0x3000, 16, 0, 0));
            for index in 0..4 {
                offer(&guest, index, 0);
                assert!(queue.take(&guest).is_some());
            }
            (0..4).for_each(|_| queue.done(&guest, 0, 1));
            queue.tell(&guest);
            assert_eq!(read(&call), u64::from(wanted), "{event_index}");
            queue.tell(&guest);
            assert_eq!(read(&call), 0, "once");
        }
    }

    #[test]
    fn an_index_that_jumps_breaks_its_queue() {
        let (guest, mut queue) = guest(true);
        guest.write_obj(SIZE + 1, GuestAddress(AVAILABLE + 2)).expect("memory");
        assert!(queue.take(&guest).is_none() && !queue.is_pending());
        queue.kicked();
        assert!(!queue.is_pending(), "it stays so");
    }
}
