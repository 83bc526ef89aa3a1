//! A disk in an emulator's own epoll loop.
//!
//! The loop serves three descriptors: a timer that ticks, the kicks of a virtqueue, and the
//! engine's. A thread plays the guest: it fills the disk, reads it back and looks at every byte,
//! with more requests under way than the engine takes at a time. The timer keeps ticking and kicks
//! keep being heard while the disk works, because nothing in the loop waits for it.
//!
//! ```text
//! cargo run --release --example epoll
//! ```

use std::collections::VecDeque;
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::units::Errno;
use cowbell_engine::{Engine, Limits, Why};
use cowbell_formats::{
    CreateOptions, DiskHost, Format, Node, OpenOptions, RunOptions, attach, create, open,
};
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const DISK_BYTES: u64 = 32 << 20;
const BLOCK: u64 = 8192;
/// Requests that the guest has under way: more than the engine takes.
const QUEUE: usize = 64;
const REQUESTS: usize = 32;
const TICK: Duration = Duration::from_millis(1);

/// What an event is about: epoll hands it back.
const TIMER: u64 = 0;
const KICK: u64 = 1;
const DISK: u64 = 2;

/// A request as the guest puts it into its queue. An emulator has a scatter list into guest memory
/// here and lends that to the engine with `Ram::new`; here the memory travels along.
struct Request {
    id: u64,
    io: Io,
    mem: Mem,
}

/// The answer.
struct Used {
    id: u64,
    result: std::result::Result<(), Errno>,
    mem: Mem,
}

/// What the loop saw.
#[derive(Debug, Default)]
pub struct Served {
    /// Requests answered.
    pub requests: u64,
    /// Requests that had to stay in their queue for a while: the engine was full.
    pub held_back: u64,
    /// Timer ticks.
    pub ticks: u64,
    /// How many of them came while the disk was at work.
    pub ticks_meanwhile: u64,
    /// Kicks.
    pub kicks: u64,
    /// How many of them came while the disk was at work.
    pub kicks_meanwhile: u64,
}

/// Makes an image in `folder` and serves a guest with it.
pub fn serve(folder: &Path) -> Result<Served> {
    let path = folder.join("disk.qed");
    let options = CreateOptions { size: Some(DISK_BYTES), ..CreateOptions::default() };
    create(&DiskHost::default(), &path, Format::Qed, &options)?;

    // Setting up may wait for the disk: it comes before the loop.
    let mut engine: Engine<Node, Aio> = Engine::new(
        Aio::new(AioOptions::default())?,
        Limits { requests: REQUESTS, ..Limits::default() },
    );
    let options = OpenOptions { format: Some(Format::Qed), write: true, ..OpenOptions::default() };
    let image = open(&DiskHost { direct: true }, &path, &options)?;
    let disk = attach(&mut engine, image, &RunOptions::default())?;

    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK)?;
    let tick = Timespec::try_from(TICK)?;
    let every_tick = Itimerspec { it_interval: tick, it_value: tick };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &every_tick)?;
    let kick = Arc::new(eventfd(0, EventfdFlags::NONBLOCK)?);

    let loop_fd = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let add = |fd: &dyn AsFd, what| {
        epoll::add(&loop_fd, fd.as_fd(), epoll::EventData::new_u64(what), epoll::EventFlags::IN)
    };
    add(&timer, TIMER)?;
    add(&kick, KICK)?;
    add(&engine.fd().ok_or("this backend has no descriptor")?, DISK)?;

    let (to_disk, available) = channel();
    let (used, from_disk) = channel();
    let guest = std::thread::spawn({
        let kick = Arc::clone(&kick);
        move || {
            let result = guest(&to_disk, &kick, &from_disk);
            // It hangs up, and kicks so that this is noticed.
            drop(to_disk);
            rustix::io::write(&kick, &1u64.to_ne_bytes())?;
            result
        }
    });

    let mut served = Served::default();
    let mut queue: VecDeque<Request> = VecDeque::new();
    let mut events = Vec::with_capacity(16);
    let mut guest_is_gone = false;
    // Is there more to do before anything happens outside?
    let mut more = false;
    loop {
        // 1. Wait: not at all, or until something happens or the engine wants to be run.
        let timeout = match (more, engine.next_deadline()) {
            (true, _) => Some(Duration::ZERO),
            (false, Some(deadline)) => Some(Duration::from_nanos(deadline.since(clock()))),
            (false, None) => None,
        };
        let timeout = timeout.map(Timespec::try_from).transpose()?;
        events.clear();
        match epoll::wait(&loop_fd, spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }

        // 2. Everybody else's events. The engine's own needs nothing done here: step 4 collects.
        let disk_works = u64::from(engine.in_flight() > 0);
        for event in &events {
            match event.data.u64() {
                TIMER => {
                    let ticks = counted(&timer)?;
                    served.ticks += ticks;
                    served.ticks_meanwhile += ticks * disk_works;
                }
                KICK => {
                    let kicks = counted(&kick)?;
                    served.kicks += kicks;
                    served.kicks_meanwhile += kicks * disk_works;
                    guest_is_gone |= fetch(&available, &mut queue);
                }
                _ => {}
            }
        }

        // 3. Hand over what the engine takes. What it refuses stays in the queue.
        while let Some(Request { id, io, mem }) = queue.pop_front() {
            if let Err(refused) = engine.submit(disk, io, mem, id) {
                assert_eq!(refused.why, Why::Full, "it is drained only when the guest is gone");
                queue.push_front(Request { id, io, mem: refused.mem });
                served.held_back += 1;
                break;
            }
        }
        // Nobody left to serve: what is under way ends, and the image is left clean and stable.
        if guest_is_gone && queue.is_empty() {
            engine.drain();
        }

        // 4. Run, then drain `poll`. Where that made room for what is still queued, go round at
        // once: requests that need no I/O may all have ended, and then nothing will wake us.
        more = engine.run(clock()).again;
        while let Some(done) = engine.poll() {
            served.requests += 1;
            more |= !queue.is_empty();
            // A guest that gave up takes no more answers: `join` tells why.
            let _ = used.send(Used { id: done.tag, result: done.result, mem: done.mem });
        }
        if let Some(result) = engine.drained() {
            result?;
            break;
        }
    }
    guest.join().map_err(|_| "the guest panicked")??;
    Ok(served)
}

