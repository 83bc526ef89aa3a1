//! NBD: sockets on one side, the protocol ([`cowbell_nbd`]) in the middle, disks on the other.
//!
//! A client is in one of these queues, or in none while it has nothing to do:
//!
//! - `active`: has bytes to be read or a request to be submitted. It is served for a share of a turn,
//!   then it is the others' turn.
//! - `roomless`: its next request waits for room in the engine. It comes first when there is some.
//! - `starved`: its next request waits for memory, which others have. First come, first served, so a
//!   large request is not passed by small ones for ever.
//! - `unsent`: has replies that were made in this turn.
//!
//! Who is in none is put in one by: an event of its socket, the end of one of its requests, replies
//! that were sent.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::sync::Arc;
use std::time::Duration;

use cowbell_engine::Finished;
use cowbell_engine::mem::Mem;
use cowbell_engine::status::{Status, StatusKind};
use cowbell_engine::step::Io;
use cowbell_engine::units::{Errno, Time};
use cowbell_formats::Format;
use cowbell_nbd::wire::{error, state};
use cowbell_nbd::{Connection, Export, Extent, Limits, Request, Want, What};
use mio::event::Event;
use mio::{Registry, Token};
use slab::Slab;

use crate::fail::Fail;
use crate::serve::disks::{Disks, Served};
use crate::serve::listen::{Listener, Stream};
use crate::serve::memory::ALWAYS;
use crate::serve::status::{Counts, Kind};

/// How long clients are waited for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From its coming to the choice of an export.
    pub handshake: Duration,
    /// While it takes no replies, or has sent half of a message.
    pub stall: Duration,
}

/// Clients at a time; others wait until one goes.
const CLIENTS_MAX: usize = 128;
/// Requests of a client that are begun before it is the others' turn.
const SHARE: usize = 64;
/// And bytes of these.
const SHARE_BYTES: u64 = 4 << 20;
/// Bytes of a client that were read and not taken yet.
const INBOX: usize = 128 << 10;
/// The payload of a write that is worth to be read straight into its place.
const LARGE: usize = 32 << 10;
/// So much is read behind such a payload: the next header, and little that has to be copied.
const BEHIND: usize = 512;
/// Slices in one write.
const SLICES: usize = 128;
/// Whoever moves less than this in the time of a stall stands still.
const PACE: usize = 256 << 10;
/// How often stalls are looked for.
const LOOK_MS: u64 = 500;
/// After the end was asked for, clients have so long to take their last replies.
const LAST_MS: u64 = 2000;
/// How long nobody is let in when there are no descriptors left.
const ACCEPT_PAUSE_MS: u64 = 200;
/// What is read ahead in one piece.
const AHEAD: u64 = 256 << 10;
/// Extents in one answer.
const EXTENTS_MAX: usize = 1024;
/// Questions to the disk for one answer.
const QUESTIONS_MAX: usize = 4096;
/// Up to so many bytes, zeros are written as such, so as fast as a write at least.
const ZEROS_WRITTEN: u64 = 64 << 10;

/// One client.
#[derive(Debug)]
struct Client {
    /// Its index may be used again; this is not.
    serial: u64,
    stream: Stream,
    connection: Connection,
    inbox: Inbox,
    /// There may be something to read, or room to write.
    readable: bool,
    writable: bool,
    /// The client has closed its end. That is told once, maybe before what it sent last was read.
    is_closed: bool,
    is_active: bool,
    is_starved: bool,
    is_unsent: bool,
    /// The last write's payload was large.
    is_large: bool,
    came: Time,
    reading: Pace,
    writing: Pace,
}

/// How fast somebody is who has to move something.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    /// Since when; `None`: there is nothing to be moved.
    since: Option<Time>,
    moved: usize,
}

impl Pace {
    /// So much was moved; and there is more to be moved, or not.
    fn moved(&mut self, count: usize, more: bool, now: Time) {
        self.moved += count;
        if !more {
            *self = Pace::default();
        } else if self.since.is_none() || self.moved >= PACE {
            *self = Pace { since: Some(now), moved: 0 };
        }
    }

