//! Images of the formats there are, made small: the subjects of all real tests.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use cowbell_engine::Limits;
use cowbell_engine::step::{Driver, Io};
use cowbell_engine::store::Store;
use cowbell_engine::units::{NodeId, Time};
use cowbell_formats::chain::{self, Chain, Layer, OpenOptions, Policy};
use cowbell_formats::check::{Event, Repair, Unwatched, Watch, check_layer};
use cowbell_formats::parts::growth::{Grow, Growth};
use cowbell_formats::qcow2::Qcow2Options;
use cowbell_formats::qed::QedOptions;
use cowbell_formats::vdi::VdiOptions;
use cowbell_formats::vmdk::VmdkOptions;
use cowbell_formats::{
    CreateOptions, Format, Host, LayerMeta, Node, RunOptions, attach_wrapped, create, map,
};

use crate::backend::{Damaged, Device, IsMetadata, Lie, Mode, SimBackend};
use crate::disk::{Contents, SECTOR, Sector};
use crate::filter::{Filter, Over};
use crate::gate::{Scope, Shape, scopes_on, workloads};
use crate::host::{SimFile, SimHost};
use crate::subject::{Checked, SimEngine, Subject};
use crate::workload::{Request, Workload};
use crate::world::{Budget, QUIET};

mod qcow2;
mod qed;
mod raw;
pub mod recorded;
mod text;
mod vdi;
mod vmdk;

/// What an image is like at first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// Nothing is allocated.
    Cold,
    /// Clusters 0 and 1 of the first table and 0 of the second are.
    Warm,
    /// The same clusters say that they are zeros.
    Zeros,
    /// As `Warm`, and a snapshot shares all of it. Only qcow2 has such.
    Shared,
    /// As `Warm`, with clusters of the file before them that were used, and are not any more.
    Holes,
}

/// What an image lies on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Medium {
    /// A file, as long as is needed.
    File,
    /// A device: its length is fixed, what nobody has written is noise. Behind the image, as it is
    /// made, there are so many clusters.
    Device(u64),
}

/// How a VMDK or VDI image is laid out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Layout {
    /// One extent, with all its tables.
    Plain,
    /// Two extents; the border is that of the first two clusters.
    Split,
    /// One extent; its tables are allocated when they are needed.
    Lazy,
    /// A VDI image as QEMU makes it: its map in the header's block, its data right behind.
    Tight,
    /// A VMDK stream: whole clusters, each written once.
    Stream,
}

/// What the simulator knows of a format, and tries of it besides what it tries of all: a file each.
pub(crate) trait FormatSubject: Sync {
    /// Bytes that one table maps; of a format that has none, a few clusters.
    fn span(&self, image: &Image) -> u64;

    /// Makes the files of an image in which nothing is allocated.
    fn make(&self, image: &Image, host: &SimHost) -> Result<(), String>;

    /// What is still to be done with an image that was filled.
    fn filled(&self, _image: &Image, _host: &SimHost) -> Result<(), String> {
        Ok(())
    }

    /// See [`Subject::holes`].
    fn holes(&self, _image: &Image, _file: &Contents) -> Option<u64> {
        Some(0)
    }

    /// See [`Subject::metadata`].
    fn metadata(&self) -> Option<IsMetadata>;

    /// Changes of the disk's size.
    fn resizes(&self) -> &'static [Shape];

    /// The kinds of image that most scopes are run on.
    fn images(&self) -> Vec<Image>;

    /// More kinds, for smaller scopes: they differ from the others in how their files grow, or in how
    /// they copy.
    fn growing_images(&self) -> Vec<Image> {
        Vec::new()
    }

    /// More kinds, for changes of the disk's size: the backing file is longer than it.
    fn long_images(&self) -> Vec<Image> {
        Vec::new()
    }

    /// More kinds, for what lasts over several sessions.
    fn kept_images(&self, _plain: Image) -> Vec<Image> {
        Vec::new()
    }

