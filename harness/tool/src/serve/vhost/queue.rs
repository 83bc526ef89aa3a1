//! One virtqueue: what messages have said of it, and the rings in the guest's memory.
//!
//! What is in the guest's memory may be anything, and may change at any time. A ring that cannot be
//! right *breaks* its queue: nothing more is taken from it or put into it until the front end has set
//! it up anew, and whoever waits on its error descriptor is told.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Error, Queue as Rings, QueueOwnedT, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
};

use crate::serve::vhost::inflight::Notes;

/// A guest's memory.
pub type Guest = GuestMemoryMmap;

/// Places in a queue at most.
pub const SIZE_MAX: u16 = 1024;

/// Where the parts of a queue are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places<A> {
    /// The table of descriptors.
    pub table: A,
    /// What the guest has to be done.
    pub available: A,
    /// What was done.
    pub used: A,
}

/// See the module.
#[derive(Debug)]
pub struct Queue {
    /// Places in it.
    size: u16,
    /// Where the first request is taken from.
    base: u16,
    /// As the front end's process counts addresses.
    pub places: Option<Places<u64>>,
    /// Requests are taken from it.
    pub is_enabled: bool,
    /// Written to when something was done.
    call: Option<File>,
    /// Written to when it is broken.
    pub error: Option<File>,
    /// While it runs.
    rings: Option<Rings>,
    is_broken: bool,
    /// There may be requests.
    is_pending: bool,
    /// The guest was asked not to kick.
    is_quiet: bool,
    /// Something was done of which nobody was told.
    has_news: bool,
    in_flight: usize,
    /// What is in flight is noted there.
    notes: Option<Notes>,
    /// What was in flight when another server was killed, by first descriptor: it is done again.
    again: VecDeque<u16>,
}

impl Queue {
    /// One that nothing was said of.
    pub fn new() -> Queue {
        Queue {
            size: SIZE_MAX,
            base: 0,
            places: None,
            is_enabled: false,
            call: None,
            error: None,
            rings: None,
            is_broken: false,
            is_pending: false,
            is_quiet: false,
            has_news: false,
            in_flight: 0,
            notes: None,
            again: VecDeque::new(),
        }
    }

    /// Does it run?
    pub fn is_running(&self) -> bool {
        self.rings.is_some()
    }

    /// Notes what is written to when something was done. That may have been before: so it is now, too.
    pub fn set_call(&mut self, call: Option<File>) {
        notify(call.as_ref());
        self.call = call;
    }

    /// Requests that were taken from it and are not done.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Sets the number of places. False: there can be no such number, or it runs.
    pub fn set_size(&mut self, size: u32) -> bool {
        let size = u16::try_from(size).ok().filter(|&size| size <= SIZE_MAX);
        match size.filter(|size| size.is_power_of_two() && !self.is_running()) {
            Some(size) => self.size = size,
            None => return false,
        }
        true
    }

    /// Sets where the first request is taken from. False: there can be no such place, or it runs.
    pub fn set_base(&mut self, base: u32) -> bool {
        match u16::try_from(base) {
            Ok(base) if !self.is_running() => self.base = base,
            _ => return false,
        }
        true
    }

    /// Places in it.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Begins to run, with what is in flight as the notes have it.
    ///
    /// # Errors
    /// The rings are not, or not wholly, in the guest's memory, or lie askew. Or the notes are another's.
    pub fn start(
        &mut self,
        guest: &Guest,
        places: Places<GuestAddress>,
        event_index: bool,
        mut notes: Option<Notes>,
    ) -> Result<(), Error> {
        let mut rings = <Rings as QueueT>::new(SIZE_MAX)?;
        rings.try_set_size(self.size)?;
        rings.set_event_idx(event_index);
        rings.set_next_avail(self.base);
        rings.set_ready(true);
        place(&mut rings, guest, places)?;
        let used = rings.used_idx(guest, Ordering::Acquire)?;
        rings.set_next_used(used.0);
        self.again.clear();
        if let Some(notes) = &mut notes {
            self.again.extend(notes.open(used.0)?);
            // What was taken was answered, or is to be done again.
            rings.set_next_avail(used.0.wrapping_add(self.again.len() as u16));
        }
        self.notes = notes;
        self.rings = Some(rings);
        (self.is_broken, self.is_quiet, self.has_news) = (false, false, false);
        self.is_pending = true;
        Ok(())
    }

    /// The guest's memory is another one. If the rings are not in it, the queue is broken.
    pub fn moved(&mut self, guest: &Guest, places: Option<Places<GuestAddress>>) {
        let Some(rings) = &mut self.rings else { return };
        if places.is_none_or(|places| place(rings, guest, places).is_err()) {
            self.break_it();
        }
    }

    /// Ends to run, with nothing in flight. Where the next request would have been taken from.
    pub fn stop(&mut self) -> u16 {
        if let Some(rings) = self.rings.take() {
            self.base = rings.next_avail();
        }
        self.notes = None;
        self.again.clear();
        (self.is_pending, self.is_enabled) = (false, false);
        self.base
    }

    /// The guest says that there is something.
    pub fn kicked(&mut self) {
        self.is_pending = true;
    }

    /// May there be something to be taken?
    pub fn is_pending(&self) -> bool {
        self.is_pending && self.is_enabled && !self.is_broken && self.is_running()
    }