    fn stands_still(&self, patience: Duration, now: Time) -> bool {
        self.since.is_some_and(|since| now.since(since) >= patience.as_nanos() as u64)
    }
}

/// Bytes that were read and not taken.
#[derive(Debug)]
struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

/// A request in flight.
#[derive(Debug)]
struct Job {
    /// Its client, if that is there still.
    client: usize,
    serial: u64,
    slot: u32,
    export: usize,
    next: Next,
}

/// What is left to do of a request when its part that is in flight has ended.
#[derive(Debug)]
enum Next {
    /// It was all.
    Nothing,
    /// It was discarded; it has to be stable.
    Flush,
    /// This range is to be read too, only to have been read.
    Ahead { offset: u64, left: u64 },
    /// Of this range more is to be known.
    Ask { offset: u64, left: u64, one: bool, extents: Vec<Extent>, asked: usize },
}

/// See the module.
pub struct Nbd {
    registry: Registry,
    /// The tokens: of listeners, then of clients.
    tokens: usize,
    listeners: Vec<Listener>,
    /// There may be somebody, by listener.
    is_pending: Vec<bool>,
    /// Nobody is let in before.
    accept_again: Option<Time>,
    exports: Arc<[Export]>,
    /// By export: it can say that a range is zeros, whatever there is.
    is_fast: Vec<bool>,
    /// By export and layer: it is a raw image.
    is_raw: Vec<Vec<bool>>,
    clients: Slab<Client>,
    jobs: Slab<Job>,
    active: VecDeque<usize>,
    roomless: Vec<usize>,
    starved: VecDeque<usize>,
    unsent: Vec<usize>,
    patience: Patience,
    /// When stalls are looked for again.
    look: Option<Time>,
    /// Nobody is let in any more; clients have until then.
    until: Option<Time>,
    pub counts: Counts,
}

impl Nbd {
    /// Listens. Its tokens are from `tokens` on.
    pub fn new(
        registry: Registry,
        tokens: usize,
        mut listeners: Vec<Listener>,
        disks: &[Served],
        patience: Patience,
    ) -> Result<Nbd, Fail> {
        for (at, listener) in listeners.iter_mut().enumerate() {
            listener.register(&registry, Token(tokens + at))?;
        }
        let exports = disks.iter().map(|disk| Export {
            description: format!("{} image", disk.formats[0].name()),
            read_only: disk.read_only,
            ..Export::new(&disk.name, disk.size)
        });
        let is_raw = |disk: &Served| disk.formats.iter().map(|&f| f == Format::Raw).collect();
        Ok(Nbd {
            registry,
            tokens,
            is_pending: vec![true; listeners.len()],
            listeners,
            accept_again: None,
            exports: exports.collect(),
            is_fast: disks.iter().map(|disk| disk.marks_zeros).collect(),
            is_raw: disks.iter().map(is_raw).collect(),
            clients: Slab::new(),
            jobs: Slab::new(),
            active: VecDeque::new(),
            roomless: Vec::new(),
            starved: VecDeque::new(),
            unsent: Vec::new(),
            patience,
            look: None,
            until: None,
            counts: Counts::default(),
        })
    }

    /// Where an export of this name is to be found.
    pub fn uris(&self, name: &str) -> impl Iterator<Item = String> {
        self.listeners.iter().map(move |listener| listener.uri(name))
    }

    /// How many clients are there?
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    /// A descriptor with a token of ours is ready.
    pub fn event(&mut self, token: usize, event: &Event) {
        let at = token - self.tokens;
        if let Some(pending) = self.is_pending.get_mut(at) {
            *pending = true;
            return;
        }
        // The listeners may have gone; their number has not.
        let Some(client) = self.clients.get_mut(at - self.is_pending.len()) else { return };
        // What has gone wrong is found out by reading.
        client.is_closed |= event.is_read_closed() || event.is_error();
        client.readable |= event.is_readable() || client.is_closed;
        client.writable |= event.is_writable() || event.is_write_closed();
        let (readable, has_output) = (client.readable, client.connection.has_output());
        let key = at - self.is_pending.len();
        if readable {
            self.activate(key);
        }
        if has_output {
            self.mark_unsent(key);
        }
    }

