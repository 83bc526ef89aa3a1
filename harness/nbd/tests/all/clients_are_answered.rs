//! What the protocol says that is answered to what, message by message.

use cowbell_engine::mem::Buf;
use cowbell_nbd::wire::{chunk, command, error, flag, info, option, reply};
use cowbell_nbd::{Connection, Limits, Want};

use crate::side::{Heard, SIZE, Script, Server, exports};

const RW: u16 = 0b1101_0110_1101;
const RO: u16 = 0b0101_0000_1111;
const DF: u16 = 1 << 7;

fn after(script: &Script) -> Server {
    let mut server = Server::new();
    assert_eq!(server.hear(&script.0), 0, "all is taken");
    server
}

#[test]
fn exports_are_listed_and_described() {
    let script = Script::new()
        .option(option::LIST, &[])
        .option(option::LIST, &[0])
        .info(option::INFO, "b", &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 99])
        .info(option::INFO, "", &[info::NAME])
        .info(option::INFO, "c", &[])
        .option(option::INFO, &[0, 0, 0, 1])
        .option(option::STARTTLS, &[])
        .option(4711, &[1, 2, 3])
        .option(option::ABORT, &[]);
    let server = after(&script);
    let mut heard = Heard::new(&server);
    assert_eq!(heard.answer(option::LIST), (reply::SERVER, &[0, 0, 0, 1, b'a'][..]));
    assert_eq!(heard.answer(option::LIST), (reply::SERVER, &[0, 0, 0, 1, b'b'][..]));
    assert_eq!(heard.answer(option::LIST), (reply::ACK, &[][..]));
    assert_eq!(heard.answer(option::LIST), (reply::ERR_INVALID, &[][..]));
    let export = |flags: u16| [&[0, 0], &SIZE.to_be_bytes()[..], &flags.to_be_bytes()].concat();
    assert_eq!(heard.answer(option::INFO), (reply::INFO, &export(RO)[..]));
    assert_eq!(heard.answer(option::INFO), (reply::INFO, &[0, 1, b'b'][..]));
    assert_eq!(heard.answer(option::INFO), (reply::INFO, &b"\0\x02the other"[..]));
    let sizes = [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0];
    assert_eq!(heard.answer(option::INFO), (reply::INFO, &sizes[..]));
    assert_eq!(heard.answer(option::INFO), (reply::ACK, &[][..]));
    assert_eq!(heard.answer(option::INFO), (reply::INFO, &export(RW)[..]));
    assert_eq!(heard.answer(option::INFO), (reply::INFO, &[0, 1, b'a'][..]), "the first");
    assert_eq!(heard.answer(option::INFO), (reply::ACK, &[][..]));
    assert_eq!(heard.answer(option::INFO), (reply::ERR_UNKNOWN, &[][..]));
    assert_eq!(heard.answer(option::INFO), (reply::ERR_INVALID, &[][..]));
    assert_eq!(heard.answer(option::STARTTLS), (reply::ERR_UNSUP, &[][..]));
    assert_eq!(heard.answer(4711), (reply::ERR_UNSUP, &[][..]));
    assert_eq!(heard.answer(option::ABORT), (reply::ACK, &[][..]));
    assert!(heard.is_all() && server.connection.is_over() && !server.connection.is_serving());
}

#[test]
fn the_option_of_the_first_days_has_no_answer_but_the_export() {
    for (flags, zeros) in [(3, 0), (1, 124), (2, 0), (0, 124)] {
        let server = after(&Script::with_flags(flags).option(option::EXPORT_NAME, b"a"));
        let mut heard = Heard::new(&server);
        assert_eq!((heard.u64(), heard.u16()), (SIZE, RW));
        assert_eq!(heard.take(zeros), vec![0; zeros]);
        assert!(heard.is_all() && server.connection.is_serving());
    }
    let mut server = Server::new();
    server.hear(&Script::new().option(option::EXPORT_NAME, b"c").0);
    assert!(server.connection.is_over(), "there is no other way to say no");
    let mut server = Server::new();
    server.hear(&Script::with_flags(0).option(option::LIST, &[]).0);
    assert!(server.connection.is_over(), "it would not understand an answer");
    let mut server = Server::new();
    server.hear(&Script::with_flags(4).0);
    assert_eq!(server.connection.complaint(), Some("unknown flags"));
}

