//! Programs in C are compiled, linked with the library as `cargo test` has built it, and run: with
//! the sanitizer of addresses where this machine's compiler has it.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use tempfile::TempDir;

/// What a program may count on: 16 MiB and a bit, which ends amid a block.
const SIZE: usize = (16 << 20) + 4608;
const BLOCK: usize = 64 << 10;

fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

/// Something is not here. Loud; in CI a failure.
fn skipped(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}");
    let _ = std::io::stderr().write_all(format!("SKIPPED: {why}\n").as_bytes());
}

fn have_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output();
    let found = found.is_ok_and(|out| out.status.success());
    if !found {
        skipped("qemu-img is not installed, no image can be made and looked at by another");
    }
    found
}

fn text(out: &Output) -> String {
    [&out.stdout, &out.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}

fn run(program: impl AsRef<OsStr>, folder: &Path, args: &[&str]) -> String {
    let mut command = Command::new(&program);
    let out = command.args(args).current_dir(folder).output().expect("it starts");
    assert!(out.status.success(), "{command:?}: {:?}\n{}", out.status, text(&out));
    text(&out)
}

fn here(path: &str) -> String {
    format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))
}

/// Cargo puts what it builds for a test beside it.
fn library(extension: &str) -> PathBuf {
    let exe = std::env::current_exe().expect("a path");
    let path = exe.with_file_name("libcowbell_capi").with_extension(extension);
    assert!(path.exists(), "cargo has built no {}", path.display());
    path
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    Static,
    Shared,
    Sanitized,
}

/// Compiles `source` into `folder`.
fn compiled(source: &str, folder: &Path, how: How) -> PathBuf {
    let program = folder.join("program");
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-I", &here("include")]);
    cc.args([&here(source), "-o"]).arg(&program);
    match how {
        How::Static => cc.arg(library("a")),
        How::Sanitized => cc.arg("-fsanitize=address").arg(library("a")),
        How::Shared => {
            let library = library("so");
            let folder = library.parent().expect("it is in a folder");
            cc.arg(&library).arg(format!("-Wl,-rpath,{}", folder.display()))
        }
    };
    let out = cc.args(["-lpthread", "-lm", "-ldl"]).output().expect("cc starts");
    assert!(out.status.success(), "{cc:?}\n{}", text(&out));
    program
}

/// Has the compiler the sanitizer?
fn is_sanitizer_here() -> bool {
    static IS_HERE: OnceLock<bool> = OnceLock::new();
    *IS_HERE.get_or_init(|| {
        let folder = folder();
        std::fs::write(folder.path().join("a.c"), "int main(void) { return 0; }").expect("written");
        let mut cc = Command::new("cc");
        let built = cc.args(["-fsanitize=address", "a.c"]).current_dir(folder.path()).output();
        let is_here = built.is_ok_and(|out| out.status.success())
            && Command::new(folder.path().join("a.out")).status().is_ok_and(|s| s.success());
        if !is_here {
            skipped("cc has no -fsanitize=address, nothing watches the memory");
        }
        is_here
    })
}

/// With the sanitizer if there is one.
fn watched() -> How {
    if is_sanitizer_here() { How::Sanitized } else { How::Static }
}

fn pattern() -> Vec<u8> {
    let byte = |at: usize| at.wrapping_mul(31) + at / 4099 + at / BLOCK + 1;
    (0..SIZE).map(|at| byte(at) as u8).collect()
}

/// Runs the example on a new image, and looks at what is on it by QEMU's means.
fn serve(how: How, format: &str, backend: &str, cache: &str) {
    if !have_qemu() {
        return;
    }
    let folder = folder();
    let path = folder.path();
    let program = compiled("examples/epoll.c", path, how);
    run("qemu-img", path, &["create", "-q", "-f", format, "disk", &SIZE.to_string()]);
    let mut command = Command::new(&program);
    let out = command.args([format, "disk", backend, cache]).current_dir(path).output();
    let out = out.expect("it starts");
    let said = text(&out);
    let is_missing = backend == "io_uring" && said.starts_with("io_uring: ");
    if is_missing {
        // Not of the machine's programs, but of its kernel: no failure in CI.
        let _ = std::io::stderr().write_all(format!("SKIPPED: {said}").as_bytes());
        return;
    }
    assert!(out.status.success(), "{:?}\n{said}", out.status);
    let requests = 2 * SIZE.div_ceil(BLOCK) + 4;
    let wanted = format!("{format}: {SIZE} bytes in {requests} requests, read back");
    assert!(said.starts_with(&wanted) && said.contains("byte 0 is data"), "{said}");
    assert!(said.contains("the timer ticked meanwhile"), "{said}");
    if format != "raw" {
        run("qemu-img", path, &["check", "-q", "-f", format, "disk"]);
    }
    run("qemu-img", path, &["convert", "-f", format, "-O", "raw", "disk", "flat"]);
    let (found, written) = (std::fs::read(path.join("flat")).expect("it reads"), pattern());
    assert_eq!(found.len(), SIZE);
    let quarter = SIZE / 4 / 512 * 512;
    let (half, last) = (2 * quarter, 3 * quarter);
    assert!(found[..half] == written[..half], "what was written is not there");
    assert!(found[half..last].iter().all(|&byte| byte == 0), "zeros are not");
    let is_kept = |at: usize| found[at] == written[at] && format == "raw";
    // What a discard cuts of a cluster is kept.
    let (from, to) = (last.next_multiple_of(BLOCK), SIZE / BLOCK * BLOCK);
    assert!((from..to).all(|at| found[at] == 0 || is_kept(at)), "what was discarded is neither");
}

