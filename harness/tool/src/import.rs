//! `sim import`: what a crash may leave of another program's writes, each looked at by a command.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cowbell_sim::foreign::{CrashImage, Device, Every, Failure, Limits, Log, Report, crash};

use crate::fail::Fail;
use crate::json::Json;
use crate::number::size;
use crate::out::Out;
use crate::scratch::Folder;

/// The options of `sim import`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What was written: a log of dm-log-writes, or of QEMU's blklogwrites
    log: PathBuf,
    /// What the device held before; zeros if not said
    #[arg(long, value_name = "IMAGE")]
    base: Option<PathBuf>,
    /// Bytes of the device, with k, M, G, T: as many as it held before, or up to the last written, if not said
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// The name of the file that each image is written into, in a folder of its own
    #[arg(long, value_name = "NAME", default_value = "image")]
    file: String,
    /// The command that looks at an image, for `sh`: its exit code tells. `%` stands for the file's path,
    /// quoted (leave it outside of quotes); `%%` is a percent sign
    #[arg(long, value_name = "COMMAND")]
    check: String,
    /// Exit codes that mean it is fine. Others mean that it is not, but for 126, 127 and those of a command
    /// that was killed (129 to 192): these end it, as an error
    #[arg(long, value_name = "CODES", value_delimiter = ',', default_value = "0")]
    ok: Vec<u8>,
    /// Crash while each write is in flight, or only where something is about to become stable
    #[arg(long, value_name = "WHEN", value_parser = ["flush", "write"], default_value = "write")]
    every: String,
    /// Look at so many distinct images at most
    #[arg(long, value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u64).range(1..))]
    images: u64,
    /// Keep the first image that is wrong
    #[arg(long, value_name = "FILE")]
    keep: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a command said of an image that is wrong.
#[derive(Debug)]
struct Wrong {
    code: u8,
    /// The first lines.
    said: Vec<String>,
}

/// Of what a command says, so many bytes are kept, and so many lines.
const SAID_BYTES: u64 = 4096;
const SAID_LINES: usize = 5;
/// So many failures are printed for people.
const PRINTED: usize = 10;

/// Runs it: 0 if all is fine, 1 if an image is not; an error's exit code is 2.
pub fn run(args: &Args) -> Result<u8, Fail> {
    import(args).map_err(|fail| fail.with_code(2))
}

fn import(args: &Args) -> Result<u8, Fail> {
    if Path::new(&args.file).file_name() != Some(OsStr::new(&args.file)) {
        return Err(Fail::other(format!("'{}' is not the name of a file", args.file)));
    }
    if let Some(keep) = &args.keep {
        let same = |other: &Path| match (keep.canonicalize(), other.canonicalize()) {
            (Ok(one), Ok(other)) => one == other,
            _ => false,
        };
        if same(&args.log) || args.base.as_deref().is_some_and(same) {
            return Err(Fail::at(keep, "it would be overwritten, and is read"));
        }
    }
    let length = args.size.as_deref().map(|text| size("size", text, 1, i64::MAX as u64));
    let open = |path: &Path| File::open(path).map_err(|error| Fail::open_io(path, &error));
    let mut log = Log::new(open(&args.log)?).map_err(|what| Fail::at(&args.log, what))?;
    let mut device = match &args.base {
        Some(path) => Device::of(open(path)?).map_err(|error| Fail::at(path, error))?,
        None => Device::zeros(),
    };
    let folder = Folder::new_in(&std::env::temp_dir(), "sim-import")?;
    let path = folder.path().join(&args.file);
    let command = with_path(&args.check, &path)
        .ok_or_else(|| Fail::other("the command of --check has no % for the image's path"))?;
    let limits = Limits {
        every: if args.every == "flush" { Every::Flush } else { Every::Write },
        images: args.images,
        size: length.transpose()?,
    };
    let mut keep = args.keep.as_deref();
    let report = crash(&mut log, &mut device, &limits, |image| {
        renew(&path)
            .and_then(|file| write(image, file))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let (code, said) = shell(&command)?;
        if args.ok.contains(&code) {
            return Ok(None);
        }
        match code {
            126 | 127 => return Err(format!("the command cannot be run: {}", said.join(" "))),
            129..=192 => return Err(format!("the command was killed by signal {}", code - 128)),
            _ => {}
        }
        if let Some(kept) = keep.take() {
            File::create(kept)
                .and_then(|file| write(image, file))
                .map_err(|error| format!("{}: {error}", kept.display()))?;
        }
        Ok(Some(Wrong { code, said }))
    });
    let report = report.map_err(|what| Fail::at(&args.log, what))?;
    let mut out = Out::new(false);
    match args.json {
        true => writeln!(out, "{}", to_json(&report).pretty())?,
        false => write!(out, "{}", to_text(&report))?,
    }
    out.flush()?;
    Ok(u8::from(report.wrong > 0))
}

/// A new file: whoever looked at the last one may have changed it, or still have it open.
fn renew(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => File::create_new(path),
    }
}

fn write(image: &mut CrashImage<'_, File>, mut file: File) -> io::Result<()> {
    file.set_len(image.len())?;
    image.write_to(&mut file)
}

/// A command with a path put in, quoted for the shell. `None`: there is no place for it.
fn with_path(command: &str, path: &Path) -> Option<OsString> {
    let mut quoted = vec![b'\''];
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'\'' => quoted.extend(br"'\''"),
            byte => quoted.push(byte),
        }
    }
    quoted.push(b'\'');
    let (mut whole, mut found) = (Vec::new(), false);
    let mut bytes = command.bytes().peekable();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            whole.push(byte);
        } else if bytes.next_if_eq(&b'%').is_some() {
            whole.push(b'%');
        } else {
            whole.extend(&quoted);
            found = true;
        }
    }
    found.then(|| OsString::from_vec(whole))
}

