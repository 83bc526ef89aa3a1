//! Disks of a virtual machine: guest RAM, scatter lists, and a timer in the monitor's own loop.
//!
//! The memory is mapped by the crate `vm-memory`, as that of Rust's virtual machine monitors is. A
//! request comes as a virtqueue's descriptor chain: an operation, and a list of addresses and
//! lengths as the guest counts, at any byte. The list is lent to the engine as it is, and what is
//! read or written goes straight between the disk and the guest's pages; where address, length or
//! offset are not fit for O_DIRECT, the engine goes by a buffer of its own.
//!
//! Two disks, a qcow2 and a VMDK image, are on one engine, in one thread, in a loop around
//! `mio::Poll` that has a timer of one millisecond in it. mio reports edges: what a descriptor
//! stands for is taken in whole when it is reported.
//!
//! ```text
//! cargo run --release --example vm
//! ```

use std::error::Error;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cowbell_engine::mem::Mem;
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::ram::Ram;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{
    CreateOptions, DiskHost, Format, Node, OpenOptions, RunOptions, attach, create, open,
};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::event::Timespec;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const DISKS: [(&str, Format); 2] = [("root.qcow2", Format::Qcow2), ("data.vmdk", Format::Vmdk)];
const DISK_BYTES: u64 = 4 << 20;
/// Requests that the guest keeps under way on each disk.
const DEPTH: usize = 32;
/// Bytes in a request: no multiple of anything that a disk likes.
const LEN: u64 = 13_337;
/// Guest memory for each request, and how its pieces lie in it.
const ROOM: u64 = 32 << 10;
const PIECES: [u64; 5] = [4096, 1, 511, 3000, 24];
const GAP: u64 = 13;
/// Where the memory for requests begins: above the hole that PCs have in their memory.
const BUFFERS: u64 = (4 << 30) + 4096;

const DISK: Token = Token(0);
const TIMER: Token = Token(1);

/// A descriptor chain: what is wanted, and where in the guest's memory.
struct Chain {
    io: Io,
    list: Vec<(GuestAddress, usize)>,
}

/// The guest: writes both disks from end to end, then reads them and looks at every byte.
struct Guest {
    memory: Arc<GuestMemoryMmap<()>>,
    /// By disk: the request that comes next. Requests of the first half write, the others read.
    next: [u64; DISKS.len()],
    /// By disk: requests that have ended.
    ended: [u64; DISKS.len()],
    /// By disk and place in memory: the request that is under way there.
    places: [[Option<u64>; DEPTH]; DISKS.len()],
}

/// Requests that it takes to write or read a disk.
const PASS: u64 = DISK_BYTES / LEN;

impl Guest {
    fn new() -> Result<Guest> {
        let below = (GuestAddress(0), 1 << 20);
        let room = (DEPTH * DISKS.len()) as u64 * ROOM;
        let above = (GuestAddress(4 << 30), (BUFFERS - (4 << 30) + room) as usize);
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[below, above])?);
        Ok(Guest { memory, next: [0; 2], ended: [0; 2], places: [[None; DEPTH]; 2] })
    }

    /// The next chain of a disk's queue, and its place; `None` if the queue is empty.
    fn pop(&mut self, disk: usize) -> Result<Option<(usize, Chain)>> {
        let number = self.next[disk];
        // It reads when all is written.
        let end = if self.ended[disk] < PASS { PASS } else { 2 * PASS };
        let free = self.places[disk].iter().position(Option::is_none);
        let Some(place) = free.filter(|_| number < end) else { return Ok(None) };
        self.next[disk] += 1;
        self.places[disk][place] = Some(number);
        let (offset, list) = (number % PASS * LEN, list(disk, place, number));
        if number >= PASS {
            return Ok(Some((place, Chain { io: Io::read(offset, LEN), list })));
        }
        let bytes = contents(disk, number);
        let mut rest = &bytes[..];
        for &(at, len) in &list {
            let (piece, others) = rest.split_at(len);
            self.memory.write_slice(piece, at)?;
            rest = others;
        }
        Ok(Some((place, Chain { io: Io::write(offset, LEN), list })))
    }

    /// The chain at this place has been used.
    fn used(&mut self, disk: usize, place: usize) -> Result<()> {
        let number = self.places[disk][place].take().ok_or("a chain was used twice")?;
        self.ended[disk] += 1;
        let mut bytes = Vec::new();
        for (at, len) in list(disk, place, number) {
            let begun = bytes.len();
            bytes.resize(begun + len, 0);
            self.memory.read_slice(&mut bytes[begun..], at)?;
        }
        match bytes == contents(disk, number) {
            true => Ok(()),
            false => Err(format!("request {number} of disk {disk}: wrong bytes").into()),
        }
    }

    fn is_done(&self) -> bool {
        self.ended.iter().all(|&ended| ended == 2 * PASS)
    }
}

