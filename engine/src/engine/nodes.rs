//! What an embedder asks of a disk while others run: to pause, to close, to have a share. What that
//! means is said in `life.rs`.

use super::Engine;
use crate::backend::{Backend, Called, Note};
use crate::events::NodeEvent;
use crate::held::Rate;
use crate::life::Why;
use crate::limits::NodeLimits;
use crate::request::{Io, IoKind, REQUEST_MAX};
use crate::slots::{Origin, Slot, Waits};
use crate::stats::NodeStats;
use crate::step::Driver;
use crate::units::{NodeId, ReqId};

impl<D: Driver, B: Backend> Engine<D, B> {
    /// Does the engine have this node? Not one that was closed, nor another engine's.
    #[inline]
    pub fn has(&self, node: NodeId) -> bool {
        self.core.has_node(node)
    }

    /// What a disk takes, and takes best. `None`: there is no such node. A truncation changes the size.
    pub fn limits(&self, node: NodeId) -> Option<NodeLimits> {
        if !self.has(node) {
            return None;
        }
        let driver = self.node(node);
        let (mut request_align, mut memory_align, mut hole_align) = (1, 1, 1);
        let mut layers = vec![node];
        // Each layer is one of the engine's, and looked at once.
        let mut at = 0;
        while let Some(&layer) = layers.get(at) {
            at += 1;
            let layer = self.node(layer);
            for file in self.core.files.iter().filter(|file| layer.uses(file.id)) {
                request_align = file.info.request_align.max(request_align);
                memory_align = file.info.memory_align.max(memory_align);
                hole_align = file.info.hole_align.max(hole_align);
            }
            let new = layer.below().iter().filter(|below| !layers.contains(below));
            let new: Vec<NodeId> = new.copied().collect();
            layers.extend(new);
        }
        Some(NodeLimits {
            size: driver.size(),
            is_writable: driver.is_writable(),
            request_max: REQUEST_MAX,
            request_align,
            memory_align,
            unit: driver.unit().max(u64::from(request_align)).max(u64::from(hole_align)),
        })
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
        self.called(Called::SetQuota(node, requests_max));
        let record = &mut self.core.nodes[node.index()];
        record.quota = requests_max.map_or(u32::MAX, |max| u32::try_from(max).unwrap_or(u32::MAX));
        record.set_open_to();
        true
    }

    /// How much this disk may do: see [`Rate`]. What is over waits in the engine, in its order, and begins when
    /// [`next_deadline`](Engine::next_deadline) has come; when the disk is closed or the engine drained,
    /// at once. `None`, which is what a disk begins with: as much as it can. May be changed at any
    /// time. For layers below a disk it means nothing: what reads from them is not limited. False:
    /// there is no such node.
    pub fn set_rate(&mut self, node: NodeId, rate: Option<Rate>) -> bool {
        if !self.has(node) {
            return false;
        }
        self.called(Called::SetRate(node, rate));
        let record = &mut self.core.nodes[node.index()];
        record.hold.set_rate(rate, self.core.now);
        record.set_open_to();
        true
    }

