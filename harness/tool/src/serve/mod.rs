//! `serve`: images for programs elsewhere, until it is told to stop.
//!
//! One thread, one engine with all disks, one loop. A *front end* is what speaks a protocol with
//! clients; it turns what they want into requests, and what has finished into answers. Today there
//! are two, [`nbd`] and [`vhost`]. All that one needs of the loop is here:
//!
//! | in a turn | the loop calls |
//! |---|---|
//! | a descriptor of its is ready: one whose token is in its range | `event` |
//! | before the engine runs: read, submit | `work` |
//! | a request of its has finished: one whose tag has its number | `finished` |
//! | after that: write | `send` |
//! | its moment has come: `deadline` | `work` |
//! | the end: take nothing more, answer what is in flight; `is_done` | `stop` |
//! | the loop has ended, whatever the reason | `abandon` |
//!
//! Nothing in a turn waits, and each front end has a bounded share of it: `work` answers that there
//! is more to do, and the loop comes round again without waiting.

mod disks;
mod flight;
mod limit;
mod listen;
mod memory;
mod nbd;
mod status;
mod vhost;

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cowbell_engine::NodeEvent;
use cowbell_engine::sys::clock;
use cowbell_engine::units::Time;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::{flag, low_level};

use crate::cache::{Cache, How};
use crate::fail::Fail;
use crate::json::Json;
use crate::naming::Naming;
use crate::number::{count, size};
use crate::out::Out;
use crate::serve::disks::{Disks, Opening};
use crate::serve::limit::Limits;
use crate::serve::listen::{Address, Listener};
use crate::serve::nbd::{Nbd, Patience};
use crate::serve::status::{Counts, Rates};
use crate::serve::vhost::{Place, QUEUES_MAX, Vhost};
use crate::session::eprint_quietly;
use crate::stop::Stop;

/// The options of `serve`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Speak NBD here: unix:PATH, tcp:HOST:PORT, or systemd (sockets that it has opened for us)
    ///
    /// May be given again. There is no encryption and nobody is asked who he is: a TCP port is for
    /// networks where everybody may read and write the images.
    #[arg(long, value_name = "WHERE", required_unless_present = "vhost_user", action = clap::ArgAction::Append)]
    nbd: Vec<OsString>,
    /// Be a vhost-user-blk device on this Unix socket, for QEMU and other machines: [NAME=]SOCKET
    ///
    /// It is the disk called NAME, or else the first one, for one machine at a time. May be given again.
    #[arg(long, value_name = "SOCKET", action = clap::ArgAction::Append)]
    vhost_user: Vec<OsString>,
    /// How many queues such a device has
    #[arg(long, value_name = "N", default_value = "4", allow_hyphen_values = true)]
    queues: String,
    /// The images' format; probed if not said
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Nothing is written
    #[arg(short, long)]
    read_only: bool,
    /// Write to temporary images, which are gone in the end; these stay as they are
    #[arg(short, long)]
    snapshot: bool,
    /// Cache mode: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, default_value = "writeback")]
    cache: String,
    /// Who does the I/O: threads, native or io_uring
    ///
    /// By default native past the page cache, else threads.
    #[arg(short = 'i', long, value_name = "AIO")]
    aio: Option<String>,
    /// How long a client's handshake may take, in seconds
    #[arg(long, value_name = "S", default_value = "10", allow_hyphen_values = true)]
    handshake_timeout: String,
    /// How long a client may take none of its replies, or leave a request half sent, in seconds
    #[arg(long, value_name = "S", default_value = "30", allow_hyphen_values = true)]
    stall_timeout: String,
    /// Let a disk move at most so many bytes a second (k, M, G...; 0: no limit, as by default): [NAME=]N
    ///
    /// Reads and writes together. Without NAME it is said of each disk that no other --bps names: each
    /// has so much, they do not share it. What is over waits; nothing is refused. May be given again.
    #[arg(long, value_name = "N", help_heading = "Limits", allow_hyphen_values = true)]
    bps: Vec<String>,
    /// Let a disk begin at most so many requests a second (up to 2^32; 0: no limit, as by default): [NAME=]N
    ///
    /// Reads, writes, zeros and discards; flushes go at once. Otherwise as --bps, and beside it: a
    /// request waits for both.
    #[arg(long, value_name = "N", help_heading = "Limits", allow_hyphen_values = true)]
    iops: Vec<String>,
    /// Let a limited disk catch up after a pause: as much at once as it may do in so many milliseconds
    /// (0 to 3600000; by default 100): [NAME=]MS
    ///
    /// One request of any length may always begin, so with 0 too. Of a disk without a limit it is an error.
    #[arg(long, value_name = "MS", help_heading = "Limits", allow_hyphen_values = true)]
    burst: Vec<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// What is said as JSON: where it listens; on SIGUSR1 and in the end, what was served
    #[arg(long)]
    json: bool,
    /// Record all that the engine is asked and sees into this file, without a byte of data: see `replay`
    #[arg(long, value_name = "FILE", help_heading = "Beyond QEMU")]
    record: Option<PathBuf>,
    /// Keep the last that the engine was asked and saw in memory, and draw it into this file (.html: a page; .json: a
    /// trace for Perfetto) when a request fails for the first time, an image is found corrupt, on SIGUSR1 and after a panic
    ///
    /// Each time into a file of its own: LAST.html, LAST.2.html, up to 100. No byte of data is kept.
    #[arg(long, value_name = "FILE", help_heading = "Beyond QEMU", conflicts_with = "record")]
    flight: Option<PathBuf>,
    /// How much of it is kept, in bytes of a record: 64k to 16M. A request takes some 20; where thousands
    /// are in flight, pages are large
    #[arg(
        long,
        value_name = "SIZE",
        help_heading = "Beyond QEMU",
        default_value = "256k",
        requires = "flight",
        allow_hyphen_values = true
    )]
    flight_size: String,
    #[command(flatten)]
    naming: Naming,
    /// The images: PATH, or NAME=PATH (not with --image-opts); by default the name is the file's. Who
    /// asks for no name gets the first
    #[arg(required = true)]
    images: Vec<OsString>,
}

