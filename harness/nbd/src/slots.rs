//! The requests of a client that have been handed out and not finished.

/// What is remembered of one.
#[derive(Clone, Copy, Debug, Hash)]
pub(crate) struct Slot {
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u64,
}

/// See the module.
#[derive(Clone, Debug, Default, Hash)]
pub(crate) struct Slots {
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
}

impl Slots {
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub fn add(&mut self, slot: Slot) -> u32 {
        match self.free.pop() {
            Some(at) => {
                self.slots[at as usize] = Some(slot);
                at
            }
            None => {
                self.slots.push(Some(slot));
                self.slots.len() as u32 - 1
            }
        }
    }

    /// # Panics
    ///
    /// If it has finished already.
    pub fn take(&mut self, at: u32) -> Slot {
        let slot = self.slots.get_mut(at as usize).and_then(Option::take);
        self.free.push(at);
        slot.expect("it was handed out, and has not finished")
    }
}
