//! How long a lane goes on looking for work before it lets its thread sleep.
//!
//! A sleep costs the time that it takes to be woken, and the processor what that takes. So where the
//! next request mostly comes soon after the last answer, a lane looks again for a while. Where it mostly comes
//! later, or now sooner and now later, looking costs more than it saves, and a lane sleeps at once.

use std::time::{Duration, Instant};

/// Of the last pauses, those that have to have been short enough for the next one to be looked through.
const WORTH_IT: u32 = 13;

/// See the module.
#[derive(Debug)]
pub(super) struct Patience {
    most: Duration,
    /// The last sixteen pauses, one bit for each that was short enough.
    short: u16,
    /// When there was nothing more to do.
    idle_since: Option<Instant>,
}

impl Patience {
    /// For at most this long; zero never waits.
    pub(super) fn new(most: Duration) -> Self {
        Self {
            most,
            short: 0,
            idle_since: None,
        }
    }

    /// There was work.
    pub(super) fn worked(&mut self, clock: impl FnOnce() -> Instant) {
        let Some(since) = self.idle_since.take() else {
            return;
        };
        let idle = clock().saturating_duration_since(since);
        self.short = self.short << 1 | u16::from(idle <= self.most);
    }

    /// There is nothing to do. True to look again, false to sleep.
    pub(super) fn look_again(&mut self, clock: impl FnOnce() -> Instant) -> bool {
        if self.most.is_zero() {
            return false;
        }
        let now = clock();
        let since = *self.idle_since.get_or_insert(now);
        self.short.count_ones() >= WORTH_IT && now.saturating_duration_since(since) < self.most
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
    fn pauses_are_looked_through_where_most_of_them_were_short() {
        let clock = Clock(Instant::now());
        let mut patience = Patience::new(Duration::from_micros(32));
        let short = |patience: &mut Patience, round: u64| {
            pause(patience, &clock, round * 100, round * 100 + 20)
        };
        let long = |patience: &mut Patience, round: u64| {
            pause(patience, &clock, round * 100, round * 100 + 40)
        };
        let found: Vec<bool> = (0..15).map(|round| short(&mut patience, round)).collect();
        assert_eq!(found, [[false; 13].as_slice(), &[true; 2]].concat());
        // Three in sixteen may be longer.
        for round in 15..18 {
            assert!(!long(&mut patience, round), "longer than allowed");
            assert!(short(&mut patience, 20 + round));
        }
        long(&mut patience, 50);
        assert!(!short(&mut patience, 51), "not worth it any more");
    }

    #[test]
    fn pauses_that_are_now_short_and_now_long_are_slept_through() {
        let clock = Clock(Instant::now());
        let mut patience = Patience::new(Duration::from_micros(32));
        for round in 0..100 {
            let end = round * 1000 + if round % 3 == 0 { 500 } else { 5 };
            assert!(!pause(&mut patience, &clock, round * 1000, end));
        }
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
