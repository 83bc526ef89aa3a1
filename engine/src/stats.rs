//! Counters that stay on: where requests spend their time, and how long the loop is held.

use crate::op::{Op, OpKind, Target};
use crate::request::{Io, IoKind};
use crate::units::{Errno, Time};
use crate::wait::On;

/// Counts of values in logarithmic buckets, 16 to each power of two: 6 % wide at worst.
///
/// Values are nanoseconds wherever the engine uses it.
#[derive(Clone, Default)]
pub struct Histogram {
    /// Made when the first value is counted.
    buckets: Vec<u64>,
    max: u64,
    sum: u64,
}

const SUB_BITS: u32 = 4;
const BUCKETS: usize = (64 - SUB_BITS as usize + 1) << SUB_BITS;

impl Histogram {
    /// Counts `value`.
    #[inline]
    pub fn record(&mut self, value: u64) {
        self.record_times(value, 1);
    }

    /// Counts `value` so many times.
    #[inline]
    pub fn record_times(&mut self, value: u64, times: u64) {
        if self.buckets.is_empty() {
            self.buckets.resize(BUCKETS, 0);
        }
        self.buckets[bucket_of(value)] += times;
        self.max = self.max.max(value);
        self.sum = self.sum.wrapping_add(value.wrapping_mul(times));
    }

    /// Values counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The largest value, exactly.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// All values together; of what does not fit in 64 bits, the rest.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// The value that `per_mille` of 1000 values do not exceed, rounded up to its bucket's end
    /// (and never above the maximum). 0 when nothing was counted.
    pub fn quantile(&self, per_mille: u64) -> u64 {
        let rank = (self.count() * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return bucket_end(i).min(self.max);
            }
        }
        self.max
    }

    /// Adds what `other` counted.
    pub fn merge(&mut self, other: &Histogram) {
        self.buckets.resize(BUCKETS, 0);
        for (a, b) in self.buckets.iter_mut().zip(other.buckets.iter()) {
            *a += b;
        }
        self.max = self.max.max(other.max);
        self.sum = self.sum.wrapping_add(other.sum);
    }
}

impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (p50, p99) = (self.quantile(500), self.quantile(990));
        write!(f, "Histogram({} values, p50 {p50}, p99 {p99}, max {})", self.count(), self.max)
    }
}

#[inline]
fn bucket_of(value: u64) -> usize {
    let exponent = (u64::BITS - 1 - (value | 1).leading_zeros()).max(SUB_BITS) - SUB_BITS;
    ((exponent as usize) << SUB_BITS) + (value >> exponent) as usize
}

fn bucket_end(bucket: usize) -> u64 {
    if bucket < 2 << SUB_BITS {
        return bucket as u64;
    }
    let exponent = (bucket >> SUB_BITS) as u32 - 1;
    let mantissa = (bucket & ((1 << SUB_BITS) - 1)) as u64 + (1 << SUB_BITS);
    (mantissa << exponent) + ((1u64 << exponent) - 1)
}

/// Time and visits of one state.
#[derive(Clone, Copy, Debug, Default)]
pub struct StateStats {
    /// How often a request waited in it.
    pub visits: u64,
    /// How long they waited in all, in nanoseconds.
    pub nanos: u64,
}

impl StateStats {
    /// So many requests that entered the state at `entered` have left it.
    #[inline]
    pub(crate) fn record(&mut self, now: Time, entered: Time, requests: u64) {
        self.visits += requests;
        self.nanos += now.since(entered) * requests;
    }
}

/// Guests' requests that were passed on in one `run`, and have ended in this one: they are counted
/// together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    label: u8,
    submitted: Time,
    /// Writes and reads.
    requests: [u64; 2],
    bytes: [u64; 2],
}

impl Default for Ended {
    /// None.
    fn default() -> Ended {
        Ended { label: NO_LABEL, submitted: Time(0), requests: [0; 2], bytes: [0; 2] }
    }
}

/// No request's.
const NO_LABEL: u8 = u8::MAX;

impl Ended {
    /// One read or write of `len` bytes.
    pub(crate) fn of(label: u8, submitted: Time, is_read: bool, len: u64) -> Ended {
        let mut ended = Ended { label, submitted, ..Ended::default() };
        ended.add(is_read, len);
        ended
    }

    /// Is a request of these to be added?
    #[inline(always)]
    pub(crate) fn is_of(&self, label: u8, submitted: Time) -> bool {
        self.submitted == submitted && self.label == label
    }

    /// One more.
    #[inline(always)]
    pub(crate) fn add(&mut self, is_read: bool, len: u64) {
        self.requests[usize::from(is_read)] += 1;
        self.bytes[usize::from(is_read)] += len;
    }

    /// How many they are.
    pub(crate) fn requests(&self) -> u64 {
        self.requests[0] + self.requests[1]
    }
}

/// What the engine has counted of one node's requests, since it was added or since the last reset.
#[derive(Clone, Debug, Default)]
pub struct NodeStats {
    /// Requests that ended, however.
    pub requests: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// Reads that ended well, and their bytes.
    pub reads: u64,
    /// See [`NodeStats::reads`].
    pub bytes_read: u64,
    /// Writes that ended well, and their bytes; no zeroes, no discards.
    pub writes: u64,
    /// See [`NodeStats::writes`].
    pub bytes_written: u64,
    /// Of all that ended, as [`Stats::latency`].
    pub latency: Histogram,
}

