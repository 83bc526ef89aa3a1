//! Reads of compressed clusters: through a small cache of inflated ones.
//!
//! A slot of the cache holds a cluster as it is on disk and, behind it, as the guest sees it. The
//! first request that wants it loads and inflates it, as ops; others wait for that. A slot is named
//! by the host offset of the compressed bytes, which stay as they are as long as an entry leads to
//! them; when an entry gives them up, the cache forgets them.

use cowbell_engine::op::Op;
use cowbell_engine::step::Cx;
use cowbell_engine::units::Errno;
use cowbell_engine::wait::On;

use crate::qcow2::disk::codec::inflating;
use crate::qcow2::disk::layout::Compressed;
use crate::qcow2::run::image::{compressed_max, inflated_slot_bytes};
use crate::qcow2::run::piece::{PieceStep, Progress, RequestState};

impl PieceStep<'_> {
    /// Reads at `at` from a compressed cluster, as far as that and the request reach.
    pub fn read_compressed(&mut self, at: u64, place: Compressed, cx: &mut Cx<'_>) -> Progress {
        if let Some(slot) = self.inflated.find(place.host.0) {
            if self.inflated.is_ready(slot) {
                return self.copy_inflated(at, slot, cx);
            }
            cx.park(self.inflated.waiters(slot), On::Compressed);
            return Progress::LookAgain(at);
        }
        let Some(slot) = self.inflated.reserve(place.host.0) else {
            cx.park(&mut self.inflated.full, On::CacheSlot);
            return Progress::LookAgain(at);
        };
        // A cluster that grew when it was compressed is none: what it would need is not looked at.
        let bytes = u64::from(place.bytes).min(compressed_max(self.image.geometry)) as u32;
        let off = self.inflated.seg(slot, 0, bytes as usize).off;
        if !self.packing.fetch(place.host.0, bytes, off, cx) {
            return self.compressed_read(at, (slot as u32, bytes), Ok(()), cx);
        }
        Progress::Wait(RequestState::ReadCompressed { at, slot: slot as u32, bytes })
    }

    /// The cluster's bytes were read: they are inflated.
    pub fn compressed_read(
        &mut self,
        at: u64,
        (slot, bytes): (u32, u32),
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Progress {
        if result.is_err() {
            return self.cluster_inflated(at, slot, result, cx);
        }
        let codec = inflating(self.header.compression());
        let size = self.image.geometry.cluster_size() as usize;
        let input = self.inflated.seg(slot as usize, 0, bytes as usize);
        let behind = inflated_slot_bytes(self.image.geometry) - size;
        cx.issue(Op::compute(codec, input, self.inflated.seg(slot as usize, behind, size)));
        Progress::Wait(RequestState::Inflate { at, slot })
    }

    pub fn cluster_inflated(
        &mut self,
        at: u64,
        slot: u32,
        result: Result<(), Errno>,
        cx: &mut Cx<'_>,
    ) -> Progress {
        self.inflated.load_ended(slot as usize, result.is_ok(), cx);
        match result {
            Ok(()) => self.copy_inflated(at, slot as usize, cx),
            Err(errno) => Progress::Failed(errno),
        }
    }

    /// The cluster is there: hands over what is wanted of it.
    fn copy_inflated(&self, at: u64, slot: usize, cx: &mut Cx<'_>) -> Progress {
        let size = self.image.geometry.cluster_size();
        let io = cx.io();
        let inside = at & (size - 1);
        let len = (size - inside).min(io.end() - at);
        let unit = inflated_slot_bytes(self.image.geometry);
        let off = slot * unit + unit - size as usize + inside as usize;
        cx.copy_region_to_guest(at - io.offset, self.image.regions.inflated, off, len as usize);
        Progress::To(at + len)
    }
}