/// Runs a command: its exit code, and the first lines of what it said.
fn shell(command: &OsStr) -> Result<(u8, Vec<String>), String> {
    let failed = |error: io::Error| format!("the command cannot be run: {error}");
    let (mut reader, writer) = io::pipe().map_err(failed)?;
    let both = writer.try_clone().map_err(failed)?;
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(command).stdin(Stdio::null()).stdout(writer).stderr(both);
    let child = shell.spawn();
    // Our ends of the pipe.
    drop(shell);
    let mut child = child.map_err(failed)?;
    let mut said = Vec::new();
    let read = reader.by_ref().take(SAID_BYTES).read_to_end(&mut said);
    let read = read.and_then(|_| io::copy(&mut reader, &mut io::sink()));
    let status = child.wait().map_err(failed)?;
    read.map_err(failed)?;
    if let Some(signal) = status.signal() {
        return Err(format!("the command was killed by signal {signal}"));
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    let code = code.ok_or("the command has no exit code")?;
    let said = String::from_utf8_lossy(&said);
    Ok((code, said.lines().take(SAID_LINES).map(str::to_owned).collect()))
}

/// Text of others, without what a terminal would obey.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn to_text(report: &Report<Wrong>) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = print(report, &mut text);
    text
}

fn print(report: &Report<Wrong>, to: &mut String) -> std::fmt::Result {
    writeln!(
        to,
        "{} entries, {} of them writes: {} states, {} crash images, {} wrong",
        report.entries, report.writes, report.states, report.images, report.wrong
    )?;
    if report.selected > 0 {
        writeln!(to, "of {} states a selection of their images", report.selected)?;
    }
    if report.cut_off > 0 {
        writeln!(
            to,
            "cut off: of {} states some images were not looked at (--images)",
            report.cut_off
        )?;
    }
    for failure in report.failures.iter().take(PRINTED) {
        write!(to, "\nwrong: a crash at entry {}", failure.entry)?;
        match &failure.mark {
            Some(mark) => writeln!(to, ", after the mark '{}'", plain(mark))?,
            None => writeln!(to)?,
        }
        if failure.writes.is_empty() {
            writeln!(to, "  everything was flushed")?;
        }
        for write in &failure.writes {
            let kind = if write.discard { "discard" } else { "write" };
            let share = match (write.there, write.counted) {
                (_, 0) => "makes no difference".to_owned(),
                (0, _) => "lost".to_owned(),
                (there, counted) if there == counted => "there".to_owned(),
                (there, counted) => format!("{there} of {counted} sectors there"),
            };
            writeln!(
                to,
                "  entry {}: {kind} of sectors {}+{}: {share}",
                write.entry, write.sector, write.sectors
            )?;
        }
        if failure.more > 0 {
            writeln!(to, "  and {} more writes", failure.more)?;
        }
        writeln!(to, "  the command's exit code: {}", failure.what.code)?;
        for line in &failure.what.said {
            writeln!(to, "  | {}", plain(line))?;
        }
    }
    let more = report.wrong - report.failures.len().min(PRINTED) as u64;
    if more > 0 {
        writeln!(to, "\nand {more} more that are wrong")?;
    }
    Ok(())
}

fn to_json(report: &Report<Wrong>) -> Json {
    let failure = |failure: &Failure<Wrong>| {
        let writes = failure.writes.iter().map(|write| {
            Json::Object(vec![
                ("entry", Json::Int(write.entry)),
                ("sector", Json::Int(write.sector)),
                ("sectors", Json::Int(write.sectors)),
                ("discard", Json::Bool(write.discard)),
                ("counted", Json::Int(write.counted)),
                ("there", Json::Int(write.there)),
            ])
        });
        let mut members = vec![("entry", Json::Int(failure.entry))];
        members.extend(failure.mark.as_ref().map(|mark| ("mark", Json::text(mark))));
        members.extend([
            ("unflushed", Json::List(writes.collect())),
            ("unflushed-more", Json::Int(failure.more)),
            ("code", Json::Int(failure.what.code.into())),
            ("said", Json::List(failure.what.said.iter().map(Json::text).collect())),
        ]);
        Json::Object(members)
    };
    Json::Object(vec![
        ("good", Json::Bool(report.wrong == 0)),
        ("entries", Json::Int(report.entries)),
        ("writes", Json::Int(report.writes)),
        ("states", Json::Int(report.states)),
        ("states-selected", Json::Int(report.selected)),
        ("states-cut-off", Json::Int(report.cut_off)),
        ("images", Json::Int(report.images)),
        ("wrong", Json::Int(report.wrong)),
        ("failures", Json::List(report.failures.iter().map(failure).collect())),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_quoted_for_the_shell() {
        let path = Path::new("/a b/it's $HOME");
        let command = with_path("printf 100%%; printf %s %", path);
        assert_eq!(
            command,
            Some(
                OsString::from(r"printf 100%; printf '/a b/it'\''s $HOME's '/a b/it'\''s $HOME'",)
            )
        );
        let (code, said) = shell(&with_path("printf '%%s' %; exit 3", path).expect("it has one"))
            .expect("it runs");
        assert_eq!((code, said), (3, vec!["/a b/it's $HOME".to_owned()]));
        assert_eq!(with_path("true %%", path), None);
    }
}
