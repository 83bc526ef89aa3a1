//! On damaged images, check and repair find, count and leave what `qemu-img check` does.

use crate::common::{MemFile, have_qemu, ok, run};
use cowbell_engine::store::Store;
use cowbell_formats::qed::rest::check::{Repair, check};

/// The number behind `"key":` in JSON text, 0 if it is not there.
fn number(text: &str, key: &str) -> u64 {
    let Some((_, rest)) = text.split_once(&format!("\"{key}\": ")) else { return 0 };
    rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[test]
fn damaged_tables() {
    if !have_qemu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let dir = dir.path();
    let path = dir.join("a.qed");
    ok(dir, "qemu-img create -q -f qed -o cluster_size=4k,table_size=2 a.qed 16M");
    ok(dir, "qemu-io -f qed -c 'write -q 0 40k' -c 'write -q 10M 8k' -c 'write -q 64k 9k' a.qed");
    let good = std::fs::read(&path).expect("made");
    let len = good.len() as u64;
    let l2 = u64::from_le_bytes(good[4096..4104].try_into().expect("8 bytes"));
    let mut random = 1u64;
    let mut next = |below: u64| {
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    for round in 0..60 {
        let file = MemFile::new(&good);
        for _ in 0..1 + next(4) {
            let table = if next(3) == 0 { 4096 } else { l2 };
            let value = match next(6) {
                0 => next(len),
                1 => len - 4096 + 512 * next(20),
                2 => u64::MAX - next(5000),
                3 => next(3),
                _ => next(len / 4096 + 2) * 4096,
            };
            file.poke_u64(table + 8 * next(30), value);
        }
        if next(3) == 0 {
            file.set_len(len + next(20_000)).expect("memory");
        }
        if next(2) == 0 {
            file.poke_u64(16, 2);
        }
        std::fs::write(&path, file.bytes()).expect("written");
        let ours = check(&file, Repair::None).expect("checked");
        let out = run(dir, "qemu-img check --output json a.qed");
        let theirs = String::from_utf8_lossy(&out.stdout);
        for (key, value) in [
            ("corruptions", ours.corruptions),
            ("leaks", ours.leaks),
            ("check-errors", ours.check_errors),
            ("total-clusters", ours.total_clusters),
            ("allocated-clusters", ours.allocated_clusters),
            ("fragmented-clusters", ours.fragmented_clusters),
        ] {
            assert_eq!(value, number(&theirs, key), "round {round}: {key}\n{ours:?}\n{theirs}");
        }

        // Repaired, the tables are the same. Only we cut off the tail, and only we leave a
        // broken image marked that was not: both are compared without.
        let ours = check(&file, Repair::All).expect("repaired");
        let out = run(dir, "qemu-img check -r all --output json a.qed");
        let theirs = String::from_utf8_lossy(&out.stdout);
        assert_eq!(ours.corruptions, number(&theirs, "corruptions"), "round {round}");
        assert_eq!(ours.corruptions_fixed, number(&theirs, "corruptions-fixed"), "round {round}");
        let (mut a, mut b) = (file.bytes(), std::fs::read(&path).expect("there"));
        b.truncate(a.len());
        if !ours.is_sound() {
            a[16..24].fill(0);
            b[16..24].fill(0);
        }
        assert!(a == b, "round {round}");
    }
}
