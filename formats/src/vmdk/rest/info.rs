//! What a VMDK image is, from its own file.

use std::path::PathBuf;

use crate::chain::Layer;
use crate::format::LayerMeta;
use crate::vmdk::Opened;
use crate::vmdk::disk::descriptor::{Descriptor, Kind, Line, LineKind};
use crate::vmdk::disk::layout::SECTOR_BITS;
use crate::vmdk::rest::open::Extent;

/// What `info` says about VMDK images alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmdkInfo {
    /// The content id.
    pub cid: u32,
    /// The parent's, when this image was made.
    pub parent_cid: u32,
    /// The layout.
    pub kind: Kind,
    /// The extents, as the descriptor lists them.
    pub extents: Vec<VmdkExtent>,
}

/// An extent of a VMDK image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmdkExtent {
    /// Its file; empty for an extent of zeros.
    pub path: PathBuf,
    /// Bytes.
    pub len: u64,
    /// As the descriptor spells it; empty for one that the descriptor is in.
    pub format: &'static str,
    /// Bytes in a grain; `None` for flat extents, and for files that were not opened.
    pub grain_size: Option<u64>,
    /// Are the grains deflated?
    pub compressed: bool,
}

/// What is to be said about a layer; `None` if it is of another format.
pub fn of<F>(layer: &Layer<F>) -> Option<VmdkInfo> {
    let LayerMeta::Vmdk(image) = &layer.meta else { return None };
    let Descriptor { kind, cid, parent_cid, ref lines, .. } = image.descriptor;
    let extents = if image.is_embedded() {
        let path = layer.path.clone();
        let compressed = kind == Kind::StreamOptimized;
        let grain_size = grain_size(image);
        vec![VmdkExtent { path, len: image.size, format: "", grain_size, compressed }]
    } else {
        let (_, files) = image.descriptor.files();
        let part = |(i, line): (usize, &Line)| VmdkExtent {
            path: if files[i] == 0 { PathBuf::new() } else { layer.numbered_path(files[i]) },
            len: image.extents.get(i).map_or(line.sectors << SECTOR_BITS, |extent| extent.len),
            format: match (kind, line.kind) {
                (Kind::Vmfs, LineKind::Flat(_)) => "VMFS",
                (_, LineKind::Flat(_)) => "FLAT",
                (_, LineKind::Sparse) => "SPARSE",
                (_, LineKind::Zero) => "ZERO",
            },
            grain_size: image.extents.get(i).and_then(grain_size_of),
            compressed: image
                .extents
                .get(i)
                .and_then(Extent::sparse)
                .is_some_and(|sparse| sparse.header.is_compressed()),
        };
        lines.iter().enumerate().map(part).collect()
    };
    Some(VmdkInfo { cid, parent_cid, kind, extents })
}

fn grain_size_of(extent: &Extent) -> Option<u64> {
    Some(extent.sparse()?.header.grain_size())
}

/// The grains' size, where all extents that were opened have the same.
pub fn grain_size(image: &Opened) -> Option<u64> {
    let mut sizes = image.extents.iter().map(grain_size_of);
    let first = sizes.next().flatten();
    first.filter(|&first| sizes.all(|size| size == Some(first)))
}
