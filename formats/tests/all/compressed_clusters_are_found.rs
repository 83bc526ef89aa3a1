//! Where a compressed cluster is in its file: what is packed and written there is what is read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::{DISK, have_qemu, ok};
use cowbell_formats::map::{self, Kind, Packed};
use cowbell_formats::{Chain, DiskHost, Error, Format, Host, OpenOptions, Policy, chain};

/// A disk of three parts: text, one byte over and over, and zeros; its end is in the middle of a cluster.
fn disk(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let text = (0..len as u32 / 3).map(|at| ((at / 7).wrapping_mul(at) % 61) as u8 + b'0');
    bytes.iter_mut().zip(text).for_each(|(to, from)| *to = from);
    bytes[len / 3..len / 2].fill(7);
    bytes[len - 3000..].fill(9);
    bytes
}

fn all(path: &Path) -> (Chain<<DiskHost as Host>::File>, Vec<Packed>) {
    let options = OpenOptions { backing: Policy::SameDirectory, ..Default::default() };
    let chain = chain::open(&DISK, path, &options).expect("it opens");
    let mut found = Vec::new();
    for extent in map::extents(&chain) {
        let extent = extent.expect("sound tables");
        if extent.kind == Kind::Compressed {
            let clusters: Result<Vec<Packed>, Error> = map::packed(&chain, extent).collect();
            let clusters = clusters.expect("they are there");
            // They are all of the extent, one behind the other.
            assert!(clusters.windows(2).all(|two| two[0].start + two[0].len == two[1].start));
            let last = clusters.last().expect("one at least");
            assert!(clusters[0].start == extent.start);
            assert!((1..=last.len).contains(&(extent.start + extent.len - last.start)));
            found.extend(clusters);
        }
    }
    (chain, found)
}

#[test]
fn what_is_packed_there_is_read() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    let expected = disk((3 << 20) + 5 * 512);
    std::fs::write(dir.join("raw"), &expected).expect("written");
    for options in [
        "-c -O qcow2",
        "-c -O qcow2 -o cluster_size=4k",
        "-c -O qcow2 -o cluster_size=2M,extended_l2=on",
        "-c -O qcow2 -o compression_type=zstd",
        "-O vmdk -o subformat=streamOptimized",
    ] {
        ok(dir, &format!("qemu-img convert -f raw {options} raw i"));
        let format = if options.contains("qcow2") { "qcow2" } else { "vmdk" };
        ok(dir, &format!("qemu-img create -q -f qcow2 -b i -F {format} top"));
        let (chain, found) = all(&dir.join("top"));
        assert!(found.len() > 1 && found.iter().all(|it| it.depth == 1), "{options}");
        let file = File::options().read(true).write(true).open(dir.join("i")).expect("it is there");
        let mut expected = expected.clone();
        expected.resize(expected.len().next_multiple_of(2 << 20), 0);
        for which in [0, found.len() / 2, found.len() - 1] {
            let packed = found[which];
            let here = packed.start as usize..(packed.start + packed.len) as usize;
            let mut cluster = vec![packed.start as u8 ^ 0x55; packed.len as usize];
            let next = found.iter().map(|it| it.host.0).filter(|&at| at > packed.host.0).min();
            let end = next.unwrap_or(u64::MAX).min(packed.host.0 + packed.bytes);
            let room = end - packed.host.0;
            let stream = packed.pack(&cluster, room).expect("it becomes small enough");
            assert!(stream.len() as u64 <= room, "{options}: {packed:?}");
            assert_eq!(packed.pack(&cluster, 1), None);
            let mut before = vec![0; packed.marker() as usize];
            file.read_exact_at(&mut before, packed.host.0).expect("it is read");
            // The marker names the same grain.
            assert!(before.iter().zip(&stream).take(8).all(|(a, b)| a == b), "{options}");
            file.write_all_at(&stream, packed.host.0).expect("it is written");
            expected[here.clone()].copy_from_slice(&cluster);
            map::read(&chain, packed.start, &mut cluster[..512]).expect("it is read");
            assert!(cluster[..512] == expected[here.start..][..512], "{options}: {packed:?}");
        }
        let mut bytes = vec![0; chain.size() as usize];
        map::read(&chain, 0, &mut bytes).expect("it is read");
        assert!(bytes == expected[..bytes.len()], "{options}");
        // What is none has no such place.
        let raw = Some(Format::Raw);
        let options = OpenOptions { format: raw, ..Default::default() };
        let chain = chain::open(&DISK, &dir.join("raw"), &options).expect("it opens");
        let extent = map::status(&chain, 0, 512).expect("it is there");
        assert!(map::packed(&chain, extent).all(|packed| packed.is_err()));
    }
}
