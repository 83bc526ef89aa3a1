//! Requests from other threads: a queue for each, bounded both ways, into the one thread that has the
//! engine.
//!
//! A device model that handles each virtqueue on a thread of its own gives each a [`Submitter`]. The
//! engine's thread has the [`Queues`]: it waits for their descriptor beside the engine's, [takes in](Queues::take_in) what
//! was asked, and [hands back](Queues::hand_back) what `poll` gives.
//!
//! ```text
//! Submitter: submit ─> asked ─ kick ─> Queues: take_in ─> Engine::submit
//!            poll  <── ended <─ bell ─ Queues: hand_back <── Engine::poll
//! ```
//!
//! Nothing here waits: locks are held for a few moves, never over a call. The invariant that no wake-up is lost: a
//! descriptor is signalled, under the lock of the list that it is about, when that was empty. The bell is cleared under the
//! same lock, when the list is emptied; the kick before any list is looked at.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slab::Slab;

use super::{Finished, Refused};
use crate::life::Why;
use crate::mem::Mem;
use crate::request::Io;
use crate::sys::syscalls::EventFd;
use crate::units::{Errno, NodeId};

/// Tags of requests from queues have this bit: those of the embedder's own must not.
pub const QUEUED: u64 = 1 << 63;

/// A request on its way to the engine.
#[derive(Debug)]
struct Asked {
    node: NodeId,
    io: Io,
    mem: Mem,
    tag: u64,
}

/// What both ends have.
#[derive(Debug)]
struct Shared {
    lists: Mutex<Lists>,
    depth: usize,
    /// Something has ended.
    bell: EventFd,
    /// Something was asked, of any queue.
    kick: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct Lists {
    asked: VecDeque<Asked>,
    ended: VecDeque<Finished>,
    /// From `submit` to `poll`.
    outstanding: usize,
    /// One of the two ends is no more.
    is_over: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Lists> {
        // Nothing panics while holding it; and if, the lists are still whole.
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of a queue that submits, for any one thread.
///
/// Dropped, its requests run to their end, and nobody is told.
#[derive(Debug)]
pub struct Submitter {
    shared: Arc<Shared>,
}

impl Submitter {
    /// As [`Engine::submit`](crate::Engine::submit), from another thread. `tag` is this queue's own.
    ///
    /// # Errors
    ///
    /// The memory back: [`Why::Full`], as many are outstanding as the queue has places, try again after
    /// [`poll`](Submitter::poll); [`Why::NoSuchNode`], the engine's end is gone. What the engine itself
    /// refuses comes from `poll`, as a failure: see [`Queues::take_in`].
    pub fn submit(
        &mut self,
        node: NodeId,
        io: Io,
        mem: impl Into<Mem>,
        tag: u64,
    ) -> Result<(), Refused> {
        let mem = mem.into();
        let mut lists = self.shared.lock();
        let why = match lists.outstanding {
            _ if lists.is_over => Some(Why::NoSuchNode),
            count if count >= self.shared.depth => Some(Why::Full),
            _ => None,
        };
        if let Some(why) = why {
            return Err(Refused { why, mem });
        }
        lists.outstanding += 1;
        let is_first = lists.asked.is_empty();
        lists.asked.push_back(Asked { node, io, mem, tag });
        if is_first {
            self.shared.kick.signal();
        }
        Ok(())
    }

    /// A request that has ended, oldest first. `None`: none has, now.
    pub fn poll(&mut self) -> Option<Finished> {
        let mut lists = self.shared.lock();
        let ended = lists.ended.pop_front()?;
        lists.outstanding -= 1;
        if lists.ended.is_empty() {
            self.shared.bell.clear();
        }
        Some(ended)
    }

    /// Readable while [`poll`](Submitter::poll) has something to give.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.shared.bell.borrow()
    }

    /// Requests submitted and not polled.
    pub fn outstanding(&self) -> usize {
        self.shared.lock().outstanding
    }
}

impl Drop for Submitter {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        // The other end looks, and forgets the queue.
        self.shared.kick.signal();
    }
}

/// The engine's end of all queues.
#[derive(Debug)]
pub struct Queues {
    queues: Slab<Arc<Shared>>,
    /// Whose the requests in the engine are, and what they are called there.
    tickets: Slab<(usize, u64)>,
    kick: Arc<EventFd>,
    /// Who is asked first next time.
    first: usize,
}

impl Queues {
    /// None yet.
    ///
    /// # Errors
    ///
    /// There are no descriptors left.
    pub fn new() -> io::Result<Queues> {
        let kick = Arc::new(EventFd::new()?);
        Ok(Queues { queues: Slab::new(), tickets: Slab::new(), kick, first: 0 })
    }