/// The engine's descriptor.
const DISKS: Token = Token(0);
/// The pipe of signals.
const SIGNALS: Token = Token(1);
/// Front ends have tokens of their own from here on.
const NBD: usize = 1 << 16;
const VHOST: usize = 1 << 24;
/// And tags: NBD's have none of these bits.
const VHOST_TAGS: u64 = 1 << 63;
/// How long a turn may wait although nothing is due, where rates are shown.
const SHOWN_MS: u64 = 1000;

/// What the loop waits for, and what it says.
struct Server {
    poll: Poll,
    disks: Disks,
    nbd: Nbd,
    vhost: Vhost,
    /// Who comes first in this turn: what there is room for goes to one as often as to the other.
    is_nbd_first: bool,
    stop: Stop,
    /// Readable after a signal.
    signals: UnixStream,
    status_asked: Arc<AtomicBool>,
    began: Time,
    /// What is shown on a terminal, and when it is shown again.
    rates: Option<(Rates, Time)>,
    out: Out,
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<u8, Fail> {
    let cache = Cache::named(&args.cache);
    let cache = cache.ok_or_else(|| Fail::other(format!("Invalid cache mode: {}", args.cache)))?;
    let how = match &args.aio {
        Some(name) => {
            How::named(name).ok_or_else(|| Fail::other(format!("Invalid aio option: {name}")))?
        }
        None if cache.direct => How::Native,
        None => How::Threads,
    };
    if how == How::Native && !cache.direct {
        return Err(Fail::other("native AIO needs -t none or -t directsync"));
    }
    let seconds = |what, text| count(what, text, 1, 1 << 20).map(Duration::from_secs);
    let patience = Patience {
        handshake: seconds("handshake timeout", &args.handshake_timeout)?,
        stall: seconds("stall timeout", &args.stall_timeout)?,
    };
    let addresses = args.nbd.iter().map(|text| Address::parse(text));
    let addresses = addresses.collect::<Result<Vec<_>, Fail>>()?;
    let devices = args.vhost_user.iter().map(|text| place_of(text));
    let devices = devices.collect::<Result<Vec<_>, Fail>>()?;
    let limits = Limits::parse(&args.bps, &args.iops, &args.burst)?;
    let queues = count("number of queues", &args.queues, 1, QUEUES_MAX)?;
    let flight_size = size("flight size", &args.flight_size, flight::KEPT_MIN, flight::KEPT_MAX)?;
    // Before anything is made that has to be removed.
    let stop = Stop::on_signals()?;
    let (signals, status_asked) = on_signals()?;
    let opening = Opening {
        naming: &args.naming,
        format: args.format.as_deref(),
        read_only: args.read_only,
        snapshot: args.snapshot,
        cache,
        how,
        record: args.record.as_deref(),
        flight: args.flight.as_deref().map(|path| (path, flight_size)),
        limits: &limits,
    };
    let disks = Disks::open(&args.images, &opening)?;
    let mut listeners = Vec::new();
    for address in &addresses {
        listeners.extend(Listener::open(address)?);
    }
    let poll = Poll::new()?;
    let fd = disks.engine.fd().map(|fd| fd.as_raw_fd());
    for (fd, token) in [(fd, DISKS), (Some(signals.as_raw_fd()), SIGNALS)] {
        let Some(fd) = fd else { continue };
        poll.registry().register(&mut SourceFd(&fd), token, Interest::READABLE)?;
    }
    let registry = poll.registry().try_clone()?;
    let nbd = Nbd::new(registry, NBD, listeners, &disks.served, patience)?;
    let registry = poll.registry().try_clone()?;
    let vhost = Vhost::new(registry, (VHOST, VHOST_TAGS), &devices, queues as u16, &disks)?;
    let began = disks.now();
    let is_shown = !args.quiet && !args.json && io::stderr().is_terminal();
    let rates = is_shown.then(|| (Rates::new(began), began));
    let out = Out::new(args.quiet);
    let json = args.json;
    let mut server = Server {
        poll,
        disks,
        nbd,
        vhost,
        is_nbd_first: true,
        stop,
        signals,
        status_asked,
        began,
        rates,
        out,
        json,
    };
    server.say_where()?;
    let served = server.serve();
    // Whatever has happened, the images are left clean.
    let drained = server.drain();
    served?;
    drained?;
    let _ = server.say_status();
    Ok(0)
}

/// `NAME=SOCKET`, or a socket of the first disk.
fn place_of(text: &OsStr) -> Result<Place, Fail> {
    let bytes = text.as_bytes();
    // What is behind a slash is a path's.
    let name = bytes.iter().position(|&byte| matches!(byte, b'=' | b'/'));
    let name = name.filter(|&at| bytes[at] == b'=');
    let disk = name.map(|at| String::from_utf8_lossy(&bytes[..at]).into_owned());
    let path = &bytes[name.map_or(0, |at| at + 1)..];
    if path.is_empty() {
        return Err(Fail::other("a socket's path is missing"));
    }
    Ok(Place { disk, path: OsStr::from_bytes(path).into() })
}

/// Readable when there was a signal; and set when somebody wants to know the status.
fn on_signals() -> io::Result<(UnixStream, Arc<AtomicBool>)> {
    let asked = Arc::new(AtomicBool::new(false));
    flag::register(SIGUSR1, Arc::clone(&asked))?;
    let (signals, wake) = UnixStream::pair()?;
    signals.set_nonblocking(true)?;
    for signal in [SIGINT, SIGTERM, SIGUSR1] {
        low_level::pipe::register(signal, wake.try_clone()?)?;
    }
    Ok((signals, asked))
}

impl Server {
    /// Until somebody asks to stop, and what was in flight then has been answered.
    fn serve(&mut self) -> Result<(), Fail> {
        let mut events = Events::with_capacity(256);
        let (mut more, mut stopping) = (true, false);
        loop {
            self.wait(&mut events, more)?;
            let now = clock();
            for event in &events {
                match event.token() {
                    DISKS => {}
                    SIGNALS => self.take_signals()?,
                    Token(token) if token >= VHOST => self.vhost.event(token, event),
                    Token(token) => self.nbd.event(token, event),
                }
            }
            if self.stop.is_asked() && !stopping {
                stopping = true;
                self.disks.lift_limits();
                self.nbd.stop(now, &mut self.disks);
                self.vhost.stop();
            }
            more = self.turn(now)?;
            if stopping && self.nbd.is_done() && self.vhost.is_done() {
                return Ok(());
            }
        }
    }

