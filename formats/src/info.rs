//! What an image is, without opening anything but itself.

use std::path::{Path, PathBuf};

use cowbell_engine::store::Store;

use crate::chain::{Host, Layer, OpenOptions, backing_name, open_layer};
use crate::error::Error;
use crate::format::LayerMeta;
use crate::name::protocol;
use crate::probe::Format;
use crate::qcow2::disk::snapshot_table;
use crate::qcow2::disk::snapshot_table::Snapshot;
use crate::qcow2::rest::bitmap;
use crate::qcow2::rest::bitmap::Bitmap;
use crate::qcow2::rest::crypt::{self, Luks};
use crate::qcow2::{self};
use crate::vmdk;

/// What `info` says about an image. What the file takes on its disk, the host has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The format is a guess.
    pub probed: bool,
    /// The disk's size in bytes.
    pub virtual_size: u64,
    /// The file's length in bytes.
    pub file_len: u64,
    /// Bytes in a cluster; `None` for raw.
    pub cluster_size: Option<u64>,
    /// The backing file's name as the image spells it: untrusted text.
    pub backing_file: Option<PathBuf>,
    /// Where that is, seen from here: the same, if it says more than a path.
    pub full_backing_file: Option<PathBuf>,
    /// The backing file's format as the image spells it: untrusted text, but without control
    /// characters.
    pub backing_format: Option<String>,
    /// The image was not closed cleanly.
    pub dirty: bool,
    /// The disk is encrypted: this is all that can be known of it.
    pub encrypted: bool,
    /// What only qcow2 images have.
    pub qcow2: Option<Qcow2Info>,
    /// What only VMDK images have.
    pub vmdk: Option<vmdk::rest::info::VmdkInfo>,
}

/// What `info` says about qcow2 images alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Info {
    /// The header.
    pub header: qcow2::disk::header::Header,
    /// The internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// The persistent bitmaps.
    pub bitmaps: Vec<Bitmap>,
    /// The LUKS header of an encrypted image, if it has one.
    pub luks: Option<Luks>,
}

/// Opens `path`, and no other file, and says what it is.
///
/// # Errors
///
/// As [`open_layer`].
pub fn info<H: Host>(host: &H, path: &Path, format: Option<Format>) -> Result<Info, Error> {
    info_of(&open_layer(host, path, &OpenOptions { format, ..Default::default() })?)
}

/// What an open layer is.
///
/// # Errors
///
/// [`Error::Io`]; [`Error::Corrupt`] for bad tables of snapshots or bitmaps.
pub fn info_of<F: Store>(layer: &Layer<F>) -> Result<Info, Error> {
    let name = layer.backing_name();
    Ok(Info {
        path: layer.path.clone(),
        format: layer.format,
        probed: layer.probed,
        virtual_size: layer.size(),
        file_len: layer.file.len().map_err(Error::io("find the image's length"))?,
        cluster_size: layer.meta.cluster_size(),
        backing_file: name.map(Path::to_path_buf),
        full_backing_file: name.and_then(|name| full_name(&layer.path, name)),
        backing_format: layer.backing_format_name(),
        dirty: layer.meta.is_dirty(),
        encrypted: match &layer.meta {
            LayerMeta::Qcow2(image) => image.header.encryption.is_some(),
            _ => false,
        },
        qcow2: qcow2_info(layer)?,
        vmdk: vmdk::rest::info::of(layer),
    })
}

fn full_name(overlay: &Path, name: &Path) -> Option<PathBuf> {
    if protocol(name.as_os_str()).is_some() {
        return Some(name.to_path_buf());
    }
    backing_name(overlay, name).ok().map(|name| name.path)
}

fn qcow2_info<F: Store>(layer: &Layer<F>) -> Result<Option<Qcow2Info>, Error> {
    let LayerMeta::Qcow2(image) = &layer.meta else { return Ok(None) };
    Ok(Some(Qcow2Info {
        header: image.header.clone(),
        snapshots: snapshot_table::read(&layer.file, &image.header)?,
        bitmaps: bitmap::read(&layer.file, &image.header)?,
        luks: crypt::luks(&layer.file, &image.header)?,
    }))
}
