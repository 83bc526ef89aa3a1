//! `compare`: do two images hold the same disk?

use std::io::Write;
use std::path::{Path, PathBuf};

use cowbell_engine::sys::disk::DiskFile;
use cowbell_formats::map::{Extent, read, status};
use cowbell_formats::{Chain, DiskHost, Error, OpenOptions, Policy};

use crate::fail::Fail;
use crate::info::format_for;
use crate::locking;
use crate::out::Out;

/// The options of `compare`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The first image's format; probed if not said
    #[arg(short = 'f', long = "a-format", value_name = "FMT")]
    first_format: Option<String>,
    /// The second image's format; probed if not said
    #[arg(short = 'F', long = "b-format", value_name = "FMT")]
    second_format: Option<String>,
    /// Also compare sizes and what is allocated
    #[arg(short, long)]
    strict: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Accepted for compatibility
    #[arg(short = 'T', value_name = "CACHE", hide = true)]
    cache: Option<String>,
    /// Accepted for compatibility
    #[arg(short = 'p', hide = true)]
    progress: bool,
    /// Read although another program may write the image meanwhile
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Two images
    #[arg(num_args = 2, required = true)]
    files: Vec<PathBuf>,
}

const DIFFERENT: u8 = 1;
/// An image could not be opened.
const NOT_OPENED: u8 = 2;
/// An image's map could not be read.
const NO_STATUS: u8 = 3;
/// An image could not be read.
const NOT_READ: u8 = 4;

/// Bytes compared at a time.
const STEP: u64 = 2 << 20;
/// A mismatch is found to the sector.
const SECTOR: usize = 512;

struct Side<'a> {
    path: &'a Path,
    chain: Chain<DiskFile>,
    buf: Vec<u8>,
}

impl Side<'_> {
    fn open<'a>(path: &'a Path, format: Option<&str>, force_share: bool) -> Result<Side<'a>, Fail> {
        let format = format_for(path, format)?;
        let options = OpenOptions {
            format,
            backing: Policy::Any,
            locking: locking::chosen(),
            force_share,
            ..OpenOptions::default()
        };
        let chain = cowbell_formats::open(&DiskHost::default(), path, &options);
        let chain = chain.map_err(|why| Fail::open(path, why))?;
        Ok(Side { path, chain, buf: Vec::new() })
    }

    fn extent(&self, at: u64, len: u64) -> Result<Extent, Fail> {
        status(&self.chain, at, len).map_err(|why| {
            let what = format!("Sector allocation test failed: {why}");
            Fail::at(self.path, what).with_code(NO_STATUS)
        })
    }

    fn read(&mut self, at: u64, len: u64) -> Result<&[u8], Fail> {
        self.buf.resize(len as usize, 0);
        let result = read(&self.chain, at, &mut self.buf);
        result.map_err(|why: Error| {
            let what = format!("Error while reading offset {at}: {why}");
            Fail::at(self.path, what).with_code(NOT_READ)
        })?;
        Ok(&self.buf)
    }
}

/// Runs it.
pub fn run(args: &Args) -> Result<u8, Fail> {
    let [a, b] = &args.files[..] else {
        return Err(Fail::other("Expecting two image file names"));
    };
    let mut out = Out::new(args.quiet);
    let opened = |fail: Fail| fail.with_code(NOT_OPENED);
    let mut a = Side::open(a, args.first_format.as_deref(), args.force_share).map_err(opened)?;
    let mut b = Side::open(b, args.second_format.as_deref(), args.force_share).map_err(opened)?;
    let verdict = compare(&mut a, &mut b, args.strict, &mut out)?;
    writeln!(out, "{}", verdict.as_deref().unwrap_or("Images are identical."))?;
    out.flush()?;
    Ok(if verdict.is_some() { DIFFERENT } else { 0 })
}

/// What is different; `None`: nothing.
fn compare<'a>(
    a: &mut Side<'a>,
    b: &mut Side<'a>,
    strict: bool,
    out: &mut Out,
) -> Result<Option<String>, Fail> {
    if strict && a.chain.size() != b.chain.size() {
        return Ok(Some("Strict mode: Image size mismatch!".into()));
    }
    let common = a.chain.size().min(b.chain.size());
    let mut at = 0;
    while at < common {
        let (first, second) = (a.extent(at, common - at)?, b.extent(at, common - at)?);
        if strict && shape(&first) != shape(&second) {
            return Ok(Some(format!("Strict mode: Offset {at} block status mismatch!")));
        }
        let mut len = first.len.min(second.len);
        let mismatch = match (first.is_zero(), second.is_zero()) {
            (true, true) => None,
            (is_zero, other) => {
                len = len.min(STEP);
                if is_zero {
                    not_zero(b.read(at, len)?)
                } else if other {
                    not_zero(a.read(at, len)?)
                } else {
                    let theirs = b.read(at, len)?;
                    different(a.read(at, len)?, theirs)
                }
            }
        };
        if let Some(skip) = mismatch {
            return Ok(Some(format!("Content mismatch at offset {}!", at + skip)));
        }
        at += len;
    }
    if a.chain.size() == b.chain.size() {
        return Ok(None);
    }
    writeln!(out, "Warning: Image size mismatch!")?;
    let longer = if a.chain.size() > b.chain.size() { a } else { b };
    let size = longer.chain.size();
    while at < size {
        let extent = longer.extent(at, size - at)?;
        let len = if extent.is_zero() { extent.len } else { extent.len.min(STEP) };
        if !extent.is_zero()
            && let Some(skip) = not_zero(longer.read(at, len)?)
        {
            return Ok(Some(format!("Content mismatch at offset {}!", at + skip)));
        }
        at += len;
    }
    Ok(None)
}

/// What has to be the same in strict mode.
fn shape(extent: &Extent) -> (bool, bool, bool) {
    (extent.is_present(), extent.is_zero(), extent.host().is_some())
}

/// Where the first sector is that is not all zeros.
fn not_zero(bytes: &[u8]) -> Option<u64> {
    let sector = bytes.chunks(SECTOR).position(|sector| sector.iter().any(|&byte| byte != 0))?;
    Some((sector * SECTOR) as u64)
}

fn different(a: &[u8], b: &[u8]) -> Option<u64> {
    let sector = a.chunks(SECTOR).zip(b.chunks(SECTOR)).position(|(a, b)| a != b)?;
    Some((sector * SECTOR) as u64)
}
