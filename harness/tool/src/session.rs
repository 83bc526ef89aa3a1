//! An image on an engine, and the loop around it.
//!
//! The loop is the one that every embedder has, with nothing in it but the engine's descriptor:
//! `run`, take what has finished, and when nothing has, wait.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use cowbell_engine::backend::Backend;
use cowbell_engine::event_loop::EventLoop;
use cowbell_engine::record::Recorder;
use cowbell_engine::units::{Errno, NodeId, Time};
use cowbell_engine::{Engine, Finished, Limits, Progress};
use cowbell_formats::parts::growth::Growth;
use cowbell_formats::preallocation::Before;
use cowbell_formats::{Chain, Error, Format, Locks, Node, RunOptions, attach};

use crate::cache::{Cache, How};
use crate::disk::{AnyFile, Disk, Files, has_remote};
use crate::fail::Fail;
use crate::locking;
use crate::naming::Image;
use crate::record::Head;
use crate::slowest::Kept;

/// How to open an image and run it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// For writing.
    pub write: bool,
    /// The cache mode.
    pub cache: Cache,
    /// Who does the I/O; `None`: threads, as QEMU does.
    pub how: Option<How>,
    /// Native AIO that never blocks.
    pub may_block: bool,
    /// How long one turn of the engine may hold the loop, about.
    pub turn: Duration,
    /// The most requests at a time.
    pub depth: usize,
    /// How QED files grow.
    pub growth: Option<Growth>,
    /// Where all that the engine is asked and sees is recorded, of an image that [`Session::open`] opens.
    pub record: Option<PathBuf>,
    /// The same, kept in memory.
    pub kept: Option<Kept>,
    /// Disks of servers will be attached to its engine besides.
    pub has_remote: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            write: false,
            cache: Cache::WRITEBACK,
            how: None,
            may_block: false,
            turn: Limits::default().turn,
            depth: 64,
            growth: None,
            record: None,
            kept: None,
            has_remote: false,
        }
    }
}

/// What an engine may have for an image that is opened so.
pub fn limits_of(setup: &Setup) -> Limits {
    let requests = setup.depth.max(1);
    let (ops, turn) = ((requests * 4).max(1024), setup.turn);
    Limits { requests, ops, turn, ..Limits::default() }
}

/// How a format runs, with files that grow so.
pub fn run_options(growth: Option<Growth>) -> RunOptions {
    let mut run = RunOptions::default();
    if let Some(growth) = growth {
        run.qed.growth = growth;
        run.vmdk.growth = growth;
    }
    run
}

/// An image on an engine.
#[derive(Debug)]
pub struct Session {
    /// The engine.
    pub engine: Engine<Node, Recorder<Disk>>,
    /// The image.
    pub node: NodeId,
    /// What it is called.
    pub image: Image,
    /// What it waits on.
    pub events: EventLoop,
    /// The file of a temporary image, which has no name.
    #[expect(dead_code, reason = "it is only held open")]
    pub temporary: Option<fs::File>,
    /// What it was when it was opened for writing.
    pub before: Option<Before>,
    /// The locks of its files; they outlive the engine if this does.
    pub locks: Locks,
}

impl Session {
    /// Opens `image` and the files it is backed by.
    pub fn open(image: &Image, setup: &Setup) -> Result<Session, Fail> {
        if setup.how == Some(How::Native) && !setup.cache.direct {
            let why = "aio=native was specified, but it requires cache.direct=on, which was not \
                       specified.";
            return Err(image.failed(Error::Invalid(why.into())));
        }
        let is_recorded = setup.record.is_some() || setup.kept.is_some();
        let head = is_recorded.then(|| {
            // Before anything is repaired.
            let mut head = Head::new(&limits_of(setup), setup.growth, setup.cache.direct);
            head.disk(image, setup.write).map(|()| head.told())
        });
        let head = head.transpose()?;
        let chain = open_chain(image, setup.write, setup.cache.direct)?;
        let mut session = Session::over(image, chain, setup)?;
        if let Some(told) = head {
            match (&setup.record, &setup.kept) {
                (Some(path), _) => told.begin(path, session.engine.backend_mut())?,
                (None, Some(kept)) => told.keep(kept, session.engine.backend_mut()),
                (None, None) => {}
            }
        }
        Ok(session)
    }

    /// Runs `image`, which is open.
    pub fn over(image: &Image, chain: Chain<AnyFile>, setup: &Setup) -> Result<Session, Fail> {
        let limits = limits_of(setup);
        let opened = |error: io::Error| Fail::open_io(image.path(), &error);
        let how = setup.how.unwrap_or(How::Threads);
        let has_remote = setup.has_remote || has_remote(&chain);
        let backend =
            Disk::new(how, limits.requests * 2, setup.may_block, has_remote).map_err(opened)?;
        let mut engine = Engine::new(Recorder::new(backend), limits);
        let top = chain.layers.first().filter(|_| setup.write);
        let before = top.map(Before::of).transpose().map_err(|why| image.failed(why))?;
        let locks = chain.locks().map_err(opened)?;
        let node = attach(&mut engine, chain, &run_options(setup.growth)).map_err(opened)?;
        let events = EventLoop::new(engine.fd()).map_err(opened)?;
        Ok(Session { engine, node, image: image.clone(), events, temporary: None, before, locks })
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
            Fail::at(
                &self.image.given,
                format!("waiting for completions: {}", Errno::from_io(&error)),
            )
        })
    }

    /// The next request to finish; `None` when none is in flight.
    pub fn next(&mut self) -> Result<Option<Finished>, Fail> {
        self.next_unless(|| false)
    }

    /// The same; `None` also when somebody asks to stop.
    pub fn next_unless(&mut self, is_asked: impl Fn() -> bool) -> Result<Option<Finished>, Fail> {
        let mut again = true;
        loop {
            if let Some(finished) = self.engine.poll() {
                return Ok(Some(finished));
            }
            if self.engine.in_flight() == 0 || is_asked() {
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
                Some(Err(errno)) => {
                    return Err(Fail::at(&self.image.given, format!("closing: {errno}")));
                }
                None if !progress.again => self.wait(None)?,
                None => {}
            }
        }
    }
}

/// Opens `image` and the files it is backed by, and warns of what is wrong with writing it.
pub fn open_chain(image: &Image, write: bool, direct: bool) -> Result<Chain<AnyFile>, Fail> {
    let chain = image.open(&Files { direct }, write)?;
    let probed = chain.layers.first().is_some_and(|top| top.probed && top.format == Format::Raw);
    if write && probed {
        warn_of_probing(image);
    }
    if write {
        locking::warn(&chain.unlockable());
    }
    Ok(chain)
}

/// A probed raw image stays raw: QEMU's warning.
fn warn_of_probing(image: &Image) {
    let name = cowbell_formats::error::Shown(image.path());
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
