//! The commands: their arguments, and what they do.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;

use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::{Io, IoKind};
use cowbell_engine::units::{Errno, Time};
use cowbell_engine::{Finished, Refused};
use cowbell_formats::create::{BadSize, parse_size};
use cowbell_formats::{Chain, Format, map};

use crate::cache::{Cache, How};
use crate::disk::{AnyFile, Files};
use crate::fail::{Fail, Program};
use crate::io::report::{self, Style, dump, size};
use crate::io::{Opening, cache_named, discard_named, output};
use crate::number::integer;
use crate::out::Out;
use crate::session::{Session, eprint_quietly};
use crate::stop::Stop;

/// A command, for `help` and for counting its arguments.
struct Command {
    name: &'static str,
    short: &'static str,
    usage: &'static str,
    about: &'static str,
    min: usize,
    max: usize,
    /// Does it need an open image, and does it write to it?
    needs: Needs,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    Nothing,
    Image,
    Writing,
}

const MANY: usize = usize::MAX;

const fn command(
    name: &'static str,
    short: &'static str,
    usage: &'static str,
    about: &'static str,
    (min, max): (usize, usize),
    needs: Needs,
) -> Command {
    Command { name, short, usage, about, min, max, needs }
}

const COMMANDS: [Command; 22] = [
    command("abort", "", "", "simulate a program crash using abort(3)", (0, 0), Needs::Nothing),
    command("aio_flush", "", "", "completes all outstanding aio requests", (0, 0), Needs::Image),
    command(
        "aio_read",
        "",
        "[-Ciqrv] [-P pattern] off len [len..]",
        "asynchronously reads a number of bytes",
        (2, MANY),
        Needs::Image,
    ),
    command(
        "aio_write",
        "",
        "[-Cfiqruz] [-P pattern] off len [len..]",
        "asynchronously writes a number of bytes",
        (2, MANY),
        Needs::Writing,
    ),
    command(
        "alloc",
        "a",
        "offset [count]",
        "checks if offset is allocated in the file",
        (1, 2),
        Needs::Image,
    ),
    command("close", "c", "", "close the current open file", (0, 0), Needs::Image),
    command(
        "discard",
        "d",
        "[-Cq] off len",
        "discards a number of bytes at a specified offset",
        (2, MANY),
        Needs::Writing,
    ),
    command("flush", "f", "", "flush all in-core file state to disk", (0, 0), Needs::Image),
    command("help", "?", "[command]", "help for one or all commands", (0, 1), Needs::Nothing),
    command("info", "i", "", "prints information about the current file", (0, 0), Needs::Image),
    command("length", "l", "", "gets the length of the current file", (0, 0), Needs::Image),
    command("map", "", "", "prints the allocated areas of a file", (0, 0), Needs::Image),
    command(
        "open",
        "o",
        "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
        "open the file specified by path",
        (1, MANY),
        Needs::Nothing,
    ),
    command("quit", "q", "", "exit the program", (0, MANY), Needs::Nothing),
    command(
        "read",
        "r",
        "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
        "reads a number of bytes at a specified offset",
        (2, MANY),
        Needs::Image,
    ),
    command(
        "readv",
        "",
        "[-Cqrv] [-P pattern] off len [len..]",
        "reads a number of bytes at a specified offset",
        (2, MANY),
        Needs::Image,
    ),
    command("sigraise", "", "signal", "raises a signal", (1, 1), Needs::Nothing),
    command("sleep", "", "", "waits for the given value in milliseconds", (1, 1), Needs::Nothing),
    command(
        "truncate",
        "t",
        "[-m prealloc_mode] off",
        "truncates the current file at the given offset",
        (1, 3),
        Needs::Writing,
    ),
    command(
        "write",
        "w",
        "[-bcCfnqruz] [-P pattern | -s source_file] off len",
        "writes a number of bytes at a specified offset",
        (2, MANY),
        Needs::Writing,
    ),
    command(
        "writev",
        "",
        "[-Cfqr] [-P pattern] off len [len..]",
        "writes a number of bytes at a specified offset",
        (2, MANY),
        Needs::Writing,
    ),
    // The last one; a name that nobody types.
    command("", "", "", "", (0, 0), Needs::Nothing),
];

impl Command {
    fn named(name: &str) -> Option<&'static Command> {
        COMMANDS.iter().find(|c| !name.is_empty() && (c.name == name || c.short == name))
    }

    fn help(&self) -> String {
        let usage = if self.usage.is_empty() { "" } else { " " };
        format!("{}{usage}{} -- {}\n", self.name, self.usage, self.about)
    }
}

