//! `rebase`: gives an image another backing file, or none, while what it shows stays the same.
//!
//! Where the image says nothing itself and the two backing files differ, it gets what the old one has.
//! When that is stable its header names the new one. With `-u` only the name changes.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::Path;

use cowbell_engine::mem::Buf;
use cowbell_engine::step::Io;
use cowbell_formats::chain::{backing_name, driver_named, open_named, open_whole_layer};
use cowbell_formats::map::{Kind, Known, read};
use cowbell_formats::{Chain, Error, Format, Name, rebase};

use crate::cache::{Cache, How, check_source_cache};
use crate::disk::{AnyFile, Files};
use crate::fail::{Fail, Program};
use crate::naming::{Image, Naming};
use crate::progress::{Progress, Shown};
use crate::session::{Session, Setup};
use crate::stop::Stop;

/// The options of `rebase`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The image's cache mode: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "CACHE", default_value = "writeback")]
    cache: String,
    /// The new backing file, as the image shall name it; empty: none
    #[arg(short, long, value_name = "FILE")]
    backing: Option<OsString>,
    /// Its format
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// The backing files' cache mode
    #[arg(short = 'T', long, value_name = "CACHE")]
    backing_cache: Option<String>,
    /// Change only the name: the new file holds what the old one held, or nobody cares
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Compress what the image gets, as far as it becomes smaller
    #[arg(short, long)]
    compress: bool,
    /// Say how far it is
    #[arg(short, long)]
    progress: bool,
    /// Say nothing but what is wrong
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    naming: Naming,
    /// The image
    file: OsString,
}

/// Bytes that are looked at together.
const PIECE: u64 = 1 << 20;

