//! What the engine has, told to whoever watches it: each request as it stands, and what it waits for.
//!
//! Nothing here is kept for that, so nobody pays who does not ask.

use super::Engine;
use crate::backend::Backend;
use crate::copy_job;
use crate::core::Core;
use crate::file_job;
use crate::held::meets;
use crate::op::{OpKind, Target};
use crate::request::Io;
use crate::slots::{Cause, Origin, Slot, Waits, Work};
use crate::step::Driver;
use crate::units::{Errno, NodeId, ReqId};
use crate::wait::On;

/// A request as it stands. See [`Engine::requests`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestInfo {
    /// Its place. Another request has it when this one is gone.
    pub id: ReqId,
    /// Its number in time: the engine counts all requests, those of its own included, from 0 on. Begins
    /// again after 2^32 of them.
    pub number: u32,
    /// The disk, or the layer below one. `None`: the engine's own work on a file.
    pub node: Option<NodeId>,
    /// What is asked for. Its kind says nothing where `apart` says something.
    pub io: Io,
    /// It is the engine's own work for an op like this, which the file cannot take as it is.
    pub apart: Option<OpKind>,
    /// Who asked.
    pub asker: Asker,
    /// The name of its state: one of [`Driver::STATES`], or of the engine's own. `new`: it has not
    /// begun; `held`: it may not begin yet; `ended`: it waits to be polled.
    pub state: &'static str,
    /// What it waits for.
    pub awaits: Awaits,
    /// Of a wait for other requests: one that has to go on first, if that can be told.
    pub keeper: Option<ReqId>,
    /// Who is next on the same wait list.
    pub next: Option<ReqId>,
}

/// Who asked for something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asker {
    /// A guest, who calls it by this tag.
    Guest(u64),
    /// The same, but the guest has [given it up](Engine::abandon).
    GivenUp(u64),
    /// Nobody: it is a disk's own work, or the engine's.
    Nobody,
    /// Another request, whose op it is.
    Request(ReqId),
}

/// What a request waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Awaits {
    /// Nothing: it is about to go on.
    Nothing,
    /// So many ops of its own, requests made for it included.
    Ops(u32),
    /// A flush that another request has asked for, and that will do for this one.
    Flush,
    /// Something that others have.
    List(On),
    /// To be polled: it has ended so.
    Poll(Result<(), Errno>),
}

impl<D: Driver, B: Backend> Engine<D, B> {
    /// The requests that the engine has, in no order: guests', disks' own, and pieces of others. They
    /// are there from their submission until they are polled, or until they end where nobody polls them.
    /// For whoever watches: it takes a look at each place that a request may have.
    pub fn requests(&self) -> impl Iterator<Item = RequestInfo> {
        self.core.ops.slots().map(|(id, slot)| {
            let (awaits, keeper) = self.core.awaits(id, slot);
            let apart = match slot.work {
                Work::Align(key) => self.core.jobs.get(key as usize).map(|job| &job.op),
                _ => None,
            };
            let asker = match slot.origin {
                Origin::Guest => Asker::Guest(slot.tag),
                Origin::Abandoned => Asker::GivenUp(slot.tag),
                Origin::Chore => Asker::Nobody,
                Origin::Child(parent) => Asker::Request(parent),
            };
            RequestInfo {
                id,
                number: slot.serial,
                node: Some(slot.node).filter(|&node| node != NodeId::NONE),
                io: apart.map_or(slot.io, |op| Io { offset: op.offset, len: op.len, ..slot.io }),
                apart: apart.map(|op| op.kind),
                asker,
                state: self.core.state_name(slot, D::STATES),
                awaits,
                keeper,
                next: slot.next.get().filter(|_| matches!(slot.waits, Waits::List(_))),
            }
        })
    }

    /// The number that the next request will have: so many there have been.
    pub fn next_number(&self) -> u32 {
        self.core.serial
    }
}

