//! Backing files: only those the caller allows, only plain paths, read-only, no loops.

use std::path::{Path, PathBuf};

use crate::common::{DISK, MemFile, MemHost, small_qed};
use cowbell_engine::store::Store;
use cowbell_formats::chain::{Chain, DEPTH_MAX, open_named};
use cowbell_formats::create::{CreateOptions, create};
use cowbell_formats::info::info;
use cowbell_formats::name::Backing;
use cowbell_formats::{Error, Format, Host, Name, OpenOptions, Policy, open};

fn with(host: &MemHost, path: &str, policy: Policy) -> Result<Chain<MemFile>, Error> {
    let options = OpenOptions { backing: policy, ..Default::default() };
    open(host, Path::new(path), &options)
}

fn inner(error: Error) -> Error {
    match error {
        Error::Backing(inner) => *inner,
        other => panic!("not about a backing file: {other}"),
    }
}

#[test]
fn each_policy_allows_what_it_says() {
    let host = MemHost::default();
    host.put("/d/base", &MemFile::new(&[1; 512]));
    host.put("/d/sub/base", &MemFile::new(&[2; 512]));
    host.put("/e/base", &MemFile::new(&[3; 512]));
    let allowed = |name: &str, policy: &Policy| {
        host.put("/d/top", &small_qed(1 << 20, Some((name, true))));
        match with(&host, "/d/top", policy.clone()) {
            Ok(chain) => {
                assert_eq!(chain.layers.len(), 2);
                assert!(!chain.layers[1].file.is_writable());
                true
            }
            Err(error) => {
                assert!(error.to_string().contains("is not opened"), "{error}");
                assert!(matches!(inner(error), Error::Policy(_)));
                false
            }
        }
    };
    let names = ["base", "./base", "/d/base", "sub/../base", "sub/base", "../e/base", "/e/base"];
    let verdicts = |policy: Policy| names.map(|name| allowed(name, &policy));
    let (t, f) = (true, false);
    assert_eq!(verdicts(Policy::Refuse), [f; 7]);
    assert_eq!(verdicts(Policy::Any), [t; 7]);
    assert_eq!(verdicts(Policy::SameDirectory), [t, t, t, t, f, f, f]);
    assert_eq!(verdicts(Policy::Directories(vec!["/d".into()])), [t, t, t, t, t, f, f]);
    assert_eq!(verdicts(Policy::Directories(vec!["/d/sub".into()])), [f, f, f, f, t, f, f]);
    assert_eq!(verdicts(Policy::Directories(vec!["/e".into(), "/d/s".into()]))[5..], [t, t]);
    assert_eq!(verdicts(Policy::Directories(vec![])), [f; 7]);
}

#[test]
fn a_link_is_judged_by_where_it_leads() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let other = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(other.path().join("secret"), [7; 512]).expect("written");
    let link = dir.path().join("base");
    std::os::unix::fs::symlink(other.path().join("secret"), link).expect("linked");
    let top = dir.path().join("top");
    std::fs::write(&top, small_qed(1 << 20, Some(("base", true))).bytes()).expect("written");
    let mut options = OpenOptions { backing: Policy::SameDirectory, ..Default::default() };
    let error = open(&DISK, &top, &options).expect_err("it leads out of the folder");
    assert!(matches!(inner(error), Error::Policy(_)));
    options.backing = Policy::Any;
    open(&DISK, &top, &options).expect("any means any");
}

#[test]
fn names_that_say_more_than_a_path_want_trust() {
    let host = MemHost::default();
    host.put("d/base", &MemFile::new(&[1; 512]));
    let json = "json:{\"driver\":\"raw\",\"file.filename\":\"d/base\"}";
    let top = |name: &str, is_raw| host.put("d/top", &small_qed(1 << 20, Some((name, is_raw))));
    for name in [json, "file:d/base", "nbd:host:1", "nbd://h/x", "fat:rw:/", "json:{"] {
        top(name, false);
        for policy in [Policy::SameDirectory, Policy::Directories(vec!["d".into()])] {
            let error = with(&host, "d/top", policy).expect_err("refused");
            assert!(error.to_string().contains(name), "{error}");
            assert!(matches!(inner(error), Error::Policy(_)));
        }
    }
    for (name, probed) in [(json, false), ("file:d/base", true)] {
        top(name, false);
        let chain = with(&host, "d/top", Policy::Any).expect(name);
        // Not in the folder of the image: such names start where the program is.
        assert_eq!(chain.layers[1].path, Path::new("d/base"));
        assert_eq!((chain.layers[1].format, chain.layers[1].probed), (Format::Raw, probed));
    }
    let nested = "json:{\"file.filename\":\"d/base\",\"backing\":null}";
    for name in ["fat:rw:/", nested] {
        top(name, false);
        let error = with(&host, "d/top", Policy::Any).expect_err("refused");
        assert!(matches!(inner(error), Error::Unsupported(_)));
    }
    // An address is the host's to follow, and a disk's host follows none.
    for name in ["nbd:host:1", "nbd://h/x"] {
        top(name, false);
        let error = with(&host, "d/top", Policy::Any).expect_err("there is no such disk");
        assert!(matches!(inner(error), Error::Open { .. }));
        let error = DISK.open(Path::new(name), false).expect_err("not followed");
        assert_eq!(error.kind(), std::io::ErrorKind::Unsupported);
        assert!(DISK.create_new(Path::new(name)).is_err());
    }
    host.put("./a:b", &MemFile::new(&[]));
    host.put("top", &small_qed(1 << 20, Some(("./a:b", true))));
    with(&host, "top", Policy::Any).expect("a path with a slash in front of the colon");
}

