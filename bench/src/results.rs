//! What a run measured, as it goes to JSON; and what follows from it.

use serde::Serialize;

use crate::calibration::Calibration;
use crate::counting::Counts;
use crate::placement::Placement;
use crate::statistics::{Summary, summarize};

/// A whole run.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
    pub(crate) placement: Placement,
    pub(crate) rounds: u32,
    pub(crate) seconds: f64,
    pub(crate) disk_bytes: u64,
    pub(crate) calibration: Vec<Calibration>,
    pub(crate) cells: Vec<Cell>,
    pub(crate) skipped: Vec<Skipped>,
}

/// Where it ran.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) processor: String,
    pub(crate) processors: usize,
    pub(crate) memory_mib: u64,
    /// Of the last minute, at the start.
    pub(crate) load_average: f64,
}

/// A contender that does not take part, or not to the end.
#[derive(Debug, Serialize)]
pub(crate) struct Skipped {
    pub(crate) contender: String,
    pub(crate) why: String,
}

/// One row of one contender.
#[derive(Debug, Serialize)]
pub(crate) struct Cell {
    pub(crate) row: String,
    pub(crate) contender: String,
    pub(crate) rounds: Vec<Measurement>,
    pub(crate) counts: Counts,
}

/// One round of a cell.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Measurement {
    pub(crate) iops: f64,
    /// Megabytes, of a million bytes, each second.
    pub(crate) mb_per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// User and system time of all processes of the contender for each request; unknown without their numbers.
    pub(crate) cpu_us: Option<f64>,
    /// The same of the process that serves the socket alone: of a bridge the host, without its target.
    pub(crate) device_cpu_us: Option<f64>,
}

impl Cell {
    /// One column over the rounds.
    pub(crate) fn summary(&self, of: impl Fn(&Measurement) -> Option<f64>) -> Option<Summary> {
        summarize(self.rounds.iter().filter_map(of))
    }
}

/// Something that is to be reached.
#[derive(Debug, Serialize, PartialEq)]
pub(crate) struct Goal {
    pub(crate) what: String,
    pub(crate) row: String,
    pub(crate) value: f64,
    /// See [`Summary::interval`].
    pub(crate) interval: (f64, f64),
    pub(crate) goal: String,
    pub(crate) reached: Reached,
}

/// What a run says of a goal.
#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reached {
    Yes,
    /// The median misses it by less than its own uncertainty.
    WithinNoise,
    No,
}

/// The bound of a goal.
#[derive(Debug, Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Goal {
    fn new(what: &str, row: &str, summary: Summary, bound: Bound) -> Self {
        let Summary {
            median, interval, ..
        } = summary;
        let (goal, reached, possible) = match bound {
            Bound::AtMost(most) => (format!("≤ {most}"), median <= most, interval.0 <= most),
            Bound::AtLeast(least) => (format!("≥ {least}"), median >= least, interval.1 >= least),
        };
        Self {
            what: what.to_owned(),
            row: row.to_owned(),
            value: median,
            interval,
            goal,
            reached: match (reached, possible) {
                (true, _) => Reached::Yes,
                (false, true) => Reached::WithinNoise,
                (false, false) => Reached::No,
            },
        }
    }
}

const BRIDGE_ROWS: [&str; 2] = ["randread-4k-d32", "randwrite-4k-d32"];
const BRIDGE_MOST: f64 = 3.0;
const DIGEST_ROWS: [&str; 2] = ["read-128k-d32", "write-128k-d32"];
const DIGEST_MOST: f64 = 1.35;
/// The contender with digests has to copy what it sends: the guest may change it meanwhile.
const DIGESTS: &str = "bridge-ram-digests";

impl Results {
    fn cell(&self, contender: &str, row: &str) -> Option<&Cell> {
        let mut cells = self.cells.iter();
        cells.find(|cell| cell.contender == contender && cell.row == row)
    }

    /// Round by round, so that what slows the machine down for a while slows both.
    fn ratio(
        &self,
        row: &str,
        [above, below]: [&str; 2],
        of: impl Fn(&Measurement) -> Option<f64>,
    ) -> Option<Summary> {
        let (above, below) = (self.cell(above, row)?, self.cell(below, row)?);
        let pairs = above.rounds.iter().zip(&below.rounds);
        summarize(pairs.filter_map(|(above, below)| Some(of(above)? / of(below)?)))
    }

