//! Numbers attempts at something that several requests wait for, so that whoever waited for one that
//! failed learns why, and nobody who came later does.

use cowbell_engine::mutant;
use cowbell_engine::units::Errno;

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Attempts {
    latest: u32,
    failed: Option<(u32, Errno)>,
}

impl Attempts {
    /// Another one is asked for.
    pub fn begin(&mut self) {
        self.latest = self.latest.wrapping_add(1);
    }

    /// The number of the latest. Whoever waits keeps it, to ask [`Attempts::failure_of`].
    pub fn latest(&self) -> u32 {
        self.latest
    }

    /// The latest has failed.
    pub fn failed(&mut self, errno: Errno) {
        self.failed = Some((self.latest, errno));
    }

    /// Why attempt number `attempt`, or one after it, failed; `None` if none did.
    pub fn failure_of(&self, attempt: u32) -> Option<Errno> {
        // Wrapping: those that somebody waits for are close together.
        let since = |failed: u32| {
            failed.wrapping_sub(attempt) < u32::MAX / 2 || mutant!("failed_attempt_told_for_ever")
        };
        self.failed.and_then(|(failed, errno)| since(failed).then_some(errno))
    }
}

#[cfg(test)]
mod tests {
    use super::Attempts;
    use cowbell_engine::units::Errno;

    #[test]
    fn a_failure_is_told_to_those_who_waited_for_it() {
        let mut attempts = Attempts::default();
        attempts.begin();
        let first = attempts.latest();
        assert_eq!(attempts.failure_of(first), None);
        attempts.failed(Errno::IO);
        assert_eq!(attempts.failure_of(first), Some(Errno::IO));
        attempts.begin();
        assert_eq!(attempts.failure_of(attempts.latest()), None);
        attempts.failed(Errno::NO_SPACE);
        assert_eq!(attempts.failure_of(first), Some(Errno::NO_SPACE));
    }
}
