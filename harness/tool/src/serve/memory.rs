//! The memory of requests: kept when they have finished, for others of the same size, and bounded.

use std::collections::BTreeMap;

use cowbell_engine::mem::{BUF_ALIGN, Buf};

/// See the module.
#[derive(Debug, Default)]
pub struct Pool {
    /// By length.
    free: BTreeMap<usize, Vec<Buf>>,
    /// Bytes of these, about.
    kept: usize,
    /// Bytes given out.
    out: usize,
}

/// Bytes given out, of all clients together, before somebody has to wait.
const OUT_MAX: usize = 256 << 20;
/// Bytes kept for later.
const KEPT_MAX: usize = 64 << 20;
/// So much a client may always have: it goes on whatever others hold.
pub const ALWAYS: usize = 2 << 20;

impl Pool {
    /// Is there memory of `len` bytes to be had?
    pub fn has(&self, len: usize) -> bool {
        self.out + len <= OUT_MAX
    }

    /// Memory of `len` bytes. What is in it is somebody's.
    pub fn take(&mut self, len: usize) -> Buf {
        self.out += len;
        match self.free.get_mut(&len).and_then(Vec::pop) {
            Some(buf) => {
                self.kept -= cost(len);
                buf
            }
            None => Buf::zeroed(len),
        }
    }

    /// It is no longer used.
    pub fn give(&mut self, buf: Buf) {
        let len = buf.len();
        self.out -= len;
        while self.kept + cost(len) > KEPT_MAX {
            // Others, which may not be asked for any more, go first.
            let Some((&other, bufs)) = self.free.iter_mut().find(|(other, _)| **other != len)
            else {
                return;
            };
            if bufs.pop().is_some() {
                self.kept -= cost(other);
            } else {
                self.free.remove(&other);
            }
        }
        self.kept += cost(len);
        self.free.entry(len).or_default().push(buf);
    }
}

/// What keeping a buffer of `len` bytes takes.
fn cost(len: usize) -> usize {
    len + BUF_ALIGN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_used_again_and_not_all_is_kept() {
        let mut pool = Pool::default();
        let first = pool.take(4096);
        let place = first.as_ptr();
        pool.give(first);
        let again = pool.take(4096);
        assert_eq!(again.as_ptr(), place);
        assert!(pool.has(OUT_MAX - 4096) && !pool.has(OUT_MAX - 4095));
        pool.give(again);
        for len in 1..KEPT_MAX / BUF_ALIGN * 2 {
            let buf = pool.take(len % 5000 + 1);
            pool.give(buf);
            let others = (0..3).map(|n| pool.take(n + 1)).collect::<Vec<_>>();
            others.into_iter().for_each(|buf| pool.give(buf));
            assert!(pool.kept <= KEPT_MAX);
        }
        let kept: usize = pool.free.iter().map(|(&len, bufs)| cost(len) * bufs.len()).sum();
        assert_eq!((pool.kept, pool.out), (kept, 0));
    }
}
