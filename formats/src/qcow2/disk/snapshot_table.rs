//! Internal snapshots: their table.
//!
//! A snapshot is a copy of the active L1 table with a name. The table lists them one behind the
//! other, each entry as long as it needs; how many there are and where the table is, the header
//! says. Everything read is bounded: entries, their parts, and the table as a whole.
//!
//! Section "Snapshots" of the specification.

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::qcow2::disk::header::{Header, L1_BYTES_MAX, SNAPSHOTS_MAX, u16_at, u32_at, u64_at};

/// A snapshot table has at most this many bytes (QEMU's limit).
pub const TABLE_BYTES_MAX: u64 = 64 << 20;
/// An entry has at most this many bytes of extra data (QEMU's limit).
pub const EXTRA_MAX: u32 = 1024;
/// The fixed part of an entry, in bytes.
const ENTRY_BYTES: usize = 40;
/// What we know of the extra data, in bytes.
const EXTRA_KNOWN: usize = 24;
/// What version 3 wants of it, in bytes: the machine state's size and the disk's.
const EXTRA_V3: u32 = 16;

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Snapshot {
    /// Its L1 table; has to pass [`Snapshot::check_l1`] before use.
    pub l1_offset: u64,
    /// Entries in its L1 table.
    pub l1_size: u32,
    /// The id: unique, in images of QEMU a decimal number.
    pub id: Vec<u8>,
    /// The name: any text.
    pub name: Vec<u8>,
    /// When it was made: seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// The guest's clock when it was made, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of virtual machine state.
    pub vm_state_size: u64,
    /// The disk's size in bytes when it was made; `None`: not recorded.
    pub disk_size: Option<u64>,
    /// Instructions executed when it was made; `None`: not recorded.
    pub icount: Option<u64>,
    /// Extra data behind what we know.
    pub extra: Vec<u8>,
}

