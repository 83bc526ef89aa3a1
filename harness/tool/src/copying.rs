//! What `convert` and `dd` have in common: the image that they make, and their copies under way.

use std::ffi::OsStr;
use std::ops::Range;
use std::path::Path;

use cowbell_engine::backend::Backend;
use cowbell_engine::mem::Mem;
use cowbell_engine::step::Io;
use cowbell_engine::units::{Errno, JobId};
use cowbell_engine::{Copy, JobProgress, NodeEvent};
use cowbell_formats::create::{self, CreateOptions};
use cowbell_formats::locks::MaybeLocal;
use cowbell_formats::{Chain, Error, Format, Host, PartialFiles};

use crate::checksum::{Checksum, Sum};
use crate::disk::{AnyFile, Files, StoppableHost};
use crate::fail::{Fail, Program};
use crate::locking;
use crate::naming::{Image, target};
use crate::progress::Progress;
use crate::resume::Notes;
use crate::session::{Session, eprint_quietly};
use crate::stop::Stop;

/// An image that is read, open.
pub type Source = (Image, Chain<AnyFile>);

/// An open target.
pub struct Target {
    /// What it is called.
    pub image: Image,
    /// Its layers.
    pub chain: Chain<AnyFile>,
    /// What no layer says anything about reads as zeros, where nothing is below.
    pub is_new: bool,
}

/// A target to make.
pub struct NewTarget<'a> {
    /// Its name.
    pub name: &'a OsStr,
    /// Its format.
    pub format: Format,
    /// What it shall be, its size included.
    pub options: &'a CreateOptions,
    /// It is written past the page cache.
    pub direct: bool,
    /// What the verb was doing if it cannot be made, for people.
    pub doing: &'a str,
}

impl NewTarget<'_> {
    /// Makes it, and opens it.
    pub fn make(
        &self,
        sources: &[Source],
        partial: &PartialFiles,
        stop: &Stop,
    ) -> Result<Target, Fail> {
        let path = target(self.name)?;
        let failed =
            |why: Error| Fail::file(Path::new(self.name), format!("{}: {why}", self.doing));
        refuse_source(&path, sources).map_err(failed)?;
        let host = StoppableHost { disk: Files::default(), stop: stop.clone() };
        let host = partial.host(host);
        let plan = create::plan(&host, &path, self.format, self.options).map_err(failed)?;
        plan.run(&host).map_err(failed)?;
        let mut image = Image::plain(&path, Some(self.format));
        image.given = self.name.into();
        let host = partial.host(Files { direct: self.direct });
        let chain = image.open(&host, true)?;
        locking::warn(&chain.unlockable());
        // What is on a device that nobody has written is not known.
        let top = chain.layers.first().and_then(|top| top.file.local());
        let is_new = top.is_some_and(|file| !file.is_block_device());
        Ok(Target { image, chain, is_new })
    }
}

/// No file that is read is written.
pub fn refuse_source(path: &Path, sources: &[Source]) -> Result<(), Error> {
    let host = Files::default();
    let Ok(there) = host.identity_at(path) else { return Ok(()) };
    for layer in sources.iter().flat_map(|(_, chain)| &chain.layers) {
        for file in [&layer.file].into_iter().chain(&layer.more) {
            if host.identity(file).is_ok_and(|id| id == there) {
                return Err(Error::Invalid("the target is one of the files that are read".into()));
            }
        }
    }
    Ok(())
}

/// Why copying ended early.
pub enum Ended {
    /// Somebody has asked to stop.
    Stopped,
    /// Something is wrong.
    Failed(Fail),
}

impl Ended {
    /// What the verb answers.
    fn answer(self) -> Result<u8, Fail> {
        match self {
            Ended::Stopped => Ok(130),
            Ended::Failed(fail) => Err(fail),
        }
    }
}

impl From<Fail> for Ended {
    fn from(fail: Fail) -> Ended {
        Ended::Failed(fail)
    }
}

/// What the verb answers. A target that is whole gets its name; then its checksum is said, not on
/// standard output if that is an image's. One that is not whole stays if somebody may go on with it.
pub fn finish(
    copied: Result<Option<Sum>, Ended>,
    partial: PartialFiles,
    to: &Path,
    is_stdout_taken: bool,
    is_resumable: bool,
) -> Result<u8, Fail> {
    if is_resumable && copied.is_err() {
        partial.leave();
        return copied.map_or_else(Ended::answer, |_| Ok(0));
    }
    let sum = match copied {
        Ok(sum) => sum,
        Err(ended) => return ended.answer(),
    };
    partial.keep().map_err(|why| Fail::open_io(to, &why))?;
    if let Some(sum) = sum {
        sum.say(is_stdout_taken)?;
    }
    Ok(0)
}

/// Copying under way.
pub struct Run<'a> {
    /// The engine with all images.
    pub session: Session,
    /// How far it is.
    pub progress: Progress,
    /// Who may end it.
    pub stop: &'a Stop,
    /// Who warns.
    pub program: Program,
    /// The checksum of what is copied, if that is asked for.
    pub checksum: Option<Checksum>,
    /// What a later command goes on from, if it may.
    pub notes: Option<Notes>,
}

