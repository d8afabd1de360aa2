//! NVMe/TCP over a socket: moves bytes between the socket, the machine and memdescs.

mod controller;
mod copies;
mod dial;
mod host;
mod local_end;
mod parting;
mod socket;
mod stream;
mod syscall;

use std::io;
use std::net::TcpStream;
use std::time::Duration;

use super::registry;
use super::{ControllerQueuePair, HostQueuePair, Opening, QueueParams, Transport};
use crate::spec::trtype;
pub use crate::tcp::Digests;
use crate::tcp::negotiate::Negotiated;
pub use dial::{ConnectError, accept, connect};
pub use local_end::LocalEnd;

/// A TCP connection on which ICReq and ICResp were exchanged.
#[derive(Debug)]
pub struct Connection<S = TcpStream> {
    /// The socket, non-blocking.
    pub stream: S,
    /// What was agreed.
    pub negotiated: Negotiated,
}

impl Connection {
    /// Takes the peer for dead when it does not acknowledge data for this long (a second at least), or,
    /// while there is none, does not answer a probe after that.
    ///
    /// # Errors
    /// The operating system's.
    pub fn set_patience(&self, patience: Duration) -> io::Result<()> {
        dial::set_patience(&self.stream, patience)
    }
}

impl From<Connection> for registry::Connection {
    fn from(connection: Connection) -> Self {
        Self::new(connection)
    }
}

/// Software NVMe/TCP.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tcp;

impl Transport for Tcp {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn trtype(&self) -> u8 {
        trtype::TCP
    }

    fn priority(&self) -> i32 {
        0
    }

    fn open_host(&self, params: Box<QueueParams>) -> Opening<dyn HostQueuePair> {
        match params.over::<Connection>() {
            Ok(params) => Opening::Opened(Box::new(host::TcpHost::new(params))),
            Err(params) => Opening::Declined(params),
        }
    }

    fn open_controller(&self, params: Box<QueueParams>) -> Opening<dyn ControllerQueuePair> {
        match params.over::<Connection>() {
            Ok(params) => Opening::Opened(Box::new(controller::TcpController::new(params))),
            Err(params) => Opening::Declined(params),
        }
    }
}

/// A host's queue pair over one end of a simulated pipe.
#[cfg(feature = "sim")]
pub(crate) fn simulated_host(
    params: QueueParams<Connection<crate::sim::PipeEnd>>,
) -> Box<dyn HostQueuePair> {
    Box::new(host::TcpHost::new(params))
}

/// A controller's queue pair over one end of a simulated pipe.
#[cfg(feature = "sim")]
pub(crate) fn simulated_controller(
    params: QueueParams<Connection<crate::sim::PipeEnd>>,
) -> Box<dyn ControllerQueuePair> {
    Box::new(controller::TcpController::new(params))
}
