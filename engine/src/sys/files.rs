//! The files attached to a backend, by id.

use std::io;

use crate::op::Target;
use crate::ops::OpRecord;
use crate::units::{Errno, FileId};

/// The error of an op on a file that is not attached.
pub(crate) const NOT_ATTACHED: Errno = Errno(libc::EBADF);

/// Attached files. Ids are small: the engine counts them from 0.
#[derive(Debug)]
pub(crate) struct Files<T>(Vec<Option<T>>);

impl<T> Files<T> {
    pub(crate) fn new() -> Files<T> {
        Files(Vec::new())
    }

    pub(crate) fn attach(&mut self, id: FileId, file: T) -> io::Result<()> {
        if id.index() >= self.0.len() {
            self.0.resize_with(id.index() + 1, || None);
        }
        if self.0[id.index()].is_some() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{id:?} is taken")));
        }
        self.0[id.index()] = Some(file);
        Ok(())
    }

    pub(crate) fn detach(&mut self, id: FileId) -> Option<T> {
        self.0.get_mut(id.index())?.take()
    }

    /// All of them.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().flatten()
    }

    #[inline]
    pub(crate) fn get(&self, id: FileId) -> Option<&T> {
        self.0.get(id.index())?.as_ref()
    }

    /// The file that an op is for, if it is for one and that is attached.
    #[inline]
    pub(crate) fn of(&self, record: &OpRecord) -> Option<&T> {
        match record.op.target {
            Target::File(id) => self.get(id),
            _ => None,
        }
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, id: FileId) -> Option<&mut T> {
        self.0.get_mut(id.index())?.as_mut()
    }
}
