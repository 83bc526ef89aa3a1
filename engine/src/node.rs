//! What the engine keeps of a node beside its driver: how far it is in its life, what is in flight.

use crate::held::Hold;
use crate::mutant;
use crate::stats::{Ended, NodeStats};
use crate::units::{Errno, JobId, NodeId, RegionId};
use crate::wait::WaitList;

/// How far a node is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Stage {
    /// It takes requests, if nothing else is said.
    Open,
    /// It takes no more; what is in flight runs to its end.
    Finishing,
    /// It leaves its image clean.
    Settling,
    /// Its image is clean, or why not.
    Settled(Result<(), Errno>),
}

/// What the engine keeps of a node beside its driver.
#[derive(Clone, Debug)]
pub(crate) struct NodeRecord {
    /// Whose this place is; if it is vacant: whose it will be.
    pub id: NodeId,
    /// Guests' requests that have not ended, and how many there may be now.
    pub guests: u32,
    pub open_to: u32,
    /// What is in flight besides: pieces of other nodes' requests, chores, the file layer's machines.
    pub inner: u32,
    /// Jobs of an embedder's that use it; and those that copy it as it was.
    pub jobs: u32,
    pub guards: u32,
    /// Writes in flight that were looked at.
    pub guarded: u32,
    /// A mirror has taken its place: the target of this job, of whose end the embedder has not heard yet.
    pub moved_to: Option<NodeId>,
    pub moved_untold: Option<JobId>,
    /// Writes that wait until he has.
    pub wait_for_move: WaitList,
    /// Guests' requests that ended together, not in the statistics yet.
    pub batch: Ended,
    /// How many requests it may have.
    pub quota: u32,
    pub stage: Stage,
    pub is_vacant: bool,
    /// No requests, no chores, until it is resumed.
    pub is_paused: bool,
    /// It is paused, or all that read from it are.
    pub is_held: bool,
    /// The embedder is still to be told that nothing is in flight any more.
    pub owes_paused: bool,
    /// When it has settled, it goes.
    pub is_closing: bool,
    /// The nodes below it stay when it goes.
    pub leaves_below: bool,
    /// What the layers above it had to say when they went: whose closing this is.
    pub closing_for: Option<(NodeId, Result<(), Errno>)>,
    /// Files of it were taken away.
    pub is_gone: bool,
    /// The first error of its chores since it began to settle.
    pub chore_failed: Option<Errno>,
    /// It is a disk: no other node reads from it.
    pub is_top: bool,
    /// Buffers that its requests hold, those in the layers below too: of the pool, and for bouncing.
    pub shares: [usize; 2],
    /// Memory of its own.
    pub regions: Vec<RegionId>,
    /// Requests that may not begin yet.
    pub hold: Hold,
    pub stats: NodeStats,
}

impl NodeRecord {
    pub fn new(id: NodeId) -> NodeRecord {
        NodeRecord {
            id,
            guests: 0,
            open_to: u32::MAX,
            inner: 0,
            jobs: 0,
            guards: 0,
            guarded: 0,
            moved_to: None,
            moved_untold: None,
            wait_for_move: WaitList::new(),
            batch: Ended::default(),
            quota: u32::MAX,
            stage: Stage::Open,
            is_vacant: false,
            is_paused: false,
            is_held: false,
            owes_paused: false,
            is_closing: false,
            leaves_below: false,
            closing_for: None,
            is_gone: false,
            chore_failed: None,
            is_top: true,
            shares: [0; 2],
            regions: Vec::new(),
            hold: Hold::default(),
            stats: NodeStats::default(),
        }
    }

    /// Is nothing of it in flight, its files apart?
    pub fn is_quiet(&self) -> bool {
        self.guests == 0 && self.inner == 0 && self.jobs == 0
    }

    /// Does something happen to it by itself, so that it is to be looked at?
    pub fn is_moving(&self) -> bool {
        !self.is_vacant && (self.drains() || self.is_closing || self.owes_paused)
    }

    /// Is there something to be done for a drain, or to close it?
    pub fn drains(&self) -> bool {
        matches!(self.stage, Stage::Finishing | Stage::Settling)
    }

    /// May its chores begin when their time comes? Of one that is held only while it drains.
    pub fn may_begin_chores(&self) -> bool {
        let rests = !self.drains();
        let rests =
            if mutant!("drained_and_paused_is_used") { self.stage == Stage::Open } else { rests };
        !(self.is_gone || self.is_held && rests)
    }

    /// Opens it to as many requests as may be, now.
    pub fn set_open_to(&mut self) {
        let takes = self.stage == Stage::Open && !self.is_paused && !self.is_gone;
        // Who writes while it is copied is looked at.
        let takes = takes && self.guards == 0 && self.moved_to.is_none() && !self.hold.is_needed();
        self.open_to = if takes && !self.is_closing { self.quota } else { 0 };
        if mutant!("closed_node_takes_requests") && self.is_closing {
            self.open_to = self.quota;
        }
    }

    /// Everything that decides what can happen next and does not follow from its requests.
    pub fn decisive(&self) -> impl std::hash::Hash + '_ {
        let NodeRecord { stage, is_paused, is_held, owes_paused, is_closing, is_gone, .. } = *self;
        let is_there = (self.is_vacant, self.leaves_below);
        let flags = (is_paused, is_held, owes_paused, is_closing, is_gone, is_there);
        let moved = (self.guarded, self.moved_to, self.moved_untold.is_some(), self.wait_for_move);
        let held = (&self.hold, self.quota, self.shares);
        (stage, flags, self.closing_for, self.chore_failed, held, moved)
    }
}
