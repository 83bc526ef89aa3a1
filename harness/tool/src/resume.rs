//! `--resume`: what is known of a target that is not whole, in a file beside it, so that a later command
//! goes on where one was ended.
//!
//! `NAME.partial.resume` says of which source, with which options, `NAME.partial` is made, and up to
//! which byte of the disk all is there and *stable*. That is written when a flush of the target has
//! ended, about the bytes that had been copied before it began: a note is never ahead of the data. The
//! file is replaced as a whole, so that it says the one thing or the other whatever happens.
//!
//! What lies behind that byte may be there or not. It is copied again, from a source that is the same:
//! so what the target has there already is what it gets, and what is zeros was not touched.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cowbell_engine::units::Time;
use cowbell_formats::check::{self, Repair, Unwatched};
use cowbell_formats::error::Shown;
use cowbell_formats::locks::MaybeLocal;
use cowbell_formats::{Chain, Format, PartialFiles, partial};

use crate::copying::Source;
use crate::disk::AnyFile;
use crate::fail::Fail;
use crate::naming::Image;

/// Between two notes: a flush each.
const PAUSE_NS: u64 = 2_000_000_000;

/// The notes on a target.
pub struct Notes {
    path: PathBuf,
    /// What must be the same for a command to go on: a line for the source, the options, the target.
    head: String,
    /// When the last flush began.
    flushed: Option<Time>,
    /// All before this byte is in the target when the flush that is under way has ended.
    flushing: Option<u64>,
    /// All before this byte is in the target.
    pub copied: u64,
}

/// What there is of a target.
pub enum Left {
    /// Nothing that could be gone on with.
    Nothing,
    /// All before this byte.
    UpTo(u64),
}

/// The first two lines: of this source with these options.
pub fn head(sources: &[Source], options: &str) -> Result<String, Fail> {
    let mut line = String::from("source");
    for layer in sources.iter().flat_map(|(_, chain)| &chain.layers) {
        for number in 0..=layer.more.len() {
            let path = layer.numbered_path(number);
            let at = |error: io::Error| Fail::open_io(&path, &error);
            let unseen = "--resume: whether this was changed meanwhile cannot be seen";
            let Some(file) = layer.numbered(number).local() else {
                return Err(Fail::at(&path, unseen));
            };
            let file = file.identity().map_err(at)?;
            let meta = fs::metadata(&path).map_err(at)?;
            if !meta.is_file() || (meta.dev(), meta.ino()) != file {
                return Err(Fail::at(&path, unseen));
            }
            let (seconds, nanos) = (meta.mtime(), meta.mtime_nsec());
            let _ = write!(line, " {}:{}:{}:{seconds}.{nanos:09}", file.0, file.1, meta.len());
        }
    }
    Ok(format!("{line}\noptions {options}\n"))
}

impl Notes {
    /// What there is of the image that `name` shall be: it is to be gone on with if the notes on it say
    /// that it is of this source with these options.
    pub fn read(name: &Path, head: &str) -> Result<Left, Fail> {
        let Some(partial) = partial::beside(name) else {
            return Err(Fail::at(name, "--resume: this is written in place"));
        };
        let notes = match fs::read_to_string(partial::notes(&partial)) {
            Ok(notes) => notes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Left::Nothing),
            Err(error) => return Err(Fail::open_io(&partial::notes(&partial), &error)),
        };
        let Ok(meta) = fs::metadata(&partial) else { return Ok(Left::Nothing) };
        let refused = |what: &str| {
            let how = format!("to begin anew, remove {}", Shown(&partial));
            Err(Fail::at(name, format!("--resume: {what}; {how}")))
        };
        let (mut lines, mut wanted) = (notes.lines(), head.lines());
        if lines.next() != wanted.next() {
            return refused("the source is another one, or was changed, since this was begun");
        }
        if lines.next() != wanted.next() {
            return refused("this was begun with other options");
        }
        if lines.next() != Some(&target_line((meta.dev(), meta.ino()))) {
            return refused("this is not what was begun");
        }
        match lines.next().and_then(|line| line.strip_prefix("stable ")?.parse().ok()) {
            Some(at) => Ok(Left::UpTo(at)),
            None => refused("the notes on it cannot be read"),
        }
    }

    /// On a target that is being made, of which there is all before this byte.
    pub fn new(
        name: &Path,
        head: &str,
        target: &Chain<AnyFile>,
        partial: &PartialFiles,
        copied: u64,
    ) -> Result<Notes, Fail> {
        let at = |error: io::Error| Fail::open_io(name, &error);
        let top = target.layers.first().and_then(|top| top.file.local());
        let (Some(path), Some(top), 1) = (partial::beside(name), top, partial.count()) else {
            return Err(Fail::at(
                name,
                "--resume: only a target that is one file can be gone on with",
            ));
        };
        let head = format!("{head}{}\n", target_line(top.identity().map_err(at)?));
        let path = partial::notes(&path);
        Ok(Notes { path, head, flushed: None, flushing: None, copied })
    }

    /// So much is copied. Is the target to be flushed now?
    pub fn wants_flush(&mut self, copied: u64, now: Time) -> bool {
        let is_due = now.since(*self.flushed.get_or_insert(now)) >= PAUSE_NS;
        let is_further = copied > self.copied;
        self.copied = copied;
        if self.flushing.is_some() || !is_due || !is_further {
            return false;
        }
        (self.flushing, self.flushed) = (Some(copied), Some(now));
        true
    }

    /// When to ask again.
    pub fn next(&self, now: Time) -> Time {
        now.plus_ms(PAUSE_NS / 1_000_000)
    }

    /// The flush has ended.
    pub fn flushed(&mut self, is_stable: bool) -> Result<(), Fail> {
        match self.flushing.take() {
            Some(copied) if is_stable => self.write(copied),
            _ => Ok(()),
        }
    }

    /// All that was copied is stable.
    pub fn write_all(&self) -> Result<(), Fail> {
        self.write(self.copied)
    }

    fn write(&self, stable: u64) -> Result<(), Fail> {
        let text = format!("{}stable {stable}\n", self.head);
        replace(&self.path, &text).map_err(|error| Fail::open_io(&self.path, &error))
    }

    /// Are there some on this target?
    pub fn are_there(name: &Path) -> bool {
        partial::beside(name).is_some_and(|partial| partial::notes(&partial).exists())
    }

    /// Nobody goes on any more: the target is whole, or is to be made anew.
    pub fn remove(name: &Path) {
        if let Some(partial) = partial::beside(name) {
            // If they stay, they are on nothing.
            let _ = fs::remove_file(partial::notes(&partial));
        }
    }
}

/// Frees what a kill has left taken in a target that is to be gone on with. It is to be opened anew then.
pub fn repair(image: &Image, target: &Chain<AnyFile>) -> Result<(), Fail> {
    let Some(top) = target.layers.first().filter(|top| top.format != Format::Raw) else {
        return Ok(());
    };
    let report = check::check_layer(top, Repair::Leaks, &mut Unwatched);
    let report = report.map_err(|why| image.failed(why))?;
    if report.is_some_and(|report| !report.is_sound()) {
        let what = "--resume: what was begun has errors; to begin anew, remove it";
        return Err(Fail::at(&image.given, what));
    }
    Ok(())
}

fn target_line((device, inode): (u64, u64)) -> String {
    format!("target {device}:{inode}")
}

/// Puts this text in the place of a file's, at once.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}
