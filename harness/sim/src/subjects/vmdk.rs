//! VMDK images made small: grains of a cluster, tables of 128 entries.

use cowbell_engine::store::Store;
use cowbell_formats::vmdk::disk::descriptor::Kind;
use cowbell_formats::vmdk::disk::layout::{Header, SECTOR};
use cowbell_formats::vmdk::rest::create::{Options, write_file};
use cowbell_formats::{Format, Host, LayerMeta};
use std::path::Path;

use super::{BACKING, CLUSTER, FormatSubject, Image, Layout, SEED, State, TOP};
use super::{device_scopes_with_tables, special_with_tables};
use crate::backend::IsMetadata;
use crate::disk::Contents;
use crate::gate::{Scope, Shape};
use crate::host::{SimFile, SimHost};
use crate::subject::Subject;

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
        special_with_tables(Format::Vmdk)
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
    let kind = if split { Kind::TwoGbMaxExtentSparse } else { Kind::MonolithicSparse };
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
    header(&file).is_ok_and(|header| start < header.overhead * SECTOR)
}
