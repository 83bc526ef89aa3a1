//! VDI images made small: as tight as QEMU lays them out, or with blocks that nobody names.

use std::path::Path;

use cowbell_engine::store::Store;
use cowbell_formats::Host;
use cowbell_formats::vdi::disk::layout::UNALLOCATED;
use cowbell_formats::vdi::rest::open::open;

use super::TOP;
use crate::disk::Contents;
use crate::host::{SimFile, SimHost};

/// The new image has its map behind the header, and its blocks behind that, at sectors.
pub fn make_tight(host: &SimHost) -> Result<(), String> {
    let file = host.open(Path::new(TOP), true).map_err(|why| why.to_string())?;
    let image = open(&file, false).map_err(|why| why.to_string())?;
    let map: Vec<u8> = image.entries().iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let data = 512 + (map.len() as u32).next_multiple_of(512);
    let write = |at: u64, bytes: &[u8]| file.write_at(at, bytes).map_err(|why| why.to_string());
    file.set_len(512).and_then(|()| file.set_len(data.into())).map_err(|why| why.to_string())?;
    write(512, &map)?;
    write(0x154, &512_u32.to_le_bytes())?;
    write(0x158, &data.to_le_bytes())
}

/// These entries of the map name no block any more, and fewer blocks are counted than there are: an
/// open puts that right.
pub fn forget(host: &SimHost, entries: impl IntoIterator<Item = u64>) -> Result<(), String> {
    let file = host.open(Path::new(TOP), true).map_err(|why| why.to_string())?;
    let image = open(&file, false).map_err(|why| why.to_string())?;
    for entry in entries {
        let written = file.write_at(image.entry_offset(entry), &UNALLOCATED.to_le_bytes());
        written.map_err(|why| why.to_string())?;
    }
    file.write_at(0x184, &1_u32.to_le_bytes()).map_err(|why| why.to_string())
}

/// Does `start..end` of a VDI image touch its header or map?
pub fn is_metadata(contents: &Contents, start: u64, _: u64) -> bool {
    let file = SimFile::new(contents.clone(), false);
    open(&file, false).is_ok_and(|image| start < image.header.data_offset)
}
