//! VMDK images made small: grains of a cluster, tables of 128 entries.

use cowbell_engine::store::Store;
use cowbell_formats::parts::growth::Grow;
use cowbell_formats::vmdk::disk::descriptor::Kind;
use cowbell_formats::vmdk::disk::layout::{Header, MAGIC, SECTOR};
use cowbell_formats::vmdk::rest::create::{Options, write_file};
use cowbell_formats::{Format, Host, LayerMeta};
use std::ops::Range;
use std::path::Path;

use super::{BACKING, CLUSTER, FormatSubject, Image, Layout, SEED, State, TOP};
use super::{device_scopes_with_tables, scope_of, special_with_tables};
use crate::backend::IsMetadata;
use crate::disk::{Contents, Sector};
use crate::gate::{Scope, Shape, scopes_on};
use crate::host::{SimFile, SimHost};
use crate::subject::Subject;
use crate::workload::{Request, Workload};
use crate::world::{Budget, QUIET};

/// The files of a split image, as they are named after [`TOP`].
pub const EXTENTS: [&str; 2] = ["top-s001.img", "top-s002.img"];

/// log2 of the entries in a grain table.
const TABLE_BITS: u32 = 7;

/// See the module.
pub struct Vmdk;

impl FormatSubject for Vmdk {
    fn span(&self, image: &Image) -> u64 {
        image.cluster << TABLE_BITS
    }

    fn make(&self, image: &Image, host: &SimHost) -> Result<(), String> {
        make(image, host)
    }

    fn filled(&self, image: &Image, host: &SimHost) -> Result<(), String> {
        put_id_back(image, host)
    }

    fn only_in_header(&self) -> &'static [Range<usize>] {
        // Of an image in one file the descriptor's size is not looked at: other programs leave others.
        const { &[Range { start: 12, end: 20 }] }
    }

    fn references(&self, _: &Image, index: u64, sector: &Sector) -> Vec<u64> {
        let words = sector.bytes().as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
        // The copy says which entry is where.
        words.filter(|&word| word != 0).map(|word| index << 32 | u64::from(word)).collect()
    }

    fn metadata(&self) -> Option<IsMetadata> {
        Some(is_metadata)
    }

    fn resizes(&self) -> &'static [Shape] {
        &[]
    }

    fn images(&self) -> Vec<Image> {
        let plain = Image { ahead: 16, ..Image::new(Format::Vmdk) };
        vec![
            plain,
            Image { state: State::Warm, ..plain },
            Image { layout: Layout::Split, ..plain },
            Image { layout: Layout::Lazy, cache: 1, ..plain },
            Image { backing: true, cache: 1, ..plain },
            Image { backing: true, layout: Layout::Split, state: State::Warm, ..plain },
            Image { backing: true, state: State::Zeros, ..plain },
            Image { align: 4096, buffers: 2, ..plain },
        ]
    }

    fn growing_images(&self) -> Vec<Image> {
        let plain = Image { ahead: 16, ..Image::new(Format::Vmdk) };
        // Grains larger than a buffer.
        vec![Image { cluster: 2 * CLUSTER, backing: true, buffers: 2, ..plain }]
    }

    fn device_scopes(&self) -> Vec<Scope> {
        device_scopes_with_tables(Image::new(Format::Vmdk), 0)
    }

    fn special(&self) -> Vec<Scope> {
        // Zeros are written, and end the file within a sector, while tables are written, too.
        let written =
            Image { can_zero: false, grow: Grow::Write, ahead: 16, ..Image::new(Format::Vmdk) };
        let requests = [Request::write(0x2200, 0x1000), Request::zero(0x1a00, 0x1f40)];
        let written = vec![scope_of(written, 0, 1, &requests)];
        [special_with_tables(Format::Vmdk), stream_scopes(), written].concat()
    }

    fn own_scopes(&self) -> Vec<Scope> {
        stream_scopes()
    }

    fn is_unfinished(&self, image: &Image, files: &[Contents]) -> bool {
        let file = files.last().expect("an image has a file");
        image.layout == Layout::Stream && !has_end(file)
    }

    fn look_through(&self, image: &Image, host: &SimHost) -> Result<(), String> {
        if image.layout == Layout::Stream { walk(image, host) } else { Ok(()) }
    }
}

