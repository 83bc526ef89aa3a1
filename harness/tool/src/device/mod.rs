//! `bench --loop`: how long a device model's loop is held.
//!
//! One thread, one engine, several thin disks on it, and one loop that waits for the engine and for
//! a timer, as that of a virtual machine monitor does. The guest keeps its queues full with a random
//! mix of requests on scatter lists in its memory. What is measured is what such a loop feels: how
//! long a turn takes, how late the timer is, how long requests take. And what is behind it: how
//! often the file system was asked to zero, give up or allocate something.

mod guest;
mod report;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cowbell_engine::stats::{Held, Histogram};
use cowbell_engine::sys::clock;
use cowbell_engine::sys::pool::PoolStats;
use cowbell_engine::units::{NodeId, Time};
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{Chain, CreateOptions, Format, Locks, Node, RunOptions, attach, create, map};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::event::Timespec;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use crate::cache::{Cache, How};
use crate::disk::{Disk, Files};
use crate::fail::Fail;
use crate::naming::Image;
use crate::number::{count, size};
use crate::scratch::Folder;
use crate::stop::Stop;

use guest::{Guest, Kind, Mix};

/// The options of `bench --loop`.
#[derive(Debug, clap::Args)]
pub struct Looped {
    /// Measure a device model's loop on thin disks that it makes in the folder FILE
    ///
    /// One thread with one engine, several disks on it, and a timer of 1 ms beside it in the same
    /// loop. The guest keeps its queues full: by default 40 % reads, 40 % writes, 8 % zero writes,
    /// 8 % discards, 4 % flushes, of 4 to 64 KiB each, at multiples of 4 KiB, no two that are in
    /// flight on the same block. By default 4000 requests, 128 at a time, past the page cache, by
    /// native AIO. FILE is a folder on the file system to try; that for temporary files if not said.
    /// Of the other options -c, -d, -t, -i, -q, --random, --may-block, --turn and --json count.
    #[arg(long = "loop", help_heading = "With --loop")]
    pub is_asked: bool,
    /// Go on for so many seconds, whatever the count
    #[arg(long, value_name = "S", help_heading = "With --loop", allow_hyphen_values = true)]
    seconds: Option<String>,
    /// Its disks: of raw, qed, qcow2, vmdk, and overlay (a qcow2 on a raw file that has data)
    #[arg(long, value_name = "LIST", default_value = "overlay,vmdk", help_heading = "With --loop")]
    disks: String,
    /// The size of each disk
    #[arg(long, value_name = "SIZE", default_value = "1G", help_heading = "With --loop")]
    disk_size: String,
    /// The ratio of reads, writes, zero writes, discards and flushes
    #[arg(
        long,
        value_name = "R,W,Z,D,F",
        default_value = "40,40,8,8,4",
        help_heading = "With --loop"
    )]
    mix: String,
    /// Look at every block of the disks in the end; filling memory for that makes turns longer
    #[arg(long, help_heading = "With --loop")]
    check: bool,
}

/// What `bench` knows that counts here too.
#[derive(Debug)]
pub struct Given<'a> {
    pub folder: Option<&'a Path>,
    pub count: Option<&'a str>,
    pub depth: Option<&'a str>,
    pub cache: Cache,
    pub how: How,
    pub may_block: bool,
    pub turn: Duration,
    pub seed: u64,
    pub quiet: bool,
    pub json: bool,
}

/// What is to be done.
#[derive(Debug)]
struct Plan {
    /// Requests; `None`: for as long as there is time.
    total: Option<u64>,
    nanos: Option<u64>,
    depth: usize,
    size: u64,
    mix: Mix,
}

/// How often the timer ticks.
const TICK: Duration = Duration::from_millis(1);
/// How long the space of the files is watched after the last request.
const QUIET_MS: u64 = 2000;
/// How often it is looked at.
const LOOK_MS: u64 = 5;
const DEPTH_MAX: u64 = 4096;
const SIZE_MIN: u64 = 1 << 20;
const SIZE_MAX: u64 = 64 << 30;
/// So much of an overlay's disk has data in its backing file.
const BACKED: u64 = 4;

/// A disk of the loop.
#[derive(Debug)]
struct Thin {
    /// As it was asked for.
    kind: String,
    path: PathBuf,
    format: Format,
    node: NodeId,
    /// Bytes that its backing file gives it.
    backed: u64,
    #[expect(dead_code, reason = "held until the image is closed")]
    locks: Locks,
}

