//! What is being tested: some format's images, and how to make, run, look at and repair them.

use std::fmt::Debug;
use std::hash::Hash;
use std::ops::Range;
use std::time::Duration;

use cowbell_engine::step::Driver;
use cowbell_engine::units::NodeId;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::map::{Extent, Kind};

use crate::backend::{Damaged, Device, IsMetadata, SimBackend};
use crate::disk::Contents;
use crate::host::SimHost;

/// An engine on a simulated device.
pub type SimEngine<D> = Engine<D, SimBackend>;

/// A kind of image, with all its options.
pub trait Subject: Clone + Debug {
    /// What runs it.
    type Driver: Driver + Clone + Hash;

    /// What it is, in a few words: `a qcow2 image`.
    fn name(&self) -> String {
        "an image".into()
    }

    /// Its options in one line, as traces have them.
    fn text(&self) -> String;

    /// The same for people, if it is too much for them.
    fn about(&self) -> String {
        self.text()
    }

    /// What a trace may make of the disk's size in bytes, at most. Files are simulated in memory.
    fn size_max(&self) -> u64 {
        1 << 26
    }

    /// The same with one option less: what [`shrink`](crate::shrink) tries.
    fn plainer(&self) -> Vec<Self> {
        Vec::new()
    }

    /// The device that it lies on. By default one of 512-byte blocks, where files grow.
    fn device(&self) -> Device {
        Device::default()
    }

    /// The limits of the engine that runs it: small, so that rare paths are common. Room for requests is
    /// added. By default 32 ops and two buffers of 4096 bytes, and one that the engine keeps for unaligned requests.
    fn limits(&self) -> Limits {
        Limits {
            requests: 1,
            ops: 32,
            buffers: 2,
            bounce_buffers: 1,
            buffer_size: 4096,
            zeros_written: 0,
            discards_kept: 2,
            steps: 4096,
            turn: Duration::from_micros(500),
            measure: false,
        }
    }

    /// Makes its files.
    fn make(&self, host: &SimHost) -> Result<(), String>;

    /// Its files' names, in the order in which [`Subject::open`] attaches them.
    fn files(&self) -> Vec<&'static str>;

    /// How many of its files, from the first on, nobody ever writes.
    fn still_files(&self) -> usize {
        0
    }

    /// Clusters in the last of its files, which holds `file`, that nobody uses; `None` if nobody
    /// knows, or the file grows by more than is asked for.
    fn holes(&self, _file: &Contents) -> Option<u64> {
        None
    }

    /// Are these files no image because somebody has begun to write it and has not closed it? A format
    /// whose images are whole only when they are closed says so; what a crash leaves of it need not open.
    fn is_unfinished(&self, _files: &[Contents]) -> bool {
        false
    }

    /// May a write find no room although nothing is wrong?
    fn may_be_full(&self) -> bool {
        false
    }

    /// Opens it for writing in `engine`.
    fn open(&self, host: &SimHost, engine: &mut SimEngine<Self::Driver>) -> Result<NodeId, String>;

    /// The disk's size in bytes.
    fn size(&self) -> u64;

    /// A crash may leave the disk longer, up to a multiple of this: while the block that its end
    /// lies in is written whole.
    fn size_unit(&self) -> u64 {
        1
    }

    /// Bytes in a cluster: what copy-on-write copies. By default 512.
    fn cluster(&self) -> u64 {
        512
    }

    /// What a discard discards whole.
    fn discard_unit(&self) -> u64 {
        self.cluster()
    }

    /// May a crash leave leaks only in an image that is marked as needing a check?
    fn marks_leaks(&self) -> bool {
        false
    }

    /// May a crash leave corruption in an image that is marked as needing a check, for recovery to
    /// mend?
    fn mark_covers_corruption(&self) -> bool {
        false
    }

    /// Is a write done before the tables on disk say so?
    fn writes_back(&self) -> bool {
        false
    }

