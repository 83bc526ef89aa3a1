//! What the protocol's messages look like on the wire: numbers, and the headers that have them.
//!
//! Both sides of the protocol need these. All integers are in network byte order.

/// What a server says first.
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Before the server's flags, and before every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before the answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before a request with an extended header.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Before a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// Before a chunk with an extended header.
pub const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// The longest string, in bytes.
pub const STRING_MAX: usize = 4096;
/// The longest payload that every peer takes, in bytes.
pub const PAYLOAD_MAX: u64 = 32 << 20;
/// The context of holes and zeros.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Flags of the handshake, in the server's 16 and the client's 32 bits.
pub mod handshake {
    /// Options are negotiated as they are today.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// No 124 zeros after the answer to an option of the first days.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options.
pub mod option {
    /// Begin with this export; no answer if there is none.
    pub const EXPORT_NAME: u32 = 1;
    /// Good-bye.
    pub const ABORT: u32 = 2;
    /// Which exports are there?
    pub const LIST: u32 = 3;
    /// Go on encrypted.
    pub const STARTTLS: u32 = 5;
    /// What is this export?
    pub const INFO: u32 = 6;
    /// The same, and begin.
    pub const GO: u32 = 7;
    /// Structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which contexts are there?
    pub const LIST_META_CONTEXT: u32 = 9;
    /// These contexts are to be asked about.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Headers with 64 bits for lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Answers to options.
pub mod reply {
    /// Yes; or: that was all.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// Something about an export.
    pub const INFO: u32 = 3;
    /// A context.
    pub const META_CONTEXT: u32 = 4;
    /// Of all answers that mean no.
    pub const ERROR: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// What the option says makes no sense.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// Only on an encrypted connection.
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The option is too long.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
    /// There are extended headers already.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;
}

/// What an answer to INFO or GO is about.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// The name.
    pub const NAME: u16 = 1;
    /// The description.
    pub const DESCRIPTION: u16 = 2;
    /// Which sizes of requests there may be.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub mod export {
    /// There are flags.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Not to be written.
    pub const READ_ONLY: u16 = 1 << 1;
    /// Flushes.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// Writes that are stable when they are answered.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Discards.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// Writes of zeros.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// Reads that are answered in one piece.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on others.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// Reading ahead.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// Writes of zeros that are to be fast, or refused.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// What a request is.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Good-bye.
    pub const DISC: u16 = 2;
    /// What is written becomes stable.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Read ahead.
    pub const CACHE: u16 = 5;
    /// Write zeros.
    pub const WRITE_ZEROES: u16 = 6;
    /// What is where?
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub mod flag {
    /// Stable when it is answered.
    pub const FUA: u16 = 1 << 0;
    /// Space is kept.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One piece.
    pub const DF: u16 = 1 << 2;
    /// One extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fast, or not at all.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is that of bytes that follow; in extended headers only.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Chunks of structured replies.
pub mod chunk {
    /// Of the flags: there are no more chunks.
    pub const DONE: u16 = 1 << 0;
    /// Nothing in it.
    pub const NONE: u16 = 0;
    /// An offset, and what was read there.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset, and how many zeros are there.
    pub const OFFSET_HOLE: u16 = 2;
    /// A context, and extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// The same with 64 bits.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Of all kinds that mean that it failed.
    pub const FAILED: u16 = 1 << 15;
    /// It failed.
    pub const ERROR: u16 = FAILED | 1;
    /// It failed at an offset.
    pub const ERROR_OFFSET: u16 = FAILED | 2;
}

/// What `base:allocation` says of an extent.
pub mod state {
    /// It takes no space.
    pub const HOLE: u32 = 1 << 0;
    /// It reads as zeros.
    pub const ZERO: u32 = 1 << 1;
}

/// Errors.
pub mod error {
    /// Not permitted.
    pub const PERM: u32 = 1;
    /// Input/output error.
    pub const IO: u32 = 5;
    /// No memory.
    pub const NOMEM: u32 = 12;
    /// Makes no sense.
    pub const INVAL: u32 = 22;
    /// No space left; also: behind the end of the disk.
    pub const NOSPC: u32 = 28;
    /// Too long.
    pub const OVERFLOW: u32 = 75;
    /// Not supported.
    pub const NOTSUP: u32 = 95;
    /// The server is going.
    pub const SHUTDOWN: u32 = 108;
}

/// The context id of [`BASE_ALLOCATION`].
pub const ALLOCATION_ID: u32 = 1;

/// Fixed-size fields, one after the other.
struct Fields<const N: usize>([u8; N], usize);

impl<const N: usize> Fields<N> {
    fn new() -> Self {
        Fields([0; N], 0)
    }

    #[inline]
    fn put<const M: usize>(mut self, bytes: [u8; M]) -> Self {
        self.0[self.1..self.1 + M].copy_from_slice(&bytes);
        self.1 += M;
        self
    }
}

/// Takes fields from the front of bytes; `None` when there are too few.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    /// 16 bits.
    #[inline]
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// 32 bits.
    #[inline]
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// 64 bits.
    #[inline]
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string of at most [`STRING_MAX`] bytes, after its length in 32 bits.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()? as usize;
        if len > STRING_MAX {
            return None;
        }
        let (string, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(string)
    }
}

/// What a server says first.
pub const GREETING_LEN: usize = 18;

/// See [`GREETING_LEN`].
pub fn greeting(flags: u16) -> [u8; GREETING_LEN] {
    let fields = Fields::new().put(MAGIC.to_be_bytes()).put(OPTION_MAGIC.to_be_bytes());
    fields.put(flags.to_be_bytes()).0
}

/// Bytes of an option without its data.
pub const OPTION_LEN: usize = 16;

/// An option with so much data behind it.
pub fn option_header(option: u32, len: u32) -> [u8; OPTION_LEN] {
    let fields = Fields::new().put(OPTION_MAGIC.to_be_bytes());
    fields.put(option.to_be_bytes()).put(len.to_be_bytes()).0
}

/// The option and how much data it has; `None`: that is no option.
pub fn option_of(bytes: &[u8; OPTION_LEN]) -> Option<(u32, u32)> {
    let mut fields = Reader(bytes);
    let magic = fields.u64()?;
    Some((fields.u32()?, fields.u32()?)).filter(|_| magic == OPTION_MAGIC)
}

/// Bytes of the answer to an option without its data.
pub const OPTION_REPLY_LEN: usize = 20;

/// The answer to an option, with so much data behind it.
pub fn option_reply(option: u32, kind: u32, len: u32) -> [u8; OPTION_REPLY_LEN] {
    let fields = Fields::new().put(OPTION_REPLY_MAGIC.to_be_bytes()).put(option.to_be_bytes());
    fields.put(kind.to_be_bytes()).put(len.to_be_bytes()).0
}

/// What option is answered, how, and how much data there is behind it; `None`: that is no answer.
pub fn option_reply_of(bytes: &[u8; OPTION_REPLY_LEN]) -> Option<(u32, u32, u32)> {
    let mut fields = Reader(bytes);
    let magic = fields.u64()?;
    let reply = (fields.u32()?, fields.u32()?, fields.u32()?);
    Some(reply).filter(|_| magic == OPTION_REPLY_MAGIC)
}

/// A string after its length in 32 bits.
pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

/// A request.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Header {
    /// See [`flag`].
    pub flags: u16,
    /// See [`command`].
    pub command: u16,
    /// The client's name for it.
    pub cookie: u64,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes on the disk, or behind the header.
    pub len: u64,
}

/// Bytes of a [`Header`].
pub const REQUEST_LEN: usize = 28;
/// Bytes of an extended one.
pub const EXTENDED_REQUEST_LEN: usize = 32;

impl Header {
    /// As it is sent. Only the length's lowest 32 bits.
    pub fn to_bytes(&self) -> [u8; REQUEST_LEN] {
        let fields = Fields::new().put(REQUEST_MAGIC.to_be_bytes()).put(self.flags.to_be_bytes());
        let fields = fields.put(self.command.to_be_bytes()).put(self.cookie.to_be_bytes());
        fields.put(self.offset.to_be_bytes()).put((self.len as u32).to_be_bytes()).0
    }

