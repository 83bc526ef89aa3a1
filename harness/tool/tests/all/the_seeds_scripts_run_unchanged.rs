//! The measurements that this project comes from, as their mails give them: through links named
//! `qemu-img` and `qemu-io`, on formats that exist, and with fewer bytes.

use crate::common::Place;

const MIB: usize = 16;

/// Four images, written in portions of 64 KiB in four orders, then read and written by `bench`.
#[test]
fn fragmented_images_are_made_and_measured() {
    let place = Place::new();
    let script = format!(
        r#"
        portions=$(seq 0 {last})
        for order in seq reverse rand part-rand; do
            case $order in
                seq) list=$portions ;;
                reverse) list=$(echo "$portions" | tac) ;;
                rand) list=$(echo "$portions" | shuf) ;;
                part-rand) list=$(for mb in $(seq 0 {last_mb}); do
                    seq $((mb * 16)) $((mb * 16 + 15)) | shuf; done) ;;
            esac
            qemu-img create -f qed $order {MIB}M || exit 1
            for i in $list; do echo write -P 0xff $((i * 65536)) 64k; done |
                qemu-io -f qed -n $order > /dev/null || exit 1
            qemu-img check $order || exit 1
            qemu-img bench -c 256 -d 1 -f qed -n -s 1m -S 1m -o 0 -t none $order || exit 1
            qemu-img bench -c 256 -d 1 -f qed -n -s 1m -t none -w $order || exit 1
            qemu-img check $order || exit 1
        done"#,
        last = MIB * 16 - 1,
        last_mb = MIB - 1,
    );
    let said = place.ok(&script);
    assert_eq!(said.matches("Run completed in ").count(), 8, "{said}");
    assert_eq!(said.matches("No errors were found on the image.").count(), 8, "{said}");
    assert_eq!(said.matches("256/256 = 100.00% allocated").count(), 8, "{said}");
}

/// Allocating writes into an empty image, two clusters each.
#[test]
fn an_empty_image_is_filled_by_bench() {
    let place = Place::new();
    let said = place.ok("qemu-img create -f qed empty 128M
        qemu-img bench -w -c 1024 -s 128K -d 1 -t none -f qed empty && qemu-img check empty");
    assert!(
        said.contains("Sending 1024 write requests, 131072 bytes each, 1 in parallel"),
        "{said}"
    );
    assert!(said.contains("2048/2048 = 100.00% allocated"), "{said}");
}

/// The same through native AIO at depth, which is what the second of the mails is about.
#[test]
fn raw_images_are_measured_at_depth() {
    let place = Place::new();
    let said = place.ok("qemu-img create -f raw disk 32M
        qemu-img bench -c 2048 -d 64 -s 16k -n -t none -f raw -w disk
        qemu-img bench -c 2048 -d 64 -s 16k -n -t none -f raw disk");
    assert_eq!(said.matches("Run completed in ").count(), 2, "{said}");
}
