//! What is written compressed reads back, here and by QEMU's programs, whatever is written over it; and
//! QEMU's check finds neither corruption nor leaks.

use std::fs;

use crate::common::{Place, Random, have_qemu};

const SIZE: u64 = 4 << 20;

/// Bytes that compress to about nothing, half, or not at all.
fn contents(kind: u64, random: &mut Random, len: u64) -> Vec<u8> {
    match kind {
        0 => vec![random.below(256) as u8; len as usize],
        1 => (0..len).map(|_| b'a' + random.below(16) as u8).collect(),
        _ => (0..len).map(|_| random.below(256) as u8).collect(),
    }
}

/// Random writes, two of three compressed, zeros and discards, as text for `io`; what they leave.
fn mix(place: &Place, random: &mut Random, cluster: u64, shadow: &mut [u8]) -> String {
    let mut text = String::new();
    for which in 0..40 {
        let unit = if random.below(3) == 0 { 512 } else { cluster };
        let at = random.below(SIZE / unit) * unit;
        let len = (unit * (1 + random.below(3))).min(SIZE - at);
        let range = at as usize..(at + len) as usize;
        match random.below(8) {
            0 => {
                shadow[range].fill(0);
                text += &format!("write -q -z -u {at} {len}\n");
            }
            1 => text += "flush\n",
            2 => text += &format!("read -q {at} {len}\n"),
            _ => {
                let kind = random.below(3);
                let bytes = contents(kind, random, len);
                let name = format!("piece{which}");
                fs::write(place.path(&name), &bytes).expect("a scratch file");
                shadow[range].copy_from_slice(&bytes);
                let flag = if random.below(3) > 0 { "-c " } else { "" };
                text += &format!("write -q {flag}-s {name} {at} {len}\n");
            }
        }
    }
    text
}

#[test]
fn after_random_mixes() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let mut random = Random(11);
    let options = [
        "cluster_size=64k",
        "cluster_size=64k,compression_type=zstd",
        "cluster_size=4k,refcount_bits=8",
        "cluster_size=512",
        "cluster_size=512k,extended_l2=on",
        "cluster_size=64k,compat=0.10",
        "cluster_size=8k,refcount_bits=1",
        "cluster_size=2M,compression_type=zstd",
    ];
    for options in options {
        let cluster = options.split(['=', ',']).nth(1).expect("a size");
        let cluster: u64 = match cluster.strip_suffix('k') {
            Some(kib) => kib.parse::<u64>().expect("a number") << 10,
            None => cluster.strip_suffix('M').map_or(512, |mib| mib.parse::<u64>().unwrap() << 20),
        };
        for cache in ["none", "writeback"] {
            place.ok(&format!("rm -f disk && cowbell create -q -f qcow2 -o {options} disk {SIZE}"));
            let mut shadow = vec![0; SIZE as usize];
            for _ in 0..2 {
                let text = mix(&place, &mut random, cluster, &mut shadow);
                fs::write(place.path("commands"), text).expect("a scratch file");
                place.ok(&format!("cowbell io -t {cache} -f qcow2 disk < commands"));
                fs::write(place.path("raw"), &shadow).expect("a scratch file");
                place.qemu("qemu-img check -q -f qcow2 disk");
                place.ok("cowbell check -q -f qcow2 disk");
                place.qemu("qemu-img compare -q -f qcow2 -F raw disk raw");
                place.ok("cowbell compare -q -f qcow2 -F raw disk raw");
            }
        }
    }
}

#[test]
fn text_takes_as_little_room_as_qemu_needs() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let mut random = Random(5);
    let bytes = contents(1, &mut random, SIZE);
    fs::write(place.path("raw"), bytes).expect("a scratch file");
    for kind in ["zlib", "zstd"] {
        let options = format!("compression_type={kind}");
        place.ok(&format!(
            "cowbell create -q -f qcow2 -o {options} ours {SIZE} && \
             cowbell io -f qcow2 -c 'write -q -c -s raw 0 {SIZE}' ours"
        ));
        place.qemu(&format!(
            "qemu-img convert -c -f raw -O qcow2 -o {options} raw theirs && \
             qemu-img compare -q ours theirs"
        ));
        let len = |name| fs::metadata(place.path(name)).expect("it is there").len();
        let (ours, theirs) = (len("ours"), len("theirs"));
        assert!(ours <= theirs + theirs / 50 + (128 << 10), "{kind}: {ours} bytes, not {theirs}");
    }
}

#[test]
fn whole_images_are_compressed() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let mut random = Random(3);
    let mut bytes = vec![0; SIZE as usize + 1536];
    for (which, piece) in bytes.chunks_mut(300_000).enumerate() {
        if which % 4 != 3 {
            piece.copy_from_slice(&contents(which as u64 % 4, &mut random, piece.len() as u64));
        }
    }
    fs::write(place.path("raw"), bytes).expect("a scratch file");
    for options in
        ["compression_type=zlib", "compression_type=zstd", "cluster_size=2M", "cluster_size=4k"]
    {
        for flags in ["-m 1", "-m 16 -W -t none", "-S 0"] {
            place.ok(&format!(
                "rm -f packed again && cowbell convert -c {flags} -O qcow2 -o {options} raw packed && \
                 cowbell convert packed again && cmp raw again && cowbell check -q packed"
            ));
            place.qemu("qemu-img check -q packed && qemu-img compare -q packed raw");
        }
        let len = |name| fs::metadata(place.path(name)).expect("it is there").len();
        place.ok(&format!("rm packed && cowbell convert -c -O qcow2 -o {options} raw packed"));
        place.qemu(&format!("qemu-img convert -c -O qcow2 -o {options} raw theirs"));
        let (ours, theirs) = (len("packed"), len("theirs"));
        assert!(
            ours <= theirs + theirs / 20 + (256 << 10),
            "{options}: {ours} bytes, not {theirs}"
        );
    }
}
