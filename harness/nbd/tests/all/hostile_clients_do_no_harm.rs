//! Whatever a client sends, and in whatever pieces: no panic, no memory without a reason, and the
//! same answers.

use std::hash::{DefaultHasher, Hash, Hasher};

use cowbell_nbd::wire::{self, command, option};
use cowbell_nbd::{Limits, Want};

use crate::side::{Random, Script, Server, any_script};

/// What becomes of a server that hears `bytes` at once.
fn after(bytes: &[u8]) -> Server {
    let mut server = Server::new();
    server.hear(bytes);
    server
}

#[test]
fn pieces_make_no_difference() {
    let mut random = Random(7);
    let (mut served, mut largest) = (0, 0);
    for round in 0..400 {
        let script = any_script(&mut random, 30).0;
        let whole = after(&script);
        served += whole.requests;
        largest = largest.max(whole.sent.len());
        let mut server = Server::new();
        server.in_place = round % 2 == 0;
        let mut rest = &script[..];
        let longest = [1, 2, 7, 33, 5000, 100_000][round / 2 % 6];
        while !rest.is_empty() {
            let (now, later) = rest.split_at((1 + random.below(longest) as usize).min(rest.len()));
            rest = later;
            if server.hear(now) > 0 {
                assert_eq!(server.connection.want(), Want::Nothing);
                break;
            }
        }
        assert!(server.sent == whole.sent && server.disks == whole.disks, "{round}");
        assert_eq!(server.connection.complaint(), whole.connection.complaint());
    }
    assert!(served > 3000 && largest > 60_000, "{served} requests, {largest} bytes");
}

#[test]
fn any_script_of_quickcheck_in_any_pieces() {
    fn holds(seed: u64, cuts: Vec<u16>) -> bool {
        let script = any_script(&mut Random(seed), 8).0;
        let whole = after(&script);
        let mut cuts: Vec<usize> =
            cuts.iter().map(|&cut| usize::from(cut) % (script.len() + 1)).collect();
        cuts.extend([0, script.len()]);
        cuts.sort_unstable();
        let mut server = Server::new();
        for cut in cuts.windows(2) {
            if server.hear(&script[cut[0]..cut[1]]) > 0 {
                break;
            }
        }
        server.sent == whole.sent && server.disks == whole.disks
    }
    quickcheck::QuickCheck::new().tests(300).quickcheck(holds as fn(u64, Vec<u16>) -> bool);
}

#[test]
fn what_is_sent_in_pieces_is_the_same() {
    let mut random = Random(8);
    for _ in 0..100 {
        let script = any_script(&mut random, 20).0;
        let whole = after(&script);
        let mut server = Server::new();
        let mut rest = &script[..];
        while server.connection.want() != Want::Nothing && !rest.is_empty() {
            match server.connection.want() {
                Want::Bytes => rest = &rest[server.connection.take(rest)..],
                Want::Memory(len) => {
                    server.connection.give(cowbell_engine::mem::Buf::zeroed(len));
                }
                Want::Submit => {
                    let request = server.connection.next().expect("it is ready");
                    server.do_it(request);
                }
                _ => server.send(1 + random.below(900) as usize),
            }
        }
        while server.connection.want() == Want::Submit {
            let request = server.connection.next().expect("it is ready");
            server.do_it(request);
        }
        server.send(1 + random.below(900) as usize);
        assert!(server.sent == whole.sent);
        assert_eq!(server.connection.held(), 0, "all was sent");
    }
}

#[test]
fn a_copy_goes_on_as_the_first_does() {
    let mut random = Random(9);
    for _ in 0..100 {
        let script = any_script(&mut random, 10).0;
        let (one, two) = script.split_at(random.below(script.len() as u64) as usize);
        let mut first = after(one);
        let mut copy = first.clone();
        let hash = |server: &Server| {
            let mut hasher = DefaultHasher::new();
            server.hash(&mut hasher);
            hasher.finish()
        };
        assert_eq!(hash(&first), hash(&copy));
        let before = hash(&copy);
        first.hear(two);
        assert_eq!(hash(&copy), before, "it is a copy");
        copy.hear(two);
        assert_eq!(hash(&first), hash(&copy));
    }
}

#[test]
fn mutated_messages() {
    let mut random = Random(10);
    let mut broken = 0;
    for _ in 0..20_000 {
        let mut bytes = any_script(&mut random, 6).0;
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len() as u64) as usize;
            match random.below(5) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = [0, 0x7f, 0x80, 0xff][random.below(4) as usize],
                2 => drop(bytes.drain(at..(at + random.below(9) as usize).min(bytes.len()))),
                3 => bytes.truncate(at.max(1)),
                _ => {
                    let word = random.next().to_be_bytes();
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].copy_from_slice(&word[..end - at]);
                }
            }
            if bytes.is_empty() {
                bytes.push(0);
            }
        }
        let server = after(&bytes);
        broken += usize::from(server.connection.complaint().is_some());
        assert!(server.held_max <= Limits::default().bytes);
        server.connection.abandon(drop);
    }
    assert!(broken > 1000, "{broken}");
}

#[test]
fn lengths_that_are_lies() {
    // Nothing is taken for what only a length says.
    let mut server = Server::new();
    let mut script = Script::new();
    script.0.extend_from_slice(&wire::option_header(option::GO, 64 << 10));
    server.hear(&script.0);
    let size = format!("{:?}", server.connection).len();
    assert!(size < 2000, "{size}");
    for (option, len) in [(option::GO, u32::MAX), (option::EXPORT_NAME, 4097)] {
        let mut server = Server::new();
        let mut script = Script::new();
        script.0.extend_from_slice(&wire::option_header(option, len));
        server.hear(&script.0);
        assert!(server.connection.complaint().is_some());
    }
    // Too long, and skipped: the connection goes on.
    let long = vec![0; (64 << 10) + 1];
    let script = Script::new().option(option::LIST, &long).option(option::ABORT, &[]);
    let server = after(&script.0);
    let mut heard = crate::side::Heard::new(&server);
    assert_eq!(heard.answer(option::LIST).0, wire::reply::ERR_TOO_BIG);
    assert_eq!(heard.answer(option::ABORT).0, wire::reply::ACK);
    // Many names in few bytes.
    let mut data = vec![0, 0, 0, 0];
    data.extend_from_slice(&u32::MAX.to_be_bytes());
    let begun = Script::new().option(option::STRUCTURED_REPLY, &[]);
    let server = after(&begun.option(option::SET_META_CONTEXT, &data).0);
    let mut heard = crate::side::Heard::new(&server);
    heard.answer(option::STRUCTURED_REPLY);
    assert_eq!(heard.answer(option::SET_META_CONTEXT).0, wire::reply::ERR_INVALID);
}

#[test]
fn replies_that_nobody_takes_stop_the_reading() {
    let mut server = Server::new();
    let mut script = Script::new();
    for _ in 0..100_000 {
        script = script.option(option::LIST, &[]);
    }
    let taken = server.connection.take(&script.0);
    assert_eq!(server.connection.want(), Want::Room);
    assert!(taken < script.0.len() / 10, "{taken}");
    // And so do refusals.
    let mut server = Server::new();
    let mut script = Script::new().go("a");
    for cookie in 0..100_000 {
        script = script.request((command::READ, 0), cookie, (u64::MAX, 1), &[]);
    }
    let taken = server.connection.take(&script.0);
    assert_eq!(server.connection.want(), Want::Room);
    assert!(taken < script.0.len() / 2, "{taken}");
    server.hear(&script.0[taken..]);
    assert_eq!(server.connection.want(), Want::Bytes, "and it goes on");
}
