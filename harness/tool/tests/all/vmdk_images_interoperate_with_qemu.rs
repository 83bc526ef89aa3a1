//! VMDK images filled by the command are clean and the same for QEMU; and the defects that QEMU's
//! VMDK has, by what shows them there.

use std::fs;

use crate::common::{Place, Random, have_qemu};

const SIZE: u64 = 80 << 20;

/// Random commands, in rounds that do not overlap, and what they leave.
fn mix(random: &mut Random, shadow: &mut [u8], rounds: usize) -> String {
    let mut text = String::new();
    for _ in 0..rounds {
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for _ in 0..24 {
            let unit = [1, 512, 4096, 65536][random.below(4) as usize];
            let len = ((1 + random.below(40)) * unit).min(1 << 20);
            // Near the border of two tables as often as anywhere.
            let start = if random.below(3) == 0 { (32 << 20) - (1 << 20) } else { 0 };
            let offset = start + random.below((SIZE - start - len).min(3 << 20));
            if taken.iter().any(|&(o, l)| offset < o + l && o < offset + len) {
                continue;
            }
            taken.push((offset, len));
            let range = offset as usize..(offset + len) as usize;
            match random.below(8) {
                0 => {
                    shadow[range].fill(0);
                    text += &format!("aio_write -q -z {offset} {len}\n");
                }
                1 => text += &format!("aio_read -q {offset} {len}\nflush\n"),
                _ => {
                    let byte = random.below(255) as u8 + 1;
                    shadow[range].fill(byte);
                    text += &format!("aio_write -q -P {byte} {offset} {len}\n");
                }
            }
        }
        text += "aio_flush\n";
    }
    text
}

#[test]
fn images_filled_by_us_are_clean_and_the_same_for_qemu() {
    let mut random = Random(5);
    let modes = ["-n -i native", "-t writeback", "-n -i threads"];
    let options = [
        "subformat=monolithicSparse",
        "subformat=monolithicSparse,zeroed_grain=on",
        "subformat=monolithicFlat",
        "subformat=twoGbMaxExtentSparse",
        "subformat=twoGbMaxExtentFlat",
    ];
    for (i, options) in options.into_iter().enumerate() {
        for backing in [false, true] {
            if backing && options.contains("Flat") {
                continue;
            }
            let place = Place::new();
            let mut shadow = vec![0; SIZE as usize];
            let mut more = String::new();
            if backing {
                place.ok("cowbell create -q -f vmdk base.vmdk 40M
                    cowbell io -f vmdk -c 'write -q -P 17 0 3M' \
                    -c 'write -q -P 18 31M 2M' base.vmdk");
                shadow[..3 << 20].fill(17);
                shadow[31 << 20..33 << 20].fill(18);
                more = "-b base.vmdk -F vmdk".into();
            }
            place.ok(&format!("cowbell create -q -f vmdk -o {options} {more} top.vmdk {SIZE}"));
            for round in 0..2 {
                fs::write(place.path("commands"), mix(&mut random, &mut shadow, 4))
                    .expect("it is written");
                let mode = modes[(i + round) % modes.len()];
                let said = place.ok(&format!("cowbell io {mode} -f vmdk top.vmdk < commands"));
                assert_eq!(said, "");
            }
            fs::write(place.path("shadow"), &shadow).expect("it is written");
            let ours = place.ok("cowbell check top.vmdk && cowbell compare -F raw top.vmdk shadow");
            assert!(ours.contains("No errors") && ours.contains("identical"), "{options}: {ours}");
            if have_qemu() {
                let theirs = place
                    .qemu("qemu-img check top.vmdk && qemu-img compare -F raw top.vmdk shadow");
                assert!(theirs.contains("No errors were found"), "{options}: {theirs}");
                assert!(theirs.contains("Images are identical."), "{options}: {theirs}");
            }
        }
    }
}

/// Changes 8 bytes of an image.
fn poke(place: &Place, name: &str, at: usize, bytes: &[u8]) {
    let mut image = fs::read(place.path(name)).expect("it is there");
    image[at..at + bytes.len()].copy_from_slice(bytes);
    fs::write(place.path(name), image).expect("it is written");
}

/// QEMU aborts, or takes gigabytes, for a grain of a gigabyte.
#[test]
fn a_grain_of_a_gigabyte_is_refused() {
    let place = Place::new();
    place.ok("cowbell create -q -f vmdk -o subformat=streamOptimized s.vmdk 8M");
    for sectors in [0x20_0000u64, 0x1f_ffff, 4096, 0, 7, 9] {
        poke(&place, "s.vmdk", 20, &sectors.to_le_bytes());
        let out = place.ours("cowbell info s.vmdk; cowbell io -r -f vmdk -c 'read 0 512' s.vmdk");
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("granularity is invalid"), "{sectors}: {said}");
    }
}

