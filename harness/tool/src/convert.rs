//! `convert`: copies one disk, or several one after the other, into a new image of any format.
//!
//! The copying is a job of the engine's, in an engine of this verb's own with all images in it. The
//! target has its name only when all of it is stable: whatever happens before, what had the name stays.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use cowbell_engine::{Copy, Zeros};
use cowbell_formats::chain::driver_named;
use cowbell_formats::create::{self, CreateOptions};
use cowbell_formats::vmdk::disk::descriptor::Kind;
use cowbell_formats::{Chain, Format, Host, LayerMeta, PartialFiles, RunOptions, attach};

use crate::at_snapshot;
use crate::backup;
use crate::bitmaps::Bitmaps;
use crate::cache::{Cache, How};
use crate::checksum::{self, Checksum, Sum};
use crate::copying::{Ended, NewTarget, Run, Source, Target, finish, refuse_source};
use crate::create::help;
use crate::disk::{AnyFile, Files, has_remote};
use crate::fail::{Fail, Program};
use crate::locking;
use crate::naming::{Image, Naming, target};
use crate::number::{count, size};
use crate::pipe::{Pipes, is_pipe, raw_to_stdout};
use crate::progress::{Progress, Shown};
use crate::record::{Head, Told};
use crate::resume::{self, Left, Notes};
use crate::session::{Session, Setup, limits_of};
use crate::stop::Stop;

/// The options of `convert`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The sources' format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// The target's format
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    pub(crate) output_format: String,
    /// Options of the target's format; `-o help` lists them
    #[arg(short, long, value_name = "KEY=VALUE,...", action = clap::ArgAction::Append)]
    pub(crate) options: Vec<String>,
    /// The target's backing file, as it shall name it: only what the source has itself is copied
    #[arg(short = 'B', long, value_name = "FILE")]
    pub(crate) backing: Option<PathBuf>,
    /// The backing file's format
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) backing_format: Option<String>,
    /// Compress what becomes smaller: qcow2, and VMDK streams, which always do
    #[arg(short, long)]
    pub(crate) compress: bool,
    /// The source as it was at this snapshot in it: an id or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub(crate) snapshot: Option<OsString>,
    /// The target's cache mode: none, writeback, writethrough, directsync or unsafe
    ///
    /// By default writeback. Whatever it is, all is stable in the end.
    #[arg(short = 't', long, value_name = "CACHE")]
    pub(crate) cache: Option<String>,
    /// The sources' cache mode
    #[arg(short = 'T', long, value_name = "CACHE")]
    pub(crate) source_cache: Option<String>,
    /// Pieces in flight, up to 16
    #[arg(
        short = 'm',
        long,
        value_name = "COUNT",
        default_value = "8",
        allow_hyphen_values = true
    )]
    pub(crate) parallel: String,
    /// Accepted for compatibility: pieces are written in any order anyway
    #[arg(short = 'W', long, hide = true)]
    pub(crate) out_of_order: bool,
    /// At most so many bytes a second
    #[arg(short, long, value_name = "BYTES")]
    pub(crate) rate_limit: Option<String>,
    /// So many zeros in the data are left out, by default 4k; 0: everything is written
    #[arg(short = 'S', long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) sparse: Option<String>,
    /// From raw to raw, have the kernel copy: file systems that can let both files share their space
    ///
    /// Zeros in the data are not looked for then, only the files' holes stay holes. What the kernel cannot copy is read and
    /// written, and so is everything with --checksum.
    #[arg(short = 'C')]
    pub(crate) copy_range: bool,
    /// The target is there already, and is written in place
    #[arg(short = 'n', long)]
    pub(crate) no_create: bool,
    /// With -n: the target reads as zeros
    #[arg(long)]
    pub(crate) target_is_zero: bool,
    /// With -n: the target is named by options
    #[arg(long)]
    pub(crate) target_image_opts: bool,
    /// Copy the source's persistent bitmaps too, from qcow2 to qcow2
    #[arg(long)]
    pub(crate) bitmaps: bool,
    /// With --bitmaps: leave out those that are inconsistent
    #[arg(long)]
    pub(crate) skip_broken_bitmaps: bool,
    /// What cannot be read becomes zeros
    #[arg(long)]
    pub(crate) salvage: bool,
    /// Say how far it is
    #[arg(short, long)]
    pub(crate) progress: bool,
    /// Say nothing but what is wrong
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Say how far it is, as lines of JSON, on this descriptor
    #[arg(long, value_name = "FD", help_heading = "Beyond QEMU")]
    pub(crate) progress_fd: Option<u32>,
    /// Record all that the engine is asked and sees in this file, but no byte of the images' data: `replay` does it
    /// again
    ///
    /// Not of a snapshot (-l), nor through pipes.
    #[arg(long, value_name = "FILE", help_heading = "Beyond QEMU")]
    pub(crate) record: Option<PathBuf>,
    /// Go on where the same command was ended before, and leave what there is if this one is, as TARGET.partial
    ///
    /// Whether by Ctrl-C, an error or a kill. The source must be as it was, and so must the options that say what the target
    /// shall be. If nothing is there, or no --resume was said then, it begins at the beginning.
    #[arg(long, help_heading = "Beyond QEMU")]
    pub(crate) resume: bool,
    /// Print a checksum of the disk that was copied, as its guest reads it: that of a raw image of it
    ///
    /// It is taken of what is read to be copied, holes included, in one pass, and printed at the end; where the target goes to
    /// standard output, on standard error.
    #[arg(long, value_name = "KIND", help_heading = "Beyond QEMU")]
    pub(crate) checksum: Option<checksum::Kind>,
    /// Only what this bitmap of the source says has changed
    #[arg(skip)]
    pub(crate) incremental: Option<String>,
    #[command(flatten)]
    pub(crate) naming: Naming,
    /// The sources, and behind them the target; `-` is standard input, or output
    ///
    /// A raw disk is written to standard output as it is read. What else comes or goes that way is kept in the folder
    /// for temporary files (TMPDIR) meanwhile.
    pub(crate) files: Vec<OsString>,
}

