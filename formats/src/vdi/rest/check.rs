//! Checking a VDI image, and repairing it: whole, since nothing but the map can be wrong.
//!
//! Errors are entries that lead past the file's end, blocks that more than one entry names, and a
//! header that counts fewer blocks than there are. Leaks are blocks that are counted or in the file
//! and that no entry names.
//!
//! A repair takes the first kind of entry off: their blocks read as zeros. Of a block named twice,
//! each entry but the first gets a copy: all read as before. Leaks at the file's end are cut off; those
//! between blocks stay, for new blocks to fill. What an entry is to lead to is stable and counted
//! before it does.

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::parts::length::file_len;
use crate::parts::report::{Repair, Report};
use crate::vdi::disk::layout::{Entry, Header, UNALLOCATED};
use crate::vdi::rest::open::{read_header, read_map, write_header};

/// Checks the image in `file`, and repairs it as told. The report has no more than errors, leaks
/// and the disk's blocks.
///
/// # Errors
///
/// What [`Header::parse`] says; [`Error::Io`].
pub fn check<F: Store>(file: &F, repair: Repair) -> Result<Report, Error> {
    let len = file_len(file)?;
    let header = read_header(file, len)?;
    let map = read_map(file, &header)?;
    let owners = vec![None; header.blocks_in(len) as usize];
    let mut image = Image { file, header, map, owners };
    let mut report = Report { total_clusters: image.header.blocks.into(), ..Report::default() };
    let (mut past, mut again) = (Vec::new(), Vec::new());
    for index in 0..image.header.blocks {
        let raw = image.map[index as usize];
        match image.header.entry(raw) {
            Some(Entry::Zero) => continue,
            Some(Entry::Block(block)) => match image.owners.get_mut(block as usize) {
                Some(Some(_)) => again.push(index),
                Some(owner) => *owner = Some(index),
                None => past.push(index),
            },
            None => past.push(index),
        }
        report.allocated_clusters += 1;
    }
    let end = image.end();
    let too_low = image.header.allocated < end;
    let errors = (past.len() + again.len()) as u64 + u64::from(too_low);
    // What lies behind the image on a device is not its own.
    let in_file = if file.has_fixed_len() { end as usize } else { image.owners.len() };
    let leaks = u64::from(image.header.allocated).max(in_file as u64) - image.named();
    (report.corruptions, report.leaks) = (errors, leaks);
    if repair == Repair::All && errors > 0 {
        // As many as there may be when all have a block of their own.
        let counted = image.header.allocated.max(end).saturating_add(again.len() as u32);
        image.count(counted.min(image.header.blocks))?;
        for index in past {
            image.put(index, UNALLOCATED)?;
        }
        image.part(&again)?;
        (report.corruptions, report.corruptions_fixed) = (0, errors);
    }
    if repair != Repair::None && report.corruptions == 0 && (leaks > 0 || errors > 0) {
        let end = image.end();
        image.count(end)?;
        file.set_len(image.header.offset_of(end)).map_err(Error::io("cut off the image's end"))?;
        report.leaks = u64::from(end) - image.named();
        report.leaks_fixed = leaks.saturating_sub(report.leaks);
    }
    Ok(report)
}

struct Image<'a, F> {
    file: &'a F,
    header: Header,
    map: Vec<u32>,
    /// Which entry names each block.
    owners: Vec<Option<u32>>,
}

impl<F: Store> Image<'_, F> {
    /// The first block behind the last that is named.
    fn end(&self) -> u32 {
        self.owners.iter().rposition(Option::is_some).map_or(0, |last| last as u32 + 1)
    }

    fn named(&self) -> u64 {
        self.owners.iter().flatten().count() as u64
    }

    fn count(&mut self, blocks: u32) -> Result<(), Error> {
        self.flush()?;
        self.header.allocated = blocks;
        write_header(self.file, &self.header)
    }

    fn flush(&self) -> Result<(), Error> {
        self.file.flush().map_err(Error::io("flush the image"))
    }

    /// Writes an entry, with its sector.
    fn put(&mut self, index: u32, raw: u32) -> Result<(), Error> {
        self.map[index as usize] = raw;
        let first = index as usize / 128 * 128;
        let bytes: Vec<u8> =
            self.map[first..][..128].iter().flat_map(|e| e.to_le_bytes()).collect();
        let at = self.header.map_offset + first as u64 * 4;
        self.file.write_at(at, &bytes).map_err(Error::io("repair the block map"))
    }

    /// Makes `index` name `to`, with what is in `from`.
    fn copy(&mut self, index: u32, from: u32, to: u32) -> Result<(), Error> {
        let size = self.header.block_size();
        let mut chunk = vec![0; size.min(1 << 20) as usize];
        for done in (0..size).step_by(chunk.len()) {
            let at = self.header.offset_of(from) + done;
            self.file.read_at(at, &mut chunk).map_err(Error::io("read a block"))?;
            let at = self.header.offset_of(to) + done;
            self.file.write_at(at, &chunk).map_err(Error::io("copy a block"))?;
        }
        self.flush()?;
        self.put(index, to)?;
        self.flush()?;
        self.owners[to as usize] = Some(index);
        Ok(())
    }

    /// Gives these entries blocks of their own. There are enough: a block for each entry.
    fn part(&mut self, again: &[u32]) -> Result<(), Error> {
        let mut to = 0;
        for &index in again {
            while self.owners.get(to).is_some_and(Option::is_some) {
                to += 1;
            }
            if to == self.owners.len() {
                self.owners.push(None);
            }
            self.copy(index, self.map[index as usize], to as u32)?;
        }
        Ok(())
    }
}
