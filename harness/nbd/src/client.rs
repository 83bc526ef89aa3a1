//! A client's side of the protocol, without a socket: what a server says goes in, what has become of
//! requests comes out.
//!
//! ```text
//! Greeting ─> Option <──> OptionData (STRUCTURED_REPLY, then SET_META_CONTEXT, then GO)
//!                │ GO was answered
//!                v
//!             Reply ──> Simple ──> Data ──────────────────────────> Reply
//!               └────> Chunk ──> DataOffset ──> Data ──> ChunkEnd ──^
//!                        └────> Hole, Status, Error, Skip ──^
//! any ─> Refused: the server does not want this client
//! any ─> Broken: the server does not speak the protocol
//! ```
//!
//! Nothing that a server says is believed. A reply is to a request in flight, data lies in the range that
//! was read and comes once, and a read that ends well has been answered whole. What is wrong
//! is the end of the connection. No length that a server names is memory.

use std::collections::{BTreeMap, VecDeque};

use crate::connection::header;
use crate::requests::{Extent, What};
use crate::wire::{self, BASE_ALLOCATION, Reader, chunk, command, export, flag, handshake};
use crate::wire::{Header, PAYLOAD_MAX, STRING_MAX, info, option, reply, state};

/// What a server says of an export.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct ExportInfo {
    /// Bytes.
    pub size: u64,
    /// What it can do: see [`wire::export`].
    pub flags: u16,
    /// Offsets and lengths of requests are multiples of this (a power of two), and so is the size.
    pub block_min: u32,
    /// The most bytes of a request: a multiple of `block_min`, 32 MiB at most.
    pub request_max: u32,
    /// It can be asked what is where.
    pub has_allocation: bool,
}

impl ExportInfo {
    /// Has it all of these flags?
    pub fn can(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }

    /// The most bytes that a request of this kind may be about: a multiple of `block_min`.
    pub fn longest(&self, what: What) -> u64 {
        match what {
            What::Read | What::Write { .. } | What::Zero { .. } => self.request_max.into(),
            _ => NO_PAYLOAD_MAX,
        }
    }
}

/// What a server's bytes meant. See [`Client::take`].
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Event {
    /// All bytes were taken, and more are needed to say something.
    Nothing,
    /// The handshake is over: there is [`Client::info`], and requests may be sent.
    Ready,
    /// The last `len` bytes that were taken are those from byte `at` of the read `cookie` on.
    Data {
        /// Which request.
        cookie: u64,
        /// First byte, counted from the request's offset.
        at: u64,
        /// Bytes.
        len: usize,
    },
    /// So many bytes of the read are zeros.
    Zeros {
        /// Which request.
        cookie: u64,
        /// First byte, counted from the request's offset.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// A request has ended.
    Done {
        /// Which.
        cookie: u64,
        /// An error is one of [`wire::error`]. The extent is that of a [`What::Status`] alone; it begins at the
        /// request's offset, and is no longer than the request.
        result: Result<Option<Extent>, u32>,
    },
    /// No more is read: see [`Client::complaint`].
    Over,
}

/// Why a connection cannot go on.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub enum Complaint {
    /// The server said what the protocol does not know.
    Broken(&'static str),
    /// The server refused: with which of the errors in [`wire::reply`], and its words.
    Refused(u32, String),
}

impl std::fmt::Display for Complaint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (error, words) = match self {
            Complaint::Broken(what) => return write!(f, "the NBD server is at fault: {what}"),
            Complaint::Refused(error, words) => (*error, words),
        };
        match error {
            reply::ERR_UNKNOWN => write!(f, "the NBD server has no such export")?,
            reply::ERR_TLS_REQD => write!(f, "the NBD server wants TLS, which is not supported")?,
            reply::ERR_UNSUP => write!(f, "the NBD server is too old: it does not know GO")?,
            error => write!(f, "the NBD server refuses (error {})", error & !reply::ERROR)?,
        }
        if words.is_empty() { Ok(()) } else { write!(f, ": {}", words.escape_debug()) }
    }
}

