//! Whatever a server says, and in whatever pieces: no panic, nothing outside of what was read, no read that
//! ends well without all its bytes, and the same of the same.

use std::hash::{DefaultHasher, Hash, Hasher};

use cowbell_nbd::wire::{self, chunk, command, error, export, info, option, reply, state};
use cowbell_nbd::{Client, Complaint, Event, Extent, What};

use crate::side::Random;

const SIZE: u64 = 1 << 20;

/// What a server says, one thing after the other.
#[derive(Clone, Debug, Default)]
struct Says(Vec<u8>);

impl Says {
    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) {
        self.0.extend_from_slice(&wire::option_reply(option, kind, data.len() as u32));
        self.0.extend_from_slice(data);
    }

    fn chunk(&mut self, (kind, flags): (u16, u16), cookie: u64, data: &[u8]) {
        let len = data.len() as u64;
        let header = wire::Chunk { flags, kind, cookie, offset: 0, len };
        self.0.extend_from_slice(&header.to_bytes());
        self.0.extend_from_slice(data);
    }

    fn simple(&mut self, error: u32, cookie: u64, data: &[u8]) {
        self.0.extend_from_slice(&wire::simple_reply(error, cookie));
        self.0.extend_from_slice(data);
    }

    /// A handshake that goes well.
    fn handshake(is_structured: bool, random: &mut Random) -> Says {
        let mut says = Says(wire::greeting(3).to_vec());
        let structured = if is_structured { reply::ACK } else { reply::ERR_UNSUP };
        says.answer(option::STRUCTURED_REPLY, structured, &[]);
        if is_structured {
            if random.below(4) > 0 {
                let context = [&7_u32.to_be_bytes(), wire::BASE_ALLOCATION.as_bytes()].concat();
                says.answer(option::SET_META_CONTEXT, reply::META_CONTEXT, &context);
            }
            says.answer(option::SET_META_CONTEXT, reply::ACK, &[]);
        }
        let flags = export::HAS_FLAGS | export::SEND_FLUSH | export::SEND_TRIM;
        let told = [&info::EXPORT.to_be_bytes()[..], &SIZE.to_be_bytes(), &flags.to_be_bytes()];
        says.answer(option::GO, reply::INFO, &told.concat());
        says.answer(option::GO, reply::INFO, &[&info::NAME.to_be_bytes()[..], b"x"].concat());
        if random.below(2) == 0 {
            let sizes = [512_u32, 4096, 1 << 20].map(u32::to_be_bytes);
            let told = [&info::BLOCK_SIZE.to_be_bytes(), sizes.as_flattened()].concat();
            says.answer(option::GO, reply::INFO, &told);
        }
        says.answer(option::GO, reply::ACK, &[]);
        says
    }

    /// A read is answered, in pieces that come in any order.
    fn read(&mut self, cookie: u64, offset: u64, len: u64, random: &mut Random) {
        let mut cuts: Vec<u64> = (0..random.below(4)).map(|_| 1 + random.below(len)).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        cuts.dedup();
        let mut pieces: Vec<[u64; 2]> = cuts.windows(2).map(|cut| [cut[0], cut[1]]).collect();
        for at in 0..pieces.len() {
            pieces.swap(at, random.below(at as u64 + 1) as usize);
        }
        let ends_alone = random.below(3) == 0;
        for (n, &[from, to]) in pieces.iter().enumerate() {
            let is_last = n + 1 == pieces.len() && !ends_alone;
            let done = if is_last { chunk::DONE } else { 0 };
            let mut data = (offset + from).to_be_bytes().to_vec();
            if random.below(4) == 0 {
                data.extend_from_slice(&((to - from) as u32).to_be_bytes());
                self.chunk((chunk::OFFSET_HOLE, done), cookie, &data);
            } else {
                data.extend((from..to).map(|at| byte_at(offset + at)));
                self.chunk((chunk::OFFSET_DATA, done), cookie, &data);
            }
        }
        if ends_alone {
            self.chunk((chunk::NONE, chunk::DONE), cookie, &[]);
        }
    }
}

/// Never 0, nor what memory has at first.
fn byte_at(at: u64) -> u8 {
    (at % 101) as u8 + 1
}

const UNTOUCHED: u8 = 0xee;

