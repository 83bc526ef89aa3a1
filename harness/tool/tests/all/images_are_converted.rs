//! `convert` makes images that hold the same disk, as QEMU sees it, of every format out of every other;
//! takes no more space than QEMU does; and leaves nothing under the target's name that is not whole.

use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{COWBELL, Place, Random, have_qemu, have_strace, read};

const FORMATS: [(&str, &str); 7] = [
    ("qcow2", ""),
    ("vmdk", ""),
    ("qed", ""),
    ("vdi", ""),
    ("vmdk", "-o subformat=streamOptimized"),
    ("qcow2", "-o cluster_size=4k,extended_l2=off,preallocation=metadata"),
    ("raw", ""),
];

/// Disks of several kinds, of odd sizes too.
fn sources(place: &Place) -> Vec<&'static str> {
    let mut random = Random(1);
    let mut dense = vec![0; 5 << 20];
    for (at, byte) in dense.iter_mut().enumerate() {
        *byte = 1 + (at / 7) as u8 % 200;
    }
    let mut sparse = vec![0; (9 << 20) + 512];
    for _ in 0..40 {
        let at = random.below(sparse.len() as u64 - 70_000) as usize;
        let len = random.below(70_000) as usize;
        sparse[at..at + len].fill(1 + random.below(255) as u8);
    }
    let noise: Vec<u8> = (0..2_000_001).map(|_| random.next() as u8).collect();
    let text: Vec<u8> =
        (0..300_000).flat_map(|line| format!("line {line}\n").into_bytes()).collect();
    let kinds = [
        ("dense", dense),
        ("sparse", sparse),
        ("noise", noise),
        ("text", text),
        ("nothing", Vec::new()),
        ("zeros", vec![0; 3 << 20]),
    ];
    let names = kinds.iter().map(|&(name, _)| name).collect();
    for (name, bytes) in kinds {
        std::fs::write(place.path(name), bytes).expect("a scratch file");
    }
    // A file with holes.
    place
        .ok("truncate -s 40M holes && dd if=dense of=holes bs=1M seek=17 conv=notrunc status=none");
    [names, vec!["holes"]].concat()
}

fn taken(place: &Place, name: &str) -> u64 {
    std::fs::metadata(place.path(name)).expect("it is there").blocks() * 512
}

#[test]
fn from_format_to_format() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    for name in sources(&place) {
        let (mut from, mut format) = (name.to_string(), "raw");
        for (i, (to, options)) in FORMATS.into_iter().enumerate() {
            // QEMU opens no VMDK image without a byte.
            if name == "nothing" && to == "vmdk" {
                continue;
            }
            let what = format!("{name}: {format} to {to} {options}");
            let made = format!("{name}.{i}");
            place.ok(&format!("cowbell convert -f {format} -O {to} {options} {from} {made}"));
            let theirs = format!("-f {format} -O {to} {options} {from} theirs");
            place.qemu(&format!("qemu-img convert {theirs}"));
            // QEMU has no check for raw images, and reads a footer's copy of the header wrongly.
            if to != "raw" && !options.contains("stream") {
                place.qemu(&format!("qemu-img check -q -f {to} {made}"));
            }
            place.qemu(&format!("qemu-img compare -q -f raw -F {to} {name} {made}"));
            place.ok(&format!("qemu-img compare -q -f raw -F {to} {name} {made}"));
            let (ours, theirs) = (taken(&place, &made), taken(&place, "theirs"));
            assert!(ours <= theirs + (256 << 10), "{what}: {ours} bytes, QEMU {theirs}");
            (from, format) = (made, to);
        }
        let last = read(&place.path(&from));
        assert!(last[..read(&place.path(name)).len()] == read(&place.path(name)), "{name}");
    }
    let left = place.ok("ls");
    assert!(!left.contains("partial"), "{left}");
}

