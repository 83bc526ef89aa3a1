//! The backend of remote disks: ops become requests of the NBD protocol.
//!
//! One non-blocking socket a file, all of them in one epoll descriptor, which is the backend's. An op is a request
//! with the op's number in order as its cookie; a long one of no bytes is several, one after the other.
//!
//! ```text
//!          the connection is lost
//!   Up <──────────────────────────> Down ──> Connecting ──> Up (what is in flight is sent again)
//!                                    ^  a pause  │
//!                                    └───────────┘ refused, too slow, or another disk
//! ```

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cowbell_engine::backend::{Backend, Completion, FileInfo, Harvest, Submission};
use cowbell_engine::mem::Memory;
use cowbell_engine::op::{Hole, OpKind, Target};
use cowbell_engine::ops::{OpRecord, Ops};
use cowbell_engine::sys::clock;
use cowbell_engine::units::{Errno, FileId, OpId, Time};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use crate::client::{Event, ExportInfo};
use crate::link::Link;
use crate::remote_file::{RemoteFile, errno_of, handshake_end};
use crate::requests::What;
use crate::wire::{error, export, state};

/// Does ops on the disks of NBD servers.
///
/// It computes nothing: it is used as the second of [`Both`](cowbell_engine::both::Both), whose first does
/// computations on threads and has the files of this machine. A remote disk has one length for ever, as a block
/// device has: what lies behind its end fails with [`Errno::NO_SPACE`].
///
/// # When the connection is lost
///
/// With [`reconnect`](crate::RemoteOptions::reconnect) of 0 all ops in flight fail with [`Errno::IO`], and all later ones.
/// Otherwise the connection is made again, and what was in flight is sent again. An op that has waited so long
/// fails; attempts go on, so that later ops may find the server back. Until then those fail at once.
///
/// Sending again is safe on these terms. Every request says what shall be at a place, and not how it shall
/// change, so doing it twice is doing it once; and no op that has come back is done again. Two things
/// nobody can see from here:
///
/// - *A server that has lost writes it had answered*, because its machine failed and they were not stable. A
///   flush on the new connection then succeeds without them. The guest would have been told so by its own
///   disk: it would have lost power.
/// - *A server that still works on a request of the old connection* while it does those of the new one. If a
///   write has been answered on the new connection, and the same place was then written again, the old one
///   may come last. A server that ends what it has before it lets a client in again (QEMU's, with one
///   client at a time) does not do that.
///
/// Who cannot rely on his server for both leaves `reconnect` at 0: then an error tells of every loss.
#[derive(Debug)]
pub struct Remote {
    epoll: OwnedFd,
    /// By their indices.
    files: Vec<Option<Attached>>,
    /// Ops that ended without being harvested.
    answered: Vec<Completion>,
    /// The last harvest has left something to be received.
    has_more: bool,
}

/// A file.
#[derive(Debug)]
struct Attached {
    id: FileId,
    file: RemoteFile,
    state: State,
    /// Ops that have not come back, in the order in which they came; the keys are their cookies.
    pending: BTreeMap<u64, Pending>,
    next_cookie: u64,
    /// Since when it is not connected.
    down_since: Option<Time>,
    /// Attempts to connect since a request was answered last.
    attempts: u32,
    /// Its connection is watched for room, too.
    is_watched: bool,
    trouble: Option<String>,
}

#[derive(Debug)]
enum State {
    Up(Link),
    /// Until that moment.
    Connecting(Link, Time),
    /// An attempt is made then, or never.
    Down(Option<Time>),
}

/// An op that has not come back.
#[derive(Debug)]
struct Pending {
    op: OpId,
    what: What,
    /// What is left of it.
    offset: u64,
    len: u64,
    /// Bytes of the first block that the question is not about.
    skew: u64,
    /// A flush makes it stable in the end, of a server that cannot do it otherwise.
    flush: Flush,
    /// When its connection was lost first.
    lost: Option<Time>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    No,
    Later,
    Now,
}

