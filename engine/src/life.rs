//! The life of a node: it is added, takes requests, may be paused, and is drained or closed.
//!
//! ```text
//!                    drain, close                nothing in flight
//! add ─> Open ──────────────────────> Finishing ───────────────────> Settling ─> Settled
//!         ^                             (given-up space goes back in both)         │  │
//!         └───────────── drained, and a request comes ────────────────────────────┘  └─ close ─> gone
//! ```
//!
//! A node is drained by itself, whoever asked: `Engine::drain` asks of all, `Engine::close` of one.
//! What is waited for is its own: its requests, the pieces of requests that came to it from the
//! layer above, its chores, the file layer's machines, and the giving back of space of its files. So
//! a disk that hangs holds up nobody but itself.
//!
//! *Top down.* A layer is settled when all that read from it are. A node that is closed goes, then
//! the layer below it, if nobody else reads from that; and so on. What it took of the engine goes
//! with it: regions, files, places. A place is used again under another generation of its id.
//!
//! *Paused* is not a stage: it is a reason to take no requests and begin no chores. A paused node that
//! is drained or closed leaves its image clean all the same. What nobody but paused nodes reads from is
//! held with them: it begins no chores either.
//!
//! To begin a chore takes the engine: that it is to be done is answered ([`Move`]).

use crate::backend::Backend;
use crate::core::Core;
use crate::events::NodeEvent;
use crate::mutant;
use crate::node::{NodeRecord, Stage};
use crate::step::Driver;
use crate::units::{Errno, FileId, NodeId};

/// Why a request was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// As many requests as [`Limits::requests`](crate::Limits::requests) are in flight, or as many of this node as it may have
    /// ([`Engine::set_quota`](crate::Engine::set_quota)). Try again after `poll`.
    Full,
    /// The engine is being drained. Try again when [`Engine::drained`](crate::Engine::drained) answers.
    Draining,
    /// The node is of another engine, it was closed, or its files were taken away
    /// ([`Engine::detach`](crate::Engine::detach)). Trying again does not help.
    NoSuchNode,
    /// The node is being closed ([`Engine::close`](crate::Engine::close)). Trying again does not help.
    Closing,
    /// The node is paused. Try again after [`Engine::resume`](crate::Engine::resume).
    Paused,
    /// Another node reads from this one: it cannot be closed. Or a job uses it: neither that, nor
    /// paused. No answer to a request.
    InUse,
    /// The target of a copy is shorter than its source. No answer to a request.
    TooSmall,
    /// The source of a copy of one moment is larger than can be kept account of. No answer to a request.
    TooLarge,
    /// A copy is to be shown in order, and is of a moment for which some of it is read earlier. No answer
    /// to a request.
    OutOfOrder,
}

/// How far a drain of all is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Drain {
    /// Requests are taken.
    Open,
    /// No more requests; nodes settle, each for itself.
    Going,
    /// Nothing is in flight, every image is clean (or why not).
    Drained(Result<(), Errno>),
}

/// The drivers of an engine's nodes, and what happens to nodes by themselves.
pub(crate) struct Life<D, F> {
    pub nodes: Vec<Option<D>>,
    /// Guest requests that were not polled yet.
    pub guests: usize,
    /// How many there may be: the limit, or none while it is being drained.
    pub open_to: usize,
    pub drain: Drain,
    /// Files of nodes that were closed.
    left: Vec<Left<F>>,
}

/// A file of a node that was closed, until somebody takes it.
struct Left<F> {
    whom: NodeId,
    file: F,
    /// The embedder has been told.
    is_told: bool,
}

/// How a node went on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Move {
    /// Not at all: it waits.
    Waits,
    /// By itself.
    On,
    /// It is to leave its image clean: its chore begins.
    Settle(NodeId),
}

impl<D: Driver, F> Life<D, F> {
    /// No nodes yet; `requests` there may be of guests.
    pub fn new(requests: usize) -> Life<D, F> {
        let (nodes, left) = (Vec::new(), Vec::new());
        Life { nodes, guests: 0, open_to: requests, drain: Drain::Open, left }
    }