    /// Gives up requests of a node whose tags `which` picks: a guest has reset its device, and does not
    /// wait for storage that hangs. Answers their tags; nothing of them will come from
    /// [`poll`](Engine::poll). What has not begun never will. What is in flight runs to its end, whenever
    /// that is: the engine keeps its memory, and its place among [`Limits::requests`](crate::Limits::requests), until then; a read fills memory
    /// that nobody looks at, a write may happen or not. Whatever is submitted later and changes the same
    /// bytes begins only when that write has ended, so that what is old never comes after what is
    /// new; a copy to the disk waits for all such writes.
    ///
    /// Only requests without memory, with a [`Buf`](crate::mem::Buf), or with memory
    /// [that has an owner](crate::sys::ram::Ram::has_owner), which the engine can keep, and no truncations. Others, whose lender has only promised to
    /// leave it there, are not given up, and come from `poll` as ever; and so do those that have ended.
    pub fn abandon(&mut self, node: NodeId, mut which: impl FnMut(u64) -> bool) -> Vec<u64> {
        if !self.has(node) {
            return Vec::new();
        }
        let core = &mut self.core;
        let backend = &mut self.backend;
        let there = core.moved_and_told(node);
        let may_be = |slot: &Slot| {
            let is_its = [node, there].contains(&slot.node) && slot.origin == Origin::Guest;
            let goes_on = !matches!(slot.waits, Waits::Poll | Waits::Free);
            is_its && goes_on && slot.io.kind != IoKind::Truncate
        };
        let slots = core.ops.slots().filter(|(_, slot)| may_be(slot));
        let kept = slots.filter(|&(id, _)| core.mem.guest(id).is_kept());
        let picked = kept.filter(|(_, slot)| which(slot.tag));
        let picked: Vec<(ReqId, Io, u64)> =
            picked.map(|(id, slot)| (id, slot.io, slot.tag)).collect();
        let ids: Vec<ReqId> = picked.iter().map(|&(id, ..)| id).collect();
        backend.note(Note::Called(Called::Abandon(node, &ids)));
        let mut tags = Vec::with_capacity(picked.len());
        for (id, io, tag) in picked {
            tags.push(tag);
            let its = core.ops.slot(id).node;
            let record = &mut core.nodes[its.index()];
            core.abandoned += 1;
            if record.hold.held.contains(&id) {
                record.hold.held.retain(|&held| held != id);
                core.held -= 1;
                core.end_held(id);
                continue;
            }
            let record = &mut core.nodes[there.index()];
            if io.kind.modifies() {
                record.hold.abandoned.push((id, io.offset, io.end()));
            }
            record.set_open_to();
            core.ops.slot_mut(id).origin = Origin::Abandoned;
        }
        tags
    }

    /// What was counted of a node's requests; kept if [`Limits::measure`](crate::Limits::measure)
    /// says so. `None`: there is no such node.
    pub fn node_stats(&self, node: NodeId) -> Option<&NodeStats> {
        self.has(node).then(|| &self.core.nodes[node.index()].stats)
    }

    /// Begins to drain: jobs are cancelled, no more requests are taken, those in flight run to their end, and every
    /// node leaves its image clean and stable, paused ones too. Go on as ever, with `run` and `poll`,
    /// until [`Engine::drained`] answers; `run` once before waiting. While it drains, calling it
    /// again changes nothing.
    ///
    /// Nodes do not wait for each other: the images of some are clean while another's storage
    /// hangs. To have one clean and gone while others go on, [`close`](Engine::close) it.
    pub fn drain(&mut self) {
        self.called(Called::Drain);
        self.cancel_jobs();
        self.life.drain(&mut self.core);
    }

    /// Begins to close a node while others go on: no more requests are taken for it
    /// ([`Why::Closing`]), those in flight run to their end, and it leaves its image clean and stable
    /// and gives back what space was given up, all as [`drain`](Engine::drain) does. Then it goes,
    /// with its files and memory; and so does each layer below it, one after the other, down to the
    /// first that another node reads from. Go on as ever, with `run` and `poll`, until
    /// [`poll_event`](Engine::poll_event) answers [`NodeEvent::Closed`]; `run` once before waiting.
    /// From then on the id is refused ([`Why::NoSuchNode`]), for ever.
    ///
    /// A node that was drained goes as the drain has left it. Where that failed for this node, and has ended, closing tries
    /// once more; then the others take requests again, and [`drained`](Engine::drained) answers `None`.
    ///
    /// Nobody waits for a node that is being closed, and it waits for nobody else: if its storage
    /// hangs it stays, and others go on. Finished requests of it may come from `poll` even after the
    /// event.
    ///
    /// # Errors
    ///
    /// And nothing has changed: [`Why::NoSuchNode`]; [`Why::Closing`], it is being closed already;
    /// [`Why::InUse`], another node reads from it, or a job uses it: close or cancel that first.
    pub fn close(&mut self, node: NodeId) -> Result<(), Why> {
        self.called_of(node, Called::Close(node));
        self.life.close(&mut self.core, node, false)
    }

