//! Both sides of a connection: a client's messages, and a server with disks in memory.

use std::io::IoSlice;
use std::sync::Arc;

use cowbell_engine::mem::Buf;
use cowbell_nbd::wire::{self, Header, error, state};
use cowbell_nbd::{Connection, Export, Extent, Limits, Request, Want, What};

/// Bytes of each disk.
pub const SIZE: u64 = 1 << 20;

/// Two disks; the second may not be written.
pub fn exports() -> Arc<[Export]> {
    let other =
        Export { read_only: true, description: "the other".into(), ..Export::new("b", SIZE) };
    [Export::new("a", SIZE), other].into()
}

/// A client's messages, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Script(pub Vec<u8>);

impl Script {
    /// A client of today has begun.
    pub fn new() -> Script {
        Script::with_flags(3)
    }

    pub fn with_flags(flags: u32) -> Script {
        Script(flags.to_be_bytes().into())
    }

    fn bytes(mut self, bytes: &[u8]) -> Script {
        self.0.extend_from_slice(bytes);
        self
    }

    #[must_use]
    pub fn option(self, option: u32, data: &[u8]) -> Script {
        self.bytes(&wire::option_header(option, data.len() as u32)).bytes(data)
    }

    /// INFO or GO.
    #[must_use]
    pub fn info(self, option: u32, name: &str, asked: &[u16]) -> Script {
        let mut data = string(name);
        data.extend_from_slice(&(asked.len() as u16).to_be_bytes());
        asked.iter().for_each(|what| data.extend_from_slice(&what.to_be_bytes()));
        self.option(option, &data)
    }

    /// LIST_META_CONTEXT or SET_META_CONTEXT.
    #[must_use]
    pub fn contexts(self, option: u32, name: &str, queries: &[&str]) -> Script {
        let mut data = string(name);
        data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
        queries.iter().for_each(|query| data.extend_from_slice(&string(query)));
        self.option(option, &data)
    }

    #[must_use]
    pub fn go(self, name: &str) -> Script {
        self.info(wire::option::GO, name, &[])
    }

    #[must_use]
    pub fn request(
        self,
        (command, flags): (u16, u16),
        cookie: u64,
        (offset, len): (u64, u64),
        payload: &[u8],
    ) -> Script {
        let header = Header { flags, command, cookie, offset, len };
        self.bytes(&header.to_bytes()).bytes(payload)
    }

