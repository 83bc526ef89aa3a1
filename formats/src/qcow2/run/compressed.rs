//! Reads of compressed clusters: through a small cache of inflated ones.
//!
//! A slot of the cache holds a cluster as it is on disk and, behind it, as the guest sees it. The
//! first request that wants it loads and inflates it, as ops; others wait for that. A slot is named
//! by the host offset of the compressed bytes, which stay as they are as long as an entry leads to
//! them; when an entry gives them up, the cache forgets them.

use cowbell_engine::op::{Compute, Op, Segs};
use cowbell_engine::step::{Cx, Step};
use cowbell_engine::units::{Errno, HostOffset};

use crate::qcow2::disk::codec::inflate;
use crate::qcow2::disk::header::Compression;
use crate::qcow2::disk::layout::{Compressed, Geometry};
use crate::qcow2::run::{Qcow2, Regions, State};

const ZLIB: Compute = Compute {
    name: "inflate-zlib",
    run: |input, output| inflate(Compression::Zlib, input, output).map_err(|_| Errno::IO),
};
const ZSTD: Compute = Compute {
    name: "inflate-zstd",
    run: |input, output| inflate(Compression::Zstd, input, output).map_err(|_| Errno::IO),
};

/// What inflates a cluster.
pub(super) fn codec(compression: Compression) -> Compute {
    match compression {
        Compression::Zlib => ZLIB,
        Compression::Zstd => ZSTD,
    }
}

/// The most bytes that a compressed cluster takes: less than a cluster, and the rest of the
/// sectors that it begins and ends in.
fn compressed_max(geometry: Geometry) -> u64 {
    geometry.cluster_size() + 512
}

/// Bytes in a slot.
pub(super) fn slot_bytes(geometry: Geometry) -> usize {
    (compressed_max(geometry) + geometry.cluster_size()) as usize
}

impl Qcow2 {
    /// Reads at `at` from a compressed cluster, as far as that and the request reach.
    pub(super) fn read_compressed(
        &mut self,
        at: u64,
        place: Compressed,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if let Some(slot) = self.inflated.find(place.host.0) {
            if self.inflated.is_ready(slot) {
                return self.copy_inflated(at, slot, cx);
            }
            cx.park(self.inflated.waiters(slot));
            return Step::Wait(State::Next { at });
        }
        let Some(slot) = self.inflated.reserve(place.host.0) else {
            cx.park(&mut self.inflated.full);
            return Step::Wait(State::Next { at });
        };
        // A cluster that grew when it was compressed is none: what it would need is not looked at.
        let bytes = u64::from(place.bytes).min(compressed_max(self.geometry)) as u32;
        let seg = self.inflated.seg(slot, 0, bytes as usize);
        cx.issue(self.read_op(place.host.0, Segs::one(seg)));
        Step::Wait(State::ReadCompressed { at, slot: slot as u32, bytes })
    }

    pub(super) fn compressed_read(
        &mut self,
        at: u64,
        (slot, bytes): (usize, u32),
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if result.is_err() {
            return self.cluster_inflated(at, slot, result, cx);
        }
        let size = self.geometry.cluster_size() as usize;
        let input = self.inflated.seg(slot, 0, bytes as usize);
        let output = self.inflated.seg(slot, slot_bytes(self.geometry) - size, size);
        cx.issue(Op::compute(self.codec, input, output));
        Step::Wait(State::Inflate { at, slot: slot as u32 })
    }

    pub(super) fn cluster_inflated(
        &mut self,
        at: u64,
        slot: usize,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        self.inflated.load_ended(slot, result.is_ok(), cx);
        match result {
            Ok(()) => self.copy_inflated(at, slot, cx),
            Err(errno) => Step::Done(Err(errno)),
        }
    }

    /// The cluster is there: hand over what is wanted of it.
    fn copy_inflated(&mut self, at: u64, slot: usize, cx: &mut Cx<'_>) -> Step<State> {
        let size = self.geometry.cluster_size();
        let io = cx.io();
        let inside = at & (size - 1);
        let len = (size - inside).min(io.end() - at);
        let unit = slot_bytes(self.geometry);
        let off = slot * unit + unit - size as usize + inside as usize;
        let Regions { inflated, .. } = self.regions;
        cx.copy_region_to_guest(at - io.offset, inflated, off, len as usize);
        self.walk(at + len, cx)
    }

    /// The compressed bytes at `host` were given up.
    pub(super) fn forget_inflated(&mut self, host: HostOffset) {
        if let Some(slot) = self.inflated.find(host.0)
            && self.inflated.is_ready(slot)
        {
            self.inflated.forget(slot);
        }
    }
}