#[test]
fn with_any_number_in_flight_and_past_the_page_cache() {
    let place = Place::new();
    sources(&place);
    for options in
        ["-m 1", "-m 16 -W", "-t none", "-T none", "-t none -T none -m 3", "-S 64k", "-S 0"]
    {
        for format in ["raw", "qcow2", "vdi"] {
            place.ok(&format!(
                "cowbell convert {options} -O {format} sparse a && cowbell convert {options} -f \
                 {format} a b && cmp b sparse"
            ));
        }
    }
    // All of it has space then.
    place.ok("cowbell convert -S 0 holes full");
    assert!(taken(&place, "full") >= 40 << 20);
    place.ok("cowbell convert full sparse-again && cowbell convert holes again");
    assert!(taken(&place, "sparse-again") <= (6 << 20) && taken(&place, "again") <= 6 << 20);
}

/// `-C`: the kernel copies, where both are raw; where it cannot, and between other formats, what it says is the same.
#[test]
fn with_the_kernel_s_help() {
    if !have_strace() {
        return;
    }
    let place = Place::new();
    sources(&place);
    place.ok("cowbell convert -O qcow2 sparse q");
    for (options, source, is_offered) in [
        ("-C", "sparse", true),
        ("-C -t none -T none", "sparse", true),
        ("-C -m 1", "holes", true),
        ("-C -f qcow2", "q", false),
        ("-C --checksum sha256", "sparse", false),
        ("", "sparse", false),
    ] {
        place.ok(&format!(
            "strace -f -o calls -e trace=copy_file_range cowbell convert {options} {source} b && \
             qemu-img compare -q -F raw {source} b"
        ));
        let calls = String::from_utf8(read(&place.path("calls"))).expect("strace writes text");
        let is_copied =
            calls.lines().any(|line| line.contains("copy_file_range") && !line.contains("= -1"));
        assert_eq!(is_copied, is_offered, "{options}: {calls}");
        if source == "holes" {
            assert!(taken(&place, "b") <= 6 << 20, "holes are none");
        }
    }
    // Several, one behind the other.
    place.ok("cowbell convert -C sparse holes b && cat sparse holes > c && cmp b c");
    // Another file system: it is read and written, or copied, just as that can.
    place.ok(
        "cp sparse /dev/shm/cowbell-sparse.$$; cowbell convert -C /dev/shm/cowbell-sparse.$$ b; \
              rm /dev/shm/cowbell-sparse.$$; cmp b sparse",
    );
}

/// What is where on a qcow2 image's disk; where in the file is everybody's own affair.
fn map(place: &Place, name: &str) -> Vec<(u64, String)> {
    let mut map: Vec<(u64, String)> = Vec::new();
    for line in place.qemu(&format!("qemu-img map --output json -f qcow2 {name}")).lines() {
        let line = line.split(", \"offset\"").next().unwrap_or_default();
        let line = line.trim_end_matches([',', ']', '}', ' ']);
        let mut fields = line.split(": ");
        let mut number = || {
            let field = fields.nth(1).unwrap_or_default();
            field.split(',').next().unwrap_or_default().parse::<u64>().expect("a number")
        };
        let start = number();
        let kind = line.split_once("\"depth\"").expect("it is told").1.to_string();
        if map.last().is_none_or(|(_, last)| *last != kind) {
            map.push((start, kind));
        }
    }
    map
}