    /// Takes the next request. `None`: there is none, and the guest kicks when there is one; or the
    /// queue is broken.
    pub fn take<'a>(&mut self, guest: &'a Guest) -> Option<DescriptorChain<&'a Guest>> {
        match self.try_take(guest) {
            Ok(Some(chain)) => {
                self.in_flight += 1;
                Some(chain)
            }
            Ok(None) => {
                self.is_pending = false;
                None
            }
            Err(_) => {
                self.break_it();
                None
            }
        }
    }

    /// Takes the next request of those that are to be done again.
    pub fn take_again(&mut self, guest: &Guest) -> Option<DescriptorChain<Arc<Guest>>> {
        let head = self.again.pop_front()?;
        match self.chain_of(guest, head) {
            Ok(chain) => {
                self.in_flight += 1;
                Some(chain)
            }
            Err(_) => {
                self.break_it();
                None
            }
        }
    }

    /// The chain that begins with this descriptor. The crate finds chains in rings alone: so there is one
    /// behind the guest's memory, with nothing else in it.
    fn chain_of(&self, guest: &Guest, head: u16) -> Result<DescriptorChain<Arc<Guest>>, Error> {
        const PAGE: u64 = 4096;
        let rings = self.rings.as_ref().ok_or(Error::QueueNotReady)?;
        let end = guest.last_addr().raw_value();
        let at = end.checked_next_multiple_of(PAGE);
        let at = at.filter(|at| at.checked_add(4 * PAGE).is_some()).ok_or(Error::QueueNotReady)?;
        let (available, used) = (GuestAddress(at), GuestAddress(at + PAGE));
        let region = GuestRegionMmap::from_range(available, 4 * PAGE as usize, None);
        let region = Arc::new(region.map_err(|_| Error::QueueNotReady)?);
        let both = guest.insert_region(region).map_err(|_| Error::QueueNotReady)?;
        both.write_obj(1_u16.to_le(), GuestAddress(at + 2)).map_err(Error::GuestMemory)?;
        both.write_obj(head.to_le(), GuestAddress(at + 4)).map_err(Error::GuestMemory)?;
        let mut one = <Rings as QueueT>::new(SIZE_MAX)?;
        one.try_set_size(self.size)?;
        one.set_ready(true);
        let table = GuestAddress(rings.desc_table());
        place(&mut one, &both, Places { table, available, used })?;
        one.iter(Arc::new(both))?.next().ok_or(Error::QueueNotReady)
    }

    fn try_take<'a>(
        &mut self,
        guest: &'a Guest,
    ) -> Result<Option<DescriptorChain<&'a Guest>>, Error> {
        let rings = self.rings.as_mut().ok_or(Error::QueueNotReady)?;
        // After the guest was asked to kick, what has come before is found in the second round.
        for _ in 0..2 {
            if let Some(chain) = rings.iter(guest)?.next() {
                if self.in_flight >= usize::from(self.size) {
                    return Err(Error::InvalidAvailRingIndex);
                }
                if let Some(notes) = &mut self.notes {
                    notes.taken(chain.head_index())?;
                }
                if !self.is_quiet {
                    rings.disable_notification(guest)?;
                    self.is_quiet = true;
                }
                return Ok(Some(chain));
            }
            self.is_quiet = false;
            if !rings.enable_notification(guest)? {
                return Ok(None);
            }
        }
        // It went back.
        Err(Error::InvalidAvailRingIndex)
    }

    /// The request that began with this descriptor is done; so many bytes of its memory were written.
    pub fn done(&mut self, guest: &Guest, head: u16, len: u32) {
        self.in_flight -= 1;
        if self.is_broken {
            return;
        }
        match self.try_answer(guest, head, len) {
            Ok(()) => self.has_news = true,
            Err(_) => self.break_it(),
        }
    }

    fn try_answer(&mut self, guest: &Guest, head: u16, len: u32) -> Result<(), Error> {
        let rings = self.rings.as_mut().ok_or(Error::QueueNotReady)?;
        if let Some(notes) = &self.notes {
            notes.answering(head)?;
        }
        rings.add_used(guest, head, len)?;
        match &self.notes {
            Some(notes) => notes.answered(head, rings.next_used()),
            None => Ok(()),
        }
    }

    /// The request cannot be done: it has no place for an answer.
    pub fn refuse(&mut self) {
        self.in_flight -= 1;
        self.break_it();
    }

    /// Tells the guest once of all that was done since it was last told, if it wants to hear of it.
    pub fn tell(&mut self, guest: &Guest) {
        if !std::mem::take(&mut self.has_news) || self.is_broken {
            return;
        }
        let Some(rings) = &mut self.rings else { return };
        match wants_to_know(rings, guest) {
            Ok(true) => notify(self.call.as_ref()),
            Ok(false) => {}
            Err(_) => self.break_it(),
        }
    }

    fn break_it(&mut self) {
        self.is_broken = true;
        (self.is_pending, self.has_news) = (false, false);
        notify(self.error.as_ref());
    }
}

fn place(rings: &mut Rings, guest: &Guest, places: Places<GuestAddress>) -> Result<(), Error> {
    rings.try_set_desc_table_address(places.table)?;
    rings.try_set_avail_ring_address(places.available)?;
    rings.try_set_used_ring_address(places.used)?;
    if rings.is_valid(guest) { Ok(()) } else { Err(Error::QueueNotReady) }
}

fn wants_to_know(rings: &mut Rings, guest: &Guest) -> Result<bool, Error> {
    if !rings.needs_notification(guest)? {
        return Ok(false);
    }
    if rings.event_idx_enabled() {
        return Ok(true);
    }
    let flags = guest.load::<u16>(GuestAddress(rings.avail_ring()), Ordering::Relaxed);
    let flags = flags.map(u16::from_le).map_err(Error::GuestMemory)?;
    Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

/// Adds one to an eventfd. One that is full says what there is to say.
fn notify(to: Option<&File>) {
    if let Some(mut to) = to {
        let _ = to.write(&1_u64.to_ne_bytes());
    }
}
