//! `check`: finds what is wrong with an image, and repairs what can be repaired.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};

use cowbell_engine::both::Either;
use cowbell_engine::sys::disk::DiskFile;
use cowbell_engine::sys::lock::LockState;
use cowbell_formats::chain::{open_named_in_header, open_whole_layer, probe_file};
use cowbell_formats::check::{self, Event, Repair, Report, Watch};
use cowbell_formats::locks::{MaybeLocal, lock_image};
use cowbell_formats::{Format, Host, OpenOptions};

use crate::cache::check_source_cache;
use crate::disk::{AnyFile, Files};
use crate::fail::Fail;
use crate::info::Form;
use crate::json::Json;
use crate::locking;
use crate::naming::{Image, Naming};
use crate::out::Out;
use crate::session::eprint_quietly;

/// The options of `check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Repair: leaks, or all
    #[arg(short, long, value_name = "WHAT")]
    repair: Option<String>,
    /// human or json
    #[arg(long, value_name = "FORM", default_value = "human")]
    output: String,
    /// Say how far it is, also where nobody seems to look
    #[arg(short, long)]
    progress: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Accepted for compatibility
    #[arg(short = 'T', long, value_name = "CACHE", hide = true)]
    cache: Option<String>,
    #[command(flatten)]
    naming: Naming,
    /// The image
    file: OsString,
}

/// The check could not be made.
const FAILED: u8 = 1;
/// There are errors.
const CORRUPT: u8 = 2;
/// There are leaks and nothing worse.
const LEAKS: u8 = 3;
/// The format has nothing to check.
const UNSUPPORTED: u8 = 63;

/// Runs it.
pub fn run(args: &Args) -> Result<u8, Fail> {
    let form = Form::named(&args.output, "check")?;
    let repair = match args.repair.as_deref() {
        None => Repair::None,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            return Err(Fail::usage(
                format!("--repair (-r) expects 'leaks' or 'all' not '{other}'"),
                "Try 'qemu-img check --help' for more info".into(),
            ));
        }
    };
    check_source_cache(args.cache.as_deref())?;
    let image = &args.naming.image(&args.file, args.format.as_deref())?;
    let write = repair != Repair::None;
    if write {
        image.check_writable()?;
    }
    let host = Files::default();
    let mut store =
        host.open(image.path(), write).map_err(|error| Fail::open_io(image.path(), &error))?;
    let format = match image.format {
        Some(format) => format,
        None => probe_file(&store).map_err(|why| image.failed(why))?,
    };
    let options = OpenOptions { format: Some(format), ..image.options(write) };
    let locked = lock_image(&host, &mut store, image.path(), format, &options);
    locked.map_err(|why| image.failed(why))?;
    let state = store.local().map(DiskFile::lock_state);
    if write && matches!(state, Some(LockState::Unsupported(_))) {
        locking::warn_of(image.path());
    }
    // A VMDK image is locked whole, until all is done.
    let mut held = None;
    if format == Format::Vmdk {
        if let Either::First(file) = &mut store {
            file.unlock();
        }
        let layer = open_whole_layer(&host, image.path(), &options);
        held = Some(layer.map_err(|why| image.failed(why))?);
    }
    let parts = open_named_in_header(&host, image.path(), &store, format, &options);
    let _parts = parts.map_err(|why| image.failed(why))?;
    let image = &if held.is_some() { image.clone().locked() } else { image.clone() };
    let mut report = check(args, image, &store, format, repair)?;
    let mut out = Out::new(args.quiet);
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        if form == Form::Human {
            writeln!(out, "The following inconsistencies were found and repaired:\n")?;
            writeln!(out, "    {} leaked clusters", report.leaks_fixed)?;
            writeln!(out, "    {} corruptions\n", report.corruptions_fixed)?;
            writeln!(out, "Double checking the fixed image now...")?;
        }
        let fixed = report;
        report = check(args, image, &store, format, Repair::None)?;
        report.leaks_fixed = fixed.leaks_fixed;
        report.corruptions_fixed = fixed.corruptions_fixed;
    }
    match form {
        Form::Human => write_report(&mut out, &report)?,
        Form::Json => writeln!(out, "{}", json(&report, image, format).pretty())?,
    }
    out.flush()?;
    if report.check_errors > 0 {
        return Err(Fail::at(&image.given, "Check failed").with_code(FAILED));
    }
    Ok(match (report.corruptions, report.leaks) {
        (1.., _) => CORRUPT,
        (0, 1..) => LEAKS,
        (0, 0) => 0,
    })
}

