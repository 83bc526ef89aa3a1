//! vhost-user-blk: guests whose rings are in memory that they share with us.
//!
//! A socket is a *device*: one disk, one front end at a time, such as QEMU. `session.rs` is what the front
//! end says in messages, `queue.rs` a ring in the guest's memory, `request.rs` what is found there. Here
//! is what has to do with sockets and the engine.
//!
//! Messages are read by the crate `vhost`, which waits for what is missing. So a message is left in its
//! socket until all of it has come and there is room for its reply; then nothing is waited for.

mod inflight;
mod queue;
mod request;
mod session;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use cowbell_engine::Finished;
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::units::Time;
use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvFlags, recv};
use slab::Slab;
use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};
use vm_memory::{Bytes, GuestAddress};

use crate::fail::Fail;
use crate::serve::disks::Disks;
use crate::serve::listen::{Address, Listener, Stream};
use crate::serve::status::{Counts, Kind};
use crate::serve::vhost::queue::Guest;
use crate::serve::vhost::request::{Facts, Malformed, Parser, Request, Todo, status_of};
use crate::serve::vhost::session::Session;

/// Queues of a device.
pub const QUEUES_MAX: u64 = 64;
/// Requests of a device that are begun before what has ended is looked at, and it is the others' turn. Few: a guest that
/// hears of many at once asks for many at once, and then device, server and guest wait for one another.
const SHARE: usize = 4;
/// Requests of a device in flight: the others have places too.
const IN_FLIGHT_MAX: usize = 256;
/// Messages that are read before it is the others' turn.
const MESSAGES: usize = 16;
/// How long nobody is let in when there are no descriptors left.
const ACCEPT_PAUSE_MS: u64 = 200;
/// Tokens of a device: its listener, its front end, its queues.
const TOKENS: usize = 256;
const FRONT: usize = 1;
const KICKS: usize = 2;
/// A message's header: its code, flags, the length of what follows.
const HEADER: usize = 12;

/// One socket that a disk is served on.
#[derive(Debug)]
pub struct Place {
    /// The disk's name; `None`: the first disk.
    pub disk: Option<String>,
    /// The socket's path.
    pub path: PathBuf,
}

/// A device.
struct Device {
    path: PathBuf,
    listener: Option<Listener>,
    /// There may be somebody.
    is_awaited: bool,
    /// The disk's number.
    disk: usize,
    facts: Arc<Facts>,
    front: Option<Front>,
    /// Whose turn it is.
    next_queue: usize,
}

/// A front end.
struct Front {
    /// Another one has another.
    serial: u64,
    socket: UnixStream,
    registry: Arc<Registry>,
    messages: BackendReqHandler<Mutex<Session>>,
    session: Arc<Mutex<Session>>,
    /// There may be a message, and room for its reply.
    is_readable: bool,
    /// The next message is for when nothing is in flight: nothing is begun until then.
    is_settling: bool,
    /// It has closed its end.
    has_gone: bool,
}

/// A request in flight.
#[derive(Debug)]
struct Job {
    device: usize,
    serial: u64,
    queue: usize,
    head: u16,
    /// Bytes of data that it writes into the guest's memory.
    read: u32,
    status: GuestAddress,
    /// The memory that it was found in.
    guest: Arc<Guest>,
}

/// See the module.
pub struct Vhost {
    registry: Arc<Registry>,
    /// Its tokens are from here on.
    tokens: usize,
    /// Its requests' tags have these bits.
    tags: u64,
    queues: usize,
    devices: Vec<Device>,
    jobs: Slab<Job>,
    parser: Parser,
    /// Whose turn it is.
    next: usize,
    /// Nobody is let in before.
    accept_again: Option<Time>,
    is_stopping: bool,
    pub counts: Counts,
}