    /// Why a request to a node that is there is not taken; if there is no reason, it is. Requests to
    /// a drained engine open it again.
    #[cold]
    #[inline(never)]
    pub fn why_not(&mut self, core: &mut Core, node: NodeId) -> Result<(), Why> {
        let record = &core.nodes[node.index()];
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
        if is_full || self.guests >= core.limits.requests {
            return Err(Why::Full);
        }
        match self.drain {
            Drain::Open => {}
            Drain::Going => return Err(Why::Draining),
            Drain::Drained(_) => self.reopen(core),
        }
        Ok(())
    }

    /// A drained engine takes requests again.
    fn reopen(&mut self, core: &mut Core) {
        self.drain = Drain::Open;
        self.open_to = core.limits.requests;
        for record in core.nodes.iter_mut().filter(|record| !record.is_closing) {
            record.stage = Stage::Open;
            record.set_open_to();
        }
        core.recount_moving();
    }

    /// See `Engine::drain`.
    pub fn drain(&mut self, core: &mut Core) {
        if self.drain == Drain::Going {
            return;
        }
        (self.drain, self.open_to) = (Drain::Going, 0);
        core.cancel_untold();
        for index in 0..core.nodes.len() {
            if !core.nodes[index].is_vacant && !core.nodes[index].is_closing {
                begin_to_drain(core, index);
            }
        }
        core.recount_moving();
    }

    /// A node that is added while others are drained, or have been, has nothing to be written.
    pub fn added(&self, core: &mut Core, index: usize) {
        if self.drain != Drain::Open {
            core.nodes[index].stage = Stage::Settled(Ok(()));
            core.nodes[index].set_open_to();
        }
    }

    /// See `Engine::close` and `Engine::close_filter`.
    pub fn close(&mut self, core: &mut Core, node: NodeId, leaves_below: bool) -> Result<(), Why> {
        if !core.has_node(node) {
            return Err(Why::NoSuchNode);
        }
        if core.nodes[node.index()].is_closing {
            return Err(Why::Closing);
        }
        // As far as the embedder has heard.
        let record = &core.nodes[node.index()];
        let is_copied = record.jobs > 0 || record.moved_untold.is_some();
        let is_copied = is_copied && !mutant!("copied_disk_is_closed");
        // What is submitted to what it has taken the place of goes to it.
        let is_moved_to = core.nodes.iter().any(|record| record.moved_to == Some(node));
        if self.is_read_from(node) || is_copied || is_moved_to {
            return Err(Why::InUse);
        }
        // What a drain could not write is tried once more.
        let has_failed = matches!(core.nodes[node.index()].stage, Stage::Settled(Err(_)));
        if has_failed && matches!(self.drain, Drain::Drained(_)) {
            self.reopen(core);
        }
        core.nodes[node.index()].leaves_below = leaves_below;
        begin_to_close(core, node, (node, Ok(())));
        Ok(())
    }

    /// Does another node read from this one?
    fn is_read_from(&self, node: NodeId) -> bool {
        self.nodes.iter().flatten().any(|other| other.below().contains(&node))
    }

    /// Is nothing of it in flight, nor of its files?
    pub fn is_at_rest(&self, core: &Core, index: usize) -> bool {
        let uses = |file: FileId| self.nodes[index].as_ref().is_some_and(|node| node.uses(file));
        let gives_back = core.files.iter().any(|file| file.given_up.is_going_on && uses(file.id));
        core.nodes[index].is_quiet() && !gives_back
    }

    /// See `Engine::pause`.
    pub fn pause(&mut self, core: &mut Core, node: NodeId) -> Result<(), Why> {
        let record = record_of(core, node)?;
        if record.is_paused {
            return Err(Why::Paused);
        }
        let is_copied = record.jobs > 0 || record.moved_untold.is_some();
        // What it holds still others would change, or read.
        let is_used = self.readers(node).any(|at| !core.nodes[at].is_held);
        if is_copied || is_used {
            return Err(Why::InUse);
        }
        let record = &mut core.nodes[node.index()];
        (record.is_paused, record.owes_paused) = (true, true);
        record.set_open_to();
        self.hold(core, node);
        core.recount_moving();
        Ok(())
    }