    /// When [`work`](Nbd::work) is to be called although nothing has happened.
    pub fn deadline(&self) -> Option<Time> {
        [self.look, self.accept_again, self.until].into_iter().flatten().min()
    }

    /// Lets clients in, reads what they have sent, submits what they want: to each its share. Is
    /// there more to do?
    pub fn work(&mut self, now: Time, disks: &mut Disks) -> bool {
        if self.look.is_some_and(|look| now >= look) {
            self.look_for_stalls(now, disks);
        }
        if self.until.is_some_and(|until| now >= until) {
            self.until = Some(now.plus_ms(LAST_MS));
            // It is for the client to take what there is. Others wait for a disk, as long as that takes.
            self.drop_clients(disks, |client| client.connection.in_flight() == 0);
        }
        self.accept(now);
        let clients = &self.clients;
        let have_room = |key: &mut usize| clients[*key].has_room(disks);
        let have_room: Vec<usize> = self.roomless.extract_if(.., have_room).collect();
        have_room.into_iter().rev().for_each(|key| self.active.push_front(key));
        // Those who have waited come first, in their order, for as long as there is something.
        while let Some(&key) = self.starved.front() {
            self.starved.pop_front();
            match self.clients.get_mut(key) {
                Some(client) if client.is_starved => client.is_starved = false,
                _ => continue,
            }
            self.serve(key, now, disks, true);
            if self.clients.get(key).is_some_and(|client| client.is_starved) {
                // It is at the end now, and was the first.
                self.starved.rotate_right(1);
                break;
            }
        }
        for _ in 0..self.active.len() {
            let Some(key) = self.active.pop_front() else { break };
            if let Some(client) = self.clients.get_mut(key) {
                client.is_active = false;
                if !client.is_starved {
                    self.serve(key, now, disks, false);
                }
            }
        }
        !self.active.is_empty()
    }

    /// A request has finished, or a part of it has. Was something submitted?
    pub fn finished(&mut self, finished: Finished, disks: &mut Disks) -> bool {
        let Finished { tag, result, mem } = finished;
        let key = tag as usize;
        let job = &mut self.jobs[key];
        disks.ended(job.export);
        let client = self.clients.get_mut(job.client).filter(|its| its.serial == job.serial);
        let Some(client) = client else {
            // Nobody waits for the rest of it.
            give(mem, disks);
            self.jobs.remove(key);
            return false;
        };
        let result = result.map_err(error_of);
        let mem = mem.into_buf();
        if result.is_ok()
            && let Some(io) = job.go_on(mem.as_deref(), &self.is_raw)
        {
            disks.submit(job.export, io, mem.map_or(Mem::None, Mem::Owned), tag);
            return true;
        }
        let job = self.jobs.remove(key);
        self.counts.failed += u64::from(result.is_err());
        match (job.next, result) {
            (Next::Ask { extents, .. }, Ok(())) if !extents.is_empty() => {
                client.connection.finish_status(job.slot, &extents);
                mem.into_iter().for_each(|buf| disks.memory.give(buf));
            }
            (Next::Ask { .. }, result) => {
                mem.into_iter().for_each(|buf| disks.memory.give(buf));
                client.connection.finish(job.slot, result.and(Err(error::IO)), None);
            }
            (Next::Ahead { .. }, result) => {
                mem.into_iter().for_each(|buf| disks.memory.give(buf));
                client.connection.finish(job.slot, result, None);
            }
            (Next::Nothing | Next::Flush, result) => {
                let mem = client.connection.finish(job.slot, result, mem);
                mem.into_iter().for_each(|buf| disks.memory.give(buf));
            }
        }
        self.mark_unsent(job.client);
        self.go_on(job.client);
        false
    }