impl Vhost {
    /// Listens, and serves each disk with so many queues. Its tokens are from `tokens` on, and its
    /// requests' tags have the bits `tags`.
    pub fn new(
        registry: Registry,
        (tokens, tags): (usize, u64),
        places: &[Place],
        queues: u16,
        disks: &Disks,
    ) -> Result<Vhost, Fail> {
        let mut devices = Vec::new();
        for (at, Place { disk, path }) in places.iter().enumerate() {
            let number = match disk {
                None => Some(0),
                Some(name) => disks.served.iter().position(|disk| disk.name == *name),
            };
            let number = number.ok_or_else(|| {
                Fail::other(format!("no disk is called '{}'", disk.as_deref().unwrap_or_default()))
            })?;
            let served = &disks.served[number];
            let limits = disks.limits(number);
            let facts = Facts::new(&served.name, &limits, served.read_only, queues);
            let listener = Listener::open(&Address::Unix(path.clone()))?.pop();
            let mut listener = listener.expect("one is opened, or none and why");
            listener.register(&registry, Token(tokens + at * TOKENS))?;
            devices.push(Device {
                path: path.clone(),
                listener: Some(listener),
                is_awaited: true,
                disk: number,
                facts: Arc::new(facts),
                front: None,
                next_queue: 0,
            });
        }
        Ok(Vhost {
            registry: Arc::new(registry),
            tokens,
            tags,
            queues: queues.into(),
            devices,
            jobs: Slab::new(),
            parser: Parser::default(),
            next: 0,
            accept_again: None,
            is_stopping: false,
            counts: Counts::default(),
        })
    }

    /// Where the disk of this number is to be found.
    pub fn places(&self, disk: usize) -> impl Iterator<Item = String> {
        let its = self.devices.iter().filter(move |device| device.disk == disk);
        its.map(|device| format!("vhost-user:{}", device.path.display()))
    }

    /// How many front ends are there?
    pub fn clients(&self) -> usize {
        self.devices.iter().filter(|device| device.front.is_some()).count()
    }

    /// A descriptor with a token of ours is ready.
    pub fn event(&mut self, token: usize, event: &Event) {
        let at = token - self.tokens;
        let Some(device) = self.devices.get_mut(at / TOKENS) else { return };
        match at % TOKENS {
            0 => device.is_awaited = true,
            kind => {
                let Some(front) = &mut device.front else { return };
                if kind == FRONT {
                    front.is_readable = true;
                    front.has_gone |= event.is_read_closed() || event.is_error();
                } else if let Some(queue) = front.session().queues.get_mut(kind - KICKS) {
                    queue.kicked();
                }
            }
        }
    }

    /// When [`work`](Vhost::work) is to be called although nothing has happened.
    pub fn deadline(&self) -> Option<Time> {
        self.accept_again
    }

    /// Lets front ends in, hears them, and begins what is in their guests' queues: to each its share.
    /// Is there more to do?
    pub fn work(&mut self, now: Time, disks: &mut Disks) -> bool {
        let count = self.devices.len();
        for at in (self.next..count).chain(0..self.next) {
            self.accept(at, now);
            let Some(front) = &mut self.devices[at].front else { continue };
            let is_wrong = !front.has_gone && front.hear().is_err();
            if is_wrong || front.has_gone {
                self.counts.broken += u64::from(is_wrong);
                self.leave(at, disks);
                continue;
            }
            self.begin(at, disks);
        }
        self.next = (self.next + 1) % count.max(1);
        self.has_more(now, disks)
    }

    fn has_more(&self, now: Time, disks: &Disks) -> bool {
        let may = self.accept_again.is_none_or(|again| now >= again) && !self.is_stopping;
        self.devices.iter().any(|device| match &device.front {
            None => may && device.is_awaited,
            Some(front) => {
                let may_begin = !self.is_stopping && disks.has_room(device.disk);
                front.is_readable || may_begin && front.has_requests()
            }
        })
    }

    fn accept(&mut self, at: usize, now: Time) {
        let device = &mut self.devices[at];
        let is_early = self.accept_again.is_some_and(|again| now < again);
        let is_free = device.front.is_none() && device.is_awaited;
        if !is_free || is_early || self.is_stopping {
            return;
        }
        self.accept_again = None;
        let Some(listener) = &device.listener else { return };
        match listener.accept() {
            Ok(Stream::Unix(stream)) => {
                let tokens = self.tokens + at * TOKENS;
                self.counts.clients += 1;
                let (facts, registry) = (Arc::clone(&device.facts), Arc::clone(&self.registry));
                let session = Session::new(facts, self.queues, registry, tokens + KICKS);
                let registry = Arc::clone(&self.registry);
                let front =
                    Front::new(self.counts.clients, stream, session, registry, tokens + FRONT);
                device.front = front.ok();
            }
            Ok(Stream::Tcp(_)) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => device.is_awaited = false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            // No descriptors or no memory: some are given back by and by.
            Err(_) => self.accept_again = Some(now.plus_ms(ACCEPT_PAUSE_MS)),
        }
    }