/// A conversation: what is asked, and what the server says of it.
fn conversation(random: &mut Random) -> (Vec<(What, u64, u64)>, Vec<u8>) {
    let is_structured = random.below(3) > 0;
    let mut says = Says::handshake(is_structured, random);
    let mut asked = Vec::new();
    for _ in 0..1 + random.below(12) {
        let len = 512 * (1 + random.below(8));
        let offset = 512 * random.below((SIZE - len) / 512 + 1);
        asked.push(match random.below(8) {
            0 => (What::Flush, 0, 0),
            1 => (What::Write { fua: false }, offset, len),
            2 => (What::Trim { fua: false }, offset, len),
            3 if is_structured => (What::Status { one: true }, offset, len),
            4 => (What::Zero { keep: true, fast: false, fua: false }, offset, len),
            _ => (What::Read, offset, len),
        });
    }
    let mut order: Vec<usize> = (0..asked.len()).collect();
    for at in 0..order.len() {
        order.swap(at, random.below(at as u64 + 1) as usize);
    }
    for n in order {
        let (cookie, (what, offset, len)) = (n as u64 + 1, asked[n]);
        match what {
            _ if random.below(10) == 0 => match is_structured {
                true => {
                    let data = [&error::IO.to_be_bytes()[..], &3_u16.to_be_bytes(), b"why"];
                    says.chunk((chunk::ERROR, chunk::DONE), cookie, &data.concat());
                }
                false => says.simple(error::NOSPC, cookie, &[]),
            },
            What::Read if is_structured => says.read(cookie, offset, len, random),
            What::Read => {
                let data: Vec<u8> = (offset..offset + len).map(byte_at).collect();
                says.simple(0, cookie, &data);
            }
            What::Status { .. } => {
                let extent = [7, 512, state::ZERO, 512, 0].map(u32::to_be_bytes);
                let few = 12 + 8 * random.below(2) as usize;
                says.chunk(
                    (chunk::BLOCK_STATUS, chunk::DONE),
                    cookie,
                    &extent.as_flattened()[..few],
                );
            }
            _ if is_structured => says.chunk((chunk::NONE, chunk::DONE), cookie, &[]),
            _ => says.simple(0, cookie, &[]),
        }
    }
    (asked, says.0)
}

/// A client, and what has become of its requests.
#[derive(Clone, Debug)]
struct Hearer {
    client: Client,
    asked: Vec<(What, u64, u64)>,
    mems: Vec<Vec<u8>>,
    /// Bytes of them that were filled in.
    filled: Vec<Vec<bool>>,
    done: Vec<(u64, Result<Option<Extent>, u32>)>,
    sent: Vec<u8>,
}

impl Hearer {
    fn new(asked: &[(What, u64, u64)]) -> Hearer {
        let (client, mems) =
            (Client::new("x"), asked.iter().map(|&(.., len)| vec![UNTOUCHED; len as usize]));
        let (mems, asked) = (mems.collect(), asked.to_vec());
        let filled = asked.iter().map(|&(.., len)| vec![false; len as usize]).collect();
        Hearer { client, asked, mems, filled, done: Vec::new(), sent: Vec::new() }
    }

    fn send(&mut self) {
        self.client.output(&mut self.sent, usize::MAX, |_, _, to| to.fill(9));
    }

    fn hear(&mut self, mut bytes: &[u8]) {
        loop {
            self.send();
            let (taken, event) = self.client.take(bytes);
            let (now, later) = bytes.split_at(taken);
            bytes = later;
            match event {
                Event::Nothing => return assert!(bytes.is_empty(), "more would be taken"),
                Event::Over => return assert!(self.client.complaint().is_some()),
                Event::Ready => {
                    let info = *self.client.info().expect("it is ready");
                    assert!(info.block_min.is_power_of_two() && info.request_max > 0);
                    for (n, &(what, offset, len)) in self.asked.iter().enumerate() {
                        // What a caller sees to.
                        let fits = offset + len <= info.size && len <= info.longest(what);
                        if fits {
                            self.client.ask(n as u64 + 1, what, offset, len);
                        }
                    }
                }
                Event::Data { cookie, at, len } => {
                    assert!(len > 0 && len <= taken);
                    let to = &mut self.mems[cookie as usize - 1][at as usize..at as usize + len];
                    to.copy_from_slice(&now[taken - len..]);
                    self.fill(cookie, at, len);
                }
                Event::Zeros { cookie, at, len } => {
                    self.mems[cookie as usize - 1][at as usize..(at + len) as usize].fill(0);
                    self.fill(cookie, at, len as usize);
                }
                Event::Done { cookie, result } => {
                    let (what, _, len) = self.asked[cookie as usize - 1];
                    assert!(self.done.iter().all(|done| done.0 != cookie), "it ended twice");
                    if let Ok(extent) = result {
                        assert_eq!(extent.is_some(), matches!(what, What::Status { .. }));
                        assert!(extent.is_none_or(|extent| extent.len > 0 && extent.len <= len));
                    }
                    self.done.push((cookie, result));
                }
            }
        }
    }