/// Streams: each grain is written once and whole, so their workloads are their own. New ones, and some
/// that go on; with room for one grain, which the next waits for.
fn stream_scopes() -> Vec<Scope> {
    let plain = Image { layout: Layout::Stream, ahead: 2, ..Image::new(Format::Vmdk) };
    let warm = Image { state: State::Warm, ..plain };
    let tight = Image { cache: 1, ..warm };
    let fault = Budget { faults: 1, ..QUIET };
    let whole = |image: &Image, table, grain| Request::write(image.place(table, grain), CLUSTER);
    let single = move |image: &Image| {
        let fua = Request::write_fua(image.place(0, 2), CLUSTER);
        let last = Request::write(image.place(2, 2), 1536);
        [whole(image, 0, 2), fua, last].map(|request| Workload::new([request])).to_vec()
    };
    let pairs = move |image: &Image| {
        let (here, two) = (whole(image, 0, 2), Request::write(image.place(0, 2), 2 * CLUSTER));
        let read = Request::read(image.place(0, 1), 2 * CLUSTER);
        let others = [whole(image, 0, 3), whole(image, 1, 1), Request::flush(), read];
        let mut all: Vec<_> = others.map(|other| Workload::new([here, other])).to_vec();
        all.push(Workload::new([two]));
        all
    };
    let triples = move |image: &Image| {
        let (one, next) = (whole(image, 0, 2), whole(image, 0, 3));
        let flushed = Workload::new([one, Request::flush(), next]);
        vec![flushed, Workload::new([one, next, whole(image, 1, 1)])]
    };
    // There is room for one table, and for one grain.
    let of_two_tables = |image: &Image| {
        let reads = [0, 1].map(|table| Request::read(image.place(table, 0) + 512, 512));
        vec![Workload::new(reads)]
    };
    let drains = Budget { drains: 1, ..fault };
    let sessions = Budget { drains: 1, reopens: true, ..QUIET };
    let breaks = Budget { breaks: true, ..fault };
    [
        scopes_on([plain, warm], Budget { ticks: 1, ..fault }, single),
        scopes_on([plain, warm], breaks, single),
        scopes_on([plain, warm, tight], fault, pairs),
        scopes_on([plain], QUIET, triples),
        scopes_on([warm], drains, pairs),
        scopes_on([plain], sessions, pairs),
        scopes_on([tight], QUIET, of_two_tables),
    ]
    .concat()
}

/// Is there a sector behind the header that looks like one, and an end mark behind that?
fn has_end(file: &Contents) -> bool {
    let mut sector = [0; SECTOR as usize];
    (1..(file.len() / SECTOR).saturating_sub(1)).any(|at| {
        file.read(at * SECTOR, &mut sector);
        sector.starts_with(&MAGIC)
    })
}

/// Goes through a stream as one who cannot go back, from marker to marker: each grain comes once,
/// directory, footer and end mark follow, and then nothing.
fn walk(image: &Image, host: &SimHost) -> Result<(), String> {
    let io = |why: std::io::Error| why.to_string();
    let file = host.open(Path::new(TOP), false).map_err(io)?;
    let len = file.len().map_err(io)?;
    let mut sector = [0; SECTOR as usize];
    file.read_at(0, &mut sector).map_err(io)?;
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte));
    let (mut at, end) = (number(&sector[64..72]), len / SECTOR);
    let (mut grains, mut last) = (Vec::new(), 0);
    while at < end {
        file.read_at(at * SECTOR, &mut sector).map_err(io)?;
        let [value, size, kind] = [0..8, 8..12, 12..16].map(|place| number(&sector[place]));
        match (size, kind) {
            (1.., _) if grains.contains(&value) || value % (image.cluster / SECTOR) > 0 => {
                return Err(format!("front to back: at sector {at} a grain of sector {value}"));
            }
            (1.., _) => {
                grains.push(value);
                at += (size + 12).div_ceil(SECTOR);
            }
            (0, 0) => break,
            (0, 1..=3) => {
                at += 1 + value;
                last = kind;
            }
            _ => return Err(format!("front to back: at sector {at} there is no marker")),
        }
    }
    let mut rest = vec![0; ((end.saturating_sub(at)) * SECTOR) as usize];
    file.read_at(at * SECTOR, &mut rest).map_err(io)?;
    match last {
        3 if !rest.is_empty() && rest.iter().all(|&byte| byte == 0) => Ok(()),
        _ => Err(format!("front to back: it ends at sector {at} of {end}")),
    }
}

/// The parent's content id.
const PARENT: u32 = 0xba5e_0001;

/// The content id that images are made with.
const MADE: u32 = 0x7007_0001;

