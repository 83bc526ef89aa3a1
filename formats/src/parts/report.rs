//! What a check of an image is told to do, and what it tells.

use std::fmt;

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing; write nothing.
    None,
    /// Leaks alone: space that nothing refers to is given back.
    Leaks,
    /// All that can be repaired.
    All,
}

/// What a check found. Numbers are those of `qemu-img check`. A *cluster* is a grain in VMDK, and a
/// block in VDI. What a format does not count is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong, and is (still) there.
    pub corruptions: u64,
    /// What was wrong and is repaired.
    pub corruptions_fixed: u64,
    /// Whole clusters that nothing refers to, or refcounts too high, that are (still) there.
    pub leaks: u64,
    /// Those that were given back, or lowered.
    pub leaks_fixed: u64,
    /// VMDK: entries of which the two copies (still) differ, both possible.
    pub stale: u64,
    /// Entries whose copies were made the same.
    pub stale_fixed: u64,
    /// Pieces of tables that could not be read, and refcounts that are nowhere to be found. With any,
    /// nothing is cut, and marks stay.
    pub check_errors: u64,
    /// Clusters in the disk that the guest sees; without VMDK's flat extents.
    pub total_clusters: u64,
    /// Those that are allocated.
    pub allocated_clusters: u64,
    /// QED, qcow2: those of them that do not follow the one before in the same table.
    pub fragmented_clusters: u64,
    /// qcow2: those of them that are compressed.
    pub compressed_clusters: u64,
    /// QED, qcow2: first byte behind the last cluster that is in use, or counted as such.
    pub image_end: u64,
    /// qcow2: the refcounts cannot be repaired in place; [`Repair::All`] makes new ones.
    pub needs_rebuild: bool,
}

impl Report {
    /// Nothing wrong is left, other than leaks.
    pub fn is_sound(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }

    /// Nothing at all is left to complain about.
    pub fn is_clean(&self) -> bool {
        self.is_sound() && self.leaks == 0 && self.stale == 0
    }
}

/// What happens during a check.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// So many of so many tables are done.
    Progress {
        /// Tables done.
        done: u64,
        /// Of so many.
        total: u64,
    },
    /// Something was found, or repaired: a line for people, in QEMU's words where it has some.
    Found(fmt::Arguments<'a>),
}

/// Somebody who watches a check.
pub trait Watch {
    /// Something happens.
    fn event(&mut self, event: Event<'_>);
}

/// Nobody.
#[derive(Clone, Copy, Debug)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn event(&mut self, _: Event<'_>) {}
}