/// Where in the server's bytes it is.
#[derive(Clone, Debug, Hash)]
enum State {
    Greeting,
    /// The header of an answer to this option.
    Option(u32),
    OptionData {
        option: u32,
        kind: u32,
        len: usize,
        data: Vec<u8>,
    },
    /// The magic number of a reply.
    Reply,
    Simple,
    Chunk,
    /// Where the data of a chunk belongs that has so many bytes.
    DataOffset(Now, u64),
    /// Data, from `at` on.
    Data {
        now: Now,
        at: u64,
        left: u64,
    },
    Hole(Now),
    /// A context, the first extent, and so many bytes.
    Status(Now, u64),
    /// An error, the length of its message, and so many bytes.
    Error(Now, u64),
    /// Bytes that nobody wants.
    Skip(Now, u64),
    ChunkEnd(Now),
    Over(Complaint),
}

/// What is being answered.
#[derive(Clone, Copy, Debug, Hash)]
struct Now {
    cookie: u64,
    /// There are no more chunks.
    is_last: bool,
}

/// A request in flight.
#[derive(Clone, Debug, Hash)]
struct Asked {
    what: What,
    offset: u64,
    len: u64,
    /// Some of it was not handed out to be sent yet.
    is_unsent: bool,
    error: Option<u32>,
    extent: Option<Extent>,
    /// Of a read: what has been answered.
    covered: Covered,
}

/// Stretches of a read that were answered: in order, no two touch.
#[derive(Clone, Debug, Default, Hash)]
struct Covered(Vec<(u64, u64)>);

/// The most stretches. A server that answers in order needs one.
const STRETCHES_MAX: usize = 1024;

impl Covered {
    /// Is that new?
    fn add(&mut self, start: u64, end: u64) -> Result<(), &'static str> {
        let after = self.0.partition_point(|&(_, other)| other < start);
        // Those from `after` on touch it or lie behind it.
        let (mut start, mut end, mut upto) = (start, end, after);
        while let Some(&(from, to)) = self.0.get(upto).filter(|&&(from, _)| from <= end) {
            if from < end && start < to {
                return Err("it answers the same bytes twice");
            }
            (start, end, upto) = (start.min(from), end.max(to), upto + 1);
        }
        self.0.splice(after..upto, [(start, end)]);
        if self.0.len() > STRETCHES_MAX { Err("it answers in too many pieces") } else { Ok(()) }
    }

    fn is_whole(&self, len: u64) -> bool {
        self.0 == [(0, len)]
    }
}

/// What is to be sent.
#[derive(Clone, Debug, Hash)]
enum Outgoing {
    Bytes(Vec<u8>),
    Request(Header),
    /// The payload of a write, from `at` on.
    Payload {
        cookie: u64,
        at: u64,
        len: u64,
    },
}

/// The answers to one option are no more than this.
const ANSWERS_MAX: u32 = 1000;
/// An answer to an option is no longer than this.
const ANSWER_MAX: u32 = 64 << 10;
/// The largest smallest block.
const BLOCK_MAX: u32 = 64 << 10;
/// What a server takes that says nothing else.
const REQUEST_MAX: u32 = PAYLOAD_MAX as u32;

/// Requests that carry no bytes and cost a server little.
const NO_PAYLOAD_MAX: u64 = 1 << 30;

/// A connection to a server. See the module.
#[derive(Clone, Debug, Hash)]
pub struct Client {
    name: String,
    state: State,
    /// The first bytes of a header whose others are not there yet.
    part: ([u8; wire::EXTENDED_REQUEST_LEN], usize),
    /// Answers to this option so far.
    answers: u32,
    is_structured: bool,
    /// The id of [`BASE_ALLOCATION`].
    allocation: Option<u32>,
    /// Size and flags, as GO tells.
    export: Option<(u64, u16)>,
    /// The smallest and the largest request, as GO tells.
    blocks: Option<(u32, u32)>,
    info: Option<ExportInfo>,
    asked: BTreeMap<u64, Asked>,
    out: VecDeque<Outgoing>,
}