impl Args {
    /// The options that say what the target is, and how much of which source: another command that has the same goes on
    /// with it.
    fn that_make_it(&self, total: u64) -> String {
        let backing = (&self.backing, &self.backing_format);
        let what = (&self.output_format, &self.options, backing, self.compress, total);
        let which = (&self.snapshot, &self.incremental, &self.sparse, self.salvage);
        format!("{what:?} {which:?}")
    }
}

/// What the options say, numbers read.
pub(crate) struct Wanted {
    pub(crate) format: Format,
    pub(crate) create: CreateOptions,
    cache: Cache,
    source_cache: Cache,
    in_flight: usize,
    rate: Option<u64>,
    /// Zeros are looked for in so many bytes; 0: not at all.
    sparse: u64,
}

/// Runs it.
pub fn run(args: &Args, program: Program) -> Result<u8, Fail> {
    let is_help = |text: &String| text.split(',').any(|item| item == "help" || item == "?");
    if args.options.iter().any(is_help) {
        return help(&args.output_format, args.files.len() > 1);
    }
    let wanted = wanted(args)?;
    let [sources @ .., to] = &args.files[..] else {
        return Err(Fail::other("Must specify image file name"));
    };
    check(args, sources.len())?;
    if args.checksum.is_some() && has_backing(&wanted) {
        let what =
            "--checksum is of the whole disk, and what the target's backing file has is not read";
        return Err(Fail::other(what));
    }
    let stop = Stop::on_signals()?;
    let uses_pipes = args.files.iter().any(|name| is_pipe(name));
    if args.resume && uses_pipes {
        return Err(Fail::other("--resume: a pipe is read and written once"));
    }
    let pipes = if uses_pipes { Some(Pipes::new()?) } else { None };
    let mut images = Vec::with_capacity(sources.len());
    for name in sources {
        let mut name = name.clone();
        if let Some(pipes) = pipes.as_ref().filter(|_| is_pipe(&name)) {
            let Some(path) = pipes.take_input(&stop)? else { return Ok(130) };
            name = path.into();
        }
        let image = args.naming.image(&name, args.format.as_deref())?;
        let mut chain = image.open(&Files { direct: wanted.source_cache.direct }, false)?;
        if let Some(snapshot) = &args.snapshot {
            at_snapshot::take(&mut chain, snapshot)?;
        }
        images.push((image, chain));
    }
    if args.compress && !matches!(wanted.format, Format::Qcow2 | Format::Vmdk) {
        return Err(Fail::other("Compression not supported for this file format"));
    }
    let bitmaps = match &images[..] {
        [source] if args.bitmaps => Some(Bitmaps::of(source, args, &wanted, program)?),
        _ => None,
    };
    let total: u64 = images
        .iter()
        .try_fold(0u64, |total, (_, chain)| total.checked_add(chain.size()))
        .filter(|&total| total <= i64::MAX as u64)
        .ok_or_else(|| Fail::other("the images are too large together"))?;
    let to_stdout = pipes.as_ref().filter(|_| is_pipe(to));
    if to_stdout.is_some() && wanted.format == Format::Raw {
        let checksum = args.checksum.map(Checksum::new);
        return Ok(if raw_to_stdout(&images, checksum, &stop)? { 0 } else { 130 });
    }
    let to = &to_stdout.map_or_else(|| to.clone(), |pipes| pipes.target().into());
    let partial = PartialFiles::new(locking::chosen());
    let (mut name, mut head, mut left) = (PathBuf::new(), String::new(), Left::Nothing);
    if args.resume {
        name = target(to)?;
        head = resume::head(&images, &args.that_make_it(total))?;
        left = Notes::read(&name, &head)?;
    }
    let name = &name;
    let copied = if let Left::UpTo(at) = left { at } else { 0 };
    let target = if let Left::UpTo(_) = left {
        partial.take_up(name).map_err(|why| Fail::open_io(name, &why))?;
        let mut image = Image::plain(name, Some(wanted.format));
        image.given = to.into();
        let host = partial.host(Files { direct: wanted.cache.direct });
        resume::repair(&image, &image.open(&host, true)?)?;
        let chain = image.open(&host, true)?;
        Target { image, chain, is_new: true }
    } else if args.no_create {
        open(args, to, &wanted, total, &images)?
    } else {
        let options = CreateOptions { size: Some(total), ..wanted.create.clone() };
        let doing = &format!("error while converting {}", wanted.format);
        let (format, direct) = (wanted.format, wanted.cache.direct);
        let new = NewTarget { name: to, format, options: &options, direct, doing };
        new.make(&images, &partial, &stop)?
    };
    let notes = match args.resume {
        true => Some(Notes::new(name, &head, &target.chain, &partial, copied)?),
        false => None,
    };
    let is_asked = args.progress && !args.quiet && to_stdout.is_none();
    let shown = Shown::asked_for(is_asked, program);
    let progress = Progress::new(shown, total, args.progress_fd)?;
    // It stays open, so that nobody writes it before they are copied.
    let bitmaps = bitmaps.zip(images.first().map(|(image, _)| image.clone()));
    let record = args.record.as_ref().map(|path| {
        let limits = limits_of(&setup(&wanted, &images));
        let told = match args.no_create {
            true => tell(Head::new(&limits, None, false), &target, &images),
            false => {
                let host = partial.host(Files { direct: false });
                tell(Head::over(&limits, None, host), &target, &images)
            }
        };
        told.map(|told| (path.clone(), told))
    });
    let record = record.transpose()?;
    let copied =
        (Work { images, target, notes, record }).run(args, &wanted, progress, &stop, program);
    let copied = copied.and_then(|sum| {
        if let Some((bitmaps, source)) = &bitmaps {
            // A header that is half written cannot be gone on with.
            Notes::remove(name);
            bitmaps.copy_to(source, &partial, Path::new(to))?;
        }
        Ok(sum)
    });
    let is_resumable = args.resume && Notes::are_there(name);
    let code = finish(copied, partial, Path::new(to), to_stdout.is_some(), is_resumable)?;
    if args.resume && code == 0 {
        Notes::remove(name);
    }
    if let Some(pipes) = to_stdout.filter(|_| code == 0) {
        pipes.give_output()?;
    }
    Ok(code)
}

