//! Saying what is where in an image, and reading it, through all its backing files.
//!
//! Blocking, without the engine: for `map`, `compare` and for tests that look at what a crash has
//! left. Nothing is cached but a piece of one table for the length of a lookup, on the stack; the
//! layers are gone through in a loop, so a deep chain takes no more stack than a short one.

use std::ops::Range;

use cowbell_engine::store::Store;
use cowbell_engine::units::HostOffset;

use crate::chain::Chain;
use crate::error::Error;
use crate::format;
use crate::qcow2::disk::codec;
use crate::qcow2::disk::header::Compression;
use crate::vmdk::disk::grain;
use crate::vmdk::disk::layout::GRAIN_MARKER_BYTES;

/// A stretch of the disk that is all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte on the disk.
    pub start: u64,
    /// Bytes, at least 1.
    pub len: u64,
    /// The layer that decides: 0 is the top. For [`Kind::Unallocated`] the last one asked.
    pub depth: usize,
    /// Which of the layer's files it is in: see [`Layer::numbered`](crate::chain::Layer::numbered).
    pub file: usize,
    /// What is there.
    pub kind: Kind,
}

/// What a stretch of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes in the layer's file, one after the other from here on.
    Data(HostOffset),
    /// Compressed bytes in the layer's file.
    Compressed,
    /// The layer says that these are zeros; where it has a place for them (a hole in a raw file),
    /// the place.
    Zero(Option<HostOffset>),
    /// No layer says anything: zeros.
    Unallocated,
}

impl Extent {
    /// Does a layer say anything about it? (`present` in `qemu-img map`.)
    pub fn is_present(&self) -> bool {
        self.kind != Kind::Unallocated
    }

    /// Is it known to read as zeros? The others are data.
    pub fn is_zero(&self) -> bool {
        !matches!(self.kind, Kind::Data(_) | Kind::Compressed)
    }

    /// Where it is in the layer's file, if it has a place there.
    pub fn host(&self) -> Option<HostOffset> {
        match self.kind {
            Kind::Data(host) => Some(host),
            Kind::Zero(host) => host,
            Kind::Compressed | Kind::Unallocated => None,
        }
    }

    /// The part of it that begins at this byte of the disk, if it has that.
    pub fn rest_from(&self, at: u64) -> Option<Extent> {
        let skip = at.checked_sub(self.start).filter(|&skip| skip < self.len)?;
        let kind = match self.kind {
            Kind::Data(host) => Kind::Data(HostOffset(host.0 + skip)),
            Kind::Zero(Some(host)) => Kind::Zero(Some(HostOffset(host.0 + skip))),
            kind => kind,
        };
        Some(Extent { start: at, len: self.len - skip, kind, ..*self })
    }

    /// Does `next` go on where this ends, on the disk and in the file?
    pub fn goes_on_in(&self, next: &Extent) -> bool {
        let host_goes_on = match (self.kind, next.kind) {
            (Kind::Data(a), Kind::Data(b)) | (Kind::Zero(Some(a)), Kind::Zero(Some(b))) => {
                a.0.checked_add(self.len) == Some(b.0)
            }
            (a, b) => a == b,
        };
        host_goes_on
            && (self.depth, self.file) == (next.depth, next.file)
            && self.start.checked_add(self.len) == Some(next.start)
    }
}

/// What `offset` is, and for how long; at most `len` bytes, which is at least 1.
///
/// Stretches of the same kind are joined, up to a bounded amount of work: two answers in a row
/// may be of one kind. [`extents`] joins them all.
///
/// # Errors
///
/// [`Error::Invalid`] for an offset beyond the disk; [`Error::Corrupt`] for an invalid table
/// entry; [`Error::Io`].
pub fn status<F: Store>(chain: &Chain<F>, offset: u64, len: u64) -> Result<Extent, Error> {
    /// This many pieces are joined at most.
    const PIECES: usize = 1024;
    let len = len.min(chain.size().saturating_sub(offset));
    if len == 0 {
        return Err(Error::Invalid("beyond the end of the disk".into()));
    }
    let mut extent = piece(chain, offset, len, Holes::Told)?;
    for _ in 1..PIECES {
        if extent.len == len {
            break;
        }
        // An error belongs to whoever asks about that place.
        match piece(chain, offset + extent.len, len - extent.len, Holes::Told) {
            Ok(next) if extent.goes_on_in(&next) => extent.len += next.len,
            _ => break,
        }
    }
    Ok(extent)
}

