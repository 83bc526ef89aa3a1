//! The life of a node: it is added, takes requests, may be paused, and is drained or closed.
//!
//! ```text
//!                    drain, close                nothing in flight
//! add ─> Open ──────────────────────> Finishing ───────────────────> Settling ─> Settled
//!         ^                             (given-up space goes back in both)         │  │
//!         └───────────── drained, and a request comes ────────────────────────────┘  └─ close ─> gone
//! ```
//!
//! A node is drained by itself, whoever asked: [`Engine::drain`] asks of all, [`Engine::close`] of one.
//! What is waited for is its own: its requests, the pieces of requests that came to it from the
//! layer above, its chores, the file layer's machines, and the giving back of space of its files. So
//! a disk that hangs holds up nobody but itself.
//!
//! *Top down.* A layer is settled when all that read from it are. A node that is closed goes, then
//! the layer below it, if nobody else reads from that; and so on. What it took of the engine goes
//! with it: regions, files, places. A place is used again under another generation of its id.
//!
//! *Paused* is not a stage: it is a reason to take no requests and begin no chores. A paused node that
//! is drained or closed leaves its image clean all the same.

use crate::backend::Backend;
use crate::core::Core;
use crate::engine::{Drain, Engine, Why};
use crate::events::NodeEvent;
use crate::mutant;
use crate::request::Chore;
use crate::stats::{Ended, NodeStats};
use crate::step::Driver;
use crate::units::{Errno, FileId, NodeId, RegionId};

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
    /// Guests' requests that ended together, not in the statistics yet.
    pub batch: Ended,
    /// How many requests it may have.
    pub quota: u32,
    pub stage: Stage,
    pub is_vacant: bool,
    /// No requests, no chores, until it is resumed.
    pub is_paused: bool,
    /// The embedder is still to be told that nothing is in flight any more.
    pub owes_paused: bool,
    /// When it has settled, it goes.
    pub is_closing: bool,
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
    pub stats: NodeStats,
}

impl NodeRecord {
    pub fn new(id: NodeId) -> NodeRecord {
        NodeRecord {
            id,
            guests: 0,
            open_to: u32::MAX,
            inner: 0,
            batch: Ended::default(),
            quota: u32::MAX,
            stage: Stage::Open,
            is_vacant: false,
            is_paused: false,
            owes_paused: false,
            is_closing: false,
            closing_for: None,
            is_gone: false,
            chore_failed: None,
            is_top: true,
            shares: [0; 2],
            regions: Vec::new(),
            stats: NodeStats::default(),
        }
    }

    /// Is nothing of it in flight, its files apart?
    fn is_quiet(&self) -> bool {
        self.guests == 0 && self.inner == 0
    }

    /// Does something happen to it by itself, so that it is to be looked at?
    fn is_moving(&self) -> bool {
        let drains = matches!(self.stage, Stage::Finishing | Stage::Settling);
        !self.is_vacant && (drains || self.is_closing || self.owes_paused)
    }

    /// May its chores begin when their time comes?
    pub fn may_begin_chores(&self) -> bool {
        !(self.is_gone || self.is_paused && self.stage == Stage::Open)
    }

    /// Opens it to as many requests as may be, now.
    fn set_open_to(&mut self) {
        let takes = self.stage == Stage::Open && !self.is_paused && !self.is_gone;
        self.open_to = if takes && !self.is_closing { self.quota } else { 0 };
        if mutant!("closed_node_takes_requests") && self.is_closing {
            self.open_to = self.quota;
        }
    }

    /// Everything that decides what can happen next and does not follow from its requests.
    pub fn decisive(&self) -> impl std::hash::Hash {
        let NodeRecord { stage, is_paused, owes_paused, is_closing, is_gone, .. } = *self;
        let flags = (is_paused, owes_paused, is_closing, is_gone, self.is_vacant);
        (stage, flags, self.closing_for, self.chore_failed, self.quota, self.shares)
    }
}

impl Core {
    /// A node begins to be looked at, or nothing is to be seen of it any more.
    fn recount_moving(&mut self) {
        self.moving = self.nodes.iter().filter(|node| node.is_moving()).count();
    }