fn wanted(args: &Args) -> Result<Wanted, Fail> {
    const SPARSE_MAX: u64 = 16 << 20;
    let in_flight = count("number of coroutines", &args.parallel, 1, 16)? as usize;
    let rate = args.rate_limit.as_deref();
    let rate = rate.map(|text| size("rate limit", text, 0, i64::MAX as u64)).transpose()?;
    let asked = args.sparse.as_deref().unwrap_or(SPARSE);
    let sparse = match create::parse_size(asked) {
        Ok(bytes) if bytes.is_multiple_of(512) && bytes <= SPARSE_MAX => bytes,
        Err(create::BadSize::NotANumber) => {
            let what = "Invalid buffer size for sparse output specified";
            return Err(Fail::other(format!("{what}: '{asked}'.")));
        }
        _ => {
            return Err(Fail::other(format!(
                "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 \
                 up to {SPARSE_MAX}. Select 0 to disable sparse detection (fully allocates output)."
            )));
        }
    };
    let cache = |name: Option<&str>, what: &str| {
        let cache = Cache::named(name.unwrap_or("writeback"));
        cache.ok_or_else(|| {
            Fail::other(format!("Invalid {what} option: {}", name.unwrap_or_default()))
        })
    };
    let source_cache = cache(args.source_cache.as_deref(), "source cache")?;
    let target_cache = cache(args.cache.as_deref(), "cache")?;
    let format = create::format_named(&args.output_format).map_err(Fail::other)?;
    let mut options = CreateOptions { locking: locking::chosen(), ..CreateOptions::default() };
    for text in &args.options {
        options.parse(format, text).map_err(Fail::other)?;
    }
    if let Some(name) = &args.backing {
        options.backing_file = Some(name.clone());
    }
    if let Some(name) = &args.backing_format {
        options.backing_format = Some(driver_named(name).map_err(Fail::other)?);
    }
    let has_no_backing = matches!(format, Format::Raw | Format::Vdi);
    if options.backing_file.is_some() && has_no_backing {
        let what = format!("Backing file not supported for file format '{format}'");
        return Err(Fail::other(what));
    }
    if options.backing_file.is_some() && options.backing_format.is_none() {
        return Err(Fail::other("Use of backing file requires explicit backing format"));
    }
    let rate = rate.filter(|&rate| rate > 0);
    let (create, cache) = (options, target_cache);
    Ok(Wanted { format, create, cache, source_cache, in_flight, rate, sparse })
}

