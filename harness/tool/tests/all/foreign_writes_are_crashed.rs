//! `sim import` crashes under programs that are not ours, from a log of what they wrote: it finds who
//! forgets a flush, and nothing where nobody does.
//!
//! Logs are written here, by the layout that the kernel's documentation and header give; by QEMU, in its
//! driver `blklogwrites`; and by the kernel itself, where it has the dm-log-writes target and this is root.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::common::{Place, Random, have_qemu};

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// A log of the kernel's layout, in sectors of so many bytes.
struct Log {
    bytes: Vec<u8>,
    sector_bytes: usize,
    entries: u64,
}

impl Log {
    fn new(sector_bytes: usize) -> Log {
        Log { bytes: vec![0; sector_bytes], sector_bytes, entries: 0 }
    }

    fn entry(mut self, sector: u64, sectors: u64, flags: u64, text: &str) -> Log {
        let head = [sector, sectors, flags, text.len() as u64];
        self.bytes.extend(head.map(u64::to_le_bytes).concat());
        self.bytes.extend(text.as_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(self.sector_bytes), 0);
        self.entries += 1;
        self
    }

    /// A sector of text.
    fn write(self, sector: u64, flags: u64, text: &str) -> Log {
        let mut log = self.entry(sector, 1, flags, "");
        log.bytes.extend(text.as_bytes());
        log.bytes.resize(log.bytes.len().next_multiple_of(log.sector_bytes), 0);
        log
    }

    fn flush(self) -> Log {
        self.entry(0, 0, FLUSH, "")
    }

    fn mark(self, text: &str) -> Log {
        self.entry(0, 0, MARK, text)
    }

    fn discard(self, sector: u64, sectors: u64) -> Log {
        self.entry(sector, sectors, DISCARD, "")
    }

    fn finish(mut self) -> Vec<u8> {
        let head = [0x6a_7366_7773_6872, 1, self.entries].map(u64::to_le_bytes).concat();
        self.bytes[..24].copy_from_slice(&head);
        self.bytes[24..28].copy_from_slice(&(self.sector_bytes as u32).to_le_bytes());
        self.bytes
    }
}

/// A program's check, in `sh`: sector 0 names the sector that holds the data; that one must hold some.
/// It says what it finds.
const CHECK: &str = r#"
at=$(dd if="$1" bs=512 count=1 2>/dev/null | tr -d '\0')
[ -z "$at" ] && exit 0
text=$(dd if="$1" bs=512 skip="$at" count=1 2>/dev/null | tr -d '\0')
case "$text" in
    data*) exit 0 ;;
esac
echo "sector $at is named and holds '$text'"
exit 4
"#;

fn place(log: Vec<u8>) -> Place {
    let place = Place::new();
    fs::write(place.path("log"), log).expect("it is written");
    fs::write(place.path("check.sh"), CHECK).expect("it is written");
    place
}

const IMPORT: &str = "cowbell sim import log --check 'sh check.sh %'";

/// What is printed as JSON; and the exit code.
fn json(place: &Place, line: &str) -> (Value, Option<i32>) {
    let out = place.ours(&format!("{line} --json"));
    let said = String::from_utf8_lossy(&out.stderr);
    let json = serde_json::from_slice(&out.stdout);
    (json.unwrap_or_else(|error| panic!("{line}: {error}: {said}")), out.status.code())
}