#[test]
fn contexts_are_listed_and_set() {
    let (list, set) = (option::LIST_META_CONTEXT, option::SET_META_CONTEXT);
    let script = Script::new()
        .contexts(set, "a", &["base:allocation"])
        .option(option::STRUCTURED_REPLY, &[])
        .contexts(list, "a", &[])
        .contexts(list, "a", &["base:"])
        .contexts(list, "a", &["other:", "base:allocatio"])
        .contexts(list, "c", &[])
        .contexts(set, "a", &["base:"])
        .contexts(set, "a", &["x", "base:allocation", "base:allocation"])
        .option(set, &[0, 0, 0, 1, b'a', 0, 0, 0, 2, 0, 0, 0, 0])
        .option(set, &[0xff; 8]);
    let server = after(&script);
    let mut heard = Heard::new(&server);
    let there = |id| [&[0, 0, 0, id], &b"base:allocation"[..]].concat();
    assert_eq!(heard.answer(set).0, reply::ERR_INVALID, "not without structured replies");
    assert_eq!(heard.answer(option::STRUCTURED_REPLY).0, reply::ACK);
    for _ in 0..2 {
        assert_eq!(heard.answer(list), (reply::META_CONTEXT, &there(0)[..]));
        assert_eq!(heard.answer(list).0, reply::ACK);
    }
    assert_eq!(heard.answer(list).0, reply::ACK);
    assert_eq!(heard.answer(list).0, reply::ERR_UNKNOWN);
    assert_eq!(heard.answer(set).0, reply::ACK, "none is set by a wildcard");
    assert_eq!(heard.answer(set), (reply::META_CONTEXT, &there(1)[..]));
    assert_eq!(heard.answer(set).0, reply::ACK);
    assert_eq!(heard.answer(set).0, reply::ERR_INVALID);
    assert_eq!(heard.answer(set).0, reply::ERR_INVALID);
    assert!(heard.is_all());
    // What went wrong last has unset what was set, and another export's is not this one's.
    let status = |script: Script| {
        let script = script.go("a").request((command::BLOCK_STATUS, 0), 1, (0, 4096), &[]);
        let server = after(&script);
        server.requests
    };
    let begun = || Script::new().option(option::STRUCTURED_REPLY, &[]);
    assert_eq!(status(begun().contexts(set, "a", &["base:allocation"])), 1);
    assert_eq!(status(begun().contexts(set, "", &["base:allocation"])), 1, "the same export");
    assert_eq!(status(begun().contexts(set, "b", &["base:allocation"])), 0);
    assert_eq!(status(script), 0);
}

#[test]
fn requests_are_done_and_answered() {
    let data = [7; 5000];
    let script = Script::new()
        .go("a")
        .request((command::WRITE, flag::FUA), 1, (100, 5000), &data)
        .request((command::READ, 0), 2, (99, 3), &[])
        .request((command::WRITE_ZEROES, flag::NO_HOLE), 3, (100, 1), &[])
        .request((command::WRITE_ZEROES, flag::FAST_ZERO), 4, (100, 1), &[])
        .request((command::TRIM, flag::FUA), 5, (101, 1), &[])
        .request((command::FLUSH, 0), 6, (0, 0), &[])
        .request((command::CACHE, 0), 7, (0, 4096), &[])
        .request((command::READ, 0), 8, (100, 3), &[])
        .request((command::READ, 0), 9, (SIZE, 0), &[])
        .request((command::WRITE, 0), 10, (5, 0), &[])
        .request((command::DISC, 0), 11, (0, 0), &[]);
    let server = after(&script);
    let mut heard = Heard::new(&server);
    while heard.answer(option::GO).0 != reply::ACK {}
    assert_eq!(heard.simple(), (0, 1));
    assert_eq!((heard.simple(), heard.take(3)), ((0, 2), &[0, 7, 7][..]));
    assert_eq!(heard.simple(), (0, 3));
    assert_eq!(heard.simple(), (error::NOTSUP, 4));
    for cookie in 5..8 {
        assert_eq!(heard.simple(), (0, cookie));
    }
    assert_eq!((heard.simple(), heard.take(3)), ((0, 8), &[0, 0, 7][..]));
    assert_eq!((heard.simple(), heard.simple()), ((0, 9), (0, 10)));
    assert!(heard.is_all() && server.connection.is_over());
    assert_eq!(server.connection.held(), 0);
}

