//! `--resume`: whoever is killed while he copies a disk leaves something that the next one goes on with, what
//! is noted down as copied is there, and nothing has the target's name before it is whole.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::{COWBELL, Place, Random, read};

const MIB: usize = 1 << 20;

/// Data, zeros in it, and holes.
fn source(place: &Place) -> Vec<u8> {
    let mut random = Random(9);
    let mut bytes = vec![0; 150 * MIB + 512];
    for part in bytes.chunks_mut(MIB) {
        if random.below(3) == 0 {
            continue;
        }
        let (byte, len) = (random.below(255) as u8 + 1, random.below(MIB as u64) as usize);
        let len = len.min(part.len());
        part[..len].fill(byte);
        part[..len].iter_mut().step_by(97).for_each(|byte| *byte = random.next() as u8);
    }
    std::fs::write(place.path("a"), &bytes).expect("a scratch file");
    bytes
}

fn begin(place: &Place, line: &str) -> Child {
    let mut command = Command::new(COWBELL);
    command.args(line.split_whitespace()).current_dir(place.dir.path());
    command.stderr(Stdio::null()).spawn().expect("it runs")
}

/// Up to which byte there is all of it, as is noted down.
fn noted(place: &Place) -> Option<usize> {
    let notes = std::fs::read_to_string(place.path("b.partial.resume")).ok()?;
    let at = notes.lines().find_map(|line| line.strip_prefix("stable "));
    Some(at.expect("that is said").parse().expect("a number"))
}

/// Kills one after the other; then one goes on to the end.
fn killed(format: &str, options: &str, seed: u64) {
    let place = Place::new();
    let bytes = source(&place);
    place.ok("cowbell create -q -f raw base 60M && cowbell io -f raw -c 'write -P 1 0 60M' base");
    let mut random = Random(seed);
    let line = format!("convert --resume -f raw -O {format} {options} -r 20M a b");
    let mut most = 0;
    for round in 0..2 {
        let mut child = begin(&place, &line);
        std::thread::sleep(Duration::from_millis(50 + random.below(4500)));
        // Ctrl-C in between: what is under way then is not noted down either.
        let signal = if round % 2 == 0 { "KILL" } else { "INT" };
        place.ok(&format!("kill -{signal} {}", child.id()));
        child.wait().expect("it ends");
        if place.path("b").exists() {
            break;
        }
        let Some(at) = noted(&place) else { continue };
        assert!(at >= most, "it begins anew: {at} after {most}");
        most = at;
        let image = format!("-f {format} -U");
        place.ok(&format!("cp b.partial c && cowbell convert {image} -O raw c c.raw"));
        let there = read(&place.path("c.raw"));
        assert!(there[..at.min(there.len())] == bytes[..at.min(there.len())], "{line}: {at}");
    }
    assert!(most > 0 || place.path("b").exists(), "{line}: nothing was noted down");
    place.ok(&format!("cowbell {}", line.replace(" -r 20M", "")));
    if format != "raw" {
        // A grain that was never linked stays leaked if one behind it was.
        let code = place.ours(&format!("cowbell check -q -f {format} b")).status.code();
        assert!(code == Some(0) || format == "vmdk" && code == Some(3), "{line}: {code:?}");
    }
    place.ok(&format!("cowbell compare -f raw -F {format} a b"));
    assert!(!place.ok("ls").contains("b.partial"));
}

#[test]
fn killed_with_a_raw_target() {
    killed("raw", "-m 16", 1);
    killed("raw", "-S 0 -t none", 2);
}

#[test]
fn killed_with_a_qcow2_target() {
    killed("qcow2", "", 3);
    killed("qcow2", "-c -m 3", 4);
    killed("qcow2", "-o lazy_refcounts=on,cluster_size=4k", 5);
}

#[test]
fn killed_with_an_overlay() {
    // What the source has itself is all of it: a raw image has nothing below.
    killed("qcow2", "-B base -F raw", 6);
}

#[test]
fn killed_with_other_targets() {
    for (seed, format) in ["qed", "vmdk", "vdi"].into_iter().enumerate() {
        killed(format, "", 7 + seed as u64);
    }
}

