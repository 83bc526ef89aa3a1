//! What each format does with an image at rest, in one place. Whoever has an image of any format asks
//! here; one format more is one arm more in each function. (Of a running image, [`Node`] is that
//! place; how one is made is in [`mod@create`], what tells it from others in [`probe`].)
//!
//! [`Node`]: crate::node::Node
//! [`mod@create`]: mod@crate::create
//! [`probe`]: crate::probe

use std::path::{Path, PathBuf};

use cowbell_engine::store::Store;
use cowbell_engine::units::HostOffset;

use crate::chain::{Layer, OpenOptions, path_of};
use crate::error::{Error, Shown};
use crate::map::{self, Holes, How, Kind, Packed};
use crate::parts::access::Access;
use crate::parts::report::{Repair, Report, Watch};
use crate::probe::Format;
use crate::qcow2::disk::layout::Compressed;
use crate::{qcow2, qed, vdi, vmdk};

/// What a format keeps in memory of an open image.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LayerMeta {
    /// Nothing but its size.
    Raw {
        /// The disk's size in bytes: the file's, rounded up to a multiple of 512.
        size: u64,
    },
    /// Header and L1 table.
    Qed(qed::Opened),
    /// Descriptor, extents and their grain directories.
    Vmdk(vmdk::Opened),
    /// Header and tables.
    Qcow2(qcow2::Opened),
    /// Header and block map.
    Vdi(vdi::Opened),
}

impl LayerMeta {
    /// Reads what an image of this format keeps in memory, from its own file.
    pub(crate) fn open<F: Store>(
        file: &F,
        format: Format,
        options: &OpenOptions,
    ) -> Result<LayerMeta, Error> {
        let access = match (options.write, options.ignore_need_check) {
            (false, _) => Access::Read,
            (true, false) => Access::Write,
            (true, true) => Access::WriteUnchecked,
        };
        Ok(match format {
            Format::Raw => {
                let len = file.len().map_err(Error::io("find the image's length"))?;
                let size = len.checked_next_multiple_of(qed::disk::layout::SECTOR);
                let size = size.filter(|&size| size <= i64::MAX as u64);
                LayerMeta::Raw {
                    size: size.ok_or_else(|| Error::Limit(format!("{len} bytes are too many")))?,
                }
            }
            Format::Qed => LayerMeta::Qed(qed::rest::open::open(file, access)?),
            Format::Vmdk => LayerMeta::Vmdk(vmdk::rest::open::open(file)?),
            Format::Vdi => LayerMeta::Vdi(vdi::rest::open::open(file, options.write)?),
            Format::Qcow2 => LayerMeta::Qcow2(qcow2::rest::open::open(file, access)?),
        })
    }

    /// The names of the other files that the image consists of, as it spells them.
    pub fn files(&self) -> Vec<&Path> {
        match self {
            LayerMeta::Raw { .. } | LayerMeta::Qed(_) | LayerMeta::Vdi(_) => Vec::new(),
            LayerMeta::Vmdk(image) => image.files(),
            LayerMeta::Qcow2(image) => {
                image.header.data_file_name().map(path_of).into_iter().collect()
            }
        }
    }

    /// The image's other files, `more`, are open: reads what is in them.
    pub(crate) fn complete<F: Store>(
        &mut self,
        more: &[F],
        options: &OpenOptions,
    ) -> Result<(), Error> {
        match self {
            LayerMeta::Raw { .. } | LayerMeta::Qed(_) | LayerMeta::Vdi(_) => Ok(()),
            LayerMeta::Vmdk(image) => {
                image.complete(more)?;
                if options.write { image.check_writable() } else { Ok(()) }
            }
            LayerMeta::Qcow2(image) => {
                if !options.describe {
                    image.header.refuse_encryption()?;
                }
                if image.header.has_data_file() && more.is_empty() {
                    return Err(Error::Invalid("'data-file' is required for this image".into()));
                }
                Ok(())
            }
        }
    }

    /// The size of the disk, in bytes; a multiple of 512.
    pub fn size(&self) -> u64 {
        match self {
            LayerMeta::Raw { size } => *size,
            LayerMeta::Qed(image) => image.header.image_size,
            LayerMeta::Vmdk(image) => image.size,
            LayerMeta::Qcow2(image) => image.header.disk_size(),
            LayerMeta::Vdi(image) => image.header.size,
        }
    }

