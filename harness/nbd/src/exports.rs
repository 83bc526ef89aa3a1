//! What a server has to offer.

/// A disk as clients see it.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Export {
    /// Its name. The first export also has the empty one.
    pub name: String,
    /// What people may want to know about it.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Nothing is written.
    pub read_only: bool,
    /// Bytes of requests that suit the disk best: a power of two, at least 512.
    pub preferred: u32,
}

impl Export {
    /// A disk of `size` bytes that may be written.
    pub fn new(name: &str, size: u64) -> Export {
        Export {
            name: name.into(),
            description: String::new(),
            size,
            read_only: false,
            preferred: 4096,
        }
    }
}

/// The number of the export of this name.
pub(crate) fn named(exports: &[Export], name: &[u8]) -> Option<usize> {
    if name.is_empty() && !exports.is_empty() {
        return Some(0);
    }
    exports.iter().position(|export| export.name.as_bytes() == name)
}