/// Bytes that one harvest receives from a server before it looks after the others.
const HARVEST_MAX: usize = 4 << 20;
/// The pause before the second attempt to connect; each is twice as long as the one before.
const PAUSE_MS: u64 = 20;
/// The longest.
const PAUSE_MAX_MS: u64 = 2000;
/// As the kernel says of a descriptor that is none.
const NOT_ATTACHED: Errno = Errno(rustix::io::Errno::BADF.raw_os_error());

/// What becomes of an op.
enum Plan {
    Answer(Result<u64, Errno>),
    Ask(Pending),
}

impl Plan {
    fn of(op: OpId, record: &OpRecord, file: &RemoteFile) -> Plan {
        let info = &file.info;
        let (offset, len, block) = (record.offset(), record.remaining(), u64::from(info.block_min));
        let kind = record.op.kind;
        let size = info.size;
        let there = size.saturating_sub(offset).min(len);
        let is_inside = offset.checked_add(len).is_some_and(|end| end <= size);
        let is_writable = !file.options.read_only && !info.can(export::READ_ONLY);
        let is_aligned = offset % block == 0 && len % block == 0;
        let ask = |what, offset, len| {
            let (skew, flush, lost) = (0, Flush::No, None);
            Plan::Ask(Pending { op, what, offset, len, skew, flush, lost })
        };
        let answer = |ok: bool, error| Plan::Answer(if ok { Ok(0) } else { Err(error) });
        match kind {
            OpKind::Compute(_) | OpKind::Copy { .. } => Plan::Answer(Err(Errno::NOT_SUPPORTED)),
            OpKind::Flush if !is_writable || !info.can(export::SEND_FLUSH) => Plan::Answer(Ok(0)),
            OpKind::Flush => ask(What::Flush, 0, 0),
            OpKind::Truncate => answer(offset <= size, Errno::NO_SPACE),
            _ if len == 0 => Plan::Answer(Ok(0)),
            OpKind::Allocate => answer(is_inside, Errno::NO_SPACE),
            OpKind::Read if there == 0 => Plan::Answer(Ok(0)),
            OpKind::Read | OpKind::Write { .. } | OpKind::Zero { .. } if !is_aligned => {
                Plan::Answer(Err(Errno::INVALID))
            }
            OpKind::Read => ask(What::Read, offset, there.min(info.longest(What::Read))),
            OpKind::Write { .. } | OpKind::Zero { .. } if !is_writable => {
                Plan::Answer(Err(Errno::READ_ONLY))
            }
            OpKind::Zero { .. } if !info.can(export::SEND_WRITE_ZEROES) => {
                Plan::Answer(Err(Errno::NOT_SUPPORTED))
            }
            OpKind::Write { .. } | OpKind::Zero { .. } if !is_inside => {
                Plan::Answer(Err(Errno::NO_SPACE))
            }
            OpKind::Write { fua } => {
                let what = What::Write { fua: fua && info.can(export::SEND_FUA) };
                let mut plan = ask(what, offset, len.min(info.longest(what)));
                let flushes = fua && !info.can(export::SEND_FUA) && info.can(export::SEND_FLUSH);
                if let (Plan::Ask(pending), true) = (&mut plan, flushes) {
                    pending.flush = Flush::Later;
                }
                plan
            }
            OpKind::Zero { unmap } => {
                ask(What::Zero { keep: !unmap, fast: false, fua: false }, offset, len)
            }
            OpKind::Discard if there == 0 || !is_writable || !info.can(export::SEND_TRIM) => {
                Plan::Answer(Ok(0))
            }
            OpKind::Discard => {
                // Whole blocks; a hint may be left out.
                let (start, end) =
                    (offset.next_multiple_of(block), (offset + there) / block * block);
                let what = What::Trim { fua: false };
                if start < end { ask(what, start, end - start) } else { Plan::Answer(Ok(0)) }
            }
            OpKind::Hole if there == 0 || !info.has_allocation => {
                Plan::Answer(Ok(Hole { is_hole: there == 0, len }.to_answer()))
            }
            OpKind::Hole => {
                let what = What::Status { one: true };
                let skew = offset % block;
                let asked = (skew + there).next_multiple_of(block).min(info.longest(what));
                let mut plan = ask(what, offset - skew, asked);
                if let Plan::Ask(pending) = &mut plan {
                    pending.skew = skew;
                }
                plan
            }
        }
    }
}

