//! A client's socket: what is between it and the [`Client`].
//!
//! It never blocks. Who may wait does so with [`Link::wait`]. It becomes readable in all cases that matter:
//! the server speaks first, and a connection that fails is readable too.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use cowbell_engine::sys::clock;
use cowbell_engine::units::Time;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags};
use rustix::net::{SocketType, sockopt};

use crate::address::Place;
use crate::client::{Client, Event};

/// A connection that lives, or is being made.
#[derive(Debug)]
pub(crate) struct Link {
    socket: OwnedFd,
    pub client: Client,
    /// What is to be sent next, of which so many bytes were.
    output: Vec<u8>,
    sent: usize,
    /// What was received; those from `at` to `end` were not looked at yet.
    input: Box<[u8]>,
    at: usize,
    end: usize,
}

/// Bytes that are received or sent by one call.
const BUFFER: usize = 256 << 10;

/// A resolved address.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    Tcp(SocketAddr),
    Unix(SocketAddrUnix),
}

impl Peer {
    /// All addresses of a server, at least one. Asks for a host's name, and waits for the answer.
    pub fn all(place: &Place) -> io::Result<Vec<Peer>> {
        match place {
            Place::Unix(path) => Ok(vec![Peer::Unix(SocketAddrUnix::new(path.as_path())?)]),
            Place::Tcp { host, port } => {
                let peers: Vec<Peer> =
                    (host.as_str(), *port).to_socket_addrs()?.map(Peer::Tcp).collect();
                if peers.is_empty() {
                    return Err(io::Error::new(io::ErrorKind::NotFound, "the host has no address"));
                }
                Ok(peers)
            }
        }
    }
}

impl Link {
    /// Begins to connect, as a client of `export`.
    pub fn begin(peer: &Peer, export: &str) -> io::Result<Link> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let family = match peer {
            Peer::Tcp(SocketAddr::V4(_)) => AddressFamily::INET,
            Peer::Tcp(SocketAddr::V6(_)) => AddressFamily::INET6,
            Peer::Unix(_) => AddressFamily::UNIX,
        };
        let socket = net::socket_with(family, SocketType::STREAM, flags, None)?;
        let begun = match peer {
            Peer::Tcp(address) => {
                sockopt::set_tcp_nodelay(&socket, true)?;
                // A server that is gone without a word is missed some time.
                sockopt::set_socket_keepalive(&socket, true)?;
                net::connect(&socket, address)
            }
            Peer::Unix(address) => net::connect(&socket, address),
        };
        match begun {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let (client, input) = (Client::new(export), vec![0; BUFFER].into());
        Ok(Link { socket, client, output: Vec::new(), sent: 0, input, at: 0, end: 0 })
    }

    /// Waits until the handshake is over.
    pub fn connect(peers: &[Peer], export: &str, until: Time) -> io::Result<Link> {
        let mut failed = None;
        for peer in peers {
            match Link::begin(peer, export).and_then(|link| link.connected(until)) {
                Ok(link) => return Ok(link),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
    }

    fn connected(mut self, until: Time) -> io::Result<Link> {
        loop {
            self.send(|_, _, _| {})?;
            match self.event()? {
                None => self.wait(Some(until))?,
                Some(Event::Ready) => return Ok(self),
                Some(_) => {}
            }
        }
    }

    /// Sends as much as the socket takes. `payload` is as for [`Client::output`].
    pub fn send(&mut self, mut payload: impl FnMut(u64, u64, &mut [u8])) -> io::Result<()> {
        loop {
            if self.sent == self.output.len() {
                self.output.clear();
                self.sent = 0;
                self.client.output(&mut self.output, BUFFER, &mut payload);
                if self.output.is_empty() {
                    return Ok(());
                }
            }
            match net::send(&self.socket, &self.output[self.sent..], SendFlags::NOSIGNAL) {
                Ok(count) => self.sent += count,
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Was the socket too full for all that is to be sent?
    pub fn is_sending(&self) -> bool {
        self.sent < self.output.len() || self.client.has_output()
    }

    /// The next thing that the server says; `None`: it has said nothing more so far.
    ///
    /// # Errors
    ///
    /// If the connection is over, for whatever reason.
    pub fn event(&mut self) -> io::Result<Option<Event>> {
        loop {
            let (taken, event) = self.client.take(&self.input[self.at..self.end]);
            self.at += taken;
            match event {
                Event::Nothing => {}
                Event::Over => {
                    let why = self.client.complaint().map(ToString::to_string).unwrap_or_default();
                    return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                }
                event => return Ok(Some(event)),
            }
            match net::recv(&self.socket, &mut *self.input, RecvFlags::empty()) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((count, _)) => (self.at, self.end) = (0, count),
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The bytes of an [`Event::Data`] that [`Link::event`] answered last.
    pub fn data(&self, len: usize) -> &[u8] {
        &self.input[self.at - len..self.at]
    }

    /// Waits until there is something to receive, or room for what is to be sent.
    ///
    /// # Errors
    ///
    /// If it is `until` before that.
    pub fn wait(&self, until: Option<Time>) -> io::Result<()> {
        let left = until.map(|until| Duration::from_nanos(until.since(clock())));
        let timeout = left.map(|left| Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        });
        let sends = if self.is_sending() { PollFlags::OUT } else { PollFlags::empty() };
        let mut polled = [PollFd::new(&self.socket, PollFlags::IN | sends)];
        match poll(&mut polled, timeout.as_ref()) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Link {
    /// Says good-bye if the server listens.
    fn drop(&mut self) {
        if self.client.in_flight() == 0 && !self.is_sending() {
            self.client.leave();
            let _ = self.send(|_, _, _| {});
        }
    }
}
