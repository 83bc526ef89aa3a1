//! Standard input and output in the place of images, as `-`.
//!
//! A raw disk goes to standard output as it is read. Whatever else comes or goes that way is kept in a
//! file for the time of the command, since images are not read, nor written, from front to back.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cowbell_formats::map::read;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use crate::checksum::Checksum;
use crate::copying::Source;
use crate::fail::Fail;
use crate::scratch::Folder;
use crate::stop::Stop;

/// Is standard input or output meant?
pub fn is_pipe(name: &OsStr) -> bool {
    name == "-"
}

/// Bytes at a time.
const PIECE: usize = 1 << 20;
/// Zeros are left out in whole blocks of so many bytes.
const BLOCK: usize = 4096;

/// The images that stand in for standard input and output, until the command ends.
pub struct Pipes {
    folder: Folder,
}

impl Pipes {
    /// None yet. They are kept in the folder for temporary files.
    pub fn new() -> Result<Pipes, Fail> {
        Ok(Pipes { folder: Folder::new_in(&std::env::temp_dir(), "pipe")? })
    }

    /// Where what goes to standard output is made.
    pub fn target(&self) -> PathBuf {
        self.folder.path().join("output")
    }

    /// Takes all that standard input has. `None`: somebody has asked to stop.
    pub fn take_input(&self, stop: &Stop) -> Result<Option<PathBuf>, Fail> {
        let path = self.folder.path().join("input");
        let at = |error: io::Error| Fail::open_io(Path::new("-"), &error);
        let file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(at)?;
        let mut input = io::stdin().lock();
        let (mut len, mut buf) = (0, vec![0; PIECE]);
        loop {
            if stop.is_asked() {
                return Ok(None);
            }
            if !is_ready(&input).map_err(at)? {
                continue;
            }
            // Whole blocks, as far as there are some: what is left out are blocks of zeros.
            let from = (len % BLOCK as u64) as usize;
            let count = input.read(&mut buf[..PIECE - from]).map_err(at)?;
            if count == 0 {
                file.set_len(len).map_err(at)?;
                return Ok(Some(path));
            }
            put(&file, len, &buf[..count]).map_err(at)?;
            len += count as u64;
        }
    }

    /// Writes the target to standard output.
    pub fn give_output(&self) -> Result<(), Fail> {
        let at = |error: io::Error| Fail::open_io(Path::new("-"), &error);
        let mut file = File::open(self.target()).map_err(at)?;
        let mut out = io::stdout().lock();
        io::copy(&mut file, &mut out).map_err(at)?;
        out.flush().map_err(at)
    }
}

/// Is there something to read, or the end? Asked again from time to time.
fn is_ready(input: &io::StdinLock<'_>) -> io::Result<bool> {
    let wait = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
    match poll(&mut [PollFd::new(input, PollFlags::IN)], Some(&wait)) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Writes `bytes` at `at`, but for blocks that are zeros.
fn put(file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    let mut from = 0;
    while from < bytes.len() {
        let end = ((at as usize + from) / BLOCK + 1) * BLOCK - at as usize;
        let block = &bytes[from..end.min(bytes.len())];
        if block.iter().any(|&byte| byte != 0) {
            file.write_all_at(block, at + from as u64)?;
        }
        from += block.len();
    }
    Ok(())
}

/// Writes disks to standard output, one after the other, front to back, and says their checksum. False:
/// somebody has asked to stop.
pub fn raw_to_stdout(
    sources: &[Source],
    mut checksum: Option<Checksum>,
    stop: &Stop,
) -> Result<bool, Fail> {
    let mut out = io::stdout().lock();
    let mut buf = vec![0; PIECE];
    for (image, chain) in sources {
        for at in (0..chain.size()).step_by(PIECE) {
            if stop.is_asked() {
                return Ok(false);
            }
            let len = (chain.size() - at).min(PIECE as u64) as usize;
            read(chain, at, &mut buf[..len]).map_err(|why| {
                Fail::at(&image.given, format!("error while reading at byte {at}: {why}"))
            })?;
            if let Some(sum) = &mut checksum {
                sum.add(&buf[..len]);
            }
            let written = out.write_all(&buf[..len]);
            written.map_err(|error| Fail::open_io(Path::new("-"), &error))?;
        }
    }
    out.flush().map_err(|error| Fail::open_io(Path::new("-"), &error))?;
    if let Some(sum) = checksum {
        sum.end().say(true)?;
    }
    Ok(true)
}
