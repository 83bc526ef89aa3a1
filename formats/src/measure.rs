//! How many bytes a new image will take: for an empty disk, and for one that is copied into it.
//!
//! Sizes are QEMU's, to the byte: those of an image that has all the tables which the whole disk needs.
//! Most images have fewer, so that no size is too small.

use cowbell_engine::store::Store;

use crate::chain::Chain;
use crate::create::CreateOptions;
use crate::error::Error;
use crate::format::LayerMeta;
use crate::map::extents;
use crate::preallocation::Preallocation;
use crate::probe::Format;
use crate::qcow2::disk::header::{L1_BYTES_MAX, SECTOR};
use crate::qcow2::disk::layout::Geometry;
use crate::qcow2::rest::bitmap::{self, Bitmap};
use crate::qcow2::rest::create::{
    DEFAULT_CLUSTER_SIZE, DEFAULT_REFCOUNT_BITS, Options, refcount_clusters,
};

/// What a new image will need, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// What it takes when it has been made, and what there is to copy is in it.
    pub required: u64,
    /// What it takes when all of the disk has been written.
    pub fully_allocated: u64,
    /// What the source's bitmaps take besides. `None` if either side cannot have any.
    pub bitmaps: Option<u64>,
}

/// Measures an image of this format for an empty disk of `size` bytes. What `options` say of a size
/// does not count.
///
/// # Errors
///
/// [`Error::Unsupported`] for a format that is not measured; [`Error::Invalid`], naming the option;
/// [`Error::Limit`] if there is no image of that size.
pub fn of_size(format: Format, size: u64, options: &CreateOptions) -> Result<Measure, Error> {
    match format {
        Format::Raw => of_raw(size),
        Format::Qcow2 => {
            let geometry = geometry(options)?;
            let disk = whole_clusters(size, geometry)?;
            Ok(measure(disk, if takes_all(options) { disk } else { 0 }, geometry))
        }
        _ => Err(not_measured(format.name())),
    }
}

/// Measures an image of this format that the disk of `source` will be copied into.
///
/// # Errors
///
/// As [`of_size`]; and what reading the source's tables says.
pub fn of_source<F: Store>(
    format: Format,
    source: &Chain<F>,
    options: &CreateOptions,
) -> Result<Measure, Error> {
    match format {
        Format::Raw => of_raw(source.size()),
        Format::Qcow2 => {
            let geometry = geometry(options)?;
            let disk = whole_clusters(source.size(), geometry)?;
            // How much of the disk the backing file will have is not known: perhaps nothing.
            let all = takes_all(options) || options.backing_file.is_some();
            let data = if all { disk } else { data(source, geometry.cluster_size())? };
            let bitmaps = if options.is_version_2() { None } else { bitmaps_of(source, geometry)? };
            Ok(Measure { bitmaps, ..measure(disk, data, geometry) })
        }
        _ => Err(not_measured(format.name())),
    }
}

/// The format of this name is not measured.
pub fn not_measured(name: &str) -> Error {
    Error::Unsupported(format!("Block driver '{name}' does not support size measurement"))
}

fn of_raw(size: u64) -> Result<Measure, Error> {
    let size = size.checked_next_multiple_of(SECTOR).ok_or_else(too_large)?;
    Ok(Measure { required: size, fully_allocated: size, bitmaps: None })
}

fn too_large() -> Error {
    Error::Limit("The image size is too large (try using a larger cluster size)".into())
}

/// Has the image space for all of the disk from the start?
fn takes_all(options: &CreateOptions) -> bool {
    matches!(options.preallocation, Some(Preallocation::Falloc | Preallocation::Full))
}

/// The geometry of the qcow2 image that `options` ask for.
fn geometry(options: &CreateOptions) -> Result<Geometry, Error> {
    let refcount_bits = options.refcount_bits.unwrap_or(DEFAULT_REFCOUNT_BITS);
    let image = Options {
        cluster_size: options.cluster_size.unwrap_or(DEFAULT_CLUSTER_SIZE),
        refcount_bits,
        extended_l2: options.extended_l2 == Some(true),
        ..Options::default()
    };
    let plan = image.plan()?;
    // Of all that version 2 lacks, QEMU looks at this alone when it measures.
    if options.is_version_2() && refcount_bits != DEFAULT_REFCOUNT_BITS {
        return Err(Error::Invalid(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above \
             (use compat=1.1 or greater)"
                .into(),
        ));
    }
    Ok(plan.header.geometry())
}

/// The disk's size in whole clusters, if an L1 table can map it.
fn whole_clusters(size: u64, geometry: Geometry) -> Result<u64, Error> {
    if geometry.l1_entries(size) > L1_BYTES_MAX / 8 {
        return Err(too_large());
    }
    size.checked_next_multiple_of(geometry.cluster_size()).ok_or_else(too_large)
}

