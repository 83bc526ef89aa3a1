//! `commit` and `rebase` move contents along a chain of backing files: what the disk shows stays, as QEMU
//! sees it, and images are as QEMU leaves them.

use crate::common::{Place, Random, have_qemu};

/// Writes at random into an image, as `qemu-io` would be told to.
fn written(random: &mut Random, size: u64) -> String {
    let mut commands = String::new();
    for _ in 0..8 {
        let (at, len) = (random.below(size - 70_000) & !511, 512 + random.below(130) * 512);
        let kind = match random.below(4) {
            0 => "-z".to_string(),
            n => format!("-P {}", n * 50 + random.below(50)),
        };
        commands += &format!(" -c 'write {kind} {at} {len}'");
    }
    commands
}

/// Three layers, the lowest of this format, with something in each; `want` is what the top shows.
fn chain(place: &Place, random: &mut Random, lowest: &str, upper: &str) {
    // A QED image cannot grow where what is below it is longer, and a VMDK image not at all.
    let lower = match (lowest, upper) {
        (_, "qed") => [4, 5],
        ("vmdk", _) => [8, 4],
        _ => [5, 4],
    };
    let sizes = [lower[0] << 20, lower[1] << 20, 8 << 20];
    place.ok("rm -f base middle top want");
    place.qemu(&format!("qemu-img create -q -f {lowest} base {}", sizes[0]));
    place.qemu(&format!("qemu-img create -q -f {upper} -b base -F {lowest} middle {}", sizes[1]));
    place.qemu(&format!("qemu-img create -q -f {upper} -b middle -F {upper} top {}", sizes[2]));
    for (name, format, size) in
        [("base", lowest, sizes[0]), ("middle", upper, sizes[1]), ("top", upper, sizes[2])]
    {
        let commands = written(random, size);
        place.qemu(&format!("qemu-io -f {format} {commands} {name} >/dev/null"));
    }
    place.qemu(&format!("qemu-img convert -f {upper} -O raw top want"));
}

const PAIRS: [(&str, &str); 4] =
    [("raw", "qcow2"), ("qcow2", "qcow2"), ("qed", "qed"), ("vmdk", "qcow2")];

fn shows(place: &Place, format: &str, name: &str) {
    place.qemu(&format!("qemu-img compare -q -f raw -F {format} want {name}"));
    if format != "raw" && format != "vmdk" {
        place.qemu(&format!("qemu-img check -q -f {format} {name}"));
    }
}

#[test]
fn what_an_overlay_has_goes_down() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let mut random = Random(3);
    for (lowest, upper) in PAIRS {
        for cache in ["writeback", "none"] {
            chain(&place, &mut random, lowest, upper);
            let said = place.ok(&format!("cowbell commit -t {cache} -f {upper} top"));
            assert_eq!(said, "Image committed.\n");
            shows(&place, upper, "top");
            shows(&place, upper, "middle");
            if upper == "qcow2" {
                let map = place.qemu("qemu-img map --output json top");
                assert!(!map.contains("\"depth\": 0, \"present\": true"), "{map}");
            }
        }
        chain(&place, &mut random, lowest, upper);
        place
            .ok(&format!("cp top before && cowbell commit -q -d -f {upper} top && cmp top before"));
        shows(&place, upper, "middle");
        chain(&place, &mut random, lowest, upper);
        place.ok(&format!(
            "cp middle before && cowbell commit -b base -f {upper} top && cmp middle before"
        ));
        shows(&place, lowest, "base");
        shows(&place, upper, "top");
    }
}

#[test]
fn a_committed_image_goes_on_and_keeps_its_snapshots() {
    let place = Place::new();
    place.ok(
        "cowbell create -q -f qcow2 base 4M && cowbell create -q -f qcow2 -b base -F qcow2 top",
    );
    place.ok("cowbell io -c 'write -P 1 0 1M' top >/dev/null && cowbell snapshot -c s top");
    place.ok("cowbell io -c 'write -P 2 512k 1M' top >/dev/null && cowbell commit -q top");
    place.ok(
        "cowbell check -q top && cowbell io -r -c 'read -P 1 0 512k' -c 'read -P 2 512k 1M' top",
    );
    place.ok("cowbell io -r -c 'read -P 2 512k 1M' base");
    place.ok("cowbell io -c 'write -P 3 2M 64k' top >/dev/null && cowbell check -q top");
    place.ok("cowbell snapshot -a s top && cowbell io -r -c 'read -P 1 0 1M' top && cowbell check -q top");
}

#[test]
fn another_backing_file_changes_nothing_that_is_seen() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let mut random = Random(4);
    for (lowest, upper) in PAIRS {
        for (new, options) in [
            ("middle", format!("-b base -F {lowest}")),
            ("other", "-b other -F qcow2".into()),
            ("none", "-b ''".into()),
        ] {
            chain(&place, &mut random, lowest, upper);
            place.qemu("qemu-img create -q -f qcow2 other 3M");
            let commands = written(&mut random, 3 << 20);
            place.qemu(&format!("qemu-io -f qcow2 {commands} other >/dev/null && cp top theirs"));
            place.ok(&format!("cowbell rebase -f {upper} {options} top"));
            shows(&place, upper, "top");
            place.qemu(&format!("qemu-img rebase -f {upper} {options} theirs"));
            let named = |name: &str| {
                let said = place.qemu(&format!("qemu-img info -f {upper} {name}"));
                let lines = said.lines().filter(|line| line.starts_with("backing"));
                lines.map(String::from).collect::<Vec<_>>()
            };
            assert_eq!(named("top"), named("theirs"), "{new}");
            // And back again, by name alone, which is what the name says.
            place.ok(&format!("cowbell rebase -u -f {upper} -b middle -F {upper} top"));
            assert!(named("top")[0].contains("middle"));
            place.qemu(&format!("qemu-img check -q -f {upper} top"));
        }
    }
}

