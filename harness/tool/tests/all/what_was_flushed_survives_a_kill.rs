//! The command is killed at random moments while it writes and flushes: what a flush had
//! acknowledged is there afterwards, and the image is not corrupt.
//!
//! Elsewhere and at other moments: `COWBELL_TEST_DIR` is a folder on the file system to try,
//! `COWBELL_SEED` a number.

#[cfg(feature = "io_uring")]
use std::io::Write;
use std::time::Duration;

use crate::common::lives::{SIZE, live, look};
use crate::common::{Place, Random};

fn lives(format: &str, backing: bool, mode: &[&str], count: u64, seed: u64) {
    let place = Place::new();
    // Another number, other moments.
    let more = std::env::var("COWBELL_SEED").map_or(0, |text| text.parse().expect("a number"));
    let mut random = Random(seed + more * 1000);
    let base = if format == "vmdk" { "vmdk" } else { "raw" };
    let overlay = if backing { format!("-b base -F {base}") } else { String::new() };
    place.ok(&format!("cowbell create -q -f {base} base {SIZE}"));
    place.ok(&format!("cowbell create -q -f {format} {overlay} image {SIZE}"));
    for life in 0..count {
        // In the first round too, or before it.
        let wanted = random.below(6);
        let after = Duration::from_micros(random.below(10_000));
        let rounds = live(&place, format, mode, life, (wanted, after), || ());
        look(&place, format, life, rounds);
        // Every other image is repaired by hand, the rest by the next opening. A cluster that was
        // never linked stays leaked if one behind it was.
        if format != "raw" && life % 2 == 0 {
            let code = place.ours("cowbell check -q -r all image").status.code();
            assert!(matches!(code, Some(0 | 3)), "life {life}: {code:?}");
        }
    }
}

#[test]
fn in_raw_images() {
    lives("raw", false, &["-n", "-i", "native"], 20, 1);
}

#[test]
fn in_qed_images_past_the_page_cache() {
    lives("qed", false, &["-n", "-i", "native"], 30, 2);
}

#[test]
fn in_qed_images_through_the_page_cache() {
    lives("qed", false, &["-t", "writeback"], 20, 3);
}

#[test]
fn in_qed_overlays() {
    lives("qed", true, &["-n", "-i", "native"], 30, 4);
}

#[test]
fn in_vmdk_images_past_the_page_cache() {
    lives("vmdk", false, &["-n", "-i", "native"], 40, 5);
}

#[test]
fn in_vmdk_images_through_the_page_cache() {
    lives("vmdk", false, &["-t", "writeback"], 20, 6);
}

#[test]
fn in_vmdk_overlays() {
    lives("vmdk", true, &["-n", "-i", "native"], 40, 7);
}

#[test]
fn in_qcow2_images_past_the_page_cache() {
    lives("qcow2", false, &["-n", "-i", "native"], 40, 5);
}

#[test]
fn in_qcow2_images_through_the_page_cache() {
    lives("qcow2", false, &["-t", "writeback"], 20, 6);
}

#[test]
#[cfg(feature = "io_uring")]
fn in_images_of_all_formats_over_io_uring() {
    let place = Place::new();
    place.ok("cowbell create -q -f raw image 1M");
    let tried = place.ours("cowbell bench -q -c 1 -f raw -i io_uring image");
    let said = String::from_utf8_lossy(&tried.stderr);
    assert!(tried.status.success(), "{said}");
    if said.contains("Unable to use linux io_uring") {
        let _ = std::io::stderr().write_all(format!("SKIPPED: {said}").as_bytes());
        return;
    }
    for (at, format) in ["raw", "qed", "qcow2", "vmdk", "vdi"].into_iter().enumerate() {
        lives(format, false, &["-n", "-i", "io_uring"], 15, 8 + at as u64);
        lives(format, false, &["-t", "writeback", "-i", "io_uring"], 10, 18 + at as u64);
    }
}

#[test]
fn in_qcow2_overlays() {
    lives("qcow2", true, &["-n", "-i", "native"], 40, 7);
}
