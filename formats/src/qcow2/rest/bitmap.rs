//! Persistent dirty bitmaps: their directory.
//!
//! We read it, count its clusters, and write no bit of a bitmap while an image runs. The specification leaves two honest
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
//! A disk that only changes its size, with nobody writing it, has bitmaps that are as right as before.
//! [`resize`] makes them as long as the disk, with zeros for what it gains, and lets them be believed
//! again.
//!
//! An image that was just made gets [copies](copy) of another one's bitmaps, bit for bit, when all of its
//! disk is there.
//!
//! Section "Bitmaps extension" and "Bitmap directory" of the specification.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cowbell_engine::store::Store;

use crate::error::{Error, Shown};
use crate::qcow2::disk::header::{Area, Bitmaps, Header, u16_at, u32_at, u64_at};
use crate::qcow2::disk::snapshot_table::Cursor;
use crate::qcow2::rest::check::change::{Room, change};
use crate::qcow2::rest::open::{read_header, read_words};

/// A bitmap table has at most this many entries (QEMU's limit): a GiB, read in pieces.
pub const TABLE_SIZE_MAX: u32 = 0x800_0000;
/// A bitmap's name has at most this many bytes.
pub const NAME_MAX: usize = 1023;
/// One bit stands for 2^9 to 2^31 bytes.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The bits of a bitmap that changes its size take at most this many bytes (QEMU's limit).
pub const BYTES_MAX: u64 = 512 << 20;
/// The fixed part of an entry, in bytes.
const ENTRY_BYTES: usize = 24;
/// Bits of a table's entry: where the cluster is.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// An entry without a cluster, whose bits are all 1.
const ALL_ONES: u64 = 1;
const IN_USE: u32 = 1;
const AUTO: u32 = 2;
const KNOWN_FLAGS: u32 = 7;

/// One bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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

/// The most stretches that [`Bitmap::changed`] answers.
const STRETCHES_MAX: usize = 16 << 20;

impl Bitmap {
    /// What the bitmap says has changed on a disk of `size` bytes: stretches in order, with at least 64 KiB
    /// between two.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if its contents are not to be believed; [`Error::Corrupt`] if it is not as long
    /// as the disk, or has a table entry that cannot be; [`Error::Limit`] if there are more than 16 Mi stretches;
    /// [`Error::Io`].
    pub fn changed<F: Store>(
        &self,
        file: &F,
        header: &Header,
        size: u64,
    ) -> Result<Vec<Range<u64>>, Error> {
        if self.is_in_use() {
            let name = Shown(Path::new(OsStr::from_bytes(&self.name))).to_string();
            let what = format!("Bitmap '{name}' is inconsistent and cannot be used");
            return Err(Error::Invalid(what));
        }
        if self.table.len != self.clusters(size, header) * 8 {
            return corrupt("A bitmap is not as long as the disk", self.entry_at);
        }
        let cluster_size = 1usize << header.cluster_bits;
        let mut cluster = vec![0; cluster_size];
        let mut changed = Changed { size, bits: self.granularity_bits, stretches: Vec::new() };
        // A part of the table at a time: it may be long.
        const AT_ONCE: u64 = 1 << 16;
        for from in (0..self.table.len).step_by(AT_ONCE as usize) {
            let len = AT_ONCE.min(self.table.len - from);
            let at = self.table.offset + from;
            let table = read_words(file, at, (len / 8) as usize, "read a bitmap table")?;
            for (n, entry) in table.into_iter().enumerate() {
                let first = (from / 8 + n as u64) * (cluster_size as u64 * 8);
                let at = entry & OFFSET;
                let is_sound = header.can_be_at(at, cluster_size as u64);
                match entry {
                    0 => {}
                    ALL_ONES => changed.add(first, cluster_size as u64 * 8)?,
                    _ if entry & !OFFSET == 0 && is_sound => {
                        file.read_at(at, &mut cluster).map_err(Error::io("read a bitmap"))?;
                        changed.add_bits(first, &cluster)?;
                    }
                    _ => return corrupt("A bitmap table entry is invalid", self.table.offset),
                }
            }
        }
        Ok(changed.stretches)
    }
}

/// Stretches that bits have told of.
struct Changed {
    size: u64,
    /// log2 of the bytes that one bit stands for.
    bits: u8,
    stretches: Vec<Range<u64>>,
}