    /// Another disk that the engine has, to be used meanwhile.
    fn beside(&self) -> Option<Self> {
        None
    }

    /// What of it is copied, where a copy is not of all of it.
    fn copied(&self) -> Option<Copied<'_>> {
        None
    }

    /// Is what is below it, in its first file, bytes of the disk and nothing else?
    fn has_raw_below(&self) -> bool {
        false
    }

    /// Does it read from the same node that this one reads from?
    fn shares(&self) -> bool {
        false
    }

    /// Opens it as the disk beside `main`, on the node that this reads from if it has a backing file.
    fn open_beside(
        &self,
        host: &SimHost,
        engine: &mut SimEngine<Self::Driver>,
        main: NodeId,
    ) -> Result<NodeId, String> {
        let _ = main;
        self.open(host, engine)
    }

    /// See [`SimBackend::watch_metadata`].
    fn metadata(&self) -> Option<IsMetadata> {
        None
    }

    /// These sectors of headers and tables were damaged: may the disk be wrong, and nobody notice?
    fn may_go_unnoticed(&self, _damaged: &[Damaged]) -> bool {
        false
    }

    /// Reads from the disk in the files of `host`, without the engine. By default from where [`Subject::map`]
    /// says that its bytes are, of which none may be compressed.
    fn read(&self, host: &SimHost, offset: u64, bytes: &mut [u8]) -> Result<(), String> {
        bytes.fill(0);
        let (files, end) = (self.files(), offset + bytes.len() as u64);
        for extent in self.map(host)? {
            let (from, to) = (extent.start.max(offset), (extent.start + extent.len).min(end));
            let Kind::Data(place) = extent.kind else { continue };
            if from < to {
                let name = files[files.len() - 1 - extent.depth];
                let contents = host.contents(name).ok_or("a file is missing")?;
                let part = &mut bytes[(from - offset) as usize..(to - offset) as usize];
                contents.read(place.0 + from - extent.start, part);
            }
        }
        Ok(())
    }

    /// Opens the files read-only and checks them. What this says must follow from what it reads of `host`.
    fn check(&self, host: &SimHost) -> Result<Checked, String>;

    /// Opens the files read-only, and says where the guest's bytes are: from the disk's first byte to its last,
    /// with [`Extent::depth`] 0 for the last of [`Subject::files`], 1 for the one before it.
    fn map(&self, host: &SimHost) -> Result<Vec<Extent>, String>;

    /// Opens the files for writing, with whatever repair that brings.
    fn recover(&self, host: &SimHost) -> Result<(), String> {
        let _ = host;
        Ok(())
    }

    /// Repairs the image explicitly.
    fn repair(&self, host: &SimHost) -> Result<(), String> {
        let _ = host;
        Ok(())
    }

    /// What a check finds wrong, a line each, for people; not more than a few.
    fn complaints(&self, _host: &SimHost) -> Vec<String> {
        Vec::new()
    }

    /// Panics if the driver holds on to anything. Nothing is in flight.
    fn assert_idle(&self, _driver: &Self::Driver) {}
}

/// What of a disk is copied, and how.
#[derive(Clone, Copy, Debug)]
pub struct Copied<'s> {
    /// These parts, up the disk: of it, and of the one beside. They are what is looked at.
    pub parts: &'s [Range<u64>],
    /// Bytes in a unit: see [`Copy::unit`](cowbell_engine::Copy::unit).
    pub unit: usize,
    /// Bytes in a piece.
    pub piece: usize,
    /// Pieces in flight at once.
    pub in_flight: usize,
}

/// What a check says of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Is it marked as needing a check?
    pub marked: bool,
    /// What is wrong with its tables.
    pub corruptions: u64,
    /// Clusters that nothing refers to.
    pub leaks: u64,
    /// It has a content id, which is that of the image as it was made: nobody is told of a change.
    pub untold: bool,
}