    /// The place of the next node: its index.
    pub fn next_node(&mut self, tag: u16) -> usize {
        let index = self.nodes_free.pop().unwrap_or_else(|| {
            self.nodes.push(NodeRecord::new(NodeId::new(tag, self.nodes.len())));
            self.nodes.len() - 1
        });
        let record = &mut self.nodes[index];
        *record = NodeRecord::new(record.id);
        record.regions = std::mem::take(&mut self.loose_regions);
        index
    }

    /// A node goes: its memory is freed, its place is for the next one.
    fn free_node(&mut self, index: usize) {
        let record = &mut self.nodes[index];
        let is_at_rest = record.is_quiet() && record.shares == [0; 2];
        assert!(is_at_rest || mutant!("close_waits_for_nothing"), "{record:?} goes at work");
        let id = record.id;
        let regions = std::mem::take(&mut record.regions);
        let next = id.next_generation();
        *record = NodeRecord {
            is_vacant: true,
            is_top: false,
            open_to: 0,
            ..NodeRecord::new(next.unwrap_or(NodeId::NONE))
        };
        regions.into_iter().for_each(|region| self.mem.free_region(region));
        self.corrupt.retain(|&node| node != id);
        if next.is_some() {
            self.nodes_free.push(index);
        }
        if mutant!("id_used_again") {
            self.nodes[index].id = id;
        }
    }
}

impl<D: Driver, B: Backend> Engine<D, B> {
    /// Does the engine have this node? Not one that was closed, nor another engine's.
    #[inline]
    pub fn has(&self, node: NodeId) -> bool {
        self.core
            .nodes
            .get(node.index())
            .is_some_and(|record| record.id == node && !record.is_vacant)
    }

    /// Why a request to a node that is there is not taken; if there is no reason, it is. Requests to
    /// a drained engine open it again.
    #[cold]
    #[inline(never)]
    pub(crate) fn why_not(&mut self, node: NodeId) -> Result<(), Why> {
        let record = &self.core.nodes[node.index()];
        if record.is_gone || record.is_vacant {
            return Err(Why::NoSuchNode);
        }
        if record.is_closing && !mutant!("closed_node_takes_requests") {
            return Err(Why::Closing);
        }
        if record.is_paused {
            return Err(Why::Paused);
        }
        let is_full = record.guests >= record.quota && !mutant!("quota_ignored");
        if is_full || self.guests >= self.core.limits.requests {
            return Err(Why::Full);
        }
        match self.drain {
            Drain::Open => {}
            Drain::Going => return Err(Why::Draining),
            Drain::Drained(_) => self.reopen(),
        }
        Ok(())
    }

    /// A drained engine takes requests again.
    fn reopen(&mut self) {
        self.drain = Drain::Open;
        self.open_to = self.core.limits.requests;
        for record in self.core.nodes.iter_mut().filter(|record| !record.is_closing) {
            record.stage = Stage::Open;
            record.set_open_to();
        }
        self.hold_files();
        self.core.recount_moving();
    }

    /// At most so many of the engine's requests may be this node's, those apart that have ended and
    /// are to be polled: one more is refused with [`Why::Full`], whatever room there is for others. `None`, which is what
    /// a node begins with: no bound but [`Limits::requests`](crate::Limits::requests). 0 refuses
    /// all. May be changed at any time; requests that are there stay. False: there is no such node.
    ///
    /// The sum over all nodes may be more than the engine's. As long as it is not, no disk takes
    /// another's place, not even one whose storage hangs.
    pub fn set_quota(&mut self, node: NodeId, requests_max: Option<usize>) -> bool {
        if !self.has(node) {
            return false;
        }
        let record = &mut self.core.nodes[node.index()];
        record.quota = requests_max.map_or(u32::MAX, |max| u32::try_from(max).unwrap_or(u32::MAX));
        record.set_open_to();
        true
    }

    /// What was counted of a node's requests; kept if [`Limits::measure`](crate::Limits::measure)
    /// says so. `None`: there is no such node.
    pub fn node_stats(&self, node: NodeId) -> Option<&NodeStats> {
        self.has(node).then(|| &self.core.nodes[node.index()].stats)
    }