    /// Devices: of a fixed length, full of noise, which are not cut. With a fault for single requests
    /// and, where all fits, for the most telling pairs; full ones with what makes room.
    fn device_scopes(&self) -> Vec<Scope>;

    /// The format of a disk beside one of this.
    fn beside(&self) -> Format {
        Format::Qcow2
    }

    /// A few workloads that are known to be telling.
    fn special(&self) -> Vec<Scope>;

    /// More scopes for the gate: images that do not take what others take.
    fn own_scopes(&self) -> Vec<Scope> {
        Vec::new()
    }

    /// See [`Subject::is_unfinished`].
    fn is_unfinished(&self, _image: &Image, _files: &[Contents]) -> bool {
        false
    }

    /// Bytes of the header that are the only ones to say what they say: how large the disk is, what is
    /// below it.
    fn only_in_header(&self) -> &'static [Range<usize>] {
        &[]
    }

    /// Bytes of the file from its beginning on that are the header's.
    fn header_len(&self, _image: &Image) -> u64 {
        SECTOR
    }

    /// What a sector of a table, number `index` of its file, refers to, up to what no check can know of
    /// it; in any order.
    fn references(&self, _image: &Image, _index: u64, _sector: &Sector) -> Vec<u64> {
        Vec::new()
    }

    /// What is wrong with an image that a check of the tables does not see.
    fn look_through(&self, _image: &Image, _host: &SimHost) -> Result<(), String> {
        Ok(())
    }
}

/// What is known of a format.
pub(crate) fn of(format: Format) -> &'static dyn FormatSubject {
    match format {
        Format::Raw => &raw::Raw,
        Format::Qed => &qed::Qed,
        Format::Qcow2 => &qcow2::Qcow2,
        Format::Vmdk => &vmdk::Vmdk,
        Format::Vdi => &vdi::Vdi,
    }
}

/// A scope of one workload.
pub(crate) fn scope_of(image: Image, faults: u8, ticks: u8, requests: &[Request]) -> Scope {
    let budget = Budget { faults, ticks, ..QUIET };
    Scope { image, budget, workloads: vec![Workload::new(requests.iter().copied())] }
}

/// An image and how it is run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Image {
    /// Its format.
    pub format: Format,
    /// What it is like at first.
    pub state: State,
    /// Has it a backing file? A raw one, shorter than the disk, that ends within a cluster.
    pub backing: bool,
    /// Is that longer than the disk instead?
    pub long: bool,
    /// Is it qcow2 of version 2, whose tables do not say that a cluster is zeros?
    pub old: bool,
    /// What it lies on.
    pub medium: Medium,
    /// Runs of clusters that were given up and may wait for qcow2's tables to be written.
    pub frees: usize,
    /// Are discards passed on? If not, what was in a cluster stays there when it is given up.
    pub pass_discards: bool,
    /// How a VMDK image is laid out.
    pub layout: Layout,
    /// Bytes in a cluster. Of less than 4096 only qcow2 makes any; its refcounts are then as
    /// wide as can be, so that a few clusters want more than one block of them.
    pub cluster: u64,
    /// Table slices in memory.
    pub cache: usize,
    /// Buffers for copy-on-write and table writes; of qcow2, table writes at once.
    pub buffers: usize,
    /// The device's block size.
    pub align: u32,
    /// Ops that the device takes at once.
    pub depth: usize,
    /// What makes the file grow.
    pub grow: Grow,
    /// Clusters by which it grows ahead.
    pub ahead: u64,
    /// Handing an op over takes a while.
    pub slow: bool,
    /// Can the device zero a range?
    pub can_zero: bool,
    /// Was the format guessed?
    pub probed: bool,
    /// Is there a [filter](crate::filter) over it, in an engine that is as small as may be?
    pub filter: bool,
    /// The disk's size in bytes, if not that of three tables.
    pub size: Option<u64>,
    /// Another disk of the engine, of this format.
    pub beside: Option<Format>,
    /// Is that an overlay of the same backing file, and reads from the same node?
    pub shares: bool,
    /// That disk's size in bytes, if it is another.
    pub beside_size: Option<u64>,
    /// It is the disk beside another: where nobody has written, it is different.
    pub is_beside: bool,
    /// See [`Lie`].
    pub lie: Option<Lie>,
}