#[test]
fn overlays_stay_overlays() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    // The base ends before its overlay; zeros are written over data, and over nothing.
    place.qemu(
        "qemu-img create -q -f raw base.raw 4M && qemu-io -f raw -c 'write -q -P 9 0 4M' base.raw && \
         qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2 6M && \
         qemu-io -f qcow2 -c 'write -q -P 8 1M 100k' -c 'write -q -z 2M 128k' mid.qcow2 && \
         qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 8M && \
         qemu-io -f qcow2 -c 'write -q -P 7 1100k 64k' -c 'write -q -z 3M 64k' \
         -c 'write -q -P 6 5M 10k' -c 'write -q -P 0 256k 64k' -c 'write -q -z 7M 1M' top.qcow2",
    );
    for (source, base) in [("mid.qcow2", "base.raw -F raw"), ("top.qcow2", "mid.qcow2 -F qcow2")] {
        for (format, options) in [
            ("qcow2", ""),
            ("qcow2", "-o extended_l2=on"),
            ("qcow2", "-o cluster_size=4k"),
            ("qed", ""),
        ] {
            let line = format!("convert -O {format} {options} -B {base} {source}");
            place.ok(&format!("cowbell {line} ours"));
            place.qemu(&format!("qemu-img {line} theirs"));
            place.qemu(&format!("qemu-img compare -q -f {format} -F qcow2 ours {source}"));
            place.qemu(&format!("qemu-img check -q -f {format} ours"));
            if format == "qcow2" {
                assert_eq!(map(&place, "ours"), map(&place, "theirs"), "{line}");
            }
        }
    }
    // Backed by one of the files that it is to replace.
    let out = place.ours("cowbell convert -O qcow2 -B base.raw -F raw mid.qcow2 base.raw");
    assert_eq!(out.status.code(), Some(1));
    place.qemu("qemu-io -f raw -c 'read -q -P 9 0 4M' base.raw");
}

#[test]
fn several_are_put_one_after_the_other() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    sources(&place);
    place.qemu("qemu-img convert -O qcow2 text text.qcow2");
    for format in ["raw", "qcow2", "vdi"] {
        let line = format!("convert -O {format} sparse noise nothing text.qcow2 holes");
        place.ok(&format!("cowbell {line} ours"));
        place.qemu(&format!("qemu-img {line} theirs"));
        place.qemu(&format!("qemu-img compare -q -f {format} -F {format} ours theirs"));
    }
}

#[test]
fn what_is_there_is_written_in_place() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    sources(&place);
    for format in ["raw", "qcow2", "qed", "vmdk", "vdi"] {
        // What was there goes, and what lies behind stays.
        place.qemu(&format!(
            "qemu-img create -q -f {format} a 20M && qemu-io -f {format} -c 'write -q -P 5 0 20M' a"
        ));
        place.ok(&format!("cowbell convert -n -O {format} sparse a"));
        place.qemu(&format!("qemu-img convert -f {format} -O raw a a.raw"));
        let (all, part) = (read(&place.path("a.raw")), read(&place.path("sparse")));
        assert!(all[..part.len()] == part, "{format}");
        assert!(all[part.len()..].iter().all(|&byte| byte == 5), "{format}");
    }
    place.qemu("qemu-img create -q -f qcow2 a 20M");
    place.ok("cowbell convert -n --target-is-zero --target-image-opts sparse driver=qcow2,file.filename=a");
    place.qemu("qemu-img compare -q -f raw -F qcow2 sparse a");
    place
        .ok("ln -s b link && : > b && cowbell convert sparse link && cmp b sparse && test -L link");
}

