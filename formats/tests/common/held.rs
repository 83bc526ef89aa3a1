//! A backend in memory that holds every op until the test lets it go, in whatever order.

use std::io;
use std::os::fd::BorrowedFd;

use cowbell_engine::backend::{Backend, Completion, FileInfo, Harvest, Submission};
use cowbell_engine::op::{Op, OpKind};
use cowbell_engine::units::{Errno, FileId, OpId, Time};

/// One file, in blocks of 4096 bytes, and the ops on it.
#[derive(Debug, Default)]
pub struct Held {
    pub bytes: Vec<u8>,
    /// What is in flight, oldest first.
    pub ops: Vec<(OpId, Op)>,
    /// What the next harvest does, and with what result if it shall fail.
    pub go: Vec<(OpId, Option<Errno>)>,
    /// As a device: it keeps its length, and discards do nothing.
    pub fixed: bool,
}

impl Held {
    /// Lets go of the first op that `which` means; false: there is none.
    pub fn release(&mut self, fail: Option<Errno>, which: impl Fn(&Op) -> bool) -> bool {
        let Some(at) = self.ops.iter().position(|(_, op)| which(op)) else { return false };
        let (id, _) = self.ops.remove(at);
        self.go.push((id, fail));
        true
    }
}

impl Backend for Held {
    type File = Vec<u8>;

    fn attach(&mut self, _: FileId, file: Vec<u8>) -> io::Result<FileInfo> {
        self.bytes = file;
        let len = self.bytes.len() as u64;
        Ok(FileInfo {
            request_align: 4096,
            memory_align: 512,
            hole_align: 4096,
            len,
            can_grow: !self.fixed,
            knows_holes: false,
        })
    }

    fn detach(&mut self, _: FileId) -> Option<Vec<u8>> {
        None
    }

    fn submit(&mut self, submission: &mut Submission<'_>) {
        while let Some((id, record)) = submission.peek() {
            self.ops.push((id, record.op.clone()));
            submission.take(1);
        }
    }

    fn harvest(&mut self, harvest: &mut Harvest<'_>) {
        for (id, fail) in std::mem::take(&mut self.go) {
            let record = &harvest.ops[id];
            let (op, at) = (&record.op, record.offset() as usize);
            let len = record.remaining() as usize;
            let result = match (fail, op.kind) {
                (Some(errno), _) => Err(errno),
                (None, OpKind::Read) => {
                    let len = len.min(self.bytes.len().saturating_sub(at));
                    let from = &self.bytes[at.min(self.bytes.len())..][..len];
                    harvest.mem.scatter(&op.segs, record.moved, from);
                    Ok(len as u64)
                }
                (None, OpKind::Truncate | OpKind::Discard) if self.fixed => Ok(0),
                (None, OpKind::Write { .. }) if self.fixed && at + len > self.bytes.len() => {
                    Err(Errno::NO_SPACE)
                }
                (None, OpKind::Write { .. }) => {
                    self.bytes.resize(self.bytes.len().max(at + len), 0);
                    harvest.mem.gather(&op.segs, record.moved, &mut self.bytes[at..at + len]);
                    Ok(len as u64)
                }
                (None, OpKind::Truncate) => {
                    self.bytes.resize(at, 0);
                    Ok(0)
                }
                (None, OpKind::Zero { .. } | OpKind::Discard) => {
                    self.bytes.resize(self.bytes.len().max(at + len), 0);
                    self.bytes[at..at + len].fill(0);
                    Ok(0)
                }
                (None, _) => Ok(0),
            };
            harvest.done.push(Completion::new(id, result));
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn clock(&self) -> Time {
        Time(0)
    }
}
