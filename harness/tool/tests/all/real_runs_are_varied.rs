//! What was recorded of a real run is gone through in other orders, with faults and crashes: of every format, without the
//! images. What is no record, or one that was changed, does no harm.

use std::fs;

use crate::common::{Place, Random, have_qemu, read};

/// Varies in a folder that has nothing but the record.
fn varies(place: &Place, how: &str, what: &str) -> String {
    let elsewhere = Place::new();
    fs::copy(place.path("t"), elsewhere.path("t")).expect("it is copied");
    let out = elsewhere.ours(&format!("cowbell replay --vary {how} t"));
    let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert_eq!(out.status.code(), Some(0), "{what}: {said}");
    assert!(said.ends_with("  no failure\n"), "{what}: {said}");
    said
}

#[test]
fn of_every_format() {
    let place = Place::new();
    for format in ["raw", "qed", "qcow2", "vmdk", "vdi"] {
        place.ok(&format!("rm -f i; cowbell create -q -f {format} i 64M"));
        // Of a new image, and of one whose tables are read.
        for how in ["-w -t none -n -s 4k --random 3", "-w -s 20k --flush-interval 8 -t none -n"] {
            place.ok(&format!("cowbell bench -q -f {format} {how} -c 200 -d 8 --record t i"));
            let said = varies(&place, "--time 4 --runs 4 --requests 8", &format!("{format} {how}"));
            assert!(said.contains("Everything was tried that can happen with the last"), "{said}");
            assert!(said.contains(" 8 requests are varied, behind "), "{said}");
        }
        let commands = "-c 'write -P 3 1M 64k' -c flush -c 'write -z 1M 32k' -c 'discard 2M 1M' \
                        -c 'read 0 2M' -c 'write 1000k 50k'";
        place.ok(&format!("cowbell io -n -f {format} --record t {commands} i"));
        let said = varies(&place, "--time 4 --runs 4 --faults 0 --crashes 1", format);
        assert!(said.contains(" 6 requests are varied, behind 0 "), "{said}");
    }
}

#[test]
fn of_chains() {
    let place = Place::new();
    place.ok("cowbell create -q -f vmdk base 8M && cowbell bench -q -w -f vmdk -c 100 -s 40k base");
    place.ok("cowbell create -q -f qcow2 -b base -F vmdk top");
    let commands = "-c 'write 1M 64k' -c 'read 0 200k' -c 'write -z 128k 100k' -c 'write 3000k 9k'";
    place.ok(&format!("cowbell io -n -f qcow2 --record t {commands} -c flush top"));
    varies(&place, "--time 6 --runs 10 --requests 5", "a chain");
}

/// Makes `raw`: of text, and of clusters of one byte each, which become as small as can be.
const RAW: &str = "seq -w 1 200000 | head -c 1M > raw; for i in 1 2 3 4 5 6 7 8; do \
    for byte in a b c d e f g h; do head -c 8k /dev/zero | tr '\\0' $byte; done; done >> raw";

