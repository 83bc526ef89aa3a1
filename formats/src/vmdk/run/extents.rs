//! The extents of a running image: where on the disk each is, in which file, and how it is kept.

use cowbell_engine::step::{Cx, Event, Step};
use cowbell_engine::units::FileId;

use crate::parts::growth::{FILE_MAX, Growing, Growth, Space};
use crate::parts::units;
use crate::vmdk::disk::layout::{AT_END, Header, SECTOR};
use crate::vmdk::rest::open::{self, ExtentKind};

/// All of them, in the disk's order and without gaps.
#[derive(Clone, Hash, Debug)]
pub(super) struct Extents {
    all: Vec<Extent>,
}

/// An extent.
#[derive(Clone, Hash, Debug)]
pub(super) struct Extent {
    /// Its range on the disk.
    pub start: u64,
    pub end: u64,
    pub file: FileId,
    pub kind: Kind,
}

#[derive(Clone, Hash, Debug)]
pub(super) enum Kind {
    /// As it is, from this byte on.
    Flat(u64),
    /// Zeros. An image with such an extent is not written.
    Zero,
    Sparse(Box<Grains>),
}

impl Extents {
    /// Bytes in the largest grain; 1 if there are none.
    pub fn unit(&self) -> u64 {
        let sparse = self.all.iter().filter_map(Extent::sparse);
        sparse.map(|grains| grains.header.grain_size()).max().unwrap_or(1)
    }
}

impl Extent {
    /// Its tables and grains, if it is sparse.
    #[inline]
    pub fn sparse(&self) -> Option<&Grains> {
        match &self.kind {
            Kind::Sparse(grains) => Some(grains),
            Kind::Flat(_) | Kind::Zero => None,
        }
    }

    #[inline]
    fn sparse_mut(&mut self) -> Option<&mut Grains> {
        match &mut self.kind {
            Kind::Sparse(grains) => Some(grains),
            Kind::Flat(_) | Kind::Zero => None,
        }
    }
}

/// A sparse extent.
#[derive(Clone, Hash, Debug)]
pub(super) struct Grains {
    pub header: Header,
    /// What the cache calls this extent's first table.
    pub first_key: u64,
    /// The directory is on disk only when a stream is closed.
    pub has_footer: bool,
    pub space: Space,
}

/// The geometry of a sparse extent.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub extent: usize,
    /// The first byte on the disk, and one past the last.
    pub start: u64,
    pub end: u64,
    pub grain_bits: u32,
    pub table_bits: u32,
}

impl Place {
    #[inline]
    pub fn grain_size(&self) -> u64 {
        1 << self.grain_bits
    }

    /// The grain in the extent that byte `at` of the disk lies in.
    #[inline]
    pub fn grain_of(&self, at: u64) -> u64 {
        (at - self.start) >> self.grain_bits
    }

    /// The first byte of a grain on the disk.
    #[inline]
    pub fn grain_start(&self, grain: u64) -> u64 {
        self.start + (grain << self.grain_bits)
    }

    /// The table that maps byte `at` of the disk.
    #[inline]
    pub fn table_of(&self, at: u64) -> u64 {
        (at - self.start) >> (self.grain_bits + self.table_bits)
    }

    /// The entry in its table of a grain.
    #[inline]
    pub fn entry_of(&self, grain: u64) -> usize {
        (grain & ((1 << self.table_bits) - 1)) as usize
    }

    /// Where the grains of the table end that maps byte `at`.
    pub fn table_end(&self, at: u64) -> u64 {
        let next = (self.table_of(at) + 1) << (self.grain_bits + self.table_bits);
        self.start.saturating_add(next).min(self.end)
    }

    /// The whole grains in `at..end`. The extent's end counts as the end of its last grain.
    pub fn whole_grains(&self, at: u64, end: u64) -> Option<(u64, u64)> {
        units::whole(at, end, self.grain_size(), self.start..self.end)
    }
}

impl Extents {
    /// Those that were opened, in these files.
    pub fn new(opened: Vec<open::Extent>, files: &[FileId], growth: Growth) -> Extents {
        let mut first_key = 0;
        let all = opened.into_iter().map(|extent| {
            let kind = match extent.kind {
                ExtentKind::Flat(at) => Kind::Flat(at),
                ExtentKind::Zero => Kind::Zero,
                ExtentKind::Sparse(sparse) => {
                    let (has_footer, end) = (sparse.has_footer, sparse.grains_end());
                    // Nothing says which grains of a device are free.
                    let max = if sparse.has_fixed_len { end } else { FILE_MAX };
                    let mut header = sparse.header;
                    if has_footer {
                        // A stream goes on where its directory is, and gets another behind it.
                        header.directory_at = AT_END;
                    }
                    let unit = if header.is_compressed() { SECTOR } else { header.grain_size() };
                    let space = Space::new(end, unit, max, growth);
                    let grains = Grains { header, first_key, has_footer, space };
                    first_key += grains.header.directory_entries();
                    Kind::Sparse(Box::new(grains))
                }
            };
            let (start, end) = (extent.start, extent.start + extent.len);
            Extent { start, end, file: files[extent.file], kind }
        });
        Extents { all: all.collect() }
    }

