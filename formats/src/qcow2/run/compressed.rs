//! Reads of compressed clusters: through a small cache of inflated ones.
//!
//! A slot of the cache holds a cluster as it is on disk and, behind it, as the guest sees it. The
//! first request that wants it loads and inflates it, as ops; others wait for that. A slot is named
//! by the host offset of the compressed bytes, which stay as they are as long as an entry leads to
//! them; when an entry gives them up, the cache forgets them.

use cowbell_engine::op::{Compute, Op, Segs};
use cowbell_engine::step::{Cx, Event};
use cowbell_engine::tables::TableCache;
use cowbell_engine::units::{Errno, HostOffset};

use crate::qcow2::disk::codec::inflate;
use crate::qcow2::disk::header::Compression;
use crate::qcow2::disk::layout::Compressed;
use crate::qcow2::run::image::{Image, compressed_max, inflated_slot_bytes};
use crate::qcow2::run::piece::Progress;

/// What a read of a compressed cluster awaits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CompressedState {
    /// The `bytes` of the cluster, on their way into `slot`.
    Read {
        /// Of the cache.
        slot: u32,
        /// As many as it takes.
        bytes: u32,
    },
    /// The cluster in `slot`, inflated.
    Inflate {
        /// Of the cache.
        slot: u32,
    },
}

const ZLIB: Compute = Compute {
    name: "inflate-zlib",
    run: |input, output| inflate(Compression::Zlib, input, output).map_err(|_| Errno::IO),
};
const ZSTD: Compute = Compute {
    name: "inflate-zstd",
    run: |input, output| inflate(Compression::Zstd, input, output).map_err(|_| Errno::IO),
};

/// Clusters that were inflated, and are kept.
#[derive(Clone, Hash, Debug)]
pub(super) struct Inflated {
    image: Image,
    cache: TableCache,
    codec: Compute,
}

impl Inflated {
    /// Of `clusters` clusters.
    pub fn new(compression: Compression, clusters: usize, image: Image) -> Inflated {
        let slot = inflated_slot_bytes(image.geometry);
        let codec = match compression {
            Compression::Zlib => ZLIB,
            Compression::Zstd => ZSTD,
        };
        Inflated { image, cache: TableCache::new(image.regions.inflated, slot, clusters), codec }
    }

    pub fn assert_idle(&self) {
        self.cache.assert_idle(|_| 0);
    }

    /// Reads at `at` from a compressed cluster, as far as that and the request reach.
    pub fn read(
        &mut self,
        at: u64,
        place: Compressed,
        cx: &mut Cx<'_>,
    ) -> Progress<CompressedState> {
        if let Some(slot) = self.cache.find(place.host.0) {
            if self.cache.is_ready(slot) {
                return self.copy(at, slot, cx);
            }
            cx.park(self.cache.waiters(slot));
            return Progress::LookAgain { at };
        }
        let Some(slot) = self.cache.reserve(place.host.0) else {
            cx.park(&mut self.cache.full);
            return Progress::LookAgain { at };
        };
        // A cluster that grew when it was compressed is none: what it would need is not looked at.
        let bytes = u64::from(place.bytes).min(compressed_max(self.image.geometry)) as u32;
        let seg = self.cache.seg(slot, 0, bytes as usize);
        cx.issue(self.image.read_op(place.host.0, Segs::one(seg)));
        Progress::Wait(CompressedState::Read { slot: slot as u32, bytes })
    }

    pub fn step(
        &mut self,
        at: u64,
        state: CompressedState,
        event: Event,
        cx: &mut Cx<'_>,
    ) -> Progress<CompressedState> {
        match (state, event) {
            (CompressedState::Read { slot, bytes }, Event::Io(Ok(()))) => {
                self.inflate(slot as usize, bytes, cx)
            }
            (CompressedState::Read { slot, .. }, Event::Io(result))
            | (CompressedState::Inflate { slot }, Event::Io(result)) => {
                self.inflated(at, slot as usize, result, cx)
            }
            (state, event) => panic!("{event:?} in {state:?}"),
        }
    }

    fn inflate(&self, slot: usize, bytes: u32, cx: &mut Cx<'_>) -> Progress<CompressedState> {
        let size = self.image.geometry.cluster_size() as usize;
        let input = self.cache.seg(slot, 0, bytes as usize);
        let behind = inflated_slot_bytes(self.image.geometry) - size;
        cx.issue(Op::compute(self.codec, input, self.cache.seg(slot, behind, size)));
        Progress::Wait(CompressedState::Inflate { slot: slot as u32 })
    }

    fn inflated(
        &mut self,
        at: u64,
        slot: usize,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Progress<CompressedState> {
        self.cache.load_ended(slot, result.is_ok(), cx);
        match result {
            Ok(()) => self.copy(at, slot, cx),
            Err(errno) => Progress::Failed(errno),
        }
    }

    /// The cluster is there: hands over what is wanted of it.
    fn copy(&self, at: u64, slot: usize, cx: &mut Cx<'_>) -> Progress<CompressedState> {
        let size = self.image.geometry.cluster_size();
        let io = cx.io();
        let inside = at & (size - 1);
        let len = (size - inside).min(io.end() - at);
        let unit = inflated_slot_bytes(self.image.geometry);
        let off = slot * unit + unit - size as usize + inside as usize;
        cx.copy_region_to_guest(at - io.offset, self.image.regions.inflated, off, len as usize);
        Progress::To(at + len)
    }

    /// The compressed bytes at `host` were given up.
    pub fn forget(&mut self, host: HostOffset) {
        if let Some(slot) = self.cache.find(host.0)
            && self.cache.is_ready(slot)
        {
            self.cache.forget(slot);
        }
    }
}
