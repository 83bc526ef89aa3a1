//! `--checksum` is that of a raw image of the disk, whatever format it comes from, in whatever order it is
//! read.

use crate::common::{Place, Random, have_qemu, read};

fn blake3_of(place: &Place, name: &str) -> String {
    format!("blake3: {}\n", blake3::hash(&read(&place.path(name))).to_hex())
}

fn sha256_of(place: &Place, name: &str) -> String {
    let line = place.ok(&format!("sha256sum {name}"));
    format!("sha256: {}\n", line.split(' ').next().expect("a sum"))
}

/// Disks with data, zeros, holes and compressed clusters, in chains too.
fn sources(place: &Place) -> Vec<(&'static str, &'static str)> {
    let mut random = Random(3);
    let mut sparse = vec![0; (9 << 20) + 512];
    for _ in 0..40 {
        let at = random.below(sparse.len() as u64 - 70_000) as usize;
        let len = random.below(70_000) as usize;
        sparse[at..at + len].fill(random.below(256) as u8);
    }
    std::fs::write(place.path("sparse"), &sparse).expect("a scratch file");
    let noise: Vec<u8> = (0..5_000_192).map(|_| random.next() as u8).collect();
    std::fs::write(place.path("noise"), noise).expect("a scratch file");
    let text: Vec<u8> =
        (0..300_000).flat_map(|line| format!("line {line}\n").into_bytes()).collect();
    std::fs::write(place.path("text"), text).expect("a scratch file");
    place
        .ok("truncate -s 60M holes && dd if=noise of=holes bs=1M seek=37 conv=notrunc status=none");
    place.qemu(
        "qemu-img convert -c -O qcow2 text compressed && qemu-img convert -O qcow2 sparse base && \
         qemu-img create -q -f qcow2 -b base -F qcow2 mid 12M && \
         qemu-io -f qcow2 -c 'write -q -P 8 1M 100k' -c 'write -q -z 2M 1M' mid && \
         qemu-img create -q -f qcow2 -b mid -F qcow2 top && \
         qemu-io -f qcow2 -c 'write -q -P 7 1100k 64k' -c 'write -q -z 0 64k' \
         -c 'write -q -P 6 11M 10k' top && qemu-img create -q -f qcow2 nothing 400M",
    );
    let (raw, qcow2) = ("raw", "qcow2");
    let all = ["sparse", "noise", "text", "holes"].map(|name| (name, raw));
    let images = ["compressed", "base", "top", "nothing"].map(|name| (name, qcow2));
    [&all[..], &images].concat()
}

#[test]
fn from_every_source() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let options = ["", "-m 1", "-m 16 -W", "-S 0", "-T none -t none", "-c -O qcow2"];
    for (at, (name, format)) in sources(&place).into_iter().enumerate() {
        place.qemu(&format!("qemu-img convert -f {format} -O raw {name} raw"));
        let expected = blake3_of(&place, "raw");
        for options in options {
            let line = format!("convert --checksum blake3 {options} -f {format} {name} made");
            assert_eq!(place.ok(&format!("cowbell {line}")), expected, "{line}");
        }
        let format_of_target = ["raw", "qcow2", "vmdk", "vdi", "qed"][at % 5];
        let line =
            format!("convert --checksum sha256 -O {format_of_target} -f {format} {name} made");
        assert_eq!(place.ok(&format!("cowbell {line}")), sha256_of(&place, "raw"), "{line}");
        let backup = format!("cowbell backup -f {format} {name} made --checksum");
        assert_eq!(place.ok(&format!("{backup} blake3")), expected);
        let of_raw = place.ok("cowbell convert -f raw --checksum fs-verity raw made");
        assert_eq!(place.ok(&format!("{backup} fs-verity")), of_raw);
        assert!(of_raw.starts_with("fs-verity: ") && of_raw.len() == 76, "{of_raw}");
    }
}

#[test]
fn of_several_sources_and_of_parts() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    sources(&place);
    place.qemu("qemu-img convert noise top holes compressed raw");
    let expected = blake3_of(&place, "raw");
    for options in ["-m 16", "-m 1 -O qcow2", "-O vdi"] {
        let line = format!("convert --checksum blake3 {options} noise top holes compressed made");
        assert_eq!(place.ok(&format!("cowbell {line}")), expected, "{line}");
    }
    // In place of what is there, and longer.
    place.qemu("qemu-img create -q -f qcow2 made 1G && qemu-io -c 'write -q -P 1 0 20M' made");
    let line = "cowbell convert -n -O qcow2 --checksum blake3 top made";
    place.qemu("qemu-img convert top raw");
    assert_eq!(place.ok(line), blake3_of(&place, "raw"));
    let line = "cowbell dd --checksum sha256 if=top of=made bs=4096 skip=200 count=2000";
    let said = place.ok(line);
    assert_eq!(said, sha256_of(&place, "made"));
}

#[test]
fn where_it_is_said() {
    let place = Place::new();
    std::fs::write(place.path("a"), vec![5; 3 << 20]).expect("a scratch file");
    let sum = blake3_of(&place, "a");
    // Standard output is the image's.
    for target in ["-", "-O qcow2 a -"] {
        let source = if target == "-" { "a" } else { "" };
        let out =
            place.ours(&format!("cowbell convert -f raw --checksum blake3 {source} {target}"));
        assert!(out.status.success());
        assert_eq!(String::from_utf8_lossy(&out.stderr), sum, "{target}");
        assert!(out.stdout.len() >= 3 << 20);
    }
    let line = "cowbell convert --checksum blake3 --progress-fd 7 a x 7>&1 | cat";
    let lines = place.ok(line);
    let value = sum.trim_end().trim_start_matches("blake3: ");
    let told = format!("{{\"checksum\":\"blake3\",\"value\":\"{value}\"}}\n");
    assert!(lines.contains(&told) && lines.ends_with(&sum), "{lines}");
    // Not all of the disk is read.
    place.ok("cowbell create -q -f raw b 3M");
    for options in ["-B b -F raw", "-o backing_file=b,backing_fmt=raw"] {
        let line = format!("cowbell convert --checksum blake3 -O qcow2 {options} a made");
        let out = place.ours(&line);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(1) && said.contains("--checksum"), "{said}");
        assert!(!place.path("made").exists());
    }
}

/// A tree in which all parts of zeros are alike takes no time; the others end when they are asked to.
#[test]
fn of_sixteen_tib_of_nothing() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 a 16T");
    place.ok("timeout 20 cowbell convert -O qcow2 --checksum fs-verity a b");
    // (What asks sends the signal twice: to the process, and to its group.)
    for seconds in ["0.02", "0.05", "0.1", "1"] {
        let line =
            format!("timeout -s INT {seconds} cowbell convert -O qcow2 --checksum sha256 a c");
        let out = place.ours(&line);
        assert!(!out.status.success() && !place.path("c").exists());
        assert!(!place.ok("ls").contains("partial"));
    }
}
