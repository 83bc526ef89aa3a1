//! A server's disk at rest: opened, and waited for.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cowbell_engine::backend::FileInfo;
use cowbell_engine::store::{Extent, Store};
use cowbell_engine::sys::clock;
use cowbell_engine::units::{Errno, Time};

use crate::address::Address;
use crate::client::{Event, ExportInfo};
use crate::link::{Link, Peer};
use crate::requests::{self, What};
use crate::wire::{self, export, state};

/// How a server's disk is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct RemoteOptions {
    /// It is not to be written, even if the server lets it be.
    pub read_only: bool,
    /// A connection that is lost is made again for so long; requests wait meanwhile. What that costs is said at
    /// [`Remote`](crate::Remote). The host's name is not asked for again. Default: 0, what is lost is lost.
    pub reconnect: Duration,
}

/// A server that has not said what the export is after so long is not one.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Between attempts to reach a server again.
const PAUSE: Duration = Duration::from_millis(50);

/// A server's disk. As a [`Store`] it is waited for, without an end.
///
/// It has one length for ever, as a block device has.
#[derive(Debug)]
pub struct RemoteFile {
    pub(crate) address: Address,
    pub(crate) peers: Arc<[Peer]>,
    pub(crate) options: RemoteOptions,
    pub(crate) info: ExportInfo,
    /// `None`: it is lost.
    link: Mutex<Option<Link>>,
}

/// The moment when an attempt that begins now has taken too long.
pub(crate) fn handshake_end(now: Time) -> Time {
    now.plus_ns(HANDSHAKE.as_nanos() as u64)
}

impl RemoteFile {
    /// Connects, and waits until the server has said what the export is: 10 s at most for each address
    /// that the host's name has.
    ///
    /// # Errors
    ///
    /// Those of the network; and what the server has against it, in words.
    pub fn open(address: Address, options: RemoteOptions) -> io::Result<RemoteFile> {
        let said = |error: io::Error| io::Error::new(error.kind(), format!("{address}: {error}"));
        let peers: Arc<[Peer]> = Peer::all(&address.place).map_err(said)?.into();
        let link = Link::connect(&peers, &address.export, handshake_end(clock())).map_err(said)?;
        let Some(&info) = link.client.info() else { unreachable!("the handshake is over") };
        let link = Mutex::new(Some(link));
        Ok(RemoteFile { address, peers, options, info, link })
    }

    /// Where it is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What the server says of it.
    pub fn export(&self) -> &ExportInfo {
        &self.info
    }

    /// What an engine must know of it.
    pub fn info(&self) -> FileInfo {
        let ExportInfo { size, block_min, has_allocation, .. } = self.info;
        FileInfo {
            request_align: block_min,
            memory_align: 1,
            hole_align: block_min,
            len: size,
            can_grow: false,
            knows_holes: has_allocation,
        }
    }

