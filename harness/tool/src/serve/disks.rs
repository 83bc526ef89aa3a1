//! The disks that are served: one engine with all of them, whatever the front ends are.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;

use cowbell_engine::backend::Backend;
use cowbell_engine::mem::Mem;
use cowbell_engine::record::Recorder;
use cowbell_engine::step::{Driver, Io, IoKind};
use cowbell_engine::units::{NodeId, Time};
use cowbell_engine::{Engine, Finished, Limits, NodeLimits};
use cowbell_formats::name::is_remote;
use cowbell_formats::{Chain, Format, LayerMeta, Locks, Node, RunOptions, attach};

use crate::cache::{Cache, How};
use crate::disk::{AnyFile, Disk, address, has_remote};
use crate::fail::Fail;
use crate::naming::Naming;
use crate::record::Head;
use crate::serve::flight::Flight;
use crate::serve::limit::Limits as Limited;
use crate::serve::memory::Pool;
use crate::session::open_chain;

/// Requests of all clients at a time; one more waits for one of them.
const REQUESTS: usize = 512;

/// So many of them disks with a limit may have together: what waits for its time there takes
/// nobody's place.
const LIMITED: usize = REQUESTS / 2;

/// How disks are opened.
#[derive(Debug)]
pub struct Opening<'a> {
    pub naming: &'a Naming,
    pub format: Option<&'a str>,
    pub read_only: bool,
    /// What is written goes to a temporary image.
    pub snapshot: bool,
    pub cache: Cache,
    pub how: How,
    /// Where all that is asked and seen is recorded.
    pub record: Option<&'a Path>,
    /// Where the last that was done is drawn, and how many bytes of a record are kept for that.
    pub flight: Option<(&'a Path, u64)>,
    /// How much each may do.
    pub limits: &'a Limited,
}

/// One disk.
#[derive(Debug)]
pub struct Served {
    /// What clients call it.
    pub name: String,
    /// As it was named.
    pub path: OsString,
    /// Of its layers, the top one first.
    pub formats: Vec<Format>,
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    /// It marks whole clusters as zeros, whatever there is: that takes no longer for more of them.
    pub marks_zeros: bool,
    node: NodeId,
    /// Requests submitted and not ended, and how many that may be.
    in_flight: usize,
    places: usize,
    #[expect(dead_code, reason = "held until the image is closed")]
    locks: Locks,
    #[expect(dead_code, reason = "it is only held open")]
    temporary: Option<fs::File>,
}

/// See the module.
#[derive(Debug)]
pub struct Disks {
    /// The engine.
    pub engine: Engine<Node, Recorder<Disk>>,
    /// The disks, in the order in which they were named.
    pub served: Vec<Served>,
    /// The memory of requests.
    pub memory: Pool,
    cache: Cache,
    /// Requests submitted and not polled.
    in_flight: usize,
    /// Behind the engine: it wants the last that this has recorded.
    flight: Option<Flight>,
}

impl Disks {
    /// Opens `images`, each `PATH` or `NAME=PATH`.
    pub fn open(images: &[OsString], opening: &Opening<'_>) -> Result<Disks, Fail> {
        let limits = Limits { requests: REQUESTS, ops: REQUESTS * 4, ..Limits::default() };
        let cache = opening.cache;
        let mut head = Head::new(&limits, None, cache.direct);
        let mut opened = Vec::<Opened>::new();
        for given in images {
            opened.push(Opened::open(given, opening, &opened, &mut head)?);
        }
        // Servers' disks want a backend of their own: only now it is known whether there are any.
        let has_remote = opened.iter().any(|disk| has_remote(&disk.chain));
        let backend = Disk::new(opening.how, REQUESTS * 2, false, has_remote)?;
        let engine = Engine::new(Recorder::new(backend), limits);
        let mut disks = Disks {
            engine,
            served: Vec::new(),
            memory: Pool::default(),
            cache,
            in_flight: 0,
            flight: None,
        };
        for disk in opened {
            disks.add(disk, opening)?;
        }
        let recorder = disks.engine.backend_mut();
        if let Some(path) = opening.record {
            head.told().begin(path, recorder)?;
        } else if let Some((path, kept)) = opening.flight {
            disks.flight = Some(Flight::begin(path, kept, head.told(), recorder)?);
        }
        disks.limit(opening.limits)?;
        Ok(disks)
    }

    fn add(&mut self, disk: Opened, opening: &Opening<'_>) -> Result<(), Fail> {
        let Opened { name, path, chain, temporary } = disk;
        let at = |error| Fail::open_io(Path::new(&path), &error);
        let formats = chain.layers.iter().map(|layer| layer.format).collect();
        let marks_zeros = match &chain.layers[0].meta {
            LayerMeta::Qed(_) => true,
            LayerMeta::Qcow2(image) => image.header.version >= 3 && chain.layers[0].more.is_empty(),
            _ => false,
        };
        let locks = chain.locks().map_err(at)?;
        let node = attach(&mut self.engine, chain, &RunOptions::default()).map_err(at)?;
        self.served.push(Served {
            name,
            formats,
            size: self.engine.node(node).size(),
            read_only: opening.read_only,
            marks_zeros,
            node,
            in_flight: 0,
            places: REQUESTS,
            locks,
            temporary,
            path,
        });
        Ok(())
    }