    /// Begins to drain: no more requests are taken, those in flight run to their end, and every
    /// node leaves its image clean and stable, paused ones too. Go on as ever, with `run` and `poll`,
    /// until [`Engine::drained`] answers; `run` once before waiting. While it drains, calling it
    /// again changes nothing.
    ///
    /// Nodes do not wait for each other: the images of some are clean while another's storage
    /// hangs. To have one clean and gone while others go on, [`close`](Engine::close) it.
    pub fn drain(&mut self) {
        if self.drain == Drain::Going {
            return;
        }
        (self.drain, self.open_to) = (Drain::Going, 0);
        for index in 0..self.core.nodes.len() {
            if !self.core.nodes[index].is_vacant && !self.core.nodes[index].is_closing {
                self.begin_to_drain(index);
            }
        }
        self.core.recount_moving();
    }

    pub(crate) fn begin_to_drain(&mut self, index: usize) {
        let record = &mut self.core.nodes[index];
        record.stage = Stage::Finishing;
        record.set_open_to();
    }

    /// Begins to close a node while others go on: no more requests are taken for it
    /// ([`Why::Closing`]), those in flight run to their end, and it leaves its image clean and stable
    /// and gives back what space was given up, all as [`drain`](Engine::drain) does. Then it goes,
    /// with its files and memory; and so does each layer below it, one after the other, down to the
    /// first that another node reads from. Go on as ever, with `run` and `poll`, until
    /// [`poll_event`](Engine::poll_event) answers [`NodeEvent::Closed`]; `run` once before waiting.
    /// From then on the id is refused ([`Why::NoSuchNode`]), for ever.
    ///
    /// Nobody waits for a node that is being closed, and it waits for nobody else: if its storage
    /// hangs it stays, and others go on. Finished requests of it may come from `poll` even after the
    /// event.
    ///
    /// # Errors
    ///
    /// And nothing has changed: [`Why::NoSuchNode`]; [`Why::Closing`], it is being closed already;
    /// [`Why::InUse`], another node reads from it: close that first.
    pub fn close(&mut self, node: NodeId) -> Result<(), Why> {
        if !self.has(node) {
            return Err(Why::NoSuchNode);
        }
        if self.core.nodes[node.index()].is_closing {
            return Err(Why::Closing);
        }
        if self.is_read_from(node) {
            return Err(Why::InUse);
        }
        self.begin_to_close(node, (node, Ok(())));
        Ok(())
    }

    /// `node` has begun to go, for `whom`.
    fn begin_to_close(&mut self, node: NodeId, whom: (NodeId, Result<(), Errno>)) {
        let record = &mut self.core.nodes[node.index()];
        (record.is_closing, record.closing_for) = (true, Some(whom));
        record.owes_paused = false;
        self.begin_to_drain(node.index());
        self.core.recount_moving();
    }

    /// May another node be added that reads from this one? It is there, and not being closed.
    pub fn may_be_read_from(&self, node: NodeId) -> bool {
        self.has(node) && !self.core.nodes[node.index()].is_closing
    }

    /// Does another node read from this one?
    fn is_read_from(&self, node: NodeId) -> bool {
        self.nodes.iter().flatten().any(|other| other.below() == Some(node))
    }

    /// Is nothing of this node in flight: no request, no chore, nothing on its files? What `poll` has
    /// to give does not count. Also of a node that is not there.
    pub fn is_quiet(&self, node: NodeId) -> bool {
        !self.has(node) || self.is_at_rest(node.index())
    }

    fn is_at_rest(&self, index: usize) -> bool {
        let uses = |file: FileId| self.nodes[index].as_ref().is_some_and(|node| node.uses(file));
        let gives_back =
            self.core.files.iter().any(|file| file.given_up.is_going_on && uses(file.id));
        self.core.nodes[index].is_quiet() && !gives_back
    }

    /// From now on the node takes no requests ([`Why::Paused`]) and begins no work of its own; what
    /// is in flight runs to its end. When it has, [`poll_event`](Engine::poll_event) answers
    /// [`NodeEvent::Paused`], and from then until [`resume`](Engine::resume) nothing is read from or
    /// written to its files. What they hold is what a crash would leave: flush first to have in it
    /// what was written. A node that is being drained or closed leaves its image clean, paused or not.
    ///
    /// Requests are refused, not kept: the embedder has a queue, for [`Why::Full`], and a paused
    /// disk shall not take the engine's places from others. Order is as it submits.
    ///
    /// # Errors
    ///
    /// And nothing has changed: [`Why::NoSuchNode`]; [`Why::Closing`]; [`Why::Paused`], it is already.
    pub fn pause(&mut self, node: NodeId) -> Result<(), Why> {
        let record = self.record_of(node)?;
        if record.is_paused {
            return Err(Why::Paused);
        }
        (record.is_paused, record.owes_paused) = (true, true);
        record.set_open_to();
        self.hold_files();
        self.core.recount_moving();
        Ok(())
    }

