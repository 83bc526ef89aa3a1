//! How much each disk may do: `--bps`, `--iops` and `--burst`, each for all disks or for one.

use std::time::Duration;

use cowbell_engine::Rate;

use crate::fail::Fail;
use crate::number::{count, size};

/// The longest burst, in milliseconds: an hour.
const BURST_MAX: u64 = 3_600_000;

/// What was said of limits.
#[derive(Debug)]
pub struct Limits {
    bytes: Setting,
    requests: Setting,
    burst: Setting,
}

/// The values of one option.
#[derive(Debug)]
struct Setting {
    option: &'static str,
    /// For disks that are not named.
    of_others: Option<u64>,
    /// For those that are.
    of: Vec<(String, u64)>,
}

impl Limits {
    /// From the values of the options, each `N` or `NAME=N`.
    pub fn parse(bps: &[String], iops: &[String], burst: &[String]) -> Result<Limits, Fail> {
        let bytes = |text: &str| size("number of bytes a second", text, 0, i64::MAX as u64);
        let requests = |text: &str| count("number of requests a second", text, 0, 1 << 32);
        let ms = |text: &str| count("burst", text, 0, BURST_MAX);
        Ok(Limits {
            bytes: Setting::parse("bps", bps, bytes)?,
            requests: Setting::parse("iops", iops, requests)?,
            burst: Setting::parse("burst", burst, ms)?,
        })
    }

    /// The limit of the disk called `name`, if it has one.
    pub fn of(&self, name: &str) -> Result<Option<Rate>, Fail> {
        // As of QEMU: 0 is no limit.
        let limit = |setting: &Setting| setting.get(name).filter(|&limit| limit > 0);
        let (bytes, requests) = (limit(&self.bytes), limit(&self.requests));
        if bytes.is_none() && requests.is_none() {
            if self.burst.of.iter().any(|(its, _)| its == name) {
                return Err(Fail::other(format!("--burst of '{name}', which has no limit")));
            }
            return Ok(None);
        }
        let burst = self.burst.get(name).map(Duration::from_millis);
        Ok(Some(Rate { bytes, requests, burst: burst.unwrap_or(Rate::default().burst) }))
    }

    /// Each disk that is named is one of these.
    pub fn check<'n>(&self, mut disks: impl Iterator<Item = &'n str> + Clone) -> Result<(), Fail> {
        for Setting { option, of, .. } in [&self.bytes, &self.requests, &self.burst] {
            if let Some((name, _)) = of.iter().find(|(name, _)| !disks.clone().any(|n| n == name)) {
                return Err(Fail::other(format!("--{option}: no disk is called '{name}'")));
            }
        }
        let burst = self.burst.of_others.is_some();
        if burst && !disks.any(|name| matches!(self.of(name), Ok(Some(_)))) {
            return Err(Fail::other("--burst without --bps or --iops"));
        }
        Ok(())
    }
}

impl Setting {
    fn parse(
        option: &'static str,
        texts: &[String],
        value: impl Fn(&str) -> Result<u64, Fail>,
    ) -> Result<Setting, Fail> {
        let (mut of_others, mut of) = (None, Vec::new());
        for text in texts {
            // A name may have a `=` in it, a number has none.
            let is_again = match text.rsplit_once('=') {
                None => of_others.replace(value(text)?).is_some(),
                Some((name, text)) => {
                    let is_again = of.iter().any(|(known, _)| known == name);
                    of.push((name.to_string(), value(text)?));
                    is_again
                }
            };
            if is_again {
                return Err(Fail::other(format!("--{option} is said twice of the same: '{text}'")));
            }
        }
        Ok(Setting { option, of_others, of })
    }

    fn get(&self, name: &str) -> Option<u64> {
        let own = self.of.iter().find(|(its, _)| its == name);
        own.map(|&(_, value)| value).or(self.of_others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(bps: &[&str], iops: &[&str], burst: &[&str]) -> Result<Limits, Fail> {
        let [bps, iops, burst] =
            [bps, iops, burst].map(|texts| texts.iter().map(|&t| t.into()).collect::<Vec<_>>());
        Limits::parse(&bps, &iops, &burst)
    }

    #[test]
    fn each_disk_has_its_own_limit_or_that_of_all() {
        let limits = limits(&["1M", "a=b=2k"], &["c=10", "d=0"], &["d=7", "c=0"]).expect("legal");
        let of = |name| limits.of(name).ok().flatten();
        let rate = |bytes, requests, ms| {
            Some(Rate { bytes: Some(bytes), requests, burst: Duration::from_millis(ms) })
        };
        assert_eq!(of("x"), rate(1 << 20, None, 100));
        assert_eq!(of("a=b"), rate(2048, None, 100));
        assert_eq!(of("c"), rate(1 << 20, Some(10), 0));
        assert_eq!(of("d"), rate(1 << 20, None, 7));
        assert!(limits.check(["a=b", "c", "d", "x"].into_iter()).is_ok());
        assert!(limits.check(["a=b", "d", "x"].into_iter()).is_err(), "there is no c");
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        for bad in ["", "-1", "x", "1Q", "a=", "8E"] {
            assert!(limits(&[bad], &[], &[]).is_err(), "{bad}");
        }
        for bad in ["", "-1", "1k", "4294967297", "a="] {
            assert!(limits(&[], &[bad], &[]).is_err(), "{bad}");
        }
        for bad in ["-1", "3600001", "10ms"] {
            assert!(limits(&[], &["1"], &[bad]).is_err(), "{bad}");
        }
        for twice in [["1", "2"], ["a=1", "a=1"]] {
            assert!(limits(&twice, &[], &[]).is_err() && limits(&[], &twice, &[]).is_err());
        }
        let burst = limits(&["a=1"], &[], &["b=5"]).expect("legal by itself");
        assert!(burst.of("a").is_ok() && burst.of("b").is_err());
        let burst = limits(&["a=0"], &[], &["5"]).expect("legal by itself");
        assert!(burst.check(["a"].into_iter()).is_err(), "no disk has a limit");
    }
}