/// Why a command ended early.
enum Bad {
    /// Its arguments are none it knows: show how it is used.
    Usage,
    /// To standard output, with a line end.
    Out(String),
    /// To standard error, with a line end.
    Err(String),
    /// The whole program fails.
    Fatal(Fail),
}

impl From<Fail> for Bad {
    fn from(fail: Fail) -> Bad {
        Bad::Fatal(fail)
    }
}

impl From<std::io::Error> for Bad {
    fn from(error: std::io::Error) -> Bad {
        Bad::Fatal(error.into())
    }
}

/// A request that was submitted.
struct Pending {
    /// For the report: "read", "wrote", "discard".
    verb: &'static str,
    /// For an error: "readv failed".
    failing: &'static str,
    offset: u64,
    len: u64,
    began: Time,
    style: Style,
    verify: Option<Verify>,
    /// A command waits for it.
    awaited: bool,
}

/// What a read must have brought: `pattern`, `len` times from byte `skip` on.
#[derive(Clone, Copy)]
struct Verify {
    pattern: u8,
    skip: u64,
    len: u64,
}

/// Runs commands.
pub struct Runner {
    /// The open image.
    pub session: Option<Session>,
    /// Where commands print.
    pub out: Out,
    /// Counts images opened and closed.
    pub opened: u64,
    opening: Opening,
    /// How the open image was opened.
    current: Opening,
    program: Program,
    stop: Stop,
    pending: BTreeMap<u64, Pending>,
    next_tag: u64,
    failed: bool,
}

/// The largest read or write, as in QEMU.
const LEN_MAX: u64 = i32::MAX as u64 & !511;

impl Runner {
    /// Without an image.
    pub fn new(opening: Opening, program: Program, stop: Stop) -> Runner {
        Runner {
            session: None,
            out: output(),
            opened: 0,
            current: opening.clone(),
            opening,
            program,
            stop,
            pending: BTreeMap::new(),
            next_tag: 0,
            failed: false,
        }
    }

    /// Has a command failed?
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Opens an image as the command line says.
    pub fn open(&mut self, file: &OsStr) -> Result<(), Fail> {
        self.open_as(file, self.opening.clone())
    }

    fn open_as(&mut self, file: &OsStr, opening: Opening) -> Result<(), Fail> {
        self.session = Some(opening.open(file)?);
        self.current = opening;
        self.opened += 1;
        Ok(())
    }

    /// Ends what is in flight, and closes the image.
    pub fn close(&mut self) -> Result<(), Fail> {
        self.finish_all()?;
        self.opened += 1;
        let closed = match self.session.take() {
            Some(mut session) => session.drain(),
            None => Ok(()),
        };
        self.out.flush()?;
        closed
    }

    /// Runs one command; true: it was the last.
    pub fn run(&mut self, line: &str) -> Result<bool, Fail> {
        let words: Vec<&str> = line.split(' ').filter(|word| !word.is_empty()).collect();
        let Some((&name, args)) = words.split_first() else { return Ok(false) };
        let Some(command) = Command::named(name) else {
            return self.complain(format!("command \"{name}\" not found\n"));
        };
        if command.needs != Needs::Nothing && self.session.is_none() {
            return self.complain("no file open, try 'help open'\n".into());
        }
        let count = args.len();
        if count < command.min || count > command.max {
            let expected = match (command.min, command.max) {
                (min, MANY) => format!("at least {min}"),
                (min, max) if min == max => min.to_string(),
                (min, max) => format!("between {min} and {max}"),
            };
            return self.complain(format!(
                "bad argument count {count} to {name}, expected {expected} arguments\n"
            ));
        }
        if command.needs == Needs::Writing && self.current.read_only {
            let text = format!("{}Block node is read-only\n", self.prefix());
            return self.complain(text);
        }
        match self.dispatch(command.name, args) {
            Ok(quit) => Ok(quit),
            Err(Bad::Usage) => {
                write!(self.out, "{}", command.help())?;
                self.failed = true;
                Ok(false)
            }
            Err(Bad::Out(text)) => {
                write!(self.out, "{text}")?;
                self.failed = true;
                Ok(false)
            }
            Err(Bad::Err(text)) => self.complain(text),
            Err(Bad::Fatal(fail)) => Err(fail),
        }
    }

    fn prefix(&self) -> String {
        match self.program {
            Program::Cowbell => "cowbell: io: ".into(),
            other => format!("{}: ", other.name()),
        }
    }