/// Reads a timer or an eventfd: how often it went off since it was last read.
fn counted(fd: &OwnedFd) -> io::Result<u64> {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => Ok(u64::from_ne_bytes(count)),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// Takes what the guest has made available; true when no more will come.
fn fetch(available: &Receiver<Request>, queue: &mut VecDeque<Request>) -> bool {
    loop {
        match available.try_recv() {
            Ok(request) => queue.push_back(request),
            Err(TryRecvError::Empty) => return false,
            Err(TryRecvError::Disconnected) => return true,
        }
    }
}

/// The guest: writes every block, then reads every block.
fn guest(to_disk: &Sender<Request>, kick: &OwnedFd, from_disk: &Receiver<Used>) -> Result<()> {
    let blocks = DISK_BYTES / BLOCK;
    let mut free: Vec<Mem> = (0..QUEUE).map(|_| Buf::zeroed(BLOCK as usize).into()).collect();
    for write in [true, false] {
        let (mut begun, mut ended) = (0, 0);
        while ended < blocks {
            // A batch, then one kick for it.
            while begun < blocks
                && let Some(mem) = free.pop()
            {
                // All over the disk: 65 and the number of blocks have no common factor.
                let id = begun * 65 % blocks;
                let mut mem = mem.into_buf().expect("it is one of ours");
                mem.fill(if write { byte(id) } else { 0 });
                let (offset, mem) = (id * BLOCK, mem.into());
                let io = if write { Io::write(offset, BLOCK) } else { Io::read(offset, BLOCK) };
                to_disk.send(Request { id, io, mem }).map_err(|_| "the loop is gone")?;
                begun += 1;
            }
            rustix::io::write(kick, &1u64.to_ne_bytes())?;
            let answer = from_disk.recv()?;
            for Used { id, result, mem } in std::iter::once(answer).chain(from_disk.try_iter()) {
                result.map_err(|errno| format!("block {id}: {errno}"))?;
                let buf = mem.into_buf().expect("it is one of ours");
                if !buf.iter().all(|&b| b == byte(id)) {
                    return Err(format!("block {id}: wrong bytes").into());
                }
                free.push(buf.into());
                ended += 1;
            }
        }
    }
    Ok(())
}

/// What block `id` is full of.
fn byte(id: u64) -> u8 {
    (id % 251) as u8 + 1
}

#[allow(dead_code, reason = "a test runs `serve` by itself")]
fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let served = serve(folder.path())?;
    println!("{served:#?}");
    Ok(())
}