const TURN: Duration = Duration::from_micros(500);

impl Image {
    /// An ordinary image of this format.
    pub fn new(format: Format) -> Image {
        Image {
            format,
            state: State::Cold,
            backing: false,
            long: false,
            old: false,
            cluster: CLUSTER,
            medium: Medium::File,
            frees: FREES,
            pass_discards: true,
            layout: Layout::Plain,
            cache: 2,
            buffers: 4,
            align: 512,
            depth: 64,
            grow: Grow::Truncate,
            ahead: 4,
            slow: false,
            can_zero: true,
            probed: false,
            filter: false,
            size: None,
            beside: None,
            shares: false,
            beside_size: None,
            is_beside: false,
            lie: None,
        }
    }

    /// One with memory and growth that no small workload uses up.
    pub fn ample(format: Format) -> Image {
        Image { cache: 8, ahead: 32, ..Image::new(format) }
    }

    /// Bytes that one table maps; for raw, which has none, a few clusters.
    pub fn span(&self) -> u64 {
        of(self.format).span(self)
    }

    /// The first byte of a cluster of what a table maps.
    pub fn place(&self, table: u64, cluster: u64) -> u64 {
        table * self.span() + cluster * self.cluster
    }

    /// Can its disk be made larger?
    pub fn can_grow(&self) -> bool {
        !self.filter && of(self.format).resizes().contains(&Shape::Grow)
    }

    /// Can its disk be made smaller?
    pub fn can_shrink(&self) -> bool {
        matches!(self.format, Format::Raw | Format::Qcow2)
    }

    fn run_options(&self) -> RunOptions {
        let (step_min, step_max) = (self.ahead * self.cluster, self.ahead * self.cluster);
        let growth = Growth { by: self.grow, step_min, step_max };
        let qed = QedOptions { cache_slices: self.cache, growth, ..QedOptions::default() };
        let entropy = Some(0x00c0_ffee);
        let writeback_after_ms = VmdkOptions::default().writeback_after_ms;
        let (cache_tables, cache_grains) = (self.cache, self.cache);
        let vmdk = VmdkOptions { cache_tables, cache_grains, growth, writeback_after_ms, entropy };
        let qcow2 = Qcow2Options {
            cache_slices: self.cache,
            cache_inflated: 1,
            deflate_depth: 1,
            cache_packed: 3,
            growth,
            reserve_max: self.ahead,
            reserve_min: self.ahead,
            frees_max: self.frees,
            // What was in a hole is there still.
            pass_discards: self.pass_discards && self.state != State::Holes,
            writeback_depth: self.buffers,
        };
        let vdi = VdiOptions { growth, ..VdiOptions::default() };
        RunOptions { trust_probed: false, quota: None, qed, qcow2, vmdk, vdi }
    }

    pub(crate) fn chain(&self, host: &SimHost, write: bool) -> Result<Chain<SimFile>, String> {
        let options = OpenOptions {
            format: (!self.probed).then_some(self.format),
            write,
            backing: Policy::Any,
            files: Policy::Any,
            probe_backing: false,
            ..OpenOptions::default()
        };
        chain::open(host, Path::new(TOP), &options).map_err(|why| why.to_string())
    }

