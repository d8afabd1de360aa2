//! A rate that several threads keep to together, without a lock: it says when the next one may pass.
//!
//! It is the token bucket of other block layers, kept as one number: the time at which the bucket would
//! be full again (the "generic cell rate algorithm"). Whoever wants to pass takes its tokens at once, if
//! need be before they are there, and is told when they will be. So those who wait have an order, that of
//! their asking, and nobody is overtaken for ever.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Units of time in a nanosecond: at ten million a second, rounding takes less than a thousandth.
const TICKS: u64 = 16;
const TICKS_PER_SECOND: u64 = 1_000_000_000 * TICKS;

/// A time since the beginning of whoever counts it; lasts for 36 years.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Ticks(u64);

impl Ticks {
    /// Not more than `elapsed`.
    pub(super) fn from_elapsed(elapsed: Duration) -> Self {
        let ticks = elapsed.as_nanos().saturating_mul(TICKS.into());
        Self(u64::try_from(ticks).unwrap_or(u64::MAX))
    }

    /// Not less than these ticks.
    pub(super) fn to_elapsed(self) -> Duration {
        Duration::from_nanos(self.0.div_ceil(TICKS))
    }
}

/// A rate, and how much of what was not used may be made up for at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate {
    /// So many in a second.
    pub(crate) per_second: NonZeroU64,
    /// So many at once, after a pause that was long enough.
    pub(crate) burst: NonZeroU64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Bucket {
    per_second: NonZeroU64,
    /// How long an empty bucket takes to be full.
    depth: u64,
    /// When the bucket is full, if nobody takes any more.
    full_at: AtomicU64,
}

impl Bucket {
    /// A full one.
    pub(super) fn new(rate: Rate) -> Self {
        let Rate { per_second, burst } = rate;
        Self {
            per_second,
            // Rounded down, unlike the cost of what passes, so that rounding never lets more through.
            depth: ticks(burst.get(), per_second, u128::div_euclid),
            full_at: AtomicU64::new(0),
        }
    }

    /// Takes `amount`, and says when it may pass: `now`, or later. In any period, no more passes than what
    /// the rate allows for it and a burst; or than one that is larger than a burst, which passes when the
    /// bucket is full and has those after it wait the longer.
    pub(super) fn reserve(&self, now: Ticks, amount: u64) -> Ticks {
        let cost = ticks(amount, self.per_second, u128::div_ceil);
        let mut full_at = self.full_at.load(Ordering::Relaxed);
        loop {
            let passes = full_at
                .saturating_add(cost.min(self.depth))
                .saturating_sub(self.depth)
                .max(now.0);
            let after = full_at.max(now.0).saturating_add(cost);
            match self.full_at.compare_exchange_weak(
                full_at,
                after,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ticks(passes),
                Err(other) => full_at = other,
            }
        }
    }
}

