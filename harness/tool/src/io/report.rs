//! The lines that `qemu-io` prints about requests.

use std::io::Write;

use crate::fail::Fail;
use crate::out::Out;

/// What to print about a finished request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Style {
    /// Nothing.
    pub quiet: bool,
    /// For programs.
    pub parsable: bool,
    /// The bytes, too.
    pub dump: bool,
}

/// A size as `qemu-io` prints it: up to three decimals, and a unit.
pub fn size(value: f64) -> String {
    const UNITS: [(u32, &str); 6] =
        [(60, " EiB"), (50, " PiB"), (40, " TiB"), (30, " GiB"), (20, " MiB"), (10, " KiB")];
    for (shift, unit) in UNITS {
        let one = (1u64 << shift) as f64;
        if value >= one {
            return trimmed(&format!("{:.3}", value / one), unit);
        }
    }
    trimmed(&format!("{value:.6}"), " bytes")
}

/// Cuts off decimals that begin with three zeros.
fn trimmed(number: &str, unit: &str) -> String {
    let end = number.find(".000").unwrap_or(number.len());
    format!("{}{unit}", &number[..end])
}

fn time(nanos: u64, long: bool) -> String {
    let seconds = nanos / 1_000_000_000;
    let rest = (seconds % 60) as f64 + (nanos % 1_000_000_000) as f64 / 1e9;
    if long || seconds > 0 {
        format!("{}:{:02}:{rest:05.2}", seconds / 3600, seconds / 60 % 60)
    } else {
        format!("{rest:05.2} sec")
    }
}

/// One request's two lines; or one, for programs.
pub fn request(
    out: &mut Out,
    verb: &str,
    offset: u64,
    bytes: u64,
    nanos: u64,
    style: Style,
) -> Result<(), Fail> {
    let seconds = nanos.max(1) as f64 / 1e9;
    let (rate, ops) = (bytes as f64 / seconds, 1.0 / seconds);
    if style.parsable {
        writeln!(out, "{bytes},1,{},{rate:.3},{ops:.3}", time(nanos, true))?;
        return Ok(());
    }
    writeln!(out, "{verb} {bytes}/{bytes} bytes at offset {offset}")?;
    let (total, rate, time) = (size(bytes as f64), size(rate), time(nanos, false));
    writeln!(out, "{total}, 1 ops; {time} ({rate}/sec and {ops:.4} ops/sec)")?;
    Ok(())
}

/// A hexadecimal dump.
pub fn dump(out: &mut Out, offset: u64, bytes: &[u8]) -> Result<(), Fail> {
    for (i, line) in bytes.chunks(16).enumerate() {
        write!(out, "{:08x}:  ", offset + i as u64 * 16)?;
        for byte in line {
            write!(out, "{byte:02x} ")?;
        }
        write!(out, " ")?;
        for &byte in line {
            let shown = if byte.is_ascii_alphanumeric() { char::from(byte) } else { '.' };
            write!(out, "{shown}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_printed_as_qemu_prints_them() {
        let sizes = [
            (0.0, "0 bytes"),
            (17.668428, "17.668428 bytes"),
            (1536.0, "1.500 KiB"),
            (8_257_536.0, "7.875 MiB"),
            (65536.0, "64 KiB"),
        ];
        for (value, text) in sizes {
            assert_eq!(size(value), text);
        }
        assert_eq!(time(5_000_000, false), "00.01 sec");
        assert_eq!(time(3_709_220_000_000, false), "1:01:49.22");
        assert_eq!(time(1, true), "0:00:00.00");
    }
}
