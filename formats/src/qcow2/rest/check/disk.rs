//! The refcounts that are on disk: table, blocks, and a small cache of pieces of them.

use std::ops::Range;

use cowbell_engine::store::{Extent, Store};

use crate::error::Error;
use crate::qcow2::disk::header::{OFFSET_MAX, SECTOR};
use crate::qcow2::disk::layout::Geometry;

/// Bits 9 to 63: where a block is.
const OFFSET: u64 = !0x1ff;
/// Pieces of blocks that are kept.
const CACHED: usize = 64;

/// The refcounts of an image.
#[derive(Debug)]
pub struct DiskRefs<'a, F> {
    file: &'a F,
    geometry: Geometry,
    /// The refcount table.
    pub table: Vec<u64>,
    /// Piece `n` of the file is in slot `n % CACHED`, if at all.
    cache: Vec<Option<Piece>>,
}

#[derive(Clone, Debug)]
struct Piece {
    number: u64,
    bytes: Vec<u8>,
    is_dirty: bool,
}

/// Where the refcounts of a run of clusters are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Block {
    /// Nowhere: all are 0.
    None,
    /// In the cluster that starts here.
    At(u64),
    /// The table says that it is where no cluster is.
    Bad(u64),
}

impl<'a, F: Store> DiskRefs<'a, F> {
    /// Those that `table` leads to.
    pub fn new(file: &'a F, geometry: Geometry, table: Vec<u64>) -> Self {
        DiskRefs { file, geometry, table, cache: vec![None; CACHED] }
    }

    /// The block of this index.
    pub fn block(&self, index: u64) -> Block {
        let entry = usize::try_from(index).ok().and_then(|index| self.table.get(index));
        match entry.map_or(0, |entry| entry & OFFSET) {
            0 => Block::None,
            at if self.geometry.is_aligned(at) && at < OFFSET_MAX => Block::At(at),
            at => Block::Bad(at),
        }
    }

    /// The refcount of a cluster; `Ok(None)` if the table is wrong there.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn get(&mut self, cluster: u64) -> Result<Option<u64>, Error> {
        let geometry = self.geometry;
        let at = match self.block(cluster >> geometry.block_bits()) {
            Block::None => return Ok(Some(0)),
            Block::Bad(_) => return Ok(None),
            Block::At(at) => at,
        };
        let (piece, index) = self.place(at, cluster);
        let slot = self.load(piece)?;
        Ok(Some(geometry.refcount(&slot.bytes, index)))
    }

    /// The first cluster from `from` on, but below `end`, that is counted; the clusters are those of
    /// one block, which is there. Holes of the file are left out.
    ///
    /// # Errors
    ///
    /// The clusters whose refcounts could not be read.
    pub fn next(&mut self, from: u64, end: u64) -> Result<Option<u64>, Range<u64>> {
        let geometry = self.geometry;
        let Block::At(at) = self.block(from >> geometry.block_bits()) else { return Ok(None) };
        let start = from & !((1 << geometry.block_bits()) - 1);
        let piece_size = 1 << self.piece_bits();
        let mut cluster = from;
        while cluster < end {
            let (piece, index) = self.place(at, cluster);
            let first = cluster - index as u64;
            let is_cached = self.cache[(piece % CACHED as u64) as usize]
                .as_ref()
                .is_some_and(|p| p.number == piece);
            if !is_cached {
                let hole = self.hole_from(piece * piece_size);
                if hole >= piece_size {
                    // Whole pieces of it, within this block.
                    let per_piece = (piece_size * 8) >> geometry.refcount_order();
                    let skipped = (hole / piece_size).saturating_mul(per_piece);
                    let stop = start + (1 << geometry.block_bits());
                    cluster = first.saturating_add(skipped).min(stop);
                    continue;
                }
            }
            let per_piece = (piece_size * 8) >> geometry.refcount_order();
            let stop = (first + per_piece).min(end);
            let Ok(slot) = self.load(piece) else { return Err(cluster..stop) };
            // From the first word that is not 0.
            let bits = 1 << geometry.refcount_order();
            let per_word = (64 / bits) as u64;
            let words = slot.bytes.as_chunks::<8>().0;
            let skipped =
                words[index / per_word as usize..].iter().position(|word| *word != [0; 8]);
            let Some(skipped) = skipped else {
                cluster = stop;
                continue;
            };
            if skipped > 0 {
                cluster = first + (index as u64 / per_word + skipped as u64) * per_word;
            }
            let word_end = (cluster / per_word + 1) * per_word;
            while cluster < word_end.min(stop) {
                if geometry.refcount(&slot.bytes, (cluster - first) as usize) != 0 {
                    return Ok(Some(cluster));
                }
                cluster += 1;
            }
        }
        Ok(None)
    }

    /// How many bytes of the file are a hole from `at` on.
    fn hole_from(&self, at: u64) -> u64 {
        match self.file.len() {
            Ok(len) if at < len => match self.file.extent_at(at) {
                Ok(Extent { data: false, end }) => end.saturating_sub(at),
                _ => 0,
            },
            _ => 0,
        }
    }

    /// Sets the refcount of a cluster whose block is there, in memory: see [`flush`](Self::flush).
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn set(&mut self, cluster: u64, count: u64) -> Result<(), Error> {
        let geometry = self.geometry;
        let Block::At(at) = self.block(cluster >> geometry.block_bits()) else {
            unreachable!("only refcounts that were read are repaired");
        };
        let (piece, index) = self.place(at, cluster);
        let slot = self.load(piece)?;
        geometry.set_refcount(&mut slot.bytes, index, count);
        slot.is_dirty = true;
        Ok(())
    }

    /// Writes what was set, and makes it stable.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn flush(&mut self) -> Result<(), Error> {
        for i in 0..CACHED {
            self.write_back(i)?;
        }
        self.file.flush().map_err(Error::io("flush the refcounts"))
    }

    /// Bytes in a piece: within a cluster, and at least a sector.
    fn piece_bits(&self) -> u32 {
        self.geometry.cluster_bits().min(16)
    }

    /// The piece that a refcount is in, and its index there.
    fn place(&self, block: u64, cluster: u64) -> (u64, usize) {
        let geometry = self.geometry;
        let index = cluster & ((1 << geometry.block_bits()) - 1);
        let per_piece = 1u64 << (self.piece_bits() + 3 - geometry.refcount_order());
        let piece = (block >> self.piece_bits()) + index / per_piece;
        (piece, (index % per_piece) as usize)
    }

    fn load(&mut self, number: u64) -> Result<&mut Piece, Error> {
        let i = (number % CACHED as u64) as usize;
        if self.cache[i].as_ref().is_none_or(|piece| piece.number != number) {
            self.write_back(i)?;
            let mut bytes = vec![0; 1 << self.piece_bits()];
            let at = number << self.piece_bits();
            self.file.read_at(at, &mut bytes).map_err(Error::io("read a refcount block"))?;
            self.cache[i] = Some(Piece { number, bytes, is_dirty: false });
        }
        Ok(self.cache[i].as_mut().expect("it was just put there"))
    }

    fn write_back(&mut self, i: usize) -> Result<(), Error> {
        let bits = self.piece_bits();
        let Some(piece) = self.cache[i].as_mut().filter(|piece| piece.is_dirty) else {
            return Ok(());
        };
        assert!(piece.bytes.len() as u64 >= SECTOR, "a piece has whole sectors");
        self.file
            .write_at(piece.number << bits, &piece.bytes)
            .map_err(Error::io("repair a refcount block"))?;
        piece.is_dirty = false;
        Ok(())
    }
}
