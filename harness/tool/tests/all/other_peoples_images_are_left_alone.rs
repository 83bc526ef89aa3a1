//! Images that are not handled, or not readable: named, never taken for raw disks, never changed.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::{Command, Output};

use crate::common::{Place, have_qemu, read};

const FORMATS: [(&str, &str, &str); 8] = [
    ("vpc", "", "VHD"),
    ("vpc", "-o subformat=fixed", "VHD"),
    ("vpc", "-o subformat=fixed,force_size=on", "VHD"),
    ("vhdx", "", "VHDX"),
    ("vhdx", "-o subformat=fixed", "VHDX"),
    ("parallels", "", "Parallels"),
    ("qcow", "", "qcow (version 1)"),
    ("luks", "--object secret,id=s,data=abc -o key-secret=s,iter-time=10", "LUKS"),
];

fn says(out: &Output, what: &str, line: &str) {
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(stderr.contains(what), "{line}: no '{what}' in {stderr}");
    assert!(!out.status.success(), "{line}");
}

/// Every verb that opens an image, with `x` for the image.
const VERBS: [&str; 14] = [
    "qemu-img info x",
    "qemu-img info --backing-chain x",
    "qemu-img check x",
    "qemu-img check -r all x",
    "qemu-img map x",
    "qemu-img compare x x",
    "qemu-img resize x 8M",
    "qemu-img snapshot -l x",
    "qemu-img snapshot -c one x",
    "qemu-img bench -c 1 -w x",
    "qemu-io -c 'write 0 512' x",
    "qemu-io -r -c 'read 0 512' x",
    "qemu-img info file:x",
    "qemu-img info --image-opts file.filename=x",
];

#[test]
fn other_formats_are_named_and_stay_as_they_are() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    for (format, options, title) in FORMATS {
        place.qemu(&format!("rm -f x; qemu-img create -q -f {format} {options} x 4M"));
        let before = read(&place.path("x"));
        for line in VERBS {
            let out = place.ours(line);
            says(&out, &format!("it is a {title} image, which is not supported"), line);
            assert!(read(&place.path("x")) == before, "{format}: {line} changed it");
        }
        says(&place.ours(&format!("qemu-img info -f {format} x")), title, format);
        // As a backing file, found out and said.
        place.qemu("qemu-img create -q -u -f qcow2 -b x -F raw o 4M");
        place.qemu(&format!("qemu-img create -q -u -f qcow2 -b x -F {format} named 4M"));
        says(&place.ours("qemu-img map named"), &format!("{title} images are not"), "named");
        place.qemu("qemu-img create -q -u -f qed -b x -F qcow2 probed 4M");
        says(&place.ours("qemu-img map probed"), &format!("it is a {title} image"), "probed");
        says(&place.ours("qemu-img create -f qcow2 -b x n"), &format!("a {title} image"), "create");
        // Whoever says that it is raw means that.
        place.ok("qemu-img info -f raw x; qemu-img map o; qemu-io -f raw -c 'read -q 0 512' x");
    }
}

#[test]
fn what_only_looks_a_little_like_them_is_raw() {
    let place = Place::new();
    for (name, bytes) in [
        ("iso", [vec![0; 32768], b"\x01CD001\x01".to_vec(), vec![0; 4096]].concat()),
        ("mbr", [vec![0; 510], vec![0x55, 0xaa], vec![0; 8192]].concat()),
        ("luks2", [b"LUKS\xba\xbe\0\x02".to_vec(), vec![0; 8192]].concat()),
        ("tail", [vec![0; 8192], b"conectix".to_vec(), vec![0; 504]].concat()),
        ("text", b"conectiX".repeat(200)),
        ("short", b"vhdx".to_vec()),
        ("empty", Vec::new()),
    ] {
        std::fs::write(place.path(name), bytes).expect("written");
        let out = place.ok(&format!("qemu-img info {name}"));
        assert!(out.contains("file format: raw"), "{name}: {out}");
    }
}

#[test]
fn encrypted_images_are_described_and_nothing_else() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    for how in ["encrypt.format=luks,encrypt.iter-time=10", "encrypt.format=aes", "encryption=on"] {
        place.qemu(&format!(
            "qemu-img create -q --object secret,id=s,data=abc -f qcow2 \
             -o {how},encrypt.key-secret=s x 3M"
        ));
        let before = read(&place.path("x"));
        let human = place.ok("qemu-img info x");
        assert!(human.contains("virtual size: 3 MiB") && human.contains("\nencrypted: yes\n"));
        assert!(place.ok("qemu-img info --output json x").contains("\"encrypted\": true,"));
        place.ok("qemu-img info --backing-chain x");
        for line in VERBS.iter().filter(|line| !line.contains("info")) {
            says(&place.ours(line), "encryption of qcow2 images is not supported", line);
            assert!(read(&place.path("x")) == before, "{how}: {line} changed it");
        }
        place.ok("qemu-img create -q -f qcow2 -b x -F qcow2 o; qemu-img info --backing-chain o");
        says(&place.ours("qemu-img map o"), "encryption of qcow2 images", "an overlay");
        says(&place.ours("qemu-io -c 'write 0 512' o"), "encryption of qcow2", "an overlay");
    }
    says(&place.ours("qemu-img info --object secret,id=s,data=abc x"), "'secret'", "--object");
}

