//! How long a lane goes on looking for work before it lets its thread sleep.
//!
//! A sleep costs the time that it takes to be woken, and the processor what that takes. So where the
//! next request came soon after the last answer, a lane looks again for a while, as QEMU's
//! I/O threads do: the time doubles as long as work comes within the most that was allowed, and is
//! nothing again as soon as it does not.

use std::time::{Duration, Instant};

/// The first time that is tried.
const FIRST: Duration = Duration::from_micros(4);

/// See the module.
#[derive(Debug)]
pub(super) struct Patience {
    most: Duration,
    now: Duration,
    /// When there was nothing more to do.
    idle_since: Option<Instant>,
}

impl Patience {
    /// For at most this long; zero never waits.
    pub(super) fn new(most: Duration) -> Self {
        Self {
            most,
            now: Duration::ZERO,
            idle_since: None,
        }
    }

    /// There was work.
    pub(super) fn worked(&mut self, clock: impl FnOnce() -> Instant) {
        let Some(since) = self.idle_since.take() else {
            return;
        };
        let idle = clock().saturating_duration_since(since);
        if idle > self.most {
            self.now = Duration::ZERO;
        } else if idle > self.now {
            self.now = (self.now * 2).max(FIRST).min(self.most);
        }
    }

    /// There is nothing to do. True to look again, false to sleep.
    pub(super) fn look_again(&mut self, clock: impl FnOnce() -> Instant) -> bool {
        if self.most.is_zero() {
            return false;
        }
        let now = clock();
        let since = *self.idle_since.get_or_insert(now);
        now.saturating_duration_since(since) < self.now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Virtual time in microseconds.
    struct Clock(Instant);

    impl Clock {
        fn at(&self, micros: u64) -> Instant {
            self.0 + Duration::from_micros(micros)
        }
    }

    /// The lane became idle at `from`; work came at `to`. True when it was found by looking.
    fn pause(patience: &mut Patience, clock: &Clock, from: u64, to: u64) -> bool {
        let found = (from..to).all(|now| patience.look_again(|| clock.at(now)));
        patience.worked(|| clock.at(to));
        found
    }

    #[test]
    fn pauses_that_fit_are_looked_through_after_a_few_and_one_that_does_not_ends_that() {
        let clock = Clock(Instant::now());
        let mut patience = Patience::new(Duration::from_micros(32));
        let found: Vec<bool> = (0..6)
            .map(|round| pause(&mut patience, &clock, round * 100, round * 100 + 20))
            .collect();
        assert_eq!(found, [false, false, false, false, true, true]);
        assert!(
            !pause(&mut patience, &clock, 1000, 1040),
            "longer than allowed"
        );
        assert!(!patience.look_again(|| clock.at(2000)), "sleeps at once");
    }

    #[test]
    fn the_time_never_exceeds_what_was_allowed() {
        let clock = Clock(Instant::now());
        let mut patience = Patience::new(Duration::from_micros(10));
        for round in 0..20 {
            pause(&mut patience, &clock, round * 100, round * 100 + 9);
        }
        assert!(patience.look_again(|| clock.at(5000)));
        assert!(patience.look_again(|| clock.at(5009)));
        assert!(!patience.look_again(|| clock.at(5010)));
    }

    #[test]
    fn without_permission_the_clock_is_never_asked() {
        let mut patience = Patience::new(Duration::ZERO);
        assert!(!patience.look_again(|| unreachable!("no time is needed")));
        patience.worked(|| unreachable!("no time is needed"));
    }
}
