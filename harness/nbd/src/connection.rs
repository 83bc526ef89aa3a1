//! One client: which message is being read, and what there is to do next.
//!
//! ```text
//! Flags ─> Option <──────────────┐ answered
//!            └─> OptionData ─────┤
//!            └─> Skip (too long)─┘
//!                  │ GO, EXPORT_NAME
//!                  v
//! Request ──> Memory ──> Payload ──> Ready ──> Request
//!    │ └──────> (reads) ──────────────^
//!    ├──> Ready (no memory wanted)
//!    └──> Skip (payload of what is refused)
//! any ─> Ending: nothing more is read; what is in flight is answered
//! any ─> Broken: the client does not speak the protocol
//! ```

use std::io::IoSlice;
use std::sync::Arc;

use cowbell_engine::mem::Buf;

use crate::exports::Export;
use crate::outbox::Outbox;
use crate::requests::{Request, Wanted};
use crate::slots::Slots;
use crate::wire::{self, Header, handshake, reply};

/// How much one client may have at once.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Limits {
    /// Requests handed out and not finished.
    pub requests: usize,
    /// Bytes of memory given and not given back; one request may always have what it needs.
    pub bytes: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { requests: 128, bytes: 8 << 20 }
    }
}

/// What a [`Connection`] waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Want {
    /// Bytes from the client: [`take`](Connection::take), or into [`payload`](Connection::payload).
    Bytes,
    /// So many bytes of memory for a request: [`give`](Connection::give).
    Memory(usize),
    /// That somebody takes a request: [`next`](Connection::next).
    Submit,
    /// That a request finishes or bytes are sent: the client has as much as it may have.
    Room,
    /// Nothing more will be read.
    Nothing,
}

/// Where in the client's bytes it is.
#[derive(Clone, Debug, Hash)]
pub(crate) enum State {
    /// The client's flags.
    Flags,
    /// The header of an option.
    Option,
    /// The data of an option.
    OptionData { option: u32, len: usize, data: Vec<u8> },
    /// Bytes that nobody wants; then what they were of is answered.
    Skip { left: u64, then: Then },
    /// The header of a request.
    Request,
    /// A request was read that needs memory.
    Memory(Wanted),
    /// The payload of a write.
    Payload { wanted: Wanted, mem: Buf, at: usize },
    /// A request is to be taken.
    Ready(Wanted, Option<Buf>),
    /// Good-bye was said.
    Ending,
    /// This was wrong.
    Broken(&'static str),
}

/// What is answered after bytes were skipped.
#[derive(Clone, Copy, Debug, Hash)]
pub(crate) enum Then {
    Option { option: u32, error: u32 },
    Refuse { header: Header, error: u32 },
}

/// How replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Style {
    Simple,
    Structured,
    Extended,
}

/// One client. See the [crate].
#[derive(Clone, Debug, Hash)]
pub struct Connection {
    pub(crate) exports: Arc<[Export]>,
    limits: Limits,
    pub(crate) state: State,
    /// The first bytes of a header whose others are not there yet.
    part: ([u8; wire::EXTENDED_REQUEST_LEN], usize),
    pub(crate) style: Style,
    pub(crate) no_zeroes: bool,
    is_fixed: bool,
    /// The export that requests are for.
    pub(crate) export: Option<usize>,
    /// The export whose allocation is to be asked about.
    pub(crate) allocation: Option<usize>,
    pub(crate) slots: Slots,
    pub(crate) out: Outbox,
    /// Bytes of memory that were given and not given back.
    pub(crate) held: usize,
}

/// As long as so many bytes of headers are not sent, no more is read.
const SMALL_MAX: usize = 256 << 10;
/// Options that have more data than this are refused.
const OPTION_MAX: u32 = 64 << 10;
/// Those that have more than this are not even skipped.
const SKIP_MAX: u32 = 32 << 20;

impl Connection {
    /// A client that has just come, and is to be greeted.
    pub fn new(exports: Arc<[Export]>, limits: Limits) -> Connection {
        let mut out = Outbox::default();
        out.put(&wire::greeting(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES));
        Connection {
            exports,
            limits,
            state: State::Flags,
            part: ([0; wire::EXTENDED_REQUEST_LEN], 0),
            style: Style::Simple,
            no_zeroes: false,
            is_fixed: false,
            export: None,
            allocation: None,
            slots: Slots::default(),
            out,
            held: 0,
        }
    }

    /// What comes next.
    #[inline]
    pub fn want(&self) -> Want {
        let has_room = |more| self.held == 0 || self.held + more <= self.limits.bytes;
        match &self.state {
            State::Ready(..) if self.slots.len() < self.limits.requests => Want::Submit,
            State::Memory(wanted) if has_room(wanted.len as usize) => {
                Want::Memory(wanted.len as usize)
            }
            State::Ready(..) | State::Memory(_) => Want::Room,
            State::Ending | State::Broken(_) => Want::Nothing,
            State::Payload { .. } => Want::Bytes,
            _ if self.out.small_len() > SMALL_MAX => Want::Room,
            _ => Want::Bytes,
        }
    }

