//! A disk of a real run, as its record tells of it: the names of its files, and their headers and tables. Where a guest's bytes are
//! that a variation looks at there is noise, and zeros elsewhere: a record has no guest's bytes. Where they are compressed there is
//! a stream that can be inflated, of bytes that take no more room than theirs.
//!
//! Its text has all of this, so that a trace can be run again without the record.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use cowbell_engine::Limits;
use cowbell_engine::step::IoKind;
use cowbell_engine::store::Store;
use cowbell_engine::sys::lock::Locking;
use cowbell_engine::units::{FileId, NodeId, Time};
use cowbell_formats::chain::{Chain, OpenOptions, Policy, open_named};
use cowbell_formats::map::{self, Extent, Kind};
use cowbell_formats::name::Backing;
use cowbell_formats::parts::growth::{Grow, Growth};
use cowbell_formats::qcow2::Qcow2Options;
use cowbell_formats::qed::QedOptions;
use cowbell_formats::vdi::VdiOptions;
use cowbell_formats::vmdk::VmdkOptions;
use cowbell_formats::vmdk::disk::descriptor;
use cowbell_formats::{Format, Host, LayerMeta, Name, Node, RunOptions, attach_wrapped};

use crate::backend::{Device, Mode, SimBackend};
use crate::disk::{Contents, SECTOR, Sector, splitmix};
use crate::filter::Over;
use crate::host::{LEN_MAX, SimFile, SimHost};
use crate::kept::{KeptFile, hex, path_of, unhex, word_of};
use crate::shared::Shared;
use crate::subject::{Checked, Copied, SimEngine, Subject};
use crate::subjects::checked;
use crate::workload::Request;

/// See the module.
#[derive(Clone)]
pub struct Recorded(Shared<Parts>);

/// What it is made of.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Its layers' own files and their formats, the disk's first.
    pub layers: Vec<(PathBuf, Format)>,
    /// All files, the lowest layer's first.
    pub files: Vec<File>,
    /// Of these the first so many are of layers below.
    pub still: usize,
    /// The parts of the disk whose bytes are noise.
    pub noise: Vec<Range<u64>>,
    /// The block size of what it lies on.
    pub align: u32,
    /// What makes its file grow.
    pub grow: Grow,
    /// Clusters that are leaks already.
    pub leaks: u64,
    /// What the noise is made from. 0: there is none, but zeros.
    pub seed: u64,
    /// Bytes in a unit and in a piece of a copy of those parts, and pieces in flight at once.
    pub copied: (usize, usize, usize),
    /// The disk beside it, which is copied to it, or it to that.
    pub beside: Option<Recorded>,
    /// Bytes of the disk, and of a cluster. They follow from the rest, as does what comes behind them.
    size: u64,
    cluster: u64,
    /// Is it a stream?
    is_stream: bool,
}

/// What is known of a file.
#[derive(Clone, Debug)]
pub struct File {
    /// Its name.
    pub path: PathBuf,
    /// Its length in bytes.
    pub len: u64,
    /// Is it a device, whose length does not change?
    pub is_fixed: bool,
    /// Sectors that are not zeros.
    pub sectors: BTreeMap<u64, [u8; SECTOR as usize]>,
}

impl File {
    fn contents(&self) -> Contents {
        let mut contents = Contents::default();
        contents.set_len(self.len);
        for (&index, sector) in self.sectors.range(..self.len.div_ceil(SECTOR)) {
            let end = (self.len - index * SECTOR).min(SECTOR) as usize;
            contents.write(index * SECTOR, &sector[..end]);
        }
        if self.is_fixed { contents.with_fixed_len() } else { contents }
    }
}

impl Default for Parts {
    fn default() -> Parts {
        Parts {
            layers: Vec::new(),
            files: Vec::new(),
            still: 0,
            noise: Vec::new(),
            align: SECTOR as u32,
            grow: Grow::Truncate,
            leaks: 0,
            seed: SEED,
            copied: COPIED,
            beside: None,
            size: 0,
            cluster: 0,
            is_stream: false,
        }
    }
}

impl Parts {
    /// A disk that was opened over what a record kept, before anything was asked of it.
    ///
    /// # Errors
    ///
    /// When it is too large to be simulated.
    pub fn of<F: Store>(
        chain: &Chain<KeptFile<F>>,
        align: u32,
        growth: Option<Growth>,
    ) -> Result<Parts, String> {
        let layers = chain.layers.iter().map(|layer| (layer.path.clone(), layer.format));
        let (mut files, mut still) = (Vec::new(), 0);
        for layer in chain.layers.iter().rev() {
            still = files.len();
            for file in [&layer.file].into_iter().chain(&layer.more) {
                let len = file.len().map_err(|why| why.to_string())?;
                let (path, is_fixed) = (file.name().into(), file.has_fixed_len());
                files.push(File { path, len, is_fixed, sectors: file.sectors() });
            }
        }
        let grow = growth.unwrap_or_default().by;
        let parts = Parts { files, still, align, grow, ..Parts::default() };
        Ok(Parts { layers: layers.collect(), ..parts })
    }

