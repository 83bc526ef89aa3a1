//! A backend that does each op when it is submitted, and waits for it.
//!
//! For programs that have nothing else to do meanwhile, and for tests. The op comes back at the
//! next harvest, as with any backend; there is no descriptor to wait for, because everything
//! submitted is ready at once.

use std::io;
use std::os::fd::BorrowedFd;

use crate::backend::{Backend, Completion, FileInfo, Harvest, Submission};
use crate::sys::disk::DiskFile;
use crate::sys::files::{Files, NOT_ATTACHED};
use crate::sys::job::{Handle, Job, Pieces};
use crate::units::{FileId, Time};

/// Does ops at once. See the module.
#[derive(Debug)]
pub struct Inline {
    files: Files<DiskFile>,
    done: Vec<Completion>,
    pieces: Pieces,
}

impl Inline {
    /// A backend without files.
    pub fn new() -> Inline {
        Inline { files: Files::new(), done: Vec::new(), pieces: Pieces::new() }
    }
}

impl Default for Inline {
    fn default() -> Inline {
        Inline::new()
    }
}

impl Backend for Inline {
    type File = DiskFile;

    fn attach(&mut self, id: FileId, file: DiskFile) -> io::Result<FileInfo> {
        let info = file.info()?;
        self.files.attach(id, file)?;
        Ok(info)
    }

    fn detach(&mut self, id: FileId) -> Option<DiskFile> {
        self.files.detach(id)
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        while let Some(&op) = submission.waiting().first() {
            let record = &submission.ops[op];
            let file = Handle::of(record, |id| self.files.get(id).map(DiskFile::handle));
            let result = match file {
                Some(file) => {
                    let pieces = std::mem::take(&mut self.pieces);
                    let job = Job::new(op, record, file, submission.mem, pieces);
                    // SAFETY: the memory stays where it is while the op is in flight, and this
                    // borrow of it lasts longer than the call.
                    let result = unsafe { job.perform() };
                    self.pieces = job.pieces;
                    result
                }
                None => Err(NOT_ATTACHED),
            };
            submission.take(1);
            self.done.push(Completion::new(op, result));
        }
    }

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