/// What a loop felt for some time.
#[derive(Clone, Debug, Default)]
struct Felt {
    nanos: u64,
    turns: Histogram,
    runs: Histogram,
    ticks: u64,
    /// Ticks that had not been served when the next was due.
    missed: u64,
    late: Histogram,
}

/// What was measured.
#[derive(Debug, Default)]
struct Measured {
    /// By kind of request.
    counts: [u64; 5],
    latency: [Histogram; 5],
    /// Bytes of zero writes and discards.
    given_up: u64,
    busy: Felt,
    /// What held one `run` for longest meanwhile.
    longest: Option<Held>,
    quiet: Felt,
    pool: PoolStats,
    /// From the last request's end until space was last given back.
    space_back: u64,
    /// Bytes that were given back then.
    space: u64,
    /// Blocks looked at in the end, and how many were wrong.
    checked: Option<(u64, u64)>,
    stopped: bool,
}

/// Runs it.
pub fn run(args: &Looped, given: &Given<'_>) -> Result<u8, Fail> {
    if !matches!(given.cache, Cache::NONE | Cache::WRITEBACK) {
        return Err(Fail::other("--loop takes the cache modes none and writeback"));
    }
    if given.how == How::Native && !given.cache.direct {
        return Err(Fail::other("native AIO requires the cache mode none"));
    }
    let plan = plan(args, given)?;
    let stop = Stop::on_signals()?;
    let temporary = std::env::temp_dir();
    let folder = Folder::new_in(given.folder.unwrap_or(&temporary), "loop")?;
    let depth = plan.depth;
    let backend = Disk::new(given.how, depth.max(128), given.may_block, false)?;
    let defaults = Limits::default();
    let limits = Limits {
        requests: depth.max(defaults.requests),
        ops: (depth * 4).max(defaults.ops),
        turn: given.turn,
        ..defaults
    };
    let mut engine = Engine::new(backend, limits);
    let mut disks = Vec::new();
    for (n, kind) in args.disks.split(',').enumerate() {
        disks.push(make(&mut engine, &folder, n, kind.trim(), plan.size, given.cache.direct)?);
    }
    if depth < disks.len() {
        return Err(Fail::other("less than one request at a time for each disk"));
    }
    let known: Vec<(u64, u64)> = disks.iter().map(|disk| (plan.size, disk.backed)).collect();
    let guest = Guest::new(given.seed, plan.mix, depth, &known, args.check)?;
    let mut device = Device::new(engine, guest, disks, stop)?;
    device.serve(&plan)?;
    device.be_quiet()?;
    device.measured.pool = device.engine.backend().pool_stats();
    device.close()?;
    let Device { guest, disks, mut measured, .. } = device;
    if args.check {
        measured.checked = Some(look_again(&disks, &guest, plan.size)?);
    }
    report::write(given, &plan, &disks, &measured)?;
    Ok(match (&measured.checked, measured.stopped) {
        (Some((_, 1..)), _) => 1,
        (_, true) => 130,
        _ => 0,
    })
}

fn plan(args: &Looped, given: &Given<'_>) -> Result<Plan, Fail> {
    let seconds = args.seconds.as_deref();
    let seconds = seconds.map(|text| count("seconds", text, 1, 1_000_000)).transpose()?;
    let total = match (given.count, seconds) {
        (None, Some(_)) => None,
        (text, _) => Some(count("request count", text.unwrap_or("4000"), 1, i32::MAX as u64)?),
    };
    let total = if seconds.is_some() { None } else { total };
    let depth = count("queue depth", given.depth.unwrap_or("128"), 1, DEPTH_MAX)? as usize;
    let size = size("disk size", &args.disk_size, SIZE_MIN, SIZE_MAX)?;
    let size = size - size % (64 << 10);
    let nanos = seconds.map(|seconds| seconds * 1_000_000_000);
    Ok(Plan { total, nanos, depth, size, mix: Mix::parse(&args.mix)? })
}