#[test]
fn structured_replies_have_chunks() {
    let script = Script::new()
        .option(option::STRUCTURED_REPLY, &[])
        .contexts(option::SET_META_CONTEXT, "a", &["base:allocation"])
        .go("a")
        .request((command::WRITE, 0), 1, (4096, 4), &[1, 2, 3, 4])
        .request((command::READ, flag::DF), 2, (4097, 2), &[])
        .request((command::READ, 0), 3, (SIZE, 1), &[])
        .request((command::BLOCK_STATUS, 0), 4, (0, 16384), &[])
        .request((command::BLOCK_STATUS, flag::REQ_ONE), 5, (4096, 8192), &[])
        .request((command::READ, flag::DF), 6, (0, u32::MAX.into()), &[])
        .request((command::BLOCK_STATUS, 0), 7, (0, 0), &[]);
    let server = after(&script);
    let mut heard = Heard::new(&server);
    heard.answer(option::STRUCTURED_REPLY);
    while heard.answer(option::SET_META_CONTEXT).0 != reply::ACK {}
    let export = [&[0, 0], &SIZE.to_be_bytes()[..], &(RW | DF).to_be_bytes()].concat();
    assert_eq!(heard.answer(option::GO), (reply::INFO, &export[..]));
    assert_eq!(heard.answer(option::GO).0, reply::ACK);
    assert_eq!(heard.chunk(), (chunk::NONE, 1, &[][..]));
    assert_eq!(heard.chunk(), (chunk::OFFSET_DATA, 2, &[0, 0, 0, 0, 0, 0, 16, 1, 2, 3][..]));
    let failed = |error: u32| [&error.to_be_bytes()[..], &[0, 0]].concat();
    assert_eq!(heard.chunk(), (chunk::ERROR, 3, &failed(error::INVAL)[..]));
    let words = |words: &[u32]| words.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<u8>>();
    let three = words(&[1, 4096, 3, 4096, 0, 8192, 3]);
    assert_eq!(heard.chunk(), (chunk::BLOCK_STATUS, 4, &three[..]));
    assert_eq!(heard.chunk(), (chunk::BLOCK_STATUS, 5, &words(&[1, 4096, 0])[..]));
    assert_eq!(heard.chunk(), (chunk::ERROR, 6, &failed(error::OVERFLOW)[..]));
    assert_eq!(heard.chunk(), (chunk::ERROR, 7, &failed(error::INVAL)[..]));
    assert!(heard.is_all());
}

