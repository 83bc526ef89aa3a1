//! Disks: images that an engine has, by number.

use std::ffi::{c_char, c_int};
use std::sync::atomic::{AtomicU64, Ordering};

use cowbell_engine::Rate;
use cowbell_engine::events::NodeEvent;
use cowbell_engine::step::Driver;
use cowbell_engine::store::Store;
use cowbell_engine::units::{Errno, NodeId};
use cowbell_formats::RunOptions;

use crate::about::name_of;
use crate::handle::{Engine, STRUCT_MAX, caught, code, is_place, with};
use crate::image::{Image, taken};
use crate::request::refused;

/// A disk of an engine. 0 is none, and no number is given twice: that of a closed disk, or of another
/// engine's, answers -EBADF for ever.
pub type Disk = u64;

/// The disk takes no writes: its image was opened without COWBELL_OPEN_WRITE.
pub const COWBELL_DISK_READ_ONLY: u32 = 1;
/// The format was guessed.
pub const COWBELL_DISK_PROBED: u32 = 2;
/// Some file should have been locked, and its file system has no locks: make sure that no other
/// program writes it.
pub const COWBELL_DISK_UNLOCKED: u32 = 4;

/// What a disk is. (Whether its image takes zeros, discards and other sizes is not told beforehand:
/// such requests end with -EOPNOTSUPP if it does not.)
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DiskInfo {
    /// Bytes. cowbell_truncate() changes it.
    pub size: u64,
    /// The most bytes of one read or write. Other requests may be about the whole disk.
    pub largest_request: u64,
    /// Any byte offset and length will do; multiples of this many bytes (a power of two) take no
    /// detour through another buffer.
    pub request_align: u32,
    /// Any memory will do; the same for addresses and for lengths of its pieces.
    pub memory_align: u32,
    /// Bits of COWBELL_DISK_*.
    pub flags: u32,
    /// Image files, one upon the other: 1 if there is no backing file.
    pub layers: u32,
    /// The format's name, one of cowbell_format(). Lives for ever.
    pub format: *const c_char,
}

/// Something is impossible in the image's tables: `what` in words, at byte `at` of the file of layer
/// `layer`. Requests that need what it says fail with -EIO, others go on. The image wants a check.
/// (`disk` is 0 if it is closed meanwhile.)
pub const COWBELL_EVENT_CORRUPT: u32 = 1;
/// A disk that was to be closed is gone. `result` is 0: its image is clean and stable. Or it is a
/// negative error number: the first that kept it from that; -EIO also if it was found corrupt.
/// Completions of its requests may come even after this.
pub const COWBELL_EVENT_CLOSED: u32 = 2;

/// A disk that was to be paused has nothing in flight any more: nothing is read from or written to its files
/// until cowbell_resume(). `result` is 0.
pub const COWBELL_EVENT_PAUSED: u32 = 3;

/// Something that happened to a disk, beside the ends of requests.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// COWBELL_EVENT_*. There may be others in a later version: ignore what you do not know.
    pub kind: u32,
    /// See the kind.
    pub result: i32,
    /// Which disk.
    pub disk: Disk,
    /// See the kind.
    pub at: u64,
    /// See the kind: 0 is the image itself, 1 its backing file.
    pub layer: u32,
    /// 0.
    pub reserved: u32,
    /// See the kind: a string, cut if it does not fit.
    pub what: [c_char; 96],
}

/// Gives an image to an engine: its disk is put into `*disk`, and takes requests from now on. Other
/// disks go on meanwhile. It waits for nobody, but asks the kernel what the files are.
///
/// The image is the engine's whatever the answer is, and must not be used again. `*disk` is 0 after
/// an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_attach(
    engine: *mut Engine,
    image: *mut Image,
    disk: *mut Disk,
) -> c_int {
    // SAFETY: an image as this function's contract has it, or NULL.
    let mut image = unsafe { taken(image) };
    if is_place(disk).is_ok() {
        // SAFETY: the caller lends the place.
        unsafe { disk.write(0) };
    }
    let work = |engine: &mut Engine| {
        is_place(disk)?;
        let id = engine.attach(*image.take().ok_or(Errno::INVALID)?)?;
        // SAFETY: the place was looked at.
        unsafe { disk.write(id) };
        Ok(0)
    };
    // SAFETY: as this function's contract.
    let answer = unsafe { with(engine, work) };
    caught(|| drop(image));
    answer
}

/// Says what a disk is. `size` is sizeof(struct cowbell_disk_info): so many bytes are written, 0 in
/// what this version of the library does not know.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_disk_info(
    engine: *mut Engine,
    disk: Disk,
    info: *mut DiskInfo,
    size: usize,
) -> c_int {
    let work = |engine: &mut Engine| {
        is_place(info)?;
        if size > STRUCT_MAX {
            return Err(Errno::INVALID);
        }
        let found = engine.info(disk)?;
        let known = size.min(size_of::<DiskInfo>());
        // SAFETY: the caller lends `size` bytes.
        unsafe {
            let place = info.cast::<u8>();
            (&raw const found).cast::<u8>().copy_to_nonoverlapping(place, known);
            place.add(known).write_bytes(0, size - known);
        }
        Ok(0)
    };
    // SAFETY: as this function's contract.
    unsafe { with(engine, work) }
}

