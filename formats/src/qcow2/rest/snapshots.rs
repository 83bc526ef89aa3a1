//! Making, applying and deleting internal snapshots of an image that nobody runs.
//!
//! Each is one change of the image (`check/change.rs`): a table and perhaps a copy of an L1 table are
//! written where nothing is, and one write of the header's sector makes them the image's. A crash
//! leaves the image as it was or as it shall be.

use cowbell_engine::store::Store;

use crate::error::{Error, Shown};
use crate::qcow2::disk::header::{Header, L1_BYTES_MAX, OFFSET_MAX, SNAPSHOTS_MAX};
use crate::qcow2::disk::snapshot_table::{self, Snapshot, encode};
use crate::qcow2::rest::bitmap;
use crate::qcow2::rest::check::change::{change, with_snapshots};
use crate::qcow2::rest::open::{Opened, read_header, read_words};

/// A moment: seconds since 1970, and nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// Seconds.
    pub seconds: u32,
    /// Nanoseconds, less than 10^9.
    pub nanos: u32,
}

/// Makes a snapshot of the disk as it is; answers its id, a number that no other has.
///
/// # Errors
///
/// [`Error::Unsupported`] for an image with a data file; [`Error::Limit`] for too many snapshots,
/// or where refcounts have too few bits; [`Error::Corrupt`] for an image that has errors;
/// [`Error::Io`].
pub fn create<F: Store>(file: &F, name: &[u8], now: Moment) -> Result<u64, Error> {
    let (header, mut list) = load(file)?;
    if list.len() >= SNAPSHOTS_MAX as usize {
        return Err(Error::Limit(format!("an image has at most {SNAPSHOTS_MAX} snapshots")));
    }
    let numbers = list.iter().filter_map(|one| str::from_utf8(&one.id).ok()?.parse::<u64>().ok());
    let id = numbers.max().unwrap_or(0).checked_add(1);
    let id = id.ok_or_else(|| Error::Limit("no id is left for another snapshot".into()))?;
    let entries = header.l1_size as usize;
    let l1 = read_words(file, header.l1_offset, entries, "read the L1 table")?;
    list.push(Snapshot {
        l1_offset: 0,
        l1_size: header.l1_size,
        id: id.to_string().into_bytes(),
        name: name.to_vec(),
        date_sec: now.seconds,
        date_nsec: now.nanos,
        vm_clock_nsec: 0,
        vm_state_size: 0,
        disk_size: Some(header.size),
        icount: Some(0),
        extra: Vec::new(),
    });
    encode(&list, header.disk_size())?; // what cannot be written is found before anything is
    change(file, |header, room| {
        let l1_offset = room.put_l1(&l1)?;
        list.last_mut().expect("it was just put there").l1_offset = l1_offset;
        with_snapshots(header, room, &list)
    })?;
    Ok(id)
}

/// Makes the disk what it was when the snapshot was made, its size included. `which` is an id, or
/// else a name.
///
/// # Errors
///
/// As [`create`]; [`Error::Invalid`] if there is no such snapshot, or there are bitmaps, which
/// would be wrong from then on.
pub fn apply<F: Store>(file: &F, which: &[u8]) -> Result<(), Error> {
    let (header, list) = load(file)?;
    if !bitmap::read(file, &header)?.is_empty() {
        return Err(Error::Invalid("Device has active dirty bitmaps".into()));
    }
    let by_id = list.iter().find(|one| one.id == which);
    let one = by_id.or_else(|| list.iter().find(|one| one.name == which));
    let one = one.ok_or_else(|| not_found(which))?;
    one.check_l1(&header)?;
    let size = one.disk_size.filter(|&size| size > 0).unwrap_or(header.size);
    let entries = header.geometry().l1_entries(size).max(one.l1_size.into());
    if size > OFFSET_MAX || entries > L1_BYTES_MAX / 8 {
        return Err(Error::Corrupt { what: "the snapshot's disk is too large", at: one.l1_offset });
    }
    let mut l1 = read_words(file, one.l1_offset, one.l1_size as usize, "read an L1 table")?;
    l1.resize(entries as usize, 0);
    change(file, |mut header, room| {
        let l1_offset = room.put_l1(&l1)?;
        (header.size, header.l1_offset, header.l1_size) = (size, l1_offset, entries as u32);
        Ok(header)
    })
}

/// Deletes the first snapshot of this name.
///
/// # Errors
///
/// As [`create`]; [`Error::Invalid`] if there is none.
pub fn delete<F: Store>(file: &F, name: &[u8]) -> Result<(), Error> {
    let (_, mut list) = load(file)?;
    let index = list.iter().position(|one| one.name == name).ok_or_else(|| not_found(name))?;
    list.remove(index);
    change(file, |header, room| with_snapshots(header, room, &list))
}

/// Which snapshot is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Which {
    /// The one with this id.
    pub id: Option<Vec<u8>>,
    /// The one with this name; the first of several.
    pub name: Option<Vec<u8>>,
}

impl Which {
    fn is(&self, one: &Snapshot) -> bool {
        let fits = |wanted: &Option<Vec<u8>>, has| wanted.as_ref().is_none_or(|text| text == has);
        fits(&self.id, &one.id) && fits(&self.name, &one.name)
    }
}

/// Has `image`, which was opened for reading, say what was where when a snapshot was made. Its size stays
/// that of the disk as it is, as QEMU has it: what the disk has gained is not allocated.
///
/// # Errors
///
/// [`Error::Invalid`] if none of `which` is there; [`Error::Corrupt`] for bad tables; [`Error::Io`].
pub fn look_at<F: Store>(file: &F, image: &mut Opened, which: &[Which]) -> Result<(), Error> {
    let list = snapshot_table::read(file, &image.header)?;
    let found = which.iter().find_map(|which| list.iter().find(|one| which.is(one)));
    let one = found.ok_or_else(|| Error::Invalid("Can't find snapshot".into()))?;
    one.check_l1(&image.header)?;
    let entries = image.geometry().l1_entries(image.header.size);
    let there = entries.min(one.l1_size.into()) as usize;
    image.l1 = read_words(file, one.l1_offset, there, "read an L1 table")?;
    image.l1.resize(entries as usize, 0);
    image.header.l1_offset = one.l1_offset;
    image.header.l1_size = entries as u32;
    Ok(())
}

fn load<F: Store>(file: &F) -> Result<(Header, Vec<Snapshot>), Error> {
    let header = read_header(file)?;
    header.check_tables()?;
    if header.has_data_file() {
        let what = "an image with a data file has no internal snapshots";
        return Err(Error::Unsupported(what.into()));
    }
    if header.is_corrupt() {
        let what = "qcow2: Image is corrupt; cannot be opened read/write";
        return Err(Error::Corrupt { what, at: 72 });
    }
    let list = snapshot_table::read(file, &header)?;
    Ok((header, list))
}

fn not_found(which: &[u8]) -> Error {
    let name = String::from_utf8_lossy(which);
    Error::Invalid(format!("there is no snapshot '{}'", Shown(name.as_ref().as_ref())))
}
