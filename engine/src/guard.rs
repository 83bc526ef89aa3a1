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
    let Some(at) = waits_for else {
        let slot = core.ops.slot(me);
        let seg = match io.kind {
            IoKind::Write { .. } => slot.guest(0, io.len),
            _ => Seg::zeros(0),
        };
        core.issue_request(me, node, io, seg);
        return None;
    };
    let job = &mut core.copies[at];
    job.want(io.offset + safe, io.end());
    job.held_since = job.held_since.or(Some(now));
    let (mut guests, mut waiters) = (std::mem::take(&mut job.guests), job.waiters);
    core.park(me, &mut guests, On::Copy);
    core.wake_first(&mut waiters);
    let job = &mut core.copies[at];
    (job.guests, job.waiters) = (guests, waiters);
    None
}
