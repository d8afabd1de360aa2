//! Opens connected queue pairs to an address: the seam between the host role and the fabric.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

use super::error::HostError;
use super::options::HostOptions;
use crate::spec::trtype;
use crate::transport::loopback::Connector;
use crate::transport::registry::Lease;
use crate::transport::tcp::{self, ConnectError, Digests, LocalEnd};
use crate::transport::{HostQueuePair, QueueParams, Registry};

/// A queue pair to be opened, before Connect.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewQueue {
    pub(super) admin: bool,
    /// Entries.
    pub(super) entries: u32,
    /// Bytes.
    pub(super) in_capsule_limit: u32,
}

/// A fabric on which queue pairs can be opened.
pub(super) trait Dial: Sync {
    /// Connects, and opens a queue pair on the connection.
    fn open(
        &self,
        at: SocketAddr,
        queue: NewQueue,
        deadline: Instant,
    ) -> impl Future<Output = Result<Box<dyn HostQueuePair>, HostError>> + Send;
}

/// TCP, through whichever transport of the registry takes the connection.
pub(super) struct Tcp<'a> {
    registry: &'a Registry,
    local: LocalEnd,
    digests: Digests,
    /// KATO; zero when there is none.
    keep_alive_tmo: Duration,
}

impl<'a> Tcp<'a> {
    /// Connections as the options ask for them.
    pub(super) fn new(registry: &'a Registry, options: &HostOptions) -> Self {
        let digests = Digests {
            header: options.hdr_digest,
            data: options.data_digest,
        };
        Self {
            registry,
            local: options.local.clone(),
            digests,
            keep_alive_tmo: options.keep_alive_tmo,
        }
    }
}

impl Dial for Tcp<'_> {
    async fn open(
        &self,
        at: SocketAddr,
        queue: NewQueue,
        deadline: Instant,
    ) -> Result<Box<dyn HostQueuePair>, HostError> {
        let started = Instant::now();
        let connection = tcp::connect(&self.local, at, self.digests, deadline)
            .await
            .map_err(|error| handshake_failed(at, error, deadline - started))?;
        if !self.keep_alive_tmo.is_zero() {
            // A peer that is gone is noticed no later than by a Keep Alive that is not answered; on I/O
            // queues, too.
            let set = connection.set_patience(self.keep_alive_tmo);
            set.map_err(|error| HostError::Transport {
                at,
                reason: error.to_string(),
            })?;
        }
        let agreed = connection.negotiated.digests;
        if queue.admin && agreed != self.digests {
            tracing::warn!(
                controller = %at, header = agreed.header, data = agreed.data,
                "the controller does not grant the digests that were asked for"
            );
        }
        let params = QueueParams {
            admin: queue.admin,
            queue_size: queue.entries,
            // Connect asks to turn it off. The pair is opened before the answer is known, and
            // needs no more of it: see `connect_queue`.
            sq_flow_control: false,
            in_capsule_limit: queue.in_capsule_limit,
            connection: connection.into(),
            lease: Lease::default(),
        };
        self.registry
            .open_host(trtype::TCP, params)
            .map_err(|error| HostError::Transport {
                at,
                reason: error.to_string(),
            })
    }
}

/// The loopback transport, to a controller of this process. Addresses mean nothing to it.
pub(super) struct Local<'a> {
    pub(super) registry: &'a Registry,
    pub(super) connector: &'a Connector,
}

impl Dial for Local<'_> {
    async fn open(
        &self,
        at: SocketAddr,
        queue: NewQueue,
        _deadline: Instant,
    ) -> Result<Box<dyn HostQueuePair>, HostError> {
        let failed = |reason: String| HostError::Transport { at, reason };
        let connection = self.connector.connect().await;
        let params = QueueParams {
            admin: queue.admin,
            queue_size: queue.entries,
            sq_flow_control: false,
            in_capsule_limit: queue.in_capsule_limit,
            connection: connection
                .map_err(|error| failed(error.to_string()))?
                .into(),
            lease: Lease::default(),
        };
        let opened = self.registry.open_host(trtype::INTRA_HOST, params);
        opened.map_err(|error| failed(error.to_string()))
    }
}

fn handshake_failed(at: SocketAddr, error: ConnectError, after: Duration) -> HostError {
    match error {
        ConnectError::Io(error) => match error.kind() {
            ErrorKind::ConnectionRefused => HostError::Refused { at },
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => {
                HostError::HandshakeClosed { at }
            }
            _ => HostError::Unreachable {
                at,
                reason: error.to_string(),
            },
        },
        ConnectError::Closed => HostError::HandshakeClosed { at },
        ConnectError::TlsDemanded => HostError::TlsDemanded { at },
        ConnectError::TimedOut => HostError::HandshakeTimedOut {
            at,
            after: rounded(after),
        },
        ConnectError::Protocol(reason) | ConnectError::Terminated(reason) => {
            HostError::Handshake { at, reason }
        }
    }
}

/// To the millisecond, for messages.
pub(super) fn rounded(duration: Duration) -> Duration {
    let micros = duration.as_micros() + 500;
    Duration::from_millis(u64::try_from(micros / 1000).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn what_the_socket_reports_becomes_advice() {
        let at: SocketAddr = "192.0.2.1:4420".parse().unwrap();
        let failed = |error| handshake_failed(at, error, Duration::from_micros(1_999_700));
        let io_error = |kind: ErrorKind| failed(ConnectError::Io(io::Error::from(kind)));
        assert_eq!(
            io_error(ErrorKind::ConnectionRefused),
            HostError::Refused { at }
        );
        assert_eq!(
            io_error(ErrorKind::ConnectionReset),
            HostError::HandshakeClosed { at }
        );
        assert!(matches!(
            io_error(ErrorKind::NetworkUnreachable),
            HostError::Unreachable { .. }
        ));
        assert_eq!(
            failed(ConnectError::TimedOut),
            HostError::HandshakeTimedOut {
                at,
                after: Duration::from_secs(2)
            }
        );
        assert!(failed(ConnectError::Closed).to_string().contains("TLS"));
    }
}