    fn check(&self) -> Result<(), String> {
        let wrong = |what: &str| Err(format!("{what} are more than can be simulated"));
        if self.files.len() > NAMES.len() {
            return wrong(&format!("{} files", self.files.len()));
        }
        if self.layers.len() > NAMES.len() || self.layers.is_empty() {
            return wrong(&format!("{} layers", self.layers.len()));
        }
        let bytes = self.files.iter().fold(0_u64, |sum, file| sum.saturating_add(file.len));
        if bytes > LEN_MAX {
            return wrong(&format!("{bytes} bytes of files"));
        }
        if !self.noise.is_sorted_by(|one, next| one.end <= next.start) {
            return Err("its parts are not in order".into());
        }
        let noise = self
            .noise
            .iter()
            .try_fold(0_u64, |sum, part| sum.checked_add(part.end.checked_sub(part.start)?));
        if !matches!(noise, Some(0..=NOISE_MAX)) {
            return wrong("the bytes of the clusters that are looked at");
        }
        if self.beside.as_ref().is_some_and(|beside| beside.0.noise != self.noise) {
            return Err("of the disk beside it other parts are looked at".into());
        }
        let (unit, piece, in_flight) = self.copied;
        match (unit, piece, in_flight) {
            (512..=PIECE_MAX, 4096..=PIECE_MAX, 1..=8) if unit <= piece => Ok(()),
            _ => Err(format!("nothing is copied by {unit}, {piece} and {in_flight}")),
        }
    }

    fn name(&self) -> Name {
        let mut backing = Backing::Nothing;
        for (path, format) in self.layers.iter().skip(1).rev() {
            let name = Name { backing, ..Name::plain(path, Some(*format)) };
            backing = Backing::Named(Box::new(name));
        }
        let (path, format) = &self.layers[0];
        Name { backing, ..Name::plain(path, Some(*format)) }
    }
}

/// A folder of simulated files, under the names that they had.
struct Renamed<'a> {
    host: &'a SimHost,
    files: &'a [File],
}

impl Host for Renamed<'_> {
    type File = SimFile;

    fn open(&self, path: &Path, write: bool) -> io::Result<SimFile> {
        let at = self.files.iter().position(|file| file.path == path);
        self.host.open(Path::new(NAMES[at.ok_or(io::ErrorKind::NotFound)?]), write)
    }

    fn create_new(&self, _: &Path) -> io::Result<SimFile> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn remove(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(path.into())
    }

    fn entropy(&self) -> u32 {
        self.host.entropy()
    }

    fn identity(&self, file: &SimFile) -> io::Result<(u64, u64)> {
        self.host.identity(file)
    }
}

impl Recorded {
    /// Of these parts.
    ///
    /// # Errors
    ///
    /// When it is too large, or cannot be opened.
    pub fn new(parts: Parts) -> Result<Recorded, String> {
        parts.check()?;
        let host = SimHost::new();
        let mut made = Recorded(Shared::new(parts));
        made.put(&host);
        let chain = made.chain(&host, false)?;
        let (mut files, mut still) = (Vec::new(), 0);
        for layer in chain.layers.iter().rev() {
            still = files.len();
            for file in [&layer.file].into_iter().chain(&layer.more) {
                files.push(host.identity(file).map_err(|why| why.to_string())?);
            }
        }
        let named = NAMES.iter().take(made.0.files.len()).map(|name| {
            let file = host.open(Path::new(name), false)?;
            host.identity(&file)
        });
        let named: io::Result<Vec<_>> = named.collect();
        if named.map_err(|why| why.to_string())? != files || still != made.0.still {
            return Err("its files are others than it says".into());
        }
        let mut clusters = 0_u64;
        for layer in &chain.layers {
            let Some(cluster) = layer.meta.cluster_size() else { continue };
            for file in [&layer.file].into_iter().chain(&layer.more) {
                clusters += file.len().map_err(|why| why.to_string())? / cluster.max(SECTOR);
            }
        }
        if clusters > CLUSTERS_MAX {
            return Err(format!("{clusters} clusters are more than can be simulated"));
        }
        let top = &chain.layers[0].meta;
        let cluster = top.cluster_size().unwrap_or(super::CLUSTER).max(SECTOR);
        let is_stream = matches!(top, LayerMeta::Vmdk(image)
            if image.descriptor.kind == descriptor::Kind::StreamOptimized);
        let parts = Parts { size: chain.size(), cluster, is_stream, ..(*made.0).clone() };
        made.0 = Shared::new(parts);
        Ok(made)
    }

