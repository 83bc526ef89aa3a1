//! The header of a running image: a guest's resize, a longer refcount table and the corrupt mark
//! change it. One of them at a time; its fields go out as one sector.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Seg, Segs};
use cowbell_engine::step::Cx;
use cowbell_engine::units::Errno;
use cowbell_engine::wait::{On, WaitList};

use crate::qcow2::disk::header::{AUTOCLEAR_RAW_DATA, Compression, Header, SECTOR};
use crate::qcow2::run::image::Image;

/// The header of a running image.
#[derive(Clone, Hash, Debug)]
pub(super) struct LiveHeader {
    image: Image,
    /// As it is on disk.
    on_disk: Header,
    /// As it is being written.
    next: Header,
    /// Somebody is changing it; others wait.
    busy: bool,
    waiters: WaitList,
    /// Nobody knows what is on disk: a write of it has failed. The next writeback writes it again.
    is_doubted: bool,
}

impl LiveHeader {
    pub fn new(on_disk: Header, image: Image) -> LiveHeader {
        let (next, waiters) = (on_disk.clone(), WaitList::new());
        LiveHeader { image, on_disk, next, busy: false, waiters, is_doubted: false }
    }

    pub fn l1_offset(&self) -> u64 {
        self.on_disk.l1_offset
    }

    pub fn is_doubted(&self) -> bool {
        self.is_doubted
    }

    pub fn compression(&self) -> Compression {
        self.on_disk.compression
    }

    pub fn has_snapshots(&self) -> bool {
        self.on_disk.snapshot_count > 0
    }

    /// Is the disk in a data file that is to read as a raw image by itself?
    pub fn is_raw_external(&self) -> bool {
        self.on_disk.has_data_file() && self.on_disk.autoclear & AUTOCLEAR_RAW_DATA != 0
    }

    pub fn assert_idle(&self) {
        assert!(!self.busy && self.waiters.is_empty(), "the header is busy");
    }

    /// Writes the header with a change, stably, or parks the request, which asks again when it is
    /// woken. When the header is there, or could not be written, the request calls [`LiveHeader::changed`].
    pub fn change(&mut self, change: impl FnOnce(&mut Header), cx: &mut Cx<'_>) {
        if self.busy {
            cx.park(&mut self.waiters, On::Header);
            return;
        }
        self.busy = true;
        change(&mut self.next);
        let region = self.image.regions.header;
        cx.mem().region_mut(region)[..SECTOR as usize].copy_from_slice(&self.next.sector());
        let seg = Seg { base: Base::Region(region), off: 0, len: SECTOR as u32 };
        cx.issue(self.image.stable_write(0, Segs::one(seg)));
    }

    /// The header is on disk, stably, or nobody knows; the next one's turn.
    pub fn changed(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) {
        match result {
            Ok(()) => self.on_disk = self.next.clone(),
            Err(_) => self.next = self.on_disk.clone(),
        }
        self.is_doubted = result.is_err() && !mutant!("qcow2_header_not_doubted");
        self.busy = false;
        cx.wake_all(&mut self.waiters);
    }
}