    /// Makes its backing file, if it has one, and the image over it.
    fn create(&self, host: &SimHost, options: CreateOptions) -> Result<(), String> {
        if self.backing {
            // Where zeros are written as data, a few clusters are enough of them.
            let end = match (self.long, self.old) {
                (false, _) if self.size.is_some() => self.cluster,
                (false, _) => self.place(1, 0),
                (true, false) => self.place(4, 0),
                (true, true) => self.place(2, 5),
            };
            host.put(BACKING, Contents::noise(!SEED, end + 1536));
        }
        let options = CreateOptions {
            size: Some(self.size()),
            backing_file: self.backing.then(|| BACKING.into()),
            backing_format: self.backing.then_some(Format::Raw),
            cluster_size: Some(self.cluster),
            ..options
        };
        let made = create(host, Path::new(TOP), self.format, &options);
        made.map(|_| ()).map_err(|why| why.to_string())
    }

    /// The image is copied to its device, if it lies on one.
    fn put_on_device(&self, host: &SimHost) {
        let Medium::Device(spare) = self.medium else { return };
        let image = host.contents(TOP).expect("it was just made");
        let end = match self.format {
            // The disk is the device.
            Format::Raw => image.len(),
            _ => image.len().next_multiple_of(self.cluster) + spare * self.cluster,
        };
        let mut device = Contents::noise(!SEED ^ end, end);
        let mut bytes = vec![0; image.len() as usize];
        image.read(0, &mut bytes);
        device.write(0, &bytes);
        host.put(TOP, device.with_fixed_len());
    }

    /// Fills it where it lies. QED and VMDK find no room on a device: there they are put when they
    /// are full.
    fn fill_on_medium(&self, host: &SimHost) -> Result<(), String> {
        let needs_file = matches!(self.format, Format::Qed | Format::Vmdk);
        if !needs_file {
            self.put_on_device(host);
        }
        if self.state != State::Cold {
            let image = if needs_file { Image { medium: Medium::File, ..*self } } else { *self };
            image.fill(host)?;
        }
        if needs_file {
            self.put_on_device(host);
        }
        Ok(())
    }

    /// Fills the clusters that a state says are there, through the engine, and closes the image.
    fn fill(&self, host: &SimHost) -> Result<(), String> {
        let backend = SimBackend::new(self.device(), Mode::Fifo);
        let mut engine = SimEngine::new(backend, self.limits());
        let node = self.open(host, &mut engine)?;
        let is_there = |at: u64| at + self.cluster <= self.size();
        let holes: &[(u64, u64)] = if self.state == State::Holes { &HOLES } else { &[] };
        for &(table, cluster) in holes.iter().chain(&FILLED) {
            let at = self.place(table, cluster);
            if !is_there(at) {
                continue;
            }
            match self.state {
                State::Zeros => ask(&mut engine, node, Request::zero(at, self.cluster))?,
                _ => ask(&mut engine, node, Request::write(at, self.cluster))?,
            }
        }
        for &(table, cluster) in holes.iter().filter(|_| self.format != Format::Vdi) {
            let at = self.place(table, cluster);
            if is_there(at) {
                ask(&mut engine, node, Request::discard(at, self.cluster))?;
            }
        }
        engine.drain();
        for _ in 0..RUNS_MAX {
            engine.run(Time(0));
        }
        engine.drained().ok_or("the image could not be closed")?.map_err(|e| e.to_string())?;
        for (i, name) in self.files().into_iter().enumerate() {
            let file = engine.backend().file(cowbell_engine::units::FileId(i as u32));
            host.put(name, file.now().clone());
        }
        of(self.format).filled(self, host)
    }
}

/// Asks for something, and waits for it.
fn ask(engine: &mut SimEngine<Over<Node>>, node: NodeId, request: Request) -> Result<(), String> {
    let io: Io = request.io();
    let memory = match request.memory(FILLER) {
        Some(bytes) => bytes.into(),
        None => cowbell_engine::mem::Mem::None,
    };
    engine.submit(node, io, memory, 0).map_err(|refused| format!("{:?}", refused.why))?;
    for _ in 0..RUNS_MAX {
        engine.run(Time(0));
    }
    let finished = engine.poll().ok_or("the image could not be filled")?;
    finished.result.map_err(|errno| errno.to_string())
}

