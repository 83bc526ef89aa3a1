//! Deflated grains: the work for a processor.
//!
//! A grain in the file is a marker of 12 bytes (the grain's first sector, the size of what
//! follows) and a zlib stream that inflates to exactly a grain; a last grain may be short.

use cowbell_engine::units::Errno;
use flate2::{Compress, Compression, FlushCompress, Status};
use libdeflater::{CompressionLvl, Compressor};

use crate::vmdk::disk::layout::{GRAIN_MARKER_BYTES, Header, Marker, SECTOR, SECTOR_BITS};

/// The most bytes that a deflated grain takes, marker included, in whole sectors. Deflate makes
/// what it cannot shrink slightly longer.
pub fn size_max(grain_size: u64) -> u64 {
    (grain_size + grain_size / 64 + 64 + GRAIN_MARKER_BYTES as u64).next_multiple_of(SECTOR)
}

/// The marker at the start of `bytes`, if it is that of the grain at sector `lba` and of a size
/// that can be: the bytes that the whole takes.
///
/// # Errors
///
/// [`Errno::INVALID`].
pub fn marked_len(bytes: &[u8], lba: u64, grain_size: u64) -> Result<u64, Errno> {
    match Marker::parse(bytes) {
        Some(Marker::Grain { lba: found, size }) if found == lba => {
            let len = u64::from(size) + GRAIN_MARKER_BYTES as u64;
            if len > size_max(grain_size) { Err(Errno::INVALID) } else { Ok(len) }
        }
        _ => Err(Errno::INVALID),
    }
}

/// Inflates what follows the marker at the start of `input` into all of `output`.
///
/// # Errors
///
/// [`Errno::INVALID`] for what is no deflated grain, or one of another length.
pub fn inflate(input: &[u8], output: &mut [u8]) -> Result<(), Errno> {
    if inflate_some(input, output)? == output.len() { Ok(()) } else { Err(Errno::INVALID) }
}

/// As [`inflate`], for the last grain, which may be short: what is missing becomes zeros.
///
/// # Errors
///
/// As [`inflate`].
pub fn inflate_last(input: &[u8], output: &mut [u8]) -> Result<(), Errno> {
    let len = inflate_some(input, output)?;
    output[len..].fill(0);
    Ok(())
}

fn inflate_some(input: &[u8], output: &mut [u8]) -> Result<usize, Errno> {
    let Some(Marker::Grain { size, .. }) = Marker::parse(input) else {
        return Err(Errno::INVALID);
    };
    let end = GRAIN_MARKER_BYTES + size as usize;
    let Some(stream) = input.get(GRAIN_MARKER_BYTES..end) else { return Err(Errno::INVALID) };
    let inflated = libdeflater::Decompressor::new().zlib_decompress(stream, output);
    inflated.map_err(|_| Errno::INVALID)
}

/// Is the grain at sector `lba` the last of the extent?
pub fn is_last(header: &Header, lba: u64) -> bool {
    lba.saturating_add(header.grain_size() >> SECTOR_BITS) >= header.capacity
}

/// A whole grain as it may be in the file in at most `room` bytes, if that is found: the marker of the grain at sector `lba`, and
/// a stream. It is the same on every machine.
pub fn fitted(lba: u64, grain: &[u8], room: usize) -> Option<Vec<u8>> {
    let mut output = vec![0; size_max(grain.len() as u64) as usize];
    let (marker, stream) = output.split_at_mut_checked(GRAIN_MARKER_BYTES)?;
    let room = room.checked_sub(GRAIN_MARKER_BYTES)?;
    // Either is the better one for some.
    let len = Compressor::new(CompressionLvl::default()).zlib_compress(grain, stream).ok();
    let len = len.filter(|&len| len <= room).or_else(|| {
        let mut deflater = Compress::new(Compression::default(), true);
        let status = deflater.compress(grain, stream, FlushCompress::Finish);
        matches!(status, Ok(Status::StreamEnd)).then_some(deflater.total_out() as usize)
    });
    let size = len.filter(|&len| len <= room)?;
    marker.copy_from_slice(&Marker::Grain { lba, size: size as u32 }.encode(0)[..12]);
    output.truncate(GRAIN_MARKER_BYTES + size);
    Some(output)
}

/// Deflates `input`, a whole grain, into `output`: room for the marker, the stream, and zeros to
/// the end of a sector. The marker's size is filled in; whose grain it is, is not.
///
/// # Errors
///
/// [`Errno::INVALID`] if `output` is too short; [`size_max`] is enough.
pub fn deflate(input: &[u8], output: &mut [u8]) -> Result<(), Errno> {
    let Some((marker, stream)) = output.split_at_mut_checked(GRAIN_MARKER_BYTES) else {
        return Err(Errno::INVALID);
    };
    let mut deflater = Compress::new(Compression::default(), true);
    match deflater.compress(input, stream, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => {}
        _ => return Err(Errno::INVALID),
    }
    let size = deflater.total_out();
    marker.copy_from_slice(&Marker::Grain { lba: 0, size: size as u32 }.encode(0)[..12]);
    let end = (size + GRAIN_MARKER_BYTES as u64).next_multiple_of(SECTOR) as usize;
    output[size as usize + GRAIN_MARKER_BYTES..end].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(grain: &[u8]) -> u64 {
        let mut compressed = vec![0xaa; size_max(grain.len() as u64) as usize];
        deflate(grain, &mut compressed).expect("there is room");
        let len = marked_len(&compressed, 0, grain.len() as u64).expect("it is marked");
        let mut inflated = vec![0xbb; grain.len()];
        inflate(&compressed[..len as usize], &mut inflated).expect("it is whole");
        assert_eq!(inflated, grain);
        len
    }

    #[test]
    fn grains_round_trip() {
        assert!(round_trip(&[7; 65536]) < 512);
        let mut seed = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 56) as u8
        })
        .take(1 << 20)
        .collect();
        for size in [4096, 65536, 1 << 20] {
            assert!(round_trip(&noise[..size]) <= size_max(size as u64));
        }
    }

    #[test]
    fn what_is_no_grain_is_refused() {
        let mut compressed = vec![0; size_max(4096) as usize];
        deflate(&[3; 4096], &mut compressed).expect("there is room");
        let len = marked_len(&compressed, 0, 4096).expect("it is marked") as usize;
        assert_eq!(marked_len(&compressed, 8, 4096), Err(Errno::INVALID));
        let mut out = vec![0; 4096];
        // A byte short, no marker, too little room, noise.
        assert!(inflate(&compressed[..len - 1], &mut out).is_err());
        assert!(inflate(&compressed[..8], &mut out).is_err());
        assert!(inflate(&compressed[..len], &mut out[..4095]).is_err());
        assert!(inflate(&compressed[..len], &mut [1; 4097]).is_err());
        let mut long = [1; 4097];
        inflate_last(&compressed[..len], &mut long).expect("it may be short");
        assert_eq!(long[4095..], [3, 0]);
        compressed[20] ^= 0x55;
        assert!(inflate(&compressed[..len], &mut out).is_err());
        compressed[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(marked_len(&compressed, 0, 4096), Err(Errno::INVALID));
    }
}
