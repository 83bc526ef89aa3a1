//! The bytes of a QED image and what they mean. Nothing here does I/O.

pub mod layout;
