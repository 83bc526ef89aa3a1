//! Whatever the arguments, whoever stops reading, and when Ctrl-C is pressed: no panic, no
//! half-made file, no damaged image.

use std::process::{Command, Stdio};
use std::time::Duration;

use cowbell_engine::sys::clock;

use crate::common::{COWBELL, Place, Random};

const WORDS: [&str; 64] = [
    "create",
    "info",
    "bench",
    "check",
    "map",
    "compare",
    "resize",
    "io",
    "demo",
    "help",
    "-f",
    "-F",
    "-o",
    "-b",
    "-c",
    "-d",
    "-t",
    "-i",
    "-n",
    "-w",
    "-q",
    "-s",
    "-S",
    "-u",
    "-r",
    "-U",
    "--",
    "--output",
    "json",
    "human",
    "raw",
    "qed",
    "qcow2",
    "none",
    "native",
    "threads",
    "unsafe",
    "0",
    "1",
    "-1",
    "4k",
    "1M",
    "64M",
    "9E",
    "99999999999999999999",
    "0x10",
    "a",
    "b",
    "nofile",
    "",
    ",",
    "cluster_size=4k",
    "table_size=3,size=1",
    "backing_file=b",
    "read 0 4k",
    "write -P 1 0 4k",
    "aio_write 0 1 2 3",
    "discard 0 1M",
    "truncate 8M",
    "map",
    "--json",
    "--latency",
    "--random",
    "é\u{1}",
];

#[test]
fn of_any_arguments() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 4M && cowbell create -q -f qed b 4M");
    let mut random = Random(5);
    for i in 0..600 {
        let name = ["cowbell", "qemu-img", "qemu-io"][random.below(3) as usize];
        let mut args: Vec<&str> = Vec::new();
        for _ in 0..random.below(9) {
            args.push(WORDS[random.below(WORDS.len() as u64) as usize]);
        }
        // These take their time, and are asked for elsewhere.
        let slow = args.contains(&"demo") || args.contains(&"bench") && !args.contains(&"0");
        if slow {
            continue;
        }
        let out = Command::new(place.path("bin").join(name))
            .args(&args)
            .current_dir(place.dir.path())
            .stdin(Stdio::null())
            .output()
            .expect("it starts");
        let said = String::from_utf8_lossy(&out.stderr);
        let code = out.status.code();
        assert!(code.is_some() && !said.contains("panicked"), "{i}: {name} {args:?}: {said}");
        if name == "cowbell" && code == Some(1) && !args.contains(&"io") && !args.is_empty() {
            let lines: Vec<_> = said.lines().filter(|l| !l.starts_with([' ', 'W'])).collect();
            assert!(lines.len() <= 1 && said.len() < 2000, "{name} {args:?}: {said}");
        }
    }
}

#[test]
fn of_a_reader_who_goes_away() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw a 64M");
    let mut commands = String::new();
    for i in 0..20_000 {
        commands += &format!("write -q {} 512\n", i * 1024);
    }
    std::fs::write(place.path("commands"), commands).expect("it is written");
    place.ok("cowbell io -t unsafe -f raw a < commands");
    for line in ["cowbell map --output json a", "cowbell io -f raw -r -c 'read -v 0 16M' a"] {
        let out = place.ours(&format!("{line} | head -n 1"));
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.is_empty(), "{line}: {said}");
    }
}

#[test]
fn of_a_benchmark_that_is_stopped() {
    let place = Place::new();
    place.ok("cowbell create -q -f qed a 1G");
    let args = ["bench", "-c", "100000000", "-w", "-n", "-t", "none", "-f", "qed", "--random", "1"];
    let child = Command::new(COWBELL)
        .args(args)
        .arg("a")
        .current_dir(place.dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    std::thread::sleep(Duration::from_millis(400));
    let began = clock();
    place.ok(&format!("kill -INT {}", child.id()));
    let out = child.wait_with_output().expect("it ends");
    let took = Duration::from_nanos(clock().since(began));
    assert!(took < Duration::from_secs(5), "it took {took:?} to end");
    assert_eq!(out.status.code(), Some(130));
    assert!(String::from_utf8_lossy(&out.stdout).contains("Stopped after "));
    assert!(place.ok("cowbell check a").starts_with("No errors were found"));
    assert!(!place.ok("cowbell info a").contains("cleanly shut down: no"));
}

/// A qcow2 image of 2 EiB less a cluster, all of whose L1 entries name one L2 table.
fn image_of_one_table(place: &Place) {
    use std::os::unix::fs::FileExt;
    let size = (2_u64 << 60) - (2 << 20);
    place.ok(&format!("qemu-img create -q -f qcow2 -o cluster_size=2M a {size}"));
    place.ok("qemu-io -f qcow2 -c 'write 0 512' a");
    let file = std::fs::File::options().read(true).write(true).open(place.path("a"));
    let file = file.expect("it is there");
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 40).expect("a header");
    let l1 = u64::from_be_bytes(word);
    file.read_exact_at(&mut word, l1).expect("an L1 table");
    file.write_all_at(&word.repeat(4 << 20), l1).expect("it is written");
}

#[test]
fn of_a_preallocation_that_cannot_be() {
    let place = Place::new();
    image_of_one_table(&place);
    let out = place.ours("timeout -s KILL 120 qemu-img resize --preallocation=metadata a +1M");
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("the image has errors"), "{said}");
    assert!(place.ok("qemu-img info a").contains("2305843009211596800 bytes"));
}

#[test]
fn of_a_shrinking_that_is_stopped() {
    let place = Place::new();
    image_of_one_table(&place);
    let child = Command::new(COWBELL)
        .args(["resize", "-q", "--shrink", "-f", "qcow2", "a", "1G"])
        .current_dir(place.dir.path())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    while !place.ok("qemu-img info -U a").contains("(1073741824 bytes)") {
        std::thread::sleep(Duration::from_millis(50));
    }
    place.ok(&format!("kill -TERM {} || true", child.id()));
    let out = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("Interrupted"), "{said}");
}

#[test]
fn of_a_creation_that_is_stopped() {
    let place = Place::new();
    let args = ["create", "-f", "raw", "-o", "preallocation=full", "a", "40G"];
    let child =
        Command::new(COWBELL).args(args).current_dir(place.dir.path()).spawn().expect("it starts");
    std::thread::sleep(Duration::from_millis(150));
    place.ok(&format!("kill -INT {}", child.id()));
    let out = child.wait_with_output().expect("it ends");
    assert_eq!(out.status.code(), Some(1));
    assert!(!place.path("a").exists(), "half an image is left");
}

#[test]
fn of_a_demonstration() {
    let out = Command::new(COWBELL).args(["demo", "--time", "300"]).output().expect("it starts");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
    assert!(said.contains("Every byte was what it had to be."), "{said}");
}
