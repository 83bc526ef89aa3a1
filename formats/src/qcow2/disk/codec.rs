//! Inflating a compressed cluster.
//!
//! Its bytes are untrusted. The output is as long as a cluster and cannot become longer; memory is
//! bounded by the decoders' windows: 32 KiB of deflate, 16 MiB of Zstandard.

use flate2::{Decompress, FlushDecompress};
use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

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
    fn a_bomb_makes_no_more_than_a_cluster() {
        let zeros = vec![0; 16 << 20];
        let mut output = vec![1; 4096];
        // QEMU takes the first cluster of a longer deflate stream, and refuses a longer frame.
        assert_eq!(inflate(Compression::Zlib, &deflated(&zeros), &mut output), Ok(()));
        assert!(output == [0; 4096]);
        assert_eq!(inflate(Compression::Zstd, &frame(&zeros), &mut output), Err(Invalid));
    }
}
