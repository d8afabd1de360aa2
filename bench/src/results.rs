//! What a run measured, as it goes to JSON; and what follows from it.

use serde::Serialize;

use crate::calibration::Calibration;
use crate::counting::Counts;
use crate::statistics::{Summary, summarize};

/// A whole run.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    pub(crate) machine: Machine,
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
    /// Half the range over the rounds, in percent.
    pub(crate) spread: f64,
    pub(crate) goal: String,
    pub(crate) reached: bool,
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
        let mut add = |what: &str, row: &str, summary: Option<Summary>, most: bool, bound: f64| {
            if let Some(Summary { median, spread }) = summary {
                let sign = if most { "≤" } else { "≥" };
                goals.push(Goal {
                    what: what.to_owned(),
                    row: row.to_owned(),
                    value: median,
                    spread,
                    goal: format!("{sign} {bound}"),
                    reached: if most {
                        median <= bound
                    } else {
                        median >= bound
                    },
                });
            }
        };
        let mut rows: Vec<&str> = self.cells.iter().map(|cell| cell.row.as_str()).collect();
        rows.dedup();
        let file = ["serve-file", "qsd-file-io_uring"];
        for row in &rows {
            let iops = self.ratio(row, file, |m| Some(m.iops));
            add(
                "IOPS, serve-file / qsd-file-io_uring",
                row,
                iops,
                false,
                1.0,
            );
            let cpu = self.ratio(row, file, |m| m.cpu_us);
            add(
                "CPU per I/O, serve-file / qsd-file-io_uring",
                row,
                cpu,
                true,
                1.0,
            );
        }
        for row in BRIDGE_ROWS {
            let cpu = self.ratio(row, ["bridge-ram", "relay"], |m| m.cpu_us);
            add(
                "CPU per I/O, bridge-ram / relay",
                row,
                cpu,
                true,
                BRIDGE_MOST,
            );
        }
        for row in DIGEST_ROWS {
            let cpu = self.ratio(row, [DIGESTS, "bridge-ram"], |m| m.cpu_us);
            let what = "CPU per I/O, bridge-ram-digests / bridge-ram";
            add(what, row, cpu, true, DIGEST_MOST);
        }
        let large = |cell: &&Cell| cell.row.contains("128k") && cell.contender != DIGESTS;
        for cell in self.cells.iter().filter(large) {
            let copied = summarize(cell.counts.copied_bytes);
            let what = format!("copied bytes per I/O, {}", cell.contender);
            add(&what, &cell.row, copied, true, 0.0);
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
        assert_eq!((goals[0].value, goals[0].spread), (2.0, 0.0));
        assert!(goals[0].reached);
    }

    #[test]
    fn a_goal_that_is_missed_is_said_to_be() {
        let row = "randwrite-4k-d8";
        let results = results(vec![
            cell(row, "serve-file", &[(90.0, 5.0)]),
            cell(row, "qsd-file-io_uring", &[(100.0, 5.0)]),
        ]);
        let reached: Vec<bool> = results.goals().iter().map(|goal| goal.reached).collect();
        assert_eq!(reached, [false, true]);
    }

    #[test]
    fn large_requests_copy_nothing() {
        let mut large = cell("read-128k-d32", "bridge-ram", &[(1.0, 1.0)]);
        large.counts.copied_bytes = Some(1.0);
        let small = cell("randread-4k-d1", "bridge-ram", &[(1.0, 1.0)]);
        let goals = results(vec![large, small]).goals();
        assert_eq!(goals.len(), 1);
        assert!(!goals[0].reached);
    }
}