    /// Is it a stream, which is an image only when it was closed?
    pub fn is_stream(&self) -> bool {
        self.0.is_stream
    }

    /// Its parts.
    pub fn parts(&self) -> &Parts {
        &self.0
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.0.layers[0].1
    }

    /// The same beside another disk; a copy is of what of both is looked at.
    ///
    /// # Errors
    ///
    /// When that cannot be.
    pub fn copying(
        &self,
        beside: Option<Recorded>,
        copied: (usize, usize, usize),
    ) -> Result<Recorded, String> {
        Recorded::new(Parts { beside, copied, ..(*self.0).clone() })
    }

    /// The same with noise of another kind; 0: with none.
    ///
    /// # Errors
    ///
    /// As [`Recorded::new`].
    pub fn seeded(&self, seed: u64) -> Result<Recorded, String> {
        Recorded::new(Parts { seed, ..(*self.0).clone() })
    }

    /// Where the first byte is that may be something else than zeros, and where the last one ends, in layers of this depth and
    /// below: as far as the disk's first stretches tell.
    ///
    /// # Errors
    ///
    /// When its tables are not whole.
    pub fn data(&self, depth: usize) -> Result<Option<Range<u64>>, String> {
        let host = SimHost::new();
        self.put(&host);
        let chain = self.chain(&host, false)?;
        let mut data: Option<Range<u64>> = None;
        for extent in map::extents(&chain).take(EXTENTS_MAX) {
            let extent = extent.map_err(|why| why.to_string())?;
            if !extent.is_zero() && extent.depth >= depth {
                let start = data.map_or(extent.start, |data| data.start);
                data = Some(start..extent.start + extent.len);
            }
        }
        Ok(data)
    }

    /// The same with other files, of which so many clusters are leaks.
    fn with(
        &self,
        files: Vec<File>,
        noise: Vec<Range<u64>>,
        leaks: u64,
    ) -> Result<Recorded, String> {
        Recorded::new(Parts { files, noise, leaks, ..(*self.0).clone() })
    }

    /// Puts its files there, without noise.
    fn put(&self, host: &SimHost) {
        for (file, name) in self.0.files.iter().zip(NAMES) {
            host.put(name, file.contents());
        }
    }

    fn chain(&self, host: &SimHost, write: bool) -> Result<Chain<SimFile>, String> {
        let host = Renamed { host, files: &self.0.files };
        let options = options(write);
        open_named(&host, &self.0.name(), &options).map_err(|why| why.to_string())
    }

    fn run_options(&self) -> RunOptions {
        let step = AHEAD * self.0.cluster;
        let growth = Growth { by: self.0.grow, step_min: step, step_max: step };
        let qed = QedOptions { cache_slices: SLICES, growth, ..QedOptions::default() };
        let vmdk = VmdkOptions {
            cache_tables: SLICES,
            cache_grains: 2,
            growth,
            entropy: Some(0x00c0_ffee),
            ..VmdkOptions::default()
        };
        let qcow2 = Qcow2Options {
            cache_slices: SLICES,
            cache_inflated: 1,
            deflate_depth: 1,
            cache_packed: 3,
            growth,
            reserve_max: AHEAD,
            reserve_min: AHEAD,
            writeback_depth: BUFFERS,
            ..Qcow2Options::default()
        };
        let vdi = VdiOptions { growth, ..VdiOptions::default() };
        RunOptions { trust_probed: false, quota: None, qed, qcow2, vmdk, vdi }
    }

