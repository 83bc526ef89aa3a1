//! `io`: reads, writes and looks at an image by commands, from `-c` or from standard input.
//!
//! The commands are those of `qemu-io`. The `aio_` ones are asynchronous for real: they are
//! submitted to the engine and reported when they have finished, while later commands run or
//! standard input is waited for.

mod command;
mod report;

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mio::Waker;

use crate::cache::{Cache, How};
use crate::fail::{Fail, Program};
use crate::io::command::Runner;
use crate::naming::Naming;
use crate::out::Out;
use crate::session::{Session, Setup};
use crate::stop::Stop;

/// The options of `io`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run this command; may be given again. Without any, commands come from standard input
    #[arg(short = 'c', long = "cmd", value_name = "COMMAND", action = clap::ArgAction::Append)]
    commands: Vec<String>,
    /// The image's format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Open the image for reading only
    #[arg(short, long)]
    read_only: bool,
    /// Write to a temporary image; this one stays as it is
    #[arg(short, long)]
    snapshot: bool,
    /// Past the page cache, as -t none
    #[arg(short = 'n', long)]
    nocache: bool,
    /// Native AIO, as -i native
    #[arg(short = 'k', long)]
    native_aio: bool,
    /// Who does the I/O: threads, native or io_uring
    #[arg(short = 'i', long, value_name = "AIO")]
    aio: Option<String>,
    /// Cache mode: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, default_value = "writethrough")]
    cache: String,
    /// What discarding does: unmap (on) or ignore (off)
    #[arg(short = 'd', long, value_name = "MODE", default_value = "unmap")]
    discard: String,
    /// Accepted for compatibility
    #[arg(short = 'm', long, hide = true)]
    misalign: bool,
    /// Record all that the engine is asked and sees into this file, without a byte of data: see `replay`
    #[arg(long, value_name = "FILE", help_heading = "Beyond QEMU")]
    record: Option<PathBuf>,
    #[command(flatten)]
    naming: Naming,
    /// The image; without one, a command has to open it
    file: Option<OsString>,
}

/// How images are opened: what the command line, or `open`, says.
#[derive(Clone, Debug)]
pub struct Opening {
    naming: Naming,
    format: Option<String>,
    read_only: bool,
    /// What is written goes to a temporary image.
    snapshot: bool,
    cache: Cache,
    how: Option<How>,
    discard: bool,
    /// Where what is done on it is recorded.
    record: Option<PathBuf>,
}

/// Requests at a time; one more waits for one of them.
const DEPTH: usize = 256;

impl Opening {
    /// Opens `file`.
    fn open(&self, file: &OsStr) -> Result<Session, Fail> {
        let mut image = self.naming.image(file, self.format.as_deref())?;
        let mut temporary = None;
        if self.snapshot && !self.read_only {
            let (overlay, file) = image.overlay()?;
            (image, temporary) = (overlay, Some(file));
        }
        let setup = Setup {
            write: !self.read_only,
            cache: self.cache,
            how: self.how,
            depth: DEPTH,
            record: self.record.clone(),
            ..Setup::default()
        };
        Ok(Session { temporary, ..Session::open(&image, &setup)? })
    }
}

/// A cache mode by name.
fn cache_named(name: &str) -> Result<Cache, Fail> {
    Cache::named(name).ok_or_else(|| Fail::other(format!("Invalid cache option: {name}")))
}

/// A discard mode by name: does it discard?
fn discard_named(name: &str) -> Result<bool, Fail> {
    match name {
        "unmap" | "on" => Ok(true),
        "ignore" | "off" => Ok(false),
        _ => Err(Fail::other(format!("Invalid discard option: {name}"))),
    }
}

