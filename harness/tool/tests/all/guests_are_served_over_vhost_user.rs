//! `cowbell serve --vhost-user`: a guest's requests are done as a shadow does them, on several queues, in
//! any pieces; hostile rings and messages harm nobody else; images are left clean.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;

use blkio::{Blkio, ReqFlags};
use cowbell_engine::sys::clock;
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_blk::*;
use virtio_bindings::bindings::virtio_ring::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::common::{COWBELL, Place, Random, have_qemu, read};

/// The first region of the guest's memory has the rings and a part of the data; the second one lies behind
/// it, so that data go on from one to the other.
const REGION: u64 = 8 << 20;
/// A place in a queue is a request's: some descriptors, and data.
const SLOTS: u16 = 16;
const DESCRIPTORS: u16 = 8;
const SIZE: u16 = SLOTS * DESCRIPTORS;
const DATA: u64 = 128 << 10;
const QUEUES: usize = 3;
/// Of a queue's own memory.
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x3000;
const USED: u64 = 0x5000;
const HEADERS: u64 = 0x7000;
const TABLES: u64 = 0x8000;
const QUEUE: u64 = 0x10000;
/// Where the data begin: they go over the border of the regions.
const DATA_AT: u64 = 4 << 20;

struct Serving {
    child: Child,
    said: BufReader<ChildStdout>,
    socket: PathBuf,
}

impl Serving {
    fn start(place: &Place, args: &str) -> Serving {
        Serving::with_queues(place, QUEUES, args)
    }

    fn with_queues(place: &Place, queues: usize, args: &str) -> Serving {
        let mut command = Command::new(COWBELL);
        command.args(["serve", "--vhost-user", "v", "--queues", &queues.to_string()]);
        command.args(args.split_whitespace());
        let command = command.current_dir(place.dir.path()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let mut said = BufReader::new(child.stdout.take().expect("piped"));
        let mut first = String::new();
        said.read_line(&mut first).expect("it says something");
        assert!(first.contains("vhost-user:v") || args.contains("--nbd"), "{first}");
        Serving { child, said, socket: place.path("v") }
    }

    fn stop(mut self) -> String {
        let began = clock();
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill").success());
        let mut rest = String::new();
        self.said.read_to_string(&mut rest).expect("text");
        let status = self.child.wait().expect("it ends");
        let took = Duration::from_nanos(clock().since(began));
        assert!(status.success() && took < Duration::from_secs(10), "{status:?} after {took:?}");
        assert!(!self.socket.exists(), "the socket is removed");
        rest
    }

    /// Serves a guest who has just come.
    fn is_well(&self) {
        let mut guest = Guest::new(self, true);
        assert_eq!(guest.read(0, 4096).len(), 4096);
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A queue as its driver has it.
struct Ring {
    available: u16,
    used: u16,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
    free: Vec<u16>,
    /// What is in flight: bytes that it reads, and whether it is in a table of its own.
    asked: BTreeMap<u16, u32>,
}

/// A machine with a driver.
struct Guest {
    memory: GuestMemoryMmap,
    front: Frontend,
    rings: Vec<Ring>,
    event_index: bool,
    /// Where servers note what is in flight, if they do.
    inflight: Option<(VhostUserInflight, File)>,
}

impl Guest {
    fn new(serving: &Serving, event_index: bool) -> Guest {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("memory"));
        file.set_len(2 * REGION).expect("room");
        let file = std::sync::Arc::new(file);
        let region = |at| {
            let offset = FileOffset::from_arc(file.clone(), at);
            (GuestAddress(at), REGION as usize, Some(offset))
        };
        let memory = GuestMemoryMmap::from_ranges_with_files([region(0), region(REGION)]);
        let memory = memory.expect("it is mapped");
        let front = Guest::connect(serving, event_index);
        let mut guest = Guest { memory, front, rings: Vec::new(), event_index, inflight: None };
        guest.share_memory();
        (0..QUEUES).for_each(|at| guest.start_queue(at, 0));
        guest
    }

    /// A front end with all features of the server's.
    fn connect(serving: &Serving, event_index: bool) -> Frontend {
        let stream = UnixStream::connect(&serving.socket).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let mut front = Frontend::from_stream(stream, QUEUES as u64);
        front.set_owner().expect("owner");
        let features = front.get_features().expect("features");
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(features & protocol, protocol);
        let index = 1 << VIRTIO_RING_F_EVENT_IDX;
        let taken = if event_index { features } else { features & !index };
        let offered = front.get_protocol_features().expect("protocol features");
        assert!(
            offered.contains(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG)
        );
        front.set_protocol_features(offered).expect("protocol features");
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_features(taken).expect("features");
        assert_eq!(front.get_queue_num().expect("queues"), QUEUES as u64);
        front
    }

    /// What is in flight is noted from now on, and nothing is. The queues have to be started anew, from
    /// where they were.
    fn note_inflight(&mut self) -> Vec<u16> {
        let bases = (0..QUEUES).map(|at| self.front.get_vring_base(at).expect("base") as u16);
        let bases = bases.collect();
        let wanted = VhostUserInflight::new(0, 0, QUEUES as u16, SIZE);
        self.inflight = Some(self.front.get_inflight_fd(&wanted).expect("memory"));
        self.share_inflight();
        bases
    }

    fn share_inflight(&mut self) {
        let (inflight, file) = self.inflight.as_ref().expect("it is noted");
        self.front.set_inflight_fd(inflight, file.as_raw_fd()).expect("it is mapped");
    }

    /// Goes on with another server. All that was asked is still in the rings.
    fn reconnect(&mut self, serving: &Serving) {
        self.front = Guest::connect(serving, self.event_index);
        self.share_memory();
        self.share_inflight();
        for at in 0..QUEUES {
            // Nobody has said where the one before it was.
            let used = GuestAddress(at as u64 * QUEUE + USED + 2);
            let used = self.memory.load(used, Ordering::Acquire).expect("in memory");
            self.announce_queue(at, used);
        }
    }

    fn share_memory(&self) {
        let regions = self.memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions = regions.collect::<Result<Vec<_>, _>>().expect("they have files");
        self.front.set_mem_table(&regions).expect("memory");
    }

    fn theirs(&self, at: u64) -> u64 {
        self.memory.get_host_address(GuestAddress(at)).expect("in memory").addr() as u64
    }

    fn start_queue(&mut self, at: usize, base: u16) {
        let eventfd = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let ring = Ring {
            available: base,
            used: base,
            kick: eventfd(),
            call: eventfd(),
            error: eventfd(),
            free: (0..SLOTS).collect(),
            asked: BTreeMap::new(),
        };
        let place = at as u64 * QUEUE;
        self.put(place + AVAIL, 0_u16);
        self.put(place + AVAIL + 2, base);
        self.put(place + USED, 0_u16);
        self.put(place + USED + 2, base);
        if at == self.rings.len() {
            self.rings.push(ring);
        } else {
            self.rings[at] = ring;
        }
        self.announce_queue(at, base);
    }

    fn announce_queue(&mut self, at: usize, base: u16) {
        assert!(self.try_announce_queue(at, base), "it is a queue");
    }

    /// Tells the server of a queue. False: it wants nothing of it.
    fn try_announce_queue(&mut self, at: usize, base: u16) -> bool {
        let place = at as u64 * QUEUE;
        let data = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: self.theirs(place + TABLE),
            used_ring_addr: self.theirs(place + USED),
            avail_ring_addr: self.theirs(place + AVAIL),
            log_addr: None,
        };
        let (front, ring) = (&mut self.front, &self.rings[at]);
        front.set_vring_num(at, SIZE).is_ok()
            && front.set_vring_base(at, base).is_ok()
            && front.set_vring_addr(at, &data).is_ok()
            && front.set_vring_err(at, &ring.error).is_ok()
            && front.set_vring_kick(at, &ring.kick).is_ok()
            && front.set_vring_call(at, &ring.call).is_ok()
            && front.set_vring_enable(at, true).is_ok()
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).expect("in memory");
    }

