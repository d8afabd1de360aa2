//! Boots Linux guests under QEMU, starts the daemons that their disks come from, and runs checks inside.
//!
//! A test starts [`Export`] and [`Attach`], boots a [`Guest`] with the sockets as disks, and runs shell scripts in it with
//! [`Guest::sh`]; [`Checks`] names each case, reports it, and fails the test at the end. Whatever is started is ended when
//! its value is dropped; when a test fails, the end of the console and of every daemon's log is printed then.
//!
//! Everything is bounded in time. Ports are never fixed, sockets and images live in a temporary directory for each test, so
//! that several runs can go at once.

mod artifacts;
mod channel;
mod checks;
mod cpio;
mod daemon;
mod guest;
mod monitor;
mod network;
mod qemu;
mod recorder;
mod seeded;
mod vhost_nvmf;

pub use channel::{PORT_NAME, Reply, Request};
pub use checks::Checks;
pub use daemon::Daemon;
pub use guest::{Disk, Guest, GuestOptions, Job, Output};
pub use monitor::{Migrated, Monitor, rounds_of_copying};
pub use network::Network;
pub use qemu::{qemu_program, qemu_version, reconnect_each_second};
pub use recorder::Recorder;
pub use seeded::{Seeded, fill};
pub use vhost_nvmf::{Attach, AttachOptions, DiskCounters, Export, NamespaceCounters, discover};

/// How many rounds the repeating cases do: 1, or what `VHOST_NVMF_ROUNDS` says (`make soak` sets it).
pub fn rounds() -> u64 {
    std::env::var("VHOST_NVMF_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(1)
        .max(1)
}