    /// Sends the replies that there are. Is there more to do?
    pub fn send(&mut self, now: Time, disks: &mut Disks) -> bool {
        let mut unsent = std::mem::take(&mut self.unsent);
        for key in unsent.drain(..) {
            let Some(client) = self.clients.get_mut(key) else { continue };
            client.is_unsent = false;
            let sent = client.send(now, disks);
            if sent.is_err() || client.connection.is_over() {
                self.drop_client(key, disks);
                continue;
            }
            // There may be room for what could not be taken before.
            let is_waiting = client.writing.since.is_some();
            self.go_on(key);
            if is_waiting {
                self.look.get_or_insert(now.plus_ms(LOOK_MS));
            }
        }
        self.unsent = unsent;
        // Whoever waits for memory or room: some may have become free in this turn.
        let has_room = self.roomless.iter().any(|&key| self.clients[key].has_room(disks));
        let has_memory = self.first_starved_can_go_on(disks);
        !self.active.is_empty() || has_room || has_memory || self.can_let_in(now)
    }

    fn can_let_in(&self, now: Time) -> bool {
        let may = self.accept_again.is_none_or(|again| now >= again);
        may && self.clients.len() < CLIENTS_MAX && self.is_pending.contains(&true)
    }

    fn first_starved_can_go_on(&self, disks: &Disks) -> bool {
        let first = self.starved.front().and_then(|&key| self.clients.get(key));
        first.is_some_and(|client| match client.connection.want() {
            Want::Memory(len) => disks.memory.has(len),
            _ => true,
        })
    }

    /// No more clients, no more requests.
    pub fn stop(&mut self, now: Time, disks: &mut Disks) {
        self.listeners.clear();
        self.is_pending.iter_mut().for_each(|pending| *pending = false);
        self.until = Some(now.plus_ms(LAST_MS));
        let all: Vec<usize> = self.clients.iter().map(|(key, _)| key).collect();
        for key in all {
            self.clients[key].connection.end(|buf| disks.memory.give(buf));
            self.mark_unsent(key);
        }
    }

    /// The loop has ended: nobody is answered any more.
    pub fn abandon(&mut self, disks: &mut Disks) {
        self.listeners.clear();
        self.drop_clients(disks, |_| true);
    }

    fn drop_clients(&mut self, disks: &mut Disks, which: impl Fn(&Client) -> bool) {
        let those = self.clients.iter().filter(|(_, client)| which(client));
        let those: Vec<usize> = those.map(|(key, _)| key).collect();
        those.into_iter().for_each(|key| self.drop_client(key, disks));
    }

    /// Since it was to stop: has everybody gone?
    pub fn is_done(&self) -> bool {
        self.clients.is_empty()
    }

    fn accept(&mut self, now: Time) {
        if !self.can_let_in(now) {
            return;
        }
        self.accept_again = None;
        for at in 0..self.listeners.len() {
            while self.is_pending[at] && self.clients.len() < CLIENTS_MAX {
                match self.listeners[at].accept() {
                    Ok(stream) => self.let_in(stream, now),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        self.is_pending[at] = false;
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                    Err(_) => {
                        // No descriptors or no memory: some are given back by and by.
                        self.accept_again = Some(now.plus_ms(ACCEPT_PAUSE_MS));
                        return;
                    }
                }
            }
        }
    }

    fn let_in(&mut self, mut stream: Stream, now: Time) {
        let entry = self.clients.vacant_entry();
        let key = entry.key();
        let token = Token(self.tokens + self.is_pending.len() + key);
        if stream.register(&self.registry, token).is_err() {
            return;
        }
        self.counts.clients += 1;
        entry.insert(Client {
            serial: self.counts.clients,
            stream,
            connection: Connection::new(self.exports.clone(), Limits::default()),
            inbox: Inbox { bytes: vec![0; INBOX].into(), start: 0, end: 0 },
            readable: true,
            writable: true,
            is_closed: false,
            is_active: false,
            is_starved: false,
            is_unsent: false,
            is_large: false,
            came: now,
            reading: Pace::default(),
            writing: Pace::default(),
        });
        self.activate(key);
        self.mark_unsent(key);
        self.look.get_or_insert(now.plus_ms(LOOK_MS));
    }

