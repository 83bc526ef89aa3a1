//! What a front end has said in messages: features, memory, queues.
//!
//! A message that cannot be is an error, and the front end that sent it is left.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::fs::{
    FileType, MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_getfl, fcntl_setfl, fstat,
    ftruncate, memfd_create,
};
use vhost::vhost_user::message::*;
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap,
};

use crate::serve::vhost::inflight::{Notes, len_of};
use crate::serve::vhost::queue::{Guest, Places, Queue, SIZE_MAX};
use crate::serve::vhost::request::Facts;

/// Regions of a guest's memory.
const REGIONS_MAX: usize = 32;
/// The messages have features of their own, which this one of the device's stands for.
const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// See the module.
pub struct Session {
    facts: Arc<Facts>,
    /// Of the device, those that the guest's driver knows.
    features: u64,
    regions: Vec<Region>,
    /// All of these.
    pub guest: Option<Arc<Guest>>,
    pub queues: Vec<Queue>,
    /// Where it is noted what is in flight.
    inflight: Option<Inflight>,
    /// By queue.
    kicks: Vec<Option<Kick>>,
    registry: Arc<Registry>,
    /// The tokens of kicks, by queue.
    tokens: usize,
}

/// Memory for the notes of queues.
#[derive(Clone, Debug)]
struct Inflight {
    memory: Arc<Guest>,
    queues: usize,
    /// Places in each.
    places: u16,
}

/// A piece of the guest's memory, and where it is in the front end's process.
#[derive(Clone, Debug)]
struct Region {
    mapped: Arc<GuestRegionMmap>,
    theirs: u64,
}

/// What becomes readable when there are requests. It is never read: each time that it is written to is
/// told, as an edge.
#[derive(Debug)]
struct Kick {
    file: File,
    registry: Arc<Registry>,
}

impl Drop for Kick {
    fn drop(&mut self) {
        // The front end has it still: that it is closed here ends nothing.
        let _ = self.registry.deregister(&mut SourceFd(&self.file.as_raw_fd()));
    }
}

impl Session {
    /// Nothing was said yet. The kick of a queue has the token `tokens` and its number.
    pub fn new(
        facts: Arc<Facts>,
        queues: usize,
        registry: Arc<Registry>,
        tokens: usize,
    ) -> Session {
        Session {
            facts,
            features: 0,
            regions: Vec::new(),
            guest: None,
            queues: (0..queues).map(|_| Queue::new()).collect(),
            inflight: None,
            kicks: (0..queues).map(|_| None).collect(),
            registry,
            tokens,
        }
    }

    /// Requests that were taken and are not done.
    pub fn in_flight(&self) -> usize {
        self.queues.iter().map(Queue::in_flight).sum()
    }

