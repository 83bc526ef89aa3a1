//! `snapshot`: lists, makes, applies and deletes an image's internal snapshots.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cowbell_engine::store::Store;
use cowbell_formats::chain::{open_named_in_header, probe_file};
use cowbell_formats::error::Shown;
use cowbell_formats::locks::lock_image;
use cowbell_formats::qcow2::disk::snapshot_table::{self, Snapshot};
use cowbell_formats::qcow2::rest::open::{describe_header, read_header};
use cowbell_formats::qcow2::rest::snapshots::{self, Moment};
use cowbell_formats::{Error, Format, Host};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::disk::{Files, StoppableHost};
use crate::fail::{Fail, Program};
use crate::json::Json;
use crate::naming::Naming;
use crate::number::human;
use crate::out::Out;
use crate::stop::Stop;

/// The options of `snapshot`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// List the snapshots; so does no option at all
    #[arg(short, long)]
    list: bool,
    /// Make one of this name
    #[arg(short, long, value_name = "NAME")]
    create: Option<OsString>,
    /// Make the disk what it was when this one was made: its id or name
    #[arg(short, long, value_name = "NAME")]
    apply: Option<OsString>,
    /// Delete the one of this name
    #[arg(short, long, value_name = "NAME")]
    delete: Option<OsString>,
    /// The image's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    naming: Naming,
    /// The image
    file: OsString,
}