impl Core {
    fn state_name(&self, slot: &Slot, names: &[&'static str]) -> &'static str {
        match (slot.waits, slot.work) {
            (Waits::Poll, _) => "ended",
            (Waits::List(On::Held), _) => "held",
            (Waits::Nothing, _) if slot.cause == Cause::Begin => "new",
            (_, Work::Node) => names.get(usize::from(slot.label)).copied().unwrap_or("new"),
            (_, Work::Align(key)) => {
                self.jobs.get(key as usize).map_or("take-apart", |job| name_of_job(job.state))
            }
            (_, Work::Copy(key)) => {
                self.workers.get(key as usize).map_or("copy", |worker| name_of_copy(worker.state))
            }
            (_, Work::Guard(_)) => "guard",
        }
    }

    /// What a request waits for, and one that has to go on first.
    fn awaits(&self, id: ReqId, slot: &Slot) -> (Awaits, Option<ReqId>) {
        match slot.waits {
            Waits::Nothing | Waits::Free => (Awaits::Nothing, None),
            Waits::Poll => (Awaits::Poll(slot.failed.map_or(Ok(()), Err)), None),
            Waits::List(on) => (Awaits::List(on), self.keeper(id, slot, on)),
            Waits::Io | Waits::Last | Waits::Pass => match self.flush_for(id) {
                Some(other) => (Awaits::Flush, Some(other)),
                None => (Awaits::Ops(slot.pending), None),
            },
        }
    }

    /// The request of which a flush in flight is that this one waits for, too.
    fn flush_for(&self, id: ReqId) -> Option<ReqId> {
        let file = self.files.iter().find(|file| file.waits_for_flush(id))?;
        let is_it = |kind, target| kind == OpKind::Flush && target == Target::File(file.id);
        let mut flushes = self.ops.iter().filter(|(_, it)| is_it(it.op.kind, it.op.target));
        flushes.next().map(|(_, it)| it.owner.request).filter(|&owner| owner != id)
    }

    fn keeper(&self, id: ReqId, slot: &Slot, on: On) -> Option<ReqId> {
        if on == On::Held {
            let there = self.moved_and_told(slot.node);
            let lists = [slot.node, there].map(|node| &self.nodes[node.index()].hold.abandoned);
            let mut abandoned = lists.into_iter().flatten();
            return abandoned.find(|&&(_, a, b)| meets(&slot.io, a, b)).map(|&(by, ..)| by);
        }
        let Work::Align(key) = slot.work else { return None };
        let job = self.jobs.get(key as usize)?;
        let file = self.files.get(job.file.index())?;
        match on {
            On::Blocks | On::Turn => {
                let by = |claim: &&crate::file::Claim| {
                    claim.owner != id && claim.start < job.op.end() && job.op.offset < claim.end
                };
                let claimed = file.claims.iter().find(by).map(|claim| claim.owner);
                claimed.or(file.gate.closed_by.filter(|&by| by != id))
            }
            On::Quiet => {
                let here = Target::File(file.id);
                let mut others = self.ops.iter().map(|(_, it)| it);
                let other = others.find(|it| it.op.target == here && it.owner.request != id);
                other.map(|it| it.owner.request)
            }
            _ => None,
        }
    }
}

fn name_of_job(state: file_job::State) -> &'static str {
    use file_job::State;
    match state {
        State::Gate => "close-gate",
        State::Quiet => "await-quiet",
        State::GiveBack | State::GiveBackFirst => "give-back",
        State::Claim => "claim-blocks",
        State::Direct => "op",
        State::Quiesce => "await-writes",
        State::Chunk => "bounce-buffer",
        State::ReadChunk { .. } => "read-blocks",
        State::ReadEdges { .. } => "read-edges",
        State::WriteChunk { .. } => "write-blocks",
        State::ZeroWhole { .. } => "zero-blocks",
        State::Trim => "trim",
        State::Settle => "flush-end",
    }
}

fn name_of_copy(state: copy_job::State) -> &'static str {
    use copy_job::State;
    match state {
        State::Piece => "copy-piece",
        State::Status => "copy-status",
        State::Read | State::ReadSector { .. } => "copy-read",
        State::Look => "copy-look",
        State::Write { .. } => "copy-write",
        State::Offload { .. } => "copy-offload",
        State::Again => "copy-again",
        State::Flush => "copy-flush",
    }
}