impl NodeStats {
    /// They have ended well, now.
    pub(crate) fn record(&mut self, ended: Ended, now: Time) {
        let [writes, reads] = ended.requests;
        self.requests += writes + reads;
        (self.reads, self.writes) = (self.reads + reads, self.writes + writes);
        self.bytes_read += ended.bytes[1];
        self.bytes_written += ended.bytes[0];
        self.latency.record_times(now.since(ended.submitted), writes + reads);
    }

    /// A request has ended so, after so many nanoseconds.
    pub(crate) fn record_one(&mut self, io: &Io, result: Result<(), Errno>, nanos: u64) {
        self.requests += 1;
        self.latency.record(nanos);
        match (result, io.kind) {
            (Err(_), _) => self.failed += 1,
            (Ok(()), IoKind::Read) => {
                (self.reads, self.bytes_read) = (self.reads + 1, self.bytes_read + io.len);
            }
            (Ok(()), IoKind::Write { .. }) => {
                (self.writes, self.bytes_written) = (self.writes + 1, self.bytes_written + io.len);
            }
            (
                Ok(()),
                IoKind::Flush
                | IoKind::Zero { .. }
                | IoKind::Discard
                | IoKind::Truncate
                | IoKind::Status { .. },
            ) => {}
        }
    }
}

/// What a `run` was held by: one of its calls, or a batch of steps.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// For how long, in nanoseconds.
    pub nanos: u64,
    /// In what.
    pub call: Call,
    /// How many ops or events it was about.
    pub count: usize,
    /// The first op that was handed over: its kind, file, offset and length in bytes.
    pub first: Option<(OpKind, Target, u64, u64)>,
}

/// Where a `run` spends its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Stepping requests.
    Steps,
    /// Handing ops over: inside the backend's `submit`, so with native AIO inside `io_submit`.
    Submit,
}

/// States that can be told apart; a driver with more lumps the rest together.
pub const STATES_MAX: usize = 96;

/// What the engine has counted since it was made or since the last reset.
#[derive(Clone, Debug)]
pub struct Stats {
    /// From the `run` that first saw a guest's request to the `run` that finished it.
    pub latency: Histogram,
    /// Time inside one `run` call.
    pub run: Histogram,
    /// Time inside one `run` call divided by the ops it submitted; calls that submitted some.
    pub run_per_op: Histogram,
    /// What held a `run` for longest at a stretch.
    pub longest: Option<Held>,
    /// Waiting, by the driver's state labels (the index into `Driver::STATES`).
    pub states: [StateStats; STATES_MAX],
    /// Waiting on lists, by what was waited for, in the order of [`On::ALL`]. It is counted among the
    /// states as well.
    pub lists: [StateStats; On::ALL.len()],
    /// Flushes handed to the backend: far fewer than were asked for, when many ask at once.
    pub flushes: u64,
    /// Requests that went through a bounce buffer or a read-modify-write.
    pub bounced: u64,
}

impl Default for Stats {
    fn default() -> Stats {
        Stats {
            latency: Histogram::default(),
            run: Histogram::default(),
            run_per_op: Histogram::default(),
            longest: None,
            states: std::array::from_fn(|_| StateStats::default()),
            lists: std::array::from_fn(|_| StateStats::default()),
            flushes: 0,
            bounced: 0,
        }
    }
}

impl Stats {
    /// The running `run` was held for `nanos` by `call`, about `count` ops or events.
    #[inline]
    pub(crate) fn held_by(&mut self, nanos: u64, call: Call, count: usize, first: Option<&Op>) {
        if self.longest.is_none_or(|longest| longest.nanos < nanos) {
            let first = first.map(|op| (op.kind, op.target, op.offset, op.len));
            self.longest = Some(Held { nanos, call, count, first });
        }
    }

    /// They have ended, now. There are some.
    pub(crate) fn record(&mut self, ended: Ended, now: Time, measure: bool) {
        let Ended { label, submitted, .. } = ended;
        let requests = ended.requests();
        self.states[label as usize].record(now, submitted, requests);
        if measure {
            self.latency.record_times(now.since(submitted), requests);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_its_own_end_and_nothing_larger() {
        for value in (0..4096).chain([1 << 20, (1 << 20) + 1, u64::MAX / 3, u64::MAX]) {
            let bucket = bucket_of(value);
            assert!(bucket < BUCKETS, "{value}");
            let end = bucket_end(bucket);
            assert!(end >= value, "{value} in a bucket that ends at {end}");
            assert!(end - value <= value / 16, "{value} in a bucket that ends at {end}");
            assert_eq!(bucket_of(end), bucket);
            if end < u64::MAX {
                assert_eq!(bucket_of(end + 1), bucket + 1);
            }
        }
    }

    #[test]
    fn quantiles_are_the_ranked_values() {
        let mut h = Histogram::default();
        (1..=1000).for_each(|v| h.record(v));
        assert!((500..=532).contains(&h.quantile(500)), "{}", h.quantile(500));
        assert_eq!(h.quantile(1000), 1000);
        assert_eq!((h.max(), h.sum()), (1000, 500_500));
        h.merge(&h.clone());
        assert_eq!((h.count(), h.max(), h.sum()), (2000, 1000, 1_001_000));
    }
}
