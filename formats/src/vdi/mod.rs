//! VDI, VirtualBox' disk image: dynamic and fixed.
//!
//! | room | what |
//! |---|---|
//! | [`disk`] | the bytes of an image and what they mean; does no I/O |
//! | [`run`] | an open image as a state machine |
//! | [`rest`] | what may wait for the disk: opening, making, checking |

pub mod disk;
pub mod rest;
pub mod run;

pub use rest::open::Opened;
pub use run::{Vdi, VdiOptions};