    /// Reads, submits, runs, writes. Is there more to do?
    fn turn(&mut self, now: Time) -> Result<bool, Fail> {
        let mut more = false;
        for is_nbd in [self.is_nbd_first, !self.is_nbd_first] {
            more |= match is_nbd {
                true => self.nbd.work(now, &mut self.disks),
                false => self.vhost.work(now, &mut self.disks),
            };
        }
        self.is_nbd_first = !self.is_nbd_first;
        more |= self.disks.engine.run(clock()).again;
        more |= self.take_finished();
        more |= self.nbd.send(now, &mut self.disks);
        more |= self.vhost.send(now, &mut self.disks);
        while let Some(event) = self.disks.engine.poll_event() {
            if let NodeEvent::Corrupt { what, at, .. } = event {
                let what = format!("an image is corrupt: {what}, at {at}");
                eprint_quietly(&format!("cowbell serve: {what}\n"));
                self.disks.draw(&what);
            }
        }
        if self.status_asked.swap(false, Ordering::Relaxed) {
            // Nobody may be listening any more; clients are served all the same.
            let _ = self.say_status();
            self.disks.draw("asked for by SIGUSR1");
        }
        let (counts, clients) = (self.counts(), self.clients());
        if let Some((rates, due)) = &mut self.rates
            && now >= *due
        {
            *due = now.plus_ms(SHOWN_MS);
            let line = rates.line(now, &counts, clients);
            eprint_quietly(&format!("\r{line}\x1b[K"));
        }
        Ok(more)
    }