/// What was last told of a disk that nobody changes: who goes through it in small steps asks the file system, which may
/// look through a whole extent to find its end, once for each extent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known(Option<Extent>);

impl Known {
    /// As [`status`], of the same disk each time.
    ///
    /// # Errors
    ///
    /// As [`status`].
    pub fn status<F: Store>(
        &mut self,
        chain: &Chain<F>,
        offset: u64,
        len: u64,
    ) -> Result<Extent, Error> {
        let rest = self.0.and_then(|extent| extent.rest_from(offset));
        let extent = match rest {
            Some(extent) => extent,
            None => status(chain, offset, u64::MAX)?,
        };
        self.0 = Some(extent);
        Ok(Extent { len: extent.len.min(len), ..extent })
    }
}

/// The whole disk, stretch after stretch, as `qemu-img map` shows it. Ends after an error.
pub fn extents<F: Store>(chain: &Chain<F>) -> Extents<'_, F> {
    extents_in(chain, 0..chain.size())
}

/// As [`extents`], for a part of the disk: what is before and behind it is not looked at.
pub fn extents_in<F: Store>(chain: &Chain<F>, part: Range<u64>) -> Extents<'_, F> {
    let end = part.end.min(chain.size());
    Extents { chain, at: part.start.min(end), end, next: None }
}

/// The iterator that [`extents`] makes.
#[derive(Debug)]
pub struct Extents<'a, F> {
    chain: &'a Chain<F>,
    at: u64,
    end: u64,
    next: Option<Extent>,
}

impl<F: Store> Extents<'_, F> {
    fn ask(&mut self) -> Result<Option<Extent>, Error> {
        let rest = self.end - self.at;
        if rest == 0 {
            return Ok(None);
        }
        let extent = status(self.chain, self.at, rest)?;
        self.at += extent.len;
        Ok(Some(extent))
    }

    fn joined(&mut self) -> Result<Option<Extent>, Error> {
        let mut extent = match self.next.take() {
            Some(extent) => extent,
            None => match self.ask()? {
                Some(extent) => extent,
                None => return Ok(None),
            },
        };
        while let Some(next) = self.ask()? {
            if !extent.goes_on_in(&next) {
                self.next = Some(next);
                break;
            }
            extent.len += next.len;
        }
        Ok(Some(extent))
    }
}

impl<F: Store> Iterator for Extents<'_, F> {
    type Item = Result<Extent, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let result = self.joined();
        if result.is_err() {
            self.at = self.end;
            self.next = None;
        }
        result.transpose()
    }
}

/// Reads the disk from `offset` on into all of `buf`, through the backing files.
///
/// # Errors
///
/// [`Error::Invalid`] if that goes beyond the disk; [`Error::Corrupt`] for an invalid table
/// entry; [`Error::Io`].
pub fn read<F: Store>(chain: &Chain<F>, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
    let end = offset.checked_add(buf.len() as u64);
    if end.is_none_or(|end| end > chain.size()) {
        return Err(Error::Invalid("read beyond the end of the disk".into()));
    }
    let mut done = 0;
    while done < buf.len() {
        let extent = piece(chain, offset + done as u64, (buf.len() - done) as u64, Holes::Ignored)?;
        let part = &mut buf[done..][..extent.len as usize];
        match extent.kind {
            Kind::Data(host) => {
                let file = chain.layers[extent.depth].numbered(extent.file);
                file.read_at(host.0, part).map_err(Error::io("read the image"))?;
            }
            Kind::Compressed => {
                format::read_compressed(&chain.layers[extent.depth], extent.start, part)?
            }
            Kind::Zero(_) | Kind::Unallocated => part.fill(0),
        }
        done += part.len();
    }
    Ok(())
}

