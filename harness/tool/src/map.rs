//! `map`: says what is where in an image and the files it is backed by.

use std::ffi::OsString;
use std::io::Write;

use cowbell_formats::Format;
use cowbell_formats::error::Shown;
use cowbell_formats::map::{Extent, Kind, extents_in};

use crate::disk::Files;
use crate::fail::Fail;
use crate::info::Form;
use crate::naming::Naming;
use crate::number::offset;
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
    /// Where to begin, on the disk
    #[arg(short, long, value_name = "OFFSET", allow_hyphen_values = true)]
    start_offset: Option<String>,
    /// How far to go from there
    #[arg(short = 'l', long, value_name = "LENGTH", allow_hyphen_values = true)]
    max_length: Option<String>,
    #[command(flatten)]
    naming: Naming,
    /// The image
    file: OsString,
}

/// Runs it.
pub fn run(args: &Args) -> Result<u8, Fail> {
    let form = Form::named(&args.output, "map")?;
    let start = offset("start offset", args.start_offset.as_deref())?.unwrap_or(0);
    let len = offset("max length", args.max_length.as_deref())?.unwrap_or(u64::MAX);
    let image = args.naming.image(&args.file, args.format.as_deref())?;
    let chain = image.open(&Files::default(), false)?;
    let end = chain.size().min(start.saturating_add(len));
    let mut out = Out::new(false);
    if form == Form::Human {
        writeln!(out, "{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to")?;
    }
    let mut first = true;
    for extent in extents_in(&chain, start..end) {
        let extent = match extent {
            Ok(extent) => extent,
            Err(why) => {
                writeln!(out)?;
                out.flush()?;
                return Err(Fail::file(&image.given, why));
            }
        };
        // QEMU says so of the flat extents of VMDK images, though not of raw ones.
        let holes_are_data = chain.layers[extent.depth].format == Format::Vmdk;
        match form {
            Form::Human if extent.kind == Kind::Compressed => {
                out.flush()?;
                let what = "File contains external, encrypted or compressed clusters.";
                return Err(Fail::at(&image.given, what));
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
        if first {
            let kind = Kind::Unallocated;
            let nothing = Extent { start, len: 0, depth: 0, file: 0, kind };
            write!(out, "[{}", json(&nothing, false))?;
        }
        writeln!(out, "]")?;
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
        // Nothing is said of nothing.
        extent.is_zero() && extent.len > 0,
        !extent.is_zero() || holes_are_data && extent.host().is_some(),
        extent.kind == Kind::Compressed,
    )
}