impl Pending {
    /// Bytes of its next request.
    fn part(&self, info: &ExportInfo) -> u64 {
        self.len.min(info.longest(self.what))
    }

    fn send(&self, cookie: u64, info: &ExportInfo, link: &mut Link) {
        match self.flush {
            Flush::Now => link.client.ask(cookie, What::Flush, 0, 0),
            _ => link.client.ask(cookie, self.what, self.offset, self.part(info)),
        }
    }
}

impl Attached {
    fn new(id: FileId, mut file: RemoteFile, now: Time) -> io::Result<Attached> {
        let state = match file.take_link() {
            Some(link) => State::Up(link),
            None if file.options.reconnect.is_zero() => {
                return Err(io::Error::new(io::ErrorKind::NotConnected, "the connection was lost"));
            }
            None => State::Down(Some(now)),
        };
        let down_since = matches!(state, State::Down(_)).then_some(now);
        Ok(Attached {
            id,
            file,
            state,
            pending: BTreeMap::new(),
            next_cookie: 1,
            down_since,
            attempts: 0,
            is_watched: false,
            trouble: None,
        })
    }

    /// When an op fails whose connection was lost then.
    fn patience(&self, lost: Time) -> Time {
        lost.plus_ns(u64::try_from(self.file.options.reconnect.as_nanos()).unwrap_or(u64::MAX))
    }

    /// Takes an op; what can be said of it at once is said.
    fn take(&mut self, op: OpId, record: &OpRecord, now: Time) -> Option<Result<u64, Errno>> {
        let mut pending = match Plan::of(op, record, &self.file) {
            Plan::Answer(answer) => return Some(answer),
            Plan::Ask(pending) => pending,
        };
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        if let State::Up(link) = &mut self.state {
            pending.send(cookie, &self.file.info, link);
        } else {
            pending.lost = self.down_since;
            if pending.lost.is_some_and(|lost| self.patience(lost) <= now) {
                return Some(Err(Errno::IO));
            }
        }
        self.pending.insert(cookie, pending);
        None
    }

    /// Sends what there is, as much as the socket takes.
    fn send(&mut self, epoll: &OwnedFd, ops: &Ops, mem: &Memory) -> io::Result<()> {
        let Attached { state, pending, is_watched, .. } = self;
        let (State::Up(link) | State::Connecting(link, _)) = state else { return Ok(()) };
        link.send(|cookie, at, to| {
            let record = &ops[pending[&cookie].op];
            mem.gather(&record.op.segs, record.moved + at, to);
        })?;
        if link.is_sending() != *is_watched {
            *is_watched = link.is_sending();
            let room = if *is_watched { EventFlags::OUT } else { EventFlags::empty() };
            epoll::modify(epoll, &*link, EventData::new_u64(0), EventFlags::IN | room)?;
        }
        Ok(())
    }

    /// Hears what there is. Answers whether there may be more.
    fn receive(
        &mut self,
        ops: &Ops,
        mem: &mut Memory,
        done: &mut Vec<Completion>,
    ) -> io::Result<bool> {
        let mut received = 0;
        loop {
            let (State::Up(link) | State::Connecting(link, _)) = &mut self.state else {
                return Ok(false);
            };
            let Some(event) = link.event()? else { return Ok(false) };
            match event {
                Event::Nothing | Event::Over => {}
                Event::Ready => self.begin_again()?,
                Event::Data { cookie, at, len } => {
                    let record = &ops[self.pending[&cookie].op];
                    mem.scatter(&record.op.segs, record.moved + at, link.data(len));
                    received += len;
                }
                Event::Zeros { cookie, at, len } => {
                    let record = &ops[self.pending[&cookie].op];
                    mem.zero(&record.op.segs, record.moved + at, len);
                    received += len as usize;
                }
                Event::Done { result: Err(error::SHUTDOWN), .. } => {
                    return Err(io::Error::other("the server goes"));
                }
                Event::Done { cookie, result } => {
                    self.attempts = 0;
                    let answer = self.answer(cookie, result);
                    if let Some(answer) = answer
                        && let Some(pending) = self.pending.remove(&cookie)
                    {
                        done.push(Completion::new(pending.op, answer));
                    }
                }
            }
            if received >= HARVEST_MAX {
                return Ok(true);
            }
        }
    }