    /// The client's share of a turn. `is_first`: of those who wait for memory.
    fn serve(&mut self, key: usize, now: Time, disks: &mut Disks, is_first: bool) {
        let (mut requests, mut bytes) = (SHARE, SHARE_BYTES);
        loop {
            let client = &mut self.clients[key];
            match client.connection.want() {
                Want::Submit => {
                    if !client.has_room(disks) {
                        // As if it were active: so it is not queued twice.
                        client.is_active = true;
                        self.roomless.push(key);
                        break;
                    }
                    let request = client.connection.next().expect("there is one");
                    // The bytes of a write were counted when they were read.
                    let read = if request.what == What::Read { request.len } else { 0 };
                    (requests, bytes) = (requests - 1, bytes.saturating_sub(read));
                    self.submit(key, request, disks);
                }
                Want::Memory(len) => {
                    let is_turn = is_first || self.starved.is_empty();
                    if !(client.may_always(len) || is_turn && disks.memory.has(len)) {
                        return self.starve(key);
                    }
                    client.is_large = len >= LARGE;
                    client.connection.give(disks.memory.take(len));
                }
                Want::Bytes => match client.read() {
                    Ok(Some(count)) => {
                        bytes = bytes.saturating_sub(count as u64);
                        let more = client.connection.is_mid_message();
                        client.reading.moved(count, more, now);
                    }
                    Ok(None) => {
                        if client.reading.since.is_some() {
                            self.look.get_or_insert(now.plus_ms(LOOK_MS));
                        }
                        break;
                    }
                    Err(_) => return self.drop_client(key, disks),
                },
                Want::Room => break,
                Want::Nothing => {
                    self.mark_unsent(key);
                    break;
                }
            }
            if requests == 0 || bytes == 0 {
                self.activate(key);
                break;
            }
        }
        // What was refused has its reply already.
        if self.clients[key].connection.has_output() {
            self.mark_unsent(key);
        }
    }

    fn submit(&mut self, key: usize, request: Request, disks: &mut Disks) {
        let Request { slot, export, what, offset, len, mem } = request;
        self.counts.begun(kind_of(what), len);
        let client = &mut self.clients[key];
        let refused = match what {
            What::Zero { fast: true, .. } if len > ZEROS_WRITTEN && !self.is_fast[export] => {
                Some(Err(error::NOTSUP))
            }
            // What is read past the page cache is nowhere kept.
            What::Cache if !disks.are_cached() => Some(Ok(())),
            _ => None,
        };
        if let Some(result) = refused {
            client.connection.finish(slot, result, None);
            return self.mark_unsent(key);
        }
        let mut mem = mem;
        let (io, next) = match what {
            What::Read => (Io::read(offset, len), Next::Nothing),
            What::Write { .. } => (Io::write(offset, len), Next::Nothing),
            What::Flush => (Io::flush(), Next::Nothing),
            What::Trim { fua } => {
                let next = if fua { Next::Flush } else { Next::Nothing };
                (Io::discard(offset, len), next)
            }
            What::Zero { keep, .. } => (Io::zero(offset, len, !keep), Next::Nothing),
            What::Cache => {
                let now = len.min(AHEAD);
                mem = Some(disks.memory.take(now as usize));
                (Io::read(offset, now), Next::Ahead { offset: offset + now, left: len - now })
            }
            What::Status { one } => {
                mem = Some(disks.memory.take(Status::BYTES));
                let next = Next::Ask { offset, left: len, one, extents: Vec::new(), asked: 0 };
                (Io::status(offset, len), next)
            }
        };
        let is_stable = matches!(what, What::Write { fua: true } | What::Zero { fua: true, .. });
        let io = if is_stable { io.stable() } else { io };
        let serial = client.serial;
        let tag = self.jobs.insert(Job { client: key, serial, slot, export, next });
        disks.submit(export, io, mem.map_or(Mem::None, Mem::Owned), tag as u64);
    }

    fn activate(&mut self, key: usize) {
        let client = &mut self.clients[key];
        if !client.is_active && !client.is_starved {
            client.is_active = true;
            self.active.push_back(key);
        }
    }