#[test]
fn an_untrusted_image_is_not_followed() {
    let place = Place::new();
    place.ok("mkdir d; qemu-img create -q -f raw a 1M; qemu-img create -q -f raw d/a 1M");
    place.ok("qemu-img create -q -f qcow2 -b $PWD/a -F raw d/far");
    place.ok("qemu-img create -q -f qcow2 -b a -F raw d/near");
    place.ok("qemu-img create -q -f qcow2 -b file:a -F raw named");
    place.ok("qemu-img create -q -f qcow2 -o data_file=$PWD/data d/data 1M");
    place.ok("qemu-img create -q -f vmdk -o subformat=monolithicFlat d/flat.vmdk 1M");
    place.ok("mv d/flat-flat.vmdk .; sed -i 's#\"flat-flat#\"../flat-flat#' d/flat.vmdk");
    for image in ["d/far", "d/near", "named", "d/data", "d/flat.vmdk"] {
        for verb in ["qemu-img map", "qemu-io -c 'read -q 0 512'", "qemu-img bench -q -c 1"] {
            place.ok(&format!("{verb} {image}"));
            let line = format!("{verb} --untrusted {image}");
            let out = place.ours(&line);
            let stderr = String::from_utf8_lossy(&out.stderr);
            let refused = stderr.contains("is not opened") || stderr.contains("only plain paths");
            assert!(!out.status.success() && refused, "{line}: {stderr}");
        }
        place.ok(&format!("qemu-img info --untrusted {image}"));
    }
}

/// Runs `program` on these arguments, which no shell sees.
fn run(place: &Place, program: &str, args: &[&OsStr]) -> Output {
    let program = place.path("bin").join(program);
    Command::new(program).args(args).current_dir(place.dir.path()).output().expect("it runs")
}

#[test]
fn names_may_have_any_byte() {
    let place = Place::new();
    let odd: [&[u8]; 7] =
        [b"a\tb\nc\"d\\e\x01", b"\xff\xfe.img", b"-f", b"a:b", b"json:{", b" ", "é😀'".as_bytes()];
    for bytes in odd {
        // What looks like an option or a protocol is spelled as a path.
        let name = OsString::from_vec([b"./", bytes].concat());
        let arg = OsStr::new;
        let create = [arg("create"), arg("-f"), arg("qcow2"), &name, arg("1M")];
        let out = run(&place, "qemu-img", &create);
        assert!(out.status.success(), "{name:?}: {out:?}");
        assert!(place.dir.path().join(OsStr::from_bytes(bytes)).exists(), "{name:?}");
        for verb in ["info", "check", "map"] {
            let out = run(&place, "qemu-img", &[arg(verb), arg("--output=json"), &name]);
            assert!(out.status.success(), "{verb} {name:?}: {out:?}");
            let text = String::from_utf8(out.stdout).expect("JSON is plain ASCII");
            assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
        }
        let out = run(&place, "qemu-img", &[arg("info"), &name]);
        let human = String::from_utf8(out.stdout).expect("it is text");
        assert!(
            human.starts_with("image: ./") && human.lines().nth(1) == Some("file format: qcow2")
        );
        let tag = OsString::from_vec([b"s", bytes].concat());
        for action in ["-c", "-a", "-d"] {
            let out = run(&place, "qemu-img", &[arg("snapshot"), arg(action), &tag, &name]);
            assert!(out.status.success(), "{action} {tag:?}: {out:?}");
        }
        let out = run(&place, "qemu-io", &[arg("-c"), arg("length"), &name]);
        assert_eq!(out.stdout, b"1 MiB\n");
        let missing = OsString::from_vec([b"./no", bytes].concat());
        let out = run(&place, "qemu-img", &[arg("info"), &missing]);
        let message = String::from_utf8(out.stderr).expect("messages are text");
        assert_eq!((out.status.code(), message.lines().count()), (Some(1), 1), "{message:?}");
    }
    let text = place.ok("qemu-img info --output json \"$(printf './a\\tb\\nc\"d\\\\e\\001')\"");
    assert!(text.contains(r#""filename": "./a\tb\nc\"d\\e\u0001","#), "{text}");
}

#[test]
fn the_version_is_where_scripts_look_for_it() {
    let place = Place::new();
    for (line, start) in [
        ("qemu-img --version", "qemu-img version 10.0"),
        ("qemu-img -V", "qemu-img version 10.0"),
        ("qemu-io --version", "qemu-io version 10.0"),
        ("qemu-io -V", "qemu-io version 10.0"),
        ("cowbell --version", concat!("cowbell ", env!("CARGO_PKG_VERSION"))),
    ] {
        let out = place.ok(line);
        assert!(out.starts_with(start), "{line}: {out}");
    }
}