    fn complain(&mut self, text: String) -> Result<bool, Fail> {
        self.failed = true;
        self.out.flush()?;
        eprint_quietly(&text);
        Ok(false)
    }

    fn dispatch(&mut self, name: &str, args: &[&str]) -> Result<bool, Bad> {
        match name {
            "quit" => return Ok(true),
            "read" => self.read(args)?,
            "readv" => self.readv(args)?,
            "write" => self.write(args)?,
            "writev" => self.writev(args)?,
            "aio_read" => self.aio_read(args)?,
            "aio_write" => self.aio_write(args)?,
            "aio_flush" => self.finish_all()?,
            "flush" => self.flush()?,
            "discard" => self.discard(args)?,
            "truncate" => self.truncate(args)?,
            "length" => {
                let bytes = self.image().size();
                writeln!(self.out, "{}", size(bytes as f64))?;
            }
            "info" => self.info()?,
            "alloc" => self.alloc(args)?,
            "map" => self.map()?,
            "sleep" => self.sleep(args)?,
            "open" => self.open_command(args)?,
            "close" => self.close()?,
            "help" => self.help(args)?,
            "abort" => std::process::abort(),
            _ => self.sigraise(args)?,
        }
        Ok(false)
    }

    /// The open image. Commands that need one run only with one.
    fn image(&mut self) -> &mut Session {
        self.session.as_mut().expect("checked before the command was begun")
    }

    /// Submits a request, as soon as there is room for it.
    fn submit(&mut self, io: Io, mem: Mem, mut pending: Pending) -> Result<u64, Bad> {
        let tag = self.next_tag;
        self.next_tag += 1;
        let session = self.image();
        let node = session.node;
        pending.began = session.now();
        let mut mem = mem;
        loop {
            match self.image().engine.submit(node, io, mem, tag) {
                Ok(()) => break,
                Err(Refused { mem: back, .. }) => {
                    mem = back;
                    self.turn()?;
                }
            }
        }
        self.pending.insert(tag, pending);
        Ok(tag)
    }

