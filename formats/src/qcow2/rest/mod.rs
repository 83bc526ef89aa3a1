//! A qcow2 image at rest: what works on files that may be waited for.

pub mod backing;
pub mod bitmap;
pub mod check;
pub mod create;
pub mod crypt;
pub mod map;
pub mod open;
pub mod preallocate;
pub mod snapshots;