/// Options that do not go together.
fn check(args: &Args, sources: usize) -> Result<(), Fail> {
    let refused = [
        (args.copy_range && args.sparse.is_some(), "Cannot enable copy offloading when -S is used"),
        (args.copy_range && args.compress, "Cannot enable copy offloading when -c is used"),
        (
            args.record.is_some() && args.snapshot.is_some(),
            "--record: of a snapshot nothing can be recorded",
        ),
        (
            args.record.is_some() && args.files.iter().any(|name| is_pipe(name)),
            "--record: what goes through a pipe cannot be done again",
        ),
        (sources == 0, "Must specify image file name"),
        (
            args.no_create && !args.options.is_empty(),
            "-o has no effect when skipping image creation",
        ),
        (args.target_is_zero && !args.no_create, "--target-is-zero requires use of -n flag"),
        (args.target_image_opts && !args.no_create, "--target-image-opts requires use of -n flag"),
        (
            args.resume && (args.no_create || args.checksum.is_some()),
            "--resume is for an image that is made, and a checksum is taken of all in one go",
        ),
        (
            args.skip_broken_bitmaps && !args.bitmaps,
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ),
        (sources > 1 && args.bitmaps, "Copying bitmaps only possible with single source"),
        (
            args.bitmaps && (args.no_create || args.snapshot.is_some()),
            "--bitmaps are those of the disk as it is, and go into an image that is made",
        ),
        (sources > 1 && args.snapshot.is_some(), "No support for concatenating multiple snapshot"),
        (
            sources > 1 && args.backing.is_some(),
            "Having a backing file for the target makes no sense when concatenating multiple input \
             images",
        ),
    ];
    match refused.into_iter().find(|&(is_so, _)| is_so) {
        Some((_, why)) => Err(Fail::other(why)),
        None => Ok(()),
    }
}

/// Tells a record's head of the disks, in the order in which they are attached.
fn tell<H: Host>(mut head: Head<H>, target: &Target, images: &[Source]) -> Result<Told, Fail> {
    head.disk(&target.image, true)?;
    images.iter().try_for_each(|(image, _)| head.disk(image, false))?;
    Ok(head.told())
}

/// Opens a target that is there.
fn open(
    args: &Args,
    to: &OsString,
    wanted: &Wanted,
    total: u64,
    sources: &[Source],
) -> Result<Target, Fail> {
    let (naming, format) = match args.target_image_opts {
        true => (args.naming.by_options(), None),
        false => (args.naming.by_name(), Some(wanted.format.name())),
    };
    let image = naming.sharing(false).image(to, format)?;
    refuse_source(image.path(), sources).map_err(|why| image.failed(why))?;
    let chain = image.open(&Files { direct: wanted.cache.direct }, true)?;
    if chain.size() < total {
        return Err(Fail::other("output file is smaller than input file"));
    }
    Ok(Target { image, chain, is_new: args.target_is_zero })
}

/// All that is open.
struct Work {
    images: Vec<Source>,
    target: Target,
    notes: Option<Notes>,
    record: Option<(PathBuf, Told)>,
}