#[test]
fn the_example_serves_a_raw_image() {
    serve(watched(), "raw", "native", "direct");
}

#[test]
fn the_example_serves_a_qcow2_image() {
    serve(watched(), "qcow2", "native", "buffered");
}

#[test]
fn the_example_serves_over_threads() {
    serve(How::Static, "qcow2", "threads", "buffered");
}

#[test]
fn the_example_serves_over_io_uring_with_the_shared_library() {
    serve(How::Shared, "qcow2", "io_uring", "buffered");
}

#[test]
fn hostile_calls_are_answered() {
    if !have_qemu() {
        return;
    }
    let folder = folder();
    let path = folder.path();
    run("qemu-img", path, &["create", "-q", "-f", "raw", "raw.img", "1M"]);
    run("qemu-img", path, &["create", "-q", "-f", "qcow2", "image.qcow2", "16M"]);
    let overlay = ["-f", "qcow2", "-b", "image.qcow2", "-F", "qcow2", "overlay.qcow2"];
    run("qemu-img", path, &[&["create", "-q"], &overlay[..]].concat());
    let program = compiled("tests/hostile.c", path, watched());
    let said = run(&program, path, &["."]);
    assert!(said.contains(" checks, 0 failures\n"), "{said}");
    if let Some(skipped) = said.lines().find(|line| line.starts_with("SKIPPED")) {
        let _ = std::io::stderr().write_all(format!("{skipped}\n").as_bytes());
    }
    run("qemu-img", path, &["check", "-q", "-f", "qcow2", "image.qcow2"]);
}

#[test]
fn disks_are_paused_and_slowed_down() {
    if !have_qemu() {
        return;
    }
    let folder = folder();
    let path = folder.path();
    run("qemu-img", path, &["create", "-q", "-f", "qcow2", "base.qcow2", "16M"]);
    let overlay = ["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "disk.qcow2"];
    run("qemu-img", path, &[&["create", "-q"], &overlay[..]].concat());
    run("qemu-img", path, &["create", "-q", "-f", "raw", "other.img", "16M"]);
    let program = compiled("tests/control.c", path, watched());
    let said = run(&program, path, &["."]);
    assert!(said.contains(" checks, 0 failures\n"), "{said}");
    run("qemu-img", path, &["check", "-q", "-f", "qcow2", "disk.qcow2"]);
}

#[test]
fn images_are_opened_by_descriptor() {
    if !have_qemu() {
        return;
    }
    let folder = folder();
    let path = folder.path();
    std::fs::write(path.join("base.img"), vec![7; 1 << 20]).expect("written");
    std::fs::create_dir(path.join("a")).expect("made");
    let overlay = ["-f", "qcow2", "-b", "../base.img", "-F", "raw", "a/disk.qcow2"];
    run("qemu-img", path, &[&["create", "-q"], &overlay[..]].concat());
    let program = compiled("tests/given.c", path, watched());
    let said = run(&program, path, &["."]);
    assert!(said.contains(" checks, 0 failures\n"), "{said}");
    // It has moved them to where their names do not lead.
    std::fs::rename(path.join("moved.img"), path.join("base.img")).expect("it is there");
    std::fs::rename(path.join("moved.qcow2"), path.join("a/disk.qcow2")).expect("it is there");
    run("qemu-img", path, &["check", "-q", "-f", "qcow2", "a/disk.qcow2"]);
    run("qemu-img", path, &["convert", "-f", "qcow2", "-O", "raw", "a/disk.qcow2", "flat"]);
    let flat = std::fs::read(path.join("flat")).expect("it reads");
    assert!(flat[..4096] == [9; 4096] && flat[4096..] == vec![7; (1 << 20) - 4096]);
}

#[test]
fn the_header_is_cpp_too() {
    if !Command::new("c++").arg("--version").output().is_ok_and(|out| out.status.success()) {
        return skipped("there is no c++, nothing compiles the header as C++");
    }
    let program = "#include \"cowbell.h\"\nint main() { return cowbell_run(nullptr); }\n";
    let folder = folder();
    let source = folder.path().join("a.cpp");
    std::fs::write(&source, program).expect("written");
    let source = source.to_str().expect("a plain name");
    for standard in ["-std=c++11", "-std=c++20"] {
        let args = [standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I", &here("include")];
        run("c++", folder.path(), &[&args[..], &["-x", "c++", "-fsyntax-only", source]].concat());
    }
}