#[test]
fn mistakes_are_told_as_qemu_tells_them() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu("qemu-img create -q -f raw a.raw 1M && qemu-img create -q -f qcow2 b.qcow2 2M");
    for line in [
        "convert",
        "convert a.raw",
        "convert -O foo a.raw x",
        "convert -f foo a.raw x",
        "convert -S 100 a.raw x",
        "convert -S 1x a.raw x",
        "convert -S 4G a.raw x",
        "convert -C -S 4k a.raw x",
        "convert -C -c -O qcow2 a.raw x",
        "convert -C -S 4k a.raw nothere/x",
        "convert -m 0 a.raw x",
        "convert -m 17 a.raw x",
        "convert -m x a.raw x",
        "convert -r x a.raw x",
        "convert -t foo a.raw x",
        "convert -T foo a.raw x",
        "convert -O qcow2 -o foo=1 a.raw x",
        "convert -n -O qcow2 -o cluster_size=4k a.raw b.qcow2",
        "convert -n -O raw b.qcow2 a.raw",
        "convert -n -O raw b.qcow2 nothere",
        "convert --target-is-zero a.raw x",
        "convert --target-image-opts a.raw driver=raw,file.filename=x",
        "convert -B b.qcow2 a.raw x",
        "convert -O qcow2 -B b.qcow2 a.raw x",
        "convert -O qcow2 -F qcow2 a.raw x",
        "convert -O qcow2 -B b.qcow2 -F qcow2 a.raw a.raw x",
        "convert -O raw -B b.qcow2 -F qcow2 a.raw x",
        "convert nothere x",
    ] {
        let ours = place.ours(&format!("qemu-img {line}"));
        let left = place.ok("ls");
        assert!(!left.contains('x') && !left.contains("partial"), "{line}: {left}");
        // It may leave a file behind.
        let theirs = place.theirs(&format!("qemu-img {line}; rc=$?; rm -f x; exit $rc"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(text(&ours.stderr), text(&theirs.stderr), "{line}");
        assert_eq!(ours.status.code(), theirs.status.code(), "{line}");
    }
    let out = place.ours("cowbell convert -c -O qed a.raw x");
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(text, "cowbell: convert: Compression not supported for this file format\n");
    for line in ["convert a.raw a.raw", "convert -O qcow2 b.qcow2 b.qcow2"] {
        assert_eq!(place.ours(&format!("cowbell {line}")).status.code(), Some(1), "{line}");
    }
    assert_eq!(read(&place.path("a.raw")).len(), 1 << 20);
}

#[test]
fn how_far_it_is() {
    let place = Place::new();
    sources(&place);
    let shown = place.ok("qemu-img convert -p dense x");
    assert!(shown.starts_with("    (0.00/100%)\r"), "{shown}");
    assert!(shown.ends_with("    (100.00/100%)\r\n"), "{shown}");
    assert_eq!(place.ok("qemu-img convert -p -q dense x"), "");
    let lines = place.ok("cowbell convert --progress-fd 7 dense x 7>&1 | cat");
    let last = lines.lines().last().unwrap_or_default();
    assert!(last.starts_with("{\"done\":5242880,\"total\":5242880,\"rate\":"), "{lines}");
}

#[test]
fn what_cannot_be_read() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    sources(&place);
    place.qemu("qemu-img convert -c -O qcow2 text text.qcow2");
    // A compressed cluster that does not inflate.
    let mut bytes = read(&place.path("text.qcow2"));
    let at = bytes.len() / 2;
    bytes[at..at + 4000].fill(0xff);
    std::fs::write(place.path("text.qcow2"), bytes).expect("written");
    let out = place.ours("qemu-img convert -f qcow2 text.qcow2 x");
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1));
    assert!(text.starts_with("qemu-img: error while reading at byte "), "{text}");
    assert!(!place.path("x").exists() && !place.path("x.partial").exists());
    let ours = place.ours("qemu-img convert --salvage -f qcow2 text.qcow2 ours");
    let theirs = place.theirs("qemu-img convert --salvage -f qcow2 text.qcow2 theirs");
    assert_eq!(ours.status.code(), theirs.status.code());
    assert!(read(&place.path("ours")) == read(&place.path("theirs")));
    let mut lines = [ours, theirs].map(|out| {
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        text.lines().map(String::from).collect::<Vec<_>>()
    });
    lines.iter_mut().for_each(|lines| lines.sort());
    assert_eq!(lines[0], lines[1]);
}

