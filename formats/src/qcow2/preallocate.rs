//! Taking the space of what a disk has gained, in an image that nobody runs.
//!
//! It is one change of the image (`check/change.rs`): the tables that map the range are written anew
//! at the file's end, with places behind them for all clusters that have none, and one write of
//! the header's sector makes them the image's. What a guest reads stays what it was: zeros.

use std::ops::Range;

use cowbell_engine::store::Store;
use cowbell_engine::units::{GuestOffset, HostOffset};

use crate::error::Error;
use crate::preallocation::{Preallocation, preallocate};
use crate::qcow2::check::change::{Room, change};
use crate::qcow2::header::{AUTOCLEAR_RAW_DATA, Header};
use crate::qcow2::layout::{Geometry, Invalid, L1Entry, L2Entry, Mapping};
use crate::qcow2::open::{read_header, read_words};

/// Takes the space of the disk from byte `old` on, which reads as zeros. A `data` file's bytes
/// from `data_from` on read as zeros, too. All of a raw data file has places, whether asked or not.
///
/// # Errors
///
/// [`Error::Corrupt`] for an image that has errors; [`Error::Limit`]; [`Error::Io`].
pub fn preallocate_from<F: Store>(
    file: &F,
    data: Option<(&F, u64)>,
    old: u64,
    how: Preallocation,
) -> Result<(), Error> {
    let header = read_header(file)?;
    let range = old..header.disk_size();
    let is_raw = header.has_data_file() && header.autoclear & AUTOCLEAR_RAW_DATA != 0;
    let how = if is_raw && how == Preallocation::Off { Preallocation::Metadata } else { how };
    if range.is_empty() || how == Preallocation::Off {
        return Ok(());
    }
    if let Some((data, from)) = data {
        let from = from.max(old);
        preallocate(data, from, range.end.saturating_sub(from), how)?;
        data.flush().map_err(Error::io("flush the data file"))?;
    }
    let len = file.len().map_err(Error::io("find the image's length"))?;
    let changed = change(file, |header, room| map(file, header, room, range, how));
    if changed.is_err() {
        // What there is no room for is not kept.
        file.set_len(len).map_err(Error::io("cut the image"))?;
    }
    changed
}

fn map<F: Store>(
    file: &F,
    mut header: Header,
    room: &mut Room<'_, F>,
    range: Range<u64>,
    how: Preallocation,
) -> Result<Header, Error> {
    const DOING: &str = "write an L2 table";
    let geometry = header.geometry();
    let (size, span) = (geometry.cluster_size(), 1 << geometry.l2_span_bits());
    let mut l1 = read_words(file, header.l1_offset, header.l1_size as usize, "read the L1 table")?;
    let tables = range.start / span..range.end.div_ceil(span);
    let clusters = range.start / size..range.end.div_ceil(size);
    if tables.end > l1.len() as u64 {
        return Err(corrupt(header.l1_offset));
    }
    let places = if header.has_data_file() { 0 } else { clusters.end - clusters.start };
    let l1_clusters = (header.l1_size as u64 * 8).div_ceil(size);
    let counts = l1_clusters + (tables.end - tables.start) + places;
    let l1_offset = room.at_end(counts)?;
    let mut table = l1_offset + l1_clusters * size;
    let first_place = table + (tables.end - tables.start) * size;
    let mut place = first_place;
    let mut bytes = vec![0; size as usize];
    for index in tables {
        let old = L1Entry::decode(l1[index as usize], geometry).map_err(|_| corrupt(table))?;
        match old {
            Some(old) => file.read_at(old.table.0, &mut bytes).map_err(Error::io(DOING))?,
            None => bytes.fill(0),
        }
        let mapped = index * (span / size)..(index + 1) * (span / size);
        for cluster in clusters.start.max(mapped.start)..clusters.end.min(mapped.end) {
            let host = if geometry.has_data_file() { cluster * size } else { place };
            let at = geometry.l2_index(GuestOffset(cluster * size)) as usize;
            let entry = L2Entry::read(&bytes, at, geometry);
            let placed = placed(entry, HostOffset(host), how, geometry);
            if let Some(entry) = placed.map_err(|Invalid| corrupt(table))? {
                entry.write(&mut bytes, at, geometry);
                place += if geometry.has_data_file() { 0 } else { size };
            }
        }
        file.write_at(table, &bytes).map_err(Error::io(DOING))?;
        l1[index as usize] = L1Entry { table: HostOffset(table), copied: true }.encode();
        table += size;
    }
    preallocate(file, first_place, place - first_place, how)?;
    // Some had their places.
    file.set_len(place).map_err(Error::io("set the image's length"))?;
    let l1: Vec<u8> = l1.into_iter().flat_map(u64::to_be_bytes).collect();
    file.write_at(l1_offset, &l1).map_err(Error::io("write the L1 table"))?;
    header.l1_offset = l1_offset;
    Ok(header)
}

/// The entry with a place; `None` if it has one.
fn placed(
    entry: L2Entry,
    host: HostOffset,
    how: Preallocation,
    geometry: Geometry,
) -> Result<Option<L2Entry>, Invalid> {
    if entry.place(geometry)?.is_some() {
        return Ok(None);
    }
    // Subclusters go on saying what they are.
    if geometry.has_subclusters() {
        return Ok(Some(entry.with_place(host)));
    }
    let is_zero = matches!(entry.mapping(0, geometry)?, Mapping::Zero(_));
    Ok(Some(match how {
        Preallocation::Metadata if is_zero => L2Entry::zero(Some(host), geometry),
        _ => L2Entry::data(host, geometry),
    }))
}

fn corrupt(at: u64) -> Error {
    Error::Corrupt { what: "a table cannot be right", at }
}