/// A record has no guest's bytes, and nobody can inflate what is not there: something is made up.
#[test]
fn of_compressed_clusters() {
    let place = Place::new();
    place.ok(RAW);
    // Each of them is read, read in part, written to in part and as a whole, compressed or not, and given up.
    let commands = "-c 'read 0 9k' -c 'write 300k 4k' -c 'write 1M 8k' -c 'write -c 64k 64k' -c 'write 260k 3k' \
                    -c 'write -c 128k 64k' -c 'read 120k 20k' -c 'discard 1088k 64k' -c 'write 1200k 3k' \
                    -c 'write -z 1300k 3k' -c flush -c 'read 1280k 64k'";
    let ours = |options: &str| format!("cowbell convert -f raw {options} raw i");
    let theirs = |options: &str| format!("qemu-img convert -f raw {options} raw i");
    let mut images = vec![
        (ours("-O qcow2 -c"), "qcow2"),
        (ours("-O qcow2 -c -o compression_type=zstd,cluster_size=4k"), "qcow2"),
        (
            ours("-O qcow2 -c -o cluster_size=8k")
                + "; mv i b; cowbell create -q -f qcow2 -b b -F qcow2 -o cluster_size=4k i",
            "qcow2",
        ),
        (
            ours("-O vmdk -o subformat=streamOptimized")
                + "; mv i b; cowbell create -q -f qcow2 -b b -F vmdk i",
            "qcow2",
        ),
        (
            ours("-O vmdk -o subformat=streamOptimized")
                + "; mv i b; cowbell create -q -f vmdk -b b -F vmdk i",
            "vmdk",
        ),
    ];
    if have_qemu() {
        images.push((theirs("-O qcow2 -c -o cluster_size=4k"), "qcow2"));
        images.push((theirs("-O qcow2 -c -o cluster_size=4k,compression_type=zstd"), "qcow2"));
    }
    for (image, format) in images {
        if image.starts_with("qemu") {
            place.qemu(&image)
        } else {
            place.ok(&image)
        };
        let commands = if format == "qcow2" {
            commands.into()
        } else {
            commands.replace(" -c 64k", " 64k").replace(" -c 128k", " 128k")
        };
        place.ok(&format!("cowbell io -n -f {format} --record t {commands} i"));
        let said = varies(&place, "--time 3 --runs 4 --requests 9", &image);
        assert!(said.contains(" 9 requests are varied, behind 3 "), "{image}: {said}");
        assert!(!said.contains("Of all, 0 runs"), "{image}: {said}");
    }
}

/// What is written from its beginning to its end is no image before that.
#[test]
fn streams_are_not_varied() {
    let place = Place::new();
    place.ok("cowbell create -q -f vmdk -o subformat=streamOptimized i 4M");
    place.ok("cowbell bench -q -f vmdk -w -s 64k -S 64k -c 20 -d 4 -t none -n --record t i");
    let out = place.ours("cowbell replay --vary t");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(1) && said.contains("a stream of VMDK"), "{said}");
}

/// Of files that are longer than memory is large: what is not in a record takes none.
#[test]
fn of_large_disks() {
    // Of those whose tables are checked after each crash, less.
    for (format, options, size) in [
        ("raw", "", "100G"),
        ("vmdk", "-o subformat=monolithicFlat", "100G"),
        ("qcow2", "", "100G"),
        ("vdi", "", "100G"),
        ("qcow2", "-o preallocation=metadata", "4G"),
        ("vmdk", "", "4G"),
        ("qed", "", "16G"),
    ] {
        let place = Place::new();
        place.ok(&format!("cowbell create -q -f {format} {options} i {size}"));
        if format == "qed" {
            // New clusters are far up the file.
            place.ok("truncate -s 8G i");
        }
        let how = "-w -t none -n -s 4k --random 3 -c 300 -d 8";
        place.ok(&format!("cowbell bench -q -f {format} {how} --record t i"));
        let what = format!("{format} {options}");
        let said = varies(&place, "--time 6 --runs 3 --requests 8", &what);
        assert!(said.contains(" 8 requests are varied, behind 292 "), "{what}: {said}");
        assert!(!said.contains("Of all, 0 runs"), "{what}: {said}");
    }
}

/// A part in the middle, and what is asked for in vain.
#[test]
fn near_a_turn() {
    let place = Place::new();
    place.ok("cowbell create -q -f qed i 64M");
    place.ok("cowbell bench -q -w -f qed -c 300 -d 4 -s 4k -S 68k -t none -n --record t i");
    let said = varies(&place, "--near 20 --requests 3 --time 6 --runs 5", "near a turn");
    assert!(said.contains("Disk 0: 3 requests are varied, behind "), "{said}");
    assert!(!said.contains("behind 297 "), "{said}");
    for (how, why) in [
        ("--disk 1", "it has no disk 1"),
        ("--requests 62", "62 is not in 1..=61"),
        ("--html page", "cannot be used with"),
    ] {
        let out = place.ours(&format!("cowbell replay --vary {how} t"));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(why), "{how}: {said}");
    }
}