#[test]
fn extended_headers_have_long_lengths() {
    let script = Script::new()
        .option(option::EXTENDED_HEADERS, &[])
        .option(option::STRUCTURED_REPLY, &[])
        .option(option::EXTENDED_HEADERS, &[0])
        .contexts(option::SET_META_CONTEXT, "a", &["base:allocation"])
        .go("a")
        .extended((command::WRITE, flag::PAYLOAD_LEN), 1, (4096, 2), &[1, 2])
        .extended((command::READ, 0), 2, (4096, 2), &[])
        .extended((command::BLOCK_STATUS, 0), 3, (0, SIZE), &[])
        .extended((command::WRITE_ZEROES, 0), 4, (0, 1 << 40), &[])
        .extended((command::BLOCK_STATUS, flag::PAYLOAD_LEN), 5, (0, 3), &[9, 9, 9])
        .extended((command::FLUSH, flag::PAYLOAD_LEN), 6, (0, 2), &[9, 9])
        .extended((command::TRIM, 0), 7, (0, SIZE), &[]);
    let server = after(&script);
    let mut heard = Heard::new(&server);
    assert_eq!(heard.answer(option::EXTENDED_HEADERS).0, reply::ACK);
    assert_eq!(heard.answer(option::STRUCTURED_REPLY).0, reply::ERR_EXT_HEADER_REQD);
    assert_eq!(heard.answer(option::EXTENDED_HEADERS).0, reply::ERR_INVALID);
    while heard.answer(option::SET_META_CONTEXT).0 != reply::ACK {}
    while heard.answer(option::GO).0 != reply::ACK {}
    assert_eq!(heard.extended(), (chunk::NONE, 1, 4096, &[][..]));
    let data = [0, 0, 0, 0, 0, 0, 16, 0, 1, 2];
    assert_eq!(heard.extended(), (chunk::OFFSET_DATA, 2, 4096, &data[..]));
    let mut status = [0, 0, 0, 1, 0, 0, 0, 3].to_vec();
    for (len, flags) in [(4096, 3), (4096, 0), (SIZE - 8192, 3)] {
        status.extend_from_slice(&u64::to_be_bytes(len));
        status.extend_from_slice(&u64::to_be_bytes(flags));
    }
    assert_eq!(heard.extended(), (chunk::BLOCK_STATUS_EXT, 3, 0, &status[..]));
    let failed = |error: u32| [&error.to_be_bytes()[..], &[0, 0]].concat();
    assert_eq!(heard.extended(), (chunk::ERROR, 4, 0, &failed(error::NOSPC)[..]));
    assert_eq!(heard.extended(), (chunk::ERROR, 5, 0, &failed(error::INVAL)[..]));
    assert_eq!(heard.extended(), (chunk::ERROR, 6, 0, &failed(error::INVAL)[..]));
    assert_eq!(heard.extended(), (chunk::NONE, 7, 0, &[][..]));
    assert!(heard.is_all());
}

#[test]
fn what_cannot_be_is_refused_and_its_payload_skipped() {
    let too_long = (32 << 20) + 1;
    let payload = vec![1; too_long as usize];
    for (export, (command, flags), range, payload, expected) in [
        ("a", (command::READ, 0), (SIZE - 1, 2), &[][..], error::INVAL),
        ("a", (command::READ, 0), (u64::MAX, 2), &[], error::INVAL),
        ("a", (command::READ, flag::DF), (0, 2), &[], error::INVAL),
        ("a", (command::READ, 1 << 15), (0, 2), &[], error::INVAL),
        ("a", (command::READ, 0), (0, too_long), &[], error::INVAL),
        ("a", (command::WRITE, 0), (SIZE - 1, 2), &[1, 2], error::NOSPC),
        ("a", (command::WRITE, 0), (0, too_long), &payload, error::INVAL),
        ("a", (command::WRITE, flag::NO_HOLE), (0, 2), &[1, 2], error::INVAL),
        ("a", (command::WRITE_ZEROES, 0), (SIZE, 1), &[], error::NOSPC),
        ("a", (command::TRIM, 0), (SIZE, 1), &[], error::INVAL),
        ("a", (command::CACHE, 0), (SIZE, 1), &[], error::INVAL),
        ("a", (command::BLOCK_STATUS, 0), (0, 1), &[], error::INVAL),
        ("a", (8, 0), (0, 1), &[], error::INVAL),
        ("b", (command::WRITE, 0), (0, 2), &[1, 2], error::PERM),
        ("b", (command::WRITE_ZEROES, 0), (0, 2), &[], error::PERM),
        ("b", (command::TRIM, 0), (0, 2), &[], error::PERM),
    ] {
        let script = Script::new().go(export).request((command, flags), 1, range, payload).request(
            (command::READ, 0),
            2,
            (0, 1),
            &[],
        );
        let server = after(&script);
        let mut heard = Heard::new(&server);
        while heard.answer(option::GO).0 != reply::ACK {}
        assert_eq!(heard.simple(), (expected, 1), "{command} {range:?}");
        assert_eq!((heard.simple(), heard.take(1)), ((0, 2), &[0][..]), "it goes on");
        assert!(heard.is_all() && server.requests == 1 && server.held_max <= 4096);
    }
}

