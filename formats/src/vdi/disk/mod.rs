//! What an image is on disk.

pub mod layout;