    /// See `Engine::resume`.
    pub fn resume(&mut self, core: &mut Core, node: NodeId) -> Result<(), Why> {
        record_of(core, node)?;
        let below = self.layers_below(node, |_| true);
        if below.iter().any(|layer| core.nodes[layer.index()].is_paused) {
            return Err(Why::InUse);
        }
        let record = record_of(core, node)?;
        record.is_paused &= mutant!("resumed_node_takes_nothing");
        record.owes_paused = false;
        record.set_open_to();
        self.hold(core, node);
        core.recount_moving();
        Ok(())
    }

    /// The places of those that read from a node.
    fn readers(&self, node: NodeId) -> impl Iterator<Item = usize> {
        let reads = move |at: &usize| {
            self.nodes[*at].as_ref().is_some_and(|other| other.below().contains(&node))
        };
        (0..self.nodes.len()).filter(reads)
    }

    fn below(&self, node: NodeId) -> &[NodeId] {
        self.nodes[node.index()].as_ref().map_or(&[], |node| node.below())
    }

    /// The layers below a node, each once, those apart that `goes_on` leaves out with what is below them.
    fn layers_below(&self, node: NodeId, goes_on: impl Fn(NodeId) -> bool) -> Vec<NodeId> {
        let mut layers: Vec<NodeId> = Vec::new();
        let mut from = vec![node];
        while let Some(above) = from.pop() {
            for &layer in self.below(above) {
                if goes_on(layer) && !layers.contains(&layer) {
                    layers.push(layer);
                    from.push(layer);
                }
            }
        }
        layers
    }

    /// Whether a node is held may have changed, and so may that of each layer below it.
    pub fn hold(&self, core: &mut Core, from: NodeId) {
        self.hold_layer(core, from);
        let mut left = self.below(from).to_vec();
        while let Some(layer) = left.pop() {
            // Where nothing changes, nothing does below either: each edge is gone down once.
            if self.hold_layer(core, layer) {
                left.extend(self.below(layer));
            }
        }
        self.hold_files(core);
    }

    /// Looks whether a node is held; has that changed?
    fn hold_layer(&self, core: &mut Core, node: NodeId) -> bool {
        let mut readers = self.readers(node).peekable();
        let is_read = readers.peek().is_some() && !mutant!("pause_goes_no_deeper");
        let is_held = is_read && readers.all(|at| core.nodes[at].is_held);
        let record = &mut core.nodes[node.index()];
        let is_held = record.is_paused || is_held;
        std::mem::replace(&mut record.is_held, is_held) != is_held
    }

    /// Is nothing in flight of what is held below a node, nor to be done there for a drain?
    fn lies_still_below(&self, core: &Core, node: NodeId) -> bool {
        let held = self.layers_below(node, |layer| core.nodes[layer.index()].is_held);
        let mut held = held.iter().map(|layer| layer.index());
        held.all(|at| !core.nodes[at].drains() && self.is_at_rest(core, at))
    }

    /// Space of held nodes' files does not go back when its time comes, but when they are drained.
    fn hold_files(&self, core: &mut Core) {
        let Core { files, nodes: records, .. } = core;
        for file in files.iter_mut().filter(|file| !file.is_vacant) {
            let mut users = self.nodes.iter().zip(&*records);
            file.is_held = users.any(|(node, record)| {
                record.is_held && node.as_ref().is_some_and(|node| node.uses(file.id))
            });
        }
    }

    /// All that were asked have settled, if they have.
    pub fn end_drain(&mut self, core: &Core) {
        let mut joined = Ok(());
        for record in core.nodes.iter().filter(|record| !record.is_vacant) {
            match record.stage {
                Stage::Settled(result) => joined = joined.and(result),
                Stage::Open | Stage::Finishing | Stage::Settling => return,
            }
        }
        self.drain = Drain::Drained(joined);
    }

