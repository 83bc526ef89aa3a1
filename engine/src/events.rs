//! What an engine tells its embedder beside the ends of requests.

use crate::units::NodeId;

/// Something that happened to a node, beside the ends of requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeEvent {
    /// The image's metadata says something impossible. Requests that need what it says fail with
    /// `EIO`; others go on. The image wants a check.
    Corrupt {
        /// The node.
        node: NodeId,
        /// What is wrong.
        what: &'static str,
        /// Where in the image's file, in bytes.
        at: u64,
    },
}

/// Events that are kept until somebody asks; those that come after are dropped.
pub const EVENTS_MAX: usize = 64;
