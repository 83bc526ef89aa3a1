//! The files that an image is spread over: opened only beside it unless the caller says otherwise,
//! and none of them twice.

use std::os::unix::fs::symlink;
use std::path::Path;

use crate::common::{DISK, MemFile, MemHost};
use cowbell_engine::store::Store;
use cowbell_formats::chain::open_files;
use cowbell_formats::vmdk::disk::descriptor::FILES_MAX;
use cowbell_formats::{Error, Host, OpenOptions, Policy};

fn with(host: &MemHost, name: &str, files: Policy) -> Result<Vec<MemFile>, Error> {
    let options = OpenOptions { files, ..OpenOptions::default() };
    open_files(host, Path::new("/d/top"), &[Path::new(name)], &options, &mut vec![])
}

#[test]
fn each_policy_allows_what_it_says() {
    let host = MemHost::default();
    for path in ["/d/part", "/d/sub/part", "/e/part"] {
        host.put(path, &MemFile::new(&[1; 512]));
    }
    let names = ["part", "./part", "/d/part", "sub/../part", "sub/part", "../e/part", "/e/part"];
    let verdicts = |policy: Policy| {
        names.map(|name| match with(&host, name, policy.clone()) {
            Ok(files) => files.len() == 1,
            Err(Error::Policy(_)) => false,
            Err(other) => panic!("not about the policy: {other}"),
        })
    };
    let (t, f) = (true, false);
    assert_eq!(verdicts(OpenOptions::default().files), [t, f, f, f, f, f, f]);
    assert_eq!(verdicts(Policy::Refuse), [f; 7]);
    assert_eq!(verdicts(Policy::Any), [t; 7]);
    assert_eq!(verdicts(Policy::Directories(vec!["/d".into()])), [t, t, t, t, t, f, f]);
}

#[test]
fn odd_names_are_refused() {
    let host = MemHost::default();
    host.put("/d/part", &MemFile::new(&[1; 512]));
    for name in ["", ".", "..", "/", "part/", "part/."] {
        assert!(with(&host, name, Policy::SameDirectory).is_err(), "'{name}'");
    }
}

#[test]
fn a_link_out_of_the_folder_is_not_followed() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let other = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(other.path().join("secret"), [7; 512]).expect("written");
    symlink(other.path().join("secret"), dir.path().join("part")).expect("linked");
    let options = OpenOptions::default();
    let top = dir.path().join("top");
    let error = open_files(&DISK, &top, &[Path::new("part")], &options, &mut vec![]);
    assert!(matches!(error, Err(Error::Policy(_))), "{error:?}");
}

#[test]
fn no_file_is_opened_twice() {
    let host = MemHost::default();
    let (top, part) = (Path::new("/d/top"), Path::new("part"));
    for path in ["/d/top", "/d/part"] {
        host.put(path, &MemFile::new(&[1; 512]));
    }
    let options = OpenOptions::default();
    let file = host.open(top, false).expect("it is there");
    let seen = vec![host.identity(&file).expect("it has one")];
    for names in [&[part, part][..], &[Path::new("top")]] {
        let error = open_files(&host, top, names, &options, &mut seen.clone());
        assert!(matches!(error, Err(Error::Invalid(_))), "{names:?}: {error:?}");
    }
    let mut after = seen.clone();
    open_files(&host, top, &[part], &options, &mut after).expect("once is fine");
    assert_eq!(after.len(), 2);
    let many = vec![part; FILES_MAX + 1];
    let error = open_files(&host, top, &many, &options, &mut seen.clone());
    assert!(matches!(error, Err(Error::Limit(_))), "{error:?}");
}

#[test]
fn they_are_written_only_if_the_image_is() {
    let host = MemHost::default();
    host.put("/d/part", &MemFile::new(&[1; 512]));
    for write in [false, true] {
        let options = OpenOptions { write, ..OpenOptions::default() };
        let (top, names) = (Path::new("/d/top"), [Path::new("part")]);
        let files = open_files(&host, top, &names, &options, &mut vec![]).expect("it opens");
        assert_eq!(files[0].is_writable(), write);
    }
}
