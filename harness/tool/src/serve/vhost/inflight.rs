//! What of a queue is in flight, noted in memory that the front end keeps. If the server is killed, the
//! next one gets this memory and does again what was not answered.
//!
//! The layout is the vhost-user specification's for split rings, all numbers in the machine's order:
//!
//! | of a queue | bytes |
//! |---|---|
//! | features (0), version (1), places | 8, 2, 2 |
//! | the last one that was answered | 2 |
//! | the used ring's index when it was noted that this one is done | 2 |
//! | for each descriptor: is a request in flight that begins with it? | 1, and 5 unused |
//! | ... the one that was answered before it | 2 |
//! | ... its number: they are done again in this order | 8 |
//!
//! Requests are answered one by one, so at most one can be in the used ring and still noted as in flight.
//! What is in this memory may be anything.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

use virtio_queue::Error;
use vm_memory::{AtomicAccess, Bytes, GuestAddress};

use crate::serve::vhost::queue::Guest;

const VERSION: u16 = 1;
/// Where a queue's numbers are.
const VERSION_AT: u64 = 8;
const PLACES_AT: u64 = 10;
const LAST_AT: u64 = 12;
const USED_AT: u64 = 14;
/// And those of a descriptor.
const HEADER: u64 = 16;
const DESCRIPTOR: u64 = 16;
const BEFORE_AT: u64 = 6;
const NUMBER_AT: u64 = 8;
/// A queue's notes begin at a multiple of this.
const ALIGN: u64 = 64;

/// Bytes of the notes of a queue with so many places.
pub fn len_of(places: u16) -> u64 {
    (HEADER + u64::from(places) * DESCRIPTOR).next_multiple_of(ALIGN)
}

/// The notes of one queue. See the module.
#[derive(Clone, Debug)]
pub struct Notes {
    memory: Arc<Guest>,
    /// Where they begin.
    at: u64,
    places: u16,
    /// Of the next request.
    number: u64,
}

impl Notes {
    /// The notes of queue `index`, in memory for queues with so many places.
    pub fn new(memory: &Arc<Guest>, index: usize, places: u16) -> Notes {
        Notes { memory: Arc::clone(memory), at: index as u64 * len_of(places), places, number: 0 }
    }

    /// What was in flight when they were last written to, in the order in which it was taken. `used` is the
    /// used ring's index.
    ///
    /// # Errors
    /// They are another version's, or another queue's.
    pub fn open(&mut self, used: u16) -> Result<Vec<u16>, Error> {
        match self.get::<u16>(VERSION_AT)? {
            // New memory.
            0 => {
                self.put(PLACES_AT, self.places)?;
                self.put(USED_AT, used)?;
                self.put(VERSION_AT, VERSION)?;
            }
            VERSION if self.get::<u16>(PLACES_AT)? == self.places => {}
            _ => return Err(Error::QueueNotReady),
        }
        // The last one was put into the used ring, but not yet noted as done.
        if self.get::<u16>(USED_AT)? != used {
            let last = self.get::<u16>(LAST_AT)?;
            self.put::<u8>(self.place(last)?, 0)?;
            self.put(USED_AT, used)?;
        }
        let mut all = Vec::new();
        for head in 0..self.places {
            let at = self.place(head)?;
            if self.get::<u8>(at)? != 0 {
                all.push((self.get::<u64>(at + NUMBER_AT)?, head));
            }
        }
        all.sort_unstable();
        self.number = all.last().map_or(0, |&(number, _)| number.wrapping_add(1));
        Ok(all.into_iter().map(|(_, head)| head).collect())
    }

    /// A request was taken.
    pub fn taken(&mut self, head: u16) -> Result<(), Error> {
        let at = self.place(head)?;
        self.put(at + NUMBER_AT, self.number)?;
        self.number = self.number.wrapping_add(1);
        self.put::<u8>(at, 1)
    }

    /// A request is about to be put into the used ring.
    pub fn answering(&self, head: u16) -> Result<(), Error> {
        self.put(self.place(head)? + BEFORE_AT, self.get::<u16>(LAST_AT)?)?;
        self.put(LAST_AT, head)
    }

    /// It was, and `used` is the ring's index now.
    pub fn answered(&self, head: u16, used: u16) -> Result<(), Error> {
        self.put::<u8>(self.place(head)?, 0)?;
        self.put(USED_AT, used)
    }

    /// Where a descriptor's part begins.
    fn place(&self, head: u16) -> Result<u64, Error> {
        match head < self.places {
            true => Ok(HEADER + u64::from(head) * DESCRIPTOR),
            false => Err(Error::InvalidDescriptorIndex),
        }
    }

    fn get<T: AtomicAccess>(&self, at: u64) -> Result<T, Error> {
        self.memory.load(GuestAddress(self.at + at), Acquire).map_err(Error::GuestMemory)
    }

    /// One after the other: whoever is killed in between has written the first ones.
    fn put<T: AtomicAccess>(&self, at: u64, value: T) -> Result<(), Error> {
        self.memory.store(value, GuestAddress(self.at + at), Release).map_err(Error::GuestMemory)
    }
}
