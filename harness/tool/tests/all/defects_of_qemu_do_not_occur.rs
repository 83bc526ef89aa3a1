//! Defects that QEMU's QED has, by the commands that show them there.

use crate::common::{Place, Random};

/// QEMU takes the backing file for what a zero cluster holds around a partial write.
#[test]
fn a_write_into_a_zero_cluster_does_not_bring_the_backing_file_back() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw base 1M && cowbell io -f raw -c 'write -q -P 17 0 1M' base");
    place.ok("cowbell create -q -f qed -b base -F raw top");
    let said = place.ok("cowbell io -f qed -c 'write -q -z 0 64k' -c 'write -q -P 34 4k 4k' top
        cowbell io -f qed -c 'read -q -P 0 0 4k' -c 'read -q -P 34 4k 4k' -c 'read -q -P 0 8k 56k' \
        -c 'read -q -P 17 64k 64k' top");
    assert_eq!(said, "");
}

/// QEMU divides by the cluster size less one: at 4 KiB, each 16 MiB have a cluster too much.
#[test]
fn an_image_of_many_small_clusters_has_no_phantom_leaks() {
    let place = Place::new();
    let said = place.ok("cowbell create -q -f qed -o cluster_size=4k top 64M
        cowbell bench -q -w -c 64 -s 1M -d 4 -n -t none -f qed top && cowbell check top");
    assert!(said.starts_with("No errors were found on the image.\n"), "{said}");
    // One request for more than 16 MiB takes as many clusters as it needs.
    let said = place.ok("cowbell create -q -f qed -o cluster_size=4k one 64M
        cowbell io -f qed -t writeback -c 'write -q 0 20M' one && cowbell check one");
    assert!(said.contains("5120/16384 = 31.25% allocated"), "{said}");
    let len = std::fs::metadata(place.path("one")).expect("it is there").len();
    assert!(len < 21 << 20, "{len} bytes for 20 MiB");
}

/// QEMU dies of these three in 6 runs of 20.
#[test]
fn three_concurrent_requests_are_just_that() {
    for mode in ["-n -i native", "-t writeback"] {
        for _ in 0..5 {
            let place = Place::new();
            let said = place.ok(&format!(
                "cowbell create -q -f qed top 64M
                cowbell io {mode} -f qed -c 'aio_write -q -P 1 30164834 1M' \
                -c 'aio_write -q -P 2 52930328 64k' -c 'aio_write -q -z 1902080 64k' -c aio_flush \
                -c 'read -q -P 1 30164834 1M' -c 'read -q -P 2 52930328 64k' top
                cowbell check -q top"
            ));
            assert_eq!(said, "");
        }
    }
}

/// QEMU dies of a random mix of writes and zero writes in 3 runs of 4.
#[test]
fn writes_and_zero_writes_run_side_by_side() {
    let mut random = Random(11);
    let place = Place::new();
    place.ok("cowbell create -q -f qed top 64M");
    let mut commands = String::new();
    for i in 0..400 {
        let len = 1 + random.below(200_000);
        let offset = random.below((64 << 20) - len);
        let what = if random.below(3) == 0 { "-z" } else { "-P 9" };
        commands += &format!("aio_write -q {what} {offset} {len}\n");
        if i % 40 == 39 {
            commands += "flush\n";
        }
    }
    std::fs::write(place.path("commands"), commands).expect("it is written");
    let said =
        place.ok("cowbell io -n -i native -f qed top < commands && cowbell check top | head -n 1");
    assert_eq!(said, "No errors were found on the image.\n");
}

/// QEMU makes such images and does not open them.
#[test]
fn a_table_of_one_cluster_is_fine() {
    let place = Place::new();
    let said = place.ok("cowbell create -q -f qed -o table_size=1 top 64M
        cowbell io -f qed -c 'write -q 0 64k' top && cowbell check top");
    assert!(said.starts_with("No errors were found on the image.\n"), "{said}");
}