    /// It has finished or sent something, and may have room for more.
    fn go_on(&mut self, key: usize) {
        let client = &mut self.clients[key];
        if client.is_starved
            && matches!(client.connection.want(), Want::Memory(len) if client.may_always(len))
        {
            client.is_starved = false;
            self.starved.retain(|&other| other != key);
        }
        if self.clients[key].wants_to_go_on() {
            self.activate(key);
        }
    }

    fn starve(&mut self, key: usize) {
        self.clients[key].is_starved = true;
        self.starved.push_back(key);
        if self.clients[key].connection.has_output() {
            self.mark_unsent(key);
        }
    }

    fn mark_unsent(&mut self, key: usize) {
        let client = &mut self.clients[key];
        if !client.is_unsent {
            client.is_unsent = true;
            self.unsent.push(key);
        }
    }

    /// It is gone. Its requests run to their end, and keep their memory until then.
    fn drop_client(&mut self, key: usize, disks: &mut Disks) {
        let client = self.clients.remove(key);
        self.counts.broken += u64::from(client.connection.complaint().is_some());
        client.connection.abandon(|buf| disks.memory.give(buf));
        self.active.retain(|&other| other != key);
        self.roomless.retain(|&other| other != key);
        self.starved.retain(|&other| other != key);
        self.unsent.retain(|&other| other != key);
        if self.is_done() && self.listeners.is_empty() {
            // There is nothing left to look after.
            (self.look, self.until) = (None, None);
        }
    }

    fn look_for_stalls(&mut self, now: Time, disks: &mut Disks) {
        let Patience { handshake, stall } = self.patience;
        let mut is_looked_for = false;
        let mut stalled = Vec::new();
        for (key, client) in &self.clients {
            let is_late = !client.connection.is_serving()
                && now.since(client.came) >= handshake.as_nanos() as u64;
            let paces = [client.reading, client.writing];
            if is_late || paces.iter().any(|pace| pace.stands_still(stall, now)) {
                stalled.push(key);
            }
            is_looked_for |=
                !client.connection.is_serving() || paces.iter().any(|pace| pace.since.is_some());
        }
        for key in stalled {
            self.counts.stalled += 1;
            self.drop_client(key, disks);
        }
        self.look = is_looked_for.then(|| now.plus_ms(LOOK_MS));
    }
}

impl Job {
    /// A part has ended well: the next one, if there is one. `mem` is that of the part.
    fn go_on(&mut self, mem: Option<&[u8]>, is_raw: &[Vec<bool>]) -> Option<Io> {
        match &mut self.next {
            Next::Nothing => None,
            Next::Flush => {
                self.next = Next::Nothing;
                Some(Io::flush())
            }
            Next::Ahead { left: 0, .. } => None,
            Next::Ahead { offset, left } => {
                let buf = mem.map_or(0, |mem| mem.len() as u64);
                // The last piece is read again with some of the one before: the memory has its size.
                let at = (*offset + *left).min(*offset + buf) - buf;
                let now = (at + buf).saturating_sub(*offset);
                (*offset, *left) = (*offset + now, *left - now);
                Some(Io::read(at, buf))
            }
            Next::Ask { offset, left, one, extents, asked } => {
                let status = mem.and_then(Status::from_bytes)?;
                let len = status.len.clamp(1, *left);
                let flags = flags_of(&status, &is_raw[self.export]);
                (*offset, *left, *asked) = (*offset + len, *left - len, *asked + 1);
                let count = extents.len();
                match extents.last_mut() {
                    Some(last) if last.flags == flags => last.len += len,
                    Some(_) if *one || count == EXTENTS_MAX => return None,
                    _ => extents.push(Extent { len, flags }),
                }
                (*left > 0 && *asked < QUESTIONS_MAX).then(|| Io::status(*offset, *left))
            }
        }
    }
}

