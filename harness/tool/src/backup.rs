//! `backup`: copies a disk into a new image that is kept, all of it or what has changed since the last time.
//!
//! It is a [`convert`] of one source, with the options that a backup wants.

use std::ffi::OsString;
use std::ops::Range;
use std::path::PathBuf;

use cowbell_formats::qcow2::rest::bitmap;
use cowbell_formats::{Chain, Error, LayerMeta};

use crate::checksum;
use crate::convert;
use crate::disk::AnyFile;
use crate::fail::{Fail, Program};
use crate::naming::{Image, Naming};

/// The options of `backup`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The source's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The target's format
    #[arg(short = 'O', long, value_name = "FMT", default_value = "qcow2")]
    output_format: String,
    /// Options of the target's format; `-o help` lists them
    #[arg(short, long, value_name = "KEY=VALUE,...", action = clap::ArgAction::Append)]
    options: Vec<String>,
    /// Compress what becomes smaller
    #[arg(short, long)]
    compressed: bool,
    /// How the target is written: direct, past the page cache, or cached
    #[arg(long, value_name = "HOW", default_value = "direct", value_parser = ["direct", "cached"])]
    target_cache: String,
    /// Only what this bitmap of a qcow2 source says has changed; the rest is in the backup before, named by -B
    #[arg(long, value_name = "BITMAP")]
    incremental: Option<String>,
    /// The backup before, as the target shall name it
    #[arg(short = 'B', long, value_name = "FILE")]
    backing: Option<PathBuf>,
    /// Its format
    #[arg(short = 'F', long, value_name = "FMT", default_value = "qcow2")]
    backing_format: String,
    /// Pieces in flight, up to 16
    #[arg(short = 'm', long, value_name = "COUNT", default_value = "8")]
    parallel: String,
    /// At most so many bytes a second
    #[arg(short, long, value_name = "BYTES")]
    rate_limit: Option<String>,
    /// Say how far it is
    #[arg(short, long)]
    progress: bool,
    /// Say nothing but what is wrong
    #[arg(short, long)]
    quiet: bool,
    /// Say how far it is, as lines of JSON, on this descriptor
    #[arg(long, value_name = "FD")]
    progress_fd: Option<u32>,
    /// Record all that the engine is asked and sees in this file, but no byte of the images' data: `replay` does it
    /// again
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Go on where the same command was ended before, and leave what there is if this one is, as TARGET.partial
    #[arg(long)]
    resume: bool,
    /// Print a checksum of the disk, as its guest reads it: that of a raw image of it
    #[arg(long, value_name = "KIND")]
    checksum: Option<checksum::Kind>,
    #[command(flatten)]
    naming: Naming,
    /// The disk
    source: OsString,
    /// The new image
    target: OsString,
}

/// Runs it.
pub fn run(args: Args, program: Program) -> Result<u8, Fail> {
    if args.incremental.is_some() != args.backing.is_some() {
        let what = "--incremental and -B go together: what has not changed is in the backup before";
        return Err(Fail::other(what));
    }
    let direct = args.target_cache == "direct";
    let backing_format = args.backing.as_ref().map(|_| args.backing_format);
    let copy = convert::Args {
        format: args.format,
        output_format: args.output_format,
        options: args.options,
        backing: args.backing,
        backing_format,
        compress: args.compressed,
        snapshot: None,
        cache: direct.then(|| "none".into()),
        source_cache: None,
        parallel: args.parallel,
        out_of_order: true,
        rate_limit: args.rate_limit,
        sparse: None,
        copy_range: false,
        no_create: false,
        target_is_zero: false,
        target_image_opts: false,
        bitmaps: false,
        skip_broken_bitmaps: false,
        salvage: false,
        progress: args.progress,
        quiet: args.quiet,
        progress_fd: args.progress_fd,
        record: args.record,
        resume: args.resume,
        checksum: args.checksum,
        incremental: args.incremental,
        naming: args.naming,
        files: vec![args.source, args.target],
    };
    convert::run(&copy, program)
}

/// What a bitmap of a qcow2 image says has changed on its disk.
pub fn changed(image: &Image, chain: &Chain<AnyFile>, name: &str) -> Result<Vec<Range<u64>>, Fail> {
    let failed = |why: Error| image.failed(why);
    let top = chain.layers.first();
    let Some((layer, LayerMeta::Qcow2(opened))) = top.map(|layer| (layer, &layer.meta)) else {
        return Err(failed(Error::Invalid("only qcow2 images have bitmaps".into())));
    };
    let bitmaps = bitmap::read(&layer.file, &opened.header).map_err(failed)?;
    let found = bitmaps.iter().find(|bitmap| bitmap.name == name.as_bytes());
    let missing = || Error::Invalid(format!("there is no bitmap '{name}' in the image"));
    let found = found.ok_or_else(missing).map_err(failed)?;
    found.changed(&layer.file, &opened.header, opened.header.disk_size()).map_err(failed)
}