    /// As it is sent when headers are extended.
    pub fn to_extended_bytes(&self) -> [u8; EXTENDED_REQUEST_LEN] {
        let fields = Fields::new().put(EXTENDED_REQUEST_MAGIC.to_be_bytes());
        let fields = fields.put(self.flags.to_be_bytes()).put(self.command.to_be_bytes());
        let fields = fields.put(self.cookie.to_be_bytes()).put(self.offset.to_be_bytes());
        fields.put(self.len.to_be_bytes()).0
    }

    /// Out of what was sent; `None`: that is no request.
    #[inline]
    pub fn from_bytes(bytes: &[u8; REQUEST_LEN]) -> Option<Header> {
        let mut fields = Reader(bytes);
        let magic = fields.u32()?;
        let (flags, command, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
        let (offset, len) = (fields.u64()?, fields.u32()?.into());
        Some(Header { flags, command, cookie, offset, len }).filter(|_| magic == REQUEST_MAGIC)
    }

    /// Out of what was sent when headers are extended; `None`: that is no request.
    #[inline]
    pub fn from_extended_bytes(bytes: &[u8; EXTENDED_REQUEST_LEN]) -> Option<Header> {
        let mut fields = Reader(bytes);
        let magic = fields.u32()?;
        let (flags, command, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
        let (offset, len) = (fields.u64()?, fields.u64()?);
        let header = Header { flags, command, cookie, offset, len };
        Some(header).filter(|_| magic == EXTENDED_REQUEST_MAGIC)
    }
}

/// Bytes of a simple reply, before what was read.
pub const SIMPLE_REPLY_LEN: usize = 16;

/// A simple reply. No error: 0.
#[inline]
pub fn simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_REPLY_LEN] {
    let fields = Fields::new().put(SIMPLE_REPLY_MAGIC.to_be_bytes());
    fields.put(error.to_be_bytes()).put(cookie.to_be_bytes()).0
}

/// A chunk's header.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Chunk {
    /// See [`chunk::DONE`].
    pub flags: u16,
    /// See [`chunk`].
    pub kind: u16,
    /// The request's.
    pub cookie: u64,
    /// The request's; only in extended headers.
    pub offset: u64,
    /// Bytes behind the header.
    pub len: u64,
}

/// Bytes of a chunk's header.
pub const CHUNK_LEN: usize = 20;
/// Bytes of an extended one.
pub const EXTENDED_CHUNK_LEN: usize = 32;

impl Chunk {
    /// As it is sent. Only the length's lowest 32 bits.
    #[inline]
    pub fn to_bytes(&self) -> [u8; CHUNK_LEN] {
        let fields = Fields::new().put(CHUNK_MAGIC.to_be_bytes()).put(self.flags.to_be_bytes());
        let fields = fields.put(self.kind.to_be_bytes()).put(self.cookie.to_be_bytes());
        fields.put((self.len as u32).to_be_bytes()).0
    }

    /// As it is sent when headers are extended.
    #[inline]
    pub fn to_extended_bytes(&self) -> [u8; EXTENDED_CHUNK_LEN] {
        let fields = Fields::new().put(EXTENDED_CHUNK_MAGIC.to_be_bytes());
        let fields = fields.put(self.flags.to_be_bytes()).put(self.kind.to_be_bytes());
        let fields = fields.put(self.cookie.to_be_bytes()).put(self.offset.to_be_bytes());
        fields.put(self.len.to_be_bytes()).0
    }
}
