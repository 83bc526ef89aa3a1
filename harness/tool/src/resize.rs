//! `resize`: gives an image another size, through the engine as a guest would.

use std::ffi::OsString;
use std::io::Write;

use cowbell_engine::mem::Mem;
use cowbell_engine::step::Io;
use cowbell_engine::units::Errno;
use cowbell_formats::chain::open_whole_layer;
use cowbell_formats::create::parse_size;
use cowbell_formats::preallocation::Preallocation;
use cowbell_formats::{Error, Format};

use crate::disk::{Files, StoppableHost};
use crate::fail::{Fail, Program};
use crate::naming::{Image, Naming};
use crate::out::Out;
use crate::session::{Session, Setup, eprint_quietly};
use crate::stop::Stop;

/// The options of `resize`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Allow the image to become smaller: what is cut off is lost
    #[arg(long)]
    shrink: bool,
    /// How to take the space that it gains: off, metadata (qcow2), falloc or full (raw, qcow2)
    #[arg(long, value_name = "MODE")]
    preallocation: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    naming: Naming,
    /// The image
    file: OsString,
    /// The new size; with + or - in front, by how much it changes
    size: String,
}

/// Runs it.
pub fn run(args: &Args, program: Program) -> Result<u8, Fail> {
    let (sign, number) = match args.size.as_bytes() {
        [b'+', ..] => (1, &args.size[1..]),
        [b'-', ..] => (-1, &args.size[1..]),
        _ => (0, &args.size[..]),
    };
    let amount = parse_size(number).map_err(|_| {
        let what = "Parameter 'size' expects a non-negative number below 2^64";
        let units = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                     and exabytes, respectively.";
        match program {
            Program::Cowbell => Fail::other(what),
            _ => Fail::other(format!("{what}\n{units}")),
        }
    })?;
    let how = match args.preallocation.as_deref() {
        None => Preallocation::Off,
        Some(mode) => Preallocation::from_name(mode)
            .ok_or_else(|| Fail::other(format!("Invalid preallocation mode '{mode}'")))?,
    };
    let image = args.naming.image(&args.file, args.format.as_deref())?;
    let setup = Setup { write: true, depth: 1, ..Setup::default() };
    // Before its last write a change has changed nothing: a signal ends it there.
    let stop = Stop::on_signals()?;
    let mut session = Session::open(&image, &setup)?;
    let old = session.size();
    let new = new_size(&session, args, (sign, amount), how, program)?;
    let format = session.engine.node(session.node).format();
    let before = session.before.take().expect("it is open for writing");
    let failed = |why: Error| Fail::at(&image.given, format!("Failed to resize: {why}"));
    let refused = before.check_resize(new).map_err(|why| match why {
        Error::Invalid(what) if program == Program::QemuImg => Fail::other(format!(
            "{what}\nTry block-dirty-bitmap-remove to delete this bitmap from disk"
        )),
        why => failed(why),
    });
    // The session's locks are held until the end.
    let mut image = image.clone().locked();
    image.format = Some(format);
    let options = image.options(true);
    let host = StoppableHost { disk: Files::default(), stop: stop.clone() };
    let takes_space = new > old && matches!(format, Format::Raw | Format::Qcow2);
    let mut result = refused.and_then(|()| {
        if takes_space {
            // What cannot take space does not grow first.
            let layer = open_whole_layer(&host, image.path(), &image.options(false));
            let can = layer.and_then(|layer| before.check_preallocation(&layer, how));
            can.map_err(failed)?;
        }
        Ok(())
    });
    if result.is_ok() {
        result = resize(&mut session, (old, new), || stop.is_asked());
        if result.is_err() && stop.is_asked() {
            // The image is what a kill leaves: the old one or the new, leaks at worst.
            return result.map(|()| 0);
        }
    }
    let closed = session.drain();
    let Session { engine, locks, .. } = session;
    drop(engine);
    result = result.and(closed);
    if takes_space && result.is_ok() {
        let layer = open_whole_layer(&host, image.path(), &options);
        result = layer.and_then(|layer| before.preallocate(&layer, how)).map_err(failed);
        if result.is_err() && format == Format::Qcow2 {
            shrink(&image, old)?;
        }
    }
    if before.has_bitmaps() {
        let layer = open_whole_layer(&Files::default(), image.path(), &options);
        let bitmaps = layer.and_then(|layer| before.resize_bitmaps(&layer));
        result = result.and(bitmaps.map_err(failed));
    }
    result?;
    drop(locks);
    let mut out = Out::new(args.quiet);
    writeln!(out, "Image resized.")?;
    out.flush()?;
    Ok(0)
}

