//! The bytes of a qcow2 image and what they mean. Nothing here does I/O, but that
//! a snapshot table is read to learn how long it is.

pub mod codec;
pub mod header;
pub mod layout;
pub mod snapshot_table;
