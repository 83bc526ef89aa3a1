//! Servers that can do little, or go: what they are asked instead.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use cowbell_engine::mem::Buf;
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::units::Errno;
use cowbell_nbd::wire::{self, command, error, export, info, option, reply};
use cowbell_nbd::{Address, Place};

use crate::connections_are_made_again::Host;

const SIZE: u64 = 1 << 40;

/// A request as a server sees it: what, where, how long.
type Seen = (u16, u64, u64);

/// Serves one client after the other with simple replies, until one says nothing; `answers` says with which
/// error each request is answered. Forgets what is written.
fn serve(listener: &UnixListener, flags: u16, seen: &Sender<Seen>, answers: &[(Seen, u32)]) {
    let mut answers = answers.to_vec();
    while let Ok((socket, _)) = listener.accept()
        && one_client(socket, flags, seen, &mut answers).is_some()
    {}
}

fn take<const N: usize>(socket: &mut UnixStream) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

/// `None`: the client has not even begun.
fn one_client(
    mut socket: UnixStream,
    flags: u16,
    seen: &Sender<Seen>,
    answers: &mut Vec<(Seen, u32)>,
) -> Option<()> {
    socket.write_all(&wire::greeting(3)).ok()?;
    take::<4>(&mut socket)?;
    let _ = talk(&mut socket, flags, seen, answers);
    Some(())
}

/// Until the client goes.
fn talk(
    socket: &mut UnixStream,
    flags: u16,
    seen: &Sender<Seen>,
    answers: &mut Vec<(Seen, u32)>,
) -> Option<()> {
    loop {
        let (option, len) = wire::option_of(&take(socket)?)?;
        let mut data = vec![0; len as usize];
        socket.read_exact(&mut data).ok()?;
        if option == option::GO {
            let told = [&info::EXPORT.to_be_bytes()[..], &SIZE.to_be_bytes(), &flags.to_be_bytes()];
            socket.write_all(&wire::option_reply(option, reply::INFO, 12)).ok()?;
            socket.write_all(&told.concat()).ok()?;
            socket.write_all(&wire::option_reply(option, reply::ACK, 0)).ok()?;
            break;
        }
        socket.write_all(&wire::option_reply(option, reply::ERR_UNSUP, 0)).ok()?;
    }
    loop {
        let header = wire::Header::from_bytes(&take(socket)?)?;
        if header.command == command::DISC {
            return Some(());
        }
        let request = (header.command, header.offset, header.len);
        let mut data =
            vec![0; if header.command == command::WRITE { header.len as usize } else { 0 }];
        socket.read_exact(&mut data).ok()?;
        seen.send(request).ok()?;
        let at = answers.iter().position(|answer| answer.0 == request);
        let error = at.map_or(0, |at| answers.remove(at).1);
        socket.write_all(&wire::simple_reply(error, header.cookie)).ok()?;
        if header.command == command::READ && error == 0 {
            socket.write_all(&vec![7; header.len as usize]).ok()?;
        }
    }
}

/// What becomes of requests to such a server, and what it has seen.
fn asked(
    flags: u16,
    answers: &[(Seen, u32)],
    requests: &[Io],
) -> (Vec<Result<(), Errno>>, Vec<Seen>) {
    let dir = tempfile::tempdir().expect("a directory for a socket");
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    let (sender, receiver): (_, Receiver<Seen>) = channel();
    let answers = answers.to_vec();
    let server =
        std::thread::spawn(move || serve(&listener, export::HAS_FLAGS | flags, &sender, &answers));
    let address = Address { place: Place::Unix(path.clone()), export: String::new() };
    let mut host = Host::new(address, Duration::from_secs(20));
    let mut results = Vec::new();
    for (tag, &io) in requests.iter().enumerate() {
        let has_memory = matches!(io.kind, IoKind::Read | IoKind::Write { .. });
        let mem = Buf::zeroed(if has_memory { io.len as usize } else { 0 });
        assert!(host.engine.submit(host.node, io, mem, tag as u64).is_ok());
        let mut done = Vec::new();
        while done.is_empty() {
            host.turn(&mut done);
        }
        results.push(done[0].1);
    }
    drop(host);
    drop(UnixStream::connect(&path).expect("it listens still"));
    server.join().expect("no panic");
    (results, receiver.into_iter().collect())
}

#[test]
fn a_stable_write_is_a_write_and_a_flush_where_nothing_else_is_known() {
    let stable = Io::write(4096, 512).stable();
    let write = (command::WRITE, 4096, 512);
    let flush = (command::FLUSH, 0, 0);
    let can = export::SEND_FLUSH | export::SEND_FUA;
    assert_eq!(asked(can, &[], &[stable]), (vec![Ok(())], vec![write]));
    assert_eq!(asked(export::SEND_FLUSH, &[], &[stable]), (vec![Ok(())], vec![write, flush]));
    // It fails if either fails.
    let io = Err(Errno::IO);
    let (results, seen) = asked(export::SEND_FLUSH, &[(flush, error::IO)], &[stable]);
    assert_eq!((results, seen), (vec![io], vec![write, flush]));
    let (results, seen) = asked(export::SEND_FLUSH, &[(write, error::IO)], &[stable]);
    assert_eq!((results, seen), (vec![io], vec![write]));
    // A server without a cache.
    assert_eq!(asked(0, &[], &[stable, Io::flush()]), (vec![Ok(()), Ok(())], vec![write]));
}

#[test]
fn long_zeros_are_asked_for_in_parts() {
    const PART: u64 = wire::PAYLOAD_MAX;
    let zero = |offset, len| (command::WRITE_ZEROES, offset, len);
    let asks = Io::zero(512, 2 * PART + 512, true);
    let (results, seen) = asked(export::SEND_WRITE_ZEROES, &[], &[asks]);
    let parts = [zero(512, PART), zero(512 + PART, PART), zero(512 + 2 * PART, 512)];
    assert_eq!((results, seen), (vec![Ok(())], parts.to_vec()));
    // The first that fails is the last.
    let fails = [(parts[1], error::NOSPC)];
    let (results, seen) = asked(export::SEND_WRITE_ZEROES, &fails, &[asks]);
    assert_eq!((results, seen), (vec![Err(Errno::NO_SPACE)], parts[..2].to_vec()));
    // Where there is no such request, zeros are written.
    let (results, seen) = asked(0, &[], &[asks]);
    assert_eq!(results, [Ok(())]);
    assert!(seen.iter().all(|request| request.0 == command::WRITE));
    assert_eq!(seen.iter().map(|request| request.2).sum::<u64>(), asks.len);
}

#[test]
fn a_disk_that_may_not_be_written_is_not() {
    let flags = export::READ_ONLY | export::SEND_FLUSH | export::SEND_WRITE_ZEROES;
    let requests = [Io::write(0, 512), Io::zero(0, 512, true), Io::flush(), Io::read(0, 512)];
    let (results, seen) = asked(flags, &[], &requests);
    let refused = Err(Errno::READ_ONLY);
    assert_eq!(results, [refused, refused, Ok(()), Ok(())]);
    assert_eq!(seen, [(command::READ, 0, 512)]);
}

#[test]
fn a_server_that_goes_is_asked_again_when_it_is_back() {
    let write = (command::WRITE, 0, 512);
    let goes = [(write, error::SHUTDOWN), (write, error::SHUTDOWN)];
    let (results, seen) = asked(0, &goes, &[Io::write(0, 512), Io::read(512, 512)]);
    assert_eq!(results, [Ok(()), Ok(())]);
    assert_eq!(seen, [write, write, write, (command::READ, 512, 512)]);
}
