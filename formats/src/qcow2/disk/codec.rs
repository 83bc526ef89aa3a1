//! Compressed clusters: inflating one, and deflating one.
//!
//! The bytes of one that is inflated are untrusted. The output is as long as a cluster and cannot become longer; memory is
//! bounded by the decoders' windows: 32 KiB of deflate, 16 MiB of Zstandard.

use cowbell_engine::op::Compute;
use cowbell_engine::units::Errno;
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use libdeflater::CompressionLvl;
use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer};

use crate::qcow2::disk::header::Compression;
use crate::qcow2::disk::layout::Invalid;

/// The largest window, as a power of two, that a Zstandard frame may ask for: eight times a
/// cluster at most, and what the highest ordinary level takes.
const WINDOW_BITS_MAX: u32 = 24;

/// Inflates `input` into all of `output`, one cluster. What follows in `input` is not looked at: it
/// is as long as its sectors, not as the stream in it.
///
/// # Errors
///
/// [`Invalid`] if that is no such stream, or one of less or more than a cluster.
pub fn inflate(compression: Compression, input: &[u8], output: &mut [u8]) -> Result<(), Invalid> {
    match compression {
        Compression::Zlib => inflate_raw(input, output),
        Compression::Zstd => inflate_zstd(input, output),
    }
}

/// [Compressed Clusters Descriptor]: a raw deflate stream, without header or checksum.
fn inflate_raw(input: &[u8], output: &mut [u8]) -> Result<(), Invalid> {
    if libdeflater::Decompressor::new().deflate_decompress(input, output) == Ok(output.len()) {
        return Ok(());
    }
    // It wants a stream to end where its bytes do; others do not.
    let mut stream = Decompress::new(false);
    // A full output is all that is wanted, whether or not the stream says that it ends there.
    let _ = stream.decompress(input, output, FlushDecompress::Finish).map_err(|_| Invalid)?;
    if stream.total_out() == output.len() as u64 { Ok(()) } else { Err(Invalid) }
}

fn inflate_zstd(input: &[u8], output: &mut [u8]) -> Result<(), Invalid> {
    let mut stream = DCtx::try_create().ok_or(Invalid)?;
    stream.set_parameter(DParameter::WindowLogMax(WINDOW_BITS_MAX)).map_err(|_| Invalid)?;
    let wanted = output.len();
    let (mut from, mut to) = (InBuffer::around(input), OutBuffer::around(output));
    loop {
        let before = (from.pos(), to.pos());
        let hint = stream.decompress_stream(&mut to, &mut from).map_err(|_| Invalid)?;
        if hint == 0 {
            // The frame's end.
            return if to.pos() == wanted { Ok(()) } else { Err(Invalid) };
        }
        if (from.pos(), to.pos()) == before {
            return Err(Invalid);
        }
    }
}

/// Inflating as work for a processor: see [`inflate`].
pub fn inflating(compression: Compression) -> Compute {
    match compression {
        Compression::Zlib => Compute {
            name: "inflate-zlib",
            run: |input, output| inflate(Compression::Zlib, input, output).map_err(|_| Errno::IO),
        },
        Compression::Zstd => Compute {
            name: "inflate-zstd",
            run: |input, output| inflate(Compression::Zstd, input, output).map_err(|_| Errno::IO),
        },
    }
}

/// Deflating as work for a processor: see [`deflate`].
pub fn deflating(compression: Compression) -> Compute {
    match compression {
        Compression::Zlib => Compute {
            name: "deflate-zlib",
            run: |input, output| deflate(Compression::Zlib, input, output).map_err(|_| Errno::IO),
        },
        Compression::Zstd => Compute {
            name: "deflate-zstd",
            run: |input, output| deflate(Compression::Zstd, input, output).map_err(|_| Errno::IO),
        },
    }
}

/// Bytes in front of a deflated cluster: its length, little-endian.
pub const DEFLATED_HEADER: usize = 4;

/// log2 of the window of a deflate stream: QEMU inflates with no more.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// Zstandard's own default.
const ZSTD_LEVEL: i32 = 3;

/// Deflates `input`, a cluster, into `output`, which is as long and [`DEFLATED_HEADER`] bytes more:
/// the length, and the stream. A length of 0 says that it did not become smaller.
///
/// # Errors
///
/// [`Invalid`] if there is no memory, or `output` is too short for a length.
pub fn deflate(compression: Compression, input: &[u8], output: &mut [u8]) -> Result<(), Invalid> {
    let (header, stream) = output.split_at_mut_checked(DEFLATED_HEADER).ok_or(Invalid)?;
    // One byte less than a cluster, or it is stored as it is.
    let room = stream.len().min(input.len().saturating_sub(1));
    let len = match compression {
        Compression::Zlib => deflate_raw(input, &mut stream[..room]),
        Compression::Zstd => deflate_zstd(input, &mut stream[..room])?,
    };
    header.copy_from_slice(&(len.unwrap_or(0) as u32).to_le_bytes());
    Ok(())
}