    /// The number of the one that holds byte `at` of the disk.
    #[inline]
    pub fn index_at(&self, at: u64) -> usize {
        match self.all.len() {
            1 => 0,
            _ => self.all.partition_point(|extent| extent.end <= at),
        }
    }

    #[inline]
    pub fn get(&self, index: usize) -> &Extent {
        &self.all[index]
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// A sparse one.
    #[inline]
    pub fn grains(&self, index: usize) -> &Grains {
        self.all[index].sparse().expect("only sparse extents have tables")
    }

    /// The end of a sparse one's file.
    pub fn space(&mut self, index: usize) -> &mut Space {
        &mut self.all[index].sparse_mut().expect("only sparse extents have tables").space
    }

    /// The ends of the files of all sparse ones.
    pub fn spaces(&mut self) -> impl Iterator<Item = &mut Space> {
        self.all.iter_mut().filter_map(|extent| Some(&mut extent.sparse_mut()?.space))
    }

    /// Is all that was handed out within the files' lengths after any crash?
    pub fn are_stable(&self) -> bool {
        self.all.iter().filter_map(Extent::sparse).all(|grains| grains.space.is_stable())
    }

    #[inline]
    pub fn place(&self, index: usize) -> Place {
        let Extent { start, end, .. } = self.all[index];
        let Header { grain_bits, table_bits, .. } = self.grains(index).header;
        Place { extent: index, start, end, grain_bits, table_bits }
    }

    /// Have the grains of a sparse one to be inflated?
    #[inline]
    pub fn is_compressed(&self, index: usize) -> bool {
        self.grains(index).header.is_compressed()
    }

    /// Can a table say that a grain is zeros?
    pub fn can_say_zero(&self, index: usize) -> bool {
        self.grains(index).header.has_zeroed_grains()
    }

    /// Where the table, or the flat extent, ends that byte `at` is in; in a stream the grain.
    pub fn piece_end(&self, at: u64) -> u64 {
        let index = self.index_at(at);
        let Some(grains) = self.all[index].sparse() else { return self.all[index].end };
        let place = self.place(index);
        match grains.header.is_compressed() {
            true => place.grain_start(place.grain_of(at) + 1).min(place.end),
            false => place.table_end(at),
        }
    }

    /// Bytes in a grain, where all have the same.
    pub fn grain_size(&self) -> Option<u64> {
        let mut sizes = self.all.iter().map(|extent| Some(extent.sparse()?.header.grain_size()));
        let first = sizes.next().flatten();
        first.filter(|&first| sizes.all(|size| size == Some(first)))
    }

    /// The chore that makes a file longer, if one was asked for: whose, and its state.
    pub fn begin_growth(&mut self) -> Option<(u32, Growing)> {
        let mut all = (0..).zip(&mut self.all);
        all.find_map(|(index, extent)| Some((index, extent.sparse_mut()?.space.begin_asked()?)))
    }

    /// A step of that chore.
    pub fn grow(
        &mut self,
        index: u32,
        state: Growing,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Step<Growing> {
        let file = self.all[index as usize].file;
        self.space(index as usize).grow(state, event, Some((file, 0)), cx)
    }

    /// Panics if a file grows, or somebody waits for that. For tests, at rest.
    pub fn assert_idle(&self) {
        self.all.iter().filter_map(Extent::sparse).for_each(|grains| grains.space.assert_idle());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(start: u64, len: u64, file: usize) -> open::Extent {
        open::Extent { start, len, file, kind: ExtentKind::Flat(0) }
    }

    #[test]
    fn a_byte_is_in_one_extent() {
        let opened = vec![flat(0, 512, 1), flat(512, 1024, 0), flat(1536, 512, 1)];
        let files = [FileId(7), FileId(8)];
        let extents = Extents::new(opened, &files, Growth::default());
        let at = |at| extents.get(extents.index_at(at)).file;
        assert_eq!([0, 511, 512, 1535, 1536].map(at), [8, 8, 7, 7, 8].map(FileId));
        assert_eq!([0, 511, 512].map(|at| extents.piece_end(at)), [512, 512, 1536]);
        assert_eq!(extents.grain_size(), None);
    }

    #[test]
    fn the_extents_end_ends_its_last_table() {
        let end = 512 + 3 * 4096 + 1024;
        let place = Place { extent: 1, start: 512, end, grain_bits: 12, table_bits: 1 };
        assert_eq!((place.table_end(512), place.table_end(end - 1)), (512 + 8192, end));
        assert_eq!((place.table_of(end - 1), place.entry_of(place.grain_of(end - 1))), (1, 1));
    }
}