/// Makes a disk and puts it on the engine.
fn make(
    engine: &mut Engine<Node, Disk>,
    folder: &Folder,
    n: usize,
    kind: &str,
    size: u64,
    direct: bool,
) -> Result<Thin, Fail> {
    let format = match kind {
        "raw" => Format::Raw,
        "qed" => Format::Qed,
        "qcow2" | "overlay" => Format::Qcow2,
        "vmdk" => Format::Vmdk,
        "vdi" => Format::Vdi,
        _ => return Err(Fail::other(format!("'{kind}' is no kind of disk"))),
    };
    let path = folder.path().join(format!("{n}.{kind}"));
    let mut options = CreateOptions { size: Some(size), ..CreateOptions::default() };
    let mut backed = 0;
    if kind == "overlay" {
        let base = format!("{n}.base");
        backed = size / BACKED;
        guest::write_backing(&folder.path().join(&base), backed)
            .map_err(|error| Fail::open_io(&path, &error))?;
        options.backing_file = Some(base.into());
        options.backing_format = Some(Format::Raw);
    }
    let host = Files { direct };
    create(&Files::default(), &path, format, &options).map_err(|why| Fail::file(&path, why))?;
    let chain: Chain<_> = Image::plain(&path, Some(format)).open(&host, true)?;
    let opened = |error| Fail::open_io(&path, &error);
    let locks = chain.locks().map_err(opened)?;
    let node = attach(engine, chain, &RunOptions::default()).map_err(opened)?;
    Ok(Thin { kind: kind.into(), path, format, node, backed, locks })
}

const DISK: Token = Token(0);
const TIMER: Token = Token(1);

/// The loop and all that is in it.
struct Device {
    engine: Engine<Node, Disk>,
    guest: Guest,
    disks: Vec<Thin>,
    poll: Poll,
    events: Events,
    timer: OwnedFd,
    /// When the next tick is due.
    due: Time,
    stop: Stop,
    measured: Measured,
}

/// A turn of the loop.
struct Turn {
    /// The engine wants another at once.
    more: bool,
    ended: u64,
    sent: u64,
}