    /// The same after these requests, one after the other, and then closed; in `looked_at` its bytes are noise.
    ///
    /// # Errors
    ///
    /// When its tables cannot be made whole, or something goes wrong.
    pub fn after(
        &self,
        requests: impl Iterator<Item = Request>,
        looked_at: Vec<Range<u64>>,
    ) -> Result<Recorded, String> {
        let host = SimHost::new();
        let requests: Vec<Request> = requests.collect();
        self.put(&host);
        // Tables that the run has not read are missing: what refers to them is put right.
        if self.check_all(&host)?.corruptions > 0 {
            self.repair(&host)?;
            let left = self.check_all(&host)?.corruptions;
            if left > 0 {
                return Err(format!("its tables are not whole: {left} corruptions"));
            }
        }
        // Who writes a part of a compressed cluster inflates it.
        let parts: Vec<Range<u64>> =
            requests.iter().map(|request| reach(request, self.0.size)).collect();
        let mut files = self.contents(&host)?;
        self.pack(&host, &mut files, &parts, &POOREST, PACKED_BEFORE_MAX)?;
        NAMES.iter().zip(files).for_each(|(name, contents)| host.put(*name, contents));
        let mut engine = SimEngine::new(SimBackend::new(self.device(), Mode::Fifo), self.limits());
        let node = self.open(&host, &mut engine)?;
        for (done, request) in requests.into_iter().enumerate() {
            self.ask(&mut engine, node, request);
            if done % FLUSHED_EACH == FLUSHED_EACH - 1 {
                self.ask(&mut engine, node, Request::flush());
            }
        }
        engine.drain();
        for _ in 0..RUNS_MAX {
            if engine.drained().is_some() {
                break;
            }
            engine.run(Time(0));
        }
        let drained = engine.drained().ok_or("it does not come to rest")?;
        drained.map_err(|errno| format!("it could not be closed: {errno}"))?;
        for (at, name) in NAMES.iter().take(self.0.files.len()).enumerate() {
            host.put(*name, engine.backend().file(FileId(at as u32)).now().clone());
        }
        let leaks = self.check_all(&host)?.leaks;
        // What is a guest's is not kept.
        let guests = self.guests(&host)?;
        let mut files = self.0.files.clone();
        let now = self.contents(&host)?;
        for ((at, file), (now, guests)) in files.iter_mut().enumerate().zip(now.iter().zip(&guests))
        {
            // Nobody writes to a layer below: there are streams, and nothing else is new.
            let contents = if at < self.0.still { &file.contents() } else { now };
            file.len = contents.len();
            file.sectors.clear();
            for (index, sector) in contents.filled() {
                let mut bytes = *sector.bytes();
                guests.clear(index, &mut bytes);
                if bytes != [0; SECTOR as usize] {
                    file.sectors.insert(index, bytes);
                }
            }
        }
        let after = self.with(files, looked_at, leaks)?;
        after.make(&SimHost::new())?;
        Ok(after)
    }

    /// Asks for something, and waits for it. A guest's bytes are zeros: they are not looked at.
    fn ask(&self, engine: &mut SimEngine<Over<Node>>, node: NodeId, request: Request) {
        use cowbell_engine::mem::{Buf, Mem};
        let mem = match request.kind {
            IoKind::Write { compressed: false, .. } => Buf::zeroed(request.len as usize).into(),
            _ => request.memory(1).map_or(Mem::None, Mem::Owned),
        };
        if engine.submit(node, request.io(), mem, 0).is_err() {
            return;
        }
        for _ in 0..RUNS_MAX {
            engine.run(Time(0));
            // What has failed has failed in the run, too.
            if engine.poll().is_some() {
                return;
            }
        }
    }

    /// What of each file is a guest's.
    fn guests(&self, host: &SimHost) -> Result<Vec<Bytes>, String> {
        let mut guests = vec![Bytes::default(); self.0.files.len()];
        let chain = self.chain(host, false)?;
        let first = first_files(&chain);
        for extent in self.map_of(&chain)? {
            match extent.kind {
                Kind::Data(place) => {
                    guests[first[extent.depth] + extent.file].add(place.0, extent.len);
                }
                Kind::Compressed => {
                    for packed in map::packed(&chain, extent) {
                        let packed = packed.map_err(|why| why.to_string())?;
                        let (marker, file) = (packed.marker(), first[packed.depth] + packed.file);
                        guests[file].add(packed.host.0 + marker, packed.bytes - marker);
                    }
                }
                Kind::Zero(_) | Kind::Unallocated => {}
            }
        }
        guests.iter_mut().for_each(Bytes::sort);
        Ok(guests)
    }

    fn check_all(&self, host: &SimHost) -> Result<Checked, String> {
        checked(&self.chain(host, false)?.layers[0]).map(|(checked, _)| checked)
    }

    fn contents(&self, host: &SimHost) -> Result<Vec<Contents>, String> {
        let names = NAMES.iter().take(self.0.files.len());
        names.map(|name| host.contents(name).ok_or_else(|| "a file is gone".to_string())).collect()
    }

    /// Fills the parts that are looked at with noise.
    fn fill(&self, host: &SimHost) -> Result<(), String> {
        let mut files = self.contents(host)?;
        for extent in self.map(host)? {
            for part in &self.0.noise {
                let from = part.start.max(extent.start);
                let to = part.end.min(extent.start + extent.len);
                let Kind::Data(place) = extent.kind else { continue };
                if from >= to {
                    continue;
                }
                let at = files.len() - 1 - extent.depth;
                let (first, end) = (place.0 + (from - extent.start), place.0 + (to - extent.start));
                for index in first / SECTOR..end.div_ceil(SECTOR) {
                    let start = first.max(index * SECTOR);
                    let end = end.min((index + 1) * SECTOR).min(files[at].len());
                    if start < end {
                        let noise = Sector::noise(self.0.seed ^ (at as u64) << 56, index);
                        let (from, to) = (start % SECTOR, start % SECTOR + (end - start));
                        files[at].write(start, &noise.bytes()[from as usize..to as usize]);
                    }
                }
            }
        }
        self.pack(host, &mut files, &self.0.noise, &RICHEST_FIRST, NOISE_MAX)?;
        NAMES.iter().zip(files).for_each(|(name, contents)| host.put(*name, contents));
        Ok(())
    }

