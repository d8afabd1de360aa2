//! How fast events of one controller are taken: some at once, then few.

use std::time::Duration;

use tokio::time::Instant;

/// Events that are taken as they come, before there is a pause.
const AT_ONCE: u32 = 32;
/// Time for which one event more may be taken.
const EACH: Duration = Duration::from_millis(250);

/// A bucket that holds so many events, and gets one more each time.
#[derive(Debug)]
pub(super) struct Pace {
    /// When the bucket would be full.
    full_at: Instant,
    /// A pause was told since the bucket was last full.
    told: bool,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            full_at: now,
            told: false,
        }
    }

    /// Takes an event out. Returns how long to wait for it.
    pub(super) fn take(&mut self, now: Instant) -> Duration {
        if self.full_at <= now {
            self.full_at = now;
            self.told = false;
        }
        self.full_at += EACH;
        (self.full_at - now).saturating_sub(EACH * AT_ONCE)
    }

    /// Whether the pause is the first one since events came slowly.
    pub(super) fn is_news(&mut self) -> bool {
        !std::mem::replace(&mut self.told, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_through_and_a_storm_is_slowed() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..AT_ONCE {
            assert_eq!(pace.take(now), Duration::ZERO);
        }
        for _ in 0..10 {
            let pause = pace.take(now);
            assert_eq!(pause, EACH);
            now += pause;
        }
        assert!(pace.is_news() && !pace.is_news());
        now += EACH * AT_ONCE;
        assert_eq!(pace.take(now), Duration::ZERO);
        assert!(pace.is_news(), "a storm that comes again is told again");
    }
}
