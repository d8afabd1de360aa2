//! What cannot be counted while time is measured: system calls, which are slower when they are counted, and copied
//! bytes, which a program tells only when it ends. A contender is started anew for each row.

use anyhow::Result;
use serde::Serialize;

use crate::contender::{Contender, Setup};
use crate::kernel::SyscallCounter;
use crate::load::{Load, Until};
use crate::rows::Row;

/// Requests before counting, for each in flight: pools fill, pages are mapped.
const WARM: u64 = 10;
/// Requests that are counted.
const COUNTED: u64 = 4000;

/// Counts of one row; what is not known is missing.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Counts {
    /// System calls of all processes for each request.
    pub(crate) syscalls: Option<f64>,
    /// Payload bytes that were copied inside the processes, for each request.
    pub(crate) copied_bytes: Option<f64>,
}

/// Counts one row of one contender.
///
/// # Errors
/// It does not serve.
pub(crate) fn count(contender: &Contender, setup: &Setup, row: Row, run: &str) -> Result<Counts> {
    let mut running = contender.start(setup, run)?;
    let pids = running.processes.pids();
    let sectors = setup.size / crate::link::SECTOR;
    let mut load = Load::new(&mut *running.link, row, sectors, 1);
    load.run(Until::Finished(WARM * row.depth as u64))?;
    load.drain()?;
    let counter = SyscallCounter::start(&pids).ok();
    let finished = load.run(Until::Finished(COUNTED))?.count() + load.drain()?.count();
    let syscalls = match counter {
        Some(mut counter) if !pids.is_empty() => Some(counter.count()? as f64 / finished as f64),
        _ => None,
    };
    let logs = running.end();
    Ok(Counts {
        syscalls,
        copied_bytes: logs.iter().find_map(|log| copied(log)),
    })
}

/// Copied bytes for each request of a disk, by the counters that `vhost-nvmf` logs at its end.
fn copied(log: &str) -> Option<f64> {
    log.lines().rev().find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        let fields = line.get("fields")?;
        let copied = fields.get("copied_bytes")?.as_f64()?;
        let requests = fields.get("requests")?.as_f64()?;
        (requests > 0.0).then_some(copied / requests)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copied_bytes_are_found_in_a_log() {
        let log = concat!(
            "{\"fields\":{\"message\":\"front-end connected\"}}\n",
            "not JSON\n",
            "{\"fields\":{\"message\":\"disk counters\",\"requests\":4,\"copied_bytes\":10}}\n",
            "{\"fields\":{\"message\":\"ended\"}}\n",
        );
        assert_eq!(copied(log), Some(2.5));
        assert_eq!(copied("{\"fields\":{\"requests\":4}}"), None);
        assert_eq!(
            copied("{\"fields\":{\"requests\":0,\"copied_bytes\":0}}"),
            None
        );
    }
}