/// What is to be done.
enum Action<'a> {
    List,
    Create(&'a OsStr),
    Apply(&'a OsStr),
    Delete(&'a OsStr),
}

/// Runs it.
pub fn run(args: &Args, program: Program) -> Result<u8, Fail> {
    let actions = [
        args.list.then_some(Action::List),
        args.create.as_deref().map(Action::Create),
        args.apply.as_deref().map(Action::Apply),
        args.delete.as_deref().map(Action::Delete),
    ];
    let mut actions = actions.into_iter().flatten();
    let action = actions.next().unwrap_or(Action::List);
    if actions.next().is_some() {
        return Err(Fail::usage(
            "Cannot mix '-l', '-a', '-c', '-d'".into(),
            "Try 'qemu-img snapshot --help' for more info".into(),
        ));
    }
    let image = args.naming.image(&args.file, args.format.as_deref())?;
    let file = &image.given;
    let write = !matches!(action, Action::List);
    // Before its last write a change has changed nothing: a signal ends it there.
    let host = StoppableHost { disk: Files::default(), stop: Stop::on_signals()? };
    if write {
        image.check_writable()?;
    }
    let path = image.path();
    let mut store = host.open(path, write).map_err(|error| Fail::open_io(path, &error))?;
    let format = match image.format {
        Some(format) => format,
        None => probe_file(&store).map_err(|why| Fail::open(file, why))?,
    };
    let options = image.options(write);
    let locked = lock_image(&host, &mut store, path, format, &options);
    locked.map_err(|why| image.failed(why))?;
    if let (Format::Qcow2, Ok(header)) = (format, describe_header(&store)) {
        header.refuse_encryption().map_err(|why| image.failed(why))?;
    }
    let parts = open_named_in_header(&host, path, &store, format, &options);
    let _parts = parts.map_err(|why| image.failed(why))?;
    match action {
        Action::List if format == Format::Qcow2 => list(file, &store, args.quiet)?,
        Action::List => {}
        _ if format != Format::Qcow2 => {
            let why = Error::Unsupported(format!("{format} images have no snapshots"));
            return Err(failed(file, &action, why, program));
        }
        Action::Create(name) => {
            let now = Timestamp::now();
            let seconds = u32::try_from(now.as_second()).unwrap_or_default();
            let nanos = now.subsec_nanosecond().unsigned_abs();
            snapshots::create(&store, name.as_bytes(), Moment { seconds, nanos })
                .map_err(|why| failed(file, &action, why, program))?;
        }
        Action::Apply(name) => snapshots::apply(&store, name.as_bytes())
            .map_err(|why| failed(file, &action, why, program))?,
        Action::Delete(name) => snapshots::delete(&store, name.as_bytes())
            .map_err(|why| failed(file, &action, why, program))?,
    }
    Ok(0)
}

fn list<F: Store>(file: &Path, store: &F, quiet: bool) -> Result<(), Fail> {
    let list = read_header(store).and_then(|header| snapshot_table::read(store, &header));
    let list = list.map_err(|why| Fail::open(file, why))?;
    let mut out = Out::new(quiet);
    if !list.is_empty() {
        writeln!(out, "Snapshot list:")?;
        write_list(&mut out, &list)?;
    }
    Ok(out.flush()?)
}

/// Why it could not be done; as QEMU, in QEMU's words.
fn failed(file: &Path, action: &Action<'_>, why: Error, program: Program) -> Fail {
    let (verb, name) = match action {
        Action::Create(name) => ("create", name),
        Action::Apply(name) => ("apply", name),
        Action::Delete(name) => ("delete", name),
        Action::List => unreachable!("a list has reasons of its own"),
    };
    let is_missing = matches!(&why, Error::Invalid(what) if what.starts_with("there is no"));
    let reason = match (program, &why, action) {
        (Program::Cowbell, _, _) => why.to_string(),
        (_, Error::Unsupported(_), Action::Apply(_)) => {
            "Block driver does not support snapshots".into()
        }
        (_, Error::Unsupported(_), Action::Delete(_)) => "snapshot not found".into(),
        (_, Error::Unsupported(_), _) => why.errno().to_string(),
        (_, Error::Limit(_), _) => "Invalid argument".into(),
        (_, _, Action::Apply(_)) if is_missing => {
            "Failed to load snapshot: No such file or directory".into()
        }
        (_, _, Action::Delete(_)) if is_missing => "snapshot not found".into(),
        _ => why.to_string(),
    };
    let name = Shown(Path::new(name));
    Fail::at(file, format!("Could not {verb} snapshot '{name}': {reason}"))
}

/// A table of snapshots, as QEMU lays it out.
pub fn write_list(out: &mut Out, list: &[Snapshot]) -> Result<(), Fail> {
    let mut row = |cells: [&str; 6]| {
        let [id, tag, size, date, clock, icount] = cells;
        writeln!(out, "{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}")
    };
    row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"])?;
    for one in list {
        let icount = one.icount.map(|count| count.to_string()).unwrap_or_default();
        let size = human(one.vm_state_size);
        row([&text(&one.id), &text(&one.name), &size, &date(one), &clock(one), &icount])?;
    }
    Ok(())
}

/// With QEMU's members, in QEMU's order.
pub fn json(one: &Snapshot) -> Json {
    const NANOS: u64 = 1_000_000_000;
    let mut members = Vec::new();
    members.extend(one.icount.map(|count| ("icount", Json::Int(count))));
    members.push(("vm-clock-nsec", Json::Int(one.vm_clock_nsec % NANOS)));
    members.push(("name", Json::name(OsStr::from_bytes(&one.name))));
    members.push(("date-sec", Json::Int(one.date_sec.into())));
    members.push(("date-nsec", Json::Int(one.date_nsec.into())));
    members.push(("vm-clock-sec", Json::Int(one.vm_clock_nsec / NANOS)));
    members.push(("id", Json::name(OsStr::from_bytes(&one.id))));
    members.push(("vm-state-size", Json::Int(one.vm_state_size)));
    Json::Object(members)
}

/// Text from an image.
fn text(bytes: &[u8]) -> String {
    Shown(Path::new(OsStr::from_bytes(bytes))).to_string()
}

/// When it was made, where the user is.
fn date(one: &Snapshot) -> String {
    let when = Timestamp::from_second(one.date_sec.into()).unwrap_or(Timestamp::UNIX_EPOCH);
    when.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

fn clock(one: &Snapshot) -> String {
    let millis = one.vm_clock_nsec / 1_000_000;
    let (seconds, millis) = (millis / 1000, millis % 1000);
    let (minutes, seconds) = (seconds / 60, seconds % 60);
    format!("{:04}:{:02}:{seconds:02}.{millis:03}", minutes / 60, minutes % 60)
}