    /// Gives what has finished to who has asked for it. Was something submitted?
    fn take_finished(&mut self) -> bool {
        let mut more = false;
        while let Some(finished) = self.disks.poll() {
            more |= match finished.tag & VHOST_TAGS {
                0 => self.nbd.finished(finished, &mut self.disks),
                _ => self.vhost.finished(finished, &mut self.disks),
            };
        }
        more
    }

    fn counts(&self) -> Counts {
        self.nbd.counts.plus(&self.vhost.counts)
    }

    fn clients(&self) -> usize {
        self.nbd.clients() + self.vhost.clients()
    }

    fn wait(&mut self, events: &mut Events, more: bool) -> Result<(), Fail> {
        let shown = self.rates.as_ref().map(|&(_, due)| due);
        let due =
            [self.disks.engine.next_deadline(), self.nbd.deadline(), self.vhost.deadline(), shown];
        // A millisecond is what the system counts in: what is due within one is waited for whole.
        let timeout = match due.into_iter().flatten().min() {
            _ if more => Some(Duration::ZERO),
            due => due.map(|due| Duration::from_nanos(due.since(clock()))),
        };
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => events.clear(),
            result => result?,
        }
        Ok(())
    }

    fn take_signals(&mut self) -> io::Result<()> {
        let mut bytes = [0; 64];
        loop {
            match self.signals.read(&mut bytes) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends what is in flight, of clients that have gone too, and leaves the images clean.
    fn drain(&mut self) -> Result<(), Fail> {
        self.nbd.abandon(&mut self.disks);
        self.vhost.abandon(&mut self.disks);
        self.disks.engine.drain();
        let mut events = Events::with_capacity(4);
        loop {
            let again = self.disks.engine.run(clock()).again;
            self.take_finished();
            match self.disks.engine.drained() {
                Some(Ok(())) => return Ok(()),
                Some(Err(errno)) => return Err(Fail::other(format!("closing: {errno}"))),
                None => self.wait(&mut events, again)?,
            }
        }
    }

    /// Says what is served and where.
    fn say_where(&mut self) -> Result<(), Fail> {
        if self.json {
            let exports = self.disks.served.iter().enumerate().map(|(at, disk)| {
                let uris = self.nbd.uris(&disk.name).chain(self.vhost.places(at));
                let uris = uris.map(Json::Text).collect();
                Json::Object(vec![
                    ("name", Json::text(&disk.name)),
                    ("image", Json::name(&disk.path)),
                    ("format", Json::text(disk.formats[0].name())),
                    ("virtual-size", Json::Int(disk.size)),
                    ("read-only", Json::Bool(disk.read_only)),
                    ("uris", Json::List(uris)),
                ])
            });
            let exports = Json::List(exports.collect());
            writeln!(self.out, "{}", Json::Object(vec![("exports", exports)]).pretty())?;
        } else {
            for (at, disk) in self.disks.served.iter().enumerate() {
                for uri in self.nbd.uris(&disk.name).chain(self.vhost.places(at)) {
                    writeln!(self.out, "{uri}")?;
                }
            }
        }
        self.out.flush()?;
        Ok(())
    }

    /// Says what was served.
    fn say_status(&mut self) -> Result<(), Fail> {
        if self.rates.is_some() {
            eprint_quietly("\r\x1b[K");
        }
        let seconds = clock().since(self.began) as f64 / 1e9;
        let counts = self.counts();
        if self.json {
            writeln!(self.out, "{}", counts.to_json(seconds, self.clients()).pretty())?;
        } else {
            writeln!(self.out, "{}", counts.to_line(seconds))?;
        }
        self.out.flush()?;
        Ok(())
    }
}
