//! What encrypted images say about their encryption. Nothing here decrypts: such images are
//! described, and neither read nor written.

use cowbell_engine::store::Store;

use crate::error::Error;
use crate::qcow2::disk::header::{Area, Encryption, Header, u32_at};

/// A LUKS header's parts, as its text and numbers are: untrusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Luks {
    /// The cipher, as `aes`.
    pub cipher: Vec<u8>,
    /// Its mode and how initialisation vectors are made, as `xts-plain64` or `cbc-essiv:sha256`.
    pub mode: Vec<u8>,
    /// The hash, as `sha256`.
    pub hash: Vec<u8>,
    /// The image's id in LUKS.
    pub uuid: Vec<u8>,
    /// Bytes in the key, of which the mode `xts` uses one half for each of its two.
    pub key_bytes: u32,
    /// Where the disk would start, in bytes from the LUKS header on.
    pub payload_offset: u64,
    /// Rounds that the key's checksum takes.
    pub master_key_iters: u32,
    /// Where copies of the key are, each behind a passphrase of its own.
    pub slots: Vec<Slot>,
}

/// One of the key's copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// It is in use.
    pub active: bool,
    /// Rounds that its passphrase takes.
    pub iters: u32,
    /// Where it is, in bytes from the LUKS header on.
    pub key_offset: u64,
    /// Pieces that it is split into.
    pub stripes: u32,
}

const BYTES: usize = 592;
const SLOTS: usize = 8;
const SLOT_BYTES: usize = 48;
const SLOTS_AT: usize = 208;
const ACTIVE: u32 = 0x00ac_71f3;
const SECTOR: u64 = 512;

/// The LUKS header of an image that has one where it says.
///
/// # Errors
///
/// [`Error::Io`].
pub fn luks<F: Store>(file: &F, header: &Header) -> Result<Option<Luks>, Error> {
    let Some(Encryption::Luks(Some(Area { offset, len }))) = header.encryption else {
        return Ok(None);
    };
    if len < BYTES as u64 || offset > i64::MAX as u64 - BYTES as u64 {
        return Ok(None);
    }
    let mut bytes = [0; BYTES];
    file.read_at(offset, &mut bytes).map_err(Error::io("read the LUKS header"))?;
    Ok(parse(&bytes))
}

fn parse(bytes: &[u8; BYTES]) -> Option<Luks> {
    if !bytes.starts_with(b"LUKS\xba\xbe\0\x01") {
        return None;
    }
    let text = |at: usize, len: usize| {
        let text = &bytes[at..at + len];
        text.split(|&byte| byte == 0).next().unwrap_or(text).to_vec()
    };
    let slot = |i: usize| {
        let at = SLOTS_AT + i * SLOT_BYTES;
        Slot {
            active: u32_at(bytes, at) == ACTIVE,
            iters: u32_at(bytes, at + 4),
            key_offset: u64::from(u32_at(bytes, at + 40)) * SECTOR,
            stripes: u32_at(bytes, at + 44),
        }
    };
    Some(Luks {
        cipher: text(8, 32),
        mode: text(40, 32),
        hash: text(72, 32),
        uuid: text(168, 40),
        key_bytes: u32_at(bytes, 108),
        payload_offset: u64::from(u32_at(bytes, 104)) * SECTOR,
        master_key_iters: u32_at(bytes, 164),
        slots: (0..SLOTS).map(slot).collect(),
    })
}
