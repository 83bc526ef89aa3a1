//! `backup` makes images that hold the same disk, all of it or what a bitmap says has changed.

use crate::common::{Place, Random, have_qemu};

#[test]
fn all_of_it_compressed_or_not_past_the_cache_or_through_it() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let mut random = Random(1);
    let mut bytes = vec![0; (6 << 20) + 512];
    for _ in 0..30 {
        let at = random.below(bytes.len() as u64 - 70_000) as usize;
        bytes[at..at + random.below(70_000) as usize].fill(1 + random.below(200) as u8);
    }
    std::fs::write(place.path("disk"), bytes).expect("a scratch file");
    for options in
        ["", "--compressed", "--target-cache cached", "--compressed --target-cache cached"]
    {
        place.ok(&format!("cowbell backup -f raw {options} disk kept"));
        place.qemu("qemu-img check -q kept && qemu-img compare -q -f raw disk kept && rm kept");
    }
    place.ok("cowbell backup -f raw -O vmdk disk kept && rm kept");
    place.ok("cowbell backup -f raw -o cluster_size=4k,compression_type=zstd -c disk kept");
    place.qemu("qemu-img compare -q -f raw disk kept");
    assert!(!place.ok("ls").contains("partial"));
}

#[test]
fn what_a_bitmap_says_has_changed() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let mut random = Random(2);
    for (granularity, cluster) in [("64k", "64k"), ("4k", "64k"), ("2M", "64k"), ("512", "4k")] {
        place.ok("rm -f disk b0 b1 b2");
        place.qemu(&format!("qemu-img create -q -f qcow2 -o cluster_size={cluster} disk 40M"));
        place.qemu("qemu-io -c 'write -P 1 0 20M' disk >/dev/null");
        place.qemu(&format!("qemu-img bitmap --add -g {granularity} disk first"));
        place.ok("cowbell backup disk b0");
        let mut before = "b0".to_string();
        for round in 1..3 {
            let mut commands = String::new();
            for _ in 0..6 {
                let at = random.below(39 << 20) & !511;
                let kind = ["-z", "-P 3", "-P 4"][random.below(3) as usize];
                commands += &format!(" -c 'write {kind} {at} {}'", 512 + random.below(1000) * 512);
            }
            place.qemu(&format!("qemu-io {commands} disk >/dev/null"));
            let options = if round == 1 { "" } else { "--compressed" };
            let line = "cowbell backup --incremental first";
            place.ok(&format!("{line} -B {before} {options} disk b{round}"));
            place.qemu(&format!("qemu-img check -q b{round} && qemu-img compare -q disk b{round}"));
            before = format!("b{round}");
        }
        // What has not changed is not copied: less than all that there is.
        let size = place.ok("stat -c %s b1").trim().parse::<u64>().expect("a number");
        assert!(size < 16 << 20, "{granularity}: {size}");
    }
}

#[test]
fn bitmaps_that_are_not_there_or_not_right_are_refused() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu("qemu-img create -q -f qcow2 disk 4M && qemu-img bitmap --add disk one");
    place.ok("cowbell create -q -f raw b0 4M && cowbell create -q -f raw r 4M");
    let fails = |line: &str, why: &str| {
        let out = place.ours(line);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(1) && said.contains(why), "{line}: {said}");
        assert!(!place.path("b1").exists() && !place.path("b1.partial").exists());
    };
    let backup = "cowbell backup -B b0 -F raw --incremental";
    fails(&format!("{backup} two disk b1"), "no bitmap 'two'");
    fails(&format!("{backup} one -f raw r b1"), "only qcow2 images have bitmaps");
    fails("cowbell backup --incremental one disk b1", "-B");
    // Who writes without keeping it up to date says so.
    place.ok("cowbell io -c 'write 0 64k' disk >/dev/null");
    fails(&format!("{backup} one disk b1"), "inconsistent");
}

/// Killed at any moment, nothing has the backup's name.
#[test]
fn a_kill_leaves_no_backup() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw disk 200M && cowbell io -f raw -c 'write -P 9 0 180M' disk >/dev/null");
    let mut random = Random(7);
    let mut there = 0;
    for _ in 0..20 {
        let millis = random.below(200);
        place.ours(&format!(
            "rm -f kept*; cowbell backup -f raw --compressed disk kept & sleep 0.{millis:03}; kill -9 $!; \
             wait $! 2>/dev/null; true"
        ));
        if place.path("kept").exists() {
            place.ok("cowbell compare -q -f raw disk kept && cowbell check -q kept");
            there += 1;
        }
    }
    assert!(there < 20, "each was whole before it was killed");
}

/// Killed at any moment beside a guest that writes, the disk has leaks at worst, and no backup is there.
///
/// `COWBELL_KILLS` is how often (12 if not said).
#[test]
fn a_kill_beside_a_guest_leaves_the_disk_sound() {
    let place = Place::new();
    place.ok(
        "cowbell create -q -f qcow2 disk 64M && cowbell io -c 'write -P 9 0 48M' disk >/dev/null",
    );
    let mut random = Random(8);
    let kills = std::env::var("COWBELL_KILLS").map_or(12, |text| text.parse().expect("a number"));
    for round in 0..kills {
        let millis = 20 + random.below(400);
        let options = if round % 2 == 0 { "--compressed" } else { "" };
        place.ours(&format!(
            "rm -f kept*; cowbell bench -q -w --random {round} -c 200000 -s 4k -d 16 -f qcow2 disk \
             --backup kept {options} & sleep 0.{millis:03}; kill -9 $!; wait $! 2>/dev/null; true"
        ));
        assert!(!place.path("kept").exists(), "it has a name before it is whole");
        place.ok("cowbell check -q -r leaks disk >/dev/null; cowbell check -q disk");
    }
    place.ok("cp disk before && cowbell bench -q -w -c 20000 -s 4k -d 16 --backup kept disk");
    place.ok("cowbell compare -q before kept && cowbell check -q kept && cowbell check -q disk");
}
