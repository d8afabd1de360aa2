//! Worlds from seeds: both ends of NVMe/TCP in virtual time, with faults, against a model disk.
//!
//! `SIM_SEED=1234` runs that seed alone, `SIM_SEEDS=100000` so many, from `SIM_FIRST` (0) on.
#![expect(
    clippy::print_stdout,
    reason = "what a run did is shown when it fails or is asked for"
)]

mod mutations;

use std::collections::BTreeMap;
use std::panic::catch_unwind;

use nvmf::sim::{Fault, Profile, Report, run};
use nvmf::tcp::Digests;

/// Worlds of an ordinary test run.
const SEEDS: u64 = 2000;
/// Worlds that go wrong before the rest is given up.
const REPORTED: usize = 20;

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value}")))
}

/// A world's report, or what was wrong with it; a panic is wrong, too.
fn outcome(seed: u64, profile: Profile) -> Result<Report, String> {
    match catch_unwind(|| run(seed, profile)) {
        Ok(Ok(report)) => Ok(report),
        Ok(Err(violation)) => Err(violation.to_string()),
        Err(_) => Err(format!("seed {seed}: a panic")),
    }
}

fn seeds() -> Vec<u64> {
    if let Some(seed) = variable("SIM_SEED") {
        return vec![seed];
    }
    let first = variable("SIM_FIRST").unwrap_or(0);
    (first..first + variable("SIM_SEEDS").unwrap_or(SEEDS)).collect()
}

#[test]
fn whatever_goes_wrong_no_command_is_lost_and_no_content_is_wrong() {
    let seeds = seeds();
    println!("seeds {:?} to {:?}", seeds.first(), seeds.last());
    let mut all = Report::default();
    let mut wrong = Vec::new();
    for &seed in &seeds {
        match outcome(seed, Profile::Any) {
            Ok(report) => {
                all.commands += report.commands;
                all.succeeded += report.succeeded;
                all.failed += report.failed;
                all.lost += report.lost;
                all.abandoned += report.abandoned;
                all.steps += report.steps;
                all.faults.extend(report.faults);
            }
            Err(what) => wrong.push(what),
        }
        if wrong.len() == REPORTED {
            break;
        }
    }
    assert!(
        wrong.is_empty(),
        "{}\nagain, alone: SIM_SEED=<number> cargo test -p nvmf --features sim --test simulation",
        wrong.join("\n")
    );
    let mut landed: BTreeMap<Fault, usize> = BTreeMap::new();
    for fault in &all.faults {
        *landed.entry(*fault).or_default() += 1;
    }
    println!(
        "{} worlds: {} commands, {} succeeded, {} failed, {} lost, {} abandoned; {} steps; faults {landed:?}",
        seeds.len(),
        all.commands,
        all.succeeded,
        all.failed,
        all.lost,
        all.abandoned,
        all.steps
    );
    if seeds.len() as u64 >= SEEDS {
        let both = Digests {
            header: true,
            data: true,
        };
        for fault in Fault::possible(both) {
            assert!(landed.contains_key(&fault), "{fault:?} never came to pass");
        }
    }
}

#[test]
fn a_seed_determines_everything() {
    for seed in 0..20 {
        let first = outcome(seed, Profile::Any);
        assert_eq!(first, outcome(seed, Profile::Any));
        assert_ne!(first, outcome(seed + 1000, Profile::Any));
    }
}

#[test]
fn without_faults_every_command_is_answered() {
    for seed in 0..100 {
        let report = outcome(seed, Profile::Calm).unwrap_or_else(|what| panic!("{what}"));
        assert_eq!(report.faults, [], "seed {seed}");
        assert!(report.lost <= report.abandoned, "seed {seed}: {report:?}");
        assert_eq!(
            report.commands,
            report.succeeded + report.failed + report.lost
        );
    }
}
