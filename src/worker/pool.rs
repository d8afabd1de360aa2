//! The workers of a process: how many there are, on which CPUs they run, and whose turn it is to get a lane.

use std::io;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use rustix::thread::CpuSet;

use super::{NewLane, Worker};

/// How many workers a process has, and where they run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Crew {
    /// Workers; `None` is one for each CPU that they may run on.
    pub(crate) count: Option<usize>,
    /// CPUs, one for each worker in turn; `None` lets the system choose among those of the process.
    pub(crate) cpus: Option<CpuList>,
}

/// CPUs by their numbers, each once, in the order in which they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CpuList(Vec<usize>);

/// Why a text is no list of CPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CpuListError {
    /// Not of the form.
    #[error("write numbers and ranges, as in 0-3,8")]
    Form,
    /// Higher than any that a process can be bound to.
    #[error("there is no CPU {0}: the highest number is {max}", max = CpuSet::MAX_CPU - 1)]
    TooHigh(usize),
    /// One twice.
    #[error("CPU {0} is in it twice")]
    Twice(usize),
}

/// Why there are no workers.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CrewError {
    /// No thread or no descriptor can be had.
    #[error("cannot start a worker: {0}")]
    Start(#[from] io::Error),
    /// It cannot run where it is to.
    #[error(
        "no worker can run on CPU {cpu}: {error}; choose --worker-cpus among those of this process"
    )]
    Cpu {
        /// The CPU.
        cpu: usize,
        /// What the system said.
        error: io::Error,
    },
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let number = |text: &str| match text.parse::<usize>() {
            Ok(cpu) if cpu < CpuSet::MAX_CPU => Ok(cpu),
            Ok(cpu) => Err(CpuListError::TooHigh(cpu)),
            Err(_) => Err(CpuListError::Form),
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(CpuListError::Form);
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(CpuListError::Twice(cpu));
                }
                cpus.push(cpu);
            }
        }
        Ok(Self(cpus))
    }
}

impl Crew {
    /// How many workers there will be.
    pub(crate) fn count(&self) -> usize {
        let cpus = || match &self.cpus {
            Some(CpuList(cpus)) => cpus.len(),
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        self.count.unwrap_or_else(cpus).max(1)
    }

    /// Starts them: no more than have something to do where there are `lanes` lanes.
    ///
    /// # Errors
    /// [`CrewError`] as one line.
    pub(crate) fn start(&self, lanes: usize) -> Result<Workers, CrewError> {
        let mut all = Vec::new();
        for index in 0..self.count().min(lanes.max(1)) {
            let cpu = self
                .cpus
                .as_ref()
                .map(|CpuList(cpus)| cpus[index % cpus.len()]);
            all.push(Worker::start(index, cpu)?);
        }
        Ok(Workers {
            all,
            next: AtomicUsize::new(0),
        })
    }
}

/// Running workers. They end when this is dropped and their lanes have ended.
#[derive(Debug)]
pub(crate) struct Workers {
    all: Vec<Worker>,
    next: AtomicUsize,
}

impl Workers {
    /// The worker whose turn it is.
    fn next(&self) -> Option<&Worker> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.all.get(turn % self.all.len().max(1))
    }

    /// Hands a lane to the worker whose turn it is.
    pub(crate) async fn place(&self, lane: NewLane) {
        if let Some(worker) = self.next() {
            worker.place(lane).await;
        }
    }

    /// As [`Self::place`], without waiting; false when that worker has too many new lanes already.
    pub(crate) fn try_place(&self, lane: NewLane) -> bool {
        self.next().is_some_and(|worker| worker.try_place(lane))
    }

    /// Lets all workers end with their lanes, and gives their threads.
    pub(crate) fn finish(self) -> Vec<JoinHandle<()>> {
        self.all.into_iter().map(Worker::finish).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_numbers_and_ranges() {
        let list = |text: &str| text.parse::<CpuList>().map(|CpuList(cpus)| cpus);
        assert_eq!(list("3"), Ok(vec![3]));
        assert_eq!(list("8,0-2"), Ok(vec![8, 0, 1, 2]));
        for text in ["", "a", "1-", "-1", "3-1", "1,,2", "0 1"] {
            assert_eq!(list(text), Err(CpuListError::Form), "{text}");
        }
        assert_eq!(list("0-3,2"), Err(CpuListError::Twice(2)));
        assert_eq!(
            list("0-99999999999"),
            Err(CpuListError::TooHigh(99_999_999_999))
        );
    }

    #[test]
    fn there_are_as_many_workers_as_asked_for_but_none_without_a_lane() {
        let crew = |count: Option<usize>, cpus: Option<&str>| Crew {
            count,
            cpus: cpus.map(|text| text.parse().unwrap()),
        };
        assert_eq!(crew(Some(3), None).start(8).unwrap().all.len(), 3);
        assert_eq!(crew(Some(3), None).start(2).unwrap().all.len(), 2);
        assert_eq!(crew(None, Some("0,1,2")).count(), 3);
        assert_eq!(crew(Some(5), Some("0")).count(), 5);
        assert!(crew(None, None).count() >= 1);
    }

    #[test]
    fn a_cpu_that_is_not_there_is_named() {
        let crew = Crew {
            count: None,
            cpus: Some("1023".parse().unwrap()),
        };
        let error = crew.start(1).unwrap_err().to_string();
        assert!(
            error.contains("CPU 1023") && error.contains("--worker-cpus"),
            "{error}"
        );
    }
}