impl Client {
    /// A client of the export `name`, connected just now: the server is to speak.
    ///
    /// # Panics
    ///
    /// If the name is longer than [`STRING_MAX`].
    pub fn new(name: &str) -> Client {
        assert!(name.len() <= STRING_MAX, "the name of an export has {STRING_MAX} bytes at most");
        Client {
            name: name.into(),
            state: State::Greeting,
            part: ([0; wire::EXTENDED_REQUEST_LEN], 0),
            answers: 0,
            is_structured: false,
            allocation: None,
            export: None,
            blocks: None,
            info: None,
            asked: BTreeMap::new(),
            out: VecDeque::new(),
        }
    }

    /// What the export is, once the handshake is over.
    pub fn info(&self) -> Option<&ExportInfo> {
        self.info.as_ref()
    }

    /// Why no more is read.
    pub fn complaint(&self) -> Option<&Complaint> {
        match &self.state {
            State::Over(complaint) => Some(complaint),
            _ => None,
        }
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.asked.len()
    }

    /// Sends a request: `len` bytes at `offset`, both 0 of a flush. It is answered with an [`Event::Done`]
    /// of this cookie.
    ///
    /// Whether the export can do it is for the caller to see: [`ExportInfo`].
    ///
    /// # Panics
    ///
    /// If the handshake is not over, if a request in flight has the cookie, or if the range is none of the export's.
    pub fn ask(&mut self, cookie: u64, what: What, offset: u64, len: u64) {
        let info = self.info.expect("the handshake is over");
        assert!(offset.checked_add(len).is_some_and(|end| end <= info.size), "behind the end");
        assert!(len <= info.longest(what) && (len > 0 || what == What::Flush), "{len} bytes");
        let if_set = |is: bool, flag: u16| if is { flag } else { 0 };
        let (command, flags) = match what {
            What::Read => (command::READ, 0),
            What::Write { fua } => (command::WRITE, if_set(fua, flag::FUA)),
            What::Flush => (command::FLUSH, 0),
            What::Trim { fua } => (command::TRIM, if_set(fua, flag::FUA)),
            What::Zero { keep, fast, fua } => (
                command::WRITE_ZEROES,
                if_set(keep, flag::NO_HOLE)
                    | if_set(fast, flag::FAST_ZERO)
                    | if_set(fua, flag::FUA),
            ),
            What::Cache => (command::CACHE, 0),
            What::Status { one } => (command::BLOCK_STATUS, if_set(one, flag::REQ_ONE)),
        };
        let (error, extent, covered) = (None, None, Covered::default());
        let asked = Asked { what, offset, len, is_unsent: true, error, extent, covered };
        assert!(self.asked.insert(cookie, asked).is_none(), "{cookie} is in flight");
        self.out.push_back(Outgoing::Request(Header { flags, command, cookie, offset, len }));
        if matches!(what, What::Write { .. }) {
            self.out.push_back(Outgoing::Payload { cookie, at: 0, len });
        }
    }

    /// Says good-bye; whatever was asked before is answered still.
    pub fn leave(&mut self) {
        if self.info.is_some() {
            let header = Header { flags: 0, command: command::DISC, cookie: 0, offset: 0, len: 0 };
            self.out.push_back(Outgoing::Bytes(header.to_bytes().into()));
        }
    }

