//! `measure`: says how large the file of a new image will be.

use std::ffi::{OsStr, OsString};
use std::io::Write;

use cowbell_formats::create::{self, CreateOptions};
use cowbell_formats::measure::{Measure, not_measured, of_size, of_source};
use cowbell_formats::{Foreign, Format};

use crate::at_snapshot;
use crate::disk::Files;
use crate::fail::{Fail, Program};
use crate::info::Form;
use crate::json::Json;
use crate::naming::Naming;
use crate::out::Out;
use crate::session::eprint_quietly;

/// The options of `measure`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The new image's format: raw or qcow2
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    target_format: String,
    /// Options of that format, as `create` takes them
    #[arg(short, long, value_name = "KEY=VALUE,...", action = clap::ArgAction::Append)]
    options: Vec<String>,
    /// The size of an empty disk: a number with k, M, G or T
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// The source's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The source as it was at this snapshot in it: an id or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<OsString>,
    /// human or json
    #[arg(long, value_name = "FORM", default_value = "human")]
    output: String,
    #[command(flatten)]
    naming: Naming,
    /// The image whose disk will be copied into the new one
    #[arg(value_name = "FILE")]
    files: Vec<OsString>,
}

/// Runs it.
pub fn run(args: &Args, program: Program) -> Result<u8, Fail> {
    let form = Form::named(&args.output, "measure")?;
    let size = args.size.as_deref().map(create::image_size).transpose().map_err(Fail::other)?;
    let measured = match (source(args)?, size) {
        (Some(_), Some(_)) => {
            return Err(Fail::other("--size N cannot be used together with a filename."));
        }
        (None, None) => {
            return Err(Fail::other("Either --size N or one filename must be specified."));
        }
        (Some(file), None) => {
            let image = args.naming.image(file, args.format.as_deref())?;
            let mut chain = image.open(&Files::default(), false)?;
            if let Some(snapshot) = &args.snapshot {
                at_snapshot::take(&mut chain, snapshot)?;
            }
            let (format, options) = wanted(args, program)?;
            of_source(format, &chain, &options)
        }
        (None, Some(size)) => {
            let (format, options) = wanted(args, program)?;
            of_size(format, size, &options)
        }
    };
    let measured = measured.map_err(Fail::other)?;
    let mut out = Out::new(false);
    match form {
        Form::Human => write!(out, "{}", human(&measured))?,
        Form::Json => writeln!(out, "{}", json(&measured).pretty())?,
    }
    out.flush()?;
    Ok(0)
}

/// The file that is named, if one is.
fn source(args: &Args) -> Result<Option<&OsStr>, Fail> {
    match &args.files[..] {
        [] if args.naming.is_by_options() || args.format.is_some() || args.snapshot.is_some() => {
            Err(Fail::other("--image-opts, -f, and -l require a filename argument."))
        }
        [] => Ok(None),
        [file] => Ok(Some(file)),
        _ => Err(Fail::other("At most one filename argument is allowed.")),
    }
}

/// What image it shall be.
fn wanted(args: &Args, program: Program) -> Result<(Format, CreateOptions), Fail> {
    let name = &args.target_format;
    let format = create::format_named(name).map_err(|why| match Foreign::from_name(name) {
        Some(_) => Fail::other(not_measured(name)),
        None => Fail::other(why),
    })?;
    let mut options = CreateOptions::default();
    for text in &args.options {
        options.parse(format, text).map_err(|why| {
            if program == Program::Cowbell {
                return Fail::other(why);
            }
            eprint_quietly(&format!("{}: {why}\n", program.name()));
            Fail::other(format!("Invalid options for file format '{format}'"))
        })?;
    }
    Ok((format, options))
}

fn human(measured: &Measure) -> String {
    let bitmaps = measured.bitmaps.map(|bytes| format!("bitmaps size: {bytes}\n"));
    format!(
        "required size: {}\nfully allocated size: {}\n{}",
        measured.required,
        measured.fully_allocated,
        bitmaps.unwrap_or_default()
    )
}

fn json(measured: &Measure) -> Json {
    let bitmaps = measured.bitmaps.map(|bytes| ("bitmaps", Json::Int(bytes)));
    let mut members = Vec::from_iter(bitmaps);
    members.push(("required", Json::Int(measured.required)));
    members.push(("fully-allocated", Json::Int(measured.fully_allocated)));
    Json::Object(members)
}