/// A scatter list of odd addresses and lengths.
fn list(disk: usize, place: usize, number: u64) -> Vec<(GuestAddress, usize)> {
    let room = BUFFERS + (disk * DEPTH + place) as u64 * ROOM;
    let (mut at, mut left, mut list) = (room + number % 512, LEN, Vec::new());
    for len in PIECES.into_iter().cycle() {
        if left == 0 {
            break;
        }
        let len = len.min(left);
        list.push((GuestAddress(at), len as usize));
        (at, left) = (at + len + GAP, left - len);
    }
    list
}

/// What a disk holds where request `number` is.
fn contents(disk: usize, number: u64) -> Vec<u8> {
    let first = number % PASS * LEN + 7 * disk as u64;
    (first..first + LEN).map(|at| (at / 97 * 31 + at) as u8).collect()
}

/// What the loop saw.
#[derive(Debug, Default)]
pub struct Served {
    /// Requests answered.
    pub requests: u64,
    /// Ticks of the timer while the disks worked.
    pub ticks: u64,
}

/// Makes two images in `folder` and serves a guest with them.
pub fn serve(folder: &Path) -> Result<Served> {
    // Setting up may wait for the disk: it comes before the loop.
    let mut engine: Engine<Node, Aio> =
        Engine::new(Aio::new(AioOptions::default())?, Limits::default());
    let mut disks = Vec::new();
    for (name, format) in DISKS {
        let path = folder.join(name);
        let options = CreateOptions { size: Some(DISK_BYTES), ..CreateOptions::default() };
        create(&DiskHost::default(), &path, format, &options)?;
        let options = OpenOptions { format: Some(format), write: true, ..OpenOptions::default() };
        let image = open(&DiskHost { direct: true }, &path, &options)?;
        disks.push(attach(&mut engine, image, &RunOptions::default())?);
    }
    let mut guest = Guest::new()?;
    let memory = Arc::clone(&guest.memory);

    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK)?;
    let tick = Timespec::try_from(Duration::from_millis(1))?;
    let every_tick = Itimerspec { it_interval: tick, it_value: tick };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &every_tick)?;
    let mut poll = Poll::new()?;
    let fd = engine.fd().ok_or("this backend has no descriptor")?.as_raw_fd();
    poll.registry().register(&mut SourceFd(&fd), DISK, Interest::READABLE)?;
    poll.registry().register(&mut SourceFd(&timer.as_raw_fd()), TIMER, Interest::READABLE)?;

    let mut served = Served::default();
    let mut events = Events::with_capacity(8);
    // A list that came back carries the next request: then lending allocates nothing.
    let mut spare: Vec<Ram> = Vec::new();
    let mut more = true;
    loop {
        // 1. Wait: not at all, or until something happens or the engine wants to be run.
        let timeout = match (more, engine.next_deadline()) {
            (true, _) => Some(Duration::ZERO),
            (false, due) => due.map(|due| Duration::from_nanos(due.since(clock()))),
        };
        match poll.poll(&mut events, timeout) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                return Err(error.into());
            }
            _ => {}
        }

        // 2. Everybody else's events. The engine's own needs nothing done here: step 4 collects.
        if events.iter().any(|event| event.token() == TIMER) {
            let mut ticks = [0; 8];
            if rustix::io::read(&timer, &mut ticks).is_ok() {
                served.ticks += u64::from_ne_bytes(ticks);
            }
        }

        // 3. Hand over what is in the queues. The tag says which disk, and which place.
        for (disk, &node) in disks.iter().enumerate() {
            while let Some((place, Chain { io, list })) = guest.pop(disk)? {
                let ram = match spare.pop() {
                    Some(mut ram) => ram.refill_of_guest(&memory, list).map(|()| ram),
                    None => Ram::of_guest(&memory, list),
                };
                let tag = (place << 1 | disk) as u64;
                // Addresses that the guest does not have are its own fault; a real device would
                // answer that request with an error.
                engine
                    .submit(node, io, ram?, tag)
                    .map_err(|refused| format!("{:?}", refused.why))?;
            }
        }
        if guest.is_done() {
            engine.drain();
        }

        // 4. Run, then drain `poll`. The guest may answer with new requests: go round at once.
        more = engine.run(clock()).again;
        while let Some(done) = engine.poll() {
            done.result.map_err(|errno| format!("request {:#x}: {errno}", done.tag))?;
            guest.used(done.tag as usize & 1, done.tag as usize >> 1)?;
            served.requests += 1;
            more = true;
            if let Mem::Ram(ram) = done.mem {
                spare.push(ram);
            }
        }
        if let Some(result) = engine.drained() {
            result?;
            return Ok(served);
        }
    }
}

#[allow(dead_code, reason = "a test runs `serve` by itself")]
fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let served = serve(folder.path())?;
    println!("{served:#?}");
    Ok(())
}
