//! VDI images made small: as tight as QEMU lays them out, or with blocks that nobody names.

use std::path::Path;

use cowbell_engine::store::Store;
use cowbell_formats::vdi::disk::layout::{DATA_OFFSET_AT, MAP_OFFSET_AT};
use cowbell_formats::vdi::disk::layout::{SECTOR, UNALLOCATED};
use cowbell_formats::vdi::rest::open::{open, write_header};
use cowbell_formats::{CreateOptions, Format, Host};

use super::device_scopes_with_tables;
use super::{FormatSubject, HOLES, Image, Layout, Medium, ROOMY, State, TOP};
use crate::backend::IsMetadata;
use crate::disk::{Contents, Sector};
use crate::gate::{Scope, Shape};
use crate::host::{SimFile, SimHost};
use crate::workload::{Request, Workload};
use crate::world::{Budget, CopyPlan, QUIET, Way};

/// Blocks of the disk that are taken for one table: a sector's entries.
const TABLE_BLOCKS: u64 = SECTOR / 4;

/// See the module.
pub struct Vdi;

impl FormatSubject for Vdi {
    fn span(&self, image: &Image) -> u64 {
        TABLE_BLOCKS * image.cluster
    }

    fn make(&self, image: &Image, host: &SimHost) -> Result<(), String> {
        image.create(host, CreateOptions::default())?;
        if image.layout == Layout::Tight { make_tight(host) } else { Ok(()) }
    }

    fn filled(&self, image: &Image, host: &SimHost) -> Result<(), String> {
        if image.state != State::Holes {
            return Ok(());
        }
        forget(host, HOLES.map(|(table, cluster)| table * TABLE_BLOCKS + cluster))
    }

    fn holes(&self, image: &Image, _: &Contents) -> Option<u64> {
        (image.state != State::Holes).then_some(0)
    }

    fn references(&self, _: &Image, _: u64, sector: &Sector) -> Vec<u64> {
        // How many blocks are used is in the header, which ones nowhere; and two numbers of no block
        // say that it is zeros. Behind the map there are zeros.
        let bytes = sector.bytes();
        let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        let words = bytes[..end.next_multiple_of(4)].as_chunks().0.iter();
        let words = words.map(|word| u32::from_le_bytes(*word));
        words.filter(|&word| word < u32::MAX - 1).map(|_| 1).collect()
    }

    fn metadata(&self) -> Option<IsMetadata> {
        Some(is_metadata)
    }

    fn resizes(&self) -> &'static [Shape] {
        &[]
    }

    fn images(&self) -> Vec<Image> {
        let plain = Image { ahead: 16, ..Image::new(Format::Vdi) };
        let tight = Image { layout: Layout::Tight, ..plain };
        vec![
            plain,
            Image { state: State::Warm, ..tight },
            Image { state: State::Holes, ..tight },
            Image { align: 4096, buffers: 2, ..tight },
        ]
    }

    fn device_scopes(&self) -> Vec<Scope> {
        // It says what is free, and finds room: twice what is there, or for one block.
        device_scopes_with_tables(Image::new(Format::Vdi), ROOMY)
    }

    fn special(&self) -> Vec<Scope> {
        special()
    }
}

/// Holes, the count, what a drain cuts off.
fn special() -> Vec<Scope> {
    let image = Image { layout: Layout::Tight, ahead: 16, ..Image::new(Format::Vdi) };
    let plain = Image::new(Format::Vdi);
    let mirror = CopyPlan { mirrors: true, target_is_zero: true, ..CopyPlan::new(Way::Out) };
    let holes = Image { state: State::Holes, ..image };
    let scarce = Image { ahead: 1, ..image };
    let one = Image { size: Some(image.cluster), ..image };
    let device = Image { medium: Medium::Device(ROOMY), ..image };
    let write = |cluster| Request::write(image.place(0, cluster) + 1024, 1024);
    let flush = Request::flush();
    let scope = |image: Image, budget: Budget, requests: &[Request]| Scope {
        image,
        budget,
        workloads: vec![Workload::new(requests.iter().copied())],
    };
    let fault = Budget { faults: 1, ..QUIET };
    vec![
        // Given up while a mirror is at its end, and zeroed before that is told: the other disk has nothing there.
        scope(
            Image { size: Some(2 * plain.cluster), beside: Some(Format::Vdi), ..plain },
            Budget { abandons: 1, copy: Some(mirror), ..QUIET },
            &[Request::write(2048, 1536), Request::zero(3072, 512)],
        ),
        // A block whose write failed, and then the count: which is too low when the next block is there.
        scope(plain, Budget { faults: 2, drains: 1, ..QUIET }, &[write(0), write(1)]),
        scope(holes, QUIET, &[write(3)]),
        scope(holes, QUIET, &[write(3), write(4)]),
        scope(image, QUIET, &[write(0), Request::read(0, image.cluster)]),
        scope(image, QUIET, &[write(0), write(0)]),
        scope(image, fault, &[write(0), flush]),
        scope(image, fault, &[write(0), write(0)]),
        scope(image, fault, &[write(0), Request::read(0, image.cluster), flush]),
        scope(image, Budget { faults: 1, drains: 1, ..QUIET }, &[write(0), write(1)]),
        scope(one, fault, &[Request::write(1024, 1024), Request::write(0, 1024), flush]),
        scope(device, QUIET, &[write(0)]),
        scope(scarce, Budget { crashes: 1, ..QUIET }, &[write(0), write(1), write(2)]),
    ]
}

/// The new image has its map behind the header, and its blocks behind that, at sectors.
fn make_tight(host: &SimHost) -> Result<(), String> {
    let file = host.open(Path::new(TOP), true).map_err(|why| why.to_string())?;
    let image = open(&file, false).map_err(|why| why.to_string())?;
    let map: Vec<u8> = image.entries().iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let data = (SECTOR + map.len() as u64).next_multiple_of(SECTOR) as u32;
    let write = |at: u64, bytes: &[u8]| file.write_at(at, bytes).map_err(|why| why.to_string());
    file.set_len(SECTOR).and_then(|()| file.set_len(data.into())).map_err(|why| why.to_string())?;
    write(SECTOR, &map)?;
    write(MAP_OFFSET_AT, &(SECTOR as u32).to_le_bytes())?;
    write(DATA_OFFSET_AT, &data.to_le_bytes())
}

/// These entries of the map name no block any more, and fewer blocks are counted than there are: an
/// open puts that right.
fn forget(host: &SimHost, entries: impl IntoIterator<Item = u64>) -> Result<(), String> {
    let file = host.open(Path::new(TOP), true).map_err(|why| why.to_string())?;
    let image = open(&file, false).map_err(|why| why.to_string())?;
    for entry in entries {
        let written = file.write_at(image.entry_offset(entry), &UNALLOCATED.to_le_bytes());
        written.map_err(|why| why.to_string())?;
    }
    let mut header = image.header;
    header.allocated = 1;
    write_header(&file, &header).map_err(|why| why.to_string())
}

/// Does `start..end` of a VDI image touch its header or map?
fn is_metadata(contents: &Contents, start: u64, _: u64) -> bool {
    let file = SimFile::new(contents.clone(), false);
    open(&file, false).is_ok_and(|image| start < image.header.data_offset)
}