/// How long `amount` takes at a rate.
fn ticks(amount: u64, per_second: NonZeroU64, divide: fn(u128, u128) -> u128) -> u64 {
    let ticks = u128::from(amount) * u128::from(TICKS_PER_SECOND);
    u64::try_from(divide(ticks, per_second.get().into())).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(per_second: u64, burst: u64) -> Bucket {
        Bucket::new(Rate {
            per_second: NonZeroU64::new(per_second).unwrap(),
            burst: NonZeroU64::new(burst).unwrap(),
        })
    }

    fn micros(ticks: Ticks) -> u64 {
        ticks.0 / (TICKS * 1000)
    }

    fn at(micros: u64) -> Ticks {
        Ticks(micros * TICKS * 1000)
    }

    #[test]
    fn what_passes_when_follows_from_rate_and_burst() {
        // Rate, burst, and those who come: when, how many, when they pass.
        type Comer = (u64, u64, u64);
        let table: [(u64, u64, &[Comer]); 6] = [
            // One at a time.
            (
                1000,
                1,
                &[
                    (0, 1, 0),
                    (0, 1, 1000),
                    (0, 1, 2000),
                    (9000, 1, 9000),
                    (9000, 1, 10_000),
                ],
            ),
            // A burst, then the rate; after a pause a part of the burst.
            (
                1000,
                3,
                &[
                    (0, 1, 0),
                    (0, 1, 0),
                    (0, 1, 0),
                    (0, 1, 1000),
                    (0, 1, 2000),
                    (4000, 1, 4000),
                    (4000, 1, 4000),
                    (4000, 1, 5000),
                ],
            ),
            // A long pause is no more than a burst.
            (
                1000,
                2,
                &[
                    (60_000_000, 1, 60_000_000),
                    (60_000_000, 1, 60_000_000),
                    (60_000_000, 1, 60_001_000),
                ],
            ),
            // One larger than a burst passes a full bucket, and the next ones pay for it.
            (
                1000,
                4,
                &[(0, 10, 0), (0, 1, 7000), (0, 10, 11_000), (0, 4, 21_000)],
            ),
            // Of different sizes, nobody overtakes.
            (
                1_000_000,
                100,
                &[
                    (0, 60, 0),
                    (0, 60, 20),
                    (0, 1, 21),
                    (0, 100, 121),
                    (500, 1, 500),
                ],
            ),
            // Nothing is free.
            (1000, 1, &[(0, 0, 0), (0, 1, 0), (0, 0, 0), (0, 1, 1000)]),
        ];
        for (per_second, burst, comers) in table {
            let bucket = bucket(per_second, burst);
            for &(now, amount, passes) in comers {
                let told = micros(bucket.reserve(at(now), amount));
                assert_eq!(
                    told, passes,
                    "{amount} at {now} µs, {per_second} a second, {burst} at once"
                );
            }
        }
    }

    #[test]
    fn times_are_rounded_away_from_too_early() {
        for nanos in [0, 1, 999, 1_000_000_007, u64::MAX / TICKS] {
            let elapsed = Duration::from_nanos(nanos);
            let ticks = Ticks::from_elapsed(elapsed);
            assert_eq!(ticks.to_elapsed(), elapsed);
            assert!(Ticks(ticks.0 + 1).to_elapsed() > elapsed);
        }
        assert_eq!(Ticks::from_elapsed(Duration::MAX), Ticks(u64::MAX));
    }

    #[test]
    fn a_sum_that_no_clock_will_see_is_the_end_of_time_and_not_its_beginning() {
        let bucket = bucket(1, 1);
        bucket.reserve(Ticks(0), u64::MAX);
        for amount in [u64::MAX, 1] {
            let passes = bucket.reserve(Ticks(5), amount);
            assert!(passes.0 >= u64::MAX - TICKS_PER_SECOND, "{passes:?}");
        }
    }

    #[test]
    fn several_threads_together_keep_to_the_rate() {
        let bucket = bucket(1000, 10);
        let mut passes: Vec<Ticks> = std::thread::scope(|scope| {
            let reserve = || {
                (0..1000)
                    .map(|_| bucket.reserve(Ticks(0), 1))
                    .collect::<Vec<_>>()
            };
            let threads = [(); 4].map(|()| scope.spawn(reserve));
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        passes.sort();
        let expected = (0..4000_u64).map(|number| at(number.saturating_sub(9) * 1000));
        assert!(passes.into_iter().eq(expected));
    }

    proptest! {
        #[test]
        fn in_any_period_no_more_passes_than_the_rate_and_a_burst_and_nobody_waits_for_nothing(
            per_second in 1..5_000_000_000_u64,
            burst in 1..1_000_000_u64,
            comers in prop::collection::vec((0..50_000_000_u64, 1..2_000_000_u64), 1..60),
        ) {
            let bucket = bucket(per_second, burst);
            let largest = comers.iter().map(|&(_, amount)| amount).max().unwrap_or(0);
            let most = u128::from(burst.max(largest));
            let mut now = 0;
            let mut passed: Vec<(u64, u64)> = Vec::new();
            for (pause, amount) in comers {
                now += pause;
                let Ticks(passes) = bucket.reserve(Ticks(now), amount);
                prop_assert!(passes >= now);
                let last = passed.last().map_or(0, |&(last, _)| last);
                prop_assert!(passes >= last, "it overtakes");
                passed.push((passes, amount));
                let mut sum = 0;
                let mut needed = false;
                for &(from, amount) in passed.iter().rev() {
                    sum += u128::from(amount);
                    let period = u128::from(passes - from) * u128::from(per_second);
                    // In units of ticks a second, so that nothing is rounded here.
                    let room = period + most * u128::from(TICKS_PER_SECOND);
                    prop_assert!(sum * u128::from(TICKS_PER_SECOND) <= room, "{sum} in {period}");
                    // A little earlier it would have been too many; ticks and rounded costs are not counted.
                    let slack = u128::from(per_second) * (passed.len() as u128 + 2);
                    let full = u128::from(burst.min(amount)).max(1);
                    needed |= sum * u128::from(TICKS_PER_SECOND) + slack + full
                        >= period + u128::from(burst) * u128::from(TICKS_PER_SECOND);
                }
                prop_assert!(passes == now || needed, "it waits until {passes} for nothing");
            }
        }
    }
}