    #[must_use]
    pub fn extended(
        self,
        (command, flags): (u16, u16),
        cookie: u64,
        (offset, len): (u64, u64),
        payload: &[u8],
    ) -> Script {
        let header = Header { flags, command, cookie, offset, len };
        self.bytes(&header.to_extended_bytes()).bytes(payload)
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

/// A connection to disks in memory.
#[derive(Clone, Debug, Hash)]
pub struct Server {
    pub connection: Connection,
    pub disks: Vec<Vec<u8>>,
    /// Everything that was sent to the client.
    pub sent: Vec<u8>,
    /// Requests that were handed out.
    pub requests: usize,
    /// The most memory that was out at once.
    pub held_max: usize,
    /// Payloads are put into their place by the socket's side.
    pub in_place: bool,
}

impl Server {
    pub fn new() -> Server {
        Server::with(Limits::default())
    }

    pub fn with(limits: Limits) -> Server {
        let connection = Connection::new(exports(), limits);
        let disks = vec![vec![0; SIZE as usize]; 2];
        Server { connection, disks, sent: Vec::new(), requests: 0, held_max: 0, in_place: false }
    }

    /// Takes `bytes`, each request done at once, and sends all there is. Answers how many bytes were
    /// not taken.
    pub fn hear(&mut self, mut bytes: &[u8]) -> usize {
        loop {
            match self.connection.want() {
                Want::Bytes if bytes.is_empty() => break,
                Want::Bytes if self.in_place && self.connection.payload().is_some() => {
                    let payload = self.connection.payload().expect("there is one");
                    let count = payload.len().min(bytes.len());
                    payload[..count].copy_from_slice(&bytes[..count]);
                    self.connection.payload_filled(count);
                    bytes = &bytes[count..];
                }
                Want::Bytes => {
                    let taken = self.connection.take(bytes);
                    assert!(taken > 0, "it wanted some");
                    bytes = &bytes[taken..];
                }
                Want::Memory(len) => {
                    assert!(len as u64 <= wire::PAYLOAD_MAX && len > 0);
                    self.connection.give(Buf::zeroed(len));
                    self.held_max = self.held_max.max(self.connection.held());
                }
                Want::Submit => {
                    let request = self.connection.next().expect("one is ready");
                    self.do_it(request);
                }
                Want::Room => {
                    assert!(self.connection.has_output(), "nothing is in flight");
                    self.send(usize::MAX);
                }
                Want::Nothing => break,
            }
        }
        self.send(usize::MAX);
        bytes.len()
    }

    /// Sends up to `most` bytes at a time.
    pub fn send(&mut self, most: usize) {
        while self.connection.has_output() {
            let mut slices = [IoSlice::new(&[]); 3];
            let count = self.connection.output(&mut slices);
            let mut bytes: Vec<u8> =
                slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
            bytes.truncate(most);
            self.connection.sent(bytes.len(), drop);
            self.sent.extend_from_slice(&bytes);
        }
    }

    pub fn do_it(&mut self, request: Request) {
        let Request { slot, export, what, offset, len, mut mem } = request;
        self.requests += 1;
        let size = SIZE;
        assert!(offset + len <= size && (len > 0 || what == What::Flush), "it was checked");
        assert!(
            export == 0
                || matches!(what, What::Read | What::Flush | What::Cache | What::Status { .. })
        );
        let disk = &mut self.disks[export];
        let range = offset as usize..(offset + len) as usize;
        match (what, mem.as_mut()) {
            (What::Read, Some(mem)) => mem.copy_from_slice(&disk[range]),
            (What::Write { .. }, Some(mem)) => disk[range].copy_from_slice(mem),
            (What::Zero { fast: true, .. }, None) => {
                self.connection.finish(slot, Err(error::NOTSUP), None);
                return;
            }
            (What::Zero { .. } | What::Trim { .. }, None) => disk[range].fill(0),
            (What::Status { one }, None) => {
                let extents = extents(&disk[range]);
                let count = if one { 1 } else { extents.len() };
                return self.connection.finish_status(slot, &extents[..count]);
            }
            (What::Flush | What::Cache, None) => {}
            other => panic!("{other:?}"),
        }
        self.connection.finish(slot, Ok(()), mem);
    }
}

/// By blocks of 4 KiB: zeros or not.
fn extents(bytes: &[u8]) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for block in bytes.chunks(4096) {
        let is_zero = block.iter().all(|&byte| byte == 0);
        let (len, flags) =
            (block.len() as u64, if is_zero { state::HOLE | state::ZERO } else { 0 });
        match extents.last_mut() {
            Some(last) if last.flags == flags => last.len += len,
            _ => extents.push(Extent { len, flags }),
        }
    }
    extents
}

/// What was sent, taken apart.
pub struct Heard<'a>(pub &'a [u8]);

