//! How long to wait before the next attempt: not at all, then longer and longer, never quite the same.
//!
//! An association that does not last is as good as an attempt that failed: the pauses begin anew only after one
//! that did.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::Duration;

/// The first pause.
const FIRST: Duration = Duration::from_secs(1);

/// An association that is lost earlier did not last.
const LASTING: Duration = Duration::from_secs(10);
/// Outages in a row, with nothing lasting between them, that are all logged.
const LOUD: u32 = 16;

/// The pauses between attempts.
#[derive(Debug)]
pub(crate) struct Backoff {
    /// None is longer.
    most: Duration,
    attempts: u32,
    /// Outages since an association has lasted.
    outages: u32,
    random: RandomState,
}

impl Backoff {
    /// Pauses of at most `most`.
    pub(crate) fn new(most: Duration) -> Self {
        Self {
            most,
            attempts: 0,
            outages: 0,
            random: RandomState::new(),
        }
    }

    /// An association was lost that was there for so long. True when that is worth a line in the log: of many in
    /// a row it is not always.
    pub(crate) fn lost(&mut self, after: Duration) -> bool {
        if after >= LASTING {
            (self.attempts, self.outages) = (0, 0);
        }
        self.outages = self.outages.saturating_add(1);
        self.outages <= LOUD || self.outages.is_power_of_two()
    }

    /// The pause before the next attempt: none, then a second, doubling up to the most, each shortened by up to
    /// a half, so that hosts that lost a controller together do not come back together.
    pub(crate) fn next(&mut self) -> Duration {
        let before = self.attempts;
        self.attempts = before.saturating_add(1);
        let Some(doublings) = before.checked_sub(1) else {
            return Duration::ZERO;
        };
        let full = FIRST.saturating_mul(2u32.saturating_pow(doublings));
        let full = full.min(self.most);
        let spread = full / 2;
        // Sixteen bits are random enough for a pause.
        let random = self.random.hash_one(before) as u16;
        full - spread * u32::from(random) / u32::from(u16::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_most_and_vary_by_half() {
        let mut seen = Vec::new();
        for _ in 0..20 {
            let mut backoff = Backoff::new(Duration::from_secs(5));
            assert_eq!(backoff.next(), Duration::ZERO);
            for most in [1, 2, 4, 5, 5, 5] {
                let most = Duration::from_secs(most);
                let pause = backoff.next();
                assert!(pause >= most / 2 && pause <= most, "{pause:?} of {most:?}");
                seen.push(pause);
            }
        }
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 60, "{} different pauses", seen.len());
    }

    #[test]
    fn they_begin_anew_after_an_association_that_lasted_and_only_then() {
        let mut backoff = Backoff::new(Duration::from_secs(60));
        assert!(backoff.lost(Duration::from_millis(1)));
        assert_eq!(backoff.next(), Duration::ZERO);
        for most in [1, 2, 4, 8] {
            assert!(backoff.lost(Duration::from_millis(1)));
            assert!(backoff.next() >= Duration::from_secs(most) / 2);
        }
        backoff.lost(LASTING);
        assert_eq!(backoff.next(), Duration::ZERO);
    }

    #[test]
    fn a_thousand_associations_that_do_not_last_leave_a_few_lines() {
        let mut backoff = Backoff::new(Duration::from_secs(1));
        let lines = (0..1000).filter(|_| backoff.lost(Duration::ZERO)).count();
        assert_eq!(lines, 16 + 5);
    }

    #[test]
    fn they_go_on_for_ever() {
        let mut backoff = Backoff::new(Duration::from_secs(3600));
        for _ in 0..10_000 {
            backoff.next();
        }
        backoff.attempts = u32::MAX - 1;
        for _ in 0..3 {
            assert!(backoff.next() <= Duration::from_secs(3600));
        }
    }
}