    /// What is to be reached, as far as it was measured.
    pub(crate) fn goals(&self) -> Vec<Goal> {
        let mut goals = Vec::new();
        let mut add = |what: &str, row: &str, summary: Option<Summary>, bound: Bound| {
            goals.extend(summary.map(|summary| Goal::new(what, row, summary, bound)));
        };
        let mut rows: Vec<&str> = self.cells.iter().map(|cell| cell.row.as_str()).collect();
        rows.dedup();
        let file = ["serve-file", "qsd-file-io_uring"];
        for row in &rows {
            let iops = self.ratio(row, file, |m| Some(m.iops));
            let what = "IOPS, serve-file / qsd-file-io_uring";
            add(what, row, iops, Bound::AtLeast(1.0));
            let cpu = self.ratio(row, file, |m| m.cpu_us);
            let what = "CPU per I/O, serve-file / qsd-file-io_uring";
            add(what, row, cpu, Bound::AtMost(1.0));
        }
        for row in BRIDGE_ROWS {
            let cpu = self.ratio(row, ["bridge-ram", "relay"], |m| m.cpu_us);
            let what = "CPU per I/O, bridge-ram / relay";
            add(what, row, cpu, Bound::AtMost(BRIDGE_MOST));
        }
        for row in DIGEST_ROWS {
            let cpu = self.ratio(row, [DIGESTS, "bridge-ram"], |m| m.device_cpu_us);
            let what = "the host's CPU per I/O, bridge-ram-digests / bridge-ram";
            add(what, row, cpu, Bound::AtMost(DIGEST_MOST));
            let cpu = self.ratio(row, [DIGESTS, "bridge-ram"], |m| m.cpu_us);
            let what = "CPU per I/O, bridge-ram-digests / bridge-ram";
            add(what, row, cpu, Bound::AtMost(DIGEST_MOST));
        }
        let large = |cell: &&Cell| cell.row.contains("128k") && cell.contender != DIGESTS;
        for cell in self.cells.iter().filter(large) {
            let copied = summarize(cell.counts.copied_bytes);
            let what = format!("copied bytes per I/O, {}", cell.contender);
            add(&what, &cell.row, copied, Bound::AtMost(0.0));
        }
        goals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(row: &str, contender: &str, rounds: &[(f64, f64)]) -> Cell {
        let measurement = |(iops, cpu): &(f64, f64)| Measurement {
            iops: *iops,
            mb_per_second: 0.0,
            p50_us: 0.0,
            p99_us: 0.0,
            cpu_us: Some(*cpu),
            device_cpu_us: Some(*cpu),
        };
        Cell {
            row: row.to_owned(),
            contender: contender.to_owned(),
            rounds: rounds.iter().map(measurement).collect(),
            counts: Counts::default(),
        }
    }

    pub(crate) fn results(cells: Vec<Cell>) -> Results {
        Results {
            machine: Machine {
                kernel: String::new(),
                processor: String::new(),
                processors: 1,
                memory_mib: 1,
                load_average: 0.0,
            },
            placement: Placement::Free,
            rounds: 3,
            seconds: 1.0,
            disk_bytes: 1,
            calibration: Vec::new(),
            cells,
            skipped: Vec::new(),
        }
    }

    #[test]
    fn ratios_are_of_rounds_and_not_of_medians() {
        let row = "randread-4k-d32";
        // The machine was twice as slow in the second round.
        let results = results(vec![
            cell(row, "bridge-ram", &[(1.0, 8.0), (1.0, 16.0), (1.0, 8.0)]),
            cell(row, "relay", &[(1.0, 4.0), (1.0, 8.0), (1.0, 4.0)]),
        ]);
        let goals = results.goals();
        assert_eq!(goals.len(), 1);
        assert_eq!((goals[0].value, goals[0].interval), (2.0, (2.0, 2.0)));
        assert_eq!(goals[0].reached, Reached::Yes);
    }

    #[test]
    fn a_goal_that_is_missed_is_said_to_be() {
        let row = "randwrite-4k-d8";
        let results = results(vec![
            cell(row, "serve-file", &[(90.0, 5.0)]),
            cell(row, "qsd-file-io_uring", &[(100.0, 5.0)]),
        ]);
        let reached: Vec<_> = results.goals().iter().map(|goal| goal.reached).collect();
        assert_eq!(reached, [Reached::No, Reached::Yes]);
    }

    #[test]
    fn one_that_is_missed_by_less_than_rounds_differ_is_told_apart() {
        let row = "randwrite-4k-d8";
        let results = results(vec![
            cell(row, "serve-file", &[(90.0, 9.0), (99.0, 9.0), (120.0, 9.0)]),
            cell(row, "qsd-file-io_uring", &[(100.0, 5.0); 3]),
        ]);
        let reached: Vec<_> = results.goals().iter().map(|goal| goal.reached).collect();
        assert_eq!(reached, [Reached::WithinNoise, Reached::No]);
    }

    #[test]
    fn large_requests_copy_nothing() {
        let mut large = cell("read-128k-d32", "bridge-ram", &[(1.0, 1.0)]);
        large.counts.copied_bytes = Some(1.0);
        let small = cell("randread-4k-d1", "bridge-ram", &[(1.0, 1.0)]);
        let goals = results(vec![large, small]).goals();
        assert_eq!(goals.len(), 1);
        assert_eq!(goals[0].reached, Reached::No);
    }
}