/// Runs it.
pub fn run(args: &Args, program: Program) -> Result<u8, Fail> {
    let cache = if args.nocache { Cache::NONE } else { cache_named(&args.cache)? };
    let how = match args.aio.as_deref() {
        Some(name) => {
            let bad = || Fail::other(format!("Invalid aio option: {name}"));
            Some(How::named(name).ok_or_else(bad)?)
        }
        None => args.native_aio.then_some(How::Native),
    };
    let opening = Opening {
        naming: args.naming.clone(),
        format: args.format.clone(),
        read_only: args.read_only,
        snapshot: args.snapshot,
        cache,
        how,
        discard: discard_named(&args.discard)?,
        record: args.record.clone(),
    };
    let stop = Stop::on_signals()?;
    let mut runner = Runner::new(opening, program, stop.clone());
    if let Some(file) = &args.file {
        runner.open(file)?;
    }
    let ran = if args.commands.is_empty() {
        from_stdin(&mut runner, program, &stop)
    } else {
        from_list(&mut runner, &args.commands, &stop)
    };
    // What was acknowledged is on disk and the image is clean, whatever has happened.
    let closed = runner.close();
    ran?;
    closed?;
    if stop.is_asked() {
        return Ok(130);
    }
    Ok(u8::from(runner.has_failed()))
}

fn from_list(runner: &mut Runner, commands: &[String], stop: &Stop) -> Result<(), Fail> {
    for command in commands {
        if stop.is_asked() || runner.run(command)? {
            break;
        }
    }
    Ok(())
}

/// Lines from standard input, and what wakes whoever waits for them and for completions too.
struct Lines {
    lines: Receiver<String>,
    waker: Arc<Mutex<Option<Waker>>>,
}

impl Lines {
    /// Reads on a thread: standard input may be a file, which nothing can be told to watch.
    fn new() -> Lines {
        let (sender, lines) = mpsc::channel();
        let waker: Arc<Mutex<Option<Waker>>> = Arc::default();
        let theirs = Arc::clone(&waker);
        std::thread::spawn(move || {
            let wake = || {
                let waker = theirs.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(waker) = &*waker {
                    let _ = waker.wake();
                }
            };
            for line in std::io::stdin().lock().split(b'\n') {
                let Ok(line) = line else { break };
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
                wake();
            }
            drop(sender);
            wake();
        });
        Lines { lines, waker }
    }

    /// The session whose loop is waited in from now on.
    fn wake(&self, session: Option<&Session>) -> Result<(), Fail> {
        let waker = session.map(|session| session.events.waker()).transpose()?;
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = waker;
        Ok(())
    }

    /// The next line; `None` at the end. Meanwhile, requests go on and are reported.
    fn next(&self, runner: &mut Runner, stop: &Stop) -> Result<Option<String>, Fail> {
        loop {
            if stop.is_asked() {
                return Ok(None);
            }
            let Some(session) = &mut runner.session else {
                match self.lines.recv_timeout(Duration::from_millis(100)) {
                    Ok(line) => return Ok(Some(line)),
                    Err(RecvTimeoutError::Disconnected) => return Ok(None),
                    Err(RecvTimeoutError::Timeout) => continue,
                }
            };
            let progress = session.run();
            runner.report_finished()?;
            match self.lines.try_recv() {
                Ok(line) => return Ok(Some(line)),
                Err(TryRecvError::Disconnected) => return Ok(None),
                Err(TryRecvError::Empty) => {}
            }
            runner.out.flush()?;
            if let (false, Some(session)) = (progress.again, &mut runner.session) {
                session.wait(None)?;
            }
        }
    }
}

fn from_stdin(runner: &mut Runner, program: Program, stop: &Stop) -> Result<(), Fail> {
    // QEMU's program prompts whoever is there; ours, people.
    let prompt = match program {
        Program::QemuIo => "qemu-io> ",
        _ if std::io::stdin().is_terminal() => "cowbell io> ",
        _ => "",
    };
    let lines = Lines::new();
    lines.wake(runner.session.as_ref())?;
    loop {
        write!(runner.out, "{prompt}")?;
        runner.out.flush()?;
        let Some(line) = lines.next(runner, stop)? else { return Ok(()) };
        let opened = runner.opened;
        let quit = runner.run(&line)?;
        runner.out.flush()?;
        if quit {
            return Ok(());
        }
        if runner.opened != opened {
            lines.wake(runner.session.as_ref())?;
        }
    }
}

/// As [`Out::new`]: what commands print.
fn output() -> Out {
    Out::new(false)
}
