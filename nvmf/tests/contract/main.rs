//! What every transport owes to hosts and controllers, asked of each of them: TCP with and without
//! digests, loopback between two owners, and loopback whose ends one owner drives.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]
#![expect(unreachable_pub, reason = "modules of a test binary")]

mod data;
mod endings;
mod link;
mod queue;
