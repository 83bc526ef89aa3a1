//! Deterministic simulation of everything that a disk may do to an image.
//!
//! The same engine and the same drivers that run on real disks run here on a [simulated
//! one](backend), in a [`World`](world::World) that can be copied with requests in flight. The
//! [explorer](explore) goes through *every* order in which small [workloads](workload) can happen,
//! with and without faults, and crashes the disk in every state in every way that the [model of a
//! disk](disk) allows. An [oracle](shadow) knows what each byte may be.
//!
//! # A format, cache or device of one's own
//!
//! Whoever writes a [`Driver`](cowbell_engine::step::Driver), over files or over nodes of ours, can have all of this for it. What the simulator
//! has to know is a [`Subject`](subject::Subject), of which seven functions have no default:
//!
//! | | |
//! |---|---|
//! | `text` | its options in a line, for traces; with [`FromStr`](std::str::FromStr) traces can be read again |
//! | `make`, `files` | the files of a new image, in a [folder in memory](host::SimHost), and their names |
//! | `open` | attach the files to an engine and add the driver |
//! | `size` | bytes of the disk |
//! | `check`, `map` | of files that a crash left: are they sound, and where are the guest's bytes |
//!
//! Then [`search`](trace::search) tries workloads on it: each order in which ops can come back, each fault that a
//! [`Budget`](world::Budget) allows, and in each state each crash. A failure is a [`Trace`](trace::Trace), which is text:
//!
//! ```text
//! let workloads = [Workload::new([Request::write(0, 512), Request::flush()])];
//! if let Err(trace) = search(&image, Budget { faults: 1, ..QUIET }, &workloads) {
//!     let trace = shrink(&trace).expect("it fails again");      // fewer requests and choices
//!     println!("{}", trace.explained());                        // to be kept, and run again with Trace::replay
//!     println!("{}", cause(&trace, STATES).expect("it fails")); // when it became certain, and what would have saved it
//!     fs::write("page.html", to_html(&trace.timeline()?))?;     // seen in a browser
//! }
//! ```
//!
//! What is demanded: per byte, what a guest may find there, in reads and after crashes; every request ends; nothing is stuck, and
//! nobody holds on to anything when all has ended; what a drain leaves is clean; a panic is a failure. A driver asserts what else it
//! wants to be so. Longer runs by seed: [`explore::run`] with a [`Chooser`](choose::Chooser).
//!
//! `examples/log_disk.rs` is a log-structured disk in 150 lines, with what is needed here in 80 more. A mistake in it is
//! found, made smaller, explained and drawn in less than a second.
#![deny(missing_docs)]

pub mod backend;
pub mod cause;
pub mod choose;
mod clock;
pub mod disk;
pub mod explore;
pub mod filter;
pub mod foreign;
pub mod gate;
pub mod host;
pub mod kept;
pub mod latencies;
pub mod metrics;
pub mod mutants;
pub mod page;
pub mod perfetto;
pub mod played;
pub mod published;
pub mod random;
mod recorder;
pub mod resumed;
pub mod shadow;
mod shared;
pub mod shrink;
pub mod sleep;
pub mod states;
pub mod subject;
pub mod subjects;
pub mod timeline;
pub mod trace;
pub mod vary;
pub mod verdicts;
pub mod workload;
pub mod world;
