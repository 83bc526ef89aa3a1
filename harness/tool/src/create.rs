//! `create`: makes an image.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;

use cowbell_formats::chain::driver_named;
use cowbell_formats::create::{self, CreateOptions};
use cowbell_formats::{Error, Format};

use crate::disk::{Files, StoppableHost};
use crate::fail::Fail;
use crate::locking;
use crate::naming::{refuse_objects, target};
use crate::out::Out;
use crate::stop::Stop;

/// The options of `create`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Format: raw, qed or qcow2
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: String,
    /// Backing file, as the image shall name it
    #[arg(short, long, value_name = "FILE")]
    backing: Option<OsString>,
    /// The backing file's format
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,
    /// Do not look at the backing file; then SIZE has to be said
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// No object is of use here: each is refused by its type
    #[arg(long = "object", value_name = "OBJDEF", hide = true)]
    objects: Vec<String>,
    /// Options of the format; `-o help` lists them
    #[arg(short, long, value_name = "KEY=VALUE,...", action = clap::ArgAction::Append)]
    options: Vec<String>,
    /// The image to make
    #[arg(value_name = "FILE")]
    file: Option<OsString>,
    /// The disk's size: a number with k, M, G or T; the backing file's if not said
    #[arg(allow_negative_numbers = true)]
    size: Option<String>,
}

/// Runs it.
pub fn run(args: Args) -> Result<u8, Fail> {
    let is_help = |text: &String| text.split(',').any(|item| item == "help" || item == "?");
    if args.options.iter().any(is_help) {
        return help(&args.format, args.file.is_some());
    }
    let Some(file) = &args.file else {
        return Err(Fail::usage(
            "Expecting image file name".into(),
            "Try 'qemu-img create --help' for more info".into(),
        ));
    };
    refuse_objects(&args.objects)?;
    let path = target(file)?;
    let at = |why: Error| Fail::file(Path::new(file), why);
    let format = create::format_named(&args.format).map_err(at)?;
    let mut options = CreateOptions { locking: locking::chosen(), ..CreateOptions::default() };
    for text in &args.options {
        options.parse(format, text).map_err(at)?;
    }
    if let Some(name) = args.backing {
        options.backing_file = Some(name.into());
    }
    if let Some(name) = &args.backing_format {
        options.backing_format = Some(driver_named(name).map_err(at)?);
    }
    options.backing_unchecked = args.backing_unsafe;
    if let Some(text) = &args.size {
        let size = create::image_size(text).map_err(Fail::other)?;
        if options.size.is_some() {
            return Err(Fail::file(Path::new(file), "The image size must be specified only once"));
        }
        options.size = Some(size);
    }
    let stop = Stop::on_signals()?;
    let host = StoppableHost { disk: Files::default(), stop };
    let plan = create::plan(&host, &path, format, &options).map_err(at)?;
    let mut out = Out::new(args.quiet);
    writeln!(out, "{}", plan.formatting(Path::new(file)))?;
    out.flush()?;
    plan.run(&host).map_err(at)?;
    Ok(0)
}

/// Lists a format's options as QEMU lists them.
pub fn help(format: &str, with_file: bool) -> Result<u8, Fail> {
    let format = create::format_named(format).map_err(Fail::other)?;
    let lines = match format {
        Format::Raw => {
            "  preallocation=<str>    - Preallocation mode (allowed values: off, falloc, full)\n  \
             size=<size>            - Virtual disk size\n"
        }
        Format::Qed => {
            "  backing_file=<str>     - File name of a base image\n  \
             backing_fmt=<str>      - Image format of the base image\n  \
             cluster_size=<size>    - Cluster size (in bytes)\n  \
             size=<size>            - Virtual disk size\n  \
             table_size=<size>      - L1/L2 table size (in clusters)\n"
        }
        Format::Qcow2 => {
            "  backing_file=<str>     - File name of a base image\n  \
             backing_fmt=<str>      - Image format of the base image\n  \
             cluster_size=<size>    - qcow2 cluster size\n  \
             compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])\n  \
             compression_type=<str> - Compression method used for image cluster compression\n  \
             data_file=<str>        - File name of an external data file\n  \
             data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw \
             image\n  \
             extended_l2=<bool (on/off)> - Extended L2 tables\n  \
             lazy_refcounts=<bool (on/off)> - Postpone refcount updates\n  \
             preallocation=<str>    - Preallocation mode (allowed values: off, metadata, falloc, \
             full)\n  \
             refcount_bits=<num>    - Width of a reference count entry in bits\n  \
             size=<size>            - Virtual disk size\n"
        }
        Format::Vdi => {
            "  preallocation=<str>    - Preallocation mode (allowed values: off, falloc, full)\n  \
             size=<size>            - Virtual disk size\n  \
             static=<bool (on/off)> - VDI static (pre-allocated) image\n"
        }
        Format::Vmdk => {
            "  adapter_type=<str>     - Virtual adapter type, can be one of ide (default), lsilogic, \
             buslogic or legacyESX\n  \
             backing_file=<str>     - File name of a base image\n  \
             backing_fmt=<str>      - Must be 'vmdk' if present\n  \
             compat6=<bool (on/off)> - VMDK version 6 image\n  \
             hwversion=<str>        - VMDK hardware version\n  \
             size=<size>            - Virtual disk size\n  \
             subformat=<str>        - VMDK flat extent format, can be one of {monolithicSparse \
             (default) | monolithicFlat | twoGbMaxExtentSparse | twoGbMaxExtentFlat | \
             streamOptimized} \n  \
             toolsversion=<str>     - VMware guest tools version\n  \
             zeroed_grain=<bool (on/off)> - Enable efficient zero writes using the zeroed-grain \
             GTE feature\n"
        }
    };
    let mut out = Out::new(false);
    if with_file {
        // Those of files too.
        const NOCOW: &str =
            "  nocow=<bool (on/off)>  - Turn off copy-on-write (valid only on btrfs)";
        let key = |line: &str| line.trim_start().split('=').next().map(str::to_string);
        let mut lines: Vec<&str> = lines.lines().chain([NOCOW]).collect();
        lines.sort_by_key(|line| key(line));
        writeln!(out, "Supported options:\n{}", lines.join("\n"))?;
    } else {
        write!(out, "Supported {format} options:\n{lines}\n")?;
        writeln!(out, "The protocol level may support further options.")?;
        writeln!(out, "Specify the target filename to include those options.")?;
    }
    out.flush()?;
    Ok(0)
}