    /// Takes a node one stage further, if nothing of it is in flight.
    pub fn move_on<B: Backend<File = F>>(
        &mut self,
        core: &mut Core,
        backend: &mut B,
        index: usize,
    ) -> Move {
        let is_quiet = self.is_at_rest(core, index)
            || mutant!("close_waits_for_nothing") && core.nodes[index].is_closing;
        if !is_quiet {
            return Move::Waits;
        }
        let record = &mut core.nodes[index];
        let (id, stage) = (record.id, record.stage);
        let may_rest = matches!(stage, Stage::Open | Stage::Settled(_)) && !record.is_closing;
        if record.owes_paused && may_rest {
            if !self.lies_still_below(core, id) {
                return Move::Waits;
            }
            core.nodes[index].owes_paused = false;
            core.events.push(NodeEvent::Paused { node: id });
            return Move::On;
        }
        match stage {
            Stage::Open => Move::Waits,
            Stage::Finishing | Stage::Settling if self.give_back_of(core, index) => Move::On,
            Stage::Finishing => self.settle(core, index),
            Stage::Settling => {
                settled(core, index);
                Move::On
            }
            Stage::Settled(result) => {
                if !core.nodes[index].is_closing {
                    return Move::Waits;
                }
                self.remove(core, backend, index, result);
                Move::On
            }
        }
    }

    /// Begins to give back what was given up of a node's files. Is there some?
    fn give_back_of(&self, core: &mut Core, index: usize) -> bool {
        let Some(node) = &self.nodes[index] else { return false };
        core.give_back(|file| node.uses(file.id))
    }

    /// All of a node has ended: it begins to leave its image clean, if those above it have.
    fn settle(&self, core: &mut Core, index: usize) -> Move {
        let id = core.nodes[index].id;
        let mut above = self.nodes.iter().zip(&core.nodes);
        let waits = above.any(|(node, record)| {
            let is_above = node.as_ref().is_some_and(|node| node.below().contains(&id))
                || record.moved_to == Some(id);
            is_above && !matches!(record.stage, Stage::Settled(_))
        });
        if waits && !mutant!("layer_settles_before_those_above") {
            return Move::Waits;
        }
        let record = &mut core.nodes[index];
        (record.stage, record.chore_failed) = (Stage::Settling, None);
        let skips = record.is_gone || record.is_closing && mutant!("close_settles_nothing");
        if skips { Move::On } else { Move::Settle(id) }
    }

    /// A node that has settled goes, with its files; then the layers below, if nobody else reads from
    /// them. Who was to be closed is told of when the last of those has gone.
    fn remove<B: Backend<File = F>>(
        &mut self,
        core: &mut Core,
        backend: &mut B,
        index: usize,
        result: Result<(), Errno>,
    ) {
        let Some(node) = self.nodes[index].take() else { return };
        let id = core.nodes[index].id;
        let (whom, above) = core.nodes[index].closing_for.unwrap_or((id, Ok(())));
        let result = above.and(result);
        for at in 0..core.files.len() {
            let file = core.files[at].id;
            let is_its = !core.files[at].is_vacant && node.uses(file);
            let is_others = self.nodes.iter().flatten().any(|other| other.uses(file));
            if is_its && !is_others {
                if let Some(taken) = backend.detach(file) {
                    self.left.push(Left { whom, file: taken, is_told: false });
                }
                core.free_file(file);
            }
        }
        let leaves_below = core.nodes[index].leaves_below;
        core.free_node(index);
        core.wake_for_shares();
        for &below in node.below() {
            if !core.has_node(below) || core.nodes[below.index()].is_closing {
                continue;
            }
            let is_others = self.is_read_from(below);
            core.nodes[below.index()].is_top = !is_others;
            self.hold(core, below);
            if !is_others && !leaves_below || mutant!("close_takes_shared_layer") {
                begin_to_close(core, below, (whom, Ok(())));
            }
        }
        // The first error is handed on to those that go for the same node.
        let rest = core.nodes.iter_mut().filter_map(|record| record.closing_for.as_mut());
        let mut rest = rest.filter(|closing| closing.0 == whom).peekable();
        if rest.peek().is_none() {
            return core.events.push(NodeEvent::Closed { node: whom, result });
        }
        rest.for_each(|closing| closing.1 = result.and(closing.1));
    }