    /// Its connection, for somebody else to use.
    pub(crate) fn take_link(&mut self) -> Option<Link> {
        self.link.get_mut().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The connection back, with nothing in flight.
    pub(crate) fn give_link(&mut self, link: Link) {
        *self.link.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(link);
    }

    /// Is that the export that it was?
    pub(crate) fn is_same(&self, other: &ExportInfo) -> bool {
        let was = &self.info;
        let written = |info: &ExportInfo| info.flags & export::READ_ONLY;
        other.size == was.size
            && other.can(was.flags)
            && written(other) == written(was)
            && other.block_min <= was.block_min
            && other.request_max >= was.request_max
            && other.has_allocation >= was.has_allocation
    }

    fn locked(&self) -> MutexGuard<'_, Option<Link>> {
        // What somebody left in the middle is thrown away: see `ask`.
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does one request, and waits for it.
    fn ask(
        &self,
        what: What,
        offset: u64,
        len: u64,
        mut bytes: Bytes<'_>,
    ) -> io::Result<Option<requests::Extent>> {
        let mut place = self.locked();
        let mut lost = None;
        loop {
            // The connection is put back when all is well.
            let asked = self.connection(place.take(), lost).and_then(|mut link| {
                let answer = once(&mut link, what, offset, len, &mut bytes)?;
                *place = Some(link);
                Ok(answer)
            });
            let error = match asked {
                Ok(answer) => return answer.map_err(|error| errno_of(error).into()),
                Err(error) => error,
            };
            let now = clock();
            let since: Time = *lost.get_or_insert(now);
            if Duration::from_nanos(now.since(since)) >= self.options.reconnect {
                return Err(error);
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// The connection, or a new one.
    fn connection(&self, link: Option<Link>, lost: Option<Time>) -> io::Result<Link> {
        if let Some(link) = link.filter(|link| link.client.in_flight() == 0) {
            return Ok(link);
        }
        let reconnect = self.options.reconnect.as_nanos() as u64;
        if reconnect == 0 {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the connection was lost"));
        }
        let now = clock();
        let until = handshake_end(now).min(lost.unwrap_or(now).plus_ns(reconnect));
        let link = Link::connect(&self.peers, &self.address.export, until)?;
        match link.client.info() {
            Some(info) if self.is_same(info) => Ok(link),
            _ => Err(io::Error::other("the server has another disk now")),
        }
    }

    /// Cuts `len` bytes at `offset` into requests: where each begins in the caller's memory, how long it is, and
    /// whether it is made of whole blocks. One that is not lies in one block.
    fn parts(&self, offset: u64, len: u64) -> impl Iterator<Item = (u64, u64, bool)> + use<> {
        let (block, most) = (u64::from(self.info.block_min), u64::from(self.info.request_max));
        let mut at = 0;
        std::iter::from_fn(move || {
            let (start, left) = (offset + at, len - at);
            let cut = start % block;
            let is_whole = cut == 0 && left >= block;
            let now = if is_whole { left / block * block } else { left.min(block - cut) };
            let part = (at, now.min(most), is_whole);
            at += part.1;
            (left > 0).then_some(part)
        })
    }

    /// The block that `offset` is in.
    fn block_at(&self, offset: u64) -> io::Result<(u64, Vec<u8>)> {
        let len = u64::from(self.info.block_min);
        let start = offset / len * len;
        let mut block = vec![0; len as usize];
        self.ask(What::Read, start, len, Bytes::To(&mut block))?;
        Ok((start, block))
    }
}

/// The memory of a request.
enum Bytes<'a> {
    None,
    To(&'a mut [u8]),
    From(&'a [u8]),
}

/// Does a request. The outer error is the connection's.
fn once(
    link: &mut Link,
    what: What,
    offset: u64,
    len: u64,
    bytes: &mut Bytes<'_>,
) -> io::Result<Result<Option<requests::Extent>, u32>> {
    link.client.ask(1, what, offset, len);
    loop {
        link.send(|_, at, to| {
            if let Bytes::From(from) = bytes {
                to.copy_from_slice(&from[at as usize..at as usize + to.len()]);
            }
        })?;
        match link.event()? {
            None => link.wait(None)?,
            Some(Event::Done { result: Err(wire::error::SHUTDOWN), .. }) => {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            Some(Event::Done { result, .. }) => return Ok(result),
            Some(Event::Data { at, len, .. }) => {
                if let Bytes::To(to) = bytes {
                    to[at as usize..at as usize + len].copy_from_slice(link.data(len));
                }
            }
            Some(Event::Zeros { at, len, .. }) => {
                if let Bytes::To(to) = bytes {
                    to[at as usize..(at + len) as usize].fill(0);
                }
            }
            Some(Event::Nothing | Event::Ready | Event::Over) => {}
        }
    }
}

/// An error of [`wire::error`] as the system has it: they have the same numbers.
pub(crate) fn errno_of(error: u32) -> Errno {
    use wire::error::{INVAL, IO, NOMEM, NOSPC, NOTSUP, OVERFLOW, PERM, SHUTDOWN};
    match error {
        PERM | IO | NOMEM | INVAL | NOSPC | OVERFLOW | NOTSUP | SHUTDOWN => Errno(error as i32),
        _ => Errno::INVALID,
    }
}

impl Store for RemoteFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let there = self.info.size.saturating_sub(offset).min(buf.len() as u64);
        let (buf, behind) = buf.split_at_mut(there as usize);
        behind.fill(0);
        for (at, len, is_whole) in self.parts(offset, there) {
            let start = offset + at;
            let to = &mut buf[at as usize..(at + len) as usize];
            if is_whole {
                self.ask(What::Read, start, len, Bytes::To(to))?;
            } else {
                let (block_start, block) = self.block_at(start)?;
                let skip = (start - block_start) as usize;
                to.copy_from_slice(&block[skip..skip + to.len()]);
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        if !self.is_writable() {
            return Err(Errno::READ_ONLY.into());
        }
        self.allocate(offset, buf.len() as u64)?;
        for (at, len, is_whole) in self.parts(offset, buf.len() as u64) {
            let start = offset + at;
            let from = &buf[at as usize..(at + len) as usize];
            let what = What::Write { fua: false };
            if is_whole {
                self.ask(what, start, len, Bytes::From(from))?;
            } else {
                let (block_start, mut block) = self.block_at(start)?;
                let skip = (start - block_start) as usize;
                block[skip..skip + from.len()].copy_from_slice(from);
                self.ask(what, block_start, block.len() as u64, Bytes::From(&block))?;
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if self.info.can(export::SEND_FLUSH) && self.is_writable() {
            self.ask(What::Flush, 0, 0, Bytes::None)?;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.info.size)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.allocate(len, 0)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.info.size => Ok(()),
            _ => Err(Errno::NO_SPACE.into()),
        }
    }

    fn extent_at(&self, offset: u64) -> io::Result<Extent> {
        let size = self.info.size;
        if !self.info.has_allocation || offset >= size {
            return Ok(Extent { data: true, end: size.max(offset) });
        }
        let what = What::Status { one: true };
        let start = offset / u64::from(self.info.block_min) * u64::from(self.info.block_min);
        let len = (size - start).min(self.info.longest(what));
        match self.ask(what, start, len, Bytes::None)? {
            Some(extent) if start + extent.len > offset => {
                Ok(Extent { data: extent.flags & state::ZERO == 0, end: start + extent.len })
            }
            _ => Ok(Extent { data: true, end: offset + 1 }),
        }
    }

    fn is_writable(&self) -> bool {
        !self.options.read_only && !self.info.can(export::READ_ONLY)
    }

    fn has_fixed_len(&self) -> bool {
        true
    }
}