    /// See [`Layer::backing_name`].
    pub(crate) fn backing_name(&self) -> Option<&Path> {
        match self {
            LayerMeta::Raw { .. } | LayerMeta::Vdi(_) => None,
            LayerMeta::Qed(image) => image.backing_name.as_deref().map(path_of),
            LayerMeta::Qcow2(image) => image.header.backing_name().map(path_of),
            LayerMeta::Vmdk(image) => image.parent(),
        }
    }

    /// See [`Layer::backing_format`].
    pub(crate) fn backing_format(&self) -> Option<Format> {
        match self {
            LayerMeta::Raw { .. } | LayerMeta::Vdi(_) => None,
            LayerMeta::Qed(image) => {
                let is_raw = image.backing_name.is_some() && image.header.backing_is_raw();
                is_raw.then_some(Format::Raw)
            }
            LayerMeta::Vmdk(image) => image.parent().map(|_| Format::Vmdk),
            LayerMeta::Qcow2(_) => Format::from_name(self.backing_format_name()?.as_str()),
        }
    }

    /// See [`Layer::backing_format_name`].
    pub(crate) fn backing_format_name(&self) -> Option<String> {
        match self {
            LayerMeta::Qcow2(image) => {
                image.header.backing_format().map(|name| Shown(path_of(name)).to_string())
            }
            LayerMeta::Raw { .. } | LayerMeta::Qed(_) | LayerMeta::Vmdk(_) | LayerMeta::Vdi(_) => {
                self.backing_format().map(|format| format.to_string())
            }
        }
    }

    /// What changes whenever the disk does, for those that lie over it; `None`: there is none.
    pub(crate) fn content_id(&self) -> Option<u32> {
        match self {
            LayerMeta::Vmdk(image) => Some(image.descriptor.cid),
            LayerMeta::Raw { .. } | LayerMeta::Qed(_) | LayerMeta::Qcow2(_) | LayerMeta::Vdi(_) => {
                None
            }
        }
    }

    /// Its backing file is open, and has this content id.
    pub(crate) fn found_backing(&mut self, content_id: Option<u32>) {
        match self {
            LayerMeta::Vmdk(image) => {
                image.parent_changed = content_id != Some(image.descriptor.parent_cid);
            }
            LayerMeta::Raw { .. } | LayerMeta::Qed(_) | LayerMeta::Qcow2(_) | LayerMeta::Vdi(_) => {
            }
        }
    }