#[test]
fn nothing_is_left_of_one_that_was_ended() {
    let place = Place::new();
    place.ok(
        "truncate -s 300M big && dd if=/dev/urandom of=big bs=1M count=40 conv=notrunc status=none",
    );
    std::fs::write(place.path("old"), "old").expect("a scratch file");
    for (signal, partial) in [("INT", false), ("TERM", false), ("KILL", true)] {
        for format in ["raw", "qcow2", "vmdk"] {
            for name in ["old", "new"] {
                // Slowly, so that there is time.
                let mut child = Command::new(COWBELL)
                    .args(["convert", "-r", "20M", "-S", "0", "-O", format, "big", name])
                    .current_dir(place.dir.path())
                    .stderr(Stdio::null())
                    .spawn()
                    .expect("it runs");
                let beside = place.path(&format!("{name}.partial"));
                for _ in 0..12_000 {
                    if beside.exists() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                std::thread::sleep(Duration::from_millis(50));
                place.ok(&format!("kill -{signal} {}", child.id()));
                let status = child.wait().expect("it ends");
                assert!(!status.success(), "{signal}: {status:?}");
                assert_eq!(status.code(), if partial { None } else { Some(130) }, "{signal}");
                assert_eq!(beside.exists(), partial, "{signal}");
                assert_eq!(read(&place.path("old")), b"old");
                assert!(!place.path("new").exists());
            }
        }
    }
    // What somebody who was killed has left is in nobody's way.
    place.ok("cowbell convert -O qcow2 big new && test ! -e new.partial");
}

#[test]
fn a_full_disk_leaves_nothing() {
    let place = Place::new();
    sources(&place);
    let (mount, bin) = (place.path("small"), place.path("bin"));
    std::fs::create_dir(&mount).expect("a folder");
    if !place.ours("unshare -rm mount -t tmpfs -o size=2M none small").status.success() {
        eprintln!("SKIPPED: no small file system to be had");
        return;
    }
    for format in ["raw", "qcow2", "vmdk", "vdi", "qed"] {
        let line = format!(
            "mount -t tmpfs -o size=2M none small && echo old > small/x && \
             {}/qemu-img convert -O {format} dense small/x; echo code $?; ls small; cat small/x",
            bin.display()
        );
        let out = place.ours(&format!("unshare -rm sh -c '{line}'"));
        let (shown, told) =
            (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert_eq!(shown, "code 1\nx\nold\n", "{format}: {told}");
        assert!(told.contains("No space left on device"), "{format}: {told}");
    }
}

/// Each image goes through a pipe to the next format, and is the same disk in the end.
#[test]
fn through_pipes() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    for name in sources(&place) {
        let mut line = format!("cat {name}");
        let mut format = "raw";
        for (to, options) in [
            ("qcow2", "-c"),
            ("vmdk", "-o subformat=streamOptimized"),
            ("qed", ""),
            ("vdi", ""),
            ("qcow2", "-c -o compression_type=zstd"),
            ("raw", ""),
        ] {
            if name == "nothing" && to == "vmdk" {
                continue;
            }
            line += &format!(" | cowbell convert -f {format} -O {to} {options} - -");
            format = to;
        }
        place.ok(&format!("mkdir -p tmp; export TMPDIR=$PWD/tmp; {line} > piped"));
        place.qemu(&format!("qemu-img compare -q -f raw -F raw {name} piped"));
        assert_eq!(place.ok("ls tmp"), "", "something is left");
    }
    // Two of them; a name that begins so is a name.
    place.ok("cowbell convert -f raw -O raw dense sparse - | cowbell convert -f raw -O raw - ./-x");
    place.ok("cat dense sparse > both && truncate -s %512 both && cmp both ./-x");
    // Who reads no more ends it.
    let out = place.ours("mkdir -p tmp; TMPDIR=tmp cowbell convert -f raw -O qcow2 dense - | head -c 100 > /dev/null");
    assert!(out.status.success());
    assert_eq!(place.ok("ls tmp"), "", "something is left");
}

#[test]
fn as_they_were_at_a_snapshot() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    for options in ["cluster_size=64k", "cluster_size=4k,extended_l2=off", "compat=0.10"] {
        place.qemu(&format!("rm -f base i && qemu-img create -q -f qcow2 -o {options} base 8M"));
        place.qemu("qemu-io -c 'write -q -P 9 1M 5M' base");
        place.qemu(&format!("qemu-img create -q -f qcow2 -o {options} -b base -F qcow2 i"));
        for (byte, name) in [(1, "one"), (2, "two")] {
            place.qemu(&format!(
                "qemu-io -c 'write -q -P {byte} {byte}M 3M' i && qemu-img snapshot -c {name} i"
            ));
        }
        place.qemu("qemu-io -c 'write -q -P 3 0 6M' i");
        for snapshot in ["one", "two", "2", "snapshot.name=one", "snapshot.id=1,snapshot.name=one"]
        {
            let theirs = format!("qemu-img convert -f qcow2 -O raw -l {snapshot} i theirs");
            place.qemu(&theirs);
            for to in ["raw", "qcow2 -c", "vdi"] {
                place.ok(&format!("cowbell convert -f qcow2 -O {to} -l {snapshot} i ours"));
                let format = to.split(' ').next().unwrap_or_default();
                place.qemu(&format!("qemu-img compare -q -f raw -F {format} theirs ours"));
            }
        }
        let fails = "qemu-img convert -f qcow2 -l three i o";
        let (ours, theirs) = (place.ours(fails), place.theirs(fails));
        assert_eq!((ours.status.code(), ours.stderr), (theirs.status.code(), theirs.stderr));
    }
}