#[test]
fn what_the_caller_names_as_backing_is_not_asked_for() {
    let host = MemHost::default();
    host.put("/d/top", &small_qed(1 << 20, Some(("wrong", true))));
    host.put("/e/base", &small_qed(1 << 20, Some(("below", true))));
    let open = |backing| {
        let name = Name { backing, ..Name::plain("/d/top", None) };
        open_named(&host, &name, &OpenOptions::default()).map(|chain| chain.layers.len())
    };
    assert_eq!(open(Backing::Nothing), Ok(1));
    let mut base = Name { backing: Backing::Nothing, ..Name::plain("/e/base", None) };
    assert_eq!(open(Backing::Named(Box::new(base.clone()))), Ok(2));
    // But what that one names is.
    base.backing = Backing::AsImageSays;
    let error = open(Backing::Named(Box::new(base))).expect_err("not allowed");
    assert!(matches!(inner(error), Error::Policy(_)));
    let itself = Box::new(Name::plain("/d/top", None));
    let error = open(Backing::Named(itself)).expect_err("a loop");
    assert!(matches!(inner(error), Error::BackingLoop(_)));
}

#[test]
fn control_characters_of_a_name_do_not_reach_the_terminal() {
    let host = MemHost::default();
    host.put("top", &small_qed(1 << 20, Some(("a\x1b[2J\nb", true))));
    for policy in [Policy::Refuse, Policy::Any] {
        let said = with(&host, "top", policy).expect_err("not there").to_string();
        assert!(!said.contains(char::is_control), "{said:?}");
    }
}

#[test]
fn loops_are_found_at_once() {
    let host = MemHost::default();
    host.put("self", &small_qed(1 << 20, Some(("self", false))));
    host.put("a", &small_qed(1 << 20, Some(("b", false))));
    host.put("b", &small_qed(1 << 20, Some(("a", false))));
    let file = small_qed(1 << 20, Some(("name2", false)));
    host.put("name1", &file);
    host.put("name2", &file);
    for (path, opens) in [("self", 2), ("a", 3), ("name1", 2)] {
        host.opened.lock().expect("no panics").clear();
        let before = host.get(path).expect("there").bytes();
        let options = OpenOptions { write: true, backing: Policy::Any, ..Default::default() };
        let error = open(&host, Path::new(path), &options).expect_err("a loop");
        assert!(matches!(inner(error), Error::BackingLoop(_)));
        assert_eq!(host.opened.lock().expect("no panics").len(), opens);
        assert_eq!(host.get(path).expect("there").bytes(), before);
    }
}

#[test]
fn chains_end_at_the_limit() {
    let host = MemHost::default();
    let link =
        |n: usize| host.put(&format!("{n}"), &small_qed(512, Some((&format!("{}", n + 1), false))));
    (0..DEPTH_MAX).for_each(link);
    host.put(&format!("{}", DEPTH_MAX), &small_qed(512, None));
    let error = with(&host, "0", Policy::Any).expect_err("one too many");
    assert!(matches!(inner(error), Error::Limit(_)));
    let chain = with(&host, "1", Policy::Any).expect("exactly the limit");
    assert_eq!(chain.layers.len(), DEPTH_MAX);
    let mut buf = [1; 512];
    cowbell_formats::map::read(&chain, 0, &mut buf).expect("deep chains read");
    assert_eq!(buf, [0; 512]);
}

#[test]
fn probing_a_backing_file_is_up_to_the_caller() {
    let host = MemHost::default();
    host.put("base", &small_qed(1 << 20, None));
    for (raw, format) in [(false, Format::Qed), (true, Format::Raw)] {
        host.put("top", &small_qed(1 << 20, Some(("base", raw))));
        let chain = with(&host, "top", Policy::Any).expect("opens");
        assert_eq!((chain.layers[1].format, chain.layers[1].probed), (format, !raw));
        let options =
            OpenOptions { backing: Policy::Any, probe_backing: false, ..Default::default() };
        assert_eq!(open(&host, Path::new("top"), &options).is_ok(), raw);
    }
}

#[test]
fn a_missing_backing_file_is_named() {
    let host = MemHost::default();
    host.put("/d/top", &small_qed(1 << 20, Some(("gone", true))));
    let error = with(&host, "/d/top", Policy::Any).expect_err("not there");
    assert_eq!(
        error.to_string(),
        "Could not open backing file: Could not open '/d/gone': No such file or directory"
    );
}