/// A stream of at most `room` bytes that inflates to `input`, if one is found; not one for QEMU, which inflates with a smaller
/// window. It is the same on every machine.
pub fn fitted(compression: Compression, input: &[u8], room: usize) -> Option<Vec<u8>> {
    let mut output = vec![0; input.len()];
    let len = match compression {
        Compression::Zlib => {
            // Either is the better one for some.
            let mut deflater = libdeflater::Compressor::new(CompressionLvl::default());
            let len = deflater.deflate_compress(input, &mut output).ok();
            len.filter(|&len| len <= room).or_else(|| deflate_raw(input, &mut output))
        }
        Compression::Zstd => deflate_zstd(input, &mut output).ok()?,
    };
    output.truncate(len.filter(|&len| len <= room)?);
    Some(output)
}

fn deflate_raw(input: &[u8], output: &mut [u8]) -> Option<usize> {
    let level = flate2::Compression::default();
    let mut stream = Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_BITS);
    match stream.compress(input, output, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => Some(stream.total_out() as usize),
        _ => None,
    }
}

fn deflate_zstd(input: &[u8], output: &mut [u8]) -> Result<Option<usize>, Invalid> {
    let mut stream = CCtx::try_create().ok_or(Invalid)?;
    stream.set_parameter(CParameter::CompressionLevel(ZSTD_LEVEL)).map_err(|_| Invalid)?;
    Ok(stream.compress2(output, input).ok())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), Default::default());
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    }

    fn frame(bytes: &[u8]) -> Vec<u8> {
        zstd::encode_all(bytes, 0).expect("memory")
    }

    #[test]
    fn a_stream_fills_its_cluster_exactly_and_what_follows_is_not_looked_at() {
        let cluster: Vec<u8> = (0..65536u32).map(|i| (i % 251) as u8).collect();
        for (kind, mut input) in
            [(Compression::Zlib, deflated(&cluster)), (Compression::Zstd, frame(&cluster))]
        {
            let mut output = vec![0; cluster.len()];
            let exact = input.len();
            input.extend([0xaa; 511]);
            assert_eq!(inflate(kind, &input, &mut output), Ok(()));
            assert!(output == cluster);
            // Cut short, or for a larger cluster.
            assert_eq!(inflate(kind, &input[..exact / 2], &mut output), Err(Invalid));
            let mut larger = vec![0; cluster.len() + 1];
            assert_eq!(inflate(kind, &input, &mut larger), Err(Invalid));
            assert_eq!(inflate(kind, &[], &mut output), Err(Invalid));
            assert_eq!(inflate(kind, &[0xff; 100], &mut output), Err(Invalid));
        }
    }

    #[test]
    fn a_cluster_is_deflated_and_inflated_or_said_not_to_become_smaller() {
        let mut seed = 1u64;
        let noise = |_| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 56) as u8
        };
        let noise: Vec<u8> = (0..65536).map(noise).collect();
        let text: Vec<u8> = (0..65536u32).map(|i| (i / 7 * i % 61) as u8).collect();
        for kind in [Compression::Zlib, Compression::Zstd] {
            for cluster in [vec![1; 512], vec![0; 65536], text.clone(), vec![7; 2 << 20]] {
                let mut output = vec![0xaa; cluster.len() + DEFLATED_HEADER];
                assert_eq!(deflate(kind, &cluster, &mut output), Ok(()));
                let len = u32::from_le_bytes(output[..4].try_into().expect("four")) as usize;
                assert!(0 < len && len < cluster.len());
                let mut back = vec![0xbb; cluster.len()];
                assert_eq!(inflate(kind, &output[4..4 + len], &mut back), Ok(()));
                assert!(back == cluster);
            }
            let mut output = vec![0xaa; noise.len() + DEFLATED_HEADER];
            assert_eq!(deflate(kind, &noise, &mut output), Ok(()));
            assert_eq!(output[..4], [0; 4]);
        }
    }

    #[test]
    fn a_bomb_makes_no_more_than_a_cluster() {
        let zeros = vec![0; 16 << 20];
        let mut output = vec![1; 4096];
        // QEMU takes the first cluster of a longer deflate stream, and refuses a longer frame.
        assert_eq!(inflate(Compression::Zlib, &deflated(&zeros), &mut output), Ok(()));
        assert!(output == [0; 4096]);
        assert_eq!(inflate(Compression::Zstd, &frame(&zeros), &mut output), Err(Invalid));
    }
}
