//! An image on an engine, and the loop around it.
//!
//! The loop is the one that every embedder has, with nothing in it but the engine's descriptor:
//! `run`, take what has finished, and when nothing has, wait.

use std::io;
use std::path::{Path, PathBuf};

use cowbell_engine::backend::Backend;
use cowbell_engine::event_loop::EventLoop;
use cowbell_engine::units::{Errno, NodeId, Time};
use cowbell_engine::{Engine, Finished, Limits, Progress};
use cowbell_formats::qed::Growth;
use cowbell_formats::{
    DiskHost, Error, Format, Host, Locks, Node, OpenOptions, Policy, RunOptions, attach,
};

use crate::cache::{Cache, How};
use crate::disk::Disk;
use crate::fail::Fail;
use crate::locking;

/// How to open an image and run it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Its format; `None` to probe.
    pub format: Option<Format>,
    /// For writing.
    pub write: bool,
    /// Read although others may write.
    pub force_share: bool,
    /// The cache mode.
    pub cache: Cache,
    /// Who does the I/O; `None`: threads, as QEMU does.
    pub how: Option<How>,
    /// Native AIO that never blocks.
    pub strict: bool,
    /// The most requests at a time.
    pub depth: usize,
    /// How QED files grow.
    pub growth: Option<Growth>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            format: None,
            write: false,
            force_share: false,
            cache: Cache::WRITEBACK,
            how: None,
            strict: false,
            depth: 64,
            growth: None,
        }
    }
}

/// An image on an engine.
#[derive(Debug)]
pub struct Session {
    /// The engine.
    pub engine: Engine<Node, Disk>,
    /// The image.
    pub node: NodeId,
    /// The image's file.
    pub path: PathBuf,
    /// What it waits on.
    pub events: EventLoop,
    /// The locks of its files; they outlive the engine if this does.
    pub locks: Locks,
}

impl Session {
    /// Opens `path` and the files it is backed by.
    pub fn open(path: &Path, setup: &Setup) -> Result<Session, Fail> {
        if setup.how == Some(How::Native) && !setup.cache.direct {
            let why = "aio=native was specified, but it requires cache.direct=on, which was not \
                       specified.";
            return Err(Fail::open(path, Error::Invalid(why.into())));
        }
        let options = OpenOptions {
            format: setup.format,
            write: setup.write,
            backing: Policy::Any,
            locking: locking::chosen(),
            force_share: setup.force_share,
            ..OpenOptions::default()
        };
        let host = DiskHost { direct: setup.cache.direct };
        let chain =
            cowbell_formats::open(&host, path, &options).map_err(|why| Fail::open(path, why))?;
        let probed =
            chain.layers.first().is_some_and(|top| top.probed && top.format == Format::Raw);
        if setup.write && probed {
            warn_of_probing(path);
        }
        if setup.write {
            locking::warn(&chain.unlockable());
        }
        let depth = setup.depth.max(1);
        let limits = Limits { requests: depth, ops: (depth * 4).max(1024), ..Limits::default() };
        let opened = |error: io::Error| Fail::open_io(path, &error);
        let how = setup.how.unwrap_or(How::Threads);
        let backend = Disk::new(how, depth * 2, setup.strict).map_err(opened)?;
        let mut engine = Engine::new(backend, limits);
        let mut run = RunOptions::default();
        if let Some(growth) = setup.growth {
            run.qed.growth = growth;
            run.vmdk.growth = growth;
        }
        run.vmdk.entropy = host.entropy();
        let locks = chain.locks().map_err(opened)?;
        let node = attach(&mut engine, chain, &run).map_err(opened)?;
        let events = EventLoop::new(engine.fd()).map_err(opened)?;
        Ok(Session { engine, node, path: path.into(), events, locks })
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        use cowbell_engine::step::Driver;
        self.engine.node(self.node).size()
    }

    /// The time now.
    #[inline]
    pub fn now(&self) -> Time {
        self.engine.backend().clock()
    }

    /// One turn: collect, step, submit.
    #[inline]
    pub fn run(&mut self) -> Progress {
        let now = self.now();
        self.engine.run(now)
    }

    /// Waits until there is something to collect, a deadline or `until` has come, or a signal.
    pub fn wait(&mut self, until: Option<Time>) -> Result<(), Fail> {
        let due = self.engine.next_deadline();
        let until = until.into_iter().chain(due).min();
        let waited = self.events.wait(until, self.now());
        waited.map(|_| ()).map_err(|error| {
            Fail::at(&self.path, format!("waiting for completions: {}", Errno::from_io(&error)))
        })
    }

    /// The next request to finish; `None` when none is in flight.
    pub fn next(&mut self) -> Result<Option<Finished>, Fail> {
        let mut again = true;
        loop {
            if let Some(finished) = self.engine.poll() {
                return Ok(Some(finished));
            }
            if self.engine.in_flight() == 0 {
                return Ok(None);
            }
            if !again {
                self.wait(None)?;
            }
            again = self.run().again;
        }
    }

    /// Ends what is in flight and leaves the image clean.
    pub fn drain(&mut self) -> Result<(), Fail> {
        self.engine.drain();
        loop {
            let progress = self.run();
            while self.engine.poll().is_some() {}
            match self.engine.drained() {
                Some(Ok(())) => return Ok(()),
                Some(Err(errno)) => return Err(Fail::at(&self.path, format!("closing: {errno}"))),
                None if !progress.again => self.wait(None)?,
                None => {}
            }
        }
    }
}

/// A probed raw image stays raw: QEMU's warning.
fn warn_of_probing(path: &Path) {
    let name = cowbell_formats::error::Shown(path);
    eprint_quietly(&format!(
        "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on \
         block 0 will be restricted.\n         \
         Specify the 'raw' format explicitly to remove the restrictions.\n"
    ));
}

/// Standard error may be closed; that is no reason to fail.
pub fn eprint_quietly(text: &str) {
    let _ = io::Write::write_all(&mut io::stderr(), text.as_bytes());
}
