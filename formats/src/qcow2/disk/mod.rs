//! The bytes of a qcow2 image and what they mean. Nothing here does I/O.

pub mod codec;
pub mod crypt;
pub mod header;
pub mod layout;
pub mod snapshot_table;
