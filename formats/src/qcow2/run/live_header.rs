//! The header of a running image: a guest's resize, a longer refcount table and the corrupt mark
//! change it. One of them at a time; its fields go out as one sector.

use cowbell_engine::mutant;
use cowbell_engine::op::{Base, Op, Seg, Segs};
use cowbell_engine::step::{Cx, Step};
use cowbell_engine::units::Errno;
use cowbell_engine::wait::WaitList;

use crate::qcow2::disk::header::{self, AUTOCLEAR_RAW_DATA, SECTOR};
use crate::qcow2::rest::open::Opened;
use crate::qcow2::run::{Qcow2, State};

/// The header of a running image.
#[derive(Clone, Hash, Debug)]
pub(super) struct Header {
    /// As it is on disk.
    on_disk: header::Header,
    /// As it is being written.
    next: header::Header,
    /// Somebody is changing it; others wait.
    busy: bool,
    waiters: WaitList,
    /// Nobody knows what is on disk: a write of it has failed. The next writeback writes it again.
    is_doubted: bool,
}

impl Header {
    pub fn new(opened: &Opened) -> Header {
        let on_disk = opened.header.clone();
        let (next, waiters) = (on_disk.clone(), WaitList::new());
        Header { on_disk, next, busy: false, waiters, is_doubted: false }
    }

    pub fn l1_offset(&self) -> u64 {
        self.on_disk.l1_offset
    }

    pub fn is_doubted(&self) -> bool {
        self.is_doubted
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
}

impl Qcow2 {
    /// Has the header written with a change, or waits for its turn: the request is in `state` then,
    /// and asks again when it is woken. When the header is stable, or could not be written, the
    /// request calls [`Qcow2::header_changed`].
    pub(super) fn change_header(
        &mut self,
        state: State,
        change: impl FnOnce(&mut header::Header),
        cx: &mut Cx<'_>,
    ) -> Step<State> {
        if self.header.busy {
            cx.park(&mut self.header.waiters);
            return Step::Wait(state);
        }
        self.header.busy = true;
        change(&mut self.header.next);
        let bytes = cx.mem().region_mut(self.regions.header);
        bytes[..SECTOR as usize].copy_from_slice(&self.header.next.sector());
        let base = Base::Region(self.regions.header);
        let seg = Seg { base, off: 0, len: SECTOR as u32 };
        cx.issue(Op::write(self.file, 0, Segs::one(seg)));
        Step::Wait(state)
    }

    /// The header is on disk, stably, or nobody knows; the next one's turn.
    pub(super) fn header_changed(&mut self, result: Result<(), Errno>, cx: &mut Cx<'_>) {
        match result {
            Ok(()) => self.header.on_disk = self.header.next.clone(),
            Err(_) => self.header.next = self.header.on_disk.clone(),
        }
        self.header.is_doubted = result.is_err() && !mutant!("qcow2_header_not_doubted");
        self.header.busy = false;
        cx.wake_all(&mut self.header.waiters);
    }
}