    /// Is there something to be sent?
    pub fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    /// Appends what is to be sent to `to`, until that has about `most` bytes. `payload` fills in those of a write
    /// of this cookie, from this byte of it on.
    pub fn output(
        &mut self,
        to: &mut Vec<u8>,
        most: usize,
        mut payload: impl FnMut(u64, u64, &mut [u8]),
    ) {
        while to.len() < most {
            let cookie = match self.out.front_mut() {
                None => return,
                Some(Outgoing::Bytes(bytes)) => {
                    to.append(bytes);
                    None
                }
                Some(Outgoing::Request(header)) => {
                    to.extend_from_slice(&header.to_bytes());
                    (header.command != command::WRITE).then_some(header.cookie)
                }
                Some(Outgoing::Payload { cookie, at, len }) => {
                    let (start, now) = (to.len(), (*len - *at).min((most - to.len()) as u64));
                    to.resize(start + now as usize, 0);
                    payload(*cookie, *at, &mut to[start..]);
                    *at += now;
                    if at < len {
                        return;
                    }
                    Some(*cookie)
                }
            };
            self.out.pop_front();
            if let Some(asked) = cookie.and_then(|cookie| self.asked.get_mut(&cookie)) {
                asked.is_unsent = false;
            }
        }
    }

    /// Takes bytes that the server said, until they mean something: how many, and what. To be called with the rest
    /// (there may be none) until it answers [`Event::Nothing`] or [`Event::Over`].
    pub fn take(&mut self, bytes: &[u8]) -> (usize, Event) {
        let mut rest = bytes;
        loop {
            // What needs no bytes is done without any.
            if rest.is_empty() && !matches!(self.state, State::ChunkEnd(_) | State::Over(_)) {
                return (bytes.len(), Event::Nothing);
            }
            match self.step(&mut rest) {
                Ok(Event::Nothing) => {}
                Ok(event) => return (bytes.len() - rest.len(), event),
                Err(complaint) => {
                    self.state = State::Over(complaint);
                    self.out.clear();
                }
            }
        }
    }

    /// The next step of what is being read.
    fn step(&mut self, rest: &mut &[u8]) -> Result<Event, Complaint> {
        match &mut self.state {
            State::Greeting => {
                if let Some(bytes) = header::<{ wire::GREETING_LEN }>(&mut self.part, rest) {
                    self.greeting(&bytes)?;
                }
            }
            &mut State::Option(option) => {
                if let Some(bytes) = header(&mut self.part, rest) {
                    return self.option_answered(option, &bytes);
                }
            }
            State::OptionData { option, kind, len, data } => {
                let (now, later) = rest.split_at(rest.len().min(*len - data.len()));
                data.extend_from_slice(now);
                *rest = later;
                if data.len() == *len {
                    let (option, kind, data) = (*option, *kind, std::mem::take(data));
                    return self.answer(option, kind, &data);
                }
            }
            State::Reply => match header(&mut self.part, rest).map(u32::from_be_bytes) {
                Some(wire::SIMPLE_REPLY_MAGIC) => self.state = State::Simple,
                Some(wire::CHUNK_MAGIC) if self.is_structured => self.state = State::Chunk,
                Some(_) => return broken("that is no reply"),
                None => {}
            },
            State::Simple => {
                if let Some(bytes) = header(&mut self.part, rest) {
                    return self.simple(&bytes);
                }
            }
            State::Chunk => {
                if let Some(bytes) = header(&mut self.part, rest) {
                    self.chunk(&bytes)?;
                }
            }
            &mut State::DataOffset(now, len) => {
                if let Some(bytes) = header(&mut self.part, rest) {
                    let at = self.cover(now, u64::from_be_bytes(bytes), len)?;
                    self.state = State::Data { now, at, left: len };
                }
            }
            State::Data { now, at, left } => {
                let len = (rest.len() as u64).min(*left) as usize;
                let event = Event::Data { cookie: now.cookie, at: *at, len };
                *rest = &rest[len..];
                (*at, *left) = (*at + len as u64, *left - len as u64);
                if *left == 0 {
                    self.state = State::ChunkEnd(*now);
                }
                if len > 0 {
                    return Ok(event);
                }
            }
            &mut State::Hole(now) => {
                if let Some(bytes) = header::<12>(&mut self.part, rest) {
                    let mut fields = Reader(&bytes);
                    let (offset, len) =
                        (fields.u64().unwrap_or(0), fields.u32().unwrap_or(0).into());
                    let at = self.cover(now, offset, len)?;
                    self.state = State::ChunkEnd(now);
                    return Ok(Event::Zeros { cookie: now.cookie, at, len });
                }
            }
            &mut State::Status(now, left) => {
                if let Some(bytes) = header(&mut self.part, rest) {
                    self.extent(now, &bytes)?;
                    self.state = skip(now, left);
                }
            }
            &mut State::Error(now, left) => {
                if let Some(bytes) = header::<6>(&mut self.part, rest) {
                    let mut fields = Reader(&bytes);
                    let error = fields.u32().unwrap_or(0);
                    if error == 0 || u64::from(fields.u16().unwrap_or(0)) > left {
                        return broken("an error that is none");
                    }
                    // The first one counts.
                    self.asked(now)?.error.get_or_insert(error);
                    self.state = skip(now, left);
                }
            }
            State::Skip(now, left) => {
                let taken = (rest.len() as u64).min(*left);
                *rest = &rest[taken as usize..];
                *left -= taken;
                if *left == 0 {
                    self.state = State::ChunkEnd(*now);
                }
            }
            &mut State::ChunkEnd(now) => {
                self.state = State::Reply;
                if now.is_last {
                    return self.finish(now);
                }
            }
            State::Over(_) => {
                *rest = &[];
                return Ok(Event::Over);
            }
        }
        Ok(Event::Nothing)
    }