/// A file system may look through a whole extent to find where it ends, so it is asked once for each, not once for
/// each piece.
#[test]
fn where_data_ends_is_asked_once() {
    if !have_strace() {
        return;
    }
    let place = Place::new();
    place.ok("dd if=/dev/urandom of=a bs=1M count=32 status=none && truncate -s 64M a && cp a b");
    place
        .ok("cowbell create -q -f qcow2 -b a -F raw o && cowbell create -q -f qcow2 -b a -F raw p");
    for line in [
        "convert a c",
        "convert -O qcow2 a c",
        "backup a c",
        "compare a b",
        "dd if=a of=c bs=1M",
        "measure -O qcow2 a",
        "map a",
        "rebase -b b -F raw o",
        "commit p",
    ] {
        place.ok(&format!("strace -f -o calls -e trace=lseek cowbell {line} > out"));
        let calls = String::from_utf8(read(&place.path("calls"))).expect("strace writes text");
        let asked = calls.lines().filter(|line| line.contains("SEEK_HOLE")).count();
        assert!(asked <= 16, "{line}: asked {asked} times\n{calls}");
    }

    // Two questions for each stretch of data: where it ends, and where the next begins.
    place.ok("truncate -s 8M pieces");
    for at in (0..128).step_by(2) {
        place.ok(&format!(
            "dd if=/dev/urandom of=pieces bs=64k count=1 seek={at} conv=notrunc status=none"
        ));
    }
    for line in ["convert -O qcow2 pieces c", "backup pieces c", "convert -t none pieces c"] {
        place.ok(&format!("rm -f c; strace -f -o calls -e trace=lseek cowbell {line} > out"));
        let calls = String::from_utf8(read(&place.path("calls"))).expect("strace writes text");
        let asked = calls.lines().filter(|line| line.contains("SEEK_DATA")).count();
        assert!((64..=2 * 64 + 16).contains(&asked), "{line}: asked {asked} times");
    }
}

/// Where a hole ends inside a cluster, that is written once and whole: a stream takes nothing else.
#[test]
fn holes_that_end_inside_clusters() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.ok("truncate -s 3M source");
    for block in [5, 16, 39, 40, 41, 300, 767] {
        place.ok(&format!(
            "dd if=/dev/urandom of=source bs=4k count=1 seek={block} conv=notrunc status=none"
        ));
    }
    for to in ["vmdk -o subformat=streamOptimized", "qcow2 -c", "qcow2", "vdi", "qed", "raw"] {
        for options in ["", "-m 1", "-S 4k -t none"] {
            place.ok(&format!("cowbell convert -f raw {options} -O {to} source target"));
            let format = to.split(' ').next().expect("there is one");
            place.qemu(&format!("qemu-img compare -q -f raw -F {format} source target"));
        }
    }
    place.ok("cowbell backup -f raw --compressed source backup && qemu-img compare -q -f raw -F qcow2 source backup");
}