impl Snapshot {
    /// Can its L1 table be where it says?
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`].
    pub fn check_l1(&self, header: &Header) -> Result<(), Error> {
        let bytes = u64::from(self.l1_size) * 8;
        if bytes > L1_BYTES_MAX {
            return corrupt("Snapshot L1 table too large", self.l1_offset);
        }
        if !header.can_be_at(self.l1_offset, bytes) || self.l1_size > 0 && self.l1_offset == 0 {
            return corrupt("Snapshot L1 table offset invalid", self.l1_offset);
        }
        Ok(())
    }

    /// Bytes that it takes in the table, with what pads it to a multiple of 8.
    fn table_bytes(&self) -> usize {
        let extra = EXTRA_KNOWN + self.extra.len();
        (ENTRY_BYTES + extra + self.id.len() + self.name.len()).next_multiple_of(8)
    }
}

/// What a snapshot table holds, as far as it can be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// The snapshots.
    pub list: Vec<Snapshot>,
    /// Bytes that they take in the file.
    pub bytes: u64,
    /// Snapshots that the header counts, and that cannot be in a table.
    pub dropped: u64,
    /// Entries with more extra data than an entry may have; what we know of it is kept.
    pub cut: Vec<u32>,
    /// Entries that do not say what version 3 wants them to: how large the disk was.
    pub incomplete: Vec<u32>,
    /// What is wrong about where it is: behind the file's end, or where too much else is.
    pub misplaced: u64,
}

impl Table {
    /// How many errors a check finds in it. Written again, it has none.
    pub fn errors(&self) -> u64 {
        self.dropped + self.misplaced + (self.cut.len() + self.incomplete.len()) as u64
    }
}

/// Reads the snapshot table.
///
/// # Errors
///
/// [`Error::Corrupt`] if it breaks a bound; [`Error::Io`].
pub fn read<F: Store>(file: &F, header: &Header) -> Result<Vec<Snapshot>, Error> {
    read_table(file, header, false).map(|table| table.list)
}

/// As [`read`], with all there is to say about the table. To `salvage` is to read what breaks a bound
/// as far as that goes.
///
/// # Errors
///
/// The same.
pub fn read_table<F: Store>(file: &F, header: &Header, salvage: bool) -> Result<Table, Error> {
    let count =
        if salvage { header.snapshot_count.min(SNAPSHOTS_MAX) } else { header.snapshot_count };
    header.check_snapshot_table(count)?;
    let mut cursor = Cursor::new(file, header.snapshots_offset, TABLE_BYTES_MAX);
    let mut table = Table {
        list: Vec::with_capacity(count as usize),
        dropped: (header.snapshot_count - count).into(),
        ..Table::default()
    };
    for i in 0..count {
        match read_one(&mut cursor, header, salvage, &mut table) {
            Ok(one) => table.list.push(one),
            Err(Error::Corrupt { .. }) if salvage => {
                table.dropped += u64::from(count - i);
                break;
            }
            Err(why) => return Err(why),
        }
        table.bytes = cursor.at - header.snapshots_offset;
    }
    Ok(table)
}

fn read_one<F: Store>(
    cursor: &mut Cursor<'_, F>,
    header: &Header,
    salvage: bool,
    table: &mut Table,
) -> Result<Snapshot, Error> {
    let at = cursor.at;
    let mut fixed = [0; ENTRY_BYTES];
    cursor.take(&mut fixed)?;
    let extra_len = u32_at(&fixed, 36);
    let is_cut = extra_len > EXTRA_MAX;
    if is_cut && !salvage {
        return corrupt("Too much extra metadata in snapshot table", at);
    }
    let kept = if is_cut { EXTRA_KNOWN as u32 } else { extra_len };
    let mut extra = cursor.bytes(kept as usize)?;
    cursor.skip(u64::from(extra_len - kept))?;
    let id = cursor.bytes(u16_at(&fixed, 12).into())?;
    let name = cursor.bytes(u16_at(&fixed, 14).into())?;
    cursor.align();
    let index = table.list.len() as u32;
    table.cut.extend(is_cut.then_some(index));
    let is_incomplete = header.version > 2 && extra_len < EXTRA_V3;
    table.incomplete.extend(is_incomplete.then_some(index));
    let word = |at: usize| (extra.len() >= at + 8).then(|| u64_at(&extra, at));
    let (large_state, disk_size, icount) = (word(0), word(8), word(16));
    // -1: the machine does not count instructions.
    let icount = icount.filter(|&count| count != u64::MAX);
    Ok(Snapshot {
        l1_offset: u64_at(&fixed, 0),
        l1_size: u32_at(&fixed, 8),
        id,
        name,
        date_sec: u32_at(&fixed, 16),
        date_nsec: u32_at(&fixed, 20),
        vm_clock_nsec: u64_at(&fixed, 24),
        vm_state_size: large_state.unwrap_or(u32_at(&fixed, 32).into()),
        disk_size,
        icount,
        extra: extra.split_off(extra.len().min(EXTRA_KNOWN)),
    })
}

/// The bytes of a table of these snapshots. Where it is not recorded how large the disk was, old
/// programs did not change it: it is as large as it is now.
///
/// # Errors
///
/// [`Error::Limit`] if it would break a bound.
pub fn encode(list: &[Snapshot], disk_size: u64) -> Result<Vec<u8>, Error> {
    let len: usize = list.iter().map(Snapshot::table_bytes).sum();
    if len as u64 > TABLE_BYTES_MAX {
        return Err(Error::Limit("the snapshot table would be too large".into()));
    }
    let mut table = Vec::with_capacity(len);
    for one in list {
        let extra_len = (EXTRA_KNOWN + one.extra.len()) as u32;
        table.extend(one.l1_offset.to_be_bytes());
        table.extend(one.l1_size.to_be_bytes());
        for text in [&one.id, &one.name] {
            let len = u16::try_from(text.len());
            let len = len.map_err(|_| Error::Invalid("a snapshot's name is too long".into()))?;
            table.extend(len.to_be_bytes());
        }
        table.extend(one.date_sec.to_be_bytes());
        table.extend(one.date_nsec.to_be_bytes());
        table.extend(one.vm_clock_nsec.to_be_bytes());
        table.extend(u32::try_from(one.vm_state_size).unwrap_or(0).to_be_bytes());
        table.extend(extra_len.to_be_bytes());
        table.extend(one.vm_state_size.to_be_bytes());
        table.extend(one.disk_size.unwrap_or(disk_size).to_be_bytes());
        table.extend(one.icount.unwrap_or(u64::MAX).to_be_bytes());
        table.extend(&one.extra);
        table.extend(&one.id);
        table.extend(&one.name);
        table.resize(table.len().next_multiple_of(8), 0);
    }
    Ok(table)
}

/// Reads a table from front to back, a bounded piece at a time.
pub(crate) struct Cursor<'a, F> {
    file: &'a F,
    start: u64,
    /// The next byte's offset in the file.
    pub(crate) at: u64,
    end: u64,
    buf: Vec<u8>,
    buf_at: u64,
}

impl<'a, F: Store> Cursor<'a, F> {
    const CHUNK: usize = 64 << 10;

    /// From `start` on, for at most `max` bytes.
    pub(crate) fn new(file: &'a F, start: u64, max: u64) -> Cursor<'a, F> {
        Cursor { file, start, at: start, end: start + max, buf: Vec::new(), buf_at: start }
    }

    /// The next bytes.
    pub(crate) fn take(&mut self, out: &mut [u8]) -> Result<(), Error> {
        if out.len() as u64 > self.end.saturating_sub(self.at) {
            return corrupt("A table in the image is too large", self.start);
        }
        let mut done = 0;
        while done < out.len() {
            let inside = usize::try_from(self.at - self.buf_at).unwrap_or(usize::MAX);
            if inside >= self.buf.len() {
                let len = (self.end - self.at).min(Self::CHUNK as u64) as usize;
                self.buf.resize(len, 0);
                self.buf_at = self.at;
                self.file.read_at(self.at, &mut self.buf).map_err(Error::io("read a table"))?;
                continue;
            }
            let n = (self.buf.len() - inside).min(out.len() - done);
            out[done..done + n].copy_from_slice(&self.buf[inside..inside + n]);
            (done, self.at) = (done + n, self.at + n as u64);
        }
        Ok(())
    }

    /// As [`take`](Self::take).
    pub(crate) fn bytes(&mut self, len: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; len];
        self.take(&mut bytes)?;
        Ok(bytes)
    }

    /// Leaves out the next bytes.
    fn skip(&mut self, len: u64) -> Result<(), Error> {
        if len > self.end.saturating_sub(self.at) {
            return corrupt("A table in the image is too large", self.start);
        }
        self.at += len;
        Ok(())
    }

    /// Skips what pads to a multiple of 8, counted from the table's start.
    pub(crate) fn align(&mut self) {
        self.at = self.start + (self.at - self.start).next_multiple_of(8);
    }
}

fn corrupt<T>(what: &'static str, at: u64) -> Result<T, Error> {
    Err(Error::Corrupt { what, at })
}
