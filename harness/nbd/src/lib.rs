//! The NBD protocol: both sides of it without a socket, and a server's disk as a file of the engine.
//!
//! # A server's side
//!
//! A [`Connection`] is one client. Bytes from it go in, [`Request`]s come out; their results go in,
//! bytes for it come out. There is no socket in here, no clock and no thread: whoever has those
//! drives it, and a test or a simulator can copy it, hash it and cut its input anywhere.
//!
//! [`Connection::want`] says what comes next, and that is all there is to know:
//!
//! ```
//! use cowbell_engine::mem::Buf;
//! use cowbell_nbd::{Connection, Export, Limits, Want};
//!
//! let exports = [Export::new("disk", 1 << 20)].into();
//! let mut client = Connection::new(exports, Limits::default());
//! # let mut from_client: &[u8] = &[0, 0, 0, 3];
//! loop {
//!     match client.want() {
//!         Want::Bytes if from_client.is_empty() => break, // wait for the socket
//!         Want::Bytes => {
//!             let taken = client.take(from_client);
//!             from_client = &from_client[taken..];
//!         }
//!         Want::Memory(len) => client.give(Buf::zeroed(len)),
//!         Want::Submit => {
//!             let _request = client.next(); // to the disk; and later `client.finish(..)`
//!         }
//!         Want::Room => break, // until a request has finished, or bytes were sent
//!         Want::Nothing => break,
//!     }
//! }
//! // What is to be sent, in as many slices as there is room for.
//! let mut slices = [std::io::IoSlice::new(&[]); 8];
//! let count = client.output(&mut slices);
//! let sent = slices[..count].iter().map(|slice| slice.len()).sum();
//! client.sent(sent, drop);
//! ```
//!
//! Memory is not taken here either. The machine says how much a request needs after it has checked
//! the request, and gets it with [`Connection::give`]: who gives may let it wait.
//!
//! Done: fixed newstyle handshake, simple and structured replies, extended headers,
//! `base:allocation`. Not done: TLS, resizing, the payload of a status request.
//!
//! # A client's side
//!
//! A [`Client`] is a connection to a server, made the same way: the server's bytes go in, [`Event`]s come
//! out. Fixed newstyle handshake with GO, simple and structured replies, `base:allocation`; neither TLS nor
//! extended headers.
//!
//! What has sockets is built over it: [`RemoteFile`], a server's disk at rest, and [`Remote`], the backend
//! that has it in an engine. [`Address`] says where it is.

mod address;
mod client;
mod connection;
mod exports;
mod link;
mod options;
mod outbox;
mod remote;
mod remote_file;
mod requests;
mod slots;
pub mod wire;

pub use address::{Address, Place, encoded};
pub use client::{Client, Complaint, Event, ExportInfo};
pub use connection::{Connection, Limits, Want};
pub use exports::Export;
pub use remote::Remote;
pub use remote_file::{RemoteFile, RemoteOptions};
pub use requests::{Extent, Request, What};