    /// One turn of the loop, waiting if there is nothing to do.
    fn turn(&mut self) -> Result<(), Fail> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let again = session.run().again;
        if !self.report_finished()? && !again {
            self.out.flush()?;
            if let Some(session) = &mut self.session {
                session.wait(None)?;
            }
        }
        Ok(())
    }

    /// Reports what has finished that no command waits for; true if anything has.
    pub fn report_finished(&mut self) -> Result<bool, Fail> {
        let mut any = false;
        while let Some(finished) = self.session.as_mut().and_then(|s| s.engine.poll()) {
            any = true;
            let Some(pending) = self.pending.remove(&finished.tag) else { continue };
            // An asynchronous command succeeds when it is submitted, whatever comes of it.
            let _ = self.report(&pending, finished)?;
        }
        Ok(any)
    }

    /// Prints how a request ended; false if it failed.
    fn report(&mut self, pending: &Pending, finished: Finished) -> Result<bool, Fail> {
        let now = self.session.as_ref().map_or(pending.began, Session::now);
        if let Err(errno) = finished.result {
            writeln!(self.out, "{} failed: {errno}", pending.failing)?;
            return Ok(false);
        }
        let mut good = true;
        let (offset, len, style) = (pending.offset, pending.len, pending.style);
        let bytes = match &finished.mem {
            Mem::Owned(buf) => &buf[..],
            _ => &[],
        };
        if let Some(verify) = pending.verify {
            let range = verify.skip as usize..(verify.skip + verify.len) as usize;
            if bytes[range].iter().any(|&byte| byte != verify.pattern) {
                let (at, len) = (offset + verify.skip, verify.len);
                writeln!(self.out, "Pattern verification failed at offset {at}, {len} bytes")?;
                good = false;
            }
        }
        if !style.quiet {
            if style.dump {
                dump(&mut self.out, offset, bytes)?;
            }
            let nanos = now.since(pending.began);
            report::request(&mut self.out, pending.verb, offset, len, nanos, style)?;
        }
        Ok(good)
    }

    /// Submits a request and waits for it, reporting others meanwhile.
    fn perform(&mut self, io: Io, mem: Mem, pending: Pending) -> Result<(), Bad> {
        let mine = self.submit(io, mem, Pending { awaited: true, ..pending })?;
        loop {
            let Some(finished) = self.image().engine.poll() else {
                // Like `turn`, but what finishes is looked at here.
                let again = self.image().run().again;
                let Some(finished) = self.image().engine.poll() else {
                    if !again {
                        self.out.flush()?;
                        self.image().wait(None)?;
                    }
                    continue;
                };
                if self.settle(mine, finished)? {
                    return Ok(());
                }
                continue;
            };
            if self.settle(mine, finished)? {
                return Ok(());
            }
        }
    }

    /// Reports a finished request; true: it was `mine`.
    fn settle(&mut self, mine: u64, finished: Finished) -> Result<bool, Fail> {
        let tag = finished.tag;
        let Some(pending) = self.pending.remove(&tag) else { return Ok(false) };
        let good = self.report(&pending, finished)?;
        self.failed |= pending.awaited && !good;
        Ok(tag == mine)
    }

    /// Waits for everything that was submitted.
    fn finish_all(&mut self) -> Result<(), Fail> {
        while !self.pending.is_empty() && self.session.is_some() {
            self.report_finished()?;
            if !self.pending.is_empty() {
                self.turn()?;
            }
        }
        Ok(())
    }

    /// QEMU's answer to a range that is not on the disk.
    fn check_range(&mut self, offset: u64, len: u64, failing: &str) -> Result<(), Bad> {
        let size = self.image().size();
        if offset > size || len > size - offset {
            return Err(Bad::Out(format!("{failing} failed: {}\n", Errno::IO)));
        }
        Ok(())
    }

    fn read(&mut self, args: &[&str]) -> Result<(), Bad> {
        let options = Options::parse("read", args, "abCl:pP:qrs:v")?;
        let (offset, len) = options.range(LEN_MAX, "")?;
        let pattern = options.pattern()?;
        let skip = options.size('s')?;
        let verified = options.size('l')?;
        if pattern.is_none() && (skip.is_some() || verified.is_some()) {
            return Err(Bad::Usage);
        }
        let skip = skip.unwrap_or(0);
        let verified = verified.or(len.checked_sub(skip));
        let verified = verified.filter(|v| skip.checked_add(*v).is_some_and(|end| end <= len));
        let Some(verified) = verified else {
            return Err(Bad::Out("pattern verification range exceeds end of read data\n".into()));
        };
        if options.has('b') {
            return Err(Bad::Out(format!("read failed: {}\n", not_supported())));
        }
        self.check_range(offset, len, "read")?;
        let verify = pattern.map(|pattern| Verify { pattern, skip, len: verified });
        let pending = Pending::new("read", "read", offset, len, &options).verify(verify);
        self.perform(Io::read(offset, len), filled(len, 0xab), pending)
    }

    fn readv(&mut self, args: &[&str]) -> Result<(), Bad> {
        let options = Options::parse("readv", args, "CP:qrv")?;
        let (offset, len) = options.vector()?;
        let verify = options.pattern()?.map(|pattern| Verify { pattern, skip: 0, len });
        self.check_range(offset, len, "readv")?;
        let pending = Pending::new("read", "readv", offset, len, &options).verify(verify);
        self.perform(Io::read(offset, len), filled(len, 0xab), pending)
    }

    fn aio_read(&mut self, args: &[&str]) -> Result<(), Bad> {
        let options = Options::parse("aio_read", args, "CP:iqrv")?;
        let pattern = options.pattern()?;
        let (offset, len) = options.vector()?;
        let verify = pattern.map(|pattern| Verify { pattern, skip: 0, len });
        self.check_range(offset, len, "readv").or_else(|bad| self.only_say(bad))?;
        if !self.fits(offset, len) {
            return Ok(());
        }
        let pending = Pending::new("read", "readv", offset, len, &options).verify(verify);
        self.submit(Io::read(offset, len), filled(len, 0xab), pending)?;
        Ok(())
    }

    fn fits(&mut self, offset: u64, len: u64) -> bool {
        let size = self.image().size();
        offset <= size && len <= size - offset
    }

    /// An asynchronous request that fails at once: said, and no more.
    fn only_say(&mut self, bad: Bad) -> Result<(), Bad> {
        match bad {
            Bad::Out(text) => Ok(write!(self.out, "{text}")?),
            other => Err(other),
        }
    }

    fn write(&mut self, args: &[&str]) -> Result<(), Bad> {
        let options = Options::parse("write", args, "bcCfnpP:qrs:uz")?;
        let zero = options.has('z');
        let say = |text: &str| Err(Bad::Out(format!("{text}\n")));
        if options.has('b') && zero {
            return say("-b and -z cannot be specified at the same time");
        }
        if options.has('f') && (options.has('b') || options.has('c')) {
            return say("-f and -b or -c cannot be specified at the same time");
        }
        if options.has('n') && !zero {
            return say("-n requires -z to be specified");
        }
        if options.has('u') && !zero {
            return say("-u requires -z to be specified");
        }
        let sources = [zero, options.has('P'), options.has('s')];
        if sources.into_iter().filter(|&given| given).count() > 1 {
            return say("Only one of -z, -P, and -s can be specified at the same time");
        }
        let pattern = options.pattern()?.unwrap_or(0xcd);
        let unbounded = options.has('n');
        let (offset, len) =
            options.range(if unbounded { u64::MAX } else { LEN_MAX }, " without -n")?;
        let node = self.image_node();
        let compresses = matches!(self.image().engine.node(node), cowbell_formats::Node::Qcow2(_));
        if options.has('b') || options.has('c') && !compresses {
            return say(&format!("write failed: {}", not_supported()));
        }
        let mem = match options.get('s') {
            _ if zero => Mem::None,
            Some(file) => Mem::Owned(from_file(file, len)?),
            None => filled(len, pattern),
        };
        self.check_range(offset, len, "write")?;
        let io = self.write_io(&options, offset, len);
        self.perform(io, mem, Pending::new("wrote", "write", offset, len, &options))
    }

    fn write_io(&self, options: &Options<'_>, offset: u64, len: u64) -> Io {
        let fua = self.current.cache.fua || options.has('f');
        let compressed = options.has('c');
        let unmap = options.has('u') && self.current.discard;
        let zero = options.has('z');
        let kind =
            if zero { IoKind::Zero { unmap, fua } } else { IoKind::Write { fua, compressed } };
        Io { kind, offset, len }
    }

    fn writev(&mut self, args: &[&str]) -> Result<(), Bad> {
        let options = Options::parse("writev", args, "CfqrP:")?;
        let pattern = options.pattern()?.unwrap_or(0xcd);
        let (offset, len) = options.vector()?;
        self.check_range(offset, len, "writev")?;
        let io = self.write_io(&options, offset, len);
        let pending = Pending::new("wrote", "writev", offset, len, &options);
        self.perform(io, filled(len, pattern), pending)
    }

    fn aio_write(&mut self, args: &[&str]) -> Result<(), Bad> {
        let options = Options::parse("aio_write", args, "CfiP:qruz")?;
        let zero = options.has('z');
        if zero && options.lens().len() != 1 {
            return Err(Bad::Out("-z supports only a single length parameter\n".into()));
        }
        if options.has('u') && !zero {
            return Err(Bad::Out("-u requires -z to be specified\n".into()));
        }
        let pattern = options.pattern()?.unwrap_or(0xcd);
        let (offset, len) = if zero { options.range(u64::MAX, "")? } else { options.vector()? };
        self.check_range(offset, len, "aio_write").or_else(|bad| self.only_say(bad))?;
        if !self.fits(offset, len) {
            return Ok(());
        }
        let io = self.write_io(&options, offset, len);
        let mem = if zero { Mem::None } else { filled(len, pattern) };
        self.submit(io, mem, Pending::new("wrote", "aio_write", offset, len, &options))?;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Bad> {
        if self.current.cache.no_flush {
            return Ok(());
        }
        let style = Style { quiet: true, ..Style::default() };
        let pending = Pending { style, ..Pending::new("", "flush", 0, 0, &Options::none()) };
        self.perform(Io::flush(), Mem::None, pending)
    }

    fn discard(&mut self, args: &[&str]) -> Result<(), Bad> {
        let options = Options::parse("discard", args, "Cq")?;
        let (offset, len) = options.range(LEN_MAX, "")?;
        self.check_range(offset, len, "discard")?;
        let pending = Pending::new("discard", "discard", offset, len, &options);
        // Discarding nothing takes the same way: it succeeds without doing anything.
        let done = if self.current.discard { len } else { 0 };
        self.perform(Io::discard(offset, done), Mem::None, pending)
    }

    fn truncate(&mut self, args: &[&str]) -> Result<(), Bad> {
        let options = Options::parse("truncate", args, "m:")?;
        let &[text] = &options.rest[..] else { return Err(Bad::Usage) };
        if let Some(mode) = options.get('m').filter(|&mode| mode != "off") {
            let prefix = self.prefix();
            return Err(Bad::Err(format!("{prefix}Unsupported preallocation mode '{mode}'\n")));
        }
        let offset = number(text)?;
        self.finish_all()?;
        let node = self.image_node();
        let only_grows = matches!(self.image().engine.node(node), cowbell_formats::Node::Qed(_));
        let prefix = self.prefix();
        if matches!(self.image().engine.node(node), cowbell_formats::Node::Vdi(_)) {
            return Err(Bad::Err(format!("{prefix}Image format driver does not support resize\n")));
        }
        if only_grows && offset < self.image().size() {
            let text = format!("{prefix}Shrinking images is currently not supported\n");
            return Err(Bad::Err(text));
        }
        let io = Io::truncate(offset);
        let session = self.image();
        let node = session.node;
        let sent = session.engine.submit(node, io, Mem::None, u64::MAX);
        assert!(sent.is_ok(), "nothing else is in flight");
        let finished = session.next()?;
        match finished.map_or(Ok(()), |finished| finished.result) {
            Ok(()) => Ok(()),
            Err(errno) => Err(Bad::Err(format!("{prefix}Failed to resize the image: {errno}\n"))),
        }
    }

    fn image_node(&mut self) -> cowbell_engine::units::NodeId {
        self.image().node
    }

    fn info(&mut self) -> Result<(), Bad> {
        let node = self.image_node();
        let (name, cluster) = match self.image().engine.node(node) {
            cowbell_formats::Node::Raw(_) => (Format::Raw, None),
            cowbell_formats::Node::Qed(qed) => (Format::Qed, Some(qed.geometry().cluster_size())),
            cowbell_formats::Node::Qcow2(qcow2) => {
                (Format::Qcow2, Some(qcow2.geometry().cluster_size()))
            }
            cowbell_formats::Node::Vdi(vdi) => (Format::Vdi, Some(vdi.block_size())),
            cowbell_formats::Node::Vmdk(vmdk) => (Format::Vmdk, vmdk.grain_size()),
        };
        writeln!(self.out, "format name: {name}")?;
        let cluster = cluster.unwrap_or(0) as f64;
        writeln!(self.out, "cluster size: {}", size(cluster))?;
        writeln!(self.out, "vm state offset: {}", size(0.0))?;
        Ok(())
    }

    /// The image once more, for looking at. What has finished is in the files.
    fn look(&mut self) -> Result<Chain<AnyFile>, Bad> {
        // Its locks are the session's.
        Ok(self.image().image.open_unlocked(&Files::default())?)
    }

    /// Whether the image itself, not one behind it, has something at `offset`, and for how long.
    fn is_allocated(chain: &Chain<AnyFile>, offset: u64, len: u64) -> Result<(bool, u64), Bad> {
        let extent = map::status(chain, offset, len)
            .map_err(|why| Bad::Out(format!("is_allocated failed: {why}\n")))?;
        Ok((extent.is_present() && extent.depth == 0, extent.len))
    }

    fn alloc(&mut self, args: &[&str]) -> Result<(), Bad> {
        let offset = number(args[0])?;
        let count = args.get(1).map_or(Ok(512), |text| number(text))?;
        let size_total = self.image().size();
        let chain = self.look()?;
        let end = offset.saturating_add(count).min(size_total).max(offset);
        let (mut at, mut allocated) = (offset, 0);
        while at < end {
            let (is, len) = Runner::is_allocated(&chain, at, end - at)?;
            allocated += if is { len } else { 0 };
            at += len;
        }
        let shown = size(offset as f64);
        writeln!(self.out, "{allocated}/{} bytes allocated at offset {shown}", end - offset)?;
        Ok(())
    }

    fn map(&mut self) -> Result<(), Bad> {
        let size_total = self.image().size();
        let chain = self.look()?;
        let mut at = 0;
        while at < size_total {
            let (is, mut len) = Runner::is_allocated(&chain, at, size_total - at)?;
            while at + len < size_total {
                match Runner::is_allocated(&chain, at + len, size_total - at - len)? {
                    (same, more) if same == is => len += more,
                    _ => break,
                }
            }
            let what = if is { "    allocated" } else { "not allocated" };
            let (bytes, offset) = (size(len as f64), size(at as f64));
            writeln!(self.out, "{bytes} ({len:#x}) bytes {what} at offset {offset} ({at:#x})")?;
            at += len;
        }
        Ok(())
    }

    fn sleep(&mut self, args: &[&str]) -> Result<(), Bad> {
        let ms = integer(args[0]).and_then(|ms| u64::try_from(ms).ok());
        let Some(ms) = ms.filter(|&ms| ms <= i64::MAX as u64) else {
            return Err(Bad::Out(format!("{} is not a valid number\n", args[0])));
        };
        let Some(session) = &mut self.session else {
            std::thread::sleep(std::time::Duration::from_millis(ms));
            return Ok(());
        };
        let until = session.now().plus_ms(ms);
        while let Some(session) = &mut self.session {
            if session.now() >= until || self.stop.is_asked() {
                break;
            }
            let again = session.run().again;
            self.report_finished()?;
            self.out.flush()?;
            if let (false, Some(session)) = (again, &mut self.session) {
                session.wait(Some(until))?;
            }
        }
        Ok(())
    }

    fn open_command(&mut self, args: &[&str]) -> Result<(), Bad> {
        let options = Options::parse("open", args, "snCro:ki:t:d:U")?;
        if self.session.is_some() {
            let prefix = self.prefix();
            return Err(Bad::Err(format!("{prefix}file open already, try 'help close'\n")));
        }
        let (read_only, snapshot) = (options.has('r'), options.has('s'));
        let mut opening = Opening { read_only, snapshot, ..self.opening.clone() };
        opening.naming = opening.naming.sharing(options.has('U'));
        let (file, more) = match (&options.rest[..], options.get('o')) {
            (&[file], more) => (file, more.unwrap_or("")),
            ([], Some(all)) => {
                opening.naming = opening.naming.by_options();
                (all, "")
            }
            _ => return Err(Bad::Usage),
        };
        // As in QEMU, what the command line says of modes is not meant for this one.
        opening.cache = Cache::WRITETHROUGH;
        if let Some(name) = options.get('t') {
            opening.cache = cache_named(name)?;
        }
        if options.has('n') {
            opening.cache = Cache::NONE;
        }
        if options.has('k') {
            opening.how = Some(How::Native);
        }
        if let Some(name) = options.get('i') {
            opening.how = How::named(name);
        }
        if let Some(name) = options.get('d') {
            opening.discard = discard_named(name)?;
        }
        opening.naming = opening.naming.with_options(more);
        if !more.is_empty() {
            // What the command line says of formats is not meant for this one either.
            opening.format = None;
        }
        let (program, failed) = (self.program, self.open_as(file.as_ref(), opening));
        failed.map_err(|fail| Bad::Err(fail.line(program, "io").unwrap_or_default()))
    }

    fn help(&mut self, args: &[&str]) -> Result<(), Bad> {
        if let Some(&name) = args.first() {
            match Command::named(name) {
                Some(command) => write!(self.out, "{}", command.help())?,
                None => writeln!(self.out, "command {name} not found")?,
            }
            return Ok(());
        }
        for command in COMMANDS.iter().filter(|command| !command.name.is_empty()) {
            write!(self.out, "{}", command.help())?;
        }
        writeln!(self.out, "\nUse 'help commandname' for extended help.")?;
        Ok(())
    }

    fn sigraise(&mut self, args: &[&str]) -> Result<(), Bad> {
        let signal = number(args[0])?;
        let Ok(signal) = i32::try_from(signal) else {
            let what = args[0];
            return Err(Bad::Out(format!(
                "signal argument '{what}' is too large to be a valid signal\n"
            )));
        };
        self.out.flush()?;
        signal_hook::low_level::raise(signal)?;
        Ok(())
    }
}