#[test]
fn info_opens_exactly_one_file() {
    let host = MemHost::default();
    host.put("/d/top", &small_qed(1 << 20, Some(("gone", true))));
    let info = info(&host, Path::new("/d/top"), None).expect("the top is there");
    assert_eq!(info.backing_file, Some(PathBuf::from("gone")));
    assert_eq!(info.full_backing_file, Some(PathBuf::from("/d/gone")));
    assert_eq!(info.backing_format, Some("raw".into()));
    assert_eq!(info.cluster_size, Some(4096));
    assert_eq!(*host.opened.lock().expect("no panics"), [PathBuf::from("/d/top")]);
}

#[test]
fn create_never_overwrites_its_own_backing_chain() {
    let host = MemHost::default();
    host.put("/d/base", &MemFile::new(&[1; 1024]));
    host.put("/d/mid", &small_qed(1 << 20, Some(("base", true))));
    for (backing, format) in [("mid", Format::Qed), ("base", Format::Raw)] {
        let options = CreateOptions {
            backing_file: Some(backing.into()),
            backing_format: Some(format),
            ..Default::default()
        };
        let error = create(&host, Path::new("/d/base"), Format::Qed, &options).expect_err("loop");
        assert!(matches!(inner(error), Error::BackingLoop(_)));
        assert_eq!(host.get("/d/base").expect("there").bytes(), [1; 1024]);
    }
}

#[test]
fn a_failed_create_leaves_nothing_behind() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("x");
    let options = CreateOptions { size: Some(7 << 60), ..Default::default() };
    create(&DISK, &path, Format::Raw, &options).expect_err("no file can be that long");
    assert!(!path.exists());

    // Options that are wrong cost nobody a file.
    std::fs::write(&path, b"precious").expect("written");
    for options in [
        CreateOptions { size: Some(1 << 20), cluster_size: Some(3), ..Default::default() },
        CreateOptions { size: Some(1 << 20), table_size: Some(3), ..Default::default() },
        CreateOptions { size: Some(1 << 62), ..Default::default() },
        CreateOptions { ..Default::default() },
        CreateOptions { backing_file: Some("gone".into()), ..Default::default() },
        CreateOptions {
            backing_file: Some("gone".into()),
            backing_format: Some(Format::Raw),
            ..Default::default()
        },
    ] {
        create(&DISK, &path, Format::Qed, &options).expect_err("wrong options");
        assert_eq!(std::fs::read(&path).expect("there"), b"precious");
    }
}

#[test]
fn what_is_no_file_is_not_opened() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let top = dir.path().join("top");
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.expect("mkfifo is everywhere").success());
    for (name, why) in [("fifo", "FIFO"), ("/dev/zero", "character device"), (".", "directory")] {
        std::fs::write(&top, small_qed(1 << 20, Some((name, true))).bytes()).expect("written");
        let options = OpenOptions { backing: Policy::Any, ..Default::default() };
        let error = open(&DISK, &top, &options).expect_err("it has no offsets, or would hang");
        assert!(error.to_string().contains(why), "{error}");
    }
    let options = CreateOptions { size: Some(1 << 20), ..Default::default() };
    create(&DISK, &fifo, Format::Qed, &options).expect_err("a FIFO is no place for an image");
    assert!(fifo.exists(), "what we did not make we do not remove");
}

#[test]
fn every_write_of_a_create_may_fail() {
    /// A disk that is full after some writes.
    struct Full(MemHost, u64);
    impl Host for Full {
        type File = MemFile;
        fn open(&self, path: &Path, write: bool) -> std::io::Result<MemFile> {
            let file = self.0.open(path, write)?;
            file.inner().fail_after = Some(file.inner().writes + self.1);
            Ok(file)
        }
        fn create_new(&self, path: &Path) -> std::io::Result<MemFile> {
            let file = self.0.create_new(path)?;
            file.inner().fail_after = Some(self.1);
            Ok(file)
        }
        fn remove(&self, path: &Path) -> std::io::Result<()> {
            self.0.remove(path)
        }
        fn resolve(&self, path: &Path) -> std::io::Result<PathBuf> {
            self.0.resolve(path)
        }
        fn identity(&self, file: &MemFile) -> std::io::Result<(u64, u64)> {
            self.0.identity(file)
        }
    }
    for format in [Format::Raw, Format::Qed] {
        for writes in 0.. {
            let host = Full(MemHost::default(), writes);
            let options = CreateOptions { size: Some(1 << 20), ..Default::default() };
            let path = Path::new("x");
            match create(&host, path, format, &options) {
                Ok(_) => {
                    assert!(writes >= 2, "it does write");
                    break;
                }
                Err(error) => {
                    assert!(error.to_string().contains("No space left"), "{error}");
                    assert!(host.0.get("x").is_none());
                }
            }
        }
    }
}
