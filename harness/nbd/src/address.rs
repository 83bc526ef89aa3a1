//! Where a server's disk is, as people write it.
//!
//! | | |
//! |---|---|
//! | `nbd://HOST[:PORT]/EXPORT` | over TCP |
//! | `nbd+unix:///EXPORT?socket=PATH` | over a Unix socket |
//! | `nbd:HOST:PORT[:exportname=EXPORT]` | the old way to say the same |
//! | `nbd:unix:PATH[:exportname=EXPORT]` | |
//!
//! In the first two, `%20` is a space, and so on for any byte.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use crate::wire::STRING_MAX;

/// A server, and one of its exports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// The server.
    pub place: Place,
    /// The export's name. The empty one is the server's default.
    pub export: String,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "says it all")]
pub enum Place {
    /// A host's name or address, and a port.
    Tcp { host: String, port: u16 },
    /// A socket in the file system.
    Unix(PathBuf),
}

/// The port that is registered for NBD.
const PORT: u16 = 10809;

impl Address {
    /// Is that an address, rather than a file's name? It may be one that makes no sense.
    pub fn is_one(text: &str) -> bool {
        ["nbd:", "nbd+", "nbds:", "nbds+"].iter().any(|scheme| text.starts_with(scheme))
    }
}

impl FromStr for Address {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Address> {
        let address = if let Some(rest) = text.strip_prefix("nbd://") {
            of_tcp_uri(rest)
        } else if let Some(rest) = text.strip_prefix("nbd+unix://") {
            of_unix_uri(rest)
        } else if let Some(rest) = text.strip_prefix("nbd:") {
            of_old(rest)
        } else if text.starts_with("nbds") {
            Err("TLS is not supported")
        } else {
            Err("not one of nbd://HOST:PORT/EXPORT and nbd+unix:///EXPORT?socket=PATH")
        };
        let too_long = |address: &Address| address.export.len() > STRING_MAX;
        match address {
            Ok(address) if too_long(&address) => Err("the export's name is too long"),
            address => address,
        }
        .map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, format!("{text}: {why}")))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = encoded(self.export.as_bytes());
        match &self.place {
            Place::Tcp { host, port } => {
                let text = encoded(host.as_bytes()).replace('/', "%2F");
                match host.contains(':') {
                    true => write!(f, "nbd://[{}]:{port}/{export}", text.replace("%3A", ":")),
                    false => write!(f, "nbd://{text}:{port}/{export}"),
                }
            }
            Place::Unix(path) => {
                let path = encoded(path.as_os_str().as_encoded_bytes());
                write!(f, "nbd+unix:///{export}?socket={path}")
            }
        }
    }
}

fn of_tcp_uri(rest: &str) -> Result<Address, &'static str> {
    let (server, export) = rest.split_once('/').unwrap_or((rest, ""));
    if export.contains(['?', '#']) || server.contains('@') {
        return Err("a user or a query makes no sense here");
    }
    let (host, port) = host_and_port(server)?;
    let port = port.map_or(Ok(PORT), |port| port.parse().map_err(|_| "a port is a number"))?;
    Ok(Address { place: Place::Tcp { host: decoded(host)?, port }, export: decoded(export)? })
}

/// An address of version 6 is in brackets.
fn host_and_port(server: &str) -> Result<(&str, Option<&str>), &'static str> {
    let (host, port) = match server.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, rest)) => (host, Some(rest.strip_prefix(':').ok_or("nonsense after ]")?)),
        None => server.split_once(':').map_or((server, None), |(host, port)| (host, Some(port))),
    };
    if host.is_empty() { Err("no host") } else { Ok((host, port)) }
}

fn of_unix_uri(rest: &str) -> Result<Address, &'static str> {
    let export = rest.strip_prefix('/').ok_or("a Unix socket has no host: three slashes")?;
    let (export, query) = export.split_once('?').ok_or("no ?socket=PATH")?;
    let path = query.strip_prefix("socket=").filter(|path| !path.contains('&'));
    of_unix(&decoded(path.ok_or("?socket=PATH and nothing else")?)?, decoded(export)?)
}

