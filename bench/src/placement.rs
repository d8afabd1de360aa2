//! Which processors the driver and the back-ends run on.
//!
//! A request at a time is a chain of wake-ups, and what each costs depends on whether it crosses from one processor
//! to another. Left alone, the scheduler settles for one placement or another at random and keeps to it, which
//! measures the scheduler. So the driver has a processor of its own, and every back-end the rest.

use std::io;

use clap::ValueEnum;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

/// How processors are shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Placement {
    /// The driver has the first processor, back-ends have the others.
    Apart,
    /// As the scheduler likes.
    Free,
}

impl Placement {
    /// For whoever reads the results.
    pub(crate) fn described(self) -> &'static str {
        match self {
            Self::Apart => "the driver has a processor of its own, back-ends have the others",
            Self::Free => "the scheduler places driver and back-ends",
        }
    }
}

/// The sets of processors that a run uses.
#[derive(Debug)]
pub(crate) struct Processors {
    all: CpuSet,
    driver: CpuSet,
    back_ends: CpuSet,
}

impl Processors {
    /// Shares out the processors that this process may use. With one alone, everything runs there.
    ///
    /// # Errors
    /// The kernel does not tell which they are.
    pub(crate) fn new(placement: Placement) -> io::Result<Self> {
        let all = sched_getaffinity(None)?;
        let (driver, back_ends) = match placement {
            Placement::Apart => split(&all),
            Placement::Free => (all, all),
        };
        Ok(Self {
            all,
            driver,
            back_ends,
        })
    }

    /// For what this thread starts from now on: programs inherit it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn start_back_ends(&self) -> io::Result<()> {
        Ok(sched_setaffinity(None, &self.back_ends)?)
    }

    /// For driving a back-end from this thread.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn drive(&self) -> io::Result<()> {
        Ok(sched_setaffinity(None, &self.driver)?)
    }

    /// For everything else.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn use_all(&self) -> io::Result<()> {
        Ok(sched_setaffinity(None, &self.all)?)
    }
}

/// The first processor, and the others; the same where there is one.
fn split(all: &CpuSet) -> (CpuSet, CpuSet) {
    let (mut first, mut rest) = (CpuSet::new(), CpuSet::new());
    for cpu in (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu)) {
        let set = if first.count() == 0 {
            &mut first
        } else {
            &mut rest
        };
        set.set(cpu);
    }
    if rest.count() == 0 {
        (*all, *all)
    } else {
        (first, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cpus: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        for &cpu in cpus {
            set.set(cpu);
        }
        set
    }

    #[test]
    fn the_driver_has_the_first_processor_and_nobody_else_does() {
        assert_eq!(split(&set(&[2, 3, 7])), (set(&[2]), set(&[3, 7])));
        assert_eq!(split(&set(&[0, 1])), (set(&[0]), set(&[1])));
    }

    #[test]
    fn a_single_processor_is_shared() {
        assert_eq!(split(&set(&[4])), (set(&[4]), set(&[4])));
    }
}