fn new_size(
    session: &Session,
    args: &Args,
    (sign, amount): (i32, u64),
    how: Preallocation,
    program: Program,
) -> Result<u64, Fail> {
    let file = &session.image.given;
    let old = session.size();
    let new = match sign {
        1 => old.checked_add(amount),
        -1 => old.checked_sub(amount),
        _ => Some(amount),
    };
    let Some(new) = new.filter(|&new| new > 0 || sign == 0) else {
        return Err(Fail::at(file, "New image size must be positive"));
    };
    let Some(new) = new.checked_next_multiple_of(512).filter(|&new| new <= i64::MAX as u64) else {
        return Err(Fail::at(file, "Image size is too large"));
    };
    if new <= old && how != Preallocation::Off {
        return Err(Fail::at(file, "Preallocation can only be used for growing images"));
    }
    if new < old && !args.shrink {
        if program == Program::QemuImg {
            eprint_quietly("qemu-img: Use the --shrink option to perform a shrink operation.\n");
            eprint_quietly(
                "qemu-img: warning: Shrinking an image will delete all data beyond the shrunken \
                 image's end. Before performing such an operation, make sure there is no \
                 important data there.\n",
            );
            return Err(Fail::said(1));
        }
        return Err(Fail::at(
            file,
            format!("{new} bytes is less than the image's {old}; --shrink cuts off the rest"),
        ));
    }
    match session.engine.node(session.node).format() {
        Format::Vdi => Err(Fail::other("Image format driver does not support resize")),
        Format::Qed if new < old => {
            Err(Fail::at(file, "Shrinking images is currently not supported"))
        }
        Format::Raw if !how.suits(Format::Raw) => {
            Err(Fail::at(file, format!("Unsupported preallocation mode: {how}")))
        }
        format if !how.suits(format) => {
            Err(Fail::at(file, format!("Unsupported preallocation mode '{how}'")))
        }
        _ => Ok(new),
    }
}

/// What could not take its space gives back what it had gained.
fn shrink(image: &Image, old: u64) -> Result<(), Fail> {
    let setup = Setup { write: true, depth: 1, ..Setup::default() };
    let mut session = Session::open(image, &setup)?;
    let new = session.size();
    resize(&mut session, (new, old), || false)?;
    session.drain()
}

/// Resizes the disk. What is behind a smaller disk's end is cleared, which may take long: a signal
/// ends it.
fn resize(
    session: &mut Session,
    (old, new): (u64, u64),
    is_asked: impl Fn() -> bool,
) -> Result<(), Fail> {
    let file = session.image.given.clone();
    let failed = |errno: Errno| Fail::at(&file, format!("Failed to resize: {errno}"));
    if new == old {
        return Ok(());
    }
    let io = Io::truncate(new);
    let node = session.node;
    let sent = session.engine.submit(node, io, Mem::None, 0);
    assert!(sent.is_ok(), "it is the only request");
    let finished = session.next_unless(is_asked)?;
    match finished.map(|finished| finished.result) {
        Some(result) => result.map(|_| ()).map_err(failed),
        None => Err(failed(Errno::INTERRUPTED)),
    }
}