    /// Puts a stream in the place of each compressed cluster that these parts of the disk lie in: of so many bytes of noise in a sector
    /// as fit first. The clusters together have `max` bytes at most.
    fn pack(
        &self,
        host: &SimHost,
        files: &mut [Contents],
        parts: &[Range<u64>],
        noise: &[Option<usize>],
        max: u64,
    ) -> Result<(), String> {
        let chain = self.chain(host, false)?;
        let first = first_files(&chain);
        let (mut places, mut bytes) = (BTreeMap::new(), 0);
        for part in parts {
            for extent in map::extents_in(&chain, part.clone()) {
                let extent = extent.map_err(|why| why.to_string())?;
                let compressed = (extent.kind == Kind::Compressed).then_some(extent);
                for packed in compressed.into_iter().flat_map(|it| map::packed(&chain, it)) {
                    let packed = packed.map_err(|why| why.to_string())?;
                    let place = (first[packed.depth] + packed.file, packed.host.0);
                    if places.insert(place, packed).is_none() {
                        bytes += packed.len;
                    }
                    if bytes > max {
                        return Err(format!(
                            "the compressed clusters that requests go to have more than {max} bytes"
                        ));
                    }
                }
            }
        }
        let mut next = places.keys().skip(1);
        for (&(file, at), packed) in &places {
            // The next one may begin in the sector where this one ends.
            let next = next.next().filter(|next| next.0 == file).map_or(u64::MAX, |next| next.1);
            let end = next.min(at.saturating_add(packed.bytes)).min(files[file].len());
            let room = end.saturating_sub(at);
            let mut cluster = vec![0; packed.len as usize];
            let mut streams = noise.iter().filter_map(|&noise| {
                fill_poorly(noise, self.0.seed ^ (file as u64) << 56 ^ at, &mut cluster);
                packed.pack(&cluster, room)
            });
            let Some(stream) = streams.next() else {
                return Err(format!(
                    "the compressed cluster at {:#x} of the disk has {room} bytes in its file: nothing is known that becomes so small",
                    packed.start
                ));
            };
            files[file].write(at, &stream);
        }
        Ok(())
    }

    fn map_of(&self, chain: &Chain<SimFile>) -> Result<Vec<Extent>, String> {
        let size = chain.size();
        let mut extents = Vec::new();
        if size <= MAPPED_MAX || self.0.noise.is_empty() {
            extents.extend(map::extents(chain).take(EXTENTS_MAX));
        } else {
            let gained = self.0.size..size;
            let mut end = 0;
            for part in self.0.noise.iter().chain([&gained]).filter(|part| part.start < size) {
                let (start, depth) = (part.start, chain.layers.len() - 1);
                let kind = Kind::Unallocated;
                let between = Extent { start: end, len: start - end, depth, file: 0, kind };
                extents.extend((start > end).then_some(Ok(between)));
                let left = EXTENTS_MAX.saturating_sub(extents.len());
                extents.extend(map::extents_in(chain, part.clone()).take(left));
                end = part.end.min(size);
            }
            let (len, depth) = (size - end.min(size), chain.layers.len() - 1);
            let kind = Kind::Unallocated;
            let behind = Extent { start: end, len, depth, file: 0, kind };
            extents.extend((len > 0).then_some(Ok(behind)));
        }
        let extents: Result<Vec<Extent>, _> = extents.into_iter().collect();
        let extents = extents.map_err(|why| why.to_string())?;
        if extents.len() >= EXTENTS_MAX {
            return Err("it is in more pieces than can be simulated".into());
        }
        Ok(extents)
    }
}

/// Each sector begins with so many bytes of noise; the others are all the same. `None`: what takes the least room.
fn fill_poorly(noise: Option<usize>, seed: u64, cluster: &mut [u8]) {
    let Some(noise) = noise else { return cluster.fill(u8::MAX) };
    let seed = splitmix(seed);
    cluster.fill(seed as u8 | 1);
    for (index, sector) in (0..).zip(cluster.chunks_mut(SECTOR as usize)) {
        let noise = noise.min(sector.len());
        sector[..noise].copy_from_slice(&Sector::noise(seed, index).bytes()[..noise]);
    }
}

