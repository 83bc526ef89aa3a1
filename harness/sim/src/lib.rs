//! Deterministic simulation of everything that a disk may do to an image.
//!
//! The same engine and the same drivers that run on real disks run here on a [simulated
//! one](backend), in a [`World`](world::World) that can be copied with requests in flight. The
//! [explorer](explore) goes through *every* order in which small [workloads](workload) can happen,
//! with and without faults, and crashes the disk in every state in every way that the [model of a
//! disk](disk) allows. An [oracle](shadow) knows what each byte may be.
#![deny(missing_docs)]

pub mod backend;
pub mod choose;
mod clock;
pub mod disk;
pub mod explore;
pub mod filter;
pub mod gate;
pub mod host;
pub mod kept;
pub mod latencies;
pub mod metrics;
pub mod mutants;
pub mod page;
pub mod perfetto;
pub mod played;
pub mod random;
mod recorder;
pub mod shadow;
mod shared;
pub mod shrink;
pub mod sleep;
pub mod subject;
pub mod subjects;
pub mod timeline;
pub mod trace;
pub mod verdicts;
pub mod workload;
pub mod world;
