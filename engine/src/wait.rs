//! Wait lists: first-in first-out lists of parked requests.
//!
//! A list lives in the thing being waited for. A request is on at most one list at a time, so one
//! link per slab slot is all the memory that waiting costs, and a list is two words that copy.

use crate::units::ReqId;

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
