//! `commit`: an overlay's own contents go down into its backing file, or further down.
//!
//! A copy job of the layers above the base into the base, in an engine that has both: what they say
//! hides what it writes below them, so that the overlay shows the same before, meanwhile and
//! afterwards. When all is stable the overlay is emptied, unless it is to be dropped.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use cowbell_engine::Copy;
use cowbell_engine::mem::Mem;
use cowbell_engine::step::Io;
use cowbell_engine::units::NodeId;
use cowbell_formats::chain::open_whole_layer;
use cowbell_formats::name::Backing;
use cowbell_formats::name::is_remote;
use cowbell_formats::{Chain, Error, Format, RunOptions, attach_overlay, rebase};

use crate::cache::{Cache, How};
use crate::copying::{Ended, Run};
use crate::disk::{AnyFile, Files};
use crate::fail::{Fail, Program};
use crate::naming::{Image, Naming};
use crate::number::size;
use crate::out::Out;
use crate::progress::{Progress, Shown};
use crate::session::{Session, Setup};
use crate::stop::Stop;

/// The options of `commit`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The cache mode: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "CACHE", default_value = "writeback")]
    cache: String,
    /// The image of the chain that takes it all, as the one above names it; by default the first below
    #[arg(short, long, value_name = "FILE")]
    base: Option<PathBuf>,
    /// Leave the image as it is: it will not be used again
    #[arg(short, long)]
    drop: bool,
    /// At most so many bytes a second
    #[arg(short, long, value_name = "BYTES")]
    rate_limit: Option<String>,
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

/// Runs it.
pub fn run(args: &Args, program: Program) -> Result<u8, Fail> {
    let cache = Cache::named(&args.cache);
    let cache =
        cache.ok_or_else(|| Fail::other(format!("Invalid cache option: {}", args.cache)))?;
    let rate = args.rate_limit.as_deref();
    let rate = rate.map(|text| size("rate limit", text, 0, i64::MAX as u64)).transpose()?;
    let stop = Stop::on_signals()?;
    let image = args.naming.image(&args.file, args.format.as_deref())?;
    let host = Files { direct: cache.direct };
    let layers = layers(&image, args.base.as_deref())?;
    let [top, between @ .., base] = &layers[..] else { unreachable!("there is one below") };
    let setup = Setup {
        write: true,
        cache,
        how: cache.direct.then_some(How::Native),
        depth: IN_FLIGHT,
        has_remote: layers.iter().any(|layer| is_remote(layer.path())),
        ..Setup::default()
    };
    let mut session = Session::open(base, &setup)?;
    let target = session.node;
    let mut locks = Vec::new();
    let mut below = target;
    for (layer, write) in between.iter().rev().map(|layer| (layer, false)).chain([(top, true)]) {
        let chain = layer.open(&host, write)?;
        locks.push(chain.locks().map_err(|error| Fail::open_io(layer.path(), &error))?);
        below = over(&mut session, layer, chain, below)?;
    }
    let source = below;
    let bytes = size_of(&session, source);
    if size_of(&session, target) < bytes {
        grow(&mut session, target, bytes)?;
    }
    let shown = Shown::asked_for(args.progress && !args.quiet, program);
    let copy = Copy {
        len: Some(bytes),
        top_layers: Some((layers.len() - 1) as u8),
        unit: 4096,
        in_flight: IN_FLIGHT,
        rate: rate.filter(|&rate| rate > 0),
        ..Copy::new(source, target)
    };
    let progress = Progress::new(shown, bytes, None)?;
    let mut run = Run { session, progress, stop: &stop, program, checksum: None, notes: None };
    let copied = run.copy(&copy, None);
    let closed = run.session.drain();
    match copied {
        Ok(()) => {}
        Err(Ended::Stopped) => return Ok(130),
        Err(Ended::Failed(fail)) => return Err(fail),
    }
    closed?;
    run.progress.end()?;
    let Run { session: Session { engine, locks: base_locks, .. }, .. } = run;
    drop(engine);
    if !args.drop && args.base.is_none() {
        empty(top)?;
    }
    drop((locks, base_locks));
    let mut out = Out::new(args.quiet);
    writeln!(out, "Image committed.")?;
    out.flush()?;
    Ok(0)
}

const IN_FLIGHT: usize = 8;

/// The image and those below it down to the base, each to be opened by itself.
fn layers(image: &Image, base: Option<&Path>) -> Result<Vec<Image>, Fail> {
    let chain = image.open(&Files::default(), false)?;
    if chain.layers.len() < 2 {
        return Err(Fail::other("Image does not have a backing file"));
    }
    let mut top = alone(image.clone());
    top.format = Some(chain.layers[0].format);
    let mut layers = vec![top];
    for pair in chain.layers.windows(2) {
        let (above, below) = (&pair[0], &pair[1]);
        layers.push(alone(Image::plain(&below.path, Some(below.format))));
        let is_it = base.is_none_or(|base| {
            above.backing_name().is_some_and(|name| name == base) || below.path == base
        });
        if is_it {
            // The base is opened with all that is below it.
            let last = layers.last_mut().expect("it was just put there");
            last.name.backing = Backing::AsImageSays;
            return Ok(layers);
        }
    }
    let base = base.unwrap_or(Path::new("")).display();
    let what = format!("Did not find '{base}' in the backing chain of '{}'", image.given.display());
    Err(Fail::other(what))
}

/// The image without what is below it.
fn alone(mut image: Image) -> Image {
    image.name.backing = Backing::Nothing;
    image
}

/// The layer, over a node that is there.
fn over(
    session: &mut Session,
    layer: &Image,
    chain: Chain<AnyFile>,
    below: NodeId,
) -> Result<NodeId, Fail> {
    let attached = attach_overlay(&mut session.engine, chain, below, &RunOptions::default());
    attached.map_err(|error| Fail::open_io(layer.path(), &error))
}

fn size_of(session: &Session, node: NodeId) -> u64 {
    use cowbell_engine::step::Driver;
    session.engine.node(node).size()
}

/// Makes the base as large as the image.
fn grow(session: &mut Session, node: NodeId, bytes: u64) -> Result<(), Fail> {
    let io = Io::truncate(bytes);
    let sent = session.engine.submit(node, io, Mem::None, 0);
    assert!(sent.is_ok(), "it is the only request");
    let given = session.image.given.clone();
    let ended = session.next()?.map(|finished| finished.result);
    let result = ended.unwrap_or(Err(cowbell_engine::units::Errno::IO));
    result.map_err(|errno| Fail::at(&given, format!("Failed to resize: {errno}")))
}

/// What it had is in the base now.
fn empty(top: &Image) -> Result<(), Fail> {
    let failed =
        |why: Error| Fail::other(format!("Could not empty {}: {why}", top.given.display()));
    let options = top.clone().locked().options(true);
    let layer = open_whole_layer(&Files::default(), top.path(), &options).map_err(failed)?;
    match rebase::empty(&layer.file, top.format.unwrap_or(Format::Raw)) {
        // It shows the same, and takes its space still: so it is in QEMU.
        Err(Error::Unsupported(_)) => Ok(()),
        emptied => emptied.map_err(failed),
    }
}
