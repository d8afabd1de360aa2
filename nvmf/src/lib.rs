//! NVMe over Fabrics, both ends, with no knowledge of virtio.
//!
//! - [`spec`]: what the specifications put on the wire, no behaviour.
//! - [`tcp`]: NVMe/TCP as a pure machine for both roles; no sockets, clocks or threads.
//! - [`transport`]: queue pairs over some fabric, and the registry that finds one.
//! - [`host`]: associations with remote controllers.
//! - [`controller`]: subsystems, ports and controllers that remote hosts connect to.
//! - [`backend`]: what stores a namespace's blocks.
#![cfg_attr(
    feature = "sim",
    doc = "- [`sim`]: both ends in virtual time, with faults, from a seed."
)]

/// True while a deliberate defect of the simulation is on; never in a build without it.
#[cfg(feature = "sim")]
macro_rules! mutated {
    ($mutation:ident) => {
        crate::sim::mutation::is_on(crate::sim::Mutation::$mutation)
    };
}

/// True while a deliberate defect of the simulation is on; never in a build without it.
#[cfg(not(feature = "sim"))]
macro_rules! mutated {
    ($mutation:ident) => {
        false
    };
}

pub mod backend;
pub mod controller;
pub mod host;
#[cfg(feature = "sim")]
pub mod sim;
pub mod spec;
pub mod tcp;
pub mod transport;