    /// Takes bytes from the client while [`Want::Bytes`] is what is wanted; answers how many.
    pub fn take(&mut self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        while !rest.is_empty() && self.want() == Want::Bytes {
            self.step(&mut rest);
        }
        bytes.len() - rest.len()
    }

    /// Where the payload that comes next is to be put, if that is what comes next: to read it there
    /// without a copy. Then [`payload_filled`](Connection::payload_filled).
    pub fn payload(&mut self) -> Option<&mut [u8]> {
        match &mut self.state {
            State::Payload { mem, at, .. } => Some(&mut mem[*at..]),
            _ => None,
        }
    }

    /// So many bytes of the payload are there now.
    pub fn payload_filled(&mut self, count: usize) {
        if let State::Payload { mem, at, .. } = &mut self.state {
            *at += count;
            assert!(*at <= mem.len(), "more than there was room for");
            self.payload_taken();
        }
    }

    /// Memory for the request that wants it: as many bytes as it wants. What is in it does not matter.
    pub fn give(&mut self, mem: Buf) {
        let State::Memory(wanted) = self.state else { panic!("nobody wants memory") };
        assert_eq!(wanted.len as usize, mem.len(), "as many as were wanted");
        self.held += mem.len();
        self.state = match wanted.is_write() {
            true => State::Payload { wanted, mem, at: 0 },
            false => State::Ready(wanted, Some(mem)),
        };
    }

    /// The request that is to be taken, if there is one ([`Want::Submit`]).
    #[inline]
    #[expect(clippy::should_implement_trait, reason = "there may be more after `None`")]
    pub fn next(&mut self) -> Option<Request> {
        if self.want() != Want::Submit {
            return None;
        }
        match std::mem::replace(&mut self.state, State::Request) {
            State::Ready(wanted, mem) => Some(self.hand_out(wanted, mem)),
            _ => unreachable!("one was ready"),
        }
    }

    /// What is to be sent, in as many slices as there is room for; answers how many.
    pub fn output<'a>(&'a self, to: &mut [IoSlice<'a>]) -> usize {
        self.out.slices(to)
    }

    /// Is there something to be sent?
    pub fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    /// So many bytes were sent. Memory that is no longer needed is given back.
    pub fn sent(&mut self, count: usize, mut give_back: impl FnMut(Buf)) {
        let held = &mut self.held;
        self.out.sent(count, |buf| {
            *held -= buf.len();
            give_back(buf);
        });
    }

    /// Has an export been chosen?
    pub fn is_serving(&self) -> bool {
        self.export.is_some()
    }

    /// The export that was chosen, by its place among those that there are.
    pub fn export(&self) -> Option<usize> {
        self.export
    }

    /// Requests handed out and not finished.
    pub fn in_flight(&self) -> usize {
        self.slots.len()
    }

    /// Bytes of memory given and not given back.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Has the client sent the beginning of a message whose end is not there yet?
    pub fn is_mid_message(&self) -> bool {
        let is_begun = match self.state {
            State::OptionData { .. } | State::Skip { .. } | State::Payload { .. } => true,
            _ => self.part.1 > 0,
        };
        is_begun && self.want() == Want::Bytes
    }

    /// Nothing more is read, all is finished and sent: the socket may be closed. What is broken is
    /// closed at once.
    pub fn is_over(&self) -> bool {
        match self.state {
            State::Broken(_) => true,
            State::Ending => self.slots.len() == 0 && self.out.is_empty(),
            _ => false,
        }
    }