/// What a request is about, of a disk of `size` bytes: of a new size, what is around the end.
pub(crate) fn reach(request: &Request, size: u64) -> Range<u64> {
    match request.kind {
        IoKind::Truncate => {
            let end = request.offset.min(size);
            end.saturating_sub(1)..end.saturating_add(1)
        }
        _ => request.offset..request.offset.saturating_add(request.len),
    }
}

/// The number of each layer's first file, the lowest layer's being 0.
fn first_files<F>(chain: &Chain<F>) -> Vec<usize> {
    let mut first = vec![0; chain.layers.len()];
    for depth in (0..chain.layers.len() - 1).rev() {
        first[depth] = first[depth + 1] + 1 + chain.layers[depth + 1].more.len();
    }
    first
}

/// Parts of a file.
#[derive(Clone, Debug, Default)]
struct Bytes(Vec<Range<u64>>);

impl Bytes {
    fn add(&mut self, place: u64, len: u64) {
        self.0.push(place..place.saturating_add(len));
    }

    /// Streams may overlap: no part ends before another that begins before it.
    fn sort(&mut self) {
        self.0.sort_unstable_by_key(|part| part.start);
        let mut end = 0;
        for part in &mut self.0 {
            end = part.end.max(end);
            part.end = end;
        }
    }

    /// Makes zeros of what of a sector is in them.
    fn clear(&self, index: u64, bytes: &mut [u8; SECTOR as usize]) {
        let sector = index * SECTOR..(index + 1) * SECTOR;
        let behind = self.0.partition_point(|part| part.start < sector.end);
        let parts = self.0[..behind].iter().rev();
        for part in parts.take_while(|part| part.end > sector.start) {
            let (from, to) = (part.start.max(sector.start), part.end.min(sector.end));
            bytes[(from - sector.start) as usize..(to - sector.start) as usize].fill(0);
        }
    }
}

fn options(write: bool) -> OpenOptions {
    OpenOptions {
        write,
        backing: Policy::Any,
        files: Policy::Any,
        locking: Locking::Off,
        ..OpenOptions::default()
    }
}

/// What the files are called here.
const NAMES: [&str; 16] = [
    "file-0", "file-1", "file-2", "file-3", "file-4", "file-5", "file-6", "file-7", "file-8",
    "file-9", "file-10", "file-11", "file-12", "file-13", "file-14", "file-15",
];
/// Clusters in all files, at most: a check counts each, after every crash.
const CLUSTERS_MAX: u64 = 1 << 25;
/// Bytes of clusters that are looked at, at most.
pub(crate) const NOISE_MAX: u64 = 16 << 20;
/// What the noise is made from, of a disk and of the one beside it.
const SEED: u64 = 0x5eed;
pub(crate) const SEED_BESIDE: u64 = 0xbe51de;
/// A copy of which nothing else is said.
const COPIED: (usize, usize, usize) = (512, 4096, 2);
/// Bytes of a piece, at most.
pub(crate) const PIECE_MAX: usize = 2 << 20;
/// Clusters by which files grow, and which are counted ahead.
const AHEAD: u64 = 4;
/// Table slices in memory.
const SLICES: usize = 4;
/// Buffers.
const BUFFERS: usize = 4;
/// Among requests that are done one after the other, there is a flush behind each so many.
const FLUSHED_EACH: usize = 64;
/// More than anybody needs for one request.
const RUNS_MAX: usize = 1 << 16;
const TURN: Duration = Duration::from_micros(500);
/// Bytes of noise in each sector of what is compressed: what fits first is taken. With none, clusters differ and their sectors do not.
const RICHEST_FIRST: [Option<usize>; 7] =
    [Some(448), Some(128), Some(32), Some(8), Some(2), Some(0), None];
/// Where nobody looks at it.
const POOREST: [Option<usize>; 1] = [None];
/// Bytes of compressed clusters that requests go to before those that are varied, at most.
const PACKED_BEFORE_MAX: u64 = 1 << 30;

impl Subject for Recorded {
    type Driver = Over<Node>;

    fn name(&self) -> String {
        format!("a {} image of a real run", self.format())
    }

    fn text(&self) -> String {
        self.to_string()
    }

    fn about(&self) -> String {
        let layers: Vec<String> = self
            .0
            .layers
            .iter()
            .map(|(path, format)| format!("{} ({format})", path.display()))
            .collect();
        let sectors: usize = self.0.files.iter().map(|file| file.sectors.len()).sum();
        format!("of a real run: {}; {sectors} sectors of tables", layers.join(" over "))
    }

    fn size_max(&self) -> u64 {
        self.0.size.max(LEN_MAX)
    }