/// QEMU writes over the header of an image whose tables are allocated when they are needed.
#[test]
fn an_image_without_tables_gets_them() {
    let place = Place::new();
    place.ok("cowbell create -q -f vmdk t.vmdk 100M");
    let bytes = fs::read(place.path("t.vmdk")).expect("it is there");
    for field in [48, 56] {
        let sector = u64::from_le_bytes(bytes[field..field + 8].try_into().expect("8 bytes"));
        poke(&place, "t.vmdk", (sector * 512) as usize, &[0; 16]);
    }
    let said = place.ok("cowbell io -n -i native -f vmdk -c 'write -q -P 5 0 70M' \
        -c 'read -q -P 5 0 70M' -c 'read -q -P 0 70M 30M' t.vmdk
        cowbell io -r -f vmdk -c 'read -q -P 5 0 70M' t.vmdk && cowbell check t.vmdk");
    assert!(said.contains("No errors were found"), "{said}");
    if have_qemu() {
        let theirs =
            place.qemu("qemu-img check t.vmdk; qemu-io -r -f vmdk -c 'read -P 5 0 70M' t.vmdk");
        assert!(theirs.contains("No errors") && !theirs.contains("failed"), "{theirs}");
    }
}

/// A table that was wiped comes back from the other one; no other tool does this.
#[test]
fn check_repairs_from_the_redundant_tables() {
    let place = Place::new();
    place.ok("cowbell create -q -f vmdk t.vmdk 40M
        cowbell io -f vmdk -c 'write -q -P 5 0 2M' -c 'write -q -P 6 33M 1M' t.vmdk");
    let bytes = fs::read(place.path("t.vmdk")).expect("it is there");
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4")) as usize;
    let directory = number(56) * 512;
    for (what, at, damage) in [
        ("a wiped table", number(directory) * 512, vec![0u8; 2048]),
        ("noise in a table", number(directory) * 512, vec![0xa5; 512]),
        ("a wild directory entry", directory + 4, vec![0xff; 4]),
        ("an empty directory entry", directory, vec![0; 4]),
    ] {
        fs::write(place.path("t.vmdk"), &bytes).expect("it is written");
        poke(&place, "t.vmdk", at, &damage);
        assert_eq!(place.ours("cowbell check t.vmdk").status.code(), Some(2), "{what}");
        let out = place.ours("cowbell check -r all t.vmdk");
        assert_eq!(out.status.code(), Some(0), "{what}: {}", String::from_utf8_lossy(&out.stdout));
        let said = place.ok("cowbell check t.vmdk; cowbell io -r -f vmdk -c 'read -q -P 5 0 2M' \
            -c 'read -q -P 6 33M 1M' t.vmdk");
        assert_eq!(said, "No errors were found on the image.\n", "{what}");
    }
}

/// The descriptor says which files to open: of one that is not trusted, not any file.
#[test]
fn extents_are_only_opened_beside_the_descriptor() {
    let place = Place::new();
    place.ok("mkdir sub other; cowbell create -q -f vmdk -o subformat=monolithicFlat sub/d.vmdk 1M
        cp sub/d-flat.vmdk other/x; ln -s ../other/x sub/link");
    let text = fs::read_to_string(place.path("sub/d.vmdk")).expect("it is there");
    let outside = place.path("other/x").to_string_lossy().into_owned();
    for name in [&outside, "../other/x", "link", "./d-flat.vmdk", "d.vmdk", "/etc/hostname"] {
        fs::write(place.path("sub/d.vmdk"), text.replace("d-flat.vmdk", name)).expect("written");
        for line in ["io -r -f vmdk -c 'read 0 512'", "map", "check"] {
            let out = place.ours(&format!("cowbell {line} --untrusted sub/d.vmdk"));
            assert_ne!(out.status.code(), Some(0), "{name}: {line}");
        }
        // What it is can be said without opening them.
        place.ok("cowbell info sub/d.vmdk");
    }
}
