//! NVMe over Fabrics, both ends, with no knowledge of virtio.
//!
//! - [`spec`]: what the specifications put on the wire, no behaviour.
//! - [`tcp`]: NVMe/TCP as a pure machine for both roles; no sockets, clocks or threads.
//! - [`transport`]: queue pairs over some fabric, and the registry that finds one.
//! - [`host`]: associations with remote controllers.
//! - [`controller`]: subsystems, ports and controllers that remote hosts connect to.
//! - [`backend`]: what stores a namespace's blocks.

pub mod backend;
pub mod controller;
pub mod host;
pub mod spec;
pub mod tcp;
pub mod transport;
