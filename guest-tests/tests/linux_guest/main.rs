//! A Linux guest, its disks remote NVMe/TCP namespaces, and Linux as the other end of the fabric: every case boots real parts.
//!
//! Booting is slow where there is no KVM, so cases share guests; each case has a name and a verdict of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot run has failed")]

mod capture;
mod cases;
mod crashes;
mod data;
mod devices;
mod disks;
mod growth;
mod handover;
mod linux_absence;
mod linux_discovery;
mod linux_host;
mod linux_paths;
mod linux_target;
mod load;
mod machines;
mod memory;
mod migration;
mod nvmet;
mod outages;
mod plugging;
mod resets;
mod sectors;
mod synced;
mod throttling;

/// A mebibyte.
const MIB: u64 = 1 << 20;

/// The seed of a round; the checks that use it print it.
fn seed(round: u64) -> u64 {
    0x5eed_0000 + round
}
