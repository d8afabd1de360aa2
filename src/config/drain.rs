//! How rings stop: how long they may take, and what becomes of requests that take longer.

use std::time::Duration;

use clap::ValueEnum;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Drain {
    /// How long a ring that stops may wait for a controller that is lost.
    pub(crate) timeout: Duration,
    /// What becomes of its requests then.
    pub(crate) policy: DrainPolicy,
    /// Queue pairs with requests that must not wait may be ended: there is a way back to the controller.
    pub(crate) may_end_paths: bool,
}

/// What becomes of requests that a stopping ring cannot finish in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum DrainPolicy {
    /// The guest gets an I/O error
    #[default]
    Error,
    /// They stay in flight, for when the ring starts again, if the VMM keeps a region of requests in flight; otherwise as error
    Leave,
}