    /// What the client did that the protocol does not know.
    pub fn complaint(&self) -> Option<&'static str> {
        match self.state {
            State::Broken(what) => Some(what),
            _ => None,
        }
    }

    /// The server goes: nothing more is read, what is in flight is still answered, and a request that
    /// was not taken is told so.
    pub fn end(&mut self, give_back: impl FnOnce(Buf)) {
        if matches!(self.state, State::Broken(_)) {
            return;
        }
        let (wanted, mem) = match std::mem::replace(&mut self.state, State::Ending) {
            State::Memory(wanted) => (wanted, None),
            State::Payload { wanted, mem, .. } => (wanted, Some(mem)),
            State::Ready(wanted, mem) => (wanted, mem),
            _ => return,
        };
        self.refuse(&wanted.header(), wire::error::SHUTDOWN);
        if let Some(mem) = mem {
            self.held -= mem.len();
            give_back(mem);
        }
    }

    /// The client is gone: all memory back that is not in flight.
    pub fn abandon(mut self, mut give_back: impl FnMut(Buf)) {
        self.out.clear(&mut give_back);
        if let State::Payload { mem, .. } | State::Ready(_, Some(mem)) = self.state {
            give_back(mem);
        }
    }

    /// The next step of what is being read; takes at least one byte.
    fn step(&mut self, rest: &mut &[u8]) {
        match &mut self.state {
            State::Flags => {
                if let Some(flags) = header::<4>(&mut self.part, rest) {
                    self.flags(u32::from_be_bytes(flags));
                }
            }
            State::Option => {
                if let Some(bytes) = header(&mut self.part, rest) {
                    match wire::option_of(&bytes) {
                        Some((option, len)) => self.option_begins(option, len),
                        None => self.state = State::Broken("that is no option"),
                    }
                }
            }
            State::OptionData { option, len, data } => {
                let (now, later) = rest.split_at(rest.len().min(*len - data.len()));
                data.extend_from_slice(now);
                *rest = later;
                if data.len() == *len {
                    let (option, data) = (*option, std::mem::take(data));
                    self.option(option, &data);
                }
            }
            State::Skip { left, then } => {
                let now = (rest.len() as u64).min(*left);
                *rest = &rest[now as usize..];
                *left -= now;
                if *left == 0 {
                    let then = *then;
                    self.skipped(then);
                }
            }
            State::Request => {
                let header = match self.style {
                    Style::Extended => header(&mut self.part, rest)
                        .map(|bytes| Header::from_extended_bytes(&bytes)),
                    _ => header(&mut self.part, rest).map(|bytes| Header::from_bytes(&bytes)),
                };
                match header {
                    Some(Some(header)) => self.request(header),
                    Some(None) => self.state = State::Broken("that is no request"),
                    None => {}
                }
            }
            State::Payload { mem, at, .. } => {
                let (now, later) = rest.split_at(rest.len().min(mem.len() - *at));
                mem[*at..*at + now.len()].copy_from_slice(now);
                (*rest, *at) = (later, *at + now.len());
                self.payload_taken();
            }
            State::Memory(_) | State::Ready(..) | State::Ending | State::Broken(_) => {
                unreachable!("no bytes are wanted")
            }
        }
    }

    fn payload_taken(&mut self) {
        if matches!(&self.state, State::Payload { mem, at, .. } if *at == mem.len())
            && let State::Payload { wanted, mem, .. } =
                std::mem::replace(&mut self.state, State::Request)
        {
            self.state = State::Ready(wanted, Some(mem));
        }
    }

    fn flags(&mut self, flags: u32) {
        let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.is_fixed = flags & u32::from(handshake::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        self.state = match flags & !known {
            0 => State::Option,
            _ => State::Broken("unknown flags"),
        };
    }

    fn option_begins(&mut self, option: u32, len: u32) {
        let is_old = option == wire::option::EXPORT_NAME;
        let error = reply::ERR_TOO_BIG;
        self.state = match len {
            // Its answers are what a client of the first days does not know.
            _ if !self.is_fixed && !is_old => State::Broken("an option that it may not send"),
            0 => return self.option(option, &[]),
            _ if len > SKIP_MAX || is_old && len as usize > wire::STRING_MAX => {
                State::Broken("an option that is too long")
            }
            _ if len > OPTION_MAX => {
                State::Skip { left: len.into(), then: Then::Option { option, error } }
            }
            _ => State::OptionData { option, len: len as usize, data: Vec::new() },
        };
    }

    fn skipped(&mut self, then: Then) {
        match then {
            Then::Option { option, error } => {
                self.answer(option, error, &[]);
                self.state = State::Option;
            }
            Then::Refuse { header, error } => {
                self.state = State::Request;
                self.refuse(&header, error);
            }
        }
    }
}

/// The next `N` bytes, if they are there; what is there of them is kept.
#[inline]
pub(crate) fn header<const N: usize>(
    part: &mut ([u8; wire::EXTENDED_REQUEST_LEN], usize),
    rest: &mut &[u8],
) -> Option<[u8; N]> {
    let (bytes, have) = part;
    if *have == 0
        && let Some((whole, later)) = rest.split_first_chunk::<N>()
    {
        *rest = later;
        return Some(*whole);
    }
    let (now, later) = rest.split_at(rest.len().min(N - *have));
    bytes[*have..*have + now.len()].copy_from_slice(now);
    (*rest, *have) = (later, *have + now.len());
    if *have < N {
        return None;
    }
    let whole = bytes.first_chunk::<N>().copied();
    // Nothing stays behind: what is in the same state is the same.
    (*bytes, *have) = ([0; wire::EXTENDED_REQUEST_LEN], 0);
    whole
}