impl Changed {
    /// The bits of `bytes`, of which the first is bit number `first` of the bitmap.
    fn add_bits(&mut self, first: u64, bytes: &[u8]) -> Result<(), Error> {
        for (n, &byte) in bytes.iter().enumerate().filter(|&(_, &byte)| byte != 0) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                self.add(first + n as u64 * 8 + bit, 1)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, first: u64, count: u64) -> Result<(), Error> {
        const BETWEEN: u64 = 64 << 10;
        let at = |bit: u64| bit.saturating_mul(1 << self.bits).min(self.size);
        let stretch = at(first)..at(first + count);
        let is_full = self.stretches.len() == STRETCHES_MAX;
        match self.stretches.last_mut() {
            _ if stretch.is_empty() => {}
            Some(last) if stretch.start < last.end + BETWEEN => last.end = stretch.end,
            _ if is_full => return Err(Error::Limit("A bitmap has too many stretches".into())),
            _ => self.stretches.push(stretch),
        }
        Ok(())
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
    put_flags(file, bitmaps, |flags| flags | IN_USE)
}

/// Writes the flags of those that were to be believed, and makes that stable.
fn put_flags<F: Store>(
    file: &F,
    bitmaps: &[Bitmap],
    flags: impl Fn(u32) -> u32,
) -> Result<(), Error> {
    let mut marked = false;
    for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.is_in_use()) {
        let flags = flags(bitmap.flags).to_be_bytes();
        file.write_at(bitmap.entry_at + 12, &flags).map_err(Error::io("mark a bitmap"))?;
        marked = true;
    }
    if marked {
        file.flush().map_err(Error::io("flush the bitmap directory"))?;
    }
    Ok(())
}

/// Refuses bitmaps that cannot follow a disk from `old` bytes to `new`.
///
/// # Errors
///
/// [`Error::Invalid`] for one that is not to be believed; [`Error::Limit`] for one that would be too
/// large; [`Error::Corrupt`] for one that is not as long as the disk.
pub fn check_resize(bitmaps: &[Bitmap], header: &Header, old: u64, new: u64) -> Result<(), Error> {
    for bitmap in bitmaps {
        let name = || Shown(Path::new(OsStr::from_bytes(&bitmap.name))).to_string();
        if bitmap.is_in_use() {
            return Err(Error::Invalid(format!(
                "Bitmap '{}' is inconsistent and cannot be used",
                name()
            )));
        }
        if bitmap.table.len != bitmap.clusters(old, header) * 8 {
            return corrupt("A bitmap is not as long as the disk", bitmap.entry_at);
        }
        if bitmap.clusters(new, header) > BYTES_MAX >> header.cluster_bits {
            return Err(Error::Limit(format!("Bitmap '{}' would be too large", name())));
        }
    }
    Ok(())
}

/// Makes these bitmaps, which were to be believed when the disk had `old` bytes and nobody wrote it, as
/// long as the disk, and lets them be believed.
///
/// # Errors
///
/// As [`check_resize`]; [`Error::Io`].
pub fn resize<F: Store>(file: &F, bitmaps: &[Bitmap], old: u64) -> Result<(), Error> {
    if bitmaps.iter().all(Bitmap::is_in_use) {
        return Ok(());
    }
    if read_header(file)?.disk_size() == old {
        return put_flags(file, bitmaps, |flags| flags);
    }
    change(file, |mut header, room| {
        let Some(extension) = header.bitmaps() else { return Ok(header) };
        let mut directory = vec![0; extension.directory.len as usize];
        let at = extension.directory.offset;
        file.read_at(at, &mut directory).map_err(Error::io("read the bitmap directory"))?;
        for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.is_in_use()) {
            check_resize(std::slice::from_ref(bitmap), &header, old, header.disk_size())?;
            let table = bitmap.resized(file, &header, old, room)?;
            let entry = &mut directory[(bitmap.entry_at - at) as usize..];
            entry[8..12].copy_from_slice(&(table.len() as u32).to_be_bytes());
            entry[12..16].copy_from_slice(&bitmap.flags.to_be_bytes());
            let table: Vec<u8> = table.into_iter().flat_map(u64::to_be_bytes).collect();
            entry[..8].copy_from_slice(&room.put(&table)?.to_be_bytes());
        }
        header.set_bitmap_directory(room.put(&directory)?);
        Ok(header)
    })
}

/// Gives an image that has no bitmaps copies of these of another one, whose disk is as long. Who makes an
/// image does so last: a crash meanwhile may leave an image that cannot be opened.
///
/// # Errors
///
/// [`Error::Invalid`] for one that is not to be believed, or if the disks differ in size;
/// [`Error::Corrupt`] for one that is not as long as the disk, or has a table entry that cannot be;
/// [`Error::Limit`] for one that would be too large; [`Error::Unsupported`] for an image of version 2, or with
/// bitmaps; [`Error::Io`].
pub fn copy<S: Store, F: Store>(
    bitmaps: &[Bitmap],
    source: &S,
    source_header: &Header,
    file: &F,
) -> Result<(), Error> {
    if bitmaps.is_empty() {
        return Ok(());
    }
    let mut header = read_header(file)?;
    let size = header.disk_size();
    if size != source_header.disk_size() {
        return Err(Error::Invalid("bitmaps are of disks of the same size".into()));
    }
    check_resize(bitmaps, source_header, size, size)?;
    header.make_room_for_bitmaps()?;
    file.write_at(0, &header.encode()).map_err(Error::io("write the header"))?;
    file.flush().map_err(Error::io("flush the header"))?;
    change(file, |mut header, room| {
        let mut directory = Vec::new();
        for bitmap in bitmaps {
            let table = bitmap.copied(source, source_header, &header, room)?;
            let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            directory.extend(room.put(&bytes)?.to_be_bytes());
            directory.extend((table.len() as u32).to_be_bytes());
            directory.extend(bitmap.flags.to_be_bytes());
            directory.extend([1, bitmap.granularity_bits]);
            directory.extend((bitmap.name.len() as u16).to_be_bytes());
            directory.extend([0; 4]);
            directory.extend(&bitmap.name);
            directory.resize(directory.len().next_multiple_of(8), 0);
        }
        let (len, offset) = (directory.len() as u64, room.put(&directory)?);
        let directory = Area { offset, len };
        header.set_bitmaps(Bitmaps { count: bitmaps.len() as u32, directory });
        Ok(header)
    })
}