/// Begins to close a disk while others go on. It takes no more requests (-ESHUTDOWN), those in flight
/// run to their end, the image is left clean and stable. Go on as ever until cowbell_poll_event()
/// says COWBELL_EVENT_CLOSED; call cowbell_run() before you wait. From then on the files are not locked
/// any more; a thread of the library's closes them, so that your loop does not wait for that.
///
/// -EBADF: there is no such disk; -EALREADY: it is being closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_close(engine: *mut Engine, disk: Disk) -> c_int {
    let work = |engine: &mut Engine| {
        let node = engine.disks.node(disk)?;
        match engine.engine.close(node) {
            Ok(()) => Ok(0),
            Err(cowbell_engine::Why::Closing) => Err(Errno(libc::EALREADY)),
            Err(why) => Err(refused(why)),
        }
    };
    // SAFETY: as this function's contract.
    unsafe { with(engine, work) }
}

/// Pauses a disk while others go on: it takes no requests (-EBUSY), and begins no work of its own; so do its
/// backing files. Those in flight run to their end: go on as ever until cowbell_poll_event() says
/// COWBELL_EVENT_PAUSED. The files hold then what a crash would leave: flush before, to have all in them that
/// was written.
///
/// -EBADF: there is no such disk; -ESHUTDOWN: it is being closed; -EBUSY: it is paused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_pause(engine: *mut Engine, disk: Disk) -> c_int {
    let work = |engine: &mut Engine| {
        let node = engine.disks.node(disk)?;
        engine.engine.pause(node).map_or_else(|why| Err(refused(why)), |()| Ok(0))
    };
    // SAFETY: as this function's contract.
    unsafe { with(engine, work) }
}

/// Ends a pause, whether COWBELL_EVENT_PAUSED has come or not: the disk takes requests again. Call cowbell_run()
/// before you wait. Without a pause it changes nothing, and answers 0.
///
/// -EBADF: there is no such disk; -ESHUTDOWN: it is being closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_resume(engine: *mut Engine, disk: Disk) -> c_int {
    let work = |engine: &mut Engine| {
        let node = engine.disks.node(disk)?;
        engine.engine.resume(node).map_or_else(|why| Err(refused(why)), |()| Ok(0))
    };
    // SAFETY: as this function's contract.
    unsafe { with(engine, work) }
}

/// How much a disk may do from now on: so many bytes and so many requests a second; 0: as many as it can, which is what
/// a disk begins with. Reads and writes count by their bytes, and with zeros and discards as requests; flushes and
/// questions go at once. What is over waits in the engine, in its order, and takes places of it: heed
/// cowbell_next_deadline(). What a tenth of a second allows may go at once after a pause as long.
///
/// -EBADF: there is no such disk.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_set_rate(
    engine: *mut Engine,
    disk: Disk,
    bytes: u64,
    requests: u64,
) -> c_int {
    let work = |engine: &mut Engine| {
        let node = engine.disks.node(disk)?;
        let limit = |number: u64| (number > 0).then_some(number);
        let (bytes, requests) = (limit(bytes), limit(requests));
        let rate = Rate { bytes, requests, ..Rate::default() };
        let rate = (bytes.is_some() || requests.is_some()).then_some(rate);
        if engine.engine.set_rate(node, rate) { Ok(0) } else { Err(Errno(libc::EBADF)) }
    };
    // SAFETY: as this function's contract.
    unsafe { with(engine, work) }
}

/// What happened to disks, oldest first. Answers 1, and the event in `*event`; 0: nothing more; or a
/// negative error number. Ask after each cowbell_run(), until it answers 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cowbell_poll_event(engine: *mut Engine, event: *mut Event) -> c_int {
    let work = |engine: &mut Engine| {
        is_place(event)?;
        let Some(found) = engine.event() else { return Ok(0) };
        // SAFETY: the caller lends the place.
        unsafe { event.write(found) };
        Ok(1)
    };
    // SAFETY: as this function's contract.
    unsafe { with(engine, work) }
}

/// An engine's disks. A disk's number is a serial number of the process and its place in here.
#[derive(Default)]
pub(crate) struct Disks {
    places: Vec<Option<Attached>>,
}

struct Attached {
    id: Disk,
    node: NodeId,
    /// What does not change.
    info: DiskInfo,
}

// SAFETY: what the struct leads to is a constant.
unsafe impl Send for Attached {}

/// How many bits of a disk's number are its place.
const PLACE_BITS: u32 = 16;
const PLACES: usize = 1 << PLACE_BITS;

