//! Lives of a command that writes and flushes until somebody ends it.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{COWBELL, Place};

/// Bytes of the disk.
pub const SIZE: u64 = 16 << 20;
const LEN: u64 = 40_000;
/// Writes at places of their own, so that each is either there or not.
const PLACES: u64 = SIZE / LEN;

/// One life: writes rounds of pieces, each followed by a flush and a line that says so. A moment
/// after the `wanted`th line `end` is called, then it is killed. Answers how many rounds were
/// acknowledged in all; those that `end` may count on are `wanted`.
pub fn live(
    place: &Place,
    format: &str,
    mode: &[&str],
    life: u64,
    (wanted, after): (u64, Duration),
    end: impl FnOnce(),
) -> u64 {
    let mut child = Command::new(COWBELL)
        .args(["io", "-f", format])
        .args(mode)
        .arg("image")
        .current_dir(place.dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut stdin = child.stdin.take().expect("piped");
    let stdout = BufReader::new(child.stdout.take().expect("piped"));
    let can_compress = format == "qcow2";
    let writer = std::thread::spawn(move || {
        for round in 0..PLACES / 4 {
            let mut text = String::new();
            for i in 0..4 {
                let at = piece(life, round * 4 + i) * LEN;
                // Some of them compressed, beside the others, where the format can.
                let is_compressed = can_compress && (life + round + i).is_multiple_of(3);
                let write = if is_compressed { "write -c" } else { "aio_write" };
                text += &format!("{write} -q -P {} {at} {LEN}\n", byte(life));
            }
            // `help` of no command prints one line: the flush before it is over.
            text += "aio_flush\nflush\nhelp acknowledged\n";
            if stdin.write_all(text.as_bytes()).is_err() {
                break;
            }
        }
        // Held open: the command is to be killed, not to end.
        stdin
    });
    let mut lines = stdout.lines().map_while(Result::ok).filter(|l| l.contains("acknowledged"));
    let before = lines.by_ref().take(wanted as usize).count() as u64;
    assert_eq!(before, wanted, "life {life}: it ended by itself");
    std::thread::sleep(after);
    end();
    child.kill().expect("it is killed");
    child.wait().expect("it is dead");
    drop(writer.join().expect("it ends"));
    before + lines.count() as u64
}

/// The order of pieces, different in each life.
fn piece(life: u64, index: u64) -> u64 {
    // Odd and not a divisor of the number of pieces: a permutation.
    (index * 101 + life * 37) % PLACES
}

fn byte(life: u64) -> u8 {
    (life % 250) as u8 + 1
}

/// After a life with so many rounds: leaks are allowed, corruption is not, and what was flushed is
/// there.
pub fn look(place: &Place, format: &str, life: u64, rounds: u64) {
    if format != "raw" {
        let out = place.ours("cowbell check image");
        let code = out.status.code();
        let said = [out.stdout, out.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(matches!(code, Some(0 | 3)), "{format}, life {life}: {code:?} {said}");
    }
    let mut commands = String::new();
    for index in 0..rounds * 4 {
        let at = piece(life, index) * LEN;
        commands += &format!("read -q -P {} {at} {LEN}\n", byte(life));
    }
    std::fs::write(place.path("commands"), commands).expect("it is written");
    let said = place.ok(&format!("cowbell io -r -f {format} image < commands"));
    assert!(said.is_empty(), "{format}, life {life}, {rounds} rounds: {said}");
}