    fn config(&mut self) -> Vec<u8> {
        let flags = VhostUserConfigFlags::empty();
        self.front.get_config(0, 60, flags, &[0; 60]).expect("config").1
    }

    fn data_at(queue: usize, slot: u16) -> u64 {
        DATA_AT + (queue as u64 * u64::from(SLOTS) + u64::from(slot)) * DATA
    }

    /// Puts a request into the queue, its data in so many pieces; it is kicked later.
    fn ask(&mut self, queue: usize, what: &Ask<'_>, pieces: u64, indirect: bool) -> u16 {
        let slot = self.rings[queue].free.pop().expect("there is room");
        let place = queue as u64 * QUEUE;
        let header_at = place + HEADERS + u64::from(slot) * 32;
        self.put(header_at, what.kind);
        self.put(header_at + 8, what.sector);
        self.put(header_at + 31, 0xff_u8);
        let data_at = Guest::data_at(queue, slot);
        if !what.data.is_empty() {
            self.memory.write_slice(what.data, GuestAddress(data_at)).expect("in memory");
        }
        let len = what.data.len() as u64 + u64::from(what.reads);
        let way = if what.reads > 0 { VRING_DESC_F_WRITE } else { 0 };
        let mut all = vec![(header_at, 16, 0)];
        let part = len / pieces;
        for at in 0..pieces {
            let this = if at + 1 == pieces { len - part * at } else { part };
            if this > 0 {
                all.push((data_at + part * at, this, way));
            }
        }
        all.push((header_at + 31, 1, VRING_DESC_F_WRITE));
        let first = slot * DESCRIPTORS;
        let (table, base) = match indirect {
            true => (place + TABLES + u64::from(slot) * 16 * 32, 0),
            false => (place + TABLE, first),
        };
        assert!(all.len() <= if indirect { 32 } else { DESCRIPTORS.into() });
        for (at, &(addr, len, way)) in all.iter().enumerate() {
            let next = if at + 1 < all.len() { VRING_DESC_F_NEXT } else { 0 };
            let index = base + at as u16;
            let one = Descriptor::new(addr, len as u32, (way | next) as u16, index + 1);
            self.put(table + u64::from(index) * 16, RawDescriptor::from(one));
        }
        if indirect {
            let flags = VRING_DESC_F_INDIRECT as u16;
            let one = Descriptor::new(table, all.len() as u32 * 16, flags, 0);
            self.put(place + TABLE + u64::from(first) * 16, RawDescriptor::from(one));
        }
        self.offer(queue, first);
        self.rings[queue].asked.insert(slot, what.reads);
        slot
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let place = queue as u64 * QUEUE;
        let ring = &mut self.rings[queue];
        let at = place + AVAIL + 4 + u64::from(ring.available % SIZE) * 2;
        ring.available = ring.available.wrapping_add(1);
        let available = ring.available;
        self.put(at, head);
        let at = GuestAddress(place + AVAIL + 2);
        self.memory.store(available, at, Ordering::Release).expect("in memory");
    }

    fn kick(&self, queue: usize) {
        self.rings[queue].kick.write(1).expect("a kick");
    }