    /// See `Engine::take_files`.
    pub fn take_files(&mut self, node: NodeId) -> Vec<F> {
        let left = std::mem::take(&mut self.left);
        let (its, others): (Vec<_>, Vec<_>) =
            left.into_iter().partition(|left| left.whom == node && left.is_told);
        self.left = others;
        its.into_iter().map(|left| left.file).collect()
    }

    /// See `Engine::poll_event`.
    pub fn poll_event(&mut self, core: &mut Core) -> Option<NodeEvent> {
        if core.events.is_empty() {
            return None;
        }
        let event = core.events.remove(0);
        if let NodeEvent::JobEnded { job, .. } = event {
            core.tell_moved(job);
        }
        if let NodeEvent::Closed { node, .. } = event {
            let its = self.left.iter_mut().filter(|left| left.whom == node);
            its.for_each(|left| left.is_told = true);
        }
        Some(event)
    }

    /// Drops the files that nobody took.
    #[cold]
    #[inline(never)]
    pub fn drop_left(&mut self) {
        self.left.retain(|left| !left.is_told);
    }

    /// Are there files that may be dropped?
    #[inline(always)]
    pub fn has_left(&self) -> bool {
        !self.left.is_empty()
    }
}

fn begin_to_drain(core: &mut Core, index: usize) {
    let record = &mut core.nodes[index];
    record.stage = Stage::Finishing;
    record.set_open_to();
}

/// `node` has begun to go, for `whom`.
fn begin_to_close(core: &mut Core, node: NodeId, whom: (NodeId, Result<(), Errno>)) {
    let record = &mut core.nodes[node.index()];
    (record.is_closing, record.closing_for) = (true, Some(whom));
    record.owes_paused = false;
    // What a drain has left clean nobody has asked for anything since: nor may it ask those below, which
    // the drain may have left clean, too.
    let is_left = matches!(record.stage, Stage::Settling | Stage::Settled(_));
    if !is_left || mutant!("drained_node_settles_again") {
        record.stage = Stage::Finishing;
    }
    record.set_open_to();
    core.recount_moving();
}

fn record_of(core: &mut Core, node: NodeId) -> Result<&mut NodeRecord, Why> {
    if !core.has_node(node) || core.nodes[node.index()].is_gone {
        return Err(Why::NoSuchNode);
    }
    let record = &mut core.nodes[node.index()];
    if record.is_closing { Err(Why::Closing) } else { Ok(record) }
}

/// A node has left its image clean, or could not.
fn settled(core: &mut Core, index: usize) {
    let record = &mut core.nodes[index];
    let failed = record.chore_failed.take();
    let is_corrupt = core.corrupt.contains(&record.id) && !record.is_gone;
    let failed = failed.or(is_corrupt.then_some(Errno::IO));
    let failed = failed.filter(|_| !mutant!("drain_error_forgotten"));
    record.stage = Stage::Settled(failed.map_or(Ok(()), Err));
}

impl<D: Clone, F> Clone for Life<D, F> {
    /// Without the files of nodes that were closed: nobody has them twice.
    fn clone(&self) -> Life<D, F> {
        let Life { guests, open_to, drain, .. } = *self;
        Life { nodes: self.nodes.clone(), guests, open_to, drain, left: Vec::new() }
    }

    fn clone_from(&mut self, source: &Life<D, F>) {
        self.nodes.clone_from(&source.nodes);
        (self.guests, self.open_to, self.drain) = (source.guests, source.open_to, source.drain);
        self.left.clear();
    }
}