/// Bytes in a cluster: the least that QED has.
pub(crate) const CLUSTER: u64 = 4096;
/// As many clusters behind an image on a device are enough for all that a workload writes.
pub(crate) const ROOMY: u64 = 12;
/// What [`State::Warm`] fills: table and cluster.
pub(crate) const FILLED: [(u64, u64); 3] = [(0, 0), (0, 1), (1, 0)];
/// What [`State::Holes`] fills first and discards last.
const HOLES: [(u64, u64); 4] = [(0, 3), (0, 4), (0, 5), (0, 6)];
/// Whose pattern it is filled with: a request that no workload has.
const FILLER: usize = 1000;
/// What [`Image::frees`] is where nothing is said of it.
const FREES: usize = 1024;
/// More than anybody needs to fill a cluster.
const RUNS_MAX: usize = 64;
pub(crate) const TOP: &str = "top.img";
pub(crate) const BACKING: &str = "backing.img";
pub(crate) const SEED: u64 = 0x5eed;

/// What the check says of a layer, and how many clusters it has.
fn checked<F: Store>(layer: &Layer<F>) -> Result<(Checked, u64), String> {
    let report = check_layer(layer, Repair::None, &mut Unwatched);
    let report = report.map_err(|why| why.to_string())?.unwrap_or_default();
    let marked = match &layer.meta {
        LayerMeta::Qed(opened) => opened.header.needs_check(),
        LayerMeta::Qcow2(opened) => opened.header.is_dirty() || opened.header.is_corrupt(),
        LayerMeta::Raw { .. } | LayerMeta::Vmdk(_) | LayerMeta::Vdi(_) => false,
    };
    let corruptions = report.corruptions + report.check_errors;
    // Copies that differ are what a crash between the two leaves, as leaks are.
    let leaks = report.leaks + report.stale;
    Ok((Checked { marked, corruptions, leaks, untold: false }, report.allocated_clusters))
}

/// The first lines of what a check says.
#[derive(Debug, Default)]
struct Heard(Vec<String>);

/// So many lines.
const HEARD: usize = 4;

impl Watch for Heard {
    fn event(&mut self, event: Event<'_>) {
        if let Event::Found(line) = event
            && self.0.len() < HEARD
        {
            self.0.push(line.to_string());
        }
    }
}

/// Repairs the layer of this name.
fn repair<H: Host>(host: &H, path: &Path, options: &OpenOptions) -> Result<(), String> {
    let layer = chain::open_whole_layer(host, path, options).map_err(|why| why.to_string())?;
    let repaired = check_layer(&layer, Repair::All, &mut Unwatched).map(|_| ());
    repaired.map_err(|why| why.to_string())
}

impl Subject for Image {
    type Driver = Over<Node>;

    fn name(&self) -> String {
        format!("a {} image", self.format)
    }

    fn text(&self) -> String {
        self.to_string()
    }

    fn plainer(&self) -> Vec<Image> {
        let plain = Image::new(self.format);
        let candidates = [
            Image { state: State::Cold, ..*self },
            Image { backing: false, ..*self },
            Image { layout: plain.layout, ..*self },
            Image { cache: plain.cache, ..*self },
            Image { buffers: plain.buffers, ..*self },
            Image { align: plain.align, ..*self },
            Image { depth: plain.depth, ..*self },
            Image { grow: plain.grow, ..*self },
            Image { ahead: 16, ..*self },
            Image { can_zero: true, ..*self },
            Image { slow: false, ..*self },
            Image { probed: false, ..*self },
        ];
        candidates.into_iter().filter(|candidate| candidate != self).collect()
    }