impl Bitmap {
    /// The table of a copy in another image.
    fn copied<S: Store, F: Store>(
        &self,
        source: &S,
        source_header: &Header,
        header: &Header,
        room: &mut Room<'_, F>,
    ) -> Result<Vec<u64>, Error> {
        let bits = self.bits(header.disk_size());
        let bytes = bits.div_ceil(8);
        let cluster_size = header.cluster_size();
        if bytes > BYTES_MAX {
            return Err(Error::Limit("a bitmap would be too large".into()));
        }
        let mut cluster = vec![0; cluster_size as usize];
        let mut table = Vec::new();
        for at in (0..bytes).step_by(cluster_size as usize) {
            let len = cluster_size.min(bytes - at) as usize;
            cluster.fill(0);
            self.read_bits(source, source_header, at, &mut cluster[..len])?;
            if at + len as u64 == bytes && !bits.is_multiple_of(8) {
                cluster[len - 1] &= (1 << (bits % 8)) - 1;
            }
            table.push(match cluster.first() {
                Some(0) if cluster.iter().all(|&byte| byte == 0) => 0,
                Some(0xff) if cluster.iter().all(|&byte| byte == 0xff) => ALL_ONES,
                _ => room.put(&cluster)?,
            });
        }
        Ok(table)
    }

    /// Fills `buf` with the bitmap's bytes from number `at` on.
    fn read_bits<F: Store>(
        &self,
        file: &F,
        header: &Header,
        at: u64,
        buf: &mut [u8],
    ) -> Result<(), Error> {
        let (size, mut done) = (header.cluster_size(), 0);
        while done < buf.len() {
            let at = at + done as u64;
            let len = (size - at % size).min((buf.len() - done) as u64) as usize;
            let part = &mut buf[done..done + len];
            let word = self.table.offset + at / size * 8;
            let entry = read_words(file, word, 1, "read a bitmap table")?[0];
            let cluster = entry & OFFSET;
            match entry {
                0 => part.fill(0),
                ALL_ONES => part.fill(0xff),
                _ if entry == cluster && header.can_be_at(cluster, size) => {
                    let read = file.read_at(cluster + at % size, part);
                    read.map_err(Error::io("read a bitmap"))?;
                }
                _ => return corrupt("A bitmap table entry is invalid", self.table.offset),
            }
            done += len;
        }
        Ok(())
    }

    /// Bytes of its directory entry, with what pads it.
    pub(crate) fn entry_bytes(&self) -> u64 {
        (ENTRY_BYTES + self.name.len()).next_multiple_of(8) as u64
    }

    /// Bits for a disk of this size.
    pub(crate) fn bits(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.granularity_bits)
    }

    /// Entries in the table for a disk of this size.
    fn clusters(&self, size: u64, header: &Header) -> u64 {
        self.bits(size).div_ceil(header.cluster_size() * 8)
    }

    /// The table for the disk as it is now.
    fn resized<F: Store>(
        &self,
        file: &F,
        header: &Header,
        old: u64,
        room: &mut Room<'_, F>,
    ) -> Result<Vec<u64>, Error> {
        let new = header.disk_size();
        let (old_clusters, clusters) = (self.clusters(old, header), self.clusters(new, header));
        let kept = old_clusters.min(clusters) as usize;
        let mut table = read_words(file, self.table.offset, kept, "read a bitmap table")?;
        table.resize(clusters as usize, 0);
        // Behind the last bit that both have are zeros.
        let bits = self.bits(old).min(self.bits(new));
        let per_cluster = header.cluster_size() * 8;
        let (last, inside) = ((bits / per_cluster) as usize, (bits % per_cluster) as usize);
        if inside > 0 && table[last] != 0 {
            let mut bytes = vec![0xff; header.cluster_size() as usize];
            if table[last] != ALL_ONES {
                let at = table[last] & OFFSET;
                file.read_at(at, &mut bytes).map_err(Error::io("read a bitmap"))?;
            }
            let before = bytes.clone();
            bytes[inside.div_ceil(8)..].fill(0);
            if !inside.is_multiple_of(8) {
                bytes[inside / 8] &= (1 << (inside % 8)) - 1;
            }
            if bytes != before {
                table[last] = room.put(&bytes)?;
            }
        }
        Ok(table)
    }
}

fn corrupt<T>(what: &'static str, at: u64) -> Result<T, Error> {
    Err(Error::Corrupt { what, at })
}
