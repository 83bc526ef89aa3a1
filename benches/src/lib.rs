//! What the benchmarks share: an engine over an image, kept busy at a depth.
//!
//! Benchmarks measure; nothing here asserts a time.

use std::path::Path;

use cowbell_engine::backend::Backend;
use cowbell_engine::mem::{Buf, Mem};
use cowbell_engine::step::Io;
use cowbell_engine::store::Store;
use cowbell_engine::sys::aio::{Aio, AioOptions};
use cowbell_engine::sys::clock;
use cowbell_engine::units::NodeId;
use cowbell_engine::{Engine, Limits};
use cowbell_formats::{
    CreateOptions, DiskHost, Format, Node, OpenOptions, RunOptions, attach, create, open,
};

/// An engine, one disk in it, and a buffer for each request in flight.
#[derive(Debug)]
pub struct Load<B: Backend> {
    /// The engine.
    pub engine: Engine<Node, B>,
    /// The disk.
    pub disk: NodeId,
    spare: Vec<Mem>,
}

impl<B: Backend> Load<B> {
    /// Keeps up to `depth` requests of `bytes` bytes in flight.
    pub fn new(engine: Engine<Node, B>, disk: NodeId, depth: usize, bytes: usize) -> Load<B> {
        let spare = (0..depth).map(|_| Buf::zeroed(bytes).into()).collect();
        Load { engine, disk, spare }
    }

    /// Runs `requests` requests; `io` makes the `n`th. Spins: nothing else waits for this thread.
    pub fn run(&mut self, requests: u64, mut io: impl FnMut(u64) -> Io) {
        let (mut submitted, mut finished) = (0, 0);
        while finished < requests {
            while submitted < requests
                && let Some(mem) = self.spare.pop()
            {
                let taken = self.engine.submit(self.disk, io(submitted), mem, submitted);
                taken.expect("as many buffers as the engine takes requests");
                submitted += 1;
            }
            self.engine.run(clock());
            while let Some(done) = self.engine.poll() {
                done.result.expect("the disk works");
                self.spare.push(done.mem);
                finished += 1;
            }
        }
    }

    /// The same engine with other buffers.
    #[must_use]
    pub fn with_buffers(self, depth: usize, bytes: usize) -> Load<B> {
        Load::new(self.engine, self.disk, depth, bytes)
    }

    /// Leaves the image clean.
    pub fn drain(&mut self) {
        self.engine.drain();
        while self.engine.drained().is_none() {
            self.engine.run(clock());
        }
    }
}

/// A new image of `size` bytes at `path`, opened past the page cache with native AIO.
pub fn image(path: &Path, format: Format, size: u64, depth: usize, bytes: usize) -> Load<Aio> {
    let _ = std::fs::remove_file(path);
    let options = CreateOptions { size: Some(size), ..CreateOptions::default() };
    create(&DiskHost::default(), path, format, &options).expect("the image is made");
    let options = OpenOptions { format: Some(format), write: true, ..OpenOptions::default() };
    let chain = open(&DiskHost { direct: true }, path, &options).expect("the image opens");
    debug_assert!(chain.layers[0].file.is_writable());
    let backend = Aio::new(AioOptions::default()).expect("native AIO");
    let mut engine = Engine::new(backend, Limits::default());
    let disk = attach(&mut engine, chain, &RunOptions::default()).expect("the image attaches");
    Load::new(engine, disk, depth, bytes)
}

/// A walk over all blocks of `size` bytes that looks random and visits each once: the `n`th
/// block's offset. `blocks` is a power of two.
pub fn scattered(n: u64, blocks: u64, bytes: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15 | 1) % blocks * bytes
}
