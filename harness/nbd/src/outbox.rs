//! What is to be sent: headers, and between them the memory of reads, which is not copied.

use std::collections::VecDeque;
use std::io::IoSlice;

use cowbell_engine::mem::Buf;

/// See the module.
#[derive(Clone, Debug, Default, Hash)]
pub(crate) struct Outbox {
    /// All headers that were not sent yet, one after the other, and some before them that were.
    small: Vec<u8>,
    /// Of these, so many bytes were sent.
    small_sent: usize,
    pieces: VecDeque<Piece>,
    /// So much of the first piece was sent.
    sent: usize,
}

#[derive(Clone, Debug, Hash)]
enum Piece {
    /// The next so many bytes of `small`.
    Small(usize),
    /// What was read.
    Mem(Buf),
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Piece::Small(len) => *len,
            Piece::Mem(buf) => buf.len(),
        }
    }
}

impl Outbox {
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Bytes that are no memory of reads.
    pub fn small_len(&self) -> usize {
        self.small.len() - self.small_sent
    }

    #[inline]
    pub fn put(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.small.extend_from_slice(bytes);
        match self.pieces.back_mut() {
            Some(Piece::Small(len)) => *len += bytes.len(),
            _ => self.pieces.push_back(Piece::Small(bytes.len())),
        }
    }

    /// `buf` is not empty.
    #[inline]
    pub fn put_mem(&mut self, buf: Buf) {
        self.pieces.push_back(Piece::Mem(buf));
    }

    /// What to send next, in as many slices as there is room for; answers how many.
    pub fn slices<'a>(&'a self, to: &mut [IoSlice<'a>]) -> usize {
        let (mut skip, mut small) = (self.sent, &self.small[self.small_sent..]);
        let mut count = 0;
        for (piece, to) in self.pieces.iter().zip(to) {
            let bytes = match piece {
                Piece::Small(len) => {
                    // What was sent of the first is before `small` already.
                    let (bytes, rest) = small.split_at(len - skip);
                    small = rest;
                    bytes
                }
                Piece::Mem(buf) => &buf[skip..],
            };
            *to = IoSlice::new(bytes);
            (skip, count) = (0, count + 1);
        }
        count
    }

    /// So many bytes were sent. Memory that was sent whole is given back.
    pub fn sent(&mut self, mut count: usize, mut give_back: impl FnMut(Buf)) {
        while count > 0 {
            let Some(first) = self.pieces.front() else { panic!("more was sent than there was") };
            let now = count.min(first.len() - self.sent);
            if let Piece::Small(_) = first {
                self.small_sent += now;
            }
            (self.sent, count) = (self.sent + now, count - now);
            if self.sent == first.len() {
                self.sent = 0;
                if let Some(Piece::Mem(buf)) = self.pieces.pop_front() {
                    give_back(buf);
                }
            }
        }
        // Moves little: what was sent is at least as much as what is left.
        if self.small_sent * 2 >= self.small.len() {
            self.small.drain(..self.small_sent);
            self.small_sent = 0;
        }
    }

    /// Nothing more is sent: all memory back.
    pub fn clear(&mut self, mut give_back: impl FnMut(Buf)) {
        for piece in self.pieces.drain(..) {
            if let Piece::Mem(buf) = piece {
                give_back(buf);
            }
        }
        self.small.clear();
        (self.small_sent, self.sent) = (0, 0);
    }
}
