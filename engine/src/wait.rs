//! Wait lists: first-in first-out lists of parked requests.
//!
//! A list lives in the thing being waited for. A request is on at most one list at a time, so one
//! link per slab slot is all the memory that waiting costs, and a list is two words that copy.

use crate::units::ReqId;

/// What a parked request waits for. For people: statistics and the dump of a stuck engine say it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum On {
    /// A mapping table that is being loaded, made or moved.
    Table,
    /// A slot in a cache: all of them are being loaded, or changed and not written yet.
    CacheSlot,
    /// A cluster, grain or block that another request is allocating or freeing.
    Cluster,
    /// Compressed contents that are being read and inflated.
    Compressed,
    /// Free clusters, with refcounts that say so.
    FreeClusters,
    /// Refcounts that are being written.
    Refcounts,
    /// A writeback of tables, under way or the next one.
    Writeback,
    /// A file that is being made longer.
    FileLength,
    /// The image's header, which another request changes.
    Header,
    /// The image's content id, which is to change on disk first.
    ContentId,
    /// Its turn, where one request at a time goes on.
    Turn,
    /// A change of the disk's size.
    Resize,
    /// A buffer.
    Buffer,
    /// Blocks of a file that another request has to itself.
    Blocks,
    /// The end of all writes to a file, or to part of it, that are in flight.
    Quiet,
    /// The end of all requests that may still use what was given up.
    Users,
    /// What its job waits for: time, to be resumed, or that what was read is seen.
    Job,
    /// A job that reads what is to be changed, as it was.
    Copy,
    /// To be let begin: for the disk's limit, or for an abandoned write.
    Held,
}

impl On {
    /// Each once, in the order of [`Stats::lists`](crate::stats::Stats::lists).
    pub const ALL: [On; 19] = [
        On::Table,
        On::CacheSlot,
        On::Cluster,
        On::Compressed,
        On::FreeClusters,
        On::Refcounts,
        On::Writeback,
        On::FileLength,
        On::Header,
        On::ContentId,
        On::Turn,
        On::Resize,
        On::Buffer,
        On::Blocks,
        On::Quiet,
        On::Users,
        On::Job,
        On::Copy,
        On::Held,
    ];
}

const _: () = {
    let mut at = 0;
    while at < On::ALL.len() {
        assert!(On::ALL[at] as usize == at);
        at += 1;
    }
};

/// Requests waiting for one thing, oldest first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct WaitList {
    pub(crate) ends: Option<(ReqId, ReqId)>,
}

impl WaitList {
    /// An empty list.
    pub const fn new() -> WaitList {
        WaitList { ends: None }
    }

    /// Is nobody waiting?
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.ends.is_none()
    }

    /// Who has waited longest.
    #[inline]
    pub fn first(&self) -> Option<ReqId> {
        self.ends.map(|(head, _)| head)
    }
}
