//! The options that limit what a disk does in a second, and what they ask for.

use std::num::NonZeroU64;

use clap::{Args, value_parser};

use crate::config::Size;
use crate::limits;
use crate::worker::rate::Rate;
use crate::worker::throttle::{Limit, Rates};

const HEADING: &str = "Rate limits";

/// Limits of a disk.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct RateArgs {
    /// Requests in a second; others wait in the guest's queues. Flushes are not counted
    #[arg(long, help_heading = HEADING, value_name = "N", value_parser = value_parser!(u64).range(limits::IOPS))]
    iops: Option<u64>,
    /// Reads in a second
    #[arg(long, help_heading = HEADING, value_name = "N", value_parser = value_parser!(u64).range(limits::IOPS))]
    read_iops: Option<u64>,
    /// Writes, discards and write-zeroes in a second
    #[arg(long, help_heading = HEADING, value_name = "N", value_parser = value_parser!(u64).range(limits::IOPS))]
    write_iops: Option<u64>,
    /// Requests at once after a pause, for each of these limits [default: a tenth of a second's]
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "N",
        value_parser = value_parser!(u64).range(limits::IOPS)
    )]
    iops_burst: Option<u64>,
    /// Bytes read and written in a second, as in 100M
    #[arg(long, help_heading = HEADING, value_name = "SIZE", value_parser = parse_bandwidth)]
    bandwidth: Option<Size>,
    /// Bytes read in a second
    #[arg(long, help_heading = HEADING, value_name = "SIZE", value_parser = parse_bandwidth)]
    read_bandwidth: Option<Size>,
    /// Bytes written in a second
    #[arg(long, help_heading = HEADING, value_name = "SIZE", value_parser = parse_bandwidth)]
    write_bandwidth: Option<Size>,
    /// Bytes at once after a pause, for each of these limits [default: a tenth of a second's]; a request
    /// that is larger passes all the same, and the next wait the longer
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "SIZE",
        value_parser = parse_bandwidth
    )]
    bandwidth_burst: Option<Size>,
}

impl RateArgs {
    /// # Errors
    /// Names a burst of something that has no limit.
    pub(super) fn check(&self) -> Result<(), String> {
        let limits = [self.iops, self.read_iops, self.write_iops];
        if let (Some(burst), [None, None, None]) = (self.iops_burst, limits) {
            return Err(format!(
                "--iops-burst {burst} limits nothing by itself; add --iops, --read-iops or --write-iops"
            ));
        }
        let limits = [self.bandwidth, self.read_bandwidth, self.write_bandwidth];
        if let (Some(burst), [None, None, None]) = (self.bandwidth_burst, limits) {
            return Err(format!(
                "--bandwidth-burst {burst} limits nothing by itself; add --bandwidth, \
                 --read-bandwidth or --write-bandwidth"
            ));
        }
        Ok(())
    }

    /// The limits, with bursts.
    pub(crate) fn rates(&self) -> Rates {
        let requests = |per_second| rate(per_second, self.iops_burst);
        let bytes = |per_second: Option<Size>| {
            rate(
                per_second.map(Size::bytes),
                self.bandwidth_burst.map(Size::bytes),
            )
        };
        Rates {
            requests: Limit {
                total: requests(self.iops),
                reads: requests(self.read_iops),
                writes: requests(self.write_iops),
            },
            bytes: Limit {
                total: bytes(self.bandwidth),
                reads: bytes(self.read_bandwidth),
                writes: bytes(self.write_bandwidth),
            },
        }
    }
}

fn rate(per_second: Option<u64>, burst: Option<u64>) -> Option<Rate> {
    let per_second = NonZeroU64::new(per_second?)?;
    let burst = burst.unwrap_or(per_second.get() / limits::BURSTS_PER_SECOND);
    let burst = NonZeroU64::new(burst).unwrap_or(NonZeroU64::MIN);
    Some(Rate { per_second, burst })
}

fn parse_bandwidth(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|_| {
        format!(
            "write bytes, or a number with K, M, G or T, as in 100M; at least {}",
            least()
        )
    })?;
    match size.bytes() < limits::BANDWIDTH_MIN {
        true => Err(format!("write at least {}, the size of a page", least())),
        false => Ok(size),
    }
}

fn least() -> String {
    format!("{}K", limits::BANDWIDTH_MIN >> 10)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        rates: RateArgs,
    }

    fn parse(args: &[&str]) -> Result<Rates, String> {
        let line = Line::try_parse_from([&["disk"], args].concat());
        let Line { rates } = line.map_err(|error| error.to_string())?;
        rates.check().map(|()| rates.rates())
    }

    fn limit(per_second: u64, burst: u64) -> Option<Rate> {
        rate(Some(per_second), Some(burst))
    }

    #[test]
    fn nothing_is_limited_unless_asked_for() {
        assert_eq!(parse(&[]), Ok(Rates::default()));
    }

    #[test]
    fn each_limit_is_what_its_option_says_and_bursts_are_a_tenth_of_a_second() {
        let rates = parse(&[
            "--iops=1000",
            "--read-iops=5",
            "--write-iops=600",
            "--bandwidth=10M",
            "--read-bandwidth=2G",
            "--write-bandwidth=4096",
        ]);
        let expected = Rates {
            requests: Limit {
                total: limit(1000, 100),
                reads: limit(5, 1),
                writes: limit(600, 60),
            },
            bytes: Limit {
                total: limit(10 << 20, 1 << 20),
                reads: limit(2 << 30, (2 << 30) / 10),
                writes: limit(4096, 409),
            },
        };
        assert_eq!(rates, Ok(expected));
    }

    #[test]
    fn a_burst_is_for_all_limits_of_its_kind_and_for_none_that_is_not_there() {
        let rates = parse(&["--read-iops=10", "--iops-burst=500", "--write-bandwidth=1M"]);
        let expected = Rates {
            requests: Limit {
                reads: limit(10, 500),
                ..Limit::default()
            },
            bytes: Limit {
                writes: limit(1 << 20, (1 << 20) / 10),
                ..Limit::default()
            },
        };
        assert_eq!(rates, Ok(expected));
        for (args, named) in [
            (&["--iops-burst=5"][..], "--write-iops"),
            (&["--iops-burst=5", "--bandwidth=1M"], "--read-iops"),
            (&["--bandwidth-burst=1M", "--iops=1"], "--write-bandwidth"),
        ] {
            let error = parse(args).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
