//! Transmission: what is wrong with a request, who is to do it, and how it is answered.

use cowbell_engine::mem::Buf;

use crate::connection::{Connection, State, Style, Then};
use crate::slots::Slot;
use crate::wire::{self, Chunk, Header, PAYLOAD_MAX, chunk, command, error, flag};

/// What a client wants of a disk. The range is within the disk, and the disk may be written if it
/// is to be.
#[derive(Debug)]
pub struct Request {
    /// Its name in [`Connection::finish`].
    pub slot: u32,
    /// The number of the export.
    pub export: usize,
    /// What.
    pub what: What,
    /// First byte.
    pub offset: u64,
    /// Bytes: not 0, but of a flush, which has no range.
    pub len: u64,
    /// The memory of a read or write, of `len` bytes.
    pub mem: Option<Buf>,
}

/// See [`Request`]. `fua`: finish only when it is stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "said above")]
pub enum What {
    /// Fill the memory.
    Read,
    /// Write the memory.
    Write { fua: bool },
    /// What has finished becomes stable.
    Flush,
    /// The contents are no longer needed.
    Trim { fua: bool },
    /// Make it read as zeros. `keep`: space stays where it is. `fast`: in less time than writing
    /// them takes, or else fail with [`error::NOTSUP`] and change nothing.
    Zero { keep: bool, fast: bool, fua: bool },
    /// It will be read soon.
    Cache,
    /// What is where? Answered by [`Connection::finish_status`]. `one`: about the first extent alone.
    Status { one: bool },
}

/// A stretch of a disk and what it is: see [`wire::state`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// What.
    pub flags: u32,
}

/// A request that was checked.
#[derive(Clone, Copy, Debug, Hash)]
pub(crate) struct Wanted {
    what: What,
    command: u16,
    cookie: u64,
    offset: u64,
    pub len: u64,
}

impl Wanted {
    pub fn is_write(&self) -> bool {
        matches!(self.what, What::Write { .. })
    }

    /// Enough of what it was read from to answer it.
    pub fn header(&self) -> Header {
        let Wanted { command, cookie, offset, len, .. } = *self;
        Header { flags: 0, command, cookie, offset, len }
    }
}

impl Connection {
    /// A request's header is there.
    #[inline]
    pub(crate) fn request(&mut self, header: Header) {
        let Header { flags, command, cookie, offset, len } = header;
        if command == command::DISC {
            self.state = State::Ending;
            return;
        }
        let is_extended = self.style == Style::Extended;
        let has_payload =
            command == command::WRITE || is_extended && flags & flag::PAYLOAD_LEN != 0;
        match self.check(&header) {
            Err(error) if has_payload && len > 0 => {
                self.state = State::Skip { left: len, then: Then::Refuse { header, error } };
            }
            Err(error) => self.refuse(&header, error),
            // There is nothing to do.
            Ok(what) if len == 0 && what != What::Flush => self.succeed(cookie, offset),
            Ok(what) => {
                let wanted = Wanted { what, command, cookie, offset, len };
                self.state = match what {
                    What::Read | What::Write { .. } => State::Memory(wanted),
                    _ => State::Ready(wanted, None),
                };
            }
        }
    }

    /// What a request is, or what is wrong with it.
    fn check(&self, header: &Header) -> Result<What, u32> {
        let &Header { flags, command, offset, len, .. } = header;
        let export = &self.exports[self.export.ok_or(error::INVAL)?];
        let fua = flags & flag::FUA != 0;
        let (what, known) = match command {
            command::READ => (What::Read, flag::DF),
            command::WRITE => (What::Write { fua }, 0),
            command::FLUSH => (What::Flush, 0),
            command::TRIM => (What::Trim { fua }, 0),
            command::CACHE => (What::Cache, 0),
            command::WRITE_ZEROES => {
                let (keep, fast) = (flags & flag::NO_HOLE != 0, flags & flag::FAST_ZERO != 0);
                (What::Zero { keep, fast, fua }, flag::NO_HOLE | flag::FAST_ZERO)
            }
            command::BLOCK_STATUS if self.allocation.is_some() => {
                (What::Status { one: flags & flag::REQ_ONE != 0 }, flag::REQ_ONE)
            }
            _ => return Err(error::INVAL),
        };
        // To say of a write that its length is that of its payload is right, and says nothing.
        let is_said = command == command::WRITE && self.style == Style::Extended;
        let known = known | flag::FUA | if is_said { flag::PAYLOAD_LEN } else { 0 };
        let is_structured = self.style != Style::Simple;
        if flags & !known != 0 || flags & flag::DF != 0 && !is_structured {
            return Err(error::INVAL);
        }
        let writes = matches!(what, What::Write { .. } | What::Trim { .. } | What::Zero { .. });
        if writes && export.read_only {
            return Err(error::PERM);
        }
        let has_memory = matches!(what, What::Read | What::Write { .. });
        if has_memory && len > PAYLOAD_MAX {
            return Err(if flags & flag::DF != 0 { error::OVERFLOW } else { error::INVAL });
        }
        if what == What::Flush {
            return Ok(what);
        }
        if offset.checked_add(len).is_none_or(|end| end > export.size) {
            let is_added = matches!(what, What::Write { .. } | What::Zero { .. });
            return Err(if is_added { error::NOSPC } else { error::INVAL });
        }
        match what {
            What::Status { .. } if len == 0 => Err(error::INVAL),
            _ => Ok(what),
        }
    }