impl Pending {
    fn new(
        verb: &'static str,
        failing: &'static str,
        offset: u64,
        len: u64,
        options: &Options<'_>,
    ) -> Pending {
        let style =
            Style { quiet: options.has('q'), parsable: options.has('C'), dump: options.has('v') };
        let began = Time::default();
        Pending { verb, failing, offset, len, began, style, verify: None, awaited: false }
    }

    fn verify(self, verify: Option<Verify>) -> Pending {
        Pending { verify, ..self }
    }
}

/// A command's options and what stands behind them.
struct Options<'a> {
    given: Vec<(char, Option<&'a str>)>,
    rest: Vec<&'a str>,
}

impl<'a> Options<'a> {
    fn none() -> Options<'a> {
        Options { given: Vec::new(), rest: Vec::new() }
    }

    /// As getopt: `spec` lists the letters, a colon behind those with a value. Options may stand
    /// behind arguments, up to `--`.
    fn parse(command: &str, args: &[&'a str], spec: &str) -> Result<Options<'a>, Bad> {
        let mut options = Options::none();
        let mut args = args.iter().copied();
        while let Some(arg) = args.next() {
            if arg == "--" {
                options.rest.extend(args);
                break;
            }
            let Some(letters) = arg.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
                options.rest.push(arg);
                continue;
            };
            for (i, letter) in letters.char_indices() {
                let Some(at) = spec.find(letter).filter(|_| letter != ':') else {
                    eprint_quietly(&format!("{command}: invalid option -- '{letter}'\n"));
                    return Err(Bad::Usage);
                };
                if !spec[at + 1..].starts_with(':') {
                    options.given.push((letter, None));
                    continue;
                }
                let tail = &letters[i + letter.len_utf8()..];
                let value = if tail.is_empty() { args.next() } else { Some(tail) };
                if value.is_none() {
                    let text = format!("{command}: option requires an argument -- '{letter}'\n");
                    eprint_quietly(&text);
                    return Err(Bad::Usage);
                }
                options.given.push((letter, value));
                break;
            }
        }
        Ok(options)
    }

    fn has(&self, letter: char) -> bool {
        self.given.iter().any(|&(given, _)| given == letter)
    }

    fn get(&self, letter: char) -> Option<&'a str> {
        self.given.iter().rev().find(|&&(given, _)| given == letter).and_then(|&(_, value)| value)
    }

    fn size(&self, letter: char) -> Result<Option<u64>, Bad> {
        self.get(letter).map(number).transpose()
    }

    fn pattern(&self) -> Result<Option<u8>, Bad> {
        let Some(text) = self.get('P') else { return Ok(None) };
        match integer(text).and_then(|value| u8::try_from(value).ok()) {
            Some(pattern) => Ok(Some(pattern)),
            None => Err(Bad::Out(format!("{text} is not a valid pattern byte\n"))),
        }
    }

    fn lens(&self) -> &[&'a str] {
        self.rest.get(1..).unwrap_or_default()
    }

    /// Offset and length.
    fn range(&self, max: u64, unless: &str) -> Result<(u64, u64), Bad> {
        let &[offset, len] = &self.rest[..] else { return Err(Bad::Usage) };
        let (offset, bytes) = (number(offset)?, number(len)?);
        if bytes > max {
            return Err(Bad::Out(format!("length cannot exceed {max}{unless}, given {len}\n")));
        }
        Ok((offset, bytes))
    }

    /// Offset and the sum of lengths.
    fn vector(&self) -> Result<(u64, u64), Bad> {
        let Some((offset, lens)) = self.rest.split_first().filter(|(_, lens)| !lens.is_empty())
        else {
            return Err(Bad::Usage);
        };
        let offset = number(offset)?;
        let mut total = 0;
        for len in lens {
            let bytes = number(len)?;
            if bytes > LEN_MAX {
                let text = format!("Argument '{len}' exceeds maximum size {LEN_MAX}\n");
                return Err(Bad::Out(text));
            }
            if bytes > LEN_MAX - total {
                return Err(Bad::Out(format!(
                    "The total number of bytes exceed the maximum size {LEN_MAX}\n"
                )));
            }
            total += bytes;
        }
        Ok((offset, total))
    }
}