fn write_report(out: &mut Out, report: &Report) -> Result<(), Fail> {
    if report.is_clean() {
        writeln!(out, "No errors were found on the image.")?;
    }
    if report.corruptions > 0 {
        writeln!(out, "\n{} errors were found on the image.", report.corruptions)?;
        writeln!(out, "Data may be corrupted, or further writes to the image may corrupt it.")?;
    }
    if report.leaks > 0 {
        writeln!(out, "\n{} leaked clusters were found on the image.", report.leaks)?;
        writeln!(out, "This means waste of disk space, but no harm to data.")?;
    }
    if report.check_errors > 0 {
        let n = report.check_errors;
        writeln!(out, "\n{n} internal errors have occurred during the check.")?;
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let (total, allocated) = (report.total_clusters, report.allocated_clusters);
        let share = allocated as f64 * 100.0 / total as f64;
        let compressed = report.compressed_clusters as f64 * 100.0 / allocated as f64;
        let fragmented = report.fragmented_clusters as f64 * 100.0 / allocated as f64;
        writeln!(
            out,
            "{allocated}/{total} = {share:.2}% allocated, {fragmented:.2}% fragmented, \
             {compressed:.2}% compressed clusters"
        )?;
    }
    if report.image_end > 0 {
        writeln!(out, "Image end offset: {}", report.image_end)?;
    }
    Ok(())
}

/// Checks an image of any format that has something to check.
fn check(
    args: &Args,
    image: &Image,
    store: &AnyFile,
    format: Format,
    repair: Repair,
) -> Result<Report, Fail> {
    let shows = !args.quiet && (args.progress || io::stderr().is_terminal());
    let mut teller = Teller { shows, shown: 0 };
    let options = OpenOptions { format: Some(format), ..image.options(repair != Repair::None) };
    let host = Files::default();
    let found = check::check(&host, image.path(), store, &options, repair, &mut teller);
    teller.clear();
    let Some(found) = found.map_err(|why| image.failed(why))? else {
        let what = "This image format does not support checks";
        return Err(Fail::at(&image.given, what).with_code(UNSUPPORTED));
    };
    // Copies that lag behind do no more harm than leaks do.
    let leaks = found.leaks + found.stale;
    let leaks_fixed = found.leaks_fixed + found.stale_fixed;
    let report = Report { leaks, leaks_fixed, ..found };
    // As QEMU tells it: of QED not where the image ends, of VMDK and VDI not how much is allocated.
    Ok(match format {
        Format::Qcow2 | Format::Raw => report,
        Format::Qed => Report { image_end: 0, ..report },
        Format::Vmdk | Format::Vdi => Report { total_clusters: 0, allocated_clusters: 0, ..report },
    })
}

/// Says on standard error what is found, and how far the check is.
struct Teller {
    /// Somebody looks at it.
    shows: bool,
    /// The percentage that was shown last.
    shown: u64,
}

impl Teller {
    fn clear(&mut self) {
        if self.shown > 0 {
            self.shown = 0;
            eprint_quietly("\r\x1b[K");
        }
    }
}

impl Watch for Teller {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Found(what) => {
                self.clear();
                eprint_quietly(&format!("{what}\n"));
            }
            Event::Progress { done, total } => {
                let percent = u128::from(done) * 100 / u128::from(total.max(1));
                if self.shows && percent as u64 != self.shown {
                    self.shown = percent as u64;
                    eprint_quietly(&format!("\r{percent}% of the tables"));
                }
            }
        }
    }
}

/// With QEMU's members, in QEMU's order; those that are 0 are left out where QEMU does.
fn json(report: &Report, image: &Image, format: Format) -> Json {
    let some = |key, value: u64| (value > 0).then_some((key, Json::Int(value)));
    let mut members = Vec::new();
    members.extend(some("image-end-offset", report.image_end));
    members.extend(some("compressed-clusters", report.compressed_clusters));
    members.extend(some("total-clusters", report.total_clusters));
    members.extend(some("corruptions-fixed", report.corruptions_fixed));
    members.extend(some("corruptions", report.corruptions));
    members.push(("check-errors", Json::Int(report.check_errors)));
    members.extend(some("leaks", report.leaks));
    members.extend(some("leaks-fixed", report.leaks_fixed));
    members.extend(some("allocated-clusters", report.allocated_clusters));
    members.push(("filename", Json::name(&image.given)));
    members.push(("format", Json::text(format)));
    members.extend(some("fragmented-clusters", report.fragmented_clusters));
    Json::Object(members)
}