    fn device(&self) -> Device {
        Device {
            request_align: self.0.align,
            memory_align: 1,
            hole_align: if self.0.align == 1 { 1 } else { 4096 },
            depth: 64,
            can_grow: !self.0.files.last().is_some_and(|file| file.is_fixed),
            nanos_per_op: 0,
            can_zero: true,
            bounce_from: BUFFERS as u32,
            lie: None,
        }
    }

    fn limits(&self) -> Limits {
        let beside = self.0.beside.as_ref().map_or(0, Subject::cluster);
        let largest = self.0.cluster.max(beside);
        Limits {
            requests: 1,
            ops: 64,
            buffers: BUFFERS,
            bounce_buffers: 1,
            buffer_size: largest.clamp(4096, 1 << 16) as usize,
            zeros_written: 0,
            discards_kept: 2,
            steps: 1 << 16,
            turn: TURN,
            measure: false,
        }
    }

    fn make(&self, host: &SimHost) -> Result<(), String> {
        self.put(host);
        if self.0.seed != 0 {
            self.fill(host)?;
        }
        // Whoever begins with it reads it.
        for part in &self.0.noise {
            let there = part.start..part.end.min(self.0.size);
            if !there.is_empty() {
                self.read(host, there.start, &mut vec![0; (there.end - there.start) as usize])?;
            }
        }
        Ok(())
    }

    fn files(&self) -> Vec<&'static str> {
        NAMES[..self.0.files.len()].to_vec()
    }

    fn still_files(&self) -> usize {
        self.0.still
    }

    fn is_unfinished(&self, files: &[Contents]) -> bool {
        let host = SimHost::new();
        for (name, contents) in NAMES.iter().zip(files).take(self.0.files.len()) {
            host.put(*name, contents.clone());
        }
        self.0.is_stream && self.chain(&host, false).is_err()
    }

    fn beside(&self) -> Option<Recorded> {
        self.0.beside.clone()
    }

    fn copied(&self) -> Option<Copied<'_>> {
        let (unit, piece, in_flight) = self.0.copied;
        Some(Copied { parts: &self.0.noise, unit, piece, in_flight })
    }

    fn has_raw_below(&self) -> bool {
        let is_raw = self.0.layers.last().is_some_and(|(_, format)| *format == Format::Raw);
        is_raw && self.0.layers.len() == 2 && self.0.still == 1
    }

    fn may_be_full(&self) -> bool {
        self.0.files.last().is_some_and(|file| file.is_fixed)
    }

    fn open(&self, host: &SimHost, engine: &mut SimEngine<Over<Node>>) -> Result<NodeId, String> {
        let chain = self.chain(host, true)?;
        attach_wrapped(engine, chain, None, &self.run_options()).map_err(|why| why.to_string())
    }

    fn size(&self) -> u64 {
        self.0.size
    }

    fn size_unit(&self) -> u64 {
        if self.format() == Format::Raw { self.0.align.max(512).into() } else { 1 }
    }

    fn cluster(&self) -> u64 {
        self.0.cluster
    }

    fn discard_unit(&self) -> u64 {
        if self.format() == Format::Raw { 512 } else { self.0.cluster }
    }

    fn marks_leaks(&self) -> bool {
        self.format() == Format::Qed && self.0.layers.len() == 1
    }

    fn writes_back(&self) -> bool {
        self.format() != Format::Raw
    }

    fn read(&self, host: &SimHost, offset: u64, bytes: &mut [u8]) -> Result<(), String> {
        map::read(&self.chain(host, false)?, offset, bytes).map_err(|why| why.to_string())
    }

    fn check(&self, host: &SimHost) -> Result<Checked, String> {
        let checked = self.check_all(host)?;
        Ok(Checked { leaks: checked.leaks.saturating_sub(self.0.leaks), ..checked })
    }

    fn map(&self, host: &SimHost) -> Result<Vec<Extent>, String> {
        let chain = self.chain(host, false)?;
        let first = first_files(&chain);
        let mut extents = self.map_of(&chain)?;
        for extent in &mut extents {
            let file = first[extent.depth] + extent.file;
            extent.depth = self.0.files.len() - 1 - file.min(self.0.files.len() - 1);
            extent.file = 0;
        }
        Ok(extents)
    }

    fn recover(&self, host: &SimHost) -> Result<(), String> {
        self.chain(host, true).map(|_| ())
    }

    fn repair(&self, host: &SimHost) -> Result<(), String> {
        let (path, format) = &self.0.layers[0];
        if *format == Format::Raw {
            return Ok(());
        }
        let options =
            OpenOptions { format: Some(*format), ignore_need_check: true, ..options(true) };
        super::repair(&Renamed { host, files: &self.0.files }, path, &options)
    }

    fn assert_idle(&self, driver: &Over<Node>) {
        if let Over::Below(node) = driver {
            node.assert_idle();
        }
    }
}

