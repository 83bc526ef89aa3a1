//! What a writeback writes of the tables, and what that relies on: space that was handed out, the
//! content id, and, where there is a parent, data.

use cowbell_engine::mutant;
use cowbell_engine::step::Cx;
use cowbell_engine::units::FileId;

use crate::parts::growth::Space;
use crate::parts::writeback::{Changes, Phase};
use crate::vmdk::run::content_id::ContentId;
use crate::vmdk::run::extents::Extents;
use crate::vmdk::run::image::{self, Image};
use crate::vmdk::run::tables::Tables;

/// The changes of an image's tables, on their way to its files.
pub(super) struct TableChanges<'a> {
    pub image: &'a Image,
    pub extents: &'a mut Extents,
    pub tables: &'a mut Tables,
    pub id: &'a mut ContentId,
}

impl Changes for TableChanges<'_> {
    const FLUSH: u8 = image::FLUSH;

    fn files(&self) -> &[FileId] {
        &self.image.files
    }

    fn is_empty(&self) -> bool {
        !self.tables.have_changed()
    }

    fn needs_fence(&self) -> bool {
        let grown = !self.extents.are_stable() && !mutant!("vmdk_length_not_fenced");
        // An entry replaces the parent's contents.
        let covers = self.image.backing.is_some() && !mutant!("vmdk_parent_not_fenced");
        grown || covers || self.id.needs_fence()
    }

    fn seal(&mut self, cx: &mut Cx<'_>) {
        self.tables.seal(cx);
        self.extents.spaces().for_each(Space::seal);
        self.id.seal();
    }

    fn stable(&mut self) {
        self.extents.spaces().for_each(Space::sealed_is_stable);
        self.id.sealed_is_stable();
    }

    fn write(&mut self, phase: Phase, next: u32, cx: &mut Cx<'_>) -> Option<u32> {
        match phase {
            Phase::Ahead => None,
            Phase::Primary => self.tables.write(false, next, self.extents, cx),
            Phase::Redundant => self.tables.write(true, next, self.extents, cx),
        }
    }

    fn unseal(&mut self, written: bool, cx: &mut Cx<'_>) {
        self.tables.unseal(written, cx);
    }
}
