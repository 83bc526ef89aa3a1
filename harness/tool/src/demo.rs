//! `demo`: the whole thing at work in a few seconds, without arguments.
//!
//! It makes a fragmented QED overlay over a raw backing file in a temporary folder, sends it a
//! random mix of requests, many at a time, and compares every byte that it reads with a copy in
//! memory. Then it closes the image, checks it, reads it all once more from the files, and says
//! what happened; and shows the simulator for a second. Requests in flight do not overlap, unless both read: what overlapping ones
//! leave behind is anybody's guess.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use cowbell_engine::Finished;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::stats::Stats;
use cowbell_engine::step::{Io, IoKind};
use cowbell_formats::qed::rest::check::{Repair, check};
use cowbell_formats::{CreateOptions, DiskHost, Format, Host, OpenOptions, Policy, create, map};

use cowbell_sim::gate::{explore, scopes};

use crate::bench::{quantiles, write_states};
use crate::cache::{Cache, How};
use crate::fail::Fail;
use crate::naming::Image;
use crate::number::{duration, human};
use crate::out::Out;
use crate::scratch::{Folder, Random};
use crate::session::{Session, Setup};
use crate::stop::Stop;

/// The options of `demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Another seed, another run
    #[arg(long, default_value = "1")]
    seed: u64,
    /// How long to send requests, in milliseconds
    #[arg(long, value_name = "MS", default_value = "1500")]
    time: u64,
}

const BACKING: u64 = 32 << 20;
const DISK: u64 = 128 << 20;
const CLUSTER: u64 = 64 << 10;
const DEPTH: usize = 32;
/// How long to make the image fragmented at most, in milliseconds.
const FRAGMENT_MS: u64 = 800;
/// The largest request of the mix.
const LEN_MAX: u64 = 192 << 10;

/// Runs it.
pub fn run(args: &Args) -> Result<u8, Fail> {
    let folder = Folder::new_in(&std::env::temp_dir(), "demo")?;
    let stop = Stop::on_signals()?;
    let mut out = Out::new(false);
    let mut random = Random(args.seed);
    let (overlay, shadow) = make(folder.path(), &mut random)?;
    let direct = DiskHost { direct: true }.open(&overlay, true).is_ok();
    let (cache, how) = match direct {
        true => (Cache::NONE, How::Native),
        false => (Cache::WRITEBACK, How::Threads),
    };
    let setup = Setup {
        write: true,
        cache,
        how: Some(how),
        // The loop is not to wait for the disk, whatever the file system has to do.
        may_block: false,
        depth: DEPTH,
        ..Setup::default()
    };
    let session = Session::open(&Image::plain(&overlay, Some(Format::Qed)), &setup)?;
    let file_system = if direct { "O_DIRECT, native AIO" } else { "page cache, threads" };
    writeln!(
        out,
        "{} a {} QED overlay ({} clusters) on a {} raw file; {file_system}",
        out.paint("1", "image   "),
        human(DISK),
        human(CLUSTER),
        human(BACKING),
    )?;
    out.flush()?;
    let mut mix = Mix::new(session, shadow, random, stop);
    mix.fragment()?;
    mix.send_for(args.time)?;
    let asked = mix.stop.is_asked();
    let ended = mix.end(&mut out)?;
    let verified = look_again(&overlay, &ended, &mut out)?;
    let held = simulate(&mut out)?;
    let good = verified && held && ended.mismatches == 0;
    let verdict = match (good, asked) {
        (true, false) => out.paint("1;32", "Every byte was what it had to be."),
        (true, true) => {
            out.paint("1;32", "Stopped early; every byte so far was what it had to be.")
        }
        (false, _) => out.paint("1;31", "WRONG BYTES OR A DAMAGED IMAGE: please report this."),
    };
    writeln!(out, "{verdict}")?;
    out.flush()?;
    Ok(match (good, asked) {
        (true, false) => 0,
        (true, true) => 130,
        (false, _) => 1,
    })
}