/// Of a larger disk it is only asked where the bytes are that are looked at, after a crash. All others are zeros.
const MAPPED_MAX: u64 = 1 << 30;
/// Pieces of a disk, at most.
const EXTENTS_MAX: usize = 1 << 16;

impl PartialEq for Recorded {
    fn eq(&self, other: &Recorded) -> bool {
        Shared::ptr_eq(&self.0, &other.0) || self.to_string() == other.to_string()
    }
}

impl fmt::Debug for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.about())
    }
}

/// The first word of its text.
pub const WORD: &str = "recorded";
/// The word behind which comes the text of the disk beside.
const BESIDE: &str = "beside";

impl fmt::Display for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { layers, files, still, noise, align, grow, leaks, seed, .. } = &*self.0;
        let grow = match grow {
            Grow::Truncate => "truncate",
            Grow::Allocate => "allocate",
            Grow::Write => "write",
        };
        write!(f, "{WORD} still={still} align={align} grow={grow} leaks={leaks}")?;
        if *seed != SEED {
            write!(f, " seed={seed}")?;
        }
        if self.0.copied != COPIED {
            let (unit, piece, in_flight) = self.0.copied;
            write!(f, " copied={unit}:{piece}:{in_flight}")?;
        }
        for (path, format) in layers {
            write!(f, " layer={}:{format}", word_of(path))?;
        }
        for part in noise {
            write!(f, " noise={}:{}", part.start, part.end)?;
        }
        for File { path, len, is_fixed, sectors } in files {
            write!(f, " file={}:{len}:{}", word_of(path), u8::from(*is_fixed))?;
            for (index, sector) in sectors {
                let used = sector.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
                write!(f, " at={index}:{}", hex(&sector[..used]))?;
            }
        }
        match &self.0.beside {
            Some(beside) => write!(f, " {BESIDE} {beside}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Recorded {
    type Err = String;

    fn from_str(text: &str) -> Result<Recorded, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let behind = words.iter().position(|&word| word == BESIDE).unwrap_or(words.len());
        let (mut parts, beside) = (Parts::of_words(&words[..behind])?, words.get(behind + 1..));
        if let Some(beside) = beside {
            parts.beside = Some(Recorded::new(Parts::of_words(beside)?)?);
        }
        Recorded::new(parts)
    }
}

impl Parts {
    fn of_words(words: &[&str]) -> Result<Parts, String> {
        let Some((&WORD, words)) = words.split_first() else {
            return Err("this is no image of a real run".into());
        };
        let mut parts = Parts::default();
        for word in words {
            parts.take(word).ok_or_else(|| format!("'{word:.60}' says nothing of an image"))?;
        }
        match parts.still >= parts.files.len() {
            true => Err("it has no file of its own".into()),
            false => Ok(parts),
        }
    }

    /// What a word of the text says.
    fn take(&mut self, word: &str) -> Option<()> {
        let (key, value) = word.split_once('=')?;
        let mut values = value.split(':');
        let mut next = || values.next();
        match key {
            "still" => self.still = value.parse().ok()?,
            "align" => {
                let align = value.parse().ok();
                self.align =
                    align.filter(|align: &u32| align.is_power_of_two() && *align <= 4096)?;
            }
            "grow" => {
                self.grow = match value {
                    "truncate" => Grow::Truncate,
                    "allocate" => Grow::Allocate,
                    "write" => Grow::Write,
                    _ => return None,
                };
            }
            "leaks" => self.leaks = value.parse().ok()?,
            "seed" => self.seed = value.parse().ok()?,
            "copied" => {
                let mut number = || next()?.parse().ok();
                self.copied = (number()?, number()?, number()?);
            }
            "layer" => {
                let (path, format) = (path_of(next()?)?, Format::from_name(next()?)?);
                self.layers.push((path, format));
            }
            "noise" => self.noise.push(next()?.parse().ok()?..next()?.parse().ok()?),
            "file" => {
                let (path, len) = (path_of(next()?)?, next()?.parse().ok()?);
                let is_fixed = next()? == "1";
                self.files.push(File { path, len, is_fixed, sectors: BTreeMap::new() });
            }
            "at" => {
                let (index, bytes) = (next()?.parse().ok()?, unhex(next()?)?);
                let mut sector = [0; SECTOR as usize];
                sector.get_mut(..bytes.len())?.copy_from_slice(&bytes);
                self.files.last_mut()?.sectors.insert(index, sector);
            }
            _ => return None,
        }
        Some(())
    }
}
