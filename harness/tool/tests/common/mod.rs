//! Running the command, under its own name and as QEMU's programs; and QEMU's, if they are here.

pub mod lives;
pub mod stream;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

pub const COWBELL: &str = env!("CARGO_BIN_EXE_cowbell");

/// A folder on a disk (not in memory: O_DIRECT has to work), with links to the command in `bin`.
pub struct Place {
    pub dir: TempDir,
}

impl Place {
    pub fn new() -> Place {
        let elsewhere = std::env::var_os("COWBELL_TEST_DIR").map(PathBuf::from);
        Place::new_in(&elsewhere.unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into()))
    }

    pub fn new_in(parent: &Path) -> Place {
        let dir = TempDir::new_in(parent).expect("a folder");
        std::fs::create_dir(dir.path().join("bin")).expect("a folder");
        for name in ["qemu-img", "qemu-io", "cowbell"] {
            symlink(COWBELL, dir.path().join("bin").join(name)).expect("a link");
        }
        Place { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `line` in a shell where the names mean the command.
    pub fn ours(&self, line: &str) -> Output {
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}", self.dir.path().join("bin").display());
        self.shell(line, &path)
    }

    /// Runs `line` in a shell where the names mean QEMU's programs.
    pub fn theirs(&self, line: &str) -> Output {
        self.shell(line, &std::env::var("PATH").unwrap_or_default())
    }

    fn shell(&self, line: &str, path: &str) -> Output {
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).current_dir(self.dir.path()).env("PATH", path);
        shell.output().expect("a shell")
    }

    /// As [`Place::ours`]; must succeed. Its standard output.
    pub fn ok(&self, line: &str) -> String {
        succeeded(line, &self.ours(line))
    }

    /// As [`Place::theirs`]; must succeed. Its standard output.
    pub fn qemu(&self, line: &str) -> String {
        succeeded(line, &self.theirs(line))
    }
}

fn succeeded(line: &str, out: &Output) -> String {
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{line}: {:?}\n{stdout}{stderr}", out.status);
    stdout
}

/// Is QEMU here? Says so loudly if not; in CI its absence is a failure.
pub fn have_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output();
    if found.is_ok_and(|out| out.status.success()) {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "qemu-img is missing");
    eprintln!("SKIPPED: qemu-img is not installed, nothing is compared with it");
    false
}

/// Can system calls be looked at? Says so loudly if not: some containers forbid it, in CI too.
pub fn have_strace() -> bool {
    let works = Command::new("strace").args(["-f", "-qq", "-o", "/dev/null", "true"]).output();
    let works = works.is_ok_and(|out| out.status.success());
    if !works {
        eprintln!("SKIPPED: strace is not installed or not allowed, no system call is looked at");
    }
    works
}

/// A browser that needs no screen, if there is one. Says so loudly if not.
pub fn browser() -> Option<&'static str> {
    let works = |name: &&str| {
        let out = Command::new(name).arg("--version").output();
        out.is_ok_and(|out| out.status.success())
    };
    let found = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(works);
    if found.is_none() {
        eprintln!("SKIPPED: chromium is not installed, no page is looked at");
    }
    found
}

pub fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("it is there")
}

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        bytes.chunks_mut(8).for_each(|some| {
            some.copy_from_slice(&self.next().to_le_bytes()[..some.len()]);
        });
    }
}