    fn queue(&mut self, index: u32) -> Result<&mut Queue> {
        self.queues.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    /// Where the front end's addresses are in the guest's memory.
    fn places(&self, theirs: Places<u64>) -> Option<Places<GuestAddress>> {
        let find = |address: u64| {
            self.regions.iter().find_map(|region| {
                let within = address.checked_sub(region.theirs)?;
                let is_in = within < region.mapped.len();
                is_in.then(|| region.mapped.start_addr().checked_add(within)).flatten()
            })
        };
        Some(Places {
            table: find(theirs.table)?,
            available: find(theirs.available)?,
            used: find(theirs.used)?,
        })
    }

    /// Starts a queue if all that it needs was said.
    fn start(&mut self, index: u32) -> Result<()> {
        let at = index as usize;
        let (Some(guest), Some(theirs)) = (self.guest.clone(), self.queue(index)?.places) else {
            return Ok(());
        };
        if self.queues[at].is_running() || self.kicks[at].is_none() {
            return Ok(());
        }
        let places = self.places(theirs).ok_or(Error::InvalidParam)?;
        let notes = self.notes(at)?;
        let event_index = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queue = &mut self.queues[at];
        // Who does not know that queues are enabled has them so.
        queue.is_enabled |= self.features & PROTOCOL == 0;
        queue.start(&guest, places, event_index, notes).map_err(|_| Error::InvalidParam)
    }

    /// Where it is noted what is in flight in this queue.
    fn notes(&self, index: usize) -> Result<Option<Notes>> {
        let its = self.inflight.as_ref().filter(|inflight| index < inflight.queues);
        let Some(Inflight { memory, places, .. }) = its else { return Ok(None) };
        or_invalid(*places == self.queues[index].size())?;
        Ok(Some(Notes::new(memory, index, *places)))
    }

    /// Bytes of the notes for these queues, if there can be such.
    fn notes_len(&self, wanted: &VhostUserInflight) -> Result<u64> {
        let queues = usize::from(wanted.num_queues);
        or_invalid(queues <= self.queues.len() && wanted.queue_size <= SIZE_MAX)?;
        Ok(queues as u64 * len_of(wanted.queue_size))
    }

    fn stop_all(&mut self) {
        self.kicks.iter_mut().for_each(|kick| *kick = None);
        self.queues.iter_mut().for_each(|queue| {
            queue.stop();
        });
    }

    /// This is the guest's memory now. What is in flight keeps what it had.
    fn set_regions(&mut self, mut regions: Vec<Region>) -> Result<()> {
        regions.sort_by_key(|region| region.mapped.start_addr());
        let mapped = regions.iter().map(|region| Arc::clone(&region.mapped)).collect();
        let guest = match regions.is_empty() {
            true => None,
            false => {
                let all = GuestRegionCollection::from_arc_regions(mapped);
                Some(Arc::new(all.map_err(|_| Error::InvalidParam)?))
            }
        };
        (self.regions, self.guest) = (regions, guest);
        // Without any memory there are no rings that could be looked at.
        let nowhere = Guest::new();
        let guest = self.guest.clone();
        for at in 0..self.queues.len() {
            let places = self.queues[at].places.and_then(|theirs| self.places(theirs));
            self.queues[at].moved(guest.as_deref().unwrap_or(&nowhere), places);
        }
        Ok(())
    }
}

fn mapped(at: u64, len: u64, theirs: u64, offset: u64, file: File) -> Result<Region> {
    let end = offset.checked_add(len).ok_or(Error::InvalidParam)?;
    let meta = file.metadata().map_err(Error::ReqHandlerError)?;
    // A page behind the file's end cannot be looked at without being killed.
    if !meta.is_file() || meta.len() < end {
        return Err(Error::InvalidParam);
    }
    let len = usize::try_from(len).map_err(|_| Error::InvalidParam)?;
    let region = MmapRegion::from_file(FileOffset::new(file, offset), len);
    let region = region.map_err(|_| Error::InvalidParam)?;
    let region = GuestRegionMmap::new(region, GuestAddress(at)).ok_or(Error::InvalidParam)?;
    Ok(Region { mapped: Arc::new(region), theirs })
}

/// Is it a thing of the kernel's own, as an eventfd is? What is a file, a pipe or a socket could keep us
/// waiting. It is made one that does not wait.
fn eventfd(file: File) -> Result<File> {
    let failed = |errno: rustix::io::Errno| Error::ReqHandlerError(errno.into());
    let mode = fstat(&file).map_err(failed)?.st_mode;
    if FileType::from_raw_mode(mode) != FileType::Unknown {
        return Err(Error::InvalidParam);
    }
    let flags = fcntl_getfl(&file).map_err(failed)?;
    fcntl_setfl(&file, flags | OFlags::NONBLOCK).map_err(failed)?;
    Ok(file)
}

fn or_invalid(is_valid: bool) -> Result<()> {
    if is_valid { Ok(()) } else { Err(Error::InvalidParam) }
}

/// What we do not do: no feature says that we do.
fn not_done<T>() -> Result<T> {
    Err(Error::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop_all();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all();
        self.features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.facts.features | PROTOCOL)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        or_invalid(features & !(self.facts.features | PROTOCOL) == 0)?;
        self.features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let all = regions.iter().zip(files).map(|(region, file)| {
            let VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, mmap_offset } =
                *region;
            mapped(guest_phys_addr, memory_size, user_addr, mmap_offset, file)
        });
        let all = all.collect::<Result<Vec<_>>>()?;
        or_invalid(all.len() <= REGIONS_MAX)?;
        self.set_regions(all)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        or_invalid(self.queue(index)?.set_size(num))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        let queue = self.queue(index)?;
        let places = Places { table: descriptor, available, used };
        // Written pages are not noted. And what runs stays where it is.
        let may = !queue.is_running() || queue.places == Some(places);
        or_invalid(may && flags.is_empty())?;
        queue.places = Some(places);
        self.start(index)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        or_invalid(self.queue(index)?.set_base(base))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.queue(index)?.stop();
        self.kicks[index as usize] = None;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        // Without one we would have to look all the time.
        let file = eventfd(file.ok_or(Error::InvalidParam)?)?;
        self.queue(index.into())?;
        let at = usize::from(index);
        self.kicks[at] = None;
        let token = Token(self.tokens + at);
        let fd = file.as_raw_fd();
        let registered = self.registry.register(&mut SourceFd(&fd), token, Interest::READABLE);
        registered.map_err(Error::ReqHandlerError)?;
        self.kicks[at] = Some(Kick { file, registry: Arc::clone(&self.registry) });
        // It may have been written to before.
        self.queues[at].kicked();
        self.start(index.into())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let file = file.map(eventfd).transpose()?;
        self.queue(index.into())?.set_call(file);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.queue(index.into())?.error = file.map(eventfd).transpose()?;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let known = self.get_protocol_features()? | VhostUserProtocolFeatures::REPLY_ACK;
        or_invalid(features & !known.bits() == 0)
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let queue = self.queue(index)?;
        queue.is_enabled = enable;
        queue.kicked();
        self.start(index)
    }

    fn get_config(&mut self, offset: u32, len: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.facts.config(offset, len).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        // There is nothing in it that a guest may change.
        Err(Error::InvalidParam)
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        not_done()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        not_done()
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let len = self.notes_len(wanted)?;
        let failed = |errno: rustix::io::Errno| Error::ReqHandlerError(errno.into());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("inflight", flags).map_err(failed)?;
        ftruncate(&file, len).map_err(failed)?;
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(failed)?;
        let VhostUserInflight { num_queues, queue_size, .. } = *wanted;
        Ok((VhostUserInflight::new(len, 0, num_queues, queue_size), file.into()))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let len = self.notes_len(given)?;
        or_invalid(given.mmap_size >= len && !self.queues.iter().any(Queue::is_running))?;
        let region = mapped(0, len, 0, given.mmap_offset, file)?;
        let memory = Guest::from_arc_regions(vec![region.mapped]);
        let memory = Arc::new(memory.map_err(|_| Error::InvalidParam)?);
        let (queues, places) = (given.num_queues.into(), given.queue_size);
        self.inflight = Some(Inflight { memory, queues, places });
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        or_invalid(self.regions.len() < REGIONS_MAX)?;
        let VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, mmap_offset } =
            **region;
        let mut all = self.regions.clone();
        all.push(mapped(guest_phys_addr, memory_size, user_addr, mmap_offset, file)?);
        self.set_regions(all)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, .. } = **region;
        let mut all = self.regions.clone();
        all.retain(|other| {
            let at = (other.mapped.start_addr().raw_value(), other.mapped.len(), other.theirs);
            at != (guest_phys_addr, memory_size, user_addr)
        });
        or_invalid(all.len() + 1 == self.regions.len())?;
        self.set_regions(all)
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        not_done()
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_done()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_done()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        not_done()
    }
}
