//! `dd`: copies a part of a disk, given in blocks, into a new image of any format.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cowbell_engine::{Copy, Zeros};
use cowbell_formats::create::{self, CreateOptions};
use cowbell_formats::error::Shown;
use cowbell_formats::{Error, PartialFiles, RunOptions, attach};

use crate::checksum::{self, Checksum, Sum};
use crate::copying::{Ended, NewTarget, Run, Source, Target, finish};
use crate::disk::{Files, has_remote};
use crate::fail::{Fail, Program};
use crate::locking;
use crate::naming::Naming;
use crate::number::{count, size};
use crate::progress::{self, Progress};
use crate::session::{Session, Setup};
use crate::stop::Stop;

/// The options of `dd`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The source's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The target's format
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    output_format: String,
    /// Print a checksum of what was copied, as a guest reads it
    #[arg(long, value_name = "KIND", help_heading = "Beyond QEMU")]
    checksum: Option<checksum::Kind>,
    #[command(flatten)]
    naming: Naming,
    /// if=FILE and of=FILE: the source, and the target to make; bs=N: bytes in a block, 512 if not
    /// said; count=N: how many blocks of the source to look at; skip=N: how many of these to leave out
    #[arg(value_name = "OPERAND")]
    operands: Vec<OsString>,
}

/// What the operands say.
struct Operands<'a> {
    source: &'a OsStr,
    target: &'a OsStr,
    block: u64,
    count: Option<u64>,
    skip: u64,
}

/// Runs it.
pub fn run(args: &Args, program: Program) -> Result<u8, Fail> {
    let operands = Operands::parse(&args.operands)?;
    let stop = Stop::on_signals()?;
    let image = args.naming.image(operands.source, args.format.as_deref())?;
    let chain = image.open(&Files::default(), false)?;
    let format = create::format_named(&args.output_format).map_err(|why| {
        // QEMU does not say which.
        let is_unknown = program != Program::Cowbell && matches!(why, Error::Invalid(_));
        if is_unknown { Fail::other("Unknown file format") } else { Fail::other(why) }
    })?;
    let (from, len) = operands.part(chain.size());
    let options =
        CreateOptions { size: Some(len), locking: locking::chosen(), ..CreateOptions::default() };
    let sources = [(image, chain)];
    let partial = PartialFiles::new(locking::chosen());
    let doing = "error while creating output image";
    let name = operands.target;
    let new = NewTarget { name, format, options: &options, direct: false, doing };
    let target = new.make(&sources, &partial, &stop)?;
    let [source] = sources;
    if operands.is_beyond(source.1.size()) {
        // It is said, and the target is there, with nothing in it.
        let beyond = Fail::file(&source.0.given, "cannot skip to specified offset");
        beyond.report(program, "dd");
    }
    let progress = Progress::new(progress::Shown::Nothing, len, None)?;
    let checksum = args.checksum.map(Checksum::new);
    let copied = copy(source, target, (from, len), progress, checksum, &stop, program);
    finish(copied, partial, Path::new(name), false, false)
}

impl Operands<'_> {
    fn parse(operands: &[OsString]) -> Result<Operands<'_>, Fail> {
        let (mut source, mut target) = (None, None);
        let (mut block, mut blocks, mut skip) = (512, None, 0);
        for operand in operands {
            let bytes = operand.as_bytes();
            let key_len = bytes.iter().position(|&byte| byte == b'=').unwrap_or(bytes.len());
            let (key, value) = (&bytes[..key_len], bytes.get(key_len + 1..));
            let named = Path::new(OsStr::from_bytes(key));
            let unknown = || Fail::other(format!("unrecognized operand {}", Shown(named)));
            let value = OsStr::from_bytes(value.ok_or_else(unknown)?);
            let text = value.to_string_lossy();
            match key {
                b"if" => source = Some(value),
                b"of" => target = Some(value),
                b"bs" => block = size("bs", &text, 1, i32::MAX as u64)?,
                b"count" => blocks = Some(count("count", &text, 0, i64::MAX as u64)?),
                b"skip" => skip = count("skip", &text, 0, i64::MAX as u64)?,
                _ => return Err(unknown()),
            }
        }
        let (Some(source), Some(target)) = (source, target) else {
            return Err(Fail::other("Must specify both input and output files"));
        };
        Ok(Operands { source, target, block, count: blocks, skip })
    }

    /// Where the blocks end that are looked at, on a disk of `size` bytes.
    fn end(&self, size: u64) -> u64 {
        self.count.map_or(size, |count| count.saturating_mul(self.block).min(size))
    }

    /// Where the part begins that is copied, and how many bytes it has. As QEMU has it, blocks that are
    /// skipped count.
    fn part(&self, size: u64) -> (u64, u64) {
        let end = self.end(size);
        let from = self.skip.saturating_mul(self.block).min(end);
        (from, end - from)
    }

    /// Is the place to skip to beyond all that there is?
    fn is_beyond(&self, size: u64) -> bool {
        self.skip.saturating_mul(self.block) > self.end(size)
    }
}

/// So many zeros in the data are left out.
const SPARSE: u64 = 4096;
/// A piece is no longer.
const PIECE_MAX: u64 = 2 << 20;

/// Copies `len` bytes from byte `from` of the source on, and leaves the target clean.
fn copy(
    source: Source,
    target: Target,
    (from, len): (u64, u64),
    progress: Progress,
    checksum: Option<Checksum>,
    stop: &Stop,
    program: Program,
) -> Result<Option<Sum>, Ended> {
    let Target { image, chain, is_new } = target;
    let cluster = chain.layers.first().and_then(|top| top.meta.cluster_size());
    // Whatever is written into a new cluster, all of it is.
    let unit = cluster.unwrap_or(0).clamp(SPARSE, PIECE_MAX) as usize;
    let setup = Setup { write: true, has_remote: has_remote(&source.1), ..Setup::default() };
    let mut session = Session::over(&image, chain, &setup)?;
    let (image, chain) = source;
    let opened = |error| Fail::open_io(image.path(), &error);
    let node = attach(&mut session.engine, chain, &RunOptions::default()).map_err(opened)?;
    let whole = Copy::new(node, session.node);
    let copy = Copy {
        source_offset: from,
        len: Some(len),
        target_is_zero: is_new,
        zeros: Zeros::Found,
        unit,
        piece: whole.piece.max(unit),
        ..whole
    };
    let copies = if len > 0 { vec![copy] } else { Vec::new() };
    Run { session, progress, stop, program, checksum, notes: None }.all(&copies, None)
}
