//! VDI images go back and forth between the command and QEMU, and what is said of them is the same.

use crate::common::{Place, have_qemu};

#[test]
fn each_reads_and_writes_what_the_other_made() {
    if !have_qemu() {
        return;
    }
    for options in ["static=off", "static=on", "static=on,preallocation=full"] {
        for (make, fill, more) in
            [("cowbell", "cowbell", "qemu-"), ("qemu-img", "qemu-", "cowbell ")]
        {
            let place = Place::new();
            let both = |line: &str| place.qemu(line);
            let made = format!("{make} create -q -f vdi -o {options} a.vdi 10000000");
            if make == "cowbell" {
                place.ok(&made)
            } else {
                both(&made)
            };
            let first = "-f vdi -c 'write -q -P 1 5000 3000000' -c 'write -q -P 2 7M 1' a.vdi";
            let then = "-f vdi -c 'write -q -P 3 2M 1M' -c 'write -q -z 1M 70k' \
                -c 'write -q -P 4 9M 512' a.vdi";
            let ours = |rest: &str| place.ok(&format!("cowbell io {rest}"));
            let theirs = |rest: &str| both(&format!("qemu-io {rest}"));
            if fill == "cowbell" {
                ours(first)
            } else {
                theirs(first)
            };
            if more == "qemu-" {
                theirs(then)
            } else {
                ours(then)
            };
            let look = "-r -f vdi -c 'read -q -P 0 0 5000' -c 'read -q -P 1 5000 1043576' \
                -c 'read -q -P 0 1M 70k' -c 'read -q -P 3 2M 1M' -c 'read -q -P 2 7M 1' \
                -c 'read -q -P 4 9M 512' -c 'read -q -P 0 8M 1M' a.vdi";
            for said in [ours(look), theirs(look)] {
                assert!(!said.contains("failed"), "{options}, {make}: {said}");
            }
            assert!(both("qemu-img check a.vdi").contains("No errors were found"), "{options}");
            assert!(place.ok("cowbell check a.vdi").contains("No errors were found"), "{options}");
        }
    }
}

#[test]
fn both_say_the_same() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu(
        "qemu-img create -q -f vdi a.vdi 10M; qemu-img create -q -f vdi -o static=on s.vdi 3M
        qemu-io -f vdi -c 'write -q -P 5 3M 4k' -c 'write -q -P 6 100k 4k' a.vdi",
    );
    for line in [
        "qemu-img map a.vdi",
        "qemu-img map --output json a.vdi",
        "qemu-img map s.vdi",
        "qemu-img check a.vdi",
        "qemu-img check --output json a.vdi",
        "qemu-img create -f vdi -o static=on x.vdi 5000000",
        "qemu-img create -f vdi -b a.vdi -F vdi x.vdi",
        "qemu-img create -f vdi -F raw x.vdi 1M",
        "qemu-img create -f vdi -o cluster_size=64k x.vdi 1M",
        "qemu-io -f vdi -c 'truncate 20M' a.vdi",
        "qemu-img resize a.vdi 20M",
    ] {
        let [theirs, ours] = [place.theirs(line), place.ours(line)];
        let show = |out: &std::process::Output| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            format!("{}--\n{}-- {:?}", text(&out.stdout), text(&out.stderr), out.status.code())
        };
        assert_eq!(show(&ours), show(&theirs), "{line}");
    }
}