    /// One more queue, with room for `depth` requests from `submit` to `poll` (at least 1): its other end.
    ///
    /// # Errors
    ///
    /// There are no descriptors left.
    pub fn add(&mut self, depth: usize) -> io::Result<Submitter> {
        let depth = depth.max(1);
        let lists = Lists {
            asked: VecDeque::with_capacity(depth),
            ended: VecDeque::with_capacity(depth),
            ..Lists::default()
        };
        let (lists, bell) = (Mutex::new(lists), EventFd::new()?);
        let shared = Arc::new(Shared { lists, depth, bell, kick: Arc::clone(&self.kick) });
        self.queues.insert(Arc::clone(&shared));
        Ok(Submitter { shared })
    }

    /// Readable when something was asked: call [`take_in`](Queues::take_in) then.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.kick.borrow()
    }

    /// Hands what was asked to the engine (`submit` is [`Engine::submit`](crate::Engine::submit)), a request of each queue in turn, for as long
    /// as that takes them. True: something is left, because the engine has no room or the disk is paused; call again after
    /// `poll`, or when it is resumed.
    ///
    /// What the engine refuses for another reason ends with [`Errno::SHUT_DOWN`].
    pub fn take_in(
        &mut self,
        mut submit: impl FnMut(NodeId, Io, Mem, u64) -> Result<(), Refused>,
    ) -> bool {
        self.kick.clear();
        let keys: Vec<usize> = self.queues.iter().map(|(key, _)| key).collect();
        let start = keys.iter().position(|&key| key >= self.first).unwrap_or(0);
        let mut turns: VecDeque<usize> =
            keys[start..].iter().chain(&keys[..start]).copied().collect();
        let mut is_left = false;
        while let Some(key) = turns.pop_front() {
            let shared = &self.queues[key];
            let mut lists = shared.lock();
            let Some(Asked { node, io, mem, tag }) = lists.asked.pop_front() else {
                drop(lists);
                self.forget_if_over(key);
                continue;
            };
            drop(lists);
            let ticket = self.tickets.vacant_key();
            match submit(node, io, mem, QUEUED | ticket as u64) {
                Ok(()) => {
                    self.tickets.insert((key, tag));
                    turns.push_back(key);
                }
                Err(Refused { why: why @ (Why::Full | Why::Paused), mem }) => {
                    shared.lock().asked.push_front(Asked { node, io, mem, tag });
                    is_left = true;
                    self.first = key;
                    if why == Why::Full {
                        break;
                    }
                }
                Err(Refused { mem, .. }) => {
                    end(shared, Finished { tag, result: Err(Errno::SHUT_DOWN), mem });
                    turns.push_back(key);
                }
            }
        }
        is_left
    }

    /// Gives a finished request to the queue that it is of. One of the embedder's own comes back.
    pub fn hand_back(&mut self, finished: Finished) -> Option<Finished> {
        if finished.tag & QUEUED == 0 {
            return Some(finished);
        }
        let Some((key, tag)) = self.tickets.try_remove((finished.tag & !QUEUED) as usize) else {
            return Some(finished);
        };
        end(&self.queues[key], Finished { tag, ..finished });
        self.forget_if_over(key);
        None
    }

    /// A queue whose other end is gone goes when nothing of it is left to be done.
    fn forget_if_over(&mut self, key: usize) {
        let lists = self.queues[key].lock();
        let is_done = lists.is_over && lists.asked.is_empty();
        drop(lists);
        if is_done && !self.tickets.iter().any(|(_, &(its, _))| its == key) {
            self.queues.remove(key);
        }
    }

    /// Requests in the engine.
    pub fn in_flight(&self) -> usize {
        self.tickets.len()
    }
}

fn end(shared: &Shared, finished: Finished) {
    let mut lists = shared.lock();
    if lists.is_over {
        return; // nobody waits for it
    }
    let is_first = lists.ended.is_empty();
    lists.ended.push_back(finished);
    if is_first {
        shared.bell.signal();
    }
}

impl Drop for Queues {
    /// Whoever still submits is told so.
    fn drop(&mut self) {
        for (_, shared) in &self.queues {
            shared.lock().is_over = true;
        }
    }
}
