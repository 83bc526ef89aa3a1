//! qcow2: layout, opening, making, checking, running.

mod alloc;
pub mod bitmap;
pub mod check;
mod clear;
pub mod compress;
mod corrupt;
pub mod create;
pub mod crypt;
pub mod driver;
pub mod header;
mod inflate;
pub mod layout;
pub mod open;
pub mod preallocate;
pub mod read;
mod resize;
pub mod snapshot;
pub mod snapshots;
mod stock;
mod sweep;
mod table;
mod walk;

pub use driver::{Qcow2, Qcow2Options};
pub use open::Opened;