#[test]
fn a_pointer_that_is_written_before_its_data_is_flushed_is_found() {
    for sector_bytes in [512, 4096] {
        // In sectors of the log.
        let data = (sector_bytes / 512 * 5).to_string();
        let log = Log::new(sector_bytes).mark("made").write(5, 0, "data 1").mark("wrote data");
        let place = place(log.write(0, 0, &data).flush().finish());
        let out = place.ours(&format!("{IMPORT} --keep bad"));
        let said = String::from_utf8_lossy(&out.stdout);
        assert_eq!(out.status.code(), Some(1), "{said}");
        let per = sector_bytes / 512;
        for line in [
            "wrong: a crash at entry 3, after the mark 'wrote data'",
            &format!("  entry 1: write of sectors {}+{per}: lost", 5 * per),
            "  the command's exit code: 4",
            &format!("  | sector {data} is named and holds ''"),
        ] {
            assert!(said.lines().any(|said| said == line), "{line}: {said}");
        }
        let bad = fs::read(place.path("bad")).expect("it was kept");
        assert_eq!(bad.len(), 6 * sector_bytes);
        assert!(bad.starts_with(data.as_bytes()));
        assert!(bad[512..].iter().all(|&byte| byte == 0));
        assert!(!place.ours("sh check.sh bad").status.success(), "it is the image that was found");

        let (told, code) = json(&place, IMPORT);
        assert_eq!((code, &told["good"]), (Some(1), &Value::Bool(false)));
        let failure = &told["failures"][0];
        assert_eq!((&failure["entry"], &failure["mark"]), (&3.into(), &"wrote data".into()));
        assert_eq!(failure["code"], 4);
        let [first, second] = [0, 1].map(|i| &failure["unflushed"][i]);
        assert_eq!((&first["there"], &first["counted"]), (&0.into(), &1.into()), "{told}");
        assert_eq!((&second["there"], &second["counted"]), (&1.into(), &1.into()), "{told}");
        // The same code may mean that all is well.
        assert_eq!(json(&place, &format!("{IMPORT} --ok 0,4")).1, Some(0));
    }
}

#[test]
fn who_flushes_or_writes_through_is_let_alone() {
    let flushed = Log::new(512).write(5, 0, "data 1").flush().write(0, 0, "5").finish();
    // The flush goes before the write that it comes with.
    let at_once = Log::new(512).write(5, 0, "data 1").write(0, FLUSH | FUA, "5").finish();
    let through = Log::new(512).write(5, FUA, "data 1").write(0, 0, "5").finish();
    for log in [flushed, at_once, through] {
        let place = place(log);
        for every in ["write", "flush"] {
            let (told, code) = json(&place, &format!("{IMPORT} --every {every}"));
            assert_eq!((code, &told["wrong"]), (Some(0), &0.into()), "{told}");
            assert_eq!(told["images"], 3, "nothing, the data, both: {told}");
        }
    }
    // A pointer that is written through passes data that waits.
    let place = place(Log::new(512).write(5, 0, "data 1").write(0, FUA, "5").finish());
    assert_eq!(json(&place, &format!("{IMPORT} --every flush")).1, Some(1));
}

#[test]
fn what_was_there_before_and_discards_count() {
    let log = Log::new(512).discard(5, 3).write(0, 0, "9").finish();
    let place = place(log);
    let mut base = vec![0; 20 * 512];
    base[..1].copy_from_slice(b"5");
    base[5 * 512..][..6].copy_from_slice(b"data 1");
    base[9 * 512..][..6].copy_from_slice(b"data 2");
    base[19 * 512] = 1;
    fs::write(place.path("base"), &base).expect("it is written");
    let line = format!("{IMPORT} --base base");
    let (told, code) = json(&place, &line);
    assert_eq!((code, &told["wrong"], &told["images"]), (Some(1), &1.into(), &4.into()), "{told}");
    let gone = &told["failures"][0]["unflushed"][0];
    assert_eq!((&gone["discard"], &gone["sectors"]), (&Value::Bool(true), &3.into()));
    let _ = place.ours(&format!("{line} --keep bad"));
    base[5 * 512..][..6].fill(0);
    assert!(fs::read(place.path("bad")).expect("it was kept") == base, "the rest is as it was");
    // The other way round, with a flush between.
    let sound = Log::new(512).write(0, 0, "9").flush().discard(5, 3).finish();
    fs::write(place.path("log"), sound).expect("it is written");
    assert_eq!(json(&place, &line).1, Some(0));
}