/// The copy begins at any time, its pieces end in any order, and some fail.
#[test]
fn of_conversions_and_backups() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a.raw 2M && cowbell create -q -f qcow2 a.qcow2 2M");
    for image in ["-f raw a.raw", "-f qcow2 a.qcow2"] {
        let commands = "-c 'write -P 3 300k 400k' -c 'write -P 4 1500k 9k' -c 'write -z 400k 64k'";
        place.ok(&format!("cowbell io {commands} {image}"));
    }
    place
        .ok("cowbell create -q -f qcow2 -b a.raw -F raw over && cowbell io -c 'write 1M 70k' over");
    for line in [
        "convert -f raw -O qcow2 a.raw",
        "convert -f raw -O raw a.raw",
        "convert -f raw -O raw -C a.raw",
        "convert -O qed -S 0 a.qcow2",
        "convert -O vdi -m 1 a.qcow2",
        "convert -O vmdk over",
        "convert -O vmdk -o subformat=twoGbMaxExtentSparse over",
        "convert -O vmdk -o subformat=streamOptimized over",
        "convert -O qcow2 -c -o cluster_size=4k a.qcow2",
        "convert -O raw --checksum sha256 over",
        "backup a.qcow2",
        "backup --compressed over",
        "backup --target-cache cached -O raw over",
    ] {
        place.ok(&format!("rm -f made* && cowbell {line} --record t made"));
        let said = varies(&place, "--time 6 --runs 20", line);
        let begins = "Disk 0: 0 requests are varied, behind 0 that are done as they were.\n\
                      So is a copy of disk 1 to it.\n";
        assert!(said.starts_with(begins), "{line}: {said}");
        assert!(said.contains(" 20 runs were drawn"), "{line}: {said}");
    }
}

/// What of copies is not varied is said.
#[test]
fn of_copies_that_are_not() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 base 2M && cowbell io -c 'write 300k 400k' base");
    place.ok("cowbell create -q -f qcow2 -b base -F qcow2 a && cowbell io -c 'write 1M 70k' a");
    for (line, how, why) in [
        ("convert -O qcow2 -B base -F qcow2 a made", "", "of what some layers say"),
        ("convert -O raw a base made", "", "of a part of the disk"),
        ("convert -O raw a made", "--crashes 1", "no run goes on after a crash"),
    ] {
        place.ok(&format!("rm -f made* && cowbell {line} --record t"));
        let out = place.ours(&format!("cowbell replay --vary {how} t"));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(1) && said.contains(why), "{line}: {said}");
    }
}

/// Whatever is wrong with a record, or with the trace of one, the command ends by itself.
#[test]
fn changed_records_harm_nobody() {
    let place = Place::new();
    place.ok("cowbell create -q -f qcow2 i 64M");
    place.ok("cowbell bench -q -w -f qcow2 -c 60 -d 4 -s 4k -S 68k i");
    let commands = "-c 'write 1M 64k' -c 'read 0 200k' -c 'write 70k 100k' -c flush";
    place.ok(&format!("cowbell io -n -f qcow2 --record t {commands} i"));
    changes(&place, 80);
    // A copy.
    place.ok("cowbell convert -O qcow2 i o --record t");
    changes(&place, 80);
}

/// Varies records like the one that there is.
fn changes(place: &Place, rounds: usize) {
    let record = read(&place.path("t"));
    let begin = record.windows(7).position(|bytes| bytes == b"\nbegin\n").expect("a head") + 7;
    let mut random = Random(11);
    for round in 0..rounds {
        let mut changed = record.clone();
        let within = if round % 2 == 0 { 0..begin } else { begin..record.len() };
        let at = within.start + random.below((within.end - within.start) as u64) as usize;
        changed[at] ^= 1 << random.below(8);
        if round % 8 == 7 {
            changed.truncate(at);
        }
        fs::write(place.path("u"), &changed).expect("it is written");
        let out = place.ours("cowbell replay --vary --time 0.3 --runs 2 --requests 3 u");
        let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        let code = out.status.code().expect("it ends by itself");
        assert!(code <= 1 && !said.contains("panicked"), "byte {at}: {code}: {said}");
    }
}