/// Where a compressed cluster is in a layer's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// The first byte of the cluster on the disk.
    pub start: u64,
    /// Its bytes there, some of which may lie behind the disk's end.
    pub len: u64,
    /// In which layer it is.
    pub depth: usize,
    /// In which of that layer's files: see [`Layer::numbered`](crate::chain::Layer::numbered).
    pub file: usize,
    /// Where its bytes begin in that file.
    pub host: HostOffset,
    /// Up to the end of the last sector that has some of them. The next cluster's may begin before that.
    pub bytes: u64,
    /// What they are.
    pub(crate) how: How,
}

/// What the bytes of a compressed cluster are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Of qcow2: a stream.
    Cluster(Compression),
    /// Of VMDK: a marker, and a stream. This is the sector that the marker names.
    Grain { lba: u64 },
}

impl Packed {
    /// Bytes of a marker that is in front of the stream.
    pub fn marker(&self) -> u64 {
        match self.how {
            How::Cluster(_) => 0,
            How::Grain { .. } => GRAIN_MARKER_BYTES as u64,
        }
    }

    /// What the file may have there, in at most `room` bytes, so that the cluster reads as `cluster`, which is as long as it
    /// is. `None`: nothing so small is found. It is the same on every machine.
    pub fn pack(&self, cluster: &[u8], room: u64) -> Option<Vec<u8>> {
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        match self.how {
            How::Cluster(compression) => codec::fitted(compression, cluster, room),
            How::Grain { lba } => grain::fitted(lba, cluster, room),
        }
    }
}

/// Where the clusters are that an extent consists of which is [compressed](Kind::Compressed). Ends after an error.
pub fn packed<F: Store>(
    chain: &Chain<F>,
    extent: Extent,
) -> impl Iterator<Item = Result<Packed, Error>> {
    let mut rest = Some(extent);
    std::iter::from_fn(move || {
        let extent = rest.take()?;
        let packed = format::packed(&chain.layers[extent.depth], extent.depth, extent.start);
        rest = packed.as_ref().ok().and_then(|it| extent.rest_from(it.start + it.len));
        Some(packed)
    })
}

/// Whether the file system is asked where a raw file's holes are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holes {
    Told,
    Ignored,
}

/// One lookup: `offset` lies within the disk, and so do the `len` bytes from there, at least 1.
fn piece<F: Store>(chain: &Chain<F>, offset: u64, len: u64, holes: Holes) -> Result<Extent, Error> {
    let mut len = len;
    let mut depth = 0;
    loop {
        let layer = &chain.layers[depth];
        let (kind, n, number) = format::piece(layer, offset, len, holes)?;
        assert!((1..=len).contains(&n), "a lookup answers for 1 to {len} bytes, not {n}");
        // What has no place is in no file.
        let file = if matches!(kind, Kind::Zero(None) | Kind::Unallocated) { 0 } else { number };
        let extent = Extent { start: offset, len: n, depth, file, kind };
        // A backing file that ends before `offset` has nothing to say.
        let rest = match chain.layers.get(depth + 1) {
            Some(below) => below.size().saturating_sub(offset),
            None => 0,
        };
        if kind != Kind::Unallocated || rest == 0 {
            return Ok(extent);
        }
        layer.meta.check_backing()?;
        len = n.min(rest);
        depth += 1;
    }
}

pub(crate) fn raw<F: Store>(
    file: &F,
    offset: u64,
    len: u64,
    holes: Holes,
) -> Result<(Kind, u64), Error> {
    let here = HostOffset(offset);
    if holes == Holes::Ignored {
        return Ok((Kind::Data(here), len));
    }
    let file_len = file.len().map_err(Error::io("find the image's length"))?;
    if offset >= file_len {
        return Ok((Kind::Zero(Some(here)), len));
    }
    let extent = file.extent_at(offset).map_err(Error::io("look for holes"))?;
    let end = if extent.end > offset { extent.end.min(file_len) } else { file_len };
    let kind = if extent.data { Kind::Data(here) } else { Kind::Zero(Some(here)) };
    Ok((kind, len.min(end - offset)))
}
