//! Disk image formats.
//!
//! Two halves. The *online* half are the drivers: state machines on the engine of
//! `cowbell-engine`, which serve requests. The *offline* half is everything that may wait: telling
//! formats apart ([`probe`]), opening an image and its backing files ([`chain`]), making one
//! ([`mod@create`]), saying how large it will be ([`mod@measure`]), checking and repairing it
//! ([`mod@check`]), saying what is where in it ([`map`]) and what it is ([`info`]). It sees files through the blocking `Store` and a [`chain::Host`], so
//! that it runs on the real disk ([`disk_host`]) and on a simulated one.
//!
//! Opening is done before the loop, since it may wait; then [`attach`] hands the image to an engine:
//!
//! ```
//! use cowbell_engine::event_loop::EventLoop;
//! use cowbell_engine::mem::Buf;
//! use cowbell_engine::step::Io;
//! use cowbell_engine::sys::aio::{Aio, AioOptions};
//! use cowbell_engine::sys::clock;
//! use cowbell_engine::{Engine, Limits};
//! use cowbell_formats::*;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("disk.qed");
//! let size = CreateOptions { size: Some(1 << 30), ..CreateOptions::default() };
//! create(&DiskHost::default(), &path, Format::Qed, &size)?;
//!
//! // Native AIO wants `direct: true`; without, the same backend uses its threads.
//! let host = DiskHost { direct: false };
//! let options = OpenOptions { format: Some(Format::Qed), write: true, ..OpenOptions::default() };
//! let image = open(&host, &path, &options)?;
//! let mut engine = Engine::new(Aio::new(AioOptions::default())?, Limits::default());
//! let disk = attach(&mut engine, image, &RunOptions::default())?;
//!
//! let mut events = EventLoop::new(engine.fd())?;
//! engine.submit(disk, Io::write(12_345, 5), Buf::copied(b"hello"), 1).expect("there is room");
//! engine.drain();
//! while engine.drained().is_none() {
//!     // After any submission, readiness or deadline: run, then drain `poll`.
//!     let progress = engine.run(clock());
//!     while let Some(done) = engine.poll() {
//!         done.result?;
//!     }
//!     if !progress.again && engine.drained().is_none() {
//!         events.wait(engine.next_deadline(), clock())?;
//!     }
//! }
//! # engine.drained().expect("it is")?;
//! # Ok(())
//! # }
//! ```
//!
//! The whole loop, with a queue that the engine may refuse, is in the documentation of
//! [`cowbell_engine`]; around a plain epoll and around mio it is in this crate's `examples`.
//!
//! The rule for both: an image is untrusted. No byte of it leads to a panic, to memory without a
//! bound, to a file that the caller's policy does not allow, or to a loop without an end.

pub mod chain;
pub mod check;
pub mod create;
pub mod disk_host;
pub mod error;
pub mod format;
pub mod given;
pub mod info;
pub mod locks;
pub mod map;
pub mod measure;
pub mod name;
pub mod node;
pub mod partial;
pub mod parts;
pub mod preallocation;
pub mod probe;
pub mod qcow2;
pub mod qed;
pub mod raw;
pub mod rebase;
pub mod vdi;
pub mod vmdk;

pub use chain::{Chain, Host, Layer, OpenOptions, Policy, open};
pub use create::{CreateOptions, create};
pub use disk_host::DiskHost;
pub use error::Error;
pub use format::LayerMeta;
pub use given::GivenFiles;
pub use locks::Locks;
pub use name::Name;
pub use node::{Node, RunOptions, attach, attach_overlay, attach_wrapped};
pub use partial::PartialFiles;
pub use probe::{Foreign, Format, Probed};
