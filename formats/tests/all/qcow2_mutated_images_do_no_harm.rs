//! Whatever the header, tables and snapshots of an image say: it is described, mapped, read, checked
//! and repaired, or refused. Nothing panics or takes memory beyond bounds, and what repair calls
//! sound is sound.
//!
//! `COWBELL_FUZZ_RUNS` sets how many images are tried.

use std::path::Path;

use crate::common::small_qcow2::{Random, sound};
use crate::common::{MemFile, MemHost};
use cowbell_formats::chain::open_whole_layer;
use cowbell_formats::info::info_of;
use cowbell_formats::map::{extents, read};
use cowbell_formats::qcow2::rest::check::{Repair, check};
use cowbell_formats::qcow2::rest::snapshots::{Moment, apply, create, delete};
use cowbell_formats::{Error, Format, OpenOptions, Policy, open, rebase};

/// More than looking at any of these images takes, and more than any of them comes to.
const MEMORY_MAX: u64 = 128 << 20;

/// Describes, maps and reads. Answers whether it opens.
fn look(host: &MemHost) -> bool {
    let path = Path::new("image");
    let format = Some(Format::Qcow2);
    let options = OpenOptions { format, backing: Policy::Any, ..OpenOptions::default() };
    if let Ok(layer) = open_whole_layer(host, path, &options) {
        // Snapshots and bitmaps are only looked at here.
        let said = info_of(&layer);
        assert!(matches!(said, Ok(_) | Err(Error::Corrupt { .. })), "{said:?}");
    }
    let Ok(chain) = open(host, path, &options) else { return false };
    let size = chain.size();
    for extent in extents(&chain).take(16) {
        let Ok(extent) = extent else { break };
        assert!(extent.len > 0 && extent.start + extent.len <= size);
    }
    let mut buf = [0; 5000];
    for at in [0, 4096, 2 << 20, 4 << 20, size / 2, size.saturating_sub(5000)] {
        let inside = at.checked_add(5000).is_some_and(|end| end <= size);
        match read(&chain, at, &mut buf) {
            Ok(()) => assert!(inside),
            Err(Error::Invalid(_)) => assert!(!inside),
            Err(error) => {
                let is_named = matches!(error, Error::Corrupt { .. } | Error::Io { .. });
                assert!(is_named, "{error}");
            }
        }
    }
    true
}

fn change(file: &MemFile, random: &mut Random) {
    let now = Moment { seconds: 1, nanos: 0 };
    let name = "n".repeat(1 + random.next() as usize % 700);
    let _ = match random.next() % 6 {
        0 => create(file, b"another", now).map(|_| ()),
        1 => apply(file, b"one"),
        2 => delete(file, b"one"),
        3 => rebase::set_backing(file, Format::Qcow2, Some((Path::new(&name), "raw"))),
        4 => rebase::set_backing(file, Format::Qcow2, None),
        _ => rebase::empty(file, Format::Qcow2),
    };
}

fn repair(file: &MemFile) {
    let before = check(file, Repair::None);
    if check(file, Repair::Leaks).is_err() {
        return;
    }
    let Ok(first) = check(file, Repair::All) else { return };
    let second = check(file, Repair::All).expect("what was repaired can be checked");
    // What it calls sound is sound. (Where tables lie upon one another, repairing one may break
    // another, and it says that something is wrong.)
    let fixed = second.corruptions_fixed + second.leaks_fixed;
    assert!(
        !first.is_sound() || second.is_sound() && fixed == 0,
        "{before:?}\n{first:?}\n{second:?}"
    );
}

fn torture(bytes: &[u8], random: &mut Random) -> bool {
    let (host, file) = (MemHost::default(), MemFile::new(bytes));
    host.put("image", &file);
    let opens = look(&host);
    if random.next().is_multiple_of(2) {
        change(&file, random);
    }
    repair(&file);
    look(&host);
    opens
}

#[test]
fn thousands_of_them() {
    let runs = std::env::var("COWBELL_FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok());
    let runs: u64 = runs.unwrap_or(10_000);
    let templates = [false, true].map(|extended| {
        let file = MemFile::new(&sound(extended));
        create(&file, b"one", Moment::default()).expect("a snapshot");
        file.bytes()
    });
    let mut random = Random(0xcafe);
    let mut opened = 0;
    for run in 0..runs {
        let mut bytes = templates[run as usize % 2].clone();
        random.mutate(&mut bytes);
        let mut opens = false;
        let used = allocation_counter::measure(|| opens = torture(&bytes, &mut random));
        assert!(used.bytes_max < MEMORY_MAX, "run {run}: {used:?}");
        opened += u64::from(opens);
    }
    assert!(opened > runs / 4, "hardly any image opened: {opened} of {runs}");
}
