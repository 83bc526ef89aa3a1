//! The C ABI of cowbell: disk images in the event loop of a program in C or C++.
//!
//! What C sees is `include/cowbell.h`: cbindgen makes it from the comments here, and a test holds the
//! two together. This crate adds nothing to the engine but what the language border needs:
//!
//! - *No panic crosses it.* Every function runs inside a `catch_unwind`. An engine in which something
//!   panicked is not touched again: all that it is asked after that answers `-ENOTRECOVERABLE`.
//! - *Arguments are not believed*: NULL, a disk that is closed, lengths that overflow, bits that mean
//!   nothing are errors. What cannot be checked (that a pointer leads to memory, that a handle is one)
//!   is the contract of the functions, and is said in the header.
//! - *Disks are numbers*, never used twice in a process. Handles are for engines and images only.
//! - *Structs grow*: what a caller gives or takes a size for may get more fields at its end.

// Raw pointers are what this crate is about; each use says why it is sound.
#![allow(unsafe_code)]
// One contract binds all functions. It is at the top of the header, and in `handle::with`.
#![allow(clippy::missing_safety_doc)]

#[cfg(panic = "abort")]
compile_error!("the C ABI answers panics with an error: build it with panic = \"unwind\"");
#[cfg(target_endian = "big")]
compile_error!("struct cowbell_status is laid out as the engine answers: little-endian");

mod about;
mod backend;
mod closer;
mod disk;
mod engine;
mod handle;
mod image;
mod request;
#[cfg(test)]
mod tests;

pub use about::*;
pub use disk::*;
pub use engine::*;
pub use handle::Engine;
pub use image::*;
pub use request::*;
