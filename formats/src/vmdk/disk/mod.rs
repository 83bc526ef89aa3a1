//! The bytes of a VMDK image and what they mean. Nothing here does I/O.

pub mod descriptor;
pub mod grain;
pub mod layout;