    /// Is the backing file what it was when the image was made?
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`]: it has been changed.
    pub(crate) fn check_backing(&self) -> Result<(), Error> {
        match self {
            LayerMeta::Vmdk(image) if image.parent_changed => {
                let what = "the parent has changed since this image was made: its CID is another";
                Err(Error::Corrupt { what, at: image.text_at })
            }
            LayerMeta::Raw { .. }
            | LayerMeta::Qed(_)
            | LayerMeta::Qcow2(_)
            | LayerMeta::Vmdk(_)
            | LayerMeta::Vdi(_) => Ok(()),
        }
    }

    /// Bytes in a cluster, grain or block; `None`: it has none.
    pub fn cluster_size(&self) -> Option<u64> {
        match self {
            LayerMeta::Raw { .. } => None,
            LayerMeta::Qed(image) => Some(image.geometry().cluster_size()),
            LayerMeta::Qcow2(image) => Some(image.geometry().cluster_size()),
            LayerMeta::Vdi(image) => Some(image.header.block_size()),
            LayerMeta::Vmdk(image) => vmdk::rest::info::grain_size(image),
        }
    }

    /// Was it not closed cleanly, as far as its header says?
    pub(crate) fn is_dirty(&self) -> bool {
        match self {
            LayerMeta::Raw { .. } | LayerMeta::Vdi(_) | LayerMeta::Vmdk(_) => false,
            LayerMeta::Qed(image) => image.header.needs_check(),
            LayerMeta::Qcow2(image) => image.header.is_dirty(),
        }
    }
}

/// One lookup in one layer: what is at `offset`, for how many bytes, at most `len`, and in which of
/// the layer's files.
pub(crate) fn piece<F: Store>(
    layer: &Layer<F>,
    offset: u64,
    len: u64,
    holes: Holes,
) -> Result<(Kind, u64, usize), Error> {
    let file = &layer.file;
    let (number, (kind, n)) = match &layer.meta {
        LayerMeta::Raw { .. } => (0, map::raw(file, offset, len, holes)?),
        LayerMeta::Qed(image) => (0, qed::rest::map::piece(file, image, offset, len)?),
        LayerMeta::Vdi(image) => (0, vdi::rest::map::piece(file, image, offset, len, holes)?),
        LayerMeta::Vmdk(image) => {
            let extent = image.extent_at(offset);
            let file = layer.numbered(extent.file);
            (extent.file, vmdk::rest::map::piece(file, extent, offset, len, holes)?)
        }
        LayerMeta::Qcow2(image) => {
            let number = usize::from(image.header.has_data_file());
            (number, qcow2::rest::map::lookup(file, image, offset, len)?)
        }
    };
    Ok((kind, n, number))
}

/// Where the cluster lies that [`piece`] says is compressed, in layer number `depth`.
pub(crate) fn packed<F: Store>(layer: &Layer<F>, depth: usize, at: u64) -> Result<Packed, Error> {
    match &layer.meta {
        LayerMeta::Vmdk(image) => {
            let grain = vmdk::rest::grain::packed(image, layer, at)?;
            Ok(Packed {
                start: grain.start,
                len: grain.header.grain_size(),
                depth,
                file: grain.file,
                host: HostOffset(grain.place),
                bytes: grain.bytes(layer)?,
                how: How::Grain { lba: grain.lba },
            })
        }
        LayerMeta::Qcow2(image) => {
            let Compressed { host, bytes } = qcow2::rest::map::packed(&layer.file, image, at)?;
            let len = image.geometry().cluster_size();
            let how = How::Cluster(image.header.compression);
            let start = at & !(len - 1);
            Ok(Packed { start, len, depth, file: 0, host, bytes: bytes.into(), how })
        }
        LayerMeta::Raw { .. } | LayerMeta::Qed(_) | LayerMeta::Vdi(_) => {
            let what = "only qcow2 and VMDK images have compressed clusters";
            Err(Error::Invalid(what.into()))
        }
    }
}

/// Reads what [`piece`] says is compressed.
pub(crate) fn read_compressed<F: Store>(
    layer: &Layer<F>,
    at: u64,
    part: &mut [u8],
) -> Result<(), Error> {
    match &layer.meta {
        LayerMeta::Vmdk(image) => vmdk::rest::grain::read(image, layer, at, part),
        LayerMeta::Qcow2(image) => qcow2::rest::map::read_compressed(&layer.file, image, at, part),
        LayerMeta::Raw { .. } | LayerMeta::Qed(_) | LayerMeta::Vdi(_) => {
            unreachable!("only qcow2 and VMDK images have compressed clusters")
        }
    }
}

/// The names of the other files that an image's header names, as it spells them; none where it cannot
/// be read. VMDK's are not in a header.
pub(crate) fn names_in_header<F: Store>(file: &F, format: Format) -> Vec<PathBuf> {
    match format {
        Format::Raw | Format::Qed | Format::Vmdk | Format::Vdi => Vec::new(),
        Format::Qcow2 => {
            let header = qcow2::rest::open::describe_header(file).ok();
            let name = header.as_ref().and_then(|header| header.data_file_name());
            name.map(|name| path_of(name).to_path_buf()).into_iter().collect()
        }
    }
}

/// Checks an image whose tables are all in one file. `None`: raw has nothing to check, and VMDK is
/// checked whole.
pub(crate) fn check_file<F: Store, W: Watch>(
    file: &F,
    format: Format,
    repair: Repair,
    watch: &mut W,
) -> Result<Option<Report>, Error> {
    match format {
        Format::Raw | Format::Vmdk => Ok(None),
        Format::Qed => qed::rest::check::check(file, repair).map(Some),
        Format::Qcow2 => qcow2::rest::check::check_watched(file, repair, watch).map(Some),
        Format::Vdi => vdi::rest::check::check(file, repair).map(Some),
    }
}