impl Client {
    /// Gives bytes to the protocol: those in the inbox, or else new ones. How many; `None`: there
    /// are none.
    fn read(&mut self) -> io::Result<Option<usize>> {
        if self.inbox.is_empty() {
            match self.fill()? {
                None => return Ok(None),
                Some(count) if self.inbox.is_empty() => return Ok(Some(count)),
                Some(_) => {}
            }
        }
        let Inbox { bytes, start, end } = &mut self.inbox;
        let taken = self.connection.take(&bytes[*start..*end]);
        *start += taken;
        Ok(Some(taken))
    }

    /// Reads from the socket: a payload into its place, the rest into the inbox.
    fn fill(&mut self) -> io::Result<Option<usize>> {
        if !self.readable {
            return Ok(None);
        }
        let Inbox { bytes, start, end } = &mut self.inbox;
        let payload = self.connection.payload().filter(|payload| payload.len() >= LARGE / 2);
        let in_place = payload.as_ref().map_or(0, |payload| payload.len());
        let room = if in_place > 0 || self.is_large { BEHIND } else { INBOX };
        let mut slices =
            [IoSliceMut::new(payload.unwrap_or_default()), IoSliceMut::new(&mut bytes[..room])];
        let count = loop {
            match self.stream.read(&mut slices) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => break count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(None);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        // Less than there was room for: more is an event.
        self.readable = self.is_closed || count == in_place + room;
        (*start, *end) = (0, count.saturating_sub(in_place));
        if in_place > 0 {
            self.connection.payload_filled(count.min(in_place));
        }
        Ok(Some(count))
    }

    /// Sends what there is, as far as there is room for it.
    fn send(&mut self, now: Time, disks: &mut Disks) -> io::Result<()> {
        let mut moved = 0;
        while self.writable && self.connection.has_output() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = self.connection.output(&mut slices);
            match self.stream.write(&slices[..count]) {
                Ok(count) => {
                    moved += count;
                    self.connection.sent(count, |buf| disks.memory.give(buf));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.writing.moved(moved, self.connection.has_output(), now);
        Ok(())
    }

    /// May it have so much more memory whatever others hold?
    fn may_always(&self, len: usize) -> bool {
        self.connection.held() + len <= ALWAYS
    }

    /// Is there room for its next request?
    fn has_room(&self, disks: &Disks) -> bool {
        self.connection.export().is_none_or(|export| disks.has_room(export))
    }

    /// Is there something that it can be served with?
    fn wants_to_go_on(&self) -> bool {
        match self.connection.want() {
            Want::Bytes => self.readable || !self.inbox.is_empty(),
            Want::Memory(_) | Want::Submit => true,
            Want::Room | Want::Nothing => false,
        }
    }
}

fn give(mem: Mem, disks: &mut Disks) {
    if let Some(buf) = mem.into_buf() {
        disks.memory.give(buf);
    }
}

/// What it is counted as.
fn kind_of(what: What) -> Kind {
    match what {
        What::Read => Kind::Read,
        What::Write { .. } => Kind::Write,
        What::Flush => Kind::Flush,
        What::Trim { .. } => Kind::Trim,
        What::Zero { .. } => Kind::Zero,
        What::Cache => Kind::Cache,
        What::Status { .. } => Kind::Status,
    }
}

/// Zeros that a layer keeps a place for are no hole; but a raw image knows of zeros only where its file
/// has a hole.
fn flags_of(status: &Status, is_raw: &[bool]) -> u32 {
    let is_raw = is_raw.get(usize::from(status.depth)).copied().unwrap_or_default();
    match status.kind {
        StatusKind::Data | StatusKind::Compressed => 0,
        StatusKind::Zero if status.host.is_some() && !is_raw => state::ZERO,
        StatusKind::Zero | StatusKind::Unallocated => state::HOLE | state::ZERO,
    }
}

/// The protocol's errors are few.
fn error_of(errno: Errno) -> u32 {
    match errno {
        Errno::NOT_PERMITTED | Errno::READ_ONLY => error::PERM,
        Errno::INVALID => error::INVAL,
        Errno::NO_SPACE | Errno::TOO_BIG => error::NOSPC,
        Errno::NOT_SUPPORTED => error::NOTSUP,
        _ => error::IO,
    }
}
