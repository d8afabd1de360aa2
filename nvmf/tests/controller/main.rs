//! The controller as hosts see it, over real connections.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends when something is missing"
)]
#![expect(unreachable_pub, reason = "modules of a test binary")]

mod admin;
mod capture;
mod connect;
mod cross_reset;
mod discovery;
mod events;
mod fault;
mod io;
mod rig;
mod session;