    /// From now on each does only as much as it may.
    fn limit(&mut self, limits: &Limited) -> Result<(), Fail> {
        limits.check(self.served.iter().map(|disk| &*disk.name))?;
        let rates = self.served.iter().map(|disk| limits.of(&disk.name));
        let rates = rates.collect::<Result<Vec<_>, Fail>>()?;
        let count = rates.iter().flatten().count();
        for (disk, rate) in self.served.iter_mut().zip(rates) {
            if rate.is_some() {
                self.engine.set_rate(disk.node, rate);
                disk.places = (LIMITED / count).max(1);
            }
        }
        Ok(())
    }

    /// No disk has a limit any more: the end does not wait for one.
    pub fn lift_limits(&mut self) {
        for disk in self.served.iter_mut().filter(|disk| disk.places < REQUESTS) {
            self.engine.set_rate(disk.node, None);
            disk.places = REQUESTS;
        }
    }

    /// Is there room for one more request of the disk of this number?
    pub fn has_room(&self, disk: usize) -> bool {
        let disk = &self.served[disk];
        disk.in_flight < disk.places && self.in_flight + self.engine.abandoned() < REQUESTS
    }

    /// What the disk of this number takes, and takes best.
    pub fn limits(&self, disk: usize) -> NodeLimits {
        self.engine.limits(self.served[disk].node).expect("it is there until the end")
    }

    /// Gives up requests of the disk of this number, and answers the tags of those that will not come
    /// from [`poll`](Disks::poll): see [`Engine::abandon`].
    pub fn abandon(&mut self, disk: usize, which: impl FnMut(u64) -> bool) -> Vec<u64> {
        let tags = self.engine.abandon(self.served[disk].node, which);
        self.in_flight -= tags.len();
        self.served[disk].in_flight -= tags.len();
        tags
    }

    /// Submits a request for the disk of this number. There is [room](Disks::has_room). Flushes do
    /// what the cache mode says of them, and so do writes.
    pub fn submit(&mut self, disk: usize, io: Io, mem: impl Into<Mem>, tag: u64) {
        let io = match io.kind {
            // Nothing to do: as a request that ends well at once.
            IoKind::Flush if self.cache.no_flush => Io::read(0, 0),
            _ if self.cache.fua => io.stable(),
            _ => io,
        };
        let taken = self.engine.submit(self.served[disk].node, io, mem, tag);
        assert!(taken.is_ok(), "there is room, and nobody has closed it: {:?}", taken.err());
        self.in_flight += 1;
        self.served[disk].in_flight += 1;
    }

    /// The next request that has finished. Whoever knows of which disk it is says so to
    /// [`ended`](Disks::ended).
    pub fn poll(&mut self) -> Option<Finished> {
        let finished = self.engine.poll()?;
        if let (Err(errno), Some(flight)) = (finished.result, &mut self.flight) {
            flight.failed(&format!("a request has failed: {errno}"), self.engine.backend_mut());
        }
        Some(finished)
    }

    /// The last that was done is drawn, if it is kept. `why`: what has happened.
    pub fn draw(&mut self, why: &str) {
        if let Some(flight) = &mut self.flight {
            flight.draw(why, self.engine.backend_mut());
        }
    }

    /// A request of the disk of this number was polled: there is room for another one.
    pub fn ended(&mut self, disk: usize) {
        self.in_flight -= 1;
        self.served[disk].in_flight -= 1;
    }

    /// Is what is read kept in the page cache?
    pub fn are_cached(&self) -> bool {
        !self.cache.direct
    }

    /// The time now.
    pub fn now(&self) -> Time {
        self.engine.backend().clock()
    }
}

/// A disk that is open, and that no engine has yet.
struct Opened {
    name: String,
    path: OsString,
    chain: Chain<AnyFile>,
    temporary: Option<fs::File>,
}

impl Opened {
    /// Beside `others`.
    fn open(
        given: &OsStr,
        opening: &Opening<'_>,
        others: &[Opened],
        head: &mut Head,
    ) -> Result<Opened, Fail> {
        // Options have a `=` of their own.
        let is_by_options = opening.naming.is_by_options();
        let (name, path) = if is_by_options { (None, given) } else { named(given) };
        let mut image = opening.naming.image(path, opening.format)?;
        let name = match name {
            Some(name) => name.to_string(),
            // A server's disk has a name already.
            None if is_remote(image.path()) => address(image.path())?.export,
            None => image.path().file_name().unwrap_or(path).to_string_lossy().into_owned(),
        };
        if name.len() > cowbell_nbd::wire::STRING_MAX {
            return Err(Fail::other("a disk's name is too long"));
        }
        if others.iter().any(|other| other.name == name) {
            return Err(Fail::other(format!("two disks are called '{name}': say NAME=PATH")));
        }
        let mut temporary = None;
        if opening.snapshot && !opening.read_only {
            let (overlay, file) = image.overlay()?;
            (image, temporary) = (overlay, Some(file));
        }
        let write = !opening.read_only;
        if write {
            image.check_writable()?;
        }
        if opening.record.is_some() || opening.flight.is_some() {
            head.disk(&image, write)?;
        }
        let chain = open_chain(&image, write, opening.cache.direct)?;
        Ok(Opened { name, path: path.into(), chain, temporary })
    }
}

/// `NAME=PATH`, or a path. What is there under the whole of it is a path.
fn named(given: &OsStr) -> (Option<&str>, &OsStr) {
    let split = given.to_str().and_then(|text| text.split_once('='));
    match split {
        Some((name, path))
            if !name.contains(['/', ':', ',', '{']) && !Path::new(given).exists() =>
        {
            (Some(name), path.as_ref())
        }
        _ => (None, given),
    }
}
