//! A first-in first-out queue of small values, side by side: what waits is a slice.
//!
//! Values are taken from the front by moving a mark. When the end of the memory is reached, those
//! left are moved to its start, if they fill no more than half of it: that is a copy of one value
//! for each that was pushed, at most.

use std::hash::{Hash, Hasher};

/// The queue.
#[derive(Clone, Debug)]
pub(crate) struct Queue<T> {
    values: Vec<T>,
    /// Those before it have been taken.
    front: usize,
}

impl<T: Copy> Queue<T> {
    /// With memory for `capacity` values.
    pub fn with_capacity(capacity: usize) -> Queue<T> {
        Queue { values: Vec::with_capacity(2 * capacity.max(1)), front: 0 }
    }

    #[inline(always)]
    pub fn push(&mut self, value: T) {
        if self.values.len() == self.values.capacity() {
            self.make_room();
        }
        self.values.push(value);
    }

    #[cold]
    fn make_room(&mut self) {
        if self.front * 2 >= self.values.len() {
            self.values.drain(..self.front);
            self.front = 0;
        } else {
            self.values.reserve(self.values.len());
        }
    }

    #[inline(always)]
    pub fn pop(&mut self) -> Option<T> {
        let Some(&value) = self.values.get(self.front) else {
            self.values.clear();
            self.front = 0;
            return None;
        };
        self.front += 1;
        Some(value)
    }

    /// Takes back what was pushed last.
    pub fn pop_back(&mut self) -> Option<T> {
        if self.is_empty() { None } else { self.values.pop() }
    }

    /// Brings the last `n` values to the front.
    pub fn bring_forward(&mut self, n: usize) {
        self.values[self.front..].rotate_right(n);
    }

    /// What waits, oldest first.
    #[inline(always)]
    pub fn as_slice(&self) -> &[T] {
        &self.values[self.front..]
    }

    /// Drops `n` values from the front; no more than there are.
    #[inline]
    pub fn drop_front(&mut self, n: usize) {
        assert!(n <= self.len(), "more are dropped than there are");
        self.front += n;
        if self.front == self.values.len() {
            self.values.clear();
            self.front = 0;
        }
    }

    /// Drops those of the first `n` values that `keeps` does not want; answers how many are left of
    /// them.
    pub fn retain_of(&mut self, n: usize, mut keeps: impl FnMut(T) -> bool) -> usize {
        let (start, end) = (self.front, self.front + n);
        let mut to = start;
        for from in start..end {
            if keeps(self.values[from]) {
                self.values[to] = self.values[from];
                to += 1;
            }
        }
        self.values.drain(to..end);
        to - start
    }

    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.front == self.values.len()
    }

    #[inline(always)]
    pub fn len(&self) -> usize {
        self.values.len() - self.front
    }
}

impl<T: Copy + Hash> Hash for Queue<T> {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.as_slice().hash(h);
    }
}

#[cfg(test)]
mod tests {
    use super::Queue;

    #[test]
    fn values_come_out_in_order_also_after_moving_and_growing() {
        let mut queue = Queue::with_capacity(3);
        let mut next = (0, 0);
        for round in 1..40 {
            for _ in 0..round {
                queue.push(next.0);
                next.0 += 1;
            }
            for _ in 0..round - 1 {
                assert_eq!(queue.pop(), Some(next.1));
                next.1 += 1;
            }
            let waiting: Vec<i32> = (next.1..next.0).collect();
            assert_eq!((queue.as_slice(), queue.len()), (&waiting[..], round));
        }
        queue.drop_front(2);
        next.1 += 2;
        while let Some(value) = queue.pop() {
            assert_eq!(value, next.1);
            next.1 += 1;
        }
        assert_eq!(next.0, next.1);
        assert!(queue.is_empty());
    }

    #[test]
    fn no_more_waiting_than_was_said_never_takes_more_memory() {
        let mut queue = Queue::with_capacity(5);
        let memory = queue.values.capacity();
        (0..4).for_each(|value| queue.push(value));
        for value in 4..1000 {
            queue.push(value);
            assert_eq!(queue.pop(), Some(value - 4));
        }
        assert_eq!(queue.values.capacity(), memory);
    }
}
