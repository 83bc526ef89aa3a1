//! Where clients come from: Unix and TCP sockets.

use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net as unix;
use std::path::{Path, PathBuf};
use std::{fs, str};

use cowbell_nbd::encoded;
use listenfd::ListenFd;
use mio::event::Source;
use mio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use mio::{Interest, Registry, Token};
use rustix::net::sockopt::{set_socket_keepalive, set_socket_send_buffer_size};

use crate::fail::Fail;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket of this path.
    Unix(PathBuf),
    /// A TCP port: `HOST:PORT`.
    Tcp(String),
    /// Where the service manager listens already.
    Activation,
}

impl Address {
    /// `unix:PATH`, `tcp:HOST:PORT` or `systemd`.
    pub fn parse(text: &OsStr) -> Result<Address, Fail> {
        let bytes = text.as_bytes();
        if let Some(path) = bytes.strip_prefix(b"unix:").filter(|path| !path.is_empty()) {
            return Ok(Address::Unix(OsStr::from_bytes(path).into()));
        }
        let host = bytes.strip_prefix(b"tcp:").and_then(|host| str::from_utf8(host).ok());
        match host.filter(|host| host.contains(':')) {
            Some(host) => Ok(Address::Tcp(host.into())),
            None if bytes == b"systemd" => Ok(Address::Activation),
            None => Err(Fail::other(format!(
                "'{}' is no place to listen: unix:PATH, tcp:HOST:PORT or systemd",
                text.to_string_lossy()
            ))),
        }
    }
}

/// A socket that clients come to.
#[derive(Debug)]
pub struct Listener {
    socket: ListenerSocket,
    #[expect(dead_code, reason = "the path is removed in the end")]
    path: Option<SocketPath>,
    uri: String,
}

#[derive(Debug)]
enum ListenerSocket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Begins to listen.
    pub fn open(address: &Address) -> Result<Vec<Listener>, Fail> {
        match address {
            Address::Unix(path) => Listener::unix(path).map(|listener| vec![listener]),
            Address::Tcp(host) => {
                let bound = net::TcpListener::bind(host.as_str()).and_then(Listener::tcp);
                let listener = bound.map_err(|why| Fail::other(format!("tcp:{host}: {why}")))?;
                Ok(vec![listener])
            }
            Address::Activation => Listener::activated(),
        }
    }

    fn unix(path: &Path) -> Result<Listener, Fail> {
        let at = |why: io::Error| Fail::file(path, why);
        if let Ok(found) = fs::symlink_metadata(path) {
            if !found.file_type().is_socket() {
                return Err(Fail::file(path, "there is something that is no socket"));
            }
            match unix::UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                _ => return Err(Fail::file(path, "somebody listens there, or may")),
            }
            // Left behind by a server that was killed.
            fs::remove_file(path).map_err(at)?;
        }
        let socket = unix::UnixListener::bind(path).map_err(at)?;
        let bound = SocketPath::new(path).map_err(at)?;
        Listener::of_unix(socket, path, Some(bound)).map_err(at)
    }

    fn of_unix(
        socket: unix::UnixListener,
        path: &Path,
        bound: Option<SocketPath>,
    ) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        let uri = format!("nbd+unix:///{{}}?socket={}", encoded(path.as_os_str().as_bytes()));
        let socket = ListenerSocket::Unix(UnixListener::from_std(socket));
        Ok(Listener { socket, path: bound, uri })
    }

    fn tcp(socket: net::TcpListener) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        let uri = format!("nbd://{}/{{}}", socket.local_addr()?);
        let socket = ListenerSocket::Tcp(TcpListener::from_std(socket));
        Ok(Listener { socket, path: None, uri })
    }

    /// All sockets that the service manager has opened for us.
    fn activated() -> Result<Vec<Listener>, Fail> {
        let mut given = ListenFd::from_env();
        let mut listeners = Vec::new();
        for at in 0..given.len() {
            let no_socket = |why| Fail::other(format!("socket {at} of the service manager: {why}"));
            let unix = given.take_unix_listener(at).ok().flatten();
            listeners.push(match unix {
                Some(socket) => {
                    let address = socket.local_addr().map_err(no_socket)?;
                    let path = address.as_pathname().unwrap_or(Path::new("")).to_path_buf();
                    Listener::of_unix(socket, &path, None).map_err(no_socket)?
                }
                None => {
                    let socket = given.take_tcp_listener(at).map_err(no_socket)?;
                    let none = || no_socket(io::ErrorKind::NotFound.into());
                    Listener::tcp(socket.ok_or_else(none)?).map_err(no_socket)?
                }
            });
        }
        if listeners.is_empty() {
            return Err(Fail::other("the service manager has opened no socket for us"));
        }
        Ok(listeners)
    }

    /// What a client is told to connect to `name` here.
    pub fn uri(&self, name: &str) -> String {
        self.uri.replacen("{}", &encoded(name.as_bytes()), 1)
    }

    /// The next client; `WouldBlock`: none.
    pub fn accept(&self) -> io::Result<Stream> {
        Ok(match &self.socket {
            ListenerSocket::Unix(socket) => {
                let stream = socket.accept()?.0;
                // One batch of replies in one piece; less is given where less is allowed.
                let _ = set_socket_send_buffer_size(&stream, SEND_BUFFER);
                Stream::Unix(stream)
            }
            ListenerSocket::Tcp(socket) => {
                let stream = socket.accept()?.0;
                // Replies are sent whole as it is. And a peer that has vanished is found out.
                let _ = stream.set_nodelay(true);
                let _ = set_socket_keepalive(&stream, true);
                Stream::Tcp(stream)
            }
        })
    }

    /// Tells of clients under this token.
    pub fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        match &mut self.socket {
            ListenerSocket::Unix(socket) => socket.register(registry, token, Interest::READABLE),
            ListenerSocket::Tcp(socket) => socket.register(registry, token, Interest::READABLE),
        }
    }
}

const SEND_BUFFER: usize = 2 << 20;

/// The path of a socket, removed when this goes if it is that socket still.
#[derive(Debug)]
struct SocketPath {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketPath {
    fn new(path: &Path) -> io::Result<SocketPath> {
        let found = fs::symlink_metadata(path)?;
        // Whatever the current folder is then.
        let path = std::path::absolute(path)?;
        Ok(SocketPath { path, inode: (found.dev(), found.ino()) })
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        let found = fs::symlink_metadata(&self.path);
        if found.is_ok_and(|found| (found.dev(), found.ino()) == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A client's socket.
#[derive(Debug)]
pub enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

macro_rules! either {
    ($self:ident, $stream:ident => $do:expr) => {
        match $self {
            Stream::Unix($stream) => $do,
            Stream::Tcp($stream) => $do,
        }
    };
}

impl Stream {
    /// Tells under this token when there is something to read, or room to write.
    pub fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let both = Interest::READABLE | Interest::WRITABLE;
        either!(self, stream => stream.register(registry, token, both))
    }

    /// Reads into several slices.
    pub fn read(&mut self, to: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        either!(self, stream => stream.read_vectored(to))
    }

    /// Writes from several slices.
    pub fn write(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, stream => stream.write_vectored(from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood_or_refused() {
        let parse = |text: &str| Address::parse(OsStr::new(text)).ok();
        assert_eq!(parse("unix:/a b"), Some(Address::Unix("/a b".into())));
        assert_eq!(parse("tcp:[::1]:10809"), Some(Address::Tcp("[::1]:10809".into())));
        assert_eq!(parse("systemd"), Some(Address::Activation));
        for bad in ["", "unix:", "tcp:", "tcp:host", "/a", "udp:a:1"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
