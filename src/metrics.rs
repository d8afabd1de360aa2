//! Counters of a disk, named in one place: written by its lanes, summed when they are shown.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A counter with one writer: adding needs no locked instruction.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds; called by the one lane that owns the counter.
    pub(crate) fn add(&self, more: u64) {
        self.0
            .store(self.get().wrapping_add(more), Ordering::Relaxed);
    }

    /// Sets; called by the one lane that owns the counter.
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value, perhaps a moment old.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters of one lane.
        #[derive(Debug, Default)]
        pub(crate) struct LaneCounters {
            $($(#[$doc])* pub(crate) $name: Counter,)*
        }

        /// Sums over the lanes of a disk.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub(crate) struct DiskTotals {
            $($(#[$doc])* pub(crate) $name: u64,)*
        }

        impl DiskTotals {
            fn add(&mut self, lane: &LaneCounters) {
                $(self.$name = self.$name.wrapping_add(lane.$name.get());)*
            }

            /// Logs them.
            pub(crate) fn log(&self, disk: &str) {
                tracing::info!(disk, $($name = self.$name,)* "disk counters");
            }
        }
    };
}

counters! {
    /// Guest requests answered.
    requests,
    /// Reads among them.
    reads,
    /// Writes among them.
    writes,
    /// Flushes among them.
    flushes,
    /// Discards among them.
    discards,
    /// Write-zeroes among them.
    write_zeroes,
    /// Requests that were answered with an error.
    errors,
    /// Bytes that guests read.
    read_bytes,
    /// Bytes that guests wrote.
    written_bytes,
    /// Requests that waited for the limits of the disk.
    throttled,
    /// Requests that begin or end within a block of the namespace, where the disk takes such.
    unaligned,
    /// NVMe commands sent.
    commands,
    /// Payload bytes copied inside the process.
    copied_bytes,
    /// System calls that sent to a controller.
    sends,
    /// System calls that received from a controller.
    receives,
    /// Calls to guests.
    interrupts,
    /// Turns of lanes.
    turns,
}

/// Counters of one disk.
#[derive(Debug, Default)]
pub(crate) struct DiskCounters {
    lanes: Mutex<Vec<Arc<LaneCounters>>>,
}

impl DiskCounters {
    /// Counters for one more lane.
    pub(crate) fn lane(&self) -> Arc<LaneCounters> {
        let counters = Arc::new(LaneCounters::default());
        self.lanes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(&counters));
        counters
    }

    /// The sums.
    pub(crate) fn totals(&self) -> DiskTotals {
        let mut totals = DiskTotals::default();
        for lane in self
            .lanes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            totals.add(lane);
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_the_sums_over_the_lanes() {
        let counters = DiskCounters::default();
        let (a, b) = (counters.lane(), counters.lane());
        a.reads.add(2);
        a.reads.add(1);
        b.reads.add(5);
        b.copied_bytes.set(7);
        let totals = counters.totals();
        assert_eq!(
            (totals.reads, totals.copied_bytes, totals.writes),
            (8, 7, 0)
        );
    }
}