impl Run<'_> {
    /// Does all of these copies, one behind the other, of these parts if any are named, and leaves the target clean.
    /// Answers the checksum.
    pub fn all(
        mut self,
        copies: &[Copy],
        parts: Option<&[Range<u64>]>,
    ) -> Result<Option<Sum>, Ended> {
        let begins = copies.first().map_or(0, |copy| copy.target_offset);
        let copied = self.progress.show(begins).map_err(Ended::from);
        let copied =
            copied.and_then(|()| copies.iter().try_for_each(|copy| self.copy(copy, parts)));
        let end = |copy: &Copy| copy.target_offset + copy.len.unwrap_or(0);
        let copied = copied.and_then(|()| self.sum_up_to(copies.last().map_or(0, end)));
        let closed = self.session.drain();
        if let (Some(notes), Err(_), Ok(())) = (&self.notes, &copied, &closed) {
            notes.write_all()?;
        }
        copied?;
        closed?;
        self.progress.end()?;
        let sum = self.checksum.map(Checksum::end);
        if let Some(sum) = &sum {
            self.progress.tell(&sum.json());
        }
        Ok(sum)
    }

    /// What was not shown up to this byte of the target are zeros.
    fn sum_up_to(&mut self, end: u64) -> Result<(), Ended> {
        while let Some(sum) = &mut self.checksum
            && !sum.add_zeros_to(end)
        {
            self.progress.reached(sum.at())?;
            if self.stop.is_asked() {
                return Err(Ended::Stopped);
            }
        }
        Ok(())
    }

    /// Takes the checksum of what the job has read. Was there something, or is there more?
    fn sum(&mut self, job: JobId, base: u64) -> bool {
        let Some(sum) = &mut self.checksum else { return false };
        let Some((at, bytes)) = self.session.engine.job_read(job) else { return false };
        if sum.add_zeros_to(base + at) {
            sum.add(bytes);
            self.session.engine.job_seen(job);
        }
        true
    }

    /// Does one of the copies.
    pub fn copy(&mut self, copy: &Copy, parts: Option<&[Range<u64>]>) -> Result<(), Ended> {
        let base = copy.target_offset;
        let refused = |why| Fail::other(format!("the copy cannot begin: {why:?}"));
        let engine = &mut self.session.engine;
        let copy = &Copy { shown: self.checksum.is_some(), ..*copy };
        let job = match parts {
            Some(parts) => engine.start_parts(*copy, parts),
            None => engine.start(*copy),
        };
        let job = job.map_err(refused)?;
        let (mut is_stopped, mut why) = (false, None);
        loop {
            let again = self.session.run().again | self.sum(job, base);
            while let Some(event) = self.session.engine.poll_event() {
                match event {
                    NodeEvent::JobError { node, at, len, errno, .. } if node == copy.source => {
                        let at = base + (at - copy.source_offset);
                        if copy.salvage {
                            self.warn_of_loss(at, len, errno);
                        } else {
                            why = why.or(Some(("reading", at)));
                        }
                    }
                    NodeEvent::JobError { at, .. } => why = why.or(Some(("writing", at))),
                    NodeEvent::JobEnded { result: Ok(()), .. } => {
                        let done = base + copy.len.unwrap_or(0);
                        return Ok(self.progress.reached(self.is_done(done))?);
                    }
                    NodeEvent::JobEnded { .. } if is_stopped => return Err(Ended::Stopped),
                    NodeEvent::JobEnded { result: Err(errno), .. } => {
                        let (doing, at) = why.unwrap_or(("writing", base));
                        let what = format!("error while {doing} at byte {at}: {errno}");
                        return Err(Fail::other(what).into());
                    }
                    _ => {}
                }
            }
            if self.stop.is_asked() && !is_stopped {
                is_stopped = self.session.engine.cancel_job(job);
                continue;
            }
            if let Some(JobProgress { done, up_to, .. }) = self.session.engine.job_progress(job) {
                self.note(base + up_to)?;
                self.progress.reached(self.is_done(base + done))?;
            }
            if !again {
                let now = self.session.now();
                let noted = self.notes.as_ref().map(|notes| notes.next(now));
                let until = self.progress.next(now).into_iter().chain(noted).min();
                self.session.wait(until)?;
            }
        }
    }

    /// All before this byte of the target is copied: from time to time that is made stable, and noted down.
    fn note(&mut self, copied: u64) -> Result<(), Fail> {
        let Some(notes) = &mut self.notes else { return Ok(()) };
        let Session { engine, node, .. } = &mut self.session;
        while let Some(flushed) = engine.poll() {
            notes.flushed(flushed.result.is_ok())?;
        }
        if notes.wants_flush(copied, engine.backend().clock())
            && engine.submit(*node, Io::flush(), Mem::None, 0).is_err()
        {
            notes.flushed(false)?;
        }
        Ok(())
    }

    /// What is copied is done when it is in the checksum too.
    fn is_done(&self, copied: u64) -> u64 {
        self.checksum.as_ref().map_or(copied, |sum| copied.min(sum.at()))
    }

    /// Sector by sector, as QEMU tells it.
    fn warn_of_loss(&self, at: u64, len: u64, errno: Errno) {
        const SECTOR: usize = 512;
        let name = self.program.name();
        for at in (at..at + len).step_by(SECTOR) {
            let what = format!("warning: error while reading offset {at}: {errno}");
            eprint_quietly(&format!("{name}: {what}\n"));
        }
    }
}