fn of_old(rest: &str) -> Result<Address, &'static str> {
    let (server, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    if let Some(path) = server.strip_prefix("unix:") {
        return of_unix(path, export.into());
    }
    let (host, port) = host_and_port(server)?;
    let port = port.and_then(|port| port.parse().ok()).ok_or("no port")?;
    Ok(Address { place: Place::Tcp { host: host.into(), port }, export: export.into() })
}

fn of_unix(path: &str, export: String) -> Result<Address, &'static str> {
    if path.is_empty() || path.contains('\0') {
        return Err("no path of a socket");
    }
    Ok(Address { place: Place::Unix(path.into()), export })
}

/// `%41` is an A.
fn decoded(text: &str) -> Result<String, &'static str> {
    let mut pieces = text.split('%');
    let mut bytes = pieces.next().unwrap_or("").as_bytes().to_vec();
    for piece in pieces {
        let digits = piece.get(..2).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.ok_or("% without two digits")?);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).map_err(|_| "not UTF-8")
}

/// As a part of an address: any byte that is more than a letter, a digit or harmless is `%` and two digits.
pub fn encoded(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => {
                text.push(byte.into());
            }
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_again() {
        let tcp = |host: &str, port, export: &str| {
            (Place::Tcp { host: host.into(), port }, export.to_owned())
        };
        let unix = |path: &str, export: &str| (Place::Unix(path.into()), export.to_owned());
        for (text, (place, export)) in [
            ("nbd://host", tcp("host", 10809, "")),
            ("nbd://host/", tcp("host", 10809, "")),
            ("nbd://host:5/a%20b/c", tcp("host", 5, "a b/c")),
            ("nbd://[::1]:7/x", tcp("::1", 7, "x")),
            ("nbd://[::1]/x", tcp("::1", 10809, "x")),
            ("nbd://a%2Fb%3Ac%40d/x", tcp("a/b:c@d", 10809, "x")),
            ("nbd://a%20b:8/", tcp("a b", 8, "")),
            ("nbd+unix:///?socket=/tmp/s", unix("/tmp/s", "")),
            ("nbd+unix:///d%C3%A9?socket=a%3f", unix("a?", "dé")),
            ("nbd:unix:/tmp/a:b", unix("/tmp/a:b", "")),
            ("nbd:unix:/tmp/a:exportname=%41:x", unix("/tmp/a", "%41:x")),
            ("nbd:host:10:exportname=x", tcp("host", 10, "x")),
            ("nbd:1.2.3.4:10", tcp("1.2.3.4", 10, "")),
        ] {
            let address: Address = text.parse().expect(text);
            assert_eq!((&address.place, &address.export), (&place, &export), "{text}");
            assert_eq!(address.to_string().parse::<Address>().expect("its own words"), address);
            assert!(Address::is_one(text));
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in [
            "",
            "nbd",
            "nbd:",
            "nbd://",
            "nbd:///x",
            "nbd://host:",
            "nbd://host:x/",
            "nbd://host:65536/",
            "nbd://user@host/",
            "nbd://host/x?tls=on",
            "nbds://host/",
            "nbds+unix:///?socket=x",
            "nbd://[::1/",
            "nbd://[::1]7/",
            "nbd+unix://host/?socket=x",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbd+unix:///x?socket=a&b=c",
            "nbd+unix:///x?socket=%00",
            "nbd:unix:",
            "nbd:host",
            "nbd:host:x",
            "nbd://h/%4",
            "nbd://h/%é9",
            "nbd://h/%+4",
            "nbd://h/%ff",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
        let long = format!("nbd://host/{}", "x".repeat(4097));
        assert!(long.parse::<Address>().is_err());
    }
}
