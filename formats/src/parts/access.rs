//! What an image is opened for.

/// How to open an image's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Write nothing. An encrypted image opens too, to be described.
    Read,
    /// For writing: what a header says of features that are not known here is cleared where the format
    /// wants that, and an image that was not closed cleanly is checked and repaired.
    Write,
    /// For writing, but one that was not closed cleanly is left the way it is.
    WriteUnchecked,
}
