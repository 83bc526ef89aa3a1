//! The command.
//!
//! One verb a file. Where QEMU has the verb, ours takes the same options, prints the same lines and
//! answers the same exit codes; called through a link named `qemu-img` or `qemu-io` it is that
//! program. This file finds out which program it is, which verb is meant, and says how it ended:
//! everything else returns a [`Fail`] and prints nothing but results.

mod at_snapshot;
mod backup;
mod bench;
mod beside;
mod bitmaps;
mod cache;
mod check;
mod checksum;
mod commit;
mod compare;
mod convert;
mod copying;
mod create;
mod dd;
mod demo;
mod device;
mod disk;
mod fail;
mod form;
mod import;
mod info;
mod io;
mod json;
mod locking;
mod map;
mod measure;
mod naming;
mod number;
mod out;
mod pipe;
mod progress;
mod rebase;
mod record;
mod resize;
mod resume;
mod scratch;
mod serve;
mod session;
mod sim;
mod slowest;
mod snapshot;
mod stop;

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::error::{ContextKind, ErrorKind};
use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};
use cowbell_engine::sys::lock::Locking;

use crate::fail::{Fail, Program};

/// Disk images: make, look at, check, read, write and measure them.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 100)]
struct Cli {
    /// Lock images against other programs: auto (where the file system can), on or off
    #[arg(long, global = true, value_name = "HOW", default_value = "auto",
          value_parser = locking::named)]
    locking: Locking,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make an image
    Create(create::Args),
    /// Say what an image is
    Info(info::Args),
    /// Find what is wrong with an image, and repair it
    Check(check::Args),
    /// Say what is where in an image
    Map(map::Args),
    /// Find out whether two images hold the same disk
    Compare(compare::Args),
    /// Copy one disk, or several, into a new image
    Convert(Box<convert::Args>),
    /// Copy a disk into a new image that is kept, or what has changed since the last time
    Backup(Box<backup::Args>),
    /// Move an overlay's contents into its backing file
    Commit(commit::Args),
    /// Give an image another backing file, or none
    Rebase(rebase::Args),
    /// Copy a part of a disk, given in blocks, into a new image
    Dd(dd::Args),
    /// Say how large a new image will be
    Measure(measure::Args),
    /// Give an image another size
    Resize(resize::Args),
    /// List, make, apply and delete snapshots inside an image
    Snapshot(snapshot::Args),
    /// Measure requests on an image
    Bench(Box<bench::Args>),
    /// Show everything at work on a temporary image
    Demo(demo::Args),
    /// Read, write and look at an image by commands
    Io(io::Args),
    /// Serve images over NBD, or to virtual machines, until told to stop
    Serve(Box<serve::Args>),
    /// Do again what was recorded with `--record`, step for step, without the images
    Replay(record::Args),
    /// Simulate: every order, every fault, every crash
    Sim(sim::Args),
}

impl Verb {
    fn name(&self) -> &'static str {
        match self {
            Verb::Create(_) => "create",
            Verb::Info(_) => "info",
            Verb::Check(_) => "check",
            Verb::Map(_) => "map",
            Verb::Compare(_) => "compare",
            Verb::Replay(_) => "replay",
            Verb::Convert(_) => "convert",
            Verb::Backup(_) => "backup",
            Verb::Commit(_) => "commit",
            Verb::Rebase(_) => "rebase",
            Verb::Dd(_) => "dd",
            Verb::Measure(_) => "measure",
            Verb::Resize(_) => "resize",
            Verb::Snapshot(_) => "snapshot",
            Verb::Bench(_) => "bench",
            Verb::Demo(_) => "demo",
            Verb::Io(_) => "io",
            Verb::Serve(_) => "serve",
            Verb::Sim(_) => "sim",
        }
    }

    fn run(self, program: Program) -> Result<u8, Fail> {
        match self {
            Verb::Create(args) => create::run(args),
            Verb::Info(args) => info::run(&args),
            Verb::Check(args) => check::run(&args),
            Verb::Map(args) => map::run(&args),
            Verb::Compare(args) => compare::run(&args),
            Verb::Convert(args) => convert::run(&args, program),
            Verb::Backup(args) => backup::run(*args, program),
            Verb::Commit(args) => commit::run(&args, program),
            Verb::Rebase(args) => rebase::run(&args, program),
            Verb::Dd(args) => dd::run(&args, program),
            Verb::Measure(args) => measure::run(&args, program),
            Verb::Resize(args) => resize::run(&args, program),
            Verb::Snapshot(args) => snapshot::run(&args, program),
            Verb::Bench(args) => bench::run(&args),
            Verb::Demo(args) => demo::run(&args),
            Verb::Io(args) => io::run(&args, program),
            Verb::Serve(args) => serve::run(&args),
            Verb::Replay(args) => record::run(&args),
            Verb::Sim(args) => sim::run(&args),
        }
    }
}