    /// A request was answered: what its op answers, unless there is more to do.
    fn answer(
        &mut self,
        cookie: u64,
        result: Result<Option<crate::Extent>, u32>,
    ) -> Option<Result<u64, Errno>> {
        let info = &self.file.info;
        let pending = self.pending.get_mut(&cookie).expect("the client knows only what is pending");
        let State::Up(link) = &mut self.state else { unreachable!("requests are answered") };
        let extent = match result {
            Ok(extent) => extent,
            // A hint.
            Err(error::NOTSUP | error::INVAL) if matches!(pending.what, What::Trim { .. }) => {
                return Some(Ok(0));
            }
            Err(error) => return Some(Err(errno_of(error))),
        };
        match pending.what {
            What::Write { .. } if pending.flush == Flush::Later => {
                pending.flush = Flush::Now;
                pending.send(cookie, info, link);
                None
            }
            What::Read | What::Write { .. } => Some(Ok(pending.len)),
            What::Status { .. } => {
                let extent = extent.filter(|extent| extent.len > pending.skew);
                let hole = extent.map_or(Hole { is_hole: false, len: 1 }, |extent| Hole {
                    is_hole: extent.flags & state::ZERO != 0,
                    len: extent.len - pending.skew,
                });
                Some(Ok(hole.to_answer()))
            }
            _ => {
                let part = pending.part(info);
                (pending.offset, pending.len) = (pending.offset + part, pending.len - part);
                if pending.len == 0 {
                    return Some(Ok(0));
                }
                // That was heard from a server that works.
                pending.lost = None;
                pending.send(cookie, info, link);
                None
            }
        }
    }

    /// The connection is there again: all that is in flight is sent again.
    fn begin_again(&mut self) -> io::Result<()> {
        let State::Connecting(link, _) = &self.state else { return Ok(()) };
        if !link.client.info().is_some_and(|info| self.file.is_same(info)) {
            return Err(io::Error::other("the server has another disk now"));
        }
        let State::Connecting(mut link, _) = std::mem::replace(&mut self.state, State::Down(None))
        else {
            unreachable!("it was")
        };
        for (&cookie, pending) in &mut self.pending {
            if pending.flush == Flush::Now {
                pending.flush = Flush::Later;
            }
            pending.send(cookie, &self.file.info, &mut link);
        }
        self.state = State::Up(link);
        self.down_since = None;
        Ok(())
    }

    /// The connection is no more.
    fn lose(&mut self, why: &io::Error, now: Time) {
        self.trouble = Some(why.to_string());
        self.is_watched = false;
        let pause = (PAUSE_MS << self.attempts.min(10)).min(PAUSE_MAX_MS);
        let due = if self.attempts == 0 { now } else { now.plus_ms(pause) };
        let never = self.file.options.reconnect.is_zero();
        self.state = State::Down((!never).then_some(due));
        self.attempts += 1;
        let since = *self.down_since.get_or_insert(now);
        for pending in self.pending.values_mut() {
            pending.lost.get_or_insert(since);
        }
    }

    /// Those that have waited long enough fail.
    fn give_up(&mut self, now: Time, done: &mut Vec<Completion>) {
        if let State::Up(_) = self.state {
            return;
        }
        while let Some((&cookie, pending)) = self
            .pending
            .iter()
            .find(|(_, pending)| pending.lost.is_some_and(|lost| self.patience(lost) <= now))
        {
            done.push(Completion::new(pending.op, Err(Errno::IO)));
            self.pending.remove(&cookie);
        }
    }

    /// Goes on connecting if it is time.
    fn connect(&mut self, epoll: &OwnedFd, now: Time) {
        let begun = match self.state {
            State::Down(Some(due)) if due <= now => {
                let peers = &self.file.peers;
                let peer = &peers[self.attempts as usize % peers.len()];
                Link::begin(peer, &self.file.address.export).and_then(|link| {
                    epoll::add(epoll, &link, EventData::new_u64(0), EventFlags::IN)?;
                    self.state = State::Connecting(link, handshake_end(now));
                    Ok(())
                })
            }
            State::Connecting(_, until) if until <= now => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        };
        if let Err(why) = begun {
            self.lose(&why, now);
        }
    }