/// Runs it.
pub fn run(args: &Args, program: Program) -> Result<u8, Fail> {
    let cache = Cache::named(&args.cache);
    let cache =
        cache.ok_or_else(|| Fail::other(format!("Invalid cache option: {}", args.cache)))?;
    check_source_cache(args.backing_cache.as_deref())?;
    // Paths on a command line are never empty; this may be.
    let new = Path::new(args.backing.as_deref().unwrap_or_default());
    let is_none = new.as_os_str().is_empty();
    if args.backing.is_none() && !args.backing_unsafe {
        return Err(Fail::other("Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    let stop = Stop::on_signals()?;
    let mut image = args.naming.image(&args.file, args.format.as_deref())?;
    let format = match &args.backing_format {
        Some(name) => Some(driver_named(name).map_err(Fail::other)?),
        None => None,
    };
    if format.is_none() && !is_none {
        let what = format!(
            "Could not change the backing file to '{}': backing format must be specified",
            new.display()
        );
        return Err(Fail::other(what));
    }
    let top = layer_format(&image)?;
    image.format = Some(top);
    if !matches!(top, Format::Qcow2 | Format::Qed) {
        let what = format!(
            "Could not change the backing file to '{}': Operation not supported",
            new.display()
        );
        return Err(Fail::other(what));
    }
    if args.compress && top != Format::Qcow2 {
        return Err(Fail::other("Compression not supported for this file format"));
    }
    let backing = (!is_none).then_some(new).zip(format);
    let mut held = None;
    if !args.backing_unsafe {
        let below = match backing {
            Some((name, format)) => Some(open_new(&image, name, format)?),
            None => None,
        };
        let shown = Shown::asked_for(args.progress && !args.quiet, program);
        let work = Work::begin(&image, below, cache)?;
        match work.run(args.compress, shown, &stop)? {
            Some(locks) => held = Some(locks),
            None => return Ok(130),
        }
    }
    if held.is_some() {
        image = image.locked();
    }
    let failed = |why: Error| image.failed(why);
    let layer = open_whole_layer(&Files::default(), image.path(), &image.options(true));
    let layer = layer.map_err(failed)?;
    let backing = backing.map(|(name, format)| (name, format.name()));
    rebase::set_backing(&layer.file, top, backing).map_err(|why| {
        let what = format!("Could not change the backing file to '{}': {why}", new.display());
        Fail::other(what)
    })?;
    drop(held);
    Ok(0)
}

fn layer_format(image: &Image) -> Result<Format, Fail> {
    let layer = open_whole_layer(&Files::default(), image.path(), &image.options(false));
    Ok(layer.map_err(|why| image.failed(why))?.format)
}

/// The new backing file, found as the image will find it.
fn open_new(image: &Image, name: &Path, format: Format) -> Result<Chain<AnyFile>, Fail> {
    let failed = |why: Error| {
        Fail::other(format!("Could not open new backing file '{}': {why}", name.display()))
    };
    let name = backing_name(image.path(), name).map_err(failed)?;
    let mut there = Image::plain(&name.path, Some(format));
    there.name = Name { format: Some(format), ..name };
    let options = there.options(false);
    let opened = open_named(&Files::default(), &there.name, &options);
    opened.map_err(failed)
}

/// What the image is to get of its old backing file.
struct Work {
    session: Session,
    /// The image with all that is below it, as it was.
    old: Chain<AnyFile>,
    new: Option<Chain<AnyFile>>,
    /// What is known of the two.
    known: [Known; 2],
    /// Bytes that are written together, at the least.
    unit: u64,
}

impl Work {
    fn begin(image: &Image, new: Option<Chain<AnyFile>>, cache: Cache) -> Result<Work, Fail> {
        let setup = Setup {
            write: true,
            cache,
            how: cache.direct.then_some(How::Native),
            depth: DEPTH,
            ..Setup::default()
        };
        let session = Session::open(image, &setup)?;
        let old = image.open_unlocked(&Files::default())?;
        let meta = old.layers.first().map(|top| &top.meta);
        let unit = meta.and_then(|meta| meta.cluster_size()).unwrap_or(4096);
        Ok(Work { session, old, new, known: [Known::default(); 2], unit })
    }

    /// Does it; answers the locks that are still held. `None`: somebody has asked to stop.
    fn run(
        mut self,
        compress: bool,
        shown: Shown,
        stop: &Stop,
    ) -> Result<Option<cowbell_formats::Locks>, Fail> {
        let size = self.old.size();
        let mut progress = Progress::new(shown, size, None)?;
        progress.show(0)?;
        let (mut at, mut is_stopped) = (0, false);
        let mut flying = Flying::default();
        while at < size && !is_stopped {
            let failed = |why: Error| Fail::at(&self.session.image.given, why);
            let extent = self.known[0].status(&self.old, at, size - at).map_err(failed)?;
            let is_its = extent.depth == 0 && extent.kind != Kind::Unallocated;
            let zeros = if extent.is_zero() { self.zeros_from(at, extent.len)? } else { 0 };
            if is_its {
                at += extent.len;
            } else if zeros > 0 {
                // Of both.
                at += zeros;
            } else {
                let end = (at + extent.len).min((at / PIECE + 1) * PIECE);
                self.compare(at, end, compress, &mut flying)?;
                at = end;
            }
            progress.reached(at)?;
            is_stopped = stop.is_asked();
        }
        flying.wait(&mut self.session, 0)?;
        self.session.drain()?;
        if is_stopped {
            return Ok(None);
        }
        progress.end()?;
        let Session { engine, locks, .. } = self.session;
        drop(engine);
        Ok(Some(locks))
    }

    /// For how many of `len` bytes the new backing file says that they are zeros.
    fn zeros_from(&mut self, at: u64, len: u64) -> Result<u64, Fail> {
        let Some(chain) = self.new.as_ref().filter(|chain| at < chain.size()) else {
            return Ok(len);
        };
        let found = self.known[1].status(chain, at, len.min(chain.size() - at));
        let found = found.map_err(|why| Fail::at(&self.session.image.given, why))?;
        Ok(if found.is_zero() { found.len } else { 0 })
    }

    /// Writes what the two have not in common from `at` to `end`.
    fn compare(
        &mut self,
        at: u64,
        end: u64,
        compress: bool,
        flying: &mut Flying,
    ) -> Result<(), Fail> {
        let given = self.session.image.given.clone();
        let failed = |why: Error| Fail::at(&given, why);
        let mut old = vec![0; (end - at) as usize];
        read(&self.old, at, &mut old).map_err(failed)?;
        let mut new = vec![0; old.len()];
        if let Some(chain) = &self.new {
            let there = chain.size().saturating_sub(at).min(new.len() as u64) as usize;
            if there > 0 {
                read(chain, at, &mut new[..there]).map_err(failed)?;
            }
        }
        let mut from = at;
        while from < end {
            let to = ((from / self.unit + 1) * self.unit).min(end);
            let range = (from - at) as usize..(to - at) as usize;
            if old[range.clone()] != new[range.clone()] {
                let io = match compress && to - from == self.unit {
                    true => Io::write_compressed(from, to - from),
                    false => Io::write(from, to - from),
                };
                flying.wait(&mut self.session, DEPTH - 1)?;
                flying.submit(&mut self.session, io, &old[range])?;
            }
            from = to;
        }
        Ok(())
    }
}

/// Writes in flight.
const DEPTH: usize = 16;

#[derive(Default)]
struct Flying {
    offsets: VecDeque<u64>,
}

impl Flying {
    fn submit(&mut self, session: &mut Session, io: Io, bytes: &[u8]) -> Result<(), Fail> {
        let (node, at) = (session.node, io.offset);
        let sent = session.engine.submit(node, io, Buf::copied(bytes), at);
        assert!(sent.is_ok(), "there is room for {DEPTH}");
        self.offsets.push_back(at);
        Ok(())
    }

    /// Until no more than so many are in flight.
    fn wait(&mut self, session: &mut Session, most: usize) -> Result<(), Fail> {
        while self.offsets.len() > most {
            let Some(done) = session.next()? else { return Ok(()) };
            self.offsets.retain(|&at| at != done.tag);
            done.result.map_err(|errno| {
                let what = format!("error while writing to COW image: {errno}");
                Fail::at(&session.image.given, what)
            })?;
        }
        Ok(())
    }
}