    /// What of a queue is done: its place, how it went, what was read.
    fn done(&mut self, queue: usize) -> Vec<(u16, u8, Vec<u8>)> {
        let place = queue as u64 * QUEUE;
        let mut all = Vec::new();
        loop {
            let at = GuestAddress(place + USED + 2);
            let used: u16 = self.memory.load(at, Ordering::Acquire).expect("in memory");
            let ring = &mut self.rings[queue];
            if used == ring.used {
                return all;
            }
            let at = place + USED + 4 + u64::from(ring.used % SIZE) * 8;
            ring.used = ring.used.wrapping_add(1);
            let [head, len]: [u32; 2] =
                [0, 4].map(|by| self.memory.read_obj(GuestAddress(at + by)).expect("in memory"));
            let slot = head as u16 / DESCRIPTORS;
            let reads = ring.asked.remove(&slot).expect("it was asked");
            ring.free.push(slot);
            let at = place + HEADERS + u64::from(slot) * 32 + 31;
            let status: u8 = self.memory.read_obj(GuestAddress(at)).expect("in memory");
            assert_ne!(status, 0xff, "it is done, and nobody says how");
            let mut data = vec![0; reads as usize];
            if status == 0 {
                assert_eq!(len, reads + 1);
                let at = GuestAddress(Guest::data_at(queue, slot));
                self.memory.read_slice(&mut data, at).expect("in memory");
            }
            all.push((slot, status, data));
        }
    }

    /// Waits until something of a queue is done. How often it was called.
    fn wait(&mut self, queue: usize) -> Vec<(u16, u8, Vec<u8>)> {
        loop {
            if self.event_index {
                let at = queue as u64 * QUEUE + AVAIL + 4 + u64::from(SIZE) * 2;
                self.put(at, self.rings[queue].used);
                std::sync::atomic::fence(Ordering::SeqCst);
            }
            let done = self.done(queue);
            if !done.is_empty() {
                return done;
            }
            assert!(is_called(&self.rings[queue].call), "nobody calls");
        }
    }

    /// One request, and nothing else in its queue.
    fn one(&mut self, what: &Ask<'_>) -> (u8, Vec<u8>) {
        self.ask(0, what, 1, false);
        self.kick(0);
        let mut done = self.wait(0);
        assert_eq!(done.len(), 1);
        let (_, status, data) = done.remove(0);
        (status, data)
    }

    fn read(&mut self, sector: u64, len: u32) -> Vec<u8> {
        let (status, data) = self.one(&Ask::read(sector, len));
        assert_eq!(status, 0);
        data
    }

    fn write(&mut self, sector: u64, data: &[u8]) {
        assert_eq!(self.one(&Ask::write(sector, data)).0, 0);
    }
}

/// Was there a call, or is there one soon?
fn is_called(fd: &EventFd) -> bool {
    (0..200_000).any(|_| {
        let is_called = fd.read().is_ok();
        if !is_called {
            sleep(Duration::from_micros(100));
        }
        is_called
    })
}

#[derive(Clone, Copy, Debug)]
struct Ask<'a> {
    kind: u32,
    sector: u64,
    data: &'a [u8],
    reads: u32,
}

impl Ask<'_> {
    fn read(sector: u64, reads: u32) -> Ask<'static> {
        Ask { kind: VIRTIO_BLK_T_IN, sector, data: &[], reads }
    }

    fn write(sector: u64, data: &[u8]) -> Ask<'_> {
        Ask { kind: VIRTIO_BLK_T_OUT, sector, data, reads: 0 }
    }

    fn flush() -> Ask<'static> {
        Ask { kind: VIRTIO_BLK_T_FLUSH, sector: 0, data: &[], reads: 0 }
    }
}

