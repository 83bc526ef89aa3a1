//! On damaged images, check finds and counts what `qemu-img check` does; and what it repairs,
//! `qemu-img check` finds nothing wrong with but what cannot be repaired.

use std::path::Path;

use crate::common::{MemFile, have_qemu, ok, run};
use cowbell_engine::store::Store;
use cowbell_formats::qcow2::rest::check::{Event, Repair, Report, Watch, check, check_watched};

/// The number behind `"key":` in JSON text, 0 if it is not there.
fn number(text: &str, key: &str) -> u64 {
    let Some((_, rest)) = text.split_once(&format!("\"{key}\": ")) else { return 0 };
    rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[derive(Default)]
struct Log(String);

impl Watch for Log {
    fn event(&mut self, event: Event<'_>) {
        if let Event::Found(what) = event {
            self.0 += &format!("{what}\n");
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, below: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// An image, and where its tables are: offset and how many words.
struct Template {
    bytes: Vec<u8>,
    tables: Vec<(u64, u64)>,
    cluster: u64,
}

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().expect("8 bytes"))
}

fn template(dir: &Path, options: &str, commands: &str, more: &[&str]) -> Template {
    ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} t.qcow2 2M"));
    ok(dir, &format!("qemu-io -f qcow2 {commands} t.qcow2"));
    for line in more {
        ok(dir, line);
    }
    let bytes = std::fs::read(dir.join("t.qcow2")).expect("made");
    let cluster = 1 << word(&bytes, 20).to_be_bytes()[3];
    let l1 = word(&bytes, 40);
    let reftable = word(&bytes, 48);
    let l2 = word(&bytes, l1) & 0xff_ffff_ffff_fe00;
    let block = word(&bytes, reftable);
    let tables = vec![(l1, 4), (l2, 24), (reftable, 2), (block, 10)];
    Template { bytes, tables, cluster }
}

/// One or more words of the tables changed.
fn damage(template: &Template, random: &mut Random) -> MemFile {
    let file = MemFile::new(&template.bytes);
    let clusters = template.bytes.len() as u64 / template.cluster;
    for _ in 0..1 + random.below(3) {
        // Tables of refcounts are hit less often: one such hit hides most others.
        let pick = [0, 1, 1, 1, 1, 3, 3, 2][random.below(8) as usize];
        let (table, words) = template.tables[pick];
        let at = table + 8 * random.below(words);
        let place = random.below(clusters + 3) * template.cluster;
        let value = match random.below(9) {
            0 => place | 1 << 63 | (512 * random.below(2)),
            1 => place | 1 << 62 | random.below(3000),
            2 => place | random.below(2) << 63 | 1,
            3 => random.below(4) << 62 | random.below(u64::MAX / 2),
            4 => 0,
            5 if pick == 3 => u64::MAX / random.below(70_000).max(1),
            _ => place | random.below(2) << 63,
        };
        file.write_at(at, &value.to_be_bytes()).expect("memory");
    }
    file
}

const KEYS: [&str; 6] = [
    "corruptions",
    "leaks",
    "check-errors",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
];

fn ours_of(report: &Report) -> [u64; 6] {
    [
        report.corruptions,
        report.leaks,
        report.check_errors,
        report.total_clusters,
        report.allocated_clusters,
        report.fragmented_clusters,
    ]
}

fn compare(dir: &Path, template: &Template, seed: u64, rounds: u64) {
    let mut random = Random(seed);
    let path = dir.join("a.qcow2");
    for round in 0..rounds {
        let file = damage(template, &mut random);
        std::fs::write(&path, file.bytes()).expect("written");
        let mut log = Log::default();
        let ours = check_watched(&file, Repair::None, &mut log).expect("checked");
        let out = run(dir, "qemu-img check --output json a.qcow2");
        let theirs = String::from_utf8_lossy(&out.stdout);
        let said = String::from_utf8_lossy(&out.stderr);
        let numbers = KEYS.map(|key| number(&theirs, key));
        assert_eq!(
            ours_of(&ours),
            numbers,
            "seed {seed}, round {round}: {KEYS:?}\n{}\nQEMU:\n{said}",
            log.0
        );
        assert_eq!(ours.compressed_clusters, number(&theirs, "compressed-clusters"), "{round}");
        assert_eq!(ours.image_end, number(&theirs, "image-end-offset"), "{round}\n{theirs}");

        // Repaired: both find the same left, and another repair has nothing to do.
        let before = file.bytes();
        let fixed = check(&file, Repair::All).expect("repaired");
        let again = check(&file, Repair::None).expect("checked again");
        assert_eq!(again.corruptions, fixed.corruptions, "round {round}\n{fixed:?}\n{}", log.0);
        assert_eq!((again.leaks, again.check_errors), (fixed.leaks, 0), "round {round} {fixed:?}");
        assert_eq!(again.leaks, 0, "seed {seed}, round {round}: {fixed:?}\n{}", log.0);
        let repaired = file.bytes();
        check(&file, Repair::All).expect("repaired again");
        assert!(file.bytes() == repaired, "round {round}: repairing twice is repairing once");
        std::fs::write(&path, &repaired).expect("written");
        let out = run(dir, "qemu-img check --output json a.qcow2");
        let theirs = String::from_utf8_lossy(&out.stdout);
        assert_eq!(number(&theirs, "corruptions"), again.corruptions, "round {round}");
        assert_eq!(number(&theirs, "leaks"), 0, "round {round}: {theirs}");

        // Leaks alone.
        let leaky = MemFile::new(&before);
        let fixed = check(&leaky, Repair::Leaks).expect("repaired");
        if !fixed.needs_rebuild {
            assert_eq!((fixed.leaks, fixed.leaks_fixed), (0, ours.leaks), "round {round}");
        }
    }
}

/// How many damaged images of each kind: 25, or what the environment says.
fn rounds() -> u64 {
    let text = std::env::var("COWBELL_TEST_ROUNDS").unwrap_or_default();
    text.parse().unwrap_or(25)
}

const WRITES: &str = "-c 'write -q 0 40k' -c 'write -q -z 64k 8k' -c 'write -q 70k 1k' \
    -c 'write -q -c 128k 64k' -c 'write -q 1M 8k'";

#[test]
fn damaged_tables() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    for (seed, options) in [
        (1, "cluster_size=4k"),
        (2, "cluster_size=4k,compat=v2"),
        (3, "cluster_size=512,refcount_bits=1"),
        (4, "cluster_size=1k,refcount_bits=64"),
        (5, "cluster_size=4k,refcount_bits=2,lazy_refcounts=on"),
        (6, "cluster_size=16k,extended_l2=on"),
        (7, "cluster_size=64k"),
    ] {
        let writes = match options {
            text if text.contains("v2") || text.contains("16k") || text.contains("64k") => {
                WRITES.replace("-c 'write -q -c 128k 64k'", "")
            }
            _ => WRITES.into(),
        };
        let template = template(dir, options, &writes, &[]);
        compare(dir, &template, seed, rounds());
    }
}

