//! The daemon as a VMM and a network see it: the real program, its socket driven by
//! `virtio-driver` and by `vhost`'s front-end.
//!
//! Every process is the test's own and ends with it; when a test fails, what its processes logged
//! is shown.

#![expect(clippy::expect_used, reason = "a test that cannot run has failed")]

mod daemons;
mod driver;
mod front_end;
mod keeper;
mod memory;
mod networks;
mod noise;
mod process;
mod proxy;
mod raw;
mod ring;
mod scripted;

mod access;
mod away;
mod bad_peers;
mod cloud_hypervisor;
mod controller_limits;
mod cross_reset;
mod data;
mod efficiency;
mod ending;
mod faults;
mod fewer_queues;
mod finding;
mod firecracker;
mod growth;
mod handover;
mod hostile;
mod hotplug;
mod inflight;
mod keep_alive;
mod kills;
mod links;
mod local;
mod local_end;
mod malformed;
mod migration;
mod migration_fences;
mod migration_sectors;
mod multipath;
mod options;
mod outages;
mod program;
mod protocol;
mod requests;
mod sectors;
mod stages;
mod status;
mod stopping;
mod throttling;