fn zeros(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let sector = sector.to_le_bytes();
    [&sector[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn what_is_written_is_read() {
    let place = Place::new();
    place.ok("cowbell create -f qcow2 d 64M");
    let serving = Serving::start(&place, "d");
    let mut guest = Guest::new(&serving, true);
    let mut data = vec![0; 64 << 10];
    Random(1).fill(&mut data);
    guest.write(129, &data);
    assert_eq!(guest.one(&Ask::flush()).0, 0);
    assert_eq!(guest.read(129, 64 << 10), data);
    assert_eq!(guest.read(0, 512), [0; 512]);
    drop(guest);
    serving.is_well();
    serving.stop();
    assert_eq!(
        place.ok("cowbell check d").lines().next(),
        Some("No errors were found on the image.")
    );
}

/// All kinds of requests on all queues, in any pieces, several at a time, none over another's range.
fn mix(guest: &mut Guest, shadow: &mut [u8], random: &mut Random, rounds: u64) {
    let sectors = shadow.len() as u64 / 512;
    let mut data = vec![0; DATA as usize];
    for round in 0..rounds {
        let mut asked = BTreeMap::new();
        // A part of the disk for each: which of them comes first does not matter.
        let part = sectors / 24;
        for at in 0..24 {
            let queue = random.below(QUEUES as u64) as usize;
            if guest.rings[queue].free.is_empty() {
                continue;
            }
            let len = 1 + random.below(200.min(part));
            let sector = at * part + random.below(part - len + 1);
            let range = (sector * 512) as usize..((sector + len) * 512) as usize;
            let indirect = random.below(2) == 0;
            let pieces = 1 + random.below(if indirect { 24 } else { 4 });
            let kind = random.below(8);
            let range_of = |unmap| zeros(sector, len as u32, unmap);
            let slot = match kind {
                0..3 => {
                    random.fill(&mut data[..range.len()]);
                    shadow[range.clone()].copy_from_slice(&data[..range.len()]);
                    let what = Ask::write(sector, &data[..range.len()]);
                    guest.ask(queue, &what, pieces, indirect)
                }
                3 => {
                    shadow[range.clone()].fill(0);
                    let range = range_of((round % 2) as u32);
                    let what =
                        Ask { kind: VIRTIO_BLK_T_WRITE_ZEROES, sector: 0, data: &range, reads: 0 };
                    guest.ask(queue, &what, 1, indirect)
                }
                4 => guest.ask(queue, &Ask::flush(), 1, false),
                _ => guest.ask(queue, &Ask::read(sector, range.len() as u32), pieces, indirect),
            };
            asked.insert((queue, slot), (kind, range));
        }
        (0..QUEUES).for_each(|queue| guest.kick(queue));
        if round % 4 == 0 {
            // A table of memory that comes in the middle takes nothing from what was begun.
            sleep(Duration::from_micros(round * 20));
            guest.share_memory();
        }
        for queue in 0..QUEUES {
            while !guest.rings[queue].asked.is_empty() {
                for (slot, status, data) in guest.wait(queue) {
                    let (kind, range) = asked.remove(&(queue, slot)).expect("it was asked");
                    assert_eq!(status, 0, "{kind}");
                    if kind > 4 {
                        assert!(data == shadow[range.clone()], "{range:?} reads otherwise");
                    }
                }
            }
        }
        assert!(asked.is_empty());
    }
}

#[test]
fn what_guests_read_is_what_a_shadow_has_and_qemu_finds_it() {
    for (format, event_index, args) in
        [("qcow2", true, ""), ("raw", false, "-t none"), ("qed", true, "-t directsync")]
    {
        let place = Place::new();
        place.ok(&format!("cowbell create -f {format} d 32M"));
        let serving = Serving::start(&place, &format!("-f {format} {args} d"));
        let mut shadow = vec![0; 32 << 20];
        let mut random = Random(7);
        for _ in 0..3 {
            let mut guest = Guest::new(&serving, event_index);
            mix(&mut guest, &mut shadow, &mut random, 20);
            // Rings stop where they are, and go on there; memory is shared again meanwhile.
            guest.share_memory();
            for at in 0..QUEUES {
                let base = guest.front.get_vring_base(at).expect("base") as u16;
                assert_eq!(base, guest.rings[at].available);
                guest.start_queue(at, base);
            }
            mix(&mut guest, &mut shadow, &mut random, 20);
        }
        let said = serving.stop();
        assert!(said.contains("3 clients") && said.contains(" 0 failed"), "{said}");
        if have_qemu() {
            place.qemu(&format!("qemu-img check -f {format} d || [ {format} = raw ]"));
            place.qemu(&format!("qemu-img convert -f {format} -O raw d out"));
        } else {
            place.ok(&format!("cowbell convert -f {format} -O raw d out"));
        }
        assert!(read(&place.path("out")) == shadow, "{format}");
    }
}

#[test]
fn guests_are_told_what_their_disk_is_like() {
    let place = Place::new();
    place.ok("cowbell create -f qcow2 d 64M");
    let serving = Serving::start(&place, "d");
    let mut guest = Guest::new(&serving, true);
    let config = guest.config();
    let number = |at: usize| u32::from_le_bytes(*config[at..].first_chunk().expect("there"));
    assert_eq!((number(0), number(4)), (64 << 11, 0), "sectors");
    assert_eq!((number(12), number(20), number(28)), (254, 512, 128), "pieces, block, cluster");
    assert_eq!(number(32) >> 16, QUEUES as u32);
    assert_eq!((number(36), number(40), number(44)), (1 << 22, 1, 128), "discards");
    assert_eq!((number(48), number(52), config[56]), (1 << 22, 1, 1), "zeros");
    let id = Ask { kind: VIRTIO_BLK_T_GET_ID, sector: 0, data: &[], reads: 20 };
    assert_eq!(guest.one(&id), (0, [&b"d"[..], &[0; 19]].concat()));

    // What is none of the disk's, or nobody's.
    let status = |guest: &mut Guest, what: Ask<'_>| guest.one(&what).0;
    assert_eq!(status(&mut guest, Ask::read((64 << 11) - 1, 1024)), 1);
    assert_eq!(status(&mut guest, Ask::read(u64::MAX, 512)), 1);
    assert_eq!(status(&mut guest, Ask::read(0, 100)), 1);
    assert_eq!(status(&mut guest, Ask::write(u64::MAX / 512, &[0; 512])), 1);
    assert_eq!(status(&mut guest, Ask { kind: 99, ..Ask::read(0, 512) }), 2);
    let zeros_of = |kind, range: &[u8], guest: &mut Guest| {
        guest.one(&Ask { kind, sector: 0, data: range, reads: 0 }).0
    };
    let (zero, discard) = (VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD);
    assert_eq!(zeros_of(zero, &zeros(0, 8, 2), &mut guest), 2);
    assert_eq!(zeros_of(discard, &zeros(0, 8, 1), &mut guest), 2);
    assert_eq!(zeros_of(zero, &zeros(u64::MAX, 8, 0), &mut guest), 1);
    assert_eq!(zeros_of(zero, &zeros(0, 64 << 11, 0)[..15], &mut guest), 1);
    guest.write(0, &[7; 65536]);
    assert_eq!(zeros_of(discard, &zeros(0, 128, 0), &mut guest), 0);
    assert_eq!(guest.read(0, 65536), [0; 65536], "a cluster that was discarded");
    drop(guest);
    serving.stop();

    let serving = Serving::start(&place, "-r d");
    let mut guest = Guest::new(&serving, false);
    assert_ne!(guest.front.get_features().expect("features") & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(guest.one(&Ask::write(0, &[1; 512])).0, 1);
    assert_eq!(guest.read(0, 512), [0; 512]);
}

#[test]
fn hostile_rings_end_their_queue_alone() {
    let place = Place::new();
    place.ok("cowbell create -f qcow2 d 16M");
    let serving = Serving::start(&place, "d");
    let mut random = Random(3);
    let mut broken = 0;
    for round in 0..100 {
        let mut guest = Guest::new(&serving, round % 2 == 0);
        for _ in 0..20 {
            // A table of nonsense that is nearly sense, in a part of which heads lead.
            for at in 0..u64::from(SIZE) {
                let addr = match random.below(6) {
                    0 => random.next(),
                    1 => 2 * REGION - random.below(600),
                    2 => QUEUE + TABLE,
                    3 => HEADERS,
                    _ => DATA_AT + random.below(4096),
                };
                let len = match random.below(6) {
                    0 => random.next() as u32,
                    1 => 0,
                    2 => 16,
                    3 => 1,
                    _ => 512,
                };
                let flags = random.below(8) as u16 & if random.below(4) == 0 { 7 } else { 3 };
                let next = random.below(u64::from(SIZE) + 2) as u16;
                let one = Descriptor::new(addr, len, flags, next);
                guest.put(QUEUE + TABLE + at * 16, RawDescriptor::from(one));
            }
            // Some begin well.
            let is_better = random.below(2) == 0;
            if is_better {
                let one = Descriptor::new(HEADERS, 16, VRING_DESC_F_NEXT as u16, 1);
                guest.put(QUEUE + TABLE, RawDescriptor::from(one));
            }
            guest.put(HEADERS, random.below(16) as u32);
            guest.put(HEADERS + 8, random.below(40_000));
            for _ in 0..random.below(10) {
                let any = random.below(u64::from(SIZE) + 1) as u16;
                guest.offer(1, if is_better { 0 } else { any });
            }
            if random.below(20) == 0 {
                guest.put(QUEUE + AVAIL + 2, random.next() as u16);
            }
            guest.kick(1);
            sleep(Duration::from_micros(300));
            // What was begun ends; then it is set up anew.
            guest.front.get_vring_base(1).expect("it speaks with us still");
            broken += u32::from(guest.rings[1].error.read().is_ok());
            guest.start_queue(1, 0);
        }
        if round % 30 == 0 {
            drop(guest);
            serving.is_well();
        }
    }
    serving.is_well();
    let said = serving.stop();
    let requests = said.split("; ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    assert!(requests.is_some_and(|count: u64| count > 100), "some were requests: {said}");
    assert!((100..2000).contains(&broken), "some were none: {broken}");
    assert_eq!(
        place.ok("cowbell check d").lines().next(),
        Some("No errors were found on the image.")
    );
}

#[test]
fn a_chain_without_an_end_breaks_its_queue_and_no_other() {
    let place = Place::new();
    place.ok("cowbell create -f raw d 16M");
    let serving = Serving::start(&place, "-f raw d");
    let mut guest = Guest::new(&serving, true);
    let next = VRING_DESC_F_NEXT as u16;
    for at in 0..2_u16 {
        let one = Descriptor::new(DATA_AT, 512, next, 1 - at);
        guest.put(QUEUE + TABLE + u64::from(at) * 16, RawDescriptor::from(one));
    }
    guest.offer(1, 0);
    guest.kick(1);
    assert!(is_called(&guest.rings[1].error), "who set it up is told");
    assert_eq!(guest.read(0, 512), [0; 512]);
    // Set up anew, it is as good as any.
    let _ = guest.front.get_vring_base(1).expect("base");
    guest.start_queue(1, 0);
    guest.ask(1, &Ask::read(8, 4096), 3, true);
    guest.kick(1);
    assert_eq!(guest.wait(1)[0].1, 0);
}

#[test]
fn hostile_messages_lose_the_connection_alone() {
    let place = Place::new();
    place.ok("cowbell create -f raw d 16M");
    place.ok("cowbell create -f raw e 16M");
    let mut serving = Serving::start(&place, "--vhost-user e=w -f raw d e");
    let mut random = Random(5);
    for _ in 0..1000 {
        let mut stream = UnixStream::connect(&serving.socket).expect("it listens");
        for _ in 0..random.below(20) {
            let len = random.below(80) as usize;
            let mut message = vec![0; 12 + len];
            random.fill(&mut message);
            let code = random.below(45) as u32;
            message[..4].copy_from_slice(&code.to_le_bytes());
            message[4..8].copy_from_slice(&(1 | (random.below(2) as u32 * 8)).to_le_bytes());
            message[8..12].copy_from_slice(&(len as u32).to_le_bytes());
            if len >= 8 && random.below(2) == 0 {
                message[12..20].copy_from_slice(&random.below(4).to_le_bytes());
            }
            if stream.write_all(&message).is_err() {
                break;
            }
        }
    }
    // Half of a message holds its own socket alone.
    let mut half = UnixStream::connect(&serving.socket).expect("it listens");
    half.write_all(&[1, 0, 0, 0, 1]).expect("there is room");
    serving.socket = place.path("w");
    serving.is_well();
    drop(half);
    serving.socket = place.path("v");
    serving.is_well();
    serving.stop();
}

#[test]
fn a_limited_disk_waits_for_its_time() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 d 64M");
    let began = clock();
    let serving = Serving::start(&place, "--iops 20 --burst 0 d");
    let mut guest = Guest::new(&serving, true);
    for _ in 0..5 {
        guest.ask(0, &Ask::read(0, 4096), 1, false);
    }
    guest.kick(0);
    // The first may come at once, each other one a twentieth of a second after the one before.
    let mut done = 0;
    while done < 5 {
        let all = guest.wait(0);
        assert!(all.iter().all(|one| one.1 == 0));
        done += all.len();
    }
    let took = clock().since(began);
    assert!(took >= 200_000_000, "five requests took {took} ns");
    // What waits for its time at the end is done at once.
    for _ in 0..SLOTS {
        guest.ask(1, &Ask::read(0, 4096), 1, false);
    }
    guest.kick(1);
    sleep(Duration::from_millis(100));
    serving.stop();
    let done = guest.done(1);
    assert!(done.iter().all(|one| one.1 == 0));
    assert!(done.len() > 4, "{}", done.len());
}

#[test]
fn guests_that_go_leave_nothing_behind_and_an_end_leaves_the_image_clean() {
    let place = Place::new();
    place.ok("cowbell create -f qcow2 d 64M");
    let serving = Serving::start(&place, "-t none d --nbd unix:n");
    let data = vec![0x5a; DATA as usize];
    for round in 0..30 {
        let mut guest = Guest::new(&serving, true);
        for queue in 0..QUEUES {
            for at in 0..u64::from(SLOTS) {
                let sector = ((round + at) * 256 + queue as u64 * 8192) % (100 << 10);
                guest.ask(queue, &Ask::write(sector, &data), 2, false);
            }
            guest.kick(queue);
        }
        // Some go before anything was done, some in the middle.
        sleep(Duration::from_micros(round * 100));
    }
    let mut guest = Guest::new(&serving, true);
    for at in 0..SLOTS {
        guest.ask(2, &Ask::write(u64::from(at) * 256, &data), 4, true);
    }
    guest.kick(2);
    // What was begun is done, and said to be.
    sleep(Duration::from_millis(1));
    let said = serving.stop();
    let done = guest.done(2);
    println!("{} of {SLOTS} were done; {said}", done.len());
    assert!(done.iter().all(|one| one.1 == 0));
    assert_eq!(
        place.ok("cowbell check d").lines().next(),
        Some("No errors were found on the image.")
    );
    for (slot, ..) in &done {
        let sector = u64::from(SLOTS - 1 - slot) * 256;
        place.ok(&format!("cowbell io -c 'read -P 0x5a {} 128k' d", sector * 512));
    }
    if have_qemu() {
        place.qemu("qemu-img check d");
    }
}

#[test]
fn memory_comes_and_goes() {
    let place = Place::new();
    place.ok("cowbell create -f raw d 16M");
    let serving = Serving::start(&place, "-f raw d");
    let mut guest = Guest::new(&serving, true);
    assert!(guest.front.get_max_mem_slots().expect("slots") >= 8);
    let second = guest.memory.iter().nth(1).expect("there are two");
    let second = VhostUserMemoryRegionInfo::from_guest_region(second).expect("it has a file");
    // The last queue's data are in it.
    assert!(Guest::data_at(2, 15) >= REGION);
    let ask = |guest: &mut Guest| {
        guest.ask(2, &Ask::read(0, 4096), 2, false);
        guest.kick(2);
        guest.wait(2)[0].1
    };
    assert_eq!(ask(&mut guest), 0);
    guest.front.remove_mem_region(&second).expect("it is there");
    assert_eq!(ask(&mut guest), 1, "there is no such memory");
    guest.front.add_mem_region(&second).expect("there is room");
    assert_eq!(ask(&mut guest), 0);
    // A file that ends before the memory does would kill who looks at what is not there.
    let file = File::from(memfd_create("short", MemfdFlags::CLOEXEC).expect("memory"));
    file.set_len(REGION - 1).expect("room");
    let short = VhostUserMemoryRegionInfo {
        guest_phys_addr: 2 * REGION,
        memory_size: REGION,
        userspace_addr: 1 << 40,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    assert!(guest.front.add_mem_region(&short).is_err());
    drop(guest);
    serving.is_well();
    serving.stop();
}

#[test]
fn two_sockets_of_one_disk_and_nbd_beside_them_show_the_same() {
    let place = Place::new();
    place.ok("cowbell create -f qcow2 d 16M");
    let mut serving = Serving::start(&place, "--vhost-user d=w --nbd unix:n d");
    let mut first = Guest::new(&serving, true);
    serving.socket = place.path("w");
    let mut second = Guest::new(&serving, false);
    first.write(8, &[3; 4096]);
    assert_eq!(second.read(8, 4096), [3; 4096]);
    second.write(16, &[4; 4096]);
    assert_eq!(first.read(16, 4096), [4; 4096]);
    if have_qemu() {
        let uri = format!("nbd+unix:///?socket={}", place.path("n").display());
        place.qemu(&format!("qemu-io -f raw -c 'read -P 3 4k 4k' -c 'read -P 4 8k 4k' '{uri}'"));
    }
    drop((first, second));
    assert!(serving.stop().contains(" 0 failed"));
}

#[test]
fn a_queue_that_is_stopped_has_done_what_it_has_taken() {
    let place = Place::new();
    place.ok("cowbell create -f qcow2 d 64M");
    let serving = Serving::start(&place, "-t none d");
    let mut guest = Guest::new(&serving, true);
    let data = vec![9; DATA as usize];
    let (mut base, mut all) = (0_u16, 0);
    for round in 0..40_u64 {
        for at in 0..u64::from(SLOTS) {
            let sector = (round * 17 + at) % 500 * 256;
            guest.ask(1, &Ask::write(sector, &data), 3, false);
        }
        guest.kick(1);
        sleep(Duration::from_micros(round * 10));
        let taken = guest.front.get_vring_base(1).expect("base") as u16;
        let done = guest.done(1);
        assert!(done.iter().all(|one| one.1 == 0));
        assert_eq!(taken.wrapping_sub(base), done.len() as u16, "what was taken is done");
        all += done.len();
        // What was not taken is forgotten, and the queue set up anew.
        base = taken;
        guest.start_queue(1, base);
    }
    println!("{all} of {} were taken", 40 * SLOTS);
    drop(guest);
    serving.is_well();
    serving.stop();
    let checked = place.ok("cowbell check d");
    assert_eq!(checked.lines().next(), Some("No errors were found on the image."));
}

#[test]
fn another_driver_has_four_queues_of_128_requests() {
    const DEPTH: usize = 128;
    const ALL: usize = 4 * DEPTH;
    /// Bytes of a request at most, and of the part of the disk that it lies in: four of a cluster.
    const PART: usize = 16 << 10;
    const PARTS: u64 = 3 * ALL as u64;
    for args in ["d", "-t none d"] {
        let place = Place::new();
        let size = PARTS * PART as u64;
        place.ok(&format!("cowbell create -f qcow2 d {size}"));
        let serving = Serving::with_queues(&place, 4, args);
        let mut driver = Blkio::new("virtio-blk-vhost-user").expect("it is known");
        driver.set_str("path", serving.socket.to_str().expect("text")).expect("a path");
        driver.connect().expect("it listens");
        assert_eq!(driver.get_u64("capacity").expect("known"), size);
        driver.set_i32("num-queues", 4).expect("there are as many");
        // Three descriptors a request.
        driver.set_i32("queue-size", 512).expect("there is room");
        let mut queues = driver.start().expect("it starts").queues;
        let region = driver.alloc_mem_region(ALL * PART).expect("memory");
        driver.map_mem_region(&region).expect("it is shared");
        // The same memory, as a file.
        let memory = format!("/proc/self/fd/{}", region.fd);
        let memory = File::options().read(true).write(true).open(memory).expect("it is one");

        let mut shadow = vec![0; size as usize];
        let mut random = Random(11);
        let mut data = vec![0; PART];
        let mut parts: Vec<u64> = (0..PARTS).collect();
        let (mut writes, mut reads) = (0, 0);
        for _ in 0..30 {
            let mut asked = Vec::new();
            for slot in 0..ALL {
                // A part of its own: which of them comes first does not matter.
                let other = slot as u64 + random.below(PARTS - slot as u64);
                parts.swap(slot, other as usize);
                let first = random.below(PART as u64 / 512);
                let len = 512 * (1 + random.below(PART as u64 / 512 - first)) as usize;
                let at = (parts[slot] * PART as u64 + first * 512) as usize;
                let (buffer, none) = (slot * PART, ReqFlags::empty());
                let pointer = (region.addr + buffer) as *mut u8;
                let queue = &mut queues[slot / DEPTH];
                random.fill(&mut data[..len]);
                memory.write_all_at(&data[..len], buffer as u64).expect("in memory");
                if random.below(2) == 0 {
                    writes += 1;
                    shadow[at..at + len].copy_from_slice(&data[..len]);
                    queue.write(at as u64, pointer, len, slot, none);
                } else {
                    reads += 1;
                    asked.push((buffer, at..at + len));
                    queue.read(at as u64, pointer, len, slot, none);
                }
            }
            // All queues are kicked before the first one is waited for.
            let mut done = [const { MaybeUninit::uninit() }; DEPTH];
            let mut counts = [0; 4];
            for (queue, count) in queues.iter_mut().zip(&mut counts) {
                *count += queue.do_io(&mut done, 0, None, None).expect("a kick");
            }
            let mut patience = Duration::from_secs(60);
            for (queue, count) in queues.iter_mut().zip(&mut counts) {
                let left = DEPTH - *count;
                let came = queue.do_io(&mut done[..left], left, Some(&mut patience), None);
                assert_eq!(came.expect("they come in time"), left);
            }
            for (buffer, range) in asked {
                memory.read_exact_at(&mut data[..range.len()], buffer as u64).expect("in memory");
                assert!(data[..range.len()] == shadow[range.clone()], "{range:?} reads otherwise");
            }
        }
        queues[3].flush(0, ReqFlags::empty());
        let mut done = [const { MaybeUninit::uninit() }; 1];
        assert_eq!(queues[3].do_io(&mut done, 1, None, None).expect("it comes"), 1);
        assert!(writes > ALL && reads > ALL);
        drop((queues, driver));
        let said = serving.stop();
        let requests = format!("; {} requests", writes + reads + 1);
        assert!(said.contains(" 0 failed") && said.contains(&requests), "{said}");
        if have_qemu() {
            place.qemu("qemu-img check d");
            place.qemu("qemu-img convert -O raw d out");
        } else {
            place.ok("cowbell convert -O raw d out");
        }
        assert!(read(&place.path("out")) == shadow);
    }
}

#[test]
fn what_was_in_flight_when_the_server_was_killed_is_done_and_answered_once() {
    // What is answered and not flushed may be in tables that are written late: not of raw images, and not where
    // each write is flushed.
    for (format, event_index, args) in
        [("raw", true, "-t none"), ("raw", false, ""), ("qcow2", true, "-t directsync")]
    {
        let place = Place::new();
        place.ok(&format!("cowbell create -f {format} d 64M"));
        let args = &format!("-f {format} {args} d");
        let mut serving = Serving::start(&place, args);
        let mut guest = Guest::new(&serving, event_index);
        for (at, base) in guest.note_inflight().into_iter().enumerate() {
            guest.start_queue(at, base);
        }
        let mut shadow = vec![0; 64 << 20];
        let mut random = Random(13);
        let mut data = vec![0; DATA as usize];
        let (mut asked, mut answered, mut noted) = (0, 0, 0);
        for round in 0..40 {
            // Before it is killed its queues are filled again, so that requests overtake each other in the rings.
            for step in 0..4 {
                for queue in 0..QUEUES {
                    while let Some(&slot) = guest.rings[queue].free.last() {
                        // Each has a part of the disk: which of them comes first does not matter.
                        let part = (queue as u64 * u64::from(SLOTS) + u64::from(slot)) * 2048;
                        let len = 1 + random.below(DATA / 512);
                        let sector = part + random.below(2048 - len);
                        let range = (sector * 512) as usize..((sector + len) * 512) as usize;
                        random.fill(&mut data[..range.len()]);
                        shadow[range.clone()].copy_from_slice(&data[..range.len()]);
                        let what = Ask::write(sector, &data[..range.len()]);
                        let indirect = random.below(2) == 0;
                        guest.ask(queue, &what, 1 + random.below(4), indirect);
                        asked += 1;
                    }
                    guest.kick(queue);
                }
                sleep(Duration::from_micros(random.below(200 + round * 20)));
                if step < 3 {
                    for queue in 0..QUEUES {
                        let done = guest.done(queue);
                        assert!(done.iter().all(|one| one.1 == 0));
                        answered += done.len();
                    }
                }
            }
            serving.child.kill().expect("it runs");
            serving.child.wait().expect("it ends");
            // One byte of each descriptor's sixteen says so, behind a queue's sixteen.
            let (inflight, file) = guest.inflight.as_ref().expect("it is noted");
            let mut notes = vec![0; inflight.mmap_size as usize];
            file.read_exact_at(&mut notes, 0).expect("they are there");
            let queues = notes.chunks(notes.len() / QUEUES);
            let all = queues.flat_map(|queue| queue.chunks(16).skip(1).filter(|one| one[0] != 0));
            noted += all.count();
            serving = Serving::start(&place, args);
            guest.reconnect(&serving);
            for queue in 0..QUEUES {
                while !guest.rings[queue].asked.is_empty() {
                    // What is answered was asked, and not answered before.
                    let done = guest.wait(queue);
                    assert!(done.iter().all(|one| one.1 == 0));
                    answered += done.len();
                }
            }
            assert_eq!(answered, asked);
        }
        // Nothing comes any more.
        for queue in 0..QUEUES {
            let base = guest.front.get_vring_base(queue).expect("base") as u16;
            assert_eq!(base, guest.rings[queue].available);
            assert!(guest.done(queue).is_empty());
        }
        println!("{noted} of {asked} were in flight");
        assert!(noted > 100, "it was killed in the middle");
        drop(guest);
        assert!(serving.stop().contains(" 0 failed"));
        if have_qemu() {
            place.qemu(&format!("qemu-img convert -f {format} -O raw d out"));
        } else {
            place.ok(&format!("cowbell convert -f {format} -O raw d out"));
        }
        assert!(read(&place.path("out")) == shadow, "{format}");
    }
}

#[test]
fn whatever_is_in_the_notes_of_what_was_in_flight_harms_nobody() {
    let place = Place::new();
    place.ok("cowbell create -f raw d 64M");
    let serving = Serving::start(&place, "-f raw d");
    let mut random = Random(17);
    // Memory that there cannot be.
    for (queues, size) in [(QUEUES as u16 + 1, SIZE), (1, 1025), (u16::MAX, u16::MAX)] {
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        let mut front = Guest::connect(&serving, true);
        assert!(front.get_inflight_fd(&wanted).is_err());
    }
    let (mut broken, mut answered) = (0, 0);
    for round in 0..200 {
        let mut guest = Guest::new(&serving, true);
        guest.note_inflight();
        for queue in 0..QUEUES {
            for at in 0..u64::from(SLOTS) {
                guest.ask(queue, &Ask::read(at * 256, 4096), 2, at % 2 == 0);
            }
        }
        let (inflight, file) = guest.inflight.as_ref().expect("it is noted");
        let len = inflight.mmap_size as usize / QUEUES;
        let mut notes = vec![0; len * QUEUES];
        random.fill(&mut notes);
        for queue in notes.chunks_mut(len) {
            // Of most, the version, the size and the last one could be right; of some, what is in flight too.
            if random.below(8) > 0 {
                let last = random.below(u64::from(SIZE) + 2) as u8;
                queue[8..14].copy_from_slice(&[1, 0, SIZE as u8, 0, last, 0]);
            }
            if round % 2 == 0 {
                for (at, head) in queue.chunks_mut(16).skip(1).enumerate() {
                    let is_one = at % usize::from(DESCRIPTORS) == 0;
                    head[0] = u8::from(is_one && random.below(4) == 0 || random.below(500) == 0);
                }
            }
        }
        file.write_all_at(&notes, 0).expect("it is long enough");
        // What is said then may be an error, and the front end is left.
        for at in 0..QUEUES {
            if !guest.try_announce_queue(at, 0) {
                broken += 1;
                break;
            }
        }
        sleep(Duration::from_millis(1));
        for queue in 0..QUEUES {
            let used = GuestAddress(queue as u64 * QUEUE + USED + 2);
            answered +=
                u32::from(guest.memory.load::<u16>(used, Ordering::Acquire).expect("there"));
            broken += u32::from(guest.rings[queue].error.read().is_ok());
        }
        drop(guest);
        if round % 50 == 0 {
            serving.is_well();
        }
    }
    println!("{broken} broken, {answered} answered");
    assert!(broken > 50 && answered > 50, "both ways were taken: {broken} {answered}");
    serving.is_well();
    serving.stop();
}