fn number(text: &str) -> Result<u64, Bad> {
    match parse_size(text) {
        Ok(value) if value <= i64::MAX as u64 => Ok(value),
        Err(BadSize::NotANumber) => Err(Bad::Out(format!(
            "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}\n"
        ))),
        _ => Err(Bad::Out(format!("Parsing error: argument too large -- {text}\n"))),
    }
}

/// "Operation not supported", as an errno of its own: not the one that means the same of sockets.
fn not_supported() -> Errno {
    Errno::NOT_SUPPORTED
}

/// Memory full of `byte`.
fn filled(len: u64, byte: u8) -> Mem {
    let mut buf = Buf::zeroed(len as usize);
    if byte != 0 {
        buf.fill(byte);
    }
    Mem::Owned(buf)
}

/// `len` bytes of a file, from its start again and again.
fn from_file(file: &str, len: u64) -> Result<Buf, Bad> {
    let bytes = fs::read(file)
        .map_err(|error| Bad::Err(format!("{file}: {}\n", Errno::from_io(&error))))?;
    if bytes.is_empty() && len > 0 {
        return Err(Bad::Err(format!("{file}: file is empty\n")));
    }
    let mut buf = Buf::zeroed(len as usize);
    for chunk in buf.chunks_mut(bytes.len().max(1)) {
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
    Ok(buf)
}