    /// Ends a [`pause`](Engine::pause): requests are taken again, and what work of the node's own has
    /// become due begins at the next `run`. If it was not paused, nothing changes.
    ///
    /// # Errors
    ///
    /// [`Why::NoSuchNode`]; [`Why::Closing`].
    pub fn resume(&mut self, node: NodeId) -> Result<(), Why> {
        let record = self.record_of(node)?;
        record.is_paused &= mutant!("resumed_node_takes_nothing");
        record.owes_paused = false;
        record.set_open_to();
        self.hold_files();
        self.core.recount_moving();
        Ok(())
    }

    fn record_of(&mut self, node: NodeId) -> Result<&mut NodeRecord, Why> {
        if !self.has(node) || self.core.nodes[node.index()].is_gone {
            return Err(Why::NoSuchNode);
        }
        let record = &mut self.core.nodes[node.index()];
        if record.is_closing { Err(Why::Closing) } else { Ok(record) }
    }

    /// Space of paused nodes' files does not go back when its time comes.
    fn hold_files(&mut self) {
        for file in self.core.files.iter_mut().filter(|file| !file.is_vacant) {
            let mut users = self.nodes.iter().zip(&self.core.nodes);
            file.is_held = users.any(|(node, record)| {
                let holds = record.is_paused && record.stage == Stage::Open;
                holds && node.as_ref().is_some_and(|node| node.uses(file.id))
            });
        }
    }

    /// Nothing is ready: is there something that nodes do by themselves?
    #[cold]
    #[inline(never)]
    pub(crate) fn go_on_living(&mut self) -> bool {
        let mut goes_on = false;
        for index in 0..self.nodes.len() {
            while self.core.nodes[index].is_moving() && self.move_on(index) {
                goes_on = true;
            }
        }
        self.core.recount_moving();
        if self.drain == Drain::Going && self.is_idle() {
            self.end_drain();
        }
        goes_on
    }

    /// All that were asked have settled, if they have.
    fn end_drain(&mut self) {
        let mut joined = Ok(());
        for record in self.core.nodes.iter().filter(|record| !record.is_vacant) {
            match record.stage {
                Stage::Settled(result) => joined = joined.and(result),
                Stage::Open | Stage::Finishing | Stage::Settling => return,
            }
        }
        self.drain = Drain::Drained(joined);
    }

    /// Takes a node one stage further, if nothing of it is in flight. False: it waits.
    fn move_on(&mut self, index: usize) -> bool {
        let is_quiet = self.is_at_rest(index)
            || mutant!("close_waits_for_nothing") && self.core.nodes[index].is_closing;
        if !is_quiet {
            return false;
        }
        let record = &mut self.core.nodes[index];
        let (id, stage) = (record.id, record.stage);
        let may_rest = matches!(stage, Stage::Open | Stage::Settled(_)) && !record.is_closing;
        if record.owes_paused && may_rest {
            record.owes_paused = false;
            self.core.events.push(NodeEvent::Paused { node: id });
            return true;
        }
        match stage {
            Stage::Open => false,
            Stage::Finishing | Stage::Settling if self.give_back_of(index) => true,
            Stage::Finishing => self.settle(index),
            Stage::Settling => {
                self.settled(index);
                true
            }
            Stage::Settled(result) => {
                let is_closing = self.core.nodes[index].is_closing;
                if is_closing {
                    self.remove(index, result);
                }
                is_closing
            }
        }
    }

    /// Begins to give back what was given up of a node's files. Is there some?
    fn give_back_of(&mut self, index: usize) -> bool {
        let Engine { nodes, core, .. } = self;
        let Some(node) = &nodes[index] else { return false };
        core.give_back(|file| node.uses(file.id))
    }