/// What its engine is like.
fn setup(wanted: &Wanted, images: &[Source]) -> Setup {
    let direct = wanted.cache.direct || wanted.source_cache.direct;
    Setup {
        write: true,
        cache: wanted.cache,
        how: Some(if direct { How::Native } else { How::Threads }),
        depth: wanted.in_flight,
        has_remote: images.iter().any(|(_, chain)| has_remote(chain)),
        ..Setup::default()
    }
}

impl Work {
    /// Copies all, and leaves the target clean.
    fn run(
        self,
        args: &Args,
        wanted: &Wanted,
        progress: Progress,
        stop: &Stop,
        program: Program,
    ) -> Result<Option<Sum>, Ended> {
        let Work { images, target: Target { image, chain, is_new }, notes, record } = self;
        let parts = match (&args.incremental, &images[..]) {
            (Some(bitmap), [(image, chain)]) => Some(backup::changed(image, chain, bitmap)?),
            _ => None,
        };
        // Zeros are not seen where a layer is below.
        let below = chain.layers.get(1).map_or(0, |layer| layer.size());
        let form = form(args, wanted, &chain);
        if notes.is_some() && form.is_stream {
            return Err(Fail::other("--resume: a stream is written in one go").into());
        }
        // What was copied before, in whole units.
        let there = notes.as_ref().map_or(0, |notes| notes.copied);
        let there = there - there % form.unit as u64;
        let mut session = Session::over(&image, chain, &setup(wanted, &images))?;
        let (target, mut at, mut copies) = (session.node, 0, Vec::new());
        for (image, chain) in images {
            let (start, end) = (at, at + chain.size());
            let opened = |error| Fail::open_io(image.path(), &error);
            let source = attach(&mut session.engine, chain, &RunOptions::default());
            let source = source.map_err(opened)?;
            while at < end {
                let to = if at < below { end.min(below) } else { end };
                if to <= there {
                    at = to;
                    continue;
                }
                at = at.max(there);
                copies.push(Copy {
                    source,
                    target,
                    source_offset: at - start,
                    target_offset: at,
                    len: Some(to - at),
                    target_is_zero: is_new && at >= below,
                    top_layers: (has_backing(wanted) && parts.is_none()).then_some(1),
                    compressed: args.compress,
                    salvage: args.salvage,
                    offload: args.copy_range,
                    zeros: form.zeros,
                    unit: form.unit,
                    in_flight: form.in_flight,
                    piece: form.piece,
                    rate: wanted.rate,
                    ..Copy::new(source, target)
                });
                at = to;
            }
        }
        if let Some((path, told)) = record {
            told.begin(&path, session.engine.backend_mut())?;
        }
        let checksum = args.checksum.map(Checksum::new);
        Run { session, progress, stop, program, checksum, notes }.all(&copies, parts.as_deref())
    }
}

fn has_backing(wanted: &Wanted) -> bool {
    wanted.create.backing_file.is_some()
}

/// What all copies to a target have in common.
struct Form {
    zeros: Zeros,
    unit: usize,
    in_flight: usize,
    piece: usize,
    is_stream: bool,
}

/// So many zeros are left out if nothing is said.
const SPARSE: &str = "4k";

fn form(args: &Args, wanted: &Wanted, target: &Chain<AnyFile>) -> Form {
    /// More memory for each piece is no faster.
    const PIECE: u64 = 256 << 10;
    const PIECE_MAX: u64 = 2 << 20;
    let meta = target.layers.first().map(|top| &top.meta);
    let is_stream = matches!(meta, Some(LayerMeta::Vmdk(image))
        if image.descriptor.kind == Kind::StreamOptimized);
    let cluster = meta.and_then(LayerMeta::cluster_size).unwrap_or(0);
    // Whatever is written into a new cluster, all of it is. In an overlay the rest comes from below.
    // What is compressed is a whole cluster.
    let is_part = has_backing(wanted) && !args.compress;
    let cluster = if is_part { 0 } else { cluster };
    let unit = wanted.sparse.max(cluster).clamp(512, PIECE_MAX);
    let piece = if is_stream { PIECE_MAX } else { PIECE.max(unit) };
    Form {
        zeros: match wanted.sparse {
            0 => Zeros::Written,
            _ if args.copy_range => Zeros::Told,
            _ => Zeros::Found,
        },
        unit: unit as usize,
        // A stream is written in order.
        in_flight: if is_stream { 1 } else { wanted.in_flight },
        piece: piece as usize,
        is_stream,
    }
}