/// Has an image still the content id that it was made with?
pub fn is_as_made(meta: &LayerMeta) -> bool {
    matches!(meta, LayerMeta::Vmdk(image) if image.descriptor.cid == MADE)
}

/// Has the image, which was filled, say again that it is as it was made.
fn put_id_back(image: &Image, host: &SimHost) -> Result<(), String> {
    let chain = image.chain(host, false)?;
    let LayerMeta::Vmdk(opened) = &chain.layers[0].meta else {
        return Err("it is no VMDK image".into());
    };
    let at = opened.text_at + opened.descriptor.cid_at as u64;
    let id = format!("{MADE:08x}");
    if opened.descriptor.cid_len != id.len() {
        return Err("its content id is of another length".into());
    }
    let file = host.open(Path::new(TOP), true).map_err(|why| why.to_string())?;
    file.write_at(at, id.as_bytes()).map_err(|why| why.to_string())
}

/// Makes the files of `image`.
fn make(image: &Image, host: &SimHost) -> Result<(), String> {
    let split = image.layout == Layout::Split;
    let kind = match image.layout {
        Layout::Split => Kind::TwoGbMaxExtentSparse,
        Layout::Stream => Kind::StreamOptimized,
        _ => Kind::MonolithicSparse,
    };
    if image.backing {
        make_parent(image, host)?;
    }
    let options = Options {
        grain_bits: image.cluster.trailing_zeros(),
        table_bits: TABLE_BITS,
        // Where images say so they say it of a parent's grains; without, they copy them.
        zeroed_grain: image.state == State::Zeros,
        parent: image.backing.then(|| (BACKING.as_bytes().to_vec(), PARENT)),
        sizes: split.then(|| vec![image.cluster, image.size() - image.cluster]),
        lazy: image.layout == Layout::Lazy,
        ..Options::new(kind, TOP.as_bytes(), image.size(), MADE)
    };
    write(host, &options)
}

fn write(host: &SimHost, options: &Options) -> Result<(), String> {
    for (i, name) in options.files().iter().enumerate() {
        let name = String::from_utf8_lossy(name).into_owned();
        let file = host.create_new(Path::new(&name)).map_err(|why| why.to_string())?;
        write_file(&file, options, i).map_err(|why| why.to_string())?;
    }
    Ok(())
}

/// A parent that is shorter than the disk, ends within a grain, and has data where requests go.
fn make_parent(image: &Image, host: &SimHost) -> Result<(), String> {
    let options = Options {
        grain_bits: image.cluster.trailing_zeros(),
        table_bits: TABLE_BITS,
        ..Options::new(Kind::MonolithicSparse, BACKING.as_bytes(), image.place(1, 0) + 1536, PARENT)
    };
    write(host, &options)?;
    let file = host.open(Path::new(BACKING), true).map_err(|why| why.to_string())?;
    let header = header(&file)?;
    let noise = SimFile::new(Contents::noise(!SEED, 8 * image.cluster), false);
    let mut grain = vec![0; image.cluster as usize];
    for (done, (table, entry)) in (0..).zip([(0, 0), (0, 1), (0, 2), (0, 127), (1, 0)]) {
        let place = header.overhead * SECTOR + done * image.cluster;
        let (mut raw, io) = ([0; 4], |why: std::io::Error| why.to_string());
        noise.read_at(done * image.cluster, &mut grain).map_err(io)?;
        file.write_at(place, &grain).map_err(io)?;
        for directory in [header.directory_at, header.redundant_at] {
            file.read_at(directory * SECTOR + table * 4, &mut raw).map_err(io)?;
            let at = u64::from(u32::from_le_bytes(raw)) * SECTOR + entry * 4;
            file.write_at(at, &((place / SECTOR) as u32).to_le_bytes()).map_err(io)?;
        }
    }
    Ok(())
}

fn header<F: Store>(file: &F) -> Result<Header, String> {
    let mut sector = [0; SECTOR as usize];
    file.read_at(0, &mut sector).map_err(|why| why.to_string())?;
    Header::parse(&sector).map_err(|why| why.to_string())
}

/// Does `start..` lie in front of the grains of an extent? Tables that were allocated late are
/// taken for grains.
fn is_metadata(contents: &Contents, start: u64, _end: u64) -> bool {
    let file = SimFile::new(contents.clone(), false);
    let is_descriptor = contents.sector(0).bytes().starts_with(b"# Disk DescriptorFile");
    is_descriptor || header(&file).is_ok_and(|header| start < header.overhead * SECTOR)
}
