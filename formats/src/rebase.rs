//! Which backing file an image names, changed while nobody runs it; and an overlay that has nothing of its
//! own any more.
//!
//! The name is written where the old one does not lie; then one write of the header's first sector
//! makes it the image's. A crash leaves the one or the other.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::probe::Format;
use crate::{qcow2, qed};

/// Makes the image in `file` name this backing file, and say that it is of this format; `None`: no
/// backing file. What the disk holds changes with it, unless the caller has seen to that.
///
/// # Errors
///
/// [`Error::Unsupported`] for a format that names none, or cannot change it; [`Error::Invalid`] if the
/// name does not fit; [`Error::Corrupt`] for an image that is marked so; [`Error::Io`].
pub fn set_backing<F: Store>(
    file: &F,
    format: Format,
    backing: Option<(&Path, &str)>,
) -> Result<(), Error> {
    let name = backing.map(|(name, format)| (name.as_os_str().as_bytes(), format));
    match format {
        Format::Qcow2 => {
            let name = name.map(|(name, format)| (name, format.as_bytes()));
            qcow2::rest::backing::set(file, name)
        }
        Format::Qed => {
            let name = name.map(|(name, format)| (name, format == Format::Raw.name()));
            qed::rest::backing::set(file, name)
        }
        Format::Raw | Format::Vmdk | Format::Vdi => {
            let what = format!("images of format {format} cannot get another backing file");
            Err(Error::Unsupported(what))
        }
    }
}

/// Makes the overlay in `file` say nothing itself: what it shows is its backing file's. The space that
/// it had is given back, and that of snapshots is kept.
///
/// # Errors
///
/// [`Error::Unsupported`] for a format that cannot; [`Error::Corrupt`] for an image that has errors;
/// [`Error::Io`]. The image is then what it was.
pub fn empty<F: Store>(file: &F, format: Format) -> Result<(), Error> {
    match format {
        Format::Qcow2 => qcow2::rest::backing::empty(file),
        Format::Raw | Format::Qed | Format::Vmdk | Format::Vdi => {
            Err(Error::Unsupported(format!("images of format {format} cannot be emptied")))
        }
    }
}