#[test]
fn each_image_is_a_new_file_of_the_name_and_size_asked_for() {
    let place = place(Log::new(512).write(5, 0, "data 1").write(7, 0, "data 2").finish());
    // A check that changes the image must not change the next one.
    let check = "case % in */disk.img) ;; *) exit 9 ;; esac; \
        [ $(stat -c %%s %) = 65536 ] && ! grep -q spoilt % && echo spoilt >> %";
    let line = format!("cowbell sim import log --file disk.img --size 64k --check '{check}'");
    let (told, code) = json(&place, &line);
    assert_eq!((code, &told["images"]), (Some(0), &4.into()), "{told}");
    // A folder whose name means something to a shell.
    let folder = place.path("it's $(here) \"now\"");
    fs::create_dir(&folder).expect("a folder");
    let said = place.ok(
        "TMPDIR=\"$PWD/it's \\$(here) \\\"now\\\"\" cowbell sim import log --check 'test -s %'",
    );
    assert!(said.contains("4 crash images, 0 wrong"), "{said}");
    assert_eq!(fs::read_dir(&folder).expect("it is there").count(), 0, "nothing is left behind");
}

#[test]
fn a_limit_is_told() {
    let mut log = Log::new(512);
    for sector in 0..16 {
        log = log.write(sector, 0, "x");
    }
    let place = place(log.finish());
    let out = place.ok("cowbell sim import log --check 'test -s %' --images 50");
    let count = out.split(", ").find_map(|part| part.strip_suffix(" crash images"));
    assert!(count.and_then(|count| count.parse::<u64>().ok()).is_some_and(|n| n <= 50), "{out}");
    assert!(out.contains("cut off: of "), "{out}");
    assert!(out.contains("a selection of their images"), "{out}");
}

#[test]
fn what_is_no_verdict_is_an_error() {
    let sound = Log::new(512).write(5, 0, "data 1").finish();
    let place = place(sound.clone());
    fs::write(place.path("cut"), &sound[..sound.len() - 1]).expect("it is written");
    fs::write(place.path("junk"), "this is no log of anything").expect("it is written");
    for (line, what) in [
        ("log --check 'no-such-program %'", "cannot be run"),
        ("log --check './log %'", "cannot be run"),
        ("log --check 'kill -9 $$; : %'", "killed by signal 9"),
        ("log --check 'sh -c \"kill -11 \\$\\$\"; exit $?; %'", "killed by signal 11"),
        ("log --check 'true'", "has no %"),
        ("log --check 'true %' --file a/b", "is not the name of a file"),
        ("log --check 'true %' --size 512", "behind the device's end"),
        ("log --check 'true %' --keep log", "it would be overwritten"),
        ("cut --check 'true %'", "entry 0: the log ends within its data"),
        ("junk --check 'true %'", "too short"),
        ("check.sh --check 'true %'", "no log of dm-log-writes"),
        ("missing --check 'true %'", "No such file"),
    ] {
        let out = place.ours(&format!("cowbell sim import {line}"));
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{line}: {said}");
        assert!(said.starts_with("cowbell: sim: ") && said.contains(what), "{line}: {said}");
        assert_eq!(said.lines().count(), 1, "{line}: {said}");
        assert!(out.stdout.is_empty());
    }
    assert_eq!(fs::read(place.path("log")).expect("it is there"), sound);
}

#[test]
fn logs_that_were_changed_end_in_a_verdict_or_an_error() {
    let log = Log::new(512).mark("m").write(5, 0, "data 1").flush().discard(1, 2);
    let sound = log.write(0, FUA, "5").finish();
    let place = place(sound.clone());
    let mut random = Random(11);
    for _ in 0..100 {
        let mut log = sound.clone();
        for _ in 0..=random.below(3) {
            let sector = random.below(sound.len() as u64 / 512) as usize;
            log[sector * 512 + random.below(32) as usize] = random.next() as u8;
        }
        log.truncate(log.len() - random.below(8) as usize * 64);
        fs::write(place.path("log"), log).expect("it is written");
        let line = "cowbell sim import log --check ': %' --images 5 --size 1M";
        let out = place.ours(line);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(matches!(out.status.code(), Some(0 | 2)), "{:?}: {said}", out.status);
    }
}

