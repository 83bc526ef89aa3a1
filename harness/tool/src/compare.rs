//! `compare`: do two images hold the same disk?

use std::ffi::{OsStr, OsString};
use std::io::Write;

use cowbell_formats::map::{Extent, Known, read};
use cowbell_formats::{Chain, Error};

use crate::cache::check_source_cache;
use crate::disk::{AnyFile, Files};
use crate::fail::Fail;
use crate::naming::{Image, Naming};
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
    #[arg(short = 'T', long, value_name = "CACHE", hide = true)]
    cache: Option<String>,
    /// Say how far it is
    #[arg(short, long)]
    progress: bool,
    #[command(flatten)]
    naming: Naming,
    /// Two images
    #[arg(num_args = 2, required = true)]
    files: Vec<OsString>,
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

struct Side {
    image: Image,
    chain: Chain<AnyFile>,
    known: Known,
    buf: Vec<u8>,
}

impl Side {
    fn open(naming: &Naming, name: &OsStr, format: Option<&str>) -> Result<Side, Fail> {
        let image = naming.image(name, format)?;
        let chain = image.open(&Files::default(), false)?;
        Ok(Side { image, chain, known: Known::default(), buf: Vec::new() })
    }

    fn extent(&mut self, at: u64, len: u64) -> Result<Extent, Fail> {
        self.known.status(&self.chain, at, len).map_err(|why| {
            let what = format!("Sector allocation test failed: {why}");
            Fail::at(&self.image.given, what).with_code(NO_STATUS)
        })
    }

    fn read(&mut self, at: u64, len: u64) -> Result<&[u8], Fail> {
        self.buf.resize(len as usize, 0);
        let result = read(&self.chain, at, &mut self.buf);
        result.map_err(|why: Error| {
            let what = format!("Error while reading offset {at}: {why}");
            Fail::at(&self.image.given, what).with_code(NOT_READ)
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
    check_source_cache(args.cache.as_deref()).map_err(opened)?;
    let mut a = Side::open(&args.naming, a, args.first_format.as_deref()).map_err(opened)?;
    let mut b = Side::open(&args.naming, b, args.second_format.as_deref()).map_err(opened)?;
    let total = a.chain.size().max(b.chain.size());
    let mut progress = Progress { shows: args.progress && !args.quiet, total, shown: 0.0 };
    progress.begin(&mut out)?;
    let verdict = compare(&mut a, &mut b, args.strict, &mut out, &mut progress)?;
    writeln!(out, "{}", verdict.as_deref().unwrap_or("Images are identical."))?;
    if progress.shows {
        writeln!(out)?;
    }
    out.flush()?;
    Ok(if verdict.is_some() { DIFFERENT } else { 0 })
}

/// How far it is, as QEMU shows it: on standard output, over what was there.
struct Progress {
    shows: bool,
    /// Bytes of the larger disk.
    total: u64,
    /// The percentage that was shown last.
    shown: f64,
}

impl Progress {
    /// Less than this is not worth a new line.
    const STEP: f64 = 2.0;

    fn begin(&mut self, out: &mut Out) -> Result<(), Fail> {
        self.show(0.0, out)
    }

    fn reached(&mut self, at: u64, out: &mut Out) -> Result<(), Fail> {
        let percent = at as f64 * 100.0 / self.total.max(1) as f64;
        if percent - self.shown > Self::STEP || at == self.total {
            self.show(percent, out)?;
        }
        Ok(())
    }

    fn show(&mut self, percent: f64, out: &mut Out) -> Result<(), Fail> {
        self.shown = percent;
        if self.shows {
            write!(out, "    ({percent:.2}/100%)\r")?;
            out.flush()?;
        }
        Ok(())
    }
}

/// What is different; `None`: nothing.
fn compare(
    a: &mut Side,
    b: &mut Side,
    strict: bool,
    out: &mut Out,
    progress: &mut Progress,
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
        progress.reached(at, out)?;
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
        progress.reached(at, out)?;
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
