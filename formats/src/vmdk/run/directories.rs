//! The grain directories in memory, whole: where the tables are. Those that a stream has at its end
//! are written with it; the others by sectors, from copies.

use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::Cx;
use cowbell_engine::units::RegionId;

use crate::vmdk::disk::layout::{NOWHERE, SECTOR, SECTOR_BITS};
use crate::vmdk::rest::open::{Extent, ExtentKind, SECTOR_ENTRIES, Sparse};
use crate::vmdk::run::extents::Extents;

/// Those of all extents.
#[derive(Clone, Hash, Debug)]
pub(super) struct Directories {
    all: Vec<Directory>,
    copies: RegionId,
    /// Sectors that have changed since the last seal, each by its extent and number; and those that a
    /// writeback writes.
    changed: Vec<(u32, u32)>,
    sealed: Vec<(u32, u32)>,
}

/// An extent's directories: none if it has no tables.
#[derive(Clone, Hash, Debug, Default)]
struct Directory {
    entries: Vec<u32>,
    redundant: Option<Vec<u32>>,
    /// Their first bytes in the file.
    at: u64,
    redundant_at: u64,
    /// Where the copies are, in their region: the redundant one's behind the other's.
    copies_at: usize,
}

impl Directory {
    /// Of an extent whose copies are at `copies_at`. Entries that lead past the file's end lead nowhere.
    fn new(sparse: &mut Sparse, copies_at: usize) -> Directory {
        let (header, opened_end) = (&sparse.header, sparse.grains_end());
        let count = header.directory_entries() as usize;
        let directories = [Some(&mut sparse.directory), sparse.redundant.as_mut()];
        for entry in directories.into_iter().flatten().flat_map(|entries| &mut entries[..count]) {
            if header.table(*entry, opened_end).is_none() {
                *entry = NOWHERE;
            }
        }
        Directory {
            at: header.directory_at << SECTOR_BITS,
            redundant_at: header.redundant_at << SECTOR_BITS,
            entries: std::mem::take(&mut sparse.directory),
            redundant: sparse.redundant.take(),
            copies_at,
        }
    }
}

impl Directories {
    /// Takes those of these extents. `copies` has room for copies.
    pub fn new(extents: &mut [Extent], copies: RegionId) -> Directories {
        let mut copies_at = 0;
        let all = extents.iter_mut().map(|extent| match &mut extent.kind {
            ExtentKind::Sparse(sparse) => {
                let directory = Directory::new(sparse, copies_at);
                let redundant = directory.redundant.as_ref().map_or(0, Vec::len);
                copies_at += 4 * (directory.entries.len() + redundant);
                directory
            }
            ExtentKind::Flat(_) | ExtentKind::Zero => Directory::default(),
        });
        Directories { all: all.collect(), copies, changed: Vec::new(), sealed: Vec::new() }
    }

    /// An entry: a table's sector, 0, or something that cannot be.
    pub fn entry(&self, extent: usize, index: u64) -> u32 {
        self.all[extent].entries[index as usize]
    }

    /// An entry of the redundant one, if there is any.
    pub fn redundant(&self, extent: usize, index: u64) -> Option<u32> {
        self.all[extent].redundant.as_ref().map(|entries| entries[index as usize])
    }

    /// All entries, in whole sectors.
    pub fn entries(&self, extent: usize) -> &[u32] {
        &self.all[extent].entries
    }

    /// Where an entry is in the file.
    pub fn entry_at(&self, extent: usize, index: u64) -> u64 {
        self.all[extent].at + index * 4
    }

    /// There is a table now, and a redundant one if there is such a directory.
    pub fn set(&mut self, extent: usize, index: u64, primary: u32, redundant: u32) {
        self.set_in_stream(extent, index, primary);
        if let Some(entries) = &mut self.all[extent].redundant {
            entries[index as usize] = redundant;
        }
        self.note_changed((extent as u32, (index / SECTOR_ENTRIES) as u32));
    }

    /// As [`Directories::set`], for a directory that is written when the stream ends.
    pub fn set_in_stream(&mut self, extent: usize, index: u64, primary: u32) {
        self.all[extent].entries[index as usize] = primary;
    }

    fn note_changed(&mut self, sector: (u32, u32)) {
        if !self.changed.contains(&sector) {
            self.changed.push(sector);
        }
    }

    pub fn have_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Copies the sectors that have changed.
    pub fn seal(&mut self, cx: &mut Cx<'_>) {
        std::mem::swap(&mut self.changed, &mut self.sealed);
        for &(extent, sector) in &self.sealed {
            let directory = &self.all[extent as usize];
            let both = [Some(&directory.entries), directory.redundant.as_ref()];
            let first = sector as usize * SECTOR_ENTRIES as usize;
            let mut at = directory.copies_at;
            for entries in both.into_iter().flatten() {
                let copy = &mut cx.mem().region_mut(self.copies)[at + 4 * first..];
                let sector = &entries[first..][..SECTOR_ENTRIES as usize];
                copy.as_chunks_mut::<4>().0.iter_mut().zip(sector).for_each(|(to, entry)| {
                    *to = entry.to_le_bytes();
                });
                at += 4 * entries.len();
            }
        }
    }

    /// How many sectors are sealed.
    pub fn sealed(&self) -> usize {
        self.sealed.len()
    }

    /// Writes the copy of the sealed sector number `n`, or that of the redundant
    /// directory; false: there is none.
    pub fn write(&self, n: usize, redundant: bool, extents: &Extents, cx: &mut Cx<'_>) -> bool {
        let (extent, sector) = self.sealed[n];
        let directory = &self.all[extent as usize];
        let (at, copies_at) = match redundant {
            false => (directory.at, directory.copies_at),
            true if directory.redundant.is_none() => return false,
            true => (directory.redundant_at, directory.copies_at + 4 * directory.entries.len()),
        };
        let off = u64::from(sector) * SECTOR;
        let base = Base::Region(self.copies);
        let seg = Seg { base, off: (copies_at as u64 + off) as u32, len: SECTOR as u32 };
        cx.issue(Op::write(extents.get(extent as usize).file, at + off, Segs::one(seg)));
        true
    }

    /// The copies are of no use any more. Unless all have been `written` they are to be written again.
    pub fn unseal(&mut self, written: bool) {
        while let Some(sector) = self.sealed.pop() {
            if !written {
                self.note_changed(sector);
            }
        }
    }

    /// Panics if some are being written. For tests, at rest.
    pub fn assert_idle(&self) {
        assert!(self.sealed.is_empty(), "directories are being written");
    }
}
