//! What can be wrong with an image, or with what was asked for.
//!
//! An [`Error`] prints as one clear line without the file's name in front: the command puts that
//! there. Names that come out of an image are untrusted, so control characters in them are
//! escaped before they reach a terminal. Where people know QEMU's wording, it is QEMU's.

use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cowbell_engine::sys::lock::LockError;
use cowbell_engine::units::Errno;

use crate::probe::{Foreign, Format};

/// Why an image was not opened, made, checked or read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The file does not hold an image of this format.
    NotThisFormat(Format),
    /// The file holds an image of a format that is recognised and not handled. Somebody who knows
    /// better can open it as [`Format::Raw`].
    Foreign(Foreign),
    /// The image needs something that is not there; the text names it.
    Unsupported(String),
    /// The image says something impossible.
    Corrupt {
        /// What is wrong.
        what: &'static str,
        /// Where in the file, in bytes.
        at: u64,
    },
    /// Handling this image would take more than we are ready to give.
    Limit(String),
    /// The caller's policy forbids what the image asks for.
    Policy(String),
    /// The image is, directly or not, its own backing file. The path closes the loop.
    BackingLoop(PathBuf),
    /// The backing file could not be opened.
    Backing(Box<Error>),
    /// A file that the image consists of is at fault.
    Part(PathBuf, Box<Error>),
    /// A file could not be opened or made.
    Open {
        /// Which.
        path: PathBuf,
        /// The error number.
        errno: Errno,
        /// The same in words; says more than the number for files of an odd type.
        why: String,
    },
    /// A file could not be locked: another program, or another part of this one, has it open in a
    /// way that does not go together with ours.
    Locked {
        /// Which.
        path: PathBuf,
        /// What stands against it, and whose it is.
        why: LockError,
    },
    /// An operation on an open file failed.
    Io {
        /// What was being done, as in "read the header".
        doing: &'static str,
        /// Why it failed.
        errno: Errno,
    },
    /// The caller asked for something that cannot be.
    Invalid(String),
}

impl Error {
    /// An I/O error, with what was being done.
    pub(crate) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |error| Error::Io { doing, errno: Errno::from_io(&error) }
    }

    /// A file that could not be opened.
    pub(crate) fn open(path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |error| {
            let errno = Errno::from_io(&error);
            let why = error.raw_os_error().map_or(error.to_string(), |_| errno.to_string());
            Error::Open { path, errno, why }
        }
    }

    /// The error number a request gets when this is why it failed.
    pub fn errno(&self) -> Errno {
        match self {
            Error::Io { errno, .. } | Error::Open { errno, .. } => *errno,
            Error::Unsupported(_) | Error::Foreign(_) => Errno::NOT_SUPPORTED,
            Error::Policy(_) => Errno::NOT_PERMITTED,
            Error::Limit(_) => Errno::TOO_BIG,
            Error::Locked { why, .. } => why.errno(),
            Error::Backing(inner) | Error::Part(_, inner) => inner.errno(),
            Error::NotThisFormat(_)
            | Error::Corrupt { .. }
            | Error::BackingLoop(_)
            | Error::Invalid(_) => Errno::INVALID,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The one that QEMU words differently.
            Error::NotThisFormat(Format::Qcow2) => write!(f, "Image is not in qcow2 format"),
            Error::NotThisFormat(format) => {
                write!(f, "Image not in {} format", format.title())
            }
            Error::Unsupported(what) => write!(f, "{what}"),
            Error::Foreign(foreign) => {
                write!(f, "it is a {} image, which is not supported", foreign.title())
            }
            Error::Corrupt { what, at } => write!(f, "{what} (at byte {at:#x} of the file)"),
            Error::Limit(what) | Error::Policy(what) | Error::Invalid(what) => {
                write!(f, "{what}")
            }
            Error::BackingLoop(path) => {
                write!(f, "the backing chain comes back to '{}'", Shown(path))
            }
            Error::Backing(inner) => write!(f, "Could not open backing file: {inner}"),
            Error::Part(path, inner) => write!(f, "'{}': {inner}", Shown(path)),
            Error::Open { path, why, .. } => {
                write!(f, "Could not open '{}': {why}", Shown(path))
            }
            // The lines that scripts look for; then what QEMU does not know.
            Error::Locked { path, why } => {
                write!(f, "{why}")?;
                let LockError::Conflict { holders, .. } = why else { return Ok(()) };
                write!(f, "\nIs another process using the image [{}]?", Shown(path))?;
                for holder in holders {
                    let command = Shown(Path::new(&holder.command));
                    write!(f, "\nProcess {} ({command}) has it open.", holder.pid)?;
                }
                Ok(())
            }
            Error::Io { doing, errno } => write!(f, "Could not {doing}: {errno}"),
        }
    }
}

impl std::error::Error for Error {}

/// A path that may come from an image: one line, control characters escaped, and bytes that are no
/// UTF-8.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a>(pub &'a Path);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.as_os_str().as_bytes().utf8_chunks() {
            for c in chunk.valid().chars() {
                if c.is_control() {
                    write!(f, "{}", c.escape_default())?;
                } else {
                    write!(f, "{c}")?;
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}