    /// All of a node has ended: it begins to leave its image clean, if those above it have.
    fn settle(&mut self, index: usize) -> bool {
        let id = self.core.nodes[index].id;
        let mut above = self.nodes.iter().zip(&self.core.nodes);
        let waits = above.any(|(node, record)| {
            let is_above = node.as_ref().is_some_and(|node| node.below() == Some(id));
            is_above && !matches!(record.stage, Stage::Settled(_))
        });
        if waits {
            return false;
        }
        let record = &mut self.core.nodes[index];
        (record.stage, record.chore_failed) = (Stage::Settling, None);
        let skips = record.is_gone || record.is_closing && mutant!("close_settles_nothing");
        if !skips {
            self.begin_chore(id, Chore::Settle);
        }
        true
    }

    /// A node has left its image clean, or could not.
    fn settled(&mut self, index: usize) {
        let record = &mut self.core.nodes[index];
        let failed = record.chore_failed.take();
        let is_corrupt = self.core.corrupt.contains(&record.id) && !record.is_gone;
        let failed = failed.or(is_corrupt.then_some(Errno::IO));
        let failed = failed.filter(|_| !mutant!("drain_error_forgotten"));
        record.stage = Stage::Settled(failed.map_or(Ok(()), Err));
    }

    /// A node that has settled goes, with its files; then the layer below, if nobody else reads from
    /// it.
    fn remove(&mut self, index: usize, result: Result<(), Errno>) {
        let Some(node) = self.nodes[index].take() else { return };
        let id = self.core.nodes[index].id;
        let (whom, above) = self.core.nodes[index].closing_for.unwrap_or((id, Ok(())));
        let result = above.and(result);
        for at in 0..self.core.files.len() {
            let file = self.core.files[at].id;
            let is_its = !self.core.files[at].is_vacant && node.uses(file);
            let is_others = self.nodes.iter().flatten().any(|other| other.uses(file));
            if is_its && !is_others {
                if let Some(taken) = self.backend.detach(file) {
                    self.left.push(Left { whom, file: taken, is_told: false });
                }
                self.core.free_file(file);
            }
        }
        self.core.free_node(index);
        self.core.wake_for_shares();
        let below = node
            .below()
            .filter(|&below| self.has(below) && !self.core.nodes[below.index()].is_closing);
        if let Some(below) = below {
            self.core.nodes[below.index()].is_top = !self.is_read_from(below);
        }
        match below {
            Some(below) if !self.is_read_from(below) || mutant!("close_takes_shared_layer") => {
                self.begin_to_close(below, (whom, result));
            }
            _ => self.core.events.push(NodeEvent::Closed { node: whom, result }),
        }
    }

    /// The files of a node that was closed, when [`poll_event`](Engine::poll_event) has said so and
    /// until the next `run`, in the order in which they were attached; those of layers that went
    /// with it come behind. What is not taken is dropped in that `run`: a loop that may not wait for
    /// files to be closed takes them, and drops them elsewhere.
    pub fn take_files(&mut self, node: NodeId) -> Vec<B::File> {
        let left = std::mem::take(&mut self.left);
        let (its, others): (Vec<_>, Vec<_>) =
            left.into_iter().partition(|left| left.whom == node && left.is_told);
        self.left = others;
        its.into_iter().map(|left| left.file).collect()
    }

    /// What happened to a node since it was last asked, oldest first. At most
    /// [`EVENTS_MAX`](crate::events::EVENTS_MAX) of [`NodeEvent::Corrupt`] are kept, the same one
    /// once; none of the others is lost. May answer something new after any `run`.
    pub fn poll_event(&mut self) -> Option<NodeEvent> {
        if self.core.events.is_empty() {
            return None;
        }
        let event = self.core.events.remove(0);
        if let NodeEvent::Closed { node, .. } = event {
            let its = self.left.iter_mut().filter(|left| left.whom == node);
            its.for_each(|left| left.is_told = true);
        }
        Some(event)
    }

    /// Drops the files that nobody took.
    #[cold]
    #[inline(never)]
    pub(crate) fn drop_left(&mut self) {
        self.left.retain(|left| !left.is_told);
    }
}

/// A file of a node that was closed, until somebody takes it.
pub(crate) struct Left<F> {
    whom: NodeId,
    file: F,
    /// The embedder has been told.
    is_told: bool,
}
