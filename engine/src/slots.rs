//! A request's header: what it wants, where it came from, what it waits for.

use std::hash::{Hash, Hasher};

use crate::op::{Base, OpOwner, Seg};
use crate::request::Io;
use crate::units::{Errno, NodeId, ReqId, Time};
use crate::wait::On;

/// What a request waits for: exactly one thing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Waits {
    /// It is being stepped, or about to be.
    Nothing,
    /// Its ops; their result is an event for its state.
    Io,
    /// Its last ops; their result is its own.
    Last,
    /// As `Last`, of a request that was passed on when it was first seen: it is one op, in its
    /// first place.
    Pass,
    /// A wait list, where others wait for the same.
    List(On),
    /// `Engine::poll`: it has ended.
    Poll,
    /// It is not there.
    Free,
}

/// Where a request came from, and so where its result goes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Origin {
    /// `Engine::submit`.
    Guest,
    /// The same, but nobody waits for it any more: its memory goes when it ends.
    Abandoned,
    /// Nobody: a node's own work.
    Chore,
    /// An op of another request.
    Child(ReqId),
}

/// Why a request is stepped next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Cause {
    /// It is new: its node's driver has yet to say what the first state is.
    Begin,
    /// It is new, and has a state.
    Start,
    /// Its ops have ended; [`Slot::failed`] tells how.
    Io,
    /// Somebody woke it.
    Woken,
}

/// Which machine a request runs on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Work {
    /// Its node's driver.
    Node,
    /// The engine's own, for an op that the file cannot take as it is; the key of its job.
    Align(u32),
    /// The engine's own, for a copy; the key of its worker.
    Copy(u32),
    /// The engine's own, for a write that may have to wait for one; the key of its guard.
    Guard(u32),
}

/// Another request, or none, in four bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Link(u32);

impl Hash for Link {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.get().hash(h);
    }
}

impl Link {
    pub const NONE: Link = Link(u32::MAX);

    #[inline(always)]
    pub fn to(request: ReqId) -> Link {
        Link(request.0)
    }

    #[inline(always)]
    pub fn get(self) -> Option<ReqId> {
        (self != Link::NONE).then_some(ReqId(self.0))
    }
}

/// A request's header. Its state lives beside it, in the engine.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub io: Io,
    pub origin: Origin,
    /// The embedder's name for a guest's request.
    pub tag: u64,
    pub node: NodeId,
    pub work: Work,
    /// Its memory: a guest's own, or a piece of its parent's.
    pub base: Base,
    pub base_off: u32,
    /// The bits set in any address or length of it, as far as alignment cares.
    pub base_bits: u32,
    /// Ops in flight.
    pub pending: u32,
    /// The first error among them; when it has ended: its result.
    pub failed: Option<Errno>,
    /// Has the step that is running issued anything?
    pub issued: bool,
    pub waits: Waits,
    pub label: u8,
    pub cause: Cause,
    /// The next on the wait list this request is on; of a free header: the next free one.
    pub next: Link,
    pub serial: u32,
    pub ordinal: u32,
    pub epoch: u32,
    /// When it was first seen.
    pub submitted: Time,
    /// When it began to wait in its state. Not of a request that was passed on: then, too.
    pub entered: Time,
}

impl Default for Slot {
    fn default() -> Slot {
        Slot {
            io: Io::flush(),
            origin: Origin::Chore,
            tag: 0,
            node: NodeId::default(),
            work: Work::Node,
            base: Base::Zeros,
            base_off: 0,
            base_bits: 0,
            pending: 0,
            failed: None,
            issued: false,
            waits: Waits::Nothing,
            label: 0,
            cause: Cause::Start,
            next: Link::NONE,
            serial: 0,
            ordinal: 0,
            epoch: 0,
            submitted: Time(0),
            entered: Time(0),
        }
    }
}

impl Slot {
    /// `len` bytes of its memory, from byte `off` on.
    #[inline(always)]
    pub fn guest(&self, off: u64, len: u64) -> Seg {
        debug_assert!(off + len <= self.io.len);
        Seg { base: self.base, off: self.base_off + off as u32, len: len as u32 }
    }

    /// Names its next op, for which it waits from now on.
    pub fn next_op(&mut self, me: ReqId) -> OpOwner {
        let owner = OpOwner { request: me, ordinal: self.ordinal };
        self.ordinal += 1;
        self.pending += 1;
        self.issued = true;
        owner
    }

    /// Its ops' joined result, and a clean slate for the next ones.
    #[inline(always)]
    pub fn take_result(&mut self) -> Result<(), Errno> {
        if self.failed.is_some() {
            return Err(self.failed.take().expect("it is"));
        }
        Ok(())
    }

    /// All its ops have ended: that is its next event. Whoever calls this makes it ready.
    #[inline(always)]
    pub fn deliver_io(&mut self) {
        self.waits = Waits::Nothing;
        self.cause = Cause::Io;
    }
}

impl Hash for Slot {
    fn hash<H: Hasher>(&self, h: &mut H) {
        (self.work, self.node, self.io, self.origin, self.tag, self.base, self.base_off).hash(h);
        (self.pending, self.failed, self.waits, self.next).hash(h);
        if self.waits == Waits::Nothing {
            self.cause.hash(h);
        }
    }
}

/// A hasher to which requests are named by the order in which they began, not by where their
/// headers stand: that only tells in which order others ended.
pub(crate) struct Renamed<'a, H> {
    pub names: &'a [ReqId],
    pub inner: &'a mut H,
}

impl<H: Hasher> Hasher for Renamed<'_, H> {
    fn finish(&self) -> u64 {
        self.inner.finish()
    }

    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        self.inner.write(bytes);
    }

    #[inline]
    fn write_u8(&mut self, value: u8) {
        self.inner.write_u8(value);
    }

    #[inline]
    fn write_u32(&mut self, value: u32) {
        self.inner.write_u32(value);
    }

    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.inner.write_u64(value);
    }

    #[inline]
    fn write_usize(&mut self, value: usize) {
        self.inner.write_usize(value);
    }

    /// The id of a request: nothing else is hashed so.
    fn write_u128(&mut self, id: u128) {
        let at = self.names.iter().position(|name| u128::from(name.0) == id);
        // Who is not there any more has no name.
        self.inner.write_usize(at.unwrap_or(usize::MAX));
    }
}