/// An image for `disk` bytes, of which `data` are in it. Both are whole clusters.
fn measure(disk: u64, data: u64, geometry: Geometry) -> Measure {
    let cluster_size = geometry.cluster_size();
    let l2_tables = geometry.l1_entries(disk);
    let l1_clusters = (l2_tables * 8).div_ceil(cluster_size);
    let tables = 1 + l1_clusters + l2_tables;
    let (blocks, table) = refcount_clusters(geometry, tables + disk / cluster_size);
    let metadata = (tables + blocks + table) * cluster_size;
    Measure { required: metadata + data, fully_allocated: metadata + disk, bitmaps: None }
}

/// Bytes of clusters of this size that are not all known to be zeros.
fn data<F: Store>(source: &Chain<F>, cluster_size: u64) -> Result<u64, Error> {
    let (mut clusters, mut next) = (0, 0);
    for extent in extents(source) {
        let extent = extent?;
        if extent.is_zero() {
            continue;
        }
        // The first may be one that the extent before has touched.
        let first = (extent.start / cluster_size).max(next);
        next = (extent.start + extent.len).div_ceil(cluster_size);
        clusters += next.saturating_sub(first);
    }
    Ok(clusters * cluster_size)
}

/// Bytes that the bitmaps of the source take in an image of this geometry; `None` if it is of a kind
/// that has none.
fn bitmaps_of<F: Store>(source: &Chain<F>, geometry: Geometry) -> Result<Option<u64>, Error> {
    let Some(top) = source.layers.first() else { return Ok(None) };
    let LayerMeta::Qcow2(image) = &top.meta else { return Ok(None) };
    if image.geometry().version() < 3 {
        return Ok(None);
    }
    let list = bitmap::read(&top.file, &image.header)?;
    Ok(Some(bitmaps_size(&list, source.size(), geometry.cluster_size())))
}

/// Bytes that these bitmaps of a disk of `size` bytes take, all their bits in the file; with their
/// tables and the directory.
fn bitmaps_size(list: &[Bitmap], size: u64, cluster_size: u64) -> u64 {
    // An image may say that it has many, of a disk that is very large.
    let mut total = 0u64;
    let mut directory = 0;
    for bitmap in list {
        let clusters = bitmap.bits(size).div_ceil(cluster_size * 8);
        let table = (clusters * 8).next_multiple_of(cluster_size);
        total = total.saturating_add(clusters * cluster_size + table);
        directory += bitmap.entry_bytes();
    }
    total.saturating_add(directory.next_multiple_of(cluster_size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::disk::header::Area;

    fn qcow2(size: u64, text: &str) -> Result<Measure, Error> {
        let mut options = CreateOptions::default();
        options.parse(Format::Qcow2, text).expect("valid");
        of_size(Format::Qcow2, size, &options)
    }

    #[test]
    fn an_empty_disk_needs_its_metadata() {
        let cases = [
            (0, "", 196_608, 196_608),
            (1000, "", 327_680, 393_216),
            (1 << 20, "", 327_680, 1_376_256),
            (1 << 20, "preallocation=full,size=3M", 1_376_256, 1_376_256),
            (1 << 20, "cluster_size=4k,refcount_bits=64", 20_480, 1_069_056),
            (1 << 50, "", 171_825_102_848, 1_126_071_731_945_472),
            (128 << 30, "cluster_size=512", 2_737_157_632, 140_176_111_104),
        ];
        for (size, text, required, fully_allocated) in cases {
            let expected = Measure { required, fully_allocated, bitmaps: None };
            assert_eq!(qcow2(size, text), Ok(expected), "{size} {text}");
        }
        let raw = of_size(Format::Raw, i64::MAX as u64, &CreateOptions::default());
        assert_eq!(raw.map(|raw| raw.required), Ok(1 << 63));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (size, text) in [
            (129 << 30, "cluster_size=512"),
            (i64::MAX as u64, "cluster_size=2M"),
            (1, "cluster_size=1000"),
            (1, "refcount_bits=3"),
            (1, "refcount_bits=1,compat=0.10"),
            (1, "extended_l2=on,cluster_size=4k"),
        ] {
            qcow2(size, text).expect_err(text);
        }
        for format in [Format::Qed, Format::Vdi, Format::Vmdk] {
            of_size(format, 1, &CreateOptions::default()).expect_err("it is not measured");
        }
    }

    #[test]
    fn bitmaps_have_bits_tables_and_a_directory() {
        let bitmap = Bitmap {
            name: b"bitmap with a name 1".into(),
            granularity_bits: 9,
            flags: 0,
            table: Area { offset: 0, len: 0 },
            entry_at: 0,
        };
        let list = vec![bitmap; 9];
        for (cluster_size, bytes) in [(512, 51_200), (4096, 114_688), (65_536, 1_245_184)] {
            assert_eq!(bitmaps_size(&list, 20 << 20, cluster_size), bytes);
            assert_eq!(bitmaps_size(&[], 20 << 20, cluster_size), 0);
        }
    }
}