#[test]
fn qemu_writes_such_logs_and_its_qcow2_survives_every_crash() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu("qemu-img create -q -f qcow2 -o cluster_size=4k q.qcow2 256k");
    place.qemu("cp q.qcow2 base && truncate -s 16M log");
    place.qemu(
        "qemu-io -c 'write -P 5 0 4k' -c 'write 64k 3k' -c flush -c 'discard 0 64k' \
         -c 'write -f 8k 512' --image-opts driver=qcow2,discard=unmap,\
         file.driver=blklogwrites,file.file.driver=file,file.file.filename=q.qcow2,\
         file.log.driver=file,file.log.filename=log",
    );
    let line = "cowbell sim import log --base base --images 300";
    let check = "--check 'cowbell check -f qcow2 %'";
    // A leak is no corruption.
    let (told, code) = json(&place, &format!("{line} --ok 0,3 {check}"));
    assert_eq!(code, Some(0), "{told}");
    assert!(told["images"].as_u64() > Some(50) && told["writes"].as_u64() > Some(5), "{told}");
    // But it is there to be found.
    let (told, code) = json(&place, &format!("{line} {check}"));
    assert_eq!((code, &told["failures"][0]["code"]), (Some(1), &3.into()), "{told}");
    // The whole log gives the image that QEMU left.
    let last = "cmp -s % q.qcow2";
    let (told, _) = json(&place, &format!("{line} --every flush --check '! {last}'"));
    assert_eq!(told["wrong"], 1, "{told}");
}

/// Runs a line of shell as it is; what it said if it failed.
fn sh(line: &str) -> Result<String, String> {
    let out = Command::new("sh").args(["-c", line]).output().map_err(|error| error.to_string())?;
    match out.status.success() {
        true => Ok(String::from_utf8_lossy(&out.stdout).trim().into()),
        false => Err(format!("{line}: {}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

/// What is undone at the end.
struct Undone(String);

impl Drop for Undone {
    fn drop(&mut self) {
        if let Err(why) = sh(&self.0) {
            eprintln!("{why}");
        }
    }
}

#[test]
fn the_kernel_writes_such_logs() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let device = |name: &str, size: &str| {
        let path = place.path(name).display().to_string();
        let made = sh(&format!("truncate -s {size} {path} && losetup -f --show {path}"))?;
        Ok::<_, String>((Undone(format!("losetup -d {made}")), made))
    };
    let name = format!("cowbell-log-{}", std::process::id());
    let made = sh("dmsetup targets | grep -q log-writes").and_then(|_| {
        let (disk, log) = (device("disk", "4M")?, device("log", "64M")?);
        let table = format!("0 8192 log-writes {} {}", disk.1, log.1);
        sh(&format!("dmsetup create {name} --table '{table}'"))?;
        Ok((Undone(format!("dmsetup remove --retry {name}")), disk.0, log.0))
    });
    let made = match made {
        Ok(made) => made,
        Err(why) => return eprintln!("SKIPPED: no dm-log-writes here: {why}"),
    };
    place.qemu("qemu-img create -q -f qcow2 -o cluster_size=4k new 256k");
    let device = format!("/dev/mapper/{name}");
    place.qemu(&format!("qemu-img create -q -f qcow2 -o cluster_size=4k {device} 256k"));
    place.qemu(&format!("dmsetup message {name} 0 mark created"));
    let io = "-t none -c 'write -P 5 0 4k' -c flush -c 'write 64k 3k' -c 'write -f 8k 512'";
    place.qemu(&format!("qemu-io -f qcow2 {io} {device}"));
    drop(made);
    // Until it was created it is no image yet.
    let check = "cowbell check -f qcow2 % || [ $(dd if=% bs=512 count=1 2>/dev/null | tr -d \"\\0\" | wc -c) = 0 ]";
    let (told, code) =
        json(&place, &format!("cowbell sim import log --size 4M --images 300 --check '{check}'"));
    assert!(told["writes"].as_u64() > Some(5), "{told}");
    let after = |failure: &&Value| failure["mark"] == "created" && failure["code"] != 3;
    let failures = told["failures"].as_array().expect("a list");
    assert_eq!(failures.iter().find(after), None, "{code:?}");
}
