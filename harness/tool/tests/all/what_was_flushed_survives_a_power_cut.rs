//! The power fails while the command writes and flushes: what a flush had acknowledged is there
//! afterwards, and the image is not corrupt.
//!
//! The file system is on a loop device, whose own file is on btrfs. A clone of that file holds what
//! the device had been sent at one moment, and nothing of what was in the page cache or not yet in
//! the journal. The file system is then put on the clone, and life goes on there. What the device
//! had been sent but not been told to flush is in the clone too: that it is lost, in any part, is
//! tried by the simulator.
//!
//! Needs root, loop devices, btrfs. `COWBELL_CUTS` is how often each image is cut (2 if not said),
//! `COWBELL_SEED` a number for other moments.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::common::lives::{SIZE, live, look};
use crate::common::{Place, Random};
use tempfile::TempDir;

/// Runs a program; what it said if it failed.
fn run(line: &str, paths: &[&Path]) -> Result<(), String> {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().expect("a program"));
    let out = command.args(words).args(paths).output().map_err(|e| format!("{line}: {e}"))?;
    match out.status.success() {
        true => Ok(()),
        false => Err(format!("{line}: {}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

/// A file system in a file.
struct Mounted(PathBuf);

impl Mounted {
    fn new(file: &Path, at: &Path) -> Result<Mounted, String> {
        std::fs::create_dir_all(at).map_err(|error| error.to_string())?;
        run("mount -o loop", &[file, at])?;
        Ok(Mounted(at.into()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The kernel may hold a file of it a moment longer than the process that had it open.
        for left in (0..100).rev() {
            match run("umount", &[&self.0]) {
                Ok(()) => return,
                Err(why) if left == 0 => eprintln!("{why}"),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

fn make(file: &Path, bytes: u64, mkfs: &str) -> Result<(), String> {
    let new = std::fs::File::create(file).and_then(|file| file.set_len(bytes));
    new.map_err(|error| error.to_string())?;
    run(mkfs, &[file])
}

fn number(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().expect("a number"))
}

/// A disk that can be cut off, with a file system.
struct Disk {
    // Unmounted first.
    inner: Option<Mounted>,
    _outer: Mounted,
    dir: TempDir,
}

impl Disk {
    /// Or what is missing here.
    fn new(mkfs: &str) -> Result<Disk, String> {
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        make(&dir.path().join("outer.img"), 1 << 30, "mkfs.btrfs -q")?;
        let outer = Mounted::new(&dir.path().join("outer.img"), &dir.path().join("outer"))?;
        let mut disk = Disk { inner: None, _outer: outer, dir };
        make(&disk.path("outer/disk"), 320 << 20, mkfs)?;
        disk.mount()?;
        Ok(disk)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn mount(&mut self) -> Result<(), String> {
        self.inner = Some(Mounted::new(&self.path("outer/disk"), &self.path("inner"))?);
        Ok(())
    }

    /// What the disk holds now is what it will hold after the power is back.
    fn cut(&self) {
        let (disk, cut) = (self.path("outer/disk"), self.path("outer/cut"));
        run("cp --reflink=always", &[&disk, &cut]).expect("btrfs clones");
    }

    /// The power is back.
    fn start(&mut self) {
        self.inner = None;
        std::fs::rename(self.path("outer/cut"), self.path("outer/disk")).expect("it is there");
        self.mount().expect("the file system is sound");
    }
}

fn cuts(fs: &str, mkfs: &str) {
    let mut disk = match Disk::new(mkfs) {
        Ok(disk) => disk,
        Err(why) => {
            eprintln!("SKIPPED: no power cuts on {fs} here: {why}");
            return;
        }
    };
    let count = number("COWBELL_CUTS").unwrap_or(2);
    let mut random = Random(number("COWBELL_SEED").unwrap_or(1));
    let mut rounds = 0;
    for format in ["raw", "qed", "qcow2", "vmdk", "vdi"] {
        for mode in [&["-n", "-i", "native"][..], &["-t", "writeback"]] {
            let place = Place::new_in(&disk.path("inner"));
            place.ok(&format!("cowbell create -q -f {format} image {SIZE}"));
            run("sync -f", &[place.dir.path()]).expect("it syncs");
            for life in 0..count {
                let wanted = random.below(8);
                let after = Duration::from_micros(random.below(10_000));
                live(&place, format, mode, life, (wanted, after), || disk.cut());
                disk.start();
                look(&place, format, life, wanted);
                rounds += wanted;
            }
        }
    }
    assert!(count == 0 || rounds > 0, "something was flushed");
    println!("{fs}: {} cuts, {rounds} rounds were flushed", count * 8);
}

#[test]
#[ignore = "mounts file systems"]
fn on_ext4() {
    cuts("ext4", "mkfs.ext4 -q -F");
}

#[test]
#[ignore = "mounts file systems"]
fn on_xfs() {
    cuts("xfs", "mkfs.xfs -q");
}

#[test]
#[ignore = "mounts file systems"]
fn on_btrfs() {
    cuts("btrfs", "mkfs.btrfs -q");
}
