//! Medians, spreads and percentiles.

/// What several rounds measured of one thing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Summary {
    /// The middle one.
    pub(crate) median: f64,
    /// Half of the distance between the least and the greatest, in percent of the median.
    pub(crate) spread: f64,
    /// Where the median of many more rounds would lie, in at least 95 of 100 runs; from the least to the
    /// greatest where there are too few to say more.
    pub(crate) interval: (f64, f64),
}

/// The summary of some values; none of none.
pub(crate) fn summarize(values: impl IntoIterator<Item = f64>) -> Option<Summary> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let (first, last) = (*values.first()?, *values.last()?);
    let middle = values.len() / 2;
    let median = if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    };
    let spread = if median == 0.0 {
        0.0
    } else {
        (last - first) / 2.0 / median * 100.0
    };
    let outside = outside(values.len());
    Some(Summary {
        median,
        spread,
        interval: (values[outside], values[values.len() - 1 - outside]),
    })
}

/// How many of `count` values may be left out at either end, so that the rest spans the true median with a
/// probability of 95 percent. Each value is above it or below with the same probability, whatever the values
/// are like, so the number below is binomially distributed.
fn outside(count: usize) -> usize {
    // The probability of so many below, and of at most so many.
    let mut exactly = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut at_most = 0.0;
    for below in 0..count {
        at_most += exactly;
        if at_most > 0.025 {
            return below.saturating_sub(1).min(count.saturating_sub(1) / 2);
        }
        exactly *= (count - below) as f64 / (below + 1) as f64;
    }
    0
}

/// Buckets for each doubling: a value is known to less than one percent.
const PER_OCTAVE: usize = 64;
const OCTAVES: usize = 40;

/// Times of requests in nanoseconds, counted in buckets whose width grows with the value.
#[derive(Debug, Clone)]
pub(crate) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
}

impl Histogram {
    /// Nothing counted yet.
    pub(crate) fn new() -> Self {
        Self {
            buckets: vec![0; PER_OCTAVE * OCTAVES],
            count: 0,
        }
    }

    /// Counts a value.
    pub(crate) fn add(&mut self, value: u64) {
        let last = self.buckets.len() - 1;
        self.buckets[bucket(value).min(last)] += 1;
        self.count += 1;
    }

    /// Values counted.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The value that this part of all values does not exceed; 0 when there is none.
    pub(crate) fn quantile(&self, part: f64) -> f64 {
        let rank = ((self.count as f64 * part).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle(index);
            }
        }
        0.0
    }
}

/// Below [`PER_OCTAVE`] each value has a bucket; above, the leading bits choose it.
fn bucket(value: u64) -> usize {
    let doublings = value.max(1).ilog2().saturating_sub(PER_OCTAVE.ilog2());
    doublings as usize * PER_OCTAVE + (value >> doublings) as usize
}

/// The middle of a bucket.
fn middle(index: usize) -> f64 {
    if index < 2 * PER_OCTAVE {
        return index as f64;
    }
    let doublings = index / PER_OCTAVE - 1;
    let width = (1_u64 << doublings) as f64;
    (index - doublings * PER_OCTAVE) as f64 * width + (width - 1.0) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_and_the_spread_half_the_range() {
        assert_eq!(summarize([]), None);
        let summary = |values: &[f64]| summarize(values.iter().copied()).expect("values");
        assert_eq!(summary(&[7.0]).median, 7.0);
        assert_eq!(summary(&[7.0]).spread, 0.0);
        assert_eq!(summary(&[30.0, 10.0, 20.0]).median, 20.0);
        assert_eq!(summary(&[30.0, 10.0, 20.0]).spread, 50.0);
        assert_eq!(summary(&[4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert_eq!(summary(&[0.0, 0.0]).spread, 0.0);
    }

    #[test]
    fn the_interval_of_a_median_leaves_out_what_a_sign_test_does() {
        // From tables of the binomial distribution: the k-th smallest and the k-th largest.
        for (count, kth) in [(5, 1), (6, 1), (9, 2), (15, 4), (20, 6), (25, 8), (41, 14)] {
            assert_eq!(outside(count), kth - 1, "of {count}");
        }
        let summary = summarize((1..=15).map(f64::from)).expect("values");
        assert_eq!((summary.median, summary.interval), (8.0, (4.0, 12.0)));
        let summary = summarize([2.0, 1.0]).expect("values");
        assert_eq!(summary.interval, (1.0, 2.0));
    }

    #[test]
    fn a_value_is_known_to_less_than_one_percent() {
        for value in (1..40).map(|bits| (1_u64 << bits) + (1 << bits) / 3) {
            let mut histogram = Histogram::new();
            histogram.add(value);
            let shown = histogram.quantile(0.5);
            let error = (shown - value as f64).abs() / value as f64;
            assert!(error < 0.01, "{value} is shown as {shown}");
        }
    }

    #[test]
    fn buckets_rise_with_the_value() {
        let mut last = 0;
        for value in 0..100_000 {
            let bucket = bucket(value);
            assert!(bucket == last || bucket == last + 1, "{value}");
            last = bucket;
        }
    }

    #[test]
    fn quantiles_count_values() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.quantile(0.5), 0.0);
        (1..=100).for_each(|value| histogram.add(value));
        assert_eq!(histogram.count(), 100);
        assert_eq!(histogram.quantile(0.5), 50.0);
        assert_eq!(histogram.quantile(0.99), 99.0);
        assert_eq!(histogram.quantile(1.0), 100.0);
        histogram.add(u64::MAX);
        assert!(histogram.quantile(1.0) > 1e12);
    }
}