impl<'a> Heard<'a> {
    /// What follows the greeting.
    pub fn new(server: &'a Server) -> Heard<'a> {
        let (greeting, rest) = server.sent.split_at(wire::GREETING_LEN);
        assert_eq!(greeting, wire::greeting(3));
        Heard(rest)
    }

    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (now, rest) = self.0.split_at(len);
        self.0 = rest;
        now
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().expect("two"))
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().expect("four"))
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().expect("eight"))
    }

    /// The answer to an option: its kind and data.
    pub fn answer(&mut self, option: u32) -> (u32, &'a [u8]) {
        assert_eq!((self.u64(), self.u32()), (wire::OPTION_REPLY_MAGIC, option));
        let (kind, len) = (self.u32(), self.u32());
        (kind, self.take(len as usize))
    }

    /// A simple reply: error and cookie.
    pub fn simple(&mut self) -> (u32, u64) {
        assert_eq!(self.u32(), wire::SIMPLE_REPLY_MAGIC);
        (self.u32(), self.u64())
    }

    /// A chunk that is the last: kind, cookie and payload.
    pub fn chunk(&mut self) -> (u16, u64, &'a [u8]) {
        assert_eq!((self.u32(), self.u16()), (wire::CHUNK_MAGIC, wire::chunk::DONE));
        let (kind, cookie, len) = (self.u16(), self.u64(), self.u32());
        (kind, cookie, self.take(len as usize))
    }

    /// The same with an extended header, after the request's offset.
    pub fn extended(&mut self) -> (u16, u64, u64, &'a [u8]) {
        assert_eq!((self.u32(), self.u16()), (wire::EXTENDED_CHUNK_MAGIC, wire::chunk::DONE));
        let (kind, cookie, offset, len) = (self.u16(), self.u64(), self.u64(), self.u64());
        (kind, cookie, offset, self.take(len as usize))
    }

    pub fn is_all(&self) -> bool {
        self.0.is_empty()
    }
}

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// A client that does some of everything: `steps` messages, most of which make sense.
pub fn any_script(random: &mut Random, steps: u64) -> Script {
    use wire::{command, flag, option};
    let mut script =
        Script::with_flags(if random.below(30) > 0 { 3 } else { random.below(8) as u32 });
    let names = ["", "a", "b", "c", "a", "b"];
    let mut extended = false;
    for _ in 0..random.below(6) {
        let name = names[random.below(6) as usize];
        script = match random.below(9) {
            0 => script.option(option::LIST, &[]),
            1 => script.info(option::INFO, name, &[0, 1, 2, 3, 77]),
            2 | 3 => script.option(option::STRUCTURED_REPLY, &[]),
            4 => script.contexts(option::LIST_META_CONTEXT, name, &["base:"]),
            5 => script.contexts(option::SET_META_CONTEXT, name, &["base:allocation", "x:y"]),
            6 => script.option(option::STARTTLS, &[]),
            7 if random.below(2) == 0 => {
                extended = true;
                script.option(option::EXTENDED_HEADERS, &[])
            }
            8 if random.below(4) > 0 => script.option(12, &[1, 2, 3]),
            _ => script.option(random.below(14) as u32, &vec![0; random.below(9) as usize]),
        };
    }
    script = match random.below(4) {
        0 => script.option(option::EXPORT_NAME, b"a"),
        1 => script.go(names[random.below(6) as usize]),
        _ => script.go("a"),
    };
    let data: Vec<u8> = (0..16 << 10).map(|at| (at % 251) as u8 + 1).collect();
    for cookie in 0..steps {
        let command = [0, 0, 1, 1, 1, 3, 4, 5, 6, 7, 7, 8][random.below(12) as usize];
        let len = if command == command::FLUSH { 0 } else { random.below(16 << 10) };
        let offset = random.below(SIZE + 4096);
        let flags = [0, 0, flag::FUA, flag::DF, flag::NO_HOLE, flag::REQ_ONE, 1 << 5, 1 << 9];
        let flags = flags[random.below(8) as usize];
        let has_payload = command == command::WRITE || extended && flags & flag::PAYLOAD_LEN != 0;
        let payload = if has_payload { &data[..len as usize] } else { &[] };
        let (command, range) = ((command, flags), (offset, len));
        script = match extended {
            true => script.extended(command, cookie, range, payload),
            false => script.request(command, cookie, range, payload),
        };
    }
    script.request((command::DISC, 0), 0, (0, 0), &[])
}
