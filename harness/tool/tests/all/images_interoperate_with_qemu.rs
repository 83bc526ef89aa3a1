//! What QEMU's programs write, the command reads, and the other way round: the same bytes, and
//! images that QEMU's check calls clean.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::common::{COWBELL, Place, Random, have_qemu, read};

const SIZE: u64 = 12 << 20;
const BACKING: u64 = 5 << 20;

/// What an image is made of.
#[derive(Clone, Copy, Debug)]
struct Case {
    cluster: u64,
    table: u64,
    backing: &'static str,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for cluster in [4 << 10, 64 << 10, 2 << 20] {
        for table in [1, 2, 4, 16] {
            for backing in ["", "raw", "qed"] {
                // The largest clusters with the largest tables tell nothing that others do not.
                if cluster < 2 << 20 || table <= 2 {
                    cases.push(Case { cluster, table, backing });
                }
            }
        }
    }
    cases
}

/// Makes `base` and `top.qed`; answers what the disk holds.
fn make(place: &Place, case: Case) -> Vec<u8> {
    let mut shadow = vec![0; SIZE as usize];
    let mut options = format!("cluster_size={},table_size={}", case.cluster, case.table);
    if !case.backing.is_empty() {
        let format = case.backing;
        place.ok(&format!(
            "cowbell create -q -f {format} base {BACKING} && cowbell io -f {format} -t writeback \
             -c 'write -q -P 17 0 3M' -c 'write -q -P 18 4M 700k' base"
        ));
        shadow[..3 << 20].fill(17);
        shadow[4 << 20..(4 << 20) + (700 << 10)].fill(18);
        options += &format!(",backing_file=base,backing_fmt={format}");
    }
    place.ok(&format!("cowbell create -q -f qed -o {options} top.qed {SIZE}"));
    shadow
}

/// Random commands in rounds of 32 that do not overlap, as text for `io`; and what they leave.
fn mix(case: Case, random: &mut Random, shadow: &mut [u8], rounds: usize) -> String {
    let mut text = String::new();
    for _ in 0..rounds {
        let mut taken: Vec<(u64, u64)> = Vec::new();
        while taken.len() < 32 {
            let unit = [1, 512, 4096, case.cluster.min(256 << 10)][random.below(4) as usize];
            let len = ((1 + random.below(40)) * unit).min(1 << 20);
            let offset = random.below((SIZE - len) / unit + 1) * unit;
            if taken.iter().any(|&(o, l)| offset < o + l && o < offset + len) {
                if random.below(8) == 0 {
                    break;
                }
                continue;
            }
            taken.push((offset, len));
            let range = offset as usize..(offset + len) as usize;
            match random.below(10) {
                0..7 => {
                    let byte = random.below(255) as u8 + 1;
                    shadow[range].fill(byte);
                    text += &format!("aio_write -q -P {byte} {offset} {len}\n");
                }
                7 => {
                    shadow[range].fill(0);
                    text += &format!("aio_write -q -z {offset} {len}\n");
                }
                8 => {
                    let first = offset.next_multiple_of(case.cluster);
                    let end = offset + len;
                    let last = if end == SIZE { end } else { end - end % case.cluster };
                    if first < last {
                        shadow[first as usize..last as usize].fill(0);
                    }
                    text += &format!("discard -q {offset} {len}\n");
                }
                _ => text += &format!("aio_read -q {offset} {len}\nflush\n"),
            }
        }
        text += "aio_flush\n";
    }
    text
}

fn feed(place: &Place, args: &[&str], text: &str) {
    let mut child = Command::new(COWBELL)
        .arg("io")
        .args(args)
        .current_dir(place.dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(text.as_bytes()).expect("it reads all of it");
    drop(stdin);
    let out = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.is_empty(), "{said}");
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn images_filled_by_us_are_clean_and_the_same_for_qemu() {
    let have_qemu = have_qemu();
    let mut random = Random(1);
    for (i, case) in cases().into_iter().enumerate() {
        let place = Place::new();
        let mut shadow = make(&place, case);
        let modes: [&[&str]; 3] = [
            &["-n", "-i", "native", "-f", "qed", "top.qed"],
            &["-t", "writeback", "-f", "qed", "top.qed"],
            &["-n", "-i", "threads", "-f", "qed", "top.qed"],
        ];
        for round in 0..2 {
            let text = mix(case, &mut random, &mut shadow, 4);
            feed(&place, modes[(i + round) % 3], &text);
        }
        fs::write(place.path("shadow"), &shadow).expect("it is written");
        let ours = place.ok("cowbell check top.qed && cowbell compare -F raw top.qed shadow");
        assert!(ours.contains("Images are identical."), "{case:?}: {ours}");
        // QEMU takes a table of one cluster for an overflow, and refuses the image.
        if have_qemu && case.table > 1 {
            let theirs =
                place.qemu("qemu-img check top.qed && qemu-img compare -F raw top.qed shadow");
            assert!(theirs.contains("No errors were found"), "{case:?}: {theirs}");
            assert!(theirs.contains("Images are identical."), "{case:?}: {theirs}");
        }
    }
}

#[test]
fn images_filled_by_qemu_are_the_same_for_us() {
    if !have_qemu() {
        return;
    }
    let mut random = Random(2);
    for case in cases().into_iter().filter(|case| case.table > 1) {
        let place = Place::new();
        make(&place, case);
        let mut commands = String::new();
        for _ in 0..60 {
            let len = 1 + random.below(300 << 10);
            let offset = random.below(SIZE - len);
            // QEMU's partial zero writes into an overlay are not to be trusted.
            let byte = random.below(255) + 1;
            commands += &format!("write -q -P {byte} {offset} {len}\n");
        }
        fs::write(place.path("commands"), commands).expect("it is written");
        place.qemu("qemu-io -t writeback -f qed top.qed < commands");
        place.qemu("qemu-img convert -O raw top.qed theirs");
        let ours = place.ok("cowbell check top.qed && cowbell compare -F raw top.qed theirs");
        assert!(ours.contains("Images are identical."), "{case:?}: {ours}");
        // And through the engine.
        let bytes = read(&place.path("theirs"));
        let mut text = String::new();
        for (i, chunk) in bytes.chunks(64 << 10).enumerate() {
            let byte = chunk[0];
            let len = chunk.iter().take_while(|&&b| b == byte).count();
            text += &format!("aio_read -q -P {byte} {} {len}\n", i * (64 << 10));
        }
        feed(&place, &["-r", "-f", "qed", "top.qed"], &text);
    }
}