#[test]
fn damaged_tables_under_snapshots() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    let more = [
        "qemu-img snapshot -c one t.qcow2",
        "qemu-io -f qcow2 -c 'write -q 8k 12k' t.qcow2",
        "qemu-img snapshot -c two t.qcow2",
        "qemu-img snapshot -c three t.qcow2",
        "qemu-io -f qcow2 -c 'write -q 512k 12k' t.qcow2",
    ];
    for (seed, options) in [(11, "cluster_size=4k"), (12, "cluster_size=512,refcount_bits=32")] {
        compare(dir, &template(dir, options, WRITES, &more), seed, rounds());
    }
}

#[test]
fn bitmaps_are_counted() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    let more = [
        "qemu-img bitmap --add -g 512 t.qcow2 one",
        "qemu-io -f qcow2 -c 'write -q 8k 12k' t.qcow2",
        "qemu-img bitmap --add t.qcow2 two",
        "qemu-io -f qcow2 -c 'write -q 800k 12k' t.qcow2",
    ];
    let template = template(dir, "cluster_size=4k", WRITES, &more);
    let file = MemFile::new(&template.bytes);
    let report = check(&file, Repair::None).expect("checked");
    assert!(report.is_clean(), "{report:?}");
    compare(dir, &template, 21, rounds());
}

#[test]
fn sound_images_are_left_as_they_are() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    for options in [
        "cluster_size=64k",
        "compat=v2,cluster_size=512",
        "refcount_bits=1",
        "extended_l2=on",
        "data_file=d.raw",
        "preallocation=metadata",
        "compression_type=zstd,cluster_size=2M",
    ] {
        let _ = std::fs::remove_file(dir.join("d.raw"));
        ok(dir, &format!("qemu-img create -q -f qcow2 -o {options} t.qcow2 9M"));
        ok(dir, "qemu-io -f qcow2 -c 'write -q 8000k 70k' -c 'write -q 3M 1M' t.qcow2");
        let file = MemFile::new(&std::fs::read(dir.join("t.qcow2")).expect("made"));
        let report = check(&file, Repair::All).expect("checked");
        assert!(
            report.is_clean() && report.corruptions_fixed + report.leaks_fixed == 0,
            "{options}"
        );
        assert_eq!(file.inner().writes, 0, "{options}");
    }
}