    /// As [`close`](Engine::close), for a node that was added above one that is a disk by itself: the
    /// nodes below it stay, each open for requests as before.
    ///
    /// # Errors
    ///
    /// As [`close`](Engine::close).
    pub fn close_filter(&mut self, node: NodeId) -> Result<(), Why> {
        self.called_of(node, Called::CloseFilter(node));
        self.life.close(&mut self.core, node, true)
    }

    /// May another node be added that reads from this one? It is there, not being closed nor paused, and no
    /// mirror has taken its place.
    pub fn may_be_read_from(&self, node: NodeId) -> bool {
        let is_there = self.has(node) && !self.core.has_moved(node);
        let record = &self.core.nodes[node.index()];
        is_there && !record.is_closing && !record.is_paused
    }

    /// Is nothing of this node in flight: no request, no chore, nothing on its files? What `poll` has
    /// to give does not count. Also of a node that is not there.
    pub fn is_quiet(&self, node: NodeId) -> bool {
        !self.has(node) || self.life.is_at_rest(&self.core, node.index())
    }

    /// From now on the node takes no requests ([`Why::Paused`]) and begins no work of its own; what
    /// is in flight runs to its end. So do the layers below it that nobody else reads from. When all
    /// have, [`poll_event`](Engine::poll_event) answers
    /// [`NodeEvent::Paused`], and from then until [`resume`](Engine::resume) nothing is read from or
    /// written to their files. What they hold is what a crash would leave: flush first to have in it
    /// what was written. A node that is being drained or closed leaves its image clean, paused or not.
    ///
    /// Requests are refused, not kept: the embedder has a queue, for [`Why::Full`], and a paused
    /// disk shall not take the engine's places from others. Order is as it submits.
    ///
    /// # Errors
    ///
    /// And nothing has changed: [`Why::NoSuchNode`]; [`Why::Closing`]; [`Why::Paused`], it is already;
    /// [`Why::InUse`], a job uses it, or a node that is not paused reads from it.
    pub fn pause(&mut self, node: NodeId) -> Result<(), Why> {
        self.called_of(node, Called::Pause(node));
        self.life.pause(&mut self.core, node)
    }

    /// Ends a [`pause`](Engine::pause): requests are taken again, and what work of the node's own has
    /// become due begins at the next `run`. If it was not paused, nothing changes.
    ///
    /// # Errors
    ///
    /// [`Why::NoSuchNode`]; [`Why::Closing`]; [`Why::InUse`], a layer below is paused by itself: resume
    /// that first.
    pub fn resume(&mut self, node: NodeId) -> Result<(), Why> {
        self.called_of(node, Called::Resume(node));
        self.life.resume(&mut self.core, node)
    }

    /// The files of a node that was closed, when [`poll_event`](Engine::poll_event) has said so and
    /// until the next `run`, in the order in which they were attached; those of layers that went
    /// with it come behind. What is not taken is dropped in that `run`: a loop that may not wait for
    /// files to be closed takes them, and drops them elsewhere.
    pub fn take_files(&mut self, node: NodeId) -> Vec<B::File> {
        self.called(Called::TakeFiles(node));
        self.life.take_files(node)
    }

    /// What happened to a node since it was last asked, oldest first. At most
    /// [`EVENTS_MAX`](crate::events::EVENTS_MAX) of [`NodeEvent::Corrupt`] are kept, the same one
    /// once; none of the others is lost. May answer something new after any `run`.
    pub fn poll_event(&mut self) -> Option<NodeEvent> {
        let event = self.life.poll_event(&mut self.core)?;
        self.called(Called::PollEvent);
        Some(event)
    }
}