    fn fill(&mut self, cookie: u64, at: u64, len: usize) {
        let filled = &mut self.filled[cookie as usize - 1][at as usize..at as usize + len];
        assert!(!filled.contains(&true), "the same bytes twice");
        filled.fill(true);
    }

    /// Of reads that ended well, all memory was filled in.
    fn check_filled(&self) {
        for &(cookie, result) in &self.done {
            let n = cookie as usize - 1;
            if self.asked[n].0 == What::Read && result.is_ok() {
                assert!(!self.filled[n].contains(&false), "bytes that nobody filled in");
            }
        }
    }

    /// All but what was sent: a client that is broken early has sent less.
    fn hash_of(&mut self) -> u64 {
        self.send();
        let mut hasher = DefaultHasher::new();
        let Hearer { client, asked, mems, done, .. } = self;
        (client, asked, mems, done).hash(&mut hasher);
        hasher.finish()
    }
}

fn heard(asked: &[(What, u64, u64)], says: &[u8]) -> Hearer {
    let mut hearer = Hearer::new(asked);
    hearer.hear(says);
    hearer
}

#[test]
fn what_makes_sense_is_understood_in_any_pieces() {
    let mut random = Random(1);
    let mut ended = 0;
    for round in 0..2000 {
        let (asked, says) = conversation(&mut random);
        let mut whole = heard(&asked, &says);
        // (A server without the context is asked nothing about it by those who look first.)
        let knows = whole.client.info().expect("the handshake went well").has_allocation;
        let asks = asked.iter().any(|asked| matches!(asked.0, What::Status { .. }));
        if knows || !asks {
            assert_eq!(whole.client.complaint(), None, "round {round}");
            assert_eq!((whole.done.len(), whole.client.in_flight()), (asked.len(), 0));
        }
        ended += whole.done.len();
        for &(cookie, result) in &whole.done {
            let ((what, offset, _), mem) =
                (asked[cookie as usize - 1], &whole.mems[cookie as usize - 1]);
            let is_right = |(at, &byte)| byte == 0 || byte == byte_at(offset + at as u64);
            if what == What::Read && result.is_ok() {
                assert!(mem.iter().enumerate().all(is_right));
            } else {
                assert!(mem.iter().all(|&byte| byte == UNTOUCHED));
            }
        }
        let mut pieces = Hearer::new(&asked);
        let mut rest = &says[..];
        let longest = [1, 2, 9, 40, 3000][round % 5];
        while !rest.is_empty() {
            let (now, later) = rest.split_at((1 + random.below(longest) as usize).min(rest.len()));
            rest = later;
            // A copy goes on where it was.
            if random.below(40) == 0 {
                pieces = pieces.clone();
            }
            pieces.hear(now);
        }
        assert_eq!(pieces.hash_of(), whole.hash_of(), "round {round}");
    }
    assert!(ended > 5000, "{ended}");
}

#[test]
fn twenty_thousand_conversations_gone_wrong() {
    let mut random = Random(2);
    let (mut broken, mut ended) = (0, 0);
    for _ in 0..20_000 {
        let (asked, mut says) = conversation(&mut random);
        for _ in 0..1 + random.below(3) {
            let at = random.below(says.len() as u64) as usize;
            // The headers are where it hurts: often within the first bytes of all.
            let at = if random.below(3) == 0 { at % 300 % says.len() } else { at };
            match random.below(6) {
                0 => says[at] ^= 1 << random.below(8),
                1 => says[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5) as usize],
                2 => drop(says.drain(at..(at + 1 + random.below(30) as usize).min(says.len()))),
                3 => {
                    let end = (at + 1 + random.below(60) as usize).min(says.len());
                    let again = says[at..end].to_vec();
                    says.splice(at..at, again);
                }
                4 => {
                    let end = (at + 4).min(says.len());
                    says[at..end].fill(0xff);
                }
                _ => says.truncate(at + 1),
            }
            if says.is_empty() {
                says.push(0);
            }
        }
        let mut whole = heard(&asked, &says);
        broken += usize::from(whole.client.complaint().is_some());
        ended += whole.done.len();
        whole.check_filled();
        let cut = random.below(says.len() as u64 + 1) as usize;
        let mut pieces = Hearer::new(&asked);
        pieces.hear(&says[..cut]);
        pieces.hear(&says[cut..]);
        assert_eq!(pieces.hash_of(), whole.hash_of());
    }
    assert!(broken > 5000 && ended > 20_000, "{broken} broken, {ended} requests ended");
}

/// A client that has asked for a read and a write, of structured replies.
fn asking() -> Hearer {
    let says = Says::handshake(true, &mut Random(3));
    heard(&[(What::Read, 4096, 1024), (What::Write { fua: false }, 0, 512)], &says.0)
}