    /// Begins requests of a device.
    fn begin(&mut self, at: usize, disks: &mut Disks) {
        let Device { front: Some(front), facts, disk, next_queue, .. } = &mut self.devices[at]
        else {
            return;
        };
        let mut session = front.session();
        let Some(guest) = session.guest.clone() else { return };
        let mut places = IN_FLIGHT_MAX.saturating_sub(session.in_flight()).min(SHARE);
        if front.is_settling || self.is_stopping {
            return;
        }
        let count = session.queues.len();
        for index in (*next_queue..count).chain(0..*next_queue) {
            let queue = &mut session.queues[index];
            while places > 0 && disks.has_room(*disk) && queue.is_pending() {
                let parsed = match queue.take_again(&guest) {
                    Some(chain) => self.parser.parse(chain, &guest, facts),
                    None => {
                        let Some(chain) = queue.take(&guest) else { break };
                        self.parser.parse(chain, &guest, facts)
                    }
                };
                places -= 1;
                let Request { head, status, todo } = match parsed {
                    Ok(request) => request,
                    Err(Malformed) => {
                        queue.refuse();
                        break;
                    }
                };
                match todo {
                    Todo::Answer(how, written) => {
                        self.counts.failed += u64::from(how != 0);
                        answer(queue, &guest, (&guest, status, how), head, written);
                    }
                    Todo::Submit(io, mem) => {
                        let read = begun(&mut self.counts, &io);
                        let (serial, guest) = (front.serial, Arc::clone(&guest));
                        let job =
                            Job { device: at, serial, queue: index, head, read, status, guest };
                        let tag = self.tags | self.jobs.insert(job) as u64;
                        disks.submit(*disk, io, mem, tag);
                    }
                }
            }
        }
        *next_queue = (*next_queue + 1) % count.max(1);
    }

    /// A request has finished. Was something submitted?
    pub fn finished(&mut self, finished: Finished, disks: &mut Disks) -> bool {
        let Finished { tag, result, .. } = finished;
        let job = self.jobs.remove((tag & !self.tags) as usize);
        disks.ended(self.devices[job.device].disk);
        let front = self.devices[job.device].front.as_mut();
        let Some(front) = front.filter(|front| front.serial == job.serial) else { return false };
        self.counts.failed += u64::from(result.is_err());
        let written = if result.is_ok() { job.read } else { 0 };
        let mut session = front.session();
        let guest = session.guest.clone().unwrap_or_else(|| Arc::new(Guest::new()));
        let queue = &mut session.queues[job.queue];
        let how = (&*job.guest, job.status, status_of(result));
        answer(queue, &guest, how, job.head, written);
        let is_settled = front.is_settling && session.in_flight() == 0;
        drop(session);
        front.is_readable |= is_settled;
        false
    }

    /// Tells guests of what was done: once for all of a queue. Is there more to do?
    pub fn send(&mut self, now: Time, disks: &mut Disks) -> bool {
        for at in 0..self.devices.len() {
            let Some(front) = &self.devices[at].front else { continue };
            let mut session = front.session();
            let guest = session.guest.clone().unwrap_or_else(|| Arc::new(Guest::new()));
            session.queues.iter_mut().for_each(|queue| queue.tell(&guest));
            let is_over = self.is_stopping && session.in_flight() == 0;
            drop(session);
            if is_over {
                self.leave(at, disks);
            }
        }
        self.has_more(now, disks)
    }

    /// No more front ends, no more requests.
    pub fn stop(&mut self) {
        self.is_stopping = true;
        self.devices.iter_mut().for_each(|device| device.listener = None);
    }

    /// Since it was to stop: has everybody gone?
    pub fn is_done(&self) -> bool {
        self.clients() == 0
    }

    /// The loop has ended: nobody is answered any more.
    pub fn abandon(&mut self, disks: &mut Disks) {
        self.stop();
        (0..self.devices.len()).for_each(|at| self.leave(at, disks));
    }

    /// A front end has gone, or has to: nobody waits for what it had in flight.
    fn leave(&mut self, at: usize, disks: &mut Disks) {
        let device = &mut self.devices[at];
        let Some(front) = device.front.take() else { return };
        device.is_awaited = true;
        let (tags, jobs) = (self.tags, &self.jobs);
        let is_its = |tag: u64| {
            let job = (tag & tags == tags).then(|| jobs.get((tag & !tags) as usize)).flatten();
            job.is_some_and(|job| job.serial == front.serial)
        };
        for tag in disks.abandon(device.disk, is_its) {
            self.jobs.remove((tag & !tags) as usize);
        }
    }
}