/// The two files, and what the disk holds.
fn make(folder: &Path, random: &mut Random) -> Result<(PathBuf, Vec<u8>), Fail> {
    let backing = folder.join("base.raw");
    let mut shadow = vec![0; DISK as usize];
    random.fill(&mut shadow[..BACKING as usize]);
    // Stable now: else the first read past the page cache would wait for all of it.
    let write = |file: &mut fs::File| {
        file.write_all(&shadow[..BACKING as usize])?;
        file.sync_all()
    };
    fs::File::create_new(&backing)
        .and_then(|mut file| write(&mut file))
        .map_err(|error| Fail::open_io(&backing, &error))?;
    let overlay = folder.join("overlay.qed");
    let options = CreateOptions {
        size: Some(DISK),
        backing_file: Some("base.raw".into()),
        backing_format: Some(Format::Raw),
        cluster_size: Some(CLUSTER),
        ..CreateOptions::default()
    };
    create(&DiskHost::default(), &overlay, Format::Qed, &options)
        .map_err(|why| Fail::file(&overlay, why))?;
    Ok((overlay, shadow))
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Sent {
    offset: u64,
    len: u64,
    /// It changes nothing.
    reads: bool,
}

/// Counts by kind.
#[derive(Clone, Copy, Default)]
struct Counts {
    reads: u64,
    writes: u64,
    zeroes: u64,
    discards: u64,
    flushes: u64,
    read_bytes: u64,
    written_bytes: u64,
}

/// The random mix of requests.
struct Mix {
    session: Session,
    shadow: Vec<u8>,
    random: Random,
    stop: Stop,
    sent: Vec<Option<Sent>>,
    counts: Counts,
    mismatches: u64,
    nanos: u64,
}

/// What is left of a [`Mix`].
struct Ended {
    shadow: Vec<u8>,
    mismatches: u64,
}

impl Mix {
    fn new(session: Session, shadow: Vec<u8>, random: Random, stop: Stop) -> Mix {
        let sent = vec![None; DEPTH];
        let counts = Counts::default();
        Mix { session, shadow, random, stop, sent, counts, mismatches: 0, nanos: 0 }
    }

    /// Writes a third of all clusters in shuffled order: so the image is fragmented.
    fn fragment(&mut self) -> Result<(), Fail> {
        let mut clusters: Vec<u64> = (0..DISK / CLUSTER).collect();
        for i in (1..clusters.len()).rev() {
            clusters.swap(i, self.random.below(i as u64 + 1) as usize);
        }
        clusters.truncate(clusters.len() / 3);
        // On a slow disk, fewer.
        let end = self.session.now().plus_ms(FRAGMENT_MS);
        for cluster in clusters {
            if self.session.now() >= end || self.stop.is_asked() {
                break;
            }
            let kind = IoKind::Write { fua: false, compressed: false };
            self.send(Io { kind, offset: cluster * CLUSTER, len: CLUSTER })?;
        }
        self.finish()?;
        self.session.engine.reset_stats();
        self.counts = Counts::default();
        Ok(())
    }

    /// Sends random requests for so many milliseconds.
    fn send_for(&mut self, ms: u64) -> Result<(), Fail> {
        let began = self.session.now();
        let end = began.plus_ms(ms);
        while self.session.now() < end && !self.stop.is_asked() {
            let io = self.choose();
            self.send(io)?;
        }
        self.finish()?;
        self.nanos = self.session.now().since(began);
        Ok(())
    }

    fn choose(&mut self) -> Io {
        let kind = match self.random.below(100) {
            0..45 => IoKind::Read,
            45..85 => IoKind::Write { fua: false, compressed: false },
            85..92 => IoKind::Zero { unmap: self.random.below(2) == 0, fua: false },
            92..98 => IoKind::Discard,
            _ => return Io::flush(),
        };
        let mut len = match self.random.below(4) {
            0 => self.random.below(4096) + 1,
            1 => (self.random.below(4) + 1) * 4096,
            2 => self.random.below(LEN_MAX) + 1,
            _ => CLUSTER,
        };
        let mut offset = self.random.below(DISK - len + 1);
        // Half of them are aligned, as a guest's mostly are.
        if self.random.below(2) == 0 {
            let align = if len >= CLUSTER { CLUSTER } else { 4096 };
            offset -= offset % align;
            len = len.next_multiple_of(512).min(DISK - offset);
        }
        Io { kind, offset, len }
    }

    /// Sends a request as soon as there is room and nothing in flight is in its way.
    fn send(&mut self, io: Io) -> Result<(), Fail> {
        let reads = matches!(io.kind, IoKind::Read | IoKind::Flush);
        let slot = loop {
            let blocked = self.sent.iter().flatten().any(|other| {
                let apart = io.end() <= other.offset || other.offset + other.len <= io.offset;
                !(apart || reads && other.reads)
            });
            match self.sent.iter().position(Option::is_none) {
                Some(slot) if !blocked => break slot,
                _ => self.collect()?,
            }
        };
        let range = io.offset as usize..io.end() as usize;
        let mem = match io.kind {
            IoKind::Read => {
                self.counts.reads += 1;
                self.counts.read_bytes += io.len;
                Mem::Owned(Buf::zeroed(io.len as usize))
            }
            IoKind::Write { .. } => {
                self.counts.writes += 1;
                self.counts.written_bytes += io.len;
                self.random.fill(&mut self.shadow[range.clone()]);
                Mem::Owned(Buf::copied(&self.shadow[range]))
            }
            IoKind::Zero { .. } => {
                self.counts.zeroes += 1;
                self.shadow[range].fill(0);
                Mem::None
            }
            IoKind::Discard => {
                self.counts.discards += 1;
                // Whole clusters read as zeros afterwards; other bytes keep their contents.
                let first = io.offset.next_multiple_of(CLUSTER);
                let last = if io.end() == DISK { DISK } else { io.end() - io.end() % CLUSTER };
                if first < last {
                    self.shadow[first as usize..last as usize].fill(0);
                }
                Mem::None
            }
            IoKind::Flush | IoKind::Truncate | IoKind::Status { .. } => {
                self.counts.flushes += 1;
                Mem::None
            }
        };
        self.sent[slot] = Some(Sent { offset: io.offset, len: io.len, reads });
        let node = self.session.node;
        let taken = self.session.engine.submit(node, io, mem, slot as u64);
        assert!(taken.is_ok(), "the engine was made for this depth");
        Ok(())
    }

    /// Waits until something has finished, and looks at all that has.
    fn collect(&mut self) -> Result<(), Fail> {
        let Some(mut finished) = self.session.next()? else { return Ok(()) };
        loop {
            self.look_at(finished)?;
            match self.session.engine.poll() {
                Some(next) => finished = next,
                None => return Ok(()),
            }
        }
    }

    fn look_at(&mut self, finished: Finished) -> Result<(), Fail> {
        let sent = self.sent[finished.tag as usize].take().expect("it was sent");
        let path = self.session.image.path();
        finished.result.map_err(|errno| {
            Fail::at(path, format!("request of {} bytes at {}: {errno}", sent.len, sent.offset))
        })?;
        if let (Mem::Owned(buf), true) = (&finished.mem, sent.reads) {
            let range = sent.offset as usize..(sent.offset + sent.len) as usize;
            self.mismatches += u64::from(buf[..] != self.shadow[range]);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Fail> {
        while self.session.engine.in_flight() > 0 {
            self.collect()?;
        }
        Ok(())
    }

    /// Closes the image and reports.
    fn end(mut self, out: &mut Out) -> Result<Ended, Fail> {
        let stats = self.session.engine.stats().clone();
        let began = self.session.now();
        self.session.drain()?;
        let closing = self.session.now().since(began);
        write_counts(out, &self.counts, self.nanos)?;
        write_times(out, &stats)?;
        write_states(out, &stats)?;
        writeln!(
            out,
            "{} drained and left clean in {}",
            out.paint("1", "close   "),
            duration(closing)
        )?;
        Ok(Ended { shadow: self.shadow, mismatches: self.mismatches })
    }
}

fn write_counts(out: &mut Out, counts: &Counts, nanos: u64) -> Result<(), Fail> {
    let Counts { reads, writes, zeroes, discards, flushes, .. } = *counts;
    let total = reads + writes + zeroes + discards + flushes;
    let seconds = nanos.max(1) as f64 / 1e9;
    writeln!(
        out,
        "{} {total} in {}, {DEPTH} at a time: {reads} reads, {writes} writes, {zeroes} zeroes, \
         {discards} discards, {flushes} flushes",
        out.paint("1", "requests"),
        duration(nanos),
    )?;
    let rate = |bytes: u64| human((bytes as f64 / seconds) as u64);
    writeln!(
        out,
        "{} {:.0} requests/s; read {}/s, written {}/s, at any byte offset",
        out.paint("1", "rate    "),
        total as f64 / seconds,
        rate(counts.read_bytes),
        rate(counts.written_bytes),
    )?;
    Ok(())
}

fn write_times(out: &mut Out, stats: &Stats) -> Result<(), Fail> {
    writeln!(out, "{} {}", out.paint("1", "latency "), quantiles(&stats.latency))?;
    let stall = &stats.run;
    writeln!(out, "{} held for {}", out.paint("1", "the loop"), quantiles(stall))?;
    Ok(())
}

/// The same engine and driver over a simulated disk, for a moment: every order, fault and crash of
/// as many small workloads as fit.
fn simulate(out: &mut Out) -> Result<bool, Fail> {
    let report = explore(&scopes(Format::Qed, 1, 1), 2, Some(1.0));
    let counts = &report.counts;
    writeln!(
        out,
        "{} {} workloads in every order of completions, with faults: {} states, {} crash images, {}",
        out.paint("1", "simulated"),
        counts.runs,
        counts.states,
        counts.crash_images,
        if report.is_good() { "none wrong" } else { "SOME WRONG: see `cowbell sim explore`" },
    )?;
    Ok(report.is_good())
}

/// Checks the closed image, and reads all of it without the engine.
fn look_again(overlay: &Path, ended: &Ended, out: &mut Out) -> Result<bool, Fail> {
    let host = DiskHost::default();
    let open = |why| Fail::open(overlay, why);
    let file = host.open(overlay, false).map_err(|error| Fail::open_io(overlay, &error))?;
    let report = check(&file, Repair::None).map_err(open)?;
    writeln!(
        out,
        "{} {} errors, {} leaked clusters; {} of {} clusters allocated, {:.0} % fragmented",
        out.paint("1", "check   "),
        report.corruptions + report.check_errors,
        report.leaks,
        report.allocated_clusters,
        report.total_clusters,
        report.fragmented_clusters as f64 * 100.0 / report.allocated_clusters.max(1) as f64,
    )?;
    let options =
        OpenOptions { format: Some(Format::Qed), backing: Policy::Any, ..OpenOptions::default() };
    let chain = cowbell_formats::open(&host, overlay, &options).map_err(open)?;
    let mut bytes = vec![0; DISK as usize];
    map::read(&chain, 0, &mut bytes).map_err(open)?;
    let same = bytes == ended.shadow;
    writeln!(
        out,
        "{} {} reads went wrong; the whole disk, read from the files: {}",
        out.paint("1", "verified"),
        ended.mismatches,
        if same { "identical" } else { "DIFFERENT" },
    )?;
    Ok(same && report.is_clean())
}
