//! Block I/O requests as explicit state machines.
//!
//! An [`Engine`] owns opened images (*nodes*) and a slab of requests. Each event is delivered once
//! to one request, whose state is consumed and replaced by the next; the outside world is a
//! [`Backend`](backend::Backend) that takes [`Op`](op::Op)s and answers in any order. The engine
//! knows no image format and, apart from [`sys`], no operating system. It has no clock, no threads
//! and no callbacks: an embedder's loop calls it, and it never waits.
//!
//! # Embedding
//!
//! One rule: **after any [`submit`](Engine::submit), after [`fd`](Engine::fd) became readable, and
//! when [`next_deadline`](Engine::next_deadline) has come: call [`run`](Engine::run), then
//! [`poll`](Engine::poll) until it answers `None`.** Doing so without need is harmless.
//!
//! A turn of the loop, in this order:
//!
//! 1. Wait for the descriptor, for everybody else's, and until the deadline; not at all if the last
//!    turn said that there is more to do.
//! 2. See to everybody else's events. The engine's needs nothing but step 4.
//! 3. Submit what there is. What is refused ([`Why::Full`]) stays in its queue.
//! 4. Run, then drain `poll`.
//! 5. There is more to do if [`Progress::again`] says so, or if `poll` made room while something is
//!    still queued. (Requests that need no I/O may all have ended within `run`: then nothing is in
//!    flight, and nothing would wake the loop for the rest of the queue.)
//!
//! A whole program. Its driver hands each request to the file as it is; an embedder takes those of
//! `cowbell-formats` instead, whose examples have the same loop around a plain epoll and around mio.
//!
//! ```
//! use std::collections::VecDeque;
//!
//! use cowbell_engine::event_loop::EventLoop;
//! use cowbell_engine::mem::{Buf, Mem};
//! use cowbell_engine::op::{Op, Segs, Target};
//! use cowbell_engine::step::{Chore, Cx, Driver, Event, Io, IoKind, Step};
//! use cowbell_engine::sys::aio::{Aio, AioOptions};
//! use cowbell_engine::sys::clock;
//! use cowbell_engine::sys::disk::{Create, DiskFile, DiskOptions};
//! use cowbell_engine::units::{Errno, FileId, Time};
//! use cowbell_engine::{Engine, Limits, Why};
//!
//! /// The file is the disk: one op a request, whose result is the request's.
//! struct Through {
//!     file: FileId,
//!     size: u64,
//! }
//!
//! impl Driver for Through {
//!     type State = ();
//!     const STATES: &'static [&'static str] = &["op"];
//!     fn label(_: &()) -> usize { 0 }
//!     fn size(&self) -> u64 { self.size }
//!     fn uses(&self, file: FileId) -> bool { file == self.file }
//!     fn deadline(&self) -> Option<Time> { None }
//!     fn chore(&mut self, _: Chore) -> Option<()> { None }
//!     fn begin(&mut self, cx: &mut Cx<'_>) -> Step<()> {
//!         let io = cx.io();
//!         let op = match io.kind {
//!             IoKind::Read => {
//!                 let to = Segs::one(cx.guest(0, io.len));
//!                 Op::read(Target::File(self.file), io.offset, to)
//!             }
//!             IoKind::Write { fua: false, .. } => {
//!                 Op::write(self.file, io.offset, Segs::one(cx.guest(0, io.len)))
//!             }
//!             IoKind::Flush => Op::flush(self.file),
//!             _ => return Step::Done(Err(Errno::NOT_SUPPORTED)),
//!         };
//!         cx.issue(op);
//!         Step::Last { label: 0 }
//!     }
//!     fn step(&mut self, _: (), event: Event, _: &mut Cx<'_>) -> Step<()> {
//!         unreachable!("{event:?}: no request waits in a state")
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("disk");
//! const SIZE: u64 = 1 << 20;
//! const BLOCK: u64 = 4096;
//! let options = DiskOptions { write: true, create: Create::New, ..DiskOptions::default() };
//! let file = DiskFile::open(&path, &options)?;
//!
//! let limits = Limits { requests: 8, ..Limits::default() };
//! let mut engine = Engine::new(Aio::new(AioOptions::default())?, limits);
//! let (file, _) = engine.attach(file)?;
//! let disk = engine.add(Through { file, size: SIZE });
//!
//! // An emulator adds `engine.fd()` to the loop that it has.
//! let mut events = EventLoop::new(engine.fd())?;
//!
//! // The guest's queue: every block is written.
//! let mut queue: VecDeque<(u64, Mem)> = (0..SIZE / BLOCK)
//!     .map(|block| (block, Buf::copied(&[block as u8; BLOCK as usize]).into()))
//!     .collect();
//! let mut more = true;
//! let drained = loop {
//!     if !more {
//!         events.wait(engine.next_deadline(), clock())?;
//!     }
//!     while let Some((block, mem)) = queue.pop_front() {
//!         if let Err(refused) = engine.submit(disk, Io::write(block * BLOCK, BLOCK), mem, block) {
//!             assert_eq!(refused.why, Why::Full);
//!             queue.push_front((block, refused.mem)); // it stays where it was
//!             break;
//!         }
//!     }
//!     if queue.is_empty() {
//!         engine.drain(); // nothing more will come: end it all, leave the image clean
//!     }
//!     more = engine.run(clock()).again;
//!     while let Some(done) = engine.poll() {
//!         done.result?; // a guest is told so; `done.tag` is its name, `done.mem` its memory
//!         more |= !queue.is_empty();
//!     }
//!     if let Some(result) = engine.drained() {
//!         break result;
//!     }
//! };
//! drained?;
//! # let disk = std::fs::read(&path)?;
//! # assert!(disk.chunks(4096).enumerate().all(|(n, block)| block.iter().all(|&b| b == n as u8)));
//! # Ok(())
//! # }
//! ```
//!
//! # The vocabulary
//!
//! | | |
//! |---|---|
//! | [`Op`](op::Op) | one thing the outside does on a file or a processor, or a read of another node |
//! | [`Backend`](backend::Backend) | does ops |
//! | [`Driver`](step::Driver) | a node: one opened layer, with all state of that image |
//! | request | a slab slot with one value of the driver's `State` |
//! | [`Event`](step::Event) | `Start`, `Io(result)`, `Woken` |
//! | [`Step`](step::Step) | a state's answer: `Wait`, `Go`, `Last`, `Done` |
//! | [`WaitList`](wait::WaitList) | parked requests, in the thing they wait for |
//!
//! # The rules
//!
//! 1. An event is delivered exactly once, to exactly one state.
//! 2. A waiting request waits for exactly one thing: its ops, or one wait list.
//! 3. Waking only enqueues. Nothing steps inside a step, a submission or a harvest.
//! 4. Who is woken looks again; nothing is published before the write that makes it true.

mod align;
pub mod backend;
pub mod both;
#[cfg(feature = "contract")]
pub mod contract;
mod copy;
mod copy_job;
mod core;
mod engine;
#[cfg(feature = "event-loop")]
pub mod event_loop;
pub mod events;
pub mod faulty;
mod file;
mod file_job;
mod given_up;
mod guard;
mod held;
mod life;
mod limits;
mod marks;
pub mod mem;
pub mod mutants;
mod node;
pub mod op;
pub mod ops;
mod queue;
pub mod record;
mod request;
mod slots;
pub mod stats;
pub mod status;
pub mod step;
pub mod store;
pub mod sys;
pub mod tables;
pub mod trace;
pub mod units;
pub mod wait;

pub use copy_job::{Copy, JobProgress, Moment, Zeros};
pub use engine::{Asker, Awaits, RequestInfo};
pub use engine::{Engine, Finished, Progress, QUEUED, Queues, Refused, Submitter};
pub use events::NodeEvent;
pub use held::Rate;
pub use life::Why;
pub use limits::{Limits, NodeLimits};
pub use request::REQUEST_MAX;
