//! What the harness and the agent in the guest say to each other: one JSON object a line, over a virtio-serial port.
//!
//! The port is the agent's alone, so no kernel message can garble a line.

use serde::{Deserialize, Serialize};

/// The name of the virtio-serial port.
pub const PORT_NAME: &str = "guest-agent";

/// From the harness to the guest.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Run a script with bash; several may run at once.
    Run {
        /// Returned with the reply.
        id: u64,
        /// The script's text.
        script: String,
        /// After so many seconds the script is killed.
        seconds: u64,
    },
}

/// From the guest to the harness.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The agent is up; sent once for each boot.
    Hello {
        /// The kernel's random identifier of this boot.
        boot_id: String,
    },
    /// A script has ended.
    Done {
        /// The request's identifier.
        id: u64,
        /// The exit status; 124 when it was killed for its time.
        status: i32,
        /// The end of its standard output.
        stdout: String,
        /// The end of its standard error.
        stderr: String,
    },
}