impl Device {
    fn new(
        engine: Engine<Node, Disk>,
        guest: Guest,
        disks: Vec<Thin>,
        stop: Stop,
    ) -> Result<Device, Fail> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK)
            .map_err(std::io::Error::from)?;
        let poll = Poll::new()?;
        let add = |fd: &dyn AsFd, token| {
            let fd = fd.as_fd().as_raw_fd();
            poll.registry().register(&mut SourceFd(&fd), token, Interest::READABLE)
        };
        add(&timer, TIMER)?;
        if let Some(fd) = engine.fd() {
            add(&fd, DISK)?;
        }
        let (events, due, measured) = (Events::with_capacity(4), Time(0), Measured::default());
        Ok(Device { engine, guest, disks, poll, events, timer, due, stop, measured })
    }

    /// The timer begins to tick.
    fn start_timer(&mut self) -> Result<(), Fail> {
        let tick = Timespec::try_from(TICK).map_err(|_| Fail::other("no such time"))?;
        let every = Itimerspec { it_interval: tick, it_value: tick };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &every)
            .map_err(std::io::Error::from)?;
        self.due = clock().plus_ns(TICK.as_nanos() as u64);
        Ok(())
    }

    /// Serves the guest until it has enough.
    fn serve(&mut self, plan: &Plan) -> Result<(), Fail> {
        let mut felt = Felt::default();
        let (mut sent, mut ended, mut more) = (0, 0, true);
        self.start_timer()?;
        let began = clock();
        loop {
            self.wait(more)?;
            let now = clock();
            let over = plan.nanos.is_some_and(|nanos| now.since(began) >= nanos);
            self.measured.stopped |= self.stop.is_asked();
            let left = match (over || self.measured.stopped, plan.total) {
                (true, _) => 0,
                (false, Some(total)) => total - sent,
                (false, None) => u64::MAX,
            };
            let turn = self.turn(now, left, &mut felt)?;
            (sent, ended) = (sent + turn.sent, ended + turn.ended);
            // Where requests have ended the guest has put others into its queues.
            more = turn.more || turn.ended > 0;
            if ended == sent && (over || self.measured.stopped || plan.total == Some(sent)) {
                break;
            }
        }
        felt.nanos = clock().since(began);
        self.measured.busy = felt;
        self.measured.longest = self.engine.stats().longest;
        Ok(())
    }

    /// Waits for the engine, its deadline or the timer; not at all if there is more to do.
    fn wait(&mut self, more: bool) -> Result<(), Fail> {
        let timeout = match (more, self.engine.next_deadline()) {
            (true, _) => Some(Duration::ZERO),
            (false, Some(due)) => Some(Duration::from_nanos(due.since(clock()))),
            (false, None) => None,
        };
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// What the loop does between two waits: serves the timer, hands over up to `left` requests,
    /// runs the engine and takes what has ended.
    fn turn(&mut self, began: Time, left: u64, felt: &mut Felt) -> Result<Turn, Fail> {
        if self.events.iter().any(|event| event.token() == TIMER) {
            self.serve_timer(began, felt)?;
        }
        let mut turn = Turn { more: false, ended: 0, sent: 0 };
        for n in 0..self.disks.len() {
            while turn.sent < left
                && let Some((io, mem, tag)) = self.guest.next(n, clock())?
            {
                let taken = self.engine.submit(self.disks[n].node, io, mem, tag);
                assert!(taken.is_ok(), "the engine was made for this depth");
                turn.sent += 1;
            }
        }
        let running = clock();
        let progress = self.engine.run(running);
        let ran = clock().since(running);
        turn.more = progress.again;
        while let Some(done) = self.engine.poll() {
            let now = clock();
            let sent = self.guest.ended(done.tag, done.mem);
            let kind = sent.kind as usize;
            done.result.map_err(|errno| {
                let (name, path) = (sent.kind.name(), &self.disks[sent.disk].path);
                Fail::at(path, format!("{name} of {} at {}: {errno}", sent.io.len, sent.io.offset))
            })?;
            self.measured.latency[kind].record(now.since(sent.at));
            self.measured.counts[kind] += 1;
            if matches!(sent.kind, Kind::Zero | Kind::Discard) {
                self.measured.given_up += sent.io.len;
            }
            turn.ended += 1;
        }
        // A turn in which there was nothing for the engine tells nothing about it.
        if turn.sent + turn.ended > 0 || progress.steps + progress.submitted > 0 {
            felt.turns.record(clock().since(began));
            felt.runs.record(ran);
        }
        Ok(turn)
    }

    fn serve_timer(&mut self, now: Time, felt: &mut Felt) -> Result<(), Fail> {
        let mut ticks = [0; 8];
        match rustix::io::read(&self.timer, &mut ticks) {
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(std::io::Error::from(error).into()),
        }
        let ticks = u64::from_ne_bytes(ticks);
        felt.late.record(now.since(self.due));
        felt.ticks += ticks;
        felt.missed += ticks - 1;
        self.due = self.due.plus_ns(ticks * TICK.as_nanos() as u64);
        Ok(())
    }

    /// The guest has nothing to do; what it gave up comes back to the file system.
    fn be_quiet(&mut self) -> Result<(), Fail> {
        let mut felt = Felt::default();
        let before = self.space()?;
        let (mut least, mut more) = (before, true);
        self.start_timer()?;
        let began = clock();
        let (end, mut next_look) = (began.plus_ms(QUIET_MS), began);
        loop {
            self.wait(more)?;
            let now = clock();
            if now >= end || self.stop.is_asked() {
                break;
            }
            more = self.turn(now, 0, &mut felt)?.more;
            if now >= next_look {
                next_look = now.plus_ms(LOOK_MS);
                let space = self.space()?;
                if space < least {
                    (least, self.measured.space_back) = (space, now.since(began));
                }
            }
        }
        felt.nanos = clock().since(began);
        (self.measured.quiet, self.measured.space) = (felt, before - least);
        Ok(())
    }

    /// Bytes that the files take.
    fn space(&self) -> Result<u64, Fail> {
        let mut blocks = 0;
        for disk in &self.disks {
            let found = std::fs::metadata(&disk.path);
            blocks += found.map_err(|error| Fail::open_io(&disk.path, &error))?.blocks();
        }
        Ok(blocks * 512)
    }

    /// Leaves the images clean.
    fn close(&mut self) -> Result<(), Fail> {
        self.engine.drain();
        let mut more = true;
        loop {
            self.wait(more)?;
            more = self.engine.run(clock()).again;
            match self.engine.drained() {
                Some(Ok(())) => return Ok(()),
                Some(Err(errno)) => return Err(Fail::other(format!("closing: {errno}"))),
                None => {}
            }
        }
    }
}

/// Reads the closed images without the engine: blocks, and how many of them are wrong.
fn look_again(disks: &[Thin], guest: &Guest, size: u64) -> Result<(u64, u64), Fail> {
    let (mut looked, mut wrong) = (0, 0);
    let mut bytes = vec![0; 1 << 20];
    for (n, disk) in disks.iter().enumerate() {
        let image = Image::plain(&disk.path, Some(disk.format));
        let chain = image.open_unlocked(&Files::default())?;
        for offset in (0..size).step_by(bytes.len()) {
            let len = (size - offset).min(bytes.len() as u64) as usize;
            let bytes = &mut bytes[..len];
            map::read(&chain, offset, bytes).map_err(|why| Fail::open(&disk.path, why))?;
            looked += len as u64 / guest::BLOCK;
            wrong += guest.count_wrong(n, offset, bytes);
        }
    }
    Ok((looked, wrong))
}