/// Fails, and says so; what was begun stays.
fn refused(place: &Place, line: &str, why: &str) {
    let before = place.ok("cat b.partial.resume");
    let out = place.ours(&format!("cowbell {line}"));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(1) && said.contains(why), "{line}: {said}");
    assert_eq!(place.ok("cat b.partial.resume"), before, "{line}");
    assert!(place.path("b.partial").exists() && !place.path("b").exists(), "{line}");
}

#[test]
fn of_the_same_source_with_the_same_options() {
    let place = Place::new();
    source(&place);
    let line = "convert --resume -O qcow2 a b";
    // Ctrl-C: all that was copied is stable.
    let mut child = begin(&place, "convert --resume -O qcow2 -r 40M a b");
    std::thread::sleep(Duration::from_millis(1200));
    place.ok(&format!("kill -INT {}", child.id()));
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    let at = noted(&place).expect("it is noted down");
    assert!(at > 10 * MIB, "{at}");
    place.ok("cowbell check -q -f qcow2 b.partial");
    let options = "was begun with other options";
    refused(&place, "convert --resume -O raw a b", options);
    refused(&place, "convert --resume -O qcow2 -c a b", options);
    refused(&place, "convert --resume -O qcow2 -S 64k a b", options);
    refused(&place, "backup --resume -o cluster_size=4k a b", options);
    place.ok("cp -p a saved && cp -p a other && truncate -s +512 other");
    let changed = "the source is another one, or was changed";
    refused(&place, "convert --resume -O qcow2 other b", changed);
    place.ok("touch -r a stamp && printf x | dd of=a bs=1 seek=7 conv=notrunc status=none");
    refused(&place, line, changed);
    place.ok("truncate -s +512 a && touch -r stamp a");
    refused(&place, line, changed);
    place.ok("cat saved > a && touch -r stamp a");
    refused(&place, "convert --resume --progress-fd 77 -O qcow2 a b", "--progress-fd 77");
    // Somebody else's file of that name.
    place.ok("mv b.partial mine && cp mine b.partial");
    refused(&place, line, "not what was begun");
    place.ok("mv mine b.partial");
    let told = place.ok(&format!("cowbell {line} --progress-fd 7 7>&1 | cat"));
    let first = told.lines().next().expect("a line");
    assert!(first.starts_with("{\"done\":") && !first.starts_with("{\"done\":0,"), "{first}");
    place
        .ok("cowbell compare -f raw a b && cowbell check -q b && ls | grep -c partial | grep -q 0");
}

#[test]
fn what_is_not_to_be_gone_on_with() {
    let place = Place::new();
    source(&place);
    let mut child = begin(&place, "backup --resume -r 40M -f raw a b");
    std::thread::sleep(Duration::from_millis(700));
    place.ok(&format!("kill -TERM {}", child.id()));
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    assert!(noted(&place).is_some_and(|at| at > 0));
    place.ok("cp b.partial keep && cp b.partial.resume notes");
    // Who does not ask for it begins anew, and the notes go.
    let mut child = begin(&place, "convert -r 1M -O qcow2 a b");
    std::thread::sleep(Duration::from_millis(700));
    child.kill().expect("it is killed");
    child.wait().expect("it ends");
    assert!(place.path("b.partial").exists() && noted(&place).is_none());
    place.ok("cowbell convert --resume -O qcow2 a b && cowbell compare -f raw a b");
    for (line, why) in [
        ("convert --resume --checksum blake3 a c", "checksum"),
        ("convert --resume -n a b", "--resume"),
        ("convert --resume a -", "pipe"),
        ("convert --resume -O vmdk -o subformat=streamOptimized a c", "stream"),
        ("convert --resume -O vmdk -o subformat=twoGbMaxExtentFlat a c", "one file"),
        ("convert --resume -O qcow2 -o data_file=d a c", "one file"),
    ] {
        let out = place.ours(&format!("cowbell {line}"));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(1) && said.contains(why), "{line}: {said}");
        assert!(!place.ok("ls").contains("partial") && !place.path("c").exists(), "{line}");
    }
}
