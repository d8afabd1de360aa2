//! Finds out that a command is outstanding for too long, without a clock for each: commands are counted by the quarter
//! of the time-out in which they were submitted.
//!
//! Of the quarters before the last four, none may have a command left. So a command is found when it is as old as the
//! time-out, or up to a quarter later.

use std::time::{Duration, Instant};

/// Quarters that are told apart: more than are ever in use.
const BUCKETS: usize = 8;
/// After so many more, a command is overdue.
const OVERDUE: u8 = 5;
/// Where a token has the quarter.
const SHIFT: u32 = 48;

/// The quarters of one lane.
#[derive(Debug)]
pub(super) struct Quarters {
    /// How long one is; `None` when nothing is ever overdue.
    length: Option<Duration>,
    now: u8,
    /// When the next begins.
    next: Option<Instant>,
}

/// The commands outstanding on one queue pair.
#[derive(Debug, Default)]
pub(super) struct Outstanding([u32; BUCKETS]);

impl Quarters {
    /// Of this time-out; zero is none.
    pub(super) fn new(timeout: Duration) -> Self {
        Self {
            length: (!timeout.is_zero()).then(|| (timeout / 4).max(Duration::from_millis(1))),
            now: 0,
            next: None,
        }
    }

    /// Something is outstanding, or not. Gives when to call [`Self::pass`].
    pub(super) fn deadline(&self, outstanding: bool) -> Option<Instant> {
        self.next.filter(|_| outstanding)
    }

    /// Begins the next quarter if it is time. True then; and some commands may be overdue.
    pub(super) fn pass(&mut self, clock: impl FnOnce() -> Instant) -> bool {
        let Some(length) = self.length else {
            return false;
        };
        let now = clock();
        if self.next.is_some_and(|next| now < next) {
            return false;
        }
        let first = self.next.is_none();
        self.next = now.checked_add(length);
        if !first {
            self.now = (self.now + 1) % BUCKETS as u8;
        }
        !first
    }

    /// No quarter was ever begun.
    pub(super) fn stands_still(&self) -> bool {
        self.length.is_some() && self.next.is_none()
    }

    /// A token that says when its command was submitted, counted in `outstanding`.
    pub(super) fn stamp(&self, token: u64, outstanding: &mut Outstanding) -> u64 {
        outstanding.0[usize::from(self.now)] += 1;
        token | u64::from(self.now) << SHIFT
    }

    /// A command is outstanding for longer than the time-out.
    pub(super) fn is_overdue(&self, outstanding: &Outstanding) -> bool {
        let oldest = (self.now + BUCKETS as u8 - OVERDUE) % BUCKETS as u8;
        self.length.is_some() && outstanding.0[usize::from(oldest)] > 0
    }
}

impl Outstanding {
    /// A command has come back. Gives its token as it was before.
    pub(super) fn settle(&mut self, token: u64) -> u64 {
        let count = &mut self.0[(token >> SHIFT) as usize % BUCKETS];
        *count = count.saturating_sub(1);
        token & ((1 << SHIFT) - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(8);
    const QUARTER: Duration = Duration::from_secs(2);

    #[test]
    fn a_command_is_overdue_after_the_timeout_and_at_most_a_quarter_later() {
        let begin = Instant::now();
        let mut quarters = Quarters::new(TIMEOUT);
        assert!(quarters.stands_still() && !quarters.pass(|| begin));
        for offset in [
            Duration::ZERO,
            QUARTER / 2,
            QUARTER - Duration::from_millis(1),
        ] {
            let mut outstanding = Outstanding::default();
            let base = quarters.deadline(true).unwrap() - QUARTER;
            let submitted = base + offset;
            let token = quarters.stamp(7, &mut outstanding);
            let mut found = None;
            for step in 1..=8 {
                let now = base + QUARTER * step;
                assert!(quarters.pass(|| now));
                if quarters.is_overdue(&outstanding) {
                    found = Some(now - submitted);
                    break;
                }
            }
            let age = found.unwrap();
            assert!(age >= TIMEOUT && age <= TIMEOUT + QUARTER, "{age:?}");
            assert_eq!(outstanding.settle(token), 7);
            assert!(!quarters.is_overdue(&outstanding));
        }
    }

    #[test]
    fn what_comes_back_in_time_is_never_overdue_however_often_the_quarters_come_round() {
        let mut now = Instant::now();
        let mut quarters = Quarters::new(TIMEOUT);
        let mut outstanding = Outstanding::default();
        let mut under_way = std::collections::VecDeque::new();
        for step in 0..100u64 {
            quarters.pass(|| now);
            under_way.push_back((quarters.stamp(step, &mut outstanding), step));
            if under_way.len() > 4 {
                let (token, step) = under_way.pop_front().unwrap();
                assert_eq!(outstanding.settle(token), step);
            }
            assert!(!quarters.is_overdue(&outstanding), "{step}");
            now += QUARTER;
        }
    }

    #[test]
    fn without_a_timeout_nothing_is_overdue_and_nothing_is_waited_for() {
        let mut quarters = Quarters::new(Duration::ZERO);
        let mut outstanding = Outstanding::default();
        quarters.stamp(1, &mut outstanding);
        for _ in 0..20 {
            assert!(!quarters.pass(Instant::now) && !quarters.is_overdue(&outstanding));
        }
        assert_eq!(quarters.deadline(true), None);
        assert!(!quarters.stands_still());
    }
}
