//! `resize`: gives an image another size, through the engine as a guest would.

use std::io::Write;
use std::path::PathBuf;

use cowbell_engine::mem::Mem;
use cowbell_engine::step::{Io, IoKind};
use cowbell_formats::Node;
use cowbell_formats::create::parse_size;

use crate::fail::{Fail, Program};
use crate::info::format_for;
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
    /// How to take the space; off
    #[arg(long, value_name = "MODE", hide = true)]
    preallocation: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The image
    file: PathBuf,
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
    if let Some(mode) = args.preallocation.as_deref().filter(|&mode| mode != "off") {
        return Err(Fail::at(&args.file, format!("Unsupported preallocation mode '{mode}'")));
    }
    let format = format_for(&args.file, args.format.as_deref())?;
    let setup = Setup { format, write: true, depth: 1, ..Setup::default() };
    // A resize is over in a moment: a signal waits for it.
    let _stop = Stop::on_signals()?;
    let mut session = Session::open(&args.file, &setup)?;
    let result = resize(&mut session, args, program, sign, amount);
    let closed = session.drain();
    result?;
    closed?;
    let mut out = Out::new(args.quiet);
    writeln!(out, "Image resized.")?;
    out.flush()?;
    Ok(0)
}

fn resize(
    session: &mut Session,
    args: &Args,
    program: Program,
    sign: i32,
    amount: u64,
) -> Result<(), Fail> {
    let file = &args.file;
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
    if new < old && matches!(session.engine.node(session.node), Node::Qed(_)) {
        return Err(Fail::at(file, "Shrinking images is currently not supported"));
    }
    if new == old {
        return Ok(());
    }
    let io = Io { kind: IoKind::Truncate, offset: new, len: 0 };
    let node = session.node;
    let sent = session.engine.submit(node, io, Mem::None, 0);
    assert!(sent.is_ok(), "it is the only request");
    match session.next()?.map(|finished| finished.result) {
        Some(Err(errno)) => Err(Fail::at(file, format!("Failed to resize: {errno}"))),
        _ => Ok(()),
    }
}
