//! Taking the space of what a disk has gained, in an image that nobody runs.
//!
//! It is one change of the image (`check/change.rs`): the tables that map the range are written anew,
//! with places for all clusters that have none, and one write of the header's sector makes them the
//! image's. What a guest reads stays what it was: zeros. Places are at the file's end, if it can
//! grow; those on a device hold old bytes, so that their entries say zeros, or zeros are written.

use std::ops::Range;

use cowbell_engine::store::Store;
use cowbell_engine::units::{GuestOffset, HostOffset};

use crate::error::Error;
use crate::preallocation::{Preallocation, preallocate};
use crate::qcow2::disk::header::{AUTOCLEAR_RAW_DATA, Header};
use crate::qcow2::disk::layout::{Geometry, Invalid, L1Entry, L2Entry, Mapping};
use crate::qcow2::rest::check::change::{Room, Run, change, check_sound};
use crate::qcow2::rest::open::{read_header, read_words};

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
    let how = effective(&header, how);
    if range.is_empty() || how == Preallocation::Off {
        return Ok(());
    }
    if let Some((data, from)) = data {
        let from = from.max(old);
        preallocate(data, from, range.end.saturating_sub(from), how)?;
        data.flush().map_err(Error::io("flush the data file"))?;
    }
    change(file, |header, room| map(file, header, room, range, how))
}

/// What `how` means for this image.
fn effective(header: &Header, how: Preallocation) -> Preallocation {
    let is_raw = header.has_data_file() && header.autoclear & AUTOCLEAR_RAW_DATA != 0;
    if is_raw && how == Preallocation::Off { Preallocation::Metadata } else { how }
}

/// Can the image's disk take space once it has grown? To be asked before it grows.
///
/// # Errors
///
/// As [`preallocate_from`].
pub fn check_preallocation<F: Store>(file: &F, how: Preallocation) -> Result<(), Error> {
    let header = read_header(file)?;
    if effective(&header, how) == Preallocation::Off {
        return Ok(());
    }
    check_sound(file)
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
    let mut bytes = vec![0; size as usize];
    for index in tables {
        let old = L1Entry::decode(l1[index as usize], geometry);
        match old.map_err(|_| corrupt(header.l1_offset))? {
            Some(old) => file.read_at(old.table.0, &mut bytes).map_err(Error::io(DOING))?,
            None => bytes.fill(0),
        }
        let mapped = index * (span / size)..(index + 1) * (span / size);
        let range = clusters.start.max(mapped.start)..clusters.end.min(mapped.end);
        // In front of what it leads to.
        let at = room.put(&bytes)?;
        place_table(file, room, &mut bytes, range, how, geometry)?;
        file.write_at(at, &bytes).map_err(Error::io(DOING))?;
        l1[index as usize] = L1Entry { table: HostOffset(at), copied: true }.encode();
    }
    header.l1_offset = room.put_l1(&l1)?;
    Ok(header)
}

/// Gives each of these guest clusters, which one L2 table maps, a place.
fn place_table<F: Store>(
    file: &F,
    room: &mut Room<'_, F>,
    table: &mut [u8],
    clusters: Range<u64>,
    how: Preallocation,
    geometry: Geometry,
) -> Result<(), Error> {
    let size = geometry.cluster_size();
    let mut run = Run { at: 0, count: 0, is_zero: true };
    for cluster in clusters.clone() {
        let at = geometry.l2_index(GuestOffset(cluster * size)) as usize;
        let entry = L2Entry::read(table, at, geometry);
        if entry.place(geometry).map_err(|Invalid| corrupt(cluster * size))?.is_some() {
            continue;
        }
        if geometry.has_data_file() {
            run.at = cluster * size;
        } else if run.count == 0 {
            run = room.take_data(clusters.end - cluster)?;
            let can_say_zero = run.is_zero || geometry.has_zero_clusters();
            let how = if can_say_zero { how } else { Preallocation::Full };
            preallocate(file, run.at, run.count * size, how)?;
            run.is_zero |= how == Preallocation::Full;
        }
        let placed = placed(entry, run, how, geometry);
        placed.map_err(|Invalid| corrupt(cluster * size))?.write(table, at, geometry);
        run.at += size;
        run.count = run.count.saturating_sub(1);
    }
    // More than was needed: some had their places.
    room.give_back(run);
    Ok(())
}

/// The entry with a place.
fn placed(
    entry: L2Entry,
    run: Run,
    how: Preallocation,
    geometry: Geometry,
) -> Result<L2Entry, Invalid> {
    let host = HostOffset(run.at);
    // Subclusters go on saying what they are.
    if geometry.has_subclusters() {
        return Ok(entry.with_place(host));
    }
    let is_zero = matches!(entry.mapping(0, geometry)?, Mapping::Zero(_));
    Ok(match how {
        _ if !run.is_zero => L2Entry::zero(Some(host), geometry),
        Preallocation::Metadata if is_zero => L2Entry::zero(Some(host), geometry),
        _ => L2Entry::data(host, geometry),
    })
}

fn corrupt(at: u64) -> Error {
    Error::Corrupt { what: "a table cannot be right", at }
}
