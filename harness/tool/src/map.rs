//! `map`: says what is where in an image and the files it is backed by.

use std::io::Write;
use std::path::PathBuf;

use cowbell_formats::error::Shown;
use cowbell_formats::map::{Extent, Kind, extents};
use cowbell_formats::{DiskHost, Format, OpenOptions, Policy};

use crate::fail::Fail;
use crate::info::{Form, format_for};
use crate::locking;
use crate::out::Out;

/// The options of `map`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// human or json
    #[arg(long, value_name = "FORM", default_value = "human")]
    output: String,
    /// Read although another program may write the image meanwhile
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The image
    file: PathBuf,
}

/// Runs it.
pub fn run(args: &Args) -> Result<u8, Fail> {
    let form = Form::named(&args.output, "map")?;
    let format = format_for(&args.file, args.format.as_deref())?;
    let options = OpenOptions {
        format,
        backing: Policy::Any,
        locking: locking::chosen(),
        force_share: args.force_share,
        ..OpenOptions::default()
    };
    let open = |why| Fail::open(&args.file, why);
    let chain = cowbell_formats::open(&DiskHost::default(), &args.file, &options).map_err(open)?;
    let mut out = Out::new(false);
    if form == Form::Human {
        writeln!(out, "{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to")?;
    }
    let mut first = true;
    for extent in extents(&chain) {
        let extent = match extent {
            Ok(extent) => extent,
            Err(why) => {
                writeln!(out)?;
                out.flush()?;
                return Err(Fail::file(&args.file, why));
            }
        };
        // QEMU says so of the flat extents of VMDK images, though not of raw ones.
        let holes_are_data = chain.layers[extent.depth].format == Format::Vmdk;
        match form {
            Form::Human if extent.kind == Kind::Compressed => {
                out.flush()?;
                let what = "File contains external, encrypted or compressed clusters.";
                return Err(Fail::at(&args.file, what));
            }
            Form::Human if !extent.is_zero() => {
                let host = extent.host().map_or(0, |host| host.0);
                let file = chain.layers[extent.depth].numbered_path(extent.file);
                let file = Shown(&file);
                let (start, len) = (extent.start, extent.len);
                writeln!(out, "{}{}{}{file}", hex(start), hex(len), hex(host))?;
            }
            Form::Human => {}
            Form::Json => {
                write!(
                    out,
                    "{}{}",
                    if first { "[" } else { ",\n" },
                    json(&extent, holes_are_data)
                )?;
            }
        }
        first = false;
    }
    if form == Form::Json {
        writeln!(out, "{}]", if first { "[" } else { "" })?;
    }
    out.flush()?;
    Ok(0)
}

/// As C's `%#-16x`: zero has no prefix.
fn hex(value: u64) -> String {
    if value == 0 { format!("{:<16}", 0) } else { format!("{:<16}", format!("{value:#x}")) }
}

fn json(extent: &Extent, holes_are_data: bool) -> String {
    let offset = extent.host().map_or(String::new(), |host| format!(", \"offset\": {}", host.0));
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
         \"data\": {}, \"compressed\": {}{offset}}}",
        extent.start,
        extent.len,
        extent.depth,
        extent.is_present(),
        extent.is_zero(),
        !extent.is_zero() || holes_are_data && extent.host().is_some(),
        extent.kind == Kind::Compressed,
    )
}
