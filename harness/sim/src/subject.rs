//! What is being tested: some format's images, and how to make, run, look at and repair them.

use std::fmt::Debug;
use std::hash::Hash;

use cowbell_engine::Engine;
use cowbell_engine::step::Driver;
use cowbell_engine::units::NodeId;
use cowbell_formats::map::Extent;

use crate::backend::{Damaged, Device, IsMetadata, SimBackend};
use crate::disk::Contents;
use crate::host::SimHost;

/// An engine on a simulated device.
pub type SimEngine<D> = Engine<D, SimBackend>;

/// A kind of image, with all its options.
pub trait Subject: Clone + Debug {
    /// What runs it.
    type Driver: Driver + Clone + Hash;

    /// Its options in one line, as traces have them.
    fn text(&self) -> String;

    /// The device that it lies on.
    fn device(&self) -> Device;

    /// The limits of the engine that runs it: small, so that rare paths are common.
    fn limits(&self) -> cowbell_engine::Limits;

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

    /// Bytes in a cluster: what copy-on-write copies.
    fn cluster(&self) -> u64;

    /// What a discard discards whole.
    fn discard_unit(&self) -> u64;

    /// May a crash leave leaks only in an image that is marked as needing a check?
    fn marks_leaks(&self) -> bool;

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
    fn metadata(&self) -> Option<IsMetadata>;

    /// These sectors of headers and tables were damaged: may the disk be wrong, and nobody notice?
    fn may_go_unnoticed(&self, _damaged: &[Damaged]) -> bool {
        false
    }

    /// Reads from the disk in the files of `host`, without the engine.
    fn read(&self, host: &SimHost, offset: u64, bytes: &mut [u8]) -> Result<(), String>;

    /// Opens the files read-only and checks them.
    fn check(&self, host: &SimHost) -> Result<Checked, String>;

    /// Opens the files read-only, and says where the guest's bytes are.
    fn map(&self, host: &SimHost) -> Result<Vec<Extent>, String>;

    /// Opens the files for writing, with whatever repair that brings.
    fn recover(&self, host: &SimHost) -> Result<(), String>;

    /// Repairs the image explicitly.
    fn repair(&self, host: &SimHost) -> Result<(), String>;

    /// Panics if the driver holds on to anything. Nothing is in flight.
    fn assert_idle(&self, _driver: &Self::Driver) {}
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
