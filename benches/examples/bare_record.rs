//! What the least takes that a record of a run consists of, without an engine around it: a submission looked at and
//! packed into eight bytes, a completion, a round of the sum. Count instructions of two lengths, and take the
//! difference, less that of `nothing`:
//!
//! ```text
//! cargo build --release -p cowbell-benches --example bare_record
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null target/release/examples/bare_record submission 110000
//! ```

use std::env;
use std::hint::black_box;

/// A request: offset, length, kind and flag.
struct Io(u64, u64, u8, bool);

struct Log {
    chunk: Vec<u8>,
    at: usize,
    sum: u64,
    polled: u32,
}

impl Log {
    #[inline(always)]
    fn word(&mut self, word: u64, len: usize) {
        self.chunk[self.at..self.at + 8].copy_from_slice(&word.to_le_bytes());
        self.at += len;
    }

    #[inline(never)]
    fn submission(&mut self, &Io(offset, len, kind, fua): &Io, node: u64, memory: u64) -> bool {
        let (start, sectors) = (offset.rotate_right(9), len.rotate_right(9));
        let odd = start >> 32 | sectors >> 16 | node >> 6 | (memory ^ len);
        if odd != 0 || kind > 1 || fua || self.polled > 1 {
            return false;
        }
        let tag = 0x10 | u64::from(kind) | u64::from(std::mem::take(&mut self.polled)) << 6;
        self.word(tag | node << 8 | 1 << 14 | start << 16 | sectors << 48, 8);
        true
    }

    #[inline(never)]
    fn completion(&mut self, op: u64, answer: i64, len: u64) {
        if answer as u64 == len {
            self.word(op, 4);
        }
    }

    #[inline(never)]
    fn sum(&mut self, op: u64, file: u64, offset: u64, len: u64) {
        let what = (op << 32 | file << 8).wrapping_mul(0xd6e8_feb8_6659_fd93);
        let word = what ^ offset ^ len.rotate_left(40);
        self.sum = (self.sum.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

fn main() {
    let mut args = env::args().skip(1);
    let what = args.next().unwrap_or_else(|| "submission".into());
    let count: u64 = args.next().and_then(|count| count.parse().ok()).unwrap_or(10_000);
    let mut log = Log { chunk: vec![0; 1 << 16], at: 0, sum: 0, polled: 0 };
    for n in 0..count {
        log.at &= 0x7fff;
        let io = black_box(Io(n << 12, 4096, 0, false));
        match what.as_str() {
            "submission" => {
                log.polled = 1;
                black_box(log.submission(&io, 1, 4096));
            }
            "completion" => log.completion(n, 4096, 4096),
            "sum" => log.sum(n, 1, io.0, io.1),
            _ => {}
        }
        black_box(&mut log);
    }
    black_box((log.at, log.sum, &log.chunk));
}
