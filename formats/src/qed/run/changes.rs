//! What a writeback writes of the tables, and what that relies on.

use cowbell_engine::mutant;
use cowbell_engine::step::Cx;
use cowbell_engine::units::FileId;

use crate::parts::growth::Space;
use crate::parts::writeback::{Changes, Phase};
use crate::qed::run::image::{self, Image};
use crate::qed::run::tables::Tables;

/// The changes of an image's tables, on their way to its file.
pub(super) struct TableChanges<'a> {
    pub image: &'a Image,
    /// Is there a backing file? Then an entry replaces its contents by what must be stable.
    pub is_overlay: bool,
    pub tables: &'a mut Tables,
    pub space: &'a mut Space,
}

impl Changes for TableChanges<'_> {
    const FLUSH: u8 = image::FLUSH;

    fn files(&self) -> &[FileId] {
        std::slice::from_ref(&self.image.file)
    }

    fn is_empty(&self) -> bool {
        !self.tables.has_changes() || mutant!("qed_flush_writes_no_tables")
    }

    fn needs_fence(&self) -> bool {
        let is_longer = !self.space.is_stable() && !mutant!("qed_length_not_fenced");
        is_longer || self.is_overlay && !mutant!("qed_backing_not_fenced")
    }

    fn seal(&mut self, cx: &mut Cx<'_>) {
        self.tables.seal(cx);
        self.space.seal();
    }

    fn stable(&mut self) {
        self.space.sealed_is_stable();
    }

    fn write(&mut self, phase: Phase, next: u32, cx: &mut Cx<'_>) -> Option<u32> {
        match phase {
            Phase::Primary => self.tables.write(next, cx),
            Phase::Ahead | Phase::Redundant => None,
        }
    }

    fn unseal(&mut self, written: bool, cx: &mut Cx<'_>) {
        self.tables.unseal(written || mutant!("qed_table_error_ignored"), cx);
    }
}
