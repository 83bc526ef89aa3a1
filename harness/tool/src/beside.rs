//! A backup beside a benchmark: what a guest feels of one.

use std::ffi::OsStr;

use cowbell_engine::units::{JobId, NodeId, Time};
use cowbell_engine::{Copy, Moment, NodeEvent, Zeros};
use cowbell_formats::create::{self, CreateOptions};
use cowbell_formats::{Format, PartialFiles, RunOptions, attach};

use crate::cache::Cache;
use crate::disk::Files;
use crate::fail::Fail;
use crate::locking;
use crate::naming::{Image, target};
use crate::session::Session;

/// A copy of the disk as it was when the benchmark began, into a new qcow2 image.
pub struct Backup {
    partial: PartialFiles,
    image: Image,
    job: JobId,
    began: Time,
    /// When it ended.
    ended: Option<Time>,
}

impl Backup {
    /// Begins it.
    pub fn begin(
        session: &mut Session,
        to: &OsStr,
        compressed: bool,
        cache: Cache,
    ) -> Result<Backup, Fail> {
        let path = target(to)?;
        let partial = PartialFiles::new(locking::chosen());
        let host = partial.host(Files { direct: cache.direct });
        let options = CreateOptions {
            size: Some(session.size()),
            locking: locking::chosen(),
            ..CreateOptions::default()
        };
        let mut image = Image::plain(&path, Some(Format::Qcow2));
        image.given = to.into();
        let planned = create::plan(&host, &path, Format::Qcow2, &options);
        planned.and_then(|plan| plan.run(&host)).map_err(|why| image.failed(why))?;
        let chain = image.open(&host, true)?;
        let meta = chain.layers.first().map(|top| &top.meta);
        let unit = meta.and_then(|meta| meta.cluster_size()).unwrap_or(4096) as usize;
        let node = attach(&mut session.engine, chain, &RunOptions::default());
        let node: NodeId = node.map_err(|error| Fail::open_io(&path, &error))?;
        let copy = Copy {
            moment: Moment::Start,
            target_is_zero: true,
            zeros: Zeros::Found,
            compressed,
            unit,
            ..Copy::new(session.node, node)
        };
        let began = session.now();
        let job = session.engine.start(copy);
        let job = job.map_err(|why| Fail::other(format!("the backup cannot begin: {why:?}")))?;
        Ok(Backup { partial, image, job, began, ended: None })
    }

    /// Has it ended?
    pub fn look(&mut self, session: &mut Session) -> Result<bool, Fail> {
        if self.ended.is_some() {
            return Ok(true);
        }
        while let Some(event) = session.engine.poll_event() {
            if let NodeEvent::JobEnded { job, result } = event
                && job == self.job
            {
                let failed =
                    |errno| Fail::at(&self.image.given, format!("the backup failed: {errno}"));
                result.map_err(failed)?;
                self.ended = Some(session.now());
            }
        }
        Ok(self.ended.is_some())
    }

    /// Waits for its end; answers how long it took, in nanoseconds.
    pub fn wait(&mut self, session: &mut Session) -> Result<u64, Fail> {
        loop {
            let again = session.run().again;
            if self.look(session)? {
                return Ok(self.ended.unwrap_or(self.began).since(self.began));
            }
            if !again {
                session.wait(None)?;
            }
        }
    }

    /// The image is drained: it gets its name.
    pub fn keep(self) -> Result<(), Fail> {
        self.partial.keep().map_err(|why| Fail::open_io(&self.image.given, &why))
    }
}
