//! What an engine tells its embedder beside the ends of requests.

use crate::units::{Errno, JobId, NodeId};

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
    /// A node that was to be [closed](crate::Engine::close) is gone, with the layers below it that
    /// nobody else reads from. Its files are to be [taken](crate::Engine::take_files).
    Closed {
        /// The node that was.
        node: NodeId,
        /// The first error that kept an image from being left clean, as
        /// [`Engine::drained`](crate::Engine::drained) has it: not `Ok` if something is lost, or
        /// the image was found corrupt ([`Errno::IO`]).
        result: Result<(), Errno>,
    },
    /// A job could not read or write so much of a node. It ends, unless it is to
    /// [salvage](crate::Copy::salvage) what it can and this was read, or to [stop](crate::Copy::stops_on_error).
    JobError {
        /// The job.
        job: JobId,
        /// The node.
        node: NodeId,
        /// Where on its disk, in bytes.
        at: u64,
        /// How much, in bytes.
        len: u64,
        /// Why.
        errno: Errno,
    },
    /// A job that was [started](crate::Engine::start) has ended, and its memory is freed.
    JobEnded {
        /// The job that was.
        job: JobId,
        /// `Ok`: all is copied, and stable. Else the first error; [`Errno::CANCELED`].
        result: Result<(), Errno>,
    },
    /// Nothing is in flight any more of a node that was [paused](crate::Engine::pause).
    Paused {
        /// The node.
        node: NodeId,
    },
}

/// Events of corruption that are kept until somebody asks, and errors of jobs, each; those that come
/// after are dropped.
pub const EVENTS_MAX: usize = 64;
