//! A file that remembers what was done to it, and what a crash at any moment may leave of that.

use std::io;
use std::sync::{Arc, Mutex};

use cowbell_engine::store::{Extent, Store};

use super::MemFile;

const SECTOR: usize = 512;

#[derive(Clone, Debug)]
enum Done {
    Write(u64, Vec<u8>),
    Length(u64),
    Flush,
}

/// See the module. Clones share the bytes.
#[derive(Clone, Debug)]
pub struct Logged {
    file: MemFile,
    log: Arc<Mutex<Vec<Done>>>,
}

impl Logged {
    /// A file that holds `bytes`.
    pub fn new(bytes: &[u8]) -> Logged {
        Logged { file: MemFile::new(bytes), log: Arc::default() }
    }

    /// The same of a file that there is.
    pub fn over(file: MemFile) -> Logged {
        Logged { file, log: Arc::default() }
    }

    pub fn file(&self) -> &MemFile {
        &self.file
    }

    fn done(&self, done: Done) {
        self.log.lock().expect("no panics").push(done);
    }

    /// Calls `each` with what crashes may leave of a file that held `old` before: at each write all of
    /// what was not yet stable, none of it, each write alone, all but each, and some sectors of it.
    pub fn crashes(&self, old: &[u8], mut each: impl FnMut(&MemFile, &str)) {
        let log = self.log.lock().expect("no panics").clone();
        let stable = MemFile::new(old);
        let mut pending: Vec<&Done> = Vec::new();
        let mut seed = 1u64;
        for (at, done) in log.iter().enumerate() {
            if !matches!(done, Done::Flush) {
                pending.push(done);
            }
            let n = pending.len();
            let mut leave = |what: &str, keeps: &mut dyn FnMut(usize, usize) -> bool| {
                let left = MemFile::new(&stable.bytes());
                for (i, done) in pending.iter().enumerate() {
                    apply(&left, done, |sector| keeps(i, sector));
                }
                each(&left, &format!("crash at {at} of {}, {what}", log.len()));
            };
            leave("all", &mut |_, _| true);
            // Before a flush that is all there is to see: what comes later has more of the same.
            if matches!(done, Done::Flush) {
                leave("none", &mut |_, _| false);
                for one in 0..n.min(40) {
                    leave(&format!("only {one}"), &mut |i, _| i == one);
                    leave(&format!("all but {one}"), &mut |i, _| i != one);
                }
                for round in 0..8 {
                    leave(&format!("sectors, {round}"), &mut |_, _| {
                        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
                        seed >> 40 & 1 == 0
                    });
                }
                for done in pending.drain(..) {
                    apply(&stable, done, |_| true);
                }
            }
        }
    }
}

fn apply(file: &MemFile, done: &Done, mut keeps: impl FnMut(usize) -> bool) {
    match done {
        Done::Write(at, bytes) => {
            for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                if keeps(i) {
                    file.write_at(at + (i * SECTOR) as u64, sector).expect("memory");
                }
            }
        }
        Done::Length(len) if keeps(0) => file.set_len(*len).expect("memory"),
        Done::Length(_) | Done::Flush => {}
    }
}

impl Store for Logged {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.file.write_at(offset, buf)?;
        self.done(Done::Write(offset, buf.to_vec()));
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.done(Done::Flush);
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)?;
        self.done(Done::Length(len));
        Ok(())
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.allocate(offset, len)?;
        self.done(Done::Length(self.file.len()?));
        Ok(())
    }
    fn extent_at(&self, offset: u64) -> io::Result<Extent> {
        self.file.extent_at(offset)
    }
    fn is_writable(&self) -> bool {
        true
    }
}
