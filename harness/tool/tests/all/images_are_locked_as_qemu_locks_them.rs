//! Who has an image open keeps others from writing it: ours from QEMU's programs, QEMU's from ours,
//! ours from ours.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use crate::common::{Place, have_qemu, have_strace, read};

const FORMATS: [&str; 5] = ["raw", "qed", "qcow2", "vmdk", "vdi"];

/// A program that has an image open until this is dropped.
struct Holder {
    child: Child,
}

impl Holder {
    fn new(place: &Place, program: &str, args: &str) -> Holder {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec {program} {args}")]).current_dir(place.dir.path());
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = piped.spawn().expect("it runs");
        // It answers when the image is open.
        let stdin = child.stdin.as_mut().expect("a pipe");
        stdin.write_all(b"length\n").expect("it reads");
        let mut answer = String::new();
        let mut stdout = BufReader::new(child.stdout.as_mut().expect("a pipe"));
        stdout.read_line(&mut answer).expect("it answers");
        assert!(answer.contains("MiB"), "{program} {args}: {answer}");
        Holder { child }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

fn ours(place: &Place) -> String {
    place.dir.path().join("bin/qemu-io").display().to_string()
}

/// The exit code and the line about a lock, without the program's name.
fn verdict(out: &std::process::Output) -> (Option<i32>, String) {
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    let line = text.lines().find(|line| line.ends_with("\" lock")).unwrap_or_default();
    let asks = text.contains("Is another process using the image [");
    assert_eq!(asks, !line.is_empty(), "{text}");
    (out.status.code(), line.rsplit(": ").next().unwrap_or_default().to_string())
}

const WRITERS: [&str; 6] = [
    "qemu-io -f F -c 'write -P 9 0 512' a",
    "qemu-img resize -q -f F a 2M",
    "qemu-img create -q -f F a 1M",
    "qemu-img bench -q -w -c 1 -f F a",
    "qemu-img check -q -r all -f F a",
    "qemu-img snapshot -c one -f F a",
];

const SHARING_WRITERS: [&str; 3] = [
    "qemu-img check -U -r all -f F a",
    "qemu-img check -U -r leaks -f F a",
    "qemu-img snapshot -U -c one -f F a",
];

const READERS: [&str; 12] = [
    "qemu-img info -f F a",
    "qemu-img info -U -f F a",
    "qemu-img map -f F a",
    "qemu-img map -U -f F a",
    "qemu-img compare -f F -F F a a",
    "qemu-img compare -U -f F -F F a a",
    "qemu-img snapshot -l -f F a",
    "qemu-img bench -q -c 1 -f F a",
    "qemu-img bench -q -U -c 1 -f F a",
    "qemu-io -r -f F -c length a",
    "qemu-io -r -U -f F -c length a",
    "qemu-io -U -f F -c length a",
];

#[test]
fn writers_are_refused_beside_a_writer_and_change_nothing() {
    if !have_qemu() {
        return;
    }
    for format in FORMATS {
        let place = Place::new();
        place.qemu(&format!("qemu-img create -q -f {format} a 1M"));
        for holder in ["qemu-io".to_string(), ours(&place)] {
            let _held = Holder::new(&place, &holder, &format!("-f {format} a"));
            let before = read(&place.path("a"));
            for line in WRITERS {
                let line = line.replace('F', format);
                let (code, words) = verdict(&place.ours(&line));
                assert_eq!(code, Some(1), "{line} beside {holder}: {words}");
                assert!(words.ends_with("\"write\" lock"), "{line} beside {holder}: {words}");
                assert!(read(&place.path("a")) == before, "{line} beside {holder}");
            }
        }
    }
}

#[test]
fn qemus_writers_are_refused_beside_ours() {
    if !have_qemu() {
        return;
    }
    for format in FORMATS {
        let place = Place::new();
        place.qemu(&format!("qemu-img create -q -f {format} a 1M"));
        let _held = Holder::new(&place, &ours(&place), &format!("-f {format} a"));
        let before = read(&place.path("a"));
        for line in WRITERS {
            let line = line.replace('F', format);
            let code = verdict(&place.theirs(&line)).0;
            // What QEMU opens a raw file for before it says that raw files have no such thing.
            assert_ne!(code, Some(0), "{line}");
            assert!(read(&place.path("a")) == before, "{line}");
        }
    }
}

#[test]
fn readers_are_refused_and_let_in_as_qemus_are() {
    if !have_qemu() {
        return;
    }
    for format in FORMATS {
        let place = Place::new();
        place.qemu(&format!("qemu-img create -q -f {format} a 1M"));
        for holder in ["qemu-io".to_string(), ours(&place)] {
            for mode in ["", "-r "] {
                let _held = Holder::new(&place, &holder, &format!("{mode}-f {format} a"));
                for line in READERS {
                    let line = line.replace('F', format);
                    let (theirs, ours) = (place.theirs(&line), place.ours(&line));
                    assert_eq!(verdict(&ours), verdict(&theirs), "{line} beside {holder} {mode}");
                }
            }
        }
    }
}

#[test]
fn who_shares_an_image_may_not_change_it() {
    if !have_qemu() {
        return;
    }
    for format in FORMATS {
        let place = Place::new();
        place.qemu(&format!("qemu-img create -q -f {format} a 1M"));
        let before = read(&place.path("a"));
        for line in SHARING_WRITERS {
            let line = line.replace('F', format);
            let (theirs, ours) = (place.theirs(&line), place.ours(&line));
            let text = String::from_utf8_lossy(&ours.stderr);
            assert_eq!(ours.status.code(), theirs.status.code(), "{line}: {text}");
            assert_eq!(text, String::from_utf8_lossy(&theirs.stderr), "{line}");
            assert!(read(&place.path("a")) == before, "{line}");
        }
    }
}

#[test]
fn who_works_on_tables_locks_the_data_file_as_well() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu("qemu-img create -q -f qcow2 -o data_file=data a 1M");
    let lines = [
        "qemu-img check a",
        "qemu-img check -U a",
        "qemu-img check -r all a",
        "qemu-img check -r leaks a",
        "qemu-img snapshot -c one a",
        "qemu-img snapshot -a one a",
        "qemu-img snapshot -d one a",
        "qemu-img snapshot -l a",
    ];
    // Ours holds it as a virtual machine does.
    let holder = ours(&place);
    for mode in ["", "-r "] {
        let _held = Holder::new(&place, &holder, &format!("{mode}-f raw data"));
        for line in lines {
            let (theirs, ours) = (place.theirs(line), place.ours(line));
            let (theirs, ours) = (verdict(&theirs), verdict(&ours));
            assert_eq!(ours.0, theirs.0, "{line} beside {holder} {mode}: {ours:?}");
            assert_eq!(ours.1.is_empty(), theirs.1.is_empty(), "{line} beside {holder} {mode}");
        }
    }
}

#[test]
fn names_and_options_say_how_to_lock() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu("qemu-img create -q -f qcow2 a 1M && qemu-img create -q -f raw b 1M");
    let image = "driver=qcow2,file.filename=a";
    let mut lines: Vec<String> = Vec::new();
    let words = ["", ",file.locking=off", ",file.locking=on", ",file.locking=auto"];
    let sharing = [",force-share=on", ",force-share=off", ",file.force-share=on"];
    for more in words.iter().chain(&sharing) {
        for verb in ["info", "map", "check", "check -r all", "snapshot -l", "snapshot -c s"] {
            lines.push(format!("qemu-img {verb} --image-opts {image}{more}"));
        }
        lines.push(format!("qemu-io --image-opts -c length {image}{more}"));
        lines.push(format!("qemu-io --image-opts -r -c length {image}{more}"));
        for mode in ["", "-r "] {
            lines.push(format!("qemu-io -c 'open {mode}-o driver=qcow2{more} a'"));
            lines.push(format!("qemu-io -c 'open {mode}-o {image}{more}'"));
        }
    }
    let json = |inner: &str| format!("qemu-img info 'json:{{\"driver\":\"qcow2\",{inner}}}'");
    lines.push(json(r#""force-share":true,"file":{"driver":"file","filename":"a"}"#));
    lines.push(json(r#""file":{"driver":"file","locking":"off","filename":"a"}"#));
    lines.push(json(r#""file":{"driver":"file","locking":"on","filename":"a"}"#));
    for holder in ["qemu-io".to_string(), ours(&place)] {
        let _held = Holder::new(&place, &holder, "-f qcow2 a");
        for line in &lines {
            let (theirs, ours) = (place.theirs(line), place.ours(line));
            assert_eq!(verdict(&ours), verdict(&theirs), "{line} beside {holder}");
        }
    }
    let _held = Holder::new(&place, &ours(&place), "-f raw b");
    for locking in ["on", "off"] {
        let line =
            format!("qemu-io --image-opts -c length driver=file,filename=b,locking={locking}");
        let (theirs, ours) = (place.theirs(&line), place.ours(&line));
        assert_eq!(verdict(&ours), verdict(&theirs), "{line}");
    }
}

#[test]
fn the_process_that_holds_the_lock_is_named() {
    let place = Place::new();
    place.ok("qemu-img create -q -f qcow2 a 1M");
    let held = Holder::new(&place, &ours(&place), "-f qcow2 a");
    let out = place.ours("qemu-io -f qcow2 -c length a");
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains(&format!("Process {} (", held.child.id())), "{text}");
}

#[test]
fn files_that_cannot_be_locked_are_said() {
    if !have_strace() {
        return;
    }
    let place = Place::new();
    place.ok("qemu-img create -q -f qcow2 a 1M");
    // The third call on the file is the first that asks for a lock.
    let strace = "strace -f -o trace -e trace=fcntl -e inject=fcntl:error=ENOLCK:when=3";
    let out = place.ours(&format!("{strace} cowbell io -f qcow2 -c 'write 0 512' a"));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && text.contains("cannot be locked"), "{text}");
    let out = place.ours(&format!("{strace} cowbell io --locking on -f qcow2 -c length a"));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && text.contains("No locks available"), "{text}");
    let _held = Holder::new(&place, &ours(&place), "-f qcow2 a");
    place.ok("cowbell io --locking off -r -f qcow2 -c length a");
}