#[test]
fn names_of_any_length_take_each_others_place() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    let mut random = Random(5);
    for make in [
        "qemu-img create -q -f qcow2 i 1M",
        "qemu-img create -q -f qcow2 -o compat=0.10 i 1M",
        "qemu-img create -q -f qcow2 -o cluster_size=4k i 1M && qemu-img bitmap --add i one",
        "@create -q -f qcow2 i 1M",
        "qemu-img create -q -f qed i 1M",
    ] {
        match make.strip_prefix('@') {
            Some(make) => place.ok(&format!("cowbell {make}")),
            None => place.qemu(make),
        };
        let format = if make.contains("qed") { "qed" } else { "qcow2" };
        for _ in 0..12 {
            let name = "n".repeat(1 + random.below(1000) as usize);
            let backing = ["raw", "qed", "qcow2"][random.below(3) as usize];
            place.ok(&format!("cowbell rebase -u -f {format} -b {name} -F {backing} i"));
            let said = place.qemu(&format!("qemu-img info -f {format} i"));
            assert!(said.contains(&format!("backing file: {name}\n")), "{said}");
            if format == "qcow2" {
                assert!(said.contains(&format!("backing file format: {backing}\n")), "{said}");
            }
            assert_eq!(said.contains("name: one"), make.contains("one"), "{said}");
        }
        place.ok(&format!("cowbell rebase -u -f {format} -b '' i"));
        let said =
            place.qemu(&format!("qemu-img info -f {format} i && qemu-img check -q -f {format} i"));
        assert!(!said.contains("backing file"), "{said}");
        place.ok("rm i");
    }
}

#[test]
fn mistakes_are_answered_as_qemu_answers_them() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    place.qemu("qemu-img create -q -f qcow2 b 4M && qemu-img create -q -f qcow2 -b b -F qcow2 t");
    place.qemu("qemu-img create -q -f vmdk v 4M && qemu-img create -q -f vmdk -b v -F vmdk w");
    for line in [
        "qemu-img commit b",
        "qemu-img commit -b nothing t",
        "qemu-img commit -t what t",
        "qemu-img rebase -b nothing -F raw t",
        "qemu-img rebase -b b t",
        "qemu-img rebase t",
        "qemu-img rebase -b '' w",
        "qemu-img rebase -f qcow2 -u -b '' v",
    ] {
        let (ours, theirs) = (place.ours(line), place.theirs(line));
        assert_eq!(ours.status.code(), theirs.status.code(), "{line}: {ours:?}");
        let first = |said: &[u8]| {
            let said = String::from_utf8_lossy(said);
            said.lines().next().unwrap_or_default().to_string()
        };
        assert_eq!(first(&ours.stderr), first(&theirs.stderr), "{line}");
    }
}

/// What cannot be emptied stays as it is, and shows the same.
#[test]
fn a_committed_image_with_bitmaps_or_a_data_file_shows_the_same() {
    if !have_qemu() {
        return;
    }
    let place = Place::new();
    for make in ["-o data_file=d", "&& qemu-img bitmap --add top one"] {
        let (options, then) = if make.starts_with('-') { (make, "") } else { ("", make) };
        place.qemu("rm -f base top d want && qemu-img create -q -f qcow2 base 4M");
        place.qemu(&format!("qemu-img create -q -f qcow2 {options} -b base -F qcow2 top {then}"));
        place.ok(
            "cowbell io -c 'write -P 5 1M 1M' top >/dev/null && cowbell convert -O raw top want",
        );
        place.ok("cowbell commit -q top && cowbell check -q top");
        place.ok("cowbell compare -q -f raw -F qcow2 want top && cowbell compare -q -f raw -F qcow2 want base");
    }
}

/// Killed at any moment, an image shows what it showed, by the old chain or by the new one.
#[test]
fn a_kill_leaves_the_old_chain_or_the_new_one() {
    let place = Place::new();
    place.ok(
        "cowbell create -q -f qcow2 base 64M && cowbell create -q -f qcow2 -b base -F qcow2 one",
    );
    place.ok("cowbell io -c 'write -P 7 0 40M' base >/dev/null && cp one top0");
    place.ok(
        "cowbell io -c 'write -P 8 30M 20M' top0 >/dev/null && cowbell convert -O raw top0 want",
    );
    let mut random = Random(6);
    for round in 0..20 {
        let (verb, fresh) = match round % 2 {
            0 => ("rebase -b ''", "cp top0 top && cp base base0"),
            _ => ("commit", "cp top0 top && cp base base0"),
        };
        place.ok(fresh);
        let millis = random.below(120);
        place.ours(&format!(
            "cowbell {verb} top >/dev/null & sleep 0.{millis:03}; kill -9 $!; wait $! 2>/dev/null; true"
        ));
        place.ok("cowbell check -q -r leaks top >/dev/null; cowbell check -q top");
        place.ok("cowbell check -q -r leaks base >/dev/null; cowbell check -q base");
        place.ok("cowbell compare -q -f raw -F qcow2 want top");
        place.ok("mv base0 base");
    }
}