fn main() -> ExitCode {
    let mut args: Vec<OsString> = std::env::args_os().collect();
    let program = Program::called_as(args.first().map(Path::new));
    if args.is_empty() {
        args.push(program.name().into());
    }
    if program == Program::QemuIo {
        args.insert(1, "io".into());
    }
    let is_resize = args.get(1).is_some_and(|verb| verb == "resize");
    let shrinks = |arg: &OsString| matches!(arg.as_encoded_bytes(), [b'-', b'0'..=b'9', ..]);
    if is_resize && args.last().is_some_and(shrinks) && !args.iter().any(|arg| arg == "--") {
        // `-1G`, at the end of a resize, is how much to take off, and no option.
        args.insert(args.len() - 1, "--".into());
    }
    let verb = match parse(&args, program) {
        Ok(verb) => verb,
        Err(code) => return code,
    };
    let name = verb.name();
    match verb.run(program) {
        Ok(code) => ExitCode::from(code),
        Err(fail) => fail.report(program, name),
    }
}

/// The verb and its options; or, with help printed or a mistake reported, the exit code.
fn parse(args: &[OsString], program: Program) -> Result<Verb, ExitCode> {
    let command = Cli::command().name(program.name()).bin_name(program.name());
    // As C programs read options: what follows one that has a value is its value.
    let with_value = |arg: Arg| match arg.is_positional() || !arg.get_action().takes_values() {
        true => arg,
        false => arg.allow_hyphen_values(true),
    };
    let command = command.mut_subcommands(|verb| {
        verb.args_override_self(true).infer_long_args(true).mut_args(with_value)
    });
    let matches = command.try_get_matches_from(args);
    let error = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => {
            locking::choose(cli.locking);
            return Ok(cli.verb);
        }
        Err(error) => error,
    };
    let verb = args.get(1).map(|verb| verb.to_string_lossy()).unwrap_or_default();
    let last = args.last().map(|last| last.to_string_lossy()).unwrap_or_default();
    let is_verb = Cli::command().get_subcommands().any(|known| known.get_name() == verb);
    match error.kind() {
        ErrorKind::DisplayVersion => {
            let _ = writeln!(std::io::stdout(), "{}", program.version());
            return Err(ExitCode::SUCCESS);
        }
        ErrorKind::DisplayHelp => {
            // A reader who went away has seen enough.
            let _ = error.print();
            return Err(ExitCode::SUCCESS);
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand if program == Program::Cowbell => {
            let _ = error.print();
            return Err(ExitCode::FAILURE);
        }
        _ => {}
    }
    let fail = if is_verb {
        let help = format!("Try '{} {verb} --help' for more info", program.name());
        Fail::usage(complaint(&error, &verb, &last, program), help)
    } else if verb.is_empty() {
        let help = format!("Try '{} --help' for more info", program.name());
        Fail::usage("Not enough arguments".into(), help)
    } else {
        let help = format!("Try '{} --help' for more info", program.name());
        let what = match verb.starts_with('-') {
            true => format!("unrecognized option '{verb}'"),
            false => format!("Command not found: {verb}"),
        };
        Fail::usage(what, help)
    };
    Err(fail.report(program, if is_verb { &verb } else { "" }))
}

/// What is wrong with the arguments, in one line.
fn complaint(error: &clap::Error, verb: &str, last: &str, program: Program) -> String {
    let argument = error.get(ContextKind::InvalidArg).map(ToString::to_string).unwrap_or_default();
    let value = error.get(ContextKind::InvalidValue).map(ToString::to_string);
    match error.kind() {
        ErrorKind::MissingRequiredArgument | ErrorKind::WrongNumberOfValues => match verb {
            "compare" => "Expecting two image file names".into(),
            "resize" => "Expecting image file name and size".into(),
            "backup" => "Expecting the name of a disk and of the new image".into(),
            _ => "Expecting one image file name".into(),
        },
        ErrorKind::UnknownArgument if argument.starts_with("--") => {
            format!("unrecognized option '{argument}'")
        }
        ErrorKind::UnknownArgument if argument.starts_with('-') => {
            format!("invalid option -- '{}'", argument.trim_start_matches('-'))
        }
        ErrorKind::UnknownArgument => "Expecting one image file name".into(),
        ErrorKind::InvalidValue if value.as_deref().unwrap_or_default().is_empty() => {
            match last.strip_prefix('-').filter(|short| !short.starts_with('-')) {
                Some(short) => {
                    let letter = short.chars().last().unwrap_or_default();
                    format!("option requires an argument -- '{letter}'")
                }
                None => format!("option '{last}' requires an argument"),
            }
        }
        // Values are checked by the verbs, in QEMU's words; what is left is a choice of words.
        ErrorKind::InvalidValue => {
            let name = argument.split_whitespace().next().unwrap_or_default();
            format!("'{}' is no value for {name}", value.unwrap_or_default())
        }
        _ if program == Program::Cowbell => {
            let text = error.render().to_string();
            let line = text.lines().next().unwrap_or_default();
            line.trim_start_matches("error: ").to_string()
        }
        _ => "Invalid arguments".into(),
    }
}
