//! A write to a disk that is copied as it was when the job began: *copy-before-write*.
//!
//! Whoever would change bytes that such a job has not read yet waits until it has, and says that
//! they are wanted, so that they come next; then the write goes on, as a request of its own to the same node:
//!
//! ```text
//! Start ─> all of it read? ── yes ─> the write itself ─> done
//!            ^      └─ no: wanted, and waits ─┐
//!            └──── a worker has read some <───┘
//! ```
//!
//! It waits for reads of the source alone, never for the target; and when the job fails or is
//! cancelled, for nothing.
//!
//! Beside a *mirror* it waits for nothing, but at the very end: until then what it has written is noted, when
//! it has ended, and copied again. When the mirror has become the disk the write goes there.

use crate::copy_job::CopyJob;
use crate::core::Core;
use crate::mutant;
use crate::op::Seg;
use crate::request::{Event, IoKind};
use crate::units::{Errno, ReqId};
use crate::wait::On;

/// Delivers an event; answers when the write has ended, and how.
pub(crate) fn step(
    core: &mut Core,
    me: ReqId,
    key: u32,
    event: Event,
) -> Option<Result<(), Errno>> {
    if let Event::Io(result) = event {
        core.guards.remove(key as usize);
        core.guarded_write_ended(me);
        return Some(result);
    }
    let now = core.now;
    let slot = core.ops.slot_mut(me);
    if event == Event::Start {
        slot.submitted = now;
    }
    let (io, node) = (slot.io, slot.node);
    let mut safe = io.len;
    let before = core.guards[key as usize].safe;
    let ignored = mutant!("guest_writes_before_copy")
        || mutant!("zeros_are_not_copied_first") && !matches!(io.kind, IoKind::Write { .. });
    let mut waits_for = None;
    for (at, job) in core.copies.iter().filter(|(_, job)| job.reads_first(node) && !ignored) {
        let unread = job.first_unread(&core.workers, io.offset + before, io.end());
        if let Some(unread) = unread.map(|unread| unread - io.offset)
            && unread < safe
        {
            (safe, waits_for) = (unread, Some(at));
        }
    }
    core.guards[key as usize].safe = safe;
    let held = |job: &CopyJob| job.mirrors(node) && job.failed.is_none() && job.mirror.holds;
    let holds = core.copies.iter().find(|(_, job)| held(job)).map(|(at, _)| at);
    let holds = holds.filter(|_| !mutant!("mirror_lets_writes_pass"));
    if core.nodes[node.index()].moved_untold.is_some() {
        let mut list = std::mem::take(&mut core.nodes[node.index()].wait_for_move);
        core.park(me, &mut list, On::Copy);
        core.nodes[node.index()].wait_for_move = list;
        return None;
    }
    let Some(at) = waits_for.or(holds) else {
        let slot = core.ops.slot(me);
        let seg = match io.kind {
            IoKind::Write { .. } => slot.guest(0, io.len),
            _ => Seg::zeros(0),
        };
        let stays = mutant!("write_goes_to_what_was_mirrored");
        let there = if stays { node } else { core.moved_and_told(node) };
        core.nodes[node.index()].guarded += u32::from(there == node);
        core.issue_request(me, there, io, seg);
        return None;
    };
    let job = &mut core.copies[at];
    if waits_for.is_some() {
        job.want(io.offset + safe, io.end());
    }
    job.held_since = job.held_since.or(Some(now));
    let (mut guests, mut waiters) = (std::mem::take(&mut job.guests), job.waiters);
    core.park(me, &mut guests, On::Copy);
    core.wake_first(&mut waiters);
    let job = &mut core.copies[at];
    (job.guests, job.waiters) = (guests, waiters);
    None
}
