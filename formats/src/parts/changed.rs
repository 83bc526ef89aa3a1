//! What has changed in memory since a writeback last sealed, and what the writeback under way
//! writes: slots of a cache, or units of a map, by their numbers.

use cowbell_engine::mutant;

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(crate) struct Changed {
    is_changed: Vec<bool>,
    changed: Vec<u32>,
    sealed: Vec<u32>,
}

impl Changed {
    /// Of `count` slots or units.
    pub fn new(count: usize) -> Changed {
        Changed {
            is_changed: vec![false; count],
            changed: Vec::with_capacity(count),
            sealed: Vec::with_capacity(count),
        }
    }

    /// This one has changed. True: it had not since the last seal.
    #[inline]
    pub fn note(&mut self, number: usize) -> bool {
        let is_first = !std::mem::replace(&mut self.is_changed[number], true);
        if is_first {
            self.changed.push(number as u32);
        }
        is_first
    }

    /// Has none changed since the last seal?
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty()
    }

    /// Has this one?
    pub fn contains(&self, number: usize) -> bool {
        self.is_changed[number]
    }

    /// Seals what has changed: nothing is sealed.
    pub fn seal(&mut self) {
        debug_assert!(self.sealed.is_empty());
        std::mem::swap(&mut self.changed, &mut self.sealed);
        for &number in &self.sealed {
            self.is_changed[number as usize] = mutant!("vdi_change_after_seal_lost");
        }
    }

    /// What is sealed.
    pub fn sealed(&self) -> &[u32] {
        &self.sealed
    }

    /// Unseals it. Unless all have been `written` they have changed still. `ended` is told of each that
    /// has not, or has changed again meanwhile: of what was once sealed and once changed it is one less.
    pub fn unseal(&mut self, written: bool, mut ended: impl FnMut(usize)) {
        while let Some(number) = self.sealed.pop() {
            let number = number as usize;
            if mutant!("vdi_change_after_seal_lost") {
                self.is_changed[number] = false;
            }
            if written || !self.note(number) {
                ended(number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Changed;

    #[test]
    fn what_changes_is_sealed_once_and_again_if_it_was_not_written() {
        let mut changed = Changed::new(3);
        // As a pin would be kept.
        let mut pins = [0; 3];
        let note = |changed: &mut Changed, pins: &mut [i32; 3], number: usize| {
            pins[number] += i32::from(changed.note(number));
        };
        [0, 2, 0].into_iter().for_each(|number| note(&mut changed, &mut pins, number));
        changed.seal();
        assert_eq!((changed.sealed(), changed.is_empty()), (&[0, 2][..], true));
        note(&mut changed, &mut pins, 2);
        assert_eq!((pins, changed.contains(0), changed.contains(2)), ([1, 0, 2], false, true));
        changed.unseal(false, |number| pins[number] -= 1);
        assert_eq!((pins, changed.contains(0)), ([1, 0, 1], true));
        changed.seal();
        changed.unseal(true, |number| pins[number] -= 1);
        assert_eq!((pins, changed.is_empty(), changed.sealed().len()), ([0; 3], true, 0));
    }
}