fn data(offset: u64, len: usize) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &vec![5; len]].concat()
}

#[test]
fn lies_are_seen() {
    let hole = |offset: u64, len: u32| [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
    type Lie = (&'static str, fn(&mut Says, &dyn Fn(u64, u32) -> Vec<u8>));
    let lies: [Lie; 14] = [
        ("before it", |says, _| says.chunk((chunk::OFFSET_DATA, 0), 1, &data(4095, 2))),
        ("behind it", |says, _| says.chunk((chunk::OFFSET_DATA, 0), 1, &data(4096, 1025))),
        ("far away", |says, _| says.chunk((chunk::OFFSET_DATA, 0), 1, &data(u64::MAX, 8))),
        ("a long hole", |says, hole| says.chunk((chunk::OFFSET_HOLE, 0), 1, &hole(4096, u32::MAX))),
        ("an empty hole", |says, hole| says.chunk((chunk::OFFSET_HOLE, 0), 1, &hole(4096, 0))),
        ("twice", |says, hole| {
            says.chunk((chunk::OFFSET_DATA, 0), 1, &data(4100, 10));
            says.chunk((chunk::OFFSET_HOLE, 0), 1, &hole(4109, 1));
        }),
        ("not all", |says, _| says.chunk((chunk::OFFSET_DATA, chunk::DONE), 1, &data(4096, 1023))),
        ("nothing of it", |says, _| says.chunk((chunk::NONE, chunk::DONE), 1, &[])),
        ("data of a write", |says, _| {
            says.chunk((chunk::OFFSET_DATA, chunk::DONE), 2, &data(0, 8))
        }),
        ("what nobody asked", |says, _| says.chunk((chunk::NONE, chunk::DONE), 3, &[])),
        ("a simple reply to a read", |says, _| says.simple(0, 1, &[0; 1024])),
        ("a status that nobody wants", |says, _| {
            says.chunk((chunk::BLOCK_STATUS, chunk::DONE), 1, &[0; 12]);
        }),
        ("an error that is none", |says, _| says.chunk((chunk::ERROR, chunk::DONE), 1, &[0; 6])),
        ("a long message", |says, _| {
            says.chunk((chunk::ERROR, chunk::DONE), 1, &[0, 0, 0, 5, 0, 9]);
        }),
    ];
    for (what, lie) in lies {
        let (mut hearer, mut says) = (asking(), Says::default());
        lie(&mut says, &hole);
        hearer.hear(&says.0);
        let complaint = hearer.client.complaint();
        assert!(matches!(complaint, Some(Complaint::Broken(_))), "{what}: {complaint:?}");
        assert!(hearer.done.is_empty(), "{what}");
    }
    // A read in more pieces than are remembered.
    let (mut hearer, mut says) = (
        heard(&[(What::Read, 0, 8192)], &Says::handshake(true, &mut Random(3)).0),
        Says::default(),
    );
    for piece in 0..4000 {
        says.chunk((chunk::OFFSET_DATA, 0), 1, &data(2 * piece, 1));
    }
    hearer.hear(&says.0);
    assert!(hearer.client.complaint().is_some());
}

#[test]
fn a_write_is_not_answered_before_it_was_sent() {
    let mut client = Client::new("x");
    let says = Says::handshake(false, &mut Random(3)).0;
    let mut rest = &says[..];
    let mut out = Vec::new();
    loop {
        client.output(&mut out, usize::MAX, |_, _, _| panic!("nothing was asked"));
        let (taken, event) = client.take(rest);
        rest = &rest[taken..];
        if event == Event::Ready {
            break;
        }
    }
    client.output(&mut out, usize::MAX, |_, _, _| panic!("nothing was asked"));
    client.ask(1, What::Write { fua: false }, 0, 512);
    out.clear();
    client.output(&mut out, 100, |_, at, to| to.fill(at as u8));
    assert_eq!((out.len(), client.has_output()), (100, true));
    let mut whole = client.clone();
    let (taken, event) = client.take(&wire::simple_reply(0, 1));
    assert_eq!((taken, event), (16, Event::Over));
    // It goes on where it stopped.
    whole.output(&mut out, 10_000, |_, at, to| to.fill(at as u8));
    assert_eq!(out.len(), wire::REQUEST_LEN + 512);
    assert_eq!(out[wire::REQUEST_LEN..], [vec![0; 72], vec![72; 440]].concat());
    assert_eq!(u16::from_be_bytes([out[6], out[7]]), command::WRITE);
    assert_eq!(
        whole.take(&wire::simple_reply(0, 1)).1,
        Event::Done { cookie: 1, result: Ok(None) }
    );
}