    /// When something has to be done although the server says nothing.
    fn next_deadline(&self) -> Option<Time> {
        let due = match self.state {
            State::Up(_) => return None,
            State::Connecting(_, until) => Some(until),
            State::Down(due) => due,
        };
        let lost = self.pending.values().filter_map(|pending| pending.lost);
        due.into_iter().chain(lost.min().map(|lost| self.patience(lost))).min()
    }
}

impl Remote {
    /// A backend without files.
    ///
    /// # Errors
    ///
    /// If there are too many descriptors.
    pub fn new() -> io::Result<Remote> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Remote { epoll, files: Vec::new(), answered: Vec::new(), has_more: false })
    }

    /// Is the file connected at this moment? Answers no for one that is not attached.
    pub fn is_connected(&self, id: FileId) -> bool {
        let file = self.files.get(id.index()).and_then(Option::as_ref);
        file.is_some_and(|file| file.id == id && matches!(file.state, State::Up(_)))
    }

    /// Why the file's connection was lost last, or could not be made again.
    pub fn trouble(&self, id: FileId) -> Option<&str> {
        let file = self.files.get(id.index())?.as_ref().filter(|file| file.id == id);
        file?.trouble.as_deref()
    }
}

impl Backend for Remote {
    type File = RemoteFile;

    fn attach(&mut self, id: FileId, file: RemoteFile) -> io::Result<FileInfo> {
        if id.index() >= self.files.len() {
            self.files.resize_with(id.index() + 1, || None);
        }
        let place = &mut self.files[id.index()];
        if place.is_some() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{id:?} is taken")));
        }
        let info = file.info();
        let attached = Attached::new(id, file, clock())?;
        if let State::Up(link) = &attached.state {
            epoll::add(&self.epoll, link, EventData::new_u64(0), EventFlags::IN)?;
        }
        *place = Some(attached);
        Ok(info)
    }

    fn detach(&mut self, id: FileId) -> Option<RemoteFile> {
        let place = self.files.get_mut(id.index())?;
        let Attached { mut file, state, .. } = place.take_if(|file| file.id == id)?;
        if let State::Up(link) = state {
            let _ = epoll::delete(&self.epoll, &link);
            if link.client.in_flight() == 0 && !link.is_sending() {
                file.give_link(link);
            }
        }
        Some(file)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        if submission.is_empty() {
            return;
        }
        let Remote { epoll, files, answered, .. } = self;
        let now = clock();
        while let Some((op, record)) = submission.peek() {
            let attached = match record.op.target {
                Target::File(id) => files.get_mut(id.index()).and_then(Option::as_mut),
                _ => None,
            };
            let answer = match (attached, record.op.target) {
                (Some(file), Target::File(id)) if file.id == id => file.take(op, record, now),
                (_, Target::File(_)) => Some(Err(NOT_ATTACHED)),
                _ => Some(Err(Errno::NOT_SUPPORTED)),
            };
            answered.extend(answer.map(|answer| Completion::new(op, answer)));
            submission.take(1);
        }
        for file in files.iter_mut().flatten() {
            if let Err(why) = file.send(epoll, submission.ops, submission.mem) {
                file.lose(&why, now);
                file.give_up(now, answered);
            }
        }
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        let Remote { epoll, files, answered, has_more } = self;
        let now = clock();
        *has_more = false;
        harvest.done.append(answered);
        for file in files.iter_mut().flatten() {
            let heard = file.receive(harvest.ops, harvest.mem, harvest.done);
            // What was heard may have made room, or asks for more to be said.
            let sent = heard.and_then(|more| {
                *has_more |= more;
                file.send(epoll, harvest.ops, harvest.mem)
            });
            if let Err(why) = sent {
                file.lose(&why, now);
            }
            file.connect(epoll, now);
            file.give_up(now, harvest.done);
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn wants_retry(&self) -> bool {
        self.has_more || !self.answered.is_empty()
    }

    fn next_deadline(&self) -> Option<Time> {
        self.files.iter().flatten().filter_map(Attached::next_deadline).min()
    }

    fn clock(&self) -> Time {
        clock()
    }
}