#[test]
fn a_server_that_goes_answers_what_it_has() {
    let write = Script::new().go("a").request((command::WRITE, 0), 5, (0, 4), &[1, 2]);
    let mut server = Server::new();
    server.hear(&write.0);
    let ends = |mut server: Server, expected: Option<u64>| {
        let mut back = 0;
        server.connection.end(|buf| back += buf.len());
        server.send(usize::MAX);
        assert_eq!(server.connection.held(), 0);
        assert!(server.connection.is_over());
        let mut heard = Heard::new(&server);
        while heard.answer(option::GO).0 != reply::ACK {}
        let refused = expected.map(|_| heard.simple());
        assert_eq!(refused, expected.map(|cookie| (error::SHUTDOWN, cookie)));
        assert!(heard.is_all());
        back
    };
    assert_eq!(ends(server, Some(5)), 4, "half of a request");
    let mut server = Server::new();
    server.hear(&Script::new().go("a").0);
    assert_eq!(ends(server, None), 0, "none");

    // What is in flight is answered, then it is over.
    let mut connection = Connection::new(exports(), Limits::default());
    let script = Script::new().go("a").request((command::FLUSH, 0), 6, (0, 0), &[]);
    assert_eq!(connection.take(&script.0), script.0.len());
    let request = connection.next().expect("the flush");
    connection.end(drop);
    assert_eq!((connection.want(), connection.is_over()), (Want::Nothing, false));
    connection.finish(request.slot, Ok(()), None);
    connection.sent(wire_len(&connection), drop);
    assert!(connection.is_over());
}

fn wire_len(connection: &Connection) -> usize {
    let mut slices = [std::io::IoSlice::new(&[]); 8];
    let count = connection.output(&mut slices);
    slices[..count].iter().map(|slice| slice.len()).sum()
}

#[test]
fn a_client_has_no_more_than_it_may() {
    let limits = Limits { requests: 2, bytes: 8192 };
    let mut connection = Connection::new(exports(), limits);
    let read =
        |script: Script, cookie, len| script.request((command::READ, 0), cookie, (0, len), &[]);
    let mut script = Script::new().go("a");
    for cookie in 0..4 {
        script = read(script, cookie, 3000);
    }
    script = read(script, 4, 100_000);
    let mut bytes = &script.0[..];
    let mut take = |connection: &mut Connection| {
        let taken = connection.take(bytes);
        bytes = &bytes[taken..];
        connection.want()
    };
    let mut slots = Vec::new();
    for _ in 0..2 {
        assert_eq!(take(&mut connection), Want::Memory(3000));
        connection.give(Buf::zeroed(3000));
        slots.push(connection.next().expect("it is ready"));
    }
    assert_eq!(take(&mut connection), Want::Room, "6000 bytes, and 3000 more");
    let first = slots.remove(0);
    assert!(connection.finish(first.slot, Ok(()), first.mem).is_none());
    assert_eq!(connection.want(), Want::Room, "it was not sent");
    connection.sent(wire_len(&connection), drop);
    assert_eq!(connection.held(), 3000);
    assert_eq!(connection.want(), Want::Memory(3000));
    connection.give(Buf::zeroed(3000));
    slots.push(connection.next().expect("it is ready"));
    assert_eq!((connection.in_flight(), take(&mut connection)), (2, Want::Room));
    for request in slots.drain(..) {
        let back = connection.finish(request.slot, Err(error::IO), request.mem);
        assert_eq!(back.map(|buf| buf.len()), Some(3000), "it comes back at once");
    }
    assert_eq!(take(&mut connection), Want::Memory(3000));
    connection.give(Buf::zeroed(3000));
    let last = connection.next().expect("it is ready");
    assert_eq!(take(&mut connection), Want::Room);
    assert!(connection.finish(last.slot, Ok(()), last.mem).is_none());
    connection.sent(wire_len(&connection), drop);
    assert_eq!(connection.want(), Want::Memory(100_000), "one may be larger, alone");
}
