//! How an image takes its space: a new one, and one that has grown.

use std::fmt;

use cowbell_engine::store::Store;

use crate::Format;
use crate::chain::Layer;
use crate::error::Error;
use crate::format::LayerMeta;
use crate::qcow2;
use crate::qcow2::disk::header::Header;
use crate::qcow2::rest::bitmap::{self, Bitmap};

/// How an image takes its space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preallocation {
    /// Not at all: the file is a hole.
    Off,
    /// Not at all, but there is a place for everything. Only qcow2 knows this.
    Metadata,
    /// Reserved by the file system.
    Falloc,
    /// By writing zeros.
    Full,
}

impl fmt::Display for Preallocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        })
    }
}

impl Preallocation {
    /// By its name.
    pub fn from_name(name: &str) -> Option<Preallocation> {
        use Preallocation::{Falloc, Full, Metadata, Off};
        [Off, Metadata, Falloc, Full].into_iter().find(|how| how.to_string() == name)
    }

    /// Can images of this format take the space that they gain so?
    pub fn suits(self, format: Format) -> bool {
        match self {
            Preallocation::Off => true,
            Preallocation::Metadata => format == Format::Qcow2,
            Preallocation::Falloc | Preallocation::Full => {
                matches!(format, Format::Raw | Format::Qcow2 | Format::Vdi)
            }
        }
    }
}

/// What there was of an image before it changed its size.
#[derive(Clone, Debug)]
pub struct Before {
    size: u64,
    /// The length of a data file.
    data: Option<u64>,
    /// The bitmaps of a qcow2 image, and its header.
    bitmaps: Option<(Vec<Bitmap>, Header)>,
}

impl Before {
    /// As it is when it has been opened for writing.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn of<F: Store>(layer: &Layer<F>) -> Result<Before, Error> {
        let len = |file: &F| file.len().map_err(Error::io("find the data file's length"));
        let bitmaps = match &layer.meta {
            LayerMeta::Qcow2(image) => Some((image.bitmaps.clone(), image.header.clone())),
            _ => None,
        };
        Ok(Before { size: layer.size(), data: layer.more.first().map(len).transpose()?, bitmaps })
    }

    /// Can the disk have `size` bytes?
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], [`Error::Corrupt`] or [`Error::Limit`] for a bitmap that cannot follow it.
    pub fn check_resize(&self, size: u64) -> Result<(), Error> {
        let Some((bitmaps, header)) = &self.bitmaps else { return Ok(()) };
        bitmap::check_resize(bitmaps, header, self.size, size)
    }

    /// Has the image bitmaps that somebody may believe?
    pub fn has_bitmaps(&self) -> bool {
        self.bitmaps.as_ref().is_some_and(|(bitmaps, _)| !bitmaps.is_empty())
    }

    /// Can the disk in `layer`, which is to grow and which nobody has written, take its space then?
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] for an image that has errors; [`Error::Io`].
    pub fn check_preallocation<F: Store>(
        &self,
        layer: &Layer<F>,
        how: Preallocation,
    ) -> Result<(), Error> {
        match &layer.meta {
            LayerMeta::Qcow2(_) => qcow2::rest::preallocate::check_preallocation(&layer.file, how),
            _ => Ok(()),
        }
    }

    /// Takes the space that the disk in `layer`, which nobody runs, has gained since.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]: there is no space. A raw image is then as it was before; another has its new
    /// size and no more space than before.
    pub fn preallocate<F: Store>(&self, layer: &Layer<F>, how: Preallocation) -> Result<(), Error> {
        let file = &layer.file;
        match &layer.meta {
            LayerMeta::Raw { size } => {
                let done = preallocate(file, self.size, size.saturating_sub(self.size), how);
                if done.is_err() {
                    file.set_len(self.size).map_err(Error::io("cut the file"))?;
                }
                done.and_then(|()| file.flush().map_err(Error::io("flush the file")))
            }
            LayerMeta::Qcow2(_) => {
                let data = layer.more.first().zip(self.data);
                qcow2::rest::preallocate::preallocate_from(file, data, self.size, how)
            }
            _ => Ok(()),
        }
    }

    /// Bitmaps follow the size that the disk in `layer`, which nobody runs or has written, has now.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]: those bitmaps are not to be believed.
    pub fn resize_bitmaps<F: Store>(&self, layer: &Layer<F>) -> Result<(), Error> {
        match &self.bitmaps {
            Some((bitmaps, _)) => bitmap::resize(&layer.file, bitmaps, self.size),
            None => Ok(()),
        }
    }
}

/// Takes the space of `len` bytes at `at`, which read as zeros.
pub(crate) fn preallocate<F: Store>(
    file: &F,
    at: u64,
    len: u64,
    how: Preallocation,
) -> Result<(), Error> {
    const CHUNK: u64 = 1 << 20;
    match how {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc if len == 0 => {}
        Preallocation::Falloc => {
            file.allocate(at, len).map_err(Error::io("reserve the file's space"))?;
        }
        Preallocation::Full => {
            let zeros = vec![0; CHUNK.min(len) as usize];
            let mut done = 0;
            while done < len {
                let part = CHUNK.min(len - done);
                file.write_at(at + done, &zeros[..part as usize])
                    .map_err(Error::io("write the file's zeros"))?;
                done += part;
            }
        }
    }
    Ok(())
}