    fn device(&self) -> Device {
        Device {
            request_align: self.align,
            memory_align: 1,
            hole_align: if self.align == 1 { 1 } else { 4096 },
            depth: self.depth,
            can_grow: self.medium == Medium::File,
            // One is as much as a turn.
            nanos_per_op: if self.slow { TURN.as_nanos() as u64 } else { 0 },
            can_zero: self.can_zero,
            bounce_from: self.buffers as u32,
            lie: self.lie,
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            requests: 1,
            ops: if self.filter { 4 } else { 32 },
            buffers: self.buffers,
            bounce_buffers: 1,
            buffer_size: CLUSTER as usize,
            // Most zeros and some discards are done at once, as they are when they are large or many.
            zeros_written: if self.align == 4096 { 64 << 10 } else { 0 },
            discards_kept: if self.frees == 1 { 0 } else { 2 },
            steps: 4096,
            turn: TURN,
            measure: false,
        }
    }

    fn make(&self, host: &SimHost) -> Result<(), String> {
        of(self.format).make(self, host)?;
        self.fill_on_medium(host)
    }

    fn files(&self) -> Vec<&'static str> {
        let mut files = if self.backing { vec![BACKING, TOP] } else { vec![TOP] };
        if self.layout == Layout::Split {
            files.extend(vmdk::EXTENTS);
        }
        files
    }

    fn still_files(&self) -> usize {
        self.backing.into()
    }

    fn has_raw_below(&self) -> bool {
        // An overlay of VMDK's is over an image of VMDK's.
        self.backing && self.format != Format::Vmdk
    }

    fn holes(&self, file: &Contents) -> Option<u64> {
        of(self.format).holes(self, file)
    }

    fn is_unfinished(&self, files: &[Contents]) -> bool {
        of(self.format).is_unfinished(self, files)
    }

    fn may_be_full(&self) -> bool {
        match (self.medium, self.format) {
            (Medium::Device(_), Format::Qed | Format::Vmdk) => true,
            (Medium::Device(spare), Format::Vdi) => spare < ROOMY,
            _ => false,
        }
    }

    fn open(&self, host: &SimHost, engine: &mut SimEngine<Over<Node>>) -> Result<NodeId, String> {
        let chain = self.chain(host, true)?;
        let node = attach_wrapped(engine, chain, None, &self.run_options())
            .map_err(|why| why.to_string())?;
        let filter = || Over::Filter(Filter::new(node, self.size()));
        Ok(if self.filter { engine.add(filter()) } else { node })
    }

    fn size(&self) -> u64 {
        // The third table's last cluster is cut.
        self.size.unwrap_or(self.place(2, 2) + 1536)
    }

    fn size_unit(&self) -> u64 {
        if self.format == Format::Raw { self.align.into() } else { 1 }
    }

    fn cluster(&self) -> u64 {
        self.cluster
    }

    fn discard_unit(&self) -> u64 {
        match self.format {
            // Two that follow each other may make up a sector.
            Format::Raw if self.align == 1 => 1,
            Format::Raw => SECTOR,
            _ => self.cluster,
        }
    }

    fn marks_leaks(&self) -> bool {
        self.format == Format::Qed && !self.backing
    }

    fn writes_back(&self) -> bool {
        matches!(self.format, Format::Qed | Format::Qcow2 | Format::Vmdk | Format::Vdi)
    }

    fn beside(&self) -> Option<Image> {
        let beside = |format| Image {
            backing: self.shares,
            size: self.beside_size.or(self.size),
            is_beside: true,
            ..Image::new(format)
        };
        self.beside.map(beside)
    }

    fn shares(&self) -> bool {
        self.shares
    }

    fn open_beside(
        &self,
        host: &SimHost,
        engine: &mut SimEngine<Over<Node>>,
        main: NodeId,
    ) -> Result<NodeId, String> {
        let Some(&below) = engine.node(main).below().first().filter(|_| self.backing) else {
            return self.open(host, engine);
        };
        let mut chain = self.chain(host, true)?;
        chain.layers.truncate(1);
        attach_wrapped(engine, chain, Some(below), &self.run_options())
            .map_err(|why| why.to_string())
    }

    fn metadata(&self) -> Option<IsMetadata> {
        of(self.format).metadata()
    }

    fn may_go_unnoticed(&self, damaged: &[Damaged]) -> bool {
        let of = of(self.format);
        let (mut should, mut is) = (Vec::new(), Vec::new());
        // What is behind the header's first sector nothing else says either.
        let is_behind = |sector: &&Damaged| {
            let end = of.header_len(self) / SECTOR;
            sector.file + 1 == self.files().len() && (1..end).contains(&sector.index)
        };
        for sector in damaged.iter().filter(|sector| !is_behind(sector)) {
            let (mine, found) = (sector.should.bytes(), sector.is.bytes());
            let differ = |at: &usize| mine[*at] != found[*at];
            let is_known = |at: usize| !of.only_in_header().iter().any(|only| only.contains(&at));
            if sector.index > 0 || (0..mine.len()).filter(differ).any(is_known) {
                should.extend(of.references(self, sector.index, &sector.should));
                is.extend(of.references(self, sector.index, &sector.is));
            }
        }
        should.sort_unstable();
        is.sort_unstable();
        should == is
    }

    fn read(&self, host: &SimHost, offset: u64, bytes: &mut [u8]) -> Result<(), String> {
        map::read(&self.chain(host, false)?, offset, bytes).map_err(|why| why.to_string())
    }

    fn check(&self, host: &SimHost) -> Result<Checked, String> {
        let chain = self.chain(host, false)?;
        let top = &chain.layers[0];
        let (checked, allocated) = checked(top)?;
        of(self.format).look_through(self, host)?;
        // Whoever has changed a table has said so first.
        let untold = vmdk::is_as_made(&top.meta);
        let is_untold = untold && self.state == State::Cold && allocated > 0;
        // What is used of them may be used up.
        let is_holed = self.format == Format::Vdi && self.state == State::Holes;
        let holes = if is_holed { HOLES.len() as u64 } else { 0 };
        let corruptions = checked.corruptions + u64::from(is_untold);
        let leaks = checked.leaks.saturating_sub(holes);
        Ok(Checked { corruptions, leaks, untold, ..checked })
    }

    fn complaints(&self, host: &SimHost) -> Vec<String> {
        let Ok(chain) = self.chain(host, false) else { return Vec::new() };
        let mut heard = Heard::default();
        // What it cannot read it says, too.
        let _ = check_layer(&chain.layers[0], Repair::None, &mut heard);
        heard.0
    }

    fn map(&self, host: &SimHost) -> Result<Vec<map::Extent>, String> {
        let chain = self.chain(host, false)?;
        let extents: Result<Vec<map::Extent>, _> = map::extents(&chain).collect();
        let mut extents = extents.map_err(|why| why.to_string())?;
        // As if each file were a layer: what the explorer looks for is the file.
        let others = chain.layers[0].more.len();
        for extent in &mut extents {
            extent.depth = if extent.depth == 0 { others - extent.file } else { others + 1 };
        }
        Ok(extents)
    }

    fn recover(&self, host: &SimHost) -> Result<(), String> {
        self.chain(host, true).map(|_| ())
    }

    fn repair(&self, host: &SimHost) -> Result<(), String> {
        if self.format == Format::Raw {
            return Ok(());
        }
        let options = OpenOptions { format: Some(self.format), ..OpenOptions::default() };
        let options =
            OpenOptions { write: true, ignore_need_check: true, files: Policy::Any, ..options };
        repair(host, Path::new(TOP), &options)
    }

    fn assert_idle(&self, driver: &Over<Node>) {
        if let Over::Below(node) = driver {
            node.assert_idle();
        }
    }
}

