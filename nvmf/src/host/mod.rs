//! The host role: associations with remote NVMe-oF controllers, on the control plane.
//!
//! [`Association::connect`] brings an association up: it resolves the address, connects the admin
//! queue, enables the controller, reads what it can do and agrees on a number of I/O queues.
//! [`Association::select`] finds a namespace, [`Association::open_io_queues`] connects the I/O queue
//! pairs, which are then handed to the workers that drive them. What stays here is one task that
//! owns the admin queue and one that keeps the association alive; [`Association::lost`] tells when
//! either finds that the controller is gone.
//!
//! Everything that waits has a deadline, and nothing that a controller says is believed unchecked.

mod address;
mod admin;
mod ana;
mod association;
mod beats;
mod connect;
mod cross_reset;
mod dial;
pub mod discovery;
mod enable;
mod error;
mod events;
mod identify;
mod inquiry;
mod keepalive;
mod namespace;
mod options;
#[cfg(test)]
mod scripted;
mod survey;
#[cfg(test)]
mod tests;
mod traffic;

pub use crate::spec::ana::AnaState;
pub use crate::transport::tcp::LocalEnd;
pub use address::TargetAddress;
pub use ana::{AnaInfo, AnaLog};
pub use association::Association;
pub use error::{HostError, Loss, Queue};
pub use events::{Changed, EventSupport, HostEvent};
pub use identify::{ControllerInfo, DeallocateLimits, Liveness};
pub use inquiry::Inquiry;
pub use namespace::{ListedNamespace, NamespaceInfo, NamespaceSelector, OptimalIo};
pub use options::HostOptions;
pub use traffic::QueueTraffic;
