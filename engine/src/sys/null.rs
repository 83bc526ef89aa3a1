//! A backend that does nothing, as fast as that can be done: for measuring what the engine costs.
//!
//! Every op succeeds in full at the next harvest. Memory is left as it is.

use std::io;
use std::os::fd::BorrowedFd;

use crate::backend::{Backend, Completion, FileInfo, Harvest, Submission};
use crate::sys::files::Files;
use crate::units::{FileId, Time};

/// A pretended file.
#[derive(Clone, Copy, Debug)]
pub struct NullFile {
    /// What it claims to be.
    pub info: FileInfo,
}

/// Completes everything. See the module.
#[derive(Debug)]
pub struct Null {
    files: Files<NullFile>,
    done: Vec<Completion>,
}

impl Null {
    /// A backend without files.
    pub fn new() -> Null {
        Null { files: Files::new(), done: Vec::new() }
    }
}

impl Default for Null {
    fn default() -> Null {
        Null::new()
    }
}

impl Backend for Null {
    type File = NullFile;

    fn attach(&mut self, id: FileId, file: NullFile) -> io::Result<FileInfo> {
        self.files.attach(id, file)?;
        Ok(file.info)
    }

    fn detach(&mut self, id: FileId) -> Option<NullFile> {
        self.files.detach(id)
    }

    #[inline]
    fn submit(&mut self, submission: &mut Submission<'_>) {
        let ops = submission.ops;
        self.done.extend(submission.waiting().iter().map(|&op| {
            let record = &ops[op];
            let moved = if record.op.kind.has_memory() { record.remaining() } else { 0 };
            Completion::new(op, Ok(moved))
        }));
        submission.take(submission.len());
    }

    #[inline]
    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        harvest.done.append(&mut self.done);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn clock(&self) -> Time {
        crate::sys::clock()
    }
}
