//! Persistent dirty bitmaps: their directory.
//!
//! We read it, count its clusters, and never write a bitmap. The specification leaves two honest
//! ways to a program that writes an image without keeping its bitmaps up to date: clear the
//! autoclear bit, which drops all bitmaps and leaks their clusters, or set each bitmap's `in_use`
//! flag, which says that its contents are not to be believed and keeps everything else. We do the
//! latter, as QEMU does while it has an image open: who made the bitmap finds it again, by name,
//! marked inconsistent, and removes it.
//!
//! Setting the flag is one write of four bytes for each bitmap, which no sector boundary cuts; the
//! directory is well-formed before, between and after these writes. So nothing has to be cleared
//! first, and a crash on the way loses nothing: until the guest's first write, after the flush,
//! each bitmap is right, marked or not.
//!
//! Section "Bitmaps extension" and "Bitmap directory" of the specification.

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::qcow2::header::{Area, Header, u16_at, u32_at, u64_at};
use crate::qcow2::snapshot::Cursor;

/// A bitmap table has at most this many entries (QEMU's limit): a GiB, read in pieces.
pub const TABLE_SIZE_MAX: u32 = 0x800_0000;
/// A bitmap's name has at most this many bytes.
pub const NAME_MAX: usize = 1023;
/// One bit stands for 2^9 to 2^31 bytes.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The fixed part of an entry, in bytes.
const ENTRY_BYTES: usize = 24;
const IN_USE: u32 = 1;
const AUTO: u32 = 2;
const KNOWN_FLAGS: u32 = 7;

/// One bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: Vec<u8>,
    /// log2 of the bytes that one bit stands for.
    pub granularity_bits: u8,
    /// Its flags as they are on disk.
    pub flags: u32,
    /// Its table.
    pub table: Area,
    /// Where in the file its directory entry is.
    pub entry_at: u64,
}

impl Bitmap {
    /// Its contents are not to be believed.
    pub fn is_in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    /// It shall be kept up to date by whoever writes the image.
    pub fn is_auto(&self) -> bool {
        self.flags & AUTO != 0
    }
}

/// Reads the bitmap directory; none if the image has no bitmaps that may be believed to be there.
///
/// # Errors
///
/// [`Error::Corrupt`] if it breaks a bound; [`Error::Io`].
pub fn read<F: Store>(file: &F, header: &Header) -> Result<Vec<Bitmap>, Error> {
    let Some(bitmaps) = header.bitmaps() else { return Ok(Vec::new()) };
    let directory = bitmaps.directory;
    let mut cursor = Cursor::new(file, directory.offset, directory.len);
    let mut list: Vec<Bitmap> = Vec::new();
    for _ in 0..bitmaps.count {
        list.push(read_one(&mut cursor, header)?);
    }
    if cursor.at != directory.offset + directory.len {
        return corrupt(
            "The bitmap directory has another length than its entries",
            directory.offset,
        );
    }
    let mut names: Vec<&[u8]> = list.iter().map(|bitmap| &bitmap.name[..]).collect();
    names.sort_unstable();
    if names.windows(2).any(|pair| pair[0] == pair[1]) {
        return corrupt("Two bitmaps have one name", directory.offset);
    }
    Ok(list)
}

fn read_one<F: Store>(cursor: &mut Cursor<'_, F>, header: &Header) -> Result<Bitmap, Error> {
    let entry_at = cursor.at;
    let mut fixed = [0; ENTRY_BYTES];
    cursor.take(&mut fixed)?;
    let (offset, entries, flags) = (u64_at(&fixed, 0), u32_at(&fixed, 8), u32_at(&fixed, 12));
    let (kind, granularity_bits) = (fixed[16], fixed[17]);
    let (name_len, extra_len) = (usize::from(u16_at(&fixed, 18)), u32_at(&fixed, 20));
    let bad = name_len == 0
        || name_len > NAME_MAX
        || extra_len != 0
        || entries == 0
        || entries > TABLE_SIZE_MAX
        || offset == 0
        || !header.can_be_at(offset, u64::from(entries) * 8)
        || flags & !KNOWN_FLAGS != 0
        || kind != 1
        || !GRANULARITY_BITS.contains(&granularity_bits);
    if bad {
        return corrupt("A bitmap directory entry is invalid", entry_at);
    }
    let name = cursor.bytes(name_len)?;
    cursor.align();
    let table = Area { offset, len: u64::from(entries) * 8 };
    Ok(Bitmap { name, granularity_bits, flags, table, entry_at })
}

/// Marks these bitmaps as in use, and makes that stable: before the guest's first write.
///
/// # Errors
///
/// [`Error::Io`].
pub fn mark_in_use<F: Store>(file: &F, bitmaps: &[Bitmap]) -> Result<(), Error> {
    let mut marked = false;
    for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.is_in_use()) {
        let flags = (bitmap.flags | IN_USE).to_be_bytes();
        file.write_at(bitmap.entry_at + 12, &flags).map_err(Error::io("mark a bitmap"))?;
        marked = true;
    }
    if marked {
        file.flush().map_err(Error::io("flush the bitmap directory"))?;
    }
    Ok(())
}

fn corrupt<T>(what: &'static str, at: u64) -> Result<T, Error> {
    Err(Error::Corrupt { what, at })
}
