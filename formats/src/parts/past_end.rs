//! Table entries that led past the file's end when the image was opened.
//!
//! Such an entry is corrupt, and whoever needs it is told so. It must stay so: when the file grows
//! over the place that it names, it would come to lead to another cluster's data. Formats that
//! take new clusters from the file's end (QED, VMDK) therefore replace it in memory, when its table
//! is loaded, with an entry that leads nowhere. What this session wrote is not touched: it may lead
//! past that end, since the file has grown.
//!
//! Tables are loaded and written in *pieces* of a size that the format chooses, numbered over the
//! whole image.

use std::ops::Range;

/// See the module.
#[derive(Clone, Hash, Debug)]
pub(crate) struct PastEnd {
    /// The file's end at open, in the format's unit.
    end: u64,
    /// A bit for each piece: this session has changed it.
    changed: Vec<u64>,
}

impl PastEnd {
    /// For a file that ended at `end` at open, with tables of `pieces` pieces.
    pub fn new(end: u64, pieces: u64) -> PastEnd {
        let mut past_end = PastEnd { end, changed: Vec::new() };
        past_end.extend(pieces);
        past_end
    }

    /// The file's end at open.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// There are `pieces` pieces now: not fewer than before.
    pub fn extend(&mut self, pieces: u64) {
        let words = (pieces.div_ceil(64) as usize).max(self.changed.len());
        self.changed.resize(words, 0);
    }

    /// What these pieces hold on disk is this session's from now on.
    pub fn changed(&mut self, pieces: Range<u64>) {
        for piece in pieces {
            self.changed[(piece / 64) as usize] |= 1 << (piece % 64);
        }
    }

    /// Replaces the entries of `bytes` that lead `past` the end, with all bits set. `bytes` were
    /// loaded, begin with piece `first` and have `piece_bytes` bytes a piece. Was there one?
    pub fn disarm<const ENTRY: usize>(
        &self,
        first: u64,
        piece_bytes: usize,
        bytes: &mut [u8],
        past: impl Fn([u8; ENTRY]) -> bool,
    ) -> bool {
        let mut any = false;
        for (piece, bytes) in (first..).zip(bytes.chunks_mut(piece_bytes)) {
            if self.changed[(piece / 64) as usize] >> (piece % 64) & 1 != 0 {
                continue;
            }
            for entry in bytes.as_chunks_mut::<ENTRY>().0 {
                if past(*entry) {
                    *entry = [0xff; ENTRY];
                    any = true;
                }
            }
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_there_is_replaced() {
        let mut past_end = PastEnd::new(10, 3);
        past_end.changed(1..2);
        let mut bytes: Vec<u8> = [9, 10, 11, 12].repeat(3);
        assert!(past_end.disarm(0, 4, &mut bytes, |[entry]| u64::from(entry) >= past_end.end()));
        assert_eq!(bytes, [9, 255, 255, 255, 9, 10, 11, 12, 9, 255, 255, 255]);
        past_end.extend(1000);
        assert!(!past_end.disarm(1, 4, &mut bytes[4..8], |[entry]| u64::from(entry) >= 10));
        assert!(past_end.disarm(999, 4, &mut bytes[4..8], |[entry]| u64::from(entry) >= 10));
    }
}