/// Empty, used, over a backing file, with little memory: of a format that has backing files.
fn images_with_backing(plain: Image) -> Vec<Image> {
    vec![
        plain,
        Image { state: State::Warm, ..plain },
        Image { backing: true, ..plain },
        Image { backing: true, state: State::Warm, cache: 1, ..plain },
        Image { backing: true, state: State::Zeros, ..plain },
        Image { align: 4096, buffers: 2, ..plain },
    ]
}

/// Devices of images with tables. With `spare` clusters behind the image; full ones have room for one,
/// if there is any.
fn device_scopes_with_tables(image: Image, spare: u64) -> Vec<Scope> {
    let fault = Budget { faults: 1, ..QUIET };
    let single = |image: &Image| workloads(image, &Shape::ALL, 1);
    let core = |image: &Image| workloads(image, &Shape::CORE, 2);
    let roomy = Image { medium: Medium::Device(spare), ahead: 2, ..image };
    let warm = Image { state: State::Warm, ..roomy };
    let full = Image { medium: Medium::Device(spare.min(FILLED.len() as u64 + 1)), ..warm };
    [
        scopes_on([roomy, warm], fault, single),
        scopes_on([warm], fault, core),
        scopes_on([full], QUIET, core),
    ]
    .concat()
}

/// What is telling of images with tables that lie over each other.
fn special_with_tables(format: Format) -> Vec<Scope> {
    let image = Image { ahead: 16, ..Image::new(format) };
    let scope = scope_of;
    let at = |table, cluster| image.place(table, cluster);
    let head = |table, cluster| Request::write(at(table, cluster), 1024);
    let middle = |table, cluster| Request::write(at(table, cluster) + 1024, 1024);
    let flush = Request::flush();
    let overlay = Image { backing: true, ..image };
    let zeros = Image { state: State::Zeros, ..overlay };
    let warm = Image { state: State::Warm, ..image };
    let device = Image { medium: Medium::Device(0), ..warm };
    // Larger than a buffer.
    let large = Image { cluster: 2 * image.cluster, ..overlay };
    let across = Request::write(at(0, 2) - 1024, 2048);
    // On one base.
    let shared = Image { beside: Some(format), shares: format == Format::Qed, ..overlay };
    let filter = Image { filter: true, buffers: 2, ..image };
    vec![
        scope(overlay, 0, 0, &[middle(0, 0)]),
        scope(filter, 1, 0, &[Request::write(at(0, 0), 4096)]),
        Scope { budget: Budget { closes: 1, ..QUIET }, ..scope(shared, 0, 0, &[head(0, 0)]) },
        scope(zeros, 0, 0, &[middle(0, 0)]),
        scope(large, 1, 0, &[middle(0, 0)]),
        scope(overlay, 0, 0, &[head(0, 0), middle(0, 0)]),
        scope(overlay, 0, 0, &[head(0, 0), head(0, 1)]),
        scope(overlay, 0, 0, &[Request::read(at(1, 0), 4096)]),
        scope(overlay, 0, 0, &[Request::status(at(1, 0), 4096)]),
        scope(overlay, 0, 0, &[Request::write(at(0, 1) - 1024, 2048), head(0, 1)]),
        scope(warm, 0, 0, &[across, Request::read(at(0, 1), 8192)]),
        scope(image, 0, 1, &[head(0, 0)]),
        scope(image, 1, 0, &[head(0, 0), flush]),
        scope(overlay, 1, 0, &[head(0, 0), middle(0, 0)]),
        scope(image, 1, 0, &[head(0, 0), Request::zero(at(0, 0), 4096)]),
        scope(overlay, 1, 0, &[head(0, 0), Request::write_fua(at(0, 1), 1024)]),
        scope(overlay, 0, 0, &[head(0, 0), head(1, 0), head(2, 0)]),
        scope(device, 0, 0, &[head(0, 2)]),
        // No space, and then space; what a drain could not cut off.
        scope(Image { ahead: 1, ..image }, 1, 0, &[head(0, 0), head(0, 1)]),
        Scope {
            budget: Budget { faults: 1, drains: 1, ..QUIET },
            ..scope(image, 0, 0, &[head(0, 0), head(0, 1)])
        },
        // The file can be made longer no more.
        Scope {
            budget: Budget { faults: 1, breaks: true, ..QUIET },
            ..scope(image, 0, 0, &[Request::write_fua(at(0, 0), 1024)])
        },
    ]
}