/// The serial number of the next disk. With 2^48 of them none comes twice.
static NEXT: AtomicU64 = AtomicU64::new(1);

impl Disks {
    #[inline]
    fn find(&self, id: Disk) -> Result<&Attached, Errno> {
        let place = self.places.get(id as usize % PLACES).and_then(Option::as_ref);
        place.filter(|its| its.id == id).ok_or(Errno(libc::EBADF))
    }

    /// The node of a disk.
    #[inline]
    pub fn node(&self, id: Disk) -> Result<NodeId, Errno> {
        self.find(id).map(|its| its.node)
    }

    fn free_place(&mut self) -> Result<usize, Errno> {
        if let Some(place) = self.places.iter().position(Option::is_none) {
            return Ok(place);
        }
        if self.places.len() == PLACES {
            return Err(Errno(libc::EMFILE));
        }
        self.places.push(None);
        Ok(self.places.len() - 1)
    }

    fn iter(&self) -> impl Iterator<Item = &Attached> {
        self.places.iter().flatten()
    }

    /// The number of a closed disk, whose node this was.
    fn remove(&mut self, node: NodeId) -> Disk {
        let its = |place: &&mut Option<Attached>| place.as_ref().is_some_and(|d| d.node == node);
        self.places.iter_mut().find(its).and_then(Option::take).map_or(0, |its| its.id)
    }
}

impl Engine {
    fn attach(&mut self, image: Image) -> Result<Disk, Errno> {
        let chain = image.chain;
        let top = chain.layers.first().ok_or(Errno::INVALID)?;
        let flag = |is: bool, bit| if is { bit } else { 0 };
        let is_unlocked = !chain.unlockable().is_empty();
        let flags = flag(!top.file.is_writable(), COWBELL_DISK_READ_ONLY)
            | flag(top.probed, COWBELL_DISK_PROBED)
            | flag(is_unlocked, COWBELL_DISK_UNLOCKED);
        let (layers, format) = (chain.layers.len() as u32, name_of(top.format).as_ptr());
        let place = self.disks.free_place()?;
        let node = cowbell_formats::attach(&mut self.engine, chain, &RunOptions::default());
        let node = node.map_err(|why| Errno::from_io(&why))?;
        let limits = self.engine.limits(node).ok_or(Errno::INVALID)?;
        let info = DiskInfo {
            size: limits.size,
            largest_request: limits.request_max,
            request_align: limits.request_align,
            memory_align: limits.memory_align,
            flags,
            layers,
            format,
        };
        let id = NEXT.fetch_add(1, Ordering::Relaxed) << PLACE_BITS | place as u64;
        self.disks.places[place] = Some(Attached { id, node, info });
        Ok(id)
    }

    fn info(&self, disk: Disk) -> Result<DiskInfo, Errno> {
        let found = self.disks.find(disk)?;
        // It may have gone, and its event not been asked for.
        if !self.engine.has(found.node) {
            return Err(Errno(libc::EBADF));
        }
        Ok(DiskInfo { size: self.engine.node(found.node).size(), ..found.info })
    }

    fn event(&mut self) -> Option<Event> {
        loop {
            let blank =
                Event { kind: 0, result: 0, disk: 0, at: 0, layer: 0, reserved: 0, what: [0; 96] };
            match self.engine.poll_event()? {
                NodeEvent::Corrupt { node, what, at } => {
                    let (disk, layer) = self.disk_of(node).unwrap_or_default();
                    let mut event = Event { kind: COWBELL_EVENT_CORRUPT, disk, at, layer, ..blank };
                    // The last byte stays 0.
                    let room = event.what.len() - 1;
                    for (place, byte) in event.what[..room].iter_mut().zip(what.bytes()) {
                        *place = byte as c_char;
                    }
                    return Some(event);
                }
                NodeEvent::Closed { node, result } => {
                    let files = self.engine.take_files(node);
                    self.closer.close(files);
                    let result = result.map_or_else(code, |()| 0);
                    let disk = self.disks.remove(node);
                    return Some(Event { kind: COWBELL_EVENT_CLOSED, result, disk, ..blank });
                }
                NodeEvent::Paused { node } => {
                    // Backing files are paused with it, and told of as well.
                    if let Some((disk, 0)) = self.disk_of(node) {
                        return Some(Event { kind: COWBELL_EVENT_PAUSED, disk, ..blank });
                    }
                }
                // There are no jobs here.
                NodeEvent::JobError { .. } | NodeEvent::JobEnded { .. } => {}
            }
        }
    }

    /// Of which disk a node is a layer, and which.
    fn disk_of(&self, node: NodeId) -> Option<(Disk, u32)> {
        self.disks.iter().find_map(|disk| {
            let mut at = disk.node;
            for layer in 0..disk.info.layers {
                if at == node {
                    return Some((disk.id, layer));
                }
                if !self.engine.has(at) {
                    return None;
                }
                at = *self.engine.node(at).below().first()?;
            }
            None
        })
    }
}
