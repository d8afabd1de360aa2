//! Both ends of NVMe/TCP in one thread and in virtual time, with faults, from a seed.
//!
//! ```text
//! load of commands ⇄ host's queue pair ⇄ pipe ⇄ controller's queue pair ⇄ executor | target lane ⇄ media
//!        └── model disk                   └── faults, expectations
//! ```
//!
//! The queue pairs are those of the product, their sockets replaced by the ends of a [`PipeEnd`]
//! pair: nothing else is simulated of them. Behind the controller's is the product's target lane, or an
//! executor that takes more liberties with the transport than the lane does. Their drivers are called when a descriptor would have
//! become ready, and only then.
//!
//! [`run`] takes a seed, and does the same for it each time. It reports the first thing that must
//! never happen: a command that completes twice or never, memory that comes back twice or is written
//! afterwards, a block with content that the [`ModelDisk`] rules out, an ending for the wrong cause.
//!
//! Only with the feature `sim`, which no other package turns on.

mod arena;
mod backend;
mod config;
mod content;
mod disk;
mod expect;
mod fault;
mod follower;
mod host;
mod lane;
mod media;
pub(crate) mod mutation;
mod pipe;
mod random;
mod target;
mod transport;
mod world;

pub(crate) use backend::Mailbox;
pub use config::Profile;
pub use disk::{Forbidden, ModelDisk, Moment, ZEROES};
pub use expect::Side;
pub use fault::Fault;
pub use mutation::{Enabled, Mutation};
pub use pipe::PipeEnd;
pub use random::Random;
pub use transport::SimulatedTcp;
pub use world::{Report, Violation, run};
