//! Numbers as QEMU's programs take and print them.

use cowbell_formats::create::{BadSize, parse_size};

use crate::fail::Fail;

/// A size option's value, with QEMU's words for a bad one: `what` is "buffer size" and the like.
pub fn size(what: &str, text: &str, min: u64, max: u64) -> Result<u64, Fail> {
    match parse_size(text) {
        Ok(value) if (min..=max).contains(&value) => Ok(value),
        Err(BadSize::NotANumber) => {
            Err(Fail::other(format!("Invalid {what} specified: '{text}'.")))
        }
        _ => {
            Err(Fail::other(format!("Invalid {what} specified. Must be between {min} and {max}.")))
        }
    }
}

/// The value of an option that is a place or a length on a disk, if it was given.
pub fn offset(what: &str, text: Option<&str>) -> Result<Option<u64>, Fail> {
    text.map(|text| size(what, text, 0, i64::MAX as u64)).transpose()
}

/// A count option's value; it has no suffix.
pub fn count(what: &str, text: &str, min: u64, max: u64) -> Result<u64, Fail> {
    match integer(text) {
        Some(value) => match u64::try_from(value) {
            Ok(value) if (min..=max).contains(&value) => Ok(value),
            _ => Err(Fail::other(format!(
                "Invalid {what} specified. Must be between {min} and {max}."
            ))),
        },
        None => Err(Fail::other(format!("Invalid {what} specified: '{text}'."))),
    }
}

/// A whole number as C reads it: with a sign, and in decimal, octal (`017`) or hexadecimal
/// (`0x1f`). What is too large comes out as the largest there is.
pub fn integer(text: &str) -> Option<i128> {
    let text = text.trim_start();
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let hex = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    let (digits, radix) = match hex {
        Some(hex) => (hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return None;
    }
    let value = i128::from_str_radix(digits, radix).unwrap_or(i128::MAX);
    Some(if negative { -value } else { value })
}

/// As C's `%.3g`, for what is not negative.
pub fn three_digits(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    // The exponent of the value when rounded to three digits.
    let scientific = format!("{value:.2e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trimmed = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text.to_string(),
    };
    if (-4..3).contains(&exponent) {
        let decimals = (2 - exponent).max(0) as usize;
        trimmed(&format!("{value:.decimals$}"))
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{}e{sign}{:02}", trimmed(mantissa), exponent.abs())
    }
}

/// A size as `qemu-img info` prints it: three digits and a unit.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // The next unit is taken as soon as there would be four digits before the point.
    let scaled = bytes as f64 / (1000.0 / 1024.0);
    let mut power = 0;
    while power < UNITS.len() - 1 && scaled >= f64::from(2u32).powi(10 * (power as i32 + 1)) {
        power += 1;
    }
    let value = bytes as f64 / f64::from(2u32).powi(10 * power as i32);
    format!("{} {}B", three_digits(value), UNITS[power])
}

/// A duration for people: three digits and a unit.
pub fn duration(nanos: u64) -> String {
    let (value, unit) = match nanos {
        0..1_000 => (nanos as f64, "ns"),
        1_000..1_000_000 => (nanos as f64 / 1e3, "µs"),
        1_000_000..1_000_000_000 => (nanos as f64 / 1e6, "ms"),
        _ => (nanos as f64 / 1e9, "s"),
    };
    if value >= 100.0 || unit == "ns" {
        format!("{value:.0} {unit}")
    } else if value >= 10.0 {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.2} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_printed_as_qemu_prints_them() {
        let cases = [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (4096000, "3.91 MiB"),
            (64 << 20, "64 MiB"),
            (1 << 40, "1 TiB"),
            (1023 << 10, "0.999 MiB"),
            ((1 << 40) - 1, "1 TiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn integers_are_read_as_c_reads_them() {
        let cases = [
            ("0", Some(0)),
            ("010", Some(8)),
            ("0x10", Some(16)),
            ("-3", Some(-3)),
            ("", None),
            ("0x", None),
            ("09", None),
            ("1k", None),
        ];
        for (text, value) in cases {
            assert_eq!(integer(text), value, "{text}");
        }
    }
}