    #[inline]
    pub(crate) fn hand_out(&mut self, wanted: Wanted, mem: Option<Buf>) -> Request {
        let Wanted { what, command, cookie, offset, len } = wanted;
        let slot = self.slots.add(Slot { command, cookie, offset, len });
        let export = self.export.expect("requests come after it was chosen");
        // A flush is of the whole disk, whatever was said.
        let (offset, len) = if what == What::Flush { (0, 0) } else { (offset, len) };
        Request { slot, export, what, offset, len, mem }
    }

    /// A request has finished, with an error of [`wire::error`] or well. `mem`: its memory; it comes
    /// back if it is no longer needed here. (What was read is needed until it was sent.)
    ///
    /// # Panics
    ///
    /// If it has finished before, or was a status that ended well.
    #[inline]
    pub fn finish(&mut self, slot: u32, result: Result<(), u32>, mem: Option<Buf>) -> Option<Buf> {
        let slot = self.slots.take(slot);
        let Slot { command, cookie, offset, len } = slot;
        match (result, mem) {
            (Ok(()), Some(mem)) if command == command::READ => {
                self.data(cookie, offset, mem);
                None
            }
            (Ok(()), mem) => {
                assert_ne!(command, command::BLOCK_STATUS, "nothing was said about it");
                self.succeed(cookie, offset);
                self.held -= mem.as_ref().map_or(0, |mem| mem.len());
                mem
            }
            (Err(error), mem) => {
                self.refuse(&Header { flags: 0, command, cookie, offset, len }, error);
                self.held -= mem.as_ref().map_or(0, |mem| mem.len());
                mem
            }
        }
    }

    /// A [status](What::Status) has ended well: with these extents, at least one, from the first
    /// byte asked about.
    ///
    /// # Panics
    ///
    /// If it has finished before.
    pub fn finish_status(&mut self, slot: u32, extents: &[Extent]) {
        let Slot { cookie, offset, .. } = self.slots.take(slot);
        let id = wire::ALLOCATION_ID.to_be_bytes();
        let count = extents.len() as u64;
        if self.style == Style::Extended {
            self.last_chunk(chunk::BLOCK_STATUS_EXT, cookie, offset, 8 + 16 * count);
            self.out.put(&id);
            self.out.put(&(count as u32).to_be_bytes());
            for extent in extents {
                self.out.put(&extent.len.to_be_bytes());
                self.out.put(&u64::from(extent.flags).to_be_bytes());
            }
        } else {
            self.last_chunk(chunk::BLOCK_STATUS, cookie, offset, 4 + 8 * count);
            self.out.put(&id);
            for extent in extents {
                // No request that is answered so was about more.
                let len = u32::try_from(extent.len).unwrap_or(u32::MAX);
                self.out.put(&len.to_be_bytes());
                self.out.put(&extent.flags.to_be_bytes());
            }
        }
    }

    /// What was read. In one piece, so that DF needs no care.
    #[inline]
    fn data(&mut self, cookie: u64, offset: u64, mem: Buf) {
        if self.style == Style::Simple {
            self.out.put(&wire::simple_reply(0, cookie));
        } else {
            self.last_chunk(chunk::OFFSET_DATA, cookie, offset, 8 + mem.len() as u64);
            self.out.put(&offset.to_be_bytes());
        }
        self.out.put_mem(mem);
    }

    #[inline]
    fn succeed(&mut self, cookie: u64, offset: u64) {
        match self.style {
            Style::Simple => self.out.put(&wire::simple_reply(0, cookie)),
            _ => self.last_chunk(chunk::NONE, cookie, offset, 0),
        }
    }

    /// A request fails.
    pub(crate) fn refuse(&mut self, header: &Header, error: u32) {
        let &Header { cookie, offset, .. } = header;
        match self.style {
            Style::Simple => self.out.put(&wire::simple_reply(error, cookie)),
            _ => {
                // The error, and a message of no bytes.
                self.last_chunk(chunk::ERROR, cookie, offset, 6);
                self.out.put(&error.to_be_bytes());
                self.out.put(&0_u16.to_be_bytes());
            }
        }
    }

    #[inline]
    fn last_chunk(&mut self, kind: u16, cookie: u64, offset: u64, len: u64) {
        let chunk = Chunk { flags: chunk::DONE, kind, cookie, offset, len };
        match self.style {
            Style::Extended => self.out.put(&chunk.to_extended_bytes()),
            _ => self.out.put(&chunk.to_bytes()),
        }
    }
}