/// A defect that the run did not meet is found near it, within seconds; the trace of that needs no record, and is made smaller.
#[test]
fn defects_that_a_run_has_missed_are_found() {
    for (mutant, before, run) in DEFECTS {
        let place = Place::new();
        place.ok(before);
        place.ok(&format!("cowbell {run} --record t i"));
        let out = place.ours(&format!("cowbell replay --vary --plant {mutant} t"));
        let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        assert_eq!(out.status.code(), Some(1), "{mutant}: {said}");
        let trace = said.lines().last().and_then(|line| line.strip_prefix("written: "));
        let trace = read(&place.path(trace.expect("it is written")));
        let elsewhere = Place::new();
        fs::write(elsewhere.path("trace"), trace).expect("it is written");
        assert_eq!(elsewhere.ours("cowbell sim replay trace").status.code(), Some(1), "{mutant}");
        elsewhere.ok("cowbell sim shrink trace > small; cowbell sim cause small");
        let small = String::from_utf8(read(&elsewhere.path("small"))).expect("it is text");
        let requests = small.lines().filter(|line| line.starts_with("request ")).count();
        assert!(
            requests <= 4 && small.contains(&format!("\nplant {mutant}\n")),
            "{mutant}: {small}"
        );
        // Without the defect nothing is wrong.
        let honest = small.replace(&format!("plant {mutant}\n"), "");
        fs::write(elsewhere.path("honest"), honest).expect("it is written");
        elsewhere.ok("cowbell sim replay honest");
    }
}

/// An image whose clusters are compressed.
const COMPRESSED: &str =
    "seq -w 1 200000 | head -c 1M > raw; cowbell convert -f raw -O qcow2 -c raw i";

/// Writes to it, compressed and not.
const PACKS: &str = "io -n -f qcow2 -c 'read 0 64k' -c 'write 70k 4k' -c 'write -c 128k 64k' -c 'write 200k 4k' \
    -c 'write -c 256k 64k' -c 'discard 320k 64k' -c flush -c 'write -c 192k 64k' -c 'read 64k 256k'";

/// Planted so, what makes the image, and a run that ends well.
const DEFECTS: [(&str, &str, &str); 9] = [
    ("qcow2_compressed_over_data_leaks", COMPRESSED, PACKS),
    ("qcow2_packed_not_counted", COMPRESSED, PACKS),
    // Found by what was inflated.
    ("qcow2_cow_from_wrong_cluster", COMPRESSED, PACKS),
    (
        "data_error_ignored",
        "cowbell create -q -f qed i 64M",
        "bench -q -f qed -w -c 100 -d 4 -s 4k -S 68k -t none -n",
    ),
    (
        "no_claims",
        "cowbell create -q -f qed i 64M",
        "bench -q -f qed -w -c 100 -d 4 -s 4k -t none -n",
    ),
    (
        "qcow2_reserve_before_stable",
        "cowbell create -q -f qcow2 i 64M",
        "bench -q -f qcow2 -w -c 100 -d 4 -s 4k -S 68k --flush-interval 10 -t none -n",
    ),
    (
        "copy_ends_before_its_flush",
        "cowbell create -q -f raw a 2M && cowbell io -f raw -c 'write 300k 400k' a",
        "convert -f raw -O qcow2 a",
    ),
    (
        "data_error_ignored",
        "cowbell create -q -f qcow2 a 2M && cowbell io -f qcow2 -c 'write 300k 400k' a",
        "backup -O qed a",
    ),
    // Of a file whose new clusters are behind 8 GiB.
    (
        "data_error_ignored",
        "cowbell create -q -f qed i 16G && truncate -s 8G i",
        "bench -q -f qed -w -c 100 -d 4 -s 4k --random 3 -t none -n",
    ),
];