    fn greeting(&mut self, bytes: &[u8]) -> Result<(), Complaint> {
        let mut fields = Reader(bytes);
        if (fields.u64(), fields.u64()) != (Some(wire::MAGIC), Some(wire::OPTION_MAGIC)) {
            return broken("it greets as no NBD server of today does");
        }
        let flags = fields.u16().unwrap_or(0);
        if flags & handshake::FIXED_NEWSTYLE == 0 {
            return broken("it knows no options");
        }
        let flags = u32::from(flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES));
        self.out.push_back(Outgoing::Bytes(flags.to_be_bytes().into()));
        self.send_option(option::STRUCTURED_REPLY, &[]);
        Ok(())
    }

    fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = wire::option_header(option, data.len() as u32).to_vec();
        bytes.extend_from_slice(data);
        self.out.push_back(Outgoing::Bytes(bytes));
        self.answers = 0;
        self.state = State::Option(option);
    }

    /// The header of an answer is there.
    fn option_answered(
        &mut self,
        option: u32,
        bytes: &[u8; wire::OPTION_REPLY_LEN],
    ) -> Result<Event, Complaint> {
        self.answers += 1;
        match wire::option_reply_of(bytes) {
            Some((other, ..)) if other != option => broken("an answer to another option"),
            Some((_, _, len)) if len > ANSWER_MAX => broken("an answer that is too long"),
            Some(_) if self.answers > ANSWERS_MAX => broken("too many answers"),
            Some((_, kind, 0)) => self.answer(option, kind, &[]),
            Some((_, kind, len)) => {
                let len = len as usize;
                self.state = State::OptionData { option, kind, len, data: Vec::new() };
                Ok(Event::Nothing)
            }
            None => broken("that is no answer to an option"),
        }
    }

    /// An answer is there whole.
    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<Event, Complaint> {
        self.state = State::Option(option);
        let is_error = kind & reply::ERROR != 0;
        match (option, kind) {
            (option::STRUCTURED_REPLY, reply::ACK) => {
                self.is_structured = true;
                let count = 1_u32.to_be_bytes();
                let query = wire::string(BASE_ALLOCATION);
                let data = [&wire::string(&self.name), &count[..], &query].concat();
                self.send_option(option::SET_META_CONTEXT, &data);
            }
            (option::SET_META_CONTEXT, reply::META_CONTEXT) => {
                let mut data = Reader(data);
                let id = data.u32();
                if data.0 != BASE_ALLOCATION.as_bytes() || self.allocation.is_some() {
                    return broken("a context that nobody asked for");
                }
                self.allocation = id;
            }
            (option::STRUCTURED_REPLY, _) if is_error => self.send_go(),
            (option::SET_META_CONTEXT, reply::ACK) => self.send_go(),
            (option::SET_META_CONTEXT, _) if is_error => {
                self.allocation = None;
                self.send_go();
            }
            (option::GO, reply::INFO) => self.told(data)?,
            (option::GO, reply::ACK) => return self.begin(),
            (_, _) if is_error => {
                let words = &data[..data.len().min(STRING_MAX)];
                return Err(Complaint::Refused(kind, String::from_utf8_lossy(words).into_owned()));
            }
            _ => return broken("an answer that makes no sense"),
        }
        Ok(Event::Nothing)
    }

    fn send_go(&mut self) {
        let asked = [1_u16, info::BLOCK_SIZE].map(u16::to_be_bytes);
        let data = [&wire::string(&self.name), asked.as_flattened()].concat();
        self.send_option(option::GO, &data);
    }

    /// Something about the export.
    fn told(&mut self, data: &[u8]) -> Result<(), Complaint> {
        let mut data = Reader(data);
        match data.u16() {
            Some(info::EXPORT) => {
                let (size, flags) = (data.u64(), data.u16());
                self.export = size.zip(flags).filter(|_| data.0.is_empty());
                if self.export.is_none() {
                    return broken("neither a size nor flags");
                }
            }
            Some(info::BLOCK_SIZE) => {
                let (min, preferred, max) = (data.u32(), data.u32(), data.u32());
                let blocks = min.zip(max).filter(|_| preferred.is_some() && data.0.is_empty());
                let makes_sense = |&(min, max): &(u32, u32)| {
                    min.is_power_of_two() && min <= BLOCK_MAX && max >= min
                };
                self.blocks = blocks.filter(makes_sense);
                if self.blocks.is_none() {
                    return broken("sizes of blocks that make no sense");
                }
            }
            Some(_) => {}
            None => return broken("it tells nothing"),
        }
        Ok(())
    }

    /// GO was answered well.
    fn begin(&mut self) -> Result<Event, Complaint> {
        let Some((size, flags)) = self.export else { return broken("neither a size nor flags") };
        let (block_min, max) = self.blocks.unwrap_or((1, REQUEST_MAX));
        if i64::try_from(size).is_err() || size % u64::from(block_min) != 0 {
            return broken("an impossible size");
        }
        let request_max = max.min(REQUEST_MAX) / block_min * block_min;
        let flags = if flags & export::HAS_FLAGS == 0 { 0 } else { flags };
        let has_allocation = self.allocation.is_some();
        self.info = Some(ExportInfo { size, flags, block_min, request_max, has_allocation });
        self.state = State::Reply;
        Ok(Event::Ready)
    }

    fn asked(&mut self, now: Now) -> Result<&mut Asked, Complaint> {
        match self.asked.get_mut(&now.cookie) {
            Some(asked) if asked.is_unsent => broken("it answers before it was asked"),
            Some(asked) => Ok(asked),
            None => broken("it answers what nobody asked"),
        }
    }

    fn simple(&mut self, bytes: &[u8; 12]) -> Result<Event, Complaint> {
        let mut fields = Reader(bytes);
        let (error, cookie) = (fields.u32().unwrap_or(0), fields.u64().unwrap_or(0));
        let (now, is_structured) = (Now { cookie, is_last: true }, self.is_structured);
        let asked = self.asked(now)?;
        match asked.what {
            What::Read | What::Status { .. } if is_structured => {
                return broken("a simple reply where it has to be a structured one");
            }
            _ if !asked.covered.0.is_empty() => return broken("two replies in one"),
            _ if error != 0 => asked.error = Some(error),
            What::Read => {
                let (offset, left) = (asked.offset, asked.len);
                let at = self.cover(now, offset, left)?;
                self.state = State::Data { now, at, left };
                return Ok(Event::Nothing);
            }
            _ => {}
        }
        self.state = State::ChunkEnd(now);
        Ok(Event::Nothing)
    }

    /// The header of a chunk is there.
    fn chunk(&mut self, bytes: &[u8; 16]) -> Result<(), Complaint> {
        let mut fields = Reader(bytes);
        let (flags, kind) = (fields.u16().unwrap_or(0), fields.u16().unwrap_or(0));
        let (cookie, len) = (fields.u64().unwrap_or(0), u64::from(fields.u32().unwrap_or(0)));
        let now = Now { cookie, is_last: flags & chunk::DONE != 0 };
        let what = self.asked(now)?.what;
        self.state = match kind {
            chunk::NONE if len == 0 && now.is_last => State::ChunkEnd(now),
            chunk::OFFSET_DATA if what == What::Read && len > 8 => State::DataOffset(now, len - 8),
            chunk::OFFSET_HOLE if what == What::Read && len == 12 => State::Hole(now),
            chunk::BLOCK_STATUS
                if matches!(what, What::Status { .. })
                    && len >= 12
                    && (len - 4) % 8 == 0
                    && len <= PAYLOAD_MAX =>
            {
                State::Status(now, len - 12)
            }
            // Kinds of errors that are not known have the same beginning.
            _ if kind & chunk::FAILED != 0 && (6..=ANSWER_MAX.into()).contains(&len) => {
                State::Error(now, len - 6)
            }
            _ => return broken("a chunk that makes no sense"),
        };
        Ok(())
    }

    /// So many bytes at `offset` of the disk are answered now: where in the read that is.
    fn cover(&mut self, now: Now, offset: u64, len: u64) -> Result<u64, Complaint> {
        let asked = self.asked(now)?;
        let at = offset.checked_sub(asked.offset);
        let end = at.and_then(|at| at.checked_add(len)).filter(|&end| end <= asked.len && len > 0);
        match at.zip(end) {
            Some((at, end)) => asked.covered.add(at, end).map(|()| at).or_else(broken),
            None => broken("it answers other bytes than were asked for"),
        }
    }

    /// A context and its first extent. There may be more, which nobody wants.
    fn extent(&mut self, now: Now, bytes: &[u8; 12]) -> Result<(), Complaint> {
        let mut fields = Reader(bytes);
        let (id, allocation) = (fields.u32(), self.allocation);
        let (len, flags) = (fields.u32().unwrap_or(0), fields.u32().unwrap_or(0));
        let asked = self.asked(now)?;
        if id != allocation || len == 0 || asked.extent.is_some() {
            return broken("an extent that makes no sense");
        }
        let flags = flags & (state::HOLE | state::ZERO);
        asked.extent = Some(Extent { len: u64::from(len).min(asked.len), flags });
        Ok(())
    }

    /// The last of a request's reply was taken.
    fn finish(&mut self, now: Now) -> Result<Event, Complaint> {
        let Asked { what, len, error, extent, covered, .. } = self.asked(now)?;
        let result = match (error, what) {
            (Some(error), _) => Err(*error),
            (None, What::Read) if !covered.is_whole(*len) => {
                return broken("a read that it has not answered whole");
            }
            (None, What::Status { .. }) if extent.is_none() => {
                return broken("no extent where one was asked for");
            }
            _ => Ok(*extent),
        };
        self.asked.remove(&now.cookie);
        Ok(Event::Done { cookie: now.cookie, result })
    }
}

fn skip(now: Now, left: u64) -> State {
    if left == 0 { State::ChunkEnd(now) } else { State::Skip(now, left) }
}

fn broken<T>(what: &'static str) -> Result<T, Complaint> {
    Err(Complaint::Broken(what))
}