/// Says that a request is done: how, in the memory where it was found, and that it is.
fn answer(
    queue: &mut queue::Queue,
    guest: &Guest,
    (found, at, how): (&Guest, GuestAddress, u8),
    head: u16,
    written: u32,
) {
    // That there is such a byte was looked at.
    let _ = found.write_obj(how, at);
    queue.done(guest, head, written.saturating_add(1));
}

/// Counts it. How many bytes does it write into the guest's memory?
fn begun(counts: &mut Counts, io: &Io) -> u32 {
    let (kind, read) = match io.kind {
        IoKind::Read => (Kind::Read, u32::try_from(io.len).unwrap_or(u32::MAX)),
        IoKind::Write { .. } => (Kind::Write, 0),
        IoKind::Discard => (Kind::Trim, 0),
        IoKind::Zero { .. } => (Kind::Zero, 0),
        _ => (Kind::Flush, 0),
    };
    counts.begun(kind, io.len);
    read
}

impl Front {
    fn new(
        serial: u64,
        stream: mio::net::UnixStream,
        session: Session,
        registry: Arc<Registry>,
        token: usize,
    ) -> io::Result<Front> {
        let socket = UnixStream::from(OwnedFd::from(stream));
        // Reading is tried when it will not wait; who reads expects that he may.
        socket.set_nonblocking(false)?;
        let both = Interest::READABLE | Interest::WRITABLE;
        registry.register(&mut SourceFd(&socket.as_raw_fd()), Token(token), both)?;
        let session = Arc::new(Mutex::new(session));
        let messages = BackendReqHandler::from_stream(socket.try_clone()?, Arc::clone(&session));
        Ok(Front {
            serial,
            socket,
            registry,
            messages,
            session,
            is_readable: true,
            is_settling: false,
            has_gone: false,
        })
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().expect("nobody panics while he has it")
    }

    /// Are there requests that may be begun now?
    fn has_requests(&self) -> bool {
        let session = self.session();
        let may = !self.is_settling && session.guest.is_some();
        may && session.in_flight() < IN_FLIGHT_MAX
            && session.queues.iter().any(queue::Queue::is_pending)
    }

    /// Does what the messages say that have come.
    ///
    /// # Errors
    /// It has gone, or has said what cannot be.
    fn hear(&mut self) -> Result<(), ()> {
        for _ in 0..MESSAGES {
            if !self.is_readable {
                break;
            }
            let Some(code) = self.next_message()? else {
                // More of it is an event, and so is room.
                self.is_readable = false;
                break;
            };
            if is_for_when_quiet(code) && self.session().in_flight() > 0 {
                (self.is_settling, self.is_readable) = (true, false);
                break;
            }
            self.messages.handle_request().map_err(|_| ())?;
            self.is_settling = false;
        }
        Ok(())
    }

    /// The code of a message that is there as a whole, if there is room for its reply too.
    fn next_message(&self) -> Result<Option<u32>, ()> {
        let mut header = [0; HEADER];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match recv(&self.socket, &mut header, flags) {
            Ok((0, _)) => return Err(()),
            Ok((HEADER, _)) => {}
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(_) => return Err(()),
        }
        let number =
            |at: usize| u32::from_ne_bytes(*header[at..].first_chunk().expect("there are three"));
        let len = number(8) as usize;
        if len > MAX_MSG_SIZE {
            return Err(());
        }
        let there = ioctl_fionread(&self.socket).map_err(|_| ())?;
        if there < (HEADER + len) as u64 {
            return Ok(None);
        }
        // Where it can be written at all, there is room for one message.
        let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, Some(&now)) {
            Ok(1) => Ok(Some(number(0))),
            Ok(_) | Err(Errno::INTR) => Ok(None),
            Err(_) => Err(()),
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        let _ = self.registry.deregister(&mut SourceFd(&self.socket.as_raw_fd()));
    }
}

/// Does this message end what is in flight?
fn is_for_when_quiet(code: u32) -> bool {
    let codes = [FrontendReq::GET_VRING_BASE, FrontendReq::RESET_OWNER, FrontendReq::RESET_DEVICE];
    codes.into_iter().any(|other| other as u32 == code)
}
